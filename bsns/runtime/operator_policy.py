"""Which operators of torch a program may call, and with which arguments.

Owns the list of allowed operators and the reasons for refusing any other. Promises that an allowed operator, with
arguments that `CheckedOperators` lets through, is functional and deterministic for one machine, reads nothing but its
operands, and neither ends the process nor makes a tensor above `MAXIMUM_TENSOR_BYTES`. Indices out of range that stand
in a tensor's values are not seen here: on a CPU torch refuses them when the operator runs. Knows no programs
(`bsns.runtime.program`).
"""

from collections.abc import Callable, Mapping
from typing import Any, Final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# Of any one tensor that a program makes, intermediates inside an operator included.
MAXIMUM_TENSOR_BYTES: Final = 1 << 30
# Scales of a resampling lie between one part of this and this: torch's indices overflow for extreme ones.
_MAXIMUM_SCALE: Final = 1024

# Views that keep or enlarge their one tensor operand.
_VIEWS: Final = """
    alias clone contiguous detach expand flatten lift_fresh_copy mT movedim moveaxis numpy_T permute reshape squeeze
    swapaxes swapdims t transpose unflatten unsqueeze
"""
ALIASES: Final = frozenset(_VIEWS.split())
# Conversions: an alias where they change nothing.
CONVERSIONS: Final = frozenset({"_to_copy", "to", "type_as"})
# Views that take a part of their one tensor operand.
PARTS: Final = frozenset({"diagonal", "narrow", "select", "slice", "unfold"})

# Functional, deterministic on every device, safe for the arguments that are let through: each was looked at. Absent on
# purpose: `empty` (uninitialised memory), `as_strided` (any part of a storage), `scatter_add`, `index_add` and
# accumulating `index_put` (order of additions differs between runs on a GPU), everything in place, everything random.
_ELEMENTWISE: Final = """
    __and__ __or__ __xor__ abs acos acosh add addcdiv addcmul asin asinh atan atan2 atanh bitwise_and bitwise_not
    bitwise_or bitwise_xor ceil celu clamp clamp_max clamp_min copy cos cosh div elu eq erf erfc exp exp2 expm1 fill
    floor floor_divide fmod ge gelu glu gt hardsigmoid hardswish hardtanh isfinite isinf isnan le leaky_relu lerp log
    log10 log1p log2 log_sigmoid logical_and logical_not logical_or logical_xor lt masked_fill maximum minimum mish mul
    nan_to_num ne neg pow prelu reciprocal relu relu6 remainder round rsqrt rsub selu sigmoid sign silu sin sinh
    softplus sqrt square sub tan tanh threshold trunc where
"""
_PRODUCTS: Final = """
    addmm addmv baddbmm bilinear bmm conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution
    cross dot einsum linear matmul mm mv outer scaled_dot_product_attention
"""
_NORMALISATIONS: Final = """
    _log_softmax _native_batch_norm_legit_no_training _softmax batch_norm cosine_similarity group_norm layer_norm
    linalg_vector_norm log_softmax native_group_norm native_layer_norm norm rms_norm softmax
"""
_REDUCTIONS: Final = """
    all amax amin any argmax argmin argsort cumprod cumsum diff logsumexp max mean min prod sort std sum topk var
    var_mean
"""
_RESAMPLING: Final = """
    _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
    adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d avg_pool1d avg_pool2d avg_pool3d channel_shuffle
    constant_pad_nd grid_sampler max_pool1d max_pool2d max_pool2d_with_indices max_pool3d pad pixel_shuffle
    pixel_unshuffle reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d upsample_bicubic2d
    upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d upsample_nearest3d upsample_trilinear3d
"""
_SELECTIONS: Final = """
    cat concat embedding expand_as flip gather index index_select repeat repeat_interleave reshape_as roll scatter
    select_scatter slice_scatter stack take_along_dim tile tril triu view_as
"""
_FACTORIES: Final = """
    arange eye full full_like linspace new_full new_ones new_zeros ones ones_like scalar_tensor zeros zeros_like
"""
FROM_SHAPES: Final = frozenset(_FACTORIES.split())
ALLOWED_OPERATORS: Final = frozenset().union(
    ALIASES,
    CONVERSIONS,
    PARTS,
    *(
        names.split()
        for names in (_ELEMENTWISE, _PRODUCTS, _NORMALISATIONS, _REDUCTIONS, _RESAMPLING, _SELECTIONS, _FACTORIES)
    ),
)
# Summed in another order on each run on a GPU; refused by name so that the error can say why.
_ORDER_DEPENDENT: Final = frozenset({
    "bincount", "histc", "index_add", "index_put", "index_reduce", "put", "scatter_add", "scatter_reduce",
    "aten.scatter.reduce", "aten.scatter.src", "aten.scatter.value_reduce",
})  # fmt: skip
# Not tagged as such, because the size may be given too; a wrong one is not checked on every device.
_SIZED_BY_VALUES: Final = frozenset({"aten.repeat_interleave.self_Tensor"})
# Arguments that make a functional schema random, or update statistics behind its back.
_MUST_BE_OFF: Final = frozenset({"dropout_p", "train", "training"})
# A sparse or pinned tensor is no part of a network.
_NOT_A_PROGRAMS_CHOICE: Final = frozenset({"layout", "pin_memory"})
# Tagged as random only because of an argument that must be off.
_RANDOM_BY_ARGUMENT: Final = frozenset({"scaled_dot_product_attention"})
# Tagged as value-dependent only for boolean indices; those are seen when shapes are computed.
_DYNAMIC_BY_ARGUMENT: Final = frozenset({"index"})


def find_operator(name: str) -> Any:
    """The overload of an allowed operator by its name in a program (`aten.add.Tensor`). ValueError with the reason why
    there is none.
    """
    parts = name.split(".")
    if len(parts) != 3 or parts[0] != "aten":
        raise ValueError("an operator is named aten.<name>.<overload>; no other namespace is executed")
    _, packet, overload = parts
    found = getattr(torch.ops.aten, packet, None) if packet.isidentifier() else None
    if packet not in ALLOWED_OPERATORS:
        known = getattr(found, overload, None) if found is not None and overload.isidentifier() else None
        reason = refusal(known) if known is not None else "torch knows no such operator"
        raise ValueError(f"operator {packet!r} is refused: {reason}")
    if found is None or overload not in found.overloads():
        raise ValueError(f"{packet!r} has no overload {overload!r}")
    operator = getattr(found, overload)
    if (reason := refusal(operator)) is not None:
        raise ValueError(f"refused: {reason}")
    return operator


def refusal(operator: Any) -> str | None:
    """Why a program may not call this operator of torch, or None where it may."""
    if not isinstance(operator, torch._ops.OpOverload):
        return "it is no operator of a fixed schema"
    schema, packet = operator._schema, operator._schema.name.removeprefix("aten::")
    tags = set(operator.tags)
    if operator.namespace != "aten":
        return f"it belongs to the namespace {operator.namespace!r}, and only aten's operators are the same everywhere"
    if schema.is_mutable:
        return "it writes to its operands"
    if torch.Tag.nondeterministic_seeded in tags and packet not in _RANDOM_BY_ARGUMENT:
        return "torch marks it as one that draws random numbers"
    dynamic = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    if (tags & dynamic and packet not in _DYNAMIC_BY_ARGUMENT) or str(operator) in _SIZED_BY_VALUES:
        return "its result's shape or control flow depends on the values in a tensor"
    if packet in _ORDER_DEPENDENT or str(operator) in _ORDER_DEPENDENT:
        return "it is not deterministic on every device"
    if packet not in ALLOWED_OPERATORS:
        return "it is not on the list of operators that a program may call (bsns.runtime.operator_policy)"
    if any(str(item.type) != "Tensor" for item in schema.returns):
        return "it gives something else than single tensors"
    return None


def unusable_argument(name: str, value: Any) -> str | None:
    """Why a program may not give this value to an operator's argument `name`, or None where it may."""
    if name in _MUST_BE_OFF and value not in (False, 0, 0.0):
        return f"{name} must be off; it makes results random or changes statistics"
    if name in _NOT_A_PROGRAMS_CHOICE and value is not None and value is not False:
        return f"{name} is not a program's choice"
    return None


class CheckedOperators(TorchDispatchMode):
    """While it is entered, every operator that runs, also one inside another, is checked before and after: ValueError
    for arguments that torch itself does not check enough, and for a result over `MAXIMUM_TENSOR_BYTES`.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        check = _ARGUMENT_CHECKS.get(func._schema.name.removeprefix("aten::"))
        if check is not None:
            given = dict(zip((item.name for item in func._schema.arguments), args)) | (kwargs or {})
            if (reason := check(given)) is not None:
                raise ValueError(f"{func}: {reason}")
        output = func(*args, **(kwargs or {}))
        for tensor in output if isinstance(output, tuple | list) else (output,):
            if isinstance(tensor, Tensor) and tensor.numel() * tensor.itemsize > MAXIMUM_TENSOR_BYTES:
                raise ValueError(
                    f"a tensor {list(tensor.shape)} of {tensor.numel() * tensor.itemsize} bytes, the limit is "
                    f"{MAXIMUM_TENSOR_BYTES}"
                )
        return output


def _checked_division(given: Mapping[str, Any]) -> str | None:
    operands = [given["self"], given["other"]]
    whole = not any(item.is_floating_point() if isinstance(item, Tensor) else type(item) is float for item in operands)
    # The smallest integer divided by -1 stops the processor.
    if whole and given.get("rounding_mode") == "trunc":
        return "integers are divided with rounding_mode='floor' or none"
    return None


def _checked_pool(given: Mapping[str, Any]) -> str | None:
    divisor = given.get("divisor_override")
    return None if divisor is None or divisor > 0 else f"divisor_override is {divisor}, expected at least 1"


def _checked_batch_norm(given: Mapping[str, Any]) -> str | None:
    # torch's kernel reads as many values as there are channels, whatever the length of these.
    channels = given["input"].shape[1] if given["input"].ndim >= 2 else None
    for name in ("weight", "bias", "running_mean", "running_var"):
        if given[name] is not None and tuple(given[name].shape) != (channels,):
            return f"{name} has shape {list(given[name].shape)}, expected one value for each channel of the input"
    return None


def _checked_grid(given: Mapping[str, Any]) -> str | None:
    # In three dimensions other modes leave the result uninitialised.
    if given["interpolation_mode"] not in (0, 1, 2) or given["padding_mode"] not in (0, 1, 2):
        return "interpolation_mode and padding_mode are 0, 1 or 2"
    return None


def _checked_scales(given: Mapping[str, Any]) -> str | None:
    for name, scale in given.items():
        # Written so that NaN is refused too.
        if name.startswith("scales") and scale is not None and not 1 / _MAXIMUM_SCALE <= scale <= _MAXIMUM_SCALE:
            return f"{name} is {scale}, expected 1/{_MAXIMUM_SCALE} to {_MAXIMUM_SCALE}"
    return None


# Arguments that torch's kernels take unchecked although they read other memory or stop the process with them.
_ARGUMENT_CHECKS: Final[Mapping[str, Callable[[Mapping[str, Any]], str | None]]] = {
    "_native_batch_norm_legit_no_training": _checked_batch_norm,
    "avg_pool2d": _checked_pool,
    "avg_pool3d": _checked_pool,
    "div": _checked_division,
    "grid_sampler_2d": _checked_grid,
    "grid_sampler_3d": _checked_grid,
    **{name: _checked_scales for name in _RESAMPLING.split() if name.startswith("upsample_")},
}
