"""The reward inspector: two answers to one prompt side by side, and the latents that make the difference.

Texts, segment ends and activations are those of the stages: the same chat template and left truncation, the same ends,
activations rounded as they were stored. So a published pair gets its published numbers again, but for rounding.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safesail.errors import InputError
from safesail.lm.hooks import capture
from safesail.lm.load import tokenizer_hash
from safesail.lm.tokens import Span, counted, spans, special_ids
from safesail.neurons import neuron_id
from safesail.repository import Repository, part_of_release, parts_of_release
from safesail.reward_recipe import RewardRecipe
from safesail.rewards.model import RewardModel
from safesail.rewards.preferences import SIDES, Preference
from safesail.rewards.published import Published, PublishedPair, recipe_of
from safesail.rewards.readings import Comparison, LatentDifference, Side, Unit, activations_of
from safesail.rewards.safety_score import SafetyScores, score_safe
from safesail.rewards.segments import segment_ends
from safesail.rewards.texts import Text, encode_side
from safesail.sae.model import Sae
from safesail.sae.sparse import Codes

__all__ = ["RewardInspector"]

N_OTHERS = 8
"""Latents beside the safety latents that a comparison lists."""
Prompt = str | Sequence[dict[str, str]]


class RewardInspector:
    """A reward model, its SAE and what is published of its latents and pairs."""

    def __init__(
        self,
        reward_model: RewardModel,
        sae: Sae,
        published: Published,
        recipe: RewardRecipe,
        release: str,
        parts: tuple[str, ...] = (),
    ) -> None:
        self.reward_model, self.sae, self.published, self.recipe = reward_model, sae, published, recipe
        self.release, self.parts = release, parts
        self.positive, self.negative = published.safety("positive"), published.safety("negative")
        if not self.positive and not self.negative:
            raise InputError(
                f"no latent of {release} is marked as a safety latent, so no pair has a score_safe; build the release "
                "again with a lower rate.keep."
            )
        self._specials = special_ids(reward_model.tokenizer)

    @classmethod
    def from_pretrained(
        cls,
        release: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
        device: str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> "RewardInspector":
        """The inspector of a release: a run folder (`runs/safer-demo`) or the Hub name its repositories start with.

        dtype: of the reward model; None: the one its release was made with.
        """
        hub: dict[str, Any] = {
            "token": token,
            "cache_dir": cache_dir,
            "force_download": force_download,
            "local_files_only": local_files_only,
        }
        parts = parts_of_release(release, revision=revision, **hub)
        if "reward" not in parts:
            raise InputError(
                f"{release} is a release of a language model's SAEs and has no reward model; look at it with "
                "safesail.Inspector, as `safesail inspect` does."
            )
        source = part_of_release(release, "saes")
        repository = Repository(source, "model", revision, **hub)
        recipe = recipe_of(repository)
        sae = Sae.from_pretrained(source, recipe.hook_point, revision=revision, **hub, device=device)
        precision = dtype or getattr(torch, recipe.model.dtype)
        path = part_of_release(release, "reward")
        reward_model = RewardModel.load(path, revision=revision, dtype=precision, device=device, **hub)
        if repository.json("config.json").get("tokenizer_hash") not in (None, tokenizer_hash(reward_model.tokenizer)):
            raise InputError(f"the tokenizer of {path} is not the one that the SAE of {source} was trained with.")
        published = Published(release, revision=revision, **hub)
        return cls(reward_model, sae, published, recipe, str(release), parts)

    # --- published pairs ------------------------------------------------------------------------------------------

    def pairs(self, kind: str | None = None, held_out: bool | None = None) -> list[PublishedPair]:
        """The published pairs, those of the highest score_safe first; of one kind or split alone where it is given."""
        if kind not in (None, "safety", "chat"):
            raise InputError(f"the kind is {kind!r}; use safety or chat.")
        texts = self.published.texts()
        pairs = [self.published.pair(id, texts) for id in self.published.scores]
        wanted = [p for p in pairs if kind in (None, p.kind) and held_out in (None, p.held_out)]
        return sorted(wanted, key=lambda pair: (-pair.score_safe, pair.id))

    def pair(self, pair_id: str) -> PublishedPair:
        """One published pair; InputError for an id that there is not."""
        return self.published.pair(pair_id, self.published.texts())

    # --- two answers side by side ---------------------------------------------------------------------------------

    def compare(self, prompt: Prompt, chosen: str, rejected: str) -> Comparison:
        """Both answers as the reward model reads them. prompt: a text, or the messages before the answer.

        A conversation that is longer than the model was trained on loses its beginning (`Side.text.n_cut`).
        """
        preference = _preference(prompt, chosen, rejected)
        first, second = (self._side(preference, side) for side in SIDES)
        scores = self._scores(first, second)
        return Comparison(
            preference.prompt,
            chosen=first,
            rejected=second,
            score_safe=float(scores.score[0]),
            safe_chosen=float(scores.safe[0, 0]),
            safe_rejected=float(scores.safe[0, 1]),
            latents=self._safety_latents(first, second),
            others=self._other_latents(first, second),
        )

    def _scores(self, *sides: Side) -> SafetyScores:
        """score_safe of one pair, by the function of the stage."""
        z = torch.cat([activations_of(side.codes, [*self.positive, *self.negative])[side.ends] for side in sides])
        which = torch.tensor([0, 1]).repeat_interleave(torch.tensor([len(side.ends) for side in sides]))
        n_positive = len(self.positive)
        return score_safe(z[:, :n_positive], z[:, n_positive:], torch.zeros_like(which), which, 1)

    @torch.inference_mode()
    def _side(self, preference: Preference, side: str) -> Side:
        tokenizer = self.reward_model.tokenizer
        text = encode_side(tokenizer, preference, side, self.recipe.reward.max_length)
        if not text.answer:
            raise InputError(f"the {side} answer has no tokens; type a text.")
        with capture(self.reward_model.model, (self.recipe.hook_point,)) as outputs:
            rewards = self.reward_model.token_rewards(text.ids)
        x = outputs[self.recipe.hook_point][0].float().cpu()
        codes, is_sink = self._codes(x), self._sinks(text, x)
        ends = [end for end in segment_ends(tokenizer, text, self.recipe.ends) if not is_sink[end]]
        units = self._units(text, ends, codes, is_sink, rewards)
        return Side(text, units, ends, codes, self.sae.config.d_sae, float(rewards[-1]))

    def _codes(self, x: Tensor) -> Codes:
        """The active latents of activations rounded as those of the stages are. x: (n_tokens, d_in)."""
        stored = x.to(getattr(torch, self.recipe.harvest.dtype)).float()
        return self.sae.encode_sparse(stored.to(self.sae.W_enc.device)).to("cpu")

    def _sinks(self, text: Text, x: Tensor) -> list[bool]:
        """Which tokens are attention sinks, or could not be read: they count nowhere. x: (n_tokens, d_in)."""
        config = self.sae.config
        policy = config.token_policy.model_copy(update={"exclude_special": False, "roles": ()})
        keep = counted(policy, torch.tensor(text.ids), x.norm(dim=-1), [], config.median_norm)
        return (~keep).tolist()

    def _units(self, text: Text, ends: list[int], codes: Codes, is_sink: list[bool], rewards: Tensor) -> list[Unit]:
        of_sign = [activations_of(codes, latents).double().sum(1) for latents in (self.positive, self.negative)]
        at_end = set(ends)

        def unit(span: Span) -> Unit:
            end = next((i for i in reversed(range(span.start, span.end)) if i in at_end), None)
            position = span.end - 1 if end is None else end
            unread = is_sink[position] or (span.special and end is None)
            values = [None if unread else float(each[position]) for each in of_sign]
            is_answer = span.start < text.answer.stop and span.end > text.answer.start
            return Unit(
                span.text, position, span.special, is_answer, end is not None, float(rewards[span.end - 1]), *values
            )

        return [unit(span) for span in spans(self.reward_model.tokenizer, text.ids)]

    # --- latents --------------------------------------------------------------------------------------------------

    def _safety_latents(self, chosen: Side, rejected: Side) -> list[LatentDifference]:
        """Those that add or take most first."""
        latents = [self._difference(latent, chosen, rejected) for latent in (*self.positive, *self.negative)]
        return sorted(latents, key=lambda each: -abs(each.contribution))

    def _other_latents(self, chosen: Side, rejected: Side) -> list[LatentDifference]:
        """The strongest of those that do not count."""
        difference = (chosen.means - rejected.means).abs()
        difference[[*self.positive, *self.negative]] = 0
        strongest = difference.topk(min(N_OTHERS, len(difference)))
        found = zip(strongest.indices.tolist(), strongest.values.tolist(), strict=True)
        return [self._difference(latent, chosen, rejected) for latent, size in found if size > 0]

    def _difference(self, latent: int, chosen: Side, rejected: Side) -> LatentDifference:
        known, published = self.published.latents.get(latent, {}), self.published
        return LatentDifference(
            latent=latent,
            neuron_id=neuron_id(self.recipe.hook_point, latent),
            safety=known.get("safety") or "",
            chosen=float(chosen.means[latent]),
            rejected=float(rejected.means[latent]),
            **{name: known.get(name) for name in ("salience", "low", "high", "rating")},
            status=known.get("status") or "",
            explanation=published.explanations.get(latent),
            tokens=published.strongest.get(latent, ()),
        )


def _preference(prompt: Prompt, chosen: str, rejected: str) -> Preference:
    """A typed pair; InputError where there are not two different answers to something."""
    if isinstance(prompt, str):
        if not prompt.strip():
            raise InputError("the prompt is empty; type what was asked.")
        prompt = [{"role": "user", "content": prompt}]
    for side, answer in zip(SIDES, (chosen, rejected), strict=True):
        if not answer.strip():
            raise InputError(f"the {side} answer is empty; type a text.")
    if chosen == rejected:
        raise InputError("both answers are the same, so that nothing tells them apart; change one of them.")
    messages = tuple({**message, "content": _valid(message["content"])} for message in prompt)
    return Preference("typed", "safety", "", messages, _valid(chosen), _valid(rejected), True)


def _valid(text: str) -> str:
    """The text with lone surrogates replaced, which no tokenizer accepts."""
    return text.encode("utf-8", errors="replace").decode()
