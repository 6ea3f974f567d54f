"""The miniature release with invented tables: what its page and API should show can be counted by hand.

The model and the SAEs are those of the `demo_run`; latents 0 to 59 of both hook points have rows, the others have none.

    latent % 4    0 presidents (politics), 1 insults (violence), 2 bombs (terror), 3 gardens (no domain)
    latent % 6    the score: 0.05, 0.25, 0.45, 0.65, undefined, −0.15
    layers.0.mlp/0    politics and terror         layers.0.mlp/10    refused in both languages
                                                  layers.1.mlp/10    refused in English, explained in Chinese
    Chinese       of latents below 30, refused from 30 to 44, without a row from 45 on
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

__all__ = ["N_ROWS", "SCORES", "explanation", "told_release"]

Row = dict[str, Any]
HOOK_POINTS = ("layers.0.mlp", "layers.1.mlp")
N_PER_HOOK_POINT = 60
N_ROWS = 120
SCORES = (0.05, 0.25, 0.45, 0.65, None, -0.15)
SUBJECTS = (("presidents", "总统"), ("insults", "侮辱"), ("bombs", "炸弹"), ("gardens", "花园"))
DOMAINS = (["politics"], ["violence"], ["terror"], [])
CATEGORIES = ("political-event", "insult", "weapons", "")
REFUSED_IN_ENGLISH = {"layers.0.mlp/10", "layers.1.mlp/10"}
TOKENS, SHARES = [" a", " car", " bomb", " was", "\n", " found"], [0.0, 0.5, 2.0, 0.0, 0.0, 0.0]


def told_release(source: Path, folder: Path) -> Path:
    """A copy of a run's published folders in which the neurons, explanations, scores and examples are invented."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("scratch"))
    scales = {row["neuron_id"]: row["normaliser"] for row in _table(folder / "neurons/quantiles/train.parquet")}
    neurons = [(hook_point, latent) for latent in range(N_PER_HOOK_POINT) for hook_point in HOOK_POINTS]
    _rewrite(folder / "neurons/neurons/train.parquet", [_neuron(*neuron) for neuron in neurons])
    english = folder / "neurons/explanations/en.parquet"
    schema = pq.read_schema(english).remove_metadata()
    for language in ("en", "zh"):
        said = [_said(*neuron, language) for neuron in neurons if language == "en" or neuron[1] < 45]
        _rewrite(english.with_stem(language), said, schema)
    (folder / "neurons/languages.json").write_text(json.dumps(["en", "zh"]), encoding="utf-8")
    _rewrite(folder / "neurons/scores/train.parquet", [row for neuron in neurons for row in _scores(*neuron)])
    examples = [row for neuron in neurons for row in _examples("/".join(map(str, neuron)), scales)]
    _rewrite(folder / "examples/examples/train.parquet", examples)
    return folder


def explanation(hook_point: str, latent: int, language: str = "en") -> str | None:
    """What a language says of a neuron, or None."""
    subject = SUBJECTS[latent % 4][language == "zh"]
    if language == "en":
        return None if f"{hook_point}/{latent}" in REFUSED_IN_ENGLISH else f"Words about {subject}, kind {latent}"
    without = latent >= 30 or (hook_point, latent) == ("layers.0.mlp", 10)
    return None if without else f"关于{subject}的词，第{latent}种"


def _table(path: Path) -> list[Row]:
    return pq.read_table(path).to_pylist()


def _rewrite(path: Path, rows: list[Row], schema: pa.Schema | None = None) -> None:
    schema = schema or pq.read_schema(path).remove_metadata()
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)


def _neuron(hook_point: str, latent: int) -> Row:
    said, score = explanation(hook_point, latent), SCORES[latent % 6]
    domains, category = DOMAINS[latent % 4], CATEGORIES[latent % 4]
    return {
        "neuron_id": f"{hook_point}/{latent}",
        "hook_point": hook_point,
        "layer": int(hook_point.split(".")[1]),
        "latent": latent,
        "explanation": said,
        "domains": ["politics", "terror"] if (hook_point, latent) == ("layers.0.mlp", 0) else domains,
        "category": category,
        "concept": "car bomb" if category == "weapons" else "",
        "status": "refused" if said is None else "undefined" if score is None else "ok",
        "score": score,
        "score_low": None if score is None else score - 0.1,
        "score_high": None if score is None else score + 0.1,
        "lexical_score": 0.2,
        "snippet": "… a c*** was found …",
        "x": latent / N_PER_HOOK_POINT,
        "y": -latent / N_PER_HOOK_POINT,
        "candidate_for": ["terror"],
        "n_wins": 5,
        "p_value": 0.03125,
        "q_value": 0.0625,
        "explainer": "a model",
        "simulator": "a simulator",
        "tagger": "a tagger",
    }


def _said(hook_point: str, latent: int, language: str) -> Row:
    text = explanation(hook_point, latent, language)
    told = {"language": language, "explanation": text, "status": "refused" if text is None else "ok"}
    return {"neuron_id": f"{hook_point}/{latent}", "detail": "", "explainer": "a model", **told}


def _scores(hook_point: str, latent: int) -> list[Row]:
    """By the method of the main table, and the lexical baseline, which reads no explanation."""
    score = SCORES[latent % 6]
    common = {"neuron_id": f"{hook_point}/{latent}", "n_units": 1040, "n_active": 5, "n_texts": 10, "detail": ""}
    interval = {"low": None, "high": None} if score is None else {"low": score - 0.1, "high": score + 0.1}
    main = {"method": "segment-5/llm", "language": "en", "simulator": "a simulator", "score": score, **interval}
    lexical = {"method": "segment-5/lexical", "language": "", "simulator": "", "score": 0.2, "low": 0.1, "high": 0.3}
    return [
        {**common, **main, "auroc": 0.75, "status": "undefined" if score is None else "ok"},
        {**common, **lexical, "auroc": None, "status": "ok"},
    ]


def _examples(neuron_id: str, scales: dict[str, float]) -> list[Row]:
    """One of the strongest, one of the third level and a near-miss; the token " bomb" at twice the normaliser."""
    scale = scales[neuron_id] or 1.0
    kinds = (("top", 10, 1.0), ("level-3", 3, 0.125), ("near-miss", 0, 0.0))
    return [
        {
            "neuron_id": neuron_id,
            "half": "explain",
            "rank": rank,
            "stratum": stratum,
            "level": level,
            "activation": 2.0 * part * scale,
            "text": "".join(TOKENS),
            "tokens": TOKENS,
            "activations": [share * part * scale for share in SHARES],
            "source": f"made texts, {stratum}",
        }
        for rank, (stratum, level, part) in enumerate(kinds)
    ]
