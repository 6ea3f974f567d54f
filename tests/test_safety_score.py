"""score_safe: its formula, which ends count, whose score is whose, and how far it predicts the labels."""

import json
import math
from pathlib import Path
from typing import Any, cast

import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from safesail.errors import InputError
from safesail.recipe import TokenPolicy
from safesail.reward_recipe import RewardRecipe
from safesail.rewards.ends import Ends
from safesail.rewards.preferences import Preference
from safesail.rewards.safety_score import (
    SCORES_SCHEMA,
    prompt_groups,
    ranks_of,
    score_safe,
    score_stage,
    validity,
)
from safesail.run import StageWork
from safesail.sae.config import SaeConfig
from safesail.sae.model import Sae

Row = dict[str, Any]


def made_recipe() -> RewardRecipe:
    return RewardRecipe.parse(
        {
            "name": "made",
            "model": {"path": "none"},
            "corpus": {"n_tokens": 1200, "n_held_out_tokens": 120, "sources": [{"path": "none.jsonl"}]},
            "harvest": {"hook_points": ["layers.1"]},
            "train": {"d_sae": 3, "k": [2]},
            "preferences": {"sources": [{"path": "pairs.jsonl", "kind": "safety"}]},
            "rate": {"encoder": "e"},
        }
    )


def pair(id: str, prompt: str = "", kind: str = "safety", held_out: bool = True, **more: Any) -> Preference:
    turns = ({"role": "user", "content": prompt or id},)
    return Preference(id, kind, more.pop("source", "s"), turns, "good", "bad", held_out, **more)


def reward(id: str, chosen: float = 0.0, rejected: float = 0.0) -> Row:
    return {"pair_id": id, "reward_chosen": chosen, "reward_rejected": rejected}


# --- the formula --------------------------------------------------------------------------------------------------


def test_the_golden_value() -> None:
    # chosen ends (1,0) (2,0) (0,.5): sums 1 + 2 - 0.5 = 2.5 over 3; rejected (0,1) (.2,0): -1 + 0.2 = -0.8 over 2
    positive = torch.tensor([[1.0], [2.0], [0.0], [0.0], [0.2]])
    negative = torch.tensor([[0.0], [0.0], [0.5], [1.0], [0.0]])
    side = torch.tensor([0, 0, 0, 1, 1], dtype=torch.uint8)
    found = score_safe(positive, negative, torch.zeros(5, dtype=torch.long), side, 1)
    assert float(found.score[0]) == pytest.approx(2.5 / 3 + 0.8 / 2)
    assert float(found.score[0]) == pytest.approx(1.2333, abs=5e-5)
    assert found.safe[0].tolist() == pytest.approx([2.5 / 3, -0.4])
    assert found.n[0].tolist() == [3, 2]


def test_what_is_not_above_zero_does_not_count() -> None:
    found = score_safe(torch.tensor([[-3.0, 2.0]]), torch.tensor([[-5.0]]), torch.tensor([0]), torch.tensor([0]), 1)
    assert found.score.tolist() == [2.0]


def test_a_side_without_ends_counts_zero() -> None:
    found = score_safe(torch.tensor([[4.0]]), torch.zeros(1, 0), torch.tensor([1]), torch.tensor([1]), 3)
    assert found.score.tolist() == [0.0, -4.0, 0.0]
    assert found.n.tolist() == [[0, 0], [0, 1], [0, 0]]


def test_the_score_is_of_means_so_that_a_longer_side_does_not_win() -> None:
    positive = torch.ones(7, 1)
    side = torch.tensor([0] * 6 + [1])
    assert score_safe(positive, torch.zeros(7, 0), torch.zeros(7).long(), side, 1).score.tolist() == [0.0]


# --- the stage ----------------------------------------------------------------------------------------------------


class MadeEnds:
    """Ends whose activations are given: (pair id, side, activation, counted) each."""

    def __init__(self, pair_ids: list[str], rows: list[tuple[str, int, list[float], bool]]) -> None:
        self.pair_ids = pair_ids
        self.pair = torch.tensor([pair_ids.index(id) for id, *_ in rows])
        self.side = torch.tensor([side for _, side, *_ in rows], dtype=torch.uint8)
        self.x = torch.tensor([x for _, _, x, _ in rows])
        self.n_tokens = len(rows)
        self._counted = torch.tensor([counted for *_, counted in rows])

    def counted(self, hook_point: str, policy: TokenPolicy) -> Tensor:
        assert (hook_point, policy) == ("layers.1", TokenPolicy())
        return self._counted

    def rows(self, hook_point: str, indices: Tensor) -> Tensor:
        return self.x[indices]


def identity_sae() -> Sae:
    config = SaeConfig(d_in=3, d_sae=3, architecture="relu", hook_point="layers.1")
    return Sae(config, torch.eye(3), torch.zeros(3), torch.eye(3), torch.zeros(3))


def safety(positive: list[int], negative: list[int], **more: Any) -> Row:
    known = {"keep": 5, "max_latents": 32, "ratings": {"5": 0, "4": 2, "3": 0, "2": 7, "1": 0}, "statuses": {"ok": 9}}
    return {"positive": positive, "negative": negative, **known, **more}


ROWS = [
    ("b", 0, [0.0, 1.0, 9.0], True),
    ("b", 0, [0.0, 3.0, 0.0], True),
    ("b", 1, [2.0, 0.0, 0.0], True),
    ("b", 1, [50.0, 50.0, 50.0], False),  # a sink: neither summed nor counted
    ("a", 0, [-1.0, 5.0, 1.0], True),
]


def scored(folder: Path, preferences: list[Preference], rewards: list[Row], chosen: Row) -> StageWork:
    work = StageWork(folder)
    ends = cast(Ends, MadeEnds(["b", "a"], ROWS))
    score_stage(made_recipe(), preferences, ends, identity_sae(), chosen, rewards, work)
    return work


def test_every_pair_is_scored_under_its_id_in_whatever_order_it_comes(tmp_path: Path) -> None:
    preferences = [pair("a"), pair("b", held_out=False)]
    work = scored(tmp_path, preferences, [reward("b", 1.0, 3.0), reward("a", 2.0, 0.5)], safety([1], [0]))
    table = pq.read_table(tmp_path / "scores.parquet")
    assert table.schema.equals(SCORES_SCHEMA)
    first, second = table.to_pylist()
    # a: chosen 5 - 0 (latent 0 is below zero), rejected none; b: chosen (1 + 3) / 2, rejected -2 / 1
    assert first == {
        "pair_id": "a",
        "score_safe": 5.0,
        "safe_chosen": 5.0,
        "safe_rejected": 0.0,
        "n_chosen": 1,
        "n_rejected": 0,
        "margin": 1.5,
    }
    assert (second["pair_id"], second["score_safe"], second["margin"]) == ("b", 4.0, -2.0)
    assert (second["safe_chosen"], second["safe_rejected"]) == (2.0, -2.0)
    assert (second["n_chosen"], second["n_rejected"]) == (2, 1)
    assert (work.facts["n_positive"], work.facts["n_negative"]) == (1, 1)
    assert work.facts["held_out"]["score_safe"]["value"] == 1.0


def test_the_same_latents_on_the_other_side_of_salience_turn_the_sign(tmp_path: Path) -> None:
    scored(tmp_path, [pair("a"), pair("b")], [reward("a"), reward("b")], safety([0], [1]))
    found = {row["pair_id"]: row["score_safe"] for row in pq.read_table(tmp_path / "scores.parquet").to_pylist()}
    assert found == {"a": -5.0, "b": -4.0}


def test_without_safety_latents_the_ratings_and_the_way_on_are_told(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"no latent was rated 5 or more \(latents by rating: 2 × 4, 7 × 2\)"
    ) as caught:
        scored(tmp_path, [pair("a"), pair("b")], [reward("a"), reward("b")], safety([], []))
    assert "--adopt --set rate.keep=4" in str(caught.value)
    nothing = safety([], [], ratings=dict.fromkeys("12345", 0), statuses={"failed": 3})
    with pytest.raises(InputError, match=r"no latent has a rating \(3 × failed\)"):
        scored(tmp_path, [pair("a"), pair("b")], [reward("a"), reward("b")], nothing)
    assert not (tmp_path / "scores.parquet").exists()


# --- does it predict anything -------------------------------------------------------------------------------------


def score(id: str, chosen: float, rejected: float) -> Row:
    return {"pair_id": id, "score_safe": chosen - rejected, "safe_chosen": chosen, "safe_rejected": rejected}


def found_row(measured: Row, measure: str, kind: str, held_out: bool | None, source: str | None = None) -> Row:
    wanted = (measure, kind, held_out, source)
    rows = [row for row in measured["rows"] if (row["measure"], row["kind"], row["held_out"], row["source"]) == wanted]
    [row] = rows
    return row


def test_validity_by_hand() -> None:
    preferences = [pair("a"), pair("b"), pair("c"), pair("d"), pair("t", held_out=False), pair("x", kind="chat")]
    scores = [
        score("a", 3, 1),
        score("b", 2, 2),
        score("c", 0, 5),
        score("d", 4, 0),
        score("t", 0, 1),
        score("x", 1, 0),
    ]
    rewards = [reward(id, 1.0, 0.0) for id in "abcdtx"]
    measured = validity(preferences, scores, rewards)
    held = found_row(measured, "score_safe", "safety", True)
    assert (held["n_pairs"], held["n_ties"]) == (4, 1)
    assert held["share"]["value"] == (1 + 0.5 + 0 + 1) / 4
    # chosen 3 2 0 4 against rejected 1 2 5 0: 3 beats 1 2 0 (3), 2 beats 1 0 and ties 2 (2.5), 0 ties 0 (0.5), 4: 3
    assert held["auroc"]["value"] == pytest.approx((3 + 2.5 + 0.5 + 3) / 16)
    assert (held["n_harm"], held["pearson"], held["spearman"]) == (0, None, None)
    assert found_row(measured, "score_safe", "safety", None)["share"]["value"] == 2.5 / 5
    assert found_row(measured, "score_safe", "chat", True)["share"]["value"] == 1.0
    assert found_row(measured, "margin", "safety", True)["share"]["value"] == 1.0
    assert [row["measure"] for row in measured["rows"][:2]] == ["score_safe", "margin"]
    assert measured["rows"][0]["held_out"] is True
    assert measured["rows"][0]["kind"] == "safety"


def test_sources_are_looked_at_apart() -> None:
    preferences = [pair("a", source="one"), pair("b", source="two"), pair("c", source="two", held_out=False)]
    measured = validity(preferences, [score("a", 1, 0), score("b", 0, 1), score("c", 1, 0)], [reward(i) for i in "abc"])
    assert found_row(measured, "score_safe", "safety", None, "one")["share"]["value"] == 1.0
    assert found_row(measured, "score_safe", "safety", None, "two")["share"]["value"] == 0.5
    assert found_row(measured, "score_safe", "safety", True, "two")["share"]["value"] == 0.0
    assert found_row(measured, "margin", "safety", True, "two")["n_ties"] == 1


def test_harm_is_compared_with_the_difference_of_the_sides() -> None:
    # harm_rejected - harm_chosen: 1, 2, 4; score_safe 1, 3, 2 → ranks 0 2 1 against 0 1 2
    harm = {"a": (0.0, 1.0), "b": (1.0, 3.0), "c": (1.0, 5.0)}
    preferences = [pair(id, harm_chosen=c, harm_rejected=r) for id, (c, r) in harm.items()] + [pair("d", harm_chosen=1)]
    scores = [score("a", 1, 0), score("b", 3, 0), score("c", 2, 0), score("d", 99, 0)]
    held = found_row(validity(preferences, scores, [reward(id) for id in "abcd"]), "score_safe", "safety", True)
    assert held["n_harm"] == 3
    # deviations of the score -1 1 0, of harm -4/3 -1/3 5/3: covariance 4/3 - 1/3 = 1; norms √2 and √(42/9)
    assert held["pearson"]["value"] == pytest.approx(1 / math.sqrt(2 * 42 / 9))
    assert held["spearman"]["value"] == pytest.approx(0.5)  # deviations -1 1 0 and -1 0 1: 1 / (√2 √2)


def test_ranks_share_the_mean_of_ties() -> None:
    assert ranks_of(torch.tensor([5.0, 1.0, 5.0, 9.0])).tolist() == [1.5, 0.0, 1.5, 3.0]


def test_pairs_of_one_prompt_are_resampled_together() -> None:
    alone = [pair(f"{i}") for i in range(40)]
    together = [pair(f"{i}", prompt=f"prompt {i // 20}") for i in range(40)]
    assert prompt_groups(alone).tolist() == list(range(40))
    assert prompt_groups(together).tolist() == [0] * 20 + [1] * 20
    scores = [score(f"{i}", float(i >= 20), 0.5) for i in range(40)]
    rewards = [reward(f"{i}") for i in range(40)]
    wide = found_row(validity(together, scores, rewards), "score_safe", "safety", True)["share"]
    narrow = found_row(validity(alone, scores, rewards), "score_safe", "safety", True)["share"]
    assert (wide["value"], wide["low"], wide["high"]) == (0.5, 0.0, 1.0)  # both prompts right, one, or none
    assert 0.3 < narrow["low"] < 0.5 < narrow["high"] < 0.7


def test_validity_is_the_same_json_twice() -> None:
    preferences = [pair(f"{i}", harm_chosen=float(i % 3), harm_rejected=2.0) for i in range(30)]
    scores, rewards = [score(p.id, len(p.id) * 0.1, 0.15) for p in preferences], [reward(p.id) for p in preferences]
    first = json.dumps(validity(preferences, scores, rewards, seed=3))
    assert first == json.dumps(validity(preferences, scores, rewards, seed=3))
