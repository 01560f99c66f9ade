"""The coordinator as a process against real contracts: plan, route, verdict, refund, and kill -9 in between."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from bsns.chain.deployment import Terms
from bsns.chain.submitter import Submitter
from bsns.protocol.contract_states import Phase, RequestStatus
from bsns.protocol.identifiers import ZERO_HASH, RequestId, model_id
from bsns.v1 import common_pb2, coordination_pb2, coordination_pb2_grpc
from coordinator.storage import IntentState, Storage
from tests.anvil import running_anvil
from tests.integration.coordinator_fixtures import (
    EXECUTION_CLASS,
    CoordinatorProcess,
    DeployedNetwork,
    Requester,
    ScriptedNode,
    deployed_network,
    eventually,
    tiny_manifest,
)

pytestmark = [pytest.mark.chain, pytest.mark.slow]

_SKETCH = bytes(range(32))
# Of one coordinator in one test; the last is followed by a run that is long enough for anything.
_KILLS = 8


def _terms(**verification: int) -> Terms:
    """Everybody verifies; short windows."""
    terms = Terms.for_devnet()
    changes = {"secret_window": 2, "attest_window": 600, "reveal_window": 600, "challenge_window": 2, **verification}
    return dataclasses.replace(
        terms,
        registry=dataclasses.replace(terms.registry, thaw_period=40_000),
        escrow=dataclasses.replace(terms.escrow, verification_window=20_000),
        verification=dataclasses.replace(terms.verification, **changes),
    )


@asynccontextmanager
async def _network(folder: Path, terms: Terms, *, nodes: int) -> AsyncIterator[tuple[Any, ...]]:
    """Anvil with a block a second, a coordinator process, attached nodes, a requester, an active plan."""
    async with running_anvil() as anvil, deployed_network(anvil, terms) as network:
        scripted = [await ScriptedNode.create(network) for _ in range(nodes)]
        await anvil.rpc("evm_setAutomine", False)
        await anvil.rpc("evm_setIntervalMining", 1)
        coordinator = CoordinatorProcess(
            network, folder, f"sqlite:///{folder / 'c.sqlite'}", minimum_nodes=nodes, stage_count=2
        )
        await coordinator.start()
        attachments = [asyncio.ensure_future(node.stay_attached(coordinator.endpoint)) for node in scripted]
        try:
            plan = await eventually(lambda: _active_plan(network, coordinator), f"a plan; see {coordinator.log}")
            requester = Requester(network, await anvil.funded_signer())
            yield network, coordinator, scripted, requester, plan
        finally:
            for attachment in attachments:
                attachment.cancel()
            await asyncio.gather(*attachments, return_exceptions=True)
            await coordinator.stop()


async def _active_plan(network: DeployedNetwork, coordinator: CoordinatorProcess) -> bytes | None:
    [model] = coordinator.ready["models"]
    publisher = network.publisher.address
    plan: bytes = await network.client.call("ShardAssignments", "activePlan", bytes.fromhex(model[2:]), publisher)
    return None if plan == ZERO_HASH else plan


async def _has_status(network: DeployedNetwork, request: RequestId, status: RequestStatus) -> bool:
    return bool((await network.client.call("InferenceEscrow", "requestOf", request)).status == status)


async def _in_phase(network: DeployedNetwork, request: RequestId, phase: Phase) -> bool:
    return bool((await network.client.call("OutputVerification", "verificationOf", request)).phase == phase)


async def _commit(network: DeployedNetwork, nodes: list[ScriptedNode], request: RequestId) -> list[ScriptedNode]:
    """Wait for the route, let the executors commit; returns them in stage order."""
    await eventually(lambda: _has_status(network, request, RequestStatus.ROUTED), "the route")
    stages = await network.client.call("InferenceEscrow", "stagesOf", request)
    executors = [next(node for node in nodes if node.node == stage.node) for stage in stages]
    for number, executor in enumerate(executors):
        await executor.commit_stage(request, number, sketch=_SKETCH)
    return executors


async def _verify(
    network: DeployedNetwork, nodes: list[ScriptedNode], executors: list[ScriptedNode], request: RequestId
) -> None:
    """Attest and reveal for everybody who is seated."""
    await eventually(lambda: _in_phase(network, request, Phase.ATTESTING), "the draw without the secret")
    seated: dict[str, list[int]] = {}
    for node in nodes:
        for stage in range(len(executors)):
            if await network.client.call("OutputVerification", "isSeated", request, stage, node.node):
                seated.setdefault(node.node, []).append(stage)
    members = [node for node in nodes if node.node in seated]
    for node in members:
        await node.attest(request, 1, seated[node.node], sketch=_SKETCH)
    await eventually(lambda: _in_phase(network, request, Phase.REVEALING), "the reveals")
    for stage, executor in enumerate(executors):
        await executor.reveal_stage(request, stage)
    for node in members:
        for stage in seated[node.node]:
            await node.reveal_attestation(request, 1, stage)


async def test_request_paid_and_verified_by_all_is_settled_by_the_coordinator(tmp_path: Path) -> None:
    async with _network(tmp_path, _terms(), nodes=4) as (network, coordinator, nodes, requester, plan):
        request = await requester.open(plan, 1)
        executors = await _commit(network, nodes, request)
        await _verify(network, nodes, executors, request)
        await eventually(lambda: _has_status(network, request, RequestStatus.SETTLED), "the settlement")
        assert await coordinator.stop() == 0
        await _assert_each_intent_once(network, tmp_path)


async def test_request_without_commitments_after_its_deadline_is_refunded_by_the_coordinator(tmp_path: Path) -> None:
    async with _network(tmp_path, _terms(), nodes=2) as (network, _, _, requester, plan):
        request = await requester.open(plan, 1)
        await eventually(lambda: _has_status(network, request, RequestStatus.ROUTED), "the route")
        await network.anvil.pass_time(network.terms.escrow.commit_window + 1)
        await eventually(lambda: _has_status(network, request, RequestStatus.REFUNDED), "the refund")


# A start takes seconds of computation, and a busy machine has several tests to share its cores among.
@pytest.mark.timeout(600)
async def test_coordinator_killed_again_and_again_finishes_what_was_open_and_sends_nothing_twice(
    tmp_path: Path,
) -> None:
    async with _network(tmp_path, _terms(), nodes=3) as (network, coordinator, nodes, requester, plan):
        requests = [await requester.open(plan, nonce) for nonce in range(3)]

        async def killer() -> None:
            pause = 0.15
            for _ in range(_KILLS):
                await coordinator.kill()
                await coordinator.start()
                # Longer each time, so that every part of the work is cut short once and then gets done.
                pause *= 1.6
                await asyncio.sleep(pause)

        killing = asyncio.ensure_future(killer())
        try:
            for request in requests:
                executors = await _commit(network, nodes, request)
                await _verify(network, nodes, executors, request)
            for request in requests:
                await eventually(lambda: _has_status(network, request, RequestStatus.SETTLED), "the settlement", 90)  # noqa: B023
            await killing  # it has raised nothing
        finally:
            killing.cancel()
            await asyncio.gather(killing, return_exceptions=True)
        await coordinator.stop()
        await _assert_each_intent_once(network, tmp_path)


async def _assert_each_intent_once(network: DeployedNetwork, folder: Path) -> None:
    """Every mined transaction of the publisher belongs to one intent, and every intent has at most one that
    succeeded.
    """
    storage = Storage(f"sqlite:///{folder / 'c.sqlite'}")
    try:
        records = storage.intents(list(IntentState), 10_000)
        used = Counter[str]()
        for record in records:
            for nonce in range(storage.next_nonce(network.publisher.address)):
                for transaction in storage.transactions(record.sequence, nonce):
                    receipt = await network.client.receipt(transaction.hash)
                    used[record.intent.key] += receipt is not None and receipt.succeeded
        assert used
        assert max(used.values()) == 1, used
        # The four deployments came from the same key.
        mined = await network.client.transaction_count(network.publisher.address, pending=False)
        assert mined == storage.next_nonce(network.publisher.address)
    finally:
        storage.close()


async def _attach_status(
    endpoint: str, *messages: coordination_pb2.AttachRequest, node: ScriptedNode | None = None
) -> grpc.StatusCode:
    async with grpc.aio.insecure_channel(endpoint) as channel:
        call: Any = coordination_pb2_grpc.NodeCoordinationStub(channel).Attach()
        challenge = (await call.read()).challenge
        if node is not None:
            await call.write(coordination_pb2.AttachRequest(hello=node.hello(challenge.nonce)))
        for message in messages:
            await call.write(message)
        async with asyncio.timeout(20):
            while True:
                try:
                    if await call.read() is grpc.aio.EOF:
                        break
                except grpc.aio.AioRpcError:
                    break
            return await call.code()


async def test_attach_with_wrong_words_is_refused_with_the_reason(tmp_path: Path) -> None:
    async with running_anvil() as anvil, deployed_network(anvil) as network:
        coordinator = CoordinatorProcess(network, tmp_path, f"sqlite:///{tmp_path / 'c.sqlite'}")
        await coordinator.start()
        try:
            endpoint = coordinator.endpoint
            stranger = ScriptedNode(network, await anvil.funded_signer(), await anvil.funded_signer())
            member = await ScriptedNode.create(network)
            heartbeat = coordination_pb2.AttachRequest(heartbeat=coordination_pb2.Heartbeat(sequence=1))
            assert await _attach_status(endpoint, heartbeat) == grpc.StatusCode.INVALID_ARGUMENT
            assert await _attach_status(endpoint, node=stranger) == grpc.StatusCode.PERMISSION_DENIED
            forged = coordination_pb2.AttachRequest(
                hello=coordination_pb2.Hello(node=bytes.fromhex(member.node[2:]), signature=bytes(65))
            )
            assert await _attach_status(endpoint, forged) == grpc.StatusCode.UNAUTHENTICATED

            async def synced() -> bool:
                # Silence after Hello: the coordinator gives the node up after three missed heartbeats.
                return await _attach_status(endpoint, node=member) == grpc.StatusCode.DEADLINE_EXCEEDED

            await eventually(synced, "the node known to the coordinator")
            again = coordination_pb2.AttachRequest(hello=coordination_pb2.Hello())
            assert await _attach_status(endpoint, again, node=member) == grpc.StatusCode.INVALID_ARGUMENT
            unsigned = member.measurements(b"\1" * 32)  # type: ignore[arg-type]
            unsigned.signature = bytes(65)
            message = coordination_pb2.AttachRequest(measurements=unsigned)
            assert await _attach_status(endpoint, message, node=member) == grpc.StatusCode.UNAUTHENTICATED
            large = coordination_pb2.AttachRequest(consent=coordination_pb2.PlanConsent(refusal="x" * 600_000))
            assert await _attach_status(endpoint, large, node=member) == grpc.StatusCode.RESOURCE_EXHAUSTED
        finally:
            assert await coordinator.stop() == 0


async def test_plan_offer_refused_by_one_node_is_made_to_the_others(tmp_path: Path) -> None:
    async with running_anvil() as anvil, deployed_network(anvil) as network:
        nodes = [await ScriptedNode.create(network, refuses=index == 0) for index in range(3)]
        await anvil.rpc("evm_setAutomine", False)
        await anvil.rpc("evm_setIntervalMining", 1)
        coordinator = CoordinatorProcess(
            network, tmp_path, f"sqlite:///{tmp_path / 'c.sqlite'}", minimum_nodes=2, stage_count=2
        )
        await coordinator.start()
        attachments = [asyncio.ensure_future(node.stay_attached(coordinator.endpoint)) for node in nodes]
        try:
            plan = await eventually(lambda: _active_plan(network, coordinator), "a plan without the refusing node")
            assert (await network.client.call("ShardAssignments", "planOf", plan)).stageCount == 2
            status = await _status(tmp_path)
            served = {item["node"] for item in status["plans"][0]["stages"]}
            assert served == {nodes[1].node, nodes[2].node}
        finally:
            for attachment in attachments:
                attachment.cancel()
            await asyncio.gather(*attachments, return_exceptions=True)
            assert await coordinator.stop() == 0


async def _status(folder: Path) -> dict[str, Any]:
    import sys

    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "coordinator.cli", "status", "--json"),
        *("--database-url", f"sqlite:///{folder / 'c.sqlite'}"),
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await process.communicate()
    assert process.returncode == 0
    status: dict[str, Any] = json.loads(output)
    return status


async def test_request_of_a_foreign_plan_is_left_alone_and_said_so(tmp_path: Path) -> None:
    async with _network(tmp_path, _terms(), nodes=2) as (network, coordinator, nodes, requester, plan):
        foreign = await requester.open(await _foreign_plan(network, nodes[0], requester), 1)
        own = await requester.open(plan, 2)
        await eventually(lambda: _has_status(network, own, RequestStatus.ROUTED), "the route of our own plan's request")
        assert await _has_status(network, foreign, RequestStatus.OPEN)
        assert f'"request_id": "0x{foreign.hex()}"' in coordinator.log.read_text()
        assert "somebody else's plan" in coordinator.log.read_text()


async def _foreign_plan(network: DeployedNetwork, node: ScriptedNode, publisher: Requester) -> bytes:
    """A plan that the requester publishes itself."""
    manifest = tiny_manifest("other")
    submitter = Submitter(network.client, publisher.key)
    units = len(manifest.units)
    await submitter.submit(
        "ShardAssignments", "registerModel", manifest.manifest_hash, manifest.weight_root, units, manifest.name
    )
    model = model_id(manifest.manifest_hash, manifest.weight_root, units)
    epoch = await network.client.call("ShardAssignments", "nextEpoch", model, publisher.key.address)
    deadline = (await network.client.head()).timestamp + 600
    offer = coordination_pb2.PlanOffer(
        model_id=model,
        publisher=bytes.fromhex(publisher.key.address[2:]),
        epoch=epoch,
        fee_per_token=(5).to_bytes(16, "big"),
        measurements_hash=bytes(32),
        consent_deadline=deadline,
        assignments=[
            common_pb2.Assignment(
                end_unit=units,
                node=bytes.fromhex(node.node[2:]),
                work_weight=1,
                execution_class=EXECUTION_CLASS,
            )
        ],
    )
    assignment = (0, 0, 0, units, node.node, 1, EXECUTION_CLASS)
    consents = [node.consent(offer).signature]
    await submitter.submit(
        "ShardAssignments", "publishPlan", model, epoch, 5, bytes(32), [assignment], deadline, consents
    )

    async def active() -> bytes | None:
        found: bytes = await network.client.call("ShardAssignments", "activePlan", model, publisher.key.address)
        return None if found == ZERO_HASH else found

    plan: bytes = await eventually(active, "the foreign plan")
    return plan
