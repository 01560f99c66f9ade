"""The ring of a request: steps come in, are executed, recorded, signed for and handed on.

Owns what happens to each message of a Forward stream. Every session has a task of its own that takes its messages in
order. Promises: a step is executed at most once and answered whenever it is repeated; a frame is taken only from the
node that the chain put before this stage (or, for the prompt, from whoever knows it); output leaves before it is
sketched, signed and written, which happens in order in a second thread; a stage is sealed on disk before its
commitment can be sent; a session that fails tells its requester through the stages before it, frees its cache and
touches no other. Does not decide who may open a session (node_client.session_store).
"""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeVar, assert_never

import grpc.aio
import structlog
from eth_typing import ChecksumAddress

from bsns.chain.errors import ChainError
from bsns.chain.signer import Signer
from bsns.protocol.commitments import extend_chain, step_digest, token_ids
from bsns.protocol.hand_over import Statement
from bsns.protocol.identifiers import BYTES32, ZERO_HASH
from bsns.protocol.replacement import StageReplacement, witness_of
from bsns.protocol.sketch import SketchError
from bsns.protocol.typed_data import HAND_OVER, is_signed_by, signing_digest
from bsns.runtime.activation_codec import TensorEncoding, encoding_for_link, takes_blockwise
from bsns.tracing import Facts, RequestTracer
from bsns.v1 import common_pb2, execution_pb2
from node_client.chain_view import ChainView, SigningDomains, StageView
from node_client.errors import ErrorReason, Refusal, SigningRefusedError, StorageError, StorageFullError
from node_client.evidence_store import EvidenceStore, StageResult
from node_client.metrics import NodeMetrics
from node_client.peers import PeerPool
from node_client.session_store import (
    ExecutedStep,
    ReceivedOutput,
    Session,
    SessionState,
    SessionStore,
    Stall,
    replacements_from_messages,
)
from node_client.settings import MAXIMUM_FRAME_BYTES, NodeSettings
from node_client.shard_runtime import ShardRuntime, StepOutput, encoding_of_input
from node_client.signing_guard import DutyKind, SigningGuard
from node_client.takeover import Extent, HandedOver, StageTakeover, TakenOver, frames_of

if TYPE_CHECKING:
    from bsns.v1.execution_pb2_grpc import ShardExecutionAsyncStub

# Tensors up to this size are hashed on the event loop (about a millisecond); larger ones in the recording thread.
_HASH_INLINE_BYTES: Final = MAXIMUM_FRAME_BYTES
# What is left to do about a step waits so long for the next stage to begin: a small machine has no core for both.
_RECORDING_PAUSE_S: Final = 0.004
# Partly received tensors one stream may leave open.
_MAXIMUM_PARTIAL: Final = 64

# How often a step that the next stage found damaged is sent again before that counts as a failure of the link.
_RESENDS: Final = 3

Answer = TypeVar("Answer")

log = structlog.get_logger(__name__)


class ForwardStream:
    """The answering side of one incoming Forward stream. `caller` is the node that proved itself, if one did."""

    def __init__(self, caller: ChecksumAddress | None, limit: int) -> None:
        self.caller = caller
        # None: nothing follows.
        self.outbox: asyncio.Queue[execution_pb2.ForwardResponse | None] = asyncio.Queue(limit)
        self.closed = asyncio.Event()
        self._reading_ended = False
        # Sessions whose requester this is; the stream stays open for them after the requester finished writing.
        self.attached: set[Session] = set()
        self.partial: dict[tuple[bytes, int], _PartialTensor] = {}

    def send(self, message: execution_pb2.ForwardResponse) -> None:
        """Queue an answer. A reader who does not take its answers loses the stream."""
        if self.closed.is_set():
            return
        try:
            self.outbox.put_nowait(message)
        except asyncio.QueueFull:
            self.closed.set()

    def detach(self, session: Session) -> None:
        """The session has nothing more to say here."""
        self.attached.discard(session)
        self._end_if_idle()

    def end_reading(self) -> None:
        """The other side sends nothing more; what it waits for is still answered."""
        self._reading_ended = True
        self._end_if_idle()

    def _end_if_idle(self) -> None:
        if self._reading_ended and not self.attached and not self.closed.is_set():
            try:
                self.outbox.put_nowait(None)
            except asyncio.QueueFull:
                self.closed.set()

    def reject(self, request_id: bytes, stage: int, step: int, refusal: Refusal) -> None:
        self.send(
            execution_pb2.ForwardResponse(
                rejected=execution_pb2.StepRejected(
                    request_id=request_id, stage=stage, step=step, reason=refusal.reason, detail=refusal.detail
                )
            )
        )


class _LocalStream(ForwardStream):
    """The answers of a stage to another stage of the same node."""

    def __init__(self, caller: ChecksumAddress, deliver: Callable[[execution_pb2.ForwardResponse], None]) -> None:
        super().__init__(caller, 1)
        self._deliver = deliver

    def send(self, message: execution_pb2.ForwardResponse) -> None:
        self._deliver(message)


@dataclass
class _PartialTensor:
    first: execution_pb2.StepFrame
    expected_bytes: int
    next_frame: int = 0
    data: bytearray = field(default_factory=bytearray)


@dataclass(frozen=True, slots=True)
class _Step:
    stream: ForwardStream
    step: int
    position: int
    rows: int
    data: bytes
    digest: bytes


@dataclass(frozen=True, slots=True)
class _StatementReceived:
    stream: ForwardStream | None
    statement: common_pb2.SignedHandOver


@dataclass(frozen=True, slots=True)
class _EndReceived:
    stream: ForwardStream
    end: execution_pb2.EndOfSession


@dataclass(frozen=True, slots=True)
class _Cancel:
    """The requester asked for the end; `done` gets the number of steps."""

    done: asyncio.Future[int]


@dataclass(frozen=True, slots=True)
class _Failed:
    refusal: Refusal
    stage: int | None = None


@dataclass(frozen=True, slots=True)
class _Stalled:
    """Something behind this stage does not go on; a replacement may come."""

    stall: Stall


@dataclass(frozen=True, slots=True)
class _Replaced:
    """The requester puts another node in the place of a stage's; `done` gets this node's signature if it is the
    witness, or a Refusal.
    """

    replacements: tuple[StageReplacement, ...]
    messages: Sequence[execution_pb2.StageReplacement]
    done: asyncio.Future[bytes]


@dataclass(frozen=True, slots=True)
class _HistoryAsked:
    """A node that takes over a stage next to this one asks for its history: `done` gets how far that goes, once all of
    it is on record.
    """

    done: asyncio.Future[Extent]


@dataclass(frozen=True, slots=True)
class _Repeat:
    """Hand the newest output and what followed it on again."""


@dataclass(frozen=True, slots=True)
class _RequesterGone:
    stream: ForwardStream


@dataclass(frozen=True, slots=True)
class _Recorded:
    """What the recording thread did for one step: statements that were signed, if any."""

    step: int
    receipt: common_pb2.SignedHandOver | None
    sent: common_pb2.SignedHandOver | None


class Pipeline:
    """Runs all sessions of the node."""

    def __init__(
        self,
        settings: NodeSettings,
        signer: Signer,
        domains: SigningDomains,
        chain: ChainView,
        sessions: SessionStore,
        runtime: ShardRuntime,
        evidence: EvidenceStore,
        guard: SigningGuard,
        metrics: NodeMetrics,
        tracer: RequestTracer,
        *,
        start: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
        on_sealed: Callable[[], None],
        bandwidth_to: Callable[[ChecksumAddress], float | None],
    ) -> None:
        self._settings, self._signer, self._domains = settings, signer, domains
        self._sessions, self._runtime, self._evidence, self._guard = sessions, runtime, evidence, guard
        self._start, self._on_sealed, self._bandwidth_to = start, on_sealed, bandwidth_to
        self._metrics, self._tracer = metrics, tracer
        self._recorder = ThreadPoolExecutor(max_workers=1, thread_name_prefix="bsns-recording")
        # Steps that it has not finished with.
        self._unrecorded = 0
        self.peers = PeerPool(
            settings,
            signer,
            domains.registry,
            chain,
            on_response=self.receive_response,
            on_reconnect=self._repeat_to,
            on_lost=self._peer_lost,
            start=start,
        )
        self._takeover = StageTakeover(settings, self.peers, runtime)
        self._local = _LocalStream(signer.address, lambda message: self.receive_response(signer.address, message))

    def close(self) -> None:
        self.peers.abort()
        self._recorder.shutdown(wait=True)

    # -- what the servicer calls

    def begin(self, session: Session) -> None:
        """Start the task of a new session."""
        self._start(self._run(session))

    async def cancel(self, session: Session) -> int:
        """End a session of stage 0 after the steps it forwarded, once the last stage has drawn from them; returns their
        number.
        """
        return await self._ask(session, _Cancel)

    async def replace(self, session: Session, messages: Sequence[execution_pb2.StageReplacement]) -> bytes:
        """Go on over the route that `messages` make; returns this node's signature over the last of them if it is their
        witness. Refusal if one does not hold, or if the node that is to be replaced still serves.
        """
        replacements = replacements_from_messages(session.request_id, messages)
        return await self._ask(session, lambda done: _Replaced(replacements, messages, done))

    async def extent(self, session: Session) -> Extent:
        """How far the session is, once everything up to there is on record."""
        return await self._ask(session, _HistoryAsked)

    def repeat(self, session: Session) -> None:
        """Hand the newest output on again, and what followed it: a new node is behind."""
        self._post(session, _Repeat())

    @staticmethod
    async def _ask(session: Session, item: Callable[[asyncio.Future[Answer]], object]) -> Answer:
        """Put something into the session's inbox and wait for what it gives."""
        done: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        try:
            session.inbox.put_nowait(item(done))
        except asyncio.QueueFull:
            raise Refusal(ErrorReason.ERROR_REASON_CAPACITY_EXHAUSTED, "the session is busy; try again") from None
        return await done

    def receive(self, stream: ForwardStream, message: execution_pb2.ForwardRequest) -> None:
        """Take one message of a stream. Whatever is wrong with it is answered on the stream; nothing is raised."""
        match message.WhichOneof("body"):
            case "frame":
                frame = message.frame
                self._guarded(
                    stream, frame.request_id, frame.stage, frame.step, lambda: self._take_frame(stream, frame)
                )
            case "statement":
                statement = message.statement
                self._guarded(
                    stream, statement.request_id, statement.stage, statement.step,
                    lambda: self._take_statement(stream, statement),
                )  # fmt: skip
            case "end":
                end = message.end
                self._guarded(stream, end.request_id, end.stage, end.steps, lambda: self._take_end(stream, end))
            case _:
                refusal = Refusal(
                    ErrorReason.ERROR_REASON_MALFORMED_MESSAGE, "a ForwardRequest holds a frame, a statement or an end"
                )
                stream.reject(b"", 0, 0, refusal)

    def stream_closed(self, stream: ForwardStream) -> None:
        """The other side is gone."""
        stream.closed.set()
        stream.partial.clear()
        for session in tuple(stream.attached):
            self._post(session, _RequesterGone(stream))

    def receive_response(self, node: ChecksumAddress, message: execution_pb2.ForwardResponse) -> None:
        """Take one answer of a successor."""
        match message.WhichOneof("body"):
            case "receipt":
                for session in self._sessions.of_request(message.receipt.request_id):
                    if session.successor_stage == message.receipt.stage and session.successor == node:
                        self._post(session, _StatementReceived(None, message.receipt))
            case "rejected":
                rejected = message.rejected
                stall = Stall(Refusal(rejected.reason, rejected.detail[:512]), rejected.stage)
                for session in self._sessions.of_request(rejected.request_id):
                    # A rejection travels back along the route; stage 0 is where it ends.
                    if session.successor == node and not (session.is_last and rejected.stage > 0):
                        self._post(session, _Stalled(stall))
            case _:
                log.warning("unexpected_answer", peer=node, body=message.WhichOneof("body"))

    # -- intake, on the event loop

    def _guarded(
        self, stream: ForwardStream, request_id: bytes, stage: int, step: int, action: Callable[[], None]
    ) -> None:
        try:
            action()
        except Refusal as refusal:
            stream.partial.pop((request_id, stage), None)
            stream.reject(request_id, stage, step, refusal)

    def _post(self, session: Session, item: object) -> None:
        """Put into a session's inbox what must not be lost for want of room: the session fails then."""
        try:
            session.inbox.put_nowait(item)
        except asyncio.QueueFull:
            self._fail(
                session, Refusal(ErrorReason.ERROR_REASON_CAPACITY_EXHAUSTED, "too many messages wait for the session")
            )

    def _take_frame(self, stream: ForwardStream, frame: execution_pb2.StepFrame) -> None:
        session = self._sessions.require(frame.request_id, frame.stage)
        key = session.key
        self._check_sender(stream, session, frame.step)
        if len(frame.payload) > MAXIMUM_FRAME_BYTES:
            raise Refusal(
                ErrorReason.ERROR_REASON_MESSAGE_TOO_LARGE,
                f"a frame holds at most {MAXIMUM_FRAME_BYTES} bytes; send more frames",
            )
        if frame.frame_index == 0:
            expected = self._checked_size(session, frame)
            stream.partial.pop(key, None)
            if frame.frame_count == 1:
                # A token's row on its way around the ring: nothing to put together.
                self._take_tensor(stream, session, frame, frame.payload, expected)
                return
            if len(stream.partial) >= _MAXIMUM_PARTIAL:
                raise Refusal(ErrorReason.ERROR_REASON_CAPACITY_EXHAUSTED, "too many tensors are open on one stream")
            stream.partial[key] = _PartialTensor(frame, expected)
        partial = stream.partial.get(key)
        if partial is None or partial.next_frame != frame.frame_index or partial.first.step != frame.step:
            raise Refusal(
                ErrorReason.ERROR_REASON_STEP_OUT_OF_ORDER,
                f"frame {frame.frame_index} of step {frame.step} is out of order; send the step again",
            )
        if frame.frame_count != partial.first.frame_count:
            raise Refusal(
                ErrorReason.ERROR_REASON_MALFORMED_MESSAGE, "the frames of a step do not agree on their number"
            )
        if len(partial.data) + len(frame.payload) > partial.expected_bytes:
            raise Refusal(
                ErrorReason.ERROR_REASON_MALFORMED_TENSOR,
                f"more than the {partial.expected_bytes} bytes that {partial.first.rows} rows take",
            )
        partial.data += frame.payload
        partial.next_frame += 1
        if partial.next_frame == partial.first.frame_count:
            del stream.partial[key]
            self._take_tensor(stream, session, partial.first, bytes(partial.data), partial.expected_bytes)

    @staticmethod
    def _take_tensor(
        stream: ForwardStream, session: Session, first: execution_pb2.StepFrame, data: bytes, expected: int
    ) -> None:
        """A step's tensor is whole; `first` is its first frame."""
        if len(data) != expected:
            raise Refusal(
                ErrorReason.ERROR_REASON_MALFORMED_TENSOR,
                f"{len(data)} bytes received, {first.rows} rows take {expected}",
            )
        digest = first.digest
        if len(data) <= _HASH_INLINE_BYTES and step_digest(data, first.position, first.rows) != digest:
            raise Refusal(
                ErrorReason.ERROR_REASON_DIGEST_MISMATCH,
                "the bytes received do not have the digest announced; send the step again",
            )
        try:
            session.inbox.put_nowait(_Step(stream, first.step, first.position, first.rows, data, digest))
        except asyncio.QueueFull:
            raise Refusal(ErrorReason.ERROR_REASON_CAPACITY_EXHAUSTED, "too many steps wait for the session") from None
        if session.stage == 0 and first.step == 0:
            # From here on, so that a requester may end its side of the stream right after the prompt.
            stream.attached.add(session)

    def _check_sender(self, stream: ForwardStream, session: Session, step: int) -> None:
        if session.stage == 0 and step == 0:
            return  # whoever knows the prompt that the commitment hides; its digest is compared
        if stream.caller != session.predecessor:
            raise Refusal(
                ErrorReason.ERROR_REASON_SIGNATURE_INVALID,
                f"this comes from stage {session.predecessor_stage} only: node {session.predecessor}, with its "
                "peer proof",
            )

    @staticmethod
    def _checked_size(session: Session, frame: execution_pb2.StepFrame) -> int:
        """Bytes of the whole tensor, from what the session expects and not from what the frame says."""
        if frame.step > session.opening.sampling.maximum_tokens:
            raise Refusal(ErrorReason.ERROR_REASON_STEP_OUT_OF_ORDER, "the step lies beyond the tokens that were paid")
        encoding = next((item for item in session.encodings_of(frame.step) if int(item) == frame.encoding), None)
        if encoding is None:
            raise Refusal(ErrorReason.ERROR_REASON_MALFORMED_TENSOR, "this stage takes another encoding")
        session.check_extent(frame.step, frame.position, frame.rows)
        if len(frame.digest) != BYTES32:
            raise Refusal(
                ErrorReason.ERROR_REASON_MALFORMED_MESSAGE, "the first frame of a step carries its digest, 32 bytes"
            )
        expected = session.input_bytes_of(frame.step, frame.rows, encoding)
        # An honest sender fills its frames; this leaves room for any other sensible size.
        if not 1 <= frame.frame_count <= max(1, expected // 4096 + 1):
            raise Refusal(
                ErrorReason.ERROR_REASON_MALFORMED_MESSAGE, f"{frame.frame_count} frames for {expected} bytes"
            )
        return expected

    def _take_statement(self, stream: ForwardStream, statement: common_pb2.SignedHandOver) -> None:
        if not statement.sent:
            raise Refusal(ErrorReason.ERROR_REASON_MALFORMED_MESSAGE, "a sender states what it sent")
        for session in self._sessions.of_request(statement.request_id):
            if session.predecessor_stage == statement.stage and session.predecessor == stream.caller:
                self._post(session, _StatementReceived(stream, statement))
                return
        raise Refusal(
            ErrorReason.ERROR_REASON_UNKNOWN_SESSION, "there is no session that this statement could be about"
        )

    def _take_end(self, stream: ForwardStream, end: execution_pb2.EndOfSession) -> None:
        session = self._sessions.require(end.request_id, end.stage)
        if stream.caller != session.predecessor:
            raise Refusal(
                ErrorReason.ERROR_REASON_SIGNATURE_INVALID,
                f"only stage {session.predecessor_stage} can end this session",
            )
        self._post(session, _EndReceived(stream, end))

    # -- one session

    async def _run(self, session: Session) -> None:
        """Take the session's messages in order until it has ended and lingered, failed, or made no progress for too
        long.
        """
        logger = log.bind(request_id=session.request_id.hex(), stage=session.stage)
        logger.info("session_opened", prompt_tokens=session.opening.prompt_tokens)
        detached = False
        try:
            if session.takes_over and session.stage > 0:
                await self._take_over(session, None)
            while session.state is not SessionState.FAILED:
                limit = self._settings.session_idle_seconds
                if session.state is SessionState.SEALED:
                    limit = self._settings.session_linger_seconds
                elif detached:
                    limit = self._settings.requester_reconnect_seconds
                if session.stalled is not None:
                    limit = min(limit, max(0.0, session.stalled_until - time.monotonic()))
                try:
                    async with asyncio.timeout(limit):
                        item = await session.inbox.get()
                except TimeoutError:
                    if session.state is SessionState.SEALED:
                        return
                    if session.stalled is not None and (detached or time.monotonic() >= session.stalled_until):
                        # Nobody has replaced what stopped, or nobody is left who would.
                        self._fail(session, session.stalled.refusal, session.stalled.stage)
                        return
                    if detached:
                        detached = False
                        await self._close(session)
                        continue
                    self._fail(
                        session,
                        Refusal(
                            ErrorReason.ERROR_REASON_PEER_UNAVAILABLE, f"the session made no progress for {limit:.0f} s"
                        ),
                    )
                    return
                await self._handle(session, item)
                away = session.stage == 0 and session.upstream is None and session.next_step > 0
                detached = away and not session.closing
        except asyncio.CancelledError:
            raise
        except Exception as error:  # a session must not take the node down; the log has the trace
            logger.exception("session_broke")
            self._fail(session, Refusal(ErrorReason.ERROR_REASON_INTERNAL, f"the stage failed: {type(error).__name__}"))
        finally:
            await asyncio.shield(self._finish(session))
            logger.info("session_closed", steps=session.next_step, state=session.state.value)

    async def _finish(self, session: Session) -> None:
        await asyncio.gather(*session.recordings, return_exceptions=True)
        if session.state is not SessionState.SEALED:
            try:
                await self._in_recorder(lambda: self._evidence.discard(session.request_id, session.stage))
            except StorageError:
                log.exception("evidence_not_discarded", request_id=session.request_id.hex())
        if session.upstream is not None:
            session.upstream.detach(session)
        self._sessions.remove(session)
        asking: list[asyncio.Future[Any]] = list(session.history_waiters)
        while not session.inbox.empty():
            item = session.inbox.get_nowait()
            if isinstance(item, _Cancel):
                session.close_waiters.append(item.done)
            elif isinstance(item, _Replaced | _HistoryAsked):
                asking.append(item.done)
        ended = Refusal(ErrorReason.ERROR_REASON_UNKNOWN_SESSION, "the session has just ended here")
        for done in asking:
            if not done.done():
                done.set_exception(session.failure or ended)
        self._answer_close(session)

    async def _handle(self, session: Session, item: object) -> None:
        match item:
            case _Step():
                try:
                    await self._handle_step(session, item)
                except Refusal as refusal:
                    # The sender's fault or ours: the step was not executed, and the sender must know.
                    item.stream.reject(session.request_id, session.stage, item.step, refusal)
                    if session.upstream is not item.stream:
                        item.stream.detach(session)
                    if refusal.reason == ErrorReason.ERROR_REASON_INTERNAL:
                        self._fail(session, refusal)
            case _StatementReceived():
                await self._handle_statement(session, item)
            case _EndReceived():
                try:
                    await self._handle_end(session, item)
                except Refusal as refusal:
                    item.stream.reject(session.request_id, session.stage, item.end.steps, refusal)
            case _Cancel():
                await self._handle_cancel(session, item)
            case _RequesterGone():
                if session.upstream is item.stream:
                    item.stream.detach(session)
                    session.upstream = None
            case _Failed():
                self._fail(session, item.refusal, item.stage)
            case _Stalled():
                self._stall(session, item.stall)
            case _Replaced():
                await _answered(item.done, self._replace(session, item))
            case _HistoryAsked() if session.takes_over:
                session.history_waiters.append(item.done)  # stage 0, to which the prompt is still to come
            case _HistoryAsked():
                await _answered(item.done, self._extent(session))
            case _Repeat():
                self._repeat_output(session)
            case _:
                raise AssertionError(f"unknown item {item!r}")

    async def _handle_step(self, session: Session, step: _Step) -> None:
        if len(step.data) > _HASH_INLINE_BYTES:
            actual = await self._in_recorder(lambda: step_digest(step.data, step.position, step.rows))
            if actual != step.digest:
                raise Refusal(
                    ErrorReason.ERROR_REASON_DIGEST_MISMATCH, "the bytes received do not have the digest announced"
                )
        if session.stage == 0 and step.step == 0:
            if step.digest != session.opening.prompt_digest:
                raise Refusal(
                    ErrorReason.ERROR_REASON_INPUT_COMMITMENT_MISMATCH, "this is not the prompt of the request"
                )
            self._attach(session, step.stream)
            if session.takes_over:
                await self._take_over(session, step)
                waiters, session.history_waiters = session.history_waiters, []
                for done in waiters:
                    await _answered(done, self._extent(session))
        if session.stage == 0 and step.step > 0:
            await self._take_output(session, step)
            return
        if step.step < session.next_step:
            self._answer_again(session, step)
            return
        session.check_next(step.step, step.position, step.rows)
        session.stalled = None
        if session.stage > 0:
            session.upstream = step.stream
        await self._execute(session, step)

    def _attach(self, session: Session, stream: ForwardStream) -> None:
        """The requester is on this stream from now on."""
        if session.upstream is stream:
            return
        if session.upstream is not None:
            session.upstream.detach(session)
        session.upstream = stream
        stream.attached.add(session)

    def _answer_again(self, session: Session, step: _Step) -> None:
        """A step that was executed before: the same bytes get the same answer, other bytes get none."""
        session.check_repeat(step.step, step.position, step.rows, step.digest)
        if session.stage > 0:
            session.upstream = step.stream
        receipt = session.receipts.get(step.step)
        if receipt is not None:
            step.stream.send(execution_pb2.ForwardResponse(receipt=receipt))
        if session.stage == 0:
            for number, output in enumerate(session.outputs):
                step.stream.send(_step_output(session, number, output))
            if session.ended_message is not None:
                self._send_ended(session)
            elif session.held is not None:
                held, session.held = session.held, None
                self._post(session, held)
        elif step.step == session.next_step - 1:
            self._repeat_output(session)

    async def _take_output(self, session: Session, step: _Step) -> None:
        """Stage 0: the last stage drew from a step; relay that, and go on with it unless the answer is over."""
        if step.step < session.next_step:
            session.check_repeat(step.step, step.position, step.rows, step.digest)
            return
        if step.step > session.next_step:
            raise Refusal(
                ErrorReason.ERROR_REASON_STEP_OUT_OF_ORDER,
                f"step {session.next_step} comes next, step {step.step} was sent",
            )
        if step.stream is not self._local or session.ring is None:
            session.ring = step.stream
        if len(session.outputs) == step.step:
            if session.outputs[-1].digest != step.digest:
                raise Refusal(
                    ErrorReason.ERROR_REASON_DIGEST_MISMATCH,
                    f"the output of step {step.step - 1} was another one; a step has one output",
                )
        else:
            # Also of a session that is sealed: a ring of one stage ends before its last output has come around.
            self._add_output(session, step)
        session.stalled = None
        if session.state is not SessionState.ACTIVE or session.is_final(session.tokens[-1], len(session.tokens)):
            return
        if session.closing:
            await self._end_here(session, common_pb2.FINISH_REASON_CANCELLED, len(session.tokens))
            return
        if session.upstream is None:
            session.held = dataclasses.replace(step, stream=self._local)
            return
        await self._execute(session, step)

    @staticmethod
    def _add_output(session: Session, step: _Step) -> None:
        """Stage 0: take note of what the last stage drew from the newest step, and relay it."""
        kept = session.check_follows(step.position)
        accepted = kept - 1 if step.step > 1 else 0
        given = token_ids(step.data)
        if max(given) >= session.manifest.vocabulary_size:
            raise Refusal(ErrorReason.ERROR_REASON_MALFORMED_TENSOR, "a token lies outside the vocabulary")
        drafts = session.outputs[-1].token_ids[1:] if session.outputs else ()
        if any(token in session.manifest.end_token_ids for token in drafts[:accepted]):
            raise Refusal(ErrorReason.ERROR_REASON_MALFORMED_TENSOR, "the answer goes on behind its end token")
        output = ReceivedOutput(accepted, given, step.digest)
        session.outputs.append(output)
        session.tokens += (*drafts[:accepted], given[0])
        if session.upstream is not None:
            session.upstream.send(_step_output(session, step.step - 1, output))

    async def _execute(self, session: Session, step: _Step) -> None:
        """Run the next step, hand its output on, and leave the rest to the recording thread."""
        assert session.cache is not None, "an active session has a cache"
        if step.position > session.cache.position:
            raise Refusal(
                ErrorReason.ERROR_REASON_STEP_OUT_OF_ORDER,
                f"the rows from position {session.cache.position} on were given up for another step {step.step}, which "
                "could not be run; the session cannot go on",
            )
        # Rows of sessions that run together cost time each, where those of one alone wait for the same weights.
        most_drafts = self._settings.speculation_tokens // max(1, self._sessions.active)
        written = False

        def write(output: StepOutput) -> None:
            # In the compute thread, so that the output need not wait for the event loop.
            nonlocal written
            session.unacknowledged = self._frames(session, step.step, output)
            written = len(session.unacknowledged) == 1 and self.peers.write_now(
                session.successor, session.unacknowledged[0]
            )

        def count(_output: StepOutput) -> None:
            rejected = session.rejected_before(step.position) if step.step else 0
            session.executed.append(ExecutedStep(step.position, step.rows, step.digest, rejected))
            if not written:
                self._repeat_output(session)

        began = time.perf_counter()
        output = await self._runtime.step(
            session.executor,
            session.cache,
            step.data,
            rows=step.rows,
            position=step.position,
            take=lambda logits: session.take(logits, most_drafts),
            output_encoding=self._output_encoding(session, step.rows),
            write=write,
            deliver=count,
        )
        self._count_step(session, step, output, time.perf_counter() - began)
        await self._await_recordings(session)
        # Submitted before anything else can be: statements about this step are checked after it.
        self._unrecorded += 1
        recording = asyncio.get_running_loop().run_in_executor(
            self._recorder, lambda: self._record(session, step, output)
        )
        session.recordings.append(recording)
        recording.add_done_callback(lambda done: self._recorded(session, done))
        if output.drawn is not None and session.answer is not None:
            newest = output.drawn.tokens[-1]
            if session.is_final(newest, session.answer.count):
                await self._end_here(session, session.reason_of(newest), session.answer.count)

    def _count_step(self, session: Session, step: _Step, output: StepOutput, seconds: float) -> None:
        metrics, stage = self._metrics, str(session.stage)
        metrics.steps.labels(stage).inc()
        metrics.rows.labels(stage).inc(step.rows)
        metrics.step_duration.labels(stage, "token" if step.step else "prompt").observe(seconds)
        metrics.hop_bytes.labels("in").inc(len(step.data))
        metrics.hop_bytes.labels("out").inc(len(output.payload))
        if not step.step:
            facts: Facts = {"bsns.stage": session.stage, "bsns.rows": step.rows}
            self._tracer.span(session.request_id, f"stage {session.stage} prompt", time.time() - seconds, facts)

    def _trace_session(self, session: Session, failed: str | None = None) -> None:
        """The whole of a stage, from the opening of its session."""
        began = time.time() - (time.monotonic() - session.opened_at)
        facts: Facts = {
            "bsns.stage": session.stage, "bsns.node": self._signer.address, "bsns.steps": len(session.executed),
            "bsns.first_unit": session.executor.first_unit, "bsns.end_unit": session.executor.end_unit,
        }  # fmt: skip
        self._tracer.span(session.request_id, f"stage {session.stage}", began, facts, failed=failed)

    @property
    def unrecorded(self) -> int:
        """Steps that were executed and are not on disk yet."""
        return self._unrecorded

    def _output_encoding(self, session: Session, rows: int) -> TensorEncoding:
        """How the rows of the session's next step travel: by setting, else by the measured link to the next stage."""
        width = session.manifest.row_width(session.executor.end_unit)
        match self._settings.activation_encoding:
            case "float32":
                return TensorEncoding.RAW_FLOAT32
            case "float16":
                return TensorEncoding.FLOAT16
            case "int8":
                return TensorEncoding.BLOCKWISE_INT8 if takes_blockwise(width) else TensorEncoding.FLOAT16
            case "link":
                return encoding_for_link(self._bandwidth_to(session.successor), rows, width)
            case other:
                assert_never(other)

    @staticmethod
    def _frames(session: Session, number: int, output: StepOutput) -> list[execution_pb2.ForwardRequest]:
        """One step's output as it goes to the next stage; the last stage's becomes the next step of stage 0."""
        step = number + 1 if session.is_last else number
        item = HandedOver(step, output.position, output.rows, int(output.encoding), output.payload, output.digest)
        return [
            execution_pb2.ForwardRequest(frame=frame)
            for frame in frames_of(session.request_id, session.successor_stage, item)
        ]

    def _send(self, session: Session, message: execution_pb2.ForwardRequest) -> None:
        """To the next stage; a peer that takes nothing fails the session."""
        if session.successor == self._signer.address:
            # Not at once: a session's task must not re-enter another's state, nor its own.
            asyncio.get_running_loop().call_soon(self.receive, self._local, message)
            return
        try:
            self.peers.send(session.successor, message)
        except Refusal as refusal:
            self._fail(session, refusal)

    def _repeat_output(self, session: Session) -> None:
        for message in session.unacknowledged:
            self._send(session, message)

    def _repeat_to(self, node: ChecksumAddress) -> None:
        """A stream to `node` was made again: what the old one may have lost is sent again, and its repeats are
        harmless.
        """
        for session in self._sessions.all():
            if session.successor == node and session.state is not SessionState.FAILED:
                session.stalled = None
                self._repeat_output(session)

    def _peer_lost(self, node: ChecksumAddress, why: str) -> None:
        refusal = Refusal(ErrorReason.ERROR_REASON_PEER_UNAVAILABLE, f"node {node} cannot be reached: {why}")
        for session in self._sessions.all():
            if session.successor == node and session.state is SessionState.ACTIVE and session.next_step:
                self._post(session, _Stalled(Stall(refusal, session.successor_stage)))

    # -- stages that are replaced

    def _stall(self, session: Session, stall: Stall) -> None:
        """The ring does not go on behind this stage. Its requester is told, and may replace what stopped."""
        if session.state is not SessionState.ACTIVE or stall.stage == session.stage:
            return  # what is said of a stage's own number is about its statements: the next one covers them
        damaged = stall.refusal.reason == ErrorReason.ERROR_REASON_DIGEST_MISMATCH
        if damaged and stall.stage == session.successor_stage and session.resent < _RESENDS:
            session.resent += 1
            self._repeat_output(session)
            return
        if session.stalled is None:
            session.stalled, session.stalled_until = stall, time.monotonic() + self._settings.repair_seconds
            log.warning(
                "session_stalled", request_id=session.request_id.hex(), stage=session.stage, behind=stall.stage,
                reason=stall.refusal.reason_name, detail=stall.refusal.detail,
            )  # fmt: skip
        if session.upstream is not None:
            session.upstream.reject(session.request_id, stall.stage, session.next_step, stall.refusal)

    async def _replace(self, session: Session, item: _Replaced) -> bytes:
        """Check what is new on the route, sign for it if it is this node's to see that it is needed, and go by it."""
        replacements, messages = item.replacements, list(item.messages)
        known = session.replacements
        if replacements[: len(known)] != known:
            raise Refusal(
                ErrorReason.ERROR_REASON_SIGNATURE_INVALID,
                f"{len(known)} replacements of this route are known here, and these are others; send all in order",
            )
        signature = b""
        if replacements and not replacements[-1].witness:
            newest = replacements[-1]
            before = self._route_after(session, replacements[:-1])
            if witness_of([view.node for view in before], newest.stage, newest.replaced) == self._signer.address:
                await self._check_gone(session, newest)
                signature = self._signer.sign_digest(newest.digest(self._domains.escrow))
                replacements = (*replacements[:-1], dataclasses.replace(newest, witness=signature))
                messages[-1] = execution_pb2.StageReplacement.FromString(messages[-1].SerializeToString())
                messages[-1].witness = signature
        views = self._route_after(session, replacements)
        for own in self._sessions.of_request(session.request_id):
            self._go_by(own, views, replacements)
            own.replacement_messages = tuple(messages)
        return signature

    def _route_after(self, session: Session, replacements: Sequence[StageReplacement]) -> tuple[StageView, ...]:
        return self._sessions.route_after(session.first_views, replacements, session.requester, session.plan_root)

    async def _check_gone(self, session: Session, replacement: StageReplacement) -> None:
        """Refusal if the node that is to be replaced still has its session. One that damages what it is sent does not
        count.
        """
        if session.stalled is not None and session.resent >= _RESENDS:
            return
        asked = execution_pb2.CheckSessionRequest(request_id=session.request_id, stage=replacement.stage)
        limit = self._settings.witness_probe_seconds

        async def check(stub: ShardExecutionAsyncStub) -> None:
            await stub.CheckSession(asked, timeout=limit)

        try:
            async with asyncio.timeout(limit):
                await self.peers.with_channel(replacement.replaced, check)
        except (grpc.aio.AioRpcError, Refusal, TimeoutError, OSError):
            return
        raise Refusal(
            ErrorReason.ERROR_REASON_NODE_IN_PLACE,
            f"node {replacement.replaced} serves stage {replacement.stage} of this request; wait for it",
        )

    def _go_by(
        self, session: Session, views: tuple[StageView, ...], replacements: tuple[StageReplacement, ...]
    ) -> None:
        changed = [number for number, view in enumerate(views) if view.node != session.route[number].node]
        session.route, session.replacements, session.stalled = views, replacements, None
        for stage in changed:
            # What the former node signed binds it, not the one that answers for the stage now.
            self._evidence.drop_statements(session.request_id, session.stage, stage)
            log.info("stage_replaced", request_id=session.request_id.hex(), stage=stage, node=views[stage].node)
        if session.successor_stage in changed:
            session.resent = 0

    async def _extent(self, session: Session) -> Extent:
        await self._await_recordings(session, 1)
        drawn = session.answer.count if session.answer is not None else 0
        return Extent(len(session.builder.steps), len(session.outputs), session.opening.prompt_tokens + drawn - 1)

    async def _take_over(self, session: Session, prompt: _Step | None) -> None:
        """Catch up with the stage's former node; the session fails if that is impossible."""
        session.takes_over = False
        given = None
        if prompt is not None:
            encoding = session.encodings_of(0)[0]
            given = HandedOver(0, 0, prompt.rows, int(encoding), prompt.data, prompt.digest)
            if session.predecessor_is_new and session.successor_is_new:
                return  # nothing has been executed: the prompt is the first step
        try:
            taken = await self._takeover.run(session, given, self._output_encoding(session, 1))
        except Refusal as refusal:
            self._fail(session, refusal)
            return
        if not taken:
            return
        newest = taken[-1]
        session.unacknowledged = self._frames(session, newest.input.step, newest.output)
        self._unrecorded += 1
        recording = asyncio.get_running_loop().run_in_executor(self._recorder, lambda: self._record_all(session, taken))
        session.recordings.append(recording)
        recording.add_done_callback(lambda done: self._recorded(session, done))
        if not session.successor_is_new:
            # If the stage behind has seen it, this only sets the ring going again.
            self._repeat_output(session)
        log.info("stage_taken_over", request_id=session.request_id.hex(), stage=session.stage, steps=len(taken))
        if session.answer is not None and newest.output.drawn is not None:
            token = newest.output.drawn.tokens[-1]
            if session.is_final(token, session.answer.count):
                await self._end_here(session, session.reason_of(token), session.answer.count)

    # -- the end of a session

    async def _handle_cancel(self, session: Session, item: _Cancel) -> None:
        session.close_waiters.append(item.done)
        await self._close(session)
        if session.state is not SessionState.ACTIVE:
            self._answer_close(session)

    async def _close(self, session: Session) -> None:
        """Stage 0: no further step. How many tokens the newest one gives is the last stage's to say, so the end waits
        for its output; an answer that is complete is ended by the last stage.
        """
        session.closing = True
        if session.stalled is not None:
            # Nothing comes around any more, and whoever could have replaced what stopped wants no more of it.
            self._fail(session, session.stalled.refusal, session.stalled.stage)
            return
        unanswered = len(session.outputs) < session.next_step
        if session.next_step and (unanswered or session.is_final(session.tokens[-1], len(session.tokens))):
            return
        await self._end_here(session, common_pb2.FINISH_REASON_CANCELLED, len(session.tokens))

    @staticmethod
    def _answer_close(session: Session) -> None:
        """Tell whoever closed the session after how many steps it ended."""
        for waiter in session.close_waiters:
            if not waiter.done():
                waiter.set_result(session.next_step)
        session.close_waiters.clear()

    async def _handle_end(self, session: Session, item: _EndReceived) -> None:
        end = item.end
        if session.stage > 0 and session.state is not SessionState.ACTIVE:
            return
        session.check_end(end.steps, end.tokens)
        if session.stage == 0:
            # The statement that came before the end is part of the answer.
            await self._await_recordings(session, 1)
        await self._end_here(session, end.finish_reason, end.tokens)
        if session.stage == 0 and session.state is SessionState.SEALED and session.ended_message is None:
            session.ended_message = execution_pb2.SessionEnded(
                request_id=session.request_id,
                steps=session.next_step,
                tokens=end.tokens,
                finish_reason=session.finish_reason,
                statement=session.final_statement,
            )
            self._send_ended(session)

    async def _end_here(self, session: Session, reason: common_pb2.FinishReason.ValueType, tokens: int) -> None:
        """No step follows, the answer has `tokens` tokens: seal the stage on disk and tell the next stage. Harmless
        when repeated.
        """
        if session.state is not SessionState.ACTIVE:
            return
        if session.next_step == 0:
            # Nothing was executed, so there is nothing to commit to.
            self._fail(
                session,
                Refusal(ErrorReason.ERROR_REASON_UNKNOWN_SESSION, "the session was closed before its first step"),
            )
            return
        session.finish_reason = reason
        end = execution_pb2.ForwardRequest(
            end=execution_pb2.EndOfSession(
                request_id=session.request_id,
                stage=session.successor_stage,
                steps=session.next_step,
                tokens=tokens,
                finish_reason=reason,
            )
        )
        if not session.is_last:
            # Down the ring at once, so that all stages close while this one writes.
            session.unacknowledged.append(end)
            self._send(session, end)
        try:
            recorded = await self._seal(session, tokens)
        except Refusal as refusal:
            self._fail(session, refusal)
            return
        if session.has_failed:
            return
        session.state = SessionState.SEALED
        self._metrics.sessions_ended.labels("sealed").inc()
        self._trace_session(session)
        self._answer_close(session)
        self._sessions.free_cache(session)
        self._deliver(session, recorded)
        if recorded.sent is None and session.sent_statement is not None:
            # It was signed with the newest step, and may not have arrived.
            session.unacknowledged.append(session.sent_statement)
        if session.is_last:
            # After the statement over all tokens, which stage 0 passes on with the end.
            session.unacknowledged.append(end)
            self._send(session, end)
        self._on_sealed()

    def _send_ended(self, session: Session) -> None:
        if session.upstream is not None and session.ended_message is not None:
            session.upstream.send(execution_pb2.ForwardResponse(ended=session.ended_message))
            session.upstream.detach(session)

    def _fail(self, session: Session, refusal: Refusal, stage: int | None = None) -> None:
        """The session cannot go on: say so backwards along the route."""
        if session.state is SessionState.FAILED or session.state is SessionState.SEALED:
            return
        session.state, session.failure = SessionState.FAILED, refusal
        self._metrics.sessions_ended.labels("failed").inc()
        self._trace_session(session, refusal.reason_name)
        log.warning(
            "session_failed", request_id=session.request_id.hex(), stage=session.stage,
            reason=refusal.reason_name, detail=refusal.detail,
        )  # fmt: skip
        if session.upstream is not None:
            session.upstream.reject(
                session.request_id, session.stage if stage is None else stage, session.next_step, refusal
            )
        # Wakes the session's task if it waits; if its inbox is full it will see the state itself.
        if not session.inbox.full():
            session.inbox.put_nowait(_Failed(refusal))

    # -- statements

    async def _handle_statement(self, session: Session, item: _StatementReceived) -> None:
        """Leave it to the recording thread: the next step does not wait for a neighbour's signature, nor for the disk
        behind it.
        """
        if len(item.statement.chain) != BYTES32:
            return
        await self._await_recordings(session)
        checking = asyncio.get_running_loop().run_in_executor(
            self._recorder, lambda: self._check_statement(session, item.statement, item.stream is not None)
        )
        session.recordings.append(checking)
        checking.add_done_callback(lambda done: self._statement_checked(session, item, done))

    def _check_statement(
        self, session: Session, statement: common_pb2.SignedHandOver, from_predecessor: bool
    ) -> Refusal | StorageError | None:
        """In the recording thread: why a statement is not kept."""
        try:
            self._keep_statement(session, statement, from_predecessor)
        except (Refusal, StorageError) as error:
            return error
        return None

    def _statement_checked(
        self, session: Session, item: _StatementReceived, done: asyncio.Future[Refusal | StorageError | None]
    ) -> None:
        if done.cancelled():
            return
        if (broken := done.exception()) is not None:
            self._fail(session, _storage_refusal(broken))
            return
        error = done.result()
        if error is None:
            if item.stream is not None and session.stage == 0:
                session.final_statement = item.statement
            return
        log.warning(
            "statement_refused", request_id=session.request_id.hex(), stage=session.stage,
            step=item.statement.step, detail=str(error),
        )  # fmt: skip
        if isinstance(error, Refusal) and error.reason == ErrorReason.ERROR_REASON_DIGEST_MISMATCH:
            # The neighbour signed for other bytes than we have: going on could only end in a dispute.
            self._fail(session, error)

    def _keep_statement(self, session: Session, statement: common_pb2.SignedHandOver, from_predecessor: bool) -> None:
        """In the recording thread, after the steps before it: check a neighbour's statement against our own bytes and
        keep it.
        """
        stage = session.predecessor_stage if from_predecessor else session.successor_stage
        signer = session.route[stage].node
        digest = signing_digest(
            self._domains.verification,
            HAND_OVER,
            (session.request_id, stage, statement.sent, statement.step, bytes(statement.chain)),
        )
        if statement.sent is not from_predecessor or not is_signed_by(digest, statement.signature, signer):
            raise Refusal(ErrorReason.ERROR_REASON_SIGNATURE_INVALID, f"the statement is not signed by node {signer}")
        expected = self._expected_chain(session, statement.step, from_predecessor)
        if expected is None:
            raise Refusal(
                ErrorReason.ERROR_REASON_STEP_OUT_OF_ORDER, "the statement is about a step that was not executed"
            )
        if expected != statement.chain:
            raise Refusal(
                ErrorReason.ERROR_REASON_DIGEST_MISMATCH, f"node {signer} signed for other bytes than were handed over"
            )
        self._evidence.save_statement(
            session.request_id,
            session.stage,
            Statement(stage, statement.sent, statement.step, bytes(statement.chain), bytes(statement.signature)),
        )

    @staticmethod
    def _expected_chain(session: Session, step: int, from_predecessor: bool) -> bytes | None:
        """The chain a neighbour must have at its `step`, from our bytes; None if we do not have them.

        Between inner stages step t of one is step t of the other. The last stage's output t is stage 0's input t + 1.
        """
        steps = session.builder.steps
        if from_predecessor and session.stage > 0:
            return steps[step].input_chain if step < len(steps) else None
        if not from_predecessor and not session.is_last:
            return steps[step].output_chain if step < len(steps) else None
        if from_predecessor:
            return _chain_at(session.output_chains, [output.digest for output in session.outputs], step)
        returned = [session.opening.prompt_digest, *(item.output_digest for item in steps)]
        return _chain_at(session.returned_chains, returned, step)

    # -- the recording thread

    async def _in_recorder(self, function: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._recorder, function)

    def _record(self, session: Session, step: _Step, output: StepOutput) -> _Recorded:
        """Sketch, evidence and, every few steps, the two statements of one step."""
        if self._unrecorded == 1:
            # Not where steps queue up: those of other sessions are then being computed anyway.
            time.sleep(_RECORDING_PAUSE_S)
        self._keep(session, step, output)
        if step.step % self._settings.statement_interval_steps:
            return _Recorded(step.step, None, None)
        return self._state(session)

    def _record_all(self, session: Session, taken: Sequence[TakenOver]) -> _Recorded:
        """All steps of a stage that was taken over."""
        for item in taken:
            self._keep(session, item.input, item.output)
        return self._state(session)

    def _keep(self, session: Session, step: _Step | HandedOver, output: StepOutput) -> None:
        """Sketch and evidence of one step."""
        fingerprint = session.sketch.add(output.sketched)
        leaf = session.builder.add(step.rows, step.digest, output.digest, fingerprint, position=step.position)
        encoding = encoding_of_input(session.manifest, session.executor.first_unit, step.rows, len(step.data))
        # With what was handed on: the committee compares it with what it computes, a sketch alone would not show it.
        self._evidence.add_step(session.request_id, session.stage, leaf, int(encoding), step.data, output.payload)

    def _state(self, session: Session) -> _Recorded:
        """Sign for everything received and sent up to the newest step."""
        leaf = session.builder.steps[-1]
        if leaf.step == session.last_signed_step:
            return _Recorded(leaf.step, None, None)
        receipt = self._sign_hand_over(session, False, leaf.step, leaf.input_chain)
        sent = self._sign_hand_over(session, True, leaf.step, leaf.output_chain)
        session.last_signed_step = leaf.step
        return _Recorded(leaf.step, receipt, sent)

    def _sign_hand_over(self, session: Session, sent: bool, step: int, chain: bytes) -> common_pb2.SignedHandOver:
        digest = signing_digest(
            self._domains.verification, HAND_OVER, (session.request_id, session.stage, sent, step, chain)
        )
        kind = DutyKind.HAND_OVER_SENT if sent else DutyKind.HAND_OVER_RECEIVED
        self._guard.permit(kind, session.request_id, session.stage, step, digest)
        return common_pb2.SignedHandOver(
            request_id=session.request_id,
            stage=session.stage,
            sent=sent,
            step=step,
            chain=chain,
            signature=self._signer.sign_digest(digest),
        )

    def _recorded(self, session: Session, done: asyncio.Future[_Recorded]) -> None:
        self._unrecorded -= 1
        if done.cancelled():
            return
        error = done.exception()
        if error is None:
            self._deliver(session, done.result())
        else:
            self._fail(session, _storage_refusal(error))

    def _deliver(self, session: Session, recorded: _Recorded) -> None:
        """Send freshly signed statements to the neighbours."""
        if recorded.receipt is not None:
            session.receipts = {recorded.step: recorded.receipt}
            stream = session.upstream if session.stage > 0 or recorded.step == 0 else session.ring
            if stream is not None:
                stream.send(execution_pb2.ForwardResponse(receipt=recorded.receipt))
        if recorded.sent is not None:
            message = session.sent_statement = execution_pb2.ForwardRequest(statement=recorded.sent)
            if session.state is SessionState.SEALED:
                session.unacknowledged.append(message)
            if session.state is not SessionState.FAILED:
                self._send(session, message)

    async def _await_recordings(self, session: Session, limit: int | None = None) -> None:
        """Wait until fewer than `limit` steps are unrecorded, so that a slow disk slows the session and not the
        memory.
        """
        limit = self._settings.recording_limit if limit is None else limit
        while session.recordings and (session.recordings[0].done() or len(session.recordings) >= limit):
            recording = session.recordings[0]
            await asyncio.wait((recording,))
            session.recordings.popleft()

    async def _seal(self, session: Session, tokens: int) -> _Recorded:
        """Everything recorded, the final statements signed, the result on disk."""
        failures = [
            recording.exception()
            for recording in session.recordings
            if recording.done() and not recording.cancelled() and recording.exception() is not None
        ]
        await asyncio.gather(*session.recordings, return_exceptions=True)
        failures += [item.exception() for item in session.recordings if item.exception() is not None]
        session.recordings.clear()
        if failures:
            raise _storage_refusal(failures[0])

        def seal() -> _Recorded:
            recorded = self._state(session)
            result = StageResult(
                evidence_root=session.builder.finish().root,
                sketch=session.sketch.value(),
                salt=secrets.token_bytes(32),
                output_tokens=tokens,
            )
            self._evidence.seal(session.request_id, session.stage, result)
            return recorded

        try:
            return await self._in_recorder(seal)  # type: ignore[no-any-return]
        except (StorageError, SigningRefusedError, SketchError, ChainError) as error:
            raise _storage_refusal(error) from error


async def _answered(done: asyncio.Future[Answer], work: Coroutine[Any, Any, Answer]) -> None:
    """What `work` gives or refuses, to whoever waits for it."""
    try:
        result = await work
    except (Refusal, StorageError) as error:
        if not done.done():
            done.set_exception(error)
        return
    if not done.done():
        done.set_result(result)


def _storage_refusal(error: BaseException | None) -> Refusal:
    """What a requester is told when a step could not be recorded."""
    if isinstance(error, Refusal):
        return error
    if isinstance(error, StorageFullError):
        return Refusal(
            ErrorReason.ERROR_REASON_CAPACITY_EXHAUSTED, "the node has no room for the evidence of this session"
        )
    return Refusal(ErrorReason.ERROR_REASON_INTERNAL, f"the step could not be recorded: {type(error).__name__}")


def _chain_at(known: list[bytes], digests: list[bytes], step: int) -> bytes | None:
    """The cumulative chain over `digests` at `step`; `known` holds the chains computed so far and is extended."""
    if step >= len(digests):
        return None
    while len(known) <= step:
        known.append(extend_chain(known[-1] if known else ZERO_HASH, digests[len(known)]))
    return known[step]


def _step_output(session: Session, number: int, output: ReceivedOutput) -> execution_pb2.ForwardResponse:
    return execution_pb2.ForwardResponse(
        output=execution_pb2.StepOutput(
            request_id=session.request_id, step=number, accepted=output.accepted, token_ids=output.token_ids
        )
    )


__all__ = ["ForwardStream", "Pipeline"]
