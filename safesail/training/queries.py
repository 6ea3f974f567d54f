"""Queries through the model and an SAE: on which query is which latent active.

A_j(q) is the maximum, mean or last value of latent j over q's counted tokens (`reduction`). The latent is active where
A_j(q) exceeds 0, or its `activity_quantile` over held-out tokens, zeros counted. Safe-SAIL publishes neither. With the
test `> 0` maximum and mean agree; and a quantile is above 0 only for latents that fire on more than its remainder of
the tokens, as 10 % at 0.9: it silences the dense latents and leaves the sparse ones as they are.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from safesail.errors import InputError
from safesail.lm.activations import Activations
from safesail.lm.hooks import run_to_depth
from safesail.lm.tokens import counted
from safesail.pairs import Pair
from safesail.recipe import TokenPolicy
from safesail.sae.model import Sae
from safesail.sae.sparse import join

__all__ = ["Query", "active_latents", "activity_thresholds", "held_out_sample", "queries_of", "query_activations"]

MAX_SAMPLE = 8000
"""Held-out tokens that an activity quantile is taken over, at most."""
_ROWS_AT_ONCE = 256


class Query(NamedTuple):
    """One side of a pair."""

    text: str
    place: str
    """Which pair and side it is, for messages."""


def queries_of(pairs: list[Pair]) -> list[Query]:
    """The queries with the concept in the order of the pairs, then those without."""
    told = [(pair, f"of pair {pair.id} ({pair.language})") for pair in pairs]
    return [
        *(Query(pair.with_concept, f"the query `with` {name}") for pair, name in told),
        *(Query(pair.without_concept, f"the query `without` {name}") for pair, name in told),
    ]


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


@torch.inference_mode()
def active_latents(
    sae: Sae,
    queries: list[Query],
    captured: list[tuple[Tensor, Tensor]],
    specials: list[int],
    reduction: str,
    thresholds: Tensor | float,
    progress: Any = lambda n: None,
) -> Tensor:
    """Whether each latent is active on each query: bool (n_queries, d_sae). thresholds: (d_sae,), or one for all."""
    config, rows = sae.config, []
    for (x, ids), query in zip(captured, queries, strict=True):
        keep = counted(config.token_policy, ids, x.norm(dim=-1), specials, config.median_norm)
        if not keep.any():
            raise InputError(
                f"{query.place} has no token that counts under the token policy at {config.hook_point}; "
                "write a longer query, or change the recipe's [tokens]."
            )
        rows.append(_reduced(sae.encode(x[keep]), reduction) > thresholds)
        progress(1)
    return torch.stack(rows)


def _reduced(latents: Tensor, reduction: str) -> Tensor:
    """A_j of one query. latents: (n_tokens, d_sae) → (d_sae,)."""
    if reduction == "last":
        return latents[-1]
    return latents.mean(0) if reduction == "mean" else latents.amax(0)


def held_out_sample(activations: Activations, hook_point: str, policy: TokenPolicy) -> Tensor:
    """Held-out tokens that count, evenly spread over all of them: (at most MAX_SAMPLE, d_in)."""
    rows = (activations.rows_held_out() & activations.counted(hook_point, policy)).nonzero().flatten()
    if not len(rows):
        raise InputError(
            f"no held-out token counts under the token policy at {hook_point}, so there is no activity quantile; "
            "set select.activity_quantile = 0 or raise corpus.n_held_out_tokens."
        )
    n = min(len(rows), MAX_SAMPLE)
    return activations.rows(hook_point, rows[torch.arange(n) * len(rows) // n])


@torch.inference_mode()
def activity_thresholds(sae: Sae, x: Tensor, quantile: float) -> Tensor:
    """The quantile of each latent over the tokens x, zeros counted: (d_sae,). x: (n_tokens, d_in).

    The smallest value v such that at least quantile · n_tokens tokens are ≤ v, as `metrics.quantiles_of_sparse`.
    """
    parts = [sae.encode_sparse(x[start : start + _ROWS_AT_ONCE]).active() for start in range(0, len(x), _ROWS_AT_ONCE)]
    codes = join(parts)
    by_value = codes.values.sort()
    by_latent = codes.indices[by_value.indices].sort(stable=True)
    values = by_value.values[by_latent.indices]
    n_active = torch.bincount(codes.indices, minlength=sae.config.d_sae)
    n_above = len(x) - max(math.ceil(quantile * len(x) - 1e-9), 1)
    reaches = n_active > n_above
    thresholds = torch.zeros(sae.config.d_sae)
    thresholds[reaches] = values[n_active.cumsum(0)[reaches] - 1 - n_above]
    return thresholds
