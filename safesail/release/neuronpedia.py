"""A release as the jsonl files that Neuronpedia imports, with the scores that its own export leaves out.

Reads the `saes`, `neurons` and, where they are, `examples` of a release. Writes

    config/                       types and models of explanations and scores, as rows that others refer to
    <model>/<layer>-<set>/        one source: the selected SAE of a hook point
        release.jsonl model.jsonl sourceset.jsonl source.jsonl
        features/ activations/ explanations/ scores/batch-<N>.jsonl.gz      1,024 rows or features each

A line holds only columns of Neuronpedia's tables, and of these only what the release knows: its importer takes the
keys of the first line as the columns of the batch, gives other columns their defaults, and refuses null where a value
must be. So a column is there for all lines of a batch or for none. Scores are rows of its table ExplanationScore, in
a folder of their own: its importer of a whole source does not open it, its importer of single files does.
"""

import gzip
import json
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from safesail.errors import InputError
from safesail.hook_names import transformer_lens_name
from safesail.neurons import NeuronDatabase
from safesail.release.manifest import MANIFEST, Manifest
from safesail.repository import Repository, part_of_release
from safesail.run import fingerprint
from safesail.sae.model import Sae

__all__ = ["BATCH", "CREATOR", "export"]

Row = dict[str, Any]
BATCH = 1024
CREATOR = "clkht01d40000jv08hvalcvly"
"""The user that every new Neuronpedia database has, whom its own export names as the creator of every row."""
EXPLANATION_TYPE = "safesail"
_KINDS = {"hook_mlp_out": "mlp", "hook_resid_post": "res", "hook_attn_out": "att"}


class _Release(NamedTuple):
    """What is exported."""

    name: str
    title: str
    repository: str | None
    """The Hub id of its SAEs; None where the release has no organization yet."""
    base_model: str
    selected: dict[str, str]
    saes: Repository
    database: NeuronDatabase
    examples: dict[str, list[Row]]
    """{neuron id: its examples on which it fires}; empty where they cannot be read."""
    about_examples: str

    @property
    def model_id(self) -> str:
        """Neuronpedia's ids have no slash and no capitals: the base model's name without its owner."""
        return re.sub(r"[^a-z0-9.-]+", "-", self.base_model.rpartition("/")[2].lower()).strip("-.") or "model"


class _Place(NamedTuple):
    """A source: one SAE under Neuronpedia's names."""

    model_id: str
    set_name: str
    layer: int
    hook_point: str
    sae_id: str

    @property
    def id(self) -> str:
        return f"{self.layer}-{self.set_name}"

    @property
    def row(self) -> Row:
        """The columns by which every row names its source."""
        return {"modelId": self.model_id, "layer": self.id}


def export(source: str, folder: Path, sae_id: str | None = None) -> list[str]:
    """Write a release (a run folder, or the name its Hub repositories start with) into `folder`; what to tell about it.

    sae_id: only this selected SAE, by its id or hook point.
    InputError where there is no neuron database, no SAE, or no hook point that Neuronpedia has a name for.
    """
    release = _open(source, sae_id)
    places, lines = _places(release)
    if not places:
        raise InputError(f"no SAE of {source} is the output of a block, its MLP or its attention. {' '.join(lines)}")
    _write_config(release, folder / "config")
    for place in places:
        lines.append(_write_source(release, place, folder / place.model_id / place.id))
    lines.append(release.about_examples)
    lines.append(f"model.jsonl has no layers and neuronsPerLayer: Neuronpedia must know {release.model_id} already")
    return lines


# --- reading ------------------------------------------------------------------------------------------------------


def _open(source: str, sae_id: str | None) -> _Release:
    saes = Repository(part_of_release(source, "saes"))
    config = saes.json("config.json") if "config.json" in saes.names() else None
    if not isinstance(config, dict) or "saes" not in config or "selected" not in config:
        raise InputError(f"{source} is not a release of safesail, which Neuronpedia's files are made from; give a run.")
    selected = {point: name for point, name in config["selected"].items() if sae_id in (None, point, name)}
    if not selected:
        known = ", ".join(config["selected"].values()) or "none"
        raise InputError(f"{source} has no selected SAE {sae_id!r}, and only these have neurons: {known}.")
    manifest = Manifest.parse(saes.json(MANIFEST), MANIFEST) if MANIFEST in saes.names() else None
    name = manifest.release if manifest else Path(source).resolve().name
    return _Release(
        name,
        (manifest.title if manifest else "") or name,
        manifest.repository if manifest and manifest.organization else None,
        config.get("base_model") or "unknown",
        selected,
        saes,
        NeuronDatabase.load(source),
        *_examples(source),
    )


def _examples(source: str) -> tuple[dict[str, list[Row]], str]:
    """The examples on which their neuron fires, strongest first, and a sentence on them."""
    try:
        rows = Repository(part_of_release(source, "examples"), "dataset").table("examples/train.parquet")
    except InputError as error:
        return {}, f"there are no activations: {error}"
    by_neuron: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: -row["activation"]):
        if max(row["activations"], default=0.0) > 0:  # a near-miss shows where it does not
            by_neuron.setdefault(row["neuron_id"], []).append(row)
    return by_neuron, "activations hold the texts of the examples, offensive ones among them, which the Hub would gate"


def _places(release: _Release) -> tuple[list[_Place], list[str]]:
    """The sources, and a sentence for each hook point that Neuronpedia has no name for."""
    places, left_out = [], []
    for hook_point, sae_id in release.selected.items():
        found = re.fullmatch(r"blocks\.(\d+)\.(\w+)", transformer_lens_name(hook_point))
        if found:
            set_name = re.sub(r"[^a-z0-9]+", "-", f"{release.name}-{_KINDS[found[2]]}".lower()).strip("-")
            places.append(_Place(release.model_id, set_name, int(found[1]), hook_point, sae_id))
        else:
            left_out.append(f"{hook_point} is left out: Neuronpedia names outputs of blocks, MLPs and attention only")
    return places, left_out


# --- metadata -----------------------------------------------------------------------------------------------------


def _write_config(release: _Release, folder: Path) -> None:
    """The types and models that explanations and scores refer to by name."""
    said = [row for by_language in release.database.explanations.values() for row in by_language.values()]
    scores = [row for rows in release.database.scores.values() for row in rows if not _reads_none(row)]
    kind = _named(release, EXPLANATION_TYPE, "An explanation in a release of safesail.", creator=True)
    explainers = sorted({row["explainer"] for row in said if row["explainer"]})
    simulators = sorted({row["simulator"] or _UNNAMED for row in scores})
    methods = sorted({row["method"] for row in scores})
    types = [_named(release, name, _SCORE, creator=True) for name in methods]
    _write_lines(folder / "explanation_type.jsonl", [kind])
    _write_lines(folder / "explanation_model_type.jsonl", [_named(release, name, _AS_NAMED) for name in explainers])
    _write_lines(folder / "explanation_score_type.jsonl", types)
    _write_lines(folder / "explanation_score_model.jsonl", [_named(release, name, _AS_NAMED) for name in simulators])


_SCORE = "Correlation of the activity that a simulator predicts from the explanation with the true activity."
_AS_NAMED = "As the release names it."
_UNNAMED = "not stated"
"""A score must name the model that made it."""


def _named(release: _Release, name: str, description: str, creator: bool = False) -> Row:
    row = {"name": name, "displayName": name, "description": description, "creatorName": release.name}
    return {**row, "creatorId": CREATOR} if creator else row


def _reads_none(score: Row) -> bool:
    """Whether the score is of a baseline, which reads no explanation."""
    return score["method"].endswith("/lexical")


def _write_metadata(release: _Release, place: _Place, folder: Path) -> None:
    """The rows of the release, the model, the set of sources and the source."""
    urls = [f"https://huggingface.co/{release.repository}"] if release.repository else []
    owner, _, _ = release.base_model.rpartition("/")
    by = (release.repository or "").partition("/")[0] or release.name
    where = {"modelId": place.model_id, "creatorId": CREATOR, "visibility": "PUBLIC"}
    about = {"name": release.name, "description": release.title, "creatorName": by, "creatorId": CREATOR, "urls": urls}
    model: Row = {"id": place.model_id, "displayName": release.base_model, "creatorId": CREATOR}
    group = {"name": place.set_name, "description": f"{release.title}: {place.hook_point}", "releaseName": release.name}
    source: Row = {"id": place.id, "setName": place.set_name, **where}
    if release.repository:
        source |= {"hfRepoId": release.repository, "hfFolderId": place.sae_id, "saelensSaeId": place.sae_id}
    _write_lines(folder / "release.jsonl", [about])
    _write_lines(folder / "model.jsonl", [{**model, "owner": owner} if owner else model])
    _write_lines(folder / "sourceset.jsonl", [{**group, "creatorName": by, "urls": urls, **where}])
    _write_lines(folder / "source.jsonl", [source])


# --- a source -----------------------------------------------------------------------------------------------------


def _write_source(release: _Release, place: _Place, folder: Path) -> str:
    """Write one SAE's features with all that is known of them; a line that counts them."""
    sae = Sae.from_pretrained(release.saes.source, place.sae_id)
    neurons = [release.database.neurons.get(f"{place.hook_point}/{j}") for j in range(sae.config.d_sae)]
    _write_metadata(release, place, folder)
    n_features = _write_batches(folder / "features", _features(release, place, sae))
    counts = {"explanations": 0, "scores": 0, "activations": 0}
    for first in range(0, sae.config.d_sae, BATCH):
        names = [row["neuron_id"] for row in neurons[first : first + BATCH] if row]
        batch = {
            "explanations": [row for name in names for row in _explanations(release, place, name)],
            "scores": [row for name in names for row in _scores(release, place, name)],
            "activations": [row for name in names for row in _activations(release, place, name)],
        }
        for kind, rows in batch.items():
            counts[kind] += len(rows)
            if rows:
                _write_batch(folder / kind / f"batch-{first // BATCH}.jsonl.gz", _same_columns(rows))
    shown = ", ".join(f"{n:,} {kind}" for kind, n in counts.items())
    return f"{place.model_id}/{place.id}: {place.sae_id}, {n_features:,} features, {shown}"


def _features(release: _Release, place: _Place, sae: Sae) -> Iterator[Row]:
    """A row of the table Neuron for every latent: its decoder row, and its statistics where all latents have them."""
    known = [release.database.quantiles.get(f"{place.hook_point}/{j}", {}) for j in range(sae.config.d_sae)]
    columns = {"firing_rate": "frac_nonzero", "max": "maxActApprox"}
    complete = {ours: name for ours, name in columns.items() if all(row.get(ours) is not None for row in known)}
    for j, statistics in enumerate(known):
        yield {
            **place.row,
            "index": str(j),
            "sourceSetName": place.set_name,
            "creatorId": CREATOR,
            **{name: statistics[ours] for ours, name in complete.items()},
            "hookName": transformer_lens_name(place.hook_point),
            "hasVector": True,
            "vector": _floats(sae.W_dec[j].float().numpy(force=True)),
        }


def _floats(values: Any) -> list[float]:
    """fp32 numbers in the fewest digits that give them back."""
    return [float(str(value)) for value in values]


def _explanations(release: _Release, place: _Place, name: str) -> Iterator[Row]:
    """A row of the table Explanation for every text of a neuron; what failed has none."""
    for language, said in release.database.explanations.get(name, {}).items():
        if said["explanation"]:
            yield {
                "id": _explanation_id(place, name, language),
                **place.row,
                "index": _index(name),
                "authorId": CREATOR,
                "description": said["explanation"],
                "typeName": EXPLANATION_TYPE,
                "explanationModelName": said["explainer"] or None,
                "notes": f"language: {language}",
            }


def _scores(release: _Release, place: _Place, name: str) -> Iterator[Row]:
    """A row of the table ExplanationScore for every score of an explanation; baselines read none and have no place.

    A score that names no language is given to the neuron's first explanation.
    """
    texts = [language for language, said in release.database.explanations.get(name, {}).items() if said["explanation"]]
    for score in release.database.scores.get(name, []):
        language = score["language"] or next(iter(texts), "")
        if score["score"] is None or language not in texts or _reads_none(score):
            continue
        details = {key: score[key] for key in _DETAILS if score.get(key) is not None}
        yield {
            "id": fingerprint(place.row, name, language, score["method"])[:24],
            "initiatedByUserId": CREATOR,
            "value": score["score"],
            "explanationId": _explanation_id(place, name, language),
            "explanationScoreTypeName": score["method"],
            "explanationScoreModelName": score["simulator"] or _UNNAMED,
            "jsonDetails": json.dumps(details, ensure_ascii=False),
        }


_DETAILS = (
    "low",
    "high",
    "auroc",
    "n_units",
    "n_active",
    "n_texts",
    "true_positives",
    "false_positives",
    "false_negatives",
    "true_negatives",
    "cost_usd",
)


def _activations(release: _Release, place: _Place, name: str) -> Iterator[Row]:
    """A row of the table Activation for every example of a neuron."""
    for number, example in enumerate(release.examples.get(name, [])):
        values = _rounded(example["activations"])
        largest = max(values)
        yield {
            "id": fingerprint(place.row, name, "example", number)[:24],
            **place.row,
            "index": _index(name),
            "creatorId": CREATOR,
            "dataSource": example["source"],
            "tokens": example["tokens"],
            "values": values,
            "maxValue": largest,
            "maxValueTokenIndex": values.index(largest),
            "minValue": min(values),
        }


def _rounded(values: list[float]) -> list[float]:
    """fp32 activations, which parquet gives back with the digits of fp64, to the digits they have."""
    return [float(f"{value:.7g}") for value in values]


def _explanation_id(place: _Place, name: str, language: str) -> str:
    return fingerprint(place.row, name, language)[:24]


def _index(name: str) -> str:
    return name.rpartition("/")[2]


# --- files --------------------------------------------------------------------------------------------------------


def _same_columns(rows: list[Row]) -> list[Row]:
    """The rows without the columns that are null in all of them."""
    return [{key: value for key, value in row.items() if any(r[key] is not None for r in rows)} for row in rows]


def _write_batches(folder: Path, rows: Iterable[Row]) -> int:
    """Write rows into batch-0, batch-1, … and count them."""
    rows, n = iter(rows), 0
    while batch := list(islice(rows, BATCH)):
        _write_batch(folder / f"batch-{n // BATCH}.jsonl.gz", batch)
        n += len(batch)
    return n


def _write_batch(path: Path, rows: list[Row]) -> None:
    """Write gzipped jsonl whose bytes depend on the rows alone: no time and no file name in the header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode(), mtime=0))


def _write_lines(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
