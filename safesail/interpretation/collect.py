"""Where and how strongly the latents fire: exact statistics of all, examples of the safety-related ones.

Reads the harvest, the selected SAEs and the candidates. Writes `statistics.parquet` (every latent of the selected
SAEs), `examples.parquet` (contexts of the candidates, explain and score halves apart) and, per hook point,
`codes-<hook point>.safetensors` (the candidates' activations by row, which the score stage reads again).
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from safesail.lm.activations import Activations
from safesail.lm.tokens import Span, spans
from safesail.metrics import normaliser, quantiles_of_sparse
from safesail.neurons import QUANTILES, neuron_id
from safesail.progress import bar
from safesail.recipe import CollectSection, Recipe, TokenPolicy
from safesail.run import StageWork
from safesail.sae import model as sae_files
from safesail.sae.model import Sae
from safesail.training.step import generator

__all__ = ["EXAMPLE_SCHEMA", "Firings", "Peak", "collect_stage", "context", "load_codes", "sparse_codes"]


class Firings(NamedTuple):
    """All activations of a set of latents, grouped by latent in ascending order of activation."""

    latents: Tensor
    """(n,) the latent of each entry, ascending."""
    values: Tensor
    rows: Tensor

    def of(self, latent: int) -> tuple[Tensor, Tensor]:
        """The activations of one latent, ascending, and their rows."""
        bounds = torch.tensor([latent, latent + 1], dtype=self.latents.dtype)
        low, high = torch.searchsorted(self.latents, bounds).tolist()
        return self.values[low:high], self.rows[low:high]


class Peak(NamedTuple):
    """The strongest activation of a latent in one piece of text."""

    piece: int
    row: int
    value: float
    level: int
    """1 … 10, the tenth of the normaliser that the activation falls in; 10 also above it."""
    stratum: str
    """`top`, or `level-3` for an example drawn from that level."""


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
    statistics, examples = [], []
    total = activations.n_tokens * len(selection["selected"])
    with bar("collect", total, "token") as progress:
        for hook_point, sae_id in selection["selected"].items():
            sae = sae_files.read(trained / sae_id)
            firings = sparse_codes(sae, activations, recipe.tokens, progress.update)
            n_tokens = int(activations.counted(hook_point, recipe.tokens).sum())
            table = latent_statistics(firings, n_tokens, sae.config.d_sae, hook_point)
            statistics += table
            chosen = sorted(
                {row["latent"] for rows in candidates[hook_point].values() for row in rows if row["explain"]}
            )
            for latent in chosen:
                q = table[latent]["normaliser"]
                examples += _examples(recipe, activations, firings, hook_point, latent, q, tokenizer)
            _save_codes(work.folder / f"codes-{hook_point}.safetensors", firings, chosen)
    pq.write_table(pa.Table.from_pylist(statistics), work.folder / "statistics.parquet")
    pq.write_table(pa.Table.from_pylist(examples, schema=EXAMPLE_SCHEMA), work.folder / "examples.parquet")
    work.facts["n_examples"] = len(examples)


@torch.inference_mode()
def sparse_codes(sae: Sae, activations: Activations, policy: TokenPolicy, progress: Any = lambda n: None) -> Firings:
    """Every non-zero activation of the SAE on the counted tokens of the harvest."""
    keep = activations.counted(sae.config.hook_point, policy)
    latents, values, rows = [], [], []
    for start, block in activations.blocks(sae.config.hook_point):
        codes = sae.encode_sparse(block)
        tokens = codes.tokens()
        active = (codes.values > 0) & keep[start : start + len(block)][tokens]
        latents.append(codes.indices[active].int())
        values.append(codes.values[active])
        rows.append((tokens[active] + start).int())
        progress(len(block))
    latent, value, row = torch.cat(latents), torch.cat(values), torch.cat(rows)
    order = value.argsort(stable=True)
    order = order[latent[order].argsort(stable=True)]
    return Firings(latent[order], value[order], row[order])


def latent_statistics(firings: Firings, n_tokens: int, d_sae: int, hook_point: str) -> list[dict[str, Any]]:
    """One row per latent: firing rate, exact quantiles over all tokens, and the normaliser."""
    table = []
    for latent in range(d_sae):
        values, _ = firings.of(latent)
        quantiles = (
            quantiles_of_sparse(values, n_tokens, tuple(QUANTILES.values())) if len(values) else [0.0] * len(QUANTILES)
        )
        by_name = dict(zip(QUANTILES, quantiles, strict=True))
        median = float(values[(len(values) - 1) // 2]) if len(values) else 0.0
        table.append(
            {
                "neuron_id": neuron_id(hook_point, latent),
                "hook_point": hook_point,
                "latent": latent,
                "n_tokens": n_tokens,
                "firing_rate": len(values) / n_tokens,
                **by_name,
                "max": float(values[-1]) if len(values) else 0.0,
                "median_active": median,
                "normaliser": float(normaliser(torch.tensor(by_name["p999"]), torch.tensor(median))),
            }
        )
    return table


def load_codes(folder: Path, hook_point: str) -> Firings:
    """The candidates' activations that `collect` kept for the score stage."""
    tensors = load_file(folder / f"codes-{hook_point}.safetensors")
    return Firings(tensors["latents"], tensors["values"], tensors["rows"])


def peaks(firings: Firings, activations: Activations, latent: int, q: float) -> list[Peak]:
    """The strongest activation of a latent in every piece where it fires, strongest first."""
    values, rows = firings.of(latent)
    best: dict[int, tuple[float, int]] = {}
    for value, row in zip(values.tolist(), rows.tolist(), strict=True):  # ascending: the last one per piece wins
        best[int(activations.piece_of_row[row])] = (value, row)
    ordered = sorted(best.items(), key=lambda item: (-item[1][0], item[0]))
    return [Peak(piece, row, value, min(int(10 * value / q) + 1, 10), "top") for piece, (value, row) in ordered]


def choose_peaks(
    found: list[Peak], activations: Activations, half: str, section: CollectSection, seed: Any
) -> list[Peak]:
    """The strongest peaks of one half, then some from each level: one per document and never the same text twice."""
    ours = [peak for peak in found if activations.half[peak.piece] == half]
    chosen, seen = [], set()

    def take(peak: Peak, stratum: str) -> bool:
        keys = {activations.documents[peak.piece], tuple(activations.piece_ids[peak.piece])}
        if keys & seen:
            return False
        seen.update(keys)
        chosen.append(peak._replace(stratum=stratum))
        return True

    for peak in ours:
        if len(chosen) < section.n_top:
            take(peak, "top")
    by_level: dict[int, list[Peak]] = defaultdict(list)
    for peak in ours:
        by_level[peak.level].append(peak)
    for level in range(10, 0, -1):
        order = torch.randperm(len(by_level[level]), generator=generator(*seed, half, level)).tolist()
        wanted = section.n_per_level
        for i in order:
            if wanted and take(by_level[level][i], f"level-{level}"):
                wanted -= 1
    return chosen


def context(
    activations: Activations, tokenizer: Any, firing: dict[int, float], peak: Peak, before: int, after: int
) -> tuple[list[Span], list[float]]:
    """The readable units around a peak and the strongest activation in each. firing: {row: activation}."""
    ids = activations.piece_ids[peak.piece]
    first = int(activations.row_start[peak.piece])
    low = max(peak.row - first - before, 0)
    high = min(peak.row - first + after + 1, len(ids))
    units = spans(tokenizer, ids[low:high])
    strengths = [
        max((firing.get(first + low + i, 0.0) for i in range(unit.start, unit.end)), default=0.0) for unit in units
    ]
    return units, strengths


EXAMPLE_SCHEMA = pa.schema(
    [
        ("neuron_id", pa.string()),
        ("half", pa.string()),
        ("rank", pa.int32()),
        ("stratum", pa.string()),
        ("level", pa.int32()),
        ("activation", pa.float32()),
        ("text", pa.string()),
        ("tokens", pa.list_(pa.string())),
        ("activations", pa.list_(pa.float32())),
        ("source", pa.string()),
        ("document", pa.string()),
        ("piece", pa.int32()),
        ("peak", pa.int32()),
    ]
)


def _examples(
    recipe: Recipe, activations: Activations, firings: Firings, hook_point: str, latent: int, q: float, tokenizer: Any
) -> Iterator[dict[str, Any]]:
    values, rows = firings.of(latent)
    firing = dict(zip(rows.tolist(), values.tolist(), strict=True))
    found = peaks(firings, activations, latent, q)
    section, name = recipe.collect, neuron_id(hook_point, latent)
    for half in ("explain", "score"):
        chosen = choose_peaks(found, activations, half, section, (recipe.seed, "examples", name))
        for rank, peak in enumerate(chosen):
            units, strengths = context(activations, tokenizer, firing, peak, section.before, section.after)
            yield {
                "neuron_id": name,
                "half": half,
                "rank": rank,
                "stratum": peak.stratum,
                "level": peak.level,
                "activation": peak.value,
                "text": "".join(unit.text for unit in units),
                "tokens": [unit.text for unit in units],
                "activations": strengths,
                "source": activations.sources[peak.piece],
                "document": activations.documents[peak.piece],
                "piece": peak.piece,
                "peak": strengths.index(max(strengths)),
            }


def _save_codes(path: Path, firings: Firings, chosen: list[int]) -> None:
    keep = torch.isin(firings.latents, torch.tensor(chosen, dtype=firings.latents.dtype))
    tensors = {"latents": firings.latents[keep], "values": firings.values[keep], "rows": firings.rows[keep]}
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)
