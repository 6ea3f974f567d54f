"""The verbs about concept contrastive query pairs."""

import json
from pathlib import Path
from typing import Annotated

import typer

from safesail.cli.app import Json, app

__all__ = ["check", "draft"]

pairs_app = typer.Typer(help="Concept contrastive query pairs.", no_args_is_help=True)
app.add_typer(pairs_app, name="pairs")


@pairs_app.command("check")
def check(
    files: Annotated[list[str], typer.Argument(help="Jsonl files of concept pairs, or shipped sets such as en.")],
    as_json: Json = False,
) -> None:
    """Check files of concept pairs, each for itself and against each other; exit status 1 if anything is wrong.

    Example:  safesail pairs check en zh mine.jsonl
    """
    from safesail.pairs import check_files
    from safesail.taxonomy import Taxonomy

    problems = check_files(files, Taxonomy.load())
    if as_json:
        print(json.dumps({"files": files, "problems": problems}, ensure_ascii=False))
    else:
        print("\n".join(problems) or f"{', '.join(files)}: no problem found")
    raise typer.Exit(1 if problems else 0)


@pairs_app.command("draft")
def draft(
    file: Annotated[Path, typer.Argument(help="A jsonl file of pairs that lack `without`.")],
    out: Annotated[Path, typer.Option(help="The jsonl file of whole pairs; those already in it are kept.")],
    model: Annotated[str, typer.Option(help="The endpoint's model.")],
    base_url: Annotated[
        str | None, typer.Option(help="An OpenAI-compatible endpoint (default: OPENAI_BASE_URL, or OpenAI's own).")
    ] = None,
    as_json: Json = False,
) -> None:
    """Let a language model draft the twin without the concept; a twin that breaks a rule is named, not written.

    Example:  safesail pairs draft half.jsonl --out mine.jsonl --model qwen --base-url http://127.0.0.1:8000/v1
    """
    from safesail.interpretation.draft import draft_file
    from safesail.interpretation.llm import EndpointBackend, Llm
    from safesail.taxonomy import Taxonomy

    backend = EndpointBackend(model, base_url)
    problems = draft_file(file, out, Llm(backend, out.with_name(f".{out.name}.answers.sqlite")), Taxonomy.load())
    if as_json:
        print(json.dumps({"file": str(out), "problems": problems}, ensure_ascii=False))
    else:
        print("\n".join(problems) or f"{out}: every pair has its twin; read them before you use them")
    raise typer.Exit(1 if problems else 0)
