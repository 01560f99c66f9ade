"""A requester that chooses its route: over real health services on loopback, some of them slow, silent or away."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from bsns.protocol.identifiers import address
from bsns.protocol.plan import Assignment, ShardPlan
from bsns.requester.errors import InvalidRequestError, UnavailableError
from bsns.requester.node_connection import NodeEndpoint
from bsns.requester.route_choice import MAXIMUM_AVOIDED, RouteWishes, choose_route
from bsns.requester.standby import NodeBackoff, Standby

_STAGES, _REPLICAS = 2, 3
_SERVING, _NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


def _node(stage: int, replica: int) -> str:
    return address((1 + stage * _REPLICAS + replica).to_bytes(20, "big"))


class _Health(health_pb2_grpc.HealthServicer):
    """Answers after `delay_s`."""

    def __init__(self, delay_s: float, status: int) -> None:
        self._delay_s, self._status = delay_s, status

    async def Check(self, request: object, context: object) -> health_pb2.HealthCheckResponse:
        await asyncio.sleep(self._delay_s)
        return health_pb2.HealthCheckResponse(status=self._status)  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def _swarm(
    delays_s: Sequence[float], statuses: dict[int, int] | None = None, away: Sequence[int] = ()
) -> AsyncIterator[Standby]:
    """Two stages of three replicas, each node with its delay; those `away` are on chain and nowhere else."""
    assignments, endpoints, servers = [], {}, []
    try:
        for number, delay in enumerate(delays_s):
            stage, replica = divmod(number, _REPLICAS)
            node = _node(stage, replica)
            assignments.append(Assignment(stage, replica, stage, stage + 1, node, 1, bytes(32)))
            server = grpc.aio.server()
            health_pb2_grpc.add_HealthServicer_to_server(_Health(delay, (statuses or {}).get(number, _SERVING)), server)
            port = server.add_insecure_port("127.0.0.1:0")
            endpoints[node] = NodeEndpoint(node, f"127.0.0.1:{port}", bytes(32))
            if number in away:
                await server.stop(0)
                continue
            await server.start()
            servers.append(server)
        yield Standby(ShardPlan(_STAGES, tuple(assignments)), endpoints)
    finally:
        await asyncio.gather(*(server.stop(0) for server in servers))


async def _chosen(
    standby: Standby, wishes: RouteWishes, *, inactive: Sequence[str] = (), backoff: NodeBackoff | None = None
) -> list[str]:
    async def may_serve(node: str) -> bool:
        return node not in inactive

    found = await choose_route(standby, wishes, backoff or NodeBackoff(), may_serve=may_serve, timeout_s=2.0)
    assert [item.stage for item in found] == list(range(_STAGES))
    return [item.node for item in found]


async def test_route_is_of_the_nearest_nodes_that_are_not_avoided() -> None:
    async with _swarm([0.15, 0.0, 0.3, 0.3, 0.15, 0.0]) as standby:
        assert await _chosen(standby, RouteWishes(within_s=1.0)) == [_node(0, 1), _node(1, 2)]
        avoid = frozenset({_node(0, 1).lower(), _node(1, 2)})
        assert await _chosen(standby, RouteWishes(avoid)) == [_node(0, 0), _node(1, 1)]


async def test_nodes_that_are_away_or_do_not_serve_or_are_not_active_are_passed_over() -> None:
    async with _swarm([0.0, 0.15, 0.3, 0.0, 0.15, 0.3], {0: _NOT_SERVING}, away=[3]) as standby:
        assert await _chosen(standby, RouteWishes(within_s=1.0)) == [_node(0, 1), _node(1, 1)]
        assert await _chosen(standby, RouteWishes(within_s=1.0), inactive=[_node(0, 1)]) == [_node(0, 2), _node(1, 1)]


async def test_node_that_failed_lately_comes_after_those_that_did_not() -> None:
    backoff = NodeBackoff()
    backoff.failed(_node(0, 0))
    async with _swarm([0.0, 0.2, 0.3, 0.0, 0.2, 0.3]) as standby:
        assert await _chosen(standby, RouteWishes(within_s=1.0), backoff=backoff) == [_node(0, 1), _node(1, 0)]


async def test_stage_that_has_nobody_left_is_named_with_the_reasons() -> None:
    async with _swarm([0.0, 0.0, 0.0, 0.3, 0.0, 0.0], away=[5]) as standby:
        wishes = RouteWishes(frozenset({_node(1, 1)}), within_s=0.2)
        reasons = (
            r"stage 1 has nobody left: of 3 nodes 1 are avoided, 1 do not answer, "
            r"the nearest of the others is 3\d\d\.\d ms away.*Nothing was paid"
        )
        with pytest.raises(UnavailableError, match=reasons):
            await _chosen(standby, wishes)


def test_wishes_that_are_none_are_refused() -> None:
    assert RouteWishes().is_empty
    assert not RouteWishes(frozenset({_node(0, 0)})).is_empty
    with pytest.raises(InvalidRequestError, match="a node to avoid"):
        RouteWishes(frozenset({"0x12"}))
    with pytest.raises(InvalidRequestError, match="above 0"):
        RouteWishes(within_s=0.0)
    with pytest.raises(InvalidRequestError, match="at most 256"):
        RouteWishes(frozenset(address(number.to_bytes(20, "big")) for number in range(1, MAXIMUM_AVOIDED + 2)))
