"""One process or many: what the ranks of `torchrun` need from each other, and nothing where there is only one.

`torchrun` sets WORLD_SIZE and RANK. gloo is used on CPUs, NCCL on GPUs. Every collective leaves the same bytes on all
ranks, so ranks that start equal and apply the same update stay equal.
"""

import functools
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor

from safesail.errors import InputError

__all__ = ["ALONE", "Ranks", "device", "ranks"]


@dataclass(frozen=True)
class Ranks:
    """This process's number among `size` equal processes."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that keeps the ledger, prints and shows progress."""
        return self.rank == 0

    def mine(self, n: int) -> range:
        """The numbers below n that this rank takes care of."""
        return range(self.rank, n, self.size)

    def wait(self) -> None:
        """Return when all ranks have come here."""
        if self.size > 1:
            torch.distributed.barrier()

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of the ranks' tensors, in place."""
        if self.size > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def any(self, mask: Tensor) -> Tensor:
        """Where any rank's mask is true."""
        return self.sum(mask.int()) > 0 if self.size > 1 else mask

    def gather(self, tensor: Tensor) -> Tensor:
        """The ranks' tensors of one shape, joined along the first dimension in the order of the ranks."""
        if self.size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.size)]
        torch.distributed.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)


ALONE = Ranks()


@functools.cache
def ranks() -> Ranks:
    """The ranks that `torchrun` started, joined into one group at the first call; a single one without it."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return ALONE
    if torch.cuda.is_available():
        torch.cuda.set_device(device())
    # a rank may wait for days for another one's hook points; one that died is torchrun's business
    torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(days=100))
    return Ranks(torch.distributed.get_rank(), size)


def device(name: str = "auto") -> torch.device:
    """The device a recipe asks for: `auto` is this rank's GPU where there is one, else the CPU."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise InputError('runtime.device = "cuda", but torch sees no GPU; add --set runtime.device=auto.')
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
