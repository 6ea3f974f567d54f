"""The safety-related latents of each domain, chosen at a stated false-discovery rate.

A latent *wins* a pair when it is active with the concept and silent without, *loses* it the other way round. If the
concept meant nothing to it, either would be as likely: a sign test of wins against losses, per domain and per category,
with the false-discovery rate held in each such group (`contrast.q_values`). Safe-SAIL's own rule is not published.
"""

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from safesail.contrast import Contrast, q_values, sign_test
from safesail.pairs import Pair
from safesail.recipe import SelectSection
from safesail.training.groups import units_of

__all__ = ["candidate_latents"]

Row = dict[str, Any]


class _Test(NamedTuple):
    """The sign tests of all latents in one domain or category; of a unit's languages the majority decides."""

    level: str
    category: str
    n_pairs: int
    won: Tensor
    lost: Tensor
    p_values: Tensor
    q_values: Tensor
    significant: Tensor

    @classmethod
    def of(cls, level: str, category: str, contrast: Contrast, rows: list[int], pairs: list[Pair], section: Any):
        units = units_of(pairs[row] for row in rows)
        n_units = int(units.max()) + 1
        balance = contrast.won[rows].int() - contrast.lost[rows].int()
        balance = torch.zeros(n_units, balance.shape[1], dtype=torch.int32).index_add_(0, units, balance)
        won, lost = (balance > 0).sum(0), (balance < 0).sum(0)
        q = q_values(won, lost, section.fdr)
        significant = (q <= section.fdr) & (won >= section.min_pairs)
        return cls(level, category, n_units, won, lost, sign_test(won, lost), q, significant)

    def strength(self, latent: int) -> tuple[float, float, int]:
        """Smaller is stronger."""
        return float(self.q_values[latent]), float(self.p_values[latent]), -int(self.won[latent])


def candidate_latents(contrast: Contrast, pairs: list[Pair], section: SelectSection) -> dict[str, list[Row]]:
    """The candidates of each domain, strongest first: {domain: rows}.

    A candidate is significant for the domain or one of its categories and wins at least `min_pairs` pairs there; the
    row's counts, p and q are those of the stronger of these tests (`level`). A pair counts once, in however many
    languages. `categories` are those for which it is significant; `concepts` and `languages` are those of the pairs
    it wins in the domain, of most pairs first. The first `max_latents_per_domain` are marked to be explained; the rest
    stay listed, since a latent explained for one domain may be a candidate for another too.
    """
    return {domain: _of_domain(domain, contrast, pairs, section) for domain in dict.fromkeys(p.domain for p in pairs)}


def _of_domain(domain: str, contrast: Contrast, pairs: list[Pair], section: SelectSection) -> list[Row]:
    rows = [row for row, pair in enumerate(pairs) if pair.domain == domain]
    tests = [_Test.of("domain", "", contrast, rows, pairs, section)]
    for category in dict.fromkeys(pairs[row].category for row in rows):
        mine = [row for row in rows if pairs[row].category == category]
        tests.append(_Test.of("category", category, contrast, mine, pairs, section))
    latents = torch.stack([test.significant for test in tests]).any(0).nonzero().flatten().tolist()
    found = [_candidate(latent, tests, contrast.won[rows, latent], [pairs[row] for row in rows]) for latent in latents]
    found.sort(key=lambda row: (row["q_value"], row["p_value"], -row["n_wins"], row["latent"]))
    return [{**row, "explain": rank < section.max_latents_per_domain} for rank, row in enumerate(found)]


def _candidate(latent: int, tests: list[_Test], won: Tensor, pairs: list[Pair]) -> Row:
    passed = [test for test in tests if test.significant[latent]]
    test = min(passed, key=lambda test: test.strength(latent))
    pairs_won = [pairs[row] for row in won.nonzero().flatten().tolist()]
    return {
        "latent": latent,
        "n_wins": int(test.won[latent]),
        "n_losses": int(test.lost[latent]),
        "n_pairs": test.n_pairs,
        "p_value": float(test.p_values[latent]),
        "q_value": float(test.q_values[latent]),
        "level": test.level,
        "categories": [test.category for test in passed if test.level == "category"],
        "concepts": _most_common(pair.concept for pair in pairs_won),
        "languages": _most_common(pair.language for pair in pairs_won),
    }


def _most_common(values: Iterable[str]) -> list[str]:
    """The distinct values, those of most pairs first, else in the order of the alphabet."""
    counts = Counter(values)
    return sorted(counts, key=lambda value: (-counts[value], value))
