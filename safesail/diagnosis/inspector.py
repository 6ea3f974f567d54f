"""The token inspector: every token of a text or an answer, and the neurons that fire on it.

The activations are those of the very ids that were read or generated: the exact id sequence is run through the model
once, with nothing masked and nothing decoded and tokenised again.
"""

from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from safesail.diagnosis.base_model import base_model_of, same_tokenizer
from safesail.diagnosis.inspection import Inspection
from safesail.errors import InputError
from safesail.lm.generate import chat_prompt, end_ids, stream
from safesail.lm.hooks import run_to_depth
from safesail.lm.load import causal_lm, load_tokenizer
from safesail.lm.tokens import ROLES, counted, role_codes, spans, special_ids
from safesail.lm.unembedding import direct_effects
from safesail.neurons import NeuronDatabase, parse_neuron_id
from safesail.recipe import TokenPolicy
from safesail.repository import Repository, part_of_release
from safesail.sae.model import Sae

__all__ = ["Answer", "Inspector", "Promoted"]

Messages = list[dict[str, str]]


class Promoted(NamedTuple):
    """A token that a neuron's direction makes likelier."""

    token: int
    text: str
    effect: float
    """On its logit, in units that compare within one neuron."""


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
        if isinstance(manifest, dict) and manifest.get("kind") == "reward":
            raise InputError(
                f"{release} is of a reward model, whose latents have no explanations; look at it with "
                f"safesail.RewardInspector, `safesail serve {release}` or `safesail inspect {release} PROMPT --chosen "
                "ANSWER --rejected ANSWER`."
            )
        saes = Sae.load_all(source, revision=revision, **hub, device=device)
        database = NeuronDatabase.load(release, revision=revision, **hub)
        path, model_revision = (model, None) if model else base_model_of(release, manifest)
        tokenizer = load_tokenizer(path, revision=model_revision, **hub)
        same_tokenizer(tokenizer, path, manifest)
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
        prompt, roles = self.prompt(text_or_chat)
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
        return self.prompt(text_or_chat)[0]

    def prompt(self, text_or_chat: str | Messages) -> tuple[list[int], list[int] | None]:
        """A prompt's ids and, of a conversation, their role codes where a token policy asks for roles."""
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

    def place_of(self, id: str) -> tuple[str, int]:
        """The hook point and latent of an id in either form; InputError for what is no latent of the release's SAEs."""
        hook_point, latent = parse_neuron_id(id, self.saes)
        d_sae = self.saes[hook_point].config.d_sae
        if latent >= d_sae:
            raise InputError(f"{hook_point} has no latent {latent}; its latents are 0 to {d_sae - 1}.")
        return hook_point, latent

    @torch.inference_mode()
    def promoted_tokens(self, id: str, n: int = 10) -> list[Promoted]:
        """The tokens whose logits a neuron raises most on the direct path from its decoder row to the unembedding.

        The final norm sees the decoder row alone, so that effects compare within a neuron only; what later layers do
        with the direction is not in them (the logit lens of its decoder row).
        """
        hook_point, latent = self.place_of(id)
        effects = direct_effects(self.model, self.saes[hook_point].W_dec[latent])
        strongest = effects.topk(min(n, len(effects)))
        pairs = zip(strongest.indices.tolist(), strongest.values.tolist(), strict=True)
        return [Promoted(token, self.tokenizer.decode([token]), effect) for token, effect in pairs]

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

    @cached_property
    def identity(self) -> dict[str, str]:
        """{hook point: which SAE is read there}, by which a result is told from those of another release."""
        return {name: sae.identity for name, sae in self.saes.items()}

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


def _valid(text: str) -> str:
    """The text with lone surrogates replaced, which no tokenizer accepts."""
    return text.encode("utf-8", errors="replace").decode()
