"""Reads one GGUF file. Writes an ordinary transformers folder: fp32 safetensors, tokenizer, chat template.

Since transformers 5 a GGUF file that is loaded directly keeps its weights packed, which is slow on a CPU; a converted
folder loads in a second and needs no `gguf` package. What is converted are the *dequantised* weights: they are not the
weights the model was released with, and a card that rests on them has to say so.
"""

import importlib.util
import shutil
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import Digits, Sequence

from safesail.errors import InputError

__all__ = ["convert_gguf", "split_digits"]


def convert_gguf(gguf_file: Path, folder: Path, *, digits: bool = True) -> None:
    """`folder` becomes a whole transformers model, or does not exist: it is written beside itself and renamed.

    `digits` puts `Digits(individual_digits=True)` in front of the pre-tokenizer, as SmolLM2's released tokenizer has it
    and its GGUF conversion has not.
    """
    gguf_file, folder = Path(gguf_file), Path(folder)
    _require_convertible(gguf_file, folder)
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _convert_tokenizer(gguf_file, partial, digits=digits)
    _convert_model(gguf_file, partial)
    partial.rename(folder)


def split_digits(tokenizer: Tokenizer) -> None:
    """`2024` becomes four pieces before any merge; a tokenizer that has the step already is left as it is."""
    present = tokenizer.pre_tokenizer
    if present is None:
        tokenizer.pre_tokenizer = Digits(individual_digits=True)
    elif [piece for piece, _ in present.pre_tokenize_str("20")] != ["2", "0"]:
        tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), present])


def _require_convertible(gguf_file: Path, folder: Path) -> None:
    """Raises InputError for what would fail minutes later."""
    if not gguf_file.is_file():
        raise InputError(f"there is no GGUF file {gguf_file}; give the path of a .gguf file")
    with gguf_file.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise InputError(f"{gguf_file} begins with {magic!r}, a GGUF file with b'GGUF'; give the path of a .gguf file")
    if folder.exists():
        raise InputError(f"{folder} exists already; give a new folder, or remove it with: rm -r {folder}")
    missing = [package for package in ("gguf", "accelerate") if importlib.util.find_spec(package) is None]
    if missing:
        raise InputError(
            f"reading a GGUF file needs {' and '.join(missing)}, not installed here; type: pip install 'safesail[gguf]'"
        )


def _convert_tokenizer(gguf_file: Path, folder: Path, *, digits: bool) -> None:
    """Writes tokenizer.json, tokenizer_config.json and the chat template the GGUF metadata carries."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(gguf_file.parent), gguf_file=gguf_file.name)
    if digits:
        split_digits(tokenizer.backend_tokenizer)
    tokenizer.save_pretrained(folder)


def _convert_model(gguf_file: Path, folder: Path) -> None:
    """Writes config.json, generation_config.json and fp32 safetensors."""
    from transformers import AutoModelForCausalLM, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        str(gguf_file.parent),
        gguf_file=gguf_file.name,
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(folder)
