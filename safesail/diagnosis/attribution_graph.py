"""The attribution graph of a neuron: itself, its strongest parents, and what of its activation they account for."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from safesail.diagnosis.inspection import Hit

__all__ = ["Edge", "Graph", "Node", "Share"]


class Share(NamedTuple):
    """What of the child's activation passes an earlier hook point, in the units of that activation."""

    hook_point: str
    parents: float
    """The sum over all its neurons and tokens."""
    error: float
    bias: float
    left_out: float

    @property
    def total(self) -> float:
        """Σ x · g, all that passes the hook point in the linear view."""
        return self.parents + self.error + self.bias + self.left_out


class Node(NamedTuple):
    """A neuron on a readable unit of the prompt."""

    index: int
    """Of the unit."""
    token: str
    hit: Hit


class Edge(NamedTuple):
    """A parent's attribution, in the units of the child's activation."""

    parent: int
    """Place in `Graph.nodes`, as is `child`."""
    child: int
    attribution: float


@dataclass(frozen=True)
class Graph:
    """A neuron on one unit, the strongest of its parents, and how much of its activation they account for."""

    nodes: list[Node]
    """The child first, then the parents, largest absolute attribution first."""
    edges: list[Edge]
    """From every parent to the child, and between the parents. Each is an effect along all paths, those through
    another parent included."""
    shares: list[Share]
    """Per earlier hook point."""
    n_parents: int
    """How many neuron-unit pairs have an attribution, of which `nodes` shows the strongest."""

    @property
    def child(self) -> Node:
        return self.nodes[0]

    def sentences(self) -> list[str]:
        """Per earlier hook point what is explained of the child's activation, and what is not."""
        return [self._sentence(share) for share in self.shares]

    def _sentence(self, share: Share) -> str:
        whole = self.child.hit.activation
        shown = [e.attribution for e in self.edges if e.child == 0 and self._is_of(e.parent, share.hook_point)]
        return (
            f"{share.hook_point}: of the activation {whole:.2f} its neurons account for {share.parents:+.2f} "
            f"({sum(shown):+.2f} by the {len(shown)} shown), what its SAE does not reconstruct for {share.error:+.2f}, "
            f"its bias for {share.bias:+.2f}, tokens that are left out for {share.left_out:+.2f}; "
            f"{whole - share.total:+.2f} is not explained here (other paths, and what is not linear)."
        )

    def _is_of(self, node: int, hook_point: str) -> bool:
        return self.nodes[node].hit.hook_point == hook_point

    def to_json(self) -> dict[str, Any]:
        """The graph as plain JSON."""
        return {
            "nodes": [{"index": node.index, "token": node.token, **node.hit._asdict()} for node in self.nodes],
            "edges": [edge._asdict() for edge in self.edges],
            "shares": [{**share._asdict(), "total": share.total} for share in self.shares],
            "n_parents": self.n_parents,
            "sentences": self.sentences(),
        }
