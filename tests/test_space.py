"""The Space, seen from outside: its API through gradio_client, its page through a headless browser."""

import contextlib
import importlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from safesail.assets import asset
from safesail.diagnosis.inspection import Hit
from safesail.diagnosis.inspector import Inspector

gradio_client = pytest.importorskip("gradio_client")
pytest.importorskip("gradio")

CHROMIUM = shutil.which("chromium")
HOSTILE = (
    "<script>window.pwned=1</script> {{7*7}} ${window.pwned=2} \\u{41} ` </script> & &lt; 👋🏽 你好 नमस्ते שלום عالم"
)


@pytest.fixture(scope="module")
def view() -> Iterator[ModuleType]:
    """`space/view.py`, imported as on the Hub: its folder is where Python looks for modules first."""
    sys.path.insert(0, str(asset("space")))
    try:
        yield importlib.import_module("view")
    finally:
        sys.path.remove(str(asset("space")))


@pytest.fixture(scope="module")
def inspector(demo_run: Path) -> Inspector:
    return Inspector.from_pretrained(demo_run)


@pytest.fixture(scope="module")
def address(demo_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page of the release, served by a process of its own on a free port of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("space") / "log.txt"
    environment = {key: value for key, value in os.environ.items() if key not in ("SPACE_ID", "SAFESAIL_MODEL")}
    environment |= {"SAFESAIL_RELEASE": str(demo_run), "SAFESAIL_PORT": str(port)}
    with log.open("w") as output:
        command = [sys.executable, str(asset("space/app.py"))]
        server = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        try:
            wait_for(port, server)
            yield f"http://127.0.0.1:{port}/"
        finally:
            server.terminate()
            server.wait(timeout=20)
    assert "Traceback" not in log.read_text()


def wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    """Return when the page answers."""
    for _ in range(600):
        assert server.poll() is None, "the Space ended instead of serving"
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5):
            return
        time.sleep(0.1)
    raise AssertionError("the Space did not answer within a minute")


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[Any]:
    client = gradio_client.Client(address, verbose=False)
    yield client
    client.close()


# --- formatting ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (" bomb", "bomb"),
        ("bomb", "bomb"),
        ("\n\n", "⏎⏎"),
        ("  ", "␣␣"),
        ("\t", "⇥"),
        (".\n", ".⏎"),
        ("   x", "␣␣␣x"),
        ("a b", "a b"),
        ("\x08", "U+0008"),
        ("\ufe0f", "U+FE0F"),
        ("<|im_start|>", "<|im_start|>"),
        ("你好", "你好"),
    ],
)
def test_tokens_are_shown_as_themselves(view: ModuleType, text: str, shown: str) -> None:
    assert view._visible(text) == shown


@pytest.mark.parametrize(
    ("text", "spoken"),
    [(" bomb", "' bomb'"), ("\n", "line break"), (" \t", "space, tab"), ("\u00a0", "no-break space")],
)
def test_blank_tokens_are_named(view: ModuleType, text: str, spoken: str) -> None:
    assert view._spoken(text) == spoken


def test_a_neuron_is_a_row_of_strings(view: ModuleType) -> None:
    name, scored = "layers.1.mlp/7", (-0.05, -0.2, 0.1, "weak", "a", "b", "ok")
    known = Hit(name, "layers.1.mlp", 7, 2.5, 0.834, "<b>guns</b>", ["terror"], *scored)
    failed = known._replace(explanation=None, status="refused", score=None, low=None, high=None, trust="undefined")
    unknown = Hit("layers.1.mlp/8", "layers.1.mlp", 8, 0.1, None, None, [], None, None, None, "unexplained", "", "", "")
    assert view.hit_rows([known, failed, unknown]) == [
        ["0.83", "<b>guns</b>", "Terror", "−0.05 (−0.20 to 0.10), weak", "layers.1.mlp/7", "layers.1.mlp", "a", "b"],
        ["0.83", "none (refused)", "Terror", "undefined", "layers.1.mlp/7", "layers.1.mlp", "a", "b"],
        ["–", "not explained", "–", "unexplained", "layers.1.mlp/8", "layers.1.mlp", "–", "–"],
    ]


def test_strip_tells_prompt_and_answer_apart(view: ModuleType, inspector: Inspector) -> None:
    inspection = inspector.inspect([{"role": "user", "content": "a bomb"}], max_new_tokens=5)
    strengths = inspection.strengths()
    strip = view.strip(inspection, strengths, view.strongest(inspection, strengths))
    assert [section["name"] for section in strip["sections"]] == ["Prompt", "Answer"]
    assert strip["sections"][1]["first"] == len(strip["sections"][0]["tokens"])
    assert sum(len(section["tokens"]) for section in strip["sections"]) == len(inspection.units)
    assert strengths[strip["selected"]] == max(strengths)
    first = strip["sections"][0]["tokens"][0]
    assert (first["text"], first["special"], first["label"]) == (
        "<|im_start|>",
        True,
        "token 1 '<|im_start|>' special token",
    )
    assert all(0 <= token["strength"] <= 1 for section in strip["sections"] for token in section["tokens"])


def test_headline_escapes_the_token_and_says_why_there_are_no_neurons(view: ModuleType, inspector: Inspector) -> None:
    inspection = inspector.inspect("<b>")
    (bold,) = [view.headline(inspection, i, [], 0.0) for i, u in enumerate(inspection.units) if "<" in u.text]
    assert "&lt;" in bold
    assert "<b>" not in bold
    assert "untick" in bold
    special = view.headline(inspector.inspect([{"role": "user", "content": "a"}]), 0, [], 0.0)
    assert "special token" in special
    assert "Token 1" in special


# --- the API ------------------------------------------------------------------------------------------------------


def test_only_the_three_endpoints_are_public(client: Any) -> None:
    named = client.view_api(return_format="dict")["named_endpoints"]
    assert sorted(named) == ["/inspect", "/neuron", "/search"]
    assert "Which neurons fire on each token" in named["/inspect"]["description"]


def test_inspect_is_the_inspection_and_the_answer(client: Any, inspector: Inspector) -> None:
    result = client.predict(prompt="a bomb 你好", max_new_tokens=4, api_name="/inspect")
    expected = inspector.inspect([{"role": "user", "content": "a bomb 你好"}], max_new_tokens=4)
    assert result["ids"] == expected.ids
    assert result["n_prompt"] == expected.n_prompt
    assert result["answer"] == expected.answer
    assert "".join(token["text"] for token in result["tokens"]) == expected.text
    assert [token["neurons"] for token in result["tokens"]] == [t["neurons"] for t in expected.to_json()["tokens"]]


def test_inspect_takes_raw_text_and_a_system_prompt(client: Any, inspector: Inspector) -> None:
    raw = client.predict(prompt="the bomb", mode="raw", max_new_tokens=0, api_name="/inspect")
    assert raw["ids"] == inspector.encode("the bomb")
    assert raw["answer"] == ""
    chat = client.predict(prompt="a", max_new_tokens=0, system="Be kind.", api_name="/inspect")
    assert "Be kind." in "".join(token["text"] for token in chat["tokens"])


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"prompt": "  "}, "the prompt is empty"),
        ({"prompt": "word " * 600}, "the model reads 512"),
        ({"prompt": "x" * 20_000}, "20,000 characters"),
        ({"prompt": "a", "mode": "poem"}, "use chat or raw"),
        ({"prompt": "a", "max_new_tokens": 1000}, "give a number from 0 to 256"),
        ({"prompt": "a", "temperature": "hot"}, "give a number from 0 to 2"),
        ({"prompt": "a", "seed": -1}, "seed is -1"),
        ({"prompt": None}, "must be texts"),
    ],
)
def test_a_mistake_is_answered_with_its_sentence(client: Any, arguments: dict[str, Any], sentence: str) -> None:
    with pytest.raises(gradio_client.exceptions.AppError, match=sentence):
        client.predict(**arguments, api_name="/inspect")


def test_neuron_is_its_row_scores_and_quantiles(client: Any, inspector: Inspector) -> None:
    expected = next(iter(inspector.database))
    row = client.predict(id=expected["neuron_id"], api_name="/neuron")
    assert row["explanation"] == expected["explanation"]
    assert {score["neuron_id"] for score in row["scores"]} == {expected["neuron_id"]}
    assert row["quantiles"]["normaliser"] == pytest.approx(
        inspector.database.normaliser(expected["hook_point"], expected["latent"])
    )
    with pytest.raises(gradio_client.exceptions.AppError, match="is not a neuron here"):
        client.predict(id="nonsense", api_name="/neuron")


def test_search_finds_what_the_database_finds(client: Any, inspector: Inspector) -> None:
    database = inspector.database
    found = client.predict(domain=database.domains[0], api_name="/search")
    assert [r["neuron_id"] for r in found] == [r["neuron_id"] for r in database.search(domain=database.domains[0])]
    assert len(client.predict(api_name="/search")) == len(database)
    assert client.predict(text="no such words at all", api_name="/search") == []
    scored = client.predict(min_score=0.1, hook_point=database.hook_points[0], api_name="/search")
    assert all(row["score"] >= 0.1 and row["hook_point"] == database.hook_points[0] for row in scored)


# --- the page -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    playwright = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """A visitor's page, which asks no other host and writes no error to the console."""
    requests: list[str] = []
    errors: list[str] = []
    page = browser.new_page()
    page.set_default_timeout(20_000)
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    page.get_by_role("button", name="Run", exact=True).wait_for()
    yield page
    elsewhere = [url for url in requests if not url.startswith((address, "data:", "blob:"))]
    page.close()
    assert elsewhere == []
    assert errors == []


def ask(page: Any, prompt: str, *, new_tokens: int = 4) -> Any:
    """Run a prompt as a visitor does; the token buttons."""
    page.locator("#prompt textarea").fill(prompt)
    number = page.get_by_role("spinbutton", name="Max new tokens")
    if not number.is_visible():
        page.get_by_role("button", name="System prompt and settings").click()
        page.get_by_label("range slider for Max new tokens").wait_for()
        page.wait_for_timeout(300)  # an accordion that opens sets its fields' values once more
    number.fill(str(new_tokens))
    number.blur()
    page.get_by_role("button", name="Run", exact=True).click()
    tokens = page.locator("#strip button")
    tokens.first.wait_for()
    page.locator("#neurons").wait_for()
    return tokens


def cells(page: Any) -> list[list[str]]:
    """The rows that the neurons table shows."""
    rows = page.locator("#neurons").get_by_role("row").all()
    found = [[cell.strip() for cell in row.get_by_role("gridcell").all_inner_texts()] for row in rows]
    return [row for row in found if any(row)]


def firing(inspection: Any) -> list[int]:
    """The units with explained neurons, strongest first."""
    with_hits = [i for i in range(len(inspection.units)) if inspection.hits(i, explained_only=True)]
    return sorted(with_hits, key=lambda i: -(inspection.hits(i, explained_only=True)[0].normalised or 0))


def test_a_prompt_is_answered_and_a_clicked_token_shows_its_neurons(page: Any, inspector: Inspector) -> None:
    tokens = ask(page, "The president saw a bomb.")
    inspection = inspector.inspect([{"role": "user", "content": "The president saw a bomb."}], max_new_tokens=4)
    assert tokens.count() == len(inspection.units)
    assert page.locator("#strip button[aria-pressed=true]").count() == 1
    assert len(cells(page)) > 0, "the strongest token is selected without a click"
    index = firing(inspection)[-1]
    tokens.nth(index).click()
    page.locator("#headline", has_text=re.compile(rf"Token {index + 1}\b")).wait_for()
    best = inspection.hits(index, explained_only=True)[0]
    assert best.neuron_id in cells(page)[0]
    assert f"{best.normalised:.2f}" in cells(page)[0]
    assert tokens.nth(index).get_attribute("aria-pressed") == "true"
    assert tokens.nth(0).get_attribute("aria-label") == "token 1 '<|im_start|>' special token"
    tokens.nth(0).click()
    page.locator("#headline", has_text="the token policy leaves it out").wait_for()


def test_unexplained_neurons_and_domains_can_be_switched(page: Any, inspector: Inspector) -> None:
    tokens = ask(page, "The president saw a bomb.")
    inspection = inspector.inspect([{"role": "user", "content": "The president saw a bomb."}], max_new_tokens=4)
    index = firing(inspection)[0]
    tokens.nth(index).click()
    page.locator("#headline", has_text=re.compile(rf"Token {index + 1}\b")).wait_for()
    page.get_by_label("Only neurons with an explanation").uncheck()
    page.get_by_role("gridcell", name="not explained").first.wait_for()
    for domain in inspector.database.domains:
        page.get_by_label(domain.capitalize(), exact=True).uncheck()
    page.locator("#headline", has_text="Strength 0.00").wait_for()
    strengths = tokens.evaluate_all("all => all.map(b => b.style.getPropertyValue('--strength'))")
    assert set(strengths) == {"0"}
    assert tokens.nth(index).get_attribute("aria-pressed") == "true"


def test_the_keyboard_reaches_every_token(page: Any, inspector: Inspector) -> None:
    tokens = ask(page, "The president saw a bomb.")
    page.locator("#strip button[aria-pressed=true]").focus()
    page.keyboard.press("Home")
    assert page.evaluate("document.activeElement.dataset.index") == "0"
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    page.locator("#headline", has_text=re.compile(r"Token 3\b")).wait_for()
    assert tokens.nth(2).get_attribute("aria-pressed") == "true"
    page.keyboard.press("End")
    page.keyboard.press("ArrowRight")
    last = tokens.count() - 1
    assert page.evaluate("document.activeElement.dataset.index") == str(last)
    page.keyboard.press("Space")
    page.locator("#headline", has_text=re.compile(rf"Token {last + 1}\b")).wait_for()
    page.locator("#prompt textarea").focus()
    page.keyboard.press("Control+Enter")
    page.locator("#strip", has_text="…").or_(page.locator("#strip button").first).first.wait_for()


def test_hostile_text_is_shown_and_inert(page: Any, inspector: Inspector) -> None:
    tokens = ask(page, HOSTILE)
    inspection = inspector.inspect([{"role": "user", "content": HOSTILE}], max_new_tokens=4)
    shown = tokens.all_text_contents()
    assert len(shown) == len(inspection.units)
    for unit, text in zip(inspection.units, shown, strict=True):
        if unit.text.strip() and unit.text.isprintable() and not unit.text.startswith("\ufe0f"):
            assert text == unit.text.strip() or text == unit.text
    together = "".join(shown)
    assert "<script>" in together
    assert "&lt;" in together
    assert "{{7*7}}" in together
    assert "你好" in together
    assert "".join(page.locator("#strip .run[dir=rtl]").all_text_contents()).startswith("שלום␣عالم")
    for index in range(0, len(shown), 7):
        tokens.nth(index).click()
        page.locator("#headline", has_text=re.compile(rf"Token {index + 1}\b")).wait_for()
    assert page.evaluate("window.pwned") is None


def test_a_mistake_is_a_message_and_the_page_goes_on(page: Any) -> None:
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_text("The prompt is empty; type some text.").first.wait_for()
    page.locator("#prompt textarea").fill("word " * 600)
    page.get_by_role("button", name="Run", exact=True).click()
    page.get_by_text("shorten them").first.wait_for()
    assert ask(page, "a bomb").count() > 0


def test_visitors_do_not_see_each_other(page: Any, browser: Any, address: str) -> None:
    ask(page, "The president saw a secret.")
    other = browser.new_page()
    other.goto(address)
    other.get_by_role("button", name="Run", exact=True).wait_for()
    assert "secret" not in other.content()
    ask(other, "My neighbour saw a river.")
    page.locator("#strip button").nth(5).click()
    page.locator("#headline", has_text=re.compile(r"Token 6\b")).wait_for()
    assert "river" not in page.locator("#strip").inner_text()
    other.close()


def test_the_neurons_tab_searches(page: Any, view: ModuleType, inspector: Inspector) -> None:
    page.get_by_role("tab", name="Neurons").click()
    page.get_by_text(f"{len(inspector.database):,} neurons").wait_for()
    row = inspector.database.search()[0]
    page.locator("#search textarea, #search input").fill(row["neuron_id"])
    found = view.count_line(len(inspector.database.search(row["neuron_id"])))
    page.get_by_text(found).wait_for()
    page.locator("#found").get_by_role("gridcell", name=row["neuron_id"], exact=True).wait_for()
    page.locator("#search textarea, #search input").fill("<img src=x onerror=window.pwned=1>")
    page.get_by_text("No neuron matches").wait_for()
    assert page.evaluate("window.pwned") is None
