"""Verifying a release: every check breaks by what it is for and by nothing else, in a folder and on the Hub."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hub_double import HubDouble
from safetensors.torch import load_file, save_file

from safesail.contrast import Contrast
from safesail.errors import InputError
from safesail.pairs import Pair
from safesail.release.manifest import MANIFEST, REPO_TYPES, Manifest, write_manifest
from safesail.release.recompute import _choice_holds, _phi_and_auroc
from safesail.release.verify import Finding, lines, to_json, verify
from safesail.training.groups import groups_of

Row = dict[str, Any]
FIRST, OTHER = "layers.0.mlp/topk-k4-w16", "layers.0.mlp/relu-c0.1-w16"
"""Of the invented release: the selected SAE of the first hook point, and one that is not selected."""


def by_status(findings: list[Finding], status: str) -> dict[tuple[str, str], str]:
    return {(row.part, row.check): row.detail for row in findings if row.status == status}


def sealed(release: Path) -> None:
    """The manifests again, of the files as they are now: whoever changed them did it before publishing."""
    for part in REPO_TYPES:
        if (release / part / MANIFEST).is_file():
            old = Manifest.of(release / part)
            write_manifest(release / part, part, old.release, old.organization, old.title, old.version, old.gated)


def edit_rows(path: Path, change: Callable[[list[Row]], Any]) -> None:
    table = pq.read_table(path)
    rows = table.to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)


def edit_json(path: Path, change: Callable[[Any], Any]) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    changed = change(data)
    path.write_text(json.dumps(data if changed is None else changed), encoding="utf-8")


def edit_text(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    changed = re.sub(old, new, text, count=1, flags=re.MULTILINE)
    assert changed != text
    path.write_text(changed, encoding="utf-8")


def table(name: str, change: Callable[[list[Row]], Any], part: str = "neurons") -> Callable[[Path], None]:
    return lambda release: edit_rows(release / part / f"{name}.parquet", change)


def first(rows: list[Row], **wanted: Any) -> Row:
    return next(row for row in rows if all(row[key] == value for key, value in wanted.items()))


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "made"))


# --- what holds ---------------------------------------------------------------------------------------------------


def test_a_release_as_it_was_built_holds(release: Path):
    findings = verify(release)
    assert by_status(findings, "fails") == {}
    assert len(by_status(findings, "holds")) >= 40


def test_the_firing_rates_of_a_run_are_those_of_its_sparsity_files(demo_run: Path):
    # two hook points of 128 latents; of the invented release the numbers of tokens differ, so it is not compared
    assert by_status(verify(demo_run), "holds")["release", "firing rates"] == "256 latents"


def test_the_firing_rates_of_other_tokens_are_not_compared(made: Path):
    skipped = by_status(verify(made), "skipped")
    assert list(skipped) == [("release", "firing rates")]
    assert "not of the tokens" in skipped["release", "firing rates"]


# --- what a manifest finds ----------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    ("broken", "check", "said"),
    [
        (lambda r: flip(r / "saes/curve.svg"), ("saes", "checksums"), "curve.svg has the checksum"),
        (lambda r: (r / "inspector/style.css").unlink(), ("inspector", "checksums"), "style.css is missing."),
        (
            lambda r: (r / "saes/curve.svg").write_bytes((r / "saes/curve.svg").read_bytes()[:100]),
            ("saes", "checksums"),
            "curve.svg has 100 bytes instead of",
        ),
        (
            lambda r: (r / "examples/notes.txt").write_text("x"),
            ("examples", "unnamed files"),
            "notes.txt is not in safesail.json.",
        ),
    ],
)
def test_a_file_that_was_changed_afterwards(
    copy: Path, broken: Callable[[Path], Any], check: tuple[str, str], said: str
):
    broken(copy)
    fails = by_status(verify(copy), "fails")
    assert list(fails) == [check]
    assert said in fails[check]


def test_the_first_problem_is_named_and_the_others_are_counted(copy: Path):
    for name in ("app.py", "style.css", "view.py"):
        flip(copy / "inspector" / name)
    detail = by_status(verify(copy), "fails")["inspector", "checksums"]
    assert re.fullmatch(r"app\.py has the checksum \w{12}… instead of \w{12}…: it was changed\. \(and 2 more\)", detail)


def test_hidden_files_and_those_of_a_download_do_not_matter(copy: Path):
    (copy / "saes/.cache/huggingface").mkdir(parents=True)
    (copy / "saes/.cache/huggingface/x.lock").write_text("")
    (copy / "saes/.gitattributes").write_text("")
    assert by_status(verify(copy), "fails") == {}


# --- what else is checked, each broken before the manifest was written --------------------------------------------


def other_sae(release: Path) -> None:
    shutil.copytree(release / "saes" / OTHER, release / "saes/layers.0.mlp/relu-c0.2-w16")


def no_tensor(release: Path) -> None:
    path = release / "saes" / OTHER / "sae_weights.safetensors"
    tensors = load_file(path)
    save_file({name: value for name, value in tensors.items() if name != "b_dec"}, path)


def lacking_column(release: Path) -> None:
    path = release / "neurons/pairs/train.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["concept"]), path)


def other_type(release: Path) -> None:
    path = release / "neurons/pairs/train.parquet"
    rows = pq.read_table(path)
    pq.write_table(rows.set_column(0, "id", pa.array(range(len(rows)), pa.int64())), path)


def new_latent(rows: list[Row]) -> None:
    rows.append({**rows[0], "neuron_id": "layers.0.mlp/16", "latent": 16})


def drop(rows: list[Row], **wanted: Any) -> None:
    rows.remove(first(rows, **wanted))


BROKEN = {
    "a card's broken YAML": (
        lambda r: edit_text(r / "examples/README.md", r"^pretty_name:.*$", "pretty_name: [a"),
        ("examples", "front matter"),
        "the front matter of examples/README.md is not valid YAML",
    ),
    "a card's config that is not there": (
        lambda r: edit_text(r / "neurons/README.md", "path: contrast/train.parquet", "path: contrast/other.parquet"),
        ("neurons", "front matter"),
        "the card names contrast/other.parquet, which is not there. (and 1 more)",
    ),
    "a Space without its app": (
        lambda r: edit_text(r / "inspector/README.md", "^app_file: app.py$", "app_file: main.py"),
        ("inspector", "front matter"),
        "app_file main.py is missing.",
    ),
    "a card's link": (
        lambda r: (r / "inspector/README.md").write_text((r / "inspector/README.md").read_text() + "\n[x](no.md)\n"),
        ("inspector", "links"),
        "the card leads to no.md, which is not there.",
    ),
    "an SAE that is not listed": (
        other_sae,
        ("saes", "config"),
        "config.json does not list layers.0.mlp/relu-c0.2-w16.",
    ),
    "config.json without SAEs": (
        lambda r: edit_json(r / "saes/config.json", lambda data: data.pop("saes") and None),
        ("saes", "config"),
        "saes/config.json is not the config of a release: saes is missing or wrong.",
    ),
    "config.json of a newer schema": (
        lambda r: edit_json(r / "saes/config.json", lambda data: data.update(schema=2)),
        ("saes", "config"),
        "schema is missing or wrong.",
    ),
    "metrics.json": (
        lambda r: edit_json(r / f"saes/{OTHER}/metrics.json", lambda data: data["metrics"].update(l0=7.5)),
        ("saes", "metrics"),
        f"{OTHER}/metrics.json has l0 7.5, config.json 6.5.",
    ),
    "cfg.json of another width": (
        lambda r: edit_json(r / f"saes/{OTHER}/cfg.json", lambda data: data.update(d_sae=17)),
        ("saes", "weights"),
        f"{OTHER}/sae_weights.safetensors: W_enc is (8, 16), its cfg.json says (8, 17). (and 3 more)",
    ),
    "cfg.json of another dtype": (
        lambda r: edit_json(r / f"saes/{OTHER}/cfg.json", lambda data: data.update(dtype="bfloat16")),
        ("saes", "weights"),
        "W_enc is F32, its cfg.json says BF16. (and 3 more)",
    ),
    "cfg.json of another hook point": (
        lambda r: edit_json(r / f"saes/{OTHER}/cfg.json", lambda d: d["metadata"].update(hook_point="layers.1.mlp")),
        ("saes", "weights"),
        f"{OTHER}/cfg.json is of the hook point layers.1.mlp.",
    ),
    "weights without b_dec": (no_tensor, ("saes", "weights"), "sae_weights.safetensors has no tensor b_dec."),
    "half of the weights": (
        lambda r: (r / f"saes/{OTHER}/sae_weights.safetensors").write_bytes(
            (r / f"saes/{OTHER}/sae_weights.safetensors").read_bytes()[:400]
        ),
        ("saes", "weights"),
        "is not a readable safetensors file",
    ),
    "a number of the model-index": (
        lambda r: edit_text(r / "saes/README.md", r"^( +value: ).*$", r"\g<1>99.5"),
        ("saes", "model-index"),
        "= 99.5, config.json",
    ),
    "a table without a column": (lacking_column, ("neurons", "schema"), "pairs/train.parquet has no column concept."),
    "a column of another type": (other_type, ("neurons", "schema"), "pairs/train.parquet: id is int64, not string."),
    "a parquet file that is none": (
        lambda r: (r / "neurons/pairs/train.parquet").write_bytes(b"PAR1"),
        ("neurons", "schema"),
        "pairs/train.parquet is not a readable parquet file",
    ),
    "a row twice": (
        table("pairs/train", lambda rows: rows.append(rows[0])),
        ("neurons", "keys"),
        "pairs has 2 rows for politics.cult.01, en.",
    ),
    "an example twice": (
        table("examples/train", lambda rows: rows.append(rows[0]), "examples"),
        ("examples", "keys"),
        "examples has 2 rows for layers.0.mlp/0, explain, 0.",
    ),
    "a language that is not named": (
        lambda r: edit_json(r / "neurons/languages.json", lambda data: ["en"]),
        ("neurons", "languages"),
        "languages.json does not name zh-Hant.",
    ),
    "a score that is missing": (
        table("scores/train", lambda rows: drop(rows, method="similarity/embedding", neuron_id="layers.0.mlp/1")),
        ("neurons", "same neurons"),
        "scores by similarity/embedding in en lack layers.0.mlp/1.",
    ),
    "a domain of no taxonomy": (
        table("neurons/train", lambda rows: first(rows, domains=[]).update(candidate_for=["magic"])),
        ("neurons", "taxonomy"),
        "has the domain magic, which is not in the taxonomy.",
    ),
    "a category of another domain": (
        table("neurons/train", lambda rows: first(rows, domains=["terror"]).update(category="no-such")),
        ("neurons", "taxonomy"),
        "has the category no-such, which its domains have not.",
    ),
    "a score of a refusal": (
        table("scores/train", lambda rows: first(rows, method="segment-5/lexical").update(status="refused")),
        ("neurons", "statuses"),
        "scores: layers.0.mlp/0 has the status refused and a score.",
    ),
    "an explanation of a refusal": (
        table("explanations/zh-Hant", lambda rows: first(rows, status="refused").update(explanation="x")),
        ("neurons", "statuses"),
        "explanations: layers.1.mlp/3 has the status refused and an explanation.",
    ),
    "a joined column": (
        table("neurons/train", lambda rows: rows[0].update(lexical_score=0.25)),
        ("neurons", "main table"),
        "neurons: layers.0.mlp/0 has lexical_score 0.25, its table 0.2.",
    ),
    "a cost": (
        table("neurons/train", lambda rows: rows[0].update(prompt_tokens=999)),
        ("neurons", "costs"),
        # 100 tokens of one explanation (the other language's are counted with it), 50 of each of two simulations
        "neurons: layers.0.mlp/0 has prompt_tokens 999, its answers make 200.",
    ),
    "a histogram of other tokens": (
        table("quantiles/train", lambda rows: rows[9].update(histogram=[1] * 10)),
        ("neurons", "quantiles"),
        "layers.0.mlp/9 has a histogram of 10 tokens and fires on 20",
    ),
    "a neuron with one coordinate": (
        table("neurons/train", lambda rows: next(row for row in rows if row["x"] is not None).update(y=None)),
        ("neurons", "landscape"),
        "has one coordinate.",
    ),
    "a neuron outside the landscape": (
        table("neurons/train", lambda rows: next(row for row in rows if row["x"] is not None).update(x=1.5)),
        ("neurons", "landscape"),
        "lies outside the landscape.",
    ),
    "quantiles that do not ascend": (
        table("quantiles/train", lambda rows: rows[9].update(p99=1.5)),
        ("neurons", "quantiles"),
        "quantiles: layers.0.mlp/9 has quantiles that do not ascend.",
    ),
    "a normaliser": (
        table("quantiles/train", lambda rows: rows[9].update(normaliser=0.0)),
        ("neurons", "quantiles"),
        "layers.0.mlp/9 has the normaliser 0, its quantiles give 1.",
    ),
    "a firing rate of parts of a token": (
        table("quantiles/train", lambda rows: rows[9].update(firing_rate=0.0205)),
        ("neurons", "quantiles"),
        "layers.0.mlp/9 fires on 20.5 of 1000 tokens.",
    ),
    "a quantile above zero of a rarer latent": (
        # the 0.99 quantile of 1,000 tokens is the 990th from below, and 5 tokens leave 995 zeros
        table("quantiles/train", lambda rows: rows[9].update(firing_rate=0.005)),
        ("neurons", "quantiles"),
        "layers.0.mlp/9 has p99 = 0.5 and fires on 5 of 1000 tokens.",
    ),
    "confusion counts": (
        table("scores/train", lambda rows: first(rows, language="zh-Hant").update(true_negatives=35)),
        ("neurons", "confusion"),
        "confusion counts of 41 units, 5 active; it has 40 units, 5 active.",
    ),
    "an example's text": (
        table("examples/train", lambda rows: rows[0].update(text="else"), "examples"),
        ("examples", "contexts"),
        "examples: layers.0.mlp/0, explain 0: the tokens do not make the text.",
    ),
    "an example's activation": (
        table("examples/train", lambda rows: rows[0].update(activation=2.5), "examples"),
        ("examples", "contexts"),
        "the activation is 2.5, the strongest token's 2.",
    ),
    "a latent that the SAE has not": (
        table("quantiles/train", new_latent),
        ("release", "neurons exist"),
        "layers.0.mlp/16 is not in its SAE, whose latents are 0 to 15.",
    ),
    "the selection table": (
        table("selection/train", lambda rows: first(rows, sae_id=OTHER).update(dense=0.5)),
        ("release", "selection"),
        f"selection: {OTHER} has dense 0.5, saes/ 0.25.",
    ),
    "an SAE's settings in the selection table": (
        table("selection/train", lambda rows: first(rows, sae_id=FIRST).update(k=5)),
        ("release", "selection"),
        f"selection: {FIRST} has k 5, saes/ 4.",
    ),
    "the contrast over all pairs": (
        table("contrast/train", lambda rows: first(rows, sae_id=FIRST, grouping="all").update(i_cdf=0.03)),
        ("release", "selection"),
        f"contrast: {FIRST} over all pairs has i_cdf 0.03, config.json 0.02.",
    ),
    "an example's level": (
        # the activation 1.5 is above the normaliser, 1
        table("examples/train", lambda rows: first(rows, half="score").update(level=3), "examples"),
        ("release", "examples' neurons"),
        "examples: layers.0.mlp/0, score 0 is at level 3, its activation at 10.",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_fails_its_check_and_no_other(copy: Path, name: str):
    broken, check, said = BROKEN[name]
    broken(copy)
    sealed(copy)
    fails = by_status(verify(copy), "fails")
    assert list(fails) == [check]
    assert said in fails[check]


def test_every_check_has_a_test_that_breaks_it(made: Path):
    checked = {row.check for row in verify(made)}
    elsewhere = {"manifest", "checksums", "unnamed files", "one release", "firing rates"}
    elsewhere |= {"diagnoses", "diagnoses' neurons"}  # tests/publishing/test_diagnoses.py
    assert checked == {check for _, (_, check), _ in BROKEN.values()} | elsewhere


def test_a_sparsity_file_of_other_activations(demo_run: Path, tmp_path: Path):
    copy = Path(shutil.copytree(demo_run, tmp_path / "mini", ignore=shutil.ignore_patterns("scratch")))
    selected = json.loads((copy / "saes/config.json").read_text())["selected"]["layers.1.mlp"]
    path = copy / "saes" / selected / "sparsity.safetensors"
    sparsity = load_file(path)["sparsity"]
    sparsity[5] = -0.25  # fires on more than half of the tokens
    save_file({"sparsity": sparsity}, path)
    sealed(copy)
    fails = by_status(verify(copy), "fails")
    assert list(fails) == [("release", "firing rates")]
    assert fails["release", "firing rates"].startswith("layers.1.mlp/5 fires on ")


# --- parts that are missing, or not ours --------------------------------------------------------------------------


def test_a_part_that_is_missing_is_said_and_the_others_are_verified(copy: Path):
    shutil.rmtree(copy / "examples")
    findings = verify(copy)
    assert by_status(findings, "fails") == {}
    skipped = by_status(findings, "skipped")
    assert skipped["examples", "manifest"] == f"{copy} has no folder examples."
    assert skipped["release", "examples' neurons"] == "not checked: it needs examples."
    assert by_status(findings, "holds")["neurons", "main table"] == "6 rows"


@pytest.mark.parametrize("part", REPO_TYPES)
def test_one_part_is_verified_by_itself(made: Path, part: str):
    findings = verify(made / part)
    assert by_status(findings, "fails") == {}
    assert {row.part for row in findings if row.status == "holds"} == {part, "release"}


def test_a_part_of_a_newer_schema_or_another_version(copy: Path):
    edit_json(copy / "saes" / MANIFEST, lambda data: data.update(schema=2))
    edit_json(copy / "neurons" / MANIFEST, lambda data: data.update(version="2.0.0"))
    fails = by_status(verify(copy), "fails")
    assert list(fails) == [("saes", "manifest"), ("release", "one release")]
    assert "has schema 2, and this safesail" in fails["saes", "manifest"]
    assert fails["release", "one release"] == "neurons is of version '2.0.0', examples of '1.0.0'. (and 1 more)"


def test_a_part_in_another_parts_folder(copy: Path):
    shutil.rmtree(copy / "examples")
    shutil.copytree(copy / "neurons", copy / "examples")
    fails = by_status(verify(copy), "fails")
    assert fails["examples", "manifest"] == "it says that it is the part 'neurons'."


@pytest.mark.parametrize(
    ("there", "said"),
    [
        ([], "has no safesail.json and no folder of a release"),
        (["saes/config.json"], "saes has no safesail.json, so it is not a folder of a release"),
    ],
)
def test_a_folder_that_is_no_release(tmp_path: Path, there: list[str], said: str):
    for name in there:
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("{}")
    with pytest.raises(InputError, match=re.escape(said)):
        verify(tmp_path)


def test_a_name_that_is_neither_folder_nor_id():
    with pytest.raises(
        InputError, match=r"'\./no/such/place' is neither an existing folder nor a Hub id like org/name"
    ):
        verify("./no/such/place")


# --- on the Hub ---------------------------------------------------------------------------------------------------


def published(hub: HubDouble, release: Path) -> None:
    for part, repo_type in REPO_TYPES.items():
        if (release / part).is_dir():
            hub.create(repo_type, f"acme/made-{part}", release / part)


def test_on_the_hub_the_findings_are_those_of_the_folder_and_no_weights_are_read(made: Path, tmp_path: Path):
    with HubDouble(tmp_path) as hub:
        published(hub, made)
        with hub.used():
            findings = verify("acme/made")
        assert [row[:3] for row in findings] == [row[:3] for row in verify(made)]
        weights = [seen for seen in hub.requests if seen.path.endswith(".safetensors")]
        assert {seen.status for seen in weights} <= {206, 302}  # parts of files, and where they lie
        cached = [path.name for path in (tmp_path / "home-0").rglob("*.safetensors")]
        assert cached == []
        with hub.used():
            alone = verify("acme/made-saes")
    assert {row.part for row in alone if row.status == "holds"} == {"saes", "release"}


def test_what_is_wrong_on_the_hub(copy: Path, tmp_path: Path):
    flip(copy / "saes/curve.svg")
    content = bytearray((copy / f"saes/{OTHER}/sae_weights.safetensors").read_bytes())
    content[-3] ^= 1
    (copy / f"saes/{OTHER}/sae_weights.safetensors").write_bytes(bytes(content))
    shutil.rmtree(copy / "inspector")
    edit_json(copy / "examples" / MANIFEST, lambda data: data.update(schema=2))
    with HubDouble(tmp_path) as hub:
        published(hub, copy)
        with hub.used():
            findings = verify("acme/made")
    fails, skipped = by_status(findings, "fails"), by_status(findings, "skipped")
    assert list(fails) == [("examples", "manifest"), ("saes", "checksums")]
    assert "curve.svg has the checksum" in fails["saes", "checksums"]
    assert "(and 1 more)" in fails["saes", "checksums"]
    assert "has schema 2" in fails["examples", "manifest"]
    assert "acme/made-inspector" in skipped["inspector", "manifest"]


def test_a_repository_that_is_no_release(tmp_path: Path):
    with HubDouble(tmp_path) as hub:
        hub.create("model", "acme/other-saes", {"README.md": b"# other\n"})
        with hub.used(), pytest.raises(InputError, match=r"safesail\.json"):
            verify("acme/other-saes")


# --- computed once more -------------------------------------------------------------------------------------------


@pytest.fixture
def mini(demo_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(demo_run, tmp_path / "mini", ignore=shutil.ignore_patterns("scratch")))


def test_what_a_run_published_is_computed_again(mini: Path, one_thread: None):
    findings = [row for row in verify(mini, recompute=True) if row.check.startswith("recomputed")]
    assert {row for row in findings if row.status == "fails"} == set()
    holds, skipped = by_status(findings, "holds"), by_status(findings, "skipped")
    saes = [row["id"] for row in json.loads((mini / "saes/config.json").read_text())["saes"]]
    named = [*(("saes", id) for id in saes), ("saes", "selected"), ("neurons", "candidates")]
    named += [("saes", "dead and dense"), ("neurons", "lexical scores")]
    assert {(part, f"recomputed: {name}") for part, name in named} <= set(holds)
    assert re.search(r"I_CDF published (\S+), computed \1;", holds["saes", f"recomputed: {saes[0]}"])
    why = skipped["release", "recomputed: fidelity"]
    assert "held-out texts, which are not published" in why


def test_each_number_that_was_changed_is_found(mini: Path, one_thread: None):
    """Four numbers at once, since the model takes its time: each fails its own check, with both values."""
    config = json.loads((mini / "saes/config.json").read_text())
    other = next(row["id"] for row in config["saes"] if not row["selected"])
    path = mini / "saes" / other / "sparsity.safetensors"
    sparsity = load_file(path)["sparsity"]
    dead = int((sparsity < -9.5).sum())
    sparsity[sparsity.argmax()] = -10.0
    save_file({"sparsity": sparsity}, path)
    edit_json(mini / "saes/config.json", lambda data: data["selected_by"].update(seed=0))
    tables = mini / "neurons"
    edit_rows(tables / "scores/train.parquet", lambda rows: lexical(rows).update(auroc=0.125))
    edit_rows(tables / "contrast/train.parquet", lambda rows: larger(first(rows, sae_id=other, group="terror")))
    edit_rows(tables / "neurons/train.parquet", lambda rows: rows[0].update(n_wins=rows[0]["n_wins"] + 1))
    sealed(mini)
    fails = by_status(verify(mini, recompute=True), "fails")
    assert set(fails) == {
        ("saes", "recomputed: dead and dense"),
        ("neurons", "recomputed: lexical scores"),
        ("saes", f"recomputed: {other}"),
        ("saes", "recomputed: intervals"),
        ("neurons", "recomputed: candidates"),
    }
    assert f"the sparsity file gives {(dead + 1) / 128:.6g}" in fails["saes", "recomputed: dead and dense"]
    assert "auroc is published as 0.125, its confusion counts give" in fails["neurons", "recomputed: lexical scores"]
    assert re.search(r"on terror: i_cdf is published as \S+, computed as \S+\.$", fails["saes", f"recomputed: {other}"])
    assert re.search(r"on terror: i_cdf_low is published as .*\d\.$", fails["saes", "recomputed: intervals"])
    assert "n_wins is published as" in fails["neurons", "recomputed: candidates"]


def lexical(rows: list[Row]) -> Row:
    return next(row for row in rows if row["method"].endswith("/lexical") and row["auroc"] is not None)


def larger(row: Row) -> None:
    row.update(i_cdf=1.05 * row["i_cdf"], i_cdf_low=1.05 * row["i_cdf_low"] + 0.01)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"activity_quantile": 0.9}, "activity_quantile refers to held-out texts, which are not published"),
        ({"reduction": "median"}, "options or pairs are not of a release"),
    ],
)
def test_what_cannot_be_computed_again_is_skipped_with_the_reason(mini: Path, settings: Row, said: str):
    edit_json(mini / "saes/config.json", lambda data: data["selected_by"].update(settings))
    sealed(mini)
    findings = verify(mini, recompute=True)
    assert by_status(findings, "fails") == {}
    assert said in by_status(findings, "skipped")["release", "recomputed: contrast"]


def test_another_model_s_tokenizer_is_refused(mini: Path, tiny_encoder: Path):
    skipped = by_status(verify(mini, recompute=True, model=str(tiny_encoder)), "skipped")
    assert "is not the one these SAEs were trained with" in skipped["release", "recomputed: contrast"]


def test_saes_alone_have_no_pairs_to_be_computed_with(made: Path):
    skipped = by_status(verify(made / "saes", recompute=True), "skipped")
    assert skipped["release", "recomputed: contrast"] == "not checked: it needs neurons."


def test_phi_and_auroc_by_hand():
    # 3 hits, 1 alarm, 2 misses, 34 rests: phi = (3·34 - 1·2) / √(4·5·35·36) = 100 / √25,200
    phi, auroc = _phi_and_auroc(3, 1, 2, 34)
    assert phi == pytest.approx(100 / 25_200**0.5, abs=1e-12)
    assert auroc == pytest.approx((1 + 3 / 5 - 1 / 35) / 2, abs=1e-12)
    assert _phi_and_auroc(0, 0, 2, 34) == (None, None)


def test_the_rule_of_selection_is_applied_again():
    """Eight pairs: the first SAE's latent wins all of them, the second's none; selecting the second breaks the rule."""
    pairs = [
        Pair(id=f"p{i}", domain="d", category="c", concept="x", language="en", with_concept="a", without_concept="b")
        for i in range(8)
    ]
    won, none = torch.ones(8, dtype=torch.float64), torch.zeros(8, dtype=torch.float64)
    better, worse = "layers.0.mlp/topk-k1-w1", "layers.0.mlp/topk-k2-w1"
    entries = {better: {"explained_variance": 0.5}, worse: {"explained_variance": 0.9}}

    def problems(selected: str) -> list[str]:
        measured: Any = SimpleNamespace(
            select=SimpleNamespace(section=SimpleNamespace(criterion="above_null", n_resamples=100), seed=0),
            groups=groups_of(pairs),
            shares={better: Contrast(won, none), worse: Contrast(none, none)},
            config=SimpleNamespace(selected={"layers.0.mlp": selected}, by_id=entries),
        )
        return _choice_holds(measured).problems

    assert problems(better) == []
    assert problems(worse) == [f"layers.0.mlp: {worse} is published as selected, the rule gives {better}."]


# --- how it is told -----------------------------------------------------------------------------------------------


def test_findings_as_lines_and_as_json():
    findings = [
        Finding("saes", "checksums", "holds", "3 files, 10 bytes"),
        Finding("examples", "keys", "fails", "x."),
        Finding("release", "selection", "skipped", "not checked: it needs saes."),
    ]
    assert lines(findings) == [
        "saes      checksums  holds    3 files, 10 bytes",
        "examples  keys       fails    x.",
        "release   selection  skipped  not checked: it needs saes.",
        "1 hold, 1 fail, 1 skipped.",
    ]
    told = to_json(findings)
    assert (told["n_holds"], told["n_fails"], told["n_skipped"]) == (1, 1, 1)
    assert told["findings"][1] == {"part": "examples", "check": "keys", "status": "fails", "detail": "x."}
