"""A run folder: the release in the making. Stages, their records, and what is done, stale or missing.

    runs/<release>/
    ├── run.json     the recipe as used and one record per finished stage
    ├── saes/ neurons/ examples/ inspector/     one sub-folder per Hub repository: what `build` makes; of a reward model
    │                                           saes/ reward/ salience/ preferences/ inspector/, and where the recipe
    │                                           says so poisoned/
    └── scratch/     one folder per stage (its result and its record), and the unfinished stage's partial work;
                     diagnosis/ holds the results of the diagnosis, which no stage makes and `build` publishes

A stage works in `scratch/.<stage>.partial`, puts its record into that folder and renames it: a result and its record
appear together or not at all. A stage is *done* when its record's fingerprint equals the fingerprint that the recipe
and the stages before it now give, *stale* when it differs, else *missing*.

Under torchrun, all ranks work on the stages that are `shared`, and the first rank alone on the others; only the first
rank makes, marks and renames folders, holds the lock and writes the ledger. A rank that fails ends with an error, and
torchrun then ends the others, which may be waiting for it; what is finished is kept.
"""

import contextlib
import fcntl
import hashlib
import json
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safesail.errors import InputError
from safesail.files import replacing
from safesail.recipe import Recipe, differences
from safesail.repository import read_table
from safesail.reward_recipe import RewardRecipe, parse_recipe

if TYPE_CHECKING:
    from safesail.distributed import Ranks

__all__ = [
    "PARTS",
    "REWARD_PARTS",
    "REWARD_STAGES",
    "STAGES",
    "Run",
    "Stage",
    "StageWork",
    "dependents",
    "fingerprint",
    "write_json",
]

SCHEMA = 1
PARTS = ("saes", "neurons", "examples", "inspector")
REWARD_PARTS = ("saes", "reward", "salience", "preferences", "poisoned", "inspector")
"""Those of a reward model; `poisoned` only where the recipe says so."""
_MARK = "fingerprint"
"""The file that says whose work a partial folder holds."""


class Stage(NamedTuple):
    """A step of the pipeline: the recipe sections that decide it and the stages whose results it reads."""

    name: str
    sections: tuple[str, ...]
    after: tuple[str, ...]
    inputs: tuple[str, ...] = ()
    """Names of outside inputs (the model, the texts) whose fingerprints the pipeline supplies."""
    shared: bool = False
    """Whether all ranks of torchrun work on it together."""
    stored: tuple[str, ...] = ()
    """Names of folders in `scratch/` that no stage makes and that it reads where they are there."""


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("harvest", ("seed", "model", "tokens", "corpus", "harvest"), (), ("model", "texts", "taxonomy"), True),
        Stage("train", ("seed", "train"), ("harvest",), (), True),
        Stage("eval", ("eval",), ("harvest", "train")),
        Stage("select", ("seed", "select"), ("harvest", "train", "eval"), ("pairs", "taxonomy")),
        Stage("collect", ("seed", "collect"), ("harvest", "select")),
        Stage("explain", ("seed", "explain"), ("select", "collect"), ("encoder", "taxonomy", "explain_prompts")),
        Stage("score", ("seed", "score"), ("harvest", "collect", "explain"), ("encoder", "simulate_prompts")),
        Stage(
            "build",
            ("name", "publish"),
            ("eval", "select", "collect", "explain", "score"),
            ("cards", "space"),
            stored=("diagnosis",),
        ),
    )
}

REWARD_STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("preferences", ("seed", "preferences"), (), ("preferences",)),
        Stage("reward", ("seed", "model", "reward"), ("preferences",), ("model",), True),
        Stage("harvest", ("seed", "tokens", "corpus", "harvest"), ("reward",), ("texts", "taxonomy"), True),
        Stage("train", ("seed", "train"), ("harvest",), (), True),
        Stage("ends", ("ends", "harvest"), ("preferences", "reward"), (), True),
        Stage("tune", ("seed", "tune", "tokens"), ("train", "ends"), (), True),
        Stage("eval", (), ("tune", "ends")),
        Stage("salience", ("seed", "salience"), ("preferences", "ends", "tune")),
        Stage("rate", ("seed", "rate"), ("salience",), ("rater", "rate_prompts")),
        Stage("score", ("seed",), ("preferences", "reward", "ends", "tune", "rate")),
        Stage("edit", ("seed", "edit"), ("preferences", "score")),
        Stage("compare", ("seed", "model", "reward", "compare"), ("preferences", "edit"), ("model",)),
        Stage("build", ("name", "publish"), ("eval", "salience", "rate", "score", "compare"), ("cards", "space")),
    )
}
"""The steps of SAFER."""


@dataclass
class StageWork:
    """What a running stage is given: its folder to write in, and a place for the facts that go into its record."""

    folder: Path
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Run:
    """One run folder and the recipe it is made from."""

    folder: Path
    recipe: Recipe | RewardRecipe
    inputs: dict[str, str] = field(default_factory=dict)
    """Fingerprints of the outside inputs, by name."""

    @classmethod
    def create(cls, folder: str | Path, recipe: Recipe | RewardRecipe, *, adopt: bool = False) -> "Run":
        """Start a run in `folder`, or go on with the one there; another recipe's folder is refused unless `adopt`."""
        run = cls(Path(folder), recipe)
        if run.ranks.first:
            run._start(adopt)
        run.ranks.wait()
        return run

    def _start(self, adopt: bool) -> None:
        if self.ledger.is_file():
            changes = differences(_read_ledger(self.ledger)["recipe"], self.recipe.dump())
            if changes and not adopt:
                raise InputError(
                    f"{self.folder} was made with another recipe: {'; '.join(changes)}. Give another folder "
                    "with --out, or add --adopt to keep what still holds and make the rest anew."
                )
        elif self.folder.is_dir() and any(self.folder.iterdir()):
            raise InputError(f"{self.folder} is not empty and has no run.json; give another folder with --out.")
        self.scratch.mkdir(parents=True, exist_ok=True)
        self.write_ledger()

    @classmethod
    def open(cls, folder: str | Path) -> "Run":
        """The run in an existing folder, with the recipe it was made from."""
        path = Path(folder) / "run.json"
        if not path.is_file():
            raise InputError(
                f"{folder} has no run.json, so it is not a run; type `safesail run RECIPE --out {folder}`."
            )
        return cls(Path(folder), parse_recipe(_read_ledger(path)["recipe"], str(path)))

    @property
    def stages(self) -> dict[str, Stage]:
        """The stages of this kind of run by name, in their order."""
        return REWARD_STAGES if isinstance(self.recipe, RewardRecipe) else STAGES

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts of this run's release, in the order in which they are published."""
        if not isinstance(self.recipe, RewardRecipe):
            return PARTS
        return tuple(part for part in REWARD_PARTS if part != "poisoned" or self.recipe.publish.poisoned)

    @cached_property
    def ranks(self) -> "Ranks":
        """The ranks of torchrun; a single one without it."""
        from safesail.distributed import ranks  # torch, which not every command needs

        return ranks()

    @property
    def ledger(self) -> Path:
        return self.folder / "run.json"

    @property
    def scratch(self) -> Path:
        return self.folder / "scratch"

    def result(self, stage: str) -> Path:
        """The folder of a finished stage; raises InputError naming the command that makes it."""
        path = self.scratch / stage
        if not (path / "stage.json").is_file():
            raise InputError(f"{self.folder} has no result of {stage} yet; type `{self.command(stage)}`.")
        return path

    def command(self, stage: str) -> str:
        """The command that makes a stage."""
        if isinstance(self.recipe, RewardRecipe):
            return f"safesail reward {self.folder} --until {stage}"
        return f"safesail {stage} {self.folder}"

    def json_of(self, stage: str, name: str) -> Any:
        """The decoded JSON file `name` of a finished stage."""
        return json.loads((self.result(stage) / name).read_text(encoding="utf-8"))

    def table_of(self, stage: str, name: str) -> list[dict[str, Any]]:
        """The rows of the parquet file `name` of a finished stage."""
        return read_table(self.result(stage) / name)

    def part(self, name: str) -> Path:
        """The folder of one Hub repository: saes, neurons, examples or inspector."""
        return self.folder / name

    def record(self, stage: str) -> dict[str, Any] | None:
        """The record of a finished stage, or None."""
        path = self.scratch / stage / "stage.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def expected_fingerprint(self, stage: str) -> str:
        """The fingerprint that the recipe, the outside inputs and the stages before give for `stage`."""
        definition, recipe = self.stages[stage], self.recipe.dump()
        return fingerprint(
            SCHEMA,
            stage,
            {name: recipe[name] for name in definition.sections},
            {name: self.inputs.get(name) for name in definition.inputs} | self._stored_for(stage),
            {name: self.expected_fingerprint(name) for name in definition.after},
        )

    def state(self, stage: str) -> str:
        """`done`, `stale` or `missing`."""
        record = self.record(stage)
        if record is None:
            return "missing"
        return "done" if record["fingerprint"] == self.expected_fingerprint(stage) else "stale"

    def changed_inputs(self, name: str) -> list[str]:
        """The outside inputs of a stage that are not those of its result or of its unfinished work.

        Records and marks made before inputs were kept in them name none.
        """
        records = [record for record in (self.record(name), _read_mark(self._partial(name))) if record]
        known, now = [record["inputs"] for record in records if record.get("inputs")], self._inputs_of(name)
        changed = [each for each in now if any(each in before and before[each] != now[each] for before in known)]
        # what is stored may have come or gone, so that it has no fingerprint on one of the two sides
        stored = self.stages[name].stored
        came_or_went = [each for each in stored if any((each in before) != (each in now) for before in known)]
        return changed + came_or_went

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[StageWork]:
        """Work on a stage in its partial folder; on leaving without error the folder becomes the stage's result.

        An earlier, interrupted attempt with the same fingerprint leaves its partial work in place to go on with; one
        with another fingerprint is removed.
        """
        alone = not self.stages[name].shared
        if alone or self.ranks.first:
            self._open(name)
        if not alone:
            self.ranks.wait()
        work, started = StageWork(self._partial(name)), time.monotonic()
        yield work
        if not alone:
            self.ranks.wait()
        if alone or self.ranks.first:
            self._close(name, {"seconds": round(time.monotonic() - started, 1), **work.facts})
        if not alone:
            self.ranks.wait()

    def _open(self, name: str) -> None:
        """Make the partial folder ready: with the work of an attempt of the same fingerprint, else empty."""
        partial, expected = self._partial(name), self.expected_fingerprint(name)
        if _read_mark(partial).get("fingerprint") != expected:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            write_json(partial / _MARK, {"fingerprint": expected, "inputs": self._inputs_of(name)})

    def _close(self, name: str, facts: dict[str, Any]) -> None:
        """Put the record into the partial folder and make the folder the stage's result."""
        partial = self._partial(name)
        record: dict[str, Any] = {"stage": name, "fingerprint": self.expected_fingerprint(name)}
        if inputs := self._inputs_of(name):
            record["inputs"] = inputs
        write_json(partial / "stage.json", record | facts)
        for left in [*partial.rglob(".*.new"), *partial.rglob(".tmp*")]:  # by an attempt that was killed while it wrote
            left.unlink()
        (partial / _MARK).unlink()
        for later in dependents(name, self.stages):  # made from what is replaced now
            (self.scratch / later / "stage.json").unlink(missing_ok=True)
        final = self.scratch / name
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        self.write_ledger()

    def _partial(self, name: str) -> Path:
        return self.scratch / f".{name}.partial"

    def _inputs_of(self, name: str) -> dict[str, str]:
        given = {each: self.inputs[each] for each in self.stages[name].inputs if each in self.inputs}
        return given | self._stored_for(name)

    def _stored_for(self, name: str) -> dict[str, str]:
        """The fingerprints of what a stage reads besides stages; where there is nothing, there is no fingerprint."""
        return {each: self._stored[each] for each in self.stages[name].stored if each in self._stored}

    @cached_property
    def _stored(self) -> dict[str, str]:
        """{folder in `scratch/` that no stage makes: a fingerprint of its files}, as they are when first asked for."""
        folders = {each: self.scratch / each for stage in self.stages.values() for each in stage.stored}
        hashes = {name: _file_hashes(folder) for name, folder in folders.items()}
        return {name: fingerprint(found) for name, found in hashes.items() if found}

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keep a second process from working in the same folder; the first rank holds it for all."""
        if not self.ranks.first:
            yield
            return
        with open(self.scratch / "lock", "w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(f"another process is working in {self.folder}; wait for it or stop it.") from error
            yield

    def write_ledger(self) -> None:
        """Write run.json: the recipe and the records of the finished stages."""
        records = {name: record for name in self.stages if (record := self.record(name)) is not None}
        write_json(self.ledger, {"schema": SCHEMA, "recipe": self.recipe.dump(), "stages": records})


def dependents(name: str, stages: dict[str, Stage] = STAGES) -> list[str]:
    """The stages that read a stage's result, directly or through others, in their order."""
    found: list[str] = []
    for stage in stages.values():
        if {name, *found} & set(stage.after):
            found.append(stage.name)
    return found


def _file_hashes(folder: Path) -> dict[str, str]:
    """{name: SHA-256} of the files below a folder; hidden ones are left out, as are those that are being written."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    shown = {name: path for name, path in files.items() if not re.search(r"(^|/)\.", name)}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in shown.items()}


def fingerprint(*values: Any) -> str:
    """A SHA-256 over JSON values, the same for equal values."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is either the old one or the whole new one, also after a crash or on a full disk."""
    text = json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    with replacing(path, len(text)) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _read_mark(partial: Path) -> dict[str, Any]:
    """Whose work a partial folder holds: its fingerprint and inputs; nothing where there is no mark."""
    mark = partial / _MARK
    text = mark.read_text(encoding="utf-8") if mark.is_file() else "{}"
    return json.loads(text) if text.startswith("{") else {"fingerprint": text}  # as it was before inputs were kept


def _read_ledger(path: Path) -> dict[str, Any]:
    try:
        ledger = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(
            f"{path} is not valid JSON ({error}); restore it or give another folder with --out."
        ) from error
    if isinstance(ledger, dict) and ledger.get("schema") not in (None, SCHEMA):
        raise InputError(
            f"{path} has schema {ledger['schema']!r}, and this safesail reads schema {SCHEMA}; "
            "install the version that made it."
        )
    if not isinstance(ledger, dict) or not isinstance(ledger.get("recipe"), dict):
        raise InputError(f"{path} is not the ledger of a run: it has no recipe; give another folder with --out.")
    return ledger
