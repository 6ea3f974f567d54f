"""Every published number, against values written out by hand or computed by another route (numpy, a binomial sum)."""

import math
from itertools import pairwise, product

import numpy as np
import pytest
import torch

from safesail.contrast import (
    contrast,
    distinguishing_frequency,
    i_cdf,
    l0_above,
    l0_above_swapped,
    q_values,
    sign_test,
    swap_null,
)
from safesail.metrics import (
    DEFINITIONS,
    auroc,
    explained_variance,
    normaliser,
    pearson,
    pearson_interval,
    quantiles_of_sparse,
    ratio_of_sums,
)

GOLDEN = torch.tensor([1.0, 0.5, 0.25, 0.0])


# --- reconstruction -----------------------------------------------------------------------------------------------


def test_explained_variance_is_zero_for_the_mean_and_one_for_the_identity():
    x = torch.tensor([[1.0, 10.0], [3.0, 20.0], [8.0, 30.0]])
    assert explained_variance(x, x.mean(0).expand(3, 2)) == pytest.approx(0, abs=1e-12)
    assert explained_variance(x, x) == 1.0


def test_explained_variance_by_hand():
    x, x_hat = torch.tensor([[0.0, 0.0], [2.0, 4.0]]), torch.tensor([[1.0, 0.0], [2.0, 2.0]])
    # mean (1, 2): total 1+4+1+4 = 10; residual 1 + 4 = 5
    assert explained_variance(x, x_hat) == pytest.approx(0.5)


def test_explained_variance_can_be_negative():
    x = torch.tensor([[0.0], [2.0]])
    assert explained_variance(x, -x) == pytest.approx(1 - 16 / 2)


def test_explained_variance_pools_the_dimensions_instead_of_averaging_their_shares():
    x = torch.tensor([[-1.0, -10.0], [1.0, 10.0]])
    x_hat = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])  # the small dimension is perfect, the large one is at its mean
    assert explained_variance(x, x_hat) == pytest.approx(1 - 200 / 202)


@pytest.mark.parametrize(
    ("clean", "zeroed", "spliced", "expected"),
    [(2.0, 6.0, 3.0, 0.75), (2.0, 6.0, 2.0, 1.0), (2.0, 6.0, 6.0, 0.0), (2.0, 6.0, 8.0, -0.5), (2.0, 6.0, 1.0, 1.25)],
)
def test_ce_recovered_by_hand(clean: float, zeroed: float, spliced: float, expected: float):
    """Of two documents with these losses: (CE0 - CE_SAE) / (CE0 - CE), as the eval stage computes it."""
    clean_sums, zeroed_sums, spliced_sums = (torch.tensor([ce, 3 * ce]) for ce in (clean, zeroed, spliced))
    assert ratio_of_sums(zeroed_sums - spliced_sums, zeroed_sums - clean_sums).value == pytest.approx(expected)


@pytest.mark.parametrize("zeroed", [2.0, 1.5])
def test_ce_recovered_is_undefined_where_zeroing_costs_nothing(zeroed: float):
    assert ratio_of_sums(torch.tensor([zeroed - 2.1]), torch.tensor([zeroed - 2.0])).value is None


# --- concept contrast ---------------------------------------------------------------------------------------------


def test_a_latent_wins_a_pair_only_when_active_with_and_silent_without():
    with_concept = torch.tensor([[1, 1, 0, 0]]).bool()
    without = torch.tensor([[0, 1, 1, 0]]).bool()
    won, lost = contrast(with_concept, without)
    assert won.tolist() == [[True, False, False, False]]
    assert lost.tolist() == [[False, False, True, False]]


def test_distinguishing_frequency_is_the_share_of_pairs():
    distinguishes = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0], [1, 0, 0, 0]]).bool()
    assert distinguishing_frequency(distinguishes).tolist() == [1.0, 0.5, 0.25, 0.0]


def test_i_cdf_of_the_golden_frequencies():
    assert i_cdf(GOLDEN) == 0.4375


@pytest.mark.parametrize(("threshold", "n"), [(0.0, 3), (0.1, 3), (0.25, 2), (0.4, 2), (0.5, 1), (0.99, 1), (1.0, 0)])
def test_l0_above_is_strict_by_hand(threshold: float, n: int):
    assert l0_above(GOLDEN, threshold) == n


@pytest.mark.parametrize("seed", range(5))
def test_i_cdf_is_the_integral_of_l0_above_over_the_thresholds(seed: int):
    chance = np.random.default_rng(seed)
    n_pairs = int(chance.integers(1, 9))
    frequency = torch.tensor(chance.integers(0, n_pairs + 1, size=50) / n_pairs, dtype=torch.float64)
    # L_{0,t} is constant on [i/n, (i+1)/n), so the integral is the sum of its values at the left ends, divided by n
    integral = sum(l0_above(frequency, i / n_pairs) for i in range(n_pairs)) / n_pairs
    assert i_cdf(frequency) == pytest.approx(integral / 50, abs=1e-12)


@pytest.mark.parametrize(
    ("wins", "losses", "p_value"),
    [(5, 0, 1 / 32), (3, 1, 5 / 16), (0, 0, 1.0), (0, 4, 1.0), (2, 2, 11 / 16), (1, 0, 1 / 2), (9, 1, 11 / 1024)],
)
def test_sign_test_by_hand(wins: int, losses: int, p_value: float):
    assert float(sign_test(torch.tensor([wins]), torch.tensor([losses]))) == pytest.approx(p_value, rel=1e-9)


def test_sign_test_equals_the_binomial_tail_for_large_counts():
    wins, losses = torch.tensor([60, 300, 41]), torch.tensor([40, 250, 59])
    expected = [
        sum(math.comb(w + l, m) for m in range(w, w + l + 1)) / 2 ** (w + l)
        for w, l in zip(wins.tolist(), losses.tolist(), strict=True)
    ]
    assert sign_test(wins, losses).tolist() == pytest.approx(expected, rel=1e-9)


def test_the_p_value_of_swaps_by_hand():
    """Effects 4, 2, 1: of the eight ways to sign them only one reaches 7, two reach 5, so that 4, 2, -1 has p = 2/8."""
    n = 20_000
    assert swap_null(torch.tensor([4.0, 2.0, 1.0]), n, seed=0)[1] == pytest.approx(1 / 8, abs=0.01)
    assert swap_null(torch.tensor([4.0, 2.0, -1.0]), n, seed=0)[1] == pytest.approx(2 / 8, abs=0.01)
    assert swap_null(torch.tensor([-4.0, -2.0, -1.0]), n, seed=0)[1] == 1.0


def test_the_p_value_of_swaps_counts_the_value_itself():
    assert swap_null(torch.full((60,), 0.1), 99, seed=0)[1] == 1 / 100


def test_the_high_end_of_swaps_is_the_95th_percentile():
    """0.1 · (2 · heads - 10) of ten tosses: P(8 heads or more) = 56 / 1024, P(9 or more) = 11 / 1024."""
    high, p_value = swap_null(torch.full((10,), 0.1), 20_000, seed=0)
    assert high == pytest.approx(0.6)
    assert p_value == pytest.approx(1 / 1024, rel=0.5)


def test_l0_above_under_swaps_by_hand():
    """Latent 0 differs on both pairs: it wins none, one, two with chances ¼, ½, ¼; latent 1 on one; latent 2 never."""
    won, lost = torch.tensor([[1, 0, 0], [0, 1, 0]]), torch.tensor([[0, 0, 0], [1, 0, 0]])
    assert l0_above_swapped(won, lost, 2, (0.0, 0.5, 1.0)) == [3 / 4 + 1 / 2, 1 / 4, 0.0]


@pytest.mark.parametrize("seed", range(3))
def test_l0_above_under_swaps_equals_the_mean_over_every_swap(seed: int):
    """Five units of up to three pairs each; all 32 ways to swap them are counted out."""
    chance = np.random.default_rng(seed)
    n_each = chance.integers(1, 4, size=5)
    won = np.array([chance.binomial(n, 0.3, size=40) for n in n_each])
    lost = np.array([chance.binomial(n - w, 0.4) for n, w in zip(n_each, won, strict=True)])
    n_pairs, thresholds = int(n_each.sum()), (0.0, 0.25, 0.5)
    counted = np.zeros(3)
    for swap in product((False, True), repeat=5):
        frequency = np.where(np.array(swap)[:, None], lost, won).sum(0) / n_pairs
        counted += [(frequency > t).sum() / 32 for t in thresholds]
    assert l0_above_swapped(torch.tensor(won), torch.tensor(lost), n_pairs, thresholds) == pytest.approx(counted)


# --- the false-discovery rate -------------------------------------------------------------------------------------


def test_q_values_by_hand():
    """5 : 0 has p = 1/32, 4 : 0 has p = 1/16, and four tosses never give p ≤ 1/32.

    Allowed at 0.1 are thresholds with Σ F / (1 - F) ≤ 0.2: 1/32 gives 1/31 + 0, 1/16 gives 1/31 + 1/15, the next (6/32)
    too much. So the limit is 1/16; q = 1/31 for the first, (1/31 + 1/15) / 2 for the second.
    """
    assert q_values(torch.tensor([5]), torch.tensor([0]), 0.1).tolist() == pytest.approx([1 / 31])
    both = q_values(torch.tensor([4, 5]), torch.tensor([0, 0]), 0.1)
    assert both.tolist() == pytest.approx([(1 / 31 + 1 / 15) / 2, 1 / 31])


def test_latents_that_can_never_be_significant_cost_the_others_nothing():
    """Three tosses have p ≥ 1/8: at 0.1 such latents are not tested, at 0.2 they are and count with what they reach."""
    wins, losses = torch.tensor([5] + [3] * 50 + [0] * 50), torch.zeros(101, dtype=torch.long)
    alone = q_values(torch.tensor([5]), torch.tensor([0]), 0.1)
    q = q_values(wins, losses, 0.1)
    assert float(q[0]) == float(alone[0])
    assert (q[1:] == 1).all()
    assert (q_values(wins, losses, 0.2)[1:51] <= 0.2).all()


def test_nothing_to_test_has_q_one():
    assert q_values(torch.tensor([0, 1]), torch.tensor([0, 0]), 0.05).tolist() == [1.0, 1.0]
    assert q_values(torch.tensor([2, 0]), torch.tensor([3, 9]), 0.05).tolist() == [1.0, 1.0]


def tosses(chance: np.random.Generator, n_latents: int) -> np.ndarray:
    """How many of twelve pairs each latent differs on: mostly few, as sparse latents do."""
    return chance.binomial(12, chance.beta(1, 3, size=n_latents))


def test_the_false_discovery_rate_holds_when_nothing_is_there():
    """With wins and losses at random every discovery is false: at most one group of pairs in ten may have any."""
    chance, n_groups = np.random.default_rng(0), 300
    found = 0
    for _ in range(n_groups):
        n = tosses(chance, 400)
        wins = chance.binomial(n, 0.5)
        found += bool((q_values(torch.tensor(wins), torch.tensor(n - wins), 0.1) <= 0.1).any())
    assert 0.01 < found / n_groups <= 0.1 + 3 * math.sqrt(0.1 * 0.9 / n_groups)


def test_planted_latents_are_found_at_the_stated_rate():
    """Thirty latents that win nine of ten of their tosses among 370 at random: most are found, few others with them."""
    chance, n_groups = np.random.default_rng(1), 100
    false, power = [], []
    for _ in range(n_groups):
        n = np.concatenate([np.full(30, 10), tosses(chance, 370)])
        wins = chance.binomial(n, np.concatenate([np.full(30, 0.9), np.full(370, 0.5)]))
        found = (q_values(torch.tensor(wins), torch.tensor(n - wins), 0.1) <= 0.1).numpy()
        false.append(found[30:].sum() / max(found.sum(), 1))
        power.append(found[:30].mean())
    assert np.mean(false) <= 0.1 + 3 * np.std(false) / math.sqrt(n_groups)
    assert np.mean(power) > 0.7


# --- activations --------------------------------------------------------------------------------------------------


def test_the_normaliser_is_the_larger_of_quantile_and_median():
    assert normaliser(torch.tensor([3.0, 0.0, 0.0]), torch.tensor([2.0, 2.0, 0.0])).tolist() == [3.0, 2.0, 0.0]


def statistics_of(active: list[float], n_tokens: int) -> tuple[float, float]:
    """(0.999 quantile over all tokens, lower median of the active ones) from numpy on the full vector."""
    full = np.array([0.0] * (n_tokens - len(active)) + active)
    return float(np.quantile(full, 0.999, method="inverted_cdf")), sorted(active)[(len(active) - 1) // 2]


@pytest.mark.parametrize("n_active", [1, 5, 9, 10])
def test_a_rare_latent_never_gets_a_zero_normaliser(n_active: int):
    """A latent active on at most one token in a thousand has a 0.999 quantile of zero; its normaliser is positive."""
    q999, median = statistics_of([float(i + 1) for i in range(n_active)], 10_000)
    assert q999 == 0.0
    assert float(normaliser(torch.tensor(q999), torch.tensor(median))) == median > 0


@pytest.mark.parametrize(("n_active", "by_median"), [(19, True), (20, True), (21, False), (40, False)])
def test_the_normaliser_has_no_jump_where_the_quantile_takes_over(n_active: int, by_median: bool):
    """At a firing rate of 0.2 % the two rules agree; on either side neighbouring rates give neighbouring values."""
    active = [float(i + 1) for i in range(n_active)]
    q999, median = statistics_of(active, 10_000)
    value = float(normaliser(torch.tensor(q999), torch.tensor(median)))
    assert value == (median if by_median else q999)
    assert abs(q999 - median) <= abs(n_active - 20) / 2 + 1


def test_the_normaliser_rises_steadily_with_the_firing_rate():
    """Adding one activation to latents with values 1, 2, … never moves the normaliser by more than one value."""
    values = [
        float(normaliser(*map(torch.tensor, statistics_of([float(i + 1) for i in range(n)], 10_000))))
        for n in range(1, 60)
    ]
    assert all(0 <= after - before <= 1 for before, after in pairwise(values))


@pytest.mark.parametrize("seed", range(8))
def test_quantiles_of_sparse_equal_numpys_on_the_full_data(seed: int):
    chance = np.random.default_rng(seed)
    n_tokens = int(chance.integers(1, 5000))
    n_active = int(chance.integers(0, min(n_tokens, (seed + 1) * 40) + 1))
    active = np.sort(chance.exponential(size=n_active).astype(np.float32))
    full = np.concatenate([np.zeros(n_tokens - n_active, np.float32), active])
    levels = (0.0001, 0.25, 0.5, 0.9, 0.99, 0.999, 0.9999, 1.0)
    expected = np.quantile(full, levels, method="inverted_cdf")
    assert quantiles_of_sparse(torch.tensor(active), n_tokens, levels) == pytest.approx(expected.tolist(), abs=0)


def test_quantiles_of_sparse_by_hand():
    active = torch.tensor([2.0, 5.0, 7.0])  # with seven zeros
    assert quantiles_of_sparse(active, 10, (0.7, 0.71, 0.8, 0.9, 0.95, 1.0)) == [0.0, 2.0, 2.0, 5.0, 7.0, 7.0]
    assert quantiles_of_sparse(active, 3, (0.1, 1 / 3, 0.5, 1.0)) == [2.0, 2.0, 5.0, 7.0]
    assert quantiles_of_sparse(torch.tensor([]), 10, (0.5, 1.0)) == [0.0, 0.0]


def test_a_level_that_is_a_whole_number_of_tokens_is_not_pushed_up_by_rounding():
    """0.07 · 100 is 7.000000000000001 in floating point; the quantile is still the seventh value."""
    assert 0.07 * 100 > 7
    assert quantiles_of_sparse(torch.arange(1.0, 101.0), 100, (0.07,)) == [7.0]


def test_the_safe_sail_quantile_is_the_two_hundredth_value_from_above():
    """A8: the 0.999 quantile over 200,000 tokens is about the 200th largest; 199,800 tokens are at most the 201st."""
    active = torch.arange(1, 501, dtype=torch.float64)
    assert quantiles_of_sparse(active, 200_000, (0.999,)) == [300.0]


# --- scores -------------------------------------------------------------------------------------------------------


def test_pearson_of_the_golden_segments():
    value = pearson(torch.tensor([1.0, 0, 1, 1]), torch.tensor([1.0, 0, 1, 0]))
    # covariance 1/8, variances 3/16 and 1/4
    assert value == pytest.approx(1 / math.sqrt(3), abs=1e-12)
    assert round(value, 3) == 0.577


@pytest.mark.parametrize("seed", range(4))
def test_pearson_equals_numpys_also_far_from_zero(seed: int):
    chance = np.random.default_rng(seed)
    a = chance.normal(size=40) + 1e3
    b = 0.3 * a + chance.normal(size=40)
    assert pearson(torch.tensor(a), torch.tensor(b)) == pytest.approx(np.corrcoef(a, b)[0, 1], abs=1e-9)


def test_pearson_keeps_its_sign_and_its_bounds():
    a = torch.tensor([0.1, 0.2, 0.7])
    assert pearson(a, 3 * a + 1) == pytest.approx(1)
    assert pearson(a, -a) == pytest.approx(-1)
    assert abs(pearson(a, a)) <= 1


@pytest.mark.parametrize(
    ("a", "b"),
    [([1.0, 1, 1], [0.0, 1, 0]), ([0.0, 1, 0], [0.0, 0, 0]), ([0.1] * 3, [0.1] * 3), ([1.0], [1.0]), ([], [])],
)
def test_pearson_is_undefined_not_zero_for_a_constant(a: list[float], b: list[float]):
    assert pearson(torch.tensor(a), torch.tensor(b)) is None


def made_texts(n_texts: int, n_segments: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    chance = np.random.default_rng(seed)
    truth = chance.integers(0, 2, size=n_texts * n_segments).astype(float)
    predicted = truth + chance.normal(size=len(truth))
    groups = np.repeat(np.arange(n_texts), n_segments)
    return torch.tensor(predicted), torch.tensor(truth), torch.tensor(groups)


def test_the_interval_contains_the_value_and_is_seeded():
    a, b, groups = made_texts(12, 6)
    interval = pearson_interval(a, b, groups)
    assert interval.value == pytest.approx(np.corrcoef(a, b)[0, 1])
    assert -1 <= interval.low < interval.value < interval.high <= 1
    assert pearson_interval(a, b, groups) == interval
    assert pearson_interval(a, b, groups, seed=1) != interval


def test_the_interval_equals_numpys_over_the_same_resampled_texts():
    a, b, groups = made_texts(10, 5, seed=3)
    draws = torch.randint(10, (500, 10), generator=torch.Generator().manual_seed(7)).numpy()
    rows = np.arange(50).reshape(10, 5)
    samples = [np.corrcoef(a.numpy()[rows[d].ravel()], b.numpy()[rows[d].ravel()])[0, 1] for d in draws]
    interval = pearson_interval(a, b, groups, seed=7)
    assert (interval.low, interval.high) == pytest.approx(tuple(np.quantile(samples, [0.025, 0.975])), abs=1e-9)


def test_the_interval_resamples_whole_texts():
    """Fifty copies of two texts that disagree: as 2 texts the interval is wide, as 100 segments of their own narrow."""
    a = torch.tensor([1.0, 0.0, 1.0, 0.0]).repeat_interleave(50)
    b = torch.tensor([1.0, 0.0, 0.0, 1.0]).repeat_interleave(50)  # the first text correlates at 1, the second at -1
    by_text = pearson_interval(a, b, torch.tensor([0, 0, 1, 1]).repeat_interleave(50))
    by_segment = pearson_interval(a, b, torch.arange(200))
    assert (by_text.low, by_text.high) == pytest.approx((-1, 1))
    assert by_segment.high - by_segment.low < 0.5


def test_the_names_of_the_groups_do_not_matter():
    a, b, groups = made_texts(8, 4)
    assert pearson_interval(a, b, groups * 1000 + 17) == pearson_interval(a, b, groups)


def test_an_undefined_score_has_an_undefined_interval():
    interval = pearson_interval(torch.ones(20), torch.arange(20.0), torch.arange(20))
    assert (interval.value, interval.low, interval.high) == (None, None, None)


def test_a_ratio_over_ones_is_the_mean_with_the_interval_of_a_mean():
    values = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0] * 4)
    interval = ratio_of_sums(values, torch.ones(20))
    assert interval.value == 2.0
    assert interval.low < 2.0 < interval.high
    # the standard error of the mean is sqrt(2 / 20) = 0.316; the interval spans about 2 · 1.96 of it
    assert interval.high - interval.low == pytest.approx(4 * 0.316, rel=0.15)
    assert ratio_of_sums(torch.tensor([]), torch.tensor([])) == (None, None, None)


@pytest.mark.parametrize(
    ("scores", "truth", "expected"),
    [
        ([0.9, 0.8, 0.2, 0.1], [1, 1, 0, 0], 1.0),
        ([0.1, 0.2, 0.8, 0.9], [1, 1, 0, 0], 0.0),
        ([0.5, 0.5, 0.5, 0.5], [1, 0, 1, 0], 0.5),
        ([0.9, 0.5, 0.5, 0.1], [1, 1, 0, 0], 3.5 / 4),  # pairs: 1, 1, ½, 1
        ([1.0, 1.0, 0.0, 1.0, 0.0], [1, 1, 1, 0, 0], (0.5 + 1 + 0.5 + 1 + 0 + 0.5) / 6),
    ],
)
def test_auroc_by_hand_with_ties(scores: list[float], truth: list[int], expected: float):
    assert auroc(torch.tensor(scores), torch.tensor(truth)) == pytest.approx(expected)


@pytest.mark.parametrize("truth", [[1, 1, 1], [0, 0, 0]])
def test_auroc_is_undefined_with_one_kind_only(truth: list[int]):
    assert auroc(torch.tensor([0.1, 0.2, 0.3]), torch.tensor(truth)) is None


def test_every_definition_has_a_version():
    assert all(name.rpartition("/")[2] == "v1" and text for name, text in DEFINITIONS.items())
