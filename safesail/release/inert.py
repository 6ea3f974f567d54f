"""Foreign text in a card: of one line, without markup or HTML, and without signs that turn the reading direction.

What a language model, a corpus or a recipe says goes through here before it stands in Markdown, JSON or YAML.
"""

import html
import json
import re
from typing import Any

__all__ = ["json_row", "md_cell", "md_code", "one_line"]

_TURNING = re.compile("[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
"""Marks and overrides of the reading direction: they can show a text in another order than it is written."""
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufffe\uffff]")
"""Controls, other line breaks, and halves of characters, which UTF-8 cannot write."""
_ESCAPED = re.compile(rf"{_TURNING.pattern}|{_CONTROL.pattern}|<|\](?=\()")
_MARKUP = re.compile(r"[\\`*_{}\[\]|~$#@]|:(?! )|(?<=www)\.|^[-+=]|(?<=^\d)[.)]|(?<=^\d\d)[.)]", re.IGNORECASE)
"""What begins emphasis, code, links, formulas, cells or, at the start of a line, blocks. < > & are escaped before."""


def one_line(value: Any) -> str:
    """Any text on one line, as it is read: no line breaks, controls or turned directions. None: empty."""
    text = _TURNING.sub("", "" if value is None else str(value))
    return _CONTROL.sub("\ufffd", " ".join(text.split()))


def md_cell(value: Any, longest: int = 160) -> str:
    """Any text as the inert content of a Markdown table cell or line: one line, no markup, no HTML, no cell border."""
    text = one_line(value)
    if len(text) > longest:
        text = text[: longest - 1] + "…"
    return _MARKUP.sub(lambda found: f"&#{ord(found[0])};", html.escape(text, quote=False))


def md_code(value: Any) -> str:
    """Any text as a code span, also inside a table cell: backticks become apostrophes, cell borders broken bars."""
    text = one_line(value).replace("`", "'").replace("|", "\u00a6")
    return f"`{text}`" if text else ""


def json_row(row: dict[str, Any]) -> str:
    """A row as JSON, a column a line: numbers to six digits; what begins a tag, joins a link or is unprintable escaped.

    So it stays JSON, ends no code fence, and is no markup where somebody shows it without its fence.
    """
    pairs = (f"  {json.dumps(name)}: {json.dumps(_short(row[name]), ensure_ascii=False)}" for name in row)
    return "{\n" + ",\n".join(_ESCAPED.sub(_escape, pair) for pair in pairs) + "\n}"


def _short(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _escape(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"
