"""Sparse arithmetic of a TopK SAE: no dense (n_tokens, d_sae) gradient is ever built.

With k active latents of d_sae, decoding gathers k rows of W_dec instead of multiplying by all of it, and both weight
gradients are sums over the k·n_tokens active entries, grouped by latent. `embedding_bag` is torch's kernel for both.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Codes", "decode", "encode_topk", "topk"]


class Codes(NamedTuple):
    """The active latents of each token. values, indices: (n_tokens, k); a value is 0 where fewer than k are active."""

    values: Tensor
    indices: Tensor

    def dense(self, d_sae: int) -> Tensor:
        """The latents as a full matrix, (n_tokens, d_sae)."""
        return self.values.new_zeros(len(self.values), d_sae).scatter_(1, self.indices, self.values)


def topk(pre: Tensor, k: int) -> Codes:
    """Safe-SAIL's TopK, then ReLU: the k largest pre-activations of each token, the negative ones set to zero.

    pre: (n_tokens, d_sae). Exactly k entries are kept; which of several entries equal to the k-th largest stay is
    torch.topk's choice (the reference code keeps all of them, so its L0 can exceed k).
    """
    values, indices = pre.topk(k, dim=-1, sorted=False)
    return Codes(values.relu_(), indices)


def decode(codes: Codes, W_dec: Tensor) -> Tensor:
    """Σ_j z_j W_dec[j] for each token, by gathering the active rows. W_dec: (d_sae, d_in) → (n_tokens, d_in)."""
    return F.embedding_bag(codes.indices, W_dec, per_sample_weights=codes.values, mode="sum")


def encode_topk(x: Tensor, encoder: Tensor, b_enc: Tensor, b_dec: Tensor, k: int, out: Tensor | None = None) -> Codes:
    """Differentiable z = TopKReLU_k((x - b_dec) encoderᵀ + b_enc). x: (n_tokens, d_in); encoder: (d_sae, d_in).

    Gradients reach the encoder, b_enc and b_dec through the active entries only; x gets none (it is data). `out` is an
    optional buffer for the pre-activations, (n_tokens, d_sae), overwritten by the call.
    """
    values, indices = _EncodeTopK.apply(x, encoder, b_enc, b_dec, k, out)  # type: ignore[misc]
    return Codes(values, indices)


class _EncodeTopK(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, encoder: Tensor, b_enc: Tensor, b_dec: Tensor, k: int, out: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        centred = x - b_dec
        codes = topk(torch.addmm(b_enc, centred, encoder.T, out=out), k)
        ctx.save_for_backward(centred, encoder, codes.values, codes.indices)
        ctx.mark_non_differentiable(codes.indices)
        return codes.values, codes.indices

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, Tensor, Tensor, None, None]:
        centred, encoder, values, indices = ctx.saved_tensors
        grad_values = gradients[0] * (values > 0)
        grad_b_enc = _sum_by_latent(indices, grad_values, len(encoder))
        grad_encoder = rows_by_latent(indices, grad_values, centred, len(encoder))
        grad_b_dec = -(grad_b_enc @ encoder)  # every active entry saw (x - b_dec)
        return None, grad_encoder, grad_b_enc, grad_b_dec, None, None


def rows_by_latent(indices: Tensor, weights: Tensor, rows: Tensor, d_sae: int) -> Tensor:
    """G[j] = Σ over entries (n, i) with indices[n, i] = j of weights[n, i] · rows[n]: (d_sae, d_in).

    This is the weight gradient of an embedding bag with incoming gradient `rows`, so torch computes it.
    """
    anchor = rows.new_zeros(d_sae, rows.shape[1]).requires_grad_()
    with torch.enable_grad():
        bag = F.embedding_bag(indices, anchor, per_sample_weights=weights.detach(), mode="sum")
    return torch.autograd.grad(bag, anchor, rows)[0]


def _sum_by_latent(indices: Tensor, weights: Tensor, d_sae: int) -> Tensor:
    return torch.bincount(indices.reshape(-1), weights=weights.reshape(-1).double(), minlength=d_sae).to(weights.dtype)
