"""The partition problem as a mixed-integer linear programme, for small instances.

Owns the exact formulation that serves as a baseline and, with HiGHS's dual bound, as a certificate that also holds when
time runs out. Takes one node a stage over links that are all alike; says so otherwise.

HiGHS 1.12 is not believed. It drops a solution that it has proven optimal, and ends with a "solve error", if a row of
it is broken by its tolerance of 1e-6 and a rounding error more (ERGO-Code/HiGHS issues 2653, 2782, 2808); how often
depends on the units, and presolve only moves it to other instances. So every instance is solved with presolve and
without, in other units again where HiGHS fails. Each plan is evaluated exactly; the better one is the answer, the lower
one of both dual bounds its bound. Bounds that an exact value refutes, and those of one run alone, certify nothing.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from bsns.planning import slice_graph
from bsns.planning.bounds import lower_bound
from bsns.planning.ideals import Floats, GraphArrays
from bsns.planning.problem import SECOND_NS, Link, Objective, Partition, PlanningError, PlanningNode, Problem, evaluate

_SCALES: Final = (64.0, 1.0, 8.0, 512.0)
"""About the known value in the programme's units, in the order they are tried: HiGHS's tolerances are absolute."""
_TOLERANCE: Final = 1e-5
"""Share of the value by which a dual bound is lowered, for HiGHS's tolerances."""
_LEAST_SECONDS: Final = 0.1
"""What a run gets at least, so that it can say anything."""
_INFEASIBLE: Final = 2
"""A status of `scipy.optimize.milp`."""

_Cover = tuple[tuple[int, ...], tuple[int, ...]]
_Stage = tuple[int, int, tuple[PlanningNode]]


def solve(problem: Problem, *, time_limit_s: float) -> Partition:
    """The optimum, or the best known when time runs out or HiGHS fails; the bound is what two runs agree on.

    Exact to a share of 1e-6 of the value, and to the nanosecond that each transfer is rounded up by. Bounds depend on
    the time that HiGHS had. PlanningError if stages need replicas, links differ, or no partition was found.
    """
    if problem.terms.replicas > 1 or problem.links.measured:
        raise PlanningError("the integer programme takes one node a stage and links that are all alike: use genetic")
    try:
        known: Partition | None = slice_graph.solve(problem)
    except PlanningError:
        known = None
    return _Search(problem, known).run(time_limit_s)


class _Search:
    """The two runs over one problem. `_best` is the best partition so far, with its exact value."""

    def __init__(self, problem: Problem, known: Partition | None) -> None:
        self._problem = problem
        self._best = known
        # Operators that no stage on one of these nodes can hold, found where HiGHS's tolerance had let them pass.
        self._covers: list[_Cover] = []

    def run(self, time_limit_s: float) -> Partition:
        started = time.monotonic()
        half, end = started + time_limit_s / 2, started + time_limit_s
        duals = [self._dual(presolve=True, deadline=half), self._dual(presolve=False, deadline=end)]
        best = self._best
        if best is None:
            if duals == [math.inf] * 2:
                raise self._problem.infeasible()
            raise PlanningError("the integer programme found no partition: give it more time, or use genetic")
        claimed = [max(0.0, dual * (1 - _TOLERANCE)) for dual in duals if dual is not None]
        if len(claimed) < len(duals) or max(claimed) > best.value_ns:
            return best
        bound = math.ceil(min(claimed))
        return replace(best, lower_bound_ns=bound, bound="milp") if bound > best.lower_bound_ns else best

    def _dual(self, *, presolve: bool, deadline: float) -> float | None:
        """HiGHS's bound in nanoseconds, infinite if it says that there is no partition; None if it failed in all units.
        What it finds on the way goes to `_best`.
        """
        problem = self._problem
        reference = float(problem.times.sum(axis=1).max() if self._best is None else self._best.value_ns)
        for scale in _SCALES:
            # A power of two, so that whole nanoseconds stay exact.
            unit = 2.0 ** max(0, round(math.log2(max(1.0, reference) / scale)))
            while True:
                left = max(deadline - time.monotonic(), _LEAST_SECONDS)
                programme = _Programme(problem, unit, self._covers)
                solution, dual = programme.solve(presolve=presolve, time_limit_s=left)
                if solution is None or not self._refused(*programme.stages(solution)) or left == _LEAST_SECONDS:
                    break
            if dual is not None:
                return dual
        return None

    def _refused(self, order: list[int], stages: list[_Stage]) -> bool:
        """Evaluate a partition, keep it if it is better; whether a stage needs more memory than its node has."""
        problem, known = self._problem, len(self._covers)
        for first, end, (node,) in stages:
            need = problem.stage_memory(order[first:end])
            if problem.overflow_ns(node, need) is None:
                small = [item for item, other in enumerate(problem.nodes) if problem.overflow_ns(other, need) is None]
                self._covers.append((tuple(order[first:end]), tuple(small)))
        if len(self._covers) > known:
            return True
        bound, name = lower_bound(problem)
        found = evaluate(problem, order, stages, lower_bound_ns=bound, bound=name, solver="milp")
        if self._best is None or found.value_ns < self._best.value_ns:
            self._best = found
        return False


class _Programme:
    """Variables: X(v, j) = 1 if operator v is in one of the stages 0 to j; z(j, m) = 1 if stage j is on node m; c(j),
    the cost of stage j; r(j) and s(j), what it receives and sends in nanoseconds; and the objective t.

    X rises with j and falls along edges, X(v, k-1) = 1. RELAYED: h(i, j) >= X(producer, j) - X(reader, j) is 1 if i
    crosses the cut after stage j. DIRECT, with x(v, j) = X(v, j) - X(v, j-1): it is received if x(reader, j) -
    x(producer, j) = 1 for a reader, and sent if the opposite. c(j) is bound from below for each node m by the time on
    m, less a number so large that it does not count where z(j, m) = 0. The largest such time is the whole model's on m.
    Where nodes are alike, stage j is on node j.
    """

    def __init__(self, problem: Problem, unit: float, covers: Sequence[_Cover]) -> None:
        self._problem = problem
        self._unit = unit
        self._arrays = GraphArrays.of(problem.graph, problem.terms.transfers)
        self._stages = problem.maximum_stages
        self._upper: list[float] = []
        self._whole: list[bool] = []
        self._rows: list[tuple[list[int], list[float], float]] = []
        self._x = [[self._variable(1, True) for _ in range(self._stages)] for _ in range(self._arrays.count)]
        self._z = [[self._variable(1, True) for _ in problem.nodes] for _ in range(self._stages)]
        self._order()
        self._nodes()
        self._fit(covers)

    def _variable(self, upper: float = math.inf, whole: bool = False) -> int:
        self._upper.append(upper)
        self._whole.append(whole)
        return len(self._upper) - 1

    def _at_least(self, least: float, *terms: tuple[int, float]) -> None:
        self._rows.append(([item for item, _ in terms], [factor for _, factor in terms], least))

    def _in_stage(self, operator: int, stage: int, factor: float) -> list[tuple[int, float]]:
        """factor · x(v, j)."""
        row = self._x[operator]
        return [(row[stage], factor)] + ([(row[stage - 1], -factor)] if stage else [])

    def _order(self) -> None:
        terms = self._problem.terms
        for operator, row in enumerate(self._x):
            self._at_least(1, (row[-1], 1))
            for earlier, later in itertools.pairwise(row):
                self._at_least(0, (later, 1), (earlier, -1))
            before = set(self._arrays.predecessors[operator])
            if not terms.free_order and operator:
                before.add(operator - 1)
            for predecessor in before:
                for ours, theirs in zip(row, self._x[predecessor]):
                    self._at_least(0, (theirs, 1), (ours, -1))
        if terms.stage_count is not None:
            for stage in range(self._stages):
                self._at_least(1, *(item for v in range(self._arrays.count) for item in self._in_stage(v, stage, 1)))

    def _nodes(self) -> None:
        for row in self._z:
            self._at_least(1, *((item, 1) for item in row))
        for column in zip(*self._z):
            self._at_least(-1, *((item, -1) for item in column))
        nodes, times = self._problem.nodes, self._problem.times
        capacities = {(node.memory_bytes, node.host_bytes_per_second) for node in nodes}
        if len(capacities) == 1 and (times == times[0]).all():
            for stage, row in enumerate(self._z):
                for number, item in enumerate(row):
                    self._upper[item] = float(number == stage)

    def _fit(self, covers: Sequence[_Cover]) -> None:
        for operators, nodes in covers:
            for stage, row in enumerate(self._z):
                members = [item for v in operators for item in self._in_stage(v, stage, -1)]
                for node in nodes:
                    self._at_least(-len(operators), (row[node], -1), *members)

    # ------------------------------------------------------------------------------------------------------- costs

    def _memory(self, stage: int) -> int | None:
        """The variable that is the bytes stage j needs, in units of the whole model's; None if every node holds it."""
        problem = self._problem
        whole = problem.stage_memory(range(self._arrays.count))
        if all(node.memory_bytes >= whole for node in problem.nodes):
            return None
        need, peak = self._variable(), self._variable()
        held: dict[int, int] = {}
        caches: list[tuple[int, float]] = []
        for number, operator in enumerate(problem.graph.operators):
            for parameter in operator.parameters:
                if parameter not in held:
                    held[parameter] = self._variable(1)
                self._at_least(0, (held[parameter], 1), *self._in_stage(number, stage, -1))
            self._at_least(0, (peak, 1), *self._in_stage(number, stage, -operator.peak_bytes / whole))
            if problem.cache_bytes[number]:
                caches += self._in_stage(number, stage, -problem.cache_bytes[number] / whole)
        weights = [(item, -problem.graph.parameters[parameter].size_bytes / whole) for parameter, item in held.items()]
        self._at_least(0, (need, 1), (peak, -1), *weights, *caches)
        return need

    def _costs(self) -> list[int]:
        """c(j) of every stage, in units of `_unit` nanoseconds."""
        problem = self._problem
        throughput = problem.objective is Objective.THROUGHPUT
        whole = max(1, problem.stage_memory(range(self._arrays.count)))
        received, sent = self._transfers()
        costs = []
        for stage in range(self._stages):
            cost, need = self._variable(), self._memory(stage)
            moved = [(received[stage], -1.0)] + ([(sent[stage], -1.0)] if throughput else [])
            for number, node in enumerate(problem.nodes):
                times = problem.times[number] / self._unit
                large = float(times.sum())
                computed = [item for v in range(len(times)) for item in self._in_stage(v, stage, -float(times[v]))]
                chosen = self._z[stage][number]
                self._at_least(-large, (cost, 1), (chosen, -large), *computed, *moved)
                beyond = (whole - node.memory_bytes) / whole
                if need is not None and beyond > 0:
                    if not node.host_bytes_per_second:
                        self._at_least(-1, (need, -1), (chosen, -beyond))
                        continue
                    rate = whole * SECOND_NS / node.host_bytes_per_second / self._unit
                    large += rate * beyond
                    least = -large - rate * node.memory_bytes / whole
                    self._at_least(least, (cost, 1), (chosen, -large), (need, -rate), *computed, *moved)
            costs.append(cost)
        return costs

    def _transfers(self) -> tuple[list[int], list[int]]:
        """r(j) and s(j) of every stage."""
        arrays, last = self._arrays, self._stages - 1
        link = self._problem.links.prior or Link(0, 1)
        received = [self._variable() for _ in range(self._stages)]
        sent = [self._variable() for _ in range(self._stages)]
        rate = SECOND_NS / link.bytes_per_second / self._unit
        latency = link.latency_ns / self._unit
        forbidden = self._problem.links.prior is None

        def total(target: int, crossing: list[int]) -> None:
            if forbidden:
                for item in crossing:
                    self._upper[item] = 0.0
            weights = [(item, -rate * float(size)) for item, size in zip(crossing, arrays.sizes)]
            if latency and crossing:
                some = self._variable(1, True)
                weights.append((some, -latency))
                for item in crossing:
                    self._at_least(0, (some, 1), (item, -1))
            self._at_least(0, (target, 1), *weights)

        for stage in range(self._stages):
            ins = [self._variable(1) for _ in arrays.sizes]
            outs = ins if arrays.relayed else [self._variable(1) for _ in arrays.sizes]
            for tensor, (producer, readers) in enumerate(zip(arrays.producers, arrays.consumers)):
                for reader in readers:
                    if arrays.relayed:
                        crossing = [(self._x[producer][stage], -1.0), (self._x[reader][stage], 1.0)]
                        self._at_least(0, (ins[tensor], 1), *crossing)
                        continue
                    made, read = self._in_stage(int(producer), stage, 1), self._in_stage(reader, stage, 1)
                    self._at_least(0, (ins[tensor], 1), *made, *((item, -factor) for item, factor in read))
                    self._at_least(0, (outs[tensor], 1), *read, *((item, -factor) for item, factor in made))
            if not arrays.relayed:
                total(received[stage], ins)
                total(sent[stage], outs)
            elif stage < last:
                total(sent[stage], outs)
                self._at_least(0, (received[stage + 1], 1), (sent[stage], -1))
        return received, sent

    # ----------------------------------------------------------------------------------------------------- solving

    def solve(self, *, presolve: bool, time_limit_s: float) -> tuple[Floats | None, float | None]:
        """HiGHS's solution and dual bound in nanoseconds (infinite: no partition), as far as it has them."""
        costs = self._costs()
        objective = self._variable()
        if self._problem.objective is Objective.THROUGHPUT:
            for cost in costs:
                self._at_least(0, (objective, 1), (cost, -1))
        else:
            self._at_least(0, (objective, 1), *((cost, -1.0) for cost in costs))
        starts = np.cumsum([0, *(len(columns) for columns, _, _ in self._rows)])
        matrix = csr_array(
            (
                np.concatenate([factors for _, factors, _ in self._rows]),
                np.concatenate([columns for columns, _, _ in self._rows]),
                starts,
            ),
            shape=(len(self._rows), len(self._upper)),
        )
        goal = np.zeros(len(self._upper))
        goal[objective] = 1
        result = milp(
            goal,
            integrality=np.array(self._whole, dtype=np.int64),
            bounds=Bounds(0, np.array(self._upper)),
            constraints=LinearConstraint(matrix, np.array([least for _, _, least in self._rows]), np.inf),
            options={"time_limit": time_limit_s, "mip_rel_gap": 0, "presolve": presolve},
        )
        if result.status == _INFEASIBLE:
            return None, math.inf
        return result.x, None if result.mip_dual_bound is None else float(result.mip_dual_bound) * self._unit

    def stages(self, solution: Floats) -> tuple[list[int], list[_Stage]]:
        """The order and the stages that a solution means."""
        chain = np.array([[solution[item] > 0.5 for item in row] for row in self._x]).T
        sizes = [0, *chain.sum(1).tolist()]
        nodes = [self._problem.nodes[int(np.argmax([solution[item] for item in row]))] for row in self._z]
        stages: list[_Stage] = [(a, b, (node,)) for a, b, node in zip(sizes, sizes[1:], nodes) if a < b]
        return self._arrays.stage_order(chain), stages
