"""What the benchmarks share: the machine in one line, interleaved timing, peak memory, records and their tables.

Every number is a record of a table; the printed table and the JSON file show the same records.
"""

import argparse
import ctypes
import importlib
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from safesail.errors import InputError
from safesail.sae import kernels

__all__ = [
    "COLUMNS",
    "ENCODER_GEMM",
    "OURS",
    "Memory",
    "Peer",
    "Record",
    "Shape",
    "add_common_options",
    "add_implementation_options",
    "allocator",
    "encoder_gemm",
    "interleave",
    "machine",
    "median_ms",
    "module_of",
    "names_wanted",
    "peak_memory",
    "peers_wanted",
    "ratio",
    "render",
    "run_script",
    "shapes_wanted",
    "time_records",
    "tuned_environment",
]

Record = dict[str, Any]
"""table, case (what is measured), name (who is measured), then numbers by the keys of COLUMNS; None where undefined."""

ENCODER_GEMM = "encoder GEMM alone"
OURS = {False: "safesail, torch", True: "safesail, compiled"}
"""Our rows, by whether the compiled kernels are used."""

# key: (title, format)
COLUMNS = {
    "milliseconds": ("ms (median)", ",.1f"),
    "fastest_milliseconds": ("ms (fastest)", ",.1f"),
    "tokens_per_second": ("tokens/s", ",.0f"),
    "times_saelens": ("× SAELens", ".2f"),
    "times_sparsify": ("× sparsify", ".2f"),
    "gemm_share": ("encoder GEMM", ".0%"),
    "dead_milliseconds": ("ms, a third dead", ",.1f"),
    "added": ("added", "+.0%"),
    "aux_k": ("aux latents", ",d"),
    "peak_mib": ("MiB above imports", ",.0f"),
    "first_use_mib": ("MiB of first use", ",.0f"),
    "bound_mib": ("least MiB", ",.0f"),
    "times_bound": ("× least", ".2f"),
    "seconds": ("s", ",.1f"),
    "times_bare": ("share of the bare forward", ".0%"),
    "times_causal_lm": ("× hooked CausalLM", ".2f"),
    "times_padded": ("× padded", ".2f"),
    "filled": ("real tokens", ".0%"),
    "times_parts": ("× sum of its parts", ".2f"),
    "learning_rate": ("learning rate", ".1e"),
    "explained_variance": ("EV", ".4f"),
    "dead": ("dead", ".2%"),
}


class Shape(NamedTuple):
    """One case: d_in → d_sae with k active latents of each of `batch` tokens."""

    d_in: int
    d_sae: int
    k: int
    batch: int

    def __str__(self) -> str:
        return f"{self.d_in} → {self.d_sae}, k {self.k}, batch {self.batch}"


_SHAPES = {
    "small": (Shape(576, 4608, 64, 4096),),
    "wide": (Shape(2048, 20480, 64, 1024),),
    "k200": (Shape(576, 4608, 200, 4096), Shape(2048, 20480, 200, 1024)),
}
_SHAPES["all"] = tuple(shape for shapes in _SHAPES.values() for shape in shapes)


def shapes_wanted(text: str) -> list[Shape]:
    """The shapes of `small,wide`, or of one's own as `576x4608x64x4096`."""
    shapes: list[Shape] = []
    for name in text.split(","):
        numbers = name.split("x")
        if name in _SHAPES:
            shapes += _SHAPES[name]
        elif len(numbers) == 4 and all(number.isdigit() and int(number) > 0 for number in numbers):
            shapes.append(Shape(*map(int, numbers)))
        else:
            raise InputError(
                f"--shapes {name} is none of {', '.join(_SHAPES)} nor of the form D_INxD_SAExKxBATCH, "
                "as in --shapes 576x4608x64x4096."
            )
    return shapes


# the implementations


class Peer(NamedTuple):
    """Another project's package: what it is called, the module it is imported as, what pip calls it."""

    title: str
    module: str
    package: str


_PEERS = {"saelens": Peer("SAELens", "sae_lens", "sae-lens"), "sparsify": Peer("sparsify", "sparsify", "eai-sparsify")}


def peers_wanted(text: str) -> list[str]:
    """The keys of the peers to measure: `saelens,sparsify`, or `none`. Every one must be installed."""
    names = [] if text == "none" else text.split(",")
    for name in names:
        if name not in _PEERS:
            raise InputError(f"--peers {name} is none of {', '.join(_PEERS)} and none.")
        module_of(name)
    return names


def module_of(peer: str) -> Any:
    """A peer's imported module; InputError names the command that installs it."""
    try:
        return importlib.import_module(_PEERS[peer].module)
    except ModuleNotFoundError as error:
        if error.name != _PEERS[peer].module:
            raise
        raise InputError(
            f"{_PEERS[peer].title} ({_PEERS[peer].package}) is not installed: "
            "pip install -c scripts/constraints.txt -e '.[bench]', or leave the peers out with --peers none."
        ) from None


def names_wanted(kernels_text: str, peers_text: str) -> list[str]:
    """The names of the rows: ours first, then the peers'."""
    ours = [OURS[compiled] for compiled in _kernels_wanted(kernels_text)]
    return ours + [_PEERS[peer].title for peer in peers_wanted(peers_text)]


def _kernels_wanted(text: str) -> list[bool]:
    """Whether each of our rows uses the compiled kernels; `both` leaves them out where they are not installed."""
    if text == "compiled" and not kernels.AVAILABLE:
        raise InputError("the compiled kernels are not installed: pip install -e '.[fast]', or use --kernels torch.")
    return {"torch": [False], "compiled": [True], "both": [False, True] if kernels.AVAILABLE else [False]}[text]


# measuring


def interleave(functions: dict[str, Callable[[], object]], rounds: int, warm_up: int = 2) -> dict[str, list[float]]:
    """Seconds of every call, round by round, so that what else the machine does falls on all alike.

    Each round begins with the next function, since the first one finds the caches as the last one left them.
    """
    names, seconds = list(functions), {name: [] for name in functions}
    for number in range(warm_up + rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            functions[name]()
            if number >= warm_up:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def median_ms(seconds: Sequence[float]) -> float:
    return 1000 * statistics.median(seconds)


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    """numerator / denominator; None where one is missing or the denominator is zero."""
    return numerator / denominator if numerator is not None and denominator else None


def encoder_gemm(x: Tensor, d_sae: int) -> Callable[[], object]:
    """x W + b into a buffer that is there already, as fast as torch does it. x: (batch, d_in)."""
    W, b, out = torch.randn(x.shape[1], d_sae), torch.zeros(d_sae), torch.empty(len(x), d_sae)
    return lambda: torch.addmm(b, x, W, out=out)


def time_records(table: str, shape: Shape, seconds: dict[str, list[float]]) -> list[Record]:
    """A record per implementation: its median, its tokens/s, how often faster than each peer, the GEMM's share."""
    times = {name: median_ms(values) for name, values in seconds.items()}
    return [
        {
            "table": table,
            "case": str(shape),
            "name": name,
            "milliseconds": ms,
            "fastest_milliseconds": 1000 * min(seconds[name]),
            "tokens_per_second": 1000 * shape.batch / ms,
            "times_saelens": ratio(times.get("SAELens"), ms),
            "times_sparsify": ratio(times.get("sparsify"), ms),
            "gemm_share": ratio(times.get(ENCODER_GEMM), ms),
        }
        for name, ms in times.items()
    ]


class Memory(NamedTuple):
    """Resident memory of this process in MiB: before, and at its peak since."""

    before: float
    peak: float

    @property
    def above(self) -> float:
        return self.peak - self.before


def peak_memory(work: Callable[[], object]) -> Memory:
    """The highest resident memory while `work` runs (VmHWM, which Linux measures), and what was resident before.

    Freed memory of the imports is given back first, and the mark is set to the present, so that an import's own peak
    neither hides nor adds to that of the work.
    """
    if not Path("/proc/self/clear_refs").exists():
        raise InputError("peak memory is read from /proc, which only Linux has; leave --memory out.")
    _give_back_freed_memory()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, see proc(5)
    before = _status_mib("VmRSS")
    work()
    return Memory(before, _status_mib("VmHWM"))


def _give_back_freed_memory() -> None:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _status_mib(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{key}:"))


# the machine


def machine() -> dict[str, Any]:
    """What a number depends on besides the code: processor, cores, threads, torch, allocator, load."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "allocator": allocator(os.environ),
        "load": round(os.getloadavg()[0], 2),
    }


def allocator(environment: Any) -> str:
    """The malloc in use and its settings, as far as the environment tells: `glibc 2.36, THP madvise`."""
    preloaded = [Path(name).name for name in environment.get("LD_PRELOAD", "").replace(":", " ").split()]
    settings = [f"{key}={environment[key]}" for key in sorted(environment) if key.startswith("MALLOC_")]
    tunables = [part for part in environment.get("GLIBC_TUNABLES", "").split(":") if part]
    return ", ".join([*(preloaded or [" ".join(platform.libc_ver())]), *settings, *tunables, _huge_pages()])


def _huge_pages() -> str:
    path = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    chosen = path.read_text().partition("[")[2].partition("]")[0] if path.is_file() else ""
    return f"THP {chosen or 'unknown'}"


def _cpu() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def tuned_environment(environment: Any) -> dict[str, str]:
    """The environment with a glibc malloc that keeps big freed buffers and asks for huge pages.

    By default glibc gives every buffer above its threshold back to the system when it is freed, and each page of the
    next one has to be cleared again. MMAP_MAX_=0 takes them from the heap instead.
    """
    gibibytes_64 = str(64 << 30)
    return {
        **environment,
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": gibibytes_64,
        "MALLOC_TOP_PAD_": str(64 << 20),
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    }


# tables


def render(records: Iterable[Record]) -> str:
    """The records as aligned Markdown tables, one for each pair of table and case; columns without a number are out."""
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        groups.setdefault((record["table"], record["case"]), []).append(record)
    return "\n\n".join(f"{table}: {case}\n\n{_table(rows)}" for (table, case), rows in groups.items())


def _table(rows: list[Record]) -> str:
    keys = [key for key in COLUMNS if any(row.get(key) is not None for row in rows)]
    cells = [["", *(COLUMNS[key][0] for key in keys)]]
    cells += [[row["name"], *(_cell(row.get(key), COLUMNS[key][1]) for key in keys)] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join("| " + " | ".join(_align(line, widths)) + " |" for line in [cells[0], rule, *cells[1:]])


def _align(cells: list[str], widths: list[int]) -> list[str]:
    return [cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]


def _cell(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)


# the command line


def add_common_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=9, help="interleaved rounds after the warm-up (default 9)")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all records there as well")
    parser.add_argument(
        "--tuned", action="store_true", help="measure a second time with a malloc that keeps big buffers"
    )


def add_implementation_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shapes", default="small", help="small, wide, k200, all, or D_INxD_SAExKxBATCH; several with commas"
    )
    parser.add_argument("--peers", default="saelens,sparsify", help="saelens,sparsify (default), one of them, or none")
    parser.add_argument(
        "--kernels", choices=("torch", "compiled", "both"), default="both", help="what ours computes with"
    )


def run_script(parser: argparse.ArgumentParser, measure: Callable[[argparse.Namespace], list[Record]]) -> int:
    """Parse, measure, print the machine and the tables, write the JSON; a person's mistake ends with status 2."""
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error(f"--rounds was given {arguments.rounds}; it takes a number of at least 1")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    where = machine()  # before the work: the load afterwards is our own
    print(", ".join(f"{key} {value}" for key, value in where.items()), flush=True)
    try:
        records = measure(arguments)
    except InputError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        return 2
    print(f"\n{render(records)}\n", flush=True)
    runs = [{"machine": where, "records": records}]
    if arguments.tuned:
        runs += _tuned_runs(sys.argv)
    if arguments.json:
        arguments.json.write_text(json.dumps({"runs": runs}, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


def _tuned_runs(argv: list[str]) -> list[dict[str, Any]]:
    """The runs of the same command in a process of its own: malloc reads its settings only when a process starts."""
    again = [argument for argument in argv if argument != "--tuned"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "runs.json"  # the last --json wins
        subprocess.run([sys.executable, *again, "--json", str(file)], env=tuned_environment(os.environ), check=True)
        return json.loads(file.read_text(encoding="utf-8"))["runs"]
