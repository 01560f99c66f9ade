"""The planner on chains: how far its plans are from the optimum, against two published ways to plan, and how long it
takes.

`quality` draws random clusters (32 layers, 2 to 6 nodes, speeds log-uniform over 1 to
8, room for 1.15 to 1.9 times the layers, a head that costs nothing or as much as 8 layers) and compares with the
optimum. That optimum is computed here, by counting, and shares no code with the planner. The baselines are written from
their descriptions: layers in proportion to memory (exo), and the fewest nodes with room for the model, filled in
proportion to speed (Parallax); the second also over all nodes. Plans for latency, with a link of its own for every pair
of nodes, are compared with the exact programme where that is possible, and with their bound beyond. `times` measures
planning time over units and nodes.
"""

import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.result import FIGURES, Figure
from bsns.planning import (
    FREE_LINKS,
    Link,
    Links,
    Objective,
    Partition,
    PlanningNode,
    Problem,
    Terms,
    partition,
    sequential,
)
from bsns.protocol.identifiers import address
from bsns.protocol.model_graph import ModelGraph, Operator, Parameter, Tensor

LAYERS = 32
LAYER_BYTES = 1_000_000
LAYER_NS = 8_000_000
CUT_BYTES = 4_096
CLUSTERS = 200
SETTINGS = tuple((related, head) for head in (0, 8) for related in (False, True))
TIMED = {
    "units": [(units, 16) for units in (32, 64, 128, 256, 512, 1024)],
    "nodes": [(1024, nodes) for nodes in (4, 16, 64, 128, 256)],
}
RUNS = 5
LATENCY_SIZES = ((128, 16), (256, 32))
"""Units and nodes of the fleets whose plans for latency are compared with their bound."""


@dataclass(frozen=True)
class Cluster:
    """Nanoseconds of a layer and room in layers, by node."""

    layer_ns: tuple[int, ...]
    room: tuple[int, ...]


def model(layers: int, head: int, cut_bytes: int = 0) -> ModelGraph:
    """`layers` equal layers and, if it costs something, a head without parameters that count; the embedding is free."""
    count = layers + (head > 0)
    return ModelGraph(
        f"{layers} layers, head {head}",
        tuple(
            Operator(f"unit-{number}", "layer" if number < layers else "head", 1, (number,)) for number in range(count)
        ),
        tuple(
            Tensor(f"cut-{number}", number, (number + 1,) if number + 1 < count else (), cut_bytes, number + 1 == count)
            for number in range(count)
        ),
        tuple(Parameter(f"weights-{number}", LAYER_BYTES if number < layers else 0) for number in range(count)),
    )


def fleet(cluster: Cluster, head: int) -> tuple[PlanningNode, ...]:
    return tuple(
        PlanningNode(
            address((number + 1).to_bytes(20, "big")),
            room * LAYER_BYTES,
            bytes(32),
            {"layer": layer, "head": max(head, 1) * layer},
        )
        for number, (layer, room) in enumerate(zip(cluster.layer_ns, cluster.room, strict=True))
    )


def draw_cluster(rng: random.Random, layers: int, nodes: int, *, related: bool) -> Cluster:
    """A cluster with room for the model; `related`: memory in proportion to speed, else independent of it."""
    while True:
        speeds = [8 ** rng.random() for _ in range(nodes)]
        shares = speeds if related else [8 ** rng.random() for _ in range(nodes)]
        total = layers * rng.uniform(1.15, 1.9)
        room = tuple(int(total * share / sum(shares)) for share in shares)
        if sum(room) >= layers and min(room) > 0:
            return Cluster(tuple(round(LAYER_NS / speed) for speed in speeds), room)


def optimum(cluster: Cluster, layers: int, head: int) -> int:
    """The least bottleneck over all orders, cuts and choices of nodes, by counting.

    Layers are equal and nothing crosses a cut: within T node i takes at most min(room, T // layer) layers, less what
    the head costs on the one that has it. Any counts that add up to enough make a plan, with the head's node last.
    """

    def holds(threshold: int) -> bool:
        counts = [min(room, threshold // layer) for layer, room in zip(cluster.layer_ns, cluster.room, strict=True)]
        if not head:
            return sum(counts) >= layers
        for number, layer in enumerate(cluster.layer_ns):
            left = threshold - head * layer
            if left >= 0 and sum(counts) - counts[number] + min(cluster.room[number], left // layer) >= layers:
                return True
        return False

    low, high = 0, max(cluster.layer_ns) * (layers + head)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle + 1, high)
    return low


def bottleneck(cluster: Cluster, order: Sequence[int], counts: Sequence[int], head: int) -> int:
    """Of `counts[i]` layers on node `order[i]`, the head on the last that serves."""
    serving = [(node, count) for node, count in zip(order, counts, strict=True) if count]
    costs = [count * cluster.layer_ns[node] for node, count in serving]
    costs[-1] += head * cluster.layer_ns[serving[-1][0]]
    return max(costs)


def proportional_to_memory(cluster: Cluster, layers: int, head: int) -> int:
    """exo's ring: nodes by memory, largest first, each with layers in proportion to its memory; cuts are rounded."""
    order = sorted(range(len(cluster.room)), key=lambda node: -cluster.room[node])
    total, taken, cuts = sum(cluster.room), 0, [0]
    for node in order:
        taken += cluster.room[node]
        cuts.append(round(layers * taken / total))
    return bottleneck(cluster, order, [end - first for first, end in pairwise(cuts)], head)


def water_filled(cluster: Cluster, layers: int, head: int, order: Sequence[int]) -> int:
    """Layers in proportion to speed up to each node's room: the level at which they add up, then whole layers by the
    largest remainder."""
    speeds = {node: 1 / cluster.layer_ns[node] for node in order}
    low, high = 0.0, layers / min(speeds.values())
    for _ in range(100):
        level = (low + high) / 2
        full = sum(min(cluster.room[node], level * speeds[node]) for node in order) >= layers
        low, high = (low, level) if full else (level, high)
    shares = [min(cluster.room[node], high * speeds[node]) for node in order]
    counts = [math.floor(share + 1e-9) for share in shares]
    by_remainder = sorted(range(len(order)), key=lambda place: counts[place] - shares[place])
    while sum(counts) < layers:
        for place in by_remainder:
            if sum(counts) < layers and counts[place] < cluster.room[order[place]]:
                counts[place] += 1
    return bottleneck(cluster, order, counts, head)


def parallax(cluster: Cluster, layers: int, head: int) -> int:
    """Nodes by room, largest first, until the model fits (the fewest stages), then water-filling among them."""
    order: list[int] = []
    for node in sorted(range(len(cluster.room)), key=lambda item: (-cluster.room[item], cluster.layer_ns[item])):
        order.append(node)
        if sum(cluster.room[item] for item in order) >= layers:
            break
    return water_filled(cluster, layers, head, order)


def water_filling_everywhere(cluster: Cluster, layers: int, head: int) -> int:
    """Water-filling over all nodes, the fastest last, so that it has the head."""
    return water_filled(cluster, layers, head, sorted(range(len(cluster.room)), key=lambda n: -cluster.layer_ns[n]))


BASELINES: dict[str, Callable[[Cluster, int, int], int]] = {
    "proportional to memory (exo)": proportional_to_memory,
    "greedy + water-filling (Parallax)": parallax,
    "water-filling over all nodes": water_filling_everywhere,
}
OURS = ("hybrid", "search over orders alone")


def plans(cluster: Cluster, layers: int, head: int, seed: int) -> dict[str, Partition]:
    """The default planner, and its search for large fleets with the exact programme left out."""
    graph, nodes, terms = model(layers, head), fleet(cluster, head), Terms(spread_leftover=False)
    return {
        "hybrid": partition(graph, nodes, FREE_LINKS, terms=terms, seed=seed),
        "search over orders alone": sequential.solve(
            Problem(graph, nodes, FREE_LINKS, terms=terms), seed=seed, exact_work=0
        ),
    }


def geomean(values: Sequence[float]) -> float:
    return math.exp(statistics.fmean(math.log(value) for value in values))


def quality(seed: int, clusters: int = CLUSTERS) -> list[Figure]:
    """Section 1: bottleneck over the optimum, and docs/figures/planner-chains.png."""
    figures: list[Figure] = []
    ratios: dict[str, dict[str, list[float]]] = {}
    proven = 0
    for related, head in SETTINGS:
        setting = f"memory {'in proportion to' if related else 'independent of'} speed, head {head}"
        rng = random.Random(f"{seed}/{setting}")
        rows = ratios.setdefault(setting, {name: [] for name in (*OURS, *BASELINES)})
        for _ in range(clusters):
            cluster = draw_cluster(rng, LAYERS, rng.randint(2, 6), related=related)
            best = optimum(cluster, LAYERS, head)
            found = plans(cluster, LAYERS, head, seed)
            proven += found["hybrid"].lower_bound_ns == found["hybrid"].value_ns
            for name, item in found.items():
                assert item.value_ns >= best, "a plan better than the optimum: one of the two is wrong"
                assert item.lower_bound_ns <= best, "a bound above the optimum is wrong"
                rows[name].append(item.value_ns / best)
            for name, baseline in BASELINES.items():
                rows[name].append(baseline(cluster, LAYERS, head) / best)
        for name, values in rows.items():
            note = f"geomean of bottleneck / optimum; worst {max(values):.4f}"
            figures.append(
                Figure(f"{name}: {setting}", geomean(values), "ratio", min(values), max(values), clusters, None, note)
            )
        least = min(geomean(rows[name]) for name in BASELINES) / max(geomean(rows[name]) for name in OURS)
        figures.append(Figure(f"best baseline / ours: {setting}", least, "ratio", least, least, clusters, "> 1"))
    for name in OURS:
        values = [value for rows in ratios.values() for value in rows[name]]
        low, high, count = min(values), max(values), len(values)
        figures.append(Figure(f"{name}: all settings, geomean", geomean(values), "ratio", low, high, count, "<= 1.005"))
        figures.append(Figure(f"{name}: all settings, worst", high, "ratio", low, high, count, "<= 1.05"))
    figures.append(_linked_quality(seed, clusters // 2))
    figures += _latency_quality(seed, clusters // 2)
    share = proven / (clusters * len(SETTINGS))
    figures.append(Figure("hybrid: plans proven optimal", share, "share", share, share, clusters * len(SETTINGS)))
    _draw_quality(ratios)
    return figures


def _linked_quality(seed: int, clusters: int) -> Figure:
    """What the search for large fleets loses where every link is different, against the exact programme."""
    rng = random.Random(f"{seed}/links")
    ratios = []
    for _ in range(clusters):
        nodes = fleet(draw_cluster(rng, LAYERS, rng.randint(2, 6), related=False), 8)
        problem = Problem(model(LAYERS, 8, CUT_BYTES), nodes, linked(rng, nodes), terms=Terms(spread_leftover=False))
        exact = sequential.solve(problem, seed=seed)
        assert exact.value_ns == exact.lower_bound_ns, "the exact programme did not finish"
        ratios.append(sequential.solve(problem, seed=seed, exact_work=0).value_ns / exact.value_ns)
    note = "over the exact programme's plan; every pair of nodes has a link of its own"
    name = "search over orders alone: independent memory, head 8, links"
    return Figure(name, geomean(ratios), "ratio", min(ratios), max(ratios), clusters, "<= 1.005", note)


def _latency_quality(seed: int, clusters: int) -> list[Figure]:
    """The search for latency alone over the exact programme on 6 and 7 nodes, and its bound over it on large fleets."""
    rng = random.Random(f"{seed}/latency")
    values, bounds = [], []
    for number in range(clusters):
        problem = latency_problem(rng, LAYERS, 6 + number % 2)
        exact = sequential.solve(problem, seed=seed)
        assert exact.value_ns == exact.lower_bound_ns, "the exact programme did not finish"
        found = sequential.solve(problem, seed=seed, exact_work=0)
        assert found.lower_bound_ns <= exact.value_ns <= found.value_ns, "a wrong bound, or a wrong optimum"
        values.append(found.value_ns / exact.value_ns)
        bounds.append(found.lower_bound_ns / exact.value_ns)
    note = f"over the exact programme's plan; worst {max(values):.4f}, {sum(item == 1 for item in values)} optimal"
    name = "search for latency alone: 6 and 7 nodes, links"
    figures = [Figure(name, geomean(values), "ratio", min(values), max(values), clusters, None, note)]
    name = "bound for latency / optimum: 6 and 7 nodes, links"
    figures.append(Figure(name, geomean(bounds), "ratio", min(bounds), max(bounds), clusters))
    for units, count in LATENCY_SIZES:
        spent, ratios = [], []
        for run in range(2 * RUNS):
            problem = latency_problem(rng, units - 1, count)
            start = time.perf_counter()
            ratios.append(sequential.solve(problem, seed=run).ratio)
            spent.append(time.perf_counter() - start)
        name = f"bound / found for latency, {units} units on {count} nodes, links"
        note = f"median planning time {statistics.median(spent):.3f} s, longest {max(spent):.3f} s"
        figures.append(Figure(name, geomean(ratios), "ratio", min(ratios), max(ratios), len(ratios), None, note))
    return figures


def latency_problem(rng: random.Random, layers: int, count: int) -> Problem:
    """Memory independent of speed, a head as long as 8 layers, a link of its own for every pair of nodes."""
    nodes = fleet(draw_cluster(rng, layers, count, related=False), 8)
    terms = Terms(spread_leftover=False, maximum_stages=count)
    return Problem(model(layers, 8, CUT_BYTES), nodes, linked(rng, nodes), Objective.LATENCY, terms)


def _draw_quality(ratios: dict[str, dict[str, list[float]]]) -> None:
    names = (*OURS, *BASELINES)
    rng = random.Random(0)
    picture, axes = plt.subplots(1, len(ratios), figsize=(15, 4.6), sharey=True, layout="constrained")
    for axis, (setting, rows) in zip(axes, ratios.items(), strict=True):
        for place, name in enumerate(names):
            spread = [place + rng.uniform(-0.3, 0.3) for _ in rows[name]]
            axis.scatter(spread, rows[name], s=5, alpha=0.5, color=f"C{place}", linewidths=0)
            axis.plot([place - 0.38, place + 0.38], [geomean(rows[name])] * 2, color="black", linewidth=1.6)
        axis.set_title(setting.replace(", ", "\n"), fontsize=10)
        axis.set_xticks(range(len(names)), names, rotation=35, ha="right", fontsize=8)
        axis.set_yscale("log")
        axis.set_yticks([1, 1.5, 2, 3, 5, 10], ["1", "1.5", "2", "3", "5", "10"])
        axis.minorticks_off()
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("bottleneck / optimum (black: geomean)")
    FIGURES.mkdir(parents=True, exist_ok=True)
    picture.savefig(FIGURES / "planner-chains.png", dpi=130)
    plt.close(picture)


def linked(rng: random.Random, nodes: Sequence[PlanningNode]) -> Links:
    """A link of its own for every direction of every pair: 50 µs to 5 ms, 10 to 100 MB/s, log-uniform."""
    return Links(
        None,
        {
            (a.node, b.node): Link(round(50_000 * 100 ** rng.random()), round(1e7 * 10 ** rng.random()))
            for a in nodes
            for b in nodes
            if a is not b
        },
    )


def times(seed: int, runs: int = RUNS) -> list[Figure]:
    """Section 2: planning time over units and nodes, with and without links, and docs/figures/planner-times.png."""
    figures: list[Figure] = []
    measured: dict[str, dict[str, list[tuple[int, float]]]] = {}
    goals = {(128, 16): "<= 0.1", (1024, 256): "<= 10"}
    warm = draw_cluster(random.Random(seed), LAYERS, 3, related=False)
    plans(warm, LAYERS, 0, seed)  # imports and first-use costs are not the planner's
    sizes = list(dict.fromkeys(size for axis in TIMED.values() for size in axis))
    for links in ("free links", "a link for every pair"):
        seconds: dict[tuple[int, int], float] = {}
        for units, count in sizes:
            spent, ratios = [], []
            rng = random.Random(f"{seed}/{units}/{count}")
            for run in range(runs):
                nodes = fleet(draw_cluster(rng, units - 1, count, related=False), 8)
                known = FREE_LINKS if links == "free links" else linked(rng, nodes)
                terms = Terms(spread_leftover=False, maximum_stages=count)
                start = time.perf_counter()
                found = partition(model(units - 1, 8, CUT_BYTES), nodes, known, terms=terms, seed=run)
                spent.append(time.perf_counter() - start)
                ratios.append(found.ratio)
            seconds[units, count] = statistics.median(spent)
            note = f"median; bound / found at least {min(ratios):.4f}, geomean {geomean(ratios):.4f}"
            name = f"time, {units} units on {count} nodes, {links}"
            figures.append(
                Figure(name, seconds[units, count], "s", min(spent), max(spent), runs, goals.get((units, count)), note)
            )
            print(f"{name}: {seconds[units, count]:.3f} s, {note}", flush=True)
        for axis, points in TIMED.items():
            measured.setdefault(axis, {})[links] = [(size[axis == "nodes"], seconds[size]) for size in points]
    _draw_times(measured)
    return figures


def _draw_times(measured: dict[str, dict[str, list[tuple[int, float]]]]) -> None:
    picture, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    fixed = {"units": "16 nodes", "nodes": "1,024 units"}
    for axis, (what, lines) in zip(axes, measured.items(), strict=True):
        for name, points in lines.items():
            axis.plot(*zip(*points, strict=True), marker="o", label=name)
        goal = (128, 0.1) if what == "units" else (256, 10)
        axis.scatter(*goal, marker="v", color="black", zorder=3, label=f"goal: {goal[1]:g} s at {goal[0]} {what}")
        axis.set_xscale("log", base=2)
        axis.set_yscale("log")
        axis.set_xlabel(f"{what} ({fixed[what]})")
        axis.xaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3)
        axis.legend()
    axes[0].set_ylabel("seconds to plan (median)")
    FIGURES.mkdir(parents=True, exist_ok=True)
    picture.savefig(FIGURES / "planner-times.png", dpi=130)
    plt.close(picture)
