"""Which earlier neurons a neuron's activation is owed to: gradient × activation through the model.

The child is a neuron j of a later hook point at one token t, a_j(t) = (x(t) - b_dec) W_enc[:, j] + b_enc[j] there.
For an earlier hook point with output x(s) at the tokens s ≤ t, and g(s) = ∂a_j(t) / ∂x(s) through the model,

    attribution(i, s) = a_i(s) W_dec[i] · g(s)          a parent: latent i at token s
    error             = Σ_s (x(s) - x_hat(s)) · g(s)    what the SAE there does not reconstruct
    bias              = Σ_s b_dec · g(s)                its decoder's bias
    left out          = Σ_s x(s) · g(s)                 at tokens that the token policy leaves out

and the four sum to Σ_s x(s) · g(s). What that sum lacks of a_j(t) comes along other paths (the embeddings and blocks
whose output the hook point is not, biases), or by the model's curvature: gradients see straight lines only. Where the
model between the two is linear, an attribution is exactly what ablating the parent takes away.

What this does not do: attributions of two hook points do not add up, as the earlier one also acts through the later
one; the choice of the k largest latents, or a threshold, is held fixed.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from safesail.diagnosis.attribution_graph import Edge, Graph, Node, Share
from safesail.diagnosis.attribution_svg import svg
from safesail.diagnosis.inspection import Inspection
from safesail.diagnosis.inspector import Inspector
from safesail.errors import InputError
from safesail.lm.hooks import run_to_depth
from safesail.neurons import neuron_id
from safesail.sae.norm import norm_of

__all__ = ["Edge", "Graph", "Node", "Parent", "Share", "graph", "parents", "svg"]

Prompt = str | list[dict[str, str]]


class Parent(NamedTuple):
    """An earlier neuron over all tokens up to the child's."""

    neuron_id: str
    attribution: float
    """Summed over the tokens."""
    activation: float
    """The largest."""
    n_tokens: int


def graph(inspector: Inspector, prompt: Prompt, neuron_id: str, *, index: int | None = None, top: int = 10) -> Graph:
    """The attribution graph of a neuron on a prompt: its strongest parents, and how these act on each other.

    index: the unit where the neuron is asked about (`Inspection.units`), by default where it fires most. InputError
    where the neuron does not fire, or when the release has no hook point before it.
    """
    if top < 1:
        raise InputError(f"top={top} parents were asked for; it takes a number of at least 1.")
    trace = _Trace.of(inspector, prompt)
    child = trace.unit_of(neuron_id, index)
    effects = trace.effects(child)
    summed = trace.by_unit(effects)
    chosen = sorted(summed, key=lambda unit: (-abs(summed[unit]), unit))[:top]
    places = {unit: place for place, unit in enumerate([child, *chosen])}
    edges = [Edge(places[unit], 0, summed[unit]) for unit in chosen]
    for unit in chosen:
        between = trace.by_unit(trace.effects(unit, required=False))
        edges += [Edge(places[other], places[unit], between[other]) for other in chosen if between.get(other)]
    shares = [effect.share for effect in effects]
    return Graph([trace.node(unit) for unit in places], edges, shares, len(summed))


def parents(inspector: Inspector, prompt: Prompt, neuron_id: str, *, index: int | None = None) -> list[Parent]:
    """Every earlier neuron that fires up to the child's token, over all tokens, the largest attribution first."""
    trace = _Trace.of(inspector, prompt)
    effects = trace.effects(trace.unit_of(neuron_id, index))
    found = [parent for effect in effects for parent in _by_neuron(effect)]
    return sorted(found, key=lambda parent: (-parent.attribution, parent.neuron_id))


# --- arithmetic ---------------------------------------------------------------------------------------------------


class _Unit(NamedTuple):
    """A neuron on a unit."""

    hook_point: str
    latent: int
    index: int


class _Effects(NamedTuple):
    """The attributions of one hook point's active latents; all (n_entries,)."""

    hook_point: str
    latents: Tensor
    tokens: Tensor
    activations: Tensor
    attributions: Tensor
    share: Share


class _Trace:
    """A prompt's forward pass with its autograd graph, and what fires in it."""

    def __init__(self, inspector: Inspector, inspection: Inspection, outputs: dict[str, Tensor]) -> None:
        self.inspector, self.inspection = inspector, inspection
        self.outputs = outputs
        """{hook point: (1, n_tokens, d_in)}, the very tensors of the graph, in the order of their computation."""
        self._unit_of_token = [i for i, unit in enumerate(inspection.units) for _ in range(unit.start, unit.end)]

    @classmethod
    def of(cls, inspector: Inspector, prompt: Prompt) -> "_Trace":
        ids, roles = inspector.prompt(prompt)
        inspection = inspector.inspect_ids(ids, roles=roles)
        tensor = torch.tensor([ids], device=inspector.model.device)
        with torch.inference_mode(False), torch.enable_grad():
            embedded = inspector.model.get_input_embeddings()(tensor).detach().requires_grad_()
            outputs = run_to_depth(inspector.model, tuple(inspector.saes), inputs_embeds=embedded)
            return cls(inspector, inspection, outputs)

    def unit_of(self, id: str, index: int | None) -> _Unit:
        """The neuron on a unit where it fires, by default most; InputError says where it does."""
        hook_point, latent = self.inspector.place_of(id)
        name, firings = neuron_id(hook_point, latent), self.inspection.firings(neuron_id(hook_point, latent))
        if not firings:
            raise InputError(f"{name} does not fire on this prompt; {self._firing_at(hook_point)}.")
        where = [firing.index for firing in firings]
        if index is not None and index not in where:
            raise InputError(f"{name} does not fire on unit {index}; it fires on {', '.join(map(str, sorted(where)))}.")
        return _Unit(hook_point, latent, where[0] if index is None else index)

    def _firing_at(self, hook_point: str) -> str:
        best: dict[str, float] = {}
        for i in range(len(self.inspection.units)):
            for hit in self.inspection.hits(i):
                if hit.hook_point == hook_point:
                    best[hit.neuron_id] = max(hit.normalised or 0.0, best.get(hit.neuron_id, 0.0))
        strongest = sorted(best, key=lambda id: (-best[id], id))[:3]
        return (
            f"the strongest of {hook_point} here: {', '.join(strongest)}" if best else f"nothing of {hook_point} does"
        )

    def effects(self, child: _Unit, *, required: bool = True) -> list[_Effects]:
        """The attributions of every earlier hook point to a child; InputError when there is none, if it is required."""
        names = list(self.outputs)
        earlier = names[: names.index(child.hook_point)]
        gradients = self._gradients(child, earlier)
        found = [self._attributed(name, gradient, self._token(child)) for name, gradient in gradients.items()]
        if required and not found:
            raise InputError(
                f"{child.hook_point} has no parents: no hook point of {self.inspector.release} is computed before it "
                f"({', '.join(names)}); ask for a neuron of a later one."
            )
        return found

    def _gradients(self, child: _Unit, earlier: list[str]) -> dict[str, Tensor]:
        """∂a_child / ∂x at the hook points that the child depends on: (n_tokens, d_in) each."""
        if not earlier:
            return {}
        sae = self.inspector.saes[child.hook_point]
        with torch.inference_mode(False), torch.enable_grad():
            x = self.outputs[child.hook_point][0, self._token(child)].to(sae.W_enc)
            value = sae.pre_activations(x[None])[0, child.latent]
            wanted = [self.outputs[name] for name in earlier]
            found = torch.autograd.grad(value, wanted, retain_graph=True, allow_unused=True)
        return {name: g[0] for name, g in zip(earlier, found, strict=True) if g is not None}

    def _token(self, child: _Unit) -> int:
        """The token of the child's unit where it is strongest."""
        unit, codes = self.inspection.units[child.index], self.inspection.codes[child.hook_point]
        keep = self.inspection.counted[child.hook_point]
        return max(range(unit.start, unit.end), key=lambda t: _value(*codes.of(t), child.latent) if keep[t] else -1.0)

    @torch.no_grad()
    def _attributed(self, hook_point: str, gradient: Tensor, last: int) -> _Effects:
        """The attributions at the tokens up to `last`; what comes later does not reach the child."""
        sae, codes = self.inspector.saes[hook_point], self.inspection.codes[hook_point].active()
        keep = self.inspection.counted[hook_point]
        x, g = (tensor.detach().to(sae.W_dec).cpu() for tensor in (self.outputs[hook_point][0], gradient))
        latents, tokens = codes.indices.long(), codes.tokens().long()
        scaled = g * norm_of(x, sae.config.normalize_activations).scale
        values = codes.values * _products(sae.W_dec.cpu(), latents, scaled, codes.offsets.tolist())
        x_hat = sae.decode_sparse(codes.to(sae.W_dec.device), like=x.to(sae.W_dec)).cpu()
        of_sae, of_error = float((x_hat * g)[keep].sum()), float(((x - x_hat) * g)[keep].sum())
        here = keep[tokens] & (tokens <= last)
        total = float(values[here].sum())
        share = Share(hook_point, total, of_error, of_sae - total, float((x * g)[~keep].sum()))
        return _Effects(hook_point, latents[here], tokens[here], codes.values[here], values[here], share)

    def by_unit(self, effects: Sequence[_Effects]) -> dict[_Unit, float]:
        """The attributions by neuron and unit, summed over the unit's tokens."""
        summed: dict[_Unit, float] = {}
        for effect in effects:
            entries = zip(effect.latents.tolist(), effect.tokens.tolist(), effect.attributions.tolist(), strict=True)
            for latent, token, value in entries:
                unit = _Unit(effect.hook_point, latent, self._unit_of_token[token])
                summed[unit] = summed.get(unit, 0.0) + value
        return summed

    def node(self, unit: _Unit) -> Node:
        name = neuron_id(unit.hook_point, unit.latent)
        hit = next(hit for hit in self.inspection.hits(unit.index) if hit.neuron_id == name)
        return Node(unit.index, self.inspection.units[unit.index].text, hit)


def _value(values: Tensor, latents: Tensor, latent: int) -> float:
    """The activation of one latent among a token's active ones, 0 if it is not."""
    return float(values[latents == latent].sum())


def _products(W_dec: Tensor, latents: Tensor, gradient: Tensor, offsets: list[int]) -> Tensor:
    """W_dec[j] · g(s) of every entry (latent j at token s): (n_entries,). gradient: (n_tokens, d_in)."""
    parts = [W_dec[latents[a:b]] @ g for g, a, b in zip(gradient, offsets, offsets[1:], strict=False)]
    return torch.cat(parts)


def _by_neuron(effect: _Effects) -> list[Parent]:
    """The attributions of a hook point's neurons over all tokens."""
    which, places, counts = effect.latents.unique(return_inverse=True, return_counts=True)
    summed = effect.attributions.new_zeros(len(which)).index_add_(0, places, effect.attributions)
    largest = effect.activations.new_zeros(len(which)).scatter_reduce_(0, places, effect.activations, "amax")
    columns = (which.tolist(), summed.tolist(), largest.tolist(), counts.tolist())
    return [
        Parent(neuron_id(effect.hook_point, latent), attribution, activation, n)
        for latent, attribution, activation, n in zip(*columns, strict=True)
    ]
