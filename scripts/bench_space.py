"""What a visitor of the Space waits for, and what the Space holds for many: each figure beside its limit.

    python scripts/bench_space.py runs/demo --json bench-results/space.json
    python scripts/bench_space.py runs/demo --only click,load

    start     from `safesail serve` as a process to a page with its Run button; files are in the system's cache
    inspect   the inspection of a prompt and what the page shows of it, against `model(input_ids)` of the same ids,
              and the whole run of a prompt with an answer, against writing the answer alone
    click     from a mouse click on a token to its table in the document, timed by the page's own clock
    load      visitors at once, through gradio_client and as the page's script does; then a queue that is full
    memory    resident memory of the server, what it keeps of a visitor, and whether the first visitors are let go
    diagnosis from asking to the result on each page of the diagnosis, for texts of 60 tokens

Every part serves the release anew on a free port of this machine, except `inspect` and `diagnosis`, which run in this
process. The browser is chromium without a window, driven by playwright; where either is missing, what needs them is
left out.
"""

import argparse
import contextlib
import dataclasses
import functools
import importlib
import importlib.util
import math
import os
import shutil
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import benchmark
import torch
from benchmark import Record
from kept_bytes import kept_bytes
from space_visitors import LOST, MIB, PATIENCE, Server, Visit, Visitor, entered, module, served

from safesail.assets import asset
from safesail.diagnosis.inspector import Inspector
from safesail.errors import InputError
from safesail.lm.generate import end_ids, stream
from safesail.lm.tokens import spans
from safesail.neurons import WEAK_BELOW

START_SECONDS, ADDED, CLICK_MS, MEMORY_MIB, DIAGNOSIS_SECONDS = 15.0, 1.25, 150.0, 2048.0, 5.0
"""The limits: a usable page, an inspection against the model's own forward, a click's median, the server's resident
memory with the embedded model, whatever its visitors ask, and a page of the diagnosis."""
TEXT = (
    "After the election the president spoke about the bomb that the police had found near a school, and a reporter "
    "asked why nobody was arrested. My neighbour, who writes novels about murder, said that the government hides most "
    "of what it knows; her son laughed and went on playing football in the garden. In the evening they read about a "
    "soldier who had killed two hostages, a naked singer, the price of bread, and a river that was dry for years."
)

benchmark.COLUMNS.update({"value": ("measured", ",.4g"), "limit": ("limit", ",.4g"), "within": ("within", "")})


# the arithmetic


def figure(name: str, value: float | None, limit: float | None = None) -> Record:
    """A row of the table: a number, and whether it is within its limit where there is one."""
    within = None if value is None or limit is None else "yes" if value <= limit else "no"
    return {"name": name, "value": value, "limit": limit, "within": within}


def verdict(name: str, good: bool) -> Record:
    """A row that holds or not."""
    return {"name": name, "value": None, "limit": None, "within": "yes" if good else "no"}


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of the values that is at least as large as this share of them (nearest rank)."""
    return sorted(values)[max(math.ceil(share * len(values)), 1) - 1]


def spread(found: Sequence[int], n: int) -> list[int]:
    """At most n of the items, evenly spread over them, the first among them."""
    step = max(len(found) / n, 1)
    return [found[int(i * step)] for i in range(min(n, len(found)))]


def prompt_of(n_tokens: int, count: Callable[[str], int], text: str = TEXT) -> str:
    """The longest run of the text's words, over and over, that takes at most n_tokens; count: of a prompt's tokens."""
    words = text.split()

    def first(n: int) -> str:
        return " ".join(words[i % len(words)] for i in range(n))

    low, high = 0, n_tokens  # a word takes at least one token
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if count(first(middle)) <= n_tokens else (low, middle - 1)
    if not low:
        raise InputError(f"a prompt of one word takes more than the {n_tokens} tokens asked for; ask for more.")
    return first(low)


# what the parts share


@dataclasses.dataclass
class Bench:
    """The release, the numbers asked for, and the browser."""

    options: argparse.Namespace
    browser: Any
    """None where there is none."""
    missing: str
    """Why there is none."""

    @property
    def release(self) -> str:
        return self.options.release

    @functools.cached_property
    def inspector(self) -> Inspector:
        return Inspector.from_pretrained(self.release)

    @functools.cached_property
    def page(self) -> Any:
        """The page's functions over an inspector in this process."""
        return space_module("page").Page(self.inspector)

    def prompt(self, n_tokens: int) -> str:
        """A question that takes at most so many tokens in the chat template."""
        return prompt_of(n_tokens, lambda text: len(self.inspector.encode(chat(text))))

    def shown(self, prompt: str) -> list[str]:
        """A question's tokens as the page shows them."""
        visible = space_module("view").visible
        return [visible(unit.text) for unit in spans(self.inspector.tokenizer, self.inspector.encode(chat(prompt)))]

    @functools.cached_property
    def filter(self) -> Any:
        """The filter with which the page begins."""
        language = next(iter(self.page.database.languages), "")
        return space_module("page").Filter(self.page.database.domains, "", WEAK_BELOW, "", "explained", language)

    def run(self, prompt: str, new_tokens: int) -> Any:
        """What the page does for a visitor who presses Run; its `Seen`."""
        *_, last = self.page.run(None, prompt, "chat", "", new_tokens, 0.0, 0, *self.filter)
        return next(value for value in last if isinstance(value, space_module("page").Seen))

    def left_out(self, what: str, limit: float) -> Record:
        """The row of what needs the browser that is missing."""
        return figure(f"{what}: left out, {self.missing}", None, limit)


def chat(prompt: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}]


def space_module(name: str) -> Any:
    """A module of the Space, imported as on the Hub: its folder is where Python looks for modules first."""
    folder = str(asset("space"))
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return module(name)


@contextlib.contextmanager
def browsing() -> Iterator[tuple[Any, str]]:
    """A running chromium, or None and why there is none."""
    executable = shutil.which("chromium")
    if executable is None or importlib.util.find_spec("playwright") is None:
        yield None, f"{'playwright' if executable else 'chromium'} is not installed"
        return
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with module("playwright.sync_api").sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=arguments)
        try:
            yield browser, ""
        finally:
            browser.close()


@contextlib.contextmanager
def opened(bench: Bench, address: str, fragment: str = "") -> Iterator[tuple[Any, list[str]]]:
    """A visitor's browser page with its Run button there, and the addresses of all that it asks for."""
    asked: list[str] = []
    context = bench.browser.new_context()
    page = context.new_page()
    page.set_default_timeout(60_000)
    page.on("request", lambda request: asked.append(request.url))
    try:
        page.goto(address + fragment)
        page.get_by_role("button", name="Run", exact=True).wait_for()
        yield page, asked
    finally:
        context.close()


def elsewhere(requests: Sequence[str], address: str) -> list[str]:
    """The requests that left the server's address."""
    return [url for url in requests if not url.startswith((address, "data:", "blob:"))]


# start


def start(bench: Bench) -> list[Record]:
    """Seconds from the command to HTTP answers, and to the Run button in a browser that was open before."""
    seconds: dict[str, list[float]] = {"start to HTTP answers": [], "start to the Run button": []}
    answers, pages = seconds.values()
    for _ in range(bench.options.starts):
        with served(bench.release) as server:
            answers.append(time.perf_counter() - server.started)
            if bench.browser:
                with opened(bench, server.address):
                    pages.append(time.perf_counter() - server.started)
    return [
        figure(f"{what} (s, largest {max(times):.1f})", statistics.median(times), START_SECONDS)
        if times
        else bench.left_out(what, START_SECONDS)
        for what, times in seconds.items()
    ]


# inspect


def inspect(bench: Bench) -> list[Record]:
    """What an inspection costs beside the model's own forward of the same ids, and an answer's beside writing it."""
    prompt, n, rounds = bench.prompt(bench.options.tokens), bench.options.answer, bench.options.rounds
    ids = bench.inspector.encode(chat(prompt))
    short: dict[str, Callable[[], object]] = {
        "forward": lambda: _forward(bench.inspector, ids),
        "inspect": lambda: _inspected(bench, ids, prompt),
        "run": lambda: bench.run(prompt, 0),
    }
    answering: dict[str, Callable[[], object]] = {
        "write": lambda: _written(bench.inspector, ids, n),
        "run": lambda: bench.run(prompt, n),
    }
    forward, inspecting, run = map(benchmark.median_ms, benchmark.interleave(short, rounds).values())
    fewer = max(rounds // 3, 1)
    write, answered = map(benchmark.median_ms, benchmark.interleave(answering, fewer, warm_up=1).values())
    return [
        figure(f"the model's own forward of {len(ids)} tokens (ms)", forward),
        figure("inspecting and showing them (× the forward)", inspecting / forward, ADDED),
        figure("the page's whole run of them, no answer (× the forward)", run / forward, ADDED),
        figure(f"a run with an answer of {n} tokens (× writing it alone)", answered / write),
    ]


@torch.inference_mode()
def _forward(inspector: Inspector, ids: list[int]) -> None:
    inspector.model(input_ids=torch.tensor([ids]))


@torch.inference_mode()
def _written(inspector: Inspector, ids: list[int], n: int) -> None:
    list(stream(inspector.model, ids, n, end_ids(inspector.model, inspector.tokenizer)))


def _inspected(bench: Bench, ids: list[int], prompt: str) -> None:
    """The inspection, and the strip, headline and table of its strongest token."""
    page, view = space_module("page"), space_module("view")
    inspection = bench.inspector.inspect_ids(ids)
    index = view.strongest(inspection, inspection.strengths(bench.filter.colouring))
    bench.page.show(page.Seen(inspection, page.Asked(prompt, "chat", "", 0, 0.0, 0), index), *bench.filter)


# click

_ARMED = """index => {
  const wanted = new RegExp(`token ${index + 1}(?!\\\\d)`, "i");
  const says = selector => wanted.test(document.querySelector(selector)?.textContent ?? "");
  window.shown = new Promise((resolve, reject) => {
    let clicked = null;
    const observer = new MutationObserver(() => {
      if (clicked === null || !says("#headline strong") || !says("#neurons caption")) return;
      observer.disconnect();
      resolve(performance.now() - clicked);
    });
    observer.observe(document.body, { childList: true, subtree: true, characterData: true });
    document.addEventListener("click", event => (clicked = event.timeStamp), { capture: true, once: true });
    setTimeout(() => reject(new Error(`no table of token ${index + 1} within 20 s`)), 20000);
  });
}"""
"""Waits for the next click, then for the headline and the table of a token; resolves to the milliseconds between."""


def click(bench: Bench) -> list[Record]:
    """Milliseconds from the click on a token to its table, in a long conversation; and what left this machine."""
    what = "click to table"
    if not bench.browser:
        return [bench.left_out(what, CLICK_MS), bench.left_out("requests to other hosts", 0)]
    n = min(bench.options.conversation, bench.page.max_tokens)
    prompt = bench.prompt(n - bench.options.answer)
    with served(bench.release) as server:
        firing, all_, n = _firing(server, prompt, bench.options.answer)
        asked = space_module("page").Asked(prompt, "chat", "", bench.options.answer, 0, 0)
        fragment = space_module("view").inspection_link(asked._asdict(), 0)
        with opened(bench, server.address, fragment) as (page, requests):
            page.locator("#strip button").first.wait_for()
            times = _clicked(page, spread(firing, bench.options.clicks))
            with page.expect_response("**/run/predict"):
                page.locator("#listing").get_by_label("all that fire").check()
            longest = _clicked(page, spread(all_, bench.options.clicks))
            _look_around(page)
    return [
        *_click_figures(f"{what}, explained neurons listed", times, n),
        *_click_figures(f"{what}, all neurons listed", longest, n),
        figure(f"requests to other hosts, of {len(requests)}", len(elsewhere(requests, server.address)), 0),
    ]


def _firing(server: Server, prompt: str, answer: int) -> tuple[list[int], list[int], int]:
    """The places with a table of explained neurons, those with one of all neurons, and how many ids there are."""
    client = _client(server)
    found = client.predict(prompt=prompt, max_new_tokens=answer, api_name="/inspect")
    client.close()
    explained = [i for i, token in enumerate(found["tokens"]) if token["neurons"]]
    return explained, [i for i, token in enumerate(found["tokens"]) if not token["note"]], len(found["ids"])


def _clicked(page: Any, places: list[int]) -> list[float]:
    """Milliseconds of each click; a token that is selected already comes last."""
    selected = page.locator("#strip button[aria-pressed=true]").get_attribute("data-index")
    times = []
    for place in sorted(places, key=lambda place: str(place) == selected):
        page.evaluate(_ARMED, place)
        page.locator("#strip button").nth(place).click()
        times.append(page.evaluate("window.shown"))
    return times


def _click_figures(what: str, times: list[float], n: int) -> list[Record]:
    note = f"ms, of {len(times)}, {n} tokens"
    return [
        figure(f"{what}: median ({note})", statistics.median(times), CLICK_MS),
        figure(f"{what}: 95th percentile ({note})", percentile(times, 0.95)),
    ]


def _look_around(page: Any) -> None:
    """Open a neuron and the other tabs, so that their requests are counted."""
    page.locator("#neurons button").first.click()
    page.locator("#inspector-card article").wait_for()
    page.get_by_role("tab", name="Neurons").click()
    page.locator("#found table").wait_for()
    page.get_by_role("tab", name="Landscape").click()
    page.locator("#landscape").wait_for()
    page.wait_for_timeout(1000)


# load


def load(bench: Bench) -> list[Record]:
    """Visitors at once in two ways, each with a question of its own; then one more than may wait."""
    n = bench.options.visitors
    prompts = [f"Visitor number {i} asks about {TEXT.split()[i % 60]}." for i in range(n)]
    with served(bench.release) as server, entered(server) as enter:
        clients = [_client(server) for _ in prompts]
        by_api = at_once([_by_api(bench, *pair) for pair in zip(clients, prompts, strict=True)])
        by_page = at_once([_by_page(bench, enter(), prompt) for prompt in prompts])
        full = _full(bench, server, enter)
        log = server.log.read_text(encoding="utf-8", errors="replace")
    return [
        *_visit_figures(f"{n} at once through the API", by_api),
        *_visit_figures(f"{n} at once as the page does", by_page),
        figure("as the page does: not told their place", sum(not visit.told for visit in by_page), 0),
        *full,
        figure("tracebacks in the server's log", log.count("Traceback"), 0),
    ]


def _client(server: Server) -> Any:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # the option alone does not keep it from asking its makers' host
    return module("gradio_client").Client(server.address, verbose=False, analytics_enabled=False)


def at_once(visits: list[Callable[[], Visit]]) -> list[Visit]:
    """All visits begun at the same moment; one that fails is lost, and says why."""
    together = threading.Barrier(len(visits))

    def visited(visit: Callable[[], Visit]) -> Visit:
        together.wait(PATIENCE)
        try:
            return visit()
        except Exception as error:  # whatever it is, the figure is how many were lost
            print(f"lost: {error!r}", file=sys.stderr)
            return LOST

    with ThreadPoolExecutor(len(visits)) as pool:
        return list(pool.map(visited, visits))


def _visit_figures(what: str, visits: list[Visit]) -> list[Record]:
    return [
        figure(f"{what}: not answered with their own tokens", sum(not visit.tokens for visit in visits), 0),
        figure(f"{what}: the longest wait (s)", max(visit.seconds for visit in visits)),
    ]


def _by_api(bench: Bench, client: Any, prompt: str) -> Callable[[], Visit]:
    """A visit through gradio_client; lost when the ids are not those of its own prompt."""
    ids, shown = bench.inspector.encode(chat(prompt)), bench.shown(prompt)

    def visit() -> Visit:
        began = time.perf_counter()
        job = client.submit(prompt=prompt, max_new_tokens=bench.options.answer, api_name="/inspect")
        found = job.result(timeout=PATIENCE)
        own = found["ids"][: found["n_prompt"]] == ids
        return Visit(shown, time.perf_counter() - began, told=False) if own else LOST

    return visit


def _by_page(bench: Bench, visitor: Visitor, prompt: str) -> Callable[[], Visit]:
    """A visit as the page's, and a click; lost when the tokens or their link are not those of its own prompt."""
    shown, link = bench.shown(prompt), space_module("view").inspection_link({"prompt": prompt}, 0)
    own = link.partition("?")[2].partition("&")[0]

    def visit() -> Visit:
        if refused := visitor.ask(prompt, bench.options.answer):
            raise AssertionError(refused)
        found = visitor.wait()
        return found if found.tokens == shown and own in visitor.select(len(shown) - 1) else LOST

    return visit


def _full(bench: Bench, server: Server, enter: Callable[[], Visitor]) -> list[Record]:
    """Fill the queue, ask once more, and wait for those who were let in."""
    limit = space_module("app").MAX_WAITING
    waiting: list[Visitor] = []
    told = []
    with contextlib.ExitStack() as stack:
        page = stack.enter_context(opened(bench, server.address))[0] if bench.browser else None
        fill = functools.partial(_fill, enter, waiting, limit, bench.options.hold)
        refused = fill()
        if page:
            told = [_told(page, fill)]
    answered = at_once([visitor.wait for visitor in waiting])
    return [
        figure(f"queue full: let in, {limit} may wait", len(waiting)),
        verdict(f"queue full: the next is told “{refused}”", bool(refused)),
        *told,
        figure("queue full: let in and not answered", sum(not visit.tokens for visit in answered), 0),
    ]


def _fill(enter: Callable[[], Visitor], waiting: list[Visitor], limit: int, hold: int) -> str:
    """Let visitors in until one is refused; gives why. The first `hold` ask for the longest answer."""
    longest = space_module("page").MAX_NEW_TOKENS
    while len(waiting) < 4 * limit:
        visitor = enter()
        if refused := visitor.ask(f"Visitor {len(waiting)} waits.", longest if len(waiting) < hold else 4):
            return refused
        waiting.append(visitor)
    return ""


def _told(page: Any, fill: Callable[[], object]) -> Record:
    """Seconds from a browser's request to a message that stands on its page. fill: just before that request."""
    what, asked_at = "queue full: until the browser's page says so", []

    def ask_when_full(route: Any) -> None:
        fill()
        asked_at.append(time.perf_counter())
        route.continue_()

    page.route("**/queue/join*", ask_when_full)
    page.locator("#prompt textarea").fill("One more.")
    page.get_by_role("button", name="Run", exact=True).click()
    try:
        page.locator(".toast-body").first.wait_for(timeout=20_000)
    except module("playwright.sync_api").TimeoutError:
        return verdict(f"{what}: it does not within 20 s", good=False)
    said = " ".join(page.locator(".toast-body").first.inner_text().split())
    return {**figure(f"{what} “{said}” (s)", time.perf_counter() - asked_at[0]), "within": "yes"}


# memory


def memory(bench: Bench) -> list[Record]:
    """The server's memory with the largest conversations and then as many small ones as are kept, against its cap."""
    if not Path("/proc/self/status").exists():
        raise InputError("memory is read from /proc, which only Linux has; leave it out with --only.")
    sessions, answer, n = space_module("page").SESSIONS, bench.options.answer, bench.options.kept
    prompt = bench.prompt(bench.page.max_tokens - answer)
    seen = bench.run(prompt, answer)
    kept = kept_bytes(seen, [bench.page.database, bench.inspector.saes]) / MIB
    with served(bench.release) as server, entered(server) as enter:
        resident = [server.memory()]
        visitors = [enter() for _ in range(n)]
        for visitor in visitors:
            _answered(visitor, prompt, answer)
            resident.append(server.memory())
        held = bool(visitors[0].select(3))
        for i in range(sessions):
            _answered(enter(), f"Visitor {i}.", 0)
        let_go, last, peak = not visitors[0].select(3), server.memory(), server.memory("VmHWM")
    largest = f"{len(seen.inspection.ids):,} tokens"
    return [
        figure("server after the start (MiB)", resident[0]),
        figure(f"server after one conversation of {largest} (MiB)", resident[1]),
        figure(f"server after {n} of them (MiB)", resident[-1]),
        figure("kept of one of them (MiB)", kept),
        figure(f"kept of {sessions}, which is all (MiB)", sessions * kept),
        figure(f"server after {sessions} more visitors, with short prompts (MiB)", last),
        figure("server at its highest (MiB)", peak, MEMORY_MIB),
        verdict("the first visitor is kept before those, and let go after", held and let_go),
    ]


def _answered(visitor: Visitor, prompt: str, new_tokens: int) -> None:
    if refused := visitor.ask(prompt, new_tokens):
        raise InputError(f"a visitor alone was refused: {refused}")
    if not visitor.wait().tokens:
        raise InputError("a visitor alone got no answer; run the same prompt in the page to see why.")


# diagnosis


def diagnosis(bench: Bench) -> list[Record]:
    """Seconds of each page's work, the median of a few rounds. What is made once, or of a long list, has no limit."""
    inspector, n, new = bench.inspector, bench.options.text, bench.options.new
    text, other = (prompt_of(n, lambda text: len(inspector.encode(text)), words) for words in (TEXT, _backwards(TEXT)))
    made = space_module("diagnosis").Diagnosis(bench.page)
    neuron, rounds = _last_firing(inspector, text), max(bench.options.rounds // 3, 1)
    works: list[tuple[str, float | None, int, Callable[[], str | Iterator[str]]]] = [
        ("the first text in the monitor, which calibrates it", None, 1, lambda: made.risks(text, 0.5)),
        (f"a text of {n} tokens in the monitor", DIAGNOSIS_SECONDS, rounds, lambda: made.risks(text, 0.5)),
        (
            f"trajectories of two texts of {n} tokens",
            DIAGNOSIS_SECONDS,
            rounds,
            lambda: made.trajectories("domain", 0, "a", text, "b", other),
        ),
        (f"what leads to a neuron on {n} tokens", DIAGNOSIS_SECONDS, rounds, lambda: made.graph(text, neuron)),
        (
            f"two answers of {new} tokens to {n}",
            DIAGNOSIS_SECONDS,
            rounds,
            lambda: made.answers(text, "chat", neuron, "steer", 4.0, new, 0.0, 0),
        ),
        ("knowledge of the shipped names", None, 1, lambda: made.knowledge(neuron, "presidents", "")),
    ]
    return [_page_figure(f"{what} (s)", limit, times, work) for what, limit, times, work in works]


def _page_figure(what: str, limit: float | None, rounds: int, work: Callable[[], str | Iterator[str]]) -> Record:
    """The median seconds of a page's work; where the page says instead why it cannot, that."""
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        shown = work()
        last = shown if isinstance(shown, str) else list(shown)[-1]
        seconds.append(time.perf_counter() - start)
        if "<article" not in last:
            return figure(f"{what}: left out, the page says {last}", None, limit)
    return figure(what, statistics.median(seconds), limit)


def _backwards(text: str) -> str:
    return " ".join(reversed(text.split()))


def _last_firing(inspector: Inspector, text: str) -> str:
    """The neuron that fires most, for its size, at the last hook point."""
    inspection = inspector.inspect(text)
    last = list(inspector.saes)[-1]
    hits = [hit for i in range(len(inspection.units)) for hit in inspection.hits(i) if hit.hook_point == last]
    return max(hits, key=lambda hit: hit.normalised or 0.0).neuron_id


# the command line

PARTS = {
    "start": start,
    "inspect": inspect,
    "click": click,
    "load": load,
    "memory": memory,
    "diagnosis": diagnosis,
}


def parts_wanted(text: str) -> list[str]:
    """The parts of `start,click`, in the order in which they run."""
    wanted = text.split(",")
    for name in wanted:
        if name not in PARTS:
            raise InputError(f"--only {name} is none of {', '.join(PARTS)}.")
    return [name for name in PARTS if name in wanted]


def measure(options: argparse.Namespace) -> list[Record]:
    """The records of the parts asked for."""
    parts, records = parts_wanted(options.only), []
    with browsing() as (browser, missing):
        bench = Bench(options, browser, missing)
        for part in parts:
            print(f"measuring {part} …", file=sys.stderr, flush=True)
            found = PARTS[part](bench)
            case = f"{Path(options.release).name}; load {os.getloadavg()[0]:.1f} at its end"
            records += [{"table": part, "case": case, **record} for record in found]
    return records


def main() -> int:
    parser = argparse.ArgumentParser(description="Measure the Space of a release, each figure beside its limit.")
    parser.add_argument("release", nargs="?", default="runs/demo", help="a run folder (default runs/demo)")
    benchmark.add_common_options(parser)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas (default: all)")
    parser.add_argument("--starts", type=int, default=5, help="starts of the server (default 5)")
    parser.add_argument("--tokens", type=int, default=100, help="tokens of the prompt that is inspected (default 100)")
    parser.add_argument("--answer", type=int, default=16, help="tokens of an answer (default 16)")
    parser.add_argument("--conversation", type=int, default=512, help="tokens of the one clicked through (default 512)")
    parser.add_argument("--clicks", type=int, default=40, help="tokens clicked (default 40)")
    parser.add_argument("--visitors", type=int, default=20, help="visitors at once (default 20)")
    parser.add_argument("--hold", type=int, default=2, help="visitors whose long answers keep the queue full (2)")
    parser.add_argument("--kept", type=int, default=6, help="visitors with the largest conversation (default 6)")
    parser.add_argument("--text", type=int, default=60, help="tokens of a text of the diagnosis (default 60)")
    parser.add_argument("--new", type=int, default=32, help="tokens of an answer under an intervention (default 32)")
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that the server is ended as well
    return benchmark.run_script(parser, measure)


if __name__ == "__main__":
    sys.exit(main())
