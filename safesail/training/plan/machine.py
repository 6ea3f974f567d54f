"""What this machine has left and how fast it is: memory, GPU memory, disk; matrix products, memory traffic.

Memory that can be had is the least of MemAvailable in /proc/meminfo and of what every control group above this process
(version 1 or 2) leaves: a container is often allowed less than the machine has.
"""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch

from safesail.distributed import device
from safesail.errors import InputError
from safesail.recipe import BaseRecipe

__all__ = ["Room", "Speed", "available_ram", "check_device", "room", "speed"]

_PRODUCT = {"cpu": (1024, 1024, 4096), "cuda": (8192, 8192, 8192)}
"""Rows, inner and columns of the matrix product that is timed: its rate is within 10 % of an SAE's (576 × 4608 to
2048 × 20480) and of a block's of a language model."""
_SLOW_ROWS = 64
"""Of a product in 16 bits on a CPU, which may be a hundred times slower."""
_COPIED_BYTES = {"cpu": 64 << 20, "cuda": 1 << 30}
"""Larger than any cache."""
_SECONDS = 0.4
"""Spent on each measurement."""


class Room(NamedTuple):
    """Bytes that can be had now; gpu is None where the device is a CPU."""

    ram: int
    gpu: int | None
    disk: int

    def named(self) -> dict[str, int]:
        """What there is, by the names of the plan's needs."""
        gpu = {} if self.gpu is None else {"GPU memory": self.gpu}
        return {"memory": self.ram, **gpu, "disk": self.disk}


class Speed(NamedTuple):
    """Measured rates of the device: products of matrices, and bytes read or written."""

    flops_per_second: float
    """In fp32, as SAEs are trained."""
    model_flops_per_second: float
    """In model.dtype."""
    bytes_per_second: float


def check_device(recipe: BaseRecipe) -> None:
    """Raise InputError when the recipe asks for a GPU and torch finds none."""
    if recipe.runtime.device == "cuda" and not torch.cuda.is_available():
        raise InputError(
            "runtime.device is 'cuda', but torch finds no GPU on this machine; "
            "add --set runtime.device=cpu (or auto, which takes a GPU where there is one)."
        )


def room(recipe: BaseRecipe, folder: Path) -> Room:
    """What is free now, the disk being that of the run's folder, which need not exist yet."""
    where = device(recipe.runtime.device)
    gpu = torch.cuda.mem_get_info(where)[0] if where.type == "cuda" else None
    return Room(available_ram(), gpu, shutil.disk_usage(_existing(folder)).free)


def available_ram(root: Path = Path("/")) -> int:
    """Bytes of memory that this process can still have. root: where /proc and /sys are found."""
    found = [_meminfo(root / "proc/meminfo")]
    found += [left for group in _control_groups(root) if (left := _left_in(group)) is not None]
    return max(min(found), 0)


def speed(recipe: BaseRecipe) -> Speed:
    """Time a matrix product in fp32, one in model.dtype and a copy, in about a second."""
    where, dtype = device(recipe.runtime.device), getattr(torch, recipe.model.dtype)
    threads = torch.get_num_threads()
    torch.set_num_threads(recipe.runtime.threads or threads)
    try:
        rate = _product_rate(where, torch.float32)
        return Speed(rate, rate if dtype == torch.float32 else _product_rate(where, dtype), _copy_rate(where))
    finally:
        torch.set_num_threads(threads)


def _product_rate(where: torch.device, dtype: torch.dtype) -> float:
    n_rows, n_inner, n_columns = _PRODUCT[where.type]
    if where.type == "cpu" and dtype != torch.float32:
        n_rows = _SLOW_ROWS
    left = torch.ones(n_rows, n_inner, device=where, dtype=dtype)
    right = torch.ones(n_inner, n_columns, device=where, dtype=dtype)
    out = torch.empty(n_rows, n_columns, device=where, dtype=dtype)
    return 2 * n_rows * n_inner * n_columns / _seconds(lambda: torch.mm(left, right, out=out), where)


def _copy_rate(where: torch.device) -> float:
    source = torch.ones(_COPIED_BYTES[where.type], dtype=torch.uint8, device=where)
    target = torch.empty_like(source)
    return 2 * source.nbytes / _seconds(lambda: target.copy_(source), where)


def _seconds(work: Callable[[], object], where: torch.device) -> float:
    """The median duration of `work`, after one call that does not count."""
    durations: list[float] = []
    end = time.perf_counter() + _SECONDS
    work()
    while not durations or time.perf_counter() < end:
        _finish(where)
        started = time.perf_counter()
        work()
        _finish(where)
        durations.append(time.perf_counter() - started)
    return median(durations)


def _finish(where: torch.device) -> None:
    if where.type == "cuda":
        torch.cuda.synchronize(where)


def _existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    path = folder.absolute()
    while not path.is_dir():
        path = path.parent
    return path


def _meminfo(path: Path) -> int:
    if not path.is_file():  # no Linux: all of the memory
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    fields = dict(line.split(":", 1) for line in path.read_text().splitlines() if ":" in line)
    return int(fields["MemAvailable"].split()[0]) * 1024


def _control_groups(root: Path) -> list[Path]:
    """The folders of this process's control groups that account for memory, with all above them."""
    membership = root / "proc/self/cgroup"
    if not membership.is_file():
        return []
    found: list[Path] = []
    for line in membership.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = root / "sys/fs/cgroup" / controllers
        inner = top / path.lstrip("/")
        found += [folder for folder in (inner, *inner.parents) if folder.is_dir() and folder.is_relative_to(top)]
    return found


def _left_in(group: Path) -> int | None:
    """Bytes that a control group leaves, its reclaimable file cache counted as free; None where it sets no limit."""
    for limit, usage, active, inactive in (
        ("memory.max", "memory.current", "active_file", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_active_file", "total_inactive_file"),
    ):
        if (group / limit).is_file() and (text := (group / limit).read_text().strip()) != "max":
            statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            cache = int(statistics.get(active, 0)) + int(statistics.get(inactive, 0))
            return int(text) - int((group / usage).read_text()) + cache
    return None
