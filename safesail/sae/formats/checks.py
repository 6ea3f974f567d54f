"""What is asked of tensors before they become an SAE: their names, shapes, dtypes and that every number is one."""

import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from safesail.errors import InputError
from safesail.sae.formats.archive import Entry

__all__ = ["Shapes", "check_finite", "check_shapes", "weights"]

Shapes = Mapping[str, tuple[int, ...]]
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def weights(found: Mapping[str, Any], shapes: Shapes, origin: str, ignored: Collection[str] = ()) -> dict[str, Tensor]:
    """The tensors named in `shapes`, in fp32, when they and no others are there, fit and are finite.

    found: as a file holds them, or their header; ignored: names that may be there and change nothing.
    """
    tensors = {name: value for name, value in found.items() if name not in ignored}
    check_shapes(tensors, shapes, origin)
    check_finite(tensors, origin)
    return {name: tensors[name].detach().float().contiguous() for name in shapes}


def check_shapes(found: Mapping[str, Any], shapes: Shapes, origin: str, config: str = "config") -> None:
    """InputError unless `found` has the tensors named in `shapes` and no others, of these shapes, of real numbers."""
    for name, shape in shapes.items():
        if name not in found:
            raise InputError(f"{origin} has no tensor {name}; it holds {', '.join(sorted(found)) or 'none of ours'}.")
        there = found[name]
        if not isinstance(there, Entry | Tensor):
            raise InputError(f"{origin}: {name} is a {type(there).__name__}, not a tensor.")
        if tuple(there.shape) != shape:
            raise InputError(
                f"{origin}: {name} is {tuple(there.shape)}, but its {config} says {shape}; "
                "the two files do not belong together."
            )
        if there.dtype not in _FLOATS:
            raise InputError(f"{origin}: {name} is {_name(there.dtype)}; float64, 32, 16 and bfloat16 are read.")
    if extra := sorted(set(found) - set(shapes)):
        raise InputError(f"{origin} also holds {', '.join(extra[:12])}, which its kind of SAE does not use.")


def check_finite(tensors: Mapping[str, Tensor], origin: str) -> None:
    """InputError where a tensor holds NaN or infinity."""
    for name, tensor in tensors.items():
        if not math.isfinite(float(tensor.sum(dtype=torch.float64))):
            raise InputError(f"{origin}: {name} holds values that are not finite; the file is damaged.")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
