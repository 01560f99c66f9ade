"""Capture of any `torch.export`-able module as a graph of operators that can be cut anywhere.

Owns the way from a module to a `Program` (what is computed) and a `ModelGraph` (what it costs). Promises that the
program gives the module's own outputs on the example, that a parameter tied in several places is one parameter, and
that whatever cannot be captured or cut is refused with a `CaptureError` that names the operator and the reason. Does
not choose cuts and does not write model folders (`bsns.runtime.exported_models`).

Costs are stated for one row: with the dimension `batch` at 1, every other dimension as in the example. Work is what
`torch.utils.flop_counter` counts; an operator it has no formula for counts one operation for each value it gives.
"""

import inspect
import operator as python_operator
import statistics
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import sympy  # type: ignore[import-untyped]
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._sympy import functions as sympy_functions
from torch.utils.flop_counter import FlopCounterMode

from bsns.protocol.model_graph import ModelGraph, Operator, Parameter
from bsns.protocol.model_graph import Tensor as GraphTensor
from bsns.runtime.operator_policy import refusal
from bsns.runtime.program import (
    BATCH,
    MAXIMUM_DIMENSION,
    Argument,
    Call,
    Dimension,
    Program,
    ProgramError,
    ProgramSlice,
    Size,
    Value,
    dtype_name,
    encode_argument,
    runs_without_data,
)

_TIMED_RUNS: Final = 3
# How far the program may lie from the module on the example, relative to the largest output.
_TOLERANCE: Final = 1e-5
# Give lists of views; each piece becomes a slice of its own.
_SPLITS: Final = frozenset({"chunk", "split", "split_with_sizes", "tensor_split", "unsafe_chunk", "unsafe_split"})
# A view depends on how its operand lies in memory, which is another after a cut or on another device; a reshape copies
# where it must.
_RESHAPES: Final = frozenset({"_reshape_alias", "_unsafe_view", "view"})
# Checks of sizes or devices that the program's own bounds replace.
_ASSERTIONS: Final = frozenset({
    "_assert_scalar", "_assert_tensor_metadata", "sym_constrain_range", "sym_constrain_range_for_size",
})  # fmt: skip


class CaptureError(ValueError):
    """A module cannot be captured. The message names the operator and the reason."""


@dataclass(frozen=True)
class CapturedModel:
    """A captured module: its costs, its calls, and the tensors of `program.parameters` by name."""

    graph: ModelGraph
    program: Program
    parameters: Mapping[str, Tensor]

    def slice(self, order: Sequence[int], first: int, end: int) -> ProgramSlice:
        """The operators `order[first:end]`, ready to run."""
        return ProgramSlice(self.program, self.parameters, order, first, end)


def capture(
    module: nn.Module,
    example_inputs: tuple[Tensor, ...],
    *,
    dynamic_shapes: Sequence[Mapping[int, Any] | None] | None = None,
    name: str = "captured",
) -> CapturedModel:
    """Captures `module`, which is put into evaluation mode, as it computes on `example_inputs` (positional tensors on
    the CPU, as the module's own).

    `dynamic_shapes` gives for each input which of its dimensions are `torch.export.Dim`s; the same Dim may stand in
    several inputs, and an example's size there must be at least 2; `batch` must be allowed to be 1. Every other size is
    fixed. What depends on no input
    becomes no operator: it is computed again in each slice that needs it, and its parameters count for each operator
    that uses it; so do views that keep their size. Raises `CaptureError`.
    """
    if not all(isinstance(item, Tensor) for item in example_inputs):
        raise CaptureError("example_inputs are tensors in the order of forward's arguments; wrap the module if need be")
    if dynamic_shapes is not None and len(dynamic_shapes) != len(example_inputs):
        raise CaptureError(f"dynamic_shapes has {len(dynamic_shapes)} entries for {len(example_inputs)} inputs")
    named = [(f"input {number}", tensor) for number, tensor in enumerate(example_inputs)]
    for place, tensor in (*named, *module.named_parameters(), *module.named_buffers()):
        if tensor.device.type != "cpu" or tensor.layout != torch.strided:
            raise CaptureError(f"{place} is {tensor.layout} on {tensor.device}; capture needs dense tensors on the CPU")
    module = module.eval()
    exported = _exported(module, example_inputs, dynamic_shapes)
    try:
        translation = _Translation(exported, dynamic_shapes)
        program = translation.program()
        parameters = {value.name: translation.tensors[value.name] for value in program.parameters}
        _compare_with_module(module, example_inputs, program, parameters, translation.outputs)
        sizes = _example_sizes(program, example_inputs)
        # Costs are stated for one row.
        one_row = {key: 1 if key == BATCH else size for key, size in sizes.items()}
        program.check_shapes(one_row)
        graph = _costed(name, program, parameters, one_row, _narrowed(program, example_inputs, one_row))
    except ProgramError as error:
        raise CaptureError(str(error)) from error
    return CapturedModel(graph, program, parameters)


def _exported(
    module: nn.Module, example_inputs: tuple[Tensor, ...], dynamic_shapes: Sequence[Mapping[int, Any] | None] | None
) -> torch.export.ExportedProgram:
    shapes = None if dynamic_shapes is None else tuple(None if item is None else dict(item) for item in dynamic_shapes)
    try:
        # torch's own export calls interfaces that it has marked as outdated.
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            exported = torch.export.export(module, example_inputs, dynamic_shapes=_for_signature(module, shapes))
            # An empty table: mutation inside the module is made functional, composite operators stay whole.
            functional: torch.export.ExportedProgram = exported.run_decompositions({})
            return functional
    except Exception as error:  # torch raises many kinds, all of them about what cannot be exported
        raise CaptureError(f"torch.export cannot capture the module: {_first_lines(error)}") from error


def _for_signature(module: nn.Module, shapes: tuple[Any, ...] | None) -> Any:
    # A forward(*tensors) has one argument, which holds them all.
    if shapes is None:
        return None
    kinds = [parameter.kind for parameter in inspect.signature(module.forward).parameters.values()]
    return (shapes,) if kinds == [inspect.Parameter.VAR_POSITIONAL] else shapes


def _first_lines(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = " ".join(lines[:2]) or type(error).__name__
    place = next((line for line in lines if line.startswith("Caused by:") or '.py", line' in line), "")
    kind = "data-dependent control flow: " if "data-dependent" in str(error).lower() else ""
    return f"{kind}{text} {place}".strip()[:600]


class _Translation:
    """From an exported graph to the parts of a program."""

    def __init__(
        self, exported: torch.export.ExportedProgram, dynamic_shapes: Sequence[Mapping[int, Any] | None] | None
    ) -> None:
        self.tensors: dict[str, Tensor] = {}
        # As the module gives them: one may stand there twice.
        self.outputs: tuple[str, ...] = ()
        self._symbols: dict[sympy.Symbol, str] = {}
        self._references: dict[Any, Argument] = {}
        self._values: dict[str, Value] = {}
        self._inputs: list[Value] = []
        self._parameters: dict[str, Value] = {}
        self._calls: list[Call] = []
        self._dimensions: list[Dimension] = []
        self._read_signature(exported, dynamic_shapes)
        for node in exported.graph.nodes:
            if node.op == "call_function":
                self._read_call(node)
            elif node.op == "output":
                self._read_outputs(exported, node)
            elif node.op == "get_attr":
                raise CaptureError(f"{node.name}: the graph holds a part of its own ({node.target}); it cannot be cut")

    def program(self) -> Program:
        """The program, without what nothing depends on."""
        outputs = tuple(dict.fromkeys(self.outputs))
        calls, needed = [], set(outputs)
        for call in reversed(self._calls):
            kept = tuple(value if value is not None and value.name in needed else None for value in call.results)
            if any(kept):
                calls.append(replace(call, results=kept))
                needed |= _referred(call, "value")
        calls.reverse()
        used = set().union(*(_referred(call, "parameter") for call in calls))
        inputs = tuple(self._inputs)
        parameters = tuple(self._parameters[name] for name in sorted(used))
        return Program(tuple(self._dimensions), inputs, parameters, tuple(calls), outputs)

    def _read_signature(
        self, exported: torch.export.ExportedProgram, dynamic_shapes: Sequence[Mapping[int, Any] | None] | None
    ) -> None:
        signature = exported.graph_signature
        if mutated := [*signature.buffers_to_mutate.values(), *signature.user_inputs_to_mutate.values()]:
            raise CaptureError(f"the module writes to {mutated} while it runs; a slice keeps no state between runs")
        kinds = torch.export.graph_signature.InputKind
        placeholders = {node.name: node for node in exported.graph.nodes if node.op == "placeholder"}
        # Before any size is read: one input's size may be made of another's.
        given = [spec.arg.name for spec in signature.input_specs if spec.kind == kinds.USER_INPUT]
        for name, declared in zip(given, dynamic_shapes or ()):
            for place, dimension in (declared or {}).items():
                self._name_dimension(exported, placeholders[name].meta["val"].shape[place], dimension)
        names_by_storage: dict[Any, str] = {}
        for spec in signature.input_specs:
            node = placeholders[spec.arg.name]
            if spec.kind == kinds.USER_INPUT:
                fake = node.meta.get("val")
                if not isinstance(fake, Tensor):
                    raise CaptureError(f"input {node.name} is no tensor")
                self._inputs.append(self._value(node.name, fake))
                self._references[node] = {"value": node.name}
            elif spec.kind in (kinds.PARAMETER, kinds.BUFFER, kinds.CONSTANT_TENSOR):
                target = str(spec.target)
                found = exported.constants if target not in exported.state_dict else exported.state_dict
                tensor = found[target].detach()
                # Tied parameters are one: same memory seen the same way.
                key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype)
                name = names_by_storage.setdefault(key, target) if tensor.numel() else target
                self.tensors.setdefault(name, tensor)
                self._parameters[name] = self._value(name, tensor)
                self._references[node] = {"parameter": name}
            else:
                raise CaptureError(f"input {node.name} is a {spec.kind.name.lower()}, which no file can hold")

    def _name_dimension(self, exported: torch.export.ExportedProgram, size: Any, dimension: Any) -> None:
        if dimension is None or not isinstance(size, torch.SymInt):
            return
        symbol = size.node.expr
        if not isinstance(symbol, sympy.Symbol) or symbol in self._symbols:
            return
        bounds = exported.range_constraints[symbol]
        name = getattr(dimension, "__name__", str(symbol))
        upper = min(int(bounds.upper), MAXIMUM_DIMENSION) if bounds.upper.is_Integer else MAXIMUM_DIMENSION
        self._symbols[symbol] = name
        self._dimensions.append(Dimension(name, max(1, int(bounds.lower)), upper))

    def _read_call(self, node: Any) -> None:
        target, found = node.target, node.meta.get("val")
        if target is python_operator.getitem:
            self._read_piece(node)
            return
        if not isinstance(target, torch._ops.OpOverload):
            if isinstance(found, torch.SymInt | torch.SymBool | torch.SymFloat | int | float | bool):
                return  # arithmetic of sizes: each use says it as an expression of dimensions
            raise CaptureError(f"{node.name} ({target}): {refusal(target)}")
        packet = target._schema.name.removeprefix("aten::")
        if packet in _ASSERTIONS or isinstance(found, torch.SymInt | torch.SymBool | torch.SymFloat):
            if isinstance(found, torch.SymInt) and torch.Tag.data_dependent_output in target.tags:
                raise CaptureError(f"{node.name} ({target}): {refusal(target)}")
            return
        if target.namespace == "aten" and (packet in _SPLITS or packet == "unbind"):
            return  # its pieces are read one by one
        if packet in _RESHAPES and isinstance(node.args[1], list | tuple):
            arguments = tuple(self._argument(node, item) for item in node.args[:2])
            self._references[node] = {"value": node.name}
            self._calls.append(Call("aten.reshape.default", arguments, (), (self._value(node.name, found),)))
            return
        if (reason := refusal(target)) is not None:
            raise CaptureError(f"{node.name} ({target}) cannot be captured: {reason}")
        given = found if isinstance(found, tuple | list) else (found,)
        if not all(isinstance(item, Tensor) for item in given):
            raise CaptureError(f"{node.name} ({target}) gives something else than tensors")
        if len(target._schema.returns) == 1:
            results: tuple[Value | None, ...] = (self._value(node.name, given[0]),)
            self._references[node] = {"value": node.name}
        else:
            results = tuple(self._value(f"{node.name}.{index}", item) for index, item in enumerate(given))
        self._calls.append(
            Call(
                operator=str(target),
                arguments=tuple(self._argument(node, item) for item in node.args),
                keywords=tuple(
                    sorted(
                        (key, self._argument(node, item))
                        for key, item in node.kwargs.items()
                        if item is not None and key not in ("layout", "pin_memory")
                    )
                ),
                results=results,
            )
        )

    def _read_piece(self, node: Any) -> None:
        source, index = node.args
        target = source.target
        packet = target._schema.name.removeprefix("aten::") if isinstance(target, torch._ops.OpOverload) else ""
        if packet not in _SPLITS and packet != "unbind":
            self._references[node] = {"value": f"{source.name}.{index}"}
            return
        operand, pieces = self._argument(source, source.args[0]), source.meta["val"]
        bound = dict(zip((item.name for item in target._schema.arguments), source.args)) | source.kwargs
        dimension = bound.get("dim", 0) % source.args[0].meta["val"].ndim
        arguments: tuple[Argument, ...]
        if packet == "unbind":
            operator, arguments = "aten.select.int", (operand, dimension, index)
        else:
            start = sum((piece.shape[dimension] for piece in pieces[:index]), 0)
            end = start + pieces[index].shape[dimension]
            operator = "aten.slice.Tensor"
            arguments = (operand, dimension, self._argument(node, start), self._argument(node, end))
        self._references[node] = {"value": node.name}
        self._calls.append(Call(operator, arguments, (), (self._value(node.name, pieces[index]),)))

    def _read_outputs(self, exported: torch.export.ExportedProgram, node: Any) -> None:
        outputs = []
        kinds = torch.export.graph_signature.OutputKind
        for spec, item in zip(exported.graph_signature.output_specs, node.args[0], strict=True):
            if item is None:
                continue
            reference = self._references.get(item) if isinstance(item, torch.fx.Node) else None
            if spec.kind != kinds.USER_OUTPUT or reference is None or "value" not in reference:
                raise CaptureError(f"output {item} is no tensor that an operator makes")
            outputs.append(str(reference["value"]))
        self.outputs = tuple(outputs)

    def _argument(self, node: Any, item: Any) -> Argument:
        if isinstance(item, torch.fx.Node):
            if item in self._references:
                return self._references[item]
            found = item.meta.get("val")
            if not isinstance(found, torch.SymInt | int) or isinstance(found, bool):
                raise CaptureError(f"{node.name} ({node.target}) reads {item.name}, which is no tensor and no size")
            return self._argument(node, found)
        if isinstance(item, tuple | list):
            return [self._argument(node, entry) for entry in item]
        if isinstance(item, torch.SymInt):
            size = self._size(item, node.name)
            return size if isinstance(size, int) else {"size": size}
        try:
            return encode_argument(item)
        except ProgramError as error:
            raise CaptureError(f"{node.name} ({node.target}): {error}") from error

    def _value(self, name: str, fake: Tensor) -> Value:
        try:
            return Value(name, dtype_name(fake.dtype), tuple(self._size(size, name) for size in fake.shape))
        except ProgramError as error:
            raise CaptureError(f"{name}: {error}") from error

    def _size(self, size: Any, where: str) -> Size:
        return size if isinstance(size, int) else self._expression(size.node.expr, where)

    def _expression(self, expression: sympy.Expr, where: str) -> Size:
        if isinstance(expression, sympy.Integer):
            return int(expression)
        if isinstance(expression, sympy.Symbol):
            if expression not in self._symbols:
                raise CaptureError(
                    f"{where}: its size {expression} depends on the values in a tensor, or on a dimension that no "
                    "input has by itself"
                )
            return self._symbols[expression]
        if isinstance(expression, sympy.Pow) and isinstance(expression.exp, sympy.Integer) and int(expression.exp) > 1:
            return ["*", *[self._expression(expression.base, where)] * int(expression.exp)]
        names = {
            sympy.Add: "+", sympy.Mul: "*", sympy_functions.FloorDiv: "//", sympy_functions.CleanDiv: "//",
            sympy_functions.Mod: "%", sympy_functions.PythonMod: "%", sympy_functions.Max: "max",
            sympy_functions.Min: "min",
        }  # fmt: skip
        for kind, sign in names.items():
            if isinstance(expression, kind):
                return [sign, *(self._expression(item, where) for item in expression.args)]
        raise CaptureError(f"{where}: its size {expression} is no sum, product or quotient of dimensions")


def _referred(call: Call, kind: str) -> set[str]:
    found: set[str] = set()
    for item in pytree.tree_leaves(
        [call.arguments, [argument for _, argument in call.keywords]], is_leaf=lambda leaf: isinstance(leaf, dict)
    ):
        if isinstance(item, dict) and kind in item:
            found.add(item[kind])
    return found


def _example_sizes(program: Program, example_inputs: tuple[Tensor, ...]) -> dict[str, int]:
    return {
        declared: int(actual)
        for value, tensor in zip(program.inputs, example_inputs, strict=True)
        for declared, actual in zip(value.shape, tensor.shape, strict=True)
        if isinstance(declared, str)
    }


def _narrowed(program: Program, example_inputs: tuple[Tensor, ...], sizes: Mapping[str, int]) -> dict[str, Tensor]:
    narrowed = {}
    for value, tensor in zip(program.inputs, example_inputs, strict=True):
        for place, size in enumerate(value.sizes_at(sizes)):
            tensor = tensor.narrow(place, 0, size)
        narrowed[value.name] = tensor.detach().clone()
    return narrowed


def _compare_with_module(
    module: nn.Module,
    example_inputs: tuple[Tensor, ...],
    program: Program,
    parameters: Mapping[str, Tensor],
    outputs: Sequence[str],
) -> None:
    with torch.no_grad():
        expected = [item for item in pytree.tree_leaves(module(*example_inputs)) if isinstance(item, Tensor)]
    whole = ProgramSlice(program, parameters, range(program.operator_count), 0, program.operator_count)
    given = {value.name: tensor for value, tensor in zip(program.inputs, example_inputs, strict=True)}
    found = whole.run({name: given[name] for name in whole.carried_in})
    for name, wanted in zip(outputs, expected, strict=True):
        if not _equal(found[name], wanted):
            raise CaptureError(
                f"output {name} of the captured program is not the module's; the module is not deterministic, or it "
                "computes differently while it is exported"
            )


def _equal(found: Tensor, wanted: Tensor) -> bool:
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    finite = wanted[wanted.isfinite()]
    scale = max(1.0, float(finite.abs().max())) if wanted.is_floating_point() and finite.numel() else 1.0
    return torch.allclose(found, wanted, rtol=0, atol=_TOLERANCE * scale, equal_nan=True)


def _costed(
    name: str,
    program: Program,
    parameters: Mapping[str, Tensor],
    sizes: Mapping[str, int],
    inputs: Mapping[str, Tensor],
) -> ModelGraph:
    structure, values = program.structure, program.values
    work = _work(program, sizes)
    ticks = _nanoseconds(program, parameters, inputs)
    index_of = {value.name: index for index, value in enumerate(program.parameters)}
    operators = []
    for number, calls in enumerate(structure.operators):
        touched = {*structure.reads[number]}
        touched |= {value.name for call in calls for value in program.calls[call].results if value is not None}
        label = program.operator_name(number)
        operators.append(
            Operator(
                name=label,
                timing_key=label,
                work=sum(work[call] for call in calls),
                parameters=tuple(sorted(index_of[item] for item in structure.parameters[number])),
                peak_bytes=sum(values[item].bytes_at(sizes) for item in touched),
                nanoseconds=ticks[number],
            )
        )
    tensors = tuple(
        GraphTensor(
            name=item,
            producer=structure.producer[item],
            consumers=structure.consumers[item],
            size_bytes=values[item].bytes_at(sizes),
            is_output=item in structure.output_bases,
        )
        for item in values
        if item in structure.producer
    )
    weights = tuple(Parameter(value.name, value.bytes_at({})) for value in program.parameters)
    return ModelGraph(name, tuple(operators), tensors, weights)


def _work(program: Program, sizes: Mapping[str, int]) -> dict[int, int]:
    """Floating-point operations of each call that belongs to an operator."""
    owned = {call for calls in program.structure.operators for call in calls}
    anchors = {calls[0] for calls in program.structure.operators}
    work = dict.fromkeys(owned, 0)
    for number, run in runs_without_data(program, sizes):
        if number not in owned:
            run()
            continue
        with FlopCounterMode(display=False) as counter:
            run()
        counted = counter.get_total_flops()
        if counted == 0 and number in anchors:
            results = (value for value in program.calls[number].results if value is not None)
            counted = max(_count(value, sizes) for value in results)
        work[number] = counted
    return work


def _count(value: Value, sizes: Mapping[str, int]) -> int:
    count = 1
    for size in value.sizes_at(sizes):
        count *= size
    return count


def _nanoseconds(program: Program, parameters: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> list[int]:
    """Median time of each operator; what belongs to none counts for the next operator that runs."""
    count = program.operator_count
    whole = ProgramSlice(program, parameters, range(count), 0, count)
    owner = {call: number for number, calls in enumerate(program.structure.operators) for call in calls}
    samples: list[list[int]] = [[] for _ in range(count)]
    for run in range(_TIMED_RUNS + 1):
        _, ticks = whole.timed_run(inputs, time.perf_counter_ns)
        sums, pending = [0] * count, 0
        for call, nanoseconds in ticks:
            pending += nanoseconds
            if call in owner:
                sums[owner[call]] += pending
                pending = 0
        if run > 0:  # the first run warms caches up
            for number, total in enumerate(sums):
                samples[number].append(total)
    return [int(statistics.median(items)) for items in samples]
