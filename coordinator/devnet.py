"""A whole network on one machine: Anvil, the contracts, a coordinator and node clients, as real processes.

Owns those processes from start to stop: each is started with its own log file, watched, and ended by its own process
id (SIGTERM, then SIGKILL after a limit), however the caller leaves. Promises nothing about security: keys lie in
files of the devnet's folder and hold worthless money. Does not speak for any of the three people; it runs the same
commands that they would type.
"""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import shutil
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import aiohttp

from bsns.chain.client import Web3ChainClient
from bsns.chain.deployment import ETHER, Deployment, Terms, deploy
from bsns.chain.signer import KeySigner

CHAIN_ID = 31_337
BLOCK_TIME_S = 1
STATES_KEPT = 128  # of the newest blocks, as by a node of Ethereum: an auditor reads one that is not the last any more
ACCOUNT_WEI = 1_000 * ETHER
STAKE_ETHER = "1.5"
DEVNET_SCRYPT_COST = 2**12  # worthless keys: the four keystores must not cost the demo ten seconds
DEVNET_PROFILE_S = 0.3  # all nodes measure at once on one machine: longer is not truer here
# On a network of one person hardly anybody else comes to share a batch.
DEVNET_BATCH_S = 10
DEVNET_CONFIRMATIONS = 2
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 10.0
LOG_TAIL_LINES = 25
POLL_S = 0.05
# Says that a folder was made by a devnet, and may be emptied by the next one.
MARKER_FILE = ".bsns-devnet"
PLAN_TIMEOUT_S = 90.0
PLAN_POLL_S = 0.25

Progress = Callable[[str], None]


class DevnetError(RuntimeError):
    """A part of the local network did not come up or died. The message names its log and shows the end of it."""


@dataclass
class ManagedProcess:
    """One child process, its log, and the ready line it printed."""

    name: str
    log: Path
    process: asyncio.subprocess.Process
    ready: dict[str, Any] = field(default_factory=dict)

    @property
    def running(self) -> bool:
        return self.process.returncode is None

    def tail(self) -> str:
        """The end of its log, for an error message."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return "\n".join(lines[-LOG_TAIL_LINES:])

    async def stop(self) -> None:
        """SIGTERM, and SIGKILL if it has not drained within the limit."""
        if not self.running:
            return
        self.process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(self.process.wait(), STOP_TIMEOUT_S)
        except TimeoutError:
            self.process.kill()
            await self.process.wait()


def find_anvil() -> Path:
    """Anvil from $BSNS_ANVIL, the repository's node_modules, ~/.foundry/bin or PATH; DevnetError says how to get it."""
    candidates = [
        Path(os.environ["BSNS_ANVIL"]) if os.environ.get("BSNS_ANVIL") else None,
        Path(__file__).resolve().parents[1] / "contracts" / "node_modules" / ".bin" / "anvil",
        Path.home() / ".foundry" / "bin" / "anvil",
        Path(found) if (found := shutil.which("anvil")) else None,
    ]
    for candidate in candidates:
        if candidate and os.access(candidate, os.X_OK):
            return candidate
    raise DevnetError("there is no anvil here: run `make setup`, or install Foundry and put anvil into PATH")


def free_port() -> int:
    """A TCP port on loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Devnet:
    """The processes of one local network under `folder`. Use as an async context manager; leaving it stops everything.

    `stage_count` is that of the plan (default: the planner's choice), `replicas` the least nodes of a stage.
    `operators`: how many nodes there may be once later ones were started, too.
    `node_command` starts a node client; a test gives another one to put a dishonest node into the network.
    """

    def __init__(
        self,
        folder: Path,
        manifest: Path,
        *,
        node_count: int,
        stage_count: int | None = None,
        replicas: int = 1,
        operators: int = 0,
        terms: Terms | None = None,
        fee_per_token: int = ETHER // 1_000_000,
        progress: Progress = lambda _line: None,
        node_command: Callable[[int], Sequence[str]] = lambda _index: (sys.executable, "-m", "node_client.cli"),
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        self.node_count = node_count
        self.stage_count = stage_count
        self.replicas = replicas
        self._operators = max(operators, node_count)
        self.terms = terms or Terms.for_devnet()
        self.fee_per_token = fee_per_token
        self.processes: list[ManagedProcess] = []
        self.nodes: list[ManagedProcess] = []
        self.requester_key_file = folder / "keys" / "requester.key"
        self.deployment_file = folder / "deployment.json"
        self._progress = progress
        self._node_command = node_command
        self._anvil: ManagedProcess | None = None
        self._coordinator: ManagedProcess | None = None
        self._gateway: ManagedProcess | None = None
        self._rpc_port = 0

    @property
    def rpc_url(self) -> str:
        return f"http://127.0.0.1:{self._rpc_port}"

    @property
    def database_url(self) -> str:
        return f"sqlite:///{self.folder / 'coordinator.sqlite'}"

    @property
    def deployment(self) -> Deployment:
        return Deployment.load(self.deployment_file)

    @property
    def coordinator(self) -> ManagedProcess:
        if self._coordinator is None:
            raise DevnetError("the coordinator is not started")
        return self._coordinator

    @property
    def gateway(self) -> ManagedProcess:
        if self._gateway is None:
            raise DevnetError("the gateway is not started")
        return self._gateway

    async def __aenter__(self) -> Devnet:
        try:
            await self._start()
        except BaseException:
            await self.stop()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def stop(self) -> None:
        """End every process; Anvil last, so that the others can finish what they are sending."""
        await asyncio.gather(*(child.stop() for child in self.processes if child is not self._anvil))
        if self._anvil:
            await self._anvil.stop()

    def check(self) -> None:
        """Raise DevnetError if a process has died."""
        for child in self.processes:
            if not child.running:
                raise DevnetError(
                    f"{child.name} ended with status {child.process.returncode}; "
                    f"the end of {child.log}:\n{child.tail()}"
                )

    def take_dead(self) -> list[ManagedProcess]:
        """Processes that have ended since the last call; DevnetError if the chain is one of them."""
        dead = [child for child in self.processes if not child.running]
        if self._anvil in dead:
            self.check()
        self.processes = [child for child in self.processes if child.running]
        return dead

    async def await_plan(self) -> list[tuple[Any, ...]]:
        """Wait until the coordinator's first plan is in effect; its assignments as Solidity structs."""
        deadline = time.monotonic() + PLAN_TIMEOUT_S
        async with await Web3ChainClient.connect(self.rpc_url, self.deployment) as chain:
            while time.monotonic() < deadline:
                self.check()
                head = await chain.head()
                plans = await chain.events_between(self.deployment.first_block, head.number, name="PlanPublished")
                for event in plans:
                    plan = event.arguments
                    active = await chain.call("ShardAssignments", "activePlan", plan["modelId"], plan["publisher"])
                    if active == plan["planId"]:
                        return list(plan["assignments"])
                await asyncio.sleep(PLAN_POLL_S)
        raise DevnetError(
            f"no plan came into effect within {PLAN_TIMEOUT_S:.0f} s; "
            f"the end of {self.coordinator.log}:\n{self.coordinator.tail()}"
        )

    async def start_coordinator(self) -> ManagedProcess:
        """Start the coordinator (again, on the same database, after it was killed)."""
        port = free_port() if self._coordinator is None else int(self._coordinator.ready["endpoint"].rsplit(":", 1)[1])
        command = [
            *(sys.executable, "-m", "coordinator.cli", "serve"),
            *("--rpc", self.rpc_url),
            *("--deployment", str(self.deployment_file)),
            *("--database-url", self.database_url),
            *("--listen", f"127.0.0.1:{port}"),
            *("--key-file", str(self.folder / "keys" / "coordinator.key")),
            *("--manifest", str(self.manifest)),
            *("--fee-per-token", str(self.fee_per_token)),
            *("--minimum-nodes", str(self.node_count)),
            *("--replicas", str(self.replicas)),
            *(("--stage-count", str(self.stage_count)) if self.stage_count is not None else ()),
        ]
        self._coordinator = await self._spawn("coordinator", command, wait_ready=True)
        return self._coordinator

    async def start_gateway(self, *options: str) -> ManagedProcess:
        """Start the gateway (again, with the same accounts, after it was killed); a plan must be in effect."""
        before = self._gateway
        port = free_port() if before is None else int(before.ready["url"].rsplit(":", 1)[1])
        await self.fund_key("gateway")
        command = [
            *(sys.executable, "-m", "coordinator.cli", "gateway", "serve"),
            *("--rpc", self.rpc_url),
            *("--deployment", str(self.deployment_file)),
            *("--database-url", self.database_url),
            *("--listen", f"127.0.0.1:{port}"),
            *("--key-file", str(self.folder / "keys" / "gateway.key")),
            *("--state-dir", str(self.folder / "gateway")),
            *("--model-folder", str(self.manifest.parent)),
            *("--coordinator", str(self.coordinator.ready["endpoint"])),
            *("--publisher", str(self.coordinator.ready["publisher"])),
            *options,
        ]
        self._gateway = await self._spawn("gateway", command, wait_ready=True)
        return self._gateway

    async def fund_key(self, name: str, wei: int = ACCOUNT_WEI) -> KeySigner:
        """A key of the network's folder whose account holds `wei`."""
        signer = self._new_key(name)
        async with aiohttp.ClientSession() as session:
            await self._rpc(session, "anvil_setBalance", [signer.address, hex(wei)])
        return signer

    async def _start(self) -> None:
        for name in ("keys", "logs"):
            (self.folder / name).mkdir(parents=True, exist_ok=True, mode=0o700)
        (self.folder / MARKER_FILE).touch()
        await self._start_anvil()
        deployer = self._new_key("coordinator")
        others = [self._new_key(name) for name in ("requester", *(f"operator-{i}" for i in range(self._operators)))]
        async with aiohttp.ClientSession() as session:
            for signer in (deployer, *others):
                await self._rpc(session, "anvil_setBalance", [signer.address, hex(ACCOUNT_WEI)])
            # Contracts are deployed under automine, in a moment; then blocks come by the clock, as on a real chain.
            deployment = await deploy(
                self.rpc_url,
                deployer,
                self.terms,
                progress=lambda name, where: self._progress(f"contract {name} at {where}"),
            )
            await self._rpc(session, "evm_setAutomine", [False])
            await self._rpc(session, "evm_setIntervalMining", [BLOCK_TIME_S])
        deployment.save(self.deployment_file)
        await self.start_coordinator()
        self._progress(f"coordinator at {self.coordinator.ready['endpoint']}")
        await self._start_nodes()

    async def start_node(self, index: int) -> ManagedProcess:
        """Start node client `index` (again, with the same keys and evidence, after it was killed)."""
        command = [
            *self._node_command(index),
            "join",
            *("--rpc", self.rpc_url),
            *("--deployment", str(self.deployment_file)),
            *("--data-dir", str(self.folder / f"node-{index}")),
            *("--operator-key-file", str(self.folder / "keys" / f"operator-{index}.key")),
            *("--stake", STAKE_ETHER),
            *("--listen", "127.0.0.1:0"),
            *("--coordinator", str(self.coordinator.ready["endpoint"])),
            # <cache>/models/<name>/<hash>/manifest.json: the nodes serve the model that is planned for.
            *("--model-cache", str(self.manifest.resolve().parents[3])),
            *("--threads", str(max(1, (os.cpu_count() or 1) // 2))),
        ]
        return await self._spawn(f"node-{index}", command, wait_ready=True)

    async def _start_nodes(self) -> None:
        self.nodes = list(await asyncio.gather(*(self.start_node(index) for index in range(self.node_count))))
        for child in self.nodes:
            self._progress(f"{child.name}: key {child.ready['node']} staked, serves at {child.ready['endpoint']}")

    async def _start_anvil(self) -> None:
        self._rpc_port = free_port()
        command = [
            str(find_anvil()),
            *("--host", "127.0.0.1"),
            *("--port", str(self._rpc_port)),
            *("--chain-id", str(CHAIN_ID)),
            *("--state", str(self.folder / "anvil-state.json")),
            *("--state-interval", "5"),
            *("--prune-history", str(STATES_KEPT)),
            "--silent",
        ]
        self._anvil = await self._spawn("anvil", command, wait_ready=False)
        async with aiohttp.ClientSession() as session, asyncio.timeout(START_TIMEOUT_S):
            while True:
                self.check()
                try:
                    await self._rpc(session, "eth_chainId", [])
                    break
                except aiohttp.ClientError:
                    await asyncio.sleep(POLL_S)
        self._progress(f"chain {CHAIN_ID} at {self.rpc_url}, a block every {BLOCK_TIME_S} s")

    async def _rpc(self, session: aiohttp.ClientSession, method: str, parameters: list[Any]) -> Any:
        body = {"jsonrpc": "2.0", "id": 1, "method": method, "params": parameters}
        async with session.post(self.rpc_url, json=body) as response:
            answer = await response.json()
        if "error" in answer:
            raise DevnetError(f"anvil refused {method}: {answer['error']}")
        return answer["result"]

    def _new_key(self, name: str) -> KeySigner:
        """A key in a file that only its owner can read; kept if the devnet is started again in the same folder."""
        path = self.folder / "keys" / f"{name}.key"
        if not path.exists():
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
                file.write(secrets.token_hex(32))
        return KeySigner(bytes.fromhex(path.read_text().strip()))

    async def _spawn(self, name: str, command: Sequence[str], *, wait_ready: bool) -> ManagedProcess:
        """Start a process whose standard error goes to its log. With `wait_ready`, wait for its one JSON line on
        standard output.
        """
        log = self.folder / "logs" / f"{name}.log"
        environment = {
            **os.environ,
            "BSNS_NODE_PASSWORD": "devnet",
            "BSNS_NODE_KEYSTORE_SCRYPT_COST": str(DEVNET_SCRYPT_COST),
            "BSNS_NODE_PROFILE_SECONDS": str(DEVNET_PROFILE_S),
            "BSNS_GATEWAY_DEPOSIT_CONFIRMATIONS": os.environ.get(
                "BSNS_GATEWAY_DEPOSIT_CONFIRMATIONS", str(DEVNET_CONFIRMATIONS)
            ),
            "BSNS_COORDINATOR_BATCH_SECONDS": os.environ.get("BSNS_COORDINATOR_BATCH_SECONDS", str(DEVNET_BATCH_S)),
        }
        with log.open("ab") as sink:
            process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE if wait_ready else sink,
                stderr=sink,
                env=environment,
                start_new_session=True,  # Ctrl-C reaches us alone, and we stop the children in order
            )
        child = ManagedProcess(name, log, process)
        self.processes.append(child)
        if wait_ready and process.stdout is not None:
            try:
                line = await asyncio.wait_for(process.stdout.readline(), START_TIMEOUT_S)
                child.ready = json.loads(line)
            except (TimeoutError, json.JSONDecodeError):
                raise DevnetError(
                    f"{name} did not get ready within {START_TIMEOUT_S:.0f} s; the end of {log}:\n{child.tail()}"
                ) from None
        return child
