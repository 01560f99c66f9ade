"""Nodes that speak the real protocol over real gRPC and sign with real keys, but compute nothing: for tests of the
requester.

Stage 0 streams a fixed answer and relays the last stage's statement; all stages commit, reveal and show evidence of
the synthetic work of `recorded_network`. A desk routes requests, tallies and settles, as the coordinator would.
`Misbehaviour` says what one of them does wrong.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_status import rpc_status

from bsns.chain.errors import ContractError
from bsns.protocol import typed_data
from bsns.protocol.commitments import content_digest, extend_chain, input_commitment
from bsns.protocol.contract_states import RequestStatus
from bsns.protocol.identifiers import ZERO_HASH, RequestId, keccak256
from bsns.protocol.sampling import SamplingParameters
from bsns.v1 import common_pb2, execution_pb2, execution_pb2_grpc
from tests.integration.recorded_network import RecordedNetwork, RequestInFlight, StageWork, until

ANSWER = (21, 22, 23)


@dataclass
class Misbehaviour:
    """What goes wrong; all off by default."""

    refuse_at_stage: int | None = None
    forge_statement: bool = False
    swap_token: bool = False
    accept_too_many: bool = False
    accept_more_than_drafted: bool = False
    claim_more_tokens: bool = False
    break_stream_after: int | None = None
    silent_desk: bool = False
    commit_nothing: bool = False
    never_route: bool = False
    hide_evidence_at: int | None = None
    answer: tuple[int, ...] = ANSWER
    wait_for_close: bool = False


@dataclass
class SyntheticSwarm:
    """All nodes of a network, and the desk."""

    network: RecordedNetwork
    wrong: Misbehaviour = field(default_factory=Misbehaviour)
    opened: dict[bytes, execution_pb2.InputOpening] = field(default_factory=dict)
    shown: dict[int, bytes] = field(default_factory=dict)
    """By stage the prompt that it was shown when a session was opened."""
    flights: dict[bytes, RequestInFlight] = field(default_factory=dict)
    closed: set[bytes] = field(default_factory=set)
    closing: asyncio.Event = field(default_factory=asyncio.Event)
    _ended: dict[bytes, asyncio.Event] = field(default_factory=dict)

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[SyntheticSwarm]:
        """Serve all nodes on free ports, announce the ports on chain, and run the desk."""
        servers = []
        for number in range(self.network.stages):
            server = grpc.aio.server()
            execution_pb2_grpc.add_ShardExecutionServicer_to_server(SyntheticNode(self, number), server)
            health = HealthServicer()
            await health.set("", health_pb2.HealthCheckResponse.SERVING)
            health_pb2_grpc.add_HealthServicer_to_server(health, server)
            port = server.add_insecure_port("127.0.0.1:0")
            await server.start()
            servers.append(server)
            await self.network.send(
                self.network.operators[number],
                "NodeRegistry",
                "changeEndpoint",
                self.network.nodes[number].address,
                keccak256(b"certificate"),
                f"127.0.0.1:{port}",
            )
        desk = asyncio.create_task(self._desk())
        try:
            yield self
        finally:
            desk.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await desk
            await asyncio.gather(*(server.stop(0) for server in servers))

    def flight(self, request_id: bytes, opening: execution_pb2.InputOpening) -> RequestInFlight:
        """The synthetic work for a request, made of what its requester opened."""
        if request_id not in self.flights:
            sampling = opening.sampling
            flight = RequestInFlight(
                RequestId(request_id),
                0,
                b"",
                opening.salt,
                SamplingParameters(
                    sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed, sampling.maximum_tokens
                ),
                self.wrong.answer[: sampling.maximum_tokens],
            )
            flight.prompt_digest = opening.prompt_digest
            flight.prompt_tokens = opening.prompt_tokens
            flight.speculates = not self.wrong.wait_for_close
            flight.work = self.network.honest_work(flight)
            self.flights[request_id] = flight
        return self.flights[request_id]

    def ended(self, request_id: bytes) -> asyncio.Event:
        return self._ended.setdefault(request_id, asyncio.Event())

    async def _desk(self) -> None:
        """Route, commit, attest, reveal, tally, settle: each request by a task of its own."""
        network = self.network
        seen: set[bytes] = set()
        async with asyncio.TaskGroup() as tasks:
            while True:
                head = await network.client.head()
                for event in await network.client.events_between(0, head.number, name="RequestOpened"):
                    request_id = bytes(event.arguments["requestId"])
                    if request_id not in seen and not self.wrong.never_route:
                        seen.add(request_id)
                        tasks.create_task(self._accompany(request_id))
                await asyncio.sleep(0.05)

    async def _accompany(self, request_id: bytes) -> None:
        network = self.network
        request = await network.client.call("InferenceEscrow", "requestOf", request_id)
        if request.status == RequestStatus.OPEN:  # else its requester has routed it
            await network.route(RequestInFlight(RequestId(request_id), 0, b"", b"", SamplingParameters(), ()))
        await self.ended(request_id).wait()
        flight = self.flights[request_id]
        if self.wrong.commit_nothing:
            return
        await network.commit(flight)
        await network.anvil.mine(2)
        await self._phase(flight, 2)
        made = await network.attest(flight, 1) if (await self._verification(flight)).sampled else {}
        await network.reveal_stages(flight)
        await network.reveal_attestations(flight, made)
        if self.wrong.silent_desk:
            await network.anvil.pass_time(120)
            await self._phase(flight, 4)
            await network.anvil.pass_time(20)
            return
        await network.tally(flight)
        await network.anvil.pass_time(11)
        with contextlib.suppress(ContractError):
            await network.send(network.publisher, "OutputVerification", "settle", request_id)

    async def _phase(self, flight: RequestInFlight, phase: int) -> None:
        async def reached() -> bool:
            return bool((await self._verification(flight)).phase >= phase)

        await until(reached)

    async def _verification(self, flight: RequestInFlight) -> Any:
        return await self.network.client.call("OutputVerification", "verificationOf", flight.request_id)


class SyntheticNode(execution_pb2_grpc.ShardExecutionServicer):
    """The node of one stage."""

    def __init__(self, swarm: SyntheticSwarm, stage: int) -> None:
        self._swarm = swarm
        self._stage = stage
        self._signer = swarm.network.nodes[stage]
        deployment = swarm.network.deployment
        self._escrow = typed_data.escrow_domain(deployment.chain_id, deployment.inference_escrow)
        self._verification = typed_data.verification_domain(deployment.chain_id, deployment.output_verification)

    async def OpenSession(self, request: Any, context: Any) -> execution_pb2.OpenSessionResponse:
        if self._swarm.wrong.refuse_at_stage == self._stage:
            await refuse(context, "ERROR_REASON_CAPACITY_EXHAUSTED", "four sessions are open, try again later")
        opening = request.input
        sampling = opening.sampling
        digest = SamplingParameters(
            sampling.temperature, sampling.top_k, sampling.top_p, sampling.seed, sampling.maximum_tokens
        ).digest()
        commitment = input_commitment(opening.prompt_digest, opening.prompt_tokens, digest, opening.salt)
        onchain = await self._swarm.network.client.call("InferenceEscrow", "requestOf", request.request_id)
        if onchain.inputCommitment != commitment:
            await refuse(context, "ERROR_REASON_INPUT_COMMITMENT_MISMATCH", "the opening is not that of the request")
        await self._check_token(request.request_id, request.token, commitment, onchain.requester, context)
        self._swarm.opened[request.request_id] = opening
        self._swarm.shown[self._stage] = bytes(request.prompt)
        return execution_pb2.OpenSessionResponse(cache_bytes=1)

    async def CheckSession(self, request: Any, context: Any) -> execution_pb2.CheckSessionResponse:
        if request.request_id not in self._swarm.opened:
            await refuse(context, "ERROR_REASON_UNKNOWN_SESSION", "there is no such session here")
        return execution_pb2.CheckSessionResponse(steps=0)

    async def Forward(self, request_iterator: Any, context: Any) -> AsyncIterator[execution_pb2.ForwardResponse]:
        message = await anext(request_iterator)
        frame, wrong = message.frame, self._swarm.wrong
        request_id = frame.request_id
        opening = self._swarm.opened[request_id]
        assert frame.digest == content_digest(frame.payload) == opening.prompt_digest
        assert (frame.stage, frame.step, frame.position, frame.rows) == (0, 0, 0, opening.prompt_tokens)
        yield execution_pb2.ForwardResponse(
            receipt=self._statement(request_id, 0, False, 0, extend_chain(ZERO_HASH, frame.digest))
        )
        flight = self._swarm.flight(request_id, opening)
        sent = 0
        for step, (tokens, drafts) in enumerate(flight.steps):
            if wrong.break_stream_after == step:
                self._swarm.ended(request_id).set()
                await refuse(context, "ERROR_REASON_PEER_UNAVAILABLE", "stage 1 is gone")
            newest = tokens[-1] + 1 if wrong.swap_token and step == 1 else tokens[-1]
            accepted = len(tokens) - 1 + (wrong.accept_too_many and step == 1)
            if wrong.accept_more_than_drafted and step == 1:
                accepted = 9
            yield execution_pb2.ForwardResponse(
                output=execution_pb2.StepOutput(
                    request_id=request_id, step=step, accepted=accepted, token_ids=(newest, *drafts)
                )
            )
            sent += 1
            if wrong.wait_for_close and step == 1:
                await self._swarm.closing.wait()
                flight.answer = flight.answer[:sent]
                flight.work = self._swarm.network.honest_work(flight)
                break
        last = self._swarm.network.stages - 1
        chain = flight.work[last].evidence.steps[sent - 1].output_chain
        statement = self._statement(request_id, last, True, sent - 1, chain)
        if wrong.forge_statement:
            statement.signature = self._signer.sign_digest(keccak256(b"something else"))
        reason = (
            common_pb2.FINISH_REASON_CANCELLED
            if request_id in self._swarm.closed
            else common_pb2.FINISH_REASON_LENGTH
            if len(flight.answer) == opening.sampling.maximum_tokens
            else common_pb2.FINISH_REASON_STOP
        )
        self._swarm.ended(request_id).set()
        yield execution_pb2.ForwardResponse(
            ended=execution_pb2.SessionEnded(
                request_id=request_id,
                steps=sent,
                tokens=len(flight.answer) + wrong.claim_more_tokens,
                finish_reason=reason,
                statement=statement,
            )
        )
        await asyncio.sleep(0.5)  # the requester hangs up, not the node

    async def CloseSession(self, request: Any, context: Any) -> execution_pb2.CloseSessionResponse:
        self._swarm.closed.add(request.request_id)
        self._swarm.closing.set()
        return execution_pb2.CloseSessionResponse(steps=0)

    async def GetStageEvidence(self, request: Any, context: Any) -> AsyncIterator[Any]:
        if self._swarm.wrong.hide_evidence_at == self._stage:
            await refuse(context, "ERROR_REASON_EVIDENCE_UNAVAILABLE", "it was deleted")
        digest = typed_data.signing_digest(
            self._verification, typed_data.EVIDENCE_QUERY, (request.request_id, request.stage, request.deadline)
        )
        assert typed_data.is_signed_by(digest, request.signature, self._swarm.network.requester.address)
        assert not request.with_inputs
        work: StageWork = self._swarm.flights[request.request_id].work[request.stage]
        yield execution_pb2.GetStageEvidenceResponse(
            evidence=execution_pb2.StageEvidence(
                request_id=request.request_id,
                stage=request.stage,
                node=bytes.fromhex(self._signer.address[2:]),
                evidence_root=work.evidence.root,
                sealed_sketch=work.sealed,
                output_tokens=work.output_tokens,
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
                    for step in work.evidence.steps
                ],
            )
        )

    async def _check_token(
        self, request_id: bytes, token: Any, commitment: bytes, requester: str, context: Any
    ) -> None:
        digest = typed_data.signing_digest(
            self._escrow, typed_data.SESSION_TOKEN, (request_id, commitment, token.deadline)
        )
        if not typed_data.is_signed_by(digest, token.signature, requester):
            await refuse(context, "ERROR_REASON_SESSION_TOKEN_INVALID", "the requester did not sign it")

    def _statement(self, request_id: bytes, stage: int, sent: bool, step: int, chain: bytes) -> Any:
        values = (request_id, stage, sent, step, chain)
        digest = typed_data.signing_digest(self._verification, typed_data.HAND_OVER, values)
        return common_pb2.SignedHandOver(
            request_id=request_id,
            stage=stage,
            sent=sent,
            step=step,
            chain=chain,
            signature=self._swarm.network.nodes[stage].sign_digest(digest),
        )


async def refuse(context: Any, reason: str, detail: str) -> None:
    """End a call as real nodes do."""
    info = any_pb2.Any()
    info.Pack(error_details_pb2.ErrorInfo(reason=reason, domain="bsns"))
    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    status = status_pb2.Status(code=code.value[0], message=detail, details=[info])
    await context.abort_with_status(rpc_status.to_status(status))
