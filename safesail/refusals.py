"""What the Hub, or the way to it, refuses: as one sentence that says what to do, and never with the token in it."""

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from safesail.repository import Repository

__all__ = ["Refusal"]


@dataclass(frozen=True)
class Refusal:
    """Why the file `name` of a Hub repository could not be had."""

    repository: "Repository"
    name: str

    @property
    def where(self) -> str:
        revision = self.repository.revision
        return self.repository.source + (f" at revision {revision}" if revision else "")

    @property
    def page(self) -> str:
        """The address of the repository's page."""
        from huggingface_hub import constants

        prefix = "" if self.repository.repo_type == "model" else f"{self.repository.repo_type}s/"
        return f"{constants.ENDPOINT}/{prefix}{self.repository.source}"

    @property
    def command(self) -> str:
        """The command that puts the file into the local cache."""
        kind, revision = self.repository.repo_type, self.repository.revision
        name = self.name if "." in self.name else ""
        options = (f" --type {kind}" if kind != "model" else "") + (f" --revision {revision}" if revision else "")
        return f"`hf download {self.repository.source}{f' {name}' if name else ''}{options}`"

    def words(self, error: Exception) -> str:
        """The sentence for an exception of `huggingface_hub`, its HTTP client or `hf_xet`."""
        from huggingface_hub.errors import (
            EntryNotFoundError,
            HfHubHTTPError,
            HFValidationError,
            LocalEntryNotFoundError,
            LocalTokenNotFoundError,
            OfflineModeIsEnabled,
        )

        if isinstance(error, HFValidationError):
            return self._no_id()
        if isinstance(error, LocalTokenNotFoundError):
            return "token=True asks for the login of this machine, and there is none; type `hf auth login`."
        cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError | ValueError) else None
        if isinstance(cause or error, HfHubHTTPError):
            return self._answered(cause or error)
        if isinstance(cause or error, OfflineModeIsEnabled) or self.repository.local_files_only:
            return self._offline()
        if isinstance(error, EntryNotFoundError):
            return self._unreachable()
        return self._broken(error)

    def _no_id(self) -> str:
        source = self.repository.source
        if Path(source).expanduser().exists():
            return f"{source} is a file; give the folder it is in."
        return f"{source!r} is neither an existing folder nor a Hub id like org/name."

    def _answered(self, error: Any) -> str:
        """The Hub's refusal."""
        from huggingface_hub.errors import (
            DisabledRepoError,
            EntryNotFoundError,
            GatedRepoError,
            RepositoryNotFoundError,
            RevisionNotFoundError,
        )

        if isinstance(error, GatedRepoError):
            return self._gated(error)
        if isinstance(error, RepositoryNotFoundError):
            return self._missing(error)
        if isinstance(error, RevisionNotFoundError):
            return self._no_revision()
        if isinstance(error, EntryNotFoundError):
            return f"{self.where} has no file {self.name}; is it a release of safesail? Its files: {self.page}."
        if isinstance(error, DisabledRepoError):
            return f"{self.where} has been disabled on the Hub; see {self.page}."
        return self._status(error)

    def _gated(self, error: Any) -> str:
        if error.response.status_code == 401:
            return (
                f"{self.where} is gated and you are not logged in: ask for access at {self.page}, "
                "then type `hf auth login`."
            )
        if "review" in (error.server_message or ""):
            return f"{self.where} is gated, and your request for access awaits its owner's review; see {self.page}."
        return (
            f"{self.where} is gated and your account has no access: ask for it at {self.page}, then type the same "
            "again (`hf auth whoami` says which account it is)."
        )

    def _missing(self, error: Any) -> str:
        known = error.response.status_code == 404
        private = "ask its owner to let you in" if known else "type `hf auth login`"
        return (
            f"{self.where} is neither a folder here nor a {self.repository.repo_type} repository you can read on the "
            f"Hub; check the spelling, or {private} if it is private."
        )

    def _no_revision(self) -> str:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HTTPError  # type: ignore[reportPrivateImportUsage]

        known: list[str] = []
        with contextlib.suppress(HTTPError):  # they are only a help; the refusal itself is said anyway
            refs = HfApi(library_name="safesail").list_repo_refs(
                self.repository.source, repo_type=self.repository.repo_type, token=self.repository.token
            )
            known = [ref.name for ref in (*refs.branches, *refs.tags)]
        return f"{self.repository.source} has no revision {self.repository.revision!r} on the Hub" + (
            f"; it has {', '.join(known[:12])}." if known else f"; see {self.page}."
        )

    def _status(self, error: Any) -> str:
        status = error.response.status_code
        if status == 401:
            return "the Hub does not know your token (it may have expired); type `hf auth login`."
        if status == 403:
            return f"your token may not read {self.where}; give it that right at its settings, or type `hf auth login`."
        if status == 429:
            return (
                f"the Hub allows no more requests for now, so {self.name} of {self.where} was not fetched; type the "
                "same again in five minutes, or `hf auth login` for a higher limit."
            )
        return (
            f"the Hub answered {status} when asked for {self.name} of {self.where}; type the same again later, "
            "what has been downloaded is kept."
        )

    def _offline(self) -> str:
        why = "local_files_only" if self.repository.local_files_only else "offline mode (HF_HUB_OFFLINE)"
        if self.repository.force_download:
            return f"force_download asks for a download that {why} forbids; give one of them."
        return (
            f"there is no folder {self.repository.source} here, {self.name} of the Hub repository {self.where} is not "
            f"in the local cache, and {why} forbids to download it; with a connection type {self.command}."
        )

    def _unreachable(self) -> str:
        return (
            f"there is no folder {self.repository.source} here, and {self.name} of the Hub repository {self.where} is "
            f"neither in the local cache nor to be downloaded now; check the connection, then type {self.command}."
        )

    def _broken(self, error: Exception) -> str:
        """The download began and did not end well."""
        if isinstance(error, OSError) and error.errno is not None:
            folder = self.repository.cache_dir or "of huggingface_hub"
            return (
                f"{self.name} of {self.where} cannot be written into the cache {folder} ({error.strerror}); give "
                "another folder as cache_dir or in HF_HOME."
            )
        return (
            f"{self.name} of {self.where}, which is no folder here, could not be fetched from the Hub "
            f"({type(error).__name__}); check the connection and type the same again, what is complete is kept."
        )
