"""Traces of a request across all hops, for an OpenTelemetry collector; optional (the extra `tracing`).

Owns how spans of one request find one another without a word on the wire: the trace id and the id of its root span
follow from the request's id, which every party knows. Promises that nothing is loaded, counted or sent where no
collector is named, that a collector which does not answer holds nobody up, and that no span holds a prompt, an answer
or a secret.
"""

from __future__ import annotations

import threading
import time
from typing import Any, Final

from bsns.protocol.identifiers import keccak256

EXPORT_EVERY_MS: Final = 1_000
EXPORT_TIMEOUT_S: Final = 5
CLOSE_S: Final = 3.0
WAITING_SPANS: Final = 4_096
_DOMAIN: Final = b"bsns trace:"


Facts = dict[str, str | int | float | bool]
"""Attributes of a span."""


class TracingUnavailableError(Exception):
    """A collector was named and nothing that speaks to one is installed."""


def trace_ids(request_id: bytes) -> tuple[int, int]:
    """Trace id (16 bytes) and id of the root span (8 bytes) of a request, neither of them zero."""
    digest = keccak256(_DOMAIN + request_id)
    return int.from_bytes(digest[:16]) or 1, int.from_bytes(digest[16:24]) or 1


class RequestTracer:
    """Records spans that are over; this one records none. `tracer` gives one that does."""

    def span(
        self,
        request_id: bytes,
        name: str,
        began: float,
        attributes: Facts | None = None,
        *,
        failed: str | None = None,
        is_root: bool = False,
    ) -> None:
        """A span from Unix second `began` until now. `failed` says why, if it failed."""

    def close(self) -> None:
        """Send what waits, for a few seconds at the most."""


class _Exporting(RequestTracer):
    def __init__(self, service: str, endpoint: str) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
        except ImportError as error:
            raise TracingUnavailableError(
                f"otlp_endpoint is {endpoint}, and OpenTelemetry is not installed: `pip install 'bsns[tracing]'`, or "
                "leave the setting out"
            ) from error

        class Ids(RandomIdGenerator):
            """Random, but for a root span that is about to begin."""

            def __init__(self) -> None:
                self.root: tuple[int, int] | None = None

            def generate_trace_id(self) -> int:
                return self.root[0] if self.root is not None else super().generate_trace_id()

            def generate_span_id(self) -> int:
                return self.root[1] if self.root is not None else super().generate_span_id()

        self._ids = Ids()
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": service}), id_generator=self._ids, shutdown_on_exit=False
        )
        self._exporter = OTLPSpanExporter(endpoint=endpoint.rstrip("/") + "/v1/traces", timeout=EXPORT_TIMEOUT_S)
        self._provider.add_span_processor(
            BatchSpanProcessor(self._exporter, schedule_delay_millis=EXPORT_EVERY_MS, max_queue_size=WAITING_SPANS)
        )
        self._tracer = self._provider.get_tracer("bsns")

    def span(
        self,
        request_id: bytes,
        name: str,
        began: float,
        attributes: Facts | None = None,
        *,
        failed: str | None = None,
        is_root: bool = False,
    ) -> None:
        from opentelemetry.trace import (
            NonRecordingSpan,
            SpanContext,
            Status,
            StatusCode,
            TraceFlags,
            set_span_in_context,
        )

        trace, root = trace_ids(request_id)
        parent = SpanContext(trace, root, is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED))
        context: Any = {} if is_root else set_span_in_context(NonRecordingSpan(parent), {})  # type: ignore[arg-type]
        self._ids.root = (trace, root) if is_root else None
        try:
            span = self._tracer.start_span(
                name,
                context=context,
                start_time=round(began * 1e9),
                attributes={"bsns.request_id": "0x" + request_id.hex(), **(attributes or {})},
            )
        finally:
            self._ids.root = None
        if failed is not None:
            span.set_status(Status(StatusCode.ERROR, failed))
        span.end(time.time_ns())

    def close(self) -> None:
        # Left alone, the provider tries for half a minute to reach a collector that is away.
        impatience = threading.Timer(CLOSE_S, self._exporter.shutdown)
        impatience.daemon = True
        impatience.start()
        self._provider.shutdown()
        impatience.cancel()


def tracer(service: str, endpoint: str | None) -> RequestTracer:
    """What records spans of `service` for the OTLP collector at `endpoint` (http://host:4318); nothing for None.
    TracingUnavailableError where the extra is not installed.
    """
    return RequestTracer() if endpoint is None else _Exporting(service, endpoint)
