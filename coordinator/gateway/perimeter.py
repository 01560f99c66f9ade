"""What every HTTP request meets before anything else: limits, headers, a request id, the log and the metrics.

Owns the sizes and rates that hold for everybody, and the headers that keep browsers from doing what no page here asks
them to. Promises that a body is never read beyond its limit, that each answer carries the id under which it is logged,
that no header, query or body is written to a log, and that nothing which is not HTTP reaches the routes.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Mapping
from typing import Final

import structlog
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coordinator.gateway.access import RateLimiter
from coordinator.gateway.errors import ApiError, too_many
from coordinator.gateway.metrics import GatewayMetrics
from coordinator.gateway.settings import GatewaySettings

# Given by a proxy or a client, a request id is taken over if it looks like one.
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9_.:-]{8,128}")
_METHODS: Final = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_UNLIMITED: Final = frozenset({"/healthz", "/readyz"})
_HEADERS: Final[Mapping[bytes, bytes]] = {
    b"x-content-type-options": b"nosniff",
    b"referrer-policy": b"no-referrer",
    b"x-frame-options": b"DENY",
    b"cross-origin-opener-policy": b"same-origin",
    b"permissions-policy": b"camera=(), geolocation=(), microphone=()",
    b"content-security-policy": (
        b"default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        b"form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
    ),
}
_log = structlog.get_logger(__name__)


class Perimeter:
    """ASGI middleware around the whole application."""

    def __init__(self, app: ASGIApp, settings: GatewaySettings, metrics: GatewayMetrics) -> None:
        self._app, self._settings, self._metrics = app, settings, metrics
        self._rates = RateLimiter(settings.address_requests_a_minute, settings.tracked_addresses)
        self._open = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        given = Request(scope).headers.get("x-request-id", "")
        request_id = given if _REQUEST_ID.fullmatch(given) else f"req_{secrets.token_hex(12)}"
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(request_id=request_id)
        began, status = time.monotonic(), 500

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                known = {name.lower() for name, _ in message["headers"]}
                added = [(name, value) for name, value in _HEADERS.items() if name not in known]
                message = {**message, "headers": [*message["headers"], *added, (b"x-request-id", request_id.encode())]}
            await send(message)

        self._open += 1
        try:
            refusal = self._refusal(scope)
            if refusal is not None:
                await refusal.response()(scope, receive, sent)
            else:
                await self._app(scope, _limited(receive, self._settings.body_bytes), sent)
        finally:
            self._open -= 1
            seconds = time.monotonic() - began
            route = getattr(scope.get("route"), "path", "other")
            # What a stranger calls a method must not become a series of its own.
            method = scope["method"] if scope["method"] in _METHODS else "other"
            self._metrics.http_requests.labels(method, route, str(status)).inc()
            self._metrics.http_duration.labels(route).observe(seconds)
            _log.info("http", method=method, route=route, status=status, milliseconds=round(seconds * 1e3, 1))

    def _refusal(self, scope: Scope) -> ApiError | None:
        if scope["path"] in _UNLIMITED:
            return None
        if self._open > self._settings.connections:
            return too_many("this gateway has all the requests it takes at once: try again in a moment")
        client = scope.get("client")
        wait = self._rates.wait_s(client[0] if client else "")
        if wait:
            return too_many(f"too many requests of this address: come back in {max(1, round(wait))} s", wait)
        length = Request(scope).headers.get("content-length", "0")
        if not length.isdigit() or int(length) > self._settings.body_bytes:
            return self._too_large()
        return None

    def _too_large(self) -> ApiError:
        return ApiError(
            413, f"a request has at most {self._settings.body_bytes} bytes", code="request_too_large",
            headers={"Connection": "close"},
        )  # fmt: skip


def _limited(receive: Receive, limit: int) -> Receive:
    """`receive` of a body that says nothing about its length, or lies."""
    taken = 0

    async def limited() -> Message:
        nonlocal taken
        message = await receive()
        if message["type"] == "http.request":
            taken += len(message.get("body", b""))
            if taken > limit:
                # Of Starlette's own kind, since everything else that ends the reading of a body is called malformed.
                raise HTTPException(413, f"a request has at most {limit} bytes", {"Connection": "close"})
        return message

    return limited
