"""The sketch on synthetic rows: noise of float32 stays near, anything larger lands far away."""

import numpy as np
import pytest

from bsns.protocol.sketch import TOLERANCES, SketchError, StageSketch, distance, fingerprint_distance

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


@pytest.mark.parametrize("count", [1, 40])
@pytest.mark.parametrize("number", range(5))
def test_float_noise_stays_within_the_radius(count: int, number: int) -> None:
    seed, honest = bytes([number]) * 32, rows(count, number)
    a, b = (StageSketch(seed, WIDTH, TOLERANCE.unit) for _ in range(2))
    gap = fingerprint_distance(a.add(honest), b.add(perturbed(honest, 3e-6, number + 100)))
    assert gap <= TOLERANCE.fingerprint_radius
    assert distance(a.value(), b.value()) <= TOLERANCE.honest_radius


@pytest.mark.parametrize("relative", [2e-3, 2e-2, 0.3])
@pytest.mark.parametrize("number", range(5))
def test_cheat_lies_beyond_seven_radii(relative: float, number: int) -> None:
    seed, honest = bytes([number]) * 32, rows(40, number)
    a, b = (StageSketch(seed, WIDTH, TOLERANCE.unit) for _ in range(2))
    gap = fingerprint_distance(a.add(honest), b.add(perturbed(honest, relative, number + 100)))
    assert gap > 7 * TOLERANCE.fingerprint_radius
    assert distance(a.value(), b.value()) > 7 * TOLERANCE.honest_radius


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


PINNED = ("1d080235e4c9091d", "f0c9fc9004659ff6a0342acc63d1cffccf6c00cf59356b5ff16ca0cdf9d8336b")


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
