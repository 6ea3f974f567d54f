"""One question to a language model, what came of it and what it cost, as values."""

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

__all__ = ["SLOT", "Admit", "Message", "OnReplies", "Prices", "Reply", "Request", "Usage"]

SLOT = "␣?␣"
"""Stands in the prompt of a request with `choices` wherever one of them is to be judged."""


class Message(NamedTuple):
    """One turn of a chat."""

    role: str
    content: str


class Request(NamedTuple):
    """One question; a local completion model takes exactly one user message, whose content is the raw prompt."""

    messages: tuple[Message, ...]
    max_tokens: int
    temperature: float = 0.0
    stop: tuple[str, ...] = ()
    schema: dict[str, Any] | None = None
    """JSON schema of the answer, None for free text. Endpoints in strict mode want every object of it to be closed:
    `additionalProperties` false and all properties required."""
    choices: tuple[str, ...] = ()
    """Not to be answered but judged: how probable is each choice at every SLOT of the prompt. The value is a list of
    n_slots lists of n_choices probabilities that sum to 1. Only a local backend that was given a judge can."""
    logprobs: bool = False
    """Ask an endpoint for log-probabilities; the answer is the same with or without."""

    def as_json(self) -> dict[str, Any]:
        """The request as JSON values, without `choices` and `logprobs` where they ask for nothing.

        Left out so that requests without them keep the cache keys they had before these fields existed.
        """
        values = self._asdict() | {"messages": [message._asdict() for message in self.messages]}
        unasked = {name for name in ("choices", "logprobs") if not values[name]}
        return {name: value for name, value in values.items() if name not in unasked}


class Reply(NamedTuple):
    """What came of one request."""

    status: str
    """ok, refused, unparsed or failed."""
    value: Any = None
    """The text, or with a schema the decoded JSON value; None unless the status is ok."""
    detail: str = ""
    """Why it is not ok; empty when it is."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float | None = None
    """None when no price is known."""
    cached: bool = False
    """Whether it was known already; its tokens and cost are those of the time it was paid for."""
    raw: str = ""
    """The whole text of an answer that is not ok, so that it can be looked into; empty when it is ok."""
    logprobs: list[list[Any]] | None = None
    """Per generated token `[its text, {alternative's text: its log-probability}]`, itself among them; None where they
    were not asked for or the server gives none."""

    def as_json(self) -> dict[str, Any]:
        """What is worth keeping of it, as JSON values."""
        unsaid = {"cached"} if self.logprobs is not None else {"cached", "logprobs"}
        return {name: value for name, value in self._asdict().items() if name not in unsaid}


OnReplies = Callable[[list[tuple[int, Reply]]], None]
"""Is told `[(i, reply), ...]` as replies are known."""
Admit = Callable[[list[int]], bool]
"""Whether the requests i may be sent now; once it said yes, they must be."""


class Prices(NamedTuple):
    """What a million tokens cost, in USD; None where nobody said."""

    prompt: float | None = None
    completion: float | None = None

    @property
    def known(self) -> bool:
        """Whether both prices are."""
        return None not in self

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float | None:
        """What so many tokens cost, in USD; None unless both prices are known."""
        if self.prompt is None or self.completion is None:
            return None
        return (prompt_tokens * self.prompt + completion_tokens * self.completion) / 1e6


@dataclass
class Usage:
    """What was asked and spent; cached answers count in `cached` and `by_status` and cost nothing again."""

    calls: int = 0
    unbilled: int = 0
    """Calls, among those, that came back without a count of tokens: failed, or turned down by a provider's filter, and
    billed nothing as far as is known."""
    cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float | None = 0.0
    """None once an answer without a known price was paid for."""
    by_status: Counter[str] = field(default_factory=Counter)

    def add_call(self, reply: Reply) -> None:
        """Counts what a call that was sent has cost."""
        billed = reply.prompt_tokens + reply.completion_tokens > 0
        self.calls += 1
        self.unbilled += not billed
        self.prompt_tokens += reply.prompt_tokens
        self.completion_tokens += reply.completion_tokens
        if reply.cost_usd is not None and self.cost_usd is not None:
            self.cost_usd += reply.cost_usd
        elif billed or reply.status != "failed":
            self.cost_usd = None

    def add_reply(self, reply: Reply) -> None:
        """Counts a reply that is handed out."""
        self.cached += reply.cached
        self.by_status[reply.status] += 1

    def summary(self) -> dict[str, Any]:
        """The totals as JSON values, for a stage's record."""
        return asdict(self) | {"by_status": dict(self.by_status)}
