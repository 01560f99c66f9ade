"""`bsns audit plan` over an Anvil: a coordinator's own publication holds, every way to publish another plan is named.

The cheats are publishers made here, from the same parts: what they put on chain differs from what the coordinator would
have put there, and from nothing else.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bsns.audit import AuditError
from bsns.audit.plan import PlanAudit, audit_plan, show_plan
from bsns.chain.errors import ContractError
from bsns.chain.submitter import Submitter
from bsns.cli import app
from bsns.planning.published import decision_of_record, plan_of_record
from bsns.planning.rebalancing import Change
from bsns.protocol.identifiers import ZERO_HASH, address, keccak256, model_id, plan_id
from bsns.protocol.measurements import LinkTiming, NodeMeasurements
from bsns.protocol.plan import ShardPlan
from bsns.protocol.planning_record import MAXIMUM_ANNOUNCED_BYTES, PlanningRecord, SignedMeasurements
from bsns.protocol.typed_data import PLAN_CONSENT, assignments_domain, signing_digest
from coordinator.cli import app as coordinator_app
from coordinator.dispatch import PlanPolicy
from coordinator.dispatch.plan_publication import planning_record
from tests.anvil import running_anvil
from tests.integration.coordinator_fixtures import (
    CoordinatorProcess,
    DeployedNetwork,
    ScriptedNode,
    deployed_network,
    eventually,
    tiny_manifest,
)

pytestmark = [pytest.mark.chain]

_FEE = 10**12
_POLICY = PlanPolicy(fee_per_token=_FEE)
_MANIFEST = tiny_manifest()
_MODEL = model_id(_MANIFEST.manifest_hash, _MANIFEST.weight_root, len(_MANIFEST.units))


@dataclasses.dataclass
class _Publisher:
    """Publishes what it is told to, consents and all."""

    network: DeployedNetwork
    nodes: list[ScriptedNode]

    def measured(self, node: ScriptedNode, **changes: Any) -> SignedMeasurements:
        """What `node` measured, signed by it; `changes` before it signs."""
        honest = NodeMeasurements.from_message(node.measurements(_MODEL))
        # Links so fast that a stage of its own pays for every node.
        links = tuple(LinkTiming(address(other.node), 2, 10**15) for other in self.nodes if other is not node)
        return self.signed(node, dataclasses.replace(honest, **{"links": links, **changes}))

    def signed(self, node: ScriptedNode, measurements: NodeMeasurements) -> SignedMeasurements:
        deployment = self.network.deployment
        domain = assignments_domain(deployment.chain_id, deployment.shard_assignments)
        return SignedMeasurements(measurements, node.key.sign_digest(measurements.signing_digest(domain)))

    def record(self, nodes: Sequence[ScriptedNode] | None = None) -> PlanningRecord:
        return planning_record(_MODEL, [self.measured(node) for node in nodes or self.nodes], _POLICY)

    async def submit(self, function: str, *arguments: Any) -> None:
        await Submitter(self.network.client, self.network.publisher).submit("ShardAssignments", function, *arguments)

    async def register(self) -> None:
        units = len(_MANIFEST.units)
        await self.submit("registerModel", _MANIFEST.manifest_hash, _MANIFEST.weight_root, units, _MANIFEST.name)

    async def publish(self, plan: ShardPlan, measurements_hash: bytes) -> bytes:
        """Publish `plan` as the next epoch; returns its id."""
        client, deployment, publisher = self.network.client, self.network.deployment, self.network.publisher.address
        epoch = int(await client.call("ShardAssignments", "nextEpoch", _MODEL, publisher))
        deadline = (await client.head()).timestamp + 600
        domain = assignments_domain(deployment.chain_id, deployment.shard_assignments)
        values = (_MODEL, publisher, epoch, _FEE, measurements_hash, plan.root, deadline)
        digest = signing_digest(domain, PLAN_CONSENT, values)
        keys = {node.node: node.key for node in self.nodes}
        await self.submit(
            "publishPlan",
            _MODEL,
            epoch,
            _FEE,
            measurements_hash,
            [item.as_tuple() for item in plan.assignments],
            deadline,
            [keys[item.node].sign_digest(digest) for item in plan.assignments],
        )
        return plan_id(deployment.chain_id, deployment.shard_assignments, publisher, _MODEL, epoch)

    async def audit(self, plan: bytes, **files: bytes) -> PlanAudit:
        return await audit_plan(self.network.client, self.network.deployment, plan, **files)  # type: ignore[arg-type]


@asynccontextmanager
async def _publisher(
    *, nodes: int = 3, announced: Sequence[bytes] = (_MANIFEST.to_bytes(),)
) -> AsyncIterator[_Publisher]:
    """A registered model, nodes of different speed, and `announced` documents."""
    async with running_anvil() as anvil, deployed_network(anvil) as network:
        # Blocks at a time of their own would run ahead of the clock by which the nodes say when they measured.
        scripted = [await ScriptedNode.create(network, decode_nanoseconds=10**6 * (n + 1)) for n in range(nodes)]
        publisher = _Publisher(network, scripted)
        await publisher.register()
        for document in announced:
            await publisher.submit("announce", document)
        await anvil.pass_time(5)
        yield publisher


def _plan(record: PlanningRecord) -> ShardPlan:
    return plan_of_record(record, _MANIFEST).to_shard_plan()


def _first_difference(audit: PlanAudit) -> tuple[str, str]:
    assert not audit.holds
    return next((item.name, item.detail) for item in audit.checks if not item.ok)


# --------------------------------------------------------------------------------------------- a coordinator's own plan


@pytest.mark.slow
async def test_plan_that_a_coordinator_published_is_recomputed_from_the_chain_alone(tmp_path: Path) -> None:
    async with running_anvil() as anvil, deployed_network(anvil) as network:
        nodes = [await ScriptedNode.create(network, decode_nanoseconds=10**6 * (n + 1)) for n in range(3)]
        idle = await ScriptedNode.create(network)  # registered and never attached
        await anvil.rpc("evm_setAutomine", False)
        await anvil.rpc("evm_setIntervalMining", 1)
        database = f"sqlite:///{tmp_path / 'c.sqlite'}"
        coordinator = CoordinatorProcess(network, tmp_path, database, minimum_nodes=3)
        await coordinator.start()
        attachments = [asyncio.ensure_future(node.stay_attached(coordinator.endpoint)) for node in nodes]
        try:

            async def active_plan() -> bytes | None:
                arguments = (_MODEL, network.publisher.address)
                plan: bytes = await network.client.call("ShardAssignments", "activePlan", *arguments)
                return None if plan == ZERO_HASH else plan

            plan = await eventually(active_plan, f"a plan; see {coordinator.log}")
            audit = await audit_plan(network.client, network.deployment, plan)
            assert audit.holds, audit.checks
            assert audit.unrecorded == (idle.node,)
            assert audit.partition is not None
            assert {item.node for item in audit.assignments} <= {node.node for node in nodes}
            assert f"Left out     {idle.node}" in show_plan(audit)
        finally:
            for attachment in attachments:
                attachment.cancel()
            await asyncio.gather(*attachments, return_exceptions=True)
            assert await coordinator.stop() == 0
        log = [json.loads(line) for line in coordinator.log.read_text().splitlines() if line.startswith("{")]
        [offered] = [line for line in log if line["event"] == "plan_offered"]
        assert offered["solver"] == audit.partition.solver
        assert 0 < offered["lower_bound_nanoseconds"] <= offered["value_nanoseconds"] == audit.partition.value_ns
        await _assert_announced_before_the_plan(network, plan)
        await _assert_commands(network, tmp_path, database, plan)


async def _assert_announced_before_the_plan(network: DeployedNetwork, plan: bytes) -> None:
    head = (await network.client.head()).number
    [published] = await network.client.events_between(0, head, name="PlanPublished", filters={"planId": plan})
    announced = await network.client.events_between(0, head, name="DocumentAnnounced")
    places = {bytes(item.arguments["documentHash"]): (item.block_number, item.log_index) for item in announced}
    assert set(places) == {_MANIFEST.manifest_hash, bytes(published.arguments["measurementsHash"])}
    assert len(announced) == 2, "each once"
    assert max(places.values()) < (published.block_number, published.log_index)


async def _assert_commands(network: DeployedNetwork, folder: Path, database: str, plan: bytes) -> None:
    """What a person types: the audit, the record as a file, the audit with it, the coordinator's own recomputation."""
    deployment = ("--rpc", network.anvil.rpc_url, "--deployment", str(folder / "deployment.json"))
    command = ["audit", "plan", "0x" + plan.hex(), *deployment]

    async def bsns(*more: str) -> Any:
        return await asyncio.to_thread(CliRunner().invoke, app, [*command, *more])

    shown = await bsns()
    assert shown.exit_code == 0, shown.output
    assert "all hold" in shown.stdout
    document = json.loads((await bsns("--json")).stdout)
    assert document["holds"]
    assert document["computed"]["stages"][0]["first_unit"] == 0

    [stated] = await network.client.events_between(0, (await network.client.head()).number, name="PlanPublished")
    record_hash = "0x" + bytes(stated.arguments["measurementsHash"]).hex()
    written = CliRunner().invoke(coordinator_app, ["record", record_hash, "--database-url", database])
    assert written.exit_code == 0
    (folder / "record").write_bytes(written.stdout_bytes)
    files = ("--planning-record", str(folder / "record"), "--manifest", str(folder / "manifest.json"))
    assert (await bsns(*files)).exit_code == 0
    (folder / "record").write_bytes(written.stdout_bytes + b"\0")
    refused = await bsns(*files)
    assert refused.exit_code == 1
    assert "first difference: planning record: the planning record given has the hash" in refused.stdout

    arguments = ["plan", "--database-url", database, "--manifest", str(folder / "manifest.json"), "--json"]
    again = CliRunner().invoke(coordinator_app, [*arguments, "--measurements-hash", record_hash])
    assert json.loads(again.stdout)["root"] == "0x" + bytes(stated.arguments["root"]).hex()
    unknown = CliRunner().invoke(coordinator_app, ["record", "0x" + "11" * 32, "--database-url", database])
    assert (unknown.exit_code, "no planning record" in unknown.stderr) == (2, True)


# --------------------------------------------------------------------------------------------------------------- cheats


async def test_plan_of_its_record_holds_and_lists_active_nodes_that_were_left_out() -> None:
    async with _publisher() as publisher:
        record = publisher.record(publisher.nodes[:2])
        await publisher.submit("announce", record.to_bytes())
        audit = await publisher.audit(await publisher.publish(_plan(record), record.hash))
        assert audit.holds, audit.checks
        assert audit.unrecorded == (publisher.nodes[2].node,)
        assert audit.partition is not None
        assert audit.oldest_measured_at == min(item.measurements.measured_at for item in record.measurements)


def _swapped_nodes(plan: ShardPlan) -> ShardPlan:
    first, last = plan.assignments[0], plan.assignments[-1]
    assert first.node != last.node
    return ShardPlan(
        plan.unit_count,
        (
            dataclasses.replace(first, node=last.node),
            *plan.assignments[1:-1],
            dataclasses.replace(last, node=first.node),
        ),
    )


def _heavier_first_stage(plan: ShardPlan) -> ShardPlan:
    first = plan.assignments[0]
    heavier = dataclasses.replace(first, work_weight=first.work_weight + 1)
    return ShardPlan(plan.unit_count, (heavier, *plan.assignments[1:]))


def _only_the_first_node(plan: ShardPlan) -> ShardPlan:
    whole = dataclasses.replace(plan.assignments[0], first_unit=0, end_unit=plan.unit_count)
    return ShardPlan(plan.unit_count, (whole,))


@pytest.mark.parametrize(
    ("cheat", "check"),
    [
        (_swapped_nodes, "assignments"),
        (_heavier_first_stage, "work weights"),
        (_only_the_first_node, "assignments"),
    ],
)
async def test_plan_that_is_not_the_planners_fails_by_what_differs(
    cheat: Callable[[ShardPlan], ShardPlan], check: str
) -> None:
    async with _publisher() as publisher:
        record = publisher.record()
        await publisher.submit("announce", record.to_bytes())
        honest = _plan(record)
        plan = cheat(honest)
        audit = await publisher.audit(await publisher.publish(plan, record.hash))
        name, detail = _first_difference(audit)
        assert name == check
        assert "computed again" in detail
        failed = {item.name: item.detail for item in audit.checks if not item.ok}
        assert failed["root"] == f"the plan has 0x{plan.root.hex()}, computed again 0x{honest.root.hex()}"


async def test_plan_from_a_forged_measurement_names_the_node() -> None:
    async with _publisher() as publisher:
        honest = [publisher.measured(node) for node in publisher.nodes]
        faster = dataclasses.replace(honest[0].measurements, memory_bytes=10**12)
        forged = SignedMeasurements(faster, honest[0].signature)
        record = planning_record(_MODEL, [forged, *honest[1:]], _POLICY)
        await publisher.submit("announce", record.to_bytes())
        audit = await publisher.audit(await publisher.publish(_plan(record), record.hash))
        assert _first_difference(audit) == (
            "measurement signatures",
            f"the measurements of {publisher.nodes[0].node} are not signed by it",
        )


async def test_plan_from_measurements_of_the_future_names_the_node() -> None:
    async with _publisher() as publisher:
        honest = [publisher.measured(node) for node in publisher.nodes[1:]]
        tomorrow = publisher.measured(publisher.nodes[0], measured_at=int(time.time()) + 86_400)
        record = planning_record(_MODEL, [tomorrow, *honest], _POLICY)
        await publisher.submit("announce", record.to_bytes())
        name, detail = _first_difference(await publisher.audit(await publisher.publish(_plan(record), record.hash)))
        assert name == "measurement times"
        assert publisher.nodes[0].node in detail


async def test_plan_with_a_node_that_the_record_does_not_know_names_it() -> None:
    async with _publisher() as publisher:
        record = publisher.record(publisher.nodes[:2])
        await publisher.submit("announce", record.to_bytes())
        plan, stranger = _plan(record), publisher.nodes[2].node
        first = dataclasses.replace(plan.assignments[0], node=address(stranger))
        plan = ShardPlan(plan.unit_count, (first, *plan.assignments[1:]))
        name, detail = _first_difference(await publisher.audit(await publisher.publish(plan, record.hash)))
        assert name == "assigned nodes"
        assert stranger in detail


async def test_plan_that_replaces_another_is_judged_with_it_and_says_why() -> None:
    async with _publisher() as publisher:
        first = publisher.record(publisher.nodes[:2])
        await publisher.submit("announce", first.to_bytes())
        before = await publisher.publish(_plan(first), first.hash)

        def following(nodes: list[ScriptedNode], previous: bytes | None) -> PlanningRecord:
            return planning_record(_MODEL, [publisher.measured(node) for node in nodes], _POLICY, previous)

        async def published(record: PlanningRecord, plan: ShardPlan) -> PlanAudit:
            await publisher.submit("announce", record.to_bytes())
            return await publisher.audit(await publisher.publish(plan, record.hash))

        grown = following(publisher.nodes, before)
        decision = decision_of_record(grown, _MANIFEST, _plan(first))
        assert decision.change is not Change.STAY
        audit = await published(grown, decision.partition.to_shard_plan())
        assert audit.holds, audit.checks
        assert audit.decision == decision
        assert "nodes had come or gone" in show_plan(audit)
        assert audit.summary()["rebalancing"]["trigger"] == "membership"

        # Nothing has changed since: no record justifies another plan.
        audit = await published(following(publisher.nodes, audit.plan_id), _plan(first))
        assert _first_difference(audit)[0] == "recomputed plan"
        assert "should have stayed" in _first_difference(audit)[1]
        # As if there had been no plan before, or another one than there was.
        for named in (None, before):
            audit = await published(following(publisher.nodes, named), _plan(publisher.record()))
            assert _first_difference(audit)[0] == "plan before"


async def test_plan_whose_documents_nobody_announced_fails_with_what_to_ask_for() -> None:
    async with _publisher(announced=()) as publisher:
        record = publisher.record()
        plan = await publisher.publish(_plan(record), record.hash)
        audit = await publisher.audit(plan)
        name, detail = _first_difference(audit)
        assert (name, "--manifest" in detail) == ("manifest", True)
        missing = {item.name: item.detail for item in audit.checks if not item.ok}
        assert f"bsns-coordinator record 0x{record.hash.hex()}" in missing["planning record"]
        files = {"manifest": _MANIFEST.to_bytes(), "planning_record": record.to_bytes()}
        assert (await publisher.audit(plan, **files)).holds
        # A document may come at any time.
        await publisher.submit("announce", record.to_bytes())
        assert (await publisher.audit(plan, manifest=_MANIFEST.to_bytes())).holds


async def test_plan_whose_hash_stands_for_something_else_fails_with_what_it_is() -> None:
    async with _publisher() as publisher:
        record = publisher.record()
        other = dataclasses.replace(record, planner_version=record.planner_version + 1)
        elsewhere = tiny_manifest("other").to_bytes()
        for document in (b"no record", other.to_bytes(), elsewhere):
            await publisher.submit("announce", document)
        plan = _plan(record)
        for hash_, check, said in (
            (other.hash, "recomputed plan", "take the release that published the plan"),
            (keccak256(b"no record"), "planning record", "no planning record"),
            (keccak256(elsewhere), "planning record", "no planning record"),
        ):
            name, detail = _first_difference(await publisher.audit(await publisher.publish(plan, hash_)))
            assert name == check
            assert said in detail
        wrong = {"manifest": elsewhere, "planning_record": record.to_bytes()}
        audit = await publisher.audit(await publisher.publish(plan, record.hash), **wrong)
        assert _first_difference(audit)[0] == "manifest"


async def test_audit_of_a_plan_that_is_not_there_says_so() -> None:
    async with _publisher() as publisher:
        with pytest.raises(AuditError, match="there is no such plan"):
            await publisher.audit(bytes(32))


async def test_announce_takes_exactly_what_the_protocol_says() -> None:
    async with _publisher() as publisher:
        await publisher.submit("announce", b"\xff" * MAXIMUM_ANNOUNCED_BYTES)
        with pytest.raises(ContractError, match="DocumentTooLarge"):
            await publisher.submit("announce", b"\xff" * (MAXIMUM_ANNOUNCED_BYTES + 1))
