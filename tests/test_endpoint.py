"""Explaining and scoring by an OpenAI-compatible endpoint, driven over HTTP through the whole pipeline."""

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from llm_double import COMPLETION_TOKENS, PROMPT_TOKENS, LlmDouble, prompt_of

from safesail.cli import main
from safesail.neurons import NeuronDatabase
from safesail.repository import read_table

REPOSITORY = Path(__file__).resolve().parent.parent
EVIL = "| pipe `tick` <script>alert(1)</script> [link](javascript:alert(1))"


def answer(body: dict) -> str:
    """A perfect simulator for explanations of the form `the letter x`, and an explainer that gives such."""
    prompt = prompt_of(body)
    if "<pieces>" in prompt:
        letter = re.search(r"the letter (\w)", prompt)[1]
        pieces = re.findall(r"^(\d+): (.*)$", prompt, flags=re.M)
        return json.dumps({"active": [int(number) for number, text in pieces if letter in text]})
    return json.dumps({"explanation": f"the letter e {EVIL}", "domains": ["terror", "violence"], "confidence": 0.9})


def run_with(folder: Path, double: LlmDouble, settings: list[str], monkeypatch, *more: str) -> int:
    extra = [
        'explain.backend="endpoint"',
        'explain.model="double"',
        "explain.usd_per_million_prompt_tokens=1.0",
        "explain.usd_per_million_completion_tokens=2.0",
        'score.simulators=["llm", "lexical"]',
        'score.model="double"',
        f'runtime.base_url="{double.base_url}"',
        *more,
    ]
    options = [part for setting in (*settings, *extra) for part in ("--set", setting)]
    command = ["safesail", "run", "hub/recipes/demo.toml", "--out", str(folder), "--adopt", "--quiet", *options]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0)


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
    assert len(database) > 0
    for row in database:
        assert row["explanation"] == f"the letter e {EVIL}"
        assert row["domains"] == ["violence", "terror"]
        assert (row["explainer"], row["tagger"]) == ("openai:double", "openai:double")
        assert "segment-5/llm (openai:double)" in row["simulator"]
        explained = database.explanations[row["neuron_id"]]["en"]
        assert explained["cost_usd"] == pytest.approx((PROMPT_TOKENS + 2 * COMPLETION_TOKENS) / 1e6)
    card = (copied / "neurons/README.md").read_text()
    assert "<script>" not in card
    assert "](javascript" not in card


def test_what_fails_is_a_status_and_never_a_number_or_a_sentence(copied: Path, mini_settings: list[str], monkeypatch):
    words = ["refusal", "prose", "json"]

    def behave(prompt: str, attempt: int) -> str:
        return "prose" if "<pieces>" in prompt else words[len(prompt) % 3]

    with LlmDouble(answer, behave) as double:
        assert run_with(copied, double, mini_settings, monkeypatch) == 0
    explanations = read_table(copied / "neurons/explanations/en.parquet")
    assert {row["status"] for row in explanations} == {"ok", "refused", "unparsed"}
    assert all((row["explanation"] is None) == (row["status"] != "ok") for row in explanations)
    simulated = [row for row in read_table(copied / "neurons/scores/train.parquet") if "/llm" in row["method"]]
    assert all(row["score"] is None for row in simulated)
    assert {row["status"] for row in simulated} == {"unparsed", "refused"}
    statuses = {row["neuron_id"]: row["status"] for row in explanations}
    for row in NeuronDatabase.load(copied):
        assert row["status"] == (statuses[row["neuron_id"]] if statuses[row["neuron_id"]] != "ok" else "unparsed")
        assert row["domains"] == ([] if statuses[row["neuron_id"]] != "ok" else ["violence", "terror"])


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
