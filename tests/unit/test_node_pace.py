"""Steps beside what was measured: when they say something, what they say, and when that is old."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from bsns.protocol.identifiers import ModelId
from bsns.protocol.measurements import UnitTiming
from bsns.runtime.executor import ShardExecutor
from node_client.pace import AGE_SECONDS, STEPS_MINIMUM, Pace, scaled

MODEL = ModelId(bytes([1]) * 32)
TIMINGS = (UnitTiming("block", 1_000_000, 1, 4_500_000, 1), UnitTiming("head", 2_000_000, 1, 9_000_000, 1))


def stage(*kinds: str) -> ShardExecutor:
    manifest = SimpleNamespace(units=[SimpleNamespace(timing_key=kind) for kind in kinds])
    return cast(ShardExecutor, SimpleNamespace(manifest=manifest, first_unit=0, end_unit=len(kinds)))


class Watched:
    def __init__(self) -> None:
        self.now = 0.0
        self.pace = Pace(lambda: self.now)
        self.pace.measured(MODEL, TIMINGS)
        self.stage = stage("block", "block", "head")

    def steps(self, count: int, sessions: int, seconds: float, executor: Any = None) -> None:
        for _ in range(count):
            self.pace.observe(MODEL, executor or self.stage, sessions, seconds)


def test_too_few_steps_say_nothing() -> None:
    watched = Watched()
    watched.steps(STEPS_MINIMUM - 1, 1, 1.0)
    assert watched.pace.factor(MODEL) == 1.0
    assert Pace(lambda: 0.0).factor(MODEL) == 1.0


@pytest.mark.parametrize(("sessions", "expected"), [(1, 0.004), (8, 0.018), (4, 0.010), (15, 0.032)])
def test_factor_is_the_median_step_over_the_time_of_its_batch(sessions: int, expected: float) -> None:
    watched = Watched()
    watched.steps(9, sessions, 4 * expected)
    watched.steps(1, sessions, 3.0)  # a pause of the machine
    assert watched.pace.factor(MODEL) == pytest.approx(4)


def test_newest_steps_count() -> None:
    watched = Watched()
    watched.steps(64, 1, 0.016)
    watched.steps(64, 1, 0.004)
    assert watched.pace.factor(MODEL) == pytest.approx(1)


def test_steps_without_measurements_or_of_kinds_that_were_not_measured_are_left_out() -> None:
    watched = Watched()
    watched.steps(9, 1, 1.0, stage("block", "something else"))
    assert watched.pace.factor(MODEL) == 1.0
    Pace(lambda: 0.0).observe(MODEL, watched.stage, 1, 1.0)


def test_measuring_again_forgets_the_steps_before() -> None:
    watched = Watched()
    watched.steps(20, 1, 0.016)
    watched.now = AGE_SECONDS + 1
    assert watched.pace.is_old(MODEL)
    watched.pace.measured(MODEL, scaled(TIMINGS, 4))
    assert (watched.pace.factor(MODEL), watched.pace.is_old(MODEL)) == (1.0, False)
    watched.steps(20, 1, 0.016)
    assert watched.pace.factor(MODEL) == pytest.approx(1)


def test_scaled_timings_stay_positive_integers() -> None:
    assert scaled(TIMINGS, 2.5)[0] == UnitTiming("block", 2_500_000, 2, 11_250_000, 2)
    assert scaled(TIMINGS, 1e-9)[0] == UnitTiming("block", 1, 1, 1, 1)
