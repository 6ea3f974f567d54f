"""Activations on disk: written once by one pass of the model, read by training, statistics and scoring.

Writes `pieces.parquet` (the texts as token ids), `shard-00000.safetensors` … (fp16 activations, fp32 norms, token ids)
and `harvest.json`. Rows are the tokens in the order of the packed windows; a piece's rows are consecutive.
"""

import json
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from safesail.errors import InputError
from safesail.lm.corpus import Piece, pack
from safesail.lm.hooks import run_to_depth
from safesail.lm.tokens import counted
from safesail.recipe import TokenPolicy
from safesail.run import write_json

__all__ = ["Activations", "harvest", "packed_inputs"]

_WINDOWS_PER_SHARD = 64
_HALF_MAX = 65504.0


def harvest(
    model: Any,
    pieces: list[Piece],
    hook_points: tuple[str, ...],
    folder: Path,
    *,
    specials: list[int],
    window: int,
    windows_per_batch: int,
    progress: Callable[[int], Any] = lambda n: None,
) -> None:
    """Write the activations of all pieces at all hook points into `folder`; finished shards are not made again."""
    windows = pack([len(piece.ids) for piece in pieces], window)
    starts = _write_pieces(folder / "pieces.parquet", pieces, windows)
    for number, first in enumerate(range(0, len(windows), _WINDOWS_PER_SHARD)):
        path = folder / f"shard-{number:05d}.safetensors"
        batch = windows[first : first + _WINDOWS_PER_SHARD]
        n_tokens = sum(len(pieces[i].ids) for members in batch for i in members)
        if not path.is_file():
            tensors = _shard(model, pieces, batch, hook_points, windows_per_batch, progress)
            temporary = path.with_suffix(".new")
            save_file(tensors, temporary)
            temporary.rename(path)
        else:
            progress(n_tokens)
    _summarise(folder, hook_points, specials, window, starts)


def packed_inputs(pieces: list[list[int]], windows: list[list[int]]) -> dict[str, Tensor]:
    """Model inputs for windows that hold several pieces each, kept apart by positions and the attention mask.

    pieces: token ids; windows: piece numbers. Returns input_ids and position_ids (n_windows, length) and a boolean
    attention mask (n_windows, 1, length, length); padding attends to itself alone.
    """
    length = max(sum(len(pieces[i]) for i in members) for members in windows)
    ids = torch.zeros(len(windows), length, dtype=torch.long)
    positions = torch.zeros_like(ids)
    owner = torch.full_like(ids, -1)
    for row, members in enumerate(windows):
        cursor = 0
        for i in members:
            end = cursor + len(pieces[i])
            ids[row, cursor:end] = torch.tensor(pieces[i])
            positions[row, cursor:end] = torch.arange(end - cursor)
            owner[row, cursor:end] = i
            cursor = end
    same = owner[:, :, None] == owner[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    mask = (same & causal & (owner[:, :, None] >= 0)) | torch.eye(length, dtype=torch.bool)
    return {"input_ids": ids, "position_ids": positions, "attention_mask": mask[:, None], "owner": owner}


@torch.inference_mode()
def _shard(
    model: Any,
    pieces: list[Piece],
    windows: list[list[int]],
    hook_points: tuple[str, ...],
    windows_per_batch: int,
    progress: Callable[[int], Any],
) -> dict[str, Tensor]:
    rows: dict[str, list[Tensor]] = {name: [] for name in hook_points}
    norms: dict[str, list[Tensor]] = {name: [] for name in hook_points}
    ids = [piece.ids for piece in pieces]
    token_ids = []
    for start in range(0, len(windows), windows_per_batch):
        batch = windows[start : start + windows_per_batch]
        inputs = packed_inputs(ids, batch)
        real = inputs.pop("owner") >= 0
        token_ids.append(inputs["input_ids"][real].int())
        inputs = {name: value.to(model.device) for name, value in inputs.items()}
        for name, output in run_to_depth(model, hook_points, **inputs).items():
            x = output[real.to(output.device)].float().cpu()
            _check_finite(x, name)
            rows[name].append(x.half())
            norms[name].append(x.norm(dim=-1))
        progress(int(real.sum()))
    tensors = {"token_ids": torch.cat(token_ids)}
    for name in hook_points:
        tensors[name], tensors[f"{name}:norm"] = torch.cat(rows[name]), torch.cat(norms[name])
    return tensors


def _check_finite(x: Tensor, hook_point: str) -> None:
    largest = float(x.abs().max())
    if not largest < _HALF_MAX:  # also true for NaN
        raise InputError(
            f"an activation at {hook_point} is {largest}, beyond what 16-bit shards hold; "
            "check the model's weights and dtype."
        )


def _write_pieces(path: Path, pieces: list[Piece], windows: list[list[int]]) -> list[int]:
    """Write the table of pieces in row order and return where each one's rows start."""
    order = [i for members in windows for i in members]
    starts, cursor = [], 0
    for i in order:
        starts.append(cursor)
        cursor += len(pieces[i].ids)
    chosen = [pieces[i] for i in order]
    table = pa.table(
        {
            "document": [piece.document for piece in chosen],
            "source": [piece.source for piece in chosen],
            "held_out": [piece.held_out for piece in chosen],
            "half": [piece.half for piece in chosen],
            "row_start": pa.array(starts, pa.int64()),
            "ids": pa.array([piece.ids for piece in chosen], pa.list_(pa.int32())),
        }
    )
    temporary = path.with_suffix(".new")
    pq.write_table(table, temporary)
    temporary.rename(path)
    return starts


def _summarise(folder: Path, hook_points: tuple[str, ...], specials: list[int], window: int, starts: list[int]) -> None:
    shards = sorted(folder.glob("shard-*.safetensors"))
    medians: dict[str, float] = {}
    n_rows: list[int] = []
    d_in: dict[str, int] = {}
    for name in hook_points:
        norms = []
        for shard in shards:
            with safe_open(shard, framework="pt") as handle:
                norms.append(handle.get_tensor(f"{name}:norm"))
                d_in[name] = handle.get_slice(name).get_shape()[1]
        n_rows = [len(part) for part in norms]
        medians[name] = float(torch.cat(norms).median())
    facts = {
        "hook_points": list(hook_points),
        "d_in": d_in,
        "median_norm": medians,
        "special_ids": specials,
        "rows_per_shard": n_rows,
        "n_tokens": sum(n_rows),
        "n_pieces": len(starts),
        "window": window,
    }
    write_json(folder / "harvest.json", facts)


class Activations:
    """A finished harvest: memory-mapped activations with the tokens, pieces and documents they belong to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.facts: dict[str, Any] = json.loads((folder / "harvest.json").read_text(encoding="utf-8"))
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
        lengths = torch.tensor([len(ids) for ids in self.piece_ids])
        self.piece_of_row = torch.repeat_interleave(torch.arange(len(lengths)), lengths)

    @cached_property
    def _shards(self) -> list[Any]:
        return [safe_open(path, framework="pt") for path in sorted(self.folder.glob("shard-*.safetensors"))]

    @cached_property
    def _tensors(self) -> dict[str, list[Tensor]]:
        return {name: [shard.get_tensor(name) for shard in self._shards] for name in self.hook_points}

    def norms(self, hook_point: str) -> Tensor:
        """The fp32 norm of every activation before it was stored in 16 bits: (n_tokens,)."""
        return torch.cat([shard.get_tensor(f"{hook_point}:norm") for shard in self._shards])

    def counted(self, hook_point: str, policy: TokenPolicy) -> Tensor:
        """Which rows count under a token policy: bool (n_tokens,)."""
        return counted(
            policy,
            self.token_ids,
            self.norms(hook_point),
            self.facts["special_ids"],
            self.facts["median_norm"][hook_point],
        )

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
