"""Stages: cut anywhere they compute what the whole model computes; sessions keep their rules."""

import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from bsns.runtime.decoder_executor import StageExecutor
from bsns.runtime.executor import (
    ContextLimitError,
    ExecutionError,
    StepInput,
    iterate_reexecution,
    reexecute,
)
from bsns.runtime.prepare import prepare
from bsns.runtime.ragged_attention import DecoderSession
from bsns.runtime.weight_store import WeightMismatchError, WeightStore
from tests.unit.runtime_models import flip_byte, greedy, silent, tiny_llama, tiny_source

PROMPTS = ([5, 9, 40], [1, 2, 3, 4, 50, 60, 70, 80, 90, 11, 12], [96])
CUTS = [(0, 6), (0, 1, 6), (0, 5, 6), (0, 3, 6), (0, 1, 2, 3, 4, 5, 6), (0, 2, 4, 6)]


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_llama()


@pytest.fixture(scope="module")
def store(model: Any, tmp_path_factory: pytest.TempPathFactory) -> WeightStore:
    return WeightStore(prepare(tiny_source(model), tmp_path_factory.mktemp("cache"), report=silent))


def stages(store: WeightStore, cuts: Sequence[int]) -> list[StageExecutor]:
    return [StageExecutor(store, first, end) for first, end in pairwise(cuts)]


def generated(model: Any, prompt: Sequence[int], tokens: int) -> list[int]:
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            do_sample=False,
            eos_token_id=None,
        )
    return list(output[0, len(prompt) :].tolist())


@pytest.mark.parametrize("cuts", CUTS)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_answer_at_every_cut_equals_transformers(
    model: Any, store: WeightStore, cuts: Sequence[int], prompt: list[int]
) -> None:
    assert greedy(stages(store, cuts), prompt, 12) == generated(model, prompt, 12)


def test_step_outputs_equal_one_pass_in_any_steps(store: WeightStore, model: Any) -> None:
    generator = random.Random(4)
    ids = torch.tensor([generator.randrange(97) for _ in range(30)])
    with torch.inference_mode():
        expected = model(ids[None]).logits[0]
    for _ in range(5):
        (stage,) = stages(store, (0, 6))
        session = stage.new_session(30)
        position = 0
        while position < 30:
            rows = min(generator.randint(1, 9), 30 - position)
            chunk = ids[position : position + rows]
            logits = stage.forward(session, chunk, position=position, logit_rows=range(rows))
            torch.testing.assert_close(logits, expected[position : position + rows], rtol=1e-4, atol=1e-4)
            position += rows


@pytest.mark.parametrize(("first", "end"), [(0, 3), (3, 6), (2, 4)])
@pytest.mark.parametrize("chunk_rows", [256, 4, 1])
def test_reexecution_gives_each_steps_outputs(store: WeightStore, first: int, end: int, chunk_rows: int) -> None:
    stage = StageExecutor(store, first, end)
    generator = torch.Generator().manual_seed(3)
    session, steps, outputs, position = stage.new_session(40), [], [], 0
    for rows in (7, 1, 1, 5, 1):
        inputs = (
            torch.randn(rows, 32, generator=generator) if first else torch.randint(0, 97, (rows,), generator=generator)
        )
        steps.append(StepInput(position, inputs))
        outputs.append(stage.forward(session, inputs, position=position))
        position += rows
    again = reexecute(stage, steps, chunk_rows=chunk_rows)
    assert [tuple(tensor.shape) for tensor in again] == [tuple(tensor.shape) for tensor in outputs]
    for expected, actual in zip(outputs, again, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("first", "end"), [(0, 3), (3, 6), (2, 4), (0, 6), (0, 2)])
@pytest.mark.parametrize("chunk_rows", [256, 4])
def test_rows_inside_are_what_the_last_unit_takes(store: WeightStore, first: int, end: int, chunk_rows: int) -> None:
    stage, shorter = StageExecutor(store, first, end), StageExecutor(store, first, end - 1)
    generator = torch.Generator().manual_seed(5)
    steps = []
    for position, rows in ((0, 7), (7, 1), (8, 5), (10, 1)):
        inputs = (
            torch.randn(rows, 32, generator=generator) if first else torch.randint(0, 97, (rows,), generator=generator)
        )
        steps.append(StepInput(position, inputs, rows))
    found: list[torch.Tensor] = []
    outputs = list(iterate_reexecution(stage, steps, chunk_rows=chunk_rows, inside=found.append))
    for expected, actual in zip(reexecute(stage, steps, chunk_rows=chunk_rows), outputs, strict=True):
        assert torch.equal(expected, actual), "looking inside changes nothing"
    inside = torch.cat(reexecute(shorter, steps, chunk_rows=chunk_rows))
    torch.testing.assert_close(torch.cat(found), inside, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("unit", [0, 1, 5])
def test_stage_of_one_unit_shows_rows_that_others_see(store: WeightStore, unit: int) -> None:
    stage = StageExecutor(store, unit, unit + 1)
    inputs = torch.randn(3, 32) if unit else torch.tensor([1, 2, 3])
    found: list[torch.Tensor] = []
    output = stage.forward(stage.new_session(3), inputs, position=0, inside=found.append)
    assert torch.equal(found[0], inputs if stage.has_head else output)


@pytest.mark.parametrize(("first", "end"), [(0, 3), (3, 6), (2, 4)])
@pytest.mark.parametrize("chunk_rows", [256, 4, 1])
def test_reexecution_of_steps_that_take_rows_back_gives_what_each_step_gave(
    store: WeightStore, first: int, end: int, chunk_rows: int
) -> None:
    stage = StageExecutor(store, first, end)
    generator = torch.Generator().manual_seed(3)
    session, steps, outputs = stage.new_session(40), [], []
    for position, rows in ((0, 7), (7, 1), (8, 5), (10, 1), (11, 5), (16, 3), (17, 4), (18, 2), (20, 1)):
        inputs = (
            torch.randn(rows, 32, generator=generator) if first else torch.randint(0, 97, (rows,), generator=generator)
        )
        asked = rows if position else 1
        session.truncate(position)
        steps.append(StepInput(position, inputs, asked))
        wanted = range(rows - asked, rows) if stage.has_head else None
        outputs.append(stage.forward(session, inputs, position=position, logit_rows=wanted))
    again = reexecute(stage, steps, chunk_rows=chunk_rows)
    assert [tuple(tensor.shape) for tensor in again] == [tuple(tensor.shape) for tensor in outputs]
    for expected, actual in zip(outputs, again, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_reexecution_refuses_missing_steps(store: WeightStore) -> None:
    stage = StageExecutor(store, 0, 2)
    with pytest.raises(ExecutionError, match="step 1 starts at position 4, expected 1 to 3"):
        list(iterate_reexecution(stage, [StepInput(0, torch.tensor([1, 2, 3])), StepInput(4, torch.tensor([1]))]))
    for position in (0, 3, 9):  # of step 1, at positions 3 to 5, at least one row is kept
        steps = [StepInput(0, torch.tensor([1, 2, 3])), StepInput(3, torch.tensor([1, 2, 3]))]
        with pytest.raises(ExecutionError, match=f"step 2 starts at position {position}, expected 4 to 6"):
            reexecute(stage, [*steps, StepInput(position, torch.tensor([1]))])
    assert reexecute(stage, []) == []


def test_truncate_repeats_a_step_exactly(store: WeightStore) -> None:
    stage = StageExecutor(store, 0, 6)
    session = stage.new_session(10)
    stage.forward(session, torch.tensor([1, 2, 3]), position=0)
    first = stage.forward(session, torch.tensor([4]), position=3)
    session.truncate(3)
    assert session.position == 3
    assert torch.equal(stage.forward(session, torch.tensor([4]), position=3), first)
    session.truncate(0)
    stage.forward(session, torch.tensor([1, 2, 3]), position=0)
    assert torch.equal(stage.forward(session, torch.tensor([4]), position=3), first)
    with pytest.raises(ExecutionError, match="position 5"):
        session.truncate(5)


def test_step_out_of_order_or_beyond_limit_leaves_session_unchanged(store: WeightStore) -> None:
    stage = StageExecutor(store, 0, 3)
    session = stage.new_session(4)
    stage.forward(session, torch.tensor([1, 2, 3]), position=0)
    for position in (0, 2, 4):
        with pytest.raises(ExecutionError, match="session is at 3"):
            stage.forward(session, torch.tensor([1]), position=position)
    with pytest.raises(ContextLimitError, match="4 tokens reserved"):
        stage.forward(session, torch.tensor([1, 2]), position=3)
    assert session.position == 3
    stage.forward(session, torch.tensor([1]), position=3)
    with pytest.raises(ContextLimitError, match="1 to 64"):
        stage.new_session(65)


def test_forward_failing_half_way_can_be_repeated(store: WeightStore, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = StageExecutor(store, 0, 6)
    session, other = stage.new_session(8), stage.new_session(8)
    for each in (session, other):
        stage.forward(each, torch.tensor([1, 2]), position=0)
    with monkeypatch.context() as patch:
        patch.setattr(stage._blocks[2], "forward", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            stage.forward(session, torch.tensor([3]), position=2)
    expected = stage.forward(other, torch.tensor([3]), position=2)
    assert torch.equal(stage.forward(session, torch.tensor([3]), position=2), expected)


def test_cache_bytes_are_those_of_the_tensors(store: WeightStore) -> None:
    stage = StageExecutor(store, 1, 4)
    session = stage.new_session(20)
    stage.forward(session, torch.zeros(5, 32), position=0)
    assert isinstance(session, DecoderSession)
    assert session.cache_bytes_limit == session.keys.nbytes + session.values.nbytes
    assert session.cache_bytes == session.cache_bytes_limit // 4


@pytest.mark.parametrize(
    "inputs",
    [torch.tensor([97]), torch.tensor([-1]), torch.zeros(1, 32), torch.tensor([1], dtype=torch.int32),
     torch.tensor([[1]]),     torch.tensor([], dtype=torch.int64)],
)  # fmt: skip
def test_inputs_that_are_not_token_ids_are_refused(store: WeightStore, inputs: torch.Tensor) -> None:
    stage = StageExecutor(store, 0, 2)
    with pytest.raises(ExecutionError):
        stage.forward(stage.new_session(4), inputs, position=0)


def test_hidden_states_of_wrong_width_or_rows_are_refused(store: WeightStore) -> None:
    stage = StageExecutor(store, 3, 6)
    for inputs in (torch.zeros(1, 31), torch.zeros(32), torch.zeros(1, 32, dtype=torch.float64), torch.zeros(0, 32)):
        with pytest.raises(ExecutionError):
            stage.forward(stage.new_session(4), inputs, position=0)
    with pytest.raises(ExecutionError, match="logit_rows"):
        stage.forward(stage.new_session(4), torch.zeros(2, 32), position=0, logit_rows=[2])


@pytest.mark.parametrize("arguments", [(2, 2), (-1, 2), (0, 7), (4, 3)])
def test_unit_range_outside_the_model_is_refused(store: WeightStore, arguments: tuple[int, int]) -> None:
    with pytest.raises(ExecutionError, match="range"):
        StageExecutor(store, *arguments)


def test_damaged_unit_stops_the_stage_and_only_that(tmp_path: Path) -> None:
    folder = prepare(tiny_source(tiny_llama()), tmp_path, report=silent)
    flip_byte(folder / "unit-00002.safetensors")
    store = WeightStore(folder)
    with pytest.raises(WeightMismatchError, match="unit 2"):
        StageExecutor(store, 0, 3)
    assert StageExecutor(store, 3, 6).execution_class == "torch-cpu/float32/sdpa"


def test_eager_attention_is_another_class_with_equal_outputs(store: WeightStore) -> None:
    outputs = []
    for attention in ("sdpa", "eager"):
        stage = StageExecutor(store, 0, 6, attention=attention)
        session = stage.new_session(20)
        stage.forward(session, torch.arange(7), position=0)
        outputs.append(stage.forward(session, torch.arange(9), position=7, logit_rows=range(9)))
        assert stage.execution_class.endswith(attention)
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)
