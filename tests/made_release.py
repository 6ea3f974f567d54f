"""A release of invented facts, in the shape in which the stages leave them: two hook points, four SAEs, six neurons.

`python tests/made_release.py` writes the golden files in tests/golden/ anew; read the difference before keeping it.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from made_sweep import make_harvest
from safetensors.torch import save_file

from safesail.interpretation.collect import EXAMPLE_SCHEMA
from safesail.recipe import Recipe
from safesail.release.build import build_stage
from safesail.run import Run
from safesail.sae.config import SaeConfig
from safesail.sae.model import Sae
from safesail.taxonomy import Taxonomy
from safesail.training.fidelity import FIDELITY

GOLDEN = Path(__file__).resolve().parent / "golden"
GOLDEN_FILES = (
    "saes/README.md",
    "saes/curve.svg",
    "saes/recipe.toml",
    "neurons/README.md",
    "examples/README.md",
    "inspector/README.md",
)
HOSTILE = "a | b `c` <script>x</script> [d](http://e)\n# f"
THRESHOLDS = ("0", "0.1")
HOOK_POINTS = {"layers.0.mlp": 8, "layers.1.mlp": 6}
D_SAE = 16

Row = dict[str, Any]
PAIRS = [
    {"id": id, "domain": domain, "category": category, "concept": concept, "language": language}
    | {"with": f"{before}{concept}{after}", "without": f"{before}{other}{after}"}
    for id, domain, category, language, before, concept, other, after in (
        ("politics.cult.01", "politics", "cult", "en", "He left the ", "cult", "club", " in May."),
        ("terror.weapons.01", "terror", "weapons", "en", "She saw the ", "rifle", "table", " in May."),
        ("terror.weapons.01", "terror", "weapons", "zh", "她五月看到了那支", "步枪", "雨伞", "。"),
    )
]


def made_recipe(folder: Path, **changed: Row) -> Recipe:
    """The recipe of the invented release, its pairs in `folder`. changed: settings of sections in place of its own."""
    pairs = folder / "own-pairs.jsonl"
    pairs.write_text("".join(json.dumps(pair) + "\n" for pair in PAIRS), encoding="utf-8")
    recipe: Row = {
        "name": "made",
        "model": {"path": "none", "base_model": "tests/tiny", "licence": "mit"},
        "corpus": {
            "n_tokens": 1200,
            "n_held_out_tokens": 120,
            "sources": [
                {"path": "none.jsonl", "origin": "made texts", "licence": "mit"},
                {"path": "made/talk", "about": "terror", "licence": "cc-by-4.0"},
            ],
        },
        "harvest": {"hook_points": list(HOOK_POINTS)},
        "train": {"architectures": ["topk", "relu"], "d_sae": D_SAE, "k": [4], "l1": [0.1]},
        "select": {"pairs": [str(pairs)], "thresholds": [0, 0.1]},
        "explain": {"encoder": "none", "backend": "endpoint", "model": "m", "languages": ["en", "zh-Hant"]},
        "score": {"methods": ["segment-llm", "segment-lexical", "text-embedding"], "backend": "endpoint", "model": "m"},
    }
    return Recipe.parse({**recipe, **{name: recipe.get(name, {}) | keys for name, keys in changed.items()}})


def made_run(folder: Path, recipe: Recipe | None = None, **changed: Any) -> Run:
    """A run whose stages are done up to `score`. changed: explanations, scores, … in place of the made ones."""
    run = Run.create(folder / "made", recipe or made_recipe(folder))
    for stage in ("harvest", "train", "eval", "select", "collect", "explain", "score"):
        (run.scratch / stage).mkdir()
    make_harvest(run.scratch / "harvest", 2)
    curve = made_curve()
    for sae_id in curve:
        _write_sae(run, sae_id, curve[sae_id])
    _write(run, "eval/fidelity.json", {sae_id: made_fidelity(row) for sae_id, row in curve.items()})
    _write(run, "select/selection.json", made_selection(curve, run.recipe))
    _write(run, "select/candidates.json", changed.get("candidates", made_candidates()))
    _write(run, "select/contrast.parquet", made_contrast(curve))
    _write(run, "collect/statistics.parquet", made_statistics())
    _write(run, "collect/examples.parquet", made_examples(), EXAMPLE_SCHEMA)
    _write(run, "explain/explanations.parquet", changed.get("explanations", made_explanations()))
    _write(run, "explain/tags.parquet", changed.get("tags", made_tags()))
    _write(run, "score/scores.parquet", changed.get("scores", made_scores()))
    corpus = {
        "n_tokens": 1200,
        "n_documents": 60,
        "tokens_by_source": {source.title: 600 for source in run.recipe.corpus.sources},
    }
    records = {
        "harvest": corpus | {"tokenizer_hash": "h"},
        "eval": {"n_ce_tokens": 100},
        "explain": changed.get("explained", {"refused_by_domain": {"terror": 1, "violence": 0}}),
    }
    for stage in ("harvest", "train", "eval", "select", "collect", "explain", "score"):
        _write(run, f"{stage}/stage.json", {"stage": stage, "fingerprint": stage} | records.get(stage, {}))
    return run


def made_release(folder: Path, recipe: Recipe | None = None, **changed: Any) -> Path:
    """The run folder of the invented release with its four published sub-folders."""
    run = made_run(folder, recipe, **changed)
    with run.stage("build") as work:
        build_stage(run, Taxonomy.load(), work)
    return run.folder


# --- train, eval and select ---------------------------------------------------------------------------------------


def made_curve() -> dict[str, Row]:
    """selection.json's `curve`: topk is better at both hook points; the null of relu at layer 1 is unknown."""
    rows = {}
    for number, hook_point in enumerate(HOOK_POINTS):
        for architecture, l0 in (("topk", 4.0), ("relu", 6.5)):
            best = architecture == "topk"
            setting = "k4" if best else "c0.1"
            rows[f"{hook_point}/{architecture}-{setting}-w{D_SAE}"] = {
                "architecture": architecture,
                "k": 4 if best else None,
                "coefficient": None if best else 0.1,
                "i_cdf": 0.02,
                "i_cdf_low": 0.018,
                "i_cdf_high": 0.023,
                "i_cdf_swapped": 0.011,
                "i_cdf_null": 0.012,
                "i_cdf_null_high": 0.014,
                "i_cdf_p": 0.001,
                "above_null": 0.008 if best else 0.006 - 0.001 * number,
                "above_null_low": 0.006 if best else None,
                "above_null_high": 0.011 if best else None,
                "as_good_as_best": best or number == 0,
                "selected": best,
                "l0_t": {"0": 7.25, "0.1": 2.0},
                "l0_t_null": {"0": 5.5, "0.1": 0.5},
                **_short(0.2 + 0.1 * number if best else 0.25 + 0.1 * number, l0),
            }
    return rows


def _short(fvu: float, l0: float) -> Row:
    return {"explained_variance": 1 - fvu, "fvu": fvu, "l0": l0, "dead": 0.125, "ce_recovered": 0.75}


def made_fidelity(row: Row) -> Row:
    numbers = {"mse": 0.5, "cosine": 0.9, "dense": 0.25, "kl": 0.0625}
    numbers |= {name: row[name] for name in ("explained_variance", "fvu", "l0", "dead", "ce_recovered")}
    intervals = {name: [numbers[name] * 0.9, numbers[name] * 1.1] for name in FIDELITY}
    definitions = {name: f"{name}/v1" for name in FIDELITY}
    return {**numbers, "intervals": intervals, "definitions": definitions}


def made_selection(curve: dict[str, Row], recipe: Recipe) -> Row:
    options = {
        "pairs": [Path(name).name for name in recipe.select.pairs],
        "n_pairs": len(PAIRS),
        "reduction": "max",
        "activity_quantile": 0.0,
        "criterion": "above_null",
        "fdr": 0.1,
        "min_pairs": 2,
        "n_resamples": 1000,
        "thresholds": [0.0, 0.1],
    }
    selected = {sae_id.rpartition("/")[0]: sae_id for sae_id, row in curve.items() if row["selected"]}
    return {"selected": selected, "options": options, "curve": curve}


def made_contrast(curve: dict[str, Row]) -> list[Row]:
    groups = [("all", "all"), ("domain", "politics"), ("domain", "terror"), ("language", "en")]
    return [
        {
            "sae_id": sae_id,
            "selected": row["selected"],
            "grouping": grouping,
            "group": group,
            "n_pairs": 48,
            "reduction": "max",
            "activity_quantile": 0.0,
            **{name: row[name] for name in ("i_cdf", "i_cdf_low", "i_cdf_high", "i_cdf_null", "i_cdf_null_high")},
            "i_cdf_p": 0.001 if group != "politics" else 0.25,
            "above_null": row["above_null"],
            "l0_t_0": 7.25,
            "l0_t_0_null": 5.5,
            "l0_t_0.1": 2.0,
            "l0_t_0.1_null": 0.5,
        }
        for sae_id, row in curve.items()
        for grouping, group in groups
    ]


def made_candidates() -> dict[str, dict[str, list[Row]]]:
    def row(latent: int, q_value: float, level: str = "domain", explain: bool = True) -> Row:
        found = {"latent": latent, "n_wins": 5, "n_losses": 0, "n_pairs": 48, "p_value": 0.03125, "q_value": q_value}
        found |= {"level": level, "categories": ["weapons"], "concepts": ["bomb"], "languages": ["en"]}
        return {**found, "explain": explain}

    terror = [row(0, 0.01), row(1, 0.04, "category"), row(9, 0.08, explain=False)]
    return {
        "layers.0.mlp": {"terror": terror, "violence": [row(1, 0.05)]},
        "layers.1.mlp": {"terror": [row(2, 0.02), row(3, 0.02), row(4, 0.03)], "violence": []},
    }


def _write_sae(run: Run, sae_id: str, row: Row) -> None:
    hook_point = sae_id.rpartition("/")[0]
    d_in, chance = HOOK_POINTS[hook_point], torch.Generator().manual_seed(0)
    shapes = ((d_in, D_SAE), (D_SAE,), (D_SAE, d_in), (d_in,))
    config = SaeConfig(
        d_in=d_in,
        d_sae=D_SAE,
        hook_point=hook_point,
        architecture=row["architecture"],
        k=row["k"],
        coefficient=row["coefficient"],
    )
    assert config.sae_id == sae_id
    Sae(config, *(torch.randn(shape, generator=chance) for shape in shapes)).save(run.scratch / "train" / sae_id)
    (run.scratch / "eval" / sae_id).mkdir(parents=True)
    counts = {"n_fired": torch.arange(D_SAE), "n_counted": torch.tensor(1000)}
    save_file(counts, run.scratch / "eval" / sae_id / "statistics.safetensors")


# --- collect, explain and score -----------------------------------------------------------------------------------

NEURONS = [*(f"layers.0.mlp/{j}" for j in (0, 1)), *(f"layers.1.mlp/{j}" for j in (2, 3, 4, 5))]
STATUSES = dict(zip(NEURONS, ("ok", "ok", "ok", "refused", "unparsed", "ok"), strict=True))
SCORES = dict(zip(NEURONS, (0.5, 0.1, None, None, None, -0.25), strict=True))
"""The score of the first method in the first language: the third is undefined, of two there is no explanation."""


def made_statistics() -> list[Row]:
    quantiles = {"p50": 0.0, "p90": 0.0, "p99": 0.5, "p999": 1.0, "p9999": 2.0, "max": 3.0}
    settled = {"n_tokens": 1000, "firing_rate": 0.02, **quantiles, "median_active": 0.5, "normaliser": 1.0}
    settled["histogram"] = [0, 0, 0, 0, 18, 0, 0, 0, 0, 2]
    return [
        {"neuron_id": f"{hook_point}/{j}", "hook_point": hook_point, "latent": j, **settled}
        for hook_point in HOOK_POINTS
        for j in range(D_SAE)
    ]


def made_examples() -> list[Row]:
    tokens = [" the", " car", " bomb", " was", " found", " here"]

    def row(neuron_id: str, half: str, rank: int, stratum: str, activation: float) -> Row:
        values = [0.0, 0.0, activation, 0.0, 0.0, 0.0]
        place = {"document": f"d-{half}-{rank}", "piece": rank, "peak": 2, "source": "made texts"}
        shown = {"text": "".join(tokens), "tokens": tokens, "activations": values}
        level = min(round(10 * activation), 10)
        return {"neuron_id": neuron_id, "half": half, "rank": rank, "stratum": stratum, "level": level} | {
            "activation": activation,
            **shown,
            **place,
        }

    kinds = [("explain", 0, "top", 2.0), ("explain", 1, "near-miss", 0.0), ("score", 0, "top", 1.5)]
    return [row(name, *kind) for name in NEURONS for kind in kinds]


def made_explanations() -> list[Row]:
    """In two languages; of the second neuron hostile text, of the last one no price."""
    rows = []
    for name in NEURONS:
        for language, sentence in (("en", "Words about bombs."), ("zh-Hant", "關於炸彈的詞。")):
            ok, first = STATUSES[name] == "ok", language == "en"
            text = HOSTILE if name == NEURONS[1] and first else sentence
            rows.append(
                {
                    "neuron_id": name,
                    "language": language,
                    "explanation": text if ok else None,
                    "status": STATUSES[name],
                    "detail": "" if ok else "the model declined",
                    "confidence": 0.75 if ok else None,
                    "explainer": "m",
                    "prompt_hash": "abc",
                    "prompt_tokens": 100 if first else 0,
                    "completion_tokens": 20 if first else 0,
                    "cost_usd": (None if name == NEURONS[-1] else 0.0025) if first else 0.0,
                }
            )
    return rows


def made_tags() -> list[Row]:
    return [
        {
            "neuron_id": name,
            "domains": ["terror"] if name in NEURONS[:3] else [],
            "category": "weapons" if name in NEURONS[:3] else "",
            "concept": "bomb" if name in NEURONS[:3] else "",
            "candidate_for": ["terror"],
            "n_wins": 5,
            "n_losses": 0,
            "p_value": 0.03125,
            "q_value": 0.0625,
            "level": "domain",
            "tagger": "m",
            "similarity": None,
        }
        for name in NEURONS
    ]


def made_scores() -> list[Row]:
    """By a language model and by similarity in two languages, and the lexical baseline, which reads no explanation."""
    rows = []
    for name in NEURONS:
        for language in ("en", "zh-Hant"):
            rows.append(
                _score(name, language, "segment-5/llm", SCORES[name] if language == "en" else 0.25, counted=True)
            )
        rows.append(_score(name, "", "segment-5/lexical", 0.2, counted=True))
        rows.append(_score(name, "en", "similarity/embedding", 0.0))
    return rows


def _score(name: str, language: str, method: str, score: float | None, counted: bool = False) -> Row:
    said = STATUSES[name] if method != "segment-5/lexical" else "ok"
    score = score if said == "ok" else None
    asked = method.endswith("/llm") and said == "ok"
    counts = (3, 1, 2, 34) if counted and said == "ok" else (None, None, None, None)
    return {
        "neuron_id": name,
        "language": language,
        "method": method,
        "simulator": {"llm": "m", "lexical": "30 strongest tokens", "embedding": "e"}[method.partition("/")[2]],
        "score": score,
        "low": None if score is None else score - 0.1,
        "high": None if score is None else score + 0.1,
        "auroc": None if score is None else 0.75,
        "n_units": 40,
        "n_active": 5,
        "n_texts": 10,
        "true_positives": counts[0],
        "false_positives": counts[1],
        "false_negatives": counts[2],
        "true_negatives": counts[3],
        "status": "undefined" if score is None and said == "ok" else said,
        "detail": "" if score is not None else "the prediction is constant",
        "prompt_tokens": 50 if asked else 0,
        "completion_tokens": 10 if asked else 0,
        "cost_usd": 0.001 if asked else 0.0,
    }


def _write(run: Run, name: str, content: Any, schema: pa.Schema | None = None) -> None:
    path = run.scratch / name
    if path.suffix == ".json":
        path.write_text(json.dumps(content), encoding="utf-8")
    else:
        pq.write_table(pa.Table.from_pylist(content, schema=schema), path)


def write_golden() -> None:
    """Write the golden files anew."""
    with tempfile.TemporaryDirectory() as folder:
        made = made_release(Path(folder))
        for name in GOLDEN_FILES:
            (GOLDEN / name).parent.mkdir(parents=True, exist_ok=True)
            (GOLDEN / name).write_bytes((made / name).read_bytes())


if __name__ == "__main__":
    sys.exit(write_golden())
