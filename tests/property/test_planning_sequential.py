"""The sequential planner against trying everything, and PLAN-01 for whatever it is given."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bsns.planning import (
    Link,
    Links,
    Objective,
    PlanningError,
    PlanningNode,
    Problem,
    Terms,
    partition,
    sequential,
)
from bsns.planning.chain import Chain
from bsns.planning.chain_bound import lower_bound
from bsns.planning.problem import SECOND_NS
from bsns.protocol.identifiers import address
from bsns.protocol.model_graph import ModelGraph, Operator, Parameter, Tensor
from tests.unit.planning_instances import every_partition

_KEYS = ("embedding", "block", "head")


@st.composite
def graphs(draw: st.DrawFn, units: int) -> ModelGraph:
    """Units with parameters that some share, caches, peaks, cuts of any width, and a skip connection."""
    count = draw(st.integers(1, units))
    sizes = draw(st.lists(st.integers(0, 9), min_size=count, max_size=count))
    even = draw(st.booleans())
    operators = tuple(
        Operator(
            name=f"unit-{number}",
            timing_key=draw(st.sampled_from(_KEYS)),
            work=draw(st.integers(0, 9)),
            parameters=tuple({number, draw(st.integers(0, count - 1))} if draw(st.booleans()) else {number}),
            peak_bytes=draw(st.integers(0, 3)),
            cache_bytes=draw(st.integers(0, 1)),
        )
        for number in range(count)
    )
    tensors = [
        Tensor(f"cut-{number}", number, (number + 1,), 3 if even else draw(st.integers(0, 9)))
        for number in range(count - 1)
    ]
    if count > 2 and not even:
        tensors.append(Tensor("skip", 0, (count - 1,), draw(st.integers(0, 5))))
    tensors.append(Tensor("output", count - 1, (), 50, is_output=True))
    parameters = tuple(Parameter(f"weight-{number}", size) for number, size in enumerate(sizes))
    return ModelGraph("drawn", operators, tuple(tensors), parameters)


@st.composite
def problems(draw: st.DrawFn, units: int = 5, nodes: int = 4) -> Problem:
    """Any problem that has no obvious contradiction; many have no solution."""
    graph = draw(graphs(units))
    fleet = tuple(
        PlanningNode(
            address((number + 1).to_bytes(20, "big")),
            draw(st.integers(3, 40)),
            bytes([number]) * 32,
            {key: draw(st.integers(1, 12)) for key in _KEYS},
            draw(st.sampled_from([0, 0, SECOND_NS, SECOND_NS // 3])),
        )
        for number in range(draw(st.integers(1, nodes)))
    )
    link = st.builds(Link, st.integers(0, 5), st.sampled_from([SECOND_NS, SECOND_NS // 2, 2**62]))
    pairs = [(a.node, b.node) for a, b in itertools.permutations(fleet, 2)]
    measured = draw(st.dictionaries(st.sampled_from(pairs), link)) if pairs else {}
    terms = Terms(
        replicas=draw(st.sampled_from([1, 1, 1, 2])),
        stage_count=draw(st.none() | st.integers(1, 4)),
        maximum_stages=draw(st.sampled_from([2, 3, 32])),
        maximum_assignments=draw(st.sampled_from([3, 256])),
        spread_leftover=draw(st.booleans()),
        concurrent_sessions=2,
        session_tokens=1,
    )
    try:
        return Problem(graph, fleet, Links(draw(st.none() | link), measured), draw(st.sampled_from(Objective)), terms)
    except PlanningError:
        return draw(problems(units, nodes))


@settings(deadline=None, max_examples=150)
@given(problem=problems())
def test_solve_exactly_equals_the_best_of_all_partitions(problem: Problem) -> None:
    values = [item.value_ns for item in every_partition(problem)]
    if not values:
        with pytest.raises(PlanningError):
            sequential.solve(problem)
        return
    found = sequential.solve(problem)
    assert found.value_ns == min(values)
    assert found.lower_bound_ns == found.value_ns
    assert found.ratio == 1.0


@settings(deadline=None, max_examples=120)
@given(problem=problems())
def test_solve_by_search_is_a_partition_between_the_optimum_and_the_recursion(problem: Problem) -> None:
    values = [item.value_ns for item in every_partition(problem)]
    recursion = sequential.recursion(problem)
    try:
        found = sequential.solve(problem, exact_work=0)
    except PlanningError:
        assert recursion is None
        return
    assert found.lower_bound_ns <= min(values) <= found.value_ns
    if recursion is not None:
        assert found.value_ns <= recursion.value_ns
    assert "exact" not in found.solver


@settings(deadline=None, max_examples=120)
@given(problem=problems())
def test_lower_bound_is_below_every_partition(problem: Problem) -> None:
    values = [item.value_ns for item in every_partition(problem)]
    if values:
        bound, argument = lower_bound(Chain(problem), max(values))
        assert bound <= min(values)
        assert argument


@settings(deadline=None, max_examples=80)
@given(
    problem=problems(units=9, nodes=7), seed=st.integers(0, 3), exact_work=st.sampled_from([0, sequential.EXACT_WORK])
)
def test_plan_covers_every_unit_once_in_each_replica_chain(problem: Problem, seed: int, exact_work: int) -> None:
    """PLAN-01."""
    try:
        found = sequential.solve(problem, seed=seed, exact_work=exact_work)
    except PlanningError:
        return
    plan = found.to_shard_plan()
    for replica in range(problem.terms.replicas):
        chain = [item for item in plan.assignments if item.replica == replica]
        covered = [unit for item in chain for unit in range(item.first_unit, item.end_unit)]
        assert covered == list(range(len(problem.graph.operators)))
    serving = [item.node for item in plan.assignments]
    assert sorted([*serving, *(node.node for node in found.unused)]) == sorted(node.node for node in problem.nodes)
    assert sequential.solve(problem, seed=seed, exact_work=exact_work) == found
    assert found.lower_bound_ns <= found.value_ns


@settings(deadline=None, max_examples=30)
@given(problem=problems(units=6, nodes=4))
def test_partition_by_hybrid_of_a_fixed_order_is_the_sequential_answer(problem: Problem) -> None:
    try:
        found = sequential.solve(problem)
    except PlanningError as error:
        with pytest.raises(PlanningError, match="^" + str(error).split()[0]):
            partition(problem.graph, problem.nodes, problem.links, problem.objective, terms=problem.terms)
        return
    assert found == partition(problem.graph, problem.nodes, problem.links, problem.objective, terms=problem.terms)
