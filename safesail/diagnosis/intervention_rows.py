"""The table of interventions: its schema, and a row from what a prompt gave without and with them."""

import math
from typing import Any, NamedTuple

import pyarrow as pa
from torch import Tensor

from safesail.diagnosis.declining import declines
from safesail.diagnosis.inspector import Inspector
from safesail.diagnosis.steering import Intervention
from safesail.lm.tokens import spans

__all__ = ["INTERVENTIONS", "Answered", "Asked", "row_of_answers", "row_of_next_tokens"]

INTERVENTIONS = pa.schema(
    [
        ("prompt", pa.string()),
        ("answer_unchanged", pa.string()),
        ("answer_changed", pa.string()),
        ("declines_unchanged", pa.bool_()),
        ("declines_changed", pa.bool_()),
        ("n_equal_ids", pa.int32()),
        (
            "interventions",
            pa.list_(pa.struct([("neuron_id", pa.string()), ("kind", pa.string()), ("amount", pa.float64())])),
        ),
        (
            "next_tokens",
            pa.list_(
                pa.struct(
                    [
                        ("token", pa.int32()),
                        ("text", pa.string()),
                        ("probability_unchanged", pa.float64()),
                        ("probability_changed", pa.float64()),
                        ("log_probability_unchanged", pa.float64()),
                        ("log_probability_changed", pa.float64()),
                    ]
                )
            ),
        ),
        ("chat", pa.bool_()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("ids_unchanged", pa.list_(pa.int32())),
        ("ids_changed", pa.list_(pa.int32())),
    ]
)
"""A row is a prompt. `n_equal_ids`: with how many equal ids the two answers begin; `next_tokens`: the tokens right
after the prompt (log-probabilities in nats); of a row about the next token only, what belongs to an answer is null."""


class Asked(NamedTuple):
    """A prompt as the model reads it."""

    text: str
    chat: bool
    ids: list[int]
    roles: list[int] | None
    """The role code of each id where a token policy asks for roles."""


class Answered(NamedTuple):
    """What the model said."""

    ids: list[int]
    first: Tensor
    """The log-probabilities of the first id: (vocabulary,), float64."""


def row_of_answers(
    inspector: Inspector, prompt: Asked, changes: list[Intervention], before: Answered, after: Answered
) -> dict[str, Any]:
    """The row of a prompt answered twice; its next tokens are the ten whose probability moves most."""
    texts = [_readable(inspector, answer.ids) for answer in (before, after)]
    return _empty_row(prompt, changes) | {
        "answer_unchanged": texts[0],
        "answer_changed": texts[1],
        "declines_unchanged": declines(texts[0]),
        "declines_changed": declines(texts[1]),
        "n_equal_ids": _n_equal(before.ids, after.ids),
        "next_tokens": _next_tokens(inspector, before.first, after.first),
        "ids_unchanged": before.ids,
        "ids_changed": after.ids,
    }


def row_of_next_tokens(
    inspector: Inspector,
    prompt: Asked,
    changes: list[Intervention],
    before: Tensor,
    after: Tensor,
    *,
    ids: list[int] | None,
    top: int,
) -> dict[str, Any]:
    """The row of a prompt's next token alone: those of `ids`, or the `top` whose probability moves most.

    before, after: the log-probabilities of the next token, (vocabulary,).
    """
    return _empty_row(prompt, changes) | {"next_tokens": _next_tokens(inspector, before, after, ids, top)}


def _empty_row(prompt: Asked, changes: list[Intervention]) -> dict[str, Any]:
    """A row with everything an answer has at null."""
    row: dict[str, Any] = dict.fromkeys(INTERVENTIONS.names)
    return row | {
        "prompt": prompt.text,
        "interventions": [change._asdict() for change in changes],
        "chat": prompt.chat,
        "prompt_ids": prompt.ids,
    }


def _next_tokens(
    inspector: Inspector, before: Tensor, after: Tensor, ids: list[int] | None = None, top: int = 10
) -> list[dict[str, Any]]:
    """The tokens, those of `ids` or the `top` whose probability moves most. before, after: (vocabulary,), in nats."""
    if ids is None:
        ids = _most_moved(before, after)[:top].tolist()
    return [
        {
            "token": id,
            "text": inspector.tokenizer.decode([id]),
            "probability_unchanged": math.exp(old),
            "probability_changed": math.exp(new),
            "log_probability_unchanged": old,
            "log_probability_changed": new,
        }
        for id, old, new in zip(ids, before[ids].tolist(), after[ids].tolist(), strict=True)
    ]


def _most_moved(before: Tensor, after: Tensor) -> Tensor:
    """All ids, those whose probability moves most first; of equal ones the more probable. Both: (vocabulary,)."""
    likeliest = before.argsort(descending=True, stable=True)
    moves = (after.exp() - before.exp()).abs()[likeliest]
    return likeliest[moves.argsort(descending=True, stable=True)]


def _n_equal(first: list[int], second: list[int]) -> int:
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def _readable(inspector: Inspector, ids: list[int]) -> str:
    return "".join(unit.text for unit in spans(inspector.tokenizer, ids) if not unit.special)
