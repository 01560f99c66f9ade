"""Committee work: judging one stage of somebody else's request by executing it again.

Owns the whole judgement: fetch the evidence from its executor, check it against the chain, against itself and against
the evidence of the stages before and after it, re-execute the stage in one teacher-forced pass from the exact bytes of
its input, check the draws of a last stage, and say what an honest node attests. Promises that what it returns follows
from evidence, signatures and weights alone, never from what the executor claims about its output; and that evidence
which does not open its executor's own commitment is neither executed nor compared. Does not send transactions: see
node_client.chain_duties.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import grpc.aio
import structlog
import torch

from bsns.chain.signer import Signer
from bsns.protocol.commitments import (
    EvidenceStep,
    StageEvidence,
    inner_sketch_seed,
    input_commitment,
    kept_rows,
    sketch_seed,
    stage_commitment,
    step_digest,
    token_ids,
)
from bsns.protocol.hand_over import (
    MAXIMUM_STATEMENTS,
    Contradiction,
    Linkage,
    ShownStage,
    Statement,
    contradictions,
    linkage,
)
from bsns.protocol.identifiers import BYTES32, ZERO_HASH, ModelId, ProtocolError, RequestId
from bsns.protocol.manifest import ModelManifest
from bsns.protocol.sampling import SamplingError, SamplingParameters, is_consistent_draw
from bsns.protocol.sketch import StageSketch, disowned
from bsns.protocol.typed_data import EVIDENCE_QUERY, signing_digest
from bsns.runtime.activation_codec import ActivationError, can_be_handed_on
from bsns.v1 import execution_pb2
from node_client.chain_view import ChainView, RequestView, SigningDomains, StageView
from node_client.errors import ErrorReason, Refusal
from node_client.evidence_store import StageResult
from node_client.peers import PeerPool
from node_client.session_store import sampling_from_message
from node_client.settings import NodeSettings
from node_client.shard_runtime import (
    Rows,
    ShardRuntime,
    encoding_of_input,
    inner_sketch,
    new_sketch,
    tolerance_of,
)

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
    """Evidence that opened the commitment. If tensors were asked for, `inputs[t]` are the exact input bytes of step t;
    `outputs[t]` those that it handed on, or of a last stage `draws[t]` the tokens drawn from its rows in their order.
    """

    shown: ShownStage
    inputs: tuple[bytes, ...]
    outputs: tuple[bytes, ...]
    draws: tuple[tuple[int, ...], ...]
    evidence_root: bytes
    output_tokens: int
    sampling: SamplingParameters


@dataclass(frozen=True)
class Judgement:
    """What this node attests, and which contradictions between statements and evidence it found on the way."""

    result: StageResult
    contradictions: tuple[Contradiction, ...] = ()


@dataclass(frozen=True)
class _Case:
    """What the chain says about a request. `commitments` are those of the judged stage and its neighbours."""

    request_id: RequestId
    request: RequestView
    route: tuple[StageView, ...]
    commitments: Mapping[int, bytes]
    manifest: ModelManifest
    entropy: bytes


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

    async def judge(self, request_id: bytes, stage: int, give_up: Callable[[], bool]) -> Judgement:
        """What this node attests for `stage`. Asks for the evidence until `give_up()`; ChainError if the chain cannot
        be read.
        """
        logger = log.bind(request_id=request_id.hex(), stage=stage)
        request = await self._chain.request(request_id)
        route = await self._chain.stages(request_id)
        before, after = (stage - 1) % len(route), (stage + 1) % len(route)
        commitments = {
            number: (await self._chain.stage_record(request_id, number)).commitment for number in {before, stage, after}
        }
        model = ModelId(await self._chain.model_of_plan(request.plan_id))
        manifest, entropy = self._runtime.store(model).manifest, await self._chain.entropy(request_id)
        case = _Case(RequestId(request_id), request, route, commitments, manifest, entropy)
        found: tuple[Contradiction, ...] = ()
        while True:
            try:
                fetched = await self._fetch(case, stage, with_inputs=True)
                lied, found = await self._check_links(case, fetched.shown, before, after, give_up)
                if lied:
                    return Judgement(no_valid_evidence(), found)
                return Judgement(await self._execute(case, stage, model, fetched), found)
            except EvidenceInvalidError as error:
                logger.warning("evidence_invalid", detail=str(error))
                return Judgement(no_valid_evidence(), found)
            except Refusal as refusal:
                if refusal.reason == ErrorReason.ERROR_REASON_MALFORMED_TENSOR:
                    logger.warning("evidence_invalid", detail=refusal.detail)
                    return Judgement(no_valid_evidence(), found)
                if refusal.reason == ErrorReason.ERROR_REASON_WEIGHTS_UNAVAILABLE:
                    # Attesting "no evidence" for want of our own weights would blame an honest executor.
                    raise
                logger.info("evidence_unavailable", reason=refusal.reason_name, detail=refusal.detail)
            except (grpc.aio.AioRpcError, TimeoutError, OSError) as error:
                detail = error.details() if isinstance(error, grpc.aio.AioRpcError) else str(error)
                logger.info("evidence_unavailable", detail=detail)
            if give_up():
                logger.warning("evidence_given_up")
                return Judgement(no_valid_evidence(), found)
            await asyncio.sleep(self._settings.evidence_retry_seconds)

    async def _check_links(
        self, case: _Case, own: ShownStage, before: int, after: int, give_up: Callable[[], bool]
    ) -> tuple[bool, tuple[Contradiction, ...]]:
        """Whether the judged stage lied about what it received or sent, and what can be proven about either end.

        A neighbour that shows nothing in time, and a hop that no statement decides, speak against nobody.
        """
        shown: dict[int, ShownStage | None] = {own.stage: own}
        missing = sorted({before, after} - shown.keys())
        shown.update(zip(missing, await asyncio.gather(*(self._neighbour(case, it, give_up) for it in missing))))
        domain, request = self._domains.verification, case.request_id
        lied = False
        found: dict[tuple[int, bool], Contradiction] = {}
        for sender, receiver in dict.fromkeys(((before, own.stage), (own.stage, after))):
            first, second = shown[sender], shown[receiver]
            if first is None or second is None:
                continue
            link = linkage(domain, request, first, second)
            if link is Linkage.HOLDS:
                continue
            log.warning("link_broken", request_id=request.hex(), sender=sender, receiver=receiver, link=link.value)
            lied |= (sender == own.stage and link.blames_sender) or (receiver == own.stage and link.blames_receiver)
            for item in contradictions(domain, request, first, second):
                # A node does not report itself: whatever made it contradict itself is for its operator to find.
                if case.route[item.statement.stage].node != self._signer.address:
                    found[item.statement.stage, item.statement.sent] = item
        return lied, tuple(found.values())

    async def _neighbour(self, case: _Case, stage: int, give_up: Callable[[], bool]) -> ShownStage | None:
        """What a stage next to the judged one shows, without its inputs; None if it does not show evidence in time."""
        logger = log.bind(request_id=case.request_id.hex(), neighbour=stage)
        try:
            async with asyncio.timeout(self._settings.neighbour_evidence_seconds):
                while True:
                    try:
                        return (await self._fetch(case, stage, with_inputs=False)).shown
                    except Refusal as refusal:
                        logger.info("neighbour_evidence_unavailable", detail=refusal.detail)
                    except grpc.aio.AioRpcError as error:
                        logger.info("neighbour_evidence_unavailable", detail=error.details())
                    except OSError as error:
                        logger.info("neighbour_evidence_unavailable", detail=str(error))
                    if give_up():
                        return None
                    await asyncio.sleep(self._settings.evidence_retry_seconds)
        except TimeoutError:
            logger.info("neighbour_evidence_given_up")
        except EvidenceInvalidError as error:
            # Its own committee sees to that; it says nothing about the stage judged here.
            logger.warning("neighbour_evidence_invalid", detail=str(error))
        return None

    async def _fetch(self, case: _Case, stage: int, *, with_inputs: bool) -> FetchedEvidence:
        request_id, served = case.request_id, case.route[stage]
        deadline = int(self._clock()) + _QUERY_SECONDS
        query = execution_pb2.GetStageEvidenceRequest(
            request_id=request_id,
            stage=stage,
            deadline=deadline,
            signature=self._signer.sign_digest(
                signing_digest(self._domains.verification, EVIDENCE_QUERY, (request_id, stage, deadline))
            ),
            with_inputs=with_inputs,
        )
        header: execution_pb2.StageEvidence | None = None
        inputs: dict[int, bytearray] = {}
        outputs: dict[int, bytearray] = {}
        received = 0
        limit = self._settings.evidence_response_bytes
        is_last = stage == len(case.route) - 1

        async def receive(stub: ShardExecutionAsyncStub) -> None:
            nonlocal header, received
            async for message in stub.GetStageEvidence(query, timeout=_QUERY_SECONDS):
                if message.HasField("evidence"):
                    if header is not None:
                        raise EvidenceInvalidError("the evidence came twice")
                    header = message.evidence
                    _check_header(header, case, stage)
                    continue
                is_output = message.HasField("output")
                part = message.output if is_output else message.input
                if header is None or not with_inputs or part.step >= len(header.steps):
                    raise EvidenceInvalidError("bytes came before the evidence, unasked, or for steps not in it")
                received += len(part.payload)
                if received > limit:
                    raise EvidenceInvalidError(f"more than {limit} bytes of inputs and outputs")
                kept = outputs if is_output else inputs
                kept.setdefault(part.step, bytearray()).extend(part.payload)

        await self._peers.with_channel(served.node, receive)
        if header is None:
            raise Refusal(ErrorReason.ERROR_REASON_EVIDENCE_UNAVAILABLE, "the executor sent no evidence")
        evidence = _evidence_of(header)
        ordered = []
        for step in evidence.steps if with_inputs else ():
            data = bytes(inputs.get(step.step, b""))
            if step_digest(data, step.position, step.rows) != step.input_digest:
                raise EvidenceInvalidError(f"the input bytes of step {step.step} are not those of the evidence")
            try:
                encoding_of_input(case.manifest, served.first_unit, step.rows, len(data))
            except ActivationError as error:
                raise EvidenceInvalidError(f"the input of step {step.step} has the wrong length: {error}") from error
            ordered.append(data)
        return FetchedEvidence(
            ShownStage(stage, served.node, evidence, _statements_of(header)),
            tuple(ordered),
            _handed_on(evidence, outputs) if with_inputs and not is_last else (),
            _draws(case.manifest, header, evidence, outputs) if with_inputs and is_last else (),
            bytes(header.evidence_root),
            header.output_tokens,
            sampling_from_message(header.input.sampling),
        )

    async def _execute(self, case: _Case, stage: int, model: ModelId, fetched: FetchedEvidence) -> StageResult:
        served = case.route[stage]
        executor = await self._runtime.executor(
            model, served.first_unit, served.end_unit, execution_class=served.execution_class
        )
        try:
            seed = sketch_seed(case.request_id, stage)
            sketch = new_sketch(seed, executor)
            tolerance = tolerance_of(executor)
            steps = fetched.shown.evidence.steps
            draws, outputs, count = iter(fetched.draws), iter(fetched.outputs), 0
            follows = True

            def take(rows: Rows) -> None:
                # In the compute thread, one step after the other.
                nonlocal count, follows
                sketch.add(rows)
                if fetched.draws:
                    tokens = next(draws)
                    follows = follows and are_draws(rows, fetched.sampling, count, tokens, tolerance.logit_tolerance)
                    count += len(tokens)
                else:
                    data = next(outputs)
                    encoding = encoding_of_input(case.manifest, served.end_unit, len(rows), len(data))
                    follows = follows and can_be_handed_on(
                        encoding, data, torch.from_numpy(rows), tolerance.row_tolerance
                    )

            within: StageSketch | None = None

            def take_inside(rows: Rows) -> None:
                nonlocal within
                if within is None:
                    inner_seed = inner_sketch_seed(case.request_id, stage, case.entropy)
                    within = inner_sketch(inner_seed, executor, rows.shape[1])
                within.add(rows)

            await self._runtime.reexecute(
                executor,
                ((data, step.position, step.rows) for data, step in zip(fetched.inputs, steps, strict=True)),
                self._settings.reexecution_rows,
                take,
                inside=take_inside,
            )
            assert within is not None, "evidence has at least one step"
            return StageResult(
                # No stage shows these rows to anybody: that they were computed is what this sketch says.
                within.value(),
                # Where tokens are no draws, or rows handed on are not those computed, no sketch of the executor's may
                # be near, least of all that of an honest execution.
                sketch.value() if follows else disowned(sketch.value(), seed, case.entropy),
                secrets.token_bytes(BYTES32),
                fetched.output_tokens,
            )
        finally:
            self._runtime.release(executor)


def are_draws(logits: Rows, sampling: SamplingParameters, first: int, tokens: Sequence[int], tolerance: float) -> bool:
    """Whether `tokens`, number `first` of the answer and those behind it, are draws from the first rows of `logits`."""
    try:
        return all(
            is_consistent_draw(row, sampling, first + index, token, tolerance)
            for index, (row, token) in enumerate(zip(logits, tokens))
        )
    except SamplingError:
        return False


def _handed_on(evidence: StageEvidence, outputs: Mapping[int, bytearray]) -> tuple[bytes, ...]:
    """The output bytes of each step of an inner stage. EvidenceInvalidError unless they open the digests."""
    found = []
    for step in evidence.steps:
        payload = bytes(outputs.get(step.step, b""))
        if step_digest(payload, step.position, step.rows) != step.output_digest:
            raise EvidenceInvalidError(f"the output bytes of step {step.step} are not those of the evidence")
        found.append(payload)
    return tuple(found)


def _draws(
    manifest: ModelManifest,
    header: execution_pb2.StageEvidence,
    evidence: StageEvidence,
    outputs: Mapping[int, bytearray],
) -> tuple[tuple[int, ...], ...]:
    """The tokens that the answer takes from the rows of each step of a last stage: drafts of the step before, then the
    newest token. EvidenceInvalidError unless `outputs` open the digests, and with them which rows were kept.
    """
    steps = evidence.steps
    kept = _kept(header, evidence)
    found = []
    drafts: tuple[int, ...] = ()
    for step, count in zip(steps, kept, strict=True):
        payload = bytes(outputs.get(step.step, b""))
        try:
            newest, *following = token_ids(payload)
        except ValueError as error:
            raise EvidenceInvalidError(f"the output of step {step.step} holds no token") from error
        rows = 1 + len(following)
        if step.step + 1 < len(steps) and steps[step.step + 1].rows != rows:
            raise EvidenceInvalidError(f"step {step.step} gave {rows} rows, the next has another number")
        if step_digest(payload, step.position + count, rows) != step.output_digest:
            raise EvidenceInvalidError(f"the output bytes of step {step.step} are not those of the evidence")
        # Of the prompt only the last row is drawn from.
        tokens = (*drafts[: count - 1], newest) if step.step else (newest,)
        if any(token in manifest.end_token_ids for token in tokens[:-1]) or (
            newest in manifest.end_token_ids and step is not steps[-1]
        ):
            raise EvidenceInvalidError(f"the answer goes on behind the end token that step {step.step} gave")
        found.append(tokens)
        drafts = tuple(following)
    return tuple(found)


def _kept(header: execution_pb2.StageEvidence, evidence: StageEvidence) -> tuple[int, ...]:
    opening = header.input
    try:
        return kept_rows(evidence, opening.prompt_tokens, header.output_tokens, opening.sampling.maximum_tokens)
    except ProtocolError as error:
        raise EvidenceInvalidError(str(error)) from error


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


def _statements_of(header: execution_pb2.StageEvidence) -> tuple[Statement, ...]:
    return tuple(
        Statement(item.stage, item.sent, item.step, bytes(item.chain), bytes(item.signature))
        for item in header.neighbour_statements[:MAXIMUM_STATEMENTS]
    )


def _check_header(header: execution_pb2.StageEvidence, case: _Case, stage: int) -> None:
    """Everything that can be checked before a byte of input is taken."""
    request, served = case.request, case.route[stage]
    root, sealed = bytes(header.evidence_root), bytes(header.sealed_sketch)
    if not len(root) == len(sealed) == BYTES32 or case.commitments[stage] != stage_commitment(
        case.request_id, 0, stage, served.node, root, sealed, header.output_tokens
    ):
        # Somebody who is not the executor may have answered at its address; the executor's own evidence may still come.
        raise Refusal(
            ErrorReason.ERROR_REASON_EVIDENCE_UNAVAILABLE, "the answer does not open the executor's commitment"
        )
    if len(header.steps) > request.maximum_tokens:
        raise EvidenceInvalidError(f"{len(header.steps)} steps, {request.maximum_tokens} answer tokens were paid")
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
    _kept(header, evidence)
    if opening.sampling.maximum_tokens > request.maximum_tokens:
        raise EvidenceInvalidError(f"the sampling parameters allow more than the {request.maximum_tokens} tokens paid")
    if max(step.position + step.rows for step in evidence.steps) > case.manifest.context_limit:
        raise EvidenceInvalidError("more positions than the model's context")
    if served.first_unit == 0 and evidence.steps[0].input_digest != opening.prompt_digest:
        raise EvidenceInvalidError("stage 0 executed another prompt than the request's")
