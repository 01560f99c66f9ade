import random
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

from bsns.protocol.model_graph import MODEL_INPUT
from bsns.runtime.capture import CapturedModel, CaptureError, capture
from tests.unit.captured_models import FAMILIES, Example, dynamic_shapes

TOLERANCE = 1e-5
# EfficientNet's cuts are tested unit by unit in test_program_executor.py.
CUT_FAMILIES = ["residual-cnn", "unet", "vision-transformer", "sentence-encoder", "gpt2"]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    # Small operators gain nothing from threads, and test processes share the cores.
    torch.set_num_threads(1)


@cache
def example(name: str) -> Example:
    return FAMILIES[name]()


@cache
def captured(name: str) -> CapturedModel:
    module, inputs = example(name)
    return capture(module, inputs, dynamic_shapes=dynamic_shapes(name), name=name)


def fresh_inputs(name: str, *, batch: int, tokens: int = 5) -> tuple[Tensor, ...]:
    """Inputs of other sizes and values than the example's."""
    torch.manual_seed(99)
    if name == "sentence-encoder":
        mask = torch.ones(batch, tokens, dtype=torch.int64)
        mask[-1, tokens - 2 :] = 0
        return torch.randint(1000, 20000, (batch, tokens)), mask
    if name == "gpt2":
        return (torch.randint(0, 60, (batch, tokens)),)
    return (torch.randn(batch, *example(name)[1][0].shape[1:]),)


def whole_output(name: str, inputs: tuple[Tensor, ...]) -> Tensor:
    with torch.no_grad():
        output: Tensor = example(name)[0](*inputs)
    return output


def sliced_output(model: CapturedModel, order: list[int], cuts: list[int], inputs: tuple[Tensor, ...]) -> Tensor:
    """The model's one output, from slices that hand over nothing but what they say."""
    given = dict(zip((value.name for value in model.program.inputs), inputs, strict=True))
    tensors = {name: given[name] for name in model.program.carried(order, 0)}
    for first, end in zip([0, *cuts], [*cuts, len(order)], strict=True):
        part = model.slice(order, first, end)
        assert set(tensors) == set(part.carried_in)
        # As a wire would hand them over: nothing but the values, row by row.
        tensors = {name: tensor.contiguous().clone() for name, tensor in part.run(tensors).items()}
    (output,) = tensors.values()
    return output


def random_order(model: CapturedModel, seed: int) -> list[int]:
    generator = random.Random(seed)
    waiting = [set(items) for items in model.graph.predecessors()]
    left, order = set(range(len(waiting))), []
    while left:
        ready = sorted(operator for operator in left if not waiting[operator] & left)
        order.append(generator.choice(ready))
        left.remove(order[-1])
    return order


@pytest.mark.parametrize("name", CUT_FAMILIES)
def test_every_cut_of_a_family_gives_the_whole_models_output(name: str) -> None:
    model = captured(name)
    inputs = fresh_inputs(name, batch=3)
    expected = whole_output(name, inputs)
    order = list(range(len(model.graph.operators)))
    for cut in range(1, len(order)):
        difference = (sliced_output(model, order, [cut], inputs) - expected).abs().max()
        assert difference <= TOLERANCE, f"cut {cut} ({model.graph.operators[cut].name}): {difference}"


@pytest.mark.parametrize("name", CUT_FAMILIES)
def test_several_cuts_of_random_topological_orders_give_the_whole_models_output(name: str) -> None:
    model = captured(name)
    inputs = fresh_inputs(name, batch=1)
    expected = whole_output(name, inputs)
    generator = random.Random(7)
    for slices in (3, 4, 5):
        order = random_order(model, slices)
        assert order != sorted(order) or name in ("residual-cnn", "unet")
        cuts = sorted(generator.sample(range(1, len(order)), slices - 1))
        assert (sliced_output(model, order, cuts, inputs) - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", ["vision-transformer", "sentence-encoder"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("tokens", [5, 17])
def test_slices_of_other_batch_and_length_than_captured_give_the_whole_models_output(
    name: str, batch: int, tokens: int
) -> None:
    model = captured(name)
    inputs = fresh_inputs(name, batch=batch, tokens=tokens)
    order = list(range(len(model.graph.operators)))
    cuts = [len(order) // 4, len(order) // 2, 3 * len(order) // 4]
    assert (sliced_output(model, order, cuts, inputs) - whole_output(name, inputs)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("name", CUT_FAMILIES)
def test_what_crosses_a_cut_is_exactly_what_later_operators_read(name: str) -> None:
    model = captured(name)
    tensors = {tensor.name: tensor for tensor in model.graph.tensors}
    order = random_order(model, 3)
    place = {operator: position for position, operator in enumerate(order)}
    for cut in range(len(order)):
        expected = {
            tensor.name
            for tensor in tensors.values()
            if (tensor.producer == MODEL_INPUT or place[tensor.producer] < cut)
            and (tensor.is_output or any(place[consumer] >= cut for consumer in tensor.consumers))
        }
        assert set(model.program.carried(order, cut)) == expected


def test_a_skip_connection_crosses_every_cut_that_it_spans() -> None:
    model = captured("unet")
    names = [operator.name for operator in model.graph.operators]
    bottom = names.index("conv2d_6")
    carried = model.program.carried(list(range(len(names))), bottom)
    sizes = sorted(model.program.values[name].sizes_at({"batch": 1}) for name in carried)
    assert sizes == [(1, 4, 16, 16), (1, 8, 8, 8), (1, 16, 2, 2), (1, 16, 4, 4)]


def test_a_tied_parameter_is_one_parameter_of_several_operators() -> None:
    graph = captured("gpt2").graph
    embedding = [index for index, item in enumerate(graph.parameters) if item.size_bytes == 60 * 32 * 4]
    assert len(embedding) == 1
    users = [operator.name for operator in graph.operators if embedding[0] in operator.parameters]
    assert len(users) == 2
    assert users[0].startswith("embedding")
    assert users[1].startswith("linear")


def test_a_slice_needs_only_the_parameters_of_its_own_operators() -> None:
    model = captured("gpt2")
    count = len(model.graph.operators)
    halves = [model.slice(range(count), 0, count // 2), model.slice(range(count), count // 2, count)]
    shared = set(halves[0].parameter_names) & set(halves[1].parameter_names)
    assert {model.parameters[name].shape for name in shared} == {(60, 32)}
    assert set().union(*(half.parameter_names for half in halves)) == set(model.parameters)


def test_what_depends_on_no_input_is_no_operator() -> None:
    model = captured("gpt2")
    made_from_shapes = {"arange", "cumsum", "le"}
    inside = {model.program.calls[call].packet for calls in model.program.structure.operators for call in calls}
    assert made_from_shapes <= {call.packet for call in model.program.calls}
    assert not made_from_shapes & inside


def test_work_is_two_operations_for_each_use_of_a_weight() -> None:
    graph = captured("residual-cnn").graph
    work = {operator.name: operator.work for operator in graph.operators}
    assert work["conv2d"] == 2 * 8 * 3 * 9 * 16 * 16
    assert work["linear"] == 2 * 24 * 10
    assert work["relu"] == 8 * 16 * 16


def test_costs_are_those_of_one_row() -> None:
    graph = captured("residual-cnn").graph
    assert graph.tensors[0].size_bytes == 4 * 3 * 16 * 16
    first = graph.operators[0]
    assert first.peak_bytes == 4 * (3 + 8) * 16 * 16
    assert all(operator.nanoseconds > 0 for operator in graph.operators)


def test_peak_bytes_of_a_slice_are_at_most_the_sum_and_at_least_the_largest_operator() -> None:
    model = captured("unet")
    count = len(model.graph.operators)
    peak = model.slice(range(count), 0, count).peak_bytes({"batch": 1})
    assert max(operator.peak_bytes for operator in model.graph.operators) <= peak
    assert peak <= sum(tensor.size_bytes for tensor in model.graph.tensors)


class _Module(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self._function = function

    def forward(self, inputs: Tensor) -> Tensor:
        return self._function(inputs)


class _Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, inputs: Tensor) -> Tensor:
        self.calls.add_(1)
        return inputs + self.calls


def test_capture_of_data_dependent_control_flow_is_refused() -> None:
    with pytest.raises(CaptureError, match="data-dependent"):
        capture(_Module(lambda x: x + 1 if x.sum() > 0 else x - 1), (torch.ones(2, 3),))


def test_capture_of_a_result_whose_shape_depends_on_values_is_refused_by_name() -> None:
    with pytest.raises(CaptureError, match=r"aten\.nonzero.*depends on the values"):
        capture(_Module(lambda x: x[torch.nonzero(x)[:, 0]].sum(0)), (torch.ones(4, 3),))


def test_capture_of_a_module_that_counts_its_calls_is_refused() -> None:
    with pytest.raises(CaptureError, match="calls"):
        capture(_Counting(), (torch.ones(2, 3),))


def test_capture_of_a_module_that_writes_to_its_input_is_refused() -> None:
    with pytest.raises(CaptureError, match="writes to"):
        capture(_Module(lambda x: x.add_(1)), (torch.ones(2, 3),))


def test_capture_of_a_random_operator_is_refused_by_name() -> None:
    with pytest.raises(CaptureError, match=r"aten\.rand_like.*random"):
        capture(_Module(lambda x: x + torch.rand_like(x)), (torch.ones(2, 3),))


def test_capture_of_an_operator_that_is_not_deterministic_is_refused_by_name() -> None:
    def scattered(inputs: Tensor) -> Tensor:
        return torch.zeros(2, 3).scatter_add(0, torch.zeros(2, 3, dtype=torch.int64), inputs)

    with pytest.raises(CaptureError, match=r"aten\.scatter_add.*deterministic"):
        capture(_Module(scattered), (torch.ones(2, 3),))


def test_capture_of_a_custom_operator_is_refused_by_name() -> None:
    @torch.library.custom_op("bsns_test::doubled", mutates_args=())
    def doubled(inputs: Tensor) -> Tensor:
        return inputs * 2

    doubled.register_fake(torch.empty_like)
    with pytest.raises(CaptureError, match=r"bsns_test.*namespace"):
        capture(_Module(doubled), (torch.ones(2, 3),))


def test_capture_of_a_module_that_differs_from_run_to_run_is_refused() -> None:
    runs = iter(range(100))
    with pytest.raises(CaptureError, match="not deterministic"):
        capture(_Module(lambda x: x * next(runs)), (torch.ones(2, 3),))


def test_capture_of_a_fixed_size_that_was_called_dynamic_is_refused() -> None:
    with pytest.raises(CaptureError, match="batch"):
        capture(_Module(lambda x: x.reshape(6)), (torch.ones(2, 3),), dynamic_shapes=({0: Dim("batch", min=1, max=8)},))


def test_mutation_inside_a_module_is_captured_as_functional_calls() -> None:
    def filled(inputs: Tensor) -> Tensor:
        hidden = inputs * 2
        hidden.add_(1)
        hidden[:, 0] = 0
        return hidden.relu_()

    model = capture(_Module(filled), (torch.randn(2, 3),))
    inputs = torch.randn(2, 3)
    order = list(range(len(model.graph.operators)))
    assert torch.equal(sliced_output(model, order, [1], (inputs,)), filled(inputs))


def test_pieces_of_a_split_cross_a_cut_alone() -> None:
    def attention_like(inputs: Tensor) -> Tensor:
        query, key, value = (inputs * 2).chunk(3, dim=1)
        return (query + key).relu() + value

    model = capture(_Module(attention_like), (torch.randn(2, 6),))
    order = list(range(len(model.graph.operators)))
    assert [operator.name for operator in model.graph.operators] == ["mul", "add", "relu", "add_1"]
    carried = [model.program.values[name].sizes_at({}) for name in model.program.carried(order, 2)]
    assert carried == [(2, 2), (2, 2)]
    inputs = torch.randn(2, 6)
    assert torch.equal(sliced_output(model, order, [1, 2, 3], (inputs,)), attention_like(inputs))


def test_output_that_stands_twice_in_another_form_is_captured_for_each() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)

        def forward(self, inputs: Tensor) -> tuple[Tensor, ...]:
            hidden = inputs + 1
            return hidden, self.drop(hidden), hidden, inputs

    model = capture(Twice(), (torch.randn(2, 3),))
    inputs = torch.randn(2, 3)
    given = {model.program.inputs[0].name: inputs}
    found = model.slice([0], 0, 1).run(given).values()
    assert sorted(float((tensor - inputs).mean().round()) for tensor in found) == [0, 1, 1]


def test_capture_compares_the_finite_values_of_an_output_that_has_infinite_ones() -> None:
    runs = iter(range(100))

    def masked(inputs: Tensor) -> Tensor:
        return (inputs * next(runs)).masked_fill(torch.tensor([True, False, False]), float("-inf"))

    with pytest.raises(CaptureError, match="not deterministic"):
        capture(_Module(masked), (torch.ones(2, 3),))


@pytest.mark.parametrize(
    ("function", "inputs", "message"),
    [
        (lambda x: x + 1, torch.ones(2, 3, device="meta"), "input 0 is torch.strided on meta"),
        (lambda x: x.to_dense(), torch.ones(2, 3).to_sparse(), "input 0 is torch.sparse_coo"),
        (lambda x: x + x.new_zeros(1 << 14, 1 << 15).sum(), torch.ones(2, 3), r"aten\.new_zeros.*the limit is"),
        (lambda x: (x * torch.ones(3, dtype=torch.complex64)).real, torch.ones(2, 3), "complex64 is not one of"),
        (lambda x: x[x > 0].sum(), torch.ones(2, 3), "depends on the values"),
        (lambda x: x * x.max().item(), torch.ones(2, 3), "no tensor and no size"),
        (lambda x: torch.div(x, 2, rounding_mode="trunc"), torch.ones(2, 3, dtype=torch.int64), r"aten\.div"),
    ],
)
def test_capture_of_what_no_program_can_say_is_refused_with_the_reason(
    function: Callable[..., Tensor], inputs: Tensor, message: str
) -> None:
    with pytest.raises(CaptureError, match=message):
        capture(_Module(function), (inputs,))


def test_capture_for_batches_that_leave_out_one_row_is_refused() -> None:
    with pytest.raises(CaptureError, match="batch is 1, the program was captured for 2 to 8"):
        capture(nn.Linear(3, 2), (torch.ones(2, 3),), dynamic_shapes=({0: Dim("batch", min=2, max=8)},))


def test_input_whose_size_is_made_of_a_later_inputs_is_captured() -> None:
    class Pair(nn.Module):
        def forward(self, long: Tensor, short: Tensor) -> Tensor:
            return long.sum() + short.sum()

    batch = Dim("batch", min=1, max=8)
    inputs = torch.randn(4, 3), torch.randn(2, 3)
    model = capture(Pair(), inputs, dynamic_shapes=({0: 2 * batch}, {0: batch}))
    order = list(range(len(model.graph.operators)))
    assert torch.equal(sliced_output(model, order, [], inputs), Pair()(*inputs))
