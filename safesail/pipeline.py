"""The stages in their order, each given what it reads: the one place that knows the whole.

harvest → train → eval → select → collect → explain → score → build
"""

import os
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from safesail.assets import asset
from safesail.errors import InputError
from safesail.interpretation.collect import collect_stage
from safesail.interpretation.explain import explain_stage
from safesail.interpretation.explain import load as load_explanations
from safesail.interpretation.llm import EndpointBackend, Llm, LocalBackend
from safesail.interpretation.prompts import prompts_fingerprint
from safesail.interpretation.score import score_stage
from safesail.lm.activations import Activations, harvest
from safesail.lm.corpus import gather, texts_fingerprint
from safesail.lm.embed import SentenceEncoder
from safesail.lm.generate import complete
from safesail.lm.hooks import check_hook_points
from safesail.lm.load import causal_lm, files_fingerprint, load_tokenizer, model_fingerprint, tokenizer_hash
from safesail.lm.tokens import special_ids
from safesail.pairs import load_pairs
from safesail.progress import bar
from safesail.recipe import ExplainSection, Recipe, ScoreSection
from safesail.release.build import build_stage
from safesail.run import STAGES, Run, StageWork
from safesail.taxonomy import Taxonomy
from safesail.training.fidelity import eval_stage
from safesail.training.selection import select_stage
from safesail.training.trainer import train_stage

__all__ = ["Pipeline", "outside_inputs"]


def outside_inputs(recipe: Recipe) -> dict[str, str]:
    """The fingerprints of everything outside the recipe that its release depends on."""
    pairs = Path(recipe.select.pairs)
    pairs_file = pairs if pairs.is_file() else asset(f"hub/pairs/{recipe.select.pairs}.jsonl")
    return {
        "model": model_fingerprint(recipe.model.path, recipe.model.revision),
        "texts": texts_fingerprint(recipe.corpus, files_fingerprint),
        "encoder": model_fingerprint(recipe.explain.encoder),
        "taxonomy": files_fingerprint([asset("hub/taxonomy.toml")]),
        "pairs": files_fingerprint([pairs_file]),
        "prompts": prompts_fingerprint(),
        "cards": files_fingerprint(_files(asset("cards"))),
        "space": files_fingerprint(_files(asset("space"))),
    }


class Pipeline:
    """Runs the stages of one run folder, loading the model and the texts only for stages that need them."""

    def __init__(self, run: Run, say: Callable[[str], None] = lambda line: None) -> None:
        self.run, self.recipe, self.say = run, run.recipe, say
        if self.recipe.runtime.threads:
            torch.set_num_threads(self.recipe.runtime.threads)
        run.inputs = outside_inputs(run.recipe)

    def make(self, until: str = "build", force: bool = False) -> None:
        """Make every stage up to `until` that is not done; `force` makes `until` itself anew."""
        self._check_endpoints(until)
        with self.run.lock():
            for name in STAGES:
                if self.run.state(name) == "done" and not (force and name == until):
                    self.say(f"{name:8} done already")
                else:
                    self._make(name)
                if name == until:
                    return

    def _check_endpoints(self, until: str) -> None:
        """Find out now, not an hour later, that a key or a model's name is missing for a stage that will need it."""
        ahead = list(STAGES)[: list(STAGES).index(until) + 1]
        waiting = [name for name in ahead if self.run.state(name) != "done"]
        if "explain" in waiting and self.recipe.explain.backend == "endpoint":
            self._explainer()
        if "score" in waiting and "llm" in self.recipe.score.simulators:
            self._simulator()

    def _make(self, name: str) -> None:
        started = time.monotonic()
        with self.run.stage(name) as work:
            getattr(self, f"_{name}")(work)
        self.say(
            f"{name:8} done in {time.monotonic() - started:.0f} s{_spent(work.facts.get('usage'), name, self.run)}"
        )

    # --- what the stages read --------------------------------------------------------------------------------

    @cached_property
    def _model(self) -> Any:
        model = causal_lm(self.recipe.model.path, revision=self.recipe.model.revision)
        check_hook_points(model, self.recipe.harvest.hook_points)
        return model

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self.recipe.model.path, revision=self.recipe.model.revision)

    @cached_property
    def _taxonomy(self) -> Taxonomy:
        return Taxonomy.load()

    @cached_property
    def _encoder(self) -> SentenceEncoder:
        return SentenceEncoder(self.recipe.explain.encoder)

    @cached_property
    def _activations(self) -> Activations:
        return Activations(self.run.result("harvest"))

    def _statistics(self) -> dict[str, dict[str, Any]]:
        return {row["neuron_id"]: row for row in self.run.table_of("collect", "statistics.parquet")}

    # --- the stages ------------------------------------------------------------------------------------------

    def _harvest(self, work: StageWork) -> None:
        recipe, model = self.recipe, self._model
        with bar("corpus", recipe.corpus.n_tokens, "token") as progress:
            pieces = gather(recipe.corpus, self._taxonomy, self._tokenizer, recipe.seed, progress.update)
        n_tokens = sum(len(piece.ids) for piece in pieces)
        with bar("harvest", n_tokens, "token") as progress:
            harvest(
                model,
                pieces,
                recipe.harvest.hook_points,
                work.folder,
                specials=special_ids(self._tokenizer),
                window=recipe.harvest.window,
                windows_per_batch=recipe.runtime.windows_per_batch,
                progress=progress.update,
            )
        sources: dict[str, int] = {}
        for piece in pieces:
            sources[piece.source] = sources.get(piece.source, 0) + len(piece.ids)
        work.facts |= {
            "n_tokens": n_tokens,
            "n_documents": len({piece.document for piece in pieces}),
            "tokens_by_source": sources,
            "tokenizer_hash": tokenizer_hash(self._tokenizer),
        }

    def _train(self, work: StageWork) -> None:
        train_stage(self.recipe, self._activations, work)

    def _eval(self, work: StageWork) -> None:
        eval_stage(self.recipe, self._activations, self.run.result("train"), self._model, work)

    def _select(self, work: StageWork) -> None:
        select_stage(
            self.recipe,
            self._activations,
            self.run.result("train"),
            self.run.json_of("eval", "fidelity.json"),
            load_pairs(self.recipe.select.pairs),
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
        explain_stage(
            self.recipe,
            self.run.table_of("collect", "examples.parquet"),
            self._statistics(),
            self.run.json_of("select", "candidates.json"),
            self._taxonomy,
            self._explainer(),
            self._encoder.encode,
            work,
        )

    def _score(self, work: StageWork) -> None:
        explanations, _ = load_explanations(self.run.result("explain"))
        llm = self._simulator() if "llm" in self.recipe.score.simulators else None
        score_stage(
            self.recipe,
            self._activations,
            self.run.result("collect"),
            self._statistics(),
            explanations,
            self._tokenizer,
            self._encoder.encode,
            llm,
            work,
        )

    def _build(self, work: StageWork) -> None:
        build_stage(self.run, self._taxonomy, work)

    def _explainer(self) -> Llm:
        section = self.recipe.explain
        cache = self.run.scratch / "llm.sqlite"
        if section.backend == "endpoint":
            if not section.model:
                raise InputError("explain.backend is 'endpoint' but explain.model is empty; name the endpoint's model.")
            return Llm(self._endpoint(section), cache)
        path = section.model or self.recipe.model.path
        model = self._model if not section.model else causal_lm(section.model)
        tokenizer = self._tokenizer if not section.model else load_tokenizer(section.model)
        backend = LocalBackend(
            lambda prompts, max_tokens, stop: complete(model, tokenizer, prompts, max_tokens, stop),
            name=f"local:{Path(path).name}",
            identity={"model": model_fingerprint(path)},
            batch_size=16,
        )
        return Llm(backend, cache)

    def _simulator(self) -> Llm:
        return Llm(self._endpoint(self.recipe.score), self.run.scratch / "llm.sqlite")

    def _endpoint(self, section: ExplainSection | ScoreSection) -> EndpointBackend:
        runtime = self.recipe.runtime
        return EndpointBackend(
            section.model,
            runtime.base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1",
            api_key_env=runtime.api_key_env,
            concurrency=runtime.concurrency,
            usd_per_million_prompt_tokens=section.usd_per_million_prompt_tokens,
            usd_per_million_completion_tokens=section.usd_per_million_completion_tokens,
        )


def _spent(usage: dict[str, Any] | None, stage: str, run: Run) -> str:
    """What a stage's calls to a language model came to, in words; empty for a stage without any."""
    if not usage:
        return ""
    cost = "at no known price" if usage["cost_usd"] is None else f"{usage['cost_usd']:.4f} USD"
    n_tokens = usage["prompt_tokens"] + usage["completion_tokens"]
    line = f": {usage['calls']} answers, {usage['cached']} more from the cache, {n_tokens:,} tokens, {cost}"
    trouble = [f"{n} {status}" for status, n in usage["by_status"].items() if status != "ok"]
    if trouble:
        line += f"; {', '.join(trouble)}"
    if usage["by_status"].get("failed"):
        line += f" (`safesail {stage} {run.folder} --force` asks the failed ones again)"
    return line


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
