"""The simulation benchmark: its arithmetic, its simulated endpoint over HTTP, and its command line."""

import importlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from llm_double import COMPLETION_TOKENS, PROMPT_TOKENS, LlmDouble
from planted import ACTIVE_ABOVE, MEANINGS, Simulator, excerpts_for, perfect, planted_run, planted_texts

from safesail.errors import InputError
from safesail.interpretation.excerpts import units_of
from safesail.interpretation.llm import EndpointBackend, Llm
from safesail.interpretation.simulate import Job, Simulated, simulate
from safesail.recipe import ScoreSection

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"
sys.path.insert(0, str(SCRIPTS))  # where the scripts find each other; it is no package

bench, benchmark = map(importlib.import_module, ("bench_simulation", "benchmark"))

ALONE = ScoreSection(backend="endpoint", model="simulated")
SHARED = ALONE.model_copy(update={"neurons_per_request": 3})


def job(number: int, level: Any, n_texts: int = 12) -> Job:
    meaning = MEANINGS[number]
    units = units_of(excerpts_for(meaning, planted_texts(n_texts, MEANINGS[:3])), level, 5, ACTIVE_ABOVE)
    return Job(f"layers.0.mlp/{number}", "en", meaning.description, units)


def cases() -> list[Any]:
    """Three neurons in the three ways, all on the same texts."""
    tokens, segments = ([job(i, level) for i in range(3)] for level in ("token", "segment"))
    return [
        bench.Case(bench.TOKEN, "token", tokens, ALONE, None),
        bench.Case(bench.SEGMENT, "segment", segments, ALONE, 0.45),
        bench.Case("shared", "segment", segments, SHARED, 0.25),
    ]


def count(text: str, add_special_tokens: bool) -> dict[str, list[int]]:
    """A tokenizer for which every character is a token."""
    return {"input_ids": [1] * len(text)}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS / "bench_simulation.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


# arithmetic


def test_ranks_share_ties():
    assert bench.ranks(torch.tensor([0.5, 0.1, 0.5, 0.9])).tolist() == [2.5, 1, 2.5, 4]


def test_agreement_leaves_out_neurons_without_a_score():
    """0.1, 0.2, 0.4 against 1, 2, 3: deviations (-4, -1, 5)/30 and (-1, 0, 1), r = (9/30) / sqrt(42/900 · 2)."""
    one, other = [0.1, 0.2, None, 0.4, 0.9], [1.0, 2.0, 9.0, 3.0, None]
    found = bench.agreement(one, other)
    assert found["pearson"] == pytest.approx(0.98198, abs=1e-5)
    assert found["spearman"] == pytest.approx(1.0)
    assert bench.agreement([None], [1.0]) == dict.fromkeys(found)


def test_output_tokens_count_by_their_price():
    said = [Simulated(None, "ok", "", 100, 10, None), Simulated(None, "ok", "", 50, 5, None)]
    assert bench.weighted(said, 4) == 210  # 150 + 4 · 15
    assert bench.weighted(said, 1) == 165


def test_neurons_are_taken_once_for_every_explanation():
    def row(number: int, text: str | None, status: str = "ok", language: str = "en") -> dict[str, Any]:
        return {"neuron_id": f"layers.{number % 2}.mlp/{number}", "explanation": text, "status": status} | {
            "language": language
        }

    rows = [row(1, "a"), row(1, "甲", language="zh"), row(2, "a"), row(3, None, "refused"), row(4, "b"), row(5, "c")]
    assert [r["neuron_id"] for r in bench.chosen_rows(rows, 3)] == [
        "layers.1.mlp/1",
        "layers.0.mlp/4",
        "layers.1.mlp/5",
    ]
    with pytest.raises(InputError, match="--neurons 4 was given, but 3 neurons have an explanation of their own"):
        bench.chosen_rows(rows, 4)
    groups = bench.groups_of(bench.chosen_rows(rows, 3), ["layers.0.mlp", "layers.1.mlp"], 8)
    assert [[r["explanation"] for r in group] for group in groups] == [["a", "c"], ["b"]]


def test_the_channel_replaces_the_share_it_is_told():
    truth = torch.tensor([1.0] * 100 + [0.0] * 900)
    assert bench.noisy(truth, 0.0, "s") == truth.tolist()
    said = bench.noisy(truth, 0.5, "s")
    assert said == bench.noisy(truth, 0.5, "s")
    # Half are replaced by draws that are 1 in a tenth of the cases: 100 · 0.5 · 0.9 = 45 of the ones become 0.
    assert 30 <= sum(s == 0 for s in said[:100]) <= 60
    assert 30 <= sum(s == 1 for s in said[100:]) <= 60  # 900 · 0.5 · 0.1 = 45


# the simulated endpoint


def test_the_three_ways_are_asked_over_http_and_every_token_is_counted_once():
    made = cases()
    with bench.SimulatedEndpoint(bench.Book(made), count) as endpoint:
        llm = Llm(EndpointBackend("simulated", endpoint.base_url), None)
        simulated = [simulate(case.jobs, case.level, case.section, llm) for case in made]
        told = endpoint.n_requests, endpoint.prompt_tokens, endpoint.completion_tokens
    records = bench.records_of(made, simulated, 4, "three planted neurons")
    assert tuple(sum(r[key] for r in records) for key in ("n_requests", "prompt_tokens", "completion_tokens")) == told
    token, segment, shared = records
    assert token["n_requests"] == 36  # 12 texts of 3 neurons
    assert segment["n_requests"] == 6  # 96 segments at 60 a request, of 3 neurons
    assert shared["n_requests"] == 2
    assert segment["cost_share"] == pytest.approx(
        (segment["prompt_tokens"] + 4 * segment["completion_tokens"])
        / (token["prompt_tokens"] + 4 * token["completion_tokens"])
    )
    assert token["cost_share"] == 1
    assert shared["cost_share"] < segment["cost_share"] < token["cost_share"]
    assert "pearson" not in token
    assert all(record["n_scored"] == 3 for record in records)


def test_a_neuron_of_which_nothing_is_replaced_scores_one_in_every_way():
    made = cases()
    assert sorted(bench.Book(made).replaced.values()) == pytest.approx([1 / 6, 3 / 6, 5 / 6])
    honest = bench.Book(made, replaced={job.neuron_id: 0.0 for job in made[0].jobs})
    with bench.SimulatedEndpoint(honest, count) as endpoint:
        llm = Llm(EndpointBackend("simulated", endpoint.base_url), None)
        for case in made:
            for job, said in zip(case.jobs, simulate(case.jobs, case.level, case.section, llm), strict=True):
                assert said.predicted is not None
                assert said.predicted.tolist() == job.units.truth.tolist()
                assert bench.score(job, said) == pytest.approx(1)


# the command line


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with twelve planted neurons."""
    return planted_run(tmp_path_factory.mktemp("planted"), ["segment-llm"]).folder


def test_a_run_is_measured_and_the_json_holds_what_is_printed(finished: Path, tmp_path: Path):
    file = tmp_path / "simulation.json"
    done = run(str(finished), "--neurons", "12", "--shared", "4", "--threads", "1", "--json", str(file))
    assert done.returncode == 0, done.stderr
    assert "answers are simulated; tokens are counted with the subject model's tokenizer" in done.stdout
    (only,) = json.loads(file.read_text())["runs"]
    assert benchmark.render(only["records"]) in done.stdout
    token, segment, shared = only["records"]
    assert [r["statuses"] for r in only["records"]] == [{"ok": 12}] * 3
    assert shared["name"] == "segment-level, 4 neurons a prompt"
    # Of the 144 texts of the score half 4 hold no active word; 16 silent texts a neuron. 40 tokens, 8 segments a text.
    assert token["n_units"] == (140 + 12 * 16) * 40
    assert segment["n_units"] == (140 + 12 * 16) * 8
    assert shared["n_units"] == 4 * (140 + 3 * 4) * 8  # four neurons on the active texts of all, 4 silent ones a group
    assert token["n_requests"] == 140 + 12 * 16
    assert segment["n_requests"] == 12 * 4  # about 220 segments, 60 a request
    assert shared["n_requests"] == 3 * 7  # about 405 segments, for three groups
    assert segment["cost_share"] <= segment["cost_limit"] == 0.45
    assert shared["cost_share"] <= shared["cost_limit"] == 0.25


def test_a_model_of_this_machine_adds_a_table_of_its_own(finished: Path, tiny_model: Path, tmp_path: Path):
    file, model = tmp_path / "simulation.json", tmp_path / "tiny-llama"
    shutil.copytree(tiny_model, model)
    settings = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": 4096}))
    options = ("--neurons", "2", "--threads", "1", "--local", str(model), "--json", str(file))
    done = run(str(finished), *options)
    assert done.returncode == 0, done.stderr
    *_, token, segment = json.loads(file.read_text())["runs"][0]["records"]
    assert token["case"] == segment["case"] == "2 neurons of demo, logits of tiny-llama"
    assert [record["statuses"] for record in (token, segment)] == [{"ok": 2}] * 2
    assert token["completion_tokens"] == segment["completion_tokens"] == 0
    assert segment["cost_limit"] is None
    assert segment["n_units"] * 5 == token["n_units"]


def test_a_server_is_asked_and_its_own_counts_are_used(finished: Path, tmp_path: Path):
    command = [str(finished), "--neurons", "3", "--shared", "3", "--threads", "1", "--model", "planted"]
    cache, file = tmp_path / "answers.sqlite", tmp_path / "simulation.json"
    with LlmDouble(answer=Simulator(perfect)) as double:
        command += ["--base-url", double.base_url, "--cache", str(cache), "--json", str(file)]
        first = run(*command)
        assert first.returncode == 0, first.stderr
        assert "simulated" not in first.stdout.partition("\n")[2]
        n_asked, records = double.n_requests, json.loads(file.read_text())["runs"][0]["records"]
        again = run(*command)
        assert double.n_requests == n_asked  # every answer was in the cache
    assert again.stdout.partition("\n")[2] == first.stdout.partition("\n")[2]
    assert sum(record["n_requests"] for record in records) == n_asked
    assert sum(record["prompt_tokens"] for record in records) == PROMPT_TOKENS * n_asked
    assert sum(record["completion_tokens"] for record in records) == COMPLETION_TOKENS * n_asked
    assert [record["mean_score"] for record in records] == pytest.approx([1, 1, 1])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--neurons", "61"], "--neurons 61 was given, but 12 neurons have an explanation of their own"),
        (["--model", "x"], "--base-url and --model name a server together"),
        (["--shared", "0"], "--shared was given 0; it takes a number of at least 1"),
    ],
)
def test_a_mistake_ends_with_a_sentence(finished: Path, options: list[str], said: str):
    done = run(str(finished), *options)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_folder_that_is_no_run_is_named(tmp_path: Path):
    done = run(str(tmp_path))
    assert done.returncode == 2
    assert "has no run.json" in done.stderr


def test_help_says_what_is_needed():
    done = run("--help")
    assert done.returncode == 0, done.stderr
    assert "--base-url" in done.stdout
