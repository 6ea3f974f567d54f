"""The door to language models: every answer has one status, is paid for once, and the key stays inside."""

import asyncio
import logging
import math
import os
import signal
import sqlite3
import subprocess
import sys
import textwrap
import threading
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import llm_double
import pytest
from llm_double import COMPLETION_TOKENS, PROMPT_TOKENS, LlmDouble, prompt_of, scripted

from safesail.errors import InputError
from safesail.interpretation.answers import decode, is_refusal, judge, mismatch
from safesail.interpretation.cache import AnswerCache, answer_key
from safesail.interpretation.dialect import Complaint, Dialect, adapted
from safesail.interpretation.exchange import SLOT
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


def test_a_server_says_how_long_to_wait() -> None:
    double = LlmDouble(
        behave=scripted({"a": ["429", "text"]}), retry_after_ms=900
    )  # by itself the SDK waits half of it
    assert one(double, asked("a")).value == "said: a"
    assert double.arrived[1] - double.arrived[0] > 0.85


# servers that know less


def test_structured_answers_fall_back_to_json_and_then_to_text_once_per_session() -> None:
    for formats, types in (
        (("json_object",), ["json_schema", "json_object", "json_object", "json_object"]),
        ((), ["json_schema", "json_object", "json_object", None, None]),
    ):
        with LlmDouble(answer=lambda body: f"```json\n{JSON}\n```", formats=formats) as double:
            llm = Llm(endpoint(double), None)
            assert [llm.ask([asked(prompt, schema=SCHEMA)])[0].value for prompt in "ab"] == [VALUE, VALUE]
        assert [body.get("response_format", {}).get("type") for body in double.bodies] == types
        assert '"additionalProperties": false' in prompt_of(double.bodies[-1])


def test_a_schema_beside_json_object_is_used_where_the_server_takes_it() -> None:
    with LlmDouble(answer=lambda body: JSON, formats=("json_object",), schema_beside=True) as double:
        llm = Llm(endpoint(double), None)
        assert [llm.ask([asked(prompt, schema=SCHEMA)])[0].value for prompt in "ab"] == [VALUE, VALUE]
    formats = [body["response_format"] for body in double.bodies]
    assert [each["type"] for each in formats] == ["json_schema", "json_object", "json_object"]
    assert [each["schema"] for each in formats[1:]] == [SCHEMA, SCHEMA]
    assert prompt_of(double.bodies[-1]) == "b"


def test_many_calls_learn_the_fallback_at_once() -> None:
    with LlmDouble(answer=lambda body: JSON, formats=()) as double:
        replies = Llm(endpoint(double), None).ask([asked(str(i), schema=SCHEMA) for i in range(12)])
    assert {reply.status for reply in replies} == {"ok"}
    assert double.billed == 12


def test_reasoning_models_are_asked_in_their_way() -> None:
    double = LlmDouble(unknown=("max_tokens", "temperature", "stop"))
    assert one(double, asked("a", stop=("\n",))).status == "ok"
    assert set(double.bodies[-1]) == {"model", "messages", "max_completion_tokens"}


# log-probabilities


def spelt(text: str) -> list[tuple[str, dict[str, float]]]:
    return [(letter, {letter: -0.1, "x": -2.5}) for letter in text]


def test_log_probabilities_come_with_the_answer_where_they_are_asked_for_and_offered(tmp_path: Path) -> None:
    request = asked("a", logprobs=True)
    with LlmDouble(answer=lambda body: "ok", logprobs=spelt) as double:
        llm = Llm(endpoint(double), tmp_path / "answers.sqlite")
        [reply] = llm.ask([request])
        assert reply.value == "ok"
        assert reply.logprobs == [["o", {"o": -0.1, "x": -2.5}], ["k", {"k": -0.1, "x": -2.5}]]
        assert llm.ask([request]) == [reply._replace(cached=True)]
        [without] = llm.ask([asked("a")])
        assert without == Reply("ok", "ok", "", PROMPT_TOKENS, COMPLETION_TOKENS, None)
    assert [(body.get("logprobs"), body.get("top_logprobs")) for body in double.bodies] == [(True, 10), (None, None)]
    assert not any("echo" in body for body in double.bodies)


def test_a_token_that_is_not_among_the_likeliest_has_its_own_log_probability_too() -> None:
    double = LlmDouble(answer=lambda body: "k", logprobs=lambda text: [("k", {"y": -0.2})])
    assert one(double, asked("a", logprobs=True)).logprobs == [["k", {"y": -0.2, "k": -9999.0}]]


def test_a_server_without_log_probabilities_answers_without() -> None:
    plain = Reply("ok", "said: a", "", PROMPT_TOKENS, COMPLETION_TOKENS, None)
    assert one(LlmDouble(), asked("a", logprobs=True)) == plain
    with LlmDouble(unknown=("logprobs",)) as double:
        backend = endpoint(double)
        assert Llm(backend, None).ask([asked("a", logprobs=True), asked("b", logprobs=True)])[0] == plain
        sent_before = double.n_requests
        Llm(backend, None).ask([asked("c", logprobs=True)])
        assert double.n_requests == sent_before + 1, "it was learnt once"
    assert not {"logprobs", "top_logprobs"} & double.bodies[-1].keys()


@pytest.mark.parametrize("status_code", [400, 403, 422, 500])
def test_a_complaint_about_log_probabilities_is_no_wrong_key(status_code: int) -> None:
    complaint = Complaint(status_code, None, None, "You are not allowed to request logprobs from this model.")
    learnt = adapted(Dialect(), complaint, asked("a", logprobs=True))
    assert learnt == Dialect(left_out=frozenset({"logprobs", "top_logprobs"}))
    assert adapted(Dialect(), complaint, asked("a")) is None


# the cache


def test_requests_that_ask_for_nothing_new_have_the_keys_they_always_had() -> None:
    """Computed before `choices` and `logprobs` existed: what was paid for then is found now."""
    identity = {"kind": "endpoint", "model": "double"}
    request = Request(
        (Message("system", "s"), Message("user", "ü")), max_tokens=7, stop=("\n",), schema={"type": "object"}
    )
    assert answer_key(identity, request.as_json()) == (
        "c40842d723dba343d0e2095bd7297b6a7a7fcb7894f8ac015df75bfd4322c253"
    )
    keys = {
        answer_key(identity, each.as_json())
        for each in (request, request._replace(logprobs=True), request._replace(choices=("no", "yes")))
    }
    assert len(keys) == 3


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
        "unbilled": 1,
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


def test_a_run_killed_with_calls_in_flight_asks_again_for_those_alone(tmp_path: Path) -> None:
    script = """
        import sys
        from pathlib import Path
        from safesail.interpretation.llm import EndpointBackend, Llm, Message, Request
        llm = Llm(EndpointBackend("double", sys.argv[1], concurrency=6), Path(sys.argv[2]))
        llm.ask([Request((Message("user", str(i)),), max_tokens=20) for i in range(50)])
    """
    started: list[subprocess.Popen] = []
    lock = threading.Lock()
    n_seen = 0

    def kill_at_the_25th(prompt: str, attempt: int) -> str:
        nonlocal n_seen
        with lock:
            n_seen += 1
            if n_seen == 25:
                os.kill(started[0].pid, signal.SIGKILL)
        return "text"

    cache = tmp_path / "answers.sqlite"
    with LlmDouble(behave=kill_at_the_25th) as double:
        command = [sys.executable, "-c", textwrap.dedent(script), double.base_url, str(cache)]
        with lock:  # no call is answered before its process is known
            started.append(subprocess.Popen(command, env=os.environ, cwd=Path(__file__).parents[1]))
        assert started[0].wait(120) == -signal.SIGKILL
        replies = Llm(endpoint(double), cache).ask([asked(str(i)) for i in range(50)])
    assert [reply.value for reply in replies] == [f"said: {i}" for i in range(50)]
    times = Counter(map(prompt_of, double.bodies))
    n_kept = sum(reply.cached for reply in replies)
    assert n_kept >= 25 - 6, "all but the calls in flight were kept"
    assert sum(times.values()) <= 50 + 6
    assert {times[str(i)] for i, reply in enumerate(replies) if reply.cached} == {1}
    assert {times[str(i)] for i, reply in enumerate(replies) if not reply.cached} <= {1, 2}


def test_an_answer_that_cannot_be_kept_is_one_sentence(tmp_path: Path) -> None:
    with AnswerCache(tmp_path / "answers.sqlite") as cache:
        cache._rows.execute("PRAGMA query_only = ON")
        for _ in range(2):
            with pytest.raises(InputError, match=r"answers\.sqlite could not take an answer \(attempt to write"):
                cache.put({"a": {}})


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


def test_no_call_in_flight_is_lost_when_another_stops_the_work(tmp_path: Path) -> None:
    """One call learns that the credit is used up while three others, already paid for, are on their way."""
    arrived, stopped = threading.Barrier(4), threading.Event()

    def behave(prompt: str, attempt: int) -> str:
        arrived.wait(30)
        if prompt == "0":
            threading.Timer(0.3, stopped.set).start()  # time enough to read this one's answer first
            return "402"
        stopped.wait(30)
        return "text"

    cache = tmp_path / "answers.sqlite"
    requests = [asked(prompt) for prompt in ("0", "1", "2", "3")]
    with LlmDouble(behave=behave) as double:
        llm = Llm(endpoint(double, concurrency=4), cache)
        with pytest.raises(InputError, match="no credit left"):
            llm.ask(requests)
        assert llm.usage.prompt_tokens == double.prompt_tokens == 3 * PROMPT_TOKENS
        assert [reply.cached for reply in Llm(endpoint(double), cache).ask(requests[1:])] == [True] * 3


# under load


STORM = {  # 40 % of the prompts meet one of these; what comes of them in the end, and whether it is billed
    ("429", "json"): ("ok", True),
    ("500", "429", "json"): ("ok", True),
    ("timeout", "json"): ("ok", True),
    ("truncated",): ("unparsed", True),
    ("prose",): ("unparsed", True),
    ("refusal",): ("refused", True),
    ("refusal_field",): ("refused", True),
    ("500", "refusal"): ("refused", True),
    ("429",): ("failed", False),
    ("500",): ("failed", False),
    ("no_choices",): ("failed", False),
    ("moderated",): ("refused", False),
}


def words(prompt: str) -> int:
    return len(prompt.split())


def test_three_hundred_calls_in_a_storm_end_each_in_one_status_and_the_ledger_is_the_bill(tmp_path: Path) -> None:
    """Prompts and answers have different lengths, so an answer that was lost or counted twice shows in the sums."""
    prompts = [f"prompt {i} " + "x " * (i % 17) for i in range(300)]
    troubles = [list(STORM)[i // 5 * 2 % 12 + (i % 5 > 2)] if i % 5 in (2, 4) else ("json",) for i in range(300)]
    ends = [STORM.get(trouble, ("ok", True)) for trouble in troubles]
    script = {prompt: list(trouble) for prompt, trouble in zip(prompts, troubles, strict=True)}
    script[prompts[2]] = ["timeout"]  # one that never answers at all
    ends[2] = ("failed", False)
    assert sum(words != ["json"] for words in script.values()) == 120
    prices = {"usd_per_million_prompt_tokens": 1.0, "usd_per_million_completion_tokens": 4.0}
    options = {"concurrency": 32, "max_retries": 2, "timeout_seconds": 3}

    def usage(body: dict[str, Any], text: str) -> tuple[int, int]:
        return words(prompt_of(body)), len(text)

    together = threading.Barrier(32)

    def behave(prompt: str, attempt: int) -> str:
        if attempt == 0 and prompt in prompts[:32]:
            together.wait(30)  # the first 32 calls are all in flight before one is answered
        return scripted(script)(prompt, attempt)

    seen: list[int] = []
    requests = [asked(prompt, schema=SCHEMA) for prompt in prompts]
    with LlmDouble(answer=lambda body: JSON, behave=behave, usage=usage) as double:
        llm = Llm(endpoint(double, **options, **prices), tmp_path / "answers.sqlite")
        replies = llm.ask(requests, progress=seen.append)
        assert [reply.status for reply in replies] == [status for status, _ in ends]
        assert [reply.value is not None for reply in replies] == [status == "ok" for status, _ in ends]
        n_billed = sum(billed for _, billed in ends)
        assert double.billed == n_billed
        assert (llm.usage.calls, llm.usage.unbilled, llm.usage.cached) == (300, 300 - n_billed, 0)
        assert sum(llm.usage.by_status.values()) == sum(seen) == 300
        assert llm.usage.prompt_tokens == double.prompt_tokens == sum(reply.prompt_tokens for reply in replies)
        assert llm.usage.completion_tokens == double.completion_tokens
        assert llm.usage.cost_usd == pytest.approx((double.prompt_tokens + 4 * double.completion_tokens) / 1e6)
        assert double.most_at_once == 32

        double.bodies.clear()
        double.behave = lambda prompt, attempt: "json"
        again = Llm(endpoint(double, **options, **prices), tmp_path / "answers.sqlite")
        after = again.ask(requests)
    failed = [prompt for prompt, (status, _) in zip(prompts, ends, strict=True) if status == "failed"]
    assert sorted(map(prompt_of, double.bodies)) == sorted(failed)
    assert (again.usage.calls, again.usage.cached) == (len(failed), 300 - len(failed))
    assert double.billed == n_billed + len(failed)
    assert llm.usage.prompt_tokens + again.usage.prompt_tokens == double.prompt_tokens
    for before, reply in zip(replies, after, strict=True):
        assert reply == before._replace(cached=True) or (before.status == "failed" and reply.status == "ok")


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
    assert KEY.encode() not in (tmp_path / "answers.sqlite").read_bytes()
    assert double.keys == {f"Bearer {KEY}"}
    assert KEY not in repr(backend) + "".join(traceback.format_exception(stopped.value)) + caplog.text


def test_a_server_that_repeats_the_key_does_not_get_it_into_a_reply() -> None:
    reply = one(LlmDouble(behave=lambda *_: "400", echo_key=True), asked("a"))
    assert "Bearer ***" in reply.detail
    assert KEY not in repr(reply)


@pytest.mark.parametrize("behaviour", ["text", "refusal_field", "moderated", "400"])
def test_no_answer_brings_the_key_into_the_cache(
    behaviour: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr(llm_double, "REFUSAL", f"I will not, {KEY}.")
    double = LlmDouble(answer=lambda body: f"you gave me {KEY}", behave=lambda *_: behaviour, echo_key=True)
    with double:
        [reply] = Llm(endpoint(double), tmp_path / "answers.sqlite").ask([asked("a")])
    assert "***" in f"{reply.value} {reply.detail}"
    assert KEY not in repr(reply) + caplog.text
    assert KEY.encode() not in (tmp_path / "answers.sqlite").read_bytes()


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


# judging by a local model


def judging(
    weights: dict[str, list[list[float]]], batches: list[Any] | None = None, batch_size: int = 2
) -> LocalBackend:
    def judge(prompts: list[str], choices: tuple[str, ...]) -> list[tuple[list[list[float]], int]]:
        if batches is not None:
            batches.append((prompts, choices))
        return [(weights[prompt], len(prompt)) for prompt in prompts]

    return LocalBackend(lambda prompts, *_: [(p.upper(), 1, 1) for p in prompts], "local:tiny", {}, batch_size, judge)


def test_choices_are_judged_at_every_slot_and_kept(tmp_path: Path) -> None:
    a, b, c = f"a {SLOT} and {SLOT}", f"b {SLOT}", f"c {SLOT}"
    batches: list[Any] = []
    llm = Llm(judging({a: [[1.0, 3.0], [0.2, 0.2]], b: [[0.5, 0.5]], c: [[0.0, 2.0]]}, batches), tmp_path / "a.sqlite")
    yes = {"choices": ("no", "yes")}
    requests = [asked(a, **yes), asked("text"), asked(b, **yes), asked(c, **yes)]
    replies = llm.ask(requests)
    assert [reply.value for reply in replies] == [[[0.25, 0.75], [0.5, 0.5]], "TEXT", [[0.5, 0.5]], [[0.0, 1.0]]]
    assert batches == [([a, b], ("no", "yes")), ([c], ("no", "yes"))]
    n_prompt = len(a) + 1 + len(b) + len(c)
    assert (llm.usage.prompt_tokens, llm.usage.completion_tokens, llm.usage.cost_usd) == (n_prompt, 1, 0.0)
    assert llm.ask(requests) == [reply._replace(cached=True) for reply in replies]
    assert len(batches) == 2


def test_what_is_no_probability_is_no_number() -> None:
    replies = Llm(judging({f"{i} {SLOT}": [pair] for i, pair in enumerate([[math.nan, 1.0], [0.0, 0.0]])}), None).ask(
        [asked(f"{i} {SLOT}", choices=("no", "yes")) for i in range(2)]
    )
    assert [(reply.status, reply.value) for reply in replies] == [("unparsed", None)] * 2


def test_a_judge_that_skips_a_slot_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="2 slots × 2 choices"):
        Llm(judging({f"{SLOT}{SLOT}": [[1.0, 0.0]]}), None).ask([asked(f"{SLOT}{SLOT}", choices=("no", "yes"))])


def test_who_cannot_judge_says_so_before_anything_is_sent() -> None:
    requests = [asked("a"), asked(f"a {SLOT}", choices=("no", "yes"))]
    with LlmDouble() as double, pytest.raises(InputError, match=r"openai:double is an endpoint"):
        Llm(endpoint(double), None).ask(requests)
    assert double.n_requests == 0
    with pytest.raises(InputError, match="local:x was loaded without a judge"):
        Llm(LocalBackend(lambda *_: [], "local:x", {}, 1), None).ask(requests)


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
