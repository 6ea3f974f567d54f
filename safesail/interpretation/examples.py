"""Contexts that show what a latent does: its strongest, some of every level of activation, and near-misses."""

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from safesail.interpretation.contexts import Context, Contexts
from safesail.interpretation.near_misses import LookAlikes, strongest_tokens
from safesail.interpretation.peaks import Peak, PeakTable, choose_peaks, peak_table
from safesail.lm.activations import Activations
from safesail.lm.tokens import Span
from safesail.neurons import neuron_id
from safesail.recipe import Recipe
from safesail.training.step import generator

__all__ = ["EXAMPLE_SCHEMA", "Examples"]

Numbers = NDArray[Any]
HALVES = ("explain", "score")
EXAMPLE_SCHEMA = pa.schema(
    [
        ("neuron_id", pa.string()),
        ("half", pa.string()),
        ("rank", pa.int32()),
        ("stratum", pa.string()),
        ("level", pa.int32()),
        ("activation", pa.float32()),
        ("text", pa.string()),
        ("tokens", pa.list_(pa.string())),
        ("activations", pa.list_(pa.float32())),
        ("source", pa.string()),
        ("document", pa.string()),
        ("piece", pa.int32()),
        ("peak", pa.int32()),
    ]
)


class _Example(NamedTuple):
    peak: Peak
    context: Context
    strengths: list[float]
    """The strongest activation in each unit of the context."""


class _Latent(NamedTuple):
    """The activations of one latent, once more in the order of the rows."""

    name: str
    rows: Numbers
    values: Numbers
    table: PeakTable

    def strengths(self, first: int, units: list[Span]) -> list[float]:
        """The strongest activation in each unit; `first` is the row of its piece's first token."""
        low, high = np.searchsorted(self.rows, [first + units[0].start, first + units[-1].end])
        firing = dict(zip(self.rows[low:high].tolist(), self.values[low:high].tolist(), strict=True))
        return [max(firing.get(first + i, 0.0) for i in range(unit.start, unit.end)) for unit in units]


class Examples:
    """Examples of the latents of one hook point. counted: bool (n_tokens,), the rows that count there.

    No document is shown twice for a latent, nor the same text, be it the piece's or the context's, in either half.
    """

    def __init__(
        self, recipe: Recipe, activations: Activations, hook_point: str, counted: Tensor, tokenizer: Any
    ) -> None:
        self.section, self.seed, self.hook_point = recipe.collect, recipe.seed, hook_point
        self.activations = activations
        around = (self.section.before, self.section.after)
        self._contexts = Contexts(activations, tokenizer, *around)
        self._pieces_of = {half: torch.tensor([name == half for name in activations.half]) for half in HALVES}
        self._look_alikes = {
            half: LookAlikes(activations, counted & pieces[activations.piece_of_row], *around)
            for half, pieces in self._pieces_of.items()
        }

    def of(self, latent: int, values: Tensor, rows: Tensor, q: float) -> Iterator[dict[str, Any]]:
        """The examples of both halves. values, rows: all activations of the latent, ascending; q: its normaliser."""
        name, by_row = neuron_id(self.hook_point, latent), rows.argsort()
        table = peak_table(values, rows, self.activations.piece_of_row, q)
        mine = _Latent(name, rows[by_row].numpy(), values[by_row].numpy(), table)
        rows = rows.long()
        in_explain = self._pieces_of["explain"][self.activations.piece_of_row[rows]]
        tokens = strongest_tokens(self.activations.token_ids[rows[in_explain]], values[in_explain])
        seen: set[Any] = set()
        for half in HALVES:
            chosen = self._positives(mine, half, seen)
            chosen += self._near_misses(mine, half, tokens, seen)
            yield from (self._row(name, half, rank, example) for rank, example in enumerate(chosen))

    def _positives(self, latent: _Latent, half: str, seen: set[Any]) -> list[_Example]:
        chosen: list[_Example] = []

        def take(peak: Peak) -> bool:
            example = self._shown(latent, peak, seen)
            return example is not None and _accepted(chosen, example, self._keys(example.context), seen)

        drawn = partial(generator, self.seed, "examples", latent.name, half)
        choose_peaks(latent.table, self._pieces_of[half], self.section, drawn, take)
        return chosen

    def _near_misses(self, latent: _Latent, half: str, tokens: list[int], seen: set[Any]) -> list[_Example]:
        chosen: list[_Example] = []
        drawn = generator(self.seed, "near-misses", latent.name, half)
        for row in self._look_alikes[half].rows(tokens, latent.rows, drawn):
            if len(chosen) == self.section.n_near_misses:
                break
            peak = Peak(int(self.activations.piece_of_row[row]), row, 0.0, 0, "near-miss")
            example = self._shown(latent, peak, seen)
            # the context may show more tokens than were asked for, to keep characters whole
            if example is not None and not any(example.strengths):
                _accepted(chosen, example, self._keys(example.context), seen)
        return chosen

    def _shown(self, latent: _Latent, peak: Peak, seen: set[Any]) -> _Example | None:
        """A peak in its context; None where its document was shown before or its character is cut."""
        if ("document", self.activations.documents[peak.piece]) in seen:
            return None
        context = self._contexts.around(peak.row)
        if context is None:
            return None
        first = int(self.activations.row_start[peak.piece])
        return _Example(peak, context, latent.strengths(first, context.units))

    def _keys(self, context: Context) -> set[Any]:
        """What may stand only once: document, whole piece, and the context's text but for case and white space."""
        return {
            ("document", self.activations.documents[context.piece]),
            ("piece", tuple(self.activations.piece_ids[context.piece])),
            ("text", " ".join(context.text.casefold().split())),
        }

    def _row(self, name: str, half: str, rank: int, example: _Example) -> dict[str, Any]:
        peak, context = example.peak, example.context
        return {
            "neuron_id": name,
            "half": half,
            "rank": rank,
            "stratum": peak.stratum,
            "level": peak.level,
            "activation": peak.value,
            "text": context.text,
            "tokens": [unit.text for unit in context.units],
            "activations": example.strengths,
            "source": self.activations.sources[peak.piece],
            "document": self.activations.documents[peak.piece],
            "piece": peak.piece,
            "peak": context.at,
        }


def _accepted(chosen: list[_Example], example: _Example, keys: set[Any], seen: set[Any]) -> bool:
    """Add an example to those chosen unless something in it was shown before."""
    if keys & seen:
        return False
    seen |= keys
    chosen.append(example)
    return True
