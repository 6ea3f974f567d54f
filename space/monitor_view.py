"""The monitor's risks as HTML: how likely a text is about each domain, and which neurons say so on which tokens."""

from typing import Any

from charts import number
from markup import Markup, tag
from results import result_html, table
from view import neuron_button, strength_bar, title, visible

from safesail.diagnosis.results import Result
from safesail.neurons import NeuronDatabase

__all__ = ["risks_html"]

Row = dict[str, Any]
MAX_NEURONS = 8


def risks_html(result: Result, database: NeuronDatabase) -> Markup:
    """A result of `monitor_texts` on one text."""
    domains: dict[str, list[Row]] = {}
    for row in result.rows:
        domains.setdefault(row["domain"], []).append(row)
    threshold = result.facts["threshold"]
    return result_html(result, [_domain(name, rows, threshold, database) for name, rows in domains.items()])


def _domain(name: str, rows: list[Row], threshold: float, database: NeuronDatabase) -> Markup:
    probability = rows[0]["probability"]
    word = "at or above" if rows[0]["above"] else "below"
    fired = [row for row in rows if row.get("neuron_id")]
    parts = [
        tag("h2", f"{title(name)} ", strength_bar(probability)),
        tag("p", f"Its probability {number(probability)} is {word} the threshold of {number(threshold)}."),
    ]
    if not fired:
        return tag("section", parts, tag("p", "None of its neurons fires: the probability is that of any such text."))
    shown = [
        [
            neuron_button(row["neuron_id"], database.said(row["neuron_id"]).explanation or "not explained"),
            visible(row["token"]),
            number(row["activation"]),
            number(row["coefficient"]),
            number(row["contribution"]),
        ]
        for row in fired[:MAX_NEURONS]
    ]
    more = f", the strongest {MAX_NEURONS} of {len(fired)}" if len(fired) > MAX_NEURONS else ""
    heads = ["Neuron", "Token", "Activation", "Coefficient", "Adds to the log odds"]
    start = f"The log odds start at {number(rows[0]['intercept'])}."
    return tag("section", parts, tag("p", start), table(f"What its neurons add{more}", heads, shown))
