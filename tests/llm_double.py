"""An OpenAI-compatible chat endpoint on 127.0.0.1 that answers, or misbehaves, as its script says.

    with LlmDouble(behave=scripted({"first": ["500", "text"]})) as double:
        EndpointBackend("model", double.base_url)

A behaviour is one word: `text` and `json` (what `answer` says of the request), `prose`, `truncated`, `refusal`,
`refusal_field`, `content_filter`, `empty`, `no_choices`, `no_usage`, `html`, `moderated`, `slow`, `timeout` (no answer
until the client hangs up), or an HTTP status such as `429`.

What an answer is billed is `PROMPT_TOKENS` and `COMPLETION_TOKENS`, or what `usage(body, text)` says. With `logprobs`,
a request that asks for log-probabilities gets what `logprobs(text)` gives: [(token, {alternative: logprob}), ...].
"""

import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

__all__ = ["LlmDouble", "prompt_of", "scripted"]

PROMPT_TOKENS, COMPLETION_TOKENS = 10, 3
"""What a billed answer says it used, unless the double is told otherwise."""

REFUSAL = "I will not describe this."

_TEXTS = {
    "prose": "The neuron seems to fire on weapons, I would say.",
    "truncated": '{"score": 3, "why": "it fi',
    "refusal": "I'm sorry, but I can't help with that.",
    "refusal_field": "",
    "content_filter": "",
    "empty": "",
}
_FINISH = {"truncated": "length", "content_filter": "content_filter"}


def prompt_of(body: dict[str, Any]) -> str:
    """The last message of a request."""
    return body["messages"][-1]["content"]


def scripted(script: dict[str, list[str]], otherwise: str = "text") -> Callable[[str, int], str]:
    """The behaviours per prompt, one per attempt; the last one repeats."""

    def behave(prompt: str, attempt: int) -> str:
        words = script.get(prompt, [otherwise])
        return words[min(attempt, len(words) - 1)]

    return behave


class LlmDouble:
    """The running endpoint: `base_url`, the bodies it saw and when, how many answers it billed and their tokens."""

    def __init__(
        self,
        answer: Callable[[dict[str, Any]], str] = lambda body: f"said: {prompt_of(body)}",
        behave: Callable[[str, int], str] = lambda prompt, attempt: "text",
        formats: tuple[str, ...] = ("json_schema", "json_object"),
        schema_beside: bool = False,
        unknown: tuple[str, ...] = (),
        echo_key: bool = False,
        usage: Callable[[dict[str, Any], str], tuple[int, int]] = lambda body, text: (PROMPT_TOKENS, COMPLETION_TOKENS),
        logprobs: Callable[[str], list[tuple[str, dict[str, float]]]] | None = None,
        retry_after_ms: int = 5,
    ):
        self.schema_beside = schema_beside
        self.answer, self.behave, self.formats, self.unknown, self.echo_key = answer, behave, formats, unknown, echo_key
        self.usage, self.logprobs, self.retry_after_ms = usage, logprobs, retry_after_ms
        self.bodies: list[dict[str, Any]] = []
        self.arrived: list[float] = []
        self.keys: set[str] = set()
        self.billed = self.prompt_tokens = self.completion_tokens = 0
        self.most_at_once = 0
        self._open = 0
        self._attempts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        double = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                double._serve(self, body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            request_queue_size = 128

        self._server = Server(("127.0.0.1", 0), Handler)
        self.base_url = f"http://127.0.0.1:{self._server.server_port}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    @property
    def n_requests(self) -> int:
        return len(self.bodies)

    def _serve(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        with self._lock:
            self.bodies.append(body)
            self.arrived.append(time.monotonic())
            self.keys.add(handler.headers.get("Authorization", ""))
            self._open += 1
            self.most_at_once = max(self.most_at_once, self._open)
            attempt = self._attempts[prompt_of(body)]
            self._attempts[prompt_of(body)] += 1
        status, answer = self._complaint(body) or self._act(self.behave(prompt_of(body), attempt), handler, body)
        with self._lock:
            if status == 200 and isinstance(answer, dict) and answer.get("choices"):
                self._bill(body, answer)
            self._open -= 1
        _send(handler, status, answer, self.retry_after_ms)

    def _bill(self, body: dict[str, Any], answer: dict[str, Any]) -> None:
        message = answer["choices"][0]["message"]
        prompt, completion = self.usage(body, message["content"] or message["refusal"] or "")
        self.billed += 1
        self.prompt_tokens += prompt
        self.completion_tokens += completion
        if answer["usage"] is not None:
            answer["usage"] = {
                "prompt_tokens": prompt,
                "completion_tokens": completion,
                "total_tokens": prompt + completion,
            }

    def _complaint(self, body: dict[str, Any]) -> tuple[int, Any] | None:
        """What a server that does not know a part of the request says."""
        wanted = body.get("response_format", {}).get("type")
        if wanted is not None and wanted not in self.formats:
            return 400, _error(f"'response_format.type' {wanted} is not supported")
        if wanted == "json_object" and "schema" in body["response_format"] and not self.schema_beside:
            return 400, _error("Unknown parameter: 'response_format.schema'")
        for name in self.unknown:
            if name in body:
                hint = " Use 'max_completion_tokens' instead." if name == "max_tokens" else ""
                return 400, _error(f"Unsupported parameter: '{name}'.{hint}", param=name)
        return None

    def _act(self, behaviour: str, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> tuple[int, Any]:
        if behaviour.isdigit():
            told = handler.headers["Authorization"] if self.echo_key else "no"
            return int(behaviour), _error(f"status {behaviour}, {told}")
        if behaviour == "moderated":
            told = handler.headers["Authorization"] if self.echo_key else ""
            return 403, _error(f"Your input was flagged {told}", code="content_filter")
        if behaviour == "no_choices":
            return 200, {"error": {"message": "upstream"}}
        if behaviour == "html":
            return 200, "<html>a login page</html>"
        if behaviour == "slow":
            time.sleep(0.6)
        if behaviour == "timeout":
            _wait_for_the_client_to_go(handler)
            return 504, _error("nobody is there to read this")
        completion = _completion(behaviour, _TEXTS.get(behaviour) if behaviour in _TEXTS else self.answer(body))
        if self.logprobs is not None and body.get("logprobs"):
            choice = completion["choices"][0]
            choice["logprobs"] = {"content": [_token(*each) for each in self.logprobs(choice["message"]["content"])]}
        return 200, completion


def _wait_for_the_client_to_go(handler: BaseHTTPRequestHandler) -> None:
    handler.connection.settimeout(60)
    with contextlib.suppress(OSError):  # a client may also reset the connection
        handler.connection.recv(1)


def _token(text: str, alternatives: dict[str, float]) -> dict[str, Any]:
    top = [{"token": token, "logprob": logprob, "bytes": None} for token, logprob in alternatives.items()]
    return {"token": text, "logprob": alternatives.get(text, -9999.0), "bytes": None, "top_logprobs": top}


def _error(message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid", "param": param, "code": code}}


def _completion(behaviour: str, text: str | None) -> dict[str, Any]:
    message = {"role": "assistant", "content": text, "refusal": None}
    if behaviour == "refusal_field":
        message = {"role": "assistant", "content": None, "refusal": REFUSAL}
    return {
        "id": "1",
        "object": "chat.completion",
        "created": 0,
        "model": "double",
        "choices": [{"index": 0, "message": message, "finish_reason": _FINISH.get(behaviour, "stop")}],
        "usage": None if behaviour == "no_usage" else {},  # filled in when it is billed
    }


def _send(handler: BaseHTTPRequestHandler, status: int, answer: Any, retry_after_ms: int) -> None:
    html = isinstance(answer, str)
    payload = answer.encode() if html else json.dumps(answer).encode()
    try:
        handler.send_response(status)
        handler.send_header("Content-Type", "text/html" if html else "application/json")
        handler.send_header("Content-Length", str(len(payload)))
        if status in (429, 500, 503):
            handler.send_header("Retry-After", "0")
            handler.send_header("Retry-After-Ms", str(retry_after_ms))  # the SDK waits half a second for a zero
        handler.end_headers()
        handler.wfile.write(payload)
    except OSError:  # the client gave up waiting
        pass
