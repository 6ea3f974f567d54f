"""The segment ends on which a latent is strongest, with the text that led up to each."""

import unicodedata
from collections.abc import Callable, Iterator
from functools import lru_cache
from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
from torch import Tensor

from safesail.interpretation.contexts import whole_units
from safesail.reward_recipe import SalienceSection
from safesail.rewards.ends import Ends
from safesail.rewards.preferences import SIDES
from safesail.rewards.texts import Text

__all__ = ["CONTEXTS_SCHEMA", "Around", "Contexts", "Strongest", "contexts_of", "token_class", "why_not_rated"]

Row = dict[str, Any]
CONTEXTS_SCHEMA = pa.schema(
    [
        ("latent", pa.int64()),
        ("rank", pa.int32()),
        ("pair_id", pa.string()),
        ("side", pa.string()),
        ("position", pa.int32()),
        ("activation", pa.float32()),
        ("before", pa.string()),
        ("token", pa.string()),
        ("after", pa.string()),
        ("n_own", pa.int32()),
        ("token_class", pa.string()),
    ]
)
"""`rank` counts the contexts of a latent from the strongest one, 0, on; the last `n_own` characters of `before` are of
the turn in which the end stands."""
CANDIDATES_PER_CONTEXT = 4
"""So many strongest ends are kept per context that is wanted, as some have the same context."""
_AFTER = 8  # tokens shown after the end
_MARGIN = 12  # tokens read on either side of a context, so that the characters at its ends can be seen whole
_KEPT_TEXTS = 1024


class Strongest:
    """The strongest rows of each of some latents, at most one a text, found part by part.

    text: (n_rows,) the text of every row; of equally strong rows the first counts.
    """

    def __init__(self, text: Tensor, n_each: int) -> None:
        self._text, self._n_each = text.numpy(), n_each
        self._latents, self._values, self._rows = np.empty(0, np.int64), np.empty(0, np.float32), np.empty(0, np.int64)

    def add(self, latents: Tensor, values: Tensor, rows: Tensor) -> None:
        """Take entries in; all: (n,)."""
        given = (latents, values, rows)
        held = (self._latents, self._values, self._rows)
        columns = [np.concatenate([old, new.numpy()]) for old, new in zip(held, given, strict=True)]
        columns = self._one_a_text(columns)
        order = np.lexsort((columns[2], -columns[1], columns[0]))
        columns = [column[order] for column in columns]
        starts = np.searchsorted(columns[0], columns[0])
        best = np.arange(len(starts)) - starts < self._n_each
        self._latents, self._values, self._rows = (column[best] for column in columns)

    def of(self, latent: int) -> list[tuple[int, float]]:
        """The rows of a latent with their activations, strongest first."""
        low, high = np.searchsorted(self._latents, [latent, latent + 1])
        return list(zip(self._rows[low:high].tolist(), self._values[low:high].tolist(), strict=True))

    def _one_a_text(self, columns: list[Any]) -> list[Any]:
        latents, values, rows = columns
        texts = self._text[rows]
        order = np.lexsort((rows, -values, texts, latents))
        again = (np.diff(latents[order]) == 0) & (np.diff(texts[order]) == 0)
        first = order[np.append(True, ~again)[: len(order)]]
        return [column[first] for column in columns]


class Around(NamedTuple):
    """The text around an end, exact."""

    before: str
    token: str
    """What stands at the end: one token's text, or a character that several tokens make."""
    after: str
    n_own: int
    """How many characters of `before`, counted from its end, are of the turn in which the token stands."""


class Contexts:
    """The text around any row of the ends. read: gives the text of a preference's number and side."""

    def __init__(self, ends: Ends, tokenizer: Any, read: Callable[[int, str], Text], section: SalienceSection) -> None:
        self.ends, self._tokenizer, self._section = ends, tokenizer, section
        self._read = lru_cache(_KEPT_TEXTS)(read)

    def around(self, row: int) -> Around | None:
        """At most `context_tokens` tokens up to the end and some after it; None where the text cuts a character there.

        What comes after goes no further than the next special token.
        """
        text = self._read(int(self.ends.pair[row]), SIDES[int(self.ends.side[row])])
        end = int(self.ends.position[row])
        low, high = max(end + 1 - self._section.context_tokens, 0), end + 1 + _AFTER
        first = max(low - _MARGIN, 0)
        at = end - first
        units = whole_units(self._tokenizer, text.ids[first : high + _MARGIN])
        here = [unit for unit in units if unit.start <= at < unit.end]
        if not here:
            return None
        earlier = [unit for unit in units if low - first < unit.end <= here[0].start]
        inside = [unit for unit in earlier if unit.start >= text.answer.start - first]
        own = inside if end in text.answer else list(takewhile(lambda unit: not unit.special, reversed(earlier)))
        later = [unit for unit in units if here[0].end <= unit.start < high - first]
        after = [unit.text for unit in takewhile(lambda unit: not unit.special, later)]
        before = "".join(unit.text for unit in earlier)
        return Around(before, here[0].text, "".join(after), sum(len(unit.text) for unit in own))


def contexts_of(latent: int, found: list[tuple[int, float]], contexts: Contexts, n_contexts: int) -> list[Row]:
    """The contexts of a latent, strongest first; of equal ones, which the sides of a pair may share, the first.

    found: rows and activations, strongest first.
    """
    return [
        {
            "latent": latent,
            "rank": rank,
            "pair_id": contexts.ends.pair_ids[int(contexts.ends.pair[row])],
            "side": SIDES[int(contexts.ends.side[row])],
            "position": int(contexts.ends.position[row]),
            "activation": activation,
            **around._asdict(),
            "token_class": token_class(around.before, around.token),
        }
        for rank, (row, activation, around) in zip(range(n_contexts), _unlike(found, contexts), strict=False)
    ]


def _unlike(found: list[tuple[int, float]], contexts: Contexts) -> Iterator[tuple[int, float, Around]]:
    seen: set[tuple[str, str]] = set()
    for row, activation in found:
        around = contexts.around(row)
        if around and around[:2] not in seen:
            seen.add(around[:2])
            yield row, activation, around


def token_class(before: str, token: str) -> str:
    """What a context ends in: the end's token without blanks and punctuation, in small letters; where nothing is left
    of it, the word before it (in scripts without blanks all that stands between two of them)."""
    for word in (token, *reversed(before.split())):
        if bare := _bare(word):
            return bare
    return token.strip()


def _bare(word: str) -> str:
    """A word without the punctuation, symbols and blanks around it, in small letters."""
    inner = [i for i, character in enumerate(word) if unicodedata.category(character)[0] not in "PSZC"]
    return word[inner[0] : inner[-1] + 1].lower() if inner else ""


def why_not_rated(contexts: list[Row], section: SalienceSection) -> str | None:
    """Why a latent with these contexts is not rated; None where it is."""
    n_classes = len({row["token_class"] for row in contexts})
    if len(contexts) < section.min_contexts:
        return f"{len(contexts)} contexts, fewer than {section.min_contexts}"
    if section.max_token_classes is not None and n_classes > section.max_token_classes:
        return f"its contexts end in {n_classes} different tokens, more than {section.max_token_classes}"
    return None
