"""Classes of networks, and a sharding schema for each: a plan looked up instead of searched for (paper §1.7).

Owns the classes of one model, as the diagrams tell networks apart, what of a plan is kept as a schema, and how a schema
becomes a plan of other nodes. Promises that what `Classes.plan` gives is a partition of the problem it was given, and
no more than `ACCEPTED` worse than the quick plan. Whether a lookup pays is measured, not promised: docs/topology.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from scipy.optimize import linear_sum_assignment

from bsns.planning import sequential
from bsns.planning.chain import Chain
from bsns.planning.exact_chain import Stages
from bsns.planning.problem import Partition, PlanningError, Problem
from bsns.planning.replica_search import ReplicaSearch, value_of
from bsns.planning.topology import Floats, Snapshot, Topology, wasserstein

ACCEPTED: Final = 1.10
"""A schema's plan is taken where its value is at most so many times the quick plan's."""
RADIUS: Final = 0.15
"""A network belongs to a class up to this distance from its first member."""
MAXIMUM_CLASSES: Final = 256
"""The class that was asked for longest ago gives way."""
LEAVING: Final = 1.5
"""A network that is of a class leaves it only beyond so many times the radius."""
_ANCHORS: Final = 4
"""Nodes that are tried in the place of the schema's anchor."""
_QUANTILES: Final = (0.1, 0.25, 0.5, 0.75, 0.9)
_MISFIT: Final = 1e6

Distance = Callable[[Snapshot, Snapshot], float]


@dataclass(frozen=True, slots=True)
class Role:
    """A node's part in a schema: seconds from the anchor, nanoseconds of a row through the whole model."""

    away: float
    row_ns: int


@dataclass(frozen=True, slots=True)
class Schema:
    """A plan without its nodes. `cuts` are units, one more than stages; `roles` of each stage. `profile` describes the
    anchor, the node that is nearest to all that serve: quantiles of its hops to all nodes, in seconds.
    """

    cuts: tuple[int, ...]
    roles: tuple[tuple[Role, ...], ...]
    profile: tuple[float, ...]

    @classmethod
    def of(cls, partition: Partition, chain: Chain, topology: Topology) -> Schema:
        """The schema of a plan for `chain`, in whose network it stands."""
        place = {node.node: number for number, node in enumerate(chain.problem.nodes)}
        stages = [[place[node.node] for node in stage.nodes] for stage in partition.stages]
        serving = [node for stage in stages for node in stage]
        anchor = serving[int(_near(topology)[np.ix_(serving, serving)].sum(axis=1).argmin())]
        away = _near(topology)[anchor]
        return cls(
            (0, *(stage.end for stage in partition.stages)),
            tuple(tuple(Role(float(away[node]), int(chain.prefix[node, -1])) for node in stage) for stage in stages),
            tuple(_profiles(topology)[anchor].tolist()),
        )

    def instantiate(self, chain: Chain, topology: Topology, *, seed: int = 0) -> Stages | None:
        """The roles given to nodes of `chain`, each to one that is like it, so that all differences together are least;
        then a short local search. None if this gives no partition.
        """
        if self.cuts[-1] != chain.units:
            return None
        apart = np.abs(np.log((_profiles(topology) + _LEAST_S) / (np.array(self.profile) + _LEAST_S))).sum(axis=1)
        best: tuple[int, Stages] | None = None
        for anchor in np.argsort(apart, kind="stable")[:_ANCHORS]:
            stages = self._assigned(chain, _near(topology)[anchor])
            if stages is None:
                continue
            try:
                value = value_of(chain.problem, stages)
            except PlanningError:
                continue
            if best is None or value < best[0]:
                best = (value, stages)
        if best is None:
            return None
        search = ReplicaSearch(chain, seed=seed, tick=lambda: False)
        return search.improve(best[1], proposals=sequential.QUICK_PROPOSALS, warmth=0.0)

    def _assigned(self, chain: Chain, away: Floats) -> Stages | None:
        stage_of = np.array([number for number, roles in enumerate(self.roles) for _ in roles])
        wanted = [role for roles in self.roles for role in roles]
        firsts, ends = np.array(self.cuts[:-1])[stage_of], np.array(self.cuts[1:])[stage_of]
        from_anchor = np.array([role.away for role in wanted]) + _LEAST_S
        rows = np.array([role.row_ns for role in wanted], dtype=np.float64)
        unlike = np.abs(np.log((away + _LEAST_S)[None, :] / from_anchor[:, None]))
        unlike += np.abs(np.log(chain.prefix[:, -1].astype(np.float64)[None, :] / rows[:, None]))
        fits = chain.reach.T[firsts] >= ends[:, None]
        taken, nodes = linear_sum_assignment(np.where(fits, unlike, _MISFIT))
        members: list[list[int]] = [[] for _ in self.roles]
        for role, node in zip(taken.tolist(), nodes.tolist(), strict=True):
            if fits[role, node]:
                members[int(stage_of[role])].append(node)
        if any(len(item) < chain.problem.terms.replicas for item in members):
            return None
        return [(self.cuts[at], self.cuts[at + 1], tuple(item)) for at, item in enumerate(members)]


@dataclass(frozen=True, slots=True)
class Lookup:
    """A plan, the number of the class whose schema it is, and how far the network is from the class: None where it is
    the planner's, and the network the first of the class.
    """

    partition: Partition
    number: int
    distance: float | None


@dataclass(slots=True)
class _Class:
    number: int
    snapshot: Snapshot
    schema: Schema


@dataclass(slots=True)
class Classes:
    """The classes of one model and dtype. `distance` tells networks apart."""

    distance: Distance = wasserstein
    radius: float = RADIUS
    _found: list[_Class] = field(default_factory=list)
    _next: int = 0

    def __len__(self) -> int:
        return len(self._found)

    def nearest(self, snapshot: Snapshot) -> tuple[int, float] | None:
        """(place of the nearest class, its distance); None without classes."""
        if not self._found:
            return None
        distances = [self.distance(item.snapshot, snapshot) for item in self._found]
        at = int(np.argmin(distances))
        return at, distances[at]

    def learn(self, snapshot: Snapshot, schema: Schema) -> int:
        """A new class with `snapshot` as its first member. Its number."""
        if len(self._found) == MAXIMUM_CLASSES:
            del self._found[0]
        self._found.append(_Class(self._next, snapshot, schema))
        self._next += 1
        return self._next - 1

    def plan(self, problem: Problem, *, seed: int = 0) -> Lookup:
        """A plan for `problem`: the nearest class's schema where it will do, else a plan afresh, whose schema makes a
        new class. PlanningError as `partition`.
        """
        chain = Chain(problem)
        topology = Topology.of(chain)
        snapshot = topology.snapshot()
        found = self.look_up(chain, topology, snapshot, seed=seed)
        if found is not None:
            return found
        planned = sequential.solve(problem, seed=seed)
        return Lookup(planned, self.learn(snapshot, Schema.of(planned, chain, topology)), None)

    def look_up(self, chain: Chain, topology: Topology, snapshot: Snapshot, *, seed: int = 0) -> Lookup | None:
        """The nearest class's schema with the nodes of `chain`, or the quick plan where that is the better one. None if
        no class is near, or its schema is worse than `ACCEPTED` times the quick plan.
        """
        nearest = self.nearest(snapshot)
        if nearest is None or nearest[1] > self.radius:
            return None
        at, distance = nearest
        stages = self._found[at].schema.instantiate(chain, topology, seed=seed)
        if stages is None:
            return None
        try:
            found = sequential.partition_of(chain.problem, stages, "schema")
        except PlanningError:
            return None
        quick = sequential.quick(chain)
        if quick is not None and found.value_ns > ACCEPTED * quick.value_ns:
            return None
        self._found.append(self._found.pop(at))  # asked for last
        better = found if quick is None or found.value_ns <= quick.value_ns else quick
        return Lookup(better, self._found[-1].number, distance)


def class_of(
    snapshot: Snapshot, classes: Sequence[tuple[int, Snapshot]], current: int | None = None
) -> tuple[int, float | None]:
    """(number of the class, distance from its first member); the next number and None if `snapshot` is the first of
    one. `classes` are numbers with first members. A network leaves the `current` class only beyond `LEAVING` times the
    radius: measurements waver, and each change is a reason to plan.
    """
    distances = {number: wasserstein(first, snapshot) for number, first in classes}
    if current in distances and distances[current] <= LEAVING * RADIUS:
        return current, distances[current]
    nearest = min(((distance, number) for number, distance in distances.items()), default=None)
    if nearest is not None and nearest[0] <= RADIUS:
        return nearest[1], nearest[0]
    return max(distances, default=-1) + 1, None


_LEAST_S: Final = 1e-4
"""Hops below this are alike."""


def _near(topology: Topology) -> Floats:
    """Hops, with the longest one in place of a link that is not there."""
    finite = topology.hops[np.isfinite(topology.hops)]
    return np.where(np.isfinite(topology.hops), topology.hops, finite.max(initial=0.0))


def _profiles(topology: Topology) -> Floats:
    """Quantiles of each node's hops, by node and quantile."""
    table: Floats = np.quantile(_near(topology), _QUANTILES, axis=1).T
    return table
