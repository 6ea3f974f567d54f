"""Formatting for the page: tokens, neurons and sentences as plain values. Pure functions; nothing here knows gradio.

Whatever comes from a prompt, an answer or an explanation is shown as text: `strip` gives strings that the page sets as
text nodes, `headline` escapes, and the tables are of strings.
"""

import re
import unicodedata
from html import escape
from typing import Any

from safesail.diagnosis.inspector import Hit, Inspection
from safesail.neurons import strength

__all__ = [
    "FOUND",
    "NEURONS",
    "count_line",
    "found_rows",
    "headline",
    "hit_rows",
    "strip",
    "strongest",
    "title",
    "waiting",
]

SCORE = "Score (95 % interval)"
NEURONS = ["Activation", "Explanation", "Domains", SCORE, "Neuron", "Hook point", "Explainer", "Simulator"]
FOUND = [SCORE, "Explanation", "Domains", "Category", "Concept", "Firing rate", "Neuron", "Hook point"]
MAX_ROWS = 100
STRONG = 0.5
"""From this strength on the number stands under its token."""

_SIGNS = {"\n": "⏎", "\r": "␍", "\t": "⇥", " ": "␣"}
_NAMES = {"\n": "line break", "\r": "carriage return", "\t": "tab", " ": "space"}
Row = list[str]


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


def hit_rows(hits: list[Hit]) -> list[Row]:
    """The rows of the neurons table, in the columns of NEURONS."""
    return [
        [
            _number(hit.normalised),
            _explanation(hit.explanation, hit.status),
            _domains(hit.domains),
            _score(hit.score, hit.low, hit.high, hit.trust),
            hit.neuron_id,
            hit.hook_point,
            hit.explainer or "–",
            hit.simulator or "–",
        ]
        for hit in hits[:MAX_ROWS]
    ]


def headline(inspection: Inspection, index: int, hits: list[Hit], strongest_of_domains: float) -> str:
    """HTML above the table: which token it is, what the SAEs miss of it, and why there are no neurons if so."""
    unit = inspection.units[index]
    place = "answer" if inspection.is_answer(index) else "prompt"
    sentences = [f"<strong>Token {index + 1} <code>{escape(_visible(unit.text))}</code></strong> of the {place}."]
    if note := inspection.note(index):
        return f"{sentences[0]} {escape(note)} It has no neurons."
    sentences.append(f"Strength {strongest_of_domains:.2f}.")
    missed = (
        f"{escape(name)} {float(error[unit.start : unit.end].mean()):.0%}" for name, error in inspection.error.items()
    )
    sentences.append(f"Share of the activation that the SAE misses: {', '.join(missed)}.")
    if not hits:
        sentences.append("No neuron with an explanation fires here; untick the box below to see the others.")
    elif len(hits) > MAX_ROWS:
        sentences.append(f"The strongest {MAX_ROWS} of {len(hits):,} neurons:")
    return " ".join(sentences)


def found_rows(rows: list[dict[str, Any]]) -> list[Row]:
    """The rows of the search table, in the columns of FOUND."""
    return [
        [
            _score(row["score"], row.get("score_low"), row.get("score_high"), strength(row["score"])),
            _explanation(row["explanation"], row.get("status") or ""),
            _domains(row["domains"]),
            title(row["category"] or "") or "–",
            row["concept"] or "–",
            "–" if row["firing_rate"] is None else f"{row['firing_rate']:.2%}",
            row["neuron_id"],
            row["hook_point"],
        ]
        for row in rows[:MAX_ROWS]
    ]


def count_line(n: int) -> str:
    """How many neurons a search found, and how many of them are shown."""
    if n == 0:
        return "No neuron matches; try fewer words or a lower score."
    shown = f", the best {MAX_ROWS} shown" if n > MAX_ROWS else ""
    return f"{n:,} neuron{'' if n == 1 else 's'}{shown}, best score first."


def title(slug: str) -> str:
    """`sexual-health` as `Sexual health`."""
    return slug.replace("-", " ").capitalize()


def _token(inspection: Inspection, index: int, value: float) -> dict[str, Any]:
    unit = inspection.units[index]
    words = [f"token {index + 1} {_spoken(unit.text)}", "special token" if unit.special else f"strength {value:.2f}"]
    return {
        "text": _visible(unit.text),
        "label": " ".join(words),
        "strength": round(min(max(value, 0.0), 1.0), 3),
        "value": f"{value:.2f}" if value >= STRONG else "",
        "special": unit.special,
        "gap": bool(re.match(r" \S", unit.text)),
        "blank": _is_blank(unit.text),
        "ends_line": "\n" in unit.text,
    }


def _visible(text: str) -> str:
    """The text with every blank character as a sign; the one space before a word is left to the layout."""
    if _is_blank(text):
        return "".join(_SIGNS.get(char) or f"U+{ord(char):04X}" for char in text)
    if re.match(r" \S", text):
        text = text[1:]
    return re.sub(r"[\n\r\t]|^ +| +$", lambda found: "".join(_SIGNS[char] for char in found.group()), text)


def _spoken(text: str) -> str:
    """The text in quotes, or the names of its blank characters."""
    if text and _is_blank(text):
        return ", ".join(_NAMES.get(char) or unicodedata.name(char, f"U+{ord(char):04X}").lower() for char in text)
    return f"'{text}'"


def _is_blank(text: str) -> bool:
    """Whether nothing of the text would be seen: white space, controls, joiners, variation selectors."""
    return all(char.isspace() or not char.isprintable() or "\ufe00" <= char <= "\ufe0f" for char in text)


def _explanation(explanation: str | None, status: str) -> str:
    if explanation:
        return explanation
    return f"none ({status})" if status and status != "ok" else "not explained"


def _domains(domains: list[str]) -> str:
    return ", ".join(map(title, domains)) or "–"


def _score(score: float | None, low: float | None, high: float | None, word: str) -> str:
    if score is None:
        return word
    interval = f" ({_number(low)} to {_number(high)})" if low is not None and high is not None else ""
    return f"{_number(score)}{interval}, {word}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}".replace("-", "−")
