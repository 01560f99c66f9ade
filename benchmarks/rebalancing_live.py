"""A swarm that runs: a node becomes four times as slow, the plan follows, another node joins, the plan follows again.

Two stages of real processes and real weights, paid requests in `STREAMS` streams one after another. The node is slowed
by stopping its process three quarters of the time, which no part of it is told.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from benchmarks.faults import terms
from benchmarks.result import FIGURES, Figure
from bsns.chain.client import Web3ChainClient
from bsns.chain.signer import KeySigner
from bsns.protocol.sampling import SamplingParameters
from bsns.requester.client import Client, RequestLimits
from bsns.requester.errors import RequesterError
from bsns.runtime.prepare import prepare
from coordinator.devnet import Devnet, ManagedProcess

FOLDER: Final = Path(__file__).parents[1] / "build" / "bench-rebalancing"
MODEL: Final = "smollm2-135m-instruct"
NODES: Final = 2
STREAMS: Final = 4
TOKENS: Final = 120
PROMPT: Final = "Write a short story about a lighthouse keeper."
SLOWDOWN: Final = 4
_RUNS_S: Final = 0.003
WINDOW_S, QUICK_WINDOW_S = 45.0, 20.0
REST_S: Final = 35.0
CHANGE_S: Final = 240.0
"""A change that has not come by then does not come."""
LIMITS: Final = RequestLimits(first_token_s=90.0, next_token_s=60.0, settlement_grace_s=2.0)
ENVIRONMENT: Final = {
    "BSNS_NODE_SESSION_LINGER_SECONDS": "5",
    "BSNS_NODE_LINK_REPORT_SECONDS": "3",
    "BSNS_COORDINATOR_REBALANCE_AFTER_SECONDS": "20",
    "BSNS_COORDINATOR_SETTLE_SECONDS": "6",
}


@dataclass
class Load:
    """Streams that ask again and again, and when each token came."""

    client: Client
    arrivals: list[float] = field(default_factory=list)
    answers: list[tuple[int, ...]] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    async def stream(self) -> None:
        sampling = SamplingParameters(maximum_tokens=TOKENS)
        while True:
            try:
                answer = await self.client.request(
                    PROMPT,
                    sampling,
                    on_token=lambda _token, _text: self.arrivals.append(time.monotonic()),
                    wait_for_settlement=False,
                )
                self.answers.append(answer.token_ids)
            except RequesterError as error:
                self.failures.append(str(error))
                print(f"an answer failed: {error}", file=sys.stderr, flush=True)

    def rate(self, since: float, until: float) -> float:
        return sum(since <= at < until for at in self.arrivals) / (until - since)


class Slowed:
    """Stops a process three quarters of the time, in turns of `_RUNS_S` seconds."""

    def __init__(self, child: ManagedProcess) -> None:
        self._pid = child.process.pid
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while not self._over.is_set():
            os.kill(self._pid, signal.SIGSTOP)
            time.sleep((SLOWDOWN - 1) * _RUNS_S)
            os.kill(self._pid, signal.SIGCONT)
            time.sleep(_RUNS_S)

    def end(self) -> None:
        self._over.set()
        self._thread.join()


async def run(progress: Callable[[str], None], *, quick: bool) -> list[Figure]:
    window = QUICK_WINDOW_S if quick else WINDOW_S
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    folder = prepare(MODEL)
    os.environ.update(ENVIRONMENT)
    devnet = Devnet(
        FOLDER,
        folder / "manifest.json",
        node_count=NODES,
        stage_count=2,
        terms=terms(),
        node_command=lambda _index: (sys.executable, "-m", "node_client.cli"),
        operators=NODES + 1,
    )
    async with devnet:
        await devnet.await_plan()
        signer = KeySigner(bytes.fromhex(devnet.requester_key_file.read_text().strip()))
        async with (
            await Web3ChainClient.connect(devnet.rpc_url, devnet.deployment) as chain,
            await Client.connect(
                devnet.rpc_url, devnet.deployment, signer, FOLDER / "requests", model_folder=folder, limits=LIMITS
            ) as client,
        ):
            return await _Live(devnet, chain, Load(client), progress, window).run()


class _Live:
    def __init__(
        self,
        devnet: Devnet,
        chain: Web3ChainClient,
        load: Load,
        progress: Callable[[str], None],
        window: float,
    ) -> None:
        self._devnet, self._chain, self._load = devnet, chain, load
        self._progress, self._window = progress, window
        self._events: list[tuple[float, str]] = []
        self._rates: dict[str, float] = {}

    async def run(self) -> list[Figure]:
        began = time.monotonic()
        streams = [asyncio.ensure_future(self._load.stream()) for _ in range(STREAMS)]
        slowed: Slowed | None = None
        try:
            await self._rest()
            await self._measure("before")
            self._event(f"one node {SLOWDOWN} times slower")
            plans = await self._count()
            slowed = Slowed(self._devnet.nodes[-1])
            during = asyncio.ensure_future(self._measure("slowed, old plan"))
            await self._plans(plans + 1)
            self._event("plan follows")
            await during
            await self._rest()  # answers on the old plan have ended, too
            await self._measure("slowed, new plan")
            newcomer = await self._devnet.start_node(NODES)
            self._event("a node joins")
            await self._plans(1, having=newcomer.ready["node"])
            self._event("plan follows")
            await self._rest()
            await self._measure("a node joined, new plan")
        finally:
            for stream in streams:
                stream.cancel()
            await asyncio.gather(*streams, return_exceptions=True)
            if slowed is not None:
                slowed.end()
        self._draw(began)
        return self._figures()

    async def _rest(self) -> None:
        """Until no plan has come for a while: the pace of nodes that begin to work is news, too."""
        count = -1
        for _ in range(int(CHANGE_S / REST_S)):
            before, count = count, await self._count()
            if count == before:
                return
            await asyncio.sleep(REST_S)

    async def _count(self) -> int:
        return len(await self._published())

    async def _published(self) -> list[Any]:
        head = await self._chain.head()
        first = self._devnet.deployment.first_block
        return list(await self._chain.events_between(first, head.number, name="PlanPublished"))

    async def _plans(self, count: int, having: str = "") -> None:
        """Wait until so many plans were published, the newest of which gives the node `having` something to do."""

        def is_there(plans: Sequence[Any]) -> bool:
            return len(plans) >= count and having in ("", *(item[4] for item in plans[-1].arguments["assignments"]))

        async with asyncio.timeout(CHANGE_S):
            while not is_there(plans := await self._published()):
                self._devnet.check()
                await asyncio.sleep(0.5)
        stages = [f"units {item[2]} to {item[3] - 1} on {item[4][:8]}" for item in plans[-1].arguments["assignments"]]
        self._progress(f"plan {len(plans)}: {', '.join(stages)}")

    async def _measure(self, name: str) -> None:
        since = time.monotonic()
        await asyncio.sleep(self._window)
        self._rates[name] = self._load.rate(since, time.monotonic())
        self._progress(f"{name}: {self._rates[name]:.1f} tokens/s")

    def _event(self, name: str) -> None:
        self._events.append((time.monotonic(), name))
        self._progress(name)

    def _figures(self) -> list[Figure]:
        load = self._load
        before = self._rates["before"]
        figures = [
            Figure(f"live, {name}: tokens/s", rate, "tokens/s", rate, rate, 1) for name, rate in self._rates.items()
        ]
        for name in ("slowed, old plan", "slowed, new plan", "a node joined, new plan"):
            share = self._rates[name] / before
            figures.append(Figure(f"live, {name}: over before", share, "ratio", share, share, 1))
        different = sum(answer != load.answers[0] for answer in load.answers)
        failed, answered = len(load.failures), len(load.answers)
        figures.append(Figure("live: answers with other tokens", different, "answers", 0, different, answered, "== 0"))
        note = "; ".join(load.failures)[:300]
        figures.append(
            Figure("live: answers that failed", failed, "answers", 0, failed, len(load.answers), "== 0", note)
        )
        return figures

    def _draw(self, began: float) -> None:
        import matplotlib as mpl

        mpl.use("Agg")
        from matplotlib import pyplot as plt

        end = self._load.arrivals[-1]
        width = 20.0  # streams wait for blocks between two answers: a shorter window shows that and nothing else
        moments = [began + width / 2 + number for number in range(int(end - began - width))]
        rates = [self._load.rate(at - width / 2, at + width / 2) for at in moments]
        figure, axis = plt.subplots(figsize=(9, 3.6), layout="constrained")
        axis.plot([at - began for at in moments], rates, color="#1d6fb0")
        top = max(rates) * 1.25
        for number, (at, name) in enumerate(self._events):
            axis.axvline(at - began, color="#b0651d", linewidth=0.8)
            axis.text(at - began + 2, top * (0.98 - 0.07 * (number % 2)), name, fontsize=8, va="top")
        axis.set(xlabel="seconds", ylabel="tokens/s, all streams, mean of 20 s", ylim=(0, top), xlim=(0, end - began))
        figure.savefig(FIGURES / "rebalancing-live.png", dpi=150)
        plt.close(figure)
