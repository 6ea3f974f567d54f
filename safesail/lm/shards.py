"""Shards of activations as files: `shard-00000.safetensors`, and beside it `shard-00000.json` with its checksum.

The checksum is written after the shard, so a shard without one, or with another one, is not whole.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from safesail.errors import InputError
from safesail.files import write_tensors
from safesail.run import write_json

__all__ = [
    "MADE_ANEW",
    "checksum",
    "checksum_or_none",
    "damaged",
    "is_whole",
    "read_facts",
    "recorded_checksum",
    "shard_file",
    "write_shard",
]

MADE_ANEW = "`safesail harvest RUN --force`, of a reward model `safesail reward RUN --until harvest --force`"
"""The commands that make a harvest anew, for messages of what does not know its run."""
_PIECES, _FACTS = "pieces.parquet", "harvest.json"


def shard_file(folder: Path, number: int) -> Path:
    """Where a shard lies."""
    return folder / f"shard-{number:05d}.safetensors"


def write_shard(folder: Path, number: int, tensors: dict[str, Tensor]) -> None:
    """Write a shard, then its checksum and number of rows."""
    path = shard_file(folder, number)
    _sidecar_file(path).unlink(missing_ok=True)  # of a shard that was there before
    write_tensors(path, tensors)
    write_json(_sidecar_file(path), {"sha256": checksum(path), "n_rows": len(tensors["token_ids"])})


def is_whole(folder: Path, number: int) -> bool:
    """Whether a shard is there with the content its checksum was taken of."""
    path = shard_file(folder, number)
    return path.is_file() and _sidecar_file(path).is_file() and checksum(path) == recorded_checksum(folder, number)


def recorded_checksum(folder: Path, number: int) -> str | None:
    """The checksum that was written down for a shard; None where the note cannot be read."""
    try:
        return json.loads(_sidecar_file(shard_file(folder, number)).read_text(encoding="utf-8"))["sha256"]
    except (ValueError, KeyError, TypeError):
        return None


def checksum(path: Path) -> str:
    """The SHA-256 of a file's content."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def read_facts(folder: Path) -> dict[str, Any]:
    """The content of a finished harvest's `harvest.json`."""
    try:
        return json.loads((folder / _FACTS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / _FACTS} cannot be read ({error}); make the harvest anew: {MADE_ANEW}.") from error


def damaged(folder: Path, progress: Callable[[int], Any] = lambda n: None) -> list[int]:
    """The numbers of a finished harvest's shards that are missing, truncated or changed.

    `progress` is told the bytes read. A damaged table of pieces is an InputError: nothing could be made again from it.
    """
    facts = read_facts(folder)
    if facts.get("pieces_sha256") not in (None, checksum_or_none(folder / _PIECES)):
        raise InputError(f"{folder / _PIECES} is damaged or missing; make the harvest anew: {MADE_ANEW}.")
    found = []
    for number, expected in enumerate(facts.get("sha256_of_shards", [])):
        path = shard_file(folder, number)
        if checksum_or_none(path) != expected:
            found.append(number)
        progress(path.stat().st_size if path.is_file() else 0)
    return found


def checksum_or_none(path: Path) -> str | None:
    """The checksum of a file; None where there is none."""
    return checksum(path) if path.is_file() else None


def _sidecar_file(path: Path) -> Path:
    return path.with_suffix(".json")
