"""Spans of one request find one another without a word on the wire."""

from __future__ import annotations

import gzip
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from bsns.tracing import CLOSE_S, EXPORT_TIMEOUT_S, RequestTracer, trace_ids, tracer

REQUEST = bytes(range(32))
WAIT_S = 20.0


class Collector:
    """An OTLP collector that keeps what it gets."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, Any]] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                data = self.rfile.read(int(self.headers["Content-Length"]))
                if self.headers.get("Content-Encoding") == "gzip":
                    data = gzip.decompress(data)
                for resource in ExportTraceServiceRequest.FromString(data).resource_spans:
                    names = {item.key: item.value.string_value for item in resource.resource.attributes}
                    for scope in resource.scope_spans:
                        collector.spans += [(names["service.name"], span) for span in scope.spans]
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self.server = HTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self._thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self._thread.join(WAIT_S)


@pytest.fixture
def collector() -> Iterator[Collector]:
    found = Collector()
    yield found
    found.stop()


def test_spans_of_two_services_are_of_one_trace_under_one_root(collector: Collector) -> None:
    gateway, node = tracer("gateway", collector.url), tracer("node", collector.url)
    began = time.time() - 1
    node.span(REQUEST, "stage 0", began, {"bsns.steps": 3})
    node.span(REQUEST, "stage 1", began, failed="PEER_UNAVAILABLE")
    gateway.span(REQUEST, "request", began - 1, is_root=True)
    gateway.span(bytes(32), "request", began, is_root=True)
    gateway.close()
    node.close()
    trace, root = trace_ids(REQUEST)
    mine = {span.name: (service, span) for service, span in collector.spans if int.from_bytes(span.trace_id) == trace}
    assert set(mine) == {"stage 0", "stage 1", "request"}
    assert int.from_bytes(mine["request"][1].span_id) == root
    assert mine["request"][1].parent_span_id == b""
    for name in ("stage 0", "stage 1"):
        assert mine[name][0] == "node"
        assert int.from_bytes(mine[name][1].parent_span_id) == root
    assert mine["stage 0"][1].span_id != mine["stage 1"][1].span_id
    assert mine["stage 1"][1].status.message == "PEER_UNAVAILABLE"
    lasted = mine["stage 0"][1].end_time_unix_nano - mine["stage 0"][1].start_time_unix_nano
    assert 0.9e9 < lasted < 10e9
    assert len(collector.spans) == 4


def test_without_a_collector_nothing_is_loaded() -> None:
    quiet = tracer("node", None)
    assert type(quiet) is RequestTracer
    quiet.span(REQUEST, "stage 0", time.time())
    quiet.close()


def test_collector_that_is_away_holds_nobody_up() -> None:
    lonely = tracer("node", "http://127.0.0.1:1")
    began = time.monotonic()
    for _ in range(10_000):
        lonely.span(REQUEST, "stage 0", time.time())
    assert time.monotonic() - began < WAIT_S
    began = time.monotonic()
    lonely.close()
    assert time.monotonic() - began < CLOSE_S + EXPORT_TIMEOUT_S
