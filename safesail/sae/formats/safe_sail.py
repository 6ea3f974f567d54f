"""Safe-SAIL's released checkpoints: `ckpt_layer<n>.pt`, SAEs of the outputs of Qwen2.5-3B-Instruct's MLPs.

    h     = (x - pre_encoder_bias) encoder.weightᵀ + encoder.bias
    f     = relu of the k largest of h, or h·[h > encoder.theta] where there is a theta
    x_hat = f decoder.weightᵀ + post_decoder_bias

Every tensor has a leading axis of components, of which the first is read: encoder.weight (n, d_sae, d_in),
decoder.weight (n, d_in, d_sae). Safe-SAIL's own code reads the encoder alone; a checkpoint without decoder.weight
cannot reconstruct, and nothing tells what its decoder was, so that it is refused.
"""

import re
from typing import Any, NamedTuple

from torch import Tensor

from safesail.errors import InputError
from safesail.repository import Repository
from safesail.sae.formats.archive import tensors
from safesail.sae.formats.checks import weights
from safesail.sae.formats.foreign import Foreign, Format, configured, folded
from safesail.sae.formats.suites import Equations, affine, largest, matrix_shape, stored_as

__all__ = ["FORMAT"]

K = 200
_FILE = re.compile(r"(?:.*/)?ckpt_layer(\d+)")
_MODEL = "Qwen/Qwen2.5-3B-Instruct"
_PRE, _POST, _TIED, _THETA = (
    "pre_encoder_bias._bias_reference",
    "post_decoder_bias._bias_reference",
    "tied_bias",
    "encoder.theta",
)
_NAMES = ("encoder.weight", "encoder.bias", "decoder.weight", _PRE, _POST, _TIED, _THETA)


class _Parts(NamedTuple):
    """The first component, under our names, before any folding."""

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    before: Tensor
    """(d_in,): subtracted before the encoder."""
    after: Tensor
    """(d_in,): added after the decoder."""
    theta: Tensor | None


def find(repository: Repository, names: list[str]) -> list[str]:
    """The checkpoints, as `data/sae_checkpoints/ckpt_layer17`."""
    files = [name.removesuffix(".pt") for name in names if name.endswith(".pt")]
    return [name for name in files if _FILE.fullmatch(name)]


def read(repository: Repository, sae_id: str) -> Foreign:
    """The SAE of one layer."""
    layer = sae_id.rpartition("ckpt_layer")[2]
    path = repository.file(f"{sae_id}.pt")
    found, n_components = _first_components(tensors(path), str(path))
    parts = _parts(found, str(path))
    k = K if parts.theta is None else None
    d_in, d_sae = parts.W_enc.shape
    config = configured(
        str(path),
        d_in=d_in,
        d_sae=d_sae,
        k=k,
        architecture="topk" if parts.theta is None else "jumprelu",
        hook_point=f"layers.{layer}.mlp",
        model_name=_MODEL,
        extra=stored_as(found["encoder.weight"]),
    )
    sae = folded(config, parts.W_enc, parts.b_enc, parts.W_dec, parts.after, parts.theta, subtracted=parts.before)
    return Foreign("Safe-SAIL", sae_id, sae, *_theirs(parts, k), notes=_notes(found, layer, n_components))


def _first_components(content: dict[str, Any], origin: str) -> tuple[dict[str, Any], int]:
    """({name: tensor without its axis of components}, number of components)."""
    state = content.get("state_dict", content)
    if not isinstance(state, dict):
        raise InputError(f"{origin}: its state_dict is a {type(state).__name__}, not a dictionary of tensors.")
    known = {name: value for name, value in state.items() if isinstance(value, Tensor) and name in _NAMES}
    sizes = {len(value) if value.dim() else 0 for value in known.values()}
    if len(sizes) != 1 or 0 in sizes:
        raise InputError(f"{origin}: its tensors do not begin with one number of components, but {sorted(sizes)}.")
    return {**state, **{name: value[0] for name, value in known.items()}}, sizes.pop()


def _parts(found: dict[str, Any], origin: str) -> _Parts:
    if "decoder.weight" not in found:
        raise InputError(
            f"{origin} holds no decoder.weight: it cannot reconstruct, and what its decoder was is not known; "
            "ask for the checkpoint with its decoder."
        )
    d_sae, d_in = matrix_shape(found, "encoder.weight", origin)
    shapes = {"encoder.weight": (d_sae, d_in), "encoder.bias": (d_sae,), "decoder.weight": (d_in, d_sae), _PRE: (d_in,)}
    also = {_POST: (d_in,), _TIED: (d_in,), _THETA: (d_sae,)}
    theirs = weights(found, shapes | {name: shape for name, shape in also.items() if name in found}, origin)
    theta = theirs.get(_THETA)
    if theta is not None and bool((theta < 0).any()):
        raise InputError(f"{origin} has no exact counterpart: a negative theta lets negative latents through.")
    after = theirs.get(_POST, theirs.get(_TIED, theirs[_PRE]))
    return _Parts(
        theirs["encoder.weight"].T, theirs["encoder.bias"], theirs["decoder.weight"].T, theirs[_PRE], after, theta
    )


def _notes(found: dict[str, Any], layer: str, n_components: int) -> tuple[str, ...]:
    notes = [
        f"The model ({_MODEL}) is Safe-SAIL's; block {layer} is the file's name; that its MLP's output is read is "
        "in Safe-SAIL's code, which reads down_proj.",
        "The checkpoint has a theta and is read as a JumpReLU."
        if _THETA in found
        else f"k = {K} is what Safe-SAIL's server uses; the file does not hold it. Of latents that are equal at the "
        f"{K}th place Safe-SAIL keeps all.",
    ]
    if _POST not in found:
        source = _TIED if _TIED in found else "the bias before the encoder"
        notes.append(f"There is no bias after the decoder; {source} is taken for it, as the two are tied in training.")
    if n_components > 1:
        notes.append(f"The checkpoint holds {n_components} components; the first is read.")
    return tuple(notes)


def _theirs(parts: _Parts, k: int | None) -> Equations:
    """Safe-SAIL's own equations."""

    def encode(x: Tensor) -> Tensor:
        h = (x - parts.before) @ parts.W_enc + parts.b_enc
        if parts.theta is not None:
            return h * (h > parts.theta)
        assert k is not None
        return largest(h, k).relu()

    return encode, affine(parts.W_dec, parts.after)


FORMAT = Format("Safe-SAIL", find, read)
