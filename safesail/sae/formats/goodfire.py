"""Goodfire: `<model>-SAE-l<n>.pt` or `.pth`, ReLU SAEs of the residual stream.

    f     = relu(x encoder_linear.weightᵀ + encoder_linear.bias)
    x_hat = f decoder_linear.weightᵀ + decoder_linear.bias

encoder_linear.weight: (d_sae, d_in), decoder_linear.weight: (d_in, d_sae). Labels are published elsewhere.
"""

import re

from torch import Tensor

from safesail.repository import Repository
from safesail.sae.formats.archive import tensors
from safesail.sae.formats.checks import weights
from safesail.sae.formats.foreign import Foreign, Format, configured, folded
from safesail.sae.formats.suites import Equations, affine, matrix_shape, stored_as

__all__ = ["FORMAT"]

_FILE = re.compile(r"(?:.*/)?([^/]+)-SAE-l(\d+)\.pth?")


def find(repository: Repository, names: list[str]) -> list[str]:
    """The files themselves."""
    return [name for name in names if _FILE.fullmatch(name)]


def read(repository: Repository, sae_id: str) -> Foreign:
    """The SAE in one file."""
    named = _FILE.fullmatch(sae_id)
    assert named is not None, sae_id
    path = repository.file(sae_id)
    found = tensors(path)
    d_sae, d_in = matrix_shape(found, "encoder_linear.weight", str(path))
    shapes = {
        "encoder_linear.weight": (d_sae, d_in),
        "encoder_linear.bias": (d_sae,),
        "decoder_linear.weight": (d_in, d_sae),
        "decoder_linear.bias": (d_in,),
    }
    theirs = weights(found, shapes, str(path))
    model = f"meta-llama/{named[1]}" if named[1].startswith("Llama-") else named[1]
    config = configured(
        str(path),
        d_in=d_in,
        d_sae=d_sae,
        architecture="relu",
        hook_point=f"layers.{named[2]}",
        model_name=model,
        extra=stored_as(found["encoder_linear.weight"]),
    )
    sae = folded(
        config,
        theirs["encoder_linear.weight"].T,
        theirs["encoder_linear.bias"],
        theirs["decoder_linear.weight"].T,
        theirs["decoder_linear.bias"],
        subtracted=0.0,
    )
    note = f"The model ({model}) and the hook point, the residual stream after block {named[2]}, are the file's name."
    return Foreign("Goodfire", sae_id, sae, *_theirs(theirs), notes=(note,))


def _theirs(found: dict[str, Tensor]) -> Equations:
    """Goodfire's own equations."""

    def encode(x: Tensor) -> Tensor:
        return (x @ found["encoder_linear.weight"].T + found["encoder_linear.bias"]).relu()

    return encode, affine(found["decoder_linear.weight"].T, found["decoder_linear.bias"])


FORMAT = Format("Goodfire", find, read)
