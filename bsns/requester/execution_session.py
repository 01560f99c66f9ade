"""One paid session over the nodes of its route: open it everywhere, stream the input in and the tokens out, close
it, ask for evidence.

Promises that every token it yields came in order, and that at the end the last stage has signed for exactly those
tokens and the drafts between them, or it raises. Says which stage refused and why. Does not touch the chain and does
not decode text.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Final

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
from bsns.protocol.identifiers import ZERO_HASH, ProtocolError
from bsns.requester.errors import UnavailableError
from bsns.requester.journal import JournalEntry, StageEvidenceHeader
from bsns.requester.node_connection import NodeEndpoint, explain_refusal, open_channel
from bsns.v1 import common_pb2, execution_pb2, execution_pb2_grpc

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


class SessionError(Exception):
    """A node refused, disappeared or did not keep to the protocol. `stage` says where; `invalid` that what came back
    must not be used.
    """

    def __init__(self, message: str, stage: int, *, invalid: bool = False) -> None:
        self.stage = stage
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


@dataclass(frozen=True, slots=True)
class SessionDomains:
    """EIP-712 domains of the deployment."""

    escrow: typed_data.Domain
    verification: typed_data.Domain


class ExecutionSession:
    """A session of `entry` over `route` (one endpoint per stage). Use as `async with`; `deadline` ends its
    token, `query_deadline` its evidence queries (Unix seconds). With `share_prompt` the last stage is shown a prompt of
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
    ) -> None:
        self._entry = entry
        self._route = tuple(route)
        self._signer = signer
        self._domains = domains
        self._limits = limits
        self._deadline = deadline
        self._query_deadline = query_deadline
        self._share_prompt = share_prompt
        self._channels: list[grpc.aio.Channel] = []
        self._stubs: list[execution_pb2_grpc.ShardExecutionAsyncStub] = []
        self._received: list[int] = []
        self._drafts: list[tuple[int, ...]] = []
        self._outputs: list[execution_pb2.StepOutput] = []
        self._chain = ZERO_HASH
        self._finish_reason = ""
        self._closing = False

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

    async def __aenter__(self) -> ExecutionSession:
        try:
            for stage, where in enumerate(self._route):
                try:
                    channel = await open_channel(where, self._limits.connect_s)
                except UnavailableError as error:
                    raise SessionError(str(error), stage) from error
                self._channels.append(channel)
                self._stubs.append(execution_pb2_grpc.ShardExecutionStub(channel))
        except BaseException:
            await self._disconnect()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._disconnect()

    async def _disconnect(self) -> None:
        await asyncio.gather(*(channel.close() for channel in self._channels))
        self._channels, self._stubs = [], []

    async def open(self) -> None:
        """Open the session at all stages at once; SessionError of the first stage that refuses."""
        opening, given = self._input_opening(), self._entry.input
        token = self._session_token()
        last = len(self._route) - 1
        is_shown = self._share_prompt and bool(given.tokens) and given.rows <= MAXIMUM_SHOWN_PROMPT
        shown = given.data if is_shown else b""

        async def open_at(stage: int) -> SessionError | None:
            request = execution_pb2.OpenSessionRequest(
                request_id=self._entry.request_id, stage=stage, token=token, input=opening,
                prompt=shown if stage == last else b"",
            )  # fmt: skip
            try:
                await self._stubs[stage].OpenSession(request, timeout=self._limits.open_session_s, wait_for_ready=True)
            except grpc.aio.AioRpcError as error:
                return self._refused(stage, error)
            return None

        outcomes = await asyncio.gather(*(open_at(stage) for stage in range(len(self._route))))
        for refusal in outcomes:
            if refusal is not None:
                raise refusal

    async def stream(self) -> AsyncIterator[int]:
        """Send the input to stage 0 and yield the answer's tokens until the session ends and the last stage's
        signature is checked.

        A broken stream after the first token ends the iteration with finish reason "interrupted": the nodes close
        what they did, and the chain charges that. SessionError otherwise.
        """
        call = self._stubs[0].Forward()
        try:
            for frame in self._input_frames():
                await call.write(execution_pb2.ForwardRequest(frame=frame))
            while True:
                limit = self._patience_s
                try:
                    async with asyncio.timeout(limit):
                        response = await call.read()
                except TimeoutError:
                    if self._closing:
                        self._finish_reason = "cancelled"
                        return
                    raise SessionError(f"no token within {limit:.0f} s after {len(self._received)} tokens", 0) from None
                if not isinstance(response, execution_pb2.ForwardResponse):
                    raise SessionError("the stream ended without an end of session", 0)
                match response.WhichOneof("body"):
                    case "output":
                        for token in self._take_output(response.output):
                            yield token
                    case "ended":
                        self._check_end(response.ended)
                        return
                    case "rejected":
                        rejected = response.rejected
                        reason = common_pb2.ErrorReason.Name(rejected.reason).removeprefix("ERROR_REASON_")
                        raise SessionError(f"{reason}: {rejected.detail}", rejected.stage)
                    case "receipt":
                        self._check_receipt(response.receipt)
                    case _:
                        raise SessionError("stage 0 sent an empty message", 0)
        except grpc.aio.AioRpcError as error:
            if not self._received:
                raise self._refused(0, error) from error
            self._finish_reason = "interrupted"
        finally:
            call.cancel()

    @property
    def _patience_s(self) -> float:
        if self._closing:
            return self._limits.close_s
        return self._limits.next_token_s if self._received else self._limits.first_token_s

    async def close(self) -> None:
        """Ask stage 0 to end the session (a stop string was hit). The end arrives on the stream, whatever stage 0
        says here.
        """
        self._closing = True
        request = execution_pb2.CloseSessionRequest(request_id=self._entry.request_id, token=self._session_token())
        try:
            await self._stubs[0].CloseSession(request, timeout=self._limits.close_s)
        except grpc.aio.AioRpcError as error:
            # It may have ended by itself in between; at worst, more tokens are drawn than were needed.
            logger.info("close refused", request_id=self._entry.request_id.hex(), detail=str(self._refused(0, error)))

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
            async for response in self._stubs[stage].GetStageEvidence(request, timeout=self._limits.evidence_s):
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
            if self._outputs[output.step] != output:
                raise SessionError(f"two different outputs of step {output.step}", 0, invalid=True)
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
        self._received += tokens
        self._drafts.append(given[1:])
        self._outputs.append(output)
        # As the last stage handed them to stage 0: rows behind what the answer keeps.
        position = self._entry.input.rows + len(self._received) - 1
        self._chain = extend_chain(self._chain, step_digest(token_bytes(given), position, len(given)))
        return tokens

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
        return SessionError(f"{reason.removeprefix('ERROR_REASON_')}: {detail}", stage)


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
