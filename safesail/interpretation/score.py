"""How far an explanation can be trusted: simulation (Safe-SAIL), and what it must be seen against.

Reads the harvest, the candidates' activations and their explanations. Writes `scores.parquet` (a row per neuron,
language and method).

Held-out texts are taken as tokens, as segments of a few tokens, or whole (`excerpts`); what the neuron really does on
each of these units is known. A simulator that sees only the explanation predicts it. The score is the Pearson
correlation of the two over all texts of the neuron, joined; of yes and no it is the phi coefficient, which depends on
the share of active units, so the confusion counts stand beside it.

    embedding   cosine of explanation and unit, from a sentence encoder
    lexical     whether the unit holds one of the tokens that carry the latent on the explain half: costs nothing,
                knows no meaning, and is what every other simulator must be seen against
    llm         a language model says where it expects activity (`simulate`)

A score is null where it is undefined (a side is constant) and where a call was refused, failed or not understood.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from safesail.interpretation.excerpts import Level, Units
from safesail.interpretation.held import N_LEXICAL, Held
from safesail.interpretation.llm import Llm, Request
from safesail.interpretation.simulate import Simulated, simulate, simulation_requests
from safesail.metrics import auroc, confusion, pearson_interval
from safesail.progress import bar
from safesail.run import StageWork

__all__ = ["SCORE_SCHEMA", "method_name", "score_requests", "score_stage", "scored_row"]

Row = dict[str, Any]


def score_stage(held: Held, embed: Callable[..., Tensor], llm: Llm | None, work: StageWork) -> None:
    """Score every explanation by every method of the recipe."""
    rows: list[Row] = []
    for method in held.recipe.score.methods:
        level, who = _level(method), method.partition("-")[2]
        if who == "lexical":
            rows += _by_lexicon(held, method, level)
        elif who == "embedding":
            rows += _by_embedding(held, method, level, embed)
        else:
            assert llm is not None, "the pipeline makes the llm when the recipe names it"
            rows += _by_llm(held, method, level, llm)
            work.facts["usage"] = llm.usage.summary()
    pq.write_table(pa.Table.from_pylist(rows, schema=SCORE_SCHEMA), work.folder / "scores.parquet")
    work.facts["statuses"] = {s: sum(row["status"] == s for row in rows) for s in sorted({r["status"] for r in rows})}


def score_requests(held: Held) -> list[Request]:
    """What the stage would ask the language model, for the dry run."""
    section = held.recipe.score
    levels: list[Level] = [_level(method) for method in section.methods if method.endswith("-llm")]
    is_local = section.backend == "local"
    return [request for level in levels for request in simulation_requests(held.jobs(level), level, section, is_local)]


def method_name(method: str, segment_tokens: int) -> str:
    """What rows call a method of the recipe: `segment-5/llm`, `detection/llm`, `similarity/embedding`, …"""
    level, _, who = method.partition("-")
    if level == "segment":
        level = f"segment-{segment_tokens}"
    special = {"text-llm": "detection", "text-embedding": "similarity"}
    return f"{special.get(method, level)}/{who}"


def scored_row(units: Units, predicted: Tensor | None, level: Level, seed: int, *, is_of_activity: bool = True) -> Row:
    """The figures of one neuron by one method. predicted: (n_units,), None where there is no prediction.

    Predictions of activity are levels of tokens, of which 1 is a yes, or else probabilities, of which more than 0.5 is;
    a cosine is neither and has no confusion counts. An undefined score leaves the figures of agreement null.
    """
    row: Row = dict.fromkeys(SCORE_SCHEMA.names)
    active = units.truth > 0
    row |= {"n_units": len(active), "n_active": int(active.sum()), "n_texts": len(units.text_of.unique())}
    if predicted is None:
        return row
    if is_of_activity:
        row |= confusion(predicted >= 1 if level == "token" else predicted > 0.5, active)
    interval = pearson_interval(predicted, units.truth, units.text_of, seed=seed)
    if interval.value is None:
        return row | {"status": "undefined", "detail": _why_undefined(units.truth, level)}
    row |= {"score": interval.value, "low": interval.low, "high": interval.high}
    return row | {"auroc": auroc(predicted, units.truth), "status": "ok", "detail": ""}


# --- the methods --------------------------------------------------------------------------------------------------


def _by_lexicon(held: Held, method: str, level: Level) -> list[Row]:
    """One row a neuron: no explanation is read."""
    rows = []
    for neuron in held.neurons:
        units, words = held.units(level, neuron), set(held.lexicon(neuron))
        predicted = torch.tensor([float(any(id in words for id in ids)) for ids in units.ids])
        row = scored_row(units, predicted, level, held.recipe.seed)
        rows.append(row | _named(held, method, neuron, "", f"{N_LEXICAL} strongest tokens") | _FREE)
    return rows


def _by_embedding(held: Held, method: str, level: Level, embed: Callable[..., Tensor]) -> list[Row]:
    """Cosines of explanation and unit; every distinct text is encoded once."""
    jobs = {(job.neuron_id, job.language): job for job in held.jobs(level)}
    texts = sorted({text for job in jobs.values() for text in (*job.units.texts, job.explanation)})
    with bar(f"score: {method}", len(texts), "text") as progress:
        vectors = embed(texts, progress=progress.update)
    number = {text: i for i, text in enumerate(texts)}

    def row_of(explained: Row) -> Row:
        job = jobs.get((explained["neuron_id"], explained["language"]))
        units, predicted = held.units(level, explained["neuron_id"]), None
        if job is not None:
            predicted = vectors[[number[text] for text in units.texts]] @ vectors[number[job.explanation]]
        return scored_row(units, predicted, level, held.recipe.seed, is_of_activity=False) | _FREE

    return _explained_rows(held, method, Path(held.recipe.explain.encoder).name, row_of)


def _by_llm(held: Held, method: str, level: Level, llm: Llm) -> list[Row]:
    section, jobs = held.recipe.score, held.jobs(level)
    n_calls = len(simulation_requests(jobs, level, section, section.backend == "local"))
    with bar(f"score: {method}", n_calls, "call") as progress:
        simulated = simulate(jobs, level, section, llm, progress.update)
    found = {(job.neuron_id, job.language): said for job, said in zip(jobs, simulated, strict=True)}

    def row_of(explained: Row) -> Row:
        said = found.get((explained["neuron_id"], explained["language"]))
        units = held.units(level, explained["neuron_id"])
        row = scored_row(units, said and said.predicted, level, held.recipe.seed)
        return row | (_FREE if said is None else _spent(said, row))

    return _explained_rows(held, method, llm.backend.name, row_of)


def _explained_rows(held: Held, method: str, simulator: str, row_of: Callable[[Row], Row]) -> list[Row]:
    """One row per explanation, in their order; one that is not ok hands its status on."""
    rows = []
    for explained in held.explanations:
        row = row_of(explained) | _named(held, method, explained["neuron_id"], explained["language"], simulator)
        if explained["status"] != "ok":
            row |= {"status": explained["status"], "detail": "there is no explanation to be scored"}
        rows.append(row)
    return rows


def _named(held: Held, method: str, neuron: str, language: str, simulator: str) -> Row:
    name = method_name(method, held.recipe.score.segment_tokens)
    return {"neuron_id": neuron, "language": language, "method": name, "simulator": simulator}


_FREE: Row = {"prompt_tokens": 0, "completion_tokens": 0, "cost_usd": 0.0}


def _spent(said: Simulated, row: Row) -> Row:
    """What a simulation used, and its status unless it gave a prediction, whose status the row has."""
    spent = {name: getattr(said, name) for name in _FREE}
    return spent if said.predicted is not None else spent | {"status": said.status, "detail": said.detail}


def _level(method: str) -> Level:
    levels: dict[str, Level] = {"token": "token", "segment": "segment", "text": "text"}
    return levels[method.partition("-")[0]]


def _why_undefined(truth: Tensor, level: Level) -> str:
    if len(truth) < 2:
        return f"there are fewer than two {level}s"
    if bool((truth == truth[0]).all()):
        return f"{'every' if truth[0] else 'no'} {level} is active"
    return "the simulator said the same of all"


SCORE_SCHEMA = pa.schema(
    [
        ("neuron_id", pa.string()),
        ("language", pa.string()),
        ("method", pa.string()),
        ("simulator", pa.string()),
        ("score", pa.float64()),
        ("low", pa.float64()),
        ("high", pa.float64()),
        ("auroc", pa.float64()),
        ("n_units", pa.int32()),
        ("n_active", pa.int32()),
        ("n_texts", pa.int32()),
        ("true_positives", pa.int32()),
        ("false_positives", pa.int32()),
        ("false_negatives", pa.int32()),
        ("true_negatives", pa.int32()),
        ("status", pa.string()),
        ("detail", pa.string()),
        ("prompt_tokens", pa.int32()),
        ("completion_tokens", pa.int32()),
        ("cost_usd", pa.float64()),
    ]
)
