"""How far honest executions and cheats lie apart in the distribution sketch and the step fingerprint.

Three stages of the embedded model answer a few prompts token by token; each stage is then executed again from the exact
bytes of its inputs: honestly in several ways (one pass, small chunks, other threads, eager attention) and by cheats
(weights in 8 bit, lower precision, a block left out, another input row, noise). Prints the distances and writes
benchmarks/results/sketch_separation.json. A captured vision model is measured beside it, with a tolerance of its own:
see benchmarks/sketch_separation_vision.py.

    python -m benchmarks.sketch_separation [--seeds 8] [--only text|vision] [--sweep]
"""

import argparse
import copy
import json
import platform
import random
import subprocess
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import sketch_separation_vision
from bsns.protocol.sketch import TOLERANCES, SketchTolerance, StageSketch, distance, fingerprint_distance
from bsns.requester.chat_tokenizer import ChatTokenizer
from bsns.runtime.decoder_executor import StageExecutor
from bsns.runtime.executor import StepInput, reexecute
from bsns.runtime.prepare import prepare
from bsns.runtime.weight_store import WeightStore

CUTS = (0, 11, 21, 32)
LENGTHS = (1, 8, 32)
PROMPTS = (
    "What is the capital of France?",
    "Write a short story about a lighthouse keeper who finds a bottle with a letter in it.",
    "Explain why the sky is blue and why sunsets are red, in terms that a ten year old child would understand.",
    "def fibonacci(n):  # complete this function and explain what it does",
)
SWEPT_UNITS = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4)
TEXT_CLASS = "torch-cpu/float32/sdpa"
VISION_PREFIX = "vision: "
RESULT = Path(__file__).parent / "results" / "sketch_separation.json"

Outputs = list[np.ndarray[Any, np.dtype[np.float32]]]
# By stage, way of executing and tokens of the answer: distances of sketch and fingerprint, largest relative error.
Figures = dict[tuple[str, str, int], dict[str, list[float]]]


class LowerPrecision(nn.Module):
    """A decoder block that computes in `dtype` behind a float32 boundary."""

    def __init__(self, block: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.block, self.dtype = copy.deepcopy(block).to(dtype), dtype

    def forward(self, hidden: Tensor, **arguments: Any) -> Tensor:
        cos, sin = arguments.pop("position_embeddings")
        rotation = (cos.to(self.dtype), sin.to(self.dtype))
        return self.block(hidden.to(self.dtype), position_embeddings=rotation, **arguments).float()


def with_weights(change: Callable[[Tensor], Tensor]) -> Callable[[StageExecutor], None]:
    """A cheat that changes every weight matrix of the stage."""

    def apply(executor: StageExecutor) -> None:
        blocks = [copy.deepcopy(block) for block in executor._blocks]
        for block in blocks:
            for parameter in block.parameters():
                if parameter.ndim == 2:
                    parameter.data = change(parameter.data)
        executor._blocks = blocks
        if executor._head is not None:
            executor._head = change(executor._head)

    return apply


def with_precision(dtype: torch.dtype) -> Callable[[StageExecutor], None]:
    """A cheat that computes its blocks in `dtype`."""

    def apply(executor: StageExecutor) -> None:
        executor._blocks = [LowerPrecision(block, dtype) for block in executor._blocks]

    return apply


def without_a_block(executor: StageExecutor) -> None:
    """A cheat that leaves out the block in the middle of its stage."""
    middle = len(executor._blocks) // 2
    # The skipped block's cache layer stays empty: numbers above it would otherwise have a gap.
    blocks = [copy.deepcopy(block) for number, block in enumerate(executor._blocks) if number != middle]
    for number, block in enumerate(blocks):
        block.self_attn.layer_idx = number
    executor._blocks = blocks


def int8_rows(weight: Tensor) -> Tensor:
    scale = weight.abs().amax(dim=1, keepdim=True) / 127
    return torch.round(weight / scale).clamp(-127, 127) * scale


def percent_noise(percent: float) -> Callable[[Tensor], Tensor]:
    def change(weight: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(weight.shape[0])
        return weight + percent / 100 * weight.std() * torch.randn(weight.shape, generator=generator)

    return change


WEIGHT_CHEATS: dict[str, Callable[[StageExecutor], None]] = {
    "int8 weights, per row": with_weights(int8_rows),
    "bf16 weights": with_weights(lambda weight: weight.bfloat16().float()),
    "bf16 arithmetic": with_precision(torch.bfloat16),
    "fp16 arithmetic": with_precision(torch.float16),
    "one block skipped": without_a_block,
    "weights + 1 % noise": with_weights(percent_noise(1)),
    "weights + 0.1 % noise": with_weights(percent_noise(0.1)),
}


def answer(stages: Sequence[StageExecutor], prompt: list[int], tokens: int) -> list[list[StepInput]]:
    """Greedy decoding token by token; the inputs of each stage at each step."""
    sessions = [stage.new_session(len(prompt) + tokens) for stage in stages]
    inputs: list[list[StepInput]] = [[] for _ in stages]
    rows, position = torch.tensor(prompt), 0
    for _ in range(tokens):
        values = rows
        for stage, session, taken in zip(stages, sessions, inputs, strict=True):
            taken.append(StepInput(position, values))
            values = stage.forward(session, values, position=position)
        position += len(rows)
        rows = values[-1:].argmax(dim=1)
    return inputs


def step_by_step(stage: StageExecutor, steps: Sequence[StepInput]) -> list[Tensor]:
    session = stage.new_session(sum(len(step.inputs) for step in steps))
    return [stage.forward(session, step.inputs, position=step.position) for step in steps]


def one_row_changed(steps: Sequence[StepInput]) -> list[StepInput]:
    """The prompt with one row in the middle exchanged for its neighbour (the first stage: another token)."""
    first = steps[0].inputs.clone()
    middle = len(first) // 2
    first[middle] = first[middle] + 1 if first.ndim == 1 else first[middle - 1]
    return [StepInput(0, first), *steps[1:]]


def arrays(outputs: Sequence[Tensor]) -> Outputs:
    return [output.numpy().astype(np.float32) for output in outputs]


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


def run(seeds: int, units: Sequence[float]) -> dict[float, Figures]:
    folder = prepare()
    store, tokenizer = WeightStore(folder), ChatTokenizer(folder)

    def stage(number: int, **options: Any) -> StageExecutor:
        return StageExecutor(store, CUTS[number], CUTS[number + 1], **options)

    count = len(CUTS) - 1
    torch.set_flush_denormal(False)
    plain = [stage(number) for number in range(count)]
    eager = [stage(number, attention="eager") for number in range(count)]
    threaded = [stage(number, threads=2) for number in range(count)]
    cheating = {name: [stage(number) for number in range(count)] for name in WEIGHT_CHEATS}
    for name, change in WEIGHT_CHEATS.items():
        for executor in cheating[name]:
            change(executor)
    figures: dict[float, Any] = {unit: defaultdict(lambda: defaultdict(list)) for unit in units}
    for prompt in PROMPTS:
        inputs = answer(plain, tokenizer.prompt_token_ids(prompt), max(LENGTHS))
        for number in range(count):
            centred, steps = number == count - 1, inputs[number]
            reference = arrays(step_by_step(plain[number], steps))
            runs = {
                "honest: one pass": arrays(reexecute(plain[number], steps)),
                "honest: chunks of 7": arrays(reexecute(plain[number], steps, chunk_rows=7)),
                "honest: one pass, 2 threads": arrays(reexecute(threaded[number], steps)),
                "honest: decode, 2 threads": arrays(step_by_step(threaded[number], steps)),
                "honest: eager, one pass": arrays(reexecute(eager[number], steps)),
                "honest: eager, decode": arrays(step_by_step(eager[number], steps)),
                "cheat: one prompt row changed": arrays(reexecute(plain[number], one_row_changed(steps))),
            }
            for name in WEIGHT_CHEATS:
                runs[f"cheat: {name}"] = arrays(reexecute(cheating[name][number], steps))
            one_step = list(reference)
            one_step[-1] = runs["cheat: int8 weights, per row"][-1]
            runs["cheat: int8, last step only"] = one_step
            for unit in units:
                for seed_number in range(seeds):
                    seed = random.Random(f"{prompt}/{number}/{seed_number}").randbytes(32)
                    expected, expected_prints = sketches(reference, seed, unit, centred)
                    for name, outputs in runs.items():
                        values, prints = sketches(outputs, seed, unit, centred)
                        gaps = [fingerprint_distance(a, b) for a, b in zip(expected_prints, prints, strict=True)]
                        for length, value in values.items():
                            if "last step only" in name and length < len(outputs):
                                continue  # the cheat has not begun
                            row = figures[unit][f"stage {number + 1}", name, length]
                            row["sketch"].append(distance(expected[length], value))
                            row["fingerprint"].append(
                                max(gaps[:length]) if name.startswith("honest") else gaps[length - 1]
                            )
                            row["relative"].append(relative_error(reference[:length], outputs[:length], centred))
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8, help="sketch seeds for each input and stage")
    parser.add_argument("--only", choices=("text", "vision"), help="measure one model, keep the other's figures")
    parser.add_argument("--sweep", action="store_true", help="try several units instead of writing the result")
    options = parser.parse_args()
    entries: dict[str, list[dict[str, Any]]] = {}
    for part, measure, execution_class, prefix in (
        ("text", run, TEXT_CLASS, ""),
        ("vision", sketch_separation_vision.run, sketch_separation_vision.EXECUTION_CLASS, VISION_PREFIX),
    ):
        if options.only not in (None, part):
            continue
        tolerance = TOLERANCES[execution_class]
        everything = measure(options.seeds, SWEPT_UNITS if options.sweep else [tolerance.unit])
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
            print(
                f"{stage}  {name:42} {length:3} tokens  sketch min {min(sketch):5} median {np.median(sketch):7.1f} "
                f"max {max(sketch):5}"
                f"  fingerprint min {min(fingerprint):6} max {max(fingerprint):6}  error {max(row['relative']):.1e}"
            )
        honest = [d for (_, name, _), row in figures.items() if name.startswith("honest") for d in row["sketch"]]
        cheats = [d for (_, name, _), row in figures.items() if has_goal(name) for d in row["sketch"]]
        prints = [d for (_, name, _), row in figures.items() if name.startswith("honest") for d in row["fingerprint"]]
        print(
            f"unit {unit:g}: honest largest {max(honest)}, cheat smallest {min(cheats)}, "
            f"fingerprint honest largest {max(prints)}"
        )


def has_goal(name: str) -> bool:
    """Whether the name is that of a cheat which must lie far away."""
    return name.startswith("cheat") and name not in sketch_separation_vision.WITHOUT_GOAL


def figure_entries(figures: Figures, tolerance: SketchTolerance, prefix: str) -> list[dict[str, Any]]:
    """The figures of one execution class for the result file, against its tolerance."""
    entries = []
    for kind, radius, unit in (
        ("sketch", tolerance.honest_radius, "sketch distance"),
        ("fingerprint", tolerance.fingerprint_radius, "fingerprint distance"),
    ):
        grouped: dict[str, list[float]] = defaultdict(list)
        for (_, name, _), row in figures.items():
            grouped[name] += row[kind]
        for name, values in sorted(grouped.items()):
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
                note = f"smallest; {near} samples lie within r: the change did not show in the output"
            entries.append(
                {"name": f"{prefix}{kind}, {name}", "value": value, "unit": unit, "low": min(values),
                 "high": max(values), "samples": len(values), "goal": goal, "met": met, "note": note}
            )  # fmt: skip
    return entries


def write_result(entries: dict[str, list[dict[str, Any]]], seeds: int) -> None:
    """Writes the figures measured now; those of a model that was left out stay as they are."""
    kept = json.loads(RESULT.read_text())["figures"] if len(entries) < 2 and RESULT.exists() else []
    figures: list[dict[str, Any]] = []
    for part in ("text", "vision"):
        is_vision = part == "vision"
        figures += entries.get(part, [item for item in kept if item["name"].startswith(VISION_PREFIX) == is_vision])
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    document = {
        "name": "sketch_separation", "commit": commit or None,
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "seed": f"seeds from 0, {seeds} now, for each of {len(PROMPTS)} prompts and {len(CUTS) - 1} stages; of the "
        "vision model 8 pictures and 14 stages", "figures": figures,
    }  # fmt: skip
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(document, indent=1) + "\n")
    print(f"wrote {RESULT.name}; goals met: {all(entry['met'] is not False for entry in figures)}")


if __name__ == "__main__":
    main()
