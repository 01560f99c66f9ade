"""Products of a few rows with a matrix of weights, in machine code made for this processor when it is first asked for.

Owns compiling (in the process and in a quarter of a second: no compiler, and nothing on disk), calling (through ctypes,
which releases the GIL) and sharing a large matrix between threads. Promises that a row's result has the same bits alone
and beside others and at any number of threads, that int8 products are exact (`bsns.runtime.row_kernel_code`), and that
there are no kernels, rather than wrong ones, where LLVM is not installed or does not know the processor. Does not
choose when to use them or define the int8 arithmetic: `bsns.runtime.weight_formats` does.

A step that decodes reads each weight for one to a few rows and is bound by memory: torch's kernels, made for many rows,
reach a half of what memory gives in float32, and a fifth in int8.
"""

import ctypes
import os
import platform
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

if TYPE_CHECKING:
    from bsns.runtime.row_kernel_code import Meeting

DIGITS: Final = 3
# Digits are padded with zeros to a multiple of this, the longest vector of bytes, and a row of int8 weights is read to
# that length, into the next row: there must be as many readable bytes behind the last.
PADDING: Final = 64
# One input row's corrections, DIGITS of them, take so many int32: one vector.
CORRECTIONS: Final = 4
# What a row's corrections and its alignment take.
_ROW_BYTES: Final = 4 * (CORRECTIONS + 1)

# Where LLVM is known to lower the code: on some others it ends the process over a vector for which it has no rule.
MACHINES: Final = ("x86_64", "amd64", "aarch64", "arm64")

# To wake a thread takes about 50 µs; this many bytes of weights take 200 µs.
_BYTES_PER_THREAD: Final = 4_000_000


@dataclass(frozen=True)
class FixedPoint:
    """How an activation becomes digits; `bsns.runtime.weight_formats` says what the numbers mean."""

    alignment: float
    digit_offsets: int
    wide_part: float


class RowKernels:
    """The compiled functions. Made by `row_kernels`."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine  # owns the code

        def function(name: str, pointers: int, counts: int, *others: Any) -> Callable[..., None]:
            kind = ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * pointers, *[ctypes.c_int64] * counts, *others)
            return kind(engine.get_function_address(name))

        self._quantise = function("quantise", 5, 4)
        self._multiply = function("multiply", 7, 6)
        self._multiply_floats = function("multiply_floats", 4, 5)
        self._normalise = function("normalise", 3, 2, ctypes.c_float)

    def int8(self, x: Tensor, weight: Tensor, channels: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        """float32 `x` [M, K] with int8 `weight` [N, K + channels], contiguous and with `PADDING` bytes behind it."""
        x = x.contiguous()
        rows, width = x.shape
        outputs, inputs = weight.shape
        padded = -(-inputs // PADDING) * PADDING
        output = torch.empty(rows, outputs)
        scratch = torch.empty(rows * (DIGITS * padded + _ROW_BYTES), dtype=torch.uint8)
        planes = scratch.data_ptr()
        corrections = planes + rows * DIGITS * padded
        alignments = corrections + rows * 4 * CORRECTIONS
        self._quantise(
            x.data_ptr(),
            channels.data_ptr(),
            planes,
            corrections,
            alignments,
            rows,
            width,
            inputs - width,
            padded,
        )
        pointers = (
            weight.data_ptr(),
            scale.data_ptr(),
            None if bias is None else bias.data_ptr(),
            planes,
            corrections,
            alignments,
            output.data_ptr(),
        )
        _shared(self._multiply, pointers, outputs, outputs * inputs, (rows, inputs, outputs, padded))
        return output

    def float32(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """float32 `x` [M, K] with float32 `weight` [N, K], contiguous."""
        x = x.contiguous()
        rows, inputs = x.shape
        outputs = weight.shape[0]
        output = torch.empty(rows, outputs)
        pointers = (
            weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            x.data_ptr(),
            output.data_ptr(),
        )
        _shared(self._multiply_floats, pointers, outputs, 4 * outputs * inputs, (rows, inputs, outputs))
        return output

    def rms_norm(self, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        """Each row of float32 `x` [M, K] over the root of (its mean square + `epsilon`), times `weight` [K]."""
        x = x.contiguous()
        output = torch.empty_like(x)
        self._normalise(x.data_ptr(), weight.data_ptr(), output.data_ptr(), *x.shape, epsilon)
        return output


def _shared(
    function: Callable[..., None], pointers: tuple[int | None, ...], outputs: int, size: int, counts: tuple[int, ...]
) -> None:
    """The outputs, divided between torch's number of threads where there are bytes of weights enough."""
    pieces = min(torch.get_num_threads(), size // _BYTES_PER_THREAD, outputs)
    if pieces <= 1:
        function(*pointers, 0, outputs, *counts)
        return
    bounds = [outputs * piece // pieces for piece in range(pieces + 1)]
    others: list[Future[None]] = [
        _pool().submit(function, *pointers, first, end, *counts) for first, end in pairwise(bounds[1:])
    ]
    function(*pointers, 0, bounds[1], *counts)
    for other in others:
        other.result()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="row-kernel")


@cache
def row_kernels(numbers: FixedPoint) -> RowKernels | None:
    """The kernels of this processor, compiled once; None where there can be none."""
    if platform.machine().lower() not in MACHINES:
        return None
    try:
        from llvmlite import binding
    except (ImportError, OSError):  # not installed, or its library does not load here
        return None
    try:
        binding.initialize_native_target()
        binding.initialize_native_asmprinter()
        features = binding.get_host_cpu_features()
        return RowKernels(compiled(numbers, meeting(features), binding.get_host_cpu_name(), features.flatten()))
    except RuntimeError:  # LLVM's own: it does not know the processor
        return None


def meeting(features: dict[str, bool]) -> "Meeting":
    """The fastest way to multiply int8 on a processor with these features, by LLVM's names."""
    from bsns.runtime.row_kernel_code import ANY, BYTES, PAIRS

    if features.get("avxvnni") or (features.get("avx512vnni") and features.get("avx512vl")):
        return BYTES
    return PAIRS if features.get("avx2") else ANY


def compiled(numbers: FixedPoint, meeting: "Meeting", processor: str, features: str) -> Any:
    """LLVM's engine that holds the functions. Raises RuntimeError where LLVM cannot make them."""
    from llvmlite import binding

    from bsns.runtime.row_kernel_code import module

    code = binding.parse_assembly(module(meeting, numbers))
    target = binding.Target.from_default_triple()
    machine = target.create_target_machine(cpu=processor, features=features, opt=3)
    # Loops over a row run a few ten times: unrolled they are no faster, and compile for longer.
    tuning = binding.create_pipeline_tuning_options(speed_level=2)
    tuning.loop_unrolling, tuning.loop_vectorization = False, True
    passes = binding.create_pass_builder(machine, tuning)
    passes.getModulePassManager().run(code, passes)
    engine = binding.create_mcjit_compiler(code, machine)
    engine.finalize_object()
    return engine
