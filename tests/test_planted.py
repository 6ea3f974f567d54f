"""Planted truth: latents of known meaning, simulated by a double whose errors are known, score what theory says."""

import hashlib
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from llm_double import LlmDouble
from planted import (
    ACTIVE_ABOVE,
    MEANINGS,
    TOP,
    Channel,
    Meaning,
    Simulator,
    Unit,
    by_chance,
    channel_correlation,
    errors,
    excerpts_for,
    expected_phi,
    perfect,
    planted_run,
    planted_texts,
)
from torch import Tensor

from safesail.interpretation.excerpts import Units, units_of
from safesail.interpretation.held import Held
from safesail.interpretation.llm import EndpointBackend, Llm, LocalBackend
from safesail.interpretation.score import score_stage
from safesail.interpretation.simulate import Job, Simulated, simulate, simulation_requests
from safesail.lm.activations import Activations
from safesail.lm.load import load_tokenizer
from safesail.metrics import Interval, pearson, pearson_interval
from safesail.recipe import ScoreSection
from safesail.run import Run, StageWork

Row = dict[str, Any]
LEVELS = ("token", "segment", "text")
N_TEXTS = {"token": 12, "segment": 40, "text": 80}


def units(meaning: Meaning, level: Any, seed: Any = 0, n_texts: int | None = None) -> Units:
    """Half of the texts in the meaning's script and with its words, half in that of the next meaning."""
    pair = (meaning, MEANINGS[(meaning.latent + 1) % len(MEANINGS)])
    texts = planted_texts(n_texts or N_TEXTS[level], pair, seed)
    return units_of(excerpts_for(meaning, texts), level, 5, ACTIVE_ABOVE)


def jobs_of(level: Any, meanings: tuple[Meaning, ...] = MEANINGS) -> list[Job]:
    return [Job(f"layers.0.mlp/{m.latent}", "en", m.description, units(m, level)) for m in meanings]


def ask(simulator: Simulator, jobs: list[Job], level: Any, behave: Any = None, **settings: Any) -> list[Simulated]:
    """Simulated over HTTP by the double."""
    section = ScoreSection(backend="endpoint", model="planted", **settings)
    with LlmDouble(answer=simulator, **({"behave": behave} if behave else {})) as double:
        return simulate(jobs, level, section, Llm(EndpointBackend("planted", double.base_url), None))


def predictions(simulated: list[Simulated]) -> list[Tensor]:
    """Of simulations that must all be ok."""
    assert [(s.status, s.detail) for s in simulated] == [("ok", "")] * len(simulated)
    return [s.predicted for s in simulated if s.predicted is not None]


def score(predicted: Tensor, units: Units) -> Interval:
    return pearson_interval(predicted, units.truth, units.text_of)


def through(channel: Channel, meaning: Meaning, truth: Tensor, top: int, seed: Any) -> Tensor:
    """What a channel makes of the truth, without any prompt."""
    simulator = Simulator(channel, seed)
    return torch.tensor([simulator.say(meaning, int(level), top, (i,)) for i, level in enumerate(truth)]).double()


# --- the fixture itself -------------------------------------------------------------------------------------------


def test_the_meanings_are_many_and_no_text_of_one_holds_another_by_accident():
    assert len(MEANINGS) >= 8
    assert len({meaning.description for meaning in MEANINGS}) == len(MEANINGS)
    for meaning in MEANINGS:
        for excerpt in excerpts_for(meaning, planted_texts(48, MEANINGS)):
            text, active = "".join(excerpt.units), any(s > ACTIVE_ABOVE for s in excerpt.strengths)
            words = [word for word, strength in meaning.words.items() if strength > ACTIVE_ABOVE]
            assert any(word in text for word in words) == active, (meaning.description, text)


def test_the_truth_of_a_text_written_out():
    """pistol 1.0, slingshot 0.1 (below the threshold), dagger 0.7; one token each, segments of five."""
    weapons = MEANINGS[0]
    words = ["we", "saw", "a", "pistol", "in", "the", "quiet", "garden", "near", "slingshot", "and", "dagger"]
    (excerpt,) = excerpts_for(weapons, [[unit_of(word) for word in words]])
    assert units_of([excerpt], "token", 5, ACTIVE_ABOVE).truth.tolist() == [0, 0, 0, 10, 0, 0, 0, 0, 0, 1, 0, 7]
    segments = units_of([excerpt], "segment", 5, ACTIVE_ABOVE)
    assert segments.texts == [" we saw a pistol in", " the quiet garden near slingshot", " and dagger"]
    assert segments.truth.tolist() == [1, 0, 1]
    assert units_of([excerpt], "text", 5, ACTIVE_ABOVE).truth.tolist() == [1]


def unit_of(word: str) -> Unit:
    return Unit(f" {word}", 1)


def test_texts_and_errors_are_the_same_in_every_process():
    units = planted_texts(5, MEANINGS, seed=3)[4]
    assert "".join(unit.text for unit in units[:12]) == "桌子暴雪有他他下雨暴雪暴雪今早桌子学校今早"
    wrong = through(errors(0.3), MEANINGS[0], torch.zeros(20), 1, 0).nonzero().flatten()
    assert wrong.tolist() == [2, 5, 11, 12, 14]


def test_theory_written_out():
    """p = 0.2, ε = 0.1: r = 0.2·0.9 + 0.8·0.1 = 0.26, phi = 0.16·0.8 / sqrt(0.16·0.26·0.74) = 0.128 / 0.17545."""
    assert expected_phi(0.2, 0.1, 0.1) == pytest.approx(0.72954, abs=1e-4)
    assert expected_phi(0.2, 0.0, 0.0) == pytest.approx(1.0)
    assert expected_phi(0.2, 0.5, 0.5) == pytest.approx(0.0)
    truth = torch.tensor([10.0] * 2 + [0.0] * 8)  # levels 0 and 10 alone are a binary truth
    assert channel_correlation(truth, 0.1, TOP) == pytest.approx(expected_phi(0.2, 0.1, 0.1))


def test_the_papers_example_of_a_score():
    assert pearson(torch.tensor([1.0, 0, 1, 1]), torch.tensor([1.0, 0, 1, 0])) == pytest.approx(0.57735, abs=1e-5)


# --- by the endpoint ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
def test_a_perfect_simulator_scores_one(level: str):
    jobs = jobs_of(level)
    for job, predicted in zip(jobs, predictions(ask(Simulator(perfect), jobs, level)), strict=True):
        assert predicted.tolist() == job.units.truth.tolist()
        assert score(predicted, job.units).value == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("level", LEVELS)
def test_a_simulator_that_never_looks_scores_zero(level: str):
    """Of n independent pairs the correlation has mean 0 and standard deviation 1 / sqrt(n - 1)."""
    jobs = jobs_of(level)
    standardised = []
    for job, predicted in zip(jobs, predictions(ask(Simulator(by_chance(0.3)), jobs, level)), strict=True):
        found = score(predicted, job.units)
        assert found.value is not None
        standardised.append(found.value * (len(job.units.truth) - 1) ** 0.5)
    assert max(map(abs, standardised)) < 3.5
    assert abs(sum(standardised)) / len(standardised) ** 0.5 < 3  # their mean has standard deviation 1 / sqrt(12)


@pytest.mark.parametrize("level", ["segment", "text"])
@pytest.mark.parametrize(("fp", "fn"), [(0.1, 0.1), (0.2, 0.2), (0.1, 0.0), (0.0, 0.3)])
def test_known_errors_score_what_theory_says(level: str, fp: float, fn: float):
    simulator, jobs = Simulator(errors(fp, fn)), jobs_of(level)
    predicted = predictions(ask(simulator, jobs, level))
    inside = [
        within(score(p, job.units), expected_phi(float(job.units.truth.mean()), fp, fn))
        for job, p in zip(jobs, predicted, strict=True)
    ]
    assert sum(inside) >= len(jobs) - 3  # of 12 intervals of 95 %, more than three miss once in 500 times
    said, truth, text_of = together(jobs, predicted)
    assert is_near(pearson_interval(said, truth, text_of), expected_phi(float(truth.mean()), fp, fn))


@pytest.mark.parametrize("rate", [0.05, 0.2])
def test_known_errors_in_the_levels_of_tokens_score_what_theory_says(rate: float):
    jobs = jobs_of("token")
    predicted = predictions(ask(Simulator(errors(rate)), jobs, "token"))
    said, truth, text_of = together(jobs, predicted)
    assert set(truth.tolist()) == {0, 1, 4, 7, 10}
    assert is_near(pearson_interval(said, truth, text_of), channel_correlation(truth, rate, TOP))


def within(found: Interval, theory: float) -> bool:
    assert found.low is not None
    assert found.high is not None
    assert found.high - found.low < 0.5  # an interval that says nothing proves nothing
    return found.low <= theory <= found.high


def is_near(found: Interval, theory: float) -> bool:
    """Within 3.3 standard errors, which one draw in a thousand is not; the interval is 2 · 1.96 of them wide."""
    assert found.value is not None
    assert found.low is not None
    assert found.high is not None
    assert found.high - found.low < 0.15
    return abs(found.value - theory) <= 3.3 * (found.high - found.low) / 3.92


def together(jobs: list[Job], predicted: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """All neurons' predictions and truths, and texts numbered apart."""
    texts = torch.cat([job.units.text_of + 1000 * i for i, job in enumerate(jobs)])
    return torch.cat(predicted), torch.cat([job.units.truth for job in jobs]), texts


@pytest.mark.parametrize("level", LEVELS)
def test_the_confusion_counts_are_the_doubles_own(level: str):
    simulator, jobs = Simulator(errors(0.15, 0.3)), jobs_of(level)
    for job, predicted in zip(jobs, predictions(ask(simulator, jobs, level)), strict=True):
        pairs = zip(job.units.truth.tolist(), predicted.tolist(), strict=True)
        assert Counter((true > 0, said > 0) for true, said in pairs) == simulator.said[job.explanation]


@pytest.mark.parametrize("level", LEVELS)
def test_how_pieces_are_spread_over_requests_changes_nothing(level: str):
    jobs = jobs_of(level)
    one, other = (predictions(ask(Simulator(errors(0.2)), jobs, level, segments_per_request=size)) for size in (60, 23))
    assert [p.tolist() for p in one] == [p.tolist() for p in other]


def test_log_probabilities_of_the_right_digits_score_one_and_without_them_the_digits_count():
    """A server sure of 1 by 0.8 and of 0 by 0.9: P(1) is 0.8 / (0.8 + 0.2), or 0.1 / (0.1 + 0.9)."""

    def logprobs(text: str) -> list[tuple[str, dict[str, float]]]:
        sure = {"1": {"1": math.log(0.8), "0": math.log(0.2)}, "0": {"0": math.log(0.9), "1": math.log(0.1)}}
        return [(letter, sure.get(letter, {letter: 0.0})) for letter in text]

    jobs, section = jobs_of("segment", MEANINGS[:4]), ScoreSection(backend="endpoint", model="planted", logprobs=True)
    for offered, said in ((logprobs, [0.1, 0.8]), (None, [0, 1])):
        with LlmDouble(answer=Simulator(perfect), logprobs=offered) as double:
            simulated = simulate(jobs, "segment", section, Llm(EndpointBackend("planted", double.base_url), None))
        for job, predicted in zip(jobs, predictions(simulated), strict=True):
            assert predicted.tolist() == pytest.approx([said[int(true)] for true in job.units.truth])
            assert score(predicted, job.units).value == pytest.approx(1, abs=1e-6)


def test_neurons_that_share_a_prompt_are_told_apart():
    """Four latents on the same texts, with errors of their own: what is said of each does not depend on the others."""
    group = MEANINGS[2:6]
    texts = planted_texts(24, group)
    jobs = [
        Job(
            f"layers.0.mlp/{m.latent}",
            "en",
            m.description,
            units_of(excerpts_for(m, texts), "segment", 5, ACTIVE_ABOVE),
        )
        for m in group
    ]
    alone, shared = Simulator(errors(0.1)), Simulator(errors(0.1))
    one, other = ask(alone, jobs, "segment"), ask(shared, jobs, "segment", neurons_per_request=4)
    assert [p.tolist() for p in predictions(one)] == [p.tolist() for p in predictions(other)]
    assert shared.said == alone.said
    assert sum(s.prompt_tokens for s in other) < sum(s.prompt_tokens for s in one)


# --- the interval -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [0.05, 0.2])
def test_the_interval_covers_the_theory_in_nine_of_ten_seeds(one_thread: None, error: float):
    """Truth and errors drawn a hundred times; of intervals of 95 %, 95 should cover (standard deviation 2.2)."""
    covered = 0
    for seed in range(100):
        meaning = MEANINGS[seed % len(MEANINGS)]
        found = units(meaning, "segment", seed)
        said = through(errors(error), meaning, found.truth, 1, seed)
        covered += within(score(said, found), expected_phi(float(found.truth.mean()), error, error))
    assert covered >= 90


# --- the whole stage ----------------------------------------------------------------------------------------------


def stage_rows(run: Run, simulator: Simulator, tmp_path: Path, behave: Any = None, **settings: Any) -> list[Row]:
    """The rows of the score stage, its methods asking the double."""
    section = run.recipe.score.model_copy(update={"backend": "endpoint", "model": "planted", **settings})
    recipe = run.recipe.model_copy(update={"score": section})
    statistics = {row["neuron_id"]: row for row in run.table_of("collect", "statistics.parquet")}
    explanations, tokenizer = run.table_of("explain", "explanations.parquet"), load_tokenizer(recipe.model.path)
    harvested, collected = Activations(run.result("harvest")), run.result("collect")
    with LlmDouble(answer=simulator, **({"behave": behave} if behave else {})) as double:
        llm = Llm(EndpointBackend("planted", double.base_url), None)
        work = StageWork(tmp_path)
        held = Held(recipe, harvested, collected, statistics, explanations, tokenizer)
        score_stage(held, lambda texts: texts, llm, work)
    return pq.read_table(tmp_path / "scores.parquet").to_pylist()


METHODS = ("token-llm", "segment-llm", "text-llm", "segment-lexical", "text-lexical")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return planted_run(tmp_path_factory.mktemp("planted"), METHODS)


@pytest.mark.parametrize("shared", [1, 4])
def test_the_stage_gives_a_perfect_simulator_one_at_every_level(run: Run, tmp_path: Path, shared: int):
    rows = stage_rows(run, Simulator(perfect), tmp_path, neurons_per_request=shared)
    assert len(rows) == len(METHODS) * len(MEANINGS)
    assert {row["status"] for row in rows} == {"ok"}
    for row in rows:
        assert row["score"] == pytest.approx(1, abs=1e-9)
        assert row["false_positives"] == row["false_negatives"] == 0
        assert row["true_positives"] == row["n_active"] > 0


def test_the_stage_gives_known_errors_their_score_and_their_counts(run: Run, tmp_path: Path):
    simulator = Simulator(errors(0.1, 0.2))
    rows = stage_rows(run, simulator, tmp_path, methods=("segment-llm",))
    for row, meaning in zip(rows, MEANINGS, strict=True):
        n = row["n_active"] / row["n_units"]
        assert row["low"] - 0.05 <= expected_phi(n, 0.1, 0.2) <= row["high"] + 0.05
        assert {
            (True, True): row["true_positives"],
            (False, True): row["false_positives"],
            (True, False): row["false_negatives"],
            (False, False): row["true_negatives"],
        } == simulator.said[meaning.description]


def test_a_refused_neuron_has_no_score_and_the_others_keep_theirs(run: Run, tmp_path: Path):
    def refuse(prompt: str, attempt: int) -> str:
        return "refusal" if MEANINGS[0].description in prompt else "json"

    first, *others = stage_rows(run, Simulator(errors(0.1)), tmp_path, refuse, methods=("segment-llm",))
    assert (first["status"], first["score"], first["true_positives"]) == ("refused", None, None)
    assert others == stage_rows(run, Simulator(errors(0.1)), tmp_path, methods=("segment-llm",))[1:]


# --- bad days -----------------------------------------------------------------------------------------------------


def bad_day(prompt: str, attempt: int) -> str:
    """A fifth of the calls end badly, each in a way of its own; which ones is known from the prompt."""
    drawn = int(hashlib.sha256(prompt.encode()).hexdigest(), 16) % 100
    return ("refusal", "truncated", "prose", "400")[drawn // 5] if drawn < 20 else "json"


STATUS = {"refusal": "refused", "truncated": "unparsed", "prose": "unparsed", "400": "failed"}


@pytest.mark.parametrize(("level", "n_texts"), [("token", 2), ("segment", 24)])
def test_on_a_bad_day_some_neurons_have_a_status_and_the_others_are_unchanged(level: Any, n_texts: int):
    jobs = [
        Job(f"layers.{seed}.mlp/{m.latent}", "en", m.description, units(m, level, seed, n_texts))
        for seed in range(4)
        for m in MEANINGS
    ]
    section = ScoreSection(backend="endpoint", model="planted", segments_per_request=200)
    good = ask(Simulator(errors(0.1)), jobs, level, segments_per_request=200)
    bad = ask(Simulator(errors(0.1)), jobs, level, bad_day, segments_per_request=200)
    for job, before, after in zip(jobs, good, bad, strict=True):
        prompts = [request.messages[-1].content for request in simulation_requests([job], level, section, False)]
        trouble = [STATUS[word] for word in (bad_day(prompt, 0) for prompt in prompts) if word != "json"]
        if trouble:
            assert (after.status, after.predicted) == (trouble[0], None)
            assert after.detail
        else:
            assert after.predicted is not None
            assert after._replace(predicted=None) == before._replace(predicted=None)
            assert after.predicted.tolist() == predictions([before])[0].tolist()
    assert {said.status for said in bad} == {"ok", "refused", "unparsed", "failed"}


# --- the local way ------------------------------------------------------------------------------------------------


def judged(simulator: Simulator, jobs: list[Job], level: Any, batch_size: int = 4) -> list[Simulated]:
    """Simulated by a judge in this process, to which no text is generated."""

    def generate(prompts: list[str], max_tokens: int, stop: tuple[str, ...]) -> list[tuple[str, int, int]]:
        raise AssertionError("a judge is not asked for a text")

    backend = LocalBackend(generate, "local:planted", {"model": "planted"}, batch_size, judge=simulator.judge)
    return simulate(jobs, level, ScoreSection(backend="local"), Llm(backend, None))


@pytest.mark.parametrize("level", LEVELS)
def test_a_perfect_local_judge_scores_one(level: str):
    """Of tokens its levels are the digits 0 to 9, so that 10 is said as 9 and the score is a little below 1."""
    jobs = jobs_of(level)
    for job, predicted in zip(jobs, predictions(judged(Simulator(perfect), jobs, level)), strict=True):
        assert predicted.tolist() == (job.units.truth.clamp(max=9) if level == "token" else job.units.truth).tolist()
        assert score(predicted, job.units).value == pytest.approx(1, abs=5e-3 if level == "token" else 1e-9)


@pytest.mark.parametrize("level", ["segment", "text"])
def test_a_local_judge_and_an_endpoint_with_the_same_errors_score_the_same(level: str):
    jobs = jobs_of(level)
    local, endpoint = Simulator(errors(0.1, 0.3)), Simulator(errors(0.1, 0.3))
    one, other = predictions(judged(local, jobs, level)), predictions(ask(endpoint, jobs, level))
    assert [p.tolist() for p in one] == [p.tolist() for p in other]
    assert local.said == endpoint.said


@pytest.mark.parametrize("level", LEVELS)
def test_a_local_judge_that_never_looks_scores_zero(level: str):
    jobs = jobs_of(level)
    for job, predicted in zip(jobs, predictions(judged(Simulator(by_chance(0.3)), jobs, level)), strict=True):
        found = score(predicted, job.units)
        assert found.value is not None
        assert abs(found.value) * (len(job.units.truth) - 1) ** 0.5 < 3.5
