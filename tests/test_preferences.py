"""Preference data in its three forms: what becomes a pair, under which id, on which side, and what is left out."""

import gzip
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from safesail import Recipe
from safesail.assets import asset
from safesail.errors import InputError
from safesail.reward_recipe import PreferencesSection, RewardRecipe
from safesail.rewards import preferences as module
from safesail.rewards.preferences import Preference, gather, n_pairs, preferences_stage, read_preferences
from safesail.run import StageWork

REPOSITORY = Path(__file__).resolve().parent.parent

HH = REPOSITORY.parent / "shared/data/hh-rlhf/hh_harmless_test.jsonl.gz"


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def pairs(n: int, start: int = 0) -> list[dict[str, Any]]:
    """Ordinary rows with ids."""
    return [
        {"id": f"p{i}", "prompt": f"question {i}", "chosen": f"yes {i}", "rejected": f"no {i}"}
        for i in range(start, start + n)
    ]


def write(folder: Path, rows: list[dict[str, Any]], name: str = "pairs.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def section(*paths: str, kind: str = "safety", n_pairs: int | None = None, **more: Any) -> PreferencesSection:
    sources = [{"path": path, "kind": kind, "n_pairs": n_pairs} for path in paths]
    return PreferencesSection.model_validate({"sources": sources, **more})


def only(folder: Path, row: dict[str, Any], **more: Any) -> Preference:
    """What becomes of a row among ordinary ones that have every column it has."""
    found = gather(section(write(folder, [{"id": "only", **row}, *as_columns(row)]), **more), 0)
    return next(each for each in found if each.id == "only")


def as_columns(row: dict[str, Any]) -> list[dict[str, Any]]:
    """Eight ordinary rows in the form of the given one."""
    if isinstance(row["chosen"], list):
        return [
            {"id": str(i), "chosen": [user(f"q{i}"), assistant("a")], "rejected": [user(f"q{i}"), assistant("b")]}
            for i in range(8)
        ]
    if "prompt" not in row:
        return [
            {"id": str(i), "chosen": f"\n\nHuman: q{i}\n\nAssistant: a", "rejected": f"\n\nHuman: q{i}\n\nAssistant: b"}
            for i in range(8)
        ]
    prompt = (lambda i: [user(f"q{i}")]) if isinstance(row["prompt"], list) else (lambda i: f"q{i}")
    return [{"id": str(i), "prompt": prompt(i), "chosen": "a", "rejected": "b"} for i in range(8)]


# --- forms --------------------------------------------------------------------------------------------------------


def test_a_prompt_with_two_answers(tmp_path: Path):
    pair = only(tmp_path, {"prompt": "How?", "chosen": "So.", "rejected": "No."})
    assert (pair.prompt, pair.chosen, pair.rejected) == ((user("How?"),), "So.", "No.")
    assert pair.messages("rejected") == [user("How?"), assistant("No.")]
    assert (pair.kind, pair.source) == ("safety", "pairs.jsonl")


def test_a_prompt_of_messages_and_an_answer_as_messages(tmp_path: Path):
    before = [{"role": "system", "content": "Be kind."}, user("How?")]
    pair = only(tmp_path, {"prompt": before, "chosen": [assistant("So.")], "rejected": [assistant("No.")]})
    assert pair.prompt == tuple(before)
    assert (pair.chosen, pair.rejected) == ("So.", "No.")


def test_whole_conversations_share_all_but_the_answer_which_is_not_their_prompt_again(tmp_path: Path):
    begun = [user("a"), assistant("b"), user("c")]
    row = {"prompt": "a", "chosen": [*begun, assistant("d")], "rejected": [*begun, assistant("e")]}
    pair = only(tmp_path, row)
    assert pair.prompt == tuple(begun)
    assert (pair.chosen, pair.rejected) == ("d", "e")


def test_texts_of_turns(tmp_path: Path):
    begun = "\n\nHuman: one\n\ntwo\n\nAssistant: three\n\nAssistant: four\n\nHuman: five"
    row = {"chosen": f"{begun}\n\nAssistant: six", "rejected": f"{begun}\n\nAssistant: seven "}
    pair = only(tmp_path, row)
    assert pair.prompt == (user("one\n\ntwo"), assistant("three\n\nfour"), user("five"))
    assert (pair.chosen, pair.rejected) == ("six", "seven")


def test_sides_that_part_earlier_are_left_out_and_counted(tmp_path: Path):
    row = {
        "chosen": "\n\nHuman: x\n\nAssistant: a\n\nHuman: more\n\nAssistant: b",
        "rejected": "\n\nHuman: x\n\nAssistant: c\n\nHuman: more\n\nAssistant: d",
    }
    path = write(tmp_path, [{"id": "early", **row}, *as_columns(row)])
    (found,) = module._gathered(section(path), 0)
    assert found.left_out == Counter({"has sides that part before the last answer": 1})
    assert len(found.preferences) == 8


# --- bad rows -----------------------------------------------------------------------------------------------------

BAD = [
    ({"chosen": "a", "rejected": None}, "lacks a side"),
    ({"chosen": "a", "rejected": " \n"}, "has an empty side"),
    ({"chosen": "a", "rejected": "a "}, "has two equal sides"),
    ({"chosen": "a", "rejected": "b", "prompt": None}, "has no prompt, and its sides are no conversations"),
    ({"chosen": "a", "rejected": "b", "prompt": " "}, "has no prompt"),
    ({"chosen": None, "rejected": None, "prompt": None}, "lacks a side"),
]


@pytest.mark.parametrize(("row", "reason"), BAD)
def test_a_bad_row_stops_by_name_or_is_counted(tmp_path: Path, row: dict[str, Any], reason: str):
    path = write(tmp_path, [*pairs(8), {"id": "stray", "prompt": "q", **row}, *pairs(8, 8)])
    with pytest.raises(InputError) as error:
        gather(section(path), 0)
    told = str(error.value)
    assert told.startswith(f"{path}: row 9 (id stray) {reason}")
    assert 'preferences.bad_pairs = "skip"' in told
    (found,) = module._gathered(section(path, bad_pairs="skip"), 0)
    assert sum(found.left_out.values()) == 1
    assert next(iter(found.left_out)).startswith(reason)
    assert {pair.id: pair.chosen for pair in found.preferences} == {f"p{i}": f"yes {i}" for i in range(16)}


def test_a_conversation_must_end_with_the_assistant(tmp_path: Path):
    row = {"chosen": [user("q"), assistant("a"), user("b")], "rejected": [user("q"), assistant("a"), user("c")]}
    with pytest.raises(InputError, match="does not end with the assistant's answer"):
        only(tmp_path, row)


def test_an_unknown_role_is_named(tmp_path: Path):
    row = {"chosen": [{"role": "bot", "content": "a"}], "rejected": [{"role": "bot", "content": "b"}]}
    with pytest.raises(InputError, match=r"role 'bot' .roles are system, user, assistant, tool."):
        only(tmp_path, row)


def test_a_line_that_is_no_json_is_an_input_error(tmp_path: Path):
    path = write(tmp_path, pairs(8))
    Path(path).write_text(Path(path).read_text() + "stray line\n")
    with pytest.raises(InputError, match=r"cannot be read as json: .*row"):
        gather(section(path, bad_pairs="skip"), 0)


def test_missing_columns_files_and_kinds_of_files(tmp_path: Path):
    path = write(tmp_path, [{"prompt": "q", "answer": "a"}])
    with pytest.raises(InputError, match="has no column 'chosen'; it has prompt, answer"):
        gather(section(path), 0)
    with pytest.raises(InputError, match="there is no file of preferences"):
        gather(section(str(tmp_path / "none.jsonl")), 0)
    (tmp_path / "pairs.xml").write_text("<pairs/>")
    with pytest.raises(InputError, match=r"is none of .json, .jsonl"):
        gather(section(str(tmp_path / "pairs.xml")), 0)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(InputError, match="is empty"):
        gather(section(str(tmp_path / "empty.jsonl")), 0)


# --- ids ----------------------------------------------------------------------------------------------------------


def test_ids_of_rows_texts_or_numbers_or_made_of_the_content(tmp_path: Path):
    numbered = [{**row, "id": 7 + i} for i, row in enumerate(pairs(9))]
    assert {pair.id for pair in gather(section(write(tmp_path, numbered)), 0)} == {str(7 + i) for i in range(9)}
    bare = [{key: value for key, value in row.items() if key != "id"} for row in pairs(9)]
    forth = {pair.chosen: pair.id for pair in gather(section(write(tmp_path, bare)), 0)}
    back = {pair.chosen: pair.id for pair in gather(section(write(tmp_path, bare[::-1])), 0)}
    assert forth == back
    assert len(set(forth.values())) == 9
    fractions = [{**row, "id": 0.5 + i} for i, row in enumerate(pairs(9))]
    with pytest.raises(InputError, match=r"row 1 has the id 0.5"):
        gather(section(write(tmp_path, fractions)), 0)


def test_two_pairs_of_one_id_are_named(tmp_path: Path):
    rows = [*pairs(9), {"id": "p3", "prompt": "other", "chosen": "a", "rejected": "b"}]
    with pytest.raises(InputError, match="different pairs have the same id: p3;"):
        gather(section(write(tmp_path, rows)), 0)


def test_sources_that_share_ids_are_numbered(tmp_path: Path):
    other = [{**row, "chosen": "another"} for row in pairs(9)]
    paths = write(tmp_path, pairs(9)), write(tmp_path, other, "other.jsonl")
    found = gather(section(*paths), 0)
    assert {pair.id for pair in found if pair.source == "pairs.jsonl"} == {f"p{i}" for i in range(9)}
    assert {pair.id for pair in found if pair.source == "other.jsonl"} == {f"2/p{i}" for i in range(9)}


def test_a_pair_is_taken_once(tmp_path: Path):
    again = [{**row, "id": f"again {row['id']}"} for row in pairs(12)]
    (first, second) = module._gathered(
        section(write(tmp_path, [*pairs(9), pairs(9)[0]]), write(tmp_path, again, "more.jsonl")), 0
    )
    assert len(first.preferences) == 9
    assert first.left_out == Counter({"is there twice": 1})
    assert {pair.chosen for pair in second.preferences} == {"yes 9", "yes 10", "yes 11"}
    assert second.left_out == Counter({"is there twice": 9})


# --- which pairs, which side --------------------------------------------------------------------------------------


def test_the_order_of_lines_decides_nothing(tmp_path: Path):
    forth = gather(section(write(tmp_path, pairs(60)), n_pairs=20), 3)
    back = gather(section(write(tmp_path, [{**p} for p in pairs(60)[::-1]], "pairs.jsonl"), n_pairs=20), 3)
    assert forth == back
    assert len(forth) == 20
    other = gather(section(write(tmp_path, pairs(60)), n_pairs=20), 4)
    assert {pair.id for pair in other} != {pair.id for pair in forth}


def test_more_pairs_than_there_are(tmp_path: Path):
    with pytest.raises(InputError, match="gives 9 new pairs, and 10 are asked for"):
        gather(section(write(tmp_path, pairs(9)), n_pairs=10), 0)


def test_whole_prompts_are_held_out_whatever_else_is_read(tmp_path: Path):
    twins = [
        {"id": f"{i}-{j}", "prompt": f"question {i}", "chosen": f"a {j}", "rejected": "b"}
        for i in range(200)
        for j in range(2)
    ]
    found = gather(section(write(tmp_path, twins)), 0)
    sides: dict[str, set[bool]] = {}
    for pair in found:
        sides.setdefault(pair.prompt[0]["content"], set()).add(pair.held_out)
    assert all(len(of) == 1 for of in sides.values())
    share = sum(True in of for of in sides.values()) / 200
    assert 0.15 < share < 0.35  # 0.25, give or take three standard errors of 0.03
    with_others = gather(section(write(tmp_path, [*pairs(5, 1000), *twins]), write(tmp_path, pairs(50), "b.jsonl")), 9)
    assert all(pair.held_out in sides[c] for pair in with_others if (c := pair.prompt[0]["content"]) in sides)


def test_pairs_about_safety_on_one_side_alone(tmp_path: Path):
    with pytest.raises(InputError, match="of 1 pairs about safety"):
        gather(section(write(tmp_path, pairs(1))), 0)


# --- harm, stage --------------------------------------------------------------------------------------------------


def test_harm_is_a_number_or_nothing(tmp_path: Path):
    rows = [{**row, "harm_chosen": 0.25, "harm_rejected": None if i else 3} for i, row in enumerate(pairs(9))]
    found = {pair.id: pair for pair in gather(section(write(tmp_path, rows)), 0)}
    assert (found["p0"].harm_chosen, found["p0"].harm_rejected) == (0.25, 3.0)
    assert found["p1"].harm_rejected is None
    rows = [{**row, "harm_rejected": "high"} for row in pairs(9)]
    with pytest.raises(InputError, match=r"row 1 .id p0. has harm_rejected = 'high', which is no number"):
        gather(section(write(tmp_path, rows)), 0)


def test_the_stage_writes_what_it_reads_again_and_counts(tmp_path: Path):
    rows = [*pairs(12), {"id": "x", "prompt": "q", "chosen": "same words", "rejected": "same words"}]
    path = write(tmp_path, rows)
    recipe = recipe_with(section(path, bad_pairs="skip").model_dump(mode="json"))
    work = StageWork(tmp_path)
    preferences_stage(recipe, work)
    found = read_preferences(tmp_path)
    assert found == gather(recipe.preferences, recipe.seed)
    n_held_out = sum(pair.held_out for pair in found)
    assert work.facts["sources"] == [
        {
            "source": "pairs.jsonl",
            "kind": "safety",
            "licence": "",
            "n_pairs": 12,
            "n_held_out": n_held_out,
            "n_left_out": {"has two equal sides": 1},
            "n_words_chosen": 24,
            "n_words_rejected": 24,
        }
    ]
    assert (work.facts["n_pairs"], work.facts["n_held_out"]) == (12, n_held_out)
    before = (tmp_path / "preferences.parquet").read_bytes()
    preferences_stage(recipe, StageWork(tmp_path))
    assert (tmp_path / "preferences.parquet").read_bytes() == before


def test_a_plan_counts_the_pairs_of_local_files_and_those_that_are_asked_of_the_hub(tmp_path: Path):
    local = {"path": write(tmp_path, [*pairs(12), {"prompt": "q", "chosen": "", "rejected": "a"}]), "kind": "safety"}
    hub = {"path": "org/pairs", "kind": "chat"}
    nowhere = tmp_path / "scratch"
    assert n_pairs(recipe_with({"sources": [local], "bad_pairs": "skip"}), nowhere) == 12
    assert n_pairs(recipe_with({"sources": [local, {**hub, "n_pairs": 7}], "bad_pairs": "skip"}), nowhere) == 19
    assert n_pairs(recipe_with({"sources": [local, hub], "bad_pairs": "skip"}), nowhere) is None
    with pytest.raises(InputError, match="row 13 has an empty side"):
        n_pairs(recipe_with({"sources": [local]}), nowhere)
    gathered = recipe_with({"sources": [{**local, "n_pairs": 5}], "bad_pairs": "skip", "held_out": 0.5})
    preferences_stage(gathered, StageWork(tmp_path))
    assert n_pairs(recipe_with({"sources": [{**hub, "kind": "safety"}]}), tmp_path) == 5
    assert n_pairs(Recipe.load(asset("hub/recipes/demo.toml")), nowhere) is None


def recipe_with(preferences: dict[str, Any]) -> RewardRecipe:
    return RewardRecipe.parse(
        {
            "name": "made",
            "model": {"path": "none"},
            "preferences": preferences,
            "corpus": {"n_tokens": 100, "n_held_out_tokens": 10, "sources": [{"path": "none.jsonl"}]},
            "harvest": {"hook_points": ["layers.0"]},
            "train": {"d_sae": 16, "k": [2]},
            "rate": {"encoder": "none"},
        }
    )


@pytest.mark.skipif(not HH.is_file(), reason="the shared data are not here")
def test_hh_rlhf(tmp_path: Path):
    # counted apart from this code: 2,312 rows, of which 4 have an empty side
    (found,) = module._gathered(section(str(HH), bad_pairs="skip"), 0)
    assert found.left_out == Counter({"has an empty side": 4})
    assert len(found.preferences) == 2308
    with gzip.open(HH, "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    said = {row["chosen"].rpartition("\n\nAssistant:")[2].strip() for row in rows}
    assert sum(pair.chosen in said for pair in found.preferences) >= 2290
