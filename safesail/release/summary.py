"""The numbers of a release as tables: what the terminal, the cards and the README print."""

import itertools
import statistics
from typing import Any

from safesail.neurons import WEAK_BELOW

__all__ = [
    "aligned",
    "curve_lines",
    "domain_table",
    "domains_summary",
    "markdown",
    "ordered",
    "sae_table",
    "score_bands",
]

Row = dict[str, Any]


def sae_table(curve: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and cells: one row per SAE of the sweep, in the order of `ordered`. curve: rows of the `selection` table.

    In brackets: the 95 % interval.
    """
    header = ["SAE", "EV", "L0", "dead", "dense", "CE recovered", "KL", "I_CDF", "swapped", "selected"]
    cells = [
        [
            row["sae_id"],
            _with_interval(row, "explained_variance", 1, 3, ""),
            f"{row['l0']:.1f}",
            f"{100 * row['dead']:.1f} %",
            f"{100 * row['dense']:.1f} %",
            _with_interval(row, "ce_recovered", 100, 1, " %"),
            f"{row['kl']:.3f}",
            f"{row['i_cdf']:.4f}",
            f"{row['i_cdf_swapped']:.4f}",
            "yes" if row["selected"] else "",
        ]
        for row in ordered(curve)
    ]
    return header, cells


def ordered(curve: list[Row]) -> list[Row]:
    """The rows of a sweep by hook point, then architecture (both as they first appear), then L0."""
    hook_points = list(dict.fromkeys(_hook_point(row) for row in curve))
    architectures = list(dict.fromkeys(row["architecture"] for row in curve))
    return sorted(
        curve,
        key=lambda row: (hook_points.index(_hook_point(row)), architectures.index(row["architecture"]), row["l0"]),
    )


def curve_lines(curve: list[Row]) -> list[str]:
    """The sweep as text: per hook point the SAEs with L0, FVU and I_CDF, and bars scaled to the column's maximum.

    curve: the rows of selection.json's `curve`, each with its `sae_id`.
    """
    rows = ordered(curve)
    largest = {name: max((row[name] or 0.0 for row in rows), default=0.0) for name in ("fvu", "i_cdf")}
    width = max((max(len(_variant(row)) + 2, len(_hook_point(row))) for row in rows), default=0)
    lines = []
    for hook_point, group in itertools.groupby(rows, key=_hook_point):
        lines.append(f"{hook_point:{width}}  {'L0':>7}  {'FVU':<26}  I_CDF")
        for row in group:
            fvu = "" if row["fvu"] is None else f"{row['fvu']:.3f} {_bar(row['fvu'], largest['fvu'])}"
            line = f"{'  ' + _variant(row):{width}}  {row['l0']:7.1f}  {fvu:<26}  {row['i_cdf']:.4f} "
            lines.append((line + _bar(row["i_cdf"], largest["i_cdf"])).rstrip())
    return lines


def domains_summary(neurons: list[Row], domain_ids: list[str]) -> list[Row]:
    """Per domain, for `none` and for all neurons: how many, and the distribution of scores. neurons: the main table."""
    groups = [(name, [row for row in neurons if name in row["domains"]]) for name in domain_ids]
    groups.append(("none", [row for row in neurons if not row["domains"]]))
    groups.append(("all", neurons))
    return [_group(name, rows) for name, rows in groups]


def domain_table(neurons: list[Row], domain_ids: list[str]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of `domains_summary`."""
    header = [
        "domain",
        "neurons",
        "median score",
        "quartiles",
        f"score > {WEAK_BELOW:g}",
        "lexical baseline (median)",
        "beats the baseline",
    ]
    cells = []
    for group in domains_summary(neurons, domain_ids):
        quartiles = "" if group["low"] is None else f"{_number(group['low'])} – {_number(group['high'])}"
        cells.append(
            [
                group["domain"],
                str(group["n"]),
                _number(group["median"]),
                quartiles,
                str(group["n_above"]),
                _number(group["lexical_median"]),
                str(group["n_beats_lexical"]),
            ]
        )
    return header, cells


def score_bands(neurons: list[Row]) -> list[tuple[str, int]]:
    """How many scores fall in each band, and how many are undefined."""
    edges = [-1.0, 0.0, 0.2, 0.3, 0.4, 0.5, 0.6, 1.0]
    scores = [row["score"] for row in neurons if row["score"] is not None]
    bands = [
        (f"{low:g} to {high:g}", sum(low < score <= high or score == low == -1 for score in scores))
        for low, high in itertools.pairwise(edges)
    ]
    undefined = len(neurons) - len(scores)
    return [*bands, ("undefined", undefined)] if undefined else bands


def markdown(header: list[str], cells: list[list[str]]) -> str:
    """A Markdown table; cells must be escaped already where they hold foreign text."""
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


def _group(name: str, rows: list[Row]) -> Row:
    scores = sorted(row["score"] for row in rows if row["score"] is not None)
    lexical = [row["lexical_score"] for row in rows if row["lexical_score"] is not None]
    quartiles = statistics.quantiles(scores, n=4) if len(scores) > 1 else [None, None, None]
    both = [row for row in rows if row["score"] is not None and row["lexical_score"] is not None]
    return {
        "domain": name,
        "n": len(rows),
        "median": statistics.median(scores) if scores else None,
        "low": quartiles[0],
        "high": quartiles[2],
        "n_above": sum(score > WEAK_BELOW for score in scores),
        "lexical_median": statistics.median(lexical) if lexical else None,
        "n_beats_lexical": sum(row["score"] > row["lexical_score"] for row in both),
    }


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}".replace("-0.00", "0.00")


def _with_interval(row: Row, name: str, scale: float, digits: int, unit: str) -> str:
    """`0.818 [0.815, 0.821]`; empty where the metric is undefined, the number alone where it has no interval."""
    value, low, high = (row[key] for key in (name, f"{name}_low", f"{name}_high"))
    if value is None:
        return ""
    shown = f"{scale * value:.{digits}f}{unit}"
    return shown if low is None else f"{shown} [{scale * low:.{digits}f}, {scale * high:.{digits}f}]"


def _hook_point(row: Row) -> str:
    return row["sae_id"].rpartition("/")[0]


def _variant(row: Row) -> str:
    return row["sae_id"].rpartition("/")[2]


def _bar(value: float, largest: float, width: int = 20) -> str:
    """A horizontal bar in eighths of a character, `width` characters long for the largest value."""
    eighths = round(8 * width * max(value, 0.0) / largest) if largest > 0 else 0
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()
