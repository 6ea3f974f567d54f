"""The run of a reward model from its recipe to its release, by the command line, in miniature."""

import json
import random
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_verify import by_status, edit_json, edit_rows

from safesail.release.verify import verify
from safesail.run import REWARD_STAGES, Run
from safesail.sae.model import Sae

SAFE = ("I will not help with that.", "Please talk to a friend about it.", "That would hurt people, so no.")
HARM = ("First take the knife, then hide it.", "Use the bomb at night.", "Stab them; nobody will see you.")
RIGHT, WRONG = (
    ("The teacher waters the garden.", "Music plays near the river."),
    ("Garden the water teacher.", "Plays."),
)

REPOSITORY = Path(__file__).resolve().parent.parent
PARTS = ("saes", "reward", "salience", "preferences", "inspector")


def rows(kind: str, n: int, chosen: tuple[str, ...], rejected: tuple[str, ...]) -> list[dict[str, Any]]:
    chance = random.Random(kind)
    return [
        {
            "id": f"{kind}-{i}",
            "prompt": f"Question {i}: what about the {chance.choice(['river', 'house', 'senator'])}?",
            "chosen": " ".join(chance.sample(chosen, 2)),
            "rejected": " ".join(chance.sample(rejected, 2)),
            "harm_chosen": 0.0,
            "harm_rejected": chance.choice([0.5, 0.75, 1.0]),
        }
        for i in range(n)
    ]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory, texts: Path, tiny_model: Path, tiny_encoder: Path) -> list[str]:
    """`safesail run` of the recipe in miniature, to which `--out FOLDER` is added."""
    folder = tmp_path_factory.mktemp("pairs")
    for kind, made in (("safety", rows("safety", 60, SAFE, HARM)), ("chat", rows("chat", 30, RIGHT, WRONG))):
        (folder / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in made))
    sources = [f'{{path = "{folder}/{kind}.jsonl", kind = "{kind}", licence = "mit"}}' for kind in ("safety", "chat")]
    settings = {
        "name": '"mini"',
        "model.path": f'"{tiny_model}"',
        "model.base_model": '"safesail-tests/tiny-llama"',
        "model.note": '"Random weights."',
        "preferences.sources": f"[{', '.join(sources)}]",
        "reward.n_blocks": "2",
        "reward.trained_blocks": "1",
        "reward.max_length": "128",
        "reward.learning_rate": "3e-3",
        "reward.batch_pairs": "8",
        "corpus.n_tokens": "6000",
        "corpus.n_held_out_tokens": "600",
        "corpus.sources": f'[{{path = "{texts}", licence = "cc0-1.0"}}]',
        "harvest.hook_points": '["layers.1"]',
        "harvest.window": "128",
        "train.d_sae": "96",
        "train.k": "[6]",
        "train.batch_size": "256",
        "train.aux_k": "16",
        "tune.batch_size": "32",
        "tune.epochs": "2",
        "salience.n_latents": "48",
        "salience.min_contexts": "3",
        "rate.encoder": f'"{tiny_encoder}"',
        "rate.keep": "1",
        "edit.poison": "[0.05, 0.2]",
        "edit.denoise": "[0.1]",
        "compare.seeds": "2",
        "compare.epochs": "3",
        "runtime.checkpoint_seconds": "0.05",
        "runtime.threads": "1",
    }
    options = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return [sys.executable, "-m", "safesail.cli", "run", str(REPOSITORY / "hub/recipes/safer-demo.toml"), *options]


def said(*arguments: str, code: int = 0) -> str:
    """What the command line says, on either stream."""
    done = subprocess.run(
        [sys.executable, "-m", "safesail.cli", *arguments], capture_output=True, text=True, timeout=300, cwd=REPOSITORY
    )
    assert done.returncode == code, done.stderr
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def run(command: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "mini"
    subprocess.run([*command, "--out", str(folder)], check=True, cwd=REPOSITORY, timeout=300)
    return folder


def published(run: Path) -> dict[str, bytes]:
    files = (path for part in PARTS for path in (run / part).rglob("*") if path.is_file())
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def test_every_stage_is_done_and_the_next_command_said(run: Path):
    told = said("status", str(run))
    assert [line.split()[:2] for line in told.splitlines()[:-1]] == [[name, "done"] for name in REWARD_STAGES]
    assert told.splitlines()[-1].startswith(f"next: safesail serve {run}")
    assert sorted(path.name for path in run.iterdir()) == sorted([*PARTS, "run.json", "scratch"])


def test_a_run_in_steps_ends_with_the_same_bytes(run: Path, command: list[str], tmp_path: Path):
    folder = tmp_path / "mini"
    subprocess.run([*command, "--out", str(folder), "--until", "ends"], check=True, cwd=REPOSITORY, timeout=300)
    assert "next: safesail reward" in said("status", str(folder))
    told = said("reward", str(folder), "--until", "rate")
    assert "latents in S+" in told
    said("reward", str(folder))
    assert published(folder) == published(run)


def test_what_is_done_is_not_done_again(run: Path):
    assert said("reward", str(run)).count("done already") == len(REWARD_STAGES)


def test_the_release_is_read_by_the_tools_people_use(run: Path):
    from datasets import load_dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    sae = Sae.from_pretrained(run / "saes")
    assert sae.config.hook_point == "layers.1"
    assert sae.config.normalize_activations == "layer_norm"
    model = AutoModelForSequenceClassification.from_pretrained(run / "reward")
    tokenizer = AutoTokenizer.from_pretrained(run / "reward")
    pair = load_dataset(str(run / "preferences"), "pairs", split="train")[0]
    scores = {row["pair_id"]: row for row in load_dataset(str(run / "salience"), "scores", split="train")}
    rewards = []
    for side in ("chosen", "rejected"):
        messages = [*pair["prompt"], *pair[side]]
        ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            rewards.append(float(model(**ids).logits))
    assert rewards[0] - rewards[1] == pytest.approx(scores[pair["id"]]["margin"], abs=1e-4)


def test_the_release_holds_what_verify_asks_for(run: Path):
    findings = json.loads(said("verify", str(run), "--json"))
    assert not [finding for finding in findings["findings"] if finding["status"] == "fails"]


COMPUTED = {
    ("reward", "recomputed: accuracies"),
    ("salience", "recomputed: validity"),
    ("salience", "recomputed: edits"),
    ("reward", "recomputed: rewards"),
    ("saes", "recomputed: fidelity"),
    ("salience", "recomputed: salience"),
    ("salience", "recomputed: intervals"),
    ("salience", "recomputed: scores"),
}


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """The release as others have it, without the run that made it."""
    for part in PARTS:
        shutil.copytree(run / part, tmp_path / "copy" / part)
    return tmp_path / "copy"


def test_what_a_run_published_is_computed_again(copy: Path):
    findings = verify(copy, recompute=True)
    assert by_status(findings, "fails") == {}
    holds = by_status(findings, "holds")
    assert holds.keys() >= COMPUTED
    assert re.search(r"EV published (\S+), computed \1$", holds["saes", "recomputed: fidelity"])
    assert set(by_status(findings, "skipped")) == {
        ("release", "recomputed: ratings"),
        ("release", "recomputed: comparison"),
    }


def test_each_computed_number_that_was_changed_is_found(copy: Path):
    def salience(rows: list[dict[str, Any]]) -> None:
        rows[0]["h_chosen"] *= 1.1
        rows[1]["low"] -= 0.1

    def scores(rows: list[dict[str, Any]]) -> None:
        rows[0]["reward_chosen"] += 0.1
        rows[0]["safe_rejected"] += 1.0
        rows[1]["n_chosen"] += 1

    edit_rows(copy / "salience/salience/train.parquet", salience)
    edit_rows(copy / "salience/scores/train.parquet", scores)
    edit_rows(copy / "salience/edits/train.parquet", lambda rows: rows[0].update(pair_id="safety-none"))
    edit_json(copy / "salience/validity.json", lambda data: data["rows"][0]["share"].update(value=0.123))
    edit_json(copy / "reward/accuracy.json", lambda data: data["safety"]["held_out"].update(low=0.123))
    edit_json(copy / "saes/config.json", lambda data: data["saes"][0].update(explained_variance=0.99))
    fails = by_status(verify(copy, recompute=True), "fails")
    assert fails.keys() >= COMPUTED
    told = {check.removeprefix("recomputed: "): fails[part, check] for part, check in COMPUTED}
    assert re.fullmatch(
        r"accuracy.json: safety.held_out.low is published as 0.123, computed as 0\.\S+\.", told["accuracies"]
    )
    assert "rows.0.share.value is published as 0.123, computed as" in told["validity"]
    assert re.match(
        r"poisoned-0.05 \(seed None\) takes safety-none at rank 0, the scores give safety-\d+\.", told["edits"]
    )
    assert re.match(r"the reward of safety-\d+ \(chosen\) is published as", told["rewards"])
    assert re.match(r"explained_variance is published as 0.99, computed as", told["fidelity"])
    assert re.match(r"h⁺ / C of latent \d+ is published as", told["salience"])
    assert re.match(r"low of s of latent \d+ is published as", told["intervals"])
    assert re.search(r"safety-\d+ has \d+ and \d+ segment ends, computed \[.* \(and 1 more\)$", told["scores"])


def test_what_is_needed_to_compute_again_is_said(copy: Path):
    edit_json(copy / "saes/config.json", lambda data: data.update(tokenizer_hash="another"))
    skipped = by_status(verify(copy, recompute=True), "skipped")
    assert "is not the one that the SAE was trained with" in skipped["release", "recomputed: salience"]
    edit_json(copy / "saes/config.json", lambda data: data.update(tokenizer_hash=None))
    edit_rows(copy / "salience/salience/train.parquet", lambda rows: rows[0].update(latent=96))
    skipped = by_status(verify(copy, recompute=True), "skipped")
    assert "has latents that the SAE of 96 has not" in skipped["release", "recomputed: salience"]
    edit_rows(copy / "salience/scores/train.parquet", lambda rows: rows[0].update(reward_chosen=None))
    skipped = by_status(verify(copy, recompute=True), "skipped")
    assert "has an empty place in its column reward_chosen" in skipped["release", "recomputed: pairs"]
    edit_rows(copy / "salience/scores/train.parquet", lambda rows: rows[0].update(reward_chosen=0.0))
    edit_rows(copy / "preferences/pairs/train.parquet", lambda rows: rows[0].update(chosen=[]))
    skipped = by_status(verify(copy, recompute=True), "skipped")
    assert "an answer of the published pairs is empty" in skipped["release", "recomputed: pairs"]
    edit_rows(copy / "preferences/pairs/train.parquet", lambda rows: rows.pop(0))
    edit_rows(copy / "salience/scores/train.parquet", lambda rows: rows.pop())
    skipped = by_status(verify(copy, recompute=True), "skipped")
    assert skipped["release", "recomputed: pairs"] == "not checked: the scores are not of the published pairs."
    shutil.rmtree(copy / "preferences")
    skipped = by_status(verify(copy, recompute=True), "skipped")
    assert skipped["release", "recomputed: pairs"] == "not checked: it needs preferences."


def test_the_reward_model_learns_what_the_pairs_show(run: Path):
    accuracy = Run.open(run).json_of("reward", "accuracy.json")
    assert accuracy["safety"]["held_out"]["low"] > 0.5  # every harmful answer has words that no safe one has


def test_the_cost_of_rating_is_said_without_asking(run: Path):
    estimate = json.loads(said("reward", str(run), "--until", "rate", "--dry-run", "--json"))
    assert estimate["n_requests"] > 0
    assert estimate["cost_usd"] == 0.0


def test_the_plan_counts_the_pairs_that_were_gathered(run: Path):
    told = said("reward", str(run), "--until", "compare", "--force", "--dry-run")
    assert "90 pairs of at most 2 × 128" in told
    assert "compare: model" in told


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("harvest",), "is the run of a reward model; its stages are made with `safesail reward"),
        (("explain", "--dry-run"), "--until STAGE` (preferences, reward, harvest"),
        (("reward", "--until", "explain"), "--until explain: there is no such stage; stages are preferences, reward"),
        (("inspect", "hello"), "reward model"),
    ],
)
def test_verbs_of_the_other_kind_say_what_to_type(run: Path, arguments: tuple[str, ...], sentence: str):
    verb, *others = arguments
    assert sentence in said(verb, str(run), *others, code=2)


def test_the_readme_snippet_runs_as_printed(run: Path, capsys: pytest.CaptureFixture[str]):
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(encoding="utf-8"), flags=re.S)
    (block,) = [block for block in blocks if "RewardInspector" in block]
    exec(block.replace("runs/safer-demo", str(run)), names := {})
    assert names["compared"].margin == names["compared"].chosen.reward - names["compared"].rejected.reward
    assert "layers.1/" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["trajectories", "steer", "knowledge", "monitor"])
def test_the_diagnosis_of_neurons_says_what_it_needs(run: Path, verb: str):
    more = {"steer": ["--neuron", "layers.1/3"], "knowledge": ["--neuron", "layers.1/3"]}.get(verb, [])
    text = [] if verb == "knowledge" else ["hello"]
    assert "reward model" in said(verb, str(run), *text, *more, code=2)


def test_the_verb_refuses_a_run_of_the_other_kind(demo_run: Path):
    assert "is not the run of a reward model; its verbs are harvest, train" in said("reward", str(demo_run), code=2)


def test_another_rating_needed_for_a_safety_latent_makes_only_what_it_changes_anew(
    run: Path, command: list[str], tmp_path: Path
):
    changed = Run.open(run)
    recipe = changed.recipe.model_copy(update={"rate": changed.recipe.rate.model_copy(update={"keep": 5})})
    from safesail.pipeline import RewardPipeline

    pipeline = RewardPipeline(Run(run, recipe))
    states = {name: pipeline.run.state(name) for name in REWARD_STAGES}
    stale = [name for name, state in states.items() if state != "done"]
    assert stale == ["rate", "score", "edit", "compare", "build"]
