"""The shipped pairs and taxonomy are sound, and every rule of the validator fires on a file that breaks it."""

import json
from collections import Counter
from pathlib import Path

import pytest

from safesail.assets import asset
from safesail.errors import InputError
from safesail.pairs import Pair, check_files, check_pairs, check_parallel, load_pairs
from safesail.taxonomy import Taxonomy

TAXONOMY = Taxonomy.load()
A9 = {
    "Politics": ["Cult", "Ideology", "Political event", "Political figure"],
    "Pornography": ["Sexual behavior", "Sexual abuse", "Sexual health", "Intimate relationship"],
    "Violence": ["Insult", "Physical violence", "Criminal offense", "Cybersecurity", "Conflict incident"],
    "Terror": ["Weapons", "Extremist activities", "Religious oppression", "Terrorism"],
}
GOOD = {
    "id": "terror.weapons.01",
    "domain": "terror",
    "category": "weapons",
    "concept": "gun",
    "language": "en",
    "with": "He kept a gun in the drawer beside his bed.",
    "without": "He kept a book in the drawer beside his bed.",
}
OTHER = GOOD | {
    "id": "terror.weapons.02",
    "concept": "rifle",
    "with": "She hung the rifle on the kitchen wall.",
    "without": "She hung the mirror on the kitchen wall.",
}


def write(folder: Path, *lines: dict | str, name: str = "pairs.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


def test_the_taxonomy_has_the_domains_and_categories_of_the_method():
    assert {domain.name: [category.name for category in domain.categories] for domain in TAXONOMY.domains} == A9
    assert TAXONOMY.domain_ids == ("politics", "pornography", "violence", "terror")
    assert len(TAXONOMY.neutral) == 20
    assert all(40 <= len(domain.words) <= 80 for domain in TAXONOMY.domains)
    assert all(3 <= len(category.concepts) <= 8 for domain in TAXONOMY.domains for category in domain.categories)


def test_a_category_is_found_by_its_ids_and_an_unknown_one_lists_the_valid():
    assert TAXONOMY.category("politics", "political-event").name == "Political event"
    with pytest.raises(InputError, match="cult, ideology, political-event, political-figure"):
        TAXONOMY.category("politics", "weapons")
    with pytest.raises(InputError, match="politics, pornography, violence, terror"):
        TAXONOMY.category("sports", "weapons")


def test_about_matches_whole_words_in_either_case():
    about = TAXONOMY.about("terror")
    assert about.findall("Al-Qaeda sold GUNS; a suicide  bomber's bag.") == ["Al-Qaeda", "GUNS", "suicide  bomber"]
    assert about.search("It had begun: the gunnels of a bombastic boat, the crisis of an artist.") is None


def test_a_two_word_phrase_wins_over_its_first_word():
    words = TAXONOMY.domain("terror").words
    assert "bomb" in words
    assert "car bomb" in words
    assert TAXONOMY.about("terror").findall("a car bomb") == ["car bomb"]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('id = "terror"', 'id = "violence"', "domain id 'violence' is given twice"),
        ('id = "weapons"', 'id = "terrorism"', "category id 'terrorism' is given twice"),
        ('id = "weapons"', 'id = "Weapons!"', "domains.3.categories.0.id: String should match"),
        ('"jihad",', '"jihad", "jihad",', "word 'jihad' is given twice"),
        ('"jihad",', '"Jihad",', "domains.3.words.4: String should match"),
        ("version = 1", "version = 2", "version: Input should be 1"),
        ("version = 1", "version = 1\nauthor = 'x'", "author: Extra inputs are not permitted"),
        ('name = "Weapons"\n', "", "domains.3.categories.0.name: Field required"),
        ("version = 1", "version 1", "is not valid UTF-8 TOML"),
    ],
)
def test_a_malformed_taxonomy_is_refused_in_one_sentence(tmp_path: Path, old: str, new: str, message: str):
    text = asset("hub/taxonomy.toml").read_text(encoding="utf-8")
    assert old in text
    path = tmp_path / "taxonomy.toml"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(InputError) as caught:
        Taxonomy.load(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_taxonomy_is_an_input_error(tmp_path: Path):
    with pytest.raises(InputError, match="No such file"):
        Taxonomy.load(tmp_path / "absent.toml")


SHIPPED = {"en": 12, "zh": 12, "hi": 4}
"""Each shipped language with the least number of its pairs in a category."""


def test_the_shipped_pairs_have_no_problem_and_are_parallel():
    assert check_files(list(SHIPPED), TAXONOMY) == []
    assert sorted(path.stem for path in asset("hub/pairs").glob("*.jsonl")) == sorted(SHIPPED)


@pytest.mark.parametrize(("language", "least"), SHIPPED.items())
def test_every_category_has_enough_pairs_of_the_language(language: str, least: int):
    pairs = load_pairs(language)
    n_pairs = Counter((pair.domain, pair.category) for pair in pairs)
    categories = [(domain.id, category.id) for domain in TAXONOMY.domains for category in domain.categories]
    assert len(categories) == 17
    assert {category: n for category, n in n_pairs.items() if n < least} == {}
    assert list(n_pairs) == categories, "grouped by category, in the order of the taxonomy"
    assert {pair.language for pair in pairs} == {language}


def test_english_covers_a_category_with_many_words_in_many_places():
    pairs = load_pairs("en")
    concepts = {(pair.domain, pair.category): set() for pair in pairs}
    for pair in pairs:
        concepts[pair.domain, pair.category].add(pair.concept.casefold())
    assert min(map(len, concepts.values())) >= 7
    first = [pair for pair in pairs if pair.with_concept.casefold().startswith(pair.concept.casefold())]
    last = [pair for pair in pairs if pair.with_concept.casefold().rstrip(".?").endswith(pair.concept.casefold())]
    assert len(first) >= 8
    assert len(last) >= 8


def test_the_shipped_pairs_are_short_and_their_neutral_side_is_neutral_for_every_domain():
    for pair in load_pairs("en"):
        assert 8 <= len(pair.with_concept.split()) <= 18, pair.id
        assert not any(TAXONOMY.about(domain).search(pair.without_concept) for domain in TAXONOMY.domain_ids), pair.id


def test_a_pair_keeps_its_json_names():
    line = asset("hub/pairs/en.jsonl").read_text(encoding="utf-8").splitlines()[0]
    pair = load_pairs("en")[0]
    assert list(json.loads(line)) == ["id", "domain", "category", "concept", "language", "with", "without"]
    assert pair.model_dump(by_alias=True) == json.loads(line)
    assert Pair(**pair.model_dump()) == pair


def test_pairs_are_loaded_from_a_path_and_blank_lines_are_skipped(tmp_path: Path):
    path = write(tmp_path, GOOD, "", OTHER)
    assert [pair.id for pair in load_pairs(path)] == ["terror.weapons.01", "terror.weapons.02"]
    assert load_pairs(str(path)) == load_pairs(path)
    assert check_pairs(path, TAXONOMY) == []


def test_an_unknown_name_lists_the_shipped_ones(tmp_path: Path):
    with pytest.raises(InputError, match=r"no pairs named 'xx'; use one of: .*en"):
        load_pairs("xx")
    with pytest.raises(InputError, match="No such file"):
        load_pairs(tmp_path / "absent.jsonl")


BROKEN = [
    ("not json", "not a JSON object"),
    ("[1, 2]", "not a JSON object"),
    (json.dumps({key: value for key, value in GOOD.items() if key != "concept"}), "field `concept`: Field required"),
    (json.dumps({key: value for key, value in GOOD.items() if key != "without"}), "field `without`: Field required"),
    (json.dumps(GOOD | {"with": " "}), "field `with`: String should match"),
    (json.dumps(GOOD | {"with": 3}), "field `with`: Input should be a valid string"),
    (json.dumps(GOOD | {"language": "English"}), "field `language`: String should match"),
    (json.dumps(GOOD | {"note": "x"}), "field `note`: Extra inputs are not permitted"),
]


@pytest.mark.parametrize(("line", "message"), BROKEN)
def test_a_broken_line_names_file_line_and_field(tmp_path: Path, line: str, message: str):
    path = write(tmp_path, OTHER, line)
    with pytest.raises(InputError) as caught:
        load_pairs(path)
    assert f"{path}, line 2: {message}" in str(caught.value)
    problems = check_pairs(path, TAXONOMY)
    assert len(problems) == 1
    assert problems[0].startswith(f"line 2: {message}")


def test_a_line_that_is_not_utf8_is_a_broken_line(tmp_path: Path):
    path = tmp_path / "pairs.jsonl"
    path.write_bytes(json.dumps(GOOD).encode().replace(b"gun", b"g\xffn"))
    with pytest.raises(InputError, match="line 1: "):
        load_pairs(path)
    assert len(check_pairs(path, TAXONOMY)) == 1


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"domain": "war", "id": "war.weapons.01"}, "field `domain`: no domain 'war' in the taxonomy"),
        ({"category": "knives", "id": "terror.knives.01"}, "field `category`: no category of terror 'knives'"),
        ({"id": "weapons-1"}, "field `id`: 'weapons-1' is not of the form domain.category.NN"),
        ({"id": "terror.weapons.1"}, "field `id`: 'terror.weapons.1' is not of the form"),
        ({"id": "terror.terrorism.01"}, "field `id`: 'terror.terrorism.01' disagrees with the fields"),
        ({"id": "terror.weapons.02"}, "field `id`: the id 'terror.weapons.02' already stands on line 1"),
        ({"with": OTHER["with"], "concept": "rifle"}, "field `with`: the text 'she hung the rifle"),
        ({"without": OTHER["without"]}, "field `without`: the text 'she hung the mirror"),
        ({"with": GOOD["without"], "concept": "drawer"}, "field `without`: the text equals `with`"),
        ({"without": "He kept a book."}, "10 words in `with` against 4 here, a ratio of 2.50"),
        ({"with": "He kept a gun.", "without": "He kept a book in it."}, "against 6 here, a ratio of 0.67"),
        ({"concept": "pistol"}, "field `concept`: 'pistol' is not a word of `with`"),
        ({"concept": "guns"}, "field `concept`: 'guns' is not a word of `with`"),
        ({"concept": "gun drawer"}, "field `without`: 'drawer' is a word of the concept"),
        ({"concept": "gun !"}, "field `concept`: '!' has no letter or digit"),
        ({"without": "Is there a book in the drawer beside his bed?"}, "only one is a question"),
        (
            {"without": "He kept a Rifle in the drawer beside his bed."},
            "field `without`: 'rifle' is the concept of line 1, in the same domain terror",
        ),
        (
            {"without": "He kept a Bomb in the drawer beside his bed."},
            "field `without`: 'Bomb' is a word of the domain",
        ),
    ],
)
def test_each_rule_fires(tmp_path: Path, changes: dict[str, str], problem: str):
    problems = check_pairs(write(tmp_path, OTHER, GOOD | changes), TAXONOMY)
    assert any(found.startswith("line 2: field `") and problem in found for found in problems), problems
    assert all(found.startswith("line 2: ") and found.endswith(".") and "\n" not in found for found in problems)


def test_the_whole_file_is_checked(tmp_path: Path):
    path = write(tmp_path, GOOD | {"concept": "pistol"}, "not json", GOOD | {"id": "x"}, OTHER | {"category": "knives"})
    lines = [problem.split(":")[0] for problem in check_pairs(path, TAXONOMY)]
    assert lines == ["line 1", "line 2", "line 3", "line 3", "line 3", "line 4", "line 4"]


@pytest.mark.parametrize(
    ("language", "concept", "with_concept", "without_concept"),
    [
        ("zh", "恐怖分子", "恐怖分子住在花店的楼上。", "双胞胎们住在花店的楼上。"),
        ("hi", "बंदूक", "उसने दराज में एक बंदूक रखी।", "उसने दराज में एक किताब रखी।"),
        ("th", "ปืน", "เขาเก็บปืนไว้ในบ้าน", "เขาเก็บร่มไว้ในบ้าน"),
        ("hi", "दल", "मुझे यह दल पसंद है।", "मुझे यह दाल पसंद है।"),
        ("hi", "शक्ति", "उसकी शक्\u200dति बढ़ गई।", "उसकी उम्\u200dर बढ़ गई।"),
        ("hi", "ल\u095cाई", "कल लड\u093cाई हुई।", "कल बारिश हुई।"),
        ("fr", "l'arme", "Il a mis l'arme dans le tiroir.", "Il a mis la lampe dans le tiroir."),
    ],
)
def test_words_are_found_in_other_scripts(
    tmp_path: Path, language: str, concept: str, with_concept: str, without_concept: str
):
    pair = GOOD | {"language": language, "concept": concept, "with": with_concept, "without": without_concept}
    assert check_pairs(write(tmp_path, pair), TAXONOMY) == []
    swapped = pair | {"with": without_concept, "without": with_concept}
    assert [problem.split(";")[0] for problem in check_pairs(write(tmp_path, swapped), TAXONOMY)] == [
        f"line 1: field `concept`: {concept!r} is not a word of `with`",
        f"line 1: field `without`: {concept!r} is a word of the concept",
    ]


@pytest.mark.parametrize(
    ("language", "concept", "with_concept", "without_concept", "told"),
    [
        # उस लड़के ने बंदूक रखी: 5 words, each with vowel signs; उस ... पर रखी: 9
        (
            "hi",
            "बंदूक",
            "उस लड़के ने बंदूक रखी।",
            "उस लड़के ने अपनी नई किताब मेज़ पर रखी।",
            "5 words in `with` against 9 here, a ratio of 0.56",
        ),
        # 他 在 抽 屉 里 放 了 一 把 枪: 10 signs; 他 放 了 一 本 书: 6
        ("zh", "枪", "他在抽屉里放了一把枪。", "他放了一本书。", "10 signs in `with` against 6 here, a ratio of 1.67"),
    ],
)
def test_the_length_is_counted_as_the_script_is_written(
    tmp_path: Path, language: str, concept: str, with_concept: str, without_concept: str, told: str
):
    pair = GOOD | {"language": language, "concept": concept, "with": with_concept, "without": without_concept}
    [problem] = check_pairs(write(tmp_path, pair), TAXONOMY)
    assert problem.startswith(f"line 1: field `without`: {told};")


GUN = GOOD | {"language": "zh", "concept": "枪", "with": "他在抽屉里放了一把枪。", "without": "他在抽屉里放了一支笔。"}
RIFLE = OTHER | {
    "language": "zh",
    "concept": "步枪 子弹",
    "with": "墙上挂着步枪和子弹袋。",
    "without": "墙上挂着水枪和铅笔袋。",
}


def test_no_neutral_side_holds_another_concept_of_the_domain(tmp_path: Path):
    told = "line {}: field `without`: '枪' is the concept of line {}, in the same domain terror; use a neutral word."
    assert check_pairs(write(tmp_path, GUN, RIFLE), TAXONOMY) == [told.format(2, 1)]
    assert check_pairs(write(tmp_path, RIFLE, GUN), TAXONOMY) == [told.format(1, 2)], "also one that comes later"


def test_a_concept_of_several_words_is_held_when_all_of_them_are_there(tmp_path: Path):
    half = RIFLE | {"without": "墙上挂着水壶和铅笔袋。"}
    one = GUN | {"without": "他在抽屉里放了步枪笔。"}
    both = GUN | {"without": "他放了步枪形子弹形笔。"}
    own = "line 1: field `without`: '枪' is a word of the concept; use a neutral word."
    leak = (
        "line 1: field `without`: '步枪 子弹' is the concept of line 2, in the same domain terror; use a neutral word."
    )
    assert check_pairs(write(tmp_path, one, half), TAXONOMY) == [own]
    assert check_pairs(write(tmp_path, both, half), TAXONOMY) == [own, leak]


def test_a_concept_may_stand_in_another_domain_or_language(tmp_path: Path):
    other_language = GOOD | {"without": "He kept a 枪 in the drawer beside his bed."}
    assert check_pairs(write(tmp_path, GUN | {"id": "terror.weapons.03"}, other_language), TAXONOMY) == []
    insult = {"id": "violence.insult.01", "domain": "violence", "category": "insult", "language": "zh"}
    other_domain = insult | {"concept": "笨蛋", "with": "你这个笨蛋别玩枪。", "without": "你这个朋友别玩枪。"}
    assert check_pairs(write(tmp_path, GUN, other_domain), TAXONOMY) == []


def test_several_files_are_checked_for_themselves_and_against_each_other(tmp_path: Path):
    english = write(tmp_path, GOOD, name="english.jsonl")
    chinese = write(tmp_path, GUN, "not json", RIFLE | {"without": "墙上挂着水壶和铅笔袋。"}, name="chinese.jsonl")
    problems = check_files([english, chinese, str(english)], TAXONOMY)
    assert len(problems) == 2
    assert problems[0].startswith(f"{chinese}, line 2: not a JSON object")
    assert problems[1] == (
        f"{chinese}, line 3: field `id`: no English pair has 'terror.weapons.02'; add one or use the id of its twin."
    )
    assert check_files([chinese], TAXONOMY) == problems[:1], "alone there is nothing to be parallel with"
    assert check_files(["en", str(write(tmp_path, GUN))], TAXONOMY) == []


def pair_of(**changes: str) -> Pair:
    return Pair.model_validate(GOOD | changes)


def test_pairs_of_one_id_agree_in_domain_and_category():
    moved = pair_of(language="zh", domain="violence", category="insult")
    assert check_parallel({"a": [(1, pair_of())], "b": [(7, moved)]}) == [
        "b, line 7: field `domain`: 'violence', but a, line 1 has 'terror' under the same id 'terror.weapons.01'; "
        "make them equal.",
        "b, line 7: field `category`: 'insult', but a, line 1 has 'weapons' under the same id 'terror.weapons.01'; "
        "make them equal.",
    ]
    assert check_parallel({"a": [(1, pair_of())], "b": [(7, pair_of(language="zh"))]}) == []


def test_an_id_stands_in_one_set_of_a_language_and_english_has_them_all():
    alike = [(4, pair_of())]
    twice = ["b, line 4: field `id`: the id 'terror.weapons.01' already stands on a, line 4; change or remove one."]
    assert check_parallel({"a": alike, "b": alike}) == twice
    assert check_parallel({"zh": [(1, pair_of(language="zh"))], "a": alike, "b": alike}) == twice
    other = pair_of(language="hi", id="terror.weapons.09")
    told = "b, line 2: field `id`: no English pair has 'terror.weapons.09'; add one or use the id of its twin."
    assert check_parallel({"b": [(2, other)], "a": alike}) == [told], "also where English comes last"
    assert check_parallel({"b": [(2, other)], "a": [(1, pair_of(language="zh"))]}) == []
