"""What stages of the embedded model take and give, and the ways in which honest nodes execute them again.

Used by `benchmarks.sketch_separation` and `benchmarks.verification`. A recording is what one stage took and gave while
a prompt was answered token by token; a way of executing turns a recording into the outputs of somebody who was given
the same inputs. What dishonest nodes do instead is in `benchmarks.verification_cheats`.

As a program it is an older processor: it executes the stages on the rows of one file and writes their outputs to
another.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bsns.protocol.sampling import SamplingParameters, draw
from bsns.runtime.decoder_executor import StageExecutor
from bsns.runtime.executor import BatchStep, StepInput, iterate_reexecution, reexecute
from bsns.runtime.prepare import prepare
from bsns.runtime.weight_store import HashProgress, WeightStore

CUTS = (0, 11, 21, 32)
PROMPTS = (
    "What is the capital of France?",
    "Write a short story about a lighthouse keeper who finds a bottle with a letter in it.",
    "Explain why the sky is blue and why sunsets are red, in terms that a ten year old child would understand.",
    "def fibonacci(n):  # complete this function and explain what it does",
)
OTHER_SESSIONS = (2, 8, 32)
# AVX2 for PyTorch's and MKL's kernels; oneDNN without the instructions for bfloat16 and for sums of 8-bit products.
OLDER_PROCESSOR = {
    "ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
}  # fmt: skip
GREEDY = SamplingParameters()

Rows = np.ndarray[Any, np.dtype[np.float32]]
Outputs = list[Rows]


@dataclass(frozen=True)
class Recording:
    """What one stage took and gave while a prompt was answered token by token: the reference."""

    steps: list[StepInput] = field(default_factory=list)
    outputs: Outputs = field(default_factory=list)

    def shortened(self, steps: int) -> Recording:
        """The recording of an answer that ended after `steps` tokens."""
        return Recording(self.steps[:steps], self.outputs[:steps])


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


def honest_stages(folder: Path, cuts: Sequence[int], arithmetic: str) -> list[StageExecutor]:
    """The stages between the cuts, of one thread each."""
    return [StageExecutor(ChangedWeights(folder), *bounds, arithmetic=arithmetic) for bounds in pairwise(cuts)]


def answer(
    stages: Sequence[StageExecutor],
    prompts: Sequence[Sequence[int]],
    tokens: int,
    sampling: Sequence[SamplingParameters] | None = None,
) -> list[list[Recording]]:
    """Decodes token by token, all prompts in one batch; what each stage took and gave, [prompt][stage].

    Tokens are drawn as `sampling` says (None: greedily); an answer does not end at an end token.
    """
    sampling = [GREEDY] * len(prompts) if sampling is None else sampling
    sessions = [[stage.new_session(len(prompt) + tokens) for stage in stages] for prompt in prompts]
    recordings = [[Recording() for _ in stages] for _ in prompts]
    rows = [torch.tensor(prompt) for prompt in prompts]
    position = [0] * len(prompts)
    for step in range(tokens):
        values = list(rows)
        for number, stage in enumerate(stages):
            batch = [
                BatchStep(sessions[prompt][number], values[prompt], position[prompt]) for prompt in range(len(prompts))
            ]
            outputs = [_tensor(output) for output in stage.forward_batch(batch)]
            for prompt, output in enumerate(outputs):
                recordings[prompt][number].steps.append(StepInput(position[prompt], values[prompt]))
                recordings[prompt][number].outputs.append(output.numpy())
            values = outputs
        for prompt, output in enumerate(values):
            position[prompt] += len(rows[prompt])
            rows[prompt] = torch.tensor([draw(output[-1].numpy(), sampling[prompt], step)])
    return recordings


def in_one_pass(stage: StageExecutor, chunk_rows: int = 256) -> Execute:
    return lambda recording: arrays(reexecute(stage, recording.steps, chunk_rows=chunk_rows))


def rows_inside(stage: StageExecutor, steps: Sequence[StepInput], chunk_rows: int = 256) -> Outputs:
    """What the last unit of a stage takes at each step, executed in one pass."""
    pieces: list[Tensor] = []
    for _ in iterate_reexecution(stage, steps, chunk_rows=chunk_rows, inside=pieces.append):
        pass
    return arrays(torch.cat(pieces).split([len(step.inputs) for step in steps]))


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
            outputs.append(_tensor(stage.forward_batch(batch)[-1]))
        return arrays(outputs)

    return execute


def without_onednn(execute: Execute) -> Execute:
    """The same where PyTorch may not use oneDNN: its own kernels and MKL's take its place."""

    def other(recording: Recording) -> Outputs:
        with warnings.catch_warnings():
            # PyTorch speaks of GPUs that are not there when the flags are set.
            warnings.simplefilter("ignore", UserWarning)
            with torch.backends.mkldnn.flags(enabled=False):
                return execute(recording)

    return other


def honest_ways(
    folder: Path, bounds: tuple[int, int], declared: str, recordings: Sequence[Recording]
) -> Iterator[tuple[str, Execute]]:
    """Every way in which an honest node executes the units of `bounds` again, but for an older processor's. Stages are
    built one after the other.
    """

    def stage(**options: Any) -> StageExecutor:
        return StageExecutor(ChangedWeights(folder), *bounds, arithmetic=declared, **options)

    plain = stage()
    yield "honest: one pass", in_one_pass(plain)
    yield "honest: pieces of 32", in_one_pass(plain, 32)
    yield "honest: pieces of 7", in_one_pass(plain, 7)
    yield "honest: one pass, without oneDNN", without_onednn(in_one_pass(plain))
    yield "honest: decode, without oneDNN", without_onednn(step_by_step(plain))
    rows = torch.cat([step.inputs for recording in recordings for step in recording.steps])
    for others in OTHER_SESSIONS:
        yield f"honest: decode beside {others} sessions", step_by_step(plain, others, rows)
    threaded = stage(threads=2)
    yield "honest: one pass, 2 threads", in_one_pass(threaded)
    yield "honest: decode, 2 threads", step_by_step(threaded)
    eager = stage(attention="eager")
    yield "honest: eager, one pass", in_one_pass(eager)
    yield "honest: eager, decode", step_by_step(eager)


def on_older_processor(declared: str, recordings: list[list[Recording]]) -> list[list[Outputs]]:
    """The outputs of each stage between `CUTS` in one pass, [stage][recording], in a process that may not use newer
    instructions.
    """
    with tempfile.TemporaryDirectory() as name:
        given, taken = Path(name) / "inputs.npz", Path(name) / "outputs.npz"
        arguments = {}
        for number, row in enumerate(recordings):
            for place, recording in enumerate(row):
                arguments[f"{number}-{place}"] = torch.cat([step.inputs for step in recording.steps]).numpy()
                arguments[f"{number}-{place}-sizes"] = np.array([len(step.inputs) for step in recording.steps])
        np.savez(given, **arguments)
        command = [sys.executable, "-m", "benchmarks.verification_traces", declared, str(given), str(taken)]
        subprocess.run(command, check=True, env={**os.environ, **OLDER_PROCESSOR})
        with np.load(taken) as outputs:
            return [
                [
                    np.split(outputs[f"{number}-{place}"], np.cumsum([len(item) for item in recording.outputs])[:-1])
                    for place, recording in enumerate(row)
                ]
                for number, row in enumerate(recordings)
            ]


def arrays(outputs: Sequence[Tensor]) -> Outputs:
    return [output.numpy().astype(np.float32) for output in outputs]


def total_rows(steps: Sequence[StepInput]) -> int:
    return sum(len(step.inputs) for step in steps)


def _tensor(output: Tensor | Exception) -> Tensor:
    if isinstance(output, Exception):
        raise output
    return output


def _write_outputs(declared: str, given: str, taken: str) -> None:
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


if __name__ == "__main__":
    _write_outputs(*sys.argv[1:])
