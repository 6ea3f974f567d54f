"""The sweep: where its batches come from, that no SAE notices the others, and every way in which it can be stopped."""

import itertools
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from made_sweep import (
    D_IN,
    EVERY_ARCHITECTURE,
    N_TRAINING,
    apart,
    checkpoints,
    files_of,
    log_of,
    made_rounds,
    make_harvest,
    recipe_of,
    source_of,
    streaming,
    train,
    train_until,
    train_with_small_files,
    weights_of,
)
from safetensors.torch import load_file
from torch import Tensor

from safesail.distributed import ALONE, Ranks
from safesail.errors import InputError
from safesail.lm.activations import Activations
from safesail.recipe import Recipe
from safesail.run import StageWork
from safesail.training import trainer
from safesail.training.sources import Shards, Streamed, scale_and_mean, training_rows
from safesail.training.step import StepFacts, generator
from safesail.training.trainer import train_stage

pytestmark = pytest.mark.usefixtures("one_thread")

FIRST, SECOND = list(D_IN)[:2]
UNHURRIED: dict[str, Any] = {"checkpoint_seconds": 1e9}
"""No checkpoint at all."""


@pytest.fixture(scope="module")
def harvest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_harvest(tmp_path_factory.mktemp("harvest"))


@pytest.fixture
def every_step_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "_LOG_EVERY", 1)


# --- one sweep, or every SAE alone --------------------------------------------------------------------------------

KINDS = {"shards": lambda recipe: recipe, "streamed": streaming}


def whole_sweep(kind: str, **runtime: object) -> Recipe:
    return KINDS[kind](recipe_of(UNHURRIED | runtime, epochs=1, **EVERY_ARCHITECTURE))


@pytest.fixture(scope="module", params=list(KINDS))
def sweep(request: pytest.FixtureRequest, harvest: Path, tmp_path_factory: pytest.TempPathFactory):
    """The kind of the source, and the files of the sweep of twenty SAEs from it."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("sweep")
    train(whole_sweep(request.param), harvest, folder)
    return request.param, files_of(folder)


@pytest.mark.parametrize("architecture", EVERY_ARCHITECTURE["architectures"])
def test_the_sweep_trains_every_sae_as_if_it_were_alone(sweep, harvest: Path, tmp_path: Path, architecture: str):
    kind, files = sweep
    key = {"relu": "l1", "jumprelu": "l0"}.get(architecture, "k")
    for level in EVERY_ARCHITECTURE[key]:
        recipe = KINDS[kind](recipe_of(UNHURRIED, epochs=1, architectures=[architecture], **{"k": [], key: [level]}))
        for hook_point in (FIRST, SECOND):
            activations, folder = Activations(harvest), tmp_path / f"{level}-{hook_point}"
            activations.hook_points = [hook_point]
            folder.mkdir()
            train_stage(recipe, activations, StageWork(folder), source_of(recipe, activations))
            alone = files_of(folder)
            assert len(alone) == 3  # config, weights and log
            assert alone == {name: files[name] for name in alone}


@pytest.mark.parametrize("at_once", [1, 2, 7])
def test_how_many_saes_are_trained_at_once_changes_no_byte(sweep, harvest: Path, tmp_path: Path, at_once: int):
    kind, files = sweep
    train(whole_sweep(kind, saes_at_once=at_once), harvest, tmp_path)
    assert files_of(tmp_path) == files


def test_the_saes_of_a_sweep_differ(sweep):
    weights = [content for name, content in sweep[1].items() if name.endswith("sae_weights.safetensors")]
    assert len(set(weights)) == len(weights) == 20


# --- killed, and gone on ------------------------------------------------------------------------------------------

RESUMED = {"architectures": ["topk", "batchtopk", "jumprelu"], "k": [2], "l0": [0.01], "dead_after_tokens": 200}
"""Six SAEs; topk has no state but Adam's, batchtopk a running threshold, jumprelu a trained one; AuxK comes on."""


def resumed(kind: str, at_once: int | None = None, **runtime: float) -> Recipe:
    return KINDS[kind](recipe_of({"saes_at_once": at_once} | runtime, epochs=1, **RESUMED))


@pytest.fixture
def as_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fourth step is logged, as in `train_until`."""
    monkeypatch.setattr(trainer, "_LOG_EVERY", 4)


@pytest.fixture(scope="module")
def undisturbed(harvest: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """{kind of source: the files of a sweep that nothing happened to}."""
    torch.set_num_threads(1)
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "_LOG_EVERY", 4)
        for kind, folder in folders.items():
            train(resumed(kind), harvest, folder)
    return {kind: files_of(folder) for kind, folder in folders.items()}


@pytest.fixture
def uninterrupted(undisturbed, as_logged) -> dict[str, dict[str, bytes]]:
    return undisturbed


@pytest.mark.parametrize(
    ("kind", "at_once", "then", "stride"),
    [
        ("shards", None, None, 23),
        ("shards", None, 1, 41),
        ("shards", 1, None, 53),
        ("streamed", None, None, 31),
        ("streamed", 2, 3, 43),
        ("streamed", None, 4, 37),
    ],
)
def test_a_killed_sweep_goes_on_to_the_same_bytes(
    uninterrupted, harvest: Path, tmp_path: Path, kind: str, at_once: int | None, then: int | None, stride: int
):
    """Killed before the first checkpoint, between two, within one, within and between the folders of finished SAEs."""
    n_uses = apart(train_until, 0, resumed(kind, at_once), harvest, tmp_path / "0").value
    moments = range(stride // 2, n_uses, stride)
    assert len(moments) > 1
    for moment in moments:
        folder = tmp_path / str(moment)
        assert apart(train_until, moment, resumed(kind, at_once), harvest, folder).exit_code == -9
        train(resumed(kind, then), harvest, folder)
        assert files_of(folder) == uninterrupted[kind], moment


def steps_taken(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """A list that every step from now on is added to: the SAE, and how many steps it had done before."""
    taken, step = [], trainer.SaeTrainer.step

    def watched(self: trainer.SaeTrainer, *args: Tensor) -> StepFacts:
        taken.append((self.config.sae_id, self.n_done))
        return step(self, *args)

    monkeypatch.setattr(trainer.SaeTrainer, "step", watched)
    return taken


def test_what_is_finished_is_not_trained_again(uninterrupted, harvest: Path, tmp_path: Path, monkeypatch):
    """Killed between the first SAE's folder and the second's, with the last checkpoint at the ninth step of ten."""
    assert apart(train_until, "os.mkdir .batchtopk-k2-w24.new", resumed("shards"), harvest, tmp_path).exit_code == -9
    taken = steps_taken(monkeypatch)
    train(resumed("shards"), harvest, tmp_path)
    assert [step for step in taken if step[0].startswith(FIRST)] == [
        (f"{FIRST}/batchtopk-k2-w24", 9),
        (f"{FIRST}/jumprelu-c0.01-w24", 9),
    ]
    assert files_of(tmp_path) == uninterrupted["shards"]


def test_the_checkpoint_of_a_finished_group_goes_before_the_next_one_comes(harvest: Path, tmp_path: Path):
    moment = f"os.rename .checkpoint-{SECOND}--topk-k2-w24-and-2.safetensors.new"
    assert apart(train_until, moment, resumed("shards"), harvest, tmp_path).exit_code == -9
    assert len(weights_of(tmp_path)) == 3
    assert not checkpoints(tmp_path)


def test_fewer_saes_at_once_keep_what_was_done_with_more(uninterrupted, harvest: Path, tmp_path: Path, monkeypatch):
    """The three SAEs of the first hook point were at their ninth step when they were killed."""
    assert apart(train_until, "os.mkdir .topk-k2-w24.new", resumed("shards"), harvest, tmp_path).exit_code == -9
    taken = steps_taken(monkeypatch)
    train(resumed("shards", 1), harvest, tmp_path)
    variants = ("topk-k2-w24", "batchtopk-k2-w24", "jumprelu-c0.01-w24")
    assert [step for step in taken if step[0].startswith(FIRST)] == [(f"{FIRST}/{variant}", 9) for variant in variants]
    assert files_of(tmp_path) == uninterrupted["shards"]


def test_a_sweep_killed_over_and_over_ends_with_the_same_bytes(uninterrupted, harvest: Path, tmp_path: Path):
    deaths = 0
    while apart(train_until, 41, resumed("shards"), harvest, tmp_path).exit_code == -9:
        deaths += 1
    assert deaths >= 2
    assert files_of(tmp_path) == uninterrupted["shards"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_cut_off_while_it_is_written_does_no_harm(uninterrupted, harvest: Path, tmp_path: Path, kind: str):
    """The kernel ends the process in the middle of the write that makes the file larger than it may be."""
    end = apart(train_with_small_files, 9000, True, resumed(kind), harvest, tmp_path)
    assert end.exit_code == -signal.SIGXFSZ
    assert not checkpoints(tmp_path)
    (half,) = files_of(tmp_path)
    assert half.startswith(".")
    train(resumed(kind), harvest, tmp_path)
    assert files_of(tmp_path) == uninterrupted[kind]


def test_weights_cut_off_while_they_are_written_do_no_harm(uninterrupted, harvest: Path, tmp_path: Path):
    """Logs and configs have fewer than 1,500 bytes, weights have more: the first SAE's folder is never finished."""
    end = apart(train_with_small_files, 1500, True, resumed("shards", **UNHURRIED), harvest, tmp_path)
    assert end.exit_code == -signal.SIGXFSZ
    assert not weights_of(tmp_path)
    assert any(name.startswith(f"{FIRST}/.topk-k2-w24.new/") for name in files_of(tmp_path))
    train(resumed("shards"), harvest, tmp_path)
    assert files_of(tmp_path) == uninterrupted["shards"]


def test_leftovers_of_an_earlier_attempt_do_no_harm(uninterrupted, harvest: Path, tmp_path: Path):
    left = tmp_path / FIRST / ".topk-k2-w24.new"
    left.mkdir(parents=True)
    for name in ("cfg.json", ".cfg.json.new", "sae_weights.safetensors", ".tmpAbCdEf"):
        (left / name).write_bytes(b"half")
    for variant in ("topk-k2-w24", "relu-c7-w24"):  # of a group that comes again, and of one that never does
        (tmp_path / f".checkpoint-{SECOND}--{variant}-and-2.safetensors.new").write_bytes(b"half")
    train(resumed("shards"), harvest, tmp_path)
    assert files_of(tmp_path) == uninterrupted["shards"]


def test_a_log_cut_off_within_a_line_is_mended(uninterrupted, harvest: Path, tmp_path: Path):
    """Killed with ten steps logged and nine in the checkpoint."""
    assert apart(train_until, "os.mkdir .topk-k2-w24.new", resumed("shards"), harvest, tmp_path).exit_code == -9
    log = tmp_path / "logs" / FIRST / "topk-k2-w24.jsonl"
    whole = log.read_text()
    assert whole.count("\n") == 3  # of steps 4, 8 and 10
    log.write_text(whole[:-30])
    train(resumed("shards"), harvest, tmp_path)
    assert files_of(tmp_path) == uninterrupted["shards"]


# --- full disks and broken numbers --------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "n_more"), [("shards", 2), ("streamed", 5)])
def test_a_checkpoint_that_the_disk_does_not_take_is_said_and_leaves_nothing(
    uninterrupted, harvest: Path, tmp_path: Path, kind: str, n_more: int
):
    end = apart(train_with_small_files, 9000, False, resumed(kind), harvest, tmp_path)
    assert end.exit_code == 1
    assert end.error.startswith(
        f"InputError: {tmp_path}/checkpoint-{FIRST}--topk-k2-w24-and-{n_more}.safetensors could n"
    )
    assert not files_of(tmp_path)
    train(resumed(kind), harvest, tmp_path)
    assert files_of(tmp_path) == uninterrupted[kind]


def test_a_log_that_the_disk_does_not_take_is_said(harvest: Path, tmp_path: Path):
    recipe = recipe_of(UNHURRIED, epochs=1, k=[2])
    end = apart(train_with_small_files, 20, False, recipe, harvest, tmp_path / "full")
    assert end.error.startswith(f"InputError: {tmp_path}/full/logs/{FIRST}/topk-k2-w24.jsonl could not be written")
    train(recipe, harvest, tmp_path / "full")
    train(recipe, harvest, tmp_path / "whole")
    assert files_of(tmp_path / "full") == files_of(tmp_path / "whole")


ONE_LEVEL = {"k": [2], "l1": [0.1], "l0": [0.02]}


@pytest.mark.parametrize("rate", [1e12, 1e22, 1e38, 1e300])
@pytest.mark.parametrize("architecture", EVERY_ARCHITECTURE["architectures"])
def test_a_diverging_sae_is_named_and_its_last_good_state_kept(
    harvest: Path, tmp_path: Path, architecture: str, rate: float
):
    recipe = recipe_of(architectures=[architecture], learning_rate=rate, **ONE_LEVEL)
    with pytest.raises(InputError, match=rf"^layers\.0\.mlp/{architecture}-\S+ diverges at step \d+ of 20 \(") as said:
        train(recipe, harvest, tmp_path)
    kept = checkpoints(tmp_path)
    assert all(value.isfinite().all() for path in kept for value in load_file(path).values())
    assert all(f"is kept in {path}." in str(said.value) for path in kept)
    assert kept or "No checkpoint had been written yet." in str(said.value)
    with pytest.raises(InputError) as again:
        train(recipe, harvest, tmp_path)
    assert str(again.value) == str(said.value)


class Poisoned(Shards):
    """Harvested batches of which one holds a value that is not finite."""

    def __init__(self, recipe: Recipe, harvest: Path, step: int, value: float, rows: slice) -> None:
        super().__init__(recipe, Activations(harvest))
        self.poison = step, value, rows

    def batches(self, hook_points: tuple[str, ...], start: int) -> Iterator[dict[str, Tensor]]:
        poisoned, value, rows = self.poison
        for step, batch in enumerate(super().batches(hook_points, start), start=start + 1):
            for x in batch.values():
                x[rows] = value if step == poisoned else x[rows]
            yield batch


@pytest.mark.parametrize("architecture", EVERY_ARCHITECTURE["architectures"])
@pytest.mark.parametrize(("value", "rows"), [("nan", slice(5, 6)), ("inf", slice(0, 1)), ("nan", slice(0, 100))])
def test_a_batch_that_is_not_finite_stops_the_sae_and_can_be_gone_on_from(
    harvest: Path, tmp_path: Path, architecture: str, value: str, rows: slice
):
    recipe = recipe_of(architectures=[architecture], epochs=1, **ONE_LEVEL)
    source = Poisoned(recipe, harvest, 4, float(value), rows)
    folder = tmp_path / "poisoned"
    folder.mkdir()
    with pytest.raises(
        InputError, match=rf"layers\.0\.mlp/{architecture}-\S+ cannot take step 4 of 10: .*of step 3, is kept in"
    ):
        train_stage(recipe, source.activations, StageWork(folder), source)
    (kept,) = checkpoints(folder)
    assert all(tensor.isfinite().all() for tensor in load_file(kept).values())
    train(recipe, harvest, folder)
    train(recipe, harvest, tmp_path / "sound")
    assert files_of(folder) == files_of(tmp_path / "sound")


def test_a_source_that_ends_too_early_is_no_finished_sae(harvest: Path, tmp_path: Path):
    recipe = streaming(recipe_of(k=[2]))
    source = Streamed(recipe, lambda names, first: itertools.islice(made_rounds(names, first), 1))
    with pytest.raises(AssertionError):
        train_stage(recipe, Activations(harvest), StageWork(tmp_path), source)
    assert not weights_of(tmp_path)


# --- batches of the harvest ---------------------------------------------------------------------------------------


def test_every_epoch_visits_the_rows_in_an_order_of_its_own(harvest: Path):
    shards = Shards(recipe_of(epochs=3), Activations(harvest))
    assert shards.n_steps(FIRST) == 30  # 1,062 rows are ten whole batches of 100, thrice
    steps = list(shards.row_numbers(FIRST, 0))
    assert [len(step) for step in steps] == [100] * 30
    epochs = [torch.cat(steps[i : i + 10]) for i in (0, 10, 20)]
    assert all(len(epoch.unique()) == 1000 for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 3
    assert len({tuple(epoch.sort().values.tolist()) for epoch in epochs}) == 3  # other rows are left out each time


def test_the_harvests_batches_from_any_step_are_those_that_going_there_gives(harvest: Path):
    shards = Shards(recipe_of(epochs=3), Activations(harvest))
    steps = [step.tolist() for step in shards.row_numbers(SECOND, 0)]
    for start in range(31):
        assert [step.tolist() for step in shards.row_numbers(SECOND, start)] == steps[start:]


def test_a_batch_is_the_activations_of_its_rows(harvest: Path):
    activations = Activations(harvest)
    shards = Shards(recipe_of(), activations)
    for rows, batch in zip(shards.row_numbers(FIRST, 18), shards.batches((FIRST,), 18), strict=True):
        assert batch.keys() == {FIRST}
        assert torch.equal(batch[FIRST], activations.rows(FIRST, rows))


def test_the_ranks_shares_are_the_global_batch(harvest: Path):
    activations = Activations(harvest)
    whole = Shards(recipe_of(), activations).batches((FIRST,), 7)
    shares = [Shards(recipe_of(), activations, Ranks(rank, 4)).batches((FIRST,), 7) for rank in range(4)]
    for batch, *parts in zip(whole, *shares, strict=True):
        assert [len(part[FIRST]) for part in parts] == [25] * 4
        assert torch.equal(torch.cat([part[FIRST] for part in parts]), batch[FIRST])


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
    assert len(rows) == N_TRAINING == 1200 - 120 - 24 + 6


def test_too_few_tokens_for_a_batch_name_both_numbers(harvest: Path, tmp_path: Path):
    with pytest.raises(InputError, match=r"1,062 training tokens at layers\.0\.mlp .* batch of 5,000"):
        train(recipe_of(batch_size=5000), harvest, tmp_path)


def test_a_policy_that_counts_no_harvested_token_is_an_input_error(harvest: Path, tmp_path: Path):
    facts = json.loads((harvest / "harvest.json").read_text())
    folder = make_harvest(tmp_path)
    (folder / "harvest.json").write_text(json.dumps(facts | {"special_ids": list(range(5, 55))}))
    with pytest.raises(InputError, match=r"^0 training tokens at layers\.0\.mlp"):
        training_rows(recipe_of(), Activations(folder), FIRST)


def test_the_scale_makes_the_mean_norm_the_root_of_d_in(harvest: Path):
    activations = Activations(harvest)
    rows = training_rows(recipe_of(), activations, SECOND)
    scale, mean = scale_and_mean(activations, SECOND, rows, 0)
    x = activations.rows(SECOND, rows).double()
    assert scale * float(x.norm(dim=1).mean()) == pytest.approx(6**0.5, rel=1e-6)
    torch.testing.assert_close(mean.double(), scale * x.mean(0), rtol=0, atol=1e-6)


# --- batches that are streamed ------------------------------------------------------------------------------------


def numbered(counts: dict[str, list[int]]):
    """Rounds with so many rows at each hook point, and the list of rounds that were read. A row is (round, number)."""
    read: list[int] = []

    def rounds(hook_points: tuple[str, ...], first: int) -> Iterator[dict[str, Tensor]]:
        for number in itertools.count(first):
            read.append(number)
            sizes = {name: counts[name][number % len(counts[name])] for name in hook_points}
            yield {
                name: torch.stack([torch.full((n,), number), torch.arange(n)], 1).half() for name, n in sizes.items()
            }

    return rounds, read


def streamed(counts: dict[str, list[int]], ranks: Ranks = ALONE, **settings: int) -> tuple[Streamed, list[int]]:
    """45 tokens a buffer, so four batches of ten a round, and fourteen steps: the last round gives two."""
    rounds, read = numbered(counts)
    sizes = {"batch_size": 10, "buffer_tokens": 45, "stream_tokens": 149} | settings
    return Streamed(streaming(recipe_of(), **sizes), rounds, ranks), read


COUNTS = {FIRST: [45, 17, 53], SECOND: [40, 3]}


def pairs(batches: Iterator[dict[str, Tensor]], hook_point: str) -> list[list[tuple[int, int]]]:
    """The (round, number) of the rows of each batch."""
    return [[(int(a), int(b)) for a, b in batch[hook_point].tolist()] for batch in batches]


def test_every_round_makes_the_same_number_of_batches():
    source, _ = streamed(COUNTS)
    assert source.n_steps(FIRST) == source.n_steps(SECOND) == 14
    for name in COUNTS:
        steps = pairs(source.batches((name,), 0), name)
        assert [len(step) for step in steps] == [10] * 14
        assert [{number for number, _ in step} for step in steps] == [{n // 4} for n in range(14)]


def test_a_round_with_rows_to_spare_uses_none_twice():
    source, _ = streamed({FIRST: [53]})
    rows = list(itertools.chain(*pairs(source.batches((FIRST,), 0), FIRST)[:4]))
    assert len(set(rows)) == 40


@pytest.mark.parametrize(("n_rows", "uses"), [(17, {2: 11, 3: 6}), (3, {13: 2, 14: 1}), (40, {1: 40})])
def test_a_round_with_too_few_rows_uses_them_equally_often(n_rows: int, uses: dict[int, int]):
    """40 rows are wanted: 17 rows are all used twice and 6 of them a third time."""
    source, _ = streamed({FIRST: [n_rows]})
    rows = list(itertools.chain(*pairs(source.batches((FIRST,), 0), FIRST)[:4]))
    often = [rows.count(row) for row in set(rows)]
    assert {n: often.count(n) for n in set(often)} == uses


def test_streamed_batches_from_any_step_are_those_that_going_there_gives():
    source, read = streamed(COUNTS)
    steps = pairs(source.batches((FIRST,), 0), FIRST)
    for start in range(15):
        read.clear()
        assert pairs(source.batches((FIRST,), start), FIRST) == steps[start:]
        assert read == list(range(start // 4, 4))[: 4 if start < 14 else 0]  # the round that is under way, and on


def test_no_round_is_read_that_is_not_used():
    source, read = streamed(COUNTS, stream_tokens=80)  # eight steps: two whole rounds
    assert len(list(source.batches((FIRST,), 0))) == 8
    assert read == [0, 1]


def test_a_hook_points_streamed_batches_are_the_same_alone_and_together():
    source, _ = streamed(COUNTS)
    together = list(source.batches((FIRST, SECOND), 3))
    for name in (FIRST, SECOND):
        alone = list(source.batches((name,), 3))
        assert all(torch.equal(a[name], b[name]) for a, b in zip(alone, together, strict=True))
    swapped = list(source.batches((SECOND, FIRST), 3))
    assert all(torch.equal(a[name], b[name]) for a, b in zip(swapped, together, strict=True) for name in COUNTS)


def test_streamed_rounds_are_each_shuffled_in_their_own_way():
    source, _ = streamed({FIRST: [40], SECOND: [40]})
    starts = [(name, 4 * round) for name in COUNTS for round in (0, 1)]
    orders = [[row for step in pairs(source.batches((n,), i), n)[:4] for _, row in step] for n, i in starts]
    assert len({tuple(order) for order in orders}) == 4
    assert all(order != list(range(40)) for order in orders)


def test_a_rank_streams_its_share_of_every_batch_in_an_order_of_its_own():
    parts = [pairs(streamed({FIRST: [20]}, Ranks(rank, 2))[0].batches((FIRST,), 0), FIRST) for rank in (0, 1)]
    assert [[len(step) for step in part] for part in parts] == [[5] * 14] * 2
    assert all(len(set(itertools.chain(*part[:4]))) == 20 for part in parts)
    assert parts[0] != parts[1]


def test_a_buffer_without_a_counted_token_is_an_input_error():
    source, _ = streamed({FIRST: [45, 0]})
    with pytest.raises(InputError, match=r"no token .*counts at layers\.0\.mlp .* change \[tokens\]"):
        list(source.batches((FIRST,), 0))


def test_streamed_activations_are_trained_in_full_precision():
    source, _ = streamed(COUNTS)
    assert next(source.batches((FIRST,), 0))[FIRST].dtype == torch.float32


def test_a_generator_depends_on_seed_and_purpose_alone():
    draw = torch.rand(3, generator=generator(0, "epoch", 1))
    torch.rand(5)
    assert torch.equal(torch.rand(3, generator=generator(0, "epoch", 1)), draw)
    others = [generator(1, "epoch", 1), generator(0, "epoch", 2), generator(0, "mean", 1)]
    assert not any(torch.equal(torch.rand(3, generator=other), draw) for other in others)


# --- what the stage leaves behind ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "n_tokens"), [("shards", 2000), ("streamed", 1000)])
def test_the_facts_of_the_stage_and_nothing_but_its_results(harvest: Path, tmp_path: Path, kind: str, n_tokens: int):
    facts = train(KINDS[kind](recipe_of(architectures=["topk", "relu"], k=[2], l1=[0.05])), harvest, tmp_path)
    assert facts == {
        "saes": {name: ["topk-k2-w24", "relu-c0.05-w24"] for name in (FIRST, SECOND)},
        "n_training_tokens": {FIRST: n_tokens, SECOND: n_tokens},
    }
    ids = [f"{name}/{variant}" for name in (FIRST, SECOND) for variant in ("topk-k2-w24", "relu-c0.05-w24")]
    expected = {f"logs/{sae_id}.jsonl" for sae_id in ids}
    expected |= {f"{sae_id}/{name}" for sae_id in ids for name in ("cfg.json", "sae_weights.safetensors")}
    assert files_of(tmp_path).keys() == expected


def test_a_finished_stage_is_not_trained_again(harvest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    facts = train(recipe_of(k=[2]), harvest, tmp_path)
    before = files_of(tmp_path)
    monkeypatch.setattr(trainer.SaeTrainer, "step", lambda *args: pytest.fail("a step was taken"))
    assert train(recipe_of(k=[2]), harvest, tmp_path) == facts
    assert files_of(tmp_path) == before


def test_the_sweep_lowers_the_loss_it_logs(harvest: Path, tmp_path: Path):
    recipe = recipe_of(UNHURRIED, epochs=12, learning_rate=1e-2, **EVERY_ARCHITECTURE | ONE_LEVEL)
    train(recipe, harvest, tmp_path)
    for path in sorted((tmp_path / "logs").rglob("*.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert [line["step"] for line in lines] == [50, 100, 120]  # every fiftieth and the last
        assert all(line.keys() == {"step", "fvu", "l0", "aux", "dead"} for line in lines)
        assert lines[-1]["fvu"] < lines[0]["fvu"] < 1, path


def test_a_topk_log_counts_active_and_dead_latents(every_step_logged, harvest: Path, tmp_path: Path):
    train(recipe_of(UNHURRIED, k=[3], epochs=1, dead_after_tokens=299), harvest, tmp_path)
    lines = log_of(tmp_path, f"{FIRST}/topk-k3-w24")
    assert [line["step"] for line in lines] == list(range(1, 11))
    assert all(2.5 < line["l0"] <= 3 for line in lines)  # the ReLU may take one of the three
    assert all(line["dead"] == 0 for line in lines[:3])  # 300 tokens have gone by before the fourth step
    assert all((line["aux"] > 0) == (line["dead"] > 0) for line in lines)


def test_the_trained_weights_are_named_shaped_and_typed_as_saelens_expects(harvest: Path, tmp_path: Path):
    train(recipe_of(UNHURRIED, epochs=1, **EVERY_ARCHITECTURE | ONE_LEVEL), harvest, tmp_path)
    shapes = {"W_enc": (8, 24), "b_enc": (24,), "W_dec": (24, 8), "b_dec": (8,)}
    for sae_id, weights in weights_of(tmp_path).items():
        has_threshold = sae_id.split("/")[1].startswith(("batchtopk", "matryoshka", "jumprelu"))
        expected = shapes | ({"threshold": (24,)} if has_threshold else {})
        if sae_id.startswith(FIRST):
            assert {name: tuple(value.shape) for name, value in weights.items()} == expected
        assert all(value.dtype == torch.float32 for value in weights.values())
