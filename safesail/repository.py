"""A published folder, read the same way whether it is a local folder or a repository on the Hub.

Every reader of this package (`Sae.from_pretrained`, `NeuronDatabase.load`, `Inspector.from_pretrained`) asks a
`Repository` for files by name and never learns which of the two it was.
"""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from safesail.errors import InputError

__all__ = ["Repository", "part_of_release", "read_table"]


@dataclass(frozen=True)
class Repository:
    """Files below `source`: an existing local folder, or a Hub repository id.

    The keyword arguments mean what they mean in `transformers` and `huggingface_hub`; they are ignored for a folder.
    """

    source: str
    repo_type: str = "model"
    revision: str | None = None
    token: str | bool | None = field(default=None, repr=False)
    cache_dir: str | Path | None = None
    force_download: bool = False
    local_files_only: bool = False

    @property
    def folder(self) -> Path | None:
        """The local folder, or None when `source` is a Hub id."""
        path = Path(self.source).expanduser()
        return path if path.is_dir() else None

    def file(self, name: str) -> Path:
        """The local path of the file `name`; raises InputError saying which part is missing and what to do."""
        _refuse_traversal(name)
        folder = self.folder
        if folder is not None:
            if not (folder / name).is_file():
                raise InputError(f"{folder} has no file {name}; it holds {_listing(folder)}.")
            return folder / name
        return self._download(name)

    def names(self) -> list[str]:
        """The names of all files, sorted; of a Hub repository without downloading any of them."""
        folder = self.folder
        if folder is None:
            return self._names_on_the_hub()
        return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())

    def json(self, name: str) -> Any:
        """The decoded content of the JSON file `name`."""
        path = self.file(name)
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{path} is not valid JSON ({error}); fetch or build it again.") from error

    def table(self, name: str) -> list[dict[str, Any]]:
        """The rows of the parquet file `name`."""
        return read_table(self.file(name))

    def _names_on_the_hub(self) -> list[str]:
        from huggingface_hub import HfApi

        with self._in_words("its list of files"):
            return sorted(
                HfApi(library_name="safesail").list_repo_files(
                    self.source, repo_type=self.repo_type, revision=self.revision, token=self.token
                )
            )

    def _download(self, name: str) -> Path:
        from huggingface_hub import hf_hub_download

        with self._in_words(name):
            return Path(
                hf_hub_download(
                    self.source,
                    name,
                    repo_type=self.repo_type,
                    revision=self.revision,
                    token=self.token,
                    cache_dir=self.cache_dir,
                    force_download=self.force_download,
                    local_files_only=self.local_files_only,
                    library_name="safesail",
                )
            )

    @contextlib.contextmanager
    def _in_words(self, name: str) -> Iterator[None]:
        """What the Hub refuses, as one sentence that ends with what to do."""
        from huggingface_hub.errors import (
            EntryNotFoundError,
            GatedRepoError,
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        where = f"{self.source}" + (f" at revision {self.revision}" if self.revision else "")
        try:
            yield
        except HFValidationError as error:
            raise InputError(f"{self.source!r} is neither an existing folder nor a Hub id like org/name.") from error
        except GatedRepoError as error:
            raise InputError(
                f"{where} is gated: ask for access on its page on the Hub, then type `hf auth login`."
            ) from error
        except RepositoryNotFoundError as error:
            raise InputError(
                f"{where} is neither a folder here nor a {self.repo_type} repository you can read on the Hub; "
                "check the spelling, or type `hf auth login` if it is private."
            ) from error
        except RevisionNotFoundError as error:
            raise InputError(f"{self.source} has no revision {self.revision!r} on the Hub.") from error
        except LocalEntryNotFoundError as error:
            raise InputError(
                f"there is no folder {self.source} here, and {name} of the Hub repository {where} is neither in the "
                "local cache nor to be downloaded now; give a folder that exists, or connect to the Hub once."
            ) from error
        except EntryNotFoundError as error:
            raise InputError(f"{where} has no file {name}; is it a release of safesail?") from error
        except (HfHubHTTPError, OSError) as error:
            raise InputError(f"{name} of {where} could not be read from the Hub: {error}") from error


def read_table(path: Path) -> list[dict[str, Any]]:
    """The rows of a parquet file as dictionaries."""
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not a readable parquet file ({error}); build or download it again.") from error


def part_of_release(release: str | Path, part: str) -> str:
    """The source of one part (`saes`, `neurons`, `examples`) of a release.

    A run folder `runs/demo` has the parts as sub-folders; a Hub release `org/name` has them as `org/name-saes` and so
    on. A folder or id that already is the part is taken as it is.
    """
    folder = Path(release).expanduser()
    if folder.is_dir():
        # a data set's own folder may hold a config of the same name: neurons/neurons
        is_part = folder.name == part and not (folder / "run.json").is_file()
        return str(folder) if is_part or not (folder / part).is_dir() else str(folder / part)
    name = str(release)
    return name if name.endswith(f"-{part}") else f"{name}-{part}"


def _refuse_traversal(name: str) -> None:
    parts = PurePosixPath(name).parts
    if not parts or name.startswith(("/", "~")) or ".." in parts or "\\" in name or "\x00" in name:
        raise InputError(f"{name!r} is not a relative path inside a repository.")


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    shown = ", ".join(names[:12]) or "nothing"
    return shown + (f" and {len(names) - 12} more" if len(names) > 12 else "")
