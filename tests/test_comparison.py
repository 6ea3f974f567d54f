"""Comparison of retrained reward models: what is trained, what is counted, and what may be said of it."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from safesail.errors import InputError
from safesail.metrics import Interval
from safesail.reward_recipe import RewardRecipe
from safesail.rewards.comparison import RUNS_SCHEMA, compare_stage, comparison_table, crossed_interval, verdict
from safesail.rewards.preferences import Preference
from safesail.run import StageWork

Row = dict[str, Any]
N_HELD = {"safety": 8, "chat": 4}


def recipe_of(seeds: int = 2) -> RewardRecipe:
    return RewardRecipe.parse(
        {
            "name": "made",
            "seed": 3,
            "model": {"path": "none"},
            "corpus": {"n_tokens": 1200, "n_held_out_tokens": 120, "sources": [{"path": "none.jsonl"}]},
            "harvest": {"hook_points": ["layers.1"]},
            "train": {"d_sae": 3, "k": [2]},
            "preferences": {"sources": [{"path": "pairs.jsonl", "kind": "safety"}]},
            "rate": {"encoder": "e"},
            "compare": {"seeds": seeds},
        }
    )


def pair(id: str, kind: str, held_out: bool) -> Preference:
    return Preference(id, kind, "s", ({"role": "user", "content": id},), f"{id}+", f"{id}-", held_out)


PAIRS = [
    *(pair(f"hs{i}", "safety", True) for i in reversed(range(8))),  # their order is not that of their ids
    *(pair(f"t{i}", "safety", False) for i in range(4)),
    *(pair(f"hc{i}", "chat", True) for i in range(4)),
    pair("u0", "chat", False),
]
PLACE = {each.id: i for i, each in enumerate(PAIRS)}


def edit(name: str, action: str, method: str, ids: list[str], seed: int | None = None) -> list[Row]:
    known = {"edit": name, "action": action, "method": method, "ratio": 0.25, "seed": seed}
    return [{**known, "pair_id": id, "rank": rank} for rank, id in enumerate(ids)]


EDITS = [
    *edit("poisoned-0.25", "swap", "safer", ["t1", "t2"]),
    *edit("poisoned-0.25-random", "swap", "random", ["t0"], seed=3),
    *edit("poisoned-0.25-random", "swap", "random", ["t3"], seed=4),
    *edit("denoised-0.25", "drop", "safer", ["t0"]),
]


class Fake:
    """Gives rewards by what was trained on: n swapped pairs make the first n held-out pairs about safety wrong."""

    def __init__(self, stop_after: int | None = None, tie: str = "") -> None:
        self.calls: list[tuple[tuple[tuple[int, int], ...], int]] = []
        self._stop_after, self._tie = stop_after, tie

    def rewards(self, pairs: Sequence[tuple[int, int]], seed: int) -> Tensor:
        if self._stop_after == len(self.calls):
            raise KeyboardInterrupt
        self.calls.append((tuple(pairs), seed))
        found = torch.zeros(len(PAIRS), 2)
        found[:, 0] = 1.0
        for i in range(sum(side for _, side in pairs)):
            found[PLACE[f"hs{i}"]] = torch.tensor([0.0, 1.0])
        if self._tie:
            found[PLACE[self._tie]] = 1.0
        return found


def compared(folder: Path, retraining: Any, edits: list[Row] = EDITS) -> tuple[Row, list[Row], StageWork]:
    folder.mkdir(exist_ok=True)
    work = StageWork(folder)
    compare_stage(recipe_of(), PAIRS, edits, retraining, work)
    table = pq.read_table(folder / "runs.parquet")
    assert table.schema.equals(RUNS_SCHEMA)
    return json.loads((folder / "comparison.json").read_text()), table.to_pylist(), work


def by_edit(summary: Row) -> dict[str, Row]:
    return {row["edit"]: row for row in summary["rows"]}


# --- what is trained ----------------------------------------------------------------------------------------------


def test_every_edit_is_trained_once_per_seed_on_its_pairs(tmp_path: Path) -> None:
    fake = Fake()
    compared(tmp_path, fake)
    t0, t1, t2, t3, u0 = (PLACE[id] for id in ("t0", "t1", "t2", "t3", "u0"))
    assert fake.calls == [
        (((t0, 0), (t1, 0), (t2, 0), (t3, 0), (u0, 0)), 3),
        (((t0, 0), (t1, 0), (t2, 0), (t3, 0), (u0, 0)), 4),
        (((t0, 0), (t1, 1), (t2, 1), (t3, 0), (u0, 0)), 3),
        (((t0, 0), (t1, 1), (t2, 1), (t3, 0), (u0, 0)), 4),
        (((t0, 1), (t1, 0), (t2, 0), (t3, 0), (u0, 0)), 3),  # each seed has its own random edit
        (((t0, 0), (t1, 0), (t2, 0), (t3, 1), (u0, 0)), 4),
        (((t1, 0), (t2, 0), (t3, 0), (u0, 0)), 3),
        (((t1, 0), (t2, 0), (t3, 0), (u0, 0)), 4),
    ]


def test_an_interrupted_comparison_goes_on_and_ends_with_the_same_bytes(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    compared(whole, Fake())
    with pytest.raises(KeyboardInterrupt):
        compared(parts, Fake(stop_after=3))
    (kept,) = parts.iterdir()
    with open(kept, "a") as handle:
        handle.write('{"key": "half a li')  # as a kill leaves it
    with pytest.raises(KeyboardInterrupt):
        compared(parts, Fake(stop_after=2))
    assert len(kept.read_text().splitlines()) == 5
    rest = Fake()
    compared(parts, rest)
    assert len(rest.calls) == 3
    assert sorted(path.name for path in parts.iterdir()) == ["comparison.json", "runs.parquet"]
    for path in whole.iterdir():
        assert path.read_bytes() == (parts / path.name).read_bytes(), path.name


def test_data_that_are_equal_are_trained_on_once(tmp_path: Path) -> None:
    twice = [*EDITS, *edit("poisoned-0.3", "swap", "safer", ["t2", "t1"])]
    fake = Fake()
    summary, runs, work = compared(tmp_path, fake, twice)
    assert len(fake.calls) == 8
    assert (len(runs), work.facts["n_trainings"]) == (10, 10)
    assert by_edit(summary)["poisoned-0.3"]["safety"] == by_edit(summary)["poisoned-0.25"]["safety"]


def test_rewards_that_are_not_numbers_stop_the_stage(tmp_path: Path) -> None:
    class Broken(Fake):
        def rewards(self, pairs: Sequence[tuple[int, int]], seed: int) -> Tensor:
            return super().rewards(pairs, seed) * float("nan")

    with pytest.raises(InputError, match=r"unedited with seed 3 gave rewards that are no numbers; lower compare"):
        compared(tmp_path, Broken())


# --- what is counted ----------------------------------------------------------------------------------------------


def test_accuracies_and_changes_by_hand(tmp_path: Path) -> None:
    summary, runs, _ = compared(tmp_path, Fake(tie="hs7"))
    rows = by_edit(summary)
    assert list(rows) == ["unedited", "poisoned-0.25", "poisoned-0.25-random", "denoised-0.25"]
    assert summary["n_held_out"] == N_HELD
    assert summary["seeds"] == [3, 4]
    # 8 held-out pairs about safety, one always a tie: 7.5 right unedited, 5.5 with two swaps, 6.5 with one
    assert [rows[name]["safety"]["value"] for name in rows] == [7.5 / 8, 5.5 / 8, 6.5 / 8, 7.5 / 8]
    assert [rows[name]["chat"]["value"] for name in rows] == [1.0] * 4
    assert rows["poisoned-0.25"]["safety_change"]["value"] == -2 / 8
    assert rows["poisoned-0.25-random"]["safety_change"]["value"] == -1 / 8
    assert rows["denoised-0.25"]["safety_change"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert rows["poisoned-0.25"]["chat_change"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert rows["unedited"]["safety_change"] is None
    known = {"action": "swap", "method": "random", "ratio": 0.25, "seeds": 2, "n_edited": 1}
    assert {name: rows["poisoned-0.25-random"][name] for name in known} == known
    first = next(run for run in runs if (run["edit"], run["seed"]) == ("poisoned-0.25", 3))
    # in the order of ids: hc0 … hc3, hs0 … hs7
    assert first["outcomes"] == "1111" + "0011111="
    assert (first["safety"], first["chat"], first["n_edited"], first["n_training"]) == (5.5 / 8, 1.0, 2, 5)
    assert next(run for run in runs if run["edit"] == "denoised-0.25")["n_training"] == 4


def test_safer_is_set_against_random_at_the_same_ratio(tmp_path: Path) -> None:
    summary, _, work = compared(tmp_path, Fake())
    [row] = summary["against_random"]  # the denoising has no random edit beside it here
    assert (row["edit"], row["method"], row["action"], row["ratio"]) == ("poisoned-0.25", "safer", "swap", 0.25)
    # 6 of 8 right against 7 of 8, in both seeds: one pair of eight makes the whole difference
    assert row["safety"]["value"] == -1 / 8
    assert (row["safety"]["high"], row["safety_verdict"], row["chat_verdict"]) == (0.0, *["not told apart"] * 2)
    assert work.facts["against_random"] == {"poisoned-0.25": "not told apart"}


def test_a_plain_difference_is_told(tmp_path: Path) -> None:
    class Hard(Fake):
        """Two swaps spoil every pair about safety, one only the first."""

        def rewards(self, pairs: Sequence[tuple[int, int]], seed: int) -> Tensor:
            found = super().rewards(pairs, seed)
            if sum(side for _, side in pairs) == 2:
                found[: N_HELD["safety"]] = torch.tensor([0.0, 1.0])
            return found

    summary, _, _ = compared(tmp_path, Hard())
    [row] = summary["against_random"]
    assert (row["safety"]["value"], row["safety_verdict"]) == (-7 / 8, "lower")


# --- intervals ----------------------------------------------------------------------------------------------------


def test_the_interval_resamples_pairs_and_seeds() -> None:
    groups = torch.arange(400)
    by_seed = torch.zeros(2, 400, dtype=torch.float64)
    by_seed[0] = 1.0
    found = crossed_interval(by_seed, groups)
    assert (found.value, found.low, found.high) == (0.5, 0.0, 1.0)  # a quarter of the draws has one seed twice
    by_pair = torch.zeros(2, 400, dtype=torch.float64)
    by_pair[:, ::2] = 1.0
    found = crossed_interval(by_pair, groups)
    assert found.value == 0.5
    assert found.low is not None
    assert found.high is not None
    # the standard error of a share of a half over 400 pairs is 0.025, whatever the number of seeds
    assert 0.4 < found.low < 0.47 < 0.53 < found.high < 0.6


def test_pairs_of_one_prompt_are_drawn_together() -> None:
    values = torch.zeros(2, 400, dtype=torch.float64)
    values[:, 200:] = 1.0
    found = crossed_interval(values, torch.arange(400) // 200)
    assert (found.value, found.low, found.high) == (0.5, 0.0, 1.0)


def test_prompts_of_unlike_sizes_keep_the_mean_over_pairs() -> None:
    # one prompt of three pairs, all right, and one of one, wrong: draws give 1, 3/4 or 0
    found = crossed_interval(torch.tensor([[1.0, 1.0, 1.0, 0.0]]).double(), torch.tensor([0, 0, 0, 1]))
    assert (found.value, found.low, found.high) == (0.75, 0.0, 1.0)


def test_there_is_no_interval_of_nothing() -> None:
    assert crossed_interval(torch.zeros(2, 0), torch.zeros(0).long()) == Interval(None, None, None)
    assert crossed_interval(torch.ones(2, 3), torch.zeros(3).long()) == Interval(1.0, None, None)


@pytest.mark.parametrize(
    ("interval", "said"),
    [
        (Interval(-0.1, -0.2, -0.01), "lower"),
        (Interval(0.1, 0.01, 0.2), "higher"),
        (Interval(-0.1, -0.2, 0.0), "not told apart"),
        (Interval(0.1, -0.1, 0.2), "not told apart"),
        (Interval(0.1, None, None), "not told apart"),
        (Interval(None, None, None), "not told apart"),
    ],
)
def test_a_difference_is_told_only_where_the_interval_excludes_zero(interval: Interval, said: str) -> None:
    assert verdict(interval) == said


# --- showing ------------------------------------------------------------------------------------------------------


def test_the_table() -> None:
    none = {"value": None, "low": None, "high": None}
    rows: list[Row] = [
        {
            "edit": "unedited",
            "action": None,
            "method": None,
            "n_edited": 0,
            "safety": {"value": 0.8125, "low": 0.79, "high": 0.8349},
            "chat": none,
            "safety_change": None,
            "chat_change": None,
        },
        {
            "edit": "poisoned-0.05-random",
            "action": "swap",
            "method": "random",
            "n_edited": 12,
            "safety": {"value": 0.75, "low": None, "high": None},
            "chat": none,
            "safety_change": {"value": -0.0625, "low": -0.1, "high": 0.0002},
            "chat_change": none,
        },
    ]
    assert comparison_table(rows) == (
        [
            "data",
            "chosen by",
            "pairs edited",
            "safety accuracy, %",
            "change, points",
            "chat accuracy, %",
            "change, points",
        ],
        [
            ["unedited", "", "", "81.2 [79.0, 83.5]", "", "", ""],
            ["poisoned-0.05", "random", "12", "75.0", "-6.2 [-10.0, 0.0]", "", ""],
        ],
    )
