"""What a GPU needs besides torch's own calls: the declared arithmetic, results on the CPU, and errors one can act on.

Owns torch's global settings for CUDA, how a result comes back, and the translation of CUDA's errors. Promises that
float32 products keep all 24 bits and that bfloat16 products are summed in float32, whatever another library of the
process has set before; that a result is copied once and is on the CPU when it is handed over. Does not run models.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch
from torch import Tensor

from bsns.runtime.executor import ExecutionError

# Pinned memory is copied several times faster, and torch keeps what it once took: no more than this for one result.
_PINNED_BYTES_LIMIT: Final = 64 * 2**20


def open_device(name: str) -> torch.device:
    """The device by its name ("cpu", "cuda", "cuda:1"). `ExecutionError` where this process has none such."""
    device = torch.device(name)
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available():
        raise ExecutionError(
            f"device is {name!r}, and torch {torch.__version__} sees no GPU: install torch built for CUDA and the "
            "driver, or set the device to 'cpu'"
        )
    found, index = torch.cuda.device_count(), device.index or 0
    if index >= found:
        raise ExecutionError(f"device is {name!r}, and torch sees {found} GPU{'s' * (found > 1)}, numbered from 0")
    use_declared_arithmetic()
    return torch.device("cuda", index)


def use_declared_arithmetic() -> None:
    """Settings of the process, set again before each run, since they belong to nobody."""
    # TF32 keeps ten bits of the mantissa, and sums in bfloat16 eight: neither is the declared arithmetic.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False


@contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """For work on `device`: its settings, and CUDA's errors as `ExecutionError`. On a CPU nothing."""
    if device.type != "cuda":
        yield
        return
    try:
        with torch.cuda.device(device):
            use_declared_arithmetic()
            yield
    except torch.OutOfMemoryError as error:
        tried = ". ".join(str(error).split(". ")[1:2]) or "no details"
        raise DeviceMemoryError(
            f"{device} is out of memory ({tried}); lower weight_memory_bytes or the number of sessions, or serve fewer "
            "units"
        ) from error
    except RuntimeError as error:
        if not _is_of_cuda(error):
            raise
        raise ExecutionError(
            f"{device} failed: {str(error).splitlines()[0]}; restart the process, since CUDA gives no result after "
            "such an error, and look at the driver's log if it happens again"
        ) from error


class DeviceMemoryError(ExecutionError):
    """The GPU has no room for what was asked. Nothing of it is left behind; less may fit."""


def to_host(tensor: Tensor) -> Tensor:
    """`tensor` on the CPU, complete."""
    if tensor.device.type == "cpu":
        return tensor
    if tensor.nbytes > _PINNED_BYTES_LIMIT:
        return tensor.cpu()
    # Not a buffer that is used again: whoever gets the result may keep it, and torch recycles it when they let go.
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    torch.cuda.current_stream(tensor.device).synchronize()
    return host


def _is_of_cuda(error: RuntimeError) -> bool:
    return isinstance(error, torch.AcceleratorError) or "CUDA" in str(error) or "CUBLAS" in str(error)
