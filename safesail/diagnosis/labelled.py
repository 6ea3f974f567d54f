"""Texts labelled as about a domain or not: reading them, splitting them, and finding those seen before.

A file of them is JSONL, one text a line: `id`, `domain`, `about` (true or false) and `text`; optionally `group` (texts
of one origin, which no split parts) and `source`. The shipped ones are in `hub/monitor/`, of the project's own writing.
"""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, StringConstraints, ValidationError

from safesail.assets import asset
from safesail.errors import InputError

__all__ = ["LabelledText", "halves", "labelled_texts", "seen_before", "shipped_domains"]

SHINGLE = 8
"""Words in a row that make a text a near-duplicate's candidate."""
MOSTLY = 0.5
"""A text is a near-duplicate when this share of its runs of words also stands elsewhere."""

Filled = Annotated[str, StringConstraints(pattern=r"\S")]


class LabelledText(BaseModel):
    """A text and whether it is about a domain; `group` is its id where none is given."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    id: Filled
    domain: Filled
    about: bool
    text: Filled
    group: str = ""
    source: str = ""

    @property
    def whole(self) -> str:
        """What no split parts: the group, or the text alone."""
        return self.group or self.id


def shipped_domains() -> list[str]:
    """The domains for which labelled texts are shipped."""
    return sorted(file.stem for file in asset("hub/monitor").glob("*.jsonl"))


def labelled_texts(path: str | Path, domain: str | None = None) -> list[LabelledText]:
    """The texts of a JSONL file (all shipped ones: `shipped`), of one domain if given; InputError at a broken line."""
    if path == "shipped":
        files = [asset(f"hub/monitor/{name}.jsonl") for name in shipped_domains()]
    else:
        files = [Path(path).expanduser()]
    texts = [text for file in files for text in _read(file)]
    repeated = [id for id, n in Counter((text.domain, text.id) for text in texts).items() if n > 1]
    if repeated:
        raise InputError(f"{path}: the id {repeated[0][1]!r} is given twice; every text needs an id of its own.")
    found = [text for text in texts if domain in (None, text.domain)]
    if not found:
        about = ", ".join(sorted({text.domain for text in texts})) or "nothing"
        raise InputError(f"{path} has no texts of the domain {domain!r}; it has texts of: {about}.")
    return found


def _read(file: Path) -> list[LabelledText]:
    try:
        lines = file.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"cannot read the texts {file} ({error.strerror}); give an existing .jsonl file.") from None
    texts = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            texts.append(LabelledText.model_validate_json(line))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            field = ".".join(map(str, first["loc"])) or "the line"
            needed = json.dumps({"id": "1", "domain": "violence", "about": True, "text": "…"}, ensure_ascii=False)
            raise InputError(f"{file}, line {number}: {field}: {first['msg']}; a line looks like {needed}.") from None
    return texts


def halves(texts: Sequence[LabelledText], *, seed: int = 0) -> tuple[list[LabelledText], list[LabelledText]]:
    """A calibration half and a held-out half; groups stay whole, and each kind of group is parted evenly.

    The order within each kind follows a hash of the seed and the group's name, not the order of the file.
    """
    positive = {text.whole for text in texts if text.about}
    first: set[str] = set()
    for kind in (True, False):
        names = sorted({text.whole for text in texts if (text.whole in positive) == kind})
        names.sort(key=lambda name: sha256(f"{seed}/{name}".encode()).digest())
        first.update(names[::2])
    return [text for text in texts if text.whole in first], [text for text in texts if text.whole not in first]


def seen_before(texts: Sequence[str], others: Iterable[str]) -> list[bool]:
    """Whether each text, or most of it, also stands in one of the others; these are read once, one after the other.

    Compared are letters and digits only, in lower case. A text stands in another when half of its runs of eight words
    do (of a shorter text: the whole of it, as it is or inside the other).
    """
    mine = [_shingles(text) for text in texts]
    wanted = set().union(*mine)
    lengths = sorted({len(run) for run in wanted})
    most = [0.0] * len(texts)
    where: dict[tuple[str, ...], list[int]] = {}
    for number, runs in enumerate(mine):
        for run in runs:
            where.setdefault(run, []).append(number)
    for other in others:
        words = _words(other)
        found = {run for n in lengths for run in _runs(words, n) if run in wanted}
        hits = Counter(number for run in found for number in where[run])
        for number, n_runs in hits.items():
            most[number] = max(most[number], n_runs / len(mine[number]))
    return [share >= MOSTLY for share in most]


def _shingles(text: str) -> set[tuple[str, ...]]:
    words = _words(text)
    return set(_runs(words, min(SHINGLE, len(words)))) if words else set()


def _runs(words: list[str], n: int) -> Iterable[tuple[str, ...]]:
    return zip(*(words[i:] for i in range(n)), strict=False)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", unicodedata.normalize("NFKC", text).casefold())
