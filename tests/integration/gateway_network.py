"""A devnet with a gateway, kept running in a thread of its own, for tests that speak HTTP to it like a stranger."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import openai

from bsns.chain.signer import KeySigner
from coordinator.devnet import Devnet
from tests.integration.network import run_command

CALL_S = 240.0
ACCOUNT_WEI = 10**18
_T = TypeVar("_T")


@dataclass
class GatewayNetwork:
    """What tests ask of a running gateway."""

    devnet: Devnet
    model: str
    loop: asyncio.AbstractEventLoop
    names: list[str] = field(default_factory=list)

    @property
    def url(self) -> str:
        return str(self.devnet.gateway.ready["url"])

    def run(self, work: Coroutine[Any, Any, _T]) -> _T:
        """A coroutine in the thread of the network."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(CALL_S)

    def command(self, *arguments: str) -> Any:
        """The JSON that `bsns-coordinator gateway …` prints."""
        done = self.run(
            run_command(
                [
                    *(sys.executable, "-m", "coordinator.cli", "gateway", *arguments),
                    *("--database-url", self.devnet.database_url),
                ]
            )
        )
        assert done.status == 0, done.error
        return json.loads(done.output)

    def account(self, wei: int = ACCOUNT_WEI, **limits: int) -> str:
        """The key of a new account with that much on it."""
        name = f"account {len(self.names)}"
        self.names.append(name)
        options = [f"--{key.replace('_', '-')}={value}" for key, value in limits.items()]
        secret: str = self.command("open-account", name, f"--deposit-wei={wei}", *options)["secret"]
        return secret

    def client(self, key: str, **options: Any) -> openai.OpenAI:
        """OpenAI's own client, as it comes."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, **options)

    def http(self, key: str | None = None) -> httpx2.Client:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx2.Client(base_url=self.url, headers=headers, timeout=60)

    def balance(self, key: str) -> int:
        with self.http(key) as http:
            return int(http.get("/v1/account").json()["balance_wei"])

    def funded_key(self, name: str) -> KeySigner:
        """A key of the network's folder with money on the chain."""
        return self.run(self.devnet.fund_key(name))

    def restart(self, settings: Mapping[str, Any] | None = None, *, kill: bool = False) -> None:
        """Stop the gateway, or kill it, and start it again with the same accounts; `settings` go into a file."""
        self.run(self._restart(dict(settings or {}), kill))

    async def _restart(self, settings: dict[str, Any], kill: bool) -> None:
        gateway = self.devnet.gateway
        if kill:
            gateway.process.kill()
            await gateway.process.wait()
        else:
            await gateway.stop()
        self.devnet.take_dead()
        file = self.devnet.folder / "gateway.toml"
        file.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items()))
        await self.devnet.start_gateway("--config", str(file))


@contextmanager
def running_gateway(folder: Path, model_folder: Path, *, node_count: int = 2) -> Iterator[GatewayNetwork]:
    """Start chain, coordinator, nodes and gateway; everything is stopped on the way out."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="network", daemon=True)
    thread.start()
    devnet = Devnet(folder, model_folder / "manifest.json", node_count=node_count, stage_count=node_count)

    async def start() -> None:
        await devnet.__aenter__()
        await devnet.await_plan()
        await devnet.start_gateway()

    try:
        asyncio.run_coroutine_threadsafe(start(), loop).result(CALL_S)
        name = json.loads((model_folder / "manifest.json").read_text())["name"]
        yield GatewayNetwork(devnet, name, loop)
    finally:
        asyncio.run_coroutine_threadsafe(devnet.stop(), loop).result(CALL_S)
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()
