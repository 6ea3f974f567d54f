"""What editing the preference data does to a reward model: retrained on each edit, measured on held-out pairs.

Reads the preferences, the edits and what retraining gives. Writes `runs.parquet` (a row per training) and
`comparison.json`: mean held-out accuracy over seeds on pairs about safety and, as a control, on chat, its change
against the unedited data, and SAFER's choice against the random one at the same ratio.

A pair counts 1 where the chosen side has the higher reward, ½ at a tie. Changes and differences are paired: of the same
held-out pairs and the same seed, which gives a training its order, its head and its random edit. Intervals come from a
bootstrap that resamples seeds and, whole, the prompts of the held-out pairs, each by itself. Few seeds are drawn from a
few values only: such an interval tells little of how trainings differ.

Finished trainings are kept in a file beside the results until the stage is done; none is repeated.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from safesail.errors import InputError
from safesail.metrics import Interval
from safesail.progress import bar
from safesail.reward_recipe import RewardRecipe
from safesail.rewards.editing import edit_seeds
from safesail.rewards.preferences import Preference
from safesail.rewards.safety_score import prompt_groups
from safesail.run import StageWork, write_json

__all__ = ["RUNS_SCHEMA", "UNEDITED", "Retrains", "compare_stage", "comparison_table", "crossed_interval", "verdict"]

Row = dict[str, Any]
KINDS = ("safety", "chat")
UNEDITED = "unedited"
DEFINITIONS = {
    "accuracy/v1": "share of held-out pairs whose chosen side has the higher reward, ties counting half, mean over "
    "retraining seeds; 95 % interval from resampling seeds and whole prompts (1,000 bootstrap resamples)",
    "change/v1": "accuracy/v1 after the edit less that on the unedited data, of the same pairs and seeds",
    "against_random/v1": "accuracy/v1 after a method's edit less that after a random edit of as many pairs, of the "
    "same pairs and seeds",
}
RUNS_SCHEMA = pa.schema(
    [
        ("edit", pa.string()),
        ("action", pa.string()),
        ("method", pa.string()),
        ("ratio", pa.float64()),
        ("seed", pa.int64()),
        ("n_edited", pa.int64()),
        ("n_training", pa.int64()),
        ("safety", pa.float64()),
        ("chat", pa.float64()),
        ("outcomes", pa.string()),
    ]
)
"""A row is a training. `outcomes` has a sign per held-out pair in the order of their ids: 1 right, 0 wrong, = a tie."""
_WORTH = {"1": 1.0, "0": 0.0, "=": 0.5}
_N_RESAMPLES = 1000
_KEPT = "trainings.jsonl"


class Retrains(Protocol):
    """Whoever trains a reward model anew."""

    def rewards(self, pairs: Sequence[tuple[int, int]], seed: int) -> Tensor:
        """Rewards of all preferences, (n_preferences, 2), after training on (number, 0), or (number, 1) if swapped."""
        ...


class _Edit(NamedTuple):
    """One edited data set; pair ids by seed, under None where all seeds have the same."""

    name: str
    action: str | None
    method: str | None
    ratio: float | None
    pairs: Mapping[int | None, frozenset[str]]

    def of(self, seed: int) -> frozenset[str]:
        return self.pairs[seed if seed in self.pairs else None]


def compare_stage(
    recipe: RewardRecipe, preferences: Sequence[Preference], edits: list[Row], retraining: Retrains, work: StageWork
) -> None:
    """Retrain on the unedited data and on every edit, once per seed, and compare.

    Facts: `n_trainings`, `against_random` {edit: verdict on safety}.
    """
    found = [_Edit(UNEDITED, None, None, None, {None: frozenset()}), *_edits(edits)]
    held = sorted((i for i, each in enumerate(preferences) if each.held_out), key=lambda i: preferences[i].id)
    seeds = edit_seeds(recipe)
    runs = _trainings(found, seeds, preferences, held, retraining, work.folder / _KEPT)
    outcomes = {
        edit.name: torch.tensor([[_WORTH[sign] for sign in runs[edit.name, seed]] for seed in seeds]).double()
        for edit in found
    }
    compared = _Compared(outcomes, [preferences[i] for i in held], recipe.seed)
    rows = [
        _run_row(edit, seed, preferences, compared.places, runs[edit.name, seed]) for edit in found for seed in seeds
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=RUNS_SCHEMA), work.folder / "runs.parquet")
    against = [row for edit in found if (row := compared.against_random(edit)) is not None]
    summary = {
        "definitions": DEFINITIONS,
        "seeds": seeds,
        "n_held_out": {kind: len(compared.places[kind]) for kind in KINDS},
        "rows": [compared.row(edit, seeds) for edit in found],
        "against_random": against,
    }
    write_json(work.folder / "comparison.json", summary)
    (work.folder / _KEPT).unlink(missing_ok=True)
    work.facts["n_trainings"] = len(runs)
    work.facts["against_random"] = {row["edit"]: row["safety_verdict"] for row in against}


def _edits(rows: list[Row]) -> Iterator[_Edit]:
    """The edits in the order of their first rows."""
    named: dict[str, list[Row]] = {}
    for row in rows:
        named.setdefault(row["edit"], []).append(row)
    for name, members in named.items():
        seeds = dict.fromkeys(row["seed"] for row in members)
        pairs = {seed: frozenset(row["pair_id"] for row in members if row["seed"] == seed) for seed in seeds}
        yield _Edit(name, members[0]["action"], members[0]["method"], members[0]["ratio"], pairs)


# --- training -----------------------------------------------------------------------------------------------------


def _trainings(
    edits: list[_Edit],
    seeds: list[int],
    preferences: Sequence[Preference],
    held: list[int],
    retraining: Retrains,
    kept: Path,
) -> dict[tuple[str, int], str]:
    """The outcomes of every training, {(edit, seed): a sign per held-out pair}; those in the file `kept` are read."""
    done = _read_kept(kept)
    found: dict[tuple[str, int], str] = {}
    with bar("compare", len(edits) * len(seeds), "training") as progress:
        for edit in edits:
            for seed in seeds:
                pairs = _training_pairs(preferences, edit, seed)
                key = _key(preferences, pairs, held, seed)
                if key not in done:
                    rewards = retraining.rewards(pairs, seed)
                    done[key] = _outcomes(rewards[held], f"{edit.name} with seed {seed}")
                    _keep(kept, key, done[key])
                found[edit.name, seed] = done[key]
                progress.update(1)
    return found


def _training_pairs(preferences: Sequence[Preference], edit: _Edit, seed: int) -> list[tuple[int, int]]:
    chosen = edit.of(seed)
    swapped, dropped = (chosen, frozenset()) if edit.action == "swap" else (frozenset(), chosen)
    training = [(i, each.id) for i, each in enumerate(preferences) if not each.held_out]
    return [(i, int(id in swapped)) for i, id in training if id not in dropped]


def _outcomes(rewards: Tensor, name: str) -> str:
    """A sign per pair. rewards: (n_pairs, 2)."""
    margins = (rewards[:, 0] - rewards[:, 1]).tolist()
    if not all(margin == margin for margin in margins):  # a nan is not itself
        raise InputError(f"retraining on {name} gave rewards that are no numbers; lower compare.learning_rate.")
    return "".join("=" if margin == 0 else str(int(margin > 0)) for margin in margins)


def _key(preferences: Sequence[Preference], pairs: list[tuple[int, int]], held: list[int], seed: int) -> str:
    """A hash of what a training's outcomes are of, by pair ids."""
    told = [seed, [(preferences[i].id, side) for i, side in pairs], [preferences[i].id for i in held]]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def _read_kept(path: Path) -> dict[str, str]:
    """{key: outcomes} of the trainings that an interrupted attempt finished; its last line may be half a line."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.is_file() else []
    return {entry["key"]: entry["outcomes"] for entry in map(json.loads, lines)}


def _keep(path: Path, key: str, outcomes: str) -> None:
    """Add a finished training to the file, after cutting off half a line that a kill left at its end."""
    with open(path, "a+b") as handle:
        handle.seek(0)
        whole = handle.read().rfind(b"\n") + 1
        handle.truncate(whole)
        handle.write(json.dumps({"key": key, "outcomes": outcomes}).encode() + b"\n")


# --- comparing ----------------------------------------------------------------------------------------------------


def crossed_interval(values: Tensor, groups: Tensor, *, n_resamples: int = _N_RESAMPLES, seed: int = 0) -> Interval:
    """The mean with a 95 % interval from resampling rows and whole groups of columns, each by itself.

    values: (n_seeds, n_pairs), groups: (n_pairs,). All None without pairs, no ends with fewer than two groups.
    """
    if not values.numel():
        return Interval(None, None, None)
    n_seeds, (_, group) = len(values), groups.unique(return_inverse=True)
    n_groups = int(group.max()) + 1
    mean = float(values.mean())
    if n_groups < 2:
        return Interval(mean, None, None)
    sums = torch.zeros(n_seeds, n_groups, dtype=torch.float64).index_add_(1, group, values)
    sizes = torch.bincount(group).double()
    generator = torch.Generator().manual_seed(seed)
    of_seeds = _counts(n_seeds, n_resamples, generator)
    of_groups = _counts(n_groups, n_resamples, generator)
    means = ((of_seeds @ sums) * of_groups).sum(1) / (n_seeds * (of_groups @ sizes))
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Interval(mean, low, high)


def verdict(difference: Interval) -> str:
    """`lower`, `higher`, or `not told apart` where the interval holds zero or there is none."""
    if difference.high is not None and difference.high < 0:
        return "lower"
    if difference.low is not None and difference.low > 0:
        return "higher"
    return "not told apart"


def _counts(n: int, n_resamples: int, generator: torch.Generator) -> Tensor:
    """How often each of n is drawn in each resample: (n_resamples, n)."""
    drawn = torch.randint(n, (n_resamples, n), generator=generator)
    return torch.zeros(n_resamples, n, dtype=torch.float64).scatter_add_(1, drawn, torch.ones_like(drawn).double())


class _Compared:
    """The outcomes of all trainings, and what is read off them."""

    def __init__(self, outcomes: dict[str, Tensor], held: Sequence[Preference], seed: int) -> None:
        """outcomes: per edit (n_seeds, n_held); held: the held-out pairs in that order."""
        self._outcomes = outcomes
        self._seed = seed
        self._groups = prompt_groups(held)
        self.places = {
            kind: torch.tensor([i for i, each in enumerate(held) if each.kind == kind], dtype=torch.long)
            for kind in KINDS
        }
        """{kind: positions of its held-out pairs}."""

    def row(self, edit: _Edit, seeds: list[int]) -> Row:
        """The summary of one edit; nothing is changed by the unedited data."""
        of = self._outcomes[edit.name]
        is_edited = edit.name != UNEDITED
        row: Row = {
            "edit": edit.name,
            "action": edit.action,
            "method": edit.method,
            "ratio": edit.ratio,
            "seeds": len(seeds),
            "n_edited": len(edit.of(seeds[0])),
        }
        row |= {kind: self._mean(of, kind)._asdict() for kind in KINDS}
        changes = {kind: self._mean(of - self._outcomes[UNEDITED], kind)._asdict() for kind in KINDS}
        return row | {f"{kind}_change": changes[kind] if is_edited else None for kind in KINDS}

    def against_random(self, edit: _Edit) -> Row | None:
        """A method's edit less the random edit of as many pairs; None for the random and the unedited."""
        other = f"{edit.name.removesuffix(f'-{edit.method}')}-random"
        if edit.method in (None, "random") or other not in self._outcomes:
            return None
        row: Row = {"edit": edit.name, "action": edit.action, "method": edit.method, "ratio": edit.ratio}
        for kind in KINDS:
            difference = self._mean(self._outcomes[edit.name] - self._outcomes[other], kind)
            row |= {kind: difference._asdict(), f"{kind}_verdict": verdict(difference)}
        return row

    def _mean(self, values: Tensor, kind: str) -> Interval:
        places = self.places[kind]
        return crossed_interval(values[:, places], self._groups[places], seed=self._seed)


def _run_row(
    edit: _Edit, seed: int, preferences: Sequence[Preference], places: Mapping[str, Tensor], outcomes: str
) -> Row:
    worth = torch.tensor([_WORTH[sign] for sign in outcomes], dtype=torch.float64)
    row: Row = {"edit": edit.name, "action": edit.action, "method": edit.method, "ratio": edit.ratio, "seed": seed}
    row |= {"n_edited": len(edit.of(seed)), "n_training": len(_training_pairs(preferences, edit, seed))}
    row |= {kind: float(worth[places[kind]].mean()) if len(places[kind]) else None for kind in KINDS}
    return row | {"outcomes": outcomes}


# --- showing ------------------------------------------------------------------------------------------------------


def comparison_table(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """The comparison as a header and cells, an edit a row. rows: those of `comparison.json`.

    In brackets: the 95 % interval.
    """
    header = [
        "data",
        "chosen by",
        "pairs edited",
        "safety accuracy, %",
        "change, points",
        "chat accuracy, %",
        "change, points",
    ]
    cells = [
        [
            row["edit"].removesuffix(f"-{row['method']}"),
            row["method"] or "",
            str(row["n_edited"]) if row["action"] else "",
            _cell(row["safety"], _percent),
            _cell(row["safety_change"], _points),
            _cell(row["chat"], _percent),
            _cell(row["chat_change"], _points),
        ]
        for row in rows
    ]
    return header, cells


def _cell(interval: Mapping[str, float | None] | None, shown: Callable[[float], str]) -> str:
    """The value with its interval; empty where it is undefined."""
    if interval is None or interval["value"] is None:
        return ""
    low, high = interval["low"], interval["high"]
    ends = "" if low is None or high is None else f" [{shown(low)}, {shown(high)}]"
    return f"{shown(interval['value'])}{ends}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _points(share: float) -> str:
    shown = f"{100 * share:+.1f}"
    return "0.0" if float(shown) == 0 else shown
