"""A recipe of SAFER: a reward model, its SAE, and the preference data it learns from. One TOML file, one release.

It shares the sections of `safesail.recipe` and adds those of its own stages; which kind a file is, its `preferences`
section says.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from safesail.recipe import (
    AskedSection,
    BaseRecipe,
    BaseSource,
    Count,
    Fraction,
    Natural,
    Normalisation,
    PublishSection,
    Recipe,
    Section,
    TrainSection,
    recipe_data,
)

__all__ = [
    "POISONED_CONSENT",
    "CompareSection",
    "EditSection",
    "EndsSection",
    "PreferenceSource",
    "PreferencesSection",
    "RateSection",
    "RewardPublishSection",
    "RewardRecipe",
    "RewardSection",
    "SalienceSection",
    "TuneSection",
    "load_recipe",
    "parse_recipe",
]

POISONED_CONSENT = "publish the poisoned data, gated, to test defences"
Ratio = Annotated[float, Field(gt=0, lt=1)]


class PreferenceSource(BaseSource):
    """One source of pairs: a local json, jsonl, parquet or csv file, or a Hub dataset id.

    A row has `chosen` and `rejected`: two answers to its `prompt` (a text, or a list of {role, content}), or two whole
    conversations (lists of {role, content}, or texts of turns that begin with "Human:" and "Assistant:").
    """

    kind: Literal["safety", "chat"]
    """What a pair is about: which answer is safe, or which one is good. Accuracies are reported apart."""
    n_pairs: Count | None = None
    """Take so many, drawn by the recipe's seed; empty: all."""
    data_dir: str | None = None
    """A folder of a Hub data set."""


class PreferencesSection(Section):
    """The preference data; whole prompts are held out."""

    sources: Annotated[tuple[PreferenceSource, ...], Field(min_length=1)]
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.25
    """The share of prompts that neither the reward model nor any choice of latents sees."""
    bad_pairs: Literal["stop", "skip"] = "stop"
    """What to do with a row that lacks a side or has two equal ones: stop, or leave it out."""

    @model_validator(mode="after")
    def _has_safety(self) -> "PreferencesSection":
        if all(source.kind != "safety" for source in self.sources):
            raise ValueError('no source has kind = "safety": without pairs about safety there is no salience')
        return self


class RewardSection(Section):
    """How the reward model is trained: pairwise, −log σ(r(chosen) − r(rejected))."""

    n_blocks: Count | None = None
    """Keep only the first so many blocks of the base model; empty: all."""
    trained_blocks: Natural | None = None
    """Train the last so many blocks with the final norm and the head, on the frozen part's activations, which are
    computed once; 0: the head alone; empty: the whole model."""
    max_length: Count = 1024
    """Longer conversations lose their beginning (left truncation)."""
    epochs: Count = 2
    batch_pairs: Count = 2
    """Pairs at a time."""
    accumulate: Count = 64
    """Batches per step of the optimizer."""
    learning_rate: float = Field(default=2e-5, gt=0)
    warmup: Fraction = 0.03
    weight_decay: float = Field(default=0.001, ge=0)

    @model_validator(mode="after")
    def _blocks(self) -> "RewardSection":
        if self.n_blocks is not None and (self.trained_blocks or 0) > self.n_blocks:
            raise ValueError(f"trained_blocks = {self.trained_blocks} exceeds n_blocks = {self.n_blocks}")
        return self


class SaeSection(TrainSection):
    """The SAE at token level, on the general texts of `corpus`."""

    normalize_activations: Normalisation = "layer_norm"
    """What is done to every token before the SAE; layer_norm is SAFER's standardisation."""


class EndsSection(Section):
    """Segment ends: the last token of each run of `. , ? ! ;` or line breaks, at which the reward model has read a
    whole segment."""

    min_distance: Count = 5
    """An end closer than this to the one before it is left out."""
    part: Literal["answer", "text"] = "answer"
    """Ends of the answer alone, or of the whole conversation, whose prompt both sides share."""
    of: Literal["segments", "tokens"] = "segments"
    """tokens: every token of the part counts, not just segment ends."""


class TuneSection(Section):
    """The second step of the SAE: on from the first one, on segment ends of the preference data."""

    epochs: Natural = 1
    """0: the SAE stays as the first step left it."""
    batch_size: Count = 512
    learning_rate: float = Field(default=3e-4, gt=0)
    warmup: Fraction = 0.05
    decay: Fraction = 0.2


class SalienceSection(Section):
    """s = (h⁺ − h⁻) / (h⁺ + h⁻ + C) of every latent, from the pairs about safety."""

    mode: Literal["means", "paper"] = "means"
    """h is the mean over positions; paper: the sum, which the side with more positions wins."""
    n_latents: Count = 256
    """The latents of largest |s| go on to be rated."""
    n_resamples: Count = 1000
    """Of the bootstrap over pairs."""
    n_contexts: Count = 10
    """Per latent, the segment ends on which it is strongest, at most one a text."""
    context_tokens: Count = 128
    min_contexts: Count = 5
    """A latent with fewer is not rated."""
    max_token_classes: Count | None = 32
    """A latent whose contexts end in more different tokens is not rated; empty: no limit."""


class RateSection(AskedSection):
    """Who rates how much a latent has to do with safety, from 1 to 5.

    backend "local" is a sentence encoder, calibrated on the texts of `hub/rating/`: a small language model cannot rate.
    """

    encoder: str = ""
    """The sentence encoder (transformers folder or id) that rates when backend is local."""
    temperature: float = Field(default=0.1, ge=0)
    max_tokens: Count = 300
    keep: Annotated[int, Field(ge=1, le=5)] = 5
    """The lowest rating that makes a latent a safety latent."""
    max_latents: Count = 32
    """At most so many safety latents, those of largest |s|."""

    @model_validator(mode="after")
    def _rater_named(self) -> "RateSection":
        if self.backend == "local" and not self.encoder:
            raise ValueError("backend is 'local' but encoder is empty; name a sentence encoder, or an endpoint")
        return self


class EditSection(Section):
    """Which shares of the pairs about safety are swapped (poison) or dropped (denoise)."""

    poison: tuple[Ratio, ...] = (0.005, 0.01, 0.025, 0.05)
    denoise: tuple[Ratio, ...] = (0.02, 0.04, 0.06, 0.08, 0.1)
    share_of: Literal["safety", "all"] = "safety"
    """What the shares are of: the training pairs about safety, or all training pairs. Only pairs about safety are
    ever edited."""

    @field_validator("poison", "denoise")
    @classmethod
    def _once(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if len(set(value)) < len(value):
            raise ValueError("a ratio is named twice")
        return value


class CompareSection(Section):
    """Retraining on the edited data."""

    seeds: Annotated[int, Field(ge=2)] = 3
    """Reward models per edited data set; each with its own order, head and random edits."""
    trained_blocks: Natural | None = 0
    """As in `reward`; 0 retrains the head alone, on states that are computed once for all."""
    epochs: Count = 2
    batch_pairs: Count = 32
    learning_rate: float = Field(default=2e-5, gt=0)


class RewardPublishSection(PublishSection):
    """What the cards say, and whether poisoned data leave the machine."""

    poisoned: str = ""
    """Empty: poisoned data are not published. The sentence of `POISONED_CONSENT`: they are, gated and marked."""

    @field_validator("poisoned")
    @classmethod
    def _in_so_many_words(cls, value: str) -> str:
        if value not in ("", POISONED_CONSENT):
            raise ValueError(f'leave it empty, or say "{POISONED_CONSENT}"')
        return value


class RewardRecipe(BaseRecipe):
    """One release of SAFER's kind."""

    preferences: PreferencesSection
    reward: RewardSection = RewardSection()
    train: SaeSection
    ends: EndsSection = EndsSection()
    tune: TuneSection = TuneSection()
    salience: SalienceSection = SalienceSection()
    rate: RateSection
    edit: EditSection = EditSection()
    compare: CompareSection = CompareSection()
    publish: RewardPublishSection = RewardPublishSection()

    @property
    def normalize_activations(self) -> Normalisation:
        return self.train.normalize_activations

    @property
    def subject(self) -> str:
        return f"{self.publish.organization}/{self.name}-reward".removeprefix("/")

    @property
    def hook_point(self) -> str:
        """Where the SAE reads the reward model."""
        return self.harvest.hook_points[0]

    @model_validator(mode="after")
    def _one_sae(self) -> "RewardRecipe":
        if len(self.harvest.hook_points) > 1 or len(self.train.architectures) > 1 or len(self.train.k) > 1:
            raise ValueError("SAFER reads one SAE: give one hook point, one architecture and one k")
        if self.train.stream_tokens is not None:
            raise ValueError("train.stream_tokens is not for reward models; their texts are harvested")
        return self


def load_recipe(path: str | Path, overrides: tuple[str, ...] = ()) -> Recipe | RewardRecipe:
    """The recipe in the TOML file `path`, of either kind, with `section.key=value` overrides."""
    return parse_recipe(recipe_data(path, overrides), str(path))


def parse_recipe(data: dict[str, Any], origin: str = "the recipe") -> Recipe | RewardRecipe:
    """The recipe in a dictionary: SAFER's kind where it has preferences, else Safe-SAIL's."""
    kind = RewardRecipe if "preferences" in data else Recipe
    return kind.parse(data, origin)
