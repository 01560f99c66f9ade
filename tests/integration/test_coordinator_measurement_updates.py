"""Measurements that a node sends again: the coordinator keeps the latest, and waits for nobody because of links."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import grpc.aio
import pytest

from bsns.chain.signer import KeySigner
from bsns.protocol.identifiers import ModelId, address
from bsns.protocol.measurements import LinkTiming, NodeMeasurements, UnitTiming
from bsns.protocol.typed_data import ATTACH_PROOF, assignments_domain, registry_domain, signing_digest
from bsns.v1 import coordination_pb2, coordination_pb2_grpc
from coordinator.coordination_service import ConversationLimits, NodeCoordinationServicer
from coordinator.dispatch.node_pool import NodePool, PoolLimits
from coordinator.dispatch.plan_publication import PlanPublication
from coordinator.network_state import NodeState
from coordinator.storage import Storage, migrate

PATIENCE_S = 30.0
NOW = 1_800_000_000
MODEL = ModelId(bytes([8]) * 32)
CONTRACT = address(bytes([9]) * 20)
REGISTRY, ASSIGNMENTS = registry_domain(1, CONTRACT), assignments_domain(1, CONTRACT)
KEY = KeySigner(bytes([7]) * 32)
PEER = address(bytes([3]) * 20)


class RegisteredStorage(Storage):
    """Every node is registered and staked."""

    def node(self, node: str) -> NodeState | None:
        return NodeState(node=node, operator=node)


class Unplanned:
    """A publication without an offer."""

    def offer_for(self, node: str) -> None:
        return None


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Attachment:
    """The node's end of the stream."""

    call: Any
    storage: Storage
    pool: NodePool
    clock: Clock
    beats: int = 0

    async def send(self, measured: NodeMeasurements) -> None:
        signature = KEY.sign_digest(measured.signing_digest(ASSIGNMENTS))
        await self.call.write(coordination_pb2.AttachRequest(measurements=measured.to_message(signature)))

    async def taken(self) -> NodeMeasurements | None:
        """What is stored once the coordinator has worked through everything sent so far."""
        self.beats += 1
        beat = coordination_pb2.Heartbeat(sequence=self.beats)
        await self.call.write(coordination_pb2.AttachRequest(heartbeat=beat))
        deadline = time.monotonic() + PATIENCE_S
        while self.pool.live()[KEY.address].sequence < self.beats:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
        found = self.storage.measurements(MODEL).get(KEY.address)
        return None if found is None else found.measurements

    async def ended(self) -> grpc.StatusCode:
        async with asyncio.timeout(PATIENCE_S):
            with contextlib.suppress(grpc.aio.AioRpcError):
                while await self.call.read() is not grpc.aio.EOF:
                    pass
            return cast(grpc.StatusCode, await self.call.code())


@contextlib.asynccontextmanager
async def attached(folder: Path, **limits: int) -> AsyncIterator[Attachment]:
    url = f"sqlite:///{folder / 'c.sqlite'}"
    migrate(url)
    storage, clock = RegisteredStorage(url), Clock()
    pool = NodePool(PoolLimits(heartbeat_seconds=60, **limits), clock)
    servicer = NodeCoordinationServicer(
        storage=storage,
        pool=pool,
        publications={MODEL: cast(PlanPublication, Unplanned())},
        registry_domain=REGISTRY,
        assignments_domain=ASSIGNMENTS,
        limits=ConversationLimits(),
        chain_now=lambda: NOW,
        not_synced_because=lambda: None,
    )
    server = grpc.aio.server()
    coordination_pb2_grpc.add_NodeCoordinationServicer_to_server(servicer, server)  # type: ignore[no-untyped-call]
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            call: Any = coordination_pb2_grpc.NodeCoordinationStub(channel).Attach()
            nonce = (await call.read()).challenge.nonce
            proof = KEY.sign_digest(signing_digest(REGISTRY, ATTACH_PROOF, (KEY.address, nonce)))
            hello = coordination_pb2.Hello(node=bytes.fromhex(KEY.address[2:]), signature=proof)
            await call.write(coordination_pb2.AttachRequest(hello=hello))
            assert (await call.read()).WhichOneof("body") == "welcome"
            yield Attachment(call, storage, pool, clock)
            call.cancel()
    finally:
        await server.stop(0)
        storage.close()


def measured(at: int, *links: LinkTiming, decode: int = 5) -> NodeMeasurements:
    return NodeMeasurements(
        MODEL, KEY.address, at, bytes(32), 1, (UnitTiming("block", decode, 1, 9, 2),), links
    )  # fmt: skip


async def test_measurements_sent_again_replace_older_ones_and_never_newer_ones(tmp_path: Path) -> None:
    async with attached(tmp_path) as node:
        assert await node.taken() is None
        first, newer = measured(NOW), measured(NOW + 1, LinkTiming(PEER, 5, 6))
        await node.send(first)
        assert await node.taken() == first
        await node.send(newer)
        assert await node.taken() == newer
        await node.send(first)
        assert await node.taken() == newer


async def test_measurements_whose_links_alone_changed_do_not_make_a_plan_wait(tmp_path: Path) -> None:
    async with attached(tmp_path) as node:
        await node.taken()
        node.clock.now = 10.0
        await node.send(measured(NOW))
        await node.taken()
        assert node.pool.seconds_unchanged == 0
        node.clock.now = 20.0
        await node.send(measured(NOW + 1, LinkTiming(PEER, 5, 6)))
        await node.taken()
        assert node.pool.seconds_unchanged == 10
        await node.send(measured(NOW + 2, LinkTiming(PEER, 5, 6), decode=6))
        await node.taken()
        assert node.pool.seconds_unchanged == 0


@pytest.mark.parametrize("at", [NOW + 301, NOW - 30 * 86_400 - 1])
async def test_measurements_of_another_time_end_the_attachment(at: int, tmp_path: Path) -> None:
    async with attached(tmp_path) as node:
        await node.send(measured(at))
        assert await node.ended() is grpc.StatusCode.INVALID_ARGUMENT
        assert node.storage.measurements(MODEL) == {}


async def test_measurements_sent_too_often_end_the_attachment(tmp_path: Path) -> None:
    async with attached(tmp_path, messages_per_minute=3) as node:
        for number in range(4):
            await node.send(measured(NOW + number))
        assert await node.ended() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert node.storage.measurements(MODEL)[KEY.address].measurements == measured(NOW + 2)
