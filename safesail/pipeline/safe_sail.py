"""Safe-SAIL: SAEs of a language model, and what their safety-related latents mean.

harvest → train → eval → select → collect → explain → score → build
"""

from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safesail.assets import asset
from safesail.distributed import device
from safesail.interpretation import explain, score
from safesail.interpretation.collect import collect_stage
from safesail.interpretation.held import Held
from safesail.interpretation.llm import LocalBackend, Request
from safesail.interpretation.prompts import prompts_fingerprint
from safesail.interpretation.simulate import expected_completion
from safesail.lm.corpus import texts_fingerprint
from safesail.lm.embed import SentenceEncoder
from safesail.lm.generate import complete
from safesail.lm.hooks import check_hook_points
from safesail.lm.judge import judge
from safesail.lm.load import causal_lm, files_fingerprint, load_tokenizer, model_fingerprint
from safesail.lm.stream import Stream
from safesail.pairs import load_pairs, pairs_file
from safesail.pipeline.base import BasePipeline, files_below
from safesail.recipe import AskedSection, Recipe
from safesail.release.build import build_stage
from safesail.run import StageWork
from safesail.training.fidelity import eval_stage
from safesail.training.selection import select_stage
from safesail.training.sources import Streamed
from safesail.training.trainer import train_stage

__all__ = ["Pipeline"]


class Pipeline(BasePipeline):
    """Makes a release of Safe-SAIL's kind."""

    @classmethod
    def outside_inputs(cls, recipe: Recipe) -> dict[str, str]:
        return {
            "model": model_fingerprint(recipe.model.path, recipe.model.revision),
            "texts": texts_fingerprint(recipe.corpus, files_fingerprint),
            "encoder": model_fingerprint(recipe.explain.encoder),
            "taxonomy": files_fingerprint([asset("hub/taxonomy.toml")]),
            "pairs": files_fingerprint([pairs_file(name) for name in recipe.select.pairs]),
            "explain_prompts": prompts_fingerprint("explain"),
            "simulate_prompts": prompts_fingerprint("simulate"),
            "cards": files_fingerprint(files_below(asset("cards"))),
            "space": files_fingerprint(files_below(asset("space"))),
        }

    @property
    def recipe(self) -> Recipe:
        assert isinstance(self.run.recipe, Recipe)
        return self.run.recipe

    # --- what the stages read --------------------------------------------------------------------------------

    @cached_property
    def _model(self) -> Any:
        section, where = self.recipe.model, device(self.recipe.runtime.device)
        model = causal_lm(section.path, revision=section.revision, dtype=getattr(torch, section.dtype), device=where)
        check_hook_points(model, self.recipe.harvest.hook_points)
        return model

    @property
    def _harvested(self) -> Any:
        return self._model

    @cached_property
    def _encoder(self) -> SentenceEncoder:
        return SentenceEncoder(self.recipe.explain.encoder)

    def _statistics(self) -> dict[str, dict[str, Any]]:
        return {row["neuron_id"]: row for row in self.run.table_of("collect", "statistics.parquet")}

    # --- the stages ------------------------------------------------------------------------------------------

    def _train(self, work: StageWork) -> None:
        train_stage(self.recipe, self._activations, work, self._streamed(), self.ranks)

    def _streamed(self) -> Streamed | None:
        """The source of training activations that reads them on the fly, if the recipe asks for it."""
        recipe = self.recipe
        if recipe.train.stream_tokens is None:
            return None
        team = self._team
        facts = self._activations.facts

        def rounds(hook_points: tuple[str, ...], first: int) -> Iterator[dict[str, Tensor]]:
            stream = Stream(recipe, self._model, self._tokenizer, self._taxonomy, facts, hook_points, team)
            return stream.rounds(first)

        return Streamed(recipe, rounds, team)

    def _eval(self, work: StageWork) -> None:
        eval_stage(self.recipe, self._activations, self.run.result("train"), self._model, work)

    def _select(self, work: StageWork) -> None:
        select_stage(
            self.recipe,
            self._activations,
            self.run.result("train"),
            self.run.json_of("eval", "fidelity.json"),
            [pair for name in self.recipe.select.pairs for pair in load_pairs(name)],
            self._model,
            self._tokenizer,
            work,
        )

    def _collect(self, work: StageWork) -> None:
        collect_stage(
            self.recipe,
            self._activations,
            self.run.result("train"),
            self.run.json_of("select", "selection.json"),
            self.run.json_of("select", "candidates.json"),
            self._tokenizer,
            work,
        )

    def _explain(self, work: StageWork) -> None:
        explain.explain_stage(
            self.recipe,
            self.run.table_of("collect", "examples.parquet"),
            self._statistics(),
            self.run.json_of("select", "candidates.json"),
            self._taxonomy,
            self._llm(self.recipe.explain),
            self._encoder.encode,
            work,
        )

    def _score(self, work: StageWork) -> None:
        llm = self._llm(self.recipe.score) if self._asked_section("score") else None
        score.score_stage(self._held, self._encoder.encode, llm, work)

    @cached_property
    def _held(self) -> Held:
        """The texts that explanations are tried on: of the estimate and the stage alike."""
        explanations, _ = explain.load(self.run.result("explain"))
        return Held(
            self.recipe,
            self._activations,
            self.run.result("collect"),
            self._statistics(),
            explanations,
            self._tokenizer,
        )

    def _build(self, work: StageWork) -> None:
        build_stage(self.run, self._taxonomy, work)

    # --- the language models that are asked ------------------------------------------------------------------

    def _asked_section(self, name: str) -> AskedSection | None:
        if name == "explain":
            return self.recipe.explain
        if name == "score" and any(method.endswith("-llm") for method in self.recipe.score.methods):
            return self.recipe.score
        return None

    def _requests(self, name: str) -> tuple[list[Request], Callable[[Request], int]]:
        if name == "score":
            return score.score_requests(self._held), expected_completion
        examples, recipe = self.run.table_of("collect", "examples.parquet"), self.recipe
        requests = explain.explain_requests(recipe, examples, self._statistics(), self._taxonomy)
        return list(requests.values()), lambda request: explain.expected_completion(request, recipe)

    def _local(self, section: AskedSection) -> LocalBackend:
        """A model of this machine; it is loaded when it is first asked."""
        path = section.model or self.recipe.model.path

        def answers(prompts: list[str], max_tokens: int, stop: tuple[str, ...]) -> list[tuple[str, int, int]]:
            return complete(*self._asked_model(path), prompts, max_tokens, stop)

        def judges(prompts: list[str], choices: tuple[str, ...]) -> list[tuple[list[list[float]], int]]:
            return judge(*self._asked_model(path), prompts, choices)

        identity = {"model": model_fingerprint(path)}
        return LocalBackend(answers, f"local:{Path(path).name}", identity, batch_size=16, judge=judges)

    def _asked_model(self, path: str) -> tuple[Any, Any]:
        if path == self.recipe.model.path:
            return self._model, self._tokenizer
        if path not in self._others:
            where = device(self.recipe.runtime.device)
            self._others[path] = (causal_lm(path, device=where), load_tokenizer(path))
        return self._others[path]

    @cached_property
    def _others(self) -> dict[str, tuple[Any, Any]]:
        return {}
