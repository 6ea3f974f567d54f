"""Sparse arithmetic of an SAE: no dense (n_tokens, d_sae) latent or gradient is ever built.

With few active latents per token, decoding gathers rows of W_dec instead of multiplying by all of it, and both weight
gradients are sums over the active entries of each latent: the entries are sorted by latent once, and then the same
gather-and-sum (`embedding_bag`, with 32-bit indices four times faster than with 64) serves decoding and gradients.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from safesail.sae import kernels

__all__ = ["Codes", "above", "decode", "entries", "join", "jump", "largest", "topk"]

_SAMPLE = 65536  # pre-activations looked at to guess where the n largest begin


class _ByLatent(NamedTuple):
    """The entries in the order of their latents."""

    permutation: Tensor
    tokens: Tensor
    offsets: Tensor


@dataclass(frozen=True)
class Codes:
    """The active latents of each token, one token after the other.

    values, indices: (n_entries,), the entries of token 0, then those of token 1, …; offsets: (n_tokens + 1,), where
    each token's entries start, and their number at the end. A value may be 0 (a kept entry that the ReLU zeroed).
    """

    values: Tensor
    indices: Tensor
    offsets: Tensor
    _cache: dict[int, _ByLatent] = field(default_factory=dict, repr=False, compare=False)

    @property
    def n_tokens(self) -> int:
        return len(self.offsets) - 1

    def of(self, token: int) -> tuple[Tensor, Tensor]:
        """The values and indices of one token."""
        start, end = self.offsets[token : token + 2].tolist()
        return self.values[start:end], self.indices[start:end]

    def tokens(self) -> Tensor:
        """The token of every entry: (n_entries,), 32-bit."""
        numbers = torch.arange(self.n_tokens, dtype=torch.int32, device=self.offsets.device)
        return torch.repeat_interleave(numbers, self.offsets.diff(), output_size=len(self.indices))

    def active(self) -> "Codes":
        """Without the entries that are zero."""
        keep = self.values > 0
        before = F.pad(keep.cumsum(0), (1, 0))
        return Codes(self.values[keep], self.indices[keep], before[self.offsets.long()].to(self.offsets.dtype))

    def dense(self, d_sae: int) -> Tensor:
        """The latents as a full matrix, (n_tokens, d_sae)."""
        latents = self.values.new_zeros(self.n_tokens, d_sae)
        latents[self.tokens().long(), self.indices.long()] = self.values
        return latents

    def to(self, device: Any) -> "Codes":
        return Codes(self.values.to(device), self.indices.to(device), self.offsets.to(device))

    def with_values(self, values: Tensor) -> "Codes":
        """The same entries with other values."""
        return Codes(values, self.indices, self.offsets, self._cache)

    def by_latent(self, d_sae: int) -> _ByLatent:
        """The entries in the order of their latents; computed once for these entries."""
        if d_sae not in self._cache and (grouped := kernels.group(self.indices, self.offsets, d_sae)):
            self._cache[d_sae] = _ByLatent(*grouped)
        if d_sae not in self._cache:
            latents, permutation = self.indices.sort(stable=True)
            counts = torch.bincount(latents, minlength=d_sae)
            offsets = F.pad(counts.cumsum(0), (1, 0)).to(self.indices.dtype)
            self._cache[d_sae] = _ByLatent(permutation, self.tokens()[permutation].to(self.indices.dtype), offsets)
        return self._cache[d_sae]


def join(parts: list[Codes]) -> Codes:
    """The codes of consecutive tokens as one."""
    if len(parts) == 1:
        return parts[0]
    ends = torch.tensor([len(part.values) for part in parts]).cumsum(0).tolist()
    offsets = [
        part.offsets[int(i > 0) :] + shift for i, (part, shift) in enumerate(zip(parts, [0, *ends], strict=False))
    ]
    return Codes(torch.cat([p.values for p in parts]), torch.cat([p.indices for p in parts]), torch.cat(offsets))


# --- which entries ------------------------------------------------------------------------------------------------


def topk(pre: Tensor, k: int) -> Codes:
    """The k largest pre-activations of each token, as they are. pre: (n_tokens, d_sae).

    Exactly k entries are kept; which of several entries equal to the k-th largest stay is left open (Safe-SAIL's
    reference code keeps all of them, so its L0 can exceed k).
    """
    if kernels.apply_to(pre):
        values, indices = kernels.topk(pre, k)
    else:
        values, indices = pre.topk(k, dim=-1, sorted=False)
    offsets = torch.arange(0, len(pre) * k + 1, k, dtype=torch.int32, device=pre.device)
    return Codes(values.reshape(-1), indices.reshape(-1).int(), offsets)


def above(pre: Tensor, threshold: Tensor | float) -> Codes:
    """The pre-activations that exceed a threshold (one for all latents, or one each). pre: (n_tokens, d_sae)."""
    n_tokens, d_sae = pre.shape
    where = (pre > threshold).reshape(-1).nonzero().squeeze(1)
    counts = torch.bincount(where // d_sae, minlength=n_tokens)
    indices, offsets = (where % d_sae).int(), F.pad(counts.cumsum(0), (1, 0)).int()
    return Codes(pre.reshape(-1)[where], indices, offsets)


def largest(pre: Tensor, n: int, gather: Callable[[Tensor], Tensor] = lambda part: part) -> Tensor:
    """The n-th largest of all pre-activations of a batch, a scalar. pre: (n_tokens, d_sae).

    `gather` joins equal-sized vectors of several ranks when the batch is spread over them. A sample says where the n
    largest begin; only what lies above is ordered.
    """
    flat = pre.reshape(-1)
    stride = max(len(flat) // _SAMPLE, 1)
    while math.gcd(stride, pre.shape[-1]) > 1:
        stride += 1  # a divisor of d_sae would show the same few latents of every token
    sample = gather(flat[::stride].contiguous())
    n_all = len(gather(flat.new_zeros(1))) * len(flat)
    share = n / n_all
    while True:
        rank = min(int(1.2 * share * len(sample)) + 64, len(sample))
        mine = flat if rank == len(sample) else flat[flat >= sample.topk(rank).values[-1]]
        longest = int(gather(torch.tensor([len(mine)], device=pre.device)).max())
        candidates = gather(F.pad(mine, (0, longest - len(mine)), value=-torch.inf))
        if rank == len(sample) or int((candidates > -torch.inf).sum()) >= n:
            return candidates.kthvalue(len(candidates) - n + 1).values
        share = 1.5 * share + 1e-6  # the sample was unlucky: look further down


# --- their gradients ----------------------------------------------------------------------------------------------


def entries(codes: Codes, centred: Tensor, encoder: Tensor, b_enc: Tensor, b_dec: Tensor | None) -> Codes:
    """The chosen pre-activations as differentiable values: a_j = (x - b_dec) · encoder[j] + b_enc[j] at each entry.

    codes: entries taken from pre-activations that were computed without autograd; centred: x - b_dec, (n_tokens, d_in);
    encoder: (d_sae, d_in). Gradients reach the encoder, b_enc and, where it is given, b_dec.
    """
    values = _Entries.apply(codes.values, centred, encoder, b_enc, b_dec, codes)
    assert isinstance(values, Tensor)
    return codes.with_values(values)


def decode(codes: Codes, W_dec: Tensor) -> Tensor:
    """Σ_j z_j W_dec[j] for each token, by gathering the active rows. W_dec: (d_sae, d_in) → (n_tokens, d_in)."""
    learns = W_dec.requires_grad and torch.is_grad_enabled()
    if learns and kernels.apply_to(W_dec) and codes.indices.dtype == torch.int32:
        result = _Decode.apply(codes.values, W_dec, codes)
        assert isinstance(result, Tensor)
        return result
    x_hat = _bag(codes.indices, W_dec.detach(), codes.offsets, codes.values)
    if not learns:
        return x_hat
    result = _DecoderGradient.apply(x_hat, W_dec, codes)
    assert isinstance(result, Tensor)
    return result


def jump(values: Tensor, threshold: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
    """JumpReLU a·H(a − θ), and H(a − θ), with straight-through gradients for θ. values, threshold: (n_entries,).

    H is the unit step. Its derivative is replaced by a rectangle of width ε = bandwidth around θ (Rajamanoharan et al.
    2024): ∂(a·H)/∂θ = −θ/ε and ∂H/∂θ = −1/ε where |a − θ| < ε/2, else 0. ∂(a·H)/∂a = H; H passes nothing on to a.
    """
    return _Jump.apply(values, threshold, bandwidth)  # type: ignore[return-value]


class _Entries(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, centred: Tensor, encoder: Tensor, b_enc: Tensor, b_dec: Tensor | None, codes: Codes
    ) -> Tensor:
        ctx.save_for_backward(centred, encoder)
        ctx.codes = codes
        return values.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, Tensor, Tensor, Tensor | None, None]:
        centred, encoder = ctx.saved_tensors
        gradient = gradients[0]
        grad_b_enc = torch.zeros(len(encoder), dtype=torch.float64, device=gradient.device)
        grad_b_enc = grad_b_enc.index_add_(0, ctx.codes.indices, gradient.double()).to(gradient.dtype)
        grad_encoder = _sum_by_latent(ctx.codes, gradient, centred, len(encoder))
        grad_b_dec = -(grad_b_enc @ encoder) if ctx.needs_input_grad[4] else None  # every entry saw x - b_dec
        return None, None, grad_encoder, grad_b_enc, grad_b_dec, None


class _DecoderGradient(torch.autograd.Function):
    """x_hat unchanged; its gradient goes on to the values, and summed by latent to W_dec."""

    @staticmethod
    def forward(ctx: Any, x_hat: Tensor, W_dec: Tensor, codes: Codes) -> Tensor:
        ctx.codes, ctx.d_sae = codes.with_values(codes.values.detach()), len(W_dec)
        return x_hat.view_as(x_hat)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        return gradients[0], _sum_by_latent(ctx.codes, ctx.codes.values, gradients[0], ctx.d_sae), None


class _Decode(torch.autograd.Function):
    """x_hat with its gradients to the values and to W_dec by the compiled kernels."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, codes: Codes) -> Tensor:
        ctx.save_for_backward(W_dec)
        ctx.codes = codes.with_values(values.detach())
        return _bag(codes.indices, W_dec, codes.offsets, values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (W_dec,), codes, gradient = ctx.saved_tensors, ctx.codes, gradients[0].contiguous()
        to_values = kernels.products(codes.indices, codes.offsets, gradient, W_dec)
        return to_values, _sum_by_latent(codes, codes.values, gradient, len(W_dec)), None


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, threshold: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
        on = (values > threshold).to(values.dtype)
        ctx.save_for_backward(values, threshold, on)
        ctx.bandwidth = bandwidth
        return values * on, on

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        values, threshold, on = ctx.saved_tensors
        to_latent, to_step = gradients
        near = ((values - threshold).abs() < ctx.bandwidth / 2).to(values.dtype) / ctx.bandwidth
        return to_latent * on, -near * (threshold * to_latent + to_step), None


def _sum_by_latent(codes: Codes, weights: Tensor, rows: Tensor, d_sae: int) -> Tensor:
    """G[j] = Σ over the entries of latent j of weight · rows[token]: (d_sae, d_in)."""
    order = codes.by_latent(d_sae)
    return _bag(order.tokens, rows.contiguous(), order.offsets, weights[order.permutation])


def _bag(indices: Tensor, rows: Tensor, offsets: Tensor, weights: Tensor) -> Tensor:
    return F.embedding_bag(indices, rows, offsets, per_sample_weights=weights, mode="sum", include_last_offset=True)
