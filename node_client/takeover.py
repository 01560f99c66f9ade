"""Taking over a stage in mid-answer: what its node took in and handed on, from the stages around it, executed again.

Owns the way from an empty session of a stage whose node is gone to one that goes on where that node stopped. Its inputs
come from the stage before it, what it handed on from the stage behind it, both exactly as they went over the wire.
Promises that the whole stage is executed again here, so that this node can answer for it; that outputs which were
handed on are taken over only if they are what this node computes, within the tolerance that a committee would allow,
and its tokens only if they are draws; and that nothing which the stage behind has seen is handed on again with other
bytes. Does not decide who is replaced (that is the requester's, see bsns.requester) nor put it on chain.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

import grpc.aio
import torch
from eth_typing import ChecksumAddress

from bsns.protocol.commitments import TOKEN_BYTES, step_digest, token_bytes, token_ids
from bsns.runtime.activation_codec import ActivationError, TensorEncoding, can_be_handed_on
from bsns.v1 import common_pb2, execution_pb2
from node_client.errors import ErrorReason, Refusal
from node_client.evidence_store import EvidenceStore
from node_client.peers import PeerPool
from node_client.prompt_lookup import Drawn
from node_client.reexecution import are_draws
from node_client.session_store import ExecutedStep, ReceivedOutput, Session
from node_client.settings import MAXIMUM_FRAME_BYTES, NodeSettings
from node_client.shard_runtime import (
    Rows,
    ShardRuntime,
    StepOutput,
    encoding_of_input,
    holds_head,
    step_output,
    tolerance_of,
)

if TYPE_CHECKING:
    from bsns.v1.execution_pb2_grpc import ShardExecutionAsyncStub

INPUTS: Final = execution_pb2.HISTORY_SIDE_INPUTS
OUTPUTS: Final = execution_pb2.HISTORY_SIDE_OUTPUTS
HistorySide: TypeAlias = execution_pb2.HistorySide.ValueType

# Room for the fields around a payload within a frame of 1 MiB.
PAYLOAD_BYTES: Final = MAXIMUM_FRAME_BYTES - 1024


@dataclass(frozen=True, slots=True)
class HandedOver:
    """One step's tensor as it went to the stage that takes it in, which executes it as its step `step`."""

    step: int
    position: int
    rows: int
    encoding: int
    data: bytes
    digest: bytes

    @classmethod
    def of(cls, step: int, position: int, rows: int, encoding: int, data: bytes) -> HandedOver:
        """With its digest computed."""
        return cls(step, position, rows, encoding, data, step_digest(data, position, rows))


@dataclass(frozen=True, slots=True)
class Extent:
    """How far a session is at one moment. `end`: position behind the answer's newest token, known to the last stage."""

    steps: int
    outputs: int
    end: int


@dataclass(frozen=True, slots=True)
class TakenOver:
    """A step that was executed again, and what this node answers for as its output."""

    input: HandedOver
    output: StepOutput


def frames_of(request_id: bytes, stage: int, item: HandedOver) -> list[execution_pb2.StepFrame]:
    """The frames in which `item` goes to `stage`."""
    count = max(1, -(-len(item.data) // PAYLOAD_BYTES))
    return [
        execution_pb2.StepFrame(
            request_id=request_id,
            stage=stage,
            step=item.step,
            position=item.position,
            rows=item.rows,
            encoding=common_pb2.TensorEncoding.ValueType(item.encoding),
            frame_index=index,
            frame_count=count,
            payload=item.data[index * PAYLOAD_BYTES : (index + 1) * PAYLOAD_BYTES],
            digest=item.digest if index == 0 else b"",
        )
        for index in range(count)
    ]


async def history_of(
    session: Session, side: HistorySide, extent: Extent, evidence: EvidenceStore
) -> AsyncIterator[HandedOver]:
    """What went over a hop of `session` up to `extent`: for `INPUTS` of the stage behind it what it handed on, for
    `OUTPUTS` of the stage before it what it took in. StorageError if it is not on record.
    """
    loop = asyncio.get_running_loop()
    request, stage, executed = session.request_id, session.stage, session.executed
    tokens = int(TensorEncoding.TOKEN_IDS)
    if side == OUTPUTS and stage == 0:
        position = session.opening.prompt_tokens - 1
        for step, output in enumerate(session.outputs[: extent.outputs], 1):
            position += output.accepted + 1
            data = token_bytes(output.token_ids)
            yield HandedOver(step, position, len(output.token_ids), tokens, data, output.digest)
        return
    for step, item in enumerate(executed[: extent.steps]):
        if side == OUTPUTS:
            encoding, data = await loop.run_in_executor(None, evidence.step_input, request, stage, step)
            yield HandedOver(step, item.position, item.rows, encoding, data, item.digest)
            continue
        data = await loop.run_in_executor(None, evidence.step_output, request, stage, step)
        if session.is_last:
            follows = executed[step + 1].position if step + 1 < extent.steps else extent.end
            yield HandedOver.of(step + 1, follows, len(data) // TOKEN_BYTES, tokens, data)
        else:
            encoding = encoding_of_input(session.manifest, session.executor.end_unit, item.rows, len(data))
            yield HandedOver.of(step, item.position, item.rows, int(encoding), data)


class StageTakeover:
    """Does it with this node's connections and compute thread."""

    def __init__(self, settings: NodeSettings, peers: PeerPool, runtime: ShardRuntime) -> None:
        self._settings, self._peers, self._runtime = settings, peers, runtime

    async def run(self, session: Session, prompt: HandedOver | None, encoding: TensorEncoding) -> list[TakenOver]:
        """Execute what the stage's former node had executed; `prompt` is what the requester sent to stage 0. Changes
        the session's cache and what it knows of its steps; returns what is to be recorded, in order. New outputs are
        handed on in `encoding`. Refusal if the history is not to be had, or does not hold.
        """
        before, behind = session.predecessor, session.successor
        inputs, outputs = await asyncio.gather(
            self._history(before, session, INPUTS), self._history(behind, session, OUTPUTS)
        )
        if prompt is not None:
            inputs.insert(0, prompt)
        if session.stage == 0:
            inputs = self._executed_by_stage_0(session, inputs)
        elif not session.successor_is_new:
            # What the stage behind has not seen comes again from the one before, as a step like every other.
            inputs = inputs[: len(outputs)]
        if len(outputs) > len(inputs):
            raise Refusal(
                ErrorReason.ERROR_REASON_EVIDENCE_UNAVAILABLE,
                f"the stage behind took in {len(outputs)} outputs, the stage before gave {len(inputs)} inputs",
            )
        if not inputs:
            return []
        return await self._execute(session, inputs, outputs, encoding)

    async def _history(self, node: ChecksumAddress, session: Session, side: HistorySide) -> list[HandedOver]:
        """What the stage took in or handed on, checked to be steps without a gap; none where nobody can know."""
        if session.successor_is_new if side == OUTPUTS else session.predecessor_is_new:
            return []
        query = execution_pb2.GetStageHistoryRequest(request_id=session.request_id, stage=session.stage, side=side)
        metadata = self._peers.proof_metadata(node)
        found: list[HandedOver] = []

        async def receive(stub: ShardExecutionAsyncStub) -> None:
            call = stub.GetStageHistory(query, timeout=self._settings.history_seconds, metadata=metadata)
            found.extend([item async for item in _whole(call, self._settings.evidence_response_bytes)])

        try:
            await self._peers.with_channel(node, receive)
        except grpc.aio.AioRpcError as error:
            raise Refusal(
                ErrorReason.ERROR_REASON_EVIDENCE_UNAVAILABLE,
                f"node {node} does not show what this stage did before: {error.details()}",
            ) from error
        # What the last stage draws from step t is step t + 1 of stage 0.
        first = int(session.stage == 0 if side == INPUTS else session.is_last)
        if [item.step for item in found] != list(range(first, first + len(found))):
            raise Refusal(ErrorReason.ERROR_REASON_EVIDENCE_UNAVAILABLE, f"node {node} left out a step of the history")
        return found

    @staticmethod
    def _executed_by_stage_0(session: Session, inputs: Sequence[HandedOver]) -> list[HandedOver]:
        """Take note of what the last stage drew; the newest output is not executed if it ends the answer."""
        drafts: tuple[int, ...] = ()
        end = session.opening.prompt_tokens
        for item in inputs[1:]:
            given = token_ids(item.data)
            # Behind the token that is drawn from the prompt, one row of the step before is kept for each token.
            accepted = item.position - end if item.step > 1 else 0
            if not 0 <= accepted <= len(drafts):
                raise Refusal(
                    ErrorReason.ERROR_REASON_EVIDENCE_UNAVAILABLE,
                    f"step {item.step} keeps {accepted} of {len(drafts)} drafts",
                )
            session.outputs.append(ReceivedOutput(accepted, given, item.digest))
            session.tokens += (*drafts[:accepted], given[0])
            drafts, end = given[1:], item.position + 1
        if session.tokens and session.is_final(session.tokens[-1], len(session.tokens)):
            return list(inputs[:-1])
        return list(inputs)

    async def _execute(
        self, session: Session, inputs: Sequence[HandedOver], outputs: Sequence[HandedOver], encoding: TensorEncoding
    ) -> list[TakenOver]:
        executor, cache = session.executor, session.cache
        assert cache is not None, "an active session has a cache"
        for item in inputs:
            session.check_extent(item.step, item.position, item.rows)
            session.check_order(item.step, item.position, item.rows)
            rejected = session.rejected_before(item.position) if item.step else 0
            session.executed.append(ExecutedStep(item.position, item.rows, item.digest, rejected))
        taken: list[TakenOver] = []

        def following(step: int) -> HandedOver | None:
            return inputs[step + 1] if step + 1 < len(inputs) else None

        def take(rows: Rows) -> None:
            # In the compute thread, one step after the other.
            item = inputs[len(taken)]
            if len(taken) < len(outputs):
                output = self._adopted(session, item, outputs[len(taken)], rows)
            else:
                output = step_output(
                    executor,
                    rows,
                    rows=item.rows,
                    position=item.position,
                    take=lambda logits: self._drawn_again(session, item, following(len(taken)), logits),
                    encoding=encoding,
                )
            taken.append(TakenOver(item, output))

        await self._runtime.reexecute(
            executor,
            ((item.data, item.position, item.rows) for item in inputs),
            self._settings.reexecution_rows,
            take,
            session=cache,
        )
        return taken

    @staticmethod
    def _drawn_again(session: Session, item: HandedOver, following: HandedOver | None, logits: Rows) -> Drawn:
        """What the former last stage drew and drafted, where nobody is left who took it in: the stage before has
        executed the drafts as the rows of its next step, `following`, and a draft is looked up in the answer so far, as
        long as the former node looked its drafts up there, too. Refusal if it did not.
        """
        drawn = session.take(logits, 0 if following is None else following.rows - 1)
        if following is not None:
            end = item.position + (len(drawn.tokens) if item.step else item.rows)
            if (end, len(drawn.drafts)) != (following.position, following.rows - 1):
                raise Refusal(
                    ErrorReason.ERROR_REASON_EVIDENCE_UNAVAILABLE,
                    f"what followed step {item.step} cannot be found out: the nodes that knew it are gone",
                )
        return drawn

    @staticmethod
    def _adopted(session: Session, item: HandedOver, output: HandedOver, rows: Rows) -> StepOutput:
        """`output`, which the former node handed on after `item`, as our own; Refusal unless it is what `rows`, which
        we computed, give.
        """
        executor = session.executor
        tolerance, drawn = tolerance_of(executor), None
        if holds_head(executor):
            assert session.answer is not None, "the last stage draws"
            newest, *drafts = token_ids(output.data)
            accepted = output.position - item.position - 1 if item.step else 0
            drawn = Drawn((*session.answer.drafts[: max(0, accepted)], newest), tuple(drafts))
            expected = item.position + (len(drawn.tokens) if item.step else item.rows)
            holds = (output.position, len(drawn.tokens)) == (expected, 1 + max(0, accepted)) and are_draws(
                rows, session.opening.sampling, session.answer.count, drawn.tokens, tolerance.logit_tolerance
            )
            if holds:
                session.answer.adopt(drawn)
        else:
            try:
                found = encoding_of_input(session.manifest, executor.end_unit, item.rows, len(output.data))
                holds = (output.position, output.rows) == (item.position, item.rows) and can_be_handed_on(
                    found, output.data, torch.from_numpy(rows), tolerance.row_tolerance
                )
            except ActivationError:
                holds = False
        if not holds:
            raise Refusal(
                ErrorReason.ERROR_REASON_DIGEST_MISMATCH,
                f"what the former node of this stage handed on after step {item.step} is not what the stage computes; "
                "nobody can answer for it, and the request cannot go on: take its refund",
            )
        return StepOutput(
            output.data, TensorEncoding(output.encoding), output.position, output.rows, output.digest, rows, drawn
        )


async def _whole(call: AsyncIterable[execution_pb2.GetStageHistoryResponse], limit: int) -> AsyncIterator[HandedOver]:
    """The tensors of a stream of frames; Refusal for frames out of order, or of more than `limit` bytes together."""
    data, received, next_index = bytearray(), 0, 0
    async for message in call:
        frame = message.frame
        received += len(frame.payload)
        if frame.frame_index != next_index or received > limit:
            raise Refusal(
                ErrorReason.ERROR_REASON_EVIDENCE_UNAVAILABLE,
                f"the history is out of order or of more than {limit} bytes",
            )
        data += frame.payload
        next_index += 1
        if next_index == frame.frame_count:
            yield HandedOver.of(frame.step, frame.position, frame.rows, int(frame.encoding), bytes(data))
            data, next_index = bytearray(), 0


__all__ = [
    "INPUTS",
    "OUTPUTS",
    "Extent",
    "HandedOver",
    "HistorySide",
    "StageTakeover",
    "TakenOver",
    "frames_of",
    "history_of",
]
