"""One node, put together: the only module that constructs things.

Owns start and stop. Promises that a node which says it is ready is registered on chain under the endpoint it listens
on, has gas, and answers; that the same folder is never served twice at once; that SIGTERM first reports NOT_SERVING,
then finishes the sessions and the duties that can be finished in time; and that running again after a crash goes on
where it stopped. Knows no command line: see node_client.cli.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final

import grpc
import grpc.aio
import structlog
from eth_typing import ChecksumAddress
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from bsns.chain.client import Web3ChainClient
from bsns.chain.deployment import Deployment
from bsns.chain.errors import ChainError, InsufficientFundsError
from bsns.chain.signer import KeySigner
from bsns.chain.submitter import Submitter
from bsns.health_server import HealthServerError, health_server
from bsns.message_guard import MessageGuard
from bsns.protocol.contract_states import NodeStatus
from bsns.protocol.endpoints import is_loopback, split_endpoint
from bsns.protocol.identifiers import address
from bsns.protocol.typed_data import NODE_KEY_PROOF, signing_digest
from bsns.runtime.executor import open_stage
from bsns.tracing import TracingUnavailableError, tracer
from bsns.v1 import execution_pb2, execution_pb2_grpc
from node_client.chain_duties import ChainDuties
from node_client.chain_view import ChainView, SigningDomains
from node_client.coordination import Coordination
from node_client.errors import KeystoreError, PortInUseError, Refusal, SettingsError
from node_client.evidence_store import EvidenceStore
from node_client.grpc_service import ShardExecutionServicer
from node_client.keystore import (
    OPERATOR_KEY_FILE,
    PASSWORD_FILE,
    Keystore,
    TlsIdentity,
    create_password,
    read_password,
    read_private_key,
)
from node_client.link_probe import LinkProber, ProbeResponder
from node_client.metrics import NodeMetrics
from node_client.pipeline import Pipeline
from node_client.reexecution import Reexecution
from node_client.session_store import SessionStore
from node_client.settings import NodeSettings
from node_client.shard_runtime import ExecutorFactory, ShardRuntime
from node_client.signing_guard import SigningGuard
from node_client.tab_desk import TabDesk

SERVICE_NAME: Final = execution_pb2.DESCRIPTOR.services_by_name["ShardExecution"].full_name
KEYS_FOLDER: Final = "keys"
GUARD_FILE: Final = "signing-history.sqlite"
EVIDENCE_FILE: Final = "evidence.sqlite"
LOCK_FILE: Final = "lock"
_STOP_GRACE_SECONDS: Final = 1.0
_DRAIN_POLL_SECONDS: Final = 0.05
_RESTART_SECONDS: Final = 1.0
_SERVER_OPTIONS: Final[tuple[tuple[str, Any], ...]] = (
    # Without this a second node could listen on the same port and take half of the connections.
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
)

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Ready:
    """What a node says when it serves."""

    node: ChecksumAddress
    operator: ChecksumAddress
    endpoint: str
    health: str = ""


def open_keystore(settings: NodeSettings, *, create: bool = False) -> Keystore:
    """The node's keys. With `create` a password is made where none was given; KeystoreError otherwise."""
    if settings.password is not None:
        password = settings.password.get_secret_value()
    else:
        file = settings.password_file or settings.data_dir / KEYS_FOLDER / PASSWORD_FILE
        if not file.exists() and create and settings.password_file is None:
            log.warning("password_created", file=str(file), advice="move it off this disk, or encrypt the disk")
            password = create_password(file)
        elif not file.exists() and settings.password_file is None:
            raise KeystoreError(
                f"there is no keystore password: give --password-file or BSNS_NODE_PASSWORD ({file} is not there)"
            )
        else:
            password = read_password(file)
    return Keystore(settings.data_dir / KEYS_FOLDER, password, settings.keystore_scrypt_cost)


class NodeService:
    """A node that runs until `stop` is called. `executor_factory` is the shard executor boundary.

    Raises from `run`: SettingsError, KeystoreError, PortInUseError; ChainError where the chain cannot be reached or
    refuses.
    """

    def __init__(
        self,
        settings: NodeSettings,
        *,
        executor_factory: ExecutorFactory = open_stage,
        clock: Callable[[], float] = time.time,
        register: bool = True,
    ) -> None:
        self.settings = settings
        self._factory, self._clock, self._register = executor_factory, clock, register
        self._stopping = asyncio.Event()
        self.ready: Ready | None = None
        # Set while it runs; for those who look at a node from within its process.
        self.chain: ChainView | None = None
        self.runtime: ShardRuntime | None = None
        self.sessions: SessionStore | None = None
        self.evidence: EvidenceStore | None = None
        self.reexecution: Reexecution | None = None

    def stop(self) -> None:
        """Begin to drain; `run` returns when it is done. Safe to call from a signal handler of the loop."""
        self._stopping.set()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Ready]:
        """Run in the background from ready on; what `run` raises before that is raised here."""
        ready: asyncio.Future[Ready] = asyncio.get_running_loop().create_future()
        task = asyncio.ensure_future(self.run(ready.set_result))
        await asyncio.wait((task, ready), return_when=asyncio.FIRST_COMPLETED)
        if not ready.done():
            ready.cancel()
            await task
            raise SettingsError("the node was stopped before it was ready")
        try:
            yield ready.result()
        finally:
            self.stop()
            await task

    async def run(self, on_ready: Callable[[Ready], None]) -> None:
        """Serve until `stop`."""
        settings = self.settings
        try:
            settings.data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise SettingsError(
                f"{settings.data_dir} cannot be the folder of a node ({error.strerror}); give another --data-dir"
            ) from error
        try:
            deployment = Deployment.load(settings.deployment)
        except ValueError as error:
            raise SettingsError(str(error)) from error
        async with contextlib.AsyncExitStack() as stack:
            stack.enter_context(_exclusive(settings))
            keystore = open_keystore(settings, create=self._register)
            signer = await asyncio.to_thread(keystore.node_signer)
            client = await Web3ChainClient.connect(settings.rpc_url, deployment, settings.rpc_timeout_seconds)
            stack.push_async_callback(client.close)
            await self._serve(stack, keystore, signer, client, on_ready)

    async def _serve(
        self,
        stack: contextlib.AsyncExitStack,
        keystore: Keystore,
        signer: KeySigner,
        client: Web3ChainClient,
        on_ready: Callable[[Ready], None],
    ) -> None:
        settings, clock = self.settings, self._clock
        domains = SigningDomains.of(client.deployment)
        chain = ChainView(client, client.deployment)
        guard = SigningGuard(settings.data_dir / GUARD_FILE)
        stack.callback(guard.close)
        evidence = EvidenceStore(settings.data_dir / EVIDENCE_FILE, settings.evidence_bytes)
        stack.callback(evidence.close)
        self.chain, self.evidence = chain, evidence
        runtime = ShardRuntime(
            settings.model_cache,
            threads=settings.threads,
            device=settings.device,
            arithmetic=settings.arithmetic,
            weight_memory_bytes=settings.weight_memory_bytes,
            maximum_batch=settings.maximum_batch,
            executor_factory=self._factory,
        )
        stack.callback(runtime.close)
        self.runtime = runtime
        background: set[asyncio.Task[None]] = set()

        def start(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
            task = asyncio.get_running_loop().create_task(_logged(work))
            background.add(task)
            task.add_done_callback(background.discard)
            # Cancelled before its first step, the task has not come to `work`, which must not be left unawaited.
            task.add_done_callback(lambda _: work.close())
            return task

        metrics = NodeMetrics()
        try:
            tracing = tracer("bsns-node", settings.otlp_endpoint)
        except TracingUnavailableError as error:
            raise SettingsError(str(error)) from error
        stack.push_async_callback(asyncio.to_thread, tracing.close)
        submitter = Submitter(client, signer)
        tabs = TabDesk(settings, signer, domains, chain, submitter, evidence, guard)
        sessions = SessionStore(
            settings, signer.address, domains, chain, runtime, evidence, guard, tabs=tabs, clock=clock
        )
        self.sessions = sessions
        pipeline = Pipeline(
            settings, signer, domains, chain, sessions, runtime, evidence, guard, metrics, tracing,
            start=start, on_sealed=lambda: duties.wake(),  # noqa: PLW0108 (made below)
            bandwidth_to=lambda node: prober.bandwidth_to(node),  # noqa: PLW0108 (made below)
        )  # fmt: skip
        prober = LinkProber(settings, signer.address, chain, pipeline.peers)
        stack.callback(pipeline.close)
        # Before the threads and stores they use are closed.
        stack.push_async_callback(_cancel_all, background)
        reexecution = Reexecution(settings, signer, domains, chain, runtime, pipeline.peers, clock=clock)
        self.reexecution = reexecution
        duties = ChainDuties(
            settings,
            signer.address,
            chain,
            submitter,
            evidence,
            guard,
            reexecution,
            tabs,
            metrics,
            tracing,
            start=start,
        )
        servicer = ShardExecutionServicer(
            settings, signer.address, domains, chain, sessions, pipeline, runtime, evidence,
            ProbeResponder(settings, chain), tabs, clock=clock,
        )  # fmt: skip
        server = grpc.aio.server(
            interceptors=(MessageGuard(),),
            options=_SERVER_OPTIONS,
            maximum_concurrent_rpcs=settings.maximum_concurrent_calls,
        )
        execution_pb2_grpc.add_ShardExecutionServicer_to_server(servicer, server)  # type: ignore[no-untyped-call, unused-ignore]
        checks = health.aio.HealthServicer()
        await checks.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        await checks.set(SERVICE_NAME, health_pb2.HealthCheckResponse.NOT_SERVING)
        health_pb2_grpc.add_HealthServicer_to_server(checks, server)
        reflection.enable_server_reflection((SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), server)

        host, _ = split_endpoint(settings.listen)
        advertised_host = split_endpoint(settings.advertise)[0] if settings.advertise else host
        identity = await asyncio.to_thread(keystore.tls_identity, advertised_host)
        endpoint = _bind(server, settings, identity)
        await server.start()
        stack.push_async_callback(server.stop, min(_STOP_GRACE_SECONDS, settings.drain_seconds))
        operator = await self._join(keystore, signer, client, chain, domains, identity, endpoint)

        start(_restarted("chain_duties", duties.run))
        if coordinators := settings.coordinators:
            # Links are for planners: without a coordinator nobody asks for them.
            start(_restarted("link_prober", prober.run))
            coordination = Coordination(settings, signer, domains, chain, runtime, sessions, prober, tabs, clock=clock)

            async def coordinate() -> None:
                # Who is attached gets sessions: a node that comes back has its weights before it says that it is here.
                await self._load_assigned(runtime, chain, signer.address)
                await coordination.run(coordinators)

            start(_restarted("coordination", coordinate))
        start(_restarted("metrics", lambda: metrics.follow(chain, signer.address, settings.data_dir)))
        metrics.session_limit.set(settings.maximum_sessions)
        metrics.gas_minimum.set(settings.gas_balance_minimum_wei)

        def scraped() -> None:
            metrics.sessions.set(sessions.active)
            metrics.queue_depth.set(pipeline.unrecorded)
            metrics.cache_free.set(sessions.free_cache_bytes)
            metrics.evidence_used.set(evidence.bytes_used)
            metrics.evidence_free.set(evidence.bytes_free)
            metrics.is_ready.set(not sessions.draining)

        def reason() -> str | None:
            return "the node is being stopped" if sessions.draining else None

        try:
            health_endpoint = await stack.enter_async_context(
                health_server(settings.health_listen, metrics.registry, reason, scraped)
            )
        except HealthServerError as error:
            raise PortInUseError(str(error)) from error
        await checks.set("", health_pb2.HealthCheckResponse.SERVING)
        await checks.set(SERVICE_NAME, health_pb2.HealthCheckResponse.SERVING)
        self.ready = Ready(signer.address, operator, endpoint, health_endpoint)
        log.info("ready", node=signer.address, operator=operator, endpoint=endpoint)
        on_ready(self.ready)
        await self._stopping.wait()
        log.info("draining", sessions=sessions.active)
        sessions.draining = True
        await checks.enter_graceful_shutdown()
        deadline = time.monotonic() + settings.drain_seconds
        while time.monotonic() < deadline and (sessions.active or duties.busy):  # noqa: ASYNC110 (two sources)
            await asyncio.sleep(_DRAIN_POLL_SECONDS)
        log.info("stopped", unfinished_sessions=sessions.active)

    async def _load_assigned(self, runtime: ShardRuntime, chain: ChainView, node: ChecksumAddress) -> None:
        """Load the units that plans in force give this node; what cannot be loaded is for the sessions to say."""
        try:
            found = await chain.assignments_of(node, self.settings.chain_lookback_blocks)
        except ChainError as error:
            log.warning("weights_not_loaded", detail=str(error))
            return
        for model, item in found:
            try:
                executor = await runtime.executor(
                    model, item.first_unit, item.end_unit, execution_class=item.execution_class
                )
                runtime.release(executor)
            except Refusal as refusal:
                log.warning("weights_not_loaded", model=model.hex(), detail=refusal.detail)

    async def _join(
        self,
        keystore: Keystore,
        signer: KeySigner,
        client: Web3ChainClient,
        chain: ChainView,
        domains: SigningDomains,
        identity: TlsIdentity,
        endpoint: str,
    ) -> ChecksumAddress:
        """Make the chain know this node under this endpoint, and give its hot key gas; does only what is missing.
        Returns the operator.
        """
        settings = self.settings
        node = signer.address
        status = await chain.node_status(node)
        registered_operator = address(await client.call("NodeRegistry", "operatorOf", node))
        known = await chain.endpoint(node, fresh=True) if status is not NodeStatus.ABSENT else None
        current = (
            known is not None and known.endpoint == endpoint and known.certificate_hash == identity.certificate_hash
        )
        balance = await client.balance(node)
        if status is not NodeStatus.ABSENT and current and balance >= settings.gas_balance_minimum_wei:
            return registered_operator
        if not self._register:
            if status is NodeStatus.ABSENT:
                raise SettingsError(f"node {node} is not registered; run `bsns-node join`")
            if not current:
                there = "an endpoint that is none" if known is None else known.endpoint
                here = f"{endpoint} with another certificate" if there == endpoint else endpoint
                raise SettingsError(
                    f"node {node} is registered at {there}, this process would serve at {here}: give --listen and "
                    "--advertise as registered, or announce the change with `bsns-node join`"
                )
            log.warning("gas_is_low", balance_wei=balance, advice=f"send {node} some, or run `bsns-node join`")
            return registered_operator
        operator = await asyncio.to_thread(self._operator, keystore)
        if status is not NodeStatus.ABSENT and registered_operator != operator.address:
            raise SettingsError(
                f"node {node} belongs to operator {registered_operator}, the operator key here is {operator.address}"
            )
        is_new, is_low = status is NodeStatus.ABSENT, balance < settings.gas_balance_minimum_wei
        stake = settings.stake_wei if is_new else 0
        top_up = settings.gas_balance_target_wei - balance if is_low else 0
        # Before any money moves: a join that cannot succeed must not leave half of it behind.
        if is_new and stake < (minimum := int(await client.call("NodeRegistry", "minimumStake"))):
            raise SettingsError(f"the minimum stake is {minimum} wei, --stake gives {stake}")
        if (funds := await client.balance(operator.address)) < stake + top_up:
            raise InsufficientFundsError(
                operator.address,
                f"the operator has {funds} wei, stake and gas for the node key are {stake + top_up} wei",
            )
        submitter = Submitter(client, operator)
        if is_low:
            log.info("funding_node_key", amount_wei=top_up, reason="gas for commitments and attestations")
            await submitter.transfer(node, top_up, settings.transaction_timeout_seconds)
        if is_new:
            deadline = (await chain.head(fresh=True)).timestamp + settings.registration_proof_seconds
            digest = signing_digest(
                domains.registry,
                NODE_KEY_PROOF,
                (operator.address, node, identity.certificate_hash, endpoint, deadline),
            )
            await submitter.submit(
                "NodeRegistry", "register", node, identity.certificate_hash, endpoint, deadline,
                signer.sign_digest(digest),
                value=stake, timeout_s=settings.transaction_timeout_seconds,
            )  # fmt: skip
            log.info("registered", node=node, stake_wei=stake)
        elif not current:
            await submitter.submit(
                "NodeRegistry", "changeEndpoint", node, identity.certificate_hash, endpoint,
                timeout_s=settings.transaction_timeout_seconds,
            )  # fmt: skip
            log.info("endpoint_changed", node=node, endpoint=endpoint)
        return operator.address

    def _operator(self, keystore: Keystore) -> KeySigner:
        if self.settings.operator_key_file is not None:
            return keystore.import_key(OPERATOR_KEY_FILE, read_private_key(self.settings.operator_key_file))
        return keystore.operator_signer()


def _bind(server: grpc.aio.Server, settings: NodeSettings, identity: TlsIdentity) -> str:
    """Listen, and return the endpoint to register: with the port that was chosen where 0 was asked for."""
    reached = settings.advertise or settings.listen
    try:
        if is_loopback(reached):
            port = server.add_insecure_port(settings.listen)
        else:
            credentials = grpc.ssl_server_credentials([(identity.key_pem, identity.certificate_pem)])
            port = server.add_secure_port(settings.listen, credentials)
    except RuntimeError as error:
        raise PortInUseError(
            f"cannot listen on {settings.listen}: the port is in use or not ours; choose another with --listen"
        ) from error
    if port == 0:
        raise PortInUseError(f"cannot listen on {settings.listen}; choose another with --listen")
    host, given = split_endpoint(reached)
    if given == 0:
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    return reached


@contextlib.contextmanager
def _exclusive(settings: NodeSettings) -> Any:
    """Hold the data folder for this process; the kernel lets go when it dies."""
    path = settings.data_dir / LOCK_FILE
    with os.fdopen(os.open(path, os.O_CREAT | os.O_RDWR, 0o600), "r+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise SettingsError(
                f"another bsns-node serves {settings.data_dir}; one folder belongs to one process"
            ) from error
        yield


async def _cancel_all(tasks: set[asyncio.Task[None]]) -> None:
    pending = tuple(tasks)
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)


async def _logged(work: Coroutine[Any, Any, None]) -> None:
    """A background task that breaks is reported and ends alone."""
    try:
        await work
    except Exception:
        log.exception("task_broke")


async def _restarted(name: str, work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """A loop that breaks is reported and begun again."""
    while True:
        try:
            await work()
            return
        except Exception:
            log.exception("loop_broke", loop=name)
            await asyncio.sleep(_RESTART_SECONDS)
