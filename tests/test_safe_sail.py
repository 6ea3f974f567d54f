"""The released Safe-SAIL toolkit as a release of ours: every trap of its files, and the numbers of the real ones."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from safesail import NeuronDatabase, Sae
from safesail.errors import InputError
from safesail.release import tables
from safesail.release.convert import convert
from safesail.release.manifest import Manifest, file_facts
from safesail.release.safe_sail_tables import N_STORED, Entry, Tables, quantile_of_top
from safesail.release.verify import verify
from safesail.repository import Repository, read_table

REPOSITORY = Path(__file__).resolve().parent.parent
REAL = REPOSITORY.parent / "shared/data/safe-sail"
Row = dict[str, Any]
TEXT = "Words | like <b>this</b> & that,\non two lines with *** inside."


def _entry(text: str | None, score: float, *tags: str) -> Row:
    return {"explanation": text, "correlation_score": score, "tag_list": list(tags)}


ENGLISH = {
    "35_5": _entry(TEXT, 0.5),
    "0_1": _entry("***", 0.3, "politics"),
    "17_4521": _entry(None, 0.4),
    "0_2": _entry("Insults.", 0.45, "violence", "politics"),
}
CHINESE = {
    "35_5": _entry("词。", 0.5),
    "0_1": _entry("***", 0.3, "politics"),
    "17_4521": _entry("数字。", 0.4),
    "0_2": _entry("侮辱。", 0.45, "politics", "violence"),
    "17_12046": _entry("***", 0.46, "politics"),
}
LISTS = {0: [7, 1, 2, 7], 17: [4521, 12046, 4521], 35: [5, 6, 5, 6, 6, 6]}
FOLDERS = {
    "flat": ("", "indices/", "quantiles/", ""),
    "the toolkit's own": (
        "data/neuron_db/",
        "data/activation/indices/",
        "data/activation/quantiles/",
        "data/sae_checkpoints/",
    ),
}


def made_toolkit(folder: Path, layout: str = "flat", **changed: Any) -> Path:
    """A toolkit in the documented shapes. changed: `en`, `cn`, `lists`, `tops`, `checkpoints` in place of the made."""
    database, indices, quantiles, checkpoints = FOLDERS[layout]
    for name, content in (("en", changed.get("en", ENGLISH)), ("cn", changed.get("cn", CHINESE))):
        _write(folder / database / f"{name}_db.json", lambda path, c=content: path.write_text(json.dumps(c)))
    for layer, latents in changed.get("lists", LISTS).items():
        _write(folder / indices / f"indices_layer{layer}.pt", lambda path, v=latents: torch.save(torch.tensor(v), path))
    for layer, top in changed.get("tops", {}).items():
        both = {"bottom_neuron_activations": torch.zeros(N_STORED, top.shape[1]), "top_neuron_activations": top}
        _write(folder / quantiles / f"quantile_layer{layer}.pt", lambda path, v=both: torch.save(v, path))
    for layer, tensors in changed.get("checkpoints", {}).items():
        _write(folder / checkpoints / f"ckpt_layer{layer}.pt", lambda path, v=tensors: torch.save(v, path))
    return folder


def _write(path: Path, write: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path)


def _converted(source: Path, target: Path) -> tuple[NeuronDatabase, list[str]]:
    lines: list[str] = []
    convert(str(source), target, "safesail", say=lines.append)
    return NeuronDatabase.load(target), lines


def _column(*values: float) -> torch.Tensor:
    """The 10,000 largest activations of a latent: these, in the given order at the end, and zeros."""
    return torch.cat([torch.zeros(N_STORED - len(values)), torch.tensor(values)])


@pytest.fixture
def database(tmp_path: Path) -> NeuronDatabase:
    return _converted(made_toolkit(tmp_path / "toolkit"), tmp_path / "ours")[0]


# --- the neuron database ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", FOLDERS)
def test_the_database_is_found_in_the_folder_and_in_the_toolkits_own_sub_folders(tmp_path: Path, layout: str):
    database, _ = _converted(made_toolkit(tmp_path / "toolkit", layout), tmp_path / "ours")
    assert [row["neuron_id"] for row in database] == [  # the union of both languages, best score first
        "layers.35.mlp/5",
        "layers.17.mlp/12046",
        "layers.0.mlp/2",
        "layers.17.mlp/4521",
        "layers.0.mlp/1",
    ]


def test_exactly_three_stars_are_masked_and_a_text_that_holds_them_is_kept(database: NeuronDatabase):
    assert (database["0_1"]["explanation"], database["0_1"]["status"]) == (None, "masked")
    assert (database["35_5"]["explanation"], database["35_5"]["status"]) == (TEXT, "ok")
    assert database["0_1"]["score"] == 0.3
    assert database.explanations["layers.0.mlp/1"]["zh"]["status"] == "masked"
    assert "***" in database.explanations["layers.0.mlp/1"]["zh"]["detail"]


def test_chinese_fills_in_for_a_null_text_only(database: NeuronDatabase):
    assert (database["17_4521"]["explanation"], database["17_4521"]["status"]) == ("数字。", "ok")
    of_languages = database.explanations["layers.17.mlp/4521"]
    assert (of_languages["en"]["explanation"], of_languages["en"]["status"]) == (None, "absent")
    assert of_languages["zh"]["explanation"] == "数字。"
    assert database["0_2"]["explanation"] == "Insults."


def test_a_neuron_of_one_language_alone_is_kept(database: NeuronDatabase):
    row = database["17_12046"]
    assert (row["status"], row["score"], row["domains"]) == ("masked", 0.46, ["politics"])
    assert list(database.explanations["layers.17.mlp/12046"]) == ["zh"]


def test_tags_are_a_set_in_one_order(tmp_path: Path):
    tags = [("violence", "politics"), ("politics", "violence"), ("politics", "violence", "politics", "else")]
    entries = [Entry.parse("0_1", _entry("t", 0.3, *each), "x").domains for each in tags]
    assert entries == [("politics", "violence"), ("politics", "violence"), ("politics", "violence", "else")]


def test_both_forms_of_an_id_are_accepted_without_any_quantiles(database: NeuronDatabase):
    assert database["17_4521"] is database["layers.17.mlp/4521"]
    assert database["17_4521"]["latent"] == 4521
    assert database["17_4521"]["layer"] == 17
    assert database.hook_points == ["layers.0.mlp", "layers.17.mlp", "layers.35.mlp"]
    assert database.normaliser("layers.17.mlp", 4521) is None
    assert [row["neuron_id"] for row in database.search("insults")] == ["layers.0.mlp/2"]


def test_a_score_that_is_not_a_number_is_undefined_and_no_zero(tmp_path: Path):
    toolkit = made_toolkit(
        tmp_path / "toolkit",
        en={"0_1": _entry("t", float("nan")), "0_2": _entry("u", 0.0)},
        cn={"0_1": _entry("z", 0.3)},
    )
    database, _ = _converted(toolkit, tmp_path / "ours")
    assert (database["0_1"]["score"], database["0_1"]["status"]) == (None, "undefined")
    assert database.scores["layers.0.mlp/1"][0]["status"] == "undefined"
    assert (database["0_2"]["score"], database["0_2"]["status"]) == (0.0, "ok")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ([], "no JSON object"),
        ({}, "no JSON object"),
        ({"17-4521": _entry("t", 0.3)}, '"17-4521" is not a layer and a latent below 20480'),
        ({"0_28480": _entry("t", 0.3)}, '"0_28480" is not a layer and a latent below 20480'),
        ({"0_1": None}, "the entry 0_1 is not"),
        ({"0_1": _entry("t", 0.3) | {"explanation": 3}}, "the entry 0_1 is not"),
        ({"0_1": _entry("t", 0.3) | {"correlation_score": "0.3"}}, "the entry 0_1 is not"),
        ({"0_1": _entry("t", 0.3) | {"correlation_score": True}}, "the entry 0_1 is not"),
        ({"0_1": _entry("t", 0.3) | {"tag_list": "politics"}}, "the entry 0_1 is not"),
    ],
)
def test_what_is_not_the_database_is_refused_and_nothing_is_left(tmp_path: Path, content: Any, said: str):
    toolkit = made_toolkit(tmp_path / "toolkit", en=content)
    with pytest.raises(InputError, match=said):
        convert(str(toolkit), tmp_path / "ours", "safesail")
    assert [path.name for path in tmp_path.iterdir()] == ["toolkit"]


def test_a_file_that_is_there_twice_is_not_chosen_silently(tmp_path: Path):
    toolkit = made_toolkit(made_toolkit(tmp_path / "toolkit"), "the toolkit's own")
    with pytest.raises(
        InputError, match=r"cn_db\.json is there twice, as cn_db\.json and as data/neuron_db/cn_db\.json"
    ):
        convert(str(toolkit), tmp_path / "ours", "safesail")


# --- the index lists ----------------------------------------------------------------------------------------------


def test_the_lists_multiplicities_are_kept_and_layer_35_counts_once_what_stands_twice(tmp_path: Path):
    _converted(made_toolkit(tmp_path / "toolkit"), tmp_path / "ours")
    rows = read_table(tmp_path / "ours/neurons/candidates/train.parquet")
    found = {row["neuron_id"]: (row["n_lists"], row["n_entries"], row["explained"]) for row in rows}
    assert found == {
        "layers.0.mlp/1": (1, 1, True),
        "layers.0.mlp/2": (1, 1, True),
        "layers.0.mlp/7": (2, 2, False),  # twice in the list, and another layer than 35
        "layers.17.mlp/4521": (2, 2, True),
        "layers.17.mlp/12046": (1, 1, True),
        "layers.35.mlp/5": (1, 2, True),
        "layers.35.mlp/6": (2, 4, False),
    }


def test_a_list_of_layer_35_without_double_entries_is_not_halved(tmp_path: Path):
    _converted(made_toolkit(tmp_path / "toolkit", lists={35: [5, 6, 6]}), tmp_path / "ours")
    rows = read_table(tmp_path / "ours/neurons/candidates/train.parquet")
    assert [(row["latent"], row["n_lists"]) for row in rows] == [(5, 1), (6, 2)]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (torch.ones(3), "is not a list of latents"),
        (torch.ones(3, 2, dtype=torch.int64), "is not a list of latents"),
        ({"indices": torch.ones(3, dtype=torch.int64)}, "is not a list of latents"),
        (torch.tensor([3, 20480]), "holds the number 20480; latents are 0 to 20479"),
        (torch.tensor([3, -1]), "holds the number -1; latents are 0 to 20479"),
    ],
)
def test_what_is_not_a_list_is_refused(tmp_path: Path, value: Any, said: str):
    toolkit = made_toolkit(tmp_path / "toolkit")
    torch.save(value, toolkit / "indices/indices_layer0.pt")
    with pytest.raises(InputError, match=said):
        convert(str(toolkit), tmp_path / "ours", "safesail")


class _Exploit:
    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return Path.touch, (self.proof,)


@pytest.mark.parametrize("name", ["indices/indices_layer0.pt", "quantiles/quantile_layer0.pt"])
def test_a_file_that_would_run_code_is_refused_and_not_run(tmp_path: Path, name: str):
    toolkit = made_toolkit(tmp_path / "toolkit", tops={0: torch.zeros(N_STORED, 4)})
    torch.save(_Exploit(tmp_path / "proof"), toolkit / name)
    with pytest.raises(InputError, match="it was not run"):
        convert(str(toolkit), tmp_path / "ours", "safesail")
    assert not (tmp_path / "proof").exists()


# --- quantiles ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["ascending", "descending", "shuffled"])
def test_the_normaliser_is_the_value_of_rank_199800_in_whatever_order_the_file_is(order: str):
    top = torch.arange(190_001, 200_001, dtype=torch.float64)
    top = {"ascending": top, "descending": top.flip(0), "shuffled": top[torch.randperm(N_STORED)]}[order]
    assert float(quantile_of_top(top, 1 - 1e-3)) == 199_800  # read as if it were ascending, descending gives 190201
    assert float(quantile_of_top(top, 0.9999)) == 199_980
    assert float(quantile_of_top(top, 1.0)) == 200_000


def test_between_two_ranks_the_quantile_is_linear():
    assert float(quantile_of_top(torch.tensor([1.0, 3.0, 7.0]), 0.85, n=10)) == 2.0  # rank 8.5, between the 8th and 9th
    with pytest.raises(AssertionError, match=r"rank 7.0 of 10 values is not among the 3 largest"):
        quantile_of_top(torch.tensor([1.0, 3.0, 7.0]), 0.7, n=10)


def test_columns_belong_to_the_entries_of_the_list_in_their_order_duplicates_included(tmp_path: Path):
    ranks = torch.arange(1.0, N_STORED + 1)
    rare, double = _column(0.5, 4.0, 2.0), ranks * 3  # 3 of 200,000 tokens: the 0.999 quantile is zero
    top = torch.stack([double, double, rare, ranks.flip(0)], dim=1)
    toolkit = made_toolkit(tmp_path / "toolkit", lists={0: [7, 7, 1, 2]}, tops={0: top})
    database, lines = _converted(toolkit, tmp_path / "ours")
    statistics = {row["neuron_id"]: row for row in database.quantiles.values()}
    two = statistics["layers.0.mlp/2"]  # its largest 10,000 are 1 … 10000: ranks 190001 … 200000
    assert (two["p99"], two["p999"], two["p9999"], two["max"]) == (8000, 9800, 9980, 10_000)
    assert (two["p50"], two["p90"], two["firing_rate"], two["median_active"]) == (None, None, None, None)
    assert (two["n_tokens"], two["normaliser"]) == (200_000, 9800)
    assert statistics["layers.0.mlp/7"]["normaliser"] == 3 * 9800
    assert database.normaliser("layers.0.mlp", 2) == 9800
    assert database["0_2"]["q999"] == 9800
    assert database["0_2"]["max_activation"] == 10_000
    assert "quantiles: of 3 latents" in lines


def test_a_rare_latent_has_no_normaliser_and_never_a_zero_to_divide_by(tmp_path: Path):
    top = torch.stack([_column(), _column(4.0, 0.5, 2.0), _column(*[1.0] * 201), _column()], dim=1)
    database, _ = _converted(made_toolkit(tmp_path / "toolkit", tops={0: top}), tmp_path / "ours")
    rare, silent = database.quantiles["layers.0.mlp/1"], database.quantiles["layers.0.mlp/7"]
    assert (rare["p999"], rare["normaliser"], rare["max"], rare["median_active"]) == (0.0, None, 4.0, 2.0)
    assert rare["firing_rate"] == pytest.approx(3 / 200_000)
    assert (rare["p50"], rare["p90"]) == (0.0, 0.0)  # all that is not stored is as small as the smallest stored: zero
    assert (silent["max"], silent["normaliser"], silent["firing_rate"]) == (0.0, None, 0.0)
    assert silent["median_active"] is None
    assert database.normaliser("layers.0.mlp", 1) is None
    assert database.normaliser("layers.0.mlp", 2) == 1.0  # active on 201 tokens: the 200th largest is positive
    assert all(row["normaliser"] is None or row["normaliser"] > 0 for row in database.quantiles.values())


def test_repeated_columns_that_differ_are_counted_and_the_first_is_used(tmp_path: Path):
    top = torch.stack([_column(5.0), _column(), _column(), _column(6.0)], dim=1)
    database, _ = _converted(made_toolkit(tmp_path / "toolkit", tops={0: top}), tmp_path / "ours")
    assert database.quantiles["layers.0.mlp/7"]["max"] == 5.0
    assert "1 columns of the quantile files repeat a latent" in (tmp_path / "ours/neurons/README.md").read_text()


@pytest.mark.parametrize(
    ("top", "said"),
    [
        (torch.zeros(N_STORED, 3), r"is \(10000, 3\), and \(10000, 4\) is expected"),
        (torch.zeros(100, 4), r"is \(100, 4\), and \(10000, 4\) is expected"),
        (torch.full((N_STORED, 4), -1.0), "negative or not finite"),
        (torch.full((N_STORED, 4), float("nan")), "negative or not finite"),
    ],
)
def test_quantiles_that_do_not_fit_the_list_are_refused(tmp_path: Path, top: torch.Tensor, said: str):
    toolkit = made_toolkit(tmp_path / "toolkit", tops={0: top})
    with pytest.raises(InputError, match=said):
        convert(str(toolkit), tmp_path / "ours", "safesail")


def test_quantiles_without_their_list_are_left_out_and_that_is_said(tmp_path: Path):
    toolkit = made_toolkit(tmp_path / "toolkit", tops={8: torch.zeros(N_STORED, 2)})
    _, lines = _converted(toolkit, tmp_path / "ours")
    assert any(line.startswith("quantiles/quantile_layer8.pt is left out: no indices_layer8.pt") for line in lines)
    assert "no indices" in (tmp_path / "ours/neurons/README.md").read_text()


# --- the folder ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    ("config", "split", "n"),
    [
        (None, "train", 5),
        ("neurons", "train", 5),
        ("explanations", "en", 4),
        ("explanations", "zh", 5),
        ("scores", "train", 5),
        ("quantiles", "train", 7),
        ("candidates", "train", 7),
    ],
)
def test_load_dataset_reads_every_config(tmp_path: Path, config: str | None, split: str, n: int, streaming: bool):
    from datasets import load_dataset

    _converted(made_toolkit(tmp_path / "toolkit"), tmp_path / "ours")
    found = load_dataset(
        str(tmp_path / "ours/neurons"), config, split=split, streaming=streaming, cache_dir=str(tmp_path / "cache")
    )
    assert len(list(found)) == n


def test_the_columns_are_those_of_a_release(tmp_path: Path):
    _converted(made_toolkit(tmp_path / "toolkit"), tmp_path / "ours")
    files = {
        "neurons/train": tables.NEURONS,
        "explanations/en": tables.EXPLANATIONS,
        "scores/train": tables.SCORES,
        "quantiles/train": tables.QUANTILES,
    }
    for name, schema in files.items():
        assert pq.read_schema(tmp_path / f"ours/neurons/{name}.parquet").equals(schema), name


def test_the_folder_has_a_manifest_a_card_and_the_licence(tmp_path: Path):
    toolkit = made_toolkit(tmp_path / "toolkit")
    (toolkit / "LICENSE").write_text("MIT License\n\nCopyright (c) somebody")
    _converted(toolkit, tmp_path / "ours")
    folder = tmp_path / "ours/neurons"
    manifest = Manifest.of(folder)
    assert (manifest.release, manifest.part, manifest.organization, manifest.gated) == ("ours", "neurons", "", None)
    assert manifest.files["LICENSE"] == file_facts(toolkit / "LICENSE")
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert set(manifest.files) == names - {"safesail.json"}
    card = (folder / "README.md").read_text()
    assert "license: mit" in card
    assert "5 neurons, 3 of them with a domain: politics 3, violence 1" in card
    assert str(tmp_path) not in card
    assert len(re.findall(r"^\|---", card, re.MULTILINE)) == 3  # configs, languages, scores
    assert "Words | like" not in card


def test_what_was_made_passes_its_verification(tmp_path: Path):
    convert(str(made_toolkit(tmp_path / "toolkit")), tmp_path / "ours", "safesail", say=lambda line: None)
    findings = {(finding.part, finding.check): finding for finding in verify(tmp_path / "ours")}
    assert [finding for finding in findings.values() if finding.status == "fails"] == []
    checked = ("checksums", "schema", "keys", "same neurons", "statuses", "main table", "quantiles")
    assert {findings["neurons", name].status for name in checked} == {"holds"}


def test_a_text_that_is_no_longer_the_sources_is_found(tmp_path: Path):
    convert(str(made_toolkit(tmp_path / "toolkit")), tmp_path / "ours", "safesail", say=lambda line: None)
    path = tmp_path / "ours/neurons/neurons/train.parquet"
    rows = [row | {"explanation": row["explanation"] and f"{row['explanation']}!"} for row in read_table(path)]
    tables.write_table(path, rows, tables.NEURONS)
    failed = {finding.check for finding in verify(tmp_path / "ours") if finding.status == "fails"}
    assert failed == {"checksums", "main table"}


def test_without_checkpoints_there_are_no_saes_and_that_is_said(tmp_path: Path):
    _, lines = _converted(made_toolkit(tmp_path / "toolkit"), tmp_path / "ours")
    assert [path.name for path in (tmp_path / "ours").iterdir()] == ["neurons"]
    assert lines[-1] == "saes: left out, the checkpoints (ckpt_layer<L>.pt) are not there"
    with pytest.raises(InputError, match=r"has no SAE checkpoints .*, and sparsify has no place for neurons"):
        convert(str(tmp_path / "toolkit"), tmp_path / "other", "sparsify")
    with pytest.raises(InputError, match=r"has no SAE checkpoints .*, and Neuronpedia needs their latents"):
        convert(str(tmp_path / "toolkit"), tmp_path / "other", "neuronpedia")


# --- checkpoints --------------------------------------------------------------------------------------------------


def _checkpoint(d_in: int = 8, d_sae: int = 256, **changed: torch.Tensor) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw)

    tied = random(1, d_in)
    decoder = torch.nn.functional.normalize(random(1, d_in, d_sae), dim=1)
    return {
        "tied_bias": tied,
        "pre_encoder_bias._bias_reference": tied.clone(),
        "post_decoder_bias._bias_reference": tied.clone(),
        "encoder.weight": random(1, d_sae, d_in),
        "encoder.bias": random(1, d_sae),
        "decoder.weight": decoder,
        **changed,
    }


def test_checkpoints_become_saes_that_compute_the_toolkits_equations(tmp_path: Path):
    tensors = _checkpoint()
    toolkit = made_toolkit(tmp_path / "toolkit", "the toolkit's own", checkpoints={0: tensors, 17: _checkpoint()})
    found = convert(str(toolkit), tmp_path / "ours", "safesail")
    assert len(found) == 2
    assert all(each.exact for each in found)
    sae = Sae.from_pretrained(tmp_path / "ours/saes", "layers.0.mlp")
    assert (sae.config.k, sae.config.hook_point) == (200, "layers.0.mlp")
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(2))
    bias, W, b = tensors["tied_bias"][0], tensors["encoder.weight"][0], tensors["encoder.bias"][0]
    a = (x - bias) @ W.T + b
    kept = a >= a.sort(dim=1, descending=True).values[:, 199:200]  # the 200 largest of 256, and of these the positive
    expected = torch.where(kept, a, torch.zeros(())).relu()
    np.testing.assert_allclose(sae.encode(x).numpy(), expected.numpy(), atol=1e-5)
    manifest = json.loads((tmp_path / "ours/saes/config.json").read_text())
    assert manifest["base_model"] == "Qwen/Qwen2.5-3B-Instruct"
    assert "license: mit" in (tmp_path / "ours/saes/README.md").read_text()
    assert Manifest.of(tmp_path / "ours/saes").release == Manifest.of(tmp_path / "ours/neurons").release == "ours"


def test_a_checkpoint_that_cannot_be_converted_does_not_take_the_neurons_with_it(tmp_path: Path):
    without = {name: value for name, value in _checkpoint().items() if name != "decoder.weight"}
    toolkit = made_toolkit(tmp_path / "toolkit", checkpoints={0: without})
    database, lines = _converted(toolkit, tmp_path / "ours")
    assert len(database) == 5
    assert not (tmp_path / "ours/saes").exists()
    assert any(line.startswith("ckpt_layer0 is left out:") and "decoder.weight" in line for line in lines)


# --- the real files -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tables]:
    if not REAL.is_dir():
        pytest.skip("the released files are not here")
    from safesail.release.safe_sail_toolkit import Toolkit

    folder = tmp_path_factory.mktemp("real") / "safe-sail"
    convert(str(REAL), folder, "safesail")
    repository = Repository(str(REAL))
    toolkit = Toolkit.find(repository, repository.names())
    assert toolkit is not None
    return folder, toolkit._replace(databases={"en": toolkit.databases["en"]}).tables()


def test_the_english_file_has_the_released_numbers(real: tuple[Path, Tables]):
    english = real[1]
    assert len(english.neurons) == 4700
    assert sum(bool(row["domains"]) for row in english.neurons) == 1758
    assert english.n_by_domain == {"politics": 1144, "pornography": 309, "violence": 582, "terror": 63}
    assert english.n_by_status == {"ok": 3543, "masked": 1144, "absent": 13}
    by_layer = Counter(row["layer"] for row in english.neurons)
    assert by_layer == {0: 1343, 8: 1350, 17: 843, 26: 772, 35: 392}


def test_the_union_with_chinese_has_one_neuron_more(real: tuple[Path, Tables]):
    database = NeuronDatabase.load(real[0])
    assert len(database) == 4701
    assert sum(bool(row["domains"]) for row in database) == 1759
    counts = Counter(domain for row in database for domain in row["domains"])
    assert counts == {"politics": 1145, "pornography": 309, "violence": 582, "terror": 63}
    assert Counter(row["status"] for row in database) == {"ok": 3556, "masked": 1145}
    assert {row["neuron_id"] for row in database if row["status"] == "masked"} == {
        row["neuron_id"] for row in database if "politics" in row["domains"]
    }
    assert sum("***" in (row["explanation"] or "") for row in database) == 5
    assert min(row["score"] for row in database) > 0.2
    assert database["17_12046"]["status"] == "masked"
    assert database["35_2536"]["explanation"].startswith("中文名字")
    assert database.hook_points == [f"layers.{layer}.mlp" for layer in (0, 8, 17, 26, 35)]


def test_the_real_lists_keep_their_multiplicities(real: tuple[Path, Tables]):
    rows = read_table(real[0] / "neurons/candidates/train.parquet")
    assert (len(rows), sum(row["n_entries"] for row in rows)) == (5756, 7830)
    assert Counter(row["layer"] for row in rows) == {0: 1448, 8: 1608, 17: 1174, 26: 998, 35: 528}
    assert sum(row["explained"] for row in rows) == 4701
    last = [row["n_lists"] for row in rows if row["layer"] == 35]
    assert (sum(last), last.count(1)) == (1378 // 2, 437)
    assert max(row["n_lists"] for row in rows) == 14
