"""The sequential planner: optima by brute force, reproducible, any-time, and good where nothing can be enumerated."""

from __future__ import annotations

import itertools
import random
from dataclasses import replace

import pytest

from bsns.planning import Link, Links, Objective, PlanningError, PlanningNode, Problem, Terms, partition, sequential
from bsns.protocol.identifiers import address
from bsns.protocol.model_graph import ModelGraph
from tests.integration.coordinator_fixtures import tiny_manifest
from tests.unit.planning_instances import every_partition, tight_problem


def manifest_graph(blocks: int) -> ModelGraph:
    return ModelGraph.of_manifest(tiny_manifest(blocks=blocks))


def fleet(graph: ModelGraph, nodes: int, seed: int, room: float = 1.5) -> tuple[PlanningNode, ...]:
    """Speeds over 1 to 8, and together `room` times the memory that the model needs."""
    rng = random.Random(seed)
    need = Problem(graph, (_node(1, 2**40, 1.0),), Links(None)).stage_memory(range(len(graph.operators)))
    shares = [8 ** rng.random() for _ in range(nodes)]
    return tuple(
        _node(number + 1, int(need * room * share / sum(shares)), 8 ** rng.random())
        for number, share in enumerate(shares)
    )


def _node(number: int, memory: int, speed: float) -> PlanningNode:
    times = {"embedding": int(1e4 / speed), "block": int(1e6 / speed), "head": int(8e6 / speed)}
    return PlanningNode(address(number.to_bytes(20, "big")), memory, bytes(32), times)


def all_links(nodes: tuple[PlanningNode, ...], seed: int) -> Links:
    rng = random.Random(seed)
    pairs = itertools.permutations(nodes, 2)
    return Links(
        None, {(a.node, b.node): Link(rng.randint(10_000, 900_000), rng.randint(10**7, 10**9)) for a, b in pairs}
    )


@pytest.mark.parametrize("block", range(6))
def test_solve_equals_brute_force_on_chains_that_take_several_nodes(block: int) -> None:
    several = 0
    for seed in range(60 * block, 60 * block + 60):
        problem = tight_problem(seed)
        values = [item.value_ns for item in every_partition(problem)]
        if not values:
            with pytest.raises(PlanningError):
                sequential.solve(problem)
            continue
        found = sequential.solve(problem)
        assert (found.value_ns, found.lower_bound_ns) == (min(values), min(values)), f"seed {seed}"
        several += len(found.stages) > 1
    assert several >= 20


def test_solve_a_wider_cut_after_a_longer_prefix_is_not_taken_for_better() -> None:
    """The trap of paper §1.5: the prefix that fits more units ends at the wider cut."""
    problem = next(
        item
        for item in (tight_problem(seed, units=5, nodes=2) for seed in range(1_000))
        if item.objective is Objective.THROUGHPUT and not item.terms.spread_leftover and _is_trap(item)
    )
    best = min(item.value_ns for item in every_partition(problem))
    assert sequential.solve(problem).value_ns == best
    assert sequential.solve(problem, exact_work=0).value_ns == best


def _is_trap(problem: Problem) -> bool:
    """Whether, for the first node of the best plan, a longer first stage costs less than a shorter one."""
    two = [item for item in every_partition(problem) if len(item.stages) == 2]
    for a, b in itertools.permutations(two, 2):
        x, y = a.stages[0], b.stages[0]
        longer = x.nodes == y.nodes and x.end < y.end
        if longer and x.cost_ns > y.cost_ns and b is min(two, key=lambda item: item.value_ns):
            return True
    return False


@pytest.mark.parametrize("objective", list(Objective))
@pytest.mark.parametrize("replicas", [1, 2])
def test_solve_a_large_fleet_twice_gives_one_plan_within_its_bound(objective: Objective, replicas: int) -> None:
    graph = manifest_graph(40)
    nodes = fleet(graph, 14, seed=3, room=2.5 * replicas)
    problem = Problem(graph, nodes, all_links(nodes, 1), objective, Terms(replicas=replicas))
    found = sequential.solve(problem, seed=5)
    assert found == sequential.solve(problem, seed=5)
    assert "exact" not in found.solver
    assert 0 < found.lower_bound_ns <= found.value_ns
    assert min(len(stage.nodes) for stage in found.stages) >= replicas


def test_solve_a_fleet_of_32_comes_close_to_its_bound() -> None:
    graph = manifest_graph(126)
    nodes = fleet(graph, 32, seed=1)
    terms = Terms(spread_leftover=False)
    assert sequential.solve(Problem(graph, nodes, all_links(nodes, 2), terms=terms)).ratio > 0.9
    uniform = Problem(graph, nodes, Links(Link(1_000, 10**9)), terms=terms)
    assert sequential.solve(uniform).ratio > 0.98


@pytest.mark.parametrize("terms", [Terms(), Terms(stage_count=4), Terms(replicas=2), Terms(replicas=2, stage_count=3)])
def test_solve_latency_by_search_is_mostly_the_optimum_and_never_far_from_it(terms: Terms) -> None:
    terms = replace(terms, spread_leftover=False)
    graph = manifest_graph(20)
    ratios = []
    for seed in range(8):
        nodes = fleet(graph, 6 + seed % 2, seed, room=1.8 * terms.replicas)
        problem = Problem(graph, nodes, all_links(nodes, seed), Objective.LATENCY, terms)
        try:
            exact = sequential.solve(problem)
        except PlanningError:
            continue
        found = sequential.solve(problem, exact_work=0)
        assert "exact" in exact.solver
        assert "exact" not in found.solver
        assert found.lower_bound_ns <= exact.value_ns <= found.value_ns
        assert {len(stage.nodes) for stage in found.stages} == {terms.replicas}
        assert terms.stage_count in (None, len(found.stages))
        ratios.append(found.value_ns / exact.value_ns)
    assert len(ratios) >= 4
    assert sum(ratio == 1 for ratio in ratios) >= len(ratios) * 3 / 4
    assert max(ratios) <= 1.03


@pytest.mark.parametrize(("terms", "least"), [(Terms(), 0.95), (Terms(stage_count=12), 0.9), (Terms(replicas=2), 0.6)])
def test_solve_latency_on_a_large_fleet_comes_close_to_its_bound(terms: Terms, least: float) -> None:
    terms = replace(terms, spread_leftover=False)
    graph = manifest_graph(62)
    for seed in (1, 2):
        nodes = fleet(graph, 16, seed, room=1.6 * terms.replicas)
        problem = Problem(graph, nodes, all_links(nodes, seed), Objective.LATENCY, terms)
        found = sequential.solve(problem)
        assert least <= found.ratio <= 1
        assert found == sequential.solve(problem)
        recursion = sequential.recursion(problem)
        assert recursion is None or found.value_ns < recursion.value_ns


def test_solve_latency_of_nodes_that_stream_takes_streaming_where_a_transfer_costs_more() -> None:
    graph = manifest_graph(10)
    fast = replace(_node(1, 0, 4.0), memory_bytes=1, host_bytes_per_second=10**12)
    others = tuple(_node(number, 2**40, 1.0) for number in (2, 3))
    for latency, alone in ((10**9, True), (1, False)):
        host = fast if alone else replace(fast, host_bytes_per_second=1_000)
        problem = Problem(graph, (host, *others), Links(Link(latency, 10**12)), Objective.LATENCY)
        found = sequential.solve(problem, exact_work=0)
        assert found.value_ns == sequential.solve(problem).value_ns
        assert (host in found.stages[0].nodes) == alone


def test_solve_with_a_deadline_that_is_over_still_gives_a_plan() -> None:
    graph = manifest_graph(62)
    nodes = fleet(graph, 24, seed=8)
    found = sequential.solve(Problem(graph, nodes, all_links(nodes, 3)), deadline_s=0.0)
    assert found.lower_bound_ns <= found.value_ns
    small = tight_problem(3)
    assert sequential.solve(small, deadline_s=0.0).value_ns >= sequential.solve(small).value_ns


def test_solve_nodes_that_no_stage_needs_become_replicas_only_if_that_makes_nothing_worse() -> None:
    graph = manifest_graph(4)
    nodes = (*(_node(number, 2**40, 2.0) for number in (1, 2, 3)), _node(4, 2**40, 0.01))
    links = Links(Link(1_000, 10**9))
    spread = partition(graph, nodes, links, terms=Terms(stage_count=2))
    alone = partition(graph, nodes, links, terms=Terms(stage_count=2, spread_leftover=False))
    assert sum(len(stage.nodes) for stage in alone.stages) == 2
    assert spread.value_ns < alone.value_ns
    slow = partition(graph, nodes, links, Objective.LATENCY, terms=Terms(stage_count=1))
    assert len(slow.stages[0].nodes) == 3  # equal nodes wait for each other at no cost; the slow one would delay
    assert [node.node for node in slow.unused] == [nodes[3].node]


def test_solve_exactly_n_stages_with_exactly_r_replicas_uses_that_many_nodes() -> None:
    graph = manifest_graph(6)
    nodes = fleet(graph, 7, seed=2, room=6.0)
    terms = Terms(stage_count=3, replicas=2, spread_leftover=False)
    for objective in Objective:
        found = partition(graph, nodes, all_links(nodes, 7), objective, terms=terms)
        assert [len(stage.nodes) for stage in found.stages] == [2, 2, 2]
        assert len(found.unused) == 1


def test_recursion_follows_the_paper_and_ends_in_none_where_it_is_stuck() -> None:
    graph = manifest_graph(4)
    fast, slow = _node(1, 2**40, 2.0), _node(2, 2**40, 1.0)
    found = sequential.recursion(Problem(graph, (slow, fast), Links(Link(10**9, 10**9)), Objective.LATENCY))
    assert found is not None
    assert [stage.nodes for stage in found.stages] == [(fast,)]  # the link costs more than any queue
    cheap = sequential.recursion(Problem(graph, (slow, fast), Links(Link(0, 10**12))))
    assert cheap is not None
    assert len(cheap.stages) == 2  # the queue of the fast node exceeds what the other needs for the next block
    assert sequential.recursion(Problem(graph, (slow, fast), Links(None), terms=Terms(stage_count=1))) is None
