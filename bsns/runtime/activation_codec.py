"""Tensors as bytes and back, for what crosses the wire between stages.

Owns the encodings of `TensorEncoding` (proto/bsns/v1/common.proto; same numbers). Promises that decoding checks length,
shape and values against what the receiver expects before it allocates, and copies once. Does not split frames or
compress.
"""

import enum
import math
from collections.abc import Sequence
from typing import assert_never

import numpy as np
import torch
from torch import Tensor


class ActivationError(ValueError):
    """Bytes are not the tensor that was announced. The message says which rule they break; refuse the step and name its
    sender.
    """


class TensorEncoding(enum.IntEnum):
    """How a tensor lies in bytes: little-endian, row-major, no padding."""

    RAW_FLOAT32 = 1
    TOKEN_IDS = 2


def encoding_of(number: int) -> TensorEncoding:
    """The encoding of a wire number; `ActivationError` for an unknown one."""
    try:
        return TensorEncoding(number)
    except ValueError:
        raise ActivationError(
            f"encoding {number} is unknown; this release knows {[int(e) for e in TensorEncoding]}"
        ) from None


def encoded_size(encoding: TensorEncoding, shape: Sequence[int]) -> int:
    """Bytes of a tensor of `shape`; both encodings take four a value."""
    return 4 * math.prod(shape)


def encode(encoding: TensorEncoding, tensor: Tensor) -> bytes:
    """`tensor` as bytes: RAW_FLOAT32 takes float32 [rows, width], TOKEN_IDS takes int64 [rows] with values of an
    int32.
    """
    match encoding:
        case TensorEncoding.RAW_FLOAT32:
            if tensor.dtype != torch.float32 or tensor.ndim != 2:
                raise ActivationError(
                    f"RAW_FLOAT32 takes float32 [rows, width], got {tensor.dtype} {list(tensor.shape)}"
                )
            return bytes(tensor.detach().cpu().numpy().astype("<f4", copy=False).tobytes())
        case TensorEncoding.TOKEN_IDS:
            if tensor.dtype != torch.int64 or tensor.ndim != 1:
                raise ActivationError(f"TOKEN_IDS takes int64 [rows], got {tensor.dtype} {list(tensor.shape)}")
            ids = tensor.detach().cpu().numpy()
            if ids.size and (ids.min() < 0 or ids.max() > 2**31 - 1):
                raise ActivationError("token ids must lie in 0 to 2**31-1")
            return bytes(ids.astype("<i4").tobytes())
        case _:
            assert_never(encoding)


def decode(
    encoding: TensorEncoding,
    data: bytes | bytearray | memoryview,
    *,
    rows: int,
    width: int | None = None,
    vocabulary_size: int | None = None,
) -> Tensor:
    """The tensor in `data`: float32 [rows, width] or int64 [rows].

    RAW_FLOAT32 needs `width` and refuses NaN and infinity; TOKEN_IDS needs `vocabulary_size` and refuses ids outside
    it. `rows` is the number the receiver expects, at least 1. Raises `ActivationError`.
    """
    if rows < 1:
        raise ActivationError(f"{rows} rows announced; a step has at least one")
    match encoding:
        case TensorEncoding.RAW_FLOAT32:
            if width is None or width < 1:
                raise ActivationError("RAW_FLOAT32 needs the width that the stage expects")
            _check_length(data, encoded_size(encoding, (rows, width)), f"float32 [{rows}, {width}]")
            values = np.frombuffer(data, dtype="<f4")
            if not np.isfinite(values).all():
                raise ActivationError("activations hold NaN or infinity")
            return torch.from_numpy(values.astype(np.float32, copy=True).reshape(rows, width))
        case TensorEncoding.TOKEN_IDS:
            if vocabulary_size is None or vocabulary_size < 1:
                raise ActivationError("TOKEN_IDS needs the vocabulary size of the model")
            _check_length(data, encoded_size(encoding, (rows,)), f"int32 [{rows}]")
            ids = np.frombuffer(data, dtype="<i4")
            if ids.min() < 0 or ids.max() >= vocabulary_size:
                raise ActivationError(f"a token id lies outside the vocabulary of {vocabulary_size}")
            return torch.from_numpy(ids.astype(np.int64))
        case _:
            assert_never(encoding)


def _check_length(data: bytes | bytearray | memoryview, expected: int, what: str) -> None:
    actual = data.nbytes if isinstance(data, memoryview) else len(data)
    if actual != expected:
        raise ActivationError(f"{actual} bytes received, {what} takes {expected}")
