"""One reward model in training: its batches, its loss, its optimizer, one step, its exact state.

loss = mean over the step's pairs of −log σ(r(chosen) − r(rejected)) (Bradley and Terry 1952)

AdamW; linear warm-up, then half a cosine to zero; gradients are clipped to norm 1. Dropout is off, so that a step
depends on nothing but the weights, the moments and its number.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from safesail.distributed import ALONE, Ranks
from safesail.reward_recipe import CompareSection, RewardSection
from safesail.rewards.parts import HeadAlone, TrainedPart
from safesail.training.step import Diverged, generator

__all__ = ["Fit", "FitFacts", "FitSettings", "n_right", "pairwise_loss", "schedule"]

_POOL = 32
"""Batches whose pairs are sorted by length together: enough for little padding, few enough for mixed batches."""


class FitSettings(NamedTuple):
    """How a reward model is trained."""

    epochs: int
    batch_pairs: int
    accumulate: int
    learning_rate: float
    warmup: float
    weight_decay: float

    @classmethod
    def of(cls, section: RewardSection) -> "FitSettings":
        """Those of the recipe's reward model."""
        return cls(*(getattr(section, name) for name in cls._fields))

    def retrained(self, section: CompareSection) -> "FitSettings":
        """Those of retraining, whose batches are steps."""
        changed = {name: getattr(section, name) for name in ("epochs", "batch_pairs", "learning_rate")}
        return self._replace(accumulate=1, **changed)


class FitFacts(NamedTuple):
    """What one step measured on its own pairs, before its update."""

    loss: float
    accuracy: float
    learning_rate: float


def pairwise_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """−log σ(r₊ − r₋) of each pair. chosen, rejected: rewards (n_pairs,) → (n_pairs,)."""
    return -F.logsigmoid(chosen - rejected)


def n_right(chosen: Tensor, rejected: Tensor) -> float:
    """How many chosen answers have the higher reward; a tie is half of one. Both: (n_pairs,)."""
    return float((chosen > rejected).sum()) + 0.5 * float((chosen == rejected).sum())


def schedule(step: int, n_steps: int, warmup: float) -> float:
    """The factor on the learning rate at a step, counted from 0."""
    n_warm = round(warmup * n_steps)
    if step < n_warm:
        return (step + 1) / n_warm
    return 0.5 * (1 + math.cos(math.pi * (step - n_warm) / max(n_steps - n_warm, 1)))


class Fit:
    """Trains a part of a reward model on pairs of its texts. pairs: (n_pairs, 2), the texts' numbers, chosen first.

    An optimizer step takes `accumulate` batches of `batch_pairs` pairs, and its gradient is that of one batch of them
    all; the last step of an epoch may have fewer. Under several ranks each takes its share of every batch, and all
    make the same step.
    """

    def __init__(
        self, part: TrainedPart, pairs: Tensor, settings: FitSettings, seed: int, ranks: Ranks = ALONE
    ) -> None:
        self.part, self.pairs, self.settings, self.seed, self.ranks = part, pairs, settings, seed, ranks
        self._weights = part.parameters()
        for weight in self._weights.values():
            weight.requires_grad_(True)
        decays = {True: settings.weight_decay, False: 0.0}  # norms and biases do not decay
        groups = [{"params": [w], "weight_decay": decays[w.ndim > 1]} for w in self._weights.values()]
        self.optimizer = torch.optim.AdamW(groups, lr=settings.learning_rate, fused=True)
        self.n_done = 0
        self.steps_per_epoch = math.ceil(math.ceil(len(pairs) / settings.batch_pairs) / settings.accumulate)
        self.n_steps = settings.epochs * self.steps_per_epoch
        self._epoch: tuple[int, list[Tensor]] = (-1, [])

    @property
    def n_parameters(self) -> int:
        """How many numbers are trained."""
        return sum(weight.numel() for weight in self._weights.values())

    def step(self) -> FitFacts:
        """One update; Diverged, with the weights as they were, where loss or gradient is not finite."""
        batches = self.batches(self.n_done)
        n_pairs = sum(map(len, batches))
        sums = torch.zeros(2, dtype=torch.float64, device=self.part.device)
        for batch in batches:
            mine = self.pairs[batch[self.ranks.rank :: self.ranks.size]]
            if len(mine):
                sums += self._backward(mine, n_pairs)
        loss, right = self.ranks.sum(sums).tolist()
        rate = self.settings.learning_rate * schedule(self.n_done, self.n_steps, self.settings.warmup)
        self._update(loss, rate)
        return FitFacts(loss, right / n_pairs, rate)

    def batches(self, step: int) -> list[Tensor]:
        """The pairs' numbers of a step's batches, each of texts of similar length.

        The head alone has nothing to pad and takes the whole step at once.
        """
        epoch, within = divmod(step, self.steps_per_epoch)
        if self._epoch[0] != epoch:
            self._epoch = (epoch, self._epoch_batches(epoch))
        first = within * self.settings.accumulate
        batches = self._epoch[1][first : first + self.settings.accumulate]
        return [torch.cat(batches)] if isinstance(self.part, HeadAlone) else batches

    def state(self) -> dict[str, Tensor]:
        """Everything the next step depends on, as named tensors."""
        tensors = {"n_done": torch.tensor(self.n_done)}
        for name, weight in self._weights.items():
            tensors[name] = weight.detach().contiguous()
            for moment, tensor in self.optimizer.state[weight].items():
                tensors[f"{name}|{moment}"] = tensor
        return tensors

    @torch.no_grad()
    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Go on exactly where `state` was taken."""
        self.n_done = int(tensors["n_done"])
        for name, weight in self._weights.items():
            weight.copy_(tensors[name])
            moments = {key: tensors[f"{name}|{key}"].clone() for key in ("step", "exp_avg", "exp_avg_sq")}
            self.optimizer.state[weight] = {key: tensor.to(weight.device) for key, tensor in moments.items()}

    def release(self) -> None:
        """Leave the weights without gradients."""
        for weight in self._weights.values():
            weight.requires_grad_(False)
            weight.grad = None

    def _epoch_batches(self, epoch: int) -> list[Tensor]:
        """All batches of an epoch: pools of shuffled pairs, sorted by length, cut, and the batches shuffled."""
        chance = generator(self.seed, "order", epoch)
        longest = torch.tensor(self.part.lengths)[self.pairs].amax(1)
        batches = []
        for pool in torch.randperm(len(self.pairs), generator=chance).split(_POOL * self.settings.batch_pairs):
            batches += pool[longest[pool].argsort(stable=True)].split(self.settings.batch_pairs)
        return [batches[i] for i in torch.randperm(len(batches), generator=chance).tolist()]

    def _backward(self, pairs: Tensor, n_pairs: int) -> Tensor:
        """Add the pairs' share of the step's gradient; their share of its loss, and how many are right: (2,)."""
        chosen, rejected = self.part.rewards(pairs.T.flatten().tolist()).chunk(2)
        loss = pairwise_loss(chosen, rejected).sum() / n_pairs
        loss.backward()
        right = n_right(chosen.detach(), rejected.detach())
        return torch.stack([loss.detach().double(), loss.new_tensor(right).double()])

    def _update(self, loss: float, rate: float) -> None:
        gradients = []
        for weight in self._weights.values():
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            gradients.append(self.ranks.sum(weight.grad))
        norm = torch.nn.utils.get_total_norm(gradients)
        if not (math.isfinite(loss) and math.isfinite(float(norm))):
            raise Diverged(f"loss {loss:g}, norm of the gradient {float(norm):g}")
        torch.nn.utils.clip_grads_with_norm_(list(self._weights.values()), 1.0, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.n_done += 1
