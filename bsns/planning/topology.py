"""What a swarm's network looks like: hops in seconds, weighted persistent homology, clusters and bridges (paper §1.7).

Owns the distance between nodes, the filtration, its persistence diagrams in dimensions 0 and 1, and what is read off
them. Distances and births are seconds, so that diagrams of one model compare. Promises diagrams that do not depend on
the names or the order of nodes, and that move by no more than the measurements do (bottleneck distance), where all
nodes are landmarks. Floats: nobody has to compute a snapshot again to check a plan. gudhi does the homology.

The filtration is the weighted Vietoris-Rips one: a node is born at its weight, the seconds that a unit of the model
takes on it on average; a pair at the later of both births and the hop between them; a triangle with its last pair.
(Weights of the boundary map change nothing over a field, as the weighted complex is isomorphic to the plain one:
weights have to be in the filtration.) Dimension 0 dies along the edges of the minimum spanning tree; a bar of dimension
1 is a ring of nodes without a short cut.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, Final

import numpy as np
from eth_typing import ChecksumAddress
from numpy.typing import NDArray
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components, minimum_spanning_tree

from bsns.planning.chain import NEVER, Chain
from bsns.planning.measured import planning_links, planning_node
from bsns.planning.problem import MAXIMUM_TOTAL, SECOND_NS, Link, Objective, Problem, Terms
from bsns.protocol.identifiers import address
from bsns.protocol.measurements import NodeMeasurements
from bsns.protocol.model_graph import ModelGraph

Floats = NDArray[np.float64]

_PRECISION: Final = 1e-3
"""Relative error of distances between diagrams."""
LANDMARKS: Final = 1_000
"""Nodes that diagrams are computed of; of more, so many that lie as far from one another as can be."""
MAXIMUM_EDGES: Final = 12_000
"""Pairs that may be left after collapsing: where more are, as in networks without any structure, fewer landmarks do."""
_FEWER: Final = 0.9
_PROBED: Final = 250
_REGULAR: Final = 8
"""Pairs for each of these landmarks that networks with a shape keep at the most, whatever their size."""
MAXIMUM_BARS: Final = 256
"""Bars of a dimension that a snapshot keeps, the longest ones."""
CLUSTER_GAP: Final = 2.0
"""Clusters are further apart than nodes in them by this factor at the least."""


@dataclass(frozen=True)
class Topology:
    """`hops[i, j]` in seconds, symmetric, 0 on the diagonal, infinite without a link; `births[i]` in seconds."""

    nodes: tuple[ChecksumAddress, ...]
    hops: Floats
    births: Floats

    @classmethod
    def of(cls, chain: Chain) -> Topology:
        """Of a planning problem: a hop is the mean of both directions with the bytes of the usual cut."""
        sent = chain.usual_hops
        hops = (sent + sent.T) / (2 * SECOND_NS)
        hops[(sent >= NEVER) | (sent.T >= NEVER)] = np.inf
        births = chain.prefix[:, -1] / (chain.units * SECOND_NS)
        return cls(tuple(node.node for node in chain.problem.nodes), hops, births)

    @classmethod
    def measured(cls, measurements: Sequence[NodeMeasurements], graph: ModelGraph, prior: Link) -> Topology:
        """Of nodes with these measurements, for hops of the model of `graph`; `prior` stands for links that nobody
        measured. PlanningError for measurements that cannot be planned with.
        """
        # Whether the model fits does not matter to the network's shape.
        nodes = tuple(replace(planning_node(item), memory_bytes=MAXIMUM_TOTAL) for item in measurements)
        terms = Terms(concurrent_sessions=0, session_tokens=0)
        links = planning_links(measurements, prior=prior)
        return cls.of(Chain(Problem(graph, nodes, links, Objective.LATENCY, terms)))

    @cached_property
    def edges(self) -> Floats:
        """When a pair is born; on the diagonal when its node is."""
        later = np.maximum(self.births[:, None], self.births[None, :])
        table: Floats = np.maximum(self.hops, later)
        return table

    @cached_property
    def spanning_tree(self) -> list[tuple[float, int, int]]:
        """(birth, node, node) of each edge of the minimum spanning tree, or forest, by birth."""
        table = self.edges + 1.0  # an edge of 0 counts as none
        np.fill_diagonal(table, np.inf)
        tree = minimum_spanning_tree(table).tocoo()
        pairs = zip(np.minimum(tree.row, tree.col).tolist(), np.maximum(tree.row, tree.col).tolist(), strict=True)
        return sorted((float(self.edges[one, two]), one, two) for one, two in pairs)

    def snapshot(self, landmarks: int = LANDMARKS) -> Snapshot:
        """The diagrams and what is read off the spanning tree."""
        chosen = _landmarks(self.edges, min(landmarks, _affordable(self.edges)))
        diagrams = _diagrams(self.edges[np.ix_(chosen, chosen)])
        while isinstance(diagrams, int):
            share = min(_FEWER, float(np.sqrt(MAXIMUM_EDGES / diagrams)))
            chosen = _landmarks(self.edges, int(len(chosen) * share))
            diagrams = _diagrams(self.edges[np.ix_(chosen, chosen)])
        tree, cut = self.spanning_tree, _gap(self.spanning_tree)
        away = ~np.eye(len(self.nodes), dtype=bool) & np.isfinite(self.hops)
        return Snapshot(
            nodes=self.nodes,
            landmark_count=len(chosen),
            diagrams=diagrams,
            clusters=_clusters(len(self.nodes), [(one, two) for birth, one, two in tree if birth < cut]),
            bridges=tuple((one, two) for birth, one, two in tree if birth >= cut),
            mean_hop=float(self.hops[away].mean()) if away.any() else 0.0,
            tree_length=float(sum(birth for birth, _, _ in tree)),
        )


@dataclass(frozen=True)
class Snapshot:
    """A network of `nodes` at one moment, in seconds. `diagrams[d]` has the bars of dimension d, births and deaths, an
    infinite death for what never dies: shape (bars, 2), the longest first. `clusters[i]` is the number of node i's
    cluster, the largest is 0; `bridges` are the pairs of nodes that join clusters in the minimum spanning tree.
    """

    nodes: tuple[ChecksumAddress, ...]
    landmark_count: int
    diagrams: tuple[Floats, Floats]
    clusters: tuple[int, ...]
    bridges: tuple[tuple[int, int], ...]
    mean_hop: float
    tree_length: float

    @property
    def node_count(self) -> int:
        return len(self.nodes)

    @property
    def components(self) -> int:
        """Parts of the network that no link joins."""
        return int(np.isinf(self.diagrams[0][:, 1]).sum())

    @property
    def cluster_count(self) -> int:
        return len(set(self.clusters))

    def betti(self, dimension: int, at: float) -> int:
        """Bars of `dimension` that live at `at` seconds."""
        bars = self.diagrams[dimension]
        return int(((bars[:, 0] <= at) & (at < bars[:, 1])).sum())

    def longest(self, dimension: int, count: int) -> list[tuple[float, float]]:
        """The longest finite bars of `dimension`."""
        bars = _bounded(self.diagrams[dimension])[:count]
        return [(float(birth), float(death)) for birth, death in bars]

    @property
    def persistence(self) -> float:
        """The lengths of all finite bars, added."""
        return float(sum(np.ptp(_bounded(bars), axis=1).sum() for bars in self.diagrams))

    def to_json(self) -> str:
        """For storage; bars in microseconds as integers, -1 for a death that never comes."""

        def rounded(bars: Floats) -> list[list[int]]:
            return [[-1 if np.isinf(value) else round(value * 1e6) for value in bar] for bar in bars.tolist()]

        return json.dumps(
            {
                "nodes": list(self.nodes),
                "landmark_count": self.landmark_count,
                "diagrams": [rounded(bars) for bars in self.diagrams],
                "clusters": list(self.clusters),
                "bridges": [list(bridge) for bridge in self.bridges],
                "mean_hop_us": round(self.mean_hop * 1e6),
                "tree_length_us": round(self.tree_length * 1e6),
            },
            separators=(",", ":"),
        )

    @classmethod
    def from_json(cls, text: str) -> Snapshot:
        """The inverse of `to_json`, to the microsecond."""
        found: Mapping[str, Any] = json.loads(text)

        def seconds(bars: list[list[int]]) -> Floats:
            table = np.array(bars, dtype=np.float64).reshape(-1, 2)
            return np.where(table < 0, np.inf, table / 1e6)

        return cls(
            tuple(address(node) for node in found["nodes"]),
            found["landmark_count"],
            (seconds(found["diagrams"][0]), seconds(found["diagrams"][1])),
            tuple(found["clusters"]),
            tuple((one, two) for one, two in found["bridges"]),
            found["mean_hop_us"] / 1e6,
            found["tree_length_us"] / 1e6,
        )


def wasserstein(one: Snapshot, other: Snapshot) -> float:
    """How unlike two snapshots are, from 0 to 1: the 1-Wasserstein distance of their diagrams (ground metric: the
    maximum), both dimensions added, over the largest that it could be, which is what it costs to leave every bar of
    both unmatched.
    """
    from gudhi.hera import wasserstein_distance

    apart = sum(
        wasserstein_distance(_bounded(mine), _bounded(theirs), order=1.0, internal_p=np.inf, delta=_PRECISION)
        for mine, theirs in zip(one.diagrams, other.diagrams, strict=True)
    )
    largest = (one.persistence + other.persistence) / 2
    return min(1.0, apart / largest) if largest > 0 else 0.0


def bottleneck(one: Snapshot, other: Snapshot, dimension: int) -> float:
    """Seconds by which a bar has to move at the most for the diagrams of `dimension` to be the same."""
    from gudhi.hera import bottleneck_distance

    return float(bottleneck_distance(one.diagrams[dimension], other.diagrams[dimension], 0.0))


# ------------------------------------------------------------------------------------------------------------- inside


def _affordable(edges: Floats) -> int:
    """How many landmarks a network can be seen by, from what collapsing leaves of a few: irregular networks keep a part
    of all their pairs, and collapsing those of a large one would take minutes.
    """
    if len(edges) <= _PROBED:
        return len(edges)
    few = _landmarks(edges, _PROBED)
    left = int(_collapsed(edges[np.ix_(few, few)]).num_simplices()) - _PROBED
    if left <= _REGULAR * _PROBED:
        return len(edges)
    return int(_PROBED * np.sqrt(MAXIMUM_EDGES / left))


def _diagrams(edges: Floats) -> tuple[Floats, Floats] | int:
    """The bars of both dimensions; or how many pairs are left after collapsing, if more than `MAXIMUM_EDGES`."""
    tree = _collapsed(edges)
    left = int(tree.num_simplices()) - len(edges)
    if left > MAXIMUM_EDGES:
        return left
    tree.expansion(2)
    tree.compute_persistence(homology_coeff_field=2, persistence_dim_max=True)
    zero, one = (_longest(tree.persistence_intervals_in_dimension(dimension)) for dimension in (0, 1))
    return zero, one


def _collapsed(edges: Floats) -> Any:
    """The graph of `edges` as a gudhi.SimplexTree, with the same diagrams and fewer pairs."""
    import gudhi

    # Beyond the enclosing radius one node is joined to all others, and nothing is born or dies any more.
    radius = float(edges.max(axis=1).min())
    limit = radius if np.isfinite(radius) else float(edges[np.isfinite(edges)].max())
    tree = gudhi.SimplexTree.create_from_array(edges, max_filtration=limit)
    tree.collapse_edges()
    return tree


def _longest(bars: Floats) -> Floats:
    bars = np.asarray(bars, dtype=np.float64).reshape(-1, 2)
    length = bars[:, 1] - bars[:, 0]
    return bars[np.lexsort((bars[:, 0], -length))[:MAXIMUM_BARS]]


def _landmarks(edges: Floats, count: int) -> NDArray[np.intp]:
    """Max-min sampling: the node nearest to all, then always the one that is furthest from those chosen."""
    total = len(edges)
    if count >= total:
        return np.arange(total)
    finite = np.where(np.isfinite(edges), edges, 0.0)
    chosen = [int(finite.sum(axis=1).argmin())]
    away = edges[chosen[0]].copy()
    while len(chosen) < count:
        away[chosen[-1]] = -1.0
        chosen.append(int(away.argmax()))
        away = np.minimum(away, edges[chosen[-1]])
    return np.array(sorted(chosen))


def _gap(tree: list[tuple[float, int, int]]) -> float:
    """Where the spanning tree is cut: at the widest step between the births of its edges in order, if it is wide."""
    births = [birth for birth, _, _ in tree]
    steps = [
        (later / earlier, later)
        for earlier, later in pairwise(births[len(births) // 2 :])  # most edges lie within clusters
        if earlier > 0
    ]
    widest = max(steps, default=(0.0, 0.0))
    return widest[1] if widest[0] >= CLUSTER_GAP else float("inf")


def _clusters(count: int, edges: list[tuple[int, int]]) -> tuple[int, ...]:
    """By node the number of its cluster; the largest has the lowest, of equal ones that with the lowest node."""
    joined = coo_array((np.ones(len(edges)), tuple(np.array(edges, dtype=int).reshape(-1, 2).T)), shape=(count, count))
    _, labels = connected_components(joined, directed=False)
    _, first, sizes = np.unique(labels, return_index=True, return_counts=True)
    number = np.argsort(np.lexsort((first, -sizes)))
    return tuple(number[labels].tolist())


def _bounded(bars: Floats) -> Floats:
    """Without bars that never die: every network has one for each of its parts."""
    return bars[np.isfinite(bars[:, 1])]
