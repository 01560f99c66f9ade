"""Snapshots of the swarm's network: taken while nodes come, go and measure, kept, and sorted into classes (paper §1.7).

Owns when a snapshot is taken and which class it is of: that of the nearest first member of a class among those that are
kept, or a new one. A publication hears of another class, which is a reason to judge its plan again. Promises one
snapshot at a time, none while nothing has changed, and `SNAPSHOTS_KEPT` of a model at the most. Plans nothing: looking
plans up by class does not pay (docs/topology.md).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import structlog

from bsns.planning import Link
from bsns.planning.topology import Topology
from bsns.planning.topology_classes import class_of
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
        usable, _ = publication.measured(present)
        measured = [item.measurements for item in usable]
        what = frozenset((item.node, item.measured_at) for item in measured)
        seen = self._seen.get(model)
        if len(measured) < 2 or (seen is not None and seen.measured == what):
            return None
        began = time.perf_counter()
        graph = ModelGraph.of_manifest(publication.manifest)
        snapshot = Topology.measured(measured, graph, self._prior).snapshot(LANDMARKS)
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
            distance=None if distance is None else round(distance, 3),
            changed=seen is not None and seen.number != number,
            seconds=round(time.perf_counter() - began, 3),
        )
        return number
