"""Held-out texts on which a neuron is scored, and the units that are judged in them: tokens, segments, whole texts.

All texts are of the *score* half, so none of them was seen by whoever explained. A neuron has active texts (half of
them its strongest, half drawn from all levels, one per document) and silent ones, in which it never fires and which
come from one order that all neurons share. Of a long text a stretch of at most eight segments is used.

Neurons whose explanations are to be judged in one request (`score.neurons_per_request` above 1) must be judged on the
same texts. They are given the active texts of all of them, and as many silent ones as one neuron's share: what is one
neuron's active text is mostly a silent one of the others, and the activations tell which. So these texts are not
those of a neuron alone: each neuron keeps its number of active texts, but has more silent ones, and harder ones.
"""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from safesail.interpretation.collect import Firings, Peak, peaks
from safesail.lm.activations import Activations
from safesail.lm.tokens import Span, spans
from safesail.recipe import Recipe
from safesail.training.step import generator

__all__ = ["Excerpt", "Level", "Pieces", "Units", "excerpts_of", "group_excerpts", "units_of"]

Level = Literal["token", "segment", "text"]
_SEGMENTS_PER_EXCERPT = 8


class Excerpt(NamedTuple):
    """A held-out stretch of text on which a neuron is scored."""

    units: list[str]
    """Readable units, byte-exact in every script: joined they are the text."""
    ids: list[list[int]]
    """The token ids of each unit."""
    strengths: list[float]
    """The largest activation of each unit's tokens, divided by the neuron's normaliser."""


class Units(NamedTuple):
    """What one neuron is scored on at one level."""

    texts: list[str]
    ids: list[list[int]]
    truth: Tensor
    """(n,) of tokens the level 0 … 10, of segments and texts 1.0 where any token is active."""
    text_of: Tensor
    """(n,) the number of the excerpt that each comes from."""


class Stretch(NamedTuple):
    """The tokens `start` to `end` of a piece."""

    piece: int
    start: int
    end: int

    def holds(self, piece: int, token: int) -> bool:
        return self.piece == piece and self.start <= token < self.end


class Pieces:
    """The pieces of the harvest as readable segments; a piece that many neurons share is read once."""

    def __init__(self, recipe: Recipe, activations: Activations, tokenizer: Any) -> None:
        self.activations = activations
        self._tokenizer = tokenizer
        self._segment_tokens = recipe.score.segment_tokens
        order = torch.randperm(len(activations.piece_ids), generator=generator(recipe.seed, "silent")).tolist()
        self.shared_order = [piece for piece in order if activations.half[piece] == "score"]
        """The pieces of the score half in the order in which silent texts are taken."""
        self._segments: dict[int, list[list[Span]]] = {}

    def segments(self, piece: int) -> list[list[Span]]:
        """The readable units of a piece, by segment. Units at its edges that are parts of a character are left out."""
        if piece not in self._segments:
            units = _without_broken_edges(spans(self._tokenizer, self.activations.piece_ids[piece]))
            cuts = _segments([unit.end - unit.start for unit in units], self._segment_tokens)
            self._segments[piece] = [units[cut.start : cut.stop] for cut in cuts]
        return self._segments[piece]

    def around(self, piece: int, token: int) -> Stretch | None:
        """At most eight segments with the one that holds `token` near their middle; None of a piece without text."""
        segments = self.segments(piece)
        if not segments:
            return None
        middle = next((i for i, segment in enumerate(segments) if segment[-1].end > token), len(segments) - 1)
        last_first = max(len(segments) - _SEGMENTS_PER_EXCERPT, 0)
        first = min(max(middle - _SEGMENTS_PER_EXCERPT // 2, 0), last_first)
        last = min(first + _SEGMENTS_PER_EXCERPT, len(segments)) - 1
        return Stretch(piece, segments[first][0].start, segments[last][-1].end)

    def units(self, stretch: Stretch) -> list[Span]:
        """The readable units of a stretch."""
        units = (unit for segment in self.segments(stretch.piece) for unit in segment)
        return [unit for unit in units if stretch.holds(stretch.piece, unit.start)]


def excerpts_of(
    recipe: Recipe,
    activations: Activations,
    codes: Firings,
    latent: int,
    q: float,
    tokenizer: Any,
    pieces: Pieces | None = None,
) -> list[Excerpt]:
    """The excerpts of a neuron's own texts, active and silent ones mixed. q: its normaliser."""
    return group_excerpts(recipe, activations, codes, {latent: q}, tokenizer, pieces)[latent]


def group_excerpts(
    recipe: Recipe,
    activations: Activations,
    codes: Firings,
    normalisers: dict[int, float],
    tokenizer: Any,
    pieces: Pieces | None = None,
) -> dict[int, list[Excerpt]]:
    """The excerpts of neurons that share their texts: the same texts for all, each with its own strengths.

    normalisers: {latent: its normaliser}, all latents of one hook point. A group of one has the texts of `excerpts_of`.
    """
    pieces = pieces or Pieces(recipe, activations, tokenizer)
    active: list[Stretch] = []
    for latent, q in normalisers.items():
        for peak in _active_peaks(recipe, activations, codes, latent, q):
            token = peak.row - int(activations.row_start[peak.piece])
            stretch = pieces.around(peak.piece, token)
            if stretch and not any(known.holds(peak.piece, token) for known in active):
                active.append(stretch)
    stretches = [*active, *_silent_stretches(recipe, pieces, codes, list(normalisers))]
    # An LLM asked only about active texts, then only about silent ones, would find some active in either.
    order = torch.randperm(len(stretches), generator=generator(recipe.seed, "mixed", *normalisers)).tolist()
    mixed = [stretches[i] for i in order]
    return {latent: list(_excerpts(pieces, mixed, codes, latent, q)) for latent, q in normalisers.items()}


def units_of(excerpts: list[Excerpt], level: Level, segment_tokens: int, active_above: float) -> Units:
    """The tokens, segments or whole texts of the excerpts with the truth about each.

    A token's truth is its level, clip(round(10 · strength), 0, 10), rounding halves to even; that of a segment or a
    text is whether any of its tokens is stronger than `active_above`. A segment is the fewest whole units that have
    `segment_tokens` tokens or more, so no character is cut; the last one of a text may have fewer. Safe-SAIL publishes
    neither its segments' size nor its threshold.
    """
    texts, ids, truth, text_of = [], [], [], []
    for number, excerpt in enumerate(excerpts):
        for cut in _cuts(excerpt, level, segment_tokens):
            part = slice(cut.start, cut.stop)
            texts.append("".join(excerpt.units[part]))
            ids.append([id for unit in excerpt.ids[part] for id in unit])
            truth.append(_truth(max(excerpt.strengths[part]), level, active_above))
            text_of.append(number)
    return Units(texts, ids, torch.tensor(truth, dtype=torch.float32), torch.tensor(text_of, dtype=torch.long))


def _cuts(excerpt: Excerpt, level: Level, segment_tokens: int) -> list[range]:
    """The units that make one token, one segment, or the text."""
    if level == "segment":
        return _segments([len(ids) for ids in excerpt.ids], segment_tokens)
    n = len(excerpt.units)
    return [range(n)] if level == "text" else [range(i, i + 1) for i in range(n)]


def _truth(strength: float, level: Level, active_above: float) -> float:
    return float(min(max(round(10 * strength), 0), 10) if level == "token" else strength > active_above)


def _segments(n_tokens: list[int], at_least: int) -> list[range]:
    """Runs of units with `at_least` tokens each, as short as may be. n_tokens: of each unit."""
    cuts, start, size = [], 0, 0
    for i, n in enumerate(n_tokens):
        size += n
        if size >= at_least or i == len(n_tokens) - 1:
            cuts.append(range(start, i + 1))
            start, size = i + 1, 0
    return cuts


def _without_broken_edges(units: list[Span]) -> list[Span]:
    """The units without those that a cut of the piece has left with a part of a character."""
    whole = [i for i, unit in enumerate(units) if "\ufffd" not in unit.text]
    return units[whole[0] : whole[-1] + 1] if whole else []


def _active_peaks(recipe: Recipe, activations: Activations, codes: Firings, latent: int, q: float) -> list[Peak]:
    """Half of them the strongest, half drawn from all levels; never two of one document or one text."""
    ours, seen = [], set()
    for peak in peaks(codes, activations, latent, q):
        if activations.half[peak.piece] == "score" and peak.value > recipe.score.active_above * q:
            keys = {activations.documents[peak.piece], tuple(activations.piece_ids[peak.piece])}
            if not keys & seen:
                seen |= keys
                ours.append(peak)
    n_top = (recipe.score.n_active_texts + 1) // 2
    rest = ours[n_top:]
    order = torch.randperm(len(rest), generator=generator(recipe.seed, "score", latent)).tolist()
    return [*ours[:n_top], *(rest[i] for i in order[: recipe.score.n_active_texts - n_top])]


def _silent_stretches(recipe: Recipe, pieces: Pieces, codes: Firings, latents: list[int]) -> list[Stretch]:
    """The beginnings of the first texts, in the order shared by all neurons, in which none of the latents fires."""
    activations = pieces.activations
    rows = torch.cat([codes.of(latent)[1].long() for latent in latents])
    firing = set(activations.piece_of_row[rows].tolist())
    wanted = -(-recipe.score.n_silent_texts // len(latents))
    found: list[Stretch] = []
    for piece in pieces.shared_order:
        if len(found) == wanted:
            break
        if piece not in firing and len(activations.piece_ids[piece]) >= 2 * recipe.score.segment_tokens:
            stretch = pieces.around(piece, 0)
            found += [stretch] if stretch else []
    return found


def _excerpts(pieces: Pieces, stretches: list[Stretch], codes: Firings, latent: int, q: float) -> Iterator[Excerpt]:
    """The stretches with the strengths of one latent."""
    values, rows = codes.of(latent)
    strength = {row: value / q for row, value in zip(rows.tolist(), values.tolist(), strict=True)}
    for stretch in stretches:
        first, ids = int(pieces.activations.row_start[stretch.piece]), pieces.activations.piece_ids[stretch.piece]
        units = pieces.units(stretch)
        yield Excerpt(
            [unit.text for unit in units],
            [list(ids[unit.start : unit.end]) for unit in units],
            [max(strength.get(first + i, 0.0) for i in range(unit.start, unit.end)) for unit in units],
        )
