"""The whole way: a release is built, published to the Hub double, and read from there by fresh processes."""

import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from browsing import wait_for
from hub_double import HubDouble

from safesail.neurons import NeuronDatabase
from safesail.release.front_matter import CONFIGS
from safesail.release.manifest import MANIFEST, REPO_TYPES
from safesail.release.plan import plan_publication
from safesail.release.publish import publish
from safesail.sae.model import Sae

gradio_client = pytest.importorskip("gradio_client")
pytest.importorskip("gradio")

TEXT = "The terrorist left a bomb near the old house."
SUMMARY = """
import hashlib
import json
import sys

from safesail import Inspector, NeuronDatabase, Sae

def summary(sae):
    named = {name: getattr(sae, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    return {name: hashlib.sha256(x.contiguous().numpy().tobytes()).hexdigest() for name, x in named.items()}

def read(saes, release):
    hits = Inspector.from_pretrained(release).inspect(TEXT)
    return {
        "selected": summary(Sae.from_pretrained(saes, "layers.0.mlp")),
        "named": summary(Sae.from_pretrained(saes, "layers.1.mlp/topk-k8-w128")),
        "all": {name: summary(sae) for name, sae in Sae.load_all(saes).items()},
        "neurons": sorted(row["neuron_id"] for row in NeuronDatabase.load(release)),
        "units": [[unit.text, [hit._asdict() for hit in hits.hits(i)]] for i, unit in enumerate(hits.units)],
    }
"""
TABLES = """
import json
import sys

from datasets import get_dataset_config_names, load_dataset

def read(repository):
    configs = get_dataset_config_names(repository)
    tables = {name: load_dataset(repository, name) for name in configs}
    streams = {name: load_dataset(repository, name, streaming=True) for name in configs}
    whole = {name: {split: table.num_rows for split, table in splits.items()} for name, splits in tables.items()}
    counted = {name: {split: sum(1 for _ in rows) for split, rows in s.items()} for name, s in streams.items()}
    return {"whole": whole, "streamed": counted}
"""


class Trip(NamedTuple):
    """A release that has been published."""

    hub: HubDouble
    folder: Path
    """Where it was built."""


@pytest.fixture(scope="module")
def trip(
    tmp_path_factory: pytest.TempPathFactory, demo_run: Path, mini_command: list[str], tiny_model: Path
) -> Iterator[Trip]:
    folder = tmp_path_factory.mktemp("trip") / "mini"
    shutil.copytree(demo_run, folder)
    owned = ["--out", str(folder), "--adopt", "--set", "publish.organization=acme", "--quiet"]
    subprocess.run([*mini_command, *owned], check=True, timeout=300)
    with HubDouble(folder.parent / "hub") as hub:
        hub.create("model", "safesail-tests/tiny-llama", tiny_model)
        with hub.used("hf_alice_write"):
            publish(plan_publication(folder), say=lambda line: None)
        yield Trip(hub, folder)


def asked(trip: Trip, token: str | None, code: str, call: str, cwd: Path) -> Any:
    """What a fresh process with an empty cache prints as JSON, in a folder that holds nothing of the release.

    What is compared with it comes from such a process too: another number of threads would round differently.
    """
    program = f"TEXT = {TEXT!r}\n{code}\nprint(json.dumps({call}))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=trip.hub.environment(token),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_every_published_file_has_the_bytes_of_the_folder(trip: Trip) -> None:
    for part, repo_type in REPO_TYPES.items():
        repo = trip.hub.repo(repo_type, f"acme/mini-{part}")
        names = {path.relative_to(trip.folder / part).as_posix() for path in (trip.folder / part).rglob("*")}
        files = {name for name in names if (trip.folder / part / name).is_file()}
        assert set(repo.files) - {".gitattributes"} == files
        assert MANIFEST in files
        for name in files:
            assert repo.files[name] == (trip.folder / part / name).read_bytes(), f"{part}/{name}"


def test_readers_find_on_the_hub_what_is_in_the_folder(trip: Trip, tmp_path: Path) -> None:
    remote = asked(trip, "hf_alice_read", SUMMARY, "read('acme/mini-saes', 'acme/mini')", tmp_path)
    local = asked(trip, None, SUMMARY, f"read({str(trip.folder / 'saes')!r}, {str(trip.folder)!r})", tmp_path)
    assert remote == local
    assert sorted(remote["all"]) == ["layers.0.mlp", "layers.1.mlp"]
    assert remote["selected"] == remote["all"]["layers.0.mlp"]
    assert remote["neurons"]
    assert "".join(text for text, _ in remote["units"]) == TEXT
    assert any(hits for _, hits in remote["units"])


def test_every_config_of_the_neurons_loads_whole_and_streamed(trip: Trip, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    found = asked(trip, None, TABLES, "read('acme/mini-neurons')", tmp_path)
    assert sorted(found["whole"]) == sorted(CONFIGS)
    assert found["whole"] == found["streamed"]
    for name in set(CONFIGS) - {"explanations"}:
        rows = pq.read_metadata(trip.folder / "neurons" / name / "train.parquet").num_rows
        assert found["whole"][name] == {"train": rows}
    rows = pq.read_metadata(trip.folder / "neurons/explanations/en.parquet").num_rows
    assert found["whole"]["explanations"] == {"en": rows}
    assert len(NeuronDatabase.load(trip.folder)) == found["whole"]["neurons"]["train"]


def test_examples_are_for_those_who_were_let_in(trip: Trip, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    with pytest.raises(AssertionError, match="gated dataset"):
        asked(trip, "hf_bob_write", TABLES, "read('acme/mini-examples')", tmp_path)
    trip.hub.grant("dataset", "acme/mini-examples", "bob")
    found = asked(trip, "hf_bob_write", TABLES, "read('acme/mini-examples')", tmp_path)
    rows = pq.read_metadata(trip.folder / "examples/examples/train.parquet").num_rows
    assert found == {"whole": {"examples": {"train": rows}}, "streamed": {"examples": {"train": rows}}}


def test_space_runs_from_its_own_published_files(trip: Trip, tmp_path: Path) -> None:
    from huggingface_hub import snapshot_download

    with trip.hub.used("hf_alice_read"):
        space = Path(snapshot_download("acme/mini-inspector", repo_type="space", local_dir=tmp_path / "space"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**trip.hub.environment("hf_alice_read"), "SAFESAIL_RELEASE": "acme/mini", "SAFESAIL_PORT": str(port)}
    log = tmp_path / "log.txt"
    with log.open("w") as output:
        server = subprocess.Popen([sys.executable, "app.py"], cwd=space, env=environment, stdout=output, stderr=output)
        try:
            wait_for(port, server)
            client = gradio_client.Client(f"http://127.0.0.1:{port}/", verbose=False)
            answer = client.predict(prompt=TEXT, mode="raw", max_new_tokens=0, api_name="/inspect")
            client.close()
        finally:
            server.terminate()
            server.wait(timeout=20)
    call = f"Inspector.from_pretrained({str(trip.folder)!r}).inspect(TEXT).to_json()"
    expected = asked(trip, None, "import json\nfrom safesail import Inspector", call, tmp_path)
    languages = [neuron.pop("language") for token in answer["tokens"] for neuron in token["neurons"]]
    assert set(languages) == {"en"}
    assert answer == {**expected, "answer": ""}
    assert "Traceback" not in log.read_text()


def test_loading_one_sae_downloads_only_its_files(trip: Trip, tmp_path: Path) -> None:
    with trip.hub.used("hf_alice_read", home=tmp_path):
        trip.hub.requests.clear()
        sae = Sae.from_pretrained("acme/mini-saes", "layers.0.mlp/topk-k4-w128")
    assert sae.config.sae_id == "layers.0.mlp/topk-k4-w128"
    read = {re.sub(r".*/resolve/[^/]+/", "", seen.path) for seen in trip.hub.requests if "/resolve/" in seen.path}
    assert {name for name in read if "/" in name} == {
        "layers.0.mlp/topk-k4-w128/cfg.json",
        "layers.0.mlp/topk-k4-w128/sae_weights.safetensors",
    }
