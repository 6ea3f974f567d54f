"""One SAE in training, of every architecture, against its own equations written out densely."""

import math
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from safesail.recipe import Architecture, TrainSection
from safesail.sae import kernels
from safesail.sae.config import SaeConfig
from safesail.training import step
from safesail.training.step import Diverged, SaeTrainer, StepFacts, generator, total_variance

pytestmark = pytest.mark.usefixtures("one_thread")

ARCHITECTURES: tuple[Architecture, ...] = get_args(Architecture)
every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)
by_batch = pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka"])
NEVER = 10**9


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def trainer_of(architecture: Architecture = "topk", d_in: int = 8, n_steps: int = 40, **changes: object) -> SaeTrainer:
    settings = {"d_sae": 24, "k": [3], "l1": [2.0], "l0": [0.5], "dead_after_tokens": NEVER, "aux_k": 8}
    section = TrainSection.model_validate(
        settings | {"architectures": [architecture], "batch_size": 32, "learning_rate": 1e-2} | changes
    )
    (level,) = section.levels(architecture)
    penalised = architecture in ("relu", "jumprelu")
    config = SaeConfig(
        d_in=d_in,
        d_sae=section.d_sae,
        hook_point="layers.0.mlp",
        architecture=architecture,
        k=None if penalised else int(level),
        coefficient=level if penalised else None,
    )
    return SaeTrainer(config, section, random(d_in, seed=5) * 0.1, seed=0, n_steps=n_steps)


def gradients_of_first_step(trainer: SaeTrainer) -> dict[str, Tensor]:
    """What the optimizer was given in its first step: its first moment starts at 0.1 of it."""
    return {name: trainer.optimizer.state[value]["exp_avg"] / 0.1 for name, value in trainer.parameters().items()}


def largest_changes(trainer: SaeTrainer, before: dict[str, Tensor]) -> dict[str, float]:
    return {name: float((value.detach() - before[name]).abs().max()) for name, value in trainer.parameters().items()}


def with_dead(trainer: SaeTrainer, n_dead: int) -> SaeTrainer:
    """Make the first latents dead: silent for long, and too weak to be active."""
    trainer.silent_for[:n_dead] = NEVER + 1
    with torch.no_grad():
        trainer.encoder[:n_dead] *= 0.01
    return trainer


# --- the loss, densely --------------------------------------------------------------------------------------------


def kept(pre: Tensor, k: int) -> Tensor:
    """The k largest of each row, the others 0."""
    return torch.where(pre >= pre.sort(dim=1, descending=True).values[:, k - 1 : k], pre, 0)


def latents_and_penalty(trainer: SaeTrainer, pre: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """z of every token, and the sparsity term of the first step of `trainer`, whose warm-up takes 10 steps."""
    n_tokens, d_in, nothing = len(pre), trainer.config.d_in, torch.zeros(())
    match trainer.config.architecture:
        case "topk":
            return kept(pre, 3).relu(), nothing
        case "batchtopk" | "matryoshka":
            lowest = pre.detach().flatten().sort(descending=True).values[3 * n_tokens - 1]
            return torch.where(pre >= lowest, pre, 0).relu(), nothing
        case "relu":
            return pre.relu(), 2.0 * 0.1 * pre.relu().sum(1).mean() / math.sqrt(d_in)
        case "jumprelu":
            epsilon = trainer.section.bandwidth
            step = (pre > threshold).float()
            # linear in θ with slope 1/ε in the window, so that autograd gives the straight-through gradients
            moved = ((pre - threshold).abs() < epsilon / 2) / epsilon * (threshold - threshold.detach())
            return pre * step - threshold.detach() * moved, 0.5 * 0.1 * (step - moved).sum(1).mean()


def reconstruction_loss(trainer: SaeTrainer, x: Tensor, z: Tensor, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """The share of variance left; of matryoshka the mean over its dictionaries of 1, 3, 6, 12 and 24 latents."""
    widths = (1, 3, 6, 12, 24) if trainer.config.architecture == "matryoshka" else (24,)
    squared = [(x - (z[:, :m] @ W_dec[:m] + b_dec)).square().sum() for m in widths]
    return sum(squared, torch.zeros(())) / len(widths) / (x - x.mean(0)).square().sum()


def auxiliary_loss(x: Tensor, error: Tensor, n_dead: int, leaves: dict[str, Tensor]) -> Tensor:
    """‖e − ê‖² / ‖e‖² on every eighth token, from the 8 strongest of the first n_dead latents."""
    x, error = x[::8], error.detach()[::8]
    pre = (x - leaves["b_dec"].detach()) @ leaves["encoder"][:n_dead].T + leaves["b_enc"][:n_dead]
    chosen = kept(pre, min(8, n_dead))
    z = chosen + (chosen.relu() - chosen).detach()  # a latent below zero is 0 and gets its gradient all the same
    return (error - z @ leaves["W_dec"][:n_dead]).square().sum() / error.square().sum()


def dense_gradients(trainer: SaeTrainer, x: Tensor, n_dead: int) -> dict[str, Tensor]:
    """The gradients of the documented loss, before clipping."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in trainer.parameters().items()}
    encoder, b_enc, W_dec, b_dec = (leaves[name] for name in ("encoder", "b_enc", "W_dec", "b_dec"))
    z, penalty = latents_and_penalty(trainer, (x - b_dec) @ encoder.T + b_enc, leaves.get("threshold", torch.zeros(())))
    loss = reconstruction_loss(trainer, x, z, W_dec, b_dec) + penalty
    if n_dead:
        loss = loss + 0.5 * auxiliary_loss(x, x - (z @ W_dec + b_dec), n_dead, leaves)
    loss.backward()
    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    along = (gradients["W_dec"] * W_dec.detach()).sum(1, keepdim=True)
    return gradients | {"W_dec": gradients["W_dec"] - along * W_dec.detach()}


def norm_of(gradients: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients.values()))


@every_architecture
@pytest.mark.parametrize("n_dead", [0, 6, 14])
def test_a_step_follows_the_gradient_of_the_documented_loss(architecture: Architecture, n_dead: int):
    trainer, x = with_dead(trainer_of(architecture, aux_coefficient=0.5), n_dead), random(32, 8, seed=7) * 1.3
    expected = dense_gradients(trainer, x, n_dead)
    clipped = min(1 / norm_of(expected), 1.0)
    facts = trainer.step(x)
    assert facts.n_dead == n_dead
    assert (facts.auxiliary > 0) == (n_dead > 0)
    for name, gradient in gradients_of_first_step(trainer).items():
        assert gradient.abs().max() > 1e-3
        torch.testing.assert_close(gradient, clipped * expected[name], rtol=0, atol=2e-6)


@every_architecture
def test_a_batch_taken_in_chunks_is_the_same_batch(architecture: Architecture, monkeypatch: pytest.MonkeyPatch):
    gradients, x = [], random(32, 8, seed=7) * 1.3
    for chunk in (32, 24, 8):
        monkeypatch.setattr(step, "_CHUNK", chunk)
        trainer = with_dead(trainer_of(architecture, aux_coefficient=0.5), 6)
        facts = trainer.step(x)
        gradients.append(gradients_of_first_step(trainer) | {"facts": torch.tensor(facts)})
    for chunked in gradients[1:]:
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(chunked[name], gradient, rtol=0, atol=1e-6)


def test_chunks_keep_every_eighth_token():
    assert step._CHUNK % SaeTrainer.AUX_STRIDE == 0


@every_architecture
def test_a_step_states_the_loss_it_saw(architecture: Architecture):
    trainer, x = trainer_of(architecture), random(32, 8, seed=7) * 1.3
    pre = (x - trainer.b_dec) @ trainer.encoder.T + trainer.b_enc
    z = latents_and_penalty(trainer, pre, trainer.threshold)[0].detach()
    left = (x - (z @ trainer.W_dec + trainer.b_dec)).square().sum() / (x - x.mean(0)).square().sum()
    left = left.detach()
    facts = trainer.step(x)
    assert facts.fvu == pytest.approx(float(left), rel=1e-5)
    assert facts.l0 == pytest.approx(float((z > 0).sum(1).float().mean()))
    assert facts.auxiliary == facts.n_dead == 0


def test_the_total_variance_is_known_or_computed():
    x = random(32, 8, seed=7)
    one, other = trainer_of(), trainer_of()
    assert one.step(x) == other.step(x, total_variance(x))
    assert trainer_of().step(x, 2 * total_variance(x)).fvu == pytest.approx(one.step(x).fvu, rel=1)
    assert trainer_of().step(x, 2 * total_variance(x)).fvu == pytest.approx(trainer_of().step(x).fvu / 2, rel=1e-5)


def test_the_total_variance_by_hand():
    assert float(total_variance(torch.tensor([[1.0, 0.0], [3.0, 0.0], [5.0, 6.0]]))) == pytest.approx(8 + 24)


def test_the_total_variance_of_a_real_batch_is_exact():
    """Summed one by one in fp32, two million squares would lose up to a thousandth."""
    x = random(4096, 576) + 3
    expected = float((x.double() - x.double().mean(0)).square().sum())
    assert float(total_variance(x)) == pytest.approx(expected, rel=3e-6)


@every_architecture
def test_gradients_are_clipped_at_norm_1(architecture: Architecture):
    """The larger the total variance is said to be, the smaller the gradient."""
    x, norms = random(32, 8, seed=7), []
    for factor in (0.01, 100, 200):
        trainer = trainer_of(architecture, sparsity_warmup=1, n_steps=10**9)
        trainer.step(x, total_variance(x) * factor)
        norms.append(norm_of(gradients_of_first_step(trainer)))
    assert norms[0] == pytest.approx(1, abs=1e-5)
    assert 1e-3 < norms[1] < 0.5
    assert norms[2] == pytest.approx(norms[1] / 2, rel=1e-4)


@every_architecture
def test_decoder_rows_keep_unit_norm_and_their_gradient_has_no_parallel_part(architecture: Architecture):
    trainer = trainer_of(architecture)
    before = trainer.W_dec.detach().clone()
    trainer.step(random(32, 8))
    gradient = gradients_of_first_step(trainer)["W_dec"]
    assert gradient.norm() > 0.01
    assert (gradient * before).sum(1).abs().max() < 1e-6
    for i in range(10):
        trainer.step(random(32, 8, seed=i))
    assert not torch.allclose(trainer.W_dec, before, atol=1e-2)
    torch.testing.assert_close(trainer.W_dec.norm(dim=1), torch.ones(24), rtol=0, atol=1e-6)


@every_architecture
def test_a_batch_in_which_nothing_is_active_moves_b_dec_alone(architecture: Architecture):
    trainer = trainer_of(architecture)
    with torch.no_grad():
        trainer.b_enc.fill_(-100.0)
    before = {name: value.detach().clone() for name, value in trainer.parameters().items()}
    facts = trainer.step(random(32, 8))
    assert facts.l0 == 0
    moved = largest_changes(trainer, before)
    assert moved.pop("b_dec") > 1e-3
    assert max(moved.values()) < 1e-6


def test_the_schedule_warms_up_stays_and_decays_by_hand():
    trainer, factors = trainer_of(warmup=0.2, decay=0.4, n_steps=10), []
    for _ in range(10):
        factors.append(trainer.schedule())
        trainer.n_done += 1
    assert factors == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25])


def test_the_optimizer_uses_the_schedule_and_moves_thresholds_ten_times_as_fast():
    """Adam's first step moves everything by its learning rate: 0.01 in step 1 of a warm-up of 2."""
    trainer = trainer_of("jumprelu", warmup=0.05)
    before = {name: value.detach().clone() for name, value in trainer.parameters().items()}
    trainer.step(random(32, 8))
    moved = largest_changes(trainer, before)
    assert moved["b_dec"] == moved["encoder"] == pytest.approx(0.005, rel=1e-3)
    assert moved["threshold"] == pytest.approx(0.05, rel=1e-3)


@pytest.mark.parametrize(("architecture", "level", "name"), [("relu", "l1", "b_enc"), ("jumprelu", "l0", "threshold")])
def test_the_sparsity_term_warms_up(architecture: Architecture, level: str, name: str):
    """A coefficient of 1 in the first of 10 steps of warm-up, and 0.1 without any, give the same gradients."""
    gradients, start = [], trainer_of(architecture).W_dec.detach()
    for coefficient, warmup in ((1.0, 0.25), (0.1, 0.0), (1.0, 0.0)):
        trainer = trainer_of(architecture, **{level: [coefficient], "sparsity_warmup": warmup})
        with torch.no_grad():
            trainer.W_dec.copy_(start)
            trainer.encoder.copy_(start)
        trainer.step(random(32, 8), torch.tensor(1e8))
        gradients.append(gradients_of_first_step(trainer)[name])
    warm, tenth, full = gradients
    assert tenth.abs().max() > 1e-3
    torch.testing.assert_close(warm, tenth, rtol=0, atol=1e-7)
    torch.testing.assert_close(full, 10 * tenth, rtol=1e-3, atol=1e-5)  # the reconstruction's part is next to nothing


# --- dead latents -------------------------------------------------------------------------------------------------


@every_architecture
def test_dead_latents_get_a_gradient_in_the_encoder_as_well(architecture: Architecture):
    """In some implementations AuxK trains the decoder alone, and what cannot fire stays dead."""
    trainer = with_dead(trainer_of(architecture, aux_coefficient=0.5), 6)
    with torch.no_grad():
        trainer.b_enc[:6] = torch.tensor([0.1, 0.1, 0.1, -1.0, -1.0, -1.0])  # some are below zero for every token
    trainer.step(random(32, 8))
    gradients = gradients_of_first_step(trainer)
    assert (gradients["encoder"][:6].norm(dim=1) > 1e-6).all()
    assert (gradients["W_dec"][:3].norm(dim=1) > 1e-6).all()
    assert (gradients["b_enc"][:6] != 0).all()


@every_architecture
def test_without_the_auxiliary_loss_dead_latents_get_none(architecture: Architecture):
    trainer = with_dead(trainer_of(architecture, aux_coefficient=0), 6)
    trainer.step(random(32, 8))
    assert gradients_of_first_step(trainer)["encoder"][:6].abs().max() == 0


@every_architecture
def test_the_auxiliary_loss_moves_dead_latents_alone(architecture: Architecture):
    """e is held fixed, so that what is alive, and b_dec, get the same gradient with and without it."""
    on, off = (with_dead(trainer_of(architecture, aux_coefficient=c), 6) for c in (1e-3, 0.0))
    x = random(32, 8)
    for trainer in (on, off):
        trainer.step(x, total_variance(x) * 50)  # small enough gradients not to be clipped
    mine, other = gradients_of_first_step(on), gradients_of_first_step(off)
    assert norm_of(mine) < 0.9
    assert torch.equal(mine["b_dec"], other["b_dec"])
    assert all(torch.equal(mine[name][6:], other[name][6:]) for name in ("encoder", "b_enc", "W_dec"))
    assert all(not torch.equal(mine[name][:6], other[name][:6]) for name in ("encoder", "b_enc"))


def test_silence_is_counted_in_tokens_and_reset_by_firing():
    trainer = trainer_of(d_sae=4, k=[1], d_in=2, learning_rate=1e-9)
    with torch.no_grad():
        trainer.encoder.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -0.001]]))
        trainer.b_dec.zero_()
    for x in ([[5.0, 0.0], [4.0, 1.0]], [[0.0, 3.0], [5.0, 0.0], [5.0, 1.0]]):
        trainer.step(torch.tensor(x))
    assert trainer.silent_for.tolist() == [0, 0, 5, 5]


@every_architecture
def test_a_latent_that_is_chosen_but_zero_has_not_fired(architecture: Architecture):
    """Latent 1 is chosen by topk, and lies in the window of jumprelu, below its threshold of 2."""
    trainer = trainer_of(architecture, d_sae=2, k=[2], d_in=2, learning_rate=1e-9)
    with torch.no_grad():
        trainer.encoder.copy_(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
        trainer.b_enc.copy_(torch.tensor([0.0, 5.5 if architecture == "jumprelu" else 0.0]))
        trainer.b_dec.zero_()
    trainer.step(torch.tensor([[5.0, 0.0], [4.0, 1.0]]))
    assert trainer.silent_for.tolist() == [0, 2]


def sparse_batch(chance: torch.Generator, n: int = 64) -> Tensor:
    """Sums of a few of 16 orthogonal directions. (n, 16)."""
    directions = torch.linalg.qr(random(16, 16, seed=1)).Q
    return torch.rand(n, 16, generator=chance) * (torch.rand(n, 16, generator=chance) < 0.15) @ directions * 6


def n_dead_of(architecture: Architecture, coefficient: float) -> list[int]:
    """The number of dead latents in each of 100 steps; 24 of 32 latents start too weak to fire."""
    settings = {"d_sae": 32, "k": [2], "l1": [0.05], "l0": [0.002], "batch_size": 64, "dead_after_tokens": 640}
    trainer = trainer_of(architecture, d_in=16, n_steps=100, aux_coefficient=coefficient, **settings)
    with torch.no_grad():
        trainer.b_dec.zero_()
        trainer.encoder[8:] *= 0.05
    chance = torch.Generator().manual_seed(0)
    return [trainer.step(sparse_batch(chance)).n_dead for _ in range(100)]


@every_architecture
def test_dead_latents_come_back(architecture: Architecture):
    revived, left_alone = n_dead_of(architecture, 1.0), n_dead_of(architecture, 0.0)
    assert max(revived) == max(left_alone) >= 22
    assert min(revived[40:]) <= 3
    assert min(left_alone[40:]) >= 15


# --- sparsity -----------------------------------------------------------------------------------------------------


@by_batch
def test_a_batch_has_k_active_latents_per_token_on_average(architecture: Architecture):
    trainer, chance = trainer_of(architecture, d_in=16, d_sae=64, k=[5], n_steps=60), torch.Generator().manual_seed(0)
    assert [trainer.step(sparse_batch(chance)).l0 for _ in range(60)] == [5] * 60


@by_batch
def test_the_threshold_for_inference_is_the_running_mean_by_hand(architecture: Architecture):
    """Weights 0.02 · 0.98ⁱ of the i-th last batch, divided by their sum; smallest chosen values 4, 2 and −1 (as 0)."""
    trainer = trainer_of(architecture, d_sae=2, k=[1], d_in=2, learning_rate=1e-9)
    with torch.no_grad():
        trainer.encoder.copy_(torch.eye(2))
        trainer.b_dec.zero_()
    for x in ([[4.0, 1.0], [5.0, 0.0]], [[2.0, 0.5], [3.0, 1.0]], [[-1.0, -2.0], [-0.5, -1.5]]):
        trainer.step(torch.tensor(x))
    weights = [0.02 * 0.98**2, 0.02 * 0.98, 0.02]
    expected = (4 * weights[0] + 2 * weights[1] + 0 * weights[2]) / sum(weights)
    threshold = trainer.finish(scale=5.0).threshold
    assert threshold is not None
    assert threshold.tolist() == pytest.approx([expected / 5] * 2, rel=1e-6)


@by_batch
def test_at_inference_l0_is_k_on_a_stationary_stream(architecture: Architecture):
    trainer = trainer_of(architecture, d_in=16, d_sae=64, k=[5], n_steps=400, learning_rate=3e-3)
    chance = torch.Generator().manual_seed(0)
    for _ in range(400):
        trainer.step(sparse_batch(chance))
    codes = trainer.finish(1.0).encode_sparse(sparse_batch(chance, 4000))
    assert len(codes.values) / 4000 == pytest.approx(5, rel=0.1)


def test_thresholds_of_jumprelu_are_never_negative():
    """Else a latent below zero would be active in training and silent in the finished SAE."""
    trainer = trainer_of("jumprelu", d_in=16, d_sae=32, n_steps=400, learning_rate=0.03, l0=[1e-6])
    chance, lowest = torch.Generator().manual_seed(0), math.inf
    for _ in range(400):
        trainer.step(sparse_batch(chance))
        lowest = min(lowest, float(trainer.threshold.detach().min()))
    assert lowest == 0


# --- the finished SAE ---------------------------------------------------------------------------------------------


@every_architecture
def test_the_finished_sae_on_raw_activations_equals_the_trained_one_on_scaled_ones(architecture: Architecture):
    trainer, scale, raw = trainer_of(architecture), 3.7, random(40, 8, seed=2)
    for i in range(8):
        trainer.step(random(32, 8, seed=i) * scale)
    a = ((raw * scale - trainer.b_dec) @ trainer.encoder.T + trainer.b_enc).detach()
    total, weight = trainer.batch_threshold.tolist()
    latents = {
        "topk": kept(a, 3).relu(),
        "relu": a.relu(),
        "jumprelu": torch.where(a > trainer.threshold.detach(), a, 0),
    }.get(architecture, torch.where(a > total / max(weight, 1e-9), a, 0))
    x_hat = (latents @ trainer.W_dec + trainer.b_dec).detach()
    sae = trainer.finish(scale)
    assert sae.config == trainer.config
    assert 0.02 < (latents > 0).float().mean() < 0.6
    torch.testing.assert_close(sae.encode(raw), latents / scale, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae(raw), x_hat / scale, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(24), rtol=0, atol=1e-6)


@every_architecture
def test_the_finished_sae_does_not_change_when_training_goes_on(architecture: Architecture):
    trainer = trainer_of(architecture)
    trainer.step(random(32, 8))
    sae = trainer.finish(2.0)
    before = {name: value.clone() for name, value in sae.named_parameters()}
    trainer.step(random(32, 8, seed=1))
    assert all(torch.equal(value, before[name]) for name, value in sae.named_parameters())


@every_architecture
def test_the_finished_sae_forward_is_decode_of_encode_for_any_leading_dimensions(architecture: Architecture):
    trainer = trainer_of(architecture)
    trainer.step(random(32, 8, seed=1))
    sae, x = trainer.finish(1.0), random(2, 5, 3, 8)
    latents = sae.encode(x)
    assert latents.shape == (2, 5, 3, 24)
    assert latents.any()
    torch.testing.assert_close(sae(x), sae.decode(latents), rtol=0, atol=1e-6)
    torch.testing.assert_close(latents[1, 4, 2], sae.encode(x[1, 4, 2]), rtol=0, atol=1e-6)


# --- stopping and going on ----------------------------------------------------------------------------------------


@every_architecture
def test_going_on_from_a_state_is_bit_identical(architecture: Architecture):
    straight, first, second = (with_dead(trainer_of(architecture, aux_coefficient=0.5), 4) for _ in range(3))
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
    one, other = (dict(trainer.finish(2.0).named_parameters()) for trainer in (straight, second))
    assert all(torch.equal(value, other[name]) for name, value in one.items())


@every_architecture
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("n_bad", [1, 32])
def test_bad_input_is_refused_before_any_parameter_changes(architecture: Architecture, bad: float, n_bad: int):
    trainer = with_dead(trainer_of(architecture), 6)
    for i in range(3):
        trainer.step(random(32, 8, seed=i))
    before = {name: value.clone() for name, value in trainer.state().items()}
    x = random(32, 8, seed=3)
    x[:n_bad, 2] = bad
    with pytest.raises(Diverged, match=r"loss (nan|inf)|gradient (nan|inf)"):
        trainer.step(x)
    kept_as_they_were = set(before) - {"silent_for", "batch_threshold"}
    assert all(torch.equal(trainer.state()[name], before[name]) for name in kept_as_they_were)
    assert trainer.n_done == 3


def test_the_compiled_kernels_train_the_same_sae():
    pytest.importorskip("numba")
    trainers = []
    for used in (True, False):
        kernels.use(used)
        trainer = with_dead(trainer_of(aux_coefficient=0.5), 6)
        for i in range(30):
            trainer.step(random(32, 8, seed=i))
        trainers.append(trainer)
    kernels.use(True)
    for name, value in trainers[0].parameters().items():
        torch.testing.assert_close(value, trainers[1].parameters()[name], rtol=0, atol=1e-5)


def test_a_generator_depends_on_seed_and_purpose_alone():
    draw = torch.rand(3, generator=generator(0, "epoch", 1))
    torch.rand(5)
    assert torch.equal(torch.rand(3, generator=generator(0, "epoch", 1)), draw)
    others = [generator(1, "epoch", 1), generator(0, "epoch", 2), generator(0, "mean", 1)]
    assert not any(torch.equal(torch.rand(3, generator=other), draw) for other in others)


# --- learning -----------------------------------------------------------------------------------------------------


def learnt(architecture: Architecture, **changes: Any) -> tuple[StepFacts, StepFacts, SaeTrainer]:
    """Facts of the first and the last step on sparse sums of 16 directions, and the trainer."""
    settings = {"d_sae": 32, "k": [3], "l1": [0.05], "l0": [0.002], "batch_size": 128, "dead_after_tokens": 2000}
    trainer = trainer_of(architecture, d_in=16, n_steps=300, **(settings | changes))
    chance = torch.Generator().manual_seed(0)
    facts = [trainer.step(sparse_batch(chance, 128)) for _ in range(300)]
    return facts[0], facts[-1], trainer


@every_architecture
def test_every_architecture_learns_a_known_dictionary(architecture: Architecture):
    first, last, trainer = learnt(architecture)
    assert last.fvu < min(0.2, first.fvu / 4)
    assert last.l0 < 6
    directions = torch.linalg.qr(random(16, 16, seed=1)).Q
    nearest = (directions @ trainer.W_dec.detach().T).max(1).values  # the cosine of each direction's best latent
    assert nearest.median() > 0.8


@pytest.mark.parametrize(("architecture", "level"), [("relu", "l1"), ("jumprelu", "l0")])
def test_l0_falls_as_the_coefficient_rises(architecture: Architecture, level: str):
    coefficients = {"l1": (0.003, 0.03, 0.3), "l0": (0.0003, 0.003, 0.03)}[level]
    facts = [learnt(architecture, **{level: [coefficient]})[1] for coefficient in coefficients]
    assert facts[0].l0 > 1.15 * facts[1].l0 > 1.15**2 * facts[2].l0
    assert facts[0].fvu < facts[1].fvu < facts[2].fvu


def test_the_first_dictionary_of_matryoshka_reconstructs_better_than_as_many_latents_of_batchtopk():
    def left_by_first(architecture: Architecture, n_latents: int) -> float:
        sae, x = (
            learnt(architecture, widths=[8, 32])[2].finish(1.0),
            sparse_batch(torch.Generator().manual_seed(1), 2000),
        )
        z = sae.encode(x)
        z[:, n_latents:] = 0
        return float((x - sae.decode(z)).square().sum() / total_variance(x))

    assert left_by_first("matryoshka", 8) < 0.8 * left_by_first("batchtopk", 8)
    assert left_by_first("matryoshka", 32) < 0.25
