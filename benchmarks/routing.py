"""Routes on random networks with churn, ours against the true optimum and other rules: `make bench-routing`.

Five families of networks; on each, plans of several sizes. The coordinator knows what was measured some time ago: links
have changed since, a node measures 64 others at the most, and newcomers have measured few. A rule chooses by what is
known, estimates included, and its route costs what is true. Writes benchmarks/results/routing.json and
docs/figures/routing.png; seconds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np

from benchmarks.result import FIGURES, Figure, print_table, write_result
from bsns.planning.routing import Floats, recursive_ring, ring_cost, shortest_ring, with_estimates

GOAL: Final = 1.05
SIZES: Final = ((2, 2), (3, 4), (4, 8), (8, 8), (12, 16))
"""(stages, replicas of each)."""
SEEDS: Final = 40
NOISE: Final = 0.05
"""Standard deviation of the logarithm of a measurement, and of what has changed since."""
CHURN: Final = 0.1
"""Part of the nodes that have come a moment ago."""
LINKS, LINKS_OF_NEWCOMERS = 64, 4
"""Links that a node has measured: as many as the default allows, and as many as it comes to in some seconds."""
_PRIOR_MS: Final = 25.0
_WEIGHTS: Final = (0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 4.0)
FAMILIES: Final = ("regions", "star", "ring", "geometric", "uniform")


@dataclass(frozen=True)
class Network:
    """What is true and what is known of a plan's nodes, in milliseconds: steps by stage, hops by pair of stages."""

    steps: list[Floats]
    hops: list[Floats]
    known_steps: list[Floats]
    known_hops: list[Floats]


def latencies(family: str, count: int, draw: np.random.Generator) -> Floats:
    """One-way milliseconds between `count` nodes; symmetric."""
    if family == "regions":
        region = draw.integers(0, 4, count)
        centre = draw.uniform(5, 90, (4, 4))
        centre = (centre + centre.T) / 2
        np.fill_diagonal(centre, 1.0)
        table = centre[region][:, region]
    elif family == "star":
        leg = draw.uniform(1, 40, count)
        table = leg[:, None] + leg[None, :]
    elif family == "ring":
        angle = draw.uniform(0, 1, count)
        away = np.abs(angle[:, None] - angle[None, :])
        table = 150 * np.minimum(away, 1 - away) + 1
    elif family == "geometric":
        place = draw.uniform(0, 100, (count, 2))
        table = np.linalg.norm(place[:, None] - place[None, :], axis=2) + 1
    else:
        table = draw.uniform(1, 100, (count, count))
    return (table + table.T) / 2


def network(family: str, stages: int, replicas: int, seed: int) -> Network:
    draw = np.random.default_rng([FAMILIES.index(family), stages, replicas, seed])
    count = stages * replicas
    true = latencies(family, count, draw) * np.exp(draw.normal(0, NOISE, (count, count)))
    np.fill_diagonal(true, 0)
    seen = with_estimates(_measured(true, draw), _PRIOR_MS)
    # Steps: speeds over a factor of eight, sessions that are there already.
    steps = draw.uniform(2, 16, count) * (1 + 0.3 * draw.poisson(1.0, count))
    known = steps * np.exp(draw.normal(0, NOISE, count))

    def by_stage(values: Floats) -> list[Floats]:
        return [values[stage * replicas : (stage + 1) * replicas] for stage in range(stages)]

    def by_pair(table: Floats) -> list[Floats]:
        places = [slice(stage * replicas, (stage + 1) * replicas) for stage in range(stages)]
        return [table[one, two] for one, two in pairwise([*places, places[0]])]

    return Network(by_stage(steps), by_pair(true), by_stage(known), by_pair(seen))


def _measured(true: Floats, draw: np.random.Generator) -> Floats:
    """What nodes know of their links: of those they had measured, as they were then; NaN for the others."""
    count = len(true)
    known = np.zeros((count, count), dtype=bool)
    for node in range(count):
        links = LINKS_OF_NEWCOMERS if draw.random() < CHURN else LINKS
        known[node, draw.permutation(count)[: min(links, count)]] = True
    seen = true * np.exp(draw.normal(0, NOISE, (count, count)))
    seen[~known] = np.nan
    np.fill_diagonal(seen, 0.0)
    return seen


Rule = Callable[[Network, np.random.Generator], Sequence[int]]


def _shortest(of: Network, _: np.random.Generator) -> Sequence[int]:
    found = shortest_ring(of.known_steps, of.known_hops)
    assert found is not None
    return found


def _recursive(link: float) -> Rule:
    def rule(of: Network, _: np.random.Generator) -> Sequence[int]:
        found = recursive_ring(of.known_steps, of.known_hops, link_weight=link)
        assert found is not None
        return found

    return rule


def _fastest(of: Network, _: np.random.Generator) -> Sequence[int]:
    return [int(item.argmin()) for item in of.known_steps]


def _random(of: Network, draw: np.random.Generator) -> Sequence[int]:
    return [int(draw.integers(len(item))) for item in of.known_steps]


def over_optimum(rule: Rule, of: Network, seed: int) -> float:
    best = shortest_ring(of.steps, of.hops)
    assert best is not None
    taken = rule(of, np.random.default_rng(seed))
    return ring_cost(of.steps, of.hops, taken) / ring_cost(of.steps, of.hops, best)


def tuned(family: str) -> float:
    """The weight of links in the recursion that does best on networks of its own (paper §1.3: w1)."""
    networks = [network(family, *size, seed) for size in SIZES for seed in range(SEEDS, SEEDS + 10)]
    means = {
        weight: statistics.mean(over_optimum(_recursive(weight), item, 0) for item in networks) for weight in _WEIGHTS
    }
    return min(means, key=means.__getitem__)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    FIGURES.mkdir(parents=True, exist_ok=True)
    weights = {family: tuned(family) for family in FAMILIES}
    found: dict[str, dict[str, list[float]]] = {}
    for family in FAMILIES:
        rules: dict[str, Rule] = {
            "shortest way (ours)": _shortest,
            "recursion, tuned": _recursive(weights[family]),
            "recursion": _recursive(1.0),
            "fastest node": _fastest,
            "random": _random,
        }
        networks = [(network(family, *size, seed), seed) for size in SIZES for seed in range(SEEDS)]
        for name, rule in rules.items():
            found.setdefault(name, {})[family] = [over_optimum(rule, item, seed) for item, seed in networks]
    figures = []
    for name, families in found.items():
        values = [value for part in families.values() for value in part]
        goal = f"<= {GOAL}" if "ours" in name else None
        figures.append(_figure(f"{name}: latency over optimum", values, goal))
    for family in FAMILIES:
        figures.append(_figure(f"{family}: ours", found["shortest way (ours)"][family], None))
        note = f"links weigh {weights[family]:g} there"
        figures.append(_figure(f"{family}: recursion, tuned", found["recursion, tuned"][family], None, note))
    _draw(found)
    met = print_table(figures)
    write_result("routing", "networks are their own seeds", figures)
    return 0 if met else 1


def _figure(name: str, values: Sequence[float], goal: str | None, note: str = "") -> Figure:
    upper = statistics.quantiles(values, n=20, method="inclusive")[-1]
    said = "; ".join(filter(None, (f"median {statistics.median(values):.3f}, p95 {upper:.3f}", note)))
    return Figure(name, statistics.mean(values), "mean ratio", min(values), max(values), len(values), goal, said)


def _draw(found: dict[str, dict[str, list[float]]]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
    width = 0.8 / len(found)
    for number, (name, families) in enumerate(found.items()):
        places = [at + (number - len(found) / 2 + 0.5) * width for at in range(len(FAMILIES))]
        axis.bar(places, [statistics.mean(families[family]) for family in FAMILIES], width, label=name)
    axis.axhline(GOAL, color="#888888", linewidth=0.8, linestyle=":")
    axis.set_xticks(range(len(FAMILIES)), FAMILIES)
    axis.set(ylabel="latency over the optimum, mean", ylim=(1, None))
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(FIGURES / "routing.png", dpi=150)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main())
