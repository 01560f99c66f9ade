"""What a publication does around the planner: announcements, documents too large for them, nodes left out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from structlog.testing import capture_logs

from bsns.chain.signer import KeySigner
from bsns.planning.published import plan_of_record
from bsns.protocol.identifiers import address, model_id
from bsns.protocol.measurements import LinkTiming, NodeMeasurements, UnitTiming
from bsns.protocol.typed_data import PLAN_CONSENT, assignments_domain, signing_digest
from bsns.v1 import coordination_pb2
from coordinator.dispatch import (
    NodePool,
    NodeStandings,
    PlanPolicy,
    PlanPublication,
    PoolLimits,
    PublicationLimits,
    plan_publication,
)
from coordinator.storage import Intent, Storage, migrate
from tests.integration.coordinator_fixtures import tiny_manifest
from tests.property.test_coordinator_follower import deployment_of
from tests.simulated_chain import GENESIS_TIME, SimulatedChain

_MANIFEST = tiny_manifest()
_MODEL = model_id(_MANIFEST.manifest_hash, _MANIFEST.weight_root, len(_MANIFEST.units))
_SENDER = address((1).to_bytes(20, "big"))
_DOMAIN = assignments_domain(31_337, address((2).to_bytes(20, "big")))
_KEYS = [KeySigner(number.to_bytes(32, "big")) for number in (1, 2, 3)]
_NOW = GENESIS_TIME + 100
_FEE = 5

_T = TypeVar("_T")


class _Outbox:
    """Keeps what is wanted; sends nothing."""

    sender = _SENDER

    def __init__(self) -> None:
        self.wanted: dict[str, Intent] = {}

    async def want(self, intent: Intent) -> bool:
        news = intent.key not in self.wanted
        self.wanted.setdefault(intent.key, intent)
        return news

    def named(self, function: str) -> list[Intent]:
        return [intent for intent in self.wanted.values() if intent.function == function]


class _Contracts:
    async def call(self, contract: str, function: str, *_: Any) -> int:
        assert (contract, function) == ("ShardAssignments", "nextEpoch")
        return 1


class _Situation:
    """A coordinator's database with a registered model and three measured, attached nodes."""

    def __init__(self, folder: Path, *, announced: bool) -> None:
        url = f"sqlite:///{folder / 'c.sqlite'}"
        migrate(url)
        self.storage = Storage(url)
        self.outbox = _Outbox()
        self.now = 10.0
        self.chain = SimulatedChain()
        self.is_blocking = False
        self.pool = NodePool(PoolLimits(), lambda: self.now)
        self.publication = PlanPublication(
            _MANIFEST,
            PlanPolicy(fee_per_token=_FEE),
            chain=_Contracts(),  # type: ignore[arg-type]
            storage=self.storage,
            pool=self.pool,
            outbox=self.outbox,  # type: ignore[arg-type]
            standings=NodeStandings(self.storage),
            assignments_domain=_DOMAIN,
            limits=PublicationLimits(gather_seconds=0.0),
            clock=lambda: self.now,
            run_blocking=self.run_blocking,
        )
        chain = self.chain
        registered = {
            "modelId": _MODEL,
            "registrant": _SENDER,
            "manifestHash": _MANIFEST.manifest_hash,
            "weightRoot": _MANIFEST.weight_root,
            "unitCount": len(_MANIFEST.units),
            "name": _MANIFEST.name,
        }
        events: list[Any] = [("ShardAssignments", "ModelRegistered", registered)]
        document = {"documentHash": _MANIFEST.manifest_hash, "document": _MANIFEST.to_bytes()}
        if announced:
            events.append(("ShardAssignments", "DocumentAnnounced", document))
        for key in _KEYS:
            arguments = {"node": key.address, "operator": _SENDER, "staked": 1, "activeFrom": 0}
            rest = {"certificateHash": bytes(32), "endpoint": "n:1"}
            events.append(("NodeRegistry", "NodeRegistered", {**arguments, **rest}))
            self.pool.attach(key.address)
            self.measure(key)
        chain.mine(events)
        self.storage.bind(deployment_of(chain))
        for content in chain._chain[1:]:
            self.storage.append_block(content.block, content.events)

    async def run_blocking(self, function: Callable[[], _T], /) -> _T:
        self.is_blocking = True
        try:
            return function()
        finally:
            self.is_blocking = False

    def measure(self, key: KeySigner, at: int = 1, **changes: Any) -> None:
        timings = tuple(UnitTiming(kind, 10**9, 10**9, 10**9, 10**9) for kind in ("embedding", "block", "head"))
        measurements = NodeMeasurements(_MODEL, key.address, at, bytes([1]) * 32, 10**9, timings)
        measurements = dataclasses.replace(measurements, **changes)
        self.storage.keep_measurements(measurements, key.sign_digest(measurements.signing_digest(_DOMAIN)))

    async def consent_of_all(self) -> None:
        """Every node signs what it was offered."""
        offer_of = self.publication.offer_for
        for key in _KEYS:
            message = offer_of(key.address)
            if message is None:
                continue
            offer = self.publication._offer
            assert offer is not None
            values = (_MODEL, _SENDER, offer.epoch, _FEE, offer.record.hash, offer.plan.root, offer.deadline)
            signature = key.sign_digest(signing_digest(_DOMAIN, PLAN_CONSENT, values))
            await self.publication.consent(
                key.address,
                coordination_pb2.PlanConsent(model_id=_MODEL, epoch=1, plan_root=offer.plan.root, signature=signature),
            )


@pytest.fixture
def situation(tmp_path: Path) -> Iterator[_Situation]:
    made = _Situation(tmp_path, announced=True)
    yield made
    made.storage.close()


async def test_published_plan_names_the_stored_record_that_was_announced_before_it(situation: _Situation) -> None:
    await situation.publication.step(_NOW)
    await situation.consent_of_all()
    await situation.publication.step(_NOW)
    announce, publish = situation.outbox.wanted.values()
    assert (announce.function, publish.function) == ("announce", "publishPlan")
    record = situation.storage.planning_record(publish.arguments[3])
    assert record is not None
    assert announce.arguments == (record.to_bytes(),)
    assert [item.measurements.node for item in record.measurements] == sorted(
        (key.address for key in _KEYS), key=lambda node: bytes.fromhex(node[2:])
    )
    plan = plan_of_record(record, _MANIFEST).to_shard_plan()
    assert publish.arguments[4] == tuple(item.as_tuple() for item in plan.assignments)


async def test_manifest_that_nobody_announced_is_announced_once(tmp_path: Path) -> None:
    situation = _Situation(tmp_path, announced=False)
    try:
        for _ in range(3):
            await situation.publication.step(_NOW)
        [announce] = situation.outbox.named("announce")
        assert announce.arguments == (_MANIFEST.to_bytes(),)
    finally:
        situation.storage.close()


async def test_record_too_large_to_announce_is_logged_with_its_command_and_the_plan_published(
    situation: _Situation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan_publication, "MAXIMUM_ANNOUNCED_BYTES", 64)
    with capture_logs() as logs:
        await situation.publication.step(_NOW)
        await situation.consent_of_all()
        await situation.publication.step(_NOW)
    [publish] = situation.outbox.wanted.values()
    assert publish.function == "publishPlan"
    advice = [line["advice"] for line in logs if line["event"] == "document_too_large_to_announce"]
    assert advice[0].endswith("hand out the manifest file")
    assert f"`bsns-coordinator record 0x{publish.arguments[3].hex()}`" in advice[1]


def _age(kind: str) -> UnitTiming:
    return UnitTiming(kind, 2**51, 1, 2**51, 1)


@pytest.mark.parametrize(
    ("extreme", "reason"),
    [
        ({"unit_timings": (UnitTiming("block", 1, 1, 1, 1),)}, "did not measure 'embedding'"),
        ({"unit_timings": tuple(map(_age, ("embedding", "block", "head")))}, "at most 2**52 can be planned"),
        ({"links": (LinkTiming(_KEYS[1].address, 2**60, 1),)}, "too slow to plan with"),
        ({"memory_bytes": 2**64 - 1}, "memory_bytes"),
    ],
)
async def test_node_whose_measurements_cannot_be_planned_with_is_left_out_and_holds_nobody_up(
    situation: _Situation, extreme: dict[str, Any], reason: str
) -> None:
    situation.measure(_KEYS[0], at=2, **extreme)
    with capture_logs() as logs:
        await situation.publication.step(_NOW)
    offer = situation.publication._offer
    assert offer is not None
    assert {item.measurements.node for item in offer.record.measurements} == {key.address for key in _KEYS[1:]}
    assert plan_of_record(offer.record, _MANIFEST).to_shard_plan() == offer.plan  # what an auditor does
    [left_out] = [line for line in logs if line["event"] == "node_left_out"]
    assert left_out["node"] == _KEYS[0].address
    assert reason in left_out["reason"]
    [offered] = [line for line in logs if line["event"] == "plan_offered"]
    assert {"solver", "objective", "value_nanoseconds", "lower_bound_nanoseconds", "ratio"} <= set(offered)


async def test_node_that_refuses_again_and_again_is_left_out_for_twice_as_long_each_time(situation: _Situation) -> None:
    pauses = []
    for _ in range(9):
        with capture_logs() as logs:
            while not any(line["event"] == "node_left_out" for line in logs):
                for key in _KEYS:
                    situation.pool.heartbeat(situation.pool.attach(key.address), coordination_pb2.Heartbeat())
                await situation.publication.step(_NOW)
                offer = situation.publication._offer
                if offer is not None and _KEYS[0].address in offer.nodes:
                    refusal = coordination_pb2.PlanConsent(model_id=_MODEL, epoch=1, refusal="no")
                    await situation.publication.consent(_KEYS[0].address, refusal)
                elif offer is not None:  # of the others, who say nothing
                    situation.publication._offer = None
                    situation.now += 30
        pauses += [line["seconds"] for line in logs if line["event"] == "node_left_out"]
    assert pauses == [60, 120, 240, 480, 960, 1_920, 3_600, 3_600, 3_600]


async def test_record_is_built_and_planned_beside_the_event_loop(
    situation: _Situation, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            seen.append((function.__name__, situation.is_blocking))
            return function(*arguments)

        return call

    for function in (plan_publication.planning_record, plan_publication.plan_of_record):
        monkeypatch.setattr(plan_publication, function.__name__, watched(function))
    await situation.publication.step(_NOW)
    assert seen == [("planning_record", True), ("plan_of_record", True)]


# ------------------------------------------------------------------------------------------------------ rebalancing

_LIMITS = PublicationLimits()


class _Serving:
    """A situation in which a plan over the first two nodes is in force, and the third comes to be known."""

    def __init__(self, situation: _Situation) -> None:
        self.situation = situation
        self.publication = situation.publication

    async def begin(self) -> None:
        situation = self.situation
        for attached in list(situation.pool.live().values()):
            if attached.node == _KEYS[2].address:
                situation.pool.detach(attached)
        await self.publication.step(_NOW)
        await situation.consent_of_all()
        await self.publication.step(_NOW)
        [publish] = situation.outbox.named("publishPlan")
        model, epoch, fee, record_hash, assignments, *_ = publish.arguments
        self.plan_id = bytes([epoch]) * 32
        values = {
            "planId": self.plan_id,
            "modelId": model,
            "publisher": _SENDER,
            "epoch": epoch,
            "root": bytes(32),
            "measurementsHash": record_hash,
            "feePerToken": fee,
            "effectiveAt": _NOW,
            "assignments": assignments,
        }
        situation.chain.mine([("ShardAssignments", "PlanPublished", values)])
        content = situation.chain._chain[-1]
        situation.storage.append_block(content.block, content.events)
        await self.publication.step(_NOW)
        assert self.publication._offer is None

    async def pass_time(self, seconds: float, *, present: int) -> None:
        """A step every five seconds, with the first nodes attached."""
        situation = self.situation
        for _ in range(int(seconds // 5)):
            situation.now += 5
            attached = situation.pool.live()
            for key in _KEYS[:present]:
                node = attached.get(key.address) or situation.pool.attach(key.address)
                situation.pool.heartbeat(node, coordination_pb2.Heartbeat())
            await self.publication.step(_NOW + int(situation.now - 10))


@pytest.fixture
async def serving(situation: _Situation) -> _Serving:
    made = _Serving(situation)
    await made.begin()
    return made


async def test_plan_that_serves_stays_while_nothing_changes(serving: _Serving) -> None:
    await serving.pass_time(600, present=2)
    assert serving.publication._offer is None
    assert serving.publication.waits_for is None


async def test_newcomer_is_taken_in_once_the_plan_stood_for_a_while(serving: _Serving) -> None:
    await serving.pass_time(_LIMITS.rebalance_after_seconds - 5, present=3)
    assert serving.publication._offer is None
    with capture_logs() as logs:
        await serving.pass_time(5 + _LIMITS.settle_seconds + 5, present=3)
    offer = serving.publication._offer
    assert offer is not None
    assert _KEYS[2].address in offer.nodes
    assert offer.record.rebalancing is not None
    assert offer.record.rebalancing.previous_plan == serving.plan_id
    [judged] = [line for line in logs if line["event"] == "plan_judged"]
    assert judged["trigger"] == "membership"


async def test_newcomer_that_goes_again_at_once_changes_nothing(serving: _Serving) -> None:
    await serving.pass_time(300, present=2)
    await serving.pass_time(_LIMITS.settle_seconds - 5, present=3)
    await serving.pass_time(60, present=2)
    assert serving.publication._offer is None


async def test_swarm_that_was_judged_is_not_judged_again_until_it_changes(serving: _Serving) -> None:
    # A node so slow that it is of no use.
    timings = tuple(UnitTiming(kind, 10**13, 10**13, 10**13, 10**13) for kind in ("embedding", "block", "head"))
    serving.situation.measure(_KEYS[2], at=2, unit_timings=timings)
    with capture_logs() as logs:
        await serving.pass_time(600, present=3)
    assert [line["change"] for line in logs if line["event"] == "plan_judged"] == ["stay"]
    assert serving.publication._offer is None
    serving.situation.measure(_KEYS[2], at=3)  # it was busy, and is not any more
    await serving.pass_time(60, present=3)
    assert serving.publication._offer is not None


async def test_node_that_became_slow_makes_the_plan_be_judged(serving: _Serving) -> None:
    timings = tuple(UnitTiming(kind, 4 * 10**9, 10**9, 10**9, 10**9) for kind in ("embedding", "block", "head"))
    serving.situation.measure(_KEYS[0], at=2, unit_timings=timings)
    with capture_logs() as logs:
        await serving.pass_time(300, present=2)
    [judged] = [line for line in logs if line["event"] == "plan_judged"]
    assert judged["trigger"] == "drift"


async def test_network_of_another_class_makes_the_plan_be_judged_once(serving: _Serving) -> None:
    serving.publication.network_class = 4
    with capture_logs() as logs:
        await serving.pass_time(300, present=2)
        assert not [line for line in logs if line["event"] == "plan_judged"]
        serving.publication.network_class = 5
        await serving.pass_time(300, present=2)
    [judged] = [line for line in logs if line["event"] == "plan_judged"]
    assert (judged["trigger"], judged["change"]) == ("drift", "stay")


async def test_change_that_a_node_refuses_is_given_up_and_nobody_left_out(serving: _Serving) -> None:
    await serving.pass_time(160, present=3)
    offer = serving.publication._offer
    assert offer is not None
    refusal = coordination_pb2.PlanConsent(model_id=_MODEL, epoch=1, refusal="no room beside its sessions")
    await serving.publication.consent(sorted(offer.nodes)[0], refusal)
    with capture_logs() as logs:
        await serving.pass_time(300, present=3)
    assert [line["event"] for line in logs if line["event"] in ("plan_change_given_up", "node_left_out")] == [
        "plan_change_given_up"
    ]
    assert serving.publication._offer is None
