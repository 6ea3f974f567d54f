"""How OpenAI-compatible servers differ in what they want to be asked, learnt from what they complain of."""

import json
import re
from typing import Any, NamedTuple

from safesail.interpretation.exchange import Request

__all__ = ["Complaint", "Dialect", "adapted", "chat_body", "is_about_content"]


class Dialect(NamedTuple):
    """How an OpenAI-compatible server wants to be asked; it starts with the most that can be hoped for."""

    answer_format: str = "json_schema"
    """json_schema; json_object with a schema beside it (llama.cpp), or with the schema in words; text likewise."""
    limit: str = "max_tokens"
    left_out: frozenset[str] = frozenset()


class Complaint(NamedTuple):
    """What a server says is wrong with a request."""

    status_code: int
    code: str | None
    parameter: str | None
    text: str


_N_ALTERNATIVES = 10
_WEAKER_FORMAT = {
    "json_schema": "json_object_with_schema",
    "json_object_with_schema": "json_object",
    "json_object": "text",
}
_ABOUT_FORMAT = re.compile(
    r"response_format|json_schema|json_object|json mode|\bschema\b|structured|guided|grammar", re.IGNORECASE
)
_ABOUT_CONTENT = re.compile(
    r"content.?filter|content.?(?:management.?)?policy|moderation|flagged|data.?inspection|inappropriate content",
    re.IGNORECASE,
)


def is_about_content(complaint: Complaint) -> bool:
    """Whether a provider's filter turned the prompt down: a refusal that comes as an error."""
    return complaint.status_code in (400, 403, 422) and _ABOUT_CONTENT.search(complaint.text) is not None


def adapted(dialect: Dialect, complaint: Complaint, request: Request) -> Dialect | None:
    """The dialect to try after a server's complaint about the one that was used, None when it complains of another."""
    if _is_about_logprobs(complaint) and request.logprobs and "logprobs" not in dialect.left_out:
        return dialect._replace(left_out=dialect.left_out | {"logprobs", "top_logprobs"})
    if complaint.status_code not in (400, 422, 500):
        return None
    if dialect.limit == "max_tokens" and "max_completion_tokens" in complaint.text:
        return dialect._replace(limit="max_completion_tokens")
    if complaint.parameter in {"temperature", "stop"} - dialect.left_out:  # reasoning models take neither
        return dialect._replace(left_out=dialect.left_out | {complaint.parameter})
    if request.schema is not None and dialect.answer_format != "text" and _ABOUT_FORMAT.search(complaint.text):
        return dialect._replace(answer_format=_WEAKER_FORMAT[dialect.answer_format])
    return None


def _is_about_logprobs(complaint: Complaint) -> bool:
    return complaint.status_code in (400, 403, 422, 500) and "logprobs" in complaint.text


def chat_body(model: str, request: Request, dialect: Dialect) -> dict[str, Any]:
    """The arguments of a chat completion."""
    messages = [message._asdict() for message in request.messages]
    options: dict[str, Any] = {"temperature": request.temperature, dialect.limit: request.max_tokens}
    if request.logprobs:
        options |= {"logprobs": True, "top_logprobs": _N_ALTERNATIVES}
    if request.stop:
        options["stop"] = list(request.stop)
    if request.schema is not None:
        if dialect.answer_format == "json_schema":
            asked = {"name": "answer", "schema": request.schema, "strict": True}
            options["response_format"] = {"type": "json_schema", "json_schema": asked}
        elif dialect.answer_format == "json_object_with_schema":
            options["response_format"] = {"type": "json_object", "schema": request.schema}
        else:
            schema = json.dumps(request.schema, ensure_ascii=False)
            messages[-1]["content"] += f"\n\nAnswer only with JSON that is valid against this JSON schema:\n{schema}"
        if dialect.answer_format == "json_object":
            options["response_format"] = {"type": "json_object"}
    kept = {name: value for name, value in options.items() if name not in dialect.left_out}
    return {"model": model, "messages": messages, **kept}
