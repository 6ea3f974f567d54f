"""What the Hub double holds, and who may see and change it: tokens, repositories, commits, collections. No HTTP."""

import hashlib
import itertools
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, NamedTuple

import yaml

TOKENS = {
    "hf_alice_write": ("alice", "write"),
    "hf_alice_read": ("alice", "read"),
    "hf_alice_fine": ("alice", "fineGrained"),  # writes in the organization acme only
    "hf_bob_write": ("bob", "write"),
}
NAMESPACES = {"alice": ["alice", "acme"], "bob": ["bob"]}
"""The namespaces in which a user may create and write."""
REPO_TYPES = ("model", "dataset", "space")
LARGE_ENDINGS = (".safetensors", ".bin", ".parquet", ".npz", ".pt", ".pth", ".gguf", ".zip", ".gz")
"""Stored outside git, as by the `.gitattributes` that the Hub puts into a new repository."""
LARGE_BYTES = 10_000_000
NAME = re.compile(r"(?!.*(--|\.\.))(?!.*\.git$)[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?")
COUNTER = itertools.count(1)


class HubError(Exception):
    """A refusal: the status, the words, and the code that clients tell refusals apart by."""

    def __init__(self, status: int, message: str, code: str = "", **body: Any) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.body = status, message, code, body


class Caller(NamedTuple):
    """Who sent a request; the name is empty without a token."""

    name: str = ""
    role: str = "read"

    @classmethod
    def of(cls, authorization: str) -> "Caller":
        """The owner of a bearer token; an unknown one is refused, none at all is anonymous."""
        if not authorization.startswith("Bearer "):
            return cls()
        token = authorization.removeprefix("Bearer ")
        if token not in TOKENS:
            raise HubError(401, "Invalid credentials in Authorization header")
        return cls(*TOKENS[token])

    def belongs_to(self, namespace: str) -> bool:
        """Whether the token reaches the private repositories of a user or organization."""
        return namespace in NAMESPACES.get(self.name, []) and (self.role != "fineGrained" or namespace == "acme")

    def must_write(self, namespace: str, message: str = "You don't have the rights to write to this repo") -> None:
        """Refuses whoever may not write in a namespace."""
        if not self.name:
            raise HubError(401, "Invalid username or password.")
        if self.role == "read" or not self.belongs_to(namespace):
            raise HubError(403, message)

    def must_be_known(self) -> None:
        """Refuses the anonymous, and tokens that only read."""
        if not self.name:
            raise HubError(401, "Invalid username or password.")
        if self.role == "read":
            raise HubError(403, "This token only reads")


@dataclass(frozen=True)
class File:
    """A file of a commit."""

    content: bytes
    large: bool = False
    """Stored outside git; git holds a pointer."""
    xet: str | None = None
    """Its hash in the content-addressed storage, when it came through Xet."""

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def oid(self) -> str:
        """Git's name of what git holds: the content, or the pointer to it."""
        return git_oid(self.pointer if self.large else self.content)

    @property
    def pointer(self) -> bytes:
        """https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md"""
        lines = ("version https://git-lfs.github.com/spec/v1", f"oid sha256:{self.sha256}", f"size {len(self.content)}")
        return "".join(line + "\n" for line in lines).encode()


class Commit(NamedTuple):
    sha: str
    parent: str | None
    title: str
    description: str
    author: str
    date: str
    files: dict[str, File]


@dataclass
class Discussion:
    """A discussion or, with `is_pull_request`, a pull request whose commits are at `refs/pr/<num>`."""

    num: int
    title: str
    author: str
    is_pull_request: bool
    status: str = "open"
    created: str = field(default_factory=lambda: now())
    events: list[dict[str, Any]] = field(default_factory=list)
    merged_as: str | None = None

    def add_event(self, author: str, type: str, data: dict[str, Any]) -> dict[str, Any]:
        """Adds what somebody did to the thread."""
        event = {"id": fresh_id(), "author": {"name": author}, "createdAt": now(), "type": type, "data": data}
        self.events.append(event)
        return event


@dataclass
class Repo:
    """A repository: commits, references, settings."""

    repo_type: str
    id: str
    private: bool = False
    gated: str | bool = False
    sdk: str | None = None
    n_restarts: int = 0
    """How often a Space was started anew on request."""
    granted: set[str] = field(default_factory=set)
    awaiting: set[str] = field(default_factory=set)
    """Who asked for access and has no answer yet."""
    created: str = field(default_factory=lambda: now())
    all_commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    discussions: list[Discussion] = field(default_factory=list)

    @property
    def namespace(self) -> str:
        return self.id.split("/")[0]

    @property
    def files(self) -> dict[str, bytes]:
        """The content of every file at the head of main."""
        return {name: file.content for name, file in self.at("main").files.items()}

    @property
    def commits(self) -> list[Commit]:
        """The commits of main, oldest first."""
        return self.history(self.at("main").sha)[::-1]

    @property
    def pull_requests(self) -> list[Discussion]:
        return [thread for thread in self.discussions if thread.is_pull_request]

    def at(self, revision: str) -> Commit:
        """The commit that a branch, tag, reference or (shortened) hash names."""
        named = {**self.branches, **self.tags}
        short = revision.removeprefix("refs/heads/").removeprefix("refs/tags/")
        if sha := named.get(revision) or named.get(short):
            return self.all_commits[sha]
        for sha, commit in self.all_commits.items():
            if len(revision) >= 7 and sha.startswith(revision):
                return commit
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def history(self, sha: str | None) -> list[Commit]:
        """A commit and those before it, newest first."""
        found = []
        while sha:
            found.append(self.all_commits[sha])
            sha = found[-1].parent
        return found

    def commit(self, branch: str, files: dict[str, File], title: str, description: str, author: str) -> Commit:
        """A new commit with these files at the head of a branch."""
        parent = self.branches.get(branch)
        seed = json.dumps([parent, title, next(COUNTER), sorted(files)])
        sha = hashlib.sha1(seed.encode()).hexdigest()
        self.all_commits[sha] = Commit(sha, parent, title, description, author, now(), dict(files))
        self.branches[branch] = sha
        return self.all_commits[sha]

    def put(self, contents: Mapping[str, bytes | None], branch: str = "main", title: str = "by the test") -> Commit:
        """Changes files without a client, under any name; None removes a file."""
        files = dict(self.at(branch).files)
        for name, content in contents.items():
            files.pop(name, None)
            if content is not None:
                files[name] = File(content, large=is_large(name, len(content)))
        return self.commit(branch, files, title, "", self.namespace)

    def open_thread(self, title: str, description: str, author: str, head: str | None) -> Discussion:
        """Opens a discussion, or with a commit `head` a pull request that proposes it."""
        thread = Discussion(len(self.discussions) + 1, title, author, head is not None)
        thread.add_event(author, "comment", comment(description))
        self.discussions.append(thread)
        if head is not None:
            self.branches[f"refs/pr/{thread.num}"] = head
        return thread

    def merge(self, thread: Discussion, author: str) -> None:
        """Puts the files that a pull request changed on main, in one commit."""
        proposed = self.at(f"refs/pr/{thread.num}")
        theirs = {commit.sha for commit in self.history(proposed.sha)}
        base = next(commit for commit in self.history(self.branches["main"]) if commit.sha in theirs)
        files = dict(self.at("main").files)
        for name in {*base.files, *proposed.files}:
            if base.files.get(name) != proposed.files.get(name):
                files.pop(name, None)
                if name in proposed.files:
                    files[name] = proposed.files[name]
        thread.merged_as = self.commit("main", files, f"{thread.title} (#{thread.num})", "", author).sha
        thread.status = "merged"

    def card(self, commit: Commit) -> dict[str, Any]:
        """The metadata at the head of the README."""
        file = commit.files.get("README.md")
        return front_matter(file.content.decode()) if file else {}


@dataclass
class Collection:
    slug: str
    title: str
    owner: str
    description: str
    private: bool
    items: list[dict[str, Any]] = field(default_factory=list)
    updated: str = field(default_factory=lambda: now())


@dataclass
class Store:
    """All repositories and collections, and the large files that were uploaded and perhaps not yet committed."""

    repos: dict[tuple[str, str], Repo] = field(default_factory=dict)
    collections: dict[str, Collection] = field(default_factory=dict)
    large: dict[str, File] = field(default_factory=dict)
    """By sha256."""
    find_elsewhere: Callable[[str], File | None] = lambda _: None
    """Where else a large file may be: the storage of Xet."""

    def create(self, repo_type: str, id: str, private: bool = False, sdk: str | None = None) -> Repo:
        """An empty repository with the first commit that the Hub makes."""
        if not NAME.fullmatch(id.split("/")[1]):
            raise HubError(400, f"Invalid repo name: {id.split('/')[1]}")
        repo = Repo(repo_type, id, private=private, sdk=sdk)
        attributes = "".join(f"*{end} filter=lfs diff=lfs merge=lfs -text\n" for end in LARGE_ENDINGS)
        repo.commit("main", {".gitattributes": File(attributes.encode())}, "initial commit", "", repo.namespace)
        self.repos[repo_type, id] = repo
        return repo

    def uploaded(self, sha256: str) -> File:
        """A large file that some client has uploaded."""
        file = self.large.get(sha256) or self.find_elsewhere(sha256)
        if file is None:
            raise HubError(400, f"lfs object {sha256} was not uploaded")
        self.large[sha256] = file
        return file

    def seen(self, caller: Caller, repo_type: str, id: str) -> Repo:
        """A repository, unless it is private and not the caller's: then it is as if it did not exist."""
        repo = self.repos.get((repo_type, id))
        if repo is None or (repo.private and not caller.belongs_to(repo.namespace)):
            raise HubError(404 if caller.name else 401, "Repository not found", "RepoNotFound")
        return repo

    def written(self, caller: Caller, repo_type: str, id: str) -> Repo:
        """A repository that the caller may change."""
        repo = self.seen(caller, repo_type, id)
        caller.must_write(repo.namespace)
        return repo

    def opened(self, caller: Caller, repo_type: str, id: str) -> Repo:
        """A repository whose files the caller may read: a gate lets in only those who were granted access."""
        repo = self.seen(caller, repo_type, id)
        if repo.gated and not caller.belongs_to(repo.namespace) and caller.name not in repo.granted:
            what = f"Access to {repo_type} {id} is restricted"
            if not caller.name:
                raise HubError(401, f"{what}. You must have access to it and be authenticated.", "GatedRepo")
            if caller.name in repo.awaiting:
                raise HubError(403, f"Your request to access {repo_type} {id} is awaiting a review.", "GatedRepo")
            raise HubError(403, f"{what} and you are not in the authorized list.", "GatedRepo")
        return repo


def is_large(name: str, size: int) -> bool:
    """Whether a file is stored outside git; an empty one never is."""
    return size > 0 and (size >= LARGE_BYTES or name.endswith(LARGE_ENDINGS))


def git_oid(content: bytes) -> str:
    """Git's name of a blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def front_matter(text: str) -> dict[str, Any]:
    """The YAML between the two lines of dashes at the start of a card; HubError where it is not a mapping."""
    if not text.startswith("---"):
        return {}
    try:
        found = yaml.safe_load(text.split("---", 2)[1]) or {}
    except yaml.YAMLError as error:
        raise HubError(400, f"Invalid metadata in README.md: {error}") from error
    if not isinstance(found, dict):
        raise HubError(400, "Invalid metadata in README.md: not a mapping")
    return found


def comment(text: str) -> dict[str, Any]:
    """What a comment event carries."""
    return {"edited": False, "hidden": False, "latest": {"raw": text, "html": ""}, "numEdits": 0}


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def fresh_id() -> str:
    """An id of 24 hexadecimal digits, as those of the Hub's database."""
    return f"{next(COUNTER):024x}"
