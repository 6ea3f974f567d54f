"""The neuron database: what a row is, and reading, searching and joining its tables from a folder or the Hub.

A *neuron* is a latent of a published SAE, with the id `layers.9.mlp/1234`; Safe-SAIL's short form `9_1234` is accepted
wherever it names one hook point only.
"""

import re
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from safesail.errors import InputError
from safesail.repository import Repository, part_of_release

__all__ = ["QUANTILES", "WEAK_BELOW", "NeuronDatabase", "Said", "neuron_id", "parse_neuron_id", "strength"]

QUANTILES = {"p50": 0.5, "p90": 0.9, "p99": 0.99, "p999": 0.999, "p9999": 0.9999}
WEAK_BELOW = 0.2
"""Safe-SAIL's released database holds no score of 0.2 or less; ours keeps such neurons and calls them weak."""


def neuron_id(hook_point: str, latent: int) -> str:
    """The id of a neuron, as `layers.9.mlp/1234`."""
    return f"{hook_point}/{latent}"


def parse_neuron_id(text: str, hook_points: Iterable[str]) -> tuple[str, int]:
    """The hook point and latent of an id in either form; InputError says which hook points there are."""
    known = list(hook_points)
    hook_point, slash, latent = text.strip().rpartition("/")
    if slash and hook_point in known and re.fullmatch(r"[0-9]{1,9}", latent):
        return hook_point, int(latent)
    short = re.fullmatch(r"([0-9]{1,9})_([0-9]{1,9})", text.strip())
    if short:
        matching = [name for name in known if f".{short[1]}." in f".{name}."]
        if len(matching) == 1:
            return matching[0], int(short[2])
    example, places = (known[0], f" The hook points are {', '.join(known)}.") if known else ("layers.9.mlp", "")
    raise InputError(f"{text!r} is not a neuron here; ids look like {example}/1234.{places}")


def strength(score: float | None) -> str:
    """A plain word for a simulation score: undefined, weak, fair, good or strong."""
    if score is None:
        return "undefined"
    for limit, word in ((WEAK_BELOW, "weak"), (0.4, "fair"), (0.6, "good")):
        if score <= limit:
            return word
    return "strong"


class Said(NamedTuple):
    """What is said of a neuron in the language that was asked for, or in another that has an explanation."""

    explanation: str | None
    """None when no language has one."""
    language: str
    status: str
    """`ok`, or why there is none in the language that was asked for."""


@dataclass
class NeuronDatabase:
    """The tables of a release's `neurons` folder or dataset repository.

    `neurons` has a row per neuron that was to be explained, `quantiles` one per latent of the selected SAEs (so that
    every latent can be normalised and shown), `scores` {neuron id: a row per method and language}, `explanations`
    {neuron id: {language: a row}}. A row whose status is not `ok` has no explanation, or no score. In a converted
    release statistics may be null, and a status `masked` (its source hides the text) or `absent` (its source has none).
    """

    neurons: dict[str, dict[str, Any]]
    quantiles: dict[str, dict[str, Any]]
    scores: dict[str, list[dict[str, Any]]]
    explanations: dict[str, dict[str, dict[str, Any]]]
    source: str = field(default="", repr=False)
    languages: list[str] = field(default_factory=list)
    """Of the explanations, in the release's order; the first is that of the main table."""
    landscape: dict[str, Any] = field(default_factory=dict)
    """How the columns x and y were made: `method` (PCA, UMAP or none) and its facts; empty in a release without."""

    @classmethod
    def load(cls, path_or_repo: str | Path, **kwargs: Any) -> "NeuronDatabase":
        """The database of a release, a run folder, or a `neurons` folder or repository.

        Keyword arguments (`revision`, `token`, `cache_dir`, …) mean what they mean in transformers.
        """
        repository = Repository(part_of_release(path_or_repo, "neurons"), "dataset", **kwargs)
        scores: dict[str, list[dict[str, Any]]] = {}
        for row in repository.table("scores/train.parquet"):
            scores.setdefault(row["neuron_id"], []).append(row)
        explanations: dict[str, dict[str, dict[str, Any]]] = {}
        languages = repository.json("languages.json")
        for language in languages:
            for row in repository.table(f"explanations/{language}.parquet"):
                explanations.setdefault(row["neuron_id"], {})[language] = row
        return cls(
            neurons={row["neuron_id"]: row for row in repository.table("neurons/train.parquet")},
            quantiles={row["neuron_id"]: row for row in repository.table("quantiles/train.parquet")},
            scores=scores,
            explanations=explanations,
            source=repository.source,
            languages=languages,
            landscape=_landscape(repository),
        )

    def __len__(self) -> int:
        return len(self.neurons)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(self.neurons.values())

    def __getitem__(self, id: str) -> dict[str, Any]:
        """The row of a neuron by its id in either form; InputError when it has none."""
        name = neuron_id(*parse_neuron_id(id, self.hook_points))
        if name not in self.neurons:
            raise InputError(f"{name} has no row: it was not among the safety-related latents that were explained.")
        return self.neurons[name]

    @cached_property
    def hook_points(self) -> list[str]:
        """The hook points of the database, in its order."""
        return list(dict.fromkeys(row["hook_point"] for row in self.quantiles.values()))

    def said(self, neuron_id: str, language: str = "") -> Said:
        """A neuron's explanation in a language; without one there, the main table's, else that of any language."""
        spoken = self.explanations.get(neuron_id, {})
        asked = spoken.get(language) if language else None
        if asked and asked["explanation"]:
            return Said(asked["explanation"], language, "ok")
        row = self.neurons.get(neuron_id, {})
        why = asked["status"] if asked else ("absent" if language else row.get("status", ""))
        main = self.languages[0] if self.languages else ""
        if row.get("explanation"):
            return Said(row["explanation"], main, why if language not in ("", main) else "ok")
        other = next(((name, said) for name, said in spoken.items() if said["explanation"]), None)
        return Said(other[1]["explanation"], other[0], why) if other else Said(None, language or main, why)

    @property
    def domains(self) -> list[str]:
        """The domains that some neuron carries, most frequent first."""
        counts: dict[str, int] = {}
        for row in self:
            for domain in row["domains"]:
                counts[domain] = counts.get(domain, 0) + 1
        return sorted(counts, key=lambda domain: (-counts[domain], domain))

    def normaliser(self, hook_point: str, latent: int) -> float | None:
        """The activation shown as 1, or None for a latent that never fired in the corpus."""
        row = self.quantiles.get(neuron_id(hook_point, latent))
        return (row["normaliser"] or None) if row else None

    def search(
        self,
        text: str = "",
        *,
        domain: str | Collection[str] | None = None,
        category: str | None = None,
        hook_point: str | None = None,
        min_score: float | None = None,
    ) -> list[dict[str, Any]]:
        """The neurons whose explanation (in any language), concept or id holds every word of `text`, best first.

        Of several domains a neuron must carry one; an empty string among them stands for neurons that carry none.
        """
        words = text.lower().split()
        wanted = {domain} if isinstance(domain, str) else None if domain is None else set(domain)

        def matches(row: dict[str, Any]) -> bool:
            other = (said["explanation"] for said in self.explanations.get(row["neuron_id"], {}).values())
            texts = (row["neuron_id"], row["explanation"], row["category"], row["concept"], *other)
            haystack = " ".join(filter(None, texts)).lower()
            return (
                all(word in haystack for word in words)
                and (wanted is None or bool(wanted & set(row["domains"] or [""])))
                and (category is None or row["category"] == category)
                and (hook_point is None or row["hook_point"] == hook_point)
                and (min_score is None or (row["score"] is not None and row["score"] >= min_score))
            )

        found = [row for row in self if matches(row)]
        return sorted(found, key=lambda row: (-(row["score"] if row["score"] is not None else -2), row["neuron_id"]))


def _landscape(repository: Repository) -> dict[str, Any]:
    """The facts about the landscape; none for a release from before it, or one that was converted."""
    return repository.json("landscape.json") if "landscape.json" in repository.names() else {}
