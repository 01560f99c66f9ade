"""PLAN-01: a plan that constructs covers every unit exactly once per replica chain; one that does not, does not
construct.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from itertools import pairwise

import pytest
from eth_abi.abi import encode
from hypothesis import given, settings
from hypothesis import strategies as st

from bsns.protocol.identifiers import ProtocolError, address, keccak256
from bsns.protocol.merkle import verify
from bsns.protocol.plan import MAXIMUM_ASSIGNMENTS, MAXIMUM_STAGES, Assignment, ShardPlan, execution_class_id

CLASS = execution_class_id("torch-cpu/float32/sdpa")


def node(number: int) -> str:
    return address(number.to_bytes(20))


def build(cuts: list[int], replicas: list[int]) -> tuple[Assignment, ...]:
    found = []
    for stage, (first, end) in enumerate(pairwise(cuts)):
        for replica in range(replicas[stage]):
            found.append(Assignment(stage, replica, first, end, node(1 + len(found)), end - first, CLASS))
    return tuple(found)


@st.composite
def plans(draw: st.DrawFn) -> ShardPlan:
    units = draw(st.integers(1, 40))
    inner = draw(st.sets(st.integers(1, units - 1), max_size=min(8, units - 1))) if units > 1 else set()
    cuts = [0, *sorted(inner), units]
    replicas = draw(st.lists(st.integers(1, 3), min_size=len(cuts) - 1, max_size=len(cuts) - 1))
    return ShardPlan(units, build(cuts, replicas))


@given(plans())
@settings(deadline=None)
def test_plan_that_constructs_covers_each_unit_once_per_replica_chain(plan: ShardPlan) -> None:
    for pick in range(3):
        chain = [plan.replicas(stage)[pick % len(plan.replicas(stage))] for stage in range(plan.stage_count)]
        served = Counter(unit for item in chain for unit in range(item.first_unit, item.end_unit))
        assert served == Counter(range(plan.unit_count))


@given(plans())
@settings(deadline=None, max_examples=40)
def test_plan_every_assignment_is_proven_under_the_root(plan: ShardPlan) -> None:
    for item in plan.assignments:
        assert verify(plan.root, item.leaf, plan.proof(item))
        assert Assignment.from_tuple(item.as_tuple()) == item


@given(plans(), st.data())
@settings(deadline=None, max_examples=200)
def test_plan_with_one_bound_or_number_moved_is_refused(plan: ShardPlan, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(plan.assignments) - 1))
    field = data.draw(st.sampled_from(["stage", "replica", "first_unit", "end_unit"]))
    item = plan.assignments[index]
    value = getattr(item, field) + data.draw(st.sampled_from([-1, 1, 3]))
    changed = dataclasses.replace(item, **{field: value})
    with pytest.raises(ProtocolError):
        ShardPlan(plan.unit_count, (*plan.assignments[:index], changed, *plan.assignments[index + 1 :]))


@given(plans(), st.data())
@settings(deadline=None, max_examples=100)
def test_plan_with_two_assignments_swapped_is_refused(plan: ShardPlan, data: st.DataObject) -> None:
    if len(plan.assignments) < 2:
        return
    first, second = data.draw(st.lists(st.integers(0, len(plan.assignments) - 1), min_size=2, max_size=2, unique=True))
    order = list(plan.assignments)
    order[first], order[second] = order[second], order[first]
    with pytest.raises(ProtocolError):
        ShardPlan(plan.unit_count, tuple(order))


@given(plans(), st.data())
@settings(deadline=None, max_examples=100)
def test_plan_with_a_whole_stage_missing_is_refused(plan: ShardPlan, data: st.DataObject) -> None:
    stage = data.draw(st.integers(0, plan.stage_count - 1))
    with pytest.raises(ProtocolError):
        ShardPlan(plan.unit_count, tuple(item for item in plan.assignments if item.stage != stage))


def test_plan_without_work_weight_or_beyond_its_limits_is_refused() -> None:
    one = build([0, 1], [1])[0]
    with pytest.raises(ProtocolError, match="no work weight"):
        ShardPlan(1, (dataclasses.replace(one, work_weight=0),))
    with pytest.raises(ProtocolError, match="at least one"):
        ShardPlan(1, ())
    stages = MAXIMUM_STAGES + 1
    with pytest.raises(ProtocolError, match="stages"):
        ShardPlan(stages, build(list(range(stages + 1)), [1] * stages))
    with pytest.raises(ProtocolError, match="assignments"):
        ShardPlan(1, build([0, 1], [MAXIMUM_ASSIGNMENTS + 1]))
    assert ShardPlan(MAXIMUM_STAGES, build(list(range(MAXIMUM_STAGES + 1)), [8] * MAXIMUM_STAGES)).stage_count == 32


def test_assignment_leaf_is_the_double_hash_of_its_abi_encoding() -> None:
    item = Assignment(1, 2, 3, 4, node(5), 6, CLASS)
    types = ["uint16", "uint16", "uint32", "uint32", "address", "uint64", "bytes32"]
    assert item.leaf == keccak256(keccak256(encode(types, list(item.as_tuple()))))


@pytest.mark.parametrize(
    "values", [(), (1, 2, 3), ("x",) * 7, (0, 0, 0, 1, "0x12", 1, CLASS), (0, 0, 0, 1, node(1), 1, b"x")]
)
def test_assignment_from_a_tuple_that_is_none_is_refused(values: tuple[object, ...]) -> None:
    with pytest.raises(ProtocolError):
        Assignment.from_tuple(values)
