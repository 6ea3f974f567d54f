"""Knowledge as HTML: on which names a neuron fires, which the model knows, and how the two go together."""

from typing import Any

from charts import number
from markup import Markup, tag
from results import result_html, table
from view import strength_bar, visible

from safesail.diagnosis.results import Result

__all__ = ["knowledge_html"]

Row = dict[str, Any]


def knowledge_html(result: Result) -> Markup:
    """A result of `knowledge`."""
    found = result.facts["table"]
    contingency = table(
        "How firing and knowing go together",
        ["", "Known", "Unknown", "Share known (95 % interval)"],
        [
            ["Fires", found["fires_known"], found["fires_unknown"], _interval(found["known_where_fires"])],
            ["Silent", found["silent_known"], found["silent_unknown"], _interval(found["known_where_silent"])],
        ],
    )
    ratio = f"Odds ratio {_interval(found['odds_ratio'])}; Fisher's exact p = {found['p_value']:.3g}."
    rows = [
        [row["name"], strength_bar(row["normalised"]), "yes" if row["known"] else "no", visible(row["continuation"])]
        for row in result.rows
    ]
    heads = ["Name", "Activation on it", "Known", "The model's continuation"]
    return result_html(result, contingency, tag("p", ratio), table("Every name", heads, rows))


def _interval(interval: Row) -> str:
    if interval["value"] is None:
        return "undefined"
    return f"{number(interval['value'])} ({number(interval['low'])} to {number(interval['high'])})"
