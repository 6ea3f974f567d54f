"""A request to the Hub double and the answer to it."""

import json
from typing import Any, NamedTuple

from hub_double_store import Caller, HubError, Repo, Store

__all__ = ["Call", "Reply", "error_headers", "page", "proposing"]


class Reply(NamedTuple):
    """An answer: JSON if the body is not bytes."""

    body: Any = None
    status: int = 200
    headers: dict[str, str] = {}  # noqa: RUF012  # never changed


class Call(NamedTuple):
    """A request, its address taken apart by the pattern that matched it."""

    method: str
    parts: dict[str, str]
    query: dict[str, list[str]]
    headers: dict[str, str]
    """Names in lower case."""
    body: bytes
    caller: Caller
    store: Store
    url: str
    """The address of the double; `storage_url` is the same server under another host name, as the Hub's storage is."""
    storage_url: str
    cas_url: str | None
    """Where Xet clients put chunks, or None when the double speaks LFS."""

    @property
    def json(self) -> Any:
        return json.loads(self.body) if self.body.strip() else {}

    @property
    def key(self) -> tuple[Caller, str, str]:
        """Who asks for which repository."""
        return self.caller, self.repo_type, self.parts["id"]

    @property
    def repo_type(self) -> str:
        return (self.parts.get("kind") or "models").rstrip("/")[:-1]

    def flag(self, name: str) -> bool:
        return self.query.get(name, ["0"])[0].lower() in ("1", "true")


def page(call: Call, repo: Repo) -> str:
    """The address of a repository's page."""
    prefix = "" if repo.repo_type == "model" else f"{repo.repo_type}s/"
    return f"{call.url}/{prefix}{repo.id}"


def proposing(call: Call) -> Repo:
    """A repository to which the caller may open a pull request: any that it sees."""
    repo = call.store.seen(*call.key)
    call.caller.must_be_known()
    return repo


def error_headers(error: HubError) -> dict[str, str]:
    """The headers by which `huggingface_hub` chooses its exception; a header holds one line of Latin-1."""
    message = " ".join(error.message.split()).encode("ascii", "replace").decode()
    return {"X-Error-Message": message, **({"X-Error-Code": error.code} if error.code else {})}
