"""One paid session over the nodes of its route: open it everywhere, stream the input in and the tokens out, put other
nodes in the place of those that stop, close it, ask for evidence.

Promises that every token it yields came in order, once, and that at the end the last stage has signed for exactly those
tokens and the drafts between them, or it raises. A node that dies, freezes or fails is replaced by another replica of
its stage, which catches up from its neighbours; the reader sees a pause. Says which stage refused and why. Does not
touch the chain and does not decode text.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import grpc
import structlog

from bsns.chain.signer import Signer
from bsns.protocol import typed_data
from bsns.protocol.commitments import (
    MAXIMUM_DRAFTS,
    MAXIMUM_SHOWN_PROMPT,
    EvidenceStep,
    StageEvidence,
    extend_chain,
    input_commitment,
    kept_rows,
    stage_commitment,
    step_digest,
    token_bytes,
)
from bsns.protocol.identifiers import ZERO_HASH, ProtocolError, address
from bsns.protocol.plan import Assignment
from bsns.protocol.replacement import StageReplacement, witness_of
from bsns.protocol.tabs import RouteStage, StageResult
from bsns.requester.errors import UnavailableError
from bsns.requester.journal import JournalEntry, StageEvidenceHeader
from bsns.requester.node_connection import NodeEndpoint, explain_refusal, open_channel
from bsns.requester.standby import NodeBackoff, Standby
from bsns.v1 import common_pb2, execution_pb2, execution_pb2_grpc, tabs_pb2

logger = structlog.get_logger(__name__)

FRAME_PAYLOAD_BYTES: Final = 1024 * 1024 - 4096
"""Payload of one frame; with its header a frame stays under 1 MiB."""
_WIRE_ENCODINGS: Final = {
    "token-ids": common_pb2.TENSOR_ENCODING_TOKEN_IDS,
    "float32": common_pb2.TENSOR_ENCODING_RAW_FLOAT32,
}
MAXIMUM_EVIDENCE_STEPS: Final = 131_072
FINISH_REASONS: Final = {
    common_pb2.FINISH_REASON_STOP: "stop",
    common_pb2.FINISH_REASON_LENGTH: "length",
    common_pb2.FINISH_REASON_CANCELLED: "cancelled",
}


MAXIMUM_STRIKES: Final = 5
"""Times in a row that something is wrong, and every node is there, before the session is given up."""
_UNKNOWN_SESSION: Final = "ERROR_REASON_UNKNOWN_SESSION"
_NOT_YET: Final = "ERROR_REASON_EVIDENCE_UNAVAILABLE"
_RESULT_POLL_S: Final = 0.02
_OUT_OF_REACH: Final = frozenset(
    {"UNAVAILABLE", "DEADLINE_EXCEEDED", "CANCELLED", "UNKNOWN", "ERROR_REASON_PEER_UNAVAILABLE"}
)
_REPLACEABLE: Final = _OUT_OF_REACH | {
    "ERROR_REASON_CAPACITY_EXHAUSTED",
    "ERROR_REASON_CHAIN_UNAVAILABLE",
    "ERROR_REASON_DIGEST_MISMATCH",
    "ERROR_REASON_DRAINING",
    "ERROR_REASON_INTERNAL",
    "ERROR_REASON_MALFORMED_TENSOR",
    "ERROR_REASON_NODE_NOT_ACTIVE",
    "ERROR_REASON_STEP_OUT_OF_ORDER",
    "ERROR_REASON_UNKNOWN_SESSION",
    "ERROR_REASON_WEIGHTS_UNAVAILABLE",
}
"""Why a stage is given to another node: what another need not do as well."""
# Where a SessionError comes from a witness that finds the node in its place.
_IN_PLACE: Final = -1


class _StagesLostError(Exception):
    """Nodes of these stages have to be replaced, and why."""

    def __init__(self, stages: Mapping[int, SessionError]) -> None:
        self.stages = stages
        super().__init__(", ".join(map(str, stages)))


class SessionError(Exception):
    """A node refused, disappeared or did not keep to the protocol. `stage` says where, `reason` is the node's, if it
    gave one; `invalid`: what came back must not be used.
    """

    def __init__(self, message: str, stage: int, *, reason: str = "", invalid: bool = False) -> None:
        self.stage = stage
        self.reason = reason
        self.invalid = invalid
        super().__init__(message)


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """Seconds a session waits for each thing a node does."""

    connect_s: float
    open_session_s: float
    first_token_s: float
    next_token_s: float
    close_s: float
    evidence_s: float
    silence_s: float = 0.4
    """So long no token, and the nodes are asked whether they are there; then after twice as long each time."""
    probe_s: float = 0.35
    """A node that does not answer within this time is taken for dead."""


@dataclass(frozen=True, slots=True)
class SessionDomains:
    """EIP-712 domains of the deployment."""

    escrow: typed_data.Domain
    verification: typed_data.Domain


class ExecutionSession:
    """A session of `entry` over `route` (one endpoint per stage). Use as `async with`; `deadline` ends its
    token, `query_deadline` its evidence queries (Unix seconds). `standby` says who else could serve a stage; without it
    nobody is replaced. With `share_prompt` the last stage is shown a prompt of
    token ids too, unless it is longer than `MAXIMUM_SHOWN_PROMPT`: it drafts from it.
    """

    def __init__(
        self,
        entry: JournalEntry,
        route: Sequence[NodeEndpoint],
        signer: Signer,
        domains: SessionDomains,
        limits: SessionLimits,
        deadline: int,
        query_deadline: int,
        share_prompt: bool = True,
        *,
        standby: Callable[[], Awaitable[Standby]] | None = None,
        backoff: NodeBackoff | None = None,
        on_progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        self._entry = entry
        self._route = list(route)
        self._standby, self._backoff, self._on_progress = standby, backoff or NodeBackoff(), on_progress
        self._replacements: list[StageReplacement] = []
        # Nodes that have failed in this session: not asked again.
        self._failed: set[str] = set()
        # Times in a row that something was wrong and no stage was found to be lost.
        self._strikes = 0
        # The chain of digests before the newest output; whether stage 0 and the last stage were replaced together.
        self._chain_before, self._ends_are_new = ZERO_HASH, False
        self._slowest_probe_s = 0.0
        self._call: Any = None
        self._reading: asyncio.Future[Any] | None = None
        self._signer = signer
        self._domains = domains
        self._limits = limits
        self._deadline = deadline
        self._query_deadline = query_deadline
        self._share_prompt = share_prompt
        # Of a request that is paid out of a tab: what its nodes are shown, and who serves a stage by the plan.
        self._grant: tabs_pb2.TicketGrant | None = None
        self._served_by: list[RouteStage] = []
        if entry.tab is not None:
            self._grant = tabs_pb2.TicketGrant.FromString(entry.tab.grant)
            self._served_by = [RouteStage.from_message(tabs_pb2.RouteStage.FromString(it)) for it in entry.tab.route]
        self._channels: list[grpc.aio.Channel] = []
        # Of the stages' nodes; None where a node could not be reached.
        self._stubs: list[execution_pb2_grpc.ShardExecutionAsyncStub | None] = []
        self._received: list[int] = []
        self._drafts: list[tuple[int, ...]] = []
        self._outputs: list[execution_pb2.StepOutput] = []
        self._chain = ZERO_HASH
        self._finish_reason = ""
        self._closing = False
        # Tokens that were yielded before the answer had to begin again.
        self._again: tuple[int, ...] = ()

    @property
    def tokens(self) -> tuple[int, ...]:
        """All tokens received so far."""
        return tuple(self._received)

    @property
    def drafts(self) -> tuple[tuple[int, ...], ...]:
        """For each step the tokens that the last stage drafted to follow those it gave."""
        return tuple(self._drafts)

    @property
    def finish_reason(self) -> str:
        """ "stop", "length", "cancelled"; empty until the session ended."""
        return self._finish_reason

    @property
    def route(self) -> tuple[NodeEndpoint, ...]:
        """Who serves the stages now."""
        return tuple(self._route)

    async def __aenter__(self) -> ExecutionSession:
        try:
            for stage, where in enumerate(self._route):
                try:
                    self._stubs.append(await self._connect(where))
                except UnavailableError as error:
                    if self._standby is None:
                        raise SessionError(str(error), stage) from error
                    self._stubs.append(None)
        except BaseException:
            await self._disconnect()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._disconnect()

    async def _connect(self, where: NodeEndpoint) -> execution_pb2_grpc.ShardExecutionAsyncStub:
        channel = await open_channel(where, self._limits.connect_s)
        self._channels.append(channel)
        return execution_pb2_grpc.ShardExecutionStub(channel)

    async def _disconnect(self) -> None:
        await asyncio.gather(*(channel.close() for channel in self._channels))
        self._channels, self._stubs = [], []

    async def open(self) -> None:
        """Open the session at all stages at once, and replace the nodes that cannot serve theirs. SessionError of the
        first stage that nobody serves.
        """
        while True:
            known = len(self._replacements)
            outcomes = await asyncio.gather(*(self._open_at(stage) for stage in range(len(self._route))))
            refused = {stage: error for stage, error in enumerate(outcomes) if error is not None}
            if len(self._replacements) == known:
                break
            # A node told of replacements that an earlier process made: not all may know of them.
            told = (stage for stage, stub in enumerate(self._stubs) if stub is not None)
            await asyncio.gather(*(self._tell(stage, None) for stage in told), return_exceptions=True)
        lost = {}
        for stage, (reason, error) in refused.items():
            if reason not in _REPLACEABLE:
                raise error
            lost[stage] = error
        if lost:
            await self._replace(lost)

    async def stream(self) -> AsyncIterator[int]:
        """Send the input to stage 0 and yield the answer's tokens until the session ends and the last stage's
        signature is checked. Nodes that stop on the way are replaced; SessionError where nobody can take over.
        """
        try:
            await self._send_input()
            while True:
                try:
                    response = await self._receive()
                    if response is None:
                        return
                    match response.WhichOneof("body"):
                        case "output":
                            for token in self._take_output(response.output):
                                self._strikes = 0
                                yield token
                        case "ended":
                            self._check_end(response.ended)
                            return
                        case "rejected":
                            await self._look_into(response.rejected)
                        case "receipt":
                            self._check_receipt(response.receipt)
                        case _:
                            raise SessionError("stage 0 sent an empty message", 0)
                except _StagesLostError as lost:
                    await self._replace(lost.stages)
        finally:
            self._hang_up()

    async def close(self) -> None:
        """Ask stage 0 to end the session (a stop string was hit). The end arrives on the stream, whatever stage 0
        says here.
        """
        self._closing = True
        request = execution_pb2.CloseSessionRequest(request_id=self._entry.request_id, token=self._session_token())
        try:
            await self._stub(0).CloseSession(request, timeout=self._limits.close_s)
        except grpc.aio.AioRpcError as error:
            # It may have ended by itself in between; at worst, more tokens are drawn than were needed.
            logger.info("close refused", request_id=self._entry.request_id.hex(), detail=str(self._refused(0, error)))

    @property
    def served_by(self) -> tuple[RouteStage, ...]:
        """Of a request that is paid out of a tab: by whom each stage is served, as the plan has it."""
        found = list(self._served_by)
        for item in self._replacements:
            found[item.stage] = RouteStage(item.assignment, item.proof)
        return tuple(found)

    async def results(self, domain: typed_data.Domain) -> tuple[StageResult, ...]:
        """What the nodes of all stages sign for, once they have done their part; SessionError of the first that does
        not. `domain` is that of RequestTabs.
        """
        return tuple(await asyncio.gather(*(self._result(stage, domain) for stage in range(len(self._route)))))

    async def _result(self, stage: int, domain: typed_data.Domain) -> StageResult:
        request = execution_pb2.GetStageResultRequest(
            request_id=self._entry.request_id, stage=stage, token=self._session_token()
        )
        until = time.monotonic() + self._limits.close_s
        found: execution_pb2.GetStageResultResponse | None = None
        while found is None:
            try:
                found = await self._stub(stage).GetStageResult(request, timeout=self._limits.close_s)
            except grpc.aio.AioRpcError as error:
                if explain_refusal(error)[0] != _NOT_YET or time.monotonic() > until:
                    raise self._refused(stage, error) from error
                await asyncio.sleep(_RESULT_POLL_S)
        result = StageResult(
            self.served_by[stage], bytes(found.commitment), found.output_tokens, bytes(found.signature)
        )
        if found.output_tokens != len(self._received) or not result.is_signed(domain, self._entry.request_id):
            raise SessionError("the node signs for another answer than the one that came", stage, invalid=True)
        return result

    async def mend(self, stages: Iterable[int]) -> bool:
        """Replace those of `stages` whose nodes are out of reach, after the answer has come and before they have
        committed to it; whether there were any. SessionError where nobody can take over.
        """
        found = await self._find_lost()
        lost = {stage: error for stage, (reason, error) in found.items() if stage in stages and reason in _OUT_OF_REACH}
        if lost:
            await self._replace(lost)
        if 0 in lost:
            # Which takes over from the prompt on, and is sent it by nobody else.
            async for _ in self.stream():
                pass
        return bool(lost)

    # -- the stream of stage 0

    async def _send_input(self) -> None:
        self._hang_up()
        self._call = self._stub(0).Forward()
        try:
            for frame in self._input_frames():
                await self._call.write(execution_pb2.ForwardRequest(frame=frame))
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            pass  # reading meets the same end, and says why

    def _hang_up(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None
        if self._call is not None:
            self._call.cancel()
            self._call = None

    async def _receive(self) -> execution_pb2.ForwardResponse | None:
        """The next message of stage 0; None if nothing comes any more (`finish_reason` says why). While it is silent
        the nodes are looked after.
        """
        waited, silence = 0.0, self._limits.silence_s
        while True:
            if self._reading is None:
                self._reading = asyncio.ensure_future(self._call.read())
            patience = self._patience_s
            pause = min(silence, patience - waited)
            await asyncio.wait((self._reading,), timeout=pause)
            if self._reading.done():
                reading, self._reading = self._reading, None
                try:
                    response = reading.result()
                except grpc.aio.AioRpcError as error:
                    broken = self._refused(0, error)
                else:
                    if isinstance(response, execution_pb2.ForwardResponse):
                        return response
                    broken = SessionError("the stream ended without an end of session", 0)
                if await self._goes_on_after(broken):
                    continue
                return None
            waited += pause
            # A node that is far away, or busy, gets longer each time.
            if self._standby is not None and (lost := await self._find_lost(silence)):
                raise _StagesLostError({stage: error for stage, (_, error) in lost.items()})
            silence *= 2
            if waited < patience:
                continue
            if self._closing:
                self._finish_reason = "cancelled"
                return None
            raise SessionError(f"no token within {patience:.0f} s after {len(self._received)} tokens", 0)

    @property
    def _patience_s(self) -> float:
        if self._closing:
            return self._limits.close_s
        return self._limits.next_token_s if self._received else self._limits.first_token_s

    async def _goes_on_after(self, error: SessionError) -> bool:
        """Stage 0 hung up. Make the stream again if its session is still there; whether that may help. What came so
        far stays: the nodes close what they did, and the chain charges that.
        """
        if self._standby is not None:
            lost = await self._find_lost()
            if lost:
                raise _StagesLostError({stage: why for stage, (_, why) in lost.items()})
            self._strikes += 1
            if self._strikes <= MAXIMUM_STRIKES:
                await self._send_input()
                return True
        if not self._received:
            raise error
        self._finish_reason = "interrupted"
        return False

    async def _look_into(self, rejected: execution_pb2.StepRejected) -> None:
        """A stage says that something is wrong, with it or behind it."""
        reason = common_pb2.ErrorReason.Name(rejected.reason)
        error = SessionError(f"{reason.removeprefix('ERROR_REASON_')}: {rejected.detail}", rejected.stage)
        if self._standby is None or rejected.stage >= len(self._route):
            raise error
        lost = {stage: why for stage, (_, why) in (await self._find_lost()).items()}
        if not lost and reason in _OUT_OF_REACH | {_UNKNOWN_SESSION}:
            # It is there by now: its neighbour will reach it again. Not for ever, though.
            self._strike(error)
            return
        if not lost and reason not in _REPLACEABLE:
            raise error
        raise _StagesLostError(lost or {rejected.stage: error})

    def _strike(self, error: SessionError) -> None:
        self._strikes += 1
        if self._strikes > MAXIMUM_STRIKES:
            raise error

    # -- nodes that are replaced

    async def _find_lost(self, patience_s: float = 0.0) -> dict[int, tuple[str, SessionError]]:
        """The stages whose nodes do not answer within `patience_s` (more, if that is usual here), or have no session
        any more; with the reason's name. A node that is only slow is waited for where nobody could take its place.
        """
        limit = max(patience_s, self._limits.probe_s, 4 * self._slowest_probe_s)

        async def probe(stage: int) -> tuple[str, SessionError] | None:
            stub = self._stubs[stage]
            if stub is None:
                return "UNAVAILABLE", SessionError(f"node {self._route[stage].node} cannot be reached", stage)
            request = execution_pb2.CheckSessionRequest(request_id=self._entry.request_id, stage=stage)
            began = time.monotonic()
            try:
                await stub.CheckSession(request, timeout=limit)
            except grpc.aio.AioRpcError as error:
                return explain_refusal(error)[0], self._refused(stage, error)
            self._slowest_probe_s = max(self._slowest_probe_s, time.monotonic() - began)
            return None

        found = await asyncio.gather(*(probe(stage) for stage in range(len(self._route))))
        lost = {stage: item for stage, item in enumerate(found) if item is not None}
        if self._standby is None or all(reason != "DEADLINE_EXCEEDED" for reason, _ in lost.values()):
            return lost
        standby = await self._standby()

        def has_others(stage: int) -> bool:
            return bool(
                standby.candidates(stage, self._route[stage].node, self._failed, self._backoff, any_class=False)
            )

        return {stage: item for stage, item in lost.items() if item[0] != "DEADLINE_EXCEEDED" or has_others(stage)}

    async def _replace(self, lost: Mapping[int, SessionError]) -> None:
        """Put other nodes in the place of those of the stages `lost`, and go on with them."""
        while True:
            try:
                await self._replace_all(lost)
                return
            except _StagesLostError as more:
                # Others have stopped meanwhile.
                self._strike(next(iter(more.stages.values())))
                lost = more.stages

    async def _replace_all(self, lost: Mapping[int, SessionError]) -> None:
        if self._standby is None:
            raise lost[min(lost)]
        standby = await self._standby()
        stages = len(self._route)
        is_restart = len(lost) == stages
        pending = dict(lost)
        self._ends_are_new |= {0, stages - 1} <= lost.keys()
        while pending:
            # After the stage before it, from which it takes over.
            stage = next((it for it in pending if (it - 1) % stages not in pending), min(pending))
            await self._replace_stage(stage, pending, standby, is_restart)
            del pending[stage]
            if stage == 0 and 1 in pending and not is_restart:
                # The new stage 1 takes over from it, and it from the prompt.
                await self._send_input()
        if is_restart:
            # Nobody has kept what was there: the same tokens are drawn again.
            self._begin_again()
        if 0 in lost and self._call is not None:
            await self._send_input()
            if self._closing:
                await self.close()

    async def _replace_stage(
        self, stage: int, pending: Mapping[int, SessionError], standby: Standby, is_restart: bool
    ) -> None:
        """Try the stage's other replicas one after the other; first the new one that is there, if it only was not asked
        yet, or could not catch up for want of its neighbours.
        """
        error = pending[stage]
        is_new = any(
            (item.assignment.stage, item.assignment.node) == (stage, self._route[stage].node)
            for item in self._replacements
        )
        if is_new and error.reason == _UNKNOWN_SESSION and not is_restart:
            self._strike(error)
            behind_is_new = (stage + 1) % len(self._route) in pending
            if await self._open_at(stage, behind_is_new=behind_is_new) is None:
                self._on_progress(f"stage {stage}: node {self._route[stage].node} takes over again ({error})")
                return
        while True:
            old = self._route[stage].node
            self._failed.add(old)
            self._backoff.failed(old)
            any_class = is_restart and not self._received
            candidates = standby.candidates(stage, old, self._failed, self._backoff, any_class=any_class)
            if not candidates:
                raise SessionError(
                    f"{error}; no other replica of the plan can take the stage over", stage, invalid=error.invalid
                )
            try:
                await self._hand_to(candidates[0], standby, pending, is_restart)
            except SessionError as failure:
                logger.info("replacement failed", stage=stage, node=candidates[0].node, detail=str(failure))
                self._failed.add(candidates[0].node)
                self._backoff.failed(candidates[0].node)
                if failure.stage == _IN_PLACE:
                    # The witness reaches the node that we do not: not gone, only away from here.
                    self._strike(error)
                    return
                error = failure
                continue
            self._on_progress(
                f"stage {stage}: node {old} stopped ({pending[stage]}); node {self._route[stage].node} goes on"
            )
            return

    async def _hand_to(
        self, assignment: Assignment, standby: Standby, pending: Mapping[int, SessionError], is_restart: bool
    ) -> None:
        """Make `assignment`'s node the one of its stage: agreed with the witness, told to the other stages, opened."""
        stage, stages = assignment.stage, len(self._route)
        where = standby.endpoints[assignment.node]
        try:
            stub = await self._connect(where)
        except UnavailableError as error:
            raise SessionError(str(error), stage) from error
        try:
            await stub.CheckSession(
                execution_pb2.CheckSessionRequest(request_id=self._entry.request_id, stage=stage),
                timeout=self._limits.connect_s,
            )
        except grpc.aio.AioRpcError as error:
            if explain_refusal(error)[0] in _OUT_OF_REACH:
                raise self._refused(stage, error) from error
        replacement = StageReplacement(
            self._entry.request_id, address(self._route[stage].node), assignment, standby.plan.proof(assignment)
        )
        digest = replacement.digest(self._domains.escrow)
        replacement = dataclasses.replace(replacement, consent=self._signer.sign_digest(digest))
        nodes = [address(item.node) for item in self._route]
        witness = witness_of(nodes, stage, replacement.replaced)
        told: set[int] = set()
        if witness is not None:
            by = next(at for back in range(1, stages) if nodes[at := (stage - back) % stages] == witness)
            signature = await self._tell(by, replacement)
            replacement = dataclasses.replace(replacement, witness=signature)
            told.add(by)
        self._replacements.append(replacement)
        self._route[stage], self._stubs[stage] = where, stub
        others = [at for at in range(stages) if at != stage and at not in pending and at not in told]
        outcomes = await asyncio.gather(*(self._tell(at, None) for at in others), return_exceptions=True)
        gone = {at: error for at, error in zip(others, outcomes) if isinstance(error, SessionError)}
        if gone:
            # The new node is not at fault: it has not been asked yet.
            unopened = SessionError(str(pending[stage]), stage, reason=_UNKNOWN_SESSION)
            raise _StagesLostError({**pending, stage: unopened, **gone})
        is_alone = is_restart or stages == 1
        refused = await self._open_at(
            stage, before_is_new=is_alone, behind_is_new=is_alone or (stage + 1) % stages in pending
        )
        if refused is not None:
            raise refused[1]

    async def _tell(self, stage: int, newest: StageReplacement | None) -> bytes:
        """Tell a stage of the replacements so far and of the `newest`, which its node is to witness."""
        replacements = [*self._replacements, *((newest,) if newest else ())]
        request = execution_pb2.ReplaceStageRequest(
            request_id=self._entry.request_id, replacements=[replacement_message(item) for item in replacements]
        )
        try:
            response = await self._stub(stage).ReplaceStage(request, timeout=self._limits.connect_s)
        except grpc.aio.AioRpcError as error:
            refused = self._refused(stage, error)
            if explain_refusal(error)[0] == "ERROR_REASON_NODE_IN_PLACE":
                refused.stage = _IN_PLACE
            raise refused from error
        return bytes(response.witness)

    async def _open_at(
        self, stage: int, *, before_is_new: bool = False, behind_is_new: bool = False
    ) -> tuple[str, SessionError] | None:
        """Open the session at one stage; why it was refused, with the reason's name."""
        given, last = self._entry.input, len(self._route) - 1
        is_shown = stage == last and self._share_prompt and bool(given.tokens) and given.rows <= MAXIMUM_SHOWN_PROMPT
        request = execution_pb2.OpenSessionRequest(
            request_id=self._entry.request_id, stage=stage, token=self._session_token(), input=self._input_opening(),
            prompt=given.data if is_shown else b"",
            replacements=[replacement_message(item) for item in self._replacements],
            predecessor_is_new=before_is_new, successor_is_new=behind_is_new, grant=self._grant,
        )  # fmt: skip
        stub = self._stubs[stage]
        if stub is None:
            return "UNAVAILABLE", SessionError(f"node {self._route[stage].node} cannot be reached", stage)
        # A node that is away is not waited for if another can take its place.
        patient = self._standby is None
        try:
            response = await stub.OpenSession(request, timeout=self._limits.open_session_s, wait_for_ready=patient)
        except grpc.aio.AioRpcError as error:
            return explain_refusal(error)[0], self._refused(stage, error)
        if len(response.replacements) > len(self._replacements) and self._standby is not None:
            await self._adopt(response.replacements)
        return None

    async def _adopt(self, messages: Sequence[execution_pb2.StageReplacement]) -> None:
        """Go by replacements that were made before this process knew of the session; they are the requester's own."""
        assert self._standby is not None
        standby = await self._standby()
        plan = {(item.stage, item.node): item for item in standby.plan.assignments}
        found = []
        for message in messages:
            node = address(bytes(message.assignment.node))
            assignment = plan.get((message.assignment.stage, node))
            if assignment is None:
                return
            item = StageReplacement(
                self._entry.request_id, address(bytes(message.replaced)), assignment, standby.plan.proof(assignment),
                bytes(message.consent), bytes(message.witness),
            )  # fmt: skip
            digest = item.digest(self._domains.escrow)
            if not typed_data.is_signed_by(digest, item.consent, self._signer.address) or node not in standby.endpoints:
                return
            found.append(item)
        self._replacements = found
        for item in found:
            self._route[item.stage] = standby.endpoints[item.assignment.node]
            try:
                self._stubs[item.stage] = await self._connect(self._route[item.stage])
            except UnavailableError:
                self._stubs[item.stage] = None

    def _begin_again(self) -> None:
        """The steps come again from the first; what has been yielded is not yielded again, but compared."""
        self._again = tuple(self._received)
        self._received, self._drafts, self._outputs, self._chain = [], [], [], ZERO_HASH

    def _stub(self, stage: int) -> execution_pb2_grpc.ShardExecutionAsyncStub:
        stub = self._stubs[stage]
        if stub is None:
            raise SessionError(f"node {self._route[stage].node} cannot be reached", stage)
        return stub

    async def evidence(self, stage: int, commitment: bytes) -> StageEvidenceHeader:
        """The digests behind the commitment of `stage`, checked against it. SessionError if the node has none or they
        do not open it.
        """
        query = (self._entry.request_id, stage, self._query_deadline)
        digest = typed_data.signing_digest(self._domains.verification, typed_data.EVIDENCE_QUERY, query)
        request = execution_pb2.GetStageEvidenceRequest(
            request_id=self._entry.request_id,
            stage=stage,
            deadline=self._query_deadline,
            signature=self._signer.sign_digest(digest),
            with_inputs=False,
        )
        steps: list[EvidenceStep] = []
        header: execution_pb2.StageEvidence | None = None
        try:
            async for response in self._stub(stage).GetStageEvidence(request, timeout=self._limits.evidence_s):
                if response.WhichOneof("body") != "evidence":
                    continue
                header = header or response.evidence
                steps += [_evidence_step(item) for item in response.evidence.steps]
                if len(steps) > MAXIMUM_EVIDENCE_STEPS:
                    raise SessionError(
                        f"sent more than {MAXIMUM_EVIDENCE_STEPS} steps of evidence", stage, invalid=True
                    )
        except grpc.aio.AioRpcError as error:
            raise self._refused(stage, error) from error
        if header is None:
            raise SessionError("sent no evidence", stage)
        given = self._entry.input.rows, header.output_tokens, self._entry.sampling.maximum_tokens
        try:
            shown = StageEvidence(tuple(steps))
            kept_rows(shown, *given)
            root = shown.root
        except ProtocolError as error:
            raise SessionError(f"its evidence is not consistent: {error}", stage, invalid=True) from error
        opened = stage_commitment(
            self._entry.request_id, 0, stage, self._route[stage].node, root, header.sealed_sketch, header.output_tokens
        )
        if root != header.evidence_root or opened != commitment:
            raise SessionError("its evidence does not open its commitment on chain", stage, invalid=True)
        return StageEvidenceHeader(stage, root, bytes(header.sealed_sketch), header.output_tokens, tuple(steps))

    def _take_output(self, output: execution_pb2.StepOutput) -> tuple[int, ...]:
        """The tokens by which the answer grows; none for a repeated step, which is allowed if it says the same."""
        if output.step < len(self._outputs):
            known = self._outputs[output.step]
            if known != output:
                if not self._is_drafted_anew(output, known):
                    raise SessionError(f"two different outputs of step {output.step}", 0, invalid=True)
                self._keep_newest(output)
            return ()
        if output.step != len(self._outputs):
            raise SessionError(f"step {output.step} came where {len(self._outputs)} was due", 0, invalid=True)
        before = self._drafts[-1] if self._drafts else ()
        given = tuple(output.token_ids)
        if not 1 <= len(given) <= 1 + MAXIMUM_DRAFTS or output.accepted > len(before):
            raise SessionError(
                f"step {output.step} gave {len(given)} token ids and accepts {output.accepted} of {len(before)} drafts",
                0,
                invalid=True,
            )
        tokens = (*before[: output.accepted], given[0])
        if len(self._received) + len(tokens) > self._entry.sampling.maximum_tokens:
            raise SessionError(f"more than the {self._entry.sampling.maximum_tokens} tokens paid for", 0, invalid=True)
        before_these = len(self._received)
        self._received += tokens
        self._drafts.append(())
        self._outputs.append(output)
        self._chain_before = self._chain
        self._keep_newest(output)
        expected = self._again[before_these : before_these + len(tokens)]
        if tokens[: len(expected)] != expected:
            raise SessionError("the answer was begun again and is another one", 0, invalid=True)
        return tokens[len(expected) :]

    def _keep_newest(self, output: execution_pb2.StepOutput) -> None:
        """`output` is the newest step's: what the last stage handed to stage 0, which it signs for."""
        given = tuple(output.token_ids)
        self._outputs[-1], self._drafts[-1] = output, given[1:]
        # Rows behind what the answer keeps.
        position = self._entry.input.rows + len(self._received) - 1
        self._chain = extend_chain(self._chain_before, step_digest(token_bytes(given), position, len(given)))

    def _is_drafted_anew(self, output: execution_pb2.StepOutput, known: execution_pb2.StepOutput) -> bool:
        """Whether it is the newest step's, with the same tokens and other drafts, after both nodes that had these were
        replaced.
        """
        given = tuple(output.token_ids)
        return (
            self._ends_are_new
            and output.step == len(self._outputs) - 1
            and 1 <= len(given) <= 1 + MAXIMUM_DRAFTS
            and (output.accepted, given[0]) == (known.accepted, known.token_ids[0])
        )

    def _check_end(self, ended: execution_pb2.SessionEnded) -> None:
        reason = FINISH_REASONS.get(ended.finish_reason)
        if reason is None:
            raise SessionError("the session ended without a reason", 0)
        statement, last = ended.statement, len(self._route) - 1
        signed = statement.step + 1 if statement.signature else 0
        if not self._received and not signed and reason == "cancelled":
            self._finish_reason = reason
            return
        values = (bytes(statement.request_id), statement.stage, statement.sent, statement.step, bytes(statement.chain))
        if values[:3] != (self._entry.request_id, last, True):
            raise SessionError("the last stage's statement is about something else", last, invalid=True)
        digest = typed_data.signing_digest(self._domains.verification, typed_data.HAND_OVER, values)
        if not typed_data.is_signed_by(digest, statement.signature, self._route[last].node):
            raise SessionError(
                "the statement over the tokens is not signed by the last stage's node", last, invalid=True
            )
        arrived = len(self._outputs), len(self._received)
        if (signed, ended.tokens) != arrived or signed != ended.steps:
            raise SessionError(
                f"the last stage signed for {signed} steps and the session ended with {ended.tokens} tokens of "
                f"{ended.steps}; {arrived[1]} tokens of {arrived[0]} steps arrived",
                last,
                invalid=True,
            )
        if statement.chain != self._chain:
            raise SessionError("the tokens that arrived are not those that the last stage signed", 0, invalid=True)
        self._finish_reason = reason

    def _check_receipt(self, receipt: common_pb2.SignedHandOver) -> None:
        """Stage 0's receipt for the input; its receipts for later steps are about tokens of the last stage."""
        if receipt.step != 0 or receipt.stage != 0 or receipt.sent:
            return
        chain = extend_chain(ZERO_HASH, self._entry.input.digest)
        values = (self._entry.request_id, 0, False, 0, chain)
        digest = typed_data.signing_digest(self._domains.verification, typed_data.HAND_OVER, values)
        if receipt.chain != chain or not typed_data.is_signed_by(digest, receipt.signature, self._route[0].node):
            raise SessionError("stage 0 did not sign for the input that was sent", 0, invalid=True)

    def _input_frames(self) -> list[execution_pb2.StepFrame]:
        given = self._entry.input
        payload = given.data
        parts = [payload[at : at + FRAME_PAYLOAD_BYTES] for at in range(0, len(payload), FRAME_PAYLOAD_BYTES)]
        return [
            execution_pb2.StepFrame(
                request_id=self._entry.request_id,
                stage=0,
                step=0,
                position=0,
                rows=given.rows,
                encoding=_WIRE_ENCODINGS[given.encoding],
                frame_index=index,
                frame_count=len(parts),
                payload=part,
                digest=given.digest if index == 0 else b"",
            )
            for index, part in enumerate(parts)
        ]

    def _session_token(self) -> execution_pb2.SessionToken:
        values = (self._entry.request_id, entry_commitment(self._entry), self._deadline)
        digest = typed_data.signing_digest(self._domains.escrow, typed_data.SESSION_TOKEN, values)
        return execution_pb2.SessionToken(deadline=self._deadline, signature=self._signer.sign_digest(digest))

    def _input_opening(self) -> execution_pb2.InputOpening:
        sampling = self._entry.sampling
        return execution_pb2.InputOpening(
            prompt_digest=self._entry.input.digest,
            prompt_tokens=self._entry.input.rows,
            sampling=common_pb2.SamplingParameters(
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                seed=sampling.seed,
                maximum_tokens=sampling.maximum_tokens,
            ),
            salt=self._entry.salt,
        )

    def _refused(self, stage: int, error: grpc.aio.AioRpcError) -> SessionError:
        reason, detail = explain_refusal(error)
        return SessionError(f"{reason.removeprefix('ERROR_REASON_')}: {detail}", stage, reason=reason)


def replacement_message(item: StageReplacement) -> execution_pb2.StageReplacement:
    """A replacement as it travels."""
    return execution_pb2.StageReplacement(
        assignment=item.assignment.to_message(),
        proof=item.proof,
        replaced=bytes.fromhex(item.replaced[2:]),
        consent=item.consent,
        witness=item.witness,
    )


def entry_commitment(entry: JournalEntry) -> bytes:
    """The input commitment of a journal entry."""
    return input_commitment(entry.input.digest, entry.input.rows, entry.sampling.digest(), entry.salt)


def _evidence_step(step: execution_pb2.EvidenceStep) -> EvidenceStep:
    return EvidenceStep(
        step.step,
        step.position,
        step.rows,
        bytes(step.input_digest),
        bytes(step.output_digest),
        bytes(step.input_chain),
        bytes(step.output_chain),
        bytes(step.fingerprint),
    )
