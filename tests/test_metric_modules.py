"""The `evaluate` modules of `hub/metrics`: loaded offline, their numbers by hand, their cards and their pages."""

import ast
import contextlib
import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import SpaceCard

from safesail.assets import asset
from safesail.contrast import contrast
from safesail.errors import InputError
from safesail.metrics import DEFINITIONS, Interval, confusion, reconstruction, reconstruction_sums
from safesail.pairs import Pair
from safesail.recipe import SelectSection
from safesail.training.groups import groups_of, latent_shares, measure

evaluate = pytest.importorskip("evaluate")

REPOSITORY = Path(__file__).resolve().parent.parent
FOLDER = asset("hub/metrics")
NAMES = ("concept_interpretability", "sae_fidelity", "simulation_score")
Load = Callable[[str], Any]


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Load:
    """A metric by name, from its file as it stands; what it collects is kept in a folder of the test's own."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # the folder is what is published

    def loaded(name: str) -> Any:
        spec = importlib.util.spec_from_file_location(name, FOLDER / name / f"{name}.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        (metric,) = (x for x in vars(module).values() if isinstance(x, type) and issubclass(x, evaluate.Metric))
        return metric(cache_dir=str(tmp_path))

    return loaded


# --- the arithmetic beneath, in safesail.metrics -------------------------------------------------------------------


def test_confusion_counts_yes_and_no_right_and_wrong():
    said, active = torch.tensor([1, 1, 1, 0, 0, 0, 0, 0]) > 0, torch.tensor([1, 0, 0, 1, 1, 1, 0, 0]) > 0
    counts = {"true_positives": 1, "false_positives": 2, "false_negatives": 3, "true_negatives": 2}
    assert confusion(said, active) == counts


def test_reconstruction_sums_by_hand():
    x, x_hat = torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([[3.0, 0.0], [1.0, 0.0]])
    sums = reconstruction_sums(x, x_hat, torch.tensor([1.0, 1.0]))
    assert sums["residual"].tolist() == [16, 1]
    assert sums["total"].tolist() == [4 + 9, 1 + 1]
    assert sums["cosine"].tolist() == pytest.approx([9 / (5 * 3), 0])


def test_reconstruction_is_ratios_of_the_documents_sums():
    sums = {"residual": torch.tensor([1.0, 5.0]), "total": torch.tensor([4.0, 8.0]), "cosine": torch.tensor([0.5, 1.5])}
    measured = reconstruction(sums, torch.tensor([1, 3]), 2)
    # residual 6, total 12, 4 tokens of 2 dimensions, cosines 2; the documents' own FVU are 1/4 and 5/8
    values = {"explained_variance": 0.5, "fvu": 0.5, "mse": 6 / 8, "cosine": 2 / 4}
    assert {name: interval.value for name, interval in measured.items()} == values
    assert measured["fvu"] == Interval(0.5, 0.25, 0.625)
    assert measured["explained_variance"] == Interval(0.5, 0.375, 0.75)
    assert reconstruction({**sums, "n_active": torch.tensor([2.0, 9.0])}, torch.tensor([1, 3]), 2)["l0"].value == 11 / 4


# --- loaded as its users load it -----------------------------------------------------------------------------------

_CARDS = """
import doctest, socket, sys
def refuse(*arguments):
    raise AssertionError(f"the network was asked for: {arguments[1:]}")
socket.socket.connect = socket.socket.connect_ex = refuse
for name in sys.argv[1:]:
    found = doctest.testfile(f"hub/metrics/{name}/README.md", module_relative=False)
    assert found.attempted >= 6 and not found.failed, (name, found)
print("all examples hold")
"""


def _environment(home: Path, **more: str) -> dict[str, str]:
    """That of a fresh machine without a network, as far as the Hub's clients can tell."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "GRADIO_", "SPACE_"))}
    path = os.pathsep.join(filter(None, [str(FOLDER.parent.parent), os.environ.get("PYTHONPATH")]))
    alone = {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    return {**kept, **alone, "PYTHONPATH": path, **more}


def _python(*arguments: str, home: Path) -> str:
    ended = subprocess.run(
        [sys.executable, *arguments],
        cwd=FOLDER.parent.parent,
        env=_environment(home, GRADIO_ANALYTICS_ENABLED="False"),
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    return ended.stdout


def test_each_cards_example_holds_with_an_empty_cache_and_no_network(tmp_path: Path):
    assert "all examples hold" in _python("-W", "error", "-c", _CARDS, *NAMES, home=tmp_path / "home")


# --- sae_fidelity --------------------------------------------------------------------------------------------------


def test_fidelity_by_hand(load: Load):
    result = load("sae_fidelity").compute(
        references=[[0, 0], [2, 4]], predictions=[[1, 0], [2, 2]], n_active=[1, 4], documents=["a", "b"]
    )
    # the mean is (1, 2): total 1+4+1+4 = 10, 5 in each document; residual 1 and 4
    assert (result["explained_variance"], result["fvu"], result["mse"], result["l0"]) == (0.5, 0.5, 5 / 4, 5 / 2)
    assert result["cosine"] == pytest.approx((0 + 12 / (20**0.5 * 8**0.5)) / 2)
    assert result["intervals"]["fvu"] == [1 / 5, 4 / 5]
    assert result["intervals"]["explained_variance"] == pytest.approx([1 / 5, 4 / 5])
    assert (result["d_in"], result["n_tokens"], result["n_documents"]) == (2, 2, 2)
    names = ("explained_variance", "fvu", "mse", "cosine", "l0")
    assert result["definitions"] == {name: f"{name}/v1" for name in names}


def test_fidelity_takes_the_mean_of_all_batches_as_the_baseline(load: Load):
    metric = load("sae_fidelity")
    for value in (0, 2):  # a batch for itself would have no variance
        metric.add_batch(references=[[value]], predictions=[[value + 1]])
    assert metric.compute()["explained_variance"] == 1 - 2 / 2


def test_fidelity_leaves_out_what_was_not_given(load: Load):
    result = load("sae_fidelity").compute(references=[[0], [2]], predictions=[[0], [2]])
    assert result["explained_variance"] == 1
    assert "l0" not in result
    assert result["n_documents"] is None
    assert set(map(tuple, result["intervals"].values())) == {(None, None)}


@pytest.mark.parametrize("references", [[[0.1, 0.7]] * 3, [[0.1, 0.7]]])
def test_fidelity_of_constant_activations_is_undefined_with_the_reason(load: Load, references: list[list[float]]):
    result = load("sae_fidelity").compute(references=references, predictions=[[0.2, 0.7]] * len(references))
    assert result["explained_variance"] is None
    assert result["fvu"] is None
    assert set(result["undefined"]) == {"explained_variance", "fvu"}
    assert result["undefined"]["fvu"] == "all references are the same"
    assert result["mse"] == pytest.approx(0.01 / 2)


# --- simulation_score ----------------------------------------------------------------------------------------------


def test_simulation_by_hand(load: Load):
    result = load("simulation_score").compute(predictions=[1, 1, 0, 0], references=[3, 0, 0, 0], texts=[1, 2, 3, 4])
    # deviations ±0.5 and 2.25, -0.75 three times: products 1.5, squares 1 and 6.75
    assert result["score"] == pytest.approx(1.5 / 6.75**0.5)
    assert result["auroc"] == (0.5 + 1 + 1) / 3
    counts = ("true_positives", "false_positives", "false_negatives", "true_negatives")
    assert [result[name] for name in counts] == [1, 1, 0, 2]
    assert (result["n_units"], result["n_active"], result["n_texts"]) == (4, 1, 4)
    assert result["definitions"]["score"] == "simulation/v1"
    low, high = result["intervals"]["score"]
    assert low < result["score"] < high == 1


def test_simulation_draws_texts_and_not_units(load: Load):
    metric = load("simulation_score")
    units = {"predictions": [1, 0, 1, 0] * 5, "references": [1, 0, 0, 0] * 5}
    alike = metric.compute(**units, texts=[i // 4 for i in range(20)])
    assert alike["intervals"]["score"] == pytest.approx([alike["score"]] * 2)  # five texts that are the same
    apart = metric.compute(**units, texts=list(range(20)))
    assert apart["intervals"]["score"][0] < apart["score"] - 0.1
    for texts in (None, ["one"] * 20):
        assert metric.compute(**units, texts=texts)["intervals"]["score"] == [None, None]


def test_simulation_intervals_depend_on_the_seed_alone(load: Load):
    chance, metric = np.random.default_rng(0), load("simulation_score")
    units = {"predictions": chance.random(40), "references": chance.random(40), "texts": np.arange(40) // 2}
    assert metric.compute(**units, seed=1) == metric.compute(**units, seed=1)
    assert metric.compute(**units, seed=1)["intervals"] != metric.compute(**units, seed=2)["intervals"]


def test_a_yes_is_a_prediction_above_the_bound(load: Load):
    metric, units = load("simulation_score"), {"predictions": [0.2, 0.5, 0.4], "references": [0, 1, 1]}
    assert metric.compute(**units)["false_negatives"] == 2
    assert metric.compute(**units, yes_above=0.3)["true_positives"] == 2
    assert "true_positives" not in metric.compute(**units, yes_above=None)


@pytest.mark.parametrize(
    ("predictions", "references", "reason"),
    [
        ([1, 1, 1], [0, 1, 0], "all predictions are the same"),
        ([0, 1, 0], [0, 0, 0], "all references are the same"),
        ([0.1] * 3, [0.7] * 3, "all references are the same"),
        ([1], [1], "there are fewer than two units"),
        ([0, 1e-9], [1e-9, 0], "predictions and references vary too little to be told from rounding"),
    ],
)
def test_a_score_without_variation_is_undefined_with_the_reason(
    load: Load, predictions: list[float], references: list[float], reason: str
):
    texts = list(range(len(references)))
    result = load("simulation_score").compute(predictions=predictions, references=references, texts=texts)
    assert result["score"] is None
    assert result["auroc"] is None
    assert result["undefined"] == {"score": reason, "auroc": reason}
    assert result["intervals"]["score"] == [None, None]


def test_a_score_can_be_defined_where_the_auroc_is_not(load: Load):
    result = load("simulation_score").compute(predictions=[0, 1], references=[1, 2])
    assert result["score"] == pytest.approx(1)
    assert result["auroc"] is None
    assert result["undefined"] == {"auroc": "every unit is active"}


# --- concept_interpretability --------------------------------------------------------------------------------------


def test_concept_by_hand(load: Load):
    result = load("concept_interpretability").compute(
        with_concept=[[True, True, False], [True, False, False]],
        without_concept=[[False, True, False], [False, True, False]],
        thresholds=[0, 0.5],
    )
    # latent 0 wins both pairs, latent 1 loses the second
    assert result["f_j"] == {"all": [1, 0, 0]}
    assert result["i_cdf"] == pytest.approx(1 / 3)
    assert result["i_cdf_swapped"] == pytest.approx(0.5 / 3)
    assert result["i_cdf_null"] == pytest.approx((1 / 3 + 0.5 / 3) / 2)
    assert result["above_null"] == pytest.approx((1 / 3 - 0.5 / 3) / 2)
    assert result["l0_t"] == {"0": 1, "0.5": 1}
    # swapped at random, latent 0 keeps a win with chance 3/4 and both with 1/4; latent 1 wins its pair with 1/2
    assert result["l0_t_null"] == pytest.approx({"0": 3 / 4 + 1 / 2, "0.5": 1 / 4})
    assert (result["n_pairs"], result["n_units"], result["n_categories"], result["n_latents"]) == (2, 2, 1, 3)
    assert 0.45 < result["p_value"] < 0.55  # only the first pair's sign matters


def test_a_latent_is_active_above_the_bound(load: Load):
    metric, pairs = load("concept_interpretability"), {"with_concept": [[0.4, 0]], "without_concept": [[-1, 0]]}
    assert metric.compute(**pairs)["f_j"]["all"] == [1, 0]
    raised = metric.compute(**pairs, active_above=0.4)
    assert raised["f_j"]["all"] == [0, 0]
    assert raised["active_above"] == 0.4


def test_categories_count_the_same_and_translations_are_one_unit(load: Load):
    sides = {"with_concept": [[1], [1], [1], [0]], "without_concept": [[0]] * 4}
    metric = load("concept_interpretability")
    result = metric.compute(**sides, categories=["a", "a", "a", "b"])
    assert result["f_j"] == {"a": [1], "b": [0]}
    assert result["i_cdf"] == 0.5  # over the pairs it would be 3/4
    result = metric.compute(**sides, pair_ids=["x"] * 4)
    assert result["n_units"] == 1
    assert result["intervals"] == {"i_cdf": [None, None], "above_null": [None, None]}


def test_concept_has_the_numbers_of_the_select_stage(load: Load):
    chance = torch.Generator().manual_seed(3)
    here, there = (torch.rand(24, 50, generator=chance) > 0.8 for _ in range(2))
    path = {"domain": "politics", "concept": "any"}
    pairs = [
        Pair(**path, id=f"{i // 2}", category=f"c{i % 6 // 2}", language="en", with_concept="a", without_concept="b")
        for i in range(24)
    ]
    found = contrast(here, there)
    expected = measure(found, latent_shares(found), groups_of(pairs)[0], SelectSection(), 7)
    result = load("concept_interpretability").compute(
        with_concept=here,
        without_concept=there,
        categories=[pair.category for pair in pairs],
        pair_ids=[pair.id for pair in pairs],
        seed=7,
    )
    same = ("i_cdf", "i_cdf_swapped", "i_cdf_null", "above_null", "l0_t", "l0_t_null")
    assert {name: result[name] for name in same} == {name: expected[name] for name in same}
    assert result["p_value"] == expected["i_cdf_p"]
    assert result["intervals"]["i_cdf"] == [expected["i_cdf_low"], expected["i_cdf_high"]]
    assert result["intervals"]["above_null"] == [expected["above_null_low"], expected["above_null_high"]]


# --- all of them ---------------------------------------------------------------------------------------------------


def _columns(name: str) -> dict[str, np.ndarray]:
    chance = np.random.default_rng(5)
    table = {"sae_fidelity": (30, 4), "concept_interpretability": (30, 9), "simulation_score": (30,)}[name]
    here, there = chance.normal(size=table).round(1), chance.normal(size=table).round(1)
    groups = np.array(["a", "b", "c"])[chance.integers(3, size=30)]
    return {
        "sae_fidelity": {
            "predictions": here,
            "references": there,
            "n_active": chance.integers(9, size=30),
            "documents": groups,
        },
        "concept_interpretability": {
            "with_concept": here,
            "without_concept": there,
            "categories": groups,
            "pair_ids": np.arange(30) // 2,
        },
        "simulation_score": {"predictions": here, "references": there, "texts": groups},
    }[name]


@pytest.mark.parametrize("name", NAMES)
def test_batch_by_batch_and_one_by_one_give_the_same_as_at_once(load: Load, name: str):
    columns, metric = _columns(name), load(name)
    at_once = metric.compute(**columns)
    for start in range(0, 30, 7):
        metric.add_batch(**{key: values[start : start + 7] for key, values in columns.items()})
    assert metric.compute() == at_once
    singular = {"predictions": "prediction", "references": "reference"}
    for row in range(30):
        metric.add(**{singular.get(key, key): values[row] for key, values in columns.items()})
    assert metric.compute() == at_once
    assert json.loads(json.dumps(at_once, allow_nan=False)) == at_once
    assert set(at_once["definitions"].values()) <= set(DEFINITIONS)


_ROWS = [[0.0, 1.0], [2.0, 3.0]]
_X = {"predictions": _ROWS, "references": _ROWS}
_S = {"predictions": [0, 1], "references": [0, 1]}
_C = {"with_concept": _ROWS, "without_concept": _ROWS}
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("sae_fidelity", {}, "predictions is not a table of numbers"),
    ("sae_fidelity", {"predictions": _ROWS}, "references is not a table of numbers"),
    ("sae_fidelity", {**_X, "predictions": [1, 2]}, "predictions is not a table of numbers; give one list of d_in"),
    ("sae_fidelity", {**_X, "predictions": [[1, 2], [3]]}, "predictions is not a table of numbers"),
    ("sae_fidelity", {**_X, "predictions": [["a", "b"]]}, "predictions is not a table of numbers"),
    ("sae_fidelity", {**_X, "predictions": []}, "predictions is not a table of numbers"),
    ("sae_fidelity", {**_X, "predictions": [[1], [2]]}, "hold 2 tokens of 1 numbers and references 2 tokens of 2"),
    ("sae_fidelity", {**_X, "predictions": [[0, 1], [2, None]]}, "token 1 of predictions holds a number that is not"),
    ("sae_fidelity", {**_X, "references": [[float("inf"), 1], [2, 3]]}, "token 0 of references"),
    ("sae_fidelity", {**_X, "references": [[1e200, 1], [2, 3]]}, "token 0 of references"),
    ("sae_fidelity", {**_X, "n_active": [1]}, "n_active is not 2 whole numbers"),
    ("sae_fidelity", {**_X, "n_active": [1, 0.5]}, "n_active is not 2 whole numbers"),
    ("sae_fidelity", {**_X, "n_active": [1, -1]}, "n_active is not 2 whole numbers"),
    ("sae_fidelity", {**_X, "n_active": [1, None]}, "n_active is not 2 whole numbers"),
    ("sae_fidelity", {**_X, "documents": "ab"}, "documents are not 2 names"),
    ("sae_fidelity", {**_X, "documents": ["a", None]}, "documents are not 2 names"),
    ("sae_fidelity", {**_X, "n_resamples": 0}, "n_resamples is 0"),
    ("simulation_score", {}, "predictions are not a list of numbers"),
    ("simulation_score", {**_S, "predictions": [[0], [1]]}, "predictions are not a list of numbers"),
    ("simulation_score", {**_S, "predictions": [0, 1, 1]}, "there are 3 predictions and 2 references"),
    ("simulation_score", {**_S, "references": [0, None]}, "unit 1 of references is not finite"),
    ("simulation_score", {**_S, "texts": ["a"]}, "texts are not 2 names"),
    ("simulation_score", {**_S, "texts": ["a", ""]}, "texts are not 2 names"),
    ("simulation_score", {**_S, "n_resamples": 0}, "n_resamples is 0"),
    ("concept_interpretability", {}, "with_concept is not a table of numbers"),
    (
        "concept_interpretability",
        {**_C, "without_concept": [[1, 2]]},
        "2 pairs of 2 latents and without_concept 1 pair",
    ),
    ("concept_interpretability", {**_C, "with_concept": [[0, 1], [float("nan"), 0]]}, "pair 1 of with_concept"),
    ("concept_interpretability", {**_C, "categories": ["a"]}, "categories are not 2 names"),
    ("concept_interpretability", {**_C, "pair_ids": 3}, "pair_ids are not 2 names"),
    ("concept_interpretability", {**_C, "thresholds": [2]}, "thresholds are [2]; give shares of pairs between 0 and 1"),
    ("concept_interpretability", {**_C, "thresholds": []}, "thresholds are []"),
    ("concept_interpretability", {**_C, "n_resamples": 0}, "n_resamples is 0"),
]
GOOD = {"sae_fidelity": _X, "simulation_score": _S, "concept_interpretability": _C}


@pytest.mark.parametrize(("name", "given", "sentence"), BAD)
def test_a_wrong_input_is_refused_in_a_sentence_and_nothing_of_it_is_kept(
    load: Load, name: str, given: dict[str, Any], sentence: str
):
    metric = load(name)
    with pytest.raises(InputError, match=re.escape(sentence)):
        metric.compute(**given)
    assert metric.compute(**GOOD[name]) == load(name).compute(**GOOD[name])


@pytest.mark.parametrize(
    ("name", "first", "second", "sentence"),
    [
        (
            "sae_fidelity",
            _X,
            {"predictions": [[1]], "references": [[1]]},
            "a batch of 1 numbers per token came after a batch of 2 numbers per token; give every batch the same",
        ),
        (
            "sae_fidelity",
            _X,
            {**_X, "n_active": [1, 2], "documents": ["a", "b"]},
            "with n_active and documents came after a batch of 2 numbers per token;",
        ),
        ("concept_interpretability", {**_C, "categories": ["a", "b"]}, _C, "a batch of 2 latents came after"),
        ("simulation_score", {**_S, "texts": ["a", "b"]}, _S, "texts were given for some batches only"),
    ],
)
def test_batches_of_unlike_columns_are_refused(
    load: Load, name: str, first: dict[str, Any], second: dict[str, Any], sentence: str
):
    metric = load(name)
    metric.add_batch(**first)
    with pytest.raises(InputError, match=re.escape(sentence)):
        metric.add_batch(**second)
    assert metric.compute() == metric.compute(**first)


# --- the cards -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_card_is_read_by_the_hubs_client_as_a_metrics_space(name: str):
    card = SpaceCard.load(FOLDER / name / "README.md")
    facts = card.data.to_dict()
    assert facts["title"]
    assert facts["description"]
    assert (facts["sdk"], facts["app_file"], facts["license"]) == ("gradio", "app.py", "apache-2.0")
    assert facts["tags"] == ["evaluate", "metric"]
    assert len(facts["short_description"]) <= 60  # the Hub refuses a longer one
    assert (FOLDER / name / facts["app_file"]).is_file()
    assert f"# {facts['title']}\n" in card.text


@pytest.mark.parametrize("name", NAMES)
def test_the_card_defines_what_the_module_returns(load: Load, name: str):
    text = " ".join((FOLDER / name / "README.md").read_text(encoding="utf-8").split())
    result = load(name).compute(**_columns(name))
    ids = set(re.findall(r"`(\w+/v\d+)`: ", text))
    assert ids
    assert ids <= set(result["definitions"].values())
    for id in ids:
        assert f"`{id}`: {DEFINITIONS[id]}." in text
    outputs = text[text.index("## Outputs") :]
    assert [key for key in result if f"`{key}`" not in outputs and f"`{key}/v1`" not in outputs] == []


@pytest.mark.parametrize("name", NAMES)
def test_the_card_and_the_page_ask_for_the_modules_inputs(load: Load, name: str):
    inputs = (FOLDER / name / "README.md").read_text(encoding="utf-8").partition("## Inputs")[2]
    asked = ast.literal_eval(_assigned(FOLDER / name / "app.py", "EXAMPLE"))
    assert list(asked) == list(_columns(name)) == list(load(name).features)
    assert all(f"\n- `{column}`" in inputs for column in asked)


def _assigned(path: Path, name: str) -> ast.expr:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    (node,) = (n for n in tree.body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == name)
    return node.value


@pytest.mark.parametrize("name", NAMES)
def test_a_pages_requirements_are_extras_that_the_package_has(name: str):
    lines = (FOLDER / name / "requirements.txt").read_text(encoding="utf-8").splitlines()
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    wanted = set(lines[0].removeprefix("safesail[").removesuffix("]").split(","))
    assert wanted == {"metrics", "space"} <= set(extras)
    assert lines[1:] == ["torch"] == (REPOSITORY / "space" / "requirements.txt").read_text().splitlines()[1:]


# --- the pages -----------------------------------------------------------------------------------------------------

_PAGES = """
import importlib.util, json, sys
import gradio
for name in sys.argv[1:]:
    spec = importlib.util.spec_from_file_location("app", f"hub/metrics/{name}/app.py")
    app = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(app)
    page = app.build()
    assert isinstance(page, gradio.Interface) and not page.is_running
    print(json.dumps({"name": name, "result": page.fn(*app.EXAMPLE.values())}))
"""


def test_each_page_is_built_and_computes_its_example(tmp_path: Path, load: Load):
    pytest.importorskip("gradio")
    lines = _python("-c", _PAGES, *NAMES, home=tmp_path / "home").splitlines()
    for name, line in zip(NAMES, lines, strict=True):
        example = ast.literal_eval(_assigned(FOLDER / name / "app.py", "EXAMPLE"))
        result = load(name).compute(**{column: json.loads(text) for column, text in example.items()})
        assert json.loads(line) == {"name": name, "result": result}


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    """The page of sae_fidelity, served by a process of its own on a free port of this machine."""
    pytest.importorskip("gradio")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-u", str(FOLDER / "sae_fidelity" / "app.py")]
    log = tmp_path / "page.log"
    with log.open("w") as output:
        environment = _environment(tmp_path / "home", GRADIO_SERVER_PORT=str(port), GRADIO_ANALYTICS_ENABLED="False")
        server = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        try:
            _wait_for(f"http://127.0.0.1:{port}/", server)
            yield f"http://127.0.0.1:{port}/"
        finally:
            server.terminate()
            server.wait(timeout=20)
    assert f"http://127.0.0.1:{port}" in log.read_text(), "the page is for this machine alone"


def _wait_for(address: str, server: subprocess.Popen[bytes]) -> None:
    for _ in range(600):
        assert server.poll() is None, "the page ended instead of serving"
        with contextlib.suppress(OSError), urllib.request.urlopen(address, timeout=5):
            return
        time.sleep(0.1)
    raise AssertionError("the page did not answer within a minute")


def test_a_page_answers_on_this_machine_and_says_what_is_wrong(address: str):
    gradio_client = pytest.importorskip("gradio_client")
    client = gradio_client.Client(address, verbose=False)
    try:
        result = client.predict("[[1, 0], [2, 2]]", "[[0, 0], [2, 4]]", "", "", api_name="/compute")
        assert (result["fvu"], result["mse"], result["definitions"]["fvu"]) == (0.5, 1.25, "fvu/v1")
        with pytest.raises(gradio_client.exceptions.AppError, match="references is not a table of numbers"):
            client.predict("[[1]]", "", "", "", api_name="/compute")
        with pytest.raises(gradio_client.exceptions.AppError, match="line 1 column"):
            client.predict("[[1", "[[1]]", "", "", api_name="/compute")
    finally:
        client.close()
