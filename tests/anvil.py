"""A real Anvil for tests: started on a free loopback port, ended by its own process id."""

from __future__ import annotations

import asyncio
import secrets
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp

from bsns.chain.deployment import ETHER
from bsns.chain.signer import KeySigner
from coordinator.devnet import find_anvil, free_port

START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 10.0


class Anvil:
    """One running chain. Blocks are mined on demand (automine) unless arguments say otherwise."""

    def __init__(self, port: int, process: subprocess.Popen[bytes]) -> None:
        self.rpc_url = f"http://127.0.0.1:{port}"
        self.process = process

    async def rpc(self, method: str, *parameters: Any) -> Any:
        """Result of one JSON-RPC call; AssertionError with the error if there is one."""
        body = {"jsonrpc": "2.0", "id": 1, "method": method, "params": list(parameters)}
        async with aiohttp.ClientSession() as session, session.post(self.rpc_url, json=body) as response:
            answer = await response.json()
        assert "error" not in answer, answer
        return answer["result"]

    async def funded_signer(self, wei: int = 1_000 * ETHER) -> KeySigner:
        """A new key with money."""
        signer = KeySigner(secrets.token_bytes(32))
        await self.rpc("anvil_setBalance", signer.address, hex(wei))
        return signer

    async def mine(self, blocks: int = 1) -> None:
        """Mine `blocks` blocks now."""
        await self.rpc("anvil_mine", hex(blocks))

    async def pass_time(self, seconds: int) -> None:
        """Let `seconds` pass and mine one block, so that views see it."""
        await self.rpc("evm_increaseTime", hex(seconds))
        await self.mine()

    def stop(self) -> None:
        """SIGTERM, then SIGKILL."""
        self.process.terminate()
        try:
            self.process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


@asynccontextmanager
async def running_anvil(*arguments: str, chain_id: int = 31_337) -> AsyncIterator[Anvil]:
    """Start Anvil and wait until it answers."""
    port = free_port()
    command = [str(find_anvil()), "--host", "127.0.0.1", "--port", str(port), "--chain-id", str(chain_id), "--silent"]
    process = subprocess.Popen([*command, *arguments], stdout=subprocess.DEVNULL)
    anvil = Anvil(port, process)
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            while True:
                assert process.poll() is None, f"anvil ended with status {process.returncode}"
                try:
                    await anvil.rpc("eth_chainId")
                    break
                except aiohttp.ClientError:
                    await asyncio.sleep(0.02)
        yield anvil
    finally:
        anvil.stop()
