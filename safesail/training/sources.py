"""Where training batches come from: activation shards on disk, or the language model on the fly. One interface.

Both give batches of scaled activations, {hook point: (batch, d_in)}, that depend on the recipe and the step alone,
never on which SAEs or hook points are trained together; and both can start at any step.
"""

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from safesail.distributed import ALONE, Ranks
from safesail.errors import InputError
from safesail.recipe import BaseRecipe, TokenPolicy
from safesail.sae.norm import norm_of
from safesail.training.step import generator

__all__ = ["Batches", "Rows", "Shards", "Streamed", "TrainingSource", "scale_and_mean", "training_rows"]

_MEAN_ROWS = 65536
Batches = Iterator[dict[str, Tensor]]


class Rows(Protocol):
    """Activations on disk: a harvest of texts, or the segment ends of preference data."""

    hook_points: list[str]
    n_tokens: int
    facts: dict[str, Any]
    """`d_in` and `median_norm` by hook point."""

    def counted(self, hook_point: str, policy: TokenPolicy) -> Tensor:
        """Which rows count under a token policy: bool (n_tokens,)."""
        ...

    def rows_held_out(self) -> Tensor:
        """Which rows are not to be trained on: bool (n_tokens,)."""
        ...

    def rows(self, hook_point: str, indices: Tensor) -> Tensor:
        """The activations of chosen rows as fp32: (n, d_in)."""
        ...

    def blocks(self, hook_point: str, size: int = 4096) -> Iterator[tuple[int, Tensor]]:
        """All activations in row order: (first row, fp32 block)."""
        ...


class TrainingSource(Protocol):
    """A source of training batches."""

    together: bool
    """Whether several hook points are best read in one go, because the model is run for them."""

    def n_steps(self, hook_point: str) -> int:
        """How many batches there are."""
        ...

    def batches(self, hook_points: tuple[str, ...], start: int) -> Batches:
        """The unscaled batches from step `start` on; of the global batch, this rank's share."""
        ...


class Shards:
    """Batches of harvested activations, for several epochs; each epoch visits the rows in an order of its own."""

    together = False

    def __init__(self, recipe: BaseRecipe, activations: Rows, ranks: Ranks = ALONE) -> None:
        self.recipe, self.activations, self.ranks = recipe, activations, ranks
        self._known: dict[str, Tensor] = {}

    def n_steps(self, hook_point: str) -> int:
        return len(self._rows(hook_point)) // self.recipe.train.batch_size * self.recipe.train.epochs

    def batches(self, hook_points: tuple[str, ...], start: int) -> Batches:
        (hook_point,) = hook_points
        for rows in self.row_numbers(hook_point, start):
            yield {hook_point: self.activations.rows(hook_point, _share(rows, self.ranks))}

    def row_numbers(self, hook_point: str, start: int) -> Iterator[Tensor]:
        """The rows of every global batch from step `start` on."""
        rows, size = self._rows(hook_point), self.recipe.train.batch_size
        per_epoch = len(rows) // size
        for epoch in range(start // per_epoch, self.recipe.train.epochs):
            order = rows[torch.randperm(len(rows), generator=generator(self.recipe.seed, "epoch", hook_point, epoch))]
            for i in range(max(start - epoch * per_epoch, 0), per_epoch):
                yield order[i * size : (i + 1) * size]

    def _rows(self, hook_point: str) -> Tensor:
        if hook_point not in self._known:
            self._known[hook_point] = training_rows(self.recipe, self.activations, hook_point)
        return self._known[hook_point]


class Streamed:
    """Batches of activations read on the fly: a buffer of tokens is read, shuffled together, and used up.

    `rounds(hook_points, first)` gives the counted rows of every buffer, of this rank. Every round makes the same number
    of batches: where the token policy leaves fewer rows than that takes, some are used twice. So hook points, whose
    policies leave out different tokens, stay independent of each other, and resuming needs no stored buffer: the round
    is read again.
    """

    together = True

    def __init__(
        self,
        recipe: BaseRecipe,
        rounds: Callable[[tuple[str, ...], int], Iterator[dict[str, Tensor]]],
        ranks: Ranks = ALONE,
    ) -> None:
        self.recipe, self.rounds, self.ranks = recipe, rounds, ranks
        self.per_round = recipe.train.buffer_tokens // recipe.train.batch_size

    def n_steps(self, hook_point: str) -> int:
        assert self.recipe.train.stream_tokens is not None
        return max(self.recipe.train.stream_tokens // self.recipe.train.batch_size, 1)

    def batches(self, hook_points: tuple[str, ...], start: int) -> Batches:
        step, n_steps, first = start, self.n_steps(hook_points[0]), start // self.per_round
        size = self.recipe.train.batch_size // self.ranks.size
        needed = range(first, -(-n_steps // self.per_round) if start < n_steps else first)
        for number, rows in zip(needed, self.rounds(hook_points, first), strict=False):  # it has no end of its own
            orders = {name: self._order(name, number, len(rows[name])) for name in hook_points}
            for i in range(step - number * self.per_round, self.per_round):
                if step == n_steps:
                    return
                cut = slice(i * size, (i + 1) * size)
                yield {name: rows[name][orders[name][cut]].float() for name in hook_points}
                step += 1

    def _order(self, hook_point: str, number: int, n_rows: int) -> Tensor:
        if n_rows == 0:
            raise InputError(f"of a whole buffer no token counts at {hook_point} under the policy; change [tokens].")
        chance = generator(self.recipe.seed, "round", hook_point, number, self.ranks.rank)
        order = torch.randperm(n_rows, generator=chance)
        wanted = self.per_round * (self.recipe.train.batch_size // self.ranks.size)
        return order.repeat(-(-wanted // n_rows))[:wanted]


def training_rows(recipe: BaseRecipe, activations: Rows, hook_point: str) -> Tensor:
    """The numbers of the harvested rows to train on: those that count and are not held out."""
    keep = activations.counted(hook_point, recipe.tokens) & ~activations.rows_held_out()
    rows = keep.nonzero().flatten()
    if len(rows) < recipe.train.batch_size:
        raise InputError(
            f"{len(rows):,} training tokens at {hook_point} do not fill one batch of {recipe.train.batch_size:,}; "
            "raise corpus.n_tokens or lower train.batch_size."
        )
    return rows


def scale_and_mean(
    activations: Rows, hook_point: str, rows: Tensor, seed: int, normalisation: str = "none"
) -> tuple[float, Tensor]:
    """The factor that makes the mean norm √d_in, and the mean of the scaled activations: (d_in,).

    Both after the normalisation (`sae.norm`) of every token. Estimated on harvested rows, whichever source the batches
    come from.
    """
    sample = rows[torch.randperm(len(rows), generator=generator(seed, "mean", hook_point))[:_MEAN_ROWS]]
    x = activations.rows(hook_point, sample)
    x = norm_of(x, normalisation).apply(x)
    scale = x.shape[1] ** 0.5 / float(x.norm(dim=1).double().mean())
    return scale, x.double().mean(0).float() * scale


def _share(rows: Tensor, ranks: Ranks) -> Tensor:
    """A rank's consecutive share of a global batch; batch_size is a multiple of the number of ranks."""
    size: Any = len(rows) // ranks.size
    return rows[ranks.rank * size : (ranks.rank + 1) * size]
