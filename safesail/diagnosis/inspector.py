"""The token inspector: every token of a text or an answer, and the neurons that fire on it.

The activations are those of the very ids that were read or generated: the exact id sequence is run through the model
once, with nothing masked and nothing decoded and tokenised again.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from safesail.errors import InputError
from safesail.lm.generate import chat_prompt, end_ids, stream
from safesail.lm.hooks import run_to_depth
from safesail.lm.load import causal_lm, load_tokenizer, tokenizer_hash
from safesail.lm.tokens import ROLES, Span, counted, role_codes, spans, special_ids
from safesail.neurons import NeuronDatabase, neuron_id, strength
from safesail.recipe import TokenPolicy
from safesail.repository import Repository, part_of_release
from safesail.run import Run
from safesail.sae.model import Sae
from safesail.sae.sparse import Codes

__all__ = ["Answer", "Hit", "Inspection", "Inspector"]

Messages = list[dict[str, str]]


class Hit(NamedTuple):
    """A neuron that fires on a token, with what is known about it."""

    neuron_id: str
    hook_point: str
    latent: int
    activation: float
    normalised: float | None
    """activation / normaliser; 1 is a strong activation. None for a latent that never fired in the corpus."""
    explanation: str | None
    """None when the neuron has no row or its explanation failed (then `status` says why)."""
    domains: list[str]
    score: float | None
    low: float | None
    high: float | None
    trust: str
    """undefined, weak, fair, good or strong; unexplained without a row."""
    explainer: str
    simulator: str
    status: str


@dataclass(frozen=True)
class Inspection:
    """A sequence of tokens and what fired on each. `units` are the readable units, usually one token each."""

    ids: list[int]
    n_prompt: int
    """How many of the ids were given; the rest were generated."""
    units: list[Span]
    codes: dict[str, Codes]
    """Per hook point the active latents of every id."""
    counted: dict[str, Tensor]
    """Per hook point which ids the token policy counts: bool (n_ids,)."""
    error: dict[str, Tensor]
    """Per hook point the share of each activation that the SAE misses, ‖x − x̂‖ / ‖x‖: (n_ids,)."""
    database: NeuronDatabase
    left_out_roles: list[str]
    """Per id the role of its turn where no SAE's token policy counts that role, else an empty string."""

    @property
    def text(self) -> str:
        return "".join(unit.text for unit in self.units)

    @property
    def answer(self) -> str:
        """The generated text, special tokens left out."""
        return "".join(unit.text for unit in self.units if unit.start >= self.n_prompt and not unit.special)

    def is_answer(self, index: int) -> bool:
        """Whether a unit was generated."""
        return self.units[index].start >= self.n_prompt

    def hits(
        self,
        index: int,
        *,
        domain: str | None = None,
        hook_point: str | None = None,
        explained_only: bool = False,
    ) -> list[Hit]:
        """The neurons that fire on a unit, strongest normalised activation first.

        Of a unit of several tokens each neuron counts once, with its strongest activation. Tokens that the policy
        leaves out (special tokens, attention sinks, other roles) have none: the SAEs were not trained on them.
        """
        unit = self.units[index]
        best: dict[tuple[str, int], float] = {}
        for name, codes in self.codes.items():
            if hook_point is not None and name != hook_point:
                continue
            for row in range(unit.start, unit.end):
                if not self.counted[name][row]:
                    continue
                values, latents = codes.of(row)
                for value, latent in zip(values.tolist(), latents.tolist(), strict=True):
                    if value > 0:
                        best[name, latent] = max(value, best.get((name, latent), 0.0))
        hits = [self._hit(name, latent, value) for (name, latent), value in best.items()]
        hits = [hit for hit in hits if domain is None or domain in hit.domains]
        hits = [hit for hit in hits if not explained_only or hit.trust != "unexplained"]
        return sorted(hits, key=lambda hit: (-(hit.normalised or 0.0), hit.neuron_id))

    def note(self, index: int) -> str:
        """Why a unit has no neurons, or an empty string."""
        unit = self.units[index]
        if any(bool(mask[unit.start : unit.end].any()) for mask in self.counted.values()):
            return ""
        if unit.special:
            return "A special token: the token policy leaves it out."
        if role := self.left_out_roles[unit.start]:
            return f"A token of the {role}'s turn: the token policy leaves that role out."
        return "An attention sink (its activation norm is far above the usual): the token policy leaves it out."

    @cached_property
    def _hits_by_unit(self) -> list[list[Hit]]:
        return [self.hits(i, explained_only=True) for i in range(len(self.units))]

    def strengths(self, domains: list[str] | None = None, *, above: float | None = None) -> list[float]:
        """Per unit the strongest normalised activation of an explained neuron of the given (default: any) domains.

        With `above`, only neurons whose score is larger count: of the others it is not known what they are about.
        """
        return [
            max(
                (
                    hit.normalised or 0.0
                    for hit in hits
                    if hit.domains and (domains is None or set(domains) & set(hit.domains))
                    if above is None or (hit.score is not None and hit.score > above)
                ),
                default=0.0,
            )
            for hits in self._hits_by_unit
        ]

    def to_json(self, max_hits: int = 20) -> dict[str, Any]:
        """The inspection as plain JSON: per unit its text, place and strongest explained neurons."""
        return {
            "ids": self.ids,
            "n_prompt": self.n_prompt,
            "tokens": [
                {
                    "text": unit.text,
                    "start": unit.start,
                    "end": unit.end,
                    "answer": self.is_answer(i),
                    "note": self.note(i),
                    "neurons": [hit._asdict() for hit in self._hits_by_unit[i][:max_hits]],
                }
                for i, unit in enumerate(self.units)
            ],
        }

    def _hit(self, hook_point: str, latent: int, activation: float) -> Hit:
        name = neuron_id(hook_point, latent)
        scale = self.database.normaliser(hook_point, latent)
        row = self.database.neurons.get(name)
        known = row or {}
        return Hit(
            neuron_id=name,
            hook_point=hook_point,
            latent=latent,
            activation=activation,
            normalised=activation / scale if scale else None,
            explanation=known.get("explanation"),
            domains=list(known.get("domains") or []),
            score=known.get("score"),
            low=known.get("score_low"),
            high=known.get("score_high"),
            trust=strength(known.get("score")) if row else "unexplained",
            explainer=known.get("explainer") or "",
            simulator=known.get("simulator") or "",
            status=known.get("status") or "",
        )


class Answer(NamedTuple):
    """The state of a streamed answer: its text so far and, at the end, the inspection of the whole conversation."""

    text: str
    inspection: Inspection | None


class Inspector:
    """A language model, its SAEs and the neuron database of one release."""

    def __init__(
        self, model: Any, tokenizer: Any, saes: dict[str, Sae], database: NeuronDatabase, release: str
    ) -> None:
        self.model, self.tokenizer, self.saes, self.database, self.release = model, tokenizer, saes, database, release
        self._specials = special_ids(tokenizer)
        self._ends = end_ids(model, tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        release: str | Path,
        *,
        model: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        device: str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> "Inspector":
        """The inspector of a release: a run folder (`runs/demo`) or the Hub name its repositories start with.

        `model` replaces the language model that the release names (a folder or id); of a run folder the default is
        the model the run was made with, of a Hub release its base model.
        """
        hub: dict[str, Any] = {
            "token": token,
            "cache_dir": cache_dir,
            "force_download": force_download,
            "local_files_only": local_files_only,
        }
        source = part_of_release(release, "saes")
        manifest = Repository(source, "model", revision, **hub).json("config.json")
        saes = Sae.load_all(source, revision=revision, **hub, device=device)
        database = NeuronDatabase.load(release, revision=revision, **hub)
        path, model_revision = (model, None) if model else _model_of(release, manifest)
        tokenizer = load_tokenizer(path, revision=model_revision, **hub)
        _same_tokenizer(tokenizer, manifest, path)
        lm = causal_lm(path, revision=model_revision, device=device, dtype=dtype, **hub)
        return cls(lm, tokenizer, saes, database, str(release))

    def inspect(
        self, text_or_chat: str | Messages, *, max_new_tokens: int = 0, temperature: float = 0.0, seed: int = 0
    ) -> Inspection:
        """What fires on a raw text, or on a conversation in the model's chat template; optionally with its answer."""
        *_, last = self.answer(text_or_chat, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
        assert last.inspection is not None
        return last.inspection

    def answer(
        self, text_or_chat: str | Messages, *, max_new_tokens: int = 256, temperature: float = 0.0, seed: int = 0
    ) -> Iterator[Answer]:
        """Stream the model's answer; the last item carries the inspection of prompt and answer."""
        prompt, roles = self._prompt(text_or_chat)
        self._check_length(len(prompt) + max_new_tokens)
        generated: list[int] = []
        for token in stream(self.model, prompt, max_new_tokens, self._ends, temperature=temperature, seed=seed):
            generated.append(token)
            yield Answer(self._readable(generated), None)
        if roles is not None:
            roles = roles + [ROLES.index("assistant")] * len(generated)
        inspection = self.inspect_ids(prompt + generated, n_prompt=len(prompt), roles=roles)
        yield Answer(self._readable(generated), inspection)

    def encode(self, text_or_chat: str | Messages) -> list[int]:
        """The prompt's ids: a text as it is, a conversation in the chat template."""
        return self._prompt(text_or_chat)[0]

    def _prompt(self, text_or_chat: str | Messages) -> tuple[list[int], list[int] | None]:
        """The prompt's ids and, of a conversation, their role codes where a token policy asks for roles."""
        empty = not text_or_chat or (isinstance(text_or_chat, list) and not text_or_chat[-1]["content"].strip())
        if empty or (isinstance(text_or_chat, str) and not text_or_chat.strip()):
            raise InputError("the prompt is empty; type some text.")
        if isinstance(text_or_chat, str):
            return self.tokenizer(_valid(text_or_chat), add_special_tokens=False)["input_ids"], None
        messages = [{**message, "content": _valid(message["content"])} for message in text_or_chat]
        return chat_prompt(self.tokenizer, messages, roles=any(policy.roles for policy in self._policies))

    @torch.inference_mode()
    def inspect_ids(self, ids: list[int], *, n_prompt: int | None = None, roles: list[int] | None = None) -> Inspection:
        """What fires on an exact id sequence, from one forward pass without LM head.

        roles: per id a code into `lm.tokens.ROLES`; without them the sequence is plain text.
        """
        tensor, outputs = torch.tensor(ids), self._run(ids)
        whose = None if roles is None else torch.tensor(roles)
        codes, keep, error = {}, {}, {}
        for name, sae in self.saes.items():
            x, config = outputs[name], sae.config
            keep[name] = counted(config.token_policy, tensor, x.norm(dim=-1), self._specials, config.median_norm, whose)
            active = sae.encode_sparse(x.to(sae.W_enc.device))
            codes[name] = active.to("cpu")
            error[name] = (x - sae.decode_sparse(active, like=x.to(sae.W_enc.device)).cpu()).norm(dim=-1) / x.norm(
                dim=-1
            )
        units = spans(self.tokenizer, ids)
        n_prompt = len(ids) if n_prompt is None else n_prompt
        left_out = self._left_out_roles(roles or [0] * len(ids))
        return Inspection(ids, n_prompt, units, codes, keep, error, self.database, left_out)

    def activations(self, text_or_chat: str | Messages, hook_point: str) -> Tensor:
        """The model's activations at a hook point of the release, one row per token of the text: (n_tokens, d_in)."""
        if hook_point not in self.saes:
            raise InputError(f"{self.release} has no SAE at {hook_point!r}; it has {', '.join(self.saes)}.")
        return self._run(self.encode(text_or_chat))[hook_point]

    @torch.inference_mode()
    def _run(self, ids: list[int]) -> dict[str, Tensor]:
        self._check_length(len(ids))
        tensor = torch.tensor([ids], device=self.model.device)
        outputs = run_to_depth(self.model, tuple(self.saes), input_ids=tensor)
        return {name: x[0].float().cpu() for name, x in outputs.items()}

    @property
    def _policies(self) -> list[TokenPolicy]:
        return [sae.config.token_policy for sae in self.saes.values()]

    def _left_out_roles(self, roles: list[int]) -> list[str]:
        kept = {code for policy in self._policies for code in role_codes(policy)}
        return ["" if code in kept else ROLES[code] for code in roles]

    @property
    def max_tokens(self) -> int:
        """The longest sequence the model reads."""
        return int(getattr(self.model.config, "max_position_embeddings", 2048))

    def _check_length(self, n: int) -> None:
        if n > self.max_tokens:
            raise InputError(
                f"prompt and answer take {n:,} tokens, but the model reads {self.max_tokens:,}; shorten them."
            )

    def _readable(self, ids: list[int]) -> str:
        return "".join(unit.text for unit in spans(self.tokenizer, ids) if not unit.special)


def _model_of(release: str | Path, manifest: dict[str, Any]) -> tuple[str, str | None]:
    """Where to load the language model from: the run's own folder while it is there, else the base model's id."""
    folder = Path(release)
    if (folder / "run.json").is_file():
        section = Run.open(folder).recipe.model
        if Path(section.path).is_dir() or not section.base_model:
            return section.path, section.revision
    return manifest["base_model"], manifest.get("base_model_revision")


def _same_tokenizer(tokenizer: Any, manifest: dict[str, Any], path: str) -> None:
    if manifest.get("tokenizer_hash") not in (None, tokenizer_hash(tokenizer)):
        raise InputError(
            f"the tokenizer of {path} is not the one these SAEs were trained with; "
            f"give the model {manifest['base_model']} (`--model`)."
        )


def _valid(text: str) -> str:
    """The text with lone surrogates replaced, which no tokenizer accepts."""
    return text.encode("utf-8", errors="replace").decode()
