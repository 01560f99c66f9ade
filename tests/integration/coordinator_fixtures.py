"""What the coordinator's integration tests share: databases of both kinds, a deployed network, nodes that only speak
the protocol.

Owns a private PostgreSQL cluster (in a temporary folder, as an unprivileged user, ended by pg_ctl) and the scripted
nodes: they stake, attach, measure, consent, commit and reveal as real ones do, but execute nothing.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from bsns.chain.client import Web3ChainClient
from bsns.chain.deployment import ETHER, Deployment, Terms, deploy
from bsns.chain.signer import KeySigner
from bsns.chain.submitter import Submitter
from bsns.protocol.commitments import sealed_sketch, secret_hash, stage_commitment
from bsns.protocol.identifiers import ModelId, RequestId, address, request_id
from bsns.protocol.manifest import ModelFile, ModelManifest, ShardUnit
from bsns.protocol.measurements import NodeMeasurements, UnitTiming
from bsns.protocol.plan import Assignment, ShardPlan, execution_class_id
from bsns.protocol.typed_data import (
    ATTACH_PROOF,
    NODE_KEY_PROOF,
    PLAN_CONSENT,
    assignments_domain,
    registry_domain,
    signing_digest,
)
from bsns.v1 import coordination_pb2, coordination_pb2_grpc
from coordinator.storage import migrate
from tests.anvil import Anvil

EXECUTION_CLASS = execution_class_id("scripted/none")
READY_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 20.0
FEE_PER_TOKEN = 10**12


# ------------------------------------------------------------------------------------------------------------ databases


def _postgresql_programs() -> Path:
    """Folder of initdb and pg_ctl; the test fails with what to do if they are nowhere and cannot be installed."""
    versions = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    found = shutil.which("initdb")
    for folder in (*versions, *([Path(found).resolve().parent] if found else [])):
        if all(os.access(folder / name, os.X_OK) for name in ("initdb", "pg_ctl", "postgres")):
            return folder
    pytest.fail("there is no PostgreSQL here: `apt-get install postgresql` (the tests start a private cluster of it)")


def _unprivileged() -> dict[str, Any]:
    """PostgreSQL refuses to run as root: become `postgres` or `nobody` then."""
    if os.geteuid() != 0:
        return {}
    import pwd

    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            entry = pwd.getpwnam(name)
            return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}
    pytest.fail("PostgreSQL does not run as root, and there is no user postgres or nobody to run it as")


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[str]:
    """URL of a private cluster without a database name, reachable by a socket in its folder alone."""
    programs, user = _postgresql_programs(), _unprivileged()
    folder = Path(tempfile.mkdtemp(prefix="bsns-postgresql-"))
    if user:
        os.chown(folder, user["user"], user["group"])
    data = folder / "data"
    environment = {**os.environ, "LC_ALL": "C", "HOME": str(folder)}

    def run(*command: str) -> None:
        # pg_ctl's server keeps our pipes open, so its output goes to a file.
        with (folder / "output").open("ab") as sink:
            result = subprocess.run(
                command, cwd=folder, env=environment, stdout=sink, stderr=sink, timeout=120, check=False, **user
            )
        if result.returncode:
            pytest.fail(f"{command[0]} failed: {(folder / 'output').read_text(errors='replace')[-2_000:]}")

    try:
        run(
            str(programs / "initdb"), "--no-sync", "--auth=trust", "--username=bsns", "--encoding=UTF8", "-D", str(data)
        )
        options = f"-c listen_addresses='' -c unix_socket_directories='{folder}' -c fsync=off"
        run(str(programs / "pg_ctl"), "-D", str(data), "-w", "-l", str(folder / "log"), "-o", options, "start")
        try:
            yield f"postgresql://bsns@/{{name}}?host={folder}"
        finally:
            run(str(programs / "pg_ctl"), "-D", str(data), "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgresql)])
def empty_database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'coordinator.sqlite'}"
    template: str = request.getfixturevalue("postgresql_server")
    import psycopg

    name = f"bsns_{secrets.token_hex(6)}"
    with psycopg.connect(template.format(name="postgres"), autocommit=True) as connection:
        connection.execute(f'create database "{name}"')  # type: ignore[arg-type, call-overload, unused-ignore]
    return template.format(name=name)


@pytest.fixture
def database_url(empty_database_url: str) -> str:
    """A migrated database of each kind."""
    migrate(empty_database_url)
    return empty_database_url


# -------------------------------------------------------------------------------------------------------------- network


def tiny_manifest(name: str = "tiny", blocks: int = 4) -> ModelManifest:
    """A manifest whose weights nobody has."""
    kinds = ["embedding", *["block"] * blocks, "head"]
    return ModelManifest(
        name=name,
        task="text-generation",
        architecture="scripted",
        files=(ModelFile("tokenizer.json", bytes([2]) * 32),),
        dtype="float32",
        input_width=0,
        vocabulary_size=32,
        context_limit=128,
        end_token_ids=(0,),
        kv_bytes_per_token_per_block=64,
        units=tuple(
            ShardUnit(
                index=index,
                name=f"{kind}-{index}",
                kind=kind,  # type: ignore[arg-type]
                sha256=bytes([index + 1]) * 32,
                size_bytes=1_000,
                parameter_count=250,
                flops_per_token=0 if kind == "embedding" else 500,
                output_bytes_per_token=128 if kind == "head" else 32,
                peak_bytes=256,
            )
            for index, kind in enumerate(kinds)
        ),
    )


@dataclass
class DeployedNetwork:
    """Contracts on an Anvil, with the publisher's key and a client."""

    anvil: Anvil
    deployment: Deployment
    publisher: KeySigner
    client: Web3ChainClient
    terms: Terms


@asynccontextmanager
async def deployed_network(anvil: Anvil, terms: Terms | None = None) -> AsyncIterator[DeployedNetwork]:
    """Deploy the contracts on `anvil`."""
    publisher = await anvil.funded_signer()
    terms = terms or Terms.for_devnet()
    deployment = await deploy(anvil.rpc_url, publisher, terms)
    async with await Web3ChainClient.connect(anvil.rpc_url, deployment) as client:
        yield DeployedNetwork(anvil, deployment, publisher, client, terms)


@dataclass
class _Work:
    evidence_root: bytes
    sketch: bytes
    tokens: int
    salt: bytes


@dataclass
class ScriptedNode:
    """A node that speaks the protocol and executes nothing."""

    network: DeployedNetwork
    key: KeySigner
    operator: KeySigner
    refuses: bool = False
    decode_nanoseconds: int = 1_000
    memory_bytes: int = 10**9
    offers: list[coordination_pb2.PlanOffer] = field(default_factory=list)
    welcome: coordination_pb2.Welcome | None = None
    work: dict[tuple[bytes, int, int], _Work] = field(default_factory=dict)

    @classmethod
    async def create(cls, network: DeployedNetwork, *, stake: int = 2 * ETHER, **values: Any) -> ScriptedNode:
        """A new registered node."""
        node = cls(network, await network.anvil.funded_signer(), await network.anvil.funded_signer(), **values)
        await node.register(stake)
        return node

    @property
    def node(self) -> str:
        return self.key.address

    async def register(self, stake: int) -> None:
        """Stake from the operator's key."""
        network = self.network
        certificate, endpoint = secrets.token_bytes(32), "127.0.0.1:1"
        deadline = (await network.client.head()).timestamp + 3_600
        domain = registry_domain(network.deployment.chain_id, network.deployment.node_registry)
        values = (self.operator.address, self.node, certificate, endpoint, deadline)
        proof = self.key.sign_digest(signing_digest(domain, NODE_KEY_PROOF, values))
        await Submitter(network.client, self.operator).submit(
            "NodeRegistry", "register", self.node, certificate, endpoint, deadline, proof, value=stake
        )

    def submitter(self) -> Submitter:
        return Submitter(self.network.client, self.key)

    async def attach(self, endpoint: str) -> None:
        """One attachment; returns or raises when it ends."""
        async with grpc.aio.insecure_channel(endpoint) as channel:
            call: Any = coordination_pb2_grpc.NodeCoordinationStub(channel).Attach()
            challenge = (await call.read()).challenge
            await call.write(coordination_pb2.AttachRequest(hello=self.hello(challenge.nonce)))
            beat: asyncio.Task[None] | None = None
            try:
                while (message := await call.read()) is not grpc.aio.EOF:
                    if message.HasField("welcome"):
                        self.welcome = message.welcome
                        beat = asyncio.ensure_future(self._beat(call, message.welcome))
                    elif message.HasField("offer"):
                        self.offers.append(message.offer)
                        await call.write(coordination_pb2.AttachRequest(consent=self.consent(message.offer)))
            finally:
                if beat is not None:
                    beat.cancel()
                    await asyncio.gather(beat, return_exceptions=True)
                call.cancel()

    async def stay_attached(self, endpoint: str) -> None:
        """Attach again and again until cancelled."""
        while True:
            with suppress(grpc.aio.AioRpcError):
                await self.attach(endpoint)
            await asyncio.sleep(0.1)

    def hello(self, nonce: bytes) -> coordination_pb2.Hello:
        domain = registry_domain(self.network.deployment.chain_id, self.network.deployment.node_registry)
        digest = signing_digest(domain, ATTACH_PROOF, (self.node, nonce))
        return coordination_pb2.Hello(node=bytes.fromhex(self.node[2:]), signature=self.key.sign_digest(digest))

    def measurements(self, model: ModelId) -> coordination_pb2.Measurements:
        measured = NodeMeasurements(
            model=model,
            node=address(self.node),
            measured_at=int(time.time()),
            execution_class=EXECUTION_CLASS,
            memory_bytes=self.memory_bytes,
            unit_timings=tuple(
                UnitTiming(kind, *[self.decode_nanoseconds] * 4) for kind in ("embedding", "block", "head")
            ),
        )
        domain = assignments_domain(self.network.deployment.chain_id, self.network.deployment.shard_assignments)
        return measured.to_message(self.key.sign_digest(measured.signing_digest(domain)))

    def consent(self, offer: coordination_pb2.PlanOffer) -> coordination_pb2.PlanConsent:
        if self.refuses:
            return coordination_pb2.PlanConsent(model_id=offer.model_id, epoch=offer.epoch, refusal="not today")
        plan = ShardPlan(
            offer.assignments[-1].end_unit,
            tuple(
                Assignment(
                    item.stage,
                    item.replica,
                    item.first_unit,
                    item.end_unit,
                    address(item.node),
                    item.work_weight,
                    item.execution_class,
                )
                for item in offer.assignments
            ),
        )
        domain = assignments_domain(self.network.deployment.chain_id, self.network.deployment.shard_assignments)
        values = (
            offer.model_id,
            address(offer.publisher),
            offer.epoch,
            int.from_bytes(offer.fee_per_token, "big"),
            offer.measurements_hash,
            plan.root,
            offer.consent_deadline,
        )
        signature = self.key.sign_digest(signing_digest(domain, PLAN_CONSENT, values))
        return coordination_pb2.PlanConsent(
            model_id=offer.model_id, epoch=offer.epoch, plan_root=plan.root, signature=signature
        )

    async def commit_stage(self, request: RequestId, stage: int, *, sketch: bytes = bytes(32), tokens: int = 3) -> None:
        """Commit to made-up evidence as the executor."""
        work = _Work(bytes([stage + 1]) * 32, sketch, tokens, secrets.token_bytes(32))
        self.work[request, 0, stage] = work
        await self.submitter().submit(
            "OutputVerification", "commitStage", request, stage, self._commitment(request, 0, stage, work)
        )

    async def reveal_stage(self, request: RequestId, stage: int) -> None:
        work = self.work[request, 0, stage]
        await self.submitter().submit(
            "OutputVerification", "revealStage", request, stage, work.evidence_root, work.sketch, work.tokens, work.salt
        )

    async def attest(
        self, request: RequestId, round_: int, stages: list[int], *, sketch: bytes, tokens: int = 3
    ) -> None:
        """Commit attestations for `stages` in one transaction."""
        commitments = []
        for stage in stages:
            work = _Work(bytes([stage + 1]) * 32, sketch, tokens, secrets.token_bytes(32))
            self.work[request, round_, stage] = work
            commitments.append(self._commitment(request, round_, stage, work))
        await self.submitter().submit("OutputVerification", "commitAttestations", request, stages, commitments)

    async def reveal_attestation(self, request: RequestId, round_: int, stage: int) -> None:
        work = self.work[request, round_, stage]
        await self.submitter().submit(
            "OutputVerification",
            "revealAttestation",
            request,
            stage,
            work.evidence_root,
            work.sketch,
            work.tokens,
            work.salt,
        )

    def _commitment(self, request: RequestId, round_: int, stage: int, work: _Work) -> bytes:
        sealed = sealed_sketch(work.sketch, work.salt)
        return stage_commitment(request, round_, stage, self.node, work.evidence_root, sealed, work.tokens)

    async def _beat(self, call: Any, welcome: coordination_pb2.Welcome) -> None:
        for model in welcome.model_ids:
            await call.write(coordination_pb2.AttachRequest(measurements=self.measurements(ModelId(model))))
        sequence = 0
        while True:
            sequence += 1
            heartbeat = coordination_pb2.Heartbeat(sequence=sequence, chain_head=1)
            await call.write(coordination_pb2.AttachRequest(heartbeat=heartbeat))
            await asyncio.sleep(welcome.heartbeat_interval_milliseconds / 1_000)


@dataclass
class Requester:
    """Opens requests."""

    network: DeployedNetwork
    key: KeySigner
    secrets: dict[bytes, bytes] = field(default_factory=dict)

    async def open(self, plan: bytes, nonce: int, *, tokens: int = 8) -> RequestId:
        """Open a request and return its id."""
        client, secret = self.network.client, secrets.token_bytes(32)
        quote = await client.call("InferenceEscrow", "quote", plan, 4, tokens)
        await Submitter(client, self.key).submit(
            "InferenceEscrow",
            "open",
            plan,
            nonce,
            secrets.token_bytes(32),
            secret_hash(secret),
            4,
            tokens,
            value=quote,
        )
        deployment = self.network.deployment
        request = request_id(deployment.chain_id, deployment.inference_escrow, self.key.address, nonce)
        self.secrets[request] = secret
        return request


# ---------------------------------------------------------------------------------------------------------- coordinator


class CoordinatorProcess:
    """`bsns-coordinator serve` as a real process on one database; can be killed and started again."""

    def __init__(self, network: DeployedNetwork, folder: Path, database_url: str, **options: object) -> None:
        self._network, self._folder, self._database_url = network, folder, database_url
        self._options = options
        self._process: asyncio.subprocess.Process | None = None
        self._port = 0
        self.log = folder / "coordinator.log"
        self.ready: dict[str, Any] = {}
        folder.mkdir(parents=True, exist_ok=True)
        network.deployment.save(folder / "deployment.json")
        key = folder / "publisher.key"
        if not key.exists():
            key.touch(mode=0o600)
            key.write_text(network.publisher._key.to_bytes().hex())
        (folder / "manifest.json").write_bytes(tiny_manifest().to_bytes())

    @property
    def endpoint(self) -> str:
        return str(self.ready["endpoint"])

    def command(self) -> list[str]:
        folder = self._folder
        options = {
            "rpc": self._network.anvil.rpc_url,
            "deployment": folder / "deployment.json",
            "database-url": self._database_url,
            "listen": f"127.0.0.1:{self._port}",
            "key-file": folder / "publisher.key",
            "manifest": folder / "manifest.json",
            "fee-per-token": FEE_PER_TOKEN,
            **{name.replace("_", "-"): value for name, value in self._options.items()},
        }
        flags = [part for name, value in options.items() for part in (f"--{name}", str(value))]
        return [sys.executable, "-m", "coordinator.cli", "serve", *flags]

    async def start(self) -> None:
        """Start and wait for the ready line."""
        environment = {
            **os.environ,
            "BSNS_COORDINATOR_POLL_SECONDS": "0.1",
            "BSNS_COORDINATOR_HEARTBEAT_SECONDS": "0.5",
            "BSNS_COORDINATOR_GATHER_SECONDS": "0.3",
        }
        with self.log.open("ab") as sink:
            self._process = await asyncio.create_subprocess_exec(
                *self.command(), stdout=asyncio.subprocess.PIPE, stderr=sink, env=environment
            )
        assert self._process.stdout is not None
        line = await asyncio.wait_for(self._process.stdout.readline(), READY_TIMEOUT_S)
        assert line, f"the coordinator ended before it was ready:\n{self.log.read_text()[-4_000:]}"
        self.ready = json.loads(line)
        self._port = int(self.endpoint.rpartition(":")[2])

    async def kill(self) -> None:
        """kill -9."""
        await self._end(signal.SIGKILL)

    async def stop(self) -> int:
        """SIGTERM; returns the exit status."""
        return await self._end(signal.SIGTERM)

    async def _end(self, number: signal.Signals) -> int:
        process = self._process
        if process is None:
            return 0
        if process.returncode is None:
            process.send_signal(number)
            try:
                await asyncio.wait_for(process.wait(), STOP_TIMEOUT_S)
            except TimeoutError:
                process.kill()
                await process.wait()
        self._process = None
        assert process.returncode is not None
        return process.returncode


async def eventually(condition: Callable[[], Any], what: str, seconds: float = 40.0) -> Any:
    """The first true result of `condition` (a coroutine function) before the deadline."""
    deadline = time.monotonic() + seconds
    while True:
        result = await condition()
        if result:
            return result
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        await asyncio.sleep(0.05)
