"""SAEs written in our files, SAELens' or sparsify's, read back, and compared with where they came from.

A certificate compares what was written with the equations of the source's format on the source's tensors. An SAE that
has no exact counterpart is left out, and the reason said and written down; nothing is made up for it.
"""

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from safesail import __version__
from safesail.errors import InputError
from safesail.files import write_tensors
from safesail.recipe import PublishSection
from safesail.release.cards import render
from safesail.release.front_matter import RELATION
from safesail.release.hub_id import hub_id
from safesail.release.manifest import write_manifest
from safesail.repository import Repository
from safesail.run import write_json
from safesail.sae import model as sae_files
from safesail.sae.config import SaeConfig
from safesail.sae.formats import archive
from safesail.sae.formats.foreign import Certificate, Foreign, Format, certificate, inside
from safesail.sae.formats.read import foreign, foreign_ids
from safesail.sae.formats.sparsify import write_sparsify
from safesail.sae.model import Sae

__all__ = ["convert_saes"]

Row = dict[str, Any]
Say = Callable[[str], object]
MOST_APART = 1e-3
"""An SAE is refused where more than this share of its active latents is active on one side only: some pre-activations
lie so near a threshold that rounding decides, and no more than that may differ."""


def convert_saes(
    repository: Repository,
    folder: Path,
    release: str,
    to: str,
    sae_id: str | None,
    say: Say,
    licence: str | None = None,
) -> list[Certificate]:
    """The SAEs of a repository with their certificates, manifest and card. licence: by default as its README says."""
    source = _Source.open(repository, to, sae_id)
    written, refused = _write_all(source, folder, to, say)
    written = _placed(written, folder, to)
    facts = _facts(source, written, refused, release, to, licence or _declared_licence(source))
    _write_certificates(folder, facts)
    (folder / "README.md").write_text(render("converted.md", **facts), encoding="utf-8")
    _copy_licence(source, folder)
    if to == "safesail":
        _write_sae_manifest(folder, written, facts)
        write_manifest(folder, "saes", release, "", facts["title"], PublishSection().version, None)
    if to == "sparsify":
        write_json(folder / "config.json", _run_config(written, facts))
    for line in _lines(written):
        say(line)
    return [done.certificate for done in written]


class _Written(NamedTuple):
    """An SAE in its new place."""

    name: str
    """Its id in the folder."""
    config: SaeConfig
    certificate: Certificate
    folder: Path


class _Source(NamedTuple):
    """The SAEs of a repository that are to be converted."""

    repository: Repository
    names: list[str]
    """Of its files."""
    form: Format
    ids: list[str]
    selected: dict[str, str] | None
    """Of a release of ours {hook point: id of its selected SAE}; None: it is none."""

    @classmethod
    def open(cls, repository: Repository, to: str, sae_id: str | None) -> "_Source":
        """The SAE `sae_id`, or all; of a release and for sparsify, which has one at a hook point, the selected ones."""
        names = repository.names()
        form, ids = foreign_ids(repository)
        selected = _selected(repository, names)
        if selected is not None and to == "safesail":
            raise InputError(f"{repository.source} is a release of safesail already; give --to saelens or sparsify.")
        if sae_id is not None:
            meant = (selected or {}).get(sae_id, sae_id)
            if meant not in ids:
                shown = ", ".join(ids[:12]) + (f" and {len(ids) - 12} more" if len(ids) > 12 else "")
                raise InputError(f"{repository.source} has no SAE {sae_id!r}; it has {shown}.")
            ids = [meant]
        elif selected is not None and to == "sparsify":
            ids = [name for name in ids if name in selected.values()]
        return cls(repository, names, form, ids, selected)

    def read(self, name: str) -> Foreign:
        """An SAE with its format's own equations; of a release with all that its config says."""
        theirs = self.form.read(self.repository, name)
        if self.selected is None:
            return theirs
        return theirs._replace(format="safesail", sae=Sae.from_pretrained(self.repository.source, name))

    @property
    def shown(self) -> str:
        """What a card calls it: a Hub id, or the name of a folder without the path to it."""
        folder = self.repository.folder
        return folder.resolve().name if folder else self.repository.source


def _selected(repository: Repository, names: list[str]) -> dict[str, str] | None:
    """The selected SAEs in the manifest of a release of ours; None where there is no such manifest."""
    if "config.json" not in names:
        return None
    content = repository.json("config.json")
    is_ours = isinstance(content, dict) and isinstance(content.get("saes"), list)
    return dict(content.get("selected", {})) if is_ours else None


def _write_all(source: _Source, folder: Path, to: str, say: Say) -> tuple[list[_Written], dict[str, str]]:
    """Every SAE that can be written, each in a numbered folder, and {id: why not} of the others."""
    written: list[_Written] = []
    refused: dict[str, str] = {}
    for number, name in enumerate(source.ids):
        place = folder / f".{number}"
        try:
            written.append(_write(source, name, place, to, {done.name for done in written}))
        except InputError as error:
            shutil.rmtree(place, ignore_errors=True)
            refused[name] = str(error)
            say(f"{name} is left out: {error}")
    if not written:
        reasons = " ".join(f"{name}: {reason}" for name, reason in list(refused.items())[:3])
        raise InputError(f"no SAE of {source.repository.source} can be written as {to}. {reasons}")
    return written, refused


def _write(source: _Source, name: str, folder: Path, to: str, taken: set[str]) -> _Written:
    """Write one SAE into `folder`, read it back and compare it with its source."""
    theirs = source.read(name)
    config = theirs.sae.config
    if to == "sparsify":
        _refuse_second(config.hook_point, name, taken)
        write_sparsify({config.hook_point: theirs.sae}, folder)
        back = foreign(Repository(str(folder))).sae
    else:
        theirs.sae.save(folder)
        _copy_sparsity(source, name, folder, config.d_sae)
        back = sae_files.read(folder)
    result = certificate(theirs._replace(sae=back))
    _refuse_difference(result)
    return _Written(config.hook_point if to == "sparsify" else config.sae_id, config, result, folder)


def _refuse_second(hook_point: str, name: str, taken: set[str]) -> None:
    """InputError where sparsify, which names the folder of an SAE by its hook point, has no folder for it."""
    if not hook_point:
        raise InputError("where it reads is not known, and sparsify names the folder of an SAE by that.")
    if hook_point in taken:
        raise InputError(
            f"sparsify has one SAE at a hook point, and {hook_point} has one here already; "
            f"convert it into a folder of its own: give its id {name}."
        )


def _refuse_difference(found: Certificate) -> None:
    """InputError where the two are not one function: differences beyond rounding, at a threshold or not."""
    n_active = max(found.l0_theirs * found.n_vectors, 1)
    differs = found.n_latents_apart == 0 and not found.exact
    if differs or found.n_latents_apart > MOST_APART * n_active:
        raise InputError(
            f"what was read differs from the equations of {found.format}: latents by up to "
            f"{found.max_latent_error:.1e} and the reconstruction by {found.max_reconstruction_error:.1e} of their "
            f"largest, and {found.n_latents_apart} of {n_active:.0f} active latents are active on one side only."
        )


def _copy_sparsity(source: _Source, name: str, folder: Path, d_sae: int) -> None:
    """Keep the firing frequencies, which SAELens and we store alike."""
    path = inside(name, sae_files.SPARSITY_FILE)
    if path in source.names:
        found = archive.safetensors_of(source.repository.file(path)).get("sparsity")
        if found is None or tuple(found.shape) != (d_sae,):
            raise InputError(f"{path} is not the firing frequencies of {d_sae} latents.")
        write_tensors(folder / sae_files.SPARSITY_FILE, {"sparsity": found})


def _placed(written: list[_Written], folder: Path, to: str) -> list[_Written]:
    """Move every SAE to its place: two that would have one name have the source's id in it as well."""
    counts = Counter(done.name for done in written)
    placed = []
    for done in written:
        name = done.name if counts[done.name] == 1 else f"{done.name}-{_slug(done.certificate.sae_id)}"
        name = "/".join(filter(None, map(_slug, name.split("/")))) or "sae"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (done.folder / done.name if to == "sparsify" else done.folder).rename(folder / name)
        placed.append(done._replace(name=name, folder=folder / name))
    for left in folder.glob(".*"):
        shutil.rmtree(left)
    return placed


def _slug(text: str) -> str:
    """The text as one part of a file name, that leads nowhere else."""
    return re.sub(r"[^\w.=-]+", "-", text, flags=re.ASCII).strip("-.")


def _write_certificates(folder: Path, facts: Row) -> None:
    """certificates.json: every number of the card's table, and what was left out."""
    names = ("source", "target", "version", "certificates", "refused")
    write_json(folder / "certificates.json", {"schema": 1, **{name: facts[name] for name in names}})


def _write_sae_manifest(folder: Path, written: list[_Written], facts: Row) -> None:
    """config.json as of a release of ours, without what is not known of a conversion: metrics and a selection.

    Where a hook point has one SAE it is the selected one; of several none is, for nobody compared them.
    """
    at = Counter(done.config.hook_point for done in written)
    selected = {done.config.hook_point: done.name for done in written if at[done.config.hook_point] == 1}
    selected.pop("", None)  # a format may not say where it reads
    write_json(
        folder / "config.json",
        {
            "schema": 1,
            "safesail_version": __version__,
            "base_model": facts["base_models"][0] if len(facts["base_models"]) == 1 else "",
            "base_model_revision": None,
            "tokenizer_hash": None,
            "selected": selected,
            "saes": [{"id": done.name, "selected": done.name in selected.values()} for done in written],
            "converted": {
                "source": facts["source"],
                "format": written[0].certificate.format,
                "ids": {done.name: done.certificate.sae_id for done in written},
            },
        },
    )


def _run_config(written: list[_Written], facts: Row) -> Row:
    """The config.json of a sparsify run that holds all the folders."""
    models = facts["base_models"]
    first = json.loads((written[0].folder / "cfg.json").read_text(encoding="utf-8"))
    return {"hookpoints": [done.name for done in written], "sae": first} | ({"model": models[0]} if models else {})


# --- cards --------------------------------------------------------------------------------------------------------


def _facts(
    source: _Source, written: list[_Written], refused: dict[str, str], release: str, to: str, licence: str | None
) -> Row:
    """What the card of converted SAEs may print."""
    base_models = list(dict.fromkeys(done.config.model_name for done in written if done.config.model_name))
    return {
        "title": f"{release}: sparse autoencoders" if release else "Sparse autoencoders",
        "front_matter": _model_front(licence, base_models, to),
        "source": source.shown,
        "target": to,
        "version": __version__,
        "licence": licence,
        "base_models": base_models,
        "example": written[0].name,
        "n_vectors": written[0].certificate.n_vectors,
        "certificates": [
            {"name": done.name, **done.certificate._asdict(), "exact": done.certificate.exact} for done in written
        ],
        "notes": list(dict.fromkeys(note for done in written for note in done.certificate.notes)),
        "refused": refused,
    }


def _model_front(licence: str | None, base_models: list[str], to: str) -> str:
    from huggingface_hub import ModelCardData

    on_hub = [name for name in base_models if hub_id(name)]
    data: Row = {"base_model": on_hub, "base_model_relation": RELATION} if on_hub else {}
    return ModelCardData(
        **data,
        license=licence,
        library_name="safesail" if to == "safesail" else to,
        tags=["sparse-autoencoder", "interpretability"],
    ).to_yaml()


def _declared_licence(source: _Source) -> str | None:
    """The licence in the front matter of the source's README; None where it says none."""
    if "README.md" not in source.names:
        return None
    text = source.repository.file("README.md").read_text(encoding="utf-8", errors="replace")
    front = re.match(r"---\s*\n(.*?)\n---", text, re.DOTALL)
    found = re.search(r"^license:\s*[\"']?([\w.+-]+)[\"']?\s*$", front[1], re.MULTILINE) if front else None
    return found[1] if found else None


def _copy_licence(source: _Source, folder: Path) -> None:
    """Keep the text of the source's licence, as most licences ask."""
    names = [name for name in source.names if name.rpartition("/")[2] in ("LICENSE", "LICENSE.md", "LICENSE.txt")]
    if names:
        nearest = min(names, key=lambda name: (name.count("/"), name))
        shutil.copyfile(source.repository.file(nearest), folder / nearest.rpartition("/")[2])


def _lines(written: list[_Written]) -> Iterator[str]:
    """What the command prints of the SAEs that were written."""
    for done in written:
        found = done.certificate
        apart = f", {found.n_latents_apart} latents apart" if found.n_latents_apart else ""
        yield (
            f"{done.name}: {found.format} {found.sae_id}; errors: latents {found.max_latent_error:.1e}, reconstruction "
            f"{found.max_reconstruction_error:.1e}{apart}; L0 {found.l0:.1f} (source {found.l0_theirs:.1f}); "
            f"{'exact' if found.exact else 'not exact'}"
        )
        yield from (f"  {note}" for note in found.notes)
