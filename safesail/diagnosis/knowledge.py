"""Does a neuron that fires on a name mean that the model knows who it is?

Reads a list of entities, one JSON object a line. Two questions are asked of each: does the neuron fire on the name's
tokens in a neutral sentence, and does the model's greedy continuation of a prompt hold an accepted answer? The answers
make the table [[fires and known, fires and unknown], [silent and known, silent and unknown]], with its odds ratio and
Fisher's exact p (Safe-SAIL, "activation pattern implies knowledge").
"""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from safesail.assets import asset
from safesail.diagnosis.inspection import Inspection
from safesail.diagnosis.inspector import Inspector
from safesail.diagnosis.results import Result
from safesail.errors import InputError
from safesail.lm.generate import complete
from safesail.metrics import Interval, fisher_exact, odds_ratio, wilson
from safesail.neurons import neuron_id

__all__ = ["CARRIER", "KNOWLEDGE", "Entity", "Table", "contingency", "knowledge", "load_entities", "shipped_entities"]

CARRIER = "Yesterday I read a short article about {name} in the library."
"""The neutral sentence in which the neuron is read."""
MOST_ENTITIES = 10_000
_AT_ONCE = 8

KNOWLEDGE = pa.schema(
    [
        ("name", pa.string()),
        ("fires", pa.bool_()),
        ("known", pa.bool_()),
        ("activation", pa.float64()),
        ("normalised", pa.float64()),
        ("token", pa.string()),
        ("continuation", pa.string()),
        ("prompt", pa.string()),
        ("accepted", pa.list_(pa.string())),
        ("neuron_id", pa.string()),
    ]
)
"""A row is an entity; `token` is the one of its name that the neuron fires on most, empty where it is silent."""

Filled = Annotated[str, StringConstraints(pattern=r"\S")]


class Entity(BaseModel):
    """A name, a prompt whose continuation shows whether the model knows it, and the answers that show it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Filled
    prompt: Filled
    accepted: Annotated[tuple[Filled, ...], Field(min_length=1)]


class Table(NamedTuple):
    """The contingency table and what follows from it."""

    fires_known: int
    fires_unknown: int
    silent_known: int
    silent_unknown: int
    odds_ratio: Interval
    """Of knowing the entities on which the neuron fires, against the others; Haldane's correction."""
    p_value: float
    """Fisher's exact test, two-sided."""
    known_where_fires: Interval
    known_where_silent: Interval


def knowledge(
    inspector: Inspector,
    neuron: str,
    entities: str | Path | Sequence[Entity] = "presidents",
    *,
    max_new_tokens: int = 12,
    above: float = 0.0,
) -> Result:
    """A row per entity and the table, as a `knowledge` result.

    entities: the name of a shipped list, a JSONL file, or themselves. The neuron fires on a name when its normalised
    activation on one of the name's tokens is larger than `above`.
    """
    if not 0 <= above < float("inf"):
        raise InputError(f"`above` is {above}; give a normalised activation of 0 or more.")
    if max_new_tokens < 1:
        raise InputError(f"a continuation of {max_new_tokens} tokens holds no answer; give at least 1.")
    name = _known_neuron(inspector, neuron)
    listed = _checked(load_entities(entities) if isinstance(entities, str | Path) else list(entities))
    said = _continuations(inspector, [entity.prompt for entity in listed], max_new_tokens)
    rows = [_row(inspector, name, *each, above) for each in zip(listed, said, strict=True)]
    table = contingency([row["fires"] for row in rows], [row["known"] for row in rows])
    facts = {"neuron_id": name, "carrier": CARRIER, "n_entities": len(rows), "max_new_tokens": max_new_tokens}
    facts |= {"above": above, "table": _plain_table(table), "saes": inspector.identity}
    return Result("knowledge", rows, KNOWLEDGE, _python(inspector, name, entities, max_new_tokens, above), facts)


def contingency(fires: Sequence[bool], known: Sequence[bool]) -> Table:
    """The table of two yes-no questions about the same entities."""
    counts = Counter(zip(fires, known, strict=True))
    a, b, c, d = (counts[pair] for pair in ((True, True), (True, False), (False, True), (False, False)))
    return Table(a, b, c, d, odds_ratio(a, b, c, d), fisher_exact(a, b, c, d), wilson(a, a + b), wilson(c, c + d))


def shipped_entities() -> list[str]:
    """The names of the shipped lists."""
    return sorted(file.stem for file in asset("hub/knowledge").glob("*.jsonl"))


def load_entities(name_or_path: str | Path) -> list[Entity]:
    """The entities of a JSONL file, or of a shipped list by its bare name; InputError at a broken or repeated line."""
    path = _file(name_or_path)
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(
            f"cannot read the entities {path} ({error.strerror}); give a .jsonl file or one of: "
            f"{', '.join(shipped_entities())}."
        ) from None
    entities = [_parsed(line, path, number) for number, line in enumerate(lines, 1) if line.strip()]
    return _checked(entities, f"{path}: ")


def _file(name_or_path: str | Path) -> Path:
    if str(name_or_path) in shipped_entities():
        return asset(f"hub/knowledge/{name_or_path}.jsonl")
    return Path(name_or_path).expanduser()


def _parsed(line: bytes, path: Path, number: int) -> Entity:
    try:
        return Entity.model_validate_json(line)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = ".".join(map(str, first["loc"])) or "the line"
        example = {"name": "Ada Lovelace", "prompt": "Ada Lovelace worked with Charles", "accepted": ["Babbage"]}
        raise InputError(
            f"{path}, line {number}: {field}: {first['msg']}; a line looks like {json.dumps(example)}."
        ) from None


def _checked(entities: list[Entity], place: str = "") -> list[Entity]:
    """The entities; InputError for none, too many or one name twice."""
    if not 1 <= len(entities) <= MOST_ENTITIES:
        raise InputError(f"{place}{len(entities)} entities were given; give between 1 and {MOST_ENTITIES:,}.")
    repeated = [name for name, n in Counter(_plain(entity.name) for entity in entities).items() if n > 1]
    if repeated:
        raise InputError(f"{place}the entity {repeated[0]!r} is given twice; keep one, since each counts once.")
    return entities


def _known_neuron(inspector: Inspector, neuron: str) -> str:
    """The neuron's id in the long form; InputError for what is no latent, or one that never fires."""
    hook_point, latent = inspector.place_of(neuron)
    if inspector.database.normaliser(hook_point, latent) is None:
        raise InputError(f"{hook_point}/{latent} never fired in the corpus, so it can tell nothing; choose another.")
    return neuron_id(hook_point, latent)


def _continuations(inspector: Inspector, prompts: list[str], n: int) -> list[str]:
    said = []
    for start in range(0, len(prompts), _AT_ONCE):
        batch = prompts[start : start + _AT_ONCE]
        for prompt in batch:
            if len(inspector.encode(prompt)) + n > inspector.max_tokens:
                raise InputError(f"the prompt {prompt[:40]!r}… is too long for the model; shorten it.")
        said += [text for text, _, _ in complete(inspector.model, inspector.tokenizer, batch, n)]
    return said


def _row(inspector: Inspector, neuron: str, entity: Entity, continuation: str, above: float) -> dict[str, Any]:
    inspection = inspector.inspect(CARRIER.format(name=entity.name))
    units = _units_of(inspection, entity.name)
    strongest = next((firing for firing in inspection.firings(neuron) if firing.index in units), None)
    normalised = (strongest.normalised or 0.0) if strongest else 0.0
    return {
        "name": entity.name,
        "fires": normalised > above,
        "known": _holds(continuation, entity.accepted),
        "activation": strongest.activation if strongest else 0.0,
        "normalised": normalised,
        "token": inspection.units[strongest.index].text if strongest else "",
        "continuation": continuation,
        "prompt": entity.prompt,
        "accepted": list(entity.accepted),
        "neuron_id": neuron,
    }


def _units_of(inspection: Inspection, name: str) -> set[int]:
    """The units that hold a sign of the name."""
    start = inspection.text.find(name)
    if start < 0:
        raise InputError(f"the tokenizer does not give back the name {name!r}; write it with ordinary characters.")
    found, at = set(), 0
    for index, unit in enumerate(inspection.units):
        if at < start + len(name) and at + len(unit.text) > start:
            found.add(index)
        at += len(unit.text)
    return found


def _holds(continuation: str, accepted: Sequence[str]) -> bool:
    """Whether one of the answers stands in the continuation as whole words, in either case."""
    text = _plain(continuation)
    return any(re.search(rf"(?<!\w){re.escape(_plain(answer))}(?!\w)", text) for answer in accepted)


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _plain_table(table: Table) -> dict[str, Any]:
    """The table as plain JSON, intervals as {value, low, high}."""
    named = table._asdict().items()
    return {name: value._asdict() if isinstance(value, Interval) else value for name, value in named}


def _python(
    inspector: Inspector, neuron: str, entities: str | Path | Sequence[Entity], max_new_tokens: int, above: float
) -> str:
    given = repr(str(entities)) if isinstance(entities, str | Path) else repr(list(entities))
    names = "knowledge" if isinstance(entities, str | Path) else "Entity, knowledge"
    return (
        "from safesail import Inspector\n"
        f"from safesail.diagnosis.knowledge import {names}\n\n"
        f"inspector = Inspector.from_pretrained({str(inspector.release)!r})\n"
        f"result = knowledge(inspector, {neuron!r}, {given}, max_new_tokens={max_new_tokens}, above={above!r})\n"
    )
