"""Which SAE of the sweep, and which of its latents, carry the safety concepts: decided before any money is spent.

Reads the trained SAEs, their fidelity and the concept contrastive query pairs. Writes `selection.json` (the curve, the
options it was measured with and the SAE chosen per hook point), `contrast.parquet` (every SAE on every group of pairs)
and `candidates.json` (the safety-related latents of the chosen SAEs, per hook point and domain).

I_CDF and L_{0,t} are those of `contrast`: our reading of Safe-SAIL's words, whose formulas are not published. Safe-SAIL
takes the SAE that serves the concepts best. Ours is by default the best in I_CDF less the I_CDF of randomly swapped
pairs (`above_null`): on small models I_CDF itself grows with L0, since among more active latents more differ by chance.
Both are sums over pairs of how many latents differ, and do not see whether they are the same latents in every pair:
above_null is half of what more latents win than lose. Consistency shows in L_{0,t} against its null, and in candidates.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from safesail.contrast import Contrast, contrast
from safesail.errors import InputError
from safesail.lm.activations import Activations
from safesail.lm.tokens import special_ids
from safesail.pairs import Pair
from safesail.progress import bar
from safesail.recipe import Recipe, SelectSection
from safesail.run import StageWork, write_json
from safesail.sae import model as sae_files
from safesail.sae.config import SaeConfig
from safesail.training.candidates import candidate_latents
from safesail.training.groups import Group, groups_of, latent_shares, measure
from safesail.training.queries import (
    Query,
    active_latents,
    activity_thresholds,
    held_out_sample,
    queries_of,
    query_activations,
)
from safesail.training.trainer import variants

__all__ = ["Contender", "choose", "select_stage"]

Row = dict[str, Any]


class Contender(NamedTuple):
    """What the choice among a hook point's SAEs rests on."""

    sae_id: str
    merit: Tensor
    """The criterion's number per pair, whose mean over the group is what is maximised: (n_pairs,)."""
    explained_variance: float | None


def select_stage(
    recipe: Recipe,
    activations: Activations,
    trained: Path,
    fidelity: dict[str, Any],
    pairs: list[Pair],
    model: Any,
    tokenizer: Any,
    work: StageWork,
) -> None:
    """Measure concept contrast for every SAE, choose one per hook point, and name its safety-related latents.

    A hook point without a single candidate is named in the facts (`without_candidates`); if all are, it is an error.
    """
    hook_points = tuple(activations.hook_points)
    queries, specials = queries_of(pairs), special_ids(tokenizer)
    configs = {name: variants(recipe, activations, name) for name in hook_points}
    curve, table, selected, candidates = {}, [], {}, {}
    with bar("select", len(queries) * (1 + sum(map(len, configs.values()))), "query") as progress:
        texts = [query.text for query in queries]
        captured = query_activations(model, tokenizer, texts, hook_points, progress.update)
        for hook_point in hook_points:
            said = _Said(queries, captured[hook_point], specials, progress.update)
            contrasts = _contrasts(recipe, activations, configs[hook_point], trained, said)
            chosen, rows, points = _compare(recipe, configs[hook_point], contrasts, fidelity, pairs)
            selected[hook_point], table, curve = chosen, table + rows, curve | points
            candidates[hook_point] = candidate_latents(contrasts[chosen], pairs, recipe.select)
    _refuse_nothing(candidates, len(pairs), recipe.select)
    _write(
        work,
        {"selected": selected, "options": _options(recipe.select, len(pairs), recipe.seed), "curve": curve},
        candidates,
    )
    pq.write_table(pa.Table.from_pylist(table, _schema(recipe.select.thresholds)), work.folder / "contrast.parquet")


def choose(contenders: list[Contender], group: Group, n_resamples: int, seed: int) -> tuple[str, set[str]]:
    """The SAE chosen at a hook point, and all that are as good as the best: (sae_id, sae_ids).

    The best has the highest mean merit over the group's pairs. As good are those whose difference from it has a 95 %
    interval (of paired draws of pairs) that holds 0, or no interval at all. The one with the highest EV is chosen.
    """
    means = {each.sae_id: float(group.per_unit(each.merit).sum()) for each in contenders}
    best = max(contenders, key=lambda each: (means[each.sae_id], _or_least(each.explained_variance)))
    as_good = [best]
    for each in contenders:
        difference = group.interval(best.merit - each.merit, n_resamples, seed)
        if each is not best and (difference.low is None or difference.low <= 0):
            as_good.append(each)
    chosen = max(as_good, key=lambda each: (_or_least(each.explained_variance), means[each.sae_id]))
    return chosen.sae_id, {each.sae_id for each in as_good}


def _or_least(value: float | None) -> float:
    return -math.inf if value is None else value


class _Said(NamedTuple):
    """The queries, and what a hook point's activations on them are."""

    queries: list[Query]
    captured: list[tuple[Tensor, Tensor]]
    specials: list[int]
    progress: Callable[[int], Any]


def _contrasts(
    recipe: Recipe, activations: Activations, configs: list[SaeConfig], trained: Path, said: _Said
) -> dict[str, Contrast]:
    """Which latent of each SAE wins and loses which pair; one SAE is in memory at a time."""
    section, found = recipe.select, {}
    quantile = section.activity_quantile
    sample = held_out_sample(activations, configs[0].hook_point, recipe.tokens) if quantile else None
    for config in configs:
        sae = sae_files.read(trained / config.sae_id)
        thresholds = 0.0 if sample is None else activity_thresholds(sae, sample, quantile)
        active = active_latents(sae, *said[:3], section.reduction, thresholds, said.progress)
        found[config.sae_id] = contrast(*active.chunk(2))
    return found


def _compare(
    recipe: Recipe,
    configs: list[SaeConfig],
    contrasts: dict[str, Contrast],
    fidelity: dict[str, Any],
    pairs: list[Pair],
) -> tuple[str, list[Row], dict[str, Row]]:
    """Of a hook point: the SAE chosen, the rows of contrast.parquet, and the curve's point of each SAE."""
    section, groups = recipe.select, groups_of(pairs)
    shares = {name: latent_shares(each) for name, each in contrasts.items()}
    contenders = [
        Contender(name, _merit(each, section.criterion), fidelity[name]["explained_variance"])
        for name, each in shares.items()
    ]
    chosen, as_good = choose(contenders, groups[0], section.n_resamples, recipe.seed)
    rows, points = [], {}
    for config in configs:
        name = config.sae_id
        measured = [measure(contrasts[name], shares[name], group, section, recipe.seed) for group in groups]
        mine = {"sae_id": name, "selected": name == chosen}
        rows += [{**mine, **_row(group, numbers, section)} for group, numbers in zip(groups, measured, strict=True)]
        verdict = {"as_good_as_best": name in as_good, "selected": name == chosen}
        points[name] = {**_settings(config), **measured[0], **verdict, **_short(fidelity[name])}
    return chosen, rows, points


def _merit(shares: Contrast, criterion: str) -> Tensor:
    """The number per pair whose mean is the criterion: (n_pairs,)."""
    won, lost = shares
    return won if criterion == "i_cdf" else (won - lost) / 2


def _settings(config: SaeConfig) -> Row:
    return {"architecture": config.architecture, "k": config.k, "coefficient": config.coefficient}


def _short(fidelity: Row) -> Row:
    return {key: fidelity[key] for key in ("explained_variance", "fvu", "l0", "dead", "ce_recovered")}


def _options(section: SelectSection, n_pairs: int, seed: int) -> Row:
    """What the numbers were measured with; files of pairs by their name alone, so that no folder is published."""
    kept = ("reduction", "activity_quantile", "criterion", "fdr", "min_pairs", "n_resamples")
    return {
        "pairs": [Path(name).name for name in section.pairs],
        "n_pairs": n_pairs,
        "seed": seed,
        **{key: getattr(section, key) for key in kept},
        "thresholds": list(section.thresholds),
    }


_NUMBERS = ("i_cdf", "i_cdf_low", "i_cdf_high", "i_cdf_null", "i_cdf_null_high", "i_cdf_p", "above_null")


def _row(group: Group, numbers: Row, section: SelectSection) -> Row:
    """A group's numbers as columns, beside the options they were measured with."""
    return {
        "grouping": group.grouping,
        "group": group.name,
        "n_pairs": len(group.rows),
        "reduction": section.reduction,
        "activity_quantile": section.activity_quantile,
        **{key: numbers[key] for key in _NUMBERS},
        **{f"l0_t_{t}": value for t, value in numbers["l0_t"].items()},
        **{f"l0_t_{t}_null": value for t, value in numbers["l0_t_null"].items()},
    }


def _schema(thresholds: tuple[float, ...]) -> pa.Schema:
    """The columns of contrast.parquet; an interval is null where a group has one pair only."""
    names = [f"{t:g}" for t in thresholds]
    numbers = [*_NUMBERS, *(column for t in names for column in (f"l0_t_{t}", f"l0_t_{t}_null"))]
    return pa.schema(
        [
            ("sae_id", pa.string()),
            ("selected", pa.bool_()),
            ("grouping", pa.string()),
            ("group", pa.string()),
            ("n_pairs", pa.int32()),
            ("reduction", pa.string()),
            ("activity_quantile", pa.float64()),
            *((name, pa.float64()) for name in numbers),
        ]
    )


def _refuse_nothing(candidates: dict[str, dict[str, list[Row]]], n_pairs: int, section: SelectSection) -> None:
    if not any(rows for found in candidates.values() for rows in found.values()):
        raise InputError(
            f"no latent of the selected SAEs distinguishes the {n_pairs} pairs at select.fdr = {section.fdr:g} with "
            f"select.min_pairs = {section.min_pairs}; raise fdr (as --set select.fdr=0.2), lower min_pairs, or name "
            "more pairs in select.pairs."
        )


def _write(work: StageWork, selection: Row, candidates: dict[str, dict[str, list[Row]]]) -> None:
    write_json(work.folder / "selection.json", selection)
    write_json(work.folder / "candidates.json", candidates)
    n_candidates = {name: {domain: len(rows) for domain, rows in found.items()} for name, found in candidates.items()}
    work.facts["selected"] = selection["selected"]
    work.facts["n_candidates"] = n_candidates
    work.facts["without_candidates"] = [name for name, found in n_candidates.items() if not any(found.values())]
