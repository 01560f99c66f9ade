"""Plans looked up by the shape of a network, against plans that are searched for: `make bench-topology`.

Five families of emulated networks. Some of each are planned for first, which gives the classes and their schemas.
Others are then planned for in every way: always by the planner, by the schema of the class that persistent homology
finds, by that of plain features (size, mean hop, spanning tree), by any class's, by a short search from the planner's
best start and by that start alone, and by greedy, shortest-path and random placement. A way's cost is its plan's
slowest stage over the best that any of them found. Writes benchmarks/results/topology.json and
docs/figures/topology-*.png; ten minutes.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final
from unittest import mock

import numpy as np

from benchmarks.result import FIGURES, Figure, merge_result, print_table, write_result
from benchmarks.topology_networks import FAMILIES, network
from bsns.planning import Objective, Partition, PlanningError, Problem, partition, sequential
from bsns.planning.chain import Chain
from bsns.planning.topology import Floats, Snapshot, Topology, bottleneck
from bsns.planning.topology_classes import Classes, Schema

SIZES: Final = (20, 60, 200, 1_000)
LEARNT: Final = {20: 4, 60: 4, 200: 4, 1_000: 1}
"""Networks of each family that classes are made of, by size."""
TESTED: Final = {20: 4, 60: 4, 200: 3, 1_000: 1}
_FIRST_LEARNT: Final = 1_000
COST_GOAL, TIME_GOAL = 1.10, 0.10
ALWAYS, WITHOUT = "always plan", "always plan, no neighbourhoods"
BY_HOMOLOGY, BY_FEATURES, BY_CHANCE = "schema by homology", "schema by features", "any schema"
QUICK, STARTS = "short search from the best start", "best start, no search"
GREEDY, SHORTEST, RANDOM = "greedy recursion", "shortest path", "random placement"
WAYS: Final = (ALWAYS, WITHOUT, BY_HOMOLOGY, BY_FEATURES, BY_CHANCE, QUICK, STARTS, GREEDY, SHORTEST, RANDOM)


@dataclass(frozen=True)
class Sample:
    """One network planned for in one way: the slowest stage, seconds to plan, whether a schema gave the plan."""

    family: str
    nodes: int
    way: str
    value_ns: float
    seconds: float
    looked_up: bool = False


def features_apart(one: Snapshot, other: Snapshot) -> float:
    """How unlike two networks are by plain features: mean difference of their logarithms, 0 to 1."""

    def of(item: Snapshot) -> Floats:
        return np.array([item.node_count, 1e6 * item.mean_hop + 1, 1e6 * item.tree_length / item.node_count + 1])

    return min(1.0, float(np.abs(np.log(of(one) / of(other))).mean()))


class Bench:
    def __init__(self, *, quick: bool) -> None:
        self._quick = quick
        self.sizes = SIZES[:2] if quick else SIZES
        self.samples: list[Sample] = []
        draw = random.Random(7)
        self.classes = {
            BY_HOMOLOGY: Classes(),
            BY_FEATURES: Classes(features_apart),
            BY_CHANCE: Classes(lambda _one, _other: draw.random(), radius=1.0),
        }

    def learn(self) -> None:
        for size in self.sizes:
            for family in FAMILIES:
                for seed in range(1 if self._quick else LEARNT[size]):
                    problem = network(family, size, _FIRST_LEARNT + seed, Objective.THROUGHPUT)
                    chain = Chain(problem)
                    topology = Topology.of(chain)
                    snapshot = topology.snapshot()
                    schema = Schema.of(partition(problem.graph, problem.nodes, problem.links), chain, topology)
                    for name, classes in self.classes.items():
                        nearest = classes.nearest(snapshot)
                        if name == BY_CHANCE or nearest is None or nearest[1] > classes.radius:
                            classes.learn(snapshot, schema)
                print(f"learnt {family}, {size} nodes: {self._counts()}", flush=True)

    def _counts(self) -> str:
        return ", ".join(f"{len(classes)} {name}" for name, classes in self.classes.items())

    def test(self) -> None:
        for size in self.sizes:
            for family in FAMILIES:
                for seed in range(1 if self._quick else TESTED[size]):
                    self._test(family, size, seed)

    def _test(self, family: str, size: int, seed: int) -> None:
        problem = network(family, size, seed, Objective.THROUGHPUT)
        began = time.perf_counter()
        planned = sequential.solve(problem)
        always = time.perf_counter() - began
        found = {ALWAYS: (float(planned.value_ns), always, False)}
        began = time.perf_counter()
        chain = Chain(problem)
        topology = Topology.of(chain)
        tables = time.perf_counter() - began
        snapshot = topology.snapshot()  # a coordinator has one: it takes them as nodes measure
        for name, classes in self.classes.items():
            began = time.perf_counter()
            looked_up = classes.look_up(chain, topology, snapshot)
            seconds = tables + time.perf_counter() - began
            if looked_up is None:  # the planner's turn; it would find what it has found above
                found[name] = (float(planned.value_ns), seconds + always, False)
            else:
                found[name] = (float(looked_up.partition.value_ns), seconds, True)
        rng = random.Random(seed)
        for name, way in (
            (WITHOUT, lambda: without_neighbourhoods(problem)),
            (QUICK, lambda: sequential.quick(Chain(problem))),
            (STARTS, lambda: sequential.quick(Chain(problem), proposals=0)),
            (GREEDY, lambda: sequential.recursion(problem)),
            (SHORTEST, lambda: shortest_path(problem)),
            (RANDOM, lambda: at_random(problem, rng)),
        ):
            began = time.perf_counter()
            plan = way()
            value = math.inf if plan is None else float(plan.value_ns)
            found[name] = (value, time.perf_counter() - began, False)
        self.samples += [Sample(family, size, name, *found[name]) for name in WAYS]
        best = min(value for value, _, _ in found.values())
        print(
            f"{family}, {size} nodes: "
            + ", ".join(f"{name} {found[name][0] / best:.2f} in {found[name][1]:.2f} s" for name in WAYS),
            flush=True,
        )

    # ------------------------------------------------------------------------------------------------------- results

    def costs(self, way: str, size: int | None = None, family: str | None = None) -> list[float]:
        """Value over the best that any way found, of each network."""
        return [
            sample.value_ns / best
            for sample, best in self._with_best()
            if sample.way == way and size in (None, sample.nodes) and family in (None, sample.family)
        ]

    def _with_best(self) -> list[tuple[Sample, float]]:
        groups = [self.samples[at : at + len(WAYS)] for at in range(0, len(self.samples), len(WAYS))]
        return [(sample, min(item.value_ns for item in group)) for group in groups for sample in group]

    def over_always(
        self, way: str, of: Callable[[Sample], float], which: Callable[[Sample], bool] = lambda _: True
    ) -> list[float]:
        """`of` the samples of a way for `which` that holds, over that of always planning."""
        groups = [self.samples[at : at + len(WAYS)] for at in range(0, len(self.samples), len(WAYS))]
        pairs = [(next(item for item in group if item.way == way), group[0]) for group in groups]
        ratios = [of(item) / of(always) for item, always in pairs if which(item)]
        return [item for item in ratios if math.isfinite(item)]

    def figures(self) -> list[Figure]:
        found = []
        for way in WAYS:
            costs = [item for item in self.costs(way) if math.isfinite(item)]
            found.append(
                Figure(f"{way}: slowest stage over the best known", statistics.fmean(costs), "ratio", min(costs),
                       max(costs), len(costs), None, f"{len(self.costs(way)) - len(costs)} networks without a plan")
            )  # fmt: skip
        for way in WAYS[1:]:
            for (part, of), goal in zip(_PARTS, (COST_GOAL, TIME_GOAL), strict=True):
                ratios = self.over_always(way, of)
                aim = f"<= {goal}" if way == BY_HOMOLOGY else None
                found.append(_ratio(f"{way}: {part} over always planning", ratios, aim))
        for way in self.classes:
            looked_up = [item.looked_up for item in self.samples if item.way == way]
            found.append(
                Figure(f"{way}: plans that a schema gave", statistics.fmean(looked_up), "share", 0, 1, len(looked_up),
                       None, f"{len(self.classes[way])} classes")
            )  # fmt: skip
        return [*found, *(figure for size in self.sizes for figure in self._of_size(size))]

    def _of_size(self, size: int) -> list[Figure]:
        def here(item: Sample) -> bool:
            return item.nodes == size

        def given(item: Sample) -> bool:
            return here(item) and item.looked_up

        seconds = [item.seconds for item in self.samples if here(item) and item.way == ALWAYS]
        taken = [item.looked_up for item in self.samples if here(item) and item.way == BY_HOMOLOGY]
        name = f"{BY_HOMOLOGY}, {size} nodes"
        found = [
            Figure(f"{ALWAYS}, {size} nodes: time", statistics.fmean(seconds), "s", min(seconds), max(seconds),
                   len(seconds)),
            Figure(f"{name}: plans that a schema gave", statistics.fmean(taken), "share", 0, 1, len(taken)),
        ]  # fmt: skip
        for part, of in _PARTS:
            without = self.over_always(WITHOUT, of, here)
            found.append(_ratio(f"{WITHOUT}, {size} nodes: {part} over always planning", without))
            if any(taken):
                looked_up = self.over_always(BY_HOMOLOGY, of, given)
                found.append(_ratio(f"{name}, where one did: {part} over always planning", looked_up))
        return found


_PARTS: Final[tuple[tuple[str, Callable[[Sample], float]], ...]] = (
    ("slowest stage", lambda item: item.value_ns),
    ("time to plan", lambda item: item.seconds),
)


def _ratio(name: str, ratios: Sequence[float], goal: str | None = None) -> Figure:
    return Figure(name, statistics.fmean(ratios), "ratio", min(ratios), max(ratios), len(ratios), goal)


def without_neighbourhoods(problem: Problem) -> Partition:
    """The planner's answer when it starts from stages over all nodes alone."""
    with mock.patch.object(sequential, "neighbourhoods", return_value=[]):
        return sequential.solve(problem)


def shortest_path(problem: Problem) -> Partition | None:
    """The chain of nodes with the least latency, each once, as a plan for throughput."""
    try:
        chain = partition(problem.graph, problem.nodes, problem.links, Objective.LATENCY, terms=problem.terms)
    except PlanningError:
        return None
    place = {node.node: number for number, node in enumerate(problem.nodes)}
    stages = [(item.first, item.end, tuple(place[node.node] for node in item.nodes[:1])) for item in chain.stages]
    return sequential.partition_of(problem, stages, "shortest path")


def at_random(problem: Problem, rng: random.Random) -> Partition | None:
    """Stages of equal work, each node in any stage that it has room for."""
    chain = Chain(problem)
    for _ in range(100):
        count = rng.choice((2, 3, 4, 6, 8, 12))
        cuts = [round(chain.units * at / count) for at in range(count + 1)]
        members: list[list[int]] = [[] for _ in range(count)]
        for node in rng.sample(range(chain.nodes), min(chain.nodes, problem.terms.maximum_assignments)):
            fits = [at for at in range(count) if chain.reach[node, cuts[at]] >= cuts[at + 1]]
            if fits:
                members[rng.choice(fits)].append(node)
        if all(members):
            stages = [(first, end, tuple(nodes)) for (first, end), nodes in zip(pairwise(cuts), members, strict=True)]
            return sequential.partition_of(problem, stages, "random")
    return None


# ------------------------------------------------------------------------------------------------------------ pictures


def draw_diagrams(axes: Sequence[Any], nodes: int) -> None:
    """A persistence diagram of each family."""
    for panel, family in zip(axes, FAMILIES, strict=True):
        snapshot = Topology.of(Chain(network(family, nodes, 0, Objective.THROUGHPUT))).snapshot()
        finite = [bars[np.isfinite(bars[:, 1])] * 1e3 for bars in snapshot.diagrams]
        top = max(float(bars.max(initial=0.0)) for bars in finite) * 1.05
        panel.plot([0, top], [0, top], color="0.7", lw=1)
        for bars, colour, marker, label in zip(
            finite, ("tab:blue", "tab:orange"), ("o", "^"), ("H0: clusters", "H1: rings"), strict=True
        ):
            panel.scatter(bars[:, 0], bars[:, 1], s=14, alpha=0.6, c=colour, marker=marker, label=label)
        panel.set(title=f"{family}, {nodes} nodes\nclusters: {snapshot.cluster_count}", xlabel="birth, ms",
                  xlim=(0, top), ylim=(0, top), aspect="equal")  # fmt: skip
    axes[0].set(ylabel="death, ms")
    axes[0].legend(loc="lower right")


def draw_swarm(axes: Any, family: str, nodes: int) -> None:
    """A swarm as its hops place it: clusters, spanning tree, bridges, and the stages of its plan."""
    problem = network(family, nodes, 0, Objective.THROUGHPUT)
    chain = Chain(problem)
    topology = Topology.of(chain)
    snapshot = topology.snapshot()
    at = _placed(topology.hops) * 1e3
    plan = sequential.solve(problem)
    stage_of = {node.node: number for number, stage in enumerate(plan.stages) for node in stage.nodes}
    for _, one, two in topology.spanning_tree:
        bridge = (one, two) in snapshot.bridges
        axes.plot(*at[[one, two]].T, color="tab:red" if bridge else "0.75", lw=2.2 if bridge else 0.8, zorder=1)
    speed = 1 / chain.prefix[:, -1]
    size = 30 + 260 * speed / speed.max()
    serving = np.array([node in stage_of for node in topology.nodes])
    colours = np.array(snapshot.clusters)
    axes.scatter(*at.T, s=size, c=colours % 10, cmap="tab10", vmin=0, vmax=9, alpha=np.where(serving, 0.95, 0.35),
                 edgecolors=["black" if item else "none" for item in serving], zorder=2)  # fmt: skip
    for place, node in zip(at, topology.nodes, strict=True):
        if node in stage_of:
            axes.annotate(str(stage_of[node]), place, ha="center", va="center", fontsize=7, color="white", zorder=3)
    axes.set(title=f"{family}, {nodes} nodes, clusters: {snapshot.cluster_count}; {len(plan.stages)} stages on "
                   f"{int(serving.sum())} nodes", xlabel="ms, one way", ylabel="ms", aspect="equal")  # fmt: skip


def _placed(hops: Floats) -> Floats:
    """Two coordinates a node whose distances are close to `hops` (classical scaling)."""
    squared = hops**2
    centred = squared - squared.mean(axis=0) - squared.mean(axis=1)[:, None] + squared.mean()
    values, vectors = np.linalg.eigh(-centred / 2)
    found: Floats = vectors[:, -2:] * np.sqrt(np.maximum(values[-2:], 0))
    return found


def draw(bench: Bench) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(FAMILIES), figsize=(17, 4), layout="constrained")
    draw_diagrams(axes, 200)
    figure.savefig(FIGURES / "topology-persistence.png", dpi=110)
    plt.close(figure)

    figure, axes = plt.subplots(1, 2, figsize=(15, 7), layout="constrained")
    draw_swarm(axes[0], "regions", 60)
    draw_swarm(axes[1], "ring", 60)
    figure.suptitle("size: speed; number: stage; red: bridge between clusters; pale: not in the plan")
    figure.savefig(FIGURES / "topology-swarm.png", dpi=100)
    plt.close(figure)

    figure, panel = plt.subplots(figsize=(9, 5.5), layout="constrained")
    for way in WAYS:
        costs = [value for value in bench.costs(way) if math.isfinite(value)]
        seconds = [item.seconds for item in bench.samples if item.way == way]
        panel.scatter(statistics.median(seconds), statistics.fmean(costs), s=60, label=way)
        panel.plot([statistics.median(seconds)] * 2, np.quantile(costs, (0.1, 0.9)), lw=1.5, alpha=0.5)
    panel.set(xscale="log", yscale="log", xlabel="time to plan, s (median)",
              ylabel="slowest stage over the best known (mean, 10 to 90 %)")  # fmt: skip
    panel.grid(alpha=0.3, which="both")
    panel.legend()
    figure.savefig(FIGURES / "topology-ablation.png", dpi=120)
    plt.close(figure)


def diagrams() -> list[Figure]:
    """Seconds that diagrams take, of the slowest family."""
    found = []
    for size, limit in ((200, 2), (1_000, 10)):
        taken = []
        for family in FAMILIES:
            topology = Topology.of(Chain(network(family, size, 0, Objective.THROUGHPUT)))
            began = time.perf_counter()
            snapshot = topology.snapshot()
            taken.append(time.perf_counter() - began)
            print(f"{family}, {size} nodes: {taken[-1]:.2f} s, {snapshot.landmark_count} landmarks", flush=True)
        found.append(
            Figure(f"diagrams of {size} nodes", max(taken), "s", min(taken), max(taken), len(taken), f"<= {limit}",
                   "the slowest family")
        )  # fmt: skip
    return found


def stability() -> Figure:
    """By how much diagrams move where links move by up to 5 %: over the largest change of a hop."""
    ratios = []
    for number, family in enumerate(FAMILIES):
        topology = Topology.of(Chain(network(family, 60, 0, Objective.THROUGHPUT)))
        noise = np.random.default_rng(number).uniform(0.95, 1.05, topology.hops.shape)
        moved = Topology(topology.nodes, topology.hops * (noise + noise.T) / 2, topology.births)
        most = float(np.abs(moved.hops - topology.hops).max())
        one, other = topology.snapshot(), moved.snapshot()
        ratios += [bottleneck(one, other, dimension) / most for dimension in (0, 1)]
    return Figure("diagrams move by, over the largest change of a hop", max(ratios), "ratio", min(ratios), max(ratios),
                  len(ratios), "<= 1", "the stability theorem")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--only", choices=["diagrams"], help="how long diagrams take, and how much they move")
    given = parser.parse_args()
    if given.only:
        figures = [*diagrams(), stability()]
        merge_result("topology", "0", figures)
        sys.exit(0 if print_table(figures) else 1)
    bench = Bench(quick=given.quick)
    bench.learn()
    bench.test()
    figures = [*bench.figures(), *diagrams(), stability()]
    if not given.quick:
        write_result("topology", "0", figures)
        draw(bench)
    sys.exit(0 if print_table(figures) else 1)


if __name__ == "__main__":
    main()
