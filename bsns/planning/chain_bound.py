"""Lower bounds for chains: what no partition can be better than, whatever the order, the cuts and the replicas.

Owns two relaxations, one for each objective, with their proofs. Promises that `problem.evaluate` never gives a value
below them. Uses no search and no randomness.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from bsns.planning.chain import NEVER, Chain, Integers
from bsns.planning.exact_chain import Stages
from bsns.planning.problem import Objective

WALK: Final = "shortest walk that pays prices for its nodes"
_STEPS: Final = 30
"""Walks that the search for prices may take at most, and at least where `_WALK_WORK` table cells are fewer."""
_LEAST_STEPS: Final = 4
_WALK_WORK: Final = 400_000_000
_PATIENCE: Final = 3
"""Walks without a better bound after which steps are halved."""
_UNIT: Final = 16
"""What one run counts in a direction of the ascent, so that halves and less are kept."""
_SCALE: Final = 1_000_000
_MARGIN: Final = 1e-9
"""Relative; far more than the rounding of the few float operations that the bound with replicas takes."""


def lower_bound(chain: Chain, upper: int) -> tuple[int, str]:
    """A bound for the problem's objective and the argument it rests on. `upper` is the value of a known partition."""
    if chain.problem.objective is Objective.LATENCY:
        return Walks(chain).bound(upper), WALK
    terms = chain.problem.terms
    least = _largest_unit(chain)
    if terms.replicas == 1 and (not terms.spread_leftover or chain.nodes == 1):
        return _bisect(least, upper, Runs(chain).possible), "runs each node can take, by weight"
    return _bisect(least, upper, _Shares(chain).possible), "share of the work each replica can take, by weight"


def _bisect(low: int, high: int, possible: Callable[[int], bool]) -> int:
    while low < high:
        middle = (low + high) // 2
        if possible(middle):
            high = middle
        else:
            low = middle + 1
    return low


def _weights(chain: Chain) -> list[Integers]:
    """Non-negative integers by unit, as prefix sums: each set of weights gives a valid bound, the best of them counts.

    Units; each timing key alone; and the units' share of the whole model's time, averaged over the nodes.
    """
    operators = chain.problem.graph.operators
    share = chain.problem.times / np.maximum(chain.prefix[:, -1:], 1)
    kinds: dict[str, list[int]] = {}
    for number, operator in enumerate(operators):
        kinds.setdefault(operator.timing_key, []).append(number)
    common = sorted(kinds.values(), key=lambda members: (-float(share[:, members].sum()), members))[:2]
    candidates = [np.ones(chain.units, dtype=np.int64), np.rint(share.mean(axis=0) * _SCALE).astype(np.int64)]
    for members in common:
        weight = np.zeros(chain.units, dtype=np.int64)
        weight[members] = 1
        candidates.append(weight)
    return [np.concatenate(([0], np.cumsum(weight))) for weight in candidates if weight.any()]


def _largest_unit(chain: Chain) -> int:
    """Proof: the stage that holds unit u takes, on each of its replicas m, at least m's time of u; so its effective
    time is at least that of u on the replicas it has, and at least that on every node it fits, or on the `replicas`
    fastest if a stage never has more.
    """
    problem, terms = chain.problem, chain.problem.terms
    several = problem.terms.spread_leftover and chain.nodes > terms.replicas
    least = 0
    fits = chain.reach[:, :-1] > np.arange(chain.units)[None, :]
    for unit in range(chain.units):
        times = np.sort(problem.times[fits[:, unit], unit])
        replicas = times if several else times[: terms.replicas]
        if replicas.size and replicas[0] > 0:
            effective = float(replicas[0]) if len(replicas) == 1 else 1 / float((1.0 / replicas).sum())
            least = max(least, int(effective * (1 - _MARGIN)))
    return least


class Runs:
    """The bound for stages of one node each.

    Claim: if a partition with every stage at most T exists, then for any non-negative weights w of the units there are
    a first stage on some node j and a last stage on another node k, such that

        first_j(T) + last_k(T) + sum over the stages between of middle_i(T)  >=  w(all units),

    or one node takes the whole model within T. Here first, middle and last are the largest weight of a run of
    consecutive units that node can take within T: beginning with the first unit, neither, or ending with the last, with
    at least the cheapest transfer on each inner side, and as many units as fit its memory.
    Proof: a stage is a run, on a node of its own, and within T satisfies exactly those conditions, so its weight is at
    most the maximum over them; the runs cover all units, so their weights add up to w(all). The left side is then at
    most its maximum over j != k with all other nodes, or the S - 2 best, as the middle ones (S stages are allowed).
    It grows with T, so every T below the least one that satisfies it for all weights is refuted.
    """

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        self._weights = _weights(chain)
        self._receive, self._send = chain.least_transfers
        nodes = np.arange(chain.nodes, dtype=np.int64)[:, None]
        # One sorted array for all nodes: each node's times lie behind those of the node before it.
        self._stride = int(chain.prefix[:, -1].max()) + 1
        self._flat = (chain.prefix + nodes * self._stride).ravel()
        self._base = nodes

    def _ends(self, first: Integers, allowance: Integers) -> Integers:
        """The largest ends of runs from the cuts `first` within `allowance`, by node; `first` where there is none."""
        chain = self._chain
        before = chain.prefix[:, first]
        most = np.minimum(np.maximum(before + allowance, 0), self._stride - 1)
        ends = np.searchsorted(self._flat, most + self._base * self._stride, side="right") - 1
        ends = np.minimum(ends - self._base * (chain.units + 1), chain.reach[:, first])
        return np.where(allowance >= 0, np.maximum(ends, first[None, :]), first[None, :])

    def possible(self, threshold: int) -> bool:
        """Whether the claim's inequality holds for `threshold` and every weight."""
        chain, n = self._chain, self._chain.units
        terms = chain.problem.terms
        everything = np.zeros(1, dtype=np.int64)
        whole = self._ends(everything, np.full((chain.nodes, 1), threshold, dtype=np.int64))
        if terms.stage_count in (None, 1) and (whole == n).any():
            return True
        stages = chain.problem.maximum_stages
        if stages < 2:
            return False
        send = self._send[:, None]
        first_ends = np.minimum(self._ends(everything, threshold - send), n - 1)
        cuts = np.arange(1, n, dtype=np.int64)
        receive = self._receive[:, 1:-1]
        middle_ends = np.minimum(self._ends(cuts, threshold - receive - send), n - 1)
        last = self._ends(cuts, threshold - receive) == n
        for weight in self._weights:
            middle = (weight[middle_ends] - weight[cuts][None, :]).max(axis=1)
            first = np.where(first_ends[:, 0] > 0, weight[first_ends[:, 0]], -NEVER)
            end = np.where(last, weight[n] - weight[cuts][None, :], -NEVER).max(axis=1)
            if chain.nodes <= stages:
                gain = _best_pair(first - middle, end - middle) + int(middle.sum())
            else:
                gain = _best_pair(first, end) + int(np.sort(middle)[::-1][: stages - 2].sum())
            if gain < int(weight[n]):
                return False
        return True


def _best_pair(first: Integers, last: Integers) -> int:
    """The largest first[j] + last[k] with j != k."""
    best = -(2**62)
    order = np.argsort(-last, kind="stable")[:2]
    for k in order:
        others = np.delete(first, k)
        if len(others):
            best = max(best, int(others.max()) + int(last[k]))
    return best


class _Shares:
    """The bound for stages with replicas.

    Claim: if a partition with every effective time at most T exists, then for any non-negative weights w of the units

        sum over nodes m of min(T * d_m, h_m)  >=  w(all units),

    where d_m is the largest ratio of weight to time of a unit on m, and h_m the largest weight of a run that fits m.
    Proof: let stage R run on group g, f_m >= time_m(R) its cost on m, and e = 1 / sum over g of 1/f_m <= T. Replica m
    serves the share e / f_m of the requests, the shares of g add up to 1, and so w(R) = sum over g of w(R) e / f_m.
    Each term is at most T w(R) / time_m(R) <= T d_m, as a ratio of sums is at most the largest ratio of its terms, and
    at most w(R) <= h_m, as a share is at most 1. Stages are on disjoint groups and cover all units: add them up. At
    most `maximum_stages` times `replicas` nodes serve if a stage never has more, so the best of so many count.
    """

    def __init__(self, chain: Chain) -> None:
        terms = chain.problem.terms
        self._most = chain.problem.maximum_stages * terms.replicas if not terms.spread_leftover else chain.nodes
        self._parts: list[tuple[int, np.ndarray[tuple[int], np.dtype[np.float64]], Integers]] = []
        free = (chain.problem.times == 0).any(axis=0)
        for prefix in _weights(chain):
            weight = np.where(free, 0, np.diff(prefix))
            total = np.concatenate(([0], np.cumsum(weight)))
            density = (weight / np.maximum(chain.problem.times, 1)).max(axis=1)
            held = (total[chain.reach] - total[None, :]).max(axis=1)
            self._parts.append((int(total[-1]), density, held))

    def possible(self, threshold: int) -> bool:
        for total, density, held in self._parts:
            taken = np.sort(np.minimum(threshold * density, held))[::-1][: self._most]
            if float(taken.sum()) * (1 + _MARGIN) < total:
                return False
        return True


class Walks:
    """The bound for LATENCY: shortest walks under prices on nodes.

    A walk covers the units with runs on nodes, each of which fits, and pays each run and each transfer; it may use a
    node again, so the shortest one costs less than any partition. Prices make it pay for that: with p_j >= 0 for every
    run on node j, and q for every run, let W(p, q) be the cost of the shortest walk. Claim: with r replicas and S
    stages, exactly (q of any sign) or at most (q >= 0), every partition costs at least

        W(p, q) - sum of p_j / r - q S.

    Proof: give the replicas of each stage the numbers 1 to r. The first of all stages are a walk, so are the second,
    and so on: r walks. Each pays for its runs and transfers at most what the partition does, as a stage counts its
    slowest replica and a transfer its slowest pair, and q S or less. A node serves once, so all of them together pay at
    most the sum of the p_j. Hence r W(p, q) <= r (cost + q S) + sum of p_j.

    Any prices do. Good ones are found by subgradient ascent: a node that walks use more often than once becomes dearer,
    one that they leave out cheaper. It begins with what each node's memory saves over the slowest node that is needed
    if the fastest serve first. Integers throughout, so that the bound does not depend on the machine.
    """

    def __init__(self, chain: Chain) -> None:
        self._chain = chain
        n = chain.units
        cuts = np.arange(n + 1)
        since = np.array([np.searchsorted(ends[:n], cuts) for ends in chain.reach], dtype=np.int64)
        self._least_since: list[int] = since.min(axis=0).tolist()
        # Where runs from a cut have reached as far as they fit: (nodes, first cuts) by the end that is too far.
        self._over = [
            np.nonzero((cuts[None, :n] >= since[:, end - 1, None]) & (cuts[None, :n] < since[:, end, None]))
            for end in range(1, n + 1)
        ]

    def shortest(self, prices: Integers) -> tuple[int, Stages] | None:
        """The shortest walk that pays `prices[j]` for each run on node j; None if there is none."""
        chain, n, nodes = self._chain, self._chain.units, np.arange(self._chain.nodes)
        prefix = np.ascontiguousarray(chain.prefix.T)
        begin = np.full((chain.nodes, n), NEVER, dtype=np.int64)  # less the prefix sum at the cut
        begin[:, 0] = prices
        first = np.zeros((n + 1, chain.nodes), dtype=np.int64)
        sender = np.zeros((n, chain.nodes), dtype=np.int64)
        hosts = np.flatnonzero(chain.host).tolist()
        hop, size = begin[:0], -1
        value = begin[:, 0]
        for end in range(1, n + 1):
            begin[self._over[end - 1]] = NEVER
            low = min(self._least_since[end], end - 1)
            total = begin[:, low:end]
            if hosts:
                total = total.copy()
                for node in hosts:
                    total[node] += (chain.overflowing(node, end) - prefix[end, node] + chain.prefix[node, :end])[low:]
            start = total.argmin(axis=1)
            value = np.minimum(total[nodes, start] + prefix[end], NEVER)
            first[end] = start + low
            if end < n:
                if size != chain.cuts[end]:
                    size = int(chain.cuts[end])
                    hop = chain.transfers(size)
                    np.fill_diagonal(hop, NEVER)
                handed = value[:, None] + hop
                sender[end] = handed.argmin(axis=0)
                begin[:, end] = np.minimum(handed[sender[end], nodes] + prices, NEVER) - prefix[end]
        node, end = int(value.argmin()), n
        least = int(value[node])
        if least >= NEVER // 2:
            return None
        stages: Stages = []
        while end:
            start_cut = int(first[end, node])
            stages.insert(0, (start_cut, end, (node,)))
            node, end = int(sender[start_cut, node]), start_cut
        return least, stages

    def bound(self, upper: int) -> int:
        """The best bound that the ascent finds. `upper`: the value of a known partition."""
        chain, m, n = self._chain, self._chain.nodes, self._chain.units
        r, stages = chain.problem.terms.replicas, chain.problem.maximum_stages
        fixed = chain.problem.terms.stage_count is not None
        whole, held = chain.prefix[:, -1], (chain.reach[:, :n] - np.arange(n)).max(axis=1)
        by_speed = np.argsort(whole, kind="stable")
        needed = min(int(np.searchsorted(np.cumsum(held[by_speed]), r * n)), m - 1)
        # m prices of nodes, then the price of any run.
        prices = [max(0, int(whole[by_speed[needed]] - whole[node]) * int(held[node]) // n) for node in range(m)] + [0]
        free = self.shortest(np.zeros(m, dtype=np.int64))
        if free is None:
            return upper
        best, best_prices, direction = free[0], prices, [0] * (m + 1)
        share, idle = 1, 0
        for _ in range(max(_LEAST_STEPS, min(_STEPS, _WALK_WORK // (n * m * (m + n))))):
            found = self.shortest(np.array(prices[:m], dtype=np.int64) + prices[m])
            if found is None:
                break
            value = found[0] - sum(prices[:m]) // r - prices[m] * stages
            idle += 1
            if value > best:
                best, best_prices, idle = value, prices, 0
            elif idle == _PATIENCE:
                prices, share, idle = best_prices, 2 * share, 0
            if best >= upper:
                break
            runs = np.bincount([nodes[0] for _, _, nodes in found[1]], minlength=m)
            excess = [_UNIT * (r * int(count) - 1) for count in runs] + [_UNIT * r * (len(found[1]) - stages)]
            falls = [price > 0 or (fixed and place == m) for place, price in enumerate(prices)]
            excess = [item if may else max(item, 0) for item, may in zip(excess, falls, strict=True)]
            direction = [(7 * item + 3 * last) // 10 for item, last in zip(excess, direction, strict=True)]
            norm = share * sum(item * item for item in direction)
            if not norm:
                break
            moved = [
                price + (upper - value) * _UNIT * r * item // norm
                for price, item in zip(prices, direction, strict=True)
            ]
            most = NEVER // (8 * n)  # a walk has n runs at most: its sum stays an integer of 64 bits
            prices = [max(0 if place < m or not fixed else -most, min(item, most)) for place, item in enumerate(moved)]
        return min(best, upper)
