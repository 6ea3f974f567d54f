"""A small release, its publication on the Hub double, and what the double then holds."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hub_double import HubDouble

from safesail.release.manifest import REPO_TYPES, write_manifest
from safesail.release.plan import plan_publication
from safesail.release.publish import Published, publish

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


@contextlib.contextmanager
def running(folder: Path, xet: bool = False) -> Iterator[HubDouble]:
    """A double that answers at once, which this process uses as alice."""
    with HubDouble(folder, xet) as double, double.used(TOKEN):
        yield double


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
