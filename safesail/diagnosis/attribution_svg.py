"""An attribution graph as a picture: a column per hook point, the neuron that was asked about in the last.

The picture needs no plotting library and no fonts of its own, and the same graph gives the same bytes.
"""

import html
import re
import textwrap

from safesail.diagnosis.attribution_graph import Edge, Graph

__all__ = ["svg"]

_INK, _MUTED, _BOX, _RAISES, _LOWERS = "#1f2430", "#6b7280", "#f5f6f8", "#1f4e9c", "#b3001b"
_COLUMN, _WIDE, _ROW, _HIGH, _TOP = 400.0, 270.0, 58.0, 44.0, 64.0
"""Distance and width of the columns, distance and height of the boxes, and where the first begins."""
_LINE = 18.0
_LETTERS = 104
"""About so many letters fit into a line across one column and its gap."""


def svg(graph: Graph) -> str:
    """The graph as an SVG document: a column per hook point from left to right, the child in the last.

    An edge is as thick as its attribution; solid lines raise the child's activation, dashed ones lower it. The same
    graph gives the same bytes.
    """
    columns = _columns(graph)
    places = {node: (x, y) for x, column in columns for y, node in column}
    wide = 40 + _COLUMN * (len(columns) - 1) + _WIDE
    said = [line for sentence in graph.sentences() for line in _wrapped(sentence, int(wide / _COLUMN * _LETTERS / 1.9))]
    low = _TOP + _ROW * max(len(column) for _, column in columns)
    high = low + _LINE * (len(said) + 2)
    parts = [*_head(graph, wide, high), *_edges(graph, places)]
    parts += [_text(x, 44, graph.nodes[column[0][1]].hit.hook_point, bold=True) for x, column in columns]
    parts += [part for node, place in places.items() for part in _box(graph, node, *place)]
    parts += [_text(20, low + _LINE * (i + 1), line, colour=_MUTED) for i, line in enumerate(said)]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _columns(graph: Graph) -> list[tuple[float, list[tuple[float, int]]]]:
    """The left side of each column, and the top and node of its boxes; the child stands at half height."""
    points = [share.hook_point for share in graph.shares]
    groups = [[i for i, node in enumerate(graph.nodes) if i and node.hit.hook_point == point] for point in points]
    shown = [group for group in groups if group]
    middle = _TOP + _ROW * (max((len(group) for group in shown), default=1) - 1) / 2
    columns = [[(_TOP + _ROW * row, node) for row, node in enumerate(group)] for group in shown] + [[(middle, 0)]]
    return [(20 + _COLUMN * i, column) for i, column in enumerate(columns)]


def _head(graph: Graph, wide: float, high: float) -> list[str]:
    size = f'viewBox="0 0 {_px(wide)} {_px(high)}" width="{_px(wide)}" height="{_px(high)}"'
    child = graph.child
    title = f"{child.hit.neuron_id} on {_quoted(child.token)} and its {len(graph.nodes) - 1} strongest parents"
    legend = "Solid: raises the activation. Dashed: lowers it."
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" font-family="sans-serif" font-size="12">',
        f"<title>{_escaped(title)}</title>",
        f'<rect width="{_px(wide)}" height="{_px(high)}" fill="#ffffff"/>',
        _text(20, 22, f"{title} of {graph.n_parents}. {legend}", size=13),
    ]


def _edges(graph: Graph, places: dict[int, tuple[float, float]]) -> list[str]:
    """The lines, then their numbers, so that no line crosses a number."""
    largest = max((abs(edge.attribution) for edge in graph.edges), default=0.0) or 1.0
    drawn = [(edge, *places[edge.parent], *places[edge.child]) for edge in graph.edges]
    lines = [_edge(edge, x1 + _WIDE, y1, x2, y2, largest) for edge, x1, y1, x2, y2 in drawn]
    numbers = [
        _text(x1 + _WIDE + 8, y1 + _HIGH / 2 - 5, f"{edge.attribution:+.2f}", colour=_colour(edge), halo=True)
        for edge, x1, y1, *_ in drawn
        if edge.child == 0
    ]
    return lines + numbers


def _edge(edge: Edge, x1: float, y1: float, x2: float, y2: float, largest: float) -> str:
    ends = f'x1="{_px(x1)}" y1="{_px(y1 + _HIGH / 2)}" x2="{_px(x2)}" y2="{_px(y2 + _HIGH / 2)}"'
    dash = ' stroke-dasharray="6 4"' if edge.attribution < 0 else ""
    width = 0.5 + 5 * abs(edge.attribution) / largest
    told = f"<title>{edge.attribution:+.3f}</title>"
    return f'<line {ends} stroke="{_colour(edge)}" stroke-width="{_px(width)}" stroke-opacity="0.6"{dash}>{told}</line>'


def _box(graph: Graph, place: int, x: float, y: float) -> list[str]:
    node = graph.nodes[place]
    hit = node.hit
    told = hit.explanation or hit.status or "not explained"
    strength = f"{hit.activation:.2f}" if hit.normalised is None else f"{hit.normalised:.2f}"
    size = f'x="{_px(x)}" y="{_px(y)}" width="{_px(_WIDE)}" height="{_px(_HIGH)}" rx="4"'
    title = f"<title>{_escaped(f'{hit.neuron_id}: {told}')}</title>"
    return [
        f'<rect {size} fill="{_BOX}" stroke="{_INK}" stroke-width="{"2.0" if place == 0 else "1.0"}">{title}</rect>',
        _text(x + 8, y + 18, f"{hit.latent} on {_quoted(_short(node.token, 16))}  {strength}", bold=True),
        _text(x + 8, y + 35, _short(told, 42)),
    ]


def _colour(edge: Edge) -> str:
    return _RAISES if edge.attribution >= 0 else _LOWERS


def _text(
    x: float, y: float, words: str, *, size: int = 12, colour: str = _INK, bold: bool = False, halo: bool = False
) -> str:
    """Words at a place; with a halo they stay readable over lines."""
    look = f'font-size="{size}" fill="{colour}"' + (' font-weight="bold"' if bold else "")
    look += ' stroke="#ffffff" stroke-width="3" paint-order="stroke"' if halo else ""
    return f'<text x="{_px(x)}" y="{_px(y)}" {look}>{_escaped(words)}</text>'


def _quoted(token: str) -> str:
    return f"“{token.strip() or token}”"


def _short(words: str, n: int) -> str:
    words = " ".join(words.split())
    return words if len(words) <= n else words[: n - 1] + "…"


def _wrapped(sentence: str, n: int) -> list[str]:
    return textwrap.wrap(sentence, max(n, 60))


def _px(value: float) -> str:
    return f"{value:.1f}" if abs(value) >= 0.05 else "0.0"


def _escaped(words: str) -> str:
    """Any text as the content of an element: escaped, without the characters that XML forbids."""
    return html.escape(re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", words))
