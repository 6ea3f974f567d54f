"""A reward model from preference data, and many cheap ones for comparison.

Reads the preferences. Writes `model/` (a transformers folder), `rewards.parquet` (the rewards of both sides of every
pair), `accuracy.json` and `log.jsonl` (a line a step). While it works: `checkpoint.safetensors`, the exact state of the
training, and `frozen-….bin`, what the frozen part of the model gives.

The loop is the project's own and not trl's RewardTrainer: that one brings accelerate and transformers' Trainer with it,
knows no cached frozen part, without which a reward model is not affordable on a CPU, and does not promise that an
interrupted training ends with the same bytes. Models that trl made load unchanged (`RewardModel.load`).
"""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file
from torch import Tensor

from safesail.distributed import ALONE, Ranks, device
from safesail.errors import InputError
from safesail.files import replacing, write_tensors
from safesail.lm.load import model_fingerprint
from safesail.metrics import wilson
from safesail.progress import bar
from safesail.reward_recipe import RewardRecipe
from safesail.rewards.fit import Fit, FitFacts, FitSettings, n_right
from safesail.rewards.model import RewardModel
from safesail.rewards.parts import TrainedPart, trained_part
from safesail.rewards.preferences import Preference
from safesail.rewards.texts import Text, distinct, encode_all
from safesail.run import StageWork, write_json
from safesail.training.step import Diverged

__all__ = ["REWARDS_SCHEMA", "Retraining", "accuracies", "reward_stage"]

REWARDS_SCHEMA = pa.schema({"pair_id": pa.string(), "reward_chosen": pa.float32(), "reward_rejected": pa.float32()})
"""A row is a pair, in the order of preferences.parquet."""


def reward_stage(recipe: RewardRecipe, preferences: list[Preference], work: StageWork, ranks: Ranks = ALONE) -> None:
    """Train the recipe's reward model; an interrupted call goes on at its last checkpoint and gives the same bytes."""
    reward_model = _fresh(recipe)
    texts = _texts(recipe, reward_model, preferences)
    read = distinct(texts)
    part = _part(recipe, recipe.reward.trained_blocks, reward_model, read.ids, work.folder, ranks)
    pairs = read.number[_training_pairs(preferences)]
    fit = Fit(part, pairs, FitSettings.of(recipe.reward), recipe.seed, ranks)
    n_parameters = fit.n_parameters
    _train(fit, work.folder, recipe.runtime.checkpoint_seconds)
    if ranks.first:
        rewards = _final_rewards(recipe, part)[read.number].view(-1, 2)
        _write(preferences, rewards, reward_model, work.folder)
        work.facts["accuracy"] = accuracies(preferences, rewards)
    ranks.wait()
    work.facts |= {"n_steps": fit.n_steps, "n_parameters_trained": n_parameters}
    work.facts |= _facts_of_texts(texts, len(read.ids))


def accuracies(preferences: Sequence[Preference], rewards: Tensor) -> dict[str, dict[str, dict[str, Any]]]:
    """How often the chosen answer has the higher reward, {kind: {held_out or training: …}}, with Wilson's interval.

    rewards: (n_preferences, 2), those of the chosen answers first. Ties count half.
    """
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for kind in sorted({preference.kind for preference in preferences}):
        found[kind] = {}
        for split, held_out in (("held_out", True), ("training", False)):
            of = [i for i, each in enumerate(preferences) if each.kind == kind and each.held_out is held_out]
            right = n_right(rewards[of, 0], rewards[of, 1])
            interval = wilson(right, len(of))  # type: ignore[arg-type]  # the formula takes halves as well
            found[kind][split] = {"accuracy": interval.value, "low": interval.low, "high": interval.high, "n": len(of)}
    return found


class Retraining:
    """Many trainings from one base: the same blocks and settings, each with its own pairs, order and head.

    What the frozen part gives for all texts is computed once, in `cache`, or read from there. A step takes
    `compare.batch_pairs` pairs; the settings that `compare` does not have are those of `reward`.
    """

    def __init__(self, recipe: RewardRecipe, preferences: Sequence[Preference], cache: Path) -> None:
        self._model = _fresh(recipe)
        self._settings = FitSettings.of(recipe.reward).retrained(recipe.compare)
        texts = _texts(recipe, self._model, preferences)
        self._read = distinct(texts)
        self._part = _part(recipe, recipe.compare.trained_blocks, self._model, self._read.ids, cache, ALONE)
        self._start = {name: weight.detach().clone() for name, weight in self._part.parameters().items()}

    def rewards(self, pairs: Sequence[tuple[int, int]], seed: int) -> Tensor:
        """The rewards of all preferences, (n_preferences, 2), chosen first, by a model trained on these pairs alone.

        A pair (p, 0) is preference number p as it is, (p, 1) the same with its sides swapped.
        """
        assert pairs, "there is nothing to train on"
        self._begin(seed)
        numbers = torch.tensor([(2 * p + swapped, 2 * p + 1 - swapped) for p, swapped in pairs])
        fit = Fit(self._part, self._read.number[numbers], self._settings, seed)
        while fit.n_done < fit.n_steps:
            _step(fit, "Lower compare.learning_rate and run again.")
        fit.release()
        return self._part.all_rewards()[self._read.number].view(-1, 2)

    @torch.no_grad()
    def _begin(self, seed: int) -> None:
        """Put the weights back to where they began, under the head of the seed."""
        for name, weight in self._part.parameters().items():
            weight.copy_(self._start[name])
        self._model.draw_head(seed)


# --- before training ----------------------------------------------------------------------------------------------


def _fresh(recipe: RewardRecipe) -> RewardModel:
    """The base under a new head, in fp32: steps of 1e-5 would be lost in the rounding of shorter numbers."""
    if recipe.model.dtype == "float16":
        raise InputError('a reward model is not trained in float16; set model.dtype to "bfloat16" or "float32".')
    section = recipe.model
    reward_model = RewardModel.fresh(
        section.path,
        n_blocks=recipe.reward.n_blocks,
        seed=recipe.seed,
        revision=section.revision,
        device=device(recipe.runtime.device),
    )
    longest = getattr(reward_model.model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and recipe.reward.max_length > longest:
        raise InputError(
            f"reward.max_length = {recipe.reward.max_length:,}, but {section.path} reads {longest:,} tokens at most; "
            f"lower it to {longest}."
        )
    return reward_model


def _texts(recipe: RewardRecipe, reward_model: RewardModel, preferences: Sequence[Preference]) -> list[Text]:
    with bar("tokens", 2 * len(preferences), "text") as progress:
        return encode_all(reward_model.tokenizer, preferences, recipe.reward.max_length, progress.update)


def _part(
    recipe: RewardRecipe,
    n_blocks: int | None,
    reward_model: RewardModel,
    ids: list[list[int]],
    folder: Path,
    ranks: Ranks,
) -> TrainedPart:
    made_of = f"{model_fingerprint(recipe.model.path, recipe.model.revision)}:{recipe.reward.n_blocks}"
    with bar("frozen part", sum(map(len, ids)), "token") as progress:
        return trained_part(
            reward_model,
            ids,
            n_blocks,
            folder,
            made_of=made_of,
            precision=getattr(torch, recipe.model.dtype),
            ranks=ranks,
            progress=progress.update,
        )


def _training_pairs(preferences: Sequence[Preference]) -> Tensor:
    numbers = [(2 * p, 2 * p + 1) for p, preference in enumerate(preferences) if not preference.held_out]
    if not numbers:
        raise InputError("all pairs are held out; lower preferences.held_out or add pairs.")
    return torch.tensor(numbers)


def _facts_of_texts(texts: list[Text], n_distinct: int) -> dict[str, int]:
    return {
        "n_texts": len(texts),
        "n_distinct_texts": n_distinct,
        "n_tokens": sum(len(text.ids) for text in texts),
        "n_truncated": sum(text.n_cut > 0 for text in texts),
    }


# --- training -----------------------------------------------------------------------------------------------------


def _train(fit: Fit, folder: Path, seconds: float) -> None:
    """Take all steps, with a checkpoint every so many seconds."""
    checkpoint, log = folder / "checkpoint.safetensors", _Log(folder / "log.jsonl", fit.ranks.first)
    if checkpoint.is_file():
        fit.load_state(load_file(checkpoint))
    log.cut(fit.n_done)
    saved, last = fit.n_done, time.monotonic()
    with bar("reward", fit.n_steps, "step") as progress:
        progress.update(fit.n_done)
        while fit.n_done < fit.n_steps:
            facts = _step(fit, _advice(checkpoint, saved))
            log.write(fit.n_done, facts)
            progress.set_postfix_str(f"loss {facts.loss:.3f} accuracy {facts.accuracy:.2f}", refresh=False)
            if fit.ranks.first and time.monotonic() - last >= seconds:
                write_tensors(checkpoint, fit.state())
                saved, last = fit.n_done, time.monotonic()
            progress.update(1)
    fit.release()


def _step(fit: Fit, advice: str) -> FitFacts:
    try:
        return fit.step()
    except Diverged as error:
        raise InputError(
            f"the reward model diverges at step {fit.n_done + 1:,} of {fit.n_steps:,} ({error}). {advice}"
        ) from error


def _advice(checkpoint: Path, saved: int) -> str:
    kept = f"The state of step {saved:,} is kept in {checkpoint}." if saved else "No checkpoint had been written yet."
    return f"{kept} Lower reward.learning_rate and run again."


class _Log:
    """The training curve, a JSON line a step."""

    def __init__(self, path: Path, active: bool) -> None:
        self.path, self.active = path, active

    def cut(self, done: int) -> None:
        """Leave the lines of the steps done alone: those after the checkpoint are written again."""
        if not self.active:
            return
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)[:done] if self.path.is_file() else []
        with replacing(self.path, sum(map(len, lines))) as temporary:
            temporary.write_text("".join(lines), encoding="utf-8")

    def write(self, step: int, facts: FitFacts) -> None:
        if not self.active:
            return
        try:
            with open(self.path, "a", encoding="utf-8") as handle:
                handle.write(json.dumps({"step": step, **facts._asdict()}) + "\n")
        except OSError as error:
            raise InputError(
                f"{self.path} could not be written: {error.strerror}; free some space and run the same command."
            ) from error


# --- after training -----------------------------------------------------------------------------------------------


def _final_rewards(recipe: RewardRecipe, part: TrainedPart) -> Tensor:
    """The rewards of the distinct texts by the model as it will be saved: (n_distinct,)."""
    with bar("rewards", len(part.ids), "text") as progress:
        if recipe.model.dtype == "float32":
            return part.all_rewards(progress.update)
        part.reward_model.model.to(getattr(torch, recipe.model.dtype))
        return part.reward_model.rewards(part.ids, progress=progress.update)


def _write(preferences: Sequence[Preference], rewards: Tensor, reward_model: RewardModel, folder: Path) -> None:
    ids = [preference.id for preference in preferences]
    table = pa.table([ids, rewards[:, 0].tolist(), rewards[:, 1].tolist()], schema=REWARDS_SCHEMA)
    with replacing(folder / "rewards.parquet", table.nbytes) as temporary:
        pq.write_table(table, temporary)
    write_json(folder / "accuracy.json", accuracies(preferences, rewards))
    reward_model.save(folder / "model")
    for left in [folder / "checkpoint.safetensors", *folder.glob("frozen-*.bin"), *folder.glob(".frozen-*")]:
        left.unlink(missing_ok=True)
