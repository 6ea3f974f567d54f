"""Answers that were paid for are kept in one sqlite file, under the hash of what was asked.

Answers are committed as they come, so a process killed at any point loses only the calls in flight. The
file uses sqlite's rollback journal and not its write-ahead log: it stays one file that may be copied, and it works on
the network file systems that clusters have.
"""

import hashlib
import json
import sqlite3
from pathlib import Path
from typing import Any, Self

from safesail.errors import InputError

__all__ = ["AnswerCache", "answer_key"]

_KEY_VERSION = 1  # raise it when the same request comes to mean something else
_TABLE = "CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL) WITHOUT ROWID"


def answer_key(identity: dict[str, Any], request: dict[str, Any]) -> str:
    """The sha256 of the canonical JSON of who is asked (`identity`) and what is asked (`request`)."""
    asked = {"version": _KEY_VERSION, "backend": identity, "request": request}
    return hashlib.sha256(json.dumps(asked, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class AnswerCache:
    """A context manager over the file at `path`; with None the answers last as long as the context."""

    def __init__(self, path: Path | None):
        self._path = path

    def __enter__(self) -> Self:
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
        # isolation_level None commits each statement; a caller with a running event loop is served from another thread,
        # one at a time, hence check_same_thread.
        self._rows = sqlite3.connect(
            self._path or ":memory:", timeout=60, isolation_level=None, check_same_thread=False
        )
        try:
            self._rows.execute(_TABLE)
        except sqlite3.DatabaseError as error:
            self._rows.close()
            raise InputError(
                f"{self._path} cannot be used as the cache of language model answers ({error}); "
                "delete it or give another path"
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        self._rows.close()

    def get(self, key: str) -> dict[str, Any] | None:
        """The answer kept under `key`, None when there is none."""
        row = self._rows.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
        return None if row is None else json.loads(row[0])

    def put(self, answers: dict[str, dict[str, Any]]) -> None:
        """Keeps `{key: answer}` (JSON values only), all or none; they are on disk when this returns."""
        rows = [(key, json.dumps(answer)) for key, answer in answers.items()]
        try:
            self._rows.execute("BEGIN")
            self._rows.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?)", rows)
            self._rows.execute("COMMIT")
        except sqlite3.OperationalError as error:  # a full disk, a folder that has become read-only
            if self._rows.in_transaction:
                self._rows.execute("ROLLBACK")
            raise InputError(
                f"{self._path} could not take an answer ({error}); mend that and run the same command: what it holds "
                "is not asked again"
            ) from error
