"""The command line: one verb a stage. Parses, calls one function, prints."""

# ruff: noqa: I001  `--help` lists the verbs in the order in which their modules are imported
import sys

from safesail.cli.app import app
from safesail.cli import making
from safesail.cli import reward
from safesail.cli import looking
from safesail.cli import trajectories
from safesail.cli import steering
from safesail.cli import monitor
from safesail.cli import hub
from safesail.cli import pairs
from safesail.errors import InputError

__all__ = ["app", "hub", "looking", "main", "making", "monitor", "pairs", "reward", "steering", "trajectories"]


def main() -> None:
    """Run the command line: a person's mistake is one sentence and exit status 2."""
    try:
        app(standalone_mode=True)
    except InputError as error:
        print(f"safesail: {error}", file=sys.stderr)
        raise SystemExit(2) from None
