"""A sweep small enough to be trained a hundred times: a made harvest, made rounds, a recipe, processes to train in.

`apart` runs a function in a process of its own, forked from a server that has torch loaded already, so that it can be
killed; `in_ranks` runs one in several processes that torchrun might have started. What is run that way is a function
of a module, and what it is given and returns can be pickled (between our own processes, never on disk).
"""

import itertools
import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from safesail import distributed
from safesail.distributed import ALONE, Ranks
from safesail.lm.activations import Activations
from safesail.recipe import Recipe
from safesail.run import StageWork
from safesail.training import trainer
from safesail.training.sources import Shards, Streamed
from safesail.training.trainer import train_stage

D_IN = {"layers.0.mlp": 8, "layers.1.mlp": 6, "layers.2.mlp": 10}
N_ROWS, N_TRAINING = 1200, 1062
"""Harvested rows, and those left without the 120 held out and the 18 other special ones."""
EVERY_ARCHITECTURE = {
    "architectures": ["topk", "batchtopk", "matryoshka", "relu", "jumprelu"],
    "k": [2, 4],
    "l1": [0.05, 0.2],
    "l0": [0.01, 0.03],
}
"""Ten SAEs a hook point."""


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- what is trained on -------------------------------------------------------------------------------------------


def make_harvest(folder: Path, n_hook_points: int = 2) -> Path:
    """60 pieces of 20 tokens; every tenth piece is held out, every 50th token is special, so that 6 are both."""
    d_in = dict(list(D_IN.items())[:n_hook_points])
    tensors = {"token_ids": torch.arange(N_ROWS).int() % 50 + 5}
    for seed, (name, width) in enumerate(d_in.items()):
        x = random(N_ROWS, width, seed=seed) @ random(width, width, seed=seed + 10) + 1
        tensors[name], tensors[f"{name}:norm"] = x.half(), x.norm(dim=1)
    for number, rows in enumerate((slice(0, 700), slice(700, N_ROWS))):
        part = {name: value[rows].contiguous() for name, value in tensors.items()}
        save_file(part, folder / f"shard-{number:05d}.safetensors")
    pieces = {
        "document": [f"d{i}" for i in range(60)],
        "source": ["made"] * 60,
        "held_out": [i % 10 == 0 for i in range(60)],
        "half": ["explain"] * 60,
        "row_start": [20 * i for i in range(60)],
        "ids": tensors["token_ids"].reshape(60, 20).tolist(),
    }
    pq.write_table(pa.table(pieces), folder / "pieces.parquet")
    facts = {
        "hook_points": list(d_in),
        "d_in": d_in,
        "median_norm": {name: float(tensors[f"{name}:norm"].median()) for name in d_in},
        "special_ids": [5],
        "rows_per_shard": [700, 500],
        "n_tokens": N_ROWS,
        "n_pieces": 60,
        "window": 128,
    }
    (folder / "harvest.json").write_text(json.dumps(facts))
    return folder


def made_rounds(hook_points: tuple[str, ...], first: int) -> Iterator[dict[str, Tensor]]:
    """Buffers without end, each of 201 to 239 rows, other numbers at every hook point."""
    for number in itertools.count(first):
        yield {name: _made_rows(name, number) for name in hook_points}


def _made_rows(hook_point: str, number: int) -> Tensor:
    seed = 100 * number + list(D_IN).index(hook_point)
    return (random(201 + seed * 7 % 39, D_IN[hook_point], seed=seed) * 3 + 1).half()


def recipe_of(runtime: dict[str, Any] | None = None, **train: Any) -> Recipe:
    """Two epochs of ten batches of 100 rows, with a checkpoint after every step."""
    return Recipe.parse(
        {
            "name": "made",
            "model": {"path": "none"},
            "corpus": {"n_tokens": 1200, "n_held_out_tokens": 120, "sources": [{"path": "none.jsonl"}]},
            "harvest": {"hook_points": list(D_IN)},
            "train": {"d_sae": 24, "k": [2, 3, 4], "epochs": 2, "batch_size": 100, "dead_after_tokens": 300} | train,
            "explain": {"encoder": "none"},
            "runtime": {"checkpoint_seconds": 0} | (runtime or {}),
        }
    )


def streaming(recipe: Recipe, **train: Any) -> Recipe:
    """The same recipe on made rounds: four batches a round, and steps that end within the third round."""
    settings = {"epochs": 1, "stream_tokens": 1000, "buffer_tokens": 450} | train
    return Recipe.parse(recipe.dump() | {"train": recipe.dump()["train"] | settings})


def source_of(recipe: Recipe, activations: Activations, ranks: Ranks = ALONE) -> Shards | Streamed:
    """The harvest or, where the recipe streams, made rounds."""
    team = ranks if recipe.runtime.parallel == "data" else ALONE
    if recipe.train.stream_tokens is None:
        return Shards(recipe, activations, team)
    return Streamed(recipe, made_rounds, team)


def train(recipe: Recipe, harvest: Path, folder: Path, ranks: Ranks = ALONE) -> dict[str, Any]:
    """Run the train stage in a folder, on the source of `source_of`; its facts."""
    activations = Activations(harvest)
    folder.mkdir(exist_ok=True)
    work = StageWork(folder)
    train_stage(recipe, activations, work, source_of(recipe, activations, ranks), ranks)
    return work.facts


def train_as_rank(ranks: Ranks, recipe: Recipe, harvest: Path, folder: Path) -> dict[str, Any]:
    """`train` as one of several ranks, with a line in the logs for every step."""
    trainer._LOG_EVERY = 1
    return train(recipe, harvest, folder, ranks)


# --- what comes out -----------------------------------------------------------------------------------------------


def files_of(folder: Path) -> dict[str, bytes]:
    """{path below the folder: content} of every file in it, hidden ones too."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def weights_of(folder: Path) -> dict[str, dict[str, Tensor]]:
    """{sae_id: its tensors} of the finished SAEs."""
    paths = sorted(folder.rglob("sae_weights.safetensors"))
    return {str(path.parent.relative_to(folder)): load_file(path) for path in paths}


def log_of(folder: Path, sae_id: str) -> list[dict[str, Any]]:
    """The log lines of one SAE."""
    return [json.loads(line) for line in (folder / "logs" / f"{sae_id}.jsonl").read_text().splitlines()]


def checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*.safetensors"))


# --- processes ----------------------------------------------------------------------------------------------------

_PROCESSES = multiprocessing.get_context("forkserver")
# torch's optimizers and pyarrow's readers import these at their first use, which takes seconds in every process
_PRELOADED = ["safesail.training.trainer", "safesail.sae.compiled", "torch._dynamo", "pyarrow.dataset"]
_PROCESSES.set_forkserver_preload(_PRELOADED)


class Outcome(NamedTuple):
    """How a process ended."""

    exit_code: int | None
    """0, 1 after an exception, -9 when killed, None when it had not ended in time and was stopped."""
    value: Any
    error: str
    """The exception's class and message."""
    trace: str = ""


class Apart:
    """A function running in a process of its own."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self._receiver, sender = _PROCESSES.Pipe(duplex=False)
        self.process = _PROCESSES.Process(target=_report, args=(sender, function, args))
        self.process.start()
        sender.close()

    def outcome(self, seconds: float = 90) -> Outcome:
        """Wait for the end of the process."""
        said: tuple[Any, str, str] = None, "said nothing in time", ""
        try:
            if self._receiver.poll(seconds):
                said = self._receiver.recv()
        except EOFError:
            said = None, "ended without a word", ""
        self.process.join(10)
        exit_code = self.process.exitcode
        if exit_code is None:
            self.process.kill()
            self.process.join()
        return Outcome(exit_code, *said)


def apart(function: Callable[..., Any], *args: Any) -> Outcome:
    """Run a function in a process of its own and wait for its end."""
    return Apart(function, *args).outcome()


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def in_ranks(size: int, function: Callable[..., Any], *args: Any) -> list[Outcome]:
    """Run `function(ranks, *args)` in so many processes joined over loopback; how each ended."""
    port = free_port()
    started = [Apart(_as_rank, rank, size, port, function, args) for rank in range(size)]
    return [process.outcome() for process in started]


def _as_rank(rank: int, size: int, port: int, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    settings = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {key: str(value) for key, value in settings.items()} | {"GLOO_SOCKET_IFNAME": "lo"}
    return function(distributed.ranks(), *args)


def _report(sender: Connection, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    tqdm.set_lock(threading.RLock())  # its own is shared between processes, and a killed one would leave it behind
    try:
        sender.send((function(*args), "", ""))
    except Exception as error:
        sender.send((None, f"{type(error).__name__}: {error}", traceback.format_exc()))
        sys.exit(1)


# --- ends and accidents, all of them inside the process that they happen to ----------------------------------------

_USES = {"open", "os.mkdir", "os.rename", "os.remove"}


def train_until(moment: int | str, recipe: Recipe, harvest: Path, folder: Path) -> int:
    """Train with a checkpoint every three steps and a log line every four, and be killed just before a file is used.

    moment: the how-manyth use of a file in `folder`, or what it is, as `os.rename .cfg.json.new`. What lies between two
    uses of files is the same for the next attempt. Returns how many there were if it was not reached.
    """
    trainer._LOG_EVERY = 4
    trainer.time = SimpleNamespace(monotonic=itertools.count().__next__)  # type: ignore[assignment]  # a tick a step
    uses: list[str] = []

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event in _USES and str(arguments[0]).startswith(f"{folder}/"):
            uses.append(f"{event} {Path(arguments[0]).name}")
            if moment in (len(uses), uses[-1]):
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)
    patient = recipe.runtime.model_copy(update={"checkpoint_seconds": 3.0})
    train(recipe.model_copy(update={"runtime": patient}), harvest, folder)
    return len(uses)


def train_with_small_files(n_bytes: int, fatal: bool, recipe: Recipe, harvest: Path, folder: Path) -> None:
    """Train where no file can grow beyond `n_bytes`: the write fails, or kills the process where it is."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, n_bytes))
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL if fatal else signal.SIG_IGN)
    train(recipe, harvest, folder)
