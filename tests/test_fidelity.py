"""Fidelity of made-up SAEs in a tiny model: golden values, written-out sums, intervals over documents, and resuming."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from safesail.errors import InputError
from safesail.lm.hooks import replace, run_to_depth
from safesail.metrics import DEFINITIONS, complement, ratio_of_sums
from safesail.recipe import Recipe
from safesail.run import StageWork
from safesail.sae.config import SaeConfig
from safesail.sae.model import Sae
from safesail.training import fidelity
from safesail.training.fidelity import FIDELITY, cross_entropy, divergence, eval_stage, firing_rates, reconstruct_kept
from safesail.training.trainer import variants

REPOSITORY = Path(__file__).resolve().parent.parent
HOOK_POINTS = ("layers.0.mlp", "layers.1.mlp")
D_IN, D_SAE = 32, 64
IDENTITY, BETWEEN, MEAN, ZERO = (f"topk-k{k}-w{D_SAE}" for k in (D_SAE, 7, 2, 1))

pytestmark = pytest.mark.usefixtures("one_thread")


# --- the ratio of sums and its interval ---------------------------------------------------------------------------


def test_a_ratio_of_sums_by_hand():
    ratio = ratio_of_sums(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([2.0, 2.0, 8.0]))
    assert ratio.value == 9 / 12  # not the mean of 1/2, 1 and 3/4, which happens to be 3/4 too, but weighted:
    assert ratio_of_sums(torch.tensor([1.0, 3.0]), torch.tensor([1.0, 9.0])).value == 4 / 10  # not (1 + 1/3) / 2


def test_the_ends_are_those_of_the_resampled_ratios_by_hand():
    """Two groups: the draws (a, a), (a, b), (b, a), (b, b) are equally likely, so 95 % reaches to both extremes."""
    ratio = ratio_of_sums(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 3.0]))
    assert (ratio.value, ratio.low, ratio.high) == (4 / 5, 1 / 2, 1.0)


def test_numerator_and_denominator_are_drawn_together():
    """Where every group has the same ratio, no resample can differ from it, however unequal the groups are."""
    weights = torch.tensor([1.0, 10.0, 100.0, 1000.0])
    assert ratio_of_sums(weights / 4, weights) == (0.25, 0.25, 0.25)


def test_a_group_counts_as_one_however_many_tokens_it_has():
    """Fifty copies of two documents that disagree are two observations, not a hundred."""
    by_document = ratio_of_sums(torch.tensor([0.0, 50.0]), torch.tensor([50.0, 50.0]))
    by_token = ratio_of_sums(torch.tensor([0.0, 1.0]).repeat_interleave(50), torch.ones(100))
    assert (by_document.low, by_document.high) == (0.0, 1.0)
    # the standard error of a share of 1/2 over 100 tokens is 0.05: the interval spans 4 · 0.05 at most
    assert 0.15 < by_token.high - by_token.low < 0.22


def test_the_resampling_is_the_same_every_time_and_for_every_metric():
    residual, total = torch.rand(30, generator=torch.Generator().manual_seed(1)), torch.ones(30)
    fvu = ratio_of_sums(residual, total)
    assert ratio_of_sums(residual, total) == fvu
    assert ratio_of_sums(residual, total, seed=1) != fvu
    ev = ratio_of_sums(total - residual, total)
    assert complement(fvu) == pytest.approx(tuple(ev))  # the same documents are drawn for both
    assert ev.low < ev.value < ev.high


@pytest.mark.parametrize("at_once", [1, 7, 10_000])
def test_how_many_resamples_are_drawn_at_once_changes_nothing(monkeypatch: pytest.MonkeyPatch, at_once: int):
    values = torch.arange(20.0)
    expected = ratio_of_sums(values, torch.ones(20))
    monkeypatch.setattr("safesail.metrics._DRAWS_AT_ONCE", at_once * 20)
    assert ratio_of_sums(values, torch.ones(20)) == expected


def test_a_ratio_that_is_not_defined_is_none():
    assert ratio_of_sums(torch.tensor([1.0, 2.0]), torch.zeros(2)) == (None, None, None)
    assert ratio_of_sums(torch.tensor([1.0, 2.0]), torch.tensor([1.0, -3.0])) == (None, None, None)
    assert ratio_of_sums(torch.tensor([]), torch.tensor([])) == (None, None, None)
    assert ratio_of_sums(torch.tensor([3.0]), torch.tensor([4.0])) == (0.75, None, None)  # one document: no interval
    assert complement(ratio_of_sums(torch.tensor([3.0]), torch.tensor([4.0]))) == (0.25, None, None)


def test_resamples_without_a_positive_denominator_are_left_out():
    ratio = ratio_of_sums(torch.tensor([1.0, 1.0]), torch.tensor([2.0, 0.0]))
    assert (ratio.value, ratio.low, ratio.high) == (1.0, 0.5, 1.0)  # (b, b) has the denominator 0


def test_19_of_20_intervals_cover_the_truth_also_for_unequal_dependent_documents():
    """60 documents of 1 to 40 tokens; a document's own level makes its tokens alike. The truth is 3."""
    covered = naive = 0
    for repetition in range(200):
        chance = torch.Generator().manual_seed(repetition)
        lengths = torch.randint(1, 41, (60,), generator=chance)
        level = 3 + torch.randn(60, generator=chance)
        values = level.repeat_interleave(lengths) + torch.randn(int(lengths.sum()), generator=chance)
        document = torch.arange(60).repeat_interleave(lengths)
        sums = torch.zeros(60).index_add_(0, document, values)
        interval = ratio_of_sums(sums, lengths)
        covered += interval.low <= 3 <= interval.high
        by_token = ratio_of_sums(values, torch.ones(len(values)), n_resamples=200)
        naive += by_token.low <= 3 <= by_token.high
    assert 0.85 * 200 <= covered <= 0.99 * 200
    assert naive < 0.6 * 200  # what resampling tokens would claim


# --- one token ----------------------------------------------------------------------------------------------------


def test_the_divergence_by_hand():
    p, q = torch.tensor([[0.5, 0.5], [0.25, 0.75]]).log(), torch.tensor([[0.25, 0.75], [0.25, 0.75]]).log()
    # 1/2 ln(1/2 / 1/4) + 1/2 ln(1/2 / 3/4) = 1/2 ln 2 + 1/2 ln 2/3 = 1/2 ln 4/3
    assert divergence(p, q).tolist() == pytest.approx([0.5 * math.log(4 / 3), 0], abs=1e-7)
    # the other way round it is 1/4 ln 1/2 + 3/4 ln 3/2
    assert float(divergence(q, p)[0]) == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5), abs=1e-7)


def test_divergence_and_cross_entropy_equal_torchs():
    chance = torch.Generator().manual_seed(0)
    p, q = (torch.randn(300, 50, generator=chance).log_softmax(1) for _ in range(2))
    expected = F.kl_div(q, p, log_target=True, reduction="none").sum(1).double()
    torch.testing.assert_close(divergence(p, q), expected)
    targets = torch.randint(50, (300,), generator=chance)
    torch.testing.assert_close(cross_entropy(q, targets), F.cross_entropy(q, targets, reduction="none").double())


def test_only_kept_tokens_are_reconstructed_and_the_dtype_stays():
    sae = made_sae(SaeConfig(d_in=2, d_sae=2, k=1, hook_point="layers.0"), torch.zeros(2, 2), torch.tensor([9.0, 8.0]))
    x = torch.tensor([[[1.0, 2.0], [3.0, 4.0]]], dtype=torch.bfloat16)
    out = reconstruct_kept(sae, x, torch.tensor([[False, True]]))
    assert out.tolist() == [[[1.0, 2.0], [9.0, 8.0]]]
    assert out.dtype == torch.bfloat16
    assert x.tolist() == [[[1.0, 2.0], [3.0, 4.0]]]


# --- a tiny world -------------------------------------------------------------------------------------------------


def made_sae(config: SaeConfig, W_dec: Tensor, b_dec: Tensor, **more: Tensor) -> Sae:
    """An SAE whose latents are the positive and the negative part of each dimension of x - b_dec."""
    eye = torch.eye(config.d_in)
    W_enc = torch.cat([eye, -eye])[: config.d_sae].T.contiguous()
    return Sae(config, W_enc, torch.zeros(config.d_sae), W_dec, b_dec, **more)


class Harvest:
    """What the eval stage reads of a harvest, in memory, its rows in blocks of any size."""

    def __init__(self, model: Any, pieces: list[tuple[str, bool, list[int]]], block: int = 50) -> None:
        self.hook_points, self.block = list(HOOK_POINTS), block
        self.documents = [document for document, _, _ in pieces]
        self.held_out = torch.tensor([held_out for _, held_out, _ in pieces])
        self.piece_ids = [ids for _, _, ids in pieces]
        lengths = torch.tensor([len(ids) for ids in self.piece_ids])
        self.row_start = lengths.cumsum(0) - lengths
        self.piece_of_row = torch.repeat_interleave(torch.arange(len(pieces)), lengths)
        self.n_tokens = int(lengths.sum())
        with torch.inference_mode():
            outputs = [run_to_depth(model, HOOK_POINTS, input_ids=torch.tensor([ids])) for ids in self.piece_ids]
        self.x = {name: torch.cat([output[name][0] for output in outputs]) for name in HOOK_POINTS}
        self.keep = torch.arange(self.n_tokens) % 7 != 0
        self.facts = {"d_in": dict.fromkeys(HOOK_POINTS, D_IN), "median_norm": dict.fromkeys(HOOK_POINTS, 1.0)}

    def counted(self, hook_point: str, policy: Any) -> Tensor:
        return self.keep

    def norms(self, hook_point: str) -> Tensor:
        return self.x[hook_point].norm(dim=-1)

    def rows_held_out(self) -> Tensor:
        return self.held_out[self.piece_of_row]

    def blocks(self, hook_point: str) -> Iterator[tuple[int, Tensor]]:
        for start in range(0, self.n_tokens, self.block):
            yield start, self.x[hook_point][start : start + self.block]

    def measured(self, hook_point: str) -> tuple[Tensor, list[str]]:
        """The held-out activations that count, and each one's document."""
        rows = (self.keep & self.rows_held_out()).nonzero().flatten()
        return self.x[hook_point][rows].double(), [self.documents[i] for i in self.piece_of_row[rows].tolist()]


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Any:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(tiny_model).eval()


@pytest.fixture(scope="module")
def pieces(model: Any) -> list[tuple[str, bool, list[int]]]:
    """Seventeen documents of one to three pieces of 9 to 30 tokens, every third document held out.

    The texts are drawn from the model itself: nothing predicts them better, so every change costs cross entropy.
    """
    chance = torch.Generator().manual_seed(0)
    ids = torch.randint(2, 256, (33, 1), generator=chance)
    with torch.inference_mode():
        for _ in range(29):
            probabilities = (model(input_ids=ids).logits[:, -1] / 0.7).softmax(1)
            ids = torch.cat([ids, probabilities.multinomial(1, generator=chance)], dim=1)
    lengths = torch.randint(9, 31, (33,), generator=chance).tolist()
    owners = [i for i in range(17) for _ in range(1 + i % 3)]
    return [(f"d{i}", i % 3 == 1, row[:n]) for i, row, n in zip(owners, ids.tolist(), lengths, strict=True)]


@pytest.fixture
def harvested(model: Any, pieces: Any) -> Any:
    return Harvest(model, pieces)


def recipe_of(**settings: Any) -> Recipe:
    """The demo recipe with SAEs of 64 latents, at k 1, 2, 7 and 64."""
    given = {
        "harvest.hook_points": json.dumps(HOOK_POINTS),
        "harvest.window": "64",
        "train.architectures": '["topk"]',
        "train.d_sae": str(D_SAE),
        "train.k": f"[1, 2, 7, {D_SAE}]",
        "eval.n_ce_tokens": "150",
        "runtime.windows_per_batch": "2",
        "runtime.device": '"cpu"',
        **settings,
    }
    return Recipe.load(REPOSITORY / "hub/recipes/demo.toml", tuple(f"{key}={value}" for key, value in given.items()))


@pytest.fixture
def trained(tmp_path: Path, harvested: Any) -> Path:
    """At each hook point the identity, the held-out mean, zero, and something in between: k 7 and a dead latent."""
    eye = torch.eye(D_IN)
    for hook_point in HOOK_POINTS:
        x, _ = harvested.measured(hook_point)
        for config in variants(recipe_of(), harvested, hook_point):
            W_dec = torch.cat([eye, -eye]) * (0 if config.variant in (MEAN, ZERO) else 1)
            b_dec = x.mean(0).float() if config.variant == MEAN else torch.zeros(D_IN)
            sae = made_sae(config, W_dec, b_dec)
            if config.variant == BETWEEN:
                sae.b_enc[5] = -1e6
            sae.save(tmp_path / "trained" / config.sae_id)
    return tmp_path / "trained"


def measured(recipe: Recipe, harvested: Any, trained: Path, model: Any, folder: Path) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    eval_stage(recipe, harvested, trained, model, StageWork(folder))
    return json.loads((folder / "fidelity.json").read_text())


# --- golden values ------------------------------------------------------------------------------------------------


@pytest.fixture
def results(harvested: Any, trained: Path, model: Any, tmp_path: Path) -> dict[str, Any]:
    return measured(recipe_of(), harvested, trained, model, tmp_path / "eval")


@pytest.mark.parametrize("hook_point", HOOK_POINTS)
def test_the_identity_is_perfect(results: dict[str, Any], hook_point: str):
    found = results[f"{hook_point}/{IDENTITY}"]
    exact = {"explained_variance": 1, "fvu": 0, "mse": 0, "cosine": 1, "kl": 0, "ce_recovered": 1}
    assert {name: found[name] for name in exact} == pytest.approx(exact, abs=1e-9)
    for name, value in exact.items():
        assert found["intervals"][name] == pytest.approx([value, value], abs=1e-9)
    assert found["ce_spliced"] == found["ce_clean"]


@pytest.mark.parametrize("hook_point", HOOK_POINTS)
def test_the_mean_predictor_explains_nothing(results: dict[str, Any], harvested: Any, hook_point: str):
    found = results[f"{hook_point}/{MEAN}"]
    x, _ = harvested.measured(hook_point)
    assert found["explained_variance"] == pytest.approx(0, abs=1e-6)
    assert found["fvu"] == pytest.approx(1, abs=1e-6)
    assert found["mse"] == pytest.approx(float((x - x.mean(0)).square().mean()), rel=1e-6)
    assert found["kl"] > 0


@pytest.mark.parametrize("hook_point", HOOK_POINTS)
def test_zero_has_no_cosine_and_its_mse_is_the_mean_square(results: dict[str, Any], harvested: Any, hook_point: str):
    found = results[f"{hook_point}/{ZERO}"]
    x, _ = harvested.measured(hook_point)
    assert found["cosine"] == 0
    assert found["mse"] == pytest.approx(float(x.square().mean()), rel=1e-6)
    assert found["explained_variance"] < 0


def test_zero_in_place_of_every_token_recovers_nothing(harvested: Any, trained: Path, model: Any, tmp_path: Path):
    harvested.keep[:] = True
    results = measured(recipe_of(), harvested, trained, model, tmp_path / "eval")
    for hook_point in HOOK_POINTS:
        found = results[f"{hook_point}/{ZERO}"]
        assert found["ce_recovered"] == pytest.approx(0, abs=1e-6)
        assert found["ce_spliced"] == pytest.approx(found["ce_zeroed"], abs=1e-6)


def test_every_number_has_an_interval_around_it_and_a_definition(results: dict[str, Any]):
    assert len(results) == 8
    for found in results.values():
        assert tuple(found["intervals"]) == tuple(found["definitions"]) == FIDELITY
        assert all(found["definitions"][name] in DEFINITIONS for name in FIDELITY)
        for name, (low, high) in found["intervals"].items():
            assert low - 1e-9 <= found[name] <= high + 1e-9, name
    between = results[f"layers.1.mlp/{BETWEEN}"]
    for name in ("explained_variance", "fvu", "mse", "cosine", "dead", "ce_recovered", "kl"):
        low, high = between["intervals"][name]
        assert low < between[name] < high, name


# --- sums over the harvest ----------------------------------------------------------------------------------------


def between(x: Tensor) -> tuple[Tensor, Tensor]:
    """The seven largest of the positive and negative parts of x without the sixth, and what they add up to."""
    latents = torch.cat([x, -x], dim=1).clamp(min=0)
    latents[:, 5] = 0
    latents = torch.where(latents >= latents.sort(1, descending=True).values[:, 6:7], latents, 0)
    return latents, latents[:, :D_IN] - latents[:, D_IN:]


@pytest.mark.parametrize("hook_point", HOOK_POINTS)
def test_the_statistics_equal_those_written_out(results: dict[str, Any], harvested: Any, hook_point: str):
    found = results[f"{hook_point}/{BETWEEN}"]
    every = harvested.x[hook_point].double()
    latents, kept = between(every)
    rows = harvested.keep & harvested.rows_held_out()
    x, x_hat = every[rows], kept[rows]
    residual, total = (x - x_hat).square(), (x - x.mean(0)).square()
    assert found["fvu"] == pytest.approx(float(residual.sum() / total.sum()), rel=1e-9)
    assert found["explained_variance"] == pytest.approx(1 - found["fvu"], abs=1e-12)
    assert found["mse"] == pytest.approx(float(residual.mean()), rel=1e-9)
    assert found["cosine"] == pytest.approx(float(F.cosine_similarity(x, x_hat).mean()), rel=1e-9)
    assert found["l0"] == 7
    identity = results[f"{hook_point}/{IDENTITY}"]
    assert identity["l0"] == float((x != 0).sum(1).double().mean())  # k is 64, but half of the parts are zero
    fired = (latents > 0)[harvested.keep].double().mean(0)
    assert found["dead"] == float((fired == 0).double().mean()) == 1 / D_SAE
    assert found["dense"] == float((fired > 0.1).double().mean())
    assert 0 < found["dense"] < 1
    assert (found["n_tokens"], found["n_held_out_tokens"]) == (int(harvested.keep.sum()), len(x))
    assert found["n_held_out_documents"] == 6  # d1, d4, d7, d10, d13, d16


def test_the_interval_resamples_the_documents_sums(results: dict[str, Any], harvested: Any):
    x, documents = harvested.measured("layers.0.mlp")
    _, x_hat = between(x)
    numbers = [documents.index(name) for name in documents]
    sums = torch.zeros(2, len(x), dtype=torch.float64)
    sums[0].index_add_(0, torch.tensor(numbers), (x - x_hat).square().sum(1))
    sums[1].index_add_(0, torch.tensor(numbers), (x - x.mean(0)).square().sum(1))
    firsts = sorted(set(numbers))
    expected = ratio_of_sums(sums[0, firsts], sums[1, firsts])
    found = results[f"layers.0.mlp/{BETWEEN}"]["intervals"]
    assert found["fvu"] == pytest.approx([expected.low, expected.high], rel=1e-9)
    assert found["explained_variance"] == pytest.approx([1 - expected.high, 1 - expected.low], rel=1e-9)


@pytest.mark.parametrize("block", [7, 1000])
def test_the_size_of_the_blocks_changes_nothing(
    results: dict[str, Any], trained: Path, model: Any, pieces: Any, tmp_path: Path, block: int
):
    found = measured(recipe_of(), Harvest(model, pieces, block), trained, model, tmp_path / "other")
    for name, numbers in results.items():
        for metric in FIDELITY:
            assert found[name][metric] == pytest.approx(numbers[metric], abs=1e-6), (name, metric)
            assert found[name]["intervals"][metric] == pytest.approx(numbers["intervals"][metric], abs=1e-6)


def test_a_variance_far_smaller_than_the_mean_is_not_lost(harvested: Any, trained: Path, model: Any, tmp_path: Path):
    """x = 1000 + one bit more or less: a difference of two sums of squares in fp32 would be noise."""
    far = 1000 + 0.5 * torch.randint(0, 2, harvested.x["layers.0.mlp"].shape).float()
    harvested.x["layers.0.mlp"] = far
    rows = harvested.keep & harvested.rows_held_out()
    x = far[rows].double()
    for config in variants(recipe_of(), harvested, "layers.0.mlp"):
        made_sae(config, torch.zeros(D_SAE, D_IN), torch.full((D_IN,), 1000.25)).save(trained / config.sae_id)
    found = measured(recipe_of(), harvested, trained, model, tmp_path / "eval")[f"layers.0.mlp/{MEAN}"]
    assert found["mse"] == pytest.approx(1 / 16, rel=1e-9)
    assert found["fvu"] == pytest.approx(float(len(x) * D_IN / 16 / (x - x.mean(0)).square().sum()), rel=1e-6)


def test_firing_rates_are_over_all_counted_tokens(results: dict[str, Any], harvested: Any, tmp_path: Path):
    rates = firing_rates(tmp_path / "eval", f"layers.0.mlp/{IDENTITY}")
    x = harvested.x["layers.0.mlp"][harvested.keep]
    torch.testing.assert_close(rates, torch.cat([x > 0, x < 0], dim=1).float().mean(0))


def test_an_sae_with_a_threshold_has_as_many_active_latents_as_the_token_needs(
    harvested: Any, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """JumpReLU at 0.5 of the positive and negative parts: x_i where |x_i| > 0.5, from 0 to 32 of them, else 0."""
    config = SaeConfig(d_in=D_IN, d_sae=D_SAE, architecture="jumprelu", coefficient=0.01, hook_point="layers.0.mlp")
    eye, threshold = torch.eye(D_IN), torch.full((D_SAE,), 0.5)
    sae = made_sae(config, torch.cat([eye, -eye]), torch.zeros(D_IN), threshold=threshold)
    sae.save(tmp_path / "trained" / config.sae_id)
    monkeypatch.setattr(fidelity, "variants", lambda *_: [config])
    harvested.hook_points = ["layers.0.mlp"]
    found = measured(recipe_of(), harvested, tmp_path / "trained", model, tmp_path / "eval")[config.sae_id]
    every = harvested.x["layers.0.mlp"].double()
    x, _ = harvested.measured("layers.0.mlp")
    assert found["l0"] == pytest.approx(float((x.abs() > 0.5).sum(1).double().mean()))
    assert (x.abs() > 0.5).sum(1).unique().numel() > 2
    residual = torch.where(x.abs() > 0.5, 0, x).square().sum()
    assert found["mse"] == pytest.approx(float(residual / x.numel()), rel=1e-9)
    fires = (torch.cat([every, -every], dim=1) > 0.5)[harvested.keep]
    assert firing_rates(tmp_path / "eval", config.sae_id).tolist() == fires.float().mean(0).tolist()


@pytest.mark.parametrize("architecture", ["topk", "relu"])
def test_collected_firings_are_the_positive_latents_of_counted_tokens(harvested: Any, architecture: str):
    """What the collect stage reads: every latent of every counted token that is above zero, and nothing else."""
    from safesail.interpretation.collect import sparse_codes

    config = SaeConfig(
        d_in=D_IN,
        d_sae=D_SAE,
        k=40 if architecture == "topk" else None,
        architecture=architecture,
        hook_point="layers.0.mlp",
    )
    sae = made_sae(config, torch.zeros(D_SAE, D_IN), torch.zeros(D_IN))
    harvested.x["layers.0.mlp"][3:60, :20] = 0.0  # some tokens have 12 positive latents, so k 40 lists zeros too
    firings = sparse_codes(sae, harvested, recipe_of().tokens)
    x = harvested.x["layers.0.mlp"]
    latents = torch.cat([x, -x], dim=1).clamp(min=0) * harvested.keep[:, None]
    found = torch.zeros_like(latents)
    found[firings.rows.long(), firings.latents.long()] = firings.values
    assert torch.equal(found, latents)
    assert len(firings.values) == int((latents > 0).sum())
    assert bool((firings.latents.diff() >= 0).all())


def test_too_few_held_out_tokens_are_refused(harvested: Any, trained: Path, model: Any, tmp_path: Path):
    harvested.keep[:] = ~harvested.rows_held_out()
    with pytest.raises(InputError, match=r"raise corpus\.n_held_out_tokens"):
        measured(recipe_of(), harvested, trained, model, tmp_path / "eval")


# --- cross entropy and KL -----------------------------------------------------------------------------------------


def written_out(model: Any, harvested: Any, hook_point: str, sae: Sae | None) -> list[tuple[str, Tensor, Tensor]]:
    """(document, log-probabilities, targets) of the held-out pieces, each run alone: nothing packed or batched."""
    found = []
    for i, ids in enumerate(harvested.piece_ids):
        if not harvested.held_out[i] or sum(len(log_p) + 1 for _, log_p, _ in found) >= 150:
            continue
        keep = harvested.keep[int(harvested.row_start[i]) :][: len(ids)]

        def change(x: Tensor, keep: Tensor = keep) -> Tensor:
            return x if sae is None else torch.where(keep[:, None], sae(x), x)

        with torch.inference_mode(), replace(model, hook_point, change):
            logits = model(input_ids=torch.tensor([ids])).logits[0]
        found.append((harvested.documents[i], logits[:-1].double().log_softmax(1), torch.tensor(ids[1:])))
    return found


@pytest.mark.parametrize("hook_point", HOOK_POINTS)
@pytest.mark.parametrize("variant", [ZERO, BETWEEN])
def test_the_losses_equal_those_of_single_pieces(
    results: dict[str, Any], harvested: Any, trained: Path, model: Any, hook_point: str, variant: str
):
    from safesail.sae.model import read

    found = results[f"{hook_point}/{variant}"]
    clean = written_out(model, harvested, hook_point, None)
    spliced = written_out(model, harvested, hook_point, read(trained / f"{hook_point}/{variant}"))
    n = sum(len(targets) for _, _, targets in clean)
    ce = [sum(float(F.nll_loss(p, t, reduction="sum")) for _, p, t in side) / n for side in (clean, spliced)]
    kl: dict[str, float] = {}
    n_predicted: dict[str, int] = {}
    for (document, p, targets), (_, q, _) in zip(clean, spliced, strict=True):
        kl[document] = kl.get(document, 0) + float((p.exp() * (p - q)).sum())
        n_predicted[document] = n_predicted.get(document, 0) + len(targets)
    assert found["ce_clean"] == pytest.approx(ce[0], rel=1e-5)
    assert found["ce_spliced"] == pytest.approx(ce[1], rel=1e-5)
    assert found["ce_recovered"] == pytest.approx((found["ce_zeroed"] - ce[1]) / (found["ce_zeroed"] - ce[0]), abs=1e-3)
    assert len(kl) > 2
    expected = ratio_of_sums(torch.tensor(list(kl.values())), torch.tensor(list(n_predicted.values())))
    assert found["kl"] == pytest.approx(expected.value, rel=1e-3, abs=1e-6)
    assert found["intervals"]["kl"] == pytest.approx([expected.low, expected.high], rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("windows_per_batch", [1, 6, 50])
def test_the_batch_size_changes_neither_losses_nor_intervals(
    results: dict[str, Any], harvested: Any, trained: Path, model: Any, tmp_path: Path, windows_per_batch: int
):
    recipe = recipe_of(**{"runtime.windows_per_batch": str(windows_per_batch)})
    found = measured(recipe, harvested, trained, model, tmp_path / "other")
    for name, numbers in results.items():
        for metric in ("ce_recovered", "kl"):
            assert found[name][metric] == pytest.approx(numbers[metric], abs=1e-5)
            assert found[name]["intervals"][metric] == pytest.approx(numbers["intervals"][metric], abs=1e-5)


@pytest.fixture
def forwards(model: Any) -> Iterator[list[int]]:
    """One entry for every forward pass of the model."""
    calls: list[int] = []
    handle = model.register_forward_hook(lambda *_: calls.append(1))
    yield calls
    handle.remove()


def test_a_batch_is_run_once_unchanged_once_per_hook_point_and_once_per_sae(
    harvested: Any, trained: Path, model: Any, tmp_path: Path, forwards: list[int]
):
    measured(recipe_of(**{"runtime.windows_per_batch": "100"}), harvested, trained, model, tmp_path / "eval")
    assert len(forwards) == 1 + 2 + 2 * 4


@pytest.mark.parametrize("nth", [1, 4, 12, 15, 30])
def test_stopped_anywhere_it_goes_on_to_the_same_bytes(
    harvested: Any,
    trained: Path,
    model: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    forwards: list[int],
    nth: int,
):
    measured(recipe_of(), harvested, trained, model, tmp_path / "whole")
    n_whole, calls = len(forwards), 0

    def stopping(*args: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == nth:
            raise KeyboardInterrupt
        return cross_entropy(*args)

    monkeypatch.setattr(fidelity, "cross_entropy", stopping)
    with pytest.raises(KeyboardInterrupt):
        measured(recipe_of(), harvested, trained, model, tmp_path / "stopped")
    assert not (tmp_path / "stopped/fidelity.json").exists()
    forwards.clear()
    measured(recipe_of(), harvested, trained, model, tmp_path / "stopped")
    n_batches = (nth - 1) // 11
    assert len(forwards) == n_whole - 11 * n_batches  # whole batches are not run again
    files = [sorted(path for path in (tmp_path / name).rglob("*") if path.is_file()) for name in ("whole", "stopped")]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]
    assert len(files[0]) == 10  # fidelity, losses, and the statistics of eight SAEs


def test_stopped_in_the_statistics_it_does_not_read_finished_saes_again(
    harvested: Any, trained: Path, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    measured(recipe_of(), harvested, trained, model, tmp_path / "eval")
    before = (tmp_path / "eval/fidelity.json").read_bytes()
    (tmp_path / f"eval/layers.1.mlp/{ZERO}/statistics.safetensors").unlink()
    encoded: list[str] = []
    encode = Sae.encode_sparse
    monkeypatch.setattr(Sae, "encode_sparse", lambda sae, x: encoded.append(sae.config.sae_id) or encode(sae, x))
    measured(recipe_of(), harvested, trained, model, tmp_path / "eval")
    assert set(encoded) == {f"layers.1.mlp/{ZERO}"}
    assert (tmp_path / "eval/fidelity.json").read_bytes() == before


def test_other_batches_after_a_stop_count_every_window_once(
    harvested: Any, trained: Path, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """`runtime.windows_per_batch` may change between two calls: what is done is counted in windows, not in batches."""
    whole = measured(recipe_of(), harvested, trained, model, tmp_path / "whole")
    calls = iter(range(13))
    monkeypatch.setattr(fidelity, "cross_entropy", lambda *args: (next(calls), cross_entropy(*args))[1])
    with pytest.raises(StopIteration):
        measured(recipe_of(), harvested, trained, model, tmp_path / "stopped")
    monkeypatch.setattr(fidelity, "cross_entropy", cross_entropy)
    recipe = recipe_of(**{"runtime.windows_per_batch": "50"})
    found = measured(recipe, harvested, trained, model, tmp_path / "stopped")
    sums = [json.loads((tmp_path / name / "losses.json").read_text())["sums"] for name in ("whole", "stopped")]
    assert sums[0]["n_predicted"] == sums[1]["n_predicted"]
    assert {name: numbers["kl"] for name, numbers in found.items()} == pytest.approx(
        {name: numbers["kl"] for name, numbers in whole.items()}, abs=1e-5
    )


def test_losses_of_a_bfloat16_model_are_summed_in_full_precision(
    harvested: Any, trained: Path, tiny_model: Path, tmp_path: Path
):
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tiny_model, dtype=torch.bfloat16).eval()
    found = measured(recipe_of(), harvested, trained, model, tmp_path / "eval")[f"layers.0.mlp/{IDENTITY}"]
    assert found["kl"] == pytest.approx(0, abs=1e-6)
    assert found["ce_recovered"] == pytest.approx(1, abs=1e-6)
    with torch.inference_mode():
        log_p = fidelity._Batch(harvested.piece_ids[:4], [[0, 1], [2, 3]], "cpu").log_probabilities(model)
    assert log_p.dtype == torch.float32
    torch.testing.assert_close(log_p.exp().sum(1), torch.ones(len(log_p)), rtol=0, atol=1e-5)


def test_a_piece_that_the_harvest_had_to_skip_has_no_losses(harvested: Any, monkeypatch: pytest.MonkeyPatch):
    first = int(harvested.held_out.nonzero()[0])
    chosen = fidelity._held_out_pieces(harvested, 150)
    assert int(chosen[0]) == first
    norms = harvested.norms("layers.1.mlp")
    norms[harvested.row_start[first] + 2] = math.nan
    monkeypatch.setattr(harvested, "norms", lambda hook_point: norms)
    assert first not in fidelity._held_out_pieces(harvested, 150).tolist()


def test_losses_that_are_not_finite_stop_the_stage(harvested: Any, trained: Path, model: Any, tmp_path: Path):
    handle = model.lm_head.register_forward_hook(lambda _module, _inputs, output: output * math.nan)
    with pytest.raises(InputError, match=r"\(clean\) is not finite; the model computes in float32"):
        measured(recipe_of(), harvested, trained, model, tmp_path / "eval")
    handle.remove()


def test_a_reconstruction_that_is_not_finite_stops_the_stage_and_names_the_sae(
    harvested: Any, trained: Path, model: Any, tmp_path: Path
):
    config = next(c for c in variants(recipe_of(), harvested, "layers.1.mlp") if c.variant == ZERO)
    W_dec, b_dec = torch.zeros(D_SAE, D_IN), torch.zeros(D_IN)
    W_dec[0, 0], b_dec[0] = 3e38, -10.0  # the first latent is x_0 + 10, so the first dimension overflows
    made_sae(config, W_dec, b_dec).save(trained / config.sae_id)
    with pytest.raises(InputError, match=rf"layers\.1\.mlp/{ZERO} reconstructs values that are not finite"):
        measured(recipe_of(), harvested, trained, model, tmp_path / "eval")
