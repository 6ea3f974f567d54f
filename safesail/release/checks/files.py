"""Files and cards: every file is there, whole and named, and every card tells the truth about them."""

import re
from collections import Counter
from typing import Any

from safesail.errors import InputError
from safesail.release.checks.finding import Looked
from safesail.release.checks.part import Part
from safesail.release.manifest import MANIFEST, FileFacts, repo_type_of

__all__ = ["files", "front_matter", "links", "splits", "unnamed"]

Row = dict[str, Any]


def files(part: Part) -> Looked:
    """Every file of the manifest is there, with its size and its checksum."""
    problems = [_damage(part, name, facts) for name, facts in part.manifest.files.items()]
    size = sum(facts.size for facts in part.manifest.files.values())
    return Looked(f"{len(problems)} files, {size:,} bytes", [problem for problem in problems if problem])


def _damage(part: Part, name: str, facts: FileFacts) -> str:
    """What is wrong with a file, or an empty string."""
    if name not in part.there:
        return f"{name} is missing."
    found = part.facts(name)
    if found.size != facts.size:
        return f"{name} has {found.size:,} bytes instead of {facts.size:,}: it is incomplete or another file."
    said, is_ = (facts.sha256, found.sha256) if found.sha256 else (facts.git_sha1, found.git_sha1)
    return "" if said == is_ else f"{name} has the checksum {is_[:12]}… instead of {said[:12]}…: it was changed."


def unnamed(part: Part) -> Looked:
    """No file is there that the manifest does not name; hidden files are the Hub's and the tools'."""
    extra = [name for name in part.there if name not in part.manifest.files and name != MANIFEST]
    shown = [f"{name} is not in {MANIFEST}." for name in extra if not re.search(r"(^|/)\.", name)]
    return Looked(f"{len(part.there)} files", shown)


def front_matter(part: Part) -> Looked:
    """The card's front matter is YAML, and its configs and splits are exactly the tables that there are."""
    try:
        front = part.front
    except InputError as error:
        return Looked("", [str(error)])
    if repo_type_of(part.name) == "space":
        app = front.get("app_file", "app.py")
        return Looked(f"app_file {app}", [] if app in part.there else [f"app_file {app} is missing."])
    if repo_type_of(part.name) == "model":
        return Looked(f"{len(front)} keys", [])
    found = splits(front)
    named = Counter(path for *_, paths in found for path in paths)
    parquet = [name for name in part.there if name.endswith(".parquet")]
    problems = [f"the card names {path}, which is not there." for path in named if path not in part.there]
    problems += [f"the card does not name {name} in its configs." for name in parquet if name not in named]
    problems += [f"the card names {path} {n} times." for path, n in named.items() if n > 1]
    twice = [key for key, n in Counter(split[:2] for split in found).items() if n > 1]
    problems += [f"the card names the split {split} of the config {config} twice." for config, split in twice]
    return Looked(f"{len(found)} splits", problems)


def splits(front: Row) -> list[tuple[str, str, list[str]]]:
    """(config, split, its files) of every split that the front matter names."""
    found = []
    for config in front.get("configs") or []:
        files = config.get("data_files") or []
        for entry in [{"split": "train", "path": files}] if isinstance(files, str) else files:
            paths = entry["path"] if isinstance(entry["path"], list) else [entry["path"]]
            found.append((config.get("config_name", "default"), entry.get("split", "train"), paths))
    return found


def links(part: Part) -> Looked:
    """Every relative link and image of the card leads to a file or folder that is there."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", part.card, flags=re.DOTALL)
    targets = re.findall(r"\]\(\s*<?([^)\s>]+)", text) + re.findall(r"""(?:src|href)=["']([^"']+)""", text)
    relative = [target for target in targets if not re.match(r"[a-z][a-z0-9+.-]*:|#|//", target, re.IGNORECASE)]
    problems = [f"the card leads to {target}, which is not there." for target in relative if not _leads(part, target)]
    return Looked(f"{len(relative)} relative links", problems)


def _leads(part: Part, target: str) -> bool:
    name = re.split(r"[?#]", target)[0].removeprefix("./").rstrip("/")
    return name in part.there or any(known.startswith(f"{name}/") for known in part.there)
