"""Bytes of memory and disk that harvesting and training hold.

memory       parameters and two Adam moments of all SAEs trained at once, the gradients of the one that steps
disk         the shards, twice the state of the SAEs trained at once, the weights
"""

import math
from typing import NamedTuple

from safesail.training.plan.job import BYTES, FP32, Job, Variant, groups, n_entries, n_parameters, n_training_tokens
from safesail.training.step import SaeTrainer

__all__ = ["Amount", "disk", "memory", "peak", "total"]

_TEXT_BYTES = 60
"""Per token while texts are gathered: Python lists of ids and roles."""
_READER_BYTES = 110
"""Per token of a finished harvest: the same lists, and tensors of ids, roles, pieces, norms, row numbers, an order."""
_ENTRY_BYTES = 48
"""Per active entry in a step: values, gradients, indices, and the sort by latent."""
_BATCH_COPIES = 6
"""The batch as stored, scaled, centred, decoded, its error and the error's gradient."""
_ROUNDS_HELD = 2
"""While a round of the stream is read, the one before is still held."""
_SAMPLE_ROWS, _SAMPLE_BYTES = 65536, 12
"""Scale and mean are taken from so many rows, in fp32 and fp64."""
_WINDOWS_PER_SHARD = 64
_LIBRARIES = 300_000_000
"""What libraries and the allocator take beyond what is counted."""


class Amount(NamedTuple):
    """So much of something, in bytes or tokens."""

    what: str
    amount: int
    note: str = ""


def total(items: list[Amount]) -> int:
    """The sum of the amounts."""
    return sum(item.amount for item in items)


def peak(phases: dict[str, list[Amount]]) -> tuple[str, list[Amount]]:
    """The phase that holds most, and what it holds; ("", []) if there is none."""
    return max(phases.items(), key=lambda phase: total(phase[1]), default=("", []))


def memory(job: Job, rank: int) -> tuple[dict[str, list[Amount]], dict[str, list[Amount]]]:
    """Bytes that a rank holds at the same time, by phase: in the machine's memory, and in the GPU's.

    Without a GPU all is in the first. A phase is `the harvest`, `the start of training` (scale and mean) or `training`.
    """
    host: dict[str, list[Amount]] = {}
    device: dict[str, list[Amount]] = {}
    if "reward" in job.stages and job.reward is not None:
        host["training the reward model"], device["training the reward model"] = _frozen_states(job), _reward(job)
    if "harvest" in job.stages:
        host["the harvest"], device["the harvest"] = [*_gathered(job), *_loading(job)], [*_model(job), _forward(job)]
    if "train" in job.stages and (training := groups(job, rank)):
        largest = max(training, key=lambda group: total(_saes(job, group)))
        loaded = _model(job) if job.streams or "harvest" in job.stages else []
        running = [_forward(job)] if job.streams else []
        host["the start of training"], device["the start of training"] = [_reader(job), _sample(job, largest)], loaded
        host["training"] = [_reader(job), *_stream_buffer(job, largest)]
        device["training"] = [*loaded, *running, *_saes(job, largest)]
    if job.on_gpu:
        return _with_libraries(host), _with_libraries(device)
    return _with_libraries({phase: [*host[phase], *device[phase]] for phase in host}), {}


def _with_libraries(phases: dict[str, list[Amount]]) -> dict[str, list[Amount]]:
    return {phase: [*items, Amount("libraries, allocator", _LIBRARIES)] for phase, items in phases.items()}


def _model(job: Job) -> list[Amount]:
    dtype = job.recipe.model.dtype
    return [Amount("language model", job.lm.n_parameters * BYTES[dtype], f"{job.lm.n_parameters:,} weights, {dtype}")]


def _reward(job: Job) -> list[Amount]:
    """A reward model in training: its weights, and of those that are trained a gradient and two moments, all fp32."""
    work = job.reward
    assert work is not None
    return [
        Amount("reward model", work.n_parameters * FP32, f"{work.n_parameters:,} weights"),
        Amount("gradients, Adam moments", 3 * work.n_trained * FP32, f"of {work.n_trained:,} trained weights"),
    ]


def _frozen_states(job: Job) -> list[Amount]:
    """What the frozen part gives for every token, kept for all epochs; nothing where all is trained."""
    work = job.reward
    if work is None or not work.to_frozen:
        return []
    return [Amount("states of the frozen part", work.n_tokens * work.d_model * FP32, f"{work.n_tokens:,} tokens")]


def _loading(job: Job) -> list[Amount]:
    return [item._replace(what="language model while it is loaded") for item in _model(job)] if job.on_gpu else []


def _forward(job: Job) -> Amount:
    """Residual stream, queries, keys, values and the block's wide activations of a batch of windows; its masks."""
    lm, window, n_windows = job.lm, job.recipe.harvest.window, job.recipe.runtime.windows_per_batch
    per_token = (8 * lm.d_model + 3 * lm.widest) * BYTES[job.recipe.model.dtype] + sum(lm.d_in.values()) * FP32
    masks = n_windows * window * window * (1 + FP32)
    return Amount("a batch in the model", n_windows * window * per_token + masks, f"{n_windows} windows of {window}")


def _gathered(job: Job) -> list[Amount]:
    recipe = job.recipe
    shard = _WINDOWS_PER_SHARD * recipe.harvest.window * _stored_bytes_per_token(job)
    return [
        Amount("texts as tokens", recipe.corpus.n_tokens * _TEXT_BYTES),
        Amount("a shard, in parts and joined", 2 * shard),
    ]


def _reader(job: Job) -> Amount:
    return Amount("tokens and statistics of the harvest", job.recipe.corpus.n_tokens * _READER_BYTES)


def _sample(job: Job, group: list[Variant]) -> Amount:
    n_rows = min(n_training_tokens(job.recipe), _SAMPLE_ROWS)
    widest = max(job.lm.d_in[variant.hook_point] for variant in group)
    return Amount("rows for scale and mean", n_rows * widest * _SAMPLE_BYTES, f"{n_rows:,} rows")


def _stream_buffer(job: Job, group: list[Variant]) -> list[Amount]:
    if not job.streams:
        return []
    width = sum(job.lm.d_in[name] for name in {variant.hook_point for variant in group})
    n_tokens = math.ceil(job.recipe.train.buffer_tokens / job.share)
    amount = _ROUNDS_HELD * n_tokens * width * BYTES[job.recipe.harvest.dtype]
    return [Amount("stream buffer", amount, f"{_ROUNDS_HELD} rounds of {n_tokens:,} tokens")]


def _saes(job: Job, group: list[Variant]) -> list[Amount]:
    train = job.recipe.train
    sizes = [n_parameters(job, variant) for variant in group]
    n_tokens, d_sae, d_in = math.ceil(train.batch_size / job.share), train.d_sae, _widths(job, group)
    nested = len(train.nested_widths) if any(v.architecture == "matryoshka" for v in group) else 0
    entries = math.ceil(max(n_entries(job, variant) for variant in group))
    n, rows = len(group), max(SaeTrainer.rows_at_once(variant.architecture, n_tokens) for variant in group)
    return [
        Amount("SAE parameters", sum(sizes) * FP32, f"{n} SAEs at once, {max(sizes):,} parameters each"),
        Amount("Adam moments", 2 * sum(sizes) * FP32 + 8 * n * d_sae, "two; tokens since each latent fired"),
        Amount("gradients", max(sizes) * FP32, "of the SAE that steps"),
        Amount("pre-activations", rows * d_sae * FP32, f"one buffer for all, {rows:,} × {d_sae:,}"),
        Amount("active entries", n_tokens * entries * _ENTRY_BYTES, f"{entries:,} a token"),
        Amount("batch", n_tokens * (_BATCH_COPIES * sum(d_in) + 3 * nested * max(d_in)) * FP32),
    ]


def _widths(job: Job, group: list[Variant]) -> list[int]:
    return [job.lm.d_in[name] for name in {variant.hook_point for variant in group}]


def disk(job: Job) -> list[Amount]:
    """Bytes that all ranks together will write into the run's folder, less what is there already."""
    ranks = [groups(job, rank) for rank in range(1 if job.data_parallel else job.n_ranks)]
    everyone = [variant for found in ranks for group in found for variant in group]
    weights = sum(n_parameters(job, variant) for variant in everyone) * FP32
    found = []
    if "harvest" in job.stages:
        n_tokens = job.recipe.corpus.n_tokens
        note = f"{_stored_bytes_per_token(job):,} B a token, {job.recipe.harvest.dtype}"
        found.append(Amount("activation shards", n_tokens * _stored_bytes_per_token(job), note))
    if job.reward is not None:
        found += _of_reward(job)
    if "train" in job.stages:
        checkpoints = 2 * sum(max((_state_bytes(job, group) for group in found), default=0) for found in ranks)
        found.append(Amount("checkpoints", checkpoints, "the last one, and the next while it is written"))
        found.append(Amount("weights", weights, f"{len(everyone)} SAEs"))
    if "build" in job.stages:
        found.append(Amount("weights in the release", weights))
    if job.n_bytes_there:
        found.append(Amount("there already", -min(job.n_bytes_there, total(found))))
    return found


def _of_reward(job: Job) -> list[Amount]:
    """What SAFER's own stages write."""
    work, found = job.reward, []
    assert work is not None
    (width,) = job.lm.d_in.values()
    if "reward" in job.stages:
        found.append(Amount("reward model and checkpoint", (work.n_parameters + 3 * work.n_trained) * FP32))
    if "ends" in job.stages:
        n_ends = 2 * (work.n_pairs or 0) * work.end_tokens
        amount = n_ends * (width * BYTES[job.recipe.harvest.dtype] + FP32)
        found.append(Amount("segment ends", amount, f"at most {n_ends:,}"))
    if "build" in job.stages:
        found.append(Amount("reward model in the release", work.n_parameters * FP32))
    return found


def _stored_bytes_per_token(job: Job) -> int:
    """An activation and its fp32 norm at each hook point, the token's id twice (shard and table) and its role."""
    per_hook_point = [d_in * BYTES[job.recipe.harvest.dtype] + FP32 for d_in in job.lm.d_in.values()]
    return sum(per_hook_point) + 9


def _state_bytes(job: Job, group: list[Variant]) -> int:
    """Parameters, two moments and a 64-bit counter per latent."""
    sizes = sum(n_parameters(job, variant) for variant in group)
    return 3 * sizes * FP32 + 8 * len(group) * job.recipe.train.d_sae
