"""Reading and replacing a module's output: the only place that registers hooks.

A *hook point* is the module path below the base model whose output is read: `layers.9.mlp` is the MLP output of block
9 before the residual addition, `layers.9` the residual stream after it.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from safesail.errors import InputError

__all__ = ["Depth", "Step", "capture", "check_hook_points", "module_at", "replace", "run_to_depth", "steps"]


class Depth(Exception):
    """Raised inside a forward pass when the deepest hook point has been read."""


class Step(NamedTuple):
    """What one forward pass reads; the tokens before it may be in the cache."""

    ids: Tensor
    """(batch, length)."""
    positions: Tensor
    """Each token's place in its sequence: (batch or 1, length)."""


def module_at(model: Any, hook_point: str) -> nn.Module:
    """The module of a hook point; InputError lists those that the model has."""
    base = model.base_model
    try:
        return base.get_submodule(hook_point)
    except AttributeError:
        raise InputError(f"{type(base).__name__} has no hook point {hook_point!r}; it has {_patterns(base)}.") from None


def check_hook_points(model: Any, hook_points: tuple[str, ...]) -> None:
    """Raise InputError for the first hook point that the model lacks."""
    for hook_point in hook_points:
        module_at(model, hook_point)


@contextlib.contextmanager
def capture(model: Any, hook_points: tuple[str, ...], *, stop: bool = False) -> Iterator[dict[str, Tensor]]:
    """A dictionary that each forward pass fills with {hook point: output}; outputs: (batch, length, d_in).

    With `stop`, the pass ends by raising `Depth` as soon as all are read (use `run_to_depth`).
    """
    outputs: dict[str, Tensor] = {}

    def reader(name: str) -> Callable[..., None]:
        def read(_module: nn.Module, _inputs: Any, output: Any) -> None:
            outputs[name] = output[0] if isinstance(output, tuple) else output
            if stop and len(outputs) == len(hook_points):
                raise Depth

        return read

    handles = [module_at(model, name).register_forward_hook(reader(name)) for name in hook_points]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def run_to_depth(model: Any, hook_points: tuple[str, ...], **inputs: Any) -> dict[str, Tensor]:
    """The outputs at the hook points; the model stops after the deepest and never runs its LM head."""
    with capture(model, hook_points, stop=True) as outputs, contextlib.suppress(Depth):
        model.base_model(**inputs, use_cache=False)
    return dict(outputs)


@contextlib.contextmanager
def replace(model: Any, hook_point: str, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace the output at a hook point by function(output) in every forward pass inside the context."""

    def intervene(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (function(output[0]), *output[1:])
        return function(output)

    handle = module_at(model, hook_point).register_forward_hook(intervene)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def steps(model: Any) -> Iterator[Callable[[], Step]]:
    """A function that gives, inside a forward pass, the ids and places which that pass reads."""
    current: list[Step] = []

    def read(_module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any]) -> None:
        ids = named.get("input_ids", inputs[0] if inputs else None)
        if ids is None:
            raise InputError("the model was given embeddings; give input_ids, which say what tokens are read.")
        current[:] = [Step(ids, _positions(ids, named))]

    handle = model.base_model.register_forward_pre_hook(read, with_kwargs=True)
    try:
        yield lambda: current[0]
    finally:
        handle.remove()


def _positions(ids: Tensor, named: dict[str, Any]) -> Tensor:
    if named.get("position_ids") is not None:
        return named["position_ids"]
    cache = named.get("past_key_values")
    start = 0 if cache is None else cache.get_seq_length()
    return torch.arange(start, start + ids.shape[1], device=ids.device)[None]


def _patterns(base: nn.Module) -> str:
    """The module paths down to three parts, with runs of layer numbers folded: `layers.0-29.mlp`."""
    numbers: dict[str, list[int]] = {}
    for name, _ in base.named_modules():
        parts = name.split(".")
        if not name or len(parts) > 3:
            continue
        index = next((part for part in parts if part.isdigit()), None)
        pattern = name.replace(f".{index}", ".#", 1) if index else name
        numbers.setdefault(pattern, []).append(int(index or 0))
    folded = [
        pattern.replace("#", f"{min(found)}-{max(found)}" if len(found) > 1 else str(found[0]))
        for pattern, found in numbers.items()
    ]
    return ", ".join(folded)
