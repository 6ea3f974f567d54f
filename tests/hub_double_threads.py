"""Discussions, pull requests and collections of the Hub double."""

import re
from typing import Any
from urllib.parse import unquote

from hub_double_calls import Call, Reply, proposing
from hub_double_store import Collection, Discussion, HubError, Repo, comment, fresh_id, now

# --- discussions and pull requests ------------------------------------------------------------------------------------


def threads(call: Call) -> Reply:
    repo, kind, status = call.store.seen(*call.key), call.query.get("type"), call.query.get("status")
    found = [thread_json(repo, thread) for thread in repo.discussions]
    if kind and kind[0] != "all":
        found = [row for row in found if row["isPullRequest"] == (kind[0] == "pull_request")]
    if status and status[0] != "all":
        found = [row for row in found if (row["status"] in ("open", "draft")) == (status[0] == "open")]
    return Reply({"discussions": found, "count": len(found), "start": 0})


def open_thread(call: Call) -> Reply:
    repo, asked = proposing(call), call.json
    head = repo.at("main").sha if asked.get("pullRequest") else None
    thread = repo.open_thread(asked["title"], asked.get("description") or "", call.caller.name, head)
    if head:
        thread.status = "draft"
    return Reply({"num": thread.num, "pullRequest": thread.is_pull_request})


def thread_of(call: Call, repo: Repo) -> Discussion:
    number = int(call.parts["num"])
    if not 0 < number <= len(repo.discussions):
        raise HubError(404, f"Discussion {number} not found")
    return repo.discussions[number - 1]


def thread(call: Call) -> Reply:
    repo = call.store.seen(*call.key)
    return Reply(thread_json(repo, thread_of(call, repo), with_events=True))


def thread_json(repo: Repo, thread: Discussion, with_events: bool = False) -> dict[str, Any]:
    found = {
        "num": thread.num,
        "title": thread.title,
        "status": thread.status,
        "isPullRequest": thread.is_pull_request,
        "createdAt": thread.created,
        "author": {"name": thread.author},
        "repo": {"name": repo.id, "type": repo.repo_type},
    }
    if with_events:
        merged = {"mergeCommitId": thread.merged_as} if thread.merged_as else {}
        found |= {"events": thread.events, "changes": {"base": "refs/heads/main", **merged}}
        found |= {"filesWithConflicts": [], "diff": ""}
    return found


def change_thread(call: Call) -> Reply:
    repo, asked, change = proposing(call), call.json, call.parts["change"]
    found, name = thread_of(call, repo), call.caller.name
    if change == "comment":
        return Reply({"newMessage": found.add_event(name, "comment", comment(asked["comment"]))})
    if name != found.author:
        call.caller.must_write(repo.namespace)
    if change == "title":
        event = found.add_event(name, "title-change", {"from": found.title, "to": asked["title"]})
        found.title = asked["title"]
        return Reply({"newTitle": event})
    found.status = asked["status"]
    return Reply({"newStatus": found.add_event(name, "status-change", {"status": asked["status"]})})


def merge(call: Call) -> Reply:
    repo = call.store.written(*call.key)
    found = thread_of(call, repo)
    if not found.is_pull_request or found.status not in ("open", "draft"):
        raise HubError(409, f"Pull request {found.num} cannot be merged: it is {found.status}")
    repo.merge(found, call.caller.name)
    return Reply({})


# --- collections ------------------------------------------------------------------------------------------------------


def collections(call: Call) -> Reply:
    owner, item = call.query.get("owner"), call.query.get("item")
    found = [c for c in call.store.collections.values() if not c.private or call.caller.belongs_to(c.owner)]
    found = [c for c in found if not owner or c.owner in owner]
    found = [c for c in found if not item or any(f"{i['type']}s/{i['id']}" in item for i in c.items)]
    rows = [collection_json(c) for c in found]
    return Reply([{k: v for k, v in {**row, "items": row["items"][:4]}.items() if k != "position"} for row in rows])


def create_collection(call: Call) -> Reply:
    asked = call.json
    title, owner = asked["title"], asked["namespace"]
    call.caller.must_write(owner, "You don't have the rights to create a collection here")
    if not 0 < len(title) < 60 or len(asked.get("description", "")) > 150:
        raise HubError(400, "A title has at most 59 characters, a description at most 150")
    for known in call.store.collections.values():
        if (known.owner, known.title) == (owner, title):
            raise HubError(409, "A collection of this title already exists", slug=known.slug)
    slug = f"{owner}/{re.sub(r'[^a-z0-9]+', '-', title.lower()).strip('-')}-{fresh_id()}"
    made = Collection(slug, title, owner, asked.get("description", ""), bool(asked.get("private")))
    call.store.collections[slug] = made
    return Reply(collection_json(made))


def collection_of(call: Call, to_write: bool = False) -> Collection:
    found = call.store.collections.get(unquote(call.parts["slug"]))
    if found is None or (found.private and not call.caller.belongs_to(found.owner)):
        raise HubError(404 if call.caller.name else 401, "Collection not found")
    if to_write:
        call.caller.must_write(found.owner, "You don't have the rights to change this collection")
    return found


def collection(call: Call) -> Reply:
    if call.method == "GET":
        return Reply(collection_json(collection_of(call)))
    found = collection_of(call, to_write=True)
    if call.method == "DELETE":
        del call.store.collections[found.slug]
        return Reply({})
    for key in {"title", "description", "private"} & set(call.json):
        setattr(found, key, call.json[key])
    return Reply({"data": collection_json(found)})


def add_item(call: Call) -> Reply:
    found, item = collection_of(call, to_write=True), call.json["item"]
    if any((known["type"], known["id"]) == (item["type"], item["id"]) for known in found.items):
        raise HubError(409, "This item is already in the collection")
    call.store.seen(call.caller, item["type"], item["id"])
    note = {"note": {"text": call.json["note"], "html": ""}} if call.json.get("note") else {}
    found.items.append({"_id": fresh_id(), **item, "position": len(found.items), **note})
    found.updated = now()
    return Reply(collection_json(found))


def change_item(call: Call) -> Reply:
    found = collection_of(call, to_write=True)
    item = next((item for item in found.items if item["_id"] == call.parts["item"]), None)
    if item is None:
        raise HubError(404, "This item is not in the collection")
    if call.method == "DELETE":
        found.items.remove(item)
    elif call.json.get("note"):
        item["note"] = {"text": call.json["note"], "html": ""}
    return Reply({})


def collection_json(found: Collection) -> dict[str, Any]:
    return {
        "slug": found.slug,
        "title": found.title,
        "description": found.description,
        "owner": found.owner,
        "items": found.items,
        "lastUpdated": found.updated,
        "private": found.private,
        "position": 0,
        "theme": "orange",
        "upvotes": 0,
    }
