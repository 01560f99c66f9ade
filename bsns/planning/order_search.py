"""Good partitions of a chain over a large fleet: a local search over the order of the nodes, for THROUGHPUT.

Owns the search and the two ways to cut a chain for a given order of groups of nodes: filling each stage as far as a
threshold allows, many orders at once, which is exact where every cut carries the same bytes (paper §1.5); and a dynamic
programme for cuts of different widths, one order at a time. Promises the same result for a seed. Does not promise the
optimum over orders: what it finds is compared with `bsns.planning.chain_bound`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from bsns.planning.chain import NEVER, Chain, Integers, rate_ns
from bsns.planning.exact_chain import Stages, budget

Truths = NDArray[np.bool_]

_NEIGHBOURS: Final = 96
_PATIENCE: Final = 12
"""Neighbourhoods without progress after which the search ends."""
_FILLS: Final = 44
"""Times that a set of orders may be filled, and once more for every two nodes."""
_COARSE: Final = 1_024
"""The first orders are compared by thresholds known up to this part of them."""
_PROBES: Final = 32
"""Thresholds that are tried at once for one order."""
_SLICE_WORK: Final = 400_000_000
"""Table cells that dynamic programmes over single orders may compute in all."""
_TOLERANCE: Final = 1e-12


class OrderSearch:
    """One search. `value` is the objective's value of stages; `tick` is asked between neighbourhoods whether time is
    up.
    """

    def __init__(self, chain: Chain, *, seed: int, value: Callable[[Stages], int], tick: Callable[[], bool]) -> None:
        self._chain = chain
        self._value = value
        self._random = np.random.RandomState(seed)  # its stream is frozen, so plans stay reproducible
        self._tick = tick
        terms = chain.problem.terms
        self._replicas = terms.replicas
        self._stages = chain.problem.maximum_stages
        self._exactly = terms.stage_count
        self._simple = self._replicas == 1 and not chain.host.any()
        # Filling takes every cut for one of middle size; where they differ, `_slice` corrects it.
        reference = int(np.sort(chain.cuts[1:-1])[(chain.units - 1) // 2]) if chain.units > 1 else 0
        self._hop = chain.transfers(reference)
        np.fill_diagonal(self._hop, NEVER)
        self._stride = int(chain.prefix[:, -1].max()) + 1
        # All nodes' times in one sorted array, each behind those of the node before it.
        self._flat: Integers = (chain.prefix + np.arange(chain.nodes, dtype=np.int64)[:, None] * self._stride).ravel()
        self._reach: Integers = chain.reach.ravel()
        self._fills = _FILLS + chain.nodes // 2
        self.limit: Final = self._most()
        """More than any stage can take."""
        mean = chain.prefix.mean(axis=0)
        self._progress = mean / max(float(mean[-1]), 1.0)

    def best(self, starts: Sequence[Sequence[int]], least: int) -> Stages | None:
        """The best partition found, its nodes by number; None if none was found.

        `starts`: orders of nodes to begin from, besides those by speed and memory. `least`: a lower bound; the search
        ends where it is met.
        """
        orders = self._starts(starts)
        values = self._first(orders, least)
        pick = int(values.argmin())
        order, value = orders[pick], int(values[pick])
        if value >= NEVER:
            order, value = self._any(orders)
            if value >= NEVER:
                return None
        if self._chain.even:
            order, value = self._improve(order, value, least)
            return self._fill_one(order, value)
        order, _ = self._improve(order, value, 0)
        return self._correct(orders, order, least)

    # ------------------------------------------------------------------------------------- filling, many orders

    def _fill(self, orders: Integers, thresholds: Integers) -> tuple[Integers, Integers, Integers]:
        """Fill stages in the given orders (rows of node numbers) as far as the thresholds allow.

        The cut reached in each row (all units: a partition), the ends of its stages, and its slowest stage.
        """
        self._fills -= 1
        n, r, rows = self._chain.units, self._replicas, len(orders)
        at, received, slowest = (np.zeros(rows, dtype=np.int64) for _ in range(3))
        ends = np.full((self._stages, rows), n, dtype=np.int64)
        groups = orders[:, : self._stages * r].T.reshape(self._stages, r, rows)
        hops = self._hop[groups[:-1, :, None, :], groups[1:, None, :, :]].max(axis=(1, 2))
        for stage, group in enumerate(groups):
            # A stage that can take all that is left need not send.
            if self._exactly is None or stage + 1 == self._exactly:
                whole = self._fits(group, at, np.full(rows, n, dtype=np.int64), thresholds, received)
            else:
                whole = np.zeros(rows, dtype=bool)
            end = sent = np.zeros(rows, dtype=np.int64)
            if stage + 1 < self._stages:
                sent = np.where(whole, 0, hops[stage])
                end = self._extent(group, at, thresholds, received + sent)
                if self._exactly is not None:
                    end = np.minimum(end, n - (self._exactly - stage - 1))
            end = np.where(whole, n, np.maximum(end, at))
            going = end > at
            if r == 1:
                cost = self._run(group[0], at, end) + received + sent
                slowest = np.where(going, np.maximum(slowest, cost), slowest)
            ends[stage] = end
            if not going.any():
                break
            # A row that is stuck stays so: its next stage has no time left.
            at, received = end, np.where(going | (at == n), sent, NEVER)
        return at, ends.T, slowest if r == 1 else thresholds

    def _fits(self, group: Integers, at: Integers, end: Integers, thresholds: Integers, transfer: Integers) -> Truths:
        """Whether runs [at, end) on `group` (replicas, rows), with `transfer` beside them, keep the thresholds."""
        reach = self._reach[group * (self._chain.units + 1) + at]
        holds: Truths = reach[0] >= end if len(group) == 1 else reach.min(axis=0) >= end
        if len(group) == 1:
            return holds & (self._run(group[0], at, end) + transfer <= thresholds)
        rate = np.zeros(len(at))
        for node in group:
            rate += thresholds / np.maximum(self._run(node, at, end) + transfer, 0.5)
        return holds & (rate >= 1 - _TOLERANCE)

    def _extent(self, group: Integers, at: Integers, thresholds: Integers, transfer: Integers) -> Integers:
        """The largest end of a stage on `group` (replicas, rows) from `at`; at most `at` where it can take nothing."""
        width = self._chain.units + 1
        if self._simple:
            base = group[0] * width
            most = np.minimum(self._flat[base + at] + thresholds - transfer, (group[0] + 1) * self._stride - 1)
            end: Integers = np.searchsorted(self._flat, most, side="right") - 1 - base
            reached: Integers = np.minimum(end, self._reach[base + at])
            return reached
        low, high = at, self._reach[group * width + at].min(axis=0)
        while (low < high).any():  # costs grow with the end
            middle = (low + high + 1) // 2
            fits = self._fits(group, at, middle, thresholds, transfer)
            low, high = np.where(fits, middle, low), np.where(fits, high, middle - 1)
        return low

    def _run(self, node: Integers, at: Integers, end: Integers) -> Integers:
        base = node * (self._chain.units + 1)
        time: Integers = self._flat[base + end] - self._flat[base + at]
        return time if self._simple or not self._chain.host.any() else time + self._overflow(node, at, end)

    def _overflow(self, node: Integers, first: Integers, end: Integers) -> Integers:
        chain = self._chain
        memory = np.where(first < end, chain.memory[np.minimum(first, chain.units - 1), end], 0)
        beyond = np.where(chain.host[node] > 0, np.maximum(memory - chain.room[node], 0), 0)
        return rate_ns(beyond, np.maximum(chain.host[node], 1))

    def _first(self, orders: Integers, least: int) -> Integers:
        """`_least` from `least` up: where the bound is tight, one look is enough."""
        high, step = min(least, self.limit), max(least // 64, 1)
        while high < self.limit:
            reached, _, _ = self._fill(orders, np.full(len(orders), high, dtype=np.int64))
            if (reached == self._chain.units).any():
                break
            high, step = min(high + step, self.limit), 2 * step
        return self._least(orders, least, high)

    def _least(self, orders: Integers, low: int, high: int) -> Integers:
        """A threshold at which each order holds all units, at most 1/_COARSE above the least one, for those that may be
        the best; NEVER where even `high` is not enough.
        """
        reached, _, slowest = self._fill(orders, np.full(len(orders), high, dtype=np.int64))
        done = reached == self._chain.units
        best = np.where(done, np.minimum(slowest, high), NEVER)
        lows = np.full(len(orders), low, dtype=np.int64)
        while True:
            gap = np.maximum(lows // _COARSE, 1)
            rows = np.flatnonzero(done & (best - lows >= gap) & (lows <= int(best.min())))
            if not rows.size:
                return best
            middle = (lows[rows] + best[rows]) // 2
            reached, _, slowest = self._fill(orders[rows], middle)
            held = reached == self._chain.units
            best[rows] = np.where(held, np.minimum(slowest, middle), best[rows])
            lows[rows] = np.where(held, lows[rows], middle + 1)

    def _exact(self, order: Integers, low: int, high: int) -> int:
        """The least threshold from `low` to `high` at which one order holds all units, if it does at `high`."""
        orders = np.repeat(order[None, :], _PROBES, axis=0)
        while low < high:
            thresholds = low + (high - low) * np.arange(_PROBES, dtype=np.int64) // _PROBES
            reached, _, slowest = self._fill(orders, thresholds)
            held = np.flatnonzero(reached == self._chain.units)
            first = int(held[0]) if held.size else _PROBES
            if first < _PROBES:
                high = min(int(slowest[first]), int(thresholds[first]))
            if first > 0:
                low = int(thresholds[first - 1]) + 1
        return high

    def _most(self) -> int:
        chain = self._chain
        hops = chain.transfers(int(chain.sizes[-1])) if chain.units > 1 else self._hop
        slowest = int(chain.prefix[:, -1].max()) + 2 * int(hops[hops < NEVER].max(initial=0))
        everything = np.zeros(chain.nodes, dtype=np.int64)
        if chain.host.any():
            slowest += int(self._overflow(np.arange(chain.nodes), everything, everything + chain.units).max())
        return slowest

    # ------------------------------------------------------------------------------------------ orders of nodes

    def _starts(self, given: Sequence[Sequence[int]]) -> Integers:
        chain, m = self._chain, self._chain.nodes
        speed = chain.prefix[:, -1]
        tail = chain.problem.times[:, -1]
        keys = [
            speed,
            -speed,
            -chain.room,
            chain.room,
            tail - speed // max(chain.units, 1),
            np.where(np.arange(m) == tail.argmin(), 1, 0),
            np.arange(m),
        ]
        orders = [list(order) for order in given]
        orders += [np.argsort(key, kind="stable").tolist() for key in keys]
        orders += [self._tour(int(first)) for first in np.argsort(speed, kind="stable")[:4]]
        orders += [self._random.permutation(m).tolist() for _ in range(8)]
        return np.array(orders, dtype=np.int64)

    def _tour(self, first: int) -> list[int]:
        """From each node to the nearest that is left."""
        left = np.ones(self._chain.nodes, dtype=bool)
        tour = [first]
        left[first] = False
        while left.any():
            tour.append(int(np.where(left, self._hop[tour[-1]], 2 * NEVER).argmin()))
            left[tour[-1]] = False
        return tour

    def _neighbours(self, order: Integers) -> Integers:
        """Orders one swap, reversal or move away; node numbers by row."""
        m = len(order)
        kind = self._random.randint(0, 5, _NEIGHBOURS)[:, None]
        ends = np.sort(self._random.randint(0, m, (_NEIGHBOURS, 2)), axis=1)
        low, high, place = ends[:, :1], ends[:, 1:], np.arange(m)[None, :]
        swapped = np.where(place == low, high, np.where(place == high, low, place))
        inside = (place >= low) & (place <= high)
        forward = np.where(place == high, low, place + 1)
        backward = np.where(place == low, high, place - 1)
        moved = np.select([kind == 2, kind == 3], [low + high - place, forward], backward)
        return order[np.where(kind < 2, swapped, np.where(inside, moved, place))]

    def _any(self, orders: Integers) -> tuple[Integers, int]:
        """An order that holds all units at any price, by a search for reach; its value is NEVER if none is found."""
        reached, _, _ = self._fill(orders, np.full(len(orders), self.limit, dtype=np.int64))
        order, _ = self._climb(orders[int(reached.argmax())], self.limit)
        return order, int(self._least(order[None, :], 0, self.limit)[0])

    def _climb(self, order: Integers, threshold: int) -> tuple[Integers, bool]:
        """Change `order` until it holds all units within `threshold`, by how far it gets; whether it does."""
        n = self._chain.units
        reached = self._reached(order[None, :], threshold)[0]
        idle = 0
        while idle < _PATIENCE and self._fills > 0 and not self._tick():
            rows = self._neighbours(order)
            ends = self._reached(rows, threshold)
            pick = int(ends.argmax())
            if ends[pick] > reached:
                idle = 0
            else:
                idle += 1
            if ends[pick] >= reached:  # sideways, too: plateaus are wide
                order, reached = rows[pick], ends[pick]
            if reached >= n:
                return order, True
        return order, False

    def _reached(self, orders: Integers, threshold: int) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        """How far each order gets within `threshold`: `units` if it holds all, else the share of the work it holds."""
        at, _, _ = self._fill(orders, np.full(len(orders), threshold, dtype=np.int64))
        return np.where(at == self._chain.units, float(self._chain.units), self._progress[at])

    def _improve(self, order: Integers, value: int, least: int) -> tuple[Integers, int]:
        """Lower the threshold under the order until the search finds none that holds all units."""
        value = self._exact(order, least, value)
        while value > least and not self._tick():
            found, done = self._climb(order, value - 1)
            if not done:
                break
            order, value = found, self._exact(found, least, value - 1)
        return order, value

    def _fill_one(self, order: Integers, value: int) -> Stages:
        _, ends, _ = self._fill(order[None, :], np.array([value], dtype=np.int64))
        stages: Stages = []
        first, r = 0, self._replicas
        for stage, end in enumerate(ends[0].tolist()):
            if end > first:
                stages.append((first, end, tuple(order[stage * r : stage * r + r].tolist())))
            first = max(first, end)
        return stages

    # ------------------------------------------------------------------------------------- slicing, one order

    def _correct(self, orders: Integers, order: Integers, least: int) -> Stages | None:
        """The search again, with the true width of every cut: fewer orders, each cut by the dynamic programme."""
        best: Stages | None = None
        spent = 0
        for candidate in [order, *orders]:
            best, spent = self._slice(candidate, self.limit)
            if best is not None:
                order = candidate
                break
        if best is None:
            return None
        value = self._value(best)
        best, value, spent = self._lower(order, best, value, least, spent)
        idle = 0
        while idle < _PATIENCE and value > least and spent < _SLICE_WORK and not self._tick():
            idle += 1
            for row in self._neighbours(order)[:8]:
                found, cells = self._slice(row, value - 1)
                spent += cells
                if found is not None:
                    order, idle = row, 0
                    best, value, spent = self._lower(order, found, self._value(found), least, spent)
                    break
                if spent >= _SLICE_WORK or self._tick():
                    break
        return best

    def _lower(self, order: Integers, best: Stages, value: int, low: int, spent: int) -> tuple[Stages, int, int]:
        """The best cuts of one order, by bisection."""
        while low < value and not self._tick():
            middle = (low + value) // 2
            found, cells = self._slice(order, middle)
            spent += cells
            if found is None:
                low = middle + 1
            else:
                best, value = found, min(self._value(found), value)
                if value > middle:  # rounding of several replicas' effective time
                    break
        return best, value, spent

    def _slice(self, order: Integers, threshold: int) -> tuple[Stages | None, int]:
        """Cuts of `order` with every stage within `threshold`, or None; and the table cells it took.

        left[r]: the most time that the last stage has left for sending when it ends at cut r. All groups from the first
        up to the last in use serve a stage.
        """
        chain, n, r = self._chain, self._chain.units, self._replicas
        cells = 0
        handed = np.full(n + 1, NEVER, dtype=np.int64)
        handed[0] = 0
        choices: list[Integers] = []
        cuts = np.arange(n + 1)
        for stage in range(self._stages):
            group = order[stage * r : stage * r + r]
            reach = chain.reach[group].min(axis=0)
            if r == 1:
                node = int(group[0])
                until = np.searchsorted(chain.prefix[node], chain.prefix[node] + threshold, side="right") - 1
                reach = np.minimum(reach, until)
            width = max(int((reach - cuts)[:-1].max()), 1)
            cells += width * (n + 1) * r
            begin = cuts[:, None] - np.arange(1, width + 1)[None, :]
            allowed = (begin >= 0) & (reach[np.maximum(begin, 0)] >= cuts[:, None])
            begin = np.maximum(begin, 0)
            costs = []
            for node in group.tolist():
                cost = chain.prefix[node][:, None] - chain.prefix[node][begin]
                if chain.host[node]:
                    memory = chain.memory[np.minimum(begin, n - 1), cuts[:, None]]
                    cost = cost + rate_ns(np.maximum(memory - chain.room[node], 0), chain.host[node])
                costs.append(np.where(allowed, cost, NEVER))
            left = np.maximum(budget(threshold, costs) - handed[begin], -NEVER)
            choice = left.argmax(axis=1)
            value = left[cuts, choice]
            choices.append(cuts - 1 - choice)
            if value[n] >= 0 and self._exactly in (None, stage + 1):
                return traced(order[: len(choices) * r].reshape(-1, r), choices), cells
            if stage + 1 == self._stages:
                break
            hop = chain.hop(group, order[stage * r + r : stage * r + 2 * r])
            handed = np.where((hop < NEVER) & (value >= hop), hop, NEVER)
            if (handed >= NEVER).all():
                break
        return None, cells


def traced(groups: Integers, choices: Sequence[Integers]) -> Stages:
    """The stages of groups (stages, replicas), given the best first cut of each by the cut it ends at."""
    stages: Stages = []
    end = len(choices[0]) - 1
    for group, choice in zip(groups[::-1], choices[::-1], strict=True):
        first = int(choice[end])
        stages.insert(0, (first, end, tuple(group.tolist())))
        end = first
    return stages
