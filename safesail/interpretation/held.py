"""What all scoring methods of a run share: which texts each neuron is tried on, and what it really does there."""

from pathlib import Path
from typing import Any

from safesail.errors import InputError
from safesail.interpretation.collect import Firings, load_codes
from safesail.interpretation.excerpts import Excerpt, Level, Pieces, Units, group_excerpts, units_of
from safesail.interpretation.simulate import Job
from safesail.lm.activations import Activations
from safesail.neurons import parse_neuron_id
from safesail.progress import bar
from safesail.recipe import Recipe

__all__ = ["N_LEXICAL", "Held", "lexical_tokens"]

N_LEXICAL = 30
"""Tokens that the lexical baseline knows of a neuron."""
Row = dict[str, Any]


class Held:
    """The held-out texts of all neurons, and what each method needs to know of them.

    statistics: {neuron id: its row, of which `normaliser` is read}. InputError names a language to be scored in which
    there are no explanations.
    """

    def __init__(
        self,
        recipe: Recipe,
        activations: Activations,
        collected: Path,
        statistics: dict[str, Row],
        explanations: list[Row],
        tokenizer: Any,
    ) -> None:
        self.recipe = recipe
        self.explanations = _of_languages(recipe, explanations)
        self.neurons = list(dict.fromkeys(row["neuron_id"] for row in explanations))
        self._activations = activations
        self._codes = {name: load_codes(collected, name) for name in activations.hook_points}
        self._normalisers = {name: statistics[name]["normaliser"] for name in self.neurons}
        self._units: dict[tuple[Level, str], Units] = {}
        self._excerpts: dict[str, list[Excerpt]] = {}
        pieces = Pieces(recipe, activations, tokenizer)
        with bar("score: texts", len(self.neurons), "neuron") as progress:
            for hook_point, latents in self._groups():
                codes, normalisers = (
                    self._codes[hook_point],
                    {n: self._normalisers[name] for n, name in latents.items()},
                )
                found = group_excerpts(recipe, activations, codes, normalisers, tokenizer, pieces)
                self._excerpts |= {latents[latent]: excerpts for latent, excerpts in found.items()}
                progress.update(len(latents))

    def _groups(self) -> list[tuple[str, dict[int, str]]]:
        """(hook point, {latent: neuron id}) of neurons that share their texts: neighbours in the list.

        Whether there is an explanation to be scored makes no difference to them.
        """
        by_hook_point: dict[str, dict[int, str]] = {}
        for name in self.neurons:
            hook_point, latent = parse_neuron_id(name, self._activations.hook_points)
            by_hook_point.setdefault(hook_point, {})[latent] = name
        size = self.recipe.score.neurons_per_request
        groups = []
        for hook_point, latents in by_hook_point.items():
            members = list(latents.items())
            groups += [(hook_point, dict(members[i : i + size])) for i in range(0, len(members), size)]
        return groups

    def units(self, level: Level, neuron: str) -> Units:
        """What a neuron is scored on at one level."""
        if (level, neuron) not in self._units:
            section = self.recipe.score
            found = units_of(self._excerpts[neuron], level, section.segment_tokens, section.active_above)
            self._units[level, neuron] = found
        return self._units[level, neuron]

    def jobs(self, level: Level) -> list[Job]:
        """Every explanation there is, with the units to try it on; those of a language stand together."""
        rows = [row for row in self.explanations if row["status"] == "ok"]
        languages = list(dict.fromkeys(row["language"] for row in rows))
        rows.sort(key=lambda row: languages.index(row["language"]))
        return [
            Job(row["neuron_id"], row["language"], row["explanation"], self.units(level, row["neuron_id"]))
            for row in rows
        ]

    def lexicon(self, neuron: str) -> list[int]:
        """The tokens that carry a neuron on the explain half."""
        hook_point, latent = parse_neuron_id(neuron, self._activations.hook_points)
        active_above = self.recipe.score.active_above * self._normalisers[neuron]
        return lexical_tokens(self._activations, self._codes[hook_point], latent, active_above, N_LEXICAL)


def lexical_tokens(activations: Activations, codes: Firings, latent: int, active_above: float, n: int) -> list[int]:
    """The n tokens that carry most of a latent's activation on the explain half, counted where it is active."""
    values, rows = codes.of(latent)
    weights: dict[int, float] = {}
    for value, row in zip(values.tolist(), rows.tolist(), strict=True):
        if value > active_above and activations.half[int(activations.piece_of_row[row])] == "explain":
            token = int(activations.token_ids[row])
            weights[token] = weights.get(token, 0.0) + value
    return sorted(weights, key=lambda token: (-weights[token], token))[:n]


def _of_languages(recipe: Recipe, explanations: list[Row]) -> list[Row]:
    """The explanations in the languages that are to be scored."""
    wanted, there = recipe.score.languages, {row["language"] for row in explanations}
    missing = [language for language in wanted if language not in there]
    if missing and explanations:
        raise InputError(
            f"score.languages names {missing[0]}, but there are explanations in {', '.join(sorted(there))} only; "
            "leave score.languages empty to score them all, or add it to explain.languages."
        )
    return [row for row in explanations if not wanted or row["language"] in wanted]
