"""Preference data: pairs of a chosen and a rejected answer to one prompt, each with an id of its own.

Reads the sources of the recipe. Writes `preferences.parquet`.

Which pairs are taken, in which order, and which are held out depends on the pairs' ids and prompts, never on the order
of lines: a line more or less changes no other pair.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from safesail.errors import InputError
from safesail.files import replacing
from safesail.recipe import BaseRecipe
from safesail.reward_recipe import PreferenceSource, PreferencesSection, RewardRecipe
from safesail.rewards.pair_forms import Fault, Pair, pair_of
from safesail.rewards.pair_sources import is_local, rows
from safesail.run import StageWork

__all__ = ["PREFERENCES_SCHEMA", "SIDES", "Preference", "gather", "n_pairs", "preferences_stage", "read_preferences"]

SIDES = ("chosen", "rejected")
PREFERENCES_SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "kind": pa.string(),
        "source": pa.string(),
        "prompt": pa.string(),
        "chosen": pa.string(),
        "rejected": pa.string(),
        "held_out": pa.bool_(),
        "harm_chosen": pa.float64(),
        "harm_rejected": pa.float64(),
    }
)
"""A row is a pair; `prompt` is a JSON list of {role, content}."""


class Preference(NamedTuple):
    """Two answers to one prompt, of which a person or a rule preferred the first."""

    id: str
    kind: str
    """`safety` or `chat`: what the preference is about."""
    source: str
    prompt: tuple[dict[str, str], ...]
    """The {role, content} before the answer."""
    chosen: str
    rejected: str
    held_out: bool
    harm_chosen: float | None = None
    """A person's score of how harmful the answer is, where the data has one."""
    harm_rejected: float | None = None

    def messages(self, side: str) -> list[dict[str, str]]:
        """The conversation of a side: the prompt and the assistant's answer."""
        assert side in SIDES, side
        return [*self.prompt, {"role": "assistant", "content": self.chosen if side == "chosen" else self.rejected}]


class _Found(NamedTuple):
    """The pairs of a source, and what was left out: {reason: number of rows}."""

    preferences: list[Preference]
    left_out: Counter[str]


def gather(section: PreferencesSection, seed: int) -> list[Preference]:
    """The pairs of all sources, in the sources' order and within each in a seeded order; ids are unique.

    A pair (its prompt and both answers) is taken once, by the first source that has it. InputError for rows that are no
    pairs, unless `bad_pairs` says to leave them out.
    """
    return [preference for found in _gathered(section, seed) for preference in found.preferences]


def preferences_stage(recipe: RewardRecipe, work: StageWork) -> None:
    """Write the preferences of the recipe's sources."""
    found = _gathered(recipe.preferences, recipe.seed)
    preferences = [preference for each in found for preference in each.preferences]
    table = pa.Table.from_pylist([_row(preference) for preference in preferences], PREFERENCES_SCHEMA)
    with replacing(work.folder / "preferences.parquet", table.nbytes) as temporary:
        pq.write_table(table, temporary)
    work.facts["n_pairs"] = len(preferences)
    work.facts["n_held_out"] = sum(preference.held_out for preference in preferences)
    sources = zip(recipe.preferences.sources, found, strict=True)
    work.facts["sources"] = [_facts(source, each) for source, each in sources]


def n_pairs(recipe: BaseRecipe, gathered: Path) -> int | None:
    """How many pairs a recipe has at most, for a plan: those in the folder `gathered`, else those of its sources.

    None where only the Hub would say, and for a recipe without preferences.
    """
    if not isinstance(recipe, RewardRecipe):
        return None
    if (written := gathered / "preferences.parquet").is_file():
        return pq.read_metadata(written).num_rows
    section, total = recipe.preferences, 0
    for source in section.sources:
        if source.n_pairs is None and not is_local(source):
            return None
        total += source.n_pairs or len(_read(source, section).preferences)
    return total


def read_preferences(folder: Path) -> list[Preference]:
    """The preferences that `preferences_stage` wrote into a folder, in their order."""
    table = pq.read_table(folder / "preferences.parquet", schema=PREFERENCES_SCHEMA)
    return [Preference(**{**row, "prompt": tuple(json.loads(row["prompt"]))}) for row in table.to_pylist()]


def _row(preference: Preference) -> dict[str, Any]:
    return {**preference._asdict(), "prompt": json.dumps(preference.prompt, ensure_ascii=False)}


def _facts(source: PreferenceSource, found: _Found) -> dict[str, Any]:
    """What the card says of a source."""
    pairs = found.preferences
    return {
        "source": source.title,
        "kind": source.kind,
        "licence": source.licence,
        "n_pairs": len(pairs),
        "n_held_out": sum(pair.held_out for pair in pairs),
        "n_left_out": dict(sorted(found.left_out.items())),
        "n_words_chosen": sum(len(pair.chosen.split()) for pair in pairs),
        "n_words_rejected": sum(len(pair.rejected.split()) for pair in pairs),
    }


# --- gathering ----------------------------------------------------------------------------------------------------


def _gathered(section: PreferencesSection, seed: int) -> list[_Found]:
    taken: set[str] = set()
    found = []
    for source in section.sources:
        each = _read(source, section)
        found.append(_chosen(source, each, taken, seed))
    found = _with_unique_ids(found)
    _check_both_sides([pair for each in found for pair in each.preferences])
    return found


def _read(source: PreferenceSource, section: PreferencesSection) -> _Found:
    """All pairs of a source in the order of its rows."""
    preferences, left_out = [], Counter[str]()
    for number, row in enumerate(rows(source), 1):
        try:
            preferences.append(_preference(source, section, number, row, pair_of(row)))
        except Fault as fault:
            if section.bad_pairs == "stop" and not fault.expected:
                raise InputError(
                    f"{source.path}: {_name(number, row)} {fault.reason}. Mend or remove it, or set "
                    'preferences.bad_pairs = "skip" to leave such rows out; they are counted.'
                ) from fault
            left_out[fault.reason] += 1
    return _Found(preferences, left_out)


def _preference(
    source: PreferenceSource, section: PreferencesSection, number: int, row: dict[str, Any], pair: Pair
) -> Preference:
    return Preference(
        id=_given_id(source, number, row) or _digest(source.kind, *pair)[:16],
        kind=source.kind,
        source=source.title,
        prompt=pair.prompt,
        chosen=pair.chosen,
        rejected=pair.rejected,
        held_out=_unit("held out", pair.prompt) < section.held_out,
        harm_chosen=_harm(source, number, row, "harm_chosen"),
        harm_rejected=_harm(source, number, row, "harm_rejected"),
    )


def _given_id(source: PreferenceSource, number: int, row: dict[str, Any]) -> str:
    given = row.get("id")
    if given is None or given == "":
        return ""
    if isinstance(given, bool) or not isinstance(given, str | int):
        raise InputError(f"{source.path}: row {number} has the id {given!r}; ids are texts or whole numbers.")
    return str(given)


def _harm(source: PreferenceSource, number: int, row: dict[str, Any], column: str) -> float | None:
    value = row.get(column)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise InputError(
            f"{source.path}: {_name(number, row)} has {column} = {value!r}, which is no number; "
            "give a number, or leave it empty."
        )
    return float(value)


def _chosen(source: PreferenceSource, found: _Found, taken: set[str], seed: int) -> _Found:
    """The pairs that no source has given yet, as many as are asked for, in an order that the seed and ids decide."""
    fresh = []
    for preference in sorted(found.preferences, key=lambda pair: (_unit(seed, pair.id), pair.id)):
        content = _digest(preference.prompt, preference.chosen, preference.rejected)
        if content in taken:
            found.left_out["is there twice"] += 1
        else:
            taken.add(content)
            fresh.append(preference)
    wanted = len(fresh) if source.n_pairs is None else source.n_pairs
    if not fresh or wanted > len(fresh):
        raise InputError(
            f"{source.path} gives {len(fresh):,} new pairs, and {max(wanted, 1):,} are asked for; "
            "lower its n_pairs, or name another source."
        )
    return _Found(fresh[:wanted], found.left_out)


def _with_unique_ids(found: list[_Found]) -> list[_Found]:
    """The same with a source's number before its ids where an earlier source has one of them too."""
    seen: set[str] = set()
    named = []
    for number, (preferences, left_out) in enumerate(found, 1):
        _check_once(pair.id for pair in preferences)
        if seen & {pair.id for pair in preferences}:
            preferences = [pair._replace(id=f"{number}/{pair.id}") for pair in preferences]
        seen |= {pair.id for pair in preferences}
        named.append(_Found(preferences, left_out))
    _check_once(pair.id for each in named for pair in each.preferences)
    return named


def _check_once(ids: Iterable[str]) -> None:
    twice = sorted(id for id, n in Counter(ids).items() if n > 1)
    if twice:
        shown = ", ".join(twice[:5]) + (f" and {len(twice) - 5} more" if len(twice) > 5 else "")
        raise InputError(f"different pairs have the same id: {shown}; give every row an id of its own, or none.")


def _check_both_sides(preferences: list[Preference]) -> None:
    """Pairs about safety are needed to train on and to measure with."""
    held_out = [pair.held_out for pair in preferences if pair.kind == "safety"]
    if all(held_out) or not any(held_out):
        raise InputError(
            f"of {len(held_out)} pairs about safety {sum(held_out)} are held out, so there are none to "
            f"{'train on' if all(held_out) else 'measure with'}; add pairs or change preferences.held_out."
        )


def _name(number: int, row: dict[str, Any]) -> str:
    given = row.get("id")
    return f"row {number}" if given in (None, "") else f"row {number} (id {given})"


def _digest(*parts: Any) -> str:
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True)
    return hashlib.blake2b(text.encode(errors="replace"), digest_size=16).hexdigest()


def _unit(*parts: Any) -> float:
    """A number in [0, 1) from what is given alone, the same on every machine and in every order."""
    return int(_digest(*parts)[:16], 16) / 2**64
