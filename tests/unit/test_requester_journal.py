"""The requester's journal keeps what a refund and a draw need."""

from __future__ import annotations

import dataclasses
import json
import stat
from pathlib import Path

import numpy as np
import pytest

from bsns.protocol.commitments import EvidenceBuilder
from bsns.protocol.identifiers import RequestId
from bsns.protocol.sampling import SamplingParameters
from bsns.requester import JournalError
from bsns.requester.journal import Journal, JournalEntry, StageEvidenceHeader
from bsns.requester.request_input import RequestInput


def entry(number: int = 1) -> JournalEntry:
    builder = EvidenceBuilder()
    builder.add(3, b"\1" * 32, b"\2" * 32, b"\3" * 8)
    header = StageEvidenceHeader(0, builder.finish().root, b"\4" * 32, 1, builder.steps)
    return JournalEntry(
        request_id=RequestId(number.to_bytes(32)),
        chain_id=31337,
        escrow="0x" + "11" * 20,
        requester="0x" + "22" * 20,
        plan_id=b"\5" * 32,
        publisher="0x" + "33" * 20,
        nonce=2**127 + 1,
        secret=b"\6" * 32,
        salt=b"\7" * 32,
        input=RequestInput.of_tokens((1, 2, 3)),
        sampling=SamplingParameters(temperature=0.7, top_p=0.9, seed=2**64 - 1, maximum_tokens=4),
        stop=("end",),
        deposit=10**18,
        created_at=100 - number,
        evidence=(header,),
    )


def test_journal_written_entry_reads_back_equal(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "state")
    written = entry().with_transaction("open", b"\xaa" * 32, stage="opened")
    journal.write(written)
    assert Journal(tmp_path / "state").read(written.request_id) == written


def test_journal_entry_with_a_row_of_values_reads_back_equal(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    row = np.random.default_rng(0).standard_normal((1, 1000), dtype=np.float32)
    written = dataclasses.replace(entry(), input=RequestInput.of_row(row))
    journal.write(written)
    assert journal.read(written.request_id) == written


def test_journal_entry_of_formats_without_drafts_and_with_token_ids_only_is_read(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.write(entry())
    (path,) = (tmp_path / "requests").iterdir()
    content = json.loads(path.read_text())
    del content["drafts"]
    path.write_text(json.dumps({**content, "format": 2}))
    assert journal.read(entry().request_id) == entry()
    del content["input"]
    path.write_text(json.dumps({**content, "format": 1, "prompt": [1, 2, 3]}))
    assert journal.read(entry().request_id) == entry()


def test_journal_files_are_readable_by_their_owner_only(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "state")
    journal.write(entry())
    folder = tmp_path / "state" / "requests"
    (path,) = folder.iterdir()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_journal_entries_come_oldest_first(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for number in (1, 2, 3):
        journal.write(entry(number))
    assert [item.created_at for item in journal.entries()] == [97, 98, 99]


def test_journal_unknown_request_says_where_it_looked(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match=r"is not in .*requests"):
        Journal(tmp_path).read(bytes(32))


@pytest.mark.parametrize("content", ["", "{}", '{"format": 2}', "[1]", "\x00"])
def test_journal_damaged_file_is_refused(tmp_path: Path, content: str) -> None:
    journal = Journal(tmp_path)
    journal.write(entry())
    (path,) = (tmp_path / "requests").iterdir()
    path.write_text(content)
    with pytest.raises(JournalError, match="restore it"):
        journal.read(entry().request_id)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ('"deposit": 1000000000000000000', '"deposit": 1e999'),
        ('"deposit": 1000000000000000000', '"deposit": 1e18'),
        ('"created_at": ', '"created_at": 1.5'),
        ('"data": "0x', '"data": 7, "rest": "0x'),
        ('"stop": [', '"stop": ' + "[" * 100),
    ],
)
def test_journal_field_of_another_kind_is_damage(tmp_path: Path, field: str, value: str) -> None:
    journal = Journal(tmp_path)
    journal.write(entry())
    (path,) = (tmp_path / "requests").iterdir()
    text = path.read_text()
    assert field in text
    path.write_text(text.replace(field, value))
    with pytest.raises(JournalError, match="restore it"):
        journal.read(entry().request_id)


def test_journal_damaged_file_keeps_nobody_from_the_others(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.write(entry())
    other = dataclasses.replace(entry(), request_id=RequestId(bytes(31) + b"\x02"))
    journal.write(other)
    (tmp_path / "requests" / f"0x{other.request_id.hex()}.json").write_text("{")
    assert {item: journal.read_intact(item) for item in journal.request_ids()} == {
        entry().request_id: entry(),
        other.request_id: None,
    }


def test_journal_rewrite_replaces_the_entry(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.write(entry())
    answered = dataclasses.replace(entry(), stage="answered", answer=(9,), drafts=((7, 8), ()), text="x")
    journal.write(answered)
    assert journal.read(entry().request_id) == answered
    assert len(list((tmp_path / "requests").iterdir())) == 1
