"""What the readers do over the Hub's protocol: revisions, tokens, caches, offline; which files they ask for; and the
one sentence they say when something is refused or breaks."""

import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hub_double import HubDouble

from safesail import Inspector, NeuronDatabase, Sae
from safesail.errors import InputError
from safesail.lm.load import load_tokenizer, tokenizer_hash
from safesail.repository import Repository, part_of_release
from safesail.sae.config import SaeConfig

REPOSITORY = Path(__file__).resolve().parent.parent
HOOK_POINTS = ("layers.0.mlp", "layers.1.mlp")
SELECTED = {hook_point: f"{hook_point}/topk-k4-w16" for hook_point in HOOK_POINTS}
OTHER = "layers.0.mlp/relu-c0.1-w16"
SAES, NEURONS = "acme/tiny-saes", "acme/tiny-neurons"
TOKEN = "hf_alice_read"


# --- a release on the double --------------------------------------------------------------------------------------


def made_saes(folder: Path, model: Path) -> Path:
    """The `saes` folder of a release with two selected SAEs and one more, for the tiny model."""
    chance = torch.Generator().manual_seed(0)
    for sae_id in (*SELECTED.values(), OTHER):
        kind = {"architecture": "topk", "k": 4} if "topk" in sae_id else {"architecture": "relu", "coefficient": 0.1}
        config = SaeConfig(d_in=32, d_sae=16, hook_point=sae_id.rpartition("/")[0], **kind)
        shapes = ((32, 16), (16,), (16, 32), (32,))
        Sae(config, *(torch.randn(shape, generator=chance) for shape in shapes)).save(folder / sae_id)
    manifest = {
        "base_model": "acme/tiny-llama",
        "base_model_revision": None,
        "tokenizer_hash": tokenizer_hash(load_tokenizer(str(model))),
        "selected": SELECTED,
        "saes": [{"id": sae_id} for sae_id in (*SELECTED.values(), OTHER)],
    }
    (folder / "config.json").write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def made_neurons(folder: Path) -> Path:
    """The `neurons` folder: one explained neuron at each hook point."""
    rows = [
        {
            "neuron_id": f"{hook_point}/1",
            "hook_point": hook_point,
            "explanation": f"said of {hook_point}",
            "domains": ["terror"],
            "category": "weapons",
            "concept": "rifle",
            "score": 0.5,
            "score_low": 0.4,
            "score_high": 0.6,
            "explainer": "e",
            "simulator": "s",
            "status": "ok",
            "language": "en",
            "normaliser": 2.0,
        }
        for hook_point in HOOK_POINTS
    ]
    for name in ("neurons/train", "quantiles/train", "scores/train", "explanations/en"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{name}.parquet")
    (folder / "languages.json").write_text('["en"]', encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def saes(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    return made_saes(tmp_path_factory.mktemp("made") / "saes", tiny_model)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HubDouble]:
    with HubDouble(tmp_path_factory.mktemp("hub")) as server:
        yield server


@pytest.fixture
def hub(
    server: HubDouble, saes: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[HubDouble]:
    """The double with a fresh release on it, an empty cache, nobody logged in; the client's pauses take no time."""
    server.store.repos.clear()
    server.requests.clear()
    server.recover()
    server.create("model", SAES, saes)
    server.create("dataset", NEURONS, made_neurons(tmp_path / "neurons"))
    server.create("model", "acme/tiny-llama", tiny_model)
    at_once = SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})
    for module in ("huggingface_hub.utils._http", "huggingface_hub.file_download"):
        monkeypatch.setattr(f"{module}.time", at_once)
    with server.used(home=tmp_path / "home"):
        yield server


def asked_for(hub: HubDouble, repo_id: str = SAES) -> list[str]:
    """The names of the files that were asked for, in order, each once."""
    paths = [seen.path for seen in hub.requests if f"/{repo_id}/resolve/" in seen.path]
    return list(dict.fromkeys(path.split("/resolve/")[1].partition("/")[2] for path in paths))


def refused(read: Callable[[], Any], *words: str) -> str:
    """The sentence with which a reader refuses; it is one line and holds all the words."""
    with pytest.raises(InputError) as caught:
        read()
    message = str(caught.value)
    assert "\n" not in message
    assert [word for word in words if word not in message] == [], message
    return message


# --- what is downloaded -------------------------------------------------------------------------------------------


def test_one_sae_costs_three_files(hub: HubDouble, saes: Path):
    sae = Sae.from_pretrained(SAES, "layers.0.mlp")
    assert torch.equal(sae.W_enc, Sae.from_pretrained(saes, "layers.0.mlp").W_enc)
    own = SELECTED["layers.0.mlp"]
    assert asked_for(hub) == ["config.json", f"{own}/cfg.json", f"{own}/sae_weights.safetensors"]


def test_all_saes_are_the_selected_ones_only(hub: HubDouble):
    assert list(Sae.load_all(SAES)) == list(HOOK_POINTS)
    ends = ("cfg.json", "sae_weights.safetensors")
    assert asked_for(hub) == ["config.json", *(f"{own}/{end}" for own in SELECTED.values() for end in ends)]


def test_the_database_is_its_four_tables(hub: HubDouble):
    database = NeuronDatabase.load("acme/tiny")
    assert [row["explanation"] for row in database] == [f"said of {hook_point}" for hook_point in HOOK_POINTS]
    assert set(asked_for(hub, NEURONS)) == {
        "languages.json",
        "explanations/en.parquet",
        "neurons/train.parquet",
        "quantiles/train.parquet",
        "scores/train.parquet",
    }


def test_the_inspector_reads_a_release_from_the_hub(hub: HubDouble, saes: Path, tiny_model: Path):
    inspection = Inspector.from_pretrained("acme/tiny").inspect("The hostages were seen near the old house.")
    sae = Sae.from_pretrained(saes, "layers.0.mlp")
    assert inspection.codes["layers.0.mlp"].of(3)[1].numel() == sae.config.k
    assert not any("relu" in name for name in asked_for(hub))
    assert "model.safetensors" in asked_for(hub, "acme/tiny-llama")


def test_a_second_load_downloads_nothing(hub: HubDouble):
    Sae.load_all(SAES)
    hub.requests.clear()
    Sae.load_all(SAES)
    assert {(seen.method, seen.status) for seen in hub.requests} <= {("HEAD", 200), ("HEAD", 302)}
    hub.requests.clear()
    Sae.load_all(SAES, force_download=True)
    assert sum(seen.method == "GET" and seen.status == 200 for seen in hub.requests) == 5


def test_the_names_cost_no_file(hub: HubDouble, saes: Path):
    assert Repository(SAES).names() == [".gitattributes", *Repository(str(saes)).names()]
    assert asked_for(hub) == []


def test_all_files_are_of_one_commit_while_somebody_publishes(hub: HubDouble):
    repository = Repository(SAES)
    old = repository.file("config.json").read_bytes()
    cfg = f"{OTHER}/cfg.json"
    before = hub.repo("model", SAES).files[cfg]
    hub.repo("model", SAES).put({"config.json": b"{}", cfg: b"{}"})
    assert repository.file(cfg).read_bytes() == before
    assert repository.file("config.json").read_bytes() == old
    assert Repository(SAES).file("config.json").read_bytes() == b"{}"


# --- revision, token, cache_dir, offline --------------------------------------------------------------------------


def test_a_tag_is_read_as_it_was(hub: HubDouble):
    repo = hub.repo("model", SAES)
    repo.tags["v1"] = repo.at("main").sha
    manifest = json.loads(repo.files["config.json"])
    del manifest["selected"]["layers.1.mlp"]
    repo.put({"config.json": json.dumps(manifest).encode()})
    assert list(Sae.load_all(SAES, revision="v1")) == list(HOOK_POINTS)
    assert list(Sae.load_all(SAES, revision=repo.tags["v1"])) == list(HOOK_POINTS)
    assert list(Sae.load_all(SAES)) == ["layers.0.mlp"]


def test_a_private_release_needs_its_token(hub: HubDouble):
    hub.repo("model", SAES).private = True
    hub.repo("dataset", NEURONS).private = True
    message = "neither a folder here nor a model repository you can read on the Hub"
    refused(lambda: Sae.load_all(SAES), message, "type `hf auth login` if it is private")
    refused(lambda: Sae.load_all(SAES, token="hf_bob_write"), message, "ask its owner to let you in if it is private")
    refused(lambda: Repository(SAES).names(), message)
    assert list(Sae.load_all(SAES, token=TOKEN)) == list(HOOK_POINTS)
    assert len(NeuronDatabase.load("acme/tiny", token=TOKEN)) == 2
    with hub.used(TOKEN):
        refused(lambda: Sae.load_all(SAES, token=False), message)  # the login of the machine is not used
        assert list(Sae.load_all(SAES)) == list(HOOK_POINTS)


def test_the_cache_is_where_it_was_asked_for(hub: HubDouble, tmp_path: Path):
    Sae.from_pretrained(SAES, "layers.0.mlp", cache_dir=tmp_path / "elsewhere")
    NeuronDatabase.load("acme/tiny", cache_dir=str(tmp_path / "elsewhere"))
    assert sorted(p.name for p in (tmp_path / "elsewhere").glob("*--*")) == [
        "datasets--acme--tiny-neurons",
        "models--acme--tiny-saes",
    ]
    assert not (tmp_path / "home/hub").exists()


def test_the_language_model_too_is_kept_where_it_was_asked_for(hub: HubDouble, tmp_path: Path):
    hub.repo("model", "acme/tiny-llama").private = True
    refused(lambda: Inspector.from_pretrained("acme/tiny"), "acme/tiny-llama cannot be loaded")
    Inspector.from_pretrained("acme/tiny", token=TOKEN, cache_dir=tmp_path / "elsewhere")
    assert (tmp_path / "elsewhere/models--acme--tiny-llama").is_dir()
    assert not (tmp_path / "home/hub/models--acme--tiny-llama/snapshots").exists()


READERS = {
    "Sae.from_pretrained": lambda **kw: Sae.from_pretrained(SAES, "layers.1.mlp", **kw),
    "Sae.load_all": lambda **kw: Sae.load_all(SAES, **kw),
    "NeuronDatabase.load": lambda **kw: NeuronDatabase.load("acme/tiny", **kw),
    "Inspector.from_pretrained": lambda **kw: Inspector.from_pretrained("acme/tiny", **kw),
}


@pytest.mark.parametrize("reader", READERS)
def test_what_is_in_the_cache_is_read_without_the_hub(hub: HubDouble, reader: str, tmp_path: Path):
    read = READERS[reader]
    refused(lambda: read(local_files_only=True), "is not in the local cache", "local_files_only forbids")
    read()
    hub.requests.clear()
    read(local_files_only=True)
    with hub.used(home=tmp_path / "home", offline=True):
        read()
    assert hub.requests == []


def test_offline_mode_of_the_environment(hub: HubDouble, tmp_path: Path):
    """A process of its own, as the variable is read when huggingface_hub is imported."""
    code = (
        "from safesail.repository import Repository; from safesail.errors import InputError\n"
        "try: print(list(Repository('acme/tiny-saes').json('config.json')['selected']))\n"
        "except InputError as error: print(error)"
    )

    def output(**more: str) -> str:
        environment = hub.environment(home=tmp_path / "own-home") | more
        command = [sys.executable, "-W", "error", "-c", code]
        return subprocess.run(
            command, env=environment, cwd=REPOSITORY, check=True, capture_output=True, text=True
        ).stdout.strip()

    assert output(HF_HUB_OFFLINE="1") == (
        "there is no folder acme/tiny-saes here, config.json of the Hub repository acme/tiny-saes is not in the local "
        "cache, and offline mode (HF_HUB_OFFLINE) forbids to download it; with a connection type "
        "`hf download acme/tiny-saes config.json`."
    )
    assert hub.requests == []
    assert output() == output(HF_HUB_OFFLINE="1") == str(list(HOOK_POINTS))


def test_the_names_offline_are_those_in_the_cache(hub: HubDouble, tmp_path: Path):
    Sae.from_pretrained(SAES, "layers.0.mlp")
    own = SELECTED["layers.0.mlp"]
    cached = ["config.json", f"{own}/cfg.json", f"{own}/sae_weights.safetensors"]
    hub.requests.clear()
    assert Repository(SAES, local_files_only=True).names() == cached
    with hub.used(home=tmp_path / "home", offline=True):
        assert Repository(SAES).names() == cached
        refused(Repository(NEURONS, "dataset").names, "its list of files", f"`hf download {NEURONS} --type dataset`")
    assert hub.requests == []


def test_the_command_of_the_offline_sentence_works(hub: HubDouble, tmp_path: Path):
    name = "scores/train.parquet"
    message = refused(lambda: Repository(NEURONS, "dataset", local_files_only=True).file(name), "`hf download")
    command = message.split("`")[1].split()
    subprocess.run(
        [Path(sys.executable).parent / command[0], *command[1:]],
        env=hub.environment(home=tmp_path / "home"),
        check=True,
        capture_output=True,
    )
    assert Repository(NEURONS, "dataset", local_files_only=True).file(name).is_file()


def test_force_download_and_no_download_contradict(hub: HubDouble, tmp_path: Path):
    refused(lambda: Sae.load_all(SAES, force_download=True, local_files_only=True), "contradict each other")
    Sae.load_all(SAES)
    with hub.used(home=tmp_path / "home", offline=True):
        refused(lambda: Sae.load_all(SAES, force_download=True), "offline mode (HF_HUB_OFFLINE) forbids", "give one")


# --- gated, missing, wrong ----------------------------------------------------------------------------------------


def test_a_gate_says_whether_to_log_in_or_to_ask(hub: HubDouble):
    repo = hub.repo("dataset", NEURONS)
    repo.gated = "manual"
    page = f"{hub.url}/datasets/{NEURONS}"
    refused(lambda: NeuronDatabase.load("acme/tiny"), "is gated and you are not logged in", page, "`hf auth login`")
    bob = {"token": "hf_bob_write"}
    refused(lambda: NeuronDatabase.load("acme/tiny", **bob), "your account has no access", page, "`hf auth whoami`")
    repo.awaiting.add("bob")
    refused(lambda: NeuronDatabase.load("acme/tiny", **bob), "awaits its owner's review", page)
    hub.grant("dataset", NEURONS, "bob")
    assert len(NeuronDatabase.load("acme/tiny", **bob)) == 2


def test_a_wrong_revision_names_the_right_ones(hub: HubDouble):
    repo = hub.repo("model", SAES)
    repo.tags["v0.1.0"] = repo.at("main").sha
    said = f"{SAES} has no revision 'v9' on the Hub; it has main, v0.1.0."
    assert refused(lambda: Sae.load_all(SAES, revision="v9")) == said
    assert refused(Repository(SAES, revision="v9").names) == said
    hub.fail("/refs$", 500, times=9)
    assert refused(lambda: Sae.load_all(SAES, revision="v9"), "has no revision 'v9'", f"{hub.url}/{SAES}")


def test_a_repository_that_is_no_release(hub: HubDouble):
    hub.create("model", "acme/other-saes", {"README.md": b"# nothing here"})
    refused(lambda: Sae.load_all("acme/other-saes"))
    refused(lambda: NeuronDatabase.load("acme/other"), "acme/other-neurons is neither a folder here nor a dataset")
    refused(lambda: Repository("acme/other-saes").json("config.json"), "has no file config.json", "is it a release")


@pytest.mark.parametrize("source", ["no-such-folder/x/y", "./nowhere", "a b/c", "https://example.org/a/b", "org/a--b"])
def test_what_is_no_id_is_not_asked_for(hub: HubDouble, source: str):
    refused(lambda: Repository(source).file("config.json"), f"{source!r} is neither an existing folder nor a Hub id")
    assert hub.requests == []


def test_a_file_in_place_of_its_folder(hub: HubDouble, saes: Path):
    refused(lambda: Sae.load_all(saes / "config.json"), "config.json is a file; give the folder it is in")


def test_the_id_of_one_part_finds_the_others():
    assert part_of_release("acme/tiny-saes", "neurons") == "acme/tiny-neurons"
    assert part_of_release("acme/tiny-neurons", "neurons") == "acme/tiny-neurons"
    assert part_of_release("acme/tiny", "neurons") == "acme/tiny-neurons"
    assert part_of_release("acme/my-model", "saes") == "acme/my-model-saes"


# --- names that lead out ------------------------------------------------------------------------------------------

OUTSIDE = ["../../x", "/etc/passwd", "a/../../x", "C:/x", "..\\x", "a\x1b[2Jb"]


@pytest.mark.parametrize("name", OUTSIDE)
def test_a_name_in_the_hubs_list_that_leads_out_is_refused(hub: HubDouble, name: str):
    hub.repo("model", SAES).put({name: b"{}"})
    refused(Repository(SAES).names, f"{SAES} names a file {name!r}", "not a relative path inside a repository")


@pytest.mark.parametrize("name", OUTSIDE)
def test_an_sae_id_that_leads_out_is_refused(hub: HubDouble, name: str):
    manifest = {"selected": {"layers.0.mlp": name}, "saes": [{"id": name}]}
    hub.repo("model", SAES).put({"config.json": json.dumps(manifest).encode()})
    for read in (lambda: Sae.load_all(SAES), lambda: Sae.from_pretrained(SAES, "layers.0.mlp")):
        refused(read, "not a relative path inside a repository")
    assert asked_for(hub) == ["config.json"]


def test_a_language_that_leads_out_is_refused(hub: HubDouble):
    hub.repo("dataset", NEURONS).put({"languages.json": b'["../../../x"]'})
    refused(lambda: NeuronDatabase.load("acme/tiny"), "not a relative path inside a repository")


# --- what breaks on the way ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_passing_failure_is_waited_for(hub: HubDouble, status: int):
    hub.fail("(HEAD|GET) .*/config.json", status, times=2, retry_after=0)
    assert list(Sae.load_all(SAES)) == list(HOOK_POINTS)
    assert [seen.status for seen in hub.requests[:2]] == [status, status]


@pytest.mark.parametrize(
    ("status", "words"),
    [
        (401, "the Hub does not know your token (it may have expired); type `hf auth login`"),
        (403, "your token may not read acme/tiny-saes"),
        (429, "allows no more requests for now"),
        (500, "answered 500 when asked for"),
        (503, "answered 503 when asked for"),
    ],
)
@pytest.mark.parametrize("read", [lambda: Sae.load_all(SAES), Repository(SAES).names])
def test_a_lasting_failure_is_one_sentence_and_passes(hub: HubDouble, status: int, words: str, read: Callable):
    if status == 401:
        with hub.used("hf_not_a_token"):
            refused(read, words)
    else:
        hub.fail(".", status, times=1000, retry_after=0)
        refused(read, words, "type" if status != 403 else "`hf auth login`")
    hub.recover()
    assert read()


def test_a_hub_that_fails_is_not_needed_for_what_is_cached(hub: HubDouble):
    Sae.load_all(SAES)
    hub.fail(".", 503, times=1000)
    assert list(Sae.load_all(SAES)) == list(HOOK_POINTS)


def test_a_download_that_is_cut_goes_on(hub: HubDouble, saes: Path):
    hub.fail("GET /storage/", "cut")
    sae = Sae.from_pretrained(SAES, "layers.0.mlp")
    assert torch.equal(sae.W_enc, Sae.from_pretrained(saes, "layers.0.mlp").W_enc)
    assert [seen.status for seen in hub.requests if "/storage/" in seen.path] == ["cut", 200]


def test_a_download_that_never_ends_well_leaves_no_half_file(hub: HubDouble, tmp_path: Path, saes: Path):
    hub.fail("GET /storage/", "cut", times=1000)
    refused(lambda: Sae.from_pretrained(SAES, "layers.0.mlp"), "could not be fetched from the Hub", "type the same")
    assert list((tmp_path / "home").rglob("*.safetensors")) == []
    hub.recover()
    sae = Sae.from_pretrained(SAES, "layers.0.mlp")
    assert torch.equal(sae.W_enc, Sae.from_pretrained(saes, "layers.0.mlp").W_enc)


def test_no_hub_at_all(hub: HubDouble, monkeypatch: pytest.MonkeyPatch):
    from huggingface_hub import constants

    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(hub.url, "http://127.0.0.1:1")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:1")
    file = Repository(SAES).file
    refused(lambda: file("config.json"), "neither in the local cache nor to be downloaded now", "check the connection")
    refused(lambda: Sae.load_all(SAES), "no folder here", "check the connection")
    refused(Repository(SAES).names, "its list of files", "could not be fetched from the Hub (ConnectError)")


def test_a_cache_that_cannot_be_written(hub: HubDouble, tmp_path: Path):
    (tmp_path / "file").write_text("in the way")
    message = refused(lambda: Sae.load_all(SAES, cache_dir=tmp_path / "file"), "cannot be written into the cache")
    assert message.endswith("(Not a directory); give another folder as cache_dir or in HF_HOME.")


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_cache_that_may_not_be_written(hub: HubDouble, tmp_path: Path):
    (tmp_path / "locked").mkdir(mode=0o500)
    refused(lambda: Sae.load_all(SAES, cache_dir=tmp_path / "locked"), "(Permission denied); give another folder")


def test_a_full_cache_that_may_only_be_read_is_enough(hub: HubDouble, tmp_path: Path):
    cache = tmp_path / "cache"
    Sae.load_all(SAES, cache_dir=cache)
    paths = sorted(cache.rglob("*"))
    before = [path.stat(follow_symlinks=False).st_mtime_ns for path in paths]
    assert list(Sae.load_all(SAES, cache_dir=cache)) == list(HOOK_POINTS)
    assert sorted(cache.rglob("*")) == paths
    assert [path.stat(follow_symlinks=False).st_mtime_ns for path in paths] == before


def test_a_clone_without_its_large_files(hub: HubDouble, tmp_path: Path, saes: Path):
    """What `git clone` leaves where git-lfs is not installed."""
    own = SELECTED["layers.0.mlp"]
    weights = f"{own}/sae_weights.safetensors"
    for name in ("config.json", f"{own}/cfg.json"):
        (tmp_path / "clone" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "clone" / name).write_bytes((saes / name).read_bytes())
    (tmp_path / "clone" / weights).write_bytes(hub.repo("model", SAES).at("main").files[weights].pointer)
    refused(lambda: Sae.from_pretrained(tmp_path / "clone", "layers.0.mlp"), "only git's pointer", "`git lfs pull`")


def test_half_a_file_in_a_local_folder(tmp_path: Path, saes: Path):
    own, halved = SELECTED["layers.0.mlp"], tmp_path / "halved"
    for path in (p for p in saes.rglob("*") if p.is_file()):
        target = halved / path.relative_to(saes)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes()[: path.stat().st_size // 2 if own in str(path) else None])
    for name in ("cfg.json", "sae_weights.safetensors"):
        refused(lambda: Sae.from_pretrained(halved, "layers.0.mlp"), name)
        (halved / own / name).write_bytes((saes / own / name).read_bytes())
    assert Sae.from_pretrained(halved, "layers.0.mlp").config.d_sae == 16


def test_xet_that_fails_is_one_sentence(tmp_path: Path, saes: Path):
    from huggingface_hub import HfApi

    with HubDouble(tmp_path / "hub", xet=True) as hub, hub.used("hf_alice_write"):
        HfApi().create_repo(SAES)
        HfApi().upload_folder(folder_path=saes, repo_id=SAES)
        (storage,) = (tmp_path / "hub/cas/xet/xorbs").glob("xorbs")
        storage.rename(storage.with_name("gone"))
        refused(lambda: Sae.load_all(SAES), "could not be fetched from the Hub", "type the same again")
        storage.with_name("gone").rename(storage)
        assert list(Sae.load_all(SAES)) == list(HOOK_POINTS)


# --- tokens stay secret -------------------------------------------------------------------------------------------


def everything_said(error: BaseException, caplog: pytest.LogCaptureFixture, capfd: Any) -> str:
    """All that a person or a log file could see of an error."""
    out, err = capfd.readouterr()
    return "".join([*traceback.format_exception(error), repr(error), caplog.text, out, err])


def _gate(hub: HubDouble) -> None:
    hub.repo("model", SAES).gated = "auto"


def _hide(hub: HubDouble) -> None:
    hub.store.repos.clear()


BREAKS: dict[str, Callable[[HubDouble], object]] = {
    "nothing": lambda hub: None,
    "gated": _gate,
    "missing": _hide,
    "no file": lambda hub: hub.repo("model", SAES).put({"config.json": None}),
    "no manifest": lambda hub: hub.repo("model", SAES).put({"config.json": b"not json"}),
    "leads out": lambda hub: hub.repo("model", SAES).put({"../x": b""}),
    "limit": lambda hub: hub.fail(".", 429, times=1000, retry_after=0),
    "broken": lambda hub: hub.fail(".", 500, times=1000),
    "cut": lambda hub: hub.fail(".", "cut", times=1000),
    "lost": lambda hub: hub.fail(".", "lost", times=1000),
}


@pytest.mark.parametrize("token", ["hf_bob_write", "hf_wrong_secret", "hf_line\nbreak_secret", "hf_ümlaut_secret"])
@pytest.mark.parametrize("broken", BREAKS)
def test_a_token_is_in_no_error_and_no_log(hub: HubDouble, broken: str, token: str, caplog: Any, capfd: Any):
    caplog.set_level("DEBUG")
    BREAKS[broken](hub)
    repository = Repository(SAES, token=token)
    reads = (
        lambda: Sae.load_all(SAES, token=token),
        lambda: Sae.load_all(SAES, token=token, revision="v9"),
        repository.names,
    )
    for read in reads:
        try:
            read()
        except InputError as error:
            said = everything_said(error, caplog, capfd)
            assert not any(part in said for part in (token, repr(token)[1:-1], "_secret", "bob_write"))
    assert "secret" not in repr(repository)
    assert "bob_write" not in repr(repository)


def test_a_token_of_the_environment_is_not_said_either(hub: HubDouble, caplog: Any, capfd: Any):
    with hub.used("hf_ümlaut_secret"):
        with pytest.raises(InputError, match="the token in HF_TOKEN holds characters that no token has") as caught:
            Sae.load_all(SAES)
        assert "_secret" not in everything_said(caught.value, caplog, capfd)


def test_a_token_that_is_asked_for_and_not_there(hub: HubDouble):
    refused(lambda: Sae.load_all(SAES, token=True), "token=True asks for the login of this machine", "`hf auth login`")
    refused(lambda: Sae.load_all(SAES, token=""), "the token given is empty")


def test_the_storage_behind_the_hub_never_sees_a_token(hub: HubDouble):
    hub.repo("model", SAES).private = True
    Sae.load_all(SAES, token=TOKEN)
    users = {seen.user for seen in hub.requests if seen.path.startswith("/storage/")}
    assert users == {""}
    assert {seen.user for seen in hub.requests if "/resolve/" in seen.path} == {"alice"}
