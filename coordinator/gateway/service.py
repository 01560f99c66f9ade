"""Constructs the gateway and keeps it running: the one place where its parts meet.

Owns start, the loop that looks after its money, and the end. Promises that SIGTERM drains: nothing new is taken,
answers in progress end and are settled, connections close. A kill at any moment loses no money: what was set aside is
released at the next start. Decides nothing itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any, Final

import structlog
import uvicorn
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from bsns.chain.client import Web3ChainClient
from bsns.chain.deployment import Deployment
from bsns.chain.errors import ChainError
from bsns.chain.patient_client import PatientChainClient
from bsns.chain.remembering_client import RememberingChainClient
from bsns.chain.signer import Signer
from bsns.health_server import HealthServerError, health_server
from bsns.protocol.endpoints import split_endpoint
from bsns.requester.chat_tokenizer import ChatTokenizer
from bsns.requester.client import Client, load_model_folder
from bsns.requester.collector import CollectorConnection
from bsns.requester.errors import RequesterError, UnavailableError
from bsns.requester.journal import Journal
from bsns.requester.tab import Tab
from bsns.tracing import TracingUnavailableError, tracer
from coordinator.gateway.access import Access
from coordinator.gateway.account_api import AccountApi
from coordinator.gateway.errors import ApiError, of_requester, of_storage, unavailable
from coordinator.gateway.explorer import Explorer, error_page
from coordinator.gateway.live import Live
from coordinator.gateway.metrics import GatewayMetrics
from coordinator.gateway.model_desk import ModelDesk, OfferedModel
from coordinator.gateway.openai_api import OpenAIApi
from coordinator.gateway.perimeter import Perimeter
from coordinator.gateway.settings import GatewaySettings
from coordinator.gateway.treasury import Treasury
from coordinator.settings import SettingsError, load_deployment, load_key
from coordinator.storage import AccountBook, Storage, StorageError, migrate

CHAIN_PATIENCE_S: Final = 5.0
KEEP_ALIVE_S: Final = 15
BACKLOG: Final = 256
LARGEST_HEADERS: Final = 32 * 1024
FORGET_EVERY_S: Final = 600.0
WAIT_FOR_PLAN_S: Final = 1.0
_log = structlog.get_logger(__name__)


class Gateway:
    """All parts of one gateway, not yet running. `run` serves until `stop`; `url` is known once `on_ready` is told."""

    def __init__(
        self,
        settings: GatewaySettings,
        *,
        chain: Web3ChainClient,
        storage: Storage,
        deployment: Deployment,
        signer: Signer,
        models: dict[str, OfferedModel],
        tab: Tab,
        journal: Journal,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._settings, self._storage, self._clock = settings, storage, clock
        self._stop = asyncio.Event()
        self.url = settings.public_url or ""
        self.metrics = GatewayMetrics()
        self.book = AccountBook(storage)
        patient = PatientChainClient(chain, CHAIN_PATIENCE_S)
        self.treasury = Treasury(patient, signer, tab, self.book, storage, settings, self.metrics, clock=clock)
        self.live = Live(storage, settings.live_viewers, self.metrics)
        self.explorer = Explorer(storage, patient, deployment, settings, self.metrics, self.live, clock)
        try:
            self.tracing = tracer("bsns-gateway", settings.otlp_endpoint)
        except TracingUnavailableError as error:
            raise SettingsError(str(error)) from error
        self.desk = ModelDesk(
            models, tab, journal, self.book, storage, settings, self.metrics, self.tracing, clock=clock
        )
        self.app = self._application(deployment.chain_id)

    def stop(self) -> None:
        """End `run` in order."""
        self._stop.set()

    @property
    def not_ready_because(self) -> str | None:
        """Why no request is answered just now, or None."""
        return "the gateway is being stopped" if self.desk.is_draining else self.treasury.not_ready_because

    async def run(self, on_ready: Callable[[str, str], None] = lambda _url, _health: None) -> None:
        """Serve until `stop`; `on_ready` is told the addresses of the gateway, and of its health and metrics."""
        settings = self._settings
        with _listening(settings.listen) as listener:
            scheme = "http" if settings.certificate_file is None else "https"
            host = split_endpoint(settings.listen)[0]
            self.url = self.url or f"{scheme}://{host}:{listener.getsockname()[1]}"
            server = _Server(
                uvicorn.Config(
                    Perimeter(self.app, settings, self.metrics),
                    log_config=None,
                    access_log=False,
                    server_header=False,
                    ws="none",
                    lifespan="off",
                    timeout_keep_alive=KEEP_ALIVE_S,
                    h11_max_incomplete_event_size=LARGEST_HEADERS,
                    timeout_graceful_shutdown=max(1, round(settings.drain_seconds)),
                    forwarded_allow_ips=",".join(settings.trusted_proxies) or None,
                    proxy_headers=bool(settings.trusted_proxies),
                    ssl_certfile=settings.certificate_file,
                    ssl_keyfile=settings.certificate_key_file,
                )
            )
            await self.desk.recover()
            await self.treasury.step()
            try:
                async with (
                    health_server(
                        settings.health_listen, self.metrics.registry, lambda: self.not_ready_because, self._on_scrape
                    ) as health,
                    asyncio.TaskGroup() as group,
                ):
                    loops = [
                        group.create_task(self._money_loop(), name="money"),
                        group.create_task(self._forget_loop(), name="forget"),
                        group.create_task(self.live.run(), name="live"),
                    ]
                    serving = group.create_task(server.serve(sockets=[listener]), name="http")
                    on_ready(self.url, health)
                    await self._stop.wait()
                    self.live.end()
                    await self.desk.drain(settings.drain_seconds)
                    server.should_exit = True
                    await serving
                    for loop in loops:
                        loop.cancel()
            except HealthServerError as error:
                raise SettingsError(str(error)) from error
            finally:
                await asyncio.to_thread(self.tracing.close)

    def _on_scrape(self) -> None:
        self.metrics.is_ready.set(self.not_ready_because is None)

    async def _money_loop(self) -> None:
        while True:
            await asyncio.sleep(self._settings.poll_seconds)
            try:
                await self.treasury.step()
                await self.desk.pay_late()
            except (StorageError, RequesterError, ChainError) as error:
                _log.warning("money_waits", error=f"{type(error).__name__}: {error}")

    async def _forget_loop(self) -> None:
        while True:
            before = int(self._clock()) - self._settings.response_seconds
            try:
                await asyncio.to_thread(self.book.forget_responses, before)
                await self.desk.forget_old()
            except (StorageError, RequesterError) as error:
                _log.warning("forgetting_waits", error=str(error))
            await asyncio.sleep(FORGET_EVERY_S)

    # ---------------------------------------------------------------------------------------------------- application

    def _application(self, chain_id: int) -> FastAPI:
        settings = self._settings
        app = FastAPI(
            title="bsns gateway",
            description="Answers of a network that nobody has to trust, over OpenAI's API.",
            version="1",
            docs_url=None,
            redoc_url=None,
        )
        app.state.access = Access(self.book, settings.key_requests_a_minute, settings.tracked_addresses)
        app.include_router(OpenAIApi(self.desk, settings, self.record_url, self._clock).router)
        app.include_router(AccountApi(self.book, self.treasury, settings, chain_id, self._clock).router)
        if settings.explorer:
            app.include_router(self.explorer.router)
        app.add_api_route("/healthz", self._alive, methods=["GET"], tags=["health"])
        app.add_api_route("/readyz", self._ready, methods=["GET"], tags=["health"])
        for kind, handler in _HANDLERS.items():
            app.add_exception_handler(kind, handler)
        if settings.cors_origins:
            app.add_middleware(
                CORSMiddleware,
                allow_origins=list(settings.cors_origins),
                allow_methods=["GET", "POST", "DELETE"],
                allow_headers=["Authorization", "Content-Type", "Idempotency-Key", "X-BSNS-Max-Price-Wei"],
                expose_headers=["X-Request-Id", "X-BSNS-Request-Id", "X-BSNS-Record", "X-BSNS-Price-Wei"],
            )
        return app

    def record_url(self, request_id: str) -> str:
        """Where the record of a request is shown."""
        return f"{self.url}/requests/{request_id}"

    async def _alive(self) -> dict[str, str]:
        """The process answers."""
        return {"status": "alive"}

    async def _ready(self) -> Response:
        """Whether requests are answered, 503 while they are not; why is for the operator to know (`health_listen`)."""
        reason = self.not_ready_because
        status = 200 if reason is None else 503
        return JSONResponse({"status": "ready" if reason is None else "not ready"}, status)


class _Server(uvicorn.Server):
    """Signals are the service's: it drains before the server stops."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


# ------------------------------------------------------------------------------------------------------------- refusals


def _answer(request: Request, error: ApiError) -> Response:
    """As a page for whoever looks at pages, else as JSON."""
    is_page = not request.url.path.startswith("/v1") and "text/html" in request.headers.get("accept", "")
    return error_page(error) if is_page else error.response()


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError), "registered for it"
    return _answer(request, error)


async def _storage_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, StorageError), "registered for it"
    refusal = of_storage(error)
    if refusal.status >= 500:
        _log.warning("database_refused", error=str(error))
    return _answer(request, refusal)


async def _network_error(request: Request, error: Exception) -> Response:
    _log.warning("network_refused", error=f"{type(error).__name__}: {error}")
    refusal = (
        of_requester(error)
        if isinstance(error, RequesterError)
        else unavailable("the chain does not answer at the moment: try again", "chain_unavailable")
    )
    return _answer(request, refusal)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError), "registered for it"
    first = error.errors()[0]
    # Where: body, header, query or path, then the field. What was given is not repeated.
    place = [str(part) for part in first["loc"] if part not in ("body", "query", "path", "header")]
    where = ".".join(place[:8]) or None
    what = first["msg"].removeprefix("Value error, ")
    return _answer(request, ApiError(400, f"{where or 'the request'}: {what}", param=where, code="invalid_value"))


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), "registered for it"
    code = {404: "not_found", 405: "method_not_allowed", 413: "request_too_large"}.get(error.status_code)
    return _answer(request, ApiError(error.status_code, str(error.detail), code=code, headers=error.headers))


async def _failed(request: Request, error: Exception) -> Response:
    _log.error("failed", exc_info=error)
    refusal = ApiError(500, "the gateway failed: try again", kind="server_error", code="internal_error")
    return _answer(request, refusal)


_HANDLERS: Final = {
    ApiError: _api_error,
    StorageError: _storage_error,
    ChainError: _network_error,
    RequesterError: _network_error,
    RequestValidationError: _invalid,
    HTTPException: _http_error,
    Exception: _failed,
}


# ---------------------------------------------------------------------------------------------------------------- start


@contextlib.contextmanager
def _listening(listen: str) -> Iterator[socket.socket]:
    host, port = split_endpoint(listen)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
        except OSError as error:
            raise SettingsError(
                f"cannot listen on {listen}: {error.strerror}; choose another port or address"
            ) from error
        listener.listen(BACKLOG)
        yield listener


@asynccontextmanager
async def open_gateway(settings: GatewaySettings) -> AsyncIterator[Gateway]:
    """A gateway from settings: key, deployment, database, models, a connected chain, the tab with its collector."""
    password = settings.keystore_password.get_secret_value() if settings.keystore_password else None
    signer = load_key(settings.key_file, password, settings.keystore_password_file)
    deployment = load_deployment(settings.deployment)
    if settings.migrate_on_start:
        await asyncio.to_thread(migrate, settings.database_url)
    storage = Storage(settings.database_url)
    try:
        storage.require_current_schema()
        journal = Journal(settings.state_dir)
        async with await Web3ChainClient.connect(settings.rpc_url, deployment) as chain:
            # A gateway lives long and asks for the same plans and endpoints with each request.
            remembering = RememberingChainClient(chain, CHAIN_PATIENCE_S)
            models: dict[str, OfferedModel] = {}
            for folder in settings.model_folder:
                manifest, codec = load_model_folder(folder)
                client = Client(remembering, deployment, signer, journal, manifest=manifest, codec=codec)
                tokenizer = codec if isinstance(codec, ChatTokenizer) else None
                created = int((folder / "manifest.json").stat().st_mtime)
                models[manifest.name] = OfferedModel(manifest.name, manifest, client, tokenizer, created)
            collector = await _collector(settings, next(iter(models.values())).client)
            connection = CollectorConnection(settings.coordinator, settings.coordinator_certificate)
            try:
                tab = Tab(
                    PatientChainClient(chain, CHAIN_PATIENCE_S), deployment, signer, journal, collector, connection
                )
                yield Gateway(
                    settings, chain=chain, storage=storage, deployment=deployment, signer=signer, models=models,
                    tab=tab, journal=journal,
                )  # fmt: skip
            finally:
                await connection.close()
    finally:
        storage.close()


async def _collector(settings: GatewaySettings, client: Client) -> str:
    """Whose tab it is; waits for a plan where no publisher is named."""
    waits = False
    while True:
        try:
            return await client.publisher(settings.publisher)
        except UnavailableError as error:
            if not waits:
                _log.info("waiting_for_a_plan", reason=str(error))
            waits = True
            await asyncio.sleep(WAIT_FOR_PLAN_S)


async def serve(settings: GatewaySettings, on_ready: Callable[[dict[str, Any]], None]) -> None:
    """Run until SIGTERM or SIGINT; `on_ready` gets the ready line's content."""
    async with open_gateway(settings) as gateway:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, gateway.stop)

        def ready(url: str, health: str) -> None:
            on_ready(
                {
                    "event": "ready",
                    "url": url,
                    "health": health,
                    "deposit_address": gateway.treasury.address,
                    "models": list(gateway.desk.models),
                }
            )

        try:
            await gateway.run(ready)
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)
