"""What the cards and tables of a reward model's release are made from: the results of all stages, read once."""

import json
from pathlib import Path
from typing import Any

from safesail.errors import InputError
from safesail.release.facts import flat_fidelity
from safesail.reward_recipe import RewardRecipe
from safesail.rewards.preferences import read_preferences
from safesail.run import REWARD_STAGES, Run
from safesail.sae.config import SaeConfig

__all__ = ["RewardFacts"]

Row = dict[str, Any]


class RewardFacts:
    """The results of all stages of a run of SAFER's kind."""

    def __init__(self, run: Run) -> None:
        assert isinstance(run.recipe, RewardRecipe)
        self.recipe = run.recipe
        self.preferences = read_preferences(run.result("preferences"))
        self.rewards = run.table_of("reward", "rewards.parquet")
        self.accuracy: Row = run.json_of("reward", "accuracy.json")
        self.model = run.result("reward") / "model"
        self.salience = run.table_of("salience", "salience.parquet")
        self.contexts = run.table_of("salience", "contexts.parquet")
        self.settings: Row = run.json_of("salience", "salience.json")
        self.ratings = run.table_of("rate", "ratings.parquet")
        self.safety: Row = run.json_of("rate", "safety.json")
        self.scores = run.table_of("score", "scores.parquet")
        self.validity: Row = run.json_of("score", "validity.json")
        self.edits = run.table_of("edit", "edits.parquet")
        self.compared: Row = run.json_of("compare", "comparison.json")
        self.measured = run.result("eval")
        self.sae_folder = _only_sae(run.result("tune"))
        self.fidelity: Row = flat_fidelity(run.json_of("eval", "fidelity.json")[self.sae_id])
        self.records: dict[str, Row] = {name: run.record(name) or {} for name in REWARD_STAGES}

    @property
    def sae_id(self) -> str:
        """Hook point and variant of the SAE: its folder below `tune`."""
        return f"{self.sae_folder.parent.name}/{self.sae_folder.name}"

    @property
    def d_in(self) -> int:
        """Dimensions of an activation."""
        origin = self.sae_folder / "cfg.json"
        return SaeConfig.from_json(json.loads(origin.read_text(encoding="utf-8")), str(origin)).d_in


def _only_sae(tuned: Path) -> Path:
    """The folder of the one SAE that the second step left."""
    found = sorted(path.parent for path in tuned.rglob("cfg.json"))
    if len(found) != 1:
        raise InputError(f"{tuned} holds {len(found)} SAEs instead of one; make it anew with --force.")
    return found[0]
