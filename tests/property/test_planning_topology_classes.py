"""Plans out of schemas are partitions like any other, and neighbourhoods make no plan worse."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bsns.planning import FREE_LINKS, Link, Links, PlanningError, PlanningNode, Problem, Terms, partition, sequential
from bsns.planning.chain import Chain
from bsns.planning.neighbourhood import NEIGHBOURHOODS, neighbourhoods
from bsns.planning.topology import Topology
from bsns.planning.topology_classes import ACCEPTED, Classes, Schema
from bsns.protocol.identifiers import address
from bsns.protocol.model_graph import MODEL_INPUT, ModelGraph, Operator, Parameter, Tensor

_UNITS = 12


def problem(seed: int, nodes: int, *, regions: int = 3, replicas: int = 1, named_from: int = 1) -> Problem:
    """Nodes in regions, some milliseconds apart, over a model of twelve units."""
    numbers = np.random.default_rng(seed)
    at = numbers.uniform(0, 40, (regions, 2))[numbers.integers(0, regions, nodes)] + numbers.uniform(0, 2, (nodes, 2))
    fleet = tuple(
        PlanningNode(
            address((named_from + number).to_bytes(20, "big")),
            int(numbers.integers(3, _UNITS + 1)),
            bytes(32),
            {"unit": int(numbers.integers(500_000, 4_000_000))},
        )
        for number in range(nodes)
    )
    measured = {
        (one.node, two.node): Link(int(1e6 * np.linalg.norm(at[mine] - at[theirs])) + 100_000, 50_000_000)
        for mine, one in enumerate(fleet)
        for theirs, two in enumerate(fleet)
        if mine != theirs
    }
    return Problem(_model(), fleet, Links(None, measured), terms=Terms(replicas=replicas, concurrent_sessions=0))


def _model() -> ModelGraph:
    return ModelGraph(
        "twelve units",
        tuple(Operator(f"unit {number}", "unit", 1, (number,)) for number in range(_UNITS)),
        (
            Tensor("input", MODEL_INPUT, (0,), 8),
            *(
                Tensor(f"cut {at}", at, (at + 1,) if at + 1 < _UNITS else (), 4_096, at + 1 == _UNITS)
                for at in range(_UNITS)
            ),
        ),
        tuple(Parameter(f"weights {number}", 1) for number in range(_UNITS)),
    )


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(4, 24), st.integers(4, 24), st.sampled_from([1, 2]))
def test_schema_on_any_nodes_gives_a_partition_or_nothing(seed: int, one: int, two: int, replicas: int) -> None:
    try:
        source, target = problem(seed, one, replicas=replicas), problem(seed + 1, two, replicas=replicas)
        planned = sequential.solve(source)
    except PlanningError:
        return
    chain = Chain(source)
    schema = Schema.of(planned, chain, Topology.of(chain))
    other = Chain(target)
    stages = schema.instantiate(other, Topology.of(other))
    if stages is not None:  # evaluate checks cover, memory, replicas and links
        assert sequential.partition_of(target, stages, "schema").to_shard_plan().unit_count == _UNITS


def test_schema_in_its_own_network_under_other_names_gives_its_plan_again() -> None:
    source, renamed = problem(7, 18), problem(7, 18, named_from=500)
    planned = sequential.solve(source)
    chain, other = Chain(source), Chain(renamed)
    stages = Schema.of(planned, chain, Topology.of(chain)).instantiate(other, Topology.of(other))
    assert stages is not None
    assert sequential.partition_of(renamed, stages, "schema").value_ns <= planned.value_ns


def test_network_that_is_known_is_looked_up_and_another_one_planned_and_learnt() -> None:
    classes = Classes()
    first = classes.plan(problem(7, 18))
    again = classes.plan(problem(7, 18, named_from=500))
    assert first.distance is None
    assert again.distance == pytest.approx(0, abs=1e-6)
    assert again.number == first.number
    quick = sequential.quick(Chain(problem(7, 18, named_from=500)))
    assert quick is not None
    assert again.partition.value_ns <= ACCEPTED * quick.value_ns
    other = classes.plan(problem(9, 8, regions=1))
    assert (other.distance, len(classes)) == (None, 2)


def test_quick_plan_of_one_node_is_that_node() -> None:
    node = PlanningNode(address((1).to_bytes(20, "big")), _UNITS, bytes(32), {"unit": 1_000_000})
    found = sequential.quick(Chain(Problem(_model(), (node,), Links(None), terms=Terms(concurrent_sessions=0))))
    assert found is not None
    assert [stage.nodes for stage in found.stages] == [(node,)]


def test_schema_that_is_much_worse_than_the_quick_plan_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    classes = Classes(distance=lambda _one, _other: 0.0)
    classes.plan(problem(7, 18))
    target = problem(21, 18)
    chain = Chain(target)
    topology = Topology.of(chain)
    snapshot = topology.snapshot()
    slow = int(chain.prefix[:, -1].argmax())
    able = [node for node in range(chain.nodes) if chain.reach[node, 0] == _UNITS and node != slow] or [slow]
    worst = max(able, key=lambda node: int(chain.prefix[node, -1]))
    monkeypatch.setattr(Schema, "instantiate", lambda *_args, **_named: [(0, _UNITS, (worst,))])
    assert classes.look_up(chain, topology, snapshot) is None


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(3, 30))
def test_neighbourhoods_are_nodes_that_can_hold_their_stages(seed: int, nodes: int) -> None:
    try:
        chain = Chain(problem(seed, nodes))
    except PlanningError:
        return
    found = neighbourhoods(chain, (1, 2, 3, 4, 6))
    assert len(found) <= NEIGHBOURHOODS
    for item in found:
        assert item.nodes == tuple(sorted(set(item.nodes)))
        able = [node for node in item.nodes if chain.reach[node, 0] * item.stage_count >= _UNITS]
        assert len(able) >= item.stage_count
    assert [item.estimate_ns for item in found] == sorted(item.estimate_ns for item in found)


def test_plan_of_regions_far_apart_stays_within_one() -> None:
    numbers = random.Random(5)
    region = [number % 3 for number in range(30)]
    fleet = tuple(
        PlanningNode(
            address((number + 1).to_bytes(20, "big")), 6, bytes(32), {"unit": numbers.randint(10**6, 2 * 10**6)}
        )
        for number in range(30)
    )
    measured = {
        (one.node, two.node): Link(200_000 if region[mine] == region[theirs] else 80_000_000, 10**9)
        for mine, one in enumerate(fleet)
        for theirs, two in enumerate(fleet)
        if mine != theirs
    }
    found = partition(_model(), fleet, Links(None, measured), terms=Terms(concurrent_sessions=0))
    place = {node.node: number for number, node in enumerate(fleet)}
    assert len({region[place[node.node]] for stage in found.stages for node in stage.nodes}) == 1
    # All ten nodes of the region serve.
    assert sum(len(stage.nodes) for stage in found.stages) == 10


def test_swarms_in_regions_are_planned_better_with_neighbourhoods(monkeypatch: pytest.MonkeyPatch) -> None:
    swarms = [problem(seed, 24) for seed in (1, 2, 8)]
    found = [sequential.solve(swarm).value_ns for swarm in swarms]
    monkeypatch.setattr(sequential, "neighbourhoods", lambda *_: [])
    without = [sequential.solve(swarm).value_ns for swarm in swarms]
    assert sum(mine / theirs for mine, theirs in zip(found, without, strict=True)) / len(swarms) < 0.9


def test_even_links_are_planned_without_neighbourhoods(monkeypatch: pytest.MonkeyPatch) -> None:
    def unwanted(*_: object) -> None:
        raise AssertionError("links are all alike")

    monkeypatch.setattr(sequential, "neighbourhoods", unwanted)
    assert partition(_model(), problem(3, 12).nodes, FREE_LINKS, terms=Terms(concurrent_sessions=0)).stages
