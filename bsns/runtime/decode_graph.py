"""A batch of short steps as a CUDA graph: recorded once for each number of rows, then replayed.

Owns the recorded graphs of one stage and the memory that their inputs lie in. A step of a small model is a few hundred
kernels of microseconds each, and starting them one by one from Python takes longer than they run. Promises what running
them one by one gives, up to the rounding of a batch that is filled up to a power of two. Only for stages whose kernels
do not depend on values (`bsns.runtime.decode_kernels` reads positions and caches from a table on the GPU).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bsns.runtime.cuda import to_host
from bsns.runtime.decode_kernels import TABLE_ROWS
from bsns.runtime.ragged_attention import DecoderSession, RaggedBatch

# Outputs of a batch, from its rows: token ids [rows] or float32 [rows, hidden].
Run = Callable[[RaggedBatch, Tensor], Tensor]


@dataclass(frozen=True)
class _Recorded:
    """`host` and `host_rows` are pinned; a step is done before they are written again."""

    graph: torch.cuda.CUDAGraph
    host: Tensor
    host_rows: Tensor | None
    table: Tensor
    rows: Tensor
    output: Tensor


class DecodeGraphs:
    """The graphs of one stage. `width`: of an input row, or None where it is a token id. `spare`: a session that no
    request has; the rows that fill up a batch are written into it.
    """

    def __init__(self, width: int | None, attention: str, spare: DecoderSession, device: torch.device) -> None:
        self._width, self._attention, self._spare, self._device = width, attention, spare, device
        self._recorded: dict[int, _Recorded] = {}
        self._spare_column = torch.tensor(spare.table_entries(1)).t()
        self._pool = torch.cuda.graph_pool_handle()

    def step(self, run: Run, sessions: Sequence[DecoderSession], inputs: Sequence[Tensor]) -> Tensor:
        """Outputs [rows, width] on the CPU of all rows of `inputs`, one tensor for each session.

        `run`, always the same, is what is recorded. It is not kept: a stage that is let go gives its memory back at
        once.
        """
        entries = [
            entry for each in zip(sessions, inputs, strict=True) for entry in each[0].table_entries(len(each[1]))
        ]
        count = len(entries)
        size = 1 << (count - 1).bit_length()
        if size not in self._recorded:
            self._recorded[size] = self._record(run, size)
        recorded = self._recorded[size]
        table = recorded.host[:, :count]
        recorded.host[1:TABLE_ROWS, count:] = self._spare_column
        table[1:TABLE_ROWS] = torch.tensor(entries).t()
        joined = torch.cat(list(inputs))
        if recorded.host_rows is None:
            table[TABLE_ROWS] = joined
        else:
            recorded.host_rows[:count] = joined
            recorded.rows.copy_(recorded.host_rows, non_blocking=True)
        recorded.table.copy_(recorded.host, non_blocking=True)
        recorded.graph.replay()
        return to_host(recorded.output[:count])

    def _record(self, run: Run, size: int) -> _Recorded:
        # One row more than a table has: the token ids.
        host = torch.zeros((TABLE_ROWS + 1, size), dtype=torch.int64, pin_memory=True)
        host[0] = torch.arange(size)
        host[1:TABLE_ROWS] = self._spare_column
        table = host.to(self._device)
        host_rows, rows = None, table[TABLE_ROWS]
        if self._width is not None:
            host_rows = torch.zeros((size, self._width), pin_memory=True)
            rows = host_rows.to(self._device)
        batch = RaggedBatch((), table[1], self._attention, table[:TABLE_ROWS])
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            run(batch, rows)  # what is built at its first use must not be recorded
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads load weights meanwhile; with "global" their allocations would break the recording.
        with torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"):
            output = run(batch, rows)
        return _Recorded(graph, host, host_rows, table, rows, output)
