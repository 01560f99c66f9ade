"""Refinement: betters a partition by moves that slicing one order cannot make.

Owns two searches over partitions with an acyclic quotient graph: annealing, which moves single operators between
neighbouring stages, and chain neighbourhoods, which vary a dozen operators around every cut at once and take the best
chain of ideals among all combinations. Promises never to return what `evaluate` finds worse than what it got, and the
same answer for the same seed if no deadline is set. Memory does not guide the searches: a result that does not fit is
dropped.
"""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from bsns.planning.ideals import FORBIDDEN, Bits, Floats, GraphArrays
from bsns.planning.problem import (
    SECOND_NS,
    Link,
    Objective,
    Partition,
    PlanningError,
    PlanningNode,
    Problem,
    evaluate,
)

_POWER: Final = 24.0
"""Stages' costs are compared by the sum of their powers: nearly their maximum, but one sees which moves help next."""
_SMALL_NEIGHBOURHOOD: Final = 12
_LARGE_NEIGHBOURHOOD: Final = 18
_MAXIMUM_NEIGHBOURS: Final = 300
_START_TEMPERATURE: Final = 0.05


@dataclass(frozen=True, slots=True)
class Effort:
    """How long a search goes on: a number of steps, or until a monotonic time if that is set."""

    steps: int
    deadline: float | None = None

    def done(self, step: int, started: float) -> float:
        """The share that is spent, at least 1 if all."""
        if self.deadline is None:
            return step / max(1, self.steps)
        return (time.monotonic() - started) / max(1e-9, self.deadline - started)


class Refinement:
    """Partitions over fixed nodes in a fixed order, one node a stage."""

    def __init__(self, problem: Problem, arrays: GraphArrays, nodes: Sequence[PlanningNode], seed: int) -> None:
        self._problem, self._arrays, self._nodes, self._seed = problem, arrays, tuple(nodes), seed
        self._throughput = problem.objective is Objective.THROUGHPUT
        row = {node.node: number for number, node in enumerate(problem.nodes)}
        self._times = problem.times[[row[node.node] for node in nodes]].astype(np.float64)
        links = [problem.links.between(a.node, b.node) for a, b in itertools.pairwise(nodes)]
        self._receive = [_terms(None), *map(_terms, links)]
        self._send = [*map(_terms, links), _terms(None)]
        self._power = _POWER if self._throughput else 1.0

    def run(self, found: Partition, annealing: Effort, neighbourhoods: Effort) -> Partition:
        """The better of `found` and what both searches, one after the other, make of it."""
        chain = self._chain_of(found)
        for better in (
            self._anneal(chain, float(found.value_ns), annealing),
            self._vary_chains(chain, float(found.value_ns), neighbourhoods),
        ):
            found = self._better(found, better)
            chain = self._chain_of(found)
        return found

    def _chain_of(self, partition: Partition) -> Bits:
        chain = np.zeros((len(self._nodes) + 1, self._arrays.count), np.bool_)
        for number, stage in enumerate(partition.stages):
            chain[number + 1 :, list(partition.order[: stage.end])] = True
        chain[len(partition.stages) :] = True
        return chain

    def _better(self, found: Partition, chain: Bits) -> Partition:
        sizes = chain.sum(1).tolist()
        stages = [(a, b, (node,)) for a, b, node in zip(sizes, sizes[1:], self._nodes) if a < b]
        try:
            other = evaluate(
                self._problem,
                self._arrays.stage_order(chain[1:]),
                stages,
                lower_bound_ns=found.lower_bound_ns,
                bound=found.bound,
                solver=f"{found.solver.removesuffix(_SUFFIX)}{_SUFFIX}",
            )
        except PlanningError:
            return found
        return other if other.value_ns < found.value_ns else found

    # --------------------------------------------------------------------------------------------------- annealing

    def _anneal(self, chain: Bits, value: float, effort: Effort) -> Bits:
        """Random moves of one operator to the stage before or after its own, if the graph allows it."""
        arrays, count = self._arrays, len(self._nodes)
        stage = [int(item) for item in (~chain[1:]).sum(0)]
        times = self._times.tolist()
        sizes = arrays.sizes.tolist()
        touched = [np.flatnonzero(row).tolist() for row in arrays.touches]
        compute = [0.0] * count
        received, sent = [0] * count, [0] * count
        for operator, at in enumerate(stage):
            compute[at] += times[at][operator]

        def transfers(tensor: int) -> tuple[list[int], list[int]]:
            """The stages that receive the tensor, and those that send it."""
            source = stage[int(arrays.producers[tensor])]
            targets = {stage[reader] for reader in arrays.consumers[tensor]}
            if arrays.relayed:
                last = max(targets)
                return list(range(source + 1, last + 1)), list(range(source, last))
            targets.discard(source)
            return sorted(targets), [source] if targets else []

        def cost(at: int) -> float:
            time_ns = compute[at] + _transfer(self._receive[at], received[at])
            return time_ns + _transfer(self._send[at], sent[at]) if self._throughput else time_ns

        def count_in(tensors: list[int], sign: int, changed: set[int]) -> None:
            for tensor in tensors:
                receivers, senders = transfers(tensor)
                for at in receivers:
                    received[at] += sign * sizes[tensor]
                for at in senders:
                    sent[at] += sign * sizes[tensor]
                changed.update(receivers, senders)

        count_in(list(range(len(sizes))), 1, set())
        costs = [cost(at) for at in range(count)]
        best = value
        best_stage = stage[:]
        chance = random.Random(self._seed)
        started, step, spent = time.monotonic(), 0, 0.0
        while count > 1:
            if step % 256 == 0:
                spent = effort.done(step, started)
                if spent >= 1:
                    break
            step += 1
            operator = chance.randrange(arrays.count)
            at = stage[operator]
            to = at + 1 if chance.random() < 0.5 else at - 1
            if to > at:
                allowed = to < count and all(stage[item] >= to for item in arrays.successors[operator])
            else:
                allowed = to >= 0 and all(stage[item] <= to for item in arrays.predecessors[operator])
            if not allowed:
                continue
            changed = {at, to}
            count_in(touched[operator], -1, changed)
            stage[operator] = to
            count_in(touched[operator], 1, changed)
            compute[at] -= times[at][operator]
            compute[to] += times[to][operator]
            new = {item: cost(item) for item in changed}
            worse = sum((new[item] / best) ** self._power - (costs[item] / best) ** self._power for item in changed)
            temperature = _START_TEMPERATURE * count * (1 - spent) ** 2 + 1e-9
            if worse <= 0 or chance.random() < math.exp(-worse / temperature):
                for item, price in new.items():
                    costs[item] = price
                total = max(costs) if self._throughput else sum(costs)
                if total < best:
                    best, best_stage = total, stage[:]
            else:
                count_in(touched[operator], -1, changed)
                stage[operator] = at
                count_in(touched[operator], 1, changed)
                compute[to] -= times[to][operator]
                compute[at] += times[at][operator]
        return np.arange(count + 1)[:, None] > np.array(best_stage)[None, :]

    # --------------------------------------------------------------------------------------- neighbourhoods of chains

    def _vary_chains(self, chain: Bits, value: float, effort: Effort) -> Bits:
        """Around every cut the ideals that differ from it in some of a few operators; then the best chain of them."""
        draw = np.random.default_rng(self._seed)
        best, best_chain = value, chain
        started, step = time.monotonic(), 0
        while len(self._nodes) > 1 and effort.done(step, started) < 1:
            step += 1
            limit = _SMALL_NEIGHBOURHOOD if step % 2 else _LARGE_NEIGHBOURHOOD
            families = [chain[:1]]
            families += [self._neighbours(ideal, int(draw.integers(3, limit)), draw) for ideal in chain[1:-1]]
            families.append(chain[-1:])
            # Every fourth round looks at the objective itself.
            chain, total = self._best_chain(families, best, self._power if step % 4 else None)
            if total < best:
                best, best_chain = total, chain
        return best_chain

    def _neighbours(self, ideal: Bits, size: int, draw: np.random.Generator) -> Bits:
        """The ideal, and those that differ from it only in a random set of `size` operators around its border."""
        arrays = self._arrays
        inside = ideal.tolist()
        free: set[int] = set()

        def at_border(operator: int) -> bool:
            if inside[operator]:
                return all(not inside[item] or item in free for item in arrays.successors[operator])
            return all(inside[item] or item in free for item in arrays.predecessors[operator])

        border = [operator for operator in range(arrays.count) if at_border(operator)]
        while border and len(free) < size:
            operator = border.pop(int(draw.integers(len(border))))
            if operator in free:
                continue
            free.add(operator)
            further = arrays.predecessors[operator] if inside[operator] else arrays.successors[operator]
            border += [item for item in further if inside[item] == inside[operator] and at_border(item)]
        found = ideal[None, :].copy()
        found[0, list(free)] = False
        for operator in sorted(free):
            more = found[found[:, list(arrays.predecessors[operator])].all(1)]
            more[:, operator] = True
            found = np.concatenate([found, more])
            if len(found) > _MAXIMUM_NEIGHBOURS:
                found = found[draw.permutation(len(found))[:_MAXIMUM_NEIGHBOURS]]
        return np.concatenate([ideal[None, :], found])

    def _best_chain(self, families: list[Bits], reference: float, power: float | None) -> tuple[Bits, float]:
        """One ideal of each family, nested, such that the sum of powers of the stages' costs (or their objective) is
        least; and the objective's value for it.
        """
        value = np.zeros(1)
        steps = []
        for number, (before, after) in enumerate(itertools.pairwise(families)):
            cost = self._costs(number, before, after)
            if power is not None:
                joined = value[:, None] + np.minimum(cost / reference, 4.0) ** power
                joined[np.isinf(cost)] = np.inf
            elif self._throughput:
                joined = np.maximum(value[:, None], cost)
            else:
                joined = value[:, None] + cost
            choice = joined.argmin(axis=0)
            value = joined[choice, np.arange(len(after))]
            steps.append((choice, cost))
        at, costs, chain = 0, [], [families[-1][0]]
        for (choice, cost), family in zip(reversed(steps), reversed(families[:-1])):
            costs.append(float(cost[choice[at], at]))
            at = int(choice[at])
            chain.append(family[at])
        return np.array(chain[::-1]), max(costs) if self._throughput else sum(costs)

    def _costs(self, number: int, before: Bits, after: Bits) -> Floats:
        """Cost of stage `number` between any two ideals; infinite if they are not nested."""
        received, sent = self._arrays.transfers(before, after)
        times = self._times[number]
        cost: Floats = (after @ times)[None, :] - (before @ times)[:, None]
        for size, (latency, rate) in ((received, self._receive[number]), (sent, self._send[number])):
            if size is received or self._throughput:
                cost += size * rate if not math.isinf(rate) else np.where(size > 0, np.inf, 0)
                if latency:
                    cost += latency * (size > 0)
        cost[received >= FORBIDDEN] = np.inf
        if self._arrays.relayed:
            # A stage without operators is left out of the chain, and relays nothing.
            cost[before.sum(1)[:, None] == after.sum(1)[None, :]] = np.inf
            if before[0].all():
                cost[0, 0] = 0.0
        return cost


_SUFFIX: Final = "+refined"


def _terms(link: Link | None) -> tuple[float, float]:
    """Latency, and nanoseconds a byte, infinitely many where there is no link."""
    return (0.0, math.inf) if link is None else (float(link.latency_ns), SECOND_NS / link.bytes_per_second)


def _transfer(terms: tuple[float, float], size: int) -> float:
    return terms[0] + size * terms[1] if size else 0.0
