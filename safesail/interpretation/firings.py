"""Where latents fire, as entries (latent, value, row): read from a harvest, and kept in a file by `collect`."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from safesail.files import replacing
from safesail.lm.activations import Activations
from safesail.sae.model import Sae

__all__ = ["Block", "Firings", "active_entries", "load_codes", "writing_codes"]

_PRE_ACTIVATIONS = 1 << 24  # at a time: 64 MB; the same whatever memory is allowed, as its last bits may differ by it
_DTYPES = {"latents": ("I32", torch.int32), "values": ("F32", torch.float32), "rows": ("I32", torch.int32)}


class Firings(NamedTuple):
    """Activations of a set of latents, grouped by latent, in ascending order of activation, then of row."""

    latents: Tensor
    """(n,) the latent of each entry, ascending; 32-bit."""
    values: Tensor
    """(n,) fp32, above zero."""
    rows: Tensor
    """(n,) the row of the harvest; 32-bit."""

    def of(self, latent: int) -> tuple[Tensor, Tensor]:
        """The activations of one latent, ascending, and their rows."""
        bounds = torch.tensor([latent, latent + 1], dtype=self.latents.dtype)
        low, high = torch.searchsorted(self.latents, bounds).tolist()
        return self.values[low:high], self.rows[low:high]


class Block(NamedTuple):
    """The entries of consecutive rows, in the order of the rows."""

    n_rows: int
    latents: Tensor
    """(n,) 32-bit, as are the rows."""
    values: Tensor
    rows: Tensor


def active_entries(
    sae: Sae, activations: Activations, keep: Tensor, progress: Callable[[int], object] = lambda n: None
) -> Iterator[Block]:
    """Every activation above zero on the rows to `keep`, bool (n_tokens,), in one pass over the harvest."""
    for start, rows in activations.blocks(sae.config.hook_point):
        n_parts = -(-len(rows) * sae.config.d_sae // _PRE_ACTIVATIONS)
        for x in rows.tensor_split(min(n_parts, len(rows))):
            yield _block(sae, x, keep[start : start + len(x)], start)
            start += len(x)
            progress(len(x))


@torch.inference_mode()
def _block(sae: Sae, x: Tensor, keep: Tensor, start: int) -> Block:
    codes = sae.encode_sparse(x)
    tokens = codes.tokens()
    active = ((codes.values > 0) & keep[tokens]).nonzero().flatten()
    latents, values, rows = codes.indices[active], codes.values[active], tokens[active] + start
    return Block(len(x), latents.int(), values.float(), rows.int())


def load_codes(folder: Path, hook_point: str) -> Firings:
    """The candidates' activations that `collect` kept for the score stage."""
    return Firings(**load_file(folder / f"codes-{hook_point}.safetensors"))


@contextlib.contextmanager
def writing_codes(folder: Path, hook_point: str, n_entries: int) -> Iterator[Callable[[Firings], None]]:
    """Write the file that `load_codes` reads piece by piece: a function that appends entries, `n_entries` in all."""
    header, offsets = _header(n_entries)
    path, written = folder / f"codes-{hook_point}.safetensors", 0
    with replacing(path, len(header) + 12 * n_entries) as temporary, open(temporary, "wb") as handle:
        handle.write(header)

        def append(firings: Firings) -> None:
            nonlocal written
            for (name, tensor), (_, dtype) in zip(firings._asdict().items(), _DTYPES.values(), strict=True):
                handle.seek(offsets[name] + 4 * written)
                handle.write(tensor.to(dtype).numpy().astype("<f4" if name == "values" else "<i4").tobytes())
            written += len(firings.rows)

        yield append
        assert written == n_entries, f"{written} entries were written where {n_entries} were announced"


def _header(n_entries: int) -> tuple[bytes, dict[str, int]]:
    """The beginning of a safetensors file of three vectors, and where in the file each of them starts."""
    tensors = {
        name: {"dtype": code, "shape": [n_entries], "data_offsets": [4 * n_entries * i, 4 * n_entries * (i + 1)]}
        for i, (name, (code, _)) in enumerate(_DTYPES.items())
    }
    text = json.dumps(tensors, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return head, {name: len(head) + 4 * n_entries * i for i, name in enumerate(_DTYPES)}
