"""The record's one canonical form: what it writes it reads, and it reads nothing else."""

from __future__ import annotations

import dataclasses
import json
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bsns.protocol import record as module
from bsns.protocol.identifiers import ZERO_HASH, address
from bsns.protocol.record import RecordError, VerificationRecord, differences

ADDRESSES = st.binary(min_size=20, max_size=20).map(address)


def values(kind: Any) -> st.SearchStrategy[Any]:
    """Values of an annotated field type."""
    if type(None) in get_args(kind):
        return st.none() | values(next(item for item in get_args(kind) if item is not type(None)))
    if dataclasses.is_dataclass(kind):
        hints = module._field_types(kind)
        return st.builds(kind, **{name: values(hint) for name, hint in hints.items()})  # type: ignore[call-overload]
    if getattr(kind, "__origin__", None) is tuple:
        return st.lists(values(get_args(kind)[0]), max_size=2).map(tuple)
    if hasattr(kind, "__metadata__"):
        size = kind.__metadata__[0]
        return st.binary(min_size=size, max_size=size) if kind.__origin__ is bytes else st.integers(0, 2**256 - 1)
    if kind is bool:
        return st.booleans()
    if kind is int:
        return st.integers(0, 2**53 - 1)
    return st.text(max_size=6) if kind is str else ADDRESSES


def records() -> st.SearchStrategy[VerificationRecord]:
    hints = dict(module._field_types(VerificationRecord))
    fixed = {"format": st.just(module.RECORD_FORMAT), "tokens": st.none(), "evidence": st.just(())}
    return st.builds(
        VerificationRecord, **{name: fixed[name] if name in fixed else values(hint) for name, hint in hints.items()}
    )


@given(records())
@settings(max_examples=25, deadline=None)
def test_record_reads_back_what_it_wrote(record: VerificationRecord) -> None:
    data = record.to_bytes()
    assert VerificationRecord.from_bytes(data) == record
    assert differences(record, VerificationRecord.from_bytes(data)) == []


@given(records(), st.data())
@settings(max_examples=60, deadline=None)
def test_record_with_any_byte_changed_is_refused_or_another_record(
    record: VerificationRecord, data: st.DataObject
) -> None:
    content = bytearray(record.to_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    try:
        changed = VerificationRecord.from_bytes(bytes(content))
    except RecordError:
        return
    assert changed != record
    assert differences(changed, record)
    assert changed.to_bytes() == bytes(content)


@given(
    st.binary(max_size=60)
    | st.recursive(st.none() | st.text(max_size=3) | st.floats() | st.integers(), st.lists).map(
        lambda value: json.dumps(value).encode()
    )
)
@settings(max_examples=100, deadline=None)
def test_record_of_rubbish_is_refused(data: bytes) -> None:
    with pytest.raises(RecordError):
        VerificationRecord.from_bytes(data)


@given(records(), st.data())
@settings(max_examples=40, deadline=None)
def test_record_with_a_field_of_another_type_is_refused_and_named(
    record: VerificationRecord, data: st.DataObject
) -> None:
    document = json.loads(record.to_bytes())
    section = data.draw(st.sampled_from(["domain", "as_of", "model", "plan", "request"]))
    field = data.draw(st.sampled_from(sorted(document[section])))
    before = document[section][field]
    after = data.draw(st.sampled_from([{}, [{}], True, -1, 1.5, "0X12", "٣", "0x", None]))
    if field == "nonce" and after is None:
        return
    if isinstance(before, str) and isinstance(after, str) and field == "name":
        return
    document[section][field] = after
    content = json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode() + b"\n"
    with pytest.raises(RecordError) as caught:
        VerificationRecord.from_bytes(content)
    assert f"{section}.{field}" in str(caught.value) or "1.5" in str(caught.value)


def test_record_refuses_what_json_alone_would_let_through() -> None:
    for data in (b"[" * 5_000, b'{"format":1}\n', b"NaN", b'{"a":1,"a":2}', b"\xff", b"1e999"):
        with pytest.raises(RecordError):
            VerificationRecord.from_bytes(data)


def test_differences_name_the_field_and_both_values() -> None:
    left = module.BlockReference(1, ZERO_HASH)
    (text,) = differences(left, module.BlockReference(2, ZERO_HASH), "as_of")
    assert text == "as_of.number: 1 in the record, 2 on chain"
    (text,) = differences((left,), (left, left), "blocks")
    assert text == "blocks: 1 entries in the record, 2 on chain"
    (text,) = differences(None, left, "draw")
    assert text == "draw: nothing in the record, BlockReference on chain"
