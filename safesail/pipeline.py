"""The stages in their order, each given what it reads: the one place that knows the whole.

harvest → train → eval → select → collect → explain → score → build
"""

import time
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safesail.assets import asset
from safesail.distributed import ALONE, Ranks, device, ranks
from safesail.errors import InputError
from safesail.interpretation import explain, score
from safesail.interpretation.budget import Budget
from safesail.interpretation.collect import collect_stage
from safesail.interpretation.estimate import Estimate, estimate, estimate_lines
from safesail.interpretation.held import Held
from safesail.interpretation.llm import EndpointBackend, Llm, LocalBackend
from safesail.interpretation.prompts import prompts_fingerprint
from safesail.interpretation.simulate import expected_completion
from safesail.lm.activations import Activations, harvest, remake
from safesail.lm.corpus import gather, texts_fingerprint
from safesail.lm.embed import SentenceEncoder
from safesail.lm.generate import complete
from safesail.lm.hooks import check_hook_points
from safesail.lm.judge import judge
from safesail.lm.load import causal_lm, files_fingerprint, load_tokenizer, model_fingerprint, tokenizer_hash
from safesail.lm.shards import damaged, read_facts
from safesail.lm.stream import Stream
from safesail.lm.tokens import role_codes, special_ids
from safesail.lm.windows import Storage
from safesail.pairs import load_pairs, pairs_file
from safesail.progress import bar, quiet
from safesail.recipe import AskedSection, Recipe
from safesail.release.build import build_stage
from safesail.release.licences import check_licences
from safesail.run import STAGES, Run, StageWork
from safesail.taxonomy import Taxonomy
from safesail.training.fidelity import eval_stage
from safesail.training.plan import refuse_what_cannot_fit
from safesail.training.selection import select_stage
from safesail.training.sources import Streamed
from safesail.training.trainer import check_shares, train_stage

__all__ = ["Pipeline", "outside_inputs"]


def outside_inputs(recipe: Recipe) -> dict[str, str]:
    """The fingerprints of everything outside the recipe that its release depends on."""
    return {
        "model": model_fingerprint(recipe.model.path, recipe.model.revision),
        "texts": texts_fingerprint(recipe.corpus, files_fingerprint),
        "encoder": model_fingerprint(recipe.explain.encoder),
        "taxonomy": files_fingerprint([asset("hub/taxonomy.toml")]),
        "pairs": files_fingerprint([pairs_file(name) for name in recipe.select.pairs]),
        "explain_prompts": prompts_fingerprint("explain"),
        "simulate_prompts": prompts_fingerprint("simulate"),
        "cards": files_fingerprint(_files(asset("cards"))),
        "space": files_fingerprint(_files(asset("space"))),
    }


class Pipeline:
    """Runs the stages of one run folder, loading the model and the texts only for stages that need them.

    `budget` bounds what this command spends on endpoints; without one the recipe's runtime section gives it.
    """

    def __init__(self, run: Run, say: Callable[[str], None] = lambda line: None, budget: Budget | None = None) -> None:
        self.run, self.recipe, self.ranks = run, run.recipe, ranks()
        runtime = run.recipe.runtime
        self.budget = budget or Budget(runtime.budget_usd, runtime.budget_tokens)
        self.say = say if self.ranks.first else lambda line: None
        if not self.ranks.first:
            quiet()
        if self.recipe.runtime.threads:
            torch.set_num_threads(self.recipe.runtime.threads)
        run.inputs = outside_inputs(run.recipe)

    def make(self, until: str = "build", force: bool = False) -> None:
        """Make every stage up to `until` that is not done; `force` makes `until` itself anew.

        Of several ranks, those after the first return when only its stages are left.
        """
        check_licences(self.recipe)
        self._check_endpoints(until)
        check_shares(self.recipe, self._team)
        refuse_what_cannot_fit(self.run, until, force)
        with self.run.lock():
            for name in STAGES:
                if not (STAGES[name].shared or self.ranks.first):
                    return
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
        for name in filter(self._pays, waiting):
            self._llm(self.recipe.explain if name == "explain" else self.recipe.score)

    def _make(self, name: str) -> None:
        started = time.monotonic()
        if self.ranks.first and (changed := self.run.changed_inputs(name)):
            self.say(f"{name:8} {_and(changed)} changed since it was made; making it anew")
        if self.ranks.first and "harvest" in STAGES[name].after:
            _ = self._activations  # checked, and mended where damaged, before another rank reads it
        self._say_cost(name)
        with self.run.stage(name) as work:
            getattr(self, f"_{name}")(work)
        self.say(
            f"{name:8} done in {time.monotonic() - started:.0f} s{_spent(work.facts.get('usage'), name, self.run)}"
        )

    # --- what the stages read --------------------------------------------------------------------------------

    @cached_property
    def _model(self) -> Any:
        section, where = self.recipe.model, device(self.recipe.runtime.device)
        model = causal_lm(section.path, revision=section.revision, dtype=getattr(torch, section.dtype), device=where)
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
        folder = self.run.result("harvest")
        if self.ranks.first:
            self._mend(folder)
        return Activations(folder)

    def _mend(self, folder: Path) -> None:
        """Check the harvest's shards against their checksums and make the damaged ones again."""
        n_bytes = sum(path.stat().st_size for path in folder.glob("shard-*.safetensors"))
        with bar("check the harvest", n_bytes, "B") as progress:
            numbers = damaged(folder, progress.update)
        if not numbers:
            return
        named = f"shard{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
        self.say(f"harvest  {named} damaged or missing; making just {'them' if len(numbers) > 1 else 'it'} again")
        rows = read_facts(folder)["rows_per_shard"]
        with bar("harvest", sum(rows[i] for i in numbers), "token") as progress:
            different = remake(self._model, folder, numbers, progress.update)
        if different:
            raise InputError(
                f"{named} of {folder} cannot be made again just as before, so this is not the machine (or number of "
                f"threads) the harvest was made with; type `safesail harvest {self.run.folder} --force`."
            )

    def _statistics(self) -> dict[str, dict[str, Any]]:
        return {row["neuron_id"]: row for row in self.run.table_of("collect", "statistics.parquet")}

    # --- the stages ------------------------------------------------------------------------------------------

    def _harvest(self, work: StageWork) -> None:
        recipe, model = self.recipe, self._model
        role_codes(recipe.tokens)
        with bar("corpus", recipe.corpus.n_tokens, "token") as progress:
            roles = bool(recipe.tokens.roles)
            pieces = gather(recipe.corpus, self._taxonomy, self._tokenizer, recipe.seed, progress.update, roles=roles)
        n_tokens = sum(len(piece.ids) for piece in pieces)
        with bar("harvest", n_tokens, "token") as progress:
            facts = harvest(
                model,
                pieces,
                recipe.harvest.hook_points,
                work.folder,
                specials=special_ids(self._tokenizer),
                window=recipe.harvest.window,
                windows_per_batch=recipe.runtime.windows_per_batch,
                storage=Storage(recipe.harvest.dtype, recipe.harvest.bad_activations),
                ranks=self.ranks,
                progress=lambda n: progress.update(n * self.ranks.size),  # the others are as fast
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
        if facts["skipped"]:
            work.facts["skipped"] = facts["skipped"]
            self.say(f"harvest  {_skipped(facts['skipped'])}")

    def _train(self, work: StageWork) -> None:
        train_stage(self.recipe, self._activations, work, self._streamed(), self.ranks)

    @property
    def _team(self) -> Ranks:
        """The ranks that share batches."""
        return self.ranks if self.recipe.runtime.parallel == "data" else ALONE

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
        llm = self._llm(self.recipe.score) if self._asks("score") else None
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

    def estimate(self, name: str) -> Estimate:
        """What the stage would ask of its language model and what that would cost; nothing is sent.

        InputError when the stage asks none, or what it reads is not made yet.
        """
        if not self._asks(name):
            raise InputError(f"{name} asks no language model with this recipe, so it costs nothing")
        missing = next((stage for stage in STAGES[name].after if self.run.state(stage) != "done"), None)
        if missing:
            raise InputError(
                f"what {name} will cost is known once {missing} is done; type `safesail {missing} {self.run.folder}`."
            )
        section = self.recipe.explain if name == "explain" else self.recipe.score
        tokenizer = load_tokenizer(section.tokenizer) if section.tokenizer else self._tokenizer

        def count(text: str) -> int:
            return len(tokenizer(text, add_special_tokens=False)["input_ids"])

        if name == "explain":
            examples, recipe = self.run.table_of("collect", "examples.parquet"), self.recipe
            requests = list(explain.explain_requests(recipe, examples, self._statistics(), self._taxonomy).values())
            return estimate(
                self._llm(section), requests, count, lambda request: explain.expected_completion(request, recipe)
            )
        return estimate(self._llm(section), score.score_requests(self._held), count, expected_completion)

    def _say_cost(self, name: str) -> None:
        """Show what a stage that pays for its answers will cost, before it does."""
        if self._pays(name):
            for line in estimate_lines(name, self.estimate(name)):
                self.say(line)

    def _asks(self, name: str) -> bool:
        """Whether a stage asks a language model."""
        if name == "score":
            return any(method.endswith("-llm") for method in self.recipe.score.methods)
        return name == "explain"

    def _pays(self, name: str) -> bool:
        """Whether a stage asks an endpoint."""
        section = {"explain": self.recipe.explain, "score": self.recipe.score}.get(name)
        return section is not None and section.backend == "endpoint" and self._asks(name)

    def _llm(self, section: AskedSection) -> Llm:
        cache = self.run.scratch / "llm.sqlite"
        if section.backend == "endpoint":
            return Llm(self._endpoint(section), cache, budget=self.budget)
        return Llm(self._local(section.model or self.recipe.model.path), cache)

    def _local(self, path: str) -> LocalBackend:
        """A model of this machine; it is loaded when it is first asked."""

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

    def _endpoint(self, section: AskedSection) -> EndpointBackend:
        runtime = self.recipe.runtime
        return EndpointBackend(
            section.model,
            runtime.base_url,
            api_key_env=runtime.api_key_env,
            concurrency=runtime.concurrency,
            timeout_seconds=runtime.timeout_seconds,
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


_IN_WORDS = {
    "encoder": "the sentence encoder",
    "space": "the Space",
    "diagnosis": "the stored results of the diagnosis",
    "explain_prompts": "the explainer's prompts",
    "simulate_prompts": "the simulator's prompts",
}


def _and(inputs: list[str]) -> str:
    """Outside inputs in words: `the model and the texts`."""
    words = [_IN_WORDS.get(name, f"the {name}") for name in inputs]
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _skipped(skipped: dict[str, Any]) -> str:
    """The activations that were left out because they could not be stored, in words."""
    parts = [f"{facts['n_tokens']:,} tokens at {name} ({facts['documents'][0]}, …)" for name, facts in skipped.items()]
    return f"left out for activations that cannot be stored: {', '.join(parts)}"


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
