"""What a publication does around the planner: announcements, documents too large for them, nodes left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from structlog.testing import capture_logs

from bsns.chain.signer import KeySigner
from bsns.planning.published import plan_of_record
from bsns.protocol.identifiers import address, model_id
from bsns.protocol.measurements import NodeMeasurements, UnitTiming
from bsns.protocol.typed_data import PLAN_CONSENT, assignments_domain, signing_digest
from bsns.v1 import coordination_pb2
from coordinator.dispatch import NodePool, PlanPolicy, PlanPublication, PoolLimits, PublicationLimits, plan_publication
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


async def _here(function: Callable[[], _T], /) -> _T:
    return function()


class _Situation:
    """A coordinator's database with a registered model and three measured, attached nodes."""

    def __init__(self, folder: Path, *, announced: bool) -> None:
        url = f"sqlite:///{folder / 'c.sqlite'}"
        migrate(url)
        self.storage = Storage(url)
        self.outbox = _Outbox()
        self.pool = NodePool(PoolLimits(), lambda: 10.0)
        self.publication = PlanPublication(
            _MANIFEST,
            PlanPolicy(fee_per_token=_FEE),
            chain=_Contracts(),  # type: ignore[arg-type]
            storage=self.storage,
            pool=self.pool,
            outbox=self.outbox,  # type: ignore[arg-type]
            assignments_domain=_DOMAIN,
            limits=PublicationLimits(gather_seconds=0.0),
            clock=lambda: 10.0,
            run_blocking=_here,
        )
        chain = SimulatedChain()
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

    def measure(self, key: KeySigner, kinds: tuple[str, ...] = ("embedding", "block", "head"), at: int = 1) -> None:
        timings = tuple(UnitTiming(kind, 10**9, 10**9, 10**9, 10**9) for kind in kinds)
        measurements = NodeMeasurements(_MODEL, key.address, at, bytes([1]) * 32, 10**9, timings)
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


async def test_node_that_measured_only_part_of_the_model_is_left_out_and_holds_nobody_up(
    situation: _Situation,
) -> None:
    situation.measure(_KEYS[0], kinds=("block",), at=2)
    with capture_logs() as logs:
        await situation.publication.step(_NOW)
    offer = situation.publication._offer
    assert offer is not None
    assert {item.measurements.node for item in offer.record.measurements} == {key.address for key in _KEYS[1:]}
    [left_out] = [line for line in logs if line["event"] == "node_left_out"]
    assert left_out["node"] == _KEYS[0].address
    assert "every kind of unit" in left_out["reason"]
    [offered] = [line for line in logs if line["event"] == "plan_offered"]
    assert {"solver", "objective", "value_nanoseconds", "lower_bound_nanoseconds", "ratio"} <= set(offered)
