"""A swarm of real processes to stream through: Anvil with a block a second, coordinator, node clients; and a requester.

Owns one devnet whose nodes compute with one thread each, optionally behind proxies that delay, and the requester's
side of many requests at once. Promises that a sample contains streaming only: every request of it is paid for and
routed on chain and has its sessions open at the nodes before the first prompt is sent; all stages' commitments are on
chain before `stream` returns; and few requests are left unsettled between samples. No committee re-executes: it is
drawn after the commitments, so a node does and records the same work whether or not it will be judged, but the
re-execution would compete with the next sample on one machine. Does not measure anything itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import secrets
import shutil
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.delay_proxy import DelayProxy
from benchmarks.inference_node import ForwardPass, read_passes
from benchmarks.inference_reference import Decoded
from bsns.chain.client import Web3ChainClient
from bsns.chain.deployment import Terms
from bsns.chain.signer import KeySigner
from bsns.chain.submitter import Submitter
from bsns.protocol import identifiers
from bsns.protocol.commitments import secret_hash
from bsns.protocol.contract_states import RequestStatus
from bsns.protocol.manifest import ModelManifest
from bsns.protocol.sampling import SamplingParameters
from bsns.protocol.typed_data import escrow_domain, verification_domain
from bsns.requester.execution_session import ExecutionSession, SessionDomains, SessionLimits, entry_commitment
from bsns.requester.journal import JournalEntry
from bsns.requester.node_connection import NodeEndpoint, find_endpoints
from bsns.requester.request_input import RequestInput
from bsns.requester.settlement import Settlement
from coordinator.devnet import Devnet, free_port
from node_client.settings import NodeSettings

FOLDER = Path(__file__).parents[1] / "build" / "bench-inference"
POLL_S = 0.1
PATIENCE_S = 240.0
SETTLEMENT_GRACE_S = 15.0
# Committed requests that are left as they are until there are more of them: settling takes ten blocks, and each request
# that is left costs the coordinator a look in every block.
MAXIMUM_UNSETTLED = 4
TOKEN_LIFETIME_S = 3_600
LIMITS = SessionLimits(
    connect_s=10.0, open_session_s=60.0, first_token_s=300.0, next_token_s=120.0, close_s=10.0, evidence_s=60.0
)
# Finished sessions leave soon, so that the next sample finds the node empty.
NODE_ENVIRONMENT = {"BSNS_NODE_SESSION_LINGER_SECONDS": "2", "BSNS_NODE_LOG_LEVEL": "warning"}


def terms() -> Terms:
    """A devnet's, with no committee and with windows as long as a benchmark."""
    devnet = Terms.for_devnet()
    return dataclasses.replace(
        devnet,
        registry=dataclasses.replace(devnet.registry, thaw_period=200_000),
        escrow=dataclasses.replace(devnet.escrow, commit_window=7_200, verification_window=86_400),
        verification=dataclasses.replace(
            devnet.verification, sampling_rate_bps=0, secret_window=7_200, attest_window=600, reveal_window=600
        ),
    )


def node_takes(setting: str) -> bool:
    """Whether the node client of this checkout has the setting (a field of NodeSettings)."""
    return setting in NodeSettings.model_fields


@dataclasses.dataclass(frozen=True)
class Part:
    """What one node of the plan holds."""

    node: str
    first_unit: int
    end_unit: int
    process: int
    """Process id of its client."""


class Swarm:
    """A running network; made with `running`."""

    def __init__(
        self, devnet: Devnet, chain: Web3ChainClient, manifest: ModelManifest, assignments: Sequence[Any]
    ) -> None:
        self.devnet = devnet
        self.manifest = manifest
        self.proxies: list[DelayProxy] = []
        self._chain = chain
        self._signer = KeySigner(bytes.fromhex(devnet.requester_key_file.read_text().strip()))
        self._submitter = Submitter(chain, self._signer)
        self._endpoints: dict[str, NodeEndpoint] = {}
        self._pass_files: dict[str, Path] = {}
        self._unsettled: list[JournalEntry] = []
        processes = {child.ready["node"]: child.process.pid for child in devnet.nodes}
        # Structs of the contract: stage, replica, first unit, end unit, node.
        self.parts = [Part(item[4], item[2], item[3], processes[item[4]]) for item in sorted(assignments)]

    @classmethod
    @contextlib.asynccontextmanager
    async def running(
        cls,
        name: str,
        model_folder: Path,
        *,
        stages: int,
        spare_nodes: int = 0,
        node_options: Sequence[str] = (),
        coordinator_environment: Mapping[str, str] | None = None,
        timed: bool = False,
        delay_s: float | None = None,
    ) -> AsyncIterator[Swarm]:
        """Start `stages` nodes with one stage each, and `spare_nodes` that are planned for nothing. With `timed` the
        nodes write their forward passes; with `delay_s` each is reached through a proxy.
        """
        folder = FOLDER / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        count = stages + spare_nodes
        environment = {**NODE_ENVIRONMENT, **(coordinator_environment or {})}
        if spare_nodes:
            environment["BSNS_COORDINATOR_SPREAD_LEFTOVER"] = "false"
        async with contextlib.AsyncExitStack() as stack:
            proxies, listen = [], [free_port() for _ in range(count)]
            if delay_s is not None:
                proxies = [await stack.enter_async_context(DelayProxy(port, delay_s)) for port in listen]

            def node_command(index: int) -> Sequence[str]:
                return [
                    *(sys.executable, "-m", "benchmarks.inference_node"),
                    *(("--passes", str(folder / f"passes-{index}")) if timed else ()),
                    *("--threads", "1", "--listen", f"127.0.0.1:{listen[index]}"),
                    # A pass a token, as in what the swarm is compared with; a section that measures drafts asks for
                    # them.
                    *("--speculation-tokens", "0"),
                    *(("--advertise", f"127.0.0.1:{proxies[index].port}") if proxies else ()),
                    *node_options,
                    "--",
                ]

            devnet = Devnet(
                folder,
                model_folder / "manifest.json",
                node_count=count,
                stage_count=stages,
                terms=terms(),
                node_command=node_command,
            )
            with _environment(environment):
                await stack.enter_async_context(devnet)
            assignments = await devnet.await_plan()
            chain = await stack.enter_async_context(await Web3ChainClient.connect(devnet.rpc_url, devnet.deployment))
            manifest = ModelManifest.from_bytes((model_folder / "manifest.json").read_bytes())
            swarm = cls(devnet, chain, manifest, assignments)
            swarm.proxies = proxies
            swarm._pass_files = {
                child.ready["node"]: folder / f"passes-{index}" for index, child in enumerate(devnet.nodes)
            }
            yield swarm

    @property
    def cuts(self) -> str:
        """The units of each stage, for a note."""
        return ", ".join(f"{part.first_unit}..{part.end_unit - 1}" for part in self.parts)

    async def stream(self, prompts: Sequence[Sequence[int]], tokens: int) -> list[Decoded]:
        """One request a prompt, all at once, greedy; at most `tokens` each. Returns when all are committed on chain."""
        self.devnet.check()
        entries = await asyncio.gather(*(self._open(prompt, tokens) for prompt in prompts))
        await asyncio.gather(*(self._until_not(entry, RequestStatus.OPEN) for entry in entries))
        async with contextlib.AsyncExitStack() as stack:
            sessions = [await stack.enter_async_context(await self._session(entry)) for entry in entries]
            await asyncio.gather(*(session.open() for session in sessions))
            answers = await asyncio.gather(*(self._read(session) for session in sessions))
        standings = await asyncio.gather(*(self._until_not(entry, RequestStatus.ROUTED) for entry in entries))
        if set(standings) != {RequestStatus.COMMITTED}:
            raise RuntimeError(f"not every request was committed: {standings}; see the logs in {self.devnet.folder}")
        self._unsettled += entries
        if len(self._unsettled) > MAXIMUM_UNSETTLED:
            await asyncio.gather(*(self._settle(entry) for entry in self._unsettled))
            self._unsettled.clear()
        return list(answers)

    async def _settle(self, entry: JournalEntry) -> None:
        """Bring a committed request to its end on chain."""
        settlement = Settlement(
            self._chain, self._submitter, entry.request_id, lambda _line: None, lambda _name, _receipt: None
        )
        await settlement.draw(entry.secret)
        standing = await settlement.finish(entry.secret, grace_s=SETTLEMENT_GRACE_S, timeout_s=PATIENCE_S)
        if standing.status is not RequestStatus.SETTLED:
            raise RuntimeError(f"a request ended as {standing.status.name}; see the logs in {self.devnet.folder}")

    def passes(self, answer: Decoded) -> list[list[ForwardPass]]:
        """The forward passes behind each token of `answer` after the first, for each stage in route order. For a sample
        of one stream; the prompt, which may be read in pieces, is left out.
        """
        found = []
        for part in self.parts:
            passes = [
                item
                for item in read_passes(self._pass_files[part.node])
                if item.first_unit == part.first_unit and answer.began <= item.began <= answer.arrivals[-1]
            ]
            found.append(passes[1 - len(answer.tokens) :])
        return found

    async def _open(self, prompt: Sequence[int], tokens: int) -> JournalEntry:
        """Pay for one request under the network's plan."""
        deployment, chain = self.devnet.deployment, self._chain
        given, sampling, nonce = (
            RequestInput.of_tokens(prompt),
            SamplingParameters(maximum_tokens=tokens),
            secrets.randbits(128),
        )
        manifest = self.manifest
        model = identifiers.model_id(manifest.manifest_hash, manifest.weight_root, len(manifest.units))
        publisher = self._publisher
        plan_id = bytes(await chain.call("ShardAssignments", "activePlan", model, publisher))
        entry = JournalEntry(
            request_id=identifiers.request_id(
                deployment.chain_id, deployment.inference_escrow, self._signer.address, nonce
            ),
            chain_id=deployment.chain_id,
            escrow=deployment.inference_escrow,
            requester=self._signer.address,
            plan_id=plan_id,
            publisher=publisher,
            nonce=nonce,
            secret=secrets.token_bytes(32),
            salt=secrets.token_bytes(32),
            input=given,
            sampling=sampling,
            stop=(),
            deposit=int(await chain.call("InferenceEscrow", "quote", plan_id, given.rows, tokens)),
            created_at=int(time.time()),
        )
        await self._submitter.submit(
            "InferenceEscrow",
            "open",
            plan_id,
            nonce,
            entry_commitment(entry),
            secret_hash(entry.secret),
            given.rows,
            tokens,
            value=entry.deposit,
        )
        return entry

    @property
    def _publisher(self) -> str:
        key_file = self.devnet.folder / "keys" / "coordinator.key"
        return KeySigner(bytes.fromhex(key_file.read_text().strip())).address

    async def _until_not(self, entry: JournalEntry, status: RequestStatus) -> RequestStatus:
        """Wait while the request is in `status`."""
        async with asyncio.timeout(PATIENCE_S):
            while True:
                found = await self._chain.call("InferenceEscrow", "requestOf", entry.request_id)
                if found.status != status:
                    return RequestStatus(found.status)
                await asyncio.sleep(POLL_S)

    async def _session(self, entry: JournalEntry) -> ExecutionSession:
        deployment = self.devnet.deployment
        nodes = [stage.node for stage in await self._chain.call("InferenceEscrow", "stagesOf", entry.request_id)]
        if missing := [node for node in nodes if node not in self._endpoints]:
            head = await self._chain.head()
            self._endpoints |= await find_endpoints(self._chain, missing, deployment.first_block, head.number)
        domains = SessionDomains(
            escrow_domain(deployment.chain_id, deployment.inference_escrow),
            verification_domain(deployment.chain_id, deployment.output_verification),
        )
        deadline = int(time.time()) + TOKEN_LIFETIME_S
        return ExecutionSession(
            entry, [self._endpoints[node] for node in nodes], self._signer, domains, LIMITS, deadline, deadline
        )

    @staticmethod
    async def _read(session: ExecutionSession) -> Decoded:
        began, arrivals = time.monotonic(), []
        async for _ in session.stream():
            arrivals.append(time.monotonic())
        if session.finish_reason not in ("stop", "length"):
            raise RuntimeError(f"a stream ended after {len(arrivals)} tokens: {session.finish_reason}")
        # The drafts behind the last step were never computed.
        drafted = sum(len(drafts) for drafts in session.drafts[:-1])
        return Decoded(session.tokens, began, tuple(arrivals), drafted, len(session.tokens) - len(session.drafts))


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """The processes started meanwhile inherit `values`."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
