"""Trajectories as HTML: how the model reads each version, which concepts fire where, and what drops."""

from collections.abc import Sequence
from typing import Any

from charts import number
from markup import Markup, tag
from results import result_html, table
from view import domain_chips, neuron_button, strength_bar, title, visible

from safesail.diagnosis.attribution_graph import Graph
from safesail.diagnosis.attribution_svg import svg
from safesail.diagnosis.results import Result
from safesail.diagnosis.trajectories import drops

__all__ = ["graph_html", "trajectories_html"]

Row = dict[str, Any]
MAX_DROPS = 20


def trajectories_html(result: Result) -> Markup:
    """A result of `trajectories`."""
    versions, found = result.facts["versions"], result.facts["concepts"]
    points = list(dict.fromkeys(row["hook_point"] for row in found))  # by depth
    labels = [version["label"] for version in versions]
    return result_html(
        result,
        tag("ul", [tag("li", version["reading"]["sentence"]) for version in versions]),
        tag("section", tag("h2", "Token by token"), [_heat(version, result.rows, points) for version in versions]),
        _concepts(found, labels),
        _drops(result.rows, labels),
    )


def _heat(version: Row, rows: Sequence[Row], points: list[str]) -> Markup:
    """A version's tokens once per hook point, marked by the strongest neuron that carries a domain."""
    mine = [row for row in rows if row["label"] == version["label"] and row["domains"] and row["normalised"]]
    lines = [_line(point, version["tokens"], [row for row in mine if row["hook_point"] == point]) for point in points]
    answer = tag("p", "Its answer: ", version["answer"], class_="quiet", dir="auto") if version["answer"] else None
    return tag("section", tag("h3", version["label"]), tag("dl", lines, class_="heat"), answer)


def _line(point: str, tokens: Sequence[Row], rows: Sequence[Row]) -> Markup:
    best: dict[int, Row] = {}
    for row in rows:
        if row["normalised"] > best.get(row["token_index"], {"normalised": 0.0})["normalised"]:
            best[row["token_index"]] = row
    drawn = [_token(token, best.get(token["index"])) for token in tokens]
    return tag("div", tag("dt", point), tag("dd", drawn, dir="auto"))


def _token(token: Row, row: Row | None) -> list[Any]:
    gap = " " if token["text"].startswith(" ") else ""
    if row is None:
        return [gap, tag("span", visible(token["text"]))]
    told = f"{row['normalised']:.2f} {row['explanation'] or row['neuron_id']}"
    strength = min(row["normalised"], 1.0)
    return [gap, tag("mark", visible(token["text"]), style=f"--strength:{strength:.3f}", title=told)]


def _concepts(rows: Sequence[Row], labels: list[str]) -> Markup:
    """A row per hook point and concept, a column per version: the strongest activation and on how many tokens."""
    drawn = []
    for start in range(0, len(rows), len(labels)):
        part = rows[start : start + len(labels)]
        name = part[0]["concept"]
        cells = [[strength_bar(row["max"]), f" on {row['n_tokens']}" if row["n_tokens"] else " silent"] for row in part]
        drawn.append([part[0]["hook_point"], title(name) if "/" not in name else name, *cells])
    caption = "The strongest normalised activation of each concept, and on how many tokens it fires"
    return table(caption, ["Hook point", "Concept", *labels], drawn)


def _drops(rows: Sequence[Row], labels: list[str]) -> Markup | None:
    if len(labels) < 2:
        return None
    found = [row for row in drops(rows, labels) if row["domains"]]
    shown = [
        [
            neuron_button(row["neuron_id"], row["explanation"] or "not explained"),
            domain_chips(row["domains"]),
            row["label"],
            number(row["in_reference"]),
            number(row["in_version"]),
            f"{number(row['drop'])}, {row['change']}",
        ]
        for row in found[:MAX_DROPS]
    ]
    more = f", the largest {MAX_DROPS} of {len(found):,}" if len(found) > MAX_DROPS else ""
    heads = ["Neuron", "Domains", "Version", f"In {labels[0]}", "There", "Drop"]
    return table(f"What is weaker or missing in a version than in {labels[0]}{more}", heads, shown)


def graph_html(graph: Graph) -> Markup:
    """An attribution graph as a picture, and as a table for who does not see it."""
    rows = []
    for edge in graph.edges:
        if edge.child == 0:
            node = graph.nodes[edge.parent]
            text = node.hit.explanation or "not explained"
            rows.append([number(edge.attribution), neuron_button(node.hit.neuron_id, text), visible(node.token)])
    picture = tag("div", Markup(svg(graph)), class_="wide picture", tabindex="0", role="group", aria_label="The graph")
    child = f"What leads to {graph.child.hit.neuron_id} on “{visible(graph.child.token)}”"
    return tag("article", picture, table(child, ["Attribution", "Neuron", "Token"], rows), class_="result")
