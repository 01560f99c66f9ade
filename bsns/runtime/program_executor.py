"""Execution of a contiguous range of units of a captured model: one stage of the pipeline.

Owns the stage's slice of the program over mapped weights and the translation between rows and tensors: a row is the
concatenation, flattened, of every tensor that crosses the cut, in the order in which the program makes them. Promises
what `ShardExecutor` promises; a session takes one row and keeps nothing. Does not capture, choose cuts or speak to the
network.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Final

import torch
from torch import Tensor

from bsns.protocol.manifest import EXPORTED, ModelManifest
from bsns.runtime.cuda import open_device
from bsns.runtime.executor import BatchStep, ContextLimitError, ExecutionError, InsideRows, StageSession, forward_each
from bsns.runtime.program import BATCH, Program, ProgramError, ProgramSlice
from bsns.runtime.weight_store import WeightStore

PROGRAM_FILE: Final = "program.json"


def _joined(tensors: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    """The row of what crosses a cut: float32 [1, width] on the CPU."""
    return torch.cat([tensors[name].reshape(-1) for name in names]).unsqueeze(0).cpu()


@lru_cache(maxsize=4)
def _parsed(data: bytes) -> Program:
    # Checking takes longer than running; a node that serves, re-executes and profiles opens the same program often.
    return Program.from_bytes(data)


class _RowSession:
    """Whether the session's one row was seen."""

    cache_bytes: Final = 0
    cache_bytes_limit: Final = 0

    def __init__(self) -> None:
        self._position = 0

    @property
    def position(self) -> int:
        return self._position

    def advance(self) -> None:
        self._position = 1

    def truncate(self, position: int) -> None:
        if not 0 <= position <= self._position:
            raise ExecutionError(f"cannot go back to position {position}: the session holds {self._position} rows")
        self._position = position


class ProgramExecutor:
    """`ShardExecutor` for captured models: the units [first_unit, end_unit).

    Weights are mapped, not copied, on a CPU. `threads` bounds torch's threads in a forward; it is set for the calling
    thread in each call, since OpenMP keeps it per thread. `progress` is called with (bytes loaded, bytes in all).
    Raises `WeightMismatchError` for a wrong file, `ExecutionError` for a range or program it cannot run.
    """

    def __init__(
        self,
        store: WeightStore,
        first_unit: int,
        end_unit: int,
        *,
        threads: int = 1,
        device: str = "cpu",
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        manifest = store.manifest
        if not 0 <= first_unit < end_unit <= len(manifest.units):
            raise ExecutionError(f"units [{first_unit}, {end_unit}) are not a range within 0 to {len(manifest.units)}")
        if threads < 1:
            raise ExecutionError(f"threads is {threads}, expected at least 1")
        if manifest.architecture != EXPORTED or manifest.dtype != "float32":
            raise ExecutionError(
                f"this executor runs architecture {EXPORTED!r} in float32, "
                f"not {manifest.architecture!r} in {manifest.dtype}"
            )
        self._manifest, self._first_unit, self._end_unit = manifest, first_unit, end_unit
        self._threads, self._device = threads, open_device(device)
        self.memory_bytes = sum(unit.size_bytes for unit in manifest.units[first_unit:end_unit])
        try:
            program = _parsed(store.read_file(PROGRAM_FILE))
        except ProgramError as error:
            raise ExecutionError(f"the program of {manifest.name} is refused: {error}") from error
        places = [0, *program.cuts, program.operator_count]
        if len(places) != len(manifest.units) + 1:
            raise ExecutionError(
                f"the program of {manifest.name} is cut into {len(places) - 1} units, the manifest lists "
                f"{len(manifest.units)}"
            )
        tensors: dict[str, Tensor] = {}
        done, total = 0, sum(unit.size_bytes for unit in manifest.units[first_unit:end_unit])
        for unit in manifest.units[first_unit:end_unit]:
            tensors |= store.load_unit(unit.index)
            done += unit.size_bytes
            if progress is not None:
                progress(done, total)
        order = range(program.operator_count)

        def cut(first: int, end: int) -> ProgramSlice:
            return ProgramSlice(program, tensors, order, places[first], places[end], device=self._device)

        self._cut = cut
        # Before and behind the cut ahead of the last unit, made when somebody wants to see what crosses it.
        self._parts: list[ProgramSlice] | None = None
        try:
            self._slice = cut(first_unit, end_unit)
        except ProgramError as error:
            raise ExecutionError(f"units [{first_unit}, {end_unit}) of {manifest.name}: {error}") from error
        self._program = program
        self._dimensions = {dimension.name for dimension in program.dimensions}
        if not self._dimensions <= {BATCH}:
            raise ExecutionError(f"the program of {manifest.name} has sizes other than {BATCH!r} that are not fixed")
        self._row_sizes = dict.fromkeys(self._dimensions, 1)
        try:
            program.check_sizes(self._row_sizes)
        except ProgramError as error:
            raise ExecutionError(f"the program of {manifest.name} does not run on one row: {error}") from error
        self._taken = self._shapes(self._slice.carried_in, manifest.row_width(first_unit))
        self._given = self._shapes(self._slice.carried_out, manifest.row_width(end_unit))
        # Whoever serves the stage has set aside what the manifest says.
        declared = sum(unit.peak_bytes for unit in manifest.units[first_unit:end_unit])
        if (peak := self._slice.peak_bytes(self._row_sizes)) > declared:
            raise ExecutionError(
                f"units [{first_unit}, {end_unit}) take {peak} bytes of activations for a row, the manifest says "
                f"{declared}; prepare the model again"
            )

    @property
    def manifest(self) -> ModelManifest:
        """The manifest of the model whose units run here."""
        return self._manifest

    @property
    def first_unit(self) -> int:
        """Index of the first unit of the stage."""
        return self._first_unit

    @property
    def end_unit(self) -> int:
        """Index after the last unit of the stage."""
        return self._end_unit

    @property
    def execution_class(self) -> str:
        """`torch-<device>/<dtype>/aten`."""
        return f"torch-{self._device.type}/{self._manifest.dtype}/aten"

    def new_session(self, max_tokens: int) -> StageSession:
        """A session for one row. Raises `ContextLimitError` for more."""
        if not 1 <= max_tokens <= self._manifest.context_limit:
            raise ContextLimitError(
                f"a session of {max_tokens} rows was asked for; this model takes 1 to {self._manifest.context_limit}"
            )
        return _RowSession()

    def forward(
        self,
        session: StageSession,
        inputs: Tensor,
        *,
        position: int,
        logit_rows: Sequence[int] | None = None,
        inside: InsideRows | None = None,
    ) -> Tensor:
        """Runs the stage on the session's row.

        `inputs`: float32 [1, manifest.row_width(first_unit)]; `position` is 0. Returns float32
        [1, manifest.row_width(end_unit)] on the CPU, or from the last unit the rows `logit_rows` (default the only
        one). `inside` gets the row before the last unit. Raises `ExecutionError` and `ContextLimitError`; the session
        is then as before.
        """
        if not isinstance(session, _RowSession):
            raise ExecutionError("the session belongs to another kind of executor; open one with new_session()")
        width = self._manifest.row_width(self._first_unit)
        if inputs.dtype != torch.float32 or inputs.ndim != 2 or inputs.shape[1] != width:
            raise ExecutionError(f"the stage takes float32 [1, {width}], got {inputs.dtype} {list(inputs.shape)}")
        if inputs.shape[0] < 1:
            raise ExecutionError("a step has at least one row")
        if position != session.position:
            raise ExecutionError(
                f"the step starts at position {position}, the session is at {session.position}; "
                "send the missing steps first, or truncate() to repeat one"
            )
        if position + inputs.shape[0] > 1:
            raise ContextLimitError(
                f"{inputs.shape[0]} rows from position {position}: a session of this model takes one row"
            )
        is_last = self._end_unit == len(self._manifest.units)
        if is_last and logit_rows is not None and any(row != 0 for row in logit_rows):
            raise ExecutionError(f"logit_rows {list(logit_rows)} are not all within the step's 1 rows")
        row = inputs[0].to(self._device)
        pieces = row.split([math.prod(shape) for shape in self._taken.values()])
        tensors = {name: piece.view(shape) for (name, shape), piece in zip(self._taken.items(), pieces, strict=True)}
        if inside is None:
            outputs = self._run(self._slice, tensors, self._row_sizes)
        else:
            if self._parts is None:
                cuts = sorted({self._first_unit, self._end_unit - 1, self._end_unit})
                self._parts = [self._cut(*bounds) for bounds in pairwise(cuts)]
            first, *others = self._parts
            outputs = self._run(first, tensors, self._row_sizes)
            inside(_joined(outputs, first.carried_out))
            for part in others:
                outputs = self._run(part, outputs, self._row_sizes)
        session.advance()
        joined = _joined(outputs, tuple(self._given))
        return joined if not is_last or logit_rows is None else joined[list(logit_rows)]

    def forward_batch(self, steps: Sequence[BatchStep]) -> list[Tensor | Exception]:
        """The steps one by one: a program may have been captured for one row only."""
        return forward_each(self, steps)

    def rehearsal(self, *, batch: int, rows: int, past: int) -> Callable[[], None]:
        """A closure that runs the stage once on a random batch of `batch` rows, for profiling. A model without a cache
        has sessions of one row: `rows` and `past` change nothing. A batch that the program was not captured for is run
        row by row. Raises `ExecutionError` for an empty one.
        """
        if batch < 1:
            raise ExecutionError(f"a rehearsal of {batch} rows is empty")
        sizes, repeats = dict.fromkeys(self._dimensions, batch), 1
        if not sizes or not all(item.minimum <= batch <= item.maximum for item in self._program.dimensions):
            sizes, repeats = self._row_sizes, batch
        generator = torch.Generator().manual_seed(0)
        values = self._program.values
        tensors = {
            name: torch.randn(values[name].sizes_at(sizes), generator=generator).to(self._device)
            for name in self._slice.carried_in
        }

        def run() -> None:
            for _ in range(repeats):
                self._run(self._slice, tensors, sizes)
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)

        return run

    def _run(self, part: ProgramSlice, tensors: Mapping[str, Tensor], sizes: Mapping[str, int]) -> dict[str, Tensor]:
        if torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        # TF32 keeps ten bits of the mantissa, and cuDNN may pick another algorithm in each run: neither is the declared
        # arithmetic.
        torch.backends.cuda.matmul.allow_tf32 = False
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            try:
                return part.run(tensors, sizes=sizes)
            except ProgramError as error:
                raise ExecutionError(f"units [{self._first_unit}, {self._end_unit}): {error}") from error

    def _shapes(self, names: Sequence[str], width: int) -> dict[str, tuple[int, ...]]:
        values = self._program.values
        if wrong := [name for name in names if values[name].dtype != "float32"]:
            raise ExecutionError(f"tensors {wrong} cross a cut and are not float32; the model was cut wrongly")
        shapes = {name: values[name].sizes_at(self._row_sizes) for name in names}
        found = sum(math.prod(shape) for shape in shapes.values())
        if found != width:
            raise ExecutionError(
                f"a row of {width} values crosses the cut by the manifest, {found} by the program; "
                "prepare the model again"
            )
        return shapes
