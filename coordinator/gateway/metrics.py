"""What the gateway counts, for Prometheus. Names have the prefix bsns_ and their unit as a suffix."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class GatewayMetrics:
    """One set a process; `registry` is what is scraped."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.http_requests = Counter(
            "bsns_http_requests", "HTTP requests by route and status.", ("method", "route", "status"), registry=registry
        )
        self.http_duration = Histogram(
            "bsns_http_request_duration_seconds", "Until the last byte of the answer.", ("route",), buckets=_SECONDS,
            registry=registry,
        )  # fmt: skip
        self.requests = Counter(
            "bsns_requests", "Answers asked for, by how they ended.", ("model", "outcome"), registry=registry
        )
        self.request_duration = Histogram(
            "bsns_request_duration_seconds",
            "From the queue to the last token.",
            ("model",),
            buckets=_SECONDS,
            registry=registry,
        )
        self._first_token = Histogram(
            "bsns_time_to_first_token_seconds", "From the quote to the first token.", ("model",), buckets=_SECONDS,
            registry=registry,
        )  # fmt: skip
        self.tokens = Counter("bsns_tokens", "Tokens of answers.", ("model",), registry=registry)
        self.requests_waiting = Gauge("bsns_queue_depth", "Answers that wait or are in progress.", registry=registry)
        self.charged_wei = Counter("bsns_charged_wei", "What users were charged.", registry=registry)
        self.refunded_wei = Counter(
            "bsns_refunded_wei", "What users were given back after a verdict.", registry=registry
        )
        self.owed_wei = Gauge("bsns_gateway_owed_wei", "What the gateway owes its users.", registry=registry)
        self.account_wei = Gauge(
            "bsns_gateway_account_wei", "What the gateway's account holds on the chain.", registry=registry
        )
        self.tab_wei = Gauge("bsns_gateway_tab_wei", "What its tab holds beyond what was promised.", registry=registry)
        self.is_ready = Gauge("bsns_ready", "1 while requests are taken.", registry=registry)
        self.live_viewers = Gauge("bsns_live_viewers", "Pages that are told about changes.", registry=registry)
        self.audits = Counter(
            "bsns_audits", "Records checked for readers, by what came out.", ("outcome",), registry=registry
        )

    def answered(self, model: str, outcome: str, seconds: float) -> None:
        """A job has ended."""
        self.requests.labels(model, outcome).inc()
        self.request_duration.labels(model).observe(seconds)

    def first_token(self, model: str, seconds: float) -> None:
        """An answer has begun."""
        self._first_token.labels(model).observe(seconds)
