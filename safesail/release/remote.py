"""What is on the Hub, and the Hub's refusals as one sentence each.

Everything is asked through `huggingface_hub`, with the login it knows (`get_token`): the token stays in its client, and
is in no line that is printed and no message that is raised.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

from safesail.errors import InputError
from safesail.release.manifest import MANIFEST, FileFacts, Manifest

if TYPE_CHECKING:
    from huggingface_hub import HfApi

__all__ = ["Hub", "RemoteFile", "RemoteRepo", "differs", "look", "may_write", "remote_files"]

T = TypeVar("T")
WAITS = (1.0, 4.0, 12.0)
"""Seconds before a request that failed in passing is made again; the client itself has tried some of them before."""
LONGEST_WAIT = 330.0
"""Seconds to wait at most when the Hub says how long: its rate limits are over windows of five minutes."""
PASSING = (408, 425, 429, 500, 502, 503, 504)
_MAY_WRITE = ("admin", "write", "contributor")


class RemoteFile(NamedTuple):
    """A file of a repository on the Hub."""

    size: int
    sha256: str | None
    """Known of files in LFS or Xet."""
    git_sha1: str
    """What git calls the content; of a file in LFS or Xet, of its pointer."""

    def is_(self, facts: FileFacts) -> bool:
        """Whether it has the content of a local file."""
        same = self.sha256 == facts.sha256 if self.sha256 else self.git_sha1 == facts.git_sha1
        return same and self.size == facts.size


class RemoteRepo(NamedTuple):
    """A repository as it stands on the Hub."""

    private: bool
    gated: str | None
    head: str | None
    """The commit of its branch `main`; None without one."""
    tags: tuple[str, ...]
    files: dict[str, RemoteFile]
    manifest: Manifest | None
    """The manifest in it; None if it holds no release."""
    fresh: bool
    """Whether it holds only what the Hub itself puts into a new repository."""


# --- asking -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hub:
    """The Hub as one login sees it; `ask` is the only way to it."""

    api: "HfApi" = field(repr=False)
    token: str | None = field(repr=False)
    tell: Callable[[str], None] = print

    @classmethod
    def login(cls, token: str | None = None, tell: Callable[[str], None] = print) -> "Hub":
        """With the given token, else the login or environment that `huggingface_hub` knows; InputError without one."""
        from huggingface_hub import HfApi, get_token
        from huggingface_hub.errors import OIDCError

        try:
            token = token or get_token()
        except OIDCError as error:
            raise InputError(f"the login by HF_OIDC_RESOURCE failed ({error}); mend it or unset it.") from error
        if not token:
            raise InputError("nobody is logged in to the Hub; type `hf auth login` with a token that may write.")
        return cls(HfApi(token=token, library_name="safesail"), token, tell)

    def say(self, line: str) -> None:
        """Print a line, the token never in it."""
        self.tell(self._without_token(line))

    def ask(self, what: str, call: Callable[["HfApi"], T]) -> T:
        """The answer of `call`, which must look before it does: it is made again after a failure that may pass.

        what: an infinitive for the sentence, as `create acme/demo-saes`.
        """
        from httpx2 import HTTPError

        for wait in (*WAITS, None):
            try:
                return call(self.api)
            except (HTTPError, OSError, RuntimeError, json.JSONDecodeError) as error:
                cause = _cause(error)
                pause = None if wait is None else _pause(cause, wait)
                if pause is None:
                    raise InputError(self._without_token(f"could not {what}: {_reason(cause)}.")) from error
                self.say(f"could not {what} ({_short(cause)}); trying again in {pause:.0f} s")
                time.sleep(pause)
        raise AssertionError("the last attempt returns or raises")

    def _without_token(self, text: str) -> str:
        return text.replace(self.token, "…") if self.token else text


def _cause(error: BaseException) -> BaseException:
    """The answer or the failed connection behind an error: upload threads and downloads wrap it."""
    from httpx2 import HTTPError

    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    return next((found for found in chain if isinstance(found, HTTPError)), error)


def _status(error: BaseException) -> int | None:
    """The HTTP status behind an error; None where no answer came."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _pause(error: BaseException, wait: float) -> float | None:
    """Seconds until the next attempt makes sense; None when it does not."""
    from httpx2 import HTTPError
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return None
    status = _status(error)
    if status is None:
        return wait if isinstance(error, HTTPError | json.JSONDecodeError) else None
    if status not in PASSING:
        return None
    asked = _asked_wait(error)
    return wait if asked is None else asked + 1 if asked <= LONGEST_WAIT else None


def _asked_wait(error: BaseException) -> float | None:
    """The seconds that the Hub asks to wait: by `RateLimit` when nothing is left, or by `Retry-After`."""
    from huggingface_hub.utils import parse_ratelimit_headers

    headers = getattr(getattr(error, "response", None), "headers", {})
    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    asked = headers.get("retry-after", "")
    return float(asked) if asked.isdigit() else None


def _short(error: BaseException) -> str:
    status = _status(error)
    return f"the Hub answered {status}" if status else f"no answer: {_line(error)}"


def _line(error: BaseException, longest: int = 200) -> str:
    """An error's message in one line."""
    text = " ".join(str(getattr(error, "server_message", None) or error).split()) or type(error).__name__
    return text if len(text) <= longest else text[: longest - 1] + "…"


def _reason(error: BaseException) -> str:
    """What stands in the way, and what to type."""
    from httpx2 import HTTPError
    from huggingface_hub.errors import OfflineModeIsEnabled

    if isinstance(error, OfflineModeIsEnabled):
        return "the Hub is switched off here by HF_HUB_OFFLINE; unset it and run the command again"
    status = _status(error)
    if status is not None:
        return _answered(status, error)
    if isinstance(error, HTTPError):
        return f"the Hub cannot be reached ({_line(error)}); when there is a network, run the same command: it goes on"
    return f"{_line(error)}; run the same command again, it goes on where it stopped"


def _answered(status: int, error: BaseException) -> str:
    said = _line(error)
    if status == 401:
        source = "set HF_TOKEN to a valid token" if os.environ.get("HF_TOKEN") else "type `hf auth login --force`"
        return f"the Hub does not accept this login; {source}"
    if status == 402:
        return f"the Hub asks for payment ({said}); settle it in the account's settings and run the same command again"
    if status == 403:
        return f"this login may not do that ({said}); type `hf auth login` with a token that may write there"
    if status == 404:
        return f"it is not there, or not for this login ({said}); type `hf auth whoami` to see which login that is"
    if status in (409, 412):
        return f"somebody else changed it at the same time ({said}); run the same command again"
    if status == 413 or "quota" in said.lower() or "storage limit" in said.lower():
        return f"it is larger than the account has room for ({said}); free some or ask for more, and run it again"
    if status == 429:
        asked = _asked_wait(error)
        when = f"in {asked:.0f} s" if asked else "in some minutes"
        return f"the Hub's rate limit is reached; run the same command again {when}, it goes on where it stopped"
    if status >= 500:
        return f"the Hub answered {status} ({said}); run the same command again later, it goes on where it stopped"
    return f"the Hub answered {status} ({said})"


# --- what is there ------------------------------------------------------------------------------------------------


def remote_files(
    repo_id: str, repo_type: str, revision: str | None = None, token: str | None = None
) -> dict[str, RemoteFile]:
    """Every file of a repository at a revision, by name; InputError in words where the Hub refuses.

    Without a token, as whoever is logged in, or anybody.
    """
    from huggingface_hub import HfApi

    hub = Hub(HfApi(token=token, library_name="safesail"), token, lambda line: None)
    return hub.ask(f"list the files of {repo_id}", lambda api: tree(api, repo_id, repo_type, revision))


def tree(api: "HfApi", repo_id: str, repo_type: str, revision: str | None) -> dict[str, RemoteFile]:
    """Every file of a repository at a revision, by name."""
    from huggingface_hub.hf_api import RepoFile

    entries = api.list_repo_tree(repo_id, recursive=True, repo_type=repo_type, revision=revision)
    return {
        entry.path: RemoteFile(entry.size, entry.lfs.sha256 if entry.lfs else None, entry.blob_id)
        for entry in entries
        if isinstance(entry, RepoFile)
    }


def differs(wanted: dict[str, FileFacts], there: dict[str, RemoteFile]) -> list[str]:
    """The names of the wanted files that are missing there or have another content."""
    return [name for name, facts in wanted.items() if name not in there or not there[name].is_(facts)]


def look(api: "HfApi", repo_id: str, repo_type: str) -> RemoteRepo | None:
    """A repository as it stands, with its manifest; None if there is none that this login can see."""
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        info = api.repo_info(repo_id, repo_type=repo_type)
    except RepositoryNotFoundError:
        return None
    refs = api.list_repo_refs(repo_id, repo_type=repo_type)
    head = next((branch.target_commit for branch in refs.branches if branch.name == "main"), None)
    files = tree(api, repo_id, repo_type, head) if head else {}
    manifest = _manifest(api, repo_id, repo_type, head) if MANIFEST in files else None
    return RemoteRepo(
        private=bool(info.private),
        gated=getattr(info, "gated", None) or None,
        head=head,
        tags=tuple(tag.name for tag in refs.tags),
        files=files,
        manifest=manifest,
        fresh=_fresh(api, repo_id, repo_type, files),
    )


def _fresh(api: "HfApi", repo_id: str, repo_type: str, files: dict[str, RemoteFile]) -> bool:
    """Whether the Hub alone has written into it: `.gitattributes`, and for a Space a first README."""
    if set(files) <= {".gitattributes"}:
        return True
    only_readme = repo_type == "space" and set(files) <= {".gitattributes", "README.md"}
    return only_readme and len(api.list_repo_commits(repo_id, repo_type=repo_type)) == 1


def _manifest(api: "HfApi", repo_id: str, repo_type: str, revision: str | None) -> Manifest:
    """The manifest in a repository."""
    origin = f"{MANIFEST} of {repo_id} on the Hub"
    with tempfile.TemporaryDirectory() as folder:
        path = api.hf_hub_download(repo_id, MANIFEST, repo_type=repo_type, revision=revision, local_dir=folder)
        try:
            with open(path, encoding="utf-8") as handle:
                return Manifest.parse(json.load(handle), origin)
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{origin} is not valid JSON ({error}); mend or remove that repository.") from error


# --- who may write ------------------------------------------------------------------------------------------------


def may_write(user: dict[str, Any], organization: str, repo_ids: list[str]) -> None:
    """InputError when a login (the answer of `whoami`) says that it may not write into these repositories.

    A login that does not say passes: then the Hub itself answers, at the first request that writes.
    """
    access = user.get("auth", {}).get("accessToken") or {}
    if access.get("role") == "read":
        raise InputError(
            f"the login of {user['name']} may only read; type `hf auth login` with a token that may write."
        )
    if organization.lower() != user["name"].lower():
        _member(user, organization)
    if access.get("role") == "fineGrained" and "scoped" in access.get("fineGrained", {}):
        _scopes(access["fineGrained"], organization, repo_ids)


def _member(user: dict[str, Any], organization: str) -> None:
    roles = {org["name"].lower(): org.get("roleInOrg", "write") for org in user.get("orgs", [])}
    if organization.lower() not in roles:
        names = ", ".join([user["name"], *(org["name"] for org in user.get("orgs", []))])
        raise InputError(
            f"{user['name']} is not a member of {organization}, and may publish as {names}; type `hf auth login` as "
            "a member, or set publish.organization to one of these and build the release again."
        )
    if (role := roles[organization.lower()]) not in _MAY_WRITE:
        raise InputError(
            f"{user['name']} has the role “{role}” in {organization}, which may not write; ask an admin of it for the "
            "role “write”, or type `hf auth login` as another member."
        )


def _scopes(granted: dict[str, Any], organization: str, repo_ids: list[str]) -> None:
    """A fine-grained token must name the organization, or every one of the repositories, with `repo.write`."""
    may = {
        scope.get("entity", {}).get("name", "").lower()
        for scope in granted["scoped"]
        if "repo.write" in scope.get("permissions", [])
    }
    if "repo.write" in granted.get("global", []) or organization.lower() in may:
        return
    if lacking := [repo_id for repo_id in repo_ids if repo_id.lower() not in may]:
        raise InputError(
            f"this fine-grained token may not write to {', '.join(lacking)}; give it write access to the repositories "
            f"of {organization} in the settings of its owner, or type `hf auth login` with another."
        )
