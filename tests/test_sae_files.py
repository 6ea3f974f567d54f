"""SAEs on disk: what is written, how it is found again, and what is said of a file that is damaged."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from safesail import Sae, SaeConfig
from safesail.errors import InputError
from safesail.recipe import TokenPolicy

MLP, RESIDUAL = "layers.9.mlp", "layers.9"
SELECTED, OTHER = "layers.9.mlp/topk-k3-w16", "layers.9.mlp/topk-k2-w16"


def random_sae(hook_point: str = MLP, k: int = 3, seed: int = 0, **config: Any) -> Sae:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (4, 16), "b_enc": (16,), "W_dec": (16, 4), "b_dec": (4,)}
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return Sae(SaeConfig(d_in=4, d_sae=16, k=k, hook_point=hook_point, **config), **weights)


SAES = [random_sae(), random_sae(k=2, seed=1), random_sae(RESIDUAL, seed=2)]


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A `saes` folder: two variants at an MLP output, of which one is selected, and one at the residual stream."""
    for sae in SAES:
        sae.save(tmp_path / sae.config.sae_id)
    manifest = {
        "schema": 1,
        "selected": {MLP: SELECTED, RESIDUAL: "layers.9/topk-k3-w16"},
        "saes": [{"id": sae.config.sae_id} for sae in SAES],
    }
    (tmp_path / "config.json").write_text(json.dumps(manifest))
    return tmp_path


def same(a: Sae, b: Sae) -> bool:
    named = dict(b.named_parameters())
    return a.config == b.config and all(torch.equal(value, named[name]) for name, value in a.named_parameters())


# --- finding ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sae_id", "expected"),
    [(MLP, 0), (SELECTED, 0), (OTHER, 1), (RESIDUAL, 2), ("layers.9/topk-k3-w16", 2)],
)
def test_an_sae_is_found_by_hook_point_or_full_id(release: Path, sae_id: str, expected: int):
    assert same(Sae.from_pretrained(release, sae_id), SAES[expected])


def test_a_path_may_be_text_or_path(release: Path):
    assert same(Sae.from_pretrained(str(release), MLP), Sae.from_pretrained(release, MLP))


@pytest.mark.parametrize("sae_id", ["layers.8.mlp", "layers.9.mlp/topk-k64-w16", "", None, "../layers.9.mlp"])
def test_an_unknown_id_lists_what_exists(release: Path, sae_id: str | None):
    with pytest.raises(InputError) as caught:
        Sae.from_pretrained(release, sae_id)
    assert repr(sae_id) in str(caught.value)
    assert f"Hook points: {MLP}, {RESIDUAL}." in str(caught.value)
    assert all(sae.config.sae_id in str(caught.value) for sae in SAES)


def test_the_only_hook_point_needs_no_id(release: Path):
    manifest = json.loads((release / "config.json").read_text())
    manifest["selected"] = {MLP: OTHER}
    (release / "config.json").write_text(json.dumps(manifest))
    assert same(Sae.from_pretrained(release), SAES[1])


def test_load_all_gives_the_selected_one_of_every_hook_point(release: Path):
    saes = Sae.load_all(release)
    assert list(saes) == [MLP, RESIDUAL]
    assert same(saes[MLP], SAES[0])
    assert same(saes[RESIDUAL], SAES[2])


def test_the_dtype_asked_for_is_the_dtype_given(release: Path):
    assert {value.dtype for value in Sae.from_pretrained(release, MLP, dtype=torch.float64).parameters()} == {
        torch.double
    }
    assert Sae.load_all(release, dtype=torch.float16)[MLP].W_enc.dtype == torch.float16


def test_a_loaded_sae_asks_for_no_gradient(release: Path):
    assert not any(value.requires_grad for value in Sae.from_pretrained(release, MLP).parameters())


def test_a_folder_that_does_not_exist_is_named():
    with pytest.raises(InputError, match="neither an existing folder nor a Hub id"):
        Sae.from_pretrained("/no/such/folder", MLP)


# --- arithmetic ---------------------------------------------------------------------------------------------------


def by_hand(sae: Sae, x: Tensor) -> tuple[Tensor, Tensor]:
    """Latents and reconstruction of one token, latent by latent."""
    a = [float((x - sae.b_dec) @ sae.W_enc[:, j] + sae.b_enc[j]) for j in range(16)]
    largest = sorted(range(16), key=lambda j: -a[j])[: sae.config.k]
    z = torch.tensor([max(a[j], 0.0) if j in largest else 0.0 for j in range(16)])
    return z, sum((z[j] * sae.W_dec[j] for j in range(16)), sae.b_dec)


@pytest.mark.parametrize("leading", [(), (1,), (5,), (2, 3), (2, 1, 3, 2), (0,), (2, 0)])
def test_any_leading_dimensions_are_kept(leading: tuple[int, ...]):
    sae = random_sae()
    x = torch.randn(*leading, 4, generator=torch.Generator().manual_seed(3))
    latents, x_hat = sae.encode(x), sae(x)
    assert latents.shape == (*leading, 16)
    assert sae.decode(latents).shape == x_hat.shape == (*leading, 4)
    for token, z, reconstruction in zip(x.reshape(-1, 4), latents.reshape(-1, 16), x_hat.reshape(-1, 4), strict=True):
        expected, expected_x_hat = by_hand(sae, token)
        torch.testing.assert_close(z, expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(reconstruction, expected_x_hat, rtol=0, atol=1e-5)
    torch.testing.assert_close(sae.decode(latents), x_hat, rtol=0, atol=1e-5)


def test_a_token_with_fewer_positive_pre_activations_than_k_has_fewer_latents():
    sae = random_sae()
    with torch.no_grad():
        sae.b_enc.fill_(-1e3)
        sae.b_enc[7] = 1e3
    latents = sae.encode(torch.zeros(4))
    assert latents.nonzero().flatten().tolist() == [7]


def test_half_precision_activations_are_encoded_in_the_precision_of_the_weights():
    sae, x = random_sae(), torch.randn(3, 4).half()
    assert torch.equal(sae.encode(x), sae.encode(x.float()))


# --- writing ------------------------------------------------------------------------------------------------------


def test_cfg_json_has_the_keys_of_saelens():
    policy = TokenPolicy(exclude_special=False, sink_norm_multiple=7.0)
    content = random_sae(model_name="org/model", token_policy=policy, median_norm=2.5).config.to_json()
    metadata = content.pop("metadata")
    assert content == {
        "architecture": "topk",
        "d_in": 4,
        "d_sae": 16,
        "k": 3,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "rescale_acts_by_decoder_norm": False,
    }
    assert metadata["model_name"] == "org/model"
    assert metadata["hook_point"] == MLP
    assert metadata["token_policy"] == {"exclude_special": False, "sink_norm_multiple": 7.0}
    assert metadata["median_norm"] == 2.5
    assert metadata["prepend_bos"] is False
    assert metadata["sae_lens_version"].startswith("6.")  # else SAELens reads the pre-6.0 format and drops the rest


@pytest.mark.parametrize(
    ("hook_point", "name"),
    [
        ("layers.9.mlp", "blocks.9.hook_mlp_out"),
        ("layers.9", "blocks.9.hook_resid_post"),
        ("layers.17.self_attn", "blocks.17.hook_attn_out"),
        ("embed_tokens", "embed_tokens"),
    ],
)
def test_cfg_json_names_the_hook_in_transformer_lens_words(hook_point: str, name: str):
    assert random_sae(hook_point).config.to_json()["metadata"]["hook_name"] == name


def test_everything_in_the_config_comes_back(tmp_path: Path):
    policy = TokenPolicy(exclude_special=False, sink_norm_multiple=None)
    sae = random_sae(model_name="org/model", token_policy=policy, median_norm=2.5)
    sae.save(tmp_path)
    data = json.loads((tmp_path / "cfg.json").read_text())
    assert SaeConfig.from_json(data, "cfg.json") == sae.config


def test_saving_twice_gives_the_same_bytes(tmp_path: Path):
    SAES[0].save(tmp_path / "a", torch.tensor([0.5] * 16))
    SAES[0].save(tmp_path / "b", torch.tensor([0.5] * 16))
    names = {"cfg.json", "sae_weights.safetensors", "sparsity.safetensors"}
    assert {path.name for path in (tmp_path / "a").iterdir()} == names
    assert all((tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes() for name in names)


def test_sparsity_is_the_log10_firing_rate(tmp_path: Path):
    SAES[0].save(tmp_path, torch.tensor([0.01, 1.0, 0.0] + [0.001] * 13))
    sparsity = load_file(tmp_path / "sparsity.safetensors")["sparsity"]
    assert sparsity.tolist() == pytest.approx([-2, 0, -10] + [-3] * 13, abs=1e-4)


@pytest.mark.parametrize(
    ("d_sae", "variant"),
    [(4608, "topk-k32-w4608"), (16384, "topk-k32-w16k"), (20480, "topk-k32-w20k"), (20000, "topk-k32-w20000")],
)
def test_the_variant_names_architecture_sparsity_and_width(d_sae: int, variant: str):
    config = SaeConfig(d_in=4, d_sae=d_sae, k=32, hook_point=MLP)
    assert (config.variant, config.sae_id) == (variant, f"{MLP}/{variant}")


# --- damage -------------------------------------------------------------------------------------------------------


def rewritten(path: Path, **changes: Any) -> None:
    data = json.loads(path.read_text())
    for key, value in changes.items():
        data.pop(key, None) if value is None else data.update({key: value})
    path.write_text(json.dumps(data))


def weights_changed(change: Callable[[dict[str, Tensor]], Any]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "sae_weights.safetensors")
        change(tensors)
        save_file(tensors, folder / "sae_weights.safetensors")

    return damage


def truncated(folder: Path) -> None:
    path = folder / "sae_weights.safetensors"
    path.write_bytes(path.read_bytes()[:-20])


def emptied(folder: Path) -> None:
    (folder / "sae_weights.safetensors").write_bytes(b"")


def removed(folder: Path) -> None:
    (folder / "sae_weights.safetensors").unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (weights_changed(lambda t: t.pop("b_dec")), "no tensor b_dec; it holds W_dec, W_enc, b_enc"),
        (weights_changed(lambda t: t.clear()), "no tensor W_enc; it holds none of ours"),
        (weights_changed(lambda t: t.update(W_dec=torch.ones(16, 5))), r"W_dec is \(16, 5\), but .* \(16, 4\)"),
        (weights_changed(lambda t: t.update(W_enc=torch.ones(16, 4))), r"W_enc is \(16, 4\), but .* \(4, 16\)"),
        (weights_changed(lambda t: t["W_enc"].__setitem__((0, 0), math.nan)), "W_enc holds values that are not finite"),
        (weights_changed(lambda t: t["b_enc"].__setitem__(3, -math.inf)), "b_enc holds values that are not finite"),
        (truncated, "not a readable safetensors file"),
        (emptied, "not a readable safetensors file"),
        (removed, r"no file .*sae_weights\.safetensors"),
    ],
)
def test_damaged_weights_are_refused_with_the_file_named(release: Path, damage: Callable[[Path], None], message: str):
    damage(release / SELECTED)
    with pytest.raises(InputError, match=message) as caught:
        Sae.from_pretrained(release, MLP)
    assert "sae_weights.safetensors" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_sae": 15}, r"W_enc is \(4, 16\), but its cfg\.json says \(4, 15\)"),
        ({"d_in": 5}, r"W_enc is \(4, 16\), but its cfg\.json says \(5, 16\)"),
        ({"k": 17}, "k = 17 exceeds d_sae = 16"),
        ({"k": 0}, "greater than or equal to 1"),
        ({"k": "many"}, "valid integer"),
        ({"architecture": "gated"}, "architecture 'gated' is unknown; known: topk"),
        ({"d_in": None}, "lacks the key 'd_in'"),
        ({"k": None}, "lacks the key 'k'"),
        ({"normalize_activations": "layer_norm"}, "'normalize_activations': 'layer_norm'"),
        ({"apply_b_dec_to_input": False}, "'apply_b_dec_to_input': False"),
        ({"rescale_acts_by_decoder_norm": True}, "'rescale_acts_by_decoder_norm': True"),
        ({"metadata": {"hook_point": MLP, "token_policy": {"exclude_spezial": True}}}, "Extra inputs"),
        ({"metadata": "layers.9"}, r"cfg\.json"),
    ],
)
def test_a_config_that_cannot_be_right_is_refused_with_the_file_named(release: Path, changes: dict, message: str):
    rewritten(release / SELECTED / "cfg.json", **changes)
    with pytest.raises(InputError, match=message) as caught:
        Sae.from_pretrained(release, MLP)
    assert "cfg.json" in str(caught.value)
    assert SELECTED in str(caught.value)


@pytest.mark.parametrize("text", ["{", "", "[]", "3", "\xff"])
def test_a_config_that_is_not_an_object_is_refused_with_the_file_named(release: Path, text: str):
    (release / SELECTED / "cfg.json").write_text(text, encoding="latin-1")
    with pytest.raises(InputError, match=r"cfg\.json"):
        Sae.from_pretrained(release, MLP)


@pytest.mark.parametrize(
    "manifest",
    [
        {"model_type": "llama"},
        {"selected": {MLP: SELECTED}},
        {"saes": [], "selected": None},
        {"saes": [], "selected": [SELECTED]},
        {"saes": None, "selected": {}},
        {"saes": ["layers.9.mlp"], "selected": {}},
        [],
        "text",
        None,
    ],
)
def test_a_manifest_that_is_not_one_is_refused_with_the_file_named(release: Path, manifest: Any):
    (release / "config.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"config\.json is not the manifest of a safesail release"):
        Sae.from_pretrained(release, "layers.8.mlp")


@pytest.mark.parametrize("manifest", [{"model_type": "llama"}, {"saes": [], "selected": [SELECTED]}, [], None])
def test_load_all_refuses_a_manifest_that_is_not_one(release: Path, manifest: Any):
    (release / "config.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"config\.json is not the manifest of a safesail release"):
        Sae.load_all(release)


def test_a_folder_without_a_manifest_says_what_it_holds(release: Path):
    (release / "config.json").unlink()
    with pytest.raises(InputError, match=r"has no file config\.json; it holds layers\.9, layers\.9\.mlp"):
        Sae.from_pretrained(release, MLP)


def test_a_manifest_cannot_lead_out_of_its_folder(release: Path):
    SAES[0].save(release.parent / "outside")
    rewritten(release / "config.json", selected={MLP: "../outside"})
    with pytest.raises(InputError, match="not a relative path inside a repository"):
        Sae.from_pretrained(release, MLP)


def test_a_config_that_k_does_not_fit_cannot_be_made():
    with pytest.raises(ValueError, match="k = 17 exceeds d_sae = 16"):
        SaeConfig(d_in=4, d_sae=16, k=17, hook_point=MLP)
