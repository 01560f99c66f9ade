"""The planner against optima, bounds and baselines, in one seeded run: writes benchmarks/results/planner.json and
docs/figures/planner-*.png. About a quarter of an hour on two cores.

    python -m benchmarks.planner [--seed 0] [--only quality,times]
"""

import argparse
import sys
from collections.abc import Callable

from benchmarks import planner_chains, planner_graphs
from benchmarks.result import Figure, print_table, write_result
from bsns.planning import Transfers


def progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def graphs(seed: int) -> list[Figure]:
    """Section 3: captured networks and random layered graphs, bound over found."""
    found = planner_graphs.section_graphs(progress, seed=seed)
    planner_graphs.plot(found)
    rows = [row for row in found["rows"] if row["stages"] == planner_graphs.GOAL_STAGES]
    ratios = [row["ratio"] for row in rows]
    simple = [row["simple_ratio"] for row in rows]
    count = len(ratios)
    note = f"geomean of bound / found over all instances with k = {planner_graphs.GOAL_STAGES}"
    figures = [
        Figure(
            "graphs: bound / found",
            found["geomean"],
            "ratio",
            min(ratios),
            max(ratios),
            count,
            f">= {planner_graphs.GOAL}",
            note,
        ),
        Figure(
            "graphs: simple bound / found",
            found["geomean_simple_bound"],
            "ratio",
            min(simple),
            max(simple),
            count,
            None,
            note,
        ),
    ]
    for name, group in found["by_regime"].items():
        low, count, note = group["worst"], group["instances"], f"{group['proven_optimal']} proven optimal"
        figures.append(Figure(f"graphs, {name}", group["geomean"], "ratio", low, 1.0, count, None, note))
    for stages, value in found["by_stages"].items():
        values = [
            row["ratio"]
            for row in found["rows"]
            if (str(row["stages"]), row["transfers"]) == (stages, Transfers.RELAYED.value)
        ]
        name = f"graphs, relayed, k = {stages}"
        figures.append(Figure(name, value, "ratio", min(values), max(values), len(values)))
    for name, value in found["over_found"].items():
        values = [row[f"{name}_over_final"] for row in rows]
        title = f"graphs: {name.replace('_', ' ')} / found"
        figures.append(Figure(title, value, "ratio", min(values), max(values), len(values)))
    return figures


def brute_force(seed: int) -> list[Figure]:
    """Section 4: small graphs against an enumeration of all partitions."""
    found = planner_graphs.section_brute_force(progress, seed=seed)

    def count(name: str, key: str, samples: str) -> Figure:
        return Figure(name, found[key], "graphs", found[key], found[key], found[samples], "== 0")

    return [
        count("brute force: exact search differs", "mismatches", "graphs"),
        count("brute force: bound above the optimum", "bounds_above_optimum", "graphs"),
        count("brute force: integer programme differs", "milp_mismatches", "milp_graphs"),
        count("brute force: genetic search below the optimum", "genetic_below_optimum", "milp_graphs"),
    ]


SECTIONS: dict[str, Callable[[int], list[Figure]]] = {
    "quality": planner_chains.quality,
    "times": planner_chains.times,
    "graphs": graphs,
    "brute_force": brute_force,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help=f"of {','.join(SECTIONS)}; figures are then printed and not written")
    options = parser.parse_args()
    chosen = options.only.split(",") if options.only else list(SECTIONS)
    if unknown := sorted(set(chosen) - set(SECTIONS)):
        sys.exit(f"no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    figures: list[Figure] = []
    for name, section in SECTIONS.items():
        if name in chosen:
            print(f"\n== {name}", flush=True)
            figures += section(options.seed)
    met = print_table(figures)
    if chosen == list(SECTIONS):
        write_result("planner", str(options.seed), figures)
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
