"""The planning record: one encoding, one hash, and nothing but canonical bytes."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from eth_abi.abi import decode, encode
from hypothesis import given
from hypothesis import strategies as st

from bsns.chain.signer import KeySigner
from bsns.protocol import planning_record
from bsns.protocol.identifiers import ModelId, ProtocolError, address, keccak256
from bsns.protocol.measurements import LinkTiming, NodeMeasurements, UnitTiming
from bsns.protocol.planning_record import MAXIMUM_RECORD_BYTES, PlanningRecord, RebalancingTerms, SignedMeasurements
from bsns.protocol.typed_data import assignments_domain

_MODEL = ModelId(bytes([7]) * 32)
_DOMAIN = assignments_domain(31_337, address((5).to_bytes(20, "big")))
_REBALANCING = RebalancingTerms(bytes([3]) * 32, 600, 50_000_000, 500, 1_500)
_OTHER_TERMS: list[dict[str, Any]] = [
    {"previous_plan": bytes([4]) * 32},
    {"horizon_seconds": 601},
    {"load_bytes_per_second": 1},
    {"minimum_gain_bps": 0},
    {"minimum_drift_gain_bps": 0},
]
_BASIS_POINTS = st.integers(0, 2**32 - 1)
_TERMS = st.integers(1, 2**32 - 1), st.integers(1, 2**64 - 1), _BASIS_POINTS, _BASIS_POINTS


def _measured(number: int, *, model: ModelId = _MODEL, kinds: int = 2) -> SignedMeasurements:
    key = KeySigner(number.to_bytes(32, "big"))
    measurements = NodeMeasurements(
        model=model,
        node=key.address,
        measured_at=1_000 + number,
        execution_class=bytes(32),
        memory_bytes=10**9,
        unit_timings=tuple(UnitTiming(f"kind-{kind}", number, 2, 3, 4) for kind in range(kinds)),
        links=(LinkTiming(address(bytes([9]) * 20), 5, 6),),
    )
    return SignedMeasurements(measurements, key.sign_digest(measurements.signing_digest(_DOMAIN)))


def _record(**changes: Any) -> PlanningRecord:
    values: dict[str, Any] = {
        "planner": "bsns.planning",
        "planner_version": 2,
        "model": _MODEL,
        "objective": "throughput",
        "stage_count": None,
        "replicas": 1,
        "spread_leftover": True,
        "concurrent_sessions": 4,
        "session_tokens": 2_048,
        "transfers": "relayed",
        "seed": 0,
        "batch": 1,
        "prior_latency_ns": 25_000_000,
        "prior_bytes_per_second": 12_500_000,
        "measurements": tuple(_measured(number) for number in (1, 2, 3)),
        **changes,
    }
    return PlanningRecord(**values)


@given(
    stage_count=st.none() | st.integers(1, 32),
    replicas=st.integers(1, 2**16 - 1),
    spread=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
    rebalancing=st.none() | st.builds(RebalancingTerms, st.binary(min_size=32, max_size=32).filter(any), *_TERMS),
    numbers=st.lists(st.integers(1, 9), min_size=1, max_size=4, unique=True),
    kinds=st.integers(1, 5),
)
def test_record_of_any_terms_and_order_of_nodes_has_one_encoding_that_parses_back(
    stage_count: int | None,
    replicas: int,
    spread: bool,
    seed: int,
    rebalancing: RebalancingTerms | None,
    numbers: list[int],
    kinds: int,
) -> None:
    signed = tuple(_measured(number, kinds=kinds) for number in numbers)
    values = {
        "stage_count": stage_count,
        "replicas": replicas,
        "spread_leftover": spread,
        "seed": seed,
        "rebalancing": rebalancing,
    }
    record = _record(measurements=signed, **values)
    turned = _record(measurements=signed[::-1], **values)
    assert (record, record.to_bytes()) == (turned, turned.to_bytes())
    assert PlanningRecord.from_bytes(record.to_bytes()) == record
    assert record.hash == keccak256(record.to_bytes())


def test_record_encoding_is_the_one_in_the_documentation() -> None:
    record = _record(measurements=(_measured(1),))
    [signed] = record.measurements
    content = signed.measurements.content
    assert record.to_bytes() == encode(
        [
            "(string,uint32)",
            "bytes32",
            "string",
            "(uint16,uint16,bool,uint32,uint32,string)",
            "uint64",
            "uint32",
            "(uint64,uint64)",
            "(bytes32,uint32,uint64,uint32,uint32)",
            "(address,uint64,uint32)[]",
            "bytes",
            "bytes",
        ],
        [
            ("bsns.planning", 2),
            _MODEL,
            "throughput",
            (0, 1, True, 4, 2_048, "relayed"),
            0,
            1,
            (25_000_000, 12_500_000),
            (bytes(32), 0, 0, 0, 0),
            [(signed.measurements.node, 1_001, len(content))],
            content,
            signed.signature,
        ],
    )


def test_record_of_another_term_has_another_hash() -> None:
    base = _record()
    changes: list[dict[str, Any]] = [
        {"planner_version": 4},
        {"objective": "latency"},
        {"stage_count": 2},
        {"replicas": 2},
        {"spread_leftover": False},
        {"concurrent_sessions": 5},
        {"session_tokens": 5},
        {"transfers": "direct"},
        {"seed": 1},
        {"batch": 8},
        {"prior_latency_ns": 1},
        {"prior_bytes_per_second": 1},
        {"rebalancing": _REBALANCING},
        *({"rebalancing": dataclasses.replace(_REBALANCING, **change)} for change in _OTHER_TERMS),
        {"measurements": base.measurements[:2]},
    ]
    hashes = {_record(**change).hash for change in changes} | {base.hash}
    assert len(hashes) == len(changes) + 1


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"planner": ""}, "planner"),
        ({"planner": "x" * 33}, "planner"),
        ({"objective": "a\nb"}, "objective"),
        ({"transfers": "é"}, "transfers"),
        ({"model": b"short"}, "model id"),
        ({"model": ModelId(bytes(32))}, "another model"),
        ({"stage_count": 33}, "stage_count"),
        ({"replicas": 0}, "replicas"),
        ({"concurrent_sessions": 0}, "concurrent_sessions"),
        ({"session_tokens": 2**32}, "session_tokens"),
        ({"seed": 2**32}, "seed"),
        ({"batch": 0}, "batch"),
        ({"prior_latency_ns": -1}, "prior_latency_ns"),
        ({"prior_bytes_per_second": 0}, "prior_bytes_per_second"),
        ({"measurements": ()}, "number of nodes"),
        ({"measurements": (_measured(1), _measured(1))}, "twice"),
    ],
)
def test_record_out_of_range_is_refused_by_name(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ProtocolError, match=named):
        _record(**changes)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"previous_plan": bytes(32)}, "is zero"),
        ({"previous_plan": b"short"}, "previous plan id"),
        ({"horizon_seconds": 0}, "horizon_seconds"),
        ({"load_bytes_per_second": 0}, "load_bytes_per_second"),
        ({"minimum_gain_bps": -1}, "minimum_gain_bps"),
        ({"minimum_drift_gain_bps": -1}, "minimum_drift_gain_bps"),
    ],
)
def test_rebalancing_terms_out_of_range_are_refused_by_name(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ProtocolError, match=named):
        dataclasses.replace(_REBALANCING, **change)


def test_record_beyond_the_limits_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning_record, "MAXIMUM_RECORDED_NODES", 2)
    with pytest.raises(ProtocolError, match="number of nodes"):
        _record()
    monkeypatch.setattr(planning_record, "MAXIMUM_RECORD_BYTES", 512)
    with pytest.raises(ProtocolError, match="fewer nodes"):
        _record(measurements=(_measured(1),))
    with pytest.raises(ProtocolError, match="513 bytes"):
        PlanningRecord.from_bytes(bytes(513))


def test_from_bytes_of_anything_but_canonical_bytes_is_refused() -> None:
    data = _record().to_bytes()
    types = planning_record._RECORD_ABI
    values = list(decode(types, data))

    def changed(index: int, value: Any) -> bytes:
        return encode(types, [*values[:index], value, *values[index + 1 :]])

    longer = (*values[8][0][:2], values[8][0][2] - 32)
    wrong = {
        "empty": b"",
        "cut short": data[:-32],
        "longer": data + bytes(32),
        "nodes out of order": changed(8, values[8][::-1]),
        "a content that is longer than it says": changed(8, (longer, *values[8][1:])),
        "contents too long": changed(9, values[9] + bytes(32)),
        "signatures too short": changed(10, values[10][:-1]),
        "no nodes": encode(types, [*values[:8], [], b"", b""]),
        "terms of a change without a plan before": changed(7, (bytes(32), 600, 1, 1, 1)),
        "text that is not UTF-8": data.replace(b"bsns.planning", b"\xff" * 13),
        "a dirty pad": data[:-1] + b"\1",
    }
    for name, content in wrong.items():
        with pytest.raises(ProtocolError):
            pytest.fail(f"{name} was taken: {PlanningRecord.from_bytes(content)!r:.200}")


def test_from_bytes_of_any_record_with_one_byte_changed_never_gives_the_same_record() -> None:
    record = _record(measurements=(_measured(1),))
    data = record.to_bytes()
    for position in range(len(data)):
        mutated = data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]
        try:
            found = PlanningRecord.from_bytes(mutated)
        except ProtocolError:
            continue
        assert (found == record, found.to_bytes()) == (False, mutated), position


def test_record_of_a_count_without_content_is_refused_without_much_memory() -> None:
    values: list[Any] = [
        ("p", 1),
        _MODEL,
        "o",
        (0, 1, True, 1, 1, "t"),
        0,
        1,
        (0, 1),
        (bytes(32), 0, 0, 0, 0),
        [],
        b"",
        b"",
    ]
    data = bytearray(encode(planning_record._RECORD_ABI, values))
    nodes_at = int.from_bytes(data[13 * 32 : 14 * 32], "big")  # prior and rebalancing take seven words of the head
    data[nodes_at : nodes_at + 32] = (2**40).to_bytes(32, "big")
    with pytest.raises(ProtocolError):
        PlanningRecord.from_bytes(bytes(data))
    assert len(data) < MAXIMUM_RECORD_BYTES


def test_is_authentic_of_measurements_changed_after_signing_is_false() -> None:
    signed = _measured(1)
    assert signed.is_authentic(_DOMAIN)
    faster = dataclasses.replace(signed.measurements, memory_bytes=1)
    assert not SignedMeasurements(faster, signed.signature).is_authentic(_DOMAIN)
    with pytest.raises(ProtocolError, match="64 bytes"):
        SignedMeasurements(signed.measurements, signed.signature[:64])
