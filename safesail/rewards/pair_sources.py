"""The rows of a source of preference data: a local file or folder, or a Hub dataset."""

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safesail.errors import InputError
from safesail.lm.load import first_line
from safesail.reward_recipe import PreferenceSource, PreferencesSection

__all__ = ["is_local", "preferences_fingerprint", "rows"]

_BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}
_SIDES = ("chosen", "rejected")


def rows(source: PreferenceSource) -> Iterator[dict[str, Any]]:
    """The rows in their order; InputError where they cannot be read or have no columns for the two sides."""
    dataset = _dataset(source)
    missing = [side for side in _SIDES if side not in dataset.column_names]
    if missing:
        raise InputError(
            f"{source.path} has no column {missing[0]!r}; it has {', '.join(dataset.column_names)}. "
            "Name the two answers `chosen` and `rejected`."
        )
    yield from dataset


def is_local(source: PreferenceSource) -> bool:
    """Whether a source is a file or folder of this machine; InputError for a file that is not there."""
    return Path(source.path).is_dir() or _builder(source.path) is not None


def preferences_fingerprint(section: PreferencesSection, files_fingerprint: Callable[[list[Path]], str]) -> str:
    """What tells one set of sources from another: the content of local files and folders, the ids of Hub datasets."""
    parts = []
    for source in section.sources:
        path = Path(source.path)
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        parts.append(files_fingerprint(files) if is_local(source) else f"{source.path}:{source.name}:{source.data_dir}")
    return hashlib.sha256("|".join(parts).encode()).hexdigest()


def _dataset(source: PreferenceSource) -> Any:
    import datasets
    from datasets.exceptions import DatasetGenerationError

    where: dict[str, Any] = {"path": source.path, "name": source.name, "split": source.split}
    where |= {"data_dir": source.data_dir} if source.data_dir else {}
    if builder := _builder(source.path):
        where = {"path": builder, "data_files": source.path, "split": "train"}
    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(**where)
    except (DatasetGenerationError, OSError, ValueError) as error:
        what = f"as {builder}" if builder else f"as a dataset (name {source.name!r}, split {source.split!r})"
        raise InputError(
            f"{source.path} cannot be read {what}: {first_line(error.__cause__ or error)} "
            "Mend it, or name another file or Hub id in preferences.sources."
        ) from error


def _builder(given: str) -> str | None:
    """Which reader of `datasets` takes a local file; None for a folder and for a Hub id."""
    path = Path(given)
    builder = _BUILDERS.get(Path(path.name.removesuffix(".gz")).suffix.lower())
    if path.is_dir() or (builder is None and not path.is_file()):
        return None
    if not path.is_file():
        where = "" if path.is_absolute() else f" in {Path.cwd()}, where the paths of the recipe begin"
        raise InputError(f"there is no file of preferences {path}{where}; name one in preferences.sources.")
    if builder is None:
        raise InputError(f"{path} is none of {', '.join(_BUILDERS)}; convert it or give a Hub dataset id.")
    if path.stat().st_size == 0:
        raise InputError(f"{path} is empty; name another file in preferences.sources.")
    return builder
