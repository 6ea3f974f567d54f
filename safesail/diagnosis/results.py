"""What a diagnosis gives: a table, the facts about it, and the Python that makes it again."""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from safesail.errors import InputError
from safesail.files import replacing

__all__ = ["Result", "default_path", "read_result", "write_result"]

Config = Literal["trajectories", "interventions", "knowledge", "monitor"]
_FACTS, _PYTHON, _CONFIG = b"safesail.facts", b"safesail.python", b"safesail.config"


class Result(NamedTuple):
    """A diagnosis: rows of one public schema."""

    config: Config
    rows: list[dict[str, Any]]
    schema: pa.Schema
    python: str
    """Lines of Python that make the same rows."""
    facts: dict[str, Any]
    """The settings and the summary, as plain JSON."""


def write_result(result: Result, path: str | Path) -> Path:
    """Write the rows as parquet; facts and Python go into the file's metadata."""
    path = Path(path).expanduser()
    if path.suffix != ".parquet":
        raise InputError(f"{path} is no name for a result; give one that ends with .parquet.")
    more = {_CONFIG: result.config, _FACTS: json.dumps(result.facts, ensure_ascii=False), _PYTHON: result.python}
    schema = result.schema.with_metadata({key: value.encode() for key, value in more.items()})
    table = pa.Table.from_pylist(result.rows, schema=schema)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, table.nbytes) as partial, pq.ParquetWriter(partial, schema) as writer:
        if result.rows:  # load_dataset cannot read a row group without rows
            writer.write_table(table)
    return path


def read_result(path: str | Path) -> Result:
    """The result in a file of `write_result`; InputError for any other file."""
    try:
        table = pq.read_table(path)
    except (OSError, ValueError, pa.ArrowException) as error:
        raise InputError(f"{path} is not a readable parquet file ({error}); make it again.") from error
    told = table.schema.metadata or {}
    if not {_CONFIG, _FACTS, _PYTHON} <= told.keys():
        raise InputError(f"{path} is not a result of a diagnosis; its metadata names no config.")
    config: Any = told[_CONFIG].decode(errors="replace")
    try:
        python, facts = told[_PYTHON].decode(), json.loads(told[_FACTS])
    except ValueError as error:
        raise InputError(f"{path} is a damaged result of a diagnosis ({error}); make it again.") from error
    return Result(config, table.to_pylist(), table.schema.remove_metadata(), python, facts)


def default_path(release: str | Path, result: Result) -> Path:
    """Where a verb stores a result unless told otherwise: in a run's scratch folder, else in the working folder.

    The name follows from what was asked (the Python), so that asking again replaces the file.
    """
    name = f"{hashlib.sha256(result.python.encode()).hexdigest()[:12]}.parquet"
    run = Path(release).expanduser()
    folder = run / "scratch/diagnosis" if (run / "run.json").is_file() else Path("diagnosis")
    return folder / result.config / name
