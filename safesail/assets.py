"""Where the data folders `hub/`, `space/` and `cards/` are: inside the wheel, or beside the package in a checkout."""

from pathlib import Path

__all__ = ["asset"]

_PACKAGE = Path(__file__).resolve().parent


def asset(name: str) -> Path:
    """The file or folder `name` (as `"hub/taxonomy.toml"`); raises FileNotFoundError when the installation lacks it."""
    for root in (_PACKAGE / "_assets", _PACKAGE.parent):
        if (root / name).exists():
            return root / name
    raise FileNotFoundError(f"{name} is missing from this installation of safesail; reinstall it with its data folders")
