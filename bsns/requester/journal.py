"""What a requester must not lose: the secret, the salt and the input of every request it paid for.

Owns the state folder: one file a request, `requests/<request id>.json`, readable by its owner only, written whole and
synced to disk before the transaction that depends on it is sent. Promises that an entry read back equals the one
written, or JournalError. Does not talk to the chain.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, get_args

import structlog

from bsns.protocol.bounded_json import parse_json
from bsns.protocol.commitments import EvidenceStep
from bsns.protocol.identifiers import ProtocolError, RequestId, address
from bsns.protocol.sampling import SamplingError, SamplingParameters
from bsns.requester.errors import JournalError
from bsns.requester.request_input import RequestInput

JOURNAL_FORMAT: Final = 4
# Before requests could be paid out of tabs.
_TABLESS_FORMAT: Final = 3
# Written before answers had drafts, and before inputs could be anything but token ids; a request paid then can still be
# taken up.
_DRAFTLESS_FORMAT: Final = 2
_TOKENS_ONLY_FORMAT: Final = 1
MAXIMUM_ENTRIES_LISTED: Final = 10_000
_log = structlog.get_logger(__name__)

Stage = Literal["prepared", "opened", "answered", "drawn", "concluded"]
"""How far a request came: written down, on chain (or its ticket taken), answer received, committee drawn, settled or
refunded (or delivered to the collector).
"""


@dataclass(frozen=True, slots=True)
class StageEvidenceHeader:
    """What one executor said it computed: leaves under its root, and the sealed sketch of its commitment."""

    stage: int
    evidence_root: bytes
    sealed_sketch: bytes
    output_tokens: int
    steps: tuple[EvidenceStep, ...]


@dataclass(frozen=True, slots=True)
class TabEntry:
    """What a request that is paid out of a tab has besides. Messages of bsns.v1 as they were sent: the `grant`, once
    the collector took the ticket; for each stage by whom it is served now (`route`); the nodes' `results`.
    `voucher_secret` and `cumulative` (wei) are of the voucher that pays for it; `delivered` once the collector has it.
    """

    collector: str
    number: int
    deadline: int
    grant: bytes = b""
    route: tuple[bytes, ...] = ()
    results: tuple[bytes, ...] = ()
    voucher_secret: bytes = b""
    cumulative: int = 0
    delivered: bool = False


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """Everything of one request that is not on chain. Byte strings have 32 bytes."""

    request_id: RequestId
    chain_id: int
    escrow: str
    requester: str
    plan_id: bytes
    publisher: str
    nonce: int
    secret: bytes
    salt: bytes
    input: RequestInput
    sampling: SamplingParameters
    stop: tuple[str, ...]
    deposit: int
    created_at: int
    stage: Stage = "prepared"
    answer: tuple[int, ...] = ()
    drafts: tuple[tuple[int, ...], ...] = ()
    """For each step what the last stage drafted to follow the tokens it gave: its digests cover them."""
    text: str = ""
    finish_reason: str = ""
    evidence: tuple[StageEvidenceHeader, ...] = ()
    transactions: dict[str, str] = field(default_factory=dict)
    tab: TabEntry | None = None

    def with_transaction(self, name: str, transaction_hash: bytes, **changes: Any) -> JournalEntry:
        """A copy that also names a transaction."""
        transactions = {**self.transactions, name: f"0x{transaction_hash.hex()}"}
        return dataclasses.replace(self, transactions=transactions, **changes)


class Journal:
    """The entries under one folder, which is created for its owner only."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder / "requests"
        self._damaged: set[bytes] = set()
        try:
            self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise JournalError(
                f"cannot use {folder} to keep requests ({error.strerror}); give another --state-dir"
            ) from error

    def write(self, entry: JournalEntry) -> None:
        """Store `entry`, whole or not at all; on return it is on disk."""
        path = self._path(entry.request_id)
        part = path.with_suffix(f".{os.getpid()}.part")
        content = json.dumps({"format": JOURNAL_FORMAT, **_encode(entry)}, indent=1) + "\n"
        try:
            descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with os.fdopen(descriptor, "w") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
            folder = os.open(self._folder, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            with contextlib.suppress(OSError):
                part.unlink(missing_ok=True)
            raise JournalError(
                f"cannot write {path} ({error.strerror}); nothing was sent, make room and try again"
            ) from error

    def read(self, request_id: bytes) -> JournalEntry:
        """The entry of a request; JournalError if it is not known here or its file is damaged."""
        path = self._path(request_id)
        try:
            content = parse_json(path.read_bytes())
        except FileNotFoundError:
            raise JournalError(
                f"request 0x{request_id.hex()} is not in {self._folder}; give the state folder it was made with"
            ) from None
        except (OSError, ValueError) as error:
            raise JournalError(f"{path} cannot be read ({error}); restore it from a copy") from error
        try:
            return _decode(content)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise JournalError(
                f"{path} is damaged ({type(error).__name__}: {error}); restore it from a copy"
            ) from error

    def read_intact(self, request_id: bytes) -> JournalEntry | None:
        """As `read`, for whoever looks at all requests: None where the file is damaged, which is logged once, so that
        the others need not wait until somebody restores it.
        """
        try:
            return self.read(request_id)
        except JournalError as error:
            if request_id not in self._damaged:
                self._damaged.add(request_id)
                _log.error("journal_damaged", request=f"0x{request_id.hex()}", error=str(error))
            return None

    def entries(self) -> tuple[JournalEntry, ...]:
        """All requests of this folder, oldest first."""
        paths = sorted(self._folder.glob("0x*.json"))[:MAXIMUM_ENTRIES_LISTED]
        found = [self.read(bytes.fromhex(path.stem[2:])) for path in paths]
        return tuple(sorted(found, key=lambda item: (item.created_at, item.request_id)))

    def request_ids(self) -> list[RequestId]:
        """All requests of this folder, in no order; their entries are not read."""
        return [RequestId(bytes.fromhex(path.stem[2:])) for path in self._folder.glob("0x*.json")]

    def forget(self, request_id: bytes) -> None:
        """Remove an entry. Its secrets are nowhere else: only when nothing can be asked about it any more."""
        try:
            self._path(request_id).unlink(missing_ok=True)
        except OSError as error:
            raise JournalError(f"cannot remove {self._path(request_id)} ({error.strerror})") from error

    def _path(self, request_id: bytes) -> Path:
        return self._folder / f"0x{request_id.hex()}.json"


def _encode(value: Any) -> Any:
    if isinstance(value, bytes):
        return f"0x{value.hex()}"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: _encode(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, tuple | list):
        return [_encode(item) for item in value]
    return value


def _whole(value: Any) -> int:
    """`value`, a whole number as the journal writes them; a fraction would lose wei, so it is damage."""
    if type(value) is not int:
        raise ValueError(f"{value!r} is not a whole number")
    return value


def _decode(content: dict[str, Any]) -> JournalEntry:
    if content["format"] not in (JOURNAL_FORMAT, _TABLESS_FORMAT, _DRAFTLESS_FORMAT, _TOKENS_ONLY_FORMAT):
        raise ValueError(f"format {content['format']!r}, this release reads {JOURNAL_FORMAT}")
    if content["stage"] not in get_args(Stage):
        raise ValueError(f"unknown stage {content['stage']!r}")
    try:
        sampling = SamplingParameters(**content["sampling"])
        return JournalEntry(
            request_id=RequestId(_hash(content["request_id"])),
            chain_id=_whole(content["chain_id"]),
            escrow=address(content["escrow"]),
            requester=address(content["requester"]),
            plan_id=_hash(content["plan_id"]),
            publisher=address(content["publisher"]),
            nonce=_whole(content["nonce"]),
            secret=_hash(content["secret"]),
            salt=_hash(content["salt"]),
            input=_decode_input(content),
            sampling=sampling,
            stop=tuple(map(str, content["stop"])),
            deposit=_whole(content["deposit"]),
            created_at=_whole(content["created_at"]),
            stage=content["stage"],
            answer=tuple(map(_whole, content["answer"])),
            drafts=tuple(tuple(map(_whole, item)) for item in content.get("drafts", ())),
            text=str(content["text"]),
            finish_reason=str(content["finish_reason"]),
            evidence=tuple(_decode_evidence(item) for item in content["evidence"]),
            transactions={str(key): str(value) for key, value in content["transactions"].items()},
            tab=_decode_tab(content.get("tab")),
        )
    except (OverflowError, ProtocolError, SamplingError) as error:
        raise ValueError(str(error)) from error


def _decode_input(content: dict[str, Any]) -> RequestInput:
    if content["format"] == _TOKENS_ONLY_FORMAT:
        return RequestInput.of_tokens(tuple(map(_whole, content["prompt"])))
    found = content["input"]
    return RequestInput(found["encoding"], bytes.fromhex(found["data"].removeprefix("0x")))


def _decode_tab(content: dict[str, Any] | None) -> TabEntry | None:
    if content is None:
        return None

    def data(name: str) -> bytes:
        return bytes.fromhex(content[name].removeprefix("0x"))

    return TabEntry(
        collector=address(content["collector"]),
        number=_whole(content["number"]),
        deadline=_whole(content["deadline"]),
        grant=data("grant"),
        route=tuple(bytes.fromhex(item.removeprefix("0x")) for item in content["route"]),
        results=tuple(bytes.fromhex(item.removeprefix("0x")) for item in content["results"]),
        voucher_secret=data("voucher_secret"),
        cumulative=_whole(content["cumulative"]),
        delivered=bool(content["delivered"]),
    )


def _decode_evidence(content: dict[str, Any]) -> StageEvidenceHeader:
    def step_of(step: dict[str, Any]) -> EvidenceStep:
        names = [item.name for item in dataclasses.fields(EvidenceStep)]
        values: Any = [
            bytes.fromhex(step[name][2:]) if isinstance(step[name], str) else _whole(step[name]) for name in names
        ]
        return EvidenceStep(*values)

    return StageEvidenceHeader(
        _whole(content["stage"]),
        _hash(content["evidence_root"]),
        _hash(content["sealed_sketch"]),
        _whole(content["output_tokens"]),
        tuple(step_of(step) for step in content["steps"]),
    )


def _hash(text: str) -> bytes:
    value = bytes.fromhex(text.removeprefix("0x"))
    if len(value) != 32:
        raise ValueError(f"{text!r} is not 32 bytes")
    return value
