"""The arithmetic of harvesting and training: FLOPs, bytes moved, and from a machine's rates seconds.

    encoder      2 · d_in · d_sae FLOPs a token: the forward product of every SAE; its backward is sparse
    active part  8 · d_in FLOPs an active entry: decoding it, its gradient, and its share of two weight gradients

Reviving dead latents (AuxK) is left out: it costs up to a quarter of a step while many are dead.
"""

import math
from collections.abc import Iterable
from typing import NamedTuple

from safesail.training.plan.job import (
    ACTIVE_AT_START,
    FP32,
    Job,
    Variant,
    groups,
    n_entries,
    n_parameters,
    n_steps,
    streamed_tokens,
    variants,
)
from safesail.training.plan.machine import Speed

__all__ = ["Compute", "compute"]

# On two AVX2 cores with torch 2.13, quiet: product 179 GFLOP/s, copy 36 GB/s. On a GPU nothing has been measured yet:
# there these factors are assumptions.

LM_EFFICIENCY = 0.9
"""Of the product's rate. SmolLM2-135M to layers.15.mlp, 8 windows of 256 tokens: 1,353 tokens/s × 122.7 MFLOP = 0.93;
a whole harvest with its texts and shards: 1,270 tokens/s."""
ENCODER_EFFICIENCY = 1.0
"""Of the product's rate: batch 4096, 576 × 4608 at 174 GFLOP/s."""
ENTRY_PASSES = 2.5
"""Times that d_in numbers are moved for each active entry. With the next two factors a topk step comes to
0.21 s at 576 → 4608, k 32, batch 4096 (measured 0.21), 0.26 s at k 64 (0.27), 0.36 s at k 200 (0.32),
and 0.93 s at 2048 → 20480, k 64, batch 1024 (1.12)."""
PARAMETER_PASSES = 40
"""Times that the parameters are moved in a step: fresh gradients, projection, clipping, Adam, unit norm."""
CHOICE_PASSES = {"relu": 25.0, "jumprelu": 25.0, "batchtopk": 30.0, "matryoshka": 30.0}
"""Times that the pre-activations are moved to find the active ones; of topk 10 + 0.15 k."""


class Compute(NamedTuple):
    """Arithmetic of one kind: what runs as matrix products, and what is bound by moving numbers."""

    what: str
    flops: float
    product_flops: float
    """Those done as matrix products, divided by the share of the product's rate that they reach."""
    moved_bytes: float
    note: str = ""
    by_model: bool = False
    """Whether the language model computes it, in its own dtype, or an SAE in fp32."""

    def seconds(self, speed: Speed) -> float:
        rate = speed.model_flops_per_second if self.by_model else speed.flops_per_second
        return self.product_flops / rate + self.moved_bytes / speed.bytes_per_second


def compute(job: Job, rank: int) -> list[Compute]:
    """What a rank computes, in the order in which it does."""
    found = _reward(job)
    if "harvest" in job.stages:
        n_tokens = math.ceil(job.recipe.corpus.n_tokens / job.n_ranks)
        found.append(_language_model(job, "harvest: model", n_tokens, job.recipe.harvest.hook_points))
    if "train" in job.stages:
        if job.streams:
            found += _streaming(job, groups(job, rank))
        found += _training(job, rank)
    return [*found, *_after_training(job)]


def _reward(job: Job) -> list[Compute]:
    """Training SAFER's reward model."""
    work = job.reward
    if work is None or "reward" not in job.stages:
        return []
    note = f"{work.epochs} epochs, {work.n_trained / 1e6:,.0f} M of {work.n_parameters / 1e6:,.0f} M weights trained"
    return [_passes("reward: model", work.reward_flops / job.n_ranks, note)]


def _after_training(job: Job) -> list[Compute]:
    """SAFER's stages after the SAE's first step."""
    work, found = job.reward, []
    if work is None:
        return []
    (hook_point,) = job.recipe.harvest.hook_points
    if "ends" in job.stages:
        flops = work.n_tokens * job.lm.flops_per_token[hook_point] / job.n_ranks
        found.append(_passes("ends: model", flops, f"to {hook_point}"))
    if "compare" in job.stages:
        found.append(_passes("compare: model", work.compare_flops, f"{work.n_trainings} trainings on one frozen part"))
    return found


def _passes(what: str, flops: float, note: str) -> Compute:
    """Passes of the language model, with what its attention takes in windows of the longest text."""
    return Compute(what, flops, flops / LM_EFFICIENCY, 0.0, note, by_model=True)


def _streaming(job: Job, passes: list[list[Variant]]) -> list[Compute]:
    n_tokens = streamed_tokens(job)
    read = [_language_model(job, "", n_tokens, [v.hook_point for v in group]) for group in passes]
    if not read:
        return []
    note = f"{len(passes)} passes over {n_tokens:,} tokens" if len(passes) > 1 else read[0].note
    flops, product = sum(part.flops for part in read), sum(part.product_flops for part in read)
    return [Compute("train: model, on the fly", flops, product, 0.0, note, by_model=True)]


def _language_model(job: Job, what: str, n_tokens: int, hook_points: Iterable[str]) -> Compute:
    deepest = max(hook_points, key=lambda name: job.lm.flops_per_token[name])
    flops = n_tokens * job.lm.flops_per_token[deepest]
    per_token = f"{job.lm.flops_per_token[deepest] / 1e6:,.1f} MFLOP a token to {deepest}"
    return Compute(what, flops, flops / LM_EFFICIENCY, 0.0, per_token, by_model=True)


def _training(job: Job, rank: int) -> list[Compute]:
    by_architecture: dict[str, list[Variant]] = {}
    for found in variants(job, rank).values():
        for variant in found:
            by_architecture.setdefault(variant.architecture, []).append(variant)
    return [_steps(job, architecture, found) for architecture, found in by_architecture.items()]


def _steps(job: Job, architecture: str, found: list[Variant]) -> Compute:
    parts = [_step(job, variant) for variant in found]
    times = n_steps(job.recipe)
    flops, product, moved = (times * sum(part[i] for part in parts) for i in range(3))
    share = 100 * times * sum(part[1] for part in parts) * ENCODER_EFFICIENCY / flops
    note = f"{share:.0f} % in the encoder's products"
    if architecture in ACTIVE_AT_START:
        note += "; active latents as at the start, an upper bound"
    return Compute(f"train: {len(found)} × {architecture}", flops, product, moved, note)


def _step(job: Job, variant: Variant) -> tuple[float, float, float]:
    """FLOPs, FLOPs as products at their rate, and bytes moved by one step of one SAE."""
    train, d_in = job.recipe.train, job.lm.d_in[variant.hook_point]
    n_tokens = math.ceil(train.batch_size / job.share)
    encoder = 2.0 * n_tokens * d_in * train.d_sae
    entries = n_tokens * n_entries(job, variant)
    choice = CHOICE_PASSES.get(variant.architecture, 10 + 0.15 * variant.level)
    moved = ENTRY_PASSES * entries * d_in + choice * n_tokens * train.d_sae
    moved += PARAMETER_PASSES * n_parameters(job, variant)
    return encoder + 8 * entries * d_in, encoder / ENCODER_EFFICIENCY, FP32 * moved
