"""Who is asked to take a stage over, and who is avoided."""

from __future__ import annotations

from bsns.protocol.identifiers import address
from bsns.protocol.plan import Assignment, ShardPlan
from bsns.requester.node_connection import NodeEndpoint
from bsns.requester.standby import FIRST_PAUSE_S, MAXIMUM_PAUSE_S, NodeBackoff, Standby

NODES = [address(bytes([number]) * 20) for number in range(1, 6)]
CLASS, OTHER = b"\x01" * 32, b"\x02" * 32


def standby(*classes: bytes) -> Standby:
    assignments = tuple(Assignment(0, replica, 0, 3, NODES[replica], 1, item) for replica, item in enumerate(classes))
    endpoints = {node: NodeEndpoint(node, "127.0.0.1:1", bytes(32)) for node in NODES}
    return Standby(ShardPlan(3, assignments), endpoints)


def names(found: tuple[Assignment, ...]) -> list[str]:
    return [item.node for item in found]


def test_candidates_are_the_other_replicas_of_the_same_class_in_the_order_of_the_plan() -> None:
    plan = standby(CLASS, CLASS, OTHER, CLASS)
    assert names(plan.candidates(0, NODES[0], (), NodeBackoff(), any_class=False)) == [NODES[1], NODES[3]]
    assert names(plan.candidates(0, NODES[0], {NODES[1]}, NodeBackoff(), any_class=True)) == [NODES[2], NODES[3]]


def test_candidates_that_failed_lately_come_last() -> None:
    backoff = NodeBackoff(clock=lambda: 0.0)
    backoff.failed(NODES[1])
    found = standby(CLASS, CLASS, CLASS).candidates(0, NODES[0], (), backoff, any_class=False)
    assert names(found) == [NODES[2], NODES[1]]


def test_pause_doubles_with_each_failure_in_a_row_up_to_the_most_and_ends_when_the_node_served() -> None:
    now = 0.0
    backoff = NodeBackoff(clock=lambda: now)
    pause = FIRST_PAUSE_S
    for _ in range(12):
        backoff.failed(NODES[0])
        assert backoff.is_avoided(NODES[0])
        now += pause - 1e-6
        assert backoff.is_avoided(NODES[0])
        now += 2e-6
        assert not backoff.is_avoided(NODES[0])
        pause = min(2 * pause, MAXIMUM_PAUSE_S)
    backoff.served(NODES[0])
    backoff.failed(NODES[0])
    now += FIRST_PAUSE_S + 1e-6
    assert not backoff.is_avoided(NODES[0])
