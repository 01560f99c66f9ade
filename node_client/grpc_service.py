"""The ShardExecution service: messages in, answers and errors out.

Owns validation of calls, who may ask for evidence, and the mapping of every error to a gRPC code with
google.rpc.ErrorInfo. Promises that no input ends the process, that every refusal names its reason and what to do, and
that a reader who does not read is cut off. All work is done by the pipeline, the runtime and the stores.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Any, Final, NoReturn

import grpc
import grpc.aio
import structlog
from eth_typing import ChecksumAddress
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from bsns.chain.errors import ChainError
from bsns.protocol.commitments import sealed_sketch
from bsns.protocol.contract_states import RequestStatus
from bsns.protocol.identifiers import BYTES32, ModelId, ProtocolError
from bsns.protocol.typed_data import EVIDENCE_QUERY, recover, signing_digest
from bsns.v1 import common_pb2, execution_pb2, execution_pb2_grpc
from node_client.chain_view import ChainView, SigningDomains
from node_client.errors import ERROR_DOMAIN, ErrorReason, Refusal, StorageError, StorageFullError
from node_client.evidence_store import EvidenceStore, RecordedStage
from node_client.link_probe import ProbeResponder
from node_client.peers import PEER_PROOF_KEY, check_peer_proof
from node_client.pipeline import ForwardStream, Pipeline
from node_client.session_store import Session, SessionStore, sampling_to_message
from node_client.settings import NodeSettings
from node_client.shard_runtime import ShardRuntime, weight_bytes
from node_client.tab_desk import TabDesk
from node_client.takeover import INPUTS, PAYLOAD_BYTES, HistorySide, frames_of, history_of

_DETAILS_KEY: Final = "grpc-status-details-bin"
# Status messages travel in HTTP headers, whose size is limited.
_MAXIMUM_DETAIL: Final = 1024
# What caused an answer (a token to relay, a step to sign for) is on its way to the compute thread meanwhile; writing at
# once would take the interpreter from it.
_ANSWER_PAUSE_S: Final = 0.001

log = structlog.get_logger(__name__)


class ShardExecutionServicer(execution_pb2_grpc.ShardExecutionServicer):
    """Served by every node."""

    def __init__(
        self,
        settings: NodeSettings,
        node: ChecksumAddress,
        domains: SigningDomains,
        chain: ChainView,
        sessions: SessionStore,
        pipeline: Pipeline,
        runtime: ShardRuntime,
        evidence: EvidenceStore,
        probes: ProbeResponder,
        tabs: TabDesk,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._settings, self._node, self._domains, self._chain = settings, node, domains, chain
        self._sessions, self._pipeline, self._runtime, self._evidence = sessions, pipeline, runtime, evidence
        self._probes, self._tabs, self._clock = probes, tabs, clock

    async def PrepareShard(
        self, request: execution_pb2.PrepareShardRequest, context: Any
    ) -> AsyncIterator[execution_pb2.PrepareShardResponse]:
        try:
            if len(request.model_id) != BYTES32:
                raise Refusal(ErrorReason.ERROR_REASON_MALFORMED_MESSAGE, "model_id must be 32 bytes")
            model = ModelId(bytes(request.model_id))
            loop = asyncio.get_running_loop()
            progress: asyncio.Queue[tuple[int, int]] = asyncio.Queue()
            task = asyncio.ensure_future(
                self._runtime.executor(
                    model,
                    request.first_unit,
                    request.end_unit,
                    progress=lambda done, total: (
                        loop.call_soon_threadsafe(progress.put_nowait, (done, total)),
                        None,
                    )[1],
                )
            )
            try:
                while not task.done():
                    waiting = asyncio.ensure_future(progress.get())
                    await asyncio.wait((task, waiting), return_when=asyncio.FIRST_COMPLETED)
                    if waiting.done():
                        done, total = waiting.result()
                        yield execution_pb2.PrepareShardResponse(bytes_done=done, bytes_total=total)
                    else:
                        waiting.cancel()
                executor = await task
            finally:
                # Shielded by its own thread: what is half loaded stays loaded.
                if not task.done():
                    task.add_done_callback(
                        lambda loaded: (
                            None if loaded.cancelled() or loaded.exception() else self._runtime.release(loaded.result())
                        )
                    )
            self._runtime.release(executor)
            total = weight_bytes(executor.manifest, request.first_unit, request.end_unit)
            yield execution_pb2.PrepareShardResponse(bytes_done=total, bytes_total=total, ready=True)
        except Exception as error:
            await _abort(context, error)

    async def OpenSession(
        self, request: execution_pb2.OpenSessionRequest, context: Any
    ) -> execution_pb2.OpenSessionResponse:
        try:
            session, is_new = await self._sessions.open(request)
            if is_new:
                self._pipeline.begin(session)
                if session.takes_over and session.stage > 0:
                    # Whoever repairs a route wants to know whether this has succeeded.
                    await self._pipeline.extent(session)
            return execution_pb2.OpenSessionResponse(
                cache_bytes=session.cache_bytes, replacements=session.replacement_messages
            )
        except Exception as error:
            await _abort(context, error)

    async def CloseSession(
        self, request: execution_pb2.CloseSessionRequest, context: Any
    ) -> execution_pb2.CloseSessionResponse:
        try:
            await self._sessions.check_token(bytes(request.request_id), request.token)
            session = self._sessions.require(bytes(request.request_id), 0)
            return execution_pb2.CloseSessionResponse(steps=await self._pipeline.cancel(session))
        except Exception as error:
            await _abort(context, error)

    async def ReplaceStage(
        self, request: execution_pb2.ReplaceStageRequest, context: Any
    ) -> execution_pb2.ReplaceStageResponse:
        try:
            found = self._sessions.of_request(bytes(request.request_id))
            if not found:
                raise Refusal(ErrorReason.ERROR_REASON_UNKNOWN_SESSION, "there is no session of this request here")
            witness = await self._pipeline.replace(found[0], request.replacements)
            return execution_pb2.ReplaceStageResponse(witness=witness)
        except Exception as error:
            await _abort(context, error)

    async def CheckSession(
        self, request: execution_pb2.CheckSessionRequest, context: Any
    ) -> execution_pb2.CheckSessionResponse:
        try:
            key = bytes(request.request_id), request.stage
            session = self._sessions.get(*key)
            if session is None and self._evidence.sealed_stage(*key) is not None:
                return execution_pb2.CheckSessionResponse(ended=True)
            return execution_pb2.CheckSessionResponse(steps=self._sessions.require(*key).next_step)
        except Exception as error:
            await _abort(context, error)

    async def GetStageHistory(
        self, request: execution_pb2.GetStageHistoryRequest, context: Any
    ) -> AsyncIterator[execution_pb2.GetStageHistoryResponse]:
        try:
            session = self._beside(bytes(request.request_id), request.stage, request.side)
            if self._caller(context) != session.route[request.stage].node:
                raise Refusal(
                    ErrorReason.ERROR_REASON_SIGNATURE_INVALID,
                    f"the history of stage {request.stage} is for the node that serves it now, with its peer proof",
                )
            extent = await self._pipeline.extent(session)
            takes_in = request.stage if request.side == INPUTS else session.stage
            async for item in history_of(session, request.side, extent, self._evidence):
                for frame in frames_of(session.request_id, takes_in, item):
                    yield execution_pb2.GetStageHistoryResponse(frame=frame)
            if request.side == INPUTS:
                # The end of the answer, or whatever else the former node may not have seen.
                self._pipeline.repeat(session)
        except Exception as error:
            await _abort(context, error)

    def _beside(self, request_id: bytes, stage: int, side: HistorySide) -> Session:
        """Our session next to `stage` on the ring; Refusal if there is none."""
        for session in self._sessions.of_request(request_id):
            if stage == (session.successor_stage if side == INPUTS else session.predecessor_stage):
                return session
        raise Refusal(
            ErrorReason.ERROR_REASON_UNKNOWN_SESSION, f"no stage next to stage {stage} of this request is served here"
        )

    # grpc.aio takes a coroutine that writes its answers as well as a generator; the stubs know generators only.
    async def Forward(  # type: ignore[override]
        self, request_iterator: AsyncIterator[execution_pb2.ForwardRequest], context: Any
    ) -> None:
        try:
            stream = ForwardStream(self._caller(context), self._settings.stream_outbox_limit)
        except Refusal as refusal:
            await _abort(context, refusal)
        reading = asyncio.ensure_future(self._read(stream, request_iterator))
        writing = asyncio.ensure_future(self._write(stream, context))
        closing = asyncio.ensure_future(stream.closed.wait())
        try:
            await asyncio.wait((reading, writing, closing), return_when=asyncio.FIRST_COMPLETED)
            if reading.done() and not stream.closed.is_set():
                reading.result()
                await asyncio.wait((writing, closing), return_when=asyncio.FIRST_COMPLETED)
            if stream.closed.is_set():
                raise Refusal(ErrorReason.ERROR_REASON_CAPACITY_EXHAUSTED, "the answers on this stream were not read")
            if writing.done():
                writing.result()
        except Refusal as refusal:
            await _abort(context, refusal)
        finally:
            for task in (reading, writing, closing):
                task.cancel()
            await asyncio.gather(reading, writing, closing, return_exceptions=True)
            self._pipeline.stream_closed(stream)

    async def GetStageEvidence(
        self, request: execution_pb2.GetStageEvidenceRequest, context: Any
    ) -> AsyncIterator[execution_pb2.GetStageEvidenceResponse]:
        try:
            recorded = await self._authorised_stage(request)
            loop = asyncio.get_running_loop()
            message = await loop.run_in_executor(None, lambda: self._evidence_message(recorded))
            yield execution_pb2.GetStageEvidenceResponse(evidence=message)
            if request.with_inputs:
                for step in message.steps:
                    number = step.step
                    encoding, data = await loop.run_in_executor(
                        None, self._evidence.step_input, recorded.request, recorded.stage, number
                    )
                    for first in range(0, len(data), PAYLOAD_BYTES):
                        yield execution_pb2.GetStageEvidenceResponse(
                            input=execution_pb2.StageInputFrame(
                                step=number,
                                encoding=common_pb2.TensorEncoding.ValueType(encoding),
                                payload=data[first : first + PAYLOAD_BYTES],
                            )
                        )
                    output = await loop.run_in_executor(
                        None, self._evidence.step_output, recorded.request, recorded.stage, number
                    )
                    for first in range(0, len(output), PAYLOAD_BYTES):
                        yield execution_pb2.GetStageEvidenceResponse(
                            output=execution_pb2.StageOutput(step=number, payload=output[first : first + PAYLOAD_BYTES])
                        )
        except Exception as error:
            await _abort(context, error)

    async def GetStageResult(
        self, request: execution_pb2.GetStageResultRequest, context: Any
    ) -> execution_pb2.GetStageResultResponse:
        try:
            await self._sessions.check_token(bytes(request.request_id), request.token)
            return await self._tabs.sign_result(bytes(request.request_id), request.stage)
        except Exception as error:
            await _abort(context, error)

    async def Probe(self, request: execution_pb2.ProbeRequest, context: Any) -> execution_pb2.ProbeResponse:
        try:
            digest = await self._probes.answer(self._caller(context), request.payload)
            return execution_pb2.ProbeResponse(digest=digest)
        except Exception as error:
            await _abort(context, error)

    def _caller(self, context: Any) -> ChecksumAddress | None:
        """The node that proved itself in the metadata; None for a requester, who proves to know the prompt instead."""
        for key, value in context.invocation_metadata() or ():
            if key == PEER_PROOF_KEY:
                return check_peer_proof(
                    self._domains.registry,
                    value if isinstance(value, bytes) else value.encode(),
                    self._node,
                    int(self._clock()),
                    self._settings.peer_proof_lifetime_seconds,
                )
        return None

    async def _read(self, stream: ForwardStream, messages: AsyncIterator[execution_pb2.ForwardRequest]) -> None:
        async for message in messages:
            self._pipeline.receive(stream, message)
        stream.end_reading()

    @staticmethod
    async def _write(stream: ForwardStream, context: Any) -> None:
        while True:
            answers = [await stream.outbox.get()]
            await asyncio.sleep(_ANSWER_PAUSE_S)
            while not stream.outbox.empty():
                answers.append(stream.outbox.get_nowait())
            for answer in answers:
                if answer is None:
                    return
                await context.write(answer)

    async def _authorised_stage(self, request: execution_pb2.GetStageEvidenceRequest) -> RecordedStage:
        """The stage, if the caller may see it: seated members and neighbours everything; the requester, and members who
        judge the stage before or after it, no tensors.
        """
        request_id, stage = bytes(request.request_id), request.stage
        if len(request_id) != BYTES32:
            raise Refusal(ErrorReason.ERROR_REASON_MALFORMED_MESSAGE, "request_id must be 32 bytes")
        now = int(self._clock())
        if not now <= request.deadline <= now + self._settings.maximum_query_lifetime_seconds:
            raise Refusal(
                ErrorReason.ERROR_REASON_SIGNATURE_INVALID,
                f"a query is signed for at most {self._settings.maximum_query_lifetime_seconds} s ahead and not "
                "after its deadline",
            )
        try:
            caller = recover(
                signing_digest(self._domains.verification, EVIDENCE_QUERY, (request_id, stage, request.deadline)),
                request.signature,
            )
        except (ProtocolError, ValueError, OverflowError) as error:
            raise Refusal(ErrorReason.ERROR_REASON_SIGNATURE_INVALID, f"the query is not signed: {error}") from error
        recorded = self._evidence.sealed_stage(request_id, stage)
        if recorded is None:
            raise Refusal(
                ErrorReason.ERROR_REASON_EVIDENCE_UNAVAILABLE,
                "there is no finished stage on record here, or its dispute is over",
            )
        on_chain = await self._chain.request(request_id)
        if on_chain.status is RequestStatus.ABSENT:
            raise Refusal(ErrorReason.ERROR_REASON_EVIDENCE_UNAVAILABLE, "the request is not on the chain")
        if caller == on_chain.requester and not request.with_inputs:
            return recorded
        route = await self._chain.stages(request_id)
        adjacent = {(stage + 1) % len(route), (stage - 1) % len(route)} if route else set()
        neighbours = {route[other].node for other in adjacent}
        if caller in neighbours or await self._chain.is_seated(request_id, stage, caller):
            return recorded
        if not request.with_inputs:
            for other in adjacent:
                if await self._chain.is_seated(request_id, other, caller):
                    return recorded
        raise Refusal(
            ErrorReason.ERROR_REASON_NOT_SEATED,
            f"{caller} neither sits on the committee of this stage nor is next to it on the route; a member of the "
            "stage before or after it may ask for the evidence without inputs",
        )

    def _evidence_message(self, recorded: RecordedStage) -> execution_pb2.StageEvidence:
        evidence = self._evidence.steps(recorded.request, recorded.stage)
        opening, result = recorded.opening, recorded.result
        return execution_pb2.StageEvidence(
            request_id=recorded.request,
            stage=recorded.stage,
            node=bytes.fromhex(self._node[2:]),
            evidence_root=result.evidence_root,
            sealed_sketch=sealed_sketch(result.sketch, result.salt),
            output_tokens=result.output_tokens,
            steps=[
                execution_pb2.EvidenceStep(
                    step=step.step,
                    position=step.position,
                    rows=step.rows,
                    input_digest=step.input_digest,
                    output_digest=step.output_digest,
                    input_chain=step.input_chain,
                    output_chain=step.output_chain,
                    fingerprint=step.fingerprint,
                )
                for step in evidence.steps
            ],
            neighbour_statements=[
                common_pb2.SignedHandOver(
                    request_id=recorded.request,
                    stage=item.stage,
                    sent=item.sent,
                    step=item.step,
                    chain=item.chain,
                    signature=item.signature,
                )
                for item in self._evidence.statements(recorded.request, recorded.stage)
            ],
            input=execution_pb2.InputOpening(
                prompt_digest=opening.prompt_digest,
                prompt_tokens=opening.prompt_tokens,
                sampling=sampling_to_message(opening.sampling),
                salt=opening.salt,
            ),
        )


def refusal_of(error: BaseException) -> Refusal:
    """What a caller is told about `error`; details of our own failures stay in the log."""
    match error:
        case Refusal():
            return error
        case StorageFullError():
            return Refusal(
                ErrorReason.ERROR_REASON_CAPACITY_EXHAUSTED, "the node has no room for evidence; try another node"
            )
        case ChainError():
            return Refusal(
                ErrorReason.ERROR_REASON_CHAIN_UNAVAILABLE, f"the node cannot read the chain: {error}; try again later"
            )
        case StorageError():
            return Refusal(ErrorReason.ERROR_REASON_EVIDENCE_UNAVAILABLE, "the evidence cannot be read")
        case ValueError() | OverflowError():
            return Refusal(ErrorReason.ERROR_REASON_MALFORMED_MESSAGE, f"a field is out of range: {error}")
        case _:
            return Refusal(ErrorReason.ERROR_REASON_INTERNAL, f"internal error: {type(error).__name__}")


async def _abort(context: Any, error: Exception) -> NoReturn:
    """End the call with a code, a message and google.rpc.ErrorInfo."""
    if isinstance(error, grpc.aio.AbortError):
        raise error
    refusal = refusal_of(error)
    if not isinstance(error, Refusal):
        log.exception("call_failed", reason=refusal.reason_name)
    detail = refusal.detail[:_MAXIMUM_DETAIL]
    info = any_pb2.Any()
    info.Pack(error_details_pb2.ErrorInfo(reason=refusal.reason_name, domain=ERROR_DOMAIN))
    code_number = refusal.code.value[0]
    status = status_pb2.Status(code=code_number, message=detail, details=[info])
    await context.abort(refusal.code, detail, trailing_metadata=((_DETAILS_KEY, status.SerializeToString()),))
    raise AssertionError("abort raises")


__all__ = ["ShardExecutionServicer", "refusal_of"]
