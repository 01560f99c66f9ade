"""What a node counts, for Prometheus. Names have the prefix bsns_ and their unit as a suffix.

Owns one registry a process. Promises that counting costs a step microseconds, and that what only the chain knows is
read in the background, never by a scrape.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from pathlib import Path
from typing import Final

import structlog
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from bsns.chain.errors import ChainError
from bsns.protocol.contract_states import NodeStatus
from node_client.chain_view import ChainView
from node_client.errors import NodeError

REFRESH_S: Final = 15.0
_STEP_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)
log = structlog.get_logger(__name__)


class NodeMetrics:
    """One set a process; `registry` is what is scraped."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.steps = Counter("bsns_steps", "Steps executed.", ("stage",), registry=registry)
        self.step_duration = Histogram(
            "bsns_stage_duration_seconds",
            "From a step's bytes to its output, waiting included.",
            ("stage", "kind"),
            buckets=_STEP_SECONDS,
            registry=registry,
        )
        self.rows = Counter("bsns_rows", "Rows computed.", ("stage",), registry=registry)
        self.hop_bytes = Counter(
            "bsns_hop_bytes", "Bytes of activations taken and handed on.", ("direction",), registry=registry
        )
        self.sessions = Gauge("bsns_sessions", "Sessions in progress.", registry=registry)
        self.session_limit = Gauge("bsns_sessions_limit", "Sessions that are taken at once.", registry=registry)
        self.sessions_ended = Counter(
            "bsns_sessions_ended", "Sessions by how they ended.", ("outcome",), registry=registry
        )
        self.queue_depth = Gauge("bsns_queue_depth", "Steps executed and not yet recorded.", registry=registry)
        self.cache_free = Gauge("bsns_cache_free_bytes", "Left for the caches of sessions.", registry=registry)
        self.evidence_used = Gauge("bsns_evidence_bytes", "Evidence kept until disputes are over.", registry=registry)
        self.evidence_free = Gauge("bsns_evidence_free_bytes", "Left for evidence.", registry=registry)
        self.disk_free = Gauge("bsns_disk_free_bytes", "Left on the disk of the node's folder.", registry=registry)
        self.transactions = Counter(
            "bsns_transactions", "Transactions of duties.", ("kind", "outcome"), registry=registry
        )
        self.duties = Counter(
            "bsns_duties", "Looks at duties, by what came of them.", ("duty", "outcome"), registry=registry
        )
        self.stake = Gauge("bsns_stake_wei", "Stake on the chain.", registry=registry)
        self.thawing = Gauge("bsns_thawing_wei", "Of it what is being taken out.", registry=registry)
        self.open_duties = Gauge("bsns_open_duties", "Duties that the stake answers for.", registry=registry)
        self.balance = Gauge("bsns_gas_balance_wei", "What the node's key has for gas.", registry=registry)
        self.gas_minimum = Gauge("bsns_gas_balance_minimum_wei", "Below this it is too little.", registry=registry)
        self.status = Gauge("bsns_node_status", "1 for the status on the chain.", ("status",), registry=registry)
        self.head_age = Gauge("bsns_chain_head_age_seconds", "Since the newest block that is known.", registry=registry)
        self.head = Gauge("bsns_chain_head_block", "Its number.", registry=registry)
        self.is_ready = Gauge("bsns_ready", "1 while sessions are taken.", registry=registry)

    async def follow(self, chain: ChainView, node: str, folder: Path) -> None:
        """Keep the gauges that only the chain, or a disk, can tell up to date; until cancelled."""
        while True:
            try:
                await self._read_chain(chain, node)
            except (ChainError, NodeError) as error:
                log.debug("metrics_wait", detail=str(error))
            self.disk_free.set((await asyncio.to_thread(shutil.disk_usage, folder)).free)
            await asyncio.sleep(REFRESH_S)

    async def _read_chain(self, chain: ChainView, node: str) -> None:
        account = await chain.client.call("NodeRegistry", "accountOf", node)
        self.stake.set(int(account.staked))
        self.thawing.set(int(account.thawing))
        self.open_duties.set(int(account.openDuties))
        self.balance.set(await chain.client.balance(node))
        now = await chain.node_status(node)
        for status in NodeStatus:
            self.status.labels(status.name.lower()).set(status is now)

    def saw_head(self, number: int, timestamp: int) -> None:
        """A newest block, and its time in Unix seconds."""
        self.head.set(number)
        self.head_age.set_function(lambda: max(0.0, time.time() - timestamp))
