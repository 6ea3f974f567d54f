"""Concept contrast in the model card: which pairs were used, and what the selected SAEs make of each group of them."""

from typing import Any

from safesail.pairs import Pair
from safesail.release.summary import Table, number, ordered

__all__ = ["activity_test", "group_table", "pair_table", "threshold_table"]

Row = dict[str, Any]
_REDUCTIONS = {
    "max": "the largest of its activations on the query's counted tokens",
    "mean": "the mean of its activations on the query's counted tokens",
    "last": "its activation on the query's last counted token",
}


def activity_test(options: Row) -> str:
    """When a latent counts as active on a query, in words. options: of selection.json."""
    quantile = options["activity_quantile"]
    bound = f"its own {quantile:g} quantile over held-out tokens" if quantile else "zero"
    return f"{_REDUCTIONS[options['reduction']]} is above {bound}"


def pair_table(pairs: list[Pair], domain_ids: list[str]) -> Table:
    """The number of pairs per language and domain."""
    languages = list(dict.fromkeys(pair.language for pair in pairs))
    cells = []
    for language in languages:
        mine = [pair.domain for pair in pairs if pair.language == language]
        cells.append([language, *(str(mine.count(domain)) for domain in domain_ids), str(len(mine))])
    return ["language", *domain_ids, "all"], cells


def threshold_table(curve: list[Row]) -> Table:
    """L_{0,t} of every SAE at each t, and in brackets what the null gives. curve: rows of the `selection` table."""
    thresholds = list(curve[0]["l0_t"])
    cells = [
        [row["sae_id"], *(f"{number(row['l0_t'][t], 1)} ({number(row['l0_t_null'][t], 1)})" for t in thresholds)]
        for row in ordered(curve)
    ]
    return ["SAE", *(f"t = {t}" for t in thresholds)], cells


def group_table(contrast: list[Row], grouping: str) -> Table:
    """I_CDF above its null in each group of pairs, a selected SAE a column, with the p-value in brackets.

    contrast: rows of the `contrast` table. grouping: as `domain`.
    """
    rows = [row for row in contrast if row["selected"] and row["grouping"] == grouping]
    saes = list(dict.fromkeys(row["sae_id"] for row in rows))
    groups = {row["group"]: row["n_pairs"] for row in rows}
    found = {(row["group"], row["sae_id"]): _above_null(row) for row in rows}
    cells = [[name, str(n), *(found.get((name, sae), "") for sae in saes)] for name, n in groups.items()]
    return [grouping, "pairs", *saes], cells


def _above_null(row: Row) -> str:
    shown = number(row["above_null"], 5)
    return f"{shown} (p {row['i_cdf_p']:.3f})" if shown and row["i_cdf_p"] is not None else shown
