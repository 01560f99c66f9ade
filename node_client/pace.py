"""How fast this node's decode steps are, beside what it measured when it started (paper §1.6, trigger (c)).

Owns the comparison of steps with the times that plans were made from: a node that became slow, because its machine does
other work or throttles, says so, and one that is itself again, too. Promises a statement about the newest steps
only, and none from too few. `observe` is called in the compute thread, the rest from the event loop.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import Final

from bsns.protocol.identifiers import ModelId
from bsns.protocol.measurements import BATCHED_SESSIONS, UnitTiming
from bsns.runtime.executor import ShardExecutor

STEPS_MINIMUM: Final = 8
"""Steps below which nothing is said."""
STEPS_KEPT: Final = 64
AGE_SECONDS: Final = 120.0
"""A newest step that is older says nothing about now."""
_LEAST, _MOST = 1 / 64, 64.0


@dataclass(frozen=True, slots=True)
class _Expected:
    """Nanoseconds of a decode step of one session, and of `BATCHED_SESSIONS`."""

    alone: int
    together: int

    def of(self, sessions: int) -> float:
        return self.alone + (self.together - self.alone) * (sessions - 1) / (BATCHED_SESSIONS - 1)


class Pace:
    """Decode steps of every model. `clock` counts seconds and never runs backwards."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._timings: dict[ModelId, Mapping[str, UnitTiming]] = {}
        self._expected: dict[tuple[ModelId, int, int], _Expected] = {}
        self._steps: dict[ModelId, deque[tuple[float, float]]] = {}

    def measured(self, model: ModelId, timings: Iterable[UnitTiming]) -> None:
        """What this node measured: from now on steps are compared with it."""
        self._timings[model] = {item.unit_kind: item for item in timings}
        self._expected = {key: value for key, value in self._expected.items() if key[0] != model}
        self._steps[model] = deque(maxlen=STEPS_KEPT)

    def observe(self, model: ModelId, executor: ShardExecutor, sessions: int, seconds: float) -> None:
        """One decode step of `sessions` sessions, each with one row, took `seconds`."""
        timings = self._timings.get(model)
        if timings is None:
            return
        key = (model, executor.first_unit, executor.end_unit)
        if key not in self._expected:
            units = executor.manifest.units[executor.first_unit : executor.end_unit]
            if any(unit.timing_key not in timings for unit in units):
                return
            found = [timings[unit.timing_key] for unit in units]
            self._expected[key] = _Expected(
                sum(item.decode_nanoseconds for item in found), sum(item.batched_decode_nanoseconds for item in found)
            )
        ratio = seconds * 1e9 / self._expected[key].of(sessions)
        self._steps[model].append((self._clock(), min(max(ratio, _LEAST), _MOST)))

    def factor(self, model: ModelId) -> float:
        """Time of the newest steps over the time that was measured: their median; 1 where there are too few."""
        ratios = [ratio for _, ratio in list(self._steps.get(model, ()))]
        return median(ratios) if len(ratios) >= STEPS_MINIMUM else 1.0

    def is_old(self, model: ModelId) -> bool:
        """Whether the newest steps say nothing about now: who wants to know must measure again."""
        times = [at for at, _ in list(self._steps.get(model, ()))]
        return len(times) >= STEPS_MINIMUM and self._clock() - times[-1] > AGE_SECONDS


def scaled(timings: Iterable[UnitTiming], factor: float) -> tuple[UnitTiming, ...]:
    """Timings of a node whose steps take `factor` times as long."""

    def times(nanoseconds: int) -> int:
        return max(1, round(nanoseconds * factor))

    return tuple(
        replace(
            item,
            decode_nanoseconds=times(item.decode_nanoseconds),
            prefill_nanoseconds=times(item.prefill_nanoseconds),
            batched_decode_nanoseconds=times(item.batched_decode_nanoseconds),
            batched_prefill_nanoseconds=times(item.batched_prefill_nanoseconds),
        )
        for item in timings
    )
