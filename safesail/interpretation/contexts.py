"""The text around a row of the harvest in whole characters, byte for byte as it was."""

from itertools import groupby
from typing import Any, NamedTuple

from safesail.lm.activations import Activations
from safesail.lm.tokens import Span, spans, token_bytes

__all__ = ["Context", "Contexts", "whole_units"]

_MARGIN = 12  # tokens read on either side of a context, so that the characters at its ends can be seen whole


class Context(NamedTuple):
    """A stretch of a piece: readable units and which of them the row in question is in."""

    piece: int
    units: list[Span]
    """Their `start` and `end` count from the piece's first token."""
    at: int

    @property
    def text(self) -> str:
        return "".join(unit.text for unit in self.units)


class Contexts:
    """Contexts of so many tokens before and after a row, more where a character would be cut."""

    def __init__(self, activations: Activations, tokenizer: Any, before: int, after: int) -> None:
        self.before, self.after = before, after
        self._activations, self._tokenizer = activations, tokenizer

    def around(self, row: int) -> Context | None:
        """The context of a row; None where the row is a part of a character that the piece itself cuts."""
        piece = int(self._activations.piece_of_row[row])
        token = row - int(self._activations.row_start[piece])
        low, high = token - self.before, token + self.after + 1
        first = max(low - _MARGIN, 0)
        read = whole_units(self._tokenizer, self._activations.piece_ids[piece][first : high + _MARGIN])
        near = [unit for unit in read if unit.end + first > low and unit.start + first < high]
        units = [unit._replace(start=unit.start + first, end=unit.end + first) for unit in near]
        at = [i for i, unit in enumerate(units) if unit.start <= token < unit.end]
        return Context(piece, units, at[0]) if at else None


def whole_units(tokenizer: Any, ids: list[int]) -> list[Span]:
    """The readable units of consecutive tokens, without the parts of characters that are cut at either end.

    Tokens that hold the end of one character and the beginning of the next make one unit, however many they are.
    """
    read = spans(tokenizer, ids)
    if not any("\ufffd" in unit.text for unit in read):
        return read
    pieces, units = token_bytes(tokenizer, ids), []  # a corpus may hold the replacement sign itself: bytes decide
    for broken, group in groupby(read, key=lambda unit: not _is_text(pieces[unit.start : unit.end])):
        members = list(group)
        units += _mended(pieces, members[0].start, members[-1].end) if broken else members
    return units


def _mended(pieces: list[bytes], start: int, end: int) -> list[Span]:
    """The longest run of the tokens that is valid text, cut only at the very ends; none if there is none."""
    starts = range(start, end) if start == 0 else (start,)
    for first in starts:
        for last in range(end, first, -1) if end == len(pieces) else (end,):
            if _is_text(pieces[first:last]):
                return [Span(b"".join(pieces[first:last]).decode(), first, last, False)]
    if start == 0 or end == len(pieces):
        return []
    return [Span(b"".join(pieces[start:end]).decode(errors="replace"), start, end, False)]


def _is_text(pieces: list[bytes]) -> bool:
    try:
        b"".join(pieces).decode()
    except UnicodeDecodeError:
        return False
    return True
