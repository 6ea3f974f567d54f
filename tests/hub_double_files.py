"""The files of a revision, and how they are uploaded and committed, at the Hub double."""

import base64
import json
import re
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs, unquote

from hub_double_calls import Call, Reply, error_headers, page, proposing
from hub_double_store import Commit, File, HubError, Repo, Store, front_matter, is_large

# --- files of a revision ----------------------------------------------------------------------------------------------


def entry(name: str, file: File, commit: Commit) -> dict[str, Any]:
    """A file as the tree lists it."""
    found = {"type": "file", "path": name, "oid": file.oid, "size": len(file.content)}
    if file.large:
        found["lfs"] = {"oid": file.sha256, "size": len(file.content), "pointerSize": len(file.pointer)}
    if file.xet:
        found["xetHash"] = file.xet
    return {**found, "lastCommit": {"id": commit.sha, "title": commit.title, "date": commit.date}}


def directory(name: str) -> dict[str, Any]:
    return {"type": "directory", "path": name, "oid": "0" * 40, "size": 0}


def tree(call: Call) -> Reply:
    repo = call.store.seen(*call.key)
    commit, top = repo.at(unquote(call.parts["rev"])), unquote(call.parts.get("path") or "").strip("/")
    below = top + "/" if top else ""
    files = {name: file for name, file in sorted(commit.files.items()) if name.startswith(below)}
    if top and not files:
        raise HubError(404, f"{top} does not exist on {call.parts['rev']}", "EntryNotFound")
    folders = {
        below + "/".join(path[:i])
        for name in files
        for path in [name[len(below) :].split("/")]
        for i in range(1, len(path))
    }
    if not call.flag("recursive"):
        files = {name: file for name, file in files.items() if "/" not in name[len(below) :]}
        folders = {name for name in folders if "/" not in name[len(below) :]}
    return Reply([*map(directory, sorted(folders)), *(entry(name, file, commit) for name, file in files.items())])


def paths_info(call: Call) -> Reply:
    repo = call.store.seen(*call.key)
    commit, asked = repo.at(unquote(call.parts["rev"])), _paths(call)
    found = [entry(name, commit.files[name], commit) for name in asked if name in commit.files]
    folders = [name for name in asked if any(path.startswith(name + "/") for path in commit.files)]
    return Reply(found + [directory(name) for name in folders])


def _paths(call: Call) -> list[str]:
    if "json" in call.headers.get("content-type", ""):
        paths = call.json["paths"]
    else:
        paths = parse_qs(call.body.decode()).get("paths", [])
    return [path.strip("/") for path in ([paths] if isinstance(paths, str) else paths)]


def commits(call: Call) -> Reply:
    repo = call.store.seen(*call.key)
    return Reply(
        [
            {"id": c.sha, "title": c.title, "message": c.description, "authors": [{"user": c.author}], "date": c.date}
            for c in repo.history(repo.at(unquote(call.parts["rev"])).sha)
        ]
    )


def resolve(call: Call) -> Reply:
    """The content of a file, or the address of a large one in the storage."""
    repo = call.store.opened(*call.key)
    commit, name = repo.at(unquote(call.parts["rev"])), unquote(call.parts["path"])
    file, headers = commit.files.get(name), {"X-Repo-Commit": commit.sha}
    if file is None:
        error = HubError(404, f"{name} does not exist on {call.parts['rev']}", "EntryNotFound")
        return Reply({"error": error.message}, 404, {**headers, **error_headers(error)})
    if not file.large:
        return ranged(call, file.content, {**headers, "ETag": f'"{file.oid}"'})
    if file.xet and call.cas_url:
        token = f"{call.url}/api/{repo.repo_type}s/{repo.id}/xet-read-token/{commit.sha}"
        headers |= {"X-Xet-Hash": file.xet, "Link": f'<{token}>; rel="xet-auth"'}
    headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.content)), "ETag": f'"{file.oid}"'}
    return Reply(b"", 302, {**headers, "Location": f"{call.storage_url}/storage/{file.sha256}"})


def storage(call: Call) -> Reply:
    """The large file at a signed address; here everybody may read who knows its hash."""
    sha = call.parts["sha"]
    files = (file for repo in call.store.repos.values() for c in repo.all_commits.values() for file in c.files.values())
    content = next((file.content for file in files if file.large and file.sha256 == sha), None)
    if content is None:
        raise HubError(404, "no such object")
    return ranged(call, content, {"ETag": f'"{sha}"'})


def ranged(call: Call, content: bytes, headers: dict[str, str]) -> Reply:
    """The whole content, or the range of it that was asked for."""
    headers = {**headers, "Accept-Ranges": "bytes"}
    asked = re.fullmatch(r"bytes=(\d*)-(\d*)", call.headers.get("range", ""))
    if not asked:
        return Reply(content, 200, headers)
    size = len(content)
    start = int(asked[1]) if asked[1] else max(0, size - int(asked[2]))
    end = min(int(asked[2]), size - 1) if asked[1] and asked[2] else size - 1
    if start >= size:
        return Reply(b"", 416, {"Content-Range": f"bytes */{size}"})
    return Reply(content[start : end + 1], 206, {**headers, "Content-Range": f"bytes {start}-{end}/{size}"})


# --- uploads and commits ----------------------------------------------------------------------------------------------


def preupload(call: Call) -> Reply:
    repo = proposing(call) if call.flag("create_pr") else writing(call, unquote(call.parts["rev"]))
    known, answers = repo.at(unquote(call.parts["rev"])).files, []
    for asked in call.json["files"]:
        file, large = known.get(asked["path"]), is_large(asked["path"], asked["size"])
        oid = (file.sha256 if file.large else file.oid) if file else None
        mode = "lfs" if large else "regular"
        answers.append({"path": asked["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return Reply({"files": answers, "commitOid": repo.at(unquote(call.parts["rev"])).sha})


def writing(call: Call, branch: str) -> Repo:
    """A repository on a branch of which the caller may commit; on that of a pull request also its author."""
    number = branch.removeprefix("refs/pr/")
    repo = call.store.seen(*call.key)
    if branch.startswith("refs/pr/") and repo.discussions[int(number) - 1].author == call.caller.name:
        return proposing(call)
    return call.store.written(*call.key)


def commit(call: Call) -> Reply:
    branch, as_pull_request = unquote(call.parts["rev"]), call.flag("create_pr")
    repo = proposing(call) if as_pull_request else writing(call, branch)
    lines = [json.loads(line) for line in call.body.splitlines() if line.strip()]
    header = next(line["value"] for line in lines if line["key"] == "header")
    base = repo.at(branch)
    if header.get("parentCommit") not in (None, base.sha):
        raise HubError(412, "A commit has happened since. Please refresh and try again.")
    if not as_pull_request and branch not in repo.branches:
        raise HubError(400, f"{branch} is not a branch")
    files = dict(base.files)
    for line in lines:
        CHANGES.get(line["key"], lambda *_: None)(call.store, files, line["value"])
    if "README.md" in files and files["README.md"] != base.files.get("README.md"):
        front_matter(files["README.md"].content.decode())
    title, description = header["summary"], header.get("description", "")
    target = f"refs/pr/{len(repo.discussions) + 1}" if as_pull_request else branch
    repo.branches.setdefault(target, base.sha)
    made = repo.commit(target, files, title, description, call.caller.name)
    answer = {"success": True, "commitOid": made.sha, "commitUrl": f"{page(call, repo)}/commit/{made.sha}"}
    if as_pull_request:
        thread = repo.open_thread(title, description, call.caller.name, made.sha)
        answer["pullRequestUrl"] = f"{page(call, repo)}/discussions/{thread.num}"
    return Reply({"hookOutput": "", "pullRequestUrl": None, **answer})


def _add_small(store: Store, files: dict[str, File], value: dict[str, Any]) -> None:
    encoded = value.get("encoding", "base64") == "base64"
    files[_path(value)] = File(base64.b64decode(value["content"]) if encoded else value["content"].encode())


def _add_large(store: Store, files: dict[str, File], value: dict[str, Any]) -> None:
    files[_path(value)] = store.uploaded(value["oid"])


def _delete_file(store: Store, files: dict[str, File], value: dict[str, Any]) -> None:
    if files.pop(value["path"], None) is None:
        raise HubError(404, f"{value['path']} does not exist", "EntryNotFound")


def _delete_folder(store: Store, files: dict[str, File], value: dict[str, Any]) -> None:
    for name in [name for name in files if name.startswith(value["path"].rstrip("/") + "/")]:
        del files[name]


def _path(value: dict[str, Any]) -> str:
    """A path inside the repository that git can hold."""
    parts = value["path"].split("/")
    if not all(parts) or {".", "..", ".git"} & set(parts):
        raise HubError(400, f"Invalid path {value['path']}")
    return value["path"]


CHANGES: dict[str, Callable[[Store, dict[str, File], dict[str, Any]], None]] = {
    "file": _add_small,
    "lfsFile": _add_large,
    "deletedFile": _delete_file,
    "deletedFolder": _delete_folder,
}


def lfs_batch(call: Call) -> Reply:
    """Where to put each large file; nowhere if it is there already."""
    proposing(call)
    answers = []
    for asked in call.json["objects"]:
        upload = {"href": f"{call.storage_url}/storage/{asked['oid']}", "header": {}}
        actions = {"upload": upload, "verify": {"href": f"{call.url}/storage-verify", "header": {}}}
        known = asked["oid"] in call.store.large
        answers.append({"oid": asked["oid"], "size": asked["size"], **({} if known else {"actions": actions})})
    return Reply({"transfer": "basic", "objects": answers})


def lfs_put(call: Call) -> Reply:
    file = File(call.body, large=True)
    if file.sha256 != call.parts["sha"]:
        raise HubError(400, "The content does not have the hash of its address")
    call.store.large[file.sha256] = file
    return Reply(b"")


def lfs_verify(call: Call) -> Reply:
    return Reply(b"", 200 if call.json["oid"] in call.store.large else 404)


def xet_token(call: Call) -> Reply:
    if call.cas_url is None:
        raise HubError(404, "Xet is not enabled here")
    if call.parts["right"] == "read":
        call.store.opened(*call.key)
    else:
        proposing(call) if call.flag("create_pr") else writing(call, unquote(call.parts["rev"]))
    until = int(time.time()) + 3600
    headers = {"X-Xet-Cas-Url": call.cas_url, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(until)}
    return Reply({"casUrl": call.cas_url, "exp": until, "accessToken": "xet"}, 200, headers)
