"""Publishing on the Hub double: the order of what is done, and what a second run leaves alone."""

import re
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from hub_double import HubDouble
from made_publication import files_of, running, silently, small_release, state, writes

from safesail.errors import InputError
from safesail.release.manifest import REPO_TYPES
from safesail.release.plan import plan_publication
from safesail.release.publish import publish
from safesail.release.remote import remote_files


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
