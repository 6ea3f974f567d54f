"""SAEs on disk: what is written, how it is found again, and what is said of a file that is damaged."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from safesail import Sae, SaeConfig
from safesail.errors import InputError
from safesail.recipe import Architecture, TokenPolicy
from safesail.sae.model import read

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


ARCHITECTURES: tuple[Architecture, ...] = get_args(Architecture)
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


def sae_of(architecture: Architecture, d_in: int = 4, d_sae: int = 16) -> Sae:
    """A random SAE with the settings that its architecture has; thresholds from 0.2 to 2."""
    penalised = architecture in ("relu", "jumprelu")
    level: dict[str, Any] = {"coefficient": 0.002} if penalised else {"k": 3}
    config = SaeConfig(d_in=d_in, d_sae=d_sae, hook_point=MLP, architecture=architecture, **level)
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (d_in, d_sae), "b_enc": (d_sae,), "W_dec": (d_sae, d_in), "b_dec": (d_in,)}
    weights = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    threshold = {"threshold": torch.linspace(0.2, 2, d_sae)} if config.has_threshold else {}
    return Sae(config, **weights, **threshold)


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


def test_the_latents_of_every_architecture_by_hand():
    """W_enc is the identity, so that the pre-activations are x − b_dec + b_enc = x + 1."""
    expected = {
        "relu": [[3, 1.5, 0.25, 0], [0, 0, 0, 0.5]],
        "topk": [[3, 1.5, 0, 0], [0, 0, 0, 0.5]],
        "jumprelu": [[3, 0, 0.25, 0], [0, 0, 0, 0.5]],
        "batchtopk": [[3, 0, 0.25, 0], [0, 0, 0, 0.5]],
        "matryoshka": [[3, 0, 0.25, 0], [0, 0, 0, 0.5]],
    }
    x = torch.tensor([[2.0, 0.5, -0.75, -3.0], [-2.0, -1.0, -4.0, -0.5]])
    for architecture in ARCHITECTURES:
        config = SaeConfig(d_in=4, d_sae=4, hook_point=MLP, architecture=architecture, k=2)
        threshold = torch.tensor([2.0, 1.5, 0.0, -5.0]) if config.has_threshold else None  # 1.5 is not above 1.5
        sae = Sae(config, torch.eye(4), torch.full((4,), 2.0), 2 * torch.eye(4), torch.ones(4), threshold)
        assert sae.encode(x).tolist() == expected[architecture], architecture
        assert sae(x).tolist() == [[2 * z + 1 for z in row] for row in expected[architecture]]


# --- writing ------------------------------------------------------------------------------------------------------


def test_cfg_json_has_the_keys_of_saelens():
    policy = TokenPolicy(exclude_special=False, sink_norm_multiple=7.0)
    config = random_sae(model_name="org/model", token_policy=policy, median_norm=2.5).config
    content = json.loads(json.dumps(config.to_json()))
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
    assert metadata["token_policy"] == {"exclude_special": False, "sink_norm_multiple": 7.0, "roles": []}
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
    policy = TokenPolicy(exclude_special=False, sink_norm_multiple=None, roles=("user", "assistant"))
    sae = random_sae(model_name="org/model", token_policy=policy, median_norm=2.5)
    sae.save(tmp_path)
    data = json.loads((tmp_path / "cfg.json").read_text())
    assert SaeConfig.from_json(data, "cfg.json") == sae.config


@every_architecture
def test_every_architecture_comes_back_from_its_folder(architecture: Architecture, tmp_path: Path):
    sae = sae_of(architecture)
    sae.save(tmp_path)
    names = {"W_enc", "b_enc", "W_dec", "b_dec"} | ({"threshold"} if sae.threshold is not None else set())
    assert set(load_file(tmp_path / "sae_weights.safetensors")) == names
    assert same(read(tmp_path), sae)
    x = torch.randn(30, 4, generator=torch.Generator().manual_seed(3))
    assert torch.equal(read(tmp_path).encode(x), sae.encode(x))


def test_cfg_json_says_what_saelens_should_read_an_architecture_as():
    contents = {architecture: sae_of(architecture).config.to_json() for architecture in ARCHITECTURES}
    assert {name: content["architecture"] for name, content in contents.items()} == {
        "relu": "standard",
        "topk": "topk",
        "batchtopk": "jumprelu",
        "jumprelu": "jumprelu",
        "matryoshka": "jumprelu",
    }
    assert [name for name, content in contents.items() if "k" in content] == ["topk"]
    assert {name: content["metadata"]["architecture"] for name, content in contents.items()} == {
        name: name for name in ARCHITECTURES
    }
    assert [content["metadata"]["k"] for content in contents.values()] == [None, 3, 3, None, 3]
    assert [content["metadata"]["coefficient"] for content in contents.values()] == [0.002, None, None, 0.002, None]


@every_architecture
def test_saelens_reads_every_architecture(architecture: Architecture, tmp_path: Path):
    sae_lens = pytest.importorskip("sae_lens")
    sae = sae_of(architecture, d_in=64, d_sae=512)
    sae.save(tmp_path)
    theirs = sae_lens.SAE.load_from_disk(tmp_path)
    assert theirs.cfg.metadata.hook_point == MLP
    x = torch.randn(200, 64, generator=torch.Generator().manual_seed(3))
    latents = sae.encode(x)
    assert (latents > 0).sum(1).float().mean() > 2
    torch.testing.assert_close(theirs.encode(x), latents, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(theirs(x), sae(x), rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize(
    ("saelens", "ours"), [("standard", "relu"), ("jumprelu", "jumprelu"), ("topk", "topk"), ("gated", None)]
)
def test_a_config_of_saelens_alone_is_read(saelens: str, ours: Architecture | None):
    data = {"architecture": saelens, "d_in": 4, "d_sae": 16, "k": 3, "metadata": {"hf_hook_name": f"model.{MLP}"}}
    if ours is None:
        with pytest.raises(
            InputError, match=r"x/cfg\.json: architecture 'gated' is unknown; known: standard, topk, jumpr"
        ):
            SaeConfig.from_json(data, "x/cfg.json")
    else:
        config = SaeConfig.from_json(data, "x/cfg.json")
        assert (config.architecture, config.hook_point, config.k) == (ours, MLP, 3 if ours == "topk" else None)


@pytest.mark.parametrize("metadata", ["topk", "relu", "something else", None])
def test_what_saelens_calls_an_sae_decides_how_it_computes(metadata: str | None):
    data = {"architecture": "jumprelu", "d_in": 4, "d_sae": 16, "metadata": {"architecture": metadata, "k": 3}}
    assert SaeConfig.from_json(data, "cfg.json").architecture == "jumprelu"
    data["metadata"] = {"architecture": "matryoshka", "k": 3}
    assert SaeConfig.from_json(data, "cfg.json").architecture == "matryoshka"


def test_no_conversion_of_a_module_rounds_its_threshold():
    sae = sae_of("jumprelu")
    assert sae.threshold is not None
    exact = (1 + torch.arange(16) * 0.001).clone()
    sae.threshold.data = exact.clone()
    for converted in (sae.to(torch.bfloat16), sae.half(), sae.float().to(dtype=torch.float16), sae.double()):
        assert converted is sae
        assert sae.threshold.dtype == torch.float32
        assert torch.equal(sae.threshold, exact)
    assert sae.W_enc.dtype == torch.float64
    assert isinstance(sae.threshold, torch.nn.Parameter)
    assert sae.to(torch.bfloat16).W_enc.dtype == torch.bfloat16
    assert sae.to("meta").threshold.device.type == "meta"  # type: ignore


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_threshold_is_never_rounded(dtype: torch.dtype, tmp_path: Path):
    """In bfloat16, 1.001 would become 1 and switch on what lies between."""
    sae = sae_of("jumprelu")
    with torch.no_grad():
        assert sae.threshold is not None
        sae.threshold.copy_(1 + torch.arange(16) * 0.001)
    sae.save(tmp_path / sae.config.sae_id)
    manifest = {"selected": {MLP: sae.config.sae_id}, "saes": [{"id": sae.config.sae_id}]}
    (tmp_path / "config.json").write_text(json.dumps(manifest))
    loaded = Sae.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.W_enc.dtype == loaded.b_enc.dtype == loaded.W_dec.dtype == loaded.b_dec.dtype == dtype
    assert loaded.threshold is not None
    assert loaded.threshold.dtype == torch.float32
    assert torch.equal(loaded.threshold, sae.threshold)
    assert loaded(torch.randn(3, 4)).dtype == dtype


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


@pytest.mark.parametrize(
    ("architecture", "level", "variant"),
    [
        ("batchtopk", {"k": 64}, "batchtopk-k64-w4608"),
        ("matryoshka", {"k": 8}, "matryoshka-k8-w4608"),
        ("relu", {"coefficient": 0.1}, "relu-c0.1-w4608"),
        ("jumprelu", {"coefficient": 0.002}, "jumprelu-c0.002-w4608"),
        ("jumprelu", {"coefficient": 3e-6}, "jumprelu-c3e-06-w4608"),
        ("jumprelu", {}, "jumprelu-w4608"),
    ],
)
def test_the_variant_of_every_architecture(architecture: Architecture, level: dict[str, Any], variant: str):
    config = SaeConfig(d_in=4, d_sae=4608, hook_point=MLP, architecture=architecture, **level)
    assert config.variant == variant


def test_a_topk_config_needs_k():
    with pytest.raises(ValueError, match="a topk SAE needs k"):
        SaeConfig(d_in=4, d_sae=16, hook_point=MLP)


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
        (weights_changed(lambda t: t["b_dec"].__setitem__(1, math.inf)), "b_dec holds values that are not finite"),
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


def test_a_jumprelu_without_a_threshold_is_refused(tmp_path: Path):
    sae_of("jumprelu").save(tmp_path)
    weights_changed(lambda t: t.pop("threshold"))(tmp_path)
    with pytest.raises(InputError, match=r"sae_weights\.safetensors has no tensor threshold; it holds W_dec, W_enc"):
        read(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_sae": 15}, r"W_enc is \(4, 16\), but its cfg\.json says \(4, 15\)"),
        ({"d_in": 5}, r"W_enc is \(4, 16\), but its cfg\.json says \(5, 16\)"),
        ({"k": 17}, "k = 17 exceeds d_sae = 16"),
        ({"k": 0}, "greater than or equal to 1"),
        ({"k": "many"}, "valid integer"),
        ({"architecture": "gated"}, "architecture 'gated' is unknown; known: standard, topk, jumprelu"),
        ({"d_in": None}, "lacks the key 'd_in'"),
        ({"k": None}, "lacks the key 'k'"),
        ({"normalize_activations": "covariance_whitening"}, "'none', 'layer_norm' or 'constant_norm_rescale'"),
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
        {"selected": {MLP: SELECTED}},
        {"saes": [], "selected": None},
        {"saes": [], "selected": [SELECTED]},
        {"saes": None, "selected": {}},
        {"saes": ["layers.9.mlp"], "selected": {}},
        {"safesail_version": "0.1"},
    ],
)
def test_a_damaged_manifest_is_refused_with_the_file_named(release: Path, manifest: Any):
    (release / "config.json").write_text(json.dumps(manifest))
    for read_it in (lambda: Sae.from_pretrained(release, "layers.8.mlp"), lambda: Sae.load_all(release)):
        with pytest.raises(InputError, match=r"config\.json is not the manifest of a safesail release"):
            read_it()


def test_a_manifest_that_is_not_json_is_refused(release: Path):
    (release / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json is not valid JSON"):
        Sae.from_pretrained(release, MLP)


def test_a_release_of_a_newer_schema_asks_for_a_newer_safesail(release: Path):
    rewritten(release / "config.json", schema=2)
    with pytest.raises(InputError, match=r"config\.json has schema 2, .* reads schema 1; install a newer safesail"):
        Sae.from_pretrained(release, MLP)


def test_a_release_that_a_newer_safesail_lays_out_otherwise_asks_for_it(release: Path):
    (release / "config.json").unlink()
    (release / "safesail.json").write_text(json.dumps({"schema": 2}))
    with pytest.raises(InputError, match=r"safesail\.json has schema 2, .* install a newer safesail"):
        Sae.from_pretrained(release, MLP)


def test_another_part_of_a_release_points_to_its_saes(tmp_path: Path):
    (tmp_path / "safesail.json").write_text(json.dumps({"schema": 1}))
    with pytest.raises(InputError, match="is a part of a release that has no SAEs; give its saes folder"):
        Sae.from_pretrained(tmp_path, MLP)


@pytest.mark.parametrize("manifest", [{"model_type": "llama"}, [], "text", None])
def test_without_a_manifest_of_ours_the_folders_are_read_as_saelens_reads_them(release: Path, manifest: Any):
    (release / "config.json").write_text(json.dumps(manifest))
    assert same(Sae.from_pretrained(release, SELECTED), SAES[0])
    assert same(Sae.from_pretrained(release, RESIDUAL), SAES[2])
    with pytest.raises(InputError, match=rf"has several SAEs at {MLP}: {OTHER}, {SELECTED}; give one of these ids"):
        Sae.from_pretrained(release, MLP)
    with pytest.raises(InputError, match=rf"has several SAEs at {MLP}: {OTHER}, {SELECTED}; load one by its id"):
        Sae.load_all(release)
    with pytest.raises(InputError, match=rf"has no SAE 'layers.8'; it has {OTHER}, {SELECTED}, {RESIDUAL}/topk-k3"):
        Sae.from_pretrained(release, "layers.8")


def test_the_folder_of_one_sae_is_read_by_itself(release: Path):
    assert same(Sae.from_pretrained(release / OTHER), SAES[1])
    assert list(Sae.load_all(release / OTHER)) == [MLP]


def test_a_folder_without_saes_names_the_formats_that_are_read(tmp_path: Path):
    with pytest.raises(InputError, match=r"neither a release of safesail nor an SAE in a known format \(SAELens,"):
        Sae.from_pretrained(tmp_path, MLP)


def test_a_manifest_cannot_lead_out_of_its_folder(release: Path):
    SAES[0].save(release.parent / "outside")
    rewritten(release / "config.json", selected={MLP: "../outside"})
    with pytest.raises(InputError, match="not a relative path inside a repository"):
        Sae.from_pretrained(release, MLP)


def test_a_config_that_k_does_not_fit_cannot_be_made():
    with pytest.raises(ValueError, match="k = 17 exceeds d_sae = 16"):
        SaeConfig(d_in=4, d_sae=16, k=17, hook_point=MLP)
