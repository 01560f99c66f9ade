"""The activation codec: round trips within bounds, rows that depend on no other, rubbish refused with a reason."""

import hashlib
import struct
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bsns.runtime.activation_codec import (
    BLOCK_CHANNELS,
    LARGEST_BLOCKWISE_WIDTH,
    LEAST_BLOCKWISE_WIDTH,
    OUTLIERS_PER_ROW,
    ActivationError,
    TensorEncoding,
    can_be_handed_on,
    decode,
    dynamic_map,
    encode,
    encoded_size,
    encoding_for_link,
    takes_blockwise,
)
from bsns.v1 import common_pb2

FLOATS, IDS = TensorEncoding.RAW_FLOAT32, TensorEncoding.TOKEN_IDS
HALVES, BLOCKS = TensorEncoding.FLOAT16, TensorEncoding.BLOCKWISE_INT8
COMPRESSED = [HALVES, BLOCKS]
# A width with a short last block; where the fields of a BLOCKWISE_INT8 row of it begin.
WIDTH = 2 * BLOCK_CHANNELS + 5
SCALES, CHANNELS, OUTLIERS, CODES = 1, 13, 13 + 2 * OUTLIERS_PER_ROW, 13 + 4 * OUTLIERS_PER_ROW


def _rows(rows: int, width: int = WIDTH, seed: int = 0) -> torch.Tensor:
    """Gaussian rows with a few channels a hundred times as large, as hidden states have."""
    values = np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)
    values[:, ::50] *= 100
    return torch.from_numpy(values)


def _round_trip(encoding: TensorEncoding, tensor: torch.Tensor) -> torch.Tensor:
    return decode(encoding, encode(encoding, tensor), rows=tensor.shape[0], width=tensor.shape[1])


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
    if encoding is not IDS:
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


def test_encodings_have_the_numbers_of_the_wire() -> None:
    wire = {name.removeprefix("TENSOR_ENCODING_"): number for name, number in common_pb2.TensorEncoding.items()}
    assert wire == {"UNSPECIFIED": 0} | {encoding.name: int(encoding) for encoding in TensorEncoding}


def test_codebook_is_the_signed_dynamic_map_bit_for_bit() -> None:
    codebook = dynamic_map()
    assert codebook.dtype == np.float32
    assert len(set(codebook.tolist())) == 256
    assert (np.diff(codebook) > 0).all()
    assert codebook[[0, 127, 128, 255]].tolist() == pytest.approx([-0.99296875, 0.0, 5.5e-7, 1.0])
    # Of the values of create_dynamic_map(signed=True) of bitsandbytes 0.50.2.
    digest = "e732639a65f497b4ad684bb166a4467708255edd5207757de8b8f0c7e1fda89c"
    assert hashlib.sha256(codebook.astype("<f4").tobytes()).hexdigest() == digest


def test_gaussian_rows_lose_less_than_the_paper_says() -> None:
    values = torch.from_numpy(np.random.default_rng(1).normal(size=(64, 576)).astype(np.float32))
    for encoding, bound in ((HALVES, 3e-4), (BLOCKS, 9.5e-3)):
        error = (_round_trip(encoding, values) - values).norm(dim=1) / values.norm(dim=1)
        assert float(error.max()) < bound


def test_bytes_at_the_width_of_smollm2_are_under_a_third_of_float32() -> None:
    assert encoded_size(BLOCKS, (1, 576)) <= 0.30 * encoded_size(FLOATS, (1, 576))


@settings(deadline=None)
@given(st.integers(1, 4), st.integers(LEAST_BLOCKWISE_WIDTH, 400), st.integers(0, 2**32))
def test_compressed_rows_are_within_the_bound_of_each_value(rows: int, width: int, seed: int) -> None:
    values = _rows(rows, width, seed)
    largest = values.abs().max(dim=1, keepdim=True).values
    halved = 2.0**-11 * values.abs() + 2.0**-38 * largest
    assert bool(((_round_trip(HALVES, values) - values).abs() <= halved).all())
    # Half the codebook's widest step and the rounding before it, of at most the largest magnitude that is no outlier.
    rest = values.abs().sort(dim=1, descending=True).values[:, OUTLIERS_PER_ROW, None]
    quantised = torch.where(values.abs() > rest, halved, (0.0071 + 2.0**-12) * rest)
    assert bool(((_round_trip(BLOCKS, values) - values).abs() <= quantised).all())


@settings(deadline=None)
@given(st.integers(2, 6), st.integers(LEAST_BLOCKWISE_WIDTH, 200), st.integers(0, 2**32), st.booleans())
def test_bytes_of_a_row_depend_on_no_other_row(rows: int, width: int, seed: int, tied: bool) -> None:
    values = _rows(rows, width, seed)
    # Whole numbers are often equal: then the outliers are not settled by magnitude alone.
    values[0] = values[0].round() if tied else values[0]
    for encoding in COMPRESSED:
        whole = encode(encoding, values)
        assert whole == b"".join(encode(encoding, row[None]) for row in values)
        assert whole == encode(encoding, values.clone())
        assert whole == encode(encoding, values.T.contiguous().T)
        decoded = decode(encoding, whole, rows=rows, width=width)
        size = len(whole) // rows
        for number in range(rows):
            row = whole[number * size : (number + 1) * size]
            assert torch.equal(decode(encoding, row, rows=1, width=width)[0], decoded[number])


def test_of_equal_magnitudes_the_lowest_channels_are_the_outliers() -> None:
    row = torch.ones(1, WIDTH)
    row[0, 100] = -3
    data = encode(BLOCKS, row)
    channels = struct.unpack(f"<{OUTLIERS_PER_ROW}H", data[CHANNELS:OUTLIERS])
    assert channels == (*range(OUTLIERS_PER_ROW - 1), 100)
    assert torch.equal(_round_trip(BLOCKS, row), row)


@pytest.mark.parametrize("encoding", COMPRESSED)
@pytest.mark.parametrize("magnitude", [0.0, 1e-45, 1e-38, 2.0**-101, 2.0**-90, 1e-9, 1.0, 65504.0, 1e6, 1e30, 1.7e38])
def test_rows_of_any_magnitude_travel_and_stay_finite(encoding: TensorEncoding, magnitude: float) -> None:
    values = torch.linspace(-1, 1, WIDTH)[None] * magnitude
    decoded = _round_trip(encoding, values)
    assert torch.isfinite(decoded).all()
    # Below 2**-100 a block travels as zero, and values are then within what is sent of the row as a whole.
    assert float((decoded - values).abs().max()) <= max(0.01 * magnitude, 2.0**-100)
    smallest = decoded[decoded != 0].abs()
    assert not len(smallest) or float(smallest.min()) >= torch.finfo(torch.float32).tiny


@pytest.fixture
def subnormals_flushed() -> Iterator[None]:
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers")
    yield
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("encoding", COMPRESSED)
@pytest.mark.usefixtures("subnormals_flushed")
def test_decoded_bits_are_the_same_where_subnormal_numbers_are_flushed(encoding: TensorEncoding) -> None:
    values = _rows(3)
    values[1] *= 2.0**-99
    values[2] *= 1e35
    data = encode(encoding, values)
    flushed = decode(encoding, data, rows=3, width=WIDTH)
    torch.set_flush_denormal(False)
    decoded = decode(encoding, data, rows=3, width=WIDTH)
    assert flushed.numpy().tobytes() == decoded.numpy().tobytes()


@pytest.mark.parametrize("encoding", COMPRESSED)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 2.0**127, -3.4e38])
def test_values_that_cannot_travel_compressed_are_refused_by_the_sender(encoding: TensorEncoding, bad: float) -> None:
    values = _rows(2)
    values[1, 77] = bad
    with pytest.raises(ActivationError, match="NaN, infinity"):
        encode(encoding, values)


@pytest.mark.parametrize("encoding", COMPRESSED)
@pytest.mark.parametrize("wrong", [-1, 1])
def test_wrong_length_is_refused(encoding: TensorEncoding, wrong: int) -> None:
    data = bytes(encoded_size(encoding, (2, WIDTH)) + wrong)
    with pytest.raises(ActivationError, match="bytes received"):
        decode(encoding, data, rows=2, width=WIDTH)
    with pytest.raises(ActivationError, match="bytes received"):
        decode(encoding, data, rows=2**40, width=LARGEST_BLOCKWISE_WIDTH)


@pytest.mark.parametrize("width", [1, LEAST_BLOCKWISE_WIDTH - 1, LARGEST_BLOCKWISE_WIDTH + 1, 2**40])
def test_width_that_blockwise_does_not_take_is_refused(width: int) -> None:
    assert not takes_blockwise(width)
    with pytest.raises(ActivationError, match="takes widths"):
        encoded_size(BLOCKS, (1, width))
    with pytest.raises(ActivationError, match="takes widths"):
        decode(BLOCKS, bytes(700), rows=1, width=width)


def test_compressed_encodings_refuse_other_tensors() -> None:
    with pytest.raises(ActivationError, match="takes widths"):
        encode(BLOCKS, torch.zeros(1, LEAST_BLOCKWISE_WIDTH - 1))
    with pytest.raises(ActivationError, match="at least one value"):
        encode(HALVES, torch.zeros(1, 0))
    for encoding in COMPRESSED:
        with pytest.raises(ActivationError, match="float32"):
            encode(encoding, torch.zeros(WIDTH))
        with pytest.raises(ActivationError, match="width"):
            decode(encoding, b"", rows=1)


@pytest.mark.parametrize("width", [LEAST_BLOCKWISE_WIDTH, LARGEST_BLOCKWISE_WIDTH])
def test_narrowest_and_widest_row_travel(width: int) -> None:
    values = _rows(1, width)
    values[0, -1] = 5000
    assert float(_round_trip(BLOCKS, values)[0, -1]) == 5000


def test_lengths_tell_the_encodings_of_the_same_activations_apart() -> None:
    for width in range(1, 2000):
        sizes = [encoded_size(FLOATS, (3, width)), encoded_size(HALVES, (3, width))]
        if takes_blockwise(width):
            sizes.append(encoded_size(BLOCKS, (3, width)))
        assert len(set(sizes)) == len(sizes)
        if width >= LEAST_BLOCKWISE_WIDTH:
            assert sizes == sorted(sizes, reverse=True)


@pytest.mark.parametrize(
    ("encoding", "offset", "bad", "message"),
    [
        (HALVES, 0, struct.pack("<b", -101), "exponent"),
        (HALVES, 0, struct.pack("<b", 113), "exponent"),
        (HALVES, 1 + 2 * 7, struct.pack("<e", float("nan")), "NaN"),
        (HALVES, 1 + 2 * 7, struct.pack("<e", float("-inf")), "NaN"),
        (HALVES, 1 + 2 * 7, struct.pack("<e", -32800.0), "beyond"),
        (BLOCKS, 0, struct.pack("<b", -101), "exponent"),
        (BLOCKS, 0, struct.pack("<b", 127), "exponent"),
        (BLOCKS, SCALES + 8, struct.pack("<f", float("nan")), "scale"),
        (BLOCKS, SCALES + 8, struct.pack("<f", float("inf")), "scale"),
        (BLOCKS, SCALES, struct.pack("<f", -1.0), "scale"),
        (BLOCKS, SCALES, struct.pack("<f", 1e-40), "scale"),
        (BLOCKS, SCALES, struct.pack("<f", 2.0**127), "scale"),
        (BLOCKS, CHANNELS, struct.pack("<2H", 3, 3), "ascend"),
        (BLOCKS, CHANNELS, struct.pack("<2H", 4, 3), "ascend"),
        (BLOCKS, OUTLIERS - 2, struct.pack("<H", WIDTH), "ascend"),
        (BLOCKS, OUTLIERS - 2, struct.pack("<H", 65535), "ascend"),
        (BLOCKS, OUTLIERS, struct.pack("<e", float("inf")), "NaN"),
        (BLOCKS, CODES - 2, struct.pack("<e", float("nan")), "NaN"),
    ],
)
def test_malformed_field_of_any_row_is_refused(encoding: TensorEncoding, offset: int, bad: bytes, message: str) -> None:
    data = bytearray(encode(encoding, _rows(3)))
    decode(encoding, data, rows=3, width=WIDTH)
    place = 2 * (len(data) // 3) + offset
    data[place : place + len(bad)] = bad
    with pytest.raises(ActivationError, match=message):
        decode(encoding, data, rows=3, width=WIDTH)


@settings(deadline=None)
@given(st.sampled_from(COMPRESSED), st.integers(1, 3), st.data())
def test_random_bytes_of_the_right_length_give_finite_values_or_a_refusal(
    encoding: TensorEncoding, rows: int, data: st.DataObject
) -> None:
    size = encoded_size(encoding, (rows, WIDTH))
    if data.draw(st.booleans()):
        given_bytes = bytearray(data.draw(st.binary(min_size=size, max_size=size)))
    else:
        # Close to the valid, so that what is behind the first check is reached.
        given_bytes = bytearray(encode(encoding, _rows(rows)))
        for place in data.draw(st.lists(st.integers(0, size - 1), max_size=4)):
            given_bytes[place] = data.draw(st.integers(0, 255))
    try:
        tensor = decode(encoding, given_bytes, rows=rows, width=WIDTH)
    except ActivationError:
        return
    assert tensor.shape == (rows, WIDTH)
    assert torch.isfinite(tensor).all()


_BETWEEN_STAGES = (TensorEncoding.RAW_FLOAT32, TensorEncoding.FLOAT16, TensorEncoding.BLOCKWISE_INT8)


@pytest.mark.parametrize("encoding", _BETWEEN_STAGES)
@given(
    rows=st.integers(1, 4),
    width=st.integers(128, 600),
    seed=st.integers(0, 2**32 - 1),
    spread=st.floats(0, 3),
    largest=st.sampled_from([1.0, 100.0]),
    noise=st.sampled_from([0.0, 1e-6, 1e-5, 1e-4]),
)
@settings(max_examples=60, deadline=None)
def test_rows_with_float_noise_can_be_handed_on_in_any_encoding(
    encoding: TensorEncoding, rows: int, width: int, seed: int, spread: float, largest: float, noise: float
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensor = torch.randn(rows, width, generator=generator) * torch.exp(
        spread * torch.randn(rows, width, generator=generator)
    )
    tensor[:, width // 2] *= largest
    other = torch.randn(rows, width, generator=generator)
    other *= noise * tensor.norm(dim=1, keepdim=True) / other.norm(dim=1, keepdim=True)
    # In float32 the sum itself rounds.
    assert can_be_handed_on(encoding, encode(encoding, tensor + other), tensor, noise + 2**-23)


@pytest.mark.parametrize("encoding", _BETWEEN_STAGES)
def test_other_rows_cannot_be_handed_on(encoding: TensorEncoding) -> None:
    generator = torch.Generator().manual_seed(1)
    tensor = torch.randn(3, 576, generator=generator)
    for share in (0.03, 0.1, 1.0):
        changed = tensor.clone()
        changed[1] += share * torch.randn(576, generator=generator)
        assert not can_be_handed_on(encoding, encode(encoding, changed), tensor, 1e-4)
    for changed in (torch.zeros_like(tensor), -tensor, tensor.roll(1, 0), tensor.roll(1, 1)):
        assert not can_be_handed_on(encoding, encode(encoding, changed), tensor, 1e-4)
    size = encoded_size(encoding, (3, 576))
    assert not can_be_handed_on(encoding, bytes(size), tensor, 1e-4)
    assert not can_be_handed_on(encoding, b"\xff" * size, tensor, 1e-4)
    assert not can_be_handed_on(encoding, encode(encoding, tensor)[:-1], tensor, 1e-4)


def test_decoded_tensor_does_not_share_the_received_bytes() -> None:
    for encoding in (FLOATS, *COMPRESSED):
        data = bytearray(encode(encoding, _rows(2)))
        tensor = decode(encoding, data, rows=2, width=WIDTH)
        before = tensor.clone()
        data[:] = bytes(len(data))
        assert torch.equal(tensor, before)


@pytest.mark.parametrize(
    ("bytes_per_second", "rows", "width", "encoding"),
    [
        (None, 1, 576, FLOATS),
        (None, 512, 576, FLOATS),
        (1.25e9, 512, 576, FLOATS),
        (125e6, 1, 576, FLOATS),
        (125e6, 512, 576, HALVES),
        (12.5e6, 1, 576, HALVES),
        (12.5e6, 512, 576, BLOCKS),
        (2.5e6, 1, 576, BLOCKS),
        (1.0, 1, 576, BLOCKS),
        (1.0, 1, 8, HALVES),
        (1.0, 1, 100_000, HALVES),
    ],
)
def test_slower_links_get_shorter_encodings(
    bytes_per_second: float | None, rows: int, width: int, encoding: TensorEncoding
) -> None:
    assert encoding_for_link(bytes_per_second, rows, width) is encoding


@settings(deadline=None)
@given(st.integers(1, 4096), st.integers(1, 70_000))
def test_encoding_never_grows_as_the_link_slows(rows: int, width: int) -> None:
    sizes = [
        encoded_size(encoding_for_link(10.0**power, rows, width), (rows, width)) for power in np.arange(10, 2, -0.25)
    ]
    assert sizes == sorted(sizes, reverse=True)
