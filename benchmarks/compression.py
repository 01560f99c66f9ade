"""What 16-bit and 8-bit weights and activations cost in accuracy, and what they save on the wire.

Two models in three stages each, on two tasks each, in every configuration on the same items: so the differences to
float32 are paired. Prints a table and writes benchmarks/results/compression.json and docs/figures/compression.png. The
tasks are in `benchmarks.compression_language` and `benchmarks.compression_vision`; two of them run at once.

    python -m benchmarks.compression [--quick] [--only perplexity,mnist]
"""

import argparse
import multiprocessing
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, Final

import numpy as np
from scipy import stats

from benchmarks.compression_pipeline import CONFIGURATIONS, PUBLISHED, REFERENCE, Measured, WireCount
from benchmarks.result import FIGURES, Figure, print_table, write_result
from bsns.runtime.activation_codec import TensorEncoding

FIGURE: Final = FIGURES / "compression.png"
TASKS: Final = ("sentiment", "perplexity", "mnist", "scikit")  # the longest first
WORKERS: Final = 2
# In the order of the table; the reference is what they are compared with.
NAMES: Final = (*(item.name for item in CONFIGURATIONS if item != REFERENCE), PUBLISHED)
RESAMPLES: Final = 10_000
CONFIDENCE: Final = 0.95
# The goals: points of accuracy, ratio of perplexities, share of float32's bytes.
LARGEST_DROP: Final = 0.5
LARGEST_PERPLEXITY: Final = 1.005
LARGEST_SHARE: Final = 0.3
WIRES: Final = {
    TensorEncoding.FLOAT16: ("16-bit wire", None),
    TensorEncoding.BLOCKWISE_INT8: ("8-bit wire", f"<= {LARGEST_SHARE}"),
}
Scores = np.ndarray[Any, np.dtype[np.float64]]
Interval = tuple[float, float]


def progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def measure(task: str, quick: bool) -> Measured:
    """Runs one task, in one thread."""
    import torch

    from benchmarks import compression_language, compression_vision

    torch.set_num_threads(1)
    match task:
        case "perplexity":
            return compression_language.perplexity(*((3, 24) if quick else (64, 256)), progress)
        case "sentiment":
            return compression_language.sentiment(6 if quick else 600, progress)
        case "mnist":
            name, load = "digits of MNIST", compression_vision.mnist_digits
        case "scikit":
            name, load = "digits of scikit-learn", compression_vision.scikit_digits
        case _:
            raise ValueError(f"no task {task!r}; there are {TASKS}")
    trained, asked = (30, 6) if quick else (797, 800)
    return compression_vision.digits(name, load, trained, asked, progress)


def accuracy_interval(reference: Scores, other: Scores) -> Interval:
    """Interval of the difference other - reference of paired proportions (Bonett and Price 2012): the Wald interval
    with one disagreement added either way, so that it does not shrink to nothing where none was seen.
    """
    count = len(reference) + 2
    lost, won = (np.sum(reference > other) + 1) / count, (np.sum(other > reference) + 1) / count
    half = stats.norm.ppf((1 + CONFIDENCE) / 2) * np.sqrt((lost + won - (won - lost) ** 2) / count)
    return float(won - lost - half), float(won - lost + half)


def perplexity_interval(reference: Scores, other: Scores) -> Interval:
    """Bootstrap interval over documents of the ratio of perplexities, other / reference."""
    change = other - reference
    chosen = np.random.default_rng(0).integers(len(change), size=(RESAMPLES, len(change)))
    edges = (1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2
    low, high = np.quantile(np.exp(change[chosen].mean(axis=1)), edges)
    return float(low), float(high)


def accuracy_figures(measured: Measured) -> list[Figure]:
    """The accuracy in float32, and each configuration's change to it in points."""
    reference = measured.scores[REFERENCE.name]
    percent, count = 100 * float(reference.mean()), len(reference)
    figures = [Figure(f"{measured.task}, fp32", percent, "%", percent, percent, count, None, measured.note)]
    for name, scores in _changed(measured):
        low, high = (100 * edge for edge in accuracy_interval(reference, scores))
        lost, won = int(np.sum(reference > scores)), int(np.sum(scores > reference))
        chance = 1.0 if lost + won == 0 else stats.binomtest(won, lost + won).pvalue
        note = (
            f"{100 * scores.mean():.2f} % right; {lost} answers lost and {won} won, exact McNemar test "
            f"p = {chance:.2g}; low and high are the 95 % interval"
        )
        change, goal = 100 * float((scores - reference).mean()), None if name == PUBLISHED else f">= -{LARGEST_DROP}"
        title = f"{measured.task}, {name}"
        figures.append(Figure(f"{title}: change", change, "points", low, high, count, goal, note))
        goal = None if name == PUBLISHED else ">= 0"
        note = "at or above 0: a drop, if there is one, lies within its interval"
        figures.append(Figure(f"{title}: upper end", high, "points", low, high, count, goal, note))
    return figures


def perplexity_figures(measured: Measured) -> list[Figure]:
    """The perplexity in float32, and each configuration's ratio to it."""
    reference = measured.scores[REFERENCE.name]
    value, count = float(np.exp(reference.mean())), len(reference)
    figures = [Figure(f"{measured.task}, fp32", value, "perplexity", value, value, count, None, measured.note)]
    for name, scores in _changed(measured):
        low, high = perplexity_interval(reference, scores)
        beyond = "beyond" if low > 1 else "within"
        note = (
            f"perplexity {np.exp(scores.mean()):.4f}; low and high are the 95 % interval over documents; "
            f"a rise, if there is one, is {beyond} it"
        )
        goal = None if name == PUBLISHED else f"<= {LARGEST_PERPLEXITY}"
        ratio = float(np.exp((scores - reference).mean()))
        figures.append(Figure(f"{measured.task}, {name}: ratio", ratio, "ratio", low, high, count, goal, note))
    return figures


def wire_figures(results: Sequence[Measured]) -> list[Figure]:
    """Bytes between the stages as a share of those of float32, by model and encoding."""
    figures = []
    for model in dict.fromkeys(item.model for item in results):
        for wire, (name, goal) in WIRES.items():
            total = WireCount()
            for item in results:
                if item.model == model:
                    total.add(item.sent[wire])
            share = total.bytes / total.float32_bytes
            note = f"{total.bytes} bytes instead of {total.float32_bytes}, without token ids, pictures and logits"
            figures.append(
                Figure(
                    f"{model}, {name}: bytes", share, "share of fp32", share, share, total.messages, goal, note,
                )
            )  # fmt: skip
    return figures


def figures_of(results: Sequence[Measured]) -> list[Figure]:
    figures: list[Figure] = []
    for item in results:
        figures += accuracy_figures(item) if item.kind == "accuracy" else perplexity_figures(item)
    return figures + wire_figures(results)


def _changed(measured: Measured) -> list[tuple[str, Scores]]:
    """The configurations other than the reference with their scores, in the order of all tables."""
    return [(name, measured.scores[name]) for name in NAMES if name in measured.scores]


def plot(results: Sequence[Measured], path: Path = FIGURE) -> None:
    """Change of accuracy and of perplexity with their intervals by configuration, and bytes on the wire."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    colours = ["#1b6ca8", "#d1622b", "#3a9d5d"]
    figure, (left, middle, right) = pyplot.subplots(
        1, 3, figsize=(14, 4.8), width_ratios=(1.35, 1.0, 0.75), layout="constrained"
    )
    tasks = [item for item in results if item.kind == "accuracy"]
    for place, (item, colour) in enumerate(zip(tasks, colours)):
        reference = item.scores[REFERENCE.name]
        label = f"{item.task} ({item.model}, fp32 {100 * reference.mean():.1f} %)"
        shift = 0.22 * (place - (len(tasks) - 1) / 2)
        points = [
            (row + shift, 100 * (scores - reference).mean(), *accuracy_interval(reference, scores))
            for row, scores in ((NAMES.index(name), scores) for name, scores in _changed(item))
        ]
        _draw(left, [(row, value, 100 * low, 100 * high) for row, value, low, high in points], colour, label)
    left.axvline(-LARGEST_DROP, color="grey", linewidth=1, linestyle="--")
    left.set_xlabel("points, with 95 % interval (dashed: goal)")
    left.legend(loc="upper center", bbox_to_anchor=(0.4, -0.14), fontsize=8, frameon=False)
    for item in results:
        if item.kind == "perplexity":
            reference = item.scores[REFERENCE.name]
            points = []
            for name, scores in _changed(item):
                edges = (100 * (edge - 1) for edge in perplexity_interval(reference, scores))
                value = 100 * (np.exp((scores - reference).mean()) - 1)
                points.append((NAMES.index(name), value, *edges))
            label = f"{item.task} ({item.model}, fp32 {np.exp(reference.mean()):.2f})"
            _draw(middle, points, "#6a4c93", label)
            middle.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), fontsize=8, frameon=False)
    middle.axvline(100 * (LARGEST_PERPLEXITY - 1), color="grey", linewidth=1, linestyle="--")
    middle.set_xlabel("%, with 95 % interval (dashed: goal)")
    for axis in (left, middle):
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_ylim(len(NAMES) - 0.5, -0.5)
        axis.set_yticks(range(len(NAMES)), NAMES if axis is left else [""] * len(NAMES))
        axis.grid(axis="x", alpha=0.25)
    models = list(dict.fromkeys(item.model for item in results))
    shares = {item.name: 100 * item.value for item in wire_figures(results)}
    for place, ((name, _), colour) in enumerate(zip(WIRES.values(), ("#9bbfd9", "#1b6ca8"), strict=True)):
        heights = [shares[f"{model}, {name}: bytes"] for model in models]
        bars = right.bar(np.arange(len(models)) + 0.4 * (place - 0.5), heights, 0.36, color=colour, label=name)
        right.bar_label(bars, fmt="%.1f", fontsize=9, padding=2)
    right.set_xticks(range(len(models)), models, fontsize=9)
    right.axhline(100 * LARGEST_SHARE, color="grey", linewidth=1, linestyle="--")
    right.set_ylabel("% of fp32 (dashed: goal for 8 bit)")
    right.set_ylim(0, 60)
    right.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), fontsize=8, frameon=False)
    left.set_title("Change of accuracy", fontsize=11)
    middle.set_title("Change of perplexity", fontsize=11)
    right.set_title("Bytes between stages", fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _draw(axis: Any, points: Sequence[tuple[float, float, float, float]], colour: str, label: str) -> None:
    rows, values, lows, highs = (np.array(column) for column in zip(*points, strict=True))
    axis.hlines(rows, lows, highs, color=colour, linewidth=1.6)
    axis.plot(values, rows, "o", color=colour, markersize=5, label=label)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few items of each task; figures are not written")
    parser.add_argument("--only", help=f"of {','.join(TASKS)}; figures are then printed and not written")
    options = parser.parse_args()
    chosen = options.only.split(",") if options.only else list(TASKS)
    if unknown := sorted(set(chosen) - set(TASKS)):
        sys.exit(f"no task {', '.join(unknown)}; there are {', '.join(TASKS)}")
    with ProcessPoolExecutor(WORKERS, multiprocessing.get_context("spawn")) as workers:
        results = list(workers.map(measure, chosen, [options.quick] * len(chosen)))
    figures = figures_of(results)
    met = print_table(figures)
    if not options.quick and not options.only:
        plot(results)
        write_result("compression", "0", figures)
    sys.exit(0 if met else 1)


if __name__ == "__main__":
    main()
