"""What SAFER's own stages take: training reward models, reading segment ends, the SAE's second step, retraining.

    reward     texts · length · (frozen part forward once + epochs · 3 · trained part forward)
    ends       texts · length · forward to the hook point
    compare    the same as `reward` for every edited data set and seed, the frozen part once for all

Texts are two a pair; each is counted at `reward.max_length` tokens, so all of it is an upper bound.
"""

from typing import NamedTuple

from safesail.lm.size import config_of, lm_size
from safesail.recipe import BaseRecipe
from safesail.reward_recipe import RewardRecipe

__all__ = ["RewardWork", "reward_work"]

_FORWARD_AND_BACK = 3
"""A training step takes about three times the FLOPs of its forward pass."""
_METHODS = 3
"""safer, random, reward."""


class RewardWork(NamedTuple):
    """The size of SAFER's own stages."""

    n_pairs: int | None
    """None while it is not known."""
    longest: int
    d_model: int
    to_frozen: float
    """FLOPs a token of the forward pass through the part that is not trained."""
    to_top: float
    """The same through all that is kept of the model."""
    n_parameters: int
    n_trained: int
    epochs: int
    n_trainings: int
    """Of `compare`."""
    compare_frozen: float
    compare_epochs: int
    end_tokens: int
    """At most so many segment ends a text."""

    @property
    def n_tokens(self) -> int:
        """Of all texts, at their longest."""
        return 2 * (self.n_pairs or 0) * self.longest

    @property
    def reward_flops(self) -> float:
        return self.n_tokens * _training(self.to_frozen, self.to_top, self.epochs)

    @property
    def compare_flops(self) -> float:
        trained = self.compare_epochs * _FORWARD_AND_BACK * (self.to_top - self.compare_frozen)
        return self.n_tokens * (self.compare_frozen + self.n_trainings * trained)


def reward_work(recipe: BaseRecipe, n_pairs: int | None) -> RewardWork | None:
    """The size of SAFER's stages with so many pairs (None: not known yet); None for a recipe of another kind."""
    if not isinstance(recipe, RewardRecipe):
        return None
    section, path, revision = recipe.reward, recipe.model.path, recipe.model.revision
    n_blocks = section.n_blocks or _n_blocks(path, revision)
    top = f"layers.{n_blocks - 1}"
    parts = {0: 0.0}
    blocks = sorted(
        {n_blocks, *(_frozen(n, n_blocks) for n in (section.trained_blocks, recipe.compare.trained_blocks))}
    )
    size = lm_size(path, tuple(f"layers.{n - 1}" for n in blocks if n), section.max_length, revision=revision)
    parts |= {n: size.flops_per_token[f"layers.{n - 1}"] for n in blocks if n}
    per_block = size.n_parameters / _n_blocks(path, revision)
    kept = section.trained_blocks is None
    return RewardWork(
        n_pairs=n_pairs,
        longest=section.max_length,
        d_model=size.d_in[top],
        to_frozen=parts[_frozen(section.trained_blocks, n_blocks)],
        to_top=parts[n_blocks],
        n_parameters=size.n_parameters,
        n_trained=size.n_parameters if kept else round(per_block * (section.trained_blocks or 0)),
        epochs=section.epochs,
        n_trainings=(1 + _METHODS * (len(recipe.edit.poison) + len(recipe.edit.denoise))) * recipe.compare.seeds,
        compare_frozen=parts[_frozen(recipe.compare.trained_blocks, n_blocks)],
        compare_epochs=recipe.compare.epochs,
        end_tokens=-(-section.max_length // recipe.ends.min_distance),
    )


def _training(frozen: float, top: float, epochs: int) -> float:
    return frozen + epochs * _FORWARD_AND_BACK * (top - frozen)


def _frozen(trained: int | None, n_blocks: int) -> int:
    return 0 if trained is None else n_blocks - trained


def _n_blocks(path: str, revision: str | None) -> int:
    return config_of(path, revision).get_text_config().num_hidden_layers
