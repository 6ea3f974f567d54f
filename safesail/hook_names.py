"""What other tools call a hook point.

Ours is the module path below the base model whose output is read (`layers.9.mlp`; `layers.9` is the residual stream
after block 9, which transformers counts as `hidden_states[10]`).
"""

import re

__all__ = ["from_module_path", "from_transformer_lens", "transformer_lens_name"]

_KINDS = {"": "hook_resid_post", ".mlp": "hook_mlp_out", ".self_attn": "hook_attn_out"}
_ROOTS = ("model.language_model.", "language_model.", "model.", "transformer.", "gpt_neox.")
"""What stands above the base model's own modules in a causal LM's module paths."""


def transformer_lens_name(hook_point: str) -> str:
    """`blocks.9.hook_mlp_out` for `layers.9.mlp`; the module path itself where TransformerLens has no name for it."""
    found = re.fullmatch(r"(?:layers|h)\.(\d+)(|\.mlp|\.self_attn)", hook_point)
    return f"blocks.{found[1]}.{_KINDS[found[2]]}" if found else hook_point


def from_transformer_lens(name: str) -> str | None:
    """`layers.9.mlp` for `blocks.9.hook_mlp_out`; None where no module's output is what the name stands for.

    `hook_resid_pre` of block n is the residual stream after block n - 1. Blocks are called `layers`, as in most models.
    """
    before = re.fullmatch(r"blocks\.(\d+)\.hook_resid_pre", name)
    if before and int(before[1]) > 0:
        return f"layers.{int(before[1]) - 1}"
    found = re.fullmatch(r"blocks\.(\d+)\.(hook_\w+)", name)
    kinds = {theirs: ours for ours, theirs in _KINDS.items()}
    return f"layers.{found[1]}{kinds[found[2]]}" if found and found[2] in kinds else None


def from_module_path(path: str) -> str | None:
    """`layers.9.mlp` for `model.layers.9.mlp` or `model.layers.9.mlp.output`; None for the input of a module."""
    if path.endswith(".input"):
        return None
    path = path.removesuffix(".output")
    root = next((root for root in _ROOTS if path.startswith(root)), "")
    return path.removeprefix(root) or None
