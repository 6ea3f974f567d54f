"""The parts of a reward model's release: what each says holds in itself, and all say the same of pairs and latents."""

import itertools
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from safesail.errors import InputError
from safesail.release.checks.finding import Looked, close, unlike
from safesail.release.checks.part import Part
from safesail.release.checks.saes import tensor_shapes
from safesail.rewards.comparison import UNEDITED

__all__ = [
    "accuracies",
    "contexts_fit",
    "denoised",
    "edits",
    "latents_exist",
    "model",
    "pairs_fit",
    "poisoned",
    "safety_latents",
    "salience",
    "scores",
    "splits",
    "unique",
]

Row = dict[str, Any]
_KEYS = {
    "salience": ("latent",),
    "scores": ("pair_id",),
    "edits": ("edit", "seed", "pair_id"),
    "comparison": ("edit",),
    "pairs": ("id",),
    "contexts": ("latent", "rank"),
    "ratings": ("latent",),
}
_EDITED_KEY = ("id",)
_TOLERANCE = 1e-9
"""What two sums of doubles in another order may differ by, relatively."""


# --- a part by itself ---------------------------------------------------------------------------------------------


def unique(part: Part) -> Looked:
    """No table has two rows about the same thing."""
    problems, n = [], 0
    for config in _configs(part):
        key = _KEYS.get(config, _EDITED_KEY)
        counts = Counter(tuple(row[column] for column in key) for row in part.rows(config))
        n += len(counts)
        twice = [what for what, times in counts.items() if times > 1]
        problems += [f"{config} has several rows for {', '.join(map(str, what))}." for what in twice]
    return Looked(f"{n:,} rows", problems)


def _configs(part: Part) -> list[str]:
    return sorted({name.partition("/")[0] for name in part.there if name.endswith(".parquet")})


def model(part: Part) -> Looked:
    """config.json is of a model with one label, and its head gives one number."""
    config = part.repository.json("config.json")
    labels = config.get("id2label") if isinstance(config, dict) else None
    problems = [] if isinstance(labels, dict) and len(labels) == 1 else ["config.json is not of a model of one label."]
    files = [name for name in part.there if name.endswith(".safetensors")]
    shapes = {key: shape for name in files for key, shape in tensor_shapes(part, name).items()}
    heads = [shape for name, shape in shapes.items() if name.endswith("score.weight")]
    if len(heads) != 1 or len(heads[0]) != 2 or heads[0][0] != 1:
        problems.append(f"the head is {heads or 'missing'}, not one of (1, d_model).")
    return Looked(f"headers of {len(shapes)} tensors", problems)


def accuracies(part: Part) -> Looked:
    """The card's model-index holds the held-out accuracies of accuracy.json, to six digits."""
    said = part.repository.json("accuracy.json")
    held = {kind: splits["held_out"] for kind, splits in said.items() if splits["held_out"]["n"]}
    results = [result for entry in part.front.get("model-index") or [] for result in entry.get("results") or []]
    printed = {metric["name"].rpartition(" ")[2]: metric for result in results for metric in result["metrics"]}
    problems = [f"the model-index says nothing of {kind}." for kind in held if kind not in printed]
    for kind, metric in printed.items():
        if kind not in held or not close(metric["value"], held[kind]["accuracy"], 5e-6):
            problems.append(f"the model-index has {metric['value']} for {kind}, which accuracy.json has not.")
    return Looked(f"{len(printed)} accuracies", problems)


def salience(part: Part) -> Looked:
    """s is what h⁺, h⁻ and C give, and the rows are in the order of |s|."""
    settings, rows = _settings(part), part.rows("salience")
    problems = []
    for row in rows:
        total = row["h_chosen"] + row["h_rejected"] + settings["C"]
        if not close(row["salience"], (row["h_chosen"] - row["h_rejected"]) / total, _TOLERANCE):
            problems.append(f"{row['neuron_id']} has s = {row['salience']:g}, which its h and C do not give.")
        if row["neuron_id"] != f"{row['hook_point']}/{row['latent']}":
            problems.append(f"{row['neuron_id']} is row {row['hook_point']}/{row['latent']}.")
    if [row["rank"] for row in rows] != list(range(len(rows))):
        problems.append("the ranks are not 0, 1, 2, …")
    for one, other in itertools.pairwise(rows):
        if abs(one["salience"]) < abs(other["salience"]) - _TOLERANCE:
            problems.append(f"{one['neuron_id']} stands before {other['neuron_id']}, whose s is larger.")
    return Looked(f"{len(rows):,} latents, C = {settings['C']:.6g}", problems)


def safety_latents(part: Part) -> Looked:
    """The safety latents are the first by |s| of those rated high enough, each on the side of its sign."""
    settings, rows = _settings(part), part.rows("salience")
    high = [row for row in rows if row["status"] == "ok" and (row["rating"] or 0) >= settings["keep"]]
    able = [row for row in high if row["salience"]][: settings["max_latents"]]
    expected = {row["latent"]: "positive" if row["salience"] > 0 else "negative" for row in able}
    problems = []
    for row in rows:
        wanted = expected.get(row["latent"])
        if row["safety"] != wanted:
            problems.append(
                f"{row['neuron_id']} (s = {row['salience']:.3g}, rating {row['rating']}) counts as {row['safety']} and "
                f"not as {wanted}."
            )
        if row["rating"] is not None and not (row["rated"] and row["status"] == "ok" and 1 <= row["rating"] <= 5):
            problems.append(f"{row['neuron_id']} has the rating {row['rating']} and the status {row['status']}.")
    if not expected:
        problems.append("there is no safety latent.")
    return Looked(f"{len(expected)} safety latents", problems)


def scores(part: Part) -> Looked:
    """score_safe and the margin are the differences of the two sides."""
    problems, rows = [], part.rows("scores")
    for row in rows:
        for name, side in (("score_safe", "safe"), ("margin", "reward")):
            difference = row[f"{side}_chosen"] - row[f"{side}_rejected"]
            if not close(row[name], difference, 1e-6 * max(1.0, abs(difference))):
                problems.append(f"{row['pair_id']} has {name} {row[name]:g}, its sides differ by {difference:g}.")
    return Looked(f"{len(rows):,} pairs", problems)


def edits(part: Part) -> Looked:
    """Edits are of training pairs about safety, in the order of their method, and as many as the comparison says."""
    pairs, groups = {row["pair_id"]: row for row in part.rows("scores")}, _by_edit(part.rows("edits"))
    said = {row["edit"]: row["n_edited"] for row in part.rows("comparison") if row["edit"] != UNEDITED}
    names = dict.fromkeys(name for name, _ in groups)
    problems = [f"edits have {name}, the comparison has not." for name in names if name not in said]
    problems += [f"the comparison has {name}, edits have not." for name in said if name not in names]
    for (name, seed), rows in groups.items():
        stray = [row["pair_id"] for row in rows if not _is_editable(pairs.get(row["pair_id"]))]
        problems += [f"{name} edits {id}, which is no training pair about safety with a score." for id in stray]
        if name in said and len(rows) != said[name]:
            problems.append(f"{name} with seed {seed} edits {len(rows)} pairs, the comparison says {said[name]}.")
        if not stray and not _in_order(rows, pairs):
            problems.append(f"{name} does not edit its pairs in the order of its ranks and scores.")
    return Looked(f"{len(groups)} edited data sets", problems)


def _by_edit(rows: Iterable[Row]) -> dict[tuple[str, int | None], list[Row]]:
    groups: dict[tuple[str, int | None], list[Row]] = {}
    for row in rows:
        groups.setdefault((row["edit"], row["seed"]), []).append(row)
    return groups


def _is_editable(pair: Row | None) -> bool:
    return pair is not None and pair["kind"] == "safety" and not pair["held_out"]


def _in_order(rows: list[Row], pairs: dict[str, Row]) -> bool:
    """Whether ranks go 0, 1, 2, … and the values by which the method takes pairs fall (swap) or rise (drop)."""
    column = {"safer": "score_safe", "reward": "margin"}.get(rows[0]["method"])
    sign = -1 if rows[0]["action"] == "swap" else 1
    values = [sign * pairs[row["pair_id"]][column] for row in rows] if column else []
    return [row["rank"] for row in rows] == list(range(len(rows))) and values == sorted(values)


def splits(part: Part) -> Looked:
    """The split `test` holds the held-out pairs, and no prompt of theirs is in `train`."""
    train, test = (part.table(f"pairs/{name}.parquet") for name in ("train", "test"))
    problems = [f"{row['id']} is held out and in train." for row in train if row["held_out"]]
    problems += [f"{row['id']} is not held out and in test." for row in test if not row["held_out"]]
    prompts = {str(row["prompt"]) for row in train}
    problems += [f"{row['id']} has the prompt of a training pair." for row in test if str(row["prompt"]) in prompts]
    return Looked(f"{len(train):,} and {len(test):,} pairs", problems)


def _settings(part: Part) -> Row:
    """salience.json, with what the checks read of it."""
    found = part.repository.json("salience.json")
    for key in ("C", "keep", "max_latents", "hook_point"):
        if not isinstance(found, dict) or key not in found:
            raise InputError(f"salience.json has no {key}.")
    return found


# --- several parts ------------------------------------------------------------------------------------------------


def latents_exist(parts: dict[str, Part]) -> Looked:
    """Every latent is of the selected SAE, and C is the mean of h⁺ + h⁻ over all its latents."""
    saes, part = parts["saes"], parts["salience"]
    settings, rows = _settings(part), part.rows("salience")
    sae_id = saes.config.selected.get(settings["hook_point"])
    if sae_id is None:
        return Looked("", [f"salience.json is of {settings['hook_point']}, where no SAE is selected."])
    d_sae = saes.sae_config(sae_id).d_sae
    problems = [f"{row['neuron_id']} is not in its SAE of {d_sae} latents." for row in rows if row["latent"] >= d_sae]
    stray = [row["neuron_id"] for row in rows if row["hook_point"] != settings["hook_point"]]
    problems += [f"{id} is of another hook point." for id in stray]
    mean = sum(row["h_chosen"] + row["h_rejected"] for row in rows) / d_sae
    if not close(settings["C"], mean, 1e-6 * mean):
        problems.append(f"C is {settings['C']:.6g}; the mean of h⁺ + h⁻ over {d_sae} latents is {mean:.6g}.")
    return Looked(f"{len(rows):,} of {d_sae:,} latents", problems)


def pairs_fit(parts: dict[str, Part]) -> Looked:
    """The scores are of the pairs, and say the same of each."""
    pairs = {row["id"]: row for row in parts["preferences"].rows("pairs")}
    found = {row["pair_id"]: row for row in parts["salience"].rows("scores")}
    problems = [f"there is no score of {id}." for id in pairs if id not in found]
    problems += [f"there is a score of {id}, which is no pair." for id in found if id not in pairs]
    for id in pairs.keys() & found.keys():
        same = {key: pairs[id][key] for key in ("kind", "source", "held_out")}
        problems += unlike(f"scores: {id}", found[id], same, "pairs")
    return Looked(f"{len(pairs):,} pairs", problems)


def contexts_fit(parts: dict[str, Part]) -> Looked:
    """Contexts are of training pairs and of latents of the table, and the ratings are those that stand there."""
    pairs = {row["id"]: row["held_out"] for row in parts["preferences"].rows("pairs")}
    latents = {row["latent"]: row for row in parts["salience"].rows("salience")}
    contexts, ratings = (parts["preferences"].rows(name) for name in ("contexts", "ratings"))
    stray = [row["pair_id"] for row in contexts if pairs.get(row["pair_id"], True)]
    problems = [f"a context is of {id}, which is no training pair." for id in stray]
    for row in [*contexts, *ratings]:
        if row["latent"] not in latents:
            problems.append(f"{row['neuron_id']} has a context or a rating, and is not in the salience table.")
    for row in ratings:
        said = latents.get(row["latent"], row)
        problems += unlike(f"salience: {row['neuron_id']}", said, {k: row[k] for k in ("rating", "status")}, "ratings")
    return Looked(f"{len(contexts):,} contexts, {len(ratings):,} ratings", problems)


def denoised(parts: dict[str, Part]) -> Looked:
    """Every denoised data set is the training pairs without those that its edit names."""

    def left(pairs: dict[str, Row], edit: set[str]) -> dict[str, Row]:
        return {id: row | {"edited": ""} for id, row in pairs.items() if id not in edit}

    return _edited(parts, "preferences", "drop", left)


def poisoned(parts: dict[str, Part]) -> Looked:
    """Every poisoned data set is the training pairs, and those that its edit names are swapped and say so."""

    def swapped(pairs: dict[str, Row], edit: set[str]) -> dict[str, Row]:
        return {id: _swapped(row) if id in edit else row | {"edited": ""} for id, row in pairs.items()}

    return _edited(parts, "poisoned", "swap", swapped)


def _swapped(row: Row) -> Row:
    return row | {"chosen": row["rejected"], "rejected": row["chosen"], "edited": "swapped"}


def _edited(
    parts: dict[str, Part], name: str, action: str, expect: Callable[[dict[str, Row], set[str]], dict[str, Row]]
) -> Looked:
    """The edited data sets of a part. expect: what an edit makes of the training pairs, both {id: pair}."""
    pairs = {row["id"]: row for row in parts["preferences"].rows("pairs") if not row["held_out"]}
    edits: dict[str, set[str]] = {}
    for row in parts["salience"].rows("edits"):
        if (row["action"], row["method"]) == (action, "safer"):
            edits.setdefault(row["edit"], set()).add(row["pair_id"])
    there = {config for config in _configs(parts[name]) if "-" in config}
    problems = [f"there is no data set {edit}." for edit in edits if edit not in there]
    problems += [f"there is a data set {config}, which no edit names." for config in sorted(there - edits.keys())]
    for config in sorted(there & edits.keys()):
        found, wanted = {row["id"]: row for row in parts[name].rows(config)}, expect(pairs, edits[config])
        problems += [f"{config} lacks {id}." for id in wanted if id not in found]
        problems += [f"{config} has {id}, which it should not." for id in found if id not in wanted]
        wrong = [id for id in found.keys() & wanted.keys() if _differs(found[id], wanted[id])]
        problems += [f"{config}: {id} is not the pair that the edit leaves." for id in sorted(wrong)]
    return Looked(f"{len(there)} data sets", problems)


def _differs(found: Row, wanted: Row) -> bool:
    return any(found[key] != wanted[key] for key in ("prompt", "chosen", "rejected", "edited"))
