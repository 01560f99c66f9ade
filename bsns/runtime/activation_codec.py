"""Tensors as bytes and back, for what crosses the wire between stages, and the choice of encoding for a link.

Owns the encodings of `TensorEncoding` (proto/bsns/v1/common.proto; same numbers) and the dynamic 8-bit codebook.
Promises that decoding checks length, shape and values against what the receiver expects before it allocates, and copies
once; that a row's bytes depend on no other row; that decoded values have the same bits on every machine; and that two
encodings of the same activations never have the same length, so that bytes cannot be read as another encoding. Does not
split frames, measure links, or keep a session to one encoding.
"""

import enum
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, Final, assert_never

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Floats = npt.NDArray[np.float32]
Record = npt.NDArray[Any]

# BLOCKWISE_INT8: paper section 1.11, row 11 of section 4. Blocks of 64, because a decode step is one row.
BLOCK_CHANNELS: Final = 64
OUTLIERS_PER_ROW: Final = 16
# Narrower rows would not be shorter than in FLOAT16; wider ones have channels beyond a uint16.
LEAST_BLOCKWISE_WIDTH: Final = 128
LARGEST_BLOCKWISE_WIDTH: Final = 65_535

# Compressed magnitudes lie below 2**127 and blocks below 2**-100 travel as zero: then no decoded value overflows, even
# rounded up, and none is subnormal in float32, which some machines flush to zero.
_LIMIT: Final = np.float32(2.0**127)
_LEAST_SCALE: Final = np.float32(2.0**-100)
_LEAST_EXPONENT: Final = -100
_LARGEST_EXPONENT: Final = 112
# A row is shifted so that its largest magnitude lies in [2**14, 2**15]: small values then keep most bits in a float16.
_HALF_BITS: Final = 15
_LARGEST_HALF_BITS: Final = int(np.float16(2.0**_HALF_BITS).view(np.uint16))


class ActivationError(ValueError):
    """Bytes are not the tensor that was announced, or a tensor cannot be sent. The message says which rule it breaks;
    refuse the step and name its sender.
    """


class TensorEncoding(enum.IntEnum):
    """How a tensor lies in bytes: little-endian, row-major, no padding.

    Activations float32 [rows, width]: RAW_FLOAT32 as they are; FLOAT16 and BLOCKWISE_INT8 as one record a row, of which
    `encode` gives the fields. TOKEN_IDS: int32 [rows].
    """

    RAW_FLOAT32 = 1
    TOKEN_IDS = 2
    FLOAT16 = 3
    BLOCKWISE_INT8 = 4


# What encoding and decoding cost together on one core (docs/compression.md): seconds a step, seconds a value.
_CODEC_SECONDS: Final = {
    TensorEncoding.FLOAT16: (35e-6, 2e-9),
    TensorEncoding.BLOCKWISE_INT8: (80e-6, 10e-9),
}
# Rounding to the nearest code is never farther from a row with noise than the code of the row without, so the noise
# counts twice at the most; a tie for the last of the outliers can cost 1.4 times the row's own rounding besides.
_ROUNDING_SPREAD: Final = 2.0
# The time saved on the link must be twice the codec's, so that a slower machine than the one measured loses nothing.
_LEAST_GAIN: Final = 2.0


def encoded_size(encoding: TensorEncoding, shape: Sequence[int]) -> int:
    """Bytes of a tensor of `shape`: [rows, width], of TOKEN_IDS [rows].

    Of [rows, width], BLOCKWISE_INT8 < FLOAT16 < RAW_FLOAT32. Raises `ActivationError` for a width that the encoding
    does not take.
    """
    match encoding:
        case TensorEncoding.RAW_FLOAT32 | TensorEncoding.TOKEN_IDS:
            return 4 * math.prod(shape)
        case TensorEncoding.FLOAT16 | TensorEncoding.BLOCKWISE_INT8:
            rows, width = shape
            return rows * _row_bytes(encoding, width)
        case _:
            assert_never(encoding)


def encoding_for_link(bytes_per_second: float | None, rows: int, width: int) -> TensorEncoding:
    """The encoding that hands activations [rows, width] on soonest over a link of that bandwidth, by the codec's
    measured cost: float32 on fast links, FLOAT16 on middling ones, BLOCKWISE_INT8 on slow ones.

    None is an unmeasured link, or one within the machine: float32, which loses nothing.
    """
    chosen, spent = TensorEncoding.RAW_FLOAT32, 0.0
    if bytes_per_second is None:
        return chosen
    for encoding, (per_step, per_value) in _CODEC_SECONDS.items():
        if encoding is TensorEncoding.BLOCKWISE_INT8 and not takes_blockwise(width):
            continue
        cost = per_step + per_value * rows * width
        saved = encoded_size(chosen, (rows, width)) - encoded_size(encoding, (rows, width))
        if saved > _LEAST_GAIN * (cost - spent) * bytes_per_second:
            chosen, spent = encoding, cost
    return chosen


def takes_blockwise(width: int) -> bool:
    """Whether rows of `width` values can travel as BLOCKWISE_INT8."""
    return LEAST_BLOCKWISE_WIDTH <= width <= LARGEST_BLOCKWISE_WIDTH


def encode(encoding: TensorEncoding, tensor: Tensor) -> bytes:
    """`tensor` as bytes: float32 [rows, width], for TOKEN_IDS int64 [rows] with values of an int32.

    A row of FLOAT16 is an int8 exponent e and width float16: value = half * 2**e. A row of BLOCKWISE_INT8 is an int8
    exponent e, a float32 scale for each block of 64 channels, the 16 channels of largest magnitude as ascending uint16,
    their values as float16, and a byte for each channel: value = codebook[byte] * scale, and half * 2**e in the 16.
    Relative error: FLOAT16 2**-12 of a value on average; BLOCKWISE_INT8 about 0.8 % of a Gaussian row.

    Raises `ActivationError` for another dtype or shape, and in the compressed encodings for NaN, infinity, magnitudes
    of 2**127 and more, and widths that they do not take.
    """
    match encoding:
        case TensorEncoding.RAW_FLOAT32:
            return bytes(_rows_of(tensor, encoding).astype("<f4", copy=False).tobytes())
        case TensorEncoding.TOKEN_IDS:
            if tensor.dtype != torch.int64 or tensor.ndim != 1:
                raise ActivationError(f"TOKEN_IDS takes int64 [rows], got {tensor.dtype} {list(tensor.shape)}")
            ids = tensor.detach().cpu().numpy()
            if ids.size and (ids.min() < 0 or ids.max() > 2**31 - 1):
                raise ActivationError("token ids must lie in 0 to 2**31-1")
            return bytes(ids.astype("<i4").tobytes())
        case TensorEncoding.FLOAT16:
            values = _rows_of(tensor, encoding)
            records = np.empty(len(values), _row_layout(encoding, values.shape[1]))
            largest = np.maximum(values.max(axis=1), -values.min(axis=1))
            exponents = records["exponent"] = _exponents(largest)
            records["halves"] = _halves(values, exponents)
            return bytes(records.tobytes())
        case TensorEncoding.BLOCKWISE_INT8:
            values = _rows_of(tensor, encoding)
            records = np.empty(len(values), _row_layout(encoding, values.shape[1]))
            _quantise(values, records)
            return bytes(records.tobytes())
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

    Activations need `width` and are finite; TOKEN_IDS needs `vocabulary_size` and refuses ids outside it. `rows` is the
    number the receiver expects, at least 1. Raises `ActivationError`.
    """
    if rows < 1:
        raise ActivationError(f"{rows} rows announced; a step has at least one")
    if encoding is TensorEncoding.TOKEN_IDS:
        if vocabulary_size is None or vocabulary_size < 1:
            raise ActivationError("TOKEN_IDS needs the vocabulary size of the model")
        _check_length(data, encoded_size(encoding, (rows,)), f"int32 [{rows}]")
        ids = np.frombuffer(data, dtype="<i4")
        if ids.min() < 0 or ids.max() >= vocabulary_size:
            raise ActivationError(f"a token id lies outside the vocabulary of {vocabulary_size}")
        return torch.from_numpy(ids.astype(np.int64))
    if width is None or width < 1:
        raise ActivationError(f"{encoding.name} needs the width that the stage expects")
    _check_length(data, encoded_size(encoding, (rows, width)), f"{encoding.name} [{rows}, {width}]")
    match encoding:
        case TensorEncoding.RAW_FLOAT32:
            values = np.frombuffer(data, dtype="<f4")
            if not np.isfinite(values).all():
                raise ActivationError("activations hold NaN or infinity")
            return torch.from_numpy(values.astype(np.float32, copy=True).reshape(rows, width))
        case TensorEncoding.FLOAT16:
            records = np.frombuffer(data, _row_layout(encoding, width))
            _check_halves(records)
            return torch.from_numpy(_from_halves(records))
        case TensorEncoding.BLOCKWISE_INT8:
            records = np.frombuffer(data, _row_layout(encoding, width))
            _check_halves(records)
            return torch.from_numpy(_dequantise(records, width))
        case _:
            assert_never(encoding)


def dynamic_map() -> Floats:
    """The signed dynamic codebook: 256 float32 in ascending order from -0.99296874 to 1.

    Paper section 1.11: for i = 0 to 6 the means of 2**i equal cells of [0.1, 1], times 10**(i - 6), with both signs,
    and 0 and 1. Bit for bit bitsandbytes' `create_dynamic_map(signed=True)`; the order of the roundings is that of its
    `torch.linspace`, written out so that no machine's library can change a bit.
    """
    start = float(np.float32(0.1))
    means = [np.array([0.0, 1.0], np.float32)]
    for i in range(7):
        cells = 2**i
        edge = np.arange(cells + 1)
        step = float(np.float32((1.0 - start) / cells))
        upward, downward = start + step * edge, 1.0 - step * (cells - edge)
        edges = np.where(edge < (cells + 1) // 2, upward, downward).astype(np.float32)
        positive = (edges[:-1] + edges[1:]) / np.float32(2) * np.float32(f"1e{i - 6}")
        means += [positive, -positive]
    return np.sort(np.concatenate(means))


def _nearest_codes(codebook: Floats) -> npt.NDArray[np.uint8]:
    """The code nearest to each float16, indexed by its bits; the lower one halfway."""
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float64)
    exact = codebook.astype(np.float64)
    return np.searchsorted((exact[:-1] + exact[1:]) / 2, halves).astype(np.uint8)


_CODEBOOK: Final = dynamic_map()
# A table instead of a search: looking a value up by its rounding to float16 moves the decision by 2**-12 of the value
# where cells are 2**-6 wide, which does not change the error in the third digit.
_CODE_OF_HALF: Final = _nearest_codes(_CODEBOOK)


def can_be_handed_on(encoding: TensorEncoding, data: bytes, tensor: Tensor, relative: float) -> bool:
    """Whether `data` can come from a sender whose rows differ from `tensor` float32 [rows, width] by float noise, at
    most the share `relative` of a row's norm: never false for one. What it lets pass differs by little more than the
    rounding of `encoding`. Raises `ActivationError` for a tensor that cannot be sent.
    """
    try:
        received = decode(encoding, data, rows=tensor.shape[0], width=tensor.shape[1])
    except ActivationError:
        return False
    rounded = decode(encoding, encode(encoding, tensor), rows=tensor.shape[0], width=tensor.shape[1])
    # In float64: squares of what a row may hold leave the range of float32.
    exact = tensor.double()
    allowed = 2 * relative * exact.norm(dim=1) + _ROUNDING_SPREAD * (rounded.double() - exact).norm(dim=1)
    return bool(((received.double() - exact).norm(dim=1) <= allowed).all())


@functools.lru_cache(maxsize=256)
def _row_layout(encoding: TensorEncoding, width: int) -> np.dtype[Any]:
    """The record of one row, of a width that `encoded_size` has accepted; see `encode` for the fields."""
    if encoding is TensorEncoding.FLOAT16:
        return np.dtype([("exponent", "i1"), ("halves", "<f2", (width,))])
    return np.dtype(
        [
            ("exponent", "i1"),
            ("scales", "<f4", (-(-width // BLOCK_CHANNELS),)),
            ("channels", "<u2", (OUTLIERS_PER_ROW,)),
            ("halves", "<f2", (OUTLIERS_PER_ROW,)),
            ("codes", "u1", (width,)),
        ]
    )


def _row_bytes(encoding: TensorEncoding, width: int) -> int:
    """Bytes of a record, without building its layout: a stranger may have announced the width."""
    if encoding is TensorEncoding.FLOAT16:
        return 1 + 2 * width
    if not takes_blockwise(width):
        raise ActivationError(
            f"BLOCKWISE_INT8 takes widths of {LEAST_BLOCKWISE_WIDTH} to {LARGEST_BLOCKWISE_WIDTH}, not {width}"
        )
    return 1 + 4 * -(-width // BLOCK_CHANNELS) + 4 * OUTLIERS_PER_ROW + width


def _rows_of(tensor: Tensor, encoding: TensorEncoding) -> Floats:
    """The activations as an array; `ActivationError` for another dtype, or a shape that the encoding does not take."""
    if tensor.dtype != torch.float32 or tensor.ndim != 2:
        raise ActivationError(f"{encoding.name} takes float32 [rows, width], got {tensor.dtype} {list(tensor.shape)}")
    if encoding is not TensorEncoding.RAW_FLOAT32 and tensor.shape[1] < 1:
        raise ActivationError(f"{encoding.name} takes rows of at least one value")
    encoded_size(encoding, tensor.shape)  # refuses a width that the encoding does not take
    return tensor.detach().cpu().contiguous().numpy()


def _exponents(largest: Floats) -> npt.NDArray[np.int32]:
    """The exponent of each row, from its largest magnitude [rows]."""
    if not (largest < _LIMIT).all():
        raise ActivationError("activations hold NaN, infinity, or magnitudes of 2**127 and more")
    exponents: npt.NDArray[np.int32] = np.maximum(np.frexp(largest)[1] - _HALF_BITS, _LEAST_EXPONENT)
    return exponents


def _halves(values: Floats, exponents: npt.NDArray[np.int32]) -> npt.NDArray[np.float16]:
    return _rounded(values * np.ldexp(np.float32(1), -exponents)[:, None])


def _rounded(values: Floats) -> npt.NDArray[np.float16]:
    # torch converts with the processor's instruction, ten times as fast as numpy; both round to even.
    halves: npt.NDArray[np.float16] = torch.from_numpy(values).to(torch.float16).numpy()
    return halves


def _check_halves(records: Record) -> None:
    exponents = records["exponent"]
    if exponents.min() < _LEAST_EXPONENT or exponents.max() > _LARGEST_EXPONENT:
        raise ActivationError(f"a row's exponent lies outside {_LEAST_EXPONENT} to {_LARGEST_EXPONENT}")
    # On the bits, which order magnitudes and put infinity and NaN above them: comparing float16 is slow on a processor.
    if (records["halves"].view(np.uint16) & 0x7FFF).max() > _LARGEST_HALF_BITS:
        raise ActivationError("activations hold NaN, infinity, or a float16 beyond 2**15")


def _from_halves(records: Record) -> Floats:
    values: Floats = torch.from_numpy(records["halves"].copy()).to(torch.float32).numpy()
    values *= np.ldexp(np.float32(1), records["exponent"].astype(np.int32))[:, None]
    return values


def _by_block(values: Floats, scales: Floats) -> Iterator[tuple[Floats, Floats]]:
    """Views of `values` [rows, width] with the scales that fit: whole blocks [rows, blocks, 64], then the short one."""
    rows, width = values.shape
    whole = width // BLOCK_CHANNELS
    yield values[:, : whole * BLOCK_CHANNELS].reshape(rows, whole, BLOCK_CHANNELS), scales[:, :whole, None]
    if width % BLOCK_CHANNELS:
        yield values[:, whole * BLOCK_CHANNELS :], scales[:, whole:]


def _quantise(values: Floats, records: Record) -> None:
    """Fills the rows' BLOCKWISE_INT8 records."""
    rows, width = values.shape
    magnitudes = np.abs(values)
    # Before anything is compared: NaN has no order.
    exponents = records["exponent"] = _exponents(magnitudes.max(axis=1))
    chosen = np.flatnonzero(_largest(magnitudes))
    records["channels"] = chosen.reshape(rows, OUTLIERS_PER_ROW) % width
    records["halves"] = _halves(values.reshape(-1)[chosen].reshape(rows, OUTLIERS_PER_ROW), exponents)
    magnitudes.reshape(-1)[chosen] = 0
    scales = np.maximum.reduceat(magnitudes, np.arange(0, width, BLOCK_CHANNELS), axis=1)
    scales[scales < _LEAST_SCALE] = 0
    records["scales"] = scales
    normalised = values.copy()
    normalised.reshape(-1)[chosen] = 0
    for block, scale in _by_block(normalised, np.where(scales == 0, np.float32(1), scales)):
        block /= scale
    records["codes"] = _CODE_OF_HALF.take(_rounded(normalised).view(np.uint16))


def _largest(magnitudes: Floats) -> npt.NDArray[np.bool_]:
    """Where the OUTLIERS_PER_ROW largest magnitudes of each row lie; of equal ones the lowest channels."""
    place = magnitudes.shape[1] - OUTLIERS_PER_ROW
    least = np.partition(magnitudes, place, axis=1)[:, place, None]
    chosen: npt.NDArray[np.bool_] = magnitudes >= least
    if np.count_nonzero(chosen) > OUTLIERS_PER_ROW * len(magnitudes):
        above = magnitudes > least
        room = OUTLIERS_PER_ROW - np.count_nonzero(above, axis=1, keepdims=True)
        equal = chosen & ~above
        chosen = above | (equal & (np.cumsum(equal, axis=1) <= room))
    return chosen


def _dequantise(records: Record, width: int) -> Floats:
    """Values of BLOCKWISE_INT8 records whose halves are checked; checks the rest."""
    scales, channels = records["scales"], records["channels"]
    # Written so that NaN is refused too.
    if not ((scales == 0) | ((scales >= _LEAST_SCALE) & (scales < _LIMIT))).all():
        raise ActivationError("a block's scale is neither zero nor between 2**-100 and 2**127")
    if channels[:, -1].max() >= width or not (channels[:, :-1] < channels[:, 1:]).all():
        raise ActivationError(f"outlier channels do not ascend below the width of {width}")
    values: Floats = _CODEBOOK.take(records["codes"])
    for block, scale in _by_block(values, scales):
        block *= scale
    np.put_along_axis(values, channels.astype(np.intp), _from_halves(records), axis=1)
    return values


def _check_length(data: bytes | bytearray | memoryview, expected: int, what: str) -> None:
    actual = data.nbytes if isinstance(data, memoryview) else len(data)
    if actual != expected:
        raise ActivationError(f"{actual} bytes received, {what} takes {expected}")
