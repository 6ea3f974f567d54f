"""Publishing against the Hub double: the plan, the order, the refusals, interruption at every kind of request."""

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from hub_double import HubDouble
from hub_double_store import Store

from safesail.errors import InputError
from safesail.release.manifest import REPO_TYPES, write_manifest
from safesail.release.plan import megabytes, plan_publication
from safesail.release.publish import Published, publish
from safesail.release.remote import Hub, may_write, remote_files

TOKEN = "hf_alice_write"
CARDS = {
    "saes": "library_name: safesail\nlicense: mit\n",
    "neurons": "license: mit\nconfigs:\n- config_name: neurons\n  data_files: neurons/train.parquet\n",
    "examples": "license: mit\nextra_gated_heading: These texts offend\n",
    "inspector": "title: small\nsdk: gradio\napp_file: app.py\n",
}
FILES = {
    "saes": {"config.json": b"{}\n", "layers.0/weights.safetensors": bytes(1_200_000), ".draft": b"never published"},
    "neurons": {"neurons/train.parquet": bytes(300_000), "old.txt": b"old\n"},
    "examples": {"examples/train.parquet": b"examples " * 100},
    "inspector": {"app.py": b"print()\n"},
}
READS = ("GET", "HEAD")


def small_release(folder: Path, version: str = "1.0.0", organization: str = "acme", **changed: dict[str, Any]) -> Path:
    """A release of a few bytes. changed: per part {name: content, or None to leave it out}."""
    for part in REPO_TYPES:
        files = {"README.md": f"---\n{CARDS[part]}---\n# {part}\n".encode(), **FILES[part], **changed.get(part, {})}
        for name, content in files.items():
            if content is not None:
                (folder / part / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / part / name).write_bytes(content)
        gated = "manual" if part == "examples" else None
        write_manifest(folder / part, part, "small", organization, "Small things", version, gated)
    return folder


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_release(tmp_path_factory.mktemp("release") / "run")


@contextlib.contextmanager
def running(folder: Path, xet: bool = False) -> Iterator[HubDouble]:
    """A double that answers at once, which this process uses as alice."""
    with HubDouble(folder, xet) as double, double.used(TOKEN):
        yield double


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[HubDouble]:
    with running(tmp_path / "hub") as double:
        yield double


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Nobody waits; the seconds that were asked for."""
    asked: list[float] = []
    monkeypatch.setattr(time, "sleep", asked.append)
    return asked


def silently(folder: Path, **options: Any) -> Published:
    token = options.pop("token", None)
    return publish(plan_publication(folder, **options), token=token, say=lambda line: None)


def writes(hub: HubDouble) -> list[tuple[str, str]]:
    """The requests that change something, in their order."""
    return [
        (seen.method, seen.path)
        for seen in hub.requests
        if seen.method not in READS and seen.path != "/api/validate-yaml"
    ]


def state(hub: HubDouble) -> dict[str, Any]:
    """All that a reader can see of the repositories, without dates and hashes of commits."""
    repos = {
        repo.id: {
            "files": repo.files,
            "commits": [commit.title for commit in repo.commits],
            "tags": {name: repo.at(name).files == repo.at("main").files for name in repo.tags},
            "private": repo.private,
            "gated": repo.gated,
            "pull requests": [each.title for each in repo.pull_requests],
        }
        for repo in hub.store.repos.values()
    }
    collections = [
        (each.title, each.owner, each.private, sorted((item["type"], item["id"]) for item in each.items))
        for each in hub.store.collections.values()
    ]
    return {"repos": repos, "collections": collections}


def files_of(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


# --- the plan -----------------------------------------------------------------------------------------------------


def test_dry_run_is_a_table_that_ends_with_the_command(release: Path) -> None:
    lines = plan_publication(release).lines()
    assert re.fullmatch(r"small v1\.0\.0: 4 repositories, 14 files, 1\.5 MB", lines[0])
    table = [re.split(r"\s{2,}", line) for line in lines[2:7]]
    assert table[0] == ["repository", "kind", "files", "size", "visibility", "access"]
    assert table[1] == ["acme/small-saes", "model", "4", "1.2 MB", "private → public", "open"]
    assert table[2][:4] == ["acme/small-neurons", "data set", "4", "0.3 MB"]
    assert table[3][4:] == ["private → public", "gated (manual): you let readers in one by one"]
    assert table[4][:3] == ["acme/small-inspector", "Space", "3"]
    assert lines[8:10] == ["largest files", "     1.2 MB  acme/small-saes/layers.0/weights.safetensors"]
    text = "\n".join(lines)
    assert "gated       examples\n" in text
    assert "tag         v1.0.0 on every repository\n" in text
    assert "collection  “Small things” of acme: Small things: sparse autoencoders" in text
    assert lines[-1] == f"Publish it:  safesail publish {release}"


def test_dry_run_says_what_private_and_pull_requests_leave_as_it_is(release: Path) -> None:
    private = plan_publication(release, private=True).lines()
    assert private[-1].endswith(f"safesail publish {release} --private")
    assert "public" not in "\n".join(private[:8])
    proposed = plan_publication(release, create_pr=True).lines()
    assert proposed[-1].endswith("--create-pr")
    assert "One pull request on each repository whose content differs; nothing else is changed." in proposed
    assert not any(line.startswith(("tag", "collection", "gated  ")) for line in proposed)


def test_plan_as_json_holds_every_file_and_checksum(release: Path) -> None:
    plan = json.loads(json.dumps(plan_publication(release).to_json()))
    saes = plan["repos"][0]
    assert (saes["repo_id"], saes["repo_type"], saes["gated"]) == ("acme/small-saes", "model", None)
    assert set(saes["files"]) == {"README.md", "config.json", "layers.0/weights.safetensors", "safesail.json"}
    # echo '{}' | sha256sum
    assert saes["files"]["config.json"]["sha256"].startswith("ca3d163bab055381827226140568f3be")
    assert plan["tag"] == "v1.0.0"
    assert plan["organization"] == "acme"


def test_description_of_the_collection_is_no_longer_than_the_hub_allows(tmp_path: Path) -> None:
    folder = small_release(tmp_path / "run")
    for part in REPO_TYPES:
        gated = "auto" if part == "examples" else None
        write_manifest(folder / part, part, "small", "acme", "A very long title " * 20, "1.0.0", gated)
    plan = plan_publication(folder)
    assert len(plan.description) == 150
    assert len(plan.collection) <= 60


def test_bytes_are_shown_with_a_unit() -> None:
    assert [megabytes(n) for n in (0, 99_000, 100_000, 1_500_000_000)] == ["0.0 kB", "99.0 kB", "0.1 MB", "1.5 GB"]


def _break(folder: Path, name: str, content: bytes | None) -> None:
    (folder / name).unlink(missing_ok=True)
    if content is not None:
        (folder / name).write_bytes(content)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("saes/config.json", b"{ }", r"saes/config\.json is not the file .*safesail build .* --force"),
        ("neurons/old.txt", None, r"neurons/old\.txt is missing"),
        ("inspector/new.py", b"", r"inspector/new\.py is not in safesail\.json"),
        ("saes/README.md", b"---\nlicense: [mit\n---\n", r"front matter of .*saes/README\.md is broken"),
        ("neurons/README.md", b"---\n- a list\n---\n", r"front matter of .*neurons/README\.md is broken"),
        ("examples/README.md", b"# no front matter\n", r"does not begin with front matter"),
        ("saes/README.md", None, r"README\.md is missing"),
        ("saes/safesail.json", None, r"no finished saes; type `safesail build"),
        ("saes/safesail.json", b"{", r"not valid JSON"),
    ],
)
def test_folder_that_is_not_as_it_was_built_is_refused(
    tmp_path: Path, name: str, content: bytes | None, words: str
) -> None:
    folder = small_release(tmp_path / "run")
    (folder / "run.json").write_text("{}")
    _break(folder, name, content)
    with pytest.raises(InputError, match=words):
        plan_publication(folder)


def test_release_of_nobody_is_refused_with_the_command_that_names_its_owner(tmp_path: Path) -> None:
    folder = small_release(tmp_path / "run", organization="")
    with pytest.raises(InputError, match=r"safesail run RECIPE --out .* --adopt --set publish\.organization=NAME"):
        plan_publication(folder)


def test_id_that_the_hub_would_refuse_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    folder = small_release(tmp_path / "run")
    for part in REPO_TYPES:
        write_manifest(folder / part, part, "two--dashes", "acme", "t", "1.0.0", None)
    with pytest.raises(InputError, match="the Hub would refuse the id 'acme/two--dashes-saes'"):
        plan_publication(folder)


def test_folders_of_two_versions_are_refused(tmp_path: Path) -> None:
    folder = small_release(tmp_path / "run")
    write_manifest(folder / "neurons", "neurons", "small", "acme", "Small things", "1.1.0", None)
    with pytest.raises(InputError, match=r"not of one release: their version differs \('1\.1\.0', '1\.0\.0'\)"):
        plan_publication(folder)


def test_release_that_lacks_parts_is_published_unless_it_is_a_run(tmp_path: Path) -> None:
    folder = small_release(tmp_path / "converted")
    shutil.rmtree(folder / "examples")
    assert [repo.part for repo in plan_publication(folder).repos] == ["saes", "neurons", "inspector"]
    (folder / "run.json").write_text("{}")
    with pytest.raises(InputError, match="no finished examples"):
        plan_publication(folder)


# --- doing it -----------------------------------------------------------------------------------------------------


def test_everything_is_public_tagged_gated_and_collected(hub: HubDouble, release: Path) -> None:
    done = silently(release)
    for part, repo_type in REPO_TYPES.items():
        repo = hub.repo(repo_type, f"acme/small-{part}")
        published = {name: content for name, content in repo.files.items() if name != ".gitattributes"}
        assert published == files_of(release / part)
        assert [commit.title for commit in repo.commits] == ["initial commit", "Release v1.0.0 of small"]
        assert repo.tags == {"v1.0.0": repo.commits[-1].sha}
        assert (repo.private, repo.gated) == (False, "manual" if part == "examples" else False)
        assert done.commits[repo.id] == repo.commits[-1].sha
    assert state(hub)["collections"] == [
        (
            "Small things",
            "acme",
            False,
            [
                ("dataset", "acme/small-examples"),
                ("dataset", "acme/small-neurons"),
                ("model", "acme/small-saes"),
                ("space", "acme/small-inspector"),
            ],
        )
    ]
    assert done.urls == [
        f"{hub.url}/acme/small-saes",
        f"{hub.url}/datasets/acme/small-neurons",
        f"{hub.url}/datasets/acme/small-examples",
        f"{hub.url}/spaces/acme/small-inspector",
    ]
    assert [repo.state for repo in done.repos] == ["created"] * 4
    assert done.lines()[0].startswith("created  ")
    assert done.lines()[-1].startswith("collection  ")
    assert remote_files("acme/small-saes", "model")["config.json"].size == 3


def test_nothing_is_public_before_it_is_verified_and_gated(hub: HubDouble, release: Path) -> None:
    seen: list[tuple[str, str, list[str]]] = []  # of every request: what is public just before it

    def watch(request: str) -> bool:
        seen.append((*request.split(" "), [repo.id for repo in hub.store.repos.values() if not repo.private]))  # type: ignore[arg-type]
        return False

    hub.fail(watch, 500)
    silently(release)
    requests = [(method, path) for method, path, _ in seen]
    settings = [i for i, (method, path) in enumerate(requests) if method == "PUT" and path.endswith("/settings")]
    kinds = ["models", "datasets", "datasets", "spaces"]
    assert [requests[i][1].split("/")[2] for i in settings] == ["datasets", *kinds]  # the gate, then models first
    gate, opened = settings[0], settings[1]
    commits = [i for i, (_, path) in enumerate(requests) if "/commit/" in path]
    trees = [i for i, (_, path) in enumerate(requests) if "/tree/" in path and i > commits[-1]]
    tags = [i for i, (method, path) in enumerate(requests) if method == "POST" and "/tag/" in path]
    assert gate < commits[0] < commits[-1] < trees[0] < trees[3] < tags[0] < tags[-1] < opened
    assert {requests[i][1].split("/")[4] for i in trees[:4]} == {f"small-{part}" for part in REPO_TYPES}
    assert not any(public for _, _, public in seen[: opened + 1])


def test_second_run_changes_nothing(hub: HubDouble, release: Path) -> None:
    first = silently(release)
    before = state(hub)
    hub.requests.clear()
    second = silently(release)
    assert writes(hub) == []
    assert state(hub) == before
    assert [repo.state for repo in second.repos] == ["unchanged"] * 4
    assert second.commits == {}
    assert second.collection == first.collection
    assert [repo.commit for repo in second.repos] == [repo.commit for repo in first.repos]


def test_new_version_uploads_what_differs_and_deletes_what_is_gone(
    hub: HubDouble, release: Path, tmp_path: Path
) -> None:
    silently(release)
    hub.repo("dataset", "acme/small-neurons").put({"NOTES.md": b"by hand"})
    old = hub.repo("dataset", "acme/small-neurons").tags["v1.0.0"]
    newer = small_release(tmp_path / "newer", "1.1.0", neurons={"old.txt": None, "new.txt": b"new\n"})
    for part in ("saes", "examples", "inspector"):  # their version alone is new
        assert files_of(newer / part).keys() == files_of(release / part).keys()
    hub.requests.clear()
    said: list[str] = []
    done = publish(plan_publication(newer), say=said.append)
    neurons = hub.repo("dataset", "acme/small-neurons")
    assert "acme/small-neurons: 2 files to upload, 1.0 kB; 1 to delete" in [_rounded(line) for line in said]
    assert set(neurons.files) == {*files_of(newer / "neurons"), ".gitattributes", "NOTES.md"}
    assert neurons.tags == {"v1.0.0": old, "v1.1.0": neurons.commits[-1].sha}
    assert "old.txt" in neurons.at("v1.0.0").files
    assert not any(path.startswith("/storage") for _, path in writes(hub))  # no large file again
    assert [repo.state for repo in done.repos] == ["updated"] * 4
    assert _restarts(hub) == 0  # its own commit starts it


def _rounded(line: str) -> str:
    """The size of a manifest is not written down here."""
    return re.sub(r"upload, 0\.\d kB|upload, 1\.\d kB", "upload, 1.0 kB", line)


def _restarts(hub: HubDouble) -> int:
    return hub.repo("space", "acme/small-inspector").n_restarts


def test_space_starts_anew_when_only_the_others_changed(hub: HubDouble, release: Path) -> None:
    silently(release)
    assert _restarts(hub) == 0
    hub.repo("dataset", "acme/small-neurons").put({"old.txt": b"changed by hand"})
    assert [repo.state for repo in silently(release).repos] == ["unchanged", "updated", "unchanged", "unchanged"]
    assert _restarts(hub) == 1


def test_private_stays_private_until_it_is_published_and_public_stays_public(hub: HubDouble, release: Path) -> None:
    done = silently(release, private=True)
    assert all(repo.private for repo in hub.store.repos.values())
    assert [each.private for each in hub.store.collections.values()] == [True]
    assert all(repo.private for repo in done.repos)
    assert "HF_TOKEN" in done.lines()[-1]
    silently(release)
    assert not any(repo.private for repo in hub.store.repos.values())
    assert [each.private for each in hub.store.collections.values()] == [False]
    assert not any(repo.private for repo in silently(release, private=True).repos)
    assert not any(repo.private for repo in hub.store.repos.values())


def test_gate_is_set_again_before_new_files_come_into_a_public_repository(
    hub: HubDouble, release: Path, tmp_path: Path
) -> None:
    silently(release)
    hub.repo("dataset", "acme/small-examples").gated = False
    hub.requests.clear()
    silently(small_release(tmp_path / "newer", "1.1.0"))
    asked = [path.rpartition("/small-")[2] for _, path in writes(hub)]
    assert asked[0] == "examples/settings"
    assert hub.repo("dataset", "acme/small-examples").gated == "manual"


def test_gate_that_the_hub_does_not_set_keeps_the_examples_private(
    hub: HubDouble, release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = huggingface_hub.HfApi.update_repo_settings

    def without_gate(self: Any, repo_id: str, **options: Any) -> None:
        if "gated" not in options:
            settings(self, repo_id, **options)

    monkeypatch.setattr(huggingface_hub.HfApi, "update_repo_settings", without_gate)
    with pytest.raises(InputError, match="small-examples is not gated as it should be and stays private"):
        silently(release)
    assert hub.repo("dataset", "acme/small-examples").private


def test_file_that_arrives_damaged_keeps_everything_private(
    hub: HubDouble, release: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = huggingface_hub.HfApi.create_commit

    def damaging(self: Any, repo_id: str, *args: Any, **options: Any) -> Any:
        made = commit(self, repo_id, *args, **options)
        if repo_id.endswith("-neurons"):
            hub.repo("dataset", repo_id).put({"neurons/train.parquet": b"damaged"})
        return made

    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", damaging)
    with pytest.raises(InputError, match=r"small-neurons does not hold the neurons/train\.parquet that was uploaded"):
        silently(release)
    assert all(repo.private and not repo.tags for repo in hub.store.repos.values())


def test_somebodys_own_collection_of_the_same_title_stays_private(hub: HubDouble, release: Path) -> None:
    api = huggingface_hub.HfApi()
    hub.create("model", "alice/mine", {"a": b"a"})
    mine = api.create_collection("Small things", namespace="acme", private=True)
    api.add_collection_item(mine.slug, "alice/mine", "model")
    silently(release)
    (known,) = hub.store.collections.values()
    assert known.private
    assert len(known.items) == 5


def test_xet_uploads_the_same_bytes(tmp_path: Path, release: Path) -> None:
    with running(tmp_path / "hub", xet=True) as hub:
        silently(release)
        repo = hub.repo("model", "acme/small-saes")
        assert repo.files["layers.0/weights.safetensors"] == bytes(1_200_000)
        assert len(repo.commits) == 2
        assert not repo.private
        assert not any(path.startswith("/storage") for _, path in writes(hub))
        assert [one.state for one in silently(release).repos] == ["unchanged"] * 4


# --- refused before anything is changed ---------------------------------------------------------------------------


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


# --- failures and interruptions -----------------------------------------------------------------------------------

WRITES = {
    "create": "POST /api/repos/create",
    "gate": "PUT /api/datasets/.*examples/settings",
    "preupload": "POST .*/preupload/",
    "lfs batch": "POST .*/info/lfs/objects/batch",
    "storage": "PUT /storage/",
    "commit": "POST .*neurons/commit/",
    "tag": "POST .*/tag/",
    "collection": "POST /api/collections$",
    "item": "POST /api/collections/.*/items",
    "visibility": "PUT /api/spaces/.*/settings",
    "open collection": "PATCH /api/collections/",
}
READINGS = {
    "whoami": "GET /api/whoami-v2",
    "card": "POST /api/validate-yaml",
    "info": "GET /api/models/acme/small-saes",
    "refs": "GET .*/refs",
    "tree": "GET .*/tree/",
    "collections": "GET /api/collections",
}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, release: Path) -> dict[str, Any]:
    """The state after a publication that nothing has disturbed."""
    with running(tmp_path_factory.mktemp("calm")) as hub:
        silently(release)
        return state(hub)


@pytest.mark.parametrize("how", [500, 429, "cut", "lost"])
def test_every_kind_of_request_may_fail_once(
    hub: HubDouble, release: Path, expected: dict[str, Any], naps: list[float], how: int | str
) -> None:
    for request in (WRITES | READINGS).values():
        hub.fail(request, how)
    silently(release)
    assert state(hub) == expected
    assert len([seen for seen in hub.requests if seen.status == how]) >= len(WRITES | READINGS) - 1


@pytest.mark.parametrize("name", WRITES)
def test_run_after_a_lasting_failure_goes_on(
    hub: HubDouble, release: Path, expected: dict[str, Any], naps: list[float], name: str
) -> None:
    hub.fail(WRITES[name], 503, times=100)
    with pytest.raises(InputError, match=r"could not .*the Hub answered 503.*run the same command again later"):
        silently(release)
    hub.recover()
    silently(release)
    assert state(hub) == expected


@pytest.mark.parametrize("n", [2, 7, 14, 20, 27])
def test_killed_process_is_gone_on_with(
    tmp_path: Path, hub: HubDouble, release: Path, expected: dict[str, Any], n: int
) -> None:
    code = "import sys; from pathlib import Path; from safesail.release import plan, publish\n"
    code += "publish.publish(plan.plan_publication(Path(sys.argv[1])))"
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(release)], env=hub.environment(TOKEN), stdout=subprocess.DEVNULL
    )
    seen: list[str] = []

    def kill(request: str) -> bool:
        seen.append(request)
        written = [each for each in seen if not each.startswith(READS) and "validate-yaml" not in each]
        if len(written) == n and child.returncode is None:
            os.kill(child.pid, signal.SIGKILL)
        return False

    hub.fail(kill, 500)
    assert child.wait(60) == -signal.SIGKILL
    hub.recover()
    silently(release)
    assert state(hub) == expected


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, "does not accept this login"),
        (402, "asks for payment"),
        (403, r"may not do that .*hf auth login"),
        (404, "it is not there, or not for this login"),
        (409, "changed it at the same time"),
        (412, "changed it at the same time"),
        (413, "larger than the account has room for"),
        (429, "rate limit is reached; run the same command again in some minutes"),
        (500, "answered 500"),
        (418, "answered 418"),
    ],
)
def test_refusal_of_the_hub_is_one_sentence(
    hub: HubDouble, release: Path, naps: list[float], status: int, words: str
) -> None:
    hub.fail("POST .*/commit/", status, times=100)
    with pytest.raises(InputError, match=f"could not upload acme/small-saes: .*{words}") as caught:
        silently(release)
    assert "\n" not in str(caught.value)
    assert TOKEN not in str(caught.value)


def test_hub_says_how_long_to_wait(hub: HubDouble, release: Path, naps: list[float]) -> None:
    hub.fail("GET /api/whoami-v2", 429, retry_after=7)
    said: list[str] = []
    publish(plan_publication(release), say=said.append)
    assert 8 in naps  # a second more than asked, since the headers are rounded
    assert "could not log in to the Hub (the Hub answered 429); trying again in 8 s" in said


def test_wait_that_is_too_long_is_left_to_the_person(hub: HubDouble, release: Path, naps: list[float]) -> None:
    hub.fail("GET /api/whoami-v2", 429, retry_after=3600)
    with pytest.raises(InputError, match="rate limit is reached; run the same command again in 3600 s"):
        silently(release)
    assert 3601 not in naps


def test_no_network_and_offline_mode_are_sentences(tmp_path: Path, release: Path, naps: list[float]) -> None:
    with HubDouble(tmp_path / "hub") as hub:
        with hub.used(TOKEN, offline=True), pytest.raises(InputError, match="switched off here by HF_HUB_OFFLINE"):
            silently(release)
        assert hub.requests == []
    with hub.used(TOKEN), pytest.raises(InputError, match=r"the Hub cannot be reached .* it goes on"):
        silently(release)


def test_token_is_nowhere(
    hub: HubDouble, release: Path, tmp_path: Path, naps: list[float], capfd: pytest.CaptureFixture[str]
) -> None:
    said: list[str] = []
    home = tmp_path / "home"
    home.mkdir()
    hub.fail("POST .*/commit/", 500, times=1)
    hub.fail("POST .*/tag/", 403, times=1)
    with hub.used(TOKEN, home=home):
        with pytest.raises(InputError) as caught:
            publish(plan_publication(release), say=said.append)
        done = publish(plan_publication(release), say=said.append)
    texts = [*said, *done.lines(), json.dumps(done.to_json()), str(caught.value), *capfd.readouterr()]
    texts += [repr(Hub.login(TOKEN)), json.dumps(plan_publication(release).to_json())]
    assert not any(TOKEN in text for text in texts)
    written = [path for folder in (release, home) for path in folder.rglob("*") if path.is_file()]
    assert not any(TOKEN.encode() in path.read_bytes() for path in written)


def test_answer_that_holds_the_token_is_printed_without_it(naps: list[float]) -> None:
    said: list[str] = []

    def refuse(_: Any) -> None:
        raise OSError(f"Bearer {TOKEN} was refused")

    with pytest.raises(InputError, match=r"could not try: Bearer … was refused"):
        Hub.login(TOKEN, said.append).ask("try", refuse)


# --- pull requests ------------------------------------------------------------------------------------------------


def test_pull_requests_are_opened_once_where_the_content_differs(hub: HubDouble, release: Path, tmp_path: Path) -> None:
    silently(release)
    newer = small_release(tmp_path / "newer", neurons={"old.txt": None, "new.txt": b"new\n"})
    before = {repo.id: (repo.commits, dict(repo.tags), repo.gated) for repo in hub.store.repos.values()}
    hub.repo("dataset", "acme/small-examples").granted.add("bob")
    with hub.used("hf_bob_write"):  # no member of acme
        first = silently(newer, create_pr=True)
        hub.requests.clear()
        second = silently(newer, create_pr=True)
        assert writes(hub) == []
    assert [repo.state for repo in first.repos] == ["unchanged", "proposed", "unchanged", "unchanged"]
    assert [repo.state for repo in second.repos] == ["unchanged", "proposed already", "unchanged", "unchanged"]
    assert second.repos[1].pull_request == first.repos[1].pull_request
    assert first.collection is None
    assert "discussions/1" in first.lines()[1]
    (request,) = hub.repo("dataset", "acme/small-neurons").pull_requests
    proposed = hub.repo("dataset", "acme/small-neurons").at("refs/pr/1").files
    assert request.title == "Release v1.0.0 of small"
    assert set(proposed) == {*files_of(newer / "neurons"), ".gitattributes"}
    assert {repo.id: (repo.commits, dict(repo.tags), repo.gated) for repo in hub.store.repos.values()} == before


def test_open_request_with_another_content_is_not_taken_for_this_one(
    hub: HubDouble, release: Path, tmp_path: Path
) -> None:
    silently(release)
    silently(small_release(tmp_path / "a", neurons={"old.txt": b"a"}), create_pr=True)
    assert (
        silently(small_release(tmp_path / "b", neurons={"old.txt": b"b"}), create_pr=True).repos[1].state == "proposed"
    )
    assert len(hub.repo("dataset", "acme/small-neurons").pull_requests) == 2


def test_lost_answer_opens_no_second_request(hub: HubDouble, release: Path, tmp_path: Path, naps: list[float]) -> None:
    silently(release)
    newer = small_release(tmp_path / "newer", neurons={"old.txt": b"newer"})
    hub.fail("POST .*neurons/commit/", "lost")
    assert silently(newer, create_pr=True).repos[1].pull_request is not None
    assert len(hub.repo("dataset", "acme/small-neurons").pull_requests) == 1


def test_pull_request_needs_all_repositories(hub: HubDouble, release: Path) -> None:
    hub.create("model", "acme/small-saes", release / "saes")
    with pytest.raises(InputError, match=r"there is no acme/small-neurons .* without --create-pr"):
        silently(release, create_pr=True)
    assert writes(hub) == []
