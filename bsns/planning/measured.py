"""From what nodes measured and signed to what planners take: `PlanningNode` and `Links`.

Owns this translation, the prior for pairs of nodes that have not measured each other yet, and which measurements no
plan can be made with. Promises integers and that equal measurements give equal inputs in whatever order they come. Does
not judge whether a node told the truth.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from eth_typing import ChecksumAddress

from bsns.planning.problem import Link, Links, PlanningError, PlanningNode, check_link, check_node
from bsns.protocol.measurements import BATCHED_SESSIONS, LinkTiming, NodeMeasurements
from bsns.protocol.model_graph import ModelGraph

NEWCOMER_LINK: Final = Link(latency_ns=25_000_000, bytes_per_second=12_500_000)
"""Two nodes that know nothing of each other: 25 ms one way, as between cities of one continent, and 100 Mbit/s, which
is also what Petals assumes of a server whose speed test failed."""


def planning_node(measurements: NodeMeasurements, *, batch: int = 1) -> PlanningNode:
    """A node as planners see it. The time of one row is that of one decoded token: of a session alone (`batch` 1), or
    its part of a step of `batch` sessions (BATCHED_SESSIONS), rounded up.

    PlanningError for another `batch`: nodes do not measure it.
    """
    if batch == 1:
        times = {item.unit_kind: item.decode_nanoseconds for item in measurements.unit_timings}
    elif batch == BATCHED_SESSIONS:
        times = {item.unit_kind: -(-item.batched_decode_nanoseconds // batch) for item in measurements.unit_timings}
    else:
        raise PlanningError(f"nodes measure steps of 1 and of {BATCHED_SESSIONS} sessions, not of {batch}")
    return PlanningNode(measurements.node, measurements.memory_bytes, measurements.execution_class, times)


def planning_links(measurements: Iterable[NodeMeasurements], *, prior: Link | None = NEWCOMER_LINK) -> Links:
    """The links among the nodes of `measurements`, each as its sender measured it; half the round trip is the latency.

    Where only the other direction was measured, that one stands for both. PlanningError for a node that is there twice.
    """
    senders: dict[ChecksumAddress, NodeMeasurements] = {}
    for item in measurements:
        if item.node in senders:
            raise PlanningError(f"the measurements hold node {item.node} twice")
        senders[item.node] = item
    measured = {
        (sender, timing.node): _link(timing)
        for sender, item in senders.items()
        for timing in item.links
        if timing.node in senders
    }
    reverse = {(receiver, sender): link for (sender, receiver), link in measured.items()}
    return Links(prior, reverse | measured)


def check_measurements(measurements: NodeMeasurements, graph: ModelGraph, *, batch: int = 1) -> None:
    """PlanningError, with the reason, for measurements that would keep every node from a plan for `graph`: one that
    takes them as an input fails, whoever else is in it. Kinds of units that the graph does not have are refused, too:
    they would only make records long.
    """
    node = planning_node(measurements, batch=batch)
    check_node(graph, node)
    unknown = sorted(set(node.times_ns) - {item.timing_key for item in graph.operators})
    if unknown:
        raise PlanningError(f"node {node.node} measured {unknown[0]!r}, which {graph.name!r} does not have")
    size = sum(tensor.size_bytes for tensor in graph.tensors)
    for timing in measurements.links:
        check_link(_link(timing), size, f"the link from {node.node} to {timing.node}")


def _link(timing: LinkTiming) -> Link:
    return Link(timing.round_trip_nanoseconds // 2, timing.bytes_per_second)
