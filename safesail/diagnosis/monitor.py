"""A risk monitor: how likely a conversation is about a domain, read off the domain's neurons.

    p = 1 / (1 + exp(-(b + Σ_j w_j m_j))),    m_j = the largest normalised activation of neuron j over the tokens

The neurons are those of the database that carry the domain and score above a stated minimum; w and b come from a
logistic regression on labelled texts. Nothing else is read, so a risk is the sum of what is shown: a coefficient times
an activation per neuron, and the token it fired on. The probability is one among texts like those of the calibration,
with their share of the domain.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from safesail.diagnosis.domain_neurons import Given, domain_neurons, inspected, normaliser_of, peaks
from safesail.diagnosis.inspection import Inspection
from safesail.diagnosis.inspector import Inspector
from safesail.errors import InputError
from safesail.files import replacing
from safesail.logistic import best_strength, fit_logistic, folds
from safesail.neurons import WEAK_BELOW

__all__ = ["Contribution", "Monitor", "Risk", "known_labels"]

SCHEMA_VERSION = 1
LEAST_GROUPS = 5
"""Of each kind; with fewer, cross-validation has a fold without."""


class Contribution(NamedTuple):
    """What one neuron adds to the log odds of a risk."""

    neuron_id: str
    coefficient: float
    activation: float
    """The largest normalised activation over the conversation's tokens."""
    contribution: float
    """coefficient · activation."""
    index: int
    """Of the unit that it fired on most."""
    token: str


class Risk(NamedTuple):
    """How likely a conversation is about a domain, and why."""

    domain: str
    probability: float
    intercept: float
    contributions: list[Contribution]
    """Of the neurons that fired, strongest in absolute value first."""

    @property
    def log_odds(self) -> float:
        """The intercept and the sum of the contributions; it still orders risks whose probabilities round to 0 or 1."""
        return self.intercept + math.fsum(one.contribution for one in self.contributions)


@dataclass(frozen=True)
class Monitor:
    """A calibrated risk score of one domain."""

    domain: str
    neurons: tuple[str, ...]
    coefficients: tuple[float, ...]
    intercept: float
    strength: float
    """Of the L2 penalty, chosen by cross-validation on the calibration texts."""
    min_score: float
    """Neurons with a larger score were taken."""
    n_about: int
    n_other: int
    """Calibration texts about the domain, and others."""
    identity: dict[str, str]
    """{hook point: SAE id and a hash of its weights}."""
    inspector: Inspector = field(repr=False, compare=False)
    calibrated_on: str = ""
    """`shipped` for the texts in `hub/monitor/`, else the name of a file, or nothing."""

    @classmethod
    def fit(
        cls,
        inspector: Inspector,
        texts: Sequence[Given],
        labels: Sequence[bool],
        domain: str,
        *,
        groups: Sequence[str] | None = None,
        min_score: float = WEAK_BELOW,
        seed: int = 0,
    ) -> "Monitor":
        """The monitor of a domain, calibrated on labelled texts; nothing is random but the seeded folds.

        labels: true for a text about the domain. groups: texts of one origin, which cross-validation keeps together.
        """
        wholes = [str(i) for i in range(len(texts))] if groups is None else list(groups)
        y = known_labels(labels, wholes)
        neurons = domain_neurons(inspector, domain, min_score)
        x = torch.tensor(
            [[peak.activation for peak in peaks(seen, neurons)] for seen in inspected(inspector, texts)],
            dtype=torch.float64,
        )
        strength, _ = best_strength(x, y, folds(y, wholes, seed=seed))
        found = fit_logistic(x, y, strength)
        return cls(
            domain,
            tuple(neurons),
            tuple(found.coefficients.tolist()),
            found.intercept,
            strength,
            min_score,
            int(y.sum()),
            int((~y).sum()),
            inspector.identity,
            inspector,
        )

    def score(self, given: Given) -> Risk:
        """The risk of a text, a conversation or an inspection of this monitor's inspector."""
        inspection = given if isinstance(given, Inspection) else self.inspector.inspect(given)
        found = zip(self.neurons, self.coefficients, peaks(inspection, self.neurons), strict=True)
        fired = [
            Contribution(name, weight, peak.activation, weight * peak.activation, *_unit(inspection, peak.row))
            for name, weight, peak in found
            if peak.activation > 0
        ]
        fired.sort(key=lambda one: (-abs(one.contribution), one.neuron_id))
        log_odds = self.intercept + math.fsum(one.contribution for one in fired)
        return Risk(self.domain, _sigmoid(log_odds), self.intercept, fired)

    def save(self, folder: str | Path) -> Path:
        """Write `<domain>.json` into the folder: plain JSON, readable and complete."""
        path = Path(folder).expanduser() / f"{self.domain}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        facts = {"schema": SCHEMA_VERSION} | {name: getattr(self, name) for name in _STORED}
        facts["neurons"] = dict(zip(self.neurons, self.coefficients, strict=True))
        with replacing(path, 100_000) as partial:
            partial.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, folder: str | Path, inspector: Inspector, domain: str) -> "Monitor":
        """The monitor of a domain from a folder of `save`; InputError if it was made with another release."""
        path = Path(folder).expanduser() / f"{domain}.json"
        facts = _read(path)
        if facts["identity"] != inspector.identity:
            made = ", ".join(facts["identity"].values())
            raise InputError(
                f"{path} was calibrated with other SAEs ({made}) than those of {inspector.release}; "
                "calibrate anew with --fit."
            )
        neurons, coefficients = tuple(facts["neurons"]), tuple(map(float, facts["neurons"].values()))
        if silent := [name for name in neurons if not normaliser_of(inspector.database, name)]:
            raise InputError(f"{path} names {silent[0]}, which {inspector.release} has not; calibrate anew with --fit.")
        kept = {name: facts[name] for name in _STORED if name != "identity"}
        return cls(**kept, neurons=neurons, coefficients=coefficients, identity=facts["identity"], inspector=inspector)


_STORED = ("domain", "intercept", "strength", "min_score", "n_about", "n_other", "identity", "calibrated_on")


def known_labels(labels: Sequence[Any], wholes: Sequence[str]) -> Tensor:
    """The labels as a bool tensor; InputError unless they are true and false, one a text and enough of each.

    wholes: of each text the group that no fold parts; enough are five groups that hold a text of the kind.
    """
    if len(labels) != len(wholes):
        raise InputError(f"{len(wholes)} texts have {len(labels)} labels; give one for each text.")
    if odd := [label for label in labels if label not in (0, 1)]:
        raise InputError(f"{odd[0]!r} is no label; use true for a text about the domain, false for another.")
    about = {whole for whole, label in zip(wholes, labels, strict=True) if label}
    other = {whole for whole, label in zip(wholes, labels, strict=True) if not label}
    if min(len(about), len(other)) < LEAST_GROUPS:
        raise InputError(
            f"the texts about the domain are {len(about)} (groups of one origin count once), the others {len(other)}; "
            f"give at least {LEAST_GROUPS} of each kind."
        )
    return torch.tensor([bool(label) for label in labels], dtype=torch.bool)


def _unit(inspection: Inspection, row: int) -> tuple[int, str]:
    index = next(i for i, unit in enumerate(inspection.units) if unit.start <= row < unit.end)
    return index, inspection.units[index].text


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


def _read(path: Path) -> dict[str, Any]:
    """The facts of a saved monitor; InputError for a file that is none."""
    try:
        facts = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"cannot read the monitor {path} ({error.strerror}); make it with --fit.") from None
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}); make it anew with --fit.") from None
    if (
        not isinstance(facts, dict)
        or facts.get("schema") != SCHEMA_VERSION
        or not {*_STORED, "neurons"} <= facts.keys()
    ):
        raise InputError(f"{path} is no monitor of this version; make it anew with --fit.")
    numbers = [facts["intercept"], facts["strength"], facts["min_score"], *facts["neurons"].values()]
    if not all(isinstance(number, int | float) and math.isfinite(number) for number in numbers):
        raise InputError(f"{path} holds a number that is not finite; make it anew with --fit.")
    return facts
