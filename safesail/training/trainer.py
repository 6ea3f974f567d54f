"""The sweep: every architecture and sparsity level at every hook point, trained on the same activations.

Reads the harvest, and the model where activations are streamed. Writes `<hook point>/<variant>/{cfg.json,
sae_weights.safetensors}` and `logs/<hook point>/<variant>.jsonl`. While it works: `checkpoint-….safetensors`, the exact
state of the SAEs in training. A finished SAE is its folder.
"""

import contextlib
import itertools
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from safesail.distributed import ALONE, Ranks, device
from safesail.errors import InputError
from safesail.files import replacing, write_tensors
from safesail.lm.shards import MADE_ANEW
from safesail.progress import bar
from safesail.recipe import BaseRecipe
from safesail.run import StageWork
from safesail.sae.config import SaeConfig
from safesail.sae.model import Sae
from safesail.sae.norm import norm_of
from safesail.training.sources import Rows, Shards, TrainingSource, scale_and_mean, training_rows
from safesail.training.step import Buffer, Diverged, SaeTrainer, StepFacts, total_variance

__all__ = ["check_shares", "train_stage", "variants"]

_LOG_EVERY = 50


def train_stage(
    recipe: BaseRecipe,
    activations: Rows,
    work: StageWork,
    source: TrainingSource | None = None,
    ranks: Ranks = ALONE,
    start: Mapping[str, Sae] | None = None,
) -> None:
    """Train all SAEs of the recipe; an interrupted call goes on at the last checkpoint and gives the same bytes.

    `start`: {sae_id: the SAE to go on from} instead of a random start, with a fresh optimizer. `source` is where the
    batches come from (default: the harvested activations). With several ranks each trains its own hook points, or all
    train every SAE on shares of its batches (`runtime.parallel`).
    """
    shared = recipe.runtime.parallel == "data"
    team = ranks if shared else ALONE
    check_shares(recipe, team)
    source = source or Shards(recipe, activations, team)
    every = activations.hook_points
    names = every if shared else [every[i] for i in ranks.mine(len(every))]
    for group in _groups(recipe, activations, names, source.together):
        unfinished = [config for config in group if not (work.folder / config.sae_id).is_dir()]
        if unfinished:
            _Group(recipe, activations, source, unfinished, work.folder, team, start or {}).train()
    ranks.wait()
    if ranks.first:
        _remove_leftovers(work.folder)
    work.facts["saes"] = {name: [config.variant for config in variants(recipe, activations, name)] for name in every}
    work.facts["n_training_tokens"] = {name: source.n_steps(name) * recipe.train.batch_size for name in every}


def variants(recipe: BaseRecipe, activations: Rows, hook_point: str) -> list[SaeConfig]:
    """The configs of the sweep at one hook point: for each architecture each of its sparsity levels."""
    return [
        SaeConfig(
            d_in=activations.facts["d_in"][hook_point],
            d_sae=recipe.train.d_sae,
            hook_point=hook_point,
            architecture=architecture,
            k=None if architecture in ("relu", "jumprelu") else int(level),
            coefficient=level if architecture in ("relu", "jumprelu") else None,
            model_name=recipe.subject,
            token_policy=recipe.tokens,
            median_norm=activations.facts["median_norm"][hook_point],
            normalize_activations=recipe.normalize_activations,
        )
        for architecture in recipe.train.architectures
        for level in recipe.train.levels(architecture)
    ]


def _groups(recipe: BaseRecipe, activations: Rows, hook_points: list[str], together: bool) -> Iterator[list[SaeConfig]]:
    """The SAEs that are trained at a time: those of a hook point, or all where one pass of the model serves them."""
    per_hook_point = [variants(recipe, activations, name) for name in hook_points]
    for configs in [list(itertools.chain(*per_hook_point))] if together else per_hook_point:
        size = recipe.runtime.saes_at_once or len(configs)
        for start in range(0, len(configs), max(size, 1)):
            yield configs[start : start + size]


def check_shares(recipe: BaseRecipe, team: Ranks) -> None:
    """Raise InputError if the ranks cannot share batches equally."""
    share = SaeTrainer.AUX_STRIDE * team.size
    if team.size > 1 and recipe.train.batch_size % share:
        raise InputError(
            f"train.batch_size = {recipe.train.batch_size} does not divide into {team.size} equal shares of a multiple "
            f"of {SaeTrainer.AUX_STRIDE} tokens; give a multiple of {share}."
        )


def _remove_leftovers(folder: Path) -> None:
    """Remove what killed attempts left: checkpoints of other groups, and files that safetensors was writing."""
    for pattern in ("*checkpoint-*", ".tmp*"):
        for path in folder.glob(pattern):
            path.unlink()


class _Group:
    """SAEs trained side by side on the same batches; each as if it were alone."""

    def __init__(
        self,
        recipe: BaseRecipe,
        activations: Rows,
        source: TrainingSource,
        configs: list[SaeConfig],
        folder: Path,
        ranks: Ranks,
        start: Mapping[str, Sae],
    ) -> None:
        self.source, self.folder, self.ranks = source, folder, ranks
        self.hook_points = tuple(dict.fromkeys(config.hook_point for config in configs))
        self.n_steps = source.n_steps(self.hook_points[0])
        self.device = device(recipe.runtime.device)
        self.normalisation = recipe.normalize_activations
        self.scales: dict[str, float] = {}
        means: dict[str, Tensor] = {}
        for name in self.hook_points:
            rows = training_rows(recipe, activations, name)
            self.scales[name], means[name] = scale_and_mean(activations, name, rows, recipe.seed, self.normalisation)
        buffer = Buffer()
        self.trainers = [
            SaeTrainer(c, recipe.train, means[c.hook_point], recipe.seed, self.n_steps, ranks, self.device, buffer)
            for c in configs
        ]
        for trainer in self.trainers:
            if trainer.config.sae_id in start:
                trainer.start_from(start[trainer.config.sae_id], self.scales[trainer.config.hook_point])
        self.checkpoint = _Checkpoint(folder, self.trainers, recipe.runtime.checkpoint_seconds)

    def train(self) -> None:
        done = self.checkpoint.restore()
        logs = [_Log(self.folder / "logs" / f"{t.config.sae_id}.jsonl", done, self.ranks.first) for t in self.trainers]
        label = f"train {self.hook_points[0] if len(self.hook_points) == 1 else f'{len(self.hook_points)} hook points'}"
        with bar(label, self.n_steps * len(self.trainers), "step") as progress:
            progress.update(done * len(self.trainers))
            for step, batch in enumerate(self.source.batches(self.hook_points, done), start=done + 1):
                for trainer, log, facts in zip(self.trainers, logs, self._step(batch, step), strict=True):
                    if step % _LOG_EVERY == 0 or step == self.n_steps:
                        log.write(step, facts)
                    progress.update(1)
                    progress.set_postfix_str(f"fvu {facts.fvu:.3f} dead {facts.n_dead}", refresh=False)
                    assert trainer.n_done == step
                if self.ranks.first and self.checkpoint.is_due():
                    self._check_weights()
                    self.checkpoint.save()
        assert all(trainer.n_done == self.n_steps for trainer in self.trainers)
        self._check_weights()
        self._finish()

    def _step(self, batch: dict[str, Tensor], step: int) -> Iterator[StepFacts]:
        inputs = {name: self._scaled(name, x.to(self.device)) for name, x in batch.items()}
        totals = {name: total_variance(x, self.ranks) for name, x in inputs.items()}
        for trainer in self.trainers:
            name = trainer.config.hook_point
            if not totals[name].isfinite():
                raise InputError(
                    f"{trainer.config.sae_id} cannot take step {step:,} of {self.n_steps:,}: the batch holds values "
                    f"that are not finite. {self.checkpoint.where()} Make the harvest anew: {MADE_ANEW}."
                )
            try:
                yield trainer.step(inputs[name], totals[name])
            except Diverged as error:
                raise self._diverged(trainer, step, str(error)) from error

    def _scaled(self, hook_point: str, x: Tensor) -> Tensor:
        return norm_of(x, self.normalisation).apply(x) * self.scales[hook_point]

    def _check_weights(self) -> None:
        """Nothing is kept of an SAE whose weights have left the finite numbers since the last check."""
        for trainer in self.trainers:
            if not all(value.isfinite().all() for value in trainer.parameters().values()):
                raise self._diverged(trainer, trainer.n_done, "a weight is not finite")

    def _diverged(self, trainer: SaeTrainer, step: int, reason: str) -> InputError:
        return InputError(
            f"{trainer.config.sae_id} diverges at step {step:,} of {self.n_steps:,} ({reason}). "
            f"{self.checkpoint.where()} Lower train.learning_rate and run again."
        )

    def _finish(self) -> None:
        if self.ranks.first:
            for trainer in self.trainers:
                final = self.folder / trainer.config.sae_id
                temporary = final.with_name(f".{final.name}.new")
                shutil.rmtree(temporary, ignore_errors=True)  # of a killed attempt, with files of any name in it
                trainer.finish(self.scales[trainer.config.hook_point]).save(temporary)
                temporary.rename(final)
            self.checkpoint.tidy()
        self.ranks.wait()


class _Checkpoint:
    """The exact state of the SAEs in training, written every so many seconds."""

    def __init__(self, folder: Path, trainers: list[SaeTrainer], seconds: float) -> None:
        self.folder, self.trainers, self.seconds = folder, trainers, seconds
        self.ids = [trainer.config.sae_id for trainer in trainers]
        # of its own for every group, so that trying another saes_at_once leaves what other SAEs have reached
        self.path = folder / f"checkpoint-{self.ids[0].replace('/', '--')}-and-{len(trainers) - 1}.safetensors"
        self._last, self._kept, self._saved = time.monotonic(), self.path, 0

    def is_due(self) -> bool:
        return time.monotonic() - self._last >= self.seconds

    def save(self) -> None:
        tensors = {f"{t.config.sae_id}|{key}": value for t in self.trainers for key, value in t.state().items()}
        write_tensors(self.path, tensors)
        self._last, self._kept, self._saved = time.monotonic(), self.path, self.trainers[0].n_done
        self.tidy()

    def restore(self) -> int:
        """Load the latest state that holds all SAEs; returns the number of steps done.

        It may hold more: SAEs that have been finished since, or that are trained in another group now.
        """
        states = [(steps[self.ids[0]], path) for path, steps in self._found() if set(self.ids) <= set(steps)]
        if not states:
            return 0
        self._saved, self._kept = max(states)
        with safe_open(self._kept, framework="pt") as handle:
            for trainer in self.trainers:
                mine = f"{trainer.config.sae_id}|"
                names = [key for key in handle.keys() if key.startswith(mine)]  # noqa: SIM118
                trainer.load_state({key.removeprefix(mine): handle.get_tensor(key) for key in names})
        return self._saved

    def tidy(self) -> None:
        """Remove the checkpoints that hold nothing but finished SAEs and what `path` holds too."""
        for path, steps in self._found():
            elsewhere = set() if path == self.path else set(self.ids)
            if all((self.folder / sae_id).is_dir() for sae_id in set(steps) - elsewhere):
                path.unlink(missing_ok=True)

    def _found(self) -> Iterator[tuple[Path, dict[str, int]]]:
        """The checkpoints in the folder, and {sae_id: steps done} of the SAEs in each."""
        for path in self.folder.glob("checkpoint-*.safetensors"):
            with contextlib.suppress(FileNotFoundError):  # another rank has just removed one of its own
                # as numpy: for torch the file is opened a second time, when it may be gone
                with safe_open(path, framework="numpy") as handle:
                    names = [key for key in handle.keys() if key.endswith("|n_done")]  # noqa: SIM118
                    steps = {name.partition("|")[0]: int(handle.get_tensor(name)) for name in names}
                yield path, steps

    def where(self) -> str:
        """What is kept of the work so far, in a sentence."""
        if not self._saved:
            return "No checkpoint had been written yet."
        return f"The last good state, of step {self._saved:,}, is kept in {self._kept}."


class _Log:
    """The training curve of one SAE, a JSON line per logged step; lines after the step we resume from are dropped."""

    def __init__(self, path: Path, done: int, active: bool) -> None:
        self.path, self.active = path, active
        if active and path.is_file():
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.endswith("}")]
            kept = "".join(f"{line}\n" for line in lines if json.loads(line)["step"] <= done)
            with replacing(path, len(kept)) as temporary:
                temporary.write_text(kept, encoding="utf-8")

    def write(self, step: int, facts: StepFacts) -> None:
        if not self.active:
            return
        numbers = {"fvu": facts.fvu, "l0": facts.l0, "aux": facts.auxiliary, "dead": facts.n_dead}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as handle:
                handle.write(json.dumps({"step": step, **numbers}) + "\n")
        except OSError as error:
            raise InputError(
                f"{self.path} could not be written: {error.strerror}; free some space and run the same command: what "
                "is finished is kept."
            ) from error
