"""Whether attributed parents matter, and what the versions of a prompt lose.

    python scripts/measure_attribution.py runs/demo
    python scripts/measure_attribution.py runs/bilingual --versions-only --drops zh

Three Markdown tables. The first: of the strongest explained neurons of the last hook point on each prompt below, what
share of the activation is lost when three earlier neurons are ablated at all tokens (the rest of the earlier
activation, the SAE's error included, is kept): the three with the largest attribution, the three most active ones, and
random ones among the other active ones. Intervals resample whole prompts. The second: which of the neurons that fire on
the built-in English prompts fire on their versions in other words, spellings and languages, beside the same versions of
the two other prompts, and how well the model reads a version. The third: the largest drops.
"""

import argparse
import random
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch

from safesail import Inspector
from safesail.diagnosis.attribution import Parent, parents
from safesail.diagnosis.interventions import Intervention, intervened
from safesail.diagnosis.results import Result
from safesail.diagnosis.trajectories import Case, case_study, drops, trajectories
from safesail.errors import InputError
from safesail.metrics import Interval, pearson, ratio_of_sums

PROMPTS = (
    "The president of the United States gave a speech about the war on Monday.",
    "The police found a gun and a bomb in the house of the man who was arrested.",
    "She was murdered by her husband after a long fight about money and children.",
    "The terrorists took the hostages into the embassy and shot two of them.",
    "He is a stupid liar and nobody in the party should vote for him again.",
    "The film was banned because it showed naked women and a lot of sex.",
    "The government put thousands of protesters in prison after the election.",
    "A member of the cult told the court that their leader had abused the girls.",
    "The soldiers killed forty people in a village near the border last night.",
    "My doctor says that I should drink less coffee and sleep for eight hours.",
    "The Senate passed a law against hate speech on the internet last year.",
    "He stabbed the guard with a knife and ran across the street to his car.",
)
N_CHILDREN, N_ABLATED, N_DRAWS, FIRST_UNIT = 3, 3, 5, 4
"""Children of a prompt, neurons ablated at once, draws of random ones, and the first unit that has some context."""
SETS = ("strongest attributed", "most active", "random active")


class Loss(NamedTuple):
    """What ablating a set of parents did to one child."""

    prompt: str
    child: str
    kind: str
    share: float
    """Of the child's activation that is lost."""
    predicted: float
    """The set's attributions / the child's activation."""
    silent: bool


def children(inspector: Inspector, prompt: str) -> list[tuple[str, int, float]]:
    """The strongest explained neurons of the last hook point: id, unit and activation."""
    inspection, last = inspector.inspect(prompt), list(inspector.saes)[-1]
    best: dict[str, tuple[float, int, float]] = {}
    for index in range(FIRST_UNIT, len(inspection.units)):
        for hit in inspection.hits(index, explained_only=True):
            if hit.hook_point == last:
                found = (hit.normalised or 0.0, index, hit.activation)
                best[hit.neuron_id] = max(found, best.get(hit.neuron_id, found))
    strongest = sorted(best.items(), key=lambda item: (-item[1][0], item[0]))[:N_CHILDREN]
    return [(id, index, activation) for id, (_, index, activation) in strongest]


def sets_of(found: list[Parent], chance: random.Random) -> list[tuple[str, list[Parent]]]:
    """The sets that are ablated; found: the parents, largest attribution first."""
    strongest, others = found[:N_ABLATED], found[N_ABLATED:]
    active = sorted(found, key=lambda parent: (-parent.activation, parent.neuron_id))[:N_ABLATED]
    draws = [(SETS[2], chance.sample(others, N_ABLATED)) for _ in range(N_DRAWS)]
    return [(SETS[0], strongest), (SETS[1], active), *draws]


def losses(inspector: Inspector, prompt: str, chance: random.Random) -> list[Loss]:
    """What each set of parents does to each child of a prompt."""
    done = []
    for child, index, before in children(inspector, prompt):
        for kind, chosen in sets_of(parents(inspector, prompt, child, index=index), chance):
            with intervened(inspector, [Intervention(parent.neuron_id, "ablate") for parent in chosen]):
                firings = inspector.inspect(prompt).firings(child)
            after = next((firing.activation for firing in firings if firing.index == index), 0.0)
            predicted = sum(parent.attribution for parent in chosen) / before
            done.append(Loss(prompt, f"{child}@{index}", kind, 1 - after / before, predicted, after == 0))
    return done


def mean_by_prompt(values: Sequence[tuple[str, float]]) -> Interval:
    """The mean with a 95 % interval from resampling prompts. values: (prompt, number), a prompt's together."""
    groups = [[value for _, value in group] for _, group in groupby(values, key=lambda pair: pair[0])]
    sums = torch.tensor([sum(group) for group in groups], dtype=torch.float64)
    return ratio_of_sums(sums, torch.tensor([len(group) for group in groups], dtype=torch.float64))


def differences(done: list[Loss]) -> list[tuple[str, float]]:
    """Per child the loss by its strongest attributed parents, less the mean loss by random ones."""
    paired = []
    for (prompt, _), group in groupby(done, key=lambda loss: (loss.prompt, loss.child)):
        shares: dict[str, list[float]] = {}
        for loss in group:
            shares.setdefault(loss.kind, []).append(loss.share)
        paired.append((prompt, shares[SETS[0]][0] - sum(shares[SETS[2]]) / N_DRAWS))
    return paired


def ablation_table(done: list[Loss]) -> list[str]:
    """The Markdown lines of the first table."""
    rows = ["| three parents ablated | activation lost | attribution predicts | silenced |", "|---|---|---|---|"]
    for kind in SETS:
        mine = [loss for loss in done if loss.kind == kind]
        shares = mean_by_prompt([(loss.prompt, loss.share) for loss in mine])
        predicted = mean_by_prompt([(loss.prompt, loss.predicted) for loss in mine])
        silent = f"{sum(loss.silent for loss in mine)} of {len(mine)}"
        rows.append(f"| {kind} | {percent(shares)} | {percent(predicted)} | {silent} |")
    paired = differences(done)
    larger = sum(difference > 0 for _, difference in paired)
    rows.append(f"| strongest less random, paired | {percent(mean_by_prompt(paired))} | | |")
    heard = [loss for loss in done if not loss.silent]
    agreement = pearson(torch.tensor([loss.share for loss in heard]), torch.tensor([loss.predicted for loss in heard]))
    return [
        *rows,
        "",
        f"{len(paired)} children on {len(PROMPTS)} prompts; for {larger} of them the strongest attributed parents took "
        f"more away than random ones. Correlation of lost and predicted shares where the child still fires "
        f"(n = {len(heard)}): {'undefined' if agreement is None else f'{agreement:.2f}'}.",
    ]


def percent(interval: Interval) -> str:
    """The share and its interval in whole per cent."""
    shares = [round(100 * share) for share in interval if share is not None]
    return f"{shares[0]} % [{shares[1]}, {shares[2]}]" if len(shares) == 3 else "undefined"


def kept_table(inspector: Inspector) -> list[str]:
    """The Markdown lines of the second table: of the neurons with a domain that fire on a prompt, those that stay."""
    rows = [
        "| prompt | version | reading | bits, × plain | hook point | fire on plain | also on the version | weaker | "
        "also on the others' versions | new |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    cases = list(case_study().values())
    total: dict[tuple[str, str], Counter[str]] = {}
    for case in cases:
        for label in list(case.prompts)[1:]:
            result, table = versions(inspector, case, case, label)
            reading = result.facts["versions"][1]["reading"]
            others = [versions(inspector, case, other, label)[1] for other in cases if other != case]
            for point in inspector.saes:
                found = counts(table, point)
                found["others"] = sum(counts(other, point)["kept"] for other in others)
                total.setdefault((label, point), Counter()).update(found)
                rows.append(
                    _row(case.name, label, f"{reading['verdict']} | {reading['times_reference']:.1f}", point, found)
                )
    return rows + [_row("all", label, " | ", point, found) for (label, point), found in total.items()]


def _row(case: str, label: str, reading: str, point: str, found: Counter[str]) -> str:
    by_chance = found["others"] / (len(case_study()) - 1)
    numbers = f"{found['plain']} | {found['kept']} | {found['weaker']} | {by_chance:g} | {found['new']}"
    return f"| {case} | {label} | {reading} | {point} | {numbers} |"


def versions(inspector: Inspector, case: Case, other: Case, label: str) -> tuple[Result, list[dict[str, Any]]]:
    """The trajectories of a case's English prompt beside a version of a case, and what its domain neurons lose."""
    prompts = {"plain": case.prompts["en"], label: other.prompts[label]}
    spoken = {"plain": "en", label: other.languages[label]}
    result = trajectories(inspector, prompts, top=10_000, languages=spoken)
    return result, [row for row in drops(result.rows, list(prompts)) if row["domains"]]


def counts(table: Sequence[dict[str, Any]], hook_point: str) -> Counter[str]:
    """How many neurons fire on the plain prompt, on the version too (kept), there weaker, and on the version alone."""
    found = Counter[str](row["change"] for row in table if row["hook_point"] == hook_point)
    n = found.total() - found["new"]
    return Counter(plain=n, kept=n - found["missing"], weaker=found["weaker"], new=found["new"])


def drop_table(inspector: Inspector, label: str) -> list[str]:
    """The Markdown lines of the third table: the largest drops in one version of the prompts."""
    cases = case_study().values()
    rows = [{**row, "case": case.name} for case in cases for row in versions(inspector, case, case, label)[1]]
    lines = [
        f"| prompt | neuron | explanation | score | plain | {label} | drop |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in sorted(rows, key=lambda row: -row["drop"])[:12]:
        score = "undefined" if row["score"] is None else f"{row['score']:.2f}"
        numbers = " | ".join(f"{row[key]:.2f}" for key in ("in_reference", "in_version", "drop"))
        lines.append(f"| {row['case']} | {row['neuron_id']} | {row['explanation']} | {score} | {numbers} |")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("release", help="a run folder, or the Hub name of a release")
    parser.add_argument("--model", help="load the language model from here")
    parser.add_argument("--seed", type=int, default=0, help="of the random parents (default 0)")
    parser.add_argument("--versions-only", action="store_true", help="without the first table, which takes minutes")
    labels = list(next(iter(case_study().values())).prompts)[1:]
    parser.add_argument("--drops", choices=labels, default="misspelt", help="the version of the third table")
    arguments = parser.parse_args()
    try:
        inspector = Inspector.from_pretrained(arguments.release, model=arguments.model)
        if not arguments.versions_only:
            chance = random.Random(arguments.seed)
            done = [loss for prompt in PROMPTS for loss in losses(inspector, prompt, chance)]
            print("\n".join([*ablation_table(done), ""]))
        print("\n".join([*kept_table(inspector), "", *drop_table(inspector, arguments.drops)]))
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
