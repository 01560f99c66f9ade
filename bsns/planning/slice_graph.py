"""SliceGraph: the best cut of one topological order into consecutive stages (paper §1.5).

Owns the segment tables, which hold what every run of consecutive operators would cost as a stage, and the dynamic
programme over them. Promises the optimum for the given operator order and node order, where a node may be left out if
all links are alike, and otherwise only from the end of the node order; with Transfers.DIRECT over unlike links the
tables take the link to the neighbouring stage. Other orders are the business of `bsns.planning.genetic`. Slicing any
topological order gives an acyclic quotient graph, and every acyclic partition is a slicing of some topological order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np

from bsns.planning.bounds import lower_bound
from bsns.planning.ideals import GraphArrays, Integers
from bsns.planning.problem import (
    SECOND_NS,
    Objective,
    Partition,
    PlanningError,
    PlanningNode,
    Problem,
    evaluate,
)

INFEASIBLE: Final = 2**61
"""Cost of what is no stage, in nanoseconds."""
_SKIPPED: Final = -1
"""Choice of a group that holds no stage."""


@dataclass(frozen=True)
class Slicing:
    """Cuts of one order: stage j holds positions [cuts[j], cuts[j+1]) and runs on nodes[j]; no stage is empty."""

    value_ns: int
    cuts: tuple[int, ...]
    nodes: tuple[tuple[PlanningNode, ...], ...]


class SegmentTables:
    """Bytes in and out, memory and time of the stage of positions [l, r) of one order, as tables over l and r, both 0
    to n. Each table takes 8 (n+1)² bytes.
    """

    def __init__(self, problem: Problem, arrays: GraphArrays, order: Sequence[int]) -> None:
        self._problem = problem
        self._order = np.asarray(order)
        self._count = arrays.count
        self._no_stage = np.tri(self._count + 1, dtype=np.bool_)
        if arrays.relayed:
            cuts = np.array(problem.cut_bytes(order), np.int64)
            self._received, self._sent = cuts[:, None], cuts[None, :]
        else:
            self._received, self._sent = self._direct(arrays)
        self._row = {node.node: number for number, node in enumerate(problem.nodes)}

    def _direct(self, arrays: GraphArrays) -> tuple[Integers, Integers]:
        """A tensor made at p and read at c1 < c2 < … is received by [l, r) if l > p and ci < r for the first ci at or
        after l: for every i a rectangle of (l, r). It is sent if l <= p < r <= the last c: one rectangle.
        """
        count = self._count
        position = np.empty(count, np.int64)
        position[self._order] = np.arange(count)
        received: list[tuple[int, int, int, int, int]] = []
        sent: list[tuple[int, int, int, int, int]] = []
        for producer, readers, size in zip(arrays.producers, arrays.consumers, arrays.sizes):
            made = before = int(position[producer])
            for place in sorted(int(position[reader]) for reader in readers):
                received.append((before + 1, place + 1, place + 1, count + 1, int(size)))
                before = place
            sent.append((0, made + 1, made + 1, before + 1, int(size)))
        return self._sum_of_rectangles(received), self._sum_of_rectangles(sent)

    def _sum_of_rectangles(self, rectangles: list[tuple[int, int, int, int, int]]) -> Integers:
        """Table of the sums of `size` over the rectangles (l from, l end, r from, r end, size) that hold [l, r]."""
        table = np.zeros((self._count + 2, self._count + 2), np.int64)
        if rectangles:
            top, bottom, left, right, size = np.array(rectangles, np.int64).T
            np.add.at(table, (top, left), size)
            np.add.at(table, (bottom, right), size)
            np.add.at(table, (top, right), -size)
            np.add.at(table, (bottom, left), -size)
        np.cumsum(table, axis=0, out=table)
        np.cumsum(table, axis=1, out=table)
        return table[:-1, :-1]

    @cached_property
    def memory(self) -> Integers:
        """Bytes of [l, r): each parameter once, the caches of all sessions, the largest activation peak."""
        graph = self._problem.graph
        users: dict[int, list[int]] = {}
        for place, operator in enumerate(self._order):
            for parameter in graph.operators[operator].parameters:
                users.setdefault(parameter, []).append(place)
        rectangles = []
        for parameter, places in users.items():
            before = -1
            for place in places:
                size = graph.parameters[parameter].size_bytes
                rectangles.append((before + 1, place + 1, place + 1, self._count + 1, size))
                before = place
        table = self._sum_of_rectangles(rectangles)
        caches = np.array([0, *(self._problem.cache_bytes[item] for item in self._order)], np.int64).cumsum()
        table += np.maximum(caches[None, :] - caches[:, None], 0)
        peaks = np.zeros((self._count + 1, self._count + 1), np.int64)
        peaks[:, 1:] = [graph.operators[item].peak_bytes for item in self._order]
        peaks[self._no_stage] = 0
        np.maximum.accumulate(peaks, axis=1, out=peaks)
        return table + peaks

    def kind(self, node: PlanningNode) -> tuple[bytes, int, int]:
        """Equal for nodes that every stage costs the same, but for links."""
        return (
            self._problem.times[self._row[node.node]].tobytes(),
            node.memory_bytes,
            node.host_bytes_per_second,
        )

    def elapsed(self, node: PlanningNode) -> Integers:
        """Compute plus overflow of [l, r) on a node, INFEASIBLE where it does not fit."""
        row = self._problem.times[self._row[node.node]][self._order]
        total = np.concatenate([[0], np.cumsum(row)])
        table: Integers = total[None, :] - total[:, None]
        if self._whole > node.memory_bytes:
            beyond = np.maximum(self.memory - node.memory_bytes, 0)
            if node.host_bytes_per_second:
                table += _duration(beyond, node.host_bytes_per_second)
            else:
                table[beyond > 0] = INFEASIBLE
        return table

    @cached_property
    def _whole(self) -> int:
        return self._problem.stage_memory(range(self._count))

    def stage(
        self, nodes: Sequence[PlanningNode], before: Sequence[PlanningNode], after: Sequence[PlanningNode]
    ) -> Integers:
        """Effective nanoseconds of every [l, r) on `nodes`, between the stages on `before` and `after`; INFEASIBLE
        where l >= r.
        """
        receive = self._transfer(self._received, before, nodes)
        throughput = self._problem.objective is Objective.THROUGHPUT
        send = self._transfer(self._sent, nodes, after) if throughput else np.zeros((1, 1), np.int64)
        costs = []
        for node in nodes:
            table = self.elapsed(node)
            cost = table + receive + send
            cost[table >= INFEASIBLE] = INFEASIBLE
            cost[np.broadcast_to(receive >= INFEASIBLE, cost.shape)] = INFEASIBLE
            cost[np.broadcast_to(send >= INFEASIBLE, cost.shape)] = INFEASIBLE
            costs.append(cost)
        found = costs[0]
        if len(costs) > 1 and not throughput:
            found = np.maximum.reduce(costs)
        elif len(costs) > 1:
            with np.errstate(divide="ignore"):
                rate = sum(1 / cost.astype(np.float64) for cost in costs)
                found = np.ceil(1 / np.asarray(rate)).astype(np.int64)
            found[np.maximum.reduce(costs) >= INFEASIBLE] = INFEASIBLE
        found[self._no_stage] = INFEASIBLE
        return found

    def _transfer(self, size: Integers, senders: Sequence[PlanningNode], receivers: Sequence[PlanningNode]) -> Integers:
        slowest = np.zeros_like(size)
        for link in {self._problem.links.between(a.node, b.node) for a in senders for b in receivers}:
            if link is None:
                return np.where(size > 0, INFEASIBLE, 0)
            np.maximum(
                slowest, np.where(size > 0, link.latency_ns + _duration(size, link.bytes_per_second), 0), out=slowest
            )
        return slowest


def slice_order(
    problem: Problem, arrays: GraphArrays, order: Sequence[int], groups: Sequence[tuple[PlanningNode, ...]]
) -> Slicing | None:
    """The best slicing of `order` over `groups`, each the nodes of one stage, in this order; None if there is none.

    D[j][r], the best value of positions [0, r) on the first j groups, is the least over l of the larger of (or the sum
    of) D[j-1][l] and the cost of [l, r). D[j][·] is not monotone, as a longer prefix may end at a narrower cut, so
    that no search over l is cut short: O(k n²) in whole-table operations.
    """
    tables = SegmentTables(problem, arrays, order)
    count, stage_count = arrays.count, problem.terms.stage_count
    alike = not problem.links.measured
    may_skip = alike and stage_count is None
    value = np.full(count + 1, INFEASIBLE, np.int64)
    value[0] = 0
    choices: list[Integers] = []
    best, last = INFEASIBLE, 0
    cost, cost_of = np.zeros(0, np.int64), None
    for number, nodes in enumerate(groups):
        # No byte crosses before the first position and after the last: any neighbour will do for stages at the ends.
        before = groups[0] if alike else groups[max(number - 1, 0)]
        after = groups[0] if alike else groups[min(number + 1, len(groups) - 1)]
        kind = [tables.kind(node) for node in nodes]
        if cost_of != kind or not alike:
            cost, cost_of = tables.stage(nodes, before, after), kind
        if problem.objective is Objective.THROUGHPUT:
            joined = np.maximum(value[:, None], cost)
        else:
            joined = np.minimum(value[:, None] + cost, INFEASIBLE)
        choice = joined.argmin(axis=0)
        least = joined[choice, np.arange(count + 1)]
        if may_skip:
            choice, least = np.where(value <= least, _SKIPPED, choice), np.minimum(value, least)
        choices.append(choice)
        value = least
        if value[count] < best and stage_count in (None, number + 1):
            best, last = int(value[count]), number + 1
    if best == INFEASIBLE:
        return None
    cuts, used = [count], []
    for number in reversed(range(last)):
        left = int(choices[number][cuts[-1]])
        if left != _SKIPPED:
            cuts.append(left)
            used.append(groups[number])
    return Slicing(best, tuple(reversed(cuts)), tuple(reversed(used)))


def node_groups(problem: Problem, nodes: Sequence[PlanningNode]) -> list[tuple[PlanningNode, ...]]:
    """Nodes in the order given, `replicas` at a time: one group for each stage that is possible."""
    replicas = problem.terms.replicas
    return [tuple(nodes[replicas * item : replicas * (item + 1)]) for item in range(problem.maximum_stages)]


def partition_of(problem: Problem, order: Sequence[int], slicing: Slicing, solver: str) -> Partition:
    """The partition of a slicing with the fast lower bound. Nodes left over join the slowest stage, one after another,
    as long as that makes the slowest stage faster, if the terms say so.
    """
    bound, name = lower_bound(problem)

    def priced(nodes: Sequence[tuple[PlanningNode, ...]]) -> Partition:
        stages = list(zip(slicing.cuts, slicing.cuts[1:], nodes))
        return evaluate(problem, order, stages, lower_bound_ns=bound, bound=name, solver=solver)

    groups = list(slicing.nodes)
    found = priced(groups)
    if problem.objective is Objective.LATENCY or not problem.terms.spread_leftover:
        return found
    for node in found.unused:
        slowest = max(range(len(groups)), key=lambda number: found.stages[number].effective_ns)
        more = [(*group, node) if number == slowest else group for number, group in enumerate(groups)]
        try:
            better = priced(more)
        except PlanningError:
            continue
        if better.stages[slowest].effective_ns < found.stages[slowest].effective_ns:
            found, groups = better, more
    return found


def solve(problem: Problem, order: Sequence[int] | None = None) -> Partition:
    """The best slicing of `order` (the graph's own if None) over the nodes in the order they are given.

    PlanningError if there is none, or if `order` is no topological order that the terms allow.
    """
    order = tuple(range(len(problem.graph.operators))) if order is None else tuple(order)
    arrays = GraphArrays.of(problem.graph, problem.terms.transfers)
    slicing = slice_order(problem, arrays, order, node_groups(problem, problem.nodes))
    if slicing is None:
        raise problem.infeasible()
    return partition_of(problem, order, slicing, "slice-graph")


def _duration(size: Integers, per_second: int) -> Integers:
    """Nanoseconds of `size` bytes, rounded up, also where size times 10**9 exceeds 64 bits."""
    if per_second < 2**33:
        seconds, rest = np.divmod(size, per_second)
        whole: Integers = seconds * SECOND_NS - (-rest * SECOND_NS // per_second)
        return whole
    if size.max(initial=0) < 2**33:
        small: Integers = -(-size * SECOND_NS // per_second)
        return small
    exact: Integers = (-(-size.astype(object) * SECOND_NS // per_second)).astype(np.int64)
    return exact
