"""The gRPC service that nodes attach to.

Owns the conversation: a challenge, the node's signature over it, then heartbeats, measurements and consents one way,
plan offers the other. Promises that only a key that is registered, staked and not jailed attaches, that nothing
unsigned is believed, and that every message, rate and wait has a limit. Thin: what a message means is decided in
coordinator.dispatch and coordinator.storage.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import grpc
import structlog

from bsns.protocol.contract_states import NodeStatus
from bsns.protocol.identifiers import ModelId, ProtocolError, address
from bsns.protocol.measurements import NodeMeasurements
from bsns.protocol.typed_data import ATTACH_PROOF, Domain, is_signed_by, signing_digest
from bsns.v1 import coordination_pb2, coordination_pb2_grpc
from coordinator.dispatch.node_pool import AttachedNode, NodePool, PoolFullError
from coordinator.dispatch.plan_publication import PlanPublication
from coordinator.refusals import Refusal, abort
from coordinator.storage import Storage, StorageUnavailableError
from coordinator.tab_collector import TabCollector
from coordinator.transaction_outbox import WorkerThread

_CHALLENGE_BYTES = 32
_MINUTE = 60.0
_T = TypeVar("_T")
_log = structlog.get_logger(__name__)

_Context = grpc.aio.ServicerContext[coordination_pb2.AttachRequest, coordination_pb2.AttachResponse]


@dataclass(frozen=True, slots=True)
class ConversationLimits:
    """Seconds."""

    hello_seconds: float = 10.0
    clock_skew_seconds: int = 300
    measurement_age_seconds: int = 30 * 86_400


class NodeCoordinationServicer(coordination_pb2_grpc.NodeCoordinationServicer):
    """Serves NodeCoordination. `chain_now` is the chain's time, `not_synced_because` why the state is not current (or
    None).
    """

    def __init__(
        self,
        *,
        storage: Storage,
        pool: NodePool,
        publications: Mapping[ModelId, PlanPublication],
        tabs: TabCollector | None = None,
        registry_domain: Domain,
        assignments_domain: Domain,
        limits: ConversationLimits,
        chain_now: Callable[[], int],
        not_synced_because: Callable[[], str | None],
        run_blocking: WorkerThread = asyncio.to_thread,
    ) -> None:
        self._storage = storage
        self._pool = pool
        self._publications = publications
        self._tabs = tabs
        self._registry_domain = registry_domain
        self._assignments_domain = assignments_domain
        self._limits = limits
        self._chain_now = chain_now
        self._not_synced_because = not_synced_because
        self._blocking = run_blocking
        self._draining = False

    def drain(self) -> None:
        """Take no new nodes and end the attachments: the process is about to stop."""
        self._draining = True
        self._pool.close()

    # grpc.aio also takes a coroutine that writes to the context; the generated type does not know that.
    async def Attach(  # type: ignore[override]
        self, request_iterator: AsyncIterator[coordination_pb2.AttachRequest], context: _Context
    ) -> None:
        """One node's attachment, until either side ends it."""
        try:
            await self._attach(request_iterator, context)
        except Refusal as refusal:
            _log.info("attachment_refused", reason=refusal.reason, detail=refusal.message)
            await abort(context, refusal)

    async def _attach(self, request_iterator: AsyncIterator[coordination_pb2.AttachRequest], context: _Context) -> None:
        if self._draining:
            raise Refusal(grpc.StatusCode.UNAVAILABLE, "DRAINING", "the coordinator is stopping: attach again later")
        node = await self._authenticate(request_iterator, context)
        try:
            attached = self._pool.attach(node)
        except PoolFullError as error:
            raise Refusal(
                grpc.StatusCode.RESOURCE_EXHAUSTED, "CAPACITY_EXHAUSTED", f"{error}: try again later"
            ) from error
        _log.info("node_attached", node=node)
        try:
            await self._converse(attached, request_iterator, context)
        finally:
            self._pool.detach(attached)
            _log.info("node_detached", node=node)

    async def _authenticate(self, requests: AsyncIterator[coordination_pb2.AttachRequest], context: _Context) -> str:
        challenge = secrets.token_bytes(_CHALLENGE_BYTES)
        await context.write(coordination_pb2.AttachResponse(challenge=coordination_pb2.Challenge(nonce=challenge)))
        try:
            async with asyncio.timeout(self._limits.hello_seconds):
                first = await anext(requests, None)
        except TimeoutError:
            raise Refusal(
                grpc.StatusCode.DEADLINE_EXCEEDED,
                "MALFORMED_MESSAGE",
                f"no Hello within {self._limits.hello_seconds:.0f} s of the challenge",
            ) from None
        if first is None or first.WhichOneof("body") != "hello":
            raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_MESSAGE", "the first message must be Hello")
        try:
            node = address(bytes(first.hello.node))
        except ProtocolError as error:
            raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_MESSAGE", f"Hello.node is {error}") from error
        digest = signing_digest(self._registry_domain, ATTACH_PROOF, (node, challenge))
        if not is_signed_by(digest, bytes(first.hello.signature), node):
            raise Refusal(
                grpc.StatusCode.UNAUTHENTICATED,
                "SIGNATURE_INVALID",
                f"the challenge is not signed by {node}: sign AttachProof under NodeRegistry's domain",
            )
        await self._require_serving(node)
        return node

    async def _require_serving(self, node: str) -> None:
        reason = self._not_synced_because()
        if reason is not None:
            raise Refusal(
                grpc.StatusCode.UNAVAILABLE,
                "CHAIN_UNAVAILABLE",
                f"the coordinator does not follow the chain at the moment ({reason}): attach again later",
            )
        account = await self._guarded(lambda: self._storage.node(node))
        status = NodeStatus.ABSENT if account is None else account.status_at(self._chain_now())
        if status not in (NodeStatus.PENDING, NodeStatus.ACTIVE):
            raise Refusal(
                grpc.StatusCode.PERMISSION_DENIED,
                "NODE_NOT_ACTIVE",
                f"node {node} is {status.name} in the registry: register and stake, or leave jail, then attach",
            )

    async def _converse(
        self, attached: AttachedNode, requests: AsyncIterator[coordination_pb2.AttachRequest], context: _Context
    ) -> None:
        welcome = coordination_pb2.Welcome(
            heartbeat_interval_milliseconds=int(self._pool.limits.heartbeat_seconds * 1_000),
            model_ids=list(self._publications),
        )
        await context.write(coordination_pb2.AttachResponse(welcome=welcome))
        for publication in self._publications.values():
            offer = publication.offer_for(attached.node)
            if offer is not None:
                attached.outgoing.put_nowait(offer)
        # The first of the three to end ends the attachment.
        reading = asyncio.ensure_future(self._read(attached, requests))
        writing = asyncio.ensure_future(self._write(attached, context))
        closing = asyncio.ensure_future(attached.closed.wait())
        tasks = (reading, writing, closing)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in (reading, writing):
            if not task.cancelled() and (error := task.exception()) is not None:
                raise error
        if attached.closed.is_set() and reading.cancelled():
            code, reason = grpc.StatusCode.ABORTED, "attached again elsewhere, or no longer in step: attach again"
            if self._draining:
                code, reason = grpc.StatusCode.UNAVAILABLE, "the coordinator is stopping: attach again later"
            raise Refusal(code, "DRAINING" if self._draining else "CAPACITY_EXHAUSTED", reason)

    async def _write(self, attached: AttachedNode, context: _Context) -> None:
        while True:
            await context.write(await attached.outgoing.get())

    async def _read(self, attached: AttachedNode, requests: AsyncIterator[coordination_pb2.AttachRequest]) -> None:
        limits = self._pool.limits
        window_began, in_window = time.monotonic(), 0
        while True:
            try:
                async with asyncio.timeout(limits.silence_seconds):
                    request = await anext(requests, None)
            except TimeoutError:
                raise Refusal(
                    grpc.StatusCode.DEADLINE_EXCEEDED,
                    "PEER_UNAVAILABLE",
                    f"{limits.missed_heartbeats} heartbeats of {limits.heartbeat_seconds:g} s were missed",
                ) from None
            if request is None:
                return
            if time.monotonic() - window_began > _MINUTE:
                window_began, in_window = time.monotonic(), 0
            in_window += 1
            if in_window > limits.messages_per_minute:
                raise Refusal(
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    "CAPACITY_EXHAUSTED",
                    f"more than {limits.messages_per_minute} messages a minute",
                )
            await self._take(attached, request)

    async def _take(self, attached: AttachedNode, request: coordination_pb2.AttachRequest) -> None:
        match request.WhichOneof("body"):
            case "heartbeat":
                self._pool.heartbeat(attached, request.heartbeat)
            case "measurements":
                await self._take_measurements(attached, request.measurements)
            case "consent":
                publication = self._publications.get(ModelId(bytes(request.consent.model_id)))
                if publication is not None:
                    try:
                        await publication.consent(attached.node, request.consent)
                    except ProtocolError as error:
                        raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, "SIGNATURE_INVALID", str(error)) from error
            case "batch_consent" if self._tabs is not None:
                try:
                    await self._tabs.consent(attached.node, request.batch_consent)
                except ProtocolError as error:
                    raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, "SIGNATURE_INVALID", str(error)) from error
                except StorageUnavailableError as error:
                    raise _database_unavailable(error) from error
            case other:
                raise Refusal(
                    grpc.StatusCode.INVALID_ARGUMENT,
                    "MALFORMED_MESSAGE",
                    f"{other or 'an empty message'} is not expected on an attached stream",
                )

    async def _take_measurements(self, attached: AttachedNode, message: coordination_pb2.Measurements) -> None:
        try:
            measurements = NodeMeasurements.from_message(message)
        except ProtocolError as error:
            raise Refusal(grpc.StatusCode.INVALID_ARGUMENT, "MALFORMED_MESSAGE", str(error)) from error
        if measurements.node != attached.node:
            raise Refusal(
                grpc.StatusCode.PERMISSION_DENIED,
                "SIGNATURE_INVALID",
                f"measurements of {measurements.node} on the stream of {attached.node}",
            )
        age = self._chain_now() - measurements.measured_at
        if not -self._limits.clock_skew_seconds <= age <= self._limits.measurement_age_seconds:
            raise Refusal(
                grpc.StatusCode.INVALID_ARGUMENT,
                "MALFORMED_MESSAGE",
                f"measured {age} s ago by the chain's clock: set the clock, or measure again",
            )
        signature = bytes(message.signature)
        if not measurements.is_signed(self._assignments_domain, signature):
            raise Refusal(
                grpc.StatusCode.UNAUTHENTICATED,
                "SIGNATURE_INVALID",
                "the measurements are not signed by the node under the domain of ShardAssignments",
            )
        if measurements.model not in self._publications:
            return
        known = await self._guarded(lambda: self._storage.keep_measurements(measurements, signature))
        if known is not None and measurements.measured_at < known.measured_at:
            _log.info("older_measurements_left_out", node=attached.node, measured_at=measurements.measured_at)
        elif known is None or not _only_links_changed(known, measurements):
            # Links are measured again and again: whoever waits for the last nodes to join does not wait for them.
            self._pool.changed()

    async def _guarded(self, function: Callable[[], _T]) -> _T:
        try:
            return await self._blocking(function)
        except StorageUnavailableError as error:
            raise _database_unavailable(error) from error


def _database_unavailable(error: StorageUnavailableError) -> Refusal:
    _log.error("database_unavailable", error=str(error))
    return Refusal(grpc.StatusCode.UNAVAILABLE, "INTERNAL", "the coordinator's database is unavailable")


def _only_links_changed(known: NodeMeasurements, measurements: NodeMeasurements) -> bool:
    """Whether a node reports again what it has reported, but for its links."""
    return replace(measurements, links=known.links, measured_at=known.measured_at) == known
