"""The tables: their columns, keys, languages and statuses, and that all are about the same neurons."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from safesail.release.checks.finding import Looked
from safesail.release.checks.part import Part, schema_problem
from safesail.taxonomy import Taxonomy

__all__ = ["languages", "same_neurons", "schema", "statuses", "taxonomy", "unique"]

Row = dict[str, Any]


def schema(part: Part) -> Looked:
    """Every table has exactly the columns and types that it must have."""
    names = [name for name in part.there if name.endswith(".parquet")]
    problems = [problem for name in names if (problem := schema_problem(part, name))]
    present = {name.partition("/")[0] for name in names}
    problems += [f"there is no table {config}." for config in part.configs if config not in present]
    return Looked(f"{len(names)} tables", problems)


_KEYS = {
    "neurons": ("neuron_id",),
    "explanations": ("neuron_id", "language"),
    "scores": ("neuron_id", "method", "language"),
    "quantiles": ("neuron_id",),
    "selection": ("sae_id",),
    "contrast": ("sae_id", "grouping", "group"),
    "pairs": ("id", "language"),
    "examples": ("neuron_id", "half", "rank"),
}


def unique(part: Part) -> Looked:
    """No table has two rows about the same thing."""
    problems, n = [], 0
    for config in part.configs:
        counts = Counter(tuple(row[column] for column in _KEYS[config]) for row in part.rows(config))
        n += len(counts)
        problems += [f"{config} has {times} rows for {', '.join(key)}." for key, times in _repeated(counts)]
    return Looked(f"{n:,} rows", problems)


def _repeated(counts: Counter[tuple[Any, ...]]) -> Iterable[tuple[list[str], int]]:
    return (([str(value) for value in key], times) for key, times in counts.items() if times > 1)


def languages(part: Part) -> Looked:
    """languages.json names the splits of the explanations, and each split is in its language."""
    said = part.languages
    files = {Path(name).stem for name in part.tables_of("explanations")}
    problems = [f"languages.json names {name}, which has no table." for name in said if name not in files]
    problems += [f"languages.json does not name {name}." for name in sorted(files) if name not in said]
    for name in sorted(files):
        other = [row["language"] for row in part.table(f"explanations/{name}.parquet") if row["language"] != name]
        problems += [f"explanations/{name}.parquet has a row in {language}." for language in other]
    return Looked(", ".join(said), problems)


def same_neurons(part: Part) -> Looked:
    """Explanations in every language, scores by every method, and quantiles are of the neurons of the main table.

    Of a converted data set a language may lack neurons that another one has.
    """
    mine = {row["neuron_id"] for row in part.rows("neurons")}
    groups: dict[str, set[str]] = {}
    for row in part.rows("explanations"):
        name = "explanations" if part.is_converted else f"explanations in {row['language']}"
        groups.setdefault(name, set()).add(row["neuron_id"])
    for row in part.rows("scores"):
        name = f"scores by {row['method']}" + (f" in {row['language']}" if row["language"] else "")
        groups.setdefault(name, set()).add(row["neuron_id"])
    problems = []
    for name, found in groups.items():
        problems += [f"{name} have {id}, which the main table has not." for id in sorted(found - mine)]
        problems += [f"{name} lack {id}." for id in sorted(mine - found)]
    if measured := {row["neuron_id"] for row in part.rows("quantiles")}:
        problems += [f"quantiles lack {id}." for id in sorted(mine - measured)]
    return Looked(f"{len(mine)} neurons in {len(groups)} groups", problems)


def taxonomy(part: Part) -> Looked:
    """Domains and categories are the taxonomy's, and a neuron's domains are among those it is a candidate for."""
    taxonomy, problems = Taxonomy.load(), []
    categories = {domain.id: {category.id for category in domain.categories} for domain in taxonomy.domains}
    for row in part.rows("neurons"):
        unknown = [name for name in {*row["domains"], *row["candidate_for"]} if name not in categories]
        problems += [f"{row['neuron_id']} has the domain {name}, which is not in the taxonomy." for name in unknown]
        inside = set().union(*(categories.get(name, set()) for name in row["domains"]))
        if row["category"] and row["category"] not in inside:
            problems.append(f"{row['neuron_id']} has the category {row['category']}, which its domains have not.")
        stray = [name for name in row["domains"] if row["candidate_for"] and name not in row["candidate_for"]]
        problems += [f"{row['neuron_id']} carries {name} and is no candidate for it." for name in stray]
    return Looked(f"{len(categories)} domains", problems)


def statuses(part: Part) -> Looked:
    """There is an explanation just where its status is ok, and a score just where its status is ok.

    The score of a masked or absent explanation stands: its text exists, where the data set was converted from.
    """
    problems, n = [], 0
    for config, value in (("explanations", "explanation"), ("scores", "score"), ("neurons", "score")):
        rows = part.rows(config)
        n += len(rows)
        hidden = ("masked", "absent") if part.is_converted and value == "score" else ()
        wrong = [row for row in rows if (row["status"] in ("ok", *hidden)) != (row[value] is not None)]
        problems += [
            f"{config}: {row['neuron_id']} has the status {row['status']} and {_a(value, row)}." for row in wrong
        ]
    return Looked(f"{n:,} rows", problems)


def _a(value: str, row: Row) -> str:
    return f"no {value}" if row[value] is None else {"score": "a score", "explanation": "an explanation"}[value]
