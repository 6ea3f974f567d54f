"""What the Neurons tab shows of a search: counts by category, hook point and score, and the neurons found."""

from typing import Any

from charts import Bar, bars, columns
from markup import Markup, joined, tag
from view import domain_chips, neuron_button, score_cell, title

from safesail.neurons import NeuronDatabase, strength

__all__ = ["PAGE", "count_line", "facets", "found_table"]

Row = dict[str, Any]
PAGE = 50
"""Neurons shown at first, and more with each click."""
_TENTHS = 10


def facets(rows: list[Row]) -> Markup:
    """Counts of the neurons found: per category and hook point as bars to narrow by, and the scores' distribution."""
    return tag(
        "div",
        bars("Categories", "category", _counted(rows, "category", "Without a category"), "h2"),
        bars("Hook points", "hook_point", _counted(rows, "hook_point", ""), "h2"),
        columns("Scores", *_scores(rows), "h2"),
        class_="facets",
    )


def _counted(rows: list[Row], column: str, otherwise: str) -> list[Bar]:
    counts: dict[str, int] = {}
    for row in rows:
        counts[row[column] or ""] = counts.get(row[column] or "", 0) + 1
    names = sorted(counts, key=lambda name: (not name, -counts[name], name))
    label = title if column == "category" else str
    return [Bar(label(name) if name else otherwise, counts[name], name) for name in names]


def _scores(rows: list[Row]) -> tuple[list[tuple[str, int]], str]:
    """The scores by tenths, all below 0.1 together, and how many have none."""
    scores = [row["score"] for row in rows if row["score"] is not None]
    counts = [0] * _TENTHS
    for score in scores:
        counts[min(max(int(score * _TENTHS), 0), _TENTHS - 1)] += 1
    labels = ["< .1"] + [f".{i}" for i in range(1, _TENTHS)]
    without = len(rows) - len(scores)
    note = f"{without:,} without a score." if without else ""
    return list(zip(labels, counts, strict=True)), note


def found_table(database: NeuronDatabase, rows: list[Row], language: str, n_shown: int) -> Markup:
    """The first neurons of a search, each with a button that opens its card."""
    if not rows:
        return joined()
    heads = ["Score (95 % interval)", "Explanation", "Domains", "Category and concept"]
    return tag(
        "table",
        tag("caption", "Neurons, best score first", class_="unseen"),
        tag("thead", tag("tr", [tag("th", head, scope="col") for head in heads])),
        tag("tbody", [_found_row(database, row, language) for row in rows[:n_shown]]),
        class_="neurons",
    )


def _found_row(database: NeuronDatabase, row: Row, language: str) -> Markup:
    said = database.said(row["neuron_id"], language)
    status = row.get("status") or ""
    text = said.explanation or (f"none ({status})" if status not in ("", "ok") else "not explained")
    other = said.language if language and said.explanation and said.language != language else ""
    score = score_cell(row["score"], row.get("score_low"), row.get("score_high"), strength(row["score"]))
    about = " · ".join(filter(None, [title(row["category"] or ""), row["concept"]])) or "–"
    return tag(
        "tr",
        tag("td", score, data_label="Score"),
        tag("td", neuron_button(row["neuron_id"], text, other), class_="said"),
        tag("td", domain_chips(row["domains"]), data_label="Domains"),
        tag("td", about, data_label="Category", dir="auto"),
    )


def count_line(n: int, n_shown: int) -> str:
    """How many neurons a search found, and how many of them are shown."""
    if n == 0:
        return "No neuron matches; try fewer words, another domain or a lower score."
    shown = f", the best {n_shown} shown" if n > n_shown else ""
    return f"{n:,} neuron{'' if n == 1 else 's'}{shown}, best score first."
