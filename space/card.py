"""A neuron's card: what is said of it, how far to trust that, and when it fires. Pure functions over the database."""

from typing import Any

from charts import columns, number, percent
from markup import Markup, joined, tag
from view import domain_chips, neuron_link, score_words, title, visible

from safesail.diagnosis.inspector import Promoted
from safesail.examples import Example
from safesail.neurons import NeuronDatabase, strength

__all__ = ["card", "examples_list"]

Row = dict[str, Any]
MAX_TOP, MAX_PER_LEVEL, MAX_NEAR_MISSES = 12, 2, 5
_QUANTILES = (("p50", "50 %"), ("p90", "90 %"), ("p99", "99 %"), ("p999", "99.9 %"), ("p9999", "99.99 %"))


def card(database: NeuronDatabase, neuron_id: str, language: str, promoted: list[Promoted], *, linked: bool) -> Markup:
    """The card of a neuron, also of one without a row; `linked`: with a link that opens it on a page of its own."""
    row, statistics = database.neurons.get(neuron_id, {}), database.quantiles.get(neuron_id, {})
    parts = [
        _heading(database, neuron_id, row, language, linked),
        _facts(row, statistics),
        _explanations(database, neuron_id),
        _scores(database.scores.get(neuron_id, [])),
        _histogram(statistics),
        _choice(row),
        _logit_lens(promoted),
    ]
    return tag("article", parts, class_="card", aria_label=f"Neuron {neuron_id}", data_neuron=neuron_id)


def _heading(database: NeuronDatabase, neuron_id: str, row: Row, language: str, linked: bool) -> Markup:
    said = database.said(neuron_id, language)
    text = said.explanation or ("Not explained" if row else "A neuron without an explanation")
    link = tag("a", "Link to this neuron" if not linked else "Open in Neurons", href=neuron_link(neuron_id))
    return joined(
        tag("h2", text, dir="auto", tabindex="-1", data_focus=True),
        tag("p", tag("code", neuron_id), " ", domain_chips(row.get("domains") or []) if row else None, " ", link),
        _why_not(row, said.language, said.status, language, bool(said.explanation)),
    )


def _why_not(row: Row, said_in: str, status: str, asked: str, there_is_one: bool) -> Markup | None:
    """Why the explanation is not there, or not in the language that was asked for."""
    if not row:
        sentence = (
            "It was not among the latents that were explained: it did not tell the concept pairs apart. What is known "
            "of it are its statistics and the tokens on which it fires."
        )
    elif not there_is_one:
        sentence = f"There is no explanation of it in any language (status: {status or 'unknown'})."
    elif asked and said_in != asked:
        sentence = f"There is no explanation in {asked} ({status}); this one is in {said_in}."
    else:
        return None
    return tag("p", sentence, class_="note")


def _facts(row: Row, statistics: Row) -> Markup:
    scored = score_words(row["score"], row["score_low"], row["score_high"], strength(row["score"])) if row else ""
    rate, shown_as_1 = statistics.get("firing_rate"), statistics.get("normaliser")
    facts = [
        ("Score", scored or "unexplained"),
        ("Lexical baseline", number(row.get("lexical_score"))),
        ("Category and concept", " · ".join(filter(None, [title(row.get("category") or ""), row.get("concept")]))),
        ("Fires on", f"{percent(rate)} of the corpus's tokens" if rate is not None else ""),
        ("Shown as 1", f"an activation of {number(shown_as_1)}" if shown_as_1 else ""),
        ("Highest activation", number(statistics.get("max"))),
        ("Redacted example", row.get("snippet") or ""),
    ]
    return tag("dl", [_fact(name, value) for name, value in facts if value and value != "–"])


def _fact(name: str, value: Any) -> Markup:
    return tag("div", tag("dt", name), tag("dd", value, dir="auto"))


def _explanations(database: NeuronDatabase, neuron_id: str) -> Markup | None:
    """What every language says; nothing where there is only one."""
    spoken = database.explanations.get(neuron_id, {})
    if len(spoken) < 2:
        return None
    items = [
        tag("li", tag("strong", name, " "), _said(spoken[name], name)) for name in database.languages if name in spoken
    ]
    return tag("section", tag("h3", "Explanations"), tag("ul", items))


def _said(explanation: Row, language: str) -> Markup:
    text = explanation["explanation"] or f"none ({explanation['status']})"
    return tag("span", text, dir="auto", lang=language if explanation["explanation"] else None)


def _scores(scores: list[Row]) -> Markup | None:
    """Every score by every method, in a table that opens on demand."""
    if not scores:
        return None
    heads = ["Method", "Language", "Score (95 % interval)", "AUROC", "Units"]
    rows = [
        tag(
            "tr",
            tag("td", f"{row['method']} ({row['simulator']})" if row["simulator"] else row["method"]),
            tag("td", row["language"] or "any"),
            tag("td", score_words(row["score"], row["low"], row["high"], _outcome(row))),
            tag("td", number(row["auroc"])),
            tag("td", f"{row['n_units']:,}" if row["n_units"] is not None else "–"),
        )
        for row in scores
    ]
    table = tag(
        "table",
        tag("thead", tag("tr", [tag("th", head, scope="col") for head in heads])),
        tag("tbody", rows),
    )
    summary = f"Scores by every method ({len(scores)})"
    return tag("details", tag("summary", summary), tag("div", table, class_="wide", tabindex="0", role="group"))


def _outcome(row: Row) -> str:
    return strength(row["score"]) if row["status"] == "ok" else row["status"]


def _histogram(statistics: Row) -> Markup | None:
    """The activations of the neuron where it fires, by tenths of its normaliser, and its quantiles."""
    counts, shown_as_1 = statistics.get("histogram"), statistics.get("normaliser")
    if not counts or not shown_as_1:
        return None
    rows = [(_tenth(i, len(counts)), count) for i, count in enumerate(counts)]
    quantiles = ", ".join(
        f"{name}: {number(statistics[key])}" for key, name in _QUANTILES if statistics.get(key) is not None
    )
    tokens = f"Of {statistics['n_tokens']:,} tokens. " if statistics.get("n_tokens") else ""
    return columns(
        "How strongly it fires, in normalised activation", rows, f"{tokens}Quantiles of the activation: {quantiles}."
    )


def _tenth(i: int, n: int) -> str:
    return f"{i / n:.1f}" if i < n - 1 else f"{i / n:.1f}+"


def _choice(row: Row) -> Markup | None:
    """How the neuron came to be explained, and by whom."""
    if not row:
        return None
    told = []
    if row.get("candidate_for"):
        domains = ", ".join(title(domain) for domain in row["candidate_for"])
        pairs = f" (fires on the query with the concept only in {row['n_wins']} pairs" if row.get("n_wins") else ""
        chance = f"; q = {row['q_value']:.3g})" if pairs and row.get("q_value") is not None else ")" if pairs else ""
        told.append(f"Chosen by concept pairs about {domains}{pairs}{chance}.")
    for name, key in (("Explained by", "explainer"), ("Tagged by", "tagger"), ("Scored by", "simulator")):
        if row.get(key):
            told.append(f"{name} {row[key]}.")
    return tag("p", " ".join(told), class_="quiet") if told else None


def _logit_lens(promoted: list[Promoted]) -> Markup | None:
    if not promoted:
        return None
    tokens = [tag("code", visible(token.text)) for token in promoted]
    separated = [part for token in tokens for part in (token, " ")]
    return tag(
        "details",
        tag("summary", "Tokens that its direction raises directly"),
        tag("p", separated),
        tag(
            "p",
            "Its decoder row through the unembedding alone; of an early layer that says little.",
            class_="quiet",
        ),
    )


# --- examples -----------------------------------------------------------------------------------------------------


def examples_list(examples: list[Example], normaliser: float | None) -> Markup:
    """Contexts in which a neuron fires, strongest first, then some of every level, then near-misses."""
    if not examples:
        sentence = "No examples were collected for this neuron: it was not among those that were explained."
        return tag("p", sentence, tabindex="-1", data_focus=True)
    top = [example for example in examples if example.stratum == "top"][:MAX_TOP]
    levels = sorted({e.stratum for e in examples if e.stratum.startswith("level")}, key=_level, reverse=True)
    graded = [e for name in levels for e in [x for x in examples if x.stratum == name][:MAX_PER_LEVEL]]
    misses = [example for example in examples if example.stratum == "near-miss"][:MAX_NEAR_MISSES]
    groups = joined(
        _group("Where it fires most", top, normaliser),
        _group("Over its levels, from strong to weak", graded, normaliser),
        _group("Near-misses: they hold a word it fires on elsewhere, and it is silent", misses, normaliser),
    )
    return joined(tag("h3", "Examples", tabindex="-1", data_focus=True), groups)


def _level(stratum: str) -> int:
    digits = stratum.rpartition("-")[2]
    return int(digits) if digits.isdecimal() else 0


def _group(heading: str, examples: list[Example], normaliser: float | None) -> Markup | None:
    if not examples:
        return None
    items = [
        tag("li", tag("p", _tokens(example, normaliser), dir="auto"), tag("p", example.source, class_="quiet"))
        for example in examples
    ]
    return tag("section", tag("h4", heading), tag("ol", items, class_="examples"))


def _tokens(example: Example, normaliser: float | None) -> list[Any]:
    """The tokens, those that fire marked by how strongly; the strongest with its number."""
    peak = max(example.activations, default=0.0)
    shown = []
    for token, activation in zip(example.tokens, example.activations, strict=True):
        if activation <= 0 or not normaliser:
            shown.append(token)
            continue
        share = activation / normaliser
        gap = " " if token.startswith(" ") else None
        mark = tag("mark", visible(token), style=f"--strength:{min(share, 1):.3f}", title=f"{share:.2f}")
        shown += [gap, mark, tag("sub", number(share)) if activation == peak else None]
    return shown
