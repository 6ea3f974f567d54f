"""Progress bars with a time estimate: on a terminal a bar, elsewhere silence (stages print their own lines)."""

from typing import Any

__all__ = ["bar", "quiet"]

_state = {"quiet": False}


def quiet(value: bool = True) -> None:
    """Switch all bars off (`--quiet`), or on again."""
    _state["quiet"] = value


def bar(label: str, total: int, unit: str) -> Any:
    """A tqdm bar counting `total` units, to be used in a `with` block; it shows rate and time left."""
    from tqdm import tqdm

    disable = True if _state["quiet"] else None  # None: only on a terminal
    return tqdm(total=total, desc=label, unit=f" {unit}", disable=disable, smoothing=0.1, leave=False, unit_scale=True)
