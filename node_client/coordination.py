"""The node's side of NodeCoordination: attach to a coordinator, report, consent to plans.

Owns the Attach stream and its reconnecting. Promises that a node consents only to a plan whose root it has computed
itself, whose units it can run in the promised execution class within its memory, for a fee and a publisher its
operator accepts; and that a coordinator that is away or misbehaves stops neither sessions nor chain duties. Does not
follow the coordinator's word on anything the chain can tell.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, cast

import grpc
import grpc.aio
import structlog

from bsns.chain.errors import ChainError
from bsns.chain.signer import Signer
from bsns.protocol.identifiers import BYTES32, ModelId, ProtocolError, address
from bsns.protocol.measurements import LinkTiming, NodeMeasurements
from bsns.protocol.plan import Assignment, ShardPlan, execution_class_id
from bsns.protocol.typed_data import ATTACH_PROOF, PLAN_CONSENT, signing_digest
from bsns.runtime.executor import ExecutionError
from bsns.runtime.profile import RuntimeProfile
from bsns.v1 import coordination_pb2, coordination_pb2_grpc, tabs_pb2
from node_client.chain_view import ChainView, SigningDomains
from node_client.errors import Refusal, StorageError
from node_client.link_probe import LinkProber, differ_materially
from node_client.pace import scaled
from node_client.peers import CHANNEL_OPTIONS
from node_client.session_store import SessionStore
from node_client.settings import NodeSettings
from node_client.shard_runtime import ShardRuntime, weight_bytes
from node_client.tab_desk import TabDesk

log = structlog.get_logger(__name__)

_MAXIMUM_HEARTBEAT_SECONDS: Final = 60.0
_MINIMUM_HEARTBEAT_SECONDS: Final = 0.05
_MAXIMUM_MODELS: Final = 64
# Looks at a batch while the chain or the disk does not answer; together half a minute.
_BATCH_ATTEMPTS: Final = 5


class Coordination:
    """One coordinator at a time; runs until cancelled."""

    def __init__(
        self,
        settings: NodeSettings,
        signer: Signer,
        domains: SigningDomains,
        chain: ChainView,
        runtime: ShardRuntime,
        sessions: SessionStore,
        links: LinkProber,
        tabs: TabDesk,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._settings, self._signer, self._domains = settings, signer, domains
        self._chain, self._runtime, self._sessions = chain, runtime, sessions
        self._links, self._tabs, self._clock = links, tabs, clock
        self._profiles: dict[bytes, RuntimeProfile] = {}
        self.attached = False

    async def run(self, coordinators: Sequence[str]) -> None:
        """Stay attached to one of `coordinators`, the next one where it goes away; with back-off, for ever."""
        backoff = self._settings.coordinator_backoff_seconds
        turn = 0
        while True:
            started = time.monotonic()
            coordinator = coordinators[turn % len(coordinators)]
            turn += 1
            try:
                await self._attach(coordinator)
                reason = "the coordinator closed the stream"
            except grpc.aio.AioRpcError as error:
                reason = error.details() or error.code().name
            except (OSError, TimeoutError, ProtocolError, ChainError, Refusal) as error:
                reason = str(error) or type(error).__name__
            self.attached = False
            if time.monotonic() - started > self._settings.coordinator_backoff_maximum_seconds:
                backoff = self._settings.coordinator_backoff_seconds
            log.warning("coordinator_detached", coordinator=coordinator, reason=reason, retry_seconds=backoff)
            await asyncio.sleep(backoff)
            backoff = min(2 * backoff, self._settings.coordinator_backoff_maximum_seconds)

    async def _attach(self, coordinator: str) -> None:
        channel = self._channel(coordinator)
        try:
            call = cast(Any, coordination_pb2_grpc.NodeCoordinationStub(channel).Attach())
            outbox: asyncio.Queue[coordination_pb2.AttachRequest] = asyncio.Queue(self._settings.stream_outbox_limit)

            async def write() -> None:
                while True:
                    await call.write(await outbox.get())

            tasks = {asyncio.ensure_future(write()), asyncio.ensure_future(self._read(call, outbox))}
            try:
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    try:
                        task.result()
                    except ExceptionGroup as group:
                        # The reader and the work beside it fail together; the first failure is the reason for all.
                        raise group.exceptions[0] from None
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                call.cancel()
        finally:
            await channel.close()

    def _channel(self, coordinator: str) -> grpc.aio.Channel:
        certificate = self._settings.coordinator_certificate
        if certificate is None:  # on loopback: the settings see to it
            return grpc.aio.insecure_channel(coordinator, options=CHANNEL_OPTIONS)
        return grpc.aio.secure_channel(
            coordinator, grpc.ssl_channel_credentials(certificate.read_bytes()), options=CHANNEL_OPTIONS
        )

    async def _read(self, call: Any, outbox: asyncio.Queue[coordination_pb2.AttachRequest]) -> None:
        """Answer what the coordinator sends, until the stream ends. Work that takes long runs beside the reading."""
        async with asyncio.TaskGroup() as group:
            standing: list[asyncio.Task[None]] = []
            while True:
                message = await call.read()
                if message is grpc.aio.EOF:
                    for task in standing:
                        task.cancel()
                    return
                match message.WhichOneof("body"):
                    case "challenge":
                        await outbox.put(self._hello(message.challenge))
                    case "welcome":
                        self.attached = True
                        log.info("coordinator_attached")
                        for task in standing:
                            task.cancel()
                        interval = message.welcome.heartbeat_interval_milliseconds / 1000
                        models = [ModelId(bytes(model)) for model in message.welcome.model_ids[:_MAXIMUM_MODELS]]
                        standing = [
                            group.create_task(self._beat(outbox, interval)),
                            group.create_task(self._report(outbox, models)),
                        ]
                    case "offer":
                        group.create_task(self._answer(outbox, message.offer))
                    case "batch":
                        group.create_task(self._answer_batch(outbox, message.batch))
                    case body:
                        log.warning("unknown_coordinator_message", body=body)

    def _hello(self, challenge: coordination_pb2.Challenge) -> coordination_pb2.AttachRequest:
        if len(challenge.nonce) != BYTES32:
            raise ProtocolError("the coordinator's challenge is not 32 bytes")
        digest = signing_digest(self._domains.registry, ATTACH_PROOF, (self._signer.address, bytes(challenge.nonce)))
        return coordination_pb2.AttachRequest(
            hello=coordination_pb2.Hello(
                node=bytes.fromhex(self._signer.address[2:]), signature=self._signer.sign_digest(digest)
            )
        )

    async def _beat(self, outbox: asyncio.Queue[coordination_pb2.AttachRequest], interval: float) -> None:
        interval = min(max(interval, _MINIMUM_HEARTBEAT_SECONDS), _MAXIMUM_HEARTBEAT_SECONDS)
        for sequence in itertools.count():
            try:
                head = (await self._chain.head()).number
            except ChainError:
                head = 0  # the coordinator sees that this node has lost the chain
            await outbox.put(
                coordination_pb2.AttachRequest(
                    heartbeat=coordination_pb2.Heartbeat(
                        sequence=sequence,
                        open_sessions=self._sessions.active,
                        free_cache_bytes=max(0, self._sessions.free_cache_bytes),
                        chain_head=head,
                    )
                )
            )
            await asyncio.sleep(interval)

    async def _report(self, outbox: asyncio.Queue[coordination_pb2.AttachRequest], models: list[ModelId]) -> None:
        """Measurements of each of `models` that is here, as soon as they are taken, with the links that are known by
        then; all of them again when links, and those of a model when the pace of its steps, have changed.
        """
        reported: tuple[LinkTiming, ...] | None = None
        paces: dict[ModelId, float] = {}
        for model in models:
            try:
                await self._profile(model)
            except (Refusal, ExecutionError) as error:
                log.info("model_not_measured", model=model.hex(), detail=str(error))
                continue
            paces[model] = self._runtime.pace.factor(model)
            links = self._links.links
            await outbox.put(self._measurements(model, paces[model], links))
            reported = links if reported is None else reported
        while reported is not None:
            await asyncio.sleep(self._settings.link_report_seconds)
            links = self._links.links
            new_links = differ_materially(reported, links, self._settings.link_change_share)
            for model, before in paces.items():
                pace = await self._current_pace(model, before)
                if new_links or pace != before:
                    paces[model] = pace
                    await outbox.put(self._measurements(model, pace, links))
            reported = links if new_links else reported

    async def _current_pace(self, model: ModelId, reported: float) -> float:
        """How many times the measured times the steps of a model take now; `reported` while that is not far off."""
        pace, share = self._runtime.pace, self._settings.pace_change_share
        if abs(pace.factor(model) - 1.0) > share and pace.is_old(model):
            # Without sessions nothing would ever say that the node is itself again.
            self._profiles[model] = await self._runtime.measure(model, self._settings.profile_seconds)
            return pace.factor(model)
        factor = pace.factor(model)
        if max(factor, reported) <= (1 + share) * min(factor, reported):
            return reported
        log.info("pace_changed", model=model.hex(), before=round(reported, 3), now=round(factor, 3))
        return factor

    def _measurements(
        self, model: ModelId, pace: float, links: tuple[LinkTiming, ...]
    ) -> coordination_pb2.AttachRequest:
        profile = self._profiles[model]
        measurements = NodeMeasurements(
            model=model,
            node=self._signer.address,
            measured_at=int(self._clock()),
            execution_class=execution_class_id(profile.execution_class),
            memory_bytes=self._settings.weight_memory_bytes + self._settings.cache_memory_bytes,
            unit_timings=profile.timings if pace == 1.0 else scaled(profile.timings, pace),
            links=links,
        )
        signature = self._signer.sign_digest(measurements.signing_digest(self._domains.assignments))
        return coordination_pb2.AttachRequest(measurements=measurements.to_message(signature))

    async def _profile(self, model: ModelId) -> None:
        """Measure a model, once a process unless its pace asks for it."""
        if model not in self._profiles:
            self._profiles[model] = await self._runtime.measure(model, self._settings.profile_seconds)

    async def _answer(
        self, outbox: asyncio.Queue[coordination_pb2.AttachRequest], offer: coordination_pb2.PlanOffer
    ) -> None:
        consent = coordination_pb2.PlanConsent(model_id=offer.model_id, epoch=offer.epoch)
        try:
            consent = await self.consider(offer)
            log.info("plan_consented", epoch=offer.epoch, root=consent.plan_root.hex())
        except (Refusal, ProtocolError, ChainError, PlanRefusedError, OverflowError) as error:
            consent.refusal = str(error)[:512]
            log.warning("plan_refused", epoch=offer.epoch, refusal=consent.refusal)
        await outbox.put(coordination_pb2.AttachRequest(consent=consent))

    async def _answer_batch(
        self, outbox: asyncio.Queue[coordination_pb2.AttachRequest], batch: tabs_pb2.TicketBatch
    ) -> None:
        for attempt in range(1, _BATCH_ATTEMPTS + 1):
            try:
                consent = await self._tabs.consider(batch)
                break
            except (ChainError, StorageError) as error:
                # Not a reason to refuse: a refusal would cost all who served with this node their pay.
                log.warning("batch_not_considered", attempt=attempt, detail=str(error))
                await asyncio.sleep(self._settings.coordinator_backoff_seconds * 2**attempt)
        else:
            return
        await outbox.put(coordination_pb2.AttachRequest(batch_consent=consent))

    async def consider(self, offer: coordination_pb2.PlanOffer) -> coordination_pb2.PlanConsent:
        """A signed consent, or PlanRefusedError, Refusal or ProtocolError with the reason."""
        if len(offer.model_id) != BYTES32 or len(offer.measurements_hash) != BYTES32 or len(offer.fee_per_token) > 16:
            raise PlanRefusedError("the offer is malformed")
        model, publisher = ModelId(bytes(offer.model_id)), address(bytes(offer.publisher))
        trusted = {address(item) for item in self._settings.trusted_publishers}
        if trusted and publisher not in trusted:
            raise PlanRefusedError(f"publisher {publisher} is not among the trusted ones")
        fee = int.from_bytes(offer.fee_per_token, "big")
        if fee < self._settings.minimum_fee_per_token_wei:
            raise PlanRefusedError(f"{fee} wei per token is less than {self._settings.minimum_fee_per_token_wei}")
        # Compared with the later of both clocks: the consent is checked against block time.
        now = max(int(self._clock()), (await self._chain.head()).timestamp)
        if not now <= offer.consent_deadline <= now + self._settings.maximum_consent_lifetime_seconds:
            raise PlanRefusedError(
                f"the consent deadline is not within {self._settings.maximum_consent_lifetime_seconds} s"
            )
        expected = int(await self._chain.client.call("ShardAssignments", "nextEpoch", model, publisher))
        if offer.epoch != expected:
            raise PlanRefusedError(f"the next epoch on chain is {expected}, the offer is for {offer.epoch}")
        store = self._runtime.store(model)
        plan = ShardPlan(len(store.manifest.units), tuple(map(Assignment.from_message, offer.assignments)))
        own = [item for item in plan.assignments if item.node == self._signer.address]
        if not own:
            raise PlanRefusedError("the plan gives this node nothing to do")
        needed = sum(weight_bytes(store.manifest, item.first_unit, item.end_unit) for item in own)
        if needed > self._settings.weight_memory_bytes:
            raise PlanRefusedError(
                f"the units take {needed} bytes, weight_memory_bytes is {self._settings.weight_memory_bytes}"
            )
        for item in own:
            # Loads and checks the weights now: a plan in effect must find them here.
            executor = await self._runtime.executor(model, item.first_unit, item.end_unit)
            self._runtime.release(executor)
            if execution_class_id(executor.execution_class) != item.execution_class:
                raise PlanRefusedError(f"the plan asks for another execution class than {executor.execution_class}")
        digest = signing_digest(
            self._domains.assignments,
            PLAN_CONSENT,
            (model, publisher, offer.epoch, fee, bytes(offer.measurements_hash), plan.root, offer.consent_deadline),
        )
        return coordination_pb2.PlanConsent(
            model_id=model, epoch=offer.epoch, plan_root=plan.root, signature=self._signer.sign_digest(digest)
        )


class PlanRefusedError(Exception):
    """This node does not consent to a plan. The message goes to the coordinator."""
