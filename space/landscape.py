"""The landscape as the browser draws it: where each neuron lies, what it is called, and how the places were made."""

import json
import math
from typing import Any, NamedTuple

from charts import number
from view import title

from safesail.neurons import NeuronDatabase, strength
from safesail.release.landscape import in_words

__all__ = ["Point", "as_json", "landscape"]

Row = dict[str, Any]
MAX_LABEL = 100
"""Characters of an explanation at its point, so that thousands of points are one small answer; the card has it all."""


class Point(NamedTuple):
    """A neuron on the plane; in JSON an array, which names no column again at every neuron."""

    id: str
    x: float
    y: float
    domains: list[int]
    """Places in the list of domains; that of no domain, if it carries none."""
    label: str
    score: str
    """With the plain word for it."""


def landscape(database: NeuronDatabase, language: str) -> Row:
    """The points of the neurons that have a place, and the sentence that names the method; or why there is none."""
    rows = [row for row in database if _is_place(row.get("x"), row.get("y"))]
    if not rows:
        return {"message": "This release has no landscape: its neurons carry no coordinates.", "points": []}
    names = [*database.domains, ""]
    return {
        "caption": _caption(database.landscape, len(rows)),
        "note": _note(len(database) - len(rows)),
        "domains": [{"id": name, "title": title(name) if name else "No domain"} for name in names],
        "points": [_point(database, row, language, names) for row in rows],
    }


def as_json(value: Row) -> str:
    """The text that the page's script parses. Without `<`, it is in no place taken for HTML."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").encode("utf-8", errors="replace").decode()


def _is_place(x: float | None, y: float | None) -> bool:
    return x is not None and y is not None and math.isfinite(x) and math.isfinite(y)


def _point(database: NeuronDatabase, row: Row, language: str, names: list[str]) -> Point:
    label = database.said(row["neuron_id"], language).explanation or "Not explained"
    if len(label) > MAX_LABEL:
        label = label[: MAX_LABEL - 1].rstrip() + "…"
    carried = [names.index(domain) for domain in row["domains"] or [""]]
    return Point(row["neuron_id"], row["x"], row["y"], carried, label, _scored(row["score"]))


def _scored(score: float | None) -> str:
    return strength(score) if score is None else f"{number(score)}, {strength(score)}"


def _caption(facts: Row, n: int) -> str:
    """How the places were made, in a sentence."""
    how = in_words(facts) if facts else ""
    how = how or f"{n:,} neurons on a plane, where the release puts them"
    close = "Neurons that write alike into the model lie near each other; the axes have no meaning."
    return f"{how[:1].upper()}{how[1:]}. {close}"


def _note(n_without: int) -> str:
    """Where else the neurons are, and how many are not on the plane."""
    missing = f", and {n_without:,} more that have no place here" if n_without else ""
    return f"The Neurons tab lists the same neurons{missing}."
