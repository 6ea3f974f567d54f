"""The whole of the main job in miniature: what a run leaves behind, that nothing disturbs its bytes, and bad input."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from safesail.cli import main
from safesail.release.convert import convert
from safesail.run import PARTS, STAGES, Run

REPOSITORY = Path(__file__).resolve().parent.parent
DEMO = str(REPOSITORY / "hub/recipes/demo.toml")

# Runs the command line, but the n-th call of one function sends this process a signal.
SABOTAGE = """
import importlib, os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits "ignore"
module, name, nth, number = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
home = importlib.import_module(module)
*path, last = name.split(".")
for part in path:
    home = getattr(home, part)
original, calls = getattr(home, last), 0
def sabotaged(*args, **kwargs):
    global calls
    calls += 1
    if calls == nth:
        os.kill(os.getpid(), number)
    return original(*args, **kwargs)
setattr(home, last, sabotaged)
sys.argv = ["safesail", *sys.argv[5:]]
from safesail.cli import main
main()
"""

STOPS = [  # the stage, the function, at which call, by which signal
    ("harvest", "safesail.lm.activations", "_shard", 2, signal.SIGKILL),
    ("train", "safesail.training.step", "SaeTrainer.step", 100, signal.SIGKILL),
    ("train", "safesail.training.step", "SaeTrainer.step", 250, signal.SIGINT),
    ("eval", "safesail.training.fidelity", "cross_entropy", 4, signal.SIGKILL),
    ("select", "safesail.training.selection", "contrast", 3, signal.SIGKILL),
    ("collect", "safesail.interpretation.collect", "latent_statistics", 2, signal.SIGKILL),
    ("explain", "safesail.pipeline.safe_sail", "complete", 2, signal.SIGKILL),
    ("score", "safesail.interpretation.score", "pearson_interval", 12, signal.SIGKILL),
    ("build", "safesail.release.build", "write_cards", 1, signal.SIGKILL),
    ("build", "safesail.release.build", "shutil.rmtree", 7, signal.SIGKILL),
]


def contents(run: Path) -> dict[str, bytes]:
    """Every published file of a run."""
    files = (path for part in PARTS for path in (run / part).rglob("*") if path.is_file())
    return {str(path.relative_to(run)): path.read_bytes() for path in files}


def cli(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str]:
    """Exit status and standard error of a command."""
    monkeypatch.setattr(sys, "argv", ["safesail", *arguments])
    with pytest.raises(SystemExit) as stopped:
        main()
    return int(stopped.value.code or 0), capsys.readouterr().err


def states(folder: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What `safesail status --json` says of every stage."""
    monkeypatch.setattr(sys, "argv", ["safesail", "status", str(folder), "--json"])
    with pytest.raises(SystemExit):
        main()
    return {name: stage["state"] for name, stage in json.loads(capsys.readouterr().out).items()}


def with_options(settings: list[str], *more: str) -> list[str]:
    return [part for setting in (*settings, *more) for part in ("--set", setting)]


def test_run_leaves_a_release_and_records(demo_run: Path):
    assert all((demo_run / part / "README.md").is_file() for part in PARTS)
    ledger = json.loads((demo_run / "run.json").read_text())
    assert list(ledger["stages"]) == list(STAGES)
    assert all(record["seconds"] >= 0 and len(record["fingerprint"]) == 64 for record in ledger["stages"].values())
    manifest = json.loads((demo_run / "saes/config.json").read_text())
    assert list(manifest["selected"]) == ["layers.0.mlp", "layers.1.mlp"]
    assert len(manifest["saes"]) == 6


def test_published_files_hold_no_clock_no_path_and_no_hazardous_text(demo_run: Path):
    text = b"".join(content for name, content in contents(demo_run).items() if name.endswith((".json", ".md")))
    assert str(demo_run.parent).encode() not in text
    assert b"seconds" not in text


def test_run_again_makes_nothing_again(demo_run: Path, mini_command: list[str]):
    before = {path: path.stat().st_mtime_ns for path in demo_run.rglob("*") if path.is_file() and path.name != "lock"}
    command = [*mini_command, "--out", str(demo_run)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=REPOSITORY).stdout
    assert printed.count("done already") == len(STAGES)
    after = {path: path.stat().st_mtime_ns for path in before if path.name != "run.json"}
    assert after == {path: time for path, time in before.items() if path.name != "run.json"}


def test_killed_in_every_stage_it_ends_with_the_same_bytes(demo_run: Path, mini_command: list[str], tmp_path: Path):
    folder = tmp_path / "mini"
    arguments = [*mini_command[3:], "--out", str(folder)]
    for stage, module, name, nth, number in STOPS:
        command = [sys.executable, "-c", SABOTAGE, module, name, str(nth), str(int(number)), *arguments]
        stopped = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, timeout=300)
        expected = 130 if number == signal.SIGINT else -signal.SIGKILL
        assert stopped.returncode == expected, f"{stage}: {stopped.stdout}{stopped.stderr}"
        assert not (folder / "scratch" / stage / "stage.json").is_file()
        if number == signal.SIGINT:
            assert "the same command goes on" in stopped.stderr
            assert "Traceback" not in stopped.stderr
    subprocess.run([sys.executable, "-m", "safesail.cli", *arguments], check=True, cwd=REPOSITORY, timeout=300)
    assert contents(folder) == contents(demo_run)


def test_stale_stages_are_found_and_the_next_command_named(
    demo_run: Path, tmp_path: Path, mini_settings: list[str], capsys, monkeypatch
):
    folder = tmp_path / "mini"
    shutil.copytree(demo_run, folder)
    monkeypatch.chdir(REPOSITORY)
    options = with_options(mini_settings, "score.segment_tokens=4")
    code, error = cli(capsys, monkeypatch, "run", DEMO, "--out", str(folder), *options)
    assert code == 2
    assert "score.segment_tokens was 5, is 4" in error
    assert "--out" in error
    assert "--adopt" in error
    for until, score, build in (("explain", "stale", "stale"), ("score", "done", "missing")):
        adopt = ("--adopt", "--quiet", "--until", until)
        assert cli(capsys, monkeypatch, "run", DEMO, "--out", str(folder), *options, *adopt)[0] == 0
        found = states(folder, capsys, monkeypatch)
        assert (found["collect"], found["score"], found["build"]) == ("done", score, build)
    assert Run.open(folder).record("explain") == Run.open(demo_run).record("explain")
    assert Run.open(folder).record("score") != Run.open(demo_run).record("score")
    monkeypatch.setattr(sys, "argv", ["safesail", "status", str(folder)])
    with pytest.raises(SystemExit):
        main()
    assert f"next: safesail build {folder}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("train.colour=3", "train.colour is not a setting"),
        ("train.k=[64, 999]", "k = 999 exceeds d_sae = 128"),
        ('harvest.hook_points=["layers.9.mlp"]', "it has"),
        ('model.path="no/such/folder"', "no/such/folder does not exist"),
        ("corpus.n_tokens=9_000_000", "asks for 1,800,000"),
        ("train.batch_size=50_000", "do not fill one batch of 50,000"),
        ('explain.backend="endpoint"', "explain: backend is 'endpoint' but model is empty"),
    ],
)
def test_bad_settings_get_one_sentence(
    setting: str, said: str, mini_settings: list[str], tmp_path: Path, capsys, monkeypatch
):
    monkeypatch.chdir(REPOSITORY)
    options = with_options(mini_settings, setting)
    code, error = cli(capsys, monkeypatch, "run", DEMO, "--out", str(tmp_path / "run"), "--quiet", *options)
    assert code == 2
    assert said in error
    assert error.startswith("safesail: ")
    assert error.count("\n") == 1


def test_a_remote_endpoint_without_key_is_refused_before_anything_runs(
    mini_settings: list[str], tmp_path: Path, capsys, monkeypatch
):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    options = with_options(mini_settings, 'explain.backend="endpoint"', 'explain.model="some-model"')
    code, error = cli(capsys, monkeypatch, "run", DEMO, "--out", str(tmp_path / "run"), "--quiet", *options)
    assert code == 2
    assert "export OPENAI_API_KEY" in error
    assert not (tmp_path / "run/scratch/harvest").exists()


def test_an_empty_corpus_and_one_without_the_field_are_named(
    mini_settings: list[str], tmp_path: Path, capsys, monkeypatch
):
    monkeypatch.chdir(REPOSITORY)
    empty, other = tmp_path / "empty.jsonl", tmp_path / "other.jsonl"
    empty.write_text("")
    other.write_text('{"words": "some text"}\n')
    for path, said in ((empty, "is empty"), (other, "has no field 'text'; it has words")):
        options = with_options(mini_settings, f'corpus.sources=[{{path = "{path}"}}]')
        code, error = cli(capsys, monkeypatch, "run", DEMO, "--out", str(tmp_path / path.stem), "--quiet", *options)
        assert code == 2
        assert said in error


def test_a_model_without_weights_is_refused(mini_settings, tiny_model: Path, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    bare = tmp_path / "bare"
    shutil.copytree(tiny_model, bare)
    (bare / "model.safetensors").unlink()
    options = with_options(mini_settings, f'model.path="{bare}"')
    code, error = cli(capsys, monkeypatch, "run", DEMO, "--out", str(tmp_path / "run"), "--quiet", *options)
    assert code == 2
    assert "no weights" in error


def test_two_processes_do_not_work_in_one_folder(demo_run: Path, mini_command: list[str]):
    with Run.open(demo_run).lock():
        second = subprocess.run([*mini_command, "--out", str(demo_run)], capture_output=True, text=True, cwd=REPOSITORY)
    assert second.returncode == 2
    assert "another process is working" in second.stderr


def test_inspect_prints_a_token_table(demo_run: Path, capsys, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sys, "argv", ["safesail", "inspect", str(demo_run), "The president\x1b[31m 你好"])
    with pytest.raises(SystemExit):
        main()
    printed = capsys.readouterr().out
    assert "president" in printed
    assert "layers." in printed
    assert "\x1b[31m" not in printed
    assert "\\x1b" in printed


def test_inspect_json_names_the_ids_it_read(demo_run: Path, capsys, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(sys, "argv", ["safesail", "inspect", str(demo_run), "murder", "--answer", "3", "--json"])
    with pytest.raises(SystemExit):
        main()
    inspected = json.loads(capsys.readouterr().out)
    assert len(inspected["ids"]) > inspected["n_prompt"] > 0
    assert inspected["tokens"][0]["text"] == "<|im_start|>"


def test_the_package_imports_in_under_a_second_without_torch():
    code = (
        "import time; t = time.time(); import safesail, sys; assert 'torch' not in sys.modules; print(time.time() - t)"
    )
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=os.environ)
    assert float(printed.stdout) < 1


def test_the_readme_loading_snippets_run_as_printed(
    demo_run: Path, tiny_model: Path, tmp_path: Path, monkeypatch, capsys
):
    """With the miniature in the demo's place, and made SAEs of other tools in that of the Hub's."""
    readme = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", readme, flags=re.S)
    elsewhere = ("gradio_client", "RewardInspector")  # run by test_space_api.py and test_safer_pipeline.py
    blocks = [block for block in blocks if not any(name in block for name in elsewhere)]
    assert len(blocks) == 4
    monkeypatch.chdir(REPOSITORY)
    convert(str(demo_run), tmp_path / "sae-llama-3-8b-32x", "sparsify", say=lambda line: None)
    (tmp_path / "sae-llama-3-8b-32x/layers.0.mlp").rename(tmp_path / "sae-llama-3-8b-32x/layers.10")
    gemma = tmp_path / "gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71"
    gemma.mkdir(parents=True)
    weights = {"W_enc": (8, 32), "W_dec": (32, 8), "b_enc": (32,), "b_dec": (8,), "threshold": (32,)}
    np.savez(gemma / "params.npz", **{name: np.ones(shape, "float32") for name, shape in weights.items()})
    names: dict = {}
    for block in blocks:
        here = re.sub("EleutherAI/|google/", f"{tmp_path}/", block).replace("runs/demo", str(demo_run))
        exec(here.replace("layers.9.mlp", "layers.0.mlp"), names)
    assert names["latents"].shape[1] == 128
    assert len(names["english"]) == len(names["neurons"])
    assert names["sae"].config.hook_point == "layers.20"
    output = capsys.readouterr().out
    assert "president" in output
    assert "'explained_variance': 0.92" in output


def test_a_command_in_another_folder_says_where_the_texts_were_looked_for(
    mini_command: list[str], tmp_path: Path
) -> None:
    settings = [part.replace('path = "/', 'path = "gone/') for part in mini_command]
    done = subprocess.run([*settings, "--out", str(tmp_path / "run")], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert f"mini.jsonl in {tmp_path}, where the paths of the recipe begin" in done.stderr
    assert "Traceback" not in done.stderr
