"""The pages of the diagnosis in a browser: each shows what its function gives, to download and to make again."""

import base64
import io
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from browsing import cells, open_tab, opened, start

from safesail.diagnosis.inspector import Inspector
from safesail.diagnosis.results import Result
from safesail.diagnosis.trajectories import trajectories

pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect

PROMPT, OTHER = "The president saw a bomb.", "The senator heard about hostages."
HOSTILE = "<script>window.pwned=1</script> {{7*7}} ${window.pwned=2} </script> bomb"
TABS = ("Trajectories", "Interventions", "Knowledge", "Monitor")


@pytest.fixture(scope="module")
def inspector(told: Path) -> Inspector:
    return Inspector.from_pretrained(told)


@pytest.fixture(scope="module")
def visitor(browser: Any, told_space: str) -> Iterator[Any]:
    with opened(browser, told_space, width=1440) as page:
        page.set_default_timeout(60_000)
        yield page


@pytest.fixture
def page(visitor: Any) -> Any:
    """The page as it is when it is opened."""
    visitor.reload()
    visitor.locator("#prompt textarea").wait_for()
    return visitor


def go(page: Any, tab: str) -> None:
    open_tab(page, tab)
    page.locator("[role=tabpanel]:visible button.primary").first.wait_for()


def fill(page: Any, elem_id: str, text: str) -> None:
    page.locator(f"#{elem_id} :is(textarea, input)").fill(text)


def article(page: Any, name: str) -> Any:
    found = page.locator(f"#{name}-result article")
    found.wait_for()
    return found


def says(page: Any, name: str, sentence: str) -> None:
    """Wait for a sentence in a result's place, where an earlier result may still stand."""
    expect(page.locator(f"#{name}-result .note", has_text=sentence)).to_be_visible()


def downloaded(page: Any, name: str) -> list[dict[str, Any]]:
    """The rows of the parquet file that the page offers."""
    link = page.locator(f"#{name}-result a[download]")
    assert link.get_attribute("download").endswith(".parquet")
    content = base64.b64decode(link.get_attribute("href").partition("base64,")[2])
    return pq.read_table(io.BytesIO(content)).to_pylist()


def same_rows(rows: list[dict[str, Any]], expected: Result) -> None:
    """The rows of a result but for the last bits, in which processes of unequal threads differ."""
    assert len(rows) == len(expected.rows)
    for row, told in zip(rows, expected.rows, strict=True):
        for name in expected.schema.names:
            value = told.get(name)
            assert row.get(name) == (pytest.approx(value, rel=1e-4) if isinstance(value, float) else value)


def python_of(page: Any, name: str) -> str:
    return page.locator(f"#{name}-result details code").text_content()


def firing(inspector: Inspector, prompt: str) -> str:
    """The id of an explained neuron of the later hook point that fires on a text."""
    inspection = inspector.inspect(prompt)
    hits = [hit for i in range(len(inspection.units)) for hit in inspection.hits(i, explained_only=True)]
    return next(hit.neuron_id for hit in hits if hit.hook_point == "layers.1.mlp" and hit.normalised)


def test_a_page_is_drawn_when_it_is_first_opened(page: Any) -> None:
    for button in ("#compare", "#steer", "#know", "#score"):
        assert page.locator(button).count() == 0
    go(page, "Monitor")
    assert page.locator("#score").count() == 1
    assert page.locator("#compare").count() == 0


def test_trajectories_of_two_versions_are_those_of_the_function(page: Any, inspector: Inspector) -> None:
    go(page, "Trajectories")
    page.get_by_label("Text of version 1").fill(PROMPT)
    page.get_by_label("Text of version 2").fill(OTHER)
    start(page, "#compare")
    shown = article(page, "trajectories")
    expected = trajectories(inspector, {"original": PROMPT, "second": OTHER}, answer=0, top=12, by="domain")
    same_rows(downloaded(page, "trajectories"), expected)
    scope: dict[str, Any] = {}
    exec(python_of(page, "trajectories"), scope)
    same_rows(scope["result"].rows, expected)
    readings = [version["reading"]["sentence"] for version in expected.facts["versions"]]
    assert [item.strip() for item in shown.locator("ul li").all_inner_texts()] == readings
    n_lines = len(expected.facts["concepts"]) // 2
    concepts = shown.locator("table", has=page.locator("caption", has_text="strongest normalised activation"))
    assert concepts.locator("tbody tr").count() == n_lines
    shown.locator("button.neuron").first.click()
    expect(page.locator("#trajectories-card h2")).to_be_focused()


def test_a_built_in_example_fills_the_versions(page: Any) -> None:
    go(page, "Trajectories")
    page.get_by_label("Built-in example").click()
    page.get_by_role("option", name="Weapon", exact=True).click()
    expect(page.get_by_label("Name of version 2")).to_have_value("zh")
    assert "gun" in page.get_by_label("Text of version 1").input_value()


def test_two_versions_of_one_name_are_one_sentence(page: Any) -> None:
    go(page, "Trajectories")
    for i in (1, 2):
        page.get_by_label(f"Name of version {i}").fill("same")
        page.get_by_label(f"Text of version {i}").fill(PROMPT)
    start(page, "#compare")
    says(page, "trajectories", "two versions are called 'same'")


def test_the_graph_of_a_neuron_is_a_picture_and_a_table(page: Any, inspector: Inspector) -> None:
    go(page, "Trajectories")
    neuron = firing(inspector, PROMPT)
    fill(page, "graph-text", PROMPT)
    fill(page, "graph-neuron", neuron)
    start(page, "#draw")
    article(page, "graph")
    assert page.locator("#graph-result svg").count() == 1
    assert neuron in page.locator("#graph-result caption").inner_text()
    assert len(cells(page, "#graph-result")) > 0
    fill(page, "graph-neuron", "layers.9.mlp/1")
    start(page, "#draw")
    says(page, "graph", "not a neuron here")


def test_an_amount_of_nothing_leaves_the_answer_as_it_is(page: Any, inspector: Inspector) -> None:
    go(page, "Interventions")
    assert "arXiv 2606.18322" in page.locator("[role=tabpanel]:visible").inner_text()
    fill(page, "steer-prompt", PROMPT)
    fill(page, "steer-neurons", firing(inspector, PROMPT))
    page.get_by_role("spinbutton", name="Amount").fill("0")
    page.get_by_role("spinbutton", name="Max new tokens").last.fill("6")
    page.get_by_role("spinbutton", name="Max new tokens").last.blur()
    start(page, "#steer")
    shown = article(page, "interventions")
    expect(shown).to_contain_text("The answer is the same, token by token.")
    (row,) = downloaded(page, "interventions")
    assert row["ids_unchanged"] == row["ids_changed"]
    assert len(row["ids_unchanged"]) == 6
    page.get_by_role("spinbutton", name="Amount").fill("20")
    page.get_by_role("spinbutton", name="Amount").blur()
    start(page, "#steer")
    expect(shown).to_contain_text("tokens at the start")
    (row,) = downloaded(page, "interventions")
    assert row["ids_unchanged"] != row["ids_changed"]


def test_an_intervention_without_a_neuron_is_one_sentence(page: Any) -> None:
    go(page, "Interventions")
    fill(page, "steer-prompt", PROMPT)
    start(page, "#steer")
    says(page, "interventions", "no neuron was named")


def test_prompts_are_counted_that_are_declined(page: Any, inspector: Inspector) -> None:
    go(page, "Interventions")
    fill(page, "steer-neurons", firing(inspector, PROMPT))
    page.get_by_role("button", name="Over a list of prompts").click()
    page.get_by_label("Prompts, one a line").fill(f"{PROMPT}\n\n{OTHER}")
    start(page, "#decline")
    shown = article(page, "rates")
    expect(shown).to_contain_text("None of the 2 prompts is declined")
    assert [row[0] for row in cells(page, "#rates-result")] == [PROMPT, OTHER]
    page.get_by_label("Prompts, one a line").fill("a\n" * 17)
    start(page, "#decline")
    says(page, "rates", "17 prompts were given; here at most 16")


def test_knowledge_of_ones_own_names(page: Any, inspector: Inspector) -> None:
    go(page, "Knowledge")
    fill(page, "known-neuron", firing(inspector, PROMPT))
    entities = [{"name": f"Ada {i}", "prompt": "She wrote", "accepted": ["never said"]} for i in range(3)]
    page.get_by_label("Or your own list").fill("\n".join(map(json.dumps, entities)))
    start(page, "#know")
    shown = article(page, "knowledge")
    expect(shown).to_contain_text("How firing and knowing go together")
    assert [row["name"] for row in downloaded(page, "knowledge")] == ["Ada 0", "Ada 1", "Ada 2"]
    page.get_by_label("Or your own list").fill("Ada Lovelace")
    start(page, "#know")
    says(page, "knowledge", "line 1 is no entity")


def test_the_monitor_shows_every_term_of_a_risk(page: Any) -> None:
    go(page, "Monitor")
    fill(page, "monitor-text", PROMPT)
    start(page, "#score")
    shown = article(page, "monitor")
    rows = downloaded(page, "monitor")
    domains = list(dict.fromkeys(row["domain"] for row in rows))
    assert len(domains) > 1
    assert [heading.split()[0].lower() for heading in shown.locator("h2").all_inner_texts()] == domains
    for domain in domains:
        mine = [row for row in rows if row["domain"] == domain]
        probability = f"{mine[0]['probability']:.2f}"
        assert (
            f"Its probability {probability} is" in shown.locator("section", has_text=domain.capitalize()).inner_text()
        )


def test_hostile_texts_are_shown_and_inert(page: Any) -> None:
    go(page, "Trajectories")
    page.get_by_label("Name of version 1").fill(HOSTILE)
    page.get_by_label("Text of version 1").fill(HOSTILE)
    start(page, "#compare")
    article(page, "trajectories")
    assert HOSTILE in python_of(page, "trajectories").replace("\\'", "'")
    go(page, "Monitor")
    fill(page, "monitor-text", HOSTILE)
    start(page, "#score")
    article(page, "monitor")
    assert page.evaluate("window.pwned") is None
    assert page.locator("article script").count() == 0


@pytest.mark.parametrize("width", [380, 1440])
def test_axe_finds_nothing_serious(browser: Any, told_space: str, inspector: Inspector, width: int) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    findings = []
    with opened(browser, told_space, width=width) as page:
        page.set_default_timeout(60_000)
        for tab in TABS:
            go(page, tab)
            if tab == "Monitor":
                fill(page, "monitor-text", PROMPT)
                start(page, "#score")
                article(page, "monitor")
            page.wait_for_timeout(300)
            for found in axe.run(page).response["violations"]:
                if found["impact"] in ("serious", "critical"):
                    findings.append((tab, found["id"], [node["target"] for node in found["nodes"][:3]]))
            wide, screen = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
            assert wide <= screen, (tab, wide, screen)
    assert findings == []


# --- without a browser --------------------------------------------------------------------------------------------


def test_a_result_is_escaped_and_carries_its_table(space: Any) -> None:
    results: ModuleType = space("results")
    schema = pa.schema([("text", pa.string())])
    result = Result("monitor", [{"text": HOSTILE}], schema, f"print({HOSTILE!r})", {})
    html = str(results.result_html(result, results.table("A <b>", ["<i>"], [[HOSTILE]])))
    assert "<script>" not in html
    assert "<b>" not in html
    assert "&lt;script&gt;" in html
    assert "Download monitor.parquet (1 row)" in html
