"""Several processes: sharing every batch they give what one gives, sharing the hook points the very same bytes.

The loss is compared within float error: sums over a batch are added in another order when it is spread over ranks.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from made_sweep import (
    EVERY_ARCHITECTURE,
    Apart,
    checkpoints,
    files_of,
    in_ranks,
    log_of,
    make_harvest,
    random,
    recipe_of,
    streaming,
    train,
    train_as_rank,
    weights_of,
)
from torch import Tensor

from safesail import distributed
from safesail.distributed import ALONE, Ranks
from safesail.errors import InputError
from safesail.recipe import Recipe
from safesail.sae.sparse import largest
from safesail.training import trainer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def harvest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three hook points."""
    return make_harvest(tmp_path_factory.mktemp("harvest"), 3)


@pytest.fixture(scope="module")
def one_hook_point(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_harvest(tmp_path_factory.mktemp("one"), 1)


@pytest.fixture(autouse=True)
def every_step_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in `train_as_rank`."""
    monkeypatch.setattr(trainer, "_LOG_EVERY", 1)


# --- the ranks ----------------------------------------------------------------------------------------------------


def test_without_torchrun_there_is_one_rank(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    distributed.ranks.cache_clear()
    assert distributed.ranks() == ALONE == Ranks(0, 1)
    x = torch.arange(3.0)
    assert ALONE.sum(x) is x
    assert ALONE.gather(x) is x
    assert ALONE.first


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_every_number_is_taken_care_of_by_one_rank(size: int):
    taken = [number for rank in range(size) for number in Ranks(rank, size).mine(5)]
    assert sorted(taken) == [0, 1, 2, 3, 4]


def _collectives(ranks: Ranks) -> dict[str, object]:
    mine = torch.tensor([1.0, 10.0]) * (ranks.rank + 1)
    return {
        "rank": (ranks.rank, ranks.size, ranks.first),
        "gathered": ranks.gather(mine).tolist(),
        "any": ranks.any(torch.tensor([ranks.rank == 0, ranks.rank == 1, False])).tolist(),
        "sum": ranks.sum(mine).tolist(),
        "in place": mine.tolist(),
    }


def test_collectives_by_hand():
    first, second = (end.value for end in in_ranks(2, _collectives))
    assert first.pop("rank") == (0, 2, True)
    assert second.pop("rank") == (1, 2, False)
    expected = {"gathered": [1, 10, 2, 20], "any": [True, True, False], "sum": [3, 30], "in place": [3, 30]}
    assert first == second == expected


# --- every batch shared -------------------------------------------------------------------------------------------

LEVELS = {"k": [3], "l1": [0.05], "l0": [0.01]}


def shared(**train_settings: object) -> Recipe:
    """Eleven batches of 96 an epoch; latents silent for two batches are dead, so that AuxK has work."""
    settings = {"epochs": 1, "batch_size": 96, "dead_after_tokens": 150, "d_sae": 32, "aux_coefficient": 0.5}
    return recipe_of({"parallel": "data"}, **EVERY_ARCHITECTURE | LEVELS | settings | train_settings)


@pytest.fixture(scope="module")
def alone_and_two(one_hook_point: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """{number of processes: the folder they trained in}."""
    torch.set_num_threads(1)
    folders = {size: tmp_path_factory.mktemp(f"of-{size}") for size in (1, 2)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "_LOG_EVERY", 1)
        train(shared(), one_hook_point, folders[1])
    ends = in_ranks(2, train_as_rank, shared(), one_hook_point, folders[2])
    assert [end.exit_code for end in ends] == [0, 0], ends
    return folders


def sae_id_of(architecture: str) -> str:
    level = {"relu": "c0.05", "jumprelu": "c0.01"}.get(architecture, "k3")
    return f"layers.0.mlp/{architecture}-{level}-w32"


@pytest.mark.parametrize("architecture", EVERY_ARCHITECTURE["architectures"])
def test_two_ranks_log_what_one_process_logs(alone_and_two: dict[int, Path], architecture: str):
    one, two = (log_of(alone_and_two[size], sae_id_of(architecture)) for size in (1, 2))
    assert len(one) == len(two) == 11
    assert one[0] == pytest.approx(two[0], rel=1e-6)  # the same weights: nothing has built up yet
    for a, b in zip(one, two, strict=True):
        assert a["dead"] == b["dead"]
        assert (a["fvu"], a["l0"], a["aux"]) == pytest.approx((b["fvu"], b["l0"], b["aux"]), rel=1e-5), a["step"]
    assert one[-1]["dead"] > 0
    assert one[-1]["aux"] > 0


@pytest.mark.parametrize("architecture", EVERY_ARCHITECTURE["architectures"])
def test_two_ranks_end_with_the_weights_of_one_process(alone_and_two: dict[int, Path], architecture: str):
    one, two = (weights_of(alone_and_two[size])[sae_id_of(architecture)] for size in (1, 2))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_after_one_step_two_ranks_have_the_weights_of_one_process(one_hook_point: Path, tmp_path: Path):
    """Adam's first step is the learning rate times the gradient's sign, so a wrong factor would not show: the gradient
    itself is in its first moment, in the checkpoint that a full disk leaves of a run of two steps."""
    recipe = shared(batch_size=1048)
    train(recipe, one_hook_point, tmp_path / "one")
    ends = in_ranks(2, train_as_rank, recipe, one_hook_point, tmp_path / "two")
    assert [end.exit_code for end in ends] == [0, 0], ends
    one, two = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    assert len(one) == 5
    for sae_id, weights in one.items():
        for name, value in weights.items():
            torch.testing.assert_close(two[sae_id][name], value, rtol=1e-6, atol=1e-6)
