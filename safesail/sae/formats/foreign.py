"""An SAE of another tool, as it is there and as ours, and the certificate that the two are the same.

Every format is read into our equations by folding: an input that is scaled, a bias that is not subtracted, a scalar
threshold become other weights of the same function. What cannot be folded exactly is refused with the reason.
"""

from collections.abc import Callable
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import torch
from pydantic import ValidationError
from torch import Tensor

from safesail.errors import InputError
from safesail.recipe import TokenPolicy
from safesail.repository import Repository
from safesail.sae.config import SaeConfig
from safesail.sae.model import Sae

__all__ = [
    "EVERY_TOKEN",
    "Certificate",
    "Equations",
    "Foreign",
    "Format",
    "certificate",
    "configured",
    "folded",
    "folders",
    "inside",
    "source_dtype",
]

Equations = tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]
"""`encode` and `decode` of a `Foreign`."""
EVERY_TOKEN = TokenPolicy(exclude_special=False, sink_norm_multiple=None)
"""The policy of an SAE whose files name no tokens that it leaves out."""

N_VECTORS = 256
"""Vectors that a certificate is made on."""


class Foreign(NamedTuple):
    """An SAE of another tool."""

    format: str
    sae_id: str
    """What it is called in its repository."""
    sae: Sae
    """The same function in our equations."""
    encode: Callable[[Tensor], Tensor]
    """(n, d_in) → (n, d_sae): the latents by the format's own equations from its own tensors, written out plainly."""
    decode: Callable[[Tensor, Tensor], Tensor]
    """(x, latents) → (n, d_in): the reconstruction by the format's own equations."""
    latent_scale: Tensor | float = 1.0
    """(d_sae,): ours divided by theirs, where the decoder's norms had to be moved; 1 where latents are equal."""
    notes: tuple[str, ...] = ()
    """What its files do not say and was taken from the format's habits, in sentences."""


class Format(NamedTuple):
    """A format: which SAEs a repository holds, and how one is read."""

    name: str
    find: Callable[[Repository, list[str]], list[str]]
    """(repository, names of its files) → ids of the SAEs in this format; none if it is another format.

    It may read small files (a config), never weights.
    """
    read: Callable[[Repository, str], Foreign]
    """InputError says what of this SAE has no exact counterpart here."""


class Certificate(NamedTuple):
    """How far our reading of an SAE is from the format's own equations, on fixed random vectors."""

    format: str
    sae_id: str
    n_vectors: int
    max_latent_error: float
    """The largest difference of a latent, divided by the largest latent."""
    max_reconstruction_error: float
    """The largest difference of a component of x_hat, divided by the largest component."""
    n_latents_apart: int
    """Latents that are active on one side only, over all vectors."""
    l0: float
    """Active latents per vector, ours."""
    l0_theirs: float
    notes: tuple[str, ...]

    @property
    def exact(self) -> bool:
        """Whether the two are one function up to the rounding of fp32."""
        return self.max_latent_error < 1e-4 and self.max_reconstruction_error < 1e-4


def certificate(foreign: Foreign, x: Tensor | None = None) -> Certificate:
    """Compare an SAE with the format's own equations. x: (n, d_in), by default fixed random vectors."""
    x = vectors(foreign.sae) if x is None else x
    ours, theirs = foreign.sae.encode(x), foreign.encode(x)
    expected = theirs * foreign.latent_scale
    back, their_back = foreign.sae.decode(ours, like=x), foreign.decode(x, theirs)
    return Certificate(
        foreign.format,
        foreign.sae_id,
        len(x),
        _error(ours, expected),
        _error(back, their_back),
        int(((ours != 0) != (expected != 0)).sum()),
        float((ours != 0).sum(1).float().mean()),
        float((theirs != 0).sum(1).float().mean()),
        foreign.notes,
    )


def configured(origin: str, **fields: Any) -> SaeConfig:
    """The config with these fields; InputError naming `origin` where they cannot be one."""
    try:
        return SaeConfig.model_validate({"token_policy": EVERY_TOKEN, **fields})
    except ValidationError as error:
        raise InputError(f"{origin}: {'; '.join(problem['msg'] for problem in error.errors())}.") from error


def folded(
    config: SaeConfig,
    W_enc: Tensor,
    b_enc: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    threshold: Tensor | None = None,
    *,
    subtracted: Tensor | float,
) -> Sae:
    """The SAE that computes a = (x - subtracted) W_enc + b_enc and x_hat = z W_dec + b_dec, in our equations.

    subtracted: (d_in,), or 0 where the format subtracts nothing. Ours subtract b_dec, so that the difference goes into
    the bias: b_enc' = b_enc + (b_dec - subtracted) W_enc, computed in fp64.
    """
    difference = (b_dec - subtracted).double()
    b_enc = (b_enc.double() + difference @ W_enc.double()).float() if bool(difference.any()) else b_enc
    return Sae(config, W_enc.contiguous(), b_enc.contiguous(), W_dec.contiguous(), b_dec.contiguous(), threshold)


def source_dtype(dtype: torch.dtype) -> dict[str, str]:
    """What `extra` says of weights that were not stored in fp32, in which they are read."""
    return {} if dtype == torch.float32 else {"source_dtype": str(dtype).removeprefix("torch.")}


def folders(names: list[str], *wanted: str) -> list[str]:
    """The folders that hold a file of each of the wanted names; the repository itself is `.`."""
    there = set(names)
    paths = [PurePosixPath(name) for name in names]
    found = [str(path.parent) for path in paths if path.name == wanted[0]]
    return [folder for folder in found if all(inside(folder, name) in there for name in wanted)]


def inside(sae_id: str, name: str) -> str:
    """The name in the repository of a file of the SAE `sae_id`; the repository itself is called `.`."""
    return name if sae_id == "." else f"{sae_id}/{name}"


def vectors(sae: Sae, n: int = N_VECTORS) -> Tensor:
    """Fixed vectors of the SAE's width: around its decoder bias, in directions of its decoder and of noise."""
    generator = torch.Generator().manual_seed(0)
    d_sae, d_in = sae.W_dec.shape
    chosen = torch.randint(d_sae, (n, 8), generator=generator)
    size = sae.W_dec.norm(dim=1).mean()
    strengths = torch.rand(n, 8, generator=generator)[:, :, None] * 4
    noise = torch.randn(n, d_in, generator=generator) * size / d_in**0.5
    return sae.b_dec + (sae.W_dec[chosen] * strengths).sum(1) + noise


def _error(ours: Tensor, theirs: Tensor) -> float:
    largest = float(theirs.abs().max())
    return float((ours - theirs).abs().max()) / (largest or 1.0)
