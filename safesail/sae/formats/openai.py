"""OpenAI's SAEs of GPT-2: `<location>[_<version>]/autoencoders/<layer>.pt`, TopK ones and older ReLU ones.

    x_n   = (x - mean(x)) / (std(x) + 1e-5) for TopK, x for ReLU        std unbiased
    h     = (x_n - pre_bias) encoder.weightᵀ + latent_bias
    f     = relu of the k largest of h, or relu(h)
    x_hat = f decoder.weightᵀ + pre_bias, for TopK · std(x) + mean(x)

encoder.weight: (d_sae, d_in), decoder.weight: (d_in, d_sae). Whether the input is normalised is told by the activation
alone. Gao et al. 2024.
"""

import re
from typing import Any

from torch import Tensor

from safesail.errors import InputError
from safesail.repository import Repository
from safesail.sae.formats.archive import tensors
from safesail.sae.formats.checks import weights
from safesail.sae.formats.foreign import Foreign, Format, configured, folded
from safesail.sae.formats.suites import Equations, full_name, largest, matrix_shape, stored_as

__all__ = ["FORMAT"]

_FILE = re.compile(r"(?:.*/)?autoencoders/\d+")
_LOCATIONS = {"resid_post_mlp": "", "resid_delta_mlp": ".mlp", "resid_delta_attn": ".attn", "mlp_post_act": ".mlp.act"}
"""What follows `h.<layer>` in the hook point."""
_STATISTICS = ("stats_last_nonzero", "latents_activation_frequency", "latents_mean_square")
_DESCRIBED = ("activation", "activation_state_dict")


def find(repository: Repository, names: list[str]) -> list[str]:
    """The files of the layers, as `resid_post_mlp_v5_32k/autoencoders/8`."""
    return [name.removesuffix(".pt") for name in names if name.endswith(".pt") and _FILE.fullmatch(name[:-3])]


def read(repository: Repository, sae_id: str) -> Foreign:
    """The SAE of one layer."""
    path = repository.file(f"{sae_id}.pt")
    found = tensors(path)
    k = _k(found, str(path))
    d_sae, d_in = matrix_shape(found, "encoder.weight", str(path))
    shapes = {
        "encoder.weight": (d_sae, d_in),
        "decoder.weight": (d_in, d_sae),
        "pre_bias": (d_in,),
        "latent_bias": (d_sae,),
    }
    theirs = weights(found, shapes, str(path), ignored=(*_STATISTICS, *_DESCRIBED))
    hook_point, notes = _hook_point(full_name(repository, sae_id))
    config = configured(
        str(path),
        d_in=d_in,
        d_sae=d_sae,
        k=k,
        architecture="relu" if k is None else "topk",
        hook_point=hook_point,
        model_name="openai-community/gpt2",
        extra=stored_as(found["encoder.weight"]),
        normalize_activations="none" if k is None else "layer_norm",
    )
    bias = theirs["pre_bias"]
    sae = folded(
        config, theirs["encoder.weight"].T, theirs["latent_bias"], theirs["decoder.weight"].T, bias, subtracted=bias
    )
    notes = (*notes, "That the model is GPT-2 small, and whether x is normalised, is not in the file.")
    return Foreign("OpenAI", sae_id, sae, *_theirs(theirs, k), notes=notes)


def _k(found: dict[str, Any], origin: str) -> int | None:
    """k of a TopK SAE, None of a ReLU one; InputError for any other activation."""
    activation, state = found.get("activation", "ReLU"), found.get("activation_state_dict") or {}
    if activation == "ReLU":
        return None
    if activation != "TopK":
        raise InputError(f"{origin}: activation {activation!r} has no exact counterpart; TopK and ReLU are read.")
    k, after = (state.get("k"), state.get("postact_fn", "ReLU")) if isinstance(state, dict) else (None, None)
    if type(k) is not int:
        raise InputError(f"{origin}: k is {k!r}, not a count.")
    if after != "ReLU":
        raise InputError(f"{origin}: TopK followed by {after!r} has no exact counterpart: its latents may be negative.")
    return k


def _hook_point(name: str) -> tuple[str, tuple[str, ...]]:
    """From the folder of the location and the number of the file."""
    found = re.findall(r"/(resid_\w+?_(?:attn|mlp)|mlp_post_act)(?:_v\w+)?/autoencoders/(\d+)$", name)
    if not found:
        return "", ("No folder above it names the location in the model: where the SAE reads is not known.",)
    location, layer = found[0]
    if location not in _LOCATIONS:
        return f"blocks.{layer}.hook_resid_mid", (f"{location} of block {layer} is no module's output.",)
    hook_point = f"h.{layer}{_LOCATIONS[location]}"
    return hook_point, (f"The hook point {hook_point} is taken from the folder {location}.",)


def _theirs(found: dict[str, Tensor], k: int | None) -> Equations:
    """OpenAI's own equations."""

    def encode(x: Tensor) -> Tensor:
        if k is not None:
            centred = x - x.mean(dim=-1, keepdim=True)
            x = centred / (centred.std(dim=-1, keepdim=True) + 1e-5)
        h = (x - found["pre_bias"]) @ found["encoder.weight"].T + found["latent_bias"]
        return h.relu() if k is None else largest(h, k).relu()

    def decode(x: Tensor, latents: Tensor) -> Tensor:
        x_hat = latents @ found["decoder.weight"].T + found["pre_bias"]
        return x_hat if k is None else x_hat * x.std(dim=-1, keepdim=True) + x.mean(dim=-1, keepdim=True)

    return encode, decode


FORMAT = Format("OpenAI", find, read)
