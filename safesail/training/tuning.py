"""The second step of SAFER's SAE: on from the one trained on tokens, on the segment ends of preference data.

Reads the SAE of `train` and the segment ends. Writes what `train` writes. The paper's second step is a training of its
own with its own optimizer and schedule, warm-started (METHODS: SAFER, stage 2); so is this one.
"""

import shutil
from pathlib import Path

from safesail.distributed import ALONE, Ranks
from safesail.errors import InputError
from safesail.reward_recipe import RewardRecipe
from safesail.run import StageWork
from safesail.sae import model as sae_files
from safesail.training.sources import Rows
from safesail.training.trainer import train_stage, variants

__all__ = ["tune_stage"]


def tune_stage(recipe: RewardRecipe, ends: Rows, trained: Path, work: StageWork, ranks: Ranks = ALONE) -> None:
    """Train the SAE on; with `tune.epochs = 0` it stays as it is."""
    (config,) = variants(recipe, ends, recipe.hook_point)
    if recipe.tune.epochs == 0:
        if ranks.first:
            shutil.copytree(trained / config.sae_id, work.folder / config.sae_id, dirs_exist_ok=True)
        ranks.wait()
        work.facts |= {"saes": {recipe.hook_point: [config.variant]}, "n_training_tokens": {recipe.hook_point: 0}}
        return
    n_rows = int((ends.counted(recipe.hook_point, recipe.tokens) & ~ends.rows_held_out()).sum())
    if n_rows < recipe.tune.batch_size:
        raise InputError(
            f"{n_rows:,} segment ends to train on do not fill one batch of {recipe.tune.batch_size:,}; lower "
            "tune.batch_size, or give more pairs."
        )
    settings = recipe.model_copy(update={"train": recipe.train.model_copy(update=recipe.tune.model_dump())})
    train_stage(settings, ends, work, ranks=ranks, start={config.sae_id: sae_files.read(trained / config.sae_id)})
