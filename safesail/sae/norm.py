"""What some SAEs do to each token's activation before they read it, and undo after they have written it.

    layer_norm              (x - mean(x)) / (std(x) + 1e-5), std unbiased; undone by · std(x) + mean(x)
    constant_norm_rescale   x · √d_in / ‖x‖; undone by division

As in SAELens, whose words these are; OpenAI's TopK SAEs for GPT-2 are `layer_norm` ones (Gao et al. 2024).
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Norm", "norm_of"]

_EPSILON = 1e-5


class Norm(NamedTuple):
    """How one batch of tokens is normalised. All: (..., 1), or a number."""

    shift: Tensor | float
    divisor: Tensor | float
    scale: Tensor | float
    """What brings a normalised token back to its size; for layer_norm not quite the divisor, which has an epsilon."""

    def apply(self, x: Tensor) -> Tensor:
        """The normalised activations. x: (..., d_in)."""
        return x if self is _NONE else (x - self.shift) / self.divisor

    def undo(self, x: Tensor) -> Tensor:
        """Normalised activations at the tokens' own scale. x: (..., d_in)."""
        return x if self is _NONE else x * self.scale + self.shift


_NONE = Norm(0.0, 1.0, 1.0)


def norm_of(x: Tensor, kind: str) -> Norm:
    """The normalisation of these tokens. x: (..., d_in); kind: as `SaeConfig.normalize_activations`."""
    if kind == "layer_norm":
        std = x.std(dim=-1, keepdim=True)
        return Norm(x.mean(dim=-1, keepdim=True), std + _EPSILON, std)
    if kind == "constant_norm_rescale":
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True) / x.shape[-1] ** 0.5
        size = size.clamp(min=torch.finfo(x.dtype).tiny)  # a token of zeros stays one
        return Norm(0.0, size, size)
    assert kind == "none", kind
    return _NONE
