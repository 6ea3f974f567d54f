"""The published folders as their readers see them: ids, search, statistics, data sets, and what must not be in them."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from made_release import NEURONS, PAIRS, made_explanations, made_recipe, made_release, made_scores, made_tags

from safesail import NeuronDatabase, Sae
from safesail.diagnosis.inspector import Inspection
from safesail.errors import InputError
from safesail.interpretation.collect import sparse_codes
from safesail.lm.activations import Activations
from safesail.lm.tokens import Span
from safesail.metrics import DEFINITIONS
from safesail.neurons import neuron_id, parse_neuron_id, strength
from safesail.recipe import TokenPolicy
from safesail.repository import Repository, part_of_release, read_table
from safesail.run import Run
from safesail.sae.sparse import Codes
from safesail.taxonomy import Taxonomy
from safesail.training.fidelity import FIDELITY

CONFIGS = ("neurons", "explanations", "scores", "quantiles", "selection", "contrast", "pairs")
HOOK_POINTS = ["layers.0.mlp", "layers.1.mlp"]


@pytest.fixture(scope="module")
def database(demo_run: Path) -> NeuronDatabase:
    return NeuronDatabase.load(demo_run)


# --- ids ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("layers.0.mlp/12", ("layers.0.mlp", 12)),
        (" layers.1.mlp/0 ", ("layers.1.mlp", 0)),
        ("0_12", ("layers.0.mlp", 12)),
        ("11_7", ("layers.11.mlp", 7)),
        ("1_7", ("layers.1.mlp", 7)),
    ],
)
def test_both_forms_of_an_id_are_read(text: str, expected: tuple[str, int]):
    assert parse_neuron_id(text, [*HOOK_POINTS, "layers.11.mlp"]) == expected


@pytest.mark.parametrize(
    "text",
    ["2_12", "layers.2.mlp/12", "layers.0.mlp/-1", "layers.0.mlp/", "/12", "0_", "0-12", "0_1_2", "", "0_x", "mlp/3"],
)
def test_anything_else_is_refused_with_an_example(text: str):
    with pytest.raises(InputError, match=r"is not a neuron here; ids look like layers\.0\.mlp/1234"):
        parse_neuron_id(text, HOOK_POINTS)


def test_a_short_id_that_could_mean_two_hook_points_is_refused():
    with pytest.raises(InputError):
        parse_neuron_id("0_12", ["layers.0", "layers.0.mlp"])
    assert parse_neuron_id("layers.0/12", ["layers.0", "layers.0.mlp"]) == ("layers.0", 12)


def test_an_id_comes_back_from_its_text():
    assert parse_neuron_id(neuron_id("layers.1.mlp", 5), HOOK_POINTS) == ("layers.1.mlp", 5)


@pytest.mark.parametrize(
    ("score", "word"),
    [
        (None, "undefined"),
        (-0.5, "weak"),
        (0.0, "weak"),
        (0.2, "weak"),
        (0.21, "fair"),
        (0.41, "good"),
        (0.9, "strong"),
    ],
)
def test_the_strength_of_a_score_is_a_plain_word(score: float | None, word: str):
    assert strength(score) == word


# --- search -------------------------------------------------------------------------------------------------------


def made_database() -> NeuronDatabase:
    def row(latent: int, score: float | None, explanation: str | None, domains: list[str], layer: int = 0) -> dict:
        hook_point = f"layers.{layer}.mlp"
        return {
            "neuron_id": f"{hook_point}/{latent}",
            "hook_point": hook_point,
            "explanation": explanation,
            "domains": domains,
            "category": "weapons" if "terror" in domains else "",
            "concept": "car bomb" if "terror" in domains else "",
            "score": score,
        }

    rows = [
        row(3, 0.1, "Words about weapons", ["terror"]),
        row(1, None, "Weapons of war", ["terror", "violence"]),
        row(2, 0.7, "Insults", ["violence"], layer=1),
        row(5, -0.9, "Weapons and insults", []),
        row(4, None, None, []),
        row(9, 0.7, "Gardens", ["violence"]),
    ]
    quantiles = [
        {"neuron_id": "layers.0.mlp/0", "hook_point": "layers.0.mlp", "normaliser": 0.0},
        {"neuron_id": "layers.0.mlp/1", "hook_point": "layers.0.mlp", "normaliser": 2.5},
        {"neuron_id": "layers.1.mlp/0", "hook_point": "layers.1.mlp", "normaliser": 1.0},
    ]
    said: dict[str, Any] = {"layers.0.mlp/9": {"en": {"explanation": "Gardens"}, "zh": {"explanation": "花园和Parks"}}}
    said["layers.0.mlp/4"] = {"en": {"explanation": None}, "zh": {"explanation": None}}
    return NeuronDatabase({r["neuron_id"]: r for r in rows}, {q["neuron_id"]: q for q in quantiles}, {}, said)


@pytest.mark.parametrize(
    ("text", "options", "latents"),
    [
        ("", {}, [9, 2, 3, 5, 1, 4]),  # best first, undefined last, equal scores by id
        ("weapons", {}, [3, 5, 1]),
        ("WEAPONS insult", {}, [5]),
        ("bomb", {}, [3, 1]),
        ("layers.1", {}, [2]),
        ("0.mlp/9", {}, [9]),
        ("", {"domain": "violence"}, [9, 2, 1]),
        ("", {"domain": "terror", "min_score": 0.0}, [3]),
        ("", {"min_score": 0.7}, [9, 2]),
        ("", {"min_score": -1.0}, [9, 2, 3, 5]),
        ("", {"hook_point": "layers.1.mlp"}, [2]),
        ("nothing like it", {}, []),
        ("花园", {}, [9]),
        ("parks gardens", {}, [9]),  # words of two languages' explanations
        ("none", {}, []),
    ],
)
def test_search_finds_by_text_domain_hook_point_and_score(text: str, options: dict[str, Any], latents: list[int]):
    found = made_database().search(text, **options)
    assert [int(row["neuron_id"].rpartition("/")[2]) for row in found] == latents


def test_the_domains_are_counted_most_frequent_first():
    assert made_database().domains == ["violence", "terror"]


def test_a_latent_that_never_fired_has_no_normaliser():
    database = made_database()
    assert database.normaliser("layers.0.mlp", 1) == 2.5
    assert database.normaliser("layers.0.mlp", 0) is None
    assert database.normaliser("layers.0.mlp", 77) is None


# --- the database of a run ----------------------------------------------------------------------------------------


def test_the_database_loads_from_the_run_and_from_its_folder(demo_run: Path, database: NeuronDatabase):
    other = NeuronDatabase.load(str(demo_run / "neurons"))
    assert len(database) > 0
    assert other == NeuronDatabase.load(demo_run / "neurons") == database
    assert list(database) == list(other.neurons.values())
    assert database.hook_points == HOOK_POINTS


def test_a_neuron_is_found_by_its_short_and_its_full_id(database: NeuronDatabase):
    for row in database:
        assert database[row["neuron_id"]] is row
        assert database[f"{row['layer']}_{row['latent']}"] is row


def test_a_latent_without_a_row_says_why(database: NeuronDatabase):
    silent = next(name for name in database.quantiles if name not in database.neurons)
    with pytest.raises(InputError, match=f"{silent} has no row: it was not among the safety-related latents"):
        database[silent]
    with pytest.raises(InputError, match="is not a neuron here"):
        database["7_3"]


def test_the_rows_are_published_best_score_first(demo_run: Path):
    scores = [row["score"] for row in read_table(demo_run / "neurons/neurons/train.parquet")]
    defined = [score for score in scores if score is not None]
    assert defined == sorted(defined, reverse=True)
    assert scores[: len(defined)] == defined


def test_every_neuron_has_its_latent_its_statistics_its_scores_and_its_explanation(
    demo_run: Path, database: NeuronDatabase
):
    saes = Sae.load_all(demo_run / "saes")
    for row in database:
        assert 0 <= row["latent"] < saes[row["hook_point"]].config.d_sae
        quantiles = database.quantiles[row["neuron_id"]]
        assert (row["q999"], row["max_activation"], row["firing_rate"]) == (
            quantiles["p999"],
            quantiles["max"],
            quantiles["firing_rate"],
        )
        methods = {score["method"]: score for score in database.scores[row["neuron_id"]]}
        assert set(methods) == {"segment-5/embedding", "segment-5/lexical", "similarity/embedding"}
        assert row["score"] == methods["segment-5/embedding"]["score"]
        assert row["lexical_score"] == methods["segment-5/lexical"]["score"]
        assert database.explanations[row["neuron_id"]]["en"]["explanation"] == row["explanation"]
        assert set(row["domains"]) <= set(row["candidate_for"])


def test_scores_lie_in_their_intervals_or_are_null(database: NeuronDatabase):
    rows = [row for group in database.scores.values() for row in group]
    for row in rows:
        if row["score"] is None:
            assert row["status"] != "ok"
            assert row["low"] is row["high"] is None
        else:
            assert row["status"] == "ok"
            assert row["low"] is None or -1 <= row["low"] <= row["score"] + 1e-9 <= row["high"] + 2e-9 <= 1 + 4e-9
        assert 0 <= row["n_active"] <= row["n_units"]
        counts = [row[f"{kind}_{sign}"] for kind in ("true", "false") for sign in ("positives", "negatives")]
        assert counts == [None] * 4 or sum(counts) == row["n_units"]


def test_every_latent_of_the_selected_saes_has_ascending_quantiles(demo_run: Path, database: NeuronDatabase):
    saes = Sae.load_all(demo_run / "saes")
    expected = {neuron_id(name, j) for name, sae in saes.items() for j in range(sae.config.d_sae)}
    assert set(database.quantiles) == expected
    for row in database.quantiles.values():
        ladder = [0.0, *(row[name] for name in ("p50", "p90", "p99", "p999", "p9999", "max"))]
        assert ladder == sorted(ladder)
        assert (row["normaliser"] > 0) == (row["firing_rate"] > 0) == (row["max"] > 0)
        assert row["normaliser"] == max(row["p999"], row["median_active"])


def test_the_statistics_equal_numpys_over_the_harvest(demo_run: Path, database: NeuronDatabase):
    """Dense encoding of every counted token by the published SAE, written out, and numpy's quantiles over it."""
    activations = Activations(demo_run / "scratch/harvest")
    sae = Sae.from_pretrained(demo_run / "saes", "layers.1.mlp")
    keep = activations.counted("layers.1.mlp", sae.config.token_policy)
    x = activations.rows("layers.1.mlp", torch.arange(activations.n_tokens)[keep])
    pre = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    threshold = pre.sort(dim=1, descending=True).values[:, sae.config.k - 1 : sae.config.k]
    latents = torch.where(pre >= threshold, pre, 0).clamp(min=0).numpy()
    levels = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999, "p9999": 0.9999, "max": 1.0}
    for j in range(0, sae.config.d_sae, 5):
        row = database.quantiles[neuron_id("layers.1.mlp", j)]
        assert row["n_tokens"] == len(x)
        assert row["firing_rate"] == pytest.approx((latents[:, j] > 0).mean(), abs=2.5 / len(x))  # ties, rounding
        for name, level in levels.items():
            expected = np.quantile(latents[:, j], level, method="inverted_cdf")
            assert row[name] == pytest.approx(float(expected), rel=1e-3, abs=1e-4), name


def test_latents_are_counted_on_the_tokens_of_the_policy_only(demo_run: Path):
    """A strict policy leaves out half of the tokens; of the rest, every active latent is there once, strongest last."""
    activations, policy = Activations(demo_run / "scratch/harvest"), TokenPolicy(sink_norm_multiple=1.001)
    sae = Sae.from_pretrained(demo_run / "saes", "layers.1.mlp")
    firings = sparse_codes(sae, activations, policy)
    keep = activations.counted("layers.1.mlp", policy)
    assert 0.2 < float(keep.float().mean()) < 0.8
    dense = sae.encode(activations.rows("layers.1.mlp", torch.arange(activations.n_tokens)))
    n_active = ((dense > 0) & keep[:, None]).sum(0)
    for j in range(sae.config.d_sae):
        values, rows = firings.of(j)
        assert len(values) == pytest.approx(int(n_active[j]), abs=2)
        assert keep[rows.long()].all()
        assert len(rows.unique()) == len(rows)
        assert torch.equal(values, values.sort().values)
        torch.testing.assert_close(values, dense[rows.long(), j], rtol=1e-4, atol=1e-4)


def test_the_manifest_marks_the_most_faithful_of_the_saes_that_are_as_good_as_the_best(release: Path):
    manifest = Repository(str(release / "saes")).json("config.json")
    for hook_point, chosen in manifest["selected"].items():
        mine = {sae["id"]: sae for sae in manifest["saes"] if sae["id"].startswith(f"{hook_point}/")}
        good = [sae for sae in mine.values() if sae["as_good_as_best"]]
        assert mine[chosen]["explained_variance"] == max(sae["explained_variance"] for sae in good)
        assert max(mine.values(), key=lambda sae: sae[manifest["selected_by"]["criterion"]]) in good
        assert [name for name, sae in mine.items() if sae["selected"]] == [chosen]


def test_every_sae_is_published_with_its_fidelity_and_intervals(release: Path):
    """The same numbers in metrics.json, the manifest and the `selection` table, which are those of fidelity.json."""
    measured = Run.open(release).json_of("eval", "fidelity.json")
    manifest = {sae["id"]: sae for sae in Repository(str(release / "saes")).json("config.json")["saes"]}
    table = {row["sae_id"]: row for row in read_table(release / "neurons/selection/train.parquet")}
    assert set(measured) == set(manifest) == set(table)
    for sae_id, numbers in measured.items():
        metrics = Repository(str(release / "saes")).json(f"{sae_id}/metrics.json")["metrics"]
        for name in FIDELITY:
            low, high = numbers["intervals"][name]
            for place in (metrics, manifest[sae_id], table[sae_id]):
                assert (place[name], place[f"{name}_low"], place[f"{name}_high"]) == (numbers[name], low, high)
            assert numbers["definitions"][name] in DEFINITIONS
            assert None in (numbers[name], low) or low - 1e-9 <= numbers[name] <= high + 1e-9
        assert table[sae_id]["architecture"] == sae_id.rpartition("/")[2].partition("-")[0]


def test_the_contrast_of_an_sae_is_published_with_its_null_and_the_options(release: Path):
    """The same numbers in metrics.json and the `selection` table; the manifest names what they depend on."""
    measured = Run.open(release).json_of("select", "selection.json")
    manifest = Repository(str(release / "saes")).json("config.json")
    table = {row["sae_id"]: row for row in read_table(release / "neurons/selection/train.parquet")}
    assert manifest["selected_by"] == measured["options"]
    for sae_id, numbers in measured["curve"].items():
        metrics = Repository(str(release / "saes")).json(f"{sae_id}/metrics.json")["metrics"]
        for name in ("i_cdf", "i_cdf_low", "i_cdf_null", "i_cdf_p", "above_null", "above_null_high", "as_good_as_best"):
            assert metrics[name] == table[sae_id][name] == numbers[name], name
        for t, value in numbers["l0_t"].items():
            assert (metrics["l0_t"][t], metrics["l0_t_null"][t]) == (value, numbers["l0_t_null"][t])
            assert table[sae_id][f"l0_t_{t}"] == value
            assert table[sae_id][f"l0_t_{t}_null"] == numbers["l0_t_null"][t]


# --- what fires on a token ----------------------------------------------------------------------------------------


def test_tokens_may_have_different_numbers_of_active_latents():
    """Ragged codes: the first token has two latents above zero and a zero, the second none, the third one."""
    codes = Codes(torch.tensor([2.0, 0.0, 1.0, 5.0]), torch.tensor([1, 3, 0, 1]), torch.tensor([0, 3, 3, 4]))
    inspection = Inspection(
        ids=[5, 6, 7],
        n_prompt=3,
        units=[Span("a", 0, 1, False), Span("b", 1, 2, False), Span("c", 2, 3, False)],
        codes={"layers.0.mlp": codes},
        counted={"layers.0.mlp": torch.tensor([True, True, True])},
        error={"layers.0.mlp": torch.zeros(3)},
        left_out_roles=["", "", ""],
        database=made_database(),
    )
    fired = [[(hit.latent, hit.activation) for hit in inspection.hits(i)] for i in range(3)]
    assert fired == [[(1, 2.0), (0, 1.0)], [], [(1, 5.0)]]


# --- several languages and every status ---------------------------------------------------------------------------


def test_a_neuron_has_its_explanations_and_scores_in_every_language(made: Path):
    database = NeuronDatabase.load(made)
    first = NEURONS[0]
    said = {language: row["explanation"] for language, row in database.explanations[first].items()}
    assert said == {"en": "Words about bombs.", "zh-Hant": "關於炸彈的詞。"}
    assert {(row["method"], row["language"], row["score"]) for row in database.scores[first]} == {
        ("segment-5/llm", "en", 0.5),
        ("segment-5/llm", "zh-Hant", 0.25),
        ("segment-5/lexical", "", 0.2),
        ("similarity/embedding", "en", 0.0),
    }
    assert [row["neuron_id"] for row in database.search("炸彈 bombs")] == [NEURONS[0], NEURONS[5], NEURONS[2]]


def test_the_score_of_a_neuron_is_the_first_methods_in_the_first_language(made: Path):
    database = NeuronDatabase.load(made)
    assert {name: database[name]["score"] for name in NEURONS} == dict(
        zip(NEURONS, (0.5, 0.1, None, None, None, -0.25), strict=True)
    )
    assert {name: database[name]["lexical_score"] for name in NEURONS} == dict.fromkeys(NEURONS, 0.2)
    row = database[NEURONS[0]]
    assert (row["score_low"], row["score_high"], row["confidence"]) == (0.4, 0.6, 0.75)
    assert (row["simulator"], row["q_value"]) == ("segment-5/llm (m)", 0.0625)


def test_a_failure_is_a_status_and_never_a_number_or_a_sentence(made: Path):
    database = NeuronDatabase.load(made)
    assert [database[name]["status"] for name in NEURONS] == ["ok", "ok", "undefined", "refused", "unparsed", "ok"]
    for row in database:
        assert (row["score"] is None) == (row["status"] != "ok")
        assert (row["explanation"] is None) == (row["status"] in ("refused", "unparsed", "failed"))


def test_what_a_neuron_cost_is_the_sum_of_its_calls(made: Path):
    """100 + 20 tokens and 0.0025 USD to explain, and 50 + 10 and 0.001 to score in each of two languages."""
    database = NeuronDatabase.load(made)
    spent = {
        name: [database[name][key] for key in ("prompt_tokens", "completion_tokens", "cost_usd")] for name in NEURONS
    }
    assert spent[NEURONS[0]] == [200, 40, pytest.approx(0.0045)]
    assert spent[NEURONS[3]] == [100, 20, pytest.approx(0.0025)]  # refused, so nothing was simulated
    assert spent[NEURONS[5]] == [200, 40, None]  # its explanation has no price


@pytest.mark.parametrize(
    ("methods", "scored", "score", "baseline"),
    [
        (["segment-llm", "segment-lexical"], ["zh-Hant"], 0.25, 0.2),
        (["segment-lexical"], [], 0.2, 0.2),
        (["text-embedding", "segment-lexical"], [], 0.0, None),  # whole texts have another baseline
    ],
)
def test_score_and_explanation_are_of_the_first_language_that_is_scored(
    tmp_path: Path, methods: list[str], scored: list[str], score: float, baseline: float | None
):
    recipe = made_recipe(tmp_path, score={"methods": methods, "languages": scored})
    row = NeuronDatabase.load(made_release(tmp_path, recipe))[NEURONS[0]]
    assert row["explanation"] == ("關於炸彈的詞。" if scored else "Words about bombs.")
    assert (row["score"], row["lexical_score"]) == (score, baseline)


def test_an_explanation_without_a_score_of_the_first_method_stops_the_build(tmp_path: Path):
    scores = [row for row in made_scores() if row["neuron_id"] != NEURONS[0]]
    with pytest.raises(AssertionError, match=f"{NEURONS[0]} is explained and has no score by segment-5/llm"):
        made_release(tmp_path, scores=scores)


# --- repositories -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["../x", "/etc/passwd", "a\\b", "a/../../x", "..", "~/x", "", ".", "a\x00b", "neurons/../../x"]
)
def test_a_name_that_leads_out_of_the_repository_is_refused(tmp_path: Path, name: str):
    (tmp_path / "inside").mkdir()
    (tmp_path / "x").write_text("secret")
    with pytest.raises(InputError, match="is not a relative path inside a repository"):
        Repository(str(tmp_path / "inside")).file(name)


def test_a_name_that_leads_out_is_refused_before_the_hub_is_asked():
    with pytest.raises(InputError, match="is not a relative path inside a repository"):
        Repository("some-org/some-name").file("../x")


def test_a_missing_file_says_what_the_folder_holds(tmp_path: Path):
    for i in range(15):
        (tmp_path / f"f{i:02}").write_text("")
    (tmp_path / ".hidden").write_text("")
    with pytest.raises(InputError, match=r"has no file gone; it holds f00, .*, f11 and 3 more"):
        Repository(str(tmp_path)).file("gone")


@pytest.mark.parametrize("content", [b"", b"PAR1nonsense", b"{}"])
def test_a_table_that_is_not_parquet_is_named(tmp_path: Path, content: bytes):
    (tmp_path / "t.parquet").write_bytes(content)
    with pytest.raises(InputError, match=r"t\.parquet is not a readable parquet file"):
        Repository(str(tmp_path)).table("t.parquet")


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe"])
def test_json_that_is_not_json_is_named(tmp_path: Path, content: bytes):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(InputError, match=r"a\.json is not valid JSON"):
        Repository(str(tmp_path)).json("a.json")


def test_a_token_is_never_printed():
    assert "hf_secret" not in repr(Repository("org/name", token="hf_secret"))


def test_the_part_of_a_release(tmp_path: Path):
    (tmp_path / "run/neurons").mkdir(parents=True)
    run = tmp_path / "run"
    assert part_of_release(run, "neurons") == part_of_release(str(run), "neurons") == str(run / "neurons")
    assert part_of_release(run / "neurons", "neurons") == str(run / "neurons")
    (run / "neurons/neurons").mkdir()  # the data set has a config of the same name
    assert part_of_release(run / "neurons", "neurons") == str(run / "neurons")
    assert part_of_release("org/demo", "saes") == "org/demo-saes"
    assert part_of_release("org/demo-saes", "saes") == "org/demo-saes"


# --- data sets ----------------------------------------------------------------------------------------------------


def front_matter(folder: Path) -> dict[str, Any]:
    import yaml

    return yaml.safe_load((folder / "README.md").read_text(encoding="utf-8").split("---\n")[1])


def named_configs(folder: Path) -> dict[str, list[str]]:
    """{config: its splits} of a README's front matter."""
    return {
        config["config_name"]: [files["split"] for files in config["data_files"]]
        for config in front_matter(folder)["configs"]
    }


def test_the_front_matter_names_the_configs_and_every_file_is_in_one(release: Path):
    configs = front_matter(release / "neurons")["configs"]
    assert sorted(config["config_name"] for config in configs) == sorted(CONFIGS)
    assert [config["config_name"] for config in configs if config.get("default")] == ["neurons"]
    listed = {files["path"] for config in configs for files in config["data_files"]}
    folder = release / "neurons"
    assert listed == {str(path.relative_to(folder)) for path in folder.rglob("*.parquet")}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("streaming", [False, True])
def test_load_dataset_reads_every_config_and_split(release: Path, tmp_path: Path, config: str, streaming: bool):
    import datasets

    folder = release / "neurons"
    for split in named_configs(folder)[config]:
        rows = datasets.load_dataset(str(folder), config, split=split, streaming=streaming, cache_dir=str(tmp_path))
        expected = read_table(folder / config / f"{split.replace('_', '-')}.parquet")
        assert len(expected) > 0
        assert list(rows) == expected


def test_the_pairs_are_published_as_they_were_used(made: Path):
    assert read_table(made / "neurons/pairs/train.parquet") == PAIRS


@pytest.mark.parametrize(("part", "config"), [("neurons", "neurons"), ("examples", "examples")])
def test_the_default_config_loads_without_a_name(demo_run: Path, tmp_path: Path, part: str, config: str):
    import datasets

    rows = datasets.load_dataset(str(demo_run / part), split="train", cache_dir=str(tmp_path))
    assert rows.config_name == config
    assert list(rows) == read_table(demo_run / part / config / "train.parquet")


def test_a_release_with_nothing_in_some_columns_has_the_same_types(made: Path, tmp_path: Path):
    """Every call refused and no price given: whole columns are null, and all of them keep their type."""
    gone = {"explanation": None, "status": "refused", "confidence": None, "cost_usd": None}
    nothing = dict.fromkeys(name for name, value in made_scores()[0].items() if isinstance(value, float))
    counts = dict.fromkeys(name for name in made_scores()[0] if name.endswith(("positives", "negatives")))
    said = [row | gone for row in made_explanations()]
    scores = [row | nothing | counts | {"status": "refused"} for row in made_scores()]
    empty = made_release(tmp_path, explanations=said, scores=scores, tags=[tag | _UNTAGGED for tag in made_tags()])
    assert len(NeuronDatabase.load(empty)) == len(NEURONS)
    for path in sorted((made / "neurons").rglob("*.parquet")):
        schema = pq.read_schema(path)
        assert pq.read_schema(empty / "neurons" / path.relative_to(made / "neurons")) == schema
        assert "null" not in {str(field.type) for field in schema}


_UNTAGGED = {"domains": [], "category": "", "concept": "", "candidate_for": []}


def test_a_release_in_which_nothing_was_explained_is_whole(tmp_path: Path):
    import datasets

    empty = made_release(tmp_path, explanations=[], scores=[], tags=[], explained={})
    assert named_configs(empty / "neurons")["explanations"] == ["en"]
    for config in ("neurons", "explanations", "scores"):
        (split,) = named_configs(empty / "neurons")[config]
        folder = str(empty / "neurons")
        assert list(datasets.load_dataset(folder, config, split=split, streaming=True)) == []
    assert list(NeuronDatabase.load(empty)) == []


def test_the_columns_that_people_read_come_first(demo_run: Path):
    columns = pq.read_schema(demo_run / "neurons/neurons/train.parquet").names
    assert columns[:5] == ["explanation", "domains", "category", "concept", "score"]


# --- what must not be in them -------------------------------------------------------------------------------------


def test_no_document_is_in_both_halves(demo_run: Path):
    rows = read_table(demo_run / "scratch/collect/examples.parquet")
    halves = {half: {row["document"] for row in rows if row["half"] == half} for half in ("explain", "score")}
    assert all(halves.values())
    assert not halves["explain"] & halves["score"]


def test_an_example_is_of_its_neuron_and_its_half(demo_run: Path):
    activations = Activations(demo_run / "scratch/harvest")
    for row in read_table(demo_run / "scratch/collect/examples.parquet"):
        assert activations.documents[row["piece"]] == row["document"]
        assert activations.half[row["piece"]] == row["half"]
        assert "".join(row["tokens"]) == row["text"]
        assert len(row["tokens"]) == len(row["activations"])
        assert max(row["activations"]) == pytest.approx(row["activation"])
        assert row["activations"][row["peak"]] == max(row["activations"])


def runs_of_words(texts: list[str], n: int) -> set[tuple[str, ...]]:
    """Every n consecutive words of every text, in lower case."""
    return {tuple(w[i : i + n]) for text in texts for w in [text.lower().split()] for i in range(len(w) - n + 1)}


def strings_in(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return [text for item in value for text in strings_in(item)]
    return []


def test_no_example_text_is_in_the_open_data_set(demo_run: Path):
    folder = demo_run / "neurons"
    cells = [(folder / "README.md").read_text(encoding="utf-8")]
    for path in sorted(folder.rglob("*.parquet")):
        cells += [
            text
            for row in read_table(path)
            for key, value in row.items()
            if key != "snippet"
            for text in strings_in(value)
        ]
    examples = [row["text"] for row in read_table(demo_run / "examples/examples/train.parquet")]
    shared = runs_of_words(cells, 6) & runs_of_words(examples, 6)
    assert len(runs_of_words(examples, 6)) > 500
    assert shared == set()


def test_the_snippets_are_short_and_redacted(database: NeuronDatabase):
    taxonomy = Taxonomy.load()
    snippets = [row["snippet"] for row in database]
    assert sum(bool(snippet) for snippet in snippets) > len(snippets) / 2
    for snippet in snippets:
        assert len(snippet.split()) <= 11  # nine tokens between two ellipses
        assert not any(taxonomy.about(domain).search(snippet) for domain in taxonomy.domain_ids)


def test_the_published_examples_do_not_say_which_document_they_are_from(demo_run: Path):
    columns = pq.read_schema(demo_run / "examples/examples/train.parquet").names
    assert {"document", "piece"} & set(columns) == set()


def test_no_number_of_the_open_data_set_is_not_a_number(demo_run: Path):
    for path in sorted((demo_run / "neurons").rglob("*.parquet")):
        for row in read_table(path):
            assert not any(isinstance(value, float) and not math.isfinite(value) for value in row.values()), path
