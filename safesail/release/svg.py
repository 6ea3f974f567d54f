"""Pieces of an SVG picture as text: axes with round ticks, marks, lines and escaped words.

Numbers of pixels have one decimal, so that the same values give the same bytes on every machine.
"""

import html
import math
import re
from typing import NamedTuple

__all__ = ["INK", "Axis", "escaped", "line", "log_ticks", "mark", "pixels", "ring", "text", "ticks", "upright"]

INK = "#1f2430"
_SHAPES = {"topk": "circle", "batchtopk": "square", "matryoshka": "diamond", "jumprelu": "up", "relu": "down"}
_CORNERS = {
    "square": ((-1, -1), (1, -1), (1, 1), (-1, 1)),
    "diamond": ((0, -1.35), (1.35, 0), (0, 1.35), (-1.35, 0)),
    "up": ((0, -1.3), (1.25, 0.95), (-1.25, 0.95)),
    "down": ((0, 1.3), (1.25, -0.95), (-1.25, -0.95)),
}


class Axis(NamedTuple):
    """A scale: values from low to high lie on the pixels from start to end."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def at(self, value: float) -> float:
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (value - low) / (high - low)


def ticks(low: float, high: float) -> list[float]:
    """Three to eight round numbers from low to high."""
    rough = (high - low) / 6
    unit = 10.0 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(step * i, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten from low to high; over many decades the powers alone."""
    factors = (1,) if high / low > 2000 else (1, 2, 5)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    inside = [tick for power in powers for factor in factors if low <= (tick := factor * 10.0**power) <= high]
    return inside or [float(f"{math.sqrt(low * high):.2g}")]


def mark(architecture: str, x: float, y: float, colour: str, hollow: bool = False, told: str = "") -> str:
    """The mark of an architecture at a place, with what a pointer over it is told; a circle for an unknown one."""
    shape = _SHAPES.get(architecture, "circle")
    paint = f'fill="{"#ffffff" if hollow else colour}" stroke="{colour}" stroke-width="1.5"'
    title = f"<title>{escaped(told)}</title>" if told else ""
    if shape == "circle":
        return f'<circle cx="{pixels(x)}" cy="{pixels(y)}" r="4.5" {paint}>{title}</circle>'
    points = " ".join(f"{pixels(x + 4.2 * dx)},{pixels(y + 4.2 * dy)}" for dx, dy in _CORNERS[shape])
    return f'<polygon points="{points}" {paint}>{title}</polygon>'


def ring(x: float, y: float, radius: float, colour: str) -> str:
    """An empty circle around a place."""
    place = f'cx="{pixels(x)}" cy="{pixels(y)}" r="{pixels(radius)}"'
    return f'<circle {place} fill="none" stroke="{colour}" stroke-width="2"/>'


def line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1, dash: str = "") -> str:
    """A straight line; dash: lengths of strokes and gaps, as `5 4`."""
    dashed = f' stroke-dasharray="{dash}"' if dash else ""
    ends = f'x1="{pixels(x1)}" y1="{pixels(y1)}" x2="{pixels(x2)}" y2="{pixels(y2)}"'
    return f'<line {ends} stroke="{colour}" stroke-width="{pixels(width)}"{dashed}/>'


def text(
    x: float,
    y: float,
    words: str,
    *,
    anchor: str = "start",
    size: int = 12,
    colour: str = INK,
    bold: bool = False,
    halo: bool = False,
) -> str:
    """Words at a place; with a halo they stay readable over lines."""
    look = f'text-anchor="{anchor}" font-size="{size}" fill="{colour}"'
    look += ' font-weight="bold"' if bold else ""
    look += ' stroke="#ffffff" stroke-width="3" paint-order="stroke"' if halo else ""
    return f'<text x="{pixels(x)}" y="{pixels(y)}" {look}>{escaped(words)}</text>'


def upright(x: float, y: float, words: str, colour: str) -> str:
    """Words that run upwards, centred on a place."""
    place = f'x="{pixels(x)}" y="{pixels(y)}" transform="rotate(-90 {pixels(x)} {pixels(y)})"'
    return f'<text {place} text-anchor="middle" fill="{colour}">{escaped(words)}</text>'


def pixels(value: float) -> str:
    """A number of pixels with one decimal, never `-0.0`."""
    return f"{value:.1f}" if abs(value) >= 0.05 else "0.0"


def escaped(words: str) -> str:
    """Any text as the content of an element: escaped, without the characters that XML forbids."""
    return html.escape(re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", words))
