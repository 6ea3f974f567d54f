"""How faithful each SAE of the sweep is.

Reads the harvest and the trained SAEs. Writes `fidelity.json` and, per SAE, `firing_rates.safetensors`.
EV, L0 and CE recovered are over held-out documents, firing rates and dead latents over all harvested tokens.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from safesail.errors import InputError
from safesail.lm.activations import Activations, packed_inputs
from safesail.lm.corpus import pack
from safesail.lm.hooks import replace
from safesail.lm.tokens import counted
from safesail.metrics import ce_recovered, explained_variance
from safesail.progress import bar
from safesail.recipe import Recipe
from safesail.run import StageWork, write_json
from safesail.sae import model as sae_files
from safesail.sae.model import Sae
from safesail.sae.sparse import Codes
from safesail.training.trainer import variants

__all__ = ["cross_entropy", "eval_stage", "firing_rates", "reconstruct_counted"]


def eval_stage(recipe: Recipe, activations: Activations, trained: Path, model: Any, work: StageWork) -> None:
    """Measure every SAE of the sweep; numbers that are already there are not measured again."""
    configs = [config for name in activations.hook_points for config in variants(recipe, activations, name)]
    losses = _Losses(recipe, activations, model, work.folder / "losses.json")
    n_forwards = 1 + len(activations.hook_points) + len(configs)
    results = {}
    with bar("eval", len(configs) * activations.n_tokens + n_forwards * losses.n_tokens, "token") as progress:
        for config in configs:
            sae = sae_files.read(trained / config.sae_id)
            numbers = _statistics(sae, activations, recipe, work.folder / config.sae_id, progress.update)
            clean, zeroed = losses.clean(progress.update), losses.zeroed(config.hook_point, progress.update)
            spliced = losses.spliced(sae, progress.update)
            results[config.sae_id] = {
                **numbers,
                "ce_clean": clean,
                "ce_zeroed": zeroed,
                "ce_spliced": spliced,
                "ce_recovered": ce_recovered(clean, zeroed, spliced),
            }
    write_json(work.folder / "fidelity.json", results)
    work.facts["n_ce_tokens"] = losses.n_tokens


def firing_rates(folder: Path, sae_id: str) -> Tensor:
    """The share of tokens on which each latent fires, as measured by the eval stage: (d_sae,)."""
    return load_file(folder / sae_id / "firing_rates.safetensors")["firing_rate"]


def reconstruct_counted(sae: Sae, x: Tensor, ids: Tensor, specials: list[int]) -> Tensor:
    """x with the tokens that the SAE's policy counts replaced by their reconstruction. x: (..., d_in), ids: (...)."""
    config = sae.config
    keep = counted(config.token_policy, ids, x.norm(dim=-1), specials, config.median_norm)
    out = x.clone()
    out[keep] = sae(x[keep].float()).to(x.dtype)
    return out


@torch.inference_mode()
def cross_entropy(model: Any, windows: Iterator[dict[str, Tensor]], progress: Callable[[int], Any]) -> float:
    """The mean next-token cross entropy in nats over packed windows; a piece's first token is never predicted."""
    total, count = 0.0, 0
    for window in windows:
        inputs = dict(window)
        owner = inputs.pop("owner")
        logits = model(**inputs, use_cache=False).logits[:, :-1]
        predicted = (owner[:, 1:] == owner[:, :-1]) & (owner[:, 1:] >= 0)
        targets = inputs["input_ids"][:, 1:][predicted]
        total += float(F.cross_entropy(logits[predicted].float(), targets, reduction="sum"))
        count += len(targets)
        progress(int((owner >= 0).sum()))
    return total / count


@torch.inference_mode()
def _statistics(
    sae: Sae, activations: Activations, recipe: Recipe, folder: Path, progress: Callable[[int], Any]
) -> dict[str, Any]:
    """EV and L0 on held-out tokens, firing rates and dead share on all counted tokens."""
    hook_point = sae.config.hook_point
    keep, held_out = activations.counted(hook_point, recipe.tokens), activations.rows_held_out()
    fired = torch.zeros(sae.config.d_sae, dtype=torch.long)
    originals, reconstructions, n_active = [], [], 0
    for start, block in activations.blocks(hook_point):
        rows = slice(start, start + len(block))
        codes = sae.encode_sparse(block)
        active = (codes.values > 0) & keep[rows, None]
        fired += torch.bincount(codes.indices[active], minlength=sae.config.d_sae)
        chosen = keep[rows] & held_out[rows]
        originals.append(block[chosen])
        reconstructions.append(sae.decode_sparse(Codes(codes.values[chosen], codes.indices[chosen])))
        n_active += int(active[chosen].sum())
        progress(len(block))
    x, x_hat = torch.cat(originals), torch.cat(reconstructions)
    if len(x) < 2:
        raise InputError("no held-out tokens to measure on; raise corpus.n_held_out_tokens.")
    folder.mkdir(parents=True, exist_ok=True)
    save_file({"firing_rate": fired.float() / int(keep.sum())}, folder / "firing_rates.safetensors")
    return {
        "explained_variance": explained_variance(x, x_hat),
        "l0": n_active / len(x),
        "dead": float((fired == 0).double().mean()),
        "n_held_out_tokens": len(x),
        "n_tokens": int(keep.sum()),
    }


class _Losses:
    """Cross entropies on the held-out texts, each measured once and kept, so that an interrupted stage goes on."""

    def __init__(self, recipe: Recipe, activations: Activations, model: Any, path: Path) -> None:
        self.model, self.path, self.specials = model, path, activations.facts["special_ids"]
        self.known: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}
        self.pieces = _held_out_pieces(activations, recipe.eval.n_ce_tokens)
        self.n_tokens = sum(len(ids) for ids in self.pieces)
        self.window, self.per_batch = recipe.harvest.window, max(recipe.runtime.windows_per_batch // 2, 1)

    def clean(self, progress: Callable[[int], Any]) -> float:
        return self._measure("clean", progress)

    def zeroed(self, hook_point: str, progress: Callable[[int], Any]) -> float:
        """The loss with the hook point's output set to zero at every token."""
        return self._measure(f"zeroed {hook_point}", progress, hook_point, lambda x, _: torch.zeros_like(x))

    def spliced(self, sae: Sae, progress: Callable[[int], Any]) -> float:
        """The loss with the SAE's reconstruction in place of the hook point's output."""
        return self._measure(
            f"spliced {sae.config.sae_id}",
            progress,
            sae.config.hook_point,
            lambda x, ids: reconstruct_counted(sae, x, ids, self.specials),
        )

    def _measure(
        self,
        name: str,
        progress: Callable[[int], Any],
        hook_point: str | None = None,
        change: Callable[[Tensor, Tensor], Tensor] | None = None,
    ) -> float:
        if name not in self.known:
            self.known[name] = self._run(progress, hook_point, change)
            write_json(self.path, self.known)
        return self.known[name]

    def _run(self, progress: Callable[[int], Any], hook_point: str | None, change: Any) -> float:
        windows = pack([len(ids) for ids in self.pieces], self.window)
        current: dict[str, Tensor] = {}

        def inputs() -> Iterator[dict[str, Tensor]]:
            for start in range(0, len(windows), self.per_batch):
                batch = packed_inputs(self.pieces, windows[start : start + self.per_batch])
                current["ids"] = batch["input_ids"]
                yield batch

        if hook_point is None:
            return cross_entropy(self.model, inputs(), progress)
        with replace(self.model, hook_point, lambda x: change(x, current["ids"])):
            return cross_entropy(self.model, inputs(), progress)


def _held_out_pieces(activations: Activations, n_tokens: int) -> list[list[int]]:
    """The first held-out pieces of at least 8 tokens that make up about n_tokens."""
    chosen, total = [], 0
    for ids, held_out in zip(activations.piece_ids, activations.held_out.tolist(), strict=True):
        if held_out and len(ids) >= 8 and total < n_tokens:
            chosen.append(ids)
            total += len(ids)
    if not chosen:
        raise InputError("no held-out text of 8 tokens or more; raise corpus.n_held_out_tokens.")
    return chosen
