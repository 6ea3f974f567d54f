"""One TopK SAE in training: its parameters, its optimizer, one step, and its finished form."""

import hashlib
import math
from typing import NamedTuple

import torch
from torch import Tensor

from safesail.recipe import TrainSection
from safesail.sae.config import SaeConfig
from safesail.sae.model import Sae
from safesail.sae.sparse import decode, encode_topk

__all__ = ["SaeTrainer", "StepFacts", "generator"]


class StepFacts(NamedTuple):
    """What one step measured: the share of variance left, the auxiliary loss, the number of dead latents."""

    fvu: Tensor
    auxiliary: Tensor
    n_dead: int


def generator(seed: int, *purpose: object) -> torch.Generator:
    """A generator whose stream depends on the recipe's seed and the purpose alone, never on what ran before."""
    digest = hashlib.sha256(":".join(map(str, (seed, *purpose))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


class SaeTrainer:
    """Trains one SAE on inputs scaled so that their mean norm is √d_in.

        loss = ‖x − x̂‖² / ‖x − mean‖²  +  aux_coefficient · ‖e − ê‖² / ‖e‖²,   e = x − x̂ (held fixed)

    ê reconstructs the error from the aux_k strongest *dead* latents (AuxK, Gao et al. 2024), so that dead latents get
    gradients, in the encoder as well, and come back. Decoder rows keep unit norm; the part of their gradient that
    would only change the norm is removed.
    """

    def __init__(self, config: SaeConfig, section: TrainSection, mean: Tensor, seed: int, n_steps: int) -> None:
        self.config, self.section, self.n_steps, self.n_done = config, section, n_steps, 0
        rows = torch.randn(config.d_sae, config.d_in, generator=generator(seed, "decoder", config.sae_id))
        self.W_dec = (rows / rows.norm(dim=1, keepdim=True)).requires_grad_()
        self.encoder = self.W_dec.detach().clone().requires_grad_()  # tied at the start; (d_sae, d_in)
        self.b_enc = torch.zeros(config.d_sae, requires_grad=True)
        self.b_dec = mean.clone().requires_grad_()
        self.silent_for = torch.zeros(config.d_sae, dtype=torch.long)  # tokens since each latent last fired
        self._pre = torch.empty(
            0, config.d_sae
        )  # the pre-activations' buffer: a fresh one each step costs a fifth more
        self.optimizer = torch.optim.Adam(self.parameters().values(), lr=section.learning_rate, fused=True)

    def parameters(self) -> dict[str, Tensor]:
        return {"encoder": self.encoder, "b_enc": self.b_enc, "W_dec": self.W_dec, "b_dec": self.b_dec}

    def step(self, x: Tensor) -> StepFacts:
        """One update on scaled activations x: (batch, d_in)."""
        if self._pre.shape[0] != len(x):
            self._pre = x.new_empty(len(x), self.config.d_sae)
        codes = encode_topk(x, self.encoder, self.b_enc, self.b_dec, self.config.k, out=self._pre)
        error = x - (decode(codes, self.W_dec) + self.b_dec)
        fvu = error.square().sum() / (x.var(0, correction=0).sum() * len(x))
        dead = self.silent_for > self.section.dead_after_tokens
        auxiliary = self._auxiliary_loss(x, error.detach(), dead)
        (fvu + self.section.aux_coefficient * auxiliary).backward()
        self._count_silence(codes.indices[codes.values > 0], len(x))
        self._update()
        return StepFacts(fvu.detach(), auxiliary.detach(), int(dead.sum()))

    def _auxiliary_loss(self, x: Tensor, error: Tensor, dead: Tensor) -> Tensor:
        n_dead = int(dead.sum())
        if n_dead == 0 or self.section.aux_coefficient == 0:
            return x.new_zeros(())
        k = min(self.section.aux_k, n_dead)
        codes = encode_topk(x, self.encoder[dead], self.b_enc[dead], self.b_dec.detach(), k)
        return (error - decode(codes, self.W_dec[dead])).square().sum() / error.square().sum()

    def _count_silence(self, fired: Tensor, n_tokens: int) -> None:
        self.silent_for += n_tokens
        self.silent_for[fired] = 0

    def _update(self) -> None:
        with torch.no_grad():
            gradient = self.W_dec.grad
            assert gradient is not None
            gradient.addcmul_(torch.linalg.vecdot(gradient, self.W_dec)[:, None], self.W_dec, value=-1)
        torch.nn.utils.clip_grad_norm_(list(self.parameters().values()), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.section.learning_rate * self.schedule()
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            self.W_dec /= self.W_dec.norm(dim=1, keepdim=True)
        self.n_done += 1

    def schedule(self) -> float:
        """The factor on the learning rate: linear warm-up, constant, linear decay to zero."""
        warmup = max(round(self.section.warmup * self.n_steps), 1)
        decay = max(round(self.section.decay * self.n_steps), 1)
        return min((self.n_done + 1) / warmup, (self.n_steps - self.n_done) / decay, 1.0)

    def state(self) -> dict[str, Tensor]:
        """Everything the next step depends on, as named tensors."""
        tensors = {name: value.detach() for name, value in self.parameters().items()}
        for name, value in self.parameters().items():
            for moment, tensor in self.optimizer.state[value].items():
                tensors[f"{name}.{moment}"] = tensor
        return {**tensors, "silent_for": self.silent_for, "n_done": torch.tensor(self.n_done)}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Go on exactly where `state` was taken."""
        with torch.no_grad():
            for name, value in self.parameters().items():
                value.copy_(tensors[name])
                moments = ("step", "exp_avg", "exp_avg_sq")
                self.optimizer.state[value] = {moment: tensors[f"{name}.{moment}"].clone() for moment in moments}
        self.silent_for.copy_(tensors["silent_for"])
        self.n_done = int(tensors["n_done"])

    def finish(self, scale: float) -> Sae:
        """The SAE for unscaled activations. Dividing the biases by the scale divides the latents with them: TopK and
        ReLU commute with it, and the decoder rows keep unit norm."""
        with torch.no_grad():
            assert math.isfinite(float(self.W_dec.sum()))
            return Sae(
                self.config,
                self.encoder.detach().T.contiguous(),
                self.b_enc.detach() / scale,
                self.W_dec.detach().clone(),
                self.b_dec.detach() / scale,
            )
