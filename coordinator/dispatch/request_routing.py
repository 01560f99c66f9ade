"""Which replica of each stage serves a request.

Owns the choice: of the nodes that are alive, Active on chain and not suspect, those that make the shortest way around
the ring by measured times and links, under the load of the moment (bsns.planning.routing). Promises one `route` intent
a request, with proofs against the plan's root. A request of somebody else's plan, or of a fee below the plan's, is left
alone and said so once.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Final

import structlog

from bsns.planning.measured import NEWCOMER_LINK
from bsns.planning.problem import Link
from bsns.planning.routing import Availability, RouteTable
from bsns.protocol.contract_states import NodeStatus, RequestStatus
from bsns.protocol.identifiers import ModelId
from bsns.protocol.model_graph import ModelGraph
from bsns.protocol.plan import Assignment
from coordinator.dispatch.node_pool import AttachedNode, NodePool
from coordinator.dispatch.node_standing import NodeStandings
from coordinator.network_state import NodeState, PlanState, RequestState
from coordinator.storage import Intent, Storage
from coordinator.transaction_outbox import TransactionOutbox, WorkerThread

TABLE_SECONDS: Final = 10.0
"""Age at which the times and links of a plan's nodes are read again."""
TABLES_KEPT: Final = 16
_REMEMBERED_COMPLAINTS: Final = 1_024
_log = structlog.get_logger(__name__)


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
        graphs: Mapping[ModelId, ModelGraph],
        *,
        prior: Link = NEWCOMER_LINK,
        clock: Callable[[], float] = time.monotonic,
        run_blocking: WorkerThread = asyncio.to_thread,
    ) -> None:
        self._graphs, self._prior, self._clock = graphs, prior, clock
        self._tables: dict[bytes, tuple[float, RouteTable]] = {}
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
        able = await self._able(requests, now)
        for request in waiting:
            plan = await self._blocking(lambda: self._storage.plan(request.plan_id))  # noqa: B023 - awaited at once
            if plan is None or plan.publisher != self._outbox.sender:
                self._complain(request, "the request pays for somebody else's plan")
                continue
            if request.fee_per_token < plan.fee_per_token:
                self._complain(request, f"its fee is {request.fee_per_token} a token, the plan's {plan.fee_per_token}")
                continue
            tokens = request.prompt_tokens + request.maximum_tokens
            nodes = (await self._table(plan)).best(able, tokens)
            if nodes is None:
                self._complain(
                    request, "a stage has no node that is attached, active and not suspect; it waits until its deadline"
                )
                continue
            route = _assignments(plan, nodes)
            for node in set(nodes):
                able[node] = replace(able[node], sessions=able[node].sessions + 1)
            arguments = (
                request.request_id,
                tuple(item.as_tuple() for item in route),
                tuple(plan.shard_plan.proof(item) for item in route),
            )
            key = f"route/0x{request.request_id.hex()}"
            await self._outbox.want(Intent(key, "InferenceEscrow", "route", arguments))

    async def choose(
        self, plan: PlanState, tokens: int, requests: Iterable[RequestState], now: int, avoid: frozenset[str]
    ) -> tuple[Assignment, ...] | None:
        """A route for a request of `tokens` tokens that is not on the chain, without the nodes `avoid`; None if a stage
        has no node.
        """
        able = {node: item for node, item in (await self._able(requests, now)).items() if node not in avoid}
        nodes = (await self._table(plan)).best(able, tokens)
        return None if nodes is None else _assignments(plan, nodes)

    async def _able(self, requests: Iterable[RequestState], now: int) -> dict[str, Availability]:
        """Nodes that may serve at Unix second `now`, with how much they have to do."""
        accounts = await self._blocking(self._storage.nodes)
        load = node_load(requests)
        return {
            node: _availability(attached, self._standings.of(node).weight, load[node])
            for node, attached in self._pool.live().items()
            if _is_active(accounts.get(node), now)
        }

    async def _table(self, plan: PlanState) -> RouteTable:
        """The plan's replicas with their times and links, as of a few seconds ago."""
        now = self._clock()
        kept = self._tables.get(plan.plan_id)
        if kept is None or now - kept[0] > TABLE_SECONDS:
            table = await self._blocking(lambda: self._read_table(plan))
            if len(self._tables) >= TABLES_KEPT:
                self._tables.clear()
            kept = self._tables[plan.plan_id] = now, table
        return kept[1]

    def _read_table(self, plan: PlanState) -> RouteTable:
        serving = {item.node for item in plan.assignments}
        known = self._storage.measurements(plan.model_id)
        measured = {node: item.measurements for node, item in known.items() if node in serving}
        return RouteTable.of(plan.shard_plan, self._graphs.get(plan.model_id), measured, prior=self._prior)

    def _complain(self, request: RequestState, reason: str) -> None:
        if (request.request_id, reason) not in self._complained:
            self._complained.append((request.request_id, reason))
            _log.warning("request_not_routed", request_id="0x" + request.request_id.hex(), reason=reason)


def _is_active(account: NodeState | None, now: int) -> bool:
    return account is not None and account.status_at(now) == NodeStatus.ACTIVE


def _availability(attached: AttachedNode, share: float, load: int) -> Availability:
    """The load is what the chain says or the node, whichever is more: a request may not have come there yet, or be
    somebody else's.
    """
    has_spoken = attached.last_heard > attached.attached_at
    free = attached.free_cache_bytes if has_spoken else None
    return Availability(share, max(load, attached.open_sessions), free)


def _assignments(plan: PlanState, nodes: Iterable[str]) -> tuple[Assignment, ...]:
    return tuple(
        next(item for item in plan.assignments if (item.stage, item.node) == (stage, node))
        for stage, node in enumerate(nodes)
    )
