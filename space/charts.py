"""Bars and histograms as plain HTML, whose numbers are there to read as well as to see."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from markup import Markup, tag

__all__ = ["Bar", "bars", "columns", "number", "percent"]


class Bar(NamedTuple):
    """A count under a name; with a value, a button that narrows the search to it."""

    label: str
    count: int
    value: str = ""


def bars(heading: str, kind: str, rows: Sequence[Bar], level: str = "h3") -> Markup:
    """Counts as horizontal bars, the longest full; a button's event says its kind and value. level: of the heading."""
    most = max((row.count for row in rows), default=1) or 1
    return tag("section", tag(level, heading), tag("ul", [_bar(row, kind, most) for row in rows], class_="bars"))


def _bar(row: Bar, kind: str, most: int) -> Markup:
    inner = [tag("span", row.label, class_="label"), tag("span", f"{row.count:,}", class_="count")]
    style = f"--share:{row.count / most:.4f}"
    if not row.value:
        return tag("li", inner, style=style)
    return tag("li", tag("button", inner, type="button", data_kind=kind, data_value=row.value), style=style)


def columns(heading: str, rows: Sequence[tuple[str, int]], note: str = "", level: str = "h3") -> Markup:
    """Counts as upright columns, each with its number above and its range below."""
    most = max((count for _, count in rows), default=1) or 1
    drawn = [
        tag(
            "li",
            tag("span", f"{count:,}", class_="count"),
            tag("span", class_="column", style=f"--share:{count / most:.4f}"),
            tag("span", label, class_="label"),
        )
        for label, count in rows
    ]
    said = tag("p", note, class_="quiet") if note else None
    return tag("section", tag(level, heading), tag("ol", drawn, class_="columns"), said)


def number(value: float | None, digits: int = 2) -> str:
    """A number with a true minus sign, or a dash."""
    return "–" if value is None else f"{value:.{digits}f}".replace("-", "−")


def percent(value: Any, digits: int = 2) -> str:
    """A share in per cent, or a dash."""
    return "–" if value is None else f"{value:.{digits}%}"
