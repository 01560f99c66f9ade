"""Which replica of each stage serves one request: the shortest way around the ring (paper §1.8), by measured times.

Owns the cost of a route and the search for the least one. A token of a session goes through every stage and from the
last back to the first, so its time is the sum of the stages' steps and of all hops; a step is as long as the sessions
make it that the node serves already. Promises the least cost of all routes for what it is given (paper §1.3: the
recursion is a heuristic, this is its exact counterpart for an order of blocks that is fixed). Floats: nobody has to
compute a route again.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from eth_typing import ChecksumAddress
from numpy.typing import NDArray

from bsns.planning.measured import NEWCOMER_LINK, planning_links
from bsns.planning.problem import SECOND_NS, Link
from bsns.protocol.measurements import BATCHED_SESSIONS, NodeMeasurements
from bsns.protocol.model_graph import MODEL_INPUT, ModelGraph
from bsns.protocol.plan import ShardPlan

NO_ROOM_NS: Final = 10 * SECOND_NS
"""What a node without room for the session's cache counts more: only where nobody has room it is still asked."""
_TOKEN_BYTES: Final = 4
_LONG_QUANTILE: Final = 0.9
_UNKNOWN_NS: Final = 1_000_000
"""A stage's step on a node that measured nothing, where no other replica did either."""

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Replica:
    """A node's part in a plan. `alone_ns` is a decode step of one session, `together_ns` one of `BATCHED_SESSIONS`,
    `cache_bytes` what a token of a session keeps there.
    """

    node: ChecksumAddress
    alone_ns: float
    together_ns: float
    cache_bytes: int

    def step_ns(self, sessions: float) -> float:
        """A decode step of so many sessions, on the line through the two that were measured."""
        return self.alone_ns + (self.together_ns - self.alone_ns) * (sessions - 1) / (BATCHED_SESSIONS - 1)


@dataclass(frozen=True, slots=True)
class Availability:
    """What is known of a node now. `share` of the usual work that it should get, from its reputation; 0: none.
    `free_cache_bytes` None where it has not said.
    """

    share: float = 1.0
    sessions: int = 0
    free_cache_bytes: int | None = None


@dataclass(frozen=True)
class RouteTable:
    """The replicas of each stage of one plan, and the nanoseconds from each to each of the next; the last of `hops` is
    the way back to the first stage. `hops[i]` has the shape (replicas of i, replicas of i + 1).
    """

    stages: tuple[tuple[Replica, ...], ...]
    hops: tuple[Floats, ...]

    @classmethod
    def of(
        cls,
        plan: ShardPlan,
        graph: ModelGraph | None,
        measurements: Mapping[str, NodeMeasurements],
        *,
        prior: Link = NEWCOMER_LINK,
    ) -> RouteTable:
        """For `plan`, by what its nodes measured last. One without measurements counts as slow as its slowest peer.
        Without the model's `graph` the replicas of a stage differ by their load alone.
        """
        stages = []
        for number in range(plan.stage_count):
            replicas = plan.replicas(number)
            operators = () if graph is None else graph.operators[replicas[0].first_unit : replicas[0].end_unit]
            cache = sum(item.cache_bytes for item in operators)
            times = {}
            for item in replicas:
                found = measurements.get(item.node)
                known = {} if found is None else {timing.unit_kind: timing for timing in found.unit_timings}
                if operators and all(operator.timing_key in known for operator in operators):
                    timings = [known[operator.timing_key] for operator in operators]
                    times[item.node] = (
                        float(sum(timing.decode_nanoseconds for timing in timings)),
                        float(sum(timing.batched_decode_nanoseconds for timing in timings)),
                    )
            slowest = max(times.values(), default=(_UNKNOWN_NS, BATCHED_SESSIONS * _UNKNOWN_NS))
            stages.append(
                tuple(Replica(item.node, *times.get(item.node, slowest), cache_bytes=cache) for item in replicas)
            )
        place = {node: at for at, node in enumerate(dict.fromkeys(item.node for stage in stages for item in stage))}
        latency: Floats = np.full((len(place), len(place)), np.nan)
        rate: Floats = np.full((len(place), len(place)), np.nan)
        for (one, two), link in planning_links(measurements.values(), prior=None).measured.items():
            if one in place and two in place:
                latency[place[one], place[two]] = link.latency_ns
                rate[place[one], place[two]] = link.bytes_per_second
        np.fill_diagonal(latency, 0.0)
        latency = with_estimates(latency, float(prior.latency_ns))
        rates = rate[~np.isnan(rate)]
        rate[np.isnan(rate)] = prior.bytes_per_second if rates.size == 0 else float(np.median(rates))
        np.fill_diagonal(rate, np.inf)
        hops = []
        for number, senders in enumerate(stages):
            is_last = number == len(stages) - 1
            size = _TOKEN_BYTES if is_last or graph is None else _cut_bytes(graph, plan.replicas(number)[0].end_unit)
            receivers = stages[(number + 1) % len(stages)]
            pairs = np.ix_([place[item.node] for item in senders], [place[item.node] for item in receivers])
            hops.append(latency[pairs] + size * SECOND_NS / rate[pairs])
        return cls(tuple(stages), tuple(hops))

    def costs(self, now: Mapping[str, Availability], tokens: int) -> tuple[Floats, ...]:
        """Nanoseconds of a step at each replica of each stage for one more session of `tokens` tokens; infinite where
        none may go.
        """
        return tuple(np.array([_cost(item, now.get(item.node), tokens) for item in stage]) for stage in self.stages)

    def best(self, now: Mapping[str, Availability], tokens: int) -> tuple[ChecksumAddress, ...] | None:
        """The nodes of the shortest route, a stage each; None if a stage has nobody. Of equal ones the least loaded,
        then the plan's first.
        """
        found = shortest_ring(self.costs(now, tokens), self.hops)
        return None if found is None else tuple(stage[at].node for stage, at in zip(self.stages, found, strict=True))


def shortest_ring(costs: Sequence[Floats], hops: Sequence[Floats]) -> tuple[int, ...] | None:
    """The choice of one place a stage for which the places' costs and the hops between neighbours, the last back to
    the first, are the least together; None if every choice is infinite.
    """
    # best[f, p]: the least up to place p of the stage, with place f in the first one.
    first = costs[0]
    best = np.where(np.eye(len(first), dtype=bool), first, np.inf)
    choices: list[NDArray[np.intp]] = []
    for cost, hop in zip(costs[1:], hops[:-1], strict=True):
        through = best[:, :, None] + hop[None, :, :]
        choices.append(through.argmin(axis=1))
        best = through.min(axis=1) + cost[None, :]
    total = best + hops[-1].T
    at = np.unravel_index(int(total.argmin()), total.shape)
    if not np.isfinite(total[at]):
        return None
    start, place = int(at[0]), int(at[1])
    route = [place]
    for choice in reversed(choices):
        place = int(choice[start, place])
        route.append(place)
    return tuple(reversed(route))


def recursive_ring(
    costs: Sequence[Floats], hops: Sequence[Floats], *, link_weight: float = 1.0, step_weight: float = 1.0
) -> tuple[int, ...] | None:
    """BSNS's recursion (paper §1.3): stage by stage the node with the least weighted cost, given the one before."""
    route: list[int] = []
    for number, cost in enumerate(costs):
        weighed = step_weight * cost + (link_weight * hops[number - 1][route[-1]] if route else 0.0)
        place = int(weighed.argmin())
        if not np.isfinite(weighed[place]):
            return None
        route.append(place)
    return tuple(route)


def ring_cost(costs: Sequence[Floats], hops: Sequence[Floats], route: Sequence[int]) -> float:
    """Nanoseconds of a token on `route`."""
    following = [*route[1:], route[0]]
    steps = sum(float(cost[at]) for cost, at in zip(costs, route, strict=True))
    return steps + sum(float(hop[one, two]) for hop, one, two in zip(hops, route, following, strict=True))


def with_estimates(latency: Floats, prior: float) -> Floats:
    """`latency` between all nodes, by sender and receiver, with an estimate where it is NaN: nobody has measured it.

    The middle between what the ways over third nodes allow by the triangle's inequality, where these agree; else, or
    without third nodes, a long one of those that were measured, so that it is not needed where another way is known;
    `prior` where none was. A new node's links are measured within seconds.
    """
    unknown = np.isnan(latency)
    if not unknown.any():
        return latency
    both = np.where(unknown, latency.T, latency)
    away = ~np.eye(len(both), dtype=bool) & ~np.isnan(both)
    long = float(np.quantile(both[away], _LONG_QUANTILE)) if away.any() else prior
    found = both.copy()
    far = np.where(np.isnan(both), np.inf, both)
    near = np.where(np.isnan(both), -np.inf, both)
    np.fill_diagonal(far, np.inf)
    np.fill_diagonal(near, -np.inf)
    for one, two in np.argwhere(np.isnan(both)).tolist():
        most = float((far[one] + far[:, two]).min())
        with np.errstate(invalid="ignore"):
            apart = np.abs(near[one] - near[:, two])
        least = float(np.max(apart[np.isfinite(apart)], initial=0.0))
        found[one, two] = (least + most) / 2 if least <= most < np.inf else long
    return found


def _cost(replica: Replica, now: Availability | None, tokens: int) -> float:
    if now is None or now.share <= 0:
        return np.inf
    sessions = (now.sessions + 1) / now.share
    cost = replica.step_ns(sessions)
    if now.free_cache_bytes is not None and now.free_cache_bytes < replica.cache_bytes * tokens:
        cost += NO_ROOM_NS
    return cost + sessions * 1e-3


def _cut_bytes(graph: ModelGraph, position: int) -> int:
    """Bytes of one row that cross the cut before `position`."""
    return sum(
        item.size_bytes
        for item in graph.tensors
        if item.producer != MODEL_INPUT and item.consumers and item.producer < position <= max(item.consumers)
    )
