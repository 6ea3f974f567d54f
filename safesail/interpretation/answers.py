"""What the text of an answer is: a value that fits the schema, a refusal, or neither.

A text that is not what was asked for never becomes a value: not a number, not a sentence. The schema check knows the
keywords in `KEYWORDS` and refuses a schema that uses another, so that nothing passes because it was not looked at.
"""

import json
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

from safesail.interpretation.exchange import Reply

__all__ = ["KEYWORDS", "Judgement", "decode", "is_refusal", "judge", "judged", "mismatch"]


class Judgement(NamedTuple):
    """The status of one answer, with its value when the status is "ok"."""

    status: str
    """ok, refused or unparsed."""
    value: Any
    detail: str
    """Why it is not ok; empty when it is."""


def judged(text: str, schema: dict[str, Any] | None, truncated: bool = False, **more: Any) -> Reply:
    """The reply that an answer's whole text is; `more` are its tokens, cost and log-probabilities."""
    status, value, detail = judge(text, schema, truncated)
    return Reply(status, value, detail, raw="" if status == "ok" else text, **more)


def judge(text: str, schema: dict[str, Any] | None, truncated: bool = False) -> Judgement:
    """Judges a whole answer; with a schema, one cut at max_tokens (`truncated`) is never ok."""
    answer = _without_thoughts(text)
    if not answer.strip():
        return Judgement("unparsed", None, "the answer is empty" + (" (truncated at max_tokens)" if truncated else ""))
    if schema is None:
        return _refused(answer) if is_refusal(answer) else Judgement("ok", answer, "")
    try:
        if truncated:
            raise ValueError("the answer was truncated at max_tokens")
        return Judgement("ok", decode(answer, schema), "")
    except ValueError as problem:
        return _refused(answer) if is_refusal(answer) else Judgement("unparsed", None, str(problem))


def _refused(answer: str) -> Judgement:
    return Judgement("refused", None, answer.strip()[:200])


# A reasoning model's thoughts may stand before its answer; some chat templates put the opening tag into the prompt. The
# newline keeps an explanation that only mentions the tag whole.
_THOUGHTS = re.compile(r"\A\s*(?:<think>.*?</think>|(?:(?!<think>).)*?</think>(?=\n))\s*", re.DOTALL)


def _without_thoughts(text: str) -> str:
    """The text after the model's reasoning; nothing when the reasoning never ended."""
    answer = _THOUGHTS.sub("", text, count=1)
    return "" if answer.lstrip().startswith("<think>") else answer


# Openings only, each with its verb: explanations of neurons that fire on apologies quote half of these words.
_REFUSALS = re.compile(
    r"""\s*(?:
      (?:(?:i['’]?m|i\ am|we['’]?re)\ )?(?:very\ |so\ |really\ |deeply\ )?sorry[,.;:]?\ (?:but\ )?(?:i|we|as\ an\ ai)\b
    | (?:unfortunately,\ )?i\ (?:can['’]?t|can\ ?not|won['’]?t|will\ not|must\ decline\ to)\ (?:\w+\ )?
      (?:assist|help|provide|comply|fulfil|continue|engage|discuss|create|generate|write|answer|respond|analy[sz]e|do)
    | (?:unfortunately,\ )?i(?:['’]m|\ am)\ (?:unable|not\ able)\ to\ \w+
    | as\ an\ ai\b[^.]{0,40},\ i\b
    | (?:很|非常|十分|实在)?(?:抱歉|对不起)[，,。！!\ ]*(?:但|但是)?(?:我|作为|这个问题|您的)
    | 我(?:无法|不能|没有办法|没办法)(?:\w{0,4})(?:协助|帮助|提供|回答|满足|讨论|继续|生成|处理|分析)
    | 作为(?:一个|一名|一款)?(?:人工智能|ai|AI)\w{0,8}[，,]\s*我
    )""",
    re.IGNORECASE | re.VERBOSE,
)


def is_refusal(text: str) -> bool:
    """Whether the text opens the way models decline (English and Chinese)."""
    return _REFUSALS.match(text) is not None


def decode(text: str, schema: dict[str, Any]) -> Any:
    """The first JSON value of the text that fits the schema, fences and prose around it left aside; else ValueError."""
    problem = "the answer holds no JSON"
    for value in _json_values(text):
        found = mismatch(value, schema)
        if found is None:
            return value
        problem = found
    raise ValueError(problem)


def _not_json(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


_FENCES = re.compile(r"\A\s*```\w*\s|```\s*\Z")
_OPENING = re.compile(r"[{\[]")
_DECODER = json.JSONDecoder(parse_constant=_not_json)  # NaN and Infinity are no numbers here


def _json_values(text: str) -> Iterator[Any]:
    """The text as one JSON value, or else its outermost objects and arrays from left to right."""
    bare = _FENCES.sub("", text).strip()
    start = 0
    try:
        value, start = _DECODER.raw_decode(bare)
        if start == len(bare) or isinstance(value, dict | list):
            yield value
    except (ValueError, RecursionError):
        start = 0
    while opening := _OPENING.search(bare, start):
        try:
            value, start = _DECODER.raw_decode(bare, opening.start())
        except RecursionError:
            raise ValueError("the answer's JSON is nested too deeply") from None
        except ValueError as error:
            if _is_unfinished(error, bare):  # what is inside an unfinished value is a part, not the answer
                raise ValueError("the answer ends before its JSON does") from None
            start = opening.end()
        else:
            yield value


def _is_unfinished(error: ValueError, text: str) -> bool:
    if not isinstance(error, json.JSONDecodeError):
        return False
    return error.pos >= len(text) or error.msg.startswith("Unterminated string")


_TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "number": (int, float),
    "integer": int,
    "boolean": bool,
    "null": type(None),
}
_NOTES = {"title", "description", "default", "examples"}
_LIMITS = {"minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems"}
_SHAPES = {"type", "enum", "properties", "required", "additionalProperties", "items"}
KEYWORDS = frozenset(_NOTES | _LIMITS | _SHAPES)
"""The JSON schema keywords that may be used (`additionalProperties` as true or false, `items` as one schema)."""


def mismatch(value: Any, schema: dict[str, Any], at: str = "the answer") -> str | None:
    """Where and how `value` does not fit the schema, in one phrase; None when it fits."""
    unknown = schema.keys() - KEYWORDS
    assert not unknown, f"the schema of {at} uses {sorted(unknown)}, which is not checked; use {sorted(KEYWORDS)}"
    if "type" in schema and not _has_type(value, schema["type"]):
        return f"{at} is {json.dumps(value)[:60]}, not of type {schema['type']}"
    if "enum" in schema and not any(_is_same(value, option) for option in schema["enum"]):
        return f"{at} is {json.dumps(value)[:60]}, not one of {json.dumps(schema['enum'])[:80]}"
    if isinstance(value, dict):
        return _object_mismatch(value, schema, at)
    return _limit_mismatch(value, schema, at) or _item_mismatch(value, schema, at)


def _is_same(value: Any, option: Any) -> bool:
    return value == option and isinstance(value, bool) == isinstance(option, bool)


def _has_type(value: Any, names: str | list[str]) -> bool:
    names = [names] if isinstance(names, str) else names
    if isinstance(value, bool):  # to Python a bool is an int, to JSON it is not
        return "boolean" in names
    return any(isinstance(value, _TYPES[name]) for name in names)


def _object_mismatch(value: dict[str, Any], schema: dict[str, Any], at: str) -> str | None:
    properties = schema.get("properties", {})
    for name in schema.get("required", ()):
        if name not in value:
            return f"{at} lacks {name!r}"
    for name, part in value.items():
        if name in properties:
            if found := mismatch(part, properties[name], f"{at}.{name}"):
                return found
        elif schema.get("additionalProperties") is False:
            return f"{at} has {name[:40]!r}, which the schema does not name"
    return None


def _item_mismatch(value: Any, schema: dict[str, Any], at: str) -> str | None:
    if not isinstance(value, list) or "items" not in schema:
        return None
    found = (mismatch(item, schema["items"], f"{at}[{i}]") for i, item in enumerate(value))
    return next(filter(None, found), None)


def _limit_mismatch(value: Any, schema: dict[str, Any], at: str) -> str | None:
    if isinstance(value, bool) or not isinstance(value, int | float | str | list):
        return None
    size, suffix = (len(value), "Items") if isinstance(value, list) else (value, "imum")
    if isinstance(value, str):
        size, suffix = len(value), "Length"
    low, high = schema.get(f"min{suffix}"), schema.get(f"max{suffix}")
    if (low is not None and size < low) or (high is not None and size > high):
        return f"{at} is outside its limits: {size} where min{suffix} is {low} and max{suffix} is {high}"
    return None
