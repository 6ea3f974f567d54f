"""Compiled kernels for CPUs, used where the extra `fast` is installed: several times as fast as torch's, same results.

Without it everything works the same, a little slower. `use(False)` switches it off.
"""

import functools
import importlib.util
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

__all__ = ["AVAILABLE", "apply_to", "group", "products", "topk", "use", "used"]

AVAILABLE = importlib.util.find_spec("numba") is not None
_ROWS = 256  # of a part of the work
_state = {"used": AVAILABLE}


def use(wanted: bool) -> None:
    """Use the compiled kernels, or torch's own; wanting them where numba is missing changes nothing."""
    _state["used"] = wanted and AVAILABLE


def used() -> bool:
    """Whether the compiled kernels are switched on."""
    return _state["used"]


def apply_to(pre: Tensor) -> bool:
    """Whether a tensor is one for the compiled kernels."""
    return _state["used"] and pre.device.type == "cpu" and pre.dtype == torch.float32 and pre.is_contiguous()


def topk(pre: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest entries of each row in ascending order of index: values, indices (32-bit), (n_rows, k) each.

    NaN is not ordered: rows that hold one give arbitrary entries.
    """
    from safesail.sae.compiled import topk_rows

    values = torch.empty(len(pre), k)
    indices = torch.empty(len(pre), k, dtype=torch.int32)
    source, best, where = pre.detach().numpy(), values.numpy(), indices.numpy()
    _in_parts(len(pre), lambda rows: topk_rows(source[rows], k, best[rows], where[rows]))
    return values, indices


def group(latents: Tensor, starts: Tensor, d_sae: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """The entries in the order of their latents: permutation, tokens, (n_entries,) each, and offsets, (d_sae + 1,).

    latents: (n_entries,); starts: (n_tokens + 1,); both 32-bit, on a CPU. None where the kernels are not for them.
    """
    if not (_state["used"] and latents.device.type == "cpu" and latents.dtype == starts.dtype == torch.int32):
        return None
    from safesail.sae.compiled import group_entries

    permutation, tokens, offsets = torch.empty_like(latents), torch.empty_like(latents), torch.zeros(d_sae + 1).int()
    arrays = (latents.detach().contiguous(), starts.contiguous(), offsets, permutation, tokens)
    group_entries(*(tensor.numpy() for tensor in arrays))
    return permutation, tokens, offsets


def products(latents: Tensor, starts: Tensor, rows: Tensor, vectors: Tensor) -> Tensor:
    """rows[token] · vectors[latent] for every entry: (n_entries,).

    latents: (n_entries,); starts: (n_tokens + 1,), where each token's entries begin, both 32-bit; rows:
    (n_tokens, d_in) and vectors: (d_sae, d_in), contiguous.
    """
    from safesail.sae.compiled import entry_products

    found = torch.empty(len(latents))
    at, begins = latents.numpy(), starts.numpy()
    x, w, out = rows.detach().numpy(), vectors.detach().numpy(), found.numpy()
    _in_parts(len(rows), lambda part: entry_products(at, begins, part.start, part.stop, x, w, out))
    return found


def _in_parts(n_rows: int, work: Callable[[slice], object]) -> None:
    """Call `work` for all rows, a part at a time, on as many threads as torch has.

    Each thread takes the next part when it is free: torch's own workers go on spinning for some milliseconds after a
    matrix product, and whoever shares a core with one is slow.
    """
    parts = iter([slice(start, min(start + _ROWS, n_rows)) for start in range(0, n_rows, _ROWS)])

    def take() -> None:
        for part in parts:
            work(part)

    n_others = min(torch.get_num_threads(), -(-n_rows // _ROWS)) - 1
    running = [_threads(n_others).submit(take) for _ in range(n_others)]
    take()
    for future in running:
        future.result()


@functools.cache
def _threads(n: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(n, thread_name_prefix="safesail-kernels")
