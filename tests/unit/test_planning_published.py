"""The one function that publisher and auditor share: what it refuses, and that no node makes a plan worse."""

from __future__ import annotations

import random

import pytest

from bsns.planning import PlanningError, published
from bsns.planning.published import PLANNER, PLANNER_VERSION, plan_of_record
from bsns.protocol.identifiers import ModelId, address
from bsns.protocol.measurements import LinkTiming, NodeMeasurements, UnitTiming
from bsns.protocol.planning_record import PlanningRecord, SignedMeasurements
from tests.integration.coordinator_fixtures import tiny_manifest

_MANIFEST = tiny_manifest()
_MODEL = ModelId(bytes(32))
_NODES = [address(bytes([number]) * 20) for number in range(1, 7)]
# Bytes of memory: for more than the model with its caches, and for three of its six units.
_WHOLE = 10**6
_HALF = 70_000


def _node(
    number: int, time: int, *, memory: int = _WHOLE, round_trip: int = 200, rate: int = 10**9
) -> SignedMeasurements:
    timings = tuple(UnitTiming(kind, time, time, time, time) for kind in ("embedding", "block", "head"))
    links = tuple(LinkTiming(other, round_trip, rate) for other in _NODES if other != _NODES[number])
    return SignedMeasurements(NodeMeasurements(_MODEL, _NODES[number], 1, bytes(32), memory, timings, links), bytes(65))


def _record(*nodes: SignedMeasurements, **changes: object) -> PlanningRecord:
    values: dict[str, object] = {
        "planner": PLANNER,
        "planner_version": PLANNER_VERSION,
        "model": _MODEL,
        "objective": "throughput",
        "stage_count": None,
        "replicas": 1,
        "spread_leftover": True,
        "concurrent_sessions": 4,
        "session_tokens": 128,
        "transfers": "relayed",
        "seed": 0,
        "batch": 1,
        "prior_latency_ns": 25_000_000,
        "prior_bytes_per_second": 12_500_000,
        "measurements": nodes,
    }
    return PlanningRecord(**{**values, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize("objective", ["throughput", "latency"])
@pytest.mark.parametrize("stage_count", [None, 1, 2])
@pytest.mark.parametrize("spread", [True, False])
def test_plan_with_a_slow_or_badly_linked_node_is_never_worse_than_without_it(
    objective: str, stage_count: int | None, spread: bool
) -> None:
    rng = random.Random(f"{objective} {stage_count} {spread}")
    for _ in range(4):
        memory = _WHOLE if stage_count == 1 else rng.choice((_WHOLE, _HALF))
        others = [_node(number, rng.randint(10**4, 10**5), memory=memory) for number in range(5)]
        slow = _node(5, 10**11)
        far = _node(5, 10**4, round_trip=10**15, rate=1)
        terms = {"objective": objective, "stage_count": stage_count, "spread_leftover": spread}
        alone = plan_of_record(_record(*others, **terms), _MANIFEST).value_ns
        assert plan_of_record(_record(*others, slow, **terms), _MANIFEST).value_ns <= alone
        assert plan_of_record(_record(*others, far, **terms), _MANIFEST).value_ns <= alone


@pytest.mark.parametrize("objective", ["throughput", "latency"])
def test_plan_takes_a_slow_node_only_where_the_others_lack_the_memory(objective: str) -> None:
    fast, slow = [_node(number, 10**4, memory=_HALF) for number in range(2)], _node(5, 10**8, memory=_HALF)
    enough = plan_of_record(_record(*fast, slow, objective=objective, spread_leftover=False), _MANIFEST)
    assert [node.node for node in enough.unused] == [_NODES[5]]
    needed = plan_of_record(_record(fast[0], slow, objective=objective), _MANIFEST)
    assert needed.unused == ()


@pytest.mark.parametrize("seed", [0, 2**32 - 1])
def test_plan_of_any_seed_that_a_record_takes_is_a_plan(seed: int) -> None:
    record = _record(*(_node(number, 10**4 + number) for number in range(6)), seed=seed)
    plan = plan_of_record(PlanningRecord.from_bytes(record.to_bytes()), _MANIFEST).to_shard_plan()
    assert plan.unit_count == len(_MANIFEST.units)


def test_plan_of_a_model_with_more_units_than_are_planned_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(published, "MAXIMUM_UNITS", len(_MANIFEST.units) - 1)
    with pytest.raises(PlanningError, match="6 units, at most 5"):
        plan_of_record(_record(_node(0, 1)), _MANIFEST)


@pytest.mark.parametrize("objective", ["throughput", "latency"])
def test_plan_over_nodes_that_claim_endless_memory_is_the_plan_for_enough_of_it(objective: str) -> None:
    plans = [
        plan_of_record(
            _record(*(_node(number, 10**4 + number, memory=memory) for number in range(6)), objective=objective),
            _MANIFEST,
        )
        for memory in (2**62, _WHOLE)
    ]
    assert plans[0].to_shard_plan() == plans[1].to_shard_plan()
