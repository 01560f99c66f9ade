"""The activation codec: exact round trips, and rubbish refused with a reason."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bsns.runtime.activation_codec import ActivationError, TensorEncoding, decode, encode, encoded_size, encoding_of

FLOATS, IDS = TensorEncoding.RAW_FLOAT32, TensorEncoding.TOKEN_IDS


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 2**32))
def test_activations_round_trip_bit_for_bit(rows: int, width: int, seed: int) -> None:
    tensor = torch.from_numpy(np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32))
    data = encode(FLOATS, tensor)
    assert len(data) == encoded_size(FLOATS, (rows, width))
    assert torch.equal(decode(FLOATS, data, rows=rows, width=width), tensor)
    assert torch.equal(decode(FLOATS, memoryview(data), rows=rows, width=width), tensor)


def test_token_ids_round_trip_as_int32_little_endian() -> None:
    ids = torch.tensor([1, 258, 49151])
    data = encode(IDS, ids)
    assert data[:8].hex() == "0100000002010000"
    assert torch.equal(decode(IDS, data, rows=3, vocabulary_size=49152), ids)


@settings(deadline=None)
@given(st.binary(max_size=64), st.integers(-1, 6), st.integers(-1, 6), st.sampled_from(list(TensorEncoding)))
def test_any_bytes_give_a_valid_tensor_or_a_refusal(
    data: bytes, rows: int, width: int, encoding: TensorEncoding
) -> None:
    try:
        tensor = decode(encoding, data, rows=rows, width=width, vocabulary_size=100)
    except ActivationError:
        return
    assert tensor.shape[0] == rows
    if encoding is FLOATS:
        assert tensor.shape == (rows, width)
        assert torch.isfinite(tensor).all()
    else:
        assert 0 <= int(tensor.min()) <= int(tensor.max()) < 100


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_values_not_finite_are_refused(bad: float) -> None:
    data = np.array([[1.0, bad]], dtype="<f4").tobytes()
    with pytest.raises(ActivationError, match="NaN"):
        decode(FLOATS, data, rows=1, width=2)


@pytest.mark.parametrize("token", [-1, 100, 2**31 - 1])
def test_token_outside_vocabulary_is_refused(token: int) -> None:
    with pytest.raises(ActivationError, match="vocabulary"):
        decode(IDS, np.array([token], dtype="<i4").tobytes(), rows=1, vocabulary_size=100)


def test_huge_announced_shape_is_refused_without_allocation() -> None:
    with pytest.raises(ActivationError, match="4 bytes received"):
        decode(FLOATS, b"\0\0\0\0", rows=2**40, width=2**20)


def test_wrong_dtype_or_encoding_is_refused() -> None:
    with pytest.raises(ActivationError, match="float32"):
        encode(FLOATS, torch.zeros(2, 2, dtype=torch.float64))
    with pytest.raises(ActivationError, match="int64"):
        encode(IDS, torch.zeros(2))
    with pytest.raises(ActivationError, match="token ids"):
        encode(IDS, torch.tensor([-1]))
    with pytest.raises(ActivationError, match="unknown"):
        encoding_of(9)
