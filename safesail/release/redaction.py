"""What the open data set shows of a text: a few words, with every word of the taxonomy cut to its first letter."""

import re
from typing import Any

from safesail.taxonomy import Taxonomy

__all__ = ["redacted", "snippets_of"]

Row = dict[str, Any]
_LONGEST_WORD = 24
"""Of a script without spaces a longer run is a clause, which a snippet must not show whole."""


def redacted(text: str, taxonomy: Taxonomy) -> str:
    """The text with every word of the taxonomy's word lists cut to its first letter, for the open data set."""
    for domain in taxonomy.domains:
        text = taxonomy.about(domain.id).sub(lambda found: _masked(found.group(0)), text)
    return text


def snippets_of(examples: list[Row], taxonomy: Taxonomy) -> dict[str, str]:
    """{neuron id: a few redacted words around its strongest explain-half peak, the peak's own word masked too}."""
    snippets: dict[str, str] = {}
    for row in examples:
        if row["neuron_id"] not in snippets and row["half"] == "explain" and row["rank"] == 0:
            snippets[row["neuron_id"]] = _snippet(row["tokens"], row["peak"], taxonomy)
    return snippets


def _snippet(tokens: list[str], peak: int, taxonomy: Taxonomy) -> str:
    """Whole words only: a context may begin and end inside a word, so its first and last words are left out."""
    text, before = "".join(tokens), "".join(tokens[:peak])
    blank = len(tokens[peak]) - len(tokens[peak].lstrip())
    at = max(len(text[: len(before) + blank + 1].split()) - 1, 0)  # the number of the peak's word
    words = redacted(text, taxonomy).split()  # masking keeps the white space, so the numbers stay
    if not words:
        return ""
    at = min(at, len(words) - 1)
    words[at] = _masked(words[at])
    shown = [*words[max(at - 4, 1) : at], words[at], *words[at + 1 : min(at + 4, len(words) - 1)]]
    return " ".join(["…", *(word if len(word) <= _LONGEST_WORD else _masked(word) for word in shown), "…"])


def _masked(words: str) -> str:
    return re.sub(r"(\w)[\w*]*", r"\1***", words)  # what is masked already stays as it is
