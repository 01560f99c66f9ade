"""What a coordinator counts, for Prometheus. Names have the prefix bsns_ and their unit as a suffix.

Owns one registry a process. What the database knows is read from it when it is scraped, so that a number cannot drift
from what it counts; what only happens is counted when it does.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from bsns.protocol.contract_states import NodeStatus, RequestStatus
from coordinator.storage import ExplorerQueries, IntentState, Storage, StorageError, TicketState

_MODELS: Final = 1_000
_PASS_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class CoordinatorMetrics:
    """One set a process; `registry` is what is scraped."""

    def __init__(self, storage: Storage, chain_now: Callable[[], int]) -> None:
        registry = self.registry = CollectorRegistry()
        self.is_ready = Gauge("bsns_ready", "1 while the chain is followed to its head.", registry=registry)
        self.head = Gauge("bsns_chain_head_block", "Newest block of the endpoint.", registry=registry)
        self.lag = Gauge("bsns_chain_head_lag_blocks", "Blocks that are not followed yet.", registry=registry)
        self.reorganisations = Gauge("bsns_reorganisations", "Since the start.", registry=registry)
        self.attached = Gauge("bsns_attached_nodes", "Nodes that send heartbeats.", registry=registry)
        self.desk_duration = Histogram(
            "bsns_desk_pass_duration_seconds",
            "One look at everything that is open.",
            buckets=_PASS_SECONDS,
            registry=registry,
        )
        self.failures = Counter(
            "bsns_loop_failures", "Looks that failed, and are repeated.", ("loop",), registry=registry
        )
        registry.register(_StoredCounts(storage, chain_now))


class _StoredCounts(Collector):
    """Counts of the database, read by each scrape."""

    def __init__(self, storage: Storage, chain_now: Callable[[], int]) -> None:
        self._storage, self._chain_now = storage, chain_now
        self._queries = ExplorerQueries(storage)

    def describe(self) -> Iterable[Metric]:
        """Nothing is read to register it."""
        return ()

    def collect(self) -> Iterable[Metric]:
        up = GaugeMetricFamily("bsns_database_up", "1 if the database answered this scrape.")
        try:
            found = list(self._counts())
        except StorageError:
            up.add_metric((), 0)
            return [up]
        up.add_metric((), 1)
        return [up, *found]

    def _counts(self) -> Iterable[Metric]:
        now, nodes = self._chain_now(), self._storage.nodes().values()
        requests = {
            item: 0 for item in RequestStatus if item is not RequestStatus.ABSENT
        } | self._storage.request_counts()
        by_status = {item.name.lower(): count for item, count in requests.items()}
        yield _family("bsns_requests", "Requests on the chain by status.", "status", by_status)
        tickets = dict.fromkeys(map(str, TicketState), 0) | {
            str(item): count for item, count in self._queries.ticket_counts().items()
        }
        yield _family("bsns_tab_requests", "Requests on tabs by state.", "state", tickets)
        intents = dict.fromkeys(map(str, IntentState), 0) | {
            str(item): count for item, count in self._storage.intent_counts().items()
        }
        yield _family("bsns_intents", "What is wanted of the chain, by how far it came.", "state", intents)
        statuses = {status.name.lower(): 0 for status in NodeStatus if status is not NodeStatus.ABSENT}
        for node in nodes:
            name = node.status_at(now).name.lower()
            if name in statuses:
                statuses[name] += 1
        yield _family("bsns_nodes", "Registered nodes by status.", "status", statuses)
        yield GaugeMetricFamily("bsns_stake_wei", "Stake of all nodes.", sum(item.staked for item in nodes))
        yield GaugeMetricFamily("bsns_slashed_wei", "Stake that was taken so far.", sum(item.slashed for item in nodes))
        names = {item.model_id: item.name for item in self._queries.models(_MODELS)}
        epochs: dict[str, int] = {}
        for plan in self._storage.plans():
            name = names.get(plan.model_id, "unknown")
            epochs[name] = max(epochs.get(name, 0), plan.epoch)
        yield _family("bsns_plan_epoch", "Newest plan of each model: it rises with each change.", "model", epochs)
        oldest = self._storage.unfinished_requests(1)
        age = max(0, now - oldest[0].opened_at) if oldest else 0
        yield GaugeMetricFamily("bsns_oldest_open_request_seconds", "Age of the oldest request that is not over.", age)
        cursor = self._storage.cursor()
        if cursor is not None:
            yield GaugeMetricFamily("bsns_followed_block", "Newest block that was followed.", cursor.number)
            age = max(0, int(time.time()) - cursor.timestamp)
            yield GaugeMetricFamily("bsns_followed_block_age_seconds", "Since that block.", age)


def _family(name: str, text: str, label: str, counts: dict[str, int]) -> Metric:
    family = GaugeMetricFamily(name, text, labels=(label,))
    for value, count in counts.items():
        family.add_metric((value,), count)
    return family
