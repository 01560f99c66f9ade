"""A real Anvil with the real contracts, nodes in this process over a tiny random Llama, and a requester that speaks
the wire by hand.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio

from bsns.chain.client import Web3ChainClient
from bsns.chain.deployment import ETHER, Deployment, EscrowTerms, RegistryTerms, Terms, VerificationTerms, deploy
from bsns.chain.signer import KeySigner
from bsns.chain.submitter import Submitter
from bsns.protocol.commitments import input_commitment, secret_hash
from bsns.protocol.contract_states import Phase
from bsns.protocol.endpoints import split_endpoint
from bsns.protocol.identifiers import ZERO_HASH, ModelId, RequestId, keccak256, model_id, request_id
from bsns.protocol.manifest import EXPORTED, ModelManifest
from bsns.protocol.plan import Assignment, ShardPlan, execution_class_id
from bsns.protocol.sampling import SamplingParameters
from bsns.protocol.typed_data import PLAN_CONSENT, SESSION_TOKEN, signing_digest
from bsns.requester.request_input import RequestInput
from bsns.runtime.executor import open_stage
from bsns.runtime.prepare import ModelSource
from bsns.v1 import common_pb2, execution_pb2
from node_client.chain_view import SigningDomains
from node_client.peers import shard_execution
from node_client.service import NodeService, Ready, open_keystore
from node_client.session_store import sampling_to_message
from node_client.settings import NodeSettings
from node_client.shard_runtime import ExecutorFactory
from tests.anvil import Anvil, running_anvil
from tests.unit.runtime_models import silent, tiny_llama, tiny_source

EXECUTION_CLASS = "torch-cpu/float32/sdpa"
EXPORTED_CLASS = "torch-cpu/float32/aten"
FEE = 10**12
PATIENCE_S = 60.0


def named_key(name: str) -> KeySigner:
    return KeySigner(keccak256(name.encode()))


async def until(condition: Callable[[], Awaitable[Any]], what: str, patience_s: float = PATIENCE_S) -> Any:
    """The first true answer of `condition`, asked again until a deadline."""
    deadline = time.monotonic() + patience_s
    while True:
        value = await condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"{what}: not within {patience_s} s"
        await asyncio.sleep(0.1)


@dataclass
class OpenedRequest:
    """A request on chain with everything its requester knows."""

    id: RequestId
    given: RequestInput
    sampling: SamplingParameters
    salt: bytes
    secret: bytes
    commitment: bytes
    plan: ShardPlan

    @property
    def encoding(self) -> common_pb2.TensorEncoding.ValueType:
        if self.given.encoding == "float32":
            return common_pb2.TENSOR_ENCODING_RAW_FLOAT32
        return common_pb2.TENSOR_ENCODING_TOKEN_IDS


@dataclass
class Answer:
    """What a requester saw on its stream: `outputs` step by step, `tokens` of the answer that is in them."""

    outputs: list[execution_pb2.StepOutput] = field(default_factory=list)
    ended: execution_pb2.SessionEnded | None = None
    rejected: execution_pb2.StepRejected | None = None
    receipts: list[common_pb2.SignedHandOver] = field(default_factory=list)

    @property
    def tokens(self) -> list[int]:
        found: list[int] = []
        drafts: Sequence[int] = ()
        for output in self.outputs:
            newest, *following = output.token_ids
            assert output.accepted <= len(drafts)
            found += (*drafts[: output.accepted], newest)
            drafts = following
        return found

    @property
    def drafted(self) -> int:
        """Drafts that were computed: those of the last output are nobody's input."""
        return sum(len(output.token_ids) - 1 for output in self.outputs[:-1])

    @property
    def accepted(self) -> int:
        return sum(output.accepted for output in self.outputs)


@dataclass
class Network:
    """One chain, one model, some nodes."""

    anvil: Anvil
    folder: Path
    deployment: Deployment
    client: Web3ChainClient
    manifest: ModelManifest
    cache: Path
    stack: contextlib.AsyncExitStack
    publisher: KeySigner
    requester: KeySigner
    model: Any
    plan: ShardPlan | None = None
    password: str | None = None
    services: dict[str, NodeService] = field(default_factory=dict)
    nonce: int = 0

    @property
    def model_id(self) -> ModelId:
        return model_id(self.manifest.manifest_hash, self.manifest.weight_root, len(self.manifest.units))

    @property
    def domains(self) -> SigningDomains:
        return SigningDomains.of(self.deployment)

    @property
    def deployment_file(self) -> Path:
        return self.folder / "deployment.json"

    async def fund(self, account: str, coins: int = 100) -> None:
        await self.anvil.rpc("anvil_setBalance", account, hex(coins * ETHER))

    def settings(self, name: str, **changed: Any) -> NodeSettings:
        operator_file = self.folder / f"{name}.operator"
        if not operator_file.exists():
            operator_file.touch(mode=0o600)
            operator_file.write_text(keccak256(f"operator {name}".encode()).hex())
        values: dict[str, Any] = {
            "rpc_url": self.anvil.rpc_url,
            "deployment": self.deployment_file,
            "data_dir": self.folder / name,
            "model_cache": self.cache,
            "listen": "127.0.0.1:0",
            "stake_wei": 2 * ETHER,
            "operator_key_file": operator_file,
            "keystore_scrypt_cost": 2,
            "chain_poll_seconds": 0.2,
            "evidence_retry_seconds": 0.2,
            "drain_seconds": 2.0,
            "reexecution_rows": 7,
            "session_linger_seconds": 5.0,
            "peer_retry_seconds": 1.0,
            "password": self.password,
        }
        return NodeSettings(**{**values, **changed})

    async def start_node(
        self, name: str, *, executor_factory: ExecutorFactory = open_stage, **changed: Any
    ) -> tuple[NodeService, Ready]:
        """A running node; stopped with the network, or with `service.stop`."""
        await self.fund(named_key(f"operator {name}").address)
        service = NodeService(self.settings(name, **changed), executor_factory=executor_factory)
        ready = await self.stack.enter_async_context(service.running())
        self.services[name] = service
        return service, ready

    async def until_active(self, *nodes: str) -> None:
        async def all_active() -> bool:
            return all([await self.client.call("NodeRegistry", "statusOf", node) == 2 for node in nodes])

        await until(all_active, "nodes active")

    async def publish_plan(
        self, stages: Sequence[tuple[str, int, int]], execution_class: str | None = None
    ) -> ShardPlan:
        """A plan of (name of the node, first unit, end unit), where equal ranges are replicas of one stage; waits until
        it is in effect.
        """
        if execution_class is None:
            execution_class = EXPORTED_CLASS if self.manifest.architecture == EXPORTED else EXECUTION_CLASS
        signers = [open_keystore(self.settings(name)).node_signer() for name, _, _ in stages]
        ranges = [(first, end) for _, first, end in stages]
        starts = list(dict.fromkeys(ranges))
        plan = ShardPlan(
            len(self.manifest.units),
            tuple(
                Assignment(
                    starts.index(units),
                    number - ranges.index(units),
                    *units,
                    signers[number].address,
                    units[1] - units[0],
                    execution_class_id(execution_class),
                )
                for number, units in enumerate(ranges)
            ),
        )
        epoch = await self.client.call("ShardAssignments", "nextEpoch", self.model_id, self.publisher.address)
        deadline = (await self.client.head()).timestamp + 600
        digest = signing_digest(
            self.domains.assignments,
            PLAN_CONSENT,
            (self.model_id, self.publisher.address, epoch, FEE, ZERO_HASH, plan.root, deadline),
        )
        await Submitter(self.client, self.publisher).submit(
            "ShardAssignments",
            "publishPlan",
            self.model_id,
            epoch,
            FEE,
            ZERO_HASH,
            [item.as_tuple() for item in plan.assignments],
            deadline,
            [signer.sign_digest(digest) for signer in signers],
        )

        async def in_effect() -> bool:
            plan_id = await self.client.call("ShardAssignments", "activePlan", self.model_id, self.publisher.address)
            if plan_id == ZERO_HASH:
                return False
            return bool((await self.client.call("ShardAssignments", "planOf", plan_id)).root == plan.root)

        await until(in_effect, "plan in effect")
        return plan

    async def open_request(
        self, plan: ShardPlan, prompt: Sequence[int] | RequestInput, sampling: SamplingParameters, *, route: bool = True
    ) -> OpenedRequest:
        self.nonce += 1
        given = prompt if isinstance(prompt, RequestInput) else RequestInput.of_tokens(prompt)
        salt, secret = secrets.token_bytes(32), secrets.token_bytes(32)
        commitment = input_commitment(given.digest, given.rows, sampling.digest(), salt)
        plan_id = await self.client.call("ShardAssignments", "activePlan", self.model_id, self.publisher.address)
        quote = await self.client.call("InferenceEscrow", "quote", plan_id, given.rows, sampling.maximum_tokens)
        await Submitter(self.client, self.requester).submit(
            "InferenceEscrow",
            "open",
            plan_id,
            self.nonce,
            commitment,
            secret_hash(secret),
            given.rows,
            sampling.maximum_tokens,
            value=quote,
        )
        opened = OpenedRequest(
            request_id(self.deployment.chain_id, self.deployment.inference_escrow, self.requester.address, self.nonce),
            given,
            sampling,
            salt,
            secret,
            commitment,
            plan,
        )
        if route:
            await self.route(opened)
        return opened

    async def route(self, opened: OpenedRequest) -> None:
        assignments = [opened.plan.replicas(stage)[0] for stage in range(opened.plan.stage_count)]
        await Submitter(self.client, self.publisher).submit(
            "InferenceEscrow",
            "route",
            opened.id,
            [item.as_tuple() for item in assignments],
            [list(opened.plan.proof(item)) for item in assignments],
        )

    def token(
        self, opened: OpenedRequest, *, signer: KeySigner | None = None, lifetime: int = 600
    ) -> execution_pb2.SessionToken:
        deadline = int(time.time()) + lifetime
        digest = signing_digest(self.domains.escrow, SESSION_TOKEN, (opened.id, opened.commitment, deadline))
        return execution_pb2.SessionToken(deadline=deadline, signature=(signer or self.requester).sign_digest(digest))

    def session_request(self, opened: OpenedRequest, stage: int) -> execution_pb2.OpenSessionRequest:
        is_last = stage == opened.plan.stage_count - 1
        return execution_pb2.OpenSessionRequest(
            request_id=opened.id,
            stage=stage,
            token=self.token(opened),
            prompt=opened.given.data if is_last and opened.given.tokens else b"",
            input=execution_pb2.InputOpening(
                prompt_digest=opened.given.digest,
                prompt_tokens=opened.given.rows,
                sampling=sampling_to_message(opened.sampling),
                salt=opened.salt,
            ),
        )

    def prompt_frame(self, opened: OpenedRequest, **changed: Any) -> execution_pb2.ForwardRequest:
        payload = opened.given.data
        values: dict[str, Any] = {
            "request_id": opened.id,
            "stage": 0,
            "step": 0,
            "position": 0,
            "rows": opened.given.rows,
            "encoding": opened.encoding,
            "frame_index": 0,
            "frame_count": 1,
            "payload": payload,
            "digest": opened.given.digest,
        }
        return execution_pb2.ForwardRequest(frame=execution_pb2.StepFrame(**{**values, **changed}))

    @contextlib.asynccontextmanager
    async def stub(self, name: str) -> AsyncIterator[Any]:
        ready = self.services[name].ready
        assert ready is not None
        async with grpc.aio.insecure_channel(ready.endpoint) as channel:
            yield shard_execution(channel)

    async def open_sessions(self, opened: OpenedRequest, names: Sequence[str]) -> None:
        for stage, name in enumerate(names):
            async with self.stub(name) as stub:
                await stub.OpenSession(self.session_request(opened, stage), timeout=20)

    async def ask(self, opened: OpenedRequest, names: Sequence[str]) -> Answer:
        """Open all sessions, send the prompt, read until the end."""
        await self.open_sessions(opened, names)
        async with self.stub(names[0]) as stub:
            call = stub.Forward(timeout=60)
            await call.write(self.prompt_frame(opened))
            answer = await read_answer(call)
            await call.done_writing()
            call.cancel()
            return answer

    async def until_refused(self, name: str) -> None:
        """Until nobody listens at the node's endpoint."""
        ready = self.services[name].ready
        assert ready is not None
        host, port = split_endpoint(ready.endpoint)

        async def refused() -> bool:
            try:
                _, writer = await asyncio.open_connection(host, port)
            except OSError:
                return True
            writer.close()
            return False

        await until(refused, f"{name} stopped")

    async def draw(self, opened: OpenedRequest) -> None:
        """Reveal the requester's secret once all stages have committed."""

        async def awaiting() -> bool:
            view = await self.client.call("OutputVerification", "verificationOf", opened.id)
            return bool(view.phase == Phase.AWAITING_DRAW)

        await until(awaiting, "all stages committed")
        view = await self.client.call("OutputVerification", "verificationOf", opened.id)

        async def past_entropy() -> bool:
            return (await self.client.head()).number > view.entropyBlock

        await until(past_entropy, "entropy block")
        await Submitter(self.client, self.requester).submit(
            "OutputVerification", "drawCommittee", opened.id, opened.secret
        )

    async def stage_events(self, opened: OpenedRequest, name: str) -> list[Any]:
        head = await self.client.head()
        return list(
            await self.client.events_between(
                self.deployment.first_block,
                head.number,
                contract="OutputVerification",
                name=name,
                filters={"requestId": opened.id},
            )
        )


async def read_answer(call: Any, *, stop_after: int | None = None, before: Answer | None = None) -> Answer:
    """Read a requester's stream until it ended, was rejected, or gave `stop_after` tokens; goes on with `before`."""
    answer = before or Answer()
    while True:
        message = await call.read()
        if message is grpc.aio.EOF:
            return answer
        match message.WhichOneof("body"):
            case "output":
                assert message.output.step == len(answer.outputs)
                answer.outputs.append(message.output)
                if stop_after is not None and len(answer.tokens) >= stop_after:
                    return answer
            case "receipt":
                answer.receipts.append(message.receipt)
            case "rejected":
                answer.rejected = message.rejected
                return answer
            case "ended":
                answer.ended = message.ended
                return answer


def short_terms(**verification: Any) -> Terms:
    """Short windows; every request has a committee of everybody who may sit."""
    chosen: dict[str, Any] = {
        "sampling_rate_bps": 10_000,
        "committee_seats": 16,
        "minimum_reveals": 1,
        "secret_window": 60,
        "attest_window": 60,
        "reveal_window": 60,
        "challenge_window": 2,
        "jail_period": 3_600,
    }
    return Terms(
        registry=RegistryTerms(activation_delay=1, thaw_period=20_000),
        escrow=EscrowTerms(route_window=120, commit_window=600, verification_window=10_000),
        verification=VerificationTerms(**{**chosen, **verification}),
        tabs=Terms.for_devnet().tabs,
        plan_activation_delay=1,
    )


@contextlib.asynccontextmanager
async def running_network(
    folder: Path, terms: Terms | None = None, *, model: Any = None, source: ModelSource | None = None
) -> AsyncIterator[Network]:
    """Anvil with blocks of one second, contracts, a registered tiny model (a Llama, or `model` as `source` writes it);
    no nodes yet.
    """
    model = model or tiny_llama()
    home = folder / "cache" / "models" / "tiny" / "only"
    home.mkdir(parents=True)
    manifest = (source or tiny_source(model)).write("tiny", home, silent)
    async with running_anvil("--block-time", "1", "--prune-history") as anvil, contextlib.AsyncExitStack() as stack:
        deployer, publisher, requester = (named_key(name) for name in ("deployer", "publisher", "requester"))
        for signer in (deployer, publisher, requester):
            await anvil.rpc("anvil_setBalance", signer.address, hex(1_000 * ETHER))
        deployment = await deploy(anvil.rpc_url, deployer, terms or short_terms())
        deployment.save(folder / "deployment.json")
        client = await stack.enter_async_context(await Web3ChainClient.connect(anvil.rpc_url, deployment))
        await Submitter(client, publisher).submit(
            "ShardAssignments",
            "registerModel",
            manifest.manifest_hash,
            manifest.weight_root,
            len(manifest.units),
            "tiny",
        )
        async with contextlib.AsyncExitStack() as nodes:
            yield Network(
                anvil, folder, deployment, client, manifest, folder / "cache", nodes, publisher, requester, model
            )
