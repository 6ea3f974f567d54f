"""Conversion of SAEs: what is written computes what the source computed, and the rest is refused with the reason."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_release import D_SAE, HOSTILE
from safetensors.torch import load_file

from safesail import Sae
from safesail.errors import InputError
from safesail.recipe import Architecture
from safesail.release import convert_saes
from safesail.release.convert import TARGETS, convert
from safesail.release.manifest import Manifest
from safesail.repository import Repository
from safesail.sae import model as sae_files
from safesail.sae.config import SaeConfig
from safesail.sae.formats.read import foreign


def made_sae(
    architecture: Architecture = "topk", hook_point: str = "layers.3", seed: int = 0, model_name: str = ""
) -> Sae:
    """A random SAE of 6 dimensions and 12 latents; a topk of 3, a jumprelu with thresholds from 0.1 to 1.1."""
    draw = torch.Generator().manual_seed(seed)
    k = 3 if architecture == "topk" else None
    config = SaeConfig(d_in=6, d_sae=12, hook_point=hook_point, architecture=architecture, k=k, model_name=model_name)
    W_enc, b_enc, W_dec, b_dec = (torch.randn(shape, generator=draw) for shape in ((6, 12), (12,), (12, 6), (6,)))
    threshold = torch.rand(12, generator=draw) + 0.1 if config.has_threshold else None
    return Sae(config, W_enc, b_enc, W_dec, b_dec, threshold)


def quiet(source: Path, target: Path, to: str, sae_id: str | None = None) -> list[str]:
    """Convert, and what it said."""
    lines: list[str] = []
    convert(str(source), target, to, sae_id, say=lines.append)
    return lines


def x() -> torch.Tensor:
    return torch.randn(50, 6, generator=torch.Generator().manual_seed(7)) * 3


# --- out of a release ---------------------------------------------------------------------------------------------


def test_a_release_in_saelens_files_computes_the_same_bits(made: Path, tmp_path: Path):
    found = convert(str(made), tmp_path / "out", "saelens", say=lambda line: None)
    names = [f"layers.{n}.mlp/{variant}" for n in (0, 1) for variant in ("relu-c0.1-w16", "topk-k4-w16")]
    assert [each.sae_id for each in found] == names
    assert all(each.exact and each.max_latent_error == 0 and each.format == "safesail" for each in found)
    for name in names:
        for file in ("sae_weights.safetensors", "sparsity.safetensors"):
            ours, theirs = load_file(made / "saes" / name / file), load_file(tmp_path / "out" / name / file)
            assert all(torch.equal(ours[key], theirs[key]) for key in (*ours, *theirs))


def test_sparsify_gets_the_selected_sae_of_every_hook_point_in_its_own_layout(made: Path, tmp_path: Path):
    quiet(made, tmp_path / "out", "sparsify")
    tensors = load_file(tmp_path / "out/layers.1.mlp/sae.safetensors")
    sae = Sae.from_pretrained(made / "saes", "layers.1.mlp")
    assert torch.equal(tensors["encoder.weight"], sae.W_enc.T)  # (d_sae, d_in), as its linear layer has it
    assert torch.equal(tensors["W_dec"], sae.W_dec)
    config = json.loads((tmp_path / "out/layers.1.mlp/cfg.json").read_text())
    assert (config["d_in"], config["num_latents"], config["k"], config["activation"]) == (6, D_SAE, 4, "topk")
    run = json.loads((tmp_path / "out/config.json").read_text())
    assert run["hookpoints"] == ["layers.0.mlp", "layers.1.mlp"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        *("README.md", "certificates.json", "config.json", "layers.0.mlp", "layers.1.mlp")
    ]


def test_one_sae_is_chosen_by_its_id_or_its_hook_point(made: Path, tmp_path: Path):
    for number, sae_id in enumerate(("layers.1.mlp", "layers.1.mlp/topk-k4-w16")):
        lines = quiet(made, tmp_path / str(number), "saelens", sae_id)
        assert [line.split(":")[0] for line in lines] == ["layers.1.mlp/topk-k4-w16"]
    with pytest.raises(InputError, match=r"has no SAE 'layers\.7'; it has layers\.0\.mlp/relu"):
        quiet(made, tmp_path / "none", "saelens", "layers.7")


def test_what_has_no_counterpart_is_left_out_with_the_reason_and_only_nothing_at_all_fails(made: Path, tmp_path: Path):
    with pytest.raises(InputError, match="a relu SAE has no exact counterpart in sparsify"):
        quiet(made, tmp_path / "none", "sparsify", "layers.0.mlp/relu-c0.1-w16")
    assert list(tmp_path.iterdir()) == []
    saes = tmp_path / "saes"
    made_sae("topk", "layers.3").save(saes / "a")
    made_sae("jumprelu", "layers.4").save(saes / "b")
    lines = quiet(saes, tmp_path / "out", "sparsify")
    assert lines[0].startswith("b is left out: layers.4: a jumprelu SAE has no exact counterpart")
    assert lines[1].startswith("layers.3: SAELens a; errors: latents 0.0e+00")
    kept = json.loads((tmp_path / "out/certificates.json").read_text())
    assert [row["sae_id"] for row in kept["certificates"]] == ["a"]
    assert "a jumprelu SAE has no exact counterpart" in kept["refused"]["b"]
    assert "a jumprelu SAE has no exact counterpart" in (tmp_path / "out/README.md").read_text()


def test_a_release_is_not_converted_into_itself(made: Path, tmp_path: Path):
    with pytest.raises(InputError, match="is a release of safesail already; give --to saelens or sparsify"):
        quiet(made, tmp_path / "out", "safesail")


# --- into a release -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["saelens", "sparsify"])
def test_there_and_back_again_is_the_same_function(tmp_path: Path, to: str):
    sae = made_sae()
    sae.save(tmp_path / "saes/one")
    quiet(tmp_path / "saes", tmp_path / "there", to)
    quiet(tmp_path / "there", tmp_path / "back", "safesail")
    again = Sae.from_pretrained(tmp_path / "back", "layers.3")
    np.testing.assert_array_equal(again.encode(x()).numpy(), sae.encode(x()).numpy())
    np.testing.assert_array_equal(again(x()).numpy(), sae(x()).numpy())


def test_the_manifest_says_what_is_known_and_measures_nothing(tmp_path: Path):
    made_sae().save(tmp_path / "saes/one")
    quiet(tmp_path / "saes", tmp_path / "back-saes", "safesail")
    manifest = json.loads((tmp_path / "back-saes/config.json").read_text())
    assert manifest["selected"] == {"layers.3": "layers.3/topk-k3-w12"}
    assert manifest["saes"] == [{"id": "layers.3/topk-k3-w12", "selected": True}]
    assert manifest["converted"] == {"source": "saes", "format": "SAELens", "ids": {"layers.3/topk-k3-w12": "one"}}
    assert list(Sae.load_all(tmp_path / "back-saes")) == ["layers.3"]
    marked = Manifest.of(tmp_path / "back-saes")
    assert (marked.release, marked.part, marked.organization) == ("back", "saes", "")
    assert set(marked.files) == {
        *("README.md", "certificates.json", "config.json"),
        *("layers.3/topk-k3-w12/cfg.json", "layers.3/topk-k3-w12/sae_weights.safetensors"),
    }


def test_two_saes_with_one_name_are_both_kept_and_neither_is_selected(tmp_path: Path):
    first, second = made_sae(seed=1), made_sae(seed=2)
    first.save(tmp_path / "saes/width_12/l0_3")
    second.save(tmp_path / "saes/width_12/l0_4")
    quiet(tmp_path / "saes", tmp_path / "out", "safesail")
    names = [f"layers.3/topk-k3-w12-width_12-l0_{n}" for n in (3, 4)]
    for name, sae in zip(names, (first, second), strict=True):
        assert torch.equal(Sae.from_pretrained(tmp_path / "out", name).W_enc, sae.W_enc)
    assert json.loads((tmp_path / "out/config.json").read_text())["selected"] == {}
    lines = quiet(tmp_path / "saes", tmp_path / "sparsify", "sparsify")
    assert "sparsify has one SAE at a hook point, and layers.3 has one here already" in lines[0]


@pytest.mark.parametrize("hook_point", ["../../outside", "/outside", "..", "layers.3/../../../outside"])
def test_a_hook_point_that_leads_out_of_the_folder_leads_nowhere(tmp_path: Path, hook_point: str):
    made_sae().save(tmp_path / "saes/one")
    config = tmp_path / "saes/one/cfg.json"
    content = json.loads(config.read_text())
    content["metadata"]["hook_point"] = hook_point
    config.write_text(json.dumps(content))
    with pytest.raises(InputError, match="is not a module path"):
        quiet(tmp_path / "saes", tmp_path / "in/out", "safesail")
    assert {path.name for path in tmp_path.iterdir()} == {"saes", "in"}
    assert list((tmp_path / "in").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "slug"), [("../a b", "a-b"), (".hidden", "hidden"), ("layers.3", "layers.3"), ("a/b:c", "a-b-c")]
)
def test_a_name_becomes_one_part_of_a_path(name: str, slug: str):
    assert convert_saes._slug(name) == slug


# --- certificates -------------------------------------------------------------------------------------------------


def test_what_is_written_otherwise_than_it_was_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made_sae().save(tmp_path / "saes/one")
    read = sae_files.read

    def damaged(folder: Path) -> Sae:
        sae = read(folder)
        sae.b_enc[0] += 0.05
        return sae

    monkeypatch.setattr(convert_saes.sae_files, "read", damaged)
    with pytest.raises(
        InputError, match=r"no SAE of .* can be written as safesail. one: what was read differs from the"
    ):
        quiet(tmp_path / "saes", tmp_path / "out", "safesail")
    assert [path.name for path in tmp_path.iterdir()] == ["saes"]


def test_a_certificate_is_of_what_is_on_the_disk_and_stands_in_the_card(tmp_path: Path):
    made_sae().save(tmp_path / "saes/one")
    (tmp_path / "saes/README.md").write_text("---\nlicense: cc-by-4.0\n---\n# Theirs\n")
    (tmp_path / "saes/LICENSE").write_text("the text")
    certificates = convert(str(tmp_path / "saes"), tmp_path / "out", "safesail", say=lambda line: None)
    written = json.loads((tmp_path / "out/certificates.json").read_text())
    row = {"name": "layers.3/topk-k3-w12", **certificates[0]._asdict(), "exact": True, "notes": []}
    assert written["certificates"] == [row]
    assert (written["source"], written["target"], row["n_vectors"]) == ("saes", "safesail", 256)
    card = (tmp_path / "out/README.md").read_text()
    l0 = f"{certificates[0].l0:.1f}"
    cells = ["`layers.3/topk-k3-w12`", "one", "SAELens", "0.0e+00", "0.0e+00", "0", l0, l0, "yes"]
    assert f"| {' | '.join(cells)} |" in card
    assert "Licence: cc-by-4.0." in card
    assert "license: cc-by-4.0" in card
    assert (tmp_path / "out/LICENSE").read_text() == "the text"
    assert str(tmp_path) not in card + json.dumps(written)


def test_what_is_converted_is_no_fine_tune_of_its_base_model(tmp_path: Path):
    made_sae(model_name="org/base").save(tmp_path / "saes/one")
    quiet(tmp_path / "saes", tmp_path / "out", "safesail")
    front = (tmp_path / "out/README.md").read_text().split("---")[1]
    assert "base_model:\n- org/base\n" in front
    assert "base_model_relation: adapter\n" in front


def test_a_licence_that_is_not_declared_is_not_made_up(tmp_path: Path):
    made_sae(model_name=HOSTILE).save(tmp_path / "saes/one")
    quiet(tmp_path / "saes", tmp_path / "out", "safesail")
    card = (tmp_path / "out/README.md").read_text()
    front, _, body = card.removeprefix("---\n").partition("\n---\n")
    assert "license" not in front
    assert "base_model" not in front
    assert "Licence: not stated by the source." in body
    assert "<script>" not in body
    assert not (tmp_path / "out/LICENSE").exists()


# --- the target ---------------------------------------------------------------------------------------------------


def test_a_target_that_holds_something_is_left_alone(tmp_path: Path):
    made_sae().save(tmp_path / "saes/one")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("out", "file"):
        with pytest.raises(InputError, match=rf"{name} is there and not an empty folder"):
            quiet(tmp_path / "saes", tmp_path / name, "safesail")
    assert (tmp_path / "out/mine").read_text() == (tmp_path / "file").read_text() == "mine"


def test_an_empty_target_is_taken_and_what_a_killed_attempt_left_is_not(tmp_path: Path):
    made_sae().save(tmp_path / "saes/one")
    (tmp_path / "new/out").mkdir(parents=True)
    (tmp_path / "new/.out.partial").mkdir()
    (tmp_path / "new/.out.partial/left").write_text("left")
    quiet(tmp_path / "saes", tmp_path / "new/out", "safesail")
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["out"]
    assert not (tmp_path / "new/out/left").exists()


def test_an_interruption_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made_sae().save(tmp_path / "saes/one")

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(convert_saes, "render", interrupted)
    with pytest.raises(KeyboardInterrupt):
        quiet(tmp_path / "saes", tmp_path / "out", "safesail")
    assert [path.name for path in tmp_path.iterdir()] == ["saes"]


def test_a_format_that_cannot_be_written_is_named_with_those_that_can(tmp_path: Path):
    with pytest.raises(InputError, match=f"'gguf' is not a format that can be written; give --to {', '.join(TARGETS)}"):
        quiet(tmp_path, tmp_path / "out", "gguf")


def test_a_source_without_any_sae_is_named(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match=r"empty holds neither"):
        quiet(tmp_path / "empty", tmp_path / "out", "safesail")
    assert [path.name for path in tmp_path.iterdir()] == ["empty"]


def test_what_was_written_is_read_by_the_readers_of_its_format(made: Path, tmp_path: Path):
    quiet(made, tmp_path / "out", "sparsify")
    theirs = foreign(Repository(str(tmp_path / "out")), "layers.1.mlp")
    sae = Sae.from_pretrained(made / "saes", "layers.1.mlp")
    np.testing.assert_allclose(theirs.encode(x()).numpy(), sae.encode(x()).numpy(), atol=1e-5)
