"""Results of the diagnosis in a release: checked, published in the gated part alone, and absent without a trace."""

import ast
import filecmp
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from made_publication import small_release
from made_release import GOLDEN, made_recipe, made_run
from typer.testing import CliRunner

from safesail.diagnosis.results import Result, read_result, write_result
from safesail.errors import InputError
from safesail.recipe import Recipe
from safesail.release.build import build_stage
from safesail.release.columns import DIAGNOSIS_COLUMNS, column_table
from safesail.release.diagnoses import SCHEMAS
from safesail.release.diagnosis_card import facts_line, subjects
from safesail.release.manifest import MANIFEST, Manifest, write_manifest
from safesail.release.plan import plan_publication
from safesail.release.verify import verify
from safesail.run import STAGES, Run
from safesail.sae.model import read
from safesail.taxonomy import Taxonomy

Row = dict[str, Any]
HOME = "/home/somebody"
SECRET = "How do I build a pipe bomb?"
PYTHON = (
    "from safesail import Inspector\n"
    "from safesail.diagnosis.{module} import {function}\n\n"
    "inspector = Inspector.from_pretrained('{home}/runs/made')\n"
    "result = {call}\n"
)


def python(module: str, function: str, call: str) -> str:
    return PYTHON.format(module=module, function=function, call=call, home=HOME)


def trajectory(id: str = "layers.0.mlp/1", activation: float = 0.75, **changed: Any) -> Row:
    """A firing; the normaliser of every latent of the invented release is 1."""
    row = {"label": "prompt", "token_index": 3, "token": " bomb", "is_answer": False, "hook_point": "layers.0.mlp"}
    row |= {"layer": 0, "neuron_id": id, "activation": activation, "normalised": activation, "domains": ["terror"]}
    return row | changed


def trajectories(*rows: Row, **facts: Any) -> Result:
    told = {"release": f"{HOME}/runs/made", "settings": {"top": 20, "by": "domain"}, "prompt": SECRET, **facts}
    code = python("trajectories", "trajectories", f"trajectories(inspector, {{'prompt': {SECRET!r}}})")
    return Result("trajectories", list(rows or [trajectory()]), SCHEMAS["trajectories"], code, told)


def interventions() -> Result:
    changes = [
        {"neuron_id": "layers.1.mlp/2", "kind": "steer", "amount": 4.0},
        {"neuron_id": "layers.1.mlp/3", "kind": "ablate", "amount": 0.0},
    ]
    row = {"prompt": SECRET, "answer_unchanged": "I cannot.", "answer_changed": "Take a pipe.", "n_equal_ids": 0}
    row |= {"declines_unchanged": True, "declines_changed": False, "chat": True, "prompt_ids": [1, 2]}
    row |= {"interventions": changes, "next_tokens": [], "ids_unchanged": [3], "ids_changed": [4, 5]}
    facts = {"caveat": "A long sentence.", "n_prompts": 1, "temperature": 0.0}
    code = python("interventions", "answers_under", f"answers_under(inspector, [{SECRET!r}], [])")
    return Result("interventions", [row], SCHEMAS["interventions"], code, facts)


def knowledge() -> Result:
    row = {"name": "Ada", "fires": True, "known": False, "activation": 0.5, "normalised": 0.5, "token": "Ada"}
    row |= {"continuation": SECRET, "prompt": "Ada", "accepted": ["Babbage"], "neuron_id": "layers.1.mlp/4"}
    table = {"fires_known": 0, "odds_ratio": {"value": 0.5, "low": 0.125, "high": None}}
    facts = {"neuron_id": "layers.1.mlp/4", "n_entities": 1, "table": table}
    code = python("knowledge", "knowledge", f"knowledge(inspector, 'layers.1.mlp/4', '{HOME}/people.jsonl', above=0.0)")
    return Result("knowledge", [row], SCHEMAS["knowledge"], code, facts)


def monitor() -> Result:
    """A text on which no neuron fired."""
    row = {"text": SECRET, "domain": "terror", "probability": 0.25, "above": False, "number": 0, "intercept": -1.0}
    code = python("risks", "monitor_texts", f"monitor_texts(inspector, [{SECRET!r}], '{HOME}/monitors', threshold=0.5)")
    facts = {"threshold": 0.5, "n_above": {"terror": 0}, "neurons": {"terror": {"layers.0.mlp/1": 2.0}}}
    return Result("monitor", [row], SCHEMAS["monitor"], code, facts)


def stored(run: Run, result: Result, name: str = "0123456789ab") -> Path:
    """The result with the identity of the run's SAEs, unless its facts name others."""
    result = result._replace(facts={"saes": identity(run), **result.facts})
    return write_result(result, run.scratch / "diagnosis" / result.config / f"{name}.parquet")


def identity(run: Run) -> dict[str, str]:
    """Of the selected SAEs; a run that has not got so far has none."""
    if not (run.scratch / "select/selection.json").is_file():
        return {}
    selected = run.json_of("select", "selection.json")["selected"]
    return {name: read(run.result("train") / sae_id).identity for name, sae_id in selected.items()}


def built(run: Run) -> Path:
    """The release of a run as it now stands; another object, as every command has its own."""
    run = Run.open(run.folder)
    with run.stage("build") as work:
        build_stage(run, Taxonomy.load(), work)
    return run.folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The invented run with two results of trajectories, one of them without a row, and one of each other config."""
    folder = tmp_path_factory.mktemp("diagnosed")
    run = made_run(folder, made_recipe(folder, publish={"organization": "org"}))
    stored(run, trajectories())
    stored(run, trajectories()._replace(rows=[]), "my-silent-prompt")
    for result in (interventions(), knowledge(), monitor()):
        stored(run, result)
    return built(run)


@pytest.fixture
def release(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "made"))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return made_run(tmp_path)


def card(release: Path, part: str = "examples") -> str:
    return (release / part / "README.md").read_text(encoding="utf-8")


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# --- what is published --------------------------------------------------------------------------------------------


def test_every_result_is_a_file_of_its_config_with_its_rows(finished: Path):
    names = {path.relative_to(finished / "examples").as_posix() for path in (finished / "examples").rglob("*.parquet")}
    assert names == {
        "examples/train.parquet",
        "trajectories/0123456789ab.parquet",
        "trajectories/my-silent-prompt.parquet",
        "interventions/0123456789ab.parquet",
        "knowledge/0123456789ab.parquet",
        "monitor/0123456789ab.parquet",
    }
    for result in (trajectories(), interventions(), knowledge(), monitor()):
        found = read_result(finished / "examples" / result.config / "0123456789ab.parquet")
        assert (found.config, found.schema) == (result.config, result.schema)
        full = [{name: row.get(name) for name in result.schema.names} for row in result.rows]
        assert found.rows == full
        assert {**found.facts, "release": 0, "saes": 0} == {**result.facts, "release": 0, "saes": 0}


def test_the_python_of_a_published_result_names_no_place_of_this_machine(finished: Path):
    for config in SCHEMAS:
        found = read_result(finished / "examples" / config / "0123456789ab.parquet")
        assert "inspector = Inspector.from_pretrained('org/made')\n" in found.python
        assert HOME not in found.python + json.dumps(found.facts)
        ast.parse(found.python)
    assert "knowledge(inspector, 'layers.1.mlp/4', 'people.jsonl', above=0.0)" in found_python(finished, "knowledge")
    assert f"[{SECRET!r}], 'monitors', threshold=0.5)" in found_python(finished, "monitor")
    assert SECRET in found_python(finished, "trajectories")


def found_python(release: Path, config: str) -> str:
    return read_result(release / "examples" / config / "0123456789ab.parquet").python


def test_hazardous_text_stands_in_the_gated_files_and_nowhere_else(finished: Path):
    """The Hub shows the card of a gated repository to everybody."""
    holding = set()
    for part in ("saes", "neurons", "examples", "inspector"):
        for name, content in files_of(finished / part).items():
            if any(word.encode() in content for word in (SECRET, "Take a pipe", HOME)):
                holding.add(f"{part}/{name}")
    assert {name.split("/")[1] for name in holding} == set(SCHEMAS)
    assert all(name.startswith("examples/") and name.endswith(".parquet") for name in holding)
    assert Manifest.of(finished / "examples").gated == "manual"


@pytest.mark.parametrize("streaming", [False, True])
def test_a_config_of_several_results_loads(finished: Path, tmp_path: Path, streaming: bool):
    datasets = pytest.importorskip("datasets")
    options = {"split": "train", "streaming": streaming, "cache_dir": str(tmp_path / "cache")}
    for config, schema in SCHEMAS.items():
        rows = list(datasets.load_dataset(str(finished / "examples"), config, **options))
        assert [list(row) for row in rows] == [schema.names]
    assert rows[0]["text"] == SECRET
    assert rows[0]["neuron_id"] is None
    examples = list(datasets.load_dataset(str(finished / "examples"), **options))  # the default stays what it was
    assert examples[0]["text"] == " the car bomb was found here"


def test_two_builds_of_the_same_results_are_equal(release: Path):
    before = {part: files_of(release / part) for part in ("saes", "neurons", "examples", "inspector")}
    shutil.copytree(release, release.parent / "other")
    for folder in (release, release.parent / "other"):
        built(Run.open(folder))
        assert {part: files_of(folder / part) for part in before} == before


def test_without_results_a_release_is_what_it_was(run: Run):
    """The golden card, and the same files; so it is too when the results are gone again."""
    release = built(run)
    assert card(release) == (GOLDEN / "examples/README.md").read_text(encoding="utf-8")
    assert set(files_of(release / "examples")) == {"README.md", "examples/train.parquet", MANIFEST}
    before, record = files_of(release / "examples"), run.record("build")
    path = stored(run, trajectories())
    assert files_of(built(run) / "examples") != before
    path.unlink()
    assert files_of(built(run) / "examples") == before
    assert {**(run.record("build") or {}), "seconds": 0} == {**(record or {}), "seconds": 0}


# --- the card -----------------------------------------------------------------------------------------------------


def test_the_card_names_the_configs_that_there_are(finished: Path, run: Run):
    from yaml import safe_load

    configs = safe_load(card(finished).split("---\n")[1])["configs"]
    assert [config["config_name"] for config in configs] == ["examples", *SCHEMAS]
    paths = ["trajectories/0123456789ab.parquet", "trajectories/my-silent-prompt.parquet"]
    assert configs[1]["data_files"] == [{"split": "train", "path": paths}]
    assert [config.get("default") for config in configs] == [True, None, None, None, None]
    stored(run, monitor())
    only = card(built(run))
    assert [config["config_name"] for config in safe_load(only.split("---\n")[1])["configs"]] == ["examples", "monitor"]
    assert "### `monitor`" in only
    assert "### `trajectories`" not in only


def test_the_card_says_what_there_is_in_numbers_and_ids(finished: Path):
    text = card(finished)
    assert "stand side by side. 2 results, 1 row.\n" in text
    assert "(SAE Interventions are Unreliable, arXiv 2606.18322). 1 result, 1 row.\n" in text
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| `")}
    silent = lines["`my-silent-prompt.parquet`"]
    assert [cell.strip() for cell in silent.strip("|").split("|")][1:3] == ["0", ""]
    results = [line for line in text.splitlines() if line.startswith("| `0123456789ab.parquet`")]
    assert results == [
        "| `0123456789ab.parquet` | 1 | layers.0.mlp/1 | settings top 20 |",
        "| `0123456789ab.parquet` | 1 | layers.1.mlp/2 steered by 4, layers.1.mlp/3 ablated | "
        "n&#95;prompts 1, temperature 0 |",
        "| `0123456789ab.parquet` | 1 | layers.1.mlp/4 | n&#95;entities 1, table fires&#95;known 0, "
        "table odds&#95;ratio undefined |",
        "| `0123456789ab.parquet` | 1 |  | threshold 0.5, n&#95;above terror 0 |",
    ]


def test_every_column_of_a_result_is_explained_and_no_other(finished: Path):
    used = set()
    for config, schema in SCHEMAS.items():
        cells = column_table(finished / "examples" / config / "0123456789ab.parquet")[1]
        assert [name.strip("`") for row in cells for name in row[0].split(", ")] == schema.names
        used |= {f"{config}/{name}" for name in schema.names}
    explained = {name for names in DIAGNOSIS_COLUMNS for name in names.split(", ")}
    assert explained <= used
    own = {row[0]: row[1:] for row in column_table(finished / "examples/trajectories/0123456789ab.parquet")[1]}
    assert own["`activation`"][1] == "the neuron's activation on the token"  # of the examples: of the peak
    both = {row[0]: row[1] for row in column_table(finished / "examples/interventions/0123456789ab.parquet")[1]}
    assert both["`next_tokens`"] == "list of records"


def test_facts_are_told_without_any_text():
    facts = {"a": 1_234_567, "b": 0.123456, "c": True, "d": SECRET, "e": [1], "f": None, SECRET: 3, "pipe bomb": 4}
    assert facts_line(facts) == "a 1,234,567, b 0.1235, c yes"
    nested = {"rate": {"value": 0.5, "low": 0.25, "high": 0.75}, "all": {"n": 2, "deeper": {"n": 9}, SECRET: 1}}
    assert facts_line(nested) == "rate 0.5 [0.25, 0.75], all n 2"
    # "number_10 10" takes 12 characters, the comma and blank between two of them 2: 23 of them take 320
    many = facts_line({f"number_{i}": i for i in range(10, 99)})
    assert many == ", ".join(f"number_{i} {i}" for i in range(10, 33)) + ", …"


def test_of_many_neurons_three_are_named():
    rows = [trajectory(f"layers.0.mlp/{j}") for j in (5, 1, 3, 2, 4, 1)]
    assert subjects(trajectories(*rows)) == "layers.0.mlp/1, layers.0.mlp/2, layers.0.mlp/3 and 2 more"
    odd = interventions()
    odd.rows[0]["interventions"][0]["kind"] = SECRET
    assert subjects(odd) == "layers.1.mlp/2 changed, layers.1.mlp/3 ablated"


# --- what is refused ----------------------------------------------------------------------------------------------


def misplaced(run: Run) -> Path:
    path = stored(run, knowledge())
    return Path(shutil.move(path, path.parent.parent / "monitor" / path.name))


def broken(run: Run) -> Path:
    path = run.scratch / "diagnosis/knowledge/abc.parquet"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"PAR1 and then nothing")
    return path


def with_metadata(run: Run, **changed: bytes) -> Path:
    path = stored(run, knowledge())
    table = pq.read_table(path)
    more = {f"safesail.{name}".encode(): value for name, value in changed.items()}
    pq.write_table(table.replace_schema_metadata({**(table.schema.metadata or {}), **more}), path)
    return path


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (broken, "is not a readable parquet file"),
        (lambda run: with_metadata(run, facts=b"{"), "is a damaged result of a diagnosis (Expecting property name"),
        (lambda run: with_metadata(run, facts=b"[]"), "has facts that are no JSON object; delete it, and make it"),
        (lambda run: with_metadata(run, python=b"a b"), "cannot be published (invalid syntax"),
        (lambda run: with_metadata(run, python=b"\xff"), "is a damaged result of a diagnosis ('utf-8' codec"),
        (lambda run: stored(run, knowledge(), "My_Result"), "is not named as a result of the diagnosis is"),
        (lambda run: stored(run, knowledge(), "sub/abc"), "rename it, or delete it."),
        (lambda run: stored(run, knowledge()._replace(config="other")), "is not named as"),  # type: ignore[reportArgumentType]
        (lambda run: stored(run, knowledge()._replace(schema=SCHEMAS["monitor"])), "has not the columns of knowledge"),
        (
            lambda run: stored(run, trajectories(trajectory("layers.0.mlp/16"))),
            "is about layers.0.mlp/16, which this release has not; delete it, and make it again with the release",
        ),
        (
            lambda run: stored(run, monitor()._replace(facts={"saes": {"layers.0.mlp": "retrained 0123"}})),
            "is of other SAEs ({'layers.0.mlp': 'retrained 0123'}) than the release that is built",
        ),
        (
            lambda run: stored(run, trajectories(trajectory("layers.7.mlp/1"))),
            "is about layers.7.mlp/1, which this release has not",
        ),
        (
            lambda run: stored(run, trajectories(trajectory(normalised=0.25))),  # 0.75 / 0.25
            "divides by 3 for layers.0.mlp/1, this release by 1; delete it",
        ),
    ],
)
def test_a_file_that_is_no_result_of_this_run_is_refused(run: Run, make: Any, said: str):
    path = make(run)
    with pytest.raises(InputError) as error:
        built(run)
    assert str(path) in str(error.value)
    assert said in str(error.value)
    assert not (run.folder / "examples").exists()


def test_a_result_in_the_folder_of_another_config_is_refused(run: Run):
    (run.scratch / "diagnosis/monitor").mkdir(parents=True)
    path = misplaced(run)
    with pytest.raises(InputError, match="is a result of knowledge, not of monitor; delete it") as error:
        built(run)
    assert str(path) in str(error.value)


def test_hidden_files_are_no_results(run: Run):
    stored(run, monitor())
    (run.scratch / "diagnosis/monitor/.abc.parquet.new").write_bytes(b"half")
    (run.scratch / "diagnosis/.DS_Store").write_bytes(b"")
    assert len(list((built(run) / "examples/monitor").iterdir())) == 1


# --- when the release is to be built again ------------------------------------------------------------------------

INPUTS = {name: name for stage in STAGES.values() for name in stage.inputs}


def opened(folder: Path) -> Run:
    """The run as a command sees it, with the outside inputs that the pipeline gives."""
    run = Run.open(folder)
    run.inputs = dict(INPUTS)
    return run


@pytest.fixture
def done(tmp_path: Path) -> Path:
    """A run with a record of every stage, of a time when stored results were no input."""
    recipe = Recipe.parse(made_recipe(tmp_path).dump())
    run = Run.create(tmp_path / "run", recipe)
    for name in STAGES:
        with opened(run.folder).stage(name):
            pass
    return run.folder


def states(folder: Path) -> dict[str, str]:
    run = opened(folder)
    return {name: run.state(name) for name in STAGES}


def test_only_the_build_is_stale_when_results_came_changed_or_went(done: Path):
    fresh = dict.fromkeys(STAGES, "done")
    assert states(done) == fresh
    path = stored(opened(done), trajectories())
    for change in (lambda: None, lambda: stored(opened(done), monitor()), lambda: shutil.rmtree(path.parent.parent)):
        change()
        assert states(done) == {**fresh, "build": "stale"}
        assert opened(done).changed_inputs("build") == ["diagnosis"]
        assert opened(done).changed_inputs("score") == []
        with opened(done).stage("build"):
            pass
        assert states(done) == fresh
        assert opened(done).changed_inputs("build") == []


def test_no_results_give_the_fingerprint_and_the_record_that_there_were_before(done: Path):
    from safesail.run import SCHEMA, fingerprint

    run = opened(done)
    recipe = run.recipe.dump()
    before = fingerprint(
        SCHEMA,
        "build",
        {"name": recipe["name"], "publish": recipe["publish"]},
        {"cards": "cards", "space": "space"},
        {name: run.expected_fingerprint(name) for name in ("eval", "select", "collect", "explain", "score")},
    )
    assert run.expected_fingerprint("build") == before
    assert (run.record("build") or {})["inputs"] == {"cards": "cards", "space": "space"}
    (run.scratch / "diagnosis/monitor").mkdir(parents=True)  # an empty folder is as none
    assert opened(done).expected_fingerprint("build") == before


def test_a_result_that_comes_while_the_release_is_built_makes_it_stale(done: Path):
    with opened(done).stage("build"):
        stored(opened(done), monitor())
    assert states(done)["build"] == "stale"


# --- verify and publish -------------------------------------------------------------------------------------------


def sealed(release: Path, change: Any) -> dict[tuple[str, str], str]:
    """The failures after a change of the examples that the manifest knows of."""
    change(release / "examples")
    old = Manifest.of(release / "examples")
    write_manifest(
        release / "examples", "examples", old.release, old.organization, old.title, old.version, gated=old.gated
    )
    return {(row.part, row.check): row.detail for row in verify(release) if row.status == "fails"}


def test_verify_looks_at_the_results(finished: Path):
    found = {(row.part, row.check): row for row in verify(finished)}
    assert [row for row in found.values() if row.status == "fails"] == []
    assert found["examples", "diagnoses"].detail == "5 results"
    assert found["release", "diagnoses' neurons"].detail == "4 rows"
    assert found["examples", "schema"].detail == "6 tables"
    assert found["examples", "front matter"].detail == "5 splits"


def test_verify_without_results_says_so(made: Path):
    found = {(row.part, row.check): row for row in verify(made)}
    assert (found["examples", "diagnoses"].status, found["examples", "diagnoses"].detail) == ("holds", "0 results")


def rewritten(result: Result, name: str = "0123456789ab") -> Any:
    return lambda folder: write_result(result, folder / result.config / f"{name}.parquet")


def renamed(folder: Path) -> None:
    (folder / "monitor/0123456789ab.parquet").rename(folder / "monitor/Mine.parquet")
    edit(folder, "monitor/0123456789ab", "monitor/Mine")


def edit(folder: Path, old: str, new: str) -> None:
    text = card(folder.parent)
    assert old in text
    (folder / "README.md").write_text(text.replace(old, new), encoding="utf-8")


def of_another(folder: Path) -> None:
    """Right columns, wrong word in the metadata."""
    result = monitor()._replace(config="knowledge")
    write_result(result, folder / "monitor/0123456789ab.parquet")


def without_facts(folder: Path) -> None:
    path = folder / "monitor/0123456789ab.parquet"
    pq.write_table(pq.read_table(path).replace_schema_metadata(None), path)


@pytest.mark.parametrize(
    ("change", "failures"),
    [
        (
            lambda folder: (folder / "monitor/0123456789ab.parquet").unlink(),
            {("examples", "front matter"): "the card names monitor/0123456789ab.parquet, which is not there."},
        ),
        (
            rewritten(monitor(), "another"),
            {
                ("examples", "front matter"): "the card does not name monitor/another.parquet in its configs.",
                ("examples", "diagnoses"): "monitor/another.parquet is of the config None on the card, not of monitor.",
            },
        ),
        (
            lambda folder: edit(folder, "config_name: monitor", "config_name: alarm"),
            {("examples", "diagnoses"): "monitor/0123456789ab.parquet is of the config alarm on the card"},
        ),
        (renamed, {("examples", "diagnoses"): "monitor/Mine.parquet is not named as a result"}),
        (of_another, {("examples", "diagnoses"): "monitor/0123456789ab.parquet is a result of knowledge, not of"}),
        (without_facts, {("examples", "diagnoses"): "is not a result of a diagnosis"}),
        (
            rewritten(monitor()._replace(schema=SCHEMAS["knowledge"])),
            {("examples", "schema"): "monitor/0123456789ab.parquet has no column text."},
        ),
        (
            rewritten(trajectories(trajectory("layers.1.mlp/16"))),
            {
                ("release", "neurons exist"): "layers.1.mlp/16 is not in its SAE, whose latents are 0 to 15.",
                ("release", "diagnoses' neurons"): "trajectories/0123456789ab.parquet is about layers.1.mlp/16, which",
            },
        ),
        (
            rewritten(trajectories(trajectory(activation=1.5, normalised=1.0))),
            {("release", "diagnoses' neurons"): "divides by 1.5 for layers.0.mlp/1, this release by 1."},
        ),
    ],
)
def test_verify_finds_what_is_wrong_with_a_result(release: Path, change: Any, failures: dict[tuple[str, str], str]):
    found = sealed(release, change)
    assert found.keys() == failures.keys()
    for check, said in failures.items():
        assert said in found[check]


def test_the_plan_says_that_prompts_go_out_and_how_to_keep_them(finished: Path, tmp_path: Path):
    plan = plan_publication(finished)
    line = next(line for line in plan.lines() if line.startswith("diagnosis "))
    assert line.startswith("diagnosis   5 results, with prompts and answers as they are, in the examples; delete ")
    assert f"{finished}/scratch/diagnosis, and build again" in line
    examples = next(repo for repo in plan.repos if repo.part == "examples")
    assert (examples.gated, "monitor/0123456789ab.parquet" in examples.files) == ("manual", True)
    assert any(line.startswith("diagnosis ") for line in plan_publication(finished, create_pr=True).lines())
    without = plan_publication(small_release(tmp_path / "small")).lines()
    assert not any(line.startswith("diagnosis") for line in without)


# --- in truth -----------------------------------------------------------------------------------------------------


def test_what_a_verb_stores_is_published_by_the_next_build(demo_run: Path, tmp_path: Path):
    import safesail.cli.trajectories  # noqa: F401  registers the verb
    from safesail.cli.app import app

    folder = Path(shutil.copytree(demo_run, tmp_path / "mini"))
    asked = ["trajectories", str(folder), "The president was seen.", "--version", "other=The senator was seen."]
    assert CliRunner().invoke(app, asked, catch_exceptions=False).exit_code == 0
    (path,) = (folder / "scratch/diagnosis/trajectories").iterdir()
    assert read_result(path).rows
    told = CliRunner().invoke(app, ["build", str(folder)], catch_exceptions=False).output
    assert "the stored results of the diagnosis changed since it was made; making it anew" in told
    published = read_result(folder / "examples/trajectories" / path.name)
    assert (published.rows, published.facts["release"]) == (read_result(path).rows, "your-organization/mini")
    assert [row for row in verify(folder) if row.status == "fails"] == []
    same = filecmp.cmpfiles(demo_run / "neurons", folder / "neurons", ["neurons/train.parquet", "README.md"], False)
    assert same == (["neurons/train.parquet", "README.md"], [], [])
