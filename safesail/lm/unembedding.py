"""What a direction of the residual stream does to the logits on the direct path."""

from typing import Any

import torch
from torch import Tensor

from safesail.errors import InputError

__all__ = ["direct_effects"]


def direct_effects(model: Any, direction: Tensor) -> Tensor:
    """(norm(direction) - norm(0)) W_U: which logits a direction raises on the way that passes no further layer.

    direction: (d_model,) → (vocabulary,), in units that compare within one direction: the final norm sees the direction
    alone, whose length it takes away. A norm of any kind is applied as the model does, with its weight and centring.
    """
    unembedding, norm = model.get_output_embeddings().weight, _final_norm(model)
    direction = direction.to(unembedding)
    if direction.shape[-1] != unembedding.shape[1]:
        raise InputError(
            f"the direction has {direction.shape[-1]} numbers and the model's residual stream {unembedding.shape[1]}; "
            "only hook points that write into the residual stream promote tokens."
        )
    if norm is not None:
        direction = norm(direction) - norm(torch.zeros_like(direction))
    return direction @ unembedding.T


def _final_norm(model: Any) -> Any:
    """The norm before the unembedding: `norm` of Llama and its kin, `ln_f` of GPT-2, `final_layer_norm` of NeoX."""
    names = ("norm", "ln_f", "final_layer_norm", "final_layernorm")
    return next((getattr(model.base_model, name) for name in names if hasattr(model.base_model, name)), None)
