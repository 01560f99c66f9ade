"""Measurements: one encoding, one hash, limits."""

from __future__ import annotations

import dataclasses

import pytest
from eth_abi.abi import encode
from hypothesis import given
from hypothesis import strategies as st

from bsns.chain.signer import KeySigner
from bsns.protocol.identifiers import ModelId, ProtocolError, address
from bsns.protocol.measurements import (
    MAXIMUM_CONTENT_BYTES,
    MAXIMUM_LINKS,
    MAXIMUM_UNIT_KIND_LENGTH,
    MAXIMUM_UNIT_KINDS,
    LinkTiming,
    NodeMeasurements,
    UnitTiming,
)
from bsns.protocol.typed_data import assignments_domain
from bsns.v1 import coordination_pb2

_ADDRESS = address((5).to_bytes(20, "big"))
_OTHER = address((6).to_bytes(20, "big"))
_SIZES = st.integers(1, 2**64 - 1)
_PRINTABLE = st.characters(codec="utf-8").filter(str.isprintable)
_NODES = st.binary(min_size=20, max_size=20).map(address).filter(lambda node: node != _ADDRESS)
_MEASUREMENTS = st.builds(
    NodeMeasurements,
    model=st.binary(min_size=32, max_size=32).map(ModelId),
    node=st.just(_ADDRESS),
    measured_at=_SIZES,
    execution_class=st.binary(min_size=32, max_size=32),
    memory_bytes=_SIZES,
    unit_timings=st.lists(
        st.builds(
            UnitTiming,
            st.text(
                st.characters(codec="utf-8").filter(str.isprintable), min_size=1, max_size=MAXIMUM_UNIT_KIND_LENGTH
            ),
            _SIZES,
            _SIZES,
            _SIZES,
            _SIZES,
        ),
        min_size=1,
        max_size=4,
        unique_by=lambda item: item.unit_kind,
    ).map(tuple),
    links=st.lists(
        st.builds(LinkTiming, _NODES, _SIZES, _SIZES),
        max_size=4,
        unique_by=lambda item: item.node,
    ).map(tuple),
)


_ABI = ["bytes32", "uint64", "string", "(uint64,uint64,uint64,uint64)[]", "(address,uint64,uint64)[]"]
_CONTENT = encode(_ABI, [bytes(32), 1, "block", [(1, 2, 3, 4)], []])


@given(measurements=_MEASUREMENTS)
def test_measurements_over_the_wire_and_in_any_order_have_one_content_hash(measurements: NodeMeasurements) -> None:
    message = coordination_pb2.Measurements.FromString(measurements.to_message(bytes(65)).SerializeToString())
    assert NodeMeasurements.from_message(message) == measurements
    turned = dataclasses.replace(
        measurements, unit_timings=measurements.unit_timings[::-1], links=measurements.links[::-1]
    )
    assert (turned, turned.content_hash) == (measurements, measurements.content_hash)


@given(measurements=_MEASUREMENTS)
def test_measurements_from_their_content_are_the_same(measurements: NodeMeasurements) -> None:
    again = NodeMeasurements.from_content(
        measurements.model, measurements.node, measurements.measured_at, measurements.content
    )
    assert again == measurements


@given(measurements=_MEASUREMENTS, data=st.data())
def test_measurements_from_a_content_that_was_changed_are_refused_or_others(
    measurements: NodeMeasurements, data: st.DataObject
) -> None:
    content = bytearray(measurements.content)
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    try:
        changed = NodeMeasurements.from_content(
            measurements.model, measurements.node, measurements.measured_at, bytes(content)
        )
    except ProtocolError:
        return
    assert (changed.content, changed == measurements) == (bytes(content), False)


def _largest() -> NodeMeasurements:
    kinds = [f"{number:04}".ljust(MAXIMUM_UNIT_KIND_LENGTH, "\U0001f40d") for number in range(MAXIMUM_UNIT_KINDS)]
    most = 2**64 - 1
    return _measurements(
        unit_timings=tuple(UnitTiming(kind, most, most, most, most) for kind in kinds),
        links=tuple(LinkTiming(address((99 + i).to_bytes(20, "big")), most, most) for i in range(MAXIMUM_LINKS)),
    )


def test_content_of_the_largest_measurements_is_within_its_limit_and_decodes() -> None:
    largest = _largest()
    assert MAXIMUM_CONTENT_BYTES - 8_192 < len(largest.content) <= MAXIMUM_CONTENT_BYTES
    again = NodeMeasurements.from_content(largest.model, largest.node, largest.measured_at, largest.content)
    assert again == largest


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "does not decode"),
        (bytes(31), "does not decode"),
        (_CONTENT + bytes(32), "canonical"),
        (_CONTENT[:-1], "does not decode"),
        (bytes(MAXIMUM_CONTENT_BYTES + 1), "at most"),
        (encode(_ABI, [bytes(32), 1, "b\na", [(1, 1, 1, 1)] * 2, []]), "canonical"),
        (encode(_ABI, [bytes(32), 1, "a\nb", [(1, 1, 1, 1)], []]), "names 2 unit kinds and times 1"),
        (encode(_ABI, [bytes(32), 1, "", [], []]), "names 1 unit kinds and times 0"),
        (encode(_ABI, [bytes(32), 1, "a", [(1, 1, 0, 1)], []]), "batched_decode_nanoseconds of 'a'"),
    ],
)
def test_measurements_from_content_that_nobody_would_write_are_refused(content: bytes, why: str) -> None:
    with pytest.raises(ProtocolError, match=why):
        NodeMeasurements.from_content(ModelId(bytes(32)), _ADDRESS, 1, content)


def _measurements(**changes: object) -> NodeMeasurements:
    values: dict[str, object] = {
        "model": bytes(32),
        "node": _ADDRESS,
        "measured_at": 1,
        "execution_class": bytes(32),
        "memory_bytes": 1,
        "unit_timings": (UnitTiming("block", 1, 1, 1, 1),),
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
        {"unit_timings": (UnitTiming("block", 1, 1, 1, 1), UnitTiming("block", 2, 2, 1, 1))},
        {"unit_timings": (UnitTiming("block", 0, 1, 1, 1),)},
        {"unit_timings": (UnitTiming("block", 1, 1, 1, 0),)},
        {"unit_timings": (UnitTiming("x" * 65, 1, 1, 1, 1),)},
        {"unit_timings": (UnitTiming("a\nb", 1, 1, 1, 1),)},
        {"unit_timings": tuple(UnitTiming(f"kind-{number}", 1, 1, 1, 1) for number in range(513))},
        {"links": (LinkTiming(_OTHER, 1, 1), LinkTiming(_OTHER, 2, 2))},
        {"links": (LinkTiming(_OTHER, 0, 1),)},
        {"links": (LinkTiming(_OTHER, 1, 0),)},
        {"links": (LinkTiming(_ADDRESS, 1, 1),)},
        {"links": tuple(LinkTiming(address((99 + i).to_bytes(20, "big")), 1, 1) for i in range(257))},
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
