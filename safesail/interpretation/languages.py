"""The languages of explanations: what an explainer is told to call them, and how their writing is recognised."""

import re

__all__ = ["is_written_in", "language_name"]

_NAMES = {"en": "English", "zh": "Chinese", "hi": "Hindi"}
_LETTERS = {
    "en": re.compile(r"[A-Za-z]"),
    "zh": re.compile(r"[\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"),
    "hi": re.compile(r"[\u0900-\u097f]"),
}


def language_name(code: str) -> str:
    """The language in English words: `Hindi` for hi, `Chinese (zh-Hant)` for a variant, else the code in words."""
    name = _NAMES.get(_base(code), "the language with this code")
    return name if _base(code) == code else f"{name} ({code})"


def is_written_in(text: str, code: str) -> bool:
    """Whether one of the text's letters is of the language's script; also when it has none, or the script is not known.

    Quotations in other scripts are no objection: explanations quote the words that they explain.
    """
    letters = _LETTERS.get(_base(code))
    return letters is None or letters.search(text) is not None or not any(map(str.isalpha, text))


def _base(code: str) -> str:
    return code.partition("-")[0]
