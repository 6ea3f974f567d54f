"""A row of preference data, in whichever form it comes, as one prompt and two answers.

Three forms are read: a `prompt` with two answers; two whole conversations as lists of {role, content}; two whole
conversations as texts whose turns begin with "Human:" and "Assistant:" (the form of hh-rlhf). A list that begins with
the assistant's message continues the row's `prompt`; any other list is a whole conversation, of which the prompt is a
part. Turns of one role that follow each other are read as one.

The sides may differ in the last message alone, and that message is the assistant's: the answer. Where they part
earlier there is no one prompt, and the row is left out.
"""

import re
from typing import Any, NamedTuple

from safesail.lm.tokens import ROLES

__all__ = ["Fault", "Pair", "pair_of"]

Message = dict[str, str]
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
_ROLE = {"Human": "user", "Assistant": "assistant"}


class Pair(NamedTuple):
    """What a row says."""

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str


class Fault(Exception):
    """Why a row is no pair, as the end of a sentence that begins with the row."""

    def __init__(self, reason: str, *, expected: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.expected = expected
        """Whether sound data has such rows too, so that they are left out without being asked for."""


def pair_of(row: dict[str, Any]) -> Pair:
    """The prompt and answers of a row; Fault where there are none."""
    prompt = _prompt(row.get("prompt"))
    chosen, rejected = (_conversation(prompt, row.get(side)) for side in ("chosen", "rejected"))
    answers = [_answer(messages) for messages in (chosen, rejected)]
    if not all(answer.strip() for answer in answers):
        raise Fault("has an empty side")
    if chosen[:-1] != rejected[:-1]:
        raise Fault("has sides that part before the last answer", expected=True)
    if answers[0].strip() == answers[1].strip():
        raise Fault("has two equal sides")
    if not any(message["content"].strip() for message in chosen[:-1]):
        raise Fault("has no prompt")
    return Pair(tuple(chosen[:-1]), *answers)


def _prompt(value: Any) -> list[Message]:
    if value is None:
        return []
    return [{"role": "user", "content": value}] if isinstance(value, str) else _messages(value)


def _conversation(prompt: list[Message], side: Any) -> list[Message]:
    """All messages of one side."""
    if side is None or side == []:
        raise Fault("lacks a side")
    if isinstance(side, str):
        return [*prompt, {"role": "assistant", "content": side}] if prompt else _turns(side)
    messages = _messages(side)
    return [*prompt, *messages] if messages[0]["role"] == "assistant" else messages


def _messages(value: Any) -> list[Message]:
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise Fault("has neither texts nor lists of {role, content}")
    messages = []
    for message in value:
        role, content = message.get("role"), message.get("content") or ""
        if role not in ROLES[1:]:
            raise Fault(f"has a message of the role {role!r} (roles are {', '.join(ROLES[1:])})")
        if not isinstance(content, str):
            raise Fault("has a message whose content is no text")
        messages.append({"role": role, "content": content})
    return messages


def _turns(text: str) -> list[Message]:
    """The messages of a text in the form of hh-rlhf."""
    if not text.strip():
        raise Fault("has an empty side")
    before, *parts = _TURN.split(text)
    if before.strip() or not parts:
        raise Fault('has no prompt, and its sides are no conversations that begin with "Human:"')
    messages: list[Message] = []
    for who, said in zip(parts[::2], parts[1::2], strict=True):
        role, content = _ROLE[who], said.strip()
        if messages and messages[-1]["role"] == role:
            content = f"{messages.pop()['content']}\n\n{content}".strip()
        messages.append({"role": role, "content": content})
    return messages


def _answer(messages: list[Message]) -> str:
    if messages[-1]["role"] != "assistant":
        raise Fault("has a side that does not end with the assistant's answer")
    return messages[-1]["content"]
