"""The sparse kernels against dense autograd, and one SAE in training against its own equations."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from safesail.errors import InputError
from safesail.lm.activations import Activations
from safesail.recipe import Recipe, TrainSection
from safesail.run import StageWork
from safesail.sae.config import SaeConfig
from safesail.sae.sparse import Codes, decode, encode_topk, rows_by_latent, topk
from safesail.training.step import SaeTrainer, generator
from safesail.training.trainer import batches, train_stage, variants

pytestmark = pytest.mark.usefixtures("one_thread")


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def dense_topk(pre: Tensor, k: int) -> Tensor:
    """The same latents as a full matrix, by sorting each row."""
    keep = pre >= pre.sort(dim=1, descending=True).values[:, k - 1 : k]
    return torch.where(keep, pre, 0).clamp(min=0)


# --- kernels ------------------------------------------------------------------------------------------------------


def test_topk_then_relu_by_hand():
    pre = torch.tensor([[3.0, -1.0, 2.0, 1.0], [-4.0, -2.0, 0.5, -3.0], [-1.0, -2.0, -3.0, -4.0]])
    dense = topk(pre, 2).dense(4)
    assert dense.tolist() == [[3, 0, 2, 0], [0, 0, 0.5, 0], [0, 0, 0, 0]]
    assert (dense > 0).sum(1).tolist() == [2, 1, 0]  # fewer than k where a negative one is among the largest


def test_topk_leaves_its_input_alone():
    pre = torch.tensor([[3.0, -1.0]])
    topk(pre, 2)
    assert pre.tolist() == [[3.0, -1.0]]


def test_of_equal_values_exactly_k_are_kept():
    assert (topk(torch.ones(1, 10), 5).dense(10) > 0).sum() == 5


@pytest.mark.parametrize("k", [1, 3, 16])
def test_topk_equals_sorting(k: int):
    pre = random(20, 16, seed=k)
    assert torch.equal(topk(pre, k).dense(16), dense_topk(pre, k))


@pytest.mark.parametrize("k", [1, 5])
def test_decode_equals_the_dense_product(k: int):
    codes, W_dec = topk(random(30, 40, dtype=torch.float64), k), random(40, 6, seed=1, dtype=torch.float64)
    torch.testing.assert_close(decode(codes, W_dec), codes.dense(40) @ W_dec, rtol=0, atol=1e-12)


def test_decode_by_hand():
    codes = Codes(torch.tensor([[2.0, 0.5], [1.0, 0.0]]), torch.tensor([[1, 0], [2, 0]]))
    W_dec = torch.tensor([[10.0, 0.0], [0.0, 1.0], [3.0, 4.0]])
    assert decode(codes, W_dec).tolist() == [[5, 2], [3, 4]]


def test_rows_by_latent_equals_index_add():
    indices = torch.randint(12, (40, 5), generator=torch.Generator().manual_seed(0))  # latents repeat within a token
    weights, rows = random(40, 5, dtype=torch.float64), random(40, 7, seed=1, dtype=torch.float64)
    expected = torch.zeros(12, 7, dtype=torch.float64)
    for n in range(40):
        for i in range(5):
            expected[indices[n, i]] += weights[n, i] * rows[n]
    torch.testing.assert_close(rows_by_latent(indices, weights, rows, 12), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-4)])
@pytest.mark.parametrize("k", [1, 4, 24])
def test_the_sparse_gradients_equal_dense_autograd(k: int, dtype: torch.dtype, tolerance: float):
    """With k = d_sae = 24 about half of the kept entries are negative, so the ReLU's part is tested as well."""
    x, target = random(50, 8, seed=9, dtype=dtype), random(50, 8, seed=8, dtype=dtype)

    def gradients(dense: bool) -> list[Tensor]:
        encoder, W_dec = random(24, 8, seed=1, dtype=dtype), random(24, 8, seed=2, dtype=dtype)
        b_enc, b_dec = random(24, seed=3, dtype=dtype), random(8, seed=4, dtype=dtype)
        leaves = [tensor.requires_grad_() for tensor in (encoder, b_enc, W_dec, b_dec)]
        if dense:
            x_hat = dense_topk((x - b_dec) @ encoder.T + b_enc, k) @ W_dec + b_dec
        else:
            x_hat = decode(encode_topk(x, encoder, b_enc, b_dec, k), W_dec) + b_dec
        return list(torch.autograd.grad((x_hat - target).square().sum() / 50, leaves))

    for sparse, dense in zip(gradients(dense=False), gradients(dense=True), strict=True):
        assert dense.abs().max() > 0.1
        torch.testing.assert_close(sparse, dense, rtol=0, atol=tolerance)


def test_a_latent_outside_the_top_k_gets_no_gradient():
    x, encoder = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]).requires_grad_()
    codes = encode_topk(x, encoder, torch.zeros(3), torch.zeros(2), 1)
    codes.values.sum().backward()
    assert encoder.grad.tolist() == [[1, 0], [0, 0], [0, 0]]


# --- one step -----------------------------------------------------------------------------------------------------


def section(**changes: object) -> TrainSection:
    settings = {"d_sae": 24, "k": [3], "batch_size": 32, "dead_after_tokens": 10**9, "aux_k": 8, "learning_rate": 1e-2}
    return TrainSection.model_validate(settings | changes)


def trainer_of(recipe_section: TrainSection, d_in: int = 8, k: int | None = None, n_steps: int = 40) -> SaeTrainer:
    config = SaeConfig(d_in=d_in, d_sae=recipe_section.d_sae, k=k or recipe_section.k[0], hook_point="layers.0.mlp")
    return SaeTrainer(config, recipe_section, random(d_in, seed=5) * 0.1, seed=0, n_steps=n_steps)


def gradients_of_first_step(trainer: SaeTrainer) -> dict[str, Tensor]:
    """What the optimizer was given in its first step: its first moment starts at 0.1 of it."""
    return {name: trainer.optimizer.state[value]["exp_avg"] / 0.1 for name, value in trainer.parameters().items()}


def with_dead(trainer: SaeTrainer, dead: slice) -> SaeTrainer:
    """Make some latents dead: silent for long, and too weak to be among the k strongest."""
    trainer.silent_for[dead] = 10**9 + 1
    with torch.no_grad():
        trainer.encoder[dead] *= 0.01
    return trainer


@pytest.mark.parametrize("n_dead", [0, 6, 14])
def test_a_step_follows_the_gradient_of_the_documented_loss(n_dead: int):
    """Dense autograd over ‖x − x̂‖² / ‖x − mean‖² + c · ‖e − ê‖² / ‖e‖², ê from the aux_k strongest dead latents."""
    trainer = with_dead(trainer_of(section(aux_coefficient=0.5)), slice(0, n_dead))
    leaves = {name: value.detach().clone().requires_grad_() for name, value in trainer.parameters().items()}
    encoder, b_enc, W_dec, b_dec = leaves.values()
    x = random(32, 8, seed=7)

    pre = (x - b_dec) @ encoder.T + b_enc
    x_hat = dense_topk(pre, 3) @ W_dec + b_dec
    loss = (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()
    if n_dead:
        e = (x - x_hat).detach()
        pre_dead = ((x - b_dec.detach()) @ encoder.T + b_enc)[:, :n_dead]
        e_hat = dense_topk(pre_dead, min(8, n_dead)) @ W_dec[:n_dead]
        loss = loss + 0.5 * (e - e_hat).square().sum() / e.square().sum()
    loss.backward()
    with torch.no_grad():
        W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec
    torch.nn.utils.clip_grad_norm_(list(leaves.values()), 1.0)

    facts = trainer.step(x)
    assert facts.n_dead == n_dead
    for name, gradient in gradients_of_first_step(trainer).items():
        torch.testing.assert_close(gradient, leaves[name].grad, rtol=0, atol=1e-5)


def test_dead_latents_get_a_gradient_in_the_encoder_as_well():
    trainer = with_dead(trainer_of(section()), slice(0, 6))
    trainer.step(random(32, 8))
    gradients = gradients_of_first_step(trainer)
    assert (gradients["encoder"][:6].norm(dim=1) > 0).all()
    assert (gradients["W_dec"][:6].norm(dim=1) > 0).all()
    assert (gradients["b_enc"][:6] != 0).all()


def test_without_the_auxiliary_loss_dead_latents_get_none():
    trainer = with_dead(trainer_of(section(aux_coefficient=0)), slice(0, 6))
    trainer.step(random(32, 8))
    assert gradients_of_first_step(trainer)["encoder"][:6].abs().max() == 0


def test_decoder_rows_keep_unit_norm_and_their_gradient_has_no_parallel_part():
    trainer = trainer_of(section())
    before = trainer.W_dec.detach().clone()
    trainer.step(random(32, 8))
    gradient = gradients_of_first_step(trainer)["W_dec"]
    assert gradient.norm() > 0.01
    assert (gradient * before).sum(1).abs().max() < 1e-6
    for i in range(10):
        trainer.step(random(32, 8, seed=i))
    assert not torch.allclose(trainer.W_dec, before, atol=1e-2)
    torch.testing.assert_close(trainer.W_dec.norm(dim=1), torch.ones(24), rtol=0, atol=1e-6)


def test_silence_is_counted_in_tokens_and_reset_by_firing():
    trainer = trainer_of(section(d_sae=4, k=[1]), d_in=2)
    with torch.no_grad():
        trainer.encoder.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -0.001]]))
        trainer.b_dec.zero_()
    trainer.section = section(d_sae=4, k=[1], learning_rate=1e-9)
    for x in ([[5.0, 0.0], [4.0, 1.0]], [[0.0, 3.0], [5.0, 0.0], [5.0, 1.0]]):
        trainer.step(torch.tensor(x))
    assert trainer.silent_for.tolist() == [0, 0, 5, 5]


def test_a_kept_entry_that_the_relu_zeroes_has_not_fired():
    trainer = trainer_of(section(d_sae=2, k=[2]), d_in=2)
    with torch.no_grad():
        trainer.encoder.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        trainer.b_dec.zero_()
    trainer.step(torch.tensor([[5.0, 0.0], [4.0, 1.0]]))
    assert trainer.silent_for.tolist() == [0, 2]


def test_the_schedule_warms_up_stays_and_decays_by_hand():
    trainer = trainer_of(section(warmup=0.2, decay=0.4), n_steps=10)
    factors = []
    for _ in range(10):
        factors.append(trainer.schedule())
        trainer.n_done += 1
    assert factors == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])


def n_dead_of(coefficient: float, n_steps: int = 100) -> list[int]:
    """The number of dead latents in every step; most latents start too weak to win any comparison."""
    directions = torch.linalg.qr(random(16, 16, seed=1)).Q
    settings = section(d_sae=32, k=[2], batch_size=64, dead_after_tokens=640, aux_coefficient=coefficient)
    trainer = trainer_of(settings, d_in=16, n_steps=n_steps)
    with torch.no_grad():
        trainer.b_dec.zero_()
        trainer.encoder[8:] *= 0.05
    chance, n_dead = torch.Generator().manual_seed(0), []
    for _ in range(n_steps):
        weights = torch.rand(64, 16, generator=chance) * (torch.rand(64, 16, generator=chance) < 0.15)
        n_dead.append(trainer.step(weights @ directions * 4).n_dead)
    return n_dead


def test_dead_latents_come_back():
    revived, left_alone = n_dead_of(coefficient=1.0), n_dead_of(coefficient=0.0)
    assert max(revived) == max(left_alone) == 22
    assert min(revived[50:]) <= 3
    assert min(left_alone[50:]) >= 9


# --- the finished SAE ---------------------------------------------------------------------------------------------


def test_the_finished_sae_on_raw_activations_equals_the_trained_one_on_scaled_ones():
    trainer, scale, raw = trainer_of(section()), 3.7, random(40, 8, seed=2)
    for i in range(5):
        trainer.step(random(32, 8, seed=i) * scale)
    latents = dense_topk((raw * scale - trainer.b_dec) @ trainer.encoder.T + trainer.b_enc, 3).detach()
    x_hat = (latents @ trainer.W_dec + trainer.b_dec).detach()
    sae = trainer.finish(scale)
    assert (latents > 0).any()
    torch.testing.assert_close(sae.encode(raw), latents / scale, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae(raw), x_hat / scale, rtol=1e-4, atol=1e-5)


def test_the_finished_sae_does_not_change_when_training_goes_on():
    trainer = trainer_of(section())
    trainer.step(random(32, 8))
    sae = trainer.finish(2.0)
    before = {name: value.clone() for name, value in sae.named_parameters()}
    trainer.step(random(32, 8, seed=1))
    assert all(torch.equal(value, before[name]) for name, value in sae.named_parameters())


@pytest.mark.parametrize("k", [2, 3, 12])
def test_the_finished_sae_forward_is_decode_of_encode_for_any_leading_dimensions(k: int):
    sae = trainer_of(section(), k=k).finish(1.0)
    x = random(2, 5, 3, 8)
    latents = sae.encode(x)
    assert latents.shape == (2, 5, 3, 24)
    assert int((latents > 0).sum(-1).max()) <= k
    torch.testing.assert_close(sae(x), sae.decode(latents), rtol=0, atol=1e-6)
    torch.testing.assert_close(latents[1, 4, 2], sae.encode(x[1, 4, 2]), rtol=0, atol=1e-6)


# --- state and sweep ----------------------------------------------------------------------------------------------


def test_going_on_from_a_state_is_bit_identical():
    straight, first, second = (with_dead(trainer_of(section(aux_coefficient=0.5)), slice(0, 4)) for _ in range(3))
    with torch.no_grad():
        for trainer in (straight, first):
            trainer.W_dec[0] *= -1  # so that `second` could not be right by its own start
    xs = [random(32, 8, seed=i) for i in range(20)]
    n_dead = [straight.step(x).n_dead for x in xs]
    for x in xs[:9]:
        first.step(x)
    second.load_state({name: value.clone() for name, value in first.state().items()})
    for x in xs[9:]:
        second.step(x)
    assert straight.state().keys() == second.state().keys()
    assert all(torch.equal(value, second.state()[name]) for name, value in straight.state().items())
    assert n_dead[0] == 4  # the auxiliary loss was part of it


@pytest.fixture(scope="module")
def harvest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 pieces of 20 tokens at two hook points; every tenth piece is held out, every 50th token special."""
    folder, n = tmp_path_factory.mktemp("harvest"), 1200
    hook_points = {"layers.0.mlp": 8, "layers.1.mlp": 6}
    tensors = {"token_ids": torch.arange(n).int() % 50 + 5}
    for seed, (name, d_in) in enumerate(hook_points.items()):
        x = random(n, d_in, seed=seed) @ random(d_in, d_in, seed=seed + 10) + 1
        tensors[name], tensors[f"{name}:norm"] = x.half(), x.norm(dim=1)
    for number, rows in enumerate((slice(0, 700), slice(700, n))):
        part = {name: value[rows].contiguous() for name, value in tensors.items()}
        save_file(part, folder / f"shard-{number:05d}.safetensors")
    pieces = {
        "document": [f"d{i}" for i in range(60)],
        "source": ["made"] * 60,
        "held_out": [i % 10 == 0 for i in range(60)],
        "half": ["explain"] * 60,
        "row_start": [20 * i for i in range(60)],
        "ids": tensors["token_ids"].reshape(60, 20).tolist(),
    }
    pq.write_table(pa.table(pieces), folder / "pieces.parquet")
    facts = {
        "hook_points": list(hook_points),
        "d_in": hook_points,
        "median_norm": {name: float(tensors[f"{name}:norm"].median()) for name in hook_points},
        "special_ids": [5],
        "rows_per_shard": [700, 500],
        "n_tokens": n,
        "n_pieces": 60,
        "window": 128,
    }
    (folder / "harvest.json").write_text(json.dumps(facts))
    return folder


def recipe_of(**train: object) -> Recipe:
    return Recipe.parse(
        {
            "name": "made",
            "model": {"path": "none"},
            "corpus": {"n_tokens": 1200, "n_held_out_tokens": 120, "sources": [{"path": "none.jsonl"}]},
            "harvest": {"hook_points": ["layers.0.mlp", "layers.1.mlp"]},
            "train": {"d_sae": 24, "k": [2, 3, 4], "epochs": 2, "batch_size": 100, "dead_after_tokens": 300} | train,
            "explain": {"encoder": "none"},
            "runtime": {"checkpoint_seconds": 0},
        }
    )


def weights_of(recipe: Recipe, harvest: Path, folder: Path) -> dict[str, bytes]:
    """{sae_id: its weight file} after the train stage."""
    folder.mkdir(exist_ok=True)
    activations = Activations(harvest)
    train_stage(recipe, activations, StageWork(folder))
    configs = [config for name in activations.hook_points for config in variants(recipe, activations, name)]
    return {c.sae_id: (folder / c.sae_id / "sae_weights.safetensors").read_bytes() for c in configs}


@pytest.fixture(scope="module")
def sweep(harvest: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    torch.set_num_threads(1)
    return weights_of(recipe_of(), harvest, tmp_path_factory.mktemp("sweep"))


@pytest.mark.parametrize("k", [2, 3, 4])
def test_the_sweep_trains_every_sae_as_if_it_were_alone(sweep, harvest: Path, tmp_path: Path, k: int):
    alone = weights_of(recipe_of(k=[k]), harvest, tmp_path)
    assert len(alone) == 2
    assert all(sweep[sae_id] == weights for sae_id, weights in alone.items())


def test_the_saes_of_a_sweep_differ(sweep: dict[str, bytes]):
    assert len(set(sweep.values())) == len(sweep) == 6


class PowerCut(Exception):
    """What ends a stage from outside."""


class Interrupted(Activations):
    """A harvest whose rows can be read a few times only."""

    def __init__(self, folder: Path, n_reads: int) -> None:
        super().__init__(folder)
        self.n_reads = n_reads

    def rows(self, hook_point: str, indices: Tensor) -> Tensor:
        self.n_reads -= 1
        if self.n_reads < 0:
            raise PowerCut
        return super().rows(hook_point, indices)


@pytest.mark.parametrize("n_reads", [1, 7, 12, 22, 24, 40])
def test_an_interrupted_sweep_goes_on_to_the_same_bytes(sweep, harvest: Path, tmp_path: Path, n_reads: int):
    """1,062 rows give 10 batches an epoch, so a hook point reads once for the mean and 20 times for its steps."""
    with pytest.raises(PowerCut):
        train_stage(recipe_of(), Interrupted(harvest, n_reads), StageWork(tmp_path))
    resumed = Interrupted(harvest, 42)
    train_stage(recipe_of(), resumed, StageWork(tmp_path))
    steps_redone = 42 - resumed.n_reads
    assert steps_redone <= 42 - n_reads + 2  # the means are read again, the steps are not taken again
    assert all((tmp_path / i / "sae_weights.safetensors").read_bytes() == weights for i, weights in sweep.items())
    assert not (tmp_path / "checkpoint.safetensors").exists()


def test_held_out_and_special_rows_are_never_trained_on(harvest: Path, tmp_path: Path):
    seen: list[Tensor] = []

    class Watched(Activations):
        def rows(self, hook_point: str, indices: Tensor) -> Tensor:
            seen.append(indices)
            return super().rows(hook_point, indices)

    train_stage(recipe_of(k=[2], epochs=1), Watched(harvest), StageWork(tmp_path))
    rows = torch.cat(seen).unique()
    assert not (rows // 20 % 10 == 0).any()  # the held-out pieces
    assert not (rows % 50 == 0).any()  # the special tokens
    assert len(rows) == 1200 - 120 - 24 + 6


def test_every_epoch_visits_the_rows_in_an_order_of_its_own():
    rows = torch.arange(1000, 1023)
    steps = list(batches(rows, recipe_of(batch_size=10, epochs=3), "layers.0.mlp", 0))
    assert [len(step) for step in steps] == [10] * 6  # two whole batches of 23 rows, thrice
    epochs = [torch.cat(steps[i : i + 2]) for i in (0, 2, 4)]
    assert all(len(epoch.unique()) == 20 for epoch in epochs)
    assert all(torch.isin(epoch, rows).all() for epoch in epochs)
    assert not torch.equal(epochs[0], epochs[1])
    for start in range(7):
        resumed = list(batches(rows, recipe_of(batch_size=10, epochs=3), "layers.0.mlp", start))
        assert all(torch.equal(a, b) for a, b in zip(resumed, steps[start:], strict=True))


def test_a_generator_depends_on_seed_and_purpose_alone():
    draw = torch.rand(3, generator=generator(0, "epoch", 1))
    torch.rand(5)
    assert torch.equal(torch.rand(3, generator=generator(0, "epoch", 1)), draw)
    others = [generator(1, "epoch", 1), generator(0, "epoch", 2), generator(0, "mean", 1)]
    assert not any(torch.equal(torch.rand(3, generator=other), draw) for other in others)


def test_too_few_tokens_for_a_batch_name_both_numbers(harvest: Path, tmp_path: Path):
    with pytest.raises(InputError, match=r"1,062 training tokens at layers\.0\.mlp .* batch of 5,000"):
        train_stage(recipe_of(batch_size=5000), Activations(harvest), StageWork(tmp_path))


def test_a_loss_that_is_not_finite_stops_with_the_sae_named(harvest: Path, tmp_path: Path):
    class Broken(Activations):
        def rows(self, hook_point: str, indices: Tensor) -> Tensor:
            return super().rows(hook_point, indices) * (float("nan") if len(indices) == 100 else 1)

    with pytest.raises(InputError, match=r"loss of layers\.0\.mlp/topk-k2-w24 is nan at step 1"):
        train_stage(recipe_of(), Broken(harvest), StageWork(tmp_path))


def test_the_sweep_lowers_the_loss_it_logs(harvest: Path, tmp_path: Path):
    train_stage(recipe_of(epochs=12, learning_rate=1e-2), Activations(harvest), StageWork(tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    mine = [line["fvu"] for line in lines if line["sae"] == "layers.0.mlp/topk-k4-w24"]
    assert len(mine) == 3  # steps 50, 100 and the last, 120
    assert mine[-1] < mine[0] < 1


def test_the_trained_weights_are_named_shaped_and_typed_as_saelens_expects(harvest: Path, tmp_path: Path):
    train_stage(recipe_of(k=[2]), Activations(harvest), StageWork(tmp_path))
    weights = load_file(tmp_path / "layers.0.mlp/topk-k2-w24/sae_weights.safetensors")
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    assert shapes == {"W_enc": (8, 24), "b_enc": (24,), "W_dec": (24, 8), "b_dec": (8,)}
    assert all(value.dtype == torch.float32 for value in weights.values())
