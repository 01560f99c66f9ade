"""Weights of a linear layer, packed for one of the declared arithmetics.

Owns `pack`, which turns a float32 weight matrix into a linear map computed in "float32", "bfloat16" or "int8". Promises
that the int8 map of a row has the same bits alone and in any batch, at any thread count and on any CPU: activations
enter as integers of 22 bits and a sign relative to their row's maximum, the products are exact integers, and what
remains is element-wise float32. The other two repeat as well as float kernels do: bfloat16 far worse than float32. Does
not choose an arithmetic, read files or know of models.

Few rows, as a step that decodes has, are multiplied by `bsns.runtime.row_kernels`, more by torch; each also where the
other cannot be had. In int8 their bits are equal, in float32 they differ in the order of sums, as torch's own kernels
do.

The int8 arithmetic follows the mixed matrix decomposition (paper §1.12; LLM.int8(), arXiv 2208.07339): products in
8 bits, with 16 bits kept for the input channels where they matter. LLM.int8() takes those in which some row of the
batch is large, so that a row's result depends on its neighbours and jumps where a value crosses the threshold; two
honest machines could then be told apart. Here the channels are those with the largest weights, once and for all, and
every activation keeps its bits: it is cut into three signed 8-bit digits, which are rows of one integer product.
"""

import sys
from functools import cache
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm

from bsns.runtime.row_kernels import DIGITS, PADDING, FixedPoint, RowKernels, row_kernels

Floats = npt.NDArray[np.float32]

ARITHMETICS: Final = ("float32", "bfloat16", "int8")

# Input channels whose weights are kept in 16 bits. Sixteen, chosen so, take a third off the divergence of SmolLM2's
# answers from those in float32.
WIDE_CHANNELS: Final = 16

# An int32 sum of this many products of a digit (at most 128) and a weight (at most 127) cannot overflow.
INT8_INPUT_LIMIT: Final = 131_072 - WIDE_CHANNELS

_WEIGHT_MAXIMUM: Final = 127
# A wide channel's second weight counts in this part of the first one's unit.
_WIDE_PART: Final = 2.0**-8
# Below this the scale of a row of weights would lose bits to underflow; such a row is taken for zeros.
_SMALLEST_SCALE: Final = 2.0**-96
# Powers of two: multiplying by them is exact.
_DIGIT_WEIGHTS: Final = np.array([2.0**8, 2.0**16], dtype=np.float32).reshape(2, 1, 1)
_EXPONENT_BITS: Final = 0x7F800000
# Turns the bytes of a sum into digits: after adding it no digit borrows from the next, and it is taken off by xor.
_DIGIT_OFFSETS: Final = 0x808080
# 1.5 * 2^(e+2) for a row whose maximum lies in [2^e, 2^(e+1)): adding it to any value of the row stays in one binade,
# so that the low bits of the sum are the value in units of 2^(e-21).
_ALIGNMENT: Final = 6.0
_UNITS_PER_ALIGNMENT: Final = _ALIGNMENT * 2.0**21
# Sums of this many products are below 2^24 and so exact in float32, in any order.
_EXACT_FLOAT_INPUTS: Final = 1024
# The integer products of one piece of a batch: 24 MiB, and as much again as float32. With smaller pieces the kernel
# would rearrange the weights more often.
_VALUES_AT_ONCE: Final = 3 * 2**21
_LEAST_ROWS_AT_ONCE: Final = 8
# Inputs of so many bytes (three a value in int8, four in float32) go to the row kernels, which read all of them again
# for each row of weights: they are faster while those stay in a core's first cache (32 KiB) beside the passing weights.
# Measured on Zen 4: 10 rows (int8: 13) of 576 values, 4 (5) of 1536 and 1 of 4096 take a fifth to two thirds of torch's
# time, and twice as many are about even.
_ROW_KERNEL_BYTES: Final = 24 * 1024


class WeightFormatError(ValueError):
    """Weights cannot be packed, or an input does not fit them. The message says what was expected."""


class PackedLinear(Protocol):
    """A linear map x -> x W^T + b with packed W."""

    @property
    def in_features(self) -> int:
        """Width K of an input row."""
        ...

    @property
    def out_features(self) -> int:
        """Width N of an output row."""
        ...

    @property
    def memory_bytes(self) -> int:
        """Bytes that the packed weights, their scales and the bias occupy."""
        ...

    def __call__(self, x: Tensor) -> Tensor:
        """float32 [M, K] to float32 [M, N]. A row that holds NaN or infinity gives no finite row.

        Raises `WeightFormatError` for another type or shape.
        """
        ...


def pack(weight: Tensor, bias: Tensor | None, arithmetic: str) -> PackedLinear:
    """The linear map of `weight` (float32 [N, K]) and `bias` (float32 [N] or None) in one of `ARITHMETICS`.

    "float32" refers to the given tensors and copies nothing; the others copy. Weights that share an input can be packed
    as one, by `torch.cat` along N. Relative error against exact arithmetic, on weights and inputs from a normal
    distribution: float32 about 1e-7, bfloat16 3e-3, int8 1e-2 (of which the activations make less than 1e-5).
    Raises `WeightFormatError` for another arithmetic, type or shape, and for int8 where a weight is not finite or K
    exceeds `INT8_INPUT_LIMIT`.
    """
    if arithmetic not in ARITHMETICS:
        raise WeightFormatError(f"arithmetic is {arithmetic!r}, expected one of {ARITHMETICS}")
    if weight.dtype != torch.float32 or weight.ndim != 2 or 0 in weight.shape:
        raise WeightFormatError(
            f"a weight is float32 [N, K] with N and K at least 1, got {weight.dtype} {list(weight.shape)}"
        )
    if bias is not None and (bias.dtype != torch.float32 or bias.shape != weight.shape[:1]):
        raise WeightFormatError(f"a bias is float32 [{weight.shape[0]}], got {bias.dtype} {list(bias.shape)}")
    match arithmetic:
        case "float32":
            return _Float32Linear(weight, bias)
        case "bfloat16":
            return _BFloat16Linear(weight, bias)
        case _:
            return _Int8Linear(weight, bias)


class _Packed:
    """Sizes and input check that the three maps share."""

    def __init__(self, weight: Tensor, *others: Tensor | None) -> None:
        self._weight = weight
        self.out_features, self.in_features = weight.shape
        self.memory_bytes = sum(tensor.nbytes for tensor in (weight, *others) if tensor is not None)

    def _check(self, x: Tensor) -> None:
        if x.dtype != torch.float32 or x.ndim != 2 or x.shape[1] != self.in_features:
            raise WeightFormatError(f"an input is float32 [M, {self.in_features}], got {x.dtype} {list(x.shape)}")


class _Float32Linear(_Packed):
    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight, bias)
        self._bias = bias
        plain = weight.device.type == "cpu" and weight.is_contiguous() and (bias is None or bias.is_contiguous())
        self._kernels = checked_row_kernels() if plain else None
        self._kernel_rows = _ROW_KERNEL_BYTES // (4 * self.in_features)

    def __call__(self, x: Tensor) -> Tensor:
        self._check(x)
        if self._kernels is not None and 1 <= len(x) <= self._kernel_rows:
            return self._kernels.float32(x, self._weight, self._bias)
        return linear(x, self._weight, self._bias)


class _BFloat16Linear(_Packed):
    """Inputs, weights and products in bfloat16; the bias is added in float32."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__(weight.to(torch.bfloat16), bias)
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        self._check(x)
        output = linear(x.to(torch.bfloat16), self._weight).to(torch.float32)
        return output if self._bias is None else output.add_(self._bias)


class _Int8Linear(_Packed):
    """Weights are round(127 W / d) in 8 bits with d the maximum of an output row's magnitudes, as in paper §1.12.

    A wide channel appears a second time, behind the others: what rounding took from its weights, 256 times finer, meets
    a 256th of the activation. It so takes part in the same product.

    A row with a magnitude of 2^126 or more gives NaN, one of magnitudes below 2^-126 gives zeros.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, *, use_row_kernels: bool = True) -> None:
        if weight.device.type != "cpu":
            raise WeightFormatError(f"int8 is computed on a CPU, got a weight on {weight.device}")
        if weight.shape[1] > INT8_INPUT_LIMIT:
            raise WeightFormatError(
                f"int8 takes at most {INT8_INPUT_LIMIT} input features, got {weight.shape[1]}: "
                "split the weight along K and add the results"
            )
        if not bool(torch.isfinite(weight).all()):
            raise WeightFormatError("int8 takes finite weights only, got NaN or infinity")
        scale = (weight.abs().amax(1) / _WEIGHT_MAXIMUM).clamp_min_(_SMALLEST_SCALE)
        # Contiguous [N, K], multiplied as a transposed view: the layout that torch's kernel reads fastest.
        steps = weight / scale[:, None]
        channels = _largest_channels(weight)
        rests = (steps[:, channels] - steps[:, channels].round()) / _WIDE_PART
        rests.clamp_(-_WEIGHT_MAXIMUM, _WEIGHT_MAXIMUM)
        width = weight.shape[1]
        shape = len(weight), width + len(channels)
        quantised = torch.zeros(shape[0] * shape[1] + PADDING, dtype=torch.int8)[:-PADDING].view(shape)
        quantised[:, :width] = steps.round_()
        quantised[:, width:] = rests.round_()
        scale /= _UNITS_PER_ALIGNMENT
        super().__init__(quantised, scale, bias)
        self.in_features = width
        self._channels = channels
        self._transposed = quantised.t()
        self._scale = scale
        self._bias = None if bias is None else bias.contiguous()
        self._kernels = checked_row_kernels() if use_row_kernels else None
        # On a processor where torch's kernel is not exact, what takes its place is slower at any number of rows.
        fast = _integer_kernel_is_exact()
        self._kernel_rows = max(1, _ROW_KERNEL_BYTES // (DIGITS * shape[1])) if fast else sys.maxsize
        self._rows_at_once = max(_LEAST_ROWS_AT_ONCE, _VALUES_AT_ONCE // (DIGITS * self.out_features))

    def __call__(self, x: Tensor) -> Tensor:
        self._check(x)
        if self._kernels is not None and 1 <= len(x) <= self._kernel_rows:
            shared = self._weight, self._channels, self._scale, self._bias
            if len(x) <= self._rows_at_once:
                return self._kernels.int8(x, *shared)
            return torch.cat([self._kernels.int8(piece, *shared) for piece in x.split(self._rows_at_once)])
        given = x.numpy()
        inputs = np.empty((x.shape[0], self.in_features + len(self._channels)), dtype=np.float32)
        inputs[:, : self.in_features] = given
        np.multiply(given[:, self._channels.numpy()], _WIDE_PART, out=inputs[:, self.in_features :])
        output = np.empty((x.shape[0], self.out_features), dtype=np.float32)
        # A row that is not finite gives NaN here by design.
        with np.errstate(over="ignore", invalid="ignore"):
            for first in range(0, len(inputs), self._rows_at_once):
                last = first + self._rows_at_once
                self._compute(inputs[first:last], output[first:last])
        return torch.from_numpy(output)

    def _compute(self, x: Floats, output: Floats) -> None:
        digits, alignment = _digits(x)
        product = _exact_product(torch.from_numpy(digits), self._transposed).numpy()
        sums = product.astype(np.float32).reshape(DIGITS, *output.shape)
        sums[1:] *= _DIGIT_WEIGHTS
        np.add(sums[0], sums[1], out=output)
        output += sums[2]
        output *= self._scale.numpy()
        output *= alignment
        if self._bias is not None:
            output += self._bias.numpy()


def _largest_channels(weight: Tensor) -> Tensor:
    """Indices of the columns of float32 [N, K] with the largest norms, at most `WIDE_CHANNELS`, in ascending order."""
    # Rounded after a float64 sum, so that no machine's order of summation decides; equal columns go by their index.
    norms = weight.square().sum(0, dtype=torch.float64).to(torch.float32)
    return norms.sort(descending=True, stable=True).indices[:WIDE_CHANNELS].sort().values


def _digits(x: Floats) -> tuple[npt.NDArray[np.int8], Floats]:
    """Fixed-point values of float32 [M, K] as signed digits, int8 [3 M, K], lowest first, and each row's alignment,
    float32 [M, 1], of which `_UNITS_PER_ALIGNMENT` units make one; NaN for a row that is not finite.

    Arithmetic on bits and in place, since at one row each operator costs more than its work.
    """
    values = np.abs(x)
    alignment = np.maximum.reduce(values, axis=1, keepdims=True)
    bits = alignment.view(np.int32)
    bits &= _EXPONENT_BITS
    alignment *= _ALIGNMENT
    np.add(x, alignment, out=values)
    fixed = values.view(np.int32)
    fixed -= bits - _DIGIT_OFFSETS
    fixed ^= _DIGIT_OFFSETS
    # Infinity becomes NaN, everything finite stays.
    np.fmod(alignment, np.inf, out=alignment)
    rows, width = x.shape
    planes = fixed.astype("<i4", copy=False).view(np.int8).reshape(rows, width, 4)[..., :DIGITS].transpose(2, 0, 1)
    return planes.reshape(DIGITS * rows, width), alignment


def _exact_product(digits: Tensor, weight: Tensor) -> Tensor:
    """int8 [R, K] times int8 [K, N], int32 [R, N], without rounding or saturation."""
    if _integer_kernel_is_exact():
        return torch._int_mm(digits, weight)
    total = torch.zeros((digits.shape[0], weight.shape[1]), dtype=torch.int32)
    for left, right in zip(digits.split(_EXACT_FLOAT_INPUTS, 1), weight.split(_EXACT_FLOAT_INPUTS)):
        total += torch.mm(left.to(torch.float32), right.to(torch.float32)).to(torch.int32)
    return total


@cache
def _integer_kernel_is_exact() -> bool:
    """Whether this CPU's 8-bit product keeps every bit.

    On processors without VNNI instructions (x86 before about 2019) oneDNN adds pairs of products in 16 bits, which
    saturate; the largest operands show it.
    """
    for rows, width in ((1, 64), (3, 576), (96, 576)):
        digits = torch.full((rows, width), 127, dtype=torch.int8)
        digits[:, ::3] = -128
        weight = torch.full((64, width), _WEIGHT_MAXIMUM, dtype=torch.int8)
        weight[1::2] = -_WEIGHT_MAXIMUM
        expected = digits.to(torch.int32).sum(1, keepdim=True, dtype=torch.int32) * weight[:, 0].to(torch.int32)
        if not torch.equal(torch._int_mm(digits, weight.t()), expected):
            return False
    return True


@cache
def checked_row_kernels() -> RowKernels | None:
    """The row kernels, if they compute here what this module defines; else None, and torch does the work."""
    kernels = row_kernels(FixedPoint(_ALIGNMENT, _DIGIT_OFFSETS, _WIDE_PART))
    return kernels if kernels is not None and _agree(kernels) else None


def _agree(kernels: RowKernels) -> bool:
    generator = torch.Generator().manual_seed(0)
    for rows, outputs, inputs in ((1, 8, 592), (7, 9, 77)):
        weight, bias = torch.randn(outputs, inputs, generator=generator), torch.randn(outputs, generator=generator)
        x = torch.randn(rows, inputs, generator=generator)
        # Digits and weights at their limits, of both signs.
        x[0, ::2], weight[0], weight[1, ::3] = -2.0 + 2.0**-20, 3.0, -3.0
        plain = _Int8Linear(weight, bias, use_row_kernels=False)
        if not torch.equal(kernels.int8(x, plain._weight, plain._channels, plain._scale, bias), plain(x)):
            return False
        wide, gains = x.double(), weight[0]
        errors = (
            kernels.float32(x, weight, bias) - linear(wide, weight.double(), bias.double()),
            kernels.rms_norm(x, gains, 1e-5) - rms_norm(wide, (inputs,), gains.double(), 1e-5),
        )
        if not all(bool((error.abs() < 1e-3).all()) for error in errors):
            return False
    return True
