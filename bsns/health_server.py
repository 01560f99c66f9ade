"""Health and metrics of a service over HTTP, for whoever operates it: /healthz, /readyz, /metrics.

Owns one small server on an address of its own, apart from what strangers can reach. Promises that /healthz answers as
long as the process can, that /readyz says with status 503 why nothing is served just now, and that it ends with its
service. Collects nothing: the registry is the service's.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Final

from aiohttp import web
from prometheus_client import CollectorRegistry
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from bsns.protocol.endpoints import split_endpoint

SHUTDOWN_S: Final = 1.0


class HealthServerError(Exception):
    """It cannot listen; the message says where and what to do."""


@asynccontextmanager
async def health_server(
    listen: str,
    registry: CollectorRegistry,
    not_ready_because: Callable[[], str | None],
    on_scrape: Callable[[], None] = lambda: None,
) -> AsyncIterator[str]:
    """Serve on `listen` (host:port; port 0 takes a free one) and give the endpoint. `on_scrape` brings gauges up to
    date before they are read; it must not block. HealthServerError if it cannot listen.
    """

    async def alive(_request: web.Request) -> web.Response:
        return web.json_response({"status": "alive"})

    async def ready(_request: web.Request) -> web.Response:
        reason = not_ready_because()
        body = {"status": "ready" if reason is None else "not ready", "reason": reason}
        return web.json_response(body, status=200 if reason is None else 503)

    async def metrics(_request: web.Request) -> web.Response:
        on_scrape()
        text = await asyncio.to_thread(generate_latest, registry)
        return web.Response(body=text, headers={"Content-Type": CONTENT_TYPE_LATEST})

    application = web.Application(client_max_size=1024)
    application.add_routes([web.get("/healthz", alive), web.get("/readyz", ready), web.get("/metrics", metrics)])
    runner = web.AppRunner(application, access_log=None, shutdown_timeout=SHUTDOWN_S)
    await runner.setup()
    try:
        host, port = split_endpoint(listen)
        site = web.TCPSite(runner, host, port)
        try:
            await site.start()
        except OSError as error:
            raise HealthServerError(
                f"cannot listen on {listen} for health and metrics: {error.strerror}; choose another port or address"
            ) from error
        yield f"{host}:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()
