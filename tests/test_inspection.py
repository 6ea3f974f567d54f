"""What fires on a conversation, by hand: hits, firings, strengths and filters; and what a neuron promotes."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hand_inspection import FIRST, SECOND, hand_database, hand_inspection
from made_release import made_recipe
from told_release import told_release

from safesail.diagnosis.base_model import base_model_of, same_tokenizer
from safesail.diagnosis.inspection import Firing, Hit, Inspection, Where
from safesail.diagnosis.inspector import Inspector, Promoted
from safesail.diagnosis.results import Result, default_path, read_result, write_result
from safesail.errors import InputError
from safesail.examples import Example, Examples
from safesail.lm.load import tokenizer_hash
from safesail.lm.unembedding import direct_effects
from safesail.neurons import NeuronDatabase, Said
from safesail.run import Run
from safesail.sae.config import SaeConfig
from safesail.sae.model import Sae


@pytest.fixture
def inspection() -> Inspection:
    return hand_inspection()


def normalised(hits: list[Hit]) -> list[tuple[str, float | None]]:
    return [(hit.neuron_id, hit.normalised and round(hit.normalised, 6)) for hit in hits]


# --- which neurons fire on a token --------------------------------------------------------------------------------


def test_hits_are_sorted_by_the_normalised_activation(inspection: Inspection):
    """On " bomb": 2.0 / 1, 3.0 / 2, 2.0 / 4 and 0.2 / 1; those without a row are there too."""
    expected = [(f"{FIRST}/5", 2.0), (f"{FIRST}/1", 1.5), (f"{SECOND}/3", 0.5), (f"{SECOND}/4", 0.2)]
    assert normalised(inspection.hits(2)) == expected
    assert normalised(inspection.hits(2, explained_only=True)) == expected[1:]


def test_a_hit_says_what_is_known_of_its_neuron(inspection: Inspection):
    unknown, bombs, refused, _ = inspection.hits(2)
    said = ("Bombs", ["terror"], 0.5, 0.4, 0.6, "good", "a model", "a simulator", "ok")
    assert bombs == Hit(f"{FIRST}/1", FIRST, 1, 3.0, 1.5, *said)
    nothing = (None, [], None, None, None, "unexplained", "", "", "")
    assert unknown == Hit(f"{FIRST}/5", FIRST, 5, 2.0, 2.0, *nothing)
    assert (refused.explanation, refused.status, refused.trust) == (None, "refused", "undefined")


def test_a_unit_of_two_tokens_counts_a_neuron_once_with_its_strongest_activation(inspection: Inspection):
    assert normalised(inspection.hits(3)) == [(f"{FIRST}/1", 2.0)]
    assert normalised(inspection.hits(3, explained_only=True)) == [(f"{FIRST}/1", 2.0)]


def test_a_latent_that_never_fired_in_the_corpus_has_no_normalised_activation(inspection: Inspection):
    [hit] = inspection.hits(4)
    assert (hit.neuron_id, hit.activation, hit.normalised) == (f"{SECOND}/6", 9.0, None)


def test_tokens_that_the_policy_leaves_out_have_no_hits_and_say_why(inspection: Inspection):
    assert [inspection.hits(i) for i in (0, 5)] == [[], []]
    assert inspection.note(0) == inspection.note(5) == "A special token: the token policy leaves it out."
    assert [inspection.note(i) for i in (1, 2, 3, 4, 6, 7)] == [""] * 6


def test_a_sink_and_another_roles_token_say_why_too(inspection: Inspection):
    counted = {
        name: mask & (torch.arange(9) != 1) & (torch.arange(9) != 2) for name, mask in inspection.counted.items()
    }
    roles = ["", "", "user", *[""] * 6]
    left_out = replace(inspection, counted=counted, left_out_roles=roles)
    assert left_out.note(1).startswith("An attention sink")
    assert left_out.note(2) == "A token of the user's turn: the token policy leaves that role out."
    assert left_out.hits(2) == []


def test_a_token_counts_where_one_hook_point_counts_it(inspection: Inspection):
    """Token 2 left out at the first hook point only: what fires at the second is shown, and there is no note."""
    counted = {**inspection.counted, FIRST: inspection.counted[FIRST] & (torch.arange(9) != 2)}
    partly = replace(inspection, counted=counted)
    assert normalised(partly.hits(2)) == [(f"{SECOND}/3", 0.5), (f"{SECOND}/4", 0.2)]
    assert partly.note(2) == ""
    assert [firing.index for firing in partly.firings(f"{FIRST}/1")] == [3, 7]


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (Where(), ["0/5", "0/1", "1/3", "1/4"]),
        (Where(domains=["violence"]), ["1/3", "1/4"]),
        (Where(domains=["terror", "violence"]), ["0/1", "1/3", "1/4"]),
        (Where(domains=[]), []),
        (Where(hook_point=FIRST), ["0/5", "0/1"]),
        (Where(above=0.1), ["0/1"]),  # larger than, and a score of null is above nothing
        (Where(above=0.05), ["0/1", "1/4"]),
        (Where(words="BOMB"), ["0/1"]),
        (Where(words="weak words"), ["1/4"]),
        (Where(words="words bombs"), []),
        (Where(words="炸弹"), ["0/1"]),
        (Where(words="layers.1"), ["1/3", "1/4"]),
        (Where(["terror"], SECOND, 0.05, "weak"), ["1/4"]),
        (Where(["terror"], FIRST, 0.05, "weak"), []),
    ],
)
def test_hits_are_filtered(inspection: Inspection, where: Where, expected: list[str]):
    found = [hit.neuron_id.removeprefix("layers.").replace(".mlp", "") for hit in inspection.hits(2, where)]
    assert found == expected
    explained = [hit.neuron_id for hit in inspection.hits(2, where, explained_only=True)]
    assert explained == [hit.neuron_id for hit in inspection.hits(2, where) if hit.trust != "unexplained"]


# --- where a neuron fires -----------------------------------------------------------------------------------------


def test_firings_are_the_units_of_a_neuron_strongest_first(inspection: Inspection):
    """Not on the special token, where its activation is not counted; of the unit of two tokens the larger."""
    assert inspection.firings(f"{FIRST}/1") == [Firing(3, 4.0, 2.0), Firing(2, 3.0, 1.5), Firing(7, 2.0, 1.0)]
    assert inspection.firings("0_1") == inspection.firings(f"{FIRST}/1")
    assert inspection.firings(f"{SECOND}/6") == [Firing(4, 9.0, None)]


def test_a_kept_zero_is_no_firing(inspection: Inspection):
    assert [firing.index for firing in inspection.firings(f"{FIRST}/5")] == [2, 1]
    assert inspection.firings(f"{SECOND}/0") == []


def test_a_neuron_of_another_release_fires_nowhere_here(inspection: Inspection):
    with pytest.raises(InputError, match=r"'layers\.7\.mlp/1' is not a neuron here"):
        inspection.firings("layers.7.mlp/1")


def test_firings_and_hits_tell_the_same():
    inspection = hand_inspection()
    hits = {(i, hit.neuron_id, hit.activation) for i in range(8) for hit in inspection.hits(i)}
    ids = {neuron for _, neuron, _ in hits}
    assert hits == {(f.index, neuron, f.activation) for neuron in ids for f in inspection.firings(neuron)}


# --- how strong a token is ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (None, [0, 0.7, 1.5, 2.0, 0, 0, 1.1, 1.0]),  # unit 6: 4.4 / 4; neuron 0/2 fires there too, of no domain
        (Where(above=0.2), [0, 0, 1.5, 2.0, 0, 0, 0, 1.0]),
        (Where(domains=["violence"]), [0, 0.7, 0.5, 0, 0, 0, 1.1, 0]),
        (Where(hook_point=SECOND), [0, 0.7, 0.5, 0, 0, 0, 1.1, 0]),
        (Where(words="炸弹"), [0, 0, 1.5, 2.0, 0, 0, 0, 1.0]),
        (Where(words="rivers"), [0] * 8),
        (Where(domains=[]), [0] * 8),
    ],
)
def test_a_tokens_strength_is_of_its_strongest_neuron_with_a_domain(
    inspection: Inspection, where: Where | None, expected: list[float]
):
    assert inspection.strengths(where) == pytest.approx(expected)


def test_the_inspection_as_json(inspection: Inspection):
    told = inspection.to_json(max_hits=1)
    assert (told["ids"], told["n_prompt"]) == (list(range(10, 19)), 7)
    assert [token["text"] for token in told["tokens"]] == [unit.text for unit in inspection.units]
    assert [token["answer"] for token in told["tokens"]] == [False] * 6 + [True] * 2
    assert (told["tokens"][3]["start"], told["tokens"][3]["end"]) == (3, 5)
    assert [[neuron["neuron_id"] for neuron in token["neurons"]] for token in told["tokens"][:3]] == [
        [],
        [f"{SECOND}/4"],
        [f"{FIRST}/1"],
    ]
    assert json.loads(json.dumps(told)) == told
    assert inspection.answer == " riverBomb"


# --- what a neuron promotes ---------------------------------------------------------------------------------------


def norm_of(name: str, norm: Any, unembedding: torch.Tensor) -> Any:
    """A model of which only the last norm, under its architecture's name, and the unembedding are there."""
    embeddings = SimpleNamespace(weight=unembedding)
    return SimpleNamespace(base_model=SimpleNamespace(**{name: norm}), get_output_embeddings=lambda: embeddings)


def rms_norm(x: torch.Tensor) -> torch.Tensor:
    return torch.tensor([1.0, 2.0]) * x / x.square().mean().add(1e-30).sqrt()


def test_direct_effects_by_hand_under_an_rms_norm():
    """(3, 4) has the root mean square √12.5 and becomes (3, 4) / √12.5, times the weight (1, 2): (3, 8) / √12.5."""
    model = norm_of("norm", rms_norm, torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 1.0]]))
    expected = torch.tensor([3.0, 8.0, 5.0]) / 12.5**0.5
    torch.testing.assert_close(direct_effects(model, torch.tensor([3.0, 4.0])), expected)
    torch.testing.assert_close(direct_effects(model, torch.tensor([6.0, 8.0])), expected)  # only the direction counts


@pytest.mark.parametrize("name", ["ln_f", "final_layer_norm", "final_layernorm"])
def test_direct_effects_by_hand_under_a_layer_norm(name: str):
    """(5, 1) is centred to (2, -2) and scaled to (1, -1), times the weight (3, 1); the bias is taken away again."""
    norm = torch.nn.LayerNorm(2, eps=1e-12)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([3.0, 1.0]))
        norm.bias.copy_(torch.tensor([7.0, 7.0]))
    model = norm_of(name, norm, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    torch.testing.assert_close(direct_effects(model, torch.tensor([5.0, 1.0])), torch.tensor([3.0, -1.0]))


def test_direct_effects_without_a_norm_are_the_unembedding_alone():
    model = norm_of("elsewhere", None, torch.tensor([[1.0, 2.0]]))
    torch.testing.assert_close(direct_effects(model, torch.tensor([3.0, 4.0])), torch.tensor([11.0]))


def test_a_direction_of_another_width_is_refused():
    with pytest.raises(InputError, match="has 3 numbers and the model's residual stream 2"):
        direct_effects(norm_of("norm", rms_norm, torch.zeros(4, 2)), torch.ones(3))


def test_promoted_tokens_are_those_whose_logits_rise_most(model: Any, tokenizer: Any):
    """The decoder row 5 · e₀ becomes √32 · e₀ under the norm; two tokens read e₀ with 3 and 1, one with -2."""
    d_sae, bomb, river, was = 8, *(tokenizer.encode(text)[0] for text in (" bomb", " river", " was"))
    rows = torch.zeros(d_sae, 32)
    rows[2, 0] = 5.0
    config = SaeConfig(d_in=32, d_sae=d_sae, k=2, hook_point=FIRST)
    sae = Sae(config, W_enc=rows.T.clone(), b_enc=torch.zeros(d_sae), W_dec=rows, b_dec=torch.zeros(32))
    inspector = Inspector(model, tokenizer, {FIRST: sae}, NeuronDatabase({}, {}, {}, {}), "made")
    with torch.no_grad():
        model.lm_head.weight.zero_()
        model.lm_head.weight[[bomb, river, was], 0] = torch.tensor([3.0, 1.0, -2.0])
        model.base_model.norm.weight.fill_(1.0)
    expected = [Promoted(bomb, " bomb", 3 * 32**0.5), Promoted(river, " river", 32**0.5)]
    found = inspector.promoted_tokens(f"{FIRST}/2", n=2)
    assert [token[:2] for token in found] == [token[:2] for token in expected]
    assert [token.effect for token in found] == pytest.approx([token.effect for token in expected], rel=1e-4)
    assert len(inspector.promoted_tokens("0_2", n=10_000)) == len(tokenizer)
    with pytest.raises(InputError, match="has no latent 8; its latents are 0 to 7"):
        inspector.promoted_tokens(f"{FIRST}/8")


# --- what is said of a neuron -------------------------------------------------------------------------------------


def test_said_in_the_language_asked_for_else_in_another():
    database = hand_database()
    assert database.said(f"{FIRST}/1") == Said("Bombs", "en", "ok")
    assert database.said(f"{FIRST}/1", "en") == Said("Bombs", "en", "ok")
    assert database.said(f"{FIRST}/1", "zh") == Said("炸弹", "zh", "ok")
    assert database.said(f"{SECOND}/4", "zh") == Said("Weak words", "en", "refused")
    assert database.said(f"{FIRST}/2", "zh") == Said("Rivers", "en", "absent")
    assert database.said(f"{FIRST}/2", "xx") == Said("Rivers", "en", "absent")


def test_said_of_a_neuron_without_an_explanation_or_a_row():
    database = hand_database()
    assert database.said(f"{SECOND}/3") == Said(None, "en", "refused")
    assert database.said(f"{SECOND}/3", "zh") == Said(None, "zh", "absent")
    assert database.said(f"{FIRST}/5") == Said(None, "en", "")
    assert NeuronDatabase({}, {}, {}, {}).said("layers.0.mlp/0") == Said(None, "", "")


def test_said_in_another_language_where_the_main_one_has_none():
    database = hand_database()
    database.explanations[f"{SECOND}/3"]["zh"] = {"explanation": "打人", "status": "ok"}
    assert database.said(f"{SECOND}/3") == Said("打人", "zh", "refused")
    assert database.said(f"{SECOND}/3", "en") == Said("打人", "zh", "refused")
    assert database.said(f"{SECOND}/3", "zh") == Said("打人", "zh", "ok")


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"domain": ["terror", "violence"]}, ["0/1", "1/4", "1/3"]),
        ({"domain": ["terror", ""]}, ["0/2", "0/1", "1/4"]),
        ({"domain": [""]}, ["0/2"]),
        ({"domain": ""}, ["0/2"]),
        ({"domain": []}, []),
        ({"domain": None}, ["0/2", "0/1", "1/4", "1/3"]),
        ({"category": "weapons"}, ["0/1", "1/4"]),
        ({"category": "weapons", "hook_point": SECOND}, ["1/4"]),
        ({"category": "nothing"}, []),
    ],
)
def test_a_search_over_several_domains_and_a_category(options: dict[str, Any], expected: list[str]):
    found = hand_database().search(**options)
    assert [row["neuron_id"].removeprefix("layers.").replace(".mlp", "") for row in found] == expected


def test_languages_and_landscape_are_read_with_the_release(told: Path, tmp_path: Path):
    database = NeuronDatabase.load(told)
    assert database.languages == ["en", "zh"]
    assert database.landscape["method"] in ("PCA", "UMAP")
    older = told_release(told, tmp_path / "older")
    (older / "neurons/landscape.json").unlink()
    assert NeuronDatabase.load(older).landscape == {}


# --- examples -----------------------------------------------------------------------------------------------------


def test_the_examples_of_a_neuron_strongest_first(told: Path):
    """Twice and a quarter of the normaliser, and a near-miss that is silent."""
    scale = NeuronDatabase.load(told).normaliser(FIRST, 4)
    assert scale is not None
    found = Examples(told).of(f"{FIRST}/4")
    assert [example.stratum for example in found] == ["top", "level-3", "near-miss"]
    tokens = [" a", " car", " bomb", " was", "\n", " found"]
    assert found[0][:2] == ("top", tokens)
    assert found[0].activations == pytest.approx([0, 0.5 * scale, 2 * scale, 0, 0, 0])
    assert found[1].activations == pytest.approx([0, 0.0625 * scale, 0.25 * scale, 0, 0, 0])
    assert found[2] == Example("near-miss", tokens, [0.0] * 6, "made texts, near-miss")
    assert Examples(told).of("layers.0.mlp/100") == []


def test_a_release_without_its_examples_says_so(told: Path, tmp_path: Path):
    folder = told_release(told, tmp_path / "told")
    examples = Examples(folder)
    table = folder / "examples/examples/train.parquet"
    table.write_bytes(b"nothing")
    with pytest.raises(InputError, match="is no readable table of examples"):
        examples.of(f"{FIRST}/4")
    table.unlink()
    with pytest.raises(InputError, match=r"^this release comes without its examples\.$"):
        examples.of(f"{FIRST}/4")


# --- the base model -----------------------------------------------------------------------------------------------


def test_a_run_is_looked_at_with_its_own_model_while_that_is_there(tmp_path: Path):
    manifest = {"base_model": "org/base", "base_model_revision": "abc"}
    (tmp_path / "weights").mkdir()
    settings = {"path": str(tmp_path / "weights"), "base_model": "org/other", "licence": "mit"}
    run = Run.create(tmp_path / "run", made_recipe(tmp_path, model=settings)).folder
    assert base_model_of(run, manifest) == (str(tmp_path / "weights"), None)
    (tmp_path / "weights").rmdir()
    assert base_model_of(run, manifest) == ("org/base", "abc")


def test_a_run_of_a_model_of_the_hub_is_looked_at_with_that(tmp_path: Path):
    settings = {"path": "org/model", "base_model": "", "revision": "def", "licence": "mit"}
    run = Run.create(tmp_path / "run", made_recipe(tmp_path, model=settings)).folder
    assert base_model_of(run, {"base_model": "org/base"}) == ("org/model", "def")


@pytest.mark.parametrize("release", ["org/demo", "downloaded"])
def test_another_release_is_looked_at_with_the_base_model_it_names(tmp_path: Path, release: str):
    (tmp_path / "downloaded").mkdir()
    place = tmp_path / release if release == "downloaded" else release
    assert base_model_of(place, {"base_model": "org/base"}) == ("org/base", None)
    assert base_model_of(place, {"base_model": "org/base", "base_model_revision": "abc"}) == ("org/base", "abc")


def test_another_tokenizer_than_that_of_the_training_is_refused(tokenizer: Any):
    right = {"base_model": "org/base", "tokenizer_hash": tokenizer_hash(tokenizer)}
    same_tokenizer(tokenizer, "here", right)
    same_tokenizer(tokenizer, "here", {"base_model": "org/base"})
    with pytest.raises(InputError, match=r"the tokenizer of here is not the one .* give the model org/base"):
        same_tokenizer(tokenizer, "here", {**right, "tokenizer_hash": "another"})


# --- results ------------------------------------------------------------------------------------------------------


def made_result(rows: list[dict[str, Any]]) -> Result:
    schema = pa.schema([("token", pa.string()), ("strength", pa.float64())])
    return Result("trajectories", rows, schema, "trajectory('a')\n", {"prompt": "é", "n": 2})


@pytest.mark.parametrize("rows", [[], [{"token": "你好", "strength": 0.5}, {"token": "b", "strength": None}]])
def test_a_result_comes_back_from_its_file(tmp_path: Path, rows: list[dict[str, Any]]):
    path = write_result(made_result(rows), tmp_path / "new/result.parquet")
    assert path == tmp_path / "new/result.parquet"
    assert read_result(path) == made_result(rows)
    assert pq.ParquetFile(path).num_row_groups == bool(rows)  # load_dataset reads no row group without rows
    assert [p.name for p in path.parent.iterdir()] == ["result.parquet"]


def test_a_result_has_the_name_of_a_table_and_other_tables_are_none(tmp_path: Path):
    with pytest.raises(InputError, match=r"is no name for a result; give one that ends with \.parquet"):
        write_result(made_result([]), tmp_path / "result.csv")
    with pytest.raises(InputError, match="is not a readable parquet file"):
        read_result(tmp_path / "absent.parquet")
    pq.write_table(pa.table({"a": [1]}), tmp_path / "other.parquet")
    with pytest.raises(InputError, match="is not a result of a diagnosis"):
        read_result(tmp_path / "other.parquet")


def test_a_result_is_kept_with_its_run_under_a_name_that_follows_from_the_question(tmp_path: Path):
    """The first twelve digits of the SHA-256 of `trajectory('a')` and a line break."""
    run = Run.create(tmp_path / "run", made_recipe(tmp_path)).folder
    name = "trajectories/8e68d2dfe812.parquet"
    assert default_path(run, made_result([])) == run / "scratch/diagnosis" / name
    assert default_path("org/demo", made_result([])) == Path("diagnosis") / name
    assert default_path(run, made_result([])._replace(python="trajectory('b')\n")).name != "8e68d2dfe812.parquet"
