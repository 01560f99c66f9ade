"""The shortest way around a ring against every way there is, and what makes a way long."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bsns.planning.measured import NEWCOMER_LINK
from bsns.planning.routing import (
    NO_ROOM_NS,
    Availability,
    Floats,
    RouteTable,
    recursive_ring,
    ring_cost,
    shortest_ring,
)
from bsns.protocol.identifiers import ModelId, address
from bsns.protocol.measurements import LinkTiming, NodeMeasurements, UnitTiming
from bsns.protocol.model_graph import MODEL_INPUT, ModelGraph, Operator, Tensor
from bsns.protocol.plan import Assignment, ShardPlan

MODEL = ModelId(bytes([1]) * 32)
UNIT_NS, ROW_BYTES, CACHE_BYTES = 1_000_000, 2_304, 1_000
GRAPH = ModelGraph(
    "chain",
    tuple(Operator(f"unit {number}", "unit", 1, cache_bytes=CACHE_BYTES) for number in range(4)),
    (
        Tensor("input", MODEL_INPUT, (0,), 8),
        *(Tensor(f"cut {number}", number, (number + 1,), ROW_BYTES) for number in range(3)),
        Tensor("output", 3, (), 8, True),
    ),
)


def node(number: int) -> str:
    return address((number + 1).to_bytes(20, "big"))


def plan(*replicas: int) -> ShardPlan:
    """Two stages of two units, with so many replicas each."""
    numbers = itertools.count()
    return ShardPlan(
        4,
        tuple(
            Assignment(stage, replica, 2 * stage, 2 * stage + 2, address(node(next(numbers))), 1, bytes(32))
            for stage, count in enumerate(replicas)
            for replica in range(count)
        ),
    )


def measured(number: int, slowness: int, links: dict[int, int]) -> NodeMeasurements:
    """A unit takes `slowness` milliseconds; round trips by node, in milliseconds."""
    timings = (UnitTiming("unit", slowness * UNIT_NS, 1, 4 * slowness * UNIT_NS, 1),)
    trips = tuple(LinkTiming(address(node(other)), trip * 1_000_000, 10**9) for other, trip in links.items())
    return NodeMeasurements(MODEL, address(node(number)), 1, bytes(32), 1, timings, trips)


@st.composite
def rings(draw: st.DrawFn) -> tuple[list[Floats], list[Floats]]:
    counts = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    value = st.floats(0, 1e6) | st.just(float("inf"))
    costs = [np.array(draw(st.lists(value, min_size=count, max_size=count))) for count in counts]
    hops = []
    for senders, receivers in zip(counts, [*counts[1:], counts[0]], strict=True):
        table = np.array(draw(st.lists(st.floats(0, 1e6), min_size=senders * receivers, max_size=senders * receivers)))
        hops.append(table.reshape(senders, receivers))
    return costs, hops


@settings(max_examples=300)
@given(rings())
def test_shortest_ring_is_the_least_of_all(ring: tuple[list[Floats], list[Floats]]) -> None:
    costs, hops = ring
    every = [ring_cost(costs, hops, route) for route in itertools.product(*(range(len(cost)) for cost in costs))]
    found = shortest_ring(costs, hops)
    if found is None:
        assert min(every) == float("inf")
        return
    assert ring_cost(costs, hops, found) == pytest.approx(min(every))
    recursive = recursive_ring(costs, hops)
    if recursive is not None:
        assert ring_cost(costs, hops, recursive) >= ring_cost(costs, hops, found) * (1 - 1e-12)


def test_table_takes_steps_and_links_from_what_nodes_measured() -> None:
    known = {node(number): measured(number, 1 + number, {2: 10, 3: 40}) for number in (0, 1)}
    known[node(2)] = measured(2, 5, {0: 8})
    table = RouteTable.of(plan(2, 2), GRAPH, known)
    near, far = table.stages[0]
    assert (near.alone_ns, near.together_ns, near.step_ns(8)) == (2 * UNIT_NS, 8 * UNIT_NS, 8 * UNIT_NS)
    assert far.alone_ns == 4 * UNIT_NS
    assert near.cache_bytes == 2 * CACHE_BYTES
    # The node that measured nothing is as slow as its peer.
    assert table.stages[1][1].alone_ns == table.stages[1][0].alone_ns == 10 * UNIT_NS
    # Nothing that was said of its links counts before it has said something itself: they are as long as long ones.
    assert table.hops[0].tolist() == [[5_000_000 + ROW_BYTES] * 2] * 2
    # The way back: as measured by either of the two.
    assert table.hops[1][0].tolist() == [4_000_000 + 4, 5_000_000 + 4]
    assert RouteTable.of(plan(1, 1), None, {}).hops[0].tolist() == [[float(NEWCOMER_LINK.transfer_ns(4))]]


def test_route_goes_where_it_is_nearest_until_that_is_busier_than_the_way_is_far() -> None:
    known = {node(0): measured(0, 1, {2: 2, 3: 10}), node(1): measured(1, 1, {2: 10, 3: 2})}
    known |= {node(number): measured(number, 1, {}) for number in (2, 3)}
    table = RouteTable.of(plan(2, 2), GRAPH, known)
    idle = {node(number): Availability() for number in range(4)}
    assert table.best(idle, 10) in {(node(0), node(2)), (node(1), node(3))}
    busy = {**idle, node(0): Availability(sessions=4), node(2): Availability(sessions=4)}
    assert table.best(busy, 10) == (node(1), node(3))
    crowded = {name: Availability(sessions=4) for name in (node(1), node(3))} | {node(0): Availability()}
    assert table.best({**crowded, node(2): Availability(sessions=60)}, 10) == (node(1), node(3))


def test_node_without_room_for_the_cache_is_taken_only_where_nobody_has() -> None:
    known = {node(number): measured(number, 1, {}) for number in range(3)}
    table = RouteTable.of(plan(2, 1), GRAPH, known)
    full = Availability(free_cache_bytes=2 * CACHE_BYTES * 100 - 1)
    now = {node(0): full, node(1): Availability(sessions=50), node(2): Availability()}
    assert table.best(now, 100) == (node(1), node(2))
    assert table.best(now, 99) == (node(0), node(2))
    assert table.best({**now, node(1): full}, 100) == (node(0), node(2))
    assert table.stages[0][0].step_ns(1_000) < NO_ROOM_NS
