"""Changing a model's activations along the decoder directions of its neurons.

    steer    x + α · s_j · W_dec[j]
    clamp    x + (α · s_j − a_j(x)) · W_dec[j]
    ablate   x + (0 − a_j(x)) · W_dec[j]

x: the output at the neuron's hook point, a_j: its activation there, s_j: its normaliser, α: the amount. Only the
neuron's own direction is added: everything else in x, what the SAE does not reconstruct included, stays as it is. Of an
SAE that normalises its input, the direction is brought back to the token's scale.

Several neurons of one hook point are read from the unchanged x. A deeper hook point sees the changed stream. What this
does not do: hold the neuron at the value against its SAE's own competition. Encoded again, x may show another a_j.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from safesail.diagnosis.inspector import Inspector
from safesail.errors import InputError
from safesail.lm.hooks import Step, check_hook_points, replace, steps
from safesail.lm.tokens import ROLES, counted, special_ids
from safesail.neurons import neuron_id
from safesail.sae.model import Sae
from safesail.sae.norm import norm_of

__all__ = ["Intervention", "Kind", "checked", "intervened"]

Kind = Literal["steer", "clamp", "ablate"]


class Intervention(NamedTuple):
    """A change of one neuron's activation."""

    neuron_id: str
    kind: Kind
    amount: float = 0.0
    """In multiples of the neuron's normaliser; an ablation has none."""


@contextlib.contextmanager
def intervened(
    inspector: Inspector,
    interventions: Sequence[Intervention],
    *,
    from_token: int = 0,
    roles: Sequence[int] | None = None,
) -> Iterator[None]:
    """Every forward pass of the inspector's model inside the context is changed.

    Tokens before `from_token` and those that the token policy leaves out are left alone. roles: the role codes of a
    conversation's first tokens, which only policies with roles need; all further tokens are the assistant's. Where
    nothing is to be changed (amount 0, a silent neuron ablated) the activations' own tensor goes on.
    """
    sites = _sites(inspector, interventions)
    specials = special_ids(inspector.tokenizer)
    check_hook_points(inspector.model, tuple(sites))
    with contextlib.ExitStack() as stack:
        step = stack.enter_context(steps(inspector.model))

        def change(site: _Site, x: Tensor) -> Tensor:
            late = (step().positions >= from_token).expand_as(step().ids).flatten()
            return site.changed(x, late & _changeable(site.sae, x, step(), specials, roles))

        for hook_point, site in sites.items():
            stack.enter_context(replace(inspector.model, hook_point, partial(change, site)))
        yield


def checked(inspector: Inspector, interventions: Sequence[Intervention]) -> list[Intervention]:
    """The interventions with ids in full and no amount where there is none to give; InputError for what cannot be."""
    _sites(inspector, interventions)
    return [
        Intervention(neuron_id(*inspector.place_of(id)), kind, 0.0 if kind == "ablate" else float(amount))
        for id, kind, amount in interventions
    ]


@dataclass(frozen=True)
class _Site:
    """The interventions at one hook point. latents, targets, holds: (n,)."""

    sae: Sae
    latents: Tensor
    targets: Tensor
    """α · s_j."""
    holds: Tensor
    """1 where the neuron's own activation is taken away (clamp, ablate), else 0."""

    def changed(self, x: Tensor, keep: Tensor) -> Tensor:
        """x with the directions added, or x itself. x: (batch, length, d_in); keep: bool (batch · length,)."""
        flat = x.reshape(-1, x.shape[-1]).to(self.sae.W_dec)  # for reading only: x keeps its own precision
        moves = self.targets - self.holds * self._activations(flat) if self.holds.any() else self.targets
        moves = torch.where(keep.to(flat.device)[:, None], moves, 0.0)
        touched = (moves != 0).any(1, keepdim=True)
        if not touched.any():
            return x
        scale = norm_of(flat, self.sae.config.normalize_activations).scale
        added = (moves @ self.sae.W_dec[self.latents] * scale).to(x).reshape(x.shape)
        return torch.where(touched.to(x.device).reshape(*x.shape[:-1], 1), x + added, x)

    def _activations(self, flat: Tensor) -> Tensor:
        """a_j, differentiable in the input. flat: (n_tokens, d_in) → (n_tokens, n)."""
        sae = self.sae
        with torch.no_grad():
            codes = sae.encode_sparse(flat).active()
            fires = [_fires(codes.tokens()[codes.indices == j], len(flat)) for j in self.latents]
        centred = norm_of(flat, sae.config.normalize_activations).apply(flat) - sae.b_dec
        pre = centred @ sae.W_enc[:, self.latents] + sae.b_enc[self.latents]
        return torch.where(torch.stack(fires, dim=1), pre, 0.0)


def _fires(tokens: Tensor, n_tokens: int) -> Tensor:
    """Which of the tokens are named: bool (n_tokens,)."""
    mask = torch.zeros(n_tokens, dtype=torch.bool, device=tokens.device)
    mask[tokens.long()] = True
    return mask


def _changeable(sae: Sae, x: Tensor, step: Step, specials: list[int], roles: Sequence[int] | None) -> Tensor:
    """Which tokens the SAE's token policy counts: bool (batch · length,)."""
    config, ids = sae.config, step.ids.flatten()
    norms = x.detach().float().norm(dim=-1).flatten()
    whose = None if roles is None else _whose(step, roles)
    return counted(config.token_policy, ids, norms, specials, config.median_norm, whose)


def _whose(step: Step, roles: Sequence[int]) -> Tensor:
    """The role code of each token: (batch · length,)."""
    codes = torch.tensor([*roles, ROLES.index("assistant")], device=step.ids.device)
    return codes[step.positions.clamp(max=len(roles))].expand_as(step.ids).flatten()


def _sites(inspector: Inspector, interventions: Sequence[Intervention]) -> dict[str, _Site]:
    """The interventions by hook point, checked."""
    wanted: dict[str, list[tuple[int, float, bool]]] = {}
    for intervention in interventions:
        hook_point, latent = inspector.place_of(intervention.neuron_id)
        if latent in [seen for seen, *_ in wanted.get(hook_point, [])]:
            raise InputError(f"{neuron_id(hook_point, latent)} is named twice; give one intervention a neuron.")
        target = _target(inspector, intervention, hook_point, latent)
        wanted.setdefault(hook_point, []).append((latent, target, intervention.kind != "steer"))
    return {name: _site(inspector.saes[name], rows) for name, rows in wanted.items()}


def _site(sae: Sae, rows: list[tuple[int, float, bool]]) -> _Site:
    latents, targets, holds = zip(*rows, strict=True)
    device, dtype = sae.W_dec.device, sae.W_dec.dtype
    return _Site(
        sae,
        torch.tensor(latents, device=device),
        torch.tensor(targets, device=device, dtype=torch.float64).to(dtype),
        torch.tensor(holds, device=device).to(dtype),
    )


def _target(inspector: Inspector, intervention: Intervention, hook_point: str, latent: int) -> float:
    """α · s_j; 0 for an ablation."""
    if intervention.kind not in get_args(Kind):
        raise InputError(f"{intervention.kind!r} is no kind of intervention; kinds are {', '.join(get_args(Kind))}.")
    if intervention.kind == "ablate":
        return 0.0
    if not math.isfinite(intervention.amount):
        raise InputError(f"the amount {intervention.amount} is not finite; give a multiple of the normaliser, as 4.")
    normaliser = inspector.database.normaliser(hook_point, latent)
    if normaliser is None:
        raise InputError(
            f"{neuron_id(hook_point, latent)} never fired in the corpus, so there is no normaliser to "
            f"{intervention.kind} it by; choose a neuron that fires, as those that `safesail inspect` prints."
        )
    return intervention.amount * normaliser
