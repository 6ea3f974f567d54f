"""The numbers of a release as tables: what the terminal, the cards and the README print."""

import itertools
import statistics
from collections import Counter
from typing import Any

from safesail.neurons import WEAK_BELOW

__all__ = [
    "STATUSES",
    "aligned",
    "candidate_table",
    "card_sae_table",
    "curve_lines",
    "domain_table",
    "domains_summary",
    "hook_point_of",
    "markdown",
    "number",
    "ordered",
    "sae_table",
    "score_bands",
    "selection_table",
    "short_domain_table",
    "status_lines",
    "status_table",
    "variant_of",
    "with_interval",
]

Row = dict[str, Any]
Table = tuple[list[str], list[list[str]]]
"""A header and the cells of its rows."""
STATUSES = ("ok", "refused", "unparsed", "failed", "undefined")
"""How an explanation or a score can end: the last only a score."""


def sae_table(curve: list[Row]) -> Table:
    """The fidelity of the sweep, an SAE a row, in the order of `ordered`. curve: rows of the `selection` table.

    In brackets: the 95 % interval.
    """
    header = ["SAE", "EV", "L0", "dead", "dense", "CE recovered", "KL", "selected"]
    cells = [
        [
            row["sae_id"],
            with_interval(row, "explained_variance", 1, 3, ""),
            f"{row['l0']:.1f}",
            f"{100 * row['dead']:.1f} %",
            f"{100 * row['dense']:.1f} %",
            with_interval(row, "ce_recovered", 100, 1, " %"),
            f"{row['kl']:.3f}",
            _yes(row["selected"]),
        ]
        for row in ordered(curve)
    ]
    return header, cells


def selection_table(curve: list[Row]) -> Table:
    """What the SAEs were selected by, an SAE a row, in the order of `ordered`. curve: rows of the `selection` table.

    In brackets: the 95 % interval. `null` is the mean of I_CDF over random swaps of the pairs, `p` the share of swaps
    that reach the I_CDF, `above null` the difference of I_CDF and null.
    """
    header = ["SAE", "L0", "I_CDF", "null", "p", "above null", "as good as best", "selected"]
    cells = [
        [
            row["sae_id"],
            f"{row['l0']:.1f}",
            with_interval(row, "i_cdf", 1, 5, ""),
            number(row["i_cdf_null"], 5),
            number(row["i_cdf_p"], 3),
            with_interval(row, "above_null", 1, 5, ""),
            _yes(row["as_good_as_best"]),
            _yes(row["selected"]),
        ]
        for row in ordered(curve)
    ]
    return header, cells


def ordered(curve: list[Row]) -> list[Row]:
    """The rows of a sweep by hook point, then architecture (both as they first appear), then L0."""
    hook_points = list(dict.fromkeys(hook_point_of(row) for row in curve))
    architectures = list(dict.fromkeys(row["architecture"] for row in curve))
    return sorted(
        curve,
        key=lambda row: (hook_points.index(hook_point_of(row)), architectures.index(row["architecture"]), row["l0"]),
    )


def curve_lines(curve: list[Row]) -> list[str]:
    """The sweep as text: per hook point the SAEs with L0, FVU and I_CDF above its null, and which one is selected.

    Bars are scaled to the column's maximum. curve: the rows of selection.json's `curve`, each with its `sae_id`.
    """
    rows = ordered(curve)
    largest = {name: max((row[name] or 0.0 for row in rows), default=0.0) for name in ("fvu", "above_null")}
    width = max((max(len(variant_of(row)) + 2, len(hook_point_of(row))) for row in rows), default=0)
    lines = []
    for hook_point, group in itertools.groupby(rows, key=hook_point_of):
        lines.append(f"{hook_point:{width}}  {'L0':>7}  {'FVU':<26}  I_CDF above its null")
        for row in group:
            fvu = "" if row["fvu"] is None else f"{row['fvu']:.3f} {_bar(row['fvu'], largest['fvu'])}"
            contrast = with_interval(row, "above_null", 1, 5, "")
            line = f"{'  ' + variant_of(row):{width}}  {row['l0']:7.1f}  {fvu:<26}  {contrast:<29} "
            line += f"{_bar(row['above_null'] or 0.0, largest['above_null']):<20} "
            lines.append((line + ("selected" if row["selected"] else "")).rstrip())
    return lines


def candidate_table(candidates: dict[str, dict[str, list[Row]]], fdr: float) -> Table:
    """Per hook point and domain, how many latents tell the domain's pairs apart and how many are to be explained.

    The last column is the largest q-value among them: the estimated share of chance finds, at most `fdr`.
    candidates: candidates.json.
    """
    header = ["hook point", "domain", "candidates", "of a category alone", "to be explained", f"FDR (at most {fdr:g})"]
    cells = [
        [
            hook_point,
            domain,
            str(len(rows)),
            str(sum(row["level"] == "category" for row in rows)),
            str(sum(row["explain"] for row in rows)),
            number(max((row["q_value"] for row in rows), default=None), 3),
        ]
        for hook_point, domains in candidates.items()
        for domain, rows in domains.items()
    ]
    return header, cells


def status_table(explanations: list[Row], scores: list[Row]) -> Table:
    """How the explanations of each language, and the scores of each method and language, ended; a status a column."""
    groups: dict[str, Counter[str]] = {}
    for row in explanations:
        groups.setdefault(f"explanations, {row['language']}", Counter())[row["status"]] += 1
    for row in scores:
        name = ", ".join(filter(None, (row["method"], row["language"])))
        groups.setdefault(name, Counter())[row["status"]] += 1
    cells = [[name, *(str(counts[status]) for status in STATUSES)] for name, counts in groups.items()]
    return ["", *STATUSES], cells


def status_lines(
    explanations: list[Row], scores: list[Row], refused_by_domain: dict[str, int] | None = None
) -> list[str]:
    """`status_table` for the terminal, and the refusals per domain where there are any.

    refused_by_domain: {domain: refused explanations of its candidates}, from the record of `explain`.
    """
    header, cells = status_table(explanations, scores)
    lines = aligned(header, cells).splitlines() if cells else []
    refused = [f"{domain} {n}" for domain, n in (refused_by_domain or {}).items() if n]
    return [*lines, f"refused explanations by domain: {' · '.join(refused)}"] if refused else lines


def domains_summary(neurons: list[Row], domain_ids: list[str]) -> list[Row]:
    """Per domain, for `none` and for all neurons: how many, and the distribution of scores. neurons: the main table."""
    groups = [(name, [row for row in neurons if name in row["domains"]]) for name in domain_ids]
    groups.append(("none", [row for row in neurons if not row["domains"]]))
    groups.append(("all", neurons))
    return [_group(name, rows) for name, rows in groups]


def domain_table(neurons: list[Row], domain_ids: list[str]) -> Table:
    """Header and cells of `domains_summary`."""
    header = [
        "domain",
        "neurons",
        "without a score",
        "median score",
        "quartiles",
        f"score > {WEAK_BELOW:g}",
        "lexical baseline (median)",
        "beats the baseline",
    ]
    cells = []
    for group in domains_summary(neurons, domain_ids):
        quartiles = "" if group["low"] is None else f"{number(group['low'])} – {number(group['high'])}"
        cells.append(
            [
                group["domain"],
                str(group["n"]),
                str(group["n_without"]),
                number(group["median"]),
                quartiles,
                str(group["n_above"]),
                number(group["lexical_median"]),
                str(group["n_beats_lexical"]),
            ]
        )
    return header, cells


def score_bands(neurons: list[Row]) -> list[tuple[str, int]]:
    """How many scores fall in each band, and how many neurons have none."""
    edges = [-1.0, 0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 1.0]
    scores = [row["score"] for row in neurons if row["score"] is not None]
    bands = [
        (f"{low:g} to {high:g}", sum(low < score <= high or score == low == -1 for score in scores))
        for low, high in itertools.pairwise(edges)
    ]
    n_without = len(neurons) - len(scores)
    return [*bands, ("none", n_without)] if n_without else bands


def markdown(header: list[str], cells: list[list[str]]) -> str:
    """A Markdown table; cells must be escaped already where they hold foreign text."""
    assert not any(set(cell) & set("|<\n") for row in [header, *cells] for cell in row), "a cell breaks its table"
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in cells])


def aligned(header: list[str], cells: list[list[str]]) -> str:
    """A table for the terminal: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *cells]) for i in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in [header, *cells]
    ]
    return "\n".join(line.rstrip() for line in lines)


def card_sae_table(curve: list[Row], neurons: list[Row]) -> Table:
    """`sae_table` for the model card: the selected SAEs in bold, with the number of their neurons that carry a domain.

    neurons: the main table.
    """
    header, cells = sae_table(curve)
    n_of = Counter(row["hook_point"] for row in neurons if row["domains"])
    rows = [
        [f"**{name}**", *numbers, str(n_of[name.rpartition("/")[0]])] if selected else [name, *numbers, ""]
        for name, *numbers, selected in cells
    ]
    return [*header[:-1], "neurons with a domain"], rows


def short_domain_table(neurons: list[Row], domain_ids: list[str]) -> Table:
    """Per domain, how many neurons there are and how far their explanations predict them. neurons: the main table."""
    header, cells = domain_table(neurons, domain_ids)
    kept = [header.index(name) for name in ("domain", "neurons", "median score", f"score > {WEAK_BELOW:g}")]
    return [header[i] for i in kept], [[row[i] for i in kept] for row in cells]


def _group(name: str, rows: list[Row]) -> Row:
    scores = sorted(row["score"] for row in rows if row["score"] is not None)
    lexical = [row["lexical_score"] for row in rows if row["lexical_score"] is not None]
    quartiles = statistics.quantiles(scores, n=4, method="inclusive") if len(scores) > 1 else [None, None, None]
    both = [row for row in rows if row["score"] is not None and row["lexical_score"] is not None]
    return {
        "domain": name,
        "n": len(rows),
        "n_without": len(rows) - len(scores),
        "median": statistics.median(scores) if scores else None,
        "low": quartiles[0],
        "high": quartiles[2],
        "n_above": sum(score > WEAK_BELOW for score in scores),
        "lexical_median": statistics.median(lexical) if lexical else None,
        "n_beats_lexical": sum(row["score"] > row["lexical_score"] for row in both),
    }


def number(value: float | None, digits: int = 2) -> str:
    """The number with so many decimals, never `-0.00`; empty where it is undefined."""
    if value is None:
        return ""
    shown = f"{value:.{digits}f}"
    return shown.lstrip("-") if float(shown) == 0 else shown


def with_interval(row: Row, name: str, scale: float, digits: int, unit: str) -> str:
    """`0.818 [0.815, 0.821]`; empty where the metric is undefined, the number alone where it has no interval."""
    value, low, high = (row[key] for key in (name, f"{name}_low", f"{name}_high"))
    if value is None:
        return ""
    shown = f"{number(scale * value, digits)}{unit}"
    return shown if low is None else f"{shown} [{number(scale * low, digits)}, {number(scale * high, digits)}]"


def hook_point_of(row: Row) -> str:
    """The hook point in a row's `sae_id`."""
    return row["sae_id"].rpartition("/")[0]


def variant_of(row: Row) -> str:
    """The variant in a row's `sae_id`: architecture, sparsity and width."""
    return row["sae_id"].rpartition("/")[2]


def _yes(value: bool) -> str:
    return "yes" if value else ""


def _bar(value: float, largest: float, width: int = 20) -> str:
    """A horizontal bar in eighths of a character, `width` characters long for the largest value."""
    eighths = round(8 * width * max(value, 0.0) / largest) if largest > 0 else 0
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
