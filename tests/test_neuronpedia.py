"""The jsonl files for Neuronpedia: what its importer needs, the scores, and nothing that the release does not know."""

import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_release import HOSTILE

from safesail import NeuronDatabase, Sae
from safesail.errors import InputError
from safesail.release import neuronpedia
from safesail.release.convert import convert
from safesail.repository import read_table

Row = dict[str, Any]
SOURCE = "tiny/0-made-mlp"
NEEDED = {
    "features": {"modelId", "layer", "index", "frac_nonzero", "hasVector"},
    "activations": {
        *("id", "index", "layer", "modelId", "maxValue", "maxValueTokenIndex", "minValue", "creatorId", "tokens"),
        "values",
    },
    "explanations": {"id", "modelId", "layer", "index", "description", "authorId"},
    "scores": {
        *("id", "initiatedByUserId", "value", "explanationId"),
        *("explanationScoreTypeName", "explanationScoreModelName", "jsonDetails"),
    },
}
"""The columns of Neuronpedia's tables that have no default and may not be null."""


@pytest.fixture(scope="module")
def exported(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("np") / "export"
    convert(str(made), folder, "neuronpedia", say=lambda line: None)
    return folder


def _lines(path: Path) -> list[Row]:
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    return [json.loads(line) for line in content.decode().splitlines()]


def _rows(folder: Path, kind: str, source: str = SOURCE) -> list[Row]:
    paths = sorted((folder / source / kind).iterdir(), key=lambda path: int(path.name.split("-")[1].split(".")[0]))
    return [row for path in paths for row in _lines(path)]


def test_a_source_is_a_hook_point_in_a_folder_of_its_models_id(exported: Path):
    assert sorted(path.name for path in exported.iterdir()) == ["config", "tiny"]
    assert sorted(path.name for path in (exported / "tiny").iterdir()) == ["0-made-mlp", "1-made-mlp"]
    assert sorted(path.name for path in (exported / SOURCE).iterdir()) == [
        *("activations", "explanations", "features", "model.jsonl", "release.jsonl", "scores"),
        *("source.jsonl", "sourceset.jsonl"),
    ]


def test_the_metadata_names_what_is_known_and_nothing_else(exported: Path):
    of = {name: _lines(exported / SOURCE / f"{name}.jsonl") for name in ("release", "model", "sourceset", "source")}
    creator = "clkht01d40000jv08hvalcvly"
    where = {"modelId": "tiny", "creatorId": creator, "visibility": "PUBLIC"}
    assert of["model"] == [{"id": "tiny", "displayName": "tests/tiny", "creatorId": creator, "owner": "tests"}]
    assert of["source"] == [{"id": "0-made-mlp", "setName": "made-mlp", **where}]
    by = {"creatorName": "made", "urls": []}
    assert of["release"] == [{"name": "made", "description": "made", "creatorId": creator, **by}]
    about = {"name": "made-mlp", "description": "made: layers.0.mlp", "releaseName": "made"}
    assert of["sourceset"] == [{**about, **by, **where}]


@pytest.mark.parametrize("kind", NEEDED)
def test_every_line_has_what_the_importer_needs_the_same_keys_and_no_null(exported: Path, kind: str):
    for source in ("tiny/0-made-mlp", "tiny/1-made-mlp"):
        rows = _rows(exported, kind, source)
        assert rows
        for row in rows:
            assert row.keys() == rows[0].keys()
            assert NEEDED[kind] <= row.keys()
            assert None not in row.values()


def test_a_feature_is_a_latent_with_its_decoder_row_and_statistics(exported: Path, made: Path):
    rows, sae = _rows(exported, "features"), Sae.from_pretrained(made / "saes", "layers.0.mlp")
    assert [row["index"] for row in rows] == [str(j) for j in range(16)]
    vectors = np.array([row["vector"] for row in rows], dtype=np.float32)
    np.testing.assert_array_equal(vectors, sae.W_dec.numpy())  # the digits written give the same fp32 numbers back
    assert {row["hookName"] for row in rows} == {"blocks.0.hook_mlp_out"}
    assert {(row["frac_nonzero"], row["maxActApprox"]) for row in rows} == {(0.02, 3.0)}  # as in the quantiles


def test_an_explanation_is_written_in_every_language_and_a_failed_one_is_not(exported: Path):
    rows = _rows(exported, "explanations")
    assert [(row["index"], row["notes"], row["description"]) for row in rows] == [
        ("0", "language: en", "Words about bombs."),
        ("0", "language: zh-Hant", "關於炸彈的詞。"),
        ("1", "language: en", HOSTILE),
        ("1", "language: zh-Hant", "關於炸彈的詞。"),
    ]
    assert {(row["typeName"], row["explanationModelName"]) for row in rows} == {("safesail", "m")}
    others = _rows(exported, "explanations", "tiny/1-made-mlp")
    assert sorted({row["index"] for row in others}) == ["2", "5"]  # of 3 and 4 the question was not answered


def test_the_scores_belong_to_their_explanations(exported: Path, made: Path):
    said = {row["id"]: row for s in (0, 1) for row in _rows(exported, "explanations", f"tiny/{s}-made-mlp")}
    scores = [row for s in (0, 1) for row in _rows(exported, "scores", f"tiny/{s}-made-mlp")]
    found = {}
    for row in scores:
        text = said[row["explanationId"]]
        neuron = f"layers.{text['layer'][0]}.mlp/{text['index']}"
        key = (neuron, text["notes"].removeprefix("language: "), row["explanationScoreTypeName"])
        found[key] = (row["value"], row["explanationScoreModelName"])
    known = read_table(made / "neurons/scores/train.parquet")
    assert found == {
        (row["neuron_id"], row["language"], row["method"]): (row["score"], row["simulator"])
        for row in known
        if row["score"] is not None and not row["method"].endswith("/lexical")
    }
    details = json.loads(scores[0]["jsonDetails"])
    assert (details["low"], details["high"], details["n_units"], details["true_positives"]) == (0.4, 0.6, 40, 3)
    assert len({row["id"] for row in scores}) == len(scores) == 11


def test_types_and_models_that_rows_refer_to_are_there(exported: Path):
    names = {path.stem: {row["name"] for row in _lines(path)} for path in (exported / "config").iterdir()}
    assert names == {
        "explanation_type": {"safesail"},
        "explanation_model_type": {"m"},
        "explanation_score_type": {"segment-5/llm", "similarity/embedding"},
        "explanation_score_model": {"m", "e"},
    }


def test_activations_are_the_examples_on_which_the_neuron_fires_strongest_first(exported: Path):
    rows = [row for row in _rows(exported, "activations") if row["index"] == "0"]
    assert [row["maxValue"] for row in rows] == [2.0, 1.5]  # and no near-miss, which shows where it does not fire
    first = rows[0]
    assert first["tokens"] == [" the", " car", " bomb", " was", " found", " here"]
    assert first["values"] == [0.0, 0.0, 2.0, 0.0, 0.0, 0.0]
    assert (first["maxValueTokenIndex"], first["minValue"], first["dataSource"]) == (2, 0.0, "made texts")


def test_a_batch_holds_so_many_features_and_what_belongs_to_them(made: Path, tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr(neuronpedia, "BATCH", 2)
    neuronpedia.export(str(made), tmp_path)
    folder = tmp_path / SOURCE
    assert sorted(path.name for path in (folder / "features").iterdir()) == sorted(
        f"batch-{n}.jsonl.gz" for n in range(8)
    )
    assert [row["index"] for row in _lines(folder / "features/batch-3.jsonl.gz")] == ["6", "7"]
    assert {row["index"] for row in _lines(folder / "explanations/batch-0.jsonl.gz")} == {"0", "1"}
    assert [path.name for path in (tmp_path / "tiny/1-made-mlp/scores").iterdir() if "0" in path.name] == []
    assert neuronpedia.BATCH == 2


def test_batches_are_of_1024_features():
    assert neuronpedia.BATCH == 1024


def test_the_same_release_gives_the_same_bytes(made: Path, exported: Path, tmp_path: Path):
    convert(str(made), tmp_path / "again", "neuronpedia", say=lambda line: None)
    names = sorted(path.relative_to(exported) for path in exported.rglob("*") if path.is_file())
    assert all((tmp_path / "again" / name).read_bytes() == (exported / name).read_bytes() for name in names)
    zipped = (exported / SOURCE / "features/batch-0.jsonl.gz").read_bytes()
    assert zipped[4:8] == b"\0\0\0\0"  # the time in the header of gzip


def test_without_examples_there_are_no_activations_and_that_is_said(made: Path, tmp_path: Path):
    for part in ("saes", "neurons"):
        shutil.copytree(made / part, tmp_path / "made" / part)
    lines: list[str] = []
    convert(str(tmp_path / "made"), tmp_path / "export", "neuronpedia", say=lines.append)
    assert not (tmp_path / "export" / SOURCE / "activations").exists()
    assert any(line.startswith("there are no activations: ") for line in lines)
    assert _rows(tmp_path / "export", "features")


def test_a_column_that_is_not_known_of_all_latents_is_absent(made: Path, tmp_path: Path, monkeypatch: Any):
    load = NeuronDatabase.load

    def without_rate(source: str) -> NeuronDatabase:
        database = load(source)
        database.quantiles["layers.0.mlp/3"]["firing_rate"] = None
        return database

    monkeypatch.setattr(neuronpedia.NeuronDatabase, "load", without_rate)
    neuronpedia.export(str(made), tmp_path)
    assert all("frac_nonzero" not in row and "maxActApprox" in row for row in _rows(tmp_path, "features"))
    assert all("frac_nonzero" in row for row in _rows(tmp_path, "features", "tiny/1-made-mlp"))


def test_an_explainer_that_nobody_knows_is_absent(made: Path, tmp_path: Path, monkeypatch: Any):
    load = NeuronDatabase.load

    def without_explainer(source: str) -> NeuronDatabase:
        database = load(source)
        for rows in database.explanations.values():
            for row in rows.values():
                row["explainer"] = None
        return database

    monkeypatch.setattr(neuronpedia.NeuronDatabase, "load", without_explainer)
    neuronpedia.export(str(made), tmp_path)
    assert all("explanationModelName" not in row for row in _rows(tmp_path, "explanations"))
    assert (tmp_path / "config/explanation_model_type.jsonl").read_text() == ""


def test_one_sae_can_be_chosen(made: Path, tmp_path: Path):
    convert(str(made), tmp_path / "export", "neuronpedia", "layers.1.mlp", say=lambda line: None)
    assert [path.name for path in (tmp_path / "export/tiny").iterdir()] == ["1-made-mlp"]
    with pytest.raises(InputError, match=r"has no selected SAE 'layers\.1\.mlp/relu-c0\.1-w16', and only these"):
        convert(str(made), tmp_path / "other", "neuronpedia", "layers.1.mlp/relu-c0.1-w16")


def test_what_is_no_release_of_ours_is_refused(made: Path, tmp_path: Path):
    convert(str(made), tmp_path / "saelens", "saelens", say=lambda line: None)
    with pytest.raises(InputError, match="is not a release of safesail, which Neuronpedia's files are made from"):
        convert(str(tmp_path / "saelens"), tmp_path / "export", "neuronpedia")
    assert not (tmp_path / "export").exists()
