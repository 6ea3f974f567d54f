"""An SAE of another tool, recognised by the files that its folder or Hub repository holds."""

from collections.abc import Iterator
from pathlib import Path

from safesail.errors import InputError
from safesail.hook_names import in_id
from safesail.repository import Repository
from safesail.sae.formats import (
    dictionary_learning,
    gemma_scope,
    goodfire,
    llama_scope,
    openai,
    qwen_scope,
    saelens,
    safe_sail,
    safer,
    sparsify,
)
from safesail.sae.formats.foreign import Foreign, Format
from safesail.sae.model import RELEASE_FILE

__all__ = ["FORMATS", "foreign", "foreign_ids", "foreign_saes"]

FORMATS: tuple[Format, ...] = (
    saelens.FORMAT,
    sparsify.FORMAT,
    dictionary_learning.FORMAT,
    gemma_scope.FORMAT,
    llama_scope.FORMAT,
    qwen_scope.FORMAT,
    openai.FORMAT,
    goodfire.FORMAT,
    safe_sail.FORMAT,
    safer.FORMAT,
)
"""In the order of detection."""
_SHOWN = 12


def foreign_ids(repository: Repository) -> tuple[Format, list[str]]:
    """The format of a repository's SAEs and their ids."""
    names = repository.names()
    for form in FORMATS:
        if ids := form.find(repository, names):
            _refuse_links_out(repository.folder)
            return form, ids
    if RELEASE_FILE in names:
        raise InputError(f"{repository.source} is a part of a release that has no SAEs; give its saes folder instead.")
    known = ", ".join(form.name for form in FORMATS)
    raise InputError(f"{repository.source} holds neither a release of safesail nor an SAE in a known format ({known}).")


def foreign(source: str | Repository, sae_id: str | None = None) -> Foreign:
    """The SAE `sae_id` of a folder or Hub repository in another tool's format; the only one where no id is given."""
    repository = source if isinstance(source, Repository) else Repository(source)
    form, ids = foreign_ids(repository)
    return form.read(repository, _chosen(ids, sae_id, repository.source))


def foreign_saes(repository: Repository) -> Iterator[Foreign]:
    """Every SAE of a repository, read one after the other; InputError where two have one hook point."""
    form, ids = foreign_ids(repository)
    seen: dict[str, str] = {}
    for sae_id in ids:
        found = form.read(repository, sae_id)
        hook_point = found.sae.config.hook_point
        if hook_point in seen:
            raise InputError(
                f"{repository.source} has several SAEs at {hook_point or 'places it does not name'}: "
                f"{seen[hook_point]}, {sae_id}; load one by its id with Sae.from_pretrained."
            )
        seen[hook_point] = sae_id
        yield found


def _chosen(ids: list[str], sae_id: str | None, source: str) -> str:
    """The id itself, the only id, or the only one that names the hook point `sae_id`."""
    if sae_id in ids:
        return str(sae_id)
    matching = ids if sae_id is None else [known for known in ids if in_id(known) == sae_id]
    if len(matching) == 1:
        return matching[0]
    if matching and sae_id is not None:
        raise InputError(f"{source} has several SAEs at {sae_id}: {_listed(matching)}; give one of these ids.")
    raise InputError(f"{source} has no SAE {sae_id!r}; it has {_listed(ids)}.")


def _listed(ids: list[str]) -> str:
    return ", ".join(ids[:_SHOWN]) + (f" and {len(ids) - _SHOWN} more" if len(ids) > _SHOWN else "")


def _refuse_links_out(folder: Path | None) -> None:
    """InputError where a link leads out of a local folder, unless into the Hub's cache, which is made of such links."""
    if folder is None:
        return
    home = folder.resolve()
    allowed = [home, *([home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [])]
    for path in folder.rglob("*"):
        if path.is_symlink() and not any(path.resolve().is_relative_to(root) for root in allowed):
            raise InputError(f"{path} is a link that leads out of {folder}; give the folder that holds the files.")
