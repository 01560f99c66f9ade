import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bsns.runtime.program import MAXIMUM_PROGRAM_BYTES, Call, Dimension, Program, ProgramError, ProgramSlice, Value

WEIGHT = torch.arange(12.0).reshape(4, 3)


def linear_program() -> Program:
    """relu(x @ W.T) + x[:, :1], with x float32 [batch, 3]."""
    return Program(
        dimensions=(Dimension("batch", 1, 8),),
        inputs=(Value("x", "float32", ("batch", 3)),),
        parameters=(Value("W", "float32", (4, 3)),),
        calls=(
            Call("aten.t.default", ({"parameter": "W"},), (), (Value("turned", "float32", (3, 4)),)),
            Call("aten.mm.default", ({"value": "x"}, {"value": "turned"}), (), (Value("y", "float32", ("batch", 4)),)),
            Call("aten.relu.default", ({"value": "y"},), (), (Value("z", "float32", ("batch", 4)),)),
            Call("aten.slice.Tensor", ({"value": "x"}, 1, 0, 1), (), (Value("first", "float32", ("batch", 1)),)),
            Call(
                "aten.add.Tensor",
                ({"value": "z"}, {"value": "first"}),
                (("alpha", 1),),
                (Value("sum", "float32", ("batch", 4)),),
            ),
        ),
        outputs=("sum",),
    )


def altered(change: Callable[[dict[str, Any]], None]) -> bytes:
    """The program's canonical bytes after a change that a stranger might make."""
    document = json.loads(linear_program().to_bytes())
    change(document)
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def with_call(operator: str, arguments: list[Any], shape: list[Any], **keywords: Any) -> bytes:
    """The program with one more call, of any operator."""

    def change(document: dict[str, Any]) -> None:
        document["calls"].append([operator, arguments, keywords, [["new", "float32", shape]]])
        document["outputs"] = ["new"]

    return altered(change)


def test_program_read_from_its_bytes_is_the_same_program() -> None:
    program = linear_program()
    assert Program.from_bytes(program.to_bytes()) == program


def test_slices_of_a_program_give_its_output() -> None:
    program = linear_program()
    inputs = torch.randn(5, 3)
    expected = torch.relu(inputs @ WEIGHT.T) + inputs[:, :1]
    assert program.operator_count == 4
    for cut in range(1, 4):
        before = ProgramSlice(program, {"W": WEIGHT}, range(4), 0, cut)
        after = ProgramSlice(program, {"W": WEIGHT}, range(4), cut, 4)
        assert torch.equal(after.run(before.run({"x": inputs}))["sum"], expected)


def test_program_in_another_order_has_the_operators_in_that_order() -> None:
    program = linear_program()
    order = [2, 0, 1, 3]
    listed = program.in_order(order, cuts=(1, 3))
    assert [listed.operator_name(index) for index in range(4)] == ["first", "y", "z", "sum"]
    assert listed.cuts == (1, 3)
    inputs = torch.randn(2, 3)
    whole = [ProgramSlice(item, {"W": WEIGHT}, range(4), 0, 4).run({"x": inputs})["sum"] for item in (program, listed)]
    assert torch.equal(*whole)


def test_slice_of_an_order_that_is_not_topological_is_refused_by_name() -> None:
    with pytest.raises(ProgramError, match=r"not topological.*\(z\)"):
        ProgramSlice(linear_program(), {"W": WEIGHT}, [1, 0, 2, 3], 0, 2)


def test_slice_with_a_parameter_of_another_shape_is_refused_by_name() -> None:
    with pytest.raises(ProgramError, match="parameter 'W'"):
        ProgramSlice(linear_program(), {"W": WEIGHT.T}, range(4), 0, 2)
    with pytest.raises(ProgramError, match="'W' is missing"):
        ProgramSlice(linear_program(), {}, range(4), 0, 2)


def test_slice_without_products_needs_no_parameter() -> None:
    assert ProgramSlice(linear_program(), {}, range(4), 1, 4).parameter_names == ()


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({}, "'x' is missing"),
        ({"x": torch.zeros(2, 4)}, r"'x' is float32 \[2, 4\]"),
        ({"x": torch.zeros(2, 3, dtype=torch.float64)}, "'x' is float64"),
        ({"x": torch.zeros(9, 3)}, "batch is 9"),
    ],
)
def test_run_on_tensors_that_do_not_fit_is_refused(tensors: dict[str, torch.Tensor], message: str) -> None:
    part = ProgramSlice(linear_program(), {"W": WEIGHT}, range(4), 0, 2)
    with pytest.raises(ProgramError, match=message):
        part.run(tensors)


X = {"value": "x"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (with_call("aten.relu_.default", [X], ["batch", 3]), "writes to its operands"),
        (with_call("aten.add.out", [X, X], ["batch", 3], out=X), "writes to its operands"),
        (with_call("aten.rand_like.default", [X], ["batch", 3]), "random"),
        (with_call("aten.dropout.default", [X, 0.5, True], ["batch", 3]), "random"),
        (with_call("aten.scaled_dot_product_attention.default", [X, X, X, None, 0.5], ["batch", 3]), "dropout_p"),
        (with_call("aten.batch_norm.default", [X, *[None] * 4, True, 0.1, 1e-5, False], ["batch", 3]), "training"),
        (with_call("aten.nonzero.default", [X], ["batch", 2]), "depends on the values"),
        (with_call("aten.empty.memory_format", [[2, 2]], [2, 2]), "not on the list"),
        (with_call("aten.from_file.default", ["/etc/passwd"], [2]), "'from_file' is refused"),
        (with_call("aten.as_strided.default", [X, [2], [1]], [2]), "'as_strided' is refused"),
        (with_call("prims.add.default", [X, X], ["batch", 3]), "no other namespace"),
        (with_call("aten.__class__.default", [X], [2]), "is refused"),
        (with_call("aten.relu.__call__", [X], [2]), "no overload"),
        (with_call("os.system.default", ["true"], [2]), "no other namespace"),
        (with_call("aten.relu.default", [], ["batch", 3]), "'self' is missing"),
        (with_call("aten.relu.default", [X, X], ["batch", 3]), "the operator takes"),
        (with_call("aten.relu.default", [X], ["batch", 3], more=1), "the operator takes"),
        (with_call("aten.relu.default", ["x"], ["batch", 3]), "cannot run"),
        (with_call("aten.relu.default", [{"value": "later"}], ["batch", 3]), "made only later"),
        (with_call("aten.relu.default", [X], ["batch", 4]), r"'new' is float32 \[1, 3\]"),
        (with_call("aten.mm.default", [X, X], ["batch", 3]), "cannot run"),
        (
            with_call("aten.repeat_interleave.self_Tensor", [X, X, 0], ["batch", 3], output_size=3),
            "depends on the values",
        ),
        (with_call("aten.scatter.reduce", [X, 0, X, X], ["batch", 3], reduce="add"), "not deterministic"),
        (with_call("aten.zeros.default", [[2, 2]], [2, 2], layout=1), "layout is not a program's choice"),
        (with_call("aten.relu.default", [X], [["*", *[2**61] * 15]]), "not below"),
        (with_call("aten.relu.default", [X], [["*", ["*", 2**61, 2**61], "batch"]]), "not below"),
        (with_call("aten.full.default", [[1 << 20, 1 << 20], 1.0], [1 << 20, 1 << 20]), "the limit is"),
        (with_call("aten.repeat.default", [X, [1 << 30, 1]], [1 << 30, 3]), "the limit is"),
        (with_call("aten.expand.default", [X, [1 << 40, 3]], [1 << 40, 3]), "the limit is"),
        (with_call("aten.relu.default", [X], [["//", "batch", 0]]), "divides by zero"),
        (with_call("aten.relu.default", [X], [["**", "batch", 9]]), "no integer, dimension"),
        (with_call("aten.relu.default", [{"file": "/etc/passwd"}], ["batch", 3]), "no known kind"),
    ],
)
def test_malicious_call_is_refused(data: bytes, message: str) -> None:
    with pytest.raises(ProgramError, match=message):
        Program.from_bytes(data)


def test_product_with_a_huge_intermediate_is_refused() -> None:
    # The outer product inside is over the limit, what comes out of it is one number.
    wide = [1 << 20]
    data = altered(
        lambda document: (
            document["calls"].append(["aten.full.default", [wide, 1.0], {}, [["wide", "float32", wide]]]),
            document["calls"].append(
                [
                    "aten.einsum.default",
                    ["i,j,ij->", [{"value": "wide"}, {"value": "wide"}, {"value": "big"}]],
                    {},
                    [["one", "float32", []]],
                ]
            ),
            document["calls"].insert(
                0, ["aten.full.default", [[1 << 20, 1 << 20], 1.0], {}, [["big", "float32", [1 << 20, 1 << 20]]]]
            ),
        )
    )
    with pytest.raises(ProgramError, match="the limit is"):
        Program.from_bytes(data)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda document: document.update(format=2), "format is 2"),
        (lambda document: document.update(outputs=["nothing"]), "'nothing' is made by no call"),
        (lambda document: document.update(outputs=[]), "at least one input"),
        (lambda document: document.update(cuts=[4]), "cuts"),
        (lambda document: document.update(cuts=[2, 1]), "cuts"),
        (lambda document: document.update(calls={}), "calls is not a list"),
        (lambda document: document.pop("cuts"), "not an object of"),
        (lambda document: document["calls"].append(7), "call 5 is not"),
        (lambda document: document["calls"].append(document["calls"][1]), "was made before"),
        (lambda document: document["calls"].pop(0), "made only later"),
        (lambda document: document["dimensions"].append(["batch", 1, 2]), "two dimensions"),
        (lambda document: document["parameters"].append(document["parameters"][0]), "was made before"),
        (lambda document: document["parameters"][0].__setitem__(0, ["W"]), "printable characters"),
        (lambda document: document["inputs"][0].__setitem__(0, {}), "printable characters"),
        (lambda document: document["dimensions"][0].__setitem__(2, 1 << 40), "expected bounds"),
        (lambda document: document["parameters"][0].__setitem__(1, "object"), "dtype 'object'"),
        (lambda document: document["parameters"][0].__setitem__(2, [1 << 30, 1 << 30]), "the limit is"),
    ],
)
def test_malformed_program_is_refused(change: Callable[[dict[str, Any]], None], message: str) -> None:
    with pytest.raises(ProgramError, match=message):
        Program.from_bytes(altered(change))


def test_program_that_is_no_canonical_json_is_refused() -> None:
    data = linear_program().to_bytes()
    for wrong in (b"", b"\xff", data + b" ", b"[" * 100_000, data.replace(b'"alpha":1', b'"alpha":1e999')):
        with pytest.raises(ProgramError):
            Program.from_bytes(wrong)
    with pytest.raises(ProgramError, match="the limit is"):
        Program.from_bytes(b" " * (MAXIMUM_PROGRAM_BYTES + 1))


def test_calls_of_no_operator_that_share_ever_more_parameters_are_refused() -> None:
    # Each call needs all parameters of those before it: what is kept grows with the square of the program.
    count = 4000
    calls = [Call("aten.neg.default", ({"parameter": "p0"},), (), (Value("c0", "float32", ()),))]
    for number in range(1, count):
        operands = ({"value": f"c{number - 1}"}, {"parameter": f"p{number}"})
        calls.append(Call("aten.mul.Tensor", operands, (), (Value(f"c{number}", "float32", ()),)))
    with pytest.raises(ProgramError, match="a program may need as many"):
        Program(
            dimensions=(),
            inputs=(Value("x", "float32", ()),),
            parameters=tuple(Value(f"p{number}", "float32", ()) for number in range(count)),
            calls=(*calls, Call("aten.relu.default", ({"value": "x"},), (), (Value("y", "float32", ()),))),
            outputs=("y",),
        )


def test_call_that_fails_on_the_values_of_a_tensor_is_named() -> None:
    program = Program(
        dimensions=(),
        inputs=(Value("rows", "int64", (2,)),),
        parameters=(Value("table", "float32", (4, 3)),),
        calls=(
            Call(
                "aten.embedding.default",
                ({"parameter": "table"}, {"value": "rows"}),
                (),
                (Value("found", "float32", (2, 3)),),
            ),
        ),
        outputs=("found",),
    )
    part = ProgramSlice(program, {"table": WEIGHT}, range(1), 0, 1)
    with pytest.raises(ProgramError, match=r"call 0 \(aten\.embedding\.default\) failed"):
        part.run({"rows": torch.tensor([0, 1 << 40])})
