"""A visitor's whole way through the Space in a browser: with a mouse, with the keyboard alone, by links, on a phone."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from browsing import ask, ask_by_keys, neurons, open_tab, opened, serving, start

from safesail.diagnosis.inspection import Inspection
from safesail.diagnosis.inspector import Inspector
from safesail.examples import Examples

pytest.importorskip("gradio")

PROMPTS = {
    "English": "The president saw a bomb 👋🏽 near the old house.",
    "Chinese": "总统看到了一枚炸弹 💣，שלום עולם。",
    "Hindi": "राष्ट्रपति ने बम देखा 🙏🏽 مرحبا عالم 2019",
}
N_NEW = 24


@pytest.fixture(scope="module")
def inspector(demo_run: Path) -> Inspector:
    return Inspector.from_pretrained(demo_run)


@pytest.fixture(scope="module")
def address(demo_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with serving(demo_run, tmp_path_factory.mktemp("space")) as address:
        yield address


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    with opened(browser, address) as page:
        yield page


# --- the whole way ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("language", PROMPTS)
def test_a_visit_from_the_prompt_to_a_link_that_is_opened_afresh(
    browser: Any, address: str, page: Any, inspector: Inspector, demo_run: Path, language: str
) -> None:
    prompt = PROMPTS[language]
    inspection = inspector.inspect([{"role": "user", "content": prompt}], max_new_tokens=N_NEW)
    index, hit, examples = worth_a_look(inspection, Examples(demo_run))
    ask(page, prompt, new_tokens=N_NEW)
    shown_as_it_is(page, inspection)
    look_at_token(page, inspection, index)
    look_at_neuron(page, inspection, hit.neuron_id)
    look_at_examples(page, examples)
    page.get_by_role("link", name="Open in Neurons").click()
    neuron_in_neurons_tab(page, hit.neuron_id, hit.explanation)
    look_at_landscape(page)
    with opened(browser, address, fragment=page.url.partition("#")[2]) as other:
        neuron_in_neurons_tab(other, hit.neuron_id, hit.explanation)
    open_tab(page, "Inspector")
    link = page.get_by_role("link", name="Link to this token").get_attribute("href")
    with opened(browser, address, fragment=link) as other:
        other.locator("#headline", has_text=token_name(index)).wait_for()
        shown_as_it_is(other, inspection)
        assert other.locator("#strip button[aria-pressed=true]").get_attribute("data-index") == str(index)
        assert other.locator("#prompt textarea").input_value() == prompt
        assert neurons(other) == neurons(page)


def worth_a_look(inspection: Inspection, examples: Examples) -> tuple[int, Any, list[Any]]:
    """A unit of the prompt's or answer's with explained neurons, the first of these, and that one's examples."""
    for index in range(len(inspection.units) - 1, -1, -1):
        hits = inspection.hits(index, explained_only=True)
        if hits and hits[0].explanation and examples.of(hits[0].neuron_id):
            return index, hits[0], examples.of(hits[0].neuron_id)
    raise AssertionError("no explained neuron fires in this conversation")


def shown_as_it_is(page: Any, inspection: Inspection) -> None:
    """The answer and every token on the page are the inspector's own text."""
    page.locator("#strip .section.answer").wait_for()
    answer = inspection.answer.replace("\r\n", "\n").replace("\r", "\n")
    page.wait_for_function("text => document.querySelector('#answer textarea').value === text", arg=answer)
    shown = page.locator("#strip button").all_text_contents()
    assert len(shown) == len(inspection.units)
    for unit, text in zip(inspection.units, shown, strict=True):
        if unit.text.strip().isprintable() and unit.text.strip() and not re.search(r"[\n\r\t\ufe0f]", unit.text):
            assert text.strip("␣") == unit.text.strip(" ")


def token_name(index: int) -> re.Pattern[str]:
    return re.compile(rf"Token {index + 1}\b")


def look_at_token(page: Any, inspection: Inspection, index: int) -> None:
    """A click on a token lists the neurons that fire on it, with their activations."""
    page.locator("#strip button").nth(index).click()
    page.locator("#headline", has_text=token_name(index)).wait_for()
    hits = inspection.hits(index, explained_only=True)
    rows = neurons(page)
    assert [row[1].splitlines()[-1] for row in rows] == [hit.neuron_id for hit in hits]
    assert [row[0] for row in rows] == [f"{hit.normalised:.2f}" for hit in hits]


def look_at_neuron(page: Any, inspection: Inspection, neuron_id: str) -> None:
    """A click on a neuron says where it fires, and a click on a place goes there."""
    page.locator(f'#neurons button[data-value="{neuron_id}"]').click()
    page.locator(f'#inspector-card article[aria-label="Neuron {neuron_id}"]').wait_for()
    places = page.locator("#inspector-where button")
    firings = inspection.firings(neuron_id)
    assert places.all_text_contents() == [f"Token {firing.index + 1}" for firing in firings[:24]]
    here = page.locator("#strip button[aria-pressed=true]").get_attribute("data-index")
    places.last.click()
    page.locator("#headline", has_text=token_name(firings[:24][-1].index)).wait_for()
    page.locator("#strip button").nth(int(here)).click()
    page.locator("#headline", has_text=token_name(int(here))).wait_for()


def look_at_examples(page: Any, examples: list[Any]) -> None:
    """Examples are there after the click on the warning, not before, and their text is the release's."""
    shown = page.locator("#inspector-examples li")
    assert shown.count() == 0
    page.get_by_role("button", name="Show examples: they may contain offensive text").click()
    shown.first.wait_for()
    best = next(example for example in examples if example.stratum == "top")
    text = shown.first.locator("p").first.evaluate(
        "p => { const c = p.cloneNode(true); c.querySelectorAll('sub').forEach(s => s.remove()); return c.textContent }"
    )
    assert text == "".join(best.tokens)
    page.locator("#inspector-ask").wait_for(state="hidden")


def neuron_in_neurons_tab(page: Any, neuron_id: str, explanation: str) -> None:
    page.locator(f'#neurons-card article[aria-label="Neuron {neuron_id}"]').wait_for()
    assert page.get_by_role("tab", name="Neurons").get_attribute("aria-selected") == "true"
    assert page.locator("#neurons-card h2").text_content() == explanation
    assert page.url.endswith(f"#/neuron/{quote(neuron_id)}")


def look_at_landscape(page: Any) -> None:
    """A point of the landscape names its neuron and opens its card."""
    open_tab(page, "Landscape")
    plot = page.locator("#landscape .plot")
    plot.focus()
    plot.press("End")
    named = plot.locator(".label code").text_content()
    plot.press("Enter")
    page.locator(f'#landscape-card article[aria-label="Neuron {named}"]').wait_for()


def test_the_answer_streams_in(page: Any, inspector: Inspector) -> None:
    for prompt in ("president", "bomb", "river", "garden", "murder", "senator", "music", "The", "Why", "In 2019"):
        inspection = inspector.inspect([{"role": "user", "content": prompt}], max_new_tokens=250)
        if len(inspection.ids) - inspection.n_prompt > 150:
            break
    else:
        raise AssertionError("no answer of the tiny model is long enough to be seen coming")
    page.evaluate(
        """() => {
          window.shown = [];
          setInterval(() => {
            const text = document.querySelector("#answer textarea")?.value;
            if (text && text !== window.shown.at(-1)) window.shown.push(text);
          }, 2);
        }"""
    )
    ask(page, prompt, new_tokens=250)
    shown_as_it_is(page, inspection)
    lengths = page.evaluate("window.shown.map((text) => text.length)")
    assert len(lengths) > 3
    assert lengths[0] < lengths[-1] / 2


# --- with the keyboard alone --------------------------------------------------------------------------------------

SEEN = """() => {
  const focused = document.activeElement;
  const around = [focused, focused.nextElementSibling, focused.parentElement, focused.parentElement.parentElement];
  const look = () => around.filter(Boolean).map((e) => {
    const style = getComputedStyle(e);
    const outline = style.outlineStyle === "none" ? "" : [style.outlineStyle, style.outlineWidth, style.outlineColor];
    return [outline, style.boxShadow, style.borderColor, style.backgroundColor].join();
  }).join("|");
  const with_focus = look();
  focused.blur();
  const without = look();
  focused.focus({ preventScroll: true });
  return with_focus !== without;
}"""
FOCUSED = """() => {
  const e = document.activeElement;
  return e === document.body ? "" : `${e.tagName} ${e.closest("[id]")?.id} ${e.textContent.slice(0, 30)}`;
}"""


def tab_to(page: Any, selector: str, *, back: bool = False) -> None:
    """Press Tab until the element has the focus; at each stop the focus is to be seen and lies within the page."""
    for _ in range(80):
        page.keyboard.press("Shift+Tab" if back else "Tab")
        if page.evaluate("s => document.activeElement.matches(s)", selector):
            return
        if page.evaluate(FOCUSED):
            assert page.evaluate(SEEN), f"the focus cannot be seen on {page.evaluate(FOCUSED)}"
    raise AssertionError(f"Tab does not lead to {selector}")


def test_the_keyboard_alone_goes_the_whole_way(page: Any) -> None:
    page.add_style_tag(content="*, *::before, *::after { transition: none !important }")
    tab_to(page, "#prompt textarea")
    ask_by_keys(page, "The president saw a bomb.")
    page.locator("#strip .section.answer").wait_for()
    tab_to(page, "#strip button")
    page.keyboard.press("Home")
    assert page.evaluate("document.activeElement.dataset.index") == "0"
    for i in range(3, len(page.locator("#strip button").all())):
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight" if i == 3 else "Shift")
        page.keyboard.press("Enter")
        page.locator("#headline", has_text=token_name(int(focused_token(page)))).wait_for()
        if neurons(page):
            break
    tab_to(page, "#neurons button.neuron")
    name = page.evaluate("document.activeElement.dataset.value")
    page.keyboard.press("Enter")
    focus_is_on(page, f'#inspector-card article[aria-label="Neuron {name}"] h2')
    assert page.evaluate(SEEN)
    tab_to(page, "#inspector-ask")
    page.keyboard.press("Enter")
    focus_is_on(page, "#inspector-examples h3")
    tab_to(page, "#inspector-panel button.close", back=True)
    page.keyboard.press("Enter")
    focus_is_on(page, f'#neurons button[data-value="{name}"]')
    page.locator("#inspector-panel").wait_for(state="hidden")
    tab_to(page, '[role="tab"]', back=True)  # the last of them
    while page.evaluate("document.activeElement.textContent.trim()") != "Neurons":
        page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    tab_to(page, "#found button.neuron")
    name = page.evaluate("document.activeElement.dataset.value")
    page.keyboard.press("Space")
    focus_is_on(page, f'#neurons-card article[aria-label="Neuron {name}"] h2')
    tab_to(page, '[role="tab"]', back=True)
    while page.evaluate("document.activeElement.textContent.trim()") != "Landscape":
        page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    tab_to(page, "#landscape .plot")
    page.keyboard.press("ArrowRight")
    name = page.locator("#landscape .label code").text_content()
    page.keyboard.press("Enter")
    focus_is_on(page, f'#landscape-card article[aria-label="Neuron {name}"] h2')
    tab_to(page, "#landscape-panel button.close", back=True)
    page.keyboard.press("Enter")
    focus_is_on(page, "#landscape .plot")


def focused_token(page: Any) -> str:
    return page.evaluate("document.activeElement.dataset.index")


def focus_is_on(page: Any, selector: str) -> None:
    page.wait_for_function("s => document.activeElement.matches(s)", arg=selector)


# --- seen by all, on every screen ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [380, 1440])
def test_every_tab_is_accessible_and_as_wide_as_the_screen(browser: Any, address: str, scheme: str, width: int) -> None:
    with opened(browser, address, width=width, color_scheme=scheme) as page:
        assert ("dark" in (page.locator("body").get_attribute("class") or "")) == (scheme == "dark")
        findings = looked_over(page, "at first")
        ask(page, PROMPTS["Chinese"] + " president" * 20 + "x" * 200)
        page.locator("#neurons button.neuron").first.click()
        unfolded(page, "inspector")
        page.locator("#inspector-ask").click()
        page.locator("#inspector-examples li").first.wait_for()
        findings += looked_over(page, "Inspector")
        open_tab(page, "Neurons")
        page.locator("#found button.neuron").first.click()
        unfolded(page, "neurons")
        findings += looked_over(page, "Neurons")
        open_tab(page, "Landscape")
        page.locator("#landscape .plot").press("ArrowRight")
        page.locator("#landscape .plot").press("Enter")
        unfolded(page, "landscape")
        page.locator("#landscape .plot").press("ArrowRight")
        findings += looked_over(page, "Landscape")
    assert findings == []


def unfolded(page: Any, name: str) -> None:
    """A neuron's card with all that it holds."""
    page.locator(f"#{name}-card article").wait_for()
    for details in page.locator(f"#{name}-card details").all():
        details.locator("summary").click()


def looked_over(page: Any, state: str) -> list[str]:
    """What axe finds serious or critical, and whether the page is wider than the screen."""
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    page.mouse.move(0, 0)
    page.wait_for_timeout(200)  # colours of buttons change over 150 ms
    findings = []
    for found in axe.run(page).response["violations"]:
        if found["impact"] in ("serious", "critical"):
            places = "; ".join(str(node["target"]) for node in found["nodes"][:4])
            findings.append(f"{state}: {found['id']} ({found['impact']}) at {places}")
    wide, screen = page.evaluate("[document.documentElement.scrollWidth, window.innerWidth]")
    if wide > screen:
        findings.append(f"{state}: {wide} px wide on a screen of {screen} px")
    return findings


# --- visitors and links -------------------------------------------------------------------------------------------


def test_two_visitors_at_once_never_see_each_other(browser: Any, address: str, page: Any) -> None:
    with opened(browser, address) as other:
        for visitor, secret in ((page, "kumquat"), (other, "marzipan")):
            visitor.locator("#prompt textarea").fill(f"The president saw a {secret}.")
        for visitor in (page, other):
            start(visitor, "#run")
        for visitor in (page, other):
            visitor.locator("#strip .section.answer").wait_for()
        only_its_own(page, "kumquat", "marzipan")
        only_its_own(other, "marzipan", "kumquat")
        for visitor in (page, other):
            visitor.locator("#strip button").nth(2).click()
            visitor.locator("#headline", has_text=token_name(2)).wait_for()
        only_its_own(page, "kumquat", "marzipan")
        only_its_own(other, "marzipan", "kumquat")
    with opened(browser, address) as later:
        assert not re.search("kumquat|marzipan", visible_text(later))


def only_its_own(page: Any, own: str, foreign: str) -> None:
    text = visible_text(page)
    assert own in text
    assert foreign not in text


def visible_text(page: Any) -> str:
    """All text of the page, the strip's without the gaps between its tokens, and what stands in its fields."""
    fields = page.locator("textarea, input").evaluate_all("all => all.map(field => field.value)")
    return " ".join(
        [page.locator("body").inner_text(), *fields, "".join(page.locator("#strip button").all_inner_texts())]
    )


WRONG_LINKS = {
    "#/neuron/nonsense": "'nonsense' is not a neuron here",
    "#/neuron/": "'' is not a neuron here",
    "#/neuron/layers.7.mlp/1": "'layers.7.mlp/1' is not a neuron here",
    "#/neuron/layers.0.mlp/128": "layers.0.mlp has no latent 128; its latents are 0 to 127.",
    "#/neuron/%E0%A4%A%ZZ": "is not a neuron here",
    "#/neuron/%3Cimg%20src=x%20onerror=window.pwned=1%3E": "'<img src=x onerror=window.pwned=1>' is not a neuron here",
    "#/inspect?prompt=a&seed=x": "Seed is 'x' in this link; it should be a number.",
    "#/inspect?prompt=a&seed=-1": "Seed is -1; give a number from 0 to 4.29497e+09.",
    "#/inspect?prompt=a&token=%F0%9F%91%8B": "Token is '👋' in this link; it should be a number.",
    "#/inspect?prompt=a&temperature=nan": "Temperature is nan; give a number from 0 to 2.",
    "#/inspect?prompt=a&max_new_tokens=1e9": "is '1e9' in this link; it should be a number.",
    "#/inspect?prompt=a&max_new_tokens=999": "is 999; give a number from 0 to 256.",
    "#/inspect?prompt=a&mode=%3Cb%3Epoem": "The mode is '<b>poem'; use chat or raw.",
    "#/inspect?prompt=" + "x" * 10_300: "The prompt has 10,300 characters; the limit is 10,240.",
    "#/inspect?prompt=" + "word%20" * 600: "shorten them.",
    "#/inspect?": "The prompt is empty; type some text.",
}


def test_a_wrong_link_is_answered_with_a_sentence_and_the_page_goes_on(page: Any) -> None:
    for link, sentence in WRONG_LINKS.items():
        page.evaluate("link => { window.location.hash = link }", link)
        message = page.get_by_test_id("toast-text")
        message.filter(has_text=sentence).wait_for()
        assert message.count() == 1
        page.get_by_test_id("toast-close").click()
        message.wait_for(state="detached")
    assert page.evaluate("window.pwned") is None
    assert ask(page, "a bomb").count() > 0
    page.evaluate("window.location.hash = '#/neuron/layers.0.mlp/127'")
    page.locator('#neurons-card article[aria-label="Neuron layers.0.mlp/127"]').wait_for()


def test_a_link_to_a_token_that_is_not_there_selects_the_strongest(browser: Any, address: str, page: Any) -> None:
    ask(page, "The president saw a bomb.", new_tokens=0)
    strongest = page.locator("#strip button[aria-pressed=true]").get_attribute("data-index")
    for token in ("0", "99999", "-3"):
        fragment = f"#/inspect?prompt=The%20president%20saw%20a%20bomb.&max_new_tokens=0&token={token}"
        with opened(browser, address, fragment=fragment) as other:
            other.locator("#strip button").first.wait_for()
            assert other.locator("#strip button[aria-pressed=true]").get_attribute("data-index") == strongest
