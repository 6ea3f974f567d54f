"""SAEs and releases in other tools' files, with a certificate of parity for every SAE.

Reads a release of ours, SAEs in any format of `sae.formats`, or the released Safe-SAIL toolkit, from a folder or the
Hub. Writes a new folder, whole or not at all: our own files (`safesail`), SAELens', sparsify's, or Neuronpedia's jsonl.
"""

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from safesail.errors import InputError
from safesail.release.convert_saes import convert_saes
from safesail.release.neuronpedia import export
from safesail.release.safe_sail_toolkit import LICENCE, Toolkit, neuron_lines, write_neurons
from safesail.repository import Repository, part_of_release
from safesail.sae.formats.foreign import Certificate

__all__ = ["TARGETS", "convert"]

Say = Callable[[str], object]
TARGETS = ("safesail", "saelens", "sparsify", "neuronpedia")


def convert(source: str, target: Path, to: str, sae_id: str | None = None, *, say: Say = print) -> list[Certificate]:
    """Write `source` in the format `to` into the new folder `target`: a certificate for each SAE written.

    source: a run folder, its `saes`, or a Hub id; a folder or repository of any known SAE format; or the released
    Safe-SAIL toolkit, which becomes a folder with `neurons/` and, where its checkpoints are, `saes/`.
    to: safesail, saelens, sparsify or neuronpedia. sae_id: only this SAE of the source.
    say: is given a line for every SAE written or left out, and for what was taken from a format's habits.
    InputError, and no folder, where nothing could be converted.
    """
    if to not in TARGETS:
        raise InputError(f"{to!r} is not a format that can be written; give --to {', '.join(TARGETS)}.")
    with _new_folder(Path(target)) as folder:
        repository = _repository(source)
        toolkit = Toolkit.find(repository, repository.names())
        release = Path(target).expanduser().resolve().name
        if to == "neuronpedia":
            return _to_neuronpedia(source, toolkit, folder, release, sae_id, say)
        if toolkit is not None:
            return _convert_toolkit(toolkit, folder, release, to, sae_id, say)
        return convert_saes(repository, folder, release.removesuffix("-saes"), to, sae_id, say)


@contextlib.contextmanager
def _new_folder(target: Path) -> Iterator[Path]:
    """A folder beside `target` that takes its place when the block ends; after an error nothing of it is left."""
    target = target.expanduser().resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} is there and not an empty folder; give the name of a new one.")
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        partial.rename(target)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise InputError(f"{target} could not be made: {error}; mend that or give another folder.") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _repository(source: str) -> Repository:
    """The repository with the SAEs: of a release `saes/` or `…-saes`, else the source itself."""
    if Path(source).expanduser().is_dir():
        inner = part_of_release(source, "saes")
        return Repository(inner if (Path(inner) / "config.json").is_file() else source)
    try:
        Repository(source).names()
    except InputError:
        release = Repository(part_of_release(source, "saes"))
        if release.source == source:
            raise
        with contextlib.suppress(InputError):  # the first error is about the name that was given
            release.names()
            return release
        raise
    return Repository(source)


def _to_neuronpedia(
    source: str, toolkit: Toolkit | None, folder: Path, release: str, sae_id: str | None, say: Say
) -> list[Certificate]:
    """Neuronpedia's files of a release, or of the toolkit by way of a release; certificates of what was converted."""
    if toolkit is None:
        lines, certificates = export(source, folder, sae_id), []
    elif not toolkit.has_checkpoints:
        raise InputError(f"{source} has no SAE checkpoints (ckpt_layer<L>.pt), and Neuronpedia needs their latents.")
    else:
        with TemporaryDirectory() as temporary:
            between = Path(temporary) / release
            certificates = _convert_toolkit(toolkit, between, release, "safesail", None, say)
            lines = export(str(between), folder, sae_id)
    for line in lines:
        say(line)
    return certificates


def _convert_toolkit(
    toolkit: Toolkit, folder: Path, release: str, to: str, sae_id: str | None, say: Say
) -> list[Certificate]:
    """The toolkit as `neurons/` and, where its checkpoints are, `saes/`; in another tool's format its SAEs alone."""
    if to != "safesail":
        if not toolkit.has_checkpoints:
            raise InputError(
                f"{toolkit.repository.source} has no SAE checkpoints (ckpt_layer<L>.pt), and {to} has no place for "
                "neurons; give --to safesail."
            )
        return convert_saes(toolkit.repository, folder, release, to, sae_id, say, LICENCE)
    found = toolkit.tables()
    write_neurons(toolkit, found, folder / "neurons", release)
    for line in neuron_lines(found):
        say(line)
    if not toolkit.has_checkpoints:
        say("saes: left out, the checkpoints (ckpt_layer<L>.pt) are not there")
        return []
    (folder / "saes").mkdir()
    try:
        return convert_saes(toolkit.repository, folder / "saes", release, to, sae_id, say, LICENCE)
    except InputError as error:
        if sae_id is not None:
            raise
        shutil.rmtree(folder / "saes")  # the neurons are converted all the same
        say(f"saes: left out: {error}")
        return []
