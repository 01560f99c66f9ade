"""KV caches of sessions, and attention over a batch of steps that belong to different sessions.

Owns the slab that one session's keys and values lie in, and `RaggedBatch`: the rows of several sessions laid end to
end, each row knowing its position, each session seeing its own past and nothing else. Promises that a slab takes the
bytes of its token limit at the most (pages are taken when they are first written), that rows beyond a session's counted
position are never read, and that what a session gets depends on its own rows alone up to the rounding of the matrix
kernels. On a GPU the rows of short steps attend in one kernel, where `bsns.runtime.decode_kernels` can be built. Does
not multiply weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from bsns.protocol.manifest import VALUE_BYTES
from bsns.runtime.executor import ExecutionError

ATTENTIONS: Final = ("sdpa", "eager")
# Rows of one step that each read the session's past for themselves, in the kernel for all sessions. Of a longer step
# torch's attention, which reads it once, takes less; and so it does of two rows, since Triton's kernels start slowly.
LONGEST_SHORT_STEP: Final = 32
_LEAST_ROWS_TOGETHER: Final = 3


class DecoderSession:
    """One session's keys and values for the blocks of one stage, numbered from 0: [block, key head, token, width]."""

    def __init__(self, blocks: int, key_heads: int, head_width: int, max_tokens: int, device: torch.device) -> None:
        shape = (blocks, key_heads, max_tokens, head_width)
        self.keys = torch.empty(shape, device=device)
        self.values = torch.empty(shape, device=device)
        self._addresses = self.keys.data_ptr(), self.values.data_ptr()
        self.max_tokens = max_tokens
        self._bytes_per_token = 2 * VALUE_BYTES * blocks * key_heads * head_width
        self._position = 0

    @property
    def position(self) -> int:
        """Tokens seen so far; the position of the next row."""
        return self._position

    @property
    def cache_bytes(self) -> int:
        """Bytes that hold tokens now."""
        return self._position * self._bytes_per_token

    @property
    def cache_bytes_limit(self) -> int:
        """Bytes at the session's token limit."""
        return self.max_tokens * self._bytes_per_token

    def table_entries(self, rows: int) -> list[tuple[int, int, int, int]]:
        """Position, addresses of keys and values, capacity for each of the next `rows` rows: what
        `bsns.runtime.decode_kernels` read of a session.
        """
        return [(self._position + row, *self._addresses, self.max_tokens) for row in range(rows)]

    def advance(self, rows: int) -> None:
        """Count `rows` that a step has written."""
        self._position += rows

    def truncate(self, position: int) -> None:
        """Forget every row from `position` on; `ExecutionError` beyond what is held."""
        if not 0 <= position <= self._position:
            raise ExecutionError(f"cannot go back to position {position}: the session holds {self._position} tokens")
        self._position = position


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows [first, first + rows) of a batch: `session`'s from `position` on."""

    session: DecoderSession
    first: int
    rows: int
    position: int


@dataclass(frozen=True)
class RaggedBatch:
    """The steps that run together. Also what transformers' layers get as their cache (`update`).

    `table` (see `bsns.runtime.decode_kernels`) holds the rows that attend in one kernel; `segments` are the steps that
    attend one by one.
    """

    segments: tuple[Segment, ...]
    positions: Tensor
    attention: str
    table: Tensor | None = None
    _masks: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls, steps: Sequence[tuple[DecoderSession, int]], device: torch.device, attention: str, *, kernels: bool = False
    ) -> "RaggedBatch":
        """A batch of (session, rows), each from the session's own position on. `kernels`: whether there are those of
        `bsns.runtime.decode_kernels`.
        """
        segments, together, positions, first = [], [], [], 0
        short = sum(rows for _, rows in steps if rows <= LONGEST_SHORT_STEP)
        kernels = kernels and short >= _LEAST_ROWS_TOGETHER
        for session, rows in steps:
            if kernels and rows <= LONGEST_SHORT_STEP:
                together += [(first + row, *entry) for row, entry in enumerate(session.table_entries(rows))]
            else:
                segments.append(Segment(session, first, rows, session.position))
            positions.append(torch.arange(session.position, session.position + rows))
            first += rows
        table = torch.tensor(together).t().contiguous().to(device) if together else None
        return cls(tuple(segments), torch.cat(positions).to(device), attention, table)

    def attend(self, block: int, queries: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        """Store `keys` and `values` [rows, key heads, width] and attend with `queries` [rows, heads, width], causally
        within each session. Returns [rows, heads, width].
        """
        self.store(block, keys.transpose(0, 1), values.transpose(0, 1))
        return self._attend_all(block, queries, keys.shape[1], scale)

    def store(self, block: int, keys: Tensor, values: Tensor) -> None:
        """Write `keys` and `values` [key heads, rows, width] behind what each session holds."""
        if self.table is not None:
            from bsns.runtime import decode_kernels

            decode_kernels.store(self.table, keys.transpose(0, 1), values.transpose(0, 1), block)
        for segment in self.segments:
            begin, end = segment.position, segment.position + segment.rows
            last = segment.first + segment.rows
            segment.session.keys[block, :, begin:end] = keys[:, segment.first : last]
            segment.session.values[block, :, begin:end] = values[:, segment.first : last]

    def _attend_all(self, block: int, queries: Tensor, key_heads: int, scale: float) -> Tensor:
        if self.table is None and len(self.segments) == 1:
            return self._attend(self.segments[0], block, queries, scale)
        output = torch.empty_like(queries, memory_format=torch.contiguous_format)
        if self.table is not None:
            from bsns.runtime import decode_kernels

            decode_kernels.attend(self.table, queries, output, block, key_heads, scale)
        for segment in self.segments:
            last = segment.first + segment.rows
            output[segment.first : last] = self._attend(segment, block, queries[segment.first : last], scale)
        return output

    def _attend(self, segment: Segment, block: int, queries: Tensor, scale: float) -> Tensor:
        rows, heads, width = queries.shape
        end = segment.position + segment.rows
        keys, values = segment.session.keys[block, :, :end], segment.session.values[block, :, :end]
        key_heads = keys.shape[0]
        # The query heads that share a key head lie next to one another: as rows of one product they share it for free.
        grouped = queries.unflatten(1, (key_heads, heads // key_heads)).transpose(0, 1)
        grouped = grouped.reshape(1, key_heads, -1, width)
        mask = None if rows == 1 else self._mask(segment, heads // key_heads)
        if self.attention == "sdpa":
            output = scaled_dot_product_attention(grouped, keys[None], values[None], attn_mask=mask, scale=scale)
        else:
            scores = grouped @ keys[None].transpose(-1, -2) * scale
            if mask is not None:
                scores = scores.masked_fill(~mask, float("-inf"))
            output = scores.softmax(dim=-1) @ values[None]
        return output.view(key_heads, rows, -1, width).transpose(0, 1).reshape(rows, heads, width)

    def _mask(self, segment: Segment, group: int) -> Tensor:
        """[rows * group, tokens]: what each query may see. One for all blocks."""
        key = segment.first, group
        if key not in self._masks:
            end = segment.position + segment.rows
            visible = torch.ones(segment.rows, end, dtype=torch.bool, device=self.positions.device)
            self._masks[key] = visible.tril(segment.position).repeat_interleave(group, dim=0)
        return self._masks[key]

    # -- what transformers' layers call

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Any, Any]:
        """Store [1, key heads, rows, width]; what is returned reaches `transformers_attention` untouched."""
        self.store(layer_idx, keys[0], values[0])
        return self, (layer_idx, keys.shape[1])

    @staticmethod
    def transformers_attention(
        _module: Any, queries: Tensor, batch: Any, stored: Any, _mask: Any, *, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        """The attention that transformers' layers are configured with: `queries` [1, heads, rows, width] against what
        `update` returned. Gives [1, rows, heads, width].
        """
        block, key_heads = stored
        return batch._attend_all(block, queries[0].transpose(0, 1), key_heads, scaling)[None], None
