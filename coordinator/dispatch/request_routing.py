"""Which replica of each stage serves a request.

Owns the choice: alive, Active on chain, not suspect, least loaded for its reputation, then the fastest, which planners
put first. Promises one `route` intent a request, with proofs against the plan's root. A request of somebody else's
plan, or of a fee below the plan's, is left alone and said so once. The choice itself is a pure function.
"""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import Iterable, Mapping
from typing import Final

import structlog

from bsns.protocol.contract_states import NodeStatus, RequestStatus
from bsns.protocol.plan import Assignment
from coordinator.dispatch.node_pool import NodePool
from coordinator.dispatch.node_standing import NodeStandings
from coordinator.network_state import NodeState, PlanState, RequestState
from coordinator.storage import Intent, Storage
from coordinator.transaction_outbox import TransactionOutbox, WorkerThread

_REMEMBERED_COMPLAINTS: Final = 1_024
_log = structlog.get_logger(__name__)


def choose_route(plan: PlanState, able: Mapping[str, float], load: Mapping[str, int]) -> tuple[Assignment, ...] | None:
    """One assignment a stage among the nodes of `able`, which gives the share of work of each: the one that would be
    least loaded for its share, then the first replica, which is the fastest. None if a stage has nobody.
    """
    route = []
    for stage in range(plan.shard_plan.stage_count):
        candidates = [item for item in plan.shard_plan.replicas(stage) if able.get(item.node, 0.0) > 0]
        if not candidates:
            return None
        route.append(min(candidates, key=lambda item: ((load.get(item.node, 0) + 1) / able[item.node], item.replica)))
    return tuple(route)


def node_load(requests: Iterable[RequestState]) -> Counter[str]:
    """Requests in execution by node."""
    return Counter(
        stage.node for request in requests if request.status == RequestStatus.ROUTED for stage in request.stages
    )


class RequestRouting:
    """Routes the open requests of our plans."""

    def __init__(
        self,
        storage: Storage,
        pool: NodePool,
        outbox: TransactionOutbox,
        standings: NodeStandings,
        run_blocking: WorkerThread = asyncio.to_thread,
    ) -> None:
        self._storage = storage
        self._pool = pool
        self._outbox = outbox
        self._standings = standings
        self._blocking = run_blocking
        self._complained: deque[tuple[bytes, str]] = deque(maxlen=_REMEMBERED_COMPLAINTS)

    async def step(self, requests: list[RequestState], now: int) -> None:
        """Want a route for every open request among `requests` (all unfinished ones) at Unix second `now`."""
        waiting = [item for item in requests if item.status == RequestStatus.OPEN and now <= item.deadline]
        if not waiting:
            return
        accounts = await self._blocking(self._storage.nodes)
        able = {
            node: self._standings.of(node).weight for node in self._pool.live() if _is_active(accounts.get(node), now)
        }
        load = node_load(requests)
        for request in waiting:
            plan = await self._blocking(lambda: self._storage.plan(request.plan_id))  # noqa: B023 - awaited at once
            if plan is None or plan.publisher != self._outbox.sender:
                self._complain(request, "the request pays for somebody else's plan")
                continue
            if request.fee_per_token < plan.fee_per_token:
                self._complain(request, f"its fee is {request.fee_per_token} a token, the plan's {plan.fee_per_token}")
                continue
            route = choose_route(plan, able, load)
            if route is None:
                self._complain(
                    request, "a stage has no node that is attached, active and not suspect; it waits until its deadline"
                )
                continue
            load.update(item.node for item in route)
            arguments = (
                request.request_id,
                tuple(item.as_tuple() for item in route),
                tuple(plan.shard_plan.proof(item) for item in route),
            )
            key = f"route/0x{request.request_id.hex()}"
            await self._outbox.want(Intent(key, "InferenceEscrow", "route", arguments))

    def _complain(self, request: RequestState, reason: str) -> None:
        if (request.request_id, reason) not in self._complained:
            self._complained.append((request.request_id, reason))
            _log.warning("request_not_routed", request_id="0x" + request.request_id.hex(), reason=reason)


def _is_active(account: NodeState | None, now: int) -> bool:
    return account is not None and account.status_at(now) == NodeStatus.ACTIVE
