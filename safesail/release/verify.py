"""Whether a release is what it says it is: files, tables, references and published numbers, checked one by one.

Reads a run folder, one of its parts, a Hub release `org/name` or one of its repositories. Of the Hub's large files only
sizes, checksums and headers are asked for; tables, cards and JSON are downloaded. What a release must be is said by its
`safesail.json`, by `release.tables` and by its own `config.json`. `release.recompute` computes numbers again, and
`release.reward_recompute` those of a reward model's release.

A check that cannot be made, since what it needs is missing or unreadable, is skipped; the check of that thing fails.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safesail.errors import InputError
from safesail.release.checks import diagnoses, files, numbers, reward, saes, tables, together
from safesail.release.checks.finding import Finding, Looked, finding
from safesail.release.checks.part import Part
from safesail.release.hub_id import hub_id
from safesail.release.manifest import MANIFEST, REPO_TYPES, REWARD_REPO_TYPES, Manifest, repo_type_of
from safesail.repository import Repository

__all__ = ["Finding", "lines", "to_json", "verify"]

Row = dict[str, Any]


def verify(
    source: str | Path,
    *,
    recompute: bool = False,
    model: str | None = None,
    token: str | None = None,
    revision: str | None = None,
) -> list[Finding]:
    """Every check of a release, in the order of its parts.

    recompute: run the base model (or `model`, a folder or Hub id), of a reward model's release that model itself, over
    the published pairs and compute the published numbers again. InputError where there is nothing of a release at all.
    """
    parts, findings = _open(str(source), token, revision)
    of_reward_model = any("reward" in part.manifest.parts for part in parts.values())
    if model and of_reward_model:
        raise InputError(f"{source} is a release of a reward model, which it brings itself; leave --model out.")
    for part in parts.values():
        for check, look in _CHECKS[""] + _CHECKS.get(part.name, []):
            findings.append(finding(part.name, check, look, part))
    for check, needs, look in _TOGETHER_OF_REWARDS if of_reward_model else _TOGETHER:
        if "poisoned" not in needs or "poisoned" in parts:
            findings.append(_joint(check, needs, look, parts))
    if recompute:
        findings += _recomputed(str(source), parts, model, of_reward_model)
    return findings


def _recomputed(source: str, parts: dict[str, Part], model: str | None, of_reward_model: bool) -> list[Finding]:
    """Both kinds need torch and the models, which nothing else here does."""
    if of_reward_model:
        from safesail.release import reward_recompute

        return reward_recompute.recomputed(parts)
    from safesail.release import recompute

    return recompute.recomputed(source, parts, model)


def lines(findings: list[Finding]) -> list[str]:
    """The findings as a table for the terminal, and how many of them hold, fail or were skipped."""
    widths = [max((len(row[i]) for row in findings), default=0) for i in range(3)]
    cells = [[*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row.detail] for row in findings]
    n = Counter(row.status for row in findings)
    return [*("  ".join(row) for row in cells), f"{n['holds']} hold, {n['fails']} fail, {n['skipped']} skipped."]


def to_json(findings: list[Finding]) -> Row:
    """The findings as plain JSON, with their counts."""
    n = Counter(row.status for row in findings)
    counts = {f"n_{status}": n[status] for status in ("holds", "fails", "skipped")}
    return {**counts, "findings": [row._asdict() for row in findings]}


def _joint(
    check: str, needs: tuple[str, ...], look: Callable[[dict[str, Part]], Looked], parts: dict[str, Part]
) -> Finding:
    lacking = [name for name in needs if name not in parts]
    if lacking:
        return Finding("release", check, "skipped", f"not checked: it needs {' and '.join(lacking)}.")
    return finding("release", check, look, parts)


# --- what there is --------------------------------------------------------------------------------------------------


def _open(source: str, token: str | None, revision: str | None) -> tuple[dict[str, Part], list[Finding]]:
    """The parts that are there, and a finding for each that is not or has no manifest; InputError where none has."""
    parts: dict[str, Part] = {}
    findings: list[Finding] = []
    places, missing = _places(source, token, revision)
    problems: list[InputError] = []
    for name, where in places.items():
        repository = Repository(where, repo_type_of(name), revision, token)
        try:
            manifest = _manifest(repository)
        except InputError as error:
            findings.append(Finding(name, "manifest", "skipped" if _unseen(error) else "fails", str(error)))
            problems.append(error)
            continue
        fits = manifest.part == name
        said = f"{manifest.release} {manifest.version}" if fits else f"it says that it is the part {manifest.part!r}."
        findings.append(Finding(name, "manifest", "holds" if fits else "fails", said))
        parts[name] = Part(name, repository, manifest)
    if not parts:
        raise problems[0]
    absent = [Finding(name, "manifest", "skipped", f"{source} has no folder {name}.") for name in missing]
    return parts, findings + absent


_ALL = {**REPO_TYPES, **REWARD_REPO_TYPES}
"""The parts of both kinds of release."""


def _places(source: str, token: str | None, revision: str | None) -> tuple[dict[str, str], list[str]]:
    """({part: its folder or Hub id}, the parts that are not there)."""
    folder = Path(source).expanduser()
    if (folder / MANIFEST).is_file():
        part = Manifest.of(folder).part
        return {part if part in _ALL else "saes": str(folder)}, []
    if folder.is_dir():
        there = {part: str(folder / part) for part in _ALL if (folder / part).is_dir()}
        wanted = _wanted(there, token, revision)
        found = {part: there[part] for part in wanted if part in there}
        if not found:
            raise InputError(f"{source} has no {MANIFEST} and no folder of a release; build one: safesail build RUN")
        return found, [part for part in wanted if part not in found]
    if not hub_id(source):
        raise InputError(f"{source!r} is neither an existing folder nor a Hub id like org/name.")
    alone = [part for part in _ALL if source.endswith(f"-{part}")]
    if alone:
        return {alone[0]: source}, []
    known = {part: f"{source}-{part}" for part in ("saes", "reward")}
    return {part: f"{source}-{part}" for part in _wanted(known, token, revision)}, []


def _wanted(places: dict[str, str], token: str | None, revision: str | None) -> tuple[str, ...]:
    """The parts of the release, as the first of these repositories says that can be read; else the usual ones."""
    for part, where in places.items():
        try:
            return _manifest(Repository(where, repo_type_of(part), revision, token)).parts
        except InputError:  # said later, of the part that it is
            continue
    return tuple(REPO_TYPES)


def _manifest(repository: Repository) -> Manifest:
    folder = repository.folder
    if folder is not None:
        return Manifest.of(folder)
    return Manifest.parse(repository.json(MANIFEST), f"{MANIFEST} of {repository.source}")


def _unseen(error: InputError) -> bool:
    """Whether a repository could not be looked into at all, instead of not being a release's."""
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

    cause = error.__cause__
    if isinstance(cause, LocalEntryNotFoundError):
        return True
    return isinstance(cause, HfHubHTTPError | OSError) and not isinstance(cause, EntryNotFoundError)


# --- the checks -----------------------------------------------------------------------------------------------------

_CHECKS: dict[str, list[tuple[str, Callable[[Part], Looked]]]] = {
    "": [
        ("checksums", files.files),
        ("unnamed files", files.unnamed),
        ("front matter", files.front_matter),
        ("links", files.links),
    ],
    "saes": [
        ("config", saes.config),
        ("metrics", saes.metrics),
        ("weights", saes.weights),
        ("model-index", saes.model_index),
    ],
    "neurons": [
        ("schema", tables.schema),
        ("keys", tables.unique),
        ("languages", tables.languages),
        ("same neurons", tables.same_neurons),
        ("taxonomy", tables.taxonomy),
        ("statuses", tables.statuses),
        ("main table", numbers.main_table),
        ("costs", numbers.costs),
        ("quantiles", numbers.quantiles),
        ("landscape", numbers.landscape),
        ("confusion", numbers.confusion),
    ],
    "examples": [
        ("schema", tables.schema),
        ("keys", tables.unique),
        ("contexts", numbers.contexts),
        ("diagnoses", diagnoses.results),
    ],
    "reward": [
        ("model", reward.model),
        ("model-index", reward.accuracies),
    ],
    "salience": [
        ("schema", tables.schema),
        ("keys", reward.unique),
        ("salience", reward.salience),
        ("safety latents", reward.safety_latents),
        ("scores", reward.scores),
        ("edits", reward.edits),
    ],
    "preferences": [
        ("schema", tables.schema),
        ("keys", reward.unique),
        ("splits", reward.splits),
    ],
    "poisoned": [
        ("schema", tables.schema),
        ("keys", reward.unique),
    ],
}
_TOGETHER: list[tuple[str, tuple[str, ...], Callable[[dict[str, Part]], Looked]]] = [
    ("one release", (), together.one_release),
    ("neurons exist", ("saes", "neurons"), together.neurons_exist),
    ("selection", ("saes", "neurons"), together.selection),
    ("firing rates", ("saes", "neurons"), together.firing_rates),
    ("examples' neurons", ("neurons", "examples"), together.examples_fit),
    ("diagnoses' neurons", ("neurons", "examples"), diagnoses.neurons_fit),
]
_TOGETHER_OF_REWARDS: list[tuple[str, tuple[str, ...], Callable[[dict[str, Part]], Looked]]] = [
    ("one release", (), together.one_release),
    ("latents exist", ("saes", "salience"), reward.latents_exist),
    ("pairs' scores", ("salience", "preferences"), reward.pairs_fit),
    ("contexts' latents", ("salience", "preferences"), reward.contexts_fit),
    ("denoised data", ("salience", "preferences"), reward.denoised),
    ("poisoned data", ("salience", "preferences", "poisoned"), reward.poisoned),
]
