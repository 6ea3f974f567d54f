"""Trajectories: what fires where in each version of a prompt, what drops, and whether the model can read a version."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from typer.testing import CliRunner

from safesail import Inspector
from safesail.cli.app import app
from safesail.cli.trajectories import trajectories as verb
from safesail.diagnosis.reading import HARD_ABOVE, PIECES_FROM, UNKNOWN_ABOVE, readings
from safesail.diagnosis.results import read_result, write_result
from safesail.diagnosis.trajectories import TRAJECTORIES, case_study, concepts, drops, trajectories
from safesail.errors import InputError
from safesail.interpretation.languages import is_written_in
from safesail.neurons import NeuronDatabase, neuron_id
from safesail.recipe import TokenPolicy
from safesail.sae.config import SaeConfig
from safesail.sae.model import Sae

POINTS = ("layers.0.mlp", "layers.1.mlp")
D_SAE = 48
PLAIN, OTHER = "The president was seen near the old house.", "In 2019 the teacher came back to the river."


def about(latent: int) -> dict[str, Any]:
    """The row of a neuron: of each four latents one is explained without a domain and two with, the last has no row."""
    domains = {0: ["violence", "terror"], 1: ["politics"], 2: []}[latent % 4]
    category = {0: "weapons", 1: "government", 2: None}[latent % 4]
    told = {"explanation": f"number {latent}", "domains": domains, "category": category, "concept": None}
    return {**told, "score": 0.3, "score_low": 0.1, "score_high": 0.5, "status": "ok"}


@pytest.fixture(scope="module")
def inspector(model: Any, tokenizer: Any) -> Inspector:
    """The tiny model with random SAEs; latent 5 of the first has no normaliser, as if it had never fired."""
    generator, saes = torch.Generator().manual_seed(1), {}
    neurons: dict[str, dict[str, Any]] = {}
    quantiles: dict[str, dict[str, Any]] = {}
    for point in POINTS:
        W_dec = torch.nn.functional.normalize(torch.randn(D_SAE, 32, generator=generator), dim=-1)
        policy = TokenPolicy(sink_norm_multiple=None)
        config = SaeConfig(d_in=32, d_sae=D_SAE, k=6, hook_point=point, token_policy=policy)
        saes[point] = Sae(config, W_dec.T.contiguous(), torch.zeros(D_SAE), W_dec, torch.zeros(32))
        for latent in range(D_SAE):
            id = neuron_id(point, latent)
            quantiles[id] = {"neuron_id": id, "hook_point": point, "normaliser": 0.0 if latent == 5 else 0.5}
            if latent % 4 < 3:
                neurons[id] = {"neuron_id": id, **about(latent)}
    return Inspector(model, tokenizer, saes, NeuronDatabase(neurons, quantiles, {}, {}), "somewhere/tiny")


def row(neuron: str, label: str, normalised: float | None, **changed: Any) -> dict[str, Any]:
    """A row as of TRAJECTORIES."""
    point = neuron.rpartition("/")[0]
    return {
        "label": label,
        "language": None,
        "token_index": 0,
        "token": "a",
        "is_answer": False,
        "hook_point": point,
        "layer": int(point.split(".")[1]),
        "neuron_id": neuron,
        "activation": 1.0,
        "normalised": normalised,
        "explanation": "x",
        "domains": ["terror"],
        "category": "weapons",
        "score": 0.4,
        **changed,
    }


# --- arithmetic on rows -------------------------------------------------------------------------------------------

PUBLISHED = {  # Safe-SAIL's case study: neuron, normalised activation in English and in Hindi
    "layers.17.mlp/16378": (0.6183, 0.0),
    "layers.17.mlp/1212": (0.4704, 0.1757),
    "layers.17.mlp/20271": (0.4199, 0.3416),
    "layers.26.mlp/3138": (0.3283, 0.1248),
    "layers.26.mlp/7960": (0.1875, 0.0692),
    "layers.35.mlp/12089": (0.4129, 0.0823),
    "layers.35.mlp/8726": (0.2035, 0.0),
}


def test_drops_are_differences_of_normalised_maxima_as_in_the_published_case_study() -> None:
    rows = [row(id, "hi", hindi) for id, (_, hindi) in PUBLISHED.items() if hindi]
    for id, (english, _) in PUBLISHED.items():
        rows += [row(id, "en", english / 2), row(id, "en", english), row(id, "en", english / 3)]
    table = drops(rows, ["en", "hi"])
    assert [(r["neuron_id"], round(r["drop"], 4), r["change"]) for r in table] == [
        ("layers.17.mlp/16378", 0.6183, "missing"),
        ("layers.35.mlp/12089", 0.3306, "weaker"),
        ("layers.17.mlp/1212", 0.2947, "weaker"),
        ("layers.26.mlp/3138", 0.2035, "weaker"),
        ("layers.35.mlp/8726", 0.2035, "missing"),
        ("layers.26.mlp/7960", 0.1183, "weaker"),
        ("layers.17.mlp/20271", 0.0783, "weaker"),
    ]
    assert (table[0]["in_reference"], table[0]["in_version"], table[0]["layer"]) == (0.6183, 0.0, 17)


def test_drops_tell_new_and_stronger_and_leave_out_what_has_no_normaliser() -> None:
    rows = [
        row("layers.0.mlp/1", "a", 0.25),
        row("layers.0.mlp/1", "b", 0.75),
        row("layers.0.mlp/2", "b", 0.5),
        row("layers.0.mlp/3", "a", 0.5),
        row("layers.0.mlp/3", "b", 0.5),
        row("layers.0.mlp/3", "c", 0.125),
        row("layers.0.mlp/4", "a", None),
    ]
    table = drops(rows, ["a", "b", "c"])
    assert [(r["neuron_id"][-1], r["label"], r["drop"], r["change"]) for r in table] == [
        ("3", "c", 0.375, "weaker"),
        ("1", "c", 0.25, "missing"),
        ("3", "b", 0.0, "equal"),
        ("1", "b", -0.5, "stronger"),
        ("2", "b", -0.5, "new"),
    ]
    assert drops(rows, ["a"]) == []


def test_concepts_have_their_maximum_its_place_and_counts_in_every_version() -> None:
    rows = [
        row("layers.0.mlp/1", "a", 0.25, token_index=3, domains=["terror", "violence"]),
        row("layers.0.mlp/1", "a", 0.5, token_index=4, token="gun", domains=["terror", "violence"]),
        row("layers.0.mlp/2", "a", 0.375, token_index=4, domains=["terror"]),
        row("layers.0.mlp/2", "b", 2.0, token_index=1, domains=["terror"]),
        row("layers.0.mlp/7", "a", 9.0, explanation=None, domains=[], category=None),
        row("layers.0.mlp/8", "a", 8.0, domains=[], category=None),
        row("layers.1.mlp/1", "b", 0.5),
    ]
    table = concepts(rows, ["a", "b"])
    assert [(r["concept"], r["hook_point"], r["label"], r["max"], r["n_tokens"], r["n_neurons"]) for r in table] == [
        ("terror", "layers.0.mlp", "a", 0.5, 2, 2),
        ("terror", "layers.0.mlp", "b", 2.0, 1, 1),
        ("violence", "layers.0.mlp", "a", 0.5, 2, 1),
        ("violence", "layers.0.mlp", "b", 0.0, 0, 0),
        ("none", "layers.0.mlp", "a", 8.0, 1, 1),
        ("none", "layers.0.mlp", "b", 0.0, 0, 0),
        ("unexplained", "layers.0.mlp", "a", 9.0, 1, 1),
        ("unexplained", "layers.0.mlp", "b", 0.0, 0, 0),
        ("terror", "layers.1.mlp", "a", 0.0, 0, 0),
        ("terror", "layers.1.mlp", "b", 0.5, 1, 1),
    ]
    assert (table[0]["neuron_id"], table[0]["token_index"], table[0]["token"]) == ("layers.0.mlp/1", 4, "gun")
    assert {r["concept"] for r in concepts(rows, ["a", "b"], by="category")} == {"weapons", "none", "unexplained"}
    assert concepts(rows, ["a", "b"], by="neuron")[0]["concept"] == "layers.0.mlp/7"


# --- on a model ---------------------------------------------------------------------------------------------------


def test_rows_are_the_inspectors_hits_in_every_version(inspector: Inspector) -> None:
    result = trajectories(inspector, {"plain": PLAIN, "other": OTHER}, top=1000)
    for label, text in (("plain", PLAIN), ("other", OTHER)):
        inspection = inspector.inspect(text)
        expected = [
            (i, unit.text, hit.neuron_id, hit.activation, hit.normalised, hit.explanation, hit.domains, hit.score)
            for i, unit in enumerate(inspection.units)
            for hit in inspection.hits(i)
        ]
        keys = ["token_index", "token", "neuron_id", "activation", "normalised", "explanation", "domains", "score"]
        assert [tuple(r[key] for key in keys) for r in result.rows if r["label"] == label] == expected
    weapons = [r for r in result.rows if r["category"] == "weapons"]
    assert weapons
    assert all(r["domains"] == ["violence", "terror"] for r in weapons)
    assert {(r["hook_point"], r["layer"]) for r in result.rows} == {("layers.0.mlp", 0), ("layers.1.mlp", 1)}
    assert result.facts["concepts"] == concepts(result.rows, ["plain", "other"])
    tokens = result.facts["versions"][1]["tokens"]
    assert "".join(token["text"] for token in tokens) == OTHER


@pytest.mark.parametrize("by", ["domain", "category", "neuron"])
def test_the_cut_keeps_every_firing_of_the_strongest_neurons(inspector: Inspector, by: Any) -> None:
    prompts = {"plain": PLAIN, "other": OTHER}
    everything = trajectories(inspector, prompts, top=1000, by=by).rows
    cut = trajectories(inspector, prompts, top=2, by=by)
    best: dict[str, float] = {}
    for r in everything:
        best[r["neuron_id"]] = max(r["normalised"] or 0.0, best.get(r["neuron_id"], 0.0))
    groups: dict[tuple[str, str], set[str]] = {}
    for r in everything:
        named = {"domain": r["domains"], "category": [r["category"]] if r["category"] else [], "neuron": ["any"]}[by]
        for name in named or [str(r["explanation"] is None)]:
            groups.setdefault((name, r["hook_point"]), set()).add(r["neuron_id"])
    kept = {id for ids in groups.values() for id in sorted(ids, key=lambda id: (-best[id], id))[:2]}
    assert cut.rows == [r for r in everything if r["neuron_id"] in kept]
    assert len(cut.rows) < len(everything)
    if by != "neuron":  # the table is over everything that fires
        assert cut.facts["concepts"] == concepts(everything, list(prompts), by=by)


def test_an_answer_is_marked_and_the_templates_own_words_are_left_out(inspector: Inspector) -> None:
    result = trajectories(inspector, {"plain": PLAIN}, answer=4, top=1000)
    inspection = inspector.inspect([{"role": "user", "content": PLAIN}], max_new_tokens=4)
    answered = {i for i in range(len(inspection.units)) if inspection.is_answer(i)}
    fired = {r["token_index"] for r in result.rows if r["is_answer"]}
    assert fired
    assert fired <= answered
    assert result.facts["versions"][0]["answer"] == inspection.answer


def test_a_default_system_prompt_is_no_part_of_the_prompt(
    inspector: Inspector, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = (
        "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind to the teacher.<|im_end|>\n{% endif %}"
    )
    monkeypatch.setattr(inspector.tokenizer, "chat_template", template + inspector.tokenizer.chat_template)
    result = trajectories(inspector, {"plain": PLAIN}, answer=2, top=1000)
    tokens = result.facts["versions"][0]["tokens"]
    before = next(i for i, token in enumerate(tokens) if token["text"] == "<|im_end|>")
    assert "teacher" in "".join(token["text"] for token in tokens[:before])
    assert min(r["token_index"] for r in result.rows) > before


def test_the_result_is_stored_and_its_python_makes_the_same_rows(
    inspector: Inspector, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = {"en": 'Say "president" twice\\n', "zh": "总统"}
    result = trajectories(inspector, prompts, top=3, by="category", languages={"en": "en"})
    path = write_result(result, tmp_path / "t.parquet")
    assert pq.read_schema(path).remove_metadata() == TRAJECTORIES
    assert read_result(path).rows == result.rows
    assert {r["language"] for r in result.rows if r["label"] == "zh"} == {"zh"}
    asked = []
    monkeypatch.setattr(Inspector, "from_pretrained", lambda release: asked.append(release) or inspector)
    names: dict[str, Any] = {}
    exec(result.python, names)
    assert names["result"] == result
    assert asked == ["somewhere/tiny"]
    json.dumps(result.facts, allow_nan=False)


# --- whether the model reads a version ----------------------------------------------------------------------------


class Costs:
    """Stands for an inspector whose model finds every next token equally likely, one of 2 ** bits."""

    device = "cpu"

    def __init__(self, bits: dict[str, int], n_tokens: dict[str, int]) -> None:
        self.bits, self.n_tokens = bits, n_tokens
        self.last = ""
        self.model = self

    def encode(self, text: str) -> list[int]:
        self.last = text
        return [0] * self.n_tokens[text]

    def __call__(self, input_ids: Any, use_cache: bool) -> Any:
        return SimpleNamespace(logits=torch.zeros(1, input_ids.shape[1], 2 ** self.bits[self.last]))


def read(bits: int, n_tokens: int, text: str = "b" * 40, language: str | None = "sw", other: str | None = "en") -> Any:
    """The reading of a text beside one of 11 tokens and 40 characters that costs 10 · 2 = 20 bits."""
    costs = Costs({"a" * 40: 2, text: bits}, {"a" * 40: 11, text: n_tokens})
    inspector: Any = costs
    prompts, spoken = {"en": "a" * 40, "it": text}, {"en": other, "it": language}
    return readings(inspector, prompts, spoken)["it"]


def test_bits_are_summed_over_all_tokens_but_the_first() -> None:
    found = read(3, 21)
    assert found.bits == pytest.approx(60)
    assert found.times_reference == pytest.approx(3.0)
    assert found.bits_per_byte == pytest.approx(1.5)
    assert found.tokens_per_character == pytest.approx(21 / 40)


@pytest.mark.parametrize(
    ("bits", "n_tokens", "language", "verdict", "words"),
    [
        (2, 15, "sw", "known", "about as easily as en (1.4 times the bits of en, 0.38 tokens per character)."),
        (2, 17, "sw", "hard", "as unusual text (1.6 times the bits of en"),
        (3, 15, "sw", "unknown", "in a language that it does not know (2.1 times the bits of en"),
        (3, 15, "en", "hard", "version it (English) as unusual text"),  # a misspelt text is in no other language
        (3, 15, None, "hard", "version it as unusual text"),
    ],
)
def test_the_verdict_follows_the_stated_limits(
    bits: int, n_tokens: int, language: str | None, verdict: str, words: str
) -> None:
    found = read(bits, n_tokens, language=language)
    assert found.verdict == verdict
    assert words in found.sentence
    assert (HARD_ABOVE, UNKNOWN_ABOVE, PIECES_FROM) == (1.5, 2.0, 1.0)


def test_a_vocabulary_of_pieces_is_an_unknown_language_but_digits_are_not() -> None:
    assert read(2, 10, text="总统发表讲话").verdict == "unknown"  # 10 tokens for 6 characters
    assert read(2, 5, text="总统发表讲话").verdict == "known"  # 8 bits
    assert read(1, 12, text="123456789012").verdict == "known"


def test_the_reference_and_a_lone_text_are_not_judged(inspector: Inspector) -> None:
    both = readings(inspector, {"first": OTHER, "en": PLAIN}, {"first": None, "en": "en"})
    assert both["en"].times_reference is None
    assert both["en"].verdict == "alone"
    assert both["en"].sentence.endswith("; the other versions are compared with it.")
    assert both["first"].times_reference == pytest.approx(both["first"].bits / both["en"].bits)  # type: ignore[operator]
    alone = readings(inspector, {"x": PLAIN}, {"x": None})["x"]
    assert alone.sentence.endswith("; there is no other version to compare it with.")
    assert readings(inspector, {"x": "a"}, {"x": None})["x"].bits is None


def test_bits_are_those_of_the_models_own_probabilities(inspector: Inspector) -> None:
    ids = inspector.encode(PLAIN)
    with torch.no_grad():
        probabilities = inspector.model(input_ids=torch.tensor([ids])).logits[0].softmax(-1)
    expected = -sum(math.log2(probabilities[i, token]) for i, token in enumerate(ids[1:]))
    assert readings(inspector, {"x": PLAIN}, {"x": None})["x"].bits == pytest.approx(expected, rel=1e-4)


def test_an_unknown_language_is_said_in_the_result(inspector: Inspector) -> None:
    facts = trajectories(inspector, {"en": PLAIN, "zh": "总统在老房子附近。"}).facts
    assert facts["versions"][1]["reading"]["verdict"] == "unknown"
    assert facts["versions"][1]["reading"]["sentence"].startswith("The model reads Chinese as text in a language that")


# --- the built-in example -----------------------------------------------------------------------------------------


def test_the_case_study_has_three_prompts_in_five_versions() -> None:
    cases = case_study()
    assert list(cases) == ["person", "weapon", "politician"]
    for case in cases.values():
        assert list(case.prompts) == ["en", "zh", "hi", "paraphrase", "misspelt"]
        assert list(case.languages.values()) == ["en", "zh", "hi", "en", "en"]
        assert all(is_written_in(case.prompts[label], code) for label, code in case.languages.items())
        assert len(set(case.prompts.values())) == 5
        plain, misspelt = (re.findall(r"\w+", case.prompts[label].lower()) for label in ("en", "misspelt"))
        assert len(plain) == len(misspelt)
        assert len(set(plain) - set(misspelt)) >= 4


# --- what a person may get wrong ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ({}, {}, "there is no prompt"),
        ({"en": PLAIN, "zh": " "}, {}, "version zh: the prompt is empty"),
        ({"en": PLAIN, " ": PLAIN}, {}, "a version has an empty label"),
        ({"en": PLAIN, "long": "river " * 600}, {}, "version long: prompt and answer take"),
        ({"en": PLAIN}, {"by": "topic"}, "by='topic' is no grouping; use one of domain, category, neuron."),
        ({"en": PLAIN}, {"top": 0}, "top=0 and answer=0 were given"),
        ({"en": PLAIN}, {"languages": {"de": "de"}}, "languages names 'de', which is no version; versions are en."),
    ],
)
def test_mistakes_are_said(
    inspector: Inspector, prompts: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        trajectories(inspector, prompts, **options)


# --- the verb -----------------------------------------------------------------------------------------------------


@pytest.fixture
def ask(inspector: Inspector, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The verb's output for its arguments, on the tiny model."""
    monkeypatch.setattr(Inspector, "from_pretrained", lambda release, model=None: inspector)
    assert verb in [command.callback for command in app.registered_commands]

    def asked(*arguments: str) -> str:
        found = CliRunner().invoke(app, ["trajectories", "somewhere/tiny", *arguments], catch_exceptions=False)
        assert found.exit_code == 0, found.output
        return found.output

    return asked


def child_of(inspector: Inspector) -> str:
    inspection = inspector.inspect(PLAIN)
    return next(hit.neuron_id for hit in inspection.hits(6) if hit.hook_point == POINTS[1])


def test_the_verb_prints_readings_concepts_drops_and_where_it_stored_them(ask: Any, tmp_path: Path) -> None:
    file = tmp_path / "out.parquet"
    output = ask(PLAIN, "--version", "zh=总统", "--out", str(file))
    assert "The model reads Chinese as text in a language that it does not know" in output
    assert re.search(r"^layers\.0\.mlp +politics +\d+\.\d\d +on \d", output, re.MULTILINE)
    assert re.search(r"^layers\.\d\.mlp/\d+ +zh +\d+\.\d\d +0\.00 +\d+\.\d\d +number \d+", output, re.MULTILINE)
    assert f"stored: {file}" in output
    assert read_result(file).config == "trajectories"


def test_the_verb_attributes_a_neuron_and_draws_the_graph(ask: Any, inspector: Inspector, tmp_path: Path) -> None:
    neuron, drawing = child_of(inspector), tmp_path / "graph.svg"
    output = ask(PLAIN, "--neuron", neuron, "--svg", str(drawing), "--out", str(tmp_path / "o.parquet"))
    assert f"{neuron} on " in output
    assert "is not explained here" in output
    assert drawing.read_text(encoding="utf-8").startswith("<svg ")
    found = json.loads(ask(PLAIN, "--neuron", neuron, "--out", str(tmp_path / "o.parquet"), "--json"))
    assert found["attribution"]["nodes"][0]["neuron_id"] == neuron
    assert found["results"][0]["drops"] == []


def test_the_verb_runs_the_case_study_with_a_file_for_each(ask: Any, tmp_path: Path) -> None:
    output = ask("--case-study", "--out", str(tmp_path / "c.parquet"))
    for name in ("person", "weapon", "politician"):
        assert f"{name}:" in output
        assert (tmp_path / f"c-{name}.parquet").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no prompt"),
        ([PLAIN, "--version", "zh"], "--version 'zh' has no label; write it as zh="),
        ([PLAIN, "--version", "zh=a", "--version", "zh=b"], "the version 'zh' is given twice"),
        ([PLAIN, "--version", "prompt=a"], "the version 'prompt' is given twice"),
        ([PLAIN, "--case-study"], "--case-study brings its own prompts"),
        ([PLAIN, "--svg", "x.svg"], "--svg draws the attribution graph of a neuron; name it with --neuron."),
        (["--case-study", "--neuron", "1_1"], "--neuron is attributed on one prompt"),
    ],
)
def test_the_verb_says_mistakes(ask: Any, arguments: list[str], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        ask(*arguments)
