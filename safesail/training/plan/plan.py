"""The plan of a job: what it takes, what this machine has, how long it lasts, what to change if it cannot fit."""

import json
import os
import shlex
from pathlib import Path
from typing import Any, NamedTuple

from safesail.distributed import device
from safesail.errors import InputError
from safesail.lm.size import lm_size
from safesail.recipe import BaseRecipe
from safesail.run import Run
from safesail.training.plan.fit import Shortage, needs, shortages, suggestion
from safesail.training.plan.job import Job, groups, n_steps, streamed_tokens, variants
from safesail.training.plan.machine import Room, Speed, check_device, room, speed
from safesail.training.plan.reward import reward_work
from safesail.training.plan.space import Amount, disk, memory, peak
from safesail.training.plan.work import Compute, compute

__all__ = ["Plan", "make_plan", "next_line", "plan_run", "refuse_what_cannot_fit", "waiting"]

_PLANNED = ("reward", "harvest", "train", "ends", "tune", "compare", "build")
_NO_SETTINGS = "No settings make it fit: take a larger machine, a smaller model or fewer processes."


class Plan(NamedTuple):
    """What a job takes. Where there are several ranks, the numbers are those of the rank with most to do."""

    name: str
    device: str
    n_ranks: int
    n_local_ranks: int
    parallel: str
    rank: int
    stages: tuple[str, ...]
    tokens: list[Amount]
    n_saes: int
    n_saes_of_rank: int
    n_steps: int
    compute: list[Compute]
    seconds: list[float]
    """Of each entry of `compute`."""
    memory: list[Amount]
    memory_phase: str
    gpu_memory: list[Amount]
    gpu_memory_phase: str
    disk: list[Amount]
    needs: dict[str, int]
    """Bytes of `memory` (of all ranks on this machine), of `GPU memory` (of a rank) and of `disk` (of all)."""
    room: Room
    speed: Speed
    shortages: list[Shortage]
    changes: dict[str, Any] | None
    """The settings with which a job fits that does not; None if it fits, or if no settings were found."""

    @property
    def fits(self) -> bool:
        return not self.shortages

    @property
    def total_seconds(self) -> float:
        return sum(self.seconds)

    @property
    def total_flops(self) -> float:
        return sum(part.flops for part in self.compute)

    @property
    def limit(self) -> str:
        """What a larger job would run into first: `compute`, `memory`, `GPU memory` or `disk`.

        Memory and disk limit only when four fifths of what is free are needed; else the job is as large as one has
        patience.
        """
        shares = {what: self.needs[what] / max(left, 1) for what, left in self.room.named().items()}
        fullest = max(shares, key=lambda what: shares[what])
        return fullest if shares[fullest] > 0.8 else "compute"

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain JSON values; bytes, FLOPs and seconds as numbers."""
        plain = self._asdict()
        for name in ("tokens", "compute", "memory", "gpu_memory", "disk", "shortages", "room", "speed"):
            value = plain[name]
            plain[name] = [part._asdict() for part in value] if isinstance(value, list) else value._asdict()
        totals = {"total_seconds": self.total_seconds, "total_flops": self.total_flops}
        return {**plain, **totals, "fits": self.fits, "limit": self.limit}


def make_plan(job: Job, free: Room, rates: Speed, where: str = "cpu") -> Plan:
    """The plan of a job on a machine with so much left and of such a speed."""
    seconds = {rank: sum(part.seconds(rates) for part in compute(job, rank)) for rank in range(job.n_ranks)}
    rank = max(seconds, key=lambda rank: seconds[rank])
    host, gpu = memory(job, rank)
    found = shortages(job, free)
    return Plan(
        name=job.recipe.name,
        device=where,
        n_ranks=job.n_ranks,
        n_local_ranks=job.n_local_ranks,
        parallel=job.recipe.runtime.parallel,
        rank=rank,
        stages=tuple(stage for stage in _PLANNED if stage in job.stages),
        tokens=_tokens(job),
        n_saes=sum(len(found) for name in range(_n_shares(job)) for found in variants(job, name).values()),
        n_saes_of_rank=sum(len(group) for group in groups(job, rank)),
        n_steps=n_steps(job.recipe),
        compute=compute(job, rank),
        seconds=[part.seconds(rates) for part in compute(job, rank)],
        memory=peak(host)[1],
        memory_phase=peak(host)[0],
        gpu_memory=peak(gpu)[1],
        gpu_memory_phase=peak(gpu)[0],
        disk=disk(job),
        needs=needs(job),
        room=free,
        speed=rates,
        shortages=found,
        changes=suggestion(job, free) if found else None,
    )


def plan_run(recipe: BaseRecipe, folder: Path, stages: frozenset[str], n_pairs: int | None = None) -> Plan:
    """The plan of making `stages` of a recipe in `folder` on this machine, after timing it for about a second.

    Under torchrun (or where WORLD_SIZE is set) the plan of one of so many ranks. n_pairs: of the preference data.
    """
    job = _job(recipe, folder, stages, n_pairs)
    return make_plan(job, room(recipe, folder), speed(recipe), str(device(recipe.runtime.device)))


def refuse_what_cannot_fit(run: Run, until: str, force: bool = False, n_pairs: int | None = None) -> None:
    """Raise InputError before anything runs if what is still to be made cannot fit, with settings that would.

    Of the processes that torchrun starts on a machine the first one looks, for all: the others would see what it uses.
    n_pairs: of the preference data, where there are any.
    """
    check_device(run.recipe)
    stages = waiting(run, until, force)
    if not stages & set(_PLANNED[:-1]) or os.environ.get("LOCAL_RANK", "0") != "0":
        return
    job, free = _job(run.recipe, run.folder, stages, n_pairs), room(run.recipe, run.folder)
    if found := shortages(job, free):
        changes = suggestion(job, free)
        missing = ", ".join(f"{s.what}: {s.needed / 1e9:,.1f} GB needed, {s.free / 1e9:,.1f} GB free" for s in found)
        advice = f"It would with `{_command(changes, run.folder)}`." if changes else _NO_SETTINGS
        raise InputError(f"this cannot fit here ({missing}). {advice}")


def waiting(run: Run, until: str, force: bool = False) -> frozenset[str]:
    """The stages up to `until` that are not done, or are to be made anew."""
    ahead = list(run.stages)[: list(run.stages).index(until) + 1]
    return frozenset(name for name in ahead if (force and name == until) or run.state(name) != "done")


def next_line(plan: Plan, again: list[str], folder: Path) -> str:
    """What to do after the plan. again: the words of the command that was planned, without --dry-run."""
    if plan.fits:
        return f"next: {shlex.join(again)}"
    if not plan.changes:
        return _NO_SETTINGS
    if again[1] == "run":
        return f"next: {shlex.join(again)} {_options(plan.changes)}"
    return f"next: {_command(plan.changes, folder)}"


def _options(changes: dict[str, Any]) -> str:
    """Settings as they are typed: `--set runtime.saes_at_once=2 --set train.batch_size=512`."""
    return " ".join(f"--set {name}={json.dumps(value)}" for name, value in changes.items())


def _command(changes: dict[str, Any], folder: Path) -> str:
    """The command that goes on in a run's folder with other settings; those of [runtime] may change at any time."""
    adopt = "" if all(name.startswith("runtime.") for name in changes) else " --adopt"
    return f"safesail run RECIPE --out {shlex.quote(str(folder))}{adopt} {_options(changes)}"


def _job(recipe: BaseRecipe, folder: Path, stages: frozenset[str], n_pairs: int | None) -> Job:
    check_device(recipe)
    section, harvest = recipe.model, recipe.harvest
    n_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    return Job(
        recipe=recipe,
        lm=lm_size(section.path, harvest.hook_points, harvest.window, revision=section.revision),
        stages=stages,
        on_gpu=device(recipe.runtime.device).type == "cuda",
        n_ranks=n_ranks,
        n_local_ranks=int(os.environ.get("LOCAL_WORLD_SIZE", str(n_ranks))),
        reward=reward_work(recipe, n_pairs),
        n_bytes_there=sum(_size(folder / "scratch" / f".{name}.partial") for name in stages),
    )


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _n_shares(job: Job) -> int:
    return 1 if job.data_parallel else job.n_ranks


def _tokens(job: Job) -> list[Amount]:
    corpus, train = job.recipe.corpus, job.recipe.train
    each = n_steps(job.recipe) * train.batch_size
    if job.streams:
        how = f"read on the fly; the model reads {streamed_tokens(job):,} for them"
    else:
        how = f"{train.epochs} epoch{'s' if train.epochs > 1 else ''} of the rest, at most"
    return [
        *_preferences(job),
        Amount("corpus", corpus.n_tokens, f"{len(corpus.sources)} source{'s' if len(corpus.sources) > 1 else ''}"),
        Amount("held out", corpus.n_held_out_tokens),
        Amount("training, each SAE", each, how),
    ]


def _preferences(job: Job) -> list[Amount]:
    """The tokens of preference data, where there are any."""
    work = job.reward
    if work is None:
        return []
    if work.n_pairs is None:
        return [Amount("preference data", 0, "of the Hub: not known, not counted below; say n_pairs of every source")]
    return [Amount("preference data", work.n_tokens, f"{work.n_pairs:,} pairs of at most 2 × {work.longest:,}")]
