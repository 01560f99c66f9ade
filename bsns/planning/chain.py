"""A problem whose operators have one order, as arrays: what every run of consecutive units costs on every node.

Owns the tables that the sequential solvers and their bounds share. Promises the integers of `problem.evaluate`, and
`NEVER` where a run does not fit a node or two nodes are not linked. Does not search.
"""

from __future__ import annotations

from functools import cached_property
from typing import Final

import numpy as np
from numpy.typing import NDArray

from bsns.planning.problem import MAXIMUM_TOTAL, SECOND_NS, Problem

Integers = NDArray[np.int64]

NEVER: Final = 2**60
"""Nanoseconds of what cannot be. Larger than any sum of possible costs; three of them still fit 64 bits."""
_EXACT_LIMIT: Final = (2**63 - 1) // SECOND_NS


class Chain:
    """The tables of one problem. Positions are cuts: run [l, r) is between cut l and cut r, 0 <= l < r <= units."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.units = len(problem.graph.operators)
        self.nodes = len(problem.nodes)
        self.prefix: Integers = np.zeros((self.nodes, self.units + 1), dtype=np.int64)
        np.cumsum(problem.times, axis=1, out=self.prefix[:, 1:])
        self.cuts: Integers = np.array(problem.cut_bytes(range(self.units)), dtype=np.int64)
        room = [min(node.memory_bytes, MAXIMUM_TOTAL) for node in problem.nodes]  # no model needs more, and sums fit
        self.room: Integers = np.array(room, dtype=np.int64)
        self.host: Integers = np.array([node.host_bytes_per_second for node in problem.nodes], dtype=np.int64)

    @cached_property
    def memory(self) -> Integers:
        """Bytes that run [l, r) needs, by l and r; 0 where it is empty."""
        graph, n = self.problem.graph, self.units
        # A parameter counts where a run meets its first use: `after[x]` holds what becomes a first use at position x
        # once the run begins behind the use before it.
        fresh, uses = np.zeros(n, dtype=np.int64), dict[int, int]()
        after: list[list[tuple[int, int]]] = [[] for _ in range(n)]
        for place, operator in enumerate(graph.operators):
            fresh[place] += self.problem.cache_bytes[place]
            for parameter in dict.fromkeys(operator.parameters):
                size = graph.parameters[parameter].size_bytes
                if parameter in uses:
                    after[uses[parameter]].append((place, size))
                else:
                    fresh[place] += size
                uses[parameter] = place
        peaks = np.array([item.peak_bytes for item in graph.operators], dtype=np.int64)
        table = np.zeros((n, n + 1), dtype=np.int64)
        for first in range(n):
            table[first, first + 1 :] = np.cumsum(fresh[first:]) + np.maximum.accumulate(peaks[first:])
            for place, size in after[first]:
                fresh[place] += size
        return table

    @cached_property
    def reach(self) -> Integers:
        """The largest end of a run from each cut that fits each node; shape (nodes, units + 1)."""
        ends = np.full((self.nodes, self.units + 1), self.units, dtype=np.int64)
        for first in range(self.units):
            ends[:, first] = first + np.searchsorted(self.memory[first, first + 1 :], self.room, side="right")
        ends[self.host > 0] = self.units
        return ends

    def run(self, node: int) -> Integers:
        """Nanoseconds of every run [l, r) on `node` without transfers; NEVER where it does not fit or is empty."""
        n, prefix = self.units, self.prefix[node]
        table = prefix[None, :] - prefix[:-1, None]
        if self.host[node]:
            table = table + rate_ns(np.maximum(self.memory - self.room[node], 0), self.host[node])
            allowed = np.arange(n + 1)[None, :] > np.arange(n)[:, None]
        else:
            ends, starts = np.arange(n + 1)[None, :], np.arange(n)[:, None]
            allowed = (ends > starts) & (ends <= self.reach[node, :-1, None])
        return np.where(allowed, table, NEVER)

    def overflowing(self, node: int, end: int) -> Integers:
        """Nanoseconds of every run that ends at cut `end` on a node with a host rate, without transfers."""
        beyond = np.maximum(self.memory[:end, end] - self.room[node], 0)
        time: Integers = self.prefix[node, end] - self.prefix[node, :end] + rate_ns(beyond, self.host[node])
        return time

    @cached_property
    def _links(self) -> tuple[Integers, Integers]:
        """Latency and bandwidth by sender and receiver; bandwidth 0 where there is no link."""
        latency = np.zeros((self.nodes, self.nodes), dtype=np.int64)
        bandwidth = np.zeros((self.nodes, self.nodes), dtype=np.int64)
        links, nodes = self.problem.links, self.problem.nodes
        if links.prior is not None:
            latency[:], bandwidth[:] = links.prior.latency_ns, links.prior.bytes_per_second
        number = {node.node: index for index, node in enumerate(nodes)}
        for (sender, receiver), link in links.measured.items():
            if sender in number and receiver in number:
                latency[number[sender], number[receiver]] = link.latency_ns
                bandwidth[number[sender], number[receiver]] = link.bytes_per_second
        return latency, bandwidth

    def transfers(self, size: int) -> Integers:
        """Nanoseconds of `size` bytes by sender and receiver; NEVER where there is no link."""
        latency, bandwidth = self._links
        if size == 0:
            return np.zeros_like(latency)
        amount = np.full_like(bandwidth, size)
        time = latency + rate_ns(amount, np.maximum(bandwidth, 1), limit=NEVER)
        return np.where(bandwidth > 0, time, NEVER)

    def hop(self, senders: Integers, receivers: Integers) -> Integers:
        """Nanoseconds over the slowest pair of two groups at each cut; NEVER where a pair has no link.

        Groups are the last axis of both, the axes before it are the result's.
        """
        latency, bandwidth = self._links
        slowest = np.zeros((*senders.shape[:-1], self.units + 1), dtype=np.int64)
        for sender in np.moveaxis(senders, -1, 0):
            for receiver in np.moveaxis(receivers, -1, 0):
                rate = bandwidth[sender, receiver][..., None]
                if self.even:
                    time = self._even_hops[sender, receiver][..., None]
                else:
                    time = latency[sender, receiver][..., None] + rate_ns(self.cuts, np.maximum(rate, 1), limit=NEVER)
                slowest = np.maximum(slowest, np.where(rate > 0, time, NEVER))
        return np.where(self.cuts > 0, slowest, 0)

    @cached_property
    def _even_hops(self) -> Integers:
        return self.transfers(int(self.cuts[1:-1].max(initial=0)))

    @cached_property
    def sizes(self) -> Integers:
        """The distinct bytes of the cuts between units, ascending."""
        return np.unique(self.cuts[1:-1])

    @cached_property
    def usual_hops(self) -> Integers:
        """Nanoseconds over the median of the cuts between units, by sender and receiver; 0 from a node to itself."""
        usual = int(np.sort(self.cuts[1:-1])[(self.units - 1) // 2]) if self.units > 1 else 0
        hops = self.transfers(usual)
        np.fill_diagonal(hops, 0)
        return hops

    @cached_property
    def even_hop(self) -> int | None:
        """The hop over that cut where it is the same between all nodes; None where hops differ, or there are none."""
        apart = self.usual_hops[~np.eye(self.nodes, dtype=bool)]
        return int(apart[0]) if apart.size and int(apart.min()) == int(apart.max()) else None

    @property
    def even(self) -> bool:
        """Whether every cut between units carries the same bytes: then a longer run never costs its neighbours more."""
        return len(self.sizes) <= 1

    @cached_property
    def least_transfers(self) -> tuple[Integers, Integers]:
        """What the cheapest neighbour costs each node: to receive at each cut (nodes, units + 1), to send (nodes,)."""
        receive = np.zeros((self.nodes, self.units + 1), dtype=np.int64)
        send = np.full(self.nodes, NEVER, dtype=np.int64)
        for size in self.sizes:
            time = self.transfers(int(size))
            np.fill_diagonal(time, NEVER)
            receive[:, 1:-1][:, self.cuts[1:-1] == size] = time.min(axis=0)[:, None]
            send = np.minimum(send, time.min(axis=1))
        return receive, send


def rate_ns(amount: Integers, per_second: Integers | np.int64, *, limit: int | None = None) -> Integers:
    """Nanoseconds for `amount` at `per_second`, rounded up; at most `limit`."""
    if amount.size and int(amount.max()) > _EXACT_LIMIT:  # beyond 64 bits: integers of any size
        exact = -(-amount.astype(object) * SECOND_NS // np.asarray(per_second).astype(object))
        if limit is not None:
            exact = np.minimum(exact, limit)
        return np.asarray(exact, dtype=np.int64)
    time = -(-amount * SECOND_NS // per_second)
    return time if limit is None else np.minimum(time, limit)
