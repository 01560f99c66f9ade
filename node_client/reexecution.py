"""Committee work: judging one stage of somebody else's request by executing it again.

Owns the whole judgement: fetch the evidence from its executor, check it against the chain and against itself,
re-execute the stage in one teacher-forced pass from the exact bytes of its input, check the draws of a last stage, and
say what an honest node attests. Promises that what it returns follows from the evidence and the weights alone, never
from what the executor claims about its output; and that evidence which does not open the executor's own commitment is
never executed. Does not send transactions: see node_client.chain_duties.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import grpc.aio
import numpy as np
import structlog

from bsns.chain.signer import Signer
from bsns.protocol.commitments import (
    EvidenceStep,
    StageEvidence,
    content_digest,
    input_commitment,
    sketch_seed,
    stage_commitment,
)
from bsns.protocol.identifiers import BYTES32, ZERO_HASH, ModelId, ProtocolError, RequestId
from bsns.protocol.manifest import ModelManifest
from bsns.protocol.sampling import SamplingError, SamplingParameters, is_consistent_draw
from bsns.protocol.typed_data import EVIDENCE_QUERY, signing_digest
from bsns.v1 import execution_pb2
from node_client.chain_view import ChainView, RequestView, SigningDomains, StageView
from node_client.errors import ErrorReason, Refusal
from node_client.evidence_store import StageResult
from node_client.peers import PeerPool
from node_client.session_store import sampling_from_message
from node_client.settings import NodeSettings
from node_client.shard_runtime import Rows, ShardRuntime, holds_head, input_bytes, new_sketch

if TYPE_CHECKING:
    from bsns.v1.execution_pb2_grpc import ShardExecutionAsyncStub

log = structlog.get_logger(__name__)

_QUERY_SECONDS: Final = 120


class EvidenceInvalidError(Exception):
    """The executor's evidence is not evidence: it contradicts its commitment, itself, or the request. Asking again
    will not help.
    """


@dataclass(frozen=True)
class FetchedEvidence:
    """Evidence that opened the commitment; `inputs[t]` are the exact input bytes of step t."""

    evidence: StageEvidence
    inputs: tuple[bytes, ...]
    evidence_root: bytes
    output_tokens: int
    sampling: SamplingParameters
    prompt_tokens: int


def no_valid_evidence() -> StageResult:
    """What an honest member attests when there is nothing to execute."""
    return StageResult(ZERO_HASH, ZERO_HASH, secrets.token_bytes(BYTES32), 0)


class Reexecution:
    """Judges stages with this node's models and compute thread."""

    def __init__(
        self,
        settings: NodeSettings,
        signer: Signer,
        domains: SigningDomains,
        chain: ChainView,
        runtime: ShardRuntime,
        peers: PeerPool,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._settings, self._signer, self._domains = settings, signer, domains
        self._chain, self._runtime, self._peers, self._clock = chain, runtime, peers, clock

    async def judge(self, request_id: bytes, stage: int, give_up: Callable[[], bool]) -> StageResult:
        """What this node attests for `stage`. Asks for the evidence until `give_up()`; ChainError if the chain cannot
        be read.
        """
        logger = log.bind(request_id=request_id.hex(), stage=stage)
        request = await self._chain.request(request_id)
        route = await self._chain.stages(request_id)
        own_commitment = (await self._chain.stage_record(request_id, stage)).commitment
        model = ModelId(await self._chain.model_of_plan(request.plan_id))
        while True:
            try:
                manifest = self._runtime.store(model).manifest
                fetched = await self._fetch(request_id, stage, request, route, own_commitment, manifest)
                return await self._execute(request_id, stage, model, route[stage], fetched)
            except EvidenceInvalidError as error:
                logger.warning("evidence_invalid", detail=str(error))
                return no_valid_evidence()
            except Refusal as refusal:
                if refusal.reason == ErrorReason.ERROR_REASON_MALFORMED_TENSOR:
                    logger.warning("evidence_invalid", detail=refusal.detail)
                    return no_valid_evidence()
                if refusal.reason == ErrorReason.ERROR_REASON_WEIGHTS_UNAVAILABLE:
                    # Attesting "no evidence" for want of our own weights would blame an honest executor.
                    raise
                logger.info("evidence_unavailable", reason=refusal.reason_name, detail=refusal.detail)
            except (grpc.aio.AioRpcError, TimeoutError, OSError) as error:
                detail = error.details() if isinstance(error, grpc.aio.AioRpcError) else str(error)
                logger.info("evidence_unavailable", detail=detail)
            if give_up():
                logger.warning("evidence_given_up")
                return no_valid_evidence()
            await asyncio.sleep(self._settings.evidence_retry_seconds)

    async def _fetch(
        self,
        request_id: bytes,
        stage: int,
        request: RequestView,
        route: tuple[StageView, ...],
        commitment: bytes,
        manifest: ModelManifest,
    ) -> FetchedEvidence:
        deadline = int(self._clock()) + _QUERY_SECONDS
        query = execution_pb2.GetStageEvidenceRequest(
            request_id=request_id,
            stage=stage,
            deadline=deadline,
            signature=self._signer.sign_digest(
                signing_digest(self._domains.verification, EVIDENCE_QUERY, (request_id, stage, deadline))
            ),
            with_inputs=True,
        )
        header: execution_pb2.StageEvidence | None = None
        inputs: dict[int, bytearray] = {}
        received = 0
        limit = self._settings.evidence_response_bytes

        async def receive(stub: ShardExecutionAsyncStub) -> None:
            nonlocal header, received
            async for message in stub.GetStageEvidence(query, timeout=_QUERY_SECONDS):
                if message.HasField("evidence"):
                    if header is not None:
                        raise EvidenceInvalidError("the evidence came twice")
                    header = message.evidence
                    _check_header(header, request_id, stage, request, route, commitment, manifest)
                    continue
                if header is None or message.input.step >= len(header.steps):
                    raise EvidenceInvalidError("inputs came before the evidence, or for steps that are not in it")
                received += len(message.input.payload)
                if received > limit:
                    raise EvidenceInvalidError(f"more than {limit} bytes of inputs")
                inputs.setdefault(message.input.step, bytearray()).extend(message.input.payload)

        await self._peers.with_channel(route[stage].node, receive)
        if header is None:
            raise Refusal(ErrorReason.ERROR_REASON_EVIDENCE_UNAVAILABLE, "the executor sent no evidence")
        evidence = _evidence_of(header)
        ordered = []
        for step in evidence.steps:
            data = bytes(inputs.get(step.step, b""))
            if content_digest(data) != step.input_digest:
                raise EvidenceInvalidError(f"the input bytes of step {step.step} are not those of the evidence")
            if len(data) != input_bytes(manifest, route[stage].first_unit, step.rows):
                raise EvidenceInvalidError(f"the input of step {step.step} has the wrong length")
            ordered.append(data)
        return FetchedEvidence(
            evidence,
            tuple(ordered),
            bytes(header.evidence_root),
            header.output_tokens,
            sampling_from_message(header.input.sampling),
            header.input.prompt_tokens,
        )

    async def _execute(
        self, request_id: bytes, stage: int, model: ModelId, served: StageView, fetched: FetchedEvidence
    ) -> StageResult:
        executor = await self._runtime.executor(model, served.first_unit, served.end_unit)
        try:
            sketch = new_sketch(sketch_seed(RequestId(request_id), stage), executor)
            head = holds_head(executor)
            steps = fetched.evidence.steps
            number = 0
            draws_hold = True

            def take(rows: Rows) -> None:
                # In the compute thread, one step after the other.
                nonlocal number, draws_hold
                sketch.add(rows)
                if head and not self._is_draw(rows, fetched, number):
                    draws_hold = False
                number += 1

            await self._runtime.reexecute(
                executor,
                ((data, step.rows) for data, step in zip(fetched.inputs, steps, strict=True)),
                self._settings.reexecution_rows,
                take,
            )
            return StageResult(
                fetched.evidence_root,
                sketch.value(),
                secrets.token_bytes(BYTES32),
                # Tokens that no honest draw gives are no answer: nothing is to be paid for them.
                fetched.output_tokens if draws_hold else 0,
            )
        finally:
            self._runtime.release(model, served.first_unit, served.end_unit)

    def _is_draw(self, logits: Rows, fetched: FetchedEvidence, number: int) -> bool:
        """Whether the token that the stage sent at step `number` is a draw from these logits.

        The token itself is not in the evidence, only its digest: the next step's input of stage 0 is. So the
        candidates are the tokens whose digest it can be; an honest one is among the likeliest, and the search ends at
        the first that fits.
        """
        wanted = fetched.evidence.steps[number].output_digest
        token = _token_of_digest(wanted, logits)
        if token is None:
            return False
        try:
            return is_consistent_draw(logits[-1], fetched.sampling, number, token, self._settings.draw_tolerance)
        except SamplingError:
            return False


def _token_of_digest(digest: bytes, logits: Rows) -> int | None:
    """The token id whose four bytes have `digest`, likeliest first; None if there is none in the vocabulary."""
    for token in np.argsort(-logits[-1], kind="stable"):
        if content_digest(int(token).to_bytes(4, "little")) == digest:
            return int(token)
    return None


def _evidence_of(header: execution_pb2.StageEvidence) -> StageEvidence:
    try:
        return StageEvidence(
            tuple(
                EvidenceStep(
                    item.step,
                    item.position,
                    item.rows,
                    bytes(item.input_digest),
                    bytes(item.output_digest),
                    bytes(item.input_chain),
                    bytes(item.output_chain),
                    bytes(item.fingerprint),
                )
                for item in header.steps
            )
        )
    except ProtocolError as error:
        raise EvidenceInvalidError(str(error)) from error


def _check_header(
    header: execution_pb2.StageEvidence,
    request_id: bytes,
    stage: int,
    request: RequestView,
    route: tuple[StageView, ...],
    commitment: bytes,
    manifest: ModelManifest,
) -> None:
    """Everything that can be checked before a byte of input is taken."""
    root, sealed = bytes(header.evidence_root), bytes(header.sealed_sketch)
    if not len(root) == len(sealed) == BYTES32 or commitment != stage_commitment(
        RequestId(request_id), 0, stage, route[stage].node, root, sealed, header.output_tokens
    ):
        # Somebody who is not the executor may have answered at its address; the executor's own evidence may still come.
        raise Refusal(
            ErrorReason.ERROR_REASON_EVIDENCE_UNAVAILABLE, "the answer does not open the executor's commitment"
        )
    if len(header.steps) > request.maximum_tokens or header.output_tokens != len(header.steps):
        raise EvidenceInvalidError(
            f"{len(header.steps)} steps for {header.output_tokens} answer tokens, {request.maximum_tokens} were paid"
        )
    evidence = _evidence_of(header)
    if evidence.root != header.evidence_root:
        raise EvidenceInvalidError("the steps do not have the root that was committed to")
    opening = header.input
    try:
        sampling = sampling_from_message(opening.sampling)
    except Refusal as refusal:
        raise EvidenceInvalidError(refusal.detail) from refusal
    if (
        len(opening.prompt_digest) != BYTES32
        or len(opening.salt) != BYTES32
        or input_commitment(opening.prompt_digest, opening.prompt_tokens, sampling.digest(), opening.salt)
        != request.input_commitment
    ):
        raise EvidenceInvalidError("the opening is not that of the request's input commitment")
    first = evidence.steps[0]
    if first.rows != opening.prompt_tokens or any(step.rows != 1 for step in evidence.steps[1:]):
        raise EvidenceInvalidError("step 0 is the prompt and each later step one token")
    if first.rows + len(evidence.steps) - 1 > manifest.context_limit:
        raise EvidenceInvalidError("more positions than the model's context")
    if route[stage].first_unit == 0 and first.input_digest != opening.prompt_digest:
        raise EvidenceInvalidError("stage 0 executed another prompt than the request's")
