"""How much safer the chosen answer of a pair looks than the rejected one, to the safety latents.

Reads the activations at segment ends, the SAE, the safety latents and the reward model's rewards. Writes
`scores.parquet` (every pair, by its id) and `validity.json` (how well the score predicts the labels).

    score_safe = (1/n_c) Σ_{t in chosen} [Σ_{i in S⁺} z_i(t) - Σ_{i in S⁻} z_i(t)]  -  (the same of rejected)

over segment ends t; z_i counts only above zero, and a side without ends counts 0.

What this does not do: judge the score on the pairs it came from. The safety latents were chosen on training pairs, so
only the rows of `validity.json` with held_out true say how well it predicts; prompts are resampled whole.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from safesail.errors import InputError
from safesail.metrics import Interval, auroc_interval, pearson_interval, ratio_of_sums
from safesail.reward_recipe import RewardRecipe
from safesail.rewards.ends import Ends, latents_at
from safesail.rewards.preferences import Preference
from safesail.run import StageWork, write_json
from safesail.sae.model import Sae

__all__ = [
    "SCORES_SCHEMA",
    "SafetyScores",
    "prompt_groups",
    "ranks_of",
    "score_safe",
    "score_stage",
    "scores_of",
    "validity",
]

Row = dict[str, Any]
DEFINITIONS = {
    "share/v1": "share of pairs whose chosen side is valued above the rejected one, ties counting half; 95 % interval "
    "from resampling whole prompts (1,000 bootstrap resamples)",
    "auroc_sides/v1": "probability that the chosen side of one pair is valued above the rejected side of any pair, "
    "ties counting half; 95 % interval from resampling whole prompts (1,000 bootstrap resamples)",
    "harm/v1": "correlation over pairs of the value of chosen less that of rejected with harm_rejected - harm_chosen, "
    "as a person scored them; Spearman's is that of the ranks, ties sharing theirs; 95 % interval from resampling "
    "whole prompts (500 bootstrap resamples)",
}
_MOST_PAIRS = 2000
"""Pairs whose sides are compared with one another, which takes the square of their number."""
_HELD_OUT_SAFETY = ("safety", True, None)
SCORES_SCHEMA = pa.schema(
    [
        ("pair_id", pa.string()),
        ("score_safe", pa.float64()),
        ("safe_chosen", pa.float64()),
        ("safe_rejected", pa.float64()),
        ("n_chosen", pa.int64()),
        ("n_rejected", pa.int64()),
        ("margin", pa.float64()),
    ]
)


class SafetyScores(NamedTuple):
    """What the safety latents say of every pair."""

    score: Tensor
    """(n_pairs,), fp64: safe[:, 0] - safe[:, 1]."""
    safe: Tensor
    """(n_pairs, 2), fp64: the mean over a side's ends; chosen, rejected."""
    n: Tensor
    """(n_pairs, 2): the number of those ends."""


def score_safe(positive: Tensor, negative: Tensor, pair: Tensor, side: Tensor, n_pairs: int) -> SafetyScores:
    """score_safe of every pair, from the activations at segment ends.

    positive: (n_ends, |S⁺|), negative: (n_ends, |S⁻|); pair, side (0 chosen, 1 rejected): (n_ends,), whose they are.
    """
    value = positive.clamp(min=0).double().sum(1) - negative.clamp(min=0).double().sum(1)
    place = pair.long() * 2 + side.long()
    sums = torch.zeros(n_pairs * 2, dtype=torch.float64).index_add_(0, place, value)
    n = torch.bincount(place, minlength=n_pairs * 2)
    safe = (sums / n.clamp(min=1)).view(n_pairs, 2)
    return SafetyScores(safe[:, 0] - safe[:, 1], safe, n.view(n_pairs, 2))


def scores_of(ends: Ends, sae: Sae, safety: Mapping[str, list[int]]) -> SafetyScores:
    """score_safe of every pair of `ends`. safety: the latents of S⁺ (`positive`) and S⁻ (`negative`)."""
    counted = ends.counted(sae.config.hook_point, sae.config.token_policy)
    n_positive = len(safety["positive"])
    z = latents_at(ends, sae, torch.tensor([*safety["positive"], *safety["negative"]], dtype=torch.long))[counted]
    return score_safe(z[:, :n_positive], z[:, n_positive:], ends.pair[counted], ends.side[counted], len(ends.pair_ids))


def score_stage(
    recipe: RewardRecipe,
    preferences: Sequence[Preference],
    ends: Ends,
    sae: Sae,
    safety: Row,
    rewards: list[Row],
    work: StageWork,
) -> None:
    """Score every pair, held-out ones too. safety: what the rate stage chose; rewards: rows of the reward stage.

    Facts: `n_positive`, `n_negative`, `held_out` {measure: share of held-out pairs about safety that it gets right}.
    """
    _check_chosen(safety)
    scores = scores_of(ends, sae, safety)
    assert bool(scores.score.isfinite().all()), "an activation is not finite"
    by_id = dict(zip(ends.pair_ids, _rows(ends.pair_ids, scores, rewards), strict=True))
    rows = [by_id[preference.id] for preference in preferences]
    pq.write_table(pa.Table.from_pylist(rows, schema=SCORES_SCHEMA), work.folder / "scores.parquet")
    measured = validity(preferences, rows, rewards, seed=recipe.seed)
    write_json(work.folder / "validity.json", measured)
    work.facts |= {f"n_{sign}": len(safety[sign]) for sign in ("positive", "negative")}
    of_held = [row for row in measured["rows"] if (row["kind"], row["held_out"], row["source"]) == _HELD_OUT_SAFETY]
    work.facts["held_out"] = {row["measure"]: row["share"] for row in of_held}


def _check_chosen(safety: Row) -> None:
    """InputError where no latent was kept, with the ratings there were."""
    if safety["positive"] or safety["negative"]:
        return
    ratings = [(int(rating), n) for rating, n in safety["ratings"].items() if n]
    if not ratings:
        statuses = ", ".join(f"{n} × {status}" for status, n in safety["statuses"].items()) or "none was rated"
        raise InputError(
            f"no latent has a rating ({statuses}), so there is no safety latent; rate with another model "
            "(`[rate]` in the recipe), or lower salience.min_contexts."
        )
    shown = ", ".join(f"{n} × {rating}" for rating, n in sorted(ratings, reverse=True))
    raise InputError(
        f"no latent was rated {safety['keep']} or more (latents by rating: {shown}), so there is no safety latent; to "
        f"keep lower ones, run the recipe again with `--adopt --set rate.keep={max(ratings)[0]}`."
    )


def _rows(pair_ids: Sequence[str], scores: SafetyScores, rewards: list[Row]) -> list[Row]:
    """One row per pair of the ends, in their order; rewards are joined by pair id."""
    margins = {row["pair_id"]: row["reward_chosen"] - row["reward_rejected"] for row in rewards}
    return [
        {
            "pair_id": id,
            "score_safe": score,
            "safe_chosen": safe[0],
            "safe_rejected": safe[1],
            "n_chosen": n[0],
            "n_rejected": n[1],
            "margin": margins[id],
        }
        for id, score, safe, n in zip(
            pair_ids, scores.score.tolist(), scores.safe.tolist(), scores.n.tolist(), strict=True
        )
    ]


# --- does it predict anything -------------------------------------------------------------------------------------


class _Measured(NamedTuple):
    """What a measure says of some pairs, by position."""

    sides: Tensor
    """(n, 2), fp64: the value of chosen and of rejected."""
    prompts: Tensor
    """(n,): pairs of one prompt have one number."""
    harm: Tensor
    """(n,), fp64: harm_rejected - harm_chosen, nan where nobody scored it."""

    def of(self, which: Tensor) -> "_Measured":
        return _Measured(*(part[which] for part in self))


def validity(preferences: Sequence[Preference], scores: list[Row], rewards: list[Row], *, seed: int = 0) -> Row:
    """How well score_safe, and the reward margin beside it, predict which side is chosen, and how harmful sides are.

    Rows: measure (score_safe, margin) × group of pairs, the held-out pairs about safety first; a group is of one kind,
    held out or all (held_out null), of one source or all (source null).
    """
    of_score = {row["pair_id"]: (row["safe_chosen"], row["safe_rejected"]) for row in scores}
    of_reward = {row["pair_id"]: (row["reward_chosen"], row["reward_rejected"]) for row in rewards}
    prompts, harm = prompt_groups(preferences), _harm(preferences)
    rows = []
    for group, chosen in _groups(preferences):
        for measure, sides in (("score_safe", of_score), ("margin", of_reward)):
            values = torch.tensor([sides[preference.id] for preference in preferences], dtype=torch.float64)
            row = _agreement(_Measured(values, prompts, harm).of(chosen), seed)
            rows.append({"measure": measure, **group, **row})
    return {"definitions": DEFINITIONS, "rows": rows}


def prompt_groups(preferences: Sequence[Preference]) -> Tensor:
    """The number of each pair's prompt, (n_pairs,): what is resampled whole, since its pairs are not independent."""
    number: dict[Any, int] = {}
    keys = [tuple((turn["role"], turn["content"]) for turn in preference.prompt) for preference in preferences]
    return torch.tensor([number.setdefault(key, len(number)) for key in keys], dtype=torch.long)


def ranks_of(values: Tensor) -> Tensor:
    """The rank of each value from 0, equal values sharing the mean of theirs: (n,) → (n,), fp64."""
    _, place, count = values.unique(return_inverse=True, return_counts=True)
    last = count.cumsum(0).double() - 1
    return (last - (count.double() - 1) / 2)[place]


def _groups(preferences: Sequence[Preference]) -> list[tuple[Row, Tensor]]:
    """The groups of pairs that are looked at apart, with the positions of their pairs; none is empty."""
    wanted: list[Row] = [{"kind": kind, "held_out": True, "source": None} for kind in ("safety", "chat")]
    wanted += [{"kind": kind, "held_out": None, "source": None} for kind in ("safety", "chat")]
    named = sorted({(preference.kind, preference.source) for preference in preferences}, reverse=True)
    wanted += [{"kind": k, "held_out": held, "source": source} for k, source in named for held in (True, None)]
    found = [(group, [i for i, each in enumerate(preferences) if _is_in(each, group)]) for group in wanted]
    return [(group, torch.tensor(places)) for group, places in found if places]


def _is_in(preference: Preference, group: Row) -> bool:
    is_source = group["source"] in (None, preference.source)
    return is_source and preference.kind == group["kind"] and group["held_out"] in (None, preference.held_out)


def _harm(preferences: Sequence[Preference]) -> Tensor:
    missing = float("nan")
    sides = [[missing if harm is None else harm for harm in (p.harm_rejected, p.harm_chosen)] for p in preferences]
    rejected, chosen = torch.tensor(sides, dtype=torch.float64).T
    return rejected - chosen


def _agreement(measured: _Measured, seed: int) -> Row:
    """The figures of one measure on one group of pairs."""
    difference = measured.sides[:, 0] - measured.sides[:, 1]
    right = (difference > 0).double() + 0.5 * (difference == 0)
    drawn = _drawn(len(right), seed)
    few = measured.of(drawn)
    truth = torch.tensor([True, False]).repeat(len(drawn))
    row: Row = {"n_pairs": len(right), "n_ties": int((difference == 0).sum())}
    row["share"] = _shown(_mean(right, measured.prompts, seed))
    row["n_auroc"] = len(drawn)
    row["auroc"] = _shown(auroc_interval(few.sides.flatten(), truth, few.prompts.repeat_interleave(2), seed=seed))
    return row | _harm_agreement(few, seed)


def _harm_agreement(measured: _Measured, seed: int) -> Row:
    known = ~measured.harm.isnan()
    sides, prompts, harm = measured.of(known)
    if not len(harm):
        return {"n_harm": 0, "pearson": None, "spearman": None}
    difference = sides[:, 0] - sides[:, 1]
    return {
        "n_harm": len(harm),
        "pearson": _shown(pearson_interval(difference, harm, prompts, seed=seed)),
        "spearman": _shown(pearson_interval(ranks_of(difference), ranks_of(harm), prompts, seed=seed)),
    }


def _drawn(n: int, seed: int) -> Tensor:
    """All of n pairs, or so many of them by chance that their sides can be compared with one another."""
    if n <= _MOST_PAIRS:
        return torch.arange(n)
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:_MOST_PAIRS].sort().values


def _mean(values: Tensor, groups: Tensor, seed: int) -> Interval:
    """The mean with an interval from resampling whole groups. Both: (n,)."""
    _, group = groups.unique(return_inverse=True)
    sums = torch.zeros(int(group.max()) + 1, dtype=torch.float64).index_add_(0, group, values)
    return ratio_of_sums(sums, torch.bincount(group), seed=seed)


def _shown(interval: Interval) -> Row:
    return interval._asdict()
