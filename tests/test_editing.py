"""Edits: which pairs are swapped or dropped, and the data after it."""

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from datasets import Dataset

from safesail.errors import InputError
from safesail.reward_recipe import RewardRecipe
from safesail.rewards.editing import EDITS_SCHEMA, edit_name, edit_seeds, edit_stage, edited, edits_of
from safesail.rewards.preferences import Preference
from safesail.run import StageWork

Row = dict[str, Any]


def recipe_of(*, seed: int = 0, seeds: int = 2, **edit: Any) -> RewardRecipe:
    return RewardRecipe.parse(
        {
            "name": "made",
            "seed": seed,
            "model": {"path": "none"},
            "corpus": {"n_tokens": 1200, "n_held_out_tokens": 120, "sources": [{"path": "none.jsonl"}]},
            "harvest": {"hook_points": ["layers.1"]},
            "train": {"d_sae": 3, "k": [2]},
            "preferences": {"sources": [{"path": "pairs.jsonl", "kind": "safety"}]},
            "rate": {"encoder": "e"},
            "edit": {"poison": [], "denoise": []} | edit,
            "compare": {"seeds": seeds},
        }
    )


def pair(id: str, kind: str = "safety", held_out: bool = False, **more: Any) -> Preference:
    return Preference(id, kind, "s", ({"role": "user", "content": f"ask {id}"},), f"{id}+", f"{id}-", held_out, **more)


def score(id: str, value: float, margin: float = 0.0) -> Row:
    return {"pair_id": id, "score_safe": value, "margin": margin}


PAIRS = [pair(id) for id in "dbac"] + [pair("h", held_out=True), pair("x", kind="chat"), pair("y", kind="chat")]
SCORES = [
    score("a", 2.0, margin=-1.0),
    score("b", 5.0, margin=0.0),
    score("c", 2.0, margin=7.0),
    score("d", -3.0, margin=2.0),
    score("h", 99.0, margin=99.0),
    score("x", -99.0, margin=-99.0),
    score("y", 50.0, margin=50.0),
]


def ids_of(rows: list[Row], edit: str, seed: int | None = None) -> list[str]:
    found = [row for row in rows if row["edit"] == edit and row["seed"] == seed]
    assert [row["rank"] for row in found] == list(range(len(found)))
    return [row["pair_id"] for row in found]


# --- which pairs --------------------------------------------------------------------------------------------------


def test_the_highest_scores_are_swapped_and_the_lowest_dropped() -> None:
    rows = edits_of(recipe_of(poison=[0.5], denoise=[0.5]), PAIRS, SCORES)
    # training pairs about safety by score_safe: b 5, a 2, c 2, d -3; by margin: c 7, d 2, b 0, a -1
    assert ids_of(rows, "poisoned-0.5") == ["b", "a"]
    assert ids_of(rows, "denoised-0.5") == ["d", "a"]
    assert ids_of(rows, "poisoned-0.5-reward") == ["c", "d"]
    assert ids_of(rows, "denoised-0.5-reward") == ["a", "b"]
    assert {(row["action"], row["method"]) for row in rows if row["edit"] == "poisoned-0.5"} == {("swap", "safer")}
    assert {(row["action"], row["method"]) for row in rows if row["edit"] == "denoised-0.5-random"} == {
        ("drop", "random")
    }


def test_neither_held_out_nor_chat_pairs_are_edited() -> None:
    rows = edits_of(recipe_of(poison=[0.1, 0.5], denoise=[0.5]), PAIRS, SCORES)
    assert {row["pair_id"] for row in rows} <= set("abcd")


def test_the_order_of_pairs_and_scores_changes_nothing() -> None:
    recipe = recipe_of(poison=[0.25, 0.5], denoise=[0.5])
    assert edits_of(recipe, PAIRS, SCORES) == edits_of(recipe, PAIRS[::-1], SCORES[::-1])


def test_every_seed_draws_its_own_random_pairs_and_larger_edits_hold_smaller_ones() -> None:
    pairs = [pair(f"{i:03d}") for i in range(200)]
    scores = [score(each.id, 0.0) for each in pairs]
    rows = edits_of(recipe_of(seed=5, seeds=3, poison=[0.1, 0.2]), pairs, scores)
    small = {seed: ids_of(rows, "poisoned-0.1-random", seed) for seed in (5, 6, 7)}
    large = {seed: ids_of(rows, "poisoned-0.2-random", seed) for seed in (5, 6, 7)}
    assert [len(ids) for ids in small.values()] == [20] * 3
    assert all(large[seed][:20] == small[seed] for seed in small)
    assert all(len(set(ids)) == 40 for ids in large.values())
    assert set(small[5]) != set(small[6]) != set(small[7])
    assert edit_seeds(recipe_of(seed=5, seeds=3)) == [5, 6, 7]
    assert ids_of(rows, "poisoned-0.1") == [f"{i:03d}" for i in range(20)]  # all scores are equal: by id


@pytest.mark.parametrize(
    ("ratio", "n", "expected"),
    [(0.005, 200, 1), (0.005, 40, 1), (0.01, 250, 2), (0.02, 180, 4), (0.05, 210, 10), (0.1, 96, 10)],
    ids=str,
)
def test_the_number_is_the_rounded_share_and_at_least_one(ratio: float, n: int, expected: int) -> None:
    # 1, 0.2 → 1, 2.5 → 2 (to even), 3.6 → 4, 10.5 → 10, 9.6 → 10
    pairs = [pair(f"{i:03d}") for i in range(n)]
    rows = edits_of(recipe_of(denoise=[ratio]), pairs, [score(each.id, 0.0) for each in pairs])
    assert len(ids_of(rows, f"denoised-{ratio:g}")) == expected
    assert len(ids_of(rows, f"denoised-{ratio:g}-reward")) == expected
    assert len(ids_of(rows, f"denoised-{ratio:g}-random", 1)) == expected


def test_shares_may_be_of_all_training_pairs() -> None:
    recipe = recipe_of(poison=[0.3], share_of="all")
    assert len(ids_of(edits_of(recipe, PAIRS, SCORES), "poisoned-0.3")) == 2  # 0.3 × 6 = 1.8; of 4 it would be 1


@pytest.mark.parametrize("key", ["poison", "denoise"])
def test_a_ratio_that_leaves_fewer_than_two_pairs_is_refused(key: str) -> None:
    most: Row = {key: [0.5, 0.75]}
    with pytest.raises(InputError, match=rf"edit.{key} = 0.75 means 3 of the 4 training pairs about safety"):
        edits_of(recipe_of(**most), PAIRS, SCORES)
    more: Row = {key: [0.9], "share_of": "all"}
    with pytest.raises(InputError, match="means 5 of the 4"):
        edits_of(recipe_of(**more), PAIRS, SCORES)
    half: Row = {key: [0.5]}
    assert edits_of(recipe_of(**half), PAIRS, SCORES)


def test_the_stage_writes_the_rows(tmp_path: Path) -> None:
    recipe = recipe_of(poison=[0.25], denoise=[0.5])
    work = StageWork(tmp_path)
    edit_stage(recipe, PAIRS, SCORES, work)
    table = pq.read_table(tmp_path / "edits.parquet")
    assert table.schema.equals(EDITS_SCHEMA)
    assert table.to_pylist() == edits_of(recipe, PAIRS, SCORES)
    assert work.facts["n_edited"] == {
        "poisoned-0.25": 1,
        "poisoned-0.25-random": 1,
        "poisoned-0.25-reward": 1,
        "denoised-0.5": 2,
        "denoised-0.5-random": 2,
        "denoised-0.5-reward": 2,
    }


def test_names_say_what_was_done() -> None:
    assert edit_name("swap", 0.005) == "poisoned-0.005"
    assert edit_name("drop", 0.1, "reward") == "denoised-0.1-reward"


# --- the data after an edit ---------------------------------------------------------------------------------------


def rows_of(edit: str, pairs: list[Preference], seed: int | None = None) -> Dataset:
    rows = edits_of(recipe_of(poison=[0.25], denoise=[0.5]), pairs, SCORES)
    return edited(pairs, [row for row in rows if row["edit"] == edit and row["seed"] == seed], SCORES)


def test_swapped_pairs_change_their_sides_and_say_so() -> None:
    pairs = [each._replace(harm_chosen=0.5, harm_rejected=4.0) if each.id == "b" else each for each in PAIRS]
    before = list(pairs)
    found = rows_of("poisoned-0.25", pairs)
    rows = {row["pair_id"]: row for row in found.to_list()}
    assert list(rows) == ["d", "b", "a", "c", "x", "y"]  # the order of the preferences, without held-out pairs
    assert rows["b"] == {
        "pair_id": "b",
        "kind": "safety",
        "source": "s",
        "prompt": [{"role": "user", "content": "ask b"}],
        "chosen": "b-",
        "rejected": "b+",
        "harm_chosen": 4.0,
        "harm_rejected": 0.5,
        "edited": "swapped",
        "score_safe": -5.0,
        "original_score_safe": 5.0,
        "margin": 0.0,
        "edit": "poisoned-0.25",
        "method": "safer",
        "ratio": 0.25,
    }
    assert (rows["a"]["chosen"], rows["a"]["edited"], rows["a"]["score_safe"]) == ("a+", "", 2.0)
    assert pairs == before
    assert pairs[1].chosen == "b+"
    again = {row["pair_id"]: row for row in rows_of("poisoned-0.25-reward", pairs).to_list()}
    assert (again["c"]["margin"], again["c"]["method"]) == (-7.0, "reward")


def test_dropped_pairs_are_absent_and_the_others_as_they_were() -> None:
    found = rows_of("denoised-0.5", PAIRS).to_list()
    assert [row["pair_id"] for row in found] == ["b", "c", "x", "y"]
    assert {row["edited"] for row in found} == {""}
    assert all(row["chosen"] == f"{row['pair_id']}+" for row in found)
    assert all(row["score_safe"] == row["original_score_safe"] for row in found)


def test_the_random_edit_of_one_seed_makes_one_data_set() -> None:
    assert len(rows_of("denoised-0.5-random", PAIRS, seed=1)) == 4
    rows = edits_of(recipe_of(denoise=[0.5]), PAIRS, SCORES)
    with pytest.raises(AssertionError, match="rows of 2 edits"):
        edited(PAIRS, [row for row in rows if row["edit"] == "denoised-0.5-random"], SCORES)
