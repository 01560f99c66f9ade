"""The machine code of `bsns.runtime.row_kernels`, as LLVM IR.

Owns what the functions compute, instruction by instruction. Promises that the sums of an int8 product are sums of
integers, which neither order nor width changes, that float operations are those written here, in their order, and that
a row's result does not depend on the rows beside it. Does not compile, load or call anything.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

from llvmlite import ir

from bsns.runtime.row_kernels import CORRECTIONS, DIGITS, FixedPoint

# Input rows that share a load of weights: with their sums they fit the registers.
_TILE: Final = 4
# A float32 product of two rows has lanes times vectors partial sums: enough to hide the latency of an addition, few
# enough for those of a tile to stay in registers.
_FLOAT_LANES: Final = 8
_FLOAT_VECTORS: Final = 2
_FLOATS_AT_ONCE: Final = _FLOAT_LANES * _FLOAT_VECTORS
_EXPONENT_BITS: Final = 0x7F800000
_MAGNITUDE_BITS: Final = 0x7FFFFFFF

_I1, _I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
_F32, _POINTER, _VOID = ir.FloatType(), ir.PointerType(), ir.VoidType()


@dataclass(frozen=True)
class Meeting:
    """How digits and weights are multiplied and added up: so many bytes a step, as so many int32 sums."""

    kind: str
    step: int
    sums: int


# Unsigned weights by signed digits in groups of four, in one instruction: x86 with VNNI. In 32 bytes: as fast as in 64,
# with less to waste behind a row's end, and the same on processors that have no wider ones.
BYTES: Final = Meeting("bytes", 32, 8)
# Widened to 16 bits, in pairs: x86 with AVX2.
PAIRS: Final = Meeting("pairs", 16, 8)
# No instruction is named: LLVM finds them, for any processor.
ANY: Final = Meeting("any", 16, 4)


def module(meeting: Meeting, numbers: FixedPoint) -> str:
    """The IR of the functions `quantise`, `multiply`, `multiply_floats` and `normalise`."""
    unit = ir.Module("row_kernels")
    _quantise(unit, numbers)
    _multiply(unit, [_tile(unit, meeting, rows) for rows in range(1, _TILE + 1)])
    _multiply_floats(unit, [_float_tile(unit, rows) for rows in range(1, _TILE + 1)])
    _normalise(unit)
    return str(unit)


def _quantise(unit: Any, numbers: FixedPoint) -> None:
    """quantise(x, channels, planes, corrections, alignments, rows, width, wides, padded)

    Of float32 x [rows, width], with `channels` (int64 [wides]) appended in the wide part's unit: signed digits, int8
    planes [rows, DIGITS, padded], zeros behind the last; -128 times the sum of each digit, int32 corrections [rows,
    CORRECTIONS]; float32 alignments [rows].
    """
    function, code = _function(unit, "quantise", [_POINTER] * 5 + [_I64] * 4)
    x, channels, planes, corrections, alignments, rows, width, wides, padded = function.args
    largest = code.alloca(_I32)
    sums = [code.alloca(_I32) for _ in range(DIGITS)]
    with _loop(code, _number(0), rows) as row:
        inputs = _at(code, x, code.mul(row, width), _F32)
        first = code.mul(row, code.mul(padded, _number(DIGITS)))
        outputs = [_at(code, planes, code.add(first, code.mul(padded, _number(digit))), _I8) for digit in range(DIGITS)]
        for cell in (largest, *sums):
            code.store(_number(0, _I32), cell)
        with _loop(code, _number(0), width) as place:
            bits = code.and_(_load(code, inputs, place, _I32), _number(_MAGNITUDE_BITS, _I32))
            before = code.load(largest, typ=_I32)
            code.store(code.select(code.icmp_signed(">", bits, before), bits, before), largest)
        # A row with NaN or infinity has an infinite alignment here, and NaN in the end.
        power = code.bitcast(code.and_(code.load(largest, typ=_I32), _number(_EXPONENT_BITS, _I32)), _F32)
        alignment = code.fmul(power, _number(numbers.alignment, _F32))
        origin = code.sub(code.bitcast(alignment, _I32), _number(numbers.digit_offsets, _I32))

        def store(value: Any, place: Any) -> None:
            fixed = code.sub(code.bitcast(code.fadd(value, alignment), _I32), origin)
            fixed = code.xor(fixed, _number(numbers.digit_offsets, _I32))
            for digit, (output, total) in enumerate(zip(outputs, sums)):
                byte = code.trunc(code.lshr(fixed, _number(8 * digit, _I32)), _I8)
                code.store(byte, _at(code, output, place, _I8))
                code.store(code.add(code.load(total, typ=_I32), code.sext(byte, _I32)), total)

        with _loop(code, _number(0), width) as place:
            store(_load(code, inputs, place, _F32), place)
        with _loop(code, _number(0), wides) as wide:
            value = _load(code, inputs, _load(code, channels, wide, _I64), _F32)
            store(code.fmul(value, _number(numbers.wide_part, _F32)), code.add(width, wide))
        with _loop(code, code.add(width, wides), padded) as place:
            for output in outputs:
                code.store(_number(0, _I8), _at(code, output, place, _I8))
        for digit, total in enumerate(sums):
            correction = code.mul(code.load(total, typ=_I32), _number(-128, _I32))
            place = code.add(code.mul(row, _number(CORRECTIONS)), _number(digit))
            code.store(correction, _at(code, corrections, place, _I32))
        finite = code.fadd(alignment, code.fsub(alignment, alignment))
        code.store(finite, _at(code, alignments, row, _F32))
    code.ret_void()


def _multiply(unit: Any, tiles: Sequence[Any]) -> None:
    """multiply(weights, scales, biases, planes, corrections, alignments, output, first, end, rows, inputs, outputs,
    padded)

    What `quantise` made, with rows [first, end) of int8 weights [outputs, inputs], into columns [first, end) of float32
    output [rows, outputs]. `biases` may be null.
    """
    function, code = _function(unit, "multiply", [_POINTER] * 7 + [_I64] * 6)
    weights, scales, biases, planes, corrections, alignments, output, *counts = function.args
    first, end, rows, inputs, outputs, padded = counts
    biased, biases = _given(code, biases, scales)
    row_bytes = code.mul(padded, _number(DIGITS))
    with _loop(code, first, end) as column:
        weight = _at(code, weights, code.mul(column, inputs), _I8)
        scale, bias = _load(code, scales, column, _F32), _load(code, biases, column, _F32)
        for tile, row in _tiled(code, tiles, rows):
            arguments = [
                weight,
                _at(code, planes, code.mul(row, row_bytes), _I8),
                _at(code, corrections, code.mul(row, _number(CORRECTIONS)), _I32),
                _at(code, alignments, row, _F32),
                _at(code, output, code.add(code.mul(row, outputs), column), _F32),
            ]
            code.call(tile, [*arguments, inputs, outputs, padded, scale, bias, biased])
    code.ret_void()


def _multiply_floats(unit: Any, tiles: Sequence[Any]) -> None:
    """multiply_floats(weights, biases, x, output, first, end, rows, inputs, outputs)

    float32 x [rows, inputs] with rows [first, end) of float32 weights [outputs, inputs], into columns [first, end) of
    float32 output [rows, outputs]. `biases` may be null.
    """
    function, code = _function(unit, "multiply_floats", [_POINTER] * 4 + [_I64] * 5)
    weights, biases, x, output, first, end, rows, inputs, outputs = function.args
    biased, biases = _given(code, biases, weights)
    with _loop(code, first, end) as column:
        weight = _at(code, weights, code.mul(column, inputs), _F32)
        bias = _load(code, biases, column, _F32)
        for tile, row in _tiled(code, tiles, rows):
            inputs_at = _at(code, x, code.mul(row, inputs), _F32)
            output_at = _at(code, output, code.add(code.mul(row, outputs), column), _F32)
            code.call(tile, [weight, inputs_at, output_at, inputs, outputs, bias, biased])
    code.ret_void()


def _normalise(unit: Any) -> None:
    """normalise(x, weights, output, rows, width, epsilon)

    float32 x [rows, width], each row over the root of (its mean square + epsilon), times the weights.
    """
    function, code = _function(unit, "normalise", [_POINTER] * 3 + [_I64] * 2 + [_F32])
    x, weights, output, rows, width, epsilon = function.args
    vector = ir.VectorType(_F32, _FLOATS_AT_ONCE)
    fused = _declared(unit, f"llvm.fmuladd.v{_FLOATS_AT_ONCE}f32", vector, [vector] * 3)
    root = _declared(unit, "llvm.sqrt.f32", _F32, [_F32])
    cell, end = code.alloca(vector), code.alloca(_F32)
    whole = code.and_(width, _number(-_FLOATS_AT_ONCE))
    with _loop(code, _number(0), rows) as row:
        first = code.mul(row, width)
        inputs, outputs = _at(code, x, first, _F32), _at(code, output, first, _F32)
        code.store(ir.Constant(vector, None), cell)
        with _loop(code, _number(0), whole, _FLOATS_AT_ONCE) as place:
            values = code.load(_at(code, inputs, place, _F32), typ=vector, align=4)
            code.store(code.call(fused, [values, values, code.load(cell, typ=vector)]), cell)
        code.store(_sum(code, code.load(cell, typ=vector)), end)
        with _loop(code, whole, width) as place:
            value = _load(code, inputs, place, _F32)
            code.store(code.fadd(code.load(end, typ=_F32), code.fmul(value, value)), end)
        mean = code.fdiv(code.load(end, typ=_F32), code.sitofp(width, _F32))
        factor = code.fdiv(_number(1.0, _F32), code.call(root, [code.fadd(mean, epsilon)]))
        with _loop(code, _number(0), width) as place:
            value = code.fmul(_load(code, inputs, place, _F32), factor)
            code.store(code.fmul(value, _load(code, weights, place, _F32)), _at(code, outputs, place, _F32))
    code.ret_void()


def _given(code: Any, pointer: Any, instead: Any) -> tuple[Any, Any]:
    """Whether `pointer` is not null, and one that can be read in any case."""
    given = code.icmp_unsigned("!=", code.ptrtoint(pointer, _I64), _number(0))
    return given, code.select(given, pointer, instead)


def _tiled(code: Any, tiles: Sequence[Any], rows: Any) -> Iterator[tuple[Any, Any]]:
    """The tile for as many rows as there are and the row to call it at; what is built meanwhile is the call."""
    whole = code.and_(rows, _number(-_TILE))
    with _loop(code, _number(0), whole, _TILE) as row:
        yield tiles[-1], row
    after = code.append_basic_block()
    chosen = code.switch(code.sub(rows, whole), after)
    for size in range(1, _TILE):
        block = code.append_basic_block()
        chosen.add_case(size, block)
        code.position_at_end(block)
        yield tiles[size - 1], whole
        code.branch(after)
    code.position_at_end(after)


def _tile(unit: Any, meeting: Meeting, rows: int) -> Any:
    """A function: one row of weights with `rows` rows of digits."""
    arguments = [_POINTER] * 5 + [_I64] * 3 + [_F32, _F32, _I1]
    function, code = _function(unit, f"tile_{rows}", arguments)
    function.linkage = "internal"
    weights, planes, corrections, alignments, output, inputs, outputs, padded, scale, bias, biased = function.args
    bytes_, sums = ir.VectorType(_I8, meeting.step), ir.VectorType(_I32, meeting.sums)
    of_weights, of_digits, added = _met(unit, code, meeting)
    places = [_at(code, planes, code.mul(padded, _number(number)), _I8) for number in range(rows * DIGITS)]
    cells = [code.alloca(sums) for _ in places]
    for cell in cells:
        code.store(ir.Constant(sums, None), cell)
    with _loop(code, _number(0), inputs, meeting.step) as place:
        weight = of_weights(code.load(_at(code, weights, place, _I8), typ=bytes_, align=1))
        for cell, plane in zip(cells, places):
            digits = of_digits(code.load(_at(code, plane, place, _I8), typ=bytes_, align=1))
            code.store(added(code.load(cell, typ=sums), weight, digits), cell)
    found = [code.load(cell, typ=sums) for cell in cells]
    for row in range(rows):
        products = _totals(code, meeting, found[row * DIGITS : (row + 1) * DIGITS])
        if meeting.kind == "bytes":
            place = _number(row * CORRECTIONS)
            products = code.add(products, code.load(_at(code, corrections, place, _I32), typ=products.type, align=4))
        floats = code.sitofp(products, ir.VectorType(_F32, 4))
        floats = code.fmul(floats, ir.Constant(floats.type, [1.0, 2.0**8, 2.0**16, 0.0]))
        low, middle, high = (code.extract_element(floats, _number(digit, _I32)) for digit in range(DIGITS))
        value = code.fmul(code.fadd(code.fadd(low, middle), high), scale)
        value = code.fmul(value, _load(code, alignments, _number(row), _F32))
        value = code.select(biased, code.fadd(value, bias), value)
        code.store(value, _at(code, output, code.mul(outputs, _number(row)), _F32))
    code.ret_void()
    return function


def _float_tile(unit: Any, rows: int) -> Any:
    """A function: one row of weights with `rows` rows of inputs."""
    function, code = _function(unit, f"float_tile_{rows}", [_POINTER] * 3 + [_I64] * 2 + [_F32, _I1])
    function.linkage = "internal"
    weights, x, output, inputs, outputs, bias, biased = function.args
    vector = ir.VectorType(_F32, _FLOAT_LANES)
    # Fused where the processor can, else a product and a sum.
    fused = _declared(unit, f"llvm.fmuladd.v{_FLOAT_LANES}f32", vector, [vector] * 3)
    fused_one = _declared(unit, "llvm.fmuladd.f32", _F32, [_F32] * 3)
    places = [_at(code, x, code.mul(inputs, _number(row)), _F32) for row in range(rows)]
    cells = [[code.alloca(vector) for _ in range(_FLOAT_VECTORS)] for _ in range(rows)]
    ends = [code.alloca(_F32) for _ in range(rows)]
    for cell in (cell for row in cells for cell in row):
        code.store(ir.Constant(vector, None), cell)
    whole = code.and_(inputs, _number(-_FLOATS_AT_ONCE))
    with _loop(code, _number(0), whole, _FLOATS_AT_ONCE) as place:
        for number in range(_FLOAT_VECTORS):
            at = code.add(place, _number(number * _FLOAT_LANES))
            weight = code.load(_at(code, weights, at, _F32), typ=vector, align=4)
            for row in range(rows):
                value = code.load(_at(code, places[row], at, _F32), typ=vector, align=4)
                cell = cells[row][number]
                code.store(code.call(fused, [weight, value, code.load(cell, typ=vector)]), cell)
    for row in range(rows):
        total = code.load(cells[row][0], typ=vector)
        for cell in cells[row][1:]:
            total = code.fadd(total, code.load(cell, typ=vector))
        code.store(_sum(code, total), ends[row])
    with _loop(code, whole, inputs) as place:
        weight = _load(code, weights, place, _F32)
        for row in range(rows):
            value = _load(code, places[row], place, _F32)
            code.store(code.call(fused_one, [weight, value, code.load(ends[row], typ=_F32)]), ends[row])
    for row in range(rows):
        value = code.load(ends[row], typ=_F32)
        value = code.select(biased, code.fadd(value, bias), value)
        code.store(value, _at(code, output, code.mul(outputs, _number(row)), _F32))
    code.ret_void()
    return function


def _met(
    unit: Any, code: Any, meeting: Meeting
) -> tuple[Callable[[Any], Any], Callable[[Any], Any], Callable[..., Any]]:
    """What prepares weights, what prepares digits, and what adds their products to sums."""
    sums, bytes_ = ir.VectorType(_I32, meeting.sums), ir.VectorType(_I8, meeting.step)
    if meeting.kind == "bytes":
        instruction = _declared(unit, f"llvm.x86.avx512.vpdpbusd.{8 * meeting.step}", sums, [sums, bytes_, bytes_])
        signs = ir.Constant(bytes_, [-128] * meeting.step)
        # Unsigned weights are larger by 128, which the corrections take off again.
        return (
            lambda weights: code.xor(weights, signs),
            lambda digits: digits,
            lambda before, weights, digits: code.call(instruction, [before, weights, digits]),
        )
    if meeting.kind == "pairs":
        halves = ir.VectorType(_I16, meeting.step)
        instruction = _declared(unit, "llvm.x86.avx2.pmadd.wd", sums, [halves, halves])

        def widened(values: Any) -> Any:
            return code.sext(values, halves)

        return (
            widened,
            widened,
            lambda before, weights, digits: code.add(before, code.call(instruction, [weights, digits])),
        )
    wide = ir.VectorType(_I32, meeting.step)
    name = f"llvm.vector.partial.reduce.add.v{meeting.sums}i32.v{meeting.step}i32"
    instruction = _declared(unit, name, sums, [sums, wide])

    def extended(values: Any) -> Any:
        return code.sext(values, wide)

    return (
        extended,
        extended,
        lambda before, weights, digits: code.call(instruction, [before, code.mul(weights, digits)]),
    )


def _totals(code: Any, meeting: Meeting, sums: Sequence[Any]) -> Any:
    """The total of each of three vectors, int32 [4]; the fourth means nothing. Fewer steps than one after the other."""
    lanes = meeting.sums

    def mixed(left: Any, right: Any, pattern: Sequence[int]) -> Any:
        """In each group of four lanes: 0 to 3 are `left`'s, 4 to 7 `right`'s."""
        return _picked(
            code,
            left,
            right,
            [group + (item if item < 4 else lanes + item - 4) for group in range(0, lanes, 4) for item in pattern],
        )

    low, middle, high = sums
    first = code.add(mixed(low, middle, [0, 1, 4, 5]), mixed(low, middle, [2, 3, 6, 7]))
    second = code.add(high, mixed(high, high, [2, 3, 2, 3]))
    total = code.add(mixed(first, second, [0, 2, 4, 4]), mixed(first, second, [1, 3, 5, 5]))
    groups = [_picked(code, total, total, range(group, group + 4)) for group in range(0, lanes, 4)]
    return groups[0] if len(groups) == 1 else code.add(*groups)


def _sum(code: Any, values: Any) -> Any:
    """The sum of a vector of float32, by halves."""
    half = values.type.count
    while half > 1:
        half //= 2
        low, high = (_picked(code, values, values, range(first, first + half)) for first in (0, half))
        values = code.fadd(low, high)
    return code.extract_element(values, _number(0, _I32))


# -- small words


def _function(unit: Any, name: str, arguments: Sequence[Any]) -> tuple[Any, Any]:
    function = ir.Function(unit, ir.FunctionType(_VOID, arguments), name)
    function.attributes.add("nounwind")
    for argument in function.args:
        if argument.type == _POINTER:
            argument.add_attribute("noalias")
    return function, ir.IRBuilder(function.append_basic_block())


def _declared(unit: Any, name: str, result: Any, arguments: Sequence[Any]) -> Any:
    return unit.globals.get(name) or ir.Function(unit, ir.FunctionType(result, arguments), name)


def _number(value: float, kind: Any = _I64) -> Any:
    return ir.Constant(kind, value)


def _at(code: Any, base: Any, index: Any, kind: Any) -> Any:
    return code.gep(base, [index], source_etype=kind)


def _load(code: Any, base: Any, index: Any, kind: Any) -> Any:
    return code.load(_at(code, base, index, kind), typ=kind)


def _picked(code: Any, left: Any, right: Any, lanes: Sequence[int]) -> Any:
    return code.shuffle_vector(left, right, ir.Constant(ir.VectorType(_I32, len(lanes)), list(lanes)))


@contextmanager
def _loop(code: Any, start: Any, end: Any, step: int = 1) -> Iterator[Any]:
    """The block is the body, for values from `start` below `end`."""
    before = code.block
    head, body, after = (code.append_basic_block() for _ in range(3))
    code.branch(head)
    code.position_at_end(head)
    value = code.phi(_I64)
    value.add_incoming(start, before)
    code.cbranch(code.icmp_signed("<", value, end), body, after)
    code.position_at_end(body)
    yield value
    value.add_incoming(code.add(value, _number(step), flags=["nsw"]), code.block)
    code.branch(head)
    code.position_at_end(after)
