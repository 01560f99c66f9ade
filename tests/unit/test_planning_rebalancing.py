"""What becomes of a plan when the swarm changes: small cases by hand, and random swarms that live for a while."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bsns.planning import FREE_LINKS, PlanningError, PlanningNode, Problem, Terms, partition
from bsns.planning.rebalancing import Change, MoveTerms, Trigger, drifted, rebalance
from bsns.protocol.identifiers import ModelId, address
from bsns.protocol.measurements import NodeMeasurements, UnitTiming
from bsns.protocol.model_graph import MODEL_INPUT, ModelGraph, Operator, Parameter, Tensor
from bsns.protocol.plan import ShardPlan

UNIT_BYTES = 100_000_000
MILLISECOND = 1_000_000
FAST_LOADS = MoveTerms(load_bytes_per_second=10**12)


def chain(units: int) -> ModelGraph:
    """Equal units in a row, each with weights of its own."""
    return ModelGraph(
        "chain",
        tuple(Operator(f"unit {number}", "unit", 1, (number,)) for number in range(units)),
        (
            Tensor("input", MODEL_INPUT, (0,), 8),
            *(
                Tensor(f"cut {number}", number, (number + 1,) if number + 1 < units else (), 8, number + 1 == units)
                for number in range(units)
            ),
        ),
        tuple(Parameter(f"weights {number}", UNIT_BYTES) for number in range(units)),
    )


def node(number: int, units: int, milliseconds: int) -> PlanningNode:
    """Room for `units` units, of which one takes so many milliseconds."""
    where = address(number.to_bytes(20, "big"))
    return PlanningNode(where, units * UNIT_BYTES, bytes(32), {"unit": milliseconds * MILLISECOND})


def problem(units: int, nodes: list[PlanningNode], **terms: int) -> Problem:
    return Problem(
        chain(units), tuple(nodes), FREE_LINKS, terms=Terms(concurrent_sessions=1, session_tokens=1, **terms)
    )


def planned(units: int, nodes: list[PlanningNode], **terms: int) -> ShardPlan:
    made = problem(units, nodes, **terms)
    return partition(made.graph, made.nodes, made.links, terms=made.terms).to_shard_plan()


PAIR = [node(1, 4, 10), node(2, 4, 10)]


def test_unchanged_swarm_stays() -> None:
    decision = rebalance(planned(8, PAIR), problem(8, PAIR), FAST_LOADS)
    assert (decision.change, decision.moved_bytes, decision.gain) == (Change.STAY, 0, 0)
    assert decision.partition.to_shard_plan().root == planned(8, PAIR).root


def test_newcomer_becomes_a_replica_without_anybody_else_loading() -> None:
    swarm = [*PAIR, node(3, 4, 10), node(4, 4, 10)]
    decision = rebalance(planned(8, PAIR), problem(8, swarm), MoveTerms())
    assert (decision.trigger, decision.change) == (Trigger.MEMBERSHIP, Change.JOIN)
    assert (decision.load_bytes, decision.moved_bytes) == (4 * UNIT_BYTES, 8 * UNIT_BYTES)
    assert decision.gain == pytest.approx(1, abs=1e-6)


def test_node_that_became_slow_gives_units_away() -> None:
    even = [node(1, 8, 10), node(2, 8, 10)]
    slowed = [node(1, 8, 10), node(2, 8, 40)]
    decision = rebalance(planned(8, even, stage_count=2), problem(8, slowed, stage_count=2), MoveTerms())
    assert decision.trigger is Trigger.DRIFT
    assert decision.change is not Change.STAY
    of_slow = next(stage for stage in decision.partition.stages if stage.nodes[0].node == slowed[1].node)
    assert of_slow.end - of_slow.first < 4
    assert decision.gain > 0.5


def test_change_that_does_not_pay_its_load_within_the_horizon_is_not_made() -> None:
    even, slowed = [node(1, 8, 10), node(2, 8, 10)], [node(1, 8, 10), node(2, 8, 40)]
    plan, now = planned(8, even, stage_count=2), problem(8, slowed, stage_count=2)
    for horizon, change in ((3, Change.STAY), (600, Change.NEARBY)):
        terms = MoveTerms(horizon_seconds=horizon, load_bytes_per_second=UNIT_BYTES, minimum_gain_bps=500)
        decision = rebalance(plan, now, terms)
        assert (decision.change is Change.STAY) == (change is Change.STAY)


def test_gain_below_the_minimum_is_not_taken() -> None:
    even, slower = [node(1, 8, 10), node(2, 8, 10)], [node(1, 8, 10), node(2, 8, 12)]
    plan, now = planned(8, even, stage_count=2), problem(8, slower, stage_count=2)
    assert rebalance(plan, now, replace(FAST_LOADS, minimum_gain_bps=3_000)).change is Change.STAY


def test_stage_without_a_node_is_repaired_whatever_it_costs() -> None:
    swarm = [node(1, 4, 10), node(2, 4, 10), node(3, 4, 500)]
    plan = planned(8, swarm[:2])
    slow_loads = MoveTerms(horizon_seconds=1, load_bytes_per_second=1)
    decision = rebalance(plan, problem(8, [swarm[0], swarm[2]]), slow_loads)
    assert (decision.trigger, decision.before_ns) == (Trigger.UNCOVERED, None)
    assert {item.node for item in decision.partition.to_shard_plan().assignments} == {swarm[0].node, swarm[2].node}


def test_stage_without_a_node_takes_a_replica_that_another_can_spare() -> None:
    plan = planned(8, [node(1, 4, 10), node(2, 4, 10), node(3, 4, 10)])
    lone = next(items[0] for stage in range(2) if len(items := plan.replicas(stage)) == 1)
    left = [item for item in (node(1, 4, 10), node(2, 4, 10), node(3, 4, 10)) if item.node != lone.node]
    decision = rebalance(plan, problem(8, left), MoveTerms())
    assert decision.trigger is Trigger.UNCOVERED
    assert [len(stage.nodes) for stage in decision.partition.stages] == [1, 1]
    assert decision.moved_bytes == 4 * UNIT_BYTES


def test_swarm_that_no_longer_holds_the_model_says_so() -> None:
    left = [PAIR[0], node(3, 3, 10), node(4, 1, 10)]
    with pytest.raises(PlanningError):
        rebalance(planned(8, PAIR), problem(8, left, maximum_stages=2), MoveTerms())


def test_plan_of_another_model_is_refused() -> None:
    with pytest.raises(PlanningError, match="units"):
        rebalance(planned(8, PAIR), problem(7, PAIR), MoveTerms())


def test_drift_is_seen_either_way_and_beyond_the_threshold_only() -> None:
    def measured(number: int, nanoseconds: int) -> NodeMeasurements:
        timings = (UnitTiming("unit", nanoseconds, 1, 1, 1),)
        return NodeMeasurements(ModelId(bytes(32)), node(number, 1, 1).node, 1, bytes(32), 1, timings)

    then = [measured(number, 1_000) for number in range(1, 6)]
    now = {item.node: item for item in map(measured, range(1, 5), (1_250, 1_251, 800, 799))}
    assert drifted(then, now, 2_500) == (then[1].node, then[3].node)


@st.composite
def lives(draw: st.DrawFn) -> tuple[int, list[PlanningNode], list[list[tuple[int, int]]]]:
    """A model, its nodes, and at each moment who of them is there and how slow."""
    units = draw(st.integers(2, 10))
    count = draw(st.integers(2, 7))
    nodes = [node(number + 1, draw(st.integers(1, units)), draw(st.integers(1, 50))) for number in range(count)]
    moments = draw(
        st.lists(
            st.lists(st.tuples(st.integers(0, count - 1), st.integers(1, 50)), min_size=1, max_size=count),
            min_size=1,
            max_size=4,
        )
    )
    return units, nodes, moments


@settings(max_examples=60, deadline=None)
@given(lives(), st.integers(0, 3))
def test_whatever_happens_a_swarm_that_can_serve_does_and_every_change_pays(
    life: tuple[int, list[PlanningNode], list[list[tuple[int, int]]]], seed: int
) -> None:
    units, nodes, moments = life
    try:
        plan = planned(units, nodes)
    except PlanningError:
        return
    for moment in moments:
        there = {index: replace(nodes[index], times_ns={"unit": slow * MILLISECOND}) for index, slow in moment}
        try:
            now = problem(units, list(there.values()))
            decision = rebalance(plan, now, MoveTerms(), seed=seed)
        except PlanningError:
            with pytest.raises(PlanningError):
                planned(units, list(there.values()))
            continue
        assert decision == rebalance(plan, now, MoveTerms(), seed=seed)
        following = decision.partition.to_shard_plan()  # checks that each unit is covered once
        present = {item.node: item for item in now.nodes}
        for item in following.assignments:
            assert (item.end_unit - item.first_unit) * UNIT_BYTES <= present[item.node].memory_bytes
        if decision.change is Change.STAY:
            assert decision.before_ns is not None
            assert {(item.first_unit, item.end_unit, item.node) for item in following.assignments} == {
                (item.first_unit, item.end_unit, item.node) for item in plan.assignments if item.node in present
            }
        elif decision.before_ns is not None:
            assert decision.gain >= 0.05
        if decision.change is Change.JOIN:
            spans = {item.node: (item.first_unit, item.end_unit) for item in following.assignments}
            for item in plan.assignments:
                assert item.node not in present or spans[item.node] == (item.first_unit, item.end_unit)
        plan = following
