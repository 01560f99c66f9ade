"""What becomes of answers while nodes are killed, frozen or cut off: `make bench-faults`.

A devnet of real processes and real weights, three stages with two replicas each; paid requests that are streamed while
something is done to nodes of their route at a random token. Every answer must be that of the undisturbed run. Prints
how many are, how long the reader waits, what happens where no other replica is left, and whether the coordinator and
the chain's view of the members follow. Seeded: a seed disturbs the same stages at the same tokens. `--only kills,chain`
for some sections, `--quick` for a short run.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import json
import os
import random
import shutil
import signal
import statistics
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import aiohttp

from benchmarks.result import FIGURES, Figure, merge_result, print_table, write_result
from bsns.chain.client import Web3ChainClient
from bsns.chain.deployment import Terms
from bsns.chain.signer import KeySigner
from bsns.protocol.sampling import SamplingParameters
from bsns.requester.client import Answer, Client, RequestLimits
from bsns.requester.errors import NotServedError, RequesterError
from bsns.runtime.prepare import prepare
from coordinator.chain_follower import ChainFollower, FollowerLimits
from coordinator.devnet import Devnet, ManagedProcess
from coordinator.dispatch import PoolLimits
from coordinator.storage import Storage, migrate

FOLDER: Final = Path(__file__).parents[1] / "build" / "bench-faults"
MODEL: Final = "smollm2-135m-instruct"
STAGES: Final = 3
REPLICAS: Final = 2
TOKENS: Final = 24
PROMPTS: Final = (
    "Name three rivers of Europe.",
    "Why is the sky blue?",
    "Write one sentence about a lighthouse.",
    "What does a compiler do?",
)
# A restarted node is waited for so long: it imports torch and checks its weights on a machine that is busy.
REJOIN_S: Final = 180.0
SILENCE_S: Final = 30.0
_LINE_S: Final = 2.0
LIMITS: Final = RequestLimits(first_token_s=90.0, next_token_s=60.0, settlement_grace_s=2.0)
# Finished sessions leave soon; a machine that is shared by all nodes needs longer to answer a probe.
NODE_ENVIRONMENT: Final = {"BSNS_NODE_SESSION_LINGER_SECONDS": "10", "BSNS_NODE_LOG_LEVEL": "info"}


@dataclass(frozen=True)
class Sizes:
    """How often each thing is done."""

    kills: int = 200
    doubles: int = 20
    freezes: int = 20
    coordinator: int = 6
    chain: int = 4
    unserved: int = 3
    cycles: int = 51


QUICK: Final = Sizes(kills=9, doubles=2, freezes=2, coordinator=1, chain=1, unserved=1, cycles=3)


@dataclass(frozen=True)
class Disturbed:
    """One answer to which something was done. `stall_s` is the longest time between two of its tokens (or before the
    first), `usual_s` the median of the others.
    """

    section: str
    what: str
    at_token: int
    same: bool
    stall_s: float
    usual_s: float
    error: str = ""


def terms() -> Terms:
    """A devnet's without committees: their re-executions would compete with the streams on one machine."""
    devnet = Terms.for_devnet()
    return dataclasses.replace(
        devnet,
        registry=dataclasses.replace(devnet.registry, thaw_period=200_000),
        escrow=dataclasses.replace(devnet.escrow, commit_window=600, verification_window=86_400),
        verification=dataclasses.replace(
            devnet.verification, sampling_rate_bps=0, secret_window=7_200, attest_window=600, reveal_window=600
        ),
    )


class Swarm:
    """The network, and who is where."""

    def __init__(
        self, devnet: Devnet, chain: Web3ChainClient, client: Client, assignments: Sequence[Any], rng: random.Random
    ) -> None:
        self.devnet, self.chain, self.client, self.rng = devnet, chain, client, rng
        # Structs of the contract: stage, replica, first unit, end unit, node.
        self.replicas = [[item[4] for item in sorted(assignments) if item[0] == stage] for stage in range(STAGES)]
        self.children = {child.ready["node"]: child for child in devnet.nodes}
        self._restarting: dict[str, asyncio.Task[None]] = {}
        # (node, Unix time) of every kill, and of every restart's ready line.
        self.killed: list[tuple[str, float]] = []
        self.back: list[tuple[str, float]] = []

    @classmethod
    @contextlib.asynccontextmanager
    async def running(cls, seed: int) -> AsyncIterator[Swarm]:
        shutil.rmtree(FOLDER, ignore_errors=True)
        FOLDER.mkdir(parents=True)
        folder = prepare(MODEL)
        devnet = Devnet(
            FOLDER,
            folder / "manifest.json",
            node_count=STAGES * REPLICAS,
            stage_count=STAGES,
            replicas=REPLICAS,
            terms=terms(),
            node_command=lambda _index: (sys.executable, "-m", "node_client.cli"),
        )
        os.environ.update(NODE_ENVIRONMENT)
        async with devnet:
            assignments = await devnet.await_plan()
            signer = KeySigner(bytes.fromhex(devnet.requester_key_file.read_text().strip()))
            async with (
                await Web3ChainClient.connect(devnet.rpc_url, devnet.deployment) as chain,
                await Client.connect(
                    devnet.rpc_url,
                    devnet.deployment,
                    signer,
                    FOLDER / "requests",
                    model_folder=folder,
                    limits=LIMITS,
                ) as client,
            ):
                yield cls(devnet, chain, client, assignments, random.Random(seed))

    # -- what is done to it

    async def route(self) -> list[str]:
        """The nodes of the newest request."""
        head = await self.chain.head()
        events = await self.chain.events_between(
            self.devnet.deployment.first_block, head.number, contract="InferenceEscrow", name="RequestRouted"
        )
        return list(events[-1].arguments["nodes"])

    async def kill(self, node: str, *, restart: bool = True) -> None:
        """SIGKILL, and a restart in the background."""
        child = self.children[node]
        child.process.send_signal(signal.SIGKILL)
        self.killed.append((node, time.time()))
        await child.process.wait()
        if restart:
            self._restarting[node] = asyncio.ensure_future(self._restart(node))

    def restart(self, node: str) -> None:
        """Start a node that was killed, in the background."""
        self._restarting[node] = asyncio.ensure_future(self._restart(node))

    async def _restart(self, node: str) -> None:
        self.devnet.take_dead()
        began = time.time()
        index = int(self.children[node].name.rsplit("-", 1)[1])
        self.children[node] = await self.devnet.start_node(index)
        self.back.append((node, time.time()))
        # Until the coordinator sends work there again.
        await asyncio.wait_for(self._attached(node, began), REJOIN_S)

    async def _attached(self, node: str, since: float) -> None:
        while True:
            for at, event, who in self.coordinator_log():
                if (who, event) == (node, "node_attached") and at >= since:
                    return
            await asyncio.sleep(0.2)

    def coordinator_log(self) -> list[tuple[float, str, str]]:
        """(Unix time, event, node) of every node that came or went."""
        found = []
        for line in (FOLDER / "logs" / "coordinator.log").read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError, KeyError):
                entry = json.loads(line)
                if entry["event"] in ("node_attached", "node_detached"):
                    at = datetime.fromisoformat(entry["timestamp"]).timestamp()
                    found.append((at, entry["event"], entry["node"]))
        return found

    def members(self) -> set[str]:
        """The nodes that are attached, by the coordinator's log."""
        last = {node: event for _, event, node in self.coordinator_log()}
        return {node for node, event in last.items() if event == "node_attached"}

    async def whole(self) -> None:
        """Wait until every replica is up."""
        restarting, self._restarting = self._restarting, {}
        if restarting:
            await asyncio.gather(*restarting.values())

    async def rpc(self, method: str, *parameters: Any) -> Any:
        body = {"jsonrpc": "2.0", "id": 1, "method": method, "params": list(parameters)}
        async with aiohttp.ClientSession() as session, session.post(self.devnet.rpc_url, json=body) as response:
            answer = await response.json()
        if "error" in answer:
            raise RuntimeError(f"anvil refused {method}: {answer['error']}")
        return answer["result"]

    async def state_is_that_of_a_replay(self) -> bool:
        """Whether what the coordinator has stored is what a new follower folds from the first block."""
        await self.rpc("evm_setIntervalMining", 0)
        url = f"sqlite:///{FOLDER / 'replay.sqlite'}"
        migrate(url)
        replay, followed = Storage(url), Storage(self.devnet.database_url)
        try:
            head = await self.chain.head()
            follower = ChainFollower(self.chain, replay, self.devnet.deployment, limits=FollowerLimits())
            await follower.require_right_chain()
            async with asyncio.timeout(REJOIN_S):
                while follower.cursor is None or follower.cursor.hash != head.hash:
                    await follower.catch_up()
                while True:
                    cursor = followed.cursor()
                    if cursor is not None and cursor.hash == head.hash:
                        break
                    await asyncio.sleep(0.2)
            return replay.network_state() == followed.network_state()
        finally:
            replay.close()
            followed.close()
            await self.rpc("evm_setIntervalMining", 1)

    # -- one answer

    async def ask(
        self, number: int, at_token: int = -1, disturb: Callable[[list[str]], Awaitable[None]] | None = None
    ) -> tuple[Answer, list[float]]:
        """Answer `number` of the list; when `at_token` tokens are there, `disturb` gets the nodes of its route.
        Returns the times between tokens, the first from the sending of the prompt.
        """
        prompt = PROMPTS[number % len(PROMPTS)]
        # Half of them greedy, half sampled: a draw depends on the request's seed alone.
        sampled = {"temperature": 0.8, "seed": 7} if number % 2 else {}
        arrivals: list[float] = []
        acting: list[asyncio.Future[None]] = []

        async def act() -> None:
            if disturb is not None:
                await disturb(await self.route())

        def on_token(_token: int, _text: str) -> None:
            arrivals.append(time.monotonic())
            if len(arrivals) == at_token + 1 and not acting:
                acting.append(asyncio.ensure_future(act()))

        def on_progress(line: str) -> None:
            if line.startswith("opening the session") and not arrivals:
                arrivals.append(time.monotonic())
                if at_token == 0:
                    acting.append(asyncio.ensure_future(act()))

        sampling = SamplingParameters(maximum_tokens=TOKENS, **sampled)
        try:
            answer = await self.client.request(
                prompt, sampling, on_token=on_token, on_progress=on_progress, wait_for_settlement=False
            )
        finally:
            await asyncio.gather(*acting)
        return answer, [after - before for before, after in pairwise(arrivals)]


class Bench:
    """Runs the sections and keeps what it saw."""

    def __init__(self, swarm: Swarm, sizes: Sizes) -> None:
        self.swarm, self.sizes = swarm, sizes
        self.expected: list[tuple[int, ...]] = []
        self.seen: list[Disturbed] = []
        self.figures: list[Figure] = []

    async def undisturbed(self) -> None:
        for number in range(len(PROMPTS)):
            answer, _ = await self.swarm.ask(number)
            self.expected.append(answer.token_ids)
            print(
                f"undisturbed: {len(answer.token_ids)} tokens, {answer.tokens_per_second or 0:.1f} tokens/s", flush=True
            )

    async def disturbed(
        self, section: str, number: int, at_token: int, what: str, disturb: Callable[[list[str]], Awaitable[None]]
    ) -> Disturbed:
        number %= len(PROMPTS)
        try:
            answer, gaps = await self.swarm.ask(number, at_token, disturb)
            stall = max(gaps)
            usual = statistics.median(gaps)
            found = Disturbed(section, what, at_token, answer.token_ids == self.expected[number], stall, usual)
        except RequesterError as error:
            found = Disturbed(section, what, at_token, False, 0.0, 0.0, str(error))
        self.seen.append(found)
        verdict = "same tokens" if found.same else f"NOT THE SAME {found.error[:160]}"
        print(f"{section} {what} at token {at_token}: {verdict}, longest pause {found.stall_s:.2f} s", flush=True)
        return found

    async def kills(self) -> None:
        rng = self.swarm.rng
        for number in range(self.sizes.kills):
            await self.swarm.whole()
            stage, at_token = rng.randrange(STAGES), rng.randrange(TOKENS - 4)
            await self.disturbed("kill", number, at_token, f"stage {stage}", partial(self._kill, stages=(stage,)))

    async def doubles(self) -> None:
        rng = self.swarm.rng
        for number in range(self.sizes.doubles):
            await self.swarm.whole()
            stages, at_token = sorted(rng.sample(range(STAGES), 2)), rng.randrange(TOKENS - 4)
            await self.disturbed("two kills", number, at_token, f"stages {stages}", partial(self._kill, stages=stages))

    async def _kill(self, route: list[str], stages: Sequence[int]) -> None:
        await asyncio.gather(*(self.swarm.kill(route[stage]) for stage in stages))

    async def freezes(self) -> None:
        rng = self.swarm.rng
        for number in range(self.sizes.freezes):
            await self.swarm.whole()
            stage, at_token = rng.randrange(STAGES), rng.randrange(TOKENS - 4)
            frozen: list[ManagedProcess] = []
            freeze = partial(self._freeze, stage=stage, frozen=frozen)
            await self.disturbed("freeze", number, at_token, f"stage {stage}", freeze)
            for child in frozen:
                child.process.send_signal(signal.SIGCONT)
            # It has missed heartbeats, and attaches again.
            await asyncio.sleep(1.0)

    async def _freeze(self, route: list[str], stage: int, frozen: list[ManagedProcess]) -> None:
        child = self.swarm.children[route[stage]]
        child.process.send_signal(signal.SIGSTOP)
        frozen.append(child)

    async def coordinator(self) -> None:
        """The coordinator is killed in mid-answer, and started again on its database."""
        for number in range(self.sizes.coordinator):
            await self.swarm.whole()
            await self.disturbed("coordinator", number, 4 + number, "killed", self._kill_coordinator)

    async def _kill_coordinator(self, _route: list[str]) -> None:
        child = self.swarm.devnet.coordinator
        child.process.send_signal(signal.SIGKILL)
        await child.process.wait()
        self.swarm.devnet.take_dead()
        await self.swarm.devnet.start_coordinator()

    async def chain(self) -> None:
        """The chain is rewritten 1 to 12 blocks deep, or silent for 30 seconds, in mid-answer."""
        for number, depth in enumerate((1, 12, 3, 7)[: self.sizes.chain]):
            await self.swarm.whole()
            rewrite = partial(self._rewrite, depth=depth)
            await self.disturbed("reorganisation", number, 6, f"{depth} deep", rewrite)
        await self.disturbed("silent chain", 0, 4, f"for {SILENCE_S:.0f} s", self._silence)
        same = await self.swarm.state_is_that_of_a_replay()
        self.figures.append(
            Figure("coordinator's state equals a replay from the first block", int(same), "bool", 0, 1, 1, "== 1")
        )

    async def _rewrite(self, _route: list[str], depth: int) -> None:
        await self.swarm.rpc("anvil_reorg", depth, [])

    async def _silence(self, _route: list[str]) -> None:
        anvil = next(child for child in self.swarm.devnet.processes if child.name == "anvil")
        anvil.process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(SILENCE_S)
        anvil.process.send_signal(signal.SIGCONT)

    async def unserved(self) -> None:
        """Both replicas of a stage at once: an error that names the stage, and the whole deposit back."""
        whole, named, count = 0, 0, self.sizes.unserved
        for number in range(count):
            await self.swarm.whole()
            stage = number % STAGES
            try:
                await self.swarm.ask(number, 5, partial(self._kill_replicas, stage=stage))
            except NotServedError as error:
                named += f"stage {stage}" in str(error)
                head = await self.swarm.chain.head()
                await self.swarm.rpc("evm_increaseTime", max(1, (error.refundable_at or 0) - head.timestamp + 2))
                await self.swarm.rpc("evm_mine")
                request = await self.swarm.chain.call("InferenceEscrow", "requestOf", error.request_id)
                refund = await self.swarm.client.refund(error.request_id)
                whole += refund.withdrawn_wei >= request.deposit
                print(f"no replica left of stage {stage}: {str(error)[:160]}", flush=True)
            for node in self.swarm.replicas[stage]:
                self.swarm.restart(node)
        self.figures += [
            Figure("no replica: errors that name the stage", named / count, "share", 0, 1, count, "== 1"),
            Figure("no replica: deposits given back", whole / count, "share", 0, 1, count, "== 1"),
        ]

    async def cycles(self) -> None:
        """Nodes of all stages are killed at once and come back, again and again; then the coordinator's view of the
        members must be right.
        """
        swarm, right = self.swarm, []
        for number in range(self.sizes.cycles // STAGES):
            await swarm.whole()
            killed = [swarm.replicas[stage][number % REPLICAS] for stage in range(STAGES)]
            await asyncio.gather(*(swarm.kill(node) for node in killed))
            await asyncio.sleep(2 * PoolLimits().heartbeat_seconds)
            # None of them has started again so soon.
            right.append(swarm.members() == set(swarm.children) - set(killed))
            await swarm.whole()
            right.append(swarm.members() == set(swarm.children))
            print(
                f"{STAGES * (number + 1)} kills and returns, the members were right {sum(right)} of {len(right)} times",
                flush=True,
            )
        self.figures.append(
            Figure("members: right two heartbeats after kills, and after returns", sum(right) / len(right), "share",
                   0, 1, len(right), "== 1", f"{STAGES} nodes at once")
        )  # fmt: skip

    async def _kill_replicas(self, _route: list[str], stage: int) -> None:
        # One that is back within the time that a route waits would take its stage over again.
        await asyncio.gather(*(self.swarm.kill(node, restart=False) for node in self.swarm.replicas[stage]))

    # -- figures

    def summarise(self) -> None:
        for section in dict.fromkeys(item.section for item in self.seen):
            found = [item for item in self.seen if item.section == section]
            same = sum(item.same for item in found)
            self.figures.append(
                Figure(f"{section}: answers with the same tokens", same / len(found), "share", 0, 1, len(found), "== 1")
            )
            stalls = sorted(item.stall_s - item.usual_s for item in found if item.same)
            if not stalls:
                continue
            for name, share, goal in (("p50", 0.5, None), ("p95", 0.95, "<= 1")):
                at = stalls[min(len(stalls) - 1, int(share * len(stalls)))]
                self.figures.append(
                    Figure(
                        f"{section}: stall {name}", at, "s", stalls[0], stalls[-1], len(stalls),
                        goal if section in ("kill", "two kills", "freeze") else None,
                        "longest pause less the median one, the replay included",
                    )
                )  # fmt: skip

    def follow_members(self) -> None:
        """How fast the coordinator's view of the members follows."""
        log = self.swarm.coordinator_log()
        heartbeats = f"<= {2 * PoolLimits().heartbeat_seconds}"
        for name, event, moments, goal in (
            ("members: a killed node is seen to be gone within", "node_detached", self.swarm.killed, heartbeats),
            # It loads its stage between the two.
            ("members: from a node's ready line to its attachment", "node_attached", self.swarm.back, None),
        ):
            waits = []
            for node, at in moments:
                # A node may attach a moment before its ready line is read.
                later = [when for when, what, who in log if (what, who) == (event, node) and when >= at - _LINE_S]
                waits.append(max(0.0, min(later, default=at + REJOIN_S) - at))
            if waits:
                self.figures.append(
                    Figure(name, max(waits), "s", min(waits), statistics.median(waits), len(waits),
                           goal, "high: the median")
                )  # fmt: skip

    def draw(self) -> None:
        """docs/figures/faults-stall.png: the pause behind each kind of disturbance."""
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
        for section in dict.fromkeys(item.section for item in self.seen):
            stalls = sorted(item.stall_s for item in self.seen if item.section == section and item.same)
            if len(stalls) > 1:
                shares = [(index + 1) / len(stalls) for index in range(len(stalls))]
                axes.step(stalls, shares, where="post", label=f"{section} ({len(stalls)})")
        axes.set(xlabel="longest pause between two tokens, s", ylabel="share of answers", ylim=(0, 1.02), xscale="log")
        axes.grid(alpha=0.3)
        axes.legend()
        figure.savefig(FIGURES / "faults-stall.png", dpi=120)
        plt.close(figure)


SECTIONS: Final = ("kills", "doubles", "freezes", "coordinator", "chain", "unserved", "cycles")


async def run(seed: int, sizes: Sizes, sections: Sequence[str]) -> bool:
    async with Swarm.running(seed) as swarm:
        bench = Bench(swarm, sizes)
        await bench.undisturbed()
        for section in sections:
            print(f"\n== {section}", flush=True)
            await getattr(bench, section)()
        await swarm.whole()
    bench.summarise()
    bench.follow_members()
    if sizes is not QUICK and tuple(sections) == SECTIONS:
        write_result("faults", str(seed), bench.figures)
        bench.draw()
    elif sizes == Sizes():
        merge_result("faults", str(seed), bench.figures)
    return print_table(bench.figures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=11)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--kills", type=int)
    parser.add_argument("--only", help=f"of {','.join(SECTIONS)}")
    given = parser.parse_args()
    sections = tuple(given.only.split(",")) if given.only else SECTIONS
    if unknown := set(sections) - set(SECTIONS):
        parser.error(f"unknown section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}")
    sizes = QUICK if given.quick else Sizes()
    if given.kills is not None:
        sizes = dataclasses.replace(sizes, kills=given.kills)
    met = asyncio.run(run(given.seed, sizes, sections))
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
