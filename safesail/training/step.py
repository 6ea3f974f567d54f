"""One SAE in training: its parameters, its loss, its optimizer, one step, and its finished form."""

import hashlib
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from safesail.distributed import ALONE, Ranks
from safesail.recipe import Architecture, TrainSection
from safesail.sae.config import SaeConfig
from safesail.sae.model import Sae
from safesail.sae.sparse import Codes, above, decode, entries, join, jump, largest, topk

__all__ = ["Buffer", "Diverged", "SaeTrainer", "StepFacts", "generator", "total_variance"]

# With unit rows and inputs of mean norm √d_in, pre-activations start with a standard deviation of about 1. relu and
# jumprelu start at two of them: some 2 % of the latents active, not half of them.
_START = 2.0
_THRESHOLD_RATE = 10.0  # on the learning rate: a threshold moves in units of 1, a weight in units of 1/√d_in
_CHUNK = 2048  # rows of pre-activations at a time: as fast as whole batches, with less memory
_THRESHOLD_MEMORY = 0.98  # of the running mean of batchtopk's threshold: about the last 50 steps


class StepFacts(NamedTuple):
    """What one step measured: the share of variance left, the auxiliary loss, mean L0, the number of dead latents."""

    fvu: float
    auxiliary: float
    l0: float
    n_dead: int


class Diverged(ArithmeticError):
    """A loss or gradient that is not finite; the parameters are still those of the step before."""


def generator(seed: int, *purpose: object) -> torch.Generator:
    """A generator whose stream depends on the recipe's seed and the purpose alone, never on what ran before."""
    digest = hashlib.sha256(":".join(map(str, (seed, *purpose))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def total_variance(x: Tensor, ranks: Ranks = ALONE) -> Tensor:
    """Σ ‖x − mean‖² over the batch of all ranks, a scalar. x: (batch, d_in), this rank's share."""
    mean = ranks.sum(x.sum(0)) / (len(x) * ranks.size)
    return ranks.sum(_squared_norm(x - mean))


class _SquaredError(torch.autograd.Function):
    """‖x − b_dec − x_hat‖² and the error itself, (batch, …, d_in): one pass forward and one back, where autograd's own
    chain makes seven."""

    @staticmethod
    def forward(ctx: Any, x_hat: Tensor, b_dec: Tensor, centred: Tensor) -> tuple[Tensor, Tensor]:
        error = centred - x_hat
        ctx.save_for_backward(error)
        ctx.mark_non_differentiable(error)
        return _squared_norm(error), error

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (error,) = ctx.saved_tensors
        gradient = error * (-2 * gradients[0])
        return gradient, gradient.reshape(-1, gradient.shape[-1]).sum(0), None


def _squared_norm(x: Tensor) -> Tensor:
    """Summed in parts: over a whole batch the norm's fp32 sum would lose up to a thousandth."""
    parts = [torch.linalg.vector_norm(part) for part in x.reshape(-1).split(65536)]
    return torch.stack(parts).square().sum()


class Buffer:
    """Memory for pre-activations: a fresh tensor each step costs a fifth more. SAEs that step in turn may share it."""

    def __init__(self) -> None:
        self._tensor = torch.empty(0)
        # glibc gives freed memory back to the system, to be taken anew page by page, unless it has seen a freed block
        # as large (32 MiB at most). One that is never touched costs nothing and saves gradients 7 % of the step.
        torch.empty(31 << 20, dtype=torch.uint8)

    def rows(self, n: int, width: int, like: Tensor) -> Tensor:
        """An uninitialised tensor (n, width), valid until the next call."""
        if self._tensor.numel() < n * width:
            self._tensor = like.new_empty(n * width)
        return self._tensor[: n * width].view(n, width)


class SaeTrainer:
    """Trains one SAE on inputs scaled so that their mean norm is √d_in.

        loss = ‖x − x̂‖² / ‖x − mean‖²  +  sparsity  +  aux_coefficient · ‖e − ê‖² / ‖e‖²,   e = x − x̂ (held fixed)

    Sparsity is l1 · mean Σ_j z_j / √d_in for relu and l0 · mean |{j: a_j > θ_j}| for jumprelu, both warmed up, and
    nothing for the others, which choose how many latents are active. matryoshka averages the first term over its nested
    dictionaries. ê reconstructs the error from the aux_k strongest *dead* latents (AuxK, Gao et al. 2024), on every
    eighth token, so that dead latents get gradients, in the encoder as well, and come back; one below zero is 0 in ê
    and is given its gradient all the same.

    Decoder rows keep unit norm; the part of their gradient that would only change the norm is removed. Under several
    ranks each gets an equal share of every batch, and all take the same step as one process would with the whole.
    """

    AUX_STRIDE = 8

    def __init__(
        self,
        config: SaeConfig,
        section: TrainSection,
        mean: Tensor,
        seed: int,
        n_steps: int,
        ranks: Ranks = ALONE,
        device: torch.device | str = "cpu",
        buffer: "Buffer | None" = None,
    ) -> None:
        self.config, self.section, self.n_steps, self.n_done, self.ranks = config, section, n_steps, 0, ranks
        rows = torch.randn(config.d_sae, config.d_in, generator=generator(seed, "decoder", config.sae_id)).to(device)
        self.W_dec = (rows / rows.norm(dim=1, keepdim=True)).requires_grad_()
        self.encoder = self.W_dec.detach().clone().requires_grad_()  # tied at the start; (d_sae, d_in)
        start = -_START if config.architecture == "relu" else 0.0
        self.b_enc = torch.full((config.d_sae,), start, device=device).requires_grad_()
        self.b_dec = mean.to(device, copy=True).requires_grad_()
        self.threshold = torch.full((config.d_sae,), _START, device=device).requires_grad_()
        self.batch_threshold = torch.zeros(2, dtype=torch.float64, device=device)  # weighted sum, sum of weights
        self.silent_for = torch.zeros(config.d_sae, dtype=torch.long, device=device)  # tokens since it last fired
        self._buffer = buffer or Buffer()
        rate = section.learning_rate
        groups = [{"params": [value], "lr": rate, "factor": self._factor(name)} for name, value in self._named()]
        self.optimizer = torch.optim.Adam(groups, lr=rate, fused=True)

    @torch.no_grad()
    def start_from(self, sae: Sae, scale: float) -> None:
        """Begin with the weights of a finished SAE, which `finish(scale)` would give back."""
        assert (sae.config.d_in, sae.config.d_sae) == (self.config.d_in, self.config.d_sae)
        self.encoder.copy_(sae.W_enc.T)
        self.b_enc.copy_(sae.b_enc * scale)
        self.W_dec.copy_(sae.W_dec)
        self.b_dec.copy_(sae.b_dec * scale)
        if self.config.architecture == "jumprelu" and sae.threshold is not None:
            self.threshold.copy_(sae.threshold * scale)

    def parameters(self) -> dict[str, Tensor]:
        """The trained tensors by name."""
        return dict(self._named())

    def step(self, x: Tensor, total: Tensor | None = None) -> StepFacts:
        """One update on scaled activations x: (batch, d_in); total: their `total_variance`, if it is known already."""
        total = total_variance(x, self.ranks) if total is None else total
        centred = x - self.b_dec.detach()
        dead = (self.silent_for > self.section.dead_after_tokens).nonzero().squeeze(1)
        chosen, revived = self._choose(centred, dead)
        codes, sparsity, n_active = self._activate(entries(chosen, centred, self.encoder, self.b_enc, self.b_dec))
        error, loss = self._reconstruct(centred, codes, total)
        auxiliary = self._auxiliary_loss(revived, centred, error)
        (loss + sparsity + self.section.aux_coefficient * auxiliary).backward()
        facts = self._facts(error, total, auxiliary.detach(), n_active, len(dead), len(x))
        self._count_silence(codes, len(x))
        self._update(facts)
        return facts

    # --- the loss --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def _choose(self, centred: Tensor, dead: Tensor) -> tuple[Codes, Codes | None]:
        """The entries that can be active, or whose threshold can get a gradient, and those of the auxiliary loss.

        Rows are taken in chunks, which bounds the pre-activations' buffer, but where the batch as a whole decides.
        """
        n_aux = min(self.section.aux_k, len(dead)) if self.section.aux_coefficient else 0
        chosen, revived = [], []
        for rows in centred.split(self.rows_at_once(self.config.architecture, len(centred))):
            pre = self._pre_activations(rows)
            chosen.append(self._active_entries(pre))
            if n_aux:
                codes = topk(pre[:: self.AUX_STRIDE, dead], n_aux)
                revived.append(Codes(codes.values, dead[codes.indices].int(), codes.offsets))
        return join(chosen), join(revived) if n_aux else None

    def _pre_activations(self, centred: Tensor) -> Tensor:
        out = self._buffer.rows(len(centred), self.config.d_sae, centred)
        return torch.addmm(self.b_enc, centred, self.encoder.T, out=out)

    @staticmethod
    def rows_at_once(architecture: Architecture, batch_size: int) -> int:
        """How many tokens' pre-activations are held at a time."""
        return batch_size if architecture in ("batchtopk", "matryoshka") else min(_CHUNK, batch_size)

    def _active_entries(self, pre: Tensor) -> Codes:
        match self.config.architecture:
            case "topk":
                assert self.config.k is not None
                return topk(pre, self.config.k)
            case "batchtopk" | "matryoshka":
                assert self.config.k is not None
                lowest = largest(pre, self.config.k * len(pre) * self.ranks.size, self.ranks.gather)
                self._remember(lowest)
                return above(pre, torch.nextafter(lowest, lowest - 1).clamp(min=0))
            case "jumprelu":
                return above(pre, self.threshold - self.section.bandwidth / 2)
            case "relu":
                return above(pre, 0.0)

    def _activate(self, codes: Codes) -> tuple[Codes, Tensor, Tensor]:
        """The activations, the weighted sparsity penalty, and this rank's number of active entries."""
        n_tokens = codes.n_tokens * self.ranks.size
        weight = (self.config.coefficient or 0.0) * self._sparsity_schedule() / n_tokens
        if self.config.architecture == "jumprelu":
            values, on = jump(codes.values, self.threshold[codes.indices], self.section.bandwidth)
            return codes.with_values(values), weight * on.sum(), on.detach().sum()
        codes = codes.with_values(codes.values.relu())
        penalty = weight / math.sqrt(self.config.d_in) * codes.values.sum() if weight else codes.values.new_zeros(())
        return codes, penalty, (codes.values.detach() > 0).sum()

    def _reconstruct(self, centred: Tensor, codes: Codes, total: Tensor) -> tuple[Tensor, Tensor]:
        """The error of the whole dictionary, (batch, d_in), and the reconstruction loss."""
        if self.config.architecture != "matryoshka":
            squared, error = _SquaredError.apply(decode(codes, self.W_dec), self.b_dec, centred)  # type: ignore[misc]
            return error, squared / total
        widths = self.section.nested_widths
        parts = decode(_by_group(codes, widths), self.W_dec).reshape(len(centred), len(widths), -1)
        sums = parts.cumsum(1)  # what the first dictionary reconstructs, the first two, …
        squared, errors = _SquaredError.apply(sums, self.b_dec, centred[:, None])  # type: ignore[misc]
        return errors[:, -1], squared / (len(widths) * total)

    def _auxiliary_loss(self, revived: Codes | None, centred: Tensor, error: Tensor) -> Tensor:
        if revived is None:
            return error.new_zeros(())
        centred, error = centred[:: self.AUX_STRIDE], error[:: self.AUX_STRIDE]
        codes = entries(revived, centred, self.encoder, self.b_enc, None)
        through = codes.values + (codes.values.relu() - codes.values).detach()  # below zero the ReLU's gradient is 0
        missed = error - decode(codes.with_values(through), self.W_dec)
        return missed.square().sum() / self.ranks.sum(_squared_norm(error))

    # --- the step --------------------------------------------------------------------------------------------

    def _facts(
        self, error: Tensor, total: Tensor, auxiliary: Tensor, n_active: Tensor, n_dead: int, n_tokens: int
    ) -> StepFacts:
        sums = self.ranks.sum(torch.stack([_squared_norm(error), auxiliary, n_active.to(error.dtype)]))
        squared, missed, active = sums.tolist()
        return StepFacts(squared / float(total), missed, active / (n_tokens * self.ranks.size), n_dead)

    def _count_silence(self, codes: Codes, n_tokens: int) -> None:
        fired = torch.zeros_like(self.silent_for, dtype=torch.bool)
        fired[codes.indices[codes.values.detach() > 0]] = True
        self.silent_for += n_tokens * self.ranks.size
        self.silent_for[self.ranks.any(fired)] = 0

    @torch.no_grad()
    def _update(self, facts: StepFacts) -> None:
        values = list(self.parameters().values())
        for value in values:
            assert value.grad is not None
            self.ranks.sum(value.grad)
        along = torch.linalg.vecdot(self.W_dec.grad, self.W_dec)
        self.W_dec.grad.addcmul_(along[:, None], self.W_dec, value=-1)  # type: ignore[union-attr]
        norm = torch.nn.utils.get_total_norm([value.grad for value in values])  # type: ignore[misc]
        if not (math.isfinite(facts.fvu) and math.isfinite(float(norm))):
            raise Diverged(f"loss {facts.fvu:g}, norm of the gradient {float(norm):g}")
        if float(norm) > 1.0:
            torch.nn.utils.clip_grads_with_norm_(values, 1.0, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = self.section.learning_rate * group["factor"] * self.schedule()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)
        self.threshold.clamp_(min=0)  # the finished SAE's latents are never negative
        self.n_done += 1

    def schedule(self) -> float:
        """The factor on the learning rate: linear warm-up, constant, linear decay to zero."""
        warmup = max(round(self.section.warmup * self.n_steps), 1)
        decay = max(round(self.section.decay * self.n_steps), 1)
        return min((self.n_done + 1) / warmup, (self.n_steps - self.n_done) / decay, 1.0)

    def _sparsity_schedule(self) -> float:
        return min((self.n_done + 1) / max(round(self.section.sparsity_warmup * self.n_steps), 1), 1.0)

    def _named(self) -> list[tuple[str, Tensor]]:
        named = [("encoder", self.encoder), ("b_enc", self.b_enc), ("W_dec", self.W_dec), ("b_dec", self.b_dec)]
        return [*named, ("threshold", self.threshold)] if self.config.architecture == "jumprelu" else named

    @staticmethod
    def _factor(name: str) -> float:
        return _THRESHOLD_RATE if name == "threshold" else 1.0

    def _remember(self, lowest: Tensor) -> None:
        """Take the batch's threshold into the running mean that stands for it at inference."""
        self.batch_threshold *= _THRESHOLD_MEMORY
        self.batch_threshold += (1 - _THRESHOLD_MEMORY) * torch.stack([lowest.clamp(min=0), torch.ones_like(lowest)])

    # --- stopping, going on, finishing -----------------------------------------------------------------------

    def state(self) -> dict[str, Tensor]:
        """Everything the next step depends on, as named tensors."""
        tensors = {name: value.detach() for name, value in self.parameters().items()}
        for name, value in self.parameters().items():
            for moment, tensor in self.optimizer.state[value].items():
                tensors[f"{name}.{moment}"] = tensor
        counters = {"silent_for": self.silent_for, "batch_threshold": self.batch_threshold}
        return {**tensors, **counters, "n_done": torch.tensor(self.n_done)}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Go on exactly where `state` was taken."""
        with torch.no_grad():
            for name, value in self.parameters().items():
                value.copy_(tensors[name])
                moments = {moment: tensors[f"{name}.{moment}"].clone() for moment in ("step", "exp_avg", "exp_avg_sq")}
                self.optimizer.state[value] = {moment: tensor.to(value.device) for moment, tensor in moments.items()}
        self.silent_for.copy_(tensors["silent_for"])
        self.batch_threshold.copy_(tensors["batch_threshold"])
        self.n_done = int(tensors["n_done"])

    @torch.no_grad()
    def finish(self, scale: float) -> Sae:
        """The SAE for unscaled activations. Dividing biases and thresholds by the scale divides the latents with them,
        and the decoder rows keep unit norm."""
        threshold = None
        if self.config.architecture == "jumprelu":
            threshold = self.threshold.detach() / scale
        elif self.config.has_threshold:
            total, weight = self.batch_threshold.tolist()
            threshold = torch.full((self.config.d_sae,), total / max(weight, 1e-12) / scale)
        tensors = (self.encoder.T.contiguous(), self.b_enc / scale, self.W_dec.clone(), self.b_dec / scale)
        return Sae(self.config, *(tensor.detach().cpu() for tensor in tensors), threshold=_on_cpu(threshold))


def _on_cpu(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.cpu()


def _by_group(codes: Codes, widths: tuple[int, ...]) -> Codes:
    """The same entries with one row per token and nested dictionary: those that only the g-th adds to the one before.

    Entries of a token must be in ascending order of latents, as `above` gives them.
    """
    ends = torch.tensor(widths, device=codes.indices.device, dtype=codes.indices.dtype)
    group = codes.tokens().long() * len(widths) + torch.searchsorted(ends, codes.indices, right=True)
    counts = torch.bincount(group, minlength=codes.n_tokens * len(widths))
    return Codes(codes.values, codes.indices, F.pad(counts.cumsum(0), (1, 0)).to(codes.offsets.dtype))
