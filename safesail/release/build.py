"""The release: one folder per Hub repository, holding exactly what is uploaded.

Reads the results of all stages. Writes `saes/`, `neurons/`, `examples/` and `inspector/` into the run folder. Nothing
in them depends on the clock or on how often the run was interrupted, so the same recipe gives the same bytes.
"""

import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
from torch import Tensor

from safesail import __version__
from safesail.assets import asset
from safesail.interpretation.collect import EXAMPLE_SCHEMA
from safesail.metrics import DEFINITIONS
from safesail.release.cards import repository, write_cards
from safesail.release.curve import curve_svg
from safesail.release.diagnoses import gather, write_diagnoses
from safesail.release.facts import Facts, flat_fidelity
from safesail.release.landscape import landscape
from safesail.release.manifest import write_manifest
from safesail.release.tables import neuron_rows, write_neurons, write_table
from safesail.run import PARTS, Run, StageWork, write_json
from safesail.sae import model as sae_files
from safesail.taxonomy import Taxonomy
from safesail.training.fidelity import firing_rates

__all__ = ["build_stage", "copy_space"]

Row = dict[str, Any]
_CONTRAST = (
    "i_cdf",
    "i_cdf_low",
    "i_cdf_high",
    "i_cdf_swapped",
    "i_cdf_null",
    "i_cdf_null_high",
    "i_cdf_p",
    "above_null",
    "above_null_low",
    "above_null_high",
    "as_good_as_best",
    "l0_t",
    "l0_t_null",
)


def build_stage(run: Run, taxonomy: Taxonomy, work: StageWork) -> None:
    """Make the release's folders beside the old ones, then swap them in."""
    facts = Facts(run)
    normalisers = {row["neuron_id"]: row["normaliser"] for row in facts.statistics}
    diagnoses = gather(run.scratch / "diagnosis", normalisers, lambda: _identity(run, facts))
    for part in PARTS:
        shutil.rmtree(work.folder / part, ignore_errors=True)
        (work.folder / part).mkdir()
    decoders = _saes(run, facts, work.folder / "saes")
    rows = neuron_rows(facts, taxonomy)
    _lay_out(decoders, rows, run.recipe.seed, work.folder / "neurons")
    write_neurons(facts, rows, work.folder / "neurons")
    _examples(facts, work.folder / "examples")
    write_diagnoses(diagnoses, work.folder / "examples", repository(facts.recipe))
    copy_space(work.folder / "inspector")
    write_cards(facts.recipe, facts, rows, taxonomy, work.folder)
    publish = run.recipe.publish
    for part in PARTS:
        gated = publish.gate if part == "examples" else None
        title = publish.title or run.recipe.name
        write_manifest(work.folder / part, part, run.recipe.name, publish.organization, title, publish.version, gated)
    for part in PARTS:
        shutil.rmtree(run.part(part), ignore_errors=True)
        (work.folder / part).rename(run.part(part))
    work.facts["n_neurons"] = len(rows)
    work.facts["n_tagged"] = sum(bool(row["domains"]) for row in rows)
    if diagnoses:
        work.facts["n_diagnoses"] = len(diagnoses)


def _saes(run: Run, facts: Facts, folder: Path) -> dict[str, Tensor]:
    """Write every SAE of the sweep with its metrics, and the manifest that marks the selected ones.

    Gives {hook point: the selected one's W_dec, (d_sae, d_in)}.
    """
    trained, measured = run.result("train"), run.result("eval")
    saes, decoders = [], {}
    for row in facts.curve:
        sae_id = row["sae_id"]
        sae = sae_files.read(trained / sae_id)
        sae.save(folder / sae_id, firing_rates(measured, sae_id))
        if row["selected"]:
            decoders[sae.config.hook_point] = sae.W_dec
        published = (*flat_fidelity(facts.fidelity[sae_id]), *_CONTRAST)
        metrics = {name: row[name] for name in published}
        write_json(folder / sae_id / "metrics.json", {"definitions": DEFINITIONS, "metrics": metrics})
        saes.append({"id": sae_id, "selected": row["selected"], **metrics})
    (folder / "curve.svg").write_text(curve_svg(facts.curve), encoding="utf-8")
    model, harvest = facts.recipe.model, facts.records["harvest"]
    write_json(
        folder / "config.json",
        {
            "schema": 1,
            "safesail_version": __version__,
            "base_model": model.name,
            "base_model_revision": model.revision,
            "base_model_note": model.note,
            "tokenizer_hash": harvest["tokenizer_hash"],
            "selected": facts.selection["selected"],
            "selected_by": facts.selection["options"],
            "saes": saes,
            "definitions": DEFINITIONS,
        },
    )
    return decoders


def _identity(run: Run, facts: Facts) -> dict[str, str]:
    """{hook point: which SAE is selected there}."""
    trained, selected = run.result("train"), facts.selection["selected"]
    return {name: sae_files.read(trained / sae_id).identity for name, sae_id in selected.items()}


def _lay_out(decoders: dict[str, Tensor], rows: list[Row], seed: int, folder: Path) -> None:
    """Give the rows of the main table their places on the landscape, and say by which method."""
    plane = landscape([decoders[row["hook_point"]][row["latent"]] for row in rows], seed)
    for row, place in zip(rows, plane.places, strict=True):
        row["x"], row["y"] = place or (None, None)
    write_json(folder / "landscape.json", plane.facts)


def _examples(facts: Facts, folder: Path) -> None:
    """The collected examples without the columns that only the stages use."""
    schema = pa.schema([field for field in EXAMPLE_SCHEMA if field.name not in ("document", "piece", "peak")])
    rows = [{name: row[name] for name in schema.names} for row in facts.examples]
    write_table(folder / "examples/train.parquet", rows, schema)


def copy_space(folder: Path) -> None:
    """The Space's files, as they are in `space/`."""
    for source in sorted(asset("space").rglob("*")):
        if source.is_file() and "__pycache__" not in source.parts:
            target = folder / source.relative_to(asset("space"))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
