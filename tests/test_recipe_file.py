"""The recipe that is published beside the SAEs: it makes the release again and tells no place."""

import re
import tomllib
from pathlib import Path

import pytest
from made_release import made_recipe

from safesail.recipe import Recipe, differences
from safesail.release.recipe_file import recipe_toml
from safesail.run import Run


def test_the_published_recipe_is_the_one_that_made_the_release(demo_run: Path):
    """All settings but those of the machine; a file's place outside the working folder is not told."""
    recipe, published = Run.open(demo_run).recipe.dump(), Recipe.load(demo_run / "saes/recipe.toml").dump()
    changed = differences(published, recipe)
    assert {re.split(r"[ .]was ", line)[0] for line in changed} <= {"corpus.sources", "explain.encoder", "model.path"}
    assert published["model"]["path"] == Path(recipe["model"]["path"]).name


def test_a_recipe_comes_back_from_its_toml(tmp_path: Path):
    hostile = 'a "b" \\ \n\t# [x]\n= é 枪 \x7f \x01'
    recipe = made_recipe(tmp_path, model={"note": hostile}, select={"pairs": ["en"]}, train={"learning_rate": 1e-05})
    path = tmp_path / "recipe.toml"
    path.write_text(recipe_toml(recipe), encoding="utf-8")
    assert Recipe.load(path) == recipe
    path.write_text(recipe_toml(recipe.model_copy(update={"runtime": RUNTIME})), encoding="utf-8")
    assert "runtime" not in path.read_text(encoding="utf-8")


RUNTIME = Recipe.model_fields["runtime"].default.model_copy(update={"base_url": "http://10.0.0.1/v1"})


def test_what_toml_cannot_say_is_a_comment(tmp_path: Path):
    recipe = made_recipe(tmp_path, select={"pairs": ["en"]}, tokens={"sink_norm_multiple": None})
    first, second, *_ = recipe_toml(recipe).splitlines()
    assert first == "# cannot be said here: tokens.sink_norm_multiple was 10.0, is None"
    assert second == 'name = "made"'


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("org/model", "org/model"),
        ("demo-assets/x.jsonl", "demo-assets/x.jsonl"),
        ("/home/me/x.jsonl", "x.jsonl"),
        ("../x.jsonl", "x.jsonl"),
        ("~/models/own", "own"),
        ("", ""),
    ],
)
def test_a_published_recipe_names_no_place_outside_the_working_folder(path: str, said: str, tmp_path: Path):
    recipe = made_recipe(tmp_path, select={"pairs": ["en"]}, explain={"tokenizer": path})
    assert tomllib.loads(recipe_toml(recipe))["explain"]["tokenizer"] == said
