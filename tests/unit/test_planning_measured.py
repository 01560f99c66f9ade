"""From measurements to what planners take: times of one row, links by direction, priors."""

from __future__ import annotations

import dataclasses
from itertools import permutations
from typing import Any

import pytest

from bsns.planning.measured import NEWCOMER_LINK, check_measurements, planning_links, planning_node
from bsns.planning.problem import Link, PlanningError
from bsns.protocol.identifiers import ModelId, address
from bsns.protocol.measurements import LinkTiming, NodeMeasurements, UnitTiming
from bsns.protocol.model_graph import ModelGraph
from tests.unit.shape_manifests import TEXT

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


def _timings(*values: tuple[str, int]) -> tuple[UnitTiming, ...]:
    return tuple(UnitTiming(kind, time, time, time, time) for kind, time in values)


WHOLE = (("embedding", 1), ("block", 100), ("head", 30))
EXTREMES: dict[str, tuple[dict[str, Any], str]] = {
    "a kind is missing": ({"unit_timings": _timings(*WHOLE[:2])}, "did not measure 'head'"),
    "a kind too many": ({"unit_timings": _timings(*WHOLE, ("tail", 1))}, "measured 'tail', which 'shapes'"),
    "a unit takes an age": ({"unit_timings": _timings(*WHOLE[:2], ("head", 2**64 - 1))}, r"time of 'head'"),
    "the model takes an age": ({"unit_timings": _timings(*WHOLE[:2], ("head", 2**52))}, r"at most 2\*\*52"),
    "more memory than there is": ({"memory_bytes": 2**64 - 1}, "memory_bytes"),
    "a link of an age": ({"links": (LinkTiming(B, 2**60, 1),)}, f"link from {A} to {B} takes more than"),
    "a link of two ages": ({"links": (LinkTiming(B, 2**64 - 1, 1),)}, f"link from {A} to {B}: latency_ns"),
    "a link of light": ({"links": (LinkTiming(B, 1, 2**64 - 1),)}, f"link from {A} to {B}: bytes_per_second"),
}


@pytest.mark.parametrize("case", EXTREMES)
def test_check_of_measurements_that_nothing_can_be_planned_with_names_node_and_reason(case: str) -> None:
    graph = ModelGraph.of_manifest(TEXT)
    fine = dataclasses.replace(measured(A, LinkTiming(B, 4_001, 10)), unit_timings=_timings(*WHOLE))
    check_measurements(fine, graph)
    changes, said = EXTREMES[case]
    with pytest.raises(PlanningError, match=said) as raised:
        check_measurements(dataclasses.replace(fine, **changes), graph)
    assert A in str(raised.value)
