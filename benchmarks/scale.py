"""The coordinator against simulated fleets of 100, 1,000 and 10,000 nodes with churn: `make bench-scale`.

Every size runs in a process of its own, so that its memory is its own. What a coordinator does with a fleet: follow the
chain into a database, keep heartbeats and measurements, plan, judge the plan when a twentieth of the nodes has been
exchanged, and route. The chain is simulated at the boundary of the chain client, everything behind it is the
product's. Writes benchmarks/results/scale.json and docs/figures/scale.png; some minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from benchmarks.result import FIGURES, Figure, print_table, write_result
from bsns.chain.deployment import Deployment
from bsns.planning import PlanningNode, Problem, Terms, partition
from bsns.planning.measured import planning_links
from bsns.planning.problem import Link, PlanningError
from bsns.planning.rebalancing import MoveTerms, rebalance
from bsns.planning.routing import Availability, RouteTable
from bsns.planning.topology import Topology
from bsns.protocol.identifiers import ModelId, address
from bsns.protocol.measurements import LinkTiming, NodeMeasurements, UnitTiming
from bsns.protocol.model_graph import MODEL_INPUT, ModelGraph, Operator, Parameter, Tensor
from bsns.v1 import coordination_pb2
from coordinator.chain_follower import ChainFollower, FollowerLimits
from coordinator.dispatch.node_pool import NodePool, PoolLimits
from coordinator.storage import Storage, migrate
from tests.simulated_chain import GENESIS_TIME, SimulatedChain

SIZES: Final = (100, 1_000, 10_000)
QUICK: Final = (100, 300)
UNITS: Final = 32
UNIT_BYTES: Final = 400_000_000
LINKS: Final = 64
CHURN: Final = 0.05
REQUESTS_A_NODE: Final = 2
PLANNED_MAXIMUM: Final = 1_024
"""Nodes that one planning record holds."""
EVENTS_A_BLOCK: Final = 200
MODEL: Final = ModelId(bytes([7]) * 32)
_MEGABYTE: Final = 1e6


def node(number: int) -> str:
    return address((number + 1).to_bytes(20, "big"))


def chain_graph() -> ModelGraph:
    return ModelGraph(
        "units",
        tuple(Operator(f"unit {number}", "unit", 1, (number,), cache_bytes=4_096) for number in range(UNITS)),
        (
            Tensor("input", MODEL_INPUT, (0,), 8),
            *(
                Tensor(f"cut {number}", number, (number + 1,) if number + 1 < UNITS else (), 8_192, number + 1 == UNITS)
                for number in range(UNITS)
            ),
        ),
        tuple(Parameter(f"weights {number}", UNIT_BYTES) for number in range(UNITS)),
    )


def measurements(number: int, count: int, draw: random.Random) -> NodeMeasurements:
    """A node of a fleet of `count`, with links to `LINKS` others at the most."""
    others = draw.sample(range(count), min(LINKS + 1, count))
    links = tuple(
        LinkTiming(address(node(other)), draw.randrange(2_000_000, 160_000_000), draw.randrange(10**6, 10**8))
        for other in others[: LINKS + 1]
        if other != number
    )[:LINKS]
    time_ns = draw.randrange(1_000_000, 8_000_000)
    timings = (UnitTiming("unit", time_ns, time_ns, 3 * time_ns, time_ns),)
    memory = UNIT_BYTES * draw.randrange(2, 9)
    return NodeMeasurements(MODEL, address(node(number)), 1, bytes(32), memory, timings, links)


class Fleet:
    """One size, measured."""

    def __init__(self, count: int, folder: Path) -> None:
        self._count, self._draw = count, random.Random(count)
        self._path = folder / "fleet.sqlite"
        self.found: dict[str, float] = {}

    def run(self) -> dict[str, float]:
        asyncio.run(self._follow())
        self._heartbeats()
        self._plan()
        self.found["memory, MB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1_024 / _MEGABYTE
        return self.found

    def _time(self, name: str, action: Callable[[], Any], repeats: int = 1) -> Any:
        took = []
        for _ in range(repeats):
            began = time.perf_counter()
            result = action()
            took.append(time.perf_counter() - began)
        self.found[name] = statistics.median(took)
        return result

    async def _follow(self) -> None:
        """Registrations, exits and requests of the whole fleet out of the chain into the database."""
        count, draw = self._count, self._draw
        events: list[Any] = [
            (
                "NodeRegistry",
                "NodeRegistered",
                {
                    "node": node(number),
                    "operator": node(10**6 + number),
                    "staked": 10**18,
                    "activeFrom": GENESIS_TIME,
                    "certificateHash": draw.randbytes(32),
                    "endpoint": f"node-{number}.example:8443",
                },
            )
            for number in range(count)
        ]
        gone = draw.sample(range(count), round(CHURN * count))
        events += [
            ("NodeRegistry", "ExitStarted", {"node": node(number), "thawEnd": GENESIS_TIME + 9}) for number in gone
        ]
        for number in range(REQUESTS_A_NODE * count):
            request = number.to_bytes(32, "big")
            opened = {
                "requestId": request,
                "requester": node(2 * 10**6 + number),
                "planId": bytes(32),
                "deposit": 10**15,
                "feePerToken": 7,
                "promptTokens": 3,
                "maximumTokens": 9,
                "inputCommitment": draw.randbytes(32),
                "secretHash": draw.randbytes(32),
                "deadline": GENESIS_TIME + 10**6,
            }
            nodes = tuple(node(draw.randrange(count)) for _ in range(3))
            events += [
                ("InferenceEscrow", "RequestOpened", opened),
                (
                    "InferenceEscrow",
                    "RequestRouted",
                    {"requestId": request, "nodes": nodes, "deadline": GENESIS_TIME + 10**6},
                ),
            ]
        chain = SimulatedChain()
        for first in range(0, len(events), EVENTS_A_BLOCK):
            chain.mine(events[first : first + EVENTS_A_BLOCK])
        url = f"sqlite:///{self._path}"
        migrate(url)
        storage = Storage(url)
        contracts = [address(bytes([number]) * 20) for number in range(1, 7)]
        deployment = Deployment(chain.identity, *contracts, chain.first_number)
        storage.bind(deployment)
        follower = ChainFollower(chain, storage, deployment, limits=FollowerLimits())
        began = time.perf_counter()
        while follower.cursor is None or follower.cursor.number < chain.height:
            await follower.catch_up()
        self.found["follow: an event, ms"] = 1e3 * (time.perf_counter() - began) / len(events)
        self._time("read all nodes, s", storage.nodes, 3)
        self._time("read 256 open requests, s", lambda: storage.unfinished_requests(256), 3)
        began = time.perf_counter()
        self._measured = [measurements(number, count, draw) for number in range(count)]
        for item in self._measured:
            storage.keep_measurements(item, bytes(65))
        self.found["store: one node's measurements, ms"] = 1e3 * (time.perf_counter() - began) / count
        self._time("read all measurements, first time, s", lambda: storage.measurements(MODEL))
        self._time("read all measurements, s", lambda: storage.measurements(MODEL), 3)
        storage.close()
        self.found["database, MB"] = sum(item.stat().st_size for item in self._path.parent.iterdir()) / _MEGABYTE

    def _heartbeats(self) -> None:
        pool = NodePool(PoolLimits(attached_nodes=self._count), time.monotonic)
        attached = [pool.attach(node(number)) for number in range(self._count)]
        beat = coordination_pb2.Heartbeat(open_sessions=1, free_cache_bytes=10**9)
        began = time.perf_counter()
        for item in attached:
            pool.heartbeat(item, beat)
        # Each node is heard of every two seconds.
        self.found["heartbeats of the fleet, share of a core"] = (time.perf_counter() - began) / 2
        self._time("who is alive, s", pool.live, 5)

    def _plan(self) -> None:
        """Over as many nodes as a record holds."""
        graph = chain_graph()
        known = self._measured[:PLANNED_MAXIMUM]
        terms = Terms(concurrent_sessions=4, session_tokens=2_048)
        prior = Link(25_000_000, 12_500_000)
        nodes = [PlanningNode(item.node, item.memory_bytes, bytes(32), {"unit": _row(item)}) for item in known]
        links = planning_links(known, prior=prior)
        try:
            found = self._time("plan, s", lambda: partition(graph, nodes, links, terms=terms))
        except PlanningError as error:
            raise SystemExit(f"the fleet cannot be planned for: {error}") from error
        plan = found.to_shard_plan()
        gone = set(self._draw.sample(range(len(nodes)), round(CHURN * len(nodes))))
        stayed = tuple(item for number, item in enumerate(nodes) if number not in gone)
        problem = Problem(graph, stayed, links, terms=terms)
        self._time("judge the plan after churn, s", lambda: rebalance(plan, problem, MoveTerms()))
        measured = {item.node: item for item in known}
        network = self._time("network from measurements, s", lambda: Topology.measured(known, graph, prior))
        self._time("diagrams of the network, s", network.snapshot)
        table = self._time("table of routes, s", lambda: RouteTable.of(plan, graph, measured, prior=prior))
        now = {item.node: Availability() for item in plan.assignments}
        self._time("a route, s", lambda: table.best(now, 100), 5)


def _row(item: NodeMeasurements) -> int:
    return item.unit_timings[0].decode_nanoseconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small fleets")
    parser.add_argument("--size", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.size is not None:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps(Fleet(arguments.size, Path(folder)).run()))
        return 0
    sizes = QUICK if arguments.quick else SIZES
    found: dict[int, dict[str, float]] = {}
    for size in sizes:
        print(f"{size} nodes", file=sys.stderr, flush=True)
        command = [sys.executable, "-m", "benchmarks.scale", "--size", str(size)]
        output = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout
        found[size] = json.loads(output.splitlines()[-1])
    figures = []
    for name in found[sizes[0]]:
        values = [found[size][name] for size in sizes]
        growth = math.log(values[-1] / values[0]) / math.log(sizes[-1] / sizes[0])
        unit = name.rsplit(", ", 1)[-1]
        for size, value in zip(sizes, values, strict=True):
            note = f"grows with the power {growth:.2f} of the nodes"
            figures.append(Figure(f"{size:,} nodes: {name}", value, unit, value, value, 1, None, note))
    print_table(figures)
    if not arguments.quick:
        FIGURES.mkdir(parents=True, exist_ok=True)
        _draw(sizes, found)
        write_result("scale", "fleets are their own seeds", figures)
    return 0


def _draw(sizes: tuple[int, ...], found: dict[int, dict[str, float]]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    names = list(found[sizes[0]])
    for axis, chosen, label in (
        (left, [name for name in names if name.endswith(", s")], "seconds"),
        (right, [name for name in names if name.endswith(", MB")], "MB"),
    ):
        for name in chosen:
            axis.plot(sizes, [found[size][name] for size in sizes], marker="o", label=name.rsplit(", ", 1)[0])
        axis.set(xscale="log", yscale="log", xlabel="nodes", ylabel=label)
        axis.legend(frameon=False, fontsize=8)
        axis.grid(alpha=0.3)
    figure.savefig(FIGURES / "scale.png", dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
