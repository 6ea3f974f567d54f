"""Judgements read from logits: how probable a causal LM finds each of a few choices at marked places of a prompt."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from safesail.errors import InputError

__all__ = ["MARK", "judge"]

MARK = "␣?␣"
"""Stands in a prompt wherever a choice is to be judged."""
_ASKS, _OPEN = " ->", " ?"
"""What the model reads in a mark's place: the first before the judgement, then the second instead of an answer."""


class _Slot(NamedTuple):
    """How a mark reads in tokens."""

    asks: list[int]
    """After the last of these the choices differ."""
    filled: list[int]
    choices: list[int]
    """The first token of each choice that tells it from the others."""


@torch.inference_mode()
def judge(
    model: Any, tokenizer: Any, prompts: list[str], choices: tuple[str, ...]
) -> list[tuple[list[list[float]], int]]:
    """Per prompt the probabilities of the choices at each MARK, and the number of tokens read.

    One forward pass a prompt. The probability of a choice is that of its first token, normalised over the choices. All
    marks are filled with the same neutral text, so what the model thought of one does not tell at the next. The
    probabilities are a list of n_marks lists of n_choices.
    """
    slot = _slot(tokenizer, choices)
    return [_judged(model, tokenizer, prompt, slot) for prompt in prompts]


def _judged(model: Any, tokenizer: Any, prompt: str, slot: _Slot) -> tuple[list[list[float]], int]:
    ids, places = _encoded(tokenizer, prompt, slot)
    _refuse_too_long(model, len(ids))
    if not places:
        return [], len(ids)
    keep = torch.tensor(places, device=model.device)
    logits = model(input_ids=torch.tensor([ids], device=model.device), use_cache=False, logits_to_keep=keep).logits[0]
    chosen: Tensor = logits[:, slot.choices].float()
    return chosen.softmax(-1).tolist(), len(ids)


def _encoded(tokenizer: Any, prompt: str, slot: _Slot) -> tuple[list[int], list[int]]:
    """The prompt's ids with every mark filled, and the places whose next token is the judgement."""
    ids: list[int] = []
    places: list[int] = []
    first, *others = prompt.split(MARK)
    ids += _ids(tokenizer, first)
    for part in others:
        ids += slot.asks
        places.append(len(ids) - 1)
        ids += slot.filled + _ids(tokenizer, part)
    return ids, places


def _slot(tokenizer: Any, choices: tuple[str, ...]) -> _Slot:
    """The tokens of a mark: what all choices begin with after `->`, and where they part.

    Some vocabularies join the space before a word with it, none joins it with a digit; so the choices are encoded in
    their place and compared, not one by one.
    """
    encoded = [_ids(tokenizer, f"{_ASKS} {choice}") for choice in choices]
    n_same = 0
    while n_same < min(map(len, encoded)) and len({ids[n_same] for ids in encoded}) == 1:
        n_same += 1
    firsts = [ids[n_same] for ids in encoded if len(ids) > n_same]
    if len(set(firsts)) < len(choices) or n_same == 0:
        raise InputError(
            f"the tokenizer does not tell {', '.join(choices)} apart by their first tokens; "
            "score with another local model, or by an endpoint."
        )
    return _Slot(encoded[0][:n_same], _ids(tokenizer, _OPEN), firsts)


def _refuse_too_long(model: Any, n_tokens: int) -> None:
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest is not None and n_tokens > longest:
        raise InputError(
            f"a prompt to the local model has {n_tokens} tokens, and it reads {longest} at most; "
            "set score.segments_per_request lower."
        )


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []
