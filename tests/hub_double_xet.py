"""Files that a Xet client left in a content-addressed storage on disk: found by their sha256 and put together again.

`hf_xet` keeps such a storage itself for an address `local:///folder`. Its shards say which file is which
(xet-core, `mdb_shard`): a header of 48 bytes, then per file a head (hash, flags, number of segments), its segments,
their verification entries and the sha256, all rows of 48 bytes; a head of 0xFF bytes ends them.
"""

import importlib
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hub_double_store import File

ROW = 48
HAS_VERIFICATION, HAS_SHA256 = 1 << 31, 1 << 30


class Stored(NamedTuple):
    """A file as a shard describes it."""

    xet: str
    sha256: str
    size: int


def find(cas: Path, sha256: str, scratch: Path) -> File | None:
    """The file of this sha256, or None if no client has put it there."""
    for shard in sorted((cas / "xet" / "xorbs" / "shards").glob("*.mdb")):
        for stored in files_of(shard.read_bytes()):
            if stored.sha256 == sha256:
                file = File(_content(cas, stored, scratch), large=True, xet=stored.xet)
                assert file.sha256 == sha256, "the storage gave other bytes than were put into it"
                return file
    return None


def files_of(shard: bytes) -> Iterator[Stored]:
    """The files of one shard whose sha256 it knows."""
    at = ROW
    while shard[at : at + 32] != b"\xff" * 32:
        xet, flags, n_segments = shard[at : at + 32], *struct.unpack_from("<II", shard, at + 32)
        size = sum(struct.unpack_from("<I", shard, at + ROW * (1 + i) + 36)[0] for i in range(n_segments))
        at += ROW * (1 + n_segments * (2 if flags & HAS_VERIFICATION else 1))
        if flags & HAS_SHA256:
            yield Stored(_hex(xet), _hex(shard[at : at + 32]), size)
            at += ROW


def _hex(hash: bytes) -> str:
    """A hash is kept as four little-endian numbers."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", hash))


def _content(cas: Path, stored: Stored, scratch: Path) -> bytes:
    """The bytes of a file, read by the real client."""
    client: Any = importlib.import_module("hf_xet")  # which declares no types
    target = scratch / stored.xet
    with client.XetSession().new_file_download_group(endpoint=f"local://{cas}") as group:
        group.start_download_file(client.XetFileInfo(stored.xet, stored.size), str(target))
    return target.read_bytes()
