"""Sparse arithmetic against dense autograd: which entries, their values, their gradients; the compiled top-k."""

import math
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from safesail.sae import kernels
from safesail.sae.sparse import Codes, above, decode, entries, join, jump, largest, topk

pytestmark = pytest.mark.usefixtures("one_thread")

NAN, INF = math.nan, math.inf


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def codes_of(values: list[float], indices: list[int], offsets: list[int]) -> Codes:
    return Codes(torch.tensor(values), torch.tensor(indices).int(), torch.tensor(offsets).int())


def dense_topk(pre: Tensor, k: int) -> Tensor:
    """The same entries as a full matrix, by sorting each row."""
    return torch.where(pre >= pre.sort(dim=1, descending=True).values[:, k - 1 : k], pre, 0)


# --- codes --------------------------------------------------------------------------------------------------------


def three_tokens() -> Codes:
    """Token 0 has latents 3 (2.0) and 0 (0.0), token 1 has none, token 2 has latent 3 (5.0) and 1 (1.0)."""
    return codes_of([2.0, 0.0, 5.0, 1.0], [3, 0, 3, 1], [0, 2, 2, 4])


def test_codes_as_a_matrix_by_hand():
    assert three_tokens().dense(4).tolist() == [[0, 0, 0, 2], [0, 0, 0, 0], [0, 1, 0, 5]]


def test_codes_of_one_token_by_hand():
    codes = three_tokens()
    assert codes.n_tokens == 3
    assert [[part.tolist() for part in codes.of(i)] for i in range(3)] == [
        [[2, 0], [3, 0]],
        [[], []],
        [[5, 1], [3, 1]],
    ]
    assert codes.tokens().tolist() == [0, 0, 2, 2]
    assert codes.tokens().dtype == torch.int32


def test_active_codes_by_hand():
    active = three_tokens().active()
    assert (active.values.tolist(), active.indices.tolist(), active.offsets.tolist()) == (
        [2, 5, 1],
        [3, 3, 1],
        [0, 1, 1, 3],
    )
    assert active.offsets.dtype == active.indices.dtype == torch.int32


def test_entries_by_latent_by_hand():
    order = three_tokens().by_latent(5)
    assert order.permutation.tolist() == [1, 3, 0, 2]  # latent 0, latent 1, then both of latent 3 in their order
    assert order.tokens.tolist() == [0, 2, 0, 2]
    assert order.offsets.tolist() == [0, 1, 2, 2, 4, 4]


def test_other_values_keep_the_entries_and_their_order():
    codes = three_tokens()
    order = codes.by_latent(4)
    other = codes.with_values(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert other.by_latent(4) is order
    assert other.dense(4).tolist() == [[2, 0, 0, 1], [0, 0, 0, 0], [0, 4, 0, 3]]
    assert codes.values.tolist() == [2, 0, 5, 1]
    assert codes.active().by_latent(4) is not order


def test_joined_codes_by_hand():
    parts = [three_tokens(), codes_of([], [], [0, 0]), codes_of([7.0], [2], [0, 1])]
    joined = join(parts)
    assert joined.offsets.tolist() == [0, 2, 2, 4, 4, 5]
    assert joined.offsets.dtype == joined.indices.dtype == torch.int32
    assert joined.dense(4).tolist() == [[0, 0, 0, 2], [0, 0, 0, 0], [0, 1, 0, 5], [0, 0, 0, 0], [0, 0, 7, 0]]
    assert join(parts[:1]).dense(4).tolist() == parts[0].dense(4).tolist()


def test_to_a_device_keeps_everything():
    moved = three_tokens().to("cpu")
    assert moved.dense(4).tolist() == three_tokens().dense(4).tolist()


@pytest.mark.parametrize("n_tokens", [0, 1, 3])
def test_codes_without_any_entry(n_tokens: int):
    codes = above(torch.full((n_tokens, 5), -1.0), 0.0)
    assert codes.n_tokens == codes.active().n_tokens == n_tokens
    assert codes.offsets.tolist() == codes.active().offsets.tolist() == [0] * (n_tokens + 1)
    assert torch.equal(codes.dense(5), torch.zeros(n_tokens, 5))
    assert codes.by_latent(5).offsets.tolist() == [0] * 6
    assert torch.equal(decode(codes, torch.ones(5, 2)), torch.zeros(n_tokens, 2))


def test_without_any_entry_the_gradients_are_zero():
    leaves = [random(5, 2).requires_grad_(), torch.zeros(5).requires_grad_(), random(5, 2, seed=1).requires_grad_()]
    encoder, b_enc, W_dec = leaves
    codes = entries(above(torch.full((3, 5), -1.0), 0.0), random(3, 2), encoder, b_enc, None)
    (decode(codes, W_dec) + 1).square().sum().backward()
    assert all(leaf.grad is not None and not leaf.grad.any() for leaf in leaves)


# --- which entries ------------------------------------------------------------------------------------------------


def test_topk_by_hand():
    pre = torch.tensor([[3.0, -1.0, 2.0, 1.0], [-4.0, -2.0, 0.5, -3.0], [-1.0, -2.0, -3.0, -4.0]])
    codes = topk(pre, 2)
    assert codes.dense(4).tolist() == [[3, 0, 2, 0], [0, -2, 0.5, 0], [-1, -2, 0, 0]]
    relu = codes.with_values(codes.values.relu())
    assert relu.active().offsets.diff().tolist() == [2, 1, 0]  # fewer than k where a negative one is among the largest
    assert pre.tolist()[0] == [3, -1, 2, 1]


@pytest.mark.parametrize("used", [False, True])
def test_of_equal_values_exactly_k_are_kept(used: bool, fast: None):
    kernels.use(used)
    for pre in (torch.ones(3, 10), torch.zeros(3, 10), torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0]])):
        codes = topk(pre, 3)
        assert codes.offsets.diff().tolist() == [3] * len(pre)
        assert all(len(set(codes.of(token)[1].tolist())) == 3 for token in range(len(pre)))


@pytest.mark.parametrize("k", [1, 3, 16])
def test_topk_equals_sorting(k: int):
    pre = random(20, 16, seed=k)
    assert torch.equal(topk(pre, k).dense(16), dense_topk(pre, k))


@pytest.mark.parametrize("threshold", [0.0, 0.7, torch.linspace(-1, 1, 16)])
def test_above_equals_comparing(threshold: Tensor | float):
    pre = random(20, 16)
    codes = above(pre, threshold)
    assert torch.equal(codes.dense(16), torch.where(pre > threshold, pre, 0))
    assert all(codes.of(i)[1].tolist() == (pre[i] > threshold).nonzero().flatten().tolist() for i in range(20))


def test_a_pre_activation_at_the_threshold_is_not_above_it():
    assert above(torch.tensor([[1.0, 2.0, 3.0]]), 2.0).indices.tolist() == [2]


MATRICES: dict[str, Callable[[int, int], Tensor]] = {
    "random": lambda n, d: random(n, d),
    "ascending": lambda n, d: torch.arange(n * d).float().reshape(n, d),
    "descending": lambda n, d: -torch.arange(n * d).float().reshape(n, d),
    "constant": lambda n, d: torch.full((n, d), -2.5),
    "many ties": lambda n, d: random(n, d).round(),
    "one large value": lambda n, d: random(n, d).index_put(
        (torch.tensor(n // 2), torch.tensor(d // 3)), torch.tensor(1e9)
    ),
    "the sample leads": lambda n, d: random(n, d) + 100 * (torch.arange(n * d).reshape(n, d) % 3 == 0),
    "one latent leads": lambda n, d: random(n, d) + 100 * (torch.arange(d) == 1),
    "one token leads": lambda n, d: random(n, d) + 100 * (torch.arange(n) == n - 1)[:, None],
}


@pytest.mark.parametrize("shape", [(1, 1), (1, 7), (9, 1), (40, 30), (300, 700), (256, 512)])
@pytest.mark.parametrize("kind", MATRICES)
def test_the_nth_largest_equals_sorting(kind: str, shape: tuple[int, int]):
    """The two largest matrices are larger than the sample that is looked at first."""
    pre = MATRICES[kind](*shape)
    ordered = pre.flatten().sort(descending=True).values
    for n in {1, max(len(ordered) // 1000, 1), max(len(ordered) // 64, 1), max(len(ordered) // 2, 1), len(ordered)}:
        assert largest(pre, n) == ordered[n - 1], f"{kind} {shape}, n = {n}"


def test_the_nth_largest_of_the_smallest_entries_is_found_where_the_sample_missed_them():
    pre = torch.ones(300, 700)
    pre[17, 3] = -1
    assert [float(largest(pre, n)) for n in (1, 209_999, 210_000)] == [1, 1, -1]


@pytest.mark.parametrize("value", [NAN, -INF])
def test_the_nth_largest_of_values_that_are_not_numbers_ends(value: float):
    found = float(largest(torch.full((8, 16), value), 20))
    assert found == value or math.isnan(found)


def test_the_nth_largest_over_two_ranks_is_that_of_the_whole():
    """Two threads stand for two ranks; one holds nearly all of the largest."""
    pre = random(200, 900)
    pre[:100] += 2
    barrier, parts = threading.Barrier(2, timeout=60), [torch.empty(0)] * 2

    def gather(rank: int) -> Callable[[Tensor], Tensor]:
        def join(part: Tensor) -> Tensor:
            parts[rank] = part
            barrier.wait()
            joined = torch.cat(parts)
            barrier.wait()
            return joined

        return join

    for n in (1, 3000, 90_000, 179_990):
        found: dict[int, float] = {}

        def work(rank: int, n: int = n, found: dict[int, float] = found) -> None:
            found[rank] = float(largest(pre[100 * rank : 100 * rank + 100], n, gather(rank)))

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        expected = float(pre.flatten().sort(descending=True).values[n - 1])
        assert found == {0: expected, 1: expected}


# --- values and gradients -----------------------------------------------------------------------------------------


def test_decode_by_hand():
    W_dec = torch.tensor([[10.0, 0.0], [0.0, 1.0], [3.0, 4.0]])
    codes = codes_of([2.0, 0.5, 1.0], [1, 0, 2], [0, 2, 2, 3])
    assert decode(codes, W_dec).tolist() == [[5, 2], [0, 0], [3, 4]]


@pytest.mark.parametrize("k", [1, 5])
def test_decode_equals_the_dense_product(k: int):
    codes, W_dec = topk(random(30, 40, dtype=torch.float64), k), random(40, 6, seed=1, dtype=torch.float64)
    torch.testing.assert_close(decode(codes, W_dec), codes.dense(40) @ W_dec, rtol=0, atol=1e-12)


def test_a_latent_that_is_not_chosen_gets_no_gradient():
    x, encoder = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]).requires_grad_()
    codes = entries(topk(x @ encoder.detach().T, 1), x, encoder, torch.zeros(3), None)
    codes.values.sum().backward()
    assert encoder.grad is not None
    assert encoder.grad.tolist() == [[1, 0], [0, 0], [0, 0]]


EPSILON = 0.8


def dense_jump(pre: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """a·H(a − θ) and H(a − θ) with the gradients of the paper: autograd sees them as linear in θ."""
    step, near = (pre > threshold).to(pre.dtype), ((pre - threshold).abs() < EPSILON / 2).to(pre.dtype)
    moved = near / EPSILON * (threshold - threshold.detach())
    return pre * step - threshold.detach() * moved, step - moved


def all_of(a: Tensor, _: Tensor) -> Tensor:
    return torch.ones_like(a, dtype=torch.bool)


def above_the_151st(a: Tensor, _: Tensor) -> Tensor:
    return a > a.flatten().sort(descending=True).values[150]


Choice = Callable[[Tensor, Tensor], Codes]
Mask = Callable[[Tensor, Tensor], Tensor]
# {path: (the chosen entries, the same as a dense mask)}; the last two hold entries that the ReLU or H sets to zero
PATHS: dict[str, tuple[Choice, Mask]] = {
    "topk 1": (lambda a, _: topk(a, 1), lambda a, _: a == a.max(1, keepdim=True).values),
    "topk 4": (lambda a, _: topk(a, 4), lambda a, _: dense_topk(a, 4) != 0),
    "relu": (lambda a, _: above(a, 0.0), lambda a, _: a > 0),
    "batchtopk": (lambda a, _: above(a, largest(a, 151)), above_the_151st),
    "topk of all": (lambda a, _: topk(a, 24), all_of),
    "jumprelu": (lambda a, t: above(a, t - EPSILON / 2), all_of),
}


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 5e-4)])
def test_values_and_gradients_equal_dense_autograd(path: str, dtype: torch.dtype, tolerance: float):
    """The loss decodes the same entries twice, with other values, so that their order by latent is used again."""
    x, target = random(50, 8, seed=9, dtype=dtype), random(50, 8, seed=8, dtype=dtype)
    choose, mask = PATHS[path]

    def loss_and_gradients(dense: bool) -> list[Tensor]:
        shapes = [(24, 8), (24,), (24, 8), (8,), (24,)]
        leaves = [random(*shape, seed=i, dtype=dtype).requires_grad_() for i, shape in enumerate(shapes)]
        encoder, b_enc, W_dec, b_dec, threshold = leaves
        centred = x - b_dec
        pre = (centred @ encoder.T + b_enc).detach()
        if dense:
            a = torch.where(mask(pre, threshold), centred @ encoder.T + b_enc, 0)
            z, penalised = dense_jump(a, threshold) if path == "jumprelu" else (a.relu(), a.relu())
            first, second = z @ W_dec, z.square() @ W_dec
        else:
            codes = entries(choose(pre, threshold), centred.detach(), encoder, b_enc, b_dec)
            z = penalised = codes.values.relu()
            if path == "jumprelu":
                z, penalised = jump(codes.values, threshold[codes.indices], EPSILON)
            first, second = (decode(codes.with_values(values), W_dec) for values in (z, z.square()))
        loss = (first + b_dec - target).square().sum() + (second - target).square().sum() + penalised.sum()
        return [loss, *torch.autograd.grad(loss / 500, leaves if path == "jumprelu" else leaves[:4])]

    for sparse, dense in zip(loss_and_gradients(dense=False), loss_and_gradients(dense=True), strict=True):
        assert dense.abs().max() > 0.1
        torch.testing.assert_close(sparse, dense, rtol=tolerance, atol=tolerance)


# --- JumpReLU -----------------------------------------------------------------------------------------------------


def test_jumprelu_by_hand():
    a = torch.tensor([1.0, 2.5, 2.0, 4.0]).requires_grad_()
    threshold = torch.full((4,), 2.0).requires_grad_()
    z, step = jump(a, threshold, bandwidth=2.0)
    assert (z.tolist(), step.tolist()) == ([0, 2.5, 0, 4], [0, 1, 0, 1])
    to_a, to_threshold = torch.autograd.grad(z.sum(), (a, threshold), retain_graph=True)
    assert (to_a.tolist(), to_threshold.tolist()) == ([0, 1, 0, 1], [0, -1, -1, 0])  # −θ/ε where 1 < a < 3
    to_a, to_threshold = torch.autograd.grad(step.sum(), (a, threshold))
    assert (to_a.tolist(), to_threshold.tolist()) == ([0, 0, 0, 0], [0, -0.5, -0.5, 0])  # −1/ε; nothing to a


@pytest.mark.parametrize("epsilon", [0.1, 0.5, 2.0])
def test_the_gradient_of_the_count_is_its_finite_difference(epsilon: float):
    """With N(θ) entries above θ, the summed gradient is exactly [N(θ + ε/2) − N(θ − ε/2)] / ε."""
    a, theta = random(5000, seed=3, dtype=torch.float64), 0.7
    threshold = torch.tensor(theta, dtype=torch.float64).requires_grad_()
    _, step = jump(a, threshold.expand(5000), epsilon)
    (gradient,) = torch.autograd.grad(step.sum(), threshold)
    difference = ((a > theta + epsilon / 2).sum() - (a > theta - epsilon / 2).sum()) / epsilon
    assert difference < -100
    assert float(gradient) == pytest.approx(float(difference), rel=1e-12)


@pytest.mark.parametrize("epsilon", [0.05, 0.2, 0.5])
def test_the_gradient_of_the_values_is_their_finite_difference_within_the_bandwidth(epsilon: float):
    """S(θ) = ∫ a·H(a − θ)·sin a da on a grid; its derivative is −θ sin θ."""
    width, theta = 1e-4, 1.3
    a = torch.arange(0, 3, width, dtype=torch.float64)
    threshold = torch.tensor(theta, dtype=torch.float64).requires_grad_()
    z, _ = jump(a, threshold.expand(len(a)), epsilon)
    (gradient,) = torch.autograd.grad((z * a.sin()).sum() * width, threshold)

    def total(at: float) -> Tensor:
        return (a * (a > at) * a.sin()).sum() * width

    difference = (total(theta + epsilon / 2) - total(theta - epsilon / 2)) / epsilon
    assert float(gradient) == pytest.approx(float(difference), abs=0.1 * epsilon)
    assert float(gradient) == pytest.approx(-theta * math.sin(theta), abs=0.1 * epsilon)


# --- the compiled top-k -------------------------------------------------------------------------------------------


@pytest.fixture
def fast():
    """The compiled kernels can be used, and are switched back as they were afterwards."""
    pytest.importorskip("numba")
    before = kernels.apply_to(torch.ones(1, 1))
    yield
    kernels.use(before)


def test_the_compiled_topk_is_used_for_plain_cpu_matrices_only(fast: None):
    kernels.use(True)
    assert kernels.apply_to(torch.ones(2, 3))
    assert not kernels.apply_to(torch.ones(2, 3, dtype=torch.float64))
    assert not kernels.apply_to(torch.ones(2, 3).T)
    kernels.use(False)
    assert not kernels.apply_to(torch.ones(2, 3))


def assert_like_sorting(pre: Tensor, k: int) -> None:
    """The compiled entries are those of a stable sort, in ascending order of index: of equal ones the first stay."""
    values, indices = kernels.topk(pre, k)
    expected = pre.sort(dim=1, descending=True, stable=True).indices[:, :k].sort(dim=1).values
    assert torch.equal(indices.long(), expected)
    assert torch.equal(values, pre.gather(1, expected))


def matrix_of_scales() -> Tensor:
    """Neighbouring rows whose scales differ by up to 10²⁴; their squares over- and underflow in fp32."""
    return random(12, 300) * torch.tensor([1.0, 1e-25, 1e24, 1e-3, 1e22, 1e-30] * 2)[:, None]


@pytest.mark.parametrize(
    "pre",
    [
        random(40, 300),
        -random(40, 300).abs(),
        random(1, 300),
        torch.zeros(5, 300),
        torch.full((5, 300), -3.25),
        torch.arange(1500.0).reshape(5, 300),
        -torch.arange(1500.0).reshape(5, 300),
        random(40, 300).round(),
        random(40, 300).relu(),
        torch.cat([torch.zeros(3, 300), random(3, 300), torch.zeros(3, 300)]),
        matrix_of_scales(),
        torch.where(random(40, 300) < 1.5, random(40, 300, seed=1), -INF),
        torch.where(random(40, 300) < 1.5, random(40, 300, seed=1), INF),
    ],
)
@pytest.mark.parametrize("k", [1, 2, 64, 200])
def test_the_compiled_topk_equals_sorting(fast: None, pre: Tensor, k: int):
    assert_like_sorting(pre, k)


def test_the_compiled_topk_can_keep_everything(fast: None):
    for d_sae in (1, 7, 300):
        assert_like_sorting(random(4, d_sae), d_sae)


def some_codes(d_sae: int) -> Codes:
    """Five tokens of 2, 0, 4, 1 and 600 entries; latents repeat, two are never active."""
    indices = torch.cat([torch.tensor([3, 0, 5, 3, 1, 0, 3]), torch.arange(600) % (d_sae - 2)]).int()
    return Codes(random(len(indices)), indices, torch.tensor([0, 2, 2, 6, 7, 607]).int())


def test_the_compiled_grouping_equals_a_stable_sort(fast: None):
    codes = some_codes(9)
    kernels.use(False)
    expected = codes.by_latent(9)
    kernels.use(True)
    grouped = Codes(codes.values, codes.indices, codes.offsets).by_latent(9)
    assert all(torch.equal(a, b) for a, b in zip(grouped, expected, strict=True))


def test_compiled_products_of_entries_by_hand(fast: None):
    rows, vectors = torch.tensor([[1.0, 2], [0, 1], [3, -1]]), torch.tensor([[10.0, 0], [1, 1], [0, 5], [2, 4]])
    latents, starts = torch.tensor([0, 3, 1, 2, 2]).int(), torch.tensor([0, 2, 4, 5]).int()
    assert kernels.products(latents, starts, rows, vectors).tolist() == [10, 10, 1, 5, -5]


@pytest.mark.parametrize("n_threads", [1, 3])
def test_compiled_gradients_of_decoding_equal_torchs(fast: None, n_threads: int, monkeypatch: pytest.MonkeyPatch):
    torch.set_num_threads(n_threads)
    monkeypatch.setattr(kernels, "_ROWS", 2)
    codes, to_output = some_codes(9), random(5, 6, seed=2)
    found = []
    for used in (False, True):
        kernels.use(used)
        values, W_dec = codes.values.clone().requires_grad_(), random(9, 6, seed=1).requires_grad_()
        x_hat = decode(Codes(values, codes.indices, codes.offsets), W_dec)
        x_hat.backward(to_output)
        found.append((x_hat.detach(), values.grad, W_dec.grad))
    for expected, gradient in zip(*found, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-4)


def test_the_compiled_topk_equals_torchs(fast: None):
    pre = random(64, 500)
    kernels.use(False)
    expected = topk(pre, 32).dense(500)
    kernels.use(True)
    assert torch.equal(topk(pre, 32).dense(500), expected)


@pytest.mark.parametrize("n_rows", [0, 1, 2, 5])
def test_there_may_be_more_threads_than_rows(fast: None, n_rows: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernels, "_ROWS", 1)
    torch.set_num_threads(4)
    assert_like_sorting(random(n_rows, 50), 6)


def test_the_number_of_threads_changes_nothing(fast: None, monkeypatch: pytest.MonkeyPatch):
    pre = random(37, 90).round(decimals=1)
    alone = kernels.topk(pre, 8)
    torch.set_num_threads(3)
    monkeypatch.setattr(kernels, "_ROWS", 5)
    assert all(torch.equal(a, b) for a, b in zip(kernels.topk(pre, 8), alone, strict=True))


@pytest.mark.parametrize("bad", [NAN, -INF])
def test_a_row_without_k_comparable_entries_gives_nan(fast: None, bad: float):
    """Never what happened to lie in memory; its neighbours are what they are without it."""
    pre = random(9, 60)
    pre[[0, 4]] = bad
    pre[8, 3:] = bad  # 3 comparable ones are left
    values, indices = kernels.topk(pre, 5)
    assert values[[0, 4, 8]].isnan().all()
    assert ((indices >= 0) & (indices < 60)).all()
    good = [1, 2, 3, 5, 6, 7]
    expected = kernels.topk(pre[good].contiguous(), 5)
    assert torch.equal(values[good], expected[0])
    assert torch.equal(indices[good], expected[1])


def test_the_compiled_topk_equals_sorting_for_random_shapes(fast: None):
    chance = torch.Generator().manual_seed(0)
    for seed in range(150):
        n_rows, d_sae = (int(torch.randint(1, high, (), generator=chance)) for high in (20, 400))
        k = int(torch.randint(1, d_sae + 1, (), generator=chance))
        pre = random(n_rows, d_sae, seed=seed) * 10.0 ** float(torch.randint(-3, 4, (), generator=chance))
        assert_like_sorting(pre.round() if seed % 3 == 0 else pre, k)
