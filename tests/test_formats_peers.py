"""The peers themselves, where they are installed: they load what we write, and we read what they save."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from safesail import Sae
from safesail.sae.config import SaeConfig
from safesail.sae.formats.foreign import certificate
from safesail.sae.formats.read import foreign
from safesail.sae.formats.sparsify import write_sparsify

D_IN, D_SAE = 32, 128


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def vectors() -> Tensor:
    return torch.randn(100, D_IN, generator=generator()) * 2 + 0.3


def randomised(module: torch.nn.Module) -> None:
    """Random weights, with biases that matter and decoder rows of unlike norms."""
    draw = generator()
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            size = 0.7 if parameter.ndim == 1 else 1 / D_IN**0.5
            parameter.copy_(torch.randn(parameter.shape, generator=draw) * size)
            if name == "threshold":
                parameter.copy_(torch.linspace(0, 2, len(parameter)))
            if name == "W_dec":
                parameter.mul_(torch.linspace(0.5, 2, len(parameter))[:, None])


def our_sae(architecture: str = "topk", norm: str = "none") -> Sae:
    level = {"k": 9} if architecture in ("topk", "batchtopk", "matryoshka") else {}
    config = SaeConfig.model_validate(
        {
            "d_in": D_IN,
            "d_sae": D_SAE,
            "hook_point": "layers.9.mlp",
            "architecture": architecture,
            "normalize_activations": norm,
            **level,
        }
    )
    shapes = {"W_enc": (D_IN, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
    weights: dict[str, Tensor] = {name: torch.zeros(shape) for name, shape in shapes.items()}
    sae = Sae(config, **weights, threshold=torch.zeros(D_SAE) if config.has_threshold else None)
    randomised(sae)
    return sae


def agree(ours: Sae, theirs: Any, x: Tensor) -> None:
    """Latents and reconstruction of the peer and of ours are the same, and not by being empty."""
    latents, expected = ours.encode(x), theirs.encode(x)
    assert 3 < (expected > 0).sum(1).float().mean() < D_SAE
    torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-4, atol=1e-4)


# --- SAELens ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("architecture", ["relu", "topk", "batchtopk", "jumprelu", "matryoshka"])
def test_saelens_loads_what_we_save(architecture: str, norm: str, tmp_path: Path):
    sae_lens = pytest.importorskip("sae_lens")
    sae = our_sae(architecture, norm)
    sae.save(tmp_path)
    agree(sae, sae_lens.SAE.load_from_disk(tmp_path), vectors())
    agree(Sae.from_pretrained(tmp_path), sae_lens.SAE.load_from_disk(tmp_path), vectors())


NORMS = ["none", "layer_norm", "constant_norm_rescale", "expected_average_only_in"]


@pytest.mark.parametrize("subtracts", [True, False])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("StandardSAE", {}),
        ("GatedSAE", {}),
        ("JumpReLUSAE", {}),
        ("TopKSAE", {"k": 9}),
        ("TopKSAE", {"k": 9, "rescale_acts_by_decoder_norm": True}),
    ],
)
def test_we_read_what_saelens_saves(name: str, more: dict, norm: str, subtracts: bool, tmp_path: Path):
    sae_lens = pytest.importorskip("sae_lens")
    config = getattr(sae_lens, f"{name}Config")(
        d_in=D_IN, d_sae=D_SAE, normalize_activations=norm, apply_b_dec_to_input=subtracts, **more
    )
    theirs = getattr(sae_lens, name)(config)
    theirs.cfg.metadata.hook_name = "blocks.9.hook_mlp_out"
    randomised(theirs)
    theirs.save_model(tmp_path / "theirs")
    found = foreign(str(tmp_path / "theirs"))
    assert certificate(found, vectors()).exact
    agree(found.sae, theirs, vectors())
    torch.testing.assert_close(found.encode(vectors()), theirs.encode(vectors()))
    assert found.sae.config.hook_point == "layers.9.mlp"
    found.sae.save(tmp_path / "ours")
    agree(found.sae, sae_lens.SAE.load_from_disk(tmp_path / "ours"), vectors())


@pytest.mark.parametrize("name", ["BatchTopKTrainingSAE", "MatryoshkaBatchTopKTrainingSAE"])
def test_we_read_what_a_training_of_saelens_leaves(name: str, tmp_path: Path):
    sae_lens = pytest.importorskip("sae_lens")
    widths = {"matryoshka_widths": [32, 64, D_SAE]} if "Matryoshka" in name else {}
    theirs = getattr(sae_lens, name)(getattr(sae_lens, f"{name}Config")(d_in=D_IN, d_sae=D_SAE, k=9, **widths))
    randomised(theirs)
    theirs.topk_threshold.fill_(0.8)
    theirs.save_inference_model(tmp_path)
    agree(foreign(str(tmp_path)).sae, sae_lens.SAE.load_from_disk(tmp_path), vectors())


def test_flat_configs_are_read_as_saelens_reads_them(tmp_path: Path):
    sae_lens = pytest.importorskip("sae_lens")
    theirs = sae_lens.TopKSAE(sae_lens.TopKSAEConfig(d_in=D_IN, d_sae=D_SAE, k=9))
    randomised(theirs)
    theirs.save_model(tmp_path)
    flat = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "hook_point": "blocks.3.hook_resid_pre"}
    for more in (
        {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 5}},
        {"activation_fn": "relu", "apply_b_dec_to_input": False, "normalize_activations": "layer_norm"},
        {"architecture": "standard", "normalize_activations": False},
    ):
        (tmp_path / "cfg.json").write_text(json.dumps({**flat, **more}))
        agree(foreign(str(tmp_path)).sae, sae_lens.SAE.load_from_disk(tmp_path), vectors())


# --- sparsify ---------------------------------------------------------------------------------------------------------


class Sparsified:
    """sparsify's results in the shape of ours."""

    def __init__(self, coder: Any) -> None:
        self.coder = coder

    def encode(self, x: Tensor) -> Tensor:
        values, indices, _ = self.coder.encode(x)
        return torch.zeros(len(x), D_SAE).scatter(1, indices, values)

    def __call__(self, x: Tensor) -> Tensor:
        return self.coder(x).sae_out


@pytest.mark.parametrize("normalize_decoder", [True, False])
def test_we_read_what_sparsify_saves(normalize_decoder: bool, tmp_path: Path):
    sparsify = pytest.importorskip("sparsify")
    config = sparsify.SparseCoderConfig(expansion_factor=D_SAE // D_IN, k=9, normalize_decoder=normalize_decoder)
    theirs = sparsify.SparseCoder(D_IN, config)
    randomised(theirs)
    theirs.save_to_disk(tmp_path / "layers.9.mlp")
    found = foreign(str(tmp_path), "layers.9.mlp")
    assert found.sae.config.d_sae == D_SAE
    with torch.no_grad():
        agree(found.sae, Sparsified(theirs), vectors())
    assert certificate(found).exact


def test_sparsify_loads_what_we_write(tmp_path: Path):
    sparsify = pytest.importorskip("sparsify")
    sae = our_sae()
    write_sparsify({"layers.9.mlp": sae}, tmp_path)
    with torch.no_grad():
        agree(sae, Sparsified(sparsify.SparseCoder.load_from_disk(tmp_path / "layers.9.mlp")), vectors())
        found = sparsify.SparseCoder.load_many(str(tmp_path), local=True)
        assert list(found) == ["layers.9.mlp"]
