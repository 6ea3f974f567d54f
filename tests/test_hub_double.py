"""The Hub double as the real clients of huggingface_hub, datasets and transformers meet it, with LFS and with Xet."""

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from httpx2 import HTTPError
from hub_double import TOKENS, HubDouble
from hub_double_store import Caller, HubError, Store, git_oid
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    BadRequestError,
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import load_file, save_file

ALICE, READS, FINE, BOB = TOKENS
CARD = b"---\nlicense: mit\nlibrary_name: safesail\ntags: [sae]\n---\n# A card\n"


@pytest.fixture(scope="module", params=["lfs", "xet"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubDouble]:
    with HubDouble(tmp_path_factory.mktemp("hub"), xet=request.param == "xet") as server:
        yield server


@pytest.fixture
def hub(server: HubDouble, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubDouble]:
    """The double, empty, with alice logged in and an empty cache; the client's pauses take no time."""
    server.store.repos.clear()
    server.store.collections.clear()
    server.store.large.clear()
    server.requests.clear()
    server.recover()
    at_once = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    for module in ("huggingface_hub.utils._http", "huggingface_hub.file_download"):
        monkeypatch.setattr(f"{module}.time", at_once)
    with server.used(ALICE):
        yield server


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small release: a card, a config, weights and a file further down."""
    (tmp_path / "own/deep/down").mkdir(parents=True)
    (tmp_path / "own/README.md").write_bytes(CARD)
    (tmp_path / "own/config.json").write_text("{}")
    (tmp_path / "own/deep/down/a.txt").write_text("a")
    save_file({"w": torch.arange(4096.0)}, tmp_path / "own/deep/w.safetensors")
    return tmp_path / "own"


def refusal(error: type[HfHubHTTPError], status: int) -> Any:
    """Expects an exception of exactly this class and status."""
    return pytest.raises(error, check=lambda e: type(e) is error and e.response.status_code == status)


def statuses(hub: HubDouble, part: str) -> list[int | str]:
    return [seen.status for seen in hub.requests if part in f"{seen.method} {seen.path}"]


# --- create, upload, read -----------------------------------------------------------------------------------------


def test_the_tokens_are_their_owners(hub: HubDouble):
    assert HfApi().whoami()["name"] == "alice"
    assert [org["name"] for org in HfApi().whoami()["orgs"]] == ["acme"]
    assert {token: HfApi(token=token).whoami()["auth"]["accessToken"]["role"] for token in TOKENS} == {
        ALICE: "write",
        READS: "read",
        FINE: "fineGrained",
        BOB: "write",
    }
    with refusal(HfHubHTTPError, 401):
        HfApi(token="hf_unknown").whoami()


def test_a_folder_is_uploaded_once(hub: HubDouble, folder: Path):
    api = HfApi()
    assert api.create_repo("acme/x").repo_id == "acme/x"
    first = api.upload_folder(repo_id="acme/x", folder_path=folder, commit_message="release")
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    repo = hub.repo("model", "acme/x")
    assert {name: content for name, content in repo.files.items() if name != ".gitattributes"} == files
    again = api.upload_folder(repo_id="acme/x", folder_path=folder, commit_message="release")
    assert [commit.title for commit in repo.commits] == ["initial commit", "release"]
    assert first.oid == again.oid == repo.commits[-1].sha
    assert statuses(hub, "/commit/") == [200]
    assert [c.title for c in api.list_repo_commits("acme/x")] == ["release", "initial commit"]


def test_large_files_go_the_way_of_the_mode(hub: HubDouble, folder: Path):
    HfApi().create_repo("acme/x")
    HfApi().upload_folder(repo_id="acme/x", folder_path=folder)
    file = hub.repo("model", "acme/x").at("main").files["deep/w.safetensors"]
    assert file.large
    assert (file.xet is not None) == hub.xet
    assert bool(statuses(hub, "PUT /storage/")) == bool(statuses(hub, "/lfs/objects/batch")) == (not hub.xet)
    assert bool(statuses(hub, "/xet-write-token/")) == hub.xet
    path = hf_hub_download("acme/x", "deep/w.safetensors")
    assert torch.equal(load_file(path)["w"], torch.arange(4096.0))
    assert bool(statuses(hub, "/xet-read-token/")) == hub.xet
    assert bool(statuses(hub, "GET /storage/")) == (not hub.xet)


def test_a_snapshot_is_the_folder(hub: HubDouble, folder: Path, tmp_path: Path):
    HfApi().create_repo("acme/x", repo_type="dataset")
    HfApi().upload_folder(repo_id="acme/x", folder_path=folder, repo_type="dataset")
    got = Path(snapshot_download("acme/x", repo_type="dataset", cache_dir=tmp_path / "cache"))
    for path in (p for p in folder.rglob("*") if p.is_file()):
        assert (got / path.relative_to(folder)).read_bytes() == path.read_bytes()


def test_what_the_hub_says_of_the_files(hub: HubDouble, folder: Path):
    api = HfApi()
    api.create_repo("acme/x")
    api.upload_folder(repo_id="acme/x", folder_path=folder)
    content = (folder / "deep/w.safetensors").read_bytes()
    info = api.model_info("acme/x", files_metadata=True)
    assert info.siblings is not None
    rows = {row.rfilename: row for row in info.siblings}
    assert rows["config.json"].blob_id == git_oid(b"{}") == "9e26dfeeb6e641a33dae4961196235bdb965b21b"
    lfs = rows["deep/w.safetensors"].lfs
    assert lfs is not None
    assert lfs.size == len(content)
    assert (info.tags, info.library_name) == (["sae", "license:mit"], "safesail")
    assert [item.path for item in api.list_repo_tree("acme/x", "deep")] == ["deep/down", "deep/w.safetensors"]
    assert [item.path for item in api.get_paths_info("acme/x", ["deep", "config.json"])] == ["config.json", "deep"]
    assert api.file_exists("acme/x", "config.json")
    assert not api.file_exists("acme/x", "nothing")
    assert [model.id for model in api.list_models(author="acme", filter="sae")] == ["acme/x"]


def test_files_are_changed_and_removed(hub: HubDouble):
    api = HfApi()
    api.create_repo("alice/x")
    for name in ("a", "b/c", "b/d"):
        api.upload_file(path_or_fileobj=b"1", path_in_repo=name, repo_id="alice/x")
    operations = [CommitOperationAdd("a", b"2"), CommitOperationDelete("b/c"), CommitOperationAdd("e", b"3")]
    api.create_commit("alice/x", operations, commit_message="m")
    files = hub.repo("model", "alice/x").files
    assert {name: files[name] for name in ("a", "b/d", "e")} == {"a": b"2", "b/d": b"1", "e": b"3"}
    assert "b/c" not in files
    api.delete_folder("b", "alice/x")
    assert set(hub.repo("model", "alice/x").files) == {".gitattributes", "a", "e"}


def test_a_stale_parent_is_refused(hub: HubDouble):
    HfApi().create_repo("acme/x")
    old = hub.repo("model", "acme/x").at("main").sha
    HfApi().upload_file(path_or_fileobj=b"1", path_in_repo="a", repo_id="acme/x")
    with refusal(HfHubHTTPError, 412):
        HfApi().create_commit("acme/x", [CommitOperationAdd("a", b"2")], commit_message="m", parent_commit=old)
    assert hub.repo("model", "acme/x").files["a"] == b"1"


def test_a_card_with_broken_metadata_is_refused(hub: HubDouble):
    HfApi().create_repo("acme/x")
    operations = [CommitOperationAdd("README.md", b"---\na: [\n---\n")]
    with pytest.raises(ValueError, match="Invalid metadata in README"):
        HfApi().create_commit("acme/x", operations, commit_message="m")
    assert statuses(hub, "validate-yaml") == [400]
    assert len(hub.repo("model", "acme/x").commits) == 1


def test_a_space_has_its_sdk_and_runs(hub: HubDouble):
    api = HfApi()
    api.create_repo("acme/x", repo_type="space", space_sdk="gradio")
    api.upload_file(path_or_fileobj=b"print()", path_in_repo="app.py", repo_id="acme/x", repo_type="space")
    assert api.space_info("acme/x").sdk == "gradio"
    assert api.get_space_runtime("acme/x").stage == "RUNNING"


# --- who may what -------------------------------------------------------------------------------------------------


def test_a_repository_is_created_once_and_by_its_people(hub: HubDouble):
    HfApi().create_repo("acme/x", private=True)
    HfApi().create_repo("acme/x", exist_ok=True)
    with refusal(HfHubHTTPError, 409):
        HfApi().create_repo("acme/x")
    for token, name in ((BOB, "acme/y"), (READS, "acme/y"), (FINE, "alice/y"), (ALICE, "bob/y")):
        with refusal(HfHubHTTPError, 403):
            HfApi(token=token).create_repo(name)
    HfApi(token=FINE).create_repo("acme/y")
    assert set(hub.store.repos) == {("model", "acme/x"), ("model", "acme/y")}


@pytest.mark.parametrize("name", ["a" * 97, "a--b", "a..b", ".a", "a.git"])
def test_a_name_that_the_hub_refuses(name: str):
    """The client refuses them too, so the double is asked directly."""
    with pytest.raises(HubError, match="Invalid repo name") as caught:
        Store().create("model", f"acme/{name}")
    assert caught.value.status == 400


def test_private_is_as_if_it_were_not_there(hub: HubDouble):
    hub.create("model", "acme/x", {"a": b"1"}, private=True)
    for token in (ALICE, READS, FINE):
        assert HfApi(token=token).model_info("acme/x").private is True
    with refusal(RepositoryNotFoundError, 404):
        HfApi(token=BOB).model_info("acme/x")
    with refusal(RepositoryNotFoundError, 401):
        HfApi(token=False).model_info("acme/x")
    with refusal(RepositoryNotFoundError, 404):
        hf_hub_download("acme/x", "a", token=BOB)
    hub.create("model", "alice/x", private=True)
    with refusal(RepositoryNotFoundError, 404):
        HfApi(token=FINE).model_info("alice/x")  # a token for acme only
    HfApi().update_repo_settings("acme/x", visibility="public")
    assert HfApi(token=False).model_info("acme/x").private is False


def test_who_may_not_write_changes_nothing(hub: HubDouble, folder: Path):
    repo = hub.create("model", "acme/x", {"a": b"1"})
    before = repo.at("main").sha
    for token in (READS, BOB):
        api = HfApi(token=token)
        with refusal(HfHubHTTPError, 403):
            api.upload_file(path_or_fileobj=b"2", path_in_repo="a", repo_id="acme/x")
        with refusal(HfHubHTTPError, 403):
            api.create_tag("acme/x", tag="v1")
        with refusal(HfHubHTTPError, 403):
            api.update_repo_settings("acme/x", visibility="private")
        with refusal(HfHubHTTPError, 403):
            api.delete_repo("acme/x")
    with pytest.raises(HfHubHTTPError):
        HfApi(token=BOB).upload_folder(repo_id="acme/x", folder_path=folder)
    assert (repo.at("main").sha, repo.tags, repo.private) == (before, {}, False)


def test_a_gate_lets_in_whom_it_knows(hub: HubDouble):
    hub.create("dataset", "acme/x", {"a.parquet": b"1", "b": b"2"})
    HfApi().update_repo_settings("acme/x", repo_type="dataset", gated="manual")
    info = HfApi(token=False).dataset_info("acme/x")
    assert (info.gated, info.private) == ("manual", False)
    assert len(info.siblings or []) == 3  # the list of files is for everybody
    for name in ("a.parquet", "b"):
        with refusal(GatedRepoError, 401):
            hf_hub_download("acme/x", name, repo_type="dataset", token=False)
        with refusal(GatedRepoError, 403):
            hf_hub_download("acme/x", name, repo_type="dataset", token=BOB)
    with refusal(GatedRepoError, 403):
        HfApi(token=BOB).auth_check("acme/x", repo_type="dataset")
    hf_hub_download("acme/x", "b", repo_type="dataset")  # a member of the organization
    hub.grant("dataset", "acme/x", "bob")
    hf_hub_download("acme/x", "a.parquet", repo_type="dataset", token=BOB)
    HfApi(token=BOB).auth_check("acme/x", repo_type="dataset")


def test_missing_things_have_their_own_errors(hub: HubDouble):
    hub.create("model", "acme/x", {"a": b"1"})
    with refusal(RepositoryNotFoundError, 404):
        HfApi().model_info("acme/nothing")
    with refusal(RevisionNotFoundError, 404):
        HfApi().model_info("acme/x", revision="nothing")
    with refusal(RemoteEntryNotFoundError, 404):
        hf_hub_download("acme/x", "nothing")


# --- tags, branches, pull requests, collections -------------------------------------------------------------------


def test_a_tag_stays_where_it_was_put(hub: HubDouble):
    api = HfApi()
    hub.create("model", "acme/x", {"a": b"1"})
    api.create_tag("acme/x", tag="v1")
    with refusal(HfHubHTTPError, 409):
        api.create_tag("acme/x", tag="v1")
    api.create_tag("acme/x", tag="v1", exist_ok=True)
    api.upload_file(path_or_fileobj=b"2", path_in_repo="a", repo_id="acme/x")
    assert Path(hf_hub_download("acme/x", "a", revision="v1")).read_bytes() == b"1"
    assert Path(hf_hub_download("acme/x", "a")).read_bytes() == b"2"
    api.create_branch("acme/x", branch="dev", revision="v1")
    refs = api.list_repo_refs("acme/x")
    assert [ref.name for ref in refs.branches] == ["main", "dev"]
    assert [(ref.name, ref.target_commit) for ref in refs.tags] == [("v1", refs.branches[1].target_commit)]
    api.delete_tag("acme/x", tag="v1")
    with refusal(RevisionNotFoundError, 404):
        api.delete_tag("acme/x", tag="v1")


def test_a_stranger_proposes_and_the_owner_merges(hub: HubDouble, folder: Path):
    repo = hub.create("model", "acme/x", {"a": b"1"})
    bob = HfApi(token=BOB)
    proposed = bob.upload_folder(repo_id="acme/x", folder_path=folder, create_pr=True, commit_message="a proposal")
    assert proposed.pr_revision == "refs/pr/1"
    assert set(repo.files) == {".gitattributes", "a"}
    (found,) = HfApi().get_repo_discussions("acme/x", discussion_type="pull_request")
    assert (found.num, found.title, found.author, found.status in ("open", "draft")) == (1, "a proposal", "bob", True)
    path = hf_hub_download("acme/x", "deep/w.safetensors", revision="refs/pr/1")
    assert Path(path).read_bytes() == (folder / "deep/w.safetensors").read_bytes()
    repo.put({"meanwhile": b"1"})
    with refusal(HfHubHTTPError, 403):
        bob.merge_pull_request("acme/x", 1)
    HfApi().comment_discussion("acme/x", 1, "thanks")
    HfApi().merge_pull_request("acme/x", 1)
    details = HfApi().get_discussion_details("acme/x", 1)
    assert (details.status, details.merge_commit_oid) == ("merged", repo.at("main").sha)
    assert {"a", "meanwhile", "README.md", "deep/w.safetensors"} <= set(repo.files)
    assert [thread.status for thread in repo.pull_requests] == ["merged"]


def test_a_reader_cannot_propose(hub: HubDouble):
    hub.create("model", "acme/x", {"a": b"1"})
    with refusal(HfHubHTTPError, 403):
        HfApi(token=READS).upload_file(path_or_fileobj=b"2", path_in_repo="a", repo_id="acme/x", create_pr=True)
    assert hub.repo("model", "acme/x").pull_requests == []


def test_a_collection_holds_each_item_once(hub: HubDouble):
    api = HfApi()
    hub.create("model", "acme/x")
    hub.create("dataset", "acme/x", private=True)
    made = api.create_collection("A release", namespace="acme", description="of ours")
    assert api.create_collection("A release", namespace="acme", exists_ok=True).slug == made.slug
    with refusal(HfHubHTTPError, 409):
        api.create_collection("A release", namespace="acme")
    for kind in ("model", "dataset", "model"):
        api.add_collection_item(made.slug, "acme/x", kind, exists_ok=True, note="n")  # type: ignore[arg-type]
    with refusal(HfHubHTTPError, 409):
        api.add_collection_item(made.slug, "acme/x", "model")
    with refusal(RepositoryNotFoundError, 404):
        api.add_collection_item(made.slug, "acme/nothing", "model")
    with refusal(HfHubHTTPError, 403):
        HfApi(token=BOB).add_collection_item(made.slug, "acme/x", "space")
    found = api.get_collection(made.slug)
    assert [(item.item_type, item.item_id, item.note) for item in found.items] == [
        ("model", "acme/x", "n"),
        ("dataset", "acme/x", "n"),
    ]
    assert [c.slug for c in api.list_collections(owner="acme")] == [made.slug]
    api.delete_collection_item(made.slug, found.items[0].item_object_id)
    assert len(api.get_collection(made.slug).items) == 1
    with refusal(BadRequestError, 400):
        api.create_collection("t" * 60, namespace="acme")


# --- made failures ------------------------------------------------------------------------------------------------


def test_too_many_requests_are_waited_for(hub: HubDouble, monkeypatch: pytest.MonkeyPatch):
    """The client waits as long as it is told and a second more."""
    waited: list[float] = []
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", waited.append)
    hub.create("model", "acme/x", {"a": b"1"})
    hub.fail("HEAD .*/a$", 429, times=3, retry_after=7)
    assert Path(hf_hub_download("acme/x", "a")).read_bytes() == b"1"
    assert statuses(hub, "HEAD") == [429, 429, 429, 200]
    assert waited == [8.0, 8.0]  # the first failure is followed at once by a more patient second try


def test_a_failure_meets_only_what_it_is_for(hub: HubDouble):
    hub.create("model", "acme/x", {"a": b"1"})
    hub.fail("POST /api/models/acme/x/tag/main", 500, times=2)
    for _ in range(2):
        with refusal(HfHubHTTPError, 500):
            HfApi().create_tag("acme/x", tag="v1")
        assert HfApi().model_info("acme/x").id == "acme/x"
    assert hub.repo("model", "acme/x").tags == {}
    HfApi().create_tag("acme/x", tag="v1")
    hub.fail(lambda request: request.startswith("GET"), 503)
    with refusal(HfHubHTTPError, 503):
        HfApi().model_info("acme/x")
    assert hub.requests[-1] == ("GET", "/api/models/acme/x", 503, "alice")


def test_a_connection_cut_in_a_large_upload(hub: HubDouble, folder: Path):
    """With Xet the chunks go to a folder here; the request for the right to write them is what can be cut."""
    cut = "xet-write-token" if hub.xet else "PUT /storage/"
    save_file({"w": torch.randn(300_000)}, folder / "deep/w.safetensors")
    HfApi().create_repo("acme/x")
    hub.fail(cut, "cut")
    HfApi().upload_folder(repo_id="acme/x", folder_path=folder)  # the client tries again by itself
    assert statuses(hub, cut)[:2] == ["cut", 200]
    written = hub.repo("model", "acme/x").files["deep/w.safetensors"]
    assert written == (folder / "deep/w.safetensors").read_bytes()


def test_a_large_upload_that_is_always_cut_leaves_nothing_behind(hub: HubDouble, folder: Path):
    if hub.xet:
        pytest.skip("its client goes on trying for four minutes")
    HfApi().create_repo("acme/x")
    hub.fail("PUT /storage/", "cut", times=99)
    with pytest.raises(RuntimeError, match=r"Error while uploading 'deep/w.safetensors'"):
        HfApi().upload_folder(repo_id="acme/x", folder_path=folder)
    assert set(hub.repo("model", "acme/x").files) == {".gitattributes"}
    assert hub.store.large == {}
    hub.recover()
    HfApi().upload_folder(repo_id="acme/x", folder_path=folder)
    assert len(hub.repo("model", "acme/x").commits) == 2


def test_a_commit_that_is_cut_is_made_by_the_second_try(hub: HubDouble, folder: Path):
    HfApi().create_repo("acme/x")
    repo = hub.repo("model", "acme/x")
    hub.fail("/commit/main", "cut", times=9)
    with pytest.raises(HTTPError, match="disconnected"):
        HfApi().upload_folder(repo_id="acme/x", folder_path=folder)
    assert len(repo.commits) == 1
    hub.recover()
    hub.requests.clear()
    HfApi().upload_folder(repo_id="acme/x", folder_path=folder, commit_message="second try")
    assert [commit.title for commit in repo.commits] == ["initial commit", "second try"]
    assert statuses(hub, "PUT /storage/") == []  # the large file was there already


def test_a_commit_whose_answer_is_lost_was_made(hub: HubDouble, folder: Path):
    """The client of Xet repeats the request by itself, so the same content is committed twice."""
    HfApi().create_repo("acme/x")
    repo = hub.repo("model", "acme/x")
    hub.fail("/commit/main", "lost")
    with contextlib.nullcontext() if hub.xet else pytest.raises(HTTPError, match="disconnected"):
        HfApi().upload_folder(repo_id="acme/x", folder_path=folder)
    assert len(repo.commits) == (3 if hub.xet else 2)
    assert all(commit.files == repo.commits[1].files for commit in repo.commits[1:])
    HfApi().upload_folder(repo_id="acme/x", folder_path=folder)
    assert len(repo.commits) == (3 if hub.xet else 2)


def test_a_download_is_cut_after_half_of_it(hub: HubDouble):
    content = os.urandom(100_000)
    hub.create("model", "acme/x", {"w.bin": content})
    hub.fail("GET /storage/", "cut")
    assert Path(hf_hub_download("acme/x", "w.bin")).read_bytes() == content
    assert statuses(hub, "GET /storage/") == ["cut", 200]


def test_a_mistake_of_the_double_is_not_hidden(tmp_path: Path):
    hub = HubDouble(tmp_path)
    with hub, hub.used(ALICE):
        hub.fail(lambda request: 1 / 0, 500)
        with refusal(HfHubHTTPError, 500):
            HfApi().whoami()
        (error,) = hub.errors
        assert isinstance(error, ZeroDivisionError)
        hub.errors.clear()
    with pytest.raises(ZeroDivisionError):
        _leave_with(hub, error)


def _leave_with(hub: HubDouble, error: Exception) -> None:
    with hub:
        hub.errors.append(error)


# --- datasets and transformers ------------------------------------------------------------------------------------


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hub: HubDouble) -> Any:
    """The library, its cache in a folder of the test and its Hub the double."""
    import datasets

    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr("datasets.config.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("datasets.config.HF_ENDPOINT", hub.url)
    monkeypatch.setattr("datasets.config.HUB_DATASETS_URL", hub.url + "/datasets/{repo_id}/resolve/{revision}/{path}")
    return datasets


def test_a_data_set_is_loaded_whole_and_as_a_stream(hub: HubDouble, datasets: Any, tmp_path: Path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (tmp_path / "own/one").mkdir(parents=True)
    pq.write_table(pa.table({"text": ["a", "b"], "n": [1, 2]}), tmp_path / "own/one/train.parquet")
    (tmp_path / "own/README.md").write_text(
        "---\nconfigs:\n- config_name: one\n  data_files:\n  - split: train\n    path: one/train.parquet\n---\n"
    )
    HfApi().create_repo("acme/d", repo_type="dataset", private=True)
    HfApi().upload_folder(repo_id="acme/d", repo_type="dataset", folder_path=tmp_path / "own")
    rows = [{"text": "a", "n": 1}, {"text": "b", "n": 2}]
    assert datasets.load_dataset("acme/d", "one", split="train").to_list() == rows
    assert list(datasets.load_dataset("acme/d", "one", split="train", streaming=True)) == rows
    if not hub.xet:
        assert 206 in statuses(hub, "GET /storage/")
    assert {seen.user for seen in hub.requests if "/api/" in seen.path} == {"alice"}


def test_a_model_is_loaded_through_transformers(hub: HubDouble, tiny_model: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    HfApi().create_repo("acme/m")
    HfApi().upload_folder(repo_id="acme/m", folder_path=tiny_model)
    loaded = AutoModelForCausalLM.from_pretrained("acme/m").state_dict()
    expected = AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert len(AutoTokenizer.from_pretrained("acme/m")) == len(AutoTokenizer.from_pretrained(tiny_model))


def test_the_head_of_a_safetensors_file_is_read_by_ranges(hub: HubDouble, tmp_path: Path):
    save_file({"w": torch.zeros(500, 1000), "b": torch.zeros(7)}, tmp_path / "model.safetensors")
    HfApi().create_repo("acme/m")
    HfApi().upload_file(
        path_or_fileobj=tmp_path / "model.safetensors", path_in_repo="model.safetensors", repo_id="acme/m"
    )
    assert HfApi().get_safetensors_metadata("acme/m").parameter_count == {"F32": 500 * 1000 + 7}
    assert statuses(hub, "GET /storage/") == [206]


def test_a_caller_without_a_token_is_nobody():
    assert Caller.of("") == ("", "read")
    assert not Caller.of("").belongs_to("alice")
    with pytest.raises(HubError, match="Invalid credentials"):
        Caller.of("Bearer hf_wrong")
