"""Whether a job fits into what a machine has left, and if not, which settings make it fit.

A suggestion is searched, not guessed: settings are turned down in the order below, each to the largest value with which
the whole job fits, and every candidate is a valid recipe whose costs have been computed.

    memory: runtime.saes_at_once → train.batch_size → train.buffer_tokens → runtime.windows_per_batch → corpus.n_tokens
            → train.d_sae
    disk:   corpus.n_tokens, what it loses being streamed (train.stream_tokens) → corpus.n_tokens alone
            → runtime.saes_at_once → train.d_sae
"""

import bisect
import copy
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from safesail.errors import InputError
from safesail.recipe import BaseRecipe
from safesail.training.plan.job import Job, groups, n_steps
from safesail.training.plan.machine import Room
from safesail.training.plan.space import disk, memory, peak, total

__all__ = ["Shortage", "fits", "needs", "shortages", "suggestion"]

Changes = dict[str, Any]
Knob = Callable[[Job], list[Changes]]
_SMALLEST_BATCH = 64
_SPARE = 0.95
"""The share of what is free that suggested settings may need."""
_SHARE_MULTIPLE = 4
"""Data-parallel batches divide into equal shares of a multiple of so many tokens."""


class Shortage(NamedTuple):
    """Less is free than is needed: bytes of `memory`, `GPU memory` or `disk`."""

    what: str
    needed: int
    free: int


def needs(job: Job) -> dict[str, int]:
    """Bytes needed of this machine's memory, of each rank's GPU, and of the disk."""
    ranks = [memory(job, rank) for rank in range(job.n_ranks)]
    host = max(total(peak(phases)[1]) for phases, _ in ranks) * job.n_local_ranks
    gpu = max(total(peak(phases)[1]) for _, phases in ranks)
    return {"memory": host, "GPU memory": gpu, "disk": total(disk(job))}


def shortages(job: Job, room: Room) -> list[Shortage]:
    """What there is too little of."""
    needed = needs(job)
    return [Shortage(what, needed[what], left) for what, left in room.named().items() if needed[what] > left]


def fits(job: Job, room: Room) -> bool:
    """Whether there is enough of everything."""
    return not shortages(job, room)


def suggestion(job: Job, room: Room) -> Changes | None:
    """The settings, by their dotted names, with which a job fits that does not; None if there are none.

    First those that save memory, then those that save disk; with a little to spare, since what is free changes.
    """
    room = Room(*(None if left is None else int(_SPARE * left) for left in room))  # type: ignore[arg-type]
    for_memory = _turned_down(job, room._replace(disk=sys.maxsize), _MEMORY_KNOBS)
    if for_memory is None:
        return None
    for_disk = _turned_down(_with(job, for_memory), room, _DISK_KNOBS)
    return None if for_disk is None else for_memory | for_disk


def _turned_down(job: Job, room: Room, knobs: tuple[Knob, ...]) -> Changes | None:
    changes: Changes = {}
    tried: list[list[Changes]] = []
    if fits(job, room):
        return changes
    for knob in knobs:
        options = _valid(job, changes, knob(_with(job, changes)))
        found = _first(options, lambda option, others=changes: fits(_with(job, others | option), room))
        if found is not None:
            return _raised(job, room, changes | found, tried)
        if not options or knob is _stream_instead:  # without streaming fewer tokens may still do
            continue
        if _missing(job, changes | options[-1], room) < _missing(job, changes, room):
            changes = changes | options[-1]
            tried.append(options)
    return None


def _raised(job: Job, room: Room, changes: Changes, tried: list[list[Changes]]) -> Changes:
    """Each setting that was turned all the way down before the one that made it fit, as large as it can be now."""
    for options in tried:
        others = {name: value for name, value in changes.items() if name not in options[-1]}
        unchanged: Changes = {}
        found = _first([unchanged, *options], lambda option, others=others: fits(_with(job, others | option), room))
        changes = others | (options[-1] if found is None else found)
    return changes


def _first(options: list[Changes], good: Callable[[Changes], bool]) -> Changes | None:
    """The first good option of a list in which all after a good one are good as well; None if there is none."""
    at = bisect.bisect_left(options, True, key=good)
    return options[at] if at < len(options) else None


def _missing(job: Job, changes: Changes, room: Room) -> int:
    return sum(shortage.needed - shortage.free for shortage in shortages(_with(job, changes), room))


def _with(job: Job, changes: Changes) -> Job:
    return job._replace(recipe=changed(job.recipe, changes)) if changes else job


def changed(recipe: BaseRecipe, changes: Changes) -> BaseRecipe:
    """The recipe with other settings; InputError if they contradict each other."""
    data = copy.deepcopy(recipe.dump())
    for name, value in changes.items():
        section, _, key = name.partition(".")
        data[section][key] = value
    return type(recipe).parse(data)


def _valid(job: Job, changes: Changes, options: list[Changes]) -> list[Changes]:
    """The options that a recipe may hold: of settings that only get smaller, all up to one that is too small."""
    return options[: bisect.bisect_left(options, True, key=lambda option: not _accepted(job, changes | option))]


def _accepted(job: Job, changes: Changes) -> bool:
    try:
        return n_steps(changed(job.recipe, changes)) > 0
    except InputError:
        return False


# --- the settings, from the present value down -----------------------------------------------------------------------


def _fewer_saes(job: Job) -> list[Changes]:
    largest = max((len(group) for rank in range(job.n_ranks) for group in groups(job, rank)), default=1)
    return [{"runtime.saes_at_once": n} for n in range(largest - 1, 0, -1)]


def _smaller_batch(job: Job) -> list[Changes]:
    multiple = _SHARE_MULTIPLE * job.share if job.share > 1 else 1
    sizes = _halves(job.recipe.train.batch_size, _SMALLEST_BATCH)
    return [{"train.batch_size": size} for size in sizes if size % multiple == 0]


def _smaller_buffer(job: Job) -> list[Changes]:
    train = job.recipe.train
    sizes = _halves(train.buffer_tokens, train.batch_size) if job.streams else []
    return [{"train.buffer_tokens": size} for size in sizes]


def _fewer_windows(job: Job) -> list[Changes]:
    return [{"runtime.windows_per_batch": n} for n in _halves(job.recipe.runtime.windows_per_batch, 1)]


def _stream_instead(job: Job) -> list[Changes]:
    """A smaller corpus on disk, and what it would have trained on read on the fly: no training token is lost."""
    recipe = job.recipe
    if job.streams or "train" not in job.stages:
        return []
    streamed = {"train.stream_tokens": n_steps(recipe) * recipe.train.batch_size, "train.epochs": 1}
    return [option | streamed for option in _fewer_tokens(job)]


def _fewer_tokens(job: Job) -> list[Changes]:
    corpus = job.recipe.corpus
    sizes = _round_numbers(corpus.n_tokens, 2 * corpus.n_held_out_tokens) if "harvest" in job.stages else []
    return [{"corpus.n_tokens": size} for size in sizes]


def _narrower(job: Job) -> list[Changes]:
    return [{"train.d_sae": width} for width in _round_numbers(job.recipe.train.d_sae, 1)]


_MEMORY_KNOBS = (_fewer_saes, _smaller_batch, _smaller_buffer, _fewer_windows, _fewer_tokens, _narrower)
_DISK_KNOBS = (_stream_instead, _fewer_tokens, _fewer_saes, _narrower)


def _halves(value: int, smallest: int) -> list[int]:
    found = []
    while value // 2 >= smallest:
        value //= 2
        found.append(value)
    return found


def _round_numbers(value: int, smallest: int) -> list[int]:
    """Numbers of three digits that count, from just below `value` down to `smallest`."""
    found = []
    while (value := _rounded_below(value)) >= smallest:
        found.append(value)
    return found


def _rounded_below(value: int) -> int:
    unit = max(10 ** (len(str(value - 1)) - 3), 1)
    return (value - 1) // unit * unit
