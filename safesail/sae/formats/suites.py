"""What the readers of the released suites share: sizes that only the tensors tell, top-k as written on paper, names."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from safesail.errors import InputError
from safesail.repository import Repository
from safesail.sae.formats.archive import Entry

__all__ = ["Equations", "Found", "affine", "full_name", "largest", "matrix_shape", "stored_as"]

Found = Mapping[str, Any]
"""What a file holds by its names: tensors, or what its header says of them."""
Equations = tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]
"""(encode, decode) of a `Foreign`."""


def matrix_shape(found: Found, name: str, origin: str) -> tuple[int, int]:
    """The (rows, columns) of the matrix `name`; InputError where it is missing or no matrix."""
    if name not in found:
        raise InputError(f"{origin} has no tensor {name}; it holds {', '.join(sorted(found)) or 'none'}.")
    matrix = found[name]
    if not isinstance(matrix, Entry | Tensor) or len(matrix.shape) != 2 or 0 in matrix.shape:
        raise InputError(f"{origin}: {name} is not a matrix, so that the SAE's width is not known.")
    return int(matrix.shape[0]), int(matrix.shape[1])


def stored_as(value: Any) -> dict[str, str]:
    """What a config keeps of the precision of weights that were not stored in fp32. value: a tensor or its header."""
    dtype = str(value.dtype).removeprefix("torch.")
    return {} if dtype == "float32" else {"source_dtype": dtype}


def affine(W_dec: Tensor, b_dec: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """(x, latents) → latents W_dec + b_dec. W_dec: (d_sae, d_in), b_dec: (d_in,)."""
    return lambda x, latents: latents @ W_dec + b_dec


def largest(h: Tensor, k: int) -> Tensor:
    """h where it is among the k largest of its row, else 0; negative values that are among them stay. h: (n, d_sae)."""
    top = h.topk(k, dim=-1)
    return torch.zeros_like(h).scatter(-1, top.indices, top.values)


def full_name(repository: Repository, sae_id: str = "") -> str:
    """The repository's id, or its folder's whole path, and the SAE's: where suites say what is in no file of theirs."""
    folder = repository.folder
    source = repository.source if folder is None else folder.resolve().as_posix()
    return f"{source}/{sae_id}"
