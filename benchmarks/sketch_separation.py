"""How far honest executions and cheats lie apart in the distribution sketch and the step fingerprint.

Three stages of the embedded model answer a few prompts token by token, in each of the arithmetics that a stage can
declare. Each stage is then executed again from the exact bytes of its inputs: honestly in several ways (one pass,
pieces, in batches with other sessions, other threads, eager attention, an older processor's instructions) and by cheats
(fewer bits than declared, a block left out, another input row, noise). Prints the distances and writes
benchmarks/results/sketch_separation.json. A captured vision model is measured beside it, with a tolerance of its own:
see benchmarks/sketch_separation_vision.py.

    python -m benchmarks.sketch_separation [--seeds 8] [--only float32|bfloat16|int8|vision] [--sweep]
"""

import argparse
import json
import platform
import random
import subprocess
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import sketch_separation_vision
from benchmarks.verification_cheats import CHEATS, INT8_ROWS, MORE_BITS, last_step_only, one_row_changed
from benchmarks.verification_traces import (
    CUTS,
    PROMPTS,
    Execute,
    Outputs,
    Recording,
    answer,
    honest_stages,
    honest_ways,
    in_one_pass,
    on_older_processor,
)
from bsns.protocol.sketch import TOLERANCES, SketchTolerance, StageSketch, distance, fingerprint_distance
from bsns.requester.chat_tokenizer import ChatTokenizer
from bsns.runtime.prepare import prepare

LENGTHS = (1, 8, 32)
# Longer than the 256 rows of a re-execution's piece; answered with 8 tokens.
LONG_PROMPT = "Answer all of these, several times. " + " ".join(PROMPTS * 4)
LONG_PROMPT_TOKENS = 8
SWEPT_UNITS = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
# What is measured: its execution class and the prefix of its figures' names.
PARTS = {
    "float32": ("torch-cpu/float32/sdpa", ""),
    "bfloat16": ("torch-cpu/bfloat16/sdpa", "bfloat16: "),
    "int8": ("torch-cpu/int8/sdpa", "int8: "),
    "vision": (sketch_separation_vision.EXECUTION_CLASS, "vision: "),
}
# Sketch seeds and short prompts of the parts that are not measured with all of them, which keeps the run short.
FEWER_SEEDS = {"bfloat16": 4, "int8": 4}
FEWER_PROMPTS = {"bfloat16": 2, "int8": 2}
RESULT = Path(__file__).parent / "results" / "sketch_separation.json"

# By stage, way of executing and tokens of the answer: distances of sketch and fingerprint, largest relative error and,
# at the last stage, largest difference of a logit.
Figures = dict[tuple[str, str, int], dict[str, list[float]]]


def ways(folder: Path, number: int, declared: str, recordings: Sequence[Recording]) -> Iterator[tuple[str, Execute]]:
    """Every way in which stage `number` is executed again, honest ones first. Stages are built one after the other."""
    bounds = CUTS[number], CUTS[number + 1]
    yield from honest_ways(folder, bounds, declared, recordings)
    yield "cheat: one prompt row changed", one_row_changed(honest_stages(folder, bounds, declared)[0])
    for name, cheat in CHEATS[declared].items():
        execute = in_one_pass(cheat.stage(folder, bounds, declared))
        yield f"cheat: {name}", execute
        if name in (INT8_ROWS, "int4 weights, groups of 32"):
            yield f"cheat: {name}, last step only", last_step_only(execute)


def sketches(outputs: Outputs, seed: bytes, unit: float, centred: bool) -> tuple[dict[int, bytes], list[bytes]]:
    """The sketch at each answer length, and the fingerprints."""
    sketch = StageSketch(seed, outputs[0].shape[1], unit, centred=centred)
    values, fingerprints = {}, []
    for number, rows in enumerate(outputs, 1):
        fingerprints.append(sketch.add(rows))
        if number in LENGTHS:
            values[number] = sketch.value()
    return values, fingerprints


def relative_error(reference: Outputs, outputs: Outputs, centred: bool) -> float:
    a, b = np.concatenate(reference).astype(np.float64), np.concatenate(outputs).astype(np.float64)
    if centred:
        a, b = a - a.mean(axis=1, keepdims=True), b - b.mean(axis=1, keepdims=True)
    return float((np.linalg.norm(a - b, axis=1) / np.linalg.norm(a, axis=1)).max())


def run(part: str, seeds: int, units: Sequence[float]) -> dict[float, Figures]:
    """Distances and errors of one arithmetic, for each unit of the sketch."""
    folder = prepare()
    tokenizer, count = ChatTokenizer(folder), len(CUTS) - 1
    torch.set_flush_denormal(False)
    torch.set_num_threads(1)
    stages = honest_stages(folder, CUTS, part)
    asked = [(prompt, max(LENGTHS)) for prompt in PROMPTS[: FEWER_PROMPTS.get(part)]] + [
        (LONG_PROMPT, LONG_PROMPT_TOKENS)
    ]
    answers = [answer(stages, [tokenizer.prompt_token_ids(prompt)], tokens)[0] for prompt, tokens in asked]
    recordings = [[recording[number] for recording in answers] for number in range(count)]
    older = on_older_processor(part, recordings)
    figures: dict[float, Figures] = {unit: defaultdict(lambda: defaultdict(list)) for unit in units}
    for number in range(count):
        comparison = Comparison(figures, number, recordings[number], seeds)
        comparison.add("honest: instructions of an older processor", older[number])
        for name, execute in ways(folder, number, part, recordings[number]):
            comparison.add(name, [execute(recording) for recording in recordings[number]])
    return figures


class Comparison:
    """Adds the distances of one stage's outputs from the reference to `figures`."""

    def __init__(self, figures: dict[float, Figures], number: int, recordings: list[Recording], seeds: int) -> None:
        self._figures, self._recordings = figures, recordings
        self._stage, self._centred = f"stage {number + 1}", number == len(CUTS) - 2
        self._samples = [
            (place, unit, seed, sketches(recording.outputs, seed, unit, self._centred))
            for place, recording in enumerate(recordings)
            for seed in (random.Random(f"{place}/{number}/{sample}").randbytes(32) for sample in range(seeds))
            for unit in figures
        ]

    def add(self, name: str, outputs: list[Outputs]) -> None:
        """`outputs`: for each recording, what one way of executing gave."""
        errors = {}
        for place, (recording, given) in enumerate(zip(self._recordings, outputs, strict=True)):
            for length in LENGTHS:
                pair = recording.outputs[:length], given[:length]
                worst = max(float(np.abs(a - b).max()) for a, b in zip(*pair, strict=True)) if self._centred else 0.0
                errors[place, length] = relative_error(*pair, self._centred), worst
        for place, unit, seed, (expected, expected_prints) in self._samples:
            values, prints = sketches(outputs[place], seed, unit, self._centred)
            gaps = [fingerprint_distance(a, b) for a, b in zip(expected_prints, prints, strict=True)]
            for length, value in values.items():
                if "last step only" in name and length < len(gaps):
                    continue  # the cheat has not begun
                row = self._figures[unit][self._stage, name, length]
                row["sketch"].append(distance(expected[length], value))
                row["fingerprint"].append(max(gaps[:length]) if name.startswith("honest") else gaps[length - 1])
                relative, worst = errors[place, length]
                row["relative"].append(relative)
                if self._centred:
                    row["logit"].append(worst)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8, help="sketch seeds for each input and stage")
    parser.add_argument("--only", choices=tuple(PARTS), help="measure one class, keep the others' figures")
    parser.add_argument("--sweep", action="store_true", help="try several units instead of writing the result")
    options = parser.parse_args()
    entries: dict[str, list[dict[str, Any]]] = {}
    for part, (execution_class, prefix) in PARTS.items():
        if options.only not in (None, part):
            continue
        tolerance = TOLERANCES[execution_class]
        units = SWEPT_UNITS if options.sweep else [tolerance.unit]
        seeds = min(options.seeds, FEWER_SEEDS.get(part, options.seeds))
        is_vision = part == "vision"
        everything = sketch_separation_vision.run(seeds, units) if is_vision else run(part, seeds, units)
        print(f"\n{execution_class}")
        show(everything)
        if not options.sweep:
            entries[part] = figure_entries(everything[tolerance.unit], tolerance, prefix)
    if not options.sweep:
        write_result(entries, options.seeds)


def show(everything: dict[float, Figures]) -> None:
    for unit, figures in everything.items():
        print(f"\nunit {unit:g}: distance (0 to 4096, random 2048) | fingerprint | largest relative error")
        for (stage, name, length), row in sorted(figures.items()):
            sketch, fingerprint = row["sketch"], row["fingerprint"]
            logit = max(row.get("logit", []), default=0.0)
            print(
                f"{stage}  {name:48} {length:3} tokens  sketch min {min(sketch):5} median {np.median(sketch):7.1f} "
                f"max {max(sketch):5}  fingerprint min {min(fingerprint):6} max {max(fingerprint):6}  "
                f"error {max(row['relative']):.1e}" + (f"  logit {logit:.1e}" if logit else "")
            )
        print(f"unit {unit:g}, all stages and lengths:")
        for name, row in sorted(by_name(figures).items()):
            print(
                f"{name:58} sketch {min(row['sketch']):5} to {max(row['sketch']):5}  "
                f"fingerprint {min(row['fingerprint']):6} to {max(row['fingerprint']):6}"
            )
        honest = [d for (_, name, _), row in figures.items() if name.startswith("honest") for d in row["sketch"]]
        cheats = [d for (_, name, _), row in figures.items() if has_goal(name) for d in row["sketch"]]
        prints = [d for (_, name, _), row in figures.items() if name.startswith("honest") for d in row["fingerprint"]]
        print(
            f"unit {unit:g}: honest largest {max(honest)}, cheat smallest {min(cheats)}, "
            f"fingerprint honest largest {max(prints)}, "
            f"largest honest gap of a logit {max(honest_logits(figures), default=0.0):.2g}"
        )


def by_name(figures: Figures) -> dict[str, dict[str, list[float]]]:
    """The figures of all stages and lengths together."""
    grouped: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (_, name, _), row in figures.items():
        for kind, values in row.items():
            grouped[name][kind] += values
    return grouped


def honest_logits(figures: Figures) -> list[float]:
    """The largest difference of a logit in each honest execution of a stage with the head."""
    honest = [row for (_, name, _), row in figures.items() if name.startswith("honest")]
    return [value for row in honest for value in row.get("logit", [])]


def has_goal(name: str) -> bool:
    """Whether the name is that of a cheat which must lie far away."""
    return name.startswith("cheat") and name not in sketch_separation_vision.WITHOUT_GOAL | MORE_BITS


def figure_entries(figures: Figures, tolerance: SketchTolerance, prefix: str) -> list[dict[str, Any]]:
    """The figures of one execution class for the result file, against its tolerance."""
    entries = []
    for kind, radius, unit in (
        ("sketch", tolerance.honest_radius, "sketch distance"),
        ("fingerprint", tolerance.fingerprint_radius, "fingerprint distance"),
    ):
        for name, row in sorted(by_name(figures).items()):
            values = row[kind]
            goal: str | None
            met: bool | None
            if name.startswith("honest"):
                value, goal, note = max(values), f"<= {radius}", "largest; goal is r"
                met = value <= radius
            elif has_goal(name):
                value, goal, note = min(values), f"> {7 * radius}", "smallest; goal is 7 r"
                met = value > 7 * radius
            else:
                near = sum(gap <= radius for gap in values)
                value, goal, met = min(values), None, None
                note = f"smallest; {near} samples lie within r; for information"
            entries.append(
                {"name": f"{prefix}{kind}, {name}", "value": value, "unit": unit, "low": min(values),
                 "high": max(values), "samples": len(values), "goal": goal, "met": met, "note": note}
            )  # fmt: skip
    if logits := honest_logits(figures):
        largest, limit = max(logits), tolerance.logit_tolerance
        entries.append(
            {"name": f"{prefix}logit, honest", "value": largest, "unit": "difference of a logit", "low": min(logits),
             "high": largest, "samples": len(logits), "goal": f"<= {limit:g}", "met": largest <= limit,
             "note": "largest of all ways, prompts, tokens and the vocabulary; goal is the class's logit tolerance"}
        )  # fmt: skip
    return entries


def write_result(entries: dict[str, list[dict[str, Any]]], seeds: int) -> None:
    """Writes the figures measured now; those of a class that was left out stay as they are."""
    kept = json.loads(RESULT.read_text())["figures"] if len(entries) < len(PARTS) and RESULT.exists() else []
    prefixes = {part: prefix for part, (_, prefix) in PARTS.items()}

    def part_of(name: str) -> str:
        return next((part for part, prefix in prefixes.items() if prefix and name.startswith(prefix)), "float32")

    figures: list[dict[str, Any]] = []
    for part in PARTS:
        figures += entries.get(part, [item for item in kept if part_of(item["name"]) == part])
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    document = {
        "name": "sketch_separation", "commit": commit or None,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "seed": f"seeds from 0, {seeds} now (bfloat16 and int8: at most {max(FEWER_SEEDS.values())}), for each of "
        f"{len(PROMPTS) + 1} prompts (there {max(FEWER_PROMPTS.values()) + 1}) and {len(CUTS) - 1} stages; "
        "of the vision model 8 pictures and 14 stages",
        "figures": figures,
    }  # fmt: skip
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(document, indent=1) + "\n")
    missed = [entry["name"] for entry in figures if entry["met"] is False]
    print(f"wrote {RESULT.name}; goals missed: {', '.join(missed) or 'none'}")


if __name__ == "__main__":
    main()
