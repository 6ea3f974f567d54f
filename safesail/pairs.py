"""Concept contrastive query pairs: one query with a safety concept, and the same query without it.

Reads `hub/pairs/<language>.jsonl`, one pair a line. A latent that fires on the `with` side and not on the `without`
side distinguishes the pair.
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from safesail.assets import asset
from safesail.errors import InputError
from safesail.taxonomy import Taxonomy

__all__ = ["HalfPair", "Pair", "PairRules", "check_files", "check_pairs", "check_parallel", "load_pairs", "read_lines"]

LENGTH_RATIO = (0.7, 1.45)
"""The least and the greatest allowed length(with) / length(without), in words; in signs where no spaces are written."""

Text = Annotated[str, StringConstraints(pattern=r"^\S(.*\S)?$")]


class HalfPair(BaseModel):
    """A pair whose `without` is still to be written; `concept` is the word or words of `with` that carry it."""

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, strict=True)

    id: Text
    domain: Text
    category: Text
    concept: Text
    language: Annotated[str, StringConstraints(pattern=r"^[a-z]{2,3}(-[A-Za-z0-9]+)*$")]
    with_concept: Text = Field(validation_alias="with", serialization_alias="with")


class Pair(HalfPair):
    """Two queries that differ in one concept."""

    without_concept: Text = Field(validation_alias="without", serialization_alias="without")


Row = TypeVar("Row", bound=HalfPair)


def load_pairs(name_or_path: Path | str) -> list[Pair]:
    """The pairs of a JSONL file, or of a shipped one by its bare name as `"en"`; raises InputError at a broken line."""
    path = pairs_file(name_or_path)
    pairs = []
    for number, pair in read_lines(path, Pair):
        if isinstance(pair, str):
            raise InputError(f"{path}, line {number}: {pair}; see every problem with: safesail pairs check {path}")
        pairs.append(pair)
    return pairs


def read_lines(path: Path, kind: type[Row]) -> list[tuple[int, Row | str]]:
    """The lines that are not blank, each with its number from 1, as a `kind` or as what is wrong with it."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read the pairs {path} ({error.strerror}); give an existing .jsonl file") from None
    return [(number, _parse(line, kind)) for number, line in enumerate(content.split(b"\n"), 1) if line.strip()]


def check_pairs(path: Path | str, taxonomy: Taxonomy) -> list[str]:
    """Every problem of the pair file, one sentence each with line number and field; an empty list when it is good."""
    lines = read_lines(pairs_file(path), Pair)
    rules = PairRules(taxonomy, [(f"line {number}", pair) for number, pair in _pairs_of(lines)])
    problems = []
    for number, pair in lines:
        place = f"line {number}"
        found = [pair] if isinstance(pair, str) else [*rules.of_half(place, pair), *rules.of_twin(place, pair)]
        problems += [f"{place}: {problem}." for problem in found]
    return problems


def check_files(names: Sequence[Path | str], taxonomy: Taxonomy) -> list[str]:
    """Every problem of the pair files, or shipped sets by name: of each for itself, and of all against each other.

    Each sentence begins with the file as it was given, and the line number.
    """
    named = {str(name): pairs_file(name) for name in names}
    alone = [f"{name}, {problem}" for name, path in named.items() for problem in check_pairs(path, taxonomy)]
    return alone + check_parallel({name: _pairs_of(read_lines(path, Pair)) for name, path in named.items()})


def check_parallel(sets: Mapping[str, Iterable[tuple[int, Pair]]]) -> list[str]:
    """What keeps sets of several languages from being parallel, one sentence each; an empty list when they are.

    Pairs of one id in two languages agree in domain and category; two sets of one language share no id; and where one
    of the sets is English, it has every id of the others.

    sets: {name: (line number, pair), ...}.
    """
    problems: list[str] = []
    first: dict[tuple[str, ...], tuple[str, str, Pair]] = {}
    placed = [(name, f"{name}, line {number}", pair) for name, rows in sets.items() for number, pair in rows]
    english = {pair.id for _, _, pair in placed if pair.language == "en"}
    for name, place, pair in placed:
        twin = first.setdefault((pair.id,), (name, place, pair))
        same = first.setdefault((pair.id, pair.language), (name, place, pair))
        problems += [f"{place}: {problem}." for problem in _disagreements(pair, *twin[1:])]
        if same[0] != name:  # a repetition within one set is that set's own problem
            problems.append(
                f"{place}: field `id`: the id {pair.id!r} already stands on {same[1]}; change or remove one."
            )
        if english and pair.id not in english:
            problems.append(f"{place}: field `id`: no English pair has {pair.id!r}; add one or use the id of its twin.")
    return problems


class PairRules:
    """The rules of a set of pairs, asked line by line in the order of the file; an answer is a problem's sentence."""

    def __init__(self, taxonomy: Taxonomy, rows: Iterable[tuple[str, HalfPair]]):
        """rows: every row of the set with its place, as `line 3`: a concept may stand in no `without` of its domain."""
        self._taxonomy = taxonomy
        self._seen: dict[tuple[str, str], str] = {}
        self._concepts: dict[tuple[str, str], dict[tuple[str, ...], str]] = defaultdict(dict)
        for place, row in rows:
            told = f"{row.concept!r} is the concept of {place}, in the same domain {row.domain}"
            if concept := _concept_words(row):
                self._concepts[row.domain, row.language].setdefault(concept, told)

    def of_half(self, place: str, row: HalfPair) -> list[str]:
        """What is wrong with everything but `without`."""
        return [
            *_place_problems(row, self._taxonomy),
            *_id_problems(row),
            *_concept_problems(row),
            *self._repeat("id", "id", row.id, place),
            *self._repeat("with", "text", " ".join(_words(row.with_concept)), place),
        ]

    def of_twin(self, place: str, pair: Pair) -> list[str]:
        """What is wrong with `without`."""
        return [
            *_contrast_problems(pair),
            *self._leaks(pair),
            *_domain_word_problems(pair, self._taxonomy),
            *self._repeat("without", "text", " ".join(_words(pair.without_concept)), place),
        ]

    def _leaks(self, pair: Pair) -> Iterator[str]:
        text, own = _spaced(pair.without_concept), _concept_words(pair)
        for concept, told in self._concepts[pair.domain, pair.language].items():
            if concept != own and all(word in text for word in concept):
                yield f"field `without`: {told}; use a neutral word"

    def _repeat(self, field: str, kind: str, value: str, place: str) -> Iterator[str]:
        first = self._seen.setdefault((kind, value), place)
        if first != place:
            yield f"field `{field}`: the {kind} {value!r} already stands on {first}; change or remove one"


def pairs_file(name_or_path: Path | str) -> Path:
    """The file of a shipped set by its bare name as `"en"`, or the given path; InputError lists the shipped sets."""
    if isinstance(name_or_path, Path) or not re.fullmatch(r"[\w-]+", name_or_path):
        return Path(name_or_path)
    try:
        return asset(f"hub/pairs/{name_or_path}.jsonl")
    except FileNotFoundError:
        names = ", ".join(sorted(file.stem for file in asset("hub/pairs").glob("*.jsonl")))
        raise InputError(f"no pairs named {name_or_path!r}; use one of: {names}, or a path ending in .jsonl") from None


def _parse(line: bytes, kind: type[Row]) -> Row | str:
    try:
        return kind.model_validate_json(line, by_alias=True, by_name=False)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if not first["loc"]:
            return f"not a JSON object with the fields of a pair ({first['msg']})"
        return f"field `{first['loc'][0]}`: {first['msg']}"


def _pairs_of(lines: Iterable[tuple[int, Pair | str]]) -> list[tuple[int, Pair]]:
    return [(number, pair) for number, pair in lines if isinstance(pair, Pair)]


def _place_problems(row: HalfPair, taxonomy: Taxonomy) -> Iterator[str]:
    try:
        taxonomy.domain(row.domain)
    except InputError as error:
        yield f"field `domain`: {error}"
        return
    try:
        taxonomy.category(row.domain, row.category)
    except InputError as error:
        yield f"field `category`: {error}"


def _id_problems(row: HalfPair) -> Iterator[str]:
    stem = f"{row.domain}.{row.category}"
    if not re.fullmatch(r"[a-z0-9-]+\.[a-z0-9-]+\.[0-9]{2,}", row.id):
        yield f"field `id`: {row.id!r} is not of the form domain.category.NN; write it as {stem}.01"
    elif row.id.rpartition(".")[0] != stem:
        yield f"field `id`: {row.id!r} disagrees with the fields `domain` and `category`; it should begin with {stem}"


def _concept_problems(row: HalfPair) -> Iterator[str]:
    for word in row.concept.split():
        if not _words(word):
            yield f"field `concept`: {word!r} has no letter or digit; write the word as `with` has it"
        elif _spaced(word) not in _spaced(row.with_concept):
            yield f"field `concept`: {word!r} is not a word of `with`; write the word as `with` has it"


def _contrast_problems(pair: Pair) -> Iterator[str]:
    words, neutral_words = _words(pair.with_concept), _words(pair.without_concept)
    if words == neutral_words:
        yield "field `without`: the text equals `with`; replace the concept by a neutral word"
    if _is_question(pair.with_concept) != _is_question(pair.without_concept):
        yield "field `without`: of `with` and this text only one is a question; make both end alike"
    ratio = len(words) / max(len(neutral_words), 1)
    if not LENGTH_RATIO[0] <= ratio <= LENGTH_RATIO[1]:
        unit = "signs" if _UNSPACED.search(pair.with_concept) else "words"
        yield (
            f"field `without`: {len(words)} {unit} in `with` against {len(neutral_words)} here, a ratio of {ratio:.2f};"
            f" keep it within {LENGTH_RATIO[0]} and {LENGTH_RATIO[1]}"
        )
    for word in pair.concept.split():
        if _words(word) and _spaced(word) in _spaced(pair.without_concept):
            yield f"field `without`: {word!r} is a word of the concept; use a neutral word"


def _domain_word_problems(pair: Pair, taxonomy: Taxonomy) -> Iterator[str]:
    if pair.domain in taxonomy.domain_ids:
        for found in taxonomy.about(pair.domain).findall(pair.without_concept):
            yield f"field `without`: {found!r} is a word of the domain {pair.domain}; use a neutral word"


def _disagreements(pair: Pair, place: str, earlier: Pair) -> Iterator[str]:
    """Where `pair` stands in the taxonomy unlike the pair of the same id at `place`."""
    for field in ("domain", "category"):
        mine, other = getattr(pair, field), getattr(earlier, field)
        if mine != other:
            yield f"field `{field}`: {mine!r}, but {place} has {other!r} under the same id {pair.id!r}; make them equal"


# Chinese, Japanese, Thai, Lao, Burmese and Khmer are written without spaces: each sign stands for itself.
_UNSPACED = re.compile(
    "([\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff])"
)


def _words(text: str) -> list[str]:
    """The case-folded words: runs of letters, marks and digits of any script; one sign each where none are spaced."""
    return _UNSPACED.sub(r" \1 ", "".join(map(_as_in_word, unicodedata.normalize("NFC", text)))).casefold().split()


def _as_in_word(sign: str) -> str:
    """The sign within a word, nothing for an invisible one (Hindi's joiners are spelt or left out), else a space."""
    kind = unicodedata.category(sign)
    if kind == "Cf" and sign != "\u200b":  # the zero-width space does part words
        return ""
    return sign if kind[0] in "LMN" else " "


def _spaced(text: str) -> str:
    """The words with a space before and after each, so that `in` finds whole words only."""
    return f" {' '.join(_words(text))} "


def _concept_words(row: HalfPair) -> tuple[str, ...]:
    return tuple(_spaced(word) for word in row.concept.split() if _words(word))


def _is_question(text: str) -> bool:
    return re.search("[?？؟][\\W_]*$", text) is not None
