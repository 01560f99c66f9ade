"""Which replicas serve a request whose requester chooses them itself: which nodes not, and how far away at the most.

Owns the wishes and the choice among the replicas of a plan. Promises that every node of a route answered a moment ago,
within the distance that was asked for and by this requester's own clock: what a node says of where it is is not asked
for. Two nodes that are near the requester are near each other: a hop between them takes no more than half of both round
trips. Knows nothing of the nodes' load, which their coordinator does: without wishes it should choose.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bsns.protocol.identifiers import ProtocolError, address
from bsns.protocol.plan import Assignment
from bsns.requester.errors import InvalidRequestError, UnavailableError
from bsns.requester.node_connection import NodeEndpoint, open_channel
from bsns.requester.standby import NodeBackoff, Standby

MAXIMUM_AVOIDED: Final = 256
"""As many nodes as a plan has assignments."""
_AT_ONCE: Final = 32
"""Nodes that are asked at the same time."""


@dataclass(frozen=True, slots=True)
class RouteWishes:
    """`avoid`: nodes that must not serve. `within_s`: seconds that a round trip to a node may take. InvalidRequestError
    for what is no wish.
    """

    avoid: frozenset[str] = frozenset()
    within_s: float | None = None

    def __post_init__(self) -> None:
        if len(self.avoid) > MAXIMUM_AVOIDED:
            raise InvalidRequestError(f"{len(self.avoid)} nodes to avoid, at most {MAXIMUM_AVOIDED} are taken")
        try:
            object.__setattr__(self, "avoid", frozenset(address(node) for node in self.avoid))
        except ProtocolError as error:
            raise InvalidRequestError(f"a node to avoid: {error}") from error
        if self.within_s is not None and not 0 < self.within_s < float("inf"):
            raise InvalidRequestError(f"a round trip within {self.within_s} s: give a time above 0")

    @property
    def is_empty(self) -> bool:
        return not self.avoid and self.within_s is None


async def choose_route(
    standby: Standby,
    wishes: RouteWishes,
    backoff: NodeBackoff,
    *,
    may_serve: Callable[[str], Awaitable[bool]],
    timeout_s: float,
) -> tuple[Assignment, ...]:
    """An assignment for each stage of the plan: of the nodes that answer and are wished for the nearest, after those
    that have not failed lately. `may_serve` says whether the chain lets a node, `timeout_s` bounds each question.

    UnavailableError names a stage that has nobody, and why.
    """
    plan = standby.plan
    allowed = {item.node for item in plan.assignments if item.node in standby.endpoints} - wishes.avoid
    limit = asyncio.Semaphore(_AT_ONCE)

    async def ask(node: str) -> tuple[str, float | None]:
        async with limit:
            return node, await _round_trip(standby.endpoints[node], timeout_s)

    answered = dict(await asyncio.gather(*(ask(node) for node in sorted(allowed))))
    route = []
    for stage in range(plan.stage_count):
        replicas = plan.replicas(stage)
        near = [
            (backoff.is_avoided(item.node), away, item.replica, item)
            for item in replicas
            if (away := answered.get(item.node)) is not None and (wishes.within_s is None or away <= wishes.within_s)
        ]
        for *_, item in sorted(near, key=lambda entry: entry[:3]):
            if await may_serve(item.node):
                route.append(item)
                break
        else:
            raise UnavailableError(_nobody(stage, [item.node for item in replicas], wishes, answered))
    return tuple(route)


def _nobody(stage: int, nodes: list[str], wishes: RouteWishes, answered: dict[str, float | None]) -> str:
    avoided = sum(node in wishes.avoid for node in nodes)
    times = [away for node in nodes if (away := answered.get(node)) is not None]
    silent = len(nodes) - avoided - len(times)
    parts = [f"of {len(nodes)} nodes {avoided} are avoided, {silent} do not answer"]
    if wishes.within_s is not None and times:
        parts.append(f"the nearest of the others is {min(times) * 1e3:.1f} ms away")
    return (
        f"stage {stage} has nobody left: {', '.join(parts)}. Nothing was paid: avoid fewer nodes, allow more distance, "
        "or leave the choice to the coordinator"
    )


async def _round_trip(where: NodeEndpoint, timeout_s: float) -> float | None:
    """Seconds of a health check on a channel that stands; None if the node does not say that it serves."""
    with contextlib.suppress(UnavailableError, grpc.aio.AioRpcError, OSError, ValueError):
        channel = await open_channel(where, timeout_s)
        try:
            stub = health_pb2_grpc.HealthStub(channel)
            seconds = timeout_s
            for _ in range(2):  # the first one opens the connection
                began = time.perf_counter()
                answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=timeout_s)  # type: ignore[attr-defined]
                seconds = time.perf_counter() - began
                if answer.status != health_pb2.HealthCheckResponse.SERVING:
                    return None
            return seconds
        finally:
            await channel.close()
    return None


__all__ = ["RouteWishes", "choose_route"]
