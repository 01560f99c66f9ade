"""Measurements: one encoding, one hash, limits."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bsns.chain.signer import KeySigner
from bsns.protocol.identifiers import ModelId, ProtocolError, address
from bsns.protocol.measurements import LinkTiming, NodeMeasurements, UnitTiming, measurements_hash
from bsns.protocol.typed_data import assignments_domain
from bsns.v1 import coordination_pb2

_ADDRESS = address((5).to_bytes(20, "big"))
_SIZES = st.integers(1, 2**64 - 1)
_MEASUREMENTS = st.builds(
    NodeMeasurements,
    model=st.binary(min_size=32, max_size=32).map(ModelId),
    node=st.binary(min_size=20, max_size=20).map(address),
    measured_at=_SIZES,
    execution_class=st.binary(min_size=32, max_size=32),
    memory_bytes=_SIZES,
    unit_timings=st.lists(
        st.builds(
            UnitTiming,
            st.text(st.characters(min_codepoint=97, max_codepoint=122), min_size=1, max_size=9),
            _SIZES,
            _SIZES,
        ),
        min_size=1,
        max_size=4,
        unique_by=lambda item: item.unit_kind,
    ).map(tuple),
    links=st.lists(
        st.builds(LinkTiming, st.binary(min_size=20, max_size=20).map(address), _SIZES, _SIZES),
        max_size=4,
        unique_by=lambda item: item.node,
    ).map(tuple),
)


@given(measurements=_MEASUREMENTS)
def test_measurements_over_the_wire_and_in_any_order_have_one_content_hash(measurements: NodeMeasurements) -> None:
    message = coordination_pb2.Measurements.FromString(measurements.to_message(bytes(65)).SerializeToString())
    assert NodeMeasurements.from_message(message) == measurements
    turned = dataclasses.replace(
        measurements, unit_timings=measurements.unit_timings[::-1], links=measurements.links[::-1]
    )
    assert (turned, turned.content_hash, turned.leaf) == (measurements, measurements.content_hash, measurements.leaf)


@given(first=_MEASUREMENTS, second=_MEASUREMENTS)
def test_measurements_hash_of_a_set_does_not_depend_on_its_order(
    first: NodeMeasurements, second: NodeMeasurements
) -> None:
    if first.node == second.node:
        with pytest.raises(ProtocolError, match="one node twice"):
            measurements_hash([first, second])
        return
    assert measurements_hash([first, second]) == measurements_hash([second, first])
    assert measurements_hash([first]) != measurements_hash([first, second])


def _measurements(**changes: object) -> NodeMeasurements:
    values: dict[str, object] = {
        "model": bytes(32),
        "node": _ADDRESS,
        "measured_at": 1,
        "execution_class": bytes(32),
        "memory_bytes": 1,
        "unit_timings": (UnitTiming("block", 1, 1),),
        **changes,
    }
    return NodeMeasurements(**values)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changes",
    [
        {"model": b"short"},
        {"execution_class": b""},
        {"memory_bytes": 0},
        {"measured_at": 2**64},
        {"unit_timings": ()},
        {"unit_timings": (UnitTiming("block", 1, 1), UnitTiming("block", 2, 2))},
        {"unit_timings": (UnitTiming("block", 0, 1),)},
        {"unit_timings": (UnitTiming("x" * 65, 1, 1),)},
        {"unit_timings": (UnitTiming("a\nb", 1, 1),)},
        {"unit_timings": tuple(UnitTiming(f"kind-{number}", 1, 1) for number in range(65))},
        {"links": (LinkTiming(_ADDRESS, 1, 1), LinkTiming(_ADDRESS, 2, 2))},
    ],
)
def test_measurements_out_of_range_are_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ProtocolError):
        _measurements(**changes)


def test_measurements_signature_is_the_nodes_over_the_content() -> None:
    key = KeySigner(bytes([7]) * 32)
    domain = assignments_domain(31_337, _ADDRESS)
    measured = _measurements(node=key.address)
    signature = key.sign_digest(measured.signing_digest(domain))
    assert measured.is_signed(domain, signature)
    assert not dataclasses.replace(measured, memory_bytes=2).is_signed(domain, signature)
    assert not dataclasses.replace(measured, node=_ADDRESS).is_signed(domain, signature)
    assert not measured.is_signed(assignments_domain(1, _ADDRESS), signature)


def test_measurements_hash_of_nothing_is_refused() -> None:
    with pytest.raises(ProtocolError):
        measurements_hash([])


def test_decode_nanoseconds_of_a_kind_not_measured_is_refused() -> None:
    assert _measurements().decode_nanoseconds("block") == 1
    with pytest.raises(ProtocolError, match="head"):
        _measurements().decode_nanoseconds("head")
