"""The Inspector tab in a browser: a prompt, its tokens, their neurons, the filters, and a neuron's panel."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browsing import ask, ask_by_keys, choose, neurons, opened, start
from told_release import explanation

from safesail.diagnosis.inspection import Hit, Inspection, Where
from safesail.diagnosis.inspector import Inspector

pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")
expect = playwright.expect

PROMPT = "The president saw a bomb."
HOSTILE = (
    "<script>window.pwned=1</script> {{7*7}} ${window.pwned=2} \\u{41} ` </script> & &lt; 👋🏽 你好 नमस्ते שלום عالم"
)


@pytest.fixture(scope="module")
def inspector(told: Path) -> Inspector:
    return Inspector.from_pretrained(told)


@pytest.fixture(scope="module")
def inspection(inspector: Inspector) -> Inspection:
    """What the page should show of PROMPT."""
    return inspector.inspect([{"role": "user", "content": PROMPT}], max_new_tokens=4)


@pytest.fixture(scope="module")
def tab(browser: Any, told_space: str) -> Iterator[Any]:
    with opened(browser, told_space) as page:
        yield page


@pytest.fixture
def page(tab: Any) -> Any:
    """The page as it is when it is opened: loaded again in the same tab, which is quicker than a tab of its own."""
    tab.reload()
    tab.locator("#prompt textarea").wait_for()
    return tab


@pytest.fixture(scope="module")
def busiest(inspection: Inspection) -> int:
    """The token on which the most explained neurons fire."""
    return max(range(len(inspection.units)), key=lambda i: len(inspection.hits(i, explained_only=True)))


def select(page: Any, index: int) -> None:
    """Click a token and wait until it is the selected one."""
    page.locator("#strip button").nth(index).click()
    wait_for_token(page, index)


def wait_for_token(page: Any, index: int) -> None:
    expect(page.locator("#headline")).to_contain_text(re.compile(rf"Token {index + 1}\b"))


def pressed(page: Any) -> list[str]:
    """The places of the tokens that are marked as selected."""
    return page.locator("#strip button[aria-pressed=true]").evaluate_all("all => all.map(b => b.dataset.index)")


def expect_strengths(page: Any, values: list[float]) -> None:
    """The tokens are coloured by these strengths."""
    page.wait_for_function(
        "values => [...document.querySelectorAll('#strip button')].every("
        "(b, i) => Math.abs(b.style.getPropertyValue('--strength') - values[i]) < 0.001)",
        arg=[min(value, 1) for value in values],
    )


def expect_hits(page: Any, hits: list[Hit]) -> None:
    """The table lists these neurons, in this order."""
    expect(page.locator("#neurons button.neuron .id")).to_have_text([hit.neuron_id for hit in hits])


def said(hit: Hit, language: str, other: str) -> str:
    """What the table says: the explanation, else that of the other language with its name, else why there is none."""
    text, fallback = (explanation(hit.hook_point, hit.latent, name) for name in (language, other))
    return text or (f"{fallback}\n({other})" if fallback else "not explained (refused); fires here on “")


# --- a prompt and its tokens --------------------------------------------------------------------------------------


def test_a_prompt_is_answered_and_a_clicked_token_shows_its_neurons(page: Any, inspection: Inspection, busiest: int):
    tokens = ask(page, PROMPT)
    assert tokens.count() == len(inspection.units)
    assert page.locator("#answer textarea").input_value() == inspection.answer
    start = inspection.strengths(Where(above=0.2))
    assert pressed(page) == [str(start.index(max(start)))], "the strongest token is selected without a click"
    expect_strengths(page, start)
    select(page, busiest)
    assert pressed(page) == [str(busiest)]
    hits = inspection.hits(busiest, explained_only=True)
    expect_hits(page, hits)
    for row, hit in zip(neurons(page), hits, strict=True):
        assert row[0] == f"{hit.normalised:.2f}"
        assert row[1].startswith(said(hit, "en", "zh"))
        assert row[1].endswith(f"\n{hit.neuron_id}")
        assert row[3].startswith("undefined" if hit.score is None else f"{hit.score:.2f}".replace("-", "−"))


def test_a_special_token_says_why_it_has_no_neurons(page: Any):
    tokens = ask(page, PROMPT)
    assert tokens.nth(0).get_attribute("aria-label") == "token 1 '<|im_start|>' special token"
    tokens.nth(0).click()
    expect(page.locator("#headline")).to_contain_text("the token policy leaves it out")
    expect(page.locator("#neurons :is(table, p)")).to_have_count(0)


def test_the_keyboard_reaches_every_token(page: Any):
    tokens = ask(page, PROMPT)
    page.locator("#strip button[aria-pressed=true]").focus()
    page.keyboard.press("Home")
    assert page.evaluate("document.activeElement.dataset.index") == "0"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    wait_for_token(page, 2)
    assert pressed(page) == ["2"]
    page.keyboard.press("End")
    page.keyboard.press("ArrowRight")
    last = tokens.count() - 1
    assert page.evaluate("document.activeElement.dataset.index") == str(last)
    page.keyboard.press("Space")
    wait_for_token(page, last)
    page.locator("#prompt textarea").fill("a ")
    ask_by_keys(page, "river")
    expect(tokens.filter(has_text="river").first).to_be_visible()


def test_hostile_text_is_shown_and_inert(page: Any, inspector: Inspector):
    tokens = ask(page, HOSTILE)
    inspection = inspector.inspect([{"role": "user", "content": HOSTILE}], max_new_tokens=4)
    shown = tokens.all_text_contents()
    assert len(shown) == len(inspection.units)
    for unit, text in zip(inspection.units, shown, strict=True):
        if unit.text.strip() and unit.text.isprintable() and not unit.text.startswith("\ufe0f"):
            assert text in (unit.text.strip(), unit.text)
    together = "".join(shown)
    assert [part for part in ("<script>", "&lt;", "{{7*7}}", "你好") if part not in together] == []
    assert "".join(page.locator("#strip .run[dir=rtl]").all_text_contents()).startswith("שלום␣عالم")
    page.get_by_label("all that fire").check()
    page.locator("#neurons", has_text="not explained").wait_for()  # a click before that may be overtaken
    for index in range(0, len(shown), 11):
        select(page, index)
    assert page.evaluate("window.pwned") is None


def test_a_mistake_is_a_message_and_the_page_goes_on(page: Any):
    start(page, "#run")
    page.get_by_text("The prompt is empty; type some text.").first.wait_for()
    page.locator("#prompt textarea").fill("word " * 600)
    start(page, "#run")
    page.get_by_text("shorten them").first.wait_for()
    assert ask(page, "a bomb").count() > 0


# --- the filters --------------------------------------------------------------------------------------------------


def test_the_listing_chooses_which_neurons_of_the_token_are_shown(page: Any, inspection: Inspection, busiest: int):
    ask(page, PROMPT)
    select(page, busiest)
    page.get_by_label("those that colour the tokens").check()
    expect_hits(page, inspection.hits(busiest, Where(["terror", "politics", "violence"], above=0.2)))
    page.get_by_label("all that fire").check()
    hits = inspection.hits(busiest)
    assert len(hits) > len(inspection.hits(busiest, explained_only=True))
    expect_hits(page, hits)


def test_neurons_without_a_row_are_listed_with_the_tokens_on_which_they_fire(
    page: Any, inspection: Inspection, busiest: int
):
    ask(page, PROMPT)
    select(page, busiest)
    page.get_by_label("all that fire").check()
    hits = inspection.hits(busiest)
    expect_hits(page, hits)
    rows = [(hit, row) for hit, row in zip(hits, neurons(page), strict=True) if hit.trust == "unexplained"]
    assert len(rows) > 3
    for hit, row in rows:
        texts = [inspection.units[firing.index].text for firing in inspection.firings(hit.neuron_id)]
        plain = [text.strip() for text in dict.fromkeys(texts) if text.strip().isalpha()]
        assert row[1].startswith("not explained; fires here on “")
        assert [text for text in plain[:1] if f"“{text}”" not in row[1]] == [] or len(dict.fromkeys(texts)) > 5
        assert (row[2], row[3]) == ("–", "unexplained")


def test_the_hook_point_narrows_colours_and_table(page: Any, inspection: Inspection, busiest: int):
    ask(page, PROMPT)
    select(page, busiest)
    page.get_by_label("Hook point").locator("visible=true").click()
    page.get_by_role("option", name="layers.1.mlp").click()
    expect_hits(page, inspection.hits(busiest, Where(hook_point="layers.1.mlp"), explained_only=True))
    expect_strengths(page, inspection.strengths(Where(hook_point="layers.1.mlp", above=0.2)))
    assert pressed(page) == [str(busiest)]


def late_colours(page: Any) -> Callable[[], None]:
    """Choose layers.1.mlp as hook point and hold the server's answer back; gives what lets it through."""
    held: list[tuple[Any, Any]] = []
    page.route("**/gradio_api/run/**", lambda route: held.append((route, route.fetch())), times=1)
    page.get_by_label("Hook point").locator("visible=true").click()
    page.get_by_role("option", name="layers.1.mlp").click()
    while not held:
        page.wait_for_timeout(20)
    route, answer = held[0]
    return lambda: route.fulfill(response=answer)


def test_a_filters_late_answer_does_not_undo_a_click(page: Any, inspection: Inspection, busiest: int):
    ask(page, PROMPT)
    give = late_colours(page)
    select(page, busiest)
    give()
    expect_strengths(page, inspection.strengths(Where(hook_point="layers.1.mlp", above=0.2)))
    expect_hits(page, inspection.hits(busiest, Where(hook_point="layers.1.mlp"), explained_only=True))
    wait_for_token(page, busiest)
    assert pressed(page) == [str(busiest)]


def test_other_colours_leave_the_focus_on_its_token(page: Any, inspection: Inspection, busiest: int):
    ask(page, PROMPT)
    give = late_colours(page)
    page.locator("#strip button").nth(busiest).focus()
    give()
    expect_strengths(page, inspection.strengths(Where(hook_point="layers.1.mlp", above=0.2)))
    assert page.evaluate("document.activeElement.dataset.index") == str(busiest)


def test_the_least_score_narrows_the_colours(page: Any, inspection: Inspection):
    """By the number box, also while it is empty, and by the keyboard: six steps of 0.05 from 0."""
    ask(page, PROMPT)
    box = page.locator("#above input[type=number]")
    for typed, above in (("0.6", 0.6), ("", None)):
        box.fill(typed)
        expect_strengths(page, inspection.strengths(Where(above=above)))
    box.blur()
    page.locator("#above input[type=range]").focus()
    for _ in range(6):
        page.keyboard.press("ArrowRight")
    expect_strengths(page, inspection.strengths(Where(above=0.3)))


def test_words_narrow_the_table(page: Any, inspection: Inspection, busiest: int):
    ask(page, PROMPT)
    select(page, busiest)
    hit = inspection.hits(busiest, explained_only=True)[-1]
    for words in (hit.neuron_id, "gardens", "花园"):
        page.locator("#words :is(input, textarea)").fill(words)
        expect_hits(page, inspection.hits(busiest, Where(words=words), explained_only=True))
    page.locator("#words :is(input, textarea)").fill("no such words")
    expect(page.locator("#neurons p")).to_have_text(
        "No neuron with an explanation of the words or hook point chosen fires here; "
        "list all that fire to see the others."
    )


def test_without_a_domain_no_token_is_coloured(page: Any, inspection: Inspection, busiest: int):
    ask(page, PROMPT)
    select(page, busiest)
    for domain in inspection.database.domains:
        page.get_by_label(domain.capitalize(), exact=True).uncheck()
    expect(page.locator("#headline")).to_contain_text("Strength 0.00")
    expect_strengths(page, [0] * len(inspection.units))
    assert pressed(page) == [str(busiest)]
    expect_hits(page, inspection.hits(busiest, explained_only=True))


def test_the_explanations_language_is_chosen_with_a_fallback(page: Any, inspection: Inspection, busiest: int):
    ask(page, PROMPT)
    select(page, busiest)
    choose(page, "language", "zh")
    expect(page.locator("#neurons .text").filter(has_text="关于").first).to_be_visible()
    rows = list(zip(inspection.hits(busiest, explained_only=True), neurons(page), strict=True))
    for hit, row in rows:
        assert row[1].startswith(said(hit, "zh", "en"))
    assert {"(en)" in row[1] for _, row in rows} == {True, False}


# --- a neuron's panel ---------------------------------------------------------------------------------------------


def test_a_neuron_opens_its_card_and_the_places_where_it_fires(page: Any, inspection: Inspection, busiest: int):
    ask(page, PROMPT)
    select(page, busiest)
    hits = inspection.hits(busiest, explained_only=True)
    hit = max(hits, key=lambda hit: len(inspection.firings(hit.neuron_id)))
    expect(page.locator("#inspector-panel")).to_be_hidden()
    page.locator(f"#neurons button[data-value='{hit.neuron_id}']").click()
    card = page.get_by_role("article", name=f"Neuron {hit.neuron_id}")
    expect(card.get_by_role("heading", level=2)).to_have_text(explanation(hit.hook_point, hit.latent) or "")
    expect(card.get_by_role("heading", level=2)).to_be_focused()
    firings = inspection.firings(hit.neuron_id)
    places = page.locator("#inspector-where").get_by_role("button")
    expect(places).to_have_text([f"Token {firing.index + 1}" for firing in firings])
    bars = page.locator("#inspector-where .strength").all_inner_texts()
    assert bars == [f"{firing.normalised:.2f}" for firing in firings]
    elsewhere = next(i for i, firing in enumerate(firings) if firing.index != busiest)
    places.nth(elsewhere).click()
    wait_for_token(page, firings[elsewhere].index)
    assert pressed(page) == [str(firings[elsewhere].index)]
    expect_hits(page, inspection.hits(firings[elsewhere].index, explained_only=True))
    expect(card).to_be_visible()
    page.locator("#inspector-panel").get_by_role("button", name="Close").click()
    expect(card).to_be_hidden()


def test_examples_are_there_after_the_click_on_the_warning_only(page: Any, inspection: Inspection, busiest: int):
    ask(page, PROMPT)
    select(page, busiest)
    buttons = page.locator("#neurons button.neuron")
    buttons.first.click()
    warning = page.get_by_role("button", name="Show examples: they may contain offensive text")
    warning.wait_for()
    assert "made texts" not in page.content()
    warning.click()
    examples = page.locator("#inspector-examples")
    expect(examples.get_by_role("heading", level=4)).to_have_text(
        [re.compile("Where it fires most"), re.compile("Over its levels"), re.compile("Near-misses")]
    )
    # " car" at half the normaliser and " bomb" at twice; on the third level at an eighth of that; then silent
    expect(examples.locator("mark")).to_have_text(["car", "bomb", "car", "bomb"])
    graded = examples.locator("mark").evaluate_all("all => all.map(m => m.style.getPropertyValue('--strength'))")
    assert graded == ["0.500", "1.000", "0.062", "0.250"]
    expect(examples.locator("sub")).to_have_text(["2.00", "0.25"])
    expect(warning).to_be_hidden()
    buttons.nth(1).click()
    warning.wait_for()
    assert "made texts" not in page.content(), "another neuron's examples ask again"


def test_a_neuron_without_a_row_has_a_card(page: Any, inspection: Inspection, busiest: int):
    ask(page, PROMPT)
    select(page, busiest)
    page.get_by_label("all that fire").check()
    hit = next(hit for hit in inspection.hits(busiest) if hit.trust == "unexplained")
    page.locator(f"#neurons button[data-value='{hit.neuron_id}']").click()
    card = page.get_by_role("article", name=f"Neuron {hit.neuron_id}")
    expect(card.get_by_role("heading", level=2)).to_have_text("A neuron without an explanation")
    expect(card).to_contain_text("It was not among the latents that were explained")
    expect(page.locator("#inspector-where h2")).to_contain_text("In this conversation it fires")
    rate = inspection.database.quantiles[hit.neuron_id]["firing_rate"]
    expect(card).to_contain_text(f"{rate:.2%} of the corpus's tokens")
    page.get_by_role("button", name="Show examples: they may contain offensive text").click()
    expect(page.locator("#inspector-examples")).to_contain_text("No examples were collected for this neuron")


def test_a_new_prompt_closes_the_panel_of_the_last(page: Any):
    ask(page, PROMPT)
    page.locator("#neurons button.neuron").first.click()
    expect(page.locator("#inspector-panel")).to_be_visible()
    page.locator("#prompt textarea").fill("a river")
    start(page, "#run")
    expect(page.locator("#inspector-panel")).to_be_hidden()
