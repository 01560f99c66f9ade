"""The sketch's distances are metrics, and a sketch does not depend on how rows were grouped into steps."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bsns.protocol.sketch import (
    MAXIMUM_DISTANCE,
    SketchError,
    StageSketch,
    distance,
    fingerprint_distance,
)

sketch_values = st.binary(min_size=32, max_size=32)
fingerprints = st.binary(min_size=8, max_size=8)


@given(sketch_values, sketch_values, sketch_values)
def test_distance_is_a_metric(a: bytes, b: bytes, c: bytes) -> None:
    assert distance(a, a) == 0
    assert (distance(a, b) == 0) == (a == b)
    assert distance(a, b) == distance(b, a) <= MAXIMUM_DISTANCE
    assert distance(a, c) <= distance(a, b) + distance(b, c)


@given(fingerprints, fingerprints, fingerprints)
def test_fingerprint_distance_is_a_metric(a: bytes, b: bytes, c: bytes) -> None:
    assert (fingerprint_distance(a, b) == 0) == (a == b)
    assert fingerprint_distance(a, b) == fingerprint_distance(b, a) <= 4 * 32768
    assert fingerprint_distance(a, c) <= fingerprint_distance(a, b) + fingerprint_distance(b, c)


@given(sketch_values, sketch_values)
def test_distance_equals_the_contracts_loop(a: bytes, b: bytes) -> None:
    assert distance(a, b) == sum(min(abs(x - y), 256 - abs(x - y)) for x, y in zip(a, b, strict=True))


@settings(max_examples=60, deadline=None)
@given(
    width=st.integers(1, 80),
    cuts=st.lists(st.integers(1, 6), min_size=1, max_size=8),
    seed=st.binary(min_size=32, max_size=32),
    number=st.integers(0, 2**32),
    centred=st.booleans(),
)
def test_sketch_of_rows_is_independent_of_steps(
    width: int, cuts: list[int], seed: bytes, number: int, centred: bool
) -> None:
    rows = np.random.default_rng(number).normal(size=(sum(cuts), width)).astype(np.float32)
    whole = StageSketch(seed, width, 1e-6, centred=centred)
    whole.add(rows)
    stepped = StageSketch(seed, width, 1e-6, centred=centred)
    first = 0
    for cut in cuts:
        stepped.add(rows[first : first + cut])
        first += cut
    assert stepped.value() == whole.value()
    assert stepped.rows == whole.rows == sum(cuts)


@settings(deadline=None)
@given(st.sampled_from([np.nan, np.inf, -np.inf]), st.booleans())
def test_rows_not_finite_are_refused_and_change_nothing(bad: float, centred: bool) -> None:
    sketch = StageSketch(bytes(32), 4, 1e-3, centred=centred)
    sketch.add(np.ones((1, 4), dtype=np.float32))
    before = sketch.value()
    rows = np.array([[1, 2, 3, 4], [1, bad, 3, 4]], dtype=np.float32)
    with np.errstate(invalid="ignore"), pytest.raises(SketchError, match="NaN"):
        sketch.add(rows)
    assert sketch.value() == before
    assert sketch.rows == 1
