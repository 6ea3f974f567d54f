"""The verb that shows how concepts travel through the layers: `trajectories`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from safesail.cli.app import Json, Release, app, visible
from safesail.errors import InputError

__all__ = ["trajectories"]

_DROPS = 10
"""Lines of the table of drops that are printed; the stored rows give all of it."""


@app.command()
def trajectories(
    release: Release,
    prompt: Annotated[str | None, typer.Argument(help="The prompt; or give --case-study.")] = None,
    version: Annotated[list[str], typer.Option(help='The prompt again, as zh="…"; several times if need be.')] = [],  # noqa: B006
    case_study: Annotated[bool, typer.Option("--case-study", help="The built-in prompts in five versions.")] = False,
    answer: Annotated[int, typer.Option(help="Ask it as a chat and generate so many tokens.")] = 0,
    neuron: Annotated[str | None, typer.Option(help="Attribute this neuron to earlier ones, on the prompt.")] = None,
    svg: Annotated[Path | None, typer.Option(help="Draw the attribution graph there, as graph.svg.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the table goes, as out.parquet.")] = None,
    model: Annotated[str | None, typer.Option(help="Load the language model from here.")] = None,
    as_json: Json = False,
) -> None:
    """Show which concepts fire where on a prompt, layer by layer, and what is missing in another version of it.

    Example:  safesail trajectories runs/demo "Where can I buy a gun?" --version misspelt="Were can I bye a gunn?"
    """
    asked = _asked(prompt, version, case_study)
    _check(case_study, neuron, svg)
    from safesail.diagnosis.inspector import Inspector
    from safesail.diagnosis.results import default_path, write_result
    from safesail.diagnosis.trajectories import trajectories as traced

    inspector = Inspector.from_pretrained(release, model=model)
    told = []
    for name, (prompts, languages) in asked.items():
        result = traced(inspector, prompts, answer=answer, languages=languages)
        place = out.with_name(f"{out.stem}-{name}{out.suffix}") if out and name else out
        told.append((name, result, write_result(result, place or default_path(release, result))))
    graph = _graph(inspector, prompt, neuron, svg) if prompt and neuron else None
    if as_json:
        print(json.dumps(_json(told, graph), ensure_ascii=False))
        return
    for line in (*_lines(told), *(_graph_lines(graph) if graph else ())):
        print(line)


def _asked(
    prompt: str | None, versions: list[str], case_study: bool
) -> dict[str, tuple[dict[str, str], dict[str, str] | None]]:
    """{case or "": the prompts by label, and their languages where they are stated}."""
    if case_study:
        if prompt or versions:
            raise InputError("--case-study brings its own prompts; leave out the prompt and --version.")
        from safesail.diagnosis.case_study import case_study as built_in

        return {case.name: (case.prompts, case.languages) for case in built_in().values()}
    if prompt is None:
        raise InputError("there is no prompt; give one in quotation marks, or --case-study.")
    prompts = {"prompt": prompt}
    for given in versions:
        label, equals, text = given.partition("=")
        if not equals or not label.strip():
            raise InputError(f'--version {given!r} has no label; write it as zh="…".')
        if label.strip() in prompts:
            raise InputError(f"the version {label.strip()!r} is given twice; give every version a label of its own.")
        prompts[label.strip()] = text
    return {"": (prompts, None)}


def _check(case_study: bool, neuron: str | None, svg: Path | None) -> None:
    if svg and not neuron:
        raise InputError("--svg draws the attribution graph of a neuron; name it with --neuron.")
    if neuron and case_study:
        raise InputError("--neuron is attributed on one prompt; give the prompt instead of --case-study.")


def _graph(inspector: Any, prompt: str, neuron: str, path: Path | None) -> Any:
    """The attribution graph, drawn where that is asked for."""
    from safesail.diagnosis.attribution import graph, svg
    from safesail.files import replacing

    found = graph(inspector, prompt, neuron)
    if path:
        drawing = svg(found)
        with replacing(path, len(drawing)) as partial:
            partial.write_text(drawing, encoding="utf-8")
    return found


def _json(told: list[tuple[str, Any, Path]], graph: Any) -> dict[str, Any]:
    from safesail.diagnosis.trajectories import drops

    results = [
        {
            "case": name,
            "facts": result.facts,
            "rows": result.rows,
            "drops": drops(result.rows, _labels(result)),
            "python": result.python,
            "path": str(path),
        }
        for name, result, path in told
    ]
    return {"results": results, "attribution": graph.to_json() if graph else None}


def _labels(result: Any) -> list[str]:
    return [version["label"] for version in result.facts["versions"]]


# --- what is printed ----------------------------------------------------------------------------------------------


def _lines(told: list[tuple[str, Any, Path]]) -> Iterator[str]:
    for name, result, path in told:
        if name:
            yield f"{name}:"
        for version in result.facts["versions"]:
            yield version["reading"]["sentence"]
            if version["answer"]:
                yield f"  Its answer: {visible(version['answer'])}"
        yield ""
        yield from _concepts(result)
        yield from _drops(result)
        yield f"stored: {path}"
        yield ""


def _concepts(result: Any) -> Iterator[str]:
    """A line per hook point and concept: in each version the maximum, and on how many tokens it fires."""
    labels = _labels(result)
    yield f"{'hook point':16} {'concept':14}" + "".join(f" {visible(label)[:14]:>14}" for label in labels)
    table = result.facts["concepts"]
    for start in range(0, len(table), len(labels)):
        part = table[start : start + len(labels)]
        cells = "".join(f" {row['max']:7.2f} {_tokens(row['n_tokens']):>6}" for row in part)
        yield f"{part[0]['hook_point']:16} {part[0]['concept']:14}{cells}"
    yield "(the strongest activation / normaliser, and on how many tokens the concept fires)"


def _tokens(n: int) -> str:
    return f"on {n}" if n else ""


def _drops(result: Any) -> Iterator[str]:
    """The largest drops of neurons that carry a domain."""
    from safesail.diagnosis.trajectories import drops

    labels = _labels(result)
    table = [row for row in drops(result.rows, labels) if row["domains"] and row["drop"] > 0]
    if len(labels) == 1:
        return
    yield ""
    yield f"{'neuron':20} {'version':14} {visible(labels[0])[:9]:>9} {'there':>6} {'drop':>6}  explanation"
    for row in table[:_DROPS]:
        what = visible(row["explanation"] or "")[:50]
        numbers = f"{row['in_reference']:9.2f} {row['in_version']:6.2f} {row['drop']:6.2f}"
        yield f"{row['neuron_id']:20} {visible(row['label'])[:14]:14} {numbers}  {what}"
    if len(table) != _DROPS:
        yield f"({min(len(table), _DROPS)} of the {len(table)} drops of neurons that carry a domain)"


def _graph_lines(graph: Any) -> Iterator[str]:
    child = graph.child
    where = f"{visible(child.token)!r} (unit {child.index})"
    yield f"{child.hit.neuron_id} on {where}, activation {child.hit.activation:.2f}:"
    for edge in graph.edges:
        node = graph.nodes[edge.parent]
        if edge.child == 0:
            what = visible(node.hit.explanation or "not explained")[:50]
            yield f"  {edge.attribution:+7.2f}  {node.hit.neuron_id:20} on {visible(node.token)!r:14} {what}"
    yield from graph.sentences()
