"""Reads hub/assets.toml. Writes a folder of what the demos are made from: two small models, texts, preference pairs.

    python scripts/fetch_assets.py demo-assets
    python scripts/fetch_assets.py demo-assets --plan hub/assets-bilingual.toml

Wheels are downloaded with pip, checked by their SHA-256 and read as zip files: nothing of them is installed or
imported. Every result is written beside its place and renamed, so that a killed run is simply started again.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import IO, Any

import demo_preferences
import demo_texts

from safesail.errors import InputError

PLAN = Path(__file__).resolve().parent.parent / "hub" / "assets.toml"
LEDGER = "assets.json"


@dataclass(frozen=True)
class Product:
    """One result, a path below the output folder, and the wheel members (below `root`) that it is made from."""

    result: str
    kind: str
    root: str
    members: list[str]
    licence: str
    sha256: str = ""

    @property
    def paths(self) -> list[str]:
        """The members' names inside their wheels."""
        return [f"{self.root}/{member}" if self.root else member for member in self.members]


@dataclass(frozen=True)
class Wheel:
    """One published package, pinned by its version and SHA-256."""

    package: str
    version: str
    wheel: str
    sha256: str
    megabytes: int
    licence: str
    makes: list[Product]
    pieces: list["Wheel"] = field(default_factory=list)
    """Packages that hold the rest of what is too large for one."""


class Members:
    """What lies in one or several wheels, by its name."""

    def __init__(self, archives: Sequence[zipfile.ZipFile]) -> None:
        self.by_name = {name: archive for archive in archives for name in archive.namelist()}

    def open(self, name: str) -> IO[bytes]:
        """A member to be read; InputError when no wheel has it."""
        if name not in self.by_name:
            wheels = ", ".join({Path(str(archive.filename)).name: None for archive in self.by_name.values()})
            raise InputError(f"{wheels} has no member {name}; compare the plan in hub/ with the wheel")
        return self.by_name[name].open(name)

    def read(self, name: str) -> bytes:
        """The content of a member."""
        with self.open(name) as file:
            return file.read()


def load_plan(path: Path = PLAN) -> list[Wheel]:
    """The wheels of a plan in the order of the file; unknown and missing keys raise TypeError."""
    if not path.is_file():
        plans = ", ".join(f"hub/{file.name}" for file in sorted(PLAN.parent.glob("assets*.toml")))
        raise InputError(f"there is no plan {path}; the shipped ones are {plans}")
    plan = tomllib.loads(path.read_text(encoding="utf-8"))
    if plan["schema"] != 1:
        raise InputError(f"{path} has schema {plan['schema']}, this script reads schema 1; update the checkout")
    wheels = [_wheel(entry) for entry in plan["wheels"]]
    unknown = {made.kind for wheel in wheels for made in wheel.makes} - set(MAKERS)
    if unknown:
        raise InputError(f"{path} has the kinds {sorted(unknown)}; valid are {', '.join(MAKERS)}")
    return wheels


def _wheel(entry: dict[str, Any]) -> Wheel:
    shared = {key: entry[key] for key in ("version", "licence")}
    pieces = [Wheel(**shared, **piece, makes=[]) for piece in entry.get("pieces", [])]
    return Wheel(**entry | {"makes": [Product(**made) for made in entry["makes"]], "pieces": pieces})


# the archive


def safe_target(folder: Path, member: str) -> Path:
    """Where `member` belongs below `folder`; absolute names, drives, backslashes and `..` are refused."""
    posix, windows = PurePosixPath(member), PureWindowsPath(member)
    if not member or posix.is_absolute() or windows.drive or "\\" in member or ".." in posix.parts:
        raise InputError(
            f"{member!r} would be written outside {folder}; valid are plain relative paths, as 'model/a.json'"
        )
    return folder / posix


def extract(members: Members, names: Sequence[str], target: Path) -> None:
    """Streams members, one after the other, to a file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("wb") as file:
        for name in names:
            with members.open(name) as source:
                shutil.copyfileobj(source, file, 1 << 20)


def require_sha256(file: Path, expected: str) -> None:
    """Deletes the file and raises InputError when its content is not the pinned one."""
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != expected:
        file.unlink()
        raise InputError(
            f"{file.name} has the SHA-256 {found}, but the plan in hub/ pins {expected}; it was deleted, "
            "so run the same command again, and do not use the file if that repeats itself"
        )


# the makers: each writes `target`, which is renamed afterwards


def make_gguf(wheels: Members, product: Product, target: Path) -> None:
    """A GGUF file, the members joined, as a transformers folder."""
    from safesail.lm.gguf import convert_gguf

    file = target.with_name(f"{target.name}.gguf")
    extract(wheels, product.paths, file)
    require_sha256(file, product.sha256)
    convert_gguf(file, target)
    file.unlink()


def make_files(wheels: Members, product: Product, target: Path) -> None:
    """Members as they are, in one folder."""
    for member, path in zip(product.members, product.paths, strict=True):
        extract(wheels, [path], safe_target(target, member))


def make_text(wheels: Members, product: Product, target: Path) -> None:
    """Documents of one data set, one JSON object a line."""
    items = json.loads(wheels.read(product.paths[0]))["examples"]
    name = PurePosixPath(product.result).stem
    write_lines(demo_texts.numbered(name, demo_texts.READERS[name](items)), target)


def make_answers(wheels: Members, product: Product, target: Path) -> None:
    """Preference pairs from answers that people scored, one JSON object a line."""
    rows = []
    for member, path in zip(product.members, product.paths, strict=True):
        answers = demo_preferences.scored_answers(wheels.read(path))
        rows += demo_preferences.safety_pairs(member.removesuffix(".csv"), answers)
    write_lines(rows, target)


def make_endings(wheels: Members, product: Product, target: Path) -> None:
    """Preference pairs from situations with right and wrong endings, one JSON object a line."""
    items = json.loads(wheels.read(product.paths[0]))["examples"]
    write_lines(demo_preferences.chat_pairs(PurePosixPath(product.result).stem, items), target)


def write_lines(rows: Iterable[Any], target: Path) -> None:
    """One JSON object a line."""
    with target.open("w", encoding="utf-8", newline="\n") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


MAKERS: dict[str, Callable[[Members, Product, Path], None]] = {
    "gguf": make_gguf,
    "files": make_files,
    "text": make_text,
    "answers": make_answers,
    "endings": make_endings,
}


def make(wheels: Members, product: Product, out: Path) -> None:
    """`out/result` is whole, or as it was before."""
    final = safe_target(out, product.result)
    partial = final.with_name(f".{final.name}.new")
    final.parent.mkdir(parents=True, exist_ok=True)
    for left_over in final.parent.glob(f"{partial.name}*"):
        remove(left_over)
    MAKERS[product.kind](wheels, product, partial)
    remove(final)
    partial.rename(final)


def remove(path: Path) -> None:
    """A file or a folder is gone."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


# the whole


def fetch(wheel: Wheel, cache: Path) -> Path:
    """The verified wheel in `cache`, downloaded with pip when it is not there."""
    file = safe_target(cache, wheel.wheel)
    if not file.exists():
        say(f"downloading {wheel.package} {wheel.version} ({wheel.megabytes} MB)")
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as folder:
            download(wheel, Path(folder))
            (Path(folder) / wheel.wheel).rename(file)
    require_sha256(file, wheel.sha256)
    return file


def download(wheel: Wheel, folder: Path) -> None:
    """One wheel, without what it depends on and never built from source."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    choice = ["--no-binary=:none:", "--only-binary=:all:", "-d", str(folder), f"{wheel.package}=={wheel.version}"]
    code = subprocess.run([*pip, *choice], stdout=sys.stderr, check=False).returncode
    if code or not (folder / wheel.wheel).is_file():
        raise InputError(
            f"pip could not download {wheel.wheel} (exit status {code}, its message is above); check the network with "
            f"`{Path(sys.executable).name} -m pip download --no-deps {wheel.package}=={wheel.version}`, "
            "then run the same command again"
        )


def is_done(product: Product, wheel: Wheel, out: Path, ledger: dict[str, Any]) -> bool:
    """The result is there and, as far as is recorded, was made from this very wheel."""
    recorded = ledger.get(product.result, {"sha256": wheel.sha256})
    return (out / product.result).exists() and recorded["sha256"] == wheel.sha256


def make_missing(wheel: Wheel, out: Path, ledger: dict[str, Any]) -> None:
    """Every result of one wheel is in `out`; the wheel is fetched only when one is missing."""
    todo = [product for product in wheel.makes if not is_done(product, wheel, out, ledger)]
    if not todo:
        return
    with contextlib.ExitStack() as stack:
        files = [fetch(each, out / "wheels") for each in (wheel, *wheel.pieces)]
        members = Members([stack.enter_context(zipfile.ZipFile(file)) for file in files])
        for product in todo:
            start = time.monotonic()
            say(f"making {product.result} from {wheel.package}")
            make(members, product, out)
            say(f"made {product.result} in {time.monotonic() - start:.0f} s")


def fetch_assets(wheels: list[Wheel], out: Path, keep_wheels: bool) -> None:
    """Every result of every wheel is in `out`, and assets.json says what each was made from."""
    out.mkdir(parents=True, exist_ok=True)
    ledger = json.loads((out / LEDGER).read_text(encoding="utf-8")) if (out / LEDGER).exists() else {}
    for wheel in wheels:
        make_missing(wheel, out, ledger)
        for product in wheel.makes:
            origin = {"package": wheel.package, "version": wheel.version, "sha256": wheel.sha256}
            ledger[product.result] = origin | {"licence": product.licence}
    partial = out / f".{LEDGER}.new"
    partial.write_text(json.dumps(ledger, indent=1) + "\n", encoding="utf-8")
    partial.rename(out / LEDGER)
    if not keep_wheels:
        remove(out / "wheels")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def print_content(out: Path) -> None:
    """One line a file with its size."""
    files = sorted(path for path in out.rglob("*") if path.is_file() and not path.name.startswith("."))
    for path in files:
        print(f"{path.stat().st_size / 1e6:9.2f} MB  {path}")
    print(f"{sum(path.stat().st_size for path in files) / 1e6:9.2f} MB  in all")


def main() -> int:
    parser = argparse.ArgumentParser(description="Fetch what a plan names: for the demo two models and texts (230 MB).")
    parser.add_argument("out", type=Path, help="the folder to fill, as demo-assets")
    parser.add_argument("--plan", type=Path, default=PLAN, help="what is fetched (default: hub/assets.toml)")
    parser.add_argument("--keep-wheels", action="store_true", help="keep OUT/wheels after success")
    arguments = parser.parse_args()
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        fetch_assets(load_plan(arguments.plan), arguments.out, arguments.keep_wheels)
    except InputError as error:
        say(f"fetch_assets: {error}")
        return 2
    print_content(arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
