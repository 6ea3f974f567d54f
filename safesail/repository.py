"""A published folder, read the same way whether it is a local folder or a repository on the Hub.

Every reader of this package (`Sae.from_pretrained`, `NeuronDatabase.load`, `Inspector.from_pretrained`) asks a
`Repository` for files by name and never learns which of the two it was.
"""

import contextlib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from safesail.errors import InputError
from safesail.refusals import Refusal

__all__ = ["Repository", "part_of_release", "parts_of_release", "read_table"]

PARTS = ("saes", "neurons", "examples", "inspector")
"""Of a release of a language model's SAEs."""
REWARD_PARTS = ("reward", "salience", "preferences", "poisoned")
"""What a release of a reward model has besides."""
LFS_POINTER = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True)
class Repository:
    """Files below `source`: an existing local folder, or a Hub repository id.

    The keyword arguments mean what they mean in `transformers` and `huggingface_hub`; they are ignored for a folder.
    All files come from the commit that the first one came from, also when somebody publishes meanwhile.
    """

    source: str
    repo_type: str = "model"
    revision: str | None = None
    token: str | bool | None = field(default=None, repr=False)
    cache_dir: str | Path | None = None
    force_download: bool = False
    local_files_only: bool = False
    _commit: list[str] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def folder(self) -> Path | None:
        """The local folder, or None when `source` is a Hub id."""
        path = Path(self.source).expanduser()
        return path if path.is_dir() else None

    def file(self, name: str) -> Path:
        """The local path of the file `name`; raises InputError saying which part is missing and what to do."""
        self._refuse_traversal(name)
        folder = self.folder
        if folder is None:
            return self._download(name)
        path = folder / name
        if not path.is_file():
            raise InputError(f"{folder} has no file {name}; it holds {_listing(folder)}.")
        _refuse_pointer(path)
        return path

    def names(self) -> list[str]:
        """The names of all files, sorted; of a Hub repository without downloading any of them.

        Without the Hub (`local_files_only`, offline mode) these are the files that are in the local cache.
        """
        folder = self.folder
        if folder is not None:
            return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        names = self._names_in_the_cache() if self._is_offline() else self._names_on_the_hub()
        for name in names:
            self._refuse_traversal(name)
        return sorted(names)

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

    def _refuse_traversal(self, name: str) -> None:
        parts = PurePosixPath(name).parts
        leaves = name.startswith(("/", "~")) or ".." in parts or "\\" in name or PureWindowsPath(name).drive
        if not parts or leaves or not name.isprintable():
            raise InputError(f"{self.source} names a file {name!r}, which is not a relative path inside a repository.")

    def _is_offline(self) -> bool:
        from huggingface_hub import is_offline_mode

        return self.local_files_only or is_offline_mode()

    def _names_on_the_hub(self) -> list[str]:
        from huggingface_hub import HfApi

        with self._in_words("its list of files"):
            return HfApi(library_name="safesail").list_repo_files(
                self.source, repo_type=self.repo_type, revision=self._at, token=self.token
            )

    def _names_in_the_cache(self) -> list[str]:
        from huggingface_hub import snapshot_download

        with self._in_words("its list of files"):
            snapshot = Path(
                snapshot_download(
                    self.source,
                    repo_type=self.repo_type,
                    revision=self._at,
                    cache_dir=self.cache_dir,
                    local_files_only=True,
                    allow_patterns=[],  # what there is, complete or not
                )
            )
        return [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()]

    @property
    def _at(self) -> str | None:
        """The revision to read: the commit of the first file, once there is one."""
        return self._commit[0] if self._commit else self.revision

    def _download(self, name: str) -> Path:
        from huggingface_hub import hf_hub_download

        with self._in_words(name):
            path = Path(
                hf_hub_download(
                    self.source,
                    name,
                    repo_type=self.repo_type,
                    revision=self._at,
                    token=self.token,
                    cache_dir=self.cache_dir,
                    force_download=self.force_download,
                    local_files_only=self.local_files_only,
                    library_name="safesail",
                )
            )
        commit = path.parents[len(PurePosixPath(name).parts) - 1].name  # …/snapshots/COMMIT/NAME
        if not self._commit and re.fullmatch(r"[0-9a-f]{40}", commit):
            self._commit.append(commit)
        return path

    @contextlib.contextmanager
    def _in_words(self, name: str) -> Iterator[None]:
        """What the Hub or the way to it refuses, as one sentence that ends with what to do; never with the token."""
        from huggingface_hub.errors import HTTPError  # type: ignore[reportPrivateImportUsage]  # what all of it inherits

        if self.force_download and self.local_files_only:
            raise InputError("force_download and local_files_only contradict each other; give one of them.")
        if isinstance(self.token, str) and not (self.token.isascii() and self.token.isprintable() and self.token):
            raise InputError("the token given is empty or holds characters that no token has; type `hf auth login`.")
        try:
            yield
        except UnicodeEncodeError:  # from the environment; its representation holds the token
            raise InputError("the token in HF_TOKEN holds characters that no token has; set it again.") from None
        except (HTTPError, OSError, RuntimeError, ValueError) as error:  # RuntimeError: all failures of hf_xet
            raise InputError(Refusal(self, name).words(error)) from error


def read_table(path: Path) -> list[dict[str, Any]]:
    """The rows of a parquet file as dictionaries."""
    import pyarrow.parquet as pq

    try:
        return pq.read_table(path).to_pylist()
    except (OSError, ValueError) as error:
        raise InputError(f"{path} is not a readable parquet file ({error}); build or download it again.") from error


def part_of_release(release: str | Path, part: str) -> str:
    """The source of one part (`saes`, `neurons`, `reward`, …) of a release.

    A run folder `runs/demo` has the parts as sub-folders; a Hub release `org/name` has them as `org/name-saes` and so
    on. A folder or id that already is the part is taken as it is; the id of another part names its release.
    """
    folder = Path(release).expanduser()
    if folder.is_dir():
        # a data set's own folder may hold a config of the same name: neurons/neurons
        is_part = folder.name == part and not (folder / "run.json").is_file()
        return str(folder) if is_part or not (folder / part).is_dir() else str(folder / part)
    name = str(release)
    stem, dash, last = name.rpartition("-")
    return f"{stem if dash and last in (*PARTS, *REWARD_PARTS) else name}-{part}"


def parts_of_release(release: str | Path, **hub: Any) -> tuple[str, ...]:
    """The parts that a release has, as `safesail.json` beside its SAEs says; `reward` among them: of a reward model.

    Where there is no such file (releases of earlier versions, other tools) it is of a language model. hub: as of
    `Repository`.
    """
    repository, name = Repository(part_of_release(release, "saes"), "model", **hub), "safesail.json"
    try:
        manifest = repository.json(name)
    except InputError:
        if name in repository.names():  # or the names say why nothing can be read
            raise
        return PARTS
    return tuple(manifest.get("parts", PARTS)) if isinstance(manifest, dict) else PARTS


def _refuse_pointer(path: Path) -> None:
    """Refuses what a clone without git-lfs leaves in the place of a large file."""
    if path.stat().st_size < 1024 and path.read_bytes().startswith(LFS_POINTER):
        raise InputError(f"{path} is only git's pointer to the file; type `git lfs pull` in {path.parent}.")


def _listing(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    shown = ", ".join(names[:12]) or "nothing"
    return shown + (f" and {len(names) - 12} more" if len(names) > 12 else "")
