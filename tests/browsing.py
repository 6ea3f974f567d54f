"""A Space of a release as a process of its own, and what a visitor does on its page in a headless browser.

with serving(release, folder) as address, opened(browser, address) as page:
    ask(page, "The president saw a bomb.")
    neurons(page)
"""

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from safesail.assets import asset

__all__ = [
    "ask",
    "ask_by_keys",
    "cells",
    "choose",
    "chromium",
    "neurons",
    "open_tab",
    "opened",
    "seen_at_failure",
    "serving",
    "start",
    "wait_for",
]

_OURS = ("SPACE_ID", "SAFESAIL_RELEASE", "SAFESAIL_MODEL", "SAFESAIL_HOST", "SAFESAIL_PORT")
_visits: dict[Any, list[str]] = {}
"""The open pages, each with the addresses that it asked for."""
_PATIENCE = 60_000
"""Milliseconds to wait for what should come: nothing takes as long, but where other work takes the processor."""
_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


@contextlib.contextmanager
def serving(release: Path | str, folder: Path, **environment: str) -> Iterator[str]:
    """The address of a Space of the release, on a free port; its log, in `folder`, holds no traceback at the end.

    environment: variables of the process besides those that name the release and the port.
    """
    port, log = _free_port(), folder / "log.txt"
    inherited = {key: value for key, value in os.environ.items() if key not in _OURS}
    ours = {"SAFESAIL_RELEASE": str(release), "SAFESAIL_PORT": str(port)}
    with log.open("w") as output:
        command = [sys.executable, str(asset("space/app.py"))]
        server = subprocess.Popen(command, env=inherited | ours | environment, stdout=output, stderr=output)
        try:
            wait_for(port, server, log)
            yield f"http://127.0.0.1:{port}/"
        finally:
            server.terminate()
            server.wait(timeout=20)
    written = log.read_text()
    assert "Traceback" not in written, written[-4000:]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def wait_for(port: int, server: subprocess.Popen[bytes], log: Path | None = None) -> None:
    """Return when the page answers. log: what the process wrote, for the message if it ends instead."""
    for _ in range(600):
        assert server.poll() is None, f"the Space ended instead of serving: {log.read_text()[-4000:] if log else ''}"
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=5):
            return
        time.sleep(0.1)
    raise AssertionError("the Space did not answer within a minute")


@contextlib.contextmanager
def chromium() -> Iterator[Any]:
    """A headless Chromium of this machine; the test is skipped where there is none."""
    path = shutil.which("chromium")
    if path is None:
        pytest.skip("chromium is not installed")
    playwright = pytest.importorskip("playwright.sync_api")
    playwright.expect.set_options(timeout=_PATIENCE)
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=path, args=_FLAGS)
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(
    browser: Any, address: str, *, width: int = 1280, height: int = 900, fragment: str = "", **context: Any
) -> Iterator[Any]:
    """A new visitor's page, which asks no other host and writes no error to the console.

    fragment: what stands in the address after #. context: other options of `browser.new_context`, as `color_scheme`.
    """
    requests: list[str] = []
    errors: list[str] = []
    visitor = browser.new_context(viewport={"width": width, "height": height}, **context)
    page = visitor.new_page()
    page.set_default_timeout(_PATIENCE)
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    try:
        page.goto(f"{address}#{fragment.removeprefix('#')}" if fragment else address)
        page.locator("h1", has_text="safesail").wait_for()
        _visits[page] = requests
        yield page
    except BaseException as error:
        error.add_note(_described(page, requests))
        raise
    finally:
        _visits.pop(page, None)
        visitor.close()
    elsewhere = [url for url in requests if not url.startswith((address, "data:", "blob:"))]
    assert elsewhere == [], elsewhere
    assert errors == [], errors


def seen_at_failure() -> str:
    """What the pages that are open show, for the report of a test that failed."""
    return "\n".join(_described(page, requests) for page, requests in _visits.items())


def _described(page: Any, requests: list[str]) -> str:
    try:
        focus, text = page.evaluate("[document.activeElement.outerHTML.slice(0, 300), document.body.innerText]")
    except pytest.importorskip("playwright.sync_api").Error as error:
        return f"the page cannot be looked at: {error}"
    asked = "\n".join([url for url in requests if "/queue/" in url][-10:])
    return f"--- {page.url}\n--- has the focus: {focus}\n--- asked last:\n{asked}\n--- shows:\n{text[:4000]}"


def ask(page: Any, prompt: str, *, new_tokens: int = 4) -> Any:
    """Run a prompt as a visitor does and wait for the neurons of the selected token; the token buttons."""
    page.locator("#prompt textarea").fill(prompt)
    number = page.get_by_role("spinbutton", name="Max new tokens")
    if not number.is_visible():
        page.get_by_role("button", name="System prompt and settings").click()
        page.get_by_label("range slider for Max new tokens").wait_for()
    for _ in range(20):  # an accordion that opens sets its fields' values once more
        if number.input_value() == str(new_tokens):
            break
        number.fill(str(new_tokens))
        number.blur()
        page.wait_for_timeout(300)
    start(page, "#run")
    tokens = page.locator("#strip button")
    tokens.first.wait_for()
    page.locator("#neurons :is(table, p)").first.wait_for()
    return tokens


def ask_by_keys(page: Any, prompt: str) -> None:
    """Type into the prompt, which has the focus, and press Ctrl-Enter."""
    page.keyboard.type(prompt)
    start(page, lambda: page.keyboard.press("Control+Enter"))


def start(page: Any, press: str | Callable[[], None]) -> None:
    """Press, as a visitor would, until the browser asks the server for a run. press: keys, or the selector of a button.

    Gradio drops a press that comes before it knows of the end of the last run, whose result the page may show already.
    A first press on a fresh page was seen to be lost too, thrice beside other browsers; why is not known.
    """
    errors = pytest.importorskip("playwright.sync_api").TimeoutError
    pressed = page.locator(press).click if isinstance(press, str) else press
    for _ in range(10):
        try:
            with page.expect_request(lambda request: "/queue/join" in request.url, timeout=6000):
                pressed()
        except errors:
            continue
        return
    raise AssertionError("pressed ten times, and no run begins")


def open_tab(page: Any, name: str) -> None:
    """Open a tab, which on a narrow page is in the menu of more tabs.

    Gradio moves tabs between the row and the menu while it measures them, so what is seen may be gone by the click.
    """
    tab = page.get_by_role("tab", name=name, exact=True)
    errors = pytest.importorskip("playwright.sync_api").TimeoutError
    for _ in range(20):
        with contextlib.suppress(errors):
            if tab.is_visible():
                return tab.click(timeout=1000)
            page.get_by_label("More tabs").click(timeout=1000)
            return page.locator(".overflow-dropdown button", has_text=name).click(timeout=1000)
    raise AssertionError(f"the tab {name} can be clicked neither in the row of tabs nor in the menu of more")


def choose(page: Any, elem_id: str, choice: str) -> None:
    """Choose from a dropdown as a visitor does."""
    page.locator(f"#{elem_id} input").click()
    page.get_by_role("option", name=choice, exact=True).click()


def neurons(page: Any) -> list[list[str]]:
    """The rows of the neurons that the selected token has, as the texts of their cells."""
    return cells(page, "#neurons")


def cells(page: Any, place: str) -> list[list[str]]:
    """The body rows of the table at a place of the page, as the texts of their cells."""
    rows = page.locator(f"{place} tbody tr").all()
    return [[cell.strip() for cell in row.locator("td").all_inner_texts()] for row in rows]
