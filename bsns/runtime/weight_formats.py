"""Weights of a linear layer, packed for one of the declared arithmetics.

Owns `pack`, which turns a float32 weight matrix into a linear map computed in "float32", "bfloat16" or "int8". Promises
that the int8 map of a row has the same bits alone and in any batch, at any thread count and on any CPU: activations
enter as integers of 22 bits and a sign relative to their row's maximum, the products are exact integers, and what
remains is element-wise float32. The other two repeat as well as torch's float kernels do: bfloat16 far worse than
float32. Does not choose an arithmetic, read files or know of models.

The int8 arithmetic follows the mixed matrix decomposition (paper §1.12; LLM.int8(), arXiv 2208.07339): products in
8 bits, with 16 bits kept for the input channels where they matter. LLM.int8() takes those in which some row of the
batch is large, so that a row's result depends on its neighbours and jumps where a value crosses the threshold; two
honest machines could then be told apart. Here the channels are those with the largest weights, once and for all, and
every activation keeps its bits: it is cut into three signed 8-bit digits, which are rows of one integer product.
"""

from functools import cache
from typing import Final, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import linear

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
_DIGITS: Final = 3
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

    def __call__(self, x: Tensor) -> Tensor:
        self._check(x)
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

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
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
        # Contiguous [N, K], multiplied as a transposed view: the layout that the kernel reads fastest.
        steps = weight / scale[:, None]
        channels = _largest_channels(weight)
        rests = (steps[:, channels] - steps[:, channels].round()) / _WIDE_PART
        rests.clamp_(-_WEIGHT_MAXIMUM, _WEIGHT_MAXIMUM)
        quantised = torch.cat([steps, rests], 1).round_().to(torch.int8).contiguous()
        scale /= _UNITS_PER_ALIGNMENT
        super().__init__(quantised, scale, bias)
        self.in_features = weight.shape[1]
        self._channels = channels.numpy()
        self._transposed = quantised.t()
        self._scale: Floats = scale.numpy()
        self._bias: Floats | None = None if bias is None else bias.numpy()
        self._rows_at_once = max(_LEAST_ROWS_AT_ONCE, _VALUES_AT_ONCE // (_DIGITS * self.out_features))

    def __call__(self, x: Tensor) -> Tensor:
        self._check(x)
        given = x.numpy()
        inputs = np.empty((x.shape[0], self.in_features + len(self._channels)), dtype=np.float32)
        inputs[:, : self.in_features] = given
        np.multiply(given[:, self._channels], _WIDE_PART, out=inputs[:, self.in_features :])
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
        sums = product.astype(np.float32).reshape(_DIGITS, *output.shape)
        sums[1:] *= _DIGIT_WEIGHTS
        np.add(sums[0], sums[1], out=output)
        output += sums[2]
        output *= self._scale
        output *= alignment
        if self._bias is not None:
            output += self._bias


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
    planes = fixed.astype("<i4", copy=False).view(np.int8).reshape(rows, width, 4)[..., :_DIGITS].transpose(2, 0, 1)
    return planes.reshape(_DIGITS * rows, width), alignment


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
