"""Row kernels: the bits of the int8 definition on each kind of processor, a row alone as beside others, none wrong."""

import platform
import sys
import threading
import time
from collections.abc import Iterator

import llvmlite.binding as llvm
import pytest
import torch
from torch import Tensor
from torch.nn.functional import rms_norm

from bsns.runtime import row_kernels as module
from bsns.runtime.row_kernels import PADDING, FixedPoint, RowKernels, compiled, meeting, row_kernels

NUMBERS = FixedPoint(6.0, 0x808080, 2.0**-8)
ROWS = (1, 2, 3, 4, 5, 11)
SHAPES = [(1, 1), (3, 7), (17, 33), (64, 576), (5, 4099), (2, 131_056)]


def processors() -> list[tuple[str, str]]:
    """LLVM's names of processors whose code runs on this one, and features: the fastest kind and all slower ones."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = llvm.get_host_cpu_features()
    found = [(llvm.get_host_cpu_name(), features.flatten())]
    if platform.machine().lower() in ("x86_64", "amd64"):
        found += [("haswell", "")] if features.get("avx2") and features.get("fma") else []
        found += [("x86-64", "")]
    return found


@pytest.fixture(scope="module", params=processors(), ids=lambda item: item[0])
def kernels(request: pytest.FixtureRequest) -> RowKernels:
    name, features = request.param
    known = llvm.get_host_cpu_features() if features else {"avx2": name == "haswell"}
    return RowKernels(compiled(NUMBERS, meeting(known), name, features))


@pytest.fixture
def threads_restored() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def integers(outputs: int, inputs: int, seed: int = 2) -> Tensor:
    """int8 weights, with the readable bytes behind them that the kernel asks for; those hold anything."""
    buffer = torch.randint(-127, 128, (outputs * inputs + PADDING,), generator=torch.Generator().manual_seed(seed))
    return buffer.to(torch.int8)[:-PADDING].view(outputs, inputs)


def defined(x: Tensor, weight: Tensor, channels: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The int8 arithmetic said again, with products in int64."""
    values = torch.cat([x, x[:, channels] * 2.0**-8], 1)
    largest = x.abs().amax(1, keepdim=True)
    alignment = (largest.view(torch.int32) & 0x7F800000).view(torch.float32) * 6
    fixed = (values + alignment).view(torch.int32) - alignment.view(torch.int32)
    digits = (fixed + 0x808080) ^ 0x808080
    total = torch.zeros(len(x), len(weight))
    for number in range(3):
        digit = (digits >> 8 * number).to(torch.uint8).view(torch.int8)
        total = total + (digit.long() @ weight.long().t()).to(torch.float32) * 256.0**number
    total = total * scale * torch.where(alignment.isinf(), torch.nan, alignment)
    return total if bias is None else total + bias


def same_bits(left: Tensor, right: Tensor) -> bool:
    number = ~left.isnan()
    return torch.equal(left.isnan(), right.isnan()) and torch.equal(
        left[number].view(torch.int32), right[number].view(torch.int32)
    )


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("biased", [True, False])
def test_int8_has_the_bits_of_the_definition(kernels: RowKernels, shape: tuple[int, int], biased: bool) -> None:
    outputs, width = shape
    channels = torch.arange(0, width, max(1, width // 16))[:16]
    weight, scale = integers(outputs, width + len(channels)), drawn(outputs).abs() * 1e-9
    weight[0] = -127
    bias = drawn(outputs, seed=3) if biased else None
    x = drawn(max(ROWS), width, seed=4)
    x[1] = 2.0 - 2.0**-23  # all bits of the fixed point are set
    x[2] = -x[1]
    x[3] = 0
    x[4, 0] = float("nan")
    x[5, -1] = float("-inf")
    x[6] *= 1e-44  # without normal numbers
    x[7] *= 1e38
    x[8, 0] = -0.0
    x[9] *= 1e-30
    for rows in ROWS:
        output = kernels.int8(x[:rows], weight, channels, scale, bias)
        assert same_bits(output, defined(x[:rows], weight, channels, scale, bias))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("biased", [True, False])
def test_float32_is_accurate_and_a_row_the_same_in_any_batch(
    kernels: RowKernels, shape: tuple[int, int], biased: bool
) -> None:
    outputs, width = shape
    weight, x = drawn(*shape), drawn(max(ROWS), width, seed=4)
    bias = drawn(outputs, seed=3) if biased else None
    together = kernels.float32(x, weight, bias)
    exact = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    assert (together - exact).abs().max() < 1e-6 * x.norm(dim=1).max() * weight.norm(dim=1).max()
    for rows in ROWS:
        assert torch.equal(kernels.float32(x[:rows], weight, bias), together[:rows])
    assert torch.equal(kernels.float32(x[6:7], weight, bias), together[6:7])
    assert torch.equal(kernels.float32(x.t().contiguous().t(), weight, bias), together)


@pytest.mark.parametrize("width", [1, 7, 33, 576])
def test_rms_norm_is_accurate_and_a_row_the_same_in_any_batch(kernels: RowKernels, width: int) -> None:
    x, weight = drawn(5, width), drawn(width, seed=3)
    x[1] = 0
    output = kernels.rms_norm(x, weight, 1e-5)
    exact = rms_norm(x.double(), (width,), weight.double(), 1e-5)
    assert torch.allclose(output.double(), exact, rtol=1e-6, atol=0)
    assert torch.equal(kernels.rms_norm(x[3:4], weight, 1e-5), output[3:4])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_leave_the_others(kernels: RowKernels, bad: float) -> None:
    weight, x = drawn(9, 33), drawn(5, 33, seed=4)
    good = kernels.float32(x, weight, None)
    x[2, 4] = bad
    output = kernels.float32(x, weight, None)
    assert not output[2].isfinite().any()
    assert torch.equal(output[[0, 1, 3, 4]], good[[0, 1, 3, 4]])


@pytest.mark.usefixtures("threads_restored")
@pytest.mark.parametrize("rows", [1, 3])
def test_bits_do_not_depend_on_the_number_of_threads(kernels: RowKernels, rows: int) -> None:
    weight, x = drawn(3001, 1024), drawn(rows, 1024, seed=4)
    small = integers(13_001, 1024)
    scale, channels = drawn(13_001).abs(), torch.arange(0)
    outputs = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        outputs.append((kernels.float32(x, weight, None), kernels.int8(x, small, channels, scale, None)))
    for others in outputs[1:]:
        assert torch.equal(others[0], outputs[0][0])
        assert torch.equal(others[1], outputs[0][1])


@pytest.mark.usefixtures("threads_restored")
def test_other_threads_run_meanwhile(kernels: RowKernels) -> None:
    torch.set_num_threads(1)
    weight, x = drawn(4000, 4000), drawn(256, 4000, seed=4)
    moments: list[float] = []
    done = threading.Event()

    def note() -> None:
        while not done.is_set():
            moments.append(time.perf_counter())
            time.sleep(0.001)

    other = threading.Thread(target=note)
    other.start()
    began = time.perf_counter()
    kernels.float32(x, weight, None)
    ended = time.perf_counter()
    done.set()
    other.join()
    assert sum(began < moment < ended for moment in moments) > 5


def test_kernels_of_this_processor_are_compiled_once() -> None:
    found = row_kernels(NUMBERS)
    assert found is not None
    assert row_kernels(NUMBERS) is found


def test_there_are_none_without_llvm_or_on_other_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "llvmlite", None)
        assert row_kernels.__wrapped__(NUMBERS) is None
    with monkeypatch.context() as elsewhere:
        elsewhere.setattr(platform, "machine", lambda: "riscv64")
        assert row_kernels.__wrapped__(NUMBERS) is None

    def refused(*_: object) -> None:
        raise RuntimeError("no such processor")

    monkeypatch.setattr(module, "compiled", refused)
    assert row_kernels.__wrapped__(NUMBERS) is None


@pytest.mark.parametrize(
    ("features", "kind"),
    [
        ({"avx512vnni": True, "avx512vl": True, "avx2": True}, "bytes"),
        ({"avxvnni": True, "avx2": True}, "bytes"),
        ({"avx512vnni": True, "avx2": True}, "pairs"),
        ({"avx2": True, "avxvnni": False}, "pairs"),
        ({"neon": True}, "any"),
        ({}, "any"),
    ],
)
def test_features_of_the_processor_choose_the_instructions(features: dict[str, bool], kind: str) -> None:
    assert meeting(features).kind == kind
