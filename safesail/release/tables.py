"""The tables of the neurons data set: their columns, and the joined view that people meet first.

Every file has an explicit schema, so that a column that is empty in one split or release keeps its type.
"""

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from safesail.interpretation.score import method_name
from safesail.release.facts import Facts
from safesail.release.redaction import snippets_of
from safesail.run import write_json
from safesail.taxonomy import Taxonomy
from safesail.training.fidelity import FIDELITY

__all__ = [
    "CANDIDATES",
    "EXPLANATIONS",
    "NEURONS",
    "PAIRS",
    "QUANTILES",
    "SCORES",
    "contrast_schema",
    "neuron_rows",
    "selection_schema",
    "split_name",
    "write_neurons",
    "write_table",
]

Row = dict[str, Any]


def write_neurons(facts: Facts, rows: list[Row], folder: Path) -> None:
    """Write every config of the data set below `folder`. rows: of the main table, by `neuron_rows`."""
    write_table(folder / "neurons/train.parquet", rows, NEURONS)
    for language in facts.languages:
        mine = [row for row in facts.explanations if row["language"] == language]
        write_table(folder / f"explanations/{language}.parquet", mine, EXPLANATIONS)
    write_json(folder / "languages.json", facts.languages)
    write_table(folder / "scores/train.parquet", facts.scores, SCORES)
    write_table(folder / "quantiles/train.parquet", facts.statistics, QUANTILES)
    curve = [row | _by_threshold(row) for row in facts.curve]
    write_table(folder / "selection/train.parquet", curve, selection_schema(facts.thresholds))
    write_table(folder / "contrast/train.parquet", facts.contrast, contrast_schema(facts.thresholds))
    pairs = [pair.model_dump(by_alias=True) for pair in facts.pairs]  # `with` and `without`, as in the file
    write_table(folder / "pairs/train.parquet", pairs, PAIRS)


def write_table(path: Path, rows: list[Row], schema: pa.Schema) -> None:
    """Write rows as parquet; columns that the schema does not name are left out, those a row lacks are null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(path, schema) as writer:
        if rows:  # load_dataset cannot read a row group without rows
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))


def split_name(language: str) -> str:
    """The data set's split of a language: `zh_Hant` for zh-Hant, since split names hold no hyphen."""
    return language.replace("-", "_")


# --- the main table -----------------------------------------------------------------------------------------------


def neuron_rows(facts: Facts, taxonomy: Taxonomy) -> list[Row]:
    """One row per neuron that was asked about: the joined view, best score first.

    Explanation and confidence are in the first language that is scored; the score is that of the recipe's first method
    in this language, and the lexical baseline's is at the same level.
    """
    statistics = {row["neuron_id"]: row for row in facts.statistics}
    first, baseline = _methods(facts)
    scored, lexical = _scores_of(facts, first), _scores_of(facts, baseline)
    spent, snippets = _spent(facts), snippets_of(facts.examples, taxonomy)
    rows = []
    for explanation in facts.explanations:
        if explanation["language"] == facts.language:
            name = explanation["neuron_id"]
            known = {**_said(explanation), **_tagged(facts.tags[name]), **_measured(statistics[name])}
            known |= _scored(explanation, scored.get(name), first) | spent[name]
            lexical_score = lexical[name]["score"] if name in lexical else None
            rows.append({**known, "lexical_score": lexical_score, "snippet": snippets.get(name, "")})
    return sorted(rows, key=lambda row: (-(row["score"] if row["score"] is not None else -2), row["neuron_id"]))


def _methods(facts: Facts) -> tuple[str, str]:
    """The names of the recipe's first method, and of the lexical baseline that predicts the same units."""
    section = facts.recipe.score
    first = section.methods[0]
    baseline = f"{first.partition('-')[0]}-lexical"
    return method_name(first, section.segment_tokens), method_name(baseline, section.segment_tokens)


def _scores_of(facts: Facts, method: str) -> dict[str, Row]:
    languages = ("", facts.language)
    rows = (row for row in facts.scores if row["method"] == method and row["language"] in languages)
    return {row["neuron_id"]: row for row in rows}


def _said(explanation: Row) -> Row:
    return {name: explanation[name] for name in ("neuron_id", "explanation", "confidence", "explainer")}


def _tagged(tag: Row) -> Row:
    names = ("domains", "category", "concept", "candidate_for", "n_wins", "p_value", "q_value", "tagger")
    return {name: tag[name] for name in names}


def _measured(statistics: Row) -> Row:
    return {
        "firing_rate": statistics["firing_rate"],
        "q999": statistics["p999"],
        "max_activation": statistics["max"],
        "hook_point": statistics["hook_point"],
        "layer": _layer(statistics["hook_point"]),
        "latent": statistics["latent"],
    }


def _scored(explanation: Row, score: Row | None, method: str) -> Row:
    """The score and how it ended; a neuron without an explanation ends as its explanation did."""
    failed = explanation["status"] != "ok"
    assert failed or score is not None, f"{explanation['neuron_id']} is explained and has no score by {method}"
    known = score or {"score": None, "low": None, "high": None, "simulator": ""}
    return {
        "score": known["score"],
        "score_low": known["low"],
        "score_high": known["high"],
        "status": explanation["status"] if failed or score is None else score["status"],
        "simulator": f"{method} ({known['simulator']})" if known["simulator"] else method,
    }


def _spent(facts: Facts) -> dict[str, Row]:
    """{neuron id: the tokens and the price of its explanations and scores}; no price where one of them has none."""
    nothing: Row = {"prompt_tokens": 0, "completion_tokens": 0, "cost_usd": 0.0}
    spent: dict[str, Row] = {}
    for row in [*facts.explanations, *facts.scores]:
        sums = spent.setdefault(row["neuron_id"], dict(nothing))
        sums["prompt_tokens"] += row["prompt_tokens"]
        sums["completion_tokens"] += row["completion_tokens"]
        sums["cost_usd"] = _sum(sums["cost_usd"], row["cost_usd"])
    return spent


def _sum(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else one + other


def _layer(hook_point: str) -> int | None:
    numbers = [part for part in hook_point.split(".") if part.isdigit()]
    return int(numbers[0]) if numbers else None


# --- columns ------------------------------------------------------------------------------------------------------


def _by_threshold(row: Row) -> Row:
    """The columns `l0_t_<t>` and `l0_t_<t>_null` of a row of the curve."""
    found = {f"l0_t_{t}": value for t, value in row["l0_t"].items()}
    return found | {f"l0_t_{t}_null": value for t, value in row["l0_t_null"].items()}


def _schema(names: str) -> pa.Schema:
    """The columns of these names, parted by blanks; a column has one type wherever it stands, most are numbers."""
    types = {name: kind for kind, columns in _TYPES.items() for name in columns.split()}
    return pa.schema([(name, types.get(name, pa.float64())) for name in names.split()])


def selection_schema(thresholds: list[str]) -> pa.Schema:
    """Columns of the `selection` table, two for each threshold of L_{0,t}."""
    fidelity = " ".join(f"{name}{end}" for name in FIDELITY for end in ("", "_low", "_high"))
    settings = "sae_id selected as_good_as_best architecture k coefficient"
    contrast = f"{_I_CDF} i_cdf_swapped above_null_low above_null_high"
    return _schema(f"{settings} {fidelity} {contrast} {_l0_t(thresholds)}")


def contrast_schema(thresholds: list[str]) -> pa.Schema:
    """Columns of the `contrast` table, two for each threshold of L_{0,t}."""
    settings = "sae_id selected grouping group n_pairs reduction activity_quantile"
    return _schema(f"{settings} {_I_CDF} {_l0_t(thresholds)}")


def _l0_t(thresholds: list[str]) -> str:
    return " ".join(f"l0_t_{t} l0_t_{t}_null" for t in thresholds)


_TYPES = {
    pa.string(): "explanation category concept status snippet neuron_id hook_point explainer simulator tagger language "
    "detail prompt_hash method sae_id architecture grouping group reduction id domain with without",
    pa.list_(pa.string()): "domains candidate_for",
    pa.list_(pa.int64()): "histogram",
    pa.bool_(): "selected as_good_as_best explained",
    pa.int16(): "layer",
    pa.int32(): "latent n_wins prompt_tokens completion_tokens n_units n_active n_texts true_positives false_positives "
    "false_negatives true_negatives k n_pairs n_lists n_entries",
    pa.int64(): "n_tokens",
}
_I_CDF = "i_cdf i_cdf_low i_cdf_high i_cdf_null i_cdf_null_high i_cdf_p above_null"
_SPENT = "prompt_tokens completion_tokens cost_usd"
NEURONS = _schema(
    "explanation domains category concept score score_low score_high lexical_score confidence status firing_rate q999 "
    "max_activation snippet neuron_id hook_point layer latent x y candidate_for n_wins p_value q_value explainer "
    f"simulator tagger {_SPENT}"
)
EXPLANATIONS = _schema(f"neuron_id language explanation status detail confidence explainer prompt_hash {_SPENT}")
SCORES = _schema(
    "neuron_id language method simulator score low high auroc n_units n_active n_texts true_positives false_positives "
    f"false_negatives true_negatives status detail {_SPENT}"
)
QUANTILES = _schema(
    "neuron_id hook_point latent n_tokens firing_rate p50 p90 p99 p999 p9999 max median_active normaliser histogram"
)
PAIRS = _schema("id domain category concept language with without")
CANDIDATES = _schema("neuron_id hook_point layer latent n_lists n_entries explained")
"""Of a converted data set: the latents of the source's index lists."""
