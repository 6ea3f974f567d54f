"""Llama Scope, Llama Scope R1-Distill and what llamascopium saves: a folder per SAE, config and weights.

    h     = s_in x W_E + b_E                         s = √d_in / average norm of the activations, 1 or √d_in / ‖x‖
    f     = h where h·n is positive, above a threshold or among the k largest, else 0
    x_hat = (f W_D + b_D) / s_out

W_E: (d_in, d_sae), W_D: (d_sae, d_in); n = ‖W_D_j‖ where the config says `sparsity_include_decoder_norm`, else 1.

Llama Scope     hyperparams.json, checkpoints/final.safetensors, one `jump_relu_threshold` for all latents
later           config.json, sae_weights.safetensors or .pt, `log_jumprelu_threshold` per latent

The one threshold θ of Llama Scope is not on h's scale. Its authors put it in place after they folded s into the weights
(there h/s_in stands for h and W_D·s_in/s_out for W_D), so that a latent is active where h·n > θ·s_out. The released
files bear this out: θ / average output norm is 0.032 at block 8, 0.026 at block 24 and 0.031 in the transcoder of block
8, whose input and output have different norms; θ itself goes from 0.10 to 0.75. SAELens also multiplies θ by s, but
leaves n out. He et al. 2024.

Not read: transcoders, crosscoders and attention replacements, gated linear encoders, choices that span a batch.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from safesail.errors import InputError
from safesail.hook_names import from_transformer_lens
from safesail.repository import Repository
from safesail.sae.formats.archive import safetensors_of, tensors
from safesail.sae.formats.checks import weights
from safesail.sae.formats.foreign import Foreign, Format, configured, folded, inside
from safesail.sae.formats.suites import Equations, full_name, largest, matrix_shape, stored_as
from safesail.sae.model import Sae

__all__ = ["FORMAT"]

_FIRST_CONFIG, _FIRST_WEIGHTS = "hyperparams.json", "checkpoints/final.safetensors"
_CONFIG, _WEIGHTS = "config.json", ("sae_weights.safetensors", "sae_weights.pt", "sae_weights.dcp/.metadata")
_NORM, _LOG_THRESHOLD = "dataset_average_activation_norm", "log_jumprelu_threshold"
_NAMES = {
    "encoder.weight": "W_E",
    "encoder.bias": "b_E",
    "decoder.weight": "W_D",
    "decoder.bias": "b_D",
    f"activation_function.{_LOG_THRESHOLD}": _LOG_THRESHOLD,
}
_MODELS = {
    "Llama3_1-8B-Base": "meta-llama/Llama-3.1-8B",
    "Llama-Scope-R1-Distill": "deepseek-ai/DeepSeek-R1-Distill-Llama-8B",
}
_NOT_READ = {
    "batchtopk": "it chooses the largest of a whole batch, so that a token's latents depend on other tokens",
    "layertopk": "it chooses the largest over several layers",
    "batchlayertopk": "it chooses the largest over several layers and a whole batch",
}


class _Source(NamedTuple):
    """One SAE as it is stored."""

    W_E: Tensor
    b_E: Tensor
    W_D: Tensor
    b_D: Tensor
    architecture: str
    k: int | None
    limit: Tensor | None
    """(d_sae,): what h·n must exceed, for jumprelu."""
    by_decoder_norm: bool
    subtracts: bool
    """Whether b_D is subtracted from s_in x."""
    per_token: bool
    """Whether s is √d_in / ‖x‖ of each token."""
    s_in: float = 1.0
    s_out: float = 1.0

    @property
    def norms(self) -> Tensor:
        """n: (d_sae,)."""
        return self.W_D.norm(dim=1) if self.by_decoder_norm else torch.ones(len(self.W_D))


# --- finding ----------------------------------------------------------------------------------------------------------


def find(repository: Repository, names: list[str]) -> list[str]:
    """The folders that hold a config and weights."""
    there = set(names)
    first = [folder for folder in _folders(names, _FIRST_CONFIG) if inside(folder, _FIRST_WEIGHTS) in there]
    later = [
        folder
        for folder in _folders(names, _CONFIG)
        if any(inside(folder, weights_file) in there for weights_file in _WEIGHTS)
    ]
    # other formats have these file names too; one config tells, for one tool writes all of a repository
    return first + (later if later and _is_theirs(repository.json(inside(later[0], _CONFIG))) else [])


def _folders(names: list[str], file: str) -> list[str]:
    return [name.removesuffix(file).removesuffix("/") or "." for name in names if f"/{name}".endswith(f"/{file}")]


def _is_theirs(config: Any) -> bool:
    return isinstance(config, dict) and "act_fn" in config and ("hook_point_in" in config or "sae_type" in config)


def read(repository: Repository, sae_id: str) -> Foreign:
    """The SAE in one folder."""
    names = set(repository.names())
    is_first = inside(sae_id, _FIRST_CONFIG) in names
    config_file = inside(sae_id, _FIRST_CONFIG if is_first else _CONFIG)
    origin = f"{repository.source}/{config_file}"
    config = repository.json(config_file)
    if not isinstance(config, dict):
        raise InputError(f"{origin} is not the config of an SAE: it is not a JSON object.")
    _check(config, origin)
    files = [_FIRST_WEIGHTS] if is_first else [file for file in _WEIGHTS if inside(sae_id, file) in names]
    found = _tensors(repository, inside(sae_id, files[0]))
    source = _source(config, found, is_first, origin)
    model, notes = _model(repository, sae_id, names)
    sae = _ours(source, origin, config["hook_point_in"], model, stored_as(found["W_E"]))
    scale = source.norms if source.architecture == "topk" and source.by_decoder_norm else 1.0
    notes = (*notes, *_notes(config, source, is_first))
    return Foreign("Llama Scope", sae_id, sae, *_theirs(source), latent_scale=scale, notes=notes)


# --- config -----------------------------------------------------------------------------------------------------------


def _check(config: dict[str, Any], origin: str) -> None:
    """InputError for what has no exact counterpart."""
    for key, reason in _reasons(config):
        raise InputError(f"{origin}: {key} {config.get(key)!r} has no exact counterpart: {reason}.")
    if not isinstance(config.get("hook_point_in"), str):
        raise InputError(f"{origin} does not say where it reads (hook_point_in).")
    if _activation(config) == "topk" and type(config.get("top_k")) is not int:
        raise InputError(f"{origin}: top_k is {config.get('top_k')!r}, not a count.")


def _reasons(config: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The keys whose values cannot be read, and why."""
    activation, hook_point = _activation(config), config.get("hook_point_in")
    if config.get("sae_type", "sae") != "sae":
        yield "sae_type", "it is no SAE of one place"
    if config.get("use_glu_encoder"):
        yield "use_glu_encoder", "its encoder is gated"
    if config.get("hook_point_out", hook_point) != hook_point:
        yield "hook_point_out", f"it writes another place than it reads ({hook_point})"
    if activation not in ("relu", "jumprelu", "topk"):
        yield "act_fn", _NOT_READ.get(activation, "it is unknown here")
    if config.get("norm_activation") not in ("dataset-wise", "token-wise", "inference"):
        yield "norm_activation", "only dataset-wise, token-wise and inference leave a token's latents to the token"


def _activation(config: dict[str, Any]) -> str:
    return str(config.get("act_fn")).lower()


def _model(repository: Repository, sae_id: str, names: set[str]) -> tuple[str, tuple[str, ...]]:
    """The model's name and how it is known."""
    file = inside(sae_id, "lm_config.json")
    config = repository.json(file) if file in names else None
    if isinstance(config, dict) and isinstance(config.get("model_name"), str):
        return config["model_name"], ()
    for part, model in _MODELS.items():
        if part in full_name(repository, sae_id):
            return model, (f"The model ({model}) is taken from the name {part}.",)
    return "", ("Its files name no model.",)


# --- tensors ----------------------------------------------------------------------------------------------------------


def _tensors(repository: Repository, file: str) -> dict[str, Any]:
    """The tensors under one set of names, W_E and W_D as (d_in, d_sae) and (d_sae, d_in)."""
    if file.endswith(".metadata"):
        raise InputError(
            f"{repository.source}/{file} is a distributed checkpoint, whose reader runs pickles; "
            "save it as sae_weights.safetensors."
        )
    path = repository.file(file)
    found = safetensors_of(path) if path.suffix == ".safetensors" else tensors(path)
    state = found.get("sae", found) if path.suffix == ".pt" else found
    if not isinstance(state, dict):
        raise InputError(f"{path}: what it calls sae is a {type(state).__name__}, not a dictionary of tensors.")
    for name in ("encoder.weight", "decoder.weight"):
        if isinstance(matrix := state.get(name), Tensor) and matrix.dim() == 2:
            state = {**state, name: matrix.T}
    return {_NAMES.get(name, name): value for name, value in state.items()}


def _source(config: dict[str, Any], found: dict[str, Any], is_first: bool, origin: str) -> _Source:
    d_in, d_sae = matrix_shape(found, "W_E", origin)
    activation, uses_bias = _activation(config), config.get("use_decoder_bias", True)
    learnt = activation == "jumprelu" and not is_first
    shapes = {"W_E": (d_in, d_sae), "b_E": (d_sae,), "W_D": (d_sae, d_in)}
    shapes |= ({"b_D": (d_in,)} if uses_bias else {}) | ({_LOG_THRESHOLD: (d_sae,)} if learnt else {})
    norms = {name: value for name, value in found.items() if name.startswith(f"{_NORM}.")}
    theirs = weights(found, shapes, origin, ignored=(*norms, *(() if learnt else (_LOG_THRESHOLD,))))
    s_in, s_out = _scales(config, norms, d_in, origin)
    limit = theirs[_LOG_THRESHOLD].exp() if learnt else None
    by_decoder_norm = bool(config.get("sparsity_include_decoder_norm", True))
    if activation == "jumprelu" and is_first:
        scale = s_out if by_decoder_norm else s_in
        limit = torch.full((d_sae,), _number(config, "jump_relu_threshold", origin) * scale)
    return _Source(
        *(theirs["W_E"], theirs["b_E"], theirs["W_D"], theirs.get("b_D", torch.zeros(d_in))),
        architecture=activation,
        k=config["top_k"] if activation == "topk" else None,
        limit=limit,
        by_decoder_norm=by_decoder_norm,
        subtracts=bool(uses_bias and config.get("apply_decoder_bias_to_pre_encoder", False)),
        per_token=config["norm_activation"] == "token-wise",
        s_in=s_in,
        s_out=s_out,
    )


def _scales(config: dict[str, Any], norms: dict[str, Any], d_in: int, origin: str) -> tuple[float, float]:
    """(s_in, s_out) of a normalisation by the whole data set's norm, which the config or the weights hold."""
    if config["norm_activation"] != "dataset-wise":
        return 1.0, 1.0
    stored = config.get(_NORM) if isinstance(config.get(_NORM), dict) else {}
    stored = {name.removeprefix(f"{_NORM}."): float(value) for name, value in norms.items()} | dict(stored or {})
    hook_point = config["hook_point_in"]
    average = {side: stored.get(side, stored.get(hook_point)) for side in ("in", "out")}
    for side, value in average.items():
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise InputError(
                f"{origin}: activations are divided by the data set's average norm ({side}), which is {value!r}."
            )
    return math.sqrt(d_in) / float(average["in"] or 0), math.sqrt(d_in) / float(average["out"] or 0)


def _number(config: dict[str, Any], key: str, origin: str) -> float:
    value = config.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
        raise InputError(f"{origin}: {key} is {value!r}, not a number.")
    return float(value)


def _notes(config: dict[str, Any], source: _Source, is_first: bool) -> tuple[str, ...]:
    notes = []
    if "sparsity_include_decoder_norm" not in config:
        notes.append("That decoder norms take part in the choice of latents is not in the config.")
    if is_first and source.limit is not None:
        notes.append(
            "The threshold is taken to be on the scale of the activations: latents are active where what they write is "
            "longer than it. The files do not say so; their authors' code and the released values do."
        )
    elif source.limit is not None and config["norm_activation"] == "dataset-wise":
        notes.append("The thresholds are taken to be on the scale of normalised activations, where they were learnt.")
    return tuple(notes)


# --- equations --------------------------------------------------------------------------------------------------------


def _ours(source: _Source, origin: str, hook_name: str, model: str, extra: dict[str, str]) -> Sae:
    """Folded: s into the matrices, n into the thresholds; for a topk n moves from the decoder to the encoder."""
    norms = source.norms
    live = norms > 0  # a latent whose decoder is zero is never active
    W_enc, b_enc = source.W_E * source.s_in * live, source.b_E * live
    W_dec, b_dec, safe = source.W_D / source.s_out, source.b_D / source.s_out, norms.where(live, torch.ones(()))
    threshold = None if source.limit is None else source.limit / safe
    if source.architecture == "topk":
        W_enc, b_enc, W_dec = W_enc * safe, b_enc * safe, W_dec / safe[:, None]
    config = configured(
        origin,
        d_in=W_enc.shape[0],
        d_sae=W_enc.shape[1],
        k=source.k,
        architecture=source.architecture,
        hook_point=from_transformer_lens(hook_name, model) or hook_name,
        model_name=model,
        normalize_activations="constant_norm_rescale" if source.per_token else "none",
        extra=extra,
    )
    subtracted = source.b_D / source.s_in if source.subtracts else 0.0
    return folded(config, W_enc, b_enc, W_dec, b_dec, threshold, subtracted=subtracted)


def _theirs(source: _Source) -> Equations:
    """llamascopium's own equations."""

    def scales(x: Tensor) -> tuple[Tensor | float, Tensor | float]:
        size = math.sqrt(x.shape[-1]) / x.norm(dim=-1, keepdim=True)
        return (size, size) if source.per_token else (source.s_in, source.s_out)

    def encode(x: Tensor) -> Tensor:
        h = (x * scales(x)[0] - (source.b_D if source.subtracts else 0.0)) @ source.W_E + source.b_E
        scores = h * source.norms
        if source.k is not None:
            return h * (largest(scores, source.k) > 0)
        return h * (scores > (0.0 if source.limit is None else source.limit))

    def decode(x: Tensor, latents: Tensor) -> Tensor:
        return (latents @ source.W_D + source.b_D) / scales(x)[1]

    return encode, decode


FORMAT = Format("Llama Scope", find, read)
