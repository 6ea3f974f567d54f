"""The Neurons tab in a browser: searching, narrowing by counts, a neuron's card and the language of explanations.

Of the 120 neurons every domain has 30 and layers.0.mlp/0 two domains; 20 have each of the scores 0.65, 0.45, 0.25, 0.05
and −0.15, and 20 none.
"""

import re
from collections.abc import Iterator
from typing import Any

import pytest
from browsing import cells, choose, open_tab, opened

pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect


@pytest.fixture(scope="module")
def tab(browser: Any, told_space: str) -> Iterator[Any]:
    with opened(browser, told_space) as page:
        yield page


@pytest.fixture
def page(tab: Any) -> Any:
    """The tab as it is when it is opened."""
    tab.reload()
    open_tab(tab, "Neurons")
    expect(tab.locator("#facets")).to_contain_text("120 neurons, the best 50 shown, best score first.")
    return tab


def expect_count(page: Any, n: int) -> None:
    """As many neurons are found; of more than 50 the first are shown."""
    shown = ", the best 50 shown" if n > 50 else ""
    expect(page.get_by_role("status").filter(has_text="best score first")).to_have_text(
        f"{n} neuron{'' if n == 1 else 's'}{shown}, best score first."
    )
    expect(page.locator("#found tbody tr")).to_have_count(min(n, 50))


def counts(page: Any, heading: str) -> dict[str, str]:
    """The bars or columns under a heading: {label: count}."""
    section = page.locator("#facets section").filter(has=page.get_by_role("heading", name=heading))
    rows = section.locator("li").all()
    return {row.locator(".label").inner_text(): row.locator(".count").inner_text() for row in rows}


def search(page: Any, words: str) -> None:
    page.locator("#search :is(input, textarea)").fill(words)


def test_the_neurons_are_listed_best_first_and_counted(page: Any):
    expect_count(page, 120)
    assert [row[0].partition(",")[0] for row in cells(page, "#found")] == ["0.65"] * 20 + ["0.45"] * 20 + ["0.25"] * 10
    first = cells(page, "#found")[0]
    assert first == ["0.65, strong\n0.55 to 0.75", "Words about gardens, kind 15\nlayers.0.mlp/15", "–", "–"]
    assert counts(page, "Categories") == {"Insult": "30", "Political event": "30", "Weapons": "30"} | {
        "Without a category": "30"
    }
    assert counts(page, "Hook points") == {"layers.0.mlp": "60", "layers.1.mlp": "60"}
    assert counts(page, "Scores") == dict.fromkeys([f".{i}" for i in range(1, 10)], "0") | {
        "< .1": "40",
        ".2": "20",
        ".4": "20",
        ".6": "20",
    }
    expect(page.locator("#facets")).to_contain_text("20 without a score.")


def test_more_neurons_are_shown_on_demand(page: Any):
    more, rows = page.get_by_role("button", name="Show 50 more"), page.locator("#found tbody tr")
    more.click()
    expect(rows).to_have_count(100)
    expect(page.locator("#facets")).to_contain_text("120 neurons, the best 100 shown")
    more.click()
    expect(rows).to_have_count(120)
    expect(more).to_be_hidden()
    assert cells(page, "#found")[-1][0] == "undefined"
    search(page, "words")
    expect_count(page, 120 - 2)  # of the two without an English explanation one says 词, the other nothing
    expect(more).to_be_visible()


@pytest.mark.parametrize(
    ("words", "n"),
    [("insults", 30), ("CAR bomb", 30), ("layers.1.mlp/7", 1), ("侮辱", 16), ("第10种", 1)],
)
def test_words_find_explanations_concepts_and_ids(page: Any, words: str, n: int):
    """Of insults every fourth latent from 1 to 29 is explained in Chinese, at two hook points."""
    search(page, words)
    expect_count(page, n)


def test_hostile_words_find_nothing_and_do_nothing(page: Any):
    search(page, "<img src=x onerror=window.pwned=1>")
    expect(page.get_by_text("No neuron matches; try fewer words")).to_be_visible()
    expect(page.locator("#found tr")).to_have_count(0)
    assert counts(page, "Categories") == {}
    assert page.evaluate("window.pwned") is None


def test_domains_are_switched_off_and_on(page: Any):
    domains = page.locator("#domains")
    domains.get_by_label("No domain").uncheck()
    expect_count(page, 90)
    domains.get_by_label("Politics").uncheck()
    expect_count(page, 61)  # layers.0.mlp/0 is still there for its other domain
    domains.get_by_label("Terror").uncheck()
    expect_count(page, 30)
    assert {row[2] for row in cells(page, "#found")} == {"Violence"}
    domains.get_by_label("Violence").uncheck()
    expect(page.get_by_text("No neuron matches")).to_be_visible()
    domains.get_by_label("No domain").check()
    expect_count(page, 30)
    assert {row[2] for row in cells(page, "#found")} == {"–"}


def test_bars_narrow_the_search(page: Any):
    page.locator("#facets").get_by_role("button", name=re.compile("Weapons")).click()
    expect_count(page, 30)
    assert counts(page, "Categories") == {"Weapons": "30"}
    assert {row[3] for row in cells(page, "#found")} == {"Weapons · car bomb"}
    page.locator("#facets").get_by_role("button", name=re.compile(r"layers\.1\.mlp")).click()
    expect_count(page, 15)
    assert counts(page, "Hook points") == {"layers.1.mlp": "15"}
    assert counts(page, "Scores")["< .1"] == "5"  # latents 6, 18, 30, 42 and 54 score 0.05, and none −0.15
    fields = [page.get_by_label(name).locator("visible=true").input_value() for name in ("Category", "Hook point")]
    assert fields == ["Weapons", "layers.1.mlp"]


def test_a_least_score_leaves_out_the_weak_and_the_undefined(page: Any):
    box = page.get_by_role("spinbutton", name=re.compile("Minimum score"))
    box.fill("0.45")
    box.blur()
    expect_count(page, 40)
    assert {row[0].partition(",")[0] for row in cells(page, "#found")} == {"0.65", "0.45"}
    expect(page.locator("#facets")).not_to_contain_text("without a score")
    box.fill("")
    expect_count(page, 120)
    box.fill("7")
    expect(page.get_by_text("No neuron matches")).to_be_visible()
    box.blur()
    expect(box).to_have_value("1")
    page.get_by_role("slider", name=re.compile("Minimum score")).focus()
    page.keyboard.press("Home")
    for _ in range(13):
        page.keyboard.press("ArrowRight")
    expect_count(page, 20)  # 13 steps of 0.05


def test_a_neurons_card_with_its_examples_behind_the_warning(page: Any):
    search(page, "layers.0.mlp/15")
    expect_count(page, 1)
    page.locator("#found button.neuron").click()
    card = page.get_by_role("article", name="Neuron layers.0.mlp/15")
    expect(card.get_by_role("heading", level=2)).to_have_text("Words about gardens, kind 15")
    for fact in ("0.65 (0.55 to 0.75), strong", "Of 12,1", "关于花园的词，第15种", "Scores by every method (2)"):
        expect(card).to_contain_text(fact)
    link = card.get_by_role("link", name="Link to this neuron")
    assert link.get_attribute("href") == "#/neuron/layers.0.mlp/15"
    expect(page.locator("#neurons-where :is(section, p)")).to_have_count(0)
    assert "made texts" not in page.content()
    page.get_by_role("button", name="Show examples: they may contain offensive text").locator("visible=true").click()
    expect(page.locator("#neurons-examples mark")).to_have_text(["car", "bomb", "car", "bomb"])
    page.locator("#neurons-panel").get_by_role("button", name="Close").click()
    expect(card).to_be_hidden()


def test_the_card_of_a_neuron_that_was_refused(page: Any):
    search(page, "layers.0.mlp/10")
    expect_count(page, 1)
    assert cells(page, "#found")[0][:2] == ["undefined", "none (refused)\nlayers.0.mlp/10"]
    page.locator("#found button.neuron").click()
    card = page.get_by_role("article", name="Neuron layers.0.mlp/10")
    expect(card.get_by_role("heading", level=2)).to_have_text("Not explained")
    expect(card).to_contain_text("There is no explanation of it in any language (status: refused).")


def test_the_language_of_the_explanations_is_chosen(page: Any):
    search(page, "bombs")
    expect_count(page, 28)  # two of the thirty are refused in English
    choose(page, "language", "zh")
    expect(page.locator("#found .text").first).to_have_text("关于炸弹的词，第14种")
    said = {row[1] for row in cells(page, "#found")}
    assert "关于炸弹的词，第2种\nlayers.1.mlp/2" in said
    assert "Words about bombs, kind 38\n(en)\nlayers.0.mlp/38" in said
    page.locator("#found button[data-value='layers.0.mlp/38']").click()
    card = page.get_by_role("article", name="Neuron layers.0.mlp/38")
    expect(card.locator(".note")).to_have_text("There is no explanation in zh (refused); this one is in en.")
    page.locator("#found button[data-value='layers.0.mlp/50']").click()
    expect(page.get_by_role("article", name="Neuron layers.0.mlp/50").locator(".note")).to_have_text(
        "There is no explanation in zh (absent); this one is in en."
    )
