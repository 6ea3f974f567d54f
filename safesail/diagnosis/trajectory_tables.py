"""What the rows of trajectories say: how strong each concept is in each version, and which neurons drop."""

from collections.abc import Sequence
from typing import Any, Literal

__all__ = ["By", "concepts", "concepts_of", "drops", "layer_of", "size_of"]

By = Literal["domain", "category", "neuron"]
Row = dict[str, Any]


def concepts(rows: Sequence[Row], labels: Sequence[str], *, by: By = "domain") -> list[Row]:
    """Per concept, hook point and version the strongest normalised activation, where it is, and how much fires.

    rows: as of TRAJECTORIES; labels: the versions in order. A row: concept, hook_point, layer, label, max (0 where
    nothing fires), n_tokens on which a neuron of the concept fires, n_neurons, and neuron_id, token_index and token of
    the maximum. A neuron of several domains counts in each; `none` are explained neurons without a domain (or
    category), `unexplained` those without an explanation.
    """
    found: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in rows:
        for concept in concepts_of(row, by):
            found.setdefault((concept, row["hook_point"]), {}).setdefault(row["label"], []).append(row)
    return [
        {"concept": name, "hook_point": point, "layer": layer_of(point), "label": label, **_peak(firing.get(label, []))}
        for (name, point), firing in sorted(found.items(), key=_order)
        for label in labels
    ]


def _order(item: tuple[tuple[str, str], dict[str, list[Row]]]) -> tuple[Any, ...]:
    """By layer; the concepts of a hook point by their largest maximum, those without a name last."""
    (concept, point), firing = item
    largest = max(size_of(row) for rows in firing.values() for row in rows)
    return layer_of(point) or 0, point, {"none": 1, "unexplained": 2}.get(concept, 0), -largest, concept


def drops(rows: Sequence[Row], labels: Sequence[str]) -> list[Row]:
    """Per neuron and version what is missing or weaker there than in the reference, the largest drop first.

    rows: as of TRAJECTORIES; labels: the versions, the reference first. A row: neuron_id, hook_point, layer,
    explanation, domains, score, label, in_reference, in_version (the normalised maxima, 0 where the neuron is silent),
    drop = in_reference - in_version, and change: missing, weaker, equal, stronger or new. Neurons without a normaliser
    (they never fired in the corpus) have no normalised activation and are left out.
    """
    known: dict[str, Row] = {}
    maxima: dict[tuple[str, str], float] = {}
    for row in rows:
        if row["normalised"] is not None:
            known.setdefault(row["neuron_id"], row)
            key = row["neuron_id"], row["label"]
            maxima[key] = max(row["normalised"], maxima.get(key, 0.0))
    reference, *others = labels
    table = [
        _drop(row, label, maxima.get((id, reference), 0.0), maxima.get((id, label), 0.0))
        for id, row in known.items()
        for label in others
        if (id, reference) in maxima or (id, label) in maxima
    ]
    return sorted(table, key=lambda row: (-row["drop"], row["neuron_id"], others.index(row["label"])))


def concepts_of(row: Row, by: By) -> list[str]:
    """The concepts that a row's neuron counts for."""
    named = {"domain": row["domains"], "category": [row["category"]] if row["category"] else []}
    if by == "neuron":
        return [row["neuron_id"]]
    return named[by] or ["unexplained" if row["explanation"] is None else "none"]


def _peak(rows: list[Row]) -> Row:
    """The strongest of a concept's firings in a version, and how many there are."""
    if not rows:
        return {"max": 0.0, "n_tokens": 0, "n_neurons": 0, "neuron_id": None, "token_index": None, "token": None}
    peak = max(rows, key=size_of)
    return {
        "max": size_of(peak),
        "n_tokens": len({row["token_index"] for row in rows}),
        "n_neurons": len({row["neuron_id"] for row in rows}),
        **{key: peak[key] for key in ("neuron_id", "token_index", "token")},
    }


def _drop(row: Row, label: str, in_reference: float, in_version: float) -> Row:
    drop = in_reference - in_version
    change = "weaker" if drop > 0 else "stronger" if drop < 0 else "equal"
    if in_version == 0 or in_reference == 0:
        change = "missing" if in_version == 0 else "new"
    about = {key: row[key] for key in ("neuron_id", "hook_point", "layer", "explanation", "domains", "score")}
    told = {"in_reference": in_reference, "in_version": in_version, "drop": drop, "change": change}
    return {**about, "label": label, **told}


def size_of(row: Row) -> float:
    """The normalised activation, 0 where there is none."""
    return row["normalised"] or 0.0


def layer_of(hook_point: str) -> int | None:
    """The number in a hook point's name."""
    return next((int(part) for part in hook_point.split(".") if part.isdigit()), None)
