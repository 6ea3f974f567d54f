"""An SAE of another tool, as it is there and as ours, and the certificate that the two are the same.

Every format is read into our equations by folding: an input that is scaled, a bias that is not subtracted, a scalar
threshold become other weights of the same function. What cannot be folded exactly is refused with the reason.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from safesail.repository import Repository
from safesail.sae.model import Sae

__all__ = ["Certificate", "Foreign", "Format", "certificate"]

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
