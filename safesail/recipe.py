"""A recipe: one TOML file, one release. A validated section per stage; unknown keys are refused.

Everything that can change a release's bytes is in a recipe; what only changes how fast or where it is made is in
`[runtime]`, which no fingerprint contains.
"""

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from safesail.errors import InputError

__all__ = [
    "Architecture",
    "AskedSection",
    "BaseRecipe",
    "BaseSource",
    "CorpusSection",
    "Count",
    "Fraction",
    "HarvestSection",
    "Method",
    "Natural",
    "Normalisation",
    "PublishSection",
    "Recipe",
    "ScoreSection",
    "Section",
    "Source",
    "TokenPolicy",
    "TrainSection",
    "differences",
    "recipe_data",
]

Fraction = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Language = Annotated[str, Field(pattern=r"^[a-z]{2,3}(-[A-Za-z0-9]+)*$")]
Coefficient = Annotated[float, Field(gt=0)]
Architecture = Literal["relu", "topk", "batchtopk", "jumprelu", "matryoshka"]
Dtype = Literal["float32", "bfloat16", "float16"]
Normalisation = Literal["none", "layer_norm", "constant_norm_rescale"]


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
    dtype: Dtype = "float32"
    """What the weights are computed in; bfloat16 is for GPUs (on a CPU without bf16 units it is many times slower)."""
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
    roles: tuple[str, ...] = ()
    """Of conversations, count only the tokens of these roles, as ["user", "assistant"]; empty: of all. Tokens of plain
    texts have no role and always count."""


class BaseSource(Section):
    """Where rows come from: a local file, or a Hub dataset id."""

    path: str
    name: str | None = None
    """A config of a Hub data set."""
    split: str = "train"
    """A split of a Hub data set."""
    licence: str = ""
    origin: str = ""
    """What the cards call this source; empty: the Hub id or the file's name."""

    @property
    def title(self) -> str:
        return self.origin or _public_name(self.path)


class Source(BaseSource):
    """One text source: a local json, jsonl, parquet, csv or text file, or a Hub dataset id."""

    weight: float = Field(default=1.0, gt=0)
    field: str = "text"
    """The field that holds the text, or a conversation: a list of {role, content}, put through the chat template."""
    about: str | None = None
    """A domain of the taxonomy: keep only texts holding one of its words."""


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
    dtype: Dtype = "float16"
    """What activations are stored in. float16 is exact to 0.05 % and ends at 65,504."""
    bad_activations: Literal["stop", "skip"] = "stop"
    """What to do with a token whose activation is not finite or not storable: stop, or leave the token out."""

    @model_validator(mode="after")
    def _unique(self) -> "HarvestSection":
        if len(set(self.hook_points)) < len(self.hook_points):
            raise ValueError("hook_points names one twice")
        return self


class TrainSection(Section):
    """The sweep: per hook point one SAE per architecture and sparsity level, all trained on the same activations.

    Inputs are scaled so that their mean norm is √d_in, so the settings below mean the same at every hook point.
    """

    architectures: Annotated[tuple[Architecture, ...], Field(min_length=1)] = ("topk",)
    d_sae: Count
    k: tuple[Count, ...] = ()
    """Active latents per token, for topk, batchtopk and matryoshka."""
    l1: tuple[Coefficient, ...] = ()
    """Sparsity coefficients for relu."""
    l0: tuple[Coefficient, ...] = ()
    """Sparsity coefficients for jumprelu."""
    widths: tuple[Count, ...] = ()
    """The nested dictionaries of matryoshka, ascending; d_sae is added. Empty: d_sae/16, /8, /4, /2 and d_sae."""
    bandwidth: float = Field(default=1.0, gt=0)
    """The width ε of jumprelu's gradient window around its threshold, in scaled pre-activations."""
    stream_tokens: Count | None = None
    """Train on so many tokens read on the fly; empty: on the harvested activations."""
    buffer_tokens: Count = 262_144
    """While streaming: tokens that are read, shuffled together and used up before the next ones are read."""
    epochs: Count = 1
    batch_size: Count = 2048
    learning_rate: float = Field(default=1e-3, gt=0)
    warmup: Fraction = 0.05
    decay: Fraction = 0.2
    sparsity_warmup: Fraction = 0.25
    """The share of the steps over which the sparsity coefficients of relu and jumprelu grow from zero."""
    dead_after_tokens: Count = 100_000
    """A latent that has not fired for so many training tokens is dead and joins the auxiliary loss."""
    aux_k: Count = 256
    aux_coefficient: float = Field(default=1 / 32, ge=0)

    def levels(self, architecture: Architecture) -> tuple[float, ...]:
        """The sparsity levels of an architecture: k, or the coefficients of its penalty."""
        return {"relu": self.l1, "jumprelu": self.l0}.get(architecture, self.k)

    @property
    def nested_widths(self) -> tuple[int, ...]:
        """The widths of matryoshka's dictionaries, ascending, the last one d_sae."""
        given = self.widths or tuple(self.d_sae // n for n in (16, 8, 4, 2) if self.d_sae // n)
        return tuple(sorted({*given, self.d_sae}))

    @model_validator(mode="after")
    def _sweep_is_whole(self) -> "TrainSection":
        for architecture in self.architectures:
            key = {"relu": "l1", "jumprelu": "l0"}.get(architecture, "k")
            if not self.levels(architecture):
                raise ValueError(f"architecture {architecture} needs {key}, as train.{key} = {_EXAMPLE[key]}")
        for key in ("architectures", "k", "l1", "l0"):
            if len(set(getattr(self, key))) < len(getattr(self, key)):
                raise ValueError(f"{key} names one value twice")
        if max(self.k, default=0) > self.d_sae:
            raise ValueError(f"k = {max(self.k)} exceeds d_sae = {self.d_sae}; a token cannot have more active latents")
        if max(self.widths, default=0) > self.d_sae:
            raise ValueError(f"widths holds {max(self.widths)}, more than d_sae = {self.d_sae}")
        if self.stream_tokens is not None and self.epochs > 1:
            raise ValueError("epochs is for harvested activations; with stream_tokens every token is read once")
        if self.stream_tokens is not None and self.buffer_tokens < self.batch_size:
            raise ValueError(f"buffer_tokens = {self.buffer_tokens} does not fill a batch of {self.batch_size}")
        return self


_EXAMPLE = {"k": "[32, 64]", "l1": "[0.1]", "l0": "[0.002]"}


class EvalSection(Section):
    """Fidelity on held-out documents."""

    n_ce_tokens: Count = 4096
    """Held-out tokens for the cross entropy with the SAE spliced in (the costly part)."""


class SelectSection(Section):
    """Concept contrastive query pairs, and what is read off them."""

    pairs: Annotated[tuple[str, ...], Field(min_length=1)] = ("en",)
    """Sets in `hub/pairs/`, as ["en", "zh"], or paths of jsonl files."""
    thresholds: tuple[Fraction, ...] = (0.0, 0.1, 0.25, 0.5)
    """The t of L_{0,t}."""
    reduction: Literal["max", "mean", "last"] = "max"
    """How a latent's activations on a query's tokens become one number."""
    activity_quantile: float = Field(default=0.0, ge=0, lt=1)
    """A latent is active on a query above this quantile of its activations over held-out tokens; 0: above zero."""
    criterion: Literal["above_null", "i_cdf"] = "above_null"
    """What the selected SAE is best at: I_CDF less what swapped pairs give, or I_CDF as it is."""
    fdr: float = Field(default=0.1, gt=0, lt=1)
    """The false-discovery rate at which latents are chosen per domain and per category."""
    min_pairs: Count = 2
    """A safety-related latent distinguishes at least so many pairs."""
    n_resamples: Count = 1000
    """Of the bootstrap over pairs, and of the permutations that give the null."""
    max_latents_per_domain: Count = 40
    """Per hook point, the strongest latents that go on to be explained."""

    @field_validator("pairs", mode="before")
    @classmethod
    def _one_name(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class CollectSection(Section):
    """Examples and statistics of the chosen latents."""

    before: Count = 16
    after: Count = 8
    """Tokens shown before and after the peak."""
    n_top: Count = 12
    n_per_level: Count = 2
    """Further examples from each of the ten activation levels."""
    n_near_misses: Natural = 4
    """Contexts that hold one of the latent's strongest tokens and leave it silent."""


class AskedSection(Section):
    """A stage that asks a language model: in process (`local`), or an OpenAI-compatible endpoint."""

    backend: Literal["local", "endpoint"] = "local"
    model: str = ""
    """The endpoint's model, or a transformers folder or id; empty: the subject model itself."""
    tokenizer: str = ""
    """A transformers folder or id that counts an endpoint's tokens for the estimate; empty: the subject model's."""
    usd_per_million_prompt_tokens: float | None = Field(default=None, ge=0)
    usd_per_million_completion_tokens: float | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _endpoint_named(self) -> "AskedSection":
        if self.backend == "endpoint" and not self.model:
            raise ValueError("backend is 'endpoint' but model is empty; name the endpoint's model")
        return self


class ExplainSection(AskedSection):
    """Who explains, and in which languages."""

    languages: Annotated[tuple[Language, ...], Field(min_length=1)] = ("en", "zh")
    """The first one's explanation is the neuron's; a local model knows the first alone."""
    n_examples: Count = 10
    n_near_misses: Natural = 3
    """Contexts shown on which the latent is silent although they look alike."""
    max_tokens: Count = 400
    encoder: str
    """A sentence encoder (transformers folder or id) that names the domain nearest to an explanation's evidence."""


Method = Literal[
    "segment-embedding",
    "segment-lexical",
    "segment-llm",
    "token-lexical",
    "token-llm",
    "text-embedding",
    "text-lexical",
    "text-llm",
]
"""What is predicted (the activity of a segment, of a token, of a whole text) and by whom. text-llm is detection,
text-embedding is similarity."""


class ScoreSection(AskedSection):
    """Simulation: how well an explanation predicts where its neuron is active."""

    methods: Annotated[tuple[Method, ...], Field(min_length=1)] = ("segment-embedding", "segment-lexical")
    """The first one's score is the neuron's score; the others stand beside it."""
    languages: tuple[Language, ...] = ()
    """The explanations that are scored; empty: of every language."""
    segment_tokens: Count = 5
    n_active_texts: Count = 20
    n_silent_texts: Count = 20
    active_above: Fraction = 0.0
    """A token is active above this normalised activation."""
    segments_per_request: Count = 60
    """Segments of one neuron that one request asks about."""
    neurons_per_request: Count = 1
    """More than 1: neurons whose shared texts are sent once, with all their explanations."""
    logprobs: bool = False
    """Ask an endpoint for log-probabilities, and simulate by probabilities instead of yes and no."""


class PublishSection(Section):
    """What the cards say about the release as a whole."""

    organization: Annotated[str, Field(pattern=r"^([A-Za-z0-9](-?[A-Za-z0-9])*)?$", max_length=42)] = ""
    """The Hub user or organization that the repositories belong to; empty: the release cannot be published yet."""
    title: str = ""
    licence: str = "apache-2.0"
    """A licence of the Hub; it may not allow what the model's or the texts' licences forbid."""
    languages: tuple[Language, ...] = ("en",)
    version: Annotated[str, Field(pattern=r"^\d+\.\d+\.\d+([.-][0-9A-Za-z.-]+)?$")] = "1.0.0"
    """The version of the release: the tag `v<version>` on every repository."""
    gate: Literal["auto", "manual"] = "manual"
    """How the Hub gives access to the examples: to everybody who consents, or to those the owner lets in."""


class RuntimeSection(Section):
    """How and where, never what: no fingerprint contains these."""

    threads: int | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one."""
    parallel: Literal["hook_points", "data"] = "hook_points"
    """Under torchrun: every rank trains its own hook points, or all ranks train each SAE on shares of its batches."""
    saes_at_once: Count | None = None
    """Train at most so many SAEs of the sweep at a time (less memory, more passes over the activations)."""
    windows_per_batch: Count = 8
    checkpoint_seconds: float = 60
    base_url: str | None = None
    """The endpoint's base URL; empty: the openai package's default or OPENAI_BASE_URL."""
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: Count = 8
    timeout_seconds: float = Field(default=120, gt=0)
    """How long an endpoint may take for one answer."""
    budget_usd: float | None = Field(default=None, ge=0)
    budget_tokens: Natural | None = None
    """A command stops before it spends more than this on language models; empty: no limit."""
    collect_megabytes: Count = 1024
    """Memory for the activations that `collect` sorts at a time; more are kept on disk meanwhile."""


class BaseRecipe(Section):
    """What every kind of release has: a model, texts, activations, SAEs, cards."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,60}$")]
    seed: int = 0
    model: ModelSection
    tokens: TokenPolicy = TokenPolicy()
    corpus: CorpusSection
    harvest: HarvestSection
    train: TrainSection
    publish: PublishSection = PublishSection()
    runtime: RuntimeSection = RuntimeSection()

    @property
    def normalize_activations(self) -> Normalisation:
        """What the SAEs do to every token's activation before they read it (see `sae.norm`)."""
        return "none"

    @property
    def subject(self) -> str:
        """What cards and configs call the model that the SAEs read."""
        return self.model.name

    @classmethod
    def load(cls, path: str | Path, overrides: tuple[str, ...] = ()) -> Self:
        """The recipe in the TOML file `path`, with `section.key=value` overrides; InputError says what is wrong."""
        return cls.parse(recipe_data(path, overrides), str(path))

    @classmethod
    def parse(cls, data: dict[str, Any], origin: str = "the recipe") -> Self:
        """The recipe in a dictionary; InputError lists every key that is wrong, in one sentence each."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise InputError(f"{origin}: {_sentences(error, cls)}") from error

    def dump(self) -> dict[str, Any]:
        """The recipe as plain JSON values, in the order in which a recipe is read: how and where come last."""
        data = self.model_dump(mode="json")
        return data | {last: data.pop(last) for last in ("publish", "runtime")}


class Recipe(BaseRecipe):
    """One release of Safe-SAIL's kind: SAEs of a language model and what their safety-related latents mean."""

    eval: EvalSection = EvalSection()
    select: SelectSection = SelectSection()
    collect: CollectSection = CollectSection()
    explain: ExplainSection
    score: ScoreSection = ScoreSection()

    @classmethod
    def parse(cls, data: dict[str, Any], origin: str = "the recipe") -> Self:
        if "preferences" in data:
            raise InputError(
                f"{origin} has preferences, so it is a recipe of SAFER; "
                "read it with safesail.reward_recipe.load_recipe."
            )
        return super().parse(data, origin)


def recipe_data(path: str | Path, overrides: tuple[str, ...] = ()) -> dict[str, Any]:
    """What the TOML file `path` says, with `section.key=value` overrides, before it is validated."""
    path = Path(path)
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"There is no recipe {path}; the shipped ones are in hub/recipes/.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid TOML: {error}.") from error
    for override in overrides:
        _set(data, override)
    return data


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
    place: Any = data
    for parent in parents:
        place = place.setdefault(parent, {}) if isinstance(place, dict) else place[_entry(place, parent, override)]
        if not isinstance(place, dict | list):
            raise InputError(f"--set {override!r}: {parent} is a value, not a section.")
    if isinstance(place, dict):
        place[last] = value
    else:
        place[_entry(place, last, override)] = value


def _entry(entries: list[Any], name: str, override: str) -> int:
    """Which entry of a list a name means: `0` is the first."""
    if not name.isdecimal() or int(name) >= len(entries):
        there = f"there are {len(entries)}, counted from 0" if entries else "the list is empty"
        raise InputError(f"--set {override!r}: {name!r} is not the number of an entry of the list; {there}.")
    return int(name)


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
        if not isinstance(part, int):
            model = _section(model.model_fields[part].annotation)
    return list(model.model_fields)


def _section(annotation: Any) -> type[BaseModel]:
    """The section that an annotation names, also as the kind of a tuple's members."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(found for part in get_args(annotation) if part is not ... and (found := _section(part)))
