"""The strongest activation of a latent in each piece of text, and which of these peaks stand for the latent."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from safesail.interpretation.firings import Firings
from safesail.lm.activations import Activations
from safesail.recipe import CollectSection

__all__ = ["Peak", "PeakTable", "choose_peaks", "peak_table", "peaks"]

_AT_ONCE = 64  # peaks become Python's numbers few at a time: there may be millions of which a dozen are needed


class Peak(NamedTuple):
    """The strongest activation of a latent in one piece of text."""

    piece: int
    row: int
    value: float
    level: int
    """1 … 10, the tenth of the normaliser that the activation falls in; 10 also above it. 0 for a near-miss."""
    stratum: str
    """`top`, `level-3` for an example drawn from that level, or `near-miss`."""


class PeakTable(NamedTuple):
    """The peaks of one latent, strongest first: vectors of the same length."""

    pieces: Tensor
    rows: Tensor
    values: Tensor
    levels: Tensor

    def peak(self, i: int, stratum: str) -> Peak:
        """One of them, named as an example of a stratum."""
        return Peak(int(self.pieces[i]), int(self.rows[i]), float(self.values[i]), int(self.levels[i]), stratum)


def peaks(firings: Firings, activations: Activations, latent: int, q: float) -> list[Peak]:
    """The strongest activation of a latent in every piece where it fires, strongest first."""
    table = peak_table(*firings.of(latent), activations.piece_of_row, q)
    columns = zip(*(column.tolist() for column in table), strict=True)
    return [Peak(piece, row, value, level, "top") for piece, row, value, level in columns]


def peak_table(values: Tensor, rows: Tensor, piece_of_row: Tensor, q: float) -> PeakTable:
    """The peaks of a latent from its activations in ascending order; of equal ones in a piece the last row's."""
    pieces = piece_of_row[rows.long()].numpy()
    found, from_end = np.unique(pieces[::-1], return_index=True)  # the first from the end is a piece's strongest
    at = len(pieces) - 1 - from_end
    order = np.lexsort((found, -values.numpy()[at]))
    strongest = values[torch.from_numpy(at[order])]
    levels = (10 * strongest.double() / q).long().clamp(max=9) + 1
    return PeakTable(torch.from_numpy(found[order]), rows[torch.from_numpy(at[order])], strongest, levels)


def choose_peaks(
    table: PeakTable,
    mine: Tensor,
    section: CollectSection,
    drawn: Callable[[int], torch.Generator],
    take: Callable[[Peak], bool],
) -> None:
    """Offer the strongest peaks to `take`, then some of each level in a drawn order, until it has taken enough.

    mine: bool (n_pieces,), the pieces to choose from; drawn: the random numbers for a level.
    """
    ours = mine[table.pieces].nonzero().flatten()
    _offer(table, ours, "top", section.n_top, take)
    for level in range(10, 0, -1):
        members = ours[table.levels[ours] == level]
        order = torch.randperm(len(members), generator=drawn(level))
        _offer(table, members[order], f"level-{level}", section.n_per_level, take)


def _offer(table: PeakTable, order: Tensor, stratum: str, wanted: int, take: Callable[[Peak], bool]) -> None:
    for part in order.split(_AT_ONCE):
        for i in part.tolist():
            if not wanted:
                return
            wanted -= take(table.peak(i, stratum))
