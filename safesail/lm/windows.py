"""What the model reads at once, and what comes out at the hook points: packed windows in, storable activations out."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from safesail.errors import InputError
from safesail.lm.corpus import Piece
from safesail.lm.hooks import run_to_depth

__all__ = ["HALF", "Reading", "Storage", "packed_inputs", "read_windows"]


class Storage(NamedTuple):
    """How activations are stored, and what is done with those that cannot be."""

    dtype: str = "float16"
    bad_activations: str = "stop"
    """stop: raise InputError; skip: store a row of zeros with the norm NaN, which no token policy counts."""


HALF = Storage()


class Reading(NamedTuple):
    """A batch of windows as the model read it, row by row."""

    token_ids: Tensor
    """int32 (n_rows,)."""
    pieces: list[int]
    """The piece numbers whose tokens the rows are, in their order."""
    rows: dict[str, Tensor]
    """Per hook point the activations in the storage's dtype: (n_rows, d_in), on the CPU."""
    norms: dict[str, Tensor]
    """Per hook point their fp32 norms before they were stored: (n_rows,)."""


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
def read_windows(
    model: Any,
    pieces: list[Piece],
    windows: list[list[int]],
    hook_points: tuple[str, ...],
    per_batch: int,
    storage: Storage,
) -> Iterator[Reading]:
    """Run the model over windows of pieces, `per_batch` at a time, no deeper than the deepest hook point."""
    ids = [piece.ids for piece in pieces]
    for start in range(0, len(windows), per_batch):
        batch = windows[start : start + per_batch]
        members = [i for window in batch for i in window]
        inputs = packed_inputs(ids, batch)
        real = inputs.pop("owner") >= 0
        token_ids = inputs["input_ids"][real].int()
        inputs = {name: value.to(model.device) for name, value in inputs.items()}
        rows, norms = {}, {}
        for name, output in run_to_depth(model, hook_points, **inputs).items():
            x = output[real.to(output.device)].float()
            norm = x.norm(dim=-1)
            bad = _bad_rows(x, norm, storage)
            if len(bad):
                if storage.bad_activations == "stop":
                    raise InputError(_complaint(x, int(bad[0]), name, [pieces[i] for i in members], storage))
                x, norm = x.index_fill(0, bad, 0.0), norm.index_fill(0, bad, float("nan"))
            rows[name], norms[name] = x.to(_dtype(storage)).cpu(), norm.cpu()
        yield Reading(token_ids, members, rows, norms)


def _bad_rows(x: Tensor, norm: Tensor, storage: Storage) -> Tensor:
    """The rows that are not finite or beyond what the dtype holds. x: (n, d_in), norm: (n,) → row numbers.

    No element is larger than the norm, so only rows of a large norm are looked at one by one.
    """
    limit = torch.finfo(_dtype(storage)).max
    suspects = (~(norm <= limit)).nonzero().flatten()  # also true for NaN
    if not len(suspects):
        return suspects
    storable = (x[suspects].abs().amax(-1) <= limit) & norm[suspects].isfinite()
    return suspects[~storable]


def _complaint(x: Tensor, row: int, hook_point: str, pieces: list[Piece], storage: Storage) -> str:
    """What is wrong with a row, where it is, and which setting goes on all the same."""
    token = row
    for piece in pieces:
        if token < len(piece.ids):
            break
        token -= len(piece.ids)
    values = x[row]
    value = float(values[values.abs().nan_to_num(float("inf")).argmax()])
    limit, finite = torch.finfo(_dtype(storage)).max, torch.isfinite(values).all()
    beyond = f", beyond the {limit:g} that {storage.dtype} holds" if finite else ""
    wider = 'harvest.dtype = "bfloat16" stores it, ' if finite and storage.dtype == "float16" else ""
    return (
        f"an activation at {hook_point} is {value}{beyond}, at token {token} of a piece of document {piece.document}; "
        f'{wider}harvest.bad_activations = "skip" leaves such tokens out. Check also the model\'s weights and dtype.'
    )


def _dtype(storage: Storage) -> torch.dtype:
    return getattr(torch, storage.dtype)
