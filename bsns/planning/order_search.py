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

from bsns.planning.chain import NEVER, Chain, Integers, rate_ns
from bsns.planning.exact_chain import Stages, budget

_NEIGHBOURS: Final = 96
_PATIENCE: Final = 12
"""Neighbourhoods without progress after which the search ends."""
_ROUNDS: Final = 400
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
        self._flat = (chain.prefix + np.arange(chain.nodes, dtype=np.int64)[:, None] * self._stride).ravel()
        mean = chain.prefix.mean(axis=0)
        self._progress = mean / max(float(mean[-1]), 1.0)

    def best(self, starts: Sequence[Sequence[int]], bound: Callable[[int], int]) -> tuple[Stages | None, int]:
        """The best partition found, and the lower bound that `bound` gave for the value of the first one found.

        `starts`: orders of nodes to begin from, besides those by speed and memory. The stages' nodes are numbers.
        """
        orders = self._starts(starts)
        values = self._least(orders, 0, int(self._chain.prefix[:, -1].max()) * 2 + 2 * int(self._worst_hop()))
        pick = int(values.argmin())
        order, value = orders[pick], int(values[pick])
        if value >= NEVER:
            order, value = self._any(orders)
            if value >= NEVER:
                return None, 0
        least = bound(value) if self._chain.even else 0
        order, value = self._improve(order, value, least)
        if self._chain.even:
            return self._fill_one(order, value), least
        return self._correct(orders, order, bound)

    # ------------------------------------------------------------------------------------- filling, many orders

    def _fill(self, orders: Integers, thresholds: Integers) -> tuple[Integers, Integers, Integers]:
        """Fill stages in the given orders (rows of node numbers) as far as the thresholds allow.

        The cut reached in each row (all units: a partition), the ends of its stages, and its slowest stage.
        """
        n, r, rows = self._chain.units, self._replicas, len(orders)
        at = np.zeros(rows, dtype=np.int64)
        received = np.zeros(rows, dtype=np.int64)
        alive = np.ones(rows, dtype=bool)
        ends = np.full((rows, self._stages), n, dtype=np.int64)
        slowest = np.zeros(rows, dtype=np.int64)
        for stage in range(self._stages):
            group = orders[:, stage * r : stage * r + r]
            final = stage + 1 == self._stages
            most = n if self._exactly is None or final else n - (self._exactly - stage - 1)
            end = self._extent(group, at, thresholds, received)
            sent = np.zeros(rows, dtype=np.int64)
            if most < n:
                end = np.minimum(end, most)
            if not final:
                hop = self._between(group, orders[:, stage * r + r : stage * r + 2 * r])
                goes_on = end < n
                short = self._extent(group, at, thresholds, received + hop)
                end = np.where(goes_on, np.minimum(short, most), end)
                sent = np.where(goes_on, hop, 0)
            alive &= (end > at) | (at == n)
            end = np.where(alive, end, at)
            if r == 1:
                cost = self._chain.prefix[group[:, 0], end] - self._chain.prefix[group[:, 0], at] + received + sent
                if not self._simple:
                    cost += self._overflow(group[:, 0], at, end)
                slowest = np.where(end > at, np.maximum(slowest, cost), slowest)
            at = end
            ends[:, stage] = np.where(alive, at, n)
            received = sent
            if not (alive & (at < n)).any():
                break
        return at, ends, slowest if r == 1 else thresholds

    def _extent(self, group: Integers, at: Integers, thresholds: Integers, transfer: Integers) -> Integers:
        """The largest end of a stage on `group` (rows, replicas) from `at`, with `transfer` beside its run."""
        chain = self._chain
        if self._simple:
            node = group[:, 0]
            allowance = thresholds - transfer
            most = np.minimum(np.maximum(chain.prefix[node, at] + allowance, 0), self._stride - 1)
            end = np.searchsorted(self._flat, most + node * self._stride, side="right") - 1 - node * (chain.units + 1)
            return np.where(allowance >= 0, np.maximum(np.minimum(end, chain.reach[node, at]), at), at)
        low, high = at, chain.reach[group, at[:, None]].min(axis=1)
        while (low < high).any():  # costs grow with the end
            middle = (low + high + 1) // 2
            cost = [
                chain.prefix[node, middle] - chain.prefix[node, at] + self._overflow(node, at, middle) + transfer
                for node in group.T
            ]
            if len(cost) == 1:
                within = cost[0] <= thresholds
            else:
                rate = np.zeros(len(at))
                for item in cost:
                    rate += thresholds / np.maximum(item, 0.5)
                within = rate >= 1 - _TOLERANCE
            low, high = np.where(within, middle, low), np.where(within, high, middle - 1)
        return low

    def _overflow(self, node: Integers, first: Integers, end: Integers) -> Integers:
        chain = self._chain
        if not chain.host.any():
            return np.zeros(len(node), dtype=np.int64)
        memory = np.where(first < end, chain.memory[np.minimum(first, chain.units - 1), end], 0)
        beyond = np.where(chain.host[node] > 0, np.maximum(memory - chain.room[node], 0), 0)
        return rate_ns(beyond, np.maximum(chain.host[node], 1))

    def _between(self, senders: Integers, receivers: Integers) -> Integers:
        return self._hop[senders[:, :, None], receivers[:, None, :]].max(axis=(1, 2))

    def _least(self, orders: Integers, low: int, high: int) -> Integers:
        """The least threshold at which each order holds all units; NEVER where even `high` is not enough."""
        reached, _, slowest = self._fill(orders, np.full(len(orders), high, dtype=np.int64))
        done = reached == self._chain.units
        best = np.where(done, np.minimum(slowest, high), NEVER)
        lows, highs = np.full(len(orders), low, dtype=np.int64), np.where(done, best, low)
        while (rows := np.flatnonzero(lows < highs)).size:
            # Only an order that may still be the best is worth the exact value.
            rows = rows[lows[rows] <= int(best.min())]
            if not rows.size:
                break
            middle = (lows[rows] + highs[rows]) // 2
            reached, _, slowest = self._fill(orders[rows], middle)
            held = reached == self._chain.units
            highs[rows] = np.where(held, np.minimum(slowest, middle), highs[rows])
            lows[rows] = np.where(held, lows[rows], middle + 1)
            best[rows] = highs[rows]
        return best

    def _worst_hop(self) -> int:
        hops = self._hop[self._hop < NEVER]
        return int(hops.max()) if hops.size else 0

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
        """Orders one swap, move or reversal away; node numbers by row."""
        m = len(order)
        if m == 1:
            return order[None, :]
        kinds = self._random.randint(0, 4, _NEIGHBOURS)
        places = self._random.randint(0, m, (_NEIGHBOURS, 2))
        rows = np.repeat(order[None, :], _NEIGHBOURS, axis=0)
        swaps = kinds < 2
        index = np.flatnonzero(swaps)
        a, b = places[index, 0], places[index, 1]
        rows[index, a], rows[index, b] = order[b], order[a]
        for row in np.flatnonzero(~swaps):
            low, high = sorted(places[row])
            if kinds[row] == 2:
                rows[row, low : high + 1] = order[low : high + 1][::-1]
            else:
                step = 1 if places[row, 0] == low else -1
                rows[row, low : high + 1] = np.roll(order[low : high + 1], step)
        return rows

    def _any(self, orders: Integers) -> tuple[Integers, int]:
        """An order that holds all units at any price, by a search for reach; its value is NEVER if none is found."""
        limit = int(self._chain.prefix[:, -1].max()) * 2 + 2 * self._worst_hop()
        if self._chain.host.any():
            everything = np.zeros(self._chain.nodes, dtype=np.int64)
            limit += int(self._overflow(np.arange(self._chain.nodes), everything, everything + self._chain.units).max())
        reached, _, _ = self._fill(orders, np.full(len(orders), limit, dtype=np.int64))
        order, _ = self._climb(orders[int(reached.argmax())], limit)
        return order, int(self._least(order[None, :], 0, limit)[0])

    def _climb(self, order: Integers, threshold: int) -> tuple[Integers, bool]:
        """Change `order` until it holds all units within `threshold`, by how far it gets; whether it does."""
        n = self._chain.units
        reached = self._reached(order[None, :], threshold)[0]
        idle = 0
        while idle < _PATIENCE and not self._tick():
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
        for _ in range(_ROUNDS):
            if value <= least or self._tick():
                break
            found, done = self._climb(order, value - 1)
            if not done:
                break
            order, value = found, int(self._least(found[None, :], least, value - 1)[0])
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

    def _correct(self, orders: Integers, order: Integers, bound: Callable[[int], int]) -> tuple[Stages | None, int]:
        """The search again, with the true width of every cut: fewer orders, each cut by the dynamic programme."""
        high = 2 * int(self._chain.prefix[:, -1].max()) + 4 * int(
            sum(int(hops[hops < NEVER].max(initial=0)) for hops in [self._chain.transfers(int(self._chain.sizes[-1]))])
        )
        best: Stages | None = None
        spent = 0
        for candidate in [order, *orders]:
            best, spent = self._slice(candidate, high)
            if best is not None:
                order = candidate
                break
        if best is None:
            return None, 0
        value = self._value(best)
        least = bound(value)
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
        return best, least

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
                return self._trace(order, choices), cells
            if stage + 1 == self._stages:
                break
            hop = chain.hop(group, order[stage * r + r : stage * r + 2 * r])
            handed = np.where((hop < NEVER) & (value >= hop), hop, NEVER)
            if (handed >= NEVER).all():
                break
        return None, cells

    def _trace(self, order: Integers, choices: Sequence[Integers]) -> Stages:
        stages: Stages = []
        end, r = self._chain.units, self._replicas
        for stage in range(len(choices) - 1, -1, -1):
            first = int(choices[stage][end])
            stages.insert(0, (first, end, tuple(order[stage * r : stage * r + r].tolist())))
            end = first
        return stages
