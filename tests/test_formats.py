"""SAEs of SAELens, sparsify and dictionary_learning read as ours, and what is said of files that are not what they say.

All hand-made SAEs have the same numbers: x = (3, 0), b_dec = (1, -1), W_enc = diag(1, 2), W_dec = diag(1, 4), so that
(x - b_dec) W_enc = (2, 2) and x W_enc = (3, 0).
"""

import json
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hub_double import HubDouble
from safetensors.torch import load_file, save_file
from torch import Tensor

from safesail import Sae
from safesail.errors import InputError
from safesail.hook_names import from_transformer_lens, in_id, transformer_lens_name
from safesail.repository import Repository
from safesail.sae.config import SaeConfig
from safesail.sae.formats import archive
from safesail.sae.formats.foreign import certificate
from safesail.sae.formats.read import foreign, foreign_ids
from safesail.sae.formats.sparsify import write_sparsify

X = torch.tensor([[3.0, 0.0]])
W_ENC, W_DEC = torch.diag(torch.tensor([1.0, 2.0])), torch.diag(torch.tensor([1.0, 4.0]))
B_ENC, B_DEC = torch.tensor([0.5, -1.0]), torch.tensor([1.0, -1.0])
GATE = {
    "b_gate": torch.tensor([-3.0, 0.0]),
    "r_mag": torch.tensor([0.0, math.log(2)]),
    "b_mag": torch.tensor([1.0, -1]),
}
THRESHOLD = torch.tensor([2.6, 0.5])
CLASSES = [
    "AutoEncoder",
    "AutoEncoderNew",
    "GatedAutoEncoder",
    "JumpReluAutoEncoder",
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
]


def write(folder: Path, name: str, content: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(content))


def saelens(folder: Path, tensors: dict[str, Tensor] | None = None, metadata: Any = None, **cfg: Any) -> Path:
    """A folder of SAELens, version 6."""
    tensors = {"W_enc": W_ENC, "W_dec": W_DEC, "b_enc": B_ENC, "b_dec": B_DEC} | (tensors or {})
    if cfg.get("architecture") == "gated":
        del tensors["b_enc"]
    metadata = {"sae_lens_version": "6.5.0", "hook_name": "blocks.9.hook_mlp_out"} | (metadata or {})
    d_in, d_sae = tensors["W_enc"].shape
    write(folder, "cfg.json", {"architecture": "standard", "d_in": d_in, "d_sae": d_sae, "metadata": metadata} | cfg)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "sae_weights.safetensors")
    return folder


def sparsify(folder: Path, hook_point: str = "layers.9.mlp", dtype: torch.dtype = torch.float32, **cfg: Any) -> Path:
    """A folder of sparsify."""
    write(folder / hook_point, "cfg.json", {"activation": "topk", "d_in": 2, "k": 1, "num_latents": 2} | cfg)
    tensors = {"encoder.weight": W_ENC.T, "encoder.bias": B_ENC, "W_dec": W_DEC, "b_dec": B_DEC}
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
    save_file(tensors, folder / hook_point / "sae.safetensors")
    return folder


def state_of(dict_class: str) -> dict[str, Tensor]:
    """The state dict of a class of dictionary_learning, with the numbers of the first lines above."""
    linear = {"encoder.weight": W_ENC.T, "encoder.bias": B_ENC, "decoder.weight": W_DEC.T}
    plain = {"W_enc": W_ENC, "b_enc": B_ENC, "W_dec": W_DEC, "b_dec": B_DEC}
    scalar = {"k": torch.tensor(1), "threshold": torch.tensor(1.5)}
    return {
        "AutoEncoder": {**linear, "bias": B_DEC},
        "AutoEncoderNew": {**linear, "decoder.bias": B_DEC},
        "GatedAutoEncoder": {
            "encoder.weight": W_ENC.T,
            "decoder.weight": W_DEC.T,
            "decoder_bias": B_DEC,
            "r_mag": GATE["r_mag"],
            "gate_bias": GATE["b_gate"],
            "mag_bias": GATE["b_mag"],
        },
        "JumpReluAutoEncoder": {**plain, "threshold": THRESHOLD},
        "AutoEncoderTopK": {**linear, "b_dec": B_DEC, **scalar, "threshold": torch.tensor(-1.0)},
        "BatchTopKSAE": {**linear, "b_dec": B_DEC, **scalar},
        "MatryoshkaBatchTopKSAE": {**plain, **scalar, "group_sizes": torch.tensor([1, 1])},
    }[dict_class]


def dictionary(
    folder: Path, dict_class: str, state: Any = None, buffer: Any = None, called: str = "", **trainer: Any
) -> Path:
    """A trainer's folder of dictionary_learning."""
    state = state_of(dict_class) if state is None else state
    trainer = {"dict_class": called or dict_class, "activation_dim": 2, "dict_size": 2, "lm_name": "org/lm", **trainer}
    if "k" in state_of(dict_class):
        trainer.setdefault("k", 1)
    write(folder, "config.json", {"trainer": trainer, "buffer": buffer or {}})
    torch.save(state, folder / "ae.pt")
    return folder


def checked(folder: Path, sae_id: str | None = None) -> Sae:
    """The SAE in a folder, after its certificate was looked at."""
    found = foreign(str(folder), sae_id)
    assert certificate(found).exact
    assert certificate(found).n_latents_apart == 0
    return found.sae


# --- equations --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cfg", "tensors", "latents", "x_hat"),
    [
        ({}, {}, [2.5, 1.0], [3.5, 3.0]),
        ({"apply_b_dec_to_input": False}, {}, [3.5, 0.0], [4.5, -1.0]),
        ({"architecture": "topk", "k": 1}, {}, [2.5, 0.0], [3.5, -1.0]),
        ({"architecture": "topk", "k": 1, "rescale_acts_by_decoder_norm": True}, {}, [0.0, 4.0], [1.0, 3.0]),
        ({"architecture": "jumprelu"}, {"threshold": THRESHOLD}, [0.0, 1.0], [1.0, 3.0]),
        ({"architecture": "gated"}, GATE, [0.0, 3.0], [1.0, 11.0]),
        ({"architecture": "gated", "apply_b_dec_to_input": False}, GATE, [0.0, 0.0], [1.0, -1.0]),
        ({"normalize_activations": "expected_average_only_in"}, {}, [2.5, 1.0], [3.5, 3.0]),
        # x = √2·(1, 0) once it has length √2; x_hat goes back by 3/√2
        (
            {"normalize_activations": "constant_norm_rescale"},
            {},
            [2**0.5 - 0.5, 1.0],
            [(2**0.5 + 0.5) * 3 / 2**0.5, 3 * 3 / 2**0.5],
        ),
        # mean 1.5, std 3/√2: x = (1, -1)/√2
        (
            {"normalize_activations": "layer_norm"},
            {"b_enc": torch.tensor([1.0, 0.0])},
            [0.5**0.5, 2 - 2**0.5],
            [(0.5**0.5 + 1) * 3 / 2**0.5 + 1.5, (4 * (2 - 2**0.5) - 1) * 3 / 2**0.5 + 1.5],
        ),
        ({}, {"scaling_factor": torch.ones(2)}, [2.5, 1.0], [3.5, 3.0]),
    ],
)
def test_saelens_by_hand(cfg: dict, tensors: dict, latents: list[float], x_hat: list[float], tmp_path: Path):
    sae = checked(saelens(tmp_path, tensors, **cfg))
    assert sae.encode(X)[0].tolist() == pytest.approx(latents, abs=1e-4)
    assert sae(X)[0].tolist() == pytest.approx(x_hat, abs=1e-4)


@pytest.mark.parametrize(
    ("dict_class", "latents", "x_hat"),
    [
        ("AutoEncoder", [2.5, 1.0], [3.5, 3.0]),
        ("AutoEncoderNew", [3.5, 0.0], [4.5, -1.0]),
        ("GatedAutoEncoder", [0.0, 3.0], [1.0, 11.0]),
        ("JumpReluAutoEncoder", [3.5, 0.0], [4.5, -1.0]),
        ("AutoEncoderTopK", [2.5, 0.0], [3.5, -1.0]),
        ("BatchTopKSAE", [2.5, 0.0], [3.5, -1.0]),
        ("MatryoshkaBatchTopKSAE", [2.5, 0.0], [3.5, -1.0]),
    ],
)
def test_dictionary_learning_by_hand(dict_class: str, latents: list[float], x_hat: list[float], tmp_path: Path):
    sae = checked(dictionary(tmp_path, dict_class))
    assert sae.encode(X)[0].tolist() == pytest.approx(latents, abs=1e-6)
    assert sae(X)[0].tolist() == pytest.approx(x_hat, abs=1e-6)
    assert sae.config.k == (1 if "TopK" in dict_class else None)


def test_what_an_interrupted_training_left_is_brought_to_the_scale_of_the_activations(tmp_path: Path):
    """norm_factor 2: x / 2 was read, so that biases and threshold are doubled: b_dec (2, -2), b_enc (1, -2)."""
    backup = {"step": 7, "ae": state_of("BatchTopKSAE"), "optimizer": {}, "config": {}, "norm_factor": 2.0}
    found = foreign(str(dictionary(tmp_path, "BatchTopKSAE", backup)))
    assert found.sae.encode(X)[0].tolist() == [0.0, 0.0]  # (x - (2, -2)) W_enc + (1, -2) = (2, 2), not above 3
    assert found.sae.threshold is not None
    assert found.sae.threshold.tolist() == [3.0, 3.0]
    assert found.sae(2 * X)[0].tolist() == [7.0, -2.0]  # (6, 0) gives (5, 2)
    assert "An interrupted training left this file at step 7." in found.notes
    unset = {"step": 7, "ae": state_of("AutoEncoderTopK"), "norm_factor": None}
    assert foreign(str(dictionary(tmp_path, "AutoEncoderTopK", unset))).sae(X)[0].tolist() == [3.5, -1.0]


def test_sparsify_by_hand(tmp_path: Path):
    sae = checked(sparsify(tmp_path))
    assert sae.encode(X).tolist() == [[2.5, 0.0]]
    assert sae(X).tolist() == [[3.5, -1.0]]


@pytest.mark.parametrize(
    "cfg",
    [
        {"num_latents": 0, "expansion_factor": 1},
        {"num_latents": 0, "expansion_factor": 1, "signed": False, "of_a_later_version": [1, 2]},
        {"normalize_decoder": False, "multi_topk": True},
    ],
)
def test_sparsify_derives_the_width_and_ignores_what_it_does_not_know(cfg: dict, tmp_path: Path):
    assert checked(sparsify(tmp_path, **cfg)).config.d_sae == 2


def random_tensors(d_in: int, d_sae: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_enc": (d_sae,), "b_dec": (d_in,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("subtracts", [True, False])
@pytest.mark.parametrize("norm", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("architecture", ["standard", "topk", "jumprelu", "gated"])
def test_certificates_of_random_saes(architecture: str, norm: str, subtracts: bool, tmp_path: Path):
    more = {
        "topk": {"k": 7, "rescale_acts_by_decoder_norm": True},
        "jumprelu": {},
    }.get(architecture, {})
    tensors = random_tensors(24, 96)
    if architecture == "jumprelu":
        tensors["threshold"] = torch.linspace(0, 9, 96)
    if architecture == "gated":
        tensors |= {"b_gate": tensors["b_enc"], "b_mag": tensors["b_enc"] * 0.3, "r_mag": tensors["b_enc"] * 0.2}
    saelens(
        tmp_path, tensors, architecture=architecture, normalize_activations=norm, apply_b_dec_to_input=subtracts, **more
    )
    found = certificate(foreign(str(tmp_path)))
    assert found.exact
    assert found.n_latents_apart == 0
    assert found.l0 == found.l0_theirs
    assert 2 < found.l0 < 96


def test_a_certificate_sees_a_wrong_reading(tmp_path: Path):
    found = foreign(str(saelens(tmp_path)))
    found.sae.b_enc.data = found.sae.b_enc.data + 0.1
    assert not certificate(found).exact


# --- what is kept -----------------------------------------------------------------------------------------------------


def test_what_saelens_says_of_an_sae_is_kept(tmp_path: Path):
    metadata = {
        "model_name": "org/lm",
        "prepend_bos": True,
        "exclude_special_tokens": [0, 1],
        "context_size": 128,
        "neuronpedia_id": "gpt2-small/9-res-jb",
        "dataset_path": "/home/somebody/texts",
        "seqpos_slice": [None],
        "hook_head_index": None,
    }
    sae = checked(saelens(tmp_path / "a", metadata=metadata, dtype="torch.bfloat16"))
    config = sae.config
    assert (config.hook_point, config.model_name, config.dtype) == ("layers.9.mlp", "org/lm", "float32")
    assert config.token_policy.exclude_special
    assert config.token_policy.sink_norm_multiple is None
    assert config.extra == {
        "prepend_bos": True,
        "context_size": 128,
        "neuronpedia_id": "gpt2-small/9-res-jb",
        "source_dtype": "bfloat16",
    }
    sae.save(tmp_path / "b")
    assert Sae.from_pretrained(tmp_path / "b").config == config
    written = json.loads((tmp_path / "b/cfg.json").read_text())["metadata"]
    assert (written["prepend_bos"], written["context_size"]) == (True, 128)
    assert not foreign(str(saelens(tmp_path / "c"))).sae.config.token_policy.exclude_special


@pytest.mark.parametrize(
    ("metadata", "hook_point"),
    [
        ({"hook_name": "blocks.3.hook_resid_post"}, "layers.3"),
        ({"hook_name": "blocks.3.hook_resid_pre"}, "layers.2"),
        ({"hook_name": "blocks.3.hook_attn_out", "model_name": "gpt2-small"}, "h.3.attn"),
        ({"hook_name": "blocks.3.hook_resid_post", "model_name": "EleutherAI/pythia-70m"}, "layers.3"),
        ({"hook_name": "blocks.0.hook_resid_pre"}, "blocks.0.hook_resid_pre"),
        (
            {"hook_name": "blocks.3.hook_mlp_out", "hf_hook_name": "model.layers.3.post_norm.output"},
            "layers.3.post_norm",
        ),
        ({"hook_name": ""}, ""),
    ],
)
def test_the_hook_point_of_saelens(metadata: dict, hook_point: str, tmp_path: Path):
    sae = foreign(str(saelens(tmp_path, metadata=metadata))).sae
    assert sae.config.hook_point == hook_point
    written = sae.config.to_json()["metadata"]
    assert ("hf_hook_name" in written) == (hook_point != "" and not hook_point.startswith("blocks"))
    assert not sae.config.sae_id.startswith("/")


def test_names_of_hook_points():
    for name in ("layers.3", "layers.3.mlp", "layers.3.self_attn"):
        assert from_transformer_lens(transformer_lens_name(name)) == name
    for name in ("h.3", "h.3.mlp", "h.3.attn"):
        assert from_transformer_lens(transformer_lens_name(name), "openai-community/gpt2-xl") == name
    assert transformer_lens_name("layers.3.attention") == "blocks.3.hook_attn_out"
    ids = {
        "resid_post_layer_12/trainer_3": "layers.12",
        "mlp_out_layer_1": "layers.1.mlp",
        "layers.2.mlp": "layers.2.mlp",
    }
    ids |= {"blocks.4.hook_mlp_out": "layers.4.mlp", "x/h.3.attn/seed0": "h.3.attn", "layer_20/width_16k": None}
    assert {sae_id: in_id(sae_id) for sae_id in ids} == ids


FLAT = {"d_in": 2, "d_sae": 2, "dtype": "float32", "hook_point": "blocks.9.hook_resid_pre", "model_name": "gpt2-small"}


@pytest.mark.parametrize(
    ("flat", "latents"),
    [
        ({}, [2.5, 1.0]),
        ({"apply_b_dec_to_input": False}, [3.5, 0.0]),
        ({"activation_fn_str": "relu", "normalize_activations": False}, [2.5, 1.0]),
        ({"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 1}}, [2.5, 0.0]),
        ({"architecture": "jumprelu", "normalize_activations": None}, [0.0, 1.0]),
        ({"architecture": "gated", "activation_fn": "relu", "normalize_activations": True}, [0.0, 3.0]),
    ],
)
def test_flat_configs_of_older_saelens(flat: dict, latents: list[float], tmp_path: Path):
    architecture = flat.get("architecture", "standard")
    own = {"gated": GATE, "jumprelu": {"threshold": THRESHOLD}}.get(architecture, {})
    saelens(tmp_path, own, architecture=architecture)
    write(tmp_path, "cfg.json", {**FLAT, **flat, "context_size": 64})
    found = foreign(str(tmp_path))
    assert found.sae.encode(X)[0].tolist() == pytest.approx(latents, abs=1e-6)
    config = found.sae.config
    assert (config.hook_point, config.model_name) == ("h.8", "gpt2-small")
    assert (config.extra["prepend_bos"], config.extra["context_size"]) == (True, 64)
    assert any("BOS token" in note for note in found.notes)


def test_what_sparsify_says_of_an_sae_is_kept(tmp_path: Path):
    sparsify(tmp_path, "layers.10", torch.bfloat16)
    write(tmp_path, "config.json", {"model": "org/lm", "hookpoints": ["layers.10"], "sae": {"k": 1}})
    config = Sae.from_pretrained(tmp_path, "layers.10").config
    assert (config.hook_point, config.model_name, config.k) == ("layers.10", "org/lm", 1)
    assert config.extra == {"source_dtype": "bfloat16"}
    assert not config.token_policy.exclude_special
    assert foreign(str(tmp_path / "layers.10")).sae.config.hook_point == "layers.10"


def test_what_dictionary_learning_says_of_an_sae_is_kept(tmp_path: Path):
    buffer = {"remove_bos": True, "max_activation_norm_multiple": 10}
    dictionary(tmp_path / "resid_post_layer_9/trainer_0", "BatchTopKSAE", buffer=buffer, submodule_name="mlp_layer_3")
    dictionary(tmp_path / "resid_post_layer_9/trainer_1", "AutoEncoder")
    first, second = (foreign(str(tmp_path), f"resid_post_layer_9/trainer_{i}") for i in (0, 1))
    config = first.sae.config
    assert (config.hook_point, config.model_name, config.k) == ("layers.3.mlp", "org/lm", 1)
    assert config.architecture == "batchtopk"
    assert config.token_policy.exclude_special
    assert any("above 10 times the median" in note for note in first.notes)
    assert second.sae.config.hook_point == "layers.9"
    assert second.notes == ("The hook point layers.9 is read from the folder's name.",)


# --- finding ----------------------------------------------------------------------------------------------------------


def test_sparsifys_own_config_does_not_hide_its_saes(tmp_path: Path):
    for hook_point in ("layers.3", "layers.9.mlp"):
        sparsify(tmp_path, hook_point)
    write(tmp_path, "config.json", {"sae": {"k": 1}, "hookpoints": ["layers.3", "layers.9.mlp"]})
    assert list(Sae.load_all(tmp_path)) == ["layers.3", "layers.9.mlp"]
    assert Sae.load_all(tmp_path, dtype=torch.float16)["layers.3"].W_enc.dtype == torch.float16
    assert foreign_ids(Repository(str(tmp_path)))[0].name == "sparsify"


def test_a_hook_point_finds_the_folder_that_names_it_in_other_words(tmp_path: Path):
    saelens(tmp_path / "blocks.9.hook_mlp_out")
    saelens(tmp_path / "blocks.3.hook_resid_pre", metadata={"hook_name": "blocks.3.hook_resid_pre"})
    assert Sae.from_pretrained(tmp_path, "layers.9.mlp").config.hook_point == "layers.9.mlp"
    assert Sae.from_pretrained(tmp_path, "layers.2").config.hook_point == "layers.2"
    assert list(Sae.load_all(tmp_path)) == ["layers.2", "layers.9.mlp"]


def test_a_wrong_id_lists_a_dozen(tmp_path: Path):
    for i in range(15):
        sparsify(tmp_path, f"layers.{i:02d}")
    with pytest.raises(InputError, match=r"no SAE 'layers\.99'; it has layers\.00, .*, layers\.11 and 3 more\.$"):
        Sae.from_pretrained(tmp_path, "layers.99")


@pytest.mark.parametrize("sae_id", ["../layers.9.mlp", "/etc", "layers.9.mlp/../layers.9.mlp", "~", "layers.9.mlp\\x"])
def test_an_id_cannot_lead_out_of_the_folder(sae_id: str, tmp_path: Path):
    sparsify(tmp_path / "a")
    sparsify(tmp_path, "layers.9.mlp")
    with pytest.raises(InputError, match="has no SAE"):
        Sae.from_pretrained(tmp_path / "a", sae_id)


def test_a_link_cannot_lead_out_of_the_folder(tmp_path: Path):
    sparsify(tmp_path / "a")
    sparsify(tmp_path / "b")
    weights = tmp_path / "a/layers.9.mlp/sae.safetensors"
    weights.unlink()
    weights.symlink_to(tmp_path / "b/layers.9.mlp/sae.safetensors")
    with pytest.raises(InputError, match="is a link that leads out of"):
        Sae.from_pretrained(tmp_path / "a")
    weights.unlink()
    weights.symlink_to("renamed")
    (tmp_path / "b/layers.9.mlp/sae.safetensors").rename(weights.parent / "renamed")
    assert Sae.from_pretrained(tmp_path / "a")(X).tolist() == [[3.5, -1.0]]


def test_a_snapshot_in_the_hubs_cache_is_read(tmp_path: Path):
    cache = tmp_path / "models--org--x"
    (cache / "blobs").mkdir(parents=True)
    folder = sparsify(cache / "snapshots/abc")
    weights = folder / "layers.9.mlp/sae.safetensors"
    weights.rename(cache / "blobs/123")
    weights.symlink_to("../../../blobs/123")
    assert Sae.from_pretrained(folder)(X).tolist() == [[3.5, -1.0]]


def test_a_hub_repository_of_another_tool_is_read_and_only_what_is_asked_for_is_downloaded(tmp_path: Path):
    for hook_point in ("layers.3", "layers.9.mlp"):
        sparsify(tmp_path / "x", hook_point)
    with HubDouble(tmp_path / "hub") as hub:
        hub.create("model", "acme/sparse", tmp_path / "x")
        hub.create("model", "acme/lens", saelens(tmp_path / "y/blocks.9.hook_mlp_out").parent)
        with hub.used() as home:
            assert Sae.from_pretrained("acme/sparse", "layers.9.mlp")(X).tolist() == [[3.5, -1.0]]
            got = {path.name for path in home.rglob("*.safetensors")} | {
                path.parent.name for path in home.rglob("cfg.json")
            }
            assert got == {"sae.safetensors", "layers.9.mlp"}
            assert Sae.from_pretrained("acme/sparse", "layers.9.mlp", local_files_only=True).config.k == 1
            assert list(Sae.load_all("acme/lens")) == ["layers.9.mlp"]
            with pytest.raises(InputError, match=r"acme/lens has no SAE 'layers\.1'; it has blocks"):
                Sae.from_pretrained("acme/lens", "layers.1")
            with pytest.raises(InputError, match="acme/none is neither a folder here nor a model repository"):
                Sae.from_pretrained("acme/none", "layers.1")


# --- refused: no exact counterpart ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"architecture": "skip_transcoder"}, "'skip_transcoder' has no exact counterpart: it writes another"),
        ({"architecture": "abstopk", "k": 1}, "its latents may be negative"),
        ({"architecture": "matching_pursuit"}, "found one after the other"),
        ({"architecture": "temporal"}, "depend on other tokens"),
        ({"architecture": "new"}, "it is unknown here"),
        ({"architecture": ["topk"]}, "it is unknown here"),
        ({"reshape_activations": "hook_z"}, "reads the heads of an attention"),
        ({"normalize_activations": "covariance_whitening"}, "its whitening is not folded"),
        ({"normalize_activations": "other"}, "'none', 'layer_norm' or 'constant_norm_rescale'"),
    ],
)
def test_what_saelens_can_and_we_cannot_is_refused(cfg: dict, message: str, tmp_path: Path):
    with pytest.raises(InputError, match=message):
        foreign(str(saelens(tmp_path, **cfg)))


def test_scales_that_are_not_in_the_weights_are_refused(tmp_path: Path):
    saelens(tmp_path / "a", normalize_activations="expected_average_only_in")
    assert "the scale is taken to be in the weights" in foreign(str(tmp_path / "a")).notes[0]
    write(tmp_path / "a", "activation_scaler.json", {"scaling_factor": 2.0})
    with pytest.raises(InputError, match=r"activation_scaler\.json\) is not folded"):
        foreign(str(tmp_path / "a"))
    saelens(tmp_path / "b", {"scaling_factor": torch.tensor([1.0, 2.0])})
    with pytest.raises(InputError, match="scaling_factor that is not 1"):
        foreign(str(tmp_path / "b"))
    write(saelens(tmp_path / "c"), "cfg.json", {**FLAT, "activation_fn_str": "tanh-relu"})
    with pytest.raises(InputError, match="'standard with tanh-relu' has no exact counterpart"):
        foreign(str(tmp_path / "c"))


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"transcode": True}, "an SAE with transcode has no exact counterpart: it writes another"),
        ({"skip_connection": True}, "it adds a linear map of its input"),
        ({"signed": True}, "its latents may be negative"),
        ({"activation": "groupmax"}, "activation 'groupmax' has no exact counterpart"),
    ],
)
def test_what_sparsify_can_and_we_cannot_is_refused(cfg: dict, message: str, tmp_path: Path):
    with pytest.raises(InputError, match=message):
        foreign(str(sparsify(tmp_path, **cfg)))


def test_what_dictionary_learning_can_and_we_cannot_is_refused(tmp_path: Path):
    with pytest.raises(InputError, match="class 'CrossCoder' has no exact counterpart; read are AutoEncoder,"):
        foreign(str(dictionary(tmp_path / "a", "AutoEncoder", called="CrossCoder")))
    with pytest.raises(InputError, match="it writes another module's output than it reads"):
        foreign(str(dictionary(tmp_path / "b", "AutoEncoder", buffer={"io": "in_and_out"})))
    unset = {**state_of("BatchTopKSAE"), "threshold": torch.tensor(-1.0)}
    with pytest.raises(InputError, match="its threshold was never set"):
        foreign(str(dictionary(tmp_path / "c", "BatchTopKSAE", unset)))


# --- written ----------------------------------------------------------------------------------------------------------


def test_sparsify_is_written_and_read_back(tmp_path: Path):
    tensors = random_tensors(8, 24)
    config = SaeConfig(d_in=8, d_sae=24, k=5, hook_point="layers.3", model_name="org/lm")
    sae = Sae(config, tensors["W_enc"], tensors["b_enc"], tensors["W_dec"], tensors["b_dec"])
    write_sparsify({"layers.3": sae, "layers.4.mlp": sae}, tmp_path)
    written = json.loads((tmp_path / "layers.3/cfg.json").read_text())
    assert (written["num_latents"], written["k"], written["d_in"]) == (24, 5, 8)
    assert written["normalize_decoder"] is False
    saved = load_file(tmp_path / "layers.3/sae.safetensors")
    assert torch.equal(saved["encoder.weight"], tensors["W_enc"].T)
    assert torch.equal(saved["W_dec"], tensors["W_dec"])
    back = Sae.load_all(tmp_path)
    assert list(back) == ["layers.3", "layers.4.mlp"]
    assert back["layers.3"].config.model_name == "org/lm"
    assert all(torch.equal(a, b) for a, b in zip(back["layers.3"].parameters(), sae.parameters(), strict=True))


def test_what_sparsify_has_no_word_for_is_not_written(tmp_path: Path):
    good = foreign(str(sparsify(tmp_path / "a"))).sae
    relu = foreign(str(saelens(tmp_path / "b"))).sae
    normed = foreign(str(saelens(tmp_path / "c", architecture="topk", k=1, normalize_activations="layer_norm"))).sae
    for sae, message in ((relu, "a relu SAE has no exact counterpart in sparsify"), (normed, "does not normalise")):
        with pytest.raises(InputError, match=message):
            write_sparsify({"layers.1": good, "layers.2": sae}, tmp_path / "out")
        assert not (tmp_path / "out").exists()


# --- bad files --------------------------------------------------------------------------------------------------------


class Exploit:
    """What a malicious pickle does when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


class ExploitByName(Exploit):
    """The same through what torch's own reader allows: nothing of tensors."""

    def __reduce__(self) -> Any:
        return bytearray, (10**12,)


def pickled(path: Path, content: Any) -> None:
    with path.open("wb") as handle:
        pickle.dump(content, handle, protocol=4)


@pytest.mark.parametrize(
    ("save", "run"),
    [
        (lambda path, marker: torch.save({"a": torch.ones(2), "b": Exploit(marker)}, path), r"(posix|nt)\.system"),
        (lambda path, marker: pickled(path, Exploit(marker)), r"(posix|nt)\.system"),
        (lambda path, marker: torch.save(Exploit(marker), path, _use_new_zipfile_serialization=False), "posix"),
        (lambda path, marker: torch.save({"a": ExploitByName(marker)}, path), r"_*builtins?_*\.bytearray"),
        (lambda path, marker: torch.save(torch.nn.Linear(2, 2), path), r"torch\.nn\.modules\.linear\.Linear"),
    ],
)
def test_a_pickle_that_runs_code_is_named_and_not_run(save: Callable, run: str, tmp_path: Path):
    marker, folder = tmp_path / "marker", dictionary(tmp_path / "a", "AutoEncoder")
    save(folder / "ae.pt", marker)
    with pytest.raises(InputError, match=rf"ae\.pt is a pickle that wants to run {run}.*it was not run"):
        foreign(str(folder))
    assert not marker.exists()


def test_the_exploit_is_a_real_one(tmp_path: Path):
    pickled(tmp_path / "x", Exploit(tmp_path / "marker"))
    pickle.loads((tmp_path / "x").read_bytes())  # noqa: S301
    assert (tmp_path / "marker").exists()


def test_zip_bombs_are_not_unpacked(tmp_path: Path):
    zeros = np.zeros((2000, 3000), np.float32)
    np.savez_compressed(tmp_path / "x.npz", W_enc=zeros)
    with pytest.raises(InputError, match=r"x\.npz has \S+ bytes and would unpack to 24,000,128 in 1 files"):
        archive.arrays(tmp_path / "x.npz")
    torch.save({"W_enc": torch.from_numpy(zeros)}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as plain, zipfile.ZipFile(tmp_path / "b.pt", "w", 8) as packed:
        for info in plain.infolist():
            packed.writestr(info.filename, plain.read(info), zipfile.ZIP_DEFLATED)
    with pytest.raises(InputError, match=r"b\.pt has \S+ bytes and would unpack to 24,00"):
        archive.tensors(tmp_path / "b.pt")
    with zipfile.ZipFile(tmp_path / "c.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("c/data.pkl", os.urandom(1000))
    with pytest.raises(InputError, match="compressed zip, which torch never writes"):
        archive.tensors(tmp_path / "c.pt")
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as many:
        for i in range(archive.MAX_ENTRIES + 1):
            many.writestr(f"{i}", "")
    with pytest.raises(InputError, match="in 10,001 files"):
        archive.arrays(tmp_path / "d.npz")


def test_arrays_whose_header_lies_are_not_allocated(tmp_path: Path):
    np.savez(tmp_path / "x.npz", a=np.ones((2, 3), np.float32))
    assert archive.arrays(tmp_path / "x.npz")["a"].tolist() == [[1.0] * 3] * 2
    content = (tmp_path / "x.npz").read_bytes()
    with zipfile.ZipFile(tmp_path / "y.npz", "w") as lying, zipfile.ZipFile(tmp_path / "x.npz") as honest:
        lying.writestr("a.npy", honest.read("a.npy").replace(b"(2, 3), }" + b" " * 10, b"(2000000, 3000000), }"[:19]))
        lying.writestr("b.npy", honest.read("a.npy").replace(b"(2, 3), }      ", b"(9999999999,)} "))
    with pytest.raises(InputError, match=r"a\.npy is not a plain array|b\.npy is not a plain array"):
        archive.arrays(tmp_path / "y.npz")
    with pytest.raises(InputError, match=r"b\.npy is not a plain array \(it claims float32 of shape \(9999999999,\)"):
        archive.arrays(tmp_path / "y.npz", lambda name: name == "b")
    np.savez(tmp_path / "z.npz", a=np.array([Exploit(tmp_path / "marker")], dtype=object))
    with pytest.raises(InputError, match="it claims object of shape"):
        archive.arrays(tmp_path / "z.npz")
    (tmp_path / "t.npz").write_bytes(content[:100])
    with pytest.raises(InputError, match=r"is not an \.npz file, or it is cut short"):
        archive.arrays(tmp_path / "t.npz")
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("kept", [0, 1, 50, 0.5, -1, -100])
def test_torch_files_that_are_cut_short_are_refused(kept: float, tmp_path: Path):
    folder = dictionary(tmp_path, "AutoEncoder")
    content = (folder / "ae.pt").read_bytes()
    (folder / "ae.pt").write_bytes(content[: int(len(content) * kept) if isinstance(kept, float) else kept])
    with pytest.raises(InputError, match=r"ae\.pt is not a"):
        foreign(str(folder))


def test_a_tensor_that_claims_more_than_its_bytes_is_refused(tmp_path: Path):
    torch.save({"a": torch.zeros(1).expand(10**12)}, tmp_path / "x.pt")
    with pytest.raises(InputError, match=r"has a tensor of shape \(1000000000000,\) that its bytes do not fill"):
        archive.tensors(tmp_path / "x.pt")
    torch.save([1, 2], tmp_path / "y.pt")
    with pytest.raises(InputError, match="holds a list, not a dictionary of tensors"):
        archive.tensors(tmp_path / "y.pt")


def header_changed(change: Callable[[dict[str, Any]], Any]) -> Callable[[bytes], bytes]:
    def damage(content: bytes) -> bytes:
        length = struct.unpack("<Q", content[:8])[0]
        header = json.loads(content[8 : 8 + length])
        change(header)
        text = json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + content[8 + length :]

    return damage


def overlapping(header: dict[str, Any]) -> None:
    header["b_dec"]["data_offsets"] = header["W_dec"]["data_offsets"][:1] * 2
    header["b_dec"]["data_offsets"][1] += 8


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[:-1], "its tensors need 48 bytes and it has 47"),
        (lambda content: content[:20], r"a header of \d+ bytes in a file of 20"),
        (lambda content: content[:3], "in a file of 3"),
        (lambda content: b"", "in a file of 0"),
        (lambda content: struct.pack("<Q", 2**62) + content[8:], "a header of 4,611,686,018,427,387,904 bytes"),
        (lambda content: content[:8] + b"\xff" * 30 + content[38:], "its header cannot be read"),
        (header_changed(lambda h: h["b_enc"].update(data_offsets=[0, 10**12])), "W_|b_"),
        (header_changed(lambda h: h["b_enc"].update(shape=[10**9])), "b_enc has 8 bytes for .* of shape"),
        (header_changed(lambda h: h["b_enc"].update(shape=[-2])), r"b_enc has shape \(-2,\)"),
        (header_changed(lambda h: h["b_enc"].update(shape=["2"])), r"b_enc has shape \('2',\)"),
        (header_changed(lambda h: h["b_enc"].update(dtype="F64")), "b_enc has 8 bytes for torch.float64 of shape"),
        (header_changed(lambda h: h["b_enc"].update(dtype="F7")), "its header cannot be read"),
        (header_changed(lambda h: h["b_enc"].pop("shape")), "its header cannot be read"),
        (header_changed(lambda h: h.pop("W_dec")), "its tensors need|begins at byte"),
        (header_changed(overlapping), "begins at byte"),
        (lambda content: content + b"\0" * 9, "its tensors need 48 bytes and it has 57"),
        (lambda content: struct.pack("<Q", 2) + b"[]", "its header cannot be read"),
        (lambda content: struct.pack("<Q", 9000) + b"[" * 9000, "its header cannot be read"),
    ],
)
def test_safetensors_with_lying_headers_are_refused(damage: Callable[[bytes], bytes], message: str, tmp_path: Path):
    path = saelens(tmp_path) / "sae_weights.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match=rf"not a readable safetensors file \(.*{message}"):
        Sae.from_pretrained(tmp_path)


def test_shapes_are_compared_before_anything_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("read")

    saelens(tmp_path / "a", d_sae=2**40)
    sae = foreign(str(sparsify(tmp_path / "s"))).sae
    sae.save(tmp_path / "b")
    monkeypatch.setattr(archive, "safetensors_of", never)
    monkeypatch.setattr("safesail.sae.formats.saelens.safetensors_of", never)
    with pytest.raises(InputError, match=r"W_enc is \(2, 2\), but its config says \(2, 1099511627776\)"):
        Sae.from_pretrained(tmp_path / "a")
    config = sae.config.model_copy(update={"d_in": 10**12})
    with pytest.raises(InputError, match=r"W_enc is \(2, 2\), but its cfg\.json says \(1000000000000, 2\)"):
        Sae.load(tmp_path / "b/sae_weights.safetensors", config)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_floats_are_converted_to_the_dtype_asked_for(dtype: torch.dtype, tmp_path: Path):
    saelens(tmp_path, {"W_enc": W_ENC.to(dtype), "b_enc": B_ENC.to(dtype), "W_dec": W_DEC.to(dtype)})
    assert Sae.from_pretrained(tmp_path).W_enc.dtype == torch.float32
    assert Sae.from_pretrained(tmp_path)(X).tolist() == [[3.5, 3.0]]
    assert Sae.from_pretrained(tmp_path, dtype=torch.float16).W_dec.dtype == torch.float16


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"W_enc": W_ENC.to(torch.int8)}, "W_enc is int8; float64, 32, 16 and bfloat16 are read"),
        ({"b_dec": B_DEC.bool()}, "b_dec is bool"),
        ({"W_dec": torch.tensor([[1.0, math.nan], [0.0, 1.0]])}, "W_dec holds values that are not finite"),
        ({"b_enc": torch.tensor([1.0, -math.inf])}, "b_enc holds values that are not finite"),
        ({"b_enc": torch.ones(3)}, r"b_enc is \(3,\), but its config says \(2,\)"),
        ({"W_skip": torch.ones(2, 2)}, "also holds W_skip, which its kind of SAE does not use"),
        ({"threshold": THRESHOLD}, "also holds threshold"),
    ],
)
def test_weights_that_cannot_be_right_are_refused(tensors: dict, message: str, tmp_path: Path):
    with pytest.raises(InputError, match=message) as caught:
        foreign(str(saelens(tmp_path, tensors)))
    assert "sae_weights.safetensors" in str(caught.value)


def test_large_half_precision_weights_are_finite(tmp_path: Path):
    saelens(tmp_path, {"b_enc": torch.full((2,), 60000.0, dtype=torch.float16)})
    assert Sae.from_pretrained(tmp_path).b_enc.tolist() == [60000.0, 60000.0]


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"architecture": "topk", "k": 3}, "k = 3 exceeds d_sae = 2"),
        ({"architecture": "topk"}, "lacks the key 'k'"),
        ({"architecture": "jumprelu"}, "no tensor threshold; it holds W_dec, W_enc, b_dec, b_enc"),
        ({"d_in": 3}, r"W_enc is \(2, 2\), but its config says \(3, 2\)"),
        ({"d_in": "2"}, "d_in is '2', not a number of dimensions"),
        ({"d_sae": True}, "d_sae is True"),
        ({"metadata": []}, "metadata is not a JSON object"),
        ({"metadata": {"hook_name": "../../etc"}}, "hook point '../../etc' is not a module path"),
    ],
)
def test_configs_that_weights_contradict_are_refused(cfg: dict, message: str, tmp_path: Path):
    saelens(tmp_path)
    content = json.loads((tmp_path / "cfg.json").read_text())
    write(tmp_path, "cfg.json", content | cfg)
    with pytest.raises(InputError, match=message):
        foreign(str(tmp_path))


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"k": 3}, "k = 3 exceeds d_sae = 2"),
        ({"k": "1"}, "k is '1', not a count"),
        ({"d_in": None}, "d_in is None, not a count"),
        ({"num_latents": 0}, r"encoder\.weight is \(2, 2\), but its cfg\.json says \(64, 2\)"),
    ],
)
def test_configs_of_sparsify_that_weights_contradict_are_refused(cfg: dict, message: str, tmp_path: Path):
    with pytest.raises(InputError, match=message):
        foreign(str(sparsify(tmp_path, **cfg)))


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"k": 2}, "says k = 2, its weights k = 1"),
        ({"dict_size": 3}, r"encoder\.weight is \(2, 2\), but its config says \(3, 2\)"),
        ({"activation_dim": None}, "activation_dim is None"),
        ({"called": "AutoEncoder"}, "no tensor bias; it holds b_dec, decoder.weight"),
    ],
)
def test_configs_of_a_trainer_that_weights_contradict_are_refused(trainer: dict, message: str, tmp_path: Path):
    with pytest.raises(InputError, match=message):
        foreign(str(dictionary(tmp_path, "AutoEncoderTopK", **trainer)))


@pytest.mark.parametrize("dict_class", CLASSES)
def test_a_state_that_lacks_a_tensor_or_has_one_more_is_refused(dict_class: str, tmp_path: Path):
    state = state_of(dict_class)
    name = "encoder.weight" if "encoder.weight" in state else "W_enc"
    with pytest.raises(InputError, match=f"has no tensor {name}"):
        foreign(str(dictionary(tmp_path, dict_class, {key: state[key] for key in state if key != name})))
    with pytest.raises(InputError, match="also holds W_skip"):
        foreign(str(dictionary(tmp_path, dict_class, {**state, "W_skip": W_DEC})))
    with pytest.raises(InputError, match=f"{name} is a int, not a tensor"):
        foreign(str(dictionary(tmp_path, dict_class, {**state, name: 3})))


@pytest.mark.parametrize("content", [[], {}, {"trainer": []}, {"trainer": {}, "buffer": 3}])
def test_a_config_that_is_no_trainers_is_refused(content: Any, tmp_path: Path):
    write(dictionary(tmp_path, "AutoEncoder"), "config.json", content)
    with pytest.raises(InputError, match=r"config\.json"):
        foreign(str(tmp_path))
