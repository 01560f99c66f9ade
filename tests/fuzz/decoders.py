"""Whatever reads bytes that strangers wrote, each with bytes that it takes and the errors that it says it raises."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, Phase, find, settings

from bsns.audit.block_report import _parse as parse_report
from bsns.chain.client import decode_contract_error
from bsns.chain.deployment import Deployment
from bsns.protocol.bounded_json import parse_json
from bsns.protocol.endpoints import split_endpoint
from bsns.protocol.identifiers import ProtocolError
from bsns.protocol.manifest import ManifestError, ModelManifest
from bsns.protocol.measurements import NodeMeasurements
from bsns.protocol.planning_record import PlanningRecord
from bsns.protocol.record import RecordError, VerificationRecord
from bsns.protocol.tabs import CollectedBatch, CollectedTicket, Segment, TicketGrant, Voucher, shares_of
from bsns.protocol.typed_data import recover
from bsns.requester.errors import JournalError
from bsns.requester.journal import Journal
from bsns.runtime.activation_codec import ActivationError, TensorEncoding, decode, encode
from bsns.runtime.program import Program, ProgramError
from bsns.v1 import coordination_pb2, tabs_pb2
from tests.fuzz.inputs import Decoder
from tests.property.test_protocol_tabs import REQUESTER, served, ticket
from tests.property.test_record_codec import records
from tests.unit.shape_manifests import TEXT, VISION
from tests.unit.test_planning_record import _measured, _record
from tests.unit.test_program import linear_program
from tests.unit.test_requester_journal import entry

_WIRE = (ProtocolError, DecodeError)


def decoders(folder: Path) -> list[Decoder]:
    """All of them; those that read files have them in `folder`."""
    tickets = (served(0, 4, [1, 1, 1]), served(1, 5, [1, 1, 1]))
    segment = Segment(REQUESTER.address, 0, 2, 15, 100, b"\6" * 32)
    batch = CollectedBatch(b"\1" * 32, REQUESTER.address, 7, 10**9, (segment,), shares_of(tickets, 7, 0), tickets)
    grant = TicketGrant(ticket(0), tuple(item.served_by for item in tickets[0].results), bytes(65))
    voucher = Voucher(REQUESTER.address, REQUESTER.address, 100, b"\6" * 32)
    signed = _measured(1)
    report = json.dumps(
        {"format": 3, "domain": {}, "first": {"number": 1}, "last": {"number": 2, "hash": "0x"}},
        sort_keys=True, separators=(",", ":"),
    )  # fmt: skip
    return [
        ("verification record", VerificationRecord.from_bytes, [a_record().to_bytes()], (RecordError,)),
        ("planning record", PlanningRecord.from_bytes, [_record().to_bytes()], (ProtocolError,)),
        ("manifest", ModelManifest.from_bytes, [TEXT.to_bytes(), VISION.to_bytes()], (ManifestError,)),
        ("program", Program.from_bytes, [linear_program().to_bytes()], (ProgramError,)),
        ("block report", parse_report, [report.encode() + b"\n"], (ValueError,)),
        ("JSON", parse_json, [b'{"a":[1,2,{"b":"c"}]}'], (ValueError,)),
        (
            "measurements",
            lambda data: NodeMeasurements.from_message(coordination_pb2.Measurements.FromString(data)),
            [signed.measurements.to_message(signed.signature).SerializeToString()],
            _WIRE,
        ),
        (
            "ticket with results",
            lambda data: CollectedTicket.from_message(tabs_pb2.CollectedTicket.FromString(data)),
            [tickets[0].to_message().SerializeToString()],
            _WIRE,
        ),
        (
            "ticket grant",
            lambda data: TicketGrant.from_message(tabs_pb2.TicketGrant.FromString(data)),
            [grant.to_message().SerializeToString()],
            _WIRE,
        ),
        (
            "voucher",
            lambda data: Voucher.from_message(tabs_pb2.Voucher.FromString(data)),
            [voucher.to_message().SerializeToString()],
            _WIRE,
        ),
        (
            "batch",
            lambda data: CollectedBatch.from_message(tabs_pb2.TicketBatch.FromString(data)),
            [batch.to_message().SerializeToString()],
            _WIRE,
        ),
        ("signature", lambda data: recover(b"\1" * 32, data), [REQUESTER.sign_digest(b"\1" * 32)], (ProtocolError,)),
        ("contract error", decode_contract_error, [bytes(4), b"\x08\xc3\x79\xa0" + bytes(64)], ()),
        ("endpoint", lambda data: split_endpoint(data.decode(errors="replace")), [b"[::1]:80", b"a:1"], (ValueError,)),
        ("journal entry", _journal(folder), [_journal_entry()], (JournalError,)),
        ("deployment", _deployment(folder), [_deployment_file()], (ValueError,)),
        *(_activations(encoding) for encoding in TensorEncoding),
    ]


def _activations(encoding: TensorEncoding) -> Decoder:
    tensor = torch.arange(2) if encoding is TensorEncoding.TOKEN_IDS else torch.ones(2, 128)
    return (
        f"activations {encoding.name}",
        lambda data: decode(encoding, data, rows=2, width=128, vocabulary_size=97),
        [encode(encoding, tensor)],
        (ActivationError,),
    )


def a_record() -> VerificationRecord:
    """Some record of the right shape."""
    return find(
        records(), lambda _record: True,
        settings=settings(database=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)),
    )  # fmt: skip


def _journal_entry() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        Journal(Path(folder)).write(entry())
        (file,) = (Path(folder) / "requests").iterdir()
        return file.read_bytes()


def _journal(folder: Path) -> Callable[[bytes], object]:
    journal, file = Journal(folder), folder / "requests" / f"0x{entry().request_id.hex()}.json"

    def read(data: bytes) -> object:
        file.write_bytes(data)
        return journal.read(entry().request_id)

    return read


def _deployment_file() -> bytes:
    one = "0x" + "11" * 20
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "deployment.json"
        Deployment(31337, one, one, one, one, one, one, 0).save(file)  # type: ignore[arg-type]
        return file.read_bytes()


def _deployment(folder: Path) -> Callable[[bytes], object]:
    file = folder / "deployment.json"

    def read(data: bytes) -> object:
        file.write_bytes(data)
        return Deployment.load(file)

    return read
