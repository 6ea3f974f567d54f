"""What a person sees after a stage of SAFER: the tables of the stage's result."""

from collections.abc import Callable
from typing import Any

from safesail.release.summary import aligned
from safesail.rewards.comparison import comparison_table

__all__ = ["print_reward"]

Row = dict[str, Any]
Table = tuple[list[str], list[list[str]]]
_N_SHOWN = 12


def print_reward(run: Any, until: str) -> None:
    """Print the result of the last stage that was made, and the next command."""
    tables: dict[str, Callable[[Any], list[str]]] = {
        "reward": _accuracy,
        "salience": _salience,
        "rate": _ratings,
        "score": _validity,
        "compare": _comparison,
        "build": _release,
    }
    if until in tables:
        print("\n" + "\n".join(tables[until](run)))
    if until == "build":
        print(f"\nnext: safesail serve {run.folder}  or  safesail publish {run.folder} --dry-run")
    else:
        print(f"\nnext: safesail reward {run.folder}")


def _accuracy(run: Any) -> list[str]:
    found = run.json_of("reward", "accuracy.json")
    rows = [
        [kind, split.replace("_", " "), interval(cell, "accuracy"), str(cell["n"])]
        for kind, splits in found.items()
        for split, cell in splits.items()
    ]
    return ["How often the chosen answer has the higher reward:", "", aligned(["pairs", "", "accuracy", "n"], rows)]


def _salience(run: Any) -> list[str]:
    rows = run.table_of("salience", "salience.parquet")[:_N_SHOWN]
    table = [[str(row["latent"]), _signed(row["salience"]), _between(row), str(row["n_contexts"])] for row in rows]
    return [
        "The latents of largest salience (+: more active on chosen answers):",
        "",
        aligned(["latent", "salience", "95 %", "contexts"], table),
    ]


def _ratings(run: Any) -> list[str]:
    safety = run.json_of("rate", "safety.json")
    saliences = {row["latent"]: row for row in run.table_of("salience", "salience.parquet")}
    said = {row["latent"]: row for row in run.table_of("rate", "ratings.parquet")}
    rows = [
        [str(latent), _signed(saliences[latent]["salience"]), str(said[latent]["rating"])]
        for latent in [*safety["positive"], *safety["negative"]][:_N_SHOWN]
    ]
    counts = ", ".join(f"{n} rated {score}" for score, n in safety["ratings"].items() if n)
    kept = (
        f"{len(safety['positive'])} latents in S+ and {len(safety['negative'])} in S- (rated {safety['keep']} or more)"
    )
    return [f"{counts or 'nothing was rated'}; {kept}", "", aligned(["latent", "salience", "rating"], rows)]


def _validity(run: Any) -> list[str]:
    rows = [row for row in run.json_of("score", "validity.json")["rows"] if row["held_out"] and row["source"] is None]
    table = [
        [row["measure"], row["kind"], interval(row["share"]), interval(row["spearman"]), str(row["n_pairs"])]
        for row in rows
    ]
    head = ["measure", "pairs", "right on", "Spearman with harm", "n"]
    return ["On held-out pairs, whether the chosen side has the higher value:", "", aligned(head, table)]


def _comparison(run: Any) -> list[str]:
    found = run.json_of("compare", "comparison.json")
    head = "Reward models retrained on edited data, on held-out pairs (change against unedited data, in points):"
    return [head, "", aligned(*comparison_table(found["rows"]))]


def _release(run: Any) -> list[str]:
    return [
        f"The release is in {run.folder}: {' '.join(f'{part}/' for part in run.parts)}",
        "",
        *_accuracy(run),
        "",
        *_comparison(run),
    ]


def interval(cell: Row | None, key: str = "value") -> str:
    """`0.71 [0.65, 0.76]`; a dash where nothing is known."""
    if cell is None or cell[key] is None:
        return "–"
    ends = f" [{cell['low']:.2f}, {cell['high']:.2f}]" if cell["low"] is not None else ""
    return f"{cell[key]:.2f}{ends}"


def _signed(value: float) -> str:
    return f"{value:+.3f}"


def _between(row: Row) -> str:
    return "–" if row["low"] is None else f"[{row['low']:+.3f}, {row['high']:+.3f}]"
