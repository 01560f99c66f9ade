"""What a planning problem takes, and what a partition costs, worked out by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from bsns.planning import (
    Link,
    Links,
    Objective,
    PlanningError,
    PlanningNode,
    Problem,
    Terms,
    Transfers,
    partition,
)
from bsns.planning.problem import SECOND_NS, evaluate
from bsns.protocol.identifiers import ProtocolError, address
from bsns.protocol.model_graph import GraphError, ModelGraph, Operator, Parameter, Tensor

LINK = Link(latency_ns=2, bytes_per_second=SECOND_NS)  # one byte a nanosecond


def node(number: int, memory: int = 1_000, time: Any = 10, host: int = 0) -> PlanningNode:
    return PlanningNode(address((number).to_bytes(20, "big")), memory, bytes(32), {"block": time}, host)


A, B, C = node(1), node(2), node(3)


def chain(count: int = 4, parameter_bytes: int = 100, cut_bytes: int = 5) -> ModelGraph:
    return ModelGraph(
        "chain",
        tuple(Operator(f"block-{number}", "block", 7, (number,)) for number in range(count)),
        tuple(
            Tensor(f"cut-{number}", number, (number + 1,) if number + 1 < count else (), cut_bytes, number + 1 == count)
            for number in range(count)
        ),
        tuple(Parameter(f"weight-{number}", parameter_bytes) for number in range(count)),
    )


def skipping() -> ModelGraph:
    """Four operators; the first one's tensor is read by the second and by the last."""
    operators = tuple(Operator(f"op-{number}", "block", 1) for number in range(4))
    tensors = (
        Tensor("input", -1, (0, 3), 1_000),
        Tensor("a", 0, (1, 3), 10),
        Tensor("b", 1, (2,), 20),
        Tensor("c", 2, (3,), 30),
        Tensor("d", 3, (), 1_000, is_output=True),
    )
    return ModelGraph("skipping", operators, tensors)


def cost(problem: Problem, *stages: tuple[int, int, tuple[PlanningNode, ...]]) -> Any:
    order = range(len(problem.graph.operators))
    return evaluate(problem, order, stages, lower_bound_ns=1, bound="none", solver="by hand")


def test_evaluate_relayed_carries_a_skip_in_every_cut_and_counts_both_ends() -> None:
    problem = Problem(skipping(), (A, B, C), Links(LINK))
    found = cost(problem, (0, 1, (A,)), (1, 3, (B,)), (3, 4, (C,)))
    # Cuts: a = 10 after the first stage; c and a = 40 after the second. The model's input and output are free.
    assert [(s.receive_ns, s.compute_ns, s.send_ns) for s in found.stages] == [(0, 10, 12), (12, 20, 42), (42, 10, 0)]
    assert found.value_ns == 12 + 20 + 42
    latency = cost(dataclasses.replace(problem, objective=Objective.LATENCY), *_stages(found))
    assert latency.value_ns == 10 + 12 + 20 + 42 + 10  # each transfer once


def test_evaluate_direct_sends_each_tensor_once_to_each_stage_that_reads_it() -> None:
    slow = Link(latency_ns=7, bytes_per_second=SECOND_NS)
    links = Links(LINK, {(A.node, C.node): slow})
    problem = Problem(skipping(), (A, B, C), links, terms=Terms(transfers=Transfers.DIRECT))
    found = cost(problem, (0, 1, (A,)), (1, 3, (B,)), (3, 4, (C,)))
    # The first sends a (10) over its slowest link, to the last; the last receives a and c over its slowest.
    assert [(s.receive_ns, s.send_ns) for s in found.stages] == [(0, 17), (12, 32), (47, 0)]


def _stages(found: Any) -> list[tuple[int, int, tuple[PlanningNode, ...]]]:
    return [(stage.first, stage.end, stage.nodes) for stage in found.stages]


def test_evaluate_replicas_share_requests_for_throughput_and_wait_for_the_slowest_for_latency() -> None:
    slow = node(4, time=30)
    nodes = (A, slow)
    found = cost(Problem(chain(2), nodes, Links(None)), (0, 2, nodes))
    assert found.stages[0].cost_ns == 60
    assert cost(Problem(chain(2), nodes, Links(None)), (0, 2, (slow, A))).stages[0].nodes == (A, slow)
    assert found.value_ns == 15  # 1 / (1/20 + 1/60)
    assert cost(Problem(chain(2), nodes, Links(None), Objective.LATENCY), (0, 2, nodes)).value_ns == 60


def test_evaluate_overflow_streams_what_exceeds_memory_and_shared_parameters_count_once() -> None:
    graph = ModelGraph(
        "tied",
        tuple(Operator(f"block-{number}", "block", 1, (0,), peak_bytes=number, cache_bytes=1) for number in range(3)),
        tuple(Tensor(f"cut-{number}", number, (number + 1,), 0) for number in range(2)),
        (Parameter("tied", 100),),
    )
    small = node(5, memory=50, host=SECOND_NS // 2)
    problem = Problem(graph, (small,), Links(None), terms=Terms(concurrent_sessions=2, session_tokens=10))
    # 100 of parameters, 3 * 20 of caches and a peak of 2, less 50: at half a byte a nanosecond.
    assert cost(problem, (0, 3, (small,))).stages[0].overflow_ns == 224


def test_evaluate_what_is_no_partition_says_why() -> None:
    problem = Problem(chain(), (A, B, C), Links(None, {(A.node, B.node): LINK}))
    for message, stages in {
        "begin at 2": [(0, 2, (A,)), (3, 4, (B,))],
        "begin at 0": [(0, 0, (A,)), (0, 4, (B,))],
        "end at 3": [(0, 3, (A,))],
        "serves twice": [(0, 2, (A,)), (2, 4, (A,))],
        "not one of the problem": [(0, 4, (node(9),))],
        "has 0 nodes": [(0, 4, ())],
        f"no link from {B.node} to {A.node}": [(0, 2, (B,)), (2, 4, (A,))],
    }.items():
        with pytest.raises(PlanningError, match=message):
            cost(problem, *stages)
    with pytest.raises(PlanningError, match="its stage"):
        cost(Problem(chain(), (A, node(6, memory=250)), Links(LINK)), (0, 4, (node(6, memory=250),)))
    with pytest.raises(PlanningError, match="are not what the terms allow"):
        cost(Problem(chain(), (A, B), Links(LINK), terms=Terms(stage_count=2)), (0, 4, (A,)))
    with pytest.raises(PlanningError, match="terms ask for 1"):
        cost(Problem(chain(), (A, B), Links(LINK), terms=Terms(spread_leftover=False)), (0, 4, (A, B)))


def test_evaluate_order_is_the_graphs_or_a_topological_one_where_that_is_free() -> None:
    graph = ModelGraph(
        "fork",
        tuple(Operator(f"op-{number}", "block", 1) for number in range(3)),
        (Tensor("a", 0, (1, 2), 1),),
    )

    def costs(order: tuple[int, ...], *, free: bool) -> Any:
        problem = Problem(graph, (A,), Links(None), terms=Terms(free_order=free))
        return evaluate(problem, order, [(0, 3, (A,))], lower_bound_ns=1, bound="", solver="")

    assert costs((0, 2, 1), free=True).value_ns == 30
    with pytest.raises(PlanningError, match="free_order"):
        costs((0, 2, 1), free=False)
    with pytest.raises(PlanningError, match=r"operator 1 \(op-1\)"):
        costs((1, 0, 2), free=True)
    with pytest.raises(PlanningError, match="each of 3 operators once"):
        costs((0, 1, 1), free=True)
    with pytest.raises(PlanningError, match="reorders"):
        costs((0, 2, 1), free=True).to_shard_plan()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"time": float("nan")}, "block-0.* is nan"),
        ({"time": 1.5}, "block-0.* is 1.5"),
        ({"time": 0}, "block-0.* is 0, expected an integer from 1"),
        ({"time": -1}, "block-0.* is -1"),
        ({"memory": -1}, "memory_bytes is -1"),
        ({"memory": float("inf")}, "memory_bytes is inf"),
        ({"host": -5}, "host_bytes_per_second is -5"),
        ({"time": 2**51}, "the whole model takes"),
    ],
)
def test_problem_with_a_bad_measurement_names_the_node(changed: dict[str, Any], message: str) -> None:
    bad = node(7, **changed)
    with pytest.raises(PlanningError, match=f"node {bad.node}.*{message}"):
        Problem(chain(), (A, bad), Links(LINK))


def test_problem_with_a_measurement_that_is_absent_names_node_and_unit() -> None:
    poor = PlanningNode(address(b"\x09" * 20), 100, bytes(32), {})
    with pytest.raises(PlanningError, match=rf"node {poor.node} did not measure 'block' \(block-0\)"):
        Problem(chain(), (poor,), Links(LINK))


def test_problem_operator_without_work_may_take_no_time() -> None:
    graph = ModelGraph("free", (Operator("nothing", "block", 0),), ())
    assert partition(graph, [node(1, time=0)], Links(None)).value_ns == 0


@pytest.mark.parametrize(
    ("link", "message"),
    [
        (Link(-1, 1), "latency_ns is -1"),
        (Link(1, 0), "bytes_per_second is 0"),
        (Link(float("nan"), 1), "latency_ns is nan"),  # type: ignore[arg-type]
        (Link(2**53, 1), "too slow"),
    ],
)
def test_problem_with_a_bad_link_names_both_nodes(link: Link, message: str) -> None:
    with pytest.raises(PlanningError, match=f"the link from {A.node} to {B.node}.*{message}"):
        Problem(chain(), (A, B), Links(LINK, {(A.node, B.node): link}))
    with pytest.raises(PlanningError, match=f"the prior link.*{message}"):
        Problem(chain(), (A, B), Links(link))


def test_problem_with_a_unit_larger_than_any_node_names_it_unless_it_may_overflow() -> None:
    graph = chain()
    graph = dataclasses.replace(graph, parameters=(*graph.parameters[:2], Parameter("big", 10**6), graph.parameters[3]))
    with pytest.raises(PlanningError, match=r"unit 2 \(block-2\) needs 1000000 bytes, the largest node has 1000"):
        Problem(graph, (A, B), Links(LINK))
    assert partition(graph, [A, node(2, host=SECOND_NS)], Links(LINK)).value_ns > 10**6 - 1_000


def test_problem_without_enough_nodes_says_how_many_are_missing() -> None:
    with pytest.raises(PlanningError, match="no nodes"):
        Problem(chain(), (), Links(LINK))
    with pytest.raises(PlanningError, match="3 stages with 2 replicas need 6 nodes, 3 are there"):
        Problem(chain(), (A, B, C), Links(LINK), terms=Terms(stage_count=3, replicas=2))
    with pytest.raises(PlanningError, match=r"2 times 400 bytes of 'chain' exceed the 700 bytes of the 2 nodes"):
        Problem(chain(), (node(1, 300), node(2, 400)), Links(LINK), terms=Terms(replicas=2))
    with pytest.raises(PlanningError, match=f"node {A.node} is given twice"):
        Problem(chain(), (A, A), Links(LINK))
    with pytest.raises(PlanningError, match="exceed 3 assignments"):
        Problem(chain(), (A, B, C, node(4)), Links(LINK), terms=Terms(stage_count=2, replicas=2, maximum_assignments=3))


def test_problem_with_disconnected_links_names_a_node() -> None:
    small = (node(1, 250), node(2, 250))
    with pytest.raises(PlanningError, match=f"node {small[0].node} is linked to no other"):
        Problem(chain(), small, Links(None))
    third = (*small, node(3, 250))
    with pytest.raises(PlanningError, match=f"node {third[2].node} is linked to no other"):
        partition(chain(8), [*third, node(4, 300)], _ring(*small, node(4, 300)))
    # One node holds everything: no link is needed.
    assert len(partition(chain(), [A, B], Links(None), terms=Terms(spread_leftover=False)).stages) == 1


def _ring(*nodes: PlanningNode) -> Links:
    return Links(None, {(a.node, b.node): LINK for a in nodes for b in nodes if a is not b})


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        (Terms(replicas=0), "replicas is 0"),
        (Terms(stage_count=0), "stage_count is 0"),
        (Terms(stage_count=5), "the model has 4 units"),
        (Terms(stage_count=3, maximum_stages=2), "at most 2 stages"),
        (Terms(session_tokens=-1), "session_tokens is -1"),
    ],
)
def test_problem_with_impossible_terms_says_which(terms: Terms, message: str) -> None:
    with pytest.raises(PlanningError, match=message):
        Problem(chain(), tuple(node(number) for number in range(1, 9)), Links(LINK), terms=terms)


def test_problem_with_an_objective_that_is_no_member_lists_them() -> None:
    with pytest.raises(PlanningError, match="'latency' is no Objective: throughput, latency"):
        Problem(chain(), (A,), Links(None), "latency")  # type: ignore[arg-type]


def test_graph_that_is_empty_or_cyclic_or_not_a_number_is_refused_before_any_planning() -> None:
    with pytest.raises(GraphError, match="no operators"):
        ModelGraph("empty", (), ())
    two = tuple(Operator(f"op-{number}", "block", 1) for number in range(2))
    with pytest.raises(GraphError, match=r"operator 0 \(op-0\) reads it before operator 1 \(op-1\)"):
        ModelGraph("cyclic", two, (Tensor("a", 0, (1,), 1), Tensor("b", 1, (0,), 1)))
    with pytest.raises(GraphError, match=r"operator 1 \(op-1\): work is nan"):
        ModelGraph("nan", (two[0], dataclasses.replace(two[1], work=float("nan"))), ())  # type: ignore[arg-type]


def test_partition_with_an_unknown_solver_lists_those_that_exist() -> None:
    with pytest.raises(PlanningError, match="no solver 'magic', only hybrid, sequential"):
        partition(chain(), [A], Links(LINK), solver="magic")


def test_partition_sequential_of_a_graph_with_several_orders_is_refused() -> None:
    with pytest.raises(PlanningError, match="order is fixed"):
        partition(skipping(), [A], Links(LINK), solver="sequential", terms=Terms(transfers=Transfers.DIRECT))
    fork = ModelGraph("fork", tuple(Operator(str(n), "block", 1) for n in range(3)), (Tensor("a", 0, (1, 2), 1),))
    with pytest.raises(PlanningError, match="order is fixed"):
        partition(fork, [A], Links(LINK), solver="sequential", terms=Terms(free_order=True))
    assert partition(chain(), [A], Links(LINK), solver="sequential", terms=Terms(free_order=True)).value_ns == 40


def test_to_shard_plan_splits_work_by_declared_cost_and_keeps_ranges() -> None:
    found = partition(chain(), [A, B], Links(LINK), terms=Terms(stage_count=2))
    plan = found.to_shard_plan()
    assert [(item.first_unit, item.end_unit, item.work_weight) for item in plan.assignments] == [(0, 2, 14), (2, 4, 14)]
    idle = partition(ModelGraph("idle", (Operator("nothing", "block", 0),), ()), [A], Links(None))
    assert idle.to_shard_plan().assignments[0].work_weight == 1


def test_to_shard_plan_with_more_stages_than_contracts_take_is_refused() -> None:
    nodes = [node(number, memory=100) for number in range(1, 41)]
    found = partition(chain(40), nodes, Links(LINK), terms=Terms(maximum_stages=64))
    assert len(found.stages) == 40
    with pytest.raises(ProtocolError, match="at most 32 stages"):
        found.to_shard_plan()
