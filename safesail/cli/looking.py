"""The verbs that look into a model with a release: `inspect` and `serve`."""

import json
import os
import runpy
import sys
from typing import Annotated, Any

import typer

from safesail.cli.app import Json, Release, app, visible
from safesail.errors import InputError

__all__ = ["inspect", "serve", "token_table"]


@app.command()
def inspect(
    release: Release,
    text: Annotated[str, typer.Argument(help="The text, or with --answer the question; of a reward model the prompt.")],
    answer: Annotated[int, typer.Option(help="Ask it as a chat and generate so many tokens.")] = 0,
    top: Annotated[int, typer.Option(help="Neurons shown per token; of a reward model those beside S⁺ and S⁻.")] = 2,
    model: Annotated[str | None, typer.Option(help="Load the language model from here.")] = None,
    chosen: Annotated[str | None, typer.Option(help="Of a reward model: the better answer.")] = None,
    rejected: Annotated[str | None, typer.Option(help="Of a reward model: the other answer.")] = None,
    as_json: Json = False,
) -> None:
    """Print which safety neurons fire on each token of a text, or what tells two answers apart to a reward model.

    Example:  safesail inspect runs/demo "The terrorists took hostages."

    Of a reward model:  safesail inspect runs/safer-demo "How do I pick a lock?" --chosen "No." --rejected "So."
    """
    from safesail.repository import parts_of_release

    if "reward" in parts_of_release(release):
        if model or answer:
            raise InputError(
                f"{release} is of a reward model, which writes no answers and is read by its own SAE alone; leave "
                "--model and --answer out."
            )
        _compare(release, text, chosen, rejected, top, as_json)
        return
    if chosen is not None or rejected is not None:
        raise InputError(f"{release} has no reward model to compare answers with; leave --chosen and --rejected out.")
    from safesail.diagnosis.inspector import Inspector

    inspector = Inspector.from_pretrained(release, model=model)
    prompt: Any = [{"role": "user", "content": text}] if answer else text
    inspection = inspector.inspect(prompt, max_new_tokens=answer)
    if as_json:
        print(json.dumps(inspection.to_json(), ensure_ascii=False))
        return
    for line in token_table(inspection, top):
        print(line)


def _compare(release: str, prompt: str, chosen: str | None, rejected: str | None, top: int, as_json: bool) -> None:
    """Print two answers side by side as the reward model of a release reads them."""
    from safesail.cli.answers import comparison_lines
    from safesail.rewards.inspector import RewardInspector

    if chosen is None or rejected is None:
        raise InputError(
            f"{release} is of a reward model, which compares two answers; type "
            f'`safesail inspect {release} "the prompt" --chosen "one answer" --rejected "the other"`.'
        )
    comparison = RewardInspector.from_pretrained(release).compare(prompt, chosen, rejected)
    if as_json:
        print(json.dumps(comparison.to_json(), ensure_ascii=False))
        return
    for line in comparison_lines(comparison, top):
        print(line)


def token_table(inspection: Any, top: int) -> list[str]:
    """The lines of a terminal table: a token each, with its strongest explained neurons."""
    lines = [f"{'token':18} {'act.':>5}  {'neuron':20} {'score':>5} {'trust':9} {'domains':20} explanation"]
    for i, unit in enumerate(inspection.units):
        shown = visible(unit.text)[:17]
        hits = inspection.hits(i, explained_only=True)[:top]
        if not hits:
            lines.append(f"{shown:18} {'·':>5}  {inspection.note(i)}".rstrip())
        for row, hit in enumerate(hits):
            score = "" if hit.score is None else f"{hit.score:.2f}"
            lines.append(
                f"{shown if row == 0 else '':18} {hit.normalised or 0:5.2f}  {hit.neuron_id:20} {score:>5} "
                f"{hit.trust:9} "
                f"{','.join(hit.domains) or '-':20} {visible(hit.explanation or hit.status)[:60]}"
            )
    return lines


@app.command()
def serve(
    release: Release,
    port: Annotated[int, typer.Option(help="The port.")] = 7860,
    host: Annotated[
        str, typer.Option(help="The address; anything but loopback opens it to the network.")
    ] = "127.0.0.1",
    model: Annotated[str | None, typer.Option(help="Load the language model from here.")] = None,
) -> None:
    """Serve the inspector of a release, of a language model or of a reward model.

    Example:  safesail serve runs/demo --port 7861
    """
    import importlib.util

    from safesail.assets import asset

    if importlib.util.find_spec("gradio") is None:
        raise InputError("the Space needs gradio; type `pip install 'safesail[space]'`.")
    os.environ |= {"SAFESAIL_RELEASE": release, "SAFESAIL_HOST": host, "SAFESAIL_PORT": str(port)}
    if model:
        os.environ["SAFESAIL_MODEL"] = model
    sys.path.insert(0, str(asset("space")))
    runpy.run_path(str(asset("space/app.py")), run_name="__main__")
