"""Profiles: what is timed, how it is counted, and that it ends in time."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

from bsns.runtime import profile as profile_module
from bsns.runtime.capture import capture
from bsns.runtime.exported_models import Preprocessing, write_exported
from bsns.runtime.profile import measure
from bsns.runtime.program import BATCH
from bsns.runtime.weight_store import WeightStore
from tests.unit.runtime_models import prepared_tiny_model, silent

DECODER = {"embedding": (0, 1), "block": (1, 5), "head": (7, 8)}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> WeightStore:
    return WeightStore(prepared_tiny_model(tmp_path_factory.mktemp("cache"), layers=6))


def test_profile_of_a_decoder_times_each_kind_alone_and_in_batches(store: WeightStore) -> None:
    profile = measure(store, time_limit=0.3)
    assert {timing.unit_kind for timing in profile.timings} == set(DECODER)
    assert (profile.manifest_hash, profile.execution_class, profile.threads) == (
        store.manifest.manifest_hash,
        "torch-cpu/float32/sdpa",
        1,
    )
    [block] = [timing for timing in profile.timings if timing.unit_kind == "block"]
    # A prompt's tokens share the overhead of their step, which for so small a model is all there is.
    assert block.prefill_nanoseconds < block.decode_nanoseconds
    assert block.batched_prefill_nanoseconds < block.batched_decode_nanoseconds


def test_profile_of_a_captured_model_times_every_unit_by_its_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = [layer for _ in range(3) for layer in (nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())]
    module = nn.Sequential(*layers, nn.Flatten(), nn.Linear(3 * 8 * 8, 5))
    captured = capture(module, (torch.randn(2, 3, 8, 8),), dynamic_shapes=({0: Dim(BATCH, min=1, max=64)},))
    preprocessing = Preprocessing(size=8, crop=1.0, mean=(0.0,) * 3, std=(1.0,) * 3)
    labels = [f"class {number}" for number in range(5)]
    manifest = write_exported(
        "tiny", captured, tmp_path, silent, task="image-classification", labels=labels, preprocessing=preprocessing
    )
    profile = measure(WeightStore(tmp_path), time_limit=0.2)
    assert [timing.unit_kind for timing in profile.timings] == [unit.timing_key for unit in manifest.units]
    assert len(manifest.units) > 1
    for timing in profile.timings:
        assert timing.prefill_nanoseconds == timing.decode_nanoseconds
        assert timing.batched_prefill_nanoseconds == timing.batched_decode_nanoseconds
        assert timing.batched_decode_nanoseconds > 0


def test_profile_without_time_runs_each_step_once(store: WeightStore) -> None:
    started = time.monotonic()
    assert len(measure(store, time_limit=0.0).timings) == 3
    assert time.monotonic() - started < 10


class Clockwork:
    """Executors whose steps take a known time on a clock of their own."""

    def __init__(self, nanoseconds: Callable[[int, int, int, int], int]) -> None:
        self.now, self.nanoseconds = 0, nanoseconds
        self.opened: list[tuple[int, int]] = []
        self.runs: list[tuple[int, int, int, int]] = []

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        clock = SimpleNamespace(perf_counter=lambda: self.now / 1e9, perf_counter_ns=lambda: self.now)
        monkeypatch.setattr(profile_module, "time", clock)
        monkeypatch.setattr(profile_module, "open_stage", self.open_stage)

    def open_stage(self, _store: Any, first: int, end: int, **_: Any) -> Any:
        self.opened.append((first, end))

        def rehearsal(*, batch: int, rows: int, past: int) -> Callable[[], None]:
            def run() -> None:
                self.runs.append((first, batch, rows, past))
                self.now += (end - first) * self.nanoseconds(first, batch, rows, past)

            return run

        return SimpleNamespace(execution_class="clockwork", rehearsal=rehearsal)


def manifest(kinds: list[str], context_limit: int) -> Any:
    units = [SimpleNamespace(index=index, timing_key=kind) for index, kind in enumerate(kinds)]
    return SimpleNamespace(manifest=SimpleNamespace(units=units, context_limit=context_limit, manifest_hash=bytes(32)))


def test_profile_counts_for_one_unit_and_one_token_of_each_session(monkeypatch: pytest.MonkeyPatch) -> None:
    # Each block takes 1,000 ns, 100 for each row, and 7 for each row before it.
    clockwork = Clockwork(lambda _, batch, rows, past: 1_000 + 100 * batch * rows + 7 * past)
    clockwork.install(monkeypatch)
    profile = measure(manifest(["embedding", *["block"] * 6, "head"], 2_048), time_limit=0.001)
    assert clockwork.opened == [(0, 1), (1, 5), (7, 8)]
    for timing in profile.timings:
        assert timing.decode_nanoseconds == 1_100 + 7 * 64
        assert timing.prefill_nanoseconds == round((1_000 + 6_400) / 64)
        assert timing.batched_decode_nanoseconds == 1_800 + 7 * 64
        assert timing.batched_prefill_nanoseconds == round((1_000 + 8 * 6_400) / 64)


@pytest.mark.parametrize(("context", "prompt", "past"), [(64, 63, 63), (2, 1, 1), (1, 1, 0)])
def test_profile_of_a_short_context_stays_within_it(
    context: int, prompt: int, past: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clockwork = Clockwork(lambda *_: 50)
    clockwork.install(monkeypatch)
    measure(manifest(["a"], context), time_limit=0.000_001)
    assert {run[1:] for run in clockwork.runs} == {(1, 1, past), (1, prompt, 0), (8, 1, past), (8, prompt, 0)}


def test_profile_of_an_exported_model_times_every_unit_within_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    clockwork = Clockwork(lambda first, batch, *_: 1_000 * (first + 1) * batch)
    clockwork.install(monkeypatch)
    count = 200
    profile = measure(manifest([f"unit-{number}" for number in range(count)], 1), time_limit=0.5)
    assert clockwork.opened == [(number, number + 1) for number in range(count)]
    for number, timing in enumerate(profile.timings):
        alone, batched = 1_000 * (number + 1), 8_000 * (number + 1)
        assert (timing.decode_nanoseconds, timing.prefill_nanoseconds) == (alone, alone)
        assert (timing.batched_decode_nanoseconds, timing.batched_prefill_nanoseconds) == (batched, batched)
    once = sum(9_000 * (number + 1) for number in range(count))
    assert clockwork.now <= 500_000_000 + once


def test_profile_throws_the_first_run_away_where_there_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    clockwork = Clockwork(lambda *_: 10 if clockwork.runs.count(clockwork.runs[-1]) > 1 else 9_999)
    clockwork.install(monkeypatch)
    [timing] = measure(manifest(["a"], 1), time_limit=2 * 10_005e-9).timings
    assert timing.decode_nanoseconds == 10
