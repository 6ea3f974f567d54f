"""Logistic regression with an L2 penalty, in fp64: exact, with no random start and no step size.

    minimise over w, b:  mean over texts of log(1 + exp(-s (x·w + b))) + strength / 2 · ‖w‖²,   s = ±1

The intercept b is not penalised. Newton's method, halving a step that would not lower the loss; with texts of both
kinds and a positive strength the minimum exists and is unique.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["STRENGTHS", "Logistic", "best_strength", "cross_validated", "fit_logistic", "folds"]

STRENGTHS = (0.001, 0.01, 0.1, 1.0)
"""What cross-validation chooses from."""
_MAX_STEPS = 100


class Logistic(NamedTuple):
    """p = 1 / (1 + exp(-(x·coefficients + intercept)))."""

    coefficients: Tensor
    """(n_features,), fp64."""
    intercept: float

    def logits(self, x: Tensor) -> Tensor:
        """log(p / (1 - p)) of each row. x: (n, n_features) → (n,)."""
        return x.double() @ self.coefficients + self.intercept


def fit_logistic(x: Tensor, y: Tensor, strength: float) -> Logistic:
    """The minimum of the loss above. x: (n, n_features), y: bool (n,), with both kinds in y.

    The coefficients lie in the span of the rows, so with more features than texts the problem is solved in
    coordinates of that span: an orthogonal change that the penalty does not see.
    """
    assert 0 < int(y.sum()) < len(y), "both kinds of text are needed"
    assert strength > 0, f"a penalty of {strength} has no unique minimum"
    x, y = x.double(), y.double()
    basis = torch.linalg.qr(x.T).Q if x.shape[1] > x.shape[0] else None  # (n_features, n)
    rows = x if basis is None else x @ basis
    rows = torch.cat([rows, torch.ones(len(rows), 1, dtype=torch.float64)], dim=1)
    penalty = torch.full((rows.shape[1],), strength, dtype=torch.float64)
    penalty[-1] = 0.0
    found = _newton(rows, y, penalty)
    coefficients = found[:-1] if basis is None else basis @ found[:-1]
    return Logistic(coefficients, float(found[-1]))


def _newton(x: Tensor, y: Tensor, penalty: Tensor) -> Tensor:
    """The minimum, from zero. x: (n, d), y: (n,) of 0 and 1, penalty: (d,)."""

    def loss(w: Tensor) -> float:
        return float(F.binary_cross_entropy_with_logits(x @ w, y) + (penalty * w * w).sum() / 2)

    w = torch.zeros(x.shape[1], dtype=torch.float64)
    now = loss(w)
    for _ in range(_MAX_STEPS):
        p = torch.sigmoid(x @ w)
        gradient = x.T @ (p - y) / len(y) + penalty * w
        if gradient.abs().max() < 1e-10:
            break
        hessian = (x * (p * (1 - p))[:, None]).T @ x / len(y) + torch.diag(penalty)
        step = torch.linalg.solve(hessian, gradient)
        size = 1.0
        while (then := loss(w - size * step)) > now and size > 1e-12:
            size /= 2
        if then > now:  # the loss is flat to the last bit
            break
        w, now = w - size * step, then
    return w


def folds(y: Tensor, groups: Sequence[str], n_folds: int = 5, *, seed: int = 0) -> Tensor:
    """The fold of each text, (n,): groups stay whole, and each kind of group is dealt out evenly in a seeded order.

    A group with any positive text counts as positive. y: bool (n,).
    """
    names = sorted(set(groups))
    of_text = torch.tensor([names.index(group) for group in groups])
    positive = torch.zeros(len(names), dtype=torch.bool).index_put_((of_text[y],), torch.tensor(True))
    generator = torch.Generator().manual_seed(seed)
    fold = torch.zeros(len(names), dtype=torch.long)
    for kind in (True, False):
        of_kind = (positive == kind).nonzero()[:, 0]
        fold[of_kind[torch.randperm(len(of_kind), generator=generator)]] = torch.arange(len(of_kind)) % n_folds
    return fold[of_text]


def cross_validated(
    x: Tensor, y: Tensor, fold: Tensor, fit: Callable[[Tensor, Tensor], Callable[[Tensor], Tensor]]
) -> float:
    """The mean log loss, in nats, of each text under a model fitted on the other folds.

    fit: (x, y) → a function from x to logits. Folds whose rest has texts of one kind only are left out.
    """
    total, n = 0.0, 0
    for number in fold.unique().tolist():
        held, rest = fold == number, fold != number
        if not bool(y[rest].any()) or bool(y[rest].all()):
            continue
        logits = fit(x[rest], y[rest])(x[held])
        total += float(F.binary_cross_entropy_with_logits(logits, y[held].double(), reduction="sum"))
        n += int(held.sum())
    assert n, "every fold lacks one kind of text"
    return total / n


def best_strength(x: Tensor, y: Tensor, fold: Tensor, strengths: Sequence[float] = STRENGTHS) -> tuple[float, float]:
    """The penalty with the least cross-validated log loss, the larger of equals, and that loss."""
    losses = {
        strength: cross_validated(x, y, fold, lambda x, y, s=strength: fit_logistic(x, y, s).logits)
        for strength in strengths
    }
    strength = min(losses, key=lambda strength: (losses[strength], -strength))
    return strength, losses[strength]
