"""The verb that changes neurons and shows what the model then says: `steer`."""

import json
from collections.abc import Iterator
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from safesail.cli.app import Json, Release, app, visible
from safesail.errors import InputError

__all__ = ["prompts_of", "steer"]

Messages = list[dict[str, str]]
_SHOWN = 300
"""Characters of an answer printed when there are several; the stored table holds them whole."""


class _Kind(StrEnum):
    steer = "steer"
    clamp = "clamp"
    ablate = "ablate"


@app.command()
def steer(
    release: Release,
    prompt: Annotated[str | None, typer.Argument(help="What is asked, as a chat; or give --prompts.")] = None,
    neuron: Annotated[list[str], typer.Option(help="A neuron, as layers.9.mlp/1234; may be given several times.")] = [],  # noqa: B006
    kind: Annotated[_Kind, typer.Option(help="Add its direction, hold its activation, or take it away.")] = _Kind.steer,
    amount: Annotated[float, typer.Option(help="How much, in multiples of the neuron's normaliser.")] = 4.0,
    answer: Annotated[int, typer.Option(help="Generate so many tokens.")] = 48,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of sampling, for every prompt the same.")] = 0,
    prompts: Annotated[Path | None, typer.Option(help="A .txt (one a line) or .jsonl file of prompts.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the table goes, as out.parquet.")] = None,
    model: Annotated[str | None, typer.Option(help="Load the language model from here.")] = None,
    as_json: Json = False,
) -> None:
    """Steer, clamp or ablate neurons: the answers with and without, and how often they decline.

    Example:  safesail steer runs/demo "Tell me about him." --neuron layers.9.mlp/4291 --amount 4
    """
    from safesail.diagnosis.inspector import Inspector
    from safesail.diagnosis.interventions import Intervention, answers_under, declining_change
    from safesail.diagnosis.results import default_path, write_result

    asked = _asked(prompt, prompts)
    inspector = Inspector.from_pretrained(release, model=model)
    ask = answers_under if prompts is None else declining_change
    changes = [Intervention(id, kind.value, amount) for id in neuron]
    result = ask(inspector, asked, changes, max_new_tokens=answer, temperature=temperature, seed=seed)
    path = write_result(result, out or default_path(release, result))
    if as_json:
        print(json.dumps({"facts": result.facts, "rows": result.rows, "path": str(path)}, ensure_ascii=False))
        return
    for line in (*_lines(result), f"stored: {path}"):
        print(line)


def prompts_of(path: Path) -> list[Messages]:
    """The chats of a file: of a .txt each line that is not blank, of a .jsonl each `prompt`, `text` or `messages`."""
    if path.suffix not in (".txt", ".jsonl"):
        raise InputError(f"{path} is no list of prompts; give a .txt (one prompt a line) or a .jsonl file.")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); give a .txt or .jsonl file of prompts in UTF-8.") from error
    read = _of_json if path.suffix == ".jsonl" else _chat
    found = [read(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise InputError(f"{path} holds no prompts; write one a line.")
    return found


def _asked(prompt: str | None, prompts: Path | None) -> list[Messages]:
    if (prompt is None) == (prompts is None):
        raise InputError("give either a prompt or a file of them with --prompts.")
    return [_chat(prompt, "the prompt")] if prompt is not None else prompts_of(Path(prompts or ""))


def _chat(text: str, _where: str) -> Messages:
    return [{"role": "user", "content": text}]


def _of_json(line: str, where: str) -> Messages:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where} is not JSON ({error}); write one object a line.") from None
    if isinstance(row, dict):
        text = row.get("prompt", row.get("text"))
        if isinstance(text, str):
            return _chat(text, where)
        if _is_conversation(row.get("messages")):
            return row["messages"]
    raise InputError(f'{where} holds no prompt; write {{"prompt": "…"}} or {{"messages": [{{"role": …}}]}}.')


def _is_conversation(messages: Any) -> bool:
    """Whether it is a list of {role, content}."""
    if not isinstance(messages, list) or not messages:
        return False
    return all(
        isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        for message in messages
    )


def _lines(result: Any) -> Iterator[str]:
    """What is printed of a result."""
    one = len(result.rows) == 1
    for row in result.rows:
        yield f"prompt     {visible(row['prompt'])[:_SHOWN]}"
        for side in ("unchanged", "changed"):
            text, note = visible(row[f"answer_{side}"]), "  [declines]" if row[f"declines_{side}"] else ""
            yield f"{side:9}  {text if one else text[:_SHOWN]}{note}"
        yield f"           equal tokens at their start: {row['n_equal_ids']} of {len(row['ids_unchanged'])}"
    if one:
        yield from _token_lines(result.rows[0]["next_tokens"])
    if "declining" in result.facts:
        yield result.facts["declining"]["sentence"]
    yield result.facts["caveat"]


def _token_lines(tokens: list[dict[str, Any]]) -> Iterator[str]:
    yield f"{'first token':18} {'unchanged':>10} {'changed':>10}"
    for token in tokens:
        before, after = token["probability_unchanged"], token["probability_changed"]
        yield f"{visible(token['text'])[:17]:18} {before:10.4f} {after:10.4f}"
