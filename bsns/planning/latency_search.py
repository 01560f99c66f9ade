"""Good partitions of a chain over a large fleet, for LATENCY: a local search over the order of the nodes.

Owns the search: which groups of nodes serve, in which order. Promises the same result for a seed, and never more than
the best of its starts. Does not promise the optimum: what it finds is compared with `bsns.planning.chain_bound`.

A step takes a group of nodes out of the chain and puts it where that is best, in place of none, one or several groups
that follow each other; before, one of its nodes may have changed places with any other. All places are compared at
once: a forward pass says what the groups before a place cost up to each cut, a backward pass what those behind it cost
from each cut, and the group between is a shortest run from cut to cut. As stages add up, the cost of a run is a
difference of prefix sums, and the best start of a run is a minimum over the cuts from which it fits. For several
replicas that takes the unit-wise slowest of them, and for streaming the memory of the units one by one: neither is ever
less than the truth, and what the search ends with is cut anew with the true costs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from bsns.planning.chain import NEVER, Chain, Integers, rate_ns
from bsns.planning.exact_chain import Stages
from bsns.planning.order_search import traced

_NEIGHBOURS: Final = 48
_LEAST_NEIGHBOURS: Final = 4
_CELLS: Final = 1_000_000
"""Places times cuts that one neighbourhood has at most, beyond its least size."""
_PATIENCE: Final = 8
"""Neighbourhoods without progress after which a climb ends."""
_CLIMBS: Final = 2
"""Starts that are improved, the best first."""
_WORK: Final = 12_000_000
"""Table cells that the climbs may compute in all."""


@dataclass(frozen=True, slots=True)
class _Direction:
    """The chain read from its first unit to its last, or the other way round; arrays by node and cut.

    `since` is the first cut from which a run up to a cut fits without streaming, `at_all` the first with it. Streaming
    costs a run at most its difference of `streamed` less `kept` (by node).
    """

    backward: bool
    prefix: Integers
    since: Integers
    at_all: Integers
    streamed: Integers
    kept: Integers


class LatencySearch:
    """One search; `tick` is asked between neighbourhoods whether time is up."""

    def __init__(self, chain: Chain, *, seed: int, tick: Callable[[], bool]) -> None:
        self._chain = chain
        self._random = np.random.RandomState(seed)  # its stream is frozen, so plans stay reproducible
        self._tick = tick
        terms = chain.problem.terms
        self._replicas = terms.replicas
        self._stages = chain.problem.maximum_stages
        self._exactly = terms.stage_count is not None
        cells = (self._stages + 1) * (chain.units + 1)
        self._neighbourhood = max(_LEAST_NEIGHBOURS, min(_NEIGHBOURS, _CELLS // cells))
        self._work = _WORK
        self._forward, self._backward = self._directions()

    def best(self, starts: Sequence[Stages]) -> Stages | None:
        """The best partition found; None if none was found.

        It begins from the nodes of `starts` in their order, which need not be partitions, and from all nodes by memory
        (then the replicas of a stage have much the same, and most units fit) and by speed.
        """
        chain, r = self._chain, self._replicas
        scored: set[tuple[int, int, tuple[int, ...]]] = set()
        by_speed = np.argsort(chain.prefix[:, -1], kind="stable").tolist()
        firsts = [list(dict.fromkeys(node for _, _, group in stages for node in group[:r])) for stages in starts]
        for first in [*firsts, np.argsort(-chain.room, kind="stable").tolist(), by_speed]:
            order = np.array([*first, *(node for node in by_speed if node not in set(first))], dtype=np.int64)
            for used in {self._stages} if self._exactly else {self._stages, min(len(first) // r, self._stages)}:
                if used:
                    value = self._pass(self._forward, order[None, : used * r].reshape(1, used, r))
                    scored.add((int(value[0, -1, -1]), used, tuple(order.tolist())))
        climbed = [
            self._climb(value, used, np.array(order, dtype=np.int64))
            for value, used, order in sorted(scored)[:_CLIMBS]
            if value < NEVER
        ]
        if not climbed:
            return None
        _, used, nodes = min((value, used, tuple(order.tolist())) for value, used, order in climbed)
        return self._cut(np.array(nodes[: used * r], dtype=np.int64).reshape(used, r))

    def _climb(self, value: int, used: int, order: Integers) -> tuple[int, int, Integers]:
        """Change which groups serve, the first `used` of `order`, until no neighbourhood has anything better."""
        idle = 0
        while idle < _PATIENCE and self._work > 0 and not self._tick():
            idle += 1
            orders, taken = self._neighbours(order)
            serves = taken < used
            for rows in (np.flatnonzero(serves), np.flatnonzero(~serves)):
                if rows.size:
                    found = self._insert(orders[rows], taken[rows], used - int(serves[rows[0]]))
                    if found[0] < value:
                        idle = 0
                    if found[0] <= value:  # sideways, too: plateaus are wide
                        value, used, order = found
                        break
        return value, used, order

    def _neighbours(self, order: Integers) -> tuple[Integers, Integers]:
        """Orders with two nodes exchanged, or none, by row; and the group that one of the two is in."""
        groups, rows = len(order) // self._replicas, np.arange(self._neighbourhood)
        one = self._random.randint(0, groups * self._replicas, self._neighbourhood)
        other = self._random.randint(0, len(order), self._neighbourhood)
        orders = np.repeat(order[None, :], self._neighbourhood, axis=0)
        orders[rows, one], orders[rows, other] = order[other], order[one]
        return orders, one // self._replicas

    def _insert(self, orders: Integers, taken: Integers, stay: int) -> tuple[int, int, Integers]:
        """The best place for group `taken` of each order among its first `stay` other groups, which serve: the cost,
        the number of groups that serve then, and the order.
        """
        chain, n, r, rows = self._chain, self._chain.units, self._replicas, np.arange(len(orders))
        count = orders.shape[1] // r
        groups = orders[:, : count * r].reshape(-1, count, r)
        group = groups[rows, taken]
        places = np.arange(stay)[None, :]
        others = groups[rows[:, None], places + (places >= taken[:, None])]
        # begin[p]: the least cost with the first p of the others in front; tail[p]: with all but the first p behind.
        begin = np.full((len(rows), stay + 1, n + 1), NEVER, dtype=np.int64)
        tail = begin.copy()
        begin[:, 0, 0] = tail[:, stay, n] = 0
        if stay:
            wide = np.broadcast_to(group[:, None, :], others.shape)
            before = self._pass(self._forward, others)
            behind = self._pass(self._backward, others[:, ::-1])[:, ::-1, ::-1]
            begin[:, 1:] = np.minimum(before + chain.hop(others, wide), NEVER)
            tail[:, :-1] = np.minimum(behind + chain.hop(wide, others), NEVER)
        value = self._run(self._forward, begin.reshape(-1, n + 1), np.repeat(group, stay + 1, axis=0))
        value = value.reshape(begin.shape)
        # The group takes the place of `drop` others at least, of so many exactly if the number of stages is fixed.
        drop = max(stay + 1 - self._stages, 0)
        least = value if self._exactly else np.minimum.accumulate(value, axis=1)
        total = least[:, : stay + 1 - drop] + tail[:, drop:]
        self._work -= 3 * total.size
        row, place, cut = (int(item) for item in np.unravel_index(int(total.argmin()), total.shape))
        first = place if self._exactly else int(value[row, : place + 1, cut].argmin())
        serving = np.concatenate((others[row, :first], group[row : row + 1], others[row, place + drop :])).ravel()
        left = orders[row][~np.isin(orders[row], serving)]
        return int(total[row, place, cut]), len(serving) // r, np.concatenate((serving, left))

    def _pass(self, side: _Direction, groups: Integers) -> Integers:
        """The least sum up to each cut of each of the groups (rows, stages, replicas), which all serve."""
        rows, stages, _ = groups.shape
        value = np.full((rows, stages, self._chain.units + 1), NEVER, dtype=np.int64)
        for stage in range(stages):
            if stage:
                here, there = groups[:, stage - 1], groups[:, stage]
                hop = self._chain.hop(there, here)[:, ::-1] if side.backward else self._chain.hop(here, there)
                begin = np.minimum(value[:, stage - 1] + hop, NEVER)
            else:
                begin = np.full((rows, self._chain.units + 1), NEVER, dtype=np.int64)
                begin[:, 0] = 0
            value[:, stage] = self._run(side, begin, groups[:, stage])
        return value

    def _run(self, side: _Direction, begin: Integers, groups: Integers) -> Integers:
        """The least sum up to each cut for rows that begin a stage on `groups` (rows, replicas) at `begin`."""
        n = self._chain.units
        if self._replicas == 1:
            prefix, since = side.prefix[groups[:, 0]], side.since[groups[:, 0]]
        else:
            prefix = np.zeros_like(begin)
            np.cumsum(np.diff(side.prefix)[groups].max(axis=1), axis=1, out=prefix[:, 1:])
            since = side.since[groups].max(axis=1)
        opened = begin - prefix
        ends = np.broadcast_to(np.arange(n + 1)[None, :], begin.shape)
        best = _least(opened, since, ends)
        if self._chain.host.any():
            streamed = side.streamed[groups]
            rising = np.zeros_like(begin)
            np.cumsum(np.diff(streamed).max(axis=1), axis=1, out=rising[:, 1:])
            beyond = _least(opened - rising, side.at_all[groups].max(axis=1), since)
            kept = side.kept[groups].min(axis=1)[:, None]
            best = np.minimum(best, beyond + rising - kept)
        reached: Integers = np.minimum(best + prefix, NEVER)
        return reached

    def _directions(self) -> tuple[_Direction, _Direction]:
        chain, n = self._chain, self._chain.units
        fits = chain.reach.copy()
        streamed = np.zeros((chain.nodes, n + 1), dtype=np.int64)
        kept = np.zeros(chain.nodes, dtype=np.int64)
        for node in np.flatnonzero(chain.host):
            room, rate = chain.room[node : node + 1], chain.host[node]
            alone = np.cumsum([chain.memory[unit, unit + 1] for unit in range(n)])
            fits[node, :n] = [
                first + int(np.searchsorted(chain.memory[first, first + 1 :], room[0], side="right"))
                for first in range(n)
            ]
            streamed[node, 1:] = rate_ns(alone, rate, limit=NEVER)
            kept[node] = np.maximum(rate_ns(room, rate, limit=NEVER) - 1, 0)[0]
        cuts = np.arange(n + 1)
        since, at_all = (
            np.array([np.searchsorted(ends[:n], cuts) for ends in table], dtype=np.int64)
            for table in (fits, chain.reach)
        )
        return (
            _Direction(False, chain.prefix, since, at_all, streamed, kept),
            _Direction(
                True,
                chain.prefix[:, -1:] - chain.prefix[:, ::-1],
                n - fits[:, ::-1],
                n - chain.reach[:, ::-1],
                streamed[:, -1:] - streamed[:, ::-1],
                kept,
            ),
        )

    def _cut(self, groups: Integers) -> Stages:
        """The best cuts for groups (stages, replicas) that all serve, in their order."""
        begin = np.full(self._chain.units, NEVER, dtype=np.int64)
        begin[0] = 0
        choices: list[Integers] = []
        for stage, group in enumerate(groups):
            total = begin[:, None] + np.maximum.reduce([self._chain.run(node) for node in group.tolist()])
            choices.append(total.argmin(axis=0))
            if stage + 1 < len(groups):
                begin = np.minimum(total.min(axis=0) + self._chain.hop(group, groups[stage + 1]), NEVER)[:-1]
        return traced(groups, choices)


def _least(table: Integers, low: Integers, high: Integers) -> Integers:
    """min(table[row, low[row, i] : high[row, i]]) by row and i; NEVER where that is empty."""
    rows, n = table.shape
    length = high - low
    # levels[k]: the least of the 2**k entries that begin at each place; places too near the end are not looked up.
    levels = np.empty((max(int(length.max()), 1).bit_length(), rows, n), dtype=np.int64)
    levels[0] = table
    for level in range(1, len(levels)):
        half = 1 << (level - 1)
        np.minimum(levels[level - 1, :, :-half], levels[level - 1, :, half:], out=levels[level, :, :-half])
    size = np.frexp(np.arange(n + 1))[1][np.maximum(length, 1)] - 1
    base = size * (rows * n) + np.arange(0, rows * n, n)[:, None]
    first = levels.take(base + np.minimum(low, n - 1))
    second = levels.take(base + np.maximum(high - (1 << size), 0))
    return np.where(length > 0, np.minimum(first, second), 2 * NEVER)
