"""Published numbers of a reward model's release computed once more from what is published.

From the tables alone: the accuracies, how well the scores predict, and which pairs every edit takes. With the reward
model, the SAE and the pairs: the rewards, the fidelity of the SAE at segment ends, salience with its intervals, and
score_safe. All by the functions that the stages call.

Sums are taken in fp32 in an order that depends on the machine, and an activation near the k-th may be active here and
silent there. A number may differ by TOLERANCE of its kind's usual size, and of the pairs or latents a share of
TOLERANCE by more.
"""

import json
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from safesail.distributed import device
from safesail.errors import InputError
from safesail.lm.load import tokenizer_hash
from safesail.progress import bar
from safesail.release.checks.finding import Finding, Looked, finding
from safesail.release.checks.part import Part
from safesail.release.facts import flat_fidelity
from safesail.rewards.editing import edits_of
from safesail.rewards.ends import Ends, ends_stage
from safesail.rewards.model import RewardModel
from safesail.rewards.preferences import SIDES, Preference
from safesail.rewards.published import recipe_of, said
from safesail.rewards.safety_score import scores_of, validity
from safesail.rewards.salience import Found, bounds, measured_salience
from safesail.rewards.texts import distinct, encode_all
from safesail.rewards.training import accuracies
from safesail.run import StageWork
from safesail.sae.model import Sae
from safesail.training.fidelity import reconstruction_stage

__all__ = ["TOLERANCE", "recomputed"]

TOLERANCE = 1e-3
_EXACT = 1e-9
"""Of numbers that come from published ones alone."""
_NEEDED = ("saes", "reward", "salience", "preferences")
_NOT_COMPUTED = {
    "ratings": "they are answers of a language model or an encoder, which are not asked for again.",
    "comparison": "it takes as many trainings as it has seeds and edits: safesail reward RUN --until compare --force.",
}

Row = dict[str, Any]


def recomputed(parts: dict[str, Part]) -> list[Finding]:
    """The findings of everything that can be computed again, and of what is not."""
    return [
        *_with_pairs(parts),
        *(Finding("release", f"recomputed: {name}", "skipped", why) for name, why in _NOT_COMPUTED.items()),
    ]


def _with_pairs(parts: dict[str, Part]) -> list[Finding]:
    try:
        published = _Tables(parts)
    except InputError as error:
        return [Finding("release", "recomputed: pairs", "skipped", f"not checked: {error}")]
    with TemporaryDirectory(prefix="safesail-") as folder:
        return [
            finding("reward", "recomputed: accuracies", _accuracies_hold, published),
            finding("salience", "recomputed: validity", _validity_holds, published),
            finding("salience", "recomputed: edits", _edits_hold, published),
            *_by_the_model(published, Path(folder)),
        ]


def _by_the_model(published: "_Tables", folder: Path) -> list[Finding]:
    try:
        measured = _Measured(published, folder)
    except InputError as error:
        return [Finding("release", "recomputed: salience", "skipped", f"not checked: {error}")]
    return [
        finding("reward", "recomputed: rewards", _rewards_hold, measured),
        finding("saes", "recomputed: fidelity", _fidelity_holds, measured),
        finding("salience", "recomputed: salience", _salience_holds, measured),
        finding("salience", "recomputed: intervals", _intervals_hold, measured),
        finding("salience", "recomputed: scores", _scores_hold, measured),
    ]


# --- what is published --------------------------------------------------------------------------------------------


class _Tables:
    """The recipe, the pairs in the order of the stages, and the tables about them."""

    def __init__(self, parts: dict[str, Part]) -> None:
        if lacking := [name for name in _NEEDED if name not in parts]:
            raise InputError(f"it needs {' and '.join(lacking)}.")
        self.parts = parts
        self.recipe = recipe_of(parts["saes"].repository)
        self.scores = parts["salience"].rows("scores")
        pairs = {row["id"]: _preference(row) for row in parts["preferences"].rows("pairs")}
        if pairs.keys() != {row["pair_id"] for row in self.scores}:
            raise InputError("the scores are not of the published pairs.")
        self.preferences = [pairs[row["pair_id"]] for row in self.scores]
        self.rewards = _numbers(self.scores, [f"reward_{side}" for side in SIDES])
        """(n_pairs, 2), those of the chosen answers first."""

    @property
    def latents(self) -> list[Row]:
        """The rows of the salience table, those of largest |s| first."""
        return sorted(self.parts["salience"].rows("salience"), key=lambda row: row["rank"])


def _preference(row: Row) -> Preference:
    prompt = tuple({"role": turn["role"], "content": turn["content"]} for turn in row["prompt"])
    return Preference(**{**row, "prompt": prompt, **{side: said(row[side]) for side in SIDES}})


def _numbers(rows: list[Row], columns: list[str]) -> Tensor:
    """Some columns of a table: (n_rows, len(columns)), fp64."""
    return torch.tensor([[row[column] for column in columns] for row in rows], dtype=torch.float64)


# --- from the tables ----------------------------------------------------------------------------------------------


def _accuracies_hold(published: _Tables) -> Looked:
    """accuracy.json from the published rewards."""
    stored = published.parts["reward"].repository.json("accuracy.json")
    now = accuracies(published.preferences, published.rewards.float())
    return _same_numbers("accuracy.json", stored, now, "from the published rewards")


def _validity_holds(published: _Tables) -> Looked:
    """validity.json from the published scores and rewards."""
    stored = published.parts["salience"].repository.json("validity.json")
    now = validity(published.preferences, published.scores, published.scores, seed=published.recipe.seed)
    return _same_numbers("validity.json", stored, now, f"from the published scores, with seed {published.recipe.seed}")


def _edits_hold(published: _Tables) -> Looked:
    """The pairs of every edit, in their order, from the published scores."""
    stored = published.parts["salience"].rows("edits")
    now = edits_of(published.recipe, published.preferences, published.scores)
    problems = [
        f"{one['edit']} (seed {one['seed']}) takes {one['pair_id']} at rank {one['rank']}, the scores give "
        f"{other['pair_id']}."
        for one, other in zip(stored, now, strict=False)
        if one != other
    ]
    if len(stored) != len(now):
        problems.append(f"{len(stored):,} pairs are edited, the recipe's ratios mean {len(now):,}.")
    return Looked(f"{len(now):,} edited pairs of {len({row['edit'] for row in now})} edits, all the same", problems)


def _same_numbers(name: str, stored: Any, now: Any, how: str) -> Looked:
    """Two nested values of JSON: equal, and numbers within rounding."""
    one, other = dict(_flat(stored)), dict(_flat(now))
    problems = [f"{name} has no {key}." for key in other if key not in one]
    problems += [f"{name} has {key}, which is not computed." for key in one if key not in other]
    for key in one.keys() & other.keys():
        before, after = one[key], other[key]
        numbers = isinstance(before, float) and isinstance(after, float)
        if before != after and not (numbers and abs(before - after) <= _EXACT * max(1.0, abs(after))):
            problems.append(f"{name}: {key} is published as {before}, computed as {after}.")
    return Looked(f"{len(other):,} values {how}", sorted(problems))


def _flat(value: Any, path: str = "") -> Iterable[tuple[str, Any]]:
    """The leaves of nested JSON with where they are."""
    if isinstance(value, Mapping):
        inside: Iterable[tuple[Any, Any]] = value.items()
    elif isinstance(value, list | tuple):
        inside = enumerate(value)
    else:
        yield path, value
        return
    for key, each in inside:
        yield from _flat(each, f"{path}.{key}" if path else str(key))


# --- with the model -----------------------------------------------------------------------------------------------


class _Measured:
    """The reward model and its SAE on the published pairs. folder: where activations are kept while this is used."""

    def __init__(self, published: _Tables, folder: Path) -> None:
        self.published, self.recipe, self.folder = published, published.recipe, folder
        saes, reward = published.parts["saes"].repository, published.parts["reward"].repository
        self.sae = Sae.from_pretrained(saes.source, self.recipe.hook_point, revision=saes.revision, token=saes.token)
        self.reward_model = RewardModel.load(
            reward.source,
            revision=reward.revision,
            token=reward.token,
            dtype=getattr(torch, self.recipe.model.dtype),
            device=device(self.recipe.runtime.device),
        )
        config = published.parts["saes"].config
        if config.tokenizer_hash not in (None, tokenizer_hash(self.reward_model.tokenizer)):
            raise InputError("the tokenizer of the reward model is not the one that the SAE was trained with.")
        if any(row["latent"] >= self.sae.config.d_sae for row in published.latents):
            raise InputError(f"the salience table has latents that the SAE of {self.sae.config.d_sae:,} has not.")

    @cached_property
    def rewards(self) -> Tensor:
        """(n_pairs, 2)."""
        texts = encode_all(self.reward_model.tokenizer, self.published.preferences, self.recipe.reward.max_length)
        read = distinct(texts)
        with bar("rewards", len(read.ids), "text") as progress:
            return self.reward_model.rewards(read.ids, progress=progress.update)[read.number].view(-1, len(SIDES))

    @cached_property
    def ends(self) -> Ends:
        """The activations at segment ends; sinks are told by the median norm in the SAE's config, as in the stages."""
        work = StageWork(self.folder / "ends")
        work.folder.mkdir()
        ends_stage(self.recipe, self.published.preferences, self.reward_model, work)
        ends = Ends(work.folder)
        ends.facts["median_norm"] = {self.recipe.hook_point: self.sae.config.median_norm}
        return ends

    @cached_property
    def salience(self) -> Found:
        return measured_salience(self.recipe, self.ends, self.sae)


def _rewards_hold(measured: _Measured) -> Looked:
    """The rewards of both answers of every pair."""
    stored, now = measured.published.rewards, measured.rewards
    names = [f"the reward of {row['pair_id']} ({side})" for row in measured.published.scores for side in SIDES]
    return _close("rewards", names, stored.flatten(), now.double().flatten(), float(now.std()))


def _fidelity_holds(measured: _Measured) -> Looked:
    """The metrics of the SAE on the segment ends of held-out pairs, and their intervals."""
    work = StageWork(measured.folder / "eval")
    work.folder.mkdir()
    reconstruction_stage(measured.recipe, measured.ends, measured.ends.pair, measured.sae, work)
    (entry,) = json.loads((work.folder / "fidelity.json").read_text(encoding="utf-8")).values()
    now, row = flat_fidelity(entry), measured.published.parts["saes"].config.by_id[measured.sae.config.sae_id]
    names = [name for name in now if isinstance(now[name], float) and isinstance(row.get(name), int | float)]
    if "explained_variance" not in names:
        raise InputError("config.json has no metrics of the SAE.")
    n_latents = 1 / measured.sae.config.d_sae  # a latent more or less may be dead or dense
    problems = [
        f"{name} is published as {row[name]:.6g}, computed as {now[name]:.6g}."
        for name in names
        if not abs(row[name] - now[name]) <= TOLERANCE * max(abs(now[name]), 1.0) + n_latents
    ]
    return Looked(
        f"{len(names)} numbers, EV published {row['explained_variance']:.8g}, computed {now['explained_variance']:.8g}",
        problems,
    )


def _salience_holds(measured: _Measured) -> Looked:
    """h⁺, h⁻ and s of every latent; one that does not fire has none."""
    found, d_sae = measured.salience, measured.sae.config.d_sae
    stored, rows = torch.zeros(3, d_sae, dtype=torch.float64), measured.published.latents
    stored[:, [row["latent"] for row in rows]] = _numbers(rows, ["h_chosen", "h_rejected", "salience"]).T
    # in units in which the constant C of s is one, so that h and s are alike
    constant = float(found.h.sum(0).mean())
    now = torch.cat([found.h / constant, found.s[None]])
    stored[:2] /= constant
    names = [f"{what} of latent {i}" for what in ("h⁺ / C", "h⁻ / C", "s") for i in range(d_sae)]
    return _close("numbers of latents", names, stored.flatten(), now.flatten(), 1.0)


def _intervals_hold(measured: _Measured) -> Looked:
    """The 95 % intervals of s of the latents that have one."""
    ends = bounds(measured.recipe, measured.salience)
    kept = measured.salience.order[: measured.recipe.salience.n_latents].tolist()
    place = {latent: i for i, latent in enumerate(kept)}
    rows = [row for row in measured.published.latents if None not in (row["low"], row["high"])]
    if ends is None or not rows:
        raise InputError("there are no intervals.")
    problems = [
        f"latent {row['latent']} has an interval, and is not among the first here."
        for row in rows
        if row["latent"] not in place
    ]
    problems = problems if len(problems) > TOLERANCE * len(rows) else []
    known = [row for row in rows if row["latent"] in place]
    at = [place[row["latent"]] for row in known]
    stored = _numbers(known, ["low", "high"])
    now = torch.stack([end[at] for end in ends], dim=1)
    names = [f"{end} of s of latent {row['latent']}" for row in known for end in ("low", "high")]
    looked = _close(f"numbers with seed {measured.recipe.seed}", names, stored.flatten(), now.flatten(), 10.0)
    return looked._replace(problems=problems + looked.problems)


def _scores_hold(measured: _Measured) -> Looked:
    """score_safe of every pair, from the published safety latents."""
    latents, stored = measured.published.latents, measured.published.scores
    safety = {sign: [row["latent"] for row in latents if row["safety"] == sign] for sign in ("positive", "negative")}
    safe = _numbers(stored, [f"safe_{side}" for side in SIDES])
    scores = scores_of(measured.ends, measured.sae, safety)
    problems = [
        f"{row['pair_id']} has {row['n_chosen']} and {row['n_rejected']} segment ends, computed {n}."
        for row, n in zip(stored, scores.n.tolist(), strict=True)
        if [row["n_chosen"], row["n_rejected"]] != n
    ]
    names = [f"the {side} answer of {row['pair_id']}" for row in stored for side in SIDES]
    size = float(scores.safe.abs().mean())
    looked = _close("sides of pairs", names, safe.flatten(), scores.safe.flatten(), size)
    return looked._replace(problems=problems + looked.problems)


def _close(what: str, names: list[str], stored: Tensor, now: Tensor, size: float) -> Looked:
    """Whether published numbers are those computed, but for rounding. size: how large such numbers usually are."""
    allowed = TOLERANCE * (size + now.abs())
    off = (stored - now).abs()
    beyond = (~(off <= allowed)).nonzero().flatten().tolist()  # so that what is no number is beyond, too
    problems = [
        f"{names[i]} is published as {float(stored[i]):.6g}, computed as {float(now[i]):.6g}."
        for i in sorted(beyond, key=lambda i: -float(off[i]))
    ]
    looked = f"{len(names):,} {what}, the largest difference {float((off / allowed).max()):.1g} of what may be"
    few = int(TOLERANCE * len(names))
    return Looked(looked + (f", {len(beyond)} beyond it" if beyond else ""), problems if len(beyond) > few else [])
