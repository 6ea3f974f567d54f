"""What a release of a reward model publishes of its latents and pairs: open numbers, and texts where they can be read.

Reads `salience/` (open) and `preferences/` (gated on the Hub: a reader needs a token whose owner accepted its
conditions; a release may also come without it).
"""

import tomllib
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from safesail.errors import InputError
from safesail.repository import Repository, part_of_release
from safesail.reward_recipe import RewardRecipe, parse_recipe

__all__ = ["Published", "PublishedPair", "Texts", "recipe_of", "said"]

Row = dict[str, Any]
_N_TOKENS = 6
"""Of the tokens on which a latent is strongest."""
_NUMBERS = ("kind", "source", "held_out", "score_safe", "margin", "reward_chosen", "reward_rejected")
_SPLITS = ("train", "test")


class Texts(NamedTuple):
    """The texts of a pair."""

    prompt: tuple[dict[str, str], ...]
    """The {role, content} before the answer."""
    chosen: str
    rejected: str


class PublishedPair(NamedTuple):
    """A pair of the preference data with its published numbers."""

    id: str
    kind: str
    """`safety` or `chat`."""
    source: str
    held_out: bool
    score_safe: float
    margin: float
    reward_chosen: float
    reward_rejected: float
    texts: Texts | None
    """None where `preferences/` cannot be read."""
    why_no_texts: str = ""


class Published:
    """The tables of a release: a run folder, or the Hub name its repositories start with.

    Keyword arguments (`revision`, `token`, `cache_dir`, …) mean what they mean in transformers.
    """

    def __init__(self, release: str | Path, **hub: Any) -> None:
        self.release = str(release)
        self._open = Repository(part_of_release(release, "salience"), "dataset", **hub)
        self._hub = hub
        self.latents: dict[int, Row] = {row["latent"]: row for row in self._open.table("salience/train.parquet")}
        """{latent: its row}; latents that never fired have none."""
        self.scores: dict[str, Row] = {row["pair_id"]: row for row in self._open.table("scores/train.parquet")}
        """{pair id: its row}."""

    @cached_property
    def comparison(self) -> list[Row]:
        """What editing the preference data did to retrained reward models."""
        return self._open.table("comparison/train.parquet")

    def safety(self, sign: str) -> list[int]:
        """The safety latents of a sign (positive or negative), those of largest |s| first."""
        rows = sorted(self.latents.values(), key=lambda row: row["rank"])
        return [row["latent"] for row in rows if row["safety"] == sign]

    def pair(self, id: str, texts: dict[str, Texts] | str) -> PublishedPair:
        """A pair. texts: of all pairs, or why there are none; InputError for an id that is not published."""
        if id not in self.scores:
            some = ", ".join(list(self.scores)[:3])
            raise InputError(f"{self.release} has no pair {id!r}; its ids are like {some}.")
        row = self.scores[id]
        found, why = (texts.get(id), "") if isinstance(texts, dict) else (None, texts)
        numbers = {name: row[name] for name in _NUMBERS}
        return PublishedPair(id=id, **numbers, texts=found, why_no_texts=why or ("" if found else _MISSING))

    def texts(self) -> dict[str, Texts] | str:
        """{pair id: its texts}, or the reason why they cannot be read, which may be another the next time."""
        try:
            return self._texts
        except InputError as error:
            return str(error)

    @cached_property
    def _texts(self) -> dict[str, Texts]:
        repository = self._gated()
        rows = [row for split in _SPLITS for row in repository.table(f"pairs/{split}.parquet")]
        return {row["id"]: Texts(tuple(row["prompt"]), said(row["chosen"]), said(row["rejected"])) for row in rows}

    @cached_property
    def explanations(self) -> dict[int, str]:
        """{latent: why it was rated as it is}; empty where ratings cannot be read."""
        rows = self._gated_rows("ratings")
        return {row["latent"]: row["explanation"] for row in rows if row["status"] == "ok"}

    @cached_property
    def strongest(self) -> dict[int, tuple[str, ...]]:
        """{latent: the tokens or words on which it is strongest}; empty where contexts cannot be read."""
        found: dict[int, list[str]] = {}
        for row in sorted(self._gated_rows("contexts"), key=lambda row: row["rank"]):
            tokens = found.setdefault(row["latent"], [])
            if row["token_class"] not in tokens and len(tokens) < _N_TOKENS:
                tokens.append(row["token_class"])
        return {latent: tuple(tokens) for latent, tokens in found.items()}

    def _gated_rows(self, config: str) -> list[Row]:
        """The rows of a gated table; none where it cannot be read, which `texts` gives the reason of."""
        try:
            return self._gated().table(f"{config}/train.parquet")
        except InputError:
            return []

    def _gated(self) -> Repository:
        """The gated part, each time anew: access may be given meanwhile."""
        repository = Repository(part_of_release(self.release, "preferences"), "dataset", **self._hub)
        if repository.folder is not None and not (repository.folder / "pairs").is_dir():
            raise InputError("this release comes without its preferences.")
        return repository


_MISSING = "the preferences that can be read here lack this pair."


def recipe_of(saes: Repository) -> RewardRecipe:
    """The recipe that a release was made by: it says how its texts were cut and where their segments end."""
    path = saes.file("recipe.toml")
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not valid TOML ({error}); fetch or build it again.") from error
    recipe = parse_recipe(data, str(path))
    if not isinstance(recipe, RewardRecipe):
        raise InputError(f"{path} is not the recipe of a reward model; fetch or build it again.")
    return recipe


def said(answer: list[dict[str, str]]) -> str:
    """An answer out of its list of one message; InputError where the list is empty."""
    if not answer:
        raise InputError("an answer of the published pairs is empty; fetch or build the preferences again.")
    return answer[-1]["content"]
