"""The node's models, and what one step of a stage is.

Owns finding models in the cache folder by their id on chain, executors built from them under a memory budget in the
arithmetic that is asked for, and the way of a step from the bytes received to the bytes handed on. Promises that torch
never runs on the event loop (`node_client.compute_thread` says in which order it runs) and that bytes which are not the
tensor expected are refused before anything is computed from them. Loading and hashing of weights has a thread of its
own. Does not know sessions' rules, peers or the chain.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
import torch

from bsns.protocol.commitments import step_digest, token_bytes
from bsns.protocol.identifiers import ModelId, model_id
from bsns.protocol.manifest import EXPORTED, ManifestError, ModelManifest
from bsns.protocol.plan import execution_class_id
from bsns.protocol.sampling import SamplingError
from bsns.protocol.sketch import TOLERANCES, SketchError, SketchTolerance, StageSketch
from bsns.runtime import activation_codec
from bsns.runtime.activation_codec import ActivationError, TensorEncoding, encoded_size, takes_blockwise
from bsns.runtime.executor import (
    ExecutionError,
    ShardExecutor,
    StageSession,
    StepInput,
    iterate_reexecution,
    open_stage,
)
from bsns.runtime.profile import RuntimeProfile, measure
from bsns.runtime.weight_formats import ARITHMETICS
from bsns.runtime.weight_store import WeightStore, WeightStoreError
from node_client.compute_thread import ComputeThread
from node_client.errors import ErrorReason, Refusal
from node_client.pace import Pace
from node_client.prompt_lookup import Drawn

Rows = npt.NDArray[np.float32]
Progress = Callable[[int, int], None]

_ExecutorKey = tuple[ModelId, int, int, str]
_DEFAULT_TOLERANCE: Final = TOLERANCES["torch-cpu/float32/sdpa"]


class ExecutorFactory(Protocol):
    """Builds the executor of a unit range; the default is `bsns.runtime.executor.open_stage`."""

    def __call__(
        self,
        store: WeightStore,
        first_unit: int,
        end_unit: int,
        *,
        threads: int,
        device: str,
        arithmetic: str,
        progress: Progress | None,
    ) -> ShardExecutor: ...


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What one step of one stage produced: the exact bytes for the successor, which take them as `rows` rows from
    `position` on, with their digest; and the rows that are sketched.

    `payload` is [rows, width of the cut] in `encoding`, or for the last stage the drawn token (class) and its drafts as
    int32; `sketched` is float32 [rows, width of the cut] before it was encoded, or the logits: of each row, but of the
    prompt's last one only.
    """

    payload: bytes
    encoding: TensorEncoding
    position: int
    rows: int
    digest: bytes
    sketched: Rows
    drawn: Drawn | None


class ShardRuntime:
    """Models, executors and the compute thread of one node. `arithmetic` is that of the stages it serves; a committee's
    work is done in the arithmetic of the stage that is judged.
    """

    def __init__(
        self,
        cache: Path,
        *,
        threads: int,
        weight_memory_bytes: int,
        device: str = "cpu",
        arithmetic: str = "float32",
        maximum_batch: int = 64,
        executor_factory: ExecutorFactory = open_stage,
    ) -> None:
        self.pace = Pace(time.monotonic)
        self.compute = ComputeThread(maximum_batch, observe=self._observe)
        self._cache, self._threads, self._budget = cache, threads, weight_memory_bytes
        self._device, self._arithmetic = device, arithmetic
        self._factory = executor_factory
        self._loader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="bsns-weights")
        self._stores: dict[ModelId, WeightStore] = {}
        self._executors: OrderedDict[_ExecutorKey, ShardExecutor] = OrderedDict()
        self._models: dict[int, ModelId] = {}
        self._in_use: dict[int, int] = {}
        self._loading = asyncio.Lock()

    def close(self) -> None:
        self.compute.stop()
        self._loader.shutdown(wait=False, cancel_futures=True)

    def _observe(self, executor: ShardExecutor, sessions: int, seconds: float) -> None:
        model = self._models.get(id(executor))
        if model is not None:
            self.pace.observe(model, executor, sessions, seconds)

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
        self,
        model: ModelId,
        first_unit: int,
        end_unit: int,
        *,
        execution_class: bytes | None = None,
        progress: Progress | None = None,
    ) -> ShardExecutor:
        """The executor of a unit range, built and checked at the first call. Release it with `release`.

        `execution_class` is the id of the class that it must run in; None: the node's own. Refusal for a range the
        model does not have, a class that this node cannot run, weights that do not match the chain, or a full memory
        budget.
        """
        async with self._loading:
            store = self.store(model)
            if not 0 <= first_unit < end_unit <= len(store.manifest.units):
                raise Refusal(
                    ErrorReason.ERROR_REASON_WRONG_PLAN,
                    f"units [{first_unit}, {end_unit}) are not a range of a model of {len(store.manifest.units)} units",
                )
            arithmetic = self._own_arithmetic(store.manifest)
            if execution_class is not None:
                arithmetic = self._arithmetic_of(execution_class, store.manifest)
            key = (model, first_unit, end_unit, arithmetic)
            if key not in self._executors:
                self._make_room(weight_bytes(store.manifest, first_unit, end_unit))
                loop = asyncio.get_running_loop()
                try:
                    self._executors[key] = await loop.run_in_executor(
                        self._loader,
                        lambda: self._factory(
                            store,
                            first_unit,
                            end_unit,
                            threads=self._threads,
                            device=self._device,
                            arithmetic=arithmetic,
                            progress=progress,
                        ),
                    )
                except (WeightStoreError, ExecutionError) as error:
                    raise Refusal(ErrorReason.ERROR_REASON_WEIGHTS_UNAVAILABLE, str(error)) from error
                self._models[id(self._executors[key])] = model
                # The libraries and the model stay: to look through them for garbage would stop a step for 0.1 s.
                gc.freeze()
            self._executors.move_to_end(key)
            executor = self._executors[key]
            self._in_use[id(executor)] = self._in_use.get(id(executor), 0) + 1
            return executor

    def release(self, executor: ShardExecutor) -> None:
        """The caller of `executor` is done with it; it stays in memory until its room is needed."""
        key = id(executor)
        self._in_use[key] -= 1
        if not self._in_use[key]:
            del self._in_use[key]

    def _own_arithmetic(self, manifest: ModelManifest) -> str:
        # A captured program has one arithmetic, whatever the node's decoders run in.
        return "float32" if manifest.architecture == EXPORTED else self._arithmetic

    def _arithmetic_of(self, execution_class: bytes, manifest: ModelManifest) -> str:
        """The arithmetic of a class that this node can run for the model."""
        kernel = "aten" if manifest.architecture == EXPORTED else "sdpa"
        device = self._device.partition(":")[0]  # a class says what kind of device computes, not which
        for arithmetic in ARITHMETICS:
            if execution_class_id(f"torch-{device}/{arithmetic}/{kernel}") == execution_class:
                return arithmetic
        raise Refusal(
            ErrorReason.ERROR_REASON_WEIGHTS_UNAVAILABLE,
            f"execution class 0x{execution_class.hex()} is none of torch-{device}/{ARITHMETICS}/{kernel}, which "
            "this node can run",
        )

    async def measure(self, model: ModelId, seconds: float) -> RuntimeProfile:
        """Times each unit kind of a model; between sessions, never during a step. Steps are compared with it from now
        on (`pace`).
        """
        store = self.store(model)
        arithmetic = self._own_arithmetic(store.manifest)
        profile = await self.compute.run(
            lambda: measure(
                store, threads=self._threads, device=self._device, arithmetic=arithmetic, time_limit=seconds
            )
        )
        self.pace.measured(model, profile.timings)
        return profile

    async def step(
        self,
        executor: ShardExecutor,
        session: StageSession,
        data: bytes,
        *,
        rows: int,
        position: int,
        take: Callable[[Rows], Drawn],
        output_encoding: TensorEncoding = TensorEncoding.RAW_FLOAT32,
        write: Callable[[StepOutput], None] = lambda _: None,
        deliver: Callable[[StepOutput], None] | None = None,
    ) -> StepOutput:
        """One step of a live session, which first forgets every row from `position` on. Refusal for bytes that are not
        the tensor expected; the session then holds `position` rows at the most.

        A stage with the head draws: `take` gets the logits. `output_encoding` is how another hands its rows on. `write`
        gets the output in the compute thread as soon as it is there, then `deliver` on the event loop before anything
        else happens.
        """
        head = holds_head(executor)

        def prepare() -> torch.Tensor:
            tensor: torch.Tensor = decode_input(executor, data, rows)
            if session.position > position:
                session.truncate(position)
            return tensor

        def finish(outputs: list[torch.Tensor]) -> StepOutput:
            output = outputs[-1] if head or len(outputs) == 1 else torch.cat(outputs)
            result = step_output(
                executor,
                output.numpy(force=True).astype(np.float32, copy=False),
                rows=rows,
                position=position,
                take=take,
                encoding=output_encoding,
            )
            write(result)
            return result

        try:
            return await self.compute.step(
                executor,
                session,
                position=position,
                rows=rows,
                prepare=prepare,
                finish=finish,
                deliver=deliver,
                logit_rows=range(rows) if head and position else None,
            )
        except ActivationError as error:
            raise Refusal(ErrorReason.ERROR_REASON_MALFORMED_TENSOR, str(error)) from error
        except (ExecutionError, SamplingError) as error:
            raise Refusal(ErrorReason.ERROR_REASON_INTERNAL, str(error)) from error

    async def reexecute(
        self,
        executor: ShardExecutor,
        inputs: Iterable[tuple[bytes, int, int]],
        chunk_rows: int,
        take: Callable[[Rows], None],
        session: StageSession | None = None,
        inside: Callable[[Rows], None] | None = None,
    ) -> None:
        """Teacher-forced pass over (bytes, position, rows) of each step in order; `take` gets what was sketched of each
        step's output (`StepOutput`) in the compute thread, `inside` before it the rows that the last unit took. An
        empty `session` that is given goes on behind it.

        Refusal if the bytes are not what the stage takes, or of `take`. Runs in pieces of `chunk_rows` rows between
        other work.
        """

        def begin() -> Iterator[Any]:
            steps = [
                StepInput(position, decode_input(executor, data, rows), rows if position else 1)
                for data, position, rows in inputs
            ]
            within = None if inside is None else (lambda rows: inside(_array(rows)))
            return iterate_reexecution(executor, steps, chunk_rows=chunk_rows, session=session, inside=within)

        def advance(outputs: Iterator[Any]) -> bool:
            output = next(outputs, None)
            if output is None:
                return False
            take(_array(output))
            return True

        try:
            outputs = await self.compute.run(begin)
            while await self.compute.run(lambda: advance(outputs)):
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
            idle = next((key for key, held in self._executors.items() if id(held) not in self._in_use), None)
            if idle is None:
                raise Refusal(
                    ErrorReason.ERROR_REASON_CAPACITY_EXHAUSTED,
                    "all weight memory is in use; try again when sessions end",
                )
            del self._executors[idle]

    def _held(self) -> int:
        return sum(executor.memory_bytes for executor in self._executors.values())


def identity(manifest: ModelManifest) -> ModelId:
    """The model's id on chain."""
    return model_id(manifest.manifest_hash, manifest.weight_root, len(manifest.units))


def weight_bytes(manifest: ModelManifest, first_unit: int, end_unit: int) -> int:
    """Bytes of the weight files of a unit range."""
    return sum(unit.size_bytes for unit in manifest.units[first_unit:end_unit])


def holds_head(executor: ShardExecutor) -> bool:
    """Whether the stage's outputs are logits."""
    return executor.end_unit == len(executor.manifest.units)


def input_encodings(manifest: ModelManifest, first_unit: int) -> tuple[TensorEncoding, ...]:
    """How the input of a request (unit 0) or of a later stage may travel. A request's is what its commitment is over:
    token ids where the model takes them, else float32 rows. Between stages the sender chooses.
    """
    if first_unit == 0:
        return (TensorEncoding.TOKEN_IDS if manifest.takes_token_ids else TensorEncoding.RAW_FLOAT32,)
    between = (TensorEncoding.RAW_FLOAT32, TensorEncoding.FLOAT16)
    compressed = (TensorEncoding.BLOCKWISE_INT8,) if takes_blockwise(manifest.row_width(first_unit)) else ()
    return between + compressed


def input_bytes(manifest: ModelManifest, first_unit: int, rows: int, encoding: TensorEncoding | None = None) -> int:
    """Bytes of a stage's input of `rows` rows; None: in the longest encoding."""
    chosen = input_encodings(manifest, first_unit)[0] if encoding is None else encoding
    return encoded_size(chosen, (rows, manifest.row_width(first_unit)))


def encoding_of_input(manifest: ModelManifest, first_unit: int, rows: int, size: int) -> TensorEncoding:
    """The encoding in which the input of `rows` rows takes `size` bytes; ActivationError if there is none. No two take
    the same, so that a stage cannot show the bytes of its input as another encoding than it received.
    """
    sizes = _sizes(input_encodings(manifest, first_unit), rows, manifest.row_width(first_unit))
    try:
        return sizes[size]
    except KeyError:
        raise ActivationError(f"{size} bytes received, {rows} rows take {' or '.join(map(str, sizes))}") from None


@lru_cache(maxsize=1024)
def _sizes(encodings: tuple[TensorEncoding, ...], rows: int, width: int) -> Mapping[int, TensorEncoding]:
    """The encodings by the bytes that rows of `width` values take in them."""
    return {encoded_size(item, (rows, width)): item for item in encodings}


def decode_input(executor: ShardExecutor, data: bytes, rows: int) -> Any:
    """The tensor a stage takes; ActivationError if `data` is not one."""
    manifest, first_unit = executor.manifest, executor.first_unit
    return activation_codec.decode(
        encoding_of_input(manifest, first_unit, rows, len(data)),
        data,
        rows=rows,
        width=manifest.row_width(first_unit),
        vocabulary_size=manifest.vocabulary_size,
    )


def step_output(
    executor: ShardExecutor,
    sketched: Rows,
    *,
    rows: int,
    position: int,
    take: Callable[[Rows], Drawn],
    encoding: TensorEncoding,
) -> StepOutput:
    """What a stage hands on after a step of `rows` rows from `position` on that gave `sketched`. A stage with the head
    draws with `take`, another encodes its rows. Refusal for rows that are no numbers.
    """
    if not np.isfinite(sketched).all():
        raise Refusal(
            ErrorReason.ERROR_REASON_MALFORMED_TENSOR,
            "the step gives NaN or infinity: the activations received are not those of the model",
        )
    drawn = None
    if holds_head(executor):
        drawn, encoding = take(sketched), TensorEncoding.TOKEN_IDS
        position += len(drawn.tokens) if position else rows
        rows = 1 + len(drawn.drafts)
        payload = token_bytes((drawn.tokens[-1], *drawn.drafts))
    elif encoding is TensorEncoding.RAW_FLOAT32:
        payload = sketched.astype("<f4", copy=False).tobytes()
    else:
        payload = activation_codec.encode(encoding, torch.from_numpy(sketched))
    return StepOutput(payload, encoding, position, rows, step_digest(payload, position, rows), sketched, drawn)


def tolerance_of(executor: ShardExecutor) -> SketchTolerance:
    """What honest executions in the executor's class may differ by; a class that was not measured is judged as the
    strictest.
    """
    return TOLERANCES.get(executor.execution_class, _DEFAULT_TOLERANCE)


def inner_sketch(seed: bytes, executor: ShardExecutor, width: int) -> StageSketch:
    """The sketch of rows of `width` values inside a stage, in the unit of its execution class."""
    return StageSketch(seed, width, tolerance_of(executor).unit)


def _array(rows: Any) -> Rows:
    return rows.detach().cpu().numpy().astype(np.float32, copy=False)  # type: ignore[no-any-return]


def new_sketch(seed: bytes, executor: ShardExecutor) -> StageSketch:
    """The sketch of a stage's outputs, in the unit of its execution class."""
    unit = tolerance_of(executor).unit
    return StageSketch(seed, executor.manifest.row_width(executor.end_unit), unit, centred=holds_head(executor))
