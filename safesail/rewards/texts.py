"""A side of a pair as the reward model reads it: token ids, and where among them the answer is."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from safesail.errors import InputError
from safesail.rewards.preferences import SIDES, Preference

__all__ = ["Distinct", "Text", "distinct", "encode_all", "encode_side"]

_MARK = "\ue000"
"""Stands in an answer's place to find where a template puts it: a character of no script, which no template trims."""


class Text(NamedTuple):
    """A conversation in tokens."""

    ids: list[int]
    """In the chat template; of a longer one the last `max_length`."""
    answer: range
    """The positions in `ids` of the answer's tokens: those that hold any of its characters, so none of the template's
    own or special ones."""
    n_cut: int
    """Tokens lost at the beginning."""


class Distinct(NamedTuple):
    """The different texts among all sides of all pairs: an answer that is in several pairs is read once."""

    ids: list[list[int]]
    number: Tensor
    """(n_texts,) for every text the place of its tokens in `ids`."""


def distinct(texts: Sequence[Text]) -> Distinct:
    """The different texts in the order in which they first appear."""
    places: dict[tuple[int, ...], int] = {}
    numbers = [places.setdefault(tuple(text.ids), len(places)) for text in texts]
    return Distinct([list(ids) for ids in places], torch.tensor(numbers, dtype=torch.long))


def encode_side(tokenizer: Any, preference: Preference, side: str, max_length: int) -> Text:
    """One side of a pair in the tokenizer's chat template, cut at its beginning to `max_length` tokens.

    The template alone says which special tokens there are: the tokenizer adds none, so there is no second BOS. Without
    a template turns are lines, "User: …" and "Assistant: …".
    """
    text, start, end = _rendered(tokenizer, preference, side)
    try:
        encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    except NotImplementedError as error:
        raise InputError("the tokenizer cannot say where its tokens begin (it is not a fast one).") from error
    ids = list(encoded["input_ids"])
    inside = [i for i, (first, last) in enumerate(encoded["offset_mapping"]) if last > start and first < end]
    n_cut = max(len(ids) - max_length, 0)
    answer = range(max(inside[0] - n_cut, 0), max(inside[-1] + 1 - n_cut, 0)) if inside else range(0)
    return Text(ids[n_cut:], answer, n_cut)


def encode_all(
    tokenizer: Any,
    preferences: Sequence[Preference],
    max_length: int,
    progress: Callable[[int], Any] = lambda n: None,
) -> list[Text]:
    """Both sides of all pairs: text 2p is the chosen side of pair p, text 2p + 1 the rejected one."""
    texts = []
    for preference in preferences:
        texts += [encode_side(tokenizer, preference, side, max_length) for side in SIDES]
        progress(len(SIDES))
    return texts


def _rendered(tokenizer: Any, preference: Preference, side: str) -> tuple[str, int, int]:
    """The conversation as one text, and the first and last character of the answer in it.

    A template may trim an answer, or put something between it and its turn's beginning; the place is found by putting
    a mark there instead.
    """
    messages = preference.messages(side)
    text = _conversation(tokenizer, messages, preference.id)
    marked = _conversation(tokenizer, [*messages[:-1], {**messages[-1], "content": _MARK}], preference.id)
    before, mark, after = marked.rpartition(_MARK)
    end = len(text) - len(after)
    if not mark or not text.startswith(before) or not text.endswith(after) or end <= len(before):
        raise InputError(
            f"the chat template does not show the answer of pair {preference.id} in its place; "
            "give the tokenizer another chat template."
        )
    return text, len(before), end


def _conversation(tokenizer: Any, messages: list[dict[str, str]], id: str) -> str:
    from jinja2 import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        return "\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in messages)
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False)
    except (TemplateError, TypeError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"the chat template does not take the conversation of pair {id}: {reason}. "
            "Leave the pair out, or give the tokenizer another chat template."
        ) from error
