"""A node and a coordinator: attach by proof, heartbeats, signed measurements, consent to a plan that it has checked."""

from __future__ import annotations

import asyncio
import secrets
from collections import defaultdict
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from bsns.protocol.measurements import NodeMeasurements
from bsns.protocol.plan import Assignment, ShardPlan, execution_class_id
from bsns.protocol.typed_data import ATTACH_PROOF, PLAN_CONSENT, is_signed_by, signing_digest
from bsns.v1 import common_pb2, coordination_pb2, coordination_pb2_grpc
from tests.integration.node_fixtures import EXECUTION_CLASS, FEE, Network, running_network

pytestmark = pytest.mark.chain

TIMEOUT_S = 60.0


class ScriptedCoordinator(coordination_pb2_grpc.NodeCoordinationServicer):
    """Sends what the test puts into `outbox`, keeps what the node sends in `received`."""

    def __init__(self) -> None:
        self.outbox: asyncio.Queue[coordination_pb2.AttachResponse | None] = asyncio.Queue()
        self.received: defaultdict[str, asyncio.Queue[Any]] = defaultdict(asyncio.Queue)
        self.attached = 0

    async def Attach(self, request_iterator: Any, context: Any) -> Any:  # type: ignore[override]
        self.attached += 1
        reading = asyncio.ensure_future(self._read(request_iterator))
        try:
            while (message := await self.outbox.get()) is not None:
                await context.write(message)
        finally:
            reading.cancel()

    async def _read(self, messages: Any) -> None:
        async for message in messages:
            body = message.WhichOneof("body")
            await self.received[body].put(getattr(message, body))

    async def next(self, body: str) -> Any:
        async with asyncio.timeout(TIMEOUT_S):
            return await self.received[body].get()


def offer(network: Network, plan: ShardPlan, epoch: int, deadline: int, **changed: Any) -> Any:
    values: dict[str, Any] = {
        "model_id": network.model_id,
        "publisher": bytes.fromhex(network.publisher.address[2:]),
        "epoch": epoch,
        "fee_per_token": FEE.to_bytes(16, "big"),
        "measurements_hash": b"\x05" * 32,
        "consent_deadline": deadline,
        "assignments": [
            common_pb2.Assignment(
                stage=item.stage,
                replica=item.replica,
                first_unit=item.first_unit,
                end_unit=item.end_unit,
                node=bytes.fromhex(item.node[2:]),
                work_weight=item.work_weight,
                execution_class=item.execution_class,
            )
            for item in plan.assignments
        ],
    }
    return coordination_pb2.AttachResponse(offer=coordination_pb2.PlanOffer(**{**values, **changed}))


async def test_node_attaches_reports_and_consents_only_to_what_it_can_do(tmp_path: Path) -> None:
    async with running_network(tmp_path) as network:
        coordinator = ScriptedCoordinator()
        server = grpc.aio.server()
        coordination_pb2_grpc.add_NodeCoordinationServicer_to_server(coordinator, server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        network.stack.push_async_callback(server.stop, 0)
        nonce = secrets.token_bytes(32)
        await coordinator.outbox.put(coordination_pb2.AttachResponse(challenge=coordination_pb2.Challenge(nonce=nonce)))
        _, ready = await network.start_node(
            "a", coordinator=f"127.0.0.1:{port}", profile_seconds=0.2, coordinator_backoff_seconds=0.1
        )
        hello = await coordinator.next("hello")
        proof = signing_digest(network.domains.registry, ATTACH_PROOF, (ready.node, nonce))
        assert is_signed_by(proof, hello.signature, ready.node)
        await coordinator.outbox.put(
            coordination_pb2.AttachResponse(
                welcome=coordination_pb2.Welcome(
                    heartbeat_interval_milliseconds=100, model_ids=[b"\x01" * 32, network.model_id]
                )
            )
        )
        first, second = await coordinator.next("heartbeat"), await coordinator.next("heartbeat")
        assert second.sequence == first.sequence + 1
        assert second.chain_head > 0
        message = await coordinator.next("measurements")
        measured = NodeMeasurements.from_message(message)
        assert measured.is_signed(network.domains.assignments, message.signature)
        assert measured.execution_class == execution_class_id(EXECUTION_CLASS)
        assert {timing.unit_kind for timing in measured.unit_timings} == {"embedding", "block", "head"}

        epoch = await network.client.call("ShardAssignments", "nextEpoch", network.model_id, network.publisher.address)
        deadline = (await network.client.head()).timestamp + 300
        units = len(network.manifest.units)
        good = ShardPlan(units, (Assignment(0, 0, 0, units, ready.node, 7, execution_class_id(EXECUTION_CLASS)),))
        await coordinator.outbox.put(offer(network, good, epoch, deadline))
        consent = await coordinator.next("consent")
        assert (consent.refusal, consent.plan_root) == ("", good.root)
        digest = signing_digest(
            network.domains.assignments,
            PLAN_CONSENT,
            (network.model_id, network.publisher.address, epoch, FEE, b"\x05" * 32, good.root, deadline),
        )
        assert is_signed_by(digest, consent.signature, ready.node)

        other_class = ShardPlan(units, (Assignment(0, 0, 0, units, ready.node, 7, b"\x09" * 32),))
        elsewhere = ShardPlan(
            units, (Assignment(0, 0, 0, units, network.publisher.address, 7, execution_class_id(EXECUTION_CLASS)),)
        )
        for bad, why in (
            (offer(network, good, epoch + 1, deadline), "next epoch"),
            (offer(network, good, epoch, deadline + 10**6), "deadline"),
            (offer(network, good, epoch, 5), "deadline"),
            (offer(network, other_class, epoch, deadline), "execution class"),
            (offer(network, elsewhere, epoch, deadline), "nothing to do"),
            (offer(network, good, epoch, deadline, model_id=b"\x01" * 32), "not in the node's cache"),
            (offer(network, good, epoch, deadline, model_id=b"short"), "malformed"),
            (offer(network, good, epoch, deadline, assignments=[]), "at least one assignment"),
        ):
            await coordinator.outbox.put(bad)
            consent = await coordinator.next("consent")
            assert why in consent.refusal, consent.refusal
            assert consent.signature == b""

        # The coordinator hangs up: the node comes back by itself.
        await coordinator.outbox.put(None)
        await coordinator.outbox.put(coordination_pb2.AttachResponse(challenge=coordination_pb2.Challenge(nonce=nonce)))
        await coordinator.next("hello")
        assert coordinator.attached == 2


async def test_node_reports_its_links_when_another_node_joins_and_signs_them_anew(tmp_path: Path) -> None:
    async with running_network(tmp_path) as network:
        coordinators = [ScriptedCoordinator(), ScriptedCoordinator()]
        nodes = []
        for name, coordinator in zip("ab", coordinators, strict=True):
            server = grpc.aio.server()
            coordination_pb2_grpc.add_NodeCoordinationServicer_to_server(coordinator, server)
            port = server.add_insecure_port("127.0.0.1:0")
            await server.start()
            network.stack.push_async_callback(server.stop, 0)
            challenge = coordination_pb2.Challenge(nonce=secrets.token_bytes(32))
            await coordinator.outbox.put(coordination_pb2.AttachResponse(challenge=challenge))
            _, ready = await network.start_node(
                name, coordinator=f"127.0.0.1:{port}", profile_seconds=0.1, link_report_seconds=0.1
            )
            nodes.append(ready.node)
            welcome = coordination_pb2.Welcome(heartbeat_interval_milliseconds=1_000, model_ids=[network.model_id])
            await coordinator.outbox.put(coordination_pb2.AttachResponse(welcome=welcome))
            if name == "a":
                alone = NodeMeasurements.from_message(await coordinator.next("measurements"))
                assert alone.links == ()
        reports = []
        for node, other, coordinator in zip(nodes, reversed(nodes), coordinators, strict=True):
            measured = alone
            while not measured.links:
                message = await coordinator.next("measurements")
                measured = NodeMeasurements.from_message(message)
                assert measured.is_signed(network.domains.assignments, message.signature)
            [link] = measured.links
            assert (measured.node, link.node) == (node, other)
            assert link.round_trip_nanoseconds < 10**9
            reports.append(measured)
        # The units of the first were timed once: only its link is new.
        assert reports[0].unit_timings == alone.unit_timings
        assert reports[0].measured_at >= alone.measured_at
