"""Money: no cap is passed, nothing that was paid for is lost, and an estimate is what the run then uses."""

import itertools
import re
import threading
from pathlib import Path
from typing import Any

import pytest
from llm_double import COMPLETION_TOKENS, PROMPT_TOKENS, LlmDouble, prompt_of

from safesail.errors import InputError
from safesail.interpretation.budget import Budget, BudgetReached, Charge, Gate, worst_case
from safesail.interpretation.estimate import Estimate, estimate, estimate_lines
from safesail.interpretation.exchange import SLOT
from safesail.interpretation.llm import EndpointBackend, Llm, LocalBackend, Message, Prices, Reply, Request

PRICES: dict[str, Any] = {"usd_per_million_prompt_tokens": 100.0, "usd_per_million_completion_tokens": 1000.0}
WORST_USD = (76 * 100 + 20 * 1000) / 1e6
"""Of one request for at most 20 tokens of which the door counts 76: 4 bytes, 8 for the turn, 64 for the template."""
REAL_USD = (PROMPT_TOKENS * 100 + COMPLETION_TOKENS * 1000) / 1e6
WORST, REAL = 76 + 20, PROMPT_TOKENS + COMPLETION_TOKENS


def asked(prompt: str, **options: Any) -> Request:
    return Request((Message("user", prompt),), max_tokens=20, **options)


REQUESTS = [asked(f"{i:04}") for i in range(20)]


def ask(double: LlmDouble, cache: Path | None, budget: Budget | None, requests: list[Request], **options: Any) -> Llm:
    llm = Llm(EndpointBackend("double", double.base_url, **{**PRICES, **options}), cache, budget=budget)
    llm.ask(requests)
    return llm


def spent(double: LlmDouble) -> tuple[int, float]:
    """The double's own count: tokens, USD."""
    usd = (double.prompt_tokens * 100 + double.completion_tokens * 1000) / 1e6
    return double.prompt_tokens + double.completion_tokens, usd


def words(text: str) -> int:
    return len(text.split())


# the worst case


def test_the_worst_case_is_the_bytes_the_template_and_the_longest_answer() -> None:
    assert worst_case(asked("0000")) == (4 + 8 + 64, 20)
    assert worst_case(Request((Message("system", "ab"), Message("user", "火🙂")), 7)) == (2 + 3 + 4 + 2 * 8 + 64, 7)
    assert worst_case(asked(SLOT, choices=("no", "yes"))) == (len("␣?␣".encode()) + 8 + 64, 0)
    schema = {"type": "object"}
    told = "Answer only with JSON that is valid against this JSON schema:" + '{"type": "object"}'
    assert worst_case(asked("0000", schema=schema)) == (76 + len(told), 20)


# the cap


@pytest.mark.parametrize("concurrency", [1, 16])
@pytest.mark.parametrize("cap", [0, WORST - 1, WORST, 5 * REAL + WORST - 1, 200])
def test_no_token_beyond_the_cap_is_spent_and_what_was_paid_for_is_kept(
    cap: int, concurrency: int, tmp_path: Path
) -> None:
    n_answers = 0 if cap < WORST else (cap - WORST) // REAL + 1
    with LlmDouble() as double:
        with pytest.raises(BudgetReached, match=rf"{n_answers} of 20 answers are kept") as stopped:
            ask(double, tmp_path / "a.sqlite", Budget(tokens=cap), REQUESTS, concurrency=concurrency)
        assert (double.billed, spent(double)[0]) == (n_answers, n_answers * REAL)
        assert spent(double)[0] <= cap
        assert f"{n_answers * REAL} of {cap} tokens are spent" in str(stopped.value)

        [(option, suggested)] = re.findall(r"`(--budget-\w+) (\d+)`", str(stopped.value))
        assert (option, int(suggested)) == ("--budget-tokens", (20 - n_answers) * WORST)
        llm = ask(double, tmp_path / "a.sqlite", Budget(tokens=int(suggested)), REQUESTS, concurrency=concurrency)
        assert (llm.usage.calls, llm.usage.cached) == (20 - n_answers, n_answers)
        assert double.n_requests == 20


@pytest.mark.parametrize("concurrency", [1, 16])
@pytest.mark.parametrize("cap", [0.0, WORST_USD * 0.999, 0.05])
def test_no_cent_beyond_the_cap_is_spent(cap: float, concurrency: int, tmp_path: Path) -> None:
    n_answers = 0 if cap < WORST_USD else int((cap - WORST_USD) / REAL_USD) + 1
    with LlmDouble() as double:
        with pytest.raises(BudgetReached, match=rf"of {cap:g} USD are spent") as stopped:
            ask(double, tmp_path / "a.sqlite", Budget(usd=cap), REQUESTS, concurrency=concurrency)
        assert double.billed == n_answers
        assert spent(double)[1] <= cap
        [suggested] = re.findall(r"`--budget-usd ([\d.]+)`", str(stopped.value))
        assert 0 <= float(suggested) - max(cap, (20 - n_answers) * WORST_USD) < 0.0101
        llm = ask(double, tmp_path / "a.sqlite", Budget(usd=float(suggested)), REQUESTS, concurrency=concurrency)
        assert (llm.usage.calls, llm.usage.cached) == (20 - n_answers, n_answers)


@pytest.mark.parametrize("concurrency", [1, 16])
def test_answers_of_all_lengths_stay_below_both_caps(concurrency: int, tmp_path: Path) -> None:
    """Answers use from nothing to the whole of what they may; the run is continued until all are there."""

    def usage(body: dict[str, Any], text: str) -> tuple[int, int]:
        i = int(prompt_of(body))
        return 10 + i, i % 21

    n_rounds, done = 0, False
    with LlmDouble(usage=usage) as double:
        while not done:
            before, n_rounds = spent(double), n_rounds + 1
            try:
                ask(double, tmp_path / "a.sqlite", Budget(usd=0.06, tokens=300), REQUESTS, concurrency=concurrency)
                done = True
            except BudgetReached:
                pass
            tokens, usd = (now - then for now, then in zip(spent(double), before, strict=True))
            assert 0 < tokens <= 300
            assert usd <= 0.06
        assert double.n_requests == double.billed == 20
        assert n_rounds > 2


def test_a_budget_that_suffices_changes_nothing(tmp_path: Path) -> None:
    together = threading.Barrier(16)

    def behave(prompt: str, attempt: int) -> str:
        if int(prompt) < 16:
            together.wait(30)  # all of them are in flight before one is answered
        return "text"

    with LlmDouble(behave=behave) as double:
        without = ask(double, tmp_path / "without.sqlite", None, REQUESTS, concurrency=16)
        budget = Budget(usd=20 * WORST_USD * 1.001, tokens=20 * WORST)
        capped = ask(double, tmp_path / "with.sqlite", budget, REQUESTS, concurrency=16)
    assert capped.usage == without.usage
    assert budget.spent.tokens == 20 * REAL
    assert budget.spent.usd == pytest.approx(20 * REAL_USD)


def test_a_budget_that_the_answers_just_fill_suffices(tmp_path: Path) -> None:
    """The last call needs its worst case, all others no more than they used: near the cap calls wait for each other."""
    with LlmDouble() as double:
        ask(double, tmp_path / "a.sqlite", Budget(tokens=19 * REAL + WORST), REQUESTS, concurrency=16)
        assert double.billed == 20
    with LlmDouble() as double, pytest.raises(BudgetReached, match="19 of 20"):
        ask(double, tmp_path / "b.sqlite", Budget(tokens=19 * REAL + WORST - 1), REQUESTS, concurrency=16)


def test_a_cap_of_nothing_is_enough_when_everything_is_known(tmp_path: Path) -> None:
    with LlmDouble() as double:
        ask(double, tmp_path / "a.sqlite", None, REQUESTS)
        llm = ask(double, tmp_path / "a.sqlite", Budget(usd=0.0, tokens=0), REQUESTS)
        assert llm.usage.cached == double.n_requests == 20


def test_a_command_has_one_budget_for_all_its_models(tmp_path: Path) -> None:
    budget = Budget(tokens=10 * REAL + WORST)
    with LlmDouble() as double:
        ask(double, None, budget, REQUESTS[:5])
        with pytest.raises(BudgetReached, match="6 of 15 answers"):
            ask(double, None, budget, REQUESTS[5:])
        assert double.billed == 11


def test_what_a_failed_call_reserved_is_free_again(tmp_path: Path) -> None:
    with LlmDouble(behave=lambda prompt, attempt: "500" if int(prompt) < 8 else "text") as double:
        with pytest.raises(BudgetReached, match=r"1 of 20 answers .* enough for the other 19") as stopped:
            ask(double, tmp_path / "a.sqlite", Budget(tokens=WORST), REQUESTS, max_retries=0, concurrency=4)
        assert double.n_requests == 9
        assert f"--budget-tokens {19 * WORST}" in str(stopped.value)


def test_an_answer_that_does_not_say_what_it_used_counts_in_full(tmp_path: Path) -> None:
    with LlmDouble(behave=lambda *_: "no_usage") as double:
        with pytest.raises(BudgetReached, match="3 of 20 answers"):
            ask(double, tmp_path / "a.sqlite", Budget(tokens=3 * WORST), REQUESTS)
        assert double.billed == 3


def test_a_server_with_a_prompt_of_its_own_is_reckoned_with_from_then_on() -> None:
    gate = Gate(Budget(tokens=1100), Prices(), REQUESTS)
    assert gate.admit([0])
    gate.settle(0, Reply("ok", "", prompt_tokens=476, completion_tokens=1))  # 400 more than the text accounts for
    assert gate.admit([1])  # 477 + 496 of 1100
    gate.settle(1, Reply("ok", "", prompt_tokens=476, completion_tokens=1))
    assert not gate.admit([2])  # 954 + 496, where our own count would make it 954 + 96


def test_an_interrupted_ask_leaves_nothing_reserved() -> None:
    budget = Budget(tokens=WORST)

    def interrupted(*_: Any) -> list[tuple[str, int, int]]:
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            Llm(LocalBackend(interrupted, "local:x", {}, 1), None, budget=budget).ask(REQUESTS[:1])
    assert budget.spent == Charge(0, 0.0)


def test_dollars_without_a_price_are_refused_before_anything_is_sent(tmp_path: Path) -> None:
    with LlmDouble() as double:
        for half in ("usd_per_million_prompt_tokens", "usd_per_million_completion_tokens"):
            with pytest.raises(InputError, match=r"set usd_per_million_prompt_tokens and usd_per_million_completion"):
                ask(double, None, Budget(usd=1.0), REQUESTS, **{half: None})
        assert double.n_requests == 0
        llm = ask(double, None, Budget(tokens=10_000), REQUESTS, usd_per_million_prompt_tokens=None)
        assert (llm.usage.prompt_tokens, llm.usage.cost_usd) == (20 * PROMPT_TOKENS, None)


@pytest.mark.parametrize("wrong", [{"usd": -0.1}, {"tokens": -1}, {"usd": float("nan")}])
def test_a_cap_below_nothing_is_no_cap(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="give 0 or more"):
        Budget(**wrong)


def test_a_local_model_stops_between_batches(tmp_path: Path) -> None:
    """It is free, but its tokens count: two of three batches of 4 fit, each for what it used when the next begins."""
    batches = []

    def generate(prompts: list[str], *_: Any) -> list[tuple[str, int, int]]:
        batches.append(prompts)
        return [("said", PROMPT_TOKENS, COMPLETION_TOKENS) for _ in prompts]

    def local(budget: Budget) -> Llm:
        return Llm(LocalBackend(generate, "local:x", {}, 4), tmp_path / "a.sqlite", budget=budget)

    with pytest.raises(BudgetReached, match="8 of 12 answers"):
        local(Budget(usd=0.0, tokens=4 * REAL + 4 * WORST)).ask(REQUESTS[:12])
    assert local(Budget(usd=0.0, tokens=4 * WORST)).ask(REQUESTS[:12])[-1].value == "said"
    assert [len(batch) for batch in batches] == [4, 4, 4]


# the estimate


def counted_by(count: Any, factor: float = 1.0, lengths: Any = len) -> LlmDouble:
    """A double whose tokenizer makes `factor` times the tokens, and whose answers have the lengths it likes."""

    def usage(body: dict[str, Any], text: str) -> tuple[int, int]:
        return round(factor * sum(count(message["content"]) for message in body["messages"])), lengths(prompt_of(body))

    return LlmDouble(usage=usage)


def texts(n: int) -> list[Request]:
    return [
        Request(
            (Message("system", "be brief"), Message("user", f"{i:03} " + "word " * (40 + i * 7 % 23))), max_tokens=90
        )
        for i in range(n)
    ]


def llm_of(double: LlmDouble, cache: Path, **options: Any) -> Llm:
    return Llm(EndpointBackend("double", double.base_url, **{**PRICES, **options}), cache)


def test_where_the_server_counts_as_we_do_the_estimate_is_what_is_used(tmp_path: Path) -> None:
    requests = [*texts(30), *texts(10)]

    def length(prompt: str) -> int:
        return 5 + int(prompt[:3]) % 4

    with counted_by(words, lengths=length) as double:
        llm = llm_of(double, tmp_path / "answers.sqlite")
        before = estimate(llm, requests, words, lambda request: length(request.messages[-1].content))
        assert double.n_requests == 0
        assert not (tmp_path / "answers.sqlite").exists()
        llm.ask(requests)
    # 30 texts of 2 + 1 + 40 words, and the remainders of 7 i by 23
    n_prompt = 30 * 43 + sum(i * 7 % 23 for i in range(30))
    n_completion = 30 * 5 + 7 * (0 + 1 + 2 + 3) + 0 + 1
    cost = (n_prompt * 100 + n_completion * 1000) / 1e6
    assert before == Estimate(30, 0, 30, n_prompt, n_completion, cost, 0)
    usage = llm.usage
    assert (usage.calls, usage.prompt_tokens, usage.completion_tokens) == (30, n_prompt, n_completion)
    assert usage.cost_usd == pytest.approx(cost)


def test_a_pilot_of_ten_answers_brings_the_estimate_within_a_tenth(tmp_path: Path) -> None:
    requests = texts(100)

    def guess(request: Request) -> int:
        return 40

    with counted_by(words, factor=1.3, lengths=lambda prompt: 9 + int(prompt[:3]) % 3) as double:
        llm = llm_of(double, tmp_path / "answers.sqlite")
        blind = estimate(llm, requests, words, guess)
        llm.ask(requests[::10])
        informed = estimate(llm, requests, words, guess)
        assert (informed.n_requests, informed.n_cached, informed.n_calls, informed.calibrated_on) == (100, 10, 90, 10)
        rest = llm_of(double, tmp_path / "answers.sqlite")
        rest.ask(requests)
        assert estimate(rest, requests, words, guess) == Estimate(100, 100, 0, 0, 0, 0.0, 100)
    assert blind.prompt_tokens * 90 / 100 < 0.8 * rest.usage.prompt_tokens, (
        "the double counts as we do: nothing to learn"
    )
    assert informed.prompt_tokens == pytest.approx(rest.usage.prompt_tokens, rel=0.02)
    assert informed.completion_tokens == pytest.approx(rest.usage.completion_tokens, rel=0.1)
    assert informed.cost_usd == pytest.approx(rest.usage.cost_usd, rel=0.1)


def test_the_ratio_is_of_sums(tmp_path: Path) -> None:
    """Counted 10 + 30 = 40 and used 20 + 30 = 50: 5/4, which is not the mean of 2 and 1."""
    requests = [asked("w " * n) for n in (10, 30, 40)]
    with LlmDouble(
        usage=lambda body, text: ({10: 20}.get(words(prompt_of(body)), words(prompt_of(body))), 3)
    ) as double:
        llm = llm_of(double, tmp_path / "answers.sqlite")
        llm.ask(requests[:2])
        assert estimate(llm, requests, words, lambda request: 12)[2:5] == (1, 50, 3)


def test_kept_answers_that_do_not_say_what_they_used_teach_nothing(tmp_path: Path) -> None:
    requests = [asked("one two"), asked("one two three")]
    with LlmDouble(behave=lambda *_: "no_usage") as double:
        llm = llm_of(double, tmp_path / "answers.sqlite")
        llm.ask(requests[:1])
        assert estimate(llm, requests, words, lambda request: 7) == Estimate(2, 1, 1, 3, 7, (300 + 7000) / 1e6, 0)


def test_an_answer_is_expected_to_be_no_longer_than_allowed_and_a_judgement_has_no_text(tmp_path: Path) -> None:
    local = Llm(LocalBackend(lambda *_: [], "local:x", {}, 1), tmp_path / "answers.sqlite")
    requests = [asked("one"), asked(f"one {SLOT}", choices=("no", "yes"))]
    assert estimate(local, requests, words, lambda request: 50) == Estimate(2, 0, 2, 3, 20, 0.0, 0)
    assert estimate(local, [], words, lambda request: 50) == Estimate(0, 0, 0, 0, 0, 0.0, 0)


def test_a_missing_price_is_said_and_tokens_are_counted_all_the_same(tmp_path: Path) -> None:
    with LlmDouble() as double:
        llm = llm_of(double, tmp_path / "answers.sqlite", usd_per_million_completion_tokens=None)
        found = estimate(llm, REQUESTS, words, lambda request: 3)
    assert found == Estimate(20, 0, 20, 20, 60, None, 0)
    assert estimate_lines("explain", found) == [
        "explain  20 calls to a language model, about 20 prompt and 60 completion tokens "
        "(0 of 20 answers are kept already)",
        "         the cost is not known: no price is set; set explain.usd_per_million_prompt_tokens and "
        "explain.usd_per_million_completion_tokens in the recipe",
        "         counted by the tokenizer, answers at their expected length; no kept answer to correct it by",
    ]


def test_the_estimate_in_words() -> None:
    assert estimate_lines("score", Estimate(1500, 10, 1490, 312_000, 23_000, 0.41, 10)) == [
        "score    1,490 calls to a language model, about 312,000 prompt and 23,000 completion tokens, about 0.4100 USD "
        "(10 of 1,500 answers are kept already)",
        "         corrected by what 10 kept answers used",
    ]
    assert estimate_lines("score", Estimate(2, 2, 0, 0, 0, 0.0, 2)) == [
        "score    0 calls to a language model, about 0 prompt and 0 completion tokens, free of charge "
        "(2 of 2 answers are kept already)"
    ]


def test_an_estimate_within_the_budget_is_a_run_within_it(tmp_path: Path) -> None:
    """The two parts meet: the worst case that the budget reserves is never below what the estimate expects."""
    for request, count in itertools.product(texts(5), (words, lambda text: len(text.encode()))):
        prompt, completion = worst_case(request)
        assert prompt > sum(count(message.content) for message in request.messages)
        assert completion == request.max_tokens
