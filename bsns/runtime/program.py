"""A captured network as a list of operator calls, and the execution of any slice of it.

Owns `Program` (what is computed, as canonical JSON) and `ProgramSlice` (runs some of a program's operators and hands
over exactly the tensors that later slices need). Promises that a program which parses can at worst compute something
useless, for as long as its calls take: every call names an operator that `bsns.runtime.operator_policy` allows, so none
draws random numbers, writes to its inputs, reads files or chooses its output's shape by values, and no tensor is larger
than a named limit. Parameters are named here and live in safetensors files; nothing is ever unpickled. Does not capture
(`bsns.runtime.capture`) and does not read model folders (`bsns.runtime.program_executor`).

How calls become operators of the graph: a call that depends on no model input (a mask from shapes, a transposed weight)
belongs to no operator and is computed again in every slice that needs it; so is a view that keeps or enlarges its
operand (reshape, permute, expand), from the tensor it looks at, which is what crosses a cut. A view that takes a part
of a tensor (select, slice) belongs to the operator that made the tensor, so that only the part crosses a cut. Every
other call is an operator of its own.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Final, cast

import torch
from torch import Tensor

from bsns.protocol.bounded_json import parse_json
from bsns.runtime.operator_policy import (
    ALIASES,
    CONVERSIONS,
    FROM_SHAPES,
    MAXIMUM_TENSOR_BYTES,
    PARTS,
    CheckedOperators,
    find_operator,
    unusable_argument,
)

PROGRAM_FORMAT: Final = 1
# The dimension that counts rows which are computed together.
BATCH: Final = "batch"
# A program is fetched from strangers; the largest captured here (a decoder of 30 blocks) has 1 MB.
MAXIMUM_PROGRAM_BYTES: Final = 16 * 1024 * 1024
MAXIMUM_CALLS: Final = 65_536
MAXIMUM_DIMENSION: Final = 1 << 20
_MAXIMUM_NESTING: Final = 16
_MAXIMUM_LIST: Final = 4096
_MAXIMUM_NAME: Final = 256
# Sizes, and every number on the way to one, stay below.
_MAXIMUM_SIZE: Final = 1 << 62
# Summed over calls: the parameters that each needs, through calls of no operator too. In a chain of such calls the sum
# grows with the square of its length.
_MAXIMUM_SHARED_PARAMETERS: Final = 1 << 22
# How many different sizes a program remembers as checked.
_MAXIMUM_CHECKED: Final = 1024

_DTYPES: Final[dict[str, torch.dtype]] = {
    name: getattr(torch, name)
    for name in (
        "bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64",
    )
}  # fmt: skip
_DTYPE_NAMES: Final = {dtype: name for name, dtype in _DTYPES.items()}
_MEMORY_FORMATS: Final[dict[str, torch.memory_format]] = {
    name: getattr(torch, name) for name in ("contiguous_format", "preserve_format", "channels_last", "channels_last_3d")
}
_MEMORY_FORMAT_NAMES: Final = {value: name for name, value in _MEMORY_FORMATS.items()}
_SPECIAL_FLOATS: Final = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


_SIZE_OPERATIONS: Final[Mapping[str, Callable[[Sequence[int]], int]]] = {
    "+": sum, "*": math.prod, "max": max, "min": min,
    "//": lambda operands: operands[0] // operands[1], "%": lambda operands: operands[0] % operands[1],
}  # fmt: skip


class ProgramError(ValueError):
    """A program, a slice of it or its tensors are not usable. The message names the call or tensor and the rule."""


Size = Any
"""An integer as JSON: a number, the name of a dimension, or ["+" | "*" | "//" | "%" | "max" | "min", a, b, ...]."""

Argument = Any
"""An argument as JSON: null, true, false, a number, a string, a list of arguments, or an object of one key:
{"value": name}, {"parameter": name}, {"size": Size}, {"dtype": name}, {"memory_format": name}, {"float": "inf"},
{"device": "own"} (the device of whoever executes).
"""


@dataclass(frozen=True, slots=True)
class Dimension:
    """A size that differs between runs, such as `batch`: at least `minimum`, at most `maximum`."""

    name: str
    minimum: int
    maximum: int


@dataclass(frozen=True, slots=True)
class Value:
    """A tensor by name, with its dtype (`float32`) and shape; sizes may depend on dimensions."""

    name: str
    dtype: str
    shape: tuple[Size, ...]

    def sizes_at(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """The shape where the dimensions have these sizes."""
        return tuple(evaluate_size(size, sizes) for size in self.shape)

    def bytes_at(self, sizes: Mapping[str, int]) -> int:
        """Bytes of the tensor where the dimensions have these sizes."""
        return math.prod(self.sizes_at(sizes)) * _DTYPES[self.dtype].itemsize


@dataclass(frozen=True, slots=True)
class Call:
    """One call of an operator (`aten.conv2d.default`); `results` has an entry for each tensor that the operator gives,
    None where nobody reads it.
    """

    operator: str
    arguments: tuple[Argument, ...]
    keywords: tuple[tuple[str, Argument], ...]
    results: tuple[Value | None, ...]

    @property
    def packet(self) -> str:
        """The operator's name without namespace and overload."""
        return self.operator.split(".")[1]

    @property
    def name(self) -> str:
        """What errors and graphs call it: its first result that somebody reads."""
        return next((value.name for value in self.results if value is not None), self.operator)


@dataclass(frozen=True, slots=True)
class Structure:
    """What a program's calls are to a planner.

    `operators`: for each operator its calls, ascending. `reads`: for each operator the tensors of other operators and
    inputs that it reads. `parameters`: for each operator what it needs, through recomputed calls too. `producer` and
    `consumers`: of each tensor that can cross a cut (model inputs have producer -1). `output_bases`: what must be
    carried to the end for the outputs.
    """

    operators: tuple[tuple[int, ...], ...]
    reads: tuple[frozenset[str], ...]
    parameters: tuple[frozenset[str], ...]
    producer: Mapping[str, int]
    consumers: Mapping[str, tuple[int, ...]]
    output_bases: frozenset[str]


@dataclass(frozen=True)
class Program:
    """A network as operator calls, in an order in which every call finds its operands made.

    `inputs` and `outputs` are the model's; `parameters` what the calls name, with static shapes; `cuts` the places in
    the order of operators where a model folder is cut into units (ascending, empty for a program that is not cut).
    """

    dimensions: tuple[Dimension, ...]
    inputs: tuple[Value, ...]
    parameters: tuple[Value, ...]
    calls: tuple[Call, ...]
    outputs: tuple[str, ...]
    cuts: tuple[int, ...] = ()
    format: int = PROGRAM_FORMAT

    def __post_init__(self) -> None:
        if type(self.format) is not int or self.format != PROGRAM_FORMAT:
            raise ProgramError(f"program format is {self.format!r}, this release reads {PROGRAM_FORMAT}")
        if len(self.calls) > MAXIMUM_CALLS:
            raise ProgramError(f"a program of {len(self.calls)} calls, the limit is {MAXIMUM_CALLS}")
        dimensions = [dimension.name for dimension in self.dimensions]
        for dimension in self.dimensions:
            _require_name(dimension.name, "dimension")
            if not 1 <= dimension.minimum <= dimension.maximum <= MAXIMUM_DIMENSION:
                raise ProgramError(
                    f"dimension {dimension.name}: from {dimension.minimum} to {dimension.maximum}, expected bounds "
                    f"from 1 to {MAXIMUM_DIMENSION}"
                )
        if len(set(dimensions)) != len(dimensions):
            raise ProgramError("two dimensions have one name")
        parameters: set[str] = set()
        for value in self.parameters:
            _define(value, parameters, frozenset(), "parameter")
        known: set[str] = set()
        for value in self.inputs:
            _define(value, known, frozenset(dimensions), "input")
        for number, call in enumerate(self.calls):
            where = f"call {number} ({call.operator!r:.80})"
            _check_call(call, where)
            for argument in (*call.arguments, *(item for _, item in call.keywords)):
                _check_argument(argument, known, parameters, frozenset(dimensions), where)
            for result in call.results:
                if result is not None:
                    _define(result, known, frozenset(dimensions), where)
        for name in self.outputs:
            if name not in known:
                raise ProgramError(f"output {name!r} is made by no call")
        if not self.inputs or not self.outputs:
            raise ProgramError("a program has at least one input and one output")
        if not self.structure.operators:
            raise ProgramError("no call depends on an input: there is nothing to execute")
        count = len(self.structure.operators)
        if self.cuts and (list(self.cuts) != sorted(set(self.cuts)) or self.cuts[0] < 1 or self.cuts[-1] >= count):
            raise ProgramError(f"cuts {list(self.cuts)!r:.80} are not ascending places within {count} operators")

    def to_bytes(self) -> bytes:
        """Canonical UTF-8 JSON: sorted keys, no spaces."""
        document = {
            "format": self.format,
            "dimensions": [[item.name, item.minimum, item.maximum] for item in self.dimensions],
            "inputs": [_value_to_json(value) for value in self.inputs],
            "parameters": [_value_to_json(value) for value in self.parameters],
            "calls": [
                [
                    call.operator,
                    list(call.arguments),
                    dict(call.keywords),
                    [None if value is None else _value_to_json(value) for value in call.results],
                ]
                for call in self.calls
            ],
            "outputs": list(self.outputs),
            "cuts": list(self.cuts),
        }
        return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> "Program":
        """Parses and checks a program from anyone: operators, names, and every tensor's shape where each dimension is
        at its minimum. Raises `ProgramError`.
        """
        if len(data) > MAXIMUM_PROGRAM_BYTES:
            raise ProgramError(f"a program of {len(data)} bytes, the limit is {MAXIMUM_PROGRAM_BYTES}")
        try:
            document = parse_json(data)
        except ValueError as error:
            raise ProgramError(f"program is not UTF-8 JSON: {error}") from error
        fields = {"format", "dimensions", "inputs", "parameters", "calls", "outputs", "cuts"}
        if not isinstance(document, dict) or set(document) != fields:
            raise ProgramError(f"program is not an object of {sorted(fields)}")
        for name in sorted(fields - {"format"}):
            if not isinstance(document[name], list):
                raise ProgramError(f"{name} is not a list")
        if len(document["calls"]) > MAXIMUM_CALLS:
            raise ProgramError(f"a program of {len(document['calls'])} calls, the limit is {MAXIMUM_CALLS}")
        if not all(isinstance(cut, int) and not isinstance(cut, bool) for cut in document["cuts"]):
            raise ProgramError("cuts are not integers")
        if not all(isinstance(name, str) for name in document["outputs"]):
            raise ProgramError("outputs are not names")
        program = cls(
            dimensions=tuple(_dimension_from_json(item) for item in document["dimensions"]),
            inputs=tuple(_value_from_json(item, "inputs") for item in document["inputs"]),
            parameters=tuple(_value_from_json(item, "parameters") for item in document["parameters"]),
            calls=tuple(_call_from_json(item, number) for number, item in enumerate(document["calls"])),
            outputs=tuple(document["outputs"]),
            cuts=tuple(document["cuts"]),
            format=document["format"],
        )
        if program.to_bytes() != data:
            raise ProgramError("program bytes are not canonical (sorted keys, no spaces); use to_bytes()")
        program.check_shapes({dimension.name: dimension.minimum for dimension in program.dimensions})
        return program

    @cached_property
    def structure(self) -> Structure:
        """The operators and what flows between them (see the module's text for how calls become operators)."""
        return _structure(self)

    @cached_property
    def values(self) -> Mapping[str, Value]:
        """Inputs and results by name, in the order in which they are made."""
        made = (value for call in self.calls for value in call.results if value is not None)
        return {value.name: value for value in (*self.inputs, *made)}

    @property
    def operator_count(self) -> int:
        """Operators of the graph: fewer than calls."""
        return len(self.structure.operators)

    def operator_name(self, operator: int) -> str:
        """Name of an operator: that of the call which it is made around."""
        return self.calls[self.structure.operators[operator][0]].name

    def carried(self, order: Sequence[int], position: int) -> tuple[str, ...]:
        """The tensors that cross the cut after the first `position` operators of `order`, in the order in which the
        program makes them: what later operators and the outputs still need. At the start these are the inputs that
        somebody reads, at the end the outputs.
        """
        if position == len(order):
            return self.outputs
        place = _places(order, self.operator_count)
        structure = self.structure
        return tuple(
            name
            for name in self.values
            if name in structure.producer
            and _place_of(structure.producer[name], place) < position
            and (
                name in structure.output_bases
                or any(place[consumer] >= position for consumer in structure.consumers[name])
            )
        )

    def in_order(self, order: Sequence[int], cuts: Sequence[int] = ()) -> "Program":
        """The same program with its calls listed so that operator `order[i]` becomes operator i, cut at `cuts`."""
        _places(order, self.operator_count)
        listed: dict[int, None] = {}
        for operator in order:
            for number in self.structure.operators[operator]:
                listed |= dict.fromkeys(self.with_recomputed([number]))
        listed |= dict.fromkeys(self.with_recomputed(self.output_calls))
        return Program(
            self.dimensions,
            self.inputs,
            self.parameters,
            tuple(self.calls[number] for number in listed),
            self.outputs,
            tuple(cuts),
        )

    @cached_property
    def made_by(self) -> Mapping[str, int]:
        """For each result the call that makes it."""
        return {
            value.name: number for number, call in enumerate(self.calls) for value in call.results if value is not None
        }

    @property
    def output_calls(self) -> tuple[int, ...]:
        """The calls that make the outputs and belong to no operator: views of what operators made."""
        owned = self._owned
        calls = (self.made_by.get(name) for name in self.outputs)
        return tuple(call for call in calls if call is not None and call not in owned)

    def with_recomputed(self, wanted: Iterable[int]) -> list[int]:
        """The calls `wanted` and, each before the call that needs it, the calls of no operator that they need."""
        found: dict[int, None] = {}
        pending = [(number, False) for number in reversed(list(wanted))]
        while pending:
            number, visited = pending.pop()
            if visited:
                found[number] = None
            elif number not in found:
                pending.append((number, True))
                makers = (self.made_by.get(name) for name in self.references[number][0])
                pending.extend((maker, False) for maker in makers if maker is not None and maker not in self._owned)
        return list(found)

    @cached_property
    def references(self) -> tuple[tuple[list[str], list[str]], ...]:
        """For each call the values and the parameters that it names, in the order of its arguments."""
        return tuple((_names(call, "value"), _names(call, "parameter")) for call in self.calls)

    @cached_property
    def _owned(self) -> frozenset[int]:
        return frozenset(number for calls in self.structure.operators for number in calls)

    def check_sizes(self, sizes: Mapping[str, int]) -> None:
        """Raises `ProgramError` unless `sizes` gives each dimension a size within its bounds."""
        if set(sizes) != {dimension.name for dimension in self.dimensions}:
            raise ProgramError(f"sizes of {sorted(sizes)} given, the program has {[d.name for d in self.dimensions]}")
        for dimension in self.dimensions:
            if not dimension.minimum <= sizes[dimension.name] <= dimension.maximum:
                raise ProgramError(
                    f"dimension {dimension.name} is {sizes[dimension.name]}, the program was captured for "
                    f"{dimension.minimum} to {dimension.maximum}"
                )

    def check_shapes(self, sizes: Mapping[str, int]) -> None:
        """Computes every call's shapes without data and compares them with the declared ones; once for equal sizes.
        Raises `ProgramError` for a call that cannot run, another shape, or a tensor over the limit.
        """
        self.check_sizes(sizes)
        key = tuple(sorted(sizes.items()))
        if key in self._checked:
            return
        for _, run in runs_without_data(self, sizes):
            run()
        if len(self._checked) >= _MAXIMUM_CHECKED:
            self._checked.clear()
        self._checked.add(key)

    @cached_property
    def _checked(self) -> set[tuple[tuple[str, int], ...]]:
        return set()


class ProgramSlice:
    """The operators `order[first:end]` of a program, ready to run.

    `order` is any topological order of the operators. `carried_in` and `carried_out` name what crosses the cuts before
    and after, with what only later slices need, so that slices form a chain. `parameters` holds at least
    `parameter_names`, by name; they are neither copied nor written to. Raises `ProgramError`.
    """

    def __init__(
        self,
        program: Program,
        parameters: Mapping[str, Tensor],
        order: Sequence[int],
        first: int,
        end: int,
        *,
        device: torch.device | str = "cpu",
    ) -> None:
        if not 0 <= first < end <= len(order):
            raise ProgramError(f"operators [{first}, {end}) are not a range within 0 to {len(order)}")
        _check_topological(program, order)
        self.program, self.device = program, torch.device(device)
        self.carried_in = program.carried(order, first)
        self.carried_out = program.carried(order, end)
        structure = program.structure
        wanted = [number for operator in order[first:end] for number in structure.operators[operator]]
        if end == len(order):
            wanted += program.output_calls
        self._calls = sorted(program.with_recomputed(wanted))
        used = {name for number in self._calls for name in program.references[number][1]}
        self.parameter_names = tuple(value.name for value in program.parameters if value.name in used)
        calls = [program.calls[number] for number in self._calls]
        taken = [program.values[name].shape for name in self.carried_in]
        made = [value.shape for call in calls for value in call.results if value is not None]
        given = [(call.arguments, [item for _, item in call.keywords]) for call in calls]
        self._needed_dimensions = _mentioned([taken, made, given], {item.name for item in program.dimensions})
        declared = {value.name: value for value in program.parameters}
        self._parameters: dict[str, Tensor] = {}
        for name in self.parameter_names:
            if name not in parameters:
                raise ProgramError(f"parameter {name!r} is missing from the weights of operators [{first}, {end})")
            tensor, expected = parameters[name], declared[name]
            if tuple(tensor.shape) != expected.shape or tensor.dtype != _DTYPES[expected.dtype]:
                raise ProgramError(
                    f"parameter {name!r} is {tensor.dtype} {list(tensor.shape)}, the program says "
                    f"{expected.dtype} {list(expected.shape)}"
                )
            self._parameters[name] = tensor.to(self.device)
        self._prepared: tuple[dict[str, int], list[_ReadyCall]] | None = None

    def run(self, tensors: Mapping[str, Tensor], *, sizes: Mapping[str, int] | None = None) -> dict[str, Tensor]:
        """From the tensors of `carried_in` those of `carried_out`, by name.

        `sizes` of the dimensions are read off the tensors' shapes; give them where a shape shows none of them alone.
        Raises `ProgramError` for a missing tensor, another dtype or shape, a size outside the captured bounds, or a
        call that fails on these values.
        """
        known = self._checked_sizes(tensors, sizes)
        environment = {name: tensors[name] for name in self.carried_in}
        with torch.inference_mode():
            for number, call in zip(self._calls, self._ready(known), strict=True):
                try:
                    call.run(environment, self._parameters)
                except (RuntimeError, IndexError) as error:
                    raise ProgramError(
                        f"call {number} ({self.program.calls[number].operator}) failed: {_first_line(error)}"
                    ) from error
        return {name: environment[name] for name in self.carried_out}

    def timed_run(
        self, tensors: Mapping[str, Tensor], clock: Callable[[], int]
    ) -> tuple[dict[str, Tensor], list[tuple[int, int]]]:
        """`run`, with (call, clock ticks) for each call in the order of execution."""
        environment = {name: tensors[name] for name in self.carried_in}
        ticks = []
        with torch.inference_mode():
            for number, call in zip(self._calls, self._ready(self._checked_sizes(tensors, None)), strict=True):
                before = clock()
                call.run(environment, self._parameters)
                ticks.append((number, clock() - before))
        return {name: environment[name] for name in self.carried_out}, ticks

    def peak_bytes(self, sizes: Mapping[str, int]) -> int:
        """Most bytes of activations alive at once while the slice runs, what it takes and gives included."""
        values = self.program.values
        # A view shares its operand's memory where it does not copy; counting it twice errs on the safe side.
        alive = {name: values[name].bytes_at(sizes) for name in self.carried_in}
        peak = sum(alive.values())
        for call in self._resolved(sizes):
            for name in call.results:
                if name is not None:
                    alive[name] = values[name].bytes_at(sizes)
            peak = max(peak, sum(alive.values()))
            for name in call.last_reads:
                alive.pop(name, None)
        return peak

    def _checked_sizes(self, tensors: Mapping[str, Tensor], sizes: Mapping[str, int] | None) -> dict[str, int]:
        values = self.program.values
        found: dict[str, int] = dict(sizes or {})
        for name in self.carried_in:
            if name not in tensors:
                raise ProgramError(f"tensor {name!r} is missing; the slice takes {list(self.carried_in)!r:.300}")
            if tensors[name].ndim == len(values[name].shape):
                for declared, actual in zip(values[name].shape, tensors[name].shape, strict=True):
                    if isinstance(declared, str):
                        found.setdefault(declared, int(actual))
        for dimension in self.program.dimensions:
            if dimension.name not in found:
                if dimension.name in self._needed_dimensions:
                    raise ProgramError(f"the tensors' shapes do not tell the size of {dimension.name!r}; pass sizes=")
                found[dimension.name] = dimension.minimum
        self.program.check_sizes(found)
        for name in self.carried_in:
            _require_tensor(tensors[name], values[name], found)
        return found

    def _ready(self, sizes: dict[str, int]) -> "list[_ReadyCall]":
        if self._prepared is None or self._prepared[0] != sizes:
            self.program.check_shapes(sizes)
            self._prepared = (sizes, self._resolved(sizes))
        return self._prepared[1]

    def _resolved(self, sizes: Mapping[str, int]) -> "list[_ReadyCall]":
        ready = [_resolve(self.program.calls[number], sizes, self.device) for number in self._calls]
        seen = set(self.carried_out)
        for number, call in zip(reversed(self._calls), reversed(ready), strict=True):
            reads = self.program.references[number][0]
            unread = [name for name in call.results if name is not None and name not in seen]
            call.last_reads = tuple(dict.fromkeys([*(name for name in reads if name not in seen), *unread]))
            seen.update(reads)
        return ready


def evaluate_size(size: Size, sizes: Mapping[str, int]) -> int:
    """The integer that a size is where the dimensions have the given sizes; `ProgramError` from 2**62 on."""
    if isinstance(size, int):
        return size
    if isinstance(size, str):
        return sizes[size]
    operands = [evaluate_size(item, sizes) for item in size[1:]]
    if size[0] in ("//", "%") and operands[1] == 0:
        raise ProgramError(f"size {size!r:.80} divides by zero")
    result = _SIZE_OPERATIONS[size[0]](operands)
    if abs(result) >= _MAXIMUM_SIZE:
        raise ProgramError(f"size {size!r:.80} is not below 2**62")
    return result


# ---------------------------------------------------------------------------------------------------------- structure


def _structure(program: Program) -> Structure:
    inputs = {value.name for value in program.inputs}
    operator_of_value: dict[str, int] = {}
    base: dict[str, str] = {name: name for name in inputs}
    free_parameters: dict[str, frozenset[str]] = {}  # of free values: what their recomputation needs
    via_parameters: dict[str, frozenset[str]] = dict.fromkeys(inputs, frozenset())  # of aliases
    operators: list[list[int]] = []
    reads: list[set[str]] = []
    parameters: list[set[str]] = []
    held = 0
    for number, call in enumerate(program.calls):
        results = [value.name for value in call.results if value is not None]
        values, own_parameters = program.references[number]
        needed = frozenset(own_parameters).union(*(free_parameters.get(name, ()) for name in values))
        needed = needed.union(*(via_parameters.get(name, ()) for name in values))
        held += len(needed)
        if held > _MAXIMUM_SHARED_PARAMETERS:
            raise ProgramError(
                f"the calls need {_MAXIMUM_SHARED_PARAMETERS} parameters together, counted for each call that needs "
                "one directly or through views and calls of no operator; a program may need as many"
            )
        dependent = [name for name in values if name not in free_parameters]
        if not dependent:
            free_parameters.update(dict.fromkeys(results, needed))
            continue
        if len(values) == 1 and _is_alias(program, call, values[0]):
            base[results[0]] = base[dependent[0]]
            via_parameters[results[0]] = needed
            continue
        bases = {base[name] for name in dependent}
        owner = operator_of_value.get(base[dependent[0]]) if call.packet in PARTS and len(values) == 1 else None
        if owner is None:
            owner = len(operators)
            operators.append([])
            reads.append(set())
            parameters.append(set())
        operators[owner].append(number)
        reads[owner] |= {name for name in bases if operator_of_value.get(name) != owner}
        parameters[owner] |= needed
        for name in results:
            base[name], operator_of_value[name], via_parameters[name] = name, owner, frozenset()
    output_bases = frozenset(base[name] for name in program.outputs if name in base)
    consumers: dict[str, list[int]] = {}
    for operator, names in enumerate(reads):
        for name in names:
            consumers.setdefault(name, []).append(operator)
    crossing = set(consumers) | output_bases
    return Structure(
        operators=tuple(map(tuple, operators)),
        reads=tuple(map(frozenset, reads)),
        parameters=tuple(map(frozenset, parameters)),
        producer={name: operator_of_value.get(name, -1) for name in crossing},
        consumers={name: tuple(consumers.get(name, ())) for name in crossing},
        output_bases=output_bases,
    )


def _is_alias(program: Program, call: Call, operand: str) -> bool:
    result = call.results[0]
    return call.packet in ALIASES | CONVERSIONS and result is not None and program.values[operand].dtype == result.dtype


def _places(order: Sequence[int], count: int) -> list[int]:
    if sorted(order) != list(range(count)):
        raise ProgramError(f"order does not name each of the {count} operators once")
    place = [0] * count
    for position, operator in enumerate(order):
        place[operator] = position
    return place


def _place_of(operator: int, place: Sequence[int]) -> int:
    return -1 if operator < 0 else place[operator]


def _check_topological(program: Program, order: Sequence[int]) -> None:
    structure = program.structure
    place = _places(order, program.operator_count)
    for operator, names in enumerate(structure.reads):
        for name in names:
            if _place_of(structure.producer[name], place) >= place[operator]:
                raise ProgramError(
                    f"order is not topological: operator {operator} ({program.operator_name(operator)}) stands before "
                    f"operator {structure.producer[name]}, which makes {name!r}"
                )


# ---------------------------------------------------------------------------------------------------------- execution


@dataclass(frozen=True, slots=True)
class _Reference:
    name: str
    is_parameter: bool


@dataclass(slots=True)
class _ReadyCall:
    operator: Any
    arguments: list[Any]
    keywords: dict[str, Any]
    results: tuple[str | None, ...]
    last_reads: tuple[str, ...] = ()

    def run(self, environment: dict[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
        arguments = [_given(item, environment, parameters) for item in self.arguments]
        keywords = {key: _given(item, environment, parameters) for key, item in self.keywords.items()}
        output = self.operator(*arguments, **keywords)
        for name, tensor in zip(self.results, output if len(self.results) != 1 else (output,), strict=True):
            if name is not None:
                environment[name] = tensor
        for name in self.last_reads:
            environment.pop(name, None)


def _given(item: Any, environment: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> Any:
    if type(item) is _Reference:
        return (parameters if item.is_parameter else environment)[item.name]
    if type(item) is list:
        return [_given(entry, environment, parameters) for entry in item]
    return item


def _resolve(call: Call, sizes: Mapping[str, int], device: torch.device) -> _ReadyCall:
    operator = find_operator(call.operator)
    keywords = {key: _resolved_argument(item, sizes, device) for key, item in call.keywords}
    if call.packet in FROM_SHAPES and any(item.name == "device" for item in operator._schema.arguments):
        # Never torch's default device: that would be the CPU, also while shapes are computed without data.
        keywords["device"] = device
    return _ReadyCall(
        operator=operator,
        arguments=[_resolved_argument(item, sizes, device) for item in call.arguments],
        keywords=keywords,
        results=tuple(None if value is None else value.name for value in call.results),
    )


def _resolved_argument(argument: Argument, sizes: Mapping[str, int], device: torch.device) -> Any:
    if isinstance(argument, list):
        return [_resolved_argument(item, sizes, device) for item in argument]
    if not isinstance(argument, dict):
        return argument
    ((kind, content),) = argument.items()
    match kind:
        case "value" | "parameter":
            return _Reference(content, kind == "parameter")
        case "size":
            return evaluate_size(content, sizes)
        case "dtype":
            return _DTYPES[content]
        case "memory_format":
            return _MEMORY_FORMATS[content]
        case "float":
            return _SPECIAL_FLOATS[content]
    return device


def runs_without_data(program: Program, sizes: Mapping[str, int]) -> Iterator[tuple[int, Callable[[], None]]]:
    """Each call's number with a function that runs it on tensors without data (call each once, in order): for checking
    and counting what a program would do. The function raises `ProgramError` for shapes or dtypes other than declared.
    """
    try:
        parameters = {value.name: _without_data(value, {}) for value in program.parameters}
        environment = {value.name: _without_data(value, sizes) for value in program.inputs}
    except RuntimeError as error:
        raise ProgramError(f"an input or parameter has no usable shape: {error}") from error
    for number, call in enumerate(program.calls):
        yield number, partial(_run_without_data, call, number, environment, parameters, sizes)


def _run_without_data(
    call: Call, number: int, environment: dict[str, Tensor], parameters: Mapping[str, Tensor], sizes: Mapping[str, int]
) -> None:
    where = f"call {number} ({call.operator})"
    try:
        with torch.no_grad(), CheckedOperators():
            _resolve(call, sizes, torch.device("meta")).run(environment, parameters)
    except ProgramError as error:
        raise ProgramError(f"{where}: {error}") from error
    except Exception as error:  # whatever torch says to arguments that do not fit
        raise ProgramError(f"{where} cannot run: {_first_line(error)}") from error
    for value in call.results:
        if value is not None:
            made = environment[value.name]
            if not isinstance(made, Tensor):
                raise ProgramError(f"{where}: it gives no tensor")
            _require_tensor(made, value, sizes)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]


def _without_data(value: Value, sizes: Mapping[str, int]) -> Tensor:
    if value.bytes_at(sizes) > MAXIMUM_TENSOR_BYTES:
        raise ProgramError(
            f"tensor {value.name!r} has {value.bytes_at(sizes)} bytes, the limit is {MAXIMUM_TENSOR_BYTES}"
        )
    return torch.empty(value.sizes_at(sizes), dtype=_DTYPES[value.dtype], device="meta")


def _require_tensor(tensor: Tensor, value: Value, sizes: Mapping[str, int]) -> None:
    expected = value.sizes_at(sizes)
    if tuple(tensor.shape) != expected or tensor.dtype != _DTYPES[value.dtype]:
        raise ProgramError(
            f"tensor {value.name!r} is {_DTYPE_NAMES.get(tensor.dtype, tensor.dtype)} {list(tensor.shape)}, "
            f"the program says {value.dtype} {list(expected)}"
        )


# ------------------------------------------------------------------------------------------------------------- checks


def _check_call(call: Call, where: str) -> None:
    try:
        schema = find_operator(call.operator)._schema
    except ValueError as error:
        raise ProgramError(f"{where}: {error}") from error
    positional = [item for item in schema.arguments if not item.kwarg_only]
    keywords = dict(call.keywords)
    names = {item.name for item in schema.arguments}
    if len(call.arguments) > len(positional) or not set(keywords) <= names or len(keywords) != len(call.keywords):
        raise ProgramError(
            f"{where}: {len(call.arguments)} arguments and {sorted(keywords)}, the operator takes {schema}"
        )
    bound = dict(zip((item.name for item in positional), call.arguments)) | keywords
    if len(bound) != len(call.arguments) + len(keywords):
        raise ProgramError(f"{where}: an argument is given twice")
    for item in schema.arguments:
        if item.name not in bound and not item.has_default_value():
            raise ProgramError(f"{where}: argument {item.name!r} is missing; the operator takes {schema}")
        if (reason := unusable_argument(item.name, bound.get(item.name, item.default_value))) is not None:
            raise ProgramError(f"{where}: {reason}")
    if len(call.results) != len(schema.returns):
        raise ProgramError(f"{where}: {len(call.results)} results, the operator gives {len(schema.returns)}")


def _define(value: Value, known: set[str], dimensions: frozenset[str], where: str) -> None:
    _check_value(value, dimensions, where)
    if value.name in known:
        raise ProgramError(f"{where}: a tensor {value.name!r} was made before")
    known.add(value.name)


def _check_value(value: Value, dimensions: frozenset[str], where: str) -> None:
    _require_name(value.name, where)
    if value.dtype not in _DTYPES:
        raise ProgramError(f"{where}: {value.name!r} has dtype {value.dtype!r:.40}, expected one of {sorted(_DTYPES)}")
    if len(value.shape) > _MAXIMUM_NESTING:
        raise ProgramError(f"{where}: {value.name!r} has {len(value.shape)} dimensions")
    for size in value.shape:
        _check_size(size, dimensions, f"{where}: {value.name!r}")


def _is_operation(size: list[Any]) -> bool:
    return isinstance(size[0], str) and size[0] in _SIZE_OPERATIONS and (len(size) == 3 or size[0] not in ("//", "%"))


def _check_size(size: Size, dimensions: frozenset[str], where: str, depth: int = 0) -> None:
    if isinstance(size, int) and not isinstance(size, bool) and abs(size) < _MAXIMUM_SIZE:
        return
    if isinstance(size, str) and size in dimensions:
        return
    usable = isinstance(size, list) and 3 <= len(size) <= _MAXIMUM_NESTING and depth < _MAXIMUM_NESTING
    if not usable or not _is_operation(size):
        raise ProgramError(f"{where}: size {size!r:.80} is no integer, dimension or sum, product, quotient of them")
    for item in size[1:]:
        _check_size(item, dimensions, where, depth + 1)


def _check_argument(
    argument: Argument, known: set[str], parameters: set[str], dimensions: frozenset[str], where: str, depth: int = 0
) -> None:
    if argument is None or isinstance(argument, bool):
        return
    if isinstance(argument, float) and math.isfinite(argument):
        return
    if isinstance(argument, int) and abs(argument) < 2**63:
        return
    if isinstance(argument, str) and len(argument) <= _MAXIMUM_NAME:
        return
    if isinstance(argument, list) and len(argument) <= _MAXIMUM_LIST and depth < 2:
        for item in argument:
            _check_argument(item, known, parameters, dimensions, where, depth + 1)
        return
    if not isinstance(argument, dict) or len(argument) != 1:
        raise ProgramError(f"{where}: argument {argument!r:.80} is of no known kind, or too long")
    ((kind, content),) = argument.items()
    allowed: dict[str, Any] = {
        "value": known, "parameter": parameters, "dtype": _DTYPES, "memory_format": _MEMORY_FORMATS,
        "float": _SPECIAL_FLOATS, "device": {"own"},
    }  # fmt: skip
    if kind == "size":
        _check_size(content, dimensions, where)
    elif kind not in allowed:
        raise ProgramError(f"{where}: argument {argument!r:.80} is of no known kind")
    elif not isinstance(content, str) or content not in allowed[kind]:
        raise ProgramError(f"{where}: {kind} {content!r:.80} is unknown, or made only later")


def _require_name(name: Any, where: str) -> None:
    if not isinstance(name, str) or not 1 <= len(name) <= _MAXIMUM_NAME or not name.isprintable():
        raise ProgramError(f"{where}: name {name!r:.80} is not 1 to {_MAXIMUM_NAME} printable characters")


def _names(call: Call, kind: str) -> list[str]:
    """Names that a call's arguments refer to, in their order."""
    found: list[str] = []
    pending: list[Any] = [*reversed([*call.arguments, *(item for _, item in call.keywords)])]
    while pending:
        item = pending.pop()
        if isinstance(item, list):
            pending.extend(reversed(item))
        elif isinstance(item, dict) and kind in item:
            found.append(cast(str, item[kind]))
    return found


def _mentioned(sizes: Any, dimensions: set[str]) -> set[str]:
    """Those of the dimensions that nested sizes and arguments mention."""
    found, pending = set(), [sizes]
    while pending:
        item = pending.pop()
        if isinstance(item, str) and item in dimensions:
            found.add(item)
        elif isinstance(item, list | tuple):
            pending.extend(item)
        elif isinstance(item, dict) and "size" in item:
            pending.append(item["size"])
    return found


# --------------------------------------------------------------------------------------------------------------- JSON


def encode_argument(value: Any) -> Argument:
    """A constant argument as JSON. Raises `ProgramError` for what a program cannot say."""
    match value:
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else {"float": str(value)}
        case torch.dtype():
            return {"dtype": dtype_name(value)}
        case torch.memory_format():
            return {"memory_format": _MEMORY_FORMAT_NAMES[value]}
        case torch.device():
            return {"device": "own"}
    raise ProgramError(f"an argument of type {type(value).__name__} cannot be written into a program")


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype; `ProgramError` for one that a program cannot hold."""
    try:
        return _DTYPE_NAMES[dtype]
    except KeyError:
        raise ProgramError(f"{dtype} is not one of {sorted(_DTYPES)}") from None


def _value_to_json(value: Value) -> list[Any]:
    return [value.name, value.dtype, list(value.shape)]


def _value_from_json(item: Any, where: str) -> Value:
    if not isinstance(item, list) or len(item) != 3 or not isinstance(item[2], list):
        raise ProgramError(f"{where}: {item!r:.80} is not [name, dtype, shape]")
    if not isinstance(item[1], str):
        raise ProgramError(f"{where}: dtype {item[1]!r:.40} is no name")
    return Value(item[0], item[1], tuple(item[2]))


def _dimension_from_json(item: Any) -> Dimension:
    if not isinstance(item, list) or len(item) != 3 or not all(type(bound) is int for bound in item[1:]):
        raise ProgramError(f"dimensions: {item!r:.80} is not [name, minimum, maximum]")
    return Dimension(item[0], item[1], item[2])


def _call_from_json(item: Any, number: int) -> Call:
    where = f"call {number}"
    if (
        not isinstance(item, list)
        or len(item) != 4
        or not isinstance(item[0], str)
        or not isinstance(item[1], list)
        or not isinstance(item[2], dict)
        or not isinstance(item[3], list)
    ):
        raise ProgramError(f"{where} is not [operator, arguments, keywords, results]")
    return Call(
        operator=item[0],
        arguments=tuple(item[1]),
        keywords=tuple(sorted(item[2].items())),
        results=tuple(None if value is None else _value_from_json(value, where) for value in item[3]),
    )
