"""Formatting of an inspection: its tokens, the neurons that fire on one, and where one neuron fires. Pure functions.

Whatever comes from a prompt, an answer or an explanation is shown as text: `strip` gives strings that the page sets as
text nodes, all else is `markup`, which escapes.
"""

import re
import unicodedata
from typing import Any
from urllib.parse import quote, urlencode

from charts import number
from markup import Markup, joined, tag

from safesail.diagnosis.inspection import Firing, Hit, Inspection

__all__ = [
    "MAX_ROWS",
    "domain_chips",
    "firings",
    "headline",
    "hit_table",
    "inspection_link",
    "neuron_button",
    "neuron_link",
    "score_cell",
    "score_words",
    "strength_bar",
    "strip",
    "strongest",
    "title",
    "visible",
    "waiting",
]

MAX_ROWS = 100
STRONG = 0.5
"""From this strength on the number stands under its token."""
MAX_PLACES = 24
"""Places shown of where a neuron fires."""

_SIGNS = {"\n": "⏎", "\r": "␍", "\t": "⇥", " ": "␣"}
_NAMES = {"\n": "line break", "\r": "carriage return", "\t": "tab", " ": "space"}


def strip(inspection: Inspection, strengths: list[float], selected: int) -> dict[str, Any]:
    """The token strip's value: a section for the prompt, one for the answer, and which token is selected."""
    tokens = [_token(inspection, i, value) for i, value in enumerate(strengths)]
    n_prompt = sum(not inspection.is_answer(i) for i in range(len(tokens)))
    sections = [
        {"name": name, "first": first, "tokens": part}
        for name, first, part in (("Prompt", 0, tokens[:n_prompt]), ("Answer", n_prompt, tokens[n_prompt:]))
        if part
    ]
    return {"sections": sections, "selected": selected}


def waiting(sentence: str) -> dict[str, Any]:
    """The token strip's value while there are no tokens to show."""
    return {"message": sentence}


def strongest(inspection: Inspection, strengths: list[float]) -> int:
    """The token to select first: the strongest, else the first that has neurons at all."""
    counted = (i for i in range(len(strengths)) if not inspection.note(i))
    return max(range(len(strengths)), key=strengths.__getitem__) if any(strengths) else next(counted, 0)


# --- the selected token -------------------------------------------------------------------------------------------


def headline(inspection: Inspection, index: int, strength: float, link: str) -> Markup:
    """Which token it is, what the SAEs miss of it, and why it has no neurons if so."""
    unit = inspection.units[index]
    place = "answer" if inspection.is_answer(index) else "prompt"
    which = [tag("strong", f"Token {index + 1} ", tag("code", visible(unit.text))), f" of the {place}. "]
    share = tag("a", "Link to this token", href=link)
    if note := inspection.note(index):
        return joined(*which, note, " It has no neurons. ", share)
    missed = ", ".join(
        f"{name} {float(error[unit.start : unit.end].mean()):.0%}" for name, error in inspection.error.items()
    )
    return joined(*which, f"Strength {strength:.2f}. Share of the activation that the SAE misses: {missed}. ", share)


def hit_table(inspection: Inspection, index: int, hits: list[Hit], language: str, why_none: str) -> Markup:
    """The neurons that fire on a token, strongest first, each with a button that opens its card."""
    if not hits:
        return tag("p", why_none)
    rows = [_hit_row(inspection, hit, language) for hit in hits[:MAX_ROWS]]
    more = f", the strongest {MAX_ROWS} of {len(hits):,}" if len(hits) > MAX_ROWS else ""
    heads = ["Activation", "Explanation", "Domains", "Score (95 % interval)"]
    return tag(
        "table",
        tag("caption", f"Neurons that fire on token {index + 1}{more}"),
        tag("thead", tag("tr", [tag("th", head, scope="col") for head in heads])),
        tag("tbody", rows),
        class_="neurons",
    )


def _hit_row(inspection: Inspection, hit: Hit, language: str) -> Markup:
    said = inspection.database.said(hit.neuron_id, language)
    text = said.explanation or _unexplained(inspection, hit)
    return tag(
        "tr",
        tag("td", strength_bar(hit.normalised), data_label="Activation"),
        tag("td", neuron_button(hit.neuron_id, text, _other_language(said.language, language)), class_="said"),
        tag("td", domain_chips(hit.domains), data_label="Domains"),
        tag("td", score_cell(hit.score, hit.low, hit.high, hit.trust), data_label="Score"),
    )


def neuron_button(neuron_id: str, text: str, language: str = "") -> Markup:
    """A button that opens a neuron's card, with the id under the text; `language`: where it differs from the asked."""
    note = tag("span", f" ({language})", class_="quiet") if language else None
    return tag(
        "button",
        tag("span", text, dir="auto", class_="text"),
        note,
        tag("span", neuron_id, class_="id"),
        type="button",
        class_="neuron",
        data_kind="neuron",
        data_value=neuron_id,
    )


def strength_bar(normalised: float | None) -> Markup:
    """A normalised activation as a number, with a bar behind it that is full from 1 on."""
    share = min(max(normalised or 0.0, 0.0), 1.0)
    return tag("span", number(normalised), class_="strength", style=f"--strength:{share:.3f}")


def domain_chips(domains: list[str]) -> Markup:
    """The domains as small labels."""
    return joined([tag("span", title(domain), class_="chip", data_domain=domain) for domain in domains] or ["–"])


def _unexplained(inspection: Inspection, hit: Hit) -> str:
    """What stands where an explanation would: why there is none, and the tokens here on which the neuron fires."""
    why = f"not explained ({hit.status})" if hit.status not in ("", "ok") else "not explained"
    texts = [visible(inspection.units[firing.index].text) for firing in inspection.firings(hit.neuron_id)]
    return f"{why}; fires here on {', '.join(f'“{text}”' for text in list(dict.fromkeys(texts))[:5])}"


def _other_language(said: str, asked: str) -> str:
    return said if asked and said != asked else ""


# --- where a neuron fires -----------------------------------------------------------------------------------------


def firings(inspection: Inspection, neuron_id: str, found: list[Firing]) -> Markup:
    """Every place of the conversation where a neuron fires, in its context, each with a button that selects it."""
    if not found:
        return tag("p", "It fires nowhere in this conversation.")
    places = [tag("li", _place(inspection, firing)) for firing in found[:MAX_PLACES]]
    more = f", the strongest {MAX_PLACES} shown" if len(found) > MAX_PLACES else ""
    times = "once" if len(found) == 1 else f"on {len(found)} tokens"
    return tag(
        "section",
        tag("h2", f"In this conversation it fires {times}{more}"),
        tag("ol", places, class_="places"),
        aria_label=f"Where {neuron_id} fires in this conversation",
    )


def _place(inspection: Inspection, firing: Firing) -> Markup:
    i, units = firing.index, inspection.units
    before, here, after = _run_of(units[max(i - 4, 0) : i]), units[i].text, _run_of(units[i + 1 : i + 4])
    context = [before, " " if here.startswith(" ") else None, tag("mark", visible(here)), after]
    button = tag("button", f"Token {i + 1}", type="button", data_kind="token", data_value=str(i))
    return joined(strength_bar(firing.normalised), " ", button, " ", tag("span", context, dir="auto", class_="context"))


def _run_of(units: list[Any]) -> str:
    return "".join(" " + visible(unit.text) if unit.text.startswith(" ") else visible(unit.text) for unit in units)


# --- links --------------------------------------------------------------------------------------------------------


def neuron_link(neuron_id: str) -> str:
    """The part of an address after which this page shows a neuron."""
    return f"#/neuron/{quote(neuron_id)}"


def inspection_link(asked: dict[str, Any], token: int) -> str:
    """The part of an address that asks for an inspection again; a browser does not send it to any server."""
    return f"#/inspect?{urlencode({**asked, 'token': token + 1}, quote_via=quote)}"


# --- words --------------------------------------------------------------------------------------------------------


def title(slug: str) -> str:
    """`sexual-health` as `Sexual health`."""
    return slug.replace("-", " ").capitalize()


def score_words(score: float | None, low: float | None, high: float | None, word: str) -> str:
    """A score with its interval and the plain word for it."""
    if score is None:
        return word
    interval = f" ({number(low)} to {number(high)})" if low is not None and high is not None else ""
    return f"{number(score)}{interval}, {word}"


def score_cell(score: float | None, low: float | None, high: float | None, word: str) -> Markup:
    """The same for a table: the interval under the score."""
    if score is None:
        return tag("span", word)
    interval = f"{number(low)} to {number(high)}" if low is not None and high is not None else ""
    return joined(tag("span", f"{number(score)}, {word}"), " ", tag("span", interval, class_="interval"))


def visible(text: str) -> str:
    """The text with every blank character as a sign; the one space before a word is left to the layout."""
    if _is_blank(text):
        return "".join(_SIGNS.get(char) or f"U+{ord(char):04X}" for char in text)
    if re.match(r" \S", text):
        text = text[1:]
    return re.sub(r"[\n\r\t]|^ +| +$", lambda found: "".join(_SIGNS[char] for char in found.group()), text)


def _token(inspection: Inspection, index: int, value: float) -> dict[str, Any]:
    unit = inspection.units[index]
    words = [f"token {index + 1} {_spoken(unit.text)}", "special token" if unit.special else f"strength {value:.2f}"]
    return {
        "text": visible(unit.text),
        "label": " ".join(words),
        "strength": round(min(max(value, 0.0), 1.0), 3),
        "value": f"{value:.2f}" if value >= STRONG else "",
        "special": unit.special,
        "gap": bool(re.match(r" \S", unit.text)),
        "blank": _is_blank(unit.text),
        "ends_line": "\n" in unit.text,
    }


def _spoken(text: str) -> str:
    """The text in quotes, or the names of its blank characters."""
    if text and _is_blank(text):
        return ", ".join(_NAMES.get(char) or unicodedata.name(char, f"U+{ord(char):04X}").lower() for char in text)
    return f"'{text}'"


def _is_blank(text: str) -> bool:
    """Whether nothing of the text would be seen: white space, controls, joiners, variation selectors."""
    return all(char.isspace() or not char.isprintable() or "\ufe00" <= char <= "\ufe0f" for char in text)
