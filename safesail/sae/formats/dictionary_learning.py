"""dictionary_learning: `trainer_<i>/{ae.pt, config.json}`, a dictionary class named in the config.

    AutoEncoder             f = relu((x - b) W + b_enc)                                 x_hat = f D + b
    AutoEncoderNew          f = relu(x W + b_enc)                                       x_hat = f D + b
    GatedAutoEncoder        f = [h + b_gate > 0]·relu(exp(r) h + b_mag), h = (x - b) W  x_hat = f D + b
    JumpReluAutoEncoder     f = relu(a)·[a > threshold], a = x W + b_enc                x_hat = f D + b
    AutoEncoderTopK         f = the k largest of relu((x - b) W + b_enc)                x_hat = f D + b
    BatchTopKSAE, MatryoshkaBatchTopKSAE
                            f = a·[a > threshold], a = relu((x - b) W + b_enc)          x_hat = f D + b

Saved weights are already on the scale of the activations (`norm_factor` was applied when they were saved). A file
that a training left behind when it died, {"step", "ae", "norm_factor", …}, holds weights that are not, and says by how
much: its biases and its threshold are multiplied here.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from safesail.errors import InputError
from safesail.hook_names import in_id
from safesail.recipe import TokenPolicy
from safesail.repository import Repository
from safesail.sae.config import SaeConfig
from safesail.sae.formats.archive import tensors
from safesail.sae.formats.checks import weights
from safesail.sae.formats.foreign import (
    EVERY_TOKEN,
    Equations,
    Foreign,
    Format,
    configured,
    folded,
    folders,
    inside,
    source_dtype,
)
from safesail.sae.model import Sae

__all__ = ["FORMAT"]

CONFIG_FILE, WEIGHTS_FILE = "config.json", "ae.pt"
D, F = "d_in", "d_sae"
_LINEAR = {"encoder.weight": (F, D), "encoder.bias": (F,), "decoder.weight": (D, F)}
_TOPK = {**_LINEAR, "b_dec": (D,)}
_PLAIN = {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,)}


class _Kind(NamedTuple):
    """One of the dictionary classes."""

    architecture: str
    shapes: dict[str, tuple[str, ...]]
    subtracts: bool
    """Whether the decoder's bias is subtracted from x."""
    ignored: tuple[str, ...] = ()


_KINDS = {
    "AutoEncoder": _Kind("relu", {**_LINEAR, "bias": (D,)}, True),
    "AutoEncoderNew": _Kind("relu", {**_LINEAR, "decoder.bias": (D,)}, False),
    "GatedAutoEncoder": _Kind(
        "jumprelu",
        {
            "encoder.weight": (F, D),
            "decoder.weight": (D, F),
            "decoder_bias": (D,),
            **dict.fromkeys(("r_mag", "gate_bias", "mag_bias"), (F,)),
        },
        True,
    ),
    "JumpReluAutoEncoder": _Kind("jumprelu", {**_PLAIN, "threshold": (F,)}, False),
    "AutoEncoderTopK": _Kind("topk", _TOPK, True, ("k", "threshold")),
    "BatchTopKSAE": _Kind("batchtopk", {**_TOPK, "threshold": ()}, True, ("k",)),
    "MatryoshkaBatchTopKSAE": _Kind("matryoshka", {**_PLAIN, "threshold": ()}, True, ("k", "group_sizes")),
}
_NO_SPECIAL = TokenPolicy(exclude_special=True, sink_norm_multiple=None)


class _Canonical(NamedTuple):
    """The tensors under one set of names, before any folding."""

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    threshold: Tensor | None = None
    gate: tuple[Tensor, Tensor] | None = None
    """(exp(r), b_gate) of a gated one, whose b_enc is b_mag."""


def find(repository: Repository, names: list[str]) -> list[str]:
    """The folders that hold weights and a config."""
    return folders(names, WEIGHTS_FILE, CONFIG_FILE)


def read(repository: Repository, sae_id: str) -> Foreign:
    """The SAE of one trainer."""
    origin = f"{repository.source}/{inside(sae_id, CONFIG_FILE)}"
    trainer, buffer = _sections(repository.json(inside(sae_id, CONFIG_FILE)), origin)
    name, kind = _kind(trainer, buffer, origin)
    path = repository.file(inside(sae_id, WEIGHTS_FILE))
    state, notes = _state(tensors(path), str(path))
    k = _k(kind, state, trainer, origin)
    found = _canonical(weights(state, _shapes(kind, trainer, origin), str(path), kind.ignored), str(path))
    hook_point, unsure = _hook_point(trainer, sae_id)
    config = configured(
        origin,
        d_in=trainer["activation_dim"],
        d_sae=trainer["dict_size"],
        k=k,
        architecture=kind.architecture,
        hook_point=hook_point,
        model_name=str(trainer.get("lm_name") or ""),
        token_policy=_NO_SPECIAL if buffer.get("remove_bos") else EVERY_TOKEN,
        extra={"dict_class": name, **source_dtype(state[next(iter(kind.shapes))].dtype)},
    )
    equations = _theirs(kind, found, k)
    return Foreign(
        "dictionary_learning", sae_id, _ours(config, kind, found), *equations, notes=(*notes, *unsure, *_on(buffer))
    )


# --- config -----------------------------------------------------------------------------------------------------------


def _sections(config: Any, origin: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what the trainer was, where its activations came from)."""
    trainer = config.get("trainer") if isinstance(config, dict) else None
    buffer = (config.get("buffer") or {}) if isinstance(config, dict) else {}
    if not isinstance(trainer, dict) or not isinstance(buffer, dict):
        raise InputError(f"{origin} is not the config of a trainer of dictionary_learning: it lacks the key 'trainer'.")
    return trainer, buffer


def _kind(trainer: dict[str, Any], buffer: dict[str, Any], origin: str) -> tuple[str, _Kind]:
    name = str(trainer.get("dict_class"))
    if name not in _KINDS:
        raise InputError(f"{origin}: dictionary class {name!r} has no exact counterpart; read are {', '.join(_KINDS)}.")
    if buffer.get("io") == "in_and_out":
        raise InputError(f"{origin}: it writes another module's output than it reads, which has no exact counterpart.")
    return name, _KINDS[name]


def _shapes(kind: _Kind, trainer: dict[str, Any], origin: str) -> dict[str, tuple[int, ...]]:
    for key in ("activation_dim", "dict_size"):
        if type(trainer.get(key)) is not int or trainer[key] < 1:
            raise InputError(f"{origin}: {key} is {trainer.get(key)!r}, not a number of dimensions.")
    sizes = {D: trainer["activation_dim"], F: trainer["dict_size"]}
    return {key: tuple(sizes[letter] for letter in shape) for key, shape in kind.shapes.items()}


def _k(kind: _Kind, state: dict[str, Any], trainer: dict[str, Any], origin: str) -> int | None:
    """How many latents are active; InputError where config and weights differ."""
    if kind.architecture not in ("topk", "batchtopk", "matryoshka"):
        return None
    said, saved = trainer.get("k"), state.get("k")
    saved = int(saved) if isinstance(saved, Tensor) and saved.numel() == 1 else said
    if saved != (saved if said is None else said):
        raise InputError(f"{origin} says k = {said}, its weights k = {saved}; the two files do not belong together.")
    return saved


def _hook_point(trainer: dict[str, Any], sae_id: str) -> tuple[str, tuple[str, ...]]:
    """The output named by the config or, where it has no such name, by the folder."""
    if hook_point := in_id(str(trainer.get("submodule_name"))):
        return hook_point, ()
    if hook_point := in_id(sae_id):
        return hook_point, (f"The hook point {hook_point} is read from the folder's name.",)
    return "", ("Its files do not name the module that it reads.",)


def _on(buffer: dict[str, Any]) -> tuple[str, ...]:
    """What the training left out of the activations and the weights do not know."""
    notes = []
    if buffer.get("remove_bos"):
        notes.append("Its training left out the BOS token; special tokens are left out here.")
    if multiple := buffer.get("max_activation_norm_multiple"):
        notes.append(f"Its training left out tokens with a norm above {multiple} times the median; leave them out too.")
    return tuple(notes)


# --- weights ----------------------------------------------------------------------------------------------------------


def _state(content: dict[str, Any], origin: str) -> tuple[dict[str, Any], list[str]]:
    """The dictionary of tensors; of a file that an interrupted training left, on the scale of the activations."""
    if "ae" not in content:
        return content, []
    state, factor = content["ae"], content.get("norm_factor")
    if not isinstance(state, dict):
        raise InputError(f"{origin}: its entry 'ae' is not a dictionary of tensors.")
    factor = float(1.0 if factor is None else factor)
    if not 0 < factor < math.inf:
        raise InputError(f"{origin}: its norm_factor is {factor}, not the scale of activations.")
    scaled = {key: value * factor if _scales(key, value) else value for key, value in state.items()}
    return scaled, [f"An interrupted training left this file at step {content.get('step')}."]


def _scales(key: str, value: Any) -> bool:
    """Whether `norm_factor` multiplies it: biases, and thresholds that are set; matrices stay."""
    if not isinstance(value, Tensor):
        return False
    return key.endswith(("bias", "b_enc", "b_dec")) or (key == "threshold" and bool((value >= 0).all()))


def _canonical(state: dict[str, Tensor], origin: str) -> _Canonical:
    """The tensors of any class under one set of names."""
    W_enc = state["W_enc"] if "W_enc" in state else state["encoder.weight"].T
    W_dec = state["W_dec"] if "W_dec" in state else state["decoder.weight"].T
    b_enc = next(state[key] for key in ("b_enc", "encoder.bias", "mag_bias") if key in state)
    b_dec = next(state[key] for key in ("b_dec", "bias", "decoder.bias", "decoder_bias") if key in state)
    gate = (state["r_mag"].exp(), state["gate_bias"]) if "r_mag" in state else None
    threshold = state.get("threshold")
    if threshold is not None and threshold.ndim == 0:
        if threshold < 0:
            raise InputError(
                f"{origin}: its threshold was never set, so that it is not known which latents are active."
            )
        threshold = threshold.expand(len(b_enc)).contiguous()
    return _Canonical(W_enc, b_enc, W_dec, b_dec, threshold, gate)


# --- equations --------------------------------------------------------------------------------------------------------


def _ours(config: SaeConfig, kind: _Kind, found: _Canonical) -> Sae:
    """Folded: the gate into the encoder and a threshold, an absent subtraction into b_enc."""
    W_enc, threshold = found.W_enc, found.threshold
    if found.gate is not None:
        gain, b_gate = found.gate
        W_enc, threshold = W_enc * gain, found.b_enc - gain * b_gate
    subtracted = found.b_dec if kind.subtracts else 0.0
    return folded(config, W_enc, found.b_enc, found.W_dec, found.b_dec, threshold, subtracted=subtracted)


def _theirs(kind: _Kind, found: _Canonical, k: int | None) -> Equations:
    """The class's own equations."""

    def encode(x: Tensor) -> Tensor:
        h = (x - found.b_dec if kind.subtracts else x) @ found.W_enc
        if found.gate is not None:
            gain, b_gate = found.gate
            return (h + b_gate > 0) * (gain * h + found.b_enc).relu()
        a = (h + found.b_enc).relu()
        if kind.architecture == "topk":
            assert k is not None
            top = a.topk(k, dim=-1)
            return torch.zeros_like(a).scatter(-1, top.indices, top.values)
        return a if found.threshold is None else a * (a > found.threshold)

    def decode(x: Tensor, latents: Tensor) -> Tensor:
        return latents @ found.W_dec + found.b_dec

    return encode, decode


FORMAT = Format("dictionary_learning", find, read)
