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
    text: Annotated[str, typer.Argument(help="The text, or with --answer the question.")],
    answer: Annotated[int, typer.Option(help="Ask it as a chat and generate so many tokens.")] = 0,
    top: Annotated[int, typer.Option(help="Neurons shown per token.")] = 2,
    model: Annotated[str | None, typer.Option(help="Load the language model from here.")] = None,
    as_json: Json = False,
) -> None:
    """Print which safety neurons fire on each token of a text.

    Example:  safesail inspect runs/demo "The terrorists took hostages."
    """
    from safesail.diagnosis.inspector import Inspector

    inspector = Inspector.from_pretrained(release, model=model)
    prompt: Any = [{"role": "user", "content": text}] if answer else text
    inspection = inspector.inspect(prompt, max_new_tokens=answer)
    if as_json:
        print(json.dumps(inspection.to_json(), ensure_ascii=False))
        return
    for line in token_table(inspection, top):
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
    """Serve the token inspector of a release.

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
