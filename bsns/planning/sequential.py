"""BSNS placement: the partition of a model whose units have one order, over nodes of any kind (paper §1.3, §4 row 4).

Owns the recursion of the paper as a fast start, the choice between the exact dynamic programme and the search over
orders, and what nodes do that no stage needs. Promises a partition that is never worse than the recursion's, the
optimum where `EXACT_WORK` allows the dynamic programme, and a proven lower bound. Does not take graphs with several
orders.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np

from bsns.planning import chain_bound, exact_chain
from bsns.planning.chain import NEVER, Chain, rate_ns
from bsns.planning.exact_chain import ExactChain, Stages
from bsns.planning.latency_search import LatencySearch
from bsns.planning.neighbourhood import neighbourhoods
from bsns.planning.order_search import OrderSearch
from bsns.planning.problem import Objective, Partition, PlanningError, Problem, evaluate
from bsns.planning.replica_search import ReplicaSearch, join_idle

EXACT_WORK: Final = 20_000_000
"""Table cells up to which one pass of the exact dynamic programme is taken: below a second on one core."""
_STAGE_COUNTS: Final = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
"""Numbers of stages that are tried with replicas of every stage."""
QUICK_PROPOSALS: Final = 3_000
"""Moves that a start is improved by, before the best are searched from."""
_IMPROVED: Final = 4
"""Starts on all nodes, and on neighbourhoods, that are improved."""
_SEARCHED: Final = 2
"""Of these the ones that are searched from."""


@dataclass(frozen=True, slots=True)
class RecursionWeights:
    """w1 to w3 of h_u (paper §1.3): what link, compute and overflow time count in the choice of the next node."""

    link: int = 1
    compute: int = 1
    overflow: int = 1


DEFAULT_WEIGHTS: Final = RecursionWeights()


def solve(
    problem: Problem, *, seed: int = 0, deadline_s: float | None = None, exact_work: int = EXACT_WORK
) -> Partition:
    """The best partition found; `solver` says whether the exact programme or the search over orders answered.

    `exact_work` 0 leaves the exact programme out. PlanningError if no partition is found; where the exact programme was
    within reach there is none.
    """
    chain = Chain(problem)
    end = None if deadline_s is None else time.monotonic() + deadline_s
    run = _Run(chain, seed, lambda: end is not None and time.monotonic() >= end, exact_work)
    return run.latency() if problem.objective is Objective.LATENCY else run.throughput()


def recursion(problem: Problem, weights: RecursionWeights = DEFAULT_WEIGHTS) -> Partition | None:
    """BSNS's recursive assignment (paper §1.3): unit by unit, the node with the least h_u given the path so far.

    h_u(n, b | path) = w1 * transfer from the last node + w2 * (queue(n) + time of b on n) + w3 * overflow of b on n,
    where queue(n) is what n already computes for this row; a node that the path has left does not come back. Only nodes
    that leave enough memory for the units behind are candidates. None if the recursion runs into a dead end. Terms for
    one replica; others give None.
    """
    stages = _recursion(Chain(problem), weights)
    return None if stages is None else _evaluate(problem, stages, 0, "none", "recursion")


def quick(chain: Chain, *, proposals: int = QUICK_PROPOSALS) -> Partition | None:
    """The best start that the search for throughput begins with, improved by so many moves: a plan in a fraction of a
    second. None if no start is a partition.
    """
    best = _Run(chain, 0, lambda: False, exact_work=0).best_start()
    if best is None:
        return None
    if proposals:
        best = ReplicaSearch(chain, seed=0, tick=lambda: False).improve(best, proposals=proposals, warmth=0.0)
    return partition_of(chain.problem, best, "sequential: quick")


def partition_of(problem: Problem, stages: Stages, solver: str) -> Partition:
    """`stages` as `solver`'s answer, without a bound. PlanningError if they are no partition."""
    return _evaluate(problem, stages, 0, "none", solver)


class _Run:
    """One planning run over the tables of one chain."""

    def __init__(self, chain: Chain, seed: int, late: Callable[[], bool], exact_work: int) -> None:
        self._chain = chain
        self._problem = chain.problem
        self._seed = seed
        self._late = late
        self._exact = exact_chain.work(chain) <= exact_work
        self._recursion = _recursion(chain, DEFAULT_WEIGHTS)

    def latency(self) -> Partition:
        problem, chain = self._problem, self._chain
        walk = chain_bound.Walks(chain).shortest(np.zeros(chain.nodes, dtype=np.int64))
        if walk is None:
            raise problem.infeasible()
        relaxed = self._accept([walk[1]])  # a walk that uses no node twice is a partition
        if relaxed is not None and self._value(relaxed) == walk[0]:
            return self._finish(relaxed, walk[0], chain_bound.WALK, "sequential: shortest walk")
        if self._exact:
            best = ExactChain(chain).least_latency()
            if best is None:
                raise problem.infeasible()
            return self._finish(best, self._value(best), "exact dynamic programme", "sequential: exact")
        search = LatencySearch(chain, seed=self._seed, tick=self._late)
        starts = [walk[1]] if self._recursion is None else [walk[1], self._recursion]
        found = search.best(starts)
        if found is None:  # not even all nodes hold the model in the orders it knows
            orders = OrderSearch(chain, seed=self._seed, value=self._value, tick=self._late)
            filled = orders.best(self._first_orders(), orders.limit)
            found = None if filled is None else search.best([filled])
        best = self._accept([found, self._recursion])
        if best is None:
            raise problem.infeasible()
        lower, argument = chain_bound.lower_bound(chain, self._value(best))
        return self._finish(best, lower, argument, "sequential: chain search")

    def throughput(self) -> Partition:
        problem, chain = self._problem, self._chain
        search = OrderSearch(chain, seed=self._seed, value=self._value, tick=self._late)
        lower, argument = chain_bound.lower_bound(chain, search.limit)
        best = self._accept([search.best(self._first_orders(), lower), self._recursion])
        if best is not None:
            best = self._spread(best)
        if problem.terms.spread_leftover and chain.nodes > problem.terms.replicas:
            starts, near = self._ranked([best, *self._everywhere()]), self._ranked(self._neighbourhoods())
            best = self._accept([*starts[:1], *near[:1], *self._searched(starts, near, lower)])
        if best is None and not self._exact:
            raise problem.infeasible()
        if best is not None and (self._value(best) == lower or not self._exact or self._late()):
            return self._finish(best, lower, argument, "sequential: order search")
        return self._exactly(best, lower)

    def best_start(self) -> Stages | None:
        return self._accept([self._recursion, *self._everywhere(), *self._neighbourhoods()])

    # --------------------------------------------------------------------------------------------------- inside

    def _exactly(self, best: Stages | None, lower: int) -> Partition:
        """The optimum, by bisection between `lower` and the value of `best`."""
        programme = ExactChain(self._chain)
        if best is None:
            best = programme.within(NEVER // 4)
            if best is None:
                raise self._problem.infeasible()
        high = self._value(best)
        probe = high - 1  # what the search found is often the optimum: ask that first
        while lower < high:
            if self._late():
                return self._finish(
                    best, lower, "exact dynamic programme, cut short", "sequential: exact until deadline"
                )
            found = programme.within(probe)
            if found is None:
                lower = probe + 1
            else:
                high = probe
                if self._value(found) < self._value(best):
                    best = found
                high = min(high, self._value(best))
            probe = (lower + high) // 2
        return self._finish(best, lower, "exact dynamic programme", "sequential: exact")

    def _first_orders(self) -> list[list[int]]:
        if self._recursion is None:
            return []
        used = [node for _, _, nodes in self._recursion for node in nodes]
        return [used + [node for node in range(self._chain.nodes) if node not in used]]

    def _value(self, stages: Stages) -> int:
        return _evaluate(self._problem, stages, 0, "", "").value_ns

    def _accept(self, candidates: Sequence[Stages | None]) -> Stages | None:
        """The best of those that are partitions."""
        return next(iter(self._ranked(candidates)), None)

    def _ranked(self, candidates: Sequence[Stages | None]) -> list[Stages]:
        """Those that are partitions, the best first, of equal ones the earlier."""
        found: list[tuple[int, Stages]] = []
        for stages in candidates:
            if stages is not None:
                with contextlib.suppress(PlanningError):
                    found.append((self._value(stages), stages))
        return [stages for _, stages in sorted(found, key=lambda item: item[0])]

    def _spread(self, stages: Stages) -> Stages:
        if not self._problem.terms.spread_leftover:
            return stages
        return join_idle(self._chain, stages, self._late)

    def _everywhere(self) -> list[Stages | None]:
        """Stages with replicas on all nodes."""
        return [self._replicated(count, range(self._chain.nodes)) for count in _STAGE_COUNTS]

    def _neighbourhoods(self) -> list[Stages | None]:
        """Stages on nodes near one another, where links differ."""
        chain = self._chain
        if chain.nodes < 2 or chain.even_hop is not None or chain.host.any() or self._late():
            return []
        counts = [count for count in _STAGE_COUNTS if self._may_have(count)]
        return [self._replicated(item.stage_count, item.nodes) for item in neighbourhoods(chain, counts)]

    def _may_have(self, count: int) -> bool:
        problem = self._problem
        return count <= problem.maximum_stages and problem.terms.stage_count in (None, count)

    def _replicated(self, count: int, among: Sequence[int]) -> Stages | None:
        """`count` stages of equal work; each node of `among` joins the slowest stage it fits. None if a stage gets too
        few.
        """
        chain, terms = self._chain, self._problem.terms
        if not self._may_have(count):
            return None
        mean = chain.prefix.mean(axis=0)
        cuts = [0, *np.searchsorted(mean, [mean[-1] * part / count for part in range(1, count)]).tolist(), chain.units]
        if any(first >= end for first, end in pairwise(cuts)):
            return None
        rate = [0.0] * count
        members: list[list[int]] = [[] for _ in range(count)]
        # Nodes that fit few stages choose first.
        fits = [
            [number for number in range(count) if chain.reach[node, cuts[number]] >= cuts[number + 1]]
            for node in range(chain.nodes)
        ]
        for node in sorted(among, key=lambda item: (len(fits[item]), int(chain.prefix[item, -1])))[
            : terms.maximum_assignments
        ]:
            if fits[node]:
                number = min(fits[node], key=lambda item: (len(members[item]) >= terms.replicas, rate[item]))
                time = int(chain.prefix[node, cuts[number + 1]] - chain.prefix[node, cuts[number]])
                rate[number] += 1 / max(time, 1)
                members[number].append(node)
        return [(cuts[number], cuts[number + 1], tuple(members[number])) for number in range(count)]

    def _searched(self, starts: Sequence[Stages], near: Sequence[Stages], lower: int) -> list[Stages]:
        """What the local search makes of the best of `starts` and of `near`, the best of each first; nothing where one
        of them is the optimum. Many are improved a little, those that came out best as far as the search goes.
        """
        if any(self._value(stages) <= lower for stages in (*starts[:1], *near[:1])) or self._late():
            return []
        search = ReplicaSearch(self._chain, seed=self._seed, tick=self._late)
        improved = [
            search.improve(stages, proposals=QUICK_PROPOSALS, warmth=0.0)
            for stages in (*starts[:_IMPROVED], *near[:_IMPROVED])
        ]
        improved.sort(key=self._value)
        return [*improved[:1], *(search.improve(stages) for stages in improved[:_SEARCHED])]

    def _finish(self, stages: Stages, lower: int, bound: str, solver: str) -> Partition:
        if self._problem.objective is Objective.LATENCY:
            stages = self._spread(stages)
        return _evaluate(self._problem, stages, lower, bound, solver)


def _recursion(chain: Chain, weights: RecursionWeights) -> Stages | None:
    problem, n = chain.problem, chain.units
    if problem.terms.replicas != 1 or problem.terms.stage_count is not None:
        return None
    stages: Stages = []
    free = np.ones(chain.nodes, dtype=bool)
    room = int(chain.room.sum())
    current, first, queue = -1, 0, 0
    hop = chain.transfers(int(chain.sizes[0])) if chain.units > 1 else None
    for unit in range(n):
        behind = 0 if chain.host.any() else int(chain.memory[unit, n])
        cost = weights.compute * problem.times[:, unit]
        if chain.host.any():
            beyond = np.maximum(chain.memory[unit, unit + 1] - chain.room, 0)
            overflow = rate_ns(beyond, np.maximum(chain.host, 1))
            cost = cost + weights.overflow * np.where(chain.host > 0, overflow, 0)
        possible = free & (chain.reach[:, unit] > unit) & (room >= behind)
        if current >= 0:
            if not chain.even:
                hop = chain.transfers(int(chain.cuts[unit]))
            assert hop is not None
            cost = cost + weights.link * np.minimum(hop[current], NEVER)
            possible &= (hop[current] < NEVER) & (len(stages) + 2 <= problem.maximum_stages)
            left = room + int(chain.room[current] - chain.memory[first, unit])
            possible[current] = chain.reach[current, first] > unit and left >= behind
            cost[current] = weights.compute * (queue + int(problem.times[current, unit]))
            if chain.host[current]:
                streamed = chain.overflowing(current, unit + 1)[first]
                streamed -= chain.prefix[current, unit + 1] - chain.prefix[current, first]
                cost[current] += weights.overflow * int(streamed)
        if not possible.any():
            return None
        chosen = int(np.where(possible, cost, 4 * NEVER - 1).argmin())
        if chosen != current:
            if current >= 0:
                stages.append((first, unit, (current,)))
            current, first, queue = chosen, unit, 0
            free[current] = False
            room -= int(chain.room[current])
        queue += int(problem.times[current, unit])
    return [*stages, (first, n, (current,))]


def _evaluate(problem: Problem, stages: Stages, lower: int, bound: str, solver: str) -> Partition:
    return evaluate(
        problem,
        range(len(problem.graph.operators)),
        [(first, end, tuple(problem.nodes[node] for node in nodes)) for first, end, nodes in stages],
        lower_bound_ns=lower,
        bound=bound,
        solver=solver,
    )
