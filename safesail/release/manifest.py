"""`safesail.json`: what a published folder is, its files with their checksums. In every folder of a release.

It marks a repository as a release of ours, so that `publish` never writes over somebody else's, and `verify` knows what
must be there.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, field_validator

from safesail import __version__
from safesail.errors import InputError
from safesail.run import write_json

__all__ = [
    "MANIFEST",
    "REPO_TYPES",
    "REWARD_REPO_TYPES",
    "FileFacts",
    "Manifest",
    "file_facts",
    "published_files",
    "repo_type_of",
    "write_manifest",
]

MANIFEST = "safesail.json"
SCHEMA = 1
RepoType = Literal["model", "dataset", "space"]
REPO_TYPES: dict[str, RepoType] = {
    "saes": "model",
    "neurons": "dataset",
    "examples": "dataset",
    "inspector": "space",
}
"""What kind of Hub repository each folder of a release becomes."""
REWARD_REPO_TYPES: dict[str, RepoType] = {
    "saes": "model",
    "reward": "model",
    "salience": "dataset",
    "preferences": "dataset",
    "poisoned": "dataset",
    "inspector": "space",
}
"""The same of a release of a reward model; `poisoned` is there only where its recipe says so."""


def repo_type_of(part: str) -> RepoType:
    """What kind of Hub repository a part becomes, of either kind of release."""
    return REPO_TYPES[part] if part in REPO_TYPES else REWARD_REPO_TYPES[part]


class FileFacts(BaseModel):
    """Size and checksums of a file."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    size: int
    sha256: str
    git_sha1: str
    """What git, and so the Hub, calls the content of a file that is not in LFS."""


class Manifest(BaseModel):
    """The content of `safesail.json`."""

    model_config = ConfigDict(frozen=True)
    schema_: int
    safesail_version: str
    release: str
    """The release's name, without the organization."""
    organization: str
    """The Hub user or organization; empty: none was given, and it cannot be published yet."""
    title: str
    version: str
    part: str
    gated: Literal["auto", "manual"] | None
    """How the Hub asks for consent before it gives the files out; None: it does not."""
    parts: tuple[str, ...] = tuple(REPO_TYPES)
    """The parts of the whole release, in the order in which they are published."""
    files: dict[str, FileFacts]
    """Every other file of the folder, by its name there."""

    @field_validator("parts")
    @classmethod
    def _known(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        assert set(value) <= {*REPO_TYPES, *REWARD_REPO_TYPES}
        return value

    @property
    def repository(self) -> str:
        """The Hub id, as `org/demo-saes`."""
        return f"{self.organization}/{self.release}-{self.part}"

    @classmethod
    def parse(cls, data: Any, origin: str) -> "Manifest":
        """The manifest in decoded JSON; InputError says what is wrong with it."""
        if not isinstance(data, dict) or "schema" not in data:
            raise InputError(f"{origin} is not the manifest of a safesail release.")
        if data["schema"] != SCHEMA:
            raise InputError(
                f"{origin} has schema {data['schema']!r}, and this safesail ({__version__}) reads schema {SCHEMA}; "
                "install a newer one with `pip install -U safesail`."
            )
        try:
            return cls.model_validate({"schema_": data["schema"], **data})
        except ValidationError as error:
            key = ".".join(map(str, error.errors()[0]["loc"]))
            raise InputError(
                f"{origin} is not the manifest of a safesail release: {key} is wrong or missing."
            ) from error

    @classmethod
    def of(cls, folder: Path) -> "Manifest":
        """The manifest in a local folder."""
        path = folder / MANIFEST
        if not path.is_file():
            raise InputError(f"{folder} has no {MANIFEST}, so it is not a folder of a release; build it again.")
        try:
            return cls.parse(json.loads(path.read_text(encoding="utf-8")), str(path))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path} is not valid JSON ({error}); build the release again.") from error


def write_manifest(
    folder: Path,
    part: str,
    release: str,
    organization: str,
    title: str,
    version: str,
    gated: str | None,
    parts: Sequence[str] = (),
) -> None:
    """Write `safesail.json` into a finished folder of a release. parts: of it, where they are not the usual ones."""
    files = {name: file_facts(folder / name).model_dump() for name in published_files(folder)}
    content = {
        "schema": SCHEMA,
        "safesail_version": __version__,
        "release": release,
        "organization": organization,
        "title": title,
        "version": version,
        "part": part,
        "gated": gated,
        **({"parts": list(parts)} if parts else {}),
        "files": files,
    }
    write_json(folder / MANIFEST, content)


def published_files(folder: Path) -> Iterator[str]:
    """The names of the files of a release's folder, sorted, without the manifest and hidden files."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name != MANIFEST and not re.search(r"(^|/)\.", name):
            yield name


def file_facts(path: Path) -> FileFacts:
    """Size and checksums of a file on disk."""
    size = path.stat().st_size
    sha256, sha1 = hashlib.sha256(), hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with open(path, "rb") as handle:
        while chunk := handle.read(1 << 20):
            sha256.update(chunk)
            sha1.update(chunk)
    return FileFacts(size=size, sha256=sha256.hexdigest(), git_sha1=sha1.hexdigest())
