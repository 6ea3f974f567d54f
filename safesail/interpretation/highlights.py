"""A neuron's examples as an explainer sees them: which are shown, and how strongly each token is marked.

    ⟦8:bomb⟧     a token at level 8:   level(a) = clip(round(10 · a / Q), 0, 10),   Q: the neuron's normaliser

The level stands inside the mark, before the token: whatever the text goes on with, digits included, changes no level.
"""

from collections.abc import Sequence
from typing import Any

from safesail.interpretation.prompts import inert

__all__ = ["active_examples", "highlighted", "level_of", "numbered", "silent_examples"]

Row = dict[str, Any]
_NEAR_MISS = "near-miss"


def level_of(activation: float, q: float) -> int:
    """0 … 10: the activation in tenths of the normaliser `q`, rounded (half a tenth to the even level)."""
    return min(max(round(10 * activation / q), 0), 10)


def highlighted(tokens: Sequence[str], activations: Sequence[float], q: float) -> str:
    """The text in one line, its tokens of level 1 and more as ⟦level:token⟧. tokens: readable units."""
    parts = []
    for token, value in zip(tokens, activations, strict=True):
        level = level_of(value, q)
        parts.append(f"⟦{level}:{inert(token)}⟧" if level else inert(token))
    return "".join(parts)


def numbered(rows: Sequence[Row], q: float) -> str:
    """The examples one a line, from `1. ` on; `(none)` when there are none."""
    lines = (f"{i}. {highlighted(row['tokens'], row['activations'], q)}" for i, row in enumerate(rows, 1))
    return "\n".join(lines) or "(none)"


def active_examples(rows: Sequence[Row], n: int) -> list[Row]:
    """At most `n` examples, strongest first, that cover the activation levels present before any level comes twice.

    Of more than `n` levels, `n` evenly spread ones are shown, the strongest among them.
    """
    ordered = sorted((row for row in rows if row["stratum"] != _NEAR_MISS), key=lambda row: -row["activation"])
    heads: dict[int, int] = {}
    for place, row in enumerate(ordered):
        heads.setdefault(row["level"], place)
    kept = _spread(list(heads.values()), n)
    others = [place for place in range(len(ordered)) if place not in kept]
    return [ordered[place] for place in sorted([*kept, *others[: n - len(kept)]])]


def silent_examples(rows: Sequence[Row], n: int) -> list[Row]:
    """The first `n` near-misses: contexts that hold one of the neuron's strongest tokens and leave it silent."""
    return [row for row in rows if row["stratum"] == _NEAR_MISS][:n]


def _spread(places: list[int], n: int) -> list[int]:
    """`n` of the places, evenly spread from the first to the last (of one, the first); all when there are fewer."""
    if len(places) <= n:
        return places
    return [places[i * (len(places) - 1) // max(n - 1, 1)] for i in range(n)]
