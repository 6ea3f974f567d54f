"""HTML that is escaped by construction: whatever is not itself `Markup` goes in as text."""

from typing import Any

from markupsafe import Markup, escape

__all__ = ["Markup", "joined", "tag"]


def tag(name: str, *children: Any, **attributes: Any) -> Markup:
    """An element with its children; `class_` stands for class, `data_value` for data-value; None leaves one out."""
    given = "".join(_attribute(key, value) for key, value in attributes.items())
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), Markup(given), joined(*children))


def joined(*children: Any) -> Markup:
    """Children one after the other, lists and tuples taken apart; None and empty strings are nothing."""
    parts = (
        joined(*child) if isinstance(child, list | tuple) else escape(child) for child in children if child is not None
    )
    return Markup("").join(parts)


def _attribute(key: str, value: Any) -> str:
    if value is None or value is False:
        return ""
    name = key.rstrip("_").replace("_", "-")
    return f" {name}" if value is True else f' {name}="{escape(value)}"'
