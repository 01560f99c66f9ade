"""Attention of short steps on a GPU: all rows of all sessions of a batch in one kernel, wherever their caches lie.

Owns the Triton kernels that store the new keys and values and, when all are stored, attend: each row with what its
session holds up to the row's position. Promises float32 throughout, without tensor cores. What a batch consists of is
in a table on the GPU (`TABLE_ROWS`): the same launch then serves other sessions at other positions, so that a recorded
graph can be replayed. Only imported where there is a GPU; triton comes with torch's builds for CUDA.
"""

from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

TABLE_ROWS: Final = 5
"""int64 [5, entries]: row in the batch, position, address of the session's keys, of its values, and how many tokens it
has room for."""
# Values of keys that one program holds at a time, and as many of values.
_TILE_VALUES: Final = 4096
# Programs that keep a large GPU busy. Where rows and heads are fewer, each row's past is divided among several.
_PROGRAMS: Final = 1024
_MOST_PARTS: Final = 16


@triton.jit
def _slab(table, entries, entry, part: tl.constexpr):  # type: ignore[no-untyped-def]
    return tl.load(table + part * entries + entry).to(tl.pointer_type(tl.float32))


@triton.jit(do_not_specialize=["entries", "block"])
def _store(  # type: ignore[no-untyped-def]
    keys, values, table, entries, block, key_row, key_head, value_row, value_head,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
):  # fmt: skip
    entry, head = tl.program_id(0), tl.program_id(1)
    row, position = tl.load(table + entry), tl.load(table + entries + entry)
    capacity = tl.load(table + 4 * entries + entry)
    place = ((block * HEADS + head) * capacity + position) * WIDTH
    channel = tl.arange(0, PADDED)
    inside = channel < WIDTH
    key = tl.load(keys + row * key_row + head * key_head + channel, mask=inside)
    value = tl.load(values + row * value_row + head * value_head + channel, mask=inside)
    tl.store(_slab(table, entries, entry, 2) + place + channel, key, mask=inside)
    tl.store(_slab(table, entries, entry, 3) + place + channel, value, mask=inside)


@triton.jit(do_not_specialize=["entries", "block"])
def _attend(  # type: ignore[no-untyped-def]
    queries, output, sums, table, entries, block, scale, query_row, query_head, output_row, output_head,
    HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, TOKENS: tl.constexpr,
    PARTS: tl.constexpr,
):  # fmt: skip
    entry, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, position = tl.load(table + entry), tl.load(table + entries + entry)
    capacity = tl.load(table + 4 * entries + entry)
    first = (block * HEADS + head // GROUP) * capacity * WIDTH
    keys, values = _slab(table, entries, entry, 2) + first, _slab(table, entries, entry, 3) + first
    channel = tl.arange(0, PADDED)
    inside = channel < WIDTH
    query = tl.load(queries + row * query_row + head * query_head + channel, mask=inside, other=0.0) * scale
    largest, total = -float("inf"), 0.0
    result = tl.zeros([PADDED], dtype=tl.float32)
    share = tl.cdiv(tl.cdiv(position + 1, TOKENS), PARTS) * TOKENS
    for begin in range(part * share, tl.minimum(part * share + share, position + 1), TOKENS):
        token = begin + tl.arange(0, TOKENS)
        held = (token <= position)[:, None] & inside[None, :]
        place = token[:, None] * WIDTH + channel[None, :]
        at_keys, at_values = keys + place, values + place
        if WIDTH % 4 == 0:
            # A row of a cache then begins at a multiple of 16 bytes: it is read in pieces of that size.
            at_keys, at_values = tl.multiple_of(at_keys, (16, 16)), tl.multiple_of(at_values, (16, 16))
        key = tl.load(at_keys, mask=held, other=0.0)
        value = tl.load(at_values, mask=held, other=0.0)
        scores = tl.where(token <= position, tl.sum(key * query[None, :], axis=1), -float("inf"))
        higher = tl.maximum(largest, tl.max(scores, axis=0))
        weights = tl.exp(scores - higher)
        kept = tl.exp(largest - higher)
        total = total * kept + tl.sum(weights, axis=0)
        result = result * kept + tl.sum(value * weights[:, None], axis=0)
        largest = higher
    if PARTS == 1:
        tl.store(output + row * output_row + head * output_head + channel, result / total, mask=inside)
    else:
        place = (entry * tl.num_programs(1) + head) * PARTS + part
        tl.store(sums + place * (PADDED + 2) + channel, result)
        tl.store(sums + place * (PADDED + 2) + PADDED, largest)
        tl.store(sums + place * (PADDED + 2) + PADDED + 1, total)


@triton.jit(do_not_specialize=["entries"])
def _combine(  # type: ignore[no-untyped-def]
    output, sums, table, entries, output_row, output_head,
    WIDTH: tl.constexpr, PADDED: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    entry, head = tl.program_id(0), tl.program_id(1)
    row, channel = tl.load(table + entry), tl.arange(0, PADDED)
    parts = ((entry * tl.num_programs(1) + head) * PARTS + tl.arange(0, PARTS)) * (PADDED + 2)
    largest, total = tl.load(sums + parts + PADDED), tl.load(sums + parts + PADDED + 1)
    # The first part is never empty, so that the maximum is finite; empty ones get the weight 0.
    weights = tl.exp(largest - tl.max(largest, axis=0))
    result = tl.sum(tl.load(sums + parts[:, None] + channel[None, :]) * weights[:, None], axis=0)
    result /= tl.sum(total * weights, axis=0)
    tl.store(output + row * output_row + head * output_head + channel, result, mask=channel < WIDTH)


def store(table: Tensor, keys: Tensor, values: Tensor, block: int) -> None:
    """Writes each entry's row of `keys` and `values` [rows, key heads, width] into its session, at its position."""
    entries, (heads, width) = table.shape[1], keys.shape[1:]
    _store[entries, heads](
        keys, values, table, entries, block, keys.stride(0), keys.stride(1), values.stride(0), values.stride(1),
        HEADS=heads, WIDTH=width, PADDED=triton.next_power_of_2(width), num_warps=1,
    )  # fmt: skip


def attend(table: Tensor, queries: Tensor, output: Tensor, block: int, key_heads: int, scale: float) -> None:
    """Writes each entry's row of `output`, from its row of `queries` (both [rows, heads, width]) and what its session
    holds up to its position, that included.
    """
    entries, (heads, width) = table.shape[1], queries.shape[1:]
    padded: Any = triton.next_power_of_2(width)
    parts = 1 << (min(_MOST_PARTS, max(1, _PROGRAMS // (entries * heads))).bit_length() - 1)
    sums = queries.new_empty(entries * heads * parts * (padded + 2) if parts > 1 else 1)
    _attend[entries, heads, parts](
        queries, output, sums, table, entries, block, scale,
        queries.stride(0), queries.stride(1), output.stride(0), output.stride(1),
        HEADS=key_heads, GROUP=heads // key_heads, WIDTH=width, PADDED=padded,
        TOKENS=max(1, _TILE_VALUES // padded), PARTS=parts, num_warps=4,
    )  # fmt: skip
    if parts > 1:
        _combine[entries, heads](
            output, sums, table, entries, output.stride(0), output.stride(1),
            WIDTH=width, PADDED=padded, PARTS=parts, num_warps=1,
        )  # fmt: skip


def are_usable(heads: int, key_heads: int, width: int, device: torch.device) -> bool:
    """Whether the kernels can be built for these sizes and give what torch gives. Without a C compiler they cannot."""
    generator = torch.Generator().manual_seed(0)
    capacity, position = 200, 170
    slabs = torch.randn(2, 2, key_heads, capacity, width, generator=generator).to(device)
    queries = torch.randn(3, heads, width, generator=generator).to(device)
    new = torch.randn(2, 3, key_heads, width, generator=generator).to(device)
    row, block = 1, 1
    expected = slabs[:, block].clone()
    expected[:, :, position] = new[:, row]
    grouped = queries[row].view(key_heads, -1, width)
    seen = torch.nn.functional.scaled_dot_product_attention(
        grouped, expected[0, :, : position + 1], expected[1, :, : position + 1], scale=0.25
    )
    entry = torch.tensor([[row], [position], [slabs[0].data_ptr()], [slabs[1].data_ptr()], [capacity]], device=device)
    try:
        # Divided among several programs and not.
        for entries in (1, _PROGRAMS // heads + 1):
            table, output = entry.repeat(1, entries), torch.zeros_like(queries)
            store(table, new[0], new[1], block)
            attend(table, queries, output, block, key_heads, 0.25)
            if not torch.allclose(output[row], seen.reshape(heads, width), rtol=1e-4, atol=1e-5):
                return False
        return torch.equal(slabs[:, block], expected)
    except Exception:  # a compiler's, the driver's or Triton's own: the plain way needs none of them
        return False
