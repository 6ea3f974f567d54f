"""`recipe.toml` of a published release: what `safesail run` needs to make it again.

Without `[runtime]`, which changes no byte of a release and may name machines, and without the places of local files.
"""

import json
import tomllib
from pathlib import Path
from typing import Any

from safesail.recipe import Recipe, differences
from safesail.reward_recipe import RewardRecipe, parse_recipe

__all__ = ["recipe_toml", "without_place"]

Row = dict[str, Any]
_PLACES = ("path", "model", "tokenizer", "encoder")
"""Settings that may be local paths."""


def recipe_toml(recipe: Recipe | RewardRecipe) -> str:
    """The recipe as TOML with every setting, defaults included; a setting that is empty (None) has no line.

    TOML cannot say that a setting is empty whose default is not: a comment names it.
    """
    settings = {name: value for name, value in recipe.dump().items() if name != "runtime"}
    for section in _with_places(settings):
        section |= {key: without_place(section[key]) for key in _PLACES if key in section}
    if "select" in settings:
        settings["select"]["pairs"] = [without_place(name) for name in settings["select"]["pairs"]]
    text = "\n".join(_lines("", settings)).strip() + "\n"
    meant, said = parse_recipe(settings).dump(), parse_recipe(tomllib.loads(text)).dump()
    return "".join(f"# cannot be said here: {line}\n" for line in differences(said, meant)) + text


def _with_places(settings: Row) -> list[Row]:
    """The sections and sources that may name a local file or folder, of either kind of recipe."""
    sections = [settings[name] for name in ("model", "explain", "score", "rate") if name in settings]
    sources = [settings[name]["sources"] for name in ("corpus", "preferences") if name in settings]
    return [*sections, *(source for each in sources for source in each)]


def without_place(path: str) -> str:
    """A Hub id, or a path inside the working folder, as it is; of another file or folder the name alone."""
    local = Path(path)
    outside = local.is_absolute() or path.startswith("~") or ".." in local.parts
    return local.name if outside else path


def _lines(name: str, table: Row) -> list[str]:
    """A TOML table: its values, then its sub-tables and arrays of tables."""
    values = [f"{key} = {_value(value)}" for key, value in table.items() if not _is_table(value) and value is not None]
    inner = [
        line
        for key, value in table.items()
        if _is_table(value)
        for row in (value if isinstance(value, list) else [value])
        for line in _lines(_header(name, key, value), row)
    ]
    return [*([name] if name else []), *values, "", *inner]


def _header(parent: str, key: str, value: Any) -> str:
    path = ".".join(filter(None, (parent.strip("[]"), key)))
    return f"[[{path}]]" if isinstance(value, list) else f"[{path}]"


def _is_table(value: Any) -> bool:
    return isinstance(value, dict) or (isinstance(value, list) and bool(value) and isinstance(value[0], dict))


def _value(value: Any) -> str:
    """A TOML value: JSON's strings, numbers, booleans and arrays are TOML's too, but for the character DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
