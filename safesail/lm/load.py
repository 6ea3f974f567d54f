"""Loading a causal language model and its tokenizer from a folder or the Hub, and telling one from another."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from safesail.errors import InputError

__all__ = [
    "causal_lm",
    "check_complete",
    "check_weights",
    "files_fingerprint",
    "first_line",
    "load_tokenizer",
    "loading",
    "model_fingerprint",
    "tokenizer_hash",
]

_ONE_AT_A_TIME = threading.RLock()
_BLOCK = 1 << 16


def causal_lm(
    path: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    **hub: Any,
) -> Any:
    """The causal LM at `path` (a transformers folder or a Hub id), in evaluation mode, without gradients.

    hub: `token`, `cache_dir`, `force_download`, `local_files_only`, as in transformers.
    """
    from transformers import AutoModelForCausalLM

    check_weights(path)
    with loading(f"the model {path} cannot be loaded"):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, revision=revision, dtype=dtype, output_loading_info=True, **hub
        )
    model, report = loaded
    check_complete(path, report)
    return model.to(device).eval().requires_grad_(False)


def load_tokenizer(path: str, *, revision: str | None = None, **hub: Any) -> Any:
    """The tokenizer at `path`. hub: as for `causal_lm`."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, revision=revision, **hub)
    except (OSError, ValueError) as error:
        raise InputError(f"the tokenizer of {path} cannot be loaded: {first_line(error)}") from error


def tokenizer_hash(tokenizer: Any) -> str:
    """A SHA-256 of the vocabulary, by which a release recognises the tokenizer its SAEs were trained with."""
    vocabulary = json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=False)
    return hashlib.sha256(vocabulary.encode()).hexdigest()


def model_fingerprint(path: str, revision: str | None = None) -> str:
    """What tells one set of weights from another: the id and revision, or the folder's files."""
    if not Path(path).is_dir():
        return f"{path}@{revision or 'main'}"
    check_weights(path)
    names = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")
    return files_fingerprint(sorted(file for name in names for file in Path(path).glob(name)))


def files_fingerprint(files: list[Path]) -> str:
    """A SHA-256 over names, sizes and contents; of files above 32 MiB, 512 evenly spaced blocks stand for the whole."""
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name}:{size};".encode())
        with open(file, "rb") as handle:
            if size <= 32 << 20:
                digest.update(handle.read())
                continue
            for i in range(512):
                handle.seek(i * (size - _BLOCK) // 511)
                digest.update(handle.read(_BLOCK))
    return digest.hexdigest()


def check_folder(path: str) -> None:
    """Raise InputError when `path` looks like a folder, not like a Hub id, and does not exist."""
    if not Path(path).is_dir() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise InputError(f"the model folder {path} does not exist; `bash scripts/demo` makes the embedded one.")


def check_weights(path: str) -> None:
    """Raise InputError when `path` looks like a folder but holds no transformers model with safetensors weights."""
    check_folder(path)
    folder = Path(path)
    if not folder.is_dir():
        return
    if not (folder / "config.json").is_file():
        raise InputError(f"the model folder {path} has no config.json, so it is not a transformers model.")
    if not any(folder.glob("*.safetensors")):
        raise InputError(
            f"the model folder {path} has no weights (*.safetensors); pickled weights are not read. "
            "Save the model again with save_pretrained."
        )


def check_complete(path: str, report: dict[str, Any]) -> None:
    """Raise InputError when weights are missing: transformers would fill them with random numbers and go on."""
    missing = sorted(report["missing_keys"])
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise InputError(f"the weights of {path} lack {shown}; the checkpoint is incomplete, fetch or save it again.")


@contextmanager
def loading(complaint: str) -> Iterator[None]:
    """Around every making of a model by transformers; its errors become an InputError that begins with the complaint.

    One at a time in a process: meanwhile transformers replaces the `tie_weights` of every model, and two threads that
    load at once can leave it replaced, so that tied weights of all later models stay random. Its bars are kept out.
    """
    from transformers.utils import logging

    with _ONE_AT_A_TIME:
        logging.disable_progress_bar()
        try:
            yield
        except (OSError, ValueError, SafetensorError) as error:
            raise InputError(f"{complaint}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its class."""
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
