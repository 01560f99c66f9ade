"""The node's models and its one compute thread.

Owns finding models in the cache folder by their id on chain, executors built from them under a memory budget, and the
thread in which every forward pass runs. Promises that torch never runs on the event loop; that of the jobs waiting,
decode steps run before prompts and prompts before re-execution, so that committee work delays a live session by one
piece at most; and that a failing job fails only its caller. Loading and hashing of weights has a thread of its own.
Does not know sessions, peers or the chain.
"""

from __future__ import annotations

import asyncio
import enum
import itertools
import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from bsns.protocol.commitments import content_digest, token_bytes
from bsns.protocol.identifiers import ModelId, model_id
from bsns.protocol.manifest import VALUE_BYTES, ManifestError, ModelManifest
from bsns.protocol.sampling import SamplingError, SamplingParameters, draw
from bsns.protocol.sketch import TOLERANCES, SketchError, StageSketch
from bsns.runtime import activation_codec
from bsns.runtime.activation_codec import ActivationError, TensorEncoding
from bsns.runtime.executor import (
    ExecutionError,
    ShardExecutor,
    StageSession,
    StepInput,
    iterate_reexecution,
    open_stage,
)
from bsns.runtime.profile import RuntimeProfile, measure
from bsns.runtime.weight_store import WeightStore, WeightStoreError
from node_client.errors import ErrorReason, Refusal

Result = TypeVar("Result")
Rows = npt.NDArray[np.float32]
Progress = Callable[[int, int], None]

# Jobs waiting for the compute thread; each live session has at most one.
_MAXIMUM_JOBS: Final = 4096
_DEFAULT_TOLERANCE: Final = TOLERANCES["torch-cpu/float32/sdpa"]


class Priority(enum.IntEnum):
    """Lower runs first."""

    DECODE = 0
    PREFILL = 1
    REEXECUTION = 2


class ExecutorFactory(Protocol):
    """Builds the executor of a unit range; the default is `bsns.runtime.executor.open_stage`."""

    def __call__(
        self, store: WeightStore, first_unit: int, end_unit: int, *, threads: int, progress: Progress | None
    ) -> ShardExecutor: ...


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one step of one stage produced: the exact bytes for the successor with their digest, and the rows that are
    sketched.

    `payload` is float32 [rows, width of the cut], or for the last stage the drawn token (class) as int32; `sketched` is
    float32 [rows, width of the cut] or the logits [1, vocabulary].
    """

    payload: bytes
    digest: bytes
    sketched: Rows
    token: int | None


class ComputeThread:
    """One thread, jobs by priority then arrival."""

    def __init__(self) -> None:
        self._jobs: queue.PriorityQueue[tuple[int, int, Callable[[], None] | None]] = queue.PriorityQueue(_MAXIMUM_JOBS)
        self._order = itertools.count()
        # Daemon: a forward pass cannot be interrupted, and must not keep a process alive that was told to stop.
        self._thread = threading.Thread(target=self._work, name="bsns-compute", daemon=True)
        self._thread.start()

    async def run(self, priority: Priority, function: Callable[[], Result]) -> Result:
        """Result of `function()` in the compute thread. Refusal where too many jobs wait."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()

        def deliver(result: Result | None, error: BaseException | None) -> None:
            if future.cancelled():
                return
            if error is not None:
                future.set_exception(error)
            else:
                future.set_result(result)  # type: ignore[arg-type]

        def job() -> None:
            if future.cancelled():
                return
            try:
                outcome: tuple[Result | None, BaseException | None] = (function(), None)
            except BaseException as error:  # handed to the caller whole
                outcome = (None, error)
            if not loop.is_closed():
                loop.call_soon_threadsafe(deliver, *outcome)

        try:
            self._jobs.put_nowait((int(priority), next(self._order), job))
        except queue.Full:
            raise Refusal(
                ErrorReason.ERROR_REASON_CAPACITY_EXHAUSTED, "too much work is waiting; try another node"
            ) from None
        return await future

    def stop(self) -> None:
        """Ends the thread after the jobs that wait."""
        self._jobs.put((len(Priority), next(self._order), None))

    def _work(self) -> None:
        while True:
            job = self._jobs.get()[2]
            if job is None:
                return
            job()


class ShardRuntime:
    """Models, executors and the compute thread of one node."""

    def __init__(
        self,
        cache: Path,
        *,
        threads: int,
        weight_memory_bytes: int,
        executor_factory: ExecutorFactory = open_stage,
    ) -> None:
        self.compute = ComputeThread()
        self._cache, self._threads, self._budget = cache, threads, weight_memory_bytes
        self._factory = executor_factory
        self._loader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="bsns-weights")
        self._stores: dict[ModelId, WeightStore] = {}
        self._executors: OrderedDict[tuple[ModelId, int, int], ShardExecutor] = OrderedDict()
        self._in_use: dict[tuple[ModelId, int, int], int] = {}
        self._loading = asyncio.Lock()

    def close(self) -> None:
        self.compute.stop()
        self._loader.shutdown(wait=False, cancel_futures=True)

    def models(self) -> dict[ModelId, WeightStore]:
        """Every model of the cache folder by its id; folders that are not models are left out."""
        for manifest in sorted(self._cache.glob("models/*/*/manifest.json")):
            if any(store.folder == manifest.parent for store in self._stores.values()):
                continue
            try:
                store = WeightStore(manifest.parent)
            except (WeightStoreError, ManifestError):
                continue  # one damaged folder must not hide the others; asking for its model says what is missing
            self._stores.setdefault(identity(store.manifest), store)
        return dict(self._stores)

    def store(self, model: ModelId) -> WeightStore:
        """The weights of a model; Refusal if they are not here."""
        found = self._stores.get(model) or self.models().get(model)
        if found is None:
            raise Refusal(
                ErrorReason.ERROR_REASON_WEIGHTS_UNAVAILABLE,
                f"model 0x{model.hex()} is not in the node's cache; its operator runs `python -m bsns.runtime.prepare`",
            )
        return found

    async def executor(
        self, model: ModelId, first_unit: int, end_unit: int, progress: Progress | None = None
    ) -> ShardExecutor:
        """The executor of a unit range, built and checked at the first call. Release it with `release`.

        Refusal for a range the model does not have, weights that do not match the chain, or a full memory budget.
        """
        key = (model, first_unit, end_unit)
        async with self._loading:
            store = self.store(model)
            if not 0 <= first_unit < end_unit <= len(store.manifest.units):
                raise Refusal(
                    ErrorReason.ERROR_REASON_WRONG_PLAN,
                    f"units [{first_unit}, {end_unit}) are not a range of a model of {len(store.manifest.units)} units",
                )
            if key not in self._executors:
                self._make_room(weight_bytes(store.manifest, first_unit, end_unit))
                loop = asyncio.get_running_loop()
                try:
                    self._executors[key] = await loop.run_in_executor(
                        self._loader,
                        lambda: self._factory(store, first_unit, end_unit, threads=self._threads, progress=progress),
                    )
                except (WeightStoreError, ExecutionError) as error:
                    raise Refusal(ErrorReason.ERROR_REASON_WEIGHTS_UNAVAILABLE, str(error)) from error
            self._executors.move_to_end(key)
            self._in_use[key] = self._in_use.get(key, 0) + 1
            return self._executors[key]

    def release(self, model: ModelId, first_unit: int, end_unit: int) -> None:
        """The caller of `executor` is done with it; it stays in memory until its room is needed."""
        key = (model, first_unit, end_unit)
        self._in_use[key] -= 1
        if not self._in_use[key]:
            del self._in_use[key]

    async def measure(self, model: ModelId, seconds: float) -> RuntimeProfile:
        """Times each unit kind of a model; between sessions, never during a step."""
        store = self.store(model)
        return await self.compute.run(
            Priority.REEXECUTION, lambda: measure(store, threads=self._threads, time_limit=seconds)
        )

    async def step(
        self,
        executor: ShardExecutor,
        session: StageSession,
        data: bytes,
        *,
        rows: int,
        position: int,
        step: int,
        sampling: SamplingParameters,
    ) -> StepOutput:
        """One step of a live session. Refusal for bytes that are not the tensor expected; the session is then as
        before.
        """

        def run() -> StepOutput:
            inputs = decode_input(executor, data, rows)
            output = executor.forward(session, inputs, position=position)
            sketched: Rows = output.detach().cpu().numpy().astype(np.float32, copy=False)
            if not np.isfinite(sketched).all():
                session.truncate(position)
                raise Refusal(
                    ErrorReason.ERROR_REASON_MALFORMED_TENSOR,
                    "the step gives NaN or infinity: the activations received are not those of the model",
                )
            if holds_head(executor):
                token = draw(sketched[-1], sampling, step)
                payload = token_bytes([token])
            else:
                token, payload = None, activation_codec.encode(TensorEncoding.RAW_FLOAT32, output)
            # Here and not on the event loop: one row of a vision model takes up to a few megabytes.
            return StepOutput(payload, content_digest(payload), sketched, token)

        try:
            return await self.compute.run(Priority.PREFILL if step == 0 else Priority.DECODE, run)
        except ActivationError as error:
            raise Refusal(ErrorReason.ERROR_REASON_MALFORMED_TENSOR, str(error)) from error
        except (ExecutionError, SamplingError) as error:
            raise Refusal(ErrorReason.ERROR_REASON_INTERNAL, str(error)) from error

    async def reexecute(
        self,
        executor: ShardExecutor,
        inputs: Iterable[tuple[bytes, int]],
        chunk_rows: int,
        take: Callable[[Rows], None],
    ) -> None:
        """Teacher-forced pass over (bytes, rows) of each step in order; `take` gets each step's output rows in the
        compute thread.

        Refusal if the bytes are not what the stage takes. Runs in pieces of `chunk_rows` rows between other work.
        """

        def begin() -> Iterator[Any]:
            steps, position = [], 0
            for data, rows in inputs:
                steps.append(StepInput(position, decode_input(executor, data, rows)))
                position += rows
            return iterate_reexecution(executor, steps, chunk_rows=chunk_rows)

        def advance(outputs: Iterator[Any]) -> bool:
            output = next(outputs, None)
            if output is None:
                return False
            take(output.detach().cpu().numpy().astype(np.float32, copy=False))
            return True

        try:
            outputs = await self.compute.run(Priority.REEXECUTION, begin)
            while await self.compute.run(Priority.REEXECUTION, lambda: advance(outputs)):
                pass
        except (ActivationError, ExecutionError, SketchError) as error:
            raise Refusal(ErrorReason.ERROR_REASON_MALFORMED_TENSOR, str(error)) from error

    def _make_room(self, needed: int) -> None:
        if needed > self._budget:
            raise Refusal(
                ErrorReason.ERROR_REASON_CAPACITY_EXHAUSTED,
                f"the units take {needed} bytes, weight_memory_bytes is {self._budget}",
            )
        while needed > self._budget - self._held():
            idle = next((key for key in self._executors if key not in self._in_use), None)
            if idle is None:
                raise Refusal(
                    ErrorReason.ERROR_REASON_CAPACITY_EXHAUSTED,
                    "all weight memory is in use; try again when sessions end",
                )
            del self._executors[idle]

    def _held(self) -> int:
        return sum(weight_bytes(self._stores[model].manifest, first, end) for model, first, end in self._executors)


def identity(manifest: ModelManifest) -> ModelId:
    """The model's id on chain."""
    return model_id(manifest.manifest_hash, manifest.weight_root, len(manifest.units))


def weight_bytes(manifest: ModelManifest, first_unit: int, end_unit: int) -> int:
    """Bytes of the weight files of a unit range."""
    return sum(unit.size_bytes for unit in manifest.units[first_unit:end_unit])


def holds_head(executor: ShardExecutor) -> bool:
    """Whether the stage's outputs are logits."""
    return executor.end_unit == len(executor.manifest.units)


def input_encoding(manifest: ModelManifest, first_unit: int) -> TensorEncoding:
    """How the input of a request (unit 0) or of a later stage travels: token ids where the model takes them, else
    float32 rows.
    """
    takes_tokens = first_unit == 0 and manifest.takes_token_ids
    return TensorEncoding.TOKEN_IDS if takes_tokens else TensorEncoding.RAW_FLOAT32


def input_bytes(manifest: ModelManifest, first_unit: int, rows: int) -> int:
    """Bytes of a stage's input of `rows` rows."""
    return VALUE_BYTES * rows * manifest.row_width(first_unit)


def decode_input(executor: ShardExecutor, data: bytes, rows: int) -> Any:
    """The tensor a stage takes; ActivationError if `data` is not one."""
    manifest, first_unit = executor.manifest, executor.first_unit
    return activation_codec.decode(
        input_encoding(manifest, first_unit),
        data,
        rows=rows,
        width=manifest.row_width(first_unit),
        vocabulary_size=manifest.vocabulary_size,
    )


def new_sketch(seed: bytes, executor: ShardExecutor) -> StageSketch:
    """The sketch of a stage's outputs, in the unit of its execution class."""
    unit = TOLERANCES.get(executor.execution_class, _DEFAULT_TOLERANCE).unit
    return StageSketch(seed, executor.manifest.row_width(executor.end_unit), unit, centred=holds_head(executor))
