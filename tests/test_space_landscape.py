"""The Space's landscape: the value that Python gives it, and the plot in a headless browser.

Run as a script, it serves the page over several databases: `python tests/test_space_landscape.py RELEASE NAME=PORT …`.
"""

import contextlib
import copy
import importlib
import json
import math
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from browsing import open_tab, opened

from safesail.assets import asset
from safesail.diagnosis.inspector import Inspector
from safesail.neurons import NeuronDatabase

N_MANY = 4701
"""The neurons of Safe-SAIL's released database."""
HOSTILE = [
    "<script>window.pwned=1</script><img src=x onerror=window.pwned=1>",
    "${window.pwned=2} `${(()=>{window.pwned=2})()}` \\u{41}",
    "{{7*7}} {{constructor.constructor('window.pwned=3')()}} {{{caption}}}",
    "x" * 10_000,
    "שלום عالم \u202eevil\u202c",
    "👩‍🚀👋🏽🏴‍☠️",
    "a\x00b\x07c\x1bd\u2028e\nf",
    "</script><svg onload=window.pwned=4>&lt;&amp;",
]
Row = dict[str, Any]


# --- the databases --------------------------------------------------------------------------------------------------


def row(latent: int, x: float | None, y: float | None, domains: list[str], **more: Any) -> Row:
    """A row of the table of neurons; its explanation says its number unless `more` does."""
    name = f"layers.0.mlp/{latent}"
    said: Row = {"neuron_id": name, "hook_point": "layers.0.mlp", "latent": latent, "explanation": f"neuron {latent}"}
    facts: Row = {"domains": domains, "score": 0.5, "x": x, "y": y, "category": None, "concept": None, "status": "ok"}
    return {**said, **facts, "score_low": None, "score_high": None, "firing_rate": 0.1, **more}


def database(rows: list[Row], facts: Row | None = None) -> NeuronDatabase:
    return NeuronDatabase({r["neuron_id"]: r for r in rows}, {}, {}, {}, landscape=facts or {})


def cross() -> NeuronDatabase:
    """The rows below, the first of them explained in Chinese too."""
    chinese = {"layers.0.mlp/0": {"zh": {"explanation": "炸弹", "status": "ok"}}}
    return replace(database(cross_rows()), explanations=chinese, languages=["en", "zh"])


def cross_rows() -> list[Row]:
    """Five places like those of a die's five, two neurons in the middle, and one without a place."""
    scores = {"politics": 0.7, "terror": None, "violence": 0.2}
    corners = [(-1.0, 1.0, ["politics"]), (1.0, 1.0, ["terror"]), (-1.0, -1.0, ["violence"]), (1.0, -1.0, [])]
    rows = [row(i, *corner, score=scores.get("".join(corner[2]), 0.4)) for i, corner in enumerate(corners)]
    rows += [row(4, 0.0, 0.0, ["terror", "politics"]), row(5, 0.0, 0.0, ["politics"]), row(6, None, None, [])]
    return rows


def many_rows() -> list[Row]:
    """As many neurons as Safe-SAIL released, with explanations of their length, in clouds."""
    chance = random.Random(0)
    domains = ["politics"] * 24 + ["violence"] * 10 + ["pornography"] * 5 + ["terror"] + [""] * 60
    rows = []
    for i in range(N_MANY):
        domain, angle = chance.choice(domains), chance.choice(range(9))
        x, y = (round(0.6 * f(angle) + chance.gauss(0, 0.13), 5) for f in (math.cos, math.sin))
        words = " ".join(chance.choices(["words", "about", "the", "president", "weapons", "of", "a", "river"], k=40))
        rows.append(row(i, x, y, [domain] if domain else [], explanation=words, score=round(chance.random(), 4)))
    return rows


def hostile_rows() -> list[Row]:
    return [row(i, float(i % 4), float(i // 4), [], explanation=text) for i, text in enumerate(HOSTILE)]


UMAP = {"method": "UMAP", "n_neighbours": 15, "n_neurons": N_MANY}
MADE = {
    "cross": cross,
    "many": lambda: database(many_rows(), UMAP),
    "hostile": lambda: database(hostile_rows()),
    "without": lambda: database([row(0, None, None, ["terror"])]),
}


def serve(release: str, ports: dict[str, int]) -> None:
    """Serve the page over the release as it is (`release`), and with each made database in place of its own."""
    sys.path.insert(0, str(asset("space")))
    app = importlib.import_module("app")
    inspector = Inspector.from_pretrained(release)
    for name, port in ports.items():
        shown = copy.copy(inspector)
        if name in MADE:
            shown.database = replace(MADE[name](), quantiles=inspector.database.quantiles)
        app.launch(app.build(shown), server_name="127.0.0.1", server_port=port, prevent_thread_lock=True)
    threading.Event().wait()


# --- the value ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def landscape(space: Callable[[str], ModuleType]) -> ModuleType:
    """`space/landscape.py`."""
    return space("landscape")


def test_the_value_has_a_point_for_each_neuron_with_a_place(landscape: ModuleType) -> None:
    value = landscape.landscape(database(cross_rows()), "")
    # politics: rows 0, 4, 5; terror: 1, 4; violence: 2
    assert [domain["id"] for domain in value["domains"]] == ["politics", "terror", "violence", ""]
    assert [domain["title"] for domain in value["domains"]][-1] == "No domain"
    assert [tuple(point) for point in value["points"]] == [
        ("layers.0.mlp/0", -1.0, 1.0, [0], "neuron 0", "0.70, strong"),
        ("layers.0.mlp/1", 1.0, 1.0, [1], "neuron 1", "undefined"),
        ("layers.0.mlp/2", -1.0, -1.0, [2], "neuron 2", "0.20, weak"),
        ("layers.0.mlp/3", 1.0, -1.0, [3], "neuron 3", "0.40, fair"),
        ("layers.0.mlp/4", 0.0, 0.0, [1, 0], "neuron 4", "0.50, good"),
        ("layers.0.mlp/5", 0.0, 0.0, [0], "neuron 5", "0.50, good"),
    ]
    assert value["note"] == "The Neurons tab lists the same neurons, and 1 more that have no place here."


def test_the_caption_names_the_method(landscape: ModuleType) -> None:
    pca = {"method": "PCA", "shares": [0.25, 0.125], "n_neurons": 1234}
    rows = [row(0, 0.0, 0.0, [])]
    assert landscape.landscape(database(rows, pca), "")["caption"] == (
        "The decoder directions of 1,234 neurons on a plane by PCA, whose two axes hold 25% and 12% of the variance. "
        "Neurons that write alike into the model lie near each other; the axes have no meaning."
    )
    assert "UMAP (cosine, 15 neighbours)" in landscape.landscape(database(rows, UMAP), "")["caption"]
    no_facts = landscape.landscape(database([row(i, 0.0, 0.0, []) for i in range(3)]), "")
    assert no_facts["caption"].startswith("3 neurons on a plane, where the release puts them. Neurons that")


def test_a_place_is_two_finite_numbers(landscape: ModuleType) -> None:
    rows = [row(0, math.nan, 0.0, []), row(1, 0.0, None, []), row(2, math.inf, 0.0, []), row(3, 0.5, 0.0, [])]
    assert [point.id for point in landscape.landscape(database(rows), "")["points"]] == ["layers.0.mlp/3"]
    nothing = landscape.landscape(database(rows[:3]), "")
    assert nothing == {"message": "This release has no landscape: its neurons carry no coordinates.", "points": []}


def test_labels_are_cut_and_of_the_language(landscape: ModuleType) -> None:
    made = database([row(0, 0.0, 0.0, [], explanation="ab" * 100), row(1, 1.0, 0.0, [], explanation=None)])
    cut, none = (point.label for point in landscape.landscape(made, "")["points"])
    assert cut == "ab" * 49 + "a…"
    assert none == "Not explained"
    labels = [point.label for point in landscape.landscape(cross(), "zh")["points"]]
    assert labels == ["炸弹", "neuron 1", "neuron 2", "neuron 3", "neuron 4", "neuron 5"]


def test_the_json_is_small_and_is_nowhere_html(landscape: ModuleType) -> None:
    value = landscape.landscape(database(many_rows(), UMAP), "")
    assert len(value["points"]) == N_MANY
    assert len(landscape.as_json(value).encode()) < 200 * N_MANY
    text = landscape.as_json({"label": "<script>\ud83d</script>"})
    assert "<" not in text
    assert json.loads(text) == {"label": "<script>?</script>"}


# --- the page -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def addresses(demo_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The pages over the release and over the made databases, served by one process of their own."""
    pytest.importorskip("gradio")
    ports = dict(zip(["release", *MADE], free_ports(1 + len(MADE)), strict=True))
    log = tmp_path_factory.mktemp("space") / "log.txt"
    environment = {key: value for key, value in os.environ.items() if key != "SPACE_ID"}
    command = [sys.executable, __file__, str(demo_run), *(f"{name}={port}" for name, port in ports.items())]
    with log.open("w") as output:
        server = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        try:
            for port in ports.values():
                wait_for(port, server)
            yield {name: f"http://127.0.0.1:{port}/" for name, port in ports.items()}
        finally:
            server.terminate()
            server.wait(timeout=20)
    assert "Traceback" not in log.read_text()
    assert "Warning" not in log.read_text()


def free_ports(n: int) -> list[int]:
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(n)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    """Return when the page answers."""
    for _ in range(900):
        assert server.poll() is None, "the Space ended instead of serving"
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5):
            return
        time.sleep(0.1)
    raise AssertionError("the Space did not answer within 90 seconds")


@pytest.fixture
def visit(browser: Any, addresses: dict[str, str]) -> Iterator[Any]:
    """Opens the landscape of a database, on a page high enough for all of it."""
    with contextlib.ExitStack() as visits:

        def visit(name: str, *, width: int = 1280, **options: Any) -> Any:
            page = visits.enter_context(opened(browser, addresses[name], width=width, height=1300, **options))
            open_tab(page, "Landscape")
            page.locator("#landscape .caption").filter(has_not_text="Reading").wait_for()
            return page

        yield visit


def n_drawn(page: Any, domain: str | None = None) -> int:
    """The marks that the plot has, of a domain or of all: each begins with one M of its path."""
    which = "path" if domain is None else f'path[data-domain="{domain}"]'
    script = "paths => paths.map(path => path.getAttribute('d') || '').join('').split('M').length - 1"
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
    page.wait_for_function("!document.querySelector('#landscape .marks').style.transform.includes('scale')")
    return page.locator(f"#landscape .marks {which}").evaluate_all(script)


def places(page: Any) -> list[tuple[float, float]]:
    """Where the marks lie on the screen, in the paths' order."""
    script = """marks => [...marks.querySelectorAll("path")].flatMap(path => {
        const at = path.getScreenCTM(), starts = [...(path.getAttribute("d") || "").matchAll(/M([^,]+),([^m]+)m/g)];
        return starts.map(([, x, y]) => [Number(x) + at.e, Number(y) + at.f]);
    })"""
    assert n_drawn(page) > 0
    return [(x, y) for x, y in page.locator("#landscape .marks").evaluate(script)]


def label(page: Any) -> list[str]:
    """The lines of the label that is shown."""
    page.evaluate("() => new Promise(done => requestAnimationFrame(done))")
    return page.locator("#landscape .label > *").all_text_contents()


def test_the_release_is_drawn_and_the_method_named(visit: Any, demo_run: Path) -> None:
    page, neurons = visit("release"), NeuronDatabase.load(demo_run)
    with_place = [r for r in neurons if r["x"] is not None]
    assert n_drawn(page) == len(with_place) > 3
    plot = page.get_by_role("application", name=f"by {neurons.landscape['method']}")
    assert plot.get_attribute("aria-roledescription") == "scatter plot"
    note = page.locator(f"#{plot.get_attribute('aria-describedby')}").inner_text()
    assert note.startswith(
        f"{len(with_place)} of {len(with_place)} neurons drawn. The Neurons tab lists the same neurons."
    )


def test_the_legend_counts_and_hides(visit: Any) -> None:
    page = visit("cross")
    legend = page.get_by_role("group", name="Domains that are drawn").get_by_role("button")
    assert legend.all_inner_texts() == ["Politics\n3", "Terror\n2", "Violence\n1", "No domain\n1"]
    assert [n_drawn(page, domain) for domain in ("politics", "terror", "violence", "")] == [2, 2, 1, 1]
    legend.nth(1).click()
    assert [button.get_attribute("aria-pressed") for button in legend.all()] == ["true", "false", "true", "true"]
    assert [n_drawn(page, domain) for domain in ("politics", "terror", "violence", "")] == [3, 0, 1, 1]
    assert page.locator("#landscape-note").inner_text().startswith("5 of 6 neurons drawn.")
    for other in (0, 2, 3):
        legend.nth(other).click()
    assert n_drawn(page) == 0
    page.locator("#landscape .plot").press("ArrowRight")
    assert label(page) == []
    legend.nth(1).click()
    assert [n_drawn(page, domain) for domain in ("politics", "terror", "violence", "")] == [0, 2, 0, 0]


def test_domains_differ_in_shape_and_colour(visit: Any) -> None:
    page = visit("cross")
    for scheme in ("light", "dark"):
        page.evaluate("dark => document.body.classList.toggle('dark', dark)", scheme == "dark")
        script = "path => [path.getAttribute('d'), getComputedStyle(path).fill, getComputedStyle(path).stroke]"
        looks = [path.evaluate(script) for path in page.locator("#landscape .legend path").all()]
        assert len({shape for shape, *_ in looks}) == len({tuple(colours) for _, *colours in looks}) == 4


def test_pointing_shows_the_label_near_the_point(visit: Any) -> None:
    page = visit("cross")
    box = page.locator("#landscape .plot").bounding_box()
    found = {}
    for x, y in places(page):
        page.mouse.move(x + 3, y - 3)
        lines = label(page)
        found[lines[1]] = lines
        shown = page.locator("#landscape .label").bounding_box()
        assert 0 < min(abs(shown["x"] - x), abs(shown["x"] + shown["width"] - x)) < 20
        assert box["x"] <= shown["x"] <= box["x"] + box["width"] - shown["width"]
        assert box["y"] <= shown["y"] <= box["y"] + box["height"] - shown["height"]
    assert found["layers.0.mlp/0"] == ["neuron 0", "layers.0.mlp/0", "Politics", "Score 0.70, strong"]
    assert found["layers.0.mlp/1"][3] == "Score undefined"
    assert found["layers.0.mlp/3"][2] == "No domain"
    assert found["layers.0.mlp/4"][2] == "Terror, Politics"
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 4)
    assert label(page) == []
    page.locator("#landscape .label").wait_for(state="hidden")


def test_up_is_up_and_right_is_right(visit: Any) -> None:
    page = visit("cross")
    spots = {}
    for x, y in places(page):
        page.mouse.move(x, y)
        spots[label(page)[0]] = (x, y)
    assert spots["neuron 0"][0] == spots["neuron 2"][0] < spots["neuron 1"][0] == spots["neuron 3"][0]
    assert spots["neuron 0"][1] == spots["neuron 1"][1] < spots["neuron 2"][1] == spots["neuron 3"][1]
    wide, high = (spots["neuron 3"][i] - spots["neuron 0"][i] for i in (0, 1))
    assert wide == pytest.approx(high, abs=0.3), "both axes have one scale"


def test_a_click_opens_the_card(visit: Any, demo_run: Path) -> None:
    page = visit("release")
    x, y = places(page)[0]
    page.mouse.click(x, y)
    card = page.locator("#landscape-panel article.card")
    card.wait_for()
    name = card.get_attribute("aria-label").removeprefix("Neuron ")
    x, y = places(page)[0]  # the panel made the plot narrower
    page.mouse.move(x, y)
    assert label(page)[1] == name in NeuronDatabase.load(demo_run).neurons
    page.locator("#landscape .ring.opened").wait_for()


def test_another_language_changes_the_labels_only(visit: Any) -> None:
    page = visit("cross")
    page.get_by_role("button", name="Terror").click()
    page.locator("#landscape .plot").evaluate("plot => { plot.dataset.old = 1; }")
    page.locator("#language input").click()
    page.get_by_role("option", name="zh").click()
    page.locator("#landscape .plot:not([data-old])").wait_for()
    assert n_drawn(page) == 5
    assert page.get_by_role("button", name="Terror").get_attribute("aria-pressed") == "false"
    page.locator("#landscape .plot").press("Home")
    assert label(page)[:2] == ["炸弹", "layers.0.mlp/0"]


def test_dragging_moves_and_opens_nothing(visit: Any) -> None:
    page = visit("cross")
    before = places(page)
    x, y = before[0]
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 20, y + 8, steps=3)
    page.mouse.move(x + 40, y + 16, steps=3)
    page.mouse.up()
    moved = [(b[0] - a[0], b[1] - a[1]) for a, b in zip(before, places(page), strict=True)]
    assert all(dx == pytest.approx(40, abs=7) and dy == pytest.approx(16, abs=7) for dx, dy in moved)
    page.locator("#landscape-panel").wait_for(state="hidden")
    page.get_by_role("button", name="Show the whole landscape").click()
    assert places(page) == before


def test_zooming_by_button_wheel_and_key(visit: Any) -> None:
    page = visit("cross")
    before = places(page)

    def grown() -> float:
        now = places(page)
        return (now[1][0] - now[0][0]) / (before[1][0] - before[0][0])

    page.get_by_role("button", name="Zoom in").click()
    assert grown() == pytest.approx(1.5, abs=0.01)
    page.get_by_role("button", name="Zoom out").click()
    page.get_by_role("button", name="Zoom out").click()
    assert places(page) == before, "never smaller than the whole"
    x, y = before[1]
    page.mouse.move(x, y)
    page.mouse.wheel(0, -50)
    page.wait_for_timeout(100)
    assert places(page) == before, "without Ctrl the wheel scrolls the page"
    page.evaluate("window.scrollTo(0, 0)")
    page.keyboard.down("Control")
    page.mouse.wheel(0, -50)
    page.keyboard.up("Control")
    page.wait_for_function("document.querySelector('#landscape .plot.zoomed')")
    assert grown() == pytest.approx(2**0.5, abs=0.01)
    assert places(page)[1] == pytest.approx((x, y), abs=1), "what lies under the pointer stays there"
    page.locator("#landscape .plot").press("0")
    assert places(page) == before
    page.locator("#landscape .plot").press("+")
    assert grown() == pytest.approx(1.5, abs=0.01)


def test_the_keyboard_walks_from_point_to_point(visit: Any) -> None:
    page = visit("cross")
    page.get_by_role("button", name="Show the whole landscape").focus()
    page.keyboard.press("Tab")
    path = [label(page)[0]]
    for key in ("ArrowRight", "ArrowDown", "ArrowLeft", "End", "Home", "ArrowDown"):
        page.keyboard.press(key)
        path.append(label(page)[0])
    # 0: left above; 1: right above; 2: left below; 3: right below; 4 and 5: the middle
    assert path[:2] == ["neuron 0", "neuron 4"]
    assert path[2:] == ["neuron 5", "neuron 4", "neuron 5", "neuron 0", "neuron 4"]
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    assert label(page)[0] in ("neuron 2", "neuron 3"), "not caught between the two in the middle"
    page.keyboard.press("Escape")
    assert label(page) == []
    page.keyboard.press("End")
    page.keyboard.press("Enter")
    page.locator("#landscape-panel article.card[aria-label='Neuron layers.0.mlp/5']").wait_for()
    page.get_by_role("button", name="No domain").focus()
    assert label(page) == []
    for _ in range(4):
        page.keyboard.press("Tab")
    assert label(page)[1] == "layers.0.mlp/5", "the keyboard goes on where it was"


def test_the_points_are_one_stop_of_the_tab_key(visit: Any) -> None:
    page = visit("many")
    stops = page.locator("#landscape").locator("button, [tabindex]").count()
    assert stops == 5 + 1 + 3, "five domains, the plot, three zoom buttons"
    page.get_by_role("button", name="Show the whole landscape").focus()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className").startswith("plot")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('#landscape')") is None


def test_a_point_out_of_sight_is_brought_into_it(visit: Any) -> None:
    page = visit("cross")
    plot = page.locator("#landscape .plot")
    plot.press("Home")
    for _ in range(5):
        plot.press("+")
    box = plot.bounding_box()
    for key in ("ArrowDown", "Home"):
        plot.press(key)
        label(page)
        ring = page.locator("#landscape .ring:not(.opened)").bounding_box()
        assert box["x"] < ring["x"] < box["x"] + box["width"]
        assert box["y"] < ring["y"] < box["y"] + box["height"]


def test_touch_opens_the_card(visit: Any) -> None:
    page = visit("release", width=380, has_touch=True)
    page.locator("#landscape .plot").scroll_into_view_if_needed()
    x, y = places(page)[0]
    page.touchscreen.tap(x + 4, y)
    page.locator("#landscape-panel article.card").wait_for()


def test_two_fingers_zoom(visit: Any) -> None:
    page = visit("cross", has_touch=True)
    page.locator("#landscape .plot").scroll_into_view_if_needed()
    before = places(page)
    box = page.locator("#landscape .plot").bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    hand = page.context.new_cdp_session(page)
    for kind, apart in (("touchStart", 40), ("touchMove", 60), ("touchMove", 80)):
        fingers = [{"x": x - 40, "y": y, "id": 0}, {"x": x - 40 + apart, "y": y, "id": 1}]
        hand.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": fingers})
    hand.send("Input.dispatchTouchEvent", {"type": "touchEnd", "touchPoints": []})
    now = places(page)
    assert (now[1][0] - now[0][0]) / (before[1][0] - before[0][0]) == pytest.approx(2, abs=0.05)
    page.locator("#landscape-panel").wait_for(state="hidden")


def test_hostile_labels_are_shown_and_inert(visit: Any) -> None:
    page = visit("hostile")
    page.locator("#landscape .plot").press("Home")
    seen = {}
    for x, y in places(page):
        page.mouse.move(x, y)
        text, name = label(page)[:2]
        seen[int(name.rpartition("/")[2])] = text
    assert seen == {i: text if len(text) <= 100 else text[:99] + "…" for i, text in enumerate(HOSTILE)}
    assert page.evaluate("window.pwned") is None
    assert page.locator("#landscape :is(script, img)").count() == 0


def test_a_release_without_coordinates_says_so(visit: Any) -> None:
    page = visit("without")
    said = page.locator("#landscape").inner_text()
    assert said == "This release has no landscape: its neurons carry no coordinates."


@pytest.mark.parametrize("name", ["release", "many", "hostile", "without"])
def test_a_narrow_page_does_not_scroll_sideways(visit: Any, name: str) -> None:
    page = visit(name, width=380)
    if name != "without":
        page.locator("#landscape .plot").press("End")
        assert 250 < page.locator("#landscape .plot").bounding_box()["width"] <= 380
    assert page.evaluate("document.documentElement.scrollWidth") <= 380


def test_thousands_of_points_are_drawn_at_once_and_sent_once(visit: Any) -> None:
    page = visit("many")
    assert n_drawn(page) == N_MANY
    answers: list[Any] = []
    page.on("response", lambda response: answers.append(response.headers.get("content-length", "0")))
    open_tab(page, "Neurons")
    open_tab(page, "Landscape")
    page.locator("#landscape .plot").press("+")
    page.wait_for_timeout(300)
    assert max(map(int, answers), default=0) < 10_000, "the plot is not sent again"
    before = places(page)
    took = page.evaluate(
        """() => new Promise(done => {
            const button = document.querySelector("#landscape .zoom button"), times = [];
            const next = start => requestAnimationFrame(now => {
                times.push(now - start);
                if (times.length === 10) return done(times.sort((a, b) => a - b)[5]);
                button.click();
                next(now);
            });
            next(performance.now());
        })"""
    )
    assert took < 500, "milliseconds from frame to frame while zooming"
    assert places(page) != before


if __name__ == "__main__":
    serve(sys.argv[1], {name: int(port) for name, port in (re.split("=", given) for given in sys.argv[2:])})
