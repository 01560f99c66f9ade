"""Execution of a contiguous range of shard units: one stage of the pipeline.

Owns `open_stage`, which gives the executor that fits the model, what every executor promises, and the teacher-forced
re-execution that a committee does. Promises: equal inputs at equal positions give outputs equal up to float noise
however they are cut into steps and whatever other sessions run in the same batch; positions are contiguous; nothing
outside the context limit runs; a step that failed leaves its session as before, and the other steps of its batch done.
Does not sample, sketch or speak to the network, and does not lock: one thread at a time may use a session.

Decoders run in `bsns.runtime.decoder_executor`, captured programs in `bsns.runtime.program_executor`.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

import torch
from torch import Tensor

from bsns.protocol.manifest import EXPORTED, ModelManifest
from bsns.runtime.weight_store import WeightStore

# Rows of one forward in a re-execution: enough to fill the matrix kernels, small enough that logits and activations
# stay in the cache.
REEXECUTION_ROWS: Final = 256


InsideRows = Callable[[Tensor], None]
"""Takes float32 [n, width] on the CPU: rows inside a stage, of every row of a step in their order."""


class ExecutionError(ValueError):
    """A stage cannot be built or a step cannot run as asked. The message says what was expected."""


class ContextLimitError(ExecutionError):
    """A step would exceed the tokens reserved for its session. End the session, or open one with a larger limit."""


class StageSession(Protocol):
    """The state that one stage keeps for one request."""

    @property
    def position(self) -> int:
        """Tokens seen so far; the position of the next row."""
        ...

    @property
    def cache_bytes(self) -> int:
        """Bytes that the KV cache holds now."""
        ...

    @property
    def cache_bytes_limit(self) -> int:
        """Bytes of KV cache at the session's token limit: what a node sets aside."""
        ...

    def truncate(self, position: int) -> None:
        """Forgets every row from `position` on, so that a step can be repeated."""
        ...


@dataclass(frozen=True, slots=True)
class BatchStep:
    """One session's step in a batch. `inputs`: int64 [n] token ids where the stage has the embedding, else float32
    [n, width]; the first row is at `position`, which must be the session's. `logit_rows`: of which of the n rows the
    head gives logits (default: the last).
    """

    session: StageSession
    inputs: Tensor
    position: int
    logit_rows: Sequence[int] | None = None


class ShardExecutor(Protocol):
    """Runs the units [first_unit, end_unit) of one model."""

    @property
    def manifest(self) -> ModelManifest: ...
    @property
    def first_unit(self) -> int: ...
    @property
    def end_unit(self) -> int: ...
    @property
    def execution_class(self) -> str:
        """Device, arithmetic and attention kernel, such as `torch-cpu/float32/sdpa`; tolerances are measured per
        class.
        """
        ...

    def new_session(self, max_tokens: int) -> StageSession: ...

    @property
    def memory_bytes(self) -> int:
        """Bytes that the weights take in memory, as they are kept."""
        ...

    def forward(
        self,
        session: StageSession,
        inputs: Tensor,
        *,
        position: int,
        logit_rows: Sequence[int] | None = None,
        inside: InsideRows | None = None,
    ) -> Tensor:
        """One step: `forward_batch` with one, whose error is raised. `inside` gets the rows that the stage's last unit
        takes, which no other stage sees; of a stage of one unit rows that others see, too.
        """
        ...

    def forward_batch(self, steps: Sequence["BatchStep"]) -> list[Tensor | Exception]:
        """Runs one step each of several sessions and advances them. A step that cannot run gives its `ExecutionError`
        or `ContextLimitError` in its place and leaves its session as before; it does not touch the others.
        """
        ...

    def rehearsal(self, *, batch: int, rows: int, past: int) -> Callable[[], None]:
        """One step on random input, for profiling: `batch` sessions at once, `rows` new rows each, with `past` rows
        already in each cache. Each call does the same work and leaves no state behind.
        """
        ...


def forward_each(executor: ShardExecutor, steps: Sequence[BatchStep]) -> list[Tensor | Exception]:
    """`forward_batch` of an executor that runs its steps one by one."""
    outputs: list[Tensor | Exception] = []
    for step in steps:
        try:
            outputs.append(
                executor.forward(step.session, step.inputs, position=step.position, logit_rows=step.logit_rows)
            )
        except ExecutionError as error:
            outputs.append(error)
    return outputs


def open_stage(
    store: WeightStore,
    first_unit: int,
    end_unit: int,
    *,
    threads: int,
    device: str = "cpu",
    arithmetic: str = "float32",
    progress: Callable[[int, int], None] | None = None,
) -> ShardExecutor:
    """The executor of the units [first_unit, end_unit), of the kind that the model needs.

    `arithmetic` is how matrices are kept and multiplied (`bsns.runtime.weight_formats.ARITHMETICS`); it is part of the
    execution class. `progress` is called with (bytes done, bytes in all) while weights are checked. Raises
    `WeightMismatchError` for a wrong file, `ExecutionError` for a range, model or arithmetic that cannot run.
    """
    if store.manifest.architecture == EXPORTED:
        from bsns.runtime.program_executor import ProgramExecutor

        if arithmetic != "float32":
            raise ExecutionError(
                f"{store.manifest.name} is a captured program, which runs in float32 only; {arithmetic} was asked for"
            )
        return ProgramExecutor(store, first_unit, end_unit, threads=threads, device=device, progress=progress)
    from bsns.runtime.decoder_executor import StageExecutor

    return StageExecutor(
        store, first_unit, end_unit, threads=threads, device=device, arithmetic=arithmetic, progress=progress
    )


@dataclass(frozen=True, slots=True)
class StepInput:
    """One step's inputs as they were handed over: int64 [n] or float32 [n, hidden], first row at `position`. A stage
    with the head gives the logits of the last `logit_rows` rows.
    """

    position: int
    inputs: Tensor
    logit_rows: int = 1


def iterate_reexecution(
    executor: ShardExecutor,
    steps: Sequence[StepInput],
    *,
    chunk_rows: int = REEXECUTION_ROWS,
    session: StageSession | None = None,
    inside: InsideRows | None = None,
) -> Iterator[Tensor]:
    """Re-executes a whole session in one teacher-forced pass and yields each step's outputs in order. In `session`, if
    an empty one is given, which can then go on behind the last step. `inside` as of `ShardExecutor.forward`, in pieces.

    What `forward` gave for the step: float32 [n, hidden], or for a stage with the head the logits [logit_rows,
    vocabulary]. The first step is at position 0. A later one begins behind the step before it or goes back to one of
    that step's rows, which is then forgotten with those behind it. Steps that follow one another run in chunks of
    `chunk_rows` rows, so memory is bounded; each way back begins a new chunk.
    """
    _check_positions(steps)
    if not steps:
        return
    if session is None:
        session = executor.new_session(max(step.position + step.inputs.shape[0] for step in steps))
    first = 0
    for end in range(1, len(steps) + 1):
        if end == len(steps) or steps[end].position < steps[end - 1].position + steps[end - 1].inputs.shape[0]:
            if first:
                session.truncate(steps[first].position)
            yield from _iterate_contiguous(executor, session, steps[first:end], chunk_rows, inside)
            first = end


def _check_positions(steps: Sequence[StepInput]) -> None:
    least = most = 0
    for number, step in enumerate(steps):
        if not least <= step.position <= most:
            raise ExecutionError(
                f"step {number} starts at position {step.position}, expected {least} to {most}; steps are missing"
            )
        least, most = step.position + 1, step.position + step.inputs.shape[0]


def _iterate_contiguous(
    executor: ShardExecutor,
    session: StageSession,
    steps: Sequence[StepInput],
    chunk_rows: int,
    inside: InsideRows | None,
) -> Iterator[Tensor]:
    """Outputs of steps that leave nothing out between them, from the session's position on."""
    has_head = executor.end_unit == len(executor.manifest.units)
    begin = steps[0].position
    everything = steps[0].inputs if len(steps) == 1 else torch.cat([step.inputs for step in steps])
    ends = [step.position - begin + step.inputs.shape[0] for step in steps]
    # Of each step the rows that are asked for, among all rows of these steps.
    wanted = [
        range(end - (step.logit_rows if has_head else step.inputs.shape[0]), end)
        for step, end in zip(steps, ends, strict=True)
    ]
    asked = [row for item in wanted for row in item]
    pending: list[Tensor] = []
    number = 0
    for first in range(0, ends[-1], chunk_rows):
        chunk = everything[first : first + chunk_rows]
        last = first + chunk.shape[0]
        rows: list[int] | None = None
        if has_head:
            rows = [row - first for row in asked[bisect_left(asked, first) : bisect_left(asked, last)]]
        output = executor.forward(session, chunk, position=begin + first, logit_rows=rows, inside=inside)
        taken = 0
        while number < len(ends) and wanted[number].start < last:
            # Rows of this step that lie in this chunk.
            count = min(wanted[number].stop, last) - max(wanted[number].start, first)
            pending.append(output[taken : taken + count])
            taken += count
            if ends[number] > last:
                break
            yield torch.cat(pending) if len(pending) > 1 else pending[0]
            pending, number = [], number + 1


def reexecute(
    executor: ShardExecutor, steps: Sequence[StepInput], *, chunk_rows: int = REEXECUTION_ROWS
) -> list[Tensor]:
    """All of `iterate_reexecution` at once: one tensor per step."""
    return list(iterate_reexecution(executor, steps, chunk_rows=chunk_rows))
