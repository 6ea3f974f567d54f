"""The door to language models: every answer has one status, is paid for once, and the key stays inside."""

import asyncio
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import traceback
from pathlib import Path
from typing import Any

import pytest
from llm_double import COMPLETION_TOKENS, PROMPT_TOKENS, LlmDouble, prompt_of, scripted

from safesail.errors import InputError
from safesail.interpretation.answers import decode, is_refusal, judge, mismatch
from safesail.interpretation.llm import EndpointBackend, Llm, LocalBackend, Message, Reply, Request

KEY = "sk-very-secret-0123456789"
SCHEMA = {
    "type": "object",
    "properties": {"score": {"type": "integer", "minimum": 0, "maximum": 10}, "why": {"type": "string"}},
    "required": ["score", "why"],
    "additionalProperties": False,
}
VALUE = {"score": 3, "why": "weapons"}
JSON = '{"score": 3, "why": "weapons"}'


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


def asked(prompt: str, **options: Any) -> Request:
    return Request((Message("user", prompt),), max_tokens=20, **options)


def endpoint(double: LlmDouble, **options: Any) -> EndpointBackend:
    return EndpointBackend("double", double.base_url, **options)


def says(text: str) -> LlmDouble:
    return LlmDouble(answer=lambda body: text)


def one(double: LlmDouble, request: Request, **options: Any) -> Reply:
    with double:
        [reply] = Llm(endpoint(double, **options), None).ask([request])
    return reply


# every status


def test_a_text_is_ok_and_carries_usage_and_cost() -> None:
    prices = {"usd_per_million_prompt_tokens": 2.0, "usd_per_million_completion_tokens": 10.0}
    reply = one(LlmDouble(), asked("a"), **prices)
    assert reply == Reply("ok", "said: a", "", 10, 3, (10 * 2 + 3 * 10) / 1e6, False)


def test_a_structured_answer_is_decoded_and_asked_for_by_schema() -> None:
    double = says(JSON)
    assert one(double, asked("a", schema=SCHEMA)).value == VALUE
    sent = double.bodies[0]["response_format"]
    assert sent == {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA, "strict": True}}


@pytest.mark.parametrize(
    ("behaviour", "schema", "status", "detail"),
    [
        ("prose", SCHEMA, "unparsed", "holds no JSON"),
        ("truncated", SCHEMA, "unparsed", "truncated at max_tokens"),
        ("empty", None, "unparsed", "empty"),
        ("refusal", None, "refused", "I'm sorry, but I can't"),
        ("refusal", SCHEMA, "refused", "I'm sorry, but I can't"),
        ("refusal_field", SCHEMA, "refused", "I will not describe this."),
        ("content_filter", None, "refused", "content filter"),
        ("moderated", None, "refused", "flagged"),
        ("no_choices", None, "failed", "without a message"),
        ("html", None, "failed", "without a message"),
        ("400", None, "failed", "BadRequestError: Error code: 400"),
        ("500", None, "failed", "InternalServerError: Error code: 500"),
        ("429", SCHEMA, "failed", "RateLimitError: Error code: 429"),
    ],
)
def test_what_is_not_an_answer_has_a_status_and_no_value(
    behaviour: str, schema: dict[str, Any] | None, status: str, detail: str
) -> None:
    reply = one(LlmDouble(behave=lambda *_: behaviour), asked("a", schema=schema), max_retries=1)
    assert (reply.status, reply.value) == (status, None)
    assert detail in reply.detail


def test_what_the_model_said_instead_is_kept() -> None:
    reply = one(LlmDouble(behave=lambda *_: "truncated"), asked("a", schema=SCHEMA))
    assert reply.raw == '{"score": 3, "why": "it fi'


def test_a_server_that_does_not_answer_in_time_or_at_all_has_failed() -> None:
    double = LlmDouble(behave=lambda *_: "slow")
    assert one(double, asked("a"), timeout_seconds=0.15, max_retries=0).detail.startswith("APITimeoutError")
    gone = endpoint(double, max_retries=0)
    assert Llm(gone, None).ask([asked("a")])[0].detail.startswith("APIConnectionError")


def test_a_busy_server_is_asked_again() -> None:
    double = LlmDouble(behave=scripted({"a": ["429", "500", "text"]}))
    assert one(double, asked("a")).value == "said: a"
    assert (double.n_requests, double.billed) == (3, 1)


# servers that know less


def test_structured_answers_fall_back_to_json_and_then_to_text_once_per_session() -> None:
    for formats, types in (
        (("json_object",), ["json_schema", "json_object", "json_object"]),
        ((), ["json_schema", "json_object", None, None]),
    ):
        with LlmDouble(answer=lambda body: f"```json\n{JSON}\n```", formats=formats) as double:
            llm = Llm(endpoint(double), None)
            assert [llm.ask([asked(prompt, schema=SCHEMA)])[0].value for prompt in "ab"] == [VALUE, VALUE]
        assert [body.get("response_format", {}).get("type") for body in double.bodies] == types
        assert '"additionalProperties": false' in prompt_of(double.bodies[-1])


def test_many_calls_learn_the_fallback_at_once() -> None:
    with LlmDouble(answer=lambda body: JSON, formats=()) as double:
        replies = Llm(endpoint(double), None).ask([asked(str(i), schema=SCHEMA) for i in range(12)])
    assert {reply.status for reply in replies} == {"ok"}
    assert double.billed == 12


def test_reasoning_models_are_asked_in_their_way() -> None:
    double = LlmDouble(unknown=("max_tokens", "temperature", "stop"))
    assert one(double, asked("a", stop=("\n",))).status == "ok"
    assert set(double.bodies[-1]) == {"model", "messages", "max_completion_tokens"}


# the cache


def test_what_was_answered_is_not_asked_again(tmp_path: Path) -> None:
    words = {"a": ["text"], "b": ["refusal"], "c": ["empty"], "d": ["400"]}
    requests = [asked(prompt) for prompt in words]
    with LlmDouble(behave=scripted(words)) as double:
        first = Llm(endpoint(double), tmp_path / "scratch" / "answers.sqlite")
        before = first.ask(requests)
        assert double.n_requests == 4
        again = Llm(endpoint(double), tmp_path / "scratch" / "answers.sqlite")
        after = again.ask(requests)
    assert double.n_requests == 5  # only the failed one
    assert after == [reply._replace(cached=reply.status != "failed") for reply in before]
    assert again.usage.summary() == {
        "calls": 1,
        "cached": 3,
        "prompt_tokens": 0,
        "completion_tokens": 0,
        "cost_usd": 0.0,
        "by_status": {"ok": 1, "refused": 1, "unparsed": 1, "failed": 1},
    }
    assert (first.usage.prompt_tokens, first.usage.cost_usd) == (3 * PROMPT_TOKENS, None)


def test_another_question_or_model_is_another_answer(tmp_path: Path) -> None:
    base = asked("a")
    others = [
        base._replace(max_tokens=21),
        base._replace(temperature=0.5),
        base._replace(stop=("x",)),
        base._replace(messages=(Message("system", "a"),)),
    ]
    with LlmDouble() as double:
        Llm(endpoint(double), tmp_path / "answers.sqlite").ask([base, *others])
        assert double.n_requests == 5
        Llm(EndpointBackend("other", double.base_url), tmp_path / "answers.sqlite").ask([base])
        Llm(endpoint(double, concurrency=1, timeout_seconds=9), tmp_path / "answers.sqlite").ask([base])
    assert double.n_requests == 6


def test_equal_requests_are_sent_once() -> None:
    seen = []
    with LlmDouble() as double:
        llm = Llm(endpoint(double), None)
        replies = llm.ask([asked("a"), asked("b"), asked("a"), asked("a")], progress=seen.append)
    assert double.n_requests == 2
    assert [reply.value for reply in replies] == ["said: a", "said: b", "said: a", "said: a"]
    assert [reply.cached for reply in replies] == [False, False, True, True]
    assert sum(seen) == 4
    assert (llm.usage.calls, llm.usage.cached, llm.usage.prompt_tokens) == (2, 2, 2 * PROMPT_TOKENS)


def test_a_killed_run_resumes_with_the_missing_calls_only(tmp_path: Path) -> None:
    script = """
        import os, signal, sys
        from pathlib import Path
        from safesail.interpretation.llm import EndpointBackend, Llm, Message, Request
        known = 0
        def progress(n):
            global known
            known += n
            if known == 3:
                os.kill(os.getpid(), signal.SIGKILL)
        llm = Llm(EndpointBackend("double", sys.argv[1], concurrency=1), Path(sys.argv[2]))
        llm.ask([Request((Message("user", str(i)),), max_tokens=20) for i in range(8)], progress=progress)
    """
    with LlmDouble() as double:
        command = [sys.executable, "-c", textwrap.dedent(script), double.base_url, str(tmp_path / "answers.sqlite")]
        run = subprocess.run(command, env=os.environ, cwd=Path(__file__).parents[1], timeout=120)
        assert run.returncode == -signal.SIGKILL
        assert double.n_requests == 3
        replies = Llm(endpoint(double), tmp_path / "answers.sqlite").ask([asked(str(i)) for i in range(8)])
    assert [reply.cached for reply in replies] == [True] * 3 + [False] * 5
    assert [reply.value for reply in replies] == [f"said: {i}" for i in range(8)]
    assert sorted(map(prompt_of, double.bodies)) == [str(i) for i in range(8)]


def test_a_file_that_is_no_cache_is_named(tmp_path: Path) -> None:
    (tmp_path / "answers.sqlite").write_text("not a database, and long enough to be looked at " * 9)
    local = LocalBackend(lambda *_: [], "local:x", {}, 1)
    with pytest.raises(InputError, match=r"answers\.sqlite cannot be used .* delete it"):
        Llm(local, tmp_path / "answers.sqlite").ask([])


def test_the_cache_is_one_plain_sqlite_file(tmp_path: Path) -> None:
    Llm(LocalBackend(lambda *_: [("x", 1, 1)], "local:x", {}, 1), tmp_path / "answers.sqlite").ask([asked("a")])
    assert [path.name for path in tmp_path.iterdir()] == ["answers.sqlite"]
    rows = sqlite3.connect(tmp_path / "answers.sqlite")
    assert rows.execute("SELECT length(key), answer FROM answers").fetchall()[0][0] == 64
    rows.close()


def test_a_validator_is_applied_to_kept_answers_too(tmp_path: Path) -> None:
    def number(request: Request, value: str) -> int:
        return int(value)

    with LlmDouble(answer=lambda body: "7" if prompt_of(body) == "a" else "seven") as double:
        cache, requests = tmp_path / "answers.sqlite", [asked("a"), asked("b")]
        for _ in range(2):
            good, bad = Llm(endpoint(double), cache, parse=number).ask(requests)
            assert (good.status, good.value, bad.status, bad.value, bad.raw) == ("ok", 7, "unparsed", None, "seven")
        assert Llm(endpoint(double), cache).ask(requests)[1].value == "seven"
    assert double.n_requests == 2


# under load


def test_forty_calls_on_a_bad_day_end_each_in_one_status_and_the_totals_are_the_bill(tmp_path: Path) -> None:
    days = [["429", "json"], ["500", "429", "json"], ["prose"], ["refusal"], ["json"], ["500"], ["429", "refusal"]]
    ends = {"json": "ok", "prose": "unparsed", "refusal": "refused", "500": "failed"}
    script = {str(i): days[i % len(days)] for i in range(40)}
    prices = {"usd_per_million_prompt_tokens": 1.0, "usd_per_million_completion_tokens": 4.0}
    with LlmDouble(answer=lambda body: JSON, behave=scripted(script)) as double:
        llm = Llm(endpoint(double, concurrency=40, max_retries=3, **prices), tmp_path / "answers.sqlite")
        replies = llm.ask([asked(prompt, schema=SCHEMA) for prompt in script])
    assert [reply.status for reply in replies] == [ends[words[-1]] for words in script.values()]
    assert sum(llm.usage.by_status.values()) == llm.usage.calls == 40
    assert double.billed == sum(reply.status != "failed" for reply in replies)
    assert llm.usage.prompt_tokens == double.billed * PROMPT_TOKENS
    assert llm.usage.completion_tokens == double.billed * COMPLETION_TOKENS
    assert llm.usage.cost_usd == pytest.approx(double.billed * (PROMPT_TOKENS + 4 * COMPLETION_TOKENS) / 1e6)


def test_no_more_calls_are_open_than_asked_for() -> None:
    with LlmDouble() as double:
        Llm(endpoint(double, concurrency=3), None).ask([asked(str(i)) for i in range(20)])
    assert double.most_at_once <= 3


def test_it_can_be_asked_from_a_running_loop(tmp_path: Path) -> None:
    async def notebook(llm: Llm) -> list[Reply]:
        return llm.ask([asked("a")])

    with LlmDouble() as double:
        [reply] = asyncio.run(notebook(Llm(endpoint(double), tmp_path / "answers.sqlite")))
    assert reply.value == "said: a"


# keys


@pytest.mark.parametrize(
    ("status", "mend"),
    [("401", r"export OPENAI_API_KEY=\.\.\."), ("403", "export OPENAI"), ("402", "top it up"), ("404", "'double'")],
)
def test_what_no_call_can_survive_stops_the_work_and_keeps_the_answers(
    status: str, mend: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    requests = [asked(str(i)) for i in range(50)]
    behave = scripted({"0": ["text"]}, otherwise=status)
    with LlmDouble(behave=behave, echo_key=True) as double:
        backend = endpoint(double, concurrency=2)
        Llm(backend, tmp_path / "answers.sqlite").ask(requests[:1])
        with pytest.raises(InputError, match=mend) as stopped:
            Llm(backend, tmp_path / "answers.sqlite").ask(requests)
        assert double.n_requests <= 5
        assert Llm(backend, tmp_path / "answers.sqlite").ask(requests[:1])[0].cached
    assert double.keys == {f"Bearer {KEY}"}
    assert KEY not in repr(backend) + "".join(traceback.format_exception(stopped.value)) + caplog.text


def test_a_server_that_repeats_the_key_does_not_get_it_into_a_reply() -> None:
    reply = one(LlmDouble(behave=lambda *_: "400", echo_key=True), asked("a"))
    assert "Bearer ***" in reply.detail
    assert KEY not in repr(reply)


def test_a_missing_key_is_one_sentence_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(InputError, match=r"OPENAI_API_KEY is not set; type `export OPENAI_API_KEY=\.\.\.`$"):
        EndpointBackend("gpt-x", "https://api.openai.com/v1")
    assert one(LlmDouble(), asked("a")).status == "ok"  # this machine's own server needs none


def test_wrong_settings_are_named() -> None:
    with pytest.raises(InputError, match=r"'api\.openai\.com' is no address"):
        EndpointBackend("gpt-x", "api.openai.com")
    with pytest.raises(InputError, match="concurrency is 0"):
        EndpointBackend("gpt-x", "https://api.openai.com/v1", concurrency=0)


# the local backend


def test_local_prompts_are_batched_in_order_by_limit_and_stop() -> None:
    batches = []

    def generate(prompts: list[str], max_tokens: int, stop: tuple[str, ...]) -> list[tuple[str, int, int]]:
        batches.append((prompts, max_tokens, stop))
        return [(prompt.upper(), len(prompt), 1) for prompt in prompts]

    backend = LocalBackend(generate, "local:tiny", {"weights": "abc"}, batch_size=2)
    requests = [asked("a"), asked("b", stop=("\n",)), asked("c"), asked("d"), asked("e", stop=("\n",))]
    llm = Llm(backend, None)
    assert [reply.value for reply in llm.ask(requests)] == ["A", "B", "C", "D", "E"]
    assert batches == [(["a", "c"], 20, ()), (["d"], 20, ()), (["b", "e"], 20, ("\n",))]
    assert (llm.usage.prompt_tokens, llm.usage.completion_tokens, llm.usage.cost_usd) == (5, 5, 0.0)


def test_a_local_model_that_rambles_after_its_json_has_answered() -> None:
    backend = LocalBackend(lambda *_: [(JSON + "\n\nAnd another thing", 5, 20)], "local:tiny", {}, 1)
    assert Llm(backend, None).ask([asked("a", schema=SCHEMA)])[0].value == VALUE


def test_a_local_model_is_greedy() -> None:
    with pytest.raises(InputError, match=r"temperature 0\.7 was asked of local:tiny"):
        Llm(LocalBackend(lambda *_: [], "local:tiny", {}, 1), None).ask([asked("a", temperature=0.7)])


# reading answers


@pytest.mark.parametrize(
    "text",
    [
        JSON,
        f"```json\n{JSON}\n```",
        f"Here [as asked] it is:\n{JSON}\nI hope {{this}} helps.",
        f"<think>maybe {{}}</think>\n{JSON}",
        f"the template opened it\n</think>\n\n{JSON}",
        f'An example would be {{"score": 11, "why": ""}}, mine is {JSON}',
    ],
)
def test_json_is_found_where_models_put_it(text: str) -> None:
    assert judge(text, SCHEMA).value == VALUE


@pytest.mark.parametrize(
    ("text", "schema", "problem"),
    [
        ('{"score": 11, "why": ""}', SCHEMA, "the answer.score is outside its limits"),
        ('{"score": 3}', SCHEMA, "lacks 'why'"),
        ('{"score": "3", "why": ""}', SCHEMA, 'the answer.score is "3", not of type integer'),
        ('{"score": true, "why": ""}', SCHEMA, "not of type integer"),
        ('{"score": 3, "why": "", "x": 1}', SCHEMA, "'x', which the schema does not name"),
        ('{"score": NaN, "why": ""}', SCHEMA, "holds no JSON"),
        ("[[1, 0], [1, ", {"type": "array", "items": {"type": "integer"}}, "ends before its JSON"),
        ("[1, 2]", {"type": "array", "items": {"enum": [0, 1]}}, r"the answer\[1\] is 2, not one of \[0, 1\]"),
        ("[true]", {"type": "array", "items": {"enum": [0, 1]}}, "is true, not one of"),
        ("[1, 2]", {"type": "array", "maxItems": 1}, "outside its limits"),
        ('""', {"type": "string", "minLength": 1}, "outside its limits"),
        ("[" * 100_000, {"type": "array"}, "JSON"),
        ("3 or 4", {"type": "integer"}, "holds no JSON"),
    ],
)
def test_what_does_not_fit_the_schema_is_told_where(text: str, schema: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        decode(text, schema)


def test_a_schema_keyword_that_is_not_checked_is_not_accepted() -> None:
    with pytest.raises(AssertionError, match="anyOf"):
        mismatch(1, {"anyOf": [{"type": "string"}]})


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't assist with that request.",
        "I’m sorry, I can’t help with that.",
        "Sorry, but I cannot provide this.",
        "I cannot provide a description of this content.",
        "I am unable to analyze this content.",
        "As an AI language model, I cannot do so.",
        "抱歉，我无法协助处理该请求。",
        "很抱歉，但我不能提供这些内容。",
        "作为一个人工智能语言模型，我不能回答。",
    ],
)
def test_refusals_are_known_by_their_openings(text: str) -> None:
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "Sorry and other words of apology",
        "refusals such as \"I'm sorry, but I can't help with that\"",
        "I, the first person pronoun, before verbs of inability",
        "抱歉、对不起等道歉用语",
        "the </think> tag that ends a model's reasoning",
    ],
)
def test_explanations_of_apologies_are_not_refusals(text: str) -> None:
    assert judge(text, None) == ("ok", text, "")


def test_thoughts_without_an_answer_are_none() -> None:
    assert judge("<think>it may be about", None).status == "unparsed"


def test_the_door_opens_fast() -> None:
    """Neither the SDK nor torch is imported before they are needed."""
    check = "import sys, safesail.interpretation.llm; sys.exit(any(m in sys.modules for m in ('openai', 'torch')))"
    assert subprocess.run([sys.executable, "-c", check], cwd=Path(__file__).parents[1]).returncode == 0
