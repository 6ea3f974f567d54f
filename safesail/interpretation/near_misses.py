"""Where a latent is silent although one of its strongest tokens stands there."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from safesail.lm.activations import Activations

__all__ = ["LookAlikes", "strongest_tokens"]

_MOST_TOKENS = 10
_LARGEST_SHARE = 0.5
Numbers = NDArray[Any]


def strongest_tokens(token_ids: Tensor, values: Tensor) -> list[int]:
    """The fewest tokens that carry at least half of a latent's summed activation, strongest first; ten at most.

    token_ids, values: (n,), the token of each activation. Of equally strong tokens the lower id comes first.
    """
    tokens, which = np.unique(token_ids.numpy(), return_inverse=True)
    weights = np.bincount(which, weights=values.double().numpy(), minlength=len(tokens))
    order = np.lexsort((tokens, -weights))
    n = int(np.searchsorted(weights[order].cumsum(), _LARGEST_SHARE * weights.sum())) + 1
    return tokens[order[: min(n, _MOST_TOKENS)]].tolist()


class LookAlikes:
    """The rows of each token, of which those are given around which a latent is silent.

    eligible: bool (n_tokens,), the rows to choose from; before, after: how many tokens around a row are looked at.
    """

    def __init__(self, activations: Activations, eligible: Tensor, before: int, after: int) -> None:
        self.before, self.after = before, after
        self._piece_of_row = activations.piece_of_row.numpy()
        self._row_start = np.append(activations.row_start.numpy(), activations.n_tokens)
        rows = eligible.nonzero().flatten().int().numpy()
        tokens = activations.token_ids.numpy()[rows]
        self._rows = rows[tokens.argsort(kind="stable")]
        self._ends = np.bincount(tokens, minlength=int(activations.token_ids.max()) + 1).cumsum()

    def rows(self, tokens: list[int], firing: Numbers, drawn: torch.Generator) -> list[int]:
        """The rows of `tokens` in a drawn order; the tokens take turns, so that a frequent one crowds out no other.

        tokens: strongest first; firing: (n,) the latent's rows, ascending.
        """
        parts = [self._rows[self._ends[token - 1] if token else 0 : self._ends[token]] for token in tokens]
        if not parts:
            return []
        rows = np.concatenate(parts)
        strength = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        silent = self._is_silent(rows, firing)
        rows, strength = rows[silent], strength[silent]
        order = torch.randperm(len(rows), generator=drawn).numpy()
        rows, strength = rows[order], strength[order]
        return rows[_taking_turns(strength)].tolist()

    def _is_silent(self, rows: Numbers, firing: Numbers) -> Numbers:
        """Whether a latent fires on none of the tokens around each row, within its piece: bool (n_rows,)."""
        pieces = self._piece_of_row[rows]
        low = np.maximum(rows - self.before, self._row_start[pieces])
        high = np.minimum(rows + self.after + 1, self._row_start[pieces + 1])
        return np.searchsorted(firing, low) == np.searchsorted(firing, high)


def _taking_turns(strength: Numbers) -> Numbers:
    """The order in which every token has its first row, then every token its second, and so on."""
    order = strength.argsort(kind="stable")
    counts = np.bincount(strength)
    nth = np.empty(len(strength), np.int64)
    nth[order] = np.arange(len(strength)) - np.repeat(counts.cumsum() - counts, counts)
    return np.lexsort((strength, nth))
