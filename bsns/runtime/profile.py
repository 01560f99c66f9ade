"""Measured time of one unit of each kind on this machine: the numbers a node reports and a planner plans with.

Owns the measurement. Promises to end within about `time_limit` seconds after the weights are loaded and to report
medians of real executions of the executor's own units, with a warm cache. Does not extrapolate to other kinds, machines
or contexts.
"""

import statistics
import time
from dataclasses import dataclass
from typing import Final

import torch

from bsns.protocol.manifest import UnitKind
from bsns.runtime.executor import ExecutionError, StageExecutor
from bsns.runtime.weight_store import WeightStore

PREFILL_TOKENS: Final = 64
_MAXIMUM_SAMPLES: Final = 15


@dataclass(frozen=True, slots=True)
class UnitTiming:
    """Seconds for one unit of `kind`: one decode step of one token, and one prefill step of `PREFILL_TOKENS` tokens
    (whole step).
    """

    kind: UnitKind
    decode_seconds: float
    prefill_seconds: float
    samples: int


@dataclass(frozen=True, slots=True)
class RuntimeProfile:
    """What one machine measured about one model in one execution class."""

    manifest_hash: bytes
    execution_class: str
    threads: int
    timings: tuple[UnitTiming, ...]

    def timing(self, kind: UnitKind) -> UnitTiming:
        """The timing of `kind`; `ExecutionError` where it was not measured."""
        for timing in self.timings:
            if timing.kind == kind:
                return timing
        raise ExecutionError(f"no unit of kind {kind!r} was measured; profile a range that holds one")


def measure(
    store: WeightStore, *, threads: int = 1, device: str = "cpu", block_sample: int = 4, time_limit: float = 1.5
) -> RuntimeProfile:
    """Times each unit kind of the model. `block_sample` blocks run together, so that their weights leave the cache
    between two uses.

    Seconds, medians; the first run of each is thrown away. Takes about `time_limit` seconds, plus loading.
    """
    units = store.manifest.units
    first_block = 1
    blocks = max(1, min(block_sample, len(units) - 2))
    ranges: list[tuple[UnitKind, int, int]] = [("embedding", 0, 1), ("head", len(units) - 1, len(units))]
    if len(units) > 2:
        ranges.insert(1, ("block", first_block, first_block + blocks))
    timings = []
    execution_class = ""
    for kind, first, end in ranges:
        executor = StageExecutor(store, first, end, threads=threads, device=device)
        execution_class = executor.execution_class
        # Blocks are most of a model: they get most of the time.
        share = time_limit * (0.7 if kind == "block" else 0.15)
        decode, prefill = _time_stage(executor, share)
        count = end - first
        timings.append(
            UnitTiming(kind, statistics.median(decode) / count, statistics.median(prefill) / count, len(decode))
        )
    return RuntimeProfile(store.manifest.manifest_hash, execution_class, threads, tuple(timings))


def _time_stage(executor: StageExecutor, seconds: float) -> tuple[list[float], list[float]]:
    manifest = executor.manifest
    generator = torch.Generator().manual_seed(0)
    prefill_tokens = min(PREFILL_TOKENS, manifest.context_limit - 1)
    if executor.has_embedding:
        rows = torch.randint(0, manifest.vocabulary_size, (prefill_tokens,), generator=generator)
    else:
        rows = torch.randn(prefill_tokens, manifest.hidden_size, generator=generator)
    session = executor.new_session(prefill_tokens + 1)
    deadline = time.perf_counter() + seconds
    decode: list[float] = []
    prefill: list[float] = []
    for sample in range(_MAXIMUM_SAMPLES + 1):
        session.truncate(0)
        started = time.perf_counter()
        executor.forward(session, rows, position=0)
        between = time.perf_counter()
        executor.forward(session, rows[:1], position=prefill_tokens)
        ended = time.perf_counter()
        if sample > 0:
            prefill.append(between - started)
            decode.append(ended - between)
            if ended > deadline:
                break
    return decode, prefill
