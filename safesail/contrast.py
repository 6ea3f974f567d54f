"""Concept contrast: which latents distinguish queries with a concept from the same queries without it, and by chance.

Safe-SAIL publishes two sentences: L_{0,t} is "the absolute number of features that distinguish the concept under
threshold t", I_CDF "the expected distinguishing frequency across all features". Its formulas, its activity test, its
reduction over tokens and its thresholds are not published; the formulas here are our reading, the statistics ours:

    f_j     = the share of a concept's pairs that latent j distinguishes: active with the concept, silent without it
    L_{0,t} = |{j : f_j > t}|,   F(t) = |{j : f_j ≤ t}| / M = 1 - L_{0,t} / M
    I_CDF   = ∫₀¹ (1 - F(t)) dt = E_j[f_j], which is where a metric named after a CDF gets its expected frequency

A pair in several languages (one id) is one *unit*: its translations are drawn and swapped together, since they are not
independent evidence.
"""

import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Contrast",
    "contrast",
    "distinguishing_frequency",
    "i_cdf",
    "l0_above",
    "l0_above_swapped",
    "q_values",
    "sign_test",
    "swap_null",
]


class Contrast(NamedTuple):
    """Which latent distinguishes which pair, and which would with the two queries swapped. Both: bool (n_pairs, M)."""

    won: Tensor
    lost: Tensor


def contrast(with_concept: Tensor, without: Tensor) -> Contrast:
    """A latent wins a pair when it is active with the concept and silent without, and loses it the other way round.

    with_concept, without: bool (n_pairs, d_sae), whether the latent is active on the query.
    """
    return Contrast(with_concept & ~without, without & ~with_concept)


def distinguishing_frequency(won: Tensor) -> Tensor:
    """f_j, the share of pairs that latent j distinguishes. won: (n_pairs, d_sae) → (d_sae,), float64."""
    return won.sum(0).double() / len(won)


def l0_above(frequency: Tensor, threshold: float) -> int:
    """L_{0,t} = |{j : f_j > t}|, the number of latents that distinguish the concept. frequency: (d_sae,)."""
    return int((frequency > threshold).sum())


def i_cdf(frequency: Tensor) -> float:
    """I_CDF = E_j[f_j] = the integral over t in [0, 1] of (1 - CDF(t)). frequency: (d_sae,)."""
    return float(frequency.double().mean())


# --- what chance alone gives: the two queries of each unit swapped at random ----------------------------------------


def swap_null(effects: Tensor, n_resamples: int, seed: int) -> tuple[float, float]:
    """How far I_CDF lies above its mean under random swaps: (95th percentile, p-value of the value as it is).

    effects: (n_units,), half of what each unit adds to I_CDF as it is less what it adds swapped. A swap turns its sign,
    so I_CDF less its null mean is Σ ± effects; only these numbers are needed, not the latents. The p-value counts the
    value itself among the draws, (1 + number as large) / (1 + n_resamples), so that it is valid and never 0.
    """
    effects, generator = effects.double(), torch.Generator().manual_seed(seed)
    signs = 2 * torch.randint(2, (n_resamples, len(effects)), generator=generator).double() - 1
    drawn = signs @ effects
    rounding = 1e-9 * effects.abs().sum()
    n_as_large = int((drawn >= effects.sum() - rounding).sum())
    return float(drawn.quantile(0.95)), (1 + n_as_large) / (1 + n_resamples)


def l0_above_swapped(won: Tensor, lost: Tensor, n_pairs: int, thresholds: tuple[float, ...]) -> list[float]:
    """The exact mean of L_{0,t} under random swaps, for each t.

    won, lost: (n_units, d_sae), how many of a unit's pairs the latent wins and loses. The number of pairs that a latent
    wins when each unit is swapped with probability ½ has a distribution that is built up unit by unit; the mean of
    L_{0,t} is the sum over latents of its tail, and needs no draws.
    """
    touched = ((won > 0) | (lost > 0)).any(0)
    won, lost = won[:, touched].long(), lost[:, touched].long()
    chances = torch.zeros(won.shape[1], n_pairs + 1, dtype=torch.float64)
    chances[:, 0] = 1
    for up, down in zip(won, lost, strict=True):
        some = ((up > 0) | (down > 0)).nonzero().flatten()
        before = chances[some]
        chances[some] = (_shifted(before, up[some]) + _shifted(before, down[some])) / 2
    frequency = torch.arange(n_pairs + 1, dtype=torch.float64) / n_pairs
    return [float(chances[:, frequency > t].sum()) for t in thresholds]


def _shifted(chances: Tensor, by: Tensor) -> Tensor:
    """Each row moved to the right by its own number of places. chances: (n, n_places), by: (n,)."""
    places = torch.arange(chances.shape[1]) - by[:, None]
    return chances.gather(1, places.clamp(min=0)) * (places >= 0)


# --- which latents: a sign test each, and the false-discovery rate of all -------------------------------------------


def sign_test(wins: Tensor, losses: Tensor) -> Tensor:
    """One-sided p-value that `wins` of wins + losses fair coin tosses, or more, come up. Both: (n,) integer counts.

    Exact; a latent without a win or loss has p = 1.
    """
    totals = wins + losses
    p_values = torch.ones(len(wins), dtype=torch.float64)
    for n in totals.unique().tolist():
        mine = totals == n
        p_values[mine] = _tails(n)[wins[mine].long()]
    return p_values


def q_values(wins: Tensor, losses: Tensor, fdr: float) -> Tensor:
    """Benjamini–Hochberg for sign tests: the latents with q ≤ fdr are false at that rate at most. Both: (n,) → (n,).

    A sign test of n = wins + losses tosses has no p-value but its n + 1 tails. Counting latents that can never become
    significant would cost all others their chance, so (1) latents whose smallest p-value 0.5ⁿ exceeds fdr are not
    tested (q = 1), and (2) at a threshold t a tested latent counts with the probability F_n(t) that it reaches t, as
    in Tarone (1990), instead of with t. n says nothing about which side won, so given n the p-values keep their
    distribution under the null. The step-up rule is that of Döhler, Durand & Roquain (2018), DBH-SU,

        q_(i) = min over l ≥ i of  Σ_j F_j(p_(l)) / (1 - F_j(τ)) / l   for p ≤ τ, else 1
        τ     = the largest p-value with Σ_j F_j(τ) / (1 - F_j(τ)) ≤ fdr · number tested

    proven for independent latents; ours share their pairs. The q-values depend on fdr and are read at that fdr.
    """
    q = torch.ones(len(wins), dtype=torch.float64)
    totals = wins + losses
    tested = totals >= math.ceil(-math.log2(fdr) - 1e-9)
    if tested.any():
        p_values, order = sign_test(wins[tested], losses[tested]).sort()
        stepped = _step_up(p_values, totals[tested], fdr)
        q[tested.nonzero().flatten()[order]] = stepped
    return q


def _step_up(p_values: Tensor, totals: Tensor, fdr: float) -> Tensor:
    """The q-values of ascending p-values. totals: the tosses of all tests, in any order."""
    sizes, n_tests = totals.unique(return_counts=True)
    attainable = torch.cat([_tails(n) for n in sizes.tolist()]).unique()
    attainable = attainable[attainable < 1]
    reached = _reached(attainable, sizes)
    allowed = (n_tests[:, None] * reached / (1 - reached)).sum(0) <= fdr * len(p_values)
    if not allowed.any():
        return torch.ones_like(p_values)
    limit = attainable[allowed].max()
    weights = n_tests / (1 - _reached(limit[None], sizes)[:, 0])
    expected = weights @ _reached(p_values, sizes)
    expected[p_values > limit] = torch.inf
    shares = expected / torch.arange(1, len(p_values) + 1)
    return shares.flip(0).cummin(0).values.flip(0).clamp(max=1)


def _reached(thresholds: Tensor, sizes: Tensor) -> Tensor:
    """F_n(t), the probability under the null that a sign test of n tosses has p ≤ t: (n_sizes, n_thresholds)."""
    rows = []
    for n in sizes.tolist():
        attainable = _tails(n).flip(0)
        place = torch.searchsorted(attainable, thresholds, right=True)
        rows.append(torch.where(place > 0, attainable[(place - 1).clamp(min=0)], 0.0))
    return torch.stack(rows)


def _tails(n: int) -> Tensor:
    """P(m or more of n fair coin tosses come up), m = 0 … n, from whole numbers: (n + 1,)."""
    n_ways = itertools.accumulate(math.comb(n, m) for m in range(n, -1, -1))
    return torch.tensor([ways / 2**n for ways in n_ways], dtype=torch.float64).flip(0)
