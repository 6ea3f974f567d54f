"""The shipped pairs and taxonomy are sound, and every rule of the validator fires on a file that breaks it."""

import json
from collections import Counter
from pathlib import Path

import pytest

from safesail.assets import asset
from safesail.errors import InputError
from safesail.pairs import Pair, check_pairs, load_pairs
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


def write(folder: Path, *lines: dict | str) -> Path:
    path = folder / "pairs.jsonl"
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


def test_the_shipped_pairs_have_no_problem():
    assert check_pairs("en", TAXONOMY) == []


def test_every_category_has_at_least_six_pairs():
    n_pairs = Counter((pair.domain, pair.category) for pair in load_pairs("en"))
    categories = [(domain.id, category.id) for domain in TAXONOMY.domains for category in domain.categories]
    assert len(categories) == 17
    assert all(n_pairs[category] >= 6 for category in categories)


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
