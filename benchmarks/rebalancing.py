"""Rebalancing, by our rule and by Petals' on the same swarms, and on a swarm that runs: `make bench-rebalancing`.

Writes benchmarks/results/rebalancing.json and docs/figures/rebalancing-*.png. About ten minutes on two cores;
`--quick` for a quarter of the swarms, `--only swarms` or `--only live` for one section.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
from collections.abc import Callable, Sequence

from benchmarks import rebalancing_live, rebalancing_swarms
from benchmarks.rebalancing_swarms import Outcome
from benchmarks.result import FIGURES, Figure, print_table, write_result

GOAL = 0.90
_MOMENTS: tuple[tuple[str, Callable[[Outcome], float]], ...] = (
    ("after joins", lambda item: item.joined),
    ("after rebalancing", lambda item: item.rested),
    ("after 30 % churn", lambda item: item.churned),
)


def progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def swarms(*, quick: bool) -> list[Figure]:
    found = rebalancing_swarms.run(progress, quick=quick)
    sides = {"Petals": [theirs for _, theirs, _ in found], "ours": [mine for _, _, mine in found]}
    figures = []
    for moment, of in _MOMENTS:
        for side, outcomes in sides.items():
            values = [of(item) for item in outcomes]
            goal = f">= {GOAL}" if side == "ours" else None
            note = f"median {statistics.median(values):.3f}, tenth percentile {_percentile(values, 10):.3f}"
            name = f"{side}, {moment}: smallest block over bound"
            figures.append(
                Figure(name, statistics.mean(values), "mean", min(values), max(values), len(values), goal, note)
            )
    for side, outcomes in sides.items():
        for moment, of in (
            ("joins", lambda item: item.loaded_joined),
            ("joins, rebalancing and churn", lambda item: item.loaded_churned),
        ):
            loads = [of(item) for item in outcomes]
            name = f"{side}, weights loaded for {moment}"
            figures.append(Figure(name, statistics.mean(loads), "models", min(loads), max(loads), len(loads)))
    for room in rebalancing_swarms.ROOMS:
        values = [mine.rested for (_, _, models, _), _, mine in found if models == room]
        name = f"ours, room for {room:g} models, after rebalancing"
        figures.append(Figure(name, statistics.mean(values), "mean", min(values), max(values), len(values)))
    _draw_swarms(sides)
    return figures


def _percentile(values: Sequence[float], percent: int) -> float:
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def _draw_swarms(sides: dict[str, list[Outcome]]) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(_MOMENTS), figsize=(11, 3.6), sharey=True, layout="constrained")
    for axis, (moment, of) in zip(axes, _MOMENTS, strict=True):
        for (side, outcomes), colour in zip(sides.items(), ("#b0651d", "#1d6fb0"), strict=True):
            values = sorted(of(item) for item in outcomes)
            shares = [(number + 1) / len(values) for number in range(len(values))]
            axis.step(values, shares, where="post", color=colour, label=f"{side}, mean {statistics.mean(values):.2f}")
        axis.axvline(GOAL, color="#888888", linewidth=0.8, linestyle=":")
        axis.set(title=moment, xlabel="smallest block's throughput over the fluid bound", xlim=(0, 1.02), ylim=(0, 1))
        axis.legend(loc="upper left", frameon=False)
    axes[0].set_ylabel("share of swarms at or below")
    figure.savefig(FIGURES / "rebalancing-swarms.png", dpi=150)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a quarter of the swarms, and a shorter live run")
    parser.add_argument("--only", choices=("swarms", "live"), help="one section")
    arguments = parser.parse_args()
    FIGURES.mkdir(parents=True, exist_ok=True)
    figures: list[Figure] = []
    if arguments.only != "live":
        figures += swarms(quick=arguments.quick)
    if arguments.only != "swarms":
        figures += asyncio.run(rebalancing_live.run(progress, quick=arguments.quick))
    met = print_table(figures)
    if not arguments.quick and arguments.only is None:
        write_result("rebalancing", "cases are their own seeds", figures)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
