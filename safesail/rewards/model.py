"""A reward model: a language model's blocks with a head of one output, read at a text's last token.

The only module of this room that imports transformers. What is loaded and saved is an ordinary
`AutoModelForSequenceClassification` of one label, so a model trained elsewhere (by trl, say) is read unchanged, and one
saved here is read there.
"""

import copy
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor

from safesail.errors import InputError
from safesail.lm.load import check_complete, check_weights, first_line, load_tokenizer, loading
from safesail.training.step import generator

__all__ = ["RewardModel", "by_length", "cut_config", "padded"]

_PAD = "[PAD]"


class RewardModel:
    """r(text) = w · h, where h is what the final norm gives at the text's last token. h, w: (d_model,).

    Texts of a batch are padded on the right and masked; neither a text's batch nor its padding touches its reward.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model: Any = model.eval().requires_grad_(False)
        self.tokenizer: Any = tokenizer

    @classmethod
    def load(
        cls,
        path: str | Path,
        *,
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        **hub: Any,
    ) -> Self:
        """The reward model at `path`, a transformers folder or a Hub id. hub: as for `lm.load.causal_lm`.

        InputError for a model with another head than a reward model's.
        """
        path = str(path)
        check_weights(path)
        config = _config(path, revision, hub)
        _check_is_reward_model(path, config)
        model, report = _loaded(path, config, revision, dtype, hub)
        _check_head(path, model)
        check_complete(path, report)
        return cls(model.to(device), load_tokenizer(path, revision=revision, **hub))

    @classmethod
    def fresh(
        cls,
        path: str | Path,
        *,
        n_blocks: int | None = None,
        seed: int,
        revision: str | None = None,
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
        **hub: Any,
    ) -> Self:
        """The first `n_blocks` blocks (None: all) of the language model at `path` under a new head.

        The head is drawn from the seed, normal with standard deviation 1/√d_model. A tokenizer whose padding token
        stands in texts, or that has none, gets one of its own.
        """
        path = str(path)
        check_weights(path)
        config = _config(path, revision, hub)
        config.num_labels = 1
        model, report = _loaded(path, _shortened(path, config, n_blocks), revision, dtype, hub)
        _check_head(path, model)
        check_complete(path, {"missing_keys": [key for key in report["missing_keys"] if key != "score.weight"]})
        made = cls(model, load_tokenizer(path, revision=revision, **hub))
        made.draw_head(seed)
        _give_own_padding(made.model, made.tokenizer)
        made.model.to(device)
        return made

    @torch.no_grad()
    def draw_head(self, seed: int) -> None:
        """Replace the head by the one that the seed gives."""
        weight = self.model.score.weight
        drawn = torch.randn(weight.shape, generator=generator(seed, "head")) / math.sqrt(weight.shape[1])
        weight.copy_(drawn)

    @torch.inference_mode()
    def rewards(
        self,
        ids: Sequence[list[int]],
        *,
        tokens_per_batch: int = 8192,
        progress: Callable[[int], Any] = lambda n: None,
    ) -> Tensor:
        """The reward of each text, fp32 (n_texts,) on the CPU. progress: is told how many texts have been read."""
        found = torch.empty(len(ids))
        for texts in by_length([len(each) for each in ids], tokens_per_batch):
            states = self.states([ids[i] for i in texts])
            found[texts] = self.model.score(states).float().squeeze(-1).cpu()
            progress(len(texts))
        return found

    def states(self, ids: list[list[int]]) -> Tensor:
        """What the head reads of each text: (n_texts, d_model)."""
        tokens, mask = padded(ids, self.model.device)
        output = self.model.base_model(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
        return output[torch.arange(len(ids), device=output.device), mask.sum(1) - 1]

    @torch.inference_mode()
    def token_rewards(self, ids: list[int]) -> Tensor:
        """What the head gives at every token, fp32 (length,) on the CPU; the last one is the text's reward."""
        tokens, mask = padded([ids], self.model.device)
        output = self.model.base_model(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
        return self.model.score(output[0]).float().squeeze(-1).cpu()

    def save(self, folder: str | Path) -> None:
        """Write a transformers folder that gives the same rewards there, in padded batches too.

        transformers reads a batch's texts at their last token that is not the padding token, so that token must be one
        that no text ends with.
        """
        _give_own_padding(self.model, self.tokenizer)
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def by_length(lengths: Sequence[int], tokens_per_batch: int) -> list[list[int]]:
    """The numbers of all texts in batches of similar length, longest first; a batch holds its padding too.

    A text longer than a batch is a batch of its own.
    """
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= tokens_per_batch:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def padded(ids: list[list[int]], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """Token ids padded on the right and the mask that leaves the padding out; both (n_texts, longest)."""
    assert all(ids), "a text without tokens has no last token"
    longest = max(len(each) for each in ids)
    tokens = torch.tensor([each + [0] * (longest - len(each)) for each in ids], device=device)
    mask = torch.tensor([[1] * len(each) + [0] * (longest - len(each)) for each in ids], device=device)
    return tokens, mask


def cut_config(config: Any, blocks: slice) -> Any:
    """The config of a model that has only these blocks: their number, and every list with one entry a block."""
    cut, n = copy.deepcopy(config), config.num_hidden_layers
    for name, value in vars(config).items():
        if "layer" in name and isinstance(value, list | tuple) and len(value) == n:
            setattr(cut, name, value[blocks])
    cut.num_hidden_layers = len(range(n)[blocks])
    return cut


def _config(path: str, revision: str | None, hub: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, revision=revision, **hub)
    except (OSError, ValueError) as error:
        raise InputError(f"the config of the model {path} cannot be read: {first_line(error)}") from error


def _loaded(path: str, config: Any, revision: str | None, dtype: torch.dtype, hub: dict[str, Any]) -> tuple[Any, Any]:
    """The model and transformers' report of what was missing."""
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    with loading(f"the model {path} cannot be loaded as a reward model"):
        before = logging.get_verbosity()
        logging.set_verbosity_error()  # it would tell at length which weights it drew and left; that is checked here
        try:
            with torch.random.fork_rng(devices=[]):  # what it draws is replaced, or refused
                return AutoModelForSequenceClassification.from_pretrained(
                    path, config=config, revision=revision, dtype=dtype, output_loading_info=True, **hub
                )
        finally:
            logging.set_verbosity(before)


def _check_is_reward_model(path: str, config: Any) -> None:
    kind = ", ".join(config.architectures or ["nothing known"])
    if "ForSequenceClassification" not in kind:
        raise InputError(
            f"{path} is {kind}, which has no reward head; give a model saved as "
            "AutoModelForSequenceClassification with num_labels=1, or train one by a recipe's [reward]."
        )
    if config.num_labels != 1:
        raise InputError(
            f"the head of {path} has {config.num_labels} outputs, and a reward model's has 1; "
            "give a model saved with num_labels=1."
        )


def _check_head(path: str, model: Any) -> None:
    head = getattr(model, "score", None)
    if not isinstance(head, torch.nn.Linear):
        raise InputError(
            f"{path} is a {type(model).__name__}, whose head is not a linear layer called `score`; "
            "give a decoder such as Llama, Qwen, Mistral or Gemma."
        )


def _shortened(path: str, config: Any, n_blocks: int | None) -> Any:
    if n_blocks is None:
        return config
    n = getattr(config, "num_hidden_layers", None)
    if n is None or n_blocks > n:
        has = "a config that does not tell its blocks" if n is None else f"{n} blocks"
        raise InputError(f"reward.n_blocks = {n_blocks}, but {path} has {has}; lower it, or leave it out to keep all.")
    return cut_config(config, slice(n_blocks))


def _give_own_padding(model: Any, tokenizer: Any) -> None:
    """Make sure that the padding token is one that no text holds; its embedding is zero and never read."""
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in _said(tokenizer):
        tokenizer.add_special_tokens({"pad_token": _PAD})
        table = model.get_input_embeddings()
        if len(tokenizer) > table.num_embeddings:
            n_before = table.num_embeddings
            with torch.no_grad(), torch.random.fork_rng(devices=[]):  # the new rows are drawn before they are zero
                model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
                model.get_input_embeddings().weight[n_before:] = 0
    tokenizer.padding_side, tokenizer.truncation_side = "right", "left"
    model.config.get_text_config().pad_token_id = tokenizer.pad_token_id


def _said(tokenizer: Any) -> set[int | None]:
    """The special tokens that have another meaning, and those that the chat template writes."""
    named = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id}
    template = tokenizer.chat_template if isinstance(getattr(tokenizer, "chat_template", None), str) else ""
    return named | {id for id, token in tokenizer.added_tokens_decoder.items() if token.content in template}
