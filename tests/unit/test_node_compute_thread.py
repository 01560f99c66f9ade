"""The compute thread: steps that are ready together run together, a long one in pieces, and each fails alone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from bsns.runtime.executor import BatchStep, ExecutionError
from node_client import compute_thread
from node_client.compute_thread import PIECE_ROWS_ALONE, PIECE_ROWS_BESIDE, ComputeThread
from node_client.errors import ErrorReason, Refusal


class Session:
    """Counts rows, as a cache would hold them."""

    def __init__(self) -> None:
        self.position = 0

    def truncate(self, position: int) -> None:
        self.position = position


class Executor:
    """Doubles its inputs. Notes the rows of each batch; breaks as a whole where an input is 13. 22 is refused later."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.open = threading.Event()
        self.open.set()

    def forward_batch(self, steps: Sequence[BatchStep]) -> list[Tensor | Exception]:
        self.open.wait(10)
        self.batches.append([len(step.inputs) for step in steps])
        if any(13 in step.inputs.tolist() for step in steps):
            raise MemoryError("13")
        outputs: list[Tensor | Exception] = []
        for step in steps:
            if step.position != step.session.position:
                outputs.append(ExecutionError(f"position {step.session.position} comes next"))
                continue
            step.session.position += len(step.inputs)  # type: ignore[misc]
            outputs.append(step.inputs * 2)
        return outputs


@pytest.fixture
async def thread() -> AsyncIterator[ComputeThread]:
    running = ComputeThread(8)
    yield running
    running.stop()


def doubled(
    thread: ComputeThread, executor: Executor, session: Session, values: Sequence[int], position: int = 0
) -> Any:
    def finish(outputs: list[Tensor]) -> list[int]:
        result: list[int] = torch.cat(outputs).tolist()
        if 44 in result:
            raise Refusal(ErrorReason.ERROR_REASON_MALFORMED_TENSOR, "22 is refused")
        return result

    return asyncio.ensure_future(
        thread.step(
            executor,  # type: ignore[arg-type]
            session,  # type: ignore[arg-type]
            position=position,
            rows=len(values),
            prepare=lambda: torch.tensor(values),
            finish=finish,
        )
    )


async def waiting(executor: Executor, thread: ComputeThread) -> None:
    """Keep the thread busy with one step until `executor.open` is set."""
    executor.open.clear()
    doubled(thread, executor, Session(), [0])
    while not thread.batches:  # noqa: ASYNC110 (counted in another thread)
        await asyncio.sleep(0.001)


async def test_steps_that_wait_together_run_as_one_batch_of_the_limited_size(thread: ComputeThread) -> None:
    executor = Executor()
    await waiting(executor, thread)
    steps = [doubled(thread, executor, Session(), [number]) for number in range(50, 70)]
    await asyncio.sleep(0)
    executor.open.set()
    assert await asyncio.gather(*steps) == [[2 * number] for number in range(50, 70)]
    assert executor.batches == [[1], [1] * 8, [1] * 8, [1] * 4]


async def test_steps_of_another_executor_do_not_join_a_batch(thread: ComputeThread) -> None:
    first, second = Executor(), Executor()
    await waiting(first, thread)
    steps = [doubled(thread, executor, Session(), [1]) for executor in (first, second, first, second)]
    await asyncio.sleep(0)
    first.open.set()
    await asyncio.gather(*steps)
    assert first.batches == [[1], [1, 1]]
    assert second.batches == [[1, 1]]


async def test_prompt_runs_in_small_pieces_beside_tokens_and_in_large_ones_alone(thread: ComputeThread) -> None:
    executor, prompt = Executor(), list(range(100, 100 + 3 * PIECE_ROWS_BESIDE + 5))
    await waiting(executor, thread)
    token, session = Session(), Session()
    steps = [doubled(thread, executor, token, [1]), doubled(thread, executor, session, prompt)]
    await asyncio.sleep(0)
    executor.open.set()
    assert await asyncio.gather(*steps) == [[2], [2 * value for value in prompt]]
    assert executor.batches[1:] == [[1, PIECE_ROWS_BESIDE], [PIECE_ROWS_BESIDE], [PIECE_ROWS_BESIDE], [5]]
    assert session.position == len(prompt)

    alone, quiet = Executor(), Session()
    await doubled(thread, alone, quiet, list(range(100, 100 + PIECE_ROWS_ALONE + 1)))
    assert alone.batches == [[PIECE_ROWS_ALONE], [1]]


async def test_tokens_of_others_are_not_held_up_by_a_long_prompt(thread: ComputeThread) -> None:
    executor = Executor()
    await waiting(executor, thread)
    token = Session()
    steps = [doubled(thread, executor, token, [1])]
    steps += [doubled(thread, executor, Session(), [5] * (4 * PIECE_ROWS_BESIDE)) for _ in range(2)]
    await asyncio.sleep(0)
    executor.open.set()
    for position in range(1, 7):
        await steps[0]
        steps[0] = doubled(thread, executor, token, [1], position)
    await asyncio.gather(*steps)
    # A batch never holds two prompts, and no piece is longer than what delays nobody for long.
    assert all(sum(rows > 1 for rows in batch) <= 1 and max(batch) <= PIECE_ROWS_BESIDE for batch in executor.batches)
    together = [batch for batch in executor.batches if 1 in batch and len(batch) > 1]
    assert together, "a token never ran beside a piece of a prompt"


@pytest.mark.parametrize("bad", [[13], [22], [1, 2]])
async def test_step_that_cannot_run_fails_alone_and_leaves_its_session_as_before(
    thread: ComputeThread, bad: list[int]
) -> None:
    executor, sessions = Executor(), [Session() for _ in range(4)]
    await waiting(executor, thread)
    position = 7 if bad == [1, 2] else 0  # not where the session is
    steps = [doubled(thread, executor, sessions[0], [5]), doubled(thread, executor, sessions[1], bad, position)]
    steps += [doubled(thread, executor, session, [6]) for session in sessions[2:]]
    await asyncio.sleep(0)
    executor.open.set()
    results = await asyncio.gather(*steps, return_exceptions=True)
    assert isinstance(results[1], MemoryError | Refusal | ExecutionError)
    assert [results[0], *results[2:]] == [[10], [12], [12]]
    assert [session.position for session in sessions] == [1, 0, 1, 1]
    assert await doubled(thread, executor, sessions[1], [4]) == [8]


async def test_prompt_that_fails_in_its_last_piece_takes_back_the_others(thread: ComputeThread) -> None:
    executor, session = Executor(), Session()
    with pytest.raises(MemoryError):
        await doubled(thread, executor, session, [1] * PIECE_ROWS_ALONE + [13])
    assert session.position == 0


async def test_other_work_runs_between_batches_although_steps_keep_coming(thread: ComputeThread) -> None:
    executor, session = Executor(), Session()
    ran_after: list[int] = []
    await waiting(executor, thread)
    job = asyncio.ensure_future(thread.run(lambda: ran_after.append(len(executor.batches))))
    other = doubled(thread, executor, Session(), [1])
    executor.open.set()
    for position in range(100):
        # Always one step in the queue: a second session's, while this one's result is on its way.
        step = doubled(thread, executor, session, [1], position)
        await asyncio.gather(step, other)
        other = doubled(thread, executor, Session(), [1])
    await asyncio.gather(job, other)
    assert ran_after[0] <= compute_thread.MAXIMUM_BATCHES + 2


async def test_work_that_raises_hands_the_error_to_its_caller_and_the_thread_goes_on(thread: ComputeThread) -> None:
    with pytest.raises(ZeroDivisionError):
        await thread.run(lambda: 1 // 0)
    assert await thread.run(lambda: 5) == 5


async def test_too_many_waiting_steps_are_refused(thread: ComputeThread, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compute_thread, "MAXIMUM_WAITING", 3)
    executor = Executor()
    await waiting(executor, thread)
    steps = [doubled(thread, executor, Session(), [1]) for _ in range(5)]
    await asyncio.sleep(0)
    executor.open.set()
    results = await asyncio.gather(*steps, return_exceptions=True)
    assert results[:3] == [[2]] * 3
    assert all(isinstance(item, Refusal) for item in results[3:])


async def test_step_whose_caller_has_gone_is_not_run(thread: ComputeThread) -> None:
    executor = Executor()
    await waiting(executor, thread)
    gone, kept = doubled(thread, executor, Session(), [1]), doubled(thread, executor, Session(), [2])
    await asyncio.sleep(0)
    gone.cancel()
    await asyncio.sleep(0)
    executor.open.set()
    assert await kept == [4]
    assert executor.batches == [[1], [1]]


async def test_result_is_delivered_before_its_caller_goes_on_and_what_that_raises_is_the_callers(
    thread: ComputeThread,
) -> None:
    order: list[str] = []

    async def step(deliver: Callable[[int], None]) -> None:
        await thread.step(
            Executor(),  # type: ignore[arg-type]
            Session(),  # type: ignore[arg-type]
            position=0,
            rows=1,
            prepare=lambda: torch.tensor([1]),
            finish=lambda outputs: int(outputs[0]),
            deliver=deliver,
        )
        order.append("caller")

    await step(lambda result: order.append(f"delivered {result}"))
    assert order == ["delivered 2", "caller"]

    def refuse(_result: int) -> None:
        raise ValueError("not wanted")

    with pytest.raises(ValueError, match="not wanted"):
        await step(refuse)
