"""What is to be planned: the sweep as counts, and who trains which part of it."""

import itertools
import math
from typing import NamedTuple

from safesail.lm.size import LmSize
from safesail.recipe import Architecture, BaseRecipe
from safesail.training.plan.reward import RewardWork

__all__ = [
    "ACTIVE_AT_START",
    "BYTES",
    "FP32",
    "Job",
    "Variant",
    "groups",
    "n_entries",
    "n_parameters",
    "n_steps",
    "n_training_tokens",
    "streamed_tokens",
    "variants",
]

FP32 = 4
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
ACTIVE_AT_START = {"relu": 0.023, "jumprelu": 0.067}
"""The share of the latents with an entry in the first steps, where training starts 2 standard deviations below zero
(relu) or has a gradient window from 1.5 on (jumprelu). It falls from there: an upper bound."""


class Variant(NamedTuple):
    """One SAE of the sweep."""

    hook_point: str
    architecture: Architecture
    level: float


class Job(NamedTuple):
    """What is to be planned: the stages still to be made, by how many processes, with the model and SAEs on what."""

    recipe: BaseRecipe
    lm: LmSize
    stages: frozenset[str]
    on_gpu: bool = False
    n_ranks: int = 1
    n_local_ranks: int = 1
    """Those that share this machine's memory."""
    n_bytes_there: int = 0
    """On disk already, of an interrupted attempt."""
    reward: RewardWork | None = None
    """What SAFER's own stages are about; None for another kind of recipe."""

    @property
    def data_parallel(self) -> bool:
        return self.recipe.runtime.parallel == "data" and self.n_ranks > 1

    @property
    def share(self) -> int:
        """Into how many shares a batch is divided."""
        return self.n_ranks if self.data_parallel else 1

    @property
    def streams(self) -> bool:
        return self.recipe.train.stream_tokens is not None


def variants(job: Job, rank: int) -> dict[str, list[Variant]]:
    """The SAEs that a rank trains, by hook point."""
    train, names = job.recipe.train, job.recipe.harvest.hook_points
    mine = names if job.data_parallel else names[rank :: job.n_ranks]
    levels: list[tuple[Architecture, float]]
    levels = [(architecture, level) for architecture in train.architectures for level in train.levels(architecture)]
    return {name: [Variant(name, architecture, level) for architecture, level in levels] for name in mine}


def groups(job: Job, rank: int) -> list[list[Variant]]:
    """The SAEs that a rank trains at once, group after group: those of a hook point, or all where the model streams."""
    per_hook_point = list(variants(job, rank).values())
    found = []
    for together in [list(itertools.chain(*per_hook_point))] if job.streams else per_hook_point:
        size = job.recipe.runtime.saes_at_once or max(len(together), 1)
        found += [together[start : start + size] for start in range(0, len(together), size)]
    return found


def n_training_tokens(recipe: BaseRecipe) -> int:
    """Harvested tokens of documents that are not held out."""
    return recipe.corpus.n_tokens - recipe.corpus.n_held_out_tokens


def n_steps(recipe: BaseRecipe) -> int:
    """Steps of every SAE."""
    train = recipe.train
    if train.stream_tokens is not None:
        return max(train.stream_tokens // train.batch_size, 1)
    return n_training_tokens(recipe) // train.batch_size * train.epochs


def streamed_tokens(job: Job) -> int:
    """Tokens that a rank's model reads in one pass of streaming: whole buffers."""
    train = job.recipe.train
    n_rounds = math.ceil(n_steps(job.recipe) / (train.buffer_tokens // train.batch_size))
    return n_rounds * math.ceil(train.buffer_tokens / job.share)


def n_parameters(job: Job, variant: Variant) -> int:
    """Of an SAE: two matrices, two biases, and the thresholds of jumprelu."""
    d_in, d_sae = job.lm.d_in[variant.hook_point], job.recipe.train.d_sae
    return 2 * d_in * d_sae + d_sae + d_in + (d_sae if variant.architecture == "jumprelu" else 0)


def n_entries(job: Job, variant: Variant) -> float:
    """Active latents per token."""
    share = ACTIVE_AT_START.get(variant.architecture)
    return variant.level if share is None else share * job.recipe.train.d_sae
