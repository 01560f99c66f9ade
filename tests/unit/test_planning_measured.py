"""From measurements to what planners take: times of one row, links by direction, priors."""

from __future__ import annotations

from itertools import permutations

import pytest

from bsns.planning.measured import NEWCOMER_LINK, planning_links, planning_node
from bsns.planning.problem import Link, PlanningError
from bsns.protocol.identifiers import ModelId, address
from bsns.protocol.measurements import LinkTiming, NodeMeasurements, UnitTiming

A, B, C, D = (address(bytes([number]) * 20) for number in range(1, 5))


def measured(node: str, *links: LinkTiming) -> NodeMeasurements:
    timings = (UnitTiming("block", 100, 7, 405, 9), UnitTiming("head", 30, 2, 80, 3))
    return NodeMeasurements(ModelId(bytes(32)), address(node), 1, b"c" * 32, 5_000, timings, links)


def test_planning_node_alone_takes_the_time_of_a_decoded_token() -> None:
    node = planning_node(measured(A))
    assert (node.node, node.memory_bytes, node.execution_class) == (A, 5_000, b"c" * 32)
    assert node.times_ns == {"block": 100, "head": 30}
    assert node.host_bytes_per_second == 0


def test_planning_node_in_batches_takes_one_sessions_part_rounded_up() -> None:
    assert planning_node(measured(A), batch=8).times_ns == {"block": 51, "head": 10}


@pytest.mark.parametrize("batch", [0, 2, 64])
def test_planning_node_for_a_batch_nobody_measures_is_refused(batch: int) -> None:
    with pytest.raises(PlanningError, match=f"not of {batch}"):
        planning_node(measured(A), batch=batch)


def test_planning_links_are_the_senders_word_then_the_receivers_then_the_prior() -> None:
    nodes = [
        measured(A, LinkTiming(B, 4_001, 10), LinkTiming(C, 600, 70)),
        measured(B, LinkTiming(A, 8_000, 20), LinkTiming(D, 2, 2)),
        measured(C),
    ]
    for order in permutations(nodes):
        links = planning_links(order)
        assert links.between(A, B) == Link(2_000, 10)
        assert links.between(B, A) == Link(4_000, 20)
        assert links.between(A, C) == links.between(C, A) == Link(300, 70)
        assert links.between(B, C) == NEWCOMER_LINK
        # D gave no measurements: the plan is not about it.
        assert (B, D) not in links.measured
    assert planning_links(nodes, prior=None).between(B, C) is None


def test_planning_links_of_a_node_given_twice_are_refused() -> None:
    with pytest.raises(PlanningError, match="twice"):
        planning_links([measured(A), measured(A, LinkTiming(B, 1, 1))])
