"""Concept contrastive query pairs: one query with a safety concept, and the same query without it.

Reads `hub/pairs/<language>.jsonl`, one pair a line. A latent that fires on the `with` side and not on the `without`
side distinguishes the pair.
"""

import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from safesail.assets import asset
from safesail.errors import InputError
from safesail.taxonomy import Taxonomy

__all__ = ["Pair", "check_pairs", "load_pairs"]

LENGTH_RATIO = (0.7, 1.45)
"""The least and the greatest allowed n_words(with) / n_words(without)."""

Text = Annotated[str, StringConstraints(pattern=r"^\S(.*\S)?$")]


class Pair(BaseModel):
    """Two queries that differ in one concept; `concept` is the word or words of `with` that carry it."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, strict=True)

    id: Text
    domain: Text
    category: Text
    concept: Text
    language: Annotated[str, StringConstraints(pattern=r"^[a-z]{2,3}(-[A-Za-z0-9]+)*$")]
    with_concept: Text = Field(validation_alias="with", serialization_alias="with")
    without_concept: Text = Field(validation_alias="without", serialization_alias="without")


def load_pairs(name_or_path: Path | str) -> list[Pair]:
    """The pairs of a JSONL file, or of a shipped one by its bare name as `"en"`; raises InputError at a broken line."""
    path = _find(name_or_path)
    pairs = []
    for number, line in _lines(path):
        pair = _parse(line)
        if isinstance(pair, str):
            raise InputError(f"{path}, line {number}: {pair}; see every problem with: safesail pairs check {path}")
        pairs.append(pair)
    return pairs


def check_pairs(path: Path | str, taxonomy: Taxonomy) -> list[str]:
    """Every problem of the pair file, one sentence each with line number and field; an empty list when it is good."""
    problems, seen = [], {}
    for number, line in _lines(_find(path)):
        pair = _parse(line)
        found = [pair] if isinstance(pair, str) else [*_problems(pair, taxonomy), *_repeats(pair, number, seen)]
        problems += [f"line {number}: {problem}." for problem in found]
    return problems


def _find(name_or_path: Path | str) -> Path:
    if isinstance(name_or_path, Path) or not re.fullmatch(r"[\w-]+", name_or_path):
        return Path(name_or_path)
    try:
        return asset(f"hub/pairs/{name_or_path}.jsonl")
    except FileNotFoundError:
        names = ", ".join(sorted(file.stem for file in asset("hub/pairs").glob("*.jsonl")))
        raise InputError(f"no pairs named {name_or_path!r}; use one of: {names}, or a path ending in .jsonl") from None


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """The lines that are not blank, each with its number from 1."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read the pairs {path} ({error.strerror}); give an existing .jsonl file") from None
    yield from ((number, line) for number, line in enumerate(content.split(b"\n"), 1) if line.strip())


def _parse(line: bytes) -> Pair | str:
    """The pair on a line, or what is wrong with it."""
    try:
        return Pair.model_validate_json(line, by_alias=True, by_name=False)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if not first["loc"]:
            return f"not a JSON object with the fields of a pair ({first['msg']})"
        return f"field `{first['loc'][0]}`: {first['msg']}"


def _problems(pair: Pair, taxonomy: Taxonomy) -> Iterator[str]:
    yield from _place_problems(pair, taxonomy)
    yield from _id_problems(pair)
    yield from _text_problems(pair)
    yield from _concept_problems(pair)
    if pair.domain in taxonomy.domain_ids:
        for found in taxonomy.about(pair.domain).findall(pair.without_concept):
            yield f"field `without`: {found!r} is a word of the domain {pair.domain}; use a neutral word"


def _place_problems(pair: Pair, taxonomy: Taxonomy) -> Iterator[str]:
    try:
        taxonomy.domain(pair.domain)
    except InputError as error:
        yield f"field `domain`: {error}"
        return
    try:
        taxonomy.category(pair.domain, pair.category)
    except InputError as error:
        yield f"field `category`: {error}"


def _id_problems(pair: Pair) -> Iterator[str]:
    stem = f"{pair.domain}.{pair.category}"
    if not re.fullmatch(r"[a-z0-9-]+\.[a-z0-9-]+\.[0-9]{2,}", pair.id):
        yield f"field `id`: {pair.id!r} is not of the form domain.category.NN; write it as {stem}.01"
    elif pair.id.rpartition(".")[0] != stem:
        yield f"field `id`: {pair.id!r} disagrees with the fields `domain` and `category`; it should begin with {stem}"


def _text_problems(pair: Pair) -> Iterator[str]:
    words, neutral_words = _words(pair.with_concept), _words(pair.without_concept)
    if words == neutral_words:
        yield "field `without`: the text equals `with`; replace the concept by a neutral word"
    ratio = len(words) / max(len(neutral_words), 1)
    if not LENGTH_RATIO[0] <= ratio <= LENGTH_RATIO[1]:
        yield (
            f"field `without`: {len(words)} words in `with` against {len(neutral_words)} here, a ratio of {ratio:.2f}; "
            f"keep it within {LENGTH_RATIO[0]} and {LENGTH_RATIO[1]}"
        )


def _concept_problems(pair: Pair) -> Iterator[str]:
    for word in pair.concept.split():
        if not _contains(pair.with_concept, word):
            yield f"field `concept`: {word!r} is not a word of `with`; write the word as `with` has it"
        if _contains(pair.without_concept, word):
            yield f"field `without`: {word!r} is a word of the concept; use a neutral word"


def _repeats(pair: Pair, number: int, seen: dict[tuple[str, str], int]) -> Iterator[str]:
    """What the pair has in common with an earlier line; `seen` maps (kind, value) to the line where it stood first."""
    texts = {"with": " ".join(_words(pair.with_concept)), "without": " ".join(_words(pair.without_concept))}
    for field, key in [("id", ("id", pair.id)), *((field, ("text", text)) for field, text in texts.items())]:
        first = seen.setdefault(key, number)
        if first != number:
            yield f"field `{field}`: the {key[0]} {key[1]!r} already stands on line {first}; change or remove one"


def _words(text: str) -> list[str]:
    """The case-folded words: runs of letters, marks and digits of any script; each Chinese or Japanese sign is one."""
    spaced = "".join(sign if unicodedata.category(sign)[0] in "LMN" else " " for sign in text)
    return re.sub("([\u3040-\u30ff\u3400-\u9fff])", r" \1 ", spaced).casefold().split()


def _contains(text: str, word: str) -> bool:
    return f" {' '.join(_words(word))} " in f" {' '.join(_words(text))} "
