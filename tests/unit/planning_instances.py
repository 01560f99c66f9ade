"""Planning problems small enough to try everything, and trying everything."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence

from bsns.planning import Link, Links, Objective, Partition, PlanningError, PlanningNode, Problem, Terms
from bsns.planning.problem import SECOND_NS, evaluate
from bsns.protocol.identifiers import address
from bsns.protocol.model_graph import ModelGraph, Operator, Parameter, Tensor


def every_partition(problem: Problem) -> Iterator[Partition]:
    """All that `evaluate` accepts."""
    units, terms = len(problem.graph.operators), problem.terms
    for stages in range(1, min(units, len(problem.nodes)) + 1):
        for inner in itertools.combinations(range(1, units), stages - 1):
            cuts = [0, *inner, units]
            for serves in itertools.product(range(stages + 1), repeat=len(problem.nodes)):  # `stages`: none
                groups = [
                    tuple(node for node, number in zip(problem.nodes, serves, strict=True) if number == stage)
                    for stage in range(stages)
                ]
                if min(len(group) for group in groups) < terms.replicas:
                    continue
                try:
                    yield _evaluated(problem, [(cuts[i], cuts[i + 1], group) for i, group in enumerate(groups)])
                except PlanningError:
                    continue


def _evaluated(problem: Problem, stages: Sequence[tuple[int, int, tuple[PlanningNode, ...]]]) -> Partition:
    order = range(len(problem.graph.operators))
    return evaluate(problem, order, stages, lower_bound_ns=0, bound="", solver="brute force")


def tight_problem(seed: int, *, units: int = 6, nodes: int = 4, **terms: object) -> Problem:
    """A chain with cuts of any width whose memory takes several nodes, over links that all differ; some are missing."""
    rng = random.Random(seed)
    count = rng.randint(3, units)
    operators = tuple(
        Operator(f"unit-{number}", rng.choice("abc"), 1, (number,), rng.randint(0, 2)) for number in range(count)
    )
    even = rng.random() < 0.3
    tensors = [
        Tensor(f"cut-{number}", number, (number + 1,), 20 if even else rng.choice((1, 5, 30, 80)))
        for number in range(count - 1)
    ]
    tensors.append(Tensor("skip", 0, (count - 1,), 0 if even else rng.choice((0, 10))))
    sizes = [rng.randint(5, 20) for _ in range(count)]
    graph = ModelGraph(
        f"tight-{seed}",
        operators,
        tuple(tensors),
        tuple(Parameter(f"weight-{number}", size) for number, size in enumerate(sizes)),
    )
    fleet = tuple(
        PlanningNode(
            address((number + 1).to_bytes(20, "big")),
            rng.randint(max(sizes), max(sizes) + sum(sizes) // 2),
            bytes(32),
            {key: rng.randint(10, 99) for key in "abc"},
            rng.choice((0, 0, 0, SECOND_NS // 4)),
        )
        for number in range(nodes)
    )
    measured = {
        (a.node, b.node): Link(rng.randint(0, 30), rng.choice((SECOND_NS, SECOND_NS // 2)))
        for a, b in itertools.permutations(fleet, 2)
        if rng.random() < 0.9
    }
    limits = Terms(spread_leftover=rng.random() < 0.4, maximum_stages=rng.choice((2, 3, 32)), **terms)  # type: ignore[arg-type]
    return Problem(graph, fleet, Links(None, measured), rng.choice(list(Objective)), limits)
