"""What changes when neurons are steered, clamped or ablated: answers, how often they decline, the next token.

Both sides run on the same ids with the same seed, so that a change of nothing (amount 0, a silent neuron ablated) gives
the unchanged answer, id by id. A prompt is a raw text, or a conversation (a list of messages) put through the model's
chat template.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from safesail.diagnosis.declining import declining
from safesail.diagnosis.finite import NotFinite, check_finite, largest_finite, refusal
from safesail.diagnosis.inspector import Inspector
from safesail.diagnosis.intervention_rows import (
    INTERVENTIONS,
    Answered,
    Asked,
    row_of_answers,
    row_of_next_tokens,
)
from safesail.diagnosis.results import Result
from safesail.diagnosis.steering import Intervention, Kind, checked, intervened
from safesail.errors import InputError
from safesail.lm.generate import end_ids, stream
from safesail.progress import bar

__all__ = [
    "CAVEAT",
    "INTERVENTIONS",
    "Intervention",
    "Kind",
    "answers_under",
    "declining_change",
    "intervened",
    "largest_finite",
    "next_token_change",
]

Prompt = str | list[dict[str, str]]

CAVEAT = (
    "An intervention on a neuron does not settle what the model does: in one study of refusal, 95.8 % of the samples "
    "recovered from steering while the clamp was still on, by way of the part of the activation that the SAE does not "
    "reconstruct and that is left in place here (SAE Interventions are Unreliable, arXiv 2606.18322)."
)


class _Sampling(NamedTuple):
    max_new_tokens: int
    temperature: float
    seed: int


def answers_under(
    inspector: Inspector,
    prompts: Sequence[Prompt],
    interventions: Sequence[Intervention],
    *,
    max_new_tokens: int = 48,
    temperature: float = 0.0,
    seed: int = 0,
) -> Result:
    """The answers to each prompt without and with the interventions, side by side: rows of `INTERVENTIONS`.

    Every prompt starts from the same seed. The next tokens are those ten whose probability moves most.
    """
    sampling = _checked_sampling(max_new_tokens, temperature, seed)
    return _compared(inspector, prompts, interventions, sampling, "answers_under")


def declining_change(
    inspector: Inspector,
    prompts: Sequence[Prompt],
    interventions: Sequence[Intervention],
    *,
    max_new_tokens: int = 48,
    temperature: float = 0.0,
    seed: int = 0,
) -> Result:
    """How often the prompts are declined without and with the interventions: `answers_under`, with the rates as facts.

    `facts["declining"]` holds the counts, the rates with intervals and their paired difference, and a sentence, which
    says so where no prompt is declined at all.
    """
    sampling = _checked_sampling(max_new_tokens, temperature, seed)
    result = _compared(inspector, prompts, interventions, sampling, "declining_change")
    change = declining(
        [row["declines_unchanged"] for row in result.rows], [row["declines_changed"] for row in result.rows]
    )
    intervals = {name: getattr(change, name)._asdict() for name in ("before", "after", "difference")}
    facts = result.facts | {"declining": {**change._asdict(), **intervals, "sentence": change.sentence}}
    return result._replace(facts=facts)


def next_token_change(
    inspector: Inspector,
    prompt: Prompt,
    interventions: Sequence[Intervention],
    tokens: Sequence[str | int] | None = None,
    top: int = 10,
) -> Result:
    """The probabilities of the token right after a prompt, without and with the interventions: one row.

    tokens: texts of one token each (a word with the space before it), or ids; without them the `top` tokens whose
    probability moves most.
    """
    changes = _checked(inspector, interventions)
    (asked,) = _asked(inspector, [prompt], 0)
    if top < 1 or (tokens is not None and not tokens):
        raise InputError("no tokens were asked for; name some, or leave them out and give a top of 1 or more.")
    ids = None if tokens is None else [_token_id(inspector, token) for token in tokens]
    once = _Sampling(1, 0.0, 0)
    before, after = _answer(inspector, asked, [], once).first, _answer(inspector, asked, changes, once).first
    row = row_of_next_tokens(inspector, asked, changes, before, after, ids=ids, top=top)
    call = f"next_token_change(inspector, {prompt!r}, {_shown(changes)}, {tokens!r}, {top})"
    facts = {"caveat": CAVEAT, "n_prompts": 1, "saes": inspector.identity}
    return Result("interventions", [row], INTERVENTIONS, _python(inspector, "next_token_change", call), facts)


# --- the two runs -------------------------------------------------------------------------------------------------


def _compared(
    inspector: Inspector,
    prompts: Sequence[Prompt],
    interventions: Sequence[Intervention],
    sampling: _Sampling,
    function: str,
) -> Result:
    changes = _checked(inspector, interventions)
    asked = _asked(inspector, prompts, sampling.max_new_tokens)
    rows = []
    with bar("answers", len(asked), "prompts") as progress:
        for prompt in asked:
            before, after = (_answer(inspector, prompt, made, sampling) for made in ([], changes))
            rows.append(row_of_answers(inspector, prompt, changes, before, after))
            progress.update()
    n_changed = sum(row["ids_unchanged"] != row["ids_changed"] for row in rows)
    facts = {"caveat": CAVEAT, "n_prompts": len(rows), "n_answers_changed": n_changed, **sampling._asdict()}
    facts |= {"saes": inspector.identity}
    call = f"{function}(inspector, {list(prompts)!r}, {_shown(changes)}, {_keywords(sampling)})"
    return Result("interventions", rows, INTERVENTIONS, _python(inspector, function, call), facts)


def _answer(inspector: Inspector, prompt: Asked, changes: list[Intervention], sampling: _Sampling) -> Answered:
    """The answer under the changes; InputError when a logit is not finite."""
    model, tokenizer = inspector.model, inspector.tokenizer
    ids: list[int] = []
    first: list[Tensor] = []

    def watch(logits: Tensor) -> None:
        check_finite(logits)
        if not first:
            first.append(logits.double().log_softmax(-1))

    n_most, temperature, seed = sampling
    ends = end_ids(model, tokenizer)
    try:
        with intervened(inspector, changes, roles=prompt.roles):
            for id in stream(model, prompt.ids, n_most, ends, temperature=temperature, seed=seed, watch=watch):
                ids.append(id)
    except NotFinite:
        raise refusal(inspector, changes, prompt.ids + ids, prompt.roles) from None
    return Answered(ids, first[0])


# --- what was given -----------------------------------------------------------------------------------------------


def _checked(inspector: Inspector, interventions: Sequence[Intervention]) -> list[Intervention]:
    """The interventions, at least one, each of which can be made."""
    if not interventions:
        raise InputError("no intervention was given; name at least one neuron, as `--neuron layers.9.mlp/1234`.")
    return checked(inspector, interventions)


def _checked_sampling(max_new_tokens: int, temperature: float, seed: int) -> _Sampling:
    if max_new_tokens < 1:
        raise InputError(f"an answer of {max_new_tokens} tokens was asked for; give 1 or more.")
    if not (math.isfinite(temperature) and temperature >= 0):
        raise InputError(f"the temperature {temperature} is not a number from 0 (greedy); give one, as 0.7.")
    return _Sampling(max_new_tokens, temperature, seed)


def _asked(inspector: Inspector, prompts: Sequence[Prompt], max_new_tokens: int) -> list[Asked]:
    """The prompts' ids, all checked before any is answered."""
    if isinstance(prompts, str):
        raise InputError("the prompts are one text; give a list of prompts.")
    if not prompts:
        raise InputError("the list of prompts is empty; give at least one.")
    asked = []
    for number, prompt in enumerate(prompts, start=1):
        try:
            ids, roles = inspector.prompt(prompt)
            _check_length(inspector, len(ids), max_new_tokens)
        except InputError as error:
            raise InputError(f"prompt {number} of {len(prompts)}: {error}") from None
        text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
        asked.append(Asked(text.encode(errors="replace").decode(), not isinstance(prompt, str), ids, roles))
    return asked


def _check_length(inspector: Inspector, n: int, max_new_tokens: int) -> None:
    if n + max_new_tokens > inspector.max_tokens:
        raise InputError(
            f"it has {n:,} tokens and its answer up to {max_new_tokens:,}, but the model reads "
            f"{inspector.max_tokens:,}; shorten them."
        )


def _token_id(inspector: Inspector, token: str | int) -> int:
    if isinstance(token, int):
        n_tokens = inspector.model.get_output_embeddings().weight.shape[0]
        if not 0 <= token < n_tokens:
            raise InputError(f"there is no token {token}; ids go from 0 to {n_tokens - 1}.")
        return token
    ids = inspector.tokenizer(token, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise InputError(
            f"{token!r} is {len(ids)} tokens to this tokenizer; give texts of one token (often a word with the space "
            "before it), or ids."
        )
    return ids[0]


# --- the Python ---------------------------------------------------------------------------------------------------


def _python(inspector: Inspector, function: str, call: str) -> str:
    return (
        "from safesail import Inspector\n"
        f"from safesail.diagnosis.interventions import Intervention, {function}\n\n"
        f"inspector = Inspector.from_pretrained({inspector.release!r})\n"
        f"result = {call}\n"
    )


def _shown(changes: list[Intervention]) -> str:
    parts = (f"Intervention({change.neuron_id!r}, {change.kind!r}, {change.amount!r})" for change in changes)
    return f"[{', '.join(parts)}]"


def _keywords(sampling: _Sampling) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in sampling._asdict().items())
