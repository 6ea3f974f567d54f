"""What other tools call a hook point.

Ours is the module path below the base model whose output is read (`layers.9.mlp`; `layers.9` is the residual stream
after block 9, which transformers counts as `hidden_states[10]`).
"""

import re

__all__ = ["from_module_path", "from_transformer_lens", "in_id", "transformer_lens_name"]

_KINDS = {"": "hook_resid_post", ".mlp": "hook_mlp_out", ".self_attn": "hook_attn_out"}
_ATTENTION = {"self_attn": "self_attn", "attn": "self_attn", "attention": "self_attn"}
"""What the attention of a block is called in Llama-, GPT-2- and GPT-NeoX-like models."""
_BLOCKS = {
    "gpt2": ("h", "attn"),
    "distilgpt2": ("h", "attn"),
    "gpt-j": ("h", "attn"),
    "pythia": ("layers", "attention"),
}
"""Families of models whose blocks or attention are not `layers` and `self_attn`."""
_ROOTS = ("model.language_model.", "language_model.", "model.", "transformer.", "gpt_neox.")
"""What stands above the base model's own modules in a causal LM's module paths."""


def transformer_lens_name(hook_point: str) -> str:
    """`blocks.9.hook_mlp_out` for `layers.9.mlp`; the module path itself where TransformerLens has no name for it."""
    found = re.fullmatch(r"(?:layers|h)\.(\d+)(?:\.(mlp|self_attn|attn|attention))?", hook_point)
    if not found:
        return hook_point
    kind = f".{_ATTENTION.get(found[2], found[2])}" if found[2] else ""
    return f"blocks.{found[1]}.{_KINDS[kind]}"


def from_transformer_lens(name: str, model_name: str = "") -> str | None:
    """`layers.9.mlp` for `blocks.9.hook_mlp_out`; None where no module's output is what the name stands for.

    `hook_resid_pre` of block n is the residual stream after block n - 1. Blocks are called `layers`, as in most models,
    unless `model_name` is of a family that calls them otherwise (`h.9.mlp` in GPT-2).
    """
    family = next((family for family in _BLOCKS if model_name.split("/")[-1].lower().startswith(family)), "")
    blocks, attention = _BLOCKS.get(family, ("layers", "self_attn"))
    before = re.fullmatch(r"blocks\.(\d+)\.hook_resid_pre", name)
    if before and int(before[1]) > 0:
        return f"{blocks}.{int(before[1]) - 1}"
    found = re.fullmatch(r"blocks\.(\d+)\.(hook_\w+)", name)
    kinds = {theirs: ours.replace("self_attn", attention) for ours, theirs in _KINDS.items()}
    return f"{blocks}.{found[1]}{kinds[found[2]]}" if found and found[2] in kinds else None


def from_module_path(path: str) -> str | None:
    """`layers.9.mlp` for `model.layers.9.mlp` or `model.layers.9.mlp.output`; None for the input of a module."""
    if path.endswith(".input"):
        return None
    path = path.removesuffix(".output")
    root = next((root for root in _ROOTS if path.startswith(root)), "")
    return path.removeprefix(root) or None


def in_id(sae_id: str) -> str | None:
    """The hook point that the words of another tool's id name, as `layers.9` in `resid_post_layer_9/trainer_0`."""
    kinds = {"resid_post": "", "mlp": ".mlp", "mlp_out": ".mlp", "attn_out": ".self_attn"}
    for word in sae_id.split("/"):
        if re.fullmatch(r"(layers|h)\.\d+(\.\w+)*|embed_tokens", word):
            return word
        if found := from_transformer_lens(word):
            return found
        if (numbered := re.fullmatch(r"(\w+?)_layer_(\d+)", word)) and numbered[1] in kinds:
            return f"layers.{numbered[2]}{kinds[numbered[1]]}"
    return None
