"""Which SAE of the sweep, and which of its latents, carry the safety concepts: decided before any money is spent.

Reads the trained SAEs, their fidelity and the concept contrastive query pairs. Writes `selection.json` (the curve and
the SAE chosen per hook point) and `candidates.json` (the safety-related latents, per hook point and domain).

For each category of the taxonomy, with its pairs (q_i⁺, q_i⁻) and A_j(q) the maximum of latent j over q's tokens:
    f_j = share of pairs with A_j(q_i⁺) > 0 and A_j(q_i⁻) = 0;   L_{0,t} = |{j: f_j > t}|;   I_CDF = mean_j f_j
averaged over categories. Safe-SAIL publishes the words, not the formulas: this is our reading of them.
"""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from safesail.errors import InputError
from safesail.lm.activations import Activations
from safesail.lm.hooks import run_to_depth
from safesail.lm.tokens import counted, special_ids
from safesail.metrics import contrast, distinguishing_frequency, i_cdf, l0_above, sign_test
from safesail.pairs import Pair
from safesail.progress import bar
from safesail.recipe import Recipe, SelectSection
from safesail.run import StageWork, write_json
from safesail.sae import model as sae_files
from safesail.sae.config import SaeConfig
from safesail.sae.model import Sae
from safesail.training.trainer import variants

__all__ = ["candidate_latents", "query_activations", "select_stage"]


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
    """Measure concept contrast for every SAE, choose one per hook point, and name its safety-related latents."""
    hook_points = tuple(activations.hook_points)
    queries = [pair.with_concept for pair in pairs] + [pair.without_concept for pair in pairs]
    with bar("select", len(queries), "query") as progress:
        captured = query_activations(model, tokenizer, queries, hook_points, progress.update)
    specials = special_ids(tokenizer)
    curve, selected, candidates = {}, {}, {}
    for hook_point in hook_points:
        saes = {c.sae_id: sae_files.read(trained / c.sae_id) for c in variants(recipe, activations, hook_point)}
        maxima = {name: _maxima(sae, captured[hook_point], specials) for name, sae in saes.items()}
        for name, (high, low) in maxima.items():
            curve[name] = {
                **_settings(saes[name].config),
                **_contrast_numbers(high, low, pairs, recipe.select),
                **_short(fidelity[name]),
            }
        chosen = max(saes, key=lambda name: (curve[name]["i_cdf"], curve[name]["explained_variance"]))
        selected[hook_point] = chosen
        candidates[hook_point] = candidate_latents(*maxima[chosen], pairs, recipe.select)
    _write(work, pairs, curve, selected, candidates)


@torch.inference_mode()
def query_activations(
    model: Any, tokenizer: Any, queries: list[str], hook_points: tuple[str, ...], progress: Any = lambda n: None
) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """For each hook point and query, the activations and ids of its tokens: ((n_tokens, d_in), (n_tokens,)).

    Queries are run one at a time: they are short, and no padding or neighbour can touch them.
    """
    captured: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in hook_points}
    for query in queries:
        ids = torch.tensor([tokenizer(query, add_special_tokens=False)["input_ids"]], device=model.device)
        for name, output in run_to_depth(model, hook_points, input_ids=ids).items():
            captured[name].append((output[0].float().cpu(), ids[0].cpu()))
        progress(1)
    return captured


def candidate_latents(
    high: Tensor, low: Tensor, pairs: list[Pair], section: SelectSection
) -> dict[str, list[dict[str, Any]]]:
    """The safety-related latents of each domain, strongest first.

    A latent *wins* a pair when it is active with the concept and silent without, *loses* it the other way round. It is
    a candidate when it wins at least `min_pairs` pairs of the domain and more than three times as many as it loses. The
    first `max_latents_per_domain` are marked to be explained; the rest stay listed, since a latent explained for one
    domain may be a candidate for another too.
    high, low: (n_pairs, d_sae), the maxima with and without the concept.
    """
    wins, losses = contrast(high, low), contrast(low, high)
    found = {}
    for domain in dict.fromkeys(pair.domain for pair in pairs):
        rows = torch.tensor([i for i, pair in enumerate(pairs) if pair.domain == domain])
        won, lost = wins[rows].sum(0), losses[rows].sum(0)
        latents = ((won >= section.min_pairs) & (won > 3 * lost)).nonzero().flatten()
        p_values = sign_test(won[latents], lost[latents])
        order = sorted(range(len(latents)), key=lambda i: (float(p_values[i]), -int(won[latents[i]]), int(latents[i])))
        found[domain] = [
            {
                "latent": int(latents[i]),
                "n_wins": int(won[latents[i]]),
                "n_losses": int(lost[latents[i]]),
                "n_pairs": len(rows),
                "p_value": float(p_values[i]),
                "concepts": _most_common(pairs[row].concept for row in rows[wins[rows, latents[i]]].tolist()),
                "explain": rank < section.max_latents_per_domain,
            }
            for rank, i in enumerate(order)
        ]
    return found


def _most_common(concepts: Iterable[str]) -> list[str]:
    """The distinct concepts, those of most pairs first, else in the order of the alphabet."""
    counts = Counter(concepts)
    return sorted(counts, key=lambda concept: (-counts[concept], concept))


@torch.inference_mode()
def _maxima(sae: Sae, captured: list[tuple[Tensor, Tensor]], specials: list[int]) -> tuple[Tensor, Tensor]:
    """The maximum of every latent over the counted tokens of each query: with and without, (n_pairs, d_sae) each."""
    config, rows = sae.config, []
    for x, ids in captured:
        keep = counted(config.token_policy, ids, x.norm(dim=-1), specials, config.median_norm)
        if not keep.any():
            raise InputError("a query has no token that counts under the token policy; give longer queries.")
        rows.append(sae.encode(x[keep]).amax(0))
    maxima = torch.stack(rows)
    half = len(maxima) // 2
    return maxima[:half], maxima[half:]


def _contrast_numbers(high: Tensor, low: Tensor, pairs: list[Pair], section: SelectSection) -> dict[str, Any]:
    """I_CDF and L_{0,t}, averaged over categories, and I_CDF with the sides of each pair swapped: its noise floor."""
    by_category = _frequencies(contrast(high, low), pairs)
    swapped = _frequencies(contrast(low, high), pairs)
    return {
        "i_cdf": sum(map(i_cdf, by_category)) / len(by_category),
        "i_cdf_swapped": sum(map(i_cdf, swapped)) / len(swapped),
        "l0_t": {
            f"{t:g}": sum(l0_above(frequency, t) for frequency in by_category) / len(by_category)
            for t in section.thresholds
        },
    }


def _frequencies(distinguishes: Tensor, pairs: list[Pair]) -> list[Tensor]:
    """f_j of every category: (d_sae,) each. distinguishes: (n_pairs, d_sae)."""
    categories = [(pair.domain, pair.category) for pair in pairs]
    return [
        distinguishing_frequency(distinguishes[torch.tensor([category == key for category in categories])])
        for key in dict.fromkeys(categories)
    ]


def _settings(config: SaeConfig) -> dict[str, Any]:
    return {"architecture": config.architecture, "k": config.k, "coefficient": config.coefficient}


def _short(fidelity: dict[str, Any]) -> dict[str, Any]:
    return {key: fidelity[key] for key in ("explained_variance", "fvu", "l0", "dead", "ce_recovered")}


def _write(work: StageWork, pairs: list[Pair], curve: Any, selected: Any, candidates: Any) -> None:
    write_json(work.folder / "selection.json", {"selected": selected, "curve": curve, "n_pairs": len(pairs)})
    write_json(work.folder / "candidates.json", candidates)
    work.facts["selected"] = selected
    work.facts["n_candidates"] = {
        hook_point: {domain: len(rows) for domain, rows in found.items()} for hook_point, found in candidates.items()
    }
