"""The neurons of a domain, and how strongly each fires anywhere in a text."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from safesail.diagnosis.inspection import Inspection
from safesail.diagnosis.inspector import Inspector, Messages
from safesail.errors import InputError
from safesail.neurons import WEAK_BELOW, NeuronDatabase, parse_neuron_id
from safesail.progress import bar

__all__ = ["Given", "Peak", "domain_neurons", "inspected", "monitored_domains", "normaliser_of", "peaks"]

Given = str | Messages | Inspection


class Peak(NamedTuple):
    """Where a neuron fires most."""

    activation: float
    """Normalised; 0 for a silent neuron."""
    row: int
    """Of the token; -1 for a silent neuron."""


def monitored_domains(database: NeuronDatabase, min_score: float = WEAK_BELOW) -> list[str]:
    """The domains that some neuron carries with a larger score."""
    return [domain for domain in database.domains if any(_counts(row, domain, min_score) for row in database)]


def domain_neurons(inspector: Inspector, domain: str, min_score: float = WEAK_BELOW) -> list[str]:
    """The ids of the neurons that carry a domain with a larger score, in the database's order."""
    database = inspector.database
    found = [
        row["neuron_id"]
        for row in database
        if _counts(row, domain, min_score)
        and row["hook_point"] in inspector.saes
        and normaliser_of(database, row["neuron_id"])
    ]
    if not found:
        others = ", ".join(monitored_domains(database, min_score)) or "none"
        raise InputError(
            f"no neuron of {inspector.release} carries {domain!r} with a score above {min_score:g}; "
            f"domains that have some: {others}."
        )
    return found


def peaks(inspection: Inspection, neurons: Sequence[str]) -> list[Peak]:
    """Of each neuron the largest normalised activation over the counted tokens, and its token."""
    active = {}
    for name, codes in inspection.codes.items():
        tokens = codes.tokens().long()
        keep = inspection.counted[name][tokens] & (codes.values > 0)
        if not bool(torch.isfinite(codes.values).all()):
            raise InputError("the model's activations on this text are not finite; load it with another dtype.")
        active[name] = codes.values[keep], codes.indices[keep], tokens[keep]
    return [_peak(inspection.database, active, name) for name in neurons]


def inspected(inspector: Inspector, texts: Sequence[Given]) -> Iterator[Inspection]:
    """The inspection of each text, one by one; InputError says which text is empty or too long."""
    if not texts:
        raise InputError("there are no texts; give at least one.")
    with bar("read", len(texts), "text") as progress:
        for number, given in enumerate(texts, 1):
            try:
                inspection = given if isinstance(given, Inspection) else inspector.inspect(given)
            except InputError as error:
                raise InputError(f"text {number}: {error}") from None
            progress.update()
            yield inspection


def _counts(row: dict[str, Any], domain: str, min_score: float) -> bool:
    return domain in row["domains"] and row["score"] is not None and row["score"] > min_score


def normaliser_of(database: NeuronDatabase, name: str) -> float | None:
    """The activation of a neuron, by its id, that is shown as 1; None for one that never fired or is not there."""
    return database.normaliser(*parse_neuron_id(name, database.hook_points))


def _peak(database: NeuronDatabase, active: dict[str, tuple[Tensor, Tensor, Tensor]], name: str) -> Peak:
    hook_point, latent = parse_neuron_id(name, active)
    values, latents, tokens = active[hook_point]
    mine = latents == latent
    scale = database.normaliser(hook_point, latent)
    if not bool(mine.any()) or not scale:
        return Peak(0.0, -1)
    best = int(values[mine].argmax())
    return Peak(float(values[mine][best]) / scale, int(tokens[mine][best]))
