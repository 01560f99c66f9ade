"""Model graph in, nodes and links in, partition out: pure functions from measured costs to shard plans.

Owns `partition`, the one signature in front of every solver, and which of them `hybrid` takes. Promises the same
partition for the same inputs and seed on any machine, as long as no deadline is given, and that every partition says
which solver answered and how far from a proven lower bound it is. Planners never talk to the chain, to nodes or to a
clock other than for a deadline that the caller gives.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from bsns.planning.problem import (
    FREE_LINKS,
    Link,
    Links,
    Objective,
    Partition,
    PlannedStage,
    PlanningError,
    PlanningNode,
    Problem,
    Terms,
    Transfers,
)
from bsns.protocol.model_graph import MODEL_INPUT, ModelGraph

__all__ = [
    "FREE_LINKS",
    "SOLVERS",
    "Link",
    "Links",
    "Objective",
    "Partition",
    "PlannedStage",
    "PlanningError",
    "PlanningNode",
    "Problem",
    "Terms",
    "Transfers",
    "partition",
]

SOLVERS: Final = ("hybrid", "sequential", "slice-graph", "genetic", "milp")
_MILP_SECONDS: Final = 60.0
_DEFAULT_TERMS: Final = Terms()


def partition(
    graph: ModelGraph,
    nodes: Iterable[PlanningNode],
    links: Links,
    objective: Objective = Objective.THROUGHPUT,
    *,
    terms: Terms = _DEFAULT_TERMS,
    solver: str = "hybrid",
    seed: int = 0,
    deadline_s: float | None = None,
) -> Partition:
    """The best partition of `graph` that `solver` finds (paper §1.3–1.5), with a lower bound.

    "sequential" is BSNS placement for graphs whose order is fixed, "slice-graph" the best cut of the graph's own order
    over the nodes in the order given, "genetic" searches topological orders and node orders, "milp" is an integer
    programme for small instances; "hybrid" takes the sequential one where a graph has one order only, else the genetic.
    With `deadline_s` (seconds from now) the searches stop there with the best so far, and are no longer reproducible.

    PlanningError if there is no partition, naming the unit or node in the way, or no solver of that name.
    """
    problem = Problem(graph, tuple(nodes), links, objective, terms)
    if solver == "hybrid":
        solver = "sequential" if is_sequential(problem) else "genetic"
    # The solvers are loaded when needed: a coordinator that plans chains needs no integer programme.
    match solver:
        case "sequential":
            from bsns.planning import sequential

            if not is_sequential(problem):
                raise PlanningError(
                    "the sequential planner takes graphs whose order is fixed and whose tensors are relayed: "
                    "use slice-graph, genetic or hybrid"
                )
            return sequential.solve(problem, seed=seed, deadline_s=deadline_s)
        case "slice-graph":
            from bsns.planning import slice_graph

            return slice_graph.solve(problem)
        case "genetic":
            from bsns.planning import genetic

            return genetic.solve(problem, seed=seed, deadline_s=deadline_s)
        case "milp":
            from bsns.planning import milp

            return milp.solve(problem, time_limit_s=_MILP_SECONDS if deadline_s is None else deadline_s)
        case _:
            raise PlanningError(f"there is no solver {solver!r}, only {', '.join(SOLVERS)}")


def is_sequential(problem: Problem) -> bool:
    """Whether only one order of the operators is possible, and what crosses a cut goes to the next stage only."""
    tensors = [tensor for tensor in problem.graph.tensors if tensor.producer != MODEL_INPUT]
    adjacent = all(set(tensor.consumers) <= {tensor.producer + 1} for tensor in tensors)
    if problem.terms.transfers is Transfers.DIRECT and not adjacent:
        return False
    if not problem.terms.free_order:
        return True
    followed = {tensor.producer for tensor in tensors if tensor.producer + 1 in tensor.consumers}
    return len(followed) == len(problem.graph.operators) - 1
