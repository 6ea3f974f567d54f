"""How concepts travel: which neurons fire where on a prompt, hook point by hook point and token by token.

Several versions of one prompt (languages, paraphrases, spellings) stand side by side, as in the case study of Safe-SAIL
(section on inference trajectories). Per neuron and version

    m(version) = max over the version's tokens of activation / normaliser
    drop       = m(reference) - m(version)

A neuron that is silent in a version says little where the model cannot read that version, so each is read first:
`Reading` says how.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, get_args

import pyarrow as pa

from safesail.diagnosis.case_study import Case, case_study
from safesail.diagnosis.inspection import Inspection
from safesail.diagnosis.inspector import Inspector
from safesail.diagnosis.reading import Reading, readings
from safesail.diagnosis.results import Result
from safesail.diagnosis.trajectory_tables import By, concepts, concepts_of, drops, layer_of, size_of
from safesail.errors import InputError
from safesail.lm.tokens import ROLES, conversation

__all__ = ["TRAJECTORIES", "Case", "case_study", "concepts", "drops", "trajectories"]

Prompt = str | list[dict[str, str]]
Row = dict[str, Any]

TRAJECTORIES = pa.schema(
    [
        ("label", pa.string()),
        ("language", pa.string()),
        ("token_index", pa.int32()),
        ("token", pa.string()),
        ("is_answer", pa.bool_()),
        ("hook_point", pa.string()),
        ("layer", pa.int16()),
        ("neuron_id", pa.string()),
        ("activation", pa.float64()),
        ("normalised", pa.float64()),
        ("explanation", pa.string()),
        ("domains", pa.list_(pa.string())),
        ("category", pa.string()),
        ("score", pa.float64()),
    ]
)
"""A row is a neuron that fires on a readable unit of a version; `token_index` counts units, as the Inspector does."""


def trajectories(
    inspector: Inspector,
    prompts: Mapping[str, Prompt],
    *,
    answer: int = 0,
    top: int = 20,
    by: By = "domain",
    languages: Mapping[str, str] | None = None,
) -> Result:
    """Which neurons fire where on each version of a prompt: {label: prompt}, the first of which is the reference.

    With `answer` a text is asked as a chat, and so many tokens are generated after it; what the chat template itself
    puts before the text (a system prompt, the same in all versions) is left out. The rows hold every firing, in
    all versions, of the `top` neurons of each concept (`by`) at each hook point: those with the largest normalised
    maximum in any version; with `by="neuron"`, of the `top` neurons of each hook point. facts["concepts"] is the table
    of `concepts` over all neurons (with `by="neuron"` over these), facts["versions"] has tokens, answer and `Reading`.
    A version's language is that of `languages`, or its label where that is a code of two letters as `zh`.
    """
    _check(prompts, answer, top, by, languages or {})
    spoken = {label: (languages or {}).get(label, _code(label)) for label in prompts}
    seen = {label: _inspected(inspector, label, prompt, answer) for label, prompt in prompts.items()}
    before = {label: _preamble(inspector, prompt, answer) for label, prompt in prompts.items()}
    everything = [row for label in prompts for row in _firings(label, spoken[label], seen[label], before[label])]
    rows = _strongest(everything, by, top)
    read = readings(inspector, prompts, spoken)
    facts = {
        "release": inspector.release,
        "saes": inspector.identity,
        "settings": {"answer": answer, "top": top, "by": by},
        "versions": [_version(read[label], spoken[label], seen[label]) for label in prompts],
        "concepts": concepts(rows if by == "neuron" else everything, list(prompts), by=by),
    }
    return Result("trajectories", rows, TRAJECTORIES, _python(inspector, prompts, answer, top, by, languages), facts)


def _check(prompts: Mapping[str, Prompt], answer: int, top: int, by: str, languages: Mapping[str, str]) -> None:
    if not prompts:
        raise InputError("there is no prompt; give at least one, as {'en': 'Some text.'}.")
    if any(not label.strip() for label in prompts):
        raise InputError("a version has an empty label; labels are words like en, zh or paraphrase.")
    if unknown := [label for label in languages if label not in prompts]:
        raise InputError(f"languages names {unknown[0]!r}, which is no version; versions are {', '.join(prompts)}.")
    if by not in get_args(By):
        raise InputError(f"by={by!r} is no grouping; use one of {', '.join(get_args(By))}.")
    if top < 1 or answer < 0:
        raise InputError(f"top={top} and answer={answer} were given; top is at least 1, answer at least 0.")


def _inspected(inspector: Inspector, label: str, prompt: Prompt, answer: int) -> Inspection:
    asked = [{"role": "user", "content": prompt}] if answer and isinstance(prompt, str) else prompt
    try:
        return inspector.inspect(asked, max_new_tokens=answer)
    except InputError as error:
        raise InputError(f"version {label}: {error}") from error


def _preamble(inspector: Inspector, prompt: Prompt, answer: int) -> int:
    """How many tokens the chat template puts before a text by itself: they are no part of the prompt.

    0 where the template does not let its turns be told apart.
    """
    if not answer or not isinstance(prompt, str):
        return 0
    try:
        _, roles = conversation(inspector.tokenizer, [{"role": "user", "content": prompt}], answer=True)
    except InputError:
        return 0
    return next((i for i, role in enumerate(roles) if ROLES[role] != "system"), 0)


def _firings(label: str, language: str | None, inspection: Inspection, preamble: int) -> Iterable[Row]:
    """A row per unit and neuron that fires on it."""
    for index, unit in enumerate(inspection.units):
        if unit.start < preamble:
            continue
        for hit in inspection.hits(index):
            yield {
                "label": label,
                "language": language,
                "token_index": index,
                "token": unit.text,
                "is_answer": inspection.is_answer(index),
                "hook_point": hit.hook_point,
                "layer": layer_of(hit.hook_point),
                "neuron_id": hit.neuron_id,
                "activation": hit.activation,
                "normalised": hit.normalised,
                "explanation": hit.explanation,
                "domains": hit.domains,
                "category": inspection.database.neurons.get(hit.neuron_id, {}).get("category"),
                "score": hit.score,
            }


def _strongest(rows: list[Row], by: By, top: int) -> list[Row]:
    """The rows of the `top` neurons of each concept and hook point, by their maximum in any version."""
    best: dict[str, float] = {}
    groups: dict[tuple[str, str], set[str]] = {}
    for row in rows:
        best[row["neuron_id"]] = max(size_of(row), best.get(row["neuron_id"], 0.0))
        for concept in [""] if by == "neuron" else concepts_of(row, by):
            groups.setdefault((concept, row["hook_point"]), set()).add(row["neuron_id"])
    kept = {id for group in groups.values() for id in sorted(group, key=lambda id: (-best[id], id))[:top]}
    return [row for row in rows if row["neuron_id"] in kept]


def _version(read: Reading, language: str | None, inspection: Inspection) -> Row:
    tokens = [
        {"index": i, "text": unit.text, "is_answer": inspection.is_answer(i), "note": inspection.note(i)}
        for i, unit in enumerate(inspection.units)
    ]
    return {
        "label": read.label,
        "language": language,
        "answer": inspection.answer,
        "reading": read._asdict(),
        "tokens": tokens,
    }


def _code(label: str) -> str | None:
    """The label where it is a language code of two letters, with or without a variant."""
    return label if re.fullmatch(r"[a-z]{2}(-[A-Za-z0-9]+)*", label) else None


def _python(
    inspector: Inspector,
    prompts: Mapping[str, Prompt],
    answer: int,
    top: int,
    by: str,
    languages: Mapping[str, str] | None,
) -> str:
    spoken = f", languages={dict(languages)!r}" if languages else ""
    return (
        "from safesail import Inspector\n"
        "from safesail.diagnosis.trajectories import trajectories\n\n"
        f"inspector = Inspector.from_pretrained({inspector.release!r})\n"
        f"prompts = {dict(prompts)!r}\n"
        f"result = trajectories(inspector, prompts, answer={answer}, top={top}, by={by!r}{spoken})\n"
    )
