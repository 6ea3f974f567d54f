"""The results of the diagnosis on the card of the examples.

The Hub shows a card to everybody, also where it gives the files only to those who ask. So of a result stand there its
size, the neurons that it is about, and the numbers among its facts; no prompt, no answer and no token.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safesail.diagnosis.interventions import CAVEAT
from safesail.diagnosis.results import Result, read_result
from safesail.release.columns import column_table
from safesail.release.diagnoses import SCHEMAS, neuron_ids
from safesail.release.inert import md_cell
from safesail.release.summary import markdown

__all__ = ["diagnosis_configs", "facts_line", "subjects"]

Row = dict[str, Any]
_LONGEST = 320
"""Characters of a line of facts; those that go beyond it are left to the file."""
_SHOWN = 3
"""Neurons of a result that are named before `and n more`."""
_DONE = {"steer": "steered", "clamp": "clamped", "ablate": "ablated"}
_WHAT = {
    "trajectories": "A row is a neuron that fires on a token of a prompt; several versions of one prompt (languages, "
    "spellings, paraphrases) stand side by side.",
    "interventions": f"A row is a prompt, with what the model said to it without and with changed neurons. {CAVEAT}",
    "knowledge": "A row is a name: whether a neuron fires on it, and whether the model continues a sentence about it "
    "with an accepted answer.",
    "monitor": "A row is what one neuron adds to the risk of a text in a domain. A probability is one among texts like "
    "those of the calibration; it is no verdict on a text.",
}


def diagnosis_configs(examples: Path) -> list[Row]:
    """What the card tells of every config that there is. examples: the folder of the data set, its tables written.

    Of each: name, what (a row is), n_results, n_rows, columns and results (Markdown tables), and files.
    """
    return [_config(name, files) for name in SCHEMAS if (files := sorted((examples / name).glob("*.parquet")))]


def _config(name: str, files: list[Path]) -> Row:
    results = [read_result(file) for file in files]
    cells = [
        [f"`{file.name}`", f"{len(result.rows):,}", md_cell(subjects(result)), md_cell(facts_line(result.facts), 999)]
        for file, result in zip(files, results, strict=True)
    ]
    return {
        "name": name,
        "what": _WHAT[name],
        "n_results": len(results),
        "n_rows": sum(len(result.rows) for result in results),
        "columns": markdown(*column_table(files[0])),
        "results": markdown(["result", "rows", "neurons", "facts"], cells),
        "files": [f"{name}/{file.name}" for file in files],
    }


def subjects(result: Result) -> str:
    """The neurons of a result, of interventions with what was done to them; at most three by name."""
    if result.config == "interventions":
        changes = [change for row in result.rows for change in row["interventions"] or []]
        names = list(dict.fromkeys(_done(change) for change in changes))
    else:
        names = sorted(neuron_ids(result.rows))
    n_more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {n_more:,} more" if n_more > 0 else "")


def _done(change: Row) -> str:
    """As `layers.9.mlp/42 steered by 4`; an ablation has no amount."""
    done = f"{change['neuron_id']} {_DONE.get(change['kind'], 'changed')}"
    by = {"steer": "by", "clamp": "at"}.get(change["kind"])
    return f"{done} {by} {change['amount']:g}" if by else done


def facts_line(facts: Row) -> str:
    """The numbers and yes-no answers among the facts, as `n_prompts 3, temperature 0`; as many as one line holds."""
    line = ""
    for fact in _numbers(facts):
        if len(line) + len(fact) > _LONGEST:
            return f"{line}, …"
        line += f", {fact}" if line else fact
    return line


def _numbers(facts: Row, inside: str = "") -> Iterator[str]:
    for key, value in facts.items():
        if not re.fullmatch(r"[a-z][a-z0-9_]*", key):  # what is no word of the toolkit's may be a prompt's
            continue
        name = f"{inside}{key}"
        if isinstance(value, bool):
            yield f"{name} {'yes' if value else 'no'}"
        elif isinstance(value, int | float):
            yield f"{name} {_shown(value)}"
        elif isinstance(value, dict) and value.keys() == {"value", "low", "high"}:
            yield f"{name} {_interval(value)}"
        elif isinstance(value, dict) and not inside:
            yield from _numbers(value, f"{key} ")


def _interval(interval: Row) -> str:
    value, low, high = (interval[name] for name in ("value", "low", "high"))
    if not all(isinstance(number, int | float) for number in (value, low, high)):
        return "undefined"
    return f"{_shown(value)} [{_shown(low)}, {_shown(high)}]"


def _shown(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
