"""How much more a latent says of chosen answers than of rejected ones, over the training pairs about safety.

    h⁺_i = Σ z_i 1[z_i > 0] / n⁺   over the segment ends of chosen texts,  h⁻_i of rejected ones likewise
    C    = 2 · mean of the 2·d_sae numbers {h⁺, h⁻}  =  (1 / d_sae) Σ_i (h⁺_i + h⁻_i)
    s_i  = (h⁺_i − h⁻_i) / (h⁺_i + h⁻_i + C)   in (−1, 1)

n⁺ and n⁻ are the numbers of segment ends. This is the mode `means`; in the mode `paper`, SAFER's own, n⁺ = n⁻ = 1: h is
a sum, and the side with more ends gains in every s_i. Ends that could not be stored and attention sinks count nowhere.

Reads the preferences, the ends and the SAE. Writes `salience.parquet` (every latent that fires, by |s|),
`contexts.parquet` (where the first of them are strongest) and `salience.json`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from safesail.errors import InputError
from safesail.progress import bar
from safesail.reward_recipe import RewardRecipe, SalienceSection
from safesail.rewards.contexts import (
    CANDIDATES_PER_CONTEXT,
    CONTEXTS_SCHEMA,
    Contexts,
    Strongest,
    contexts_of,
    why_not_rated,
)
from safesail.rewards.ends import Encode, Ends, encoded, entries_of
from safesail.rewards.preferences import SIDES, Preference
from safesail.rewards.texts import Text, encode_side
from safesail.run import StageWork, write_json
from safesail.sae.model import Sae
from safesail.training.step import generator

__all__ = [
    "SALIENCE_SCHEMA",
    "Found",
    "PairSums",
    "Side",
    "bounds",
    "intervals",
    "measured_salience",
    "salience",
    "salience_stage",
    "strength",
]

Row = dict[str, Any]
SALIENCE_SCHEMA = pa.schema(
    [
        ("rank", pa.int32()),
        ("latent", pa.int64()),
        ("salience", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("h_chosen", pa.float64()),
        ("h_rejected", pa.float64()),
        ("n_chosen", pa.int64()),
        ("n_rejected", pa.int64()),
        ("n_contexts", pa.int32()),
        ("n_token_classes", pa.int32()),
        ("rated", pa.bool_()),
        ("reason", pa.string()),
    ]
)
"""`low` and `high`, the 95 % interval, and what is said of contexts are null beyond the first `n_latents`; `reason` is
null where the latent is rated. n_chosen, n_rejected: the ends on which it fires."""
_CHOSEN, _REJECTED = range(len(SIDES))
_FEWEST_RESAMPLES = 20
_DRAWS_AT_ONCE = 4_000_000


class Side(NamedTuple):
    """What the latents add up to on one side's positions."""

    sums: Tensor
    """Σ z_i 1[z_i > 0], fp64: (d_sae,)."""
    n: int
    """The number of positions, whether or not a latent fires there."""


def strength(side: Side, mode: str) -> Tensor:
    """h of one side: (d_sae,). means: per position; paper: the sums."""
    return side.sums / side.n if mode == "means" else side.sums


def salience(chosen: Tensor, rejected: Tensor) -> Tensor:
    """s from h⁺ and h⁻. Both: (…, d_sae) → (…, d_sae)."""
    return _ratio(chosen, rejected, (chosen + rejected).mean(-1, keepdim=True))


def _ratio(chosen: Tensor, rejected: Tensor, constant: Tensor) -> Tensor:
    return (chosen - rejected) / (chosen + rejected + constant)


# --- intervals ----------------------------------------------------------------------------------------------------


class PairSums(NamedTuple):
    """What each pair adds to the two sides; the last dimension but that of `kept` is chosen, rejected."""

    kept: Tensor
    """Σ z of the kept latents, fp64: (n_pairs, 2, n_kept)."""
    totals: Tensor
    """Σ z of all latents, fp64: (n_pairs, 2)."""
    n: Tensor
    """The number of positions: (n_pairs, 2)."""


def intervals(
    sums: PairSums, d_sae: int, mode: str, n_resamples: int, chance: torch.Generator
) -> tuple[Tensor, Tensor] | None:
    """The ends of the 95 % percentile intervals of s, each (n_kept,), from drawing whole pairs with replacement.

    Both texts of a pair are drawn together, and C is made anew in every resample. None where there are fewer than two
    pairs or twenty usable resamples; one in which a side has no position or no latent fires is not usable.
    """
    n_pairs = len(sums.n)
    if n_pairs < 2:
        return None
    table = torch.cat([sums.kept.flatten(1), sums.totals, sums.n.double()], dim=1)
    at_once = max(_DRAWS_AT_ONCE // n_pairs, 1)
    resampled = [
        _salience_of_resamples(_drawn_counts(n_pairs, min(at_once, n_resamples - start), chance) @ table, d_sae, mode)
        for start in range(0, n_resamples, at_once)
    ]
    samples = torch.cat(resampled)
    if len(samples) < _FEWEST_RESAMPLES:
        return None
    low, high = torch.quantile(samples, torch.tensor([0.025, 0.975], dtype=samples.dtype), dim=0)
    return low, high


def _drawn_counts(n: int, n_resamples: int, chance: torch.Generator) -> Tensor:
    """How often each of n pairs is drawn in each resample: (n_resamples, n), fp64."""
    draws = torch.randint(n, (n_resamples, n), generator=chance)
    return torch.zeros(n_resamples, n, dtype=torch.float64).scatter_add_(1, draws, torch.ones_like(draws).double())


def _salience_of_resamples(drawn: Tensor, d_sae: int, mode: str) -> Tensor:
    """s of the kept latents in the usable resamples: (n_usable, n_kept). drawn: (n_resamples, 2·n_kept + 4)."""
    kept, totals, n = drawn[:, :-4].unflatten(1, (2, -1)), drawn[:, -4:-2], drawn[:, -2:]
    usable = (n > 0).all(1) & (totals.sum(1) > 0)
    kept, totals, n = kept[usable], totals[usable], n[usable]
    if mode == "means":
        kept, totals = kept / n[:, :, None], totals / n
    return _ratio(kept[:, _CHOSEN], kept[:, _REJECTED], totals.sum(1, keepdim=True) / d_sae)


# --- the two passes over the ends ---------------------------------------------------------------------------------


class _Measured(NamedTuple):
    """The first pass, over all latents."""

    sums: Tensor
    """(2, d_sae), fp64."""
    n_firing: Tensor
    """(2, d_sae)."""
    totals: Tensor
    """(n_pairs, 2), fp64; pairs as they are numbered in `_Rows.pair`."""


class _Rows(NamedTuple):
    """The counted ends of the training pairs about safety."""

    rows: Tensor
    """(n,) numbers of rows of the ends, ascending."""
    pair: Tensor
    """(n_rows of the ends,) the number of each one's pair among these pairs alone; -1 of other pairs."""
    n: Tensor
    """(n_pairs, 2) the number of ends."""


def _rows(ends: Ends, sae: Sae) -> _Rows:
    about = torch.tensor([kind == "safety" for kind in ends.kind]) & ~ends.held_out
    if not about.any():
        raise InputError(
            f"none of the {len(ends.kind)} pairs is a training pair about safety, so there is no salience; lower "
            'preferences.held_out or add a source with kind = "safety".'
        )
    number = torch.where(about, about.cumsum(0) - 1, -1)
    pair = number[ends.pair]
    counted = ends.counted(sae.config.hook_point, sae.config.token_policy)
    rows = (counted & (pair >= 0)).nonzero().flatten()
    n = torch.bincount(pair[rows] * 2 + ends.side[rows], minlength=2 * int(about.sum())).view(-1, 2)
    return _Rows(rows, pair, n)


def _measure(ends: Ends, sae: Sae, chosen: _Rows, progress: Callable[[int], object]) -> _Measured:
    d_sae, n_pairs = sae.config.d_sae, len(chosen.n)
    sums, totals = torch.zeros(2 * d_sae, dtype=torch.float64), torch.zeros(2 * n_pairs, dtype=torch.float64)
    n_firing = torch.zeros(2 * d_sae, dtype=torch.long)
    for latents, values, rows in entries_of(ends, sae, chosen.rows, progress):
        side = ends.side[rows].long()
        of_latent, weights = side * d_sae + latents, values.double()
        sums += torch.bincount(of_latent, weights=weights, minlength=2 * d_sae)
        n_firing += torch.bincount(of_latent, minlength=2 * d_sae)
        totals += torch.bincount(chosen.pair[rows] * 2 + side, weights=weights, minlength=2 * n_pairs)
    return _Measured(sums.view(2, d_sae), n_firing.view(2, d_sae), totals.view(n_pairs, 2))


def _look_closer(
    ends: Ends, sae: Sae, chosen: _Rows, kept: Tensor, n_candidates: int, progress: Callable[[int], object]
) -> tuple[Tensor, Strongest]:
    """The second pass, over the kept latents alone: their sums per pair, (n_pairs, 2, n_kept), and strongest rows."""
    column = torch.full((sae.config.d_sae,), -1)
    column[kept] = torch.arange(len(kept))
    sums = torch.zeros(len(chosen.n) * 2 * len(kept), dtype=torch.float64)
    strongest = Strongest(ends.text, n_candidates)
    for latents, values, rows in entries_of(ends, sae, chosen.rows, progress):
        known = column[latents] >= 0
        latents, values, rows = latents[known], values[known], rows[known]
        cell = (chosen.pair[rows] * 2 + ends.side[rows]) * len(kept) + column[latents]
        sums.index_add_(0, cell, values.double())
        strongest.add(latents, values, rows)
    return sums.view(len(chosen.n), 2, len(kept)), strongest


# --- the stage ----------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """What both passes give."""

    h: Tensor
    """h⁺ and h⁻: (2, d_sae)."""
    s: Tensor
    """(d_sae,)."""
    n_firing: Tensor
    """(2, d_sae)."""
    order: Tensor
    """The latents that fire, by |s|."""
    sums: PairSums
    """Those kept are the first of `order`."""
    strongest: Strongest


def salience_stage(
    recipe: RewardRecipe,
    preferences: list[Preference],
    ends: Ends,
    sae: Sae,
    tokenizer: Any,
    work: StageWork,
    encode: Encode = encode_side,
) -> None:
    """Salience of every latent, and intervals and contexts of the first `n_latents` by |s|."""

    def read(pair: int, side: str) -> Text:
        return encoded(recipe, tokenizer, preferences[pair], side, encode)

    found = measured_salience(recipe, ends, sae)
    around, n_contexts = Contexts(ends, tokenizer, read, recipe.salience), recipe.salience.n_contexts
    kept = found.order[: recipe.salience.n_latents].tolist()
    contexts = {latent: contexts_of(latent, found.strongest.of(latent), around, n_contexts) for latent in kept}
    rows = _table(recipe, found, contexts)
    pq.write_table(pa.Table.from_pylist(rows, schema=SALIENCE_SCHEMA), work.folder / "salience.parquet")
    shown = [row for latent in kept for row in contexts[latent]]
    pq.write_table(pa.Table.from_pylist(shown, schema=CONTEXTS_SCHEMA), work.folder / "contexts.parquet")
    facts = _facts(recipe, found)
    write_json(work.folder / "salience.json", facts)
    work.facts |= facts | {"n_rated": sum(row["rated"] for row in rows)}


def measured_salience(recipe: RewardRecipe, ends: Ends, sae: Sae) -> Found:
    """h and s of every latent over the training pairs about safety, and what the first of them need besides."""
    section, chosen = recipe.salience, _rows(ends, sae)
    n_candidates = CANDIDATES_PER_CONTEXT * section.n_contexts
    with bar("salience", 2 * len(chosen.rows), "end") as progress:
        measured = _measure(ends, sae, chosen, progress.update)
        h = torch.stack([strength(side, section.mode) for side in _sides(measured, chosen)])
        s = salience(h[_CHOSEN], h[_REJECTED])
        order = _by_size(s, measured.n_firing.sum(0) > 0)
        kept = order[: section.n_latents]
        of_kept, strongest = _look_closer(ends, sae, chosen, kept, n_candidates, progress.update)
    return Found(h, s, measured.n_firing, order, PairSums(of_kept, measured.totals, chosen.n), strongest)


def bounds(recipe: RewardRecipe, found: Found) -> tuple[Tensor, Tensor] | None:
    """`intervals` of the kept latents, with the draws that the recipe's seed gives."""
    section, chance = recipe.salience, generator(recipe.seed, "salience")
    return intervals(found.sums, found.h.shape[1], section.mode, section.n_resamples, chance)


def _sides(measured: _Measured, chosen: _Rows) -> list[Side]:
    """Chosen and rejected; InputError where one of them has no position, or no latent fires."""
    n = chosen.n.sum(0).tolist()
    if 0 in n:
        raise InputError(
            f"no segment end of the {SIDES[n.index(0)]} texts of the training pairs about safety counts; "
            "loosen [tokens]."
        )
    if not measured.n_firing.any():
        raise InputError(
            f"no latent of the SAE fires on any of the {sum(n):,} segment ends of the training pairs about safety; "
            "train it longer (train.epochs), or on more texts."
        )
    return [Side(sums, n) for sums, n in zip(measured.sums, n, strict=True)]


def _by_size(s: Tensor, fires: Tensor) -> Tensor:
    """The latents that fire, largest |s| first, of equal ones the lower number. s: (d_sae,), fires: bool (d_sae,)."""
    latents = fires.nonzero().flatten()
    return latents[s[latents].abs().sort(descending=True, stable=True).indices]


def _table(recipe: RewardRecipe, found: Found, contexts: dict[int, list[Row]]) -> list[Row]:
    """The rows of salience.parquet. contexts: {latent: its contexts}, of the first latents alone."""
    section, ends_of_intervals = recipe.salience, bounds(recipe, found)
    rows = [_row(found, rank, latent) for rank, latent in enumerate(found.order.tolist())]
    for row in rows[: len(contexts)]:
        if ends_of_intervals:
            low, high = (float(end[row["rank"]]) for end in ends_of_intervals)
            row |= {"low": low, "high": high}
        row |= _of_contexts(contexts[row["latent"]], section)
    for row in rows[len(contexts) :]:
        row |= {"rated": False, "reason": f"not among the {section.n_latents} latents of largest |s|"}
    return rows


def _row(found: Found, rank: int, latent: int) -> Row:
    return {
        "rank": rank,
        "latent": latent,
        "salience": float(found.s[latent]),
        "h_chosen": float(found.h[_CHOSEN, latent]),
        "h_rejected": float(found.h[_REJECTED, latent]),
        "n_chosen": int(found.n_firing[_CHOSEN, latent]),
        "n_rejected": int(found.n_firing[_REJECTED, latent]),
    }


def _of_contexts(contexts: list[Row], section: SalienceSection) -> Row:
    reason = why_not_rated(contexts, section)
    n_classes = len({row["token_class"] for row in contexts})
    return {"n_contexts": len(contexts), "n_token_classes": n_classes, "rated": reason is None, "reason": reason}


def _facts(recipe: RewardRecipe, found: Found) -> Row:
    return {
        "mode": recipe.salience.mode,
        "C": float(found.h.sum(0).mean()),
        "n_pairs": len(found.sums.n),
        "n_positions": dict(zip(SIDES, found.sums.n.sum(0).tolist(), strict=True)),
        "n_latents": len(found.order),
    }
