"""The adversary suite: what each cheat meets with, how sure that is, and what it costs. Prints tables and figures with
intervals, writes benchmarks/results/verification.json and docs/figures/verification-*.png. About twenty-five minutes on
two quiet cores, three with --quick.

    python -m benchmarks.verification [--only detection,honest,...] [--quick]

Sections: `detection` of each cheat by answer length and stage; `attribution` to the right stage; `honest`, false
slashes; `cost` in bytes and time; `gas`; `capture` of committees by coalitions; `deterrence`, whether cheating pays;
`evidence` of many requests; `published`, TOPLOC on the same cheats; `protocol`, attacks that are answered by rules.
docs/verification.md says what the figures mean, docs/threat-model.md what they do not cover.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from benchmarks import (
    verification_attribution,
    verification_capture,
    verification_cost,
    verification_detection,
    verification_economics,
    verification_honest,
    verification_protocol,
    verification_published,
)
from benchmarks.result import FIGURES, Figure, print_table, write_result
from benchmarks.verification_judge import Outcome
from bsns.protocol.sketch import TOLERANCES
from bsns.runtime.prepare import prepare

SIMULATED_DISPUTES = 200


@dataclass
class Bench:
    """What all sections share; what the pictures need is kept by the sections that ran."""

    folder: Path
    quick: bool
    detection: verification_detection.Detection | None = None
    honest: verification_honest.Honest | None = None
    points: list[verification_capture.Point] = field(default_factory=list)
    measured: verification_economics.Measured = field(default_factory=verification_economics.Measured)

    @property
    def grid(self) -> verification_detection.Grid:
        return verification_detection.QUICK if self.quick else verification_detection.Grid()


def progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def detection(bench: Bench) -> list[Figure]:
    bench.detection = verification_detection.measure(bench.folder, bench.grid, progress)
    verification_detection.show(bench.detection, bench.grid)
    if bench.quick:
        # So few samples cannot show the goal, whatever they are.
        return verification_detection.figures(bench.detection, None)
    figures = verification_detection.figures(bench.detection)
    shown = min(figure.value for figure in figures if figure.goal == verification_detection.GOAL)
    bench.measured = replace(bench.measured, detected=shown / 100)
    return figures


def attribution(bench: Bench) -> list[Figure]:
    size = verification_attribution.QUICK if bench.quick else verification_attribution.Size()
    found = verification_attribution.measure(size, progress)
    verification_attribution.show(found)
    return verification_attribution.figures(found)


def honest(bench: Bench) -> list[Figure]:
    size = verification_honest.QUICK if bench.quick else verification_honest.Size()
    bench.honest = verification_honest.measure(size, progress)
    verification_honest.show(bench.honest)
    return verification_honest.figures(bench.honest, size)


def cost(bench: Bench) -> list[Figure]:
    size = verification_cost.QUICK if bench.quick else verification_cost.Size()
    found = verification_cost.measure(bench.folder, size, progress)
    verification_cost.show(found)
    if not bench.quick:
        bench.measured = replace(bench.measured, check_share=verification_cost.check_share(found))
    return verification_cost.figures(found, size)


def gas(_bench: Bench) -> list[Figure]:
    verification_cost.show_gas()
    return verification_cost.gas_figures()


def capture(bench: Bench) -> list[Figure]:
    bench.points = verification_capture.measure(SIMULATED_DISPUTES // (20 if bench.quick else 1), progress)
    verification_capture.show(bench.points)
    return verification_capture.figures(bench.points)


def deterrence(bench: Bench) -> list[Figure]:
    table = verification_economics.lines(bench.measured)
    verification_economics.show_deterrence(table, bench.measured)
    return verification_economics.deterrence_figures(table, bench.measured)


def evidence(bench: Bench) -> list[Figure]:
    found = verification_economics.exposures(bench.folder, quick=bench.quick, report=progress)
    verification_economics.show_evidence(found)
    return verification_economics.evidence_figures(found)


def published(bench: Bench) -> list[Figure]:
    size = verification_published.QUICK if bench.quick else verification_published.Size()
    found = verification_published.measure(bench.folder, size, progress)
    verification_published.show(found)
    return verification_published.figures(found)


def protocol(bench: Bench) -> list[Figure]:
    verification_protocol.show()
    root = verification_protocol.ROOT
    forge = shutil.which("forge", path=str(root / "contracts" / "node_modules" / ".bin")) or shutil.which("forge")
    return verification_protocol.figures(None if bench.quick else forge)


SECTIONS: dict[str, Callable[[Bench], list[Figure]]] = {
    "detection": detection,
    "attribution": attribution,
    "honest": honest,
    "cost": cost,
    "gas": gas,
    "capture": capture,
    "deterrence": deterrence,
    "evidence": evidence,
    "published": published,
    "protocol": protocol,
}


def draw_pictures(bench: Bench) -> None:
    FIGURES.mkdir(parents=True, exist_ok=True)
    if bench.points:
        verification_capture.draw_picture(bench.points, FIGURES / "verification-capture.png")
    if bench.detection is not None and bench.honest is not None:
        draw_separation(bench.detection, bench.honest, FIGURES / "verification-separation.png")
        draw_threshold(bench.detection, FIGURES / "verification-threshold.png")


def draw_separation(
    detected: verification_detection.Detection, executed: verification_honest.Honest, path: Path
) -> None:
    """Distances of honest executions and of each cheat in float32, with r, τ and 2τ."""
    rows = {
        f"honest: {name[8:]}": gaps
        for (arithmetic, name), gaps in executed.distances.items()
        if arithmetic == verification_detection.DECLARED
    }
    for cheat in verification_detection.SKETCH_CHEATS:
        rows[cheat] = [gap for (name, _, _), gaps in detected.distances.items() if name == cheat for gap in gaps]
    picture, axis = plt.subplots(figsize=(8, 7), layout="constrained")
    for place, (name, gaps) in enumerate(rows.items()):
        colour = "#1b6ca8" if name.startswith("honest") else "#d1622b"
        ends = [min(gaps) + 1, max(gaps) + 1]
        # The marker shows where all distances are one.
        axis.plot(ends, [place, place], "s-", color=colour, linewidth=4, markersize=2, solid_capstyle="butt")
    tolerance = TOLERANCES[verification_detection.EXECUTION_CLASS]
    for label, edge in (("r", tolerance.honest_radius), ("τ", tolerance.pay_within), ("2τ", tolerance.slash_beyond)):
        axis.axvline(edge + 1, color="grey", linewidth=1, linestyle="--")
        axis.annotate(label, (edge + 1, -1.1), (3, 0), textcoords="offset points", va="top", fontsize=9)
    axis.set_xscale("log")
    axis.set_yticks(range(len(rows)), list(rows), fontsize=8)
    axis.set_ylim(len(rows) - 0.4, -1.2)
    axis.set_xlabel("sketch distance + 1, smallest to largest (random: 2048)")
    axis.grid(axis="x", alpha=0.3)
    picture.savefig(path, dpi=130)
    plt.close(picture)


def draw_threshold(detected: verification_detection.Detection, path: Path) -> None:
    """Share of verdicts by the size of a deviation."""
    sizes = sorted(detected.perturbations)
    picture, axis = plt.subplots(figsize=(6.5, 4), layout="constrained")
    for label, wanted, colour in (
        ("slashed", {Outcome.INCORRECT}, "#d1622b"),
        ("not paid or slashed", {Outcome.INCORRECT, Outcome.UNPAID}, "#1b6ca8"),
    ):
        counts = [detected.perturbations[size] for size in sizes]
        shares = [100 * sum(it[verdict] for verdict in wanted) / it.total() for it in counts]
        axis.plot(sizes, shares, marker="o", color=colour, label=label)
    axis.axvline(3e-6, color="grey", linewidth=1, linestyle="--", label="largest honest difference (make bench-sketch)")
    axis.set_xscale("log")
    axis.set_xlabel("noise added to every row, relative to its length")
    axis.set_ylabel("% of judged")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    picture.savefig(path, dpi=130)
    plt.close(picture)


def is_complete(chosen: list[str], quick: bool) -> bool:
    """Whether the run is one to keep: what is in the repository must come from one whole run."""
    return chosen == list(SECTIONS) and not quick


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help=f"of {','.join(SECTIONS)}; figures are then printed and not written")
    parser.add_argument("--quick", action="store_true", help="few samples; figures are then printed and not written")
    options = parser.parse_args()
    chosen = options.only.split(",") if options.only else list(SECTIONS)
    if unknown := sorted(set(chosen) - set(SECTIONS)):
        sys.exit(f"no section {', '.join(unknown)}; there are {', '.join(SECTIONS)}")
    bench = Bench(prepare(report=progress), options.quick)
    figures: list[Figure] = []
    for name, section in SECTIONS.items():
        if name in chosen:
            print(f"\n== {name}", flush=True)
            figures += section(bench)
    met = print_table(figures)
    if is_complete(chosen, options.quick):
        draw_pictures(bench)
        write_result("verification", "prompts, request seeds and draws are numbered from 0", figures)
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
