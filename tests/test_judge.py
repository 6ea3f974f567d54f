"""Judgements from logits: one pass over a prompt says what one prompt per mark would say."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from safesail.errors import InputError
from safesail.interpretation.exchange import SLOT
from safesail.lm.judge import MARK, judge

PROMPT = f"The garden is quiet.\n1: the president{MARK}\n2:  Ärger im 公园{MARK}\n3: by the river{MARK}\nThe end"
YES_NO = ("no", "yes")
DIGITS = tuple("0123456789")


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@torch.inference_mode()
def next_token(model: Any, ids: list[int], among: list[int]) -> list[float]:
    """The probabilities of some next tokens, normalised over them: of one prompt, without any shortcut."""
    logits = model(torch.tensor([ids])).logits[0, -1]
    exps = [float(logits[token].double().exp()) for token in among]
    return [value / sum(exps) for value in exps]


def by_brute_force(model: Any, tokenizer: Any, prompt: str, asks: list[int], among: list[int]) -> list[list[float]]:
    """One prompt per mark: the text before it, with every earlier mark read as ` -> ?`."""
    found, ids = [], []
    for part in prompt.split(MARK)[:-1]:
        ids += ids_of(tokenizer, part) + asks
        found.append(next_token(model, ids, among))
        ids += ids_of(tokenizer, " ?")
    return found


def test_the_mark_is_the_one_that_requests_hold():
    assert MARK == SLOT


def test_words_are_judged_as_one_prompt_per_mark_would(model: Any, tokenizer: Any):
    asks = ids_of(tokenizer, " ->")
    no, yes = ids_of(tokenizer, " no"), ids_of(tokenizer, " yes")
    shared = 0
    while no[shared] == yes[shared]:
        shared += 1
    expected = by_brute_force(model, tokenizer, PROMPT, [*asks, *no[:shared]], [no[shared], yes[shared]])
    [(found, n_tokens)] = judge(model, tokenizer, [PROMPT], YES_NO)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected))
    assert len(found) == 3
    assert all(sum(probabilities) == pytest.approx(1) for probabilities in found)
    n_parts = sum(len(ids_of(tokenizer, part)) for part in PROMPT.split(MARK))
    assert n_tokens == n_parts + 3 * (len(asks) + shared + len(ids_of(tokenizer, " ?")))


def test_digits_are_told_apart_after_the_space_that_all_begin_with(model: Any, tokenizer: Any):
    space = ids_of(tokenizer, " 7")[:-1]
    digits = [ids_of(tokenizer, f" {digit}")[-1] for digit in DIGITS]
    assert len(set(digits)) == 10
    expected = by_brute_force(model, tokenizer, PROMPT, [*ids_of(tokenizer, " ->"), *space], digits)
    [(found, _)] = judge(model, tokenizer, [PROMPT], DIGITS)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected))


def test_a_judgement_depends_on_what_stands_before_its_mark_alone(model: Any, tokenizer: Any):
    first, second = judge(model, tokenizer, [PROMPT, PROMPT.replace("by the river", "murder")], YES_NO)
    torch.testing.assert_close(torch.tensor(first[0][:2]), torch.tensor(second[0][:2]))
    assert first[0][2] != pytest.approx(second[0][2])


def test_prompts_are_independent_of_their_company(model: Any, tokenizer: Any):
    alone = judge(model, tokenizer, [PROMPT], YES_NO)
    assert judge(model, tokenizer, [f"a{MARK}", PROMPT, "no mark at all"], YES_NO)[1] == alone[0]
    assert judge(model, tokenizer, ["no mark at all"], YES_NO)[0][0] == []


def test_choices_that_begin_alike_are_refused(model: Any, tokenizer: Any):
    for choices in (("1", "10"), ("yes", "yes"), ("yes",), ("0", "1", "1")):
        with pytest.raises(InputError, match="does not tell"):
            judge(model, tokenizer, [PROMPT], choices)


def test_a_prompt_longer_than_the_model_reads_is_refused(model: Any, tokenizer: Any):
    long = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=20))
    with pytest.raises(InputError, match=r"has \d+ tokens, and it reads 20 at most; set score.segments_per_request"):
        judge(long, tokenizer, [PROMPT], YES_NO)
