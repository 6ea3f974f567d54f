"""How faithfully a sparse autoencoder gives back the activations it reads, as an `evaluate` module."""

from collections.abc import Iterable
from typing import Any

import datasets
import evaluate
import numpy as np
import torch

from safesail.errors import InputError
from safesail.metrics import DEFINITIONS, reconstruction, reconstruction_sums

DESCRIPTION = """
EV, FVU, MSE and cosine of a sparse autoencoder's reconstructions, and its L0, with 95 % intervals from resampling whole
documents. The arithmetic is safesail.metrics; EV and FVU compare with the mean of the activations given.
"""
INPUTS = """
    predictions: the reconstructions x_hat, one list of d_in numbers per token.
    references: the activations x, one list of d_in numbers per token.
    n_active (optional): the number of latents above zero, one whole number per token; L0 is left out without it.
    documents (optional): the document of each token, a name or number; intervals are None without it.
    n_resamples: draws of documents that give the intervals, 1000 unless given.
    seed: of these draws, 0 unless given.
Returns explained_variance, fvu, mse, cosine and l0, each None where it is undefined, `undefined` with the reasons,
`intervals` with [low, high] of each, `definitions` with their ids, d_in, n_tokens and n_documents.
"""
CITATION = """
@software{safesail, title = {safesail}, author = {{The safesail authors}}, license = {Apache-2.0}}
@misc{gao2024scaling, title = {Scaling and evaluating sparse autoencoders}, author = {Gao, Leo and others},
  year = {2024}, eprint = {2406.04093}, archivePrefix = {arXiv}}
"""
LARGEST = 1e100
"""Squares and their sums stay finite below it."""


class SaeFidelity(evaluate.Metric):
    """x and x_hat of some tokens → EV, FVU, MSE, cosine and L0."""

    def _info(self) -> evaluate.MetricInfo:
        vector = datasets.List(datasets.Value("float64"))
        columns = {"predictions": vector, "references": vector}
        optional = {"n_active": datasets.Value("int64"), "documents": datasets.Value("string")}
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({**columns, **optional}),
        )

    def add_batch(self, *, predictions: Any = None, references: Any = None, **optional: Any) -> None:
        """Add some tokens: the columns below, without n_resamples and seed."""
        x_hat, x = _table("predictions", predictions), _table("references", references)
        if x.shape != x_hat.shape:
            raise InputError(
                f"predictions hold {_size(x_hat)} and references {_size(x)}; give x_hat and x of the same tokens."
            )
        columns = {"n_active": None, "documents": None, **optional}
        columns["n_active"] = _counts(columns["n_active"], len(x))
        columns["documents"] = _names(columns["documents"], len(x))
        given = x.shape[1], [name for name in ("n_active", "documents") if columns[name][0] not in (None, "")]
        if self.writer is None:
            self._given = given
        if given != self._given:
            raise InputError(f"{_batch(given)} came after {_batch(self._given)}; give every batch the same columns.")
        super().add_batch(predictions=x_hat.tolist(), references=x.tolist(), **columns)

    def add(self, *, prediction: Any = None, reference: Any = None, **optional: Any) -> None:
        """Add one token: a value of each of the columns below."""
        columns = {name: [value] for name, value in optional.items()}
        self.add_batch(predictions=[prediction], references=[reference], **columns)

    def compute(self, *, n_resamples: int = 1000, seed: int = 0, **columns: Any) -> dict[str, Any] | None:
        """Add the tokens given, if any, and measure all that were added."""
        if n_resamples < 1:
            raise InputError(f"n_resamples is {n_resamples}; give a whole number above 0, as 1000.")
        if columns or self.writer is None:
            self.add_batch(**columns)
        return super().compute(n_resamples=n_resamples, seed=seed)

    def _compute(
        self, predictions: Any, references: Any, n_active: Any, documents: Any, n_resamples: int, seed: int
    ) -> dict[str, Any]:
        x, x_hat = (torch.tensor(rows, dtype=torch.float64) for rows in (references, predictions))
        varies = bool((x != x[0]).any())
        per_token = reconstruction_sums(x, x_hat, x.mean(0) if varies else x[0])
        if n_active[0] is not None:
            per_token["n_active"] = torch.tensor(n_active, dtype=torch.float64)
        document = torch.tensor(_numbered(documents))
        sums = {name: torch.bincount(document, values) for name, values in per_token.items()}
        measured = reconstruction(sums, torch.bincount(document), x.shape[1], n_resamples=n_resamples, seed=seed)
        undefined = {} if varies else dict.fromkeys(("explained_variance", "fvu"), "all references are the same")
        return {
            **{name: interval.value for name, interval in measured.items()},
            "undefined": undefined,
            "intervals": {name: [interval.low, interval.high] for name, interval in measured.items()},
            "definitions": {name: id for name in measured if (id := f"{name}/v1") in DEFINITIONS},
            "d_in": x.shape[1],
            "n_tokens": len(x),
            "n_documents": None if not documents[0] else len(set(documents)),
        }


def _array(values: Any) -> np.ndarray:
    """The values in fp64; an empty array where they are not numbers or not in rows of one length."""
    try:
        return np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError, RuntimeError):
        return np.empty(0)


def _table(name: str, rows: Any) -> np.ndarray:
    """The finite numbers of some tokens: (n_tokens, d_in) in fp64."""
    table = _array(rows)
    if table.ndim != 2 or not table.size:
        raise InputError(
            f"{name} is not a table of numbers; give one list of d_in numbers per token, as [[0.5, 0], [1, 2]]."
        )
    usable = (np.abs(table) < LARGEST).all(1)
    if not usable.all():
        raise InputError(
            f"token {int(usable.argmin())} of {name} holds a number that is not finite, or not below {LARGEST:g}; "
            "leave it out on both sides."
        )
    return table


def _counts(values: Any, n: int) -> list[Any]:
    """Whole numbers, one per token, or None for all."""
    if values is None:
        return [None] * n
    counts = _array(values)
    if counts.shape != (n,) or not all(count >= 0 and count.is_integer() for count in counts.tolist()):
        raise InputError(f"n_active is not {n} whole numbers from 0; give one per token, as [32, 30], or leave it out.")
    return counts.astype(np.int64).tolist()


def _names(values: Any, n: int) -> list[str]:
    """The name of each token's document, or "" for all."""
    if values is None:
        return [""] * n
    names = list(values) if isinstance(values, Iterable) and not isinstance(values, str) else []
    if len(names) != n or any(name is None or name == "" for name in names):
        raise InputError(f'documents are not {n} names; give one per token, as ["a", "a", "b"], or leave them out.')
    return [str(name) for name in names]


def _numbered(names: Iterable[str]) -> list[int]:
    """Each name as the number of the first like it, from 0."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(name, len(numbers)) for name in names]


def _size(table: np.ndarray) -> str:
    return f"{table.shape[0]} tokens of {table.shape[1]} numbers"


def _batch(given: tuple[int, list[str]]) -> str:
    return " with ".join([f"a batch of {given[0]} numbers per token", *filter(None, [" and ".join(given[1])])])
