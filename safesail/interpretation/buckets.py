"""Entries sorted by latent, value and row in bounded memory: a bucket file on disk for each range of latents.

`spill` appends the entries of one pass to the buckets and counts them by latent; `Buckets.parts` then reads one bucket
after the other, a larger one in several ranges of latents. What comes out depends neither on the number of buckets nor
on the memory allowed. The least that is held at a time is one latent's entries.
"""

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from safesail.files import replacing
from safesail.interpretation.firings import Block, Firings

__all__ = ["BYTES_PER_ENTRY", "Buckets", "spill"]

BYTES_PER_ENTRY = 32
"""Of memory while a part is sorted: its keys and what they are taken apart into, and the part before it."""
_ENTRY = np.dtype([("latent", "<u4"), ("row", "<u4"), ("value", "<u4")])  # row and value as read make the sort key
_MOST_FILES = 256
_AT_ONCE = 1 << 18  # entries read from a file at a time
Numbers = NDArray[Any]


class Buckets(NamedTuple):
    """The entries of one pass, on disk."""

    folder: Path
    bounds: list[int]
    """Bucket i holds the latents from bounds[i] up to bounds[i + 1]."""
    counts: Numbers
    """(d_sae,) how often each latent fires."""
    max_entries: int

    def parts(self) -> Iterator[tuple[range, Firings]]:
        """Ranges of latents that follow each other and together are all, each with its sorted entries."""
        for number, (first, last) in enumerate(itertools.pairwise(self.bounds)):
            for latents in _ranges(range(first, last), self.counts, self.max_entries):
                yield latents, _sorted(self.folder / _name(number), latents, self.counts)


def spill(blocks: Iterable[Block], d_sae: int, n_rows: int, folder: Path, max_entries: int) -> Buckets:
    """Write the entries of all blocks into buckets of about `max_entries` each. n_rows: of all blocks together.

    How many entries there will be, and in which latents, is guessed from the first block.
    """
    blocks = iter(blocks)
    head = list(itertools.islice(blocks, 1))
    counts = np.zeros(d_sae, np.int64)
    bounds = _bounds(head, d_sae, n_rows, max_entries)
    with contextlib.ExitStack() as stack:
        n_bytes = _ENTRY.itemsize * max_entries
        paths = [stack.enter_context(replacing(folder / _name(i), n_bytes)) for i in range(len(bounds) - 1)]
        files = [stack.enter_context(open(path, "wb")) for path in paths]
        for block in itertools.chain(head, blocks):
            entries = _entries(block, d_sae)
            counts += np.bincount(entries["latent"], minlength=d_sae)
            cuts = np.searchsorted(entries["latent"], bounds).tolist()
            for file, (low, high) in zip(files, itertools.pairwise(cuts), strict=True):
                file.write(entries[low:high].tobytes())
    return Buckets(folder, bounds, counts, max_entries)


def _name(number: int) -> str:
    return f"bucket-{number:03d}"


def _bounds(head: list[Block], d_sae: int, n_rows: int, max_entries: int) -> list[int]:
    """Where the buckets' ranges of latents begin, and d_sae, so that each gets about as many entries as the others."""
    seen = np.zeros(d_sae, np.int64)
    expected = 0.0
    for block in head:
        seen += np.bincount(block.latents.numpy(), minlength=d_sae)
        expected = len(block.latents) / block.n_rows * n_rows
    n_files = int(np.clip(np.ceil(expected / max_entries), 1, _MOST_FILES))
    weights = (seen + 1).cumsum()  # a latent that the first block does not show may fire all the same
    cuts = np.searchsorted(weights, weights[-1] * np.arange(1, n_files) / n_files)
    return [0, *cuts.tolist(), d_sae]


def _entries(block: Block, d_sae: int) -> Numbers:
    """A block's entries in the order of their latents."""
    entries = np.empty(len(block.latents), _ENTRY)
    order = _by_latent(block.latents.numpy(), d_sae)
    entries["latent"] = block.latents.numpy()[order]
    entries["row"] = block.rows.numpy()[order]
    entries["value"] = block.values.numpy()[order].view(np.uint32)
    return entries


def _by_latent(latents: Numbers, n: int) -> Numbers:
    """The permutation that sorts numbers below n; numpy sorts 16-bit numbers by radix, several times as fast."""
    return latents.astype(np.uint16 if n <= 1 << 16 else np.uint32).argsort(kind="stable")


def _ranges(latents: range, counts: Numbers, limit: int) -> Iterator[range]:
    """Cut a range of latents where its entries would exceed the limit; a single latent's may."""
    start, total = latents.start, 0
    for latent in latents:
        count = int(counts[latent])
        if total and total + count > limit:
            yield range(start, latent)
            start, total = latent, 0
        total += count
    if latents:
        yield range(start, latents.stop)


def _sorted(path: Path, latents: range, counts: Numbers) -> Firings:
    """The entries of a range of latents: placed by latent, then each latent's sorted by value and row."""
    counts = counts[latents.start : latents.stop]
    ends = counts.cumsum()
    place = ends - counts
    starts = place.tolist()
    keys = np.empty(int(ends[-1]), np.uint64)
    for entries in _read(path):
        inside = (entries["latent"] >= latents.start) & (entries["latent"] < latents.stop)
        _place(entries if inside.all() else entries[inside], latents, place, keys)
    for start, end in zip(starts, ends.tolist(), strict=True):
        keys[start:end].sort()
    return _apart(keys, latents, counts)


def _read(path: Path) -> Iterator[Numbers]:
    with open(path, "rb") as handle:
        while len(entries := np.fromfile(handle, _ENTRY, _AT_ONCE)):
            yield entries


def _place(entries: Numbers, latents: range, place: Numbers, keys: Numbers) -> None:
    """Put the entries' keys where their latents' next ones belong, and move those places on.

    The key is the value's bits above the row: the bits of positive floats are ordered as the floats are.
    """
    found = entries["latent"] - np.uint32(latents.start)
    order = _by_latent(found, len(latents))
    found = found[order]
    counts = np.bincount(found, minlength=len(latents))
    nth = np.arange(len(found)) - np.repeat(counts.cumsum() - counts, counts)
    keys[place[found] + nth] = (entries["value"].astype(np.uint64) << 32 | entries["row"])[order]
    place += counts


def _apart(keys: Numbers, latents: range, counts: Numbers) -> Firings:
    halves = keys.astype("<u8", copy=False).view("<u4").reshape(-1, 2)  # the low half stands first
    names = np.arange(latents.start, latents.stop, dtype=np.int32)
    return Firings(
        torch.from_numpy(np.repeat(names, counts)),
        torch.from_numpy(halves[:, 1].astype(np.uint32).view(np.float32)),
        torch.from_numpy(halves[:, 0].astype(np.int32)),
    )
