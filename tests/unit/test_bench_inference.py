"""The inference benchmark's own parts: the proxy that delays, rates, hops, ratios with their goals, memory."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from benchmarks.delay_proxy import DelayProxy
from benchmarks.inference_memory import parse_mappings
from benchmarks.inference_node import ForwardPass
from benchmarks.inference_statistics import (
    compute_seconds,
    decode_rate,
    hop_seconds,
    middle_rate,
    quantile,
    ratio,
    whole_rate,
)

DELAY_S = 0.05


@asynccontextmanager
async def echo_server() -> AsyncIterator[int]:
    """Port of a server that sends back what it gets, until the other side has finished."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65_536):
            writer.write(data)
        writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


async def test_proxy_delays_both_directions_and_keeps_every_byte_in_order() -> None:
    data = bytes(range(256)) * 4_096
    async with echo_server() as port, DelayProxy(port, DELAY_S) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        began = time.monotonic()
        writer.write(data)
        first = await reader.readexactly(1)
        assert time.monotonic() - began >= 2 * DELAY_S
        assert first + await reader.readexactly(len(data) - 1) == data
        writer.close()


async def test_proxy_whose_delay_is_changed_uses_it_for_open_connections() -> None:
    async with echo_server() as port, DelayProxy(port, 0.0) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        writer.write(b"a")
        assert await reader.readexactly(1) == b"a"
        proxy.delay_s = DELAY_S
        began = time.monotonic()
        writer.write(b"b")
        assert await reader.readexactly(1) == b"b"
        assert time.monotonic() - began >= 2 * DELAY_S
        writer.close()


async def test_proxy_closes_the_connection_of_a_caller_whose_target_refuses() -> None:
    async with echo_server() as port:
        pass
    async with DelayProxy(port, 0.0) as proxy:
        reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
        assert await reader.read() == b""
        writer.close()


async def test_proxy_that_ends_closes_open_connections() -> None:
    async with echo_server() as port:
        async with DelayProxy(port, 0.0) as proxy:
            reader, writer = await asyncio.open_connection("127.0.0.1", proxy.port)
            writer.write(b"a")
            assert await reader.readexactly(1) == b"a"
        assert await reader.read() == b""
        writer.close()


def test_rates_of_streams() -> None:
    assert decode_rate([10.0, 11.0, 12.0]) == 1.0
    # Eight tokens, of which the third to the seventh arrive one a second; before and after them it is slower.
    streams = ([0.0, 10.0, 12.0, 14.0], [5.0, 11.0, 13.0, 30.0])
    assert middle_rate(streams) == 1.0
    assert whole_rate(-10.0, streams) == 8 / 40


def test_hops_of_a_ring_lie_between_its_passes() -> None:
    first = [ForwardPass(0, 0.0, 1.0), ForwardPass(0, 4.0, 5.0)]
    second = [ForwardPass(7, 1.5, 3.0), ForwardPass(7, 5.25, 7.0)]
    assert hop_seconds([first, second]) == [0.5, 1.0, 0.25]
    assert compute_seconds([first, second]) == 2.625
    with pytest.raises(ValueError, match=r"\[2, 1\]"):
        hop_seconds([first, second[:1]])


def test_quantile_is_one_of_the_values() -> None:
    values = [float(number) for number in range(100, 0, -1)]
    assert quantile(values, 0.5) == 51.0
    assert quantile(values, 0.99) == 100.0
    assert quantile([1.0], 0.99) == 1.0


def test_ratio_pairs_neighbours_and_is_held_against_its_goal() -> None:
    figure = ratio("a", [2.0, 30.0, 4.0], [2.0, 10.0, 2.0], ">= 2")
    assert (figure.value, figure.low, figure.high, figure.samples) == (2.0, 1.0, 3.0, 3)
    assert figure.met
    assert ratio("a", [1.9], [1.0], ">= 2").met is False
    assert ratio("a", [1.9], [1.0]).met is None


def test_memory_of_mapped_weights_is_told_from_the_rest() -> None:
    smaps = """\
7f0000000000-7f0000100000 rw-p 00000000 00:00 0
Rss:                 100 kB
Pss:                 100 kB
7f0000200000-7f0000300000 r--p 00000000 08:01 1234                       /cache/models/tiny/unit-00001.safetensors
Rss:                  20 kB
7f0000400000-7f0000500000 r-xp 00000000 08:01 1235                       /cache/models/tiny-other/lib.so
Rss:                   3 kB
"""
    assert parse_mappings(smaps, Path("/cache/models/tiny")) == (1024 * 123, 1024 * 20)
