"""A diagnosis as HTML: what it shows, the table as a download, and the Python that makes it."""

import base64
import tempfile
from pathlib import Path
from typing import Any

from markup import Markup, tag

from safesail.diagnosis.results import Result, write_result

__all__ = ["note", "result_html", "table"]


def result_html(result: Result, *sections: Any) -> Markup:
    """The sections of a result, then its rows as a parquet file and the code that makes them again.

    The file travels inside the page: nothing of a visitor is stored on the server.
    """
    return tag("article", sections, _download(result), _python(result.python), class_="result")


def _download(result: Result) -> Markup:
    with tempfile.TemporaryDirectory() as folder:
        content = write_result(result, Path(folder) / "result.parquet").read_bytes()
    name = f"{result.config}.parquet"
    plural = "" if len(result.rows) == 1 else "s"
    link = f"data:application/vnd.apache.parquet;base64,{base64.b64encode(content).decode()}"
    return tag("p", tag("a", f"Download {name} ({len(result.rows):,} row{plural})", href=link, download=name))


def _python(code: str) -> Markup:
    summary = tag("summary", "The Python that makes it")
    return tag("details", summary, tag("pre", tag("code", code), tabindex="0", role="group", aria_label="Python"))


def table(caption: str, heads: list[str], rows: list[list[Any]]) -> Markup:
    """A table of cells that are text or markup; it scrolls sideways by itself where the page is narrow."""
    drawn = tag(
        "table",
        tag("caption", caption),
        tag("thead", tag("tr", [tag("th", head, scope="col") for head in heads])),
        tag("tbody", [tag("tr", [tag("td", cell, dir="auto") for cell in row]) for row in rows]),
    )
    return tag("div", drawn, class_="wide", tabindex="0", role="group", aria_label=caption)


def note(sentence: str) -> Markup:
    """A sentence set apart."""
    return tag("p", sentence, class_="note")
