"""The landscape: the decoder directions of the explained neurons, laid out on a plane.

A latent's decoder row is the direction that it writes into the model. Neurons that write alike lie near each other; the
axes have no meaning of their own. Directions are comparable across hook points that write into the same space, which is
taken to be so where the SAEs have one width.

    PCA    of the unit directions about their mean
    UMAP   of their cosines, where the extra `viz` is installed (McInnes et al. 2018)

Coordinates are made once, when the release is built, and shipped in the data set: readers compute none.
"""

import importlib.util
from collections import Counter
from typing import Any, NamedTuple

import torch
from torch import Tensor

__all__ = ["Landscape", "in_words", "landscape", "pca", "umap"]

Row = dict[str, Any]
_FEWEST_FOR_UMAP = 16
"""Neighbourhoods of fewer directions say nothing."""
_DIGITS = 5
"""Of a coordinate between -1 and 1: what a plot can show, without the last bits that differ between machines."""


class Landscape(NamedTuple):
    """Where neurons lie."""

    places: list[tuple[float, float] | None]
    """(x, y) between -1 and 1 of each neuron; None where its direction is not comparable with the others'."""
    facts: Row
    """`method` (PCA, UMAP or none), `n_neurons` on the plane, and of PCA the shares of the variance of its axes."""


def landscape(directions: list[Tensor], seed: int) -> Landscape:
    """The plane of these decoder rows. directions: (d_in,) each; those of the most frequent width are laid out.

    UMAP where it is installed, else PCA; fewer than three directions make no plane.
    """
    widths = Counter(len(direction) for direction in directions)
    width = max(widths, key=widths.__getitem__, default=0)
    chosen = [i for i, direction in enumerate(directions) if len(direction) == width]
    places: list[tuple[float, float] | None] = [None] * len(directions)
    if len(chosen) < 3:
        return Landscape(places, {"method": "none", "n_neurons": 0})
    unit = torch.nn.functional.normalize(torch.stack([directions[i].double() for i in chosen]), dim=1)
    use_umap = len(chosen) >= _FEWEST_FOR_UMAP and importlib.util.find_spec("umap") is not None
    points, facts = umap(unit, seed) if use_umap else pca(unit)
    for i, (x, y) in zip(chosen, _scaled(points).tolist(), strict=True):
        places[i] = round(x, _DIGITS), round(y, _DIGITS)
    return Landscape(places, {**facts, "n_neurons": len(chosen)})


def in_words(facts: Row) -> str:
    """What the landscape is, for a card or a plot; empty where there is none."""
    if facts["method"] == "PCA":
        shares = " and ".join(f"{share:.0%}" for share in facts["shares"])
        how = f"PCA, whose two axes hold {shares} of the variance"
    elif facts["method"] == "UMAP":
        how = f"UMAP (cosine, {facts['n_neighbours']} neighbours)"
    else:
        return ""
    return f"the decoder directions of {facts['n_neurons']:,} neurons on a plane by {how}"


def pca(unit: Tensor) -> tuple[Tensor, Row]:
    """The two directions of most variance. unit: (n, d_in) in fp64 → (n, 2), and their shares of the variance.

    An axis points to where its largest weight is positive, so that the plane is not mirrored from run to run.
    """
    centred = unit - unit.mean(0)
    _, sizes, axes = torch.linalg.svd(centred, full_matrices=False)
    axes = axes[:2]
    signs = axes.gather(1, axes.abs().argmax(1, keepdim=True)).sign()
    variance = sizes.square()
    shares = (variance[:2] / variance.sum().clamp(min=torch.finfo(variance.dtype).tiny)).tolist()
    return centred @ (axes * signs).T, {"method": "PCA", "shares": [round(share, 4) for share in shares]}


def umap(unit: Tensor, seed: int) -> tuple[Tensor, Row]:
    """The plane that keeps neighbours by cosine. unit: (n, d_in) → (n, 2). Needs the extra `viz`."""
    from umap import UMAP  # pyright: ignore[reportMissingImports]  # not every installation has the extra

    n_neighbours = min(15, len(unit) - 1)
    plane = UMAP(n_neighbors=n_neighbours, metric="cosine", random_state=seed, n_jobs=1).fit_transform(unit.numpy())
    return torch.from_numpy(plane).double(), {"method": "UMAP", "n_neighbours": n_neighbours}


def _scaled(points: Tensor) -> Tensor:
    """About the middle of their ranges, the larger of which becomes -1 to 1."""
    low, high = points.min(0).values, points.max(0).values
    half = float((high - low).max()) / 2
    return (points - (low + high) / 2) / (half or 1.0)
