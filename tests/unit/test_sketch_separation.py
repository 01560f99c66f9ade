"""The sketch on synthetic rows: noise of float32 stays near, anything larger lands far away."""

import numpy as np
import pytest

from bsns.protocol.sketch import TOLERANCES, SketchError, StageSketch, distance, fingerprint_distance
from bsns.runtime.weight_formats import ARITHMETICS

TOLERANCE = TOLERANCES["torch-cpu/float32/sdpa"]
WIDTH = 576


def rows(count: int, seed: int) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=(count, WIDTH)) * 6
    values[:, 17] = 383  # the one huge channel of real hidden states
    return values.astype(np.float32)


def perturbed(values: np.ndarray, relative: float, seed: int) -> np.ndarray:
    noise = np.random.default_rng(seed).normal(size=values.shape)
    scale = np.linalg.norm(values, axis=1, keepdims=True) / np.linalg.norm(noise, axis=1, keepdims=True)
    return (values + relative * scale * noise).astype(np.float32)


# What two honest executions of a class differ by in a row, as benchmarks/sketch_separation.py measured it.
HONEST_NOISE = {"float32": 3e-6, "bfloat16": 1e-2, "int8": 6e-6}


def test_every_arithmetic_that_can_be_declared_has_a_tolerance() -> None:
    assert {f"torch-cpu/{arithmetic}/sdpa" for arithmetic in ARITHMETICS} <= TOLERANCES.keys()


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("count", [1, 40])
@pytest.mark.parametrize("number", range(5))
def test_honest_noise_of_a_class_stays_within_its_radius(arithmetic: str, count: int, number: int) -> None:
    seed, honest, tolerance = bytes([number]) * 32, rows(count, number), TOLERANCES[f"torch-cpu/{arithmetic}/sdpa"]
    a, b = (StageSketch(seed, WIDTH, tolerance.unit) for _ in range(2))
    gap = fingerprint_distance(a.add(honest), b.add(perturbed(honest, HONEST_NOISE[arithmetic], number + 100)))
    assert gap <= tolerance.fingerprint_radius
    assert distance(a.value(), b.value()) <= tolerance.honest_radius


@pytest.mark.parametrize("arithmetic", ["float32", "int8"])
@pytest.mark.parametrize("relative", [2e-3, 2e-2, 0.3])
@pytest.mark.parametrize("number", range(5))
def test_cheat_lies_beyond_seven_radii(arithmetic: str, relative: float, number: int) -> None:
    seed, honest, tolerance = bytes([number]) * 32, rows(40, number), TOLERANCES[f"torch-cpu/{arithmetic}/sdpa"]
    a, b = (StageSketch(seed, WIDTH, tolerance.unit) for _ in range(2))
    gap = fingerprint_distance(a.add(honest), b.add(perturbed(honest, relative, number + 100)))
    assert gap > 7 * tolerance.fingerprint_radius
    assert distance(a.value(), b.value()) > 7 * tolerance.honest_radius


@pytest.mark.parametrize("number", range(5))
def test_declared_bfloat16_does_not_tell_eight_bits_apart_but_pays_no_four_bits(number: int) -> None:
    seed, honest, tolerance = bytes([number]) * 32, rows(40, number), TOLERANCES["torch-cpu/bfloat16/sdpa"]
    sketches = []
    for relative in (0.0, 2e-2, 0.2):
        sketches.append(StageSketch(seed, WIDTH, tolerance.unit))
        sketches[-1].add(perturbed(honest, relative, number + 100))
    exact, eight_bits, four_bits = (sketch.value() for sketch in sketches)
    assert distance(exact, eight_bits) <= tolerance.honest_radius
    assert distance(exact, four_bits) > tolerance.pay_within


def test_other_seed_gives_unrelated_sketch() -> None:
    values = []
    for number in range(2):
        sketch = StageSketch(bytes([number]) * 32, WIDTH, TOLERANCE.unit)
        sketch.add(rows(8, 0))
        values.append(sketch.value())
    assert 1000 < distance(*values) < 3100


def test_order_of_rows_matters() -> None:
    values, seed = rows(2, 3), bytes(32)
    a, b = (StageSketch(seed, WIDTH, TOLERANCE.unit) for _ in range(2))
    a.add(values)
    b.add(values[::-1])
    assert distance(a.value(), b.value()) > 7 * TOLERANCE.honest_radius


def test_centred_logits_ignore_a_common_shift() -> None:
    values = np.random.default_rng(5).normal(size=(3, 1000)).astype(np.float32)
    a, b = (StageSketch(bytes(32), 1000, TOLERANCE.unit, centred=True) for _ in range(2))
    a.add(values)
    b.add((values.astype(np.float64) + 2.5).astype(np.float32))
    assert distance(a.value(), b.value()) <= TOLERANCE.honest_radius


def test_sketch_value_is_pinned_across_machines() -> None:
    sketch = StageSketch(bytes(range(32)), 64, 1e-3)
    exact = (np.arange(3 * 64).reshape(3, 64) % 7 - 3).astype(np.float32)
    assert (sketch.add(exact).hex(), sketch.value().hex()) == PINNED


PINNED = ("4a7e306abc58daea", "c2646b5b6d910664fed9fa03c42cc6959d6b12a06737caf366406802f9a2fb3c")


def test_sketch_of_a_narrow_row_fills_its_coordinates_and_tells_a_change_apart() -> None:
    generator = np.random.default_rng(3)
    for width in (2, 3, 10, 64, 255):
        row = generator.standard_normal((1, width)).astype(np.float32)
        other = row * (1 + 0.01 * generator.standard_normal(row.shape)).astype(np.float32)
        near = row * (1 + 1e-7 * generator.standard_normal(row.shape)).astype(np.float32)
        for number in range(20):
            seed = number.to_bytes(32, "big")
            values = []
            for rows in (row, other, near):
                sketch = StageSketch(seed, width, 2e-6)
                sketch.add(rows)
                values.append(sketch.value())
            assert distance(values[0], values[1]) > 400, (width, number)
            assert distance(values[0], values[2]) < 64, (width, number)


def test_wrong_shapes_and_empty_sketch_are_refused() -> None:
    with pytest.raises(SketchError, match="32"):
        StageSketch(b"short", 4, 1.0)
    with pytest.raises(SketchError, match="positive"):
        StageSketch(bytes(32), 4, 0.0)
    sketch = StageSketch(bytes(32), 4, 1.0)
    with pytest.raises(SketchError, match="no rows"):
        sketch.value()
    for shape in ((4,), (1, 5), (0, 4)):
        with pytest.raises(SketchError, match="shape"):
            sketch.add(np.zeros(shape, dtype=np.float32))
    with pytest.raises(SketchError, match="expected 32"):
        distance(bytes(31), bytes(32))


def test_zero_row_is_counted_and_adds_nothing() -> None:
    sketch = StageSketch(bytes(32), 4, 1e-3)
    sketch.add(np.zeros((1, 4), dtype=np.float32))
    assert sketch.rows == 1
    assert sketch.value() == bytes(32)
