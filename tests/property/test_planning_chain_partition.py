"""The dynamic programme against trying everything."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bsns.protocol.identifiers import address
from coordinator.planning import NodeCapability, PlanningError, UnitCost, plan_chain, to_shard_plan

_KINDS = ("embedding", "block", "head")


def _unit(index: int, kind: str, size: int, work: int) -> UnitCost:
    return UnitCost(index, f"{kind}-{index}", kind, work, size, size // 2, 1)


def _node(number: int, times: tuple[int, int, int], memory: int) -> NodeCapability:
    return NodeCapability(
        address(number.to_bytes(20, "big")), memory, bytes([number]) * 32, dict(zip(_KINDS, times, strict=True))
    )


_units = st.lists(st.tuples(st.sampled_from(_KINDS), st.integers(0, 9), st.integers(0, 5)), min_size=1, max_size=7).map(
    lambda items: [_unit(index, *item) for index, item in enumerate(items)]
)
_nodes = st.lists(st.tuples(st.tuples(*[st.integers(0, 9)] * 3), st.integers(1, 40)), min_size=1, max_size=5).map(
    lambda items: [_node(index + 1, *item) for index, item in enumerate(items)]
)


def _every_way(units: int, positions: int, stages: int) -> Iterator[list[tuple[int, int, int]]]:
    """All (position, first, end) of contiguous non-empty stages on increasing positions."""
    for chosen in itertools.combinations(range(positions), stages):
        for inner in itertools.combinations(range(1, units), stages - 1):
            edges = [0, *inner, units]
            yield [(position, edges[i], edges[i + 1]) for i, position in enumerate(chosen)]


def _costs(
    units: Sequence[UnitCost], groups: Sequence[Sequence[NodeCapability]], way: list[tuple[int, int, int]]
) -> tuple[int, int] | None:
    times = []
    for position, first, end in way:
        needed = sum(unit.parameter_bytes + unit.cache_bytes for unit in units[first:end])
        if any(needed > node.memory_bytes for node in groups[position]):
            return None
        times.append(max(sum(node.time_of(unit) for unit in units[first:end]) for node in groups[position]))
    return max(times), sum(times)


@settings(deadline=None, max_examples=300)
@given(units=_units, nodes=_nodes, stages=st.integers(1, 5), replicas=st.integers(1, 2))
def test_plan_chain_equals_the_best_of_all_ways(
    units: list[UnitCost], nodes: list[NodeCapability], stages: int, replicas: int
) -> None:
    groups = [nodes[i * replicas : (i + 1) * replicas] for i in range(len(nodes) // replicas)]
    possible = [
        costs
        for way in _every_way(len(units), len(groups), stages)
        if (costs := _costs(units, groups, way)) is not None
    ]
    if not possible:
        with pytest.raises(PlanningError):
            plan_chain(units, nodes, stage_count=stages, replicas=replicas)
        return
    partition = plan_chain(units, nodes, stage_count=stages, replicas=replicas)
    best = min(costs[0] for costs in possible)
    assert partition.bottleneck_nanoseconds == best
    # Among the plans with that slowest stage, the least total.
    assert partition.total_nanoseconds == min(costs[1] for costs in possible if costs[0] == best)
    assert len(partition.stages) == stages
    used = [node for stage in partition.stages for node in stage.nodes]
    assert sorted(node.node for node in (*used, *partition.unused)) == sorted(node.node for node in nodes)
    assert plan_chain(units, nodes, stage_count=stages, replicas=replicas) == partition
    plan = to_shard_plan(partition)
    assert plan.unit_count == len(units)
    assert sum(item.work_weight for item in plan.assignments if item.replica == 0) >= sum(unit.work for unit in units)


@settings(deadline=None, max_examples=100)
@given(units=_units, nodes=_nodes)
def test_plan_chain_without_a_stage_count_uses_every_node_there_are_units_for(
    units: list[UnitCost], nodes: list[NodeCapability]
) -> None:
    try:
        partition = plan_chain(units, nodes)
    except PlanningError:
        return
    assert len(partition.stages) == min(len(units), len(nodes))
