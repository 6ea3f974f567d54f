"""The numbers in the tables: what is told twice agrees, sums add up, quantiles ascend."""

import itertools
import math
from typing import Any

from safesail.neurons import QUANTILES
from safesail.release.checks.finding import Looked, close, unlike
from safesail.release.checks.part import Part

__all__ = ["confusion", "contexts", "costs", "main_table", "quantiles"]

Row = dict[str, Any]


def main_table(part: Part) -> Looked:
    """Explanation, score, baseline and statistics of the main table are those of the tables they come from."""
    rows = part.rows("neurons")
    said = _main_explanations(part, rows)
    if part.is_converted:
        said |= _fallen_back(part, said)
    language = next((row["language"] for row in said.values()), "")
    scores = {(row["neuron_id"], row["method"], row["language"]): row for row in part.rows("scores")}
    quantiles = {row["neuron_id"]: row for row in part.rows("quantiles")}
    problems = []
    for row in rows:
        expected = _expected(row, said.get(row["neuron_id"]), scores, language, quantiles.get(row["neuron_id"]))
        problems += unlike(f"neurons: {row['neuron_id']}", row, expected, "its table")
    return Looked(f"{len(rows)} rows", problems)


def _main_explanations(part: Part, rows: list[Row]) -> dict[str, Row]:
    """The explanations that the main table shows: those of the language that agrees with it most often."""
    by_language = {
        name: {row["neuron_id"]: row for row in part.table(f"explanations/{name}.parquet")} for name in part.languages
    }

    def n_same(name: str) -> int:
        found = by_language[name]
        return sum(row["explanation"] == found.get(row["neuron_id"], {}).get("explanation") for row in rows)

    return by_language[max(by_language, key=n_same)] if by_language else {}


def _fallen_back(part: Part, said: dict[str, Row]) -> dict[str, Row]:
    """The explanations of another language for the neurons whose own is absent."""
    others = {row["neuron_id"]: row for row in part.rows("explanations") if row["status"] != "absent"}
    return {name: row for name, row in others.items() if said.get(name, {"status": "absent"})["status"] == "absent"}


def _expected(row: Row, said: Row | None, scores: dict[Any, Row], language: str, measured: Row | None) -> Row:
    """The columns of a row of the main table, from the tables they come from."""
    expected = {key: (said or {}).get(key) for key in ("explanation", "confidence", "explainer")}
    method, level = row["simulator"].partition(" (")[0], row["simulator"].partition("/")[0]
    score = _one_of(scores, row["neuron_id"], method, language)
    # whole texts are predicted by `detection` and `similarity`, of which the baseline is the text's
    baseline = f"{'text' if level in ('detection', 'similarity') else level}/lexical"
    lexical = _one_of(scores, row["neuron_id"], baseline, language)
    expected |= {"score": score.get("score"), "score_low": score.get("low"), "score_high": score.get("high")}
    expected["lexical_score"] = lexical.get("score")
    failed = said is not None and said["status"] != "ok"
    expected["status"] = said["status"] if said is not None and failed else score.get("status", row["status"])
    names = {"firing_rate": "firing_rate", "q999": "p999", "max_activation": "max"}
    names |= {"hook_point": "hook_point", "latent": "latent"}
    return expected | ({name: measured[source] for name, source in names.items()} if measured else {})


def _one_of(scores: dict[Any, Row], neuron: str, method: str, language: str) -> Row:
    """A neuron's score by a method; the baseline reads no explanation and has no language."""
    return scores.get((neuron, method, language)) or scores.get((neuron, method, "")) or {}


def costs(part: Part) -> Looked:
    """Tokens and price of a neuron are the sums over its explanations and scores; no price where one has none."""
    spent: dict[str, list[Row]] = {}
    for row in [*part.rows("explanations"), *part.rows("scores")]:
        spent.setdefault(row["neuron_id"], []).append(row)
    problems, rows = [], part.rows("neurons")
    for row in rows:
        mine = spent.get(row["neuron_id"], [])
        for kind in ("prompt_tokens", "completion_tokens", "cost_usd"):
            parts = [each[kind] for each in mine]
            total = None if None in parts else sum(parts)
            if not close(row[kind], total, 1e-9):
                problems.append(f"neurons: {row['neuron_id']} has {kind} {row[kind]}, its answers make {total}.")
    return Looked(f"{len(rows)} neurons", problems)


def quantiles(part: Part) -> Looked:
    """Quantiles ascend, agree with the firing rate, and give the normaliser."""
    rows = [row for row in part.rows("quantiles") if all(row[name] is not None for name in (*QUANTILES, "max"))]
    problems = [f"quantiles: {row['neuron_id']} {problem}." for row in rows if (problem := _quantile_problem(row))]
    return Looked(f"{len(rows):,} latents", problems)


def _quantile_problem(row: Row) -> str:
    """What is wrong with the statistics of a latent, or an empty string."""
    n, n_fired = row["n_tokens"], row["firing_rate"] * row["n_tokens"]
    if abs(n_fired - round(n_fired)) > 1e-6 * max(n_fired, 1):
        return f"fires on {n_fired:g} of {n} tokens"
    ascending = [*(row[name] for name in QUANTILES), row["max"]]
    if ascending[0] < 0 or any(low > high for low, high in itertools.pairwise(ascending)):
        return "has quantiles that do not ascend"
    for name, level in QUANTILES.items():
        n_below = max(math.ceil(level * n - 1e-9), 1)  # the quantile is this many tokens from below, zeros counted
        if (row[name] > 0) != (n_below > n - round(n_fired)):
            return f"has {name} = {row[name]:g} and fires on {round(n_fired)} of {n} tokens"
    if (row["max"] > 0) != (n_fired > 0):
        return f"has the maximum {row['max']:g} and fires on {round(n_fired)} tokens"
    normaliser = max(row["p999"], row["median_active"])
    if not close(row["normaliser"], normaliser, 1e-6 * normaliser):
        return f"has the normaliser {row['normaliser']:g}, its quantiles give {normaliser:g}"
    if row["histogram"] is not None and (len(row["histogram"]) != 10 or sum(row["histogram"]) != round(n_fired)):
        return f"has a histogram of {sum(row['histogram'])} tokens and fires on {round(n_fired)}"
    return ""


def landscape(part: Part) -> Looked:
    """Every neuron on the landscape has both coordinates, and landscape.json says by which method and how many."""
    rows = part.rows("neurons")
    placed = [row for row in rows if row["x"] is not None and row["y"] is not None]
    halves = [row for row in rows if (row["x"] is None) != (row["y"] is None)]
    problems = [f"neurons: {row['neuron_id']} has one coordinate." for row in halves]
    outside = [row for row in placed if not (abs(row["x"]) <= 1 and abs(row["y"]) <= 1)]
    problems += [f"neurons: {row['neuron_id']} lies outside the landscape." for row in outside]
    if part.is_converted and not placed:
        return Looked("none", problems)
    said = part.repository.json("landscape.json")
    if said.get("n_neurons") != len(placed):
        problems.append(f"landscape.json says {said.get('n_neurons')} neurons, {len(placed)} have coordinates.")
    return Looked(f"{len(placed)} neurons by {said.get('method')}", problems)


def confusion(part: Part) -> Looked:
    """Confusion counts add up to the units, and those of active units to the active ones."""
    names = ("true_positives", "false_negatives", "false_positives", "true_negatives")
    problems, n = [], 0
    for row in part.rows("scores"):
        counts = [row[name] for name in names]
        who = f"scores: {row['neuron_id']} by {row['method']}"
        if any(count is None for count in counts):
            problems += [f"{who} has some of the confusion counts only."] if set(counts) != {None} else []
            continue
        n += 1
        if sum(counts) != row["n_units"] or sum(counts[:2]) != row["n_active"]:
            units = f"{row['n_units']} units, {row['n_active']} active"
            problems.append(
                f"{who}: confusion counts of {sum(counts)} units, {sum(counts[:2])} active; it has {units}."
            )
    return Looked(f"{n:,} rows", problems)


def contexts(part: Part) -> Looked:
    """An example's tokens make its text, have an activation each, and the strongest is the example's."""
    rows = part.rows("examples")
    problems = [
        f"examples: {row['neuron_id']}, {row['half']} {row['rank']}: {problem}."
        for row in rows
        if (problem := _context_problem(row))
    ]
    return Looked(f"{len(rows):,} examples", problems)


def _context_problem(row: Row) -> str:
    if "".join(row["tokens"]) != row["text"]:
        return "the tokens do not make the text"
    if len(row["tokens"]) != len(row["activations"]):
        return f"{len(row['tokens'])} tokens and {len(row['activations'])} activations"
    strongest = max(row["activations"], default=0.0)
    if not close(strongest, row["activation"], 1e-6 * abs(row["activation"])):
        return f"the activation is {row['activation']:g}, the strongest token's {strongest:g}"
    return ""
