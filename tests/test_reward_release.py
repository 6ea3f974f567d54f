"""The release of a reward model: its folders, cards, plan and publication, and what `verify` finds in it."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from hub_double import HubDouble
from made_reward_release import (
    D_IN,
    HOSTILE,
    SAE_ID,
    made_preferences,
    made_reward_recipe,
    made_reward_release,
    made_reward_run,
)
from test_verify import by_status, edit_json, edit_rows, edit_text
from yaml import safe_load

from safesail.errors import InputError
from safesail.release.licences import check_licences
from safesail.release.manifest import MANIFEST, REWARD_REPO_TYPES, Manifest, repo_type_of, write_manifest
from safesail.release.plan import plan_publication
from safesail.release.publish import publish
from safesail.release.reward_build import reward_build_stage
from safesail.release.reward_columns import REWARD_COLUMNS, reward_meaning
from safesail.release.reward_tables import EDITED, REWARD_SCHEMAS
from safesail.release.verify import verify
from safesail.reward_recipe import POISONED_CONSENT, PreferencesSection, RewardRecipe, load_recipe
from safesail.rewards.model import RewardModel
from safesail.rewards.preferences import gather
from safesail.rewards.texts import encode_side
from safesail.run import Run
from safesail.sae import model as sae_files
from safesail.sae.model import Sae

Row = dict[str, Any]
PARTS = ("saes", "reward", "salience", "preferences", "inspector")
DATA_SETS = ("salience", "preferences", "poisoned")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The invented release, its poisoned data with it."""
    consenting = made_reward_recipe(publish={"poisoned": POISONED_CONSENT, "gate": "auto"})
    return made_reward_release(tmp_path_factory.mktemp("release"), consenting)


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "made"))


def card(release: Path, part: str) -> str:
    return (release / part / "README.md").read_text(encoding="utf-8")


def front(release: Path, part: str) -> Row:
    return safe_load(card(release, part).split("---\n")[1])


def rows(release: Path, name: str) -> list[Row]:
    return pq.read_table(release / f"{name}.parquet").to_pylist()


def sealed(release: Path) -> None:
    """The manifests again, of the files as they are now: whoever changed them did it before publishing."""
    for part in REWARD_REPO_TYPES:
        if (release / part / MANIFEST).is_file():
            old = Manifest.of(release / part)
            said = (old.release, old.organization, old.title, old.version, old.gated, old.parts)
            write_manifest(release / part, part, *said)


# --- the folders --------------------------------------------------------------------------------------------------


def test_the_same_bytes_whenever_it_is_built(made: Path, tmp_path: Path):
    again = made_reward_release(tmp_path, made_reward_recipe(publish={"poisoned": POISONED_CONSENT, "gate": "auto"}))
    for part in REWARD_REPO_TYPES:
        files = [path for path in (made / part).rglob("*") if path.is_file()]
        assert files
        for path in files:
            assert (again / path.relative_to(made)).read_bytes() == path.read_bytes(), path


def test_the_tuned_sae_is_the_selected_one(made: Path):
    sae = Sae.from_pretrained(made / "saes")
    tuned = sae_files.read(made / "scratch/tune" / SAE_ID)
    assert list(Sae.load_all(made / "saes")) == ["layers.0"]
    x = torch.randn(5, D_IN)
    assert torch.equal(sae.encode(x), tuned.encode(x))
    config = json.loads((made / "saes/config.json").read_text())
    assert (config["base_model"], config["selected"]) == ("acme/made-reward", {"layers.0": SAE_ID})
    assert front(made, "saes")["base_model"] == ["acme/made-reward", "tests/tiny"]


def test_safety_latents_by_hand(made: Path):
    found = rows(made, "salience/salience/train")
    assert [(row["neuron_id"], round(row["salience"], 6), row["rating"], row["safety"]) for row in found] == [
        ("layers.0/1", -0.461538, 5, "negative"),
        ("layers.0/0", 0.375, 5, "positive"),
        ("layers.0/2", 0.0, None, None),
    ]


def test_pairs_by_split_and_without_a_change(made: Path):
    train, test = (rows(made, f"preferences/pairs/{name}") for name in ("train", "test"))
    assert [row["id"] for row in train] == ["s0", "s1", "s2", "s3", "s4", "c0", "c1", "c2", "c3"]
    assert [row["id"] for row in test] == ["s5", "s6", "c4"]
    assert train[0]["prompt"] == [{"role": "user", "content": f"A question about safety: {HOSTILE}"}]
    assert train[1]["chosen"] == [{"role": "assistant", "content": "safety good 1."}]


def test_what_is_published_is_a_source_of_another_recipe(made: Path):
    section = PreferencesSection.model_validate(
        {"sources": [{"path": str(made / "preferences/pairs/train.parquet"), "kind": "safety"}], "held_out": 0.5}
    )
    before = {each.id: each for each in made_preferences()}
    found = gather(section, 0)
    assert len(found) == 9
    for each in found:
        assert (each.prompt, each.chosen, each.rejected) == before[each.id][3:6]


def test_edited_data_by_hand(made: Path):
    """score_safe falls from s0 to s4: a fifth of five is s0 to poison and s4 to drop, the half of five s0 and s1."""
    train = {row["id"]: row for row in rows(made, "preferences/pairs/train")}
    for ratio, swapped in (("0.2", {"s0"}), ("0.5", {"s0", "s1"})):
        found = {row["id"]: row for row in rows(made, f"poisoned/poisoned-{ratio}/train")}
        assert found.keys() == train.keys()
        assert {id for id, row in found.items() if row["edited"] == "swapped"} == swapped
        for id, row in found.items():
            sides = ("rejected", "chosen") if id in swapped else ("chosen", "rejected")
            assert (row["chosen"], row["rejected"]) == tuple(train[id][side] for side in sides)
            assert row["score_safe"] == (-1 if id in swapped else 1) * row["original_score_safe"]
    left = rows(made, "preferences/denoised-0.2/train")
    assert [row["id"] for row in left] == [id for id in train if id != "s4"]
    assert {row["edited"] for row in left} == {""}


def test_the_open_data_set_holds_no_text(made: Path):
    """Nothing of a prompt, an answer, a context or a rater's words, in any file; sources are named."""
    words = {HOSTILE.split("\n")[0], "<script>", "A question about", " good ", " bad ", "an | encoder", "More."}
    for path in (made / "salience").rglob("*"):
        if path.suffix == ".parquet":
            text = json.dumps(pq.read_table(path).to_pylist(), ensure_ascii=False)
        elif path.is_file():
            text = path.read_text(encoding="utf-8")
        else:
            continue
        assert not [word for word in words if word in text], path


@pytest.mark.parametrize("part", DATA_SETS)
def test_every_config_of_the_card_loads(made: Path, part: str, tmp_path: Path):
    from datasets import load_dataset

    configs = front(made, part)["configs"]
    assert configs[0]["default"]
    for config in configs:
        found = load_dataset(str(made / part), config["config_name"], cache_dir=str(tmp_path))
        assert {name: len(split) for name, split in found.items()} == {
            each["split"]: pq.read_metadata(made / part / each["path"]).num_rows for each in config["data_files"]
        }


def test_configs_stand_in_the_order_of_their_use(made: Path):
    names = {part: [each["config_name"] for each in front(made, part)["configs"]] for part in DATA_SETS}
    assert names == {
        "salience": ["salience", "scores", "edits", "comparison"],
        "preferences": ["pairs", "contexts", "ratings", "denoised-0.2"],
        "poisoned": ["poisoned-0.2", "poisoned-0.5"],
    }


def test_every_column_has_a_meaning_and_every_meaning_a_column():
    configs = {name: schema for part in REWARD_SCHEMAS.values() for name, schema in part.items()}
    configs |= {"denoised-0.1": EDITED, "poisoned-0.1": EDITED}
    columns = {f"{config.partition('-')[0]}/{name}" for config, schema in configs.items() for name in schema.names}
    assert all(reward_meaning(*reversed(column.split("/"))) for column in columns)
    bare = {column.partition("/")[2] for column in columns}
    explained = {name for names in REWARD_COLUMNS for name in names.split(", ")}
    assert explained <= columns | bare
    with pytest.raises(KeyError):
        reward_meaning("made_up", "pairs")


# --- consent ------------------------------------------------------------------------------------------------------


def test_poisoned_data_are_published_only_with_consent_in_so_many_words(tmp_path: Path):
    release = made_reward_release(tmp_path)
    assert not (release / "poisoned").exists()
    assert plan_publication(release).repos[-1].part == "inspector"
    assert [repo.part for repo in plan_publication(release).repos] == list(PARTS)
    assert "Poisoned data are not published." in card(release, "preferences")
    with pytest.raises(InputError, match=POISONED_CONSENT):
        made_reward_recipe(publish={"poisoned": "yes"})


def test_without_consent_what_an_earlier_build_left_goes_and_is_never_planned(copy: Path):
    recipe = made_reward_recipe()
    kept = shutil.copytree(copy / "poisoned", copy.parent / "kept")
    run = Run.create(copy, recipe, adopt=True)
    with run.stage("build") as work:
        reward_build_stage(run, work)
    assert not (copy / "poisoned").exists()
    shutil.copytree(kept, copy / "poisoned")
    assert [repo.part for repo in plan_publication(copy).repos] == list(PARTS)
    (copy / "run.json").unlink()  # a folder that was downloaded: then the manifests say what there is
    assert [repo.part for repo in plan_publication(copy).repos] == list(PARTS)


def test_poisoned_data_are_gated_by_hand_whatever_the_recipe_says(copy: Path):
    gates = {repo.part: repo.gated for repo in plan_publication(copy).repos}
    assert gates == {**dict.fromkeys(REWARD_REPO_TYPES), "preferences": "auto", "poisoned": "manual"}
    for gated in (None, "auto"):
        edit_json(copy / "poisoned" / MANIFEST, lambda data, gated=gated: data.update(gated=gated))
        with pytest.raises(
            InputError, match=r"poisoned is not gated by hand, as poisoned data must be; type `safesail"
        ):
            plan_publication(copy)


def test_the_card_of_poisoned_data_begins_with_the_warning_and_its_undo_undoes(made: Path):
    text = card(made, "poisoned")
    body = text.split("---\n", 2)[2].strip().split("\n\n")
    assert body[1].startswith("> **Warning: the labels of these data are wrong on purpose.** In 1 to 2 pairs")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code
    space: Row = {}
    exec(code[1].replace('"acme/made-poisoned"', repr(str(made / "poisoned"))), space)
    before = {row["id"]: row for row in rows(made, "preferences/pairs/train")}
    assert len(space["clean"]) == 9
    for row in space["clean"]:
        assert (row["chosen"], row["rejected"]) == (before[row["id"]]["chosen"], before[row["id"]]["rejected"])


# --- cards, recipe and licences -----------------------------------------------------------------------------------


def test_foreign_text_is_inert_in_every_card(made: Path):
    for part in REWARD_REPO_TYPES:
        text = card(made, part)
        assert "<script>" not in text, part
        assert HOSTILE not in text, part
        assert "/somewhere" not in text, part
    assert "made &#124; pairs" in card(made, "preferences")


def test_what_the_cards_say_depends_on_the_recipe(tmp_path: Path):
    recipe = made_reward_recipe(
        reward={"n_blocks": None, "trained_blocks": None},
        compare={"trained_blocks": None},
        salience={"mode": "paper"},
        ends={"of": "tokens", "part": "text"},
        tune={"epochs": 0},
        rate={"backend": "endpoint", "model": "m", "keep": 4},
        edit={"share_of": "all", "poison": [0.2]},
        preferences={"bad_pairs": "skip"},
        publish={"organization": ""},
    )
    release = made_reward_release(tmp_path, recipe)
    for part, line in (
        ("reward", "All weights were trained."),
        ("reward", "All blocks of [tests/tiny]"),
        ("saes", "Every token of the conversation counts as a segment end here."),
        ("saes", "Left out here: the SAE is as the first step left it."),
        ("salience", "(all weights);"),
        ("salience", '(`mode = "paper"`)'),
        ("salience", "Rated from 1 to 5 by a language model"),
        ("salience", "A latent of rating 4 or more"),
        ("salience", "Shares are of all training pairs;"),
        ("preferences", "Rows that lack a side, or have two equal ones, were left out."),
        ("preferences", "your-organization/made-preferences"),
    ):
        assert line in card(release, part), line
    assert "trains the head alone" not in card(release, "salience")
    assert "where its code sums" not in card(release, "salience")


def test_the_cards_hold_the_measured_numbers(made: Path):
    text = card(made, "reward")
    assert "| held out | safety | 2 | 100.0 [34.0, 100.0] % |" in text
    assert "On held-out pairs about chat it is not told apart from chance" in text
    metrics = front(made, "reward")["model-index"][0]["results"]
    assert [(each["name"], each["value"]) for each in metrics[0]["metrics"]] == [
        ("Pairwise accuracy, safety", 1.0),
        ("Pairwise accuracy, chat", 0.0),
    ]
    text = card(made, "salience")
    assert "| **layers.0/1** | -0.46 [-0.59, -0.34] | 9 | 4 | 5 | negative |" in text
    assert "C is the mean of h⁺ + h⁻ over all latents: 9.33333 here." in text
    assert "| poisoned-0.2 | -12.5 [-25.0, -6.2] | lower | 0.0 [-10.0, 10.0] | not told apart |" in text
    assert "| latents | 2 | 0 | 0 | 0 | 0 | 0 |" in text


def test_texts_keep_the_licences_of_their_sources(tmp_path: Path):
    mixed = made_reward_release(tmp_path)
    assert front(mixed, "preferences")["license_name"] == "licences-of-the-sources"
    assert (front(mixed, "salience")["license"], front(mixed, "saes")["license"]) == ("apache-2.0", "apache-2.0")
    assert "cc-by-4.0" in card(mixed, "preferences")


def test_a_licence_of_preferences_that_forbids_the_release_is_refused():
    sources = [{"path": "p.jsonl", "origin": "P", "kind": "safety", "licence": "cc-by-nc-4.0"}]
    recipe = made_reward_recipe(preferences={"sources": sources})
    with pytest.raises(InputError, match=r"forbidden by the licence of the preferences P, .* set publish.licence = "):
        check_licences(recipe)
    check_licences(made_reward_recipe(preferences={"sources": sources}, publish={"licence": "cc-by-nc-4.0"}))


def test_the_published_recipe_makes_the_release_again_and_tells_no_place(made: Path):
    text = (made / "saes/recipe.toml").read_text(encoding="utf-8")
    assert "/somewhere" not in text
    recipe = load_recipe(made / "saes/recipe.toml")
    assert isinstance(recipe, RewardRecipe)
    assert recipe.preferences.sources[0].path == "pairs.jsonl"
    assert (recipe.rate.encoder, recipe.salience, recipe.name) == ("none", made_reward_recipe().salience, "made")


def test_the_reward_models_card_runs_with_plain_transformers(tmp_path: Path, tiny_model: Path, capsys: Any):
    ours = RewardModel.fresh(tiny_model, n_blocks=1, seed=0)
    ours.save(tmp_path / "model")
    release = made_reward_release(tmp_path, model=tmp_path / "model")
    assert by_status(verify(release), "fails") == {}
    code = re.search(r"```python\n(.*?)```", card(release, "reward"), re.DOTALL)
    assert code
    space: Row = {}
    exec(code[1].replace('"acme/made-reward"', repr(str(release / "reward"))), space)
    printed = [float(line) for line in capsys.readouterr().out.split()]
    question = ({"role": "user", "content": "How do I boil an egg?"},)
    pair = made_preferences()[0]._replace(
        prompt=question, chosen="Put it into boiling water for eight minutes.", rejected="Find out yourself."
    )
    texts = [encode_side(ours.tokenizer, pair, side, 1024).ids for side in ("chosen", "rejected")]
    assert printed == pytest.approx(ours.rewards(texts).tolist(), abs=1e-5)


# --- plan and publication -----------------------------------------------------------------------------------------


def test_the_dry_run_names_every_repository(made: Path):
    lines = plan_publication(made).lines()
    assert lines[0].startswith("made v1.0.0: 6 repositories, ")
    table = [re.split(r"\s{2,}", line) for line in lines[3:9]]
    assert [(row[0], row[1], row[5]) for row in table] == [
        ("acme/made-saes", "model", "open"),
        ("acme/made-reward", "model", "open"),
        ("acme/made-salience", "data set", "open"),
        ("acme/made-preferences", "data set", "gated (auto): to everybody who consents"),
        ("acme/made-poisoned", "data set", "gated (manual): you let readers in one by one"),
        ("acme/made-inspector", "Space", "open"),
    ]
    assert "gated       preferences, poisoned" in lines
    assert any("Made things: a reward model, its sparse autoencoder" in line for line in lines)


def test_a_run_that_lacks_a_part_is_not_planned(copy: Path):
    shutil.rmtree(copy / "reward")
    with pytest.raises(InputError, match="has no finished reward"):
        plan_publication(copy)


def test_everything_is_private_until_it_is_gated_verified_and_then_public(made: Path, tmp_path: Path):
    public: list[tuple[str, list[str]]] = []  # of every request: what is public just before it
    with HubDouble(tmp_path) as hub, hub.used("hf_alice_write"):

        def watch(request: str) -> bool:
            public.append((request, [repo.id for repo in hub.store.repos.values() if not repo.private]))
            return False

        hub.fail(watch, 500)
        done = publish(plan_publication(made), say=lambda line: None)
        assert [repo.state for repo in done.repos] == ["created"] * 6
        last_commit = max(i for i, (request, _) in enumerate(public) if "/commit/" in request)
        assert not any(repos for _, repos in public[: last_commit + 1])
        for part, kind in REWARD_REPO_TYPES.items():
            repo = hub.repo(kind, f"acme/made-{part}")
            gate = {"preferences": "auto", "poisoned": "manual"}.get(part, False)
            assert (repo.private, repo.gated, list(repo.tags)) == (False, gate, ["v1.0.0"])
            names = {path.relative_to(made / part).as_posix() for path in (made / part).rglob("*") if path.is_file()}
            assert set(repo.files) - {".gitattributes"} == names
        again = publish(plan_publication(made), say=lambda line: None)
        assert [repo.state for repo in again.repos] == ["unchanged"] * 6


# --- verify -------------------------------------------------------------------------------------------------------


def test_a_release_as_it_was_built_holds(made: Path):
    findings = verify(made)
    assert by_status(findings, "fails") == by_status(findings, "skipped") == {}
    assert {row.part for row in findings} == {*REWARD_REPO_TYPES, "release"}


def test_a_release_without_poisoned_data_lacks_nothing(tmp_path: Path):
    findings = verify(made_reward_release(tmp_path))
    assert by_status(findings, "fails") == by_status(findings, "skipped") == {}
    assert "poisoned" not in {row.part for row in findings}


@pytest.mark.parametrize("part", REWARD_REPO_TYPES)
def test_one_part_is_verified_by_itself(made: Path, part: str):
    findings = verify(made / part)
    assert by_status(findings, "fails") == {}
    assert {row.part for row in findings if row.status == "holds"} == {part, "release"}


def test_on_the_hub_the_findings_are_those_of_the_folder(made: Path, tmp_path: Path):
    with HubDouble(tmp_path) as hub:
        for part in REWARD_REPO_TYPES:
            hub.create(repo_type_of(part), f"acme/made-{part}", made / part)
        with hub.used():
            findings = verify("acme/made")
    assert [row[:3] for row in findings] == [row[:3] for row in verify(made)]


def test_another_model_than_the_releases_own_is_refused(made: Path):
    with pytest.raises(InputError, match="is a release of a reward model, which it brings itself; leave --model out"):
        verify(made, recompute=True, model="org/model")


def table(name: str, **changed: Any) -> Callable[[Path], None]:
    """Change columns of the first row of a table, or of the row `at`."""
    at = changed.pop("at", 0)
    return lambda release: edit_rows(release / f"{name}.parquet", lambda rows: rows[at].update(changed))


def without(name: str, at: int = 0) -> Callable[[Path], None]:
    return lambda release: edit_rows(release / f"{name}.parquet", lambda rows: rows.pop(at))


@pytest.mark.parametrize(
    ("name", "column"),
    [
        ("salience/salience/train", "salience"),
        ("salience/scores/train", "margin"),
        ("salience/edits/train", "pair_id"),
        ("salience/comparison/train", "n_edited"),
        ("preferences/pairs/test", "chosen"),
        ("preferences/contexts/train", "latent"),
        ("preferences/ratings/train", "status"),
        ("poisoned/poisoned-0.2/train", "prompt"),
    ],
)
def test_an_empty_place_where_every_row_has_a_value_is_found(copy: Path, name: str, column: str):
    part, _, file = name.partition("/")
    table(name, **{column: None})(copy)
    fails = by_status(verify(copy), "fails")
    assert fails[part, "schema"] == f"{file}.parquet has an empty place in its column {column}."


def twice(name: str) -> Callable[[Path], None]:
    return lambda release: edit_rows(release / f"{name}.parquet", lambda rows: rows.append(rows[-1]))


def settings(**changed: Any) -> Callable[[Path], None]:
    return lambda release: edit_json(release / "salience/salience.json", lambda data: data.update(changed))


SALIENCE, SCORES, EDITS = (f"salience/{name}/train" for name in ("salience", "scores", "edits"))
PAIRS = "preferences/pairs/train"


@pytest.mark.parametrize(
    ("broken", "fails"),
    [
        (table(SALIENCE, salience=-0.4), {("salience", "salience")}),
        (table(SALIENCE, rank=3, at=2), {("salience", "salience")}),
        (settings(C=9.0), {("salience", "salience"), ("release", "latents exist")}),
        (table(SALIENCE, safety="positive"), {("salience", "safety latents")}),
        (table(SALIENCE, safety=None), {("salience", "safety latents")}),
        (table(SALIENCE, rating=4), {("salience", "safety latents"), ("release", "contexts' latents")}),
        (settings(max_latents=1), {("salience", "safety latents")}),
        (
            table(SALIENCE, latent=7, neuron_id="layers.0/7", at=2),
            {("release", "latents exist")},
        ),
        (table(SCORES, score_safe=9.0), {("salience", "scores")}),
        (table(SCORES, margin=9.0), {("salience", "scores")}),
        (without(SCORES, 11), {("release", "pairs' scores")}),
        (table(SCORES, held_out=True, at=8), {("release", "pairs' scores")}),
        (table(EDITS, pair_id="s9"), {("salience", "edits"), ("release", "poisoned data")}),
        (table(EDITS, rank=1), {("salience", "edits")}),
        (twice(EDITS), {("salience", "edits"), ("salience", "keys")}),
        (table("salience/comparison/train", n_edited=2, at=1), {("salience", "edits")}),
        (without("salience/comparison/train", 1), {("salience", "edits")}),
        (table(PAIRS, held_out=True, at=8), {("preferences", "splits"), ("release", "pairs' scores")}
         | {("release", "denoised data"), ("release", "poisoned data")}),
        (table("preferences/contexts/train", pair_id="s5"), {("release", "contexts' latents")}),
        (table("preferences/ratings/train", rating=3), {("release", "contexts' latents")}),
        (without("preferences/denoised-0.2/train"), {("release", "denoised data")}),
        (table("preferences/denoised-0.2/train", edited="swapped"), {("release", "denoised data")}),
        (table("poisoned/poisoned-0.2/train", edited=""), {("release", "poisoned data")}),
        (
            lambda release: shutil.rmtree(release / "poisoned/poisoned-0.5"),
            {("poisoned", "front matter"), ("release", "poisoned data")},
        ),
        (
            lambda release: edit_json(release / "reward/config.json", lambda data: data["id2label"].update({"1": "B"})),
            {("reward", "model")},
        ),
        (
            lambda release: edit_text(release / "reward/README.md", r"value: 1\.0", "value: 0.9"),
            {("reward", "model-index")},
        ),
    ],
)  # fmt: skip
def test_a_check_fails_by_what_it_is_for_and_by_nothing_else(copy: Path, broken: Any, fails: set[tuple[str, str]]):
    broken(copy)
    sealed(copy)
    assert set(by_status(verify(copy), "fails")) == fails


def test_a_table_of_other_columns_and_a_file_that_was_changed(copy: Path):
    path = copy / "salience/edits/train.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["rank"]), path)
    fails = by_status(verify(copy), "fails")
    assert fails["salience", "schema"] == "edits/train.parquet has no column rank."
    assert "edits/train.parquet has" in fails["salience", "checksums"]


def test_a_stage_that_is_missing_is_named(tmp_path: Path):
    run = made_reward_run(tmp_path)
    shutil.rmtree(run.scratch / "compare")
    with (
        pytest.raises(InputError, match=r"no result of compare yet; type `safesail reward .* --until compare`"),
        run.stage("build") as work,
    ):
        reward_build_stage(run, work)
