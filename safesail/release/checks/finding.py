"""What a check finds: it holds, fails or could not be made, and the first thing that is wrong."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from safesail.errors import InputError

__all__ = ["Finding", "Looked", "close", "finding", "unlike"]

Row = dict[str, Any]


class Finding(NamedTuple):
    """What came of one check."""

    part: str
    """`saes`, `neurons`, `examples`, `inspector`, or `release` for what concerns several of them."""
    check: str
    status: Literal["holds", "fails", "skipped"]
    detail: str
    """What was looked at; of a failure the first thing that is wrong and how many more are."""


class Looked(NamedTuple):
    """What a check looked at, and a sentence for everything that it found wrong."""

    what: str
    problems: list[str]


def finding(part: str, check: str, look: Callable[..., Looked], *what: Any) -> Finding:
    """Make one check of `what`."""
    try:
        looked = look(*what)
    except InputError as error:
        return Finding(part, check, "skipped", f"not checked: {error}")
    if not looked.problems:
        return Finding(part, check, "holds", looked.what)
    first, n_more = looked.problems[0], len(looked.problems) - 1
    return Finding(part, check, "fails", first + (f" (and {n_more:,} more)" if n_more else ""))


def unlike(who: str, row: Row, expected: Row, where: str) -> list[str]:
    """A sentence for each column that is not what it is elsewhere."""
    return [
        f"{who} has {key} {row.get(key)!r}, {where} {value!r}."
        for key, value in expected.items()
        if key not in row or row[key] != value
    ]


def close(one: Any, other: Any, tolerance: float) -> bool:
    """Whether two numbers agree; two absent ones do."""
    if not isinstance(one, int | float) or not isinstance(other, int | float):
        return one is None and other is None
    return abs(one - other) <= tolerance
