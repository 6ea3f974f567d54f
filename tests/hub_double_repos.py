"""Accounts, repositories and references of the Hub double."""

from typing import Any
from urllib.parse import unquote

from hub_double_calls import Call, Reply, page
from hub_double_store import NAMESPACES, REPO_TYPES, Commit, File, HubError, Repo, fresh_id, front_matter

# --- accounts and repositories ----------------------------------------------------------------------------------------


def whoami(call: Call) -> Reply:
    name, role = call.caller
    if not name:
        raise HubError(401, "Invalid username or password.")
    orgs = [{"type": "org", "name": org, "roleInOrg": "write"} for org in NAMESPACES[name] if org != name]
    auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": role}}
    return Reply({"type": "user", "id": name, "name": name, "fullname": name, "orgs": orgs, "auth": auth})


def create_repo(call: Call) -> Reply:
    asked = call.json
    repo_type, namespace = asked.get("type") or "model", asked.get("organization") or call.caller.name
    call.caller.must_write(
        namespace, f'You don\'t have the rights to create a {repo_type} under the namespace "{namespace}"'
    )
    id = f"{namespace}/{asked['name']}"
    if known := call.store.repos.get((repo_type, id)):
        raise HubError(409, f"You already created this {repo_type} repo", url=page(call, known), name=id)
    if repo_type not in REPO_TYPES:
        raise HubError(400, f"Invalid repo type {repo_type}")
    repo = call.store.create(repo_type, id, is_private(asked), asked.get("sdk"))
    return Reply({"url": page(call, repo), "name": id, "id": fresh_id()})


def is_private(asked: dict[str, Any]) -> bool:
    """What the fields `visibility` or, of older clients, `private` ask for."""
    return asked.get("visibility", "private" if asked.get("private") else "public") != "public"


def delete_repo(call: Call) -> Reply:
    asked = call.json
    key = (asked.get("type") or "model", f"{asked.get('organization') or call.caller.name}/{asked['name']}")
    call.store.written(call.caller, *key)
    del call.store.repos[key]
    return Reply({})


def settings(call: Call) -> Reply:
    repo, asked = call.store.written(*call.key), call.json
    if "visibility" in asked or "private" in asked:
        repo.private = is_private(asked)
    if asked.get("gated", False) not in (False, "auto", "manual"):
        raise HubError(400, "gated must be false, auto or manual")
    repo.gated = asked.get("gated", repo.gated)
    return Reply({"private": repo.private, "gated": repo.gated})


def info(call: Call) -> Reply:
    repo = call.store.seen(*call.key)
    return Reply(repo_json(repo, repo.at(unquote(call.parts.get("rev") or "main")), call.flag("blobs")))


def list_repos(call: Call) -> Reply:
    visible = [repo for repo in call.store.repos.values() if repo.repo_type == call.repo_type]
    visible = [repo for repo in visible if not repo.private or call.caller.belongs_to(repo.namespace)]
    rows = [repo_json(repo, repo.at("main"), False) for repo in visible]
    author, search = call.query.get("author"), call.query.get("search", [""])[0].lower()
    rows = [row for row in rows if (not author or row["author"] == author[0]) and search in row["id"].lower()]
    return Reply([row for row in rows if set(call.query.get("filter", [])) <= set(row["tags"])])


def repo_json(repo: Repo, commit: Commit, with_blobs: bool) -> dict[str, Any]:
    card = repo.card(commit)
    languages = card.get("language") or []
    tags = [*(card.get("tags") or []), *([languages] if isinstance(languages, str) else languages)]
    if card.get("license"):
        tags.append(f"license:{card['license']}")
    return {
        "_id": "0" * 24,
        "id": repo.id,
        **({"modelId": repo.id} if repo.repo_type == "model" else {}),
        "author": repo.namespace,
        "sha": commit.sha,
        "private": repo.private,
        "gated": repo.gated,
        "disabled": False,
        "createdAt": repo.created,
        "lastModified": commit.date,
        "downloads": 0,
        "likes": 0,
        "tags": tags,
        "cardData": card,
        "siblings": [sibling(name, file, with_blobs) for name, file in sorted(commit.files.items())],
        **({"sdk": repo.sdk, "runtime": RUNTIME} if repo.repo_type == "space" else {}),
        **{key: card[key] for key in ("library_name", "pipeline_tag") if key in card},
    }


def sibling(name: str, file: File, with_blobs: bool) -> dict[str, Any]:
    if not with_blobs:
        return {"rfilename": name}
    lfs = {"lfs": {"sha256": file.sha256, "size": len(file.content), "pointerSize": len(file.pointer)}}
    return {"rfilename": name, "size": len(file.content), "blobId": file.oid, **(lfs if file.large else {})}


def auth_check(call: Call) -> Reply:
    call.store.opened(*call.key)
    if call.parts.get("write"):
        call.store.written(*call.key)
    return Reply({})


RUNTIME = {
    "stage": "RUNNING",
    "hardware": {"current": "cpu-basic", "requested": "cpu-basic"},
    "storage": None,
    "gcTimeout": 172800,
}


def runtime(call: Call) -> Reply:
    call.store.seen(*call.key)
    return Reply(RUNTIME)


def restart(call: Call) -> Reply:
    call.store.written(*call.key).n_restarts += 1
    return Reply(RUNTIME)


def validate_yaml(call: Call) -> Reply:
    text = call.json["content"]
    try:
        if not front_matter(text):
            return Reply({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
    except HubError as error:
        return Reply({"errors": [{"message": error.message}], "warnings": []}, 400)
    return Reply({"errors": [], "warnings": []})


# --- references -------------------------------------------------------------------------------------------------------


def refs(call: Call) -> Reply:
    repo = call.store.seen(*call.key)
    pulls = {name: sha for name, sha in repo.branches.items() if name.startswith("refs/pr/")}
    heads = {name: sha for name, sha in repo.branches.items() if name not in pulls}

    def listed(named: dict[str, str], prefix: str) -> list[dict[str, str]]:
        return [{"name": name, "ref": prefix + name, "targetCommit": sha} for name, sha in named.items()]

    answer = {"branches": listed(heads, "refs/heads/"), "tags": listed(repo.tags, "refs/tags/"), "converts": []}
    return Reply({**answer, "pullRequests": listed(pulls, "")})


def branch(call: Call) -> Reply:
    repo, name = call.store.written(*call.key), unquote(call.parts["rev"])
    if call.method == "DELETE":
        return _deleted(repo.branches, name)
    if name in repo.branches:
        raise HubError(409, f"Reference already exists: refs/heads/{name}")
    repo.branches[name] = repo.at(call.json.get("startingPoint", "main")).sha
    return Reply({})


def tag(call: Call) -> Reply:
    repo, name = call.store.written(*call.key), unquote(call.parts["rev"])
    if call.method == "DELETE":
        return _deleted(repo.tags, name)
    if call.json["tag"] in repo.tags:
        raise HubError(409, f"Tag {call.json['tag']} already exists")
    repo.tags[call.json["tag"]] = repo.at(name).sha
    return Reply({})


def _deleted(named: dict[str, str], name: str) -> Reply:
    if named.pop(name, None) is None:
        raise HubError(404, f"Invalid rev id: {name}", "RevisionNotFound")
    return Reply({})
