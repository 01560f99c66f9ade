"""A TCP proxy that delivers every byte a fixed time later, in both directions: a long cable on loopback.

Owns one listening port in front of one other port. Promises that bytes keep their order, that a chunk leaves
`delay_s` after it came in and never before, and that bandwidth is not limited: what comes in while earlier bytes are
still under way is delayed by the same time, not by more. A connection ends on both sides when either side ends it,
after what was under way has been delivered. Does not look at what it carries.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from types import TracebackType

CHUNK_BYTES = 256 * 1024
# Chunks under way in one direction; a sender that is faster waits.
MAXIMUM_CHUNKS = 4096


class DelayProxy:
    """Use as an async context manager; `port` is the one to connect to. `delay_s`, one way, may be changed while
    connections are open; it then holds for bytes that come in later.
    """

    def __init__(self, target_port: int, delay_s: float, *, port: int = 0) -> None:
        self.port = port
        self.delay_s = delay_s
        self._target_port = target_port
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> DelayProxy:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port, limit=CHUNK_BYTES)
        self.port = int(self._server.sockets[0].getsockname()[1])
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for connection in tuple(self._connections):
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)
        await self._server.wait_closed()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._connections.add(task)
        try:
            # What is refused behind the proxy ends here too: the connection closes.
            with contextlib.suppress(OSError):
                far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target_port)
                try:
                    async with asyncio.TaskGroup() as directions:
                        directions.create_task(self._carry(reader, far_writer))
                        directions.create_task(self._carry(far_reader, writer))
                finally:
                    far_writer.close()
        finally:
            writer.close()
            self._connections.discard(task)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One direction: a task that notes when each chunk is due, and this one that delivers it then."""
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(MAXIMUM_CHUNKS)

        async def take_in() -> None:
            chunk = b"-"
            while chunk:
                try:
                    chunk = await reader.read(CHUNK_BYTES)
                except OSError:
                    chunk = b""
                await under_way.put((time.monotonic() + self.delay_s, chunk))

        intake = asyncio.create_task(take_in())
        try:
            while True:
                due, chunk = await under_way.get()
                await asyncio.sleep(due - time.monotonic())
                if not chunk:
                    break
                writer.write(chunk)
                with contextlib.suppress(OSError):
                    await writer.drain()
        finally:
            intake.cancel()
            writer.close()
