"""When the coordinator takes a snapshot of the network, what it keeps, and who hears of another class."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest

from bsns.chain.signer import KeySigner
from bsns.planning import Link
from bsns.planning.topology import Snapshot
from bsns.planning.topology_classes import class_of
from bsns.protocol.identifiers import model_id
from bsns.protocol.measurements import LinkTiming, NodeMeasurements, UnitTiming
from bsns.protocol.planning_record import SignedMeasurements
from coordinator.dispatch import NodePool, PoolLimits, TopologyWatch, topology_watch
from coordinator.storage import Storage, TopologySnapshot, migrate
from tests.integration.coordinator_fixtures import tiny_manifest

_MANIFEST = tiny_manifest()
_MODEL = model_id(_MANIFEST.manifest_hash, _MANIFEST.weight_root, len(_MANIFEST.units))
_KEYS = [KeySigner(number.to_bytes(32, "big")) for number in range(1, 9)]
_NEAR_NS, _FAR_NS = 2_000_000, 160_000_000
_T = TypeVar("_T")


class _Publication:
    """What the watch needs of one."""

    def __init__(self, storage: Storage) -> None:
        self.manifest, self.model = _MANIFEST, _MODEL
        self.network_class: int | None = None
        self._storage = storage

    def measured(self, nodes: set[str]) -> tuple[list[SignedMeasurements], dict[str, str]]:
        known = self._storage.measurements(_MODEL)
        return [known[node] for node in sorted(nodes & set(known))], {}


class _Watched:
    def __init__(self, folder: Path) -> None:
        url = f"sqlite:///{folder / 'c.sqlite'}"
        migrate(url)
        self.storage, self.now = Storage(url), 100.0
        self.pool = NodePool(PoolLimits(), lambda: self.now)
        self.publication = _Publication(self.storage)
        self.watch = TopologyWatch(
            self.storage,
            self.pool,
            [self.publication],  # type: ignore[list-item]
            prior=Link(25_000_000, 12_500_000),
            seconds=60.0,
            clock=lambda: self.now,
            run_blocking=self._run,
        )

    async def _run(self, call: Callable[[], _T]) -> _T:
        return call()

    def measure(self, at: int, region_of: Callable[[int], int]) -> None:
        """Every node measures all others: near ones of its region, far ones of others."""
        for mine, key in enumerate(_KEYS):
            if key.address not in self.pool.live():
                self.pool.attach(key.address)
            links = tuple(
                LinkTiming(other.address, _NEAR_NS if region_of(mine) == region_of(theirs) else _FAR_NS, 10**8)
                for theirs, other in enumerate(_KEYS)
                if other is not key
            )
            kinds = sorted({unit.timing_key for unit in _MANIFEST.units})
            timings = tuple(UnitTiming(kind, 1_000, 1_000, 2_000, 2_000) for kind in kinds)
            measured = NodeMeasurements(_MODEL, key.address, at, bytes(32), 2**30, timings, links)
            self.storage.keep_measurements(measured, bytes(65))

    async def after(self, seconds: float) -> list[TopologySnapshot]:
        self.now += seconds
        for node in self.pool._nodes.values():
            node.last_heard = self.now
        await self.watch.step(int(self.now))
        return self.storage.topologies(_MODEL, 100)


@pytest.fixture
def watched(tmp_path: Path) -> _Watched:
    return _Watched(tmp_path)


def _alone(_: int) -> int:
    return 0


def _two_regions(node: int) -> int:
    return node % 2


async def test_snapshot_is_taken_of_what_nodes_measured_and_kept(watched: _Watched) -> None:
    watched.measure(1, _two_regions)
    (taken,) = await watched.after(0)
    assert (taken.taken_at, taken.class_number) == (100, 0)
    assert set(taken.snapshot.nodes) == {key.address for key in _KEYS}
    together = {node for node, of in zip(taken.snapshot.nodes, taken.snapshot.clusters, strict=True) if of == 0}
    assert together in ({key.address for key in _KEYS[0::2]}, {key.address for key in _KEYS[1::2]})
    (_, death), *_ = taken.snapshot.longest(0, 1)
    assert death >= _FAR_NS / 2 / 1e9


async def test_nothing_is_taken_before_its_time_or_while_nothing_has_changed(watched: _Watched) -> None:
    watched.measure(1, _alone)
    assert len(await watched.after(0)) == 1
    watched.measure(2, _alone)
    assert len(await watched.after(59)) == 1
    assert len(await watched.after(1)) == 2
    assert len(await watched.after(61)) == 2


async def test_network_of_another_shape_is_of_another_class_and_the_publication_hears_of_it(watched: _Watched) -> None:
    watched.measure(1, _alone)
    await watched.after(0)
    assert watched.publication.network_class == 0
    watched.measure(2, _two_regions)
    newest, _ = await watched.after(60)
    assert (newest.class_number, watched.publication.network_class) == (1, 1)
    watched.measure(3, _alone)
    newest, *_ = await watched.after(60)
    assert (newest.class_number, watched.publication.network_class) == (0, 0)


async def test_nodes_that_are_away_are_not_in_it_and_one_node_is_no_network(watched: _Watched) -> None:
    watched.measure(1, _alone)
    for key in _KEYS[:3]:
        watched.pool.detach(watched.pool.live()[key.address])
    (taken,) = await watched.after(0)
    assert taken.snapshot.node_count == len(_KEYS) - 3
    for key in _KEYS[3:-1]:
        watched.pool.detach(watched.pool.live()[key.address])
    assert len(await watched.after(60)) == 1


async def test_only_the_newest_snapshots_are_kept(watched: _Watched, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topology_watch, "SNAPSHOTS_KEPT", 3)
    for number in range(5):
        watched.measure(number + 1, _alone)
        taken = await watched.after(60)
    assert [item.taken_at for item in taken] == [400, 340, 280]


def test_class_is_that_of_the_nearest_first_member_or_the_next() -> None:
    nodes = tuple(key.address for key in _KEYS[:6])

    def line(gap: float) -> Snapshot:
        bars = np.array([[0.0, np.inf], *[[0.0, gap]] * 5])
        return Snapshot(nodes, 6, (bars, np.empty((0, 2))), (0,) * 6, (), gap, 5 * gap)

    classes = [(0, line(0.01)), (4, line(0.1))]
    assert class_of(line(0.105), classes)[0] == 4
    # A little beyond the radius: a network that was of the class stays in it, another one is not.
    assert class_of(line(0.118), classes, current=4)[0] == 4
    assert class_of(line(0.118), classes)[0] == 5
    assert class_of(line(0.130), classes, current=4)[0] == 5
    assert class_of(line(0.105), classes, current=7)[0] == 4
    number, distance = class_of(line(1.0), classes)
    assert (number, distance) == (5, None)
    assert class_of(line(1.0), [])[0] == 0
    assert class_of(line(0.01), classes) == (0, pytest.approx(0))
