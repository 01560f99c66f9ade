"""A devnet of real processes for tests: Anvil, coordinator, nodes, and the commands of requester and auditor."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bsns.chain.client import ChainEvent, Web3ChainClient
from bsns.chain.deployment import Terms
from coordinator.devnet import Devnet

COMMAND_TIMEOUT_S = 240.0
POLL_S = 0.05


@dataclass
class Finished:
    """A command that ended."""

    status: int
    output: str
    error: str


@dataclass
class Network:
    """One running devnet and what tests ask of it."""

    devnet: Devnet
    chain: Web3ChainClient
    model_folder: Path
    progress: list[str] = field(default_factory=list)

    async def events(self, name: str | None = None, **filters: Any) -> tuple[ChainEvent, ...]:
        head = await self.chain.head()
        return await self.chain.events_between(0, head.number, name=name, filters=filters or None)

    async def await_event(
        self, name: str, timeout_s: float, *, unless: asyncio.Future[Finished] | None = None
    ) -> ChainEvent:
        """The first event of that name; AssertionError if it does not come, or the command `unless` ends before."""
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    ended = unless is not None and unless.done()
                    found = await self.events(name)
                    if found:
                        return found[0]
                    assert not (ended and unless), f"ended before {name}: {unless and unless.result()}"
                    await asyncio.sleep(POLL_S)
        except TimeoutError:
            tails = "\n\n".join(f"{child.name}:\n{child.tail()}" for child in self.devnet.processes)
            raise AssertionError(f"no {name} within {timeout_s:.0f} s\n{tails}") from None

    def request_command(self, prompt: str, record: Path, *, maximum_tokens: int, seed: int = 7) -> list[str]:
        """`bsns request` with a prompt, as a requester would type it."""
        return [
            *self.requester_command(record),
            *("--max-tokens", str(maximum_tokens)),
            *("--seed", str(seed)),
            *("--", prompt),
        ]

    def requester_command(self, record: Path) -> list[str]:
        """`bsns request` without what is asked."""
        devnet = self.devnet
        return [
            *(sys.executable, "-m", "bsns.cli", "request"),
            *("--rpc", devnet.rpc_url),
            *("--deployment", str(devnet.deployment_file)),
            *("--key-file", str(devnet.requester_key_file)),
            *("--model-folder", str(self.model_folder)),
            *("--state-dir", str(devnet.folder / "requester")),
            *("--record", str(record)),
            *("--token-ids", "--json"),
        ]

    async def request(self, prompt: str, record: Path, *, maximum_tokens: int) -> dict[str, Any]:
        """Ask, and return the JSON of the answer; AssertionError if the command fails."""
        done = await run_command(self.request_command(prompt, record, maximum_tokens=maximum_tokens))
        assert done.status == 0, done.error
        answer: dict[str, Any] = json.loads(done.output)
        return answer

    async def audit(self, record: Path) -> Finished:
        """`bsns audit verify`."""
        return await run_command(
            [*(sys.executable, "-m", "bsns.cli", "audit", "verify"), str(record), "--rpc", self.devnet.rpc_url]
        )


async def run_command(command: Sequence[str], timeout_s: float = COMMAND_TIMEOUT_S) -> Finished:
    """Run a command to its end within a limit."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        output, error = await asyncio.wait_for(process.communicate(), timeout_s)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    assert process.returncode is not None
    return Finished(process.returncode, output.decode(), error.decode())


@asynccontextmanager
async def running_network(
    folder: Path,
    model_folder: Path,
    *,
    node_count: int,
    stage_count: int | None = None,
    replicas: int = 1,
    terms: Terms | None = None,
    node_command: Callable[[int], Sequence[str]] | None = None,
) -> AsyncIterator[Network]:
    """Start a devnet and wait for its first plan; everything is stopped on the way out."""
    progress: list[str] = []
    options: dict[str, Any] = {} if node_command is None else {"node_command": node_command}
    devnet = Devnet(
        folder,
        model_folder / "manifest.json",
        node_count=node_count,
        stage_count=stage_count,
        replicas=replicas,
        terms=terms,
        progress=progress.append,
        **options,
    )
    async with devnet:
        await devnet.await_plan()
        async with await Web3ChainClient.connect(devnet.rpc_url, devnet.deployment) as chain:
            yield Network(devnet, chain, model_folder, progress)
