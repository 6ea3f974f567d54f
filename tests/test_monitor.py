"""The risk monitor: its regression by hand, what it reads, its files, its baselines, and what it may be judged on."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import safesail.cli.monitor
from safesail.cli.app import app
from safesail.diagnosis.comparison import Scores, compared, evaluate_monitor, fit_probe, n_words, pooled, read_once
from safesail.diagnosis.domain_neurons import domain_neurons, monitored_domains, peaks
from safesail.diagnosis.inspector import Inspector
from safesail.diagnosis.labelled import LabelledText, halves, labelled_texts, seen_before, shipped_domains
from safesail.diagnosis.monitor import Monitor
from safesail.diagnosis.results import read_result, write_result
from safesail.diagnosis.risks import MONITOR, fit_monitors, load_monitors, monitor_texts
from safesail.errors import InputError
from safesail.logistic import best_strength, cross_validated, fit_logistic, folds
from safesail.metrics import auroc, auroc_difference, auroc_interval
from safesail.neurons import NeuronDatabase
from safesail.sae.config import SaeConfig
from safesail.sae.model import Sae

HOOK_POINT = "layers.1.mlp"
D_SAE = 12
ABOUT = ["The murder was seen near the old house.", "She wrote about the assault.", "He was killed in the {}."]
OTHER = ["The garden was seen near the old house.", "She wrote about the music.", "He was late in the {}."]
PLACES = ["kitchen", "river", "summer", "house", "morning"]
assert safesail.cli.monitor.monitor  # importing the module registers the verb


@pytest.fixture(scope="module")
def inspector(model: Any, tokenizer: Any) -> Inspector:
    """The tiny model with a random SAE; latents 0 to 7 are about violence, 8 scores weakly, 9 has no score."""
    return made_inspector(model, tokenizer)


def made_inspector(model: Any, tokenizer: Any, seed: int = 0) -> Inspector:
    chance = torch.Generator().manual_seed(seed)
    shapes = ((32, D_SAE), (D_SAE,), (D_SAE, 32), (32,))
    config = SaeConfig(d_in=32, d_sae=D_SAE, hook_point=HOOK_POINT, architecture="relu", coefficient=0.1)
    sae = Sae(config, *(torch.randn(shape, generator=chance) for shape in shapes))
    places = [{"neuron_id": f"{HOOK_POINT}/{j}", "hook_point": HOOK_POINT} for j in range(D_SAE)]
    scores = [0.5] * 8 + [0.2, None, 0.9, 0.9]
    neurons = {
        row["neuron_id"]: row | {"score": score, "domains": ["violence"] if j < 10 else ["terror"] * (j == 10)}
        for j, (row, score) in enumerate(zip(places, scores, strict=True))
    }
    quantiles = {row["neuron_id"]: row | {"normaliser": 2.0 + j} for j, row in enumerate(places)}
    return Inspector(model, tokenizer, {HOOK_POINT: sae}, NeuronDatabase(neurons, quantiles, {}, {}), "tests/tiny")


def without_counted(inspection: Any, start: int = 0) -> Any:
    """The inspection with none of its tokens counted from `start` on."""
    keep = inspection.counted[HOOK_POINT].clone()
    keep[start:] = False
    return dataclasses.replace(inspection, counted={HOOK_POINT: keep})


def texts(kind: list[str]) -> list[str]:
    return [f"{sentence.format(place)} Then {place}." for place in PLACES for sentence in kind]


LABELLED = [
    LabelledText(id=str(i), domain="violence", about=about, text=text)
    for i, (about, text) in enumerate((kind is ABOUT, text) for kind in (ABOUT, OTHER) for text in texts(kind))
]


@pytest.fixture(scope="module")
def fitted(inspector: Inspector) -> Monitor:
    return Monitor.fit(inspector, [one.text for one in LABELLED], [one.about for one in LABELLED], "violence")


@pytest.fixture(autouse=True)
def _one_thread(one_thread: None) -> None:
    """Small matrices: on a busy machine more threads only wait for each other."""


# --- AUROC --------------------------------------------------------------------------------------------------------


def test_the_aurocs_interval_resamples_whole_groups():
    scores, truth = torch.tensor([3.0, 2.0, 2.0, 1.0]), torch.tensor([1, 1, 0, 0])
    # pairs: 3>2, 3>1, 2=2 (half), 2>1: 3.5 of 4
    assert auroc_interval(scores, truth, torch.arange(4)).value == 0.875
    # each group holds the same two scores of either kind, so every resample has the AUROC of the whole
    scores, truth, groups = torch.tensor([2.0, 1.0] * 3), torch.tensor([1, 0] * 3), torch.tensor([0, 0, 1, 1, 2, 2])
    assert auroc_interval(scores, truth, groups) == (1.0, 1.0, 1.0)
    assert auroc_interval(scores, torch.ones(6), groups) == (None, None, None)


def test_a_resample_is_the_auroc_of_its_texts_as_often_as_they_were_drawn():
    from safesail.metrics import _resampled_aurocs, _resampled_counts

    chance = torch.Generator().manual_seed(1)
    scores, truth = torch.randint(5, (30,), generator=chance).double(), torch.arange(30) % 3 == 0
    groups = torch.arange(30) // 2
    counts = _resampled_counts(15, 25, 0)[:, groups].long()
    expected = [auroc(scores.repeat_interleave(row), truth.repeat_interleave(row)) for row in counts]
    found = _resampled_aurocs([scores], truth, groups, 25, 0)[0]
    assert found.tolist() == pytest.approx(expected)


def test_the_difference_of_aurocs_is_paired():
    chance = torch.Generator().manual_seed(0)
    scores, truth = torch.randn(40, generator=chance), torch.arange(40) % 2
    assert auroc_difference(scores, 3 * scores + 1, truth, torch.arange(40)) == (0.0, 0.0, 0.0)
    better = scores + 2 * truth
    found = auroc_difference(better, scores, truth, torch.arange(40))
    assert found.value == pytest.approx(auroc(better, truth) - auroc(scores, truth))
    assert 0 < found.low < found.value < found.high


# --- regression ---------------------------------------------------------------------------------------------------


def test_the_regression_is_the_minimum_of_its_loss():
    # One feature, ±1, two texts: by symmetry b = 0, and w solves σ(-w) = strength · w: for w = ln 3, σ(-w) = 1/4.
    x, y = torch.tensor([[1.0], [-1.0]]), torch.tensor([True, False])
    found = fit_logistic(x, y, 0.25 / math.log(3))
    assert found.coefficients.item() == pytest.approx(math.log(3), abs=1e-9)
    assert found.intercept == pytest.approx(0, abs=1e-9)


def test_the_intercept_is_not_penalised():
    # The feature says nothing, so w = 0 and b = ln(3 / 1) whatever the strength.
    x, y = torch.ones(4, 1) * 0, torch.tensor([True, True, True, False])
    assert fit_logistic(x, y, 100.0).intercept == pytest.approx(math.log(3), abs=1e-8)


@pytest.mark.parametrize(("n", "d"), [(30, 4), (10, 50)])
def test_the_gradient_vanishes_with_few_features_and_with_many(n: int, d: int):
    chance = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, d, generator=chance, dtype=torch.float64), torch.arange(n) % 3 == 0
    found = fit_logistic(x, y, 0.05)
    error = torch.sigmoid(found.logits(x)) - y.double()
    assert (x.T @ error / n + 0.05 * found.coefficients).abs().max() < 1e-9
    assert abs(float(error.mean())) < 1e-9


def test_folds_keep_groups_whole_and_deal_out_both_kinds():
    y = torch.tensor([True, False] * 10 + [False] * 20)
    groups = [str(i // 4) for i in range(20)] + [f"other {i}" for i in range(20)]
    fold = folds(y, groups, seed=3)
    for name in set(groups):
        assert len({int(fold[i]) for i in range(40) if groups[i] == name}) == 1
    # five groups hold a positive text and twenty do not: one and four to a fold
    of_group = {group: int(number) for group, number in zip(groups, fold, strict=True)}
    for number in range(5):
        mine = [group for group in of_group if of_group[group] == number]
        assert (len(mine), sum(group.startswith("other") for group in mine)) == (5, 4)
    assert torch.equal(fold, folds(y, groups, seed=3))
    assert not torch.equal(fold, folds(y, groups, seed=4))


def test_cross_validation_scores_each_text_by_a_model_that_did_not_see_it():
    x, y = torch.arange(6.0)[:, None], torch.tensor([True, False] * 3)
    fold = torch.tensor([0, 0, 1, 1, 2, 2])
    seen = []

    def fit(x: torch.Tensor, y: torch.Tensor):
        inside = set(x[:, 0].tolist())

        def logits(rows: torch.Tensor) -> torch.Tensor:
            assert not inside & set(rows[:, 0].tolist())
            seen.extend(rows[:, 0].tolist())
            return torch.zeros(len(rows), dtype=torch.float64)

        return logits

    assert cross_validated(x, y, fold, fit) == pytest.approx(math.log(2))
    assert sorted(seen) == [0, 1, 2, 3, 4, 5]


def test_noise_gets_the_strongest_penalty():
    x, y = torch.randn(60, 20, generator=torch.Generator().manual_seed(0)), torch.arange(60) % 2 == 0
    strength, loss = best_strength(x, y, folds(y, [str(i) for i in range(60)]))
    assert strength == 1.0
    assert loss > 0.6


# --- neurons and peaks --------------------------------------------------------------------------------------------


def test_the_neurons_of_a_domain_score_above_the_minimum(inspector: Inspector):
    assert domain_neurons(inspector, "violence") == [f"{HOOK_POINT}/{j}" for j in range(8)]
    assert domain_neurons(inspector, "violence", 0.1) == [f"{HOOK_POINT}/{j}" for j in range(9)]
    assert monitored_domains(inspector.database) == ["violence", "terror"]
    assert monitored_domains(inspector.database, 0.6) == ["terror"]


@pytest.mark.parametrize("domain", ["politics", "nonsense", ""])
def test_a_domain_without_neurons_names_those_that_have_some(inspector: Inspector, domain: str):
    with pytest.raises(InputError, match="domains that have some: violence, terror"):
        domain_neurons(inspector, domain)


def test_a_peak_is_the_largest_normalised_activation_over_the_tokens(inspector: Inspector):
    inspection = inspector.inspect("The murder was seen near the old house.")
    dense = inspection.codes[HOOK_POINT].dense(D_SAE) * inspection.counted[HOOK_POINT][:, None]
    for j, peak in enumerate(peaks(inspection, [f"{HOOK_POINT}/{j}" for j in range(D_SAE)])):
        assert peak.activation == pytest.approx(float(dense[:, j].max()) / (2.0 + j))
        assert peak.row == (int(dense[:, j].argmax()) if dense[:, j].max() > 0 else -1)


def test_tokens_that_the_policy_leaves_out_have_no_peak(inspector: Inspector):
    inspection = without_counted(inspector.inspect("The murder"))
    assert {peak.activation for peak in peaks(inspection, [f"{HOOK_POINT}/{j}" for j in range(D_SAE)])} == {0.0}


# --- the monitor --------------------------------------------------------------------------------------------------


def test_a_risk_is_the_sum_of_what_is_shown(fitted: Monitor):
    inspection = fitted.inspector.inspect("The murder was seen near the old house.")
    risk = fitted.score(inspection)
    total = risk.intercept + sum(one.coefficient * one.activation for one in risk.contributions)
    assert risk.probability == pytest.approx(1 / (1 + math.exp(-total)))
    assert risk.log_odds == pytest.approx(total)
    weights = dict(zip(fitted.neurons, fitted.coefficients, strict=True))
    for one in risk.contributions:
        assert one.coefficient == weights[one.neuron_id]
        strongest = inspection.firings(one.neuron_id)[0]
        assert (one.index, one.activation) == (strongest.index, pytest.approx(strongest.normalised))
        assert one.token == inspection.units[one.index].text
    sizes = [abs(one.contribution) for one in risk.contributions]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes


def test_the_same_call_gives_the_same_bits_and_tells_the_texts_apart(fitted: Monitor):
    texts, labels = [one.text for one in LABELLED], [one.about for one in LABELLED]
    first, again = (Monitor.fit(fitted.inspector, texts, labels, "violence") for _ in range(2))
    assert first == again
    about = [fitted.score(one.text).probability for one in LABELLED if one.about]
    other = [fitted.score(one.text).probability for one in LABELLED if not one.about]
    assert sum(about) / len(about) > 0.1 + sum(other) / len(other)
    assert (fitted.n_about, fitted.n_other) == (15, 15)


def test_a_conversation_is_scored_in_the_chat_template(fitted: Monitor):
    chat = [{"role": "user", "content": "The murder was seen."}]
    risk = fitted.score(chat)
    assert risk == fitted.score(fitted.inspector.inspect(chat))
    assert risk != fitted.score("The murder was seen.")


def test_a_saved_monitor_gives_the_same_risks(fitted: Monitor, tmp_path: Path):
    file = fitted.save(tmp_path / "new" / "folder")
    assert file.name == "violence.json"
    loaded = load_monitors(file.parent, fitted.inspector)["violence"]
    assert loaded == fitted
    assert loaded.score("The murder was seen.") == fitted.score("The murder was seen.")


def test_a_monitor_of_other_saes_is_refused(fitted: Monitor, tmp_path: Path, model: Any, tokenizer: Any):
    fitted.save(tmp_path)
    other = made_inspector(model, tokenizer, seed=1)  # the same SAE ids and biases, other weights
    mine, its = fitted.inspector.saes[HOOK_POINT], other.saes[HOOK_POINT]
    assert its.config.sae_id == mine.config.sae_id
    its.b_enc.data.copy_(mine.b_enc.data)
    with pytest.raises(InputError, match="calibrated with other SAEs"):
        Monitor.load(tmp_path, other, "violence")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda facts: facts | {"intercept": float("nan")}, "not finite"),
        (lambda facts: facts | {"neurons": {f"{HOOK_POINT}/0": float("inf")}}, "not finite"),
        (lambda facts: facts | {"neurons": {f"{HOOK_POINT}/0": "1"}}, "not finite"),
        (lambda facts: facts | {"neurons": {f"{HOOK_POINT}/99": 1.0}}, "has not"),
        (lambda facts: facts | {"schema": 2}, "no monitor of this version"),
        (lambda facts: {"schema": 1}, "no monitor of this version"),
        (lambda facts: [], "no monitor of this version"),
    ],
)
def test_a_damaged_monitor_is_refused(fitted: Monitor, tmp_path: Path, change: Any, said: str):
    file = fitted.save(tmp_path)
    file.write_text(json.dumps(change(json.loads(file.read_text()))), encoding="utf-8")
    with pytest.raises(InputError, match=said):
        load_monitors(tmp_path, fitted.inspector)


def test_a_folder_without_monitors_is_told(inspector: Inspector, tmp_path: Path):
    with pytest.raises(InputError, match="holds no monitor"):
        load_monitors(tmp_path, inspector)
    (tmp_path / "violence.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match="not JSON"):
        load_monitors(tmp_path, inspector)
    with pytest.raises(InputError, match="cannot read the monitor"):
        Monitor.load(tmp_path / "none", inspector, "violence")


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        ([True] * 30, "the others 0"),
        ([True] * 26 + [False] * 4, "the others 4"),
        ([True] * 29, "30 texts have 29 labels|29 labels"),
        ([True] * 15 + [False] * 14 + [float("nan")], "nan is no label"),
        ([True] * 15 + [False] * 14 + [2], "2 is no label"),
        ([True] * 15 + [False] * 14 + ["no"], "'no' is no label"),
    ],
)
def test_labels_that_cannot_calibrate_are_refused(inspector: Inspector, labels: list[Any], said: str):
    with pytest.raises(InputError, match=said):
        Monitor.fit(inspector, [one.text for one in LABELLED], labels, "violence")


def test_few_origins_of_a_kind_are_refused(inspector: Inspector):
    groups = ["one origin"] * 15 + [str(i) for i in range(15)]
    with pytest.raises(InputError, match="at least 5 of each kind"):
        Monitor.fit(
            inspector, [one.text for one in LABELLED], [one.about for one in LABELLED], "violence", groups=groups
        )


def test_an_empty_or_overlong_text_is_named(inspector: Inspector, fitted: Monitor):
    with pytest.raises(InputError, match="text 2: the prompt is empty"):
        monitor_texts(inspector, ["A garden.", "  "], {"violence": fitted})
    with pytest.raises(InputError, match=r"text 1: .* tokens"):
        monitor_texts(inspector, ["word " * 600], {"violence": fitted})
    with pytest.raises(InputError, match="there are no texts"):
        monitor_texts(inspector, [], {"violence": fitted})


def test_activations_that_are_not_finite_are_refused(fitted: Monitor):
    inspection = fitted.inspector.inspect("The murder")
    codes = inspection.codes[HOOK_POINT]
    inspection = dataclasses.replace(inspection, codes={HOOK_POINT: codes.with_values(codes.values * float("nan"))})
    with pytest.raises(InputError, match="not finite"):
        fitted.score(inspection)


# --- results ------------------------------------------------------------------------------------------------------


def test_the_result_has_a_row_per_contribution(inspector: Inspector, fitted: Monitor, tmp_path: Path):
    result = monitor_texts(inspector, ["The murder.", "The garden."], {"violence": fitted})
    for number, text in enumerate(["The murder.", "The garden."]):
        risk = fitted.score(text)
        rows = [row for row in result.rows if row["number"] == number]
        assert [row["neuron_id"] for row in rows] == [one.neuron_id for one in risk.contributions]
        assert {row["probability"] for row in rows} == {risk.probability}
        assert {row["above"] for row in rows} == {risk.probability >= 0.5}
    stored = read_result(write_result(result, tmp_path / "m.parquet"))
    assert (stored.config, stored.schema, stored.rows) == ("monitor", MONITOR, result.rows)


def test_a_text_on_which_no_neuron_fires_keeps_a_row(fitted: Monitor, monkeypatch: pytest.MonkeyPatch):
    inspection = without_counted(fitted.inspector.inspect("The murder"))
    monkeypatch.setattr(fitted.inspector, "inspect", lambda text: inspection)
    result = monitor_texts(fitted.inspector, ["The murder"], {"violence": fitted})
    assert len(result.rows) == 1
    assert result.rows[0]["probability"] == pytest.approx(1 / (1 + math.exp(-fitted.intercept)))
    assert result.rows[0]["neuron_id"] is None


@pytest.mark.parametrize("threshold", [0.0, 1.0, -1.0, 2.0, float("nan")])
def test_a_threshold_is_a_probability(inspector: Inspector, fitted: Monitor, threshold: float):
    with pytest.raises(InputError, match="between 0 and 1"):
        monitor_texts(inspector, ["x"], {"violence": fitted}, threshold=threshold)


def test_an_unmonitored_domain_is_told(inspector: Inspector, fitted: Monitor, tmp_path: Path):
    with pytest.raises(InputError, match="use one of: violence"):
        monitor_texts(inspector, ["x"], {"violence": fitted}, domains=["politics"])
    with pytest.raises(InputError, match="nothing to calibrate a monitor for 'cooking'"):
        monitor_texts(inspector, ["x"], domains=["cooking"])


def test_the_python_makes_the_same_rows(fitted: Monitor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    fitted.save(tmp_path)
    result = monitor_texts(fitted.inspector, ['He said "kill".\n'], tmp_path, domains=["violence"], threshold=0.25)
    monkeypatch.setattr(Inspector, "from_pretrained", lambda release: fitted.inspector)
    space: dict[str, Any] = {}
    exec(result.python, space)
    assert space["result"].rows == result.rows
    assert space["result"].python == result.python
    assert "monitors = ..." in monitor_texts(fitted.inspector, ["x"], {"violence": fitted}).python


def test_monitors_are_calibrated_on_the_shipped_texts_of_domains_with_neurons(inspector: Inspector):
    found = fit_monitors(inspector)
    assert sorted(found) == ["terror", "violence"]
    assert (found["terror"].n_about, found["terror"].n_other) == (40, 40)
    assert found["terror"].neurons == (f"{HOOK_POINT}/10",)
    assert found["terror"].calibrated_on == "shipped"
    # monitors that were calibrated before need not be again, and the Python still says how to have them
    given = {"terror": found["terror"]}
    kept = monitor_texts(inspector, ["The bomb."], given)
    asked = monitor_texts(inspector, ["The bomb."], domains=["terror"])
    assert (kept.rows, kept.python) == (asked.rows, asked.python)
    assert "domains=['terror']" in kept.python


# --- labelled texts -----------------------------------------------------------------------------------------------


def test_every_shipped_domain_has_enough_texts_and_hard_ones():
    assert shipped_domains() == ["politics", "pornography", "terror", "violence"]
    for domain in shipped_domains():
        texts = labelled_texts("shipped", domain)
        assert len(texts) >= 60
        assert sum(text.about for text in texts) == len(texts) / 2
        assert {text.source.partition(":")[0] for text in texts} == {"ours"}
        others = [text for text in texts if not text.about and n_words(domain, text.text)]
        roundabout = [text for text in texts if text.about and not n_words(domain, text.text)]
        assert len(others) >= 5
        assert len(roundabout) >= 20


def test_the_shipped_texts_are_no_concept_pairs_and_no_two_alike():
    from safesail.pairs import load_pairs

    texts = [text.text for text in labelled_texts("shipped")]
    pairs = [query for pair in load_pairs("en") for query in (pair.with_concept, pair.without_concept)]
    assert not any(seen_before(texts, pairs))
    for i in range(0, len(texts), 40):
        assert not any(seen_before(texts[i : i + 40], texts[:i] + texts[i + 40 :]))


def test_the_halves_keep_groups_whole_and_both_kinds_even():
    texts = [
        LabelledText(id=str(i), domain="d", about=i % 2 == 0, text=f"text {i}", group=f"g{i // 4}" if i < 20 else "")
        for i in range(60)
    ]
    first, second = halves(texts, seed=1)
    assert len(first) + len(second) == 60
    assert not {text.whole for text in first} & {text.whole for text in second}
    assert abs(sum(text.about for text in first) - sum(text.about for text in second)) <= 3
    assert halves(list(reversed(texts)), seed=1)[0] == list(reversed(first))
    assert halves(texts, seed=2)[0] != first


@pytest.mark.parametrize(
    ("text", "other", "seen"),
    [
        ("Who killed him?", "who KILLED, him", True),
        ("Who killed him?", "Nobody knows who killed him in the end.", True),
        ("Who killed him?", "Who has killed him?", False),
        ("one two three four five six seven eight nine", "one two three four five six seven eight ten", True),
        ("a b c d e f g h i j k l", "x a b c d e f g h y", False),  # one run of five
        ("a b c d e f g h i j k l", "x a b c d e f g h i j y", True),  # three runs of five
    ],
)
def test_a_text_is_seen_when_most_of_it_stands_elsewhere(text: str, other: str, seen: bool):
    assert seen_before([text, "quite another thing altogether"], ["nothing", other]) == [seen, False]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ('{"id": "1", "domain": "d", "about": 1, "text": "t"}', "line 1: about"),
        ('{"id": "1", "domain": "d", "about": true, "text": " "}', "line 1: text"),
        ('{"id": "1", "domain": "d", "about": true}', "line 1: text"),
        ("\n[]", "line 2: the line"),
        ('{"id": "1", "domain": "d", "about": NaN, "text": "t"}', "line 1: (about|the line)"),
        ('{"id": "1", "domain": "d", "about": true, "text": "t"}\n' * 2, "'1' is given twice"),
        ('{"id": "1", "domain": "d", "about": true, "text": "t"}', "no texts of the domain 'violence'"),
    ],
)
def test_a_broken_file_of_texts_is_refused(tmp_path: Path, lines: str, said: str):
    file = tmp_path / "texts.jsonl"
    file.write_text(lines, encoding="utf-8")
    with pytest.raises(InputError, match=said):
        labelled_texts(file, "violence")
    with pytest.raises(InputError, match="cannot read"):
        labelled_texts(tmp_path / "none.jsonl")


# --- baselines ----------------------------------------------------------------------------------------------------


def test_the_word_list_counts_the_domains_words():
    assert n_words("violence", "He was killed; she was Killed too. Skilled!") == 2
    assert n_words("violence", "The garden.") == 0


def test_the_probe_reads_the_counted_tokens_only(inspector: Inspector):
    inspection = without_counted(inspector.inspect("The murder was seen near the old house."), 2)
    x = inspector.activations("The murder was seen near the old house.", HOOK_POINT).double()
    found, x = pooled({HOOK_POINT: x[None]}, inspection), x[:2]
    torch.testing.assert_close(found["mean"], (x[0] + x[1]) / 2)
    torch.testing.assert_close(found["max"], torch.maximum(x[0], x[1]))


def test_a_text_is_read_once_and_the_probe_gets_what_the_saes_got(inspector: Inspector):
    reads: dict[str, Any] = {}
    first = read_once(inspector, "The murder was seen.", reads)
    assert read_once(inspector, "The murder was seen.", reads) is first
    x = inspector.activations("The murder was seen.", HOOK_POINT).double()
    kept = x[first.inspection.counted[HOOK_POINT]]
    torch.testing.assert_close(first.pooled["max"], kept.amax(0))
    assert first.inspection.ids == inspector.inspect("The murder was seen.").ids


def test_the_probe_takes_the_pooling_that_cross_validates_better():
    y = torch.arange(40) % 2 == 0
    noise = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    told = y.double()[:, None].repeat(1, 3)
    groups = [str(i) for i in range(40)]
    assert fit_probe({"mean": noise, "max": told}, y, groups).pooling == "max"
    probe = fit_probe({"mean": told, "max": noise}, y, groups)
    assert probe.pooling == "mean"
    assert bool(((probe.logits(told) > 0) == y).all())


def test_the_comparison_is_that_of_the_scores():
    texts = [LabelledText(id=str(i), domain="d", about=i < 10, text=f"{i}") for i in range(20)]
    truth = torch.tensor([text.about for text in texts])
    perfect, useless = truth.double(), torch.zeros(20, dtype=torch.float64)
    found = compared("d", texts, Scores(perfect, useless, -perfect))
    assert (found.monitor.value, found.probe.value, found.words.value) == (1.0, 0.5, 0.0)
    assert (found.over_probe.value, found.over_words.value) == (0.5, 1.0)
    assert (found.n_about, found.n_other) == (10, 10)


def parted() -> tuple[list[LabelledText], list[LabelledText]]:
    """The texts of two of the sentences of either kind, and of the third ones: nothing of one half is in the other."""
    return [one for one in LABELLED if int(one.id) % 3 > 0], [one for one in LABELLED if int(one.id) % 3 == 0]


def test_an_evaluation_uses_the_held_out_half_only(inspector: Inspector):
    first, second = parted()
    found, monitor = evaluate_monitor(inspector, "violence", first, second, seen=["Something else."])
    alone = Monitor.fit(inspector, [one.text for one in first], [one.about for one in first], "violence")
    assert monitor == alone
    scores = torch.tensor([alone.score(one.text).log_odds for one in second])
    assert found.monitor.value == pytest.approx(auroc(scores, torch.tensor([one.about for one in second])))
    words = torch.tensor([float(n_words("violence", one.text)) for one in second])
    assert found.words.value == pytest.approx(auroc(words, torch.tensor([one.about for one in second])))
    assert found.n_about + found.n_other == len(second)


def test_texts_seen_before_are_not_evaluated_on(inspector: Inspector):
    first, second = parted()
    with pytest.raises(InputError, match="5 held-out texts, '0' first, stand in what was seen before"):
        evaluate_monitor(inspector, "violence", first, second, seen=[f"He said: {second[0].text.upper()} So."])
    with pytest.raises(InputError, match="in both halves"):
        evaluate_monitor(inspector, "violence", first, [*second, first[0]], seen=[])
    copy = first[0].model_copy(update={"id": "copy"})
    with pytest.raises(InputError, match="'copy' first, stand in the calibration half"):
        evaluate_monitor(inspector, "violence", first, [*second, copy], seen=[])


# --- the verb -----------------------------------------------------------------------------------------------------


def run(*options: str) -> Any:
    return CliRunner().invoke(app, ["monitor", "tests/tiny", *options], catch_exceptions=False)


def test_the_verb_calibrates_saves_and_scores(inspector: Inspector, monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(Inspector, "from_pretrained", lambda release: inspector)
    file, folder, out = tmp_path / "texts.jsonl", tmp_path / "monitors", tmp_path / "out.parquet"
    file.write_text("".join(one.model_dump_json() + "\n" for one in LABELLED), encoding="utf-8")
    assert run("--fit", str(file), "--monitor", str(folder)).exit_code == 0
    saved = load_monitors(folder, inspector)["violence"]
    risk = saved.score("The murder.")
    said = json.loads(run("The murder.", "--monitor", str(folder), "--json").stdout)
    assert said["rows"][0]["probability"] == risk.probability
    shown = run("The murder.", "--monitor", str(folder), "--threshold", "0.01").stdout
    assert f"violence      {risk.probability:.2f} RISK" in shown
    assert risk.contributions[0].neuron_id in shown
    many = tmp_path / "many.jsonl"
    many.write_text('{"text": "The murder."}\n\n{"text": "A garden."}\n', encoding="utf-8")
    assert run("--file", str(many), "--monitor", str(folder), "--out", str(out)).exit_code == 0
    assert {row["text"] for row in read_result(out).rows} == {"The murder.", "A garden."}


@pytest.mark.parametrize(
    ("content", "said"), [("", "holds no texts"), ("{", "not JSON"), ("[1]", "no field"), ('{"text": 1}', "no field")]
)
def test_the_verb_refuses_what_is_no_text(tmp_path: Path, content: str, said: str):
    file = tmp_path / "texts.jsonl"
    file.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=said):
        run("--file", str(file))
    with pytest.raises(InputError, match="give one of them"):
        run("text", "--file", str(file))
    with pytest.raises(InputError, match="there is no text"):
        run()
