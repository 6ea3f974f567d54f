"""Where and how strongly the latents fire: exact statistics of all, examples of the safety-related ones.

Reads the harvest, the selected SAEs and the candidates. Writes `statistics.parquet` (every latent of the selected
SAEs), `examples.parquet` (contexts of the candidates, explain and score halves apart) and, per hook point,
`codes-<hook point>.safetensors` (the candidates' activations by row, which the score stage reads again).

The harvest is read once for each selected SAE. What fires waits on disk, in buckets by latent, and is sorted one bucket
at a time, so memory grows with `runtime.collect_megabytes` and not with the texts.
"""

import contextlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from safesail.errors import InputError
from safesail.interpretation.buckets import BYTES_PER_ENTRY, Buckets, spill
from safesail.interpretation.examples import EXAMPLE_SCHEMA, Examples
from safesail.interpretation.firings import Firings, active_entries, load_codes, writing_codes
from safesail.interpretation.peaks import Peak, peaks
from safesail.lm.activations import Activations
from safesail.metrics import normaliser, quantiles_of_sparse
from safesail.neurons import QUANTILES, neuron_id
from safesail.progress import bar
from safesail.recipe import Recipe, TokenPolicy
from safesail.run import StageWork
from safesail.sae import model as sae_files
from safesail.sae.model import Sae

__all__ = [
    "EXAMPLE_SCHEMA",
    "Firings",
    "Peak",
    "collect_stage",
    "latent_statistics",
    "load_codes",
    "peaks",
    "sparse_codes",
]

_MEGABYTE = 1 << 20
Row = dict[str, Any]


def collect_stage(
    recipe: Recipe,
    activations: Activations,
    trained: Path,
    selection: dict[str, Any],
    candidates: dict[str, Any],
    tokenizer: Any,
    work: StageWork,
) -> None:
    """Statistics of every latent and examples of every candidate, for the selected SAE of each hook point."""
    statistics: list[Row] = []
    examples: list[Row] = []
    total = activations.n_tokens * len(selection["selected"])
    with bar("collect", total, "token") as progress:
        for hook_point, sae_id in selection["selected"].items():
            sae = sae_files.read(trained / sae_id)
            counted = _counted(activations, hook_point, recipe.tokens)
            with _emptied(work.folder / "buckets") as folder:
                limit = recipe.runtime.collect_megabytes * _MEGABYTE // BYTES_PER_ENTRY
                buckets = _buckets(sae, activations, counted, folder, limit, progress.update)
                finder = Examples(recipe, activations, hook_point, counted, tokenizer)
                chosen = _to_explain(candidates[hook_point])
                rows, shown = _read_off(buckets, finder, chosen, int(counted.sum()), work.folder)
            statistics += rows
            examples += shown
    pq.write_table(pa.Table.from_pylist(statistics), work.folder / "statistics.parquet")
    pq.write_table(pa.Table.from_pylist(examples, schema=EXAMPLE_SCHEMA), work.folder / "examples.parquet")
    work.facts["n_examples"] = len(examples)


def sparse_codes(sae: Sae, activations: Activations, policy: TokenPolicy) -> Firings:
    """Every activation of the SAE above zero on the counted tokens of the harvest, all in memory."""
    counted = activations.counted(sae.config.hook_point, policy)
    with tempfile.TemporaryDirectory() as folder:
        buckets = _buckets(sae, activations, counted, Path(folder), activations.n_tokens * sae.config.d_sae)
        parts = [firings for _, firings in buckets.parts()]
    return Firings(*(torch.cat(column) for column in zip(*parts, strict=True)))


def latent_statistics(firings: Firings, latents: range, n_tokens: int, hook_point: str) -> list[Row]:
    """One row for each of the latents: firing rate, exact quantiles over all counted tokens, and the normaliser."""
    return [_statistics(firings.of(latent)[0], n_tokens, hook_point, latent) for latent in latents]


def _statistics(values: Tensor, n_tokens: int, hook_point: str, latent: int) -> Row:
    quantiles = quantiles_of_sparse(values, n_tokens, tuple(QUANTILES.values()))
    by_name = dict(zip(QUANTILES, quantiles, strict=True))
    median = float(values[(len(values) - 1) // 2]) if len(values) else 0.0
    shown_as_1 = float(normaliser(torch.tensor(by_name["p999"]), torch.tensor(median)))
    return {
        "neuron_id": neuron_id(hook_point, latent),
        "hook_point": hook_point,
        "latent": latent,
        "n_tokens": n_tokens,
        "firing_rate": len(values) / n_tokens,
        **by_name,
        "max": float(values[-1]) if len(values) else 0.0,
        "median_active": median,
        "normaliser": shown_as_1,
        "histogram": _histogram(values, shown_as_1),
    }


def _histogram(values: Tensor, shown_as_1: float) -> list[int]:
    """How many activations are in each tenth of the normaliser, those above it in the last. values: (n,), positive."""
    tenths = (values / (shown_as_1 or 1.0) * 10).ceil().clamp(1, 10).long() - 1
    return torch.bincount(tenths, minlength=10).tolist()


def _buckets(
    sae: Sae,
    activations: Activations,
    counted: Tensor,
    folder: Path,
    max_entries: int,
    progress: Callable[[int], object] = lambda n: None,
) -> Buckets:
    """The one pass over the harvest."""
    entries = active_entries(sae, activations, counted, progress)
    return spill(entries, sae.config.d_sae, activations.n_tokens, folder, max_entries)


def _read_off(
    buckets: Buckets, finder: Examples, chosen: list[int], n_tokens: int, folder: Path
) -> tuple[list[Row], list[Row]]:
    """The statistics of all latents and the examples of the chosen ones, whose activations go into their file."""
    statistics: list[Row] = []
    examples: list[Row] = []
    n_codes = int(buckets.counts[chosen].sum())
    with writing_codes(folder, finder.hook_point, n_codes) as append:
        for latents, firings in buckets.parts():
            table = latent_statistics(firings, latents, n_tokens, finder.hook_point)
            statistics += table
            for latent in (name for name in chosen if name in latents):
                values, rows = firings.of(latent)
                append(Firings(torch.full_like(rows, latent), values, rows))
                if len(rows):
                    examples += finder.of(latent, values, rows, table[latent - latents.start]["normaliser"])
    return statistics, examples


def _counted(activations: Activations, hook_point: str, policy: TokenPolicy) -> Tensor:
    """Which rows count at a hook point, bool (n_tokens,); InputError where none does."""
    counted = activations.counted(hook_point, policy)
    if not counted.any():
        raise InputError(
            f"no token counts at {hook_point} under the token policy; loosen [tokens] in the recipe or add texts."
        )
    return counted


def _to_explain(domains: dict[str, list[Row]]) -> list[int]:
    """The latents of a hook point that go on to be explained, ascending."""
    return sorted({row["latent"] for rows in domains.values() for row in rows if row["explain"]})


@contextlib.contextmanager
def _emptied(folder: Path) -> Iterator[Path]:
    """An empty folder for the time of the block; what a killed attempt left in it goes first."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder)
