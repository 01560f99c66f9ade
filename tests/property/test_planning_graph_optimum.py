"""Graph planners against brute force over every acyclic labelled partition of small random graphs."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from unittest import mock

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from bsns.planning import bounds, genetic, milp, slice_graph
from bsns.planning.ideals import GraphArrays
from bsns.planning.problem import (
    Link,
    Links,
    Objective,
    Partition,
    PlanningNode,
    Problem,
    Terms,
    Transfers,
    evaluate,
)
from bsns.protocol.identifiers import address
from bsns.protocol.model_graph import ModelGraph, Operator, Parameter, Tensor


@st.composite
def _problems(draw: st.DrawFn, largest: int = 6, alike: bool = True) -> Problem:
    count = draw(st.integers(2, largest))
    operators = tuple(
        Operator(f"v{item}", f"v{item}", 1, parameters=(item // 2,), peak_bytes=draw(st.integers(0, 9)))
        for item in range(count)
    )
    tensors = []
    for producer in range(count - 1):
        readers = draw(st.sets(st.integers(producer + 1, count - 1), max_size=3))
        if readers:
            tensors.append(Tensor(f"t{producer}", producer, tuple(sorted(readers)), draw(st.integers(0, 40))))
    graph = ModelGraph("random", operators, tuple(tensors), tuple(Parameter(f"p{i}", 7) for i in range(count)))
    kinds = draw(st.integers(2, 3))
    times = {item.timing_key: draw(st.integers(1, 60)) for item in operators}
    nodes = []
    for number in range(kinds):
        if number and not alike:
            times = {key: draw(st.integers(1, 60)) for key in times}
        memory, host = 2**20, 0
        if draw(st.booleans()) and not alike:
            memory, host = 10, 10**9
        nodes.append(PlanningNode(address((number + 1).to_bytes(20, "big")), memory, bytes(32), times, host))
    return Problem(
        graph,
        tuple(nodes),
        Links(Link(draw(st.sampled_from([0, 5])), 10**9)),
        draw(st.sampled_from(Objective)),
        Terms(spread_leftover=False, free_order=True, transfers=draw(st.sampled_from(Transfers))),
    )


def _orders(problem: Problem) -> Iterator[tuple[int, ...]]:
    before = problem.graph.predecessors()

    def extend(order: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
        if len(order) == len(before):
            yield order
        for item in range(len(before)):
            if item not in order and before[item] <= set(order):
                yield from extend((*order, item))

    yield from extend(())


def _optimum(problem: Problem, node_orders: Sequence[tuple[PlanningNode, ...]]) -> int:
    """The least value over every assignment of operators to stages that ascends along edges."""
    before = problem.graph.predecessors()
    count, stages = len(before), problem.maximum_stages
    best: list[int] = []

    def extend(assignment: tuple[int, ...]) -> None:
        if len(assignment) < count:
            least = max((assignment[item] for item in before[len(assignment)]), default=0)
            for stage in range(least, stages):
                extend((*assignment, stage))
            return
        order = sorted(range(count), key=lambda item: (assignment[item], item))
        for nodes in node_orders:
            cut, found = 0, []
            for stage in range(stages):
                size = assignment.count(stage)
                if size:
                    found.append((cut, cut + size, (nodes[stage],)))
                cut += size
            value = evaluate(problem, order, found, lower_bound_ns=0, bound="", solver="brute force").value_ns
            best.append(value)

    extend(())
    return min(best)


def _assert_acyclic(problem: Problem, found: Partition) -> None:
    stage_of = {
        found.order[place]: number
        for number, stage in enumerate(found.stages)
        for place in range(stage.first, stage.end)
    }
    assert sorted(stage_of) == list(range(len(problem.graph.operators)))
    for operator, before in enumerate(problem.graph.predecessors()):
        assert all(stage_of[item] <= stage_of[operator] for item in before)


@given(problem=_problems(largest=5, alike=False))
@settings(max_examples=60, deadline=None)
def test_slicing_of_every_order_in_a_node_order_equals_brute_force(problem: Problem) -> None:
    found = [slice_graph.solve(problem, order) for order in _orders(problem)]
    assert min(item.value_ns for item in found) == _optimum(problem, [problem.nodes])
    for item in found:
        _assert_acyclic(problem, item)
        assert item.lower_bound_ns <= item.value_ns


@given(problem=_problems())
@settings(max_examples=25, deadline=None)
def test_integer_programme_of_alike_nodes_equals_brute_force(problem: Problem) -> None:
    found = milp.solve(problem, time_limit_s=60)
    assert found.value_ns == _optimum(problem, [problem.nodes])
    assert found.lower_bound_ns <= found.value_ns
    _assert_acyclic(problem, found)


@given(problem=_problems(largest=4, alike=False))
@settings(max_examples=25, deadline=None)
def test_integer_programme_of_unlike_nodes_equals_brute_force_over_every_order_of_them(problem: Problem) -> None:
    found = milp.solve(problem, time_limit_s=60)
    assert found.value_ns == _optimum(problem, list(itertools.permutations(problem.nodes, problem.maximum_stages)))
    assert found.lower_bound_ns <= found.value_ns
    _assert_acyclic(problem, found)


@given(problem=_problems(largest=6))
@settings(max_examples=80, deadline=None)
def test_every_bound_is_at_most_the_optimum_and_exact_search_finds_it(problem: Problem) -> None:
    optimum = _optimum(problem, [problem.nodes])
    assert bounds.lower_bound(problem)[0] <= optimum
    plain = slice_graph.solve(problem)
    certified = bounds.certify(problem, plain, effort_s=20)
    assert certified.lower_bound_ns <= optimum <= certified.value_ns <= plain.value_ns
    if problem.objective is Objective.THROUGHPUT:
        assert certified.value_ns == optimum
        assert certified.lower_bound_ns == optimum


@given(problem=_problems(largest=6, alike=False))
@settings(max_examples=80, deadline=None)
def test_every_bound_of_unlike_nodes_is_at_most_what_brute_force_finds(problem: Problem) -> None:
    nodes = problem.nodes
    rotations = [nodes[shift:] + nodes[:shift] for shift in range(len(nodes))]
    optimum = _optimum(problem, [*rotations, *(item[::-1] for item in rotations)])
    assert bounds.lower_bound(problem)[0] <= optimum
    assert bounds.certify(problem, slice_graph.solve(problem), effort_s=20).lower_bound_ns <= optimum


@given(problem=_problems(largest=6))
@settings(max_examples=60, deadline=None)
def test_bound_from_cuts_alone_is_at_most_the_optimum(problem: Problem) -> None:
    with mock.patch.object(bounds, "_MAXIMUM_IDEALS", 0):
        certified = bounds.certify(problem, slice_graph.solve(problem), effort_s=20)
    assert certified.lower_bound_ns <= _optimum(problem, [problem.nodes])


@given(problem=_problems(largest=7, alike=False), seed=st.integers(0, 3))
@settings(max_examples=25, deadline=None)
def test_genetic_search_is_never_worse_than_plain_slicing_and_repeats_itself(problem: Problem, seed: int) -> None:
    found = genetic.solve(problem, seed=seed, generations=2)
    assert found.value_ns <= slice_graph.solve(problem).value_ns
    assert found == genetic.solve(problem, seed=seed, generations=2)
    _assert_acyclic(problem, found)


@given(problem=_problems(largest=6))
@settings(max_examples=40, deadline=None)
def test_transfers_between_ideals_are_what_evaluation_counts(problem: Problem) -> None:
    arrays = GraphArrays.of(problem.graph, problem.terms.transfers)
    found = slice_graph.solve(problem)
    chain = [set(found.order[: stage.end]) for stage in found.stages]
    rows = [[False] * arrays.count, *([item in ideal for item in range(arrays.count)] for ideal in chain)]
    ideals = np.array(rows)
    received, sent = arrays.transfers(ideals, ideals)
    link = problem.links.prior
    assert link is not None
    for number, stage in enumerate(found.stages):
        assert link.transfer_ns(int(received[number, number + 1])) == stage.receive_ns
        assert link.transfer_ns(int(sent[number, number + 1])) == stage.send_ns
