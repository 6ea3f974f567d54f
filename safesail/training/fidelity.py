"""How faithful each SAE of the sweep is, with 95 % intervals.

Reads the harvest and the trained SAEs. Writes `fidelity.json` and, per SAE, `statistics.safetensors`.
Firing rates, dead and dense latents are over all harvested tokens, everything else over held-out documents:
    FVU = Σ ‖x − x̂‖² / Σ ‖x − x̄‖²,   EV = 1 − FVU,   CE recovered = Σ (CE₀ − CE_SAE) / Σ (CE₀ − CE),
    KL = mean of Σ_v p(v) (log p(v) − log p_SAE(v)),   all as ratios of the documents' sums (`metrics.ratio_of_sums`).
While it works: `losses.json`, the documents' sums of cross entropy and KL after each batch of windows.
"""

import json
import math
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from safesail.distributed import device
from safesail.errors import InputError
from safesail.files import write_tensors
from safesail.lm.activations import Activations
from safesail.lm.corpus import pack
from safesail.lm.hooks import replace
from safesail.lm.windows import packed_inputs
from safesail.metrics import Interval, ratio_of_sums, reconstruction, reconstruction_sums
from safesail.progress import bar
from safesail.recipe import BaseRecipe, Recipe
from safesail.run import StageWork, write_json
from safesail.sae import model as sae_files
from safesail.sae.config import SaeConfig
from safesail.sae.model import Sae
from safesail.sae.sparse import Codes
from safesail.training.sources import Rows
from safesail.training.trainer import variants

__all__ = [
    "FIDELITY",
    "cross_entropy",
    "divergence",
    "eval_stage",
    "firing_rates",
    "reconstruct_kept",
    "reconstruction_stage",
]

Progress = Callable[[int], Any]
FIDELITY = ("explained_variance", "fvu", "mse", "cosine", "l0", "dead", "dense", "ce_recovered", "kl")
"""The metrics of an SAE, each with an interval and the definition `<name>/v1`."""
_DENSE_ABOVE = 0.1
_ROWS_AT_ONCE = 128
_STATISTICS_FILE = "statistics.safetensors"


def eval_stage(recipe: Recipe, activations: Activations, trained: Path, model: Any, work: StageWork) -> None:
    """Measure every SAE of the sweep; what an interrupted call has measured is not measured again."""
    configs = [config for name in activations.hook_points for config in variants(recipe, activations, name)]
    losses = _Losses(recipe, activations, model, work.folder / "losses.json")
    n_forwards = 1 + len(activations.hook_points) + len(configs)
    with bar("eval", len(configs) * activations.n_tokens + n_forwards * losses.n_tokens, "token") as progress:
        for hook_point in activations.hook_points:
            document = _document_numbers(activations)[activations.piece_of_row]
            held_out = _HeldOut(recipe, activations, hook_point, document)
            for config in variants(recipe, activations, hook_point):
                path = work.folder / config.sae_id / _STATISTICS_FILE
                if not path.is_file():
                    _write_statistics(sae_files.read(trained / config.sae_id), held_out, path)
                progress.update(activations.n_tokens)
        losses.measure(configs, trained, progress.update)
    results = {}
    for config in configs:
        statistics = load_file(work.folder / config.sae_id / _STATISTICS_FILE)
        results[config.sae_id] = _fidelity(config, statistics, losses.sums)
    write_json(work.folder / "fidelity.json", results)
    work.facts["n_ce_tokens"] = losses.n_tokens


def reconstruction_stage(recipe: BaseRecipe, rows: Rows, document: Tensor, sae: Sae, work: StageWork) -> None:
    """Measure how one SAE reconstructs held-out rows, where there is no cross entropy: `fidelity.json`.

    document: (n_tokens,), the group that each row is drawn with, as the number of its pair.
    """
    config = sae.config
    path = work.folder / config.sae_id / _STATISTICS_FILE
    _write_statistics(sae, _HeldOut(recipe, rows, config.hook_point, document), path)
    statistics = load_file(path)
    write_json(
        work.folder / "fidelity.json", {config.sae_id: _with_intervals(_reconstruction(config, statistics), statistics)}
    )


def firing_rates(folder: Path, sae_id: str) -> Tensor:
    """The share of tokens on which each latent fires, as measured by the eval stage: (d_sae,)."""
    statistics = load_file(folder / sae_id / _STATISTICS_FILE)
    return statistics["n_fired"].float() / int(statistics["n_counted"])


def _fidelity(config: SaeConfig, statistics: dict[str, Tensor], losses: dict[str, Tensor]) -> dict[str, Any]:
    """The numbers of one SAE, their intervals and their definitions."""
    clean, zeroed, n_predicted = losses["clean"], losses[f"zeroed {config.hook_point}"], losses["n_predicted"]
    spliced = losses[f"spliced {config.sae_id}"]
    measured = {
        **_reconstruction(config, statistics),
        "ce_recovered": ratio_of_sums(zeroed - spliced, zeroed - clean),
        "kl": ratio_of_sums(losses[f"kl {config.sae_id}"], n_predicted),
    }
    cross_entropies = {"ce_clean": clean, "ce_zeroed": zeroed, "ce_spliced": spliced}
    means = {name: float(sums.sum() / n_predicted.sum()) for name, sums in cross_entropies.items()}
    return _with_intervals(measured, statistics, means)


def _reconstruction(config: SaeConfig, statistics: dict[str, Tensor]) -> dict[str, Interval]:
    n_counted, n_fired = int(statistics["n_counted"]), statistics["n_fired"]
    sums = {name: statistics[name] for name in ("residual", "total", "cosine", "n_active")}
    every = torch.ones_like(n_fired)
    return {
        **reconstruction(sums, statistics["n_tokens"], config.d_in),
        "dead": ratio_of_sums(n_fired == 0, every),
        "dense": ratio_of_sums(n_fired > _DENSE_ABOVE * n_counted, every),
    }


def _with_intervals(
    measured: dict[str, Interval], statistics: dict[str, Tensor], means: dict[str, float] | None = None
) -> dict[str, Any]:
    return {
        **{name: interval.value for name, interval in measured.items()},
        **(means or {}),
        "n_held_out_tokens": int(statistics["n_tokens"].sum()),
        "n_held_out_documents": len(statistics["n_tokens"]),
        "n_tokens": int(statistics["n_counted"]),
        "intervals": {name: [interval.low, interval.high] for name, interval in measured.items()},
        "definitions": {name: f"{name}/v1" for name in measured},
    }


def _document_numbers(activations: Activations) -> Tensor:
    """The number of each piece's document, in the order in which documents first appear: (n_pieces,)."""
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(name, len(numbers)) for name in activations.documents])


# --- reconstruction, from the harvest ------------------------------------------------------------------------------


class _HeldOut:
    """Which rows of one hook point count and which of those are held out, with the held-out mean.

    document: (n_tokens,), the number of the document that each row belongs to.
    """

    def __init__(self, recipe: BaseRecipe, activations: Rows, hook_point: str, document: Tensor) -> None:
        self.activations, self.hook_point = activations, hook_point
        self.device = device(recipe.runtime.device)
        self.counted = activations.counted(hook_point, recipe.tokens)
        self.rows = self.counted & activations.rows_held_out()
        if int(self.rows.sum()) < 2:
            raise InputError("no held-out tokens to measure on; raise corpus.n_held_out_tokens.")
        documents, number = torch.unique(document[self.rows], return_inverse=True)
        self.n_documents = len(documents)
        self.document = torch.full((activations.n_tokens,), -1)
        self.document[self.rows] = number

    @cached_property
    def mean(self) -> Tensor:
        """A pass of its own: variances are summed about it, not taken as differences of large sums. (d_in,), fp64."""
        total = torch.zeros(self.activations.facts["d_in"][self.hook_point], dtype=torch.float64)
        for start, block in self.activations.blocks(self.hook_point):
            total += block[self.rows[start : start + len(block)]].double().sum(0)
        return total / int(self.rows.sum())


@torch.inference_mode()
def _write_statistics(sae: Sae, held_out: _HeldOut, path: Path) -> None:
    """Sum up per held-out document in fp64 and count the firings of every latent; no activations are kept."""
    sae, d_sae = sae.to(held_out.device), sae.config.d_sae
    n_fired = torch.zeros(d_sae, dtype=torch.long)
    sums: dict[str, Tensor] = {}
    for start, block in held_out.activations.blocks(held_out.hook_point):
        rows = slice(start, start + len(block))
        inside = held_out.rows[rows]
        others, x = block[held_out.counted[rows] & ~inside], block[inside].to(held_out.device)
        n_fired += _firings(sae.encode_sparse(others.to(held_out.device)), d_sae)
        codes = sae.encode_sparse(x)
        n_fired += _firings(codes, d_sae)
        for name, values in _per_token(x, sae.decode_sparse(codes, like=x), codes, held_out.mean.to(x.device)).items():
            _add_up(sums, name, values.cpu(), held_out.document[rows][inside], held_out.n_documents)
    if not math.isfinite(float(sums["residual"].sum())):
        raise InputError(
            f"{sae.config.sae_id} reconstructs values that are not finite; lower train.learning_rate and train again."
        )
    sums["n_tokens"] = torch.bincount(held_out.document[held_out.rows], minlength=held_out.n_documents)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(path, {**sums, "n_fired": n_fired, "n_counted": held_out.counted.sum()})


def _firings(codes: Codes, d_sae: int) -> Tensor:
    """On how many of the tokens each latent is above zero: (d_sae,)."""
    return torch.bincount(codes.active().indices, minlength=d_sae).cpu()


def _per_token(x: Tensor, x_hat: Tensor, codes: Codes, mean: Tensor) -> dict[str, Tensor]:
    """What is summed up, of each token: (n_tokens,) in fp64. x, x_hat: (n_tokens, d_in), mean: (d_in,)."""
    return {**reconstruction_sums(x, x_hat, mean), "n_active": codes.active().offsets.diff().double()}


def _add_up(sums: dict[str, Tensor], name: str, values: Tensor, group: Tensor, n_groups: int) -> None:
    """Add the values of each group to its sum under `name`. values, group: (n,), in fp64 and in their order."""
    sums.setdefault(name, torch.zeros(n_groups, dtype=torch.float64)).index_add_(0, group, values)


# --- cross entropy and KL, with the SAE in the model ---------------------------------------------------------------


def reconstruct_kept(sae: Sae, x: Tensor, keep: Tensor) -> Tensor:
    """x with the kept tokens replaced by their reconstruction. x: (..., d_in), keep: bool (...)."""
    out = x.clone()
    out[keep] = sae(x[keep].float()).to(x.dtype)
    return out


def cross_entropy(log_q: Tensor, targets: Tensor) -> Tensor:
    """−log q(target) of each predicted token, in nats: (n,) in fp64. log_q: (n, n_vocabulary), targets: (n,)."""
    return -log_q.gather(1, targets[:, None])[:, 0].double().cpu()


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) = Σ_v p(v) (log p(v) − log q(v)) of each row, in nats: (n,) in fp64. Both: (n, n_vocabulary)."""
    parts = zip(log_p.split(_ROWS_AT_ONCE), log_q.split(_ROWS_AT_ONCE), strict=True)
    return torch.cat([(p.exp() * (p - q)).sum(1) for p, q in parts]).double().cpu()


class _Batch:
    """Some packed windows on the model's device: inputs, which tokens are predicted, and whose they are."""

    def __init__(self, pieces: list[list[int]], windows: list[list[int]], where: Any) -> None:
        inputs = packed_inputs(pieces, windows)
        self.owner = inputs.pop("owner")
        self.position = inputs["position_ids"]
        predicted = (self.owner[:, 1:] == self.owner[:, :-1]) & (self.owner[:, 1:] >= 0)
        self.piece = self.owner[:, 1:][predicted]
        """(n_predicted,) the number in `pieces` of each predicted token; a piece's first token is never predicted."""
        self.predicted = predicted.to(where)
        self.inputs = {name: value.to(where) for name, value in inputs.items()}
        self.targets = self.inputs["input_ids"][:, 1:][self.predicted]
        self.n_tokens = int((self.owner >= 0).sum())

    def log_probabilities(self, model: Any) -> Tensor:
        """The model's log-probabilities of the predicted tokens: (n_predicted, n_vocabulary) in fp32."""
        out = model(**self.inputs, use_cache=False).logits[:, :-1][self.predicted].float()
        for part in out.split(_ROWS_AT_ONCE):  # in place: with a large vocabulary this is the stage's largest tensor
            part -= part.logsumexp(1, keepdim=True)
        return out


class _Losses:
    """Cross entropies and KL on held-out texts, summed per document.

    A batch of windows is run unchanged once, zeroed at each hook point, and with each SAE; its sums are on disk before
    the next one starts. So the unchanged log-probabilities are needed only one batch at a time, and an interrupted
    stage goes on at the batch it was in. SAEs are read again for every batch: only one of them is in memory.
    """

    def __init__(self, recipe: Recipe, activations: Activations, model: Any, path: Path) -> None:
        self.recipe, self.activations, self.model, self.path = recipe, activations, model, path
        self.numbers = _held_out_pieces(activations, recipe.eval.n_ce_tokens)
        self.pieces = [activations.piece_ids[i] for i in self.numbers.tolist()]
        self.n_tokens = sum(len(ids) for ids in self.pieces)
        self.windows = pack([len(ids) for ids in self.pieces], recipe.harvest.window)
        documents, self.document = torch.unique(_document_numbers(activations)[self.numbers], return_inverse=True)
        self.n_documents = len(documents)
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"n_windows": 0, "sums": {}}
        self.n_windows: int = known["n_windows"]
        self.sums = {name: torch.tensor(sums, dtype=torch.float64) for name, sums in known["sums"].items()}

    def measure(self, configs: list[SaeConfig], trained: Path, progress: Progress) -> None:
        """Go through the windows that are not measured yet."""
        n_forwards = 1 + len(self.activations.hook_points) + len(configs)
        progress(n_forwards * sum(len(self.pieces[i]) for members in self.windows[: self.n_windows] for i in members))
        at_once = max(self.recipe.runtime.windows_per_batch // 2, 1)
        while self.n_windows < len(self.windows):
            windows = self.windows[self.n_windows : self.n_windows + at_once]
            self._measure(_Batch(self.pieces, windows, self.model.device), configs, trained, progress)
            self.n_windows += len(windows)
            sums = {name: values.tolist() for name, values in self.sums.items()}
            write_json(self.path, {"n_windows": self.n_windows, "sums": sums})

    @torch.inference_mode()
    def _measure(self, batch: _Batch, configs: list[SaeConfig], trained: Path, progress: Progress) -> None:
        clean = batch.log_probabilities(self.model)
        self._add("n_predicted", torch.ones(len(batch.targets), dtype=torch.float64), batch)
        self._add("clean", cross_entropy(clean, batch.targets), batch)
        progress(batch.n_tokens)
        for hook_point in self.activations.hook_points:
            zeroed = self._changed(batch, hook_point, torch.zeros_like)
            self._add(f"zeroed {hook_point}", cross_entropy(zeroed, batch.targets), batch)
            progress(batch.n_tokens)
            keep = self._kept(batch, hook_point)
            for config in configs:
                if config.hook_point == hook_point:
                    self._splice(batch, trained / config.sae_id, keep, clean)
                    progress(batch.n_tokens)

    def _splice(self, batch: _Batch, folder: Path, keep: Tensor, clean: Tensor) -> None:
        sae = sae_files.read(folder).to(self.model.device)
        config = sae.config
        spliced = self._changed(batch, config.hook_point, lambda x: reconstruct_kept(sae, x, keep))
        self._add(f"spliced {config.sae_id}", cross_entropy(spliced, batch.targets), batch)
        self._add(f"kl {config.sae_id}", divergence(clean, spliced), batch)

    def _changed(self, batch: _Batch, hook_point: str, change: Callable[[Tensor], Tensor]) -> Tensor:
        with replace(self.model, hook_point, change):
            return batch.log_probabilities(self.model)

    def _kept(self, batch: _Batch, hook_point: str) -> Tensor:
        """Which tokens of the batch the token policy counts, as it did in the harvest: bool (n_windows, length)."""
        rows = self.activations.row_start[self.numbers][batch.owner] + batch.position
        counted = self.activations.counted(hook_point, self.recipe.tokens)
        return (counted[rows] & (batch.owner >= 0)).to(self.model.device)

    def _add(self, name: str, values: Tensor, batch: _Batch) -> None:
        if not math.isfinite(float(values.sum())):
            raise InputError(
                f"the cross entropy or KL on held-out texts ({name}) is not finite; the model computes in "
                f"{self.recipe.model.dtype}. Check its weights, or set model.dtype to one of a wider range."
            )
        _add_up(self.sums, name, values, self.document[batch.piece], self.n_documents)


def _held_out_pieces(activations: Activations, n_tokens: int) -> Tensor:
    """The numbers of the first held-out pieces of at least 8 tokens that make up about n_tokens.

    A piece with an activation that the harvest had to skip is left out: its losses may not be finite either.
    """
    skipped = torch.zeros(len(activations.piece_ids), dtype=torch.bool)
    for hook_point in activations.hook_points:
        skipped[activations.piece_of_row[~activations.norms(hook_point).isfinite()]] = True
    chosen, total = [], 0
    for i in (activations.held_out & ~skipped).nonzero().flatten().tolist():
        n = len(activations.piece_ids[i])
        if n >= 8 and total < n_tokens:
            chosen.append(i)
            total += n
    if not chosen:
        raise InputError("no held-out text of 8 tokens or more; raise corpus.n_held_out_tokens.")
    return torch.tensor(chosen)
