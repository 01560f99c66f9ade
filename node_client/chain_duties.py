"""What a node owes the chain: commitments of the stages it executed, attestations of the stages it sits on, the
reveals of both, and reports of nodes it found to contradict their own signatures.

Owns a loop that looks at every new block. Stateless between blocks: which duties are open follows from the chain and
the evidence store each time, so a node that was killed between two steps goes on where it stopped. Promises that
nothing is sent that the signing guard has not permitted, that what must be revealed later is on disk before its
commitment is sent, and that one failing duty delays no other. Does not draw committees, tally or settle: anyone can,
and the coordinator does.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Final

import structlog
from eth_typing import ChecksumAddress

from bsns.chain.client import Block
from bsns.chain.errors import (
    ChainError,
    ChainUnavailableError,
    ContractError,
    TransactionFailedError,
    TransactionTimeoutError,
)
from bsns.chain.submitter import Submitter
from bsns.protocol.contract_states import Phase, RequestStatus
from bsns.protocol.hand_over import Contradiction
from bsns.protocol.identifiers import ZERO_HASH
from bsns.tracing import Facts, RequestTracer
from bsns.v1 import execution_pb2
from node_client.chain_view import ChainView, VerificationView
from node_client.errors import Refusal, SigningRefusedError, StorageError
from node_client.evidence_store import EvidenceStore, RecordedStage, StageResult
from node_client.metrics import NodeMetrics
from node_client.reexecution import Reexecution
from node_client.session_store import replacements_from_messages
from node_client.settings import NodeSettings
from node_client.signing_guard import DutyKind, SigningGuard
from node_client.tab_desk import TabDesk

log = structlog.get_logger(__name__)

VERIFICATION: Final = "OutputVerification"
# After these nothing about a request can change, and nobody can ask for its evidence any more.
_OVER: Final = (RequestStatus.SETTLED, RequestStatus.REFUNDED)
# Refusals of the contracts that mean "already done", by this process or by one before it.
_DONE_ERRORS: Final = frozenset({"StageAlreadyCommitted", "AlreadyCommitted", "AlreadyRevealed"})
# Blocks looked at again where the head does not follow the one before, which may be a reorganisation.
_OVERLAP_BLOCKS: Final = 12
_DRAWN: Final = ("CommitteeDrawn", "RoundEscalated")
_ATTEST: Final = "attest"
_REPORT: Final = "report"
_BATCH: Final = "batch"
# A request that nothing happened to is looked at this often all the same.
_IDLE_SECONDS: Final = 60


class ChainDuties:
    """Runs until cancelled."""

    def __init__(
        self,
        settings: NodeSettings,
        node: ChecksumAddress,
        chain: ChainView,
        submitter: Submitter,
        evidence: EvidenceStore,
        guard: SigningGuard,
        reexecution: Reexecution,
        tabs: TabDesk,
        metrics: NodeMetrics,
        tracer: RequestTracer,
        *,
        start: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
    ) -> None:
        self._settings, self._node, self._chain, self._submitter = settings, node, chain, submitter
        self._evidence, self._guard, self._reexecution, self._start = evidence, guard, reexecution, start
        self._tabs, self._metrics, self._tracer = tabs, metrics, tracer
        self._wake = asyncio.Event()
        self._seen: Block | None = None
        # Block time before which a duty need not be looked at, unless an event names its request.
        self._look_again: dict[tuple[bytes, str], int] = {}
        # Requests on which a committee was drawn and which are not over; rebuilt from events at the start.
        self._watched: set[bytes] = set()
        # (request, what): one task a duty, so that a slow one holds up no other.
        self._running: dict[tuple[bytes, str], asyncio.Task[None]] = {}
        # What was last said about a failing duty.
        self._reported: dict[tuple[bytes, str], str] = {}
        self.last_head: Block | None = None

    def wake(self) -> None:
        """Look at once: a stage was sealed."""
        self._wake.set()

    @property
    def busy(self) -> bool:
        """Whether a duty is being done."""
        return bool(self._running)

    async def run(self) -> None:
        """Poll until cancelled. A chain out of reach is reported once and asked again."""
        reachable = True
        self._watched.update(self._evidence.attested_requests())
        while True:
            try:
                await self.tick()
                if not reachable:
                    log.info("chain_reachable")
                reachable = True
            except ChainUnavailableError as error:
                if reachable:
                    log.warning("chain_unavailable", detail=str(error))
                reachable = False
            except (ChainError, StorageError) as error:
                log.error("duties_failed", detail=str(error))
            try:
                async with asyncio.timeout(self._settings.chain_poll_seconds):
                    await self._wake.wait()
            except TimeoutError:
                pass
            self._wake.clear()

    async def tick(self) -> None:
        """Start every duty that may have become due and is not running yet.

        A duty is looked at when an event names its request, when the time it waits for has come, and after a failure;
        so a thousand requests that only wait out their challenge window cost nothing at each block.
        """
        head = await self._chain.head(fresh=True)
        self._metrics.saw_head(head.number, head.timestamp)
        if self._seen is None or head.hash != self._seen.hash:
            await self._read_events(head)
        self.last_head = head
        duties: dict[tuple[bytes, str], Callable[[], Coroutine[Any, Any, int]]] = {}
        for recorded in await asyncio.to_thread(self._evidence.sealed_stages):
            duties[recorded.request, f"stage-{recorded.stage}"] = partial(self._executor_duty, recorded)
        for request_id in self._watched:
            duties[request_id, _ATTEST] = partial(self._member_duty, request_id)
        for request_id in await asyncio.to_thread(self._evidence.contradicted_requests):
            duties[request_id, _REPORT] = partial(self._report_duty, request_id)
        for batch in await asyncio.to_thread(self._evidence.batches):
            duties[batch, _BATCH] = partial(self._tabs.batch_duty, batch)
        for key in self._look_again.keys() - duties.keys():
            del self._look_again[key]
        for key in self._reported.keys() - duties.keys():
            del self._reported[key]
        for (request_id, what), duty in duties.items():
            self._run(head, request_id, what, duty)

    async def _read_events(self, head: Block) -> None:
        """Note which requests the blocks since the last look are about."""
        first_block = self._chain.deployment.first_block
        if self._seen is None:
            first = max(first_block, head.number - self._settings.chain_lookback_blocks)
            for name in _DRAWN:
                for event in await self._chain.events_since(first, head.number, name):
                    self._watched.add(bytes(event.arguments["requestId"]))
        else:
            follows = head.parent_hash == self._seen.hash
            first = head.number if follows else max(first_block, self._seen.number + 1 - _OVERLAP_BLOCKS)
            for event in await self._chain.client.events_between(first, head.number):
                request_id = event.arguments.get("requestId")
                if request_id is None:
                    continue
                if event.name in _DRAWN:
                    self._watched.add(bytes(request_id))
                for key in [key for key in self._look_again if key[0] == request_id]:
                    del self._look_again[key]
        self._seen = head

    def _run(self, head: Block, request_id: bytes, what: str, duty: Callable[[], Coroutine[Any, Any, int]]) -> None:
        key = (request_id, what)
        if key in self._running or head.timestamp < self._look_again.get(key, 0):
            return
        task = self._start(self._guarded(request_id, what, duty))
        self._running[key] = task
        task.add_done_callback(lambda _: self._running.pop(key, None))

    async def _guarded(self, request_id: bytes, what: str, duty: Callable[[], Coroutine[Any, Any, int]]) -> None:
        """A duty that fails is tried again at the next look; its reason is in the log."""
        key = (request_id, what)
        read_at = self._seen
        try:
            again = await duty()
            if self._seen is read_at:
                # Otherwise an event may have come in between that asks for another look.
                self._look_again[key] = again
            self._reported.pop(key, None)
            self._metrics.duties.labels(what, "looked at").inc()
        except TransactionFailedError as error:
            # Another transaction of the same block changed what this one had to do, and its gas did not suffice.
            log.info("duty_overtaken", request_id=request_id.hex(), duty=what, detail=str(error))
            self.wake()
        except (ChainError, StorageError, SigningRefusedError, Refusal) as error:
            self._metrics.duties.labels(what, type(error).__name__).inc()
            # Tried at each block: only a new reason is news.
            if self._reported.get(key) == type(error).__name__:
                return
            self._reported[key] = type(error).__name__
            postponed = isinstance(error, ChainUnavailableError | TransactionTimeoutError)
            report = log.warning if postponed else log.error
            event = "duty_postponed" if postponed else "duty_failed"
            report(event, request_id=request_id.hex(), duty=what, detail=str(error))

    # -- the executor

    async def _executor_duty(self, recorded: RecordedStage) -> int:
        """Do what is due for a stage this node executed; returns the block time from which to look again."""
        now = (await self._chain.head()).timestamp
        later = now + _IDLE_SECONDS
        request = await self._chain.request(recorded.request)
        if request.status in _OVER:
            await self._forget(recorded.request)
            return later
        if request.granted:
            again = await self._tabs.ticket_duty(recorded.request, request.deadline)
            if again is None:
                await self._forget(recorded.request)
            return later if again is None else again
        record = await self._chain.stage_record(recorded.request, recorded.stage)
        if record.commitment == ZERO_HASH:
            if request.status is not RequestStatus.ROUTED:
                return later
            await self._commit(recorded)
            return now
        if record.revealed:
            return later
        verification = await self._chain.verification(recorded.request)
        if verification.phase is Phase.ATTESTING:
            return verification.attest_deadline + 1
        first_opening = verification.round == 1 or not verification.sampled
        if verification.phase is Phase.REVEALING and first_opening and now <= verification.reveal_deadline:
            result = recorded.result
            await self._send(
                recorded.request, "revealStage", recorded.stage,
                result.evidence_root, result.sketch, result.output_tokens, result.salt,
            )  # fmt: skip
        return later

    async def _commit(self, recorded: RecordedStage) -> None:
        result = recorded.result
        await self._put_in_place(recorded)
        commitment = self._commitment(recorded.request, 0, recorded.stage, result)
        await asyncio.to_thread(
            self._guard.permit, DutyKind.COMMITMENT, recorded.request, recorded.stage, 0, commitment
        )
        await self._send(recorded.request, "commitStage", recorded.stage, commitment)

    async def _put_in_place(self, recorded: RecordedStage) -> None:
        """Show the chain who was replaced on the way to this node's place, if it has not been shown."""
        route = await self._chain.stages(recorded.request)
        if route[recorded.stage].node == self._node:
            return
        messages = [
            execution_pb2.StageReplacement.FromString(document)
            for document in await asyncio.to_thread(self._evidence.replacements, recorded.request, recorded.stage)
        ]
        found = replacements_from_messages(recorded.request, messages)
        receipt = await self._submitter.submit(
            "InferenceEscrow", "replaceStages", recorded.request, [item.as_tuple() for item in found],
            timeout_s=self._settings.transaction_timeout_seconds,
        )  # fmt: skip
        log.info(
            "stage_replaced_on_chain", request_id=recorded.request.hex(), stage=recorded.stage, gas=receipt.gas_used
        )

    # -- the committee member

    async def _member_duty(self, request_id: bytes) -> int:
        """Do what is due as a committee member; returns the block time from which to look again without an event."""
        now = (await self._chain.head()).timestamp
        request = await self._chain.request(request_id)
        verification = await self._chain.verification(request_id)
        if request.status in _OVER or verification.phase is Phase.FINAL:
            self._watched.discard(request_id)
            if not await asyncio.to_thread(self._own_stages, request_id):
                await self._forget(request_id)
        elif verification.phase is Phase.ATTESTING:
            await self._attest(request_id, verification)
            return verification.attest_deadline + 1
        elif verification.phase is Phase.REVEALING and now <= verification.reveal_deadline:
            await self._reveal(request_id, verification)
        return now + _IDLE_SECONDS

    async def _attest(self, request_id: bytes, verification: VerificationView) -> None:
        """Judge every stage this node sits on, then commit to all of them in one transaction."""
        seated = []
        for stage in range(verification.stage_count):
            if not await self._chain.is_seated(request_id, stage, self._node):
                continue
            if not (await self._chain.stage_record(request_id, stage)).disputed:
                continue
            commitment, _ = await self._chain.attestation(request_id, verification.round, stage, self._node)
            if commitment == ZERO_HASH:
                seated.append(stage)
        if not seated:
            return
        started = await self._chain.head()
        window = verification.attest_deadline - started.timestamp
        patience_until = started.timestamp + int(window * self._settings.attestation_give_up_share)
        loop = asyncio.get_running_loop()
        local_deadline = loop.time() + window * self._settings.attestation_give_up_share

        def give_up() -> bool:
            # By both clocks: block time may be moved, and blocks may stop coming.
            head = self.last_head or started
            return head.timestamp >= patience_until or loop.time() >= local_deadline

        commitments = {}
        for stage in seated:
            result = self._evidence.attestation(request_id, verification.round, stage)
            if result is None:
                began = time.time()
                judged = await self._reexecution.judge(request_id, stage, give_up)
                facts: Facts = {"bsns.stage": stage, "bsns.round": verification.round, "bsns.node": self._node}
                self._tracer.span(request_id, f"compute stage {stage} again", began, facts)
                for found in judged.contradictions:
                    await asyncio.to_thread(self._evidence.save_contradiction, request_id, found)
                result = await asyncio.to_thread(
                    self._evidence.save_attestation, request_id, verification.round, stage, judged.result
                )
            commitment = self._commitment(request_id, verification.round, stage, result)
            await asyncio.to_thread(
                self._guard.permit, DutyKind.ATTESTATION, request_id, stage, verification.round, commitment
            )
            commitments[stage] = commitment
        while commitments:
            try:
                await self._send(request_id, "commitAttestations", list(commitments), list(commitments.values()))
                return
            except ContractError as error:
                full = error.arguments.get("stage")
                if error.name != "CommitteeFull" or full not in commitments:
                    raise
                # Others took all seats of that stage; the rest still stands.
                del commitments[full]

    async def _reveal(self, request_id: bytes, verification: VerificationView) -> None:
        """Open this node's commitments of the round, all in one block where the chain lets them."""
        due = []
        for stage in range(verification.stage_count):
            result = self._evidence.attestation(request_id, verification.round, stage)
            if result is None:
                continue
            commitment, revealed = await self._chain.attestation(request_id, verification.round, stage, self._node)
            if revealed or commitment != self._commitment(request_id, verification.round, stage, result):
                continue
            opening = (result.evidence_root, result.sketch, result.output_tokens, result.salt)
            due.append(self._send(request_id, "revealAttestation", stage, *opening))
        await asyncio.gather(*due)

    # -- the witness

    async def _report_duty(self, request_id: bytes) -> int:
        """Report each node whose statement contradicts its evidence, as soon as that evidence is revealed; returns the
        block time from which to look again without an event.
        """
        for found in await asyncio.to_thread(self._evidence.contradictions, request_id):
            stage = found.statement.stage
            if (await self._chain.stage_record(request_id, stage)).revealed:
                await self._report(request_id, found)
            elif (await self._chain.request(request_id)).status not in _OVER:
                continue
            # Reported, or never to be revealed.
            await asyncio.to_thread(self._evidence.drop_contradiction, request_id, found)
        return (await self._chain.head()).timestamp + _IDLE_SECONDS

    async def _report(self, request_id: bytes, found: Contradiction) -> None:
        said = found.statement
        try:
            receipt = await self._submitter.submit(
                VERIFICATION,
                "reportContradiction",
                (request_id, said.stage, said.sent, said.step, said.chain),
                said.signature,
                found.step.as_tuple(),
                list(found.proof),
                timeout_s=self._settings.transaction_timeout_seconds,
            )
        except ContractError as error:
            # Anyone may report, and one report is enough: most of the time somebody else was first.
            log.info("report_not_needed", request_id=request_id.hex(), stage=said.stage, detail=str(error))
            return
        log.warning("contradiction_reported", request_id=request_id.hex(), stage=said.stage, gas=receipt.gas_used)

    async def _forget(self, request_id: bytes) -> None:
        """Nothing can change about the request any more."""
        await asyncio.to_thread(self._evidence.forget, request_id)
        self._watched.discard(request_id)
        self._chain.revoke(request_id)

    def _own_stages(self, request_id: bytes) -> bool:
        return any(item.request == request_id for item in self._evidence.sealed_stages())

    def _commitment(self, request_id: bytes, round_: int, stage: int, result: StageResult) -> bytes:
        return result.commitment(request_id, round_, stage, self._node)

    async def _send(self, request_id: bytes, function: str, *arguments: Any) -> None:
        began = time.time()
        try:
            receipt = await self._submitter.submit(
                VERIFICATION, function, request_id, *arguments, timeout_s=self._settings.transaction_timeout_seconds
            )
        except ContractError as error:
            if error.name not in _DONE_ERRORS:
                self._metrics.transactions.labels(function, "refused").inc()
                raise
            return
        self._metrics.transactions.labels(function, "mined").inc()
        self._tracer.span(request_id, function, began, {"bsns.node": self._node, "bsns.gas": receipt.gas_used})
        log.info(
            "duty_done", request_id=request_id.hex(), duty=function, block=receipt.block_number, gas=receipt.gas_used
        )
