"""A part of a release, in a folder or on the Hub, and what is read from it for the checks."""

import re
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, ValidationError

from safesail.errors import InputError
from safesail.interpretation.collect import EXAMPLE_SCHEMA
from safesail.release import tables
from safesail.release.diagnoses import SCHEMAS
from safesail.release.manifest import Manifest, file_facts
from safesail.release.remote import remote_files
from safesail.release.reward_tables import REWARD_SCHEMAS, filled, schema_of
from safesail.repository import Repository
from safesail.sae.config import SaeConfig

__all__ = ["CONFIGS", "Part", "ReleaseConfig", "schema_problem"]

Row = dict[str, Any]


class ReleaseConfig(BaseModel):
    """What `config.json` of the SAEs must say; it says more."""

    schema_: Literal[1]
    base_model: str
    base_model_revision: str | None = None
    tokenizer_hash: str | None = None
    selected: dict[str, str]
    """{hook point: id of its selected SAE}."""
    selected_by: Row = {}
    saes: list[Row]
    definitions: dict[str, str] = {}

    @classmethod
    def parse(cls, data: Any, origin: str) -> "ReleaseConfig":
        """The config in decoded JSON; InputError names the key that is wrong."""
        try:
            config = cls.model_validate({**data, "schema_": data.get("schema")} if isinstance(data, dict) else data)
        except ValidationError as error:
            key = ".".join(map(str, error.errors()[0]["loc"])).replace("schema_", "schema")
            raise InputError(f"{origin} is not the config of a release: {key or 'it'} is missing or wrong.") from error
        if not all(isinstance(row.get("id"), str) for row in config.saes):
            raise InputError(f"{origin} is not the config of a release: an entry of saes has no id.")
        return config

    @property
    def by_id(self) -> dict[str, Row]:
        """{SAE id: its entry}."""
        return {row["id"]: row for row in self.saes}


class Part:
    """A folder of a release, or the repository that it became; what is read is read once."""

    def __init__(self, name: str, repository: Repository, manifest: Manifest) -> None:
        self.name, self.repository, self.manifest = name, repository, manifest
        self._tables: dict[str, list[Row]] = {}

    @cached_property
    def there(self) -> dict[str, Any]:
        """{file name: its facts on the Hub}; of a folder the facts are None until they are asked for."""
        if self.repository.folder is not None:
            return dict.fromkeys(self.repository.names())
        where, token = self.repository, self.repository.token
        assert not isinstance(token, bool), "verify takes a token or None"
        return dict(remote_files(where.source, where.repo_type, where.revision, token))

    def facts(self, name: str) -> Any:
        """Size and checksums of a file that is there; `sha256` is None for a file that the Hub keeps in git."""
        return self.there[name] or file_facts(self.repository.file(name))

    @property
    def is_converted(self) -> bool:
        """Whether a data set was made of another tool's files, which say nothing of how its neurons were selected."""
        return not any(name.partition("/")[0] in _SELECTED_BY for name in self.manifest.files)

    @property
    def configs(self) -> list[str]:
        """The tables that the data set must have."""
        if self.name in REWARD_SCHEMAS:
            return list(REWARD_SCHEMAS[self.name])
        names = [name for name in CONFIGS[self.name] if name not in (*_OF_CONVERTED, *SCHEMAS)]
        return [name for name in names if name not in _SELECTED_BY] if self.is_converted else names

    def tables_of(self, config: str) -> list[str]:
        """The parquet files of a config of a data set."""
        return [name for name in self.there if name.startswith(f"{config}/") and name.endswith(".parquet")]

    def table(self, name: str) -> list[Row]:
        """The rows of a parquet file whose columns are what they must be."""
        if name not in self._tables:
            if problem := schema_problem(self, name):
                raise InputError(problem)
            self._tables[name] = self.repository.table(name)
        return self._tables[name]

    def rows(self, config: str) -> list[Row]:
        """The rows of a config's only table, or of all its splits one after the other."""
        by_split = config == "explanations" or self.name in REWARD_SCHEMAS
        names = self.tables_of(config) if by_split else [f"{config}/train.parquet"]
        return [row for name in names for row in self.table(name)]

    @cached_property
    def config(self) -> ReleaseConfig:
        """The SAEs' `config.json`."""
        return ReleaseConfig.parse(self.repository.json("config.json"), f"{self.name}/config.json")

    @property
    def languages(self) -> list[str]:
        """The languages that languages.json names."""
        found = self.repository.json("languages.json")
        if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
            raise InputError("languages.json is not a list of languages.")
        return found

    def sae_config(self, sae_id: str) -> SaeConfig:
        """The shape of an SAE, from its `cfg.json`."""
        return SaeConfig.from_json(self.repository.json(f"{sae_id}/cfg.json"), f"{sae_id}/cfg.json")

    @cached_property
    def card(self) -> str:
        """The text of README.md."""
        return self.repository.file("README.md").read_text(encoding="utf-8")

    @cached_property
    def front(self) -> Row:
        """The front matter of README.md; InputError where it is not valid YAML."""
        from yaml import YAMLError, safe_load

        found = re.match(r"---\n(.*?)\n---\n", self.card, re.DOTALL)
        try:
            front = safe_load(found[1]) if found else None
        except YAMLError as error:
            problem = " ".join(str(error).split())
            raise InputError(f"the front matter of {self.name}/README.md is not valid YAML: {problem}") from error
        if not isinstance(front, dict):
            raise InputError(f"{self.name}/README.md has no front matter.")
        return front


# --- what a table must be -------------------------------------------------------------------------------------------


def schema_problem(part: Part, name: str) -> str:
    """What is wrong with a table's columns, or an empty string."""
    path = part.repository.file(name)
    try:
        found = pq.read_schema(path)
    except (OSError, pa.ArrowException) as error:
        return f"{name} is not a readable parquet file ({error}); build or download it again."
    config = name.partition("/")[0]
    expected = _expected(part.name, config, found)
    if expected is None:
        return f"{name} is not a table of a release."
    for field in expected:
        if field.name not in found.names:
            return f"{name} has no column {field.name}."
        if found.field(field.name).type != field.type:
            return f"{name}: {field.name} is {found.field(field.name).type}, not {field.type}."
    extra = [column for column in found.names if column not in expected.names]
    if extra:
        return f"{name} has a column {extra[0]}, which is not in its schema."
    if found.names != expected.names:
        return f"{name} has its columns in another order."
    return _empty_place(path, name) if part.name in REWARD_SCHEMAS else ""


def _empty_place(path: Path, name: str) -> str:
    """Which column of a reward model's table lacks a value that every row has, as a sentence."""
    table = pq.read_table(path, columns=filled(name.partition("/")[0]))
    empty = [column for column in table.column_names if table[column].null_count]
    return f"{name} has an empty place in its column {empty[0]}." if empty else ""


def _expected(part: str, config: str, found: pa.Schema) -> pa.Schema | None:
    """The columns that a config of a part must have; None: there is no such config."""
    if part in REWARD_SCHEMAS:
        return schema_of(part, config)
    make = CONFIGS[part].get(config)
    return make(_thresholds(found)) if make else None


def _thresholds(schema: pa.Schema) -> list[str]:
    """The t of the columns l0_t_<t>."""
    return [name[5:] for name in schema.names if name.startswith("l0_t_") and not name.endswith("_null")]


def _published_examples() -> pa.Schema:
    return pa.schema([field for field in EXAMPLE_SCHEMA if field.name not in ("document", "piece", "peak")])


CONFIGS: dict[str, dict[str, Callable[[list[str]], pa.Schema]]] = {
    "neurons": {
        "neurons": lambda _: tables.NEURONS,
        "explanations": lambda _: tables.EXPLANATIONS,
        "scores": lambda _: tables.SCORES,
        "quantiles": lambda _: tables.QUANTILES,
        "selection": tables.selection_schema,
        "contrast": tables.contrast_schema,
        "pairs": lambda _: tables.PAIRS,
        "candidates": lambda _: tables.CANDIDATES,
    },
    "examples": {
        "examples": lambda _: _published_examples(),
        **{name: lambda _, schema=schema: schema for name, schema in SCHEMAS.items()},
    },
}
_SELECTED_BY = ("selection", "contrast", "pairs")
_OF_CONVERTED = ("candidates",)
