"""The one door to language models: whoever asks gets one `Reply` per `Request`, with a status, and what it cost.

    llm = Llm(EndpointBackend("gpt-x", "https://api.openai.com/v1"), cache=run / "scratch" / "answers.sqlite")
    [reply] = llm.ask([Request((Message("user", "Explain ..."),), max_tokens=200)])
    if reply.status == "ok": use(reply.value)

Statuses: *ok* (a text, or a value that fits the schema), *refused* (the model or the provider's filter declined),
*unparsed* (an answer that is not what was asked for), *failed* (no answer: network, time-out, server error). All but
*failed* are kept in the cache, so that asking again sends only what is missing.

What this does not do: choose prompts, split work, or limit spending; `Llm.usage` says what was spent.
"""

import asyncio
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from safesail.errors import InputError
from safesail.interpretation.answers import judge
from safesail.interpretation.cache import AnswerCache, answer_key
from safesail.interpretation.dialect import Complaint, Dialect, adapted, chat_body, is_about_content
from safesail.interpretation.exchange import Message, Reply, Request, Usage

if TYPE_CHECKING:
    import openai

__all__ = ["Backend", "EndpointBackend", "Llm", "LocalBackend", "Message", "Reply", "Request", "Usage"]


OnReplies = Callable[[list[tuple[int, Reply]]], None]


class Backend(Protocol):
    """Whoever answers requests."""

    name: str
    """The explainer's or simulator's name in rows, as `openai:gpt-x`."""

    def identity(self) -> dict[str, Any]:
        """What the answer depends on besides the request (JSON values; no key, no address)."""
        ...

    def answer(self, requests: Sequence[Request], on_replies: OnReplies) -> None:
        """Calls `on_replies([(i, reply), ...])` as replies are known, one call at a time, each request once.

        The replies of one call are kept together or not at all, also when the process is killed.
        """
        ...


class Llm:
    """Asks a backend through a cache and counts what it costs.

    `parse(request, value)` turns an ok value into what the caller works with; when it raises ValueError the reply is
    unparsed. The cache keeps what the model said, so a better `parse` is applied without paying again.
    """

    def __init__(self, backend: Backend, cache: Path | None, parse: Callable[[Request, Any], Any] | None = None):
        self.backend = backend
        self.cache = cache
        self.usage = Usage()
        self._parse = parse

    def ask(self, requests: Sequence[Request], *, progress: Callable[[int], object] | None = None) -> list[Reply]:
        """One reply per request, in their order; equal requests are sent once.

        `progress(n)` is told of n more replies (the way a progress bar's `update` wants it), after they were kept.
        """
        identity = self.backend.identity()
        places: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            places.setdefault(answer_key(identity, _as_json(request)), []).append(place)
        replies: dict[int, Reply] = {}

        def hand_out(key: str, reply: Reply) -> None:
            for place in places[key]:
                replies[place] = self._parsed(requests[place], reply)
                self.usage.add_reply(replies[place])
                reply = reply._replace(cached=reply.status != "failed")  # its equals were not paid for
            if progress is not None:
                progress(len(places[key]))

        with AnswerCache(self.cache) as cache:
            missing = []
            for key in places:
                kept = cache.get(key)
                missing.append(key) if kept is None else hand_out(key, Reply(**kept, cached=True))

            def on_replies(known: list[tuple[int, Reply]]) -> None:
                cache.put({missing[i]: _as_answer(reply) for i, reply in known if reply.status != "failed"})
                for i, reply in known:
                    self.usage.add_call(reply)
                    hand_out(missing[i], reply)

            if missing:
                self.backend.answer([requests[places[key][0]] for key in missing], on_replies)
        assert len(replies) == len(requests), f"{self.backend.name} left {len(requests) - len(replies)} unanswered"
        return [replies[place] for place in range(len(requests))]

    def _parsed(self, request: Request, reply: Reply) -> Reply:
        if self._parse is None or reply.status != "ok":
            return reply
        try:
            return reply._replace(value=self._parse(request, reply.value))
        except ValueError as problem:
            raw = reply.value if isinstance(reply.value, str) else json.dumps(reply.value, ensure_ascii=False)
            return reply._replace(status="unparsed", value=None, detail=str(problem), raw=raw)


def _as_json(request: Request) -> dict[str, Any]:
    return request._asdict() | {"messages": [message._asdict() for message in request.messages]}


def _as_answer(reply: Reply) -> dict[str, Any]:
    return {name: value for name, value in reply._asdict().items() if name != "cached"}


def _judged(text: str, schema: dict[str, Any] | None, truncated: bool = False, **usage: Any) -> Reply:
    status, value, detail = judge(text, schema, truncated)
    return Reply(status, value, detail, raw="" if status == "ok" else text, **usage)


class LocalBackend:
    """Answers in this process: `generate(prompts, max_tokens, stop) -> [(text, n_prompt_tokens, n_completion_tokens)]`.

    Decoding is greedy and free of charge. An answer that runs on to max_tokens after its JSON is complete is ok: a base
    model seldom stops by itself.
    """

    def __init__(
        self,
        generate: Callable[[list[str], int, tuple[str, ...]], list[tuple[str, int, int]]],
        name: str,
        identity: dict[str, Any],
        batch_size: int,
    ):
        if batch_size < 1:
            raise InputError(f"the local language model's batch size is {batch_size}; give 1 or more")
        self.name = name
        self._generate = generate
        self._identity = identity
        self._batch_size = batch_size

    def __repr__(self) -> str:
        return f"LocalBackend({self.name!r})"

    def identity(self) -> dict[str, Any]:
        """The identity that was given."""
        return {"kind": "local", **self._identity}

    def answer(self, requests: Sequence[Request], on_replies: OnReplies) -> None:
        """Generates in batches of equal `max_tokens` and `stop`, in the order of the requests.

        A text's last bits can depend on the batch it was generated in, so a batch's replies are kept together: work
        that was interrupted goes on with the same batches, and ends with the same bytes.
        """
        prompts = [self._prompt(request) for request in requests]
        for batch in self._batches(requests):
            first = requests[batch[0]]
            texts = self._generate([prompts[i] for i in batch], first.max_tokens, first.stop)
            known = []
            for i, (text, n_prompt, n_completion) in zip(batch, texts, strict=True):
                usage = {"prompt_tokens": n_prompt, "completion_tokens": n_completion, "cost_usd": 0.0}
                known.append((i, _judged(text, requests[i].schema, **usage)))
            on_replies(known)

    def _prompt(self, request: Request) -> str:
        assert [message.role for message in request.messages] == ["user"], "a local model takes one user message"
        if request.temperature != 0.0:
            raise InputError(
                f"temperature {request.temperature} was asked of {self.name}, which is greedy; set it to 0"
            )
        return request.messages[0].content

    def _batches(self, requests: Sequence[Request]) -> Iterator[list[int]]:
        groups: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for i, request in enumerate(requests):
            groups.setdefault((request.max_tokens, request.stop), []).append(i)
        for group in groups.values():
            for start in range(0, len(group), self._batch_size):
                yield group[start : start + self._batch_size]


class EndpointBackend:
    """Answers by an OpenAI-compatible chat endpoint, `concurrency` calls at a time.

    Retries are the SDK's (429, 5xx, time-outs; Retry-After is honoured). What no other request could survive, such as a
    refused key, stops the whole work with InputError; the answers known by then have been handed out.
    """

    def __init__(
        self,
        model: str,
        base_url: str,
        api_key_env: str = "OPENAI_API_KEY",
        concurrency: int = 8,
        timeout_seconds: float = 120,
        max_retries: int = 4,
        usd_per_million_prompt_tokens: float | None = None,
        usd_per_million_completion_tokens: float | None = None,
    ):
        address = urlsplit(base_url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise InputError(f"base_url {base_url!r} is no address; give one such as https://api.openai.com/v1")
        if concurrency < 1:
            raise InputError(f"concurrency is {concurrency}; give 1 or more")
        self.name = f"openai:{model}"
        self._model = model
        self._base_url = base_url
        self._host = address.hostname
        self._api_key_env = api_key_env
        self._key = _key(api_key_env, self._host)
        self._concurrency = concurrency
        self._timeout_seconds = timeout_seconds
        self._max_retries = max_retries
        self._prices = (usd_per_million_prompt_tokens, usd_per_million_completion_tokens)
        self._dialect = Dialect()

    def __repr__(self) -> str:
        return f"EndpointBackend({self._model!r} at {self._host})"

    def identity(self) -> dict[str, Any]:
        """The model's name: the same model may be reached at several addresses."""
        return {"kind": "endpoint", "model": self._model}

    def answer(self, requests: Sequence[Request], on_replies: OnReplies) -> None:
        """Asks until every request has its reply."""
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            asyncio.run(self._answer(requests, on_replies))
        else:  # a notebook: its loop runs in this thread, so ours needs another
            with ThreadPoolExecutor(1) as thread:
                thread.submit(asyncio.run, self._answer(requests, on_replies)).result()

    async def _answer(self, requests: Sequence[Request], on_replies: OnReplies) -> None:
        waiting = iter(enumerate(requests))  # shared: the workers are the limit on concurrency
        try:
            async with self._client() as client, asyncio.TaskGroup() as workers:
                for _ in range(min(self._concurrency, len(requests))):
                    workers.create_task(self._work(client, waiting, on_replies))
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None

    def _client(self) -> "openai.AsyncOpenAI":
        import openai

        return openai.AsyncOpenAI(
            api_key=self._key or "none",
            base_url=self._base_url,
            timeout=self._timeout_seconds,
            max_retries=self._max_retries,
            # a proxy from the environment cannot reach this machine's own servers
            http_client=openai.DefaultAsyncHttpxClient(trust_env=False) if _is_loopback(self._host) else None,
        )

    async def _work(
        self,
        client: "openai.AsyncOpenAI",
        waiting: Iterable[tuple[int, Request]],
        on_replies: OnReplies,
    ) -> None:
        for i, request in waiting:
            on_replies([(i, await self._reply(client, request))])

    async def _reply(self, client: "openai.AsyncOpenAI", request: Request) -> Reply:
        import openai

        while True:
            dialect = self._dialect
            try:
                completion = await client.chat.completions.create(**chat_body(self._model, request, dialect))
                return self._read(completion, request)
            except openai.APIStatusError as error:
                reply = self._reply_to(error, dialect, request)
                if reply is not None:
                    return reply
            except (openai.OpenAIError, ValueError) as error:  # ValueError: what the server sent is not JSON
                return Reply("failed", detail=self._told(error))

    def _reply_to(self, error: "openai.APIStatusError", dialect: Dialect, request: Request) -> Reply | None:
        """What a server's error means for the request; None to ask again in another dialect."""
        complaint = Complaint(error.status_code, error.code, error.param, f"{error.code} {error.param} {error.message}")
        if is_about_content(complaint):
            cost = None if None in self._prices else 0.0
            return Reply("refused", detail=self._told(error)[:200], cost_usd=cost)
        self._stop_if_hopeless(complaint)
        learnt = adapted(dialect, complaint, request.schema is not None)
        if learnt is None:
            return Reply("failed", detail=self._told(error))
        if self._dialect == dialect:  # another worker may have learnt it first
            self._dialect = learnt
        return None

    def _read(self, completion: Any, request: Request) -> Reply:
        """The reply that a server's answer means; servers answer 200 with an error page or without choices too."""
        choices = getattr(completion, "choices", None) or []
        message = choices[0].message if choices else None
        if message is None:
            return Reply("failed", detail=f"{self._host} answered without a message")
        usage = self._usage(completion)
        text = message.content if isinstance(message.content, str) else ""
        if message.refusal or choices[0].finish_reason == "content_filter":
            why = (message.refusal or text or "the provider's content filter stopped the answer")[:200]
            return Reply("refused", detail=why, raw=message.refusal or text, **usage)
        return _judged(text, request.schema, choices[0].finish_reason == "length", **usage)

    def _usage(self, completion: Any) -> dict[str, Any]:
        used = completion.usage
        counts = (used.prompt_tokens or 0, used.completion_tokens or 0) if used else (0, 0)
        known = used and None not in self._prices
        cost = sum(n * usd for n, usd in zip(counts, self._prices, strict=True) if usd) / 1e6 if known else None
        return {"prompt_tokens": counts[0], "completion_tokens": counts[1], "cost_usd": cost}

    def _told(self, error: Exception) -> str:
        """The error's class and message; some servers repeat the key they were given."""
        message = str(error).replace(self._key, "***") if self._key else str(error)
        return f"{type(error).__name__}: {message}"[:300]

    def _stop_if_hopeless(self, complaint: Complaint) -> None:
        """Raises InputError for what would meet every other request as well."""
        said, again = f"{self._host} answered HTTP {complaint.status_code}", "and run the same command again"
        if complaint.status_code in (401, 403):
            mend = f"set a valid key with `export {self._api_key_env}=...` {again}"
            raise InputError(f"{said}: it does not accept the key in {self._api_key_env}; {mend}") from None
        if complaint.status_code == 402 or complaint.code == "insufficient_quota":
            raise InputError(f"{said}: the account has no credit left; top it up {again}") from None
        if complaint.status_code == 404:
            raise InputError(f"{said}: it has no model {self._model!r} there; mend model or base_url {again}") from None


def _is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or host.startswith("127.")


def _key(variable: str, host: str) -> str:
    """The key in the environment variable; only a server on this machine may go without."""
    key = os.environ.get(variable, "").strip()
    if not key and not _is_loopback(host):
        raise InputError(
            f"no key for {host}: the environment variable {variable} is not set; type `export {variable}=...`"
        )
    return key
