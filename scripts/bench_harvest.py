"""Reading activations off a language model: ours against the bare forward, a hooked CausalLM, and padded batches.

    python scripts/bench_harvest.py --json bench-results/harvest.json

Ours is `read_windows`, which the harvest stage calls: packed windows, the model stopped after the deepest hook point,
activations and norms as they are stored. Tokens/s count real tokens, not padding. First table: all read the same packed
windows. Second table: the same texts, of uneven length, in windows or in random order with padding, to the same depth.
"""

import argparse
import contextlib
import json
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import benchmark
import torch
from benchmark import Record
from torch import Tensor, nn

from safesail.errors import InputError
from safesail.lm.corpus import Piece, pack
from safesail.lm.hooks import capture, check_hook_points, run_to_depth
from safesail.lm.load import causal_lm, load_tokenizer
from safesail.lm.windows import Storage, packed_inputs, read_windows

OURS, BARE, HOOKED, PADDED = "safesail", "bare forward, same depth", "hooked CausalLM", "random order, padded"
_TEXTS = ("hellaswag", "passages", "stories", "toxicity", "wiki")


def read_pieces(files: list[Path], tokenizer: Any, context: int, n_tokens: int) -> list[Piece]:
    """Pieces of the files' texts in a random order, together at least n_tokens; each file gives as many texts."""
    source, texts = random.Random(0), []
    for file in files:
        if not file.is_file():
            raise InputError(f"there is no text file {file}; `bash scripts/demo` makes those in demo-assets/texts.")
        with open(file, encoding="utf-8") as handle:
            lines = list(handle)
        texts += [json.loads(line)["text"] for line in source.sample(lines, min(len(lines), 400))]
    source.shuffle(texts)
    pieces: list[Piece] = []
    for i, text in enumerate(texts):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        for cut in range(0, len(ids), context):
            part = ids[cut : cut + context]
            pieces.append(Piece(str(i), "", False, "explain", part, roles=[0] * len(part)))
        if _n_tokens(pieces) >= n_tokens:
            return pieces
    raise InputError(f"the texts have {_n_tokens(pieces):,} tokens; lower --tokens from {n_tokens:,} or add texts.")


def _n_tokens(pieces: list[Piece]) -> int:
    return sum(len(piece.ids) for piece in pieces)


def ours(
    model: Any, pieces: list[Piece], windows: list[list[int]], hook_points: tuple[str, ...], per_batch: int
) -> Callable[[], object]:
    """What the harvest stage does for these windows, up to writing the shard."""
    return lambda: list(read_windows(model, pieces, windows, hook_points, per_batch, Storage()))


def batches_of_windows(pieces: list[Piece], windows: list[list[int]], per_batch: int) -> Iterator[dict[str, Tensor]]:
    """Packed windows as model inputs, without the rows' owners."""
    ids = [piece.ids for piece in pieces]
    for start in range(0, len(windows), per_batch):
        inputs = packed_inputs(ids, windows[start : start + per_batch])
        del inputs["owner"]
        yield inputs


@contextlib.contextmanager
def truncated(model: Any, hook_points: tuple[str, ...]) -> Iterator[None]:
    """The model without the blocks after the deepest hook point, as a forward pass with no hooks needs it."""
    base, layers = model.base_model, model.base_model.layers
    base.layers = nn.ModuleList(list(layers)[: 1 + deepest_block(hook_points)])
    try:
        yield
    finally:
        base.layers = layers


def deepest_block(hook_points: tuple[str, ...]) -> int:
    """The number of the last block that a hook point lies in: 15 for layers.15.mlp."""
    return max(int(name.split(".")[1]) for name in hook_points)


@torch.inference_mode()
def bare(model: Any, inputs: list[dict[str, Tensor]], hook_points: tuple[str, ...]) -> None:
    with truncated(model, hook_points):
        for batch in inputs:
            model.base_model(**batch, use_cache=False)


@torch.inference_mode()
def hooked(model: Any, inputs: list[dict[str, Tensor]], hook_points: tuple[str, ...]) -> None:
    """What a script with hooks on the CausalLM does: all blocks, the LM head, all hidden states."""
    with capture(model, hook_points):
        for batch in inputs:
            model(**batch, use_cache=False, output_hidden_states=True)


@torch.inference_mode()
def padded(model: Any, inputs: list[dict[str, Tensor]], hook_points: tuple[str, ...]) -> None:
    """Padded texts to the same depth; the real rows in fp16 with their norms, as ours."""
    for batch in inputs:
        real = batch["attention_mask"].bool()
        for output in run_to_depth(model, hook_points, **batch).values():
            x = output[real].float()
            x.norm(dim=-1)
            x.half()


def padded_inputs(pieces: list[Piece], size: int) -> list[dict[str, Tensor]]:
    """Batches of `size` texts as they come, each padded to its longest."""
    batches = []
    for start in range(0, len(pieces), size):
        ids = [torch.tensor(piece.ids) for piece in pieces[start : start + size]]
        pad = nn.utils.rnn.pad_sequence
        mask = pad([torch.ones_like(row) for row in ids], batch_first=True)
        batches.append({"input_ids": pad(ids, batch_first=True), "attention_mask": mask})
    return batches


def filled(inputs: list[dict[str, Tensor]]) -> float:
    """The share of positions that hold a real token. Masks: (batch, length), 1 where real."""
    return sum(int(b["attention_mask"].sum()) for b in inputs) / sum(b["input_ids"].numel() for b in inputs)


def rates(case: str, table: str, n_tokens: int, seconds: dict[str, list[float]]) -> list[Record]:
    """A record per way: its median, real tokens/s, and how often as fast as the ways it is compared with."""
    times = {name: benchmark.median_ms(values) for name, values in seconds.items()}
    return [
        {
            "table": table,
            "case": case,
            "name": name,
            "milliseconds": ms,
            "tokens_per_second": 1000 * n_tokens / ms,
            "times_bare": benchmark.ratio(times.get(BARE), ms),
            "times_causal_lm": benchmark.ratio(times.get(HOOKED), ms),
            "times_padded": benchmark.ratio(times.get(PADDED), ms),
        }
        for name, ms in times.items()
    ]


def measure(arguments: argparse.Namespace) -> list[Record]:
    """The records of both tables."""
    model, tokenizer = causal_lm(arguments.model), load_tokenizer(arguments.model)
    hook_points = tuple(arguments.hook_points.split(","))
    check_hook_points(model, hook_points)
    pieces = read_pieces(arguments.texts, tokenizer, arguments.window, arguments.tokens)
    windows = pack([len(piece.ids) for piece in pieces], arguments.window)
    where = f"{Path(arguments.model).name}, {', '.join(hook_points)}, {_n_tokens(pieces):,} tokens"
    read = ours(model, pieces, windows, hook_points, arguments.batch)
    return [
        *_against_forwards(model, pieces, windows, hook_points, arguments, read, where),
        *_against_padding(model, pieces, windows, hook_points, arguments, read, where),
    ]


def _against_forwards(
    model: Any,
    pieces: list[Piece],
    windows: list[list[int]],
    hook_points: tuple[str, ...],
    arguments: argparse.Namespace,
    read: Callable[[], object],
    where: str,
) -> list[Record]:
    inputs = list(batches_of_windows(pieces, windows, arguments.batch))
    functions = {
        OURS: read,
        BARE: lambda: bare(model, inputs, hook_points),
        HOOKED: lambda: hooked(model, inputs, hook_points),
    }
    seconds = benchmark.interleave(functions, arguments.rounds, warm_up=1)
    return rates(f"{where}, packed windows of {arguments.window}", "harvest", _n_tokens(pieces), seconds)


def _against_padding(
    model: Any,
    pieces: list[Piece],
    windows: list[list[int]],
    hook_points: tuple[str, ...],
    arguments: argparse.Namespace,
    read: Callable[[], object],
    where: str,
) -> list[Record]:
    inputs = padded_inputs(pieces, arguments.texts_per_batch)
    functions = {OURS: read, PADDED: lambda: padded(model, inputs, hook_points)}
    seconds = benchmark.interleave(functions, arguments.rounds, warm_up=1)
    case = f"{where}, {len(pieces)} texts, padded {arguments.texts_per_batch} at a time"
    records = rates(case, "texts of uneven length", _n_tokens(pieces), seconds)
    window_share = _n_tokens(pieces) / (len(windows) * arguments.window)
    return [{**record, "filled": filled(inputs) if record["name"] == PADDED else window_share} for record in records]


def main() -> int:
    parser = argparse.ArgumentParser(description="Compare our harvest with other ways to read activations.")
    benchmark.add_common_options(parser)
    assets = Path("demo-assets")
    parser.set_defaults(rounds=3)
    parser.add_argument("--model", default=str(assets / "models" / "SmolLM2-135M-Instruct"), help="folder or Hub id")
    parser.add_argument(
        "--texts", type=Path, nargs="+", default=[assets / "texts" / f"{name}.jsonl" for name in _TEXTS]
    )
    points = ",".join(f"layers.{i}.mlp" for i in (3, 6, 9, 12, 15))
    parser.add_argument("--hook-points", default=points, help=f"with commas (default {points})")
    parser.add_argument("--tokens", type=int, default=8000, help="tokens read in each round (default 8000)")
    parser.add_argument("--window", type=int, default=256, help="tokens of a window, and of a text at most (256)")
    parser.add_argument("--batch", type=int, default=8, help="windows a batch (default 8)")
    parser.add_argument("--texts-per-batch", type=int, default=8, help="texts of a padded batch (default 8)")
    return benchmark.run_script(parser, measure)


if __name__ == "__main__":
    sys.exit(main())
