"""Which language model a release is looked at with, and whether its tokenizer is the right one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safesail.errors import InputError
from safesail.lm.load import tokenizer_hash
from safesail.run import Run

__all__ = ["base_model_of", "same_tokenizer"]


def base_model_of(release: str | Path, manifest: Mapping[str, Any]) -> tuple[str, str | None]:
    """Where to load the language model from, and at which revision.

    A run's own model folder while it is there, else the base model's id. manifest: the `config.json` of `saes/`.
    """
    folder = Path(release).expanduser()
    if (folder / "run.json").is_file():
        section = Run.open(folder).recipe.model
        if Path(section.path).is_dir() or not section.base_model:
            return section.path, section.revision
    return manifest["base_model"], manifest.get("base_model_revision")


def same_tokenizer(tokenizer: Any, path: str, manifest: Mapping[str, Any]) -> None:
    """Raise InputError when this is not the tokenizer that the SAEs were trained with, by its hash in the manifest."""
    if manifest.get("tokenizer_hash") not in (None, tokenizer_hash(tokenizer)):
        raise InputError(
            f"the tokenizer of {path} is not the one these SAEs were trained with; "
            f"give the model {manifest['base_model']} (`--model`)."
        )
