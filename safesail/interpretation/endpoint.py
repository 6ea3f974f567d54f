"""OpenAI-compatible chat endpoints: the only module that talks to the openai package."""

import asyncio
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from safesail.errors import InputError
from safesail.interpretation.answers import judged
from safesail.interpretation.dialect import Complaint, Dialect, adapted, chat_body, is_about_content
from safesail.interpretation.exchange import Admit, OnReplies, Prices, Reply, Request
from safesail.interpretation.turns import Turns

if TYPE_CHECKING:
    import openai

__all__ = ["EndpointBackend"]


class EndpointBackend:
    """Answers by an OpenAI-compatible chat endpoint, `concurrency` calls at a time.

    base_url: None for the variable OPENAI_BASE_URL or else OpenAI's own.

    Retries are the SDK's (429, 5xx, time-outs; Retry-After is honoured). What no other request could survive, such as a
    refused key, stops the whole work with InputError; the calls in flight end first, and their answers are handed out.
    """

    def __init__(
        self,
        model: str,
        base_url: str | None,
        api_key_env: str = "OPENAI_API_KEY",
        concurrency: int = 8,
        timeout_seconds: float = 120,
        max_retries: int = 4,
        usd_per_million_prompt_tokens: float | None = None,
        usd_per_million_completion_tokens: float | None = None,
    ):
        base_url = base_url or os.environ.get("OPENAI_BASE_URL") or "https://api.openai.com/v1"
        address = urlsplit(base_url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise InputError(f"base_url {base_url!r} is no address; give one such as https://api.openai.com/v1")
        if concurrency < 1:
            raise InputError(f"concurrency is {concurrency}; give 1 or more")
        self.name = f"openai:{model}"
        self.prices = Prices(usd_per_million_prompt_tokens, usd_per_million_completion_tokens)
        self._model = model
        self._base_url = base_url
        self._host = address.hostname
        self._api_key_env = api_key_env
        self._key = _key(api_key_env, self._host)
        self._concurrency = concurrency
        self._timeout_seconds = timeout_seconds
        self._max_retries = max_retries
        self._dialect = Dialect()

    def __repr__(self) -> str:
        return f"EndpointBackend({self._model!r} at {self._host})"

    def identity(self) -> dict[str, Any]:
        """The model's name: the same model may be reached at several addresses."""
        return {"kind": "endpoint", "model": self._model}

    def answer(self, requests: Sequence[Request], on_replies: OnReplies, admit: Admit) -> None:
        """Asks until every request has its reply, or `admit` lets no further one through."""
        if any(request.choices for request in requests):
            raise InputError(
                f"{self.name} is an endpoint, which gives no probabilities of choices; "
                'use a local model (backend = "local"), or ask for text'
            )
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            asyncio.run(self._answer(requests, on_replies, admit))
        else:  # a notebook: its loop runs in this thread, so ours needs another
            with ThreadPoolExecutor(1) as thread:
                thread.submit(asyncio.run, self._answer(requests, on_replies, admit)).result()

    async def _answer(self, requests: Sequence[Request], on_replies: OnReplies, admit: Admit) -> None:
        turns = Turns(len(requests), admit)

        async def work(client: "openai.AsyncOpenAI") -> None:
            while (i := await turns.take()) is not None:
                async with turns.ending():
                    on_replies([(i, await self._reply(client, requests[i]))])

        async with self._client() as client:
            await asyncio.gather(*(work(client) for _ in range(min(self._concurrency, len(requests)))))
        if turns.error is not None:
            raise turns.error

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
            cost = 0.0 if self.prices.known else None
            return Reply("refused", detail=self._told(error)[:200], cost_usd=cost)
        learnt = adapted(dialect, complaint, request)
        if learnt is None:
            self._stop_if_hopeless(complaint)
            return Reply("failed", detail=self._told(error))
        if self._dialect == dialect:  # another worker may have learnt it first
            self._dialect = learnt
        return None

    def _read(self, completion: Any, request: Request) -> Reply:
        """The reply that a server's answer means; servers answer 200 with an error page or without choices too."""
        choices = getattr(completion, "choices", None) or []
        message = choices[0].message if choices else None
        used = self._usage(completion)
        if message is None:
            return Reply("failed", detail=f"{self._host} answered without a message", **used)
        text = self._masked(message.content) if isinstance(message.content, str) else ""
        if message.refusal or choices[0].finish_reason == "content_filter":
            said = self._masked(message.refusal) if message.refusal else text
            why = (said or "the provider's content filter stopped the answer")[:200]
            return Reply("refused", detail=why, raw=said, **used)
        logprobs = _logprobs(choices[0]) if request.logprobs else None
        return judged(text, request.schema, choices[0].finish_reason == "length", logprobs=logprobs, **used)

    def _usage(self, completion: Any) -> dict[str, Any]:
        used = getattr(completion, "usage", None)
        counts = (used.prompt_tokens or 0, used.completion_tokens or 0) if used else (0, 0)
        cost = self.prices.cost(*counts) if used else None
        return {"prompt_tokens": counts[0], "completion_tokens": counts[1], "cost_usd": cost}

    def _told(self, error: Exception) -> str:
        """The error's class and message."""
        return f"{type(error).__name__}: {self._masked(str(error))}"[:300]

    def _masked(self, text: str) -> str:
        """The text without the key: some servers repeat what they were given."""
        return text.replace(self._key, "***") if self._key else text

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


def _logprobs(choice: Any) -> list[list[Any]] | None:
    """Per generated token its text and its alternatives' log-probabilities; None when the server gave none."""
    tokens = getattr(getattr(choice, "logprobs", None), "content", None)
    if not tokens:
        return None
    found = []
    for token in tokens:
        alternatives = {}
        for other in [*(token.top_logprobs or ()), token]:
            alternatives.setdefault(other.token, other.logprob)  # the likeliest of those that read alike comes first
        found.append([token.token, alternatives])
    return found


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
