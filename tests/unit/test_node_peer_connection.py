"""Writing to a peer from two sides: the event loop's queue and the compute thread."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import grpc.aio
import pytest
from eth_typing import ChecksumAddress
from eth_utils.address import to_checksum_address

from bsns.v1 import execution_pb2
from node_client.peers import PeerConnection

NODE: ChecksumAddress = to_checksum_address("0x" + "11" * 20)


class Call:
    """A Forward call as gRPC's: one write at a time, which waits for a future of the loop, whatever thread began it."""

    def __init__(self) -> None:
        self.begun: list[int] = []
        self.broken = False
        self._loop = asyncio.get_running_loop()
        self._writing: asyncio.Future[None] | None = None

    async def write(self, message: execution_pb2.ForwardRequest) -> None:
        if self.broken:
            raise asyncio.InvalidStateError("the call is over")
        assert self._writing is None, "gRPC takes one message at a time"
        self.begun.append(message.end.steps)
        self._writing = self._loop.create_future()
        try:
            await self._writing
        finally:
            self._writing = None

    async def take(self, error: Exception | None = None) -> None:
        """The other side takes the message that is being written, or is gone."""
        assert self._writing is not None
        if error is None:
            self._writing.set_result(None)
        else:
            self._writing.set_exception(error)
        await settled()


def message(number: int) -> execution_pb2.ForwardRequest:
    return execution_pb2.ForwardRequest(end=execution_pb2.EndOfSession(steps=number))


@asynccontextmanager
async def connected(limit: int = 4) -> AsyncIterator[tuple[PeerConnection, Call]]:
    """A peer whose first message, number 0, has been written."""
    peer, call = PeerConnection(NODE, limit), Call()
    writer = asyncio.create_task(peer.write_queued(call))
    assert peer.queue(message(0))
    await settled()
    await call.take()
    try:
        yield peer, call
    finally:
        writer.cancel()
        await asyncio.gather(writer, return_exceptions=True)


async def settled() -> None:
    """Long enough for what the loop has to do; nothing here waits for a clock."""
    for _ in range(10):
        await asyncio.sleep(0)


async def write_elsewhere(peer: PeerConnection, number: int) -> bool:
    written = await asyncio.to_thread(peer.write_now, message(number))
    await settled()
    return written


async def test_message_of_another_thread_is_written_there_if_nothing_comes_first() -> None:
    async with connected() as (peer, call):
        assert await write_elsewhere(peer, 1)
        assert call.begun == [0, 1]
        await call.take()
        assert await write_elsewhere(peer, 2)
        assert call.begun == [0, 1, 2]


async def test_message_waits_for_the_one_before_it_and_order_is_kept() -> None:
    async with connected() as (peer, call):
        assert await write_elsewhere(peer, 1)
        assert not await write_elsewhere(peer, 2), "1 is being written"
        assert peer.queue(message(2))
        assert peer.queue(message(3))
        await settled()
        assert call.begun == [0, 1]
        for _ in range(3):
            await call.take()
        assert call.begun == [0, 1, 2, 3]


async def test_nothing_overtakes_a_queued_message() -> None:
    async with connected() as (peer, _):
        assert peer.queue(message(1))
        assert not await asyncio.to_thread(peer.write_now, message(2))


async def test_peer_that_takes_nothing_is_told_from_one_that_does() -> None:
    async with connected(limit=2) as (peer, _):
        assert await write_elsewhere(peer, 1)
        assert [peer.queue(message(number)) for number in (2, 3, 4)] == [True, True, False]


async def test_without_a_stream_every_message_is_queued() -> None:
    peer = PeerConnection(NODE, 4)
    assert not await asyncio.to_thread(peer.write_now, message(1))
    async with connected() as (peer, call):
        pass
    assert not await asyncio.to_thread(peer.write_now, message(1))
    assert call.begun == [0]


@pytest.mark.parametrize("ends", ["before", "meanwhile"])
async def test_call_that_ends_frees_the_connection_for_the_next(ends: str) -> None:
    async with connected() as (peer, call):
        if ends == "before":
            call.broken = True
            assert not await write_elsewhere(peer, 1)
        else:
            assert await write_elsewhere(peer, 1)
            await call.take(grpc.aio.UsageError("cancelled"))
    call = Call()
    writer = asyncio.create_task(peer.write_queued(call))
    assert peer.queue(message(2))
    await settled()
    assert call.begun == [2]
    writer.cancel()
    await asyncio.gather(writer, return_exceptions=True)
