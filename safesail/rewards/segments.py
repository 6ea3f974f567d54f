"""Segment ends: the tokens at which a reward model has read a whole segment.

An end is the last token of a run of `. , ? ! ;`, their full-width forms, the danda or line breaks. Runs are sought in
the exact text and then traced to tokens, so `.\\n\\n` or `?!` is one end however it is tokenised; a point or comma with
a digit on either side (`3.14`, `1,000`) ends nothing. Nothing is inserted into the text: a marker token would take a
position and shift those of all tokens after it.
"""

import re
from collections.abc import Iterator
from typing import Any

from safesail.lm.tokens import Span, spans, special_ids
from safesail.reward_recipe import EndsSection
from safesail.rewards.texts import Text

__all__ = ["segment_ends"]

_RUN = re.compile("[.,?!;。，？！；।\n\r\u0085\u2028\u2029]+")


def segment_ends(tokenizer: Any, text: Text, section: EndsSection) -> list[int]:
    """The positions in `text.ids` at which segments end, ascending, at least one.

    The last token of the part is always an end. Where an end before it is closer than `min_distance`, that one gives
    way; elsewhere the later of two ends that are too close does.
    """
    part = _part(tokenizer, text, section)
    assert part, "a part without tokens has no end"
    if section.of == "tokens":
        return part
    kept: list[int] = []
    for end in _run_ends(tokenizer, text.ids, part):
        if not kept or end - kept[-1] >= section.min_distance:
            kept.append(end)
    if kept and part[-1] - kept[-1] < section.min_distance:
        kept.pop()
    return [*kept, part[-1]]


def _part(tokenizer: Any, text: Text, section: EndsSection) -> list[int]:
    """The positions that may be ends: the answer's tokens, or all that are not special."""
    if section.part == "answer":
        return list(text.answer)
    specials = set(special_ids(tokenizer))
    return [position for position, id in enumerate(text.ids) if id not in specials]


def _run_ends(tokenizer: Any, ids: list[int], part: list[int]) -> Iterator[int]:
    """The position of the last token of every run; no run goes across a special token."""
    for stretch in _stretches(part):
        units = spans(tokenizer, ids[stretch.start : stretch.stop])
        for last in _ends_of_units(units):
            yield stretch.start + units[last].end - 1


def _stretches(part: list[int]) -> Iterator[range]:
    """Ascending positions as ranges without gaps."""
    start = 0
    for i, position in enumerate(part):
        if i + 1 == len(part) or part[i + 1] != position + 1:
            yield range(part[start], position + 1)
            start = i + 1


def _ends_of_units(units: list[Span]) -> list[int]:
    """The numbers of the readable units that hold the last character of a run, ascending, each once."""
    owner = [number for number, unit in enumerate(units) for _ in unit.text]
    text = "".join(unit.text for unit in units)
    last = (owner[run.end() - 1] for run in _RUN.finditer(text) if not _is_in_number(text, run))
    return list(dict.fromkeys(last))


def _is_in_number(text: str, run: re.Match[str]) -> bool:
    before, after = text[: run.start()][-1:], text[run.end() :][:1]
    return run.group() in (".", ",") and before.isdigit() and after.isdigit()
