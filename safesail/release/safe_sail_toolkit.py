"""The released Safe-SAIL toolkit as the `neurons` folder of a release of ours.

Reads `en_db.json`, `cn_db.json`, `indices_layer<L>.pt` and `quantile_layer<L>.pt`, whichever are there, in the folder
itself or anywhere below it. Writes `neurons/`. Its SAE checkpoints are a format of SAEs like any other
(`sae.formats.safe_sail`).
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from safesail import __version__
from safesail.errors import InputError
from safesail.recipe import PublishSection
from safesail.release import tables
from safesail.release.cards import render
from safesail.release.manifest import write_manifest
from safesail.release.safe_sail_tables import N_STORED, N_TOKENS, Entry, Tables, statistics_row
from safesail.release.summary import markdown, score_bands
from safesail.repository import Repository
from safesail.run import write_json
from safesail.sae.formats import archive

__all__ = ["LICENCE", "Toolkit", "neuron_lines", "write_neurons"]

Row = dict[str, Any]
LICENCE = "mit"
"""As the toolkit's repository states."""
D_SAE = 20_480
LANGUAGES = {"en": "en_db.json", "zh": "cn_db.json"}
_SCHEMAS = {
    "neurons": tables.NEURONS,
    "explanations": tables.EXPLANATIONS,
    "scores": tables.SCORES,
    "quantiles": tables.QUANTILES,
    "candidates": tables.CANDIDATES,
}
_ABOUT = {
    "neurons": ("a neuron with an explanation or a score", "explanation, domains, score, status, q999, neuron_id"),
    "explanations": ("neuron × language (the splits: {languages})", "explanation, status, detail"),
    "scores": ("a neuron's score", "score, method, status"),
    "quantiles": ("a latent of the databases and lists", "n_tokens, firing_rate, p50 … p9999, max, normaliser"),
    "candidates": ("a latent of the source's index lists", "n_lists, n_entries, explained"),
}


class Toolkit(NamedTuple):
    """The files of the toolkit that a folder or repository holds."""

    repository: Repository
    databases: dict[str, str]
    """{language: file name}."""
    indices: dict[int, str]
    """{layer: file name}."""
    quantiles: dict[int, str]
    has_checkpoints: bool
    licence_file: str | None

    @classmethod
    def find(cls, repository: Repository, names: list[str]) -> "Toolkit | None":
        """The toolkit in a repository, recognised by its neuron database; None where there is none."""
        by_base = _by_base(names)
        databases = {language: by_base[base] for language, base in LANGUAGES.items() if base in by_base}
        if not databases:
            return None
        return cls(
            repository,
            databases,
            _by_layer(by_base, "indices"),
            _by_layer(by_base, "quantile"),
            bool(_by_layer(by_base, "ckpt")),
            by_base.get("LICENSE"),
        )

    def tables(self) -> "Tables":
        """Everything the files say, as rows of our tables."""
        said = {language: self._database(name) for language, name in self.databases.items()}
        lists = {layer: self._index_list(name) for layer, name in self.indices.items()}
        statistics: list[Row] = []
        left_out: dict[str, str] = {}
        n_apart = 0
        for layer, name in self.quantiles.items():
            if layer not in lists:
                left_out[name] = f"no indices_layer{layer}.pt says which latents its columns are"
                continue
            rows, apart = self._statistics(layer, name, lists[layer])
            statistics, n_apart = statistics + rows, n_apart + apart
        return Tables.of(said, lists, statistics, left_out, n_apart)

    def _database(self, name: str) -> "dict[str, Entry]":
        content = self.repository.json(name)
        if not isinstance(content, dict) or not content:
            raise InputError(f"{self.repository.source}/{name} is not Safe-SAIL's neuron database: no JSON object.")
        return {_checked_key(key, name): Entry.parse(key, value, name) for key, value in content.items()}

    def _index_list(self, name: str) -> list[int]:
        value = archive.loaded(self.repository.file(name))
        if not isinstance(value, Tensor) or value.dim() != 1 or value.is_floating_point():
            raise InputError(f"{name} is not a list of latents: one tensor of whole numbers is expected.")
        latents = value.tolist()
        outside = [latent for latent in latents if not 0 <= latent < D_SAE]
        if outside:
            raise InputError(f"{name} holds the number {outside[0]}; latents are 0 to {D_SAE - 1}.")
        return latents

    def _statistics(self, layer: int, name: str, latents: list[int]) -> tuple[list[Row], int]:
        """The rows of `quantiles` of one layer, and how many repeated columns differ from the first of their latent."""
        found = archive.tensors(self.repository.file(name), wanted=lambda key: key == "top_neuron_activations")
        top = found.get("top_neuron_activations")
        if top is None or tuple(top.shape) != (N_STORED, len(latents)):
            shape = "not there" if top is None else tuple(top.shape)
            raise InputError(
                f"{name}: top_neuron_activations is {shape}, and {(N_STORED, len(latents))} is expected: a column for "
                f"each of the {len(latents)} entries of indices_layer{layer}.pt; the two files do not belong together."
            )
        top = top.float()
        if not bool(torch.isfinite(top).all()) or bool((top < 0).any()):
            raise InputError(f"{name} holds negative or not finite activations, which no ReLU gives; it is damaged.")
        top = top.sort(dim=0).values  # the reference takes the file's order for ascending, and errs where it is not
        first: dict[int, int] = {}
        for position, latent in enumerate(latents):
            first.setdefault(latent, position)
        apart = sum(not torch.equal(top[:, first[j]], top[:, i]) for i, j in enumerate(latents) if i != first[j])
        return [statistics_row(layer, latent, top[:, first[latent]]) for latent in sorted(first)], apart


# --- writing ------------------------------------------------------------------------------------------------------


def write_neurons(toolkit: Toolkit, found: Tables, folder: Path, release: str) -> None:
    """The `neurons` folder of a release: every table with its schema, the card and the manifest."""
    configs = []
    for name, splits in _splits(found).items():
        for split, rows in splits.items():
            tables.write_table(folder / name / f"{split}.parquet", rows, _SCHEMAS[name])
        paths = [{"split": split, "path": f"{name}/{split}.parquet"} for split in splits]
        configs.append({"config_name": name, "data_files": paths})
    configs[0]["default"] = True
    write_json(folder / "languages.json", list(found.explanations))
    if toolkit.licence_file:
        shutil.copyfile(toolkit.repository.file(toolkit.licence_file), folder / "LICENSE")
    card = render("converted_neurons.md", **_facts(toolkit, found, release, configs))
    (folder / "README.md").write_text(card, encoding="utf-8")
    write_manifest(folder, "neurons", release, "", f"{release}: neurons", PublishSection().version, None)


def neuron_lines(found: Tables) -> list[str]:
    """What the conversion prints of the neurons."""
    n_tagged = sum(bool(row["domains"]) for row in found.neurons)
    domains = ", ".join(f"{domain} {n:,}" for domain, n in found.n_by_domain.items())
    states = ", ".join(f"{status} {n:,}" for status, n in found.n_by_status.items())
    n_entries = sum(row["n_entries"] for row in found.candidates)
    lines = [
        f"neurons: {len(found.neurons):,}, of them {n_tagged:,} with a domain ({domains}); {states}",
        f"candidates: {len(found.candidates):,} latents in {n_entries:,} entries",
        f"quantiles: of {found.n_measured:,} latents",
    ]
    return lines + [f"{name} is left out: {reason}" for name, reason in found.left_out.items()]


def _splits(found: Tables) -> dict[str, dict[str, list[Row]]]:
    """{config: {split: rows}} of what there is, the default config first."""
    configs = {
        "neurons": {"train": found.neurons},
        "explanations": found.explanations,
        "scores": {"train": found.scores},
        "quantiles": {"train": found.quantiles},
        "candidates": {"train": found.candidates},
    }
    return {name: splits for name, splits in configs.items() if any(splits.values())}


def _facts(toolkit: Toolkit, found: Tables, release: str, configs: list[Row]) -> Row:
    """What the card may print."""
    scores = [row["score"] for row in found.neurons if row["score"] is not None]
    example, languages = found.neurons[0], list(found.explanations)
    folder = toolkit.repository.folder
    return {
        "title": f"{release}: neurons",
        "front_matter": _front(release, languages, configs),
        "source": folder.resolve().name if folder else toolkit.repository.source,
        "version": __version__,
        "has_licence_file": toolkit.licence_file is not None,
        "example": example | {"short": f"{example['layer']}_{example['latent']}"},
        "configs": [_about(config["config_name"], languages) for config in configs],
        "n_neurons": len(found.neurons),
        "n_tagged": sum(bool(row["domains"]) for row in found.neurons),
        "domains": found.n_by_domain,
        "language_table": markdown(*_language_table(found)),
        "score_table": markdown(["score", "neurons"], [[band, str(n)] for band, n in score_bands(found.neurons)]),
        "n_masked": found.n_by_status.get("masked", 0),
        "n_fallen_back": found.n_fallen_back,
        "lowest": min(scores, default=None),
        "has_candidates": bool(found.candidates),
        "has_quantiles": found.n_measured > 0,
        "n_tokens": N_TOKENS,
        "n_stored": N_STORED,
        "n_columns_apart": found.n_columns_apart,
        "left_out": found.left_out,
    }


def _about(config: str, languages: list[str]) -> tuple[str, str, str]:
    """The card's row on a config."""
    row, columns = _ABOUT[config]
    return config, row.format(languages=", ".join(languages)), columns


def _language_table(found: Tables) -> tuple[list[str], list[list[str]]]:
    """Per language how many texts there are, are masked and are absent."""
    statuses = ("ok", "masked", "absent")
    cells = [
        [language, str(len(rows)), *(str(sum(row["status"] == status for row in rows)) for status in statuses)]
        for language, rows in found.explanations.items()
    ]
    return ["language", "entries", *statuses], cells


def _front(release: str, languages: list[str], configs: list[Row]) -> str:
    from huggingface_hub import DatasetCardData

    return DatasetCardData(
        language=languages,
        license=LICENCE,
        pretty_name=f"{release}: neurons",
        tags=["sparse-autoencoder", "interpretability", "safety"],
        configs=configs,
    ).to_yaml()


# --- names --------------------------------------------------------------------------------------------------------


def _by_base(names: list[str]) -> dict[str, str]:
    """{file name without folders: file name}, of the toolkit's files; InputError where one is there twice."""
    wanted = re.compile(r"en_db\.json|cn_db\.json|LICENSE|(indices|quantile|ckpt)_layer\d+\.pt")
    found: dict[str, str] = {}
    for name in names:
        base = name.rpartition("/")[2]
        if wanted.fullmatch(base) and base != "LICENSE" and base in found:
            raise InputError(f"{base} is there twice, as {found[base]} and as {name}; leave one of them.")
        if wanted.fullmatch(base):
            found.setdefault(base, name)
    return found


def _by_layer(by_base: dict[str, str], kind: str) -> dict[int, str]:
    """{layer: file name} of the files `<kind>_layer<L>.pt`, in ascending order."""
    found = ((re.fullmatch(rf"{kind}_layer(\d+)\.pt", base), name) for base, name in by_base.items())
    return dict(sorted((int(match[1]), name) for match, name in found if match))


def _checked_key(key: str, origin: str) -> str:
    found = re.fullmatch(r"(\d+)_(\d+)", key)
    if not found or int(found[2]) >= D_SAE:
        raise InputError(f"{origin}: {json.dumps(key)} is not a layer and a latent below {D_SAE}, as 17_4521.")
    return f"{int(found[1])}_{int(found[2])}"
