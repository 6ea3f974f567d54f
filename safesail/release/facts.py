"""What the cards and tables of a release are made from: the results of all stages, read once."""

from typing import Any

from safesail.interpretation.explain import load as load_explanations
from safesail.lm.activations import Activations
from safesail.pairs import Pair, load_pairs
from safesail.recipe import Recipe
from safesail.run import Run

__all__ = ["Facts", "flat_fidelity"]

Row = dict[str, Any]


class Facts:
    """The results of all stages of a run."""

    def __init__(self, run: Run) -> None:
        assert isinstance(run.recipe, Recipe)
        self.recipe = run.recipe
        self.fidelity: dict[str, Row] = run.json_of("eval", "fidelity.json")
        self.selection: dict[str, Any] = run.json_of("select", "selection.json")
        self.candidates: dict[str, dict[str, list[Row]]] = run.json_of("select", "candidates.json")
        self.contrast = run.table_of("select", "contrast.parquet")
        self.pairs: list[Pair] = [pair for name in run.recipe.select.pairs for pair in load_pairs(name)]
        self.statistics = run.table_of("collect", "statistics.parquet")
        self.examples = run.table_of("collect", "examples.parquet")
        self.explanations, self.tags = load_explanations(run.result("explain"))
        self.scores = run.table_of("score", "scores.parquet")
        self.records = {name: run.record(name) or {} for name in ("harvest", "train", "eval", "explain", "score")}
        self.activations = Activations(run.result("harvest"))

    @property
    def curve(self) -> list[Row]:
        """One row per SAE of the sweep: its fidelity, its concept contrast, and whether it was selected."""
        selected = self.selection["selected"].values()
        return [
            {
                "sae_id": sae_id,
                **flat_fidelity(numbers),
                **self.selection["curve"][sae_id],
                "selected": sae_id in selected,
            }
            for sae_id, numbers in self.fidelity.items()
        ]

    @property
    def languages(self) -> list[str]:
        """The languages of the explanations, in the order of the recipe; its first one where there are none."""
        found = {row["language"] for row in self.explanations}
        asked = self.recipe.explain.languages
        return [name for name in asked if name in found] or [asked[0]]

    @property
    def language(self) -> str:
        """The language of the neurons' own explanation and score: the first one that is scored."""
        scored = self.recipe.score.languages or self.languages
        return next((name for name in self.languages if name in scored), self.languages[0])

    @property
    def thresholds(self) -> list[str]:
        """The t of L_{0,t}, as they stand in the names of columns."""
        return list(self.curve[0]["l0_t"])


def flat_fidelity(numbers: Row) -> Row:
    """An entry of fidelity.json as plain numbers: each metric is followed by the ends of its interval."""
    flat: Row = {}
    for name, value in numbers.items():
        if name not in ("intervals", "definitions"):
            flat[name] = value
        if name in numbers["intervals"]:
            flat[f"{name}_low"], flat[f"{name}_high"] = numbers["intervals"][name]
    return flat
