"""The words that carry a neuron: whole words at the strongest peaks, put together from readable units."""

import re
from collections import defaultdict
from typing import Any

__all__ = ["strongest_words"]

Row = dict[str, Any]


def strongest_words(examples: list[Row], n: int) -> list[str]:
    """The distinct whole words at the strongest peaks, by summed activation."""
    weights: dict[str, float] = defaultdict(float)
    for row in examples:
        if row["stratum"] != "top":
            continue
        word = _word_at(row["tokens"], row["peak"])
        if word:
            weights[word.lower() if not word.isupper() else word] += row["activation"]
    return sorted(weights, key=lambda word: (-weights[word], word))[:n]


def _word_at(tokens: list[str], peak: int) -> str:
    """The whole word that the token at `peak` is part of: tokens up to the next one that begins with a non-letter."""
    first = peak
    while first > 0 and re.match(r"\w", tokens[first]) and re.search(r"\w$", tokens[first - 1]):
        first -= 1
    last = peak
    while last + 1 < len(tokens) and re.match(r"\w", tokens[last + 1]) and re.search(r"\w$", tokens[last]):
        last += 1
    return "".join(tokens[first : last + 1]).strip()
