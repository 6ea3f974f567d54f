"""The tables of a reward model's release: salience, scores and edits without texts, and the preferences with them.

`salience/` is open and holds numbers and ids alone; every text, also what a language model wrote about a latent, is in
`preferences/` (gated) or `poisoned/`. Every file has an explicit schema.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa

from safesail.neurons import neuron_id
from safesail.release.reward_facts import RewardFacts
from safesail.release.tables import write_table
from safesail.rewards.editing import edited
from safesail.rewards.preferences import SIDES

__all__ = [
    "COMPARISON",
    "CONTEXTS",
    "EDITED",
    "EDITS",
    "PAIRS",
    "RATINGS",
    "REWARD_SCHEMAS",
    "SALIENCE",
    "SCORES",
    "comparison_rows",
    "filled",
    "salience_rows",
    "schema_of",
    "write_edited",
    "write_preferences",
    "write_salience",
]

Row = dict[str, Any]
_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_TYPES = {
    pa.string(): "neuron_id hook_point safety status reason pair_id id kind source edit action method side before "
    "token after token_class explanation detail rater prompt_hash edited",
    pa.bool_(): "rated held_out",
    pa.int32(): "rank latent rating n_chosen n_rejected n_contexts n_token_classes seed seeds n_edited position "
    "prompt_tokens completion_tokens",
    _MESSAGES: "prompt chosen rejected",
}


def _schema(columns: str, **other: pa.DataType) -> pa.Schema:
    """A schema of the named columns; those not in `_TYPES` are numbers. other: columns of another type here."""
    types = {name: kind for kind, names in _TYPES.items() for name in names.split()} | other
    return pa.schema([(name, types.get(name, pa.float64())) for name in columns.split()])


def _with_interval(names: str) -> str:
    return " ".join(f"{name} {name}_low {name}_high" for name in names.split())


SALIENCE = _schema(
    "neuron_id salience low high rating safety status h_chosen h_rejected n_chosen n_rejected n_contexts "
    "n_token_classes rated reason rank hook_point latent"
)
SCORES = _schema(
    "pair_id kind held_out score_safe safe_chosen safe_rejected reward_chosen reward_rejected margin n_chosen "
    "n_rejected source"
)
EDITS = _schema("edit action method ratio seed pair_id rank")
COMPARISON = _schema(
    f"edit action method ratio seeds n_edited {_with_interval('safety chat safety_change chat_change')}",
    safety=pa.float64(),
)
PAIRS = _schema("id kind prompt chosen rejected harm_chosen harm_rejected source held_out")
CONTEXTS = _schema("neuron_id rank before token after activation token_class side pair_id position latent")
RATINGS = _schema(
    "neuron_id rating explanation status detail rater prompt_hash prompt_tokens completion_tokens cost_usd latent"
)
EDITED = _schema(
    "id kind prompt chosen rejected edited score_safe original_score_safe margin harm_chosen harm_rejected edit method "
    "ratio source"
)
REWARD_SCHEMAS: dict[str, dict[str, pa.Schema]] = {
    "salience": {"salience": SALIENCE, "scores": SCORES, "edits": EDITS, "comparison": COMPARISON},
    "preferences": {"pairs": PAIRS, "contexts": CONTEXTS, "ratings": RATINGS},
    "poisoned": {},
}
"""{part: {config: columns}} of what every release has; edited data sets are configs of their own."""
_EDITED_CONFIGS = {"preferences": "denoised-", "poisoned": "poisoned-"}
_FILLED = {
    "salience": "neuron_id salience h_chosen h_rejected n_chosen n_rejected rated rank hook_point latent",
    "scores": " ".join(SCORES.names),
    "edits": "edit action method ratio pair_id rank",
    "comparison": "edit n_edited",
    "pairs": "id kind prompt chosen rejected source held_out",
    "contexts": "neuron_id rank latent pair_id token token_class",
    "ratings": "neuron_id latent status",
}
"""The columns of each config that have a value in every row."""
_EDITED_FILLED = "id kind prompt chosen rejected edited edit method ratio"


def schema_of(part: str, config: str) -> pa.Schema | None:
    """The columns of a config of a part; None: there is no such config."""
    known = REWARD_SCHEMAS.get(part, {})
    prefix = _EDITED_CONFIGS.get(part)
    return known.get(config) or (EDITED if prefix and config.startswith(prefix) else None)


def filled(config: str) -> list[str]:
    """The columns of a config that have a value in every row."""
    return _FILLED.get(config, _EDITED_FILLED).split()


# --- without texts ------------------------------------------------------------------------------------------------


def write_salience(facts: RewardFacts, folder: Path) -> None:
    """Write the data set without texts below `folder`."""
    write_table(folder / "salience/train.parquet", salience_rows(facts), SALIENCE)
    write_table(folder / "scores/train.parquet", _score_rows(facts), SCORES)
    write_table(folder / "edits/train.parquet", facts.edits, EDITS)
    write_table(folder / "comparison/train.parquet", comparison_rows(facts.compared["rows"]), COMPARISON)


def salience_rows(facts: RewardFacts) -> list[Row]:
    """Every latent that fires, by |s|, with its rating and the side on which it is a safety latent."""
    ratings = {row["latent"]: row for row in facts.ratings}
    side = {latent: side for side in ("positive", "negative") for latent in facts.safety[side]}
    return [
        row
        | _identity(facts, row["latent"])
        | {key: ratings.get(row["latent"], {}).get(key) for key in ("rating", "status")}
        | {"safety": side.get(row["latent"])}
        for row in sorted(facts.salience, key=lambda row: row["rank"])
    ]


def _identity(facts: RewardFacts, latent: int) -> Row:
    hook_point = facts.recipe.hook_point
    return {"neuron_id": neuron_id(hook_point, latent), "hook_point": hook_point}


def _score_rows(facts: RewardFacts) -> list[Row]:
    """Every pair's score_safe and rewards, in the order of the preferences."""
    scores = {row["pair_id"]: row for row in facts.scores}
    rewards = {row["pair_id"]: row for row in facts.rewards}
    return [
        {"kind": pair.kind, "source": pair.source, "held_out": pair.held_out} | scores[pair.id] | rewards[pair.id]
        for pair in facts.preferences
    ]


def comparison_rows(comparison: Iterable[Row]) -> list[Row]:
    """The comparison with each accuracy's ends as columns, `safety_low` and `safety_high` after `safety`."""
    rows = []
    for row in comparison:
        flat = {key: value for key, value in row.items() if not isinstance(value, dict)}
        for name in ("safety", "chat", "safety_change", "chat_change"):
            measured = row.get(name) or {}
            ends = ((name, "value"), (f"{name}_low", "low"), (f"{name}_high", "high"))
            flat |= {column: measured.get(key) for column, key in ends}
        rows.append(flat)
    return rows


# --- with texts ---------------------------------------------------------------------------------------------------


def write_preferences(facts: RewardFacts, folder: Path) -> None:
    """Write the pairs by their split, the contexts and ratings of latents, and the denoised data sets."""
    for split, held_out in (("train", False), ("test", True)):
        rows = [_pair(each._asdict()) for each in facts.preferences if each.held_out == held_out]
        write_table(folder / f"pairs/{split}.parquet", rows, PAIRS)
    for name, found, schema in (("contexts", facts.contexts, CONTEXTS), ("ratings", facts.ratings, RATINGS)):
        rows = [row | _identity(facts, row["latent"]) for row in found]
        write_table(folder / name / "train.parquet", rows, schema)
    write_edited(facts, "drop", folder)


def write_edited(facts: RewardFacts, action: str, folder: Path) -> None:
    """Write each data set that SAFER's scores edit in this way (swap or drop) as a config by the name of its edit."""
    edits: dict[str, list[Row]] = {}
    for row in facts.edits:
        if (row["action"], row["method"]) == (action, "safer"):
            edits.setdefault(row["edit"], []).append(row)
    for name, edit in edits.items():
        rows = edited(facts.preferences, edit, facts.scores).to_list()
        write_table(folder / name / "train.parquet", [_pair(row) | {"id": row["pair_id"]} for row in rows], EDITED)


def _pair(row: Row) -> Row:
    """A pair with its prompt and answers as lists of messages, the form in which trl reads them."""
    answers = {side: [{"role": "assistant", "content": row[side]}] for side in SIDES}
    return row | {"prompt": [dict(message) for message in row["prompt"]]} | answers
