"""The command's frame and the options that several verbs share."""

from pathlib import Path
from typing import Annotated

import typer

__all__ = ["BudgetTokens", "BudgetUsd", "DryRun", "Json", "Quiet", "Release", "RunFolder", "app", "visible"]

app = typer.Typer(
    help="Train, select, explain, score and inspect safety sparse autoencoders.\n\n"
    "Example:  safesail run hub/recipes/demo.toml  then  safesail serve runs/demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Quiet = Annotated[bool, typer.Option("--quiet", help="No progress, only results and errors.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Only print what it would take and whether it fits.")]
BudgetUsd = Annotated[
    float | None, typer.Option("--budget-usd", help="Stop before language models cost more dollars than this.")
]
BudgetTokens = Annotated[
    int | None, typer.Option("--budget-tokens", help="Stop before language models use more tokens than this.")
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, as runs/demo.")]
Release = Annotated[str, typer.Argument(help="A run folder, or the Hub name of a release (org/name).")]


def visible(text: str) -> str:
    """The text in one line, control characters spelled out, so that it cannot move the cursor or hide."""
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
