"""2026-11: one cancelled RPC call stopped every later one of the whole process, for ever.

web3's lock of sessions is one of the process, and a task cancelled while it waited for it left it held by nobody
(ApeWorX/web3.py#3867). A requester that was interrupted could not resume; a coordinator would have needed a restart.
"""

from __future__ import annotations

import asyncio
import contextlib

from bsns.chain.client import raw_connection
from tests.anvil import running_anvil

CALLS = 40
ROUNDS = 20


async def test_calls_cancelled_at_any_moment_leave_other_connections_alone() -> None:
    async with running_anvil() as anvil, raw_connection(anvil.rpc_url) as one, raw_connection(anvil.rpc_url) as other:

        async def cancelled_after(turns: int) -> None:
            call = asyncio.create_task(one.eth.get_block("latest"))
            for _ in range(turns):
                await asyncio.sleep(0)
            call.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await call

        async with asyncio.timeout(30):
            for _ in range(ROUNDS):
                await asyncio.gather(*(cancelled_after(turns) for turns in range(CALLS)))
            assert await other.eth.chain_id == 31_337
            assert await one.eth.chain_id == 31_337


async def test_endpoint_that_gave_up_an_idle_connection_is_asked_again() -> None:
    """One request per connection, closed without notice, as a proxy does with idle ones."""
    answer = b'{"jsonrpc":"2.0","id":0,"result":"0x7a69"}'
    served = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal served
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        await reader.readexactly(length)
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(answer) + answer
        )
        await writer.drain()
        served += 1
        with contextlib.suppress(asyncio.IncompleteReadError):
            await reader.readexactly(1)  # the next request on this connection is cut off
        writer.close()

    async with (
        await asyncio.start_server(serve, "127.0.0.1", 0) as server,
        raw_connection(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}") as connection,
    ):
        assert await connection.eth.chain_id == 31_337
        assert await connection.eth.chain_id == 31_337
    assert served == 3
