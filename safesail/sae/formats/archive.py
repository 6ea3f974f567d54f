"""Weights from files that nobody vouches for: bounded before anything is allocated, and no code of theirs is run.

.pt, .pth, .bin     a zip of raw tensors and one pickle that names them; its pickle may build tensors and plain
                    containers, nothing else, and torch opens it with `weights_only`
.npz                a zip of arrays, without object arrays
.safetensors        a JSON header and raw tensors
"""

import io
import json
import math
import pickletools
import re
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from safesail.errors import InputError

__all__ = ["Entry", "arrays", "entries", "loaded", "safetensors_of", "tensors"]

MAX_BYTES = 64 * 2**30
"""The largest content of one file; the widest published SAE (1M latents of 4,608 dimensions in fp32) has 36 GiB."""
MAX_INFLATION = 20
"""How many times its size a compressed .npz may unpack to; weights shrink by less than half."""
MAX_ENTRIES = 10_000
MAX_PICKLE = 16 * 2**20
MAX_HEADER = 64 * 2**20

Wanted = Callable[[str], bool]

_TENSOR_PARTS = re.compile(
    r"collections OrderedDict|torch\._utils _rebuild_(tensor(_v2)?|parameter)|torch (\w+Storage|Size|device)"
    r"|torch\.storage (Untyped|Typed)Storage|torch (bfloat16|float(16|32|64)|u?int(8|16|32|64)|bool)"
)
"""The globals that a pickle needs to name tensors, as `module name`."""
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Entry(NamedTuple):
    """What the header of a safetensors file says of one tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


# --- torch ------------------------------------------------------------------------------------------------------------


def tensors(path: Path, wanted: Wanted | None = None) -> dict[str, Any]:
    """The dictionary in a file of `torch.save`, its tensors mapped from the disk; `wanted` chooses among its keys."""
    content = loaded(path)
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, not a dictionary of tensors.")
    return {str(key): value for key, value in content.items() if wanted is None or wanted(str(key))}


def loaded(path: Path) -> Any:
    """Whatever one file of `torch.save` holds: tensors, numbers, text and containers of them."""
    _refuse_code(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds for what is damaged
        raise InputError(f"{path} is not a readable torch file ({_first_line(error)}); download it again.") from error
    total = sum(_size(tensor, path) for tensor in _tensors_in(content))
    if total > MAX_BYTES:
        raise InputError(f"{path} claims {total:,} bytes of tensors, more than the {MAX_BYTES:,} that are read.")
    return content


def _refuse_code(path: Path) -> None:
    """InputError unless the file is a zip of stored entries whose pickle needs nothing but tensors."""
    if not zipfile.is_zipfile(path):
        with path.open("rb") as handle:
            _refuse_globals(handle.read(MAX_PICKLE), path)
        raise InputError(f"{path} is not a zip as torch ≥ 1.6 writes it, or it is cut short; download it again.")
    with _opened(path) as archive:
        infos = _bounded(archive, path, inflation=1)
        if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
            raise InputError(f"{path} is a compressed zip, which torch never writes; it was not opened.")
        pickles = [info for info in infos if info.filename.endswith(".pkl")]
        for info in pickles:
            if info.file_size > MAX_PICKLE:
                raise InputError(
                    f"{path}: {info.filename} has {info.file_size:,} bytes, more than names of tensors need."
                )
            _refuse_globals(_read(archive, info, path), path)


def _refuse_globals(pickled: bytes, path: Path) -> None:
    for name in _globals(pickled):
        if not _TENSOR_PARTS.fullmatch(name):
            raise InputError(
                f"{path} is a pickle that wants to run {name.replace(' ', '.')}; it was not run. "
                "Ask its author for a safetensors file."
            )


def _globals(pickled: bytes) -> Iterator[str]:
    """`module name` of everything that a pickle refers to, read without executing it, as far as it can be read."""
    texts: list[str] = []
    stream = io.BytesIO(pickled)
    try:
        while True:  # before torch 1.6, a file was several pickles
            for code, argument, _ in pickletools.genops(stream):
                if code.name in ("GLOBAL", "INST"):
                    yield str(argument)
                elif code.name == "STACK_GLOBAL":
                    yield " ".join(texts[-2:])
                elif code.name in ("EXT1", "EXT2", "EXT4"):
                    yield f"copyreg extension_{argument}"
                elif isinstance(argument, str):
                    texts.append(argument)
    except Exception:  # not a pickle, or cut short: torch says what it makes of it, and refuses what it does not know
        return


def _tensors_in(content: Any) -> Iterator[Tensor]:
    if isinstance(content, Tensor):
        yield content
    elif isinstance(content, dict):
        for value in content.values():
            yield from _tensors_in(value)
    elif isinstance(content, list | tuple | set):
        for value in content:
            yield from _tensors_in(value)


def _size(tensor: Tensor, path: Path) -> int:
    """The bytes of a tensor; InputError where it claims more elements than the file has for it."""
    n_bytes = tensor.numel() * tensor.element_size()
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or n_bytes > tensor.untyped_storage().nbytes():
        raise InputError(f"{path} has a tensor of shape {tuple(tensor.shape)} that its bytes do not fill.")
    return n_bytes


# --- numpy ------------------------------------------------------------------------------------------------------------


def arrays(path: Path, wanted: Wanted | None = None) -> dict[str, Tensor]:
    """The arrays of an .npz file as tensors, by their names; `wanted` chooses among them."""
    if not zipfile.is_zipfile(path):
        raise InputError(f"{path} is not an .npz file, or it is cut short; download it again.")
    with _opened(path) as archive:
        infos = _bounded(archive, path, MAX_INFLATION)
        names = {info.filename.removesuffix(".npy"): info for info in infos if info.filename.endswith(".npy")}
        return {name: _array(archive, info, path) for name, info in names.items() if wanted is None or wanted(name)}


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> Tensor:
    """One array, after its header was compared with the bytes that there are."""
    from numpy.lib import format as npy

    try:
        with archive.open(info) as handle:
            version = npy.read_magic(handle)
            shape, _, dtype = (npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0)(handle)
            n_left = info.file_size - handle.tell()
        if dtype.hasobject or math.prod(shape) * dtype.itemsize != n_left:
            raise ValueError(f"it claims {dtype} of shape {shape} and has {n_left:,} bytes")
        with archive.open(info) as handle:
            return torch.from_numpy(npy.read_array(handle, allow_pickle=False))
    except Exception as error:  # numpy parses the header as Python text, and raises as many kinds as that has
        raise InputError(f"{path}: {info.filename} is not a plain array ({_first_line(error)}).") from error


# --- safetensors ------------------------------------------------------------------------------------------------------


def safetensors_of(path: Path, wanted: Wanted | None = None) -> dict[str, Tensor]:
    """The tensors of a safetensors file whose header is true; `wanted` chooses among them."""
    from safetensors import SafetensorError, safe_open

    names = [name for name in entries(path) if wanted is None or wanted(name)]
    try:
        with safe_open(path, framework="pt") as handle:
            return {name: handle.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise _not_safetensors(path, _first_line(error)) from error


def entries(path: Path) -> dict[str, Entry]:
    """The dtype and shape of every tensor in a safetensors file, checked against its size; nothing else is read."""
    size = path.stat().st_size
    with path.open("rb") as handle:
        n_header = int.from_bytes(handle.read(8), "little")
        if size < 8 or n_header > min(size - 8, MAX_HEADER):
            raise _not_safetensors(path, f"a header of {n_header:,} bytes in a file of {size:,}")
        header = handle.read(n_header)
    try:
        content = json.loads(header)
        content.pop("__metadata__", None)
        spans = sorted((*row["data_offsets"], name) for name, row in content.items())
        found = {name: Entry(_DTYPES[row["dtype"]], tuple(row["shape"])) for name, row in content.items()}
    except (ValueError, TypeError, AttributeError, KeyError, RecursionError) as error:
        raise _not_safetensors(path, f"its header cannot be read: {_first_line(error)}") from error
    _check_spans(spans, found, size - 8 - n_header, path)
    return found


def _check_spans(spans: list[tuple[Any, ...]], found: dict[str, Entry], n_data: int, path: Path) -> None:
    """InputError unless the tensors lie one after the other and fill the file, each with the bytes of its shape."""
    end_before = 0
    for begin, end, name in spans:
        shape = found[name].shape
        if not all(type(number) is int and number >= 0 for number in (begin, end, *shape)):
            raise _not_safetensors(path, f"{name} has shape {shape} and offsets {begin!r} to {end!r}")
        if begin != end_before:
            raise _not_safetensors(path, f"{name} begins at byte {begin:,} where the one before ends at {end_before:,}")
        if end - begin != math.prod(shape) * found[name].dtype.itemsize:
            raise _not_safetensors(path, f"{name} has {end - begin:,} bytes for {found[name].dtype} of shape {shape}")
        end_before = end
    if end_before != n_data:
        raise _not_safetensors(path, f"its tensors need {end_before:,} bytes and it has {n_data:,}")


def _not_safetensors(path: Path, reason: str) -> InputError:
    return InputError(f"{path} is not a readable safetensors file ({reason}); download it again.")


# --- zip --------------------------------------------------------------------------------------------------------------


def _opened(path: Path) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(path)
    except (zipfile.BadZipFile, OSError, NotImplementedError) as error:
        raise InputError(f"{path} is not a readable zip ({_first_line(error)}); download it again.") from error


def _bounded(archive: zipfile.ZipFile, path: Path, inflation: int) -> list[zipfile.ZipInfo]:
    """The entries of a zip; InputError where they unpack to more than `inflation` times the file, or are too many."""
    infos, size = archive.infolist(), path.stat().st_size
    total = sum(info.file_size for info in infos)
    if len(infos) > MAX_ENTRIES or total > min(inflation * size, MAX_BYTES):
        raise InputError(
            f"{path} has {size:,} bytes and would unpack to {total:,} in {len(infos):,} files; it was not unpacked."
        )
    return infos


def _read(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> bytes:
    try:
        return archive.read(info)
    except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, NotImplementedError) as error:
        raise InputError(f"{path}: {info.filename} is damaged ({_first_line(error)}); download it again.") from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
