"""Packed linear maps: accurate, and in int8 with the same bits alone, in any batch and at any thread count."""

import platform
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from bsns.runtime import weight_formats
from bsns.runtime.row_kernels import MACHINES, RowKernels
from bsns.runtime.weight_formats import (
    ARITHMETICS,
    INT8_INPUT_LIMIT,
    WIDE_CHANNELS,
    WeightFormatError,
    checked_row_kernels,
    pack,
)

SHAPES = [(1, 1), (1, 7), (17, 33), (960, 576), (5, 4099), (3, 65_536)]
# The large channel makes the rounding of a few weights the whole error of the int8 outputs, hence the wider bound.
RELATIVE_ERROR = {"float32": 2e-6, "bfloat16": 1e-2, "int8": 2e-2}

# By the machine and not by whether there are kernels: where they are made for it they have to work.
needs_row_kernels = pytest.mark.skipif(
    platform.machine().lower() not in MACHINES, reason="row kernels are not made for this kind of machine"
)


@pytest.fixture
def threads_restored() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def drawn(out_features: int, in_features: int, rows: int, seed: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Weight, bias and inputs; one input channel is far larger than the others, as in real hidden states."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(out_features, in_features, generator=generator)
    bias = torch.randn(out_features, generator=generator)
    inputs = torch.randn(rows, in_features, generator=generator)
    inputs[:, in_features // 2] *= 60
    return weight, bias, inputs


def exact(weight: Tensor, bias: Tensor | None, inputs: Tensor) -> Tensor:
    product = inputs.double() @ weight.double().t()
    return product if bias is None else product + bias


def relative_error(output: Tensor, expected: Tensor) -> float:
    return float((output - expected).norm() / expected.norm())


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("biased", [True, False])
def test_output_lies_within_the_bound_of_its_arithmetic(arithmetic: str, shape: tuple[int, int], biased: bool) -> None:
    weight, bias, inputs = drawn(*shape, rows=5)
    layer = pack(weight, bias if biased else None, arithmetic)
    output = layer(inputs)
    assert (layer.out_features, layer.in_features) == shape
    assert output.dtype == torch.float32
    assert output.shape == (5, shape[0])
    assert relative_error(output, exact(weight, bias if biased else None, inputs)) < RELATIVE_ERROR[arithmetic]


def test_int8_activations_add_no_visible_error() -> None:
    _, _, inputs = drawn(64, 576, rows=9)
    # Whole numbers up to 127 are weights that int8 holds exactly.
    weight = torch.randint(-127, 128, (64, 576), generator=torch.Generator().manual_seed(2)).float()
    weight[:, 0] = 127
    assert relative_error(pack(weight, None, "int8")(inputs), exact(weight, None, inputs)) < 2e-6


def test_int8_keeps_sixteen_bits_of_the_largest_channels() -> None:
    weight, _, _ = drawn(64, 576, rows=1)
    wide = torch.arange(0, 576, 576 // WIDE_CHANNELS)[:WIDE_CHANNELS]
    weight[:, wide] *= 3
    layer = pack(weight, None, "int8")
    inputs = torch.zeros(1, 576)
    inputs[:, wide] = 1
    assert relative_error(layer(inputs), exact(weight, None, inputs)) < 1e-4
    assert relative_error(layer(1 - inputs), exact(weight, None, 1 - inputs)) > 1e-3


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_row_has_the_same_bits_alone_and_in_any_batch(shape: tuple[int, int]) -> None:
    weight, bias, inputs = drawn(*shape, rows=40)
    layer = pack(weight, bias, "int8")
    together = layer(inputs)
    for rows in range(1, 41):
        assert torch.equal(layer(inputs[:rows]), together[:rows])
    for row in range(0, 40, 7):
        assert torch.equal(layer(inputs[row : row + 1]), together[row : row + 1])


def test_int8_batch_computed_in_pieces_has_the_same_bits() -> None:
    weight, bias, inputs = drawn(3072, 64, rows=801)
    layer = pack(weight, bias, "int8")
    assert torch.equal(layer(inputs), torch.cat([layer(inputs[:150]), layer(inputs[150:])]))


@pytest.mark.usefixtures("threads_restored")
@pytest.mark.parametrize("rows", [1, 3, 70])
def test_int8_has_the_same_bits_at_one_and_two_threads(rows: int) -> None:
    weight, bias, inputs = drawn(3072, 576, rows=rows)
    outputs = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        outputs.append(pack(weight, bias, "int8")(inputs))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("saturates", [False, True])
def test_int8_has_the_same_bits_without_row_kernels_and_where_the_integer_kernel_saturates(
    shape: tuple[int, int], saturates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, bias, inputs = drawn(*shape, rows=5)
    output = pack(weight, bias, "int8")(inputs)
    monkeypatch.setattr(weight_formats, "checked_row_kernels", lambda: None)
    if saturates:
        monkeypatch.setattr(weight_formats, "_integer_kernel_is_exact", lambda: False)
    assert torch.equal(pack(weight, bias, "int8")(inputs), output)


def test_int8_large_batch_has_the_same_bits_where_the_integer_kernel_saturates(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, bias, inputs = drawn(3072, 64, rows=801)
    output = pack(weight, bias, "int8")(inputs)
    monkeypatch.setattr(weight_formats, "_integer_kernel_is_exact", lambda: False)
    assert torch.equal(pack(weight, bias, "int8")(inputs), output)


@needs_row_kernels
@pytest.mark.parametrize("arithmetic", ["float32", "int8"])
def test_few_rows_are_computed_by_row_kernels(arithmetic: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, bias, inputs = drawn(17, 576, rows=50)
    layer = pack(weight, bias, arithmetic)
    used: list[int] = []
    computed = getattr(RowKernels, arithmetic)

    def noted(kernels: RowKernels, x: Tensor, *others: Tensor) -> Tensor:
        used.append(len(x))
        result: Tensor = computed(kernels, x, *others)
        return result

    monkeypatch.setattr(RowKernels, arithmetic, noted)
    for rows in (0, 1, 4, 50):
        layer(inputs[:rows])
    assert used == [1, 4]


def test_float32_without_row_kernels_differs_by_rounding_only(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, bias, inputs = drawn(960, 576, rows=3)
    output = pack(weight, bias, "float32")(inputs)
    monkeypatch.setattr(weight_formats, "checked_row_kernels", lambda: None)
    assert relative_error(pack(weight, bias, "float32")(inputs), output) < 1e-6


@needs_row_kernels
def test_row_kernels_stand_their_check_on_this_processor() -> None:
    assert checked_row_kernels() is not None


@needs_row_kernels
@pytest.mark.parametrize("name", ["int8", "float32", "rms_norm"])
def test_row_kernels_that_compute_something_else_are_not_used(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong:
        def __getattr__(self, asked: str) -> object:
            kernels = checked_row_kernels()
            right = getattr(kernels, asked)
            return (lambda *arguments: right(*arguments) * 1.001) if asked == name else right

    monkeypatch.setattr(weight_formats, "row_kernels", lambda _: Wrong())
    assert checked_row_kernels.__wrapped__() is None


def test_int8_at_the_largest_width_and_operands_does_not_overflow() -> None:
    weight = torch.ones(2, INT8_INPUT_LIMIT)
    weight[1] = -1
    # All bits of the fixed point are set.
    inputs = torch.full((1, INT8_INPUT_LIMIT), 2.0 - 2.0**-23)
    for sign in (1, -1):
        assert relative_error(pack(weight, None, "int8")(sign * inputs), exact(weight, None, sign * inputs)) < 1e-6


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_row_that_is_not_finite_gives_no_finite_row_and_leaves_the_others(arithmetic: str, bad: float) -> None:
    weight, bias, inputs = drawn(17, 33, rows=3)
    layer = pack(weight, bias, arithmetic)
    good = layer(inputs)
    inputs[1, 4] = bad
    output = layer(inputs)
    assert not torch.isfinite(output[1]).any()
    assert torch.isfinite(output[[0, 2]]).all()
    assert torch.allclose(output[[0, 2]], good[[0, 2]])


@pytest.mark.parametrize("magnitude", [1e-30, 1e-6, 1e4, 1e30])
def test_int8_is_as_accurate_at_any_magnitude(magnitude: float) -> None:
    weight, _, inputs = drawn(17, 33, rows=3)
    inputs *= magnitude
    output = pack(weight, None, "int8")(inputs)
    assert relative_error(output.double(), exact(weight, None, inputs)) < RELATIVE_ERROR["int8"]


def test_int8_row_of_zeros_gives_the_bias_and_one_too_large_gives_nan() -> None:
    weight, bias, inputs = drawn(17, 33, rows=3)
    inputs[0] = 0
    inputs[1] = 2.0**126
    inputs[2] = 1e-42
    output = pack(weight, bias, "int8")(inputs)
    assert torch.equal(output[0], bias)
    assert torch.isnan(output[1]).all()
    assert torch.equal(output[2], bias)


def test_int8_weights_of_zero_give_zeros() -> None:
    assert torch.equal(pack(torch.zeros(3, 40), None, "int8")(torch.ones(2, 40)), torch.zeros(2, 3))


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_rows_out_of_order_in_memory_and_no_rows_are_computed(arithmetic: str) -> None:
    weight, bias, inputs = drawn(17, 33, rows=6)
    layer = pack(weight, bias, arithmetic)
    assert torch.allclose(layer(inputs.t().contiguous().t()), layer(inputs))
    assert torch.allclose(layer(inputs[::2]), layer(inputs)[::2])
    assert layer(inputs[:0]).shape == (0, 17)


def test_memory_bytes_count_weights_scales_and_bias() -> None:
    weight, bias, _ = drawn(960, 576, rows=1)
    assert pack(weight, None, "float32").memory_bytes == 4 * 960 * 576
    assert pack(weight, bias, "bfloat16").memory_bytes == 2 * 960 * 576 + 4 * 960
    assert pack(weight, bias, "int8").memory_bytes == 960 * (576 + WIDE_CHANNELS) + 2 * 4 * 960


def test_float32_copies_nothing() -> None:
    weight, _, inputs = drawn(4, 3, rows=1)
    layer = pack(weight, None, "float32")
    weight.zero_()
    assert torch.equal(layer(inputs), torch.zeros(1, 4))


@pytest.mark.parametrize("arithmetic", ["float16", "INT8", ""])
def test_unknown_arithmetic_is_refused(arithmetic: str) -> None:
    with pytest.raises(WeightFormatError, match=r"expected one of .*bfloat16"):
        pack(torch.ones(2, 3), None, arithmetic)


@pytest.mark.parametrize("arithmetic", ARITHMETICS)
def test_wrong_types_and_shapes_are_refused(arithmetic: str) -> None:
    for weight in (torch.ones(3), torch.ones(0, 3), torch.ones(2, 3).double()):
        with pytest.raises(WeightFormatError, match=r"float32 \[N, K\]"):
            pack(weight, None, arithmetic)
    for bias in (torch.ones(3), torch.ones(1, 2), torch.ones(2).double()):
        with pytest.raises(WeightFormatError, match=r"float32 \[2\]"):
            pack(torch.ones(2, 3), bias, arithmetic)
    layer = pack(torch.ones(2, 3), None, arithmetic)
    for inputs in (torch.ones(3), torch.ones(1, 2), torch.ones(1, 3).double()):
        with pytest.raises(WeightFormatError, match=r"float32 \[M, 3\]"):
            layer(inputs)


def test_int8_refuses_what_it_cannot_hold() -> None:
    with pytest.raises(WeightFormatError, match="finite"):
        pack(torch.tensor([[1.0, float("nan")]]), None, "int8")
    with pytest.raises(WeightFormatError, match="split the weight"):
        pack(torch.ones(1, INT8_INPUT_LIMIT + 1), None, "int8")
    with pytest.raises(WeightFormatError, match="CPU"):
        pack(torch.ones(1, 1, device="meta"), None, "int8")
