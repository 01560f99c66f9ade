"""The best partition of a chain over a small fleet: a dynamic programme over subsets of nodes (paper §1.5, §4 row 4).

Owns the search over which nodes serve, in which order, in which groups of replicas and with which cuts, all at once
and with links of any kind. Promises the optimum over everything that `problem.evaluate` accepts. Its time is
exponential in the number of nodes; `work` says how much before it begins.

A state is a set of nodes in use, the group of nodes that serves the last stage, and the cut it ends at. For LATENCY
stages add up, and a state holds the least sum. For THROUGHPUT the time of the last stage is not known before its
successor is: a longer prefix may end at a narrower cut, so costs are not monotone (the trap of paper §1.5). Hence a
threshold: under the question "can every stage take at most T?" a state holds the most time that the last stage has left
for sending. More is never worse, so that one number is enough, and the least T with an answer is found by bisection.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import comb
from typing import Final

import numpy as np

from bsns.planning.chain import NEVER, Chain, Integers
from bsns.planning.problem import Objective

Stages = list[tuple[int, int, tuple[int, ...]]]
"""First cut, end cut, and the numbers of the nodes, for each stage."""

_NEWTON_STEPS: Final = 12
_CALL_CELLS: Final = 600
"""Table cells that take as long as it takes to begin with an array."""
_HAND_OVER_CELLS: Final = 12
"""Table cells that take as long as one hand-over."""
_CELLS: Final = 2**22
"""Table cells that one step computes at once."""


def groups(chain: Chain) -> list[tuple[int, ...]]:
    """Every set of nodes that can serve a stage.

    More than `replicas` nodes only where that can help: for LATENCY a stage is as slow as its slowest replica.
    """
    terms, nodes = chain.problem.terms, range(chain.nodes)
    several = terms.spread_leftover and chain.problem.objective is Objective.THROUGHPUT
    most = min(chain.nodes, terms.maximum_assignments) if several else terms.replicas
    return [group for size in range(terms.replicas, most + 1) for group in combinations(nodes, size)]


def work(chain: Chain) -> int:
    """Table cells that one pass computes: transitions between sets of nodes, times pairs of cuts. With groups of any
    size also, for each node in each group, a budget, and from the third stage on what every group before hands over.
    """
    terms, m, stages, cuts = chain.problem.terms, chain.nodes, chain.problem.maximum_stages, chain.units + 1
    if terms.spread_leftover and chain.problem.objective is Objective.THROUGHPUT:
        budgets = (m << m) * _NEWTON_STEPS * max(cuts**2, _CALL_CELLS) // 2
        handed = int(4**m) * max(stages - 2, 0) * cuts * _HAND_OVER_CELLS
        return int(3**m) * stages * cuts**2 + budgets + handed
    return (comb(m, terms.replicas) << (m - terms.replicas)) * cuts**2


def budget(threshold: int, costs: Sequence[Integers]) -> Integers:
    """The most time that transfers may add to each replica's cost, element by element, so that the stage's effective
    time stays within `threshold`; negative where it does not even without transfers.

    One replica: threshold - cost, exactly. Several: the x with sum of 1 / (x + cost) = 1 / threshold, rounded up so
    far that nothing possible is refused. The sum is convex and falls with x, so Newton's method from a point on its
    left never passes it. threshold - least cost is on the left, as that replica alone already reaches 1 / threshold
    there; threshold * k - mean cost is, by Jensen's inequality.
    """
    if len(costs) == 1:
        return np.where(costs[0] < NEVER, threshold - costs[0], -NEVER)
    fits = costs[0] < NEVER
    for cost in costs[1:]:
        fits &= cost < NEVER
    if threshold == 0:  # only a replica that takes no time at all can keep it
        return np.where(fits, -np.minimum.reduce(costs), -NEVER)
    values = [np.where(fits, cost, 0).astype(np.float64) for cost in costs]
    mean = sum(values[1:], values[0]) / len(values)
    least = values[0]
    for value in values[1:]:
        least = np.minimum(least, value)
    found = np.maximum(len(values) * threshold - mean, threshold - least)
    for _ in range(_NEWTON_STEPS):
        rate, slope = np.zeros_like(mean), np.zeros_like(mean)
        for value in values:
            speed = 1.0 / np.maximum(found + value, 0.5)
            rate += speed
            slope += speed * speed
        found += (rate - 1.0 / threshold) / slope
    slack = 1e-9 + 1e-12 * (np.abs(found) + threshold)
    return np.where(fits, np.floor(found + slack).astype(np.int64), -NEVER)


@dataclass(frozen=True, slots=True)
class _Layer:
    """The states with one number of stages: set of nodes (as bits), last group, and by cut what the state holds."""

    used: Integers
    last: Integers
    value: Integers


class ExactChain:
    """The dynamic programme over the tables of one chain."""

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        self._latency = chain.problem.objective is Objective.LATENCY
        self._groups = groups(chain)
        self._bits = [sum(1 << node for node in group) for group in self._groups]
        runs = [chain.run(node) for node in range(chain.nodes)]
        self._runs = [[runs[node] for node in group] for group in self._groups]
        # Hop time between groups for each cut, by its distinct sizes: (sizes, groups, groups).
        self._size_of = np.searchsorted(chain.sizes, chain.cuts[1:-1])
        self._hops = np.zeros((len(chain.sizes), len(self._groups), len(self._groups)), dtype=np.int64)
        for index, size in enumerate(chain.sizes):
            pair = chain.transfers(int(size))
            sent = np.stack([pair[list(senders)].max(axis=0) for senders in self._groups])
            for number, receivers in enumerate(self._groups):
                self._hops[index, :, number] = sent[:, list(receivers)].max(axis=1)

    def least_latency(self) -> Stages | None:
        """The partition with the least sum; None if there is none."""
        tables = [-np.maximum.reduce(runs) for runs in self._runs]
        layers = list(self._layers(tables))
        best: tuple[int, int, int] | None = None
        for number, layer in enumerate(layers):
            if self._may_end(number + 1) and len(layer.value):
                state = int(np.argmax(layer.value[:, -1]))
                found = int(layer.value[state, -1])
                if found > -NEVER and (best is None or found > best[0]):
                    best = (found, number, state)
        return None if best is None else self._trace(layers, tables, best[1], best[2])

    def within(self, threshold: int) -> Stages | None:
        """A partition none of whose stages takes longer than `threshold`; None if there is none."""
        tables = [budget(threshold, runs) for runs in self._runs]
        layers: list[_Layer] = []
        for layer in self._layers(tables):
            layers.append(layer)
            if self._may_end(len(layers)) and len(layer.value):
                state = int(np.argmax(layer.value[:, -1]))
                if layer.value[state, -1] >= 0:
                    return self._trace(layers, tables, len(layers) - 1, state)
        return None

    def _may_end(self, stages: int) -> bool:
        return self._chain.problem.terms.stage_count in (None, stages)

    def _layers(self, tables: Sequence[Integers]) -> Iterator[_Layer]:
        """States with one stage, with two, and so on. `tables[g][l, r]`: what the run [l, r) leaves on group g."""
        limit = self._chain.problem.terms.maximum_assignments
        layer = _Layer(
            np.array(self._bits, dtype=np.int64),
            np.arange(len(self._groups), dtype=np.int64),
            np.stack([np.concatenate(([-NEVER], table[0, 1:])) for table in tables]),
        )
        for number in range(self._chain.problem.maximum_stages):
            if number:
                layer = self._next(layer, tables, limit)
            alive = (layer.value > (-NEVER if self._latency else -1)).any(axis=1)
            layer = _Layer(layer.used[alive], layer.last[alive], layer.value[alive])
            yield layer
            if not len(layer.used):
                return

    def _next(self, layer: _Layer, tables: Sequence[Integers], limit: int) -> _Layer:
        by_set = np.argsort(layer.used, kind="stable")
        layer = _Layer(layer.used[by_set], layer.last[by_set], layer.value[by_set])
        used: list[Integers] = []
        last: list[Integers] = []
        value: list[Integers] = []
        for group, bits in enumerate(self._bits):
            rows = np.flatnonzero((layer.used & bits) == 0)
            if not len(rows):
                continue
            sets, starts = np.unique(layer.used[rows], return_index=True)
            # The cheapest way to hand over to this group at each cut, over the last groups of one set of nodes.
            cost = np.minimum.reduceat(self._hand_over(layer, rows, group), starts, axis=0)
            joined = sets | bits
            few = np.bitwise_count(joined) <= limit
            joined, cost = joined[few], cost[few]
            used.append(joined)
            last.append(np.full(len(joined), group, dtype=np.int64))
            found = np.empty((len(joined), self._chain.units + 1), dtype=np.int64)
            step = max(1, _CELLS // (self._chain.units + 1) ** 2)
            for first in range(0, len(joined), step):
                left = tables[group][None, :, :] - cost[first : first + step, :, None]
                found[first : first + step] = left.max(axis=1)
            value.append(np.maximum(found, -NEVER))
        if not used:
            empty = np.zeros(0, dtype=np.int64)
            return _Layer(empty, empty, np.zeros((0, self._chain.units + 1), dtype=np.int64))
        return _Layer(np.concatenate(used), np.concatenate(last), np.concatenate(value))

    def _hand_over(self, layer: _Layer, rows: Integers, group: int) -> Integers:
        """What the receiving side begins with at each cut but the last: shape (rows, units); NEVER where it cannot."""
        n = self._chain.units
        cost = np.full((len(rows), n), NEVER, dtype=np.int64)
        if n > 1:
            hop = self._hops[self._size_of][:, layer.last[rows], group].T
            held = layer.value[rows, 1:-1]
            possible = (held > -NEVER) & (hop < NEVER)
            if self._latency:
                cost[:, 1:] = np.where(possible, hop - held, NEVER)
            else:
                cost[:, 1:] = np.where(possible & (held >= hop), hop, NEVER)
        return cost

    def _trace(self, layers: Sequence[_Layer], tables: Sequence[Integers], number: int, state: int) -> Stages:
        """The stages that led to a state at the last cut."""
        stages: Stages = []
        end = self._chain.units
        while True:
            layer = layers[number]
            group = int(layer.last[state])
            if number == 0:
                return [(0, end, self._groups[group]), *stages]
            before = int(layer.used[state]) ^ self._bits[group]
            rows = np.flatnonzero(layers[number - 1].used == before)
            left = tables[group][:, end] - self._hand_over(layers[number - 1], rows, group)
            row, first = np.unravel_index(int(np.argmax(left)), left.shape)
            stages.insert(0, (int(first), end, self._groups[group]))
            state, number, end = int(rows[row]), number - 1, int(first)
