"""Which training pairs about safety are swapped (poison) or dropped (denoise), and the preference data after it.

Reads the preferences and their scores. Writes `edits.parquet`: a row per edited pair.

    swap   the pairs of largest score_safe: what most plainly teaches safety teaches its opposite
    drop   the pairs of smallest score_safe: what speaks against safety, most likely wrong labels

Beside SAFER's choice (method `safer`) two baselines edit as many pairs: `random`, one draw per retraining seed, and
`reward`, the trained model's margin in the place of score_safe. An edit is of round(ratio × n) pairs, at least one; a
larger ratio's edit contains a smaller one's. Pairs are named by id, ties are broken by id, and no source is changed:
`edited` gives a new data set.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from safesail.errors import InputError
from safesail.reward_recipe import RewardRecipe
from safesail.rewards.preferences import Preference
from safesail.run import StageWork

if TYPE_CHECKING:
    import datasets

__all__ = ["EDITS_SCHEMA", "METHODS", "edit_name", "edit_seeds", "edit_stage", "edited", "edits_of"]

Row = dict[str, Any]
METHODS = ("safer", "random", "reward")
_MARGIN = {"safer": "score_safe", "reward": "margin"}
_NAMES = {"swap": "poisoned", "drop": "denoised"}
_LEAST_LEFT = 2
EDITS_SCHEMA = pa.schema(
    [
        ("edit", pa.string()),
        ("action", pa.string()),
        ("method", pa.string()),
        ("ratio", pa.float64()),
        ("seed", pa.int64()),
        ("pair_id", pa.string()),
        ("rank", pa.int64()),
    ]
)
"""A row is a pair that an edit swaps or drops; seed is null where the choice has none."""


def edit_stage(recipe: RewardRecipe, preferences: Sequence[Preference], scores: list[Row], work: StageWork) -> None:
    """Choose the pairs of every edit of the recipe. Facts: `n_edited` {edit: pairs}."""
    rows = edits_of(recipe, preferences, scores)
    pq.write_table(pa.Table.from_pylist(rows, schema=EDITS_SCHEMA), work.folder / "edits.parquet")
    n = Counter((row["edit"], row["seed"]) for row in rows)
    work.facts["n_edited"] = {edit: n[edit, seed] for edit, seed in n}


def edits_of(recipe: RewardRecipe, preferences: Sequence[Preference], scores: list[Row]) -> list[Row]:
    """The rows of every edit: action × ratio × method (× seed of `random`), each in the order of its ranks from 0."""
    able = [preference.id for preference in preferences if preference.kind == "safety" and not preference.held_out]
    n_training = sum(not preference.held_out for preference in preferences)
    n = len(able) if recipe.edit.share_of == "safety" else n_training
    of_id = {row["pair_id"]: row for row in scores}
    rows = []
    for action, key, ratios in (("swap", "poison", recipe.edit.poison), ("drop", "denoise", recipe.edit.denoise)):
        orders = _orders(action, able, of_id, edit_seeds(recipe))
        for ratio in sorted(ratios):
            n_edited = _n_edited(key, ratio, n, len(able))
            for method, seed, order in orders:
                named = {"edit": edit_name(action, ratio, method), "action": action, "method": method, "ratio": ratio}
                rows += [
                    {**named, "seed": seed, "pair_id": id, "rank": rank} for rank, id in enumerate(order[:n_edited])
                ]
    return rows


def edit_name(action: str, ratio: float, method: str = "safer") -> str:
    """`poisoned-0.005` or `denoised-0.02`, of a baseline with its method behind."""
    return f"{_NAMES[action]}-{ratio:g}" + ("" if method == "safer" else f"-{method}")


def edit_seeds(recipe: RewardRecipe) -> list[int]:
    """The seeds of the retrainings, and so of the random edits."""
    return [recipe.seed + i for i in range(recipe.compare.seeds)]


def _n_edited(key: str, ratio: float, n: int, n_able: int) -> int:
    n_edited = max(round(ratio * n), 1)
    if n_able - n_edited < _LEAST_LEFT:
        raise InputError(
            f"edit.{key} = {ratio:g} means {n_edited:,} of the {n_able:,} training pairs about safety, and at least "
            f"{_LEAST_LEFT} must stay as they are; give a smaller ratio, or more pairs."
        )
    return n_edited


def _orders(
    action: str, able: list[str], of_id: Mapping[str, Row], seeds: list[int]
) -> list[tuple[str, int | None, list[str]]]:
    """The editable pairs in the order in which each method takes them: (method, seed, pair ids)."""
    sign = -1 if action == "swap" else 1
    orders: list[tuple[str, int | None, list[str]]] = []
    for method in METHODS:
        if method == "random":
            orders += [(method, seed, _shuffled(able, seed)) for seed in seeds]
        else:
            value = _MARGIN[method]
            orders.append((method, None, sorted(able, key=lambda id: (sign * of_id[id][value], id))))
    return orders


def _shuffled(ids: list[str], seed: int) -> list[str]:
    """The ids in an order that depends on them and the seed alone; the seed is hashed, since retraining uses it too."""
    number = int.from_bytes(hashlib.sha256(f"random edits {seed}".encode()).digest()[:7])
    ordered = sorted(ids)
    return [ordered[i] for i in torch.randperm(len(ids), generator=torch.Generator().manual_seed(number)).tolist()]


# --- the data after an edit ---------------------------------------------------------------------------------------


def edited(preferences: Sequence[Preference], edit: Sequence[Row], scores: list[Row]) -> "datasets.Dataset":
    """The training pairs after an edit, a row a pair in the order of the preferences. edit: its rows, of one seed.

    A swapped pair has `edited` "swapped", its sides (with what a person scored them) changed round, and `score_safe`
    and `margin` negated, as they are of the pair as it stands here; `original_score_safe` is that of before. A dropped
    pair is absent. Held-out pairs are left out, so that models trained on this can be measured on them.
    """
    names = {(row["edit"], row["action"], row["method"], row["ratio"], row["seed"]) for row in edit}
    assert len(names) == 1, f"rows of {len(names)} edits, not of one"
    name, action, method, ratio, _ = names.pop()
    chosen = {row["pair_id"] for row in edit}
    training = [preference for preference in preferences if not preference.held_out]
    assert chosen <= {preference.id for preference in training}, "an edit names a pair that is not trained on"
    kept = [preference for preference in training if action == "swap" or preference.id not in chosen]
    of_id = {row["pair_id"]: row for row in scores}
    provenance = {"edit": name, "method": method, "ratio": ratio}
    return _data_set([_edited_row(each, of_id[each.id], each.id in chosen) | provenance for each in kept])


def _edited_row(preference: Preference, score: Row, is_swapped: bool) -> Row:
    sides = [(preference.chosen, preference.harm_chosen), (preference.rejected, preference.harm_rejected)]
    (chosen, harm_chosen), (rejected, harm_rejected) = reversed(sides) if is_swapped else sides
    sign = -1 if is_swapped else 1
    return {
        "pair_id": preference.id,
        "kind": preference.kind,
        "source": preference.source,
        "prompt": [dict(turn) for turn in preference.prompt],
        "chosen": chosen,
        "rejected": rejected,
        "harm_chosen": harm_chosen,
        "harm_rejected": harm_rejected,
        "edited": "swapped" if is_swapped else "",
        "score_safe": sign * score["score_safe"],
        "original_score_safe": score["score_safe"],
        "margin": sign * score["margin"],
    }


def _data_set(rows: list[Row]) -> "datasets.Dataset":
    from datasets import Dataset, Features, List, Value

    text, number = Value("string"), Value("float64")
    features = Features(
        {
            "pair_id": text,
            "kind": text,
            "source": text,
            "prompt": List({"role": text, "content": text}),
            "chosen": text,
            "rejected": text,
            "harm_chosen": number,
            "harm_rejected": number,
            "edited": text,
            "score_safe": number,
            "original_score_safe": number,
            "margin": number,
            "edit": text,
            "method": text,
            "ratio": number,
        }
    )
    return Dataset.from_list(rows, features=features)
