"""One question to a language model and what came of it, as values."""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

__all__ = ["Message", "Reply", "Request", "Usage"]


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


@dataclass
class Usage:
    """What was asked and spent; cached answers count in `cached` and `by_status` and cost nothing again."""

    calls: int = 0
    cached: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float | None = 0.0
    """None once an answer without a known price was paid for."""
    by_status: Counter[str] = field(default_factory=Counter)

    def add_call(self, reply: Reply) -> None:
        """Counts what a call that was sent has cost."""
        self.calls += 1
        self.prompt_tokens += reply.prompt_tokens
        self.completion_tokens += reply.completion_tokens
        if reply.cost_usd is not None and self.cost_usd is not None:
            self.cost_usd += reply.cost_usd
        elif reply.status != "failed":
            self.cost_usd = None

    def add_reply(self, reply: Reply) -> None:
        """Counts a reply that is handed out."""
        self.cached += reply.cached
        self.by_status[reply.status] += 1

    def summary(self) -> dict[str, Any]:
        """The totals as JSON values, for a stage's record."""
        return asdict(self) | {"by_status": dict(self.by_status)}
