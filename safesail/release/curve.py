"""The sweep as a picture: reconstruction loss and concept contrast against sparsity, for the model card.

Per hook point one panel over L0 on a logarithmic scale. Its upper band, with the left axis, has FVU as hollow marks on
dashed lines; its lower band, with the right axis, has I_CDF above its null as filled marks on solid lines, with the
95 % bootstrap interval as whiskers. The dotted line is the null itself, the short bars are the level below which 95 %
of its permutations lie. Architectures differ by the shape of their mark. The picture needs no plotting library, and
the same rows give the same bytes.
"""

import itertools
import math
from typing import Any, NamedTuple

from safesail.release.summary import hook_point_of, ordered, variant_of
from safesail.release.svg import INK, Axis, escaped, line, log_ticks, mark, pixels, ring, text, ticks, upright

__all__ = ["curve_svg"]

Row = dict[str, Any]
_WIDTH, _LEFT, _RIGHT = 820.0, 70.0, 740.0
_PANEL = 352.0
_UPPER, _LOWER = (38.0, 128.0), (138.0, 300.0)
"""Where the two bands of a panel begin and end."""
_LEGEND_LINE = 22.0
_NUDGE = 5.0
_GRID, _FVU, _CONTRAST, _NULL, _CHOSEN = "#e3e6eb", "#6b7280", "#1f4e9c", "#9a5b00", "#b3001b"


class _Panel(NamedTuple):
    """One hook point: where its axes lie, and how far the marks of each architecture are set aside."""

    x: Axis
    fvu: Axis
    contrast: Axis
    aside: dict[str, float]

    def across(self, row: Row) -> float:
        return self.x.at(row["l0"]) + self.aside[row["architecture"]]


def curve_svg(curve: list[Row]) -> str:
    """The picture of a sweep as an SVG document. curve: rows of the `selection` table.

    An SAE without an FVU or without a contrast lacks that mark; one whose L0 is 0 has no place on the scale.
    """
    rows = ordered(curve)
    groups = [(name, list(group)) for name, group in itertools.groupby(rows, key=hook_point_of)]
    architectures = list(dict.fromkeys(row["architecture"] for row in rows))
    legend = _legend(architectures, len(groups) * _PANEL)
    height = len(groups) * _PANEL + (math.ceil(len(architectures) / 5) + 2) * _LEGEND_LINE + 12
    panels = [_panel(name, group, number * _PANEL, architectures) for number, (name, group) in enumerate(groups)]
    return "\n".join([*_head(height, groups), *itertools.chain(*panels), *legend, "</svg>"]) + "\n"


def _head(height: float, groups: list[tuple[str, list[Row]]]) -> list[str]:
    chosen = ", ".join(row["sae_id"] for _, group in groups for row in group if row["selected"])
    size = f'viewBox="0 0 {pixels(_WIDTH)} {pixels(height)}" width="{pixels(_WIDTH)}" height="{pixels(height)}"'
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" font-family="sans-serif" font-size="12">',
        f"<title>{escaped('FVU and I_CDF above its null against L0')}</title>",
        f"<desc>{escaped('One panel per hook point. Selected: ' + (chosen or 'none'))}</desc>",
        f'<rect width="{pixels(_WIDTH)}" height="{pixels(height)}" fill="#ffffff"/>',
    ]


# --- a panel ------------------------------------------------------------------------------------------------------


def _panel(name: str, group: list[Row], top: float, architectures: list[str]) -> list[str]:
    shown = [row for row in group if row["l0"] > 0]
    title = text(_LEFT, top + 24, name, size=14, bold=True)
    if not shown:
        return [title, text(_LEFT, top + 60, "No SAE here has an L0 above 0.")]
    panel = _axes(shown, top, architectures)
    parts = [title, *_frame(panel)]
    for architecture in architectures:
        mine = [row for row in shown if row["architecture"] == architecture]
        parts += _series(panel, [row for row in mine if row["fvu"] is not None], panel.fvu, "fvu", dashed=True)
        parts += _series(panel, [row for row in mine if row["above_null"] is not None], panel.contrast, "above_null")
    return parts + [part for row in shown if row["selected"] for part in _ring(panel, row)]


def _axes(rows: list[Row], top: float, architectures: list[str]) -> _Panel:
    l0 = [row["l0"] for row in rows]
    room = max((max(l0) / min(l0)) ** 0.08, 1.15)
    fvu = [row["fvu"] for row in rows if row["fvu"] is not None]
    contrast = [0.0, *(value for row in rows for value in _contrasts(row))]
    middle = (len(architectures) - 1) / 2
    return _Panel(
        Axis(min(l0) / room, max(l0) * room, _LEFT, _RIGHT, log=True),
        _span(fvu or [0.0, 1.0], top + _UPPER[1], top + _UPPER[0], 0.12),
        _span(contrast, top + _LOWER[1], top + _LOWER[0], 0.18),
        {name: _NUDGE * (number - middle) for number, name in enumerate(architectures)},
    )


def _span(values: list[float], start: float, end: float, above: float) -> Axis:
    """The axis that holds all values, with some room at its ends and the share `above` at its upper one."""
    low, high = min(values), max(values)
    spread = high - low or abs(high) or 1.0
    return Axis(low - 0.1 * spread, high + above * spread, start, end)


def _contrasts(row: Row) -> list[float]:
    values = (row["above_null"], row["above_null_low"], row["above_null_high"], _null_high(row))
    return [value for value in values if value is not None]


def _null_high(row: Row) -> float | None:
    """The null's 95th percentile on the axis whose 0 is the null's mean."""
    high, mean = row["i_cdf_null_high"], row["i_cdf_null"]
    return None if high is None or mean is None else high - mean


def _frame(panel: _Panel) -> list[str]:
    """The boxes of the two bands, the ticks and names of the three axes, and the line of the null."""
    parts = []
    bottom = panel.contrast.start
    for value in log_ticks(panel.x.low, panel.x.high):
        x = panel.x.at(value)
        parts += [line(x, axis.start, x, axis.end, _GRID) for axis in (panel.fvu, panel.contrast)]
        parts.append(text(x, bottom + 16, f"{value:g}", anchor="middle"))
    parts.append(text((_LEFT + _RIGHT) / 2, bottom + 34, "L0 (log scale)", anchor="middle"))
    parts += _band(panel.fvu, "FVU", _FVU, _LEFT - 8, "end", 16)
    parts += _band(panel.contrast, "I_CDF above its null", _CONTRAST, _RIGHT + 8, "start", _WIDTH - 10)
    y = panel.contrast.at(0.0)
    return [*parts, line(_LEFT, y, _RIGHT, y, _NULL, 1.2, "2 3")]


def _band(axis: Axis, name: str, colour: str, ticks_at: float, anchor: str, name_at: float) -> list[str]:
    """The box of a band, with ticks and a name on the side where its axis is."""
    box = f'x="{pixels(_LEFT)}" y="{pixels(axis.end)}" width="{pixels(_RIGHT - _LEFT)}"'
    parts = [f'<rect {box} height="{pixels(axis.start - axis.end)}" fill="none" stroke="{_GRID}"/>']
    for value in ticks(axis.low, axis.high):
        y = axis.at(value)
        parts += [line(_LEFT, y, _RIGHT, y, _GRID), text(ticks_at, y + 4, f"{value:g}", anchor=anchor, colour=colour)]
    return [*parts, upright(name_at, (axis.start + axis.end) / 2, name, colour)]


def _series(panel: _Panel, rows: list[Row], axis: Axis, name: str, dashed: bool = False) -> list[str]:
    """The line of one architecture with its marks: hollow and dashed for FVU, filled with whiskers for the contrast."""
    places = [(panel.across(row), axis.at(row[name])) for row in rows]
    colour = _FVU if dashed else _CONTRAST
    points = " ".join(f"{pixels(x)},{pixels(y)}" for x, y in places)
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    parts = [f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.2"{dash}/>'] if rows else []
    for row, (x, y) in zip(rows, places, strict=True):
        if not dashed:
            parts += _whisker(panel, row, x)
        parts.append(mark(row["architecture"], x, y, colour, hollow=dashed, told=_told(row)))
    return parts


def _whisker(panel: _Panel, row: Row, x: float) -> list[str]:
    """The interval of a contrast, and the short bar below which 95 % of the null's permutations lie."""
    parts, at = [], panel.contrast.at
    if (level := _null_high(row)) is not None:
        parts.append(line(x - 8, at(level), x + 8, at(level), _NULL, 2))
    low, high = row["above_null_low"], row["above_null_high"]
    if low is not None and high is not None:
        parts.append(line(x, at(low), x, at(high), _CONTRAST, 1.2))
        parts += [line(x - 4, at(end), x + 4, at(end), _CONTRAST, 1.2) for end in (low, high)]
    return parts


def _ring(panel: _Panel, row: Row) -> list[str]:
    """A ring around the selected SAE's contrast (its FVU where there is none), and its name above."""
    name, axis = ("above_null", panel.contrast) if row["above_null"] is not None else ("fvu", panel.fvu)
    if row[name] is None:
        return []
    x, y = panel.across(row), axis.at(row[name])
    ends = [axis.at(value) for value in (row["above_null_high"],) if value is not None and name == "above_null"]
    words = f"selected: {variant_of(row)}"
    middle = min(max(x, _LEFT + 3.5 * len(words)), _RIGHT - 3.5 * len(words))
    return [
        ring(x, y, 10, _CHOSEN),
        text(middle, min([*ends, y - 10]) - 6, words, anchor="middle", colour=_CHOSEN, bold=True, halo=True),
    ]


def _told(row: Row) -> str:
    fvu, contrast = (None if row[name] is None else f"{row[name]:.4g}" for name in ("fvu", "above_null"))
    parts = [f"L0 {row['l0']:.4g}", f"FVU {fvu}" if fvu else "", f"I_CDF above null {contrast}" if contrast else ""]
    return f"{row['sae_id']}: {', '.join(part for part in parts if part)}"


# --- the legend ---------------------------------------------------------------------------------------------------


def _legend(architectures: list[str], top: float) -> list[str]:
    parts = []
    for number, name in enumerate(architectures):
        x, y = _LEFT + 130 * (number % 5), top + 8 + _LEGEND_LINE * (number // 5)
        parts += [mark(name, x, y, INK), text(x + 12, y + 4, name)]
    y, second = top + 8 + _LEGEND_LINE * math.ceil(len(architectures) / 5), _LEFT + 226
    parts += [line(_LEFT - 8, y, _LEFT + 24, y, _FVU, 1.2, "5 4"), mark("topk", _LEFT + 8, y, _FVU, hollow=True)]
    parts += [text(_LEFT + 34, y + 4, "hollow: FVU")]
    parts += [line(second - 16, y, second + 16, y, _CONTRAST, 1.2), mark("topk", second, y, _CONTRAST)]
    parts += [text(second + 26, y + 4, "filled: I_CDF above its null, with its 95 % interval")]
    y += _LEGEND_LINE
    parts += [line(_LEFT - 8, y, _LEFT + 24, y, _NULL, 1.2, "2 3"), text(_LEFT + 34, y + 4, "the null: pairs swapped")]
    parts += [line(second - 8, y, second + 8, y, _NULL, 2), text(second + 26, y + 4, "95 % of the swaps lie below")]
    return [*parts, ring(second + 240, y, 8, _CHOSEN), text(second + 256, y + 4, "selected")]
