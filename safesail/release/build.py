"""The release: one folder per Hub repository, holding exactly what is uploaded.

Reads the results of all stages. Writes `saes/`, `neurons/`, `examples/` and `inspector/` into the run folder. Nothing
in them depends on the clock or on how often the run was interrupted, so the same recipe gives the same bytes.
"""

import re
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from safesail import __version__
from safesail.assets import asset
from safesail.interpretation.collect import EXAMPLE_SCHEMA
from safesail.interpretation.explain import load as load_explanations
from safesail.lm.activations import Activations
from safesail.metrics import DEFINITIONS
from safesail.release.cards import write_cards
from safesail.run import PARTS, Run, StageWork, write_json
from safesail.sae import model as sae_files
from safesail.taxonomy import Taxonomy
from safesail.training.fidelity import FIDELITY, firing_rates

__all__ = ["build_stage", "flat_fidelity", "redacted"]

Row = dict[str, Any]


def build_stage(run: Run, taxonomy: Taxonomy, work: StageWork) -> None:
    """Make the release's folders beside the old ones, then swap them in."""
    facts = _Facts(run)
    for part in PARTS:
        shutil.rmtree(work.folder / part, ignore_errors=True)
        (work.folder / part).mkdir()
    _saes(run, facts, work.folder / "saes")
    rows = neuron_rows(facts, taxonomy)
    _neurons(facts, rows, work.folder / "neurons")
    _examples(facts, work.folder / "examples")
    _inspector(work.folder / "inspector")
    write_cards(run.recipe, facts, rows, taxonomy, work.folder)
    for part in PARTS:
        shutil.rmtree(run.part(part), ignore_errors=True)
        (work.folder / part).rename(run.part(part))
    work.facts["n_neurons"] = len(rows)
    work.facts["n_tagged"] = sum(bool(row["domains"]) for row in rows)


class _Facts:
    """The results of all stages, read once."""

    def __init__(self, run: Run) -> None:
        self.recipe = run.recipe
        self.fidelity: dict[str, Row] = run.json_of("eval", "fidelity.json")
        self.selection: dict[str, Any] = run.json_of("select", "selection.json")
        self.statistics = run.table_of("collect", "statistics.parquet")
        self.examples = run.table_of("collect", "examples.parquet")
        self.explanations, self.tags = load_explanations(run.result("explain"))
        self.scores = run.table_of("score", "scores.parquet")
        self.records = {name: run.record(name) or {} for name in ("harvest", "train", "eval", "explain", "score")}
        self.activations = Activations(run.result("harvest"))

    @property
    def curve(self) -> list[Row]:
        """One row per SAE of the sweep: its fidelity, its concept contrast, and whether it was selected."""
        selected = self.selection["selected"].values()
        return [
            {
                "sae_id": sae_id,
                "selected": sae_id in selected,
                **flat_fidelity(numbers),
                **self.selection["curve"][sae_id],
            }
            for sae_id, numbers in self.fidelity.items()
        ]


def flat_fidelity(numbers: Row) -> Row:
    """An entry of fidelity.json as plain numbers: each metric is followed by the ends of its interval."""
    flat: Row = {}
    for name, value in numbers.items():
        if name not in ("intervals", "definitions"):
            flat[name] = value
        if name in numbers["intervals"]:
            flat[f"{name}_low"], flat[f"{name}_high"] = numbers["intervals"][name]
    return flat


def neuron_rows(facts: Any, taxonomy: Taxonomy) -> list[Row]:
    """One row per explained latent: the joined view that people meet first, best score first."""
    statistics = {row["neuron_id"]: row for row in facts.statistics}
    first = facts.recipe.score.simulators[0]
    score_of = {row["neuron_id"]: row for row in facts.scores if row["method"].endswith(f"/{first}")}
    lexical = {row["neuron_id"]: row for row in facts.scores if row["method"].endswith("/lexical")}
    snippets = _snippets(facts.examples, taxonomy)
    rows = []
    for explanation in facts.explanations:
        name = explanation["neuron_id"]
        stats, tag, score = statistics[name], facts.tags[name], score_of[name]
        rows.append(
            {
                "explanation": explanation["explanation"],
                "domains": tag["domains"],
                "category": tag["category"],
                "concept": tag["concept"],
                "score": score["score"],
                "score_low": score["low"],
                "score_high": score["high"],
                "lexical_score": lexical[name]["score"] if name in lexical else None,
                "status": explanation["status"] if explanation["status"] != "ok" else score["status"],
                "firing_rate": stats["firing_rate"],
                "q999": stats["p999"],
                "max_activation": stats["max"],
                "snippet": snippets.get(name, ""),
                "neuron_id": name,
                "hook_point": stats["hook_point"],
                "layer": _layer(stats["hook_point"]),
                "latent": stats["latent"],
                "candidate_for": tag["candidate_for"],
                "n_wins": tag["n_wins"],
                "p_value": tag["p_value"],
                "explainer": explanation["explainer"],
                "simulator": f"{score['method']} ({score['simulator']})",
                "tagger": tag["tagger"],
            }
        )
    return sorted(rows, key=lambda row: (-(row["score"] if row["score"] is not None else -2), row["neuron_id"]))


def redacted(text: str, taxonomy: Taxonomy) -> str:
    """The text with every word of the taxonomy's word lists cut to its first letter, for the open data set."""
    for domain in taxonomy.domains:
        text = taxonomy.about(domain.id).sub(lambda found: _masked(found.group(0)), text)
    return text


def _masked(words: str) -> str:
    return re.sub(r"(\w)\w*", r"\1***", words)


def _snippets(examples: list[Row], taxonomy: Taxonomy) -> dict[str, str]:
    """A few redacted words around each neuron's strongest explain-half peak, the peak's own word masked too."""
    snippets: dict[str, str] = {}
    for row in examples:
        if row["neuron_id"] not in snippets and row["half"] == "explain" and row["rank"] == 0:
            snippets[row["neuron_id"]] = _snippet(row["tokens"], row["peak"], taxonomy)
    return snippets


def _snippet(tokens: list[str], peak: int, taxonomy: Taxonomy) -> str:
    """Whole words only: a context may begin and end inside a word, so its first and last words are left out."""
    text, before = "".join(tokens), "".join(tokens[:peak])
    blank = len(tokens[peak]) - len(tokens[peak].lstrip())
    at = max(len(text[: len(before) + blank + 1].split()) - 1, 0)  # the number of the peak's word
    words = redacted(text, taxonomy).split()  # masking keeps the white space, so the numbers stay
    if not words:
        return ""
    at = min(at, len(words) - 1)
    shown = [*words[max(at - 4, 1) : at], _masked(words[at]), *words[at + 1 : min(at + 4, len(words) - 1)]]
    return " ".join(["…", *shown, "…"])


def _saes(run: Run, facts: _Facts, folder: Path) -> None:
    """Every SAE of the sweep with its metrics, and the manifest that marks the selected ones."""
    trained, measured = run.result("train"), run.result("eval")
    saes = []
    for row in facts.curve:
        sae_id = row["sae_id"]
        sae_files.read(trained / sae_id).save(folder / sae_id, firing_rates(measured, sae_id))
        published = (*flat_fidelity(facts.fidelity[sae_id]), "i_cdf", "i_cdf_swapped", "l0_t")
        metrics = {name: row[name] for name in published}
        write_json(folder / sae_id / "metrics.json", {"definitions": DEFINITIONS, "metrics": metrics})
        saes.append({"id": sae_id, "selected": row["selected"], **metrics})
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
            "saes": saes,
            "definitions": DEFINITIONS,
        },
    )


def _neurons(facts: _Facts, rows: list[Row], folder: Path) -> None:
    _table(folder / "neurons/train.parquet", rows, _NEURON_SCHEMA)
    languages = list(dict.fromkeys(row["language"] for row in facts.explanations))
    for language in languages:
        mine = [row for row in facts.explanations if row["language"] == language]
        _table(folder / f"explanations/{language}.parquet", mine)
    write_json(folder / "languages.json", languages)
    _table(folder / "scores/train.parquet", facts.scores)
    _table(folder / "quantiles/train.parquet", facts.statistics)
    curve = [{**row, **{f"l0_t_{t}": value for t, value in row["l0_t"].items()}} for row in facts.curve]
    _table(folder / "selection/train.parquet", curve, _selection_schema(list(facts.curve[0]["l0_t"])))


def _selection_schema(thresholds: list[str]) -> pa.Schema:
    numbers = [f"{name}{end}" for name in FIDELITY for end in ("", "_low", "_high")]
    numbers += ["i_cdf", "i_cdf_swapped", *(f"l0_t_{t}" for t in thresholds)]
    settings = [
        ("sae_id", pa.string()),
        ("selected", pa.bool_()),
        ("architecture", pa.string()),
        ("k", pa.int32()),
        ("coefficient", pa.float64()),
    ]
    return pa.schema([*settings, *((name, pa.float64()) for name in numbers)])


def _examples(facts: _Facts, folder: Path) -> None:
    """The collected examples without the columns that only the stages use."""
    schema = pa.schema([field for field in EXAMPLE_SCHEMA if field.name not in ("document", "piece", "peak")])
    rows = [{name: row[name] for name in schema.names} for row in facts.examples]
    _table(folder / "examples/train.parquet", rows, schema)


def _inspector(folder: Path) -> None:
    """The Space's files, as they are in `space/`."""
    for source in sorted(asset("space").rglob("*")):
        if source.is_file() and "__pycache__" not in source.parts:
            target = folder / source.relative_to(asset("space"))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


def _table(path: Path, rows: list[Row], schema: pa.Schema | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)


def _layer(hook_point: str) -> int | None:
    numbers = [part for part in hook_point.split(".") if part.isdigit()]
    return int(numbers[0]) if numbers else None


_NEURON_SCHEMA = pa.schema(
    [
        ("explanation", pa.string()),
        ("domains", pa.list_(pa.string())),
        ("category", pa.string()),
        ("concept", pa.string()),
        ("score", pa.float64()),
        ("score_low", pa.float64()),
        ("score_high", pa.float64()),
        ("lexical_score", pa.float64()),
        ("status", pa.string()),
        ("firing_rate", pa.float64()),
        ("q999", pa.float64()),
        ("max_activation", pa.float64()),
        ("snippet", pa.string()),
        ("neuron_id", pa.string()),
        ("hook_point", pa.string()),
        ("layer", pa.int16()),
        ("latent", pa.int32()),
        ("candidate_for", pa.list_(pa.string())),
        ("n_wins", pa.int32()),
        ("p_value", pa.float64()),
        ("explainer", pa.string()),
        ("simulator", pa.string()),
        ("tagger", pa.string()),
    ]
)
