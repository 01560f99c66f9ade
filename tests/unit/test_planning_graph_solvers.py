"""Graph planners on graphs whose best cut is known by hand, their limits, and their errors."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.optimize

from bsns.planning import bounds, genetic, milp, slice_graph
from bsns.planning.problem import (
    Link,
    Links,
    Objective,
    Partition,
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


def test_integer_programme_of_a_stage_one_byte_too_large_finds_the_split_that_fits() -> None:
    # HiGHS's tolerance of 1e-6 of the whole model is 600 bytes here: 30 | 10, 5, 5 is best, but a byte too large.
    sizes = (100_000_000, 100_000_000, 100_000_000, 300_000_001)
    operators = tuple(
        Operator(f"v{number}", f"v{number}", work, (number,)) for number, work in enumerate((30, 10, 5, 5))
    )
    parameters = tuple(Parameter(f"p{number}", size) for number, size in enumerate(sizes))
    tensors = tuple(Tensor(f"t{number}", number, (number + 1,), 1) for number in range(3))
    graph = ModelGraph("tight", operators, tensors, parameters)
    problem = Problem(graph, _nodes(graph, 2, memory=500_000_000), Links(_GIGABYTE), terms=_TERMS)
    found = milp.solve(problem, time_limit_s=20)
    assert [(stage.first, stage.end) for stage in found.stages] == [(0, 2), (2, 4)]
    assert found.value_ns == 41


def _answers(monkeypatch: pytest.MonkeyPatch, change: Callable[[bool, Any], None]) -> Problem:
    """A problem whose plain slicing is optimal but not proven; `change(presolve, result)` edits HiGHS's answers."""
    actual: Any = scipy.optimize.milp

    def answer(*arguments: Any, options: dict[str, Any], **rest: Any) -> Any:
        result = actual(*arguments, options=options, **rest)
        change(options["presolve"], result)
        return result

    monkeypatch.setattr(milp, "milp", answer)
    graph = _chain([10] * 6, size=3)
    return Problem(graph, _nodes(graph, 3), Links(_GIGABYTE), terms=_TERMS)


def _fail(result: Any) -> None:
    result.status, result.x, result.mip_dual_bound = 4, None, None


def test_integer_programme_whose_runs_agree_proves_the_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    found = milp.solve(_answers(monkeypatch, lambda _presolve, _result: None), time_limit_s=20)
    assert (found.value_ns, found.lower_bound_ns, found.bound) == (26, 26, "milp")


def test_integer_programme_that_fails_in_the_first_units_is_solved_in_others(monkeypatch: pytest.MonkeyPatch) -> None:
    failures = {True: 2, False: 1}

    def change(presolve: bool, result: Any) -> None:
        if failures[presolve]:
            failures[presolve] -= 1
            _fail(result)

    found = milp.solve(_answers(monkeypatch, change), time_limit_s=20)
    assert (found.value_ns, found.lower_bound_ns, found.bound) == (26, 26, "milp")
    assert failures == {True: 0, False: 0}


def _fail_with_presolve(presolve: bool, result: Any) -> None:
    if presolve:
        _fail(result)


def _bound_too_high(presolve: bool, result: Any) -> None:
    if presolve:
        result.mip_dual_bound *= 1.2


def _nothing_found(presolve: bool, result: Any) -> None:
    if not presolve:
        result.status, result.x, result.mip_dual_bound = 2, None, None


@pytest.mark.parametrize("change", [_fail_with_presolve, _bound_too_high, _nothing_found])
def test_integer_programme_whose_runs_disagree_gives_the_better_plan_without_a_proof(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[bool, Any], None]
) -> None:
    found = milp.solve(_answers(monkeypatch, change), time_limit_s=20)
    assert (found.value_ns, found.lower_bound_ns, found.bound) == (26, 20, "work")


def test_integer_programme_that_fails_where_slicing_fails_does_not_say_that_there_is_no_plan(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    problem = _answers(monkeypatch, lambda _presolve, result: _fail(result))

    def no_plan(_problem: Problem) -> Partition:
        raise PlanningError("nothing")

    monkeypatch.setattr(slice_graph, "solve", no_plan)
    with pytest.raises(PlanningError, match="give it more time"):
        milp.solve(problem, time_limit_s=20)


def test_integer_programme_of_what_fits_nowhere_says_so() -> None:
    graph = _chain([10] * 4, parameter=100)
    with pytest.raises(PlanningError, match="400 bytes"):
        milp.solve(Problem(graph, _nodes(graph, 2, memory=150), Links(_GIGABYTE), terms=_TERMS), time_limit_s=20)
