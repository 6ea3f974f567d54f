"""The one door to language models: whoever asks gets one `Reply` per `Request`, with a status, and what it cost.

    llm = Llm(EndpointBackend("gpt-x", "https://api.openai.com/v1"), cache=run / "scratch" / "answers.sqlite")
    [reply] = llm.ask([Request((Message("user", "Explain ..."),), max_tokens=200)])
    if reply.status == "ok": use(reply.value)

Statuses: *ok* (a text, or a value that fits the schema), *refused* (the model or the provider's filter declined),
*unparsed* (an answer that is not what was asked for), *failed* (no answer: network, time-out, server error). All but
*failed* are kept in the cache, so that asking again sends only what is missing.

What this does not do: choose prompts or split work. `Llm.usage` says what was spent, a `Budget` limits it.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from safesail.interpretation.budget import Budget, BudgetReached, Gate
from safesail.interpretation.cache import AnswerCache, answer_key
from safesail.interpretation.endpoint import EndpointBackend
from safesail.interpretation.exchange import SLOT, Admit, Message, OnReplies, Prices, Reply, Request, Usage
from safesail.interpretation.local import LocalBackend

__all__ = [
    "SLOT",
    "Backend",
    "Budget",
    "BudgetReached",
    "EndpointBackend",
    "Llm",
    "LocalBackend",
    "Message",
    "Prices",
    "Reply",
    "Request",
    "Usage",
]


class Backend(Protocol):
    """Whoever answers requests."""

    name: str
    """The explainer's or simulator's name in rows, as `openai:gpt-x`."""
    prices: Prices

    def identity(self) -> dict[str, Any]:
        """What the answer depends on besides the request (JSON values; no key, no address)."""
        ...

    def answer(self, requests: Sequence[Request], on_replies: OnReplies, admit: Admit) -> None:
        """Calls `on_replies([(i, reply), ...])` as replies are known, one call at a time, each request once.

        The replies of one call are kept together or not at all, also when the process is killed. Requests are sent when
        `admit` says so; those that it turns down, with nothing in flight, are left unanswered.
        """
        ...


class Llm:
    """Asks a backend through a cache, counts what it costs, and keeps to a budget.

    `parse(request, value)` turns an ok value into what the caller works with; when it raises ValueError the reply is
    unparsed. The cache keeps what the model said, so a better `parse` is applied without paying again.
    """

    def __init__(
        self,
        backend: Backend,
        cache: Path | None,
        parse: Callable[[Request, Any], Any] | None = None,
        budget: Budget | None = None,
    ):
        self.backend = backend
        self.cache = cache
        self.usage = Usage()
        self._parse = parse
        self._budget = Budget() if budget is None else budget

    def ask(self, requests: Sequence[Request], *, progress: Callable[[int], object] | None = None) -> list[Reply]:
        """One reply per request, in their order; equal requests are sent once.

        `progress(n)` is told of n more replies (the way a progress bar's `update` wants it), after they were kept.
        Raises BudgetReached when the budget does not reach for all; what was answered by then is kept.
        """
        places = self.places(requests)
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
            if missing:
                unique = [requests[places[key][0]] for key in missing]
                gate = Gate(self._budget, self.backend.prices, unique, n_kept=len(places) - len(missing))
                self._send(missing, unique, cache, gate, hand_out)
        assert len(replies) == len(requests), f"{self.backend.name} left {len(requests) - len(replies)} unanswered"
        return [replies[place] for place in range(len(requests))]

    def places(self, requests: Sequence[Request]) -> dict[str, list[int]]:
        """Where each distinct request stands, under the key of its answer in the cache."""
        identity = self.backend.identity()
        places: dict[str, list[int]] = {}
        for place, request in enumerate(requests):
            places.setdefault(answer_key(identity, request.as_json()), []).append(place)
        return places

    def _send(
        self,
        keys: list[str],
        requests: list[Request],
        cache: AnswerCache,
        gate: Gate,
        hand_out: Callable[[str, Reply], None],
    ) -> None:
        """Asks the backend; its replies are counted, kept and handed out as they come."""

        def on_replies(known: list[tuple[int, Reply]]) -> None:
            for i, reply in known:
                self.usage.add_call(reply)
                gate.settle(i, reply)
            cache.put({keys[i]: reply.as_json() for i, reply in known if reply.status != "failed"})
            for i, reply in known:
                hand_out(keys[i], reply)

        with gate:
            self.backend.answer(requests, on_replies, gate.admit)

    def _parsed(self, request: Request, reply: Reply) -> Reply:
        if self._parse is None or reply.status != "ok":
            return reply
        try:
            return reply._replace(value=self._parse(request, reply.value))
        except ValueError as problem:
            raw = reply.value if isinstance(reply.value, str) else json.dumps(reply.value, ensure_ascii=False)
            return reply._replace(status="unparsed", value=None, detail=str(problem), raw=raw)
