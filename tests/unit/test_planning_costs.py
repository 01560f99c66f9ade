"""Inputs of the planners, and errors that name what is in the way."""

from __future__ import annotations

import dataclasses

import pytest

from bsns.protocol.identifiers import ModelId, address
from bsns.protocol.measurements import NodeMeasurements, UnitTiming
from coordinator.dispatch.plan_publication import PlanPolicy, compute_plan
from coordinator.planning import NodeCapability, PlanningError, UnitCost, capability_of, plan_chain, unit_costs
from tests.integration.coordinator_fixtures import EXECUTION_CLASS, tiny_manifest

_TIMES = {"embedding": 1, "block": 10, "head": 20}


def _node(number: int, memory: int = 10**9, times: dict[str, int] | None = None) -> NodeCapability:
    return NodeCapability(address(number.to_bytes(20, "big")), memory, EXECUTION_CLASS, times or _TIMES)


def _measured(number: int, factor: int = 1) -> NodeMeasurements:
    timings = tuple(UnitTiming(kind, factor * time, time) for kind, time in _TIMES.items())
    return NodeMeasurements(ModelId(bytes(32)), address(number.to_bytes(20, "big")), 1, EXECUTION_CLASS, 10**9, timings)


def test_unit_costs_of_a_manifest_give_blocks_the_cache_of_all_sessions() -> None:
    units = unit_costs(tiny_manifest(), concurrent_sessions=3, session_tokens=1_000)
    # The context limit of 128 tokens bounds what a session can hold.
    assert [unit.cache_bytes for unit in units] == [0, *[3 * 128 * 64] * 4, 0]
    assert [unit.work for unit in units] == [0, 500, 500, 500, 500, 500]


def test_capability_of_measurements_keeps_decode_times() -> None:
    capability = capability_of(_measured(7))
    assert dict(capability.decode_nanoseconds) == _TIMES


def test_plan_chain_with_a_unit_too_large_for_every_node_names_the_unit() -> None:
    units = list(unit_costs(tiny_manifest()))
    units[2] = dataclasses.replace(units[2], parameter_bytes=10**12)
    with pytest.raises(PlanningError, match=r"unit 2 \(block-2\)"):
        plan_chain(units, [_node(1), _node(2)])


def test_plan_chain_with_a_node_too_small_for_any_unit_names_the_node() -> None:
    small = _node(2, memory=10)
    with pytest.raises(PlanningError, match=small.node):
        plan_chain(unit_costs(tiny_manifest()), [_node(1), small])


def test_plan_chain_with_a_kind_not_measured_names_node_and_kind() -> None:
    poor = _node(1, times={"block": 1})
    with pytest.raises(PlanningError, match=f"{poor.node} did not measure units of kind 'embedding'"):
        plan_chain(unit_costs(tiny_manifest()), [poor])


@pytest.mark.parametrize(("stages", "replicas"), [(0, 1), (7, 1), (3, 1), (2, 2)])
def test_plan_chain_with_impossible_numbers_says_which(stages: int, replicas: int) -> None:
    with pytest.raises(PlanningError, match="stages"):
        plan_chain(unit_costs(tiny_manifest()), [_node(1), _node(2)], stage_count=stages, replicas=replicas)


def test_plan_chain_with_a_unit_out_of_order_or_a_node_twice_is_refused() -> None:
    units = unit_costs(tiny_manifest())
    with pytest.raises(PlanningError, match="unit 0 has index 1"):
        plan_chain(units[1:], [_node(1)])
    with pytest.raises(PlanningError, match="twice"):
        plan_chain(units, [_node(1), _node(1)])
    with pytest.raises(PlanningError, match="no units"):
        plan_chain([], [_node(1)])
    with pytest.raises(PlanningError, match="negative"):
        plan_chain([UnitCost(0, "a", "block", -1, 0, 0, 0)], [_node(1)])


def test_compute_plan_in_any_order_of_measurements_gives_one_root() -> None:
    measured = {item.node: item for item in (_measured(3), _measured(1, 4), _measured(2))}
    policy = PlanPolicy(fee_per_token=1)
    plan = compute_plan(tiny_manifest(), measured, policy)
    again = compute_plan(tiny_manifest(), dict(reversed(measured.items())), policy)
    assert plan.root == again.root
    # The slow node (second largest address is fast) gets the fewest blocks.
    blocks = {item.node: item.end_unit - item.first_unit for item in plan.assignments}
    assert min(blocks, key=lambda node: blocks[node]) == measured[address((1).to_bytes(20, "big"))].node


def test_plan_chain_with_as_many_units_as_a_large_model_takes_a_moment() -> None:
    manifest = tiny_manifest(blocks=98)
    partition = plan_chain(
        unit_costs(manifest), [_node(number, times={**_TIMES, "block": 9 + number % 3}) for number in range(1, 33)]
    )
    assert len(partition.stages) == 32
