"""A small network on an Anvil of its own, driven step by step with synthetic evidence: what the tests of records and
of the requester need.

No model runs: a stage's output is the hash of its input, its sketch a function of the request. Everything on chain is
real. Blocks come with each transaction, and time is moved by hand, so that windows of minutes pass at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from bsns.chain.client import ChainClient, Receipt, Web3ChainClient
from bsns.chain.deployment import ETHER, Deployment, EscrowTerms, RegistryTerms, Terms, VerificationTerms, deploy
from bsns.chain.patient_client import PatientChainClient
from bsns.chain.signer import KeySigner
from bsns.chain.submitter import Submitter
from bsns.protocol import commitments, identifiers, typed_data
from bsns.protocol.commitments import EvidenceBuilder, StageEvidence, content_digest, step_digest, token_bytes
from bsns.protocol.identifiers import ModelId, RequestId, keccak256
from bsns.protocol.plan import Assignment, ShardPlan, execution_class_id
from bsns.protocol.record import (
    Disclosure,
    RecordedEvidence,
    RecordedInput,
    RecordedSampling,
    RecordedStep,
    RecordedTokens,
)
from bsns.protocol.sampling import SamplingParameters
from tests.anvil import Anvil, running_anvil

REPOSITORY = Path(__file__).resolve().parents[2]
PATIENCE_S = 10.0
CLASS = execution_class_id("torch-cpu/float32/sdpa")
PROMPT = (11, 12, 13, 14, 15)
FEE_PER_TOKEN = 10**15
REJECTED_DRAFT = 999


async def until(condition: Callable[[], Awaitable[object]], timeout_s: float = 30.0) -> None:
    """Wait until `condition` holds; TimeoutError if it does not in time."""
    async with asyncio.timeout(timeout_s):
        while True:
            if await condition():
                return
            await asyncio.sleep(0.02)


def quick_terms(*, sampling_rate_bps: int = 10_000, tolerance: int = 96) -> Terms:
    """Short windows, one reveal decides, everybody is seated."""
    return Terms(
        registry=RegistryTerms(activation_delay=1, thaw_period=20_000),
        escrow=EscrowTerms(route_window=60, commit_window=300, verification_window=10_000),
        verification=VerificationTerms(
            sampling_rate_bps=sampling_rate_bps,
            committee_seats=8,
            minimum_reveals=1,
            tolerance=tolerance,
            secret_window=20,
            attest_window=40,
            reveal_window=30,
            challenge_window=10,
            jail_period=60,
        ),
        tabs=Terms.for_devnet().tabs,
        plan_activation_delay=1,
    )


def key(name: str) -> KeySigner:
    return KeySigner(keccak256(name.encode()))


@dataclass(frozen=True)
class StageWork:
    """What one executor computed, and how it opens its commitment."""

    stage: int
    evidence: StageEvidence
    sketch: bytes
    salt: bytes
    output_tokens: int

    @property
    def sealed(self) -> bytes:
        return commitments.sealed_sketch(self.sketch, self.salt)

    def commitment(self, request_id: RequestId, round_: int, node: str) -> bytes:
        return commitments.stage_commitment(
            request_id, round_, self.stage, node, self.evidence.root, self.sealed, self.output_tokens
        )


@dataclass
class RequestInFlight:
    """The requester's side of a request, and the honest work for it."""

    request_id: RequestId
    nonce: int
    secret: bytes
    salt: bytes
    sampling: SamplingParameters
    answer: tuple[int, ...]
    work: list[StageWork] = field(default_factory=list)
    prompt_digest: bytes = content_digest(token_bytes(PROMPT))
    prompt_tokens: int = len(PROMPT)
    speculates: bool = True

    @property
    def steps(self) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
        """For each step the tokens it gives and the drafts behind them: of the two after the first, one is right."""
        answer = self.answer
        if not self.speculates or len(answer) < 3:
            return [((token,), ()) for token in answer]
        return [(answer[:1], (answer[1], REJECTED_DRAFT)), (answer[1:3], ()), *(((token,), ()) for token in answer[3:])]

    def disclosure(self, *, tokens: bool = True) -> Disclosure:
        sampling = self.sampling
        return Disclosure(
            self.nonce,
            RecordedInput(
                content_digest(token_bytes(PROMPT)),
                len(PROMPT),
                RecordedSampling(
                    round(sampling.temperature * 1e6),
                    sampling.top_k,
                    round(sampling.top_p * 1e6),
                    sampling.seed,
                    sampling.maximum_tokens,
                ),
                sampling.digest(),
                self.salt,
            ),
            RecordedTokens(PROMPT, self.answer, tuple(drafts for _, drafts in self.steps)) if tokens else None,
            tuple(
                RecordedEvidence(
                    item.stage,
                    item.evidence.root,
                    item.sealed,
                    item.output_tokens,
                    tuple(RecordedStep.of(step) for step in item.evidence.steps),
                )
                for item in self.work
            ),
        )


class RecordedNetwork:
    """Contracts, four nodes, a plan of three stages, a requester; every step of a request as a method."""

    def __init__(self, anvil: Anvil, client: ChainClient, deployment: Deployment, stages: int) -> None:
        self.anvil = anvil
        self.client = client
        self.deployment = deployment
        self.stages = stages
        self.publisher = key("publisher")
        self.requester = key("requester")
        self.nodes = [key(f"node {number}") for number in range(stages + 1)]
        self.operators = [key(f"operator {number}") for number in range(stages + 1)]
        self.plan = ShardPlan(
            stages,
            tuple(
                Assignment(stage, 0, stage, stage + 1, self.nodes[stage].address, 10 + stage, CLASS)
                for stage in range(stages)
            ),
        )
        self.model_id = ModelId(bytes(32))
        self.plan_id = b""
        self._submitters: dict[str, Submitter] = {}
        self._requests = 0

    @classmethod
    @contextlib.asynccontextmanager
    async def running(
        cls, terms: Terms | None = None, *, stages: int = 3, archive: bool = False
    ) -> AsyncIterator[RecordedNetwork]:
        """Deployed, registered, planned and active; with `archive` the states of old blocks are kept."""
        async with running_anvil(*(() if archive else ("--prune-history",))) as anvil:
            deployer = key("deployer")
            accounts = [deployer.address, key("publisher").address, key("requester").address, key("challenger").address]
            for number in range(stages + 1):
                accounts += [key(f"node {number}").address, key(f"operator {number}").address]
            for account in accounts:
                await anvil.rpc("anvil_setBalance", account, hex(1_000 * ETHER))
            deployment = await deploy(anvil.rpc_url, deployer, terms or quick_terms())
            async with await Web3ChainClient.connect(anvil.rpc_url, deployment) as client:
                # Anvil may prune the block that a read was just resolved to.
                network = cls(anvil, PatientChainClient(client, PATIENCE_S), deployment, stages)
                await network._register()
                await network._publish()
                await anvil.pass_time(5)
                yield network

    async def send(self, signer: KeySigner, contract: str, function: str, *arguments: Any, value: int = 0) -> Receipt:
        submitter = self._submitters.setdefault(signer.address, Submitter(self.client, signer))
        return await submitter.submit(contract, function, *arguments, value=value)

    async def _register(self) -> None:
        deadline = (await self.client.head()).timestamp + 3_600
        domain = typed_data.registry_domain(self.deployment.chain_id, self.deployment.node_registry)
        for number, (node, operator) in enumerate(zip(self.nodes, self.operators)):
            endpoint, certificate = f"127.0.0.1:{40_000 + number}", keccak256(b"certificate %d" % number)
            proof = node.sign_digest(
                typed_data.signing_digest(
                    domain,
                    typed_data.NODE_KEY_PROOF,
                    (operator.address, node.address, certificate, endpoint, deadline),
                )
            )
            await self.send(
                operator,
                "NodeRegistry",
                "register",
                node.address,
                certificate,
                endpoint,
                deadline,
                proof,
                value=(2 + number) * ETHER,
            )

    async def _publish(self) -> None:
        manifest_hash, weight_root = keccak256(b"manifest"), keccak256(b"weights")
        await self.send(
            self.publisher, "ShardAssignments", "registerModel", manifest_hash, weight_root, self.stages, "toy"
        )
        self.model_id = identifiers.model_id(manifest_hash, weight_root, self.stages)
        await self.publish_plan(1, self.plan)

    async def publish_plan(self, epoch: int, plan: ShardPlan, fee: int = FEE_PER_TOKEN) -> None:
        deadline = (await self.client.head()).timestamp + 3_600
        domain = typed_data.assignments_domain(self.deployment.chain_id, self.deployment.shard_assignments)
        values = (self.model_id, self.publisher.address, epoch, fee, keccak256(b"measured"), plan.root, deadline)
        digest = typed_data.signing_digest(domain, typed_data.PLAN_CONSENT, values)
        keys = {item.address: item for item in self.nodes}
        await self.send(
            self.publisher,
            "ShardAssignments",
            "publishPlan",
            self.model_id,
            epoch,
            fee,
            keccak256(b"measured"),
            [item.as_tuple() for item in plan.assignments],
            deadline,
            [keys[item.node].sign_digest(digest) for item in plan.assignments],
        )
        self.plan_id = identifiers.plan_id(
            self.deployment.chain_id,
            self.deployment.shard_assignments,
            self.publisher.address,
            self.model_id,
            epoch,
        )

    # ----------------------------------------------------------------------------------------------- steps of a request

    async def open(self, answer: Sequence[int] = (21, 22, 23), maximum_tokens: int = 8) -> RequestInFlight:
        self._requests += 1
        number = self._requests
        sampling = SamplingParameters(
            temperature=0.7, top_k=40, top_p=0.9, seed=2**63 + 5, maximum_tokens=maximum_tokens
        )
        request = RequestInFlight(
            identifiers.request_id(
                self.deployment.chain_id, self.deployment.inference_escrow, self.requester.address, 2**90 + number
            ),
            2**90 + number,
            keccak256(b"secret %d" % number),
            keccak256(b"salt %d" % number),
            sampling,
            tuple(answer),
        )
        commitment = commitments.input_commitment(
            content_digest(token_bytes(PROMPT)), len(PROMPT), sampling.digest(), request.salt
        )
        fee = await self.client.call("InferenceEscrow", "quote", self.plan_id, len(PROMPT), maximum_tokens)
        await self.send(
            self.requester,
            "InferenceEscrow",
            "open",
            self.plan_id,
            request.nonce,
            commitment,
            commitments.secret_hash(request.secret),
            len(PROMPT),
            maximum_tokens,
            value=fee,
        )
        request.work = self.honest_work(request)
        return request

    def honest_work(self, request: RequestInFlight) -> list[StageWork]:
        """Evidence of all stages around the ring."""
        builders = [EvidenceBuilder() for _ in range(self.stages)]
        received = request.prompt_digest
        position, rows = 0, request.prompt_tokens
        for tokens, drafts in request.steps:
            next_position = position + (len(tokens) if position else rows)
            handed_on = step_digest(token_bytes((tokens[-1], *drafts)), next_position, 1 + len(drafts))
            for stage, builder in enumerate(builders):
                sent = handed_on if stage == self.stages - 1 else hashlib.sha256(received).digest()
                builder.add(rows, received, sent, keccak256(received)[:8], position=position)
                received = sent
            position, rows = next_position, 1 + len(drafts)
        return [
            StageWork(
                stage,
                builder.finish(),
                keccak256(request.request_id + b"sketch %d" % stage),
                keccak256(request.request_id + b"seal %d" % stage),
                len(request.answer),
            )
            for stage, builder in enumerate(builders)
        ]

    async def route(self, request: RequestInFlight) -> None:
        proofs = [list(self.plan.proof(item)) for item in self.plan.assignments]
        await self.send(
            self.publisher,
            "InferenceEscrow",
            "route",
            request.request_id,
            [item.as_tuple() for item in self.plan.assignments],
            proofs,
        )

    async def commit(self, request: RequestInFlight, work: Sequence[StageWork] | None = None) -> None:
        for item in work or request.work:
            node = self.nodes[item.stage]
            commitment = item.commitment(request.request_id, 0, node.address)
            await self.send(node, "OutputVerification", "commitStage", request.request_id, item.stage, commitment)

    async def draw(self, request: RequestInFlight) -> None:
        await self.anvil.mine(2)
        await self.send(self.requester, "OutputVerification", "drawCommittee", request.request_id, request.secret)

    def attestation(self, request: RequestInFlight, round_: int, stage: int, number: int, **changes: Any) -> StageWork:
        """Member `number`'s own result: an honest sketch, one unit off in one coordinate."""
        honest = request.work[stage]
        sketch = bytearray(honest.sketch)
        sketch[number] = (sketch[number] + 1) % 256
        salt = keccak256(honest.salt + bytes([round_, number]))
        return replace(honest, **{"sketch": bytes(sketch), "salt": salt, **changes})

    async def attest(
        self, request: RequestInFlight, round_: int, changes: dict[tuple[int, int], dict[str, Any]] | None = None
    ) -> dict[tuple[int, int], StageWork]:
        """Every seated node attests for every stage where it sits; `changes` by (stage, node number). Returns what it
        will reveal.
        """
        made: dict[tuple[int, int], StageWork] = {}
        for number, node in enumerate(self.nodes):
            stages = [
                stage
                for stage in range(self.stages)
                if await self.client.call("OutputVerification", "isSeated", request.request_id, stage, node.address)
            ]
            if not stages:
                continue
            for stage in stages:
                extra = (changes or {}).get((stage, number), {})
                made[stage, number] = self.attestation(request, round_, stage, number, **extra)
            sealed = [made[stage, number].commitment(request.request_id, round_, node.address) for stage in stages]
            await self.send(node, "OutputVerification", "commitAttestations", request.request_id, stages, sealed)
        return made

    async def reveal_stages(self, request: RequestInFlight, work: Sequence[StageWork] | None = None) -> None:
        for item in work or request.work:
            await self._reveal(self.nodes[item.stage], "revealStage", request, item)

    async def reveal_attestations(self, request: RequestInFlight, made: dict[tuple[int, int], StageWork]) -> None:
        for (_, number), item in made.items():
            await self._reveal(self.nodes[number], "revealAttestation", request, item)

    async def _reveal(self, node: KeySigner, function: str, request: RequestInFlight, item: StageWork) -> None:
        await self.send(
            node,
            "OutputVerification",
            function,
            request.request_id,
            item.stage,
            item.evidence.root,
            item.sketch,
            item.output_tokens,
            item.salt,
        )

    async def tally(self, request: RequestInFlight, stages: Sequence[int] | None = None, medoid: int = 0) -> None:
        for stage in stages if stages is not None else range(self.stages):
            await self.send(self.publisher, "OutputVerification", "tally", request.request_id, stage, medoid)

    async def settle(self, request: RequestInFlight) -> None:
        await self.anvil.pass_time(11)
        await self.send(self.publisher, "OutputVerification", "settle", request.request_id)

    async def honest_request(self) -> RequestInFlight:
        """From open to settled; everybody honest."""
        request = await self.open()
        await self.route(request)
        await self.commit(request)
        await self.draw(request)
        verification = await self.client.call("OutputVerification", "verificationOf", request.request_id)
        made = await self.attest(request, 1) if verification.sampled else {}
        await self.reveal_stages(request)
        await self.reveal_attestations(request, made)
        await self.tally(request)
        await self.settle(request)
        return request

    async def cheated_request(self, cheat: int = 1) -> RequestInFlight:
        """Stage `cheat` computed something else: two committees find it, it is slashed, the requester refunded."""
        request = await self.open()
        opposite = bytes((value + 128) % 256 for value in request.work[cheat].sketch)
        work = [replace(item, sketch=opposite) if item.stage == cheat else item for item in request.work]
        await self.route(request)
        await self.commit(request, work)
        await self.draw(request)
        made = await self.attest(request, 1)
        await self.reveal_stages(request, work)
        await self.reveal_attestations(request, made)
        await self.tally(request)
        made = await self.attest(request, 2)
        await self.reveal_attestations(request, made)
        await self.tally(request, [cheat])
        request.work = work
        return request
