"""Constructs the coordinator and keeps it running: the one place where its parts meet.

Owns start, the loops, and the end. Three loops share the state on disk: the follower reads the chain, the outbox
writes to it, the desk looks at what is open (plans, routes, verdicts) after each new block; beside them the network's
shape is watched. Promises that a kill at
any moment loses nothing that a restart on the same database does not finish, and that SIGTERM drains: no new nodes,
the step in progress ends, connections close. Decides nothing itself.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import grpc
import grpc.aio
import structlog
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_health.v1._async import HealthServicer
from grpc_reflection.v1alpha import reflection

from bsns.chain.client import ChainClient, Web3ChainClient
from bsns.chain.deployment import Deployment
from bsns.chain.errors import ChainUnavailableError, ContractError, UnknownBlockError
from bsns.chain.signer import Signer
from bsns.health_server import HealthServerError, health_server
from bsns.message_guard import MessageGuard
from bsns.planning import Link
from bsns.protocol.identifiers import ModelId
from bsns.protocol.manifest import ManifestError, ModelManifest
from bsns.protocol.model_graph import ModelGraph
from bsns.protocol.typed_data import assignments_domain, registry_domain, tabs_domain
from bsns.tracing import TracingUnavailableError, tracer
from bsns.v1 import coordination_pb2, coordination_pb2_grpc, tabs_pb2, tabs_pb2_grpc
from coordinator.chain_follower import ChainFollower
from coordinator.collection_service import RequestCollectionServicer
from coordinator.coordination_service import NodeCoordinationServicer
from coordinator.dispatch import NodePool, NodeStandings, PlanPublication, RequestRouting, TopologyWatch
from coordinator.metrics import CoordinatorMetrics
from coordinator.settings import CoordinatorSettings, SettingsError, load_deployment, load_key
from coordinator.storage import AnotherWriterError, Storage, StorageUnavailableError, migrate
from coordinator.tab_collector import TabCollector
from coordinator.transaction_outbox import TransactionOutbox
from coordinator.verification_desk import VerificationRules, wanted_intents
from coordinator.verification_views import VerificationViews

_SERVICE_NAME: Final = coordination_pb2.DESCRIPTOR.services_by_name["NodeCoordination"].full_name
_COLLECTION_NAME: Final = tabs_pb2.DESCRIPTOR.services_by_name["RequestCollection"].full_name
_EXPECTED: Final = (ChainUnavailableError, UnknownBlockError, StorageUnavailableError)
_log = structlog.get_logger(__name__)


class Coordinator:
    """All parts of one coordinator over a chain client and a migrated storage, not yet running.

    `run` serves until `stop` is called; `endpoint` is known once `ready` is set.
    """

    def __init__(
        self,
        settings: CoordinatorSettings,
        *,
        chain: ChainClient,
        storage: Storage,
        deployment: Deployment,
        signer: Signer,
        manifests: list[ModelManifest],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings
        self._chain = chain
        self._storage = storage
        self._clock = clock
        self._news = asyncio.Event()
        self._stop = asyncio.Event()
        self.ready = asyncio.Event()
        self.endpoint = ""
        self.health_endpoint = ""
        self.metrics = CoordinatorMetrics(storage, self.chain_now)
        try:
            self.tracing = tracer("bsns-coordinator", settings.otlp_endpoint)
        except TracingUnavailableError as error:
            raise SettingsError(str(error)) from error
        self.follower = ChainFollower(
            chain, storage, deployment, limits=settings.follower_limits, on_change=self._news.set
        )
        self.outbox = TransactionOutbox(chain, storage, signer, limits=settings.outbox_limits, clock=clock)
        self.pool = NodePool(settings.pool_limits, time.monotonic, on_change=self._news.set)
        registry = registry_domain(deployment.chain_id, deployment.node_registry)
        assignments = assignments_domain(deployment.chain_id, deployment.shard_assignments)
        self.standings = NodeStandings(storage)
        self._rollbacks = 0
        self.publications: dict[ModelId, PlanPublication] = {}
        for manifest in manifests:
            publication = PlanPublication(
                manifest,
                settings.policy,
                chain=chain,
                storage=storage,
                pool=self.pool,
                outbox=self.outbox,
                standings=self.standings,
                assignments_domain=assignments,
                limits=settings.publication_limits,
                clock=time.monotonic,
            )
            self.publications[publication.model] = publication
        self.routing = RequestRouting(
            storage,
            self.pool,
            self.outbox,
            self.standings,
            {model: ModelGraph.of_manifest(item.manifest) for model, item in self.publications.items()},
            prior=Link(settings.prior_latency_nanoseconds, settings.prior_bytes_per_second),
        )
        self.topology = TopologyWatch(
            storage,
            self.pool,
            list(self.publications.values()),
            prior=Link(settings.prior_latency_nanoseconds, settings.prior_bytes_per_second),
            seconds=settings.topology_seconds,
            clock=time.monotonic,
        )
        self.tabs = TabCollector(
            storage,
            chain,
            self.outbox,
            self.pool,
            self.routing,
            signer,
            tabs_domain(deployment.chain_id, deployment.request_tabs),
            limits=settings.tab_limits,
            chain_now=self.chain_now,
            tracer=self.tracing,
        )
        self._collection = RequestCollectionServicer(self.tabs, lambda: self.follower.not_synced_because)
        self._servicer = NodeCoordinationServicer(
            storage=storage,
            pool=self.pool,
            publications=self.publications,
            tabs=self.tabs,
            registry_domain=registry,
            assignments_domain=assignments,
            limits=settings.conversation_limits,
            chain_now=self.chain_now,
            not_synced_because=lambda: self.follower.not_synced_because,
        )
        self._health = HealthServicer()
        self._rules: VerificationRules | None = None
        self._views = VerificationViews(chain)

    def stop(self) -> None:
        """End `run` in order."""
        self._stop.set()

    def chain_now(self) -> int:
        """The later of the chain's and this machine's clock: a chain without new blocks stands still, its deadlines
        do not.
        """
        head = self.follower.cursor
        return max(int(self._clock()), 0 if head is None else head.timestamp)

    async def run(self, on_ready: Callable[[str], None] = lambda _endpoint: None) -> None:
        """Serve until `stop`. WrongChainError, storage and chain errors that waiting cannot mend pass through."""
        await self.follower.require_right_chain()
        server = await self._start_server()
        try:
            async with self._health_server() as self.health_endpoint, asyncio.TaskGroup() as group:
                loops = [
                    group.create_task(self.follower.run(), name="follower"),
                    group.create_task(self._outbox_loop(), name="outbox"),
                    group.create_task(self._desk_loop(), name="desk"),
                    group.create_task(self._topology_loop(), name="topology"),
                    group.create_task(self._announce(on_ready), name="ready"),
                ]
                await self._stop.wait()
                _log.info("draining")
                self._servicer.drain()
                for loop in loops:
                    loop.cancel()
        finally:
            await self._health.enter_graceful_shutdown()
            self._servicer.drain()
            await server.stop(self._settings.drain_seconds)
            await asyncio.to_thread(self.tracing.close)

    @asynccontextmanager
    async def _health_server(self) -> AsyncIterator[str]:
        def scraped() -> None:
            metrics, follower = self.metrics, self.follower
            metrics.is_ready.set(follower.not_synced_because is None)
            metrics.head.set(follower.head.number if follower.head is not None else 0)
            metrics.lag.set(follower.lag or 0)
            metrics.reorganisations.set(follower.rollbacks)
            metrics.attached.set(len(self.pool.live()))

        def reason() -> str | None:
            return "the coordinator is being stopped" if self._stop.is_set() else self.follower.not_synced_because

        try:
            async with health_server(self._settings.health_listen, self.metrics.registry, reason, scraped) as endpoint:
                yield endpoint
        except HealthServerError as error:
            raise SettingsError(str(error)) from error

    # --------------------------------------------------------------------------------------------------------- loops

    async def _announce(self, on_ready: Callable[[str], None]) -> None:
        """Report health as it changes; ready once the chain was followed to its head."""
        serving: bool | None = None
        while True:
            reason = self.follower.not_synced_because
            if (reason is None) != serving:
                serving = reason is None
                status = health_pb2.HealthCheckResponse
                await self._health.set(_SERVICE_NAME, status.SERVING if serving else status.NOT_SERVING)
                await self._health.set("", status.SERVING if serving else status.NOT_SERVING)
                _log.info("synced" if serving else "not_synced", reason=reason)
            if serving and not self.ready.is_set():
                self.ready.set()
                on_ready(self.endpoint)
            await asyncio.sleep(self._settings.poll_seconds)

    async def _outbox_loop(self) -> None:
        async def step() -> None:
            # Two that send with one key would take each other's nonces.
            await asyncio.to_thread(self._storage.require_writer)
            await self.outbox.step()

        await self._repeat("outbox_waits", step, self.outbox.wake)

    async def _desk_loop(self) -> None:
        await self.ready.wait()

        async def timed() -> None:
            with self.metrics.desk_duration.time():
                await self._desk_pass()

        await self._repeat("desk_waits", timed, self._news)

    async def _topology_loop(self) -> None:
        await self.ready.wait()
        await self._repeat("topology_waits", lambda: self.topology.step(self.chain_now()), asyncio.Event())

    async def _repeat(self, warning: str, step: Callable[[], Awaitable[None]], wake: asyncio.Event) -> None:
        """Run `step` when woken and every poll interval; growing pauses while the endpoint or the database fails."""
        settings, failures = self._settings, 0
        while True:
            try:
                wake.clear()
                await step()
                failures = 0
            except _EXPECTED as error:
                failures += 1
                self.metrics.failures.labels(warning.removesuffix("_waits")).inc()
                _log.warning(warning, error=f"{type(error).__name__}: {error}", failures=failures)
            if failures:
                pause = settings.chain_backoff_seconds * 2 ** min(failures - 1, 16)
                await asyncio.sleep(min(pause, settings.chain_backoff_maximum_seconds))
                continue
            try:
                async with asyncio.timeout(settings.poll_seconds):
                    await wake.wait()
            except TimeoutError:
                continue

    async def _desk_pass(self) -> None:
        """One look at everything that is open. Nothing is wanted from a state that is not current."""
        cursor = self.follower.cursor
        if self.follower.not_synced_because is not None or cursor is None:
            return
        now = self.chain_now()
        await self._follow_standings()
        for publication in self.publications.values():
            await publication.step(now)
        limit = self._settings.open_requests_a_pass
        requests = await asyncio.to_thread(lambda: self._storage.unfinished_requests(limit))
        await self.routing.step(requests, now)
        await self.tabs.step(cursor.number)
        rules = await self._verification_rules()
        self._views.keep(requests)
        for request in requests:
            try:
                view = await self._views.of(request, now)
            except ContractError as error:
                _log.warning("view_refused", request_id="0x" + request.request_id.hex(), error=str(error))
                continue
            for intent in wanted_intents(request, view, rules, now=now, head_number=cursor.number):
                await self.outbox.want(intent)

    async def _follow_standings(self) -> None:
        if self.follower.rollbacks != self._rollbacks:
            self._rollbacks = self.follower.rollbacks
            self.standings.forget()
        await self.standings.step((await self._verification_rules()).tolerance)

    async def _verification_rules(self) -> VerificationRules:
        if self._rules is None:
            self._rules = VerificationRules.from_terms(await self._chain.call("OutputVerification", "terms"))
        return self._rules

    # -------------------------------------------------------------------------------------------------------- server

    async def _start_server(self) -> grpc.aio.Server:
        settings = self._settings
        server = grpc.aio.server(
            interceptors=(MessageGuard(),),
            maximum_concurrent_rpcs=settings.attached_nodes * 2,
            options=[
                ("grpc.max_receive_message_length", settings.message_bytes),
                ("grpc.so_reuseport", 0),
                ("grpc.keepalive_time_ms", 20_000),
                ("grpc.keepalive_timeout_ms", 10_000),
            ],
        )
        coordination_pb2_grpc.add_NodeCoordinationServicer_to_server(self._servicer, server)  # type: ignore[no-untyped-call, unused-ignore]
        tabs_pb2_grpc.add_RequestCollectionServicer_to_server(self._collection, server)  # type: ignore[no-untyped-call, unused-ignore]
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = [_SERVICE_NAME, _COLLECTION_NAME, reflection.SERVICE_NAME]
        reflection.enable_server_reflection(names, server)
        host = settings.listen.rpartition(":")[0]
        try:
            if settings.certificate_file is None or settings.certificate_key_file is None:
                port = server.add_insecure_port(settings.listen)
            else:
                pair = (settings.certificate_key_file.read_bytes(), settings.certificate_file.read_bytes())
                port = server.add_secure_port(settings.listen, grpc.ssl_server_credentials([pair]))
        except (RuntimeError, OSError) as error:
            raise SettingsError(
                f"cannot listen on {settings.listen}: {_bind_failure(error)}; choose another port or address"
            ) from error
        await server.start()
        self.endpoint = f"{host}:{port}"
        return server


def _bind_failure(error: RuntimeError | OSError) -> str:
    """gRPC says "failed to bind" whatever the reason was; the reason is on standard error."""
    return "the port is in use or not ours" if isinstance(error, RuntimeError) else str(error)


def load_manifests(paths: tuple[Path, ...]) -> list[ModelManifest]:
    """The models to plan for; SettingsError names a file that is not a manifest."""
    manifests = []
    for path in paths:
        try:
            manifests.append(ModelManifest.from_bytes(path.read_bytes()))
        except (OSError, ManifestError) as error:
            raise SettingsError(f"{path} is not a manifest: {error}") from error
    return manifests


async def take_writers_place(storage: Storage, *, standby: bool, poll_seconds: float) -> None:
    """AnotherWriterError if it is taken, StorageUnavailableError if the database is away; a standby waits for both."""
    waits = False
    while True:
        try:
            await asyncio.to_thread(storage.become_writer)
        except (AnotherWriterError, StorageUnavailableError) as error:
            if not standby:
                raise
            if not waits:
                _log.info("standing_by", reason=str(error))
            waits = True
            await asyncio.sleep(poll_seconds)
            continue
        if waits:
            _log.info("takes_over")
        return


@asynccontextmanager
async def open_coordinator(settings: CoordinatorSettings) -> AsyncIterator[Coordinator]:
    """A coordinator from settings: key, deployment, migrated database the writer's place, a connected chain."""
    password = settings.keystore_password.get_secret_value() if settings.keystore_password else None
    signer = load_key(settings.key_file, password, settings.keystore_password_file)
    deployment = load_deployment(settings.deployment)
    manifests = load_manifests(settings.manifest)
    if settings.migrate_on_start:
        await asyncio.to_thread(migrate, settings.database_url)
    storage = Storage(settings.database_url, keep_blocks=4 * settings.maximum_reorganisation_depth)
    try:
        storage.require_current_schema()
        await take_writers_place(storage, standby=settings.standby, poll_seconds=settings.poll_seconds)
        async with await Web3ChainClient.connect(settings.rpc_url, deployment, settings.rpc_timeout_seconds) as chain:
            yield Coordinator(
                settings, chain=chain, storage=storage, deployment=deployment, signer=signer, manifests=manifests
            )
    finally:
        storage.close()


async def serve(settings: CoordinatorSettings, on_ready: Callable[[dict[str, Any]], None]) -> None:
    """Run until SIGTERM or SIGINT; `on_ready` gets the ready line's content."""
    async with open_coordinator(settings) as coordinator:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, coordinator.stop)

        def ready(endpoint: str) -> None:
            on_ready(
                {
                    "event": "ready",
                    "endpoint": endpoint,
                    "health": coordinator.health_endpoint,
                    "publisher": coordinator.outbox.sender,
                    "models": ["0x" + model.hex() for model in coordinator.publications],
                }
            )

        try:
            await coordinator.run(ready)
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)


async def status(settings_database_url: str, chain: ChainClient | None) -> dict[str, Any]:
    """What a database says, with the head's lag if a chain is given. Reads only; a coordinator may run beside it."""
    storage = Storage.of_existing(settings_database_url)
    try:
        storage.require_current_schema()
        cursor = storage.cursor()
        head = None if chain is None else await chain.head()
        now = int(time.time()) if head is None else head.timestamp
        nodes = storage.nodes()
        return {
            "cursor": None if cursor is None else {"number": cursor.number, "hash": "0x" + cursor.hash.hex()},
            "head": None if head is None else head.number,
            "head_lag_blocks": None if head is None or cursor is None else head.number - cursor.number,
            "nodes": [
                {
                    "node": item.node,
                    "status": item.status_at(now).name.lower(),
                    "staked_wei": item.staked,
                    "endpoint": item.endpoint,
                    "open_duties": item.open_duties,
                }
                for item in nodes.values()
            ],
            "plans": [
                {
                    "plan_id": "0x" + item.plan_id.hex(),
                    "model_id": "0x" + item.model_id.hex(),
                    "publisher": item.publisher,
                    "epoch": item.epoch,
                    "effective_at": item.effective_at,
                    "fee_per_token_wei": item.fee_per_token,
                    "stages": [
                        {key: _shown(value) for key, value in asdict(assignment).items()}
                        for assignment in item.assignments
                    ],
                }
                for item in storage.plans()
            ],
            "requests": {key.name.lower(): value for key, value in storage.request_counts().items()},
            "intents": {str(key): value for key, value in storage.intent_counts().items()},
        }
    finally:
        storage.close()


def _shown(value: Any) -> Any:
    return "0x" + value.hex() if isinstance(value, bytes) else value
