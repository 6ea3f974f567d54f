"""Qwen-Scope: `layer<n>.sae.pt`, TopK SAEs of the residual stream, without a config.

    h     = x W_encᵀ + b_enc
    f     = the k largest of h, negative ones set to zero
    x_hat = f W_decᵀ + b_dec

W_enc: (d_sae, d_in), W_dec: (d_in, d_sae). The repository's name tells model, width and k:
`SAE-Res-<model>-W<n>K-L0_<k>` has n·1024 latents.
"""

import re

from torch import Tensor

from safesail.errors import InputError
from safesail.repository import Repository
from safesail.sae.formats.archive import tensors
from safesail.sae.formats.checks import weights
from safesail.sae.formats.foreign import Foreign, Format, configured, folded
from safesail.sae.formats.suites import Equations, affine, full_name, largest, matrix_shape, stored_as

__all__ = ["FORMAT"]

_SUFFIX = ".sae.pt"
_FILE = re.compile(r"(.*/)?layer\d+")


def find(repository: Repository, names: list[str]) -> list[str]:
    """The files of the layers, as `layer7`."""
    files = [name.removesuffix(_SUFFIX) for name in names if name.endswith(_SUFFIX)]
    return [name for name in files if _FILE.fullmatch(name)]


def read(repository: Repository, sae_id: str) -> Foreign:
    """The SAE of one layer."""
    model, d_sae, k = _suite(full_name(repository, sae_id), repository.source)
    path = repository.file(sae_id + _SUFFIX)
    found = tensors(path)
    n_rows, d_in = matrix_shape(found, "W_enc", str(path))
    if n_rows != d_sae:
        raise InputError(f"{path}: W_enc has {n_rows} latents, but the repository's name says {d_sae}.")
    shapes = {"W_enc": (d_sae, d_in), "W_dec": (d_in, d_sae), "b_enc": (d_sae,), "b_dec": (d_in,)}
    theirs = weights(found, shapes, str(path))
    config = configured(
        str(path),
        d_in=d_in,
        d_sae=d_sae,
        k=k,
        hook_point=f"layers.{sae_id.rpartition('layer')[2]}",
        model_name=model,
        extra=stored_as(found["W_enc"]),
    )
    sae = folded(config, theirs["W_enc"].T, theirs["b_enc"], theirs["W_dec"].T, theirs["b_dec"], subtracted=0.0)
    notes = (
        f"Model ({model}), width and k = {k} are taken from the repository's name.",
        "That the residual stream after the block is read, and that negative latents are zero, is not in the files.",
    )
    return Foreign("Qwen-Scope", sae_id, sae, *_theirs(theirs, k), notes=notes)


def _suite(name: str, source: str) -> tuple[str, int, int]:
    """(model, d_sae, k) from the repository's or folder's name."""
    suites = re.findall(r"SAE-Res-([\w.-]+?)-W(\d+)K-L0_(\d+)", name)
    if not suites:
        raise InputError(
            f"{source}: model, width and k of Qwen-Scope's SAEs are only in the repository's name; "
            "call the folder as the repository, for example SAE-Res-Qwen3-1.7B-Base-W32K-L0_50."
        )
    model, width, k = suites[-1]
    return f"Qwen/{model}", int(width) * 1024, int(k)


def _theirs(found: dict[str, Tensor], k: int) -> Equations:
    """Qwen-Scope's own equations."""

    def encode(x: Tensor) -> Tensor:
        return largest(x @ found["W_enc"].T + found["b_enc"], k).relu()

    return encode, affine(found["W_dec"].T, found["b_dec"])


FORMAT = Format("Qwen-Scope", find, read)
