"""The arithmetic of every published number, as pure functions. Each metric has a definition id."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "DEFINITIONS",
    "DIAGNOSIS_DEFINITIONS",
    "Interval",
    "auroc",
    "auroc_difference",
    "auroc_interval",
    "complement",
    "confusion",
    "explained_variance",
    "fisher_exact",
    "normaliser",
    "odds_ratio",
    "pearson",
    "pearson_interval",
    "quantiles_of_sparse",
    "ratio_of_sums",
    "reconstruction",
    "reconstruction_sums",
    "wilson",
]

DEFINITIONS = {
    "explained_variance/v1": "1 - sum ||x - x_hat||^2 / sum ||x - mean x||^2, over held-out tokens and with their mean",
    "fvu/v1": "sum ||x - x_hat||^2 / sum ||x - mean x||^2 = 1 - explained_variance/v1",
    "mse/v1": "mean of (x - x_hat)^2 over held-out tokens and dimensions, in squared units of the activations",
    "cosine/v1": "mean over held-out tokens of the cosine of x and x_hat",
    "l0/v1": "mean number of latents above zero per held-out token",
    "dead/v1": "share of latents that fire on none of the harvested tokens",
    "dense/v1": "share of latents that fire on more than 10 % of the harvested tokens",
    "ce_recovered/v1": "(CE with the output zeroed - CE with the SAE) / (CE with the output zeroed - CE unchanged); "
    "tokens left out by the token policy keep their own activation",
    "kl/v1": "mean over predicted held-out tokens of KL(p unchanged || p with the SAE), in nats; "
    "tokens left out by the token policy keep their own activation",
    "l0_t/v1": "number of latents whose distinguishing frequency f_j exceeds t, averaged over concept categories; "
    "f_j = share of pairs on whose query with the concept the latent is active, and silent on the one without; the "
    "reduction over tokens and the activity test (maximum and > 0 by default) stand beside the number",
    "i_cdf/v1": "mean distinguishing frequency over all latents, averaged over concept categories "
    "(= the integral of 1 - CDF(f))",
    "i_cdf_swapped/v1": "i_cdf/v1 with the two queries of every pair swapped: what chance alone gives",
    "i_cdf_null/v1": "mean of i_cdf/v1 when the two queries of each pair are swapped at random, exact; translations "
    "of a pair are swapped together",
    "above_null/v1": "i_cdf/v1 - i_cdf_null/v1",
    "auroc/v1": "probability that an active unit is predicted higher than a silent one, ties counting half",
    "confusion/v1": "counts of units by prediction (yes or no) and by true activity above 0",
    "simulation/v1": "Pearson correlation of simulated and true segment activity over concatenated held-out texts",
}

DIAGNOSIS_DEFINITIONS = {
    "auroc_texts/v1": "probability that a text about the domain is scored higher than one that is not, ties counting "
    "half; 95 % interval from resampling whole groups of texts (1,000 bootstrap resamples)",
    "share/v1": "successes / trials, with Wilson's 95 % score interval",
    "odds_ratio/v1": "(a + 1/2)(d + 1/2) / ((b + 1/2)(c + 1/2)) of the table [[a, b], [c, d]] (Haldane's correction), "
    "with exp(log ratio ± 1.96 standard errors) as 95 % interval; undefined where a row or a column is empty",
    "fisher_exact/v1": "two-sided p: the probability, with the table's margins fixed, of all tables that are no more "
    "probable than the one seen",
}
"""Of the numbers of `safesail.diagnosis`, which no SAE's card holds."""

_DRAWS_AT_ONCE = 1 << 21
_Z95 = 1.959963984540054  # the standard normal's 0.975 quantile


class Interval(NamedTuple):
    """An estimate with a 95 % interval (from a bootstrap unless said otherwise); all None where it is undefined."""

    value: float | None
    low: float | None
    high: float | None


# --- reconstruction -----------------------------------------------------------------------------------------------


def explained_variance(x: Tensor, x_hat: Tensor) -> float:
    """1 - residual / total variance. x, x_hat: (n_tokens, d_in). The mean predictor gives 0, the identity 1."""
    residual = (x - x_hat).double().square().sum()
    total = (x - x.mean(0)).double().square().sum()
    return float(1 - residual / total)


def reconstruction_sums(x: Tensor, x_hat: Tensor, mean: Tensor) -> dict[str, Tensor]:
    """What `reconstruction` adds up, of each token: (n_tokens,) in fp64. x, x_hat: (n_tokens, d_in), mean: (d_in,).

    The mean is that of all tokens, not of the block given. The cosine of a vector of zeros is 0.
    """
    x, x_hat = x.double(), x_hat.double()
    return {
        "residual": (x - x_hat).square().sum(1),
        "total": (x - mean).square().sum(1),
        "cosine": torch.cosine_similarity(x, x_hat, dim=1, eps=1e-30),
    }


def reconstruction(
    sums: dict[str, Tensor], n_tokens: Tensor, d_in: int, *, n_resamples: int = 1000, seed: int = 0
) -> dict[str, Interval]:
    """EV, FVU, MSE, cosine and L0 with intervals from the documents' sums. All: (n_documents,).

    sums: residual, total and cosine as in `reconstruction_sums`, and n_active, the number of latents above zero; L0 is
    left out where that is not known.
    """
    below = {"fvu": sums["total"], "mse": n_tokens * d_in, "cosine": n_tokens, "l0": n_tokens}
    above = {"fvu": sums["residual"], "mse": sums["residual"], "cosine": sums["cosine"], "l0": sums.get("n_active")}
    measured = {
        name: ratio_of_sums(values, below[name], n_resamples=n_resamples, seed=seed)
        for name, values in above.items()
        if values is not None
    }
    return {"explained_variance": complement(measured["fvu"]), **measured}


def ratio_of_sums(numerators: Tensor, denominators: Tensor, *, n_resamples: int = 1000, seed: int = 0) -> Interval:
    """sum(numerators) / sum(denominators) with a 95 % interval from resampling groups. Both: (n_groups,).

    A mean over tokens is the ratio of the documents' sums to their numbers of tokens. Whole documents are drawn with
    their numerator and denominator together, since the tokens of one document are not independent. The value is None
    where the denominators' sum is not positive, the ends are where there is one group only; resamples without a
    positive denominator are left out.
    """
    pairs = torch.stack([numerators.double(), denominators.double()])
    above, below = pairs.sum(1).tolist()
    if below <= 0:
        return Interval(None, None, None)
    n_groups = pairs.shape[1]
    if n_groups < 2:
        return Interval(above / below, None, None)
    generator = torch.Generator().manual_seed(seed)
    at_once = max(_DRAWS_AT_ONCE // n_groups, 1)
    sums = []
    for start in range(0, n_resamples, at_once):
        drawn = torch.randint(n_groups, (min(at_once, n_resamples - start), n_groups), generator=generator)
        sums.append(pairs[:, drawn].sum(-1))
    resampled = torch.cat(sums, dim=1)
    usable = resampled[1] > 0
    return _with_quantiles(above / below, resampled[0, usable] / resampled[1, usable])


def complement(interval: Interval) -> Interval:
    """1 - x, its ends changing places."""
    return Interval(*(None if x is None else 1 - x for x in (interval.value, interval.high, interval.low)))


# --- activations --------------------------------------------------------------------------------------------------


def normaliser(q999: Tensor, median_active: Tensor) -> Tensor:
    """Q_j, the activation that is shown as 1. q999, median_active: (d_sae,).

    Safe-SAIL divides by the 0.999 quantile over all tokens, which is zero for a latent active on fewer than one token
    in a thousand: just the rare safety concepts. The median of the non-zero activations bounds it from below; at a
    firing rate of 0.2 % the two agree, so the rule has no jump. Zero only for a latent that never fired.
    """
    return torch.maximum(q999, median_active)


def quantiles_of_sparse(active: Tensor, n_tokens: int, levels: tuple[float, ...]) -> list[float]:
    """Exact quantiles over all tokens of one latent from its non-zero activations alone; zeros are counted, not stored.

    active: (n_active,) in ascending order, n_active ≤ n_tokens. The q-quantile is the smallest value v such that at
    least q·n_tokens tokens are ≤ v (numpy's `inverted_cdf`).
    """
    n_zero = n_tokens - len(active)
    ranks = [max(math.ceil(level * n_tokens - 1e-9), 1) for level in levels]
    return [0.0 if rank <= n_zero else float(active[rank - n_zero - 1]) for rank in ranks]


# --- scores -------------------------------------------------------------------------------------------------------


def pearson(a: Tensor, b: Tensor) -> float | None:
    """The correlation of two vectors, or None (undefined, never zero) when either is constant. a, b: (n,)."""
    if len(a) < 2:
        return None
    a, b = a.double() - a.double().mean(), b.double() - b.double().mean()
    scale = a.norm() * b.norm()
    return float((a @ b / scale).clamp(-1, 1)) if scale > 1e-12 else None


def pearson_interval(a: Tensor, b: Tensor, groups: Tensor, *, n_resamples: int = 500, seed: int = 0) -> Interval:
    """The correlation with a 95 % interval from resampling whole groups (texts). a, b, groups: (n,).

    Segments of one text are not independent, so texts are drawn, not segments. Resamples in which a side is constant
    are left out of the interval.
    """
    value = pearson(a, b)
    if value is None:
        return Interval(None, None, None)
    _, group = torch.unique(groups, return_inverse=True)
    counts = _resampled_counts(int(group.max()) + 1, n_resamples, seed)[:, group]  # (n_resamples, n)
    a, b, total = a.double(), b.double(), counts.sum(1)
    mean_a, mean_b = counts @ a / total, counts @ b / total
    cov = counts @ (a * b) / total - mean_a * mean_b
    var = (counts @ (a * a) / total - mean_a**2).clamp(min=0) * (counts @ (b * b) / total - mean_b**2).clamp(min=0)
    samples = (cov / var.sqrt())[var > 1e-18].clamp(-1, 1)
    return _with_quantiles(value, samples)


def auroc(scores: Tensor, truth: Tensor) -> float | None:
    """The probability that an active item outscores a silent one, ties counting half; None without both kinds."""
    positive, negative = scores[truth > 0].double(), scores[truth <= 0].double()
    if not len(positive) or not len(negative):
        return None
    order = negative.sort().values
    below = torch.searchsorted(order, positive, right=False).double()
    upto = torch.searchsorted(order, positive, right=True).double()
    return float(((below + upto) / 2).mean() / len(negative))


def confusion(said: Tensor, active: Tensor) -> dict[str, int]:
    """How often yes and no were right and wrong. said, active: bool (n,)."""
    return {
        "true_positives": int((said & active).sum()),
        "false_positives": int((said & ~active).sum()),
        "false_negatives": int((~said & active).sum()),
        "true_negatives": int((~said & ~active).sum()),
    }


def auroc_interval(
    scores: Tensor, truth: Tensor, groups: Tensor, *, n_resamples: int = 1000, seed: int = 0
) -> Interval:
    """The AUROC with a 95 % interval from resampling whole groups (texts of one origin). All: (n,).

    Resamples without both kinds are left out of the interval.
    """
    value = auroc(scores, truth)
    if value is None:
        return Interval(None, None, None)
    return _with_quantiles(value, _resampled_aurocs([scores], truth, groups, n_resamples, seed)[0])


def auroc_difference(
    a: Tensor, b: Tensor, truth: Tensor, groups: Tensor, *, n_resamples: int = 1000, seed: int = 0
) -> Interval:
    """AUROC of the scores a less that of the scores b, both of the same resampled groups. All: (n,)."""
    of_a, of_b = auroc(a, truth), auroc(b, truth)
    if of_a is None or of_b is None:
        return Interval(None, None, None)
    samples = _resampled_aurocs([a, b], truth, groups, n_resamples, seed)
    return _with_quantiles(of_a - of_b, samples[0] - samples[1])


def wilson(successes: int, n: int) -> Interval:
    """The share of successes with Wilson's 95 % score interval, which stays inside 0 and 1; None of no trials."""
    assert 0 <= successes <= n, f"{successes} successes of {n} trials"
    if n == 0:
        return Interval(None, None, None)
    share, z2 = successes / n, _Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = _Z95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    return Interval(share, max(centre - half, 0.0), min(centre + half, 1.0))


def odds_ratio(a: int, b: int, c: int, d: int) -> Interval:
    """The odds ratio of the table [[a, b], [c, d]] with its 95 % interval on the log scale.

    Haldane's correction adds 1/2 to every count, so that an empty cell gives a finite ratio. Undefined where a row or
    a column is empty: then nothing was compared.
    """
    assert min(a, b, c, d) >= 0, "counts are not negative"
    if 0 in (a + b, c + d, a + c, b + d):
        return Interval(None, None, None)
    a_, b_, c_, d_ = (count + 0.5 for count in (a, b, c, d))
    log_ratio = math.log(a_ * d_ / (b_ * c_))
    error = _Z95 * math.sqrt(1 / a_ + 1 / b_ + 1 / c_ + 1 / d_)
    return Interval(math.exp(log_ratio), math.exp(log_ratio - error), math.exp(log_ratio + error))


def fisher_exact(a: int, b: int, c: int, d: int) -> float:
    """Fisher's two-sided p of the table [[a, b], [c, d]]: the tables no more probable than it, margins fixed.

    In whole numbers: the binomial products are compared as they are, so equally probable tables never part by rounding.
    """
    assert min(a, b, c, d) >= 0, "counts are not negative"
    row, column, n = a + b, a + c, a + b + c + d
    possible = range(max(0, row + column - n), min(row, column) + 1)
    ways = {k: math.comb(row, k) * math.comb(n - row, column - k) for k in possible}
    return sum(count for count in ways.values() if count <= ways[a]) / math.comb(n, column)


def _resampled_aurocs(scores: list[Tensor], truth: Tensor, groups: Tensor, n_resamples: int, seed: int) -> list[Tensor]:
    """The AUROC of each vector of scores in the same resamples of groups; resamples without both kinds left out."""
    _, group = torch.unique(groups, return_inverse=True)
    weights = _resampled_counts(int(group.max()) + 1, n_resamples, seed)[:, group]  # (n_resamples, n)
    positive, negative = weights[:, truth > 0], weights[:, truth <= 0]
    n_pairs = positive.sum(1) * negative.sum(1)
    usable = n_pairs > 0
    found = []
    for values in scores:
        above = values[truth > 0].double()[:, None] - values[truth <= 0].double()[None, :]
        wins = (above > 0).double() + 0.5 * (above == 0)
        found.append((((positive @ wins) * negative).sum(1) / n_pairs)[usable])
    return found


def _resampled_counts(n: int, n_resamples: int, seed: int) -> Tensor:
    """How often each of n items is drawn in each resample: (n_resamples, n), float64."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(n, (n_resamples, n), generator=generator)
    return torch.zeros(n_resamples, n, dtype=torch.float64).scatter_add_(1, draws, torch.ones_like(draws).double())


def _with_quantiles(value: float, samples: Tensor) -> Interval:
    if len(samples) < 20:
        return Interval(value, None, None)
    low, high = torch.quantile(samples, torch.tensor([0.025, 0.975], dtype=samples.dtype)).tolist()
    return Interval(value, low, high)
