"""Recipes say what is wrong with them, and a run folder knows what is done, stale or missing."""

import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest

from safesail import Recipe, Run
from safesail.assets import asset
from safesail.errors import InputError
from safesail.recipe import differences
from safesail.reward_recipe import RewardRecipe, load_recipe, parse_recipe
from safesail.run import STAGES, dependents, fingerprint, write_json

SMALL = """
name = "small"
[model]
path = "models/tiny"
[corpus]
n_tokens = 1000
n_held_out_tokens = 100
[[corpus.sources]]
path = "a.jsonl"
[[corpus.sources]]
path = "b.jsonl"
[harvest]
hook_points = ["layers.0.mlp"]
[train]
d_sae = 64
k = [4, 8]
[explain]
encoder = "models/encoder"
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "small.toml"
    path.write_text(SMALL)
    return path


@pytest.fixture
def load(recipe_file: Path) -> Any:
    return lambda *overrides: Recipe.load(recipe_file, overrides)


# --- recipes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [path.stem for path in sorted(asset("hub/recipes").glob("*.toml"))])
def test_every_shipped_recipe_is_valid_and_bears_its_file_name(name: str):
    recipe = load_recipe(asset(f"hub/recipes/{name}.toml"))
    assert recipe.name == name
    assert isinstance(recipe, RewardRecipe) == name.startswith("safer")
    assert parse_recipe(json.loads(json.dumps(recipe.dump()))) == recipe


def test_a_recipe_of_the_other_kind_says_how_it_is_read():
    with pytest.raises(InputError, match=r"safer-demo.toml has preferences, so it is a recipe of SAFER; read it with"):
        Recipe.load(asset("hub/recipes/safer-demo.toml"))


@pytest.mark.parametrize(
    ("override", "start", "known"),
    [
        ("sed=1", "sed is not a setting", "collect, corpus, eval, explain, harvest, model, name"),
        ("train.kk=4", "train.kk is not a setting", "architectures, aux_coefficient, aux_k, bandwidth, batch_size"),
        ("model.licens=x", "model.licens is not a setting", "base_model, dtype, licence, note, path, revision"),
        (
            "runtime.thread=1",
            "runtime.thread is not a setting",
            "api_key_env, base_url, budget_tokens, budget_usd, checkpoint_seconds",
        ),
        ("tokens.sink=1", "tokens.sink is not a setting", "exclude_special, roles, sink_norm_multiple"),
    ],
)
def test_an_unknown_key_is_named_with_the_known_ones(load: Any, override: str, start: str, known: str):
    with pytest.raises(InputError) as caught:
        load(override)
    assert f"{start} (known here: {known}" in str(caught.value)
    assert "small.toml" in str(caught.value)


def test_an_unknown_key_inside_the_sources_is_named_with_the_known_ones(recipe_file: Path):
    recipe_file.write_text(SMALL.replace('path = "b.jsonl"', 'path = "b.jsonl"\nweigth = 2'))
    with pytest.raises(InputError) as caught:
        Recipe.load(recipe_file)
    known = "about, field, licence, name, origin, path, split, weight"
    assert f"corpus.sources.1.weigth is not a setting (known here: {known})." in str(caught.value)


def test_all_mistakes_are_listed_at_once(load: Any):
    with pytest.raises(InputError) as caught:
        load("sed=1", "train.kk=4", "harvest.window=0")
    assert all(word in str(caught.value) for word in ("sed is not", "train.kk is not", "harvest.window: "))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.k=[4, 65]", "train: k = 65 exceeds d_sae = 64"),
        ("train.d_sae=7", "train: k = 8 exceeds d_sae = 7"),
        ("train.k=[4, 4]", "train: k names one value twice"),
        ("train.k=[]", r"train: architecture topk needs k, as train\.k = \[32, 64\]"),
        ("train.k=[0]", r"train\.k\.0: .* greater than or equal to 1 \(given: 0\)"),
        ("train.k=many", r"train\.k: .* \(given: 'many'\)"),
        ("train.d_sae=2.5", r"train\.d_sae: .*integer.* \(given: 2\.5\)"),
        ("train.learning_rate=0", r"train\.learning_rate: .* greater than 0"),
        ("train.warmup=1.5", r"train\.warmup: .* less than or equal to 1 \(given: 1\.5\)"),
        ("train.architectures=[gated]", r"train\.architectures: .* valid tuple"),
        ('train.architectures=["gated"]', r"train\.architectures\.0: .*'matryoshka' \(given: 'gated'\)"),
        ('train.architectures=["relu"]', r"train: architecture relu needs l1, as train\.l1 = \[0\.1\]"),
        ("train.architectures=[]", r"train\.architectures: .* at least 1 item"),
        ("train.widths=[16, 65]", "train: widths holds 65, more than d_sae = 64"),
        ("train.l1=[0]", r"train\.l1\.0: .* greater than 0"),
        ("train.epochs=2:train.stream_tokens=10000", "train: epochs is for harvested activations"),
        ("train.stream_tokens=10000:train.buffer_tokens=9", "train: buffer_tokens = 9 does not fill a batch of"),
        ("corpus.n_held_out_tokens=501", "corpus: n_held_out_tokens = 501 is more than half of n_tokens = 1000"),
        ("corpus.n_tokens=0", r"corpus\.n_tokens: .* greater than or equal to 1"),
        ("corpus.sources=[]", r"corpus\.sources: .* at least 1 item"),
        ("corpus.sources=[{weight = 1.0}]", r"corpus\.sources\.0\.path is missing"),
        ('corpus.sources=[{path = "a", weight = 0}]', r"corpus\.sources\.0\.weight: .* greater than 0"),
        ('harvest.hook_points=["layers.0", "layers.0"]', "harvest: hook_points names one twice"),
        ("tokens.sink_norm_multiple=1", r"tokens\.sink_norm_multiple: .* greater than 1"),
        ("score.backend=endpoint", "score: backend is 'endpoint' but model is empty; name the endpoint's model"),
        ('score.methods=["guess"]', r"score\.methods\.0: .*'text-lexical' or 'text-llm' \(given: 'guess'\)"),
        ('explain.languages=["English"]', r"explain\.languages\.0: String should match"),
        ("select.fdr=1", r"select\.fdr: .* less than 1"),
        ("runtime.budget_usd=-1", r"runtime\.budget_usd: .* greater than or equal to 0"),
        ("explain.backend=cloud", r"explain\.backend: .*'local' or 'endpoint'"),
        ("name=../up", r"name: .* \(given: '\.\./up'\)"),
        ("name=Big Name", r"name: .* \(given: 'Big Name'\)"),
        ("seed=zero", r"seed: .*integer.* \(given: 'zero'\)"),
    ],
)
def test_a_value_that_cannot_be_is_refused_in_a_sentence(load: Any, override: str, message: str):
    with pytest.raises(InputError, match=message):
        load(*override.split(":"))


def test_a_missing_key_is_named(recipe_file: Path):
    recipe_file.write_text(SMALL.replace('path = "models/tiny"', "").replace("d_sae = 64", ""))
    with pytest.raises(InputError, match=r"model\.path is missing\. train\.d_sae is missing\."):
        Recipe.load(recipe_file)


@pytest.mark.parametrize(
    ("override", "section", "key", "value"),
    [
        ("train.epochs=3", "train", "epochs", 3),
        ("train.learning_rate=5e-4", "train", "learning_rate", 5e-4),
        ("train.k=[2, 3]", "train", "k", (2, 3)),
        ("model.path=other/model", "model", "path", "other/model"),
        ('model.path="other/model"', "model", "path", "other/model"),
        ("model.note=a=b", "model", "note", "a=b"),
        (" train.epochs = 3 ", "train", "epochs", 3),
        ("tokens.exclude_special=false", "tokens", "exclude_special", False),
        ('publish.languages=["en", "zh"]', "publish", "languages", ("en", "zh")),
        ("publish.title=", "publish", "title", ""),
    ],
)
def test_an_override_is_read_as_toml_or_else_as_text(load: Any, override: str, section: str, key: str, value: Any):
    assert getattr(getattr(load(override), section), key) == value


def test_an_override_reaches_an_entry_of_a_list_by_its_number(load: Any):
    first, second = load("corpus.sources.1.path=c.jsonl", "corpus.sources.1.weight=3").corpus.sources
    assert (first.path, first.weight) == ("a.jsonl", 1.0)
    assert (second.path, second.weight) == ("c.jsonl", 3.0)
    assert load("train.k.0=2").train.k == (2, 8)


def test_overrides_reach_the_top_level_and_the_last_one_wins(load: Any):
    assert load("seed=3", "seed=4").seed == 4


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epochs", r"'train\.epochs' is not of the form section\.key=value"),
        ("=3", "'=3' is not of the form"),
        ("seed.deep=3", r"seed is a value, not a section|seed: "),
        ("name.deep=3", "name is a value, not a section"),
        ("train.k.0.deep=3", "0 is a value, not a section"),
        ("corpus.sources.2.path=c", "'2' is not the number of an entry of the list; there are 2, counted from 0"),
        ("corpus.sources.-1.path=c", "'-1' is not the number of an entry"),
        ("corpus.sources.first.path=c", "'first' is not the number of an entry"),
        ("train.k.2=3", "'2' is not the number of an entry of the list; there are 2"),
    ],
)
def test_an_override_of_another_form_is_refused(load: Any, override: str, message: str):
    with pytest.raises(InputError, match=message):
        load(override)


def test_a_recipe_that_is_not_there_or_not_toml_is_named(tmp_path: Path):
    with pytest.raises(InputError, match=r"no recipe .*gone\.toml; the shipped ones are in hub/recipes/"):
        Recipe.load(tmp_path / "gone.toml")
    for name, content in (("bad.toml", b"name = "), ("latin.toml", b'name = "\xff"')):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=rf"{name} is not valid TOML"):
            Recipe.load(tmp_path / name)


def test_a_recipe_survives_being_dumped(load: Any):
    recipe = load()
    assert Recipe.parse(json.loads(json.dumps(recipe.dump()))) == recipe


def test_differences_name_the_nested_key_with_both_values_and_leave_runtime_out(load: Any):
    old, new = load().dump(), load("train.k=[16]", "seed=1", "runtime.threads=2", "publish.title=T").dump()
    assert differences(old, new) == ["publish.title was '', is 'T'", "seed was 0, is 1", "train.k was [4, 8], is [16]"]
    assert differences(old, old) == []
    assert differences({"a": 1, "b": {"c": 2}}, {"b": {"d": 3}}) == [
        "a was 1, is None",
        "b.c was 2, is None",
        "b.d was None, is 3",
    ]


def test_a_long_value_is_shortened_in_differences():
    (line,) = differences({"a": "x" * 500}, {"a": "y"})
    assert len(line) < 120


# --- runs ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path, load: Any) -> Run:
    return Run.create(tmp_path / "run", load())


def finish(run: Run, *names: str) -> None:
    for name in names:
        with run.stage(name) as work:
            (work.folder / "result.txt").write_text(name)


def states(run: Run) -> dict[str, str]:
    return {name: run.state(name) for name in STAGES}


def test_a_fresh_run_misses_every_stage(run: Run):
    assert set(states(run).values()) == {"missing"}
    ledger = json.loads((run.folder / "run.json").read_text())
    assert (ledger["stages"], ledger["recipe"]["name"]) == ({}, "small")


def test_another_recipe_is_refused_with_the_differences_and_a_way_on(run: Run, load: Any):
    with pytest.raises(InputError) as caught:
        Run.create(run.folder, load("train.k=[16]", "seed=1"))
    message = str(caught.value)
    assert "seed was 0, is 1; train.k was [4, 8], is [16]" in message
    assert "--out" in message
    assert "--adopt" in message
    assert Run.open(run.folder).recipe == load()  # nothing was changed


def test_another_recipe_is_taken_with_adopt(run: Run, load: Any):
    Run.create(run.folder, load("seed=1"), adopt=True)
    assert Run.open(run.folder).recipe.seed == 1


def test_runtime_changes_are_no_difference(run: Run, load: Any):
    finish(run, "harvest", "train")
    again = Run.create(run.folder, load("runtime.threads=2", "runtime.concurrency=3", "runtime.checkpoint_seconds=1"))
    assert (again.state("harvest"), again.state("train")) == ("done", "done")
    assert Run.open(run.folder).recipe.runtime.threads == 2


def test_a_folder_of_something_else_is_refused(tmp_path: Path, load: Any):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"is not empty and has no run\.json; give another folder with --out"):
        Run.create(tmp_path, load())
    assert not (tmp_path / "scratch").exists()


def test_a_folder_that_is_no_run_cannot_be_opened(tmp_path: Path):
    with pytest.raises(InputError, match=r"has no run\.json, so it is not a run; type `safesail run RECIPE --out"):
        Run.open(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"schema": 99}', "has schema 99.* safesail reads schema 1"),
        ('{"recipe": ', "is not valid JSON"),
        ("[]", "run.json"),
        ('{"schema": 1}', "run.json"),
    ],
)
def test_a_ledger_that_cannot_be_read_is_an_input_error(run: Run, load: Any, content: str, message: str):
    (run.folder / "run.json").write_text(content)
    with pytest.raises(InputError, match=message):
        Run.open(run.folder)
    with pytest.raises(InputError, match=message):
        Run.create(run.folder, load())


def test_a_finished_stage_is_done_with_its_facts_and_leaves_no_partial_folder(run: Run):
    with run.stage("harvest") as work:
        (work.folder / "result.txt").write_text("x")
        work.facts["n_tokens"] = 7
    assert run.state("harvest") == "done"
    assert run.record("harvest") == {
        "stage": "harvest",
        "fingerprint": run.expected_fingerprint("harvest"),
        "seconds": run.record("harvest")["seconds"],
        "n_tokens": 7,
    }
    assert sorted(path.name for path in run.result("harvest").iterdir()) == ["result.txt", "stage.json"]
    assert not (run.scratch / ".harvest.partial").exists()
    assert json.loads((run.folder / "run.json").read_text())["stages"]["harvest"]["n_tokens"] == 7


def test_a_result_that_is_not_there_names_the_command(run: Run):
    with pytest.raises(InputError, match=r"no result of train yet; type `safesail train "):
        run.result("train")


@pytest.mark.parametrize(
    ("override", "stale"),
    [
        ("publish.title=T", {"build"}),
        ("name=other", {"build"}),
        ("score.segment_tokens=4", {"score", "build"}),
        ("explain.max_tokens=9", {"explain", "score", "build"}),
        ("collect.n_top=3", {"collect", "explain", "score", "build"}),
        ("select.min_pairs=3", {"select", "collect", "explain", "score", "build"}),
        ("eval.n_ce_tokens=3", {"eval", "select", "collect", "explain", "score", "build"}),
        ("train.epochs=2", set(STAGES) - {"harvest"}),
        ("corpus.context=64", set(STAGES)),
        ("tokens.exclude_special=false", set(STAGES)),
        ("seed=1", set(STAGES)),
        ("model.path=other", set(STAGES)),
        ("runtime.threads=1", set()),
    ],
)
def test_a_change_makes_its_stage_and_those_after_it_stale(run: Run, load: Any, override: str, stale: set[str]):
    finish(run, *STAGES)
    changed = Run.create(run.folder, load(override), adopt=True)
    assert states(changed) == {name: "stale" if name in stale else "done" for name in STAGES}


@pytest.mark.parametrize(
    ("outside", "first"),
    [("model", "harvest"), ("texts", "harvest"), ("pairs", "select"), ("encoder", "explain"), ("cards", "build")],
)
def test_a_change_outside_the_recipe_makes_its_readers_stale(run: Run, outside: str, first: str):
    finish(run, *STAGES)
    changed = Run(run.folder, run.recipe, inputs={outside: "changed"})
    assert next(name for name, state in states(changed).items() if state == "stale") == first
    assert changed.state("build") == "stale"


def test_a_stage_made_anew_replaces_its_old_result(run: Run, load: Any):
    finish(run, "harvest")
    (run.result("harvest") / "old.txt").write_text("old")
    changed = Run.create(run.folder, load("seed=1"), adopt=True)
    finish(changed, "harvest")
    assert changed.state("harvest") == "done"
    assert not (changed.result("harvest") / "old.txt").exists()


def work_halfway(run: Run, name: str) -> None:
    with run.stage(name) as work:
        (work.folder / "half.txt").write_text("half")
        raise KeyboardInterrupt


def interrupt(run: Run, name: str) -> None:
    with pytest.raises(KeyboardInterrupt):
        work_halfway(run, name)


def test_an_interrupted_stage_goes_on_with_its_partial_work(run: Run, load: Any):
    interrupt(run, "harvest")
    assert run.state("harvest") == "missing"
    again = Run.create(run.folder, load("runtime.threads=1"))
    with again.stage("harvest") as work:
        assert (work.folder / "half.txt").read_text() == "half"
    assert (again.result("harvest") / "half.txt").is_file()


def test_partial_work_for_another_fingerprint_is_dropped(run: Run, load: Any):
    interrupt(run, "harvest")
    changed = Run.create(run.folder, load("seed=1"), adopt=True)
    with changed.stage("harvest") as work:
        assert not (work.folder / "half.txt").exists()
    assert changed.state("harvest") == "done"


def test_an_interrupted_remake_leaves_the_old_result_in_place(run: Run, load: Any):
    finish(run, "harvest")
    changed = Run.create(run.folder, load("seed=1"), adopt=True)
    interrupt(changed, "harvest")
    assert changed.state("harvest") == "stale"
    assert (changed.result("harvest") / "result.txt").read_text() == "harvest"
    assert Run.create(run.folder, load(), adopt=True).state("harvest") == "done"


def hold(folder: Path, recipe: Recipe, held: Any, release: Any) -> None:
    with Run(folder, recipe).lock():
        held.set()
        release.wait(30)


def test_a_second_process_is_locked_out_until_the_first_is_done(run: Run):
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    other = context.Process(target=hold, args=(run.folder, run.recipe, held, release))
    other.start()
    assert held.wait(60)
    with pytest.raises(InputError, match="another process is working in"), run.lock():
        pass
    release.set()
    other.join(30)
    with run.lock():
        pass


def test_the_lock_is_given_back_after_an_error(run: Run):
    with pytest.raises(ZeroDivisionError), run.lock():
        raise ZeroDivisionError
    with run.lock():
        pass


def test_write_json_leaves_the_old_file_when_it_fails(tmp_path: Path):
    path = tmp_path / "a.json"
    write_json(path, {"a": "枪"})
    assert path.read_text(encoding="utf-8") == '{\n  "a": "枪"\n}\n'
    with pytest.raises(TypeError):
        write_json(path, {"a": [1] * 100_000, "b": object()})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "枪"}


def test_write_json_replaces_the_file_in_one_step(tmp_path: Path):
    """The new text is a file of its own until it is whole: the old one, still open elsewhere, is never written to."""
    path = tmp_path / "a.json"
    write_json(path, [1])
    with open(path) as old:
        write_json(path, [2])
        assert json.load(old) == [1]
    assert json.loads(path.read_text()) == [2]
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_fingerprint_is_the_same_for_equal_values_only():
    assert fingerprint({"a": 1, "b": [2, 3]}) == fingerprint({"b": [2, 3], "a": 1})
    others = [fingerprint({"a": 1, "b": [3, 2]}), fingerprint({"a": 1}), fingerprint({"a": "1", "b": [2, 3]})]
    assert len({fingerprint({"a": 1, "b": [2, 3]}), *others}) == 4
    assert fingerprint("a", "b") != fingerprint("ab")


def test_a_stage_made_anew_makes_all_that_reads_it_missing():
    assert dependents("select") == ["collect", "explain", "score", "build"]
    assert dependents("eval") == ["select", "collect", "explain", "score", "build"]
    assert dependents("build") == []


def test_work_done_again_is_not_followed_by_old_results(run: Run):
    for name in ("harvest", "train", "eval"):
        with run.stage(name):
            pass
    assert run.state("eval") == "done"
    with run.stage("train"):
        pass
    assert (run.state("harvest"), run.state("train"), run.state("eval")) == ("done", "done", "missing")
