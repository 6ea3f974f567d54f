"""The released suites' SAEs: made files of each shape are found by their own reader alone and read exactly."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from safesail.errors import InputError
from safesail.recipe import TokenPolicy
from safesail.repository import Repository
from safesail.sae.formats import (
    dictionary_learning,
    gemma_scope,
    goodfire,
    llama_scope,
    openai,
    qwen_scope,
    saelens,
    safe_sail,
    safer,
    sparsify,
)
from safesail.sae.formats.foreign import Certificate, Foreign, Format, certificate

D_IN = 12
SCOPES = [module.FORMAT for module in (gemma_scope, llama_scope, qwen_scope, openai, goodfire, safe_sail, safer)]
ALL = [*SCOPES, *(module.FORMAT for module in (saelens, sparsify, dictionary_learning))]


# --- made files -------------------------------------------------------------------------------------------------------


def weights(d_sae: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(W_enc, b_enc, W_dec, b_dec), none of them zero, decoder rows of unlike norms."""
    generator = torch.Generator().manual_seed(seed)
    W_dec = torch.randn(d_sae, D_IN, generator=generator)
    W_dec = W_dec / W_dec.norm(dim=1, keepdim=True) * (0.5 + torch.rand(d_sae, 1, generator=generator))
    W_enc = W_dec.T + 0.2 * torch.randn(D_IN, d_sae, generator=generator)
    return W_enc, 0.3 * torch.randn(d_sae, generator=generator), W_dec, torch.randn(D_IN, generator=generator)


def thresholds(d_sae: int) -> Tensor:
    return 0.2 + torch.rand(d_sae, generator=torch.Generator().manual_seed(1))


def written(path: Path, content: Any) -> Path:
    """A file of the kind that its name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps(content), encoding="utf-8")
    elif not path.suffix:
        path.write_bytes(b"")
    elif path.suffix == ".npz":
        np.savez(path, **{name: tensor.numpy() for name, tensor in content.items()})
    elif path.suffix == ".safetensors":
        save_file({name: tensor.contiguous() for name, tensor in content.items()}, path)
    else:
        torch.save(content, path)
    return path


def gemma_scope_1(
    root: Path, name: str = "gemma-scope-2b-pt-res", sae_id: str = "", **more: Tensor
) -> tuple[Path, str]:
    W_enc, b_enc, W_dec, b_dec = weights(96)
    sae_id = sae_id or "layer_20/width_16k/average_l0_71"
    tensors = {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec, "threshold": thresholds(96)}
    written(root / name / sae_id / "params.npz", tensors | more)
    return root / name, sae_id


def gemma_scope_2(
    root: Path, sae_id: str = "resid_post_all/layer_17_width_16k_l0_small", config: Any = True, **more: Tensor
) -> tuple[Path, str]:
    W_enc, b_enc, W_dec, b_dec = weights(96)
    folder = root / "gemma-scope-2-4b-pt"
    hook = {
        "architecture": "jump_relu",
        "model_name": "google/gemma-3-4b-pt",
        "hf_hook_point_in": "model.layers.17.output",
    }
    if config:
        written(folder / sae_id / "config.json", hook if config is True else hook | config)
    tensors = {"w_enc": W_enc, "w_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec, "threshold": thresholds(96)}
    written(folder / sae_id / "params.safetensors", tensors | more)
    return folder, sae_id


FIRST = {
    "hook_point_in": "blocks.15.hook_resid_post",
    "hook_point_out": "blocks.15.hook_resid_post",
    "use_decoder_bias": True,
    "apply_decoder_bias_to_pre_encoder": False,
    "d_model": D_IN,
    "d_sae": 96,
    "act_fn": "jumprelu",
    "jump_relu_threshold": 0.25,
    "norm_activation": "dataset-wise",
    "dataset_average_activation_norm": {"in": 1.5, "out": 1.5},
    "sparsity_include_decoder_norm": True,
    "use_glu_encoder": False,
    "top_k": 50,
}


def llama_scope_1(root: Path, decoder: Tensor | None = None, dtype: torch.dtype = torch.float32, **more: Any):
    W_enc, b_enc, W_dec, b_dec = weights(96)
    W_dec = W_dec if decoder is None else decoder
    folder, sae_id = root / "Llama3_1-8B-Base-LXR-8x", "Llama3_1-8B-Base-L15R-8x"
    written(folder / sae_id / "hyperparams.json", FIRST | more)
    tensors = {"encoder.weight": W_enc.T, "encoder.bias": b_enc, "decoder.weight": W_dec.T, "decoder.bias": b_dec}
    tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
    written(folder / sae_id / "checkpoints/final.safetensors", tensors)
    return folder, sae_id


R1 = {
    "sae_type": "sae",
    "d_model": D_IN,
    "expansion_factor": 8,
    "act_fn": "jumprelu",
    "norm_activation": "dataset-wise",
    "sparsity_include_decoder_norm": True,
    "top_k": 50,
    "use_decoder_bias": True,
    "use_glu_encoder": False,
    "hook_point_in": "blocks.15.hook_resid_post",
    "hook_point_out": "blocks.15.hook_resid_post",
}
AVERAGE = "dataset_average_activation_norm.blocks.15.hook_resid_post"


def llama_scope_r1(root: Path, decoder: Tensor | None = None, **more: Any) -> tuple[Path, str]:
    W_enc, b_enc, W_dec, b_dec = weights(96)
    W_dec = W_dec if decoder is None else decoder
    folder, sae_id = root / "Llama-Scope-R1-Distill", "400M-Slimpajama-400M-OpenR1-Math-220k/L15R"
    written(folder / sae_id / "config.json", R1 | more)
    tensors = {
        "encoder.weight": W_enc.T,
        "encoder.bias": b_enc,
        "decoder.weight": W_dec.T,
        "decoder.bias": b_dec,
        "log_jumprelu_threshold": thresholds(96).log(),
        AVERAGE: torch.tensor(1.5),
    }
    written(folder / sae_id / "sae_weights.safetensors", tensors)
    return folder, sae_id


def llamascopium(root: Path, file: str = "sae_weights.safetensors", decoder: Tensor | None = None, **more: Any):
    W_enc, b_enc, W_dec, b_dec = weights(96)
    W_dec = W_dec if decoder is None else decoder
    folder, sae_id = root / "plt-1b", "resid/layer15"
    config = R1 | more
    written(folder / sae_id / "config.json", config)
    written(folder / sae_id / "lm_config.json", {"model_name": "some/model-1b"})
    tensors = {"W_E": W_enc, "b_E": b_enc, "W_D": W_dec, AVERAGE: torch.tensor(1.5)}
    tensors |= {"b_D": b_dec} if config["use_decoder_bias"] else {}
    if config["act_fn"] == "jumprelu":
        tensors["activation_function.log_jumprelu_threshold"] = thresholds(96).log()
    written(folder / sae_id / file, {"sae": tensors, "version": "2.0"} if file.endswith(".pt") else tensors)
    return folder, sae_id


def qwen(root: Path, name: str = "SAE-Res-Qwen3-1.7B-Base-W1K-L0_50", dtype: torch.dtype = torch.float32):
    W_enc, b_enc, W_dec, b_dec = weights(1024)
    tensors = {"W_enc": W_enc.T, "W_dec": W_dec.T, "b_enc": b_enc, "b_dec": b_dec}
    written(root / name / "layer7.sae.pt", {name: tensor.to(dtype) for name, tensor in tensors.items()})
    return root / name, "layer7"


def open_ai(root: Path, location: str = "resid_post_mlp_v5_32k", **more: Any) -> tuple[Path, str]:
    W_enc, b_enc, W_dec, b_dec = weights(96)
    content = {
        "encoder.weight": W_enc.T,
        "decoder.weight": W_dec.T,
        "pre_bias": b_dec,
        "latent_bias": b_enc,
        "activation": "TopK",
        "activation_state_dict": {"k": 8, "postact_fn": "ReLU"},
        "stats_last_nonzero": torch.zeros(96, dtype=torch.long),
        "latents_activation_frequency": torch.ones(96),
        "latents_mean_square": torch.zeros(96),
    }
    written(root / "gpt2-small" / location / "autoencoders/8.pt", content | more)
    return root / "gpt2-small", f"{location}/autoencoders/8"


def good_fire(root: Path) -> tuple[Path, str]:
    W_enc, b_enc, W_dec, b_dec = weights(96)
    name = "Llama-3.1-8B-Instruct-SAE-l19"
    tensors = {
        "encoder_linear.weight": W_enc.T,
        "encoder_linear.bias": b_enc,
        "decoder_linear.weight": W_dec.T,
        "decoder_linear.bias": b_dec,
    }
    written(root / name / f"{name}.pth", tensors)
    return root / name, f"{name}.pth"


PRE, POST = "pre_encoder_bias._bias_reference", "post_decoder_bias._bias_reference"


def safe_sail_content(more: dict[str, Any]) -> dict[str, Any]:
    W_enc, b_enc, W_dec, b_dec = weights(512)
    content = {
        PRE: b_dec + 0.5,
        POST: b_dec,
        "encoder.weight": W_enc.T,
        "encoder.bias": b_enc,
        "decoder.weight": W_dec.T,
    }
    content = {name: value for name, value in (content | more).items() if value is not None}
    return {name: torch.stack([value, value + 1]) for name, value in content.items()}  # two components


def safe_sail_folder(root: Path, more: dict[str, Any] | None = None, nested: bool = False) -> tuple[Path, str]:
    content = safe_sail_content(more or {})
    sae_id = "data/sae_checkpoints/ckpt_layer17"
    written(root / "Safe-SAIL" / f"{sae_id}.pt", {"state_dict": content} if nested else content)
    return root / "Safe-SAIL", sae_id


def safer_folder(root: Path) -> tuple[Path, str]:
    W_enc, b_enc, W_dec, b_dec = weights(128)
    content = {"pre_bias": b_dec, "latent_bias": b_enc, "encoder.weight": W_enc.T, "decoder.weight": W_dec.T}
    written(root / "SAFER/SAE_models/stage2.pt", content)
    return root / "SAFER", "SAE_models/stage2"


Made = Callable[[Path], tuple[Path, str]]
TOPK = {"act_fn": "topk", "top_k": 8}
MADE: dict[str, tuple[Format, Made, float]] = {
    # (its format, how it is made, its L0)
    "Gemma Scope": (gemma_scope.FORMAT, gemma_scope_1, 44.3),
    "Gemma Scope of finetuned factors": (
        gemma_scope.FORMAT,
        lambda root: gemma_scope_1(root, scaling_factor=torch.ones(96)),
        44.3,
    ),
    "Gemma Scope 2": (gemma_scope.FORMAT, gemma_scope_2, 44.3),
    "Gemma Scope 2 without config": (gemma_scope.FORMAT, lambda root: gemma_scope_2(root, config=False), 44.3),
    "Llama Scope": (llama_scope.FORMAT, llama_scope_1, 44.1),
    "Llama Scope in bf16": (llama_scope.FORMAT, lambda root: llama_scope_1(root, dtype=torch.bfloat16), 44.1),
    "Llama Scope by pre-activations": (
        llama_scope.FORMAT,
        lambda root: llama_scope_1(root, sparsity_include_decoder_norm=False),
        46.5,
    ),
    "Llama Scope R1-Distill": (llama_scope.FORMAT, llama_scope_r1, 41.7),
    "llamascopium topk": (llama_scope.FORMAT, lambda root: llamascopium(root, **TOPK), 8.0),
    "llamascopium topk by pre-activations": (
        llama_scope.FORMAT,
        lambda root: llamascopium(root, sparsity_include_decoder_norm=False, **TOPK),
        8.0,
    ),
    "llamascopium of tokens' norms": (
        llama_scope.FORMAT,
        lambda root: llamascopium(root, norm_activation="token-wise", **TOPK),
        8.0,
    ),
    "llamascopium relu": (llama_scope.FORMAT, lambda root: llamascopium(root, act_fn="relu"), 55.4),
    "llamascopium that subtracts": (
        llama_scope.FORMAT,
        lambda root: llamascopium(root, apply_decoder_bias_to_pre_encoder=True),
        36.9,
    ),
    "llamascopium without decoder bias": (
        llama_scope.FORMAT,
        lambda root: llamascopium(root, use_decoder_bias=False),
        36.9,
    ),
    "llamascopium folded": (
        llama_scope.FORMAT,
        lambda root: llamascopium(root, "sae_weights.pt", norm_activation="inference"),
        41.7,
    ),
    "Qwen-Scope": (qwen_scope.FORMAT, qwen, 50.0),
    "Qwen-Scope in bf16": (qwen_scope.FORMAT, lambda root: qwen(root, dtype=torch.bfloat16), 50.0),
    "OpenAI TopK": (openai.FORMAT, open_ai, 8.0),
    "OpenAI ReLU": (openai.FORMAT, lambda root: open_ai(root, activation="ReLU", activation_state_dict={}), 53.0),
    "Goodfire": (goodfire.FORMAT, good_fire, 55.4),
    "Safe-SAIL": (safe_sail.FORMAT, safe_sail_folder, 200.0),
    "Safe-SAIL nested": (safe_sail.FORMAT, lambda root: safe_sail_folder(root, nested=True), 200.0),
    "Safe-SAIL tied": (safe_sail.FORMAT, lambda root: safe_sail_folder(root, {POST: None}), 200.0),
    "Safe-SAIL JumpReLU": (
        safe_sail.FORMAT,
        lambda root: safe_sail_folder(root, {"encoder.theta": thresholds(512)}),
        198.2,
    ),
    "SAFER": (safer.FORMAT, safer_folder, 63.1),
}


def read(made: Made, root: Path, form: Format) -> Foreign:
    folder, sae_id = made(root)
    return form.read(Repository(str(folder)), sae_id)


# --- all of them ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MADE)
def test_it_is_the_same_function(name: str, tmp_path: Path):
    form, made, l0 = MADE[name]
    foreign = read(made, tmp_path, form)
    assert form.name.startswith(foreign.format.removesuffix(" 2"))
    found = certificate(foreign)
    limit = 2e-5 if name == "SAFER" else 5e-6  # SAFER's epsilon is another one
    assert max(found.max_latent_error, found.max_reconstruction_error) < limit
    assert (found.exact, found.n_latents_apart) == (True, 0)
    assert found.l0 == found.l0_theirs == pytest.approx(l0, abs=0.1)


@pytest.mark.parametrize("name", MADE)
def test_it_is_found_by_its_own_reader_alone(name: str, tmp_path: Path):
    form, made, _ = MADE[name]
    folder, sae_id = made(tmp_path)
    repository = Repository(str(folder))
    found = {other.name: ids for other in ALL if (ids := other.find(repository, repository.names()))}
    assert found == {form.name: [sae_id]}


def test_other_tools_folders_are_not_taken_for_a_suites(tmp_path: Path):
    for name in ("cfg.json", "config.json", "sae_weights.safetensors", "sae.safetensors", "ae.pt", "model.pt"):
        (tmp_path / "layers.9").mkdir(exist_ok=True)
        (tmp_path / "layers.9" / name).write_text("{}", encoding="utf-8")
    repository = Repository(str(tmp_path))
    names = [*repository.names(), "config.json", "params.npz", "optimizer.pt", "indices_layer17.pt", "layer7.pt"]
    assert {form.name: form.find(repository, names) for form in SCOPES} == {form.name: [] for form in SCOPES}


@pytest.mark.parametrize("name", MADE)
def test_it_survives_being_saved(name: str, tmp_path: Path):
    from safesail.sae.model import read as read_ours

    form, made, _ = MADE[name]
    foreign = read(made, tmp_path, form)
    foreign.sae.save(tmp_path / "ours")
    again: Certificate = certificate(foreign._replace(sae=read_ours(tmp_path / "ours")))
    assert again.exact
    assert again == certificate(foreign)


def test_what_the_files_do_not_say_is_noted(tmp_path: Path):
    for i, (name, (form, made, _)) in enumerate(MADE.items()):
        notes = read(made, tmp_path / str(i), form).notes
        assert all(note.endswith(".") for note in notes), name
        assert notes or name.startswith(("Gemma Scope 2", "llamascopium")), name


@pytest.mark.parametrize(
    ("name", "hook_point", "model", "kind"),
    [
        ("Gemma Scope", "layers.20", "google/gemma-2-2b", "jumprelu"),
        ("Gemma Scope 2", "layers.17", "google/gemma-3-4b-pt", "jumprelu"),
        ("Gemma Scope 2 without config", "layers.17", "google/gemma-3-4b-pt", "jumprelu"),
        ("Llama Scope", "layers.15", "meta-llama/Llama-3.1-8B", "jumprelu"),
        ("Llama Scope R1-Distill", "layers.15", "deepseek-ai/DeepSeek-R1-Distill-Llama-8B", "jumprelu"),
        ("llamascopium topk", "layers.15", "some/model-1b", "topk"),
        ("Qwen-Scope", "layers.7", "Qwen/Qwen3-1.7B-Base", "topk"),
        ("OpenAI TopK", "h.8", "openai-community/gpt2", "topk"),
        ("OpenAI ReLU", "h.8", "openai-community/gpt2", "relu"),
        ("Goodfire", "layers.19", "meta-llama/Llama-3.1-8B-Instruct", "relu"),
        ("Safe-SAIL", "layers.17.mlp", "Qwen/Qwen2.5-3B-Instruct", "topk"),
        ("Safe-SAIL JumpReLU", "layers.17.mlp", "Qwen/Qwen2.5-3B-Instruct", "jumprelu"),
        ("SAFER", "layers.11", "", "topk"),
    ],
)
def test_where_it_reads(name: str, hook_point: str, model: str, kind: str, tmp_path: Path):
    form, made, _ = MADE[name]
    config = read(made, tmp_path, form).sae.config
    assert (config.hook_point, config.model_name, config.architecture) == (hook_point, model, kind)


def test_tokens_norms_by_hand(tmp_path: Path):
    """x = (30, 40) is read as √2·(0.6, 0.8), latents are that and what they write is brought back, ·50/√2."""
    folder, sae_id = tmp_path / "some", "a"
    written(folder / sae_id / "config.json", R1 | {"act_fn": "relu", "norm_activation": "token-wise"})
    tensors = {"W_E": torch.eye(2), "W_D": torch.eye(2), "b_E": torch.zeros(2), "b_D": torch.tensor([0.0, 2**0.5])}
    written(folder / sae_id / "sae_weights.safetensors", tensors)
    sae = llama_scope.FORMAT.read(Repository(str(folder)), sae_id).sae
    x = torch.tensor([[30.0, 40.0]])
    torch.testing.assert_close(sae.encode(x), torch.tensor([[0.6, 0.8]]) * 2**0.5)
    torch.testing.assert_close(sae(x), torch.tensor([[30.0, 40.0 + 50.0]]))


def test_weights_of_half_precision_are_read_as_they_are(tmp_path: Path):
    sae = read(MADE["Qwen-Scope in bf16"][1], tmp_path, qwen_scope.FORMAT).sae
    assert sae.W_dec.dtype == torch.float32
    assert sae.config.extra["source_dtype"] == "bfloat16"
    torch.testing.assert_close(sae.W_dec.data, weights(1024)[2].bfloat16().float(), atol=0, rtol=0)


# --- Gemma Scope ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sae_id", "hook_point"),
    [
        ("gemma-scope-9b-it-res", "layer_9/width_131k/average_l0_22", "layers.9"),
        ("gemma-scope-2b-pt-mlp", "layer_3/width_16k/average_l0_60", "layers.3.post_feedforward_layernorm"),
        ("gemma-scope-2b-pt-att", "layer_3/width_16k/average_l0_60", "blocks.3.attn.hook_z"),
        ("gemma-scope-2b-pt-res", "embedding/width_4k/average_l0_6", "embed_tokens"),
    ],
)
def test_gemma_scopes_sites(name: str, sae_id: str, hook_point: str, tmp_path: Path):
    folder, _ = gemma_scope_1(tmp_path, name, sae_id)
    sae = gemma_scope.FORMAT.read(Repository(str(folder)), sae_id).sae
    assert sae.config.hook_point == hook_point
    assert sae.config.model_name == ("google/gemma-2-9b-it" if "9b-it" in name else "google/gemma-2-2b")
    assert sae.config.token_policy == TokenPolicy(exclude_special=True, sink_norm_multiple=None)


def test_gemma_scopes_lower_case_names(tmp_path: Path):
    folder, sae_id = gemma_scope_1(tmp_path)
    path = folder / sae_id / "params.npz"
    with np.load(path) as content:
        written(path, {name.replace("W_", "w_"): torch.from_numpy(content[name]) for name in content})
    assert certificate(gemma_scope.FORMAT.read(Repository(str(folder)), sae_id)).exact


def test_gemma_scope_2s_places(tmp_path: Path):
    for i, (hook, ours) in enumerate(
        {
            "model.layers.3.post_feedforward_layernorm.output": "layers.3.post_feedforward_layernorm",
            "model.layers.3.self_attn.o_proj.input": "blocks.3.attn.hook_z",
        }.items()
    ):
        folder, sae_id = gemma_scope_2(
            tmp_path / str(i), config={"hf_hook_point_in": hook, "model_name": "gemma-v3-270m-pt"}
        )
        config = gemma_scope.FORMAT.read(Repository(str(folder)), sae_id).sae.config
        assert (config.hook_point, config.model_name) == (ours, "google/gemma-3-270m")
    folder, sae_id = gemma_scope_2(tmp_path / "no", "attn_out/layer_5_width_16k_l0_big", config=False)
    foreign = gemma_scope.FORMAT.read(Repository(str(folder)), sae_id)
    assert foreign.sae.config.hook_point == "blocks.5.attn.hook_z"
    assert "no config.json" in foreign.notes[0]


# --- arithmetic by hand -----------------------------------------------------------------------------------------------


def test_the_one_threshold_of_llama_scope_by_hand(tmp_path: Path):
    """x = (3, 4), average norm 1: s = √2. Latent 0 reads 3√2 = 4.243 and writes rows of norm 2, latent 1 4√2 and 0.1.

    With θ = 1, what they write is 3·2 = 6 and 4·0.1 = 0.4 long at the activations' scale: the first exceeds 1, the
    second does not, though its pre-activation 5.657 is the larger one.
    """
    folder, sae_id = tmp_path / "Llama3_1-8B-Base-LXR-8x", "Llama3_1-8B-Base-L0R-8x"
    norms = {"dataset_average_activation_norm": {"in": 1.0, "out": 1.0}, "jump_relu_threshold": 1.0}
    written(folder / sae_id / "hyperparams.json", FIRST | norms)
    tensors = {
        "encoder.weight": torch.eye(2),
        "encoder.bias": torch.zeros(2),
        "decoder.weight": torch.tensor([[2.0, 0.0], [0.0, 0.1]]),
        "decoder.bias": torch.tensor([2**0.5, 0.0]),
    }
    written(folder / sae_id / "checkpoints/final.safetensors", tensors)
    sae = llama_scope.FORMAT.read(Repository(str(folder)), sae_id).sae
    x = torch.tensor([[3.0, 4.0]])
    torch.testing.assert_close(sae.encode(x), torch.tensor([[4.2426407, 0.0]]))
    torch.testing.assert_close(sae(x), torch.tensor([[6.0 + 1.0, 0.0]]))
    assert sae.threshold is not None
    assert sae.threshold.tolist() == pytest.approx([2**0.5 / 2, 2**0.5 / 0.1])


def test_released_thresholds_of_llama_scope_are_one_share_of_the_norm():
    """What the reading of θ rests on: θ and average output norm of three released SAEs, one of them a transcoder."""
    released = {
        "L8R-8x": (0.2021484375, 6.3125),
        "L24R-32x": (0.75390625, 29.125),
        "L8TC-8x": (0.10400390625, 3.390625),
    }
    shares = {name: threshold / norm for name, (threshold, norm) in released.items()}
    assert shares == pytest.approx({"L8R-8x": 0.0320, "L24R-32x": 0.0259, "L8TC-8x": 0.0307}, abs=1e-4)


def test_a_topk_by_decoder_norms_by_hand(tmp_path: Path):
    """Pre-activations (2, 3) with decoder norms (5, 1): the first, of score 10, is the larger one, and stays 2."""
    folder, sae_id = tmp_path / "some", "a"
    written(folder / sae_id / "config.json", R1 | {"act_fn": "topk", "top_k": 1, "norm_activation": "inference"})
    tensors = {
        "W_E": torch.eye(2),
        "b_E": torch.zeros(2),
        "W_D": torch.diag(torch.tensor([5.0, 1.0])),
        "b_D": torch.zeros(2),
    }
    written(folder / sae_id / "sae_weights.safetensors", tensors)
    foreign = llama_scope.FORMAT.read(Repository(str(folder)), sae_id)
    x = torch.tensor([[2.0, 3.0]])
    assert foreign.encode(x).tolist() == [[2.0, 0.0]]
    assert foreign.sae.encode(x).tolist() == [[10.0, 0.0]]
    assert torch.as_tensor(foreign.latent_scale).tolist() == [5.0, 1.0]
    assert foreign.sae(x).tolist() == foreign.decode(x, foreign.encode(x)).tolist() == [[10.0, 0.0]]


def test_a_latent_without_a_decoder_is_never_active(tmp_path: Path):
    for i, activation in enumerate(("topk", "jumprelu", "relu")):
        decoder = weights(96)[2].clone()
        decoder[5] = 0
        foreign = read(
            lambda root, activation=activation, decoder=decoder: llamascopium(
                root, decoder=decoder, act_fn=activation, top_k=90
            ),
            tmp_path / str(i),
            llama_scope.FORMAT,
        )
        found = certificate(foreign)
        assert found.exact
        assert found.n_latents_apart == 0
        assert not foreign.sae.encode(torch.randn(50, D_IN, generator=torch.Generator().manual_seed(3)) * 9)[:, 5].any()


def test_openais_layer_norm_by_hand(tmp_path: Path):
    """x = (1, 3): mean 2, std √2, read as ∓0.7071; of ∓0.7071 - pre_bias (0, 0.5) + latent_bias (1, 1) one stays."""
    content = {
        "encoder.weight": torch.eye(2),
        "decoder.weight": torch.eye(2),
        "pre_bias": torch.tensor([0.0, 0.5]),
        "latent_bias": torch.ones(2),
        "activation": "TopK",
        "activation_state_dict": {"k": 1, "postact_fn": "ReLU"},
    }
    written(tmp_path / "resid_delta_attn_v5_128k/autoencoders/3.pt", content)
    sae_id = "resid_delta_attn_v5_128k/autoencoders/3"
    foreign = openai.FORMAT.read(Repository(str(tmp_path)), sae_id)
    assert foreign.sae.config.hook_point == "h.3.attn"
    x, half = torch.tensor([[1.0, 3.0]]), 2**-0.5
    torch.testing.assert_close(foreign.sae.encode(x), torch.tensor([[0.0, half - 0.5 + 1]]), atol=1e-4, rtol=0)
    expected = torch.tensor([[0.0 * 2**0.5 + 2, (half - 0.5 + 1 + 0.5) * 2**0.5 + 2]])
    torch.testing.assert_close(foreign.sae(x), expected, atol=1e-4, rtol=0)


def test_safe_sails_two_biases_by_hand(tmp_path: Path):
    """(5 - 1)·1 + 0.5 = 4.5 is read and 4.5·2 + 3 written: the bias before is 1, the one after 3."""
    content = {
        PRE: torch.full((1, 1), 1.0),
        POST: torch.full((1, 1), 3.0),
        "encoder.weight": torch.ones(1, 300, 1),
        "encoder.bias": torch.full((1, 300), -9.0),
        "decoder.weight": torch.full((1, 1, 300), 2.0),
    }
    content["encoder.bias"][0, 7] = 0.5
    content = {name: torch.cat([value, value + 1]) for name, value in content.items()}  # a second component
    written(tmp_path / "ckpt_layer0.pt", content)
    sae = safe_sail.FORMAT.read(Repository(str(tmp_path)), "ckpt_layer0").sae
    x = torch.tensor([[5.0]])
    assert sae.encode(x)[0].nonzero().tolist() == [[7]]
    assert float(sae.encode(x)[0, 7]) == 4.5
    assert sae(x).tolist() == [[12.0]]
    assert sae.config.k == 200


def test_how_far_safers_epsilon_is_off(tmp_path: Path):
    """The share 9e-6 / std(x): within the certificate's 1e-4 at std 1, beyond it at std 0.01."""
    foreign = read(safer_folder, tmp_path, safer.FORMAT)
    x = torch.randn(64, D_IN, generator=torch.Generator().manual_seed(5))
    x = (x - x.mean(dim=1, keepdim=True)) / x.std(dim=1, keepdim=True)
    at_one, small = certificate(foreign, x), certificate(foreign, x * 0.01)
    assert at_one.exact
    assert at_one.max_latent_error < 3e-5
    assert not small.exact
    assert 2e-4 < small.max_latent_error < 3e-3
    assert any("9e-6" in note for note in foreign.notes)


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "made", "message"),
    [
        (gemma_scope, lambda root: gemma_scope_1(root, "mine"), "only in the repository's name"),
        (gemma_scope, lambda root: gemma_scope_1(root, "gemma-scope-2b-pt-transcoders"), "another place than it reads"),
        (gemma_scope, lambda root: gemma_scope_1(root, scaling_factor=torch.full((96,), 2.0)), "scaling_factor"),
        (gemma_scope, lambda root: gemma_scope_1(root, b_enc=torch.zeros(95)), r"b_enc is \(95,\)"),
        (gemma_scope, lambda root: gemma_scope_1(root, b_dec=torch.full((D_IN,), torch.nan)), "not finite"),
        (gemma_scope, lambda root: gemma_scope_2(root, config={"affine_connection": True}), "linear map of its input"),
        (gemma_scope, lambda root: gemma_scope_2(root, config={"architecture": "topk"}), "jump_relu is read"),
        (
            gemma_scope,
            lambda root: gemma_scope_2(root, config={"hf_hook_point_out": "model.layers.18"}),
            "another place",
        ),
        (gemma_scope, lambda root: gemma_scope_2(root, "transcoder/layer_17_width_16k_l0_big"), "another place"),
        (gemma_scope, lambda root: gemma_scope_2(root, "odd/layer_17_width_16k_l0_big", config=False), "is not known"),
        (
            gemma_scope,
            lambda root: gemma_scope_2(root, affine_skip_connection=torch.zeros(D_IN, D_IN)),
            "linear map of its input",
        ),
        (llama_scope, lambda root: llama_scope_1(root, hook_point_out="blocks.15.hook_mlp_out"), "another place"),
        (llama_scope, lambda root: llama_scope_1(root, use_glu_encoder=True), "gated"),
        (llama_scope, lambda root: llama_scope_1(root, jump_relu_threshold=None), "jump_relu_threshold is None"),
        (llama_scope, lambda root: llama_scope_1(root, dataset_average_activation_norm={"in": 0.0}), "average norm"),
        (llama_scope, lambda root: llamascopium(root, sae_type="crosscoder"), "no SAE of one place"),
        (llama_scope, lambda root: llamascopium(root, act_fn="batchtopk"), "a whole batch"),
        (llama_scope, lambda root: llamascopium(root, act_fn="layertopk"), "several layers"),
        (llama_scope, lambda root: llamascopium(root, norm_activation="batch-wise"), "batch-wise"),
        (llama_scope, lambda root: llamascopium(root, act_fn="topk", top_k=97), "k = 97 exceeds d_sae = 96"),
        (llama_scope, lambda root: llamascopium(root, "sae_weights.dcp/.metadata"), "distributed checkpoint"),
        (qwen_scope, lambda root: qwen(root, "mine"), "only in the repository's name"),
        (qwen_scope, lambda root: qwen(root, "SAE-Res-Qwen3-8B-Base-W2K-L0_50"), "1024 latents, but"),
        (openai, lambda root: open_ai(root, activation="Identity"), "'Identity' has no exact counterpart"),
        (openai, lambda root: open_ai(root, activation_state_dict={"k": 8, "postact_fn": "Identity"}), "negative"),
        (openai, lambda root: open_ai(root, activation_state_dict={}), "k is None"),
        (safe_sail, lambda root: safe_sail_folder(root, {"decoder.weight": None}), "no decoder.weight"),
        (safe_sail, lambda root: safe_sail_folder(root, {"encoder.theta": -thresholds(512)}), "negative theta"),
        (
            safe_sail,
            lambda root: safe_sail_folder(root, {"encoder.bias": torch.zeros(511)}),
            r"encoder.bias is \(511,\)",
        ),
    ],
)
def test_what_has_no_exact_counterpart_is_refused(form: Any, made: Made, message: str, tmp_path: Path):
    folder, sae_id = made(tmp_path)
    repository = Repository(str(folder))
    assert form.FORMAT.find(repository, repository.names()) == [sae_id]
    with pytest.raises(InputError, match=message):
        form.FORMAT.read(repository, sae_id)


@pytest.mark.parametrize("name", ["clt/width_262k/params_layer_3", "crosscoder/width_65k/params_layer_3"])
def test_what_spans_layers_is_found_and_refused(name: str, tmp_path: Path):
    written(tmp_path / f"{name}.safetensors", {"w_enc": torch.zeros(2, 2)})
    repository = Repository(str(tmp_path))
    assert gemma_scope.FORMAT.find(repository, repository.names()) == [name]
    with pytest.raises(InputError, match="another place than it reads"):
        gemma_scope.FORMAT.read(repository, name)


def test_a_place_that_no_module_writes_keeps_its_name(tmp_path: Path):
    foreign = read(lambda root: open_ai(root, "resid_post_attn_v5_32k"), tmp_path / "a", openai.FORMAT)
    assert foreign.sae.config.hook_point == "blocks.8.hook_resid_mid"
    foreign = read(lambda root: open_ai(root, "elsewhere"), tmp_path / "b", openai.FORMAT)
    assert foreign.sae.config.hook_point == ""
    assert "is not known" in foreign.notes[0]


# --- the peer's own loaders, where it is installed --------------------------------------------------------------------


def unit(d_sae: int = 96) -> Tensor:
    decoder = weights(d_sae)[2]
    return decoder / decoder.norm(dim=1, keepdim=True)


@pytest.mark.parametrize(
    ("loader", "form", "made", "folder_name", "scale"),
    [
        ("gemma_2_sae_huggingface_loader", gemma_scope, gemma_scope_1, None, None),
        ("gemma_3_sae_huggingface_loader", gemma_scope, gemma_scope_2, None, None),
        # it leaves decoder norms out of the threshold, so that it agrees where they are 1
        ("llama_scope_sae_huggingface_loader", llama_scope, lambda r: llama_scope_1(r, unit()), None, D_IN**0.5 / 1.5),
        (
            "llama_scope_r1_distill_sae_huggingface_loader",
            llama_scope,
            lambda r: llama_scope_r1(r, unit()),
            None,
            D_IN**0.5 / 1.5,
        ),
        ("qwen_scope_sae_huggingface_loader", qwen_scope, qwen, "layer7.sae.pt", None),
    ],
)
def test_saelens_reads_the_same_from_the_same_file(
    loader: str, form: Any, made: Made, folder_name: str | None, scale: float | None, tmp_path: Path, monkeypatch: Any
):
    loaders = pytest.importorskip("sae_lens.loading.pretrained_sae_loaders")
    peer = pytest.importorskip("sae_lens")
    folder, sae_id = made(tmp_path)

    def local(repo_id: str, filename: str, subfolder: str = "", **_: Any) -> str:
        return str(folder / subfolder / filename)

    monkeypatch.setattr(loaders, "hf_hub_download", local)
    shapes = {"w_enc": [D_IN, 96], "w_dec": [96, D_IN]}
    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", lambda repo_id, filename: shapes)
    overrides = {"d_in": D_IN, "d_sae": qwen_scope_width(form), "dtype": "float32", "device": "cpu"}
    repo_id = f"somebody/{folder.name}"
    cfg, state, _ = getattr(loaders, loader)(repo_id, folder_name or sae_id, "cpu", cfg_overrides=overrides)
    cfg = loaders.handle_config_defaulting(cfg)
    config = peer.SAE.get_sae_config_class_for_architecture(cfg["architecture"]).from_dict(cfg)
    sae = peer.SAE.get_sae_class_for_architecture(config.architecture())(config)
    sae.process_state_dict_for_loading(state)
    sae.load_state_dict(state)
    if scale is not None:
        sae.fold_activation_norm_scaling_factor(scale)
    ours = form.FORMAT.read(Repository(str(folder)), sae_id).sae
    x = torch.randn(200, D_IN, generator=torch.Generator().manual_seed(2)) * 2
    torch.testing.assert_close(ours.encode(x), sae.encode(x).to_dense(), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(ours(x), sae(x), atol=1e-4, rtol=1e-4)


def qwen_scope_width(form: Any) -> int:
    return 1024 if form is qwen_scope else 96
