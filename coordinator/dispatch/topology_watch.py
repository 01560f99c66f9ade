"""Snapshots of the swarm's network: taken while nodes come, go and measure, kept, and sorted into classes (paper §1.7).

Owns when a snapshot is taken and which class it is of: that of the nearest first member of a class among those that are
kept, or a new one. A publication hears of another class, which is a reason to judge its plan again. Promises one
snapshot at a time, none while nothing has changed, and `SNAPSHOTS_KEPT` of a model at the most. Plans nothing: looking
plans up by class does not pay (docs/topology.md).
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import structlog

from bsns.planning import Link, Objective, PlanningError, Problem, Terms
from bsns.planning.chain import Chain
from bsns.planning.measured import planning_links, planning_node
from bsns.planning.problem import MAXIMUM_TOTAL
from bsns.planning.topology import Snapshot, Topology, wasserstein
from bsns.planning.topology_classes import RADIUS
from bsns.protocol.measurements import NodeMeasurements
from bsns.protocol.model_graph import ModelGraph
from coordinator.dispatch.node_pool import NodePool
from coordinator.dispatch.plan_publication import PlanPublication
from coordinator.storage import Storage, TopologySnapshot
from coordinator.transaction_outbox import WorkerThread

SNAPSHOTS_KEPT: Final = 1_024
"""Of each model; the oldest go. With one a minute these are 17 hours of change."""
CLASSES_COMPARED: Final = 64
"""Of each model, the newest; a network that is like none of them is the first of a class."""
LANDMARKS: Final = 250
"""Nodes that a snapshot is computed of. More take minutes where hardly a link was measured and all others are alike."""
LEAVING: Final = 1.5
_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class _Seen:
    """What the last snapshot was taken of."""

    measured: frozenset[tuple[str, int]]
    number: int


class TopologyWatch:
    """Watches the networks of all models; `step` is one look."""

    def __init__(
        self,
        storage: Storage,
        pool: NodePool,
        publications: Sequence[PlanPublication],
        *,
        prior: Link,
        seconds: float,
        clock: Callable[[], float],
        run_blocking: WorkerThread = asyncio.to_thread,
    ) -> None:
        self._storage = storage
        self._pool = pool
        self._publications = publications
        self._prior = prior
        self._seconds = seconds
        self._clock = clock
        self._blocking = run_blocking
        self._seen: dict[bytes, _Seen] = {}
        self._next_at = clock()

    async def step(self, now: int) -> None:
        """Take the snapshots that are due at Unix second `now`."""
        if self._clock() < self._next_at:
            return
        self._next_at = self._clock() + self._seconds
        present = set(self._pool.live())
        for publication in self._publications:
            found = await self._blocking(lambda item=publication: self._look(item, present, now))  # type: ignore[misc]
            if found is not None:
                publication.network_class = found

    def _look(self, publication: PlanPublication, present: set[str], now: int) -> int | None:
        """The number of the network's class; None where there is nothing new."""
        model = publication.model
        measured = [item.measurements for node, item in self._storage.measurements(model).items() if node in present]
        what = frozenset((item.node, item.measured_at) for item in measured)
        seen = self._seen.get(model)
        if len(measured) < 2 or (seen is not None and seen.measured == what):
            return None
        began = time.perf_counter()
        try:
            snapshot = network_of(measured, ModelGraph.of_manifest(publication.manifest), self._prior).snapshot(
                LANDMARKS
            )
        except PlanningError as error:  # a node whose measurements the publication leaves out, too
            _log.warning("no_topology", model=publication.manifest.name, reason=str(error))
            return None
        classes = self._storage.topology_classes(model, CLASSES_COMPARED)
        number, distance = class_of(snapshot, classes, None if seen is None else seen.number)
        self._storage.keep_topology(TopologySnapshot(model, now, number, snapshot), keep=SNAPSHOTS_KEPT)
        self._seen[model] = _Seen(what, number)
        _log.info(
            "topology",
            model=publication.manifest.name,
            nodes=snapshot.node_count,
            clusters=snapshot.cluster_count,
            network_class=number,
            distance=round(distance, 3),
            changed=seen is not None and seen.number != number,
            seconds=round(time.perf_counter() - began, 3),
        )
        return number


def network_of(measured: Sequence[NodeMeasurements], graph: ModelGraph, prior: Link) -> Topology:
    """The network of nodes with these measurements, for hops of the model of `graph`; `prior` stands for links that
    nobody measured. PlanningError for measurements that cannot be planned with.
    """
    # Whether the model fits does not matter to the network's shape.
    nodes = tuple(dataclasses.replace(planning_node(item), memory_bytes=MAXIMUM_TOTAL) for item in measured)
    terms = Terms(concurrent_sessions=0, session_tokens=0)
    return Topology.of(Chain(Problem(graph, nodes, planning_links(measured, prior=prior), Objective.LATENCY, terms)))


def class_of(
    snapshot: Snapshot, classes: Sequence[tuple[int, Snapshot]], current: int | None = None
) -> tuple[int, float]:
    """(number of the class, distance from its first member), the next number and 1 if `snapshot` is the first of one.
    `classes` are numbers with first members. A network leaves the `current` class only beyond `LEAVING` times the
    radius: measurements waver, and each change is a reason to plan.
    """
    distances = {number: wasserstein(first, snapshot) for number, first in classes}
    if current in distances and distances[current] <= LEAVING * RADIUS:
        return current, distances[current]
    nearest = min(((distance, number) for number, distance in distances.items()), default=None)
    if nearest is not None and nearest[0] <= RADIUS:
        return nearest[1], nearest[0]
    return max((number for number, _ in classes), default=-1) + 1, 1.0
