"""Licences: what a base model's and a text's leave to the release."""

from pathlib import Path

import pytest
from made_release import made_recipe, made_release

from safesail.assets import asset
from safesail.errors import InputError
from safesail.recipe import Recipe
from safesail.release.licences import LICENCES, card_licence, check, check_licences, conflict, licence_of_texts
from safesail.reward_recipe import load_recipe

COMMERCE = "allows commercial use, which is forbidden"


def recipe(folder: Path, own: str, model: str = "mit", *texts: str) -> Recipe:
    sources = [
        {"path": f"{i}.jsonl", "origin": f"T{i}", "licence": licence} for i, licence in enumerate(texts or ["mit"])
    ]
    return made_recipe(folder, publish={"licence": own}, model={"licence": model}, corpus={"sources": sources})


@pytest.mark.parametrize(
    ("licence", "parent", "copied", "said"),
    [
        ("apache-2.0", "mit", True, ""),
        ("apache-2.0", "cc-by-nc-4.0", False, COMMERCE),
        ("apache-2.0", "qwen-research", True, COMMERCE),
        ("cc-by-nc-4.0", "qwen-research", True, ""),
        ("cc-by-nc-4.0", "mit", True, ""),
        ("mit", "cc-by-sa-4.0", True, "is not cc-by-sa-4.0, which is demanded"),
        ("mit", "cc-by-sa-4.0", False, ""),  # SAEs do not hold the texts they were trained on
        ("cc-by-sa-4.0", "cc-by-sa-3.0", True, ""),
        ("cc-by-sa-3.0", "cc-by-sa-4.0", True, "is not cc-by-sa-4.0, which is demanded"),
        ("agpl-3.0", "gpl-3.0", True, ""),
        ("apache-2.0", "gemma", True, "is not gemma, which is demanded"),
        ("gemma", "gemma", True, ""),
        ("cc-by-nc-4.0", "cc-by-nc-sa-4.0", True, "is not cc-by-nc-sa-4.0, which is demanded"),
        ("MIT ", "mit", True, ""),
        ("apache-2.0", "house-rules", True, ""),  # unknown, so nothing is said of it
        ("house-rules", "cc-by-nc-4.0", True, ""),
    ],
)
def test_what_a_licence_permits_although_another_forbids_it(licence: str, parent: str, copied: bool, said: str):
    assert conflict(licence, parent, copied=copied) == said


@pytest.mark.parametrize("path", sorted((asset("hub") / "recipes").glob("*.toml")), ids=lambda path: path.stem)
def test_the_shipped_recipes_are_in_order(path: Path):
    check_licences(load_recipe(path))


def test_a_release_may_not_permit_what_the_base_model_forbids(tmp_path: Path):
    with pytest.raises(InputError) as caught:
        check_licences(recipe(tmp_path, "apache-2.0", "qwen-research"))
    assert str(caught.value) == (
        "publish.licence = 'apache-2.0' allows commercial use, which is forbidden by the licence of the base model, "
        "'qwen-research'; set publish.licence = \"qwen-research\"."
    )


def test_nor_what_a_text_forbids(tmp_path: Path):
    with pytest.raises(
        InputError, match=r"of the texts T1, 'cc-by-nc-4\.0'; set publish\.licence = \"cc-by-nc-4\.0\"\.$"
    ):
        check_licences(recipe(tmp_path, "mit", "apache-2.0", "mit", "cc-by-nc-4.0"))


def test_the_advice_satisfies_all_parents_or_says_that_none_does(tmp_path: Path):
    with pytest.raises(InputError, match=r'set publish.licence = "cc-by-nc-sa-4.0"\. \(1 more are in conflict\.\)'):
        check_licences(recipe(tmp_path, "mit", "cc-by-nc-sa-4.0", "cc-by-nc-4.0"))
    with pytest.raises(InputError, match="no known licence satisfies all of them: leave one out"):
        check_licences(recipe(tmp_path, "mit", "gpl-3.0", "cc-by-nc-4.0"))


@pytest.mark.parametrize("own", ["", "mixed", "other"])
def test_a_release_needs_a_licence(tmp_path: Path, own: str):
    with pytest.raises(InputError, match=r'set it to the licence of the release, as publish.licence = "mit"'):
        check_licences(recipe(tmp_path, own))


def test_what_is_not_known_is_named_and_not_refused(tmp_path: Path):
    made = recipe(tmp_path, "house-rules", "", "mixed", "secret-1.0", "mit")
    check_licences(made)
    assert [problem.sentence for problem in check(made)] == [
        "The licence of the release, house-rules, is not one that was checked; read it before use.",
        "The licence of the base model is not stated.",
        "The licence of the texts T0 is mixed: parts have different or unclear terms.",
        "The licence of the texts T1, secret-1.0, is not one that was checked; read it before use.",
    ]
    research = check(recipe(tmp_path, "cc-by-nc-4.0", "qwen-research"))
    assert [(problem.sentence, problem.refused) for problem in research] == [
        ("The licence of the base model, qwen-research, is for research and evaluation alone.", False)
    ]


@pytest.mark.parametrize("one", sorted(LICENCES))
@pytest.mark.parametrize("other", ["mit", "cc-by-sa-4.0", "cc-by-nc-4.0", "qwen-research", "mixed", ""])
def test_the_examples_never_permit_what_their_texts_forbid(one: str, other: str):
    """They hold the texts themselves: one licence only where all agree, else `other`, which grants nothing."""
    for texts in ([one, one], [one, other]):
        front = licence_of_texts(texts)
        assert front == {"license": "other", "license_name": "licences-of-the-sources"} or all(
            conflict(front["license"], text, copied=True) == "" and text for text in texts
        )


@pytest.mark.parametrize(
    ("licence", "front"),
    [
        ("Apache-2.0", {"license": "apache-2.0"}),
        ("qwen-research", {"license": "other", "license_name": "qwen-research"}),  # not a name that the Hub knows
        ("House Rules, v2", {"license": "other", "license_name": "house-rules-v2"}),
        ("---\nx: y", {"license": "other", "license_name": "x-y"}),
        ("???", {"license": "other", "license_name": "unnamed"}),
    ],
)
def test_the_front_matter_has_names_that_the_hub_takes(licence: str, front: dict[str, str]):
    assert card_licence(licence) == front


def test_the_cards_say_what_is_not_known(tmp_path: Path):
    folder = made_release(tmp_path, recipe(tmp_path, "mit", "", "mixed"))
    for part in ("saes", "neurons"):
        text = (folder / part / "README.md").read_text(encoding="utf-8")
        assert "- The licence of the base model is not stated.\n" in text
        assert "- The licence of the texts T0 is mixed: parts have different or unclear terms.\n" in text
