"""What a request commits to: token ids or one row of values, as bytes."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bsns.protocol.commitments import token_bytes
from bsns.requester.request_input import RequestInput


@given(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=50))
def test_request_input_of_tokens_keeps_them_and_counts_a_row_each(tokens: list[int]) -> None:
    found = RequestInput.of_tokens(tokens)
    assert found.tokens == tuple(tokens)
    assert found.rows == len(tokens)
    assert found.width == 1
    assert found.digest == hashlib.sha256(token_bytes(tokens)).digest()


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=50))
def test_request_input_of_row_is_its_little_endian_bytes_in_one_row(values: list[float]) -> None:
    row = np.array([values], dtype=np.float32)
    found = RequestInput.of_row(row)
    assert found.tokens == ()
    assert found.rows == 1
    assert found.width == len(values)
    assert np.array_equal(np.frombuffer(found.data, "<f4"), row[0])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (np.zeros((2, 3), np.float32), r"\[2, 3\]"),
        (np.zeros(3, np.float32), r"\[3\]"),
        (np.zeros((1, 3)), "float64"),
        (np.zeros((1, 0), np.float32), "0 bytes"),
        (np.array([[1.0, np.nan]], np.float32), "NaN"),
        (np.array([[np.inf]], np.float32), "infinity"),
    ],
)
def test_request_input_of_something_else_than_a_finite_row_says_what_was_expected(row: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RequestInput.of_row(row)


@pytest.mark.parametrize(("encoding", "data"), [("float16", b"1234"), ("token-ids", b"123"), ("token-ids", b"")])
def test_request_input_of_bytes_that_are_no_input_is_refused(encoding: Any, data: bytes) -> None:
    with pytest.raises(ValueError, match="input"):
        RequestInput(encoding, data)
