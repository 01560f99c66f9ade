"""The node's one compute thread: steps of live sessions in batches, other work in between.

Owns the order in which torch works. Promises that steps which are ready together, of any sessions of one executor, run
as one batch (continuous batching: nobody waits for a batch to fill); that a long step, a prompt, runs in pieces beside
the others' steps, so that it does not stall their tokens; that of other work (re-executions, measurements) one piece
runs whenever no step is waiting, and after `MAXIMUM_BATCHES` at the latest, so that a busy node still does its duties;
and that a step or a job that fails fails alone. Nothing runs on the event loop but the hand-over of results. Does not
know sessions' rules, peers or the chain.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Generic, TypeVar

from torch import Tensor

from bsns.runtime.executor import BatchStep, ShardExecutor, StageSession
from node_client.errors import ErrorReason, Refusal

Result = TypeVar("Result")

# Steps and jobs waiting; each live session has at most one step.
MAXIMUM_WAITING: Final = 4096
# Batches of steps after which one piece of other work runs although more steps wait.
MAXIMUM_BATCHES: Final = 16
# A prompt runs in pieces of so many rows while other sessions decode, and of more where it delays nobody.
PIECE_ROWS_BESIDE: Final = 32
PIECE_ROWS_ALONE: Final = 256
# How long after its last decode step an executor counts as decoding: longer than a token's way around the ring.
_DECODING_SECONDS: Final = 0.5

# Who waits, who gets the result first, and the result or the error.
_Outcome = tuple[asyncio.Future[Any], Callable[[Any], None], Any, BaseException | None]


@dataclass(eq=False)
class Step(Generic[Result]):
    """One step of one session. `prepare` gives its input and `finish` makes a result of its output, both in the compute
    thread; what they raise is the step's error, and its session is then as before.
    """

    executor: ShardExecutor
    session: StageSession
    position: int
    rows: int
    prepare: Callable[[], Tensor]
    finish: Callable[[list[Tensor]], Result]
    deliver: Callable[[Result], None]
    future: asyncio.Future[Result]
    logit_rows: Sequence[int] | None = None
    inputs: Tensor | None = None
    outputs: list[Tensor] = field(default_factory=list)
    done: int = 0

    @property
    def is_long(self) -> bool:
        """Whether it may take several pieces."""
        return self.rows > PIECE_ROWS_BESIDE


class ComputeThread:
    """One thread. `maximum_batch` steps run together at the most. `observe` is told in it how many seconds each batch
    took that was of nothing but decode steps of one row, and of how many.
    """

    def __init__(
        self,
        maximum_batch: int,
        clock: Callable[[], float] = time.monotonic,
        observe: Callable[[ShardExecutor, int, float], None] = lambda executor, sessions, seconds: None,
    ) -> None:
        self._maximum_batch, self._clock, self._observe = maximum_batch, clock, observe
        # What comes in; the thread sorts it into the two below, which are its own. None: look whether to stop.
        self._arrivals: queue.SimpleQueue[Step[Any] | Callable[[], None] | None] = queue.SimpleQueue()
        self._steps: deque[Step[Any]] = deque()
        self._jobs: deque[Callable[[], None]] = deque()
        self._stopping = False
        self._decoded_at: dict[int, float] = {}
        # Steps in each batch so far, for those who look at a node: {size: batches}.
        self.batches: dict[int, int] = {}
        # Daemon: a forward pass cannot be interrupted, and must not keep a process alive that was told to stop.
        threading.Thread(target=self._work, name="bsns-compute", daemon=True).start()

    async def step(
        self,
        executor: ShardExecutor,
        session: StageSession,
        *,
        position: int,
        rows: int,
        prepare: Callable[[], Tensor],
        finish: Callable[[list[Tensor]], Result],
        deliver: Callable[[Result], None] | None = None,
        logit_rows: Sequence[int] | None = None,
    ) -> Result:
        """Result of one step of a live session. `finish` gets the outputs of its pieces in order; `deliver` gets the
        result on the event loop before the caller does, in the very call that brings it there. `logit_rows`, of a step
        of at most `PIECE_ROWS_BESIDE` rows, is as in `BatchStep`. Raises what `prepare`, the executor, `finish` or
        `deliver` raise; Refusal where too many steps wait.
        """
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        self._add(Step(executor, session, position, rows, prepare, finish, deliver or _discard, future, logit_rows))
        return await future

    async def run(self, function: Callable[[], Result]) -> Result:
        """Result of `function()`, which should take about as long as a step. Refusal where too many jobs wait."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Result] = loop.create_future()

        def job() -> None:
            if future.cancelled():
                return
            try:
                outcome: tuple[Any, BaseException | None] = (function(), None)
            except BaseException as error:  # handed to the caller whole
                outcome = (None, error)
            _deliver([(future, _discard, *outcome)])

        self._add(job)
        return await future

    def stop(self) -> None:
        """End the thread after what it is doing; who waits is left waiting."""
        self._stopping = True
        self._arrivals.put(None)

    def _add(self, item: Step[Any] | Callable[[], None]) -> None:
        if self._arrivals.qsize() + len(self._steps if isinstance(item, Step) else self._jobs) >= MAXIMUM_WAITING:
            raise Refusal(ErrorReason.ERROR_REASON_CAPACITY_EXHAUSTED, "too much work is waiting; try another node")
        self._arrivals.put(item)

    # -- in the compute thread

    def _work(self) -> None:
        batches = 0
        while not self._stopping:
            self._sort_arrivals()
            if self._jobs and (not self._steps or batches >= MAXIMUM_BATCHES):
                batches = 0
                self._jobs.popleft()()
            elif batch := self._take():
                batches += 1
                self._run(batch)

    def _sort_arrivals(self) -> None:
        """Take what has come in; wait for something if there is nothing to do."""
        idle = not (self._steps or self._jobs)
        while idle or not self._arrivals.empty():
            idle = False
            item = self._arrivals.get()
            if isinstance(item, Step):
                self._steps.append(item)
            elif item is not None:
                self._jobs.append(item)

    def _take(self) -> list[Step[Any]]:
        """The oldest step, and what can run with it: steps of the same executor, one long one among them."""
        taken: list[Step[Any]] = []
        left: deque[Step[Any]] = deque()
        while self._steps:
            step = self._steps.popleft()
            if step.future.cancelled():
                if step.done:
                    step.session.truncate(step.position)
                continue
            fits = not taken or (
                step.executor is taken[0].executor and not (step.is_long and any(item.is_long for item in taken))
            )
            (taken if fits and len(taken) < self._maximum_batch else left).append(step)
        self._steps.extend(left)
        return taken

    def _run(self, batch: list[Step[Any]]) -> None:
        """One piece of each step of `batch`; unfinished ones go back to wait, before those that came later."""
        results: list[_Outcome] = []

        def fail(step: Step[Any], error: BaseException) -> None:
            if step.session.position > step.position:
                step.session.truncate(step.position)
            results.append((step.future, step.deliver, None, error))

        ready: list[Step[Any]] = []
        for step in batch:
            try:
                step.inputs = step.prepare() if step.inputs is None else step.inputs
                ready.append(step)
            except BaseException as error:  # the step's own, handed to its caller whole
                fail(step, error)
        unfinished = []
        for step, piece, output in zip(ready, *self._forward(ready), strict=True):
            if isinstance(output, BaseException):
                fail(step, output)
                continue
            step.outputs.append(output)
            step.done += piece
            if step.done < step.rows:
                unfinished.append(step)
                continue
            try:
                results.append((step.future, step.deliver, step.finish(step.outputs), None))
            except BaseException as error:  # as above
                fail(step, error)
        self._steps.extendleft(reversed(unfinished))
        _deliver(results)

    def _forward(self, steps: list[Step[Any]]) -> tuple[list[int], list[Tensor | BaseException]]:
        """Rows of the next piece of each step, and what came of it."""
        if not steps:
            return [], []
        executor, now = steps[0].executor, self._clock()
        if any(not step.is_long for step in steps):
            self._decoded_at = {id(executor): now}
        decoding = now - self._decoded_at.get(id(executor), float("-inf")) < _DECODING_SECONDS
        limit = PIECE_ROWS_BESIDE if decoding else PIECE_ROWS_ALONE
        pieces = [min(limit, step.rows - step.done) for step in steps]
        inputs = []
        for step, piece in zip(steps, pieces, strict=True):
            assert step.inputs is not None, "prepared above"
            whole = piece == step.rows
            rows = step.inputs if whole else step.inputs[step.done : step.done + piece]
            inputs.append(BatchStep(step.session, rows, step.position + step.done, step.logit_rows))
        self.batches[len(steps)] = self.batches.get(len(steps), 0) + 1
        try:
            outputs: list[Tensor | BaseException] = list(executor.forward_batch(inputs))
            if all(step.rows == 1 for step in steps):
                self._observe(executor, len(steps), self._clock() - now)
            return pieces, outputs
        except BaseException as error:
            if len(steps) == 1:
                return pieces, [error]
        # What broke the batch as a whole is found by running its steps one by one; none has been counted.
        outputs = []
        for item in inputs:
            try:
                outputs += executor.forward_batch([item])
            except BaseException as error:  # this step's
                outputs.append(error)
        return pieces, outputs


def _deliver(results: list[_Outcome]) -> None:
    """Hand results to the event loops that wait for them, with one call to each."""
    by_loop: dict[asyncio.AbstractEventLoop, list[_Outcome]] = {}
    for item in results:
        by_loop.setdefault(item[0].get_loop(), []).append(item)
    for loop, items in by_loop.items():
        if not loop.is_closed():
            loop.call_soon_threadsafe(_settle, items)


def _settle(items: list[_Outcome]) -> None:
    for future, deliver, result, error in items:
        if future.done():
            continue
        if error is None:
            try:
                deliver(result)
            except Exception as raised:  # the caller's own
                error = raised
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)


def _discard(_result: object) -> None:
    """For whom the result itself is enough."""


__all__ = ["ComputeThread"]
