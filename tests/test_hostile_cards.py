"""Cards of a release whose every foreign text is hostile: they have the structure of a harmless release's cards."""

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from made_release import made_explanations, made_recipe, made_release, made_scores, made_tags

from safesail.recipe import Recipe
from safesail.release.inert import json_row, md_cell, md_code, one_line

PARTS = ("saes", "neurons", "examples", "inspector")
HOSTILE = (
    "a | b || c |",
    "`code` ``` ~~~",
    "```\n# out of the fence",
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "<!-- gone",
    "</details></table>",
    "[x](https://example.org) ![y](https://example.org/y.png) <https://example.org>",
    "[x]: https://example.org\n[x]",
    "https://example.org www.example.org me@example.org",
    "\n\n# Heading\n\n- item\n\n1. one\n\n> quote\n\n---\n",
    "\n---\nlicense: mit\n---\n",
    "---",
    "...",
    "- x",
    "3. x",
    '\'"\n  license: mit\n"',
    "key: value # comment",
    "&amp; &#124; &lt;b&gt; \\| \\<",
    "{{ config }} {% raw %} {# no #}",
    "*a* **b** _c_ __d__ ~~e~~ $$f$$",
    "!!python/object:os.system x",
    "*anchor &anchor",
    "\u202egnp.exe\u2066x\u2069 \u200f",
    "a\x00b\x07c\x1b[31md\x85e\u2028f",
    "yes",
    "null",
    "1e3",
    "|---|---|",
)
UNPRINTABLE = re.compile("[\x00-\x09\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


def card_parts(text: str) -> tuple[dict[str, Any], list[Any]]:
    """The front matter, and what a Markdown parser makes of the rest: blocks, marks and where links lead, no text."""
    markdown_it = pytest.importorskip("markdown_it")
    ((front, body),) = re.findall(r"\A---\n(.*?)\n---\n(.*)", text, flags=re.S)
    tokens = markdown_it.MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(body)
    return yaml.safe_load(front), [part for token in tokens for part in _structure(token)]


def _structure(token: Any) -> list[Any]:
    if token.type == "inline":
        marks = [child for child in token.children if child.type not in ("text", "text_special", "softbreak")]
        return [(mark.type, mark.attrGet("href") or mark.attrGet("src")) for mark in marks]
    return [(token.type, token.tag, token.info)]


def made_with(folder: Path, said: Any) -> Path:
    """A release with a text by `said()` in every place that a person, a model or a corpus fills."""
    recipe = made_recipe(folder).dump()
    recipe["publish"] |= {"title": said(), "licence": said()}
    recipe["model"] |= {"base_model": said(), "revision": said(), "note": said(), "licence": said()}
    sources = [{"path": f"{i}.jsonl", "origin": f"{i}: {said()}", "licence": said()} for i in (1, 2)]
    recipe["corpus"]["sources"] = sources
    asked = {"explainer": said(), "prompt_hash": said(), "detail": said()}  # one each: a card lists them
    explanations = [row | asked for row in made_explanations()]
    for row in explanations:
        row["explanation"] = row["explanation"] and said()
    tags = [row | {"category": said(), "concept": said(), "tagger": said()} for row in made_tags()]
    scores = [row | {"simulator": said()} for row in made_scores()]
    return made_release(folder, Recipe.parse(recipe), explanations=explanations, tags=tags, scores=scores)


@pytest.fixture(scope="module")
def harmless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_with(tmp_path_factory.mktemp("harmless"), lambda: "some words")


@pytest.fixture(scope="module", params=range(3))
def hostile(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Every text is one of HOSTILE, or two of them joined."""
    chance = random.Random(request.param)

    def said() -> str:
        return "".join(chance.sample(HOSTILE, chance.choice((1, 2))))

    return made_with(tmp_path_factory.mktemp("hostile"), said)


@pytest.mark.parametrize("part", PARTS)
def test_hostile_text_changes_no_structure_and_leads_nowhere(hostile: Path, harmless: Path, part: str):
    texts = [(folder / part / "README.md").read_text(encoding="utf-8") for folder in (hostile, harmless)]
    (front, structure), (plain_front, plain_structure) = map(card_parts, texts)
    assert structure == plain_structure
    assert set(front) == set(plain_front)
    assert not any(kind in ("html_block", "html_inline") for kind, *_ in structure)
    assert not UNPRINTABLE.search(texts[0])


@pytest.mark.parametrize("part", PARTS)
def test_the_front_matter_says_the_hostile_words_and_no_more(hostile: Path, harmless: Path, part: str):
    from huggingface_hub import RepoCard

    (front, _), (plain, _) = (card_parts((folder / part / "README.md").read_text()) for folder in (hostile, harmless))
    settings = json.loads((hostile / "run.json").read_text(encoding="utf-8"))["recipe"]["publish"]
    title = one_line(settings["title"])
    assert front.get("pretty_name", f"{title}: {part}") == f"{title}: {part}"
    assert front.get("title", title) == title
    told = ("pretty_name", "title", "language", "language_bcp47", "license_name")
    rest, plain_rest = ({key: data[key] for key in data if key not in told} for data in (front, plain))
    assert rest == plain_rest
    assert RepoCard((hostile / part / "README.md").read_text(encoding="utf-8")).data.to_dict() == front


def test_every_row_of_every_table_keeps_its_cells(hostile: Path):
    for part in PARTS:
        text = re.sub(r"```.*?```", "", (hostile / part / "README.md").read_text(encoding="utf-8"), flags=re.S)
        for table in re.findall(r"(?:^\|.*\n?)+", text, flags=re.M):
            assert len({line.count("|") for line in table.rstrip("\n").split("\n")}) == 1, table


def test_the_row_shown_as_json_is_the_row(hostile: Path):
    text = (hostile / "neurons/README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```json\n(.*?)\n```\n", text, flags=re.S)
    import pyarrow.parquet as pq

    table = pq.read_table(hostile / "neurons/neurons/train.parquet").to_pylist()
    shown = json.loads(block)
    (row,) = [row for row in table if row["neuron_id"] == shown["neuron_id"]]
    assert shown["explanation"] == row["explanation"]
    assert shown["category"] == row["category"]


@pytest.mark.parametrize("text", HOSTILE)
def test_a_line_that_begins_with_the_text_is_a_paragraph(text: str):
    """Not a list, a heading or a rule: a cell's text is also inert at the start of a line."""
    markdown_it = pytest.importorskip("markdown_it")
    tokens = markdown_it.MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(md_cell(text))
    assert [token.type for token in tokens] == ["paragraph_open", "inline", "paragraph_close"]


@pytest.mark.parametrize("text", HOSTILE)
def test_code_is_one_span(text: str):
    markdown_it = pytest.importorskip("markdown_it")
    parser = markdown_it.MarkdownIt("commonmark").enable("table")
    tokens = parser.parse(f"| a |\n|---|\n| {md_code(text)} |")
    assert [token.type for token in tokens].count("td_open") == 1
    (_, inline) = (token for token in tokens if token.type == "inline")
    assert [child.type for child in inline.children] == ["code_inline"]


def test_lone_halves_of_characters_can_be_written():
    assert one_line("a\ud800b") == "a\ufffdb"
    assert json.loads(json_row({"x": "a\ud800\u202eb"})) == {"x": "a\ud800\u202eb"}
    assert json_row({"x": "\u202e"}) == '{\n  "x": "\\u202e"\n}'
    assert one_line("नमस्ते क्\u200dष 👩\u200d🔬") == "नमस्ते क्\u200dष 👩\u200d🔬"  # joiners are part of words
