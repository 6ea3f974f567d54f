"""What is refused before anything on the Hub is changed."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from hub_double import HubDouble
from hub_double_store import Store
from made_publication import TOKEN, silently, small_release, state, writes

from safesail.errors import InputError
from safesail.release.manifest import write_manifest
from safesail.release.remote import may_write


@pytest.mark.parametrize(
    ("token", "words"),
    [
        ("hf_alice_read", r"login of alice may only read; type `hf auth login` with a token that may write"),
        ("hf_bob_write", r"bob is not a member of acme, and may publish as bob"),
        ("hf_nobody", r"could not log in to the Hub: the Hub does not accept this login; set HF_TOKEN"),
    ],
)
def test_login_that_may_not_write_is_refused(hub: HubDouble, release: Path, token: str, words: str) -> None:
    with hub.used(token), pytest.raises(InputError, match=words) as caught:
        silently(release)
    assert writes(hub) == []
    assert token not in str(caught.value)


def test_nobody_logged_in_is_told_how_to(hub: HubDouble, release: Path) -> None:
    with hub.used(None), pytest.raises(InputError, match="type `hf auth login`"):
        silently(release)
    assert hub.requests == []


def test_given_token_comes_before_the_login(hub: HubDouble, release: Path) -> None:
    with hub.used("hf_bob_write"):
        assert [repo.state for repo in silently(release, token=TOKEN).repos] == ["created"] * 4


def _whoami(role: str = "write", in_acme: str | None = "write", **fine: Any) -> dict[str, Any]:
    orgs = [{"name": "acme", **({"roleInOrg": in_acme} if in_acme else {})}]
    access = {"role": role, **({"fineGrained": fine} if fine else {})}
    return {"name": "alice", "orgs": orgs, "auth": {"type": "access_token", "accessToken": access}}


def _scope(kind: str, name: str, *permissions: str) -> dict[str, Any]:
    return {"entity": {"type": kind, "name": name}, "permissions": list(permissions)}


@pytest.mark.parametrize(
    "user",
    [
        _whoami(),
        _whoami(in_acme="contributor"),
        _whoami(in_acme=None),
        _whoami("fineGrained", scoped=[_scope("org", "acme", "repo.content.read", "repo.write")]),
        _whoami("fineGrained", scoped=[_scope("model", "acme/a", "repo.write"), _scope("x", "acme/b", "repo.write")]),
        _whoami("fineGrained"),
        {"name": "acme", "auth": {"type": "oauth"}},
    ],
)
def test_login_that_may_write_or_does_not_say_passes(user: dict[str, Any]) -> None:
    may_write(user, "Acme", ["acme/a", "acme/b"])


@pytest.mark.parametrize(
    ("user", "words"),
    [
        (_whoami("read"), "may only read"),
        (_whoami(in_acme="read"), "has the role “read” in Acme"),
        (_whoami("fineGrained", scoped=[]), r"may not write to acme/a, acme/b"),
        (_whoami("fineGrained", scoped=[_scope("org", "acme", "repo.content.read")]), "acme/a, acme/b"),
        (_whoami("fineGrained", scoped=[_scope("model", "acme/a", "repo.write")]), r"may not write to acme/b;"),
        ({"name": "carol", "orgs": [], "auth": {}}, "carol is not a member of Acme"),
    ],
)
def test_login_that_says_it_may_not_write_is_refused(user: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError, match=words):
        may_write(user, "Acme", ["acme/a", "acme/b"])


@pytest.mark.parametrize(
    ("repo_type", "files", "words"),
    [
        ("space", {"app.py": b"theirs"}, "it holds files, and no safesail.json"),
        ("space", {"README.md": b"# theirs"}, "it holds files, and no safesail.json"),  # a second commit
        ("space", {"safesail.json": b"{"}, "safesail.json of acme/small-inspector on the Hub is not valid JSON"),
        ("space", {"safesail.json": b"{}"}, "is not the manifest of a safesail release"),
        ("space", {"safesail.json": b'{"schema": 99}'}, "has schema 99"),
    ],
)
def test_repository_that_is_not_ours_is_left_alone(
    hub: HubDouble, release: Path, repo_type: str, files: dict[str, bytes], words: str
) -> None:
    foreign = hub.create(repo_type, "acme/small-inspector", files)
    before = foreign.files
    with pytest.raises(InputError, match=words):
        silently(release)
    assert writes(hub) == []
    assert foreign.files == before
    assert len(hub.store.repos) == 1


def test_repository_of_another_release_is_left_alone(hub: HubDouble, release: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(release / "saes", other)
    write_manifest(other, "saes", "renamed", "acme", "Other", "1.0.0", None)
    hub.create("model", "acme/small-saes", other)
    with pytest.raises(InputError, match="is not this release: it holds the saes of renamed"):
        silently(release)
    assert writes(hub) == []


def test_repository_that_only_the_hub_has_written_into_is_taken(
    hub: HubDouble, release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = Store.create

    def with_readme(self: Store, repo_type: str, id: str, *rest: Any) -> Any:
        repo = make(self, repo_type, id, *rest)
        if repo_type == "space":  # as the Hub does: in the first commit
            (first,) = repo.all_commits.values()
            other = repo.put({"README.md": b"---\ntitle: Small\nsdk: gradio\n---\n"})
            repo.all_commits[first.sha] = first._replace(files=other.files)
            repo.branches["main"] = first.sha
        return repo

    monkeypatch.setattr(Store, "create", with_readme)
    hub.create("space", "acme/small-inspector", private=True)
    assert [repo.state for repo in silently(release).repos] == ["created"] * 4
    assert hub.repo("space", "acme/small-inspector").files["README.md"].startswith(b"---\ntitle: small\n")


def test_version_that_was_published_with_other_content_is_refused(
    hub: HubDouble, release: Path, tmp_path: Path
) -> None:
    silently(release)
    before = state(hub)
    other = small_release(tmp_path / "other", neurons={"old.txt": b"changed\n"})
    hub.requests.clear()
    with pytest.raises(InputError, match=r"has a v1\.0\.0 already with another old\.txt; raise the version"):
        silently(other)
    assert writes(hub) == []
    assert state(hub) == before


def test_card_that_the_hub_refuses_is_refused_before_anything_is_made(hub: HubDouble, release: Path) -> None:
    hub.fail("POST /api/validate-yaml", 400)
    with pytest.raises(InputError, match=r"the Hub refuses the front matter of .*saes/README\.md .*made failure"):
        silently(release)
    assert writes(hub) == []
