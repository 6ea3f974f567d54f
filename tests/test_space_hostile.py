"""Text that wants to be markup or script, in prompts and in every table of a release: the Space shows it as text."""

import json
import shutil
import urllib.request
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from browsing import ask, open_tab, opened, serving, start

from safesail.diagnosis.inspector import Inspector
from safesail.neurons import NeuronDatabase

gradio_client = pytest.importorskip("gradio_client")
pytest.importorskip("gradio")

HOSTILE = (
    "<script>window.pwned=1</script>",
    "</script><script>window.pwned=2</script>",
    "</textarea></article><img src=x onerror=window.pwned=3>",
    '"><svg onload=window.pwned=4> \' onmouseover="window.pwned=5"',
    "![x](http://192.0.2.1/x.png) [y](javascript:window.pwned=6) <http://192.0.2.1>",
    "${window.pwned=7} `${window.pwned=8}` \\u{41}",
    "{{7*7}} {{{value}}} {%raw%} {% if 1 %} {#if true} {@html '<b>'} @children",
    "&lt;b&gt; &amp; &#60; <!-- gone --> <b>bold</b> **bold** `code` $x^2$ $$y$$",
    "a\x01b\x07c\x1b[31md\x7fe\x85f \u202egnp.exe\u2066x\u2069 \u200f\ufeff",
    "שלום עולם مرحبا 👩‍🔬 你好 नमस्ते",
)
LONG = "<i>100 kB</i> " * 7200
"""Longer than 100,000 characters."""


def hostile_release(folder: Path, release: Path) -> Path:
    """A copy of a release with a hostile text wherever a person, a model or a corpus may have written one."""
    shutil.copytree(release, folder, ignore=shutil.ignore_patterns("scratch"))
    texts = cycle(HOSTILE)
    neurons = pq.read_table(folder / "neurons/neurons/train.parquet")
    said = [LONG, *(next(texts) for _ in range(neurons.num_rows - 1))]
    written = ("category", "concept", "snippet", "explainer", "simulator", "tagger")
    columns = {name: [next(texts) for _ in said] for name in written}
    domains = [[next(texts)] if i < len(HOSTILE) else old for i, old in enumerate(neurons["domains"].to_pylist())]
    rewrite(folder / "neurons/neurons/train.parquet", explanation=said, status="ok", domains=domains, **columns)
    by_id = dict(zip(neurons["neuron_id"].to_pylist(), said, strict=True))
    explanations = folder / "neurons/explanations/en.parquet"
    ids = pq.read_table(explanations)["neuron_id"].to_pylist()
    rewrite(explanations, explanation=[by_id[id] for id in ids], status="ok")
    rewrite(folder / "neurons/scores/train.parquet", method=HOSTILE[0], simulator=HOSTILE[5], status=HOSTILE[3])
    examples = folder / "examples/examples/train.parquet"
    lengths = [len(tokens) for tokens in pq.read_table(examples)["tokens"].to_pylist()]
    tokens = [[next(texts) for _ in range(n)] for n in lengths]
    rewrite(examples, tokens=tokens, source=[next(texts) for _ in lengths])
    return folder


def rewrite(path: Path, **columns: Any) -> None:
    """Put values, or one value for all rows, into columns of a parquet table; their types stay."""
    table = pq.read_table(path)
    for name, values in columns.items():
        values = values if isinstance(values, list) else [values] * table.num_rows
        at = table.schema.get_field_index(name)
        table = table.set_column(at, table.schema.field(at), pa.array(values, table.schema.field(at).type))
    pq.write_table(table, path)


@pytest.fixture(scope="module")
def release(demo_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hostile_release(tmp_path_factory.mktemp("hostile") / "release", demo_run)


@pytest.fixture(scope="module")
def address(release: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(release, tmp_path_factory.mktemp("space")) as address:
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[Any]:
    client = gradio_client.Client(address, verbose=False)
    yield client
    client.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    with opened(browser, address) as page:
        yield page
        inert(page)


def inert(page: Any) -> None:
    """Nothing of the texts became script, handler, picture, frame or link, and nothing of them ran."""
    assert page.evaluate("window.pwned") is None
    made = """() => [...document.querySelectorAll("*")].filter((e) =>
        (e.tagName === "SCRIPT" && e.text.includes("pwned") && !e.text.includes("gradio_config"))
        || [...e.attributes].some((a) => /^on/.test(a.name) || /^\\s*javascript:/i.test(a.value))
        || /^(https?:)?\\/\\/192\\.0\\.2\\.1/.test(e.getAttribute("src") || e.getAttribute("href") || "")
        || (e.tagName === "IMG" && e.getAttribute("src") === "x")
        || (e.matches(".card *, .neurons *, .strip *, .examples *, #headline *, .facets *")
            && ["B", "I", "IMG", "SVG", "SCRIPT", "IFRAME"].includes(e.tagName.toUpperCase()))
    ).map((e) => e.outerHTML.slice(0, 200))"""
    assert page.evaluate(made) == []


def test_explanations_are_shown_as_they_are(page: Any, release: Path) -> None:
    database = NeuronDatabase.load(release)
    open_tab(page, "Neurons")
    page.locator("#found tbody tr").first.wait_for()
    shown = page.locator("#found button.neuron").evaluate_all(
        "all => all.map((b) => [b.dataset.value, b.querySelector('.text').textContent])"
    )
    assert len(shown) == len(database)
    for neuron_id, text in shown:
        assert text == database[neuron_id]["explanation"]
    assert "{{7*7}}" in page.locator("#found").text_content()
    categories = {row["category"] for row in database}
    assert sum(label.lower() in map(str.lower, categories) for label in labels(page, "Categories")) == len(categories)


def labels(page: Any, heading: str) -> list[str]:
    """The names of the bars under a heading; `title` has made their dashes blanks."""
    section = page.locator("#facets section", has=page.get_by_role("heading", name=heading))
    return section.locator(".bars [data-value]").evaluate_all("all => all.map((b) => b.dataset.value)")


def test_a_card_and_its_examples_are_shown_as_they_are(page: Any, release: Path) -> None:
    rows = {row["explanation"]: row for row in NeuronDatabase.load(release)}
    for text in (*HOSTILE[:7], LONG):
        row = rows[text]
        page.evaluate("id => { window.location.hash = '#/neuron/' + id }", row["neuron_id"])
        card = page.locator(f'#neurons-card article[aria-label="Neuron {row["neuron_id"]}"]')
        card.wait_for()
        assert card.locator("h2").text_content() == text
        facts = card.locator("dd").all_text_contents()
        assert row["snippet"] in facts
        assert any(fact.endswith(row["concept"]) for fact in facts)
        assert row["explainer"] in card.text_content()
        assert card.locator("td", has_text=f"{HOSTILE[0]} ({HOSTILE[5]})").count() == card.locator("tbody tr").count()
        page.locator("#neurons-ask").click()
        page.locator("#neurons-examples li").first.wait_for()
        shown = page.locator("#neurons-examples").text_content()
        assert all(part in shown for part in (HOSTILE[0], HOSTILE[4], HOSTILE[6]))
        inert(page)


def test_the_landscape_shows_labels_as_they_are(page: Any, release: Path) -> None:
    database = NeuronDatabase.load(release)
    open_tab(page, "Landscape")
    plot = page.locator("#landscape .plot")
    plot.press("Home")
    seen = set()
    for _ in range(12):
        name = plot.locator(".label code").text_content()
        text = database[name]["explanation"]
        label = plot.locator(".label strong").text_content()
        assert label == text or (text == LONG and label.endswith("…") and text.startswith(label[:-1]))
        seen.add(name)
        plot.press("ArrowRight" if len(seen) % 2 else "ArrowDown")
    assert len(seen) > 3
    legend = page.locator("#landscape .legend").text_content()
    assert all(domain.replace("-", " ").capitalize() in legend for domain in database.domains)


@pytest.mark.parametrize("prompt", [" ".join(HOSTILE[:5]), " ".join(HOSTILE[5:])])
def test_a_hostile_prompt_is_shown_as_text(page: Any, release: Path, prompt: str) -> None:
    inspection = Inspector.from_pretrained(release).inspect([{"role": "user", "content": prompt}], max_new_tokens=4)
    tokens = ask(page, prompt)
    shown = tokens.all_text_contents()
    assert len(shown) == len(inspection.units)
    for unit, text in zip(inspection.units, shown, strict=True):
        if unit.text.isprintable() and unit.text.strip(" ") and "\ufe0f" not in unit.text:
            assert text.strip("␣") == unit.text.strip(" ")
    for index in range(0, len(shown), 40):
        tokens.nth(index).click()
        page.locator("#headline", has_text=f"Token {index + 1} ").wait_for()
    page.locator("#listing label", has_text="all that fire").click()
    with_neurons = next(i for i in range(len(inspection.units) - 1, -1, -1) if inspection.hits(i))
    tokens.nth(with_neurons).click()
    page.locator("#neurons button.neuron").first.click()
    page.locator("#inspector-card article").wait_for()
    link = page.get_by_role("link", name="Link to this token").get_attribute("href")
    page.evaluate("link => { window.location.hash = link }", link)
    page.locator("#strip .section.answer").wait_for()
    assert page.locator("#prompt textarea").input_value() == prompt.replace("\r", "\n")


def test_a_prompt_of_100_kb_is_refused_and_the_page_goes_on(page: Any, client: Any) -> None:
    page.locator("#prompt textarea").fill(LONG)
    start(page, "#run")
    page.locator("#strip", has_text=f"The prompt has {len(LONG):,} characters; the limit is 10,240.").wait_for()
    with pytest.raises(gradio_client.exceptions.AppError, match="the limit is 10,240"):
        client.predict(prompt=LONG, api_name="/inspect")
    assert ask(page, "a bomb").count() > 0


def called(address: str, name: str, *arguments: Any) -> Any:
    """What an endpoint answers to JSON that `gradio_client` would not send; AssertionError with its message if any."""
    body = json.dumps({"data": arguments}).encode()  # ASCII only: half a character is \ud800
    asked = urllib.request.Request(f"{address}gradio_api/call/{name}", body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(asked, timeout=20) as reply:
        event = json.load(reply)["event_id"]
    with urllib.request.urlopen(f"{address}gradio_api/call/{name}/{event}", timeout=20) as stream:
        *_, kind, data = stream.read().decode().strip().splitlines()
    assert kind == "event: complete", data
    return json.loads(data.removeprefix("data: "))[0]


def test_lone_halves_of_characters_become_question_marks(page: Any, address: str) -> None:
    asked = called(address, "inspect", "a \ud800 bomb", "chat", 0, 0, 0, "\udfff", "\ud800")
    assert "a ? bomb" in "".join(token["text"] for token in asked["tokens"])
    assert called(address, "search", "\ud800", "\ud800", "", None, "\ud800") == []
    with pytest.raises(AssertionError, match="is not a neuron here"):
        called(address, "neuron", "\ud800/1", "")
    with pytest.raises(AssertionError, match="use chat or raw"):
        called(address, "inspect", "a", "\ud800", 0, 0, 0, "", "")
    field = page.locator("#prompt textarea")
    field.evaluate("f => { f.value = 'b \\ud83d bomb'; f.dispatchEvent(new Event('input', { bubbles: true })) }")
    start(page, "#run")
    page.locator("#strip .section.answer").wait_for()
    assert "?" in page.locator("#strip button").all_text_contents()
    page.evaluate("window.location.hash = '#/inspect?max_new_tokens=0&prompt=c%ED%A0%80\\ud800%00bomb'")
    page.locator("#strip .section.answer").wait_for(state="detached")
    assert page.locator("#prompt textarea").input_value().startswith("c\ufffd")


def test_the_api_gives_the_texts_as_they_are(client: Any, release: Path) -> None:
    database = NeuronDatabase.load(release)
    found = {row["neuron_id"]: row for row in client.predict(api_name="/search")}
    for row in database:
        assert found[row["neuron_id"]]["explanation"] == row["explanation"]
        assert found[row["neuron_id"]]["domains"] == row["domains"]
    longest = max(database, key=lambda row: len(row["explanation"]))
    assert client.predict(id=longest["neuron_id"], api_name="/neuron")["explanation"] == LONG
