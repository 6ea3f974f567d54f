"""The verbs that ask a release's neurons: `monitor` (is a text risky?) and `knowledge` (does firing mean knowing?)."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from safesail.cli.app import Json, Quiet, Release, app, visible
from safesail.errors import InputError

__all__ = ["knowledge", "monitor"]

Out = Annotated[Path | None, typer.Option(help="Store the rows in this .parquet file.")]


@app.command()
def monitor(
    release: Release,
    text: Annotated[str | None, typer.Argument(help="The text.")] = None,
    file: Annotated[Path | None, typer.Option(help='Texts instead: JSONL, a line as {"text": "…"}.')] = None,
    domain: Annotated[str | None, typer.Option(help="Only this domain; else all that have neurons and texts.")] = None,
    threshold: Annotated[float, typer.Option(help="The probability from which on a risk is marked.")] = 0.5,
    monitor: Annotated[Path | None, typer.Option(help="A folder of monitors; --fit writes them there.")] = None,
    fit: Annotated[str | None, typer.Option(help="Calibrate on this JSONL of labelled texts, or on `shipped`.")] = None,
    out: Out = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Print how likely a text is about each safety domain, and which neurons say so on which tokens.

    Without --monitor, the monitors are calibrated on the shipped labelled texts first, which takes some seconds.

    Example:  safesail monitor runs/demo "The president was shot." --domain violence
    """
    from safesail.diagnosis.inspector import Inspector
    from safesail.diagnosis.results import default_path, write_result
    from safesail.diagnosis.risks import find_monitors, monitor_texts
    from safesail.progress import quiet as no_bars

    texts = _texts(text, file, needed=not (fit and monitor))
    no_bars(quiet or as_json)
    inspector = Inspector.from_pretrained(release)
    domains = [domain] if domain else None
    source: Any = fit or monitor or "shipped"
    if fit and monitor:
        made = find_monitors(inspector, fit, domains)
        for one in made.values():
            typer.echo(f"wrote {one.save(monitor)}", err=True)
        source = monitor
    if not texts:
        return
    result = monitor_texts(inspector, texts, source, domains=domains, threshold=threshold)
    path = write_result(result, out or default_path(release, result)) if out or file else None
    _tell(result, path, as_json, risk_lines)


@app.command()
def knowledge(
    release: Release,
    neuron: Annotated[str, typer.Option(help="The neuron's id, as layers.9.mlp/4291.")],
    entities: Annotated[str, typer.Option(help="A JSONL file of entities, or a shipped list.")] = "presidents",
    tokens: Annotated[int, typer.Option(help="The length of the continuation that is looked at.")] = 12,
    above: Annotated[float, typer.Option(help="The neuron fires above this normalised activation.")] = 0.0,
    out: Out = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Print whether a neuron fires on names, whether the model knows them, and how the two go together.

    Example:  safesail knowledge runs/demo --neuron layers.9.mlp/4291
    """
    from safesail.diagnosis import knowledge as asked
    from safesail.diagnosis.inspector import Inspector
    from safesail.diagnosis.results import default_path, write_result
    from safesail.progress import quiet as no_bars

    no_bars(quiet or as_json)
    asked.load_entities(entities)  # a broken list is told before the model is loaded
    inspector = Inspector.from_pretrained(release)
    result = asked.knowledge(inspector, neuron, entities, max_new_tokens=tokens, above=above)
    path = write_result(result, out or default_path(release, result))
    _tell(result, path, as_json, knowledge_lines)


def risk_lines(result: Any) -> list[str]:
    """A line per text and domain: its probability, and the three neurons that move it most."""
    asked: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in result.rows:
        asked.setdefault((row["number"], row["domain"]), []).append(row)
    lines, last = [], -1
    for (number, domain), rows in asked.items():
        if number != last:
            lines.append(visible(rows[0]["text"])[:100])
            last = number
        fired = [row for row in rows if row.get("neuron_id")][:3]
        why = ", ".join(f"{row['neuron_id']} {row['contribution']:+.2f} on {visible(row['token'])!r}" for row in fired)
        mark = "RISK" if rows[0]["above"] else ""
        lines.append(f"  {domain:12} {rows[0]['probability']:5.2f} {mark:4}  {why or 'none of its neurons fires'}")
    return lines


def knowledge_lines(result: Any) -> list[str]:
    """The entities, then the table."""
    lines = [f"{'name':26} {'act.':>5}  {'known':5}  continuation"]
    for row in result.rows:
        said = visible(row["continuation"])[:60]
        lines.append(
            f"{visible(row['name'])[:26]:26} {row['normalised']:5.2f}  {'yes' if row['known'] else 'no':5}  {said}"
        )
    table = result.facts["table"]
    return [
        *lines,
        "",
        f"{'':8} {'known':>6} {'unknown':>8}",
        f"{'fires':8} {table['fires_known']:6d} {table['fires_unknown']:8d}",
        f"{'silent':8} {table['silent_known']:6d} {table['silent_unknown']:8d}",
        f"{_ratio(table['odds_ratio'])}, Fisher's exact p = {table['p_value']:.3g}",
    ]


def _ratio(found: dict[str, float | None]) -> str:
    if found["value"] is None:
        return "odds ratio undefined (a row or a column is empty)"
    return f"odds ratio {found['value']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


def _tell(result: Any, path: Path | None, as_json: bool, lines: Any) -> None:
    if as_json:
        print(json.dumps({"facts": result.facts, "rows": result.rows, "python": result.python}, ensure_ascii=False))
    else:
        print("\n".join(lines(result)))
    if path:
        typer.echo(f"wrote {path}", err=True)


def _texts(text: str | None, file: Path | None, *, needed: bool) -> list[str]:
    """The text, or those of the file; InputError for both, none, or a line that holds none."""
    if text is not None and file is not None:
        raise InputError("a text and --file were given; give one of them.")
    if text is None and file is None:
        if needed:
            raise InputError('there is no text; give one, as `safesail monitor runs/demo "…"`, or a --file of them.')
        return []
    if file is None:
        return [text or ""]
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {file} ({error}); give an existing .jsonl file in UTF-8.") from None
    texts = [_text(file, number, line) for number, line in enumerate(lines, 1) if line.strip()]
    if not texts:
        raise InputError(f'{file} holds no texts; write one a line, as {{"text": "…"}}.')
    return texts


def _text(file: Path, number: int, line: str) -> str:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise InputError(f'{file}, line {number}: not JSON ({error}); write {{"text": "…"}}.') from None
    if not isinstance(found, dict) or not isinstance(found.get("text"), str):
        raise InputError(f'{file}, line {number}: no field `text`; write {{"text": "…"}}.')
    return found["text"]
