"""BRKGA: a biased random-key genetic algorithm over topological orders and node orders (paper §1.5).

A chromosome holds a key for each operator and each node. Kahn's algorithm that takes the ready operator with the
smallest key decodes it to a topological order, sorting nodes by key to a node order, and slicing both gives its
fitness. The best is then refined. Promises never to be worse than slicing the graph's own order over the nodes as
given, the same answer for the same seed if no deadline is set, and the best so far at a deadline.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Sequence
from typing import Final

import numpy as np

from bsns.planning.ideals import Floats, GraphArrays
from bsns.planning.problem import Partition, PlanningNode, Problem
from bsns.planning.refinement import Effort, Refinement
from bsns.planning.slice_graph import INFEASIBLE, Slicing, node_groups, partition_of, slice_order

DEFAULT_GENERATIONS: Final = 20
_ELITE_SHARE: Final = 0.2
_MUTANT_SHARE: Final = 0.15
_INHERITANCE: Final = 0.7
"""Chance that a child takes a gene from its better parent."""
_TABLE_BUDGET: Final = 4_000_000
"""Table entries sliced in a generation: the population is as large as that allows for the graph, from 8 to 100."""
_ANNEALING_STEPS: Final = 4_096
_CHAIN_ROUNDS: Final = 3
"""Steps of the refinement for each generation."""
_SEARCH_SHARE: Final = 0.3
_ANNEALING_SHARE: Final = 0.55
"""Shares of the deadline at which orders are left for annealing, and that for chains."""


def solve(
    problem: Problem, *, seed: int = 0, deadline_s: float | None = None, generations: int | None = None
) -> Partition:
    """The best partition found in `generations` (DEFAULT_GENERATIONS if neither is given) or until `deadline_s` seconds
    have gone by. The order of operators varies only if the terms set `free_order`. PlanningError if none was found.
    """
    started = time.monotonic()
    if deadline_s is None and generations is None:
        generations = DEFAULT_GENERATIONS
    search = _Orders(problem, np.random.default_rng(seed))
    end = None if deadline_s is None else started + _SEARCH_SHARE * deadline_s
    found = search.run(generations, end)
    alone = problem.terms.replicas == 1 and all(len(stage.nodes) == 1 for stage in found.stages)
    if not problem.terms.free_order or not alone or found.value_ns <= found.lower_bound_ns:
        return found
    nodes = [stage.nodes[0] for stage in found.stages]
    rounds = generations or 0
    return Refinement(problem, search.arrays, nodes, seed).run(
        found,
        Effort(_ANNEALING_STEPS * rounds, None if deadline_s is None else started + _ANNEALING_SHARE * deadline_s),
        Effort(_CHAIN_ROUNDS * rounds, None if deadline_s is None else started + deadline_s),
    )


class _Orders:
    """The genetic search itself."""

    def __init__(self, problem: Problem, draw: np.random.Generator) -> None:
        self._problem, self._draw = problem, draw
        self.arrays = GraphArrays.of(problem.graph, problem.terms.transfers)
        count = self.arrays.count
        self._genes = count + len(problem.nodes)
        self._size = int(np.clip(_TABLE_BUDGET // (count + 1) ** 2, 8, 100))
        self._best: tuple[int, tuple[int, ...], Slicing] | None = None

    def run(self, generations: int | None, end: float | None) -> Partition:
        """The best slicing of all orders that were tried; the graph's own over the nodes as given is the first."""
        population = [(self._fitness(keys), keys) for keys in self._seeds() if self._in_time(end)]
        while len(population) < self._size and self._in_time(end):
            keys = self._draw.random(self._genes)
            population.append((self._fitness(keys), keys))
        generation = 0
        while self._in_time(end) and (generations is None or generation < generations):
            generation += 1
            population.sort(key=lambda item: item[0])
            population = self._next(population, end)
        if self._best is None:
            raise self._problem.infeasible()
        _, order, slicing = self._best
        return partition_of(self._problem, order, slicing, "genetic")

    def _in_time(self, end: float | None) -> bool:
        return self._best is None or end is None or time.monotonic() < end

    def _next(self, population: list[tuple[int, Floats]], end: float | None) -> list[tuple[int, Floats]]:
        elite = max(1, round(_ELITE_SHARE * self._size))
        mutants = max(1, round(_MUTANT_SHARE * self._size))
        following = population[:elite]
        while len(following) < self._size and self._in_time(end):
            keys = self._draw.random(self._genes)
            if len(following) < self._size - mutants:
                better = population[int(self._draw.integers(elite))][1]
                other = population[int(self._draw.integers(elite, max(elite + 1, len(population)))) % len(population)][
                    1
                ]
                keys = np.where(keys < _INHERITANCE, better, other)
            following.append((self._fitness(keys), keys))
        return following

    def _fitness(self, keys: Floats) -> int:
        count = self.arrays.count
        order = self._topological(keys[:count]) if self._problem.terms.free_order else tuple(range(count))
        nodes = [self._problem.nodes[int(item)] for item in np.argsort(keys[count:], kind="stable")]
        slicing = self._slice(order, nodes)
        if slicing is None:
            return INFEASIBLE
        if self._best is None or slicing.value_ns < self._best[0]:
            self._best = slicing.value_ns, order, slicing
        return slicing.value_ns

    def _slice(self, order: Sequence[int], nodes: Sequence[PlanningNode]) -> Slicing | None:
        return slice_order(self._problem, self.arrays, order, node_groups(self._problem, nodes))

    def _topological(self, keys: Floats) -> tuple[int, ...]:
        waiting = [len(before) for before in self.arrays.predecessors]
        ready = [(float(keys[item]), item) for item, before in enumerate(waiting) if not before]
        heapq.heapify(ready)
        order = []
        while ready:
            _, operator = heapq.heappop(ready)
            order.append(operator)
            for successor in self.arrays.successors[operator]:
                waiting[successor] -= 1
                if not waiting[successor]:
                    heapq.heappush(ready, (float(keys[successor]), successor))
        return tuple(order)

    def _seeds(self) -> list[Floats]:
        """Keys of the given order, breadth first, depth first, by earliest and by latest start (operators that could
        run at the same time come together), each over the nodes as given, and the given order over the fastest first.
        """
        arrays, problem = self.arrays, self._problem
        count = arrays.count
        work = problem.times.min(axis=0).astype(np.float64)
        layer, start, end = np.zeros(count), np.zeros(count), np.zeros(count)
        for operator in range(count):
            for before in arrays.predecessors[operator]:
                layer[operator] = max(layer[operator], layer[before] + 1)
                start[operator] = max(start[operator], start[before] + work[before])
        for operator in reversed(range(count)):
            end[operator] = work[operator] + max((end[after] for after in arrays.successors[operator]), default=0.0)
        given = np.arange(count, dtype=np.float64)
        nodes = np.arange(len(problem.nodes), dtype=np.float64)
        fastest = problem.times.sum(axis=1).astype(np.float64)
        keys = [given, layer, self._depth_first(), start, -end] if problem.terms.free_order else [given]
        seeds = [np.concatenate([_scaled(item), _scaled(nodes)]) for item in keys]
        return [*seeds, np.concatenate([_scaled(given), _scaled(fastest)])]

    def _depth_first(self) -> Floats:
        waiting = [len(before) for before in self.arrays.predecessors]
        ready = [item for item, before in reversed(list(enumerate(waiting))) if not before]
        keys = np.zeros(self.arrays.count)
        place = 0
        while ready:
            operator = ready.pop()
            keys[operator] = place
            place += 1
            for successor in reversed(self.arrays.successors[operator]):
                waiting[successor] -= 1
                if not waiting[successor]:
                    ready.append(successor)
        return keys


def _scaled(keys: Floats) -> Floats:
    """The same order of keys, from 0 to 1."""
    spread = float(np.ptp(keys))
    return (keys - keys.min()) / spread if spread else np.zeros_like(keys)
