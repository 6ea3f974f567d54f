"""A double of the Hugging Face Hub on the loopback interface, for the real clients: LFS or Xet, and made failures.

It proves that clients and package speak the protocol; it does not have the real Hub's quotas, builds or moderation.
`with HubDouble(tmp_path) as hub:` then `hub.used(token)` in process, or `hub.environment(token)` for a subprocess.
"""

import asyncio
import contextlib
import os
import re
import socket
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock
from urllib.parse import parse_qs

import hub_double_xet
import uvicorn
from hub_double_api import answer
from hub_double_calls import Call, Reply
from hub_double_store import TOKENS, Caller, HubError, Repo, Store
from starlette.responses import JSONResponse, Response
from uvicorn.protocols.http.h11_impl import H11Protocol

__all__ = ["TOKENS", "HubDouble", "Seen"]


class Seen(NamedTuple):
    """A request that reached the double; the path is percent-encoded and without its query."""

    method: str
    path: str
    status: int | str
    """The status of the answer, or `cut` or `lost` when the connection was closed instead."""
    user: str
    """The name behind the token; empty without one."""


@dataclass
class Fault:
    """A failure that the next `times` matching requests meet."""

    when: Callable[[str], Any]
    status: int | str
    times: int
    retry_after: float | None

    @property
    def headers(self) -> dict[str, str]:
        if self.retry_after is None:
            return {}
        limit = {"RateLimit": f'"api";r=0;t={int(self.retry_after)}'} if self.status == 429 else {}
        return {"Retry-After": f"{self.retry_after:g}", **limit}


class HubDouble:
    """The server, in a thread of this process; a context manager."""

    def __init__(self, folder: Path, xet: bool = False) -> None:
        self.folder, self.xet = folder, xet
        self.store, self.requests = Store(), list[Seen]()
        if xet:
            self.store.find_elsewhere = lambda sha256: hub_double_xet.find(folder / "cas", sha256, folder)
        self.url = ""
        self.errors: list[Exception] = []
        """Mistakes of the double itself; leaving the context raises the first."""
        self._faults: list[Fault] = []
        self._transports: dict[Any, asyncio.Transport] = {}

    # --- what the tests ask and set

    def repo(self, repo_type: str, repo_id: str) -> Repo:
        """What the server holds; KeyError if there is no such repository."""
        return self.store.repos[repo_type, repo_id]

    def create(
        self, repo_type: str, repo_id: str, files: Mapping[str, bytes] | Path | None = None, *, private: bool = False
    ) -> Repo:
        """A repository made without a client, with the given files or those of a folder."""
        repo = self.store.create(repo_type, repo_id, private)
        if isinstance(files, Path):
            paths = [path for path in files.rglob("*") if path.is_file()]
            files = {path.relative_to(files).as_posix(): path.read_bytes() for path in paths}
        if files:
            repo.put(files)
        return repo

    def grant(self, repo_type: str, repo_id: str, user: str) -> None:
        """Lets a user through the gate of a repository."""
        self.repo(repo_type, repo_id).granted.add(user)

    def fail(
        self,
        when: str | Callable[[str], Any],
        status: int | str,
        times: int = 1,
        retry_after: float | None = None,
    ) -> None:
        """Makes the next `times` requests whose `METHOD path` matches fail.

        `status` is the answer, or `cut`: the connection is closed after half of the body (of the request if it has
        one, and nothing is done; else of the answer), or `lost`: the request is carried out and never answered.
        """
        self._faults.append(
            Fault(re.compile(when).search if isinstance(when, str) else when, status, times, retry_after)
        )

    def recover(self) -> None:
        """No more failures."""
        self._faults.clear()

    def environment(self, token: str | None = None, home: Path | None = None) -> dict[str, str]:
        """The whole environment of a subprocess whose Hub this is, with an empty cache below `home`."""
        ours = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        ours |= {"HF_ENDPOINT": self.url, "HF_HOME": str(home or self._home()), "HF_HUB_DISABLE_TELEMETRY": "1"}
        ours |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", **({} if self.xet else {"HF_HUB_DISABLE_XET": "1"})}
        return ours | ({"HF_TOKEN": token} if token else {})

    @contextlib.contextmanager
    def used(self, token: str | None = None, home: Path | None = None, offline: bool = False) -> Iterator[Path]:
        """In this process every client uses the double, this token and an empty cache; yields the cache's home."""
        from huggingface_hub import close_session, constants, hf_api
        from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

        home = home or self._home()
        values = {
            "ENDPOINT": self.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": self.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_XET_CACHE": str(home / "xet"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_STORED_TOKENS_PATH": str(home / "stored_tokens"),
            "HF_HUB_DISABLE_XET": not self.xet,
            "HF_HUB_DISABLE_TELEMETRY": True,
            "HF_HUB_OFFLINE": offline,
        }
        with contextlib.ExitStack() as stack:
            for name, value in values.items():
                stack.enter_context(mock.patch.object(constants, name, value))
            stack.enter_context(mock.patch.object(hf_api.api, "endpoint", self.url))
            stack.enter_context(mock.patch.dict(os.environ, self.environment(token, home), clear=True))
            stack.callback(close_session)
            if not are_progress_bars_disabled():
                disable_progress_bars()
                stack.callback(enable_progress_bars)
            stack.enter_context(warnings.catch_warnings())
            # huggingface_hub 2.4 uploads large files in a way that its own HTTP client has deprecated
            warnings.filterwarnings("ignore", "Use 'content=", DeprecationWarning)
            yield home

    def _home(self) -> Path:
        number = len(list(self.folder.glob("home-*")))
        home = self.folder / f"home-{number}"
        home.mkdir(parents=True)
        return home

    # --- the server

    def __enter__(self) -> "HubDouble":
        self.folder.mkdir(parents=True, exist_ok=True)
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else every answer comes 40 ms late
        self.port = self._socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(
            self._app, interface="asgi3", http=self._protocol(), log_level="critical", lifespan="off", ws="none"
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._server.force_exit = True
        self._thread.join(10)
        self._socket.close()
        if self.errors:
            raise self.errors[0]

    def _protocol(self) -> type[H11Protocol]:
        """uvicorn's protocol, with the connections kept so that they can be cut."""
        transports = self._transports

        class Cuttable(H11Protocol):
            def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
                transports[transport.get_extra_info("peername")] = transport
                super().connection_made(transport)

            def connection_lost(self, exc: Exception | None) -> None:
                transports.pop(self.transport.get_extra_info("peername"), None)
                super().connection_lost(exc)

        return Cuttable

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await self._exchange(scope, receive, send)
        except _GoneError:
            return
        except Exception as error:
            self.errors.append(error)
            raise

    async def _exchange(self, scope: Any, receive: Any, send: Any) -> None:
        method, path = scope["method"], scope["raw_path"].decode().split("?")[0]
        headers = {key.decode().lower(): value.decode("latin-1") for key, value in scope["headers"]}
        fault = self._next_fault(f"{method} {path}")
        has_body = int(headers.get("content-length", 0)) > 0 or "transfer-encoding" in headers
        if fault and fault.status == "cut" and has_body:
            await receive()
            return self._cut(scope, method, path, headers, "cut")
        body = await _whole_body(receive)
        if fault and isinstance(fault.status, int):
            reply = Reply({"error": "made failure"}, fault.status, fault.headers)
        else:
            reply = self._answer(method, path, scope["query_string"].decode(), headers, body)
        if fault and fault.status in ("cut", "lost"):
            if fault.status == "cut":
                await _half(reply, send)
            return self._cut(scope, method, path, headers, fault.status)
        self.requests.append(Seen(method, path, reply.status, _name(headers)))
        await _response(reply)(scope, receive, send)

    def _answer(self, method: str, path: str, query: str, headers: dict[str, str], body: bytes) -> Reply:
        def call(parts: dict[str, str]) -> Call:
            return Call(
                method=method,
                parts=parts,
                query=parse_qs(query, keep_blank_values=True),
                headers=headers,
                body=body,
                caller=Caller.of(headers.get("authorization", "")),
                store=self.store,
                url=self.url,
                storage_url=f"http://localhost:{self.port}",
                cas_url=f"local://{self.folder / 'cas'}" if self.xet else None,
            )

        return answer(method, path, call)

    def _next_fault(self, request: str) -> Fault | None:
        for fault in self._faults:
            if fault.times > 0 and fault.when(request):
                fault.times -= 1
                return fault
        return None

    def _cut(self, scope: Any, method: str, path: str, headers: dict[str, str], how: str) -> None:
        self.requests.append(Seen(method, path, how, _name(headers)))
        self._transports[tuple(scope["client"])].close()  # what was written before is still sent


class _GoneError(Exception):
    """The client has gone in the middle of its request."""


async def _whole_body(receive: Any) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _GoneError
        body, more = body + message.get("body", b""), message.get("more_body", False)
    return body


def _response(reply: Reply) -> Response:
    if isinstance(reply.body, bytes):
        return Response(reply.body, reply.status, reply.headers, "application/octet-stream")
    return JSONResponse(reply.body, reply.status, reply.headers)


async def _half(reply: Reply, send: Any) -> None:
    """Sends the head of an answer and the first half of its body."""
    whole = _response(reply)
    await send({"type": "http.response.start", "status": whole.status_code, "headers": whole.raw_headers})
    await send({"type": "http.response.body", "body": whole.body[: len(whole.body) // 2], "more_body": True})


def _name(headers: dict[str, str]) -> str:
    try:
        return Caller.of(headers.get("authorization", "")).name
    except HubError:
        return "unknown"
