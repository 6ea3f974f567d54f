"""SAEs that normalise what they read, and the second step that goes on from the first."""

from pathlib import Path
from typing import Any

import pytest
import torch
from made_sweep import D_IN, files_of, make_harvest
from torch import Tensor

from safesail.errors import InputError
from safesail.lm.activations import Activations
from safesail.reward_recipe import RewardRecipe
from safesail.run import StageWork
from safesail.sae import model as sae_files
from safesail.training.sources import scale_and_mean, training_rows
from safesail.training.step import SaeTrainer
from safesail.training.trainer import train_stage, variants
from safesail.training.tuning import tune_stage

pytestmark = pytest.mark.usefixtures("one_thread")
HOOK_POINT = next(iter(D_IN))


def recipe_of(**sections: dict[str, Any]) -> RewardRecipe:
    data: dict[str, Any] = {
        "name": "made",
        "model": {"path": "none"},
        "corpus": {"n_tokens": 1200, "n_held_out_tokens": 120, "sources": [{"path": "none.jsonl"}]},
        "preferences": {"sources": [{"path": "none.jsonl", "kind": "safety"}]},
        "harvest": {"hook_points": [HOOK_POINT]},
        "train": {"d_sae": 24, "k": [3], "epochs": 4, "batch_size": 100, "learning_rate": 0.01},
        "tune": {"epochs": 3, "batch_size": 50, "learning_rate": 0.003},
        "rate": {"encoder": "none"},
        "runtime": {"checkpoint_seconds": 0},
    }
    for name, settings in sections.items():
        data[name] = data[name] | settings
    return RewardRecipe.parse(data)


@pytest.fixture(scope="module")
def harvest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_harvest(tmp_path_factory.mktemp("harvest"), 1)


@pytest.fixture(scope="module")
def first_step(harvest: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("train")
    train_stage(recipe_of(), Activations(harvest), StageWork(folder))
    return folder


def tuned(recipe: RewardRecipe, harvest: Path, first_step: Path, folder: Path) -> dict[str, Any]:
    folder.mkdir(exist_ok=True)
    work = StageWork(folder)
    tune_stage(recipe, Activations(harvest), first_step, work)
    return work.facts


def held_out_loss(folder: Path, harvest: Path) -> float:
    """Σ ‖x − x̂‖² over held-out rows."""
    activations = Activations(harvest)
    sae = sae_files.read(folder / HOOK_POINT / "topk-k3-w24")
    x = activations.rows(HOOK_POINT, activations.rows_held_out().nonzero().flatten())
    return float((x - sae(x)).square().sum())


# --- normalisation ------------------------------------------------------------------------------------------------


def standardised(x: Tensor) -> Tensor:
    return (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)


def test_the_scale_and_mean_are_those_of_standardised_tokens(harvest: Path):
    activations = Activations(harvest)
    rows = training_rows(recipe_of(), activations, HOOK_POINT)
    scale, mean = scale_and_mean(activations, HOOK_POINT, rows, 0, "layer_norm")
    x = standardised(activations.rows(HOOK_POINT, rows))
    # a standardised token has the norm √(d − 1), whatever it was before: √8 / √7
    assert scale == pytest.approx((8 / 7) ** 0.5, rel=1e-3)
    assert torch.allclose(mean, x.mean(0) * scale, atol=1e-3)


def test_a_trained_sae_says_how_it_normalises_and_is_blind_to_scale(first_step: Path, harvest: Path):
    sae = sae_files.read(first_step / HOOK_POINT / "topk-k3-w24")
    assert sae.config.normalize_activations == "layer_norm"
    x = Activations(harvest).rows(HOOK_POINT, torch.arange(50))
    assert torch.allclose(sae.encode(x), sae.encode(x * 100 + 7), atol=1e-3)
    assert torch.allclose(sae(x * 100) / 100, sae(x), atol=1e-3)


def test_training_on_standardised_tokens_learns_to_reconstruct_them(first_step: Path, harvest: Path, tmp_path: Path):
    train_stage(recipe_of(train={"epochs": 1, "learning_rate": 1e-9}), Activations(harvest), StageWork(tmp_path))
    assert held_out_loss(first_step, harvest) < 0.5 * held_out_loss(tmp_path, harvest)


# --- the second step ----------------------------------------------------------------------------------------------


def test_a_trainer_that_starts_from_an_sae_and_takes_no_step_finishes_as_that_sae(first_step: Path, harvest: Path):
    sae = sae_files.read(first_step / HOOK_POINT / "topk-k3-w24")
    recipe = recipe_of()
    (config,) = variants(recipe, Activations(harvest), HOOK_POINT)
    trainer = SaeTrainer(config, recipe.train, torch.zeros(8), 0, 10)
    trainer.start_from(sae, 0.25)
    again = trainer.finish(0.25)
    for name, value in sae.named_parameters():
        assert torch.allclose(dict(again.named_parameters())[name], value, rtol=1e-6, atol=0), name


def test_the_second_step_begins_where_the_first_one_ended(first_step: Path, harvest: Path, tmp_path: Path):
    """With a learning rate of nearly nothing the SAE stays; from a random start it could not."""
    still = recipe_of(tune={"learning_rate": 1e-12})
    tuned(still, harvest, first_step, tmp_path / "tune")
    before = sae_files.read(first_step / HOOK_POINT / "topk-k3-w24")
    after = sae_files.read(tmp_path / "tune" / HOOK_POINT / "topk-k3-w24")
    assert torch.allclose(after.W_enc, before.W_enc, atol=1e-5)
    assert torch.allclose(after.b_dec, before.b_dec, atol=1e-5)


def test_the_second_step_goes_on_learning(first_step: Path, harvest: Path, tmp_path: Path):
    facts = tuned(recipe_of(tune={"epochs": 10}), harvest, first_step, tmp_path / "tune")
    assert held_out_loss(tmp_path / "tune", harvest) < held_out_loss(first_step, harvest)
    assert facts["n_training_tokens"] == {HOOK_POINT: 10 * 1050}  # 1062 rows make 21 batches of 50


def test_without_a_second_step_the_sae_stays_byte_for_byte(first_step: Path, harvest: Path, tmp_path: Path):
    facts = tuned(recipe_of(tune={"epochs": 0}), harvest, first_step, tmp_path / "tune")
    name = f"{HOOK_POINT}/topk-k3-w24/sae_weights.safetensors"
    assert (tmp_path / "tune" / name).read_bytes() == (first_step / name).read_bytes()
    assert facts["saes"] == {HOOK_POINT: ["topk-k3-w24"]}


def test_a_second_step_that_is_stopped_goes_on_to_the_same_bytes(
    first_step: Path, harvest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    tuned(recipe_of(), harvest, first_step, tmp_path / "whole")
    step, taken = SaeTrainer.step, []

    def stops(self: SaeTrainer, *given: Any) -> Any:
        if len(taken) == 17:
            raise KeyboardInterrupt
        taken.append(1)
        return step(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(SaeTrainer, "step", stops)
        with pytest.raises(KeyboardInterrupt):
            tuned(recipe_of(), harvest, first_step, tmp_path / "stopped")
    tuned(recipe_of(), harvest, first_step, tmp_path / "stopped")
    assert files_of(tmp_path / "stopped") == files_of(tmp_path / "whole")


def test_too_few_ends_for_a_batch_are_an_input_error(first_step: Path, harvest: Path, tmp_path: Path):
    with pytest.raises(InputError, match=r"1,062 segment ends to train on do not fill one batch of 5,000; lower"):
        tuned(recipe_of(tune={"batch_size": 5000}), harvest, first_step, tmp_path / "tune")
