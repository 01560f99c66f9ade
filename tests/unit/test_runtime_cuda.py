"""The executors on a GPU: what they compute is what the CPU computes, in any batch, and a GPU's failures are refusals.

Everything but the refusals needs a GPU and is skipped without one.
"""

import dataclasses
import gc
import threading
import weakref
from collections.abc import Iterator, Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from bsns.runtime.decoder_blocks import RotaryBlock
from bsns.runtime.decoder_executor import StageExecutor
from bsns.runtime.executor import BatchStep, ContextLimitError, ExecutionError, StepInput, reexecute
from bsns.runtime.prepare import prepare
from bsns.runtime.profile import measure
from bsns.runtime.weight_store import WeightStore
from tests.unit.runtime_models import greedy, silent, tiny_source
from tests.unit.test_decoder_families import (
    CONFIGURATIONS,
    CONTEXT,
    PROMPT,
    UNITS,
    VOCABULARY,
    Prepared,
    in_chunks,
    through,
    whole_model,
)

DEVICE = "cuda"
WIDTH = 32
# Largest difference of a value; relative error of a step's rows. The models are three blocks deep.
CLOSE = 5e-5
NOISE = {"float32": 1e-5, "bfloat16": 3e-2}

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: torch.cuda.is_available() is False")


@pytest.fixture(scope="module", params=list(CONFIGURATIONS))
def prepared(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    model = whole_model(request.param)
    return Prepared(model, WeightStore(prepare(tiny_source(model), tmp_path_factory.mktemp("cache"), report=silent)))


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    """With a context in which a session can be larger than a GPU."""
    model = whole_model("llama", max_position_embeddings=4_000_000)
    return Prepared(model, WeightStore(prepare(tiny_source(model), tmp_path_factory.mktemp("cache"), report=silent)))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def arithmetics_of(prepared: Prepared) -> list[str]:
    return ["float32"] if prepared.model.config.model_type == "mixtral" else list(NOISE)


def random_inputs(stage: StageExecutor, rows: int, generator: torch.Generator) -> Tensor:
    if stage.has_embedding:
        return torch.randint(0, VOCABULARY, (rows,), generator=generator)
    return torch.randn(rows, WIDTH, generator=generator)


def assert_near(output: object, expected: object, noise: float) -> None:
    assert isinstance(output, Tensor), output
    assert isinstance(expected, Tensor), expected
    assert output.device.type == "cpu"
    assert output.dtype == torch.float32
    assert output.shape == expected.shape
    error = (output - expected).norm() / expected.norm()
    assert error <= noise, error


# ------------------------------------------------------------------------------------------------------ as the CPU does


@needs_gpu
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("lengths", [[11], [1] * 11, [4, 1, 6]], ids=str)
def test_prompt_in_any_steps_gives_the_logits_of_the_cpu(
    prepared: Prepared, lengths: list[int], attention: str
) -> None:
    cuts = (0, 2, UNITS)
    steps = in_chunks(PROMPT, lengths)
    logits = through(prepared.stages(cuts, device=DEVICE, attention=attention), steps)
    assert logits.device.type == "cpu"
    torch.testing.assert_close(logits, through(prepared.stages(cuts), steps), rtol=0, atol=CLOSE)


@needs_gpu
@pytest.mark.parametrize("cuts", [(0, UNITS), (0, 2, UNITS), tuple(range(UNITS + 1))], ids=str)
def test_greedy_tokens_are_those_of_the_cpu(prepared: Prepared, cuts: Sequence[int]) -> None:
    assert greedy(prepared.stages(cuts, device=DEVICE), PROMPT, 24) == greedy(prepared.stages(cuts), PROMPT, 24)


@needs_gpu
def test_bfloat16_differs_from_the_cpus_by_its_own_rounding_only(prepared: Prepared) -> None:
    for arithmetic in arithmetics_of(prepared):
        for first, end in pairwise((0, 2, UNITS)):
            options = {"arithmetic": arithmetic}
            here = StageExecutor(prepared.store, first, end, device=DEVICE, **options)  # type: ignore[arg-type]
            cpu = StageExecutor(prepared.store, first, end, **options)  # type: ignore[arg-type]
            inputs = random_inputs(here, 9, torch.Generator().manual_seed(1))
            output = here.forward(here.new_session(9), inputs, position=0, logit_rows=range(9))
            assert_near(
                output, cpu.forward(cpu.new_session(9), inputs, position=0, logit_rows=range(9)), NOISE[arithmetic]
            )
            assert here.execution_class == f"torch-cuda/{arithmetic}/sdpa"
            assert here.memory_bytes == cpu.memory_bytes


@needs_gpu
def test_truncated_session_replays_and_takes_another_turn(prepared: Prepared) -> None:
    (stage,), (cpu,) = prepared.stages((0, UNITS), device=DEVICE), prepared.stages((0, UNITS))
    sessions = stage.new_session(CONTEXT), cpu.new_session(CONTEXT)
    for position, rows in ((0, PROMPT), (4, PROMPT[4:]), (10, [60]), (4, [60]), (5, [61]), (5, [62, 63]), (6, [1])):
        outputs = []
        for executor, session in zip((stage, cpu), sessions, strict=True):
            session.truncate(position)
            outputs.append(executor.forward(session, torch.tensor(rows), position=position))
        assert_near(*outputs, NOISE["float32"])


# -------------------------------------------------------------------------------------------------------------- batches


@needs_gpu
def test_steps_of_many_sessions_in_one_batch_equal_each_alone_and_the_cpus(prepared: Prepared) -> None:
    for arithmetic in arithmetics_of(prepared):
        generator = torch.Generator().manual_seed(5)
        for first, end in pairwise((0, 2, UNITS)):
            stage = StageExecutor(prepared.store, first, end, device=DEVICE, arithmetic=arithmetic)
            cpu = StageExecutor(prepared.store, first, end, arithmetic=arithmetic)
            together, alone, there = ([item.new_session(CONTEXT) for _ in range(5)] for item in (stage, stage, cpu))
            # A long step beside short ones; then short ones alone, which are recorded and replayed.
            for rows in ((40, 1, 3, 12, 1), (1, 1, 1, 1, 1), (2, 9, 1, 1, 4), (1, 1, 1, 1, 1), (1, 2, 3, 4, 5)):
                steps = [
                    BatchStep(session, random_inputs(stage, count, generator), session.position)
                    for count, session in zip(rows, together, strict=True)
                ]
                steps[1] = dataclasses.replace(steps[1], logit_rows=range(rows[1]))
                outputs = stage.forward_batch(steps)
                for step, one, other, output in zip(steps, alone, there, outputs, strict=True):
                    where = {"position": step.position, "logit_rows": step.logit_rows}
                    assert_near(output, stage.forward(one, step.inputs, **where), NOISE[arithmetic])  # type: ignore[arg-type]
                    assert_near(output, cpu.forward(other, step.inputs, **where), NOISE[arithmetic])  # type: ignore[arg-type]
            assert [item.position for item in together] == [item.position for item in there]


@needs_gpu
def test_batches_of_any_size_with_sessions_that_come_and_go(prepared: Prepared) -> None:
    generator = torch.Generator().manual_seed(8)
    for first, end in pairwise((0, 2, UNITS)):
        stage, cpu = (StageExecutor(prepared.store, first, end, device=device) for device in (DEVICE, "cpu"))
        pairs = [(stage.new_session(CONTEXT), cpu.new_session(CONTEXT)) for _ in range(7)]
        for size in (7, 1, 3, 2, 5, 7, 3, 6, 1):
            del pairs[0]
            pairs.append((stage.new_session(size + 9), cpu.new_session(size + 9)))
            chosen = [pairs[int(place)] for place in torch.randperm(7, generator=generator)[:size]]
            inputs = [random_inputs(stage, 1, generator) for _ in chosen]
            outputs = stage.forward_batch(
                [BatchStep(here, row, here.position) for (here, _), row in zip(chosen, inputs, strict=True)]
            )
            for (_, there), row, output in zip(chosen, inputs, outputs, strict=True):
                assert_near(output, cpu.forward(there, row, position=there.position), NOISE["float32"])


@needs_gpu
def test_outputs_stay_what_they_were_when_the_next_step_runs(prepared: Prepared) -> None:
    (stage,) = prepared.stages((0, UNITS), device=DEVICE)
    session = stage.new_session(CONTEXT)
    outputs, copies = [], []
    for position, token in enumerate(PROMPT):
        outputs.append(stage.forward(session, torch.tensor([token]), position=position))
        copies.append(outputs[-1].clone())
    assert all(torch.equal(a, b) for a, b in zip(outputs, copies, strict=True))
    assert len({float(item.sum()) for item in outputs}) == len(outputs)


@needs_gpu
def test_members_of_a_batch_fail_alone(prepared: Prepared) -> None:
    (stage,) = prepared.stages((0, UNITS), device=DEVICE)
    for good, logit_row in ((torch.tensor([5, 6]), 2), (torch.tensor([5]), 1)):
        sessions, other = [stage.new_session(4) for _ in range(6)], stage.new_session(4)
        outputs = stage.forward_batch([
            BatchStep(sessions[0], good, 0),
            BatchStep(sessions[1], torch.tensor([VOCABULARY]), 0),
            BatchStep(sessions[2], good, 3),
            BatchStep(sessions[3], torch.arange(5), 0),
            BatchStep(sessions[4], good, 0, [logit_row]),
            BatchStep(sessions[5], good, 0),
        ])  # fmt: skip
        failures = [type(item) for item in outputs[1:5]]
        assert failures == [ExecutionError, ExecutionError, ContextLimitError, ExecutionError]
        assert [item.position for item in sessions] == [len(good), 0, 0, 0, 0, len(good)]
        expected = stage.forward(other, good, position=0)
        for output in (outputs[0], outputs[5]):
            assert_near(output, expected, NOISE["float32"])


@needs_gpu
def test_reexecution_gives_what_the_steps_gave(prepared: Prepared) -> None:
    for stage in prepared.stages((0, 2, UNITS), device=DEVICE):
        session, generator = stage.new_session(CONTEXT), torch.Generator().manual_seed(2)
        steps = [
            StepInput(position, random_inputs(stage, rows, generator))
            for position, rows in ((0, 6), (6, 1), (7, 1), (8, 1))
        ]
        outputs = [stage.forward(session, step.inputs, position=step.position) for step in steps]
        for chunk_rows in (256, 4, 1):
            for output, again in zip(outputs, reexecute(stage, steps, chunk_rows=chunk_rows), strict=True):
                assert_near(again, output, NOISE["float32"])


@needs_gpu
def test_blocks_like_llamas_decode_in_recorded_steps(prepared: Prepared) -> None:
    pytest.importorskip("triton")
    (stage,) = prepared.stages((0, UNITS), device=DEVICE)
    assert stage._kernels
    assert (stage._graphs is not None) == all(isinstance(block, RotaryBlock) for block in stage._blocks)


@needs_gpu
def test_stage_that_is_let_go_leaves_the_gpu_at_once(llama: Prepared) -> None:
    (stage,) = llama.stages((0, UNITS), device=DEVICE)
    session = stage.new_session(8)
    stage.forward(session, torch.tensor([1, 2]), position=0)
    gone = weakref.ref(stage)
    del stage
    assert gone() is None


@needs_gpu
def test_weights_load_in_another_thread_while_steps_are_recorded(llama: Prepared) -> None:
    failures: list[BaseException] = []

    def load() -> None:
        try:
            for _ in range(4):
                llama.stages((0, UNITS), device=DEVICE)
        except BaseException as error:
            failures.append(error)

    (stage,), (cpu,) = llama.stages((0, UNITS), device=DEVICE), llama.stages((0, UNITS))
    thread = threading.Thread(target=load)
    thread.start()
    for size in (1, 2, 4, 8, 16, 32):
        sessions = [stage.new_session(4) for _ in range(size)]
        outputs = stage.forward_batch([BatchStep(session, torch.tensor([7]), 0) for session in sessions])
        expected = cpu.forward(cpu.new_session(4), torch.tensor([7]), position=0)
        for output in outputs:
            assert_near(output, expected, NOISE["float32"])
    thread.join()
    assert failures == []


# ------------------------------------------------------------------------------------------------------------- settings


@needs_gpu
def test_settings_of_another_library_do_not_change_the_arithmetic(llama: Prepared) -> None:
    for arithmetic in NOISE:
        stage = StageExecutor(llama.store, 0, UNITS, device=DEVICE, arithmetic=arithmetic)
        tokens = torch.arange(40)
        before = stage.forward(stage.new_session(40), tokens, position=0, logit_rows=range(40))
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
        after = stage.forward(stage.new_session(40), tokens, position=0, logit_rows=range(40))
        assert torch.equal(before, after)
        assert not torch.backends.cuda.matmul.allow_tf32
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction


@needs_gpu
@pytest.mark.parametrize(("batch", "rows", "past"), [(1, 1, 20), (8, 1, 20), (8, 16, 0), (2, 4, 3)])
def test_rehearsal_is_over_when_it_returns_and_leaves_no_state(
    prepared: Prepared, batch: int, rows: int, past: int
) -> None:
    for stage in prepared.stages((0, 2, UNITS), device=DEVICE):
        step = stage.rehearsal(batch=batch, rows=rows, past=past)
        for _ in range(3):
            step()
            assert torch.cuda.current_stream().query()


@needs_gpu
def test_profile_names_the_class_of_the_gpu(llama: Prepared) -> None:
    profile = measure(llama.store, device=DEVICE, arithmetic="bfloat16", time_limit=0.2)
    assert profile.execution_class == "torch-cuda/bfloat16/sdpa"
    assert {item.unit_kind for item in profile.timings} == {"embedding", "block", "head"}


# ------------------------------------------------------------------------------------------------------------- refusals


@needs_gpu
def test_session_that_does_not_fit_the_gpu_is_refused_and_the_next_one_runs(llama: Prepared) -> None:
    (stage,) = llama.stages((0, UNITS), device=DEVICE)
    gc.collect()
    torch.cuda.empty_cache()
    _, total = torch.cuda.mem_get_info()
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 200 * 2**20) / total)
    try:
        with pytest.raises(ExecutionError, match="out of memory"):
            stage.new_session(4_000_000)
        session = stage.new_session(64)
        long = stage.new_session(40_000)
        stage.forward(session, torch.tensor([1, 2]), position=0)
        # The scores of 40,000 rows against each other take gigabytes.
        with pytest.raises(ExecutionError, match="out of memory"):
            stage.forward(long, torch.zeros(40_000, dtype=torch.int64), position=0)
        outputs = stage.forward_batch(
            [BatchStep(session, torch.tensor([3, 4]), 2), BatchStep(long, torch.zeros(40_000, dtype=torch.int64), 0)]
        )
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert isinstance(outputs[0], Tensor)
    assert isinstance(outputs[1], ExecutionError)
    assert (session.position, long.position) == (4, 0)
    expected = stage.forward(stage.new_session(64), torch.tensor([1, 2, 3, 4]), position=0)
    assert_near(outputs[0], expected, NOISE["float32"])


@needs_gpu
@pytest.mark.parametrize(
    ("options", "match"), [({"arithmetic": "int8"}, "int8 is computed on a CPU"), ({"device": "cuda:99"}, "torch sees")]
)
def test_what_a_gpu_cannot_do_is_refused_when_the_stage_is_opened(
    llama: Prepared, options: dict[str, str], match: str
) -> None:
    with pytest.raises(ExecutionError, match=match):
        StageExecutor(llama.store, 0, UNITS, **{"device": DEVICE, **options})  # type: ignore[arg-type]


def test_gpu_that_is_not_there_is_refused_when_the_stage_is_opened(
    llama: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ExecutionError, match="sees no GPU"):
        StageExecutor(llama.store, 0, UNITS, device="cuda:1")


def test_batch_without_room_runs_one_by_one_and_only_what_is_too_large_fails(
    llama: Prepared, monkeypatch: pytest.MonkeyPatch
) -> None:
    (stage,) = llama.stages((0, UNITS), device=DEVICE if torch.cuda.is_available() else "cpu")
    rows_of = stage._rows
    calls: list[int] = []

    def rows(batch: object, inputs: Tensor, *others: object, **named: object) -> Tensor:
        calls.append(len(inputs))
        if len(inputs) > 50:
            from bsns.runtime.cuda import DeviceMemoryError

            raise DeviceMemoryError("cuda:0 is out of memory")
        return rows_of(batch, inputs, *others, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(stage, "_rows", rows)
    # Longer than what is recorded on a GPU.
    counts = (34, 60, 33)
    sessions = [stage.new_session(64) for _ in counts]
    steps = [BatchStep(session, torch.arange(count), 0) for session, count in zip(sessions, counts, strict=True)]
    outputs = stage.forward_batch(steps)
    assert [isinstance(item, Tensor) for item in outputs] == [True, False, True]
    assert [session.position for session in sessions] == [34, 0, 33]
    assert calls == [127, 34, 60, 33]
