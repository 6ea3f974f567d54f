"""Interventions as HTML: the two answers side by side, the next tokens, and how often prompts are declined."""

from typing import Any

from charts import number, percent
from markup import Markup, tag
from results import note, result_html, table
from view import visible

from safesail.diagnosis.interventions import CAVEAT
from safesail.diagnosis.results import Result

__all__ = ["answers_html", "rates_html"]

Row = dict[str, Any]


def answers_html(result: Result) -> Markup:
    """A result of `answers_under` on one prompt."""
    (row,) = result.rows
    equal, longest = row["n_equal_ids"], max(len(row["ids_unchanged"]), len(row["ids_changed"]))
    same = "The answer is the same, token by token." if equal == longest else f"The same tokens at the start: {equal}."
    answers = tag(
        "div",
        _answer("Unchanged", row["answer_unchanged"], row["declines_unchanged"]),
        _answer("Changed", row["answer_changed"], row["declines_changed"]),
        class_="sides",
    )
    return result_html(result, answers, tag("p", same), _next_tokens(row["next_tokens"]), note(CAVEAT))


def _answer(heading: str, text: str, declines: bool) -> Markup:
    said = tag("p", "It declines.", class_="quiet") if declines else None
    return tag("section", tag("h2", heading), tag("p", text, dir="auto", class_="answer"), said)


def _next_tokens(tokens: list[Row]) -> Markup:
    rows = [
        [
            tag("code", visible(token["text"])),
            percent(token["probability_unchanged"]),
            percent(token["probability_changed"]),
            number(token["log_probability_changed"] - token["log_probability_unchanged"]),
        ]
        for token in tokens
    ]
    heads = ["Token", "Unchanged", "Changed", "Change of the log-probability"]
    return table("The tokens right after the prompt whose probability moves most", heads, rows)


def rates_html(result: Result) -> Markup:
    """A result of `declining_change` on a list of prompts."""
    sides = ("unchanged", "changed")
    rows = [
        [visible(row["prompt"]), *(_said(row[f"answer_{side}"], row[f"declines_{side}"]) for side in sides)]
        for row in result.rows
    ]
    answers = table("Every prompt", ["Prompt", "Unchanged", "Changed"], rows)
    return result_html(result, tag("p", result.facts["declining"]["sentence"]), answers, note(CAVEAT))


def _said(answer: str, declines: bool) -> str:
    return f"[declines] {answer}" if declines else answer
