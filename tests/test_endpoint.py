"""Explaining and scoring by an OpenAI-compatible endpoint, driven over HTTP through the whole pipeline."""

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from llm_double import COMPLETION_TOKENS, PROMPT_TOKENS, LlmDouble, prompt_of

from safesail.cli import main
from safesail.neurons import NeuronDatabase
from safesail.repository import read_table
from safesail.run import Run

REPOSITORY = Path(__file__).resolve().parent.parent
EVIL = "| pipe `tick` <script>alert(1)</script> [link](javascript:alert(1))"


def answer(body: dict) -> str:
    """A perfect simulator for explanations of the form `the letter x`, and an explainer that gives such."""
    prompt = prompt_of(body)
    if "<pieces>" in prompt:
        [letter] = re.findall(r"the letter (\w)", prompt)
        pieces = re.findall(r"^(\d+): (.*)$", prompt, flags=re.M)
        return json.dumps({"active": [int(number) for number, text in pieces if letter in text]})
    return json.dumps(
        {
            "explanations": {"en": f"the letter e {EVIL}", "zh": "字母 the letter e"},
            "domains": ["terror", "violence"],
            "category": "",
            "concept": "",
            "confidence": 0.9,
        }
    )


def settings_of(double: LlmDouble) -> list[str]:
    """Every latent that wins a pair is explained, so that the miniature has neurons enough."""
    return [
        "select.fdr=0.99",
        "select.min_pairs=1",
        'explain.backend="endpoint"',
        'explain.model="double"',
        'explain.languages=["en", "zh"]',
        "explain.usd_per_million_prompt_tokens=1.0",
        "explain.usd_per_million_completion_tokens=2.0",
        'score.methods=["segment-llm", "segment-lexical"]',
        'score.backend="endpoint"',
        'score.model="double"',
        f'runtime.base_url="{double.base_url}"',
    ]


def safesail(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit status of a command."""
    monkeypatch.setattr(sys, "argv", ["safesail", *arguments])
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


def run_with(
    folder: Path, double: LlmDouble, settings: list[str], monkeypatch, *more: str, options: tuple[str, ...] = ()
) -> int:
    sets = [part for setting in (*settings, *settings_of(double), *more) for part in ("--set", setting)]
    recipe = "hub/recipes/demo.toml"
    return safesail(monkeypatch, "run", recipe, "--out", str(folder), "--adopt", "--quiet", *options, *sets)


@pytest.fixture
def copied(demo_run: Path, tmp_path: Path) -> Path:
    shutil.copytree(demo_run, tmp_path / "mini")
    return tmp_path / "mini"


def test_a_release_explained_and_scored_by_an_endpoint(copied: Path, mini_settings: list[str], monkeypatch):
    with LlmDouble(answer) as double:
        assert run_with(copied, double, mini_settings, monkeypatch) == 0
        n_first = double.n_requests
        shutil.rmtree(copied / "scratch/explain")
        shutil.rmtree(copied / "scratch/score")
        assert run_with(copied, double, mini_settings, monkeypatch) == 0
        assert double.n_requests == n_first, "what was answered is not asked again"
    database = NeuronDatabase.load(copied)
    assert len(database) > 2
    for row in database:
        assert row["explanation"] == f"the letter e {EVIL}"
        assert set(row["domains"]) <= {"violence", "terror"}
        assert (row["explainer"], row["tagger"]) == ("openai:double", "openai:double")
        assert "segment-5/llm (openai:double)" in row["simulator"]
        explained = database.explanations[row["neuron_id"]]
        assert explained["zh"]["explanation"] == "字母 the letter e"
        assert explained["en"]["cost_usd"] == pytest.approx((PROMPT_TOKENS + 2 * COMPLETION_TOKENS) / 1e6)
        assert explained["zh"]["cost_usd"] == 0.0, "one request gave both"
    card = (copied / "neurons/README.md").read_text()
    assert "<script>" not in card
    assert "](javascript" not in card


def test_what_fails_is_a_status_and_never_a_number_or_a_sentence(copied: Path, mini_settings: list[str], monkeypatch):
    words = ["refusal", "prose", "json"]
    seen: dict[str, int] = {}

    def behave(prompt: str, attempt: int) -> str:
        return "prose" if "<pieces>" in prompt else words[seen.setdefault(prompt, len(seen)) % 3]

    with LlmDouble(answer, behave) as double:
        assert run_with(copied, double, mini_settings, monkeypatch) == 0
    explanations = [row for name in ("en", "zh") for row in read_table(copied / f"neurons/explanations/{name}.parquet")]
    assert {row["status"] for row in explanations} == {"ok", "refused", "unparsed"}
    assert all((row["explanation"] is None) == (row["status"] != "ok") for row in explanations)
    simulated = [row for row in read_table(copied / "neurons/scores/train.parquet") if "/llm" in row["method"]]
    assert simulated
    assert all(row["score"] is None for row in simulated)
    assert {row["status"] for row in simulated} == {"unparsed", "refused"}
    statuses = {row["neuron_id"]: row["status"] for row in explanations}
    for row in NeuronDatabase.load(copied):
        assert row["status"] == (statuses[row["neuron_id"]] if statuses[row["neuron_id"]] != "ok" else "unparsed")
        assert row["domains"] == [] or statuses[row["neuron_id"]] == "ok"


def test_a_wrong_key_stops_at_once_and_says_so(copied: Path, mini_settings: list[str], monkeypatch, capsys):
    with LlmDouble(answer, lambda prompt, attempt: "401") as double:
        assert run_with(copied, double, mini_settings, monkeypatch, "runtime.concurrency=1") == 2
        assert double.n_requests == 1
    assert "does not accept the key" in capsys.readouterr().err


def test_corpus_text_cannot_end_its_excerpt_block(copied: Path, mini_settings: list[str], monkeypatch):
    with LlmDouble(answer) as double:
        assert run_with(copied, double, mini_settings, monkeypatch, 'name="injected"') == 0
        prompts = [prompt_of(body) for body in double.bodies]
    explaining = [prompt for prompt in prompts if "<excerpts>" in prompt]
    assert explaining
    assert all(prompt.count("</excerpts>") == 1 and "⟦" in prompt for prompt in explaining)
    assert all(prompt.count("</pieces>") == 1 for prompt in prompts if "<pieces>" in prompt)


def dry_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, stage: str, folder: Path) -> dict[str, Any]:
    """The estimate of a stage's calls."""
    capsys.readouterr()
    assert safesail(monkeypatch, stage, str(folder), "--dry-run", "--json") == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("stage", ["explain", "score"])
def test_after_a_pilot_the_dry_run_tells_what_the_rest_will_use(
    stage: str, copied: Path, mini_settings: list[str], tokenizer: Any, monkeypatch, capsys
):
    """A budget makes the pilot; the server counts 1.3 times the tokens and a template, and answers as it likes."""

    def usage(body: dict[str, Any], text: str) -> tuple[int, int]:
        n_prompt = sum(len(tokenizer(message["content"])["input_ids"]) for message in body["messages"])
        return round(1.3 * n_prompt) + 20, len(tokenizer(text)["input_ids"])

    with LlmDouble(answer, usage=usage) as double:
        before = {"explain": "collect", "score": "explain"}[stage]
        options = ("--until", before)
        assert (
            run_with(copied, double, mini_settings, monkeypatch, "score.segments_per_request=20", options=options) == 0
        )
        n_before, used_before = double.n_requests, double.prompt_tokens + double.completion_tokens
        cap = (
            sum(dry_run(monkeypatch, capsys, stage, copied)[name] for name in ("prompt_tokens", "completion_tokens"))
            // 2
        )
        assert safesail(monkeypatch, stage, str(copied), "--quiet", "--budget-tokens", str(cap)) == 2
        assert "answers are kept" in capsys.readouterr().err
        n_pilot = double.n_requests - n_before
        assert n_pilot >= 3
        assert double.prompt_tokens + double.completion_tokens - used_before <= cap

        told = dry_run(monkeypatch, capsys, stage, copied)
        spent = double.prompt_tokens, double.completion_tokens
        assert safesail(monkeypatch, stage, str(copied), "--quiet") == 0
        used = double.prompt_tokens - spent[0], double.completion_tokens - spent[1]
    assert (told["n_calls"], told["calibrated_on"]) == (double.n_requests - n_before - n_pilot, n_pilot)
    assert told["n_calls"] > 2
    assert told["prompt_tokens"] == pytest.approx(used[0], rel=0.1)
    assert told["completion_tokens"] == pytest.approx(used[1], rel=0.1)
    record = Run.open(copied).record(stage)
    assert record is not None
    assert (record["usage"]["prompt_tokens"], record["usage"]["completion_tokens"]) == used
