"""The numbers of a reward model's release as tables of its cards."""

from collections.abc import Iterable, Mapping
from typing import Any

from safesail.release.inert import md_cell
from safesail.release.summary import Table, number

__all__ = [
    "accuracies",
    "accuracy_table",
    "fidelity_table",
    "latent_table",
    "not_rated",
    "rating_counts",
    "source_table",
    "validity_table",
    "verdict_table",
]

Row = dict[str, Any]
_STRONGEST = 24
_METRICS = {
    "explained_variance": ("explained variance", 3),
    "fvu": ("fraction of variance unexplained", 3),
    "cosine": ("cosine", 3),
    "mse": ("mean squared error", 4),
    "l0": ("L0", 1),
    "dead": ("dead latents", 3),
    "dense": ("dense latents", 3),
}


def measured(value: Mapping[str, Any] | None, scale: float = 1.0, digits: int = 2) -> str:
    """`0.81 [0.75, 0.86]`; empty where there is no value, the value alone where there is no interval."""
    if value is None or value["value"] is None:
        return ""
    shown = number(scale * value["value"], digits)
    if value.get("low") is None or value.get("high") is None:
        return shown
    return f"{shown} [{number(scale * value['low'], digits)}, {number(scale * value['high'], digits)}]"


def accuracies(accuracy: Mapping[str, Mapping[str, Row]]) -> list[Row]:
    """How often the reward model is right, a row per kind and split that has pairs, held-out ones first.

    accuracy: accuracy.json, {kind: {held_out or training: {accuracy, low, high, n}}}.
    """
    rows = [
        {"kind": kind, "held_out": split == "held_out", "value": of["accuracy"], **of}
        for kind, splits in accuracy.items()
        for split, of in splits.items()
        if of["n"]
    ]
    return sorted(rows, key=lambda row: (not row["held_out"], row["kind"] != "safety"))


def accuracy_table(rows: Iterable[Row]) -> Table:
    """The accuracies in percent, with their intervals. rows: of `accuracies`."""
    cells = [
        ["held out" if row["held_out"] else "trained on", row["kind"], f"{row['n']:,}", measured(row, 100, 1) + " %"]
        for row in rows
    ]
    return ["pairs", "about", "n", "accuracy"], cells


def source_table(sources: Iterable[Row]) -> Table:
    """Where the pairs are from. sources: facts of the preferences stage."""
    header = ["source", "about", "pairs", "held out", "left out", "words, chosen", "words, rejected", "licence"]
    cells = [
        [
            md_cell(row["source"]),
            row["kind"],
            f"{row['n_pairs']:,}",
            f"{row['n_held_out']:,}",
            ", ".join(f"{n:,} {md_cell(reason)}" for reason, n in row["n_left_out"].items()) or "0",
            f"{row['n_words_chosen']:,}",
            f"{row['n_words_rejected']:,}",
            md_cell(row["licence"]) or "not stated",
        ]
        for row in sources
    ]
    return header, cells


def fidelity_table(fidelity: Row) -> Table:
    """The SAE's metrics, a metric a row. fidelity: each metric with its `_low` and `_high`."""
    cells = [
        [label, measured({end: fidelity.get(f"{name}{tail}") for end, tail in _ENDS}, 1, digits)]
        for name, (label, digits) in _METRICS.items()
        if fidelity.get(name) is not None
    ]
    return ["metric", "value"], cells


_ENDS = (("value", ""), ("low", "_low"), ("high", "_high"))


def rating_counts(safety: Row) -> list[str]:
    """How many latents got 5, 4, …, 1, and no rating."""
    none = sum(n for status, n in safety["statuses"].items() if status != "ok")
    return [*(str(safety["ratings"].get(str(rating), 0)) for rating in (5, 4, 3, 2, 1)), str(none)]


def not_rated(rows: Iterable[Row]) -> str:
    """How many of the latents that were looked at were not rated, by reason; empty: all were."""
    few = classes = 0
    for row in rows:
        few += not row["rated"] and "fewer" in (row["reason"] or "")
        classes += not row["rated"] and "different" in (row["reason"] or "")
    said = [f"{few} with too few contexts"] if few else []
    return ", ".join(said + ([f"{classes} on too many different tokens"] if classes else []))


def latent_table(rows: list[Row]) -> Table:
    """The safety latents and the strongest others, by |s|. rows: of the published salience table."""
    chosen = [row for row in rows if row["safety"]] + [row for row in rows if not row["safety"]]
    shown = sorted(chosen[:_STRONGEST], key=lambda row: row["rank"])
    header = ["latent", "s", "fires on chosen", "fires on rejected", "rating", "counts as"]
    cells = [
        [
            f"**{row['neuron_id']}**" if row["safety"] else row["neuron_id"],
            measured({"value": row["salience"], "low": row["low"], "high": row["high"]}),
            f"{row['n_chosen']:,}",
            f"{row['n_rejected']:,}",
            str(row["rating"]) if row["rating"] is not None else md_cell(row["status"] or "not rated"),
            row["safety"] or "",
        ]
        for row in shown
    ]
    return header, cells


def validity_table(rows: Iterable[Row]) -> Table:
    """How well score_safe and the reward margin predict labels and harm. rows: those over all sources."""
    header = ["pairs", "about", "n", "by", "share right", "AUROC", "correlation with harm (Spearman)"]
    cells = [
        [
            "held out" if row["held_out"] else "all",
            row["kind"],
            f"{row['n_pairs']:,}",
            {"margin": "reward margin"}.get(row["measure"], row["measure"]),
            measured(row["share"]),
            measured(row["auroc"]),
            measured(row["spearman"]) + (f" (n = {row['n_harm']:,})" if row["n_harm"] else ""),
        ]
        for row in rows
        if row["source"] is None
    ]
    return header, cells


def verdict_table(rows: Iterable[Row]) -> Table:
    """The pairs chosen by SAFER against as many at random. rows: `against_random` of comparison.json."""
    header = ["data", "safety accuracy", "verdict", "chat accuracy", "verdict"]
    cells = [
        [
            row["edit"],
            measured(row["safety"], 100, 1),
            row["safety_verdict"],
            measured(row["chat"], 100, 1),
            row["chat_verdict"],
        ]
        for row in rows
        if row["method"] == "safer"
    ]
    return header, cells
