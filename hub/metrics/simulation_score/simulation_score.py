"""How well an explanation predicts where a neuron is active, as an `evaluate` module."""

from collections.abc import Iterable
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from torch import Tensor

from safesail.errors import InputError
from safesail.metrics import DEFINITIONS, Interval, auroc, confusion, pearson, pearson_interval

DESCRIPTION = """
The Pearson correlation of simulated and true activity over all units (segments, tokens or texts) of a neuron, with a
95 % interval from resampling whole texts, the AUROC and the confusion counts. The arithmetic is safesail.metrics. What
is undefined, since a side is constant, is None and never 0.
"""
INPUTS = """
    predictions: what a simulator that sees only the explanation says of each unit, as 0 or 1, a level or a probability.
    references: the true activity of each unit; a unit is active above 0.
    texts (optional): the text of each unit, a name or number; the interval is None without it.
    yes_above: a prediction above it is a yes, 0.5 unless given; None for no confusion counts, as of cosines.
    n_resamples: draws of texts that give the interval, 500 unless given.
    seed: of these draws, 0 unless given.
Returns score and auroc, each None where it is undefined, `undefined` with the reasons, `intervals` with [low, high] of
the score, true_positives, false_positives, false_negatives, true_negatives, `definitions` with the ids, n_units,
n_active and n_texts.
"""
CITATION = """
@inproceedings{weng2026safesail,
  title = {Safe-SAIL: Towards a Fine-grained Safety Landscape of Large Language Models via Sparse Autoencoder
    Interpretation Framework},
  author = {Weng, Jiaqi and Zheng, Han and Zhang, Hanyu and Zhou, Ej and He, Qinqin and Tao, Jialing and Xue, Hui and
    Chu, Zhixuan and Wang, Xiting}, year = {2026},
  booktitle = {Findings of the Association for Computational Linguistics: ACL 2026},
  url = {https://aclanthology.org/2026.findings-acl.944/}}
@software{safesail, title = {safesail}, author = {{The safesail authors}}, license = {Apache-2.0}}
"""
IDS = {"score": "simulation/v1", "auroc": "auroc/v1", "confusion": "confusion/v1"}
LARGEST = 1e100
"""Squares and their sums stay finite below it."""


class SimulationScore(evaluate.Metric):
    """Predicted and true activity of some units → score, AUROC and confusion counts."""

    def _info(self) -> evaluate.MetricInfo:
        number = datasets.Value("float64")
        columns = {"predictions": number, "references": number, "texts": datasets.Value("string")}
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(columns),
        )

    def add_batch(self, *, predictions: Any = None, references: Any = None, texts: Any = None) -> None:
        """Add some units: the columns below, without yes_above, n_resamples and seed."""
        said, truth = _values("predictions", predictions), _values("references", references)
        if len(said) != len(truth):
            raise InputError(
                f"there are {len(said)} predictions and {len(truth)} references; give both of the same units."
            )
        names, given = _names(texts, len(truth)), texts is not None
        if self.writer is None:
            self._has_texts = given
        if given != self._has_texts:
            raise InputError("texts were given for some batches only; give them for every batch or for none.")
        super().add_batch(predictions=said, references=truth, texts=names)

    def add(self, *, prediction: Any = None, reference: Any = None, texts: Any = None) -> None:
        """Add one unit: a value of each of the columns below."""
        names = None if texts is None else [texts]
        self.add_batch(predictions=[prediction], references=[reference], texts=names)

    def compute(
        self, *, yes_above: float | None = 0.5, n_resamples: int = 500, seed: int = 0, **columns: Any
    ) -> dict[str, Any] | None:
        """Add the units given, if any, and score all that were added."""
        if n_resamples < 1:
            raise InputError(f"n_resamples is {n_resamples}; give a whole number above 0, as 500.")
        if columns or self.writer is None:
            self.add_batch(**columns)
        return super().compute(yes_above=yes_above, n_resamples=n_resamples, seed=seed)

    def _compute(
        self, predictions: Any, references: Any, texts: Any, yes_above: float | None, n_resamples: int, seed: int
    ) -> dict[str, Any]:
        said, truth = (torch.tensor(values, dtype=torch.float64) for values in (predictions, references))
        n_texts = None if not texts[0] else len(set(texts))
        score = Interval(pearson(said, truth), None, None)
        if n_texts is not None and n_texts > 1:  # of one text every draw is the same
            score = pearson_interval(said, truth, torch.tensor(_numbered(texts)), n_resamples=n_resamples, seed=seed)
        area = None if score.value is None else auroc(said, truth)
        counts = {} if yes_above is None else confusion(said > yes_above, truth > 0)
        results = {"score": score.value, "auroc": area}
        return {
            **results,
            "undefined": {name: _why(said, truth) for name, value in results.items() if value is None},
            "intervals": {"score": [score.low, score.high]},
            **counts,
            "definitions": {name: id for name, id in IDS.items() if id in DEFINITIONS},
            "n_units": len(truth),
            "n_active": int((truth > 0).sum()),
            "n_texts": n_texts,
        }


def _why(said: Tensor, truth: Tensor) -> str:
    """Why these units have no correlation, or no AUROC where they have one."""
    if len(truth) < 2:
        return "there are fewer than two units"
    for name, side in (("references", truth), ("predictions", said)):
        if bool((side == side[0]).all()):
            return f"all {name} are the same"
    if pearson(said, truth) is None:
        return "predictions and references vary too little to be told from rounding"
    return f"{'every' if truth[0] > 0 else 'no'} unit is active"


def _values(name: str, values: Any) -> list[float]:
    """The finite numbers of some units."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError):
        array = np.empty(0)
    if array.ndim != 1 or not array.size:
        raise InputError(f"{name} are not a list of numbers; give one number per unit, as [0, 1, 1].")
    usable = np.abs(array) < LARGEST
    if not usable.all():
        raise InputError(
            f"unit {int(usable.argmin())} of {name} is not finite, or not below {LARGEST:g}; "
            "leave it out on both sides."
        )
    return array.tolist()


def _names(values: Any, n: int) -> list[str]:
    """The name of each unit's text, or "" for all."""
    if values is None:
        return [""] * n
    names = list(values) if isinstance(values, Iterable) and not isinstance(values, str) else []
    if len(names) != n or any(name is None or name == "" for name in names):
        raise InputError(f'texts are not {n} names; give one per unit, as ["a", "a", "b"], or leave them out.')
    return [str(name) for name in names]


def _numbered(names: Iterable[str]) -> list[int]:
    """Each name as the number of the first like it, from 0."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(name, len(numbers)) for name in names]
