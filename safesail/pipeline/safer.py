"""SAFER: a reward model, its SAE, and what editing the preference data by its safety latents does.

preferences → reward → harvest → train → ends → tune → eval → salience → rate → score → edit → compare → build
"""

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safesail.assets import asset
from safesail.distributed import device
from safesail.interpretation.llm import LocalBackend, Request
from safesail.interpretation.prompts import prompts_fingerprint
from safesail.lm.corpus import texts_fingerprint
from safesail.lm.embed import SentenceEncoder
from safesail.lm.hooks import check_hook_points
from safesail.lm.load import files_fingerprint, model_fingerprint
from safesail.lm.shards import read_facts
from safesail.pipeline.base import BasePipeline, files_below
from safesail.recipe import AskedSection
from safesail.release.reward_build import reward_build_stage
from safesail.reward_recipe import RewardRecipe
from safesail.rewards import rating
from safesail.rewards.comparison import compare_stage
from safesail.rewards.editing import edit_stage
from safesail.rewards.encoder_rater import anchors_file, encoder_backend, read_anchors
from safesail.rewards.ends import Ends, check_ends, ends_stage
from safesail.rewards.model import RewardModel
from safesail.rewards.pair_sources import preferences_fingerprint
from safesail.rewards.preferences import Preference, preferences_stage, read_preferences
from safesail.rewards.safety_score import score_stage
from safesail.rewards.salience import salience_stage
from safesail.rewards.training import Retraining, reward_stage
from safesail.run import StageWork
from safesail.sae import model as sae_files
from safesail.sae.model import Sae
from safesail.training.fidelity import reconstruction_stage
from safesail.training.trainer import train_stage
from safesail.training.tuning import tune_stage

__all__ = ["RewardPipeline"]


class RewardPipeline(BasePipeline):
    """Makes a release of SAFER's kind."""

    @classmethod
    def outside_inputs(cls, recipe: RewardRecipe) -> dict[str, str]:
        return {
            "model": model_fingerprint(recipe.model.path, recipe.model.revision),
            "texts": texts_fingerprint(recipe.corpus, files_fingerprint),
            "preferences": preferences_fingerprint(recipe.preferences, files_fingerprint),
            "taxonomy": files_fingerprint([asset("hub/taxonomy.toml")]),
            "rater": model_fingerprint(recipe.rate.encoder) if recipe.rate.backend == "local" else recipe.rate.model,
            "rate_prompts": prompts_fingerprint("rate") + files_fingerprint([anchors_file()]),
            "cards": files_fingerprint(files_below(asset("cards"))),
            "space": files_fingerprint(files_below(asset("space"))),
        }

    @property
    def recipe(self) -> RewardRecipe:
        assert isinstance(self.run.recipe, RewardRecipe)
        return self.run.recipe

    # --- what the stages read --------------------------------------------------------------------------------

    @cached_property
    def _model(self) -> RewardModel:
        section, where = self.recipe.model, device(self.recipe.runtime.device)
        model = RewardModel.load(
            str(self.run.result("reward") / "model"), dtype=getattr(torch, section.dtype), device=where
        )
        check_hook_points(model.model, self.recipe.harvest.hook_points)
        return model

    @cached_property
    def _tokenizer(self) -> Any:
        return self._model.tokenizer

    @property
    def _harvested(self) -> Any:
        return self._model.model

    @cached_property
    def _pairs(self) -> list[Preference]:
        return read_preferences(self.run.result("preferences"))

    @cached_property
    def _at_ends(self) -> Ends:
        """Sinks are told by the median norm of all tokens, as they are in the SAE's config, not by that of ends."""
        folder = self.run.result("ends")
        if self.ranks.first:
            check_ends(folder, self.run.command("ends"))
        ends = Ends(folder)
        ends.facts["median_norm"] = read_facts(self.run.result("harvest"))["median_norm"]
        return ends

    @cached_property
    def _sae(self) -> Sae:
        (variant,) = self.run.record("tune")["saes"][self.recipe.hook_point]  # type: ignore[index]
        return sae_files.read(self.run.result("tune") / self.recipe.hook_point / variant)

    # --- the stages ------------------------------------------------------------------------------------------

    def _preferences(self, work: StageWork) -> None:
        preferences_stage(self.recipe, work)

    def _reward(self, work: StageWork) -> None:
        reward_stage(self.recipe, self._pairs, work, self.ranks)

    def _train(self, work: StageWork) -> None:
        train_stage(self.recipe, self._activations, work, None, self.ranks)

    def _ends(self, work: StageWork) -> None:
        ends_stage(self.recipe, self._pairs, self._model, work, self.ranks)

    def _tune(self, work: StageWork) -> None:
        tune_stage(self.recipe, self._at_ends, self.run.result("train"), work, self.ranks)

    def _eval(self, work: StageWork) -> None:
        reconstruction_stage(self.recipe, self._at_ends, self._at_ends.pair, self._sae, work)

    def _salience(self, work: StageWork) -> None:
        salience_stage(self.recipe, self._pairs, self._at_ends, self._sae, self._model.tokenizer, work)

    def _rate(self, work: StageWork) -> None:
        rating.rate_stage(self.recipe, self._saliences, self._contexts, self._llm(self.recipe.rate), work)

    def _score(self, work: StageWork) -> None:
        rewards = self.run.table_of("reward", "rewards.parquet")
        safety = self.run.json_of("rate", "safety.json")
        score_stage(self.recipe, self._pairs, self._at_ends, self._sae, safety, rewards, work)

    def _edit(self, work: StageWork) -> None:
        edit_stage(self.recipe, self._pairs, self.run.table_of("score", "scores.parquet"), work)

    def _compare(self, work: StageWork) -> None:
        retraining = Retraining(self.recipe, self._pairs, work.folder)
        compare_stage(self.recipe, self._pairs, self.run.table_of("edit", "edits.parquet"), retraining, work)
        for states in work.folder.glob("frozen-*.bin"):
            states.unlink()

    def _build(self, work: StageWork) -> None:
        reward_build_stage(self.run, work)

    @property
    def _saliences(self) -> list[dict[str, Any]]:
        return self.run.table_of("salience", "salience.parquet")

    @property
    def _contexts(self) -> list[dict[str, Any]]:
        return self.run.table_of("salience", "contexts.parquet")

    # --- the rater -------------------------------------------------------------------------------------------

    def _asked_section(self, name: str) -> AskedSection | None:
        return self.recipe.rate if name == "rate" else None

    def _requests(self, name: str) -> tuple[list[Request], Callable[[Request], int]]:
        requests = rating.rate_requests(self.recipe, rating.contexts_of_rated(self._saliences, self._contexts))
        return list(requests.values()), lambda request: rating.expected_completion(request, self.recipe)

    def _local(self, section: AskedSection) -> LocalBackend:
        """A sentence encoder; it is loaded when it is first asked."""
        path = self.recipe.rate.encoder

        def encode(texts: list[str]) -> Tensor:
            return self._encoder.encode(texts)

        fingerprints = {"anchors": files_fingerprint([anchors_file()]), "encoder": model_fingerprint(path)}
        return encoder_backend(encode, read_anchors(anchors_file()), name=Path(path).name, fingerprints=fingerprints)

    @cached_property
    def _encoder(self) -> SentenceEncoder:
        return SentenceEncoder(self.recipe.rate.encoder)
