"""Groups of pairs (all, a domain, a category, a concept, a language) and the contrast of an SAE's latents in each.

f_j is of a concept category (or of one concept). A wider group's I_CDF and L_{0,t} are averages over its categories,
each counting the same, so that a category with many pairs does not outweigh another.
"""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from safesail.contrast import Contrast, distinguishing_frequency, i_cdf, l0_above, l0_above_swapped, swap_null
from safesail.metrics import Interval, ratio_of_sums
from safesail.pairs import Pair
from safesail.recipe import SelectSection

__all__ = ["GROUPINGS", "Group", "groups_of", "latent_shares", "measure", "units_of"]

GROUPINGS = ("all", "domain", "category", "concept", "language")


class Group(NamedTuple):
    """Pairs that get one number, in parts that count the same."""

    grouping: str
    name: str
    """"all", a language, or `domain/category/concept` as far as it goes."""
    parts: list[Tensor]
    """The rows of each part's pairs."""
    units: list[Tensor]
    """Beside each row its unit's number, within the group."""

    @property
    def rows(self) -> Tensor:
        return torch.cat(self.parts)

    def per_unit(self, values: Tensor) -> Tensor:
        """What each unit adds to the group's mean of a number per pair. values: (n_pairs,) → (n_units,)."""
        units, weights = torch.cat(self.units), [1 / (len(self.parts) * len(part)) for part in self.parts]
        weighted = torch.cat([values[part].double() * w for part, w in zip(self.parts, weights, strict=True)])
        return torch.zeros(int(units.max()) + 1, dtype=torch.float64).index_add_(0, units, weighted)

    def interval(self, values: Tensor, n_resamples: int, seed: int) -> Interval:
        """The group's mean of a number per pair, with a 95 % interval from drawing units. values: (n_pairs,).

        The draws depend on the seed and the number of units alone, so those of several SAEs are paired.
        """
        weights = self.per_unit(torch.ones(len(values)))
        return ratio_of_sums(self.per_unit(values), weights, n_resamples=n_resamples, seed=seed)


def groups_of(pairs: list[Pair]) -> list[Group]:
    """All groups of the pairs: first `all`, then by domain, category, concept and language in the pairs' order."""
    members: dict[tuple[str, str], list[int]] = defaultdict(list)
    for grouping in GROUPINGS:
        for row, pair in enumerate(pairs):
            members[grouping, _name(grouping, pair)].append(row)
    return [_group(*key, rows, pairs) for key, rows in members.items()]


def units_of(pairs: Iterable[Pair]) -> Tensor:
    """The number of each pair's unit: pairs of one id, in several languages, are one. (n_pairs,), from 0."""
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(pair.id, len(numbers)) for pair in pairs])


def latent_shares(contrast: Contrast) -> Contrast:
    """The share of latents that win each pair, and that lose it: float64 (n_pairs,) each. I_CDF is the first's mean."""
    return Contrast(*(side.sum(1).double() / side.shape[1] for side in contrast))


def measure(contrast: Contrast, shares: Contrast, group: Group, section: SelectSection, seed: int) -> dict[str, Any]:
    """The numbers of one SAE on one group, with intervals and what random swaps give.

    shares: `latent_shares` of the contrast. The mean of I_CDF under random swaps is exact: it is the mean of I_CDF as
    it is and with all pairs swapped.
    """
    value, swapped = (_mean(i_cdf(distinguishing_frequency(side[part])) for part in group.parts) for side in contrast)
    won, lost = shares
    interval = group.interval(won, section.n_resamples, seed)
    above = group.interval((won - lost) / 2, section.n_resamples, seed)
    null = (value + swapped) / 2
    spread, p_value = swap_null(group.per_unit((won - lost) / 2), section.n_resamples, seed)
    return {
        "i_cdf": value,
        "i_cdf_low": interval.low,
        "i_cdf_high": interval.high,
        "i_cdf_swapped": swapped,
        "i_cdf_null": null,
        "i_cdf_null_high": null + spread,
        "i_cdf_p": p_value,
        "above_null": value - null,
        "above_null_low": above.low,
        "above_null_high": above.high,
        **_l0(contrast, group, section.thresholds),
    }


def _l0(contrast: Contrast, group: Group, thresholds: tuple[float, ...]) -> dict[str, dict[str, float]]:
    """L_{0,t} and its mean under random swaps, for each t."""
    measured, swapped = [], []
    for part, units in zip(group.parts, group.units, strict=True):
        frequency = distinguishing_frequency(contrast.won[part])
        measured.append([l0_above(frequency, t) for t in thresholds])
        numbers = units.unique(return_inverse=True)[1]
        won, lost = (_by_unit(side[part], numbers) for side in contrast)
        swapped.append(l0_above_swapped(won, lost, len(part), thresholds))
    names = [f"{t:g}" for t in thresholds]
    return {
        key: dict(zip(names, map(_mean, zip(*rows, strict=True)), strict=True))
        for key, rows in (("l0_t", measured), ("l0_t_null", swapped))
    }


def _by_unit(side: Tensor, units: Tensor) -> Tensor:
    """How many of each unit's pairs a latent wins (or loses): int8 (n_units, d_sae)."""
    return torch.zeros(int(units.max()) + 1, side.shape[1], dtype=torch.int8).index_add_(0, units, side.to(torch.int8))


def _name(grouping: str, pair: Pair) -> str:
    path = (pair.domain, pair.category, pair.concept)
    return {
        "all": "all",
        "domain": pair.domain,
        "category": "/".join(path[:2]),
        "concept": "/".join(path),
        "language": pair.language,
    }[grouping]


def _group(grouping: str, name: str, rows: list[int], pairs: list[Pair]) -> Group:
    """A concept is one part; any wider group has one for each of its categories."""
    parts: dict[str, list[int]] = defaultdict(list)
    for row in rows:
        parts[_name("category", pairs[row])].append(row)
    together = [torch.tensor(part) for part in parts.values()]
    units = units_of(pairs[row] for row in torch.cat(together).tolist())
    return Group(grouping, name, together, list(units.split([len(part) for part in together])))


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)
