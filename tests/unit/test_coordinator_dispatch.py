"""The node pool and the choice of a route."""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter

import pytest

from bsns.planning.routing import Availability, RouteTable
from bsns.protocol.contract_states import RequestStatus
from bsns.protocol.identifiers import ModelId, PlanId, RequestId, address
from bsns.protocol.plan import Assignment
from bsns.v1 import coordination_pb2
from coordinator.dispatch import NodePool, PoolLimits
from coordinator.dispatch.node_pool import PoolFullError
from coordinator.dispatch.request_routing import node_load
from coordinator.network_state import PlanState, RequestState, StageState

_LIMITS = PoolLimits(attached_nodes=2, heartbeat_seconds=2, missed_heartbeats=3, queued_messages=2)


class _Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def _node(number: int) -> str:
    return address(number.to_bytes(20, "big"))


def _plan(*replicas: int) -> PlanState:
    numbers = itertools.count(1)
    assignments = tuple(
        Assignment(stage, replica, stage, stage + 1, address(next(numbers).to_bytes(20, "big")), 1, bytes(32))
        for stage, count in enumerate(replicas)
        for replica in range(count)
    )
    return PlanState(PlanId(bytes(32)), ModelId(bytes(32)), "p", 0, 0, 1, bytes(32), bytes(32), assignments)


def test_node_silent_for_three_heartbeats_is_given_up() -> None:
    clock = _Clock()
    pool = NodePool(_LIMITS, clock)
    attached = pool.attach("a")
    clock.now = 6.0
    assert set(pool.live()) == {"a"}
    pool.heartbeat(attached, coordination_pb2.Heartbeat(sequence=1, open_sessions=4))
    clock.now = 12.0
    assert pool.live()["a"].open_sessions == 4
    clock.now = 12.1
    assert pool.live() == {}
    assert attached.closed.is_set()
    assert pool.seconds_unchanged == 0


def test_node_attaching_again_replaces_its_old_attachment() -> None:
    pool = NodePool(_LIMITS, _Clock())
    old = pool.attach("a")
    new = pool.attach("a")
    assert old.closed.is_set()
    assert not new.closed.is_set()
    pool.detach(old)
    assert set(pool.live()) == {"a"}


def test_pool_at_its_limit_takes_no_more() -> None:
    pool = NodePool(_LIMITS, _Clock())
    pool.attach("a")
    pool.attach("b")
    with pytest.raises(PoolFullError):
        pool.attach("c")
    pool.attach("b")


def test_node_that_does_not_read_is_given_up_when_its_queue_is_full() -> None:
    pool = NodePool(_LIMITS, _Clock())
    pool.attach("a")
    message = coordination_pb2.AttachResponse()
    assert [pool.tell("a", message) for _ in range(3)] == [True, True, False]
    assert pool.live() == {}
    assert not pool.tell("a", message)


def _table(plan: PlanState) -> RouteTable:
    """Of nodes that have measured nothing."""
    return RouteTable.of(plan.shard_plan, None, {})


def test_route_takes_the_least_loaded_replica_and_of_equals_the_first() -> None:
    plan = _plan(3, 1)
    # The first replica has the highest address: planners put the fastest first.
    turned = [plan.assignments[2].node, plan.assignments[1].node, plan.assignments[0].node, plan.assignments[3].node]
    plan = dataclasses.replace(
        plan,
        assignments=tuple(
            dataclasses.replace(item, node=node) for item, node in zip(plan.assignments, turned, strict=True)
        ),
    )
    table = _table(plan)
    for load, first in (
        ({}, 3),
        ({_node(3): 2, _node(2): 1, _node(1): 1}, 2),
        ({_node(3): 2, _node(2): 1}, 1),
    ):
        now = {_node(number): Availability(1.0, load.get(_node(number), 0)) for number in (1, 2, 3, 4)}
        assert table.best(now, 100) == (_node(first), _node(4))
    assert table.best({**now, _node(4): Availability(0.0)}, 100) is None
    del now[_node(4)]
    assert table.best(now, 100) is None


def test_route_gives_a_replica_work_in_proportion_to_its_share() -> None:
    table, load = _table(_plan(2)), Counter[str]()
    shares = {_node(1): 1.0, _node(2): 0.25}
    for _ in range(50):
        route = table.best({node: Availability(share, load[node]) for node, share in shares.items()}, 100)
        assert route is not None
        load[route[0]] += 1
    assert load == {_node(1): 40, _node(2): 10}


def test_node_load_counts_requests_in_execution_only() -> None:
    stages = (StageState(0, "a"), StageState(1, "b"))
    request = RequestState(
        RequestId(bytes(32)), "r", PlanId(bytes(32)), RequestStatus.ROUTED, 0, 0, 0, 0, 0, 0, 0, b"", b"", stages
    )
    settled = dataclasses.replace(request, status=RequestStatus.SETTLED)
    assert node_load([request, request, settled]) == {"a": 2, "b": 2}
