"""How large a language model is, from its config alone: no weight is read, no memory taken.

The model is built on torch's meta device, where tensors have shapes and no content, and run there up to a hook point:
torch's FLOP counter sees every matrix product, and the output's shape is what an SAE would read.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from safesail.errors import InputError
from safesail.lm.hooks import check_hook_points, module_at, run_to_depth
from safesail.lm.load import check_folder, first_line, loading

__all__ = ["LmSize", "config_of", "lm_size"]


class LmSize(NamedTuple):
    """What loading and running a language model takes."""

    n_parameters: int
    """All that is loaded, the LM head included; tied weights count once."""
    d_model: int
    widest: int
    """The width of the widest activation within a block."""
    flops_per_token: dict[str, float]
    """Per hook point, of the forward pass that stops there: 2 per multiply-add of the weights, and the attention of
    windows filled to the end (scores and sums over all of the window, as the attention mask of packed windows asks)."""
    d_in: dict[str, int]
    """Per hook point, the width of its output."""


def lm_size(path: str, hook_points: tuple[str, ...], window: int, *, revision: str | None = None) -> LmSize:
    """The size of the model at `path`, a folder with a config.json or a Hub id. window: tokens.

    InputError if there is no config, or if the model lacks a hook point.
    """
    model = _on_meta(path, revision)
    check_hook_points(model, hook_points)
    counted = {name: _count(model, name, window) for name in hook_points}
    linear = [module.weight.shape for module in model.base_model.modules() if isinstance(module, torch.nn.Linear)]
    d_model = model.config.get_text_config().hidden_size
    return LmSize(
        n_parameters=sum(parameter.numel() for parameter in model.parameters()),
        d_model=d_model,
        widest=max((max(shape) for shape in linear), default=4 * d_model),
        flops_per_token={name: flops for name, (flops, _) in counted.items()},
        d_in={name: width for name, (_, width) in counted.items()},
    )


def config_of(path: str, revision: str | None = None) -> Any:
    """The transformers config of the model at `path`, a folder or a Hub id."""
    from transformers import AutoConfig

    check_folder(path)
    if path.startswith((".", "/", "~")) and not (Path(path) / "config.json").is_file():
        raise InputError(f"the model folder {path} has no config.json; give a transformers folder or a Hub id.")
    try:
        return AutoConfig.from_pretrained(path, revision=revision)
    except (OSError, ValueError) as error:
        raise InputError(f"the config of the model {path} cannot be read: {first_line(error)}") from error


def _on_meta(path: str, revision: str | None) -> Any:
    from transformers import AutoModelForCausalLM

    config = config_of(path, revision)
    with loading(f"the config of the model {path} cannot be read"), torch.device("meta"):
        # experts as one batched product over those that a token is sent to: the other ways look at the data
        return AutoModelForCausalLM.from_config(config, experts_implementation="batched_mm").eval()


def _count(model: Any, hook_point: str, window: int) -> tuple[float, int]:
    """FLOPs per token up to a hook point, and the width of its output."""
    ids = torch.zeros(1, window, dtype=torch.long, device="meta")
    mask = torch.ones(1, 1, window, window, dtype=torch.bool, device="meta")
    counter = FlopCounterMode(display=False)
    try:
        with torch.inference_mode(), counter:
            output = run_to_depth(model, (hook_point,), input_ids=ids, position_ids=ids, attention_mask=mask)
    except (NotImplementedError, RuntimeError):  # a model that looks at its data cannot run without any
        return _upper_bound(model, hook_point)
    if hook_point not in output:
        raise InputError(f"{hook_point} is never called in a forward pass; give one of its parts, as {hook_point}.0.")
    return counter.get_total_flops() / window, output[hook_point].shape[-1]


def _upper_bound(model: Any, hook_point: str) -> tuple[float, int]:
    """2 FLOPs for every weight of the blocks, whether a token meets it or not, and the residual stream's width."""
    base, embeddings = model.base_model, model.get_input_embeddings()
    n_weights = sum(parameter.numel() for parameter in base.parameters()) - embeddings.weight.numel()
    width = getattr(module_at(model, hook_point), "out_features", model.config.get_text_config().hidden_size)
    return 2.0 * n_weights, width
