"""The sweep: every sparsity level at every hook point, trained on the same activations.

Reads the harvest. Writes `<hook point>/<variant>/{cfg.json, sae_weights.safetensors}` and `log.jsonl`.
While it works: `checkpoint.safetensors`, the exact state of the hook point in training.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from safesail.errors import InputError
from safesail.lm.activations import Activations
from safesail.progress import bar
from safesail.recipe import Recipe
from safesail.run import StageWork
from safesail.sae.config import SaeConfig
from safesail.training.step import SaeTrainer, StepFacts, generator

__all__ = ["batches", "train_stage", "variants"]

_MEAN_ROWS = 65536
_FINISHED = "finished"


def train_stage(recipe: Recipe, activations: Activations, work: StageWork) -> None:
    """Train all SAEs of the recipe; an interrupted call goes on at the last checkpoint and gives the same bytes."""
    saved = {}
    for hook_point in activations.hook_points:
        if not (work.folder / hook_point / _FINISHED).is_file():
            _train_hook_point(recipe, activations, hook_point, work.folder)
        saved[hook_point] = [config.variant for config in variants(recipe, activations, hook_point)]
    (work.folder / "checkpoint.safetensors").unlink(missing_ok=True)
    work.facts["saes"] = saved
    work.facts["n_training_tokens"] = {
        name: len(_rows(recipe, activations, name)) * recipe.train.epochs for name in activations.hook_points
    }


def variants(recipe: Recipe, activations: Activations, hook_point: str) -> list[SaeConfig]:
    """The configs of the sweep at one hook point, in the recipe's order."""
    return [
        SaeConfig(
            d_in=activations.facts["d_in"][hook_point],
            d_sae=recipe.train.d_sae,
            k=k,
            hook_point=hook_point,
            model_name=recipe.model.name,
            token_policy=recipe.tokens,
            median_norm=activations.facts["median_norm"][hook_point],
        )
        for k in recipe.train.k
    ]


def batches(rows: Tensor, recipe: Recipe, hook_point: str, start: int) -> Iterator[Tensor]:
    """The row numbers of every step from step `start` on; each epoch visits the rows in an order of its own."""
    per_epoch = len(rows) // recipe.train.batch_size
    for epoch in range(start // per_epoch, recipe.train.epochs):
        order = rows[torch.randperm(len(rows), generator=generator(recipe.seed, "epoch", hook_point, epoch))]
        first = start - epoch * per_epoch if epoch == start // per_epoch else 0
        for i in range(first, per_epoch):
            yield order[i * recipe.train.batch_size : (i + 1) * recipe.train.batch_size]


def _train_hook_point(recipe: Recipe, activations: Activations, hook_point: str, folder: Path) -> None:
    rows = _rows(recipe, activations, hook_point)
    n_steps = len(rows) // recipe.train.batch_size * recipe.train.epochs
    scale, mean = _scale_and_mean(activations, hook_point, rows, recipe.seed)
    trainers = [
        SaeTrainer(config, recipe.train, mean, recipe.seed, n_steps)
        for config in variants(recipe, activations, hook_point)
    ]
    checkpoint = _Checkpoint(folder / "checkpoint.safetensors", hook_point, recipe.runtime.checkpoint_seconds)
    done = checkpoint.restore(trainers)
    log = _Log(folder / "log.jsonl", hook_point, done)
    with bar(f"train {hook_point}", n_steps * len(trainers), "step") as progress:
        progress.update(done * len(trainers))
        for step, indices in enumerate(batches(rows, recipe, hook_point, done), start=done + 1):
            x = activations.rows(hook_point, indices) * scale
            for trainer in trainers:
                facts = trainer.step(x)
                if not torch.isfinite(facts.fvu):
                    raise InputError(
                        f"the loss of {trainer.config.sae_id} is {float(facts.fvu)} at step {step}; "
                        "lower train.learning_rate and run the same command again."
                    )
                if step % 50 == 0 or step == n_steps:
                    log.write(trainer.config.sae_id, step, facts)
                progress.update(1)
            progress.set_postfix_str(f"fvu {float(facts.fvu):.3f} dead {facts.n_dead}", refresh=False)
            checkpoint.save_if_due(trainers)
    for trainer in trainers:
        trainer.finish(scale).save(folder / trainer.config.sae_id)
    (folder / hook_point / _FINISHED).touch()


class _Checkpoint:
    """The exact state of all trainers of a hook point, written every so many seconds."""

    def __init__(self, path: Path, hook_point: str, seconds: float) -> None:
        self.path, self.hook_point, self.seconds = path, hook_point, seconds
        self._last = time.monotonic()

    def save_if_due(self, trainers: list[SaeTrainer]) -> None:
        if time.monotonic() - self._last < self.seconds:
            return
        tensors = {f"{i}/{key}": value for i, t in enumerate(trainers) for key, value in t.state().items()}
        temporary = self.path.with_suffix(".new")
        save_file(tensors, temporary, metadata={"hook_point": self.hook_point})
        temporary.rename(self.path)
        self._last = time.monotonic()

    def restore(self, trainers: list[SaeTrainer]) -> int:
        """Load the state if it is this hook point's; returns the number of steps done."""
        if not self.path.is_file():
            return 0
        with safe_open(self.path, framework="pt") as handle:
            if handle.metadata()["hook_point"] != self.hook_point:
                return 0
        tensors = load_file(self.path)
        for i, trainer in enumerate(trainers):
            prefix = f"{i}/"
            trainer.load_state({key.removeprefix(prefix): v for key, v in tensors.items() if key.startswith(prefix)})
        return trainers[0].n_done


def _rows(recipe: Recipe, activations: Activations, hook_point: str) -> Tensor:
    keep = activations.counted(hook_point, recipe.tokens) & ~activations.rows_held_out()
    rows = keep.nonzero().flatten()
    if len(rows) < recipe.train.batch_size:
        raise InputError(
            f"{len(rows):,} training tokens at {hook_point} do not fill one batch of {recipe.train.batch_size:,}; "
            "raise corpus.n_tokens or lower train.batch_size."
        )
    return rows


def _scale_and_mean(activations: Activations, hook_point: str, rows: Tensor, seed: int) -> tuple[float, Tensor]:
    """The factor that makes the mean norm √d_in, and the mean of the scaled activations: (d_in,)."""
    sample = rows[torch.randperm(len(rows), generator=generator(seed, "mean", hook_point))[:_MEAN_ROWS]]
    x = activations.rows(hook_point, sample)
    scale = x.shape[1] ** 0.5 / float(x.norm(dim=1).double().mean())
    return scale, x.double().mean(0).float() * scale


class _Log:
    """The training curve, one JSON line per logged step; lines after the step we resume from are dropped."""

    def __init__(self, path: Path, hook_point: str, done: int) -> None:
        self.path = path
        if path.is_file():
            lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
            kept = [line for line in lines if not line["sae"].startswith(f"{hook_point}/") or line["step"] <= done]
            path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def write(self, sae_id: str, step: int, facts: StepFacts) -> None:
        numbers = {"fvu": float(facts.fvu), "aux": float(facts.auxiliary), "dead": facts.n_dead}
        with open(self.path, "a", encoding="utf-8") as handle:
            handle.write(json.dumps({"sae": sae_id, "step": step, **numbers}) + "\n")
