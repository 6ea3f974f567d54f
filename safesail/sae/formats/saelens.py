"""SAELens: a folder per SAE with `cfg.json` and `sae_weights.safetensors`, versions 3 to 6.

    h     = (norm(x) - b_dec·[apply_b_dec_to_input]) W_enc + b_enc
    f     = relu(h) | topk(relu(h)) | relu(h)·[h > threshold]
    x_hat = norm⁻¹(f W_dec + b_dec)

gated: f = [h_gate > 0]·relu(h_mag) with h_gate = x W_enc + b_gate, h_mag = x W_enc·exp(r_mag) + b_mag, which is a
JumpReLU with threshold b_mag - exp(r_mag)·b_gate. A topk with `rescale_acts_by_decoder_norm` chooses by h·‖W_dec‖ and
divides by ‖W_dec‖ again when it decodes. Batch-wise and nested top-k are saved as jumprelu. Before 6.0 the config was
flat.

Not read: transcoders and all that reconstruct something else than their input, `hook_z` reshaping, whitening or input
scales that were not folded into the weights, `abstopk`, `temporal`, `matching_pursuit`.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from safesail.errors import InputError
from safesail.repository import Repository
from safesail.sae.config import SaeConfig
from safesail.sae.formats.archive import entries, safetensors_of
from safesail.sae.formats.checks import check_shapes, weights
from safesail.sae.formats.foreign import Equations, Foreign, Format, folded, folders, inside
from safesail.sae.model import Sae
from safesail.sae.norm import norm_of

__all__ = ["FORMAT"]

CONFIG_FILE, WEIGHTS_FILE, SCALER_FILE = "cfg.json", "sae_weights.safetensors", "activation_scaler.json"
_GATED = ("b_gate", "b_mag", "r_mag")
_NOT_READ = {
    "transcoder": "it writes another module's output than it reads",
    "skip_transcoder": "it writes another module's output than it reads",
    "jumprelu_transcoder": "it writes another module's output than it reads",
    "jumprelu_skip_transcoder": "it writes another module's output than it reads",
    "abstopk": "its latents may be negative",
    "temporal": "its latents depend on other tokens",
    "matching_pursuit": "its latents are found one after the other",
}
_RENAMED = {
    "hook_point": "hook_name",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
_OF_THE_SAE = ("architecture", "d_in", "d_sae", "dtype", "apply_b_dec_to_input", "normalize_activations", "k")


class _Source(NamedTuple):
    """What is in the folder of one SAE."""

    cfg: dict[str, Any]
    """In the shape of version 6."""
    tensors: dict[str, Tensor]

    @property
    def architecture(self) -> str:
        return self.cfg["architecture"]

    @property
    def norms(self) -> Tensor | None:
        """(d_sae,): what a topk that goes by decoder norms multiplies its pre-activations with."""
        rescales = self.architecture == "topk" and self.cfg.get("rescale_acts_by_decoder_norm")
        return self.tensors["W_dec"].norm(dim=1) if rescales else None

    @property
    def subtracted(self) -> Tensor | float:
        return self.tensors["b_dec"] if self.cfg["apply_b_dec_to_input"] else 0.0


def find(repository: Repository, names: list[str]) -> list[str]:
    """The folders that hold a config and weights."""
    return folders(names, WEIGHTS_FILE, CONFIG_FILE)


def read(repository: Repository, sae_id: str) -> Foreign:
    """The SAE in one folder."""
    origin = f"{repository.source}/{inside(sae_id, CONFIG_FILE)}"
    cfg, notes = _as_version_6(repository.json(inside(sae_id, CONFIG_FILE)), origin)
    notes += _refuse_or_note(cfg, origin, repository, sae_id)
    source = _Source(cfg, _tensors(repository, sae_id, cfg, origin))
    return Foreign("SAELens", sae_id, _ours(source, origin), *_theirs(source), notes=tuple(notes))


# --- config -----------------------------------------------------------------------------------------------------------


def _as_version_6(cfg: Any, origin: str) -> tuple[dict[str, Any], list[str]]:
    """The config with its defaults written out and the LLM's facts under `metadata`, and what had to be assumed."""
    if not isinstance(cfg, dict) or not isinstance(cfg.get("metadata", {}), dict):
        raise InputError(f"{origin} is not the config of an SAE: it or its metadata is not a JSON object.")
    notes: list[str] = []
    if "metadata" not in cfg:
        cfg, notes = _from_flat({_RENAMED.get(str(key), str(key)): value for key, value in cfg.items()})
    metadata = cfg["metadata"]
    dtype = str(cfg.get("dtype") or "float32").removeprefix("torch.")
    metadata = metadata if dtype == "float32" else {**metadata, "source_dtype": dtype}
    defaults = {"architecture": "standard", "apply_b_dec_to_input": True, "reshape_activations": "none"}
    return {**defaults, **cfg, "dtype": "float32", "metadata": metadata}, notes


def _from_flat(cfg: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A config from before 6.0: everything in one object, with other words for some of it."""
    new = {key: cfg[key] for key in (*_OF_THE_SAE, "reshape_activations") if key in cfg}
    arguments = cfg.get("activation_fn_kwargs")
    if cfg.get("activation_fn") == "topk":
        new |= {"architecture": "topk", "k": arguments.get("k") if isinstance(arguments, dict) else cfg.get("k")}
    elif cfg.get("activation_fn", "relu") != "relu":
        new["architecture"] = f"{new.get('architecture', 'standard')} with {cfg['activation_fn']}"
    if "hook_z" in str(cfg.get("hook_name")):
        new.setdefault("reshape_activations", "hook_z")
    if new.get("normalize_activations") in (True, False, None):
        new["normalize_activations"] = "expected_average_only_in" if new.get("normalize_activations") else "none"
    new["metadata"] = {key: value for key, value in cfg.items() if key not in new}
    if "prepend_bos" in cfg:
        return new, []
    new["metadata"]["prepend_bos"] = True
    return new, ["The config does not say whether a BOS token was prepended; configs of its age mean that it was."]


def _refuse_or_note(cfg: dict[str, Any], origin: str, repository: Repository, sae_id: str) -> list[str]:
    """InputError for what has no exact counterpart; sentences on what was taken for granted."""
    architecture, norm = cfg["architecture"], cfg.get("normalize_activations")
    if architecture not in ("standard", "topk", "jumprelu", "gated"):
        reason = _NOT_READ.get(str(architecture), "it is unknown here")
        raise InputError(f"{origin}: architecture {architecture!r} has no exact counterpart: {reason}.")
    if cfg["reshape_activations"] != "none":
        raise InputError(f"{origin}: it reads the heads of an attention ({cfg['reshape_activations']}), not a module.")
    if norm == "covariance_whitening":
        raise InputError(f"{origin}: its whitening is not folded into the weights; export it from SAELens once more.")
    if norm != "expected_average_only_in":
        return []
    if inside(sae_id, SCALER_FILE) in repository.names():
        raise InputError(
            f"{origin}: its input scale ({SCALER_FILE}) is not folded into the weights of this checkpoint."
        )
    return ["Its activations were scaled in training; the scale is taken to be in the weights, as SAELens takes it."]


# --- weights ----------------------------------------------------------------------------------------------------------


def _tensors(repository: Repository, sae_id: str, cfg: dict[str, Any], origin: str) -> dict[str, Tensor]:
    """The tensors of the architecture in fp32; shapes are checked before they are read."""
    d_in, d_sae = _width(cfg, "d_in", origin), _width(cfg, "d_sae", origin)
    own = {"gated": _GATED, "jumprelu": ("b_enc", "threshold")}.get(cfg["architecture"], ("b_enc",))
    shapes = {"W_enc": (d_in, d_sae), "W_dec": (d_sae, d_in), "b_dec": (d_in,)} | dict.fromkeys(own, (d_sae,))
    path = repository.file(inside(sae_id, WEIGHTS_FILE))
    header = entries(path)
    check_shapes({name: entry for name, entry in header.items() if name != "scaling_factor"}, shapes, str(path))
    if "scaling_factor" in header and not _all_ones(safetensors_of(path, {"scaling_factor"}.__contains__)):
        raise InputError(f"{path}: its latents are scaled by a scaling_factor that is not 1, which SAELens dropped.")
    return weights(safetensors_of(path, shapes.__contains__), shapes, str(path))


def _all_ones(tensors: dict[str, Tensor]) -> bool:
    return all(bool((tensor.float() - 1).abs().max() < 1e-5) for tensor in tensors.values() if tensor.numel())


def _width(cfg: dict[str, Any], key: str, origin: str) -> int:
    if type(cfg.get(key)) is not int or cfg[key] < 1:
        raise InputError(f"{origin}: {key} is {cfg.get(key)!r}, not a number of dimensions.")
    return cfg[key]


# --- equations --------------------------------------------------------------------------------------------------------


def _ours(source: _Source, origin: str) -> Sae:
    """Folded: the gate and the decoder's norms into the encoder, an absent subtraction into b_enc."""
    tensors = source.tensors
    W_enc, W_dec, threshold = tensors["W_enc"], tensors["W_dec"], tensors.get("threshold")
    if source.architecture == "gated":
        gain, b_enc = tensors["r_mag"].exp(), tensors["b_mag"]
        W_enc, threshold = W_enc * gain, b_enc - gain * tensors["b_gate"]
    else:
        b_enc = tensors["b_enc"]
    if source.norms is not None:
        W_enc, b_enc = W_enc * source.norms, b_enc * source.norms
        W_dec = W_dec / source.norms.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    config = SaeConfig.from_json(_plain(source.cfg), origin)
    return folded(config, W_enc, b_enc, W_dec, tensors["b_dec"], threshold, subtracted=source.subtracted)


def _plain(cfg: dict[str, Any]) -> dict[str, Any]:
    """The config after folding."""
    plain = {**cfg, "apply_b_dec_to_input": True, "rescale_acts_by_decoder_norm": False}
    if cfg["architecture"] == "gated":
        plain["architecture"] = "jumprelu"
    if cfg.get("normalize_activations") == "expected_average_only_in":
        plain["normalize_activations"] = "none"
    return plain


def _theirs(source: _Source) -> Equations:
    """SAELens' own equations."""
    tensors = source.tensors
    norm = source.cfg.get("normalize_activations")
    norm = norm if norm in ("layer_norm", "constant_norm_rescale") else "none"

    def encode(x: Tensor) -> Tensor:
        read = norm_of(x, norm).apply(x) - source.subtracted
        if source.architecture == "gated":
            gate = read @ tensors["W_enc"] + tensors["b_gate"] > 0
            return gate * (read @ (tensors["W_enc"] * tensors["r_mag"].exp()) + tensors["b_mag"]).relu()
        h = read @ tensors["W_enc"] + tensors["b_enc"]
        if source.architecture == "topk":
            top = (h if source.norms is None else h * source.norms).topk(source.cfg["k"], dim=-1)
            return torch.zeros_like(h).scatter(-1, top.indices, top.values.relu())
        return h.relu() * (h > tensors["threshold"]) if source.architecture == "jumprelu" else h.relu()

    def decode(x: Tensor, latents: Tensor) -> Tensor:
        latents = latents if source.norms is None else latents * (1 / source.norms)
        return norm_of(x, norm).undo(latents @ tensors["W_dec"] + tensors["b_dec"])

    return encode, decode


FORMAT = Format("SAELens", find, read)
