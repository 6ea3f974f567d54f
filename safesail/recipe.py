"""A recipe: one TOML file, one release. A validated section per stage; unknown keys are refused.

Everything that can change a release's bytes is in a recipe; what only changes how fast or where it is made is in
`[runtime]`, which no fingerprint contains.
"""

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from safesail.errors import InputError

__all__ = ["Recipe", "Section", "Source", "TokenPolicy", "differences"]

Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """A frozen group of settings that refuses unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSection(Section):
    """The language model whose activations are studied."""

    path: str
    """A transformers folder or a Hub id: what is loaded."""
    base_model: str = ""
    """The Hub id that the cards name as the base model; `path` when empty."""
    revision: str | None = None
    licence: str = ""
    note: str = ""
    """A sentence for the cards on how the weights differ from `base_model`."""

    @property
    def name(self) -> str:
        """What cards and configs call the model: its Hub id, never the path of a local folder."""
        return self.base_model or _public_name(self.path)


class TokenPolicy(Section):
    """Which tokens count, in training, statistics and inference alike; stored in every SAE's `cfg.json`."""

    exclude_special: bool = True
    """Leave out the tokenizer's special tokens."""
    sink_norm_multiple: float | None = Field(default=10.0, gt=1)
    """Leave out attention sinks: tokens whose activation norm exceeds this multiple of the hook point's median."""


class Source(Section):
    """One text source: a local json, jsonl, parquet, csv or text file, or a Hub dataset id."""

    path: str
    weight: float = Field(default=1.0, gt=0)
    field: str = "text"
    about: str | None = None
    """A domain of the taxonomy: keep only texts holding one of its words."""
    name: str | None = None
    split: str = "train"
    licence: str = ""
    origin: str = ""
    """What the cards call this source; empty: the Hub id or the file's name."""

    @property
    def title(self) -> str:
        return self.origin or _public_name(self.path)


class CorpusSection(Section):
    """The texts, mixed by weight; whole documents are held out."""

    n_tokens: Count
    n_held_out_tokens: Count
    context: Count = 128
    """Documents are cut into pieces of at most this many tokens."""
    sources: Annotated[tuple[Source, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _held_out_is_a_part(self) -> "CorpusSection":
        if self.n_held_out_tokens * 2 > self.n_tokens:
            raise ValueError(
                f"n_held_out_tokens = {self.n_held_out_tokens} is more than half of n_tokens = {self.n_tokens}"
            )
        return self


class HarvestSection(Section):
    """Where the activations are read."""

    hook_points: Annotated[tuple[str, ...], Field(min_length=1)]
    window: Count = 256
    """Pieces are packed into windows of this many tokens, kept apart by the attention mask."""

    @model_validator(mode="after")
    def _unique(self) -> "HarvestSection":
        if len(set(self.hook_points)) < len(self.hook_points):
            raise ValueError("hook_points names one twice")
        return self


class TrainSection(Section):
    """The sweep: one SAE per hook point and sparsity level, all from one harvest."""

    architecture: Literal["topk"] = "topk"
    d_sae: Count
    k: Annotated[tuple[Count, ...], Field(min_length=1)]
    epochs: Count = 1
    batch_size: Count = 2048
    learning_rate: float = Field(default=1e-3, gt=0)
    warmup: Fraction = 0.05
    decay: Fraction = 0.2
    dead_after_tokens: Count = 100_000
    """A latent that has not fired for so many training tokens is dead and joins the auxiliary loss."""
    aux_k: Count = 256
    aux_coefficient: float = Field(default=1 / 32, ge=0)

    @model_validator(mode="after")
    def _k_fits(self) -> "TrainSection":
        if max(self.k) > self.d_sae:
            raise ValueError(f"k = {max(self.k)} exceeds d_sae = {self.d_sae}; a token cannot have more active latents")
        if len(set(self.k)) < len(self.k):
            raise ValueError("k names one sparsity level twice")
        return self


class EvalSection(Section):
    """Fidelity on held-out documents."""

    n_ce_tokens: Count = 4096
    """Held-out tokens for the cross entropy with the SAE spliced in (the costly part)."""


class SelectSection(Section):
    """Concept contrastive query pairs, and what is read off them."""

    pairs: str = "en"
    """A set in `hub/pairs/`, or a path of a jsonl file."""
    thresholds: tuple[Fraction, ...] = (0.0, 0.1, 0.25, 0.5)
    """The t of L_{0,t}."""
    min_pairs: Count = 2
    """A safety-related latent distinguishes at least so many pairs of the domain."""
    max_latents_per_domain: Count = 40
    """Per hook point, the strongest latents that go on to be explained."""


class CollectSection(Section):
    """Examples and statistics of the chosen latents."""

    before: Count = 16
    after: Count = 8
    """Tokens shown before and after the peak."""
    n_top: Count = 12
    n_per_level: Count = 2
    """Further examples from each of the ten activation levels."""


class ExplainSection(Section):
    """Who explains: the language model in process (`local`), or an OpenAI-compatible endpoint."""

    backend: Literal["local", "endpoint"] = "local"
    model: str = ""
    """The endpoint's model, or a transformers folder or id; empty: the subject model itself."""
    n_examples: Count = 10
    max_tokens: Count = 256
    usd_per_million_prompt_tokens: float | None = None
    usd_per_million_completion_tokens: float | None = None
    encoder: str
    """A sentence encoder (transformers folder or id) that names the domain nearest to an explanation's evidence."""


class ScoreSection(Section):
    """Segment-level simulation."""

    simulators: Annotated[tuple[Literal["embedding", "lexical", "llm"], ...], Field(min_length=1)] = (
        "embedding",
        "lexical",
    )
    """The first one's score is the neuron's score; the others stand beside it."""
    segment_tokens: Count = 5
    n_active_texts: Count = 20
    n_silent_texts: Count = 20
    active_above: Fraction = 0.0
    """A token is active above this normalised activation."""
    model: str = ""
    """The endpoint's model for the `llm` simulator."""
    usd_per_million_prompt_tokens: float | None = None
    usd_per_million_completion_tokens: float | None = None

    @model_validator(mode="after")
    def _model_named(self) -> "ScoreSection":
        if "llm" in self.simulators and not self.model:
            raise ValueError("the llm simulator needs score.model, the name of the endpoint's model")
        return self


class PublishSection(Section):
    """What the cards say about the release as a whole."""

    organization: str = ""
    title: str = ""
    licence: str = "apache-2.0"
    languages: tuple[str, ...] = ("en",)
    version: str = "1.0.0"


class RuntimeSection(Section):
    """How and where, never what: no fingerprint contains these."""

    threads: int | None = None
    windows_per_batch: Count = 8
    checkpoint_seconds: float = 60
    base_url: str | None = None
    """The endpoint's base URL; empty: the openai package's default or OPENAI_BASE_URL."""
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: Count = 8


class Recipe(Section):
    """One release, from the texts to the cards."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,60}$")]
    seed: int = 0
    model: ModelSection
    tokens: TokenPolicy = TokenPolicy()
    corpus: CorpusSection
    harvest: HarvestSection
    train: TrainSection
    eval: EvalSection = EvalSection()
    select: SelectSection = SelectSection()
    collect: CollectSection = CollectSection()
    explain: ExplainSection
    score: ScoreSection = ScoreSection()
    publish: PublishSection = PublishSection()
    runtime: RuntimeSection = RuntimeSection()

    @classmethod
    def load(cls, path: str | Path, overrides: tuple[str, ...] = ()) -> "Recipe":
        """The recipe in the TOML file `path`, with `section.key=value` overrides; InputError says what is wrong."""
        path = Path(path)
        try:
            data = tomllib.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise InputError(f"There is no recipe {path}; the shipped ones are in hub/recipes/.") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path} is not valid TOML: {error}.") from error
        for override in overrides:
            _set(data, override)
        return cls.parse(data, str(path))

    @classmethod
    def parse(cls, data: dict[str, Any], origin: str = "the recipe") -> "Recipe":
        """The recipe in a dictionary; InputError lists every key that is wrong, in one sentence each."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise InputError(f"{origin}: {_sentences(error, cls)}") from error

    def dump(self) -> dict[str, Any]:
        """The recipe as plain JSON values."""
        return self.model_dump(mode="json")


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """The keys in which two dumped recipes differ, as `train.k was [16], is [32]`; `runtime` is left out."""
    found = []
    for key in sorted(set(old) | set(new)):
        name = f"{prefix}{key}"
        before, after = old.get(key), new.get(key)
        if name == "runtime" or before == after:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            found += differences(before, after, f"{name}.")
        else:
            found.append(f"{name} was {_short(before)}, is {_short(after)}")
    return found


def _public_name(path: str) -> str:
    """A Hub id as it is; of a local file or folder the last part, since a release must not tell where it was made."""
    local = Path(path)
    return local.name if local.is_absolute() or local.exists() or local.suffix or path.startswith((".", "~")) else path


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _set(data: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals or not path.strip():
        raise InputError(f"--set {override!r} is not of the form section.key=value, as in --set train.epochs=2.")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string
    *parents, last = path.strip().split(".")
    for parent in parents:
        data = data.setdefault(parent, {})
        if not isinstance(data, dict):
            raise InputError(f"--set {override!r}: {parent} is a value, not a section.")
    data[last] = value


def _sentences(error: ValidationError, root: type[BaseModel]) -> str:
    return " ".join(_sentence(problem, root) for problem in error.errors())


def _sentence(problem: Any, root: type[BaseModel]) -> str:
    name = ".".join(str(part) for part in problem["loc"]) or "the recipe"
    if problem["type"] == "extra_forbidden":
        known = ", ".join(sorted(_fields(root, problem["loc"][:-1])))
        return f"{name} is not a setting (known here: {known})."
    if problem["type"] == "missing":
        return f"{name} is missing."
    message = problem["msg"].removeprefix("Value error, ")
    given = "" if isinstance(problem["input"], dict) else f" (given: {_short(problem['input'])})"
    return f"{name}: {message}{given}."


def _fields(model: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    for part in location:
        if isinstance(part, int):
            continue
        annotation = model.model_fields[part].annotation
        model = annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else Source
    return list(model.model_fields)
