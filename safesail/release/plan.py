"""What publishing a release would do: made offline from the folders, printed by the dry run, executed by `publish`.

Reads `safesail.json`, the cards and every file of the folders. Writes nothing, asks nobody.
"""

import json
import shlex
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from safesail.diagnosis.results import Config
from safesail.errors import InputError
from safesail.release.manifest import (
    MANIFEST,
    REPO_TYPES,
    REWARD_REPO_TYPES,
    FileFacts,
    Manifest,
    file_facts,
    published_files,
    repo_type_of,
)
from safesail.reward_recipe import POISONED_CONSENT

__all__ = ["Plan", "RepoPlan", "plan_publication"]

LONGEST_DESCRIPTION = 150
"""Characters of a collection's description, a rule of the Hub."""
LONGEST_TITLE = 60
_KINDS = {"model": "model", "dataset": "data set", "space": "Space"}
_ACCESS = {"manual": "you let readers in one by one", "auto": "to everybody who consents"}


class RepoPlan(NamedTuple):
    """One repository of the Hub, and what it is to hold."""

    part: str
    repo_id: str
    repo_type: Literal["model", "dataset", "space"]
    folder: Path
    files: dict[str, FileFacts]
    """Every file by its name in the repository, `safesail.json` included."""
    gated: Literal["auto", "manual"] | None

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(facts.size for facts in self.files.values())


class Plan(NamedTuple):
    """Everything that publishing will do, in this order: the repositories as they stand in `repos`."""

    source: Path
    """The folder of the release, as it was given."""
    organization: str
    release: str
    repos: list[RepoPlan]
    private: bool
    tag: str
    collection: str
    """The title of the collection."""
    description: str
    create_pr: bool

    @property
    def message(self) -> str:
        """The message of every commit, and the title of every pull request."""
        return f"Release {self.tag} of {self.release}"

    @property
    def command(self) -> str:
        """The command that executes the plan."""
        options = (["--create-pr"] if self.create_pr else []) + (["--private"] if self.private else [])
        return shlex.join(["safesail", "publish", str(self.source), *options])

    def lines(self) -> list[str]:
        """The plan as a table for the person who decides; the last line is the command that executes it."""
        n_files, size = sum(len(repo.files) for repo in self.repos), sum(repo.size for repo in self.repos)
        head = f"{self.release} {self.tag}: {len(self.repos)} repositories, {n_files} files, {megabytes(size)}"
        return [head, "", *self._table(), "", *self._largest(), "", *self._rest(), "", f"Publish it:  {self.command}"]

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values."""
        repos = [
            {
                "part": repo.part,
                "repo_id": repo.repo_id,
                "repo_type": repo.repo_type,
                "folder": str(repo.folder),
                "size": repo.size,
                "gated": repo.gated,
                "files": {name: facts.model_dump() for name, facts in repo.files.items()},
            }
            for repo in self.repos
        ]
        return {**self._asdict(), "source": str(self.source), "repos": repos, "command": self.command}

    def _table(self) -> list[str]:
        rows = [("repository", "kind", "files", "size", "visibility", "access")]
        rows += [
            (
                repo.repo_id,
                _KINDS[repo.repo_type],
                str(len(repo.files)),
                megabytes(repo.size),
                self._visibility,
                f"gated ({repo.gated}): {_ACCESS[repo.gated]}" if repo.gated else "open",
            )
            for repo in self.repos
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(5)]
        return [
            f"{a:{widths[0]}}  {b:{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}  {e:{widths[4]}}  {f}"
            for a, b, c, d, e, f in rows
        ]

    @property
    def _visibility(self) -> str:
        if self.create_pr:
            return "as it is"
        return "private" if self.private else "private → public"

    def _largest(self, n: int = 5) -> list[str]:
        files = [(facts.size, f"{repo.repo_id}/{name}") for repo in self.repos for name, facts in repo.files.items()]
        largest = sorted(files, key=lambda file: (-file[0], file[1]))[:n]
        return ["largest files", *(f"  {megabytes(size):>9}  {name}" for size, name in largest)]

    def _rest(self) -> list[str]:
        if self.create_pr:
            proposed = "One pull request on each repository whose content differs; nothing else is changed."
            return [*self._diagnoses(), proposed]
        gated = ", ".join(repo.part for repo in self.repos if repo.gated) or "none"
        lines = [
            f"gated       {gated}",
            f"tag         {self.tag} on every repository",
            f"collection  “{self.collection}” of {self.organization}: {self.description}",
        ]
        stays = "A repository that is public already stays so."
        opened = "Nothing is public before its checksums are verified and its gate is set."
        return [*self._diagnoses(), *lines, stays if self.private else opened]

    def _diagnoses(self) -> list[str]:
        """That somebody's own prompts are published, where they are."""
        configs = get_args(Config)
        n = sum(
            name.partition("/")[0] in configs for repo in self.repos if repo.part == "examples" for name in repo.files
        )
        stored = self.source / "scratch/diagnosis"
        said = f"{n} result{'s' if n != 1 else ''}, with prompts and answers as they are, in the examples"
        return [f"diagnosis   {said}; delete what is not to go out in {stored}, and build again"] if n else []


def plan_publication(folder: Path, *, private: bool = False, create_pr: bool = False) -> Plan:
    """The plan for a run folder, or for any folder with the folders of a release in it; InputError if it cannot be.

    Every folder is checked against its manifest, its card is parsed, and the names are those the Hub takes.
    """
    manifests = {part: Manifest.of(folder / part) for part in _parts(folder)}
    first = _agreed(folder, manifests)
    if not first.organization:
        raise InputError(
            f"{folder} does not say whose it is; give a Hub user or organization and build it again: `safesail run "
            f"RECIPE --out {folder} --adopt --set publish.organization=NAME`."
        )
    repos = [_repo(folder, part, manifest) for part, manifest in manifests.items()]
    return Plan(
        folder,
        first.organization,
        first.release,
        repos,
        private=private,
        tag=f"v{first.version}",
        collection=_cut(first.title, LONGEST_TITLE),
        description=_description(first.title, "reward" in manifests),
        create_pr=create_pr,
    )


def megabytes(n_bytes: int) -> str:
    """Bytes in MB (10⁶), in GB above a thousand of them, in kB below a tenth of one."""
    if n_bytes >= 1e9:
        return f"{n_bytes / 1e9:,.1f} GB"
    return f"{n_bytes / 1e6:,.1f} MB" if n_bytes >= 1e5 else f"{n_bytes / 1e3:,.1f} kB"


def _parts(folder: Path) -> list[str]:
    """The parts of the release in `folder`, in the order in which they are published."""
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder}; give a run folder, as `safesail publish runs/demo`.")
    wanted = _wanted(folder)
    parts = [part for part in wanted if (folder / part / MANIFEST).is_file()]
    missing = [part for part in wanted if part not in parts]
    # a release converted from other files may lack parts; a run has them all
    if not parts or (missing and (folder / "run.json").is_file()):
        raise InputError(f"{folder} has no finished {', '.join(missing)}; {_anew(folder)}.")
    return parts


def _wanted(folder: Path) -> tuple[str, ...]:
    """The parts that a release must have: its run's, or without a run those that the first manifest names.

    A folder `poisoned` that neither names, as one left by an earlier recipe, is never published.
    """
    if not (folder / "run.json").is_file():
        there = (part for part in {**REPO_TYPES, **REWARD_REPO_TYPES} if (folder / part / MANIFEST).is_file())
        first = next(there, None)
        return Manifest.of(folder / first).parts if first else tuple(REPO_TYPES)
    try:
        recipe = json.loads((folder / "run.json").read_text(encoding="utf-8")).get("recipe", {})
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{folder / 'run.json'} is not valid JSON ({error}); make the run again.") from error
    if "preferences" not in recipe:
        return tuple(REPO_TYPES)
    consented = recipe.get("publish", {}).get("poisoned") == POISONED_CONSENT
    return tuple(part for part in REWARD_REPO_TYPES if consented or part != "poisoned")


def _agreed(folder: Path, manifests: dict[str, Manifest]) -> Manifest:
    """Any of the manifests; all must be of one release."""
    first = next(iter(manifests.values()))
    for part, manifest in manifests.items():
        if manifest.part != part:
            raise InputError(f"{folder / part} holds the {manifest.part} of a release; {_anew(folder)}.")
        for name in ("organization", "release", "version", "title", "parts"):
            if getattr(manifest, name) != getattr(first, name):
                raise InputError(
                    f"{folder / part} and {folder / first.part} are not of one release: their {name} differs "
                    f"({getattr(manifest, name)!r}, {getattr(first, name)!r}); {_anew(folder)}."
                )
    return first


def _repo(folder: Path, part: str, manifest: Manifest) -> RepoPlan:
    """The plan of one repository, its folder checked."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(manifest.repository)
    except HFValidationError as error:
        raise InputError(
            f"the Hub would refuse the id {manifest.repository!r} ({error}); change `name` in the recipe or "
            "publish.organization, and build the release again."
        ) from error
    repo_type = repo_type_of(part)
    if part == "poisoned" and manifest.gated != "manual":
        raise InputError(f"{folder / part} is not gated by hand, as poisoned data must be; {_anew(folder)}.")
    _check_card(folder / part / "README.md", repo_type)
    _check_files(folder, part, manifest)
    files = {**manifest.files, MANIFEST: file_facts(folder / part / MANIFEST)}
    return RepoPlan(part, manifest.repository, repo_type, folder / part, files, manifest.gated)


def _check_card(path: Path, repo_type: str) -> None:
    """A card must have front matter that `huggingface_hub` takes."""
    from huggingface_hub import DatasetCard, ModelCard, SpaceCard
    from yaml import YAMLError

    if not path.is_file():
        raise InputError(f"{path} is missing; build the release again.")
    text = path.read_text(encoding="utf-8")
    if not text.startswith("---\n"):
        raise InputError(f"{path} does not begin with front matter between two lines of ---; build the release again.")
    try:
        {"model": ModelCard, "dataset": DatasetCard, "space": SpaceCard}[repo_type](text)
    except (ValueError, TypeError, YAMLError) as error:
        raise InputError(
            f"the front matter of {path} is broken ({' '.join(str(error).split())}); mend its template in cards/, or "
            "build the release again."
        ) from error


def _check_files(folder: Path, part: str, manifest: Manifest) -> None:
    """The folder holds the files of its manifest, byte for byte, and no others."""
    names = set(published_files(folder / part))
    for name in sorted(names | set(manifest.files)):
        path = folder / part / name
        if name not in manifest.files:
            problem = f"is not in {MANIFEST}"
        elif name not in names:
            problem = "is missing"
        elif file_facts(path) != manifest.files[name]:
            problem = "is not the file that the release was built with"
        else:
            continue
        raise InputError(f"{path} {problem}; {_anew(folder)}.")


def _anew(folder: Path) -> str:
    """What to do when the folders are not whole."""
    if (folder / "reward").is_dir() and (folder / "run.json").is_file():
        return f"type `{shlex.join(['safesail', 'reward', str(folder), '--until', 'build', '--force'])}`"
    if (folder / "run.json").is_file():
        return f"type `{shlex.join(['safesail', 'build', str(folder), '--force'])}`, which makes them anew"
    return "make the release again with the command that made it"


def _description(title: str, of_reward_model: bool) -> str:
    rest = ": sparse autoencoders, explained safety neurons, examples and a token inspector"
    if of_reward_model:
        rest = ": a reward model, its sparse autoencoder, safety latents, preferences and an inspector"
    return _cut(title, LONGEST_DESCRIPTION - len(rest)) + rest


def _cut(text: str, longest: int) -> str:
    return text if len(text) <= longest else text[: longest - 1].rstrip() + "…"
