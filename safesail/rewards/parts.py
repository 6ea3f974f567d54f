"""The part of a reward model that is trained, on what the frozen part gives, which is computed once.

Below the trained blocks nothing changes, so the residual stream there is read once for all texts and kept in a file
that is mapped into memory; training then runs the last blocks alone. Where only the head is trained, one vector a text
is kept: what the final norm gives at its last token.
"""

import copy
import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from safesail.distributed import ALONE, Ranks
from safesail.errors import InputError
from safesail.files import replacing
from safesail.lm.hooks import run_to_depth
from safesail.rewards.model import RewardModel, by_length, cut_config, padded

__all__ = ["TrainedPart", "trained_part"]

_TOKENS_PER_BATCH = 8192
_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""How far, relative to their norm, states by way of the frozen part may lie from the whole model's."""


class TrainedPart:
    """The whole reward model as what is trained; the subclasses begin further up.

    Texts are named by their numbers among those it was made for.
    """

    def __init__(self, reward_model: RewardModel, ids: Sequence[list[int]], precision: torch.dtype) -> None:
        self.reward_model, self.ids, self.precision = reward_model, ids, precision
        self.device: torch.device = reward_model.model.device
        self.lengths = [len(each) for each in ids]
        """Per text, how many tokens the trained part reads of it."""

    def parameters(self) -> dict[str, Tensor]:
        """The trained weights by name."""
        return {**self._below_head(), "score.weight": self.reward_model.model.score.weight}

    def rewards(self, texts: list[int]) -> Tensor:
        """The rewards of a batch of texts, fp32 (n_texts,) on the device."""
        with torch.autocast(self.device.type, self.precision, enabled=self.precision != torch.float32):
            states = self.states(texts)
        return nn.functional.linear(states.float(), self.reward_model.model.score.weight.float()).squeeze(-1)

    @torch.no_grad()
    def all_rewards(self, progress: Callable[[int], Any] = lambda n: None) -> Tensor:
        """The rewards of all texts, fp32 (n_texts,) on the CPU."""
        found = torch.empty(len(self.lengths))
        for texts in by_length(self.lengths, _TOKENS_PER_BATCH):
            found[texts] = self.rewards(texts).cpu()
            progress(len(texts))
        return found

    def states(self, texts: list[int]) -> Tensor:
        """What the head reads of each text: (n_texts, d_model)."""
        return self.reward_model.states([self.ids[i] for i in texts])

    def _below_head(self) -> dict[str, Tensor]:
        return dict(self.reward_model.model.base_model.named_parameters())


class LastBlocks(TrainedPart):
    """The last blocks, the final norm and the head, on the residual stream before them."""

    def __init__(
        self, reward_model: RewardModel, ids: Sequence[list[int]], precision: torch.dtype, stored: Tensor, n_blocks: int
    ) -> None:
        super().__init__(reward_model, ids, precision)
        self._stored, self._starts = stored, _starts(self.lengths)
        self._rest = _last_blocks(reward_model.model.base_model, n_blocks)

    def states(self, texts: list[int]) -> Tensor:
        rows = [self._stored[self._starts[i] : self._starts[i] + self.lengths[i]] for i in texts]
        inputs = pad_sequence(rows, batch_first=True).to(self.device)
        lengths = torch.tensor([self.lengths[i] for i in texts], device=self.device)
        mask = (torch.arange(inputs.shape[1], device=self.device) < lengths[:, None]).long()
        output = self._rest(inputs_embeds=inputs, attention_mask=mask, use_cache=False).last_hidden_state
        return output[torch.arange(len(texts), device=self.device), lengths - 1]

    def _below_head(self) -> dict[str, Tensor]:
        embeddings = self._rest.get_input_embeddings().weight
        return {name: value for name, value in self._rest.named_parameters() if value is not embeddings}


class HeadAlone(TrainedPart):
    """The head, on what the final norm gives."""

    def __init__(
        self, reward_model: RewardModel, ids: Sequence[list[int]], precision: torch.dtype, stored: Tensor
    ) -> None:
        super().__init__(reward_model, ids, precision)
        self.lengths = [1] * len(ids)
        self._stored = stored.to(self.device)

    def states(self, texts: list[int]) -> Tensor:
        return self._stored[torch.tensor(texts, device=self.device)]

    def _below_head(self) -> dict[str, Tensor]:
        return {}


def trained_part(
    reward_model: RewardModel,
    ids: Sequence[list[int]],
    n_blocks: int | None,
    folder: Path,
    *,
    made_of: str = "",
    precision: torch.dtype = torch.float32,
    ranks: Ranks = ALONE,
    progress: Callable[[int], Any] = lambda n: None,
) -> TrainedPart:
    """The last `n_blocks` blocks with the head as what is trained on these texts; 0: the head alone, None: everything.

    What the frozen part gives is kept in `folder` and read again by a later call for the same texts and model; made_of:
    what tells the model's weights from others'. Every rank computes its share. progress: is told how many tokens have
    been read.
    """
    if n_blocks is None:
        return TrainedPart(reward_model, ids, precision)
    place = _place_of(reward_model.model.base_model, n_blocks)
    width = reward_model.model.score.in_features
    n_rows = sum(map(len, ids)) if n_blocks else len(ids)
    name = f"frozen-{_digest(made_of, n_blocks, str(precision), ids)}.bin"
    if not (folder / name).is_file():
        _compute(reward_model, ids, place, folder / name, (n_rows, width), precision, ranks, progress)
    stored = _mapped(folder / name, n_rows, width)
    if n_blocks == 0:
        return HeadAlone(reward_model, ids, precision, stored)
    part = LastBlocks(reward_model, ids, precision, stored, n_blocks)
    _check_equal(part, ids)
    return part


# --- the frozen part ----------------------------------------------------------------------------------------------


def _place_of(base: Any, n_blocks: int) -> str | None:
    """The hook point whose output the trained part reads; None: the final norm's."""
    if n_blocks == 0:
        return None
    blocks = getattr(base, "layers", None)
    if not isinstance(blocks, nn.ModuleList):
        raise InputError(
            f"{type(base).__name__} does not keep its blocks in `layers`, so its last ones cannot be trained alone; "
            "leave trained_blocks out to train the whole model, or set it to 0 for the head alone."
        )
    if n_blocks > len(blocks):
        raise InputError(
            f"trained_blocks = {n_blocks}, but the model has {len(blocks)} blocks; lower it, or leave it out to train "
            "the whole model."
        )
    if n_blocks < len(blocks):
        return f"layers.{len(blocks) - n_blocks - 1}"
    embeddings = base.get_input_embeddings()
    return next(name for name, module in base.named_modules() if module is embeddings)


@torch.inference_mode()
def _compute(
    reward_model: RewardModel,
    ids: Sequence[list[int]],
    place: str | None,
    path: Path,
    shape: tuple[int, int],
    precision: torch.dtype,
    ranks: Ranks,
    progress: Callable[[int], Any],
) -> None:
    """Fill a new file with what the frozen part gives, each rank its share of the batches."""
    temporary = path.with_name(f".{path.name}.new")
    if ranks.first:
        path.parent.mkdir(parents=True, exist_ok=True)
        _allocate(temporary, shape[0] * shape[1] * 4)
    ranks.wait()
    stored = _mapped(temporary, *shape)
    batches = by_length([len(each) for each in ids], _TOKENS_PER_BATCH)
    starts = _starts([len(each) for each in ids])
    for number in ranks.mine(len(batches)):
        batch = [ids[i] for i in batches[number]]
        with torch.autocast(reward_model.model.device.type, precision, enabled=precision != torch.float32):
            given = _given(reward_model, batch, place)
        for i, rows in zip(batches[number], given, strict=True):
            start = i if place is None else starts[i]
            stored[start : start + len(rows)] = rows
        progress(sum(map(len, batch)))
    ranks.wait()
    if ranks.first:
        temporary.rename(path)
    ranks.wait()


def _given(reward_model: RewardModel, batch: list[list[int]], place: str | None) -> list[Tensor]:
    """Per text what the frozen part gives, fp32 on the CPU: (1, d_model), or (length, d_model) at a hook point."""
    if place is None:
        return list(reward_model.states(batch).float().cpu().split(1))
    tokens, mask = padded(batch, reward_model.model.device)
    output = run_to_depth(reward_model.model, (place,), input_ids=tokens, attention_mask=mask)[place].float().cpu()
    return [rows[: len(each)] for rows, each in zip(output, batch, strict=True)]


def _allocate(path: Path, n_bytes: int) -> None:
    """Make a file of zeros and take its room on the disk at once: what is written through memory cannot ask for it."""
    with replacing(path, n_bytes) as temporary, open(temporary, "wb") as handle:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(handle.fileno(), 0, n_bytes)
        else:  # macOS
            handle.truncate(n_bytes)


def _mapped(path: Path, n_rows: int, width: int) -> Tensor:
    """The file as a tensor, fp32 (n_rows, width): read as it is needed, and kept by the system as memory allows."""
    return torch.from_file(str(path), shared=True, size=n_rows * width, dtype=torch.float32).view(n_rows, width)


def _starts(lengths: Sequence[int]) -> list[int]:
    """The first row of each text."""
    return [0, *torch.tensor(lengths).cumsum(0).tolist()[:-1]]


def _digest(made_of: str, n_blocks: int, precision: str, ids: Sequence[list[int]]) -> str:
    digest = hashlib.sha256(f"{made_of}|{n_blocks}|{precision}|".encode())
    for each in ids:
        digest.update(f"{len(each)}:{','.join(map(str, each))};".encode())
    return digest.hexdigest()[:16]


# --- the rest of the model ----------------------------------------------------------------------------------------


def _last_blocks(base: Any, n: int) -> Any:
    """The same model with its last n blocks alone, given `inputs_embeds` where they begin; weights are shared."""
    rest = copy.copy(base)
    rest._modules = dict(base._modules)
    rest.layers = nn.ModuleList(list(base.layers)[-n:])
    rest.config = cut_config(base.config, slice(base.config.num_hidden_layers - n, None))
    return rest


@torch.no_grad()
def _check_equal(part: LastBlocks, ids: Sequence[list[int]]) -> None:
    """Raise InputError where the model does more with its input than to pass it to its blocks."""
    order = sorted(range(len(ids)), key=lambda i: (len(ids[i]), i))
    texts = sorted({order[0], order[len(order) // 2], order[len(order) * 3 // 4]})  # padded, and not the longest
    with torch.autocast(part.device.type, part.precision, enabled=part.precision != torch.float32):
        whole = part.reward_model.states([ids[i] for i in texts]).float()
        through = part.states(texts).float()
    error = float(((through - whole).norm(dim=-1) / whole.norm(dim=-1)).max())
    if not error <= _TOLERANCE[part.precision]:
        raise InputError(
            f"{type(part.reward_model.model).__name__} gives other states when its last blocks are run alone (off by "
            f"{error:.2g} of their norm); leave trained_blocks out to train the whole model."
        )
