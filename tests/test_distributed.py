"""Several processes: sharing every batch they give what one gives, sharing the hook points the very same bytes.

The loss is compared within float error: sums over a batch are added in another order when it is spread over ranks.
"""

import itertools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from made_sweep import (
    EVERY_ARCHITECTURE,
    Apart,
    Outcome,
    checkpoints,
    files_of,
    free_port,
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
from safesail.files import write_tensors
from safesail.recipe import Recipe
from safesail.sae.config import SaeConfig
from safesail.sae.sparse import largest
from safesail.training import trainer
from safesail.training.step import SaeTrainer, StepFacts

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


def test_a_gpu_that_is_not_there_is_an_input_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert distributed.device("auto") == distributed.device("cpu") == torch.device("cpu")
    with pytest.raises(InputError, match=r"torch sees no GPU; .*--set runtime\.device=auto"):
        distributed.device("cuda")


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_every_number_is_taken_care_of_by_one_rank(size: int):
    taken = [list(Ranks(rank, size).mine(5)) for rank in range(size)]
    assert sorted(itertools.chain(*taken)) == [0, 1, 2, 3, 4]
    assert max(map(len, taken)) - min(map(len, taken)) <= 1


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
    """Eleven batches of 96 an epoch; a latent that is silent for one of them is dead, so that AuxK has work."""
    settings = {"epochs": 1, "batch_size": 96, "dead_after_tokens": 95, "d_sae": 32, "aux_coefficient": 0.5}
    return recipe_of({"parallel": "data"}, **EVERY_ARCHITECTURE | LEVELS | settings | train_settings)


@pytest.fixture(scope="module")
def alone_and_two(one_hook_point: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """{number of processes: the folder they trained in}."""
    torch.set_num_threads(1)
    folders = {size: tmp_path_factory.mktemp(f"of-{size}") for size in (1, 2)}
    with pytest.MonkeyPatch.context() as context:
        context.setattr(trainer, "_LOG_EVERY", 1)
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
    assert sum(line["dead"] > 0 for line in one) >= 5


@pytest.mark.parametrize("architecture", EVERY_ARCHITECTURE["architectures"])
def test_two_ranks_end_with_the_weights_of_one_process(alone_and_two: dict[int, Path], architecture: str):
    one, two = (weights_of(alone_and_two[size])[sae_id_of(architecture)] for size in (1, 2))
    assert one.keys() == two.keys()
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def _first_step(ranks: Ranks, seed: int) -> dict[str, tuple[StepFacts, dict[str, Any]]]:
    """One step on this rank's share of 48 tokens: facts, counters, Adam's first moments (a tenth of the gradients)."""
    x = random(48, 8, seed=seed) * 3 + 1
    share = x[ranks.rank * len(x) // ranks.size :][: len(x) // ranks.size]
    found = {}
    for architecture in EVERY_ARCHITECTURE["architectures"]:
        sparsity: dict[str, Any] = {"coefficient": 0.01} if architecture in ("relu", "jumprelu") else {"k": 3}
        config = SaeConfig(d_in=8, d_sae=32, hook_point="layers.0", architecture=architecture, **sparsity)
        sae = SaeTrainer(config, shared().train, x.mean(0), 0, 100, ranks)
        sae.silent_for[:12] = 1000  # dead
        with patch.object(torch.nn.utils, "clip_grads_with_norm_"):  # it would hide a wrong factor
            facts = sae.step(share)
        kept = {name: value for name, value in sae.state().items() if name.endswith((".exp_avg", "threshold", "_for"))}
        found[architecture] = facts, {name: value.tolist() for name, value in kept.items()}
    return found


@pytest.fixture(scope="module")
def first_steps() -> list[Outcome]:
    return in_ranks(2, _first_step, 5)


@pytest.mark.parametrize("architecture", EVERY_ARCHITECTURE["architectures"])
def test_the_gradients_of_two_ranks_are_those_of_one_process(first_steps: list[Outcome], architecture: str):
    facts, state = _first_step(ALONE, 5)[architecture]
    assert facts.n_dead == 12
    assert facts.auxiliary > 0
    for end in first_steps:
        assert end.exit_code == 0, end.trace
        theirs, their_state = end.value[architecture]
        assert theirs == pytest.approx(facts, rel=1e-6)
        assert state.keys() == their_state.keys()
        for name, value in state.items():
            a, b = torch.tensor(value), torch.tensor(their_state[name])
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}")


def _largest_of_shares(ranks: Ranks, wholes: list[tuple[list[list[float]], int]]) -> list[float]:
    found = []
    for rows, n in wholes:
        whole = torch.tensor(rows)
        share = whole[ranks.rank * len(whole) // ranks.size :][: len(whole) // ranks.size]
        found.append(float(largest(share.contiguous(), n, ranks.gather)))
    return found


def test_the_batchs_threshold_is_exact_over_all_ranks():
    lopsided = random(60, 40, seed=1)
    lopsided[:30] += 100  # all of the largest are the first rank's
    ties = random(60, 40, seed=2).round()
    wholes = [(random(60, 40, seed=0), n) for n in (1, 7, 180, 2400)]
    wholes += [(lopsided, 180), (lopsided.flip(0), 180), (lopsided, 1201), (ties, 180), (ties, 900)]
    expected = [float(whole.flatten().sort(descending=True).values[n - 1]) for whole, n in wholes]
    rows = [(whole.tolist(), n) for whole, n in wholes]
    for size in (2, 3):
        assert [end.value for end in in_ranks(size, _largest_of_shares, rows)] == [expected] * size


def test_shares_that_would_not_be_equal_name_a_batch_size_that_is(one_hook_point: Path, tmp_path: Path):
    with pytest.raises(
        InputError, match=r"train\.batch_size = 100 does not divide into 3 equal shares .* a multiple of 24\."
    ):
        train(shared(batch_size=100), one_hook_point, tmp_path, Ranks(1, 3))


def test_a_diverging_sae_stops_all_ranks_with_a_sentence(one_hook_point: Path, tmp_path: Path):
    ends = in_ranks(2, train_as_rank, shared(learning_rate=1e30), one_hook_point, tmp_path)
    assert [end.exit_code for end in ends] == [1, 1]
    assert all(end.error.startswith("InputError: layers.0.mlp/") for end in ends)


# --- killed ranks -------------------------------------------------------------------------------------------------


def _killed_at(ranks: Ranks, n_steps: int, doomed: int, recipe: Recipe, harvest: Path, folder: Path) -> None:
    """Train; rank `doomed` is killed when it begins its `n_steps`-th step."""
    begun, step = [0], SaeTrainer.step

    def mortal(self: SaeTrainer, *args: Tensor) -> StepFacts:
        begun[0] += 1
        if begun[0] == n_steps and ranks.rank == doomed:
            os.kill(os.getpid(), signal.SIGKILL)
        return step(self, *args)

    SaeTrainer.step = mortal  # type: ignore[method-assign]
    train_as_rank(ranks, recipe, harvest, folder)


@pytest.mark.parametrize(("n_steps", "doomed"), [(13, 0), (28, 1)])
def test_ranks_that_share_batches_go_on_to_the_same_bytes(
    alone_and_two: dict[int, Path], one_hook_point: Path, tmp_path: Path, n_steps: int, doomed: int
):
    """When one is killed the other ends by itself, with an error; the next attempt goes on at the checkpoint."""
    ends = in_ranks(2, _killed_at, n_steps, doomed, shared(), one_hook_point, tmp_path)
    assert ends[doomed].exit_code == -signal.SIGKILL
    assert ends[1 - doomed].exit_code == 1, "it waits for a rank that is no more"
    assert len(checkpoints(tmp_path)) == 1
    ends = in_ranks(2, train_as_rank, shared(), one_hook_point, tmp_path)
    assert [end.exit_code for end in ends] == [0, 0], ends
    assert files_of(tmp_path) == files_of(alone_and_two[2])


def test_a_streamed_sweep_in_ranks_is_the_same_when_it_is_killed(one_hook_point: Path, tmp_path: Path):
    recipe = streaming(shared(), batch_size=96)
    ends = in_ranks(2, train_as_rank, recipe, one_hook_point, tmp_path / "whole")
    assert [end.exit_code for end in ends] == [0, 0], ends
    in_ranks(2, _killed_at, 23, 1, recipe, one_hook_point, tmp_path / "cut")
    assert checkpoints(tmp_path / "cut")
    in_ranks(2, train_as_rank, recipe, one_hook_point, tmp_path / "cut")
    assert files_of(tmp_path / "cut") == files_of(tmp_path / "whole")


# --- hook points shared out ---------------------------------------------------------------------------------------


def spread(**settings: object) -> Recipe:
    return recipe_of({"parallel": "hook_points"}, **EVERY_ARCHITECTURE | LEVELS | {"epochs": 1} | settings)


@pytest.fixture(scope="module")
def one_process(harvest: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, object], dict[str, bytes]]:
    """The facts and files of one process."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("one")
    with pytest.MonkeyPatch.context() as context:
        context.setattr(trainer, "_LOG_EVERY", 1)
        return train(spread(), harvest, folder), files_of(folder)


@pytest.mark.parametrize("size", [2, 4])
def test_hook_points_spread_over_ranks_give_the_bytes_of_one_process(
    one_process, harvest: Path, tmp_path: Path, size: int
):
    """Three hook points: one rank has two of them, or one rank has none."""
    facts, files = one_process
    ends = in_ranks(size, train_as_rank, spread(), harvest, tmp_path)
    assert [end.exit_code for end in ends] == [0] * size, ends
    assert all(end.value == facts for end in ends)
    assert files_of(tmp_path) == files


def _come_and_go(path: Path, seconds: float) -> None:
    """A checkpoint that another rank writes and removes, over and over."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        write_tensors(path, {"layers.1.mlp/topk|n_done": torch.tensor(3)})
        path.unlink()


def test_checkpoints_that_another_rank_removes_meanwhile_are_passed_over(tmp_path: Path):
    path = tmp_path / "checkpoint-of-another-rank.safetensors"
    looker = trainer._Checkpoint(tmp_path, [SimpleNamespace(config=SimpleNamespace(sae_id="a"))], 1.0)  # type: ignore[list-item]
    other = Apart(_come_and_go, path, 2.0)
    seen = []
    while other.process.is_alive():
        seen += looker._found()
    assert other.outcome().exit_code == 0
    assert seen
    assert all(steps == {"layers.1.mlp/topk": 3} for _, steps in seen)


def test_streamed_hook_points_spread_over_ranks_give_the_bytes_of_one_process(harvest: Path, tmp_path: Path):
    train(streaming(spread()), harvest, tmp_path / "one")
    ends = in_ranks(2, train_as_rank, streaming(spread()), harvest, tmp_path / "two")
    assert [end.exit_code for end in ends] == [0, 0], ends
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")


def test_a_rank_killed_at_its_hook_point_ends_the_others_and_one_process_goes_on(
    one_process, harvest: Path, tmp_path: Path
):
    """Rank 1 has one hook point and is killed there; rank 0 finishes its two and then learns of it."""
    ends = in_ranks(2, _killed_at, 23, 1, spread(), harvest, tmp_path)
    assert ends[1].exit_code == -signal.SIGKILL
    assert ends[0].exit_code == 1, "it waits for a rank that is no more"
    assert {name.split("/")[0] for name in weights_of(tmp_path)} == {"layers.0.mlp", "layers.2.mlp"}
    train(spread(), harvest, tmp_path)
    assert files_of(tmp_path) == one_process[1]


def _diverging(ranks: Ranks, recipe: Recipe, harvest: Path, folder: Path) -> None:
    if ranks.rank == 1:
        trainer.total_variance = lambda x, ranks: x.sum() * torch.nan  # type: ignore[assignment]
    train_as_rank(ranks, recipe, harvest, folder)


def test_a_rank_that_stops_with_a_sentence_ends_the_others(harvest: Path, tmp_path: Path):
    ends = in_ranks(2, _diverging, spread(), harvest, tmp_path)
    assert [end.exit_code for end in ends] == [1, 1]
    assert ends[1].error.startswith("InputError: layers.1.mlp/topk-k3-w24 cannot take step 1 of 10")


# --- torchrun itself ----------------------------------------------------------------------------------------------


def test_torchrun_ends_all_ranks_when_one_dies(one_hook_point: Path, tmp_path: Path, alone_and_two: dict[int, Path]):
    """The second rank is killed at its eighth step: torchrun ends the first and says so."""
    script = tmp_path / "doomed.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import torch\nfrom pathlib import Path\nfrom safesail.distributed import ranks\n"
        "from test_distributed import _killed_at, shared\n"
        "torch.set_num_threads(1)\n"
        f"_killed_at(ranks(), 38, 1, shared(), Path({str(one_hook_point)!r}), Path({str(tmp_path / 'run')!r}))\n"
    )
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    settings = {**os.environ, "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*torchrun, str(script)], env=settings, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "exitcode  : -9" in done.stderr
    assert checkpoints(tmp_path / "run")
    ends = in_ranks(2, train_as_rank, shared(), one_hook_point, tmp_path / "run")
    assert [end.exit_code for end in ends] == [0, 0], ends
    assert files_of(tmp_path / "run") == files_of(alone_and_two[2])
