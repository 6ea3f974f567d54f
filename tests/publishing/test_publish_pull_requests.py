"""Releases proposed as pull requests."""

from pathlib import Path

import pytest
from hub_double import HubDouble
from made_publication import files_of, silently, small_release, writes

from safesail.errors import InputError


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
