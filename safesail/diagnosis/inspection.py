"""What fires on each token of a sequence: the activations of one forward pass, joined with the neuron database."""

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from safesail.lm.tokens import Span
from safesail.neurons import NeuronDatabase, neuron_id, parse_neuron_id, strength
from safesail.sae.sparse import Codes

__all__ = ["Firing", "Hit", "Inspection", "Where"]


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


class Where(NamedTuple):
    """Which neurons count: all by default, else those that meet every condition given."""

    domains: Collection[str] | None = None
    """Neurons that carry one of these."""
    hook_point: str | None = None
    above: float | None = None
    """Neurons whose score is larger: of the others it is not known what they are about."""
    words: str = ""
    """Neurons whose id or explanation, in any language, holds all of these."""

    def holds(self, hit: Hit, also: str = "") -> bool:
        """Whether a neuron meets the conditions; `also`: its explanations in other languages."""
        if self.domains is not None and not set(self.domains) & set(hit.domains):
            return False
        if self.hook_point is not None and hit.hook_point != self.hook_point:
            return False
        if self.above is not None and (hit.score is None or hit.score <= self.above):
            return False
        text = f"{hit.neuron_id} {hit.explanation or ''} {also}".lower()
        return all(word in text for word in self.words.lower().split())


class Firing(NamedTuple):
    """Where in a sequence a neuron fires."""

    index: int
    """Of the unit."""
    activation: float
    normalised: float | None


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

    def hits(self, index: int, where: Where | None = None, *, explained_only: bool = False) -> list[Hit]:
        """The neurons that fire on a unit, strongest normalised activation first.

        Of a unit of several tokens each neuron counts once, with its strongest activation. Tokens that the policy
        leaves out (special tokens, attention sinks, other roles) have none: the SAEs were not trained on them.
        """
        hits = self._hits_by_unit[index] if explained_only else self._hits(self._strongest(index))
        return [hit for hit in hits if where is None or self._counts(hit, where)]

    def firings(self, id: str) -> list[Firing]:
        """The units on which a neuron fires, strongest first; InputError for what is no neuron here."""
        hook_point, latent = parse_neuron_id(id, self.codes)
        codes, scale = self.codes[hook_point], self.database.normaliser(hook_point, latent)
        entries = ((codes.indices == latent) & (codes.values > 0)).nonzero()[:, 0]
        tokens = torch.searchsorted(codes.offsets.long(), entries, right=True) - 1
        counted = self.counted[hook_point][tokens]
        best: dict[int, float] = {}
        for token, value in zip(tokens[counted].tolist(), codes.values[entries[counted]].tolist(), strict=True):
            unit = self._unit_of[token]
            best[unit] = max(value, best.get(unit, 0.0))
        firings = [Firing(unit, value, value / scale if scale else None) for unit, value in best.items()]
        return sorted(firings, key=lambda firing: (-firing.activation, firing.index))

    @cached_property
    def _unit_of(self) -> list[int]:
        """The unit of every token."""
        return [i for i, unit in enumerate(self.units) for _ in range(unit.start, unit.end)]

    def _strongest(self, index: int) -> dict[tuple[str, int], float]:
        """{(hook point, latent): its strongest activation on a unit}, of those that fire there."""
        unit = self.units[index]
        best: dict[tuple[str, int], float] = {}
        for name, codes in self.codes.items():
            for row in range(unit.start, unit.end):
                if not self.counted[name][row]:
                    continue
                values, latents = codes.of(row)
                for value, latent in zip(values.tolist(), latents.tolist(), strict=True):
                    if value > 0:
                        best[name, latent] = max(value, best.get((name, latent), 0.0))
        return best

    def _hits(self, fired: dict[tuple[str, int], float]) -> list[Hit]:
        hits = [self._hit(*neuron, value) for neuron, value in fired.items()]
        return sorted(hits, key=lambda hit: (-(hit.normalised or 0.0), hit.neuron_id))

    def _said(self, neuron_id: str) -> str:
        """A neuron's explanations in the other languages, for a search."""
        spoken = self.database.explanations.get(neuron_id, {})
        return " ".join(said["explanation"] for said in spoken.values() if said["explanation"])

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
        """Per unit the neurons with a row that fire there: few of all that fire, found for all units at once."""
        fired: list[dict[tuple[str, int], float]] = [{} for _ in self.units]
        for name, codes in self.codes.items():
            rows = torch.tensor([row["latent"] for row in self.database if row["hook_point"] == name])
            tokens = codes.tokens()
            kept = torch.isin(codes.indices, rows.to(codes.indices)) & (codes.values > 0) & self.counted[name][tokens]
            entries = zip(tokens[kept].tolist(), codes.indices[kept].tolist(), codes.values[kept].tolist(), strict=True)
            for token, latent, value in entries:
                unit = fired[self._unit_of[token]]
                unit[name, latent] = max(value, unit.get((name, latent), 0.0))
        return [self._hits(unit) for unit in fired]

    def strengths(self, where: Where | None = None) -> list[float]:
        """Per unit the strongest normalised activation of an explained neuron that carries a domain."""
        where = where or Where()
        return [
            max((hit.normalised or 0.0 for hit in hits if hit.domains and self._counts(hit, where)), default=0.0)
            for hits in self._hits_by_unit
        ]

    def _counts(self, hit: Hit, where: Where) -> bool:
        return where.holds(hit, self._said(hit.neuron_id) if where.words else "")

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
