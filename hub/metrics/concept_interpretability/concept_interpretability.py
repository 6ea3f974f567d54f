"""How many latents of a sparse autoencoder tell a concept from its absence, as an `evaluate` module."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import datasets
import evaluate
import numpy as np
import torch
from torch import Tensor

from safesail.contrast import contrast, distinguishing_frequency
from safesail.errors import InputError
from safesail.metrics import DEFINITIONS
from safesail.recipe import SelectSection
from safesail.training.groups import Group, latent_shares, measure

DESCRIPTION = """
Concept-specific interpretability of a sparse autoencoder from pairs of queries, one with a concept and one without:
distinguishing frequency f_j, L_{0,t} and I_CDF, beside what the same pairs give when the two queries of each are
swapped at random. The arithmetic is safesail.contrast and safesail.training.groups.
"""
INPUTS = """
    with_concept: one list of d_sae numbers per pair, the latents' activations on the query with the concept, reduced
        over its tokens (as their maximum), or whether each is active, as true or 1.
    without_concept: the same on the query without it.
    categories (optional): the concept category of each pair; f_j is of a category, all else is averaged over them.
    pair_ids (optional): pairs of one id (translations of one another) are drawn and swapped together.
    active_above: a latent is active above it, 0 unless given.
    thresholds: the t of L_{0,t}, 0, 0.1, 0.25 and 0.5 unless given.
    n_resamples: draws of pairs that give the intervals, and of swaps that give the p-value, 1000 unless given.
    seed: of these draws, 0 unless given.
Returns i_cdf, i_cdf_swapped, i_cdf_null, above_null, p_value, `intervals` with [low, high] of i_cdf and above_null,
l0_t and l0_t_null with a number for each t, f_j with a list for each category, `definitions` with the ids,
active_above, n_pairs, n_units, n_categories and n_latents.
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


class ConceptInterpretability(evaluate.Metric):
    """Activity of the latents on both sides of some pairs → f_j, L_{0,t}, I_CDF and what chance gives."""

    def _info(self) -> evaluate.MetricInfo:
        vector, name = datasets.List(datasets.Value("float64")), datasets.Value("string")
        columns = {"with_concept": vector, "without_concept": vector, "categories": name, "pair_ids": name}
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(columns),
        )

    def add_batch(self, *, with_concept: Any = None, without_concept: Any = None, **optional: Any) -> None:
        """Add some pairs: the first four columns below."""
        here, there = _table("with_concept", with_concept), _table("without_concept", without_concept)
        if here.shape != there.shape:
            raise InputError(
                f"with_concept holds {_size(here)} and without_concept {_size(there)}; "
                "give the same latents on both queries of each pair."
            )
        columns = {"categories": None, "pair_ids": None, **optional}
        for name in ("categories", "pair_ids"):
            columns[name] = _names(name, columns[name], len(here))
        given = here.shape[1], [name for name in ("categories", "pair_ids") if columns[name][0]]
        if self.writer is None:
            self._given = given
        if given != self._given:
            raise InputError(f"{_batch(given)} came after {_batch(self._given)}; give every batch the same columns.")
        super().add_batch(with_concept=here.tolist(), without_concept=there.tolist(), **columns)

    def add(self, **columns: Any) -> None:
        """Add one pair: a value of each of the first four columns below."""
        self.add_batch(**{name: [value] for name, value in columns.items()})

    def compute(
        self,
        *,
        active_above: float = 0.0,
        thresholds: Iterable[float] | None = None,
        n_resamples: int = 1000,
        seed: int = 0,
        **columns: Any,
    ) -> dict[str, Any] | None:
        """Add the pairs given, if any, and measure all that were added."""
        section = _section(thresholds, n_resamples)
        if columns or self.writer is None:
            self.add_batch(**columns)
        return super().compute(active_above=active_above, section=section, seed=seed)

    def _compute(
        self,
        with_concept: Any,
        without_concept: Any,
        categories: Any,
        pair_ids: Any,
        active_above: float,
        section: SelectSection,
        seed: int,
    ) -> dict[str, Any]:
        here, there = (
            torch.tensor(rows, dtype=torch.float64) > active_above for rows in (with_concept, without_concept)
        )
        found, rows = contrast(here, there), _rows_of(categories)
        ids = pair_ids if pair_ids[0] else range(len(pair_ids))
        units = torch.tensor(_numbered(ids[row] for part in rows.values() for row in part.tolist()))
        group = Group("all", "all", list(rows.values()), list(units.split([len(part) for part in rows.values()])))
        measured = measure(found, latent_shares(found), group, section, seed)
        names = ("i_cdf", "i_cdf_swapped", "i_cdf_null", "above_null")
        return {
            **{name: measured[name] for name in names},
            "p_value": measured["i_cdf_p"],
            "intervals": {k: [measured[f"{k}_low"], measured[f"{k}_high"]] for k in ("i_cdf", "above_null")},
            "l0_t": measured["l0_t"],
            "l0_t_null": measured["l0_t_null"],
            "f_j": {name: distinguishing_frequency(found.won[part]).tolist() for name, part in rows.items()},
            "definitions": {name: id for name in (*names, "l0_t") if (id := f"{name}/v1") in DEFINITIONS},
            "active_above": active_above,
            "n_pairs": len(found.won),
            "n_units": len(units.unique()),
            "n_categories": len(rows),
            "n_latents": found.won.shape[1],
        }


def _section(thresholds: Iterable[float] | None, n_resamples: int) -> SelectSection:
    """The recipe's section that `measure` reads."""
    chosen = SelectSection().thresholds if thresholds is None else tuple(thresholds)
    if not chosen or not all(0 <= t <= 1 for t in chosen):
        raise InputError(f"thresholds are {list(chosen)}; give shares of pairs between 0 and 1, as [0, 0.5].")
    if n_resamples < 1:
        raise InputError(f"n_resamples is {n_resamples}; give a whole number above 0, as 1000.")
    return SelectSection(thresholds=chosen, n_resamples=n_resamples)


def _rows_of(categories: list[str]) -> dict[str, Tensor]:
    """The pairs of each category, in the order in which they appear; all are one category without names."""
    rows: dict[str, list[int]] = defaultdict(list)
    for row, category in enumerate(categories):
        rows[category or "all"].append(row)
    return {category: torch.tensor(part) for category, part in rows.items()}


def _table(name: str, rows: Any) -> np.ndarray:
    """The finite numbers of some pairs: (n_pairs, d_sae) in fp64."""
    try:
        table = np.asarray(rows, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError):
        table = np.empty(0)
    if table.ndim != 2 or not table.size:
        raise InputError(
            f"{name} is not a table of numbers; give one list of d_sae numbers per pair, as [[0, 1.5], [0.2, 0]]."
        )
    finite = np.isfinite(table).all(1)
    if not finite.all():
        raise InputError(
            f"pair {int(finite.argmin())} of {name} holds a number that is not finite; leave it out on both sides."
        )
    return table


def _names(column: str, values: Any, n: int) -> list[str]:
    """One name per pair, or "" for all."""
    if values is None:
        return [""] * n
    names = list(values) if isinstance(values, Iterable) and not isinstance(values, str) else []
    if len(names) != n or any(name is None or name == "" for name in names):
        raise InputError(f'{column} are not {n} names; give one per pair, as ["a", "a", "b"], or leave them out.')
    return [str(name) for name in names]


def _numbered(names: Iterable[Any]) -> list[int]:
    """Each name as the number of the first like it, from 0."""
    numbers: dict[Any, int] = {}
    return [numbers.setdefault(name, len(numbers)) for name in names]


def _size(table: np.ndarray) -> str:
    return f"{table.shape[0]} pairs of {table.shape[1]} latents"


def _batch(given: tuple[int, list[str]]) -> str:
    return " with ".join([f"a batch of {given[0]} latents", *filter(None, [" and ".join(given[1])])])
