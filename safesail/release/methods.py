"""The scoring methods in words, and what each of them found and cost.

A method's name has two parts: what is predicted (`segment-5`, `token`, `detection`, …), and by whom (`llm`, …).
"""

import statistics
from collections.abc import Callable
from typing import Any

from safesail.recipe import ScoreSection
from safesail.release.summary import Table, number

__all__ = ["confusion_table", "cost_table", "definition", "method_table", "total_cost"]

Row = dict[str, Any]
_COUNTS = ("true_positives", "false_positives", "false_negatives", "true_negatives")
_NO_PRICE = "no price was given"


def definition(method: str, section: ScoreSection) -> str:
    """What a method predicts, by whom, and what it is compared with, in one sentence."""
    level, _, predictor = method.partition("/")
    if level == "detection":
        return f"whole texts: {_TRUTH['text'].format(section=section)}; {_PREDICTORS['llm'].format(piece='texts')}"
    if level == "similarity":
        return f"whole texts: {_TRUTH['text'].format(section=section)}; {_PREDICTORS['embedding'].format(piece='text')}"
    kind, _, _ = level.partition("-")
    piece = f"{kind}s" if predictor == "llm" else kind
    return f"{_TRUTH[kind].format(section=section)}; {_PREDICTORS[predictor].format(piece=piece)}"


_TRUTH = {
    "segment": "segments of whole characters with at least {section.segment_tokens} tokens; the truth is whether any "
    "token of the segment is active (above {section.active_above:g} of the normaliser)",
    "token": "single tokens; the truth is the activation in tenths of the normaliser, 0 to 10",
    "text": "the truth is whether any token of the text is active (above {section.active_above:g} of the normaliser)",
}
_PREDICTORS = {
    "llm": "a language model that is shown the explanation alone says how active it expects the {piece} to be",
    "embedding": "the prediction is the cosine of the {piece} and the explanation in a sentence encoder",
    "lexical": "the prediction is whether the {piece} holds a token that carried the neuron before: no explanation is "
    "read, and this is the baseline of the methods with the same truth",
}


def method_table(scores: list[Row]) -> Table:
    """The scores of each method and language: how many there are, and their distribution. scores: the table."""
    header = ["method", "language", "scored", "median score", "quartiles", "score > 0.2", "median AUROC", "units"]
    cells = []
    for (method, language), rows in _groups(scores).items():
        found = sorted(row["score"] for row in rows if row["score"] is not None)
        aurocs = [row["auroc"] for row in rows if row["auroc"] is not None]
        quartiles = statistics.quantiles(found, n=4, method="inclusive") if len(found) > 1 else []
        cells.append(
            [
                f"`{method}`",
                language,
                f"{len(found)} of {len(rows)}",
                number(statistics.median(found) if found else None),
                f"{number(quartiles[0])} – {number(quartiles[2])}" if quartiles else "",
                str(sum(score > 0.2 for score in found)),
                number(statistics.median(aurocs) if aurocs else None),
                f"{sum(row['n_units'] or 0 for row in rows):,}",
            ]
        )
    return header, cells


def confusion_table(scores: list[Row]) -> Table:
    """The confusion counts of the methods that predict yes or no, summed over neurons, with what follows from them."""
    header = ["method", "language", "true +", "false +", "false −", "true −", "precision", "recall"]
    cells = []
    for (method, language), rows in _groups(scores).items():
        counted = [row for row in rows if all(row[name] is not None for name in _COUNTS)]
        if not counted:
            continue
        hits, alarms, misses, rests = (sum(row[name] for row in counted) for name in _COUNTS)
        shown = [f"{n:,}" for n in (hits, alarms, misses, rests)]
        cells.append([f"`{method}`", language, *shown, _share(hits, hits + alarms), _share(hits, hits + misses)])
    return header, cells


def cost_table(explanations: list[Row], scores: list[Row]) -> Table:
    """The tokens and the price of the explanations, of each method that asked a language model, and of all."""
    header = ["", "prompt tokens", "completion tokens", "USD"]
    groups = {"explanations": explanations}
    groups |= {f"scores, {method}": rows for method, rows in _groups(scores, lambda row: row["method"]).items()}
    asked = {name: rows for name, rows in groups.items() if any(row["prompt_tokens"] for row in rows)}
    cells = []
    for name, rows in (asked | ({"all": [*explanations, *scores]} if len(asked) > 1 else {})).items():
        tokens = [sum(row[kind] for row in rows) for kind in ("prompt_tokens", "completion_tokens")]
        cost = total_cost(rows)
        price = _NO_PRICE if cost is None else f"{cost:.4f}" if cost else "0"
        cells.append([name, *(f"{n:,}" for n in tokens), price])
    return header, cells


def total_cost(rows: list[Row]) -> float | None:
    """What the language model's answers cost in USD, or None where a price is unknown."""
    costs = [row["cost_usd"] for row in rows]
    return None if any(cost is None for cost in costs) else sum(costs)


def _groups(scores: list[Row], key: Callable[[Row], Any] = lambda row: (row["method"], row["language"])) -> dict:
    """The rows by method and language, both in the order of the table."""
    groups: dict[Any, list[Row]] = {}
    for row in scores:
        groups.setdefault(key(row), []).append(row)
    return groups


def _share(part: int, whole: int) -> str:
    return number(part / whole) if whole else ""
