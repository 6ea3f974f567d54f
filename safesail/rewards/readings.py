"""Two answers to one prompt as a reward model reads them: every token's numbers, and the latents that differ."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from safesail.rewards.texts import Text
from safesail.sae.sparse import Codes

__all__ = ["Comparison", "LatentDifference", "Side", "Unit", "activations_of"]

Row = dict[str, Any]


class Unit(NamedTuple):
    """What is shown as one token: usually one, several where a character is split over tokens.

    Its activations are those at `position`: at the last segment end in it, else at its last token.
    """

    text: str
    position: int
    """In the side's `text.ids`."""
    special: bool
    is_answer: bool
    is_end: bool
    """Whether it is a segment end, which counts for score_safe."""
    reward: float
    """What the head gives after it; that of the last unit is the side's reward."""
    positive: float | None
    """Summed activation of the positive safety latents; None where the SAE is not to be read (special tokens, attention
    sinks)."""
    negative: float | None

    @property
    def safe(self) -> float | None:
        """`positive` less `negative`."""
        return None if self.positive is None or self.negative is None else self.positive - self.negative


@dataclass(frozen=True)
class Side:
    """One answer after its prompt, as the reward model reads it."""

    text: Text
    units: list[Unit]
    ends: list[int]
    """Positions of the segment ends that count, ascending."""
    codes: Codes
    """The active latents of every token."""
    d_sae: int
    reward: float

    @cached_property
    def means(self) -> Tensor:
        """The mean activation of every latent over `ends`, fp64 (d_sae,)."""
        at_end = torch.zeros(self.codes.n_tokens, dtype=torch.bool)
        at_end[self.ends] = True
        counts = at_end[self.codes.tokens().long()] & (self.codes.values > 0)
        sums = torch.zeros(self.d_sae, dtype=torch.float64)
        sums.index_add_(0, self.codes.indices[counts].long(), self.codes.values[counts].double())
        return sums / max(len(self.ends), 1)

    def firings(self, latent: int) -> dict[int, float]:
        """The units on which a latent fires, by their number, with its activation; those without numbers left out."""
        values = activations_of(self.codes, [latent])[:, 0].tolist()
        shown = ((i, values[unit.position]) for i, unit in enumerate(self.units) if unit.positive is not None)
        return {i: value for i, value in shown if value > 0}

    def to_json(self) -> Row:
        return {
            "reward": self.reward,
            "n_ends": len(self.ends),
            "n_tokens": len(self.text.ids),
            "n_cut": self.text.n_cut,
            "tokens": [unit._asdict() for unit in self.units],
        }


class LatentDifference(NamedTuple):
    """A latent on both sides, with what is published of it."""

    latent: int
    neuron_id: str
    safety: str
    """`positive` or `negative`: with which sign it counts for score_safe; empty: it does not."""
    chosen: float
    """Mean activation over the segment ends of the chosen answer."""
    rejected: float
    salience: float | None
    """None: it fired on no pair that salience was computed from."""
    low: float | None
    high: float | None
    rating: int | None
    status: str
    """How its rating ended; empty: it was not rated."""
    explanation: str | None
    """Why it was rated so; None where ratings cannot be read."""
    tokens: tuple[str, ...]
    """The tokens or words on which it is strongest in the preference data, where they can be read."""

    @property
    def difference(self) -> float:
        """`chosen` less `rejected`."""
        return self.chosen - self.rejected

    @property
    def contribution(self) -> float:
        """What it adds to score_safe, negative where it takes away; the contributions sum to the score."""
        return {"positive": self.difference, "negative": 0.0 - self.difference}.get(self.safety, 0.0)

    def to_json(self) -> Row:
        return self._asdict() | {"difference": self.difference, "contribution": self.contribution}


@dataclass(frozen=True)
class Comparison:
    """A chosen and a rejected answer side by side."""

    prompt: tuple[dict[str, str], ...]
    chosen: Side
    rejected: Side
    score_safe: float
    """`safe_chosen` less `safe_rejected`."""
    safe_chosen: float
    """Activation of the positive less that of the negative safety latents, mean over the segment ends."""
    safe_rejected: float
    latents: list[LatentDifference]
    """The safety latents, those that add or take most first."""
    others: list[LatentDifference]
    """Latents that do not count, those that differ most first: a control."""

    @property
    def sides(self) -> dict[str, Side]:
        return {"chosen": self.chosen, "rejected": self.rejected}

    @property
    def margin(self) -> float:
        """The reward of the chosen answer less that of the rejected one."""
        return self.chosen.reward - self.rejected.reward

    def to_json(self) -> Row:
        """Plain values, for JSON."""
        return {
            "prompt": list(self.prompt),
            "margin": self.margin,
            "score_safe": self.score_safe,
            "safe_chosen": self.safe_chosen,
            "safe_rejected": self.safe_rejected,
            **{name: side.to_json() for name, side in self.sides.items()},
            "latents": [latent.to_json() for latent in self.latents],
            "others": [latent.to_json() for latent in self.others],
        }


def activations_of(codes: Codes, latents: Sequence[int]) -> Tensor:
    """The activations of some latents on every token, fp32 (n_tokens, n_latents)."""
    found = torch.zeros(codes.n_tokens, len(latents))
    owner = codes.tokens().long()
    for column, latent in enumerate(latents):
        mine = codes.indices == latent
        found[owner[mine], column] = codes.values[mine].float().clamp(min=0)
    return found
