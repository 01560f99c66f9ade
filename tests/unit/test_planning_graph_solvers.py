"""Graph planners on graphs whose best cut is known by hand, their limits, and their errors."""

from __future__ import annotations

import time

import numpy as np
import pytest

from bsns.planning import bounds, genetic, milp, slice_graph
from bsns.planning.problem import (
    Link,
    Links,
    Objective,
    PlanningError,
    PlanningNode,
    Problem,
    Terms,
    Transfers,
)
from bsns.protocol.identifiers import ChecksumAddress, address
from bsns.protocol.model_graph import ModelGraph, Operator, Parameter, Tensor

_GIGABYTE = Link(0, 10**9)
"""One nanosecond a byte."""
_TERMS = Terms(spread_leftover=False, free_order=True)


def _address(number: int) -> ChecksumAddress:
    return address((number + 1).to_bytes(20, "big"))


def _nodes(graph: ModelGraph, count: int, memory: int = 2**40, host: int = 0) -> tuple[PlanningNode, ...]:
    times = {item.timing_key: item.work for item in graph.operators}
    return tuple(PlanningNode(_address(number), memory, bytes(32), times, host) for number in range(count))


def _graph(work: list[int], edges: dict[int, tuple[int, ...]], size: int = 1, parameter: int = 0) -> ModelGraph:
    return ModelGraph(
        "by-hand",
        tuple(Operator(f"v{number}", f"v{number}", time, (number,)) for number, time in enumerate(work)),
        tuple(Tensor(f"t{producer}", producer, readers, size) for producer, readers in edges.items()),
        tuple(Parameter(f"p{number}", parameter) for number in range(len(work))),
    )


def _chain(work: list[int], size: int = 1, parameter: int = 0) -> ModelGraph:
    return _graph(work, {number: (number + 1,) for number in range(len(work) - 1)}, size, parameter)


def test_slicing_where_a_longer_prefix_ends_at_a_narrower_cut_takes_the_longer_one() -> None:
    # Greedy filling stops before v2, as adding it exceeds the first stage; only the cut after it is cheap.
    graph = ModelGraph(
        "narrow",
        tuple(Operator(f"v{number}", f"v{number}", 10) for number in range(4)),
        (Tensor("a", 0, (1,), 90), Tensor("b", 1, (2,), 90), Tensor("c", 2, (3,), 1)),
    )
    found = slice_graph.solve(Problem(graph, _nodes(graph, 2), Links(_GIGABYTE), terms=_TERMS))
    assert [(stage.first, stage.end) for stage in found.stages] == [(0, 3), (3, 4)]
    assert found.value_ns == 31


def test_genetic_search_reorders_two_branches_that_interleave() -> None:
    # The given order alternates between two chains, so that one stage is best; a stage for each chain cuts nothing.
    work = [10] * 8
    graph = _graph(work, {number: (number + 2,) for number in range(6)}, size=30)
    problem = Problem(graph, _nodes(graph, 2), Links(_GIGABYTE), terms=_TERMS)
    assert slice_graph.solve(problem).value_ns == 80
    found = genetic.solve(problem, generations=3)
    assert (found.value_ns, found.ratio) == (40, 1.0)


def test_genetic_search_puts_the_fast_node_where_the_work_is() -> None:
    graph = _chain([10, 10, 10, 100], size=0)
    slow = {item.timing_key: item.work for item in graph.operators}
    fast = {key: time // 5 for key, time in slow.items()}
    nodes = (
        PlanningNode(_address(0), 2**40, bytes(32), fast),
        PlanningNode(_address(1), 2**40, bytes(32), slow),
    )
    problem = Problem(graph, nodes, Links(_GIGABYTE), terms=_TERMS)
    assert slice_graph.solve(problem).value_ns > 22
    assert genetic.solve(problem, generations=5).value_ns <= 22


def test_genetic_search_without_free_order_keeps_the_order_of_the_graph() -> None:
    graph = _graph([10] * 8, {number: (number + 2,) for number in range(6)}, size=30)
    terms = Terms(spread_leftover=False)
    found = genetic.solve(Problem(graph, _nodes(graph, 2), Links(_GIGABYTE), terms=terms), generations=3)
    assert found.order == tuple(range(8))
    assert found.value_ns == 80


def test_slicing_counts_a_shared_parameter_once_for_each_stage() -> None:
    operators = tuple(Operator(f"v{number}", "v", 10, (0, number + 1)) for number in range(4))
    tensors = tuple(Tensor(f"t{number}", number, (number + 1,), 1) for number in range(3))
    parameters = (Parameter("shared", 100), *(Parameter(f"own{number}", 10) for number in range(4)))
    graph = ModelGraph("tied", operators, tensors, parameters)
    nodes = tuple(PlanningNode(_address(number), 120, bytes(32), {"v": 10}) for number in range(4))
    found = slice_graph.solve(Problem(graph, nodes, Links(_GIGABYTE), terms=_TERMS))
    assert max(stage.end - stage.first for stage in found.stages) <= 2
    fewer = Problem(graph, nodes[:2], Links(_GIGABYTE), terms=_TERMS)
    assert [(stage.first, stage.end) for stage in slice_graph.solve(fewer).stages] == [(0, 2), (2, 4)]


def test_slicing_prefers_streaming_to_a_stage_that_is_slower_for_it() -> None:
    graph = _chain([10, 10], size=1_000, parameter=100)
    problem = Problem(graph, _nodes(graph, 2, memory=150, host=10**9), Links(_GIGABYTE), terms=_TERMS)
    found = slice_graph.solve(problem)
    assert [(stage.first, stage.end, stage.overflow_ns) for stage in found.stages] == [(0, 2, 50)]


def test_slicing_over_a_missing_link_takes_nodes_that_are_linked() -> None:
    graph = _chain([10, 10, 10, 10])
    nodes = _nodes(graph, 3)
    links = Links(None, {(nodes[0].node, nodes[1].node): _GIGABYTE})
    found = slice_graph.solve(Problem(graph, nodes, links, terms=_TERMS))
    assert [stage.nodes[0].node for stage in found.stages] == [nodes[0].node, nodes[1].node]


def test_slicing_of_what_fits_nowhere_says_so() -> None:
    graph = _chain([10] * 4, parameter=100)
    nodes = _nodes(graph, 2, memory=150)
    with pytest.raises(PlanningError, match="400 bytes"):
        slice_graph.solve(Problem(graph, nodes, Links(_GIGABYTE), terms=_TERMS))


def test_slicing_with_a_fixed_number_of_stages_gives_that_number_though_fewer_are_faster() -> None:
    graph = _chain([10, 10, 10], size=1_000)
    nodes = _nodes(graph, 3)
    assert len(slice_graph.solve(Problem(graph, nodes, Links(_GIGABYTE), terms=_TERMS)).stages) == 1
    terms = Terms(spread_leftover=False, free_order=True, stage_count=3)
    assert len(slice_graph.solve(Problem(graph, nodes, Links(_GIGABYTE), terms=terms)).stages) == 3


def test_slicing_gives_leftover_nodes_to_the_slowest_stage() -> None:
    graph = _chain([10, 90], size=0)
    found = slice_graph.solve(Problem(graph, _nodes(graph, 3), Links(_GIGABYTE), terms=Terms()))
    assert [len(stage.nodes) for stage in found.stages] == [1, 2]
    assert found.value_ns == 45
    assert found.lower_bound_ns <= 45


def test_slicing_for_latency_does_not_split_what_one_node_holds() -> None:
    graph = _chain([10, 10, 10])
    found = slice_graph.solve(Problem(graph, _nodes(graph, 3), Links(_GIGABYTE), Objective.LATENCY, _TERMS))
    assert (len(found.stages), found.value_ns, found.ratio) == (1, 30, 1.0)


@pytest.mark.parametrize("transfers", list(Transfers))
def test_slicing_two_thousand_operators_into_32_stages_takes_seconds(transfers: Transfers) -> None:
    draw = np.random.default_rng(1)
    count = 2_000
    edges = {
        number: tuple(sorted({number + 1, *(number + 1 + int(item) for item in draw.integers(0, 9, 2))}))
        for number in range(count - 10)
    }
    graph = _graph([int(item) for item in draw.integers(1, 1_000, count)], edges, size=20)
    problem = Problem(
        graph, _nodes(graph, 32), Links(_GIGABYTE), terms=Terms(spread_leftover=False, transfers=transfers)
    )
    started = time.process_time()
    found = slice_graph.solve(problem)
    assert time.process_time() - started < 15
    assert found.ratio > 0.9


def test_exact_search_proves_a_plan_that_the_fast_bound_does_not() -> None:
    graph = _chain([10] * 6, size=3)
    problem = Problem(graph, _nodes(graph, 3), Links(_GIGABYTE), terms=_TERMS)
    found = slice_graph.solve(problem)
    assert (found.value_ns, found.lower_bound_ns) == (26, 20)
    certified = bounds.certify(problem, found, effort_s=20)
    assert (certified.value_ns, certified.lower_bound_ns, certified.bound) == (26, 26, "all ideals")


def test_fast_bound_of_machines_that_differ_by_a_factor_is_work_over_speed() -> None:
    graph = _chain([30] * 10, size=0)
    times = [{item.timing_key: 30 // speed for item in graph.operators} for speed in (1, 2, 3)]
    nodes = tuple(PlanningNode(_address(number), 2**40, bytes(32), item) for number, item in enumerate(times))
    assert bounds.lower_bound(Problem(graph, nodes, Links(_GIGABYTE), terms=_TERMS)) == (50, "work")


def test_integer_programme_over_unlike_links_says_what_to_use() -> None:
    graph = _chain([10, 10])
    nodes = _nodes(graph, 2)
    links = Links(_GIGABYTE, {(nodes[0].node, nodes[1].node): Link(5, 10**6)})
    with pytest.raises(PlanningError, match="use genetic"):
        milp.solve(Problem(graph, nodes, links, terms=_TERMS), time_limit_s=5)


def test_integer_programme_with_hard_memory_limits_finds_the_only_split() -> None:
    graph = _chain([10, 10, 10, 10], parameter=100)
    problem = Problem(graph, _nodes(graph, 2, memory=200), Links(_GIGABYTE), terms=_TERMS)
    found = milp.solve(problem, time_limit_s=20)
    assert [(stage.first, stage.end) for stage in found.stages] == [(0, 2), (2, 4)]
    assert found.ratio == 1.0
