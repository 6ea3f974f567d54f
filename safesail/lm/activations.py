"""Activations on disk: written once by one pass of the model, read by training, statistics and scoring.

Writes `pieces.parquet` (the texts as token ids and roles), `shard-00000.safetensors` … (activations in the recipe's
dtype, fp32 norms, token ids), a checksum beside each shard, and `harvest.json`. Rows are the tokens in the order of
the packed windows; a piece's rows are consecutive.
"""

from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import safe_open
from torch import Tensor

from safesail.distributed import ALONE, Ranks
from safesail.errors import InputError
from safesail.files import replacing, write_tensors
from safesail.lm.corpus import Piece, pack
from safesail.lm.shards import checksum, is_whole, read_facts, recorded_checksum, shard_file, write_shard
from safesail.lm.tokens import counted
from safesail.lm.windows import HALF, Storage, packed_inputs, read_windows
from safesail.recipe import TokenPolicy
from safesail.run import write_json

__all__ = ["Activations", "harvest", "packed_inputs", "remake"]

_WINDOWS_PER_SHARD = 64
_N_NAMED = 20
"""How many documents with bad activations are named."""


def harvest(
    model: Any,
    pieces: list[Piece],
    hook_points: tuple[str, ...],
    folder: Path,
    *,
    specials: list[int],
    window: int,
    windows_per_batch: int,
    storage: Storage = HALF,
    ranks: Ranks = ALONE,
    progress: Callable[[int], Any] = lambda n: None,
) -> dict[str, Any]:
    """Write the activations of all pieces at all hook points into `folder` and return the content of harvest.json.

    Whole shards of an interrupted attempt are kept. Every rank makes its share of the shards.
    """
    windows = pack([len(piece.ids) for piece in pieces], window)
    shards = [windows[first : first + _WINDOWS_PER_SHARD] for first in range(0, len(windows), _WINDOWS_PER_SHARD)]
    if ranks.first:
        _write_pieces(folder / "pieces.parquet", pieces, windows)
    for number in ranks.mine(len(shards)):
        if is_whole(folder, number):
            progress(sum(len(pieces[i].ids) for members in shards[number] for i in members))
        else:
            made = _shard(model, pieces, shards[number], hook_points, windows_per_batch, storage, progress)
            write_shard(folder, number, made)
    ranks.wait()
    if ranks.first:
        settings = {"window": window, "windows_per_batch": windows_per_batch, **storage._asdict()}
        settings |= {"windows_per_shard": _WINDOWS_PER_SHARD}
        _summarise(folder, len(shards), hook_points, specials, settings)
    ranks.wait()
    return read_facts(folder)


def remake(model: Any, folder: Path, numbers: list[int], progress: Callable[[int], Any] = lambda n: None) -> list[int]:
    """Make damaged shards of a finished harvest again from its table of pieces, just as they were made.

    Returns the numbers of those that came out different from what their checksum was taken of; they are not replaced.
    """
    facts = read_facts(folder)
    pieces, windows = _read_pieces(folder / "pieces.parquet")
    storage = Storage(facts["dtype"], facts["bad_activations"])
    hook_points, per_shard = tuple(facts["hook_points"]), facts["windows_per_shard"]
    different = []
    for number in numbers:
        members = windows[number * per_shard : (number + 1) * per_shard]
        made = _shard(model, pieces, members, hook_points, facts["windows_per_batch"], storage, progress)
        path, again = shard_file(folder, number), folder / f"again-{number:05d}.safetensors"
        write_tensors(again, made)
        if checksum(again) == facts["sha256_of_shards"][number]:
            again.rename(path)
        else:
            again.unlink()
            different.append(number)
    return different


def _shard(
    model: Any,
    pieces: list[Piece],
    windows: list[list[int]],
    hook_points: tuple[str, ...],
    windows_per_batch: int,
    storage: Storage,
    progress: Callable[[int], Any],
) -> dict[str, Tensor]:
    rows: dict[str, list[Tensor]] = {name: [] for name in hook_points}
    norms: dict[str, list[Tensor]] = {name: [] for name in hook_points}
    token_ids = []
    for reading in read_windows(model, pieces, windows, hook_points, windows_per_batch, storage):
        token_ids.append(reading.token_ids)
        for name in hook_points:
            rows[name].append(reading.rows[name])
            norms[name].append(reading.norms[name])
        progress(len(reading.token_ids))
    tensors = {"token_ids": torch.cat(token_ids)}
    for name in hook_points:
        tensors[name], tensors[f"{name}:norm"] = torch.cat(rows[name]), torch.cat(norms[name])
    return tensors


def _write_pieces(path: Path, pieces: list[Piece], windows: list[list[int]]) -> None:
    """Write the table of pieces in row order, with where each one's rows start and its window's number."""
    chosen = [pieces[i] for members in windows for i in members]
    lengths = torch.tensor([len(piece.ids) for piece in chosen], dtype=torch.long)
    table = pa.table(
        {
            "document": [piece.document for piece in chosen],
            "source": [piece.source for piece in chosen],
            "held_out": [piece.held_out for piece in chosen],
            "half": [piece.half for piece in chosen],
            "row_start": pa.array((lengths.cumsum(0) - lengths).tolist(), pa.int64()),
            "window": pa.array([n for n, members in enumerate(windows) for _ in members], pa.int64()),
            "ids": pa.array([piece.ids for piece in chosen], pa.list_(pa.int32())),
            "roles": pa.array([piece.roles for piece in chosen], pa.list_(pa.int8())),
        }
    )
    with replacing(path, table.nbytes) as temporary:
        pq.write_table(table, temporary)


def _read_pieces(path: Path) -> tuple[list[Piece], list[list[int]]]:
    """The pieces in row order and the windows they were packed in."""
    rows = pq.read_table(path).to_pylist()
    windows: list[list[int]] = [[] for _ in range(rows[-1]["window"] + 1)]
    for i, row in enumerate(rows):
        windows[row["window"]].append(i)
    return [Piece(**{name: row[name] for name in Piece._fields}) for row in rows], windows


def _summarise(
    folder: Path, n_shards: int, hook_points: tuple[str, ...], specials: list[int], settings: dict[str, Any]
) -> None:
    """Write harvest.json: what the shards hold, their checksums, and how they were made."""
    table = pq.read_table(folder / "pieces.parquet", columns=["document", "row_start"])
    starts = torch.tensor(table["row_start"].to_pylist())
    medians: dict[str, float] = {}
    d_in: dict[str, int] = {}
    n_rows: list[int] = []
    skipped: dict[str, Any] = {}
    for name in hook_points:
        parts, d_in[name] = _norms(folder, n_shards, name)
        norms, n_rows = torch.cat(parts), [len(part) for part in parts]
        good = norms.isfinite()
        if not good.any():
            raise InputError(f"no activation at {name} can be stored; check the model's weights and dtype.")
        medians[name] = float(norms[good].median())
        bad = (~good).nonzero().flatten()
        documents = [table["document"][i].as_py() for i in (torch.searchsorted(starts, bad, right=True) - 1).tolist()]
        if len(bad):
            skipped[name] = {"n_tokens": len(bad), "documents": list(dict.fromkeys(documents))[:_N_NAMED]}
    facts = {
        "hook_points": list(hook_points),
        "d_in": d_in,
        "median_norm": medians,
        "special_ids": specials,
        "rows_per_shard": n_rows,
        "sha256_of_shards": [recorded_checksum(folder, number) for number in range(n_shards)],
        "pieces_sha256": checksum(folder / "pieces.parquet"),
        "n_tokens": sum(n_rows),
        "n_pieces": len(starts),
        "skipped": skipped,
        **settings,
    }
    write_json(folder / "harvest.json", facts)


def _norms(folder: Path, n_shards: int, hook_point: str) -> tuple[list[Tensor], int]:
    """Per shard the norms of its rows at a hook point, and its d_in."""
    norms, d_in = [], 0
    for number in range(n_shards):
        with safe_open(shard_file(folder, number), framework="pt") as handle:
            norms.append(handle.get_tensor(f"{hook_point}:norm"))
            d_in = handle.get_slice(hook_point).get_shape()[1]
    return norms, d_in


class Activations:
    """A finished harvest: memory-mapped activations with the tokens, pieces and documents they belong to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts = read_facts(folder)
        self.hook_points: list[str] = self.facts["hook_points"]
        self.n_tokens: int = self.facts["n_tokens"]
        table = pq.read_table(folder / "pieces.parquet")
        self.documents: list[str] = table["document"].to_pylist()
        self.sources: list[str] = table["source"].to_pylist()
        self.held_out = torch.tensor(table["held_out"].to_pylist())
        self.half: list[str] = table["half"].to_pylist()
        self.row_start = torch.tensor(table["row_start"].to_pylist())
        self.piece_ids: list[list[int]] = table["ids"].to_pylist()
        self.token_ids = torch.tensor([id for ids in self.piece_ids for id in ids])
        self.roles = _flat_roles(table, len(self.token_ids))
        lengths = torch.tensor([len(ids) for ids in self.piece_ids])
        self.piece_of_row = torch.repeat_interleave(torch.arange(len(lengths)), lengths)

    @cached_property
    def _shards(self) -> list[Any]:
        return [safe_open(path, framework="pt") for path in sorted(self.folder.glob("shard-*.safetensors"))]

    @cached_property
    def _tensors(self) -> dict[str, list[Tensor]]:
        return {name: [shard.get_tensor(name) for shard in self._shards] for name in self.hook_points}

    def norms(self, hook_point: str) -> Tensor:
        """The fp32 norm of every activation before it was stored, NaN where it could not be: (n_tokens,)."""
        return torch.cat([shard.get_tensor(f"{hook_point}:norm") for shard in self._shards])

    def counted(self, hook_point: str, policy: TokenPolicy) -> Tensor:
        """Which rows count under a token policy: bool (n_tokens,)."""
        return counted(
            policy,
            self.token_ids,
            self.norms(hook_point),
            self.facts["special_ids"],
            self.facts["median_norm"][hook_point],
            self.roles,
        )

    @property
    def piece_roles(self) -> list[list[int]]:
        """Per piece the role codes of its tokens, beside `piece_ids`."""
        return [part.tolist() for part in self.roles.split([len(ids) for ids in self.piece_ids])]

    def rows_held_out(self) -> Tensor:
        """Which rows belong to held-out documents: bool (n_tokens,)."""
        return self.held_out[self.piece_of_row]

    def rows(self, hook_point: str, indices: Tensor) -> Tensor:
        """The activations of chosen rows, in the order asked for, as fp32: (n, d_in)."""
        order = indices.sort()
        out = torch.empty(len(indices), self.facts["d_in"][hook_point])
        start = 0
        for tensor in self._tensors[hook_point]:
            low, high = torch.searchsorted(order.values, torch.tensor([start, start + len(tensor)])).tolist()
            if high > low:
                out[order.indices[low:high]] = tensor[order.values[low:high] - start].float()
            start += len(tensor)
        return out

    def blocks(self, hook_point: str, size: int = 4096) -> Iterator[tuple[int, Tensor]]:
        """All activations in row order: (first row, fp32 block of at most `size` rows)."""
        start = 0
        for tensor in self._tensors[hook_point]:
            for cut in range(0, len(tensor), size):
                yield start + cut, tensor[cut : cut + size].float()
            start += len(tensor)


def _flat_roles(table: pa.Table, n_tokens: int) -> Tensor:
    """The role code of every row, int8 (n_tokens,); a table without roles is of plain texts."""
    if "roles" not in table.column_names:
        return torch.zeros(n_tokens, dtype=torch.int8)
    return torch.tensor(table["roles"].combine_chunks().flatten().to_numpy())
