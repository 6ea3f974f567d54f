"""The results of the diagnosis in the examples: what they say of themselves, and that they are of this release."""

from safesail.diagnosis.results import read_result
from safesail.errors import InputError
from safesail.release.checks.files import splits
from safesail.release.checks.finding import Looked
from safesail.release.checks.part import Part
from safesail.release.diagnoses import RESULT_NAME, SCHEMAS, misfits, neuron_ids

__all__ = ["ids", "neurons_fit", "results"]


def results(part: Part) -> Looked:
    """Every result is named as one, says its settings and its Python, and is of the config that the card gives it."""
    problems, names = [], _names(part)
    config_of = {path: config for config, _, paths in splits(part.front) for path in paths}
    for name in names:
        config = name.partition("/")[0]
        if not RESULT_NAME.fullmatch(name):
            problems.append(f"{name} is not named as a result of the diagnosis is.")
        elif config_of.get(name) != config:
            problems.append(f"{name} is of the config {config_of.get(name)} on the card, not of {config}.")
        elif problem := _problem(part, name):
            problems.append(problem)
    return Looked(f"{len(names)} results", problems)


def neurons_fit(parts: dict[str, Part]) -> Looked:
    """The results are about latents of the quantiles, and scale activations by the normalisers that stand there."""
    examples, problems, n = parts["examples"], [], 0
    normalisers = {row["neuron_id"]: row["normaliser"] for row in parts["neurons"].rows("quantiles")}
    for name in _names(examples):
        rows = examples.table(name)
        n += len(rows)
        problems += [f"{name} {problem}." for problem in misfits(rows, normalisers)]
    return Looked(f"{n:,} rows", problems)


def ids(part: Part) -> set[str]:
    """The neurons that the results are about."""
    return {id for name in _names(part) for id in neuron_ids(part.table(name))}


def _names(part: Part) -> list[str]:
    return [name for config in SCHEMAS for name in part.tables_of(config)]


def _problem(part: Part, name: str) -> str:
    """What is wrong with what a result says of itself, or an empty string."""
    try:
        result = read_result(part.repository.file(name))
    except InputError as error:
        return f"{name}: {error}"
    except ValueError as error:  # of what its metadata hold
        return f"{name} has no readable facts ({error})."
    config = name.partition("/")[0]
    return "" if result.config == config else f"{name} is a result of {result.config}, not of {config}."
