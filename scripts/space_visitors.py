"""A Space served as a process of its own, and visitors that ask it as the page's script and its own requests do."""

import contextlib
import ctypes
import importlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import httpx2

from safesail.errors import InputError

__all__ = [
    "LOST",
    "MIB",
    "PATIENCE",
    "Server",
    "Visit",
    "Visitor",
    "Way",
    "end",
    "entered",
    "module",
    "prompt_tokens",
    "served",
    "way_of",
]

MIB = 2**20
PATIENCE = 300.0
"""Seconds after which a visitor without an answer counts as lost."""

# the server


class Server(NamedTuple):
    """A served release."""

    address: str
    process: subprocess.Popen[bytes]
    log: Path
    started: float
    """When the process was started, by `time.perf_counter`."""

    def memory(self, key: str = "VmRSS") -> float:
        """MiB, now or (VmHWM) at its highest; see proc(5)."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{key}:"))


@contextlib.contextmanager
def served(release: str) -> Iterator[Server]:
    """The release, served by a process of its own, which answers when this yields and is gone afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("SAFESAIL_", "SPACE_ID"))}
    command = [sys.executable, "-m", "safesail.cli", "serve", release, "--port", str(port)]
    with tempfile.TemporaryDirectory() as folder, (Path(folder) / "log.txt").open("wb") as output:
        started = time.perf_counter()
        process = subprocess.Popen(
            command, env=environment, stdout=output, stderr=output, start_new_session=True, preexec_fn=_end_with_parent
        )
        try:
            server = Server(f"http://127.0.0.1:{port}/", process, Path(output.name), started)
            _wait_for_answers(server)
            yield server
        finally:
            end(process)


def _end_with_parent() -> None:
    """Have Linux end this process when the one that started it is killed; see prctl(2), PR_SET_PDEATHSIG."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)


def _wait_for_answers(server: Server) -> None:
    """Return when the page and its configuration are served; InputError with the server's last line if it ends."""
    while time.perf_counter() - server.started < PATIENCE:
        if server.process.poll() is not None:
            said = server.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            raise InputError(f"the Space ended instead of serving: {said[-1] if said else 'it said nothing'}")
        with contextlib.suppress(httpx2.TransportError):
            if all(httpx2.get(server.address + path, timeout=5).status_code == 200 for path in ("", "config")):
                return
        time.sleep(0.05)
    raise InputError(f"the Space did not answer within {PATIENCE:.0f} s.")


def end(process: subprocess.Popen[bytes]) -> None:
    """End the process and all that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=10)
            return


# visitors


def module(name: str) -> Any:
    """A module of the extras; InputError names the command that installs it."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.partition(".")[0]:
            raise
        raise InputError(f"{error.name} is not installed: pip install -e '.[test]'.") from None


class Way(NamedTuple):
    """How the page's script asks: the numbers of its events, and the values with which its fields begin."""

    run: int
    select: int
    asked: list[Any]
    prompt: int
    """The place of the prompt among `asked`."""
    new_tokens: int
    looked: list[Any]


def way_of(config: dict[str, Any]) -> Way:
    """The way, from a page's `/config`."""
    props = {component["id"]: component["props"] for component in config["components"]}
    run, select = _event(config, props, "run", "click"), _event(config, props, "strip", "select")
    fields = [props[id] for id in run["inputs"]]
    return Way(
        run["id"],
        select["id"],
        [field.get("value") for field in fields],
        next(i for i, field in enumerate(fields) if field.get("elem_id") == "prompt"),
        next(i for i, field in enumerate(fields) if field.get("label") == "Max new tokens"),
        [props[id].get("value") for id in select["inputs"]],
    )


def _event(config: dict[str, Any], props: dict[int, Any], elem_id: str, name: str) -> dict[str, Any]:
    for event in config["dependencies"]:
        if any(props.get(id, {}).get("elem_id") == elem_id and name == on for id, on in event["targets"]):
            return event
    raise AssertionError(f"the page has no event {name} of #{elem_id}")


class Visit(NamedTuple):
    """What one visitor got."""

    tokens: list[str]
    """The prompt's; empty without an answer."""
    seconds: float
    """From asking to the answer."""
    told: bool
    """Whether its place in the queue was told."""


LOST = Visit([], PATIENCE, told=False)


class Visitor:
    """One visitor, as the page's own script is one: the same requests with a session of its own, without a browser."""

    def __init__(self, http: httpx2.Client, way: Way) -> None:
        self.http, self.way, self.session = http, way, uuid.uuid4().hex
        self.asked_at = 0.0

    def ask(self, prompt: str, new_tokens: int) -> str:
        """Queue a run; gives an empty string, or why it was refused."""
        data = list(self.way.asked)
        data[self.way.prompt], data[self.way.new_tokens] = prompt, new_tokens
        self.asked_at = time.perf_counter()
        answer = self.http.post("gradio_api/queue/join", json=self._body(self.way.run, data, None))
        return "" if answer.status_code == 200 else str(answer.json()["detail"])

    def wait(self) -> Visit:
        """Follow the run to its end."""
        told, path = False, "gradio_api/queue/data"
        with self.http.stream("GET", path, params={"session_hash": self.session}) as events:
            for line in events.iter_lines():
                message: dict[str, Any] = json.loads(line.removeprefix("data:") or "{}")
                told = told or message.get("rank") is not None
                if message.get("msg") == "process_completed":
                    tokens = prompt_tokens(message["output"].get("data") or [])
                    return Visit(tokens, time.perf_counter() - self.asked_at, told)
        return LOST

    def select(self, index: int) -> str:
        """The headline of a token that is clicked; empty when the tokens are no longer kept."""
        event = {"index": index, "value": index}
        answer = self.http.post("gradio_api/run/predict", json=self._body(self.way.select, self.way.looked, event))
        answer.raise_for_status()
        headline = answer.json()["data"][0]
        return headline if isinstance(headline, str) else ""

    def _body(self, number: int, data: list[Any], event: dict[str, int] | None) -> dict[str, Any]:
        return {"fn_index": number, "data": data, "event_data": event, "session_hash": self.session}


def prompt_tokens(values: list[Any]) -> list[str]:
    """The texts of the prompt's tokens, in what a run gives."""
    strip: dict[str, Any] = next((value for value in values if isinstance(value, dict) and "sections" in value), {})
    prompts = [section["tokens"] for section in strip.get("sections", []) if section["name"] == "Prompt"]
    return [token["text"] for tokens in prompts for token in tokens]


@contextlib.contextmanager
def entered(server: Server) -> Iterator[Callable[[], Visitor]]:
    """Makes visitors of a server, which share connections but no session."""
    limits = httpx2.Limits(max_connections=None)
    with httpx2.Client(base_url=server.address, timeout=PATIENCE, limits=limits) as http:
        way = way_of(http.get("config").json())
        yield lambda: Visitor(http, way)
