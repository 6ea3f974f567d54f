"""How many bytes an object keeps in memory: what is reached from it, tensors by their storage, each thing once."""

import sys
from collections.abc import Collection
from typing import Any

from torch import Tensor

__all__ = ["kept_bytes"]


def kept_bytes(kept: Any, shared: Any = None) -> int:
    """Bytes that an object alone holds: every object in it once, tensors with their storage, nothing of `shared`."""
    seen: set[int] = set()
    _reached(shared, seen)
    return _reached(kept, seen)


def _reached(start: Any, seen: set[int]) -> int:
    """Bytes of what is reached from an object and not yet seen."""
    total, waiting = 0, [start]
    while waiting:
        item = waiting.pop()
        if id(item) in seen or item is None or isinstance(item, type) or callable(item):
            continue
        seen.add(id(item))
        total += sys.getsizeof(item)
        if isinstance(item, Tensor):
            total += _storage_bytes(item, seen)
            continue
        if isinstance(item, dict):
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, Collection) and not isinstance(item, str | bytes):
            waiting += item
        waiting.append(getattr(item, "__dict__", None))
    return total


def _storage_bytes(tensor: Tensor, seen: set[int]) -> int:
    storage = tensor.untyped_storage()
    if storage.data_ptr() in seen:
        return 0
    seen.add(storage.data_ptr())
    return storage.nbytes()
