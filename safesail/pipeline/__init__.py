"""The stages in their order, each given what it reads: the one place that knows the whole."""

from collections.abc import Callable

from safesail.interpretation.budget import Budget
from safesail.pipeline.base import BasePipeline
from safesail.pipeline.safe_sail import Pipeline
from safesail.pipeline.safer import RewardPipeline
from safesail.recipe import Recipe
from safesail.reward_recipe import RewardRecipe
from safesail.run import Run

__all__ = ["Pipeline", "RewardPipeline", "outside_inputs", "pipeline_of"]


def pipeline_of(run: Run, say: Callable[[str], None] = lambda line: None, budget: Budget | None = None) -> BasePipeline:
    """The pipeline that makes a run of its kind."""
    kind = RewardPipeline if isinstance(run.recipe, RewardRecipe) else Pipeline
    return kind(run, say, budget)


def outside_inputs(recipe: Recipe | RewardRecipe) -> dict[str, str]:
    """The fingerprints of everything outside the recipe that its release depends on."""
    if isinstance(recipe, RewardRecipe):
        return RewardPipeline.outside_inputs(recipe)
    return Pipeline.outside_inputs(recipe)
