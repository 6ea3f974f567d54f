"""Published numbers computed once more from what is published: which of them hold, and which nobody can compute.

From the pairs, the SAEs and the base model: I_CDF and L_{0,t} of every SAE on every group of pairs, the choice of the
SAEs, and the sign tests that made the neurons candidates, all by the functions that the `select` stage calls. From the
sparsity files: dead and dense shares. From confusion counts: the score of the lexical baselines.

Sums are taken in fp32 in an order that depends on the machine, so a latent whose activation is near zero (or near the
k-th) may be active on a query here and silent there. A share of TOLERANCE of the decisions is allowed to differ.
"""

import math
from functools import cached_property
from typing import Any, NamedTuple

from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor

from safesail.contrast import Contrast, contrast
from safesail.diagnosis.base_model import base_model_of, same_tokenizer
from safesail.errors import InputError
from safesail.interpretation.tags import candidates_by_neuron
from safesail.lm.load import causal_lm, load_tokenizer
from safesail.lm.tokens import special_ids
from safesail.metrics import DEFINITIONS
from safesail.pairs import Pair
from safesail.recipe import SelectSection
from safesail.release.checks.finding import Finding, Looked, finding
from safesail.release.checks.part import Part
from safesail.sae.model import Sae
from safesail.training.candidates import candidate_latents
from safesail.training.groups import Group, groups_of, latent_shares, measure
from safesail.training.queries import active_latents, queries_of, query_activations
from safesail.training.selection import Contender, choose

__all__ = ["TOLERANCE", "recomputed"]

TOLERANCE = 1e-3
"""Of I_CDF and L_{0,t}: the share by which they may differ, since fp32 sums are rounded in another order elsewhere."""
_LEAST_LATENTS = 0.1
"""L_{0,t} is a small count averaged over categories: so much may always differ."""
_SINGLE = 1e-6
"""What fp32 resolves: the tolerance of numbers that are sums of whole numbers, and of correlations."""
_I_CDF = ("i_cdf", "i_cdf_swapped", "i_cdf_null", "above_null")
_DRAWN = ("i_cdf_low", "i_cdf_high", "i_cdf_null_high", "i_cdf_p", "above_null_low", "above_null_high")

Row = dict[str, Any]
_NOT_PUBLISHED = {
    "fidelity": "EV, FVU, MSE, cosine, L0, CE recovered and KL are of held-out texts, which are not published.",
    "firing": "quantiles and firing rates were counted over the corpus, which is not published.",
    "examples": "activations depend on all tokens before them in their document, of which only a part is published.",
    "simulation": "scores by explanations rest on predictions, and all intervals on texts, that are not published.",
}


def recomputed(source: str, parts: dict[str, Part], model: str | None = None) -> list[Finding]:
    """The findings of everything that can be computed again, and of what cannot. source: where the parts are."""
    findings = []
    if "saes" in parts:
        findings.append(finding("saes", "recomputed: dead and dense", _dead_and_dense, parts["saes"]))
    if "neurons" in parts:
        findings.append(finding("neurons", "recomputed: lexical scores", _lexical_scores, parts["neurons"]))
    findings += _by_the_model(source, parts, model)
    return findings + [
        Finding("release", f"recomputed: {name}", "skipped", why) for name, why in _NOT_PUBLISHED.items()
    ]


# --- from tables and small files ----------------------------------------------------------------------------------


def _dead_and_dense(part: Part) -> Looked:
    """The dead share counts rates of zero, the dense share those above 0.1; of the SAEs with a sparsity file."""
    problems, n, worst = [], 0, 0.0
    for id, row in part.config.by_id.items():
        if f"{id}/sparsity.safetensors" not in part.there or row.get("dead") is None:
            continue
        logs = load_file(part.repository.file(f"{id}/sparsity.safetensors"))["sparsity"].double()
        shares = {"dead": float((logs < -9.5).double().mean()), "dense": float((logs > -1 + _SINGLE).double().mean())}
        # a latent that fires on a tenth of the tokens is not dense, but its rate may be rounded to above a tenth
        unsure = {"dead": 0.0, "dense": float(((logs + 1).abs() <= _SINGLE).double().mean())}
        for name, share in shares.items():
            if row.get(name) is None:
                continue
            n, worst = n + 1, max(worst, abs(row[name] - share))
            if abs(row[name] - share) > unsure[name] + _SINGLE:
                problems.append(f"{id}: {name} is published as {row[name]:.6g}, the sparsity file gives {share:.6g}.")
    if not n:
        raise InputError("there is no SAE with a sparsity file and a dead share.")
    return Looked(f"{n} shares of latents, the largest difference {worst:.1g} (allowed {_SINGLE:g})", problems)


def _lexical_scores(part: Part) -> Looked:
    """A lexical baseline predicts yes or no of units that are active or not: its score is phi, its AUROC follows.

    Tokens have levels, not yes and no, so `token/lexical` is left out.
    """
    problems, worst, n = [], 0.0, 0
    for row in part.rows("scores"):
        counts = [row[f"{name}s"] for name in ("true_positive", "false_positive", "false_negative", "true_negative")]
        if not row["method"].endswith("/lexical") or row["method"].startswith("token") or None in counts:
            continue
        values = dict(zip(("score", "auroc"), _phi_and_auroc(*counts), strict=True))
        for name, value in values.items():
            n += 1
            if value is None or row[name] is None:
                agrees = value is None and row[name] is None
            else:
                worst, agrees = max(worst, abs(row[name] - value)), abs(row[name] - value) <= _SINGLE
            if not agrees:
                who = f"{row['neuron_id']} by {row['method']}"
                problems.append(f"{who}: {name} is published as {row[name]}, its confusion counts give {value}.")
    if not n:
        raise InputError("no lexical baseline is among the scores.")
    return Looked(f"{n:,} numbers, the largest difference {worst:.1g} (allowed {_SINGLE:g})", problems)


def _phi_and_auroc(hits: int, alarms: int, misses: int, rests: int) -> tuple[float | None, float | None]:
    """The correlation of two yes-or-no vectors, and the AUROC of the one for the other; None where one is constant."""
    product = (hits + alarms) * (hits + misses) * (rests + alarms) * (rests + misses)
    if not product:
        return None, None
    phi = (hits * rests - alarms * misses) / math.sqrt(product)
    return phi, (1 + hits / (hits + misses) - alarms / (alarms + rests)) / 2


# --- with the model -----------------------------------------------------------------------------------------------


class _Select(NamedTuple):
    """What the `select` stage was given, as far as it is published."""

    pairs: list[Pair]
    section: SelectSection
    seed: int | None
    """None: it is not published, and neither intervals nor p-values can be drawn again."""


def _by_the_model(source: str, parts: dict[str, Part], model: str | None) -> list[Finding]:
    try:
        measured = _Measured(source, parts, model)
    except InputError as error:
        return [Finding("release", "recomputed: contrast", "skipped", f"not checked: {error}")]
    found = [finding("saes", f"recomputed: {id}", _contrast_holds, measured, id) for id in measured.contrasts]
    return [
        *found,
        finding("saes", "recomputed: intervals", _intervals_hold, measured),
        finding("saes", "recomputed: selected", _choice_holds, measured),
        finding("neurons", "recomputed: candidates", _candidates_hold, measured),
    ]


class _Measured:
    """The concept contrast of every SAE over the published pairs."""

    def __init__(self, source: str, parts: dict[str, Part], model: str | None) -> None:
        if lacking := [name for name in ("saes", "neurons") if name not in parts]:
            raise InputError(f"it needs {' and '.join(lacking)}.")
        self.saes, self.neurons = parts["saes"], parts["neurons"]
        self.config = self.saes.config
        self.select = _select_of(self.saes, self.neurons)
        self.groups = groups_of(self.select.pairs)
        self.manifest = self.config.model_dump()
        path, revision = (model, None) if model else base_model_of(source, self.manifest)
        self.contrasts = self._contrasts(path, revision)
        self.shares = {id: latent_shares(each) for id, each in self.contrasts.items()}

    def _contrasts(self, path: str, revision: str | None) -> dict[str, Contrast]:
        """Which latent of each SAE wins and loses which pair; one SAE is in memory at a time."""
        tokenizer = load_tokenizer(path, revision=revision)
        same_tokenizer(tokenizer, path, self.manifest)
        queries, section = queries_of(self.select.pairs), self.select.section
        hook_points = tuple(dict.fromkeys(id.rpartition("/")[0] for id in self.config.by_id))
        lm = causal_lm(path, revision=revision)
        captured = query_activations(lm, tokenizer, [query.text for query in queries], hook_points)
        found, specials = {}, special_ids(tokenizer)
        for id in self.config.by_id:
            sae = _sae(self.saes, id)
            said = captured[sae.config.hook_point]
            active = active_latents(sae, queries, said, specials, section.reduction, 0.0)
            found[id] = contrast(*active.chunk(2))
        return found

    def numbers(self, id: str, group: Group) -> Row:
        """The numbers of an SAE on a group of pairs, as the tables name them."""
        section = self.select.section
        if self.select.seed is None:  # what is drawn is not compared, so little is drawn
            section = section.model_copy(update={"n_resamples": 2})
        found = measure(self.contrasts[id], self.shares[id], group, section, self.select.seed or 0)
        for key, end in (("l0_t", ""), ("l0_t_null", "_null")):
            found |= {f"l0_t_{t}{end}": value for t, value in found.pop(key).items()}
        return found

    @cached_property
    def rows(self) -> list[tuple[str, Row, Row]]:
        """(which, published, computed) of each row of the contrast table, and of each entry of the selection table."""
        groups = {(group.grouping, group.name): group for group in self.groups}
        kept = [row for row in self.neurons.rows("contrast") if (row["grouping"], row["group"]) in groups]
        found = [
            (
                f"{row['sae_id']} on {row['group']}",
                row,
                self.numbers(row["sae_id"], groups[row["grouping"], row["group"]]),
            )
            for row in kept
            if row["sae_id"] in self.contrasts
        ]
        curve = [row for row in self.neurons.rows("selection") if row["sae_id"] in self.contrasts]
        return found + [(row["sae_id"], row, self.numbers(row["sae_id"], self.groups[0])) for row in curve]


def _select_of(saes: Part, neurons: Part) -> _Select:
    """The options and pairs that the release says it was selected with."""
    options = saes.config.selected_by
    if not options:
        raise InputError("config.json does not say what the SAEs were selected with.")
    if options.get("activity_quantile"):
        raise InputError("select.activity_quantile refers to held-out texts, which are not published.")
    ids = ("i_cdf/v1", "i_cdf_null/v1", "above_null/v1", "l0_t/v1")
    for other in (id for id in ids if saes.config.definitions.get(id) != DEFINITIONS.get(id)):
        raise InputError(f"this safesail does not know the release's definition of {other}.")
    names = ("reduction", "criterion", "fdr", "min_pairs", "n_resamples", "thresholds")
    try:
        section = SelectSection.model_validate({name: options[name] for name in names if name in options})
        pairs = [Pair.model_validate(row) for row in neurons.rows("pairs")]
    except ValidationError as error:
        raise InputError(f"options or pairs are not of a release: {error.errors()[0]['msg']}.") from error
    if not pairs:
        raise InputError("the table of pairs is empty.")
    return _Select(pairs, section, options.get("seed"))


def _sae(saes: Part, id: str) -> Sae:
    where = saes.repository
    return Sae.from_pretrained(where.source, id, revision=where.revision, token=where.token)


def _contrast_holds(measured: _Measured, id: str) -> Looked:
    """I_CDF, its null, and L_{0,t} of an SAE on every group of pairs."""
    problems, n, worst = [], 0, 0.0
    rows = [row for row in measured.rows if row[1]["sae_id"] == id]
    for who, stored, now in rows:
        for name in (key for key in stored if key in _I_CDF or key.startswith("l0_t_")):
            if stored[name] is None:
                continue
            n, difference = n + 1, abs(stored[name] - now[name])
            allowed = TOLERANCE * now["i_cdf"] if name in _I_CDF else _LEAST_LATENTS + TOLERANCE * now[name]
            worst = max(worst, difference / allowed if allowed else difference)
            if difference > allowed:
                problems.append(f"{who}: {name} is published as {stored[name]:.6g}, computed as {now[name]:.6g}.")
    if not n:
        raise InputError(f"the tables have nothing of {id} on these pairs.")
    _, stored, now = rows[-1]
    i_cdf = f"I_CDF published {stored['i_cdf']:.8g}, computed {now['i_cdf']:.8g}"
    allowed = f"{TOLERANCE:g} of I_CDF, and {_LEAST_LATENTS:g} + {TOLERANCE:g} of L_0,t"
    return Looked(f"{i_cdf}; {n:,} numbers, the largest difference {worst:.1g} of what may be ({allowed})", problems)


def _intervals_hold(measured: _Measured) -> Looked:
    """The 95 % intervals and p-values, whose draws depend on the seed and the number of pairs alone."""
    seed, n_resamples = measured.select.seed, measured.select.section.n_resamples
    if seed is None:
        raise InputError("the seed of the draws is not published.")
    problems, n = [], 0
    for who, stored, now in measured.rows:
        for name in (key for key in stored if key in _DRAWN):
            n += 1
            allowed = 1 / n_resamples if name == "i_cdf_p" else 10 * TOLERANCE * now["i_cdf"]
            both = stored[name] is not None and now[name] is not None
            if (stored[name] is None) != (now[name] is None) or (both and abs(stored[name] - now[name]) > allowed):
                problems.append(f"{who}: {name} is published as {stored[name]}, computed as {now[name]}.")
    return Looked(f"{n:,} numbers with seed {seed}, within {10 * TOLERANCE:g} of I_CDF, p within one draw", problems)


def _choice_holds(measured: _Measured) -> Looked:
    """The rule of selection, applied again to the merits computed here and the published EV.

    Without the published seed the draws are others, and an SAE whose interval ends near 0 may be judged otherwise.
    """
    section, seed, config = measured.select.section, measured.select.seed, measured.config
    problems = []
    for hook_point, id in config.selected.items():
        contenders = [
            Contender(name, _merit(measured.shares[name], section.criterion), row.get("explained_variance"))
            for name, row in config.by_id.items()
            if name.rpartition("/")[0] == hook_point
        ]
        chosen, as_good = choose(contenders, measured.groups[0], section.n_resamples, seed or 0)
        unsure = seed is None and id in as_good
        if chosen != id and not unsure:
            problems.append(f"{hook_point}: {id} is published as selected, the rule gives {chosen}.")
    seeded = f"seed {seed}" if seed is not None else "an unpublished seed"
    return Looked(f"{len(config.selected)} hook points, by {section.criterion}, with {seeded}", problems)


def _merit(shares: Contrast, criterion: str) -> Tensor:
    """The number per pair whose mean is the criterion, as in `training.selection`: (n_pairs,)."""
    return shares.won if criterion == "i_cdf" else (shares.won - shares.lost) / 2


def _candidates_hold(measured: _Measured) -> Looked:
    """The domains that each neuron is a candidate for, its wins, and its p- and q-value, from the sign tests."""
    found = candidates_by_neuron(
        {
            hook_point: candidate_latents(measured.contrasts[id], measured.select.pairs, measured.select.section)
            for hook_point, id in measured.config.selected.items()
        }
    )
    problems, rows = [], measured.neurons.rows("neurons")
    for row in rows:
        records = found.get(row["neuron_id"], {})
        if set(records) != set(row["candidate_for"]):
            said, now = (", ".join(sorted(names)) or "none" for names in (row["candidate_for"], records))
            problems.append(f"{row['neuron_id']} is published as a candidate for {said}, the pairs give {now}.")
            continue
        numbers = _numbers_of(records)
        wrong = [name for name, value in numbers.items() if abs(row[name] - value) > _SINGLE]
        problems += [
            f"{row['neuron_id']}: {name} is published as {row[name]}, the pairs give {numbers[name]}." for name in wrong
        ]
    return Looked(f"{len(rows):,} neurons, equal within {_SINGLE:g}", problems)


def _numbers_of(records: dict[str, Row]) -> Row:
    """The wins and the p- and q-value that the main table shows of a neuron's candidacies."""
    every = records.values()
    return {
        "n_wins": max((row["n_wins"] for row in every), default=0),
        "p_value": min((row["p_value"] for row in every), default=1.0),
        "q_value": min((row["q_value"] for row in every), default=1.0),
    }
