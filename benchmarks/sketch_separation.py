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
import os
import platform
import random
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from benchmarks import sketch_separation_vision
from bsns.protocol.sketch import TOLERANCES, SketchTolerance, StageSketch, distance, fingerprint_distance
from bsns.requester.chat_tokenizer import ChatTokenizer
from bsns.runtime import decoder_blocks, decoder_executor
from bsns.runtime.decoder_executor import StageExecutor
from bsns.runtime.executor import BatchStep, StepInput, reexecute
from bsns.runtime.prepare import prepare
from bsns.runtime.weight_store import HashProgress, WeightStore

CUTS = (0, 11, 21, 32)
LENGTHS = (1, 8, 32)
PROMPTS = (
    "What is the capital of France?",
    "Write a short story about a lighthouse keeper who finds a bottle with a letter in it.",
    "Explain why the sky is blue and why sunsets are red, in terms that a ten year old child would understand.",
    "def fibonacci(n):  # complete this function and explain what it does",
)
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
OTHER_SESSIONS = (2, 8, 32)
# AVX2 for PyTorch's and MKL's kernels; oneDNN without the instructions for bfloat16 and for sums of 8-bit products.
OLDER_PROCESSOR = {
    "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
}  # fmt: skip
RESULT = Path(__file__).parent / "results" / "sketch_separation.json"

Outputs = list[np.ndarray[Any, np.dtype[np.float32]]]
# By stage, way of executing and tokens of the answer: distances of sketch and fingerprint, largest relative error and,
# at the last stage, largest difference of a logit.
Figures = dict[tuple[str, str, int], dict[str, list[float]]]


@dataclass(frozen=True)
class Recording:
    """What one stage took and gave while a prompt was answered token by token, by itself: the reference."""

    steps: list[StepInput] = field(default_factory=list)
    outputs: Outputs = field(default_factory=list)


Execute = Callable[[Recording], Outputs]


@cache
def tensors_of(folder: Path, index: int) -> dict[str, Tensor]:
    """A unit's tensors as they are: checked once, then shared by all stages that are built."""
    return WeightStore(folder).load_unit(index)


class ChangedWeights(WeightStore):
    """A model folder in which each matrix of the blocks and of the head is exchanged for what `change` makes of it."""

    def __init__(self, folder: Path, change: Callable[[Tensor], Tensor] = lambda weight: weight) -> None:
        super().__init__(folder)
        self._change = change

    def load_unit(self, index: int, progress: HashProgress | None = None) -> dict[str, Tensor]:
        tensors = dict(tensors_of(self.folder, index))
        if self.manifest.units[index].kind == "embedding":
            return tensors
        return {name: self._change(tensor) if tensor.ndim == 2 else tensor for name, tensor in tensors.items()}


class UndeclaredProduct:
    """Stands where a packed matrix does, and multiplies by `product` of inputs and weight."""

    def __init__(self, weight: Tensor, product: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.out_features, self.in_features = weight.shape
        self.memory_bytes = weight.nbytes
        self._weight, self._product = weight, product

    def __call__(self, x: Tensor) -> Tensor:
        return self._product(x, self._weight)


@dataclass(frozen=True)
class Cheat:
    """How a dishonest node's stage departs from the declared class: its weights, the executor's arithmetic, or another
    arithmetic altogether; in all of its blocks and the head, or in the middle block only.
    """

    change: Callable[[Tensor], Tensor] = lambda weight: weight
    arithmetic: str | None = None
    product: Callable[[Tensor, Tensor], Tensor] | None = None
    one_block: bool = False
    skips_one: bool = False

    def stage(self, folder: Path, number: int, declared: str) -> StageExecutor:
        """The dishonest node's stage."""
        first, end = CUTS[number], CUTS[number + 1]
        if not (self.one_block or self.skips_one):
            return self._built(folder, first, end, declared)
        executor = StageExecutor(ChangedWeights(folder), first, end, arithmetic=declared)
        middle = len(executor._blocks) // 2
        if self.skips_one:
            del executor._blocks[middle]
        else:
            unit = first + middle + int(executor.has_embedding)
            executor._blocks[middle] = self._built(folder, unit, unit + 1, declared)._blocks[0]
        return executor

    def _built(self, folder: Path, first: int, end: int, declared: str) -> StageExecutor:
        with ExitStack() as patches:
            if (product := self.product) is not None:
                for module in (decoder_blocks, decoder_executor):
                    made = mock.patch.object(module, "pack", lambda weight, *_: UndeclaredProduct(weight, product))
                    patches.enter_context(made)
            return StageExecutor(
                ChangedWeights(folder, self.change), first, end, arithmetic=self.arithmetic or declared
            )


def integer_rows(bits: int, group: int | None = None) -> Callable[[Tensor], Tensor]:
    """Weights in `bits` bits, with a scale for each row or for each `group` of a row."""
    largest = 2 ** (bits - 1) - 1

    def change(weight: Tensor) -> Tensor:
        grouped = weight.reshape(-1, group or weight.shape[1])
        scale = grouped.abs().amax(dim=1, keepdim=True).clamp_min(1e-30) / largest
        return (torch.round(grouped / scale).clamp(-largest, largest) * scale).view_as(weight)

    return change


def nf4(weight: Tensor) -> Tensor:
    """Sixteen levels by the quantiles of a normal distribution, a scale for each 64 (QLoRA, arXiv 2305.14314)."""
    levels = torch.tensor(
        [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0,
         0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.7230, 1.0]
    )  # fmt: skip
    grouped = weight.reshape(-1, 64)
    scale = grouped.abs().amax(dim=1, keepdim=True).clamp_min(1e-30)
    nearest = torch.bucketize(grouped / scale, (levels[1:] + levels[:-1]) / 2)
    return (levels[nearest] * scale).view_as(weight)


def percent_noise(percent: float) -> Callable[[Tensor], Tensor]:
    def change(weight: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(weight.shape[0])
        return weight + percent / 100 * weight.std() * torch.randn(weight.shape, generator=generator)

    return change


def in_bfloat16(weight: Tensor) -> Tensor:
    return weight.bfloat16().float()


def half_product(x: Tensor, weight: Tensor) -> Tensor:
    return (x.half() @ weight.half().t()).float()


def eight_bit_inputs(x: Tensor, weight: Tensor) -> Tensor:
    return integer_rows(8)(x) @ weight.t()


def llm_int8(x: Tensor, weight: Tensor) -> Tensor:
    """Inputs in 8 bits a row, but for the channels in which some row exceeds 6 (LLM.int8(), arXiv 2208.07339)."""
    large = (x.abs() > 6).any(dim=0)
    return integer_rows(8)(x.masked_fill(large, 0.0)) @ weight.t() + x[:, large] @ weight[:, large].t()


INT8_ROWS = "int8 weights, per row"
# More bits than a class declares: nobody gains by that, so it has no goal.
MORE_BITS = frozenset({"cheat: float32 arithmetic", "cheat: bf16 arithmetic in place of int8"})
FEWER_BITS: dict[str, Cheat] = {
    "int4 weights, per row": Cheat(integer_rows(4)),
    "int4 weights, groups of 32": Cheat(integer_rows(4, 32)),
    "nf4 weights": Cheat(nf4),
    "LLM.int8() arithmetic": Cheat(integer_rows(8), "float32", llm_int8),
    "8-bit weights and inputs, per row": Cheat(integer_rows(8), "float32", eight_bit_inputs),
    "one block skipped": Cheat(skips_one=True),
    "weights + 1 % noise": Cheat(percent_noise(1)),
    "weights + 0.1 % noise": Cheat(percent_noise(0.1)),
    "one block with int4 weights, groups of 32": Cheat(integer_rows(4, 32), one_block=True),
}
CHEATS: dict[str, dict[str, Cheat]] = {
    "float32": {
        INT8_ROWS: Cheat(integer_rows(8)),
        "int8 arithmetic": Cheat(arithmetic="int8"),
        "bf16 weights": Cheat(in_bfloat16),
        "bf16 arithmetic": Cheat(arithmetic="bfloat16"),
        "fp16 arithmetic": Cheat(product=half_product),
        "one block with bf16 weights": Cheat(in_bfloat16, one_block=True),
        **FEWER_BITS,
    },
    "bfloat16": {
        INT8_ROWS: Cheat(integer_rows(8)),
        "int8 arithmetic": Cheat(arithmetic="int8"),
        "one block in int8 arithmetic": Cheat(arithmetic="int8", one_block=True),
        "float32 arithmetic": Cheat(arithmetic="float32"),
        **FEWER_BITS,
    },
    "int8": {
        "bf16 arithmetic in place of int8": Cheat(arithmetic="bfloat16"),
        "float32 arithmetic": Cheat(arithmetic="float32"),
        "one block with 8-bit weights and inputs": Cheat(integer_rows(8), "float32", eight_bit_inputs, one_block=True),
        **FEWER_BITS,
    },
}


def answer(stages: Sequence[StageExecutor], prompt: list[int], tokens: int) -> list[Recording]:
    """Greedy decoding token by token; what each stage took and gave at each step."""
    sessions = [stage.new_session(len(prompt) + tokens) for stage in stages]
    recordings = [Recording() for _ in stages]
    rows, position = torch.tensor(prompt), 0
    for _ in range(tokens):
        values = rows
        for stage, session, recording in zip(stages, sessions, recordings, strict=True):
            recording.steps.append(StepInput(position, values))
            values = stage.forward(session, values, position=position)
            recording.outputs.append(values.numpy())
        position += len(rows)
        rows = values[-1:].argmax(dim=1)
    return recordings


def in_one_pass(stage: StageExecutor, chunk_rows: int = 256) -> Execute:
    return lambda recording: arrays(reexecute(stage, recording.steps, chunk_rows=chunk_rows))


def step_by_step(stage: StageExecutor, others: int = 0, other_rows: Tensor | None = None) -> Execute:
    """Decoding as it was, in a batch with `others` sessions that take one of `other_rows` at each step."""

    def execute(recording: Recording) -> Outputs:
        session = stage.new_session(sum(len(step.inputs) for step in recording.steps))
        beside = [stage.new_session(len(recording.steps)) for _ in range(others)]
        outputs = []
        for place, step in enumerate(recording.steps):
            batch = [BatchStep(session, step.inputs, step.position)]
            for number, other in enumerate(beside):
                assert other_rows is not None
                row = (place * others + number) % len(other_rows)
                batch.append(BatchStep(other, other_rows[row : row + 1], place))
            # Not the first of the batch, where a kernel's tile begins.
            batch.append(batch.pop(0))
            output = stage.forward_batch(batch)[-1]
            assert isinstance(output, Tensor), output
            outputs.append(output)
        return arrays(outputs)

    return execute


def one_row_changed(stage: StageExecutor) -> Execute:
    """One pass with a row in the middle of the prompt exchanged for its neighbour (the first stage: another token)."""

    def execute(recording: Recording) -> Outputs:
        first = recording.steps[0].inputs.clone()
        middle = len(first) // 2
        first[middle] = first[middle] + 1 if first.ndim == 1 else first[middle - 1]
        return arrays(reexecute(stage, [StepInput(0, first), *recording.steps[1:]]))

    return execute


def last_step_only(cheat: Execute) -> Execute:
    """A node that cheats in the last step and was honest before."""
    return lambda recording: [*recording.outputs[:-1], cheat(recording)[-1]]


def ways(folder: Path, number: int, declared: str, recordings: Sequence[Recording]) -> Iterator[tuple[str, Execute]]:
    """Every way in which stage `number` is executed again, honest ones first. Stages are built one after the other."""

    def stage(**options: Any) -> StageExecutor:
        return StageExecutor(ChangedWeights(folder), CUTS[number], CUTS[number + 1], arithmetic=declared, **options)

    plain = stage()
    yield "honest: one pass", in_one_pass(plain)
    yield "honest: pieces of 32", in_one_pass(plain, 32)
    yield "honest: pieces of 7", in_one_pass(plain, 7)
    rows = torch.cat([step.inputs for recording in recordings for step in recording.steps])
    for others in OTHER_SESSIONS:
        yield f"honest: decode beside {others} sessions", step_by_step(plain, others, rows)
    yield "cheat: one prompt row changed", one_row_changed(plain)
    threaded = stage(threads=2)
    yield "honest: one pass, 2 threads", in_one_pass(threaded)
    yield "honest: decode, 2 threads", step_by_step(threaded)
    eager = stage(attention="eager")
    yield "honest: eager, one pass", in_one_pass(eager)
    yield "honest: eager, decode", step_by_step(eager)
    for name, cheat in CHEATS[declared].items():
        execute = in_one_pass(cheat.stage(folder, number, declared))
        yield f"cheat: {name}", execute
        if name in (INT8_ROWS, "int4 weights, groups of 32"):
            yield f"cheat: {name}, last step only", last_step_only(execute)


def on_older_processor(part: str, recordings: list[list[Recording]]) -> list[list[Outputs]]:
    """The outputs of each stage in one pass, [stage][recording], in a process that may not use newer instructions."""
    with tempfile.TemporaryDirectory() as name:
        given, taken = Path(name) / "inputs.npz", Path(name) / "outputs.npz"
        arguments = {}
        for number, row in enumerate(recordings):
            for place, recording in enumerate(row):
                arguments[f"{number}-{place}"] = torch.cat([step.inputs for step in recording.steps]).numpy()
                arguments[f"{number}-{place}-sizes"] = np.array([len(step.inputs) for step in recording.steps])
        np.savez(given, **arguments)
        command = [sys.executable, "-m", "benchmarks.sketch_separation", "--only", part, "--outputs", given, taken]
        subprocess.run(command, check=True, env={**os.environ, **OLDER_PROCESSOR})
        with np.load(taken) as outputs:
            return [
                [
                    np.split(outputs[f"{number}-{place}"], np.cumsum([len(item) for item in recording.outputs])[:-1])
                    for place, recording in enumerate(row)
                ]
                for number, row in enumerate(recordings)
            ]


def write_outputs(declared: str, given: str, taken: str) -> None:
    """The other side of `on_older_processor`."""
    torch.set_num_threads(1)
    store = WeightStore(prepare())
    outputs = {}
    with np.load(given) as inputs:
        for number, (first, end) in enumerate(pairwise(CUTS)):
            stage = StageExecutor(store, first, end, arithmetic=declared)
            for key in [key for key in inputs.files if key.startswith(f"{number}-") and key.count("-") == 1]:
                rows, sizes = torch.from_numpy(inputs[key]), inputs[f"{key}-sizes"].tolist()
                positions = np.cumsum([0, *sizes[:-1]]).tolist()
                steps = [StepInput(position, step) for position, step in zip(positions, rows.split(sizes), strict=True)]
                outputs[key] = torch.cat(reexecute(stage, steps)).numpy()
    np.savez(taken, **outputs)


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


def run(part: str, seeds: int, units: Sequence[float]) -> dict[float, Figures]:
    """Distances and errors of one arithmetic, for each unit of the sketch."""
    folder = prepare()
    tokenizer, count = ChatTokenizer(folder), len(CUTS) - 1
    torch.set_flush_denormal(False)
    torch.set_num_threads(1)
    stages = [StageExecutor(ChangedWeights(folder), *CUTS[n : n + 2], arithmetic=part) for n in range(count)]
    asked = [(prompt, max(LENGTHS)) for prompt in PROMPTS[: FEWER_PROMPTS.get(part)]] + [
        (LONG_PROMPT, LONG_PROMPT_TOKENS)
    ]
    answers = [answer(stages, tokenizer.prompt_token_ids(prompt), tokens) for prompt, tokens in asked]
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
    parser.add_argument("--outputs", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.outputs:
        write_outputs(options.only, *options.outputs)
        return
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
