"""What several parts of a release say of the same thing: neurons, selection, firing rates, examples."""

from typing import Any

from safesail.errors import InputError
from safesail.neurons import neuron_id
from safesail.release.checks import diagnoses
from safesail.release.checks.finding import Looked, close, unlike
from safesail.release.checks.part import Part

__all__ = ["examples_fit", "firing_rates", "neurons_exist", "one_release", "selection"]

Row = dict[str, Any]


def one_release(parts: dict[str, Part]) -> Looked:
    """All parts are of one release in one version."""
    problems = []
    first, *others = parts.values()
    for part in others:
        for key in ("organization", "release", "version"):
            mine, its = getattr(first.manifest, key), getattr(part.manifest, key)
            problems += [] if mine == its else [f"{first.name} is of {key} {mine!r}, {part.name} of {its!r}."]
    return Looked(f"{', '.join(parts)}: {first.manifest.release} {first.manifest.version}", problems)


def neurons_exist(parts: dict[str, Part]) -> Looked:
    """Every neuron id is a latent of the selected SAE of a hook point that there is."""
    saes, neurons = parts["saes"], parts["neurons"]
    d_sae = {name: saes.sae_config(id).d_sae for name, id in saes.config.selected.items()}
    rows = [row for config in ("neurons", "quantiles") for row in neurons.rows(config)]
    problems = [
        f"{row['neuron_id']} is row {neuron_id(row['hook_point'], row['latent'])}." for row in rows if _off(row)
    ]
    ids = {row["neuron_id"] for config in ("explanations", "scores") for row in neurons.rows(config)}
    ids |= {row["neuron_id"] for row in rows}
    if "examples" in parts:
        ids |= {row["neuron_id"] for row in parts["examples"].rows("examples")} | diagnoses.ids(parts["examples"])
    for id in sorted(ids):
        hook_point, _, latent = id.rpartition("/")
        if hook_point not in d_sae:
            problems.append(f"{id} is of a hook point without a selected SAE.")
        elif not latent.isdigit() or int(latent) >= d_sae[hook_point]:
            problems.append(f"{id} is not in its SAE, whose latents are 0 to {d_sae[hook_point] - 1}.")
    return Looked(f"{len(ids):,} neuron ids", problems)


def _off(row: Row) -> bool:
    return row["neuron_id"] != neuron_id(row["hook_point"], row["latent"])


def selection(parts: dict[str, Part]) -> Looked:
    """The selection table and the contrast over all pairs are config.json's, and its settings the SAEs' own."""
    saes, neurons = parts["saes"], parts["neurons"]
    table = {row["sae_id"]: row for row in neurons.rows("selection")}
    over_all = {row["sae_id"]: row for row in neurons.rows("contrast") if row["grouping"] == "all"}
    problems = [f"the selection table has {id}, config.json has not." for id in table if id not in saes.config.by_id]
    problems += [f"the selection table has no row for {id}." for id in saes.config.by_id if id not in table]
    for id, row in table.items():
        if id not in saes.config.by_id:
            continue
        numbers, config = _flat(saes.config.by_id[id]), saes.sae_config(id)
        settings = {"architecture": config.architecture, "k": config.k, "coefficient": config.coefficient}
        columns = {key: value for key, value in numbers.items() if key in row}
        problems += unlike(f"selection: {id}", row, {**columns, **settings}, "saes/")
        if id in over_all:
            same = {key: value for key, value in columns.items() if key in over_all[id]}
            problems += unlike(f"contrast: {id} over all pairs", over_all[id], same, "config.json")
    return Looked(f"{len(table)} SAEs", problems)


def _flat(entry: Row) -> Row:
    """An entry of config.json with L_{0,t} as the columns of the tables."""
    flat = {key: value for key, value in entry.items() if not isinstance(value, dict)}
    for key, end in (("l0_t", ""), ("l0_t_null", "_null")):
        flat |= {f"l0_t_{t}{end}": value for t, value in (entry.get(key) or {}).items()}
    return flat


def firing_rates(parts: dict[str, Part]) -> Looked:
    """The firing rates of the quantiles are those of the SAEs' sparsity files, both over all harvested tokens.

    A latent near its threshold may fire in one pass over the harvest and not in another, whose sums are rounded
    otherwise: one token in 10,000 on which it fires, or two.
    """
    from safetensors.torch import load_file

    saes, problems, n = parts["saes"], [], 0
    rows = parts["neurons"].rows("quantiles")
    for hook_point, id in saes.config.selected.items():
        mine = [row for row in rows if row["hook_point"] == hook_point]
        n_tokens = saes.config.by_id[id].get("n_tokens")
        is_there = f"{id}/sparsity.safetensors" in saes.there
        if not is_there or n_tokens is None or any(row["n_tokens"] != n_tokens for row in mine):
            continue
        rates = 10 ** load_file(saes.repository.file(f"{id}/sparsity.safetensors"))["sparsity"].double() - 1e-10
        for row in mine:
            n_here, n_there = row["firing_rate"] * n_tokens, float(rates[row["latent"]]) * n_tokens
            n += 1
            if not close(n_here, n_there, max(2.5, 1e-4 * n_here)):
                problems.append(f"{row['neuron_id']} fires on {n_here:.0f} tokens; by its sparsity file {n_there:.0f}.")
    if not n:
        raise InputError("the sparsity files are not of the tokens that the quantiles were counted on.")
    return Looked(f"{n:,} latents", problems)


def examples_fit(parts: dict[str, Part]) -> Looked:
    """Examples are of the main table's neurons, not above their maximum, and at the level that the normaliser gives."""
    quantiles = {row["neuron_id"]: row for row in parts["neurons"].rows("quantiles")}
    mine, rows = {row["neuron_id"] for row in parts["neurons"].rows("neurons")}, parts["examples"].rows("examples")
    shown = {row["neuron_id"] for row in rows if row["half"] == "explain"}  # who was never shown was not explained
    problems = [f"examples have {id}, which the main table has not." for id in sorted(shown - mine)]
    problems += [f"examples lack {id}." for id in sorted(mine - shown)]
    for row in rows:
        measured = quantiles.get(row["neuron_id"])
        if measured is None or row["neuron_id"] not in mine:
            continue
        who = f"examples: {row['neuron_id']}, {row['half']} {row['rank']}"
        if row["activation"] > measured["max"] * (1 + 1e-6):
            problems.append(f"{who} has the activation {row['activation']:g}, above the maximum {measured['max']:g}.")
        if row["level"] not in (levels := _levels(row, measured["normaliser"])):
            problems.append(f"{who} is at level {row['level']}, its activation at {min(levels)}.")
    return Looked(f"{len(rows):,} examples", problems)


def _levels(row: Row, normaliser: float) -> set[int]:
    """The tenth of the normaliser that an example's activation falls in (two where fp32 cannot tell), 0 if silent."""
    if row["stratum"] == "near-miss" or not normaliser:
        return {0}
    tenths = 10 * row["activation"] / normaliser
    return {min(int(tenths * (1 + end)), 9) + 1 for end in (-1e-6, 1e-6)}
