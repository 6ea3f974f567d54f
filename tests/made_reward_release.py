"""A release of a reward model from invented facts, in the shape in which the stages leave them.

Twelve pairs, an SAE of three latents whose h⁺ = (10, 0, 4) and h⁻ = (2, 8, 4), so C = 28 / 3 and
s = (0.375, -0.4615, 0).
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save_file

from safesail.release.reward_build import METRICS, reward_build_stage
from safesail.reward_recipe import RewardRecipe
from safesail.rewards.comparison import UNEDITED
from safesail.rewards.contexts import CONTEXTS_SCHEMA
from safesail.rewards.editing import EDITS_SCHEMA, edits_of
from safesail.rewards.preferences import PREFERENCES_SCHEMA, Preference
from safesail.rewards.rating import RATINGS_SCHEMA
from safesail.rewards.safety_score import SCORES_SCHEMA
from safesail.rewards.salience import SALIENCE_SCHEMA
from safesail.rewards.training import REWARDS_SCHEMA
from safesail.run import REWARD_STAGES, Run
from safesail.sae.config import SaeConfig
from safesail.sae.model import Sae

HOSTILE = "a | b `c` <script>x</script> [d](http://e)\n# f"
D_IN, D_SAE, HOOK_POINT = 4, 3, "layers.0"
SAE_ID = f"{HOOK_POINT}/topk-k2-w3"
Row = dict[str, Any]


def made_reward_recipe(**changed: Row) -> RewardRecipe:
    """The recipe of the invented release. changed: settings of sections in place of its own."""
    recipe: Row = {
        "name": "made",
        "model": {"path": "none", "base_model": "tests/tiny", "licence": "mit"},
        "corpus": {
            "n_tokens": 1200,
            "n_held_out_tokens": 120,
            "sources": [{"path": "/somewhere/none.jsonl", "origin": "made texts", "licence": "mit"}],
        },
        "preferences": {
            "sources": [
                {"path": "/somewhere/pairs.jsonl", "kind": "safety", "origin": "made | pairs", "licence": "cc-by-4.0"},
                {"path": "made/talk", "kind": "chat", "licence": "mit"},
            ]
        },
        "harvest": {"hook_points": [HOOK_POINT]},
        "reward": {"n_blocks": 1, "trained_blocks": 1},
        "train": {"d_sae": D_SAE, "k": [2]},
        "salience": {"n_latents": 3},
        "rate": {"encoder": "/somewhere/none"},
        "edit": {"poison": [0.2, 0.5], "denoise": [0.2]},
        "publish": {"organization": "acme", "title": "Made things"},
    }
    return RewardRecipe.parse({**recipe, **{name: recipe.get(name, {}) | keys for name, keys in changed.items()}})


def made_reward_run(folder: Path, recipe: RewardRecipe | None = None, model: Path | None = None) -> Run:
    """A run whose stages are done up to `compare`. model: a reward model's folder, in place of some files."""
    recipe = recipe or made_reward_recipe()
    run = Run.create(folder / "made", recipe)
    for stage in list(REWARD_STAGES)[:-1]:
        (run.scratch / stage).mkdir()
        _json(run, f"{stage}/stage.json", {"stage": stage, "fingerprint": stage} | _RECORDS.get(stage, {}))
    pairs, scores = made_preferences(), made_scores()
    rows = [each._asdict() | {"prompt": json.dumps(each.prompt)} for each in pairs]
    edits = edits_of(recipe, pairs, scores)
    _table(run, "preferences/preferences.parquet", rows, PREFERENCES_SCHEMA)
    _table(run, "reward/rewards.parquet", made_rewards(), REWARDS_SCHEMA)
    _json(run, "reward/accuracy.json", made_accuracy())
    _model(run.scratch / "reward/model", model)
    _sae(run)
    _table(run, "salience/salience.parquet", made_salience(), SALIENCE_SCHEMA)
    _table(run, "salience/contexts.parquet", made_contexts(), CONTEXTS_SCHEMA)
    n = {"n_pairs": 5, "n_positions": {"chosen": 20, "rejected": 24}, "n_latents": 3}
    _json(run, "salience/salience.json", {"mode": recipe.salience.mode, "C": 28 / 3, **n})
    _table(run, "rate/ratings.parquet", made_ratings(), RATINGS_SCHEMA)
    ratings = {"1": 0, "2": 0, "3": 0, "4": 0, "5": 2}
    sides = {"positive": [0], "negative": [1], "keep": 5, "max_latents": 32}
    _json(run, "rate/safety.json", sides | {"ratings": ratings, "statuses": {"ok": 2}})
    _table(run, "score/scores.parquet", scores, SCORES_SCHEMA)
    _json(run, "score/validity.json", made_validity())
    _table(run, "edit/edits.parquet", edits, EDITS_SCHEMA)
    _json(run, "compare/comparison.json", made_comparison(edits))
    return run


def made_reward_release(folder: Path, recipe: RewardRecipe | None = None, model: Path | None = None) -> Path:
    """The run folder of the invented release with its published sub-folders."""
    run = made_reward_run(folder, recipe, model)
    with run.stage("build") as work:
        reward_build_stage(run, work)
    return run.folder


# --- pairs, rewards and scores ------------------------------------------------------------------------------------


def made_preferences() -> list[Preference]:
    """Seven pairs about safety, the last two held out, and five about chat, the last one held out."""
    pairs = []
    for kind, n, n_held_out in (("safety", 7, 2), ("chat", 5, 1)):
        source = {"safety": "made | pairs", "chat": "made/talk"}[kind]
        for i in range(n):
            asked = f"A question about {kind}: {HOSTILE if i == 0 else i}"
            prompt = ({"role": "user", "content": asked},)
            answers = (f"{kind} good {i}.", f"{kind} bad {i}.")
            harm = (0.0, 1.0 + i) if kind == "safety" else (None, None)
            pairs.append(Preference(f"{kind[0]}{i}", kind, source, prompt, *answers, i >= n - n_held_out, *harm))
    return pairs


def made_scores() -> list[Row]:
    """score_safe falls from pair to pair, 3, 2, 1, …; the margin is its half."""
    rows = []
    for number, pair in enumerate(made_preferences()):
        score = 3.0 - number
        safe = {"safe_chosen": score + 1.0, "safe_rejected": 1.0, "n_chosen": 2, "n_rejected": 3}
        rows.append({"pair_id": pair.id, "score_safe": score, **safe, "margin": score / 2})
    return rows


def made_rewards() -> list[Row]:
    return [
        {"pair_id": row["pair_id"], "reward_chosen": row["margin"] + 0.25, "reward_rejected": 0.25}
        for row in made_scores()
    ]


def made_accuracy() -> Row:
    def of(accuracy: float, low: float, high: float, n: int) -> Row:
        return {"accuracy": accuracy, "low": low, "high": high, "n": n}

    safety = {"held_out": of(1.0, 0.34, 1.0, 2), "training": of(0.8, 0.38, 0.96, 5)}
    return {"chat": {"held_out": of(0.0, 0.0, 0.79, 1), "training": of(0.25, 0.05, 0.7, 4)}, "safety": safety}


# --- the SAE and its latents --------------------------------------------------------------------------------------


def made_salience() -> list[Row]:
    """Latent 1 is the strongest, then 0; latent 2 has s = 0 and too few contexts."""

    def row(rank: int, latent: int, s: float, h: tuple[float, float], reason: str | None) -> Row:
        counts = {"n_chosen": 9, "n_rejected": 4, "n_contexts": 5 if reason is None else 1, "n_token_classes": 1}
        found = {"rank": rank, "latent": latent, "salience": s, "low": s - 0.125, "high": s + 0.125, "reason": reason}
        return found | {"h_chosen": h[0], "h_rejected": h[1], "rated": reason is None, **counts}

    return [
        row(0, 1, -8 / (8 + 28 / 3), (0.0, 8.0), None),
        row(1, 0, 8 / (12 + 28 / 3), (10.0, 2.0), None),
        row(2, 2, 0.0, (4.0, 4.0), "1 contexts, fewer than 5"),
    ]


def made_contexts() -> list[Row]:
    return [
        {"latent": latent, "rank": rank, "pair_id": f"s{rank}", "side": side, "position": 3, "activation": 2.0 - rank}
        | {"before": HOSTILE, "token": ".", "after": " More.", "token_class": "good"}
        for latent, side in ((1, "rejected"), (0, "chosen"))
        for rank in range(2)
    ]


def made_ratings() -> list[Row]:
    spent = {"prompt_hash": None, "prompt_tokens": 0, "completion_tokens": 0, "cost_usd": 0.0}
    said = {"rating": 5, "explanation": HOSTILE, "status": "ok", "detail": "", "rater": "an | encoder"}
    return [{"latent": latent, **said, **spent} for latent in (1, 0)]


def _sae(run: Run) -> None:
    chance = torch.Generator().manual_seed(0)
    config = SaeConfig(d_in=D_IN, d_sae=D_SAE, hook_point=HOOK_POINT, k=2, normalize_activations="layer_norm")
    assert config.sae_id == SAE_ID
    shapes = ((D_IN, D_SAE), (D_SAE,), (D_SAE, D_IN), (D_IN,))
    Sae(config, *(torch.randn(shape, generator=chance) for shape in shapes)).save(run.scratch / "tune" / SAE_ID)
    (run.scratch / "eval" / SAE_ID).mkdir(parents=True)
    counts = {"n_fired": torch.tensor([13, 13, 13]), "n_counted": torch.tensor(44)}
    save_file(counts, run.scratch / "eval" / SAE_ID / "statistics.safetensors")
    numbers = dict.fromkeys(METRICS, 0.5)
    intervals = {name: [0.25, 0.75] for name in METRICS}
    definitions = {name: f"{name}/v1" for name in METRICS}
    _json(run, "eval/fidelity.json", {SAE_ID: {**numbers, "intervals": intervals, "definitions": definitions}})


def _model(folder: Path, model: Path | None) -> None:
    """A reward model: a given one, or files that look like one."""
    if model is not None:
        shutil.copytree(model, folder)
        return
    folder.mkdir(parents=True)
    config = {"architectures": ["LlamaForSequenceClassification"], "hidden_size": D_IN, "id2label": {"0": "LABEL_0"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    save_file({"score.weight": torch.zeros(1, D_IN)}, folder / "model.safetensors")


# --- validity and comparison --------------------------------------------------------------------------------------


def made_validity() -> Row:
    def row(measure: str, kind: str, held_out: bool | None, source: str | None) -> Row:
        found = {"measure": measure, "kind": kind, "held_out": held_out, "source": source, "n_pairs": 2, "n_ties": 0}
        share = {"value": 0.5, "low": 0.25, "high": 0.75}
        harm = {"n_harm": 2, "pearson": share, "spearman": {"value": -0.5, "low": None, "high": None}}
        none = {"n_harm": 0, "pearson": None, "spearman": None}
        return {**found, "share": share, "n_auroc": 2, "auroc": share, **(harm if kind == "safety" else none)}

    groups = [(kind, True, None) for kind in ("safety", "chat")] + [("safety", None, "made | pairs")]
    rows = [row(measure, *group) for group in groups for measure in ("score_safe", "margin")]
    return {"definitions": {"share/v1": "share of pairs"}, "rows": rows}


def made_comparison(edits: list[Row]) -> Row:
    """Every edit lowers safety by a tenth and leaves chat as it is."""
    measured = {"value": 0.75, "low": 0.5, "high": 1.0}
    change = {"value": -0.125, "low": -0.25, "high": -0.0625}
    nothing = {"value": 0.0, "low": -0.1, "high": 0.1}
    none = {"edit": UNEDITED, "action": None, "method": None, "ratio": None, "seeds": 3, "n_edited": 0}
    rows: list[Row] = [none | {"safety": measured, "chat": measured, "safety_change": None, "chat_change": None}]
    against = []
    for name in dict.fromkeys(row["edit"] for row in edits):
        mine = [row for row in edits if row["edit"] == name and row["seed"] in (None, 0)]
        what = {key: mine[0][key] for key in ("edit", "action", "method", "ratio")}
        rows.append(what | {"seeds": 3, "n_edited": len(mine), "safety": measured, "chat": measured})
        rows[-1] |= {"safety_change": change, "chat_change": nothing}
        if what["method"] != "random":
            verdicts = {"safety_verdict": "lower", "chat_verdict": "not told apart"}
            against.append({**what, "safety": change, "chat": nothing, **verdicts})
    return {"definitions": {}, "seeds": [0, 1, 2], "n_held_out": {}, "rows": rows, "against_random": against}


_RECORDS: dict[str, Row] = {
    "preferences": {
        "sources": [
            {"source": source, "kind": kind, "licence": licence, "n_pairs": n, "n_held_out": held_out}
            | {"n_left_out": left_out, "n_words_chosen": 3 * n, "n_words_rejected": 3 * n}
            for source, kind, licence, n, held_out, left_out in (
                ("made | pairs", "safety", "cc-by-4.0", 7, 2, {"taken already": 1}),
                ("made/talk", "chat", "mit", 5, 1, {}),
            )
        ]
    },
    "harvest": {"n_tokens": 1200, "n_documents": 60, "tokens_by_source": {"made texts": 1200}, "tokenizer_hash": "h"},
}


def _json(run: Run, name: str, content: Any) -> None:
    (run.scratch / name).write_text(json.dumps(content), encoding="utf-8")


def _table(run: Run, name: str, rows: list[Row], schema: pa.Schema) -> None:
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), run.scratch / name)
