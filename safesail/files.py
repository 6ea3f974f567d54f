"""Writing a file whole or not at all: a full disk or a kill never leaves half a file under the real name."""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from safesail.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["replacing", "write_tensors"]


def write_tensors(path: Path, tensors: "dict[str, Tensor]", metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file that is on the disk when it appears; InputError when the disk does not take it."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    n_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    with replacing(path, n_bytes) as temporary:
        try:
            save_file(tensors, temporary, metadata)
            temporary.chmod(0o644)  # safetensors leaves what only its owner can read
        except SafetensorError as error:  # what safetensors makes of a failed write
            raise OSError(str(error)) from error


@contextlib.contextmanager
def replacing(path: Path, n_bytes: int) -> Iterator[Path]:
    """A temporary name beside `path`; what is written there takes its place when the block ends, flushed to the disk.

    n_bytes: about how much will be written, for the message. After an error nothing of the attempt is left.
    """
    temporary = path.with_name(f".{path.name}.new")
    try:
        yield temporary
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        temporary.rename(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(_message(path, error, n_bytes)) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _message(path: Path, error: OSError, n_bytes: int) -> str:
    reason = error.strerror or str(error).splitlines()[0]
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR):
        return f"{path} could not be written: {reason}; make its folder writable and run the same command."
    needed, free = _megabytes(n_bytes), _megabytes(shutil.disk_usage(path.parent).free)
    return (
        f"{path} could not be written: {reason} (about {needed} were needed, {free} are free on that disk); "
        "free some space and run the same command: what is finished is kept."
    )


def _megabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.1f} MB"
