"""Diagrams of networks: what they must not depend on, how little they may move, and what is read off them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bsns.planning import topology
from bsns.planning.topology import Floats, Snapshot, Topology, bottleneck, wasserstein
from bsns.protocol.identifiers import address

_LIMIT = settings(max_examples=40, deadline=None)


def network(hops: Floats, births: Floats | None = None) -> Topology:
    nodes = tuple(address((number + 1).to_bytes(20, "big")) for number in range(len(hops)))
    return Topology(nodes, hops, np.zeros(len(hops)) if births is None else births)


def at_points(points: Floats, births: Floats | None = None) -> Topology:
    return network(np.linalg.norm(points[:, None] - points[None, :], axis=2), births)


@st.composite
def networks(draw: st.DrawFn, smallest: int = 2) -> Topology:
    """Random hops, not always a metric; births of the same size; links that are missing."""
    count = draw(st.integers(smallest, 14))
    numbers = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if draw(st.booleans()):
        hops = at_points(numbers.random((count, 2))).hops
    else:
        hops = numbers.random((count, count))
        hops = (hops + hops.T) / 2
    if draw(st.booleans()):
        missing = numbers.random((count, count)) < 0.3
        hops[missing | missing.T] = np.inf
    np.fill_diagonal(hops, 0)
    return network(hops, numbers.random(count) * draw(st.sampled_from([0.0, 0.1, 1.0])))


@_LIMIT
@given(networks(), st.randoms(use_true_random=False))
def test_diagrams_are_the_same_whatever_nodes_are_called_and_in_whatever_order(of: Topology, shuffle: object) -> None:
    order = list(range(len(of.nodes)))
    shuffle.shuffle(order)  # type: ignore[attr-defined]
    other = Topology(of.nodes, of.hops[np.ix_(order, order)], of.births[order])
    one, two = of.snapshot(), other.snapshot()
    for mine, theirs in zip(one.diagrams, two.diagrams, strict=True):
        np.testing.assert_allclose(np.sort(mine, axis=0), np.sort(theirs, axis=0))
    assert wasserstein(one, two) == pytest.approx(0, abs=1e-9)
    assert one.cluster_count == two.cluster_count


@_LIMIT
@given(networks(), st.floats(0.0, 0.05), st.integers(0, 2**32 - 1))
def test_diagrams_move_by_no_more_than_hops_and_births_do(of: Topology, by: float, seed: int) -> None:
    numbers = np.random.default_rng(seed)
    change = numbers.uniform(-by, by, of.hops.shape)
    hops = np.where(np.isfinite(of.hops), np.maximum(of.hops + np.triu(change, 1) + np.triu(change, 1).T, 0), np.inf)
    np.fill_diagonal(hops, 0)
    births = np.maximum(of.births + numbers.uniform(-by, by, len(of.births)), 0)
    one, two = of.snapshot(), Topology(of.nodes, hops, births).snapshot()
    for dimension in (0, 1):
        assert bottleneck(one, two, dimension) <= by + 1e-9


@_LIMIT
@given(networks())
def test_clusters_die_along_the_edges_of_the_spanning_tree(of: Topology) -> None:
    snapshot = of.snapshot()
    deaths = snapshot.diagrams[0][:, 1]
    tree = [birth for birth, _, _ in of.spanning_tree]
    assert snapshot.components == len(of.nodes) - len(tree)
    # A node that is born with the edge that joins it has no bar of its own.
    assert snapshot.tree_length == pytest.approx(sum(tree))
    for death in deaths[np.isfinite(deaths)]:
        assert np.isclose(tree, death).any()


@_LIMIT
@given(networks())
def test_snapshot_from_storage_is_the_one_that_was_stored_to_the_microsecond(of: Topology) -> None:
    snapshot = of.snapshot()
    again = Snapshot.from_json(snapshot.to_json())
    assert again.to_json() == snapshot.to_json()
    assert (again.clusters, again.bridges, again.components) == (
        snapshot.clusters, snapshot.bridges, snapshot.components,
    )  # fmt: skip
    assert wasserstein(again, snapshot) <= 1e-3 or snapshot.persistence < 1e-3


@_LIMIT
@given(networks(), networks())
def test_distance_of_snapshots_is_symmetric_and_between_nothing_and_one(one: Topology, two: Topology) -> None:
    mine, theirs = one.snapshot(), two.snapshot()
    assert 0 <= wasserstein(mine, theirs) <= 1
    assert wasserstein(mine, theirs) == pytest.approx(wasserstein(theirs, mine), rel=3e-3, abs=1e-9)
    assert wasserstein(mine, mine) == pytest.approx(0, abs=1e-9)


def test_ring_of_nodes_has_one_long_bar_in_dimension_one() -> None:
    angle = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    snapshot = at_points(np.column_stack([np.cos(angle), np.sin(angle)])).snapshot()
    (birth, death), *rest = snapshot.longest(1, 5)
    assert birth == pytest.approx(2 * np.sin(np.pi / 24))
    assert death == pytest.approx(np.sqrt(3))  # where three nodes of the ring are all joined
    assert not rest
    assert snapshot.betti(1, 1.0) == 1
    assert snapshot.cluster_count == 1


def test_weights_hold_a_ring_back_until_its_slowest_node_is_born() -> None:
    angle = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    births = np.zeros(24)
    births[5] = 1.0
    (birth, _), *_ = at_points(np.column_stack([np.cos(angle), np.sin(angle)]), births).snapshot().longest(1, 1)
    # Without the node its neighbours close the ring.
    assert birth == pytest.approx(2 * np.sin(2 * np.pi / 24))


def test_regions_are_clusters_and_the_links_between_them_bridges() -> None:
    numbers = np.random.default_rng(3)
    centres = np.array([[0, 0], [100, 0], [0, 100]])
    region = np.repeat([0, 1, 2], [12, 8, 6])
    snapshot = at_points(centres[region] + numbers.uniform(0, 5, (26, 2))).snapshot()
    assert list(snapshot.clusters) == region.tolist()
    assert len(snapshot.bridges) == 2
    assert all(region[one] != region[two] for one, two in snapshot.bridges)
    assert snapshot.betti(0, 20.0) == 3


def test_parts_that_nothing_joins_are_counted_and_never_die() -> None:
    hops = at_points(np.random.default_rng(1).random((9, 2))).hops
    hops[:4, 4:] = hops[4:, :4] = np.inf
    assert network(hops).snapshot().components == 2


def test_network_without_structure_is_seen_by_fewer_landmarks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topology, "MAXIMUM_EDGES", 300)
    hops = np.random.default_rng(2).random((60, 60))
    hops = (hops + hops.T) / 2
    np.fill_diagonal(hops, 0)
    snapshot = network(hops).snapshot()
    assert 5 < snapshot.landmark_count < 60
    assert snapshot.node_count == 60


def test_landmarks_of_regions_are_in_every_region() -> None:
    numbers = np.random.default_rng(4)
    region = np.repeat(range(5), 40)
    points = np.column_stack([100 * region, np.zeros(200)]) + numbers.uniform(0, 3, (200, 2))
    chosen = topology._landmarks(at_points(points).edges, 10)
    assert set(region[chosen]) == set(range(5))
