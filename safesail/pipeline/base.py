"""What every pipeline does with its stages: make what is not done, one after another, and say what it costs.

A subclass has a method `_<stage>` per stage, and says which stages ask a language model, and what.
"""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from safesail.distributed import ALONE, Ranks, ranks
from safesail.errors import InputError
from safesail.interpretation.budget import Budget
from safesail.interpretation.estimate import Estimate, estimate, estimate_lines
from safesail.interpretation.exchange import Request
from safesail.interpretation.llm import EndpointBackend, Llm, LocalBackend
from safesail.lm.activations import Activations, harvest, remake
from safesail.lm.corpus import gather
from safesail.lm.load import load_tokenizer, tokenizer_hash
from safesail.lm.shards import damaged, read_facts
from safesail.lm.tokens import role_codes, special_ids
from safesail.lm.windows import Storage
from safesail.progress import bar, quiet
from safesail.recipe import AskedSection, Recipe
from safesail.release.licences import check_licences
from safesail.reward_recipe import RewardRecipe
from safesail.rewards.preferences import n_pairs
from safesail.run import Run, StageWork
from safesail.taxonomy import Taxonomy
from safesail.training.plan import refuse_what_cannot_fit
from safesail.training.trainer import check_shares

__all__ = ["BasePipeline", "files_below"]


class BasePipeline(ABC):
    """Runs the stages of one run folder, loading models and texts only for stages that need them.

    `budget` bounds what this command spends on endpoints; without one the recipe's runtime section gives it.
    """

    def __init__(self, run: Run, say: Callable[[str], None] = lambda line: None, budget: Budget | None = None) -> None:
        self.run, self.ranks = run, ranks()
        runtime = run.recipe.runtime
        self.budget = budget or Budget(runtime.budget_usd, runtime.budget_tokens)
        self.say = say if self.ranks.first else lambda line: None
        if not self.ranks.first:
            quiet()
        if runtime.threads:
            torch.set_num_threads(runtime.threads)
        run.inputs = self.outside_inputs(run.recipe)

    @classmethod
    @abstractmethod
    def outside_inputs(cls, recipe: Any) -> dict[str, str]:
        """The fingerprints of everything outside the recipe that its release depends on."""

    @property
    def _settings(self) -> Recipe | RewardRecipe:
        return self.run.recipe

    def make(self, until: str = "build", force: bool = False) -> None:
        """Make every stage up to `until` that is not done; `force` makes `until` itself anew.

        Of several ranks, those after the first return when only its stages are left.
        """
        check_licences(self._settings)
        self._check(until)
        refuse_what_cannot_fit(self.run, until, force, n_pairs(self._settings, self.run.scratch / "preferences"))
        with self.run.lock():
            for name, stage in self.run.stages.items():
                if not (stage.shared or self.ranks.first):
                    return
                if self.run.state(name) == "done" and not (force and name == until):
                    self._tell(name, "done already")
                else:
                    self._make(name)
                if name == until:
                    return

    def _tell(self, stage: str, what: str) -> None:
        """Say something of a stage, in a column beside the stages' names."""
        self.say(f"{stage:{max(8, *map(len, self.run.stages))}} {what}")

    def _check(self, until: str) -> None:
        """Find out now, not an hour later, that a key or a model's name is missing for a stage that will need it, or
        that the ranks cannot share batches."""
        ahead = list(self.run.stages)[: list(self.run.stages).index(until) + 1]
        waiting = [name for name in ahead if self.run.state(name) != "done"]
        for name in filter(self._pays, waiting):
            self._llm(self._asked_section(name))
        check_shares(self._settings, self._team)

    @property
    def _team(self) -> Ranks:
        """The ranks that share batches."""
        return self.ranks if self._settings.runtime.parallel == "data" else ALONE

    def _make(self, name: str) -> None:
        started = time.monotonic()
        if self.ranks.first and (changed := self.run.changed_inputs(name)):
            self._tell(name, f"{_and(changed)} changed since it was made; making it anew")
        if self.ranks.first and "harvest" in self.run.stages[name].after:
            _ = self._activations  # checked, and mended where damaged, before another rank reads it
        self._say_cost(name)
        with self.run.stage(name) as work:
            getattr(self, f"_{name}")(work)
        seconds = time.monotonic() - started
        self._tell(name, f"done in {seconds:.0f} s{self._spent(name, work.facts.get('usage'))}")

    # --- the harvest -----------------------------------------------------------------------------------------

    @property
    @abstractmethod
    def _harvested(self) -> Any:
        """The model whose activations are harvested."""

    def _harvest(self, work: StageWork) -> None:
        recipe, model = self._settings, self._harvested
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
            self._tell("harvest", _skipped(facts["skipped"]))

    @cached_property
    def _taxonomy(self) -> Taxonomy:
        return Taxonomy.load()

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
        again = "them" if len(numbers) > 1 else "it"
        self._tell("harvest", f"{named} damaged or missing; making just {again} again")
        rows = read_facts(folder)["rows_per_shard"]
        with bar("harvest", sum(rows[i] for i in numbers), "token") as progress:
            different = remake(self._harvested, folder, numbers, progress.update)
        if different:
            raise InputError(
                f"{named} of {folder} cannot be made again just as before, so this is not the machine (or number of "
                f"threads) the harvest was made with; type `{self.run.command('harvest')} --force`."
            )

    # --- the language models that are asked ------------------------------------------------------------------

    @abstractmethod
    def _asked_section(self, name: str) -> AskedSection | None:
        """The section of a stage that asks a language model; None for one that does not."""

    @abstractmethod
    def _requests(self, name: str) -> tuple[list[Request], Callable[[Request], int]]:
        """What a stage would ask, and how many tokens an answer is expected to have."""

    def estimate(self, name: str) -> Estimate:
        """What the stage would ask of its language model and what that would cost; nothing is sent.

        InputError when the stage asks none, or what it reads is not made yet.
        """
        section = self._asked_section(name)
        if section is None:
            raise InputError(f"{name} asks no language model with this recipe, so it costs nothing")
        missing = next((stage for stage in self.run.stages[name].after if self.run.state(stage) != "done"), None)
        if missing:
            raise InputError(
                f"what {name} will cost is known once {missing} is done; type `{self.run.command(missing)}`."
            )
        tokenizer = load_tokenizer(section.tokenizer) if section.tokenizer else self._tokenizer

        def count(text: str) -> int:
            return len(tokenizer(text, add_special_tokens=False)["input_ids"])

        requests, expected = self._requests(name)
        return estimate(self._llm(section), requests, count, expected)

    @cached_property
    def _tokenizer(self) -> Any:
        return load_tokenizer(self._settings.model.path, revision=self._settings.model.revision)

    def _say_cost(self, name: str) -> None:
        """Show what a stage that pays for its answers will cost, before it does."""
        if self._pays(name):
            for line in estimate_lines(name, self.estimate(name)):
                self.say(line)

    def _pays(self, name: str) -> bool:
        """Whether a stage asks an endpoint."""
        section = self._asked_section(name)
        return section is not None and section.backend == "endpoint"

    @property
    def _answers(self) -> Path:
        return self.run.scratch / "llm.sqlite"

    def _llm(self, section: AskedSection | None) -> Llm:
        assert section is not None
        if section.backend == "endpoint":
            return Llm(self._endpoint(section), self._answers, budget=self.budget)
        return Llm(self._local(section), self._answers)

    @abstractmethod
    def _local(self, section: AskedSection) -> LocalBackend:
        """Who answers in this process."""

    def _endpoint(self, section: AskedSection) -> EndpointBackend:
        runtime = self._settings.runtime
        return EndpointBackend(
            section.model,
            runtime.base_url,
            api_key_env=runtime.api_key_env,
            concurrency=runtime.concurrency,
            timeout_seconds=runtime.timeout_seconds,
            usd_per_million_prompt_tokens=section.usd_per_million_prompt_tokens,
            usd_per_million_completion_tokens=section.usd_per_million_completion_tokens,
        )

    def _spent(self, stage: str, usage: dict[str, Any] | None) -> str:
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
            line += f" (`{self.run.command(stage)} --force` asks the failed ones again)"
        return line


_IN_WORDS = {
    "encoder": "the sentence encoder",
    "space": "the Space",
    "diagnosis": "the stored results of the diagnosis",
    "explain_prompts": "the explainer's prompts",
    "simulate_prompts": "the simulator's prompts",
    "rate_prompts": "the rater's prompt",
    "preferences": "the preference data",
}


def _and(inputs: list[str]) -> str:
    """Outside inputs in words: `the model and the texts`."""
    words = [_IN_WORDS.get(name, f"the {name}") for name in inputs]
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _skipped(skipped: dict[str, Any]) -> str:
    """The activations that were left out because they could not be stored, in words."""
    parts = [f"{facts['n_tokens']:,} tokens at {name} ({facts['documents'][0]}, …)" for name, facts in skipped.items()]
    return f"left out for activations that cannot be stored: {', '.join(parts)}"


def files_below(folder: Path) -> list[Path]:
    """The files below a folder of the package, sorted."""
    return sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
