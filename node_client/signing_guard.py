"""The signing guard: what keeps a node from ever signing two different things for one duty.

Owns one SQLite file beside the keys. Promises (SIGN-01): of all processes that use the same file, at most one digest
per duty (kind, request, stage, position) is ever permitted; the same digest is permitted again, so that a crash
between permission and sending loses nothing. Check and insert are one exclusive transaction, written through to the
disk before `permit` returns. It cannot help when the file is deleted, restored from an old copy, or when the same key
runs elsewhere with another file: move the history with `export_history` and `import_history` before moving a key, and
never run one key twice.
"""

from __future__ import annotations

import enum
import json
import os
import sqlite3
import threading
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, Final

from node_client.errors import SigningRefusedError, StorageError, StorageFullError

HISTORY_FORMAT: Final = 1
MAXIMUM_HISTORY_BYTES: Final = 256 * 1024 * 1024
_BUSY_SECONDS: Final = 10.0


class DutyKind(enum.StrEnum):
    """What is signed. `position` of a duty is the round for commitments and attestations, the step for hand-overs."""

    COMMITMENT = "commitment"
    ATTESTATION = "attestation"
    HAND_OVER_RECEIVED = "hand-over-received"
    HAND_OVER_SENT = "hand-over-sent"


class SigningGuard:
    """Opened on one file; safe to call from several threads and several processes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock = threading.Lock()
        try:
            if not path.exists():
                os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
            self._database = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
            self._database.execute("PRAGMA journal_mode=WAL")
            self._database.execute("PRAGMA synchronous=FULL")
            self._database.execute(
                "CREATE TABLE IF NOT EXISTS signed (kind TEXT NOT NULL, request BLOB NOT NULL, stage INTEGER NOT NULL,"
                " position INTEGER NOT NULL, digest BLOB NOT NULL, PRIMARY KEY (kind, request, stage, "
                "position)) WITHOUT ROWID"
            )
        except (sqlite3.Error, OSError) as error:
            raise StorageError(
                f"signing guard {path} cannot be opened: {error}; without it the node must not sign"
            ) from error

    def close(self) -> None:
        # As in the evidence store: other threads may be at it.
        with self._lock:
            self._database.close()

    def permit(self, kind: DutyKind, request: bytes, stage: int, position: int, digest: bytes) -> None:
        """Return if `digest` (32 bytes) may be signed for this duty, having recorded it.

        Raises SigningRefusedError where another digest is on record, StorageError where the record cannot be made.
        """
        with self._lock, _storage_errors(self._path):
            self._database.execute("BEGIN EXCLUSIVE")
            try:
                self._insert(str(kind), request, stage, position, digest)
                self._database.execute("COMMIT")
            except BaseException:
                # A failed COMMIT (disk full) may already have rolled back.
                with suppress(sqlite3.OperationalError):
                    self._database.execute("ROLLBACK")
                raise

    def has_signed(self, request: bytes, stage: int) -> bool:
        """Whether anything was ever permitted for this stage of this request."""
        with self._lock, _storage_errors(self._path):
            row = self._database.execute(
                "SELECT 1 FROM signed WHERE request = ? AND stage = ? AND kind != ? LIMIT 1",
                (request, stage, str(DutyKind.ATTESTATION)),
            ).fetchone()
        return row is not None

    def export_history(self) -> dict[str, Any]:
        """Everything on record, as a JSON document for `import_history` of another file."""
        with self._lock, _storage_errors(self._path):
            rows = self._database.execute(
                "SELECT kind, request, stage, position, digest FROM signed ORDER BY request, stage, kind, position"
            ).fetchall()
        return {
            "format": HISTORY_FORMAT,
            "signed": [
                {"kind": kind, "request": request.hex(), "stage": stage, "position": position, "digest": digest.hex()}
                for kind, request, stage, position, digest in rows
            ],
        }

    def import_history(self, document: dict[str, Any]) -> int:
        """Add another guard's history; returns how many duties it holds. All or nothing.

        Raises SigningRefusedError if the two histories disagree, StorageError if the document is not a history.
        """
        if document.get("format") != HISTORY_FORMAT:
            raise StorageError(
                f"not a signing history of format {HISTORY_FORMAT}; export it with `bsns-node keys export-history`"
            )
        try:
            entries = [
                (
                    str(DutyKind(entry["kind"])),
                    _bytes32(entry["request"]),
                    int(entry["stage"]),
                    int(entry["position"]),
                    _bytes32(entry["digest"]),
                )
                for entry in document["signed"]
            ]
        except (KeyError, TypeError, ValueError) as error:
            raise StorageError(f"signing history is damaged: {error!r}; export it again") from error
        with self._lock, _storage_errors(self._path):
            self._database.execute("BEGIN EXCLUSIVE")
            try:
                for entry in entries:
                    self._insert(*entry)
                self._database.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.OperationalError):
                    self._database.execute("ROLLBACK")
                raise
        return len(entries)

    def _insert(self, kind: str, request: bytes, stage: int, position: int, digest: bytes) -> None:
        key = (kind, request, stage, position)
        with closing(
            self._database.execute(
                "SELECT digest FROM signed WHERE kind = ? AND request = ? AND stage = ? AND position = ?", key
            )
        ) as cursor:
            row = cursor.fetchone()
        if row is None:
            self._database.execute("INSERT INTO signed VALUES (?, ?, ?, ?, ?)", (*key, digest))
        elif row[0] != digest:
            raise SigningRefusedError(
                f"refusing to sign a second {kind} for request 0x{request.hex()} stage {stage} position {position}: "
                "another digest is on record, and two signatures would cost the whole stake"
            )


class _storage_errors:
    def __init__(self, path: Path) -> None:
        self._path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, sqlite3.Error):
            full = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL
            raised = StorageFullError if full else StorageError
            raise raised(f"signing guard {self._path} cannot be used ({error}); nothing was signed") from error


def _bytes32(text: str) -> bytes:
    value = bytes.fromhex(text)
    if len(value) != 32:
        raise ValueError(f"expected 32 bytes, got {len(value)}")
    return value


def read_history(path: Path) -> dict[str, Any]:
    """A history document from a file; StorageError if it cannot be one."""
    try:
        if path.stat().st_size > MAXIMUM_HISTORY_BYTES:
            raise StorageError(f"{path} is larger than {MAXIMUM_HISTORY_BYTES} bytes: not a signing history")
        document = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise StorageError(f"signing history {path} cannot be read: {error}") from error
    if not isinstance(document, dict):
        raise StorageError(f"{path} is not a signing history")
    return document
