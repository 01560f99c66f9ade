"""Measured time of one unit of each kind on this machine: the numbers a node reports and a planner plans with.

Owns the measurement. Promises medians of real executions of the executor's own units, with a warm cache where there is
time for a second run, and to end within `time_limit` seconds and one run of each step, beside the loading of weights;
one stage is loaded at a time, so that a model larger than the memory can be measured. Does not extrapolate to other
kinds, machines or contexts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from bsns.protocol.manifest import ModelManifest
from bsns.protocol.measurements import BATCHED_SESSIONS, PREFILL_TOKENS, UnitTiming
from bsns.runtime.executor import open_stage
from bsns.runtime.weight_store import WeightStore

_MAXIMUM_SAMPLES: Final = 16
# Equal units that run one after the other, so that the weights of each leave the cache between two uses.
_UNIT_SAMPLE: Final = 4


@dataclass(frozen=True, slots=True)
class RuntimeProfile:
    """What one machine measured about one model in one execution class; a timing for each timing key of its units."""

    manifest_hash: bytes
    execution_class: str
    threads: int
    timings: tuple[UnitTiming, ...]


def measure(
    store: WeightStore,
    *,
    threads: int = 1,
    device: str = "cpu",
    arithmetic: str = "float32",
    time_limit: float = 1.5,
) -> RuntimeProfile:
    """Times a unit of each timing key of the model, as `UnitTiming` defines it; what is left of `time_limit` seconds is
    shared equally among what is still to be timed.

    Raises ExecutionError for a model that cannot run here, WeightStoreError for weights that are not the model's.
    """
    manifest = store.manifest
    prompt = max(1, min(PREFILL_TOKENS, manifest.context_limit - 1))
    past = min(prompt, manifest.context_limit - 1)
    # (sessions, new rows, rows before): of a model without a context a prompt is one row, and timed once.
    steps = ((1, 1, past), (1, prompt, 0), (BATCHED_SESSIONS, 1, past), (BATCHED_SESSIONS, prompt, 0))
    distinct = tuple(dict.fromkeys(steps))
    ranges = _unit_ranges(manifest)
    waiting = len(ranges) * len(distinct)
    seconds_left = time_limit
    timings, execution_class = [], ""
    for key, (first, end) in ranges.items():
        executor = open_stage(store, first, end, threads=threads, device=device, arithmetic=arithmetic)
        execution_class = executor.execution_class
        taken: dict[tuple[int, int, int], float] = {}
        for step in distinct:
            sessions, rows, before = step
            run = executor.rehearsal(batch=sessions, rows=rows, past=before)
            started = time.perf_counter()
            taken[step] = _median_nanoseconds(run, seconds_left / waiting) / (end - first) / rows
            seconds_left -= time.perf_counter() - started
            waiting -= 1
        decode, prefill, batched_decode, batched_prefill = (max(1, round(taken[step])) for step in steps)
        timings.append(UnitTiming(key, decode, prefill, batched_decode, batched_prefill))
    return RuntimeProfile(manifest.manifest_hash, execution_class, threads, tuple(timings))


def _unit_ranges(manifest: ModelManifest) -> dict[str, tuple[int, int]]:
    """For each timing key the first run of units that have it, cut off at `_UNIT_SAMPLE`: [first, end)."""
    ranges: dict[str, tuple[int, int]] = {}
    for unit in manifest.units:
        first, end = ranges.get(unit.timing_key, (unit.index, unit.index))
        if end == unit.index and end - first < _UNIT_SAMPLE:
            ranges[unit.timing_key] = first, end + 1
    return ranges


def _median_nanoseconds(run: Callable[[], None], seconds: float) -> float:
    """Median over runs within about `seconds`; at least one. The first of several is thrown away."""
    deadline = time.perf_counter() + seconds
    samples: list[int] = []
    while not samples or (len(samples) <= _MAXIMUM_SAMPLES and time.perf_counter() < deadline):
        started = time.perf_counter_ns()
        run()
        samples.append(time.perf_counter_ns() - started)
    return statistics.median(samples[1:] or samples)
