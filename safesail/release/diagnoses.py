"""The stored results of the diagnosis as configs of the examples data set.

Reads `<config>/<name>.parquet` in the run's `scratch/diagnosis/`, where the verbs of the diagnosis store their results.
Writes the same files into `examples/`: they hold prompts and answers as they are, and hazardous text is written only
there. Every file is checked: it may be of no verb at all, or of SAEs that the run no longer has.
"""

import ast
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from safesail.diagnosis.intervention_rows import INTERVENTIONS
from safesail.diagnosis.knowledge import KNOWLEDGE
from safesail.diagnosis.results import Result, read_result, write_result
from safesail.diagnosis.risks import MONITOR
from safesail.diagnosis.trajectories import TRAJECTORIES
from safesail.errors import InputError
from safesail.release.recipe_file import without_place

__all__ = ["RESULT_NAME", "SCHEMAS", "Diagnosis", "gather", "misfits", "neuron_ids", "write_diagnoses"]

Row = dict[str, Any]
SCHEMAS: dict[str, pa.Schema] = {
    "trajectories": TRAJECTORIES,
    "interventions": INTERVENTIONS,
    "knowledge": KNOWLEDGE,
    "monitor": MONITOR,
}
"""{config: the columns of its results}, in the order of the card."""
RESULT_NAME = re.compile(rf"({'|'.join(SCHEMAS)})/[a-z0-9-]+\.parquet")
"""What a result is called below `scratch/diagnosis/` and in the data set."""


class Diagnosis(NamedTuple):
    """A stored result."""

    name: str
    """Its file in the data set, as `trajectories/0123456789ab.parquet`."""
    result: Result


def gather(
    folder: Path, normalisers: Mapping[str, float | None], identity: Callable[[], Mapping[str, str]]
) -> list[Diagnosis]:
    """All results below `folder`, by config and name; InputError names the first file that is not one of this run.

    normalisers: {neuron id: its normaliser} of every latent of the selected SAEs; identity: {hook point: which SAE that
    is}, asked for only where there are results.
    """
    paths = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    shown = sorted(name for name in paths if not re.search(r"(^|/)\.", name))  # hidden: tools' own, or half written
    saes = identity() if shown else {}
    found = [Diagnosis(name, _checked(name, paths[name], normalisers, saes)) for name in shown]
    order = list(SCHEMAS)
    return sorted(found, key=lambda each: (order.index(each.result.config), each.name))


def write_diagnoses(diagnoses: Iterable[Diagnosis], folder: Path, repository: str) -> None:
    """Write every result below `folder`; repository: the release's Hub id, of which the Python then speaks.

    The places of local files are no part of a release: those in the Python become names, as in the recipe.
    """
    for name, result in diagnoses:
        facts = result.facts | ({"release": repository} if "release" in result.facts else {})
        write_result(result._replace(facts=facts, python=_elsewhere(result.python, repository)), folder / name)


# --- what a result must be ----------------------------------------------------------------------------------------


def neuron_ids(rows: Iterable[Row]) -> set[str]:
    """The neurons that rows of any config are about."""
    ids = set()
    for row in rows:
        ids |= {change["neuron_id"] for change in row.get("interventions") or []}
        ids |= {row["neuron_id"]} if row.get("neuron_id") else set()
    return ids


def misfits(rows: Iterable[Row], normalisers: Mapping[str, float | None]) -> list[str]:
    """What shows that rows are of other SAEs than the normalisers: other neurons, or activations scaled otherwise."""
    rows = list(rows)
    problems = [f"is about {id}, which this release has not" for id in sorted(neuron_ids(rows) - normalisers.keys())]
    for row in rows:
        shown, normaliser = row.get("normalised"), normalisers.get(row.get("neuron_id") or "")
        if shown and normaliser and abs(row["activation"] - shown * normaliser) > 1e-4 * row["activation"]:
            theirs = row["activation"] / shown
            problems.append(f"divides by {theirs:.6g} for {row['neuron_id']}, this release by {normaliser:.6g}")
    return problems


def _checked(name: str, path: Path, normalisers: Mapping[str, float | None], saes: Mapping[str, str]) -> Result:
    """The result in a file that is to be published."""
    if not RESULT_NAME.fullmatch(name):
        raise InputError(
            f"{path} is not named as a result of the diagnosis is (a folder of {', '.join(SCHEMAS)}, and in it "
            "a-z, 0-9, - and .parquet); rename it, or delete it."
        )
    try:
        result = read_result(path)
        ast.parse(result.python)
    except (ValueError, SyntaxError, pa.ArrowException) as error:
        raise InputError(f"{path} cannot be published ({error}); make it again, or delete it.") from error
    if problem := _problem(name.partition("/")[0], result, normalisers, saes):
        raise InputError(f"{path} {problem}; delete it, and make it again with the release that is then built.")
    return result


def _problem(config: str, result: Result, normalisers: Mapping[str, float | None], saes: Mapping[str, str]) -> str:
    """What is wrong with a result in the folder of a config, or an empty string."""
    if result.config != config:
        return f"is a result of {result.config}, not of {config}"
    if not isinstance(result.facts, dict):
        return "has facts that are no JSON object"
    if not result.schema.equals(SCHEMAS[config]):
        return f"has not the columns of {config}"
    if result.facts.get("saes") != saes:
        return f"is of other SAEs ({result.facts.get('saes')}) than the release that is built ({dict(saes)})"
    return next(iter(misfits(result.rows, normalisers)), "")


# --- the Python that makes a result again -------------------------------------------------------------------------

_PLACES = {"from_pretrained": 0, "knowledge": 2, "monitor_texts": 2}
"""{function: which of its arguments may be a place}."""


def _elsewhere(python: str, repository: str) -> str:
    """The Python as somebody else runs it: the release by its Hub id, other files without the way to them."""
    lines = python.encode().split(b"\n")
    for function, place, where in sorted(_places(python), key=lambda found: found[2], reverse=True):
        line, start, end = where
        said = repository if function == "from_pretrained" else without_place(place)
        lines[line] = lines[line][:start] + repr(said).encode() + lines[line][end:]
    return b"\n".join(lines).decode()


def _places(python: str) -> Iterable[tuple[str, str, tuple[int, int, int]]]:
    """What names a release or a file: the function that is given it, the name, and its line, first and end byte."""
    for node in ast.walk(ast.parse(python)):
        if not isinstance(node, ast.Call):
            continue
        function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        at = _PLACES.get(function)
        given = node.args[at] if at is not None and len(node.args) > at else None
        if isinstance(given, ast.Constant) and isinstance(given.value, str) and given.lineno == given.end_lineno:
            assert given.end_col_offset is not None
            yield function, given.value, (given.lineno - 1, given.col_offset, given.end_col_offset)
