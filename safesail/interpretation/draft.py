"""Drafts of concept pairs: a language model writes the `without` twin, the validator decides whether it is one.

Reads a JSONL file of pairs that lack `without`. Writes the pairs that keep every rule of `safesail pairs check`; what
a model refused, failed to answer or wrote against a rule is named with its line, and never written as a pair.

What this does not do: judge whether a twin sounds natural or still hints at the concept. Read the drafts before use.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from pydantic import ValidationError

from safesail.errors import InputError
from safesail.files import replacing
from safesail.interpretation.llm import Llm, Message, Reply, Request
from safesail.interpretation.prompts import inert, prompt
from safesail.pairs import HalfPair, Pair, PairRules, check_pairs, load_pairs, read_lines
from safesail.progress import bar
from safesail.taxonomy import Taxonomy

__all__ = ["draft_file", "draft_request", "draft_twins"]

_MAX_TOKENS = 400  # a sentence of 30 words in a script that the model's tokenizer spells in bytes
_SCHEMA = {
    "type": "object",
    "properties": {"without": {"type": "string"}},
    "required": ["without"],
    "additionalProperties": False,
}


def draft_file(source: Path, destination: Path, llm: Llm, taxonomy: Taxonomy) -> list[str]:
    """Drafts the twins of the pairs in `source` into the file `destination`; returns what is left undone, and why.

    Pairs that `destination` has already are kept, and not asked again unless the source's words for them have changed;
    even then the old pair gives way to a good new one only. The file is replaced whole, at the end. Each sentence
    returned begins with the source's line.
    """
    kept = _kept(source, destination, taxonomy)
    rows, broken = [], []
    for number, row in read_lines(source, HalfPair):
        broken.append((number, row)) if isinstance(row, str) else rows.append((number, row))
    drafted, problems = draft_twins(rows, llm, taxonomy, kept)
    if drafted:
        pairs = {pair.id: pair for pair in (*kept, *drafted)}
        order = dict.fromkeys((*(row.id for _, row in rows if row.id in pairs), *pairs))
        _write(destination, [pairs[pair_id] for pair_id in order])
    return [f"line {number}: unfit: {problem}." for number, problem in broken] + problems


def draft_twins(
    rows: Sequence[tuple[int, HalfPair]], llm: Llm, taxonomy: Taxonomy, kept: Sequence[Pair] = ()
) -> tuple[list[Pair], list[str]]:
    """The new pairs, in the order of the rows, and for every other row why there is none.

    rows: (line number, pair without its twin); kept: pairs of the same set, a row that one of them completes is not
    asked. A problem is `line 3: STATUS: reason`; STATUS is refused, unparsed or failed (what came of the call) or unfit
    (the row, the answer or the kept pair breaks a rule of the set). A row that is unfit itself is not asked.
    """
    rules = _rules(rows, kept, taxonomy)
    asked, problems = _unfinished(rows, rules, {pair.id: pair for pair in kept})
    with bar("draft", len(asked), "pair") as progress:
        replies = llm.ask([draft_request(row, taxonomy) for _, row in asked], progress=progress.update)
    pairs = []
    for (number, row), reply in zip(asked, replies, strict=True):
        found = list(_problems(row, reply, f"line {number}", rules))
        problems += [f"line {number}: {problem}." for problem in found]
        if not found:
            pairs.append(_completed(row, reply))
    return pairs, problems


def draft_request(row: HalfPair, taxonomy: Taxonomy) -> Request:
    """The question for one twin, answered as `{"without": "..."}`; the row's texts stand in it as data."""
    domain, category = taxonomy.domain(row.domain), taxonomy.category(row.domain, row.category)
    text = prompt("draft_without").format(
        language=row.language,
        subject=f"- {domain.description}\n- {category.description}",
        concept=inert(row.concept),
        sentence=inert(row.with_concept),
    )
    return Request(messages=(Message("user", text),), max_tokens=_MAX_TOKENS, schema=_SCHEMA)


def _rules(rows: Sequence[tuple[int, HalfPair]], kept: Sequence[Pair], taxonomy: Taxonomy) -> PairRules:
    """The rules of the set that rows and kept pairs make up together, with the pairs outside the rows already seen."""
    ids = {row.id for _, row in rows}
    others = [(f"the kept pair {pair.id}", pair) for pair in kept if pair.id not in ids]
    rules = PairRules(taxonomy, [*((f"line {number}", row) for number, row in rows), *others])
    for place, pair in others:
        rules.of_half(place, pair)
        rules.of_twin(place, pair)
    return rules


def _unfinished(
    rows: Sequence[tuple[int, HalfPair]], rules: PairRules, kept: dict[str, Pair]
) -> tuple[list[tuple[int, HalfPair]], list[str]]:
    """The sound rows that no kept pair completes, and what is wrong with the others."""
    asked, problems = [], []
    for number, row in rows:
        place, pair = f"line {number}", kept.get(row.id)
        found = rules.of_half(place, row)
        if not found and pair is not None and _half(pair) == row:
            found = rules.of_twin(place, pair)
        elif not found:
            asked.append((number, row))
        problems += [f"{place}: unfit: {problem}." for problem in found]
    return asked, problems


def _problems(row: HalfPair, reply: Reply, place: str, rules: PairRules) -> Iterator[str]:
    if reply.status != "ok":
        yield f"{reply.status}: {reply.detail.rstrip('.')}"
        return
    try:
        pair = _completed(row, reply)
    except ValidationError as error:
        yield f"unfit: field `without`: {error.errors(include_url=False)[0]['msg']}"
        return
    yield from (f"unfit: {problem}" for problem in rules.of_twin(place, pair))


def _completed(row: HalfPair, reply: Reply) -> Pair:
    return Pair(**row.model_dump(), without_concept=" ".join(reply.value["without"].split()))


def _half(pair: Pair) -> HalfPair:
    return HalfPair(**pair.model_dump(exclude={"without_concept"}))


def _kept(source: Path, destination: Path, taxonomy: Taxonomy) -> list[Pair]:
    """The pairs of an earlier run; raises InputError, before anything is paid for, when the file could not be kept."""
    if destination.resolve() == source.resolve():
        raise InputError(f"{destination} is the file to read; give another file for the finished pairs")
    if not destination.parent.is_dir():
        raise InputError(f"there is no folder {destination.parent} to write to; make it or give another file")
    if not destination.exists():
        return []
    if problems := check_pairs(destination, taxonomy):
        raise InputError(
            f"{destination} is left as it is: {problems[0].rstrip('.')}; mend or remove that line and run the same "
            "command, or give another file"
        )
    return load_pairs(destination)


def _write(path: Path, pairs: Sequence[Pair]) -> None:
    lines = [json.dumps(pair.model_dump(by_alias=True), ensure_ascii=False) + "\n" for pair in pairs]
    content = "".join(lines).encode()
    with replacing(path, len(content)) as temporary:
        temporary.write_bytes(content)
