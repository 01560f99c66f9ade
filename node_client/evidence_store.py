"""What a node must be able to show later: the evidence of the stages it executed and of the attestations it made.

Owns one SQLite file. Promises that what `seal` and `save_attestation` return from is on the disk (write-ahead log,
synchronous FULL), so that a commitment sent afterwards can still be opened after kill -9; and that the bytes kept
never exceed the budget. Keeps for each stage the step leaves, the exact bytes that came in and went out, the
sealed result with its salt, the opening of the input commitment and the newest statement of each neighbour, until
`forget`; and the contradictions of others, until they are reported. Prompts are in here and nowhere else on disk: the
file is readable by its owner only. Does not decide when a dispute is over.
"""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bsns.protocol.commitments import EvidenceStep, StageEvidence, sealed_sketch, stage_commitment
from bsns.protocol.hand_over import Contradiction, Statement
from bsns.protocol.identifiers import BYTES32, RequestId
from bsns.protocol.sampling import SamplingParameters
from node_client.errors import StorageError, StorageFullError

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS stage (
  request BLOB NOT NULL, stage INTEGER NOT NULL,
  prompt_digest BLOB NOT NULL, prompt_tokens INTEGER NOT NULL, salt BLOB NOT NULL,
  temperature REAL NOT NULL, top_k INTEGER NOT NULL, top_p REAL NOT NULL, seed BLOB NOT NULL,
  maximum_tokens INTEGER NOT NULL,
  evidence_root BLOB, sketch BLOB, seal_salt BLOB, output_tokens INTEGER,
  opened_at INTEGER NOT NULL,
  PRIMARY KEY (request, stage)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS step (
  request BLOB NOT NULL, stage INTEGER NOT NULL, step INTEGER NOT NULL,
  position INTEGER NOT NULL, rows INTEGER NOT NULL,
  input_digest BLOB NOT NULL, output_digest BLOB NOT NULL, input_chain BLOB NOT NULL, output_chain BLOB NOT NULL,
  fingerprint BLOB NOT NULL, encoding INTEGER NOT NULL, input BLOB NOT NULL,
  PRIMARY KEY (request, stage, step)
);
CREATE TABLE IF NOT EXISTS output (
  request BLOB NOT NULL, stage INTEGER NOT NULL, step INTEGER NOT NULL, payload BLOB NOT NULL,
  PRIMARY KEY (request, stage, step)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS statement (
  request BLOB NOT NULL, stage INTEGER NOT NULL, about INTEGER NOT NULL, sent INTEGER NOT NULL, step INTEGER NOT NULL,
  chain BLOB NOT NULL, signature BLOB NOT NULL,
  PRIMARY KEY (request, stage, about, sent)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS replacement (
  request BLOB NOT NULL, stage INTEGER NOT NULL, number INTEGER NOT NULL, document BLOB NOT NULL,
  PRIMARY KEY (request, stage, number)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS attestation (
  request BLOB NOT NULL, round INTEGER NOT NULL, stage INTEGER NOT NULL,
  evidence_root BLOB NOT NULL, sketch BLOB NOT NULL, output_tokens INTEGER NOT NULL, salt BLOB NOT NULL,
  PRIMARY KEY (request, round, stage)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS contradiction (
  request BLOB NOT NULL, stage INTEGER NOT NULL, sent INTEGER NOT NULL, step INTEGER NOT NULL,
  chain BLOB NOT NULL, signature BLOB NOT NULL, position INTEGER NOT NULL, rows INTEGER NOT NULL,
  input_digest BLOB NOT NULL, output_digest BLOB NOT NULL, input_chain BLOB NOT NULL, output_chain BLOB NOT NULL,
  fingerprint BLOB NOT NULL, proof BLOB NOT NULL,
  PRIMARY KEY (request, stage, sent)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS ticket (
  request BLOB NOT NULL PRIMARY KEY, document BLOB NOT NULL, batch_over INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS batch (id BLOB NOT NULL PRIMARY KEY, document BLOB NOT NULL) WITHOUT ROWID;
"""
# What belongs to one stage besides its own row.
_STAGE_TABLES: Final = ("step", "output", "statement", "replacement")
_BUSY_SECONDS: Final = 10.0
# What a step costs on disk besides its input bytes: digests, chains, row and index overhead.
_STEP_OVERHEAD_BYTES: Final = 256


@dataclass(frozen=True, slots=True)
class InputOpening:
    """Opening of a request's input commitment (bsns.protocol.commitments.input_commitment)."""

    prompt_digest: bytes
    prompt_tokens: int
    sampling: SamplingParameters
    salt: bytes


@dataclass(frozen=True, slots=True)
class StageResult:
    """What a stage commits to. `sketch` and `salt` stay secret until the reveal. Of an attestation `evidence_root` is
    the sketch of the rows inside the stage, which takes its place.
    """

    evidence_root: bytes
    sketch: bytes
    salt: bytes
    output_tokens: int

    def commitment(self, request: bytes, round_: int, stage: int, node: str) -> bytes:
        """OutputVerification.commitmentOf: what `node` commits to, in round 0 as the executor."""
        sealed = sealed_sketch(self.sketch, self.salt)
        return stage_commitment(RequestId(request), round_, stage, node, self.evidence_root, sealed, self.output_tokens)


@dataclass(frozen=True, slots=True)
class RecordedStage:
    """A sealed stage as it is on disk, without the input bytes."""

    request: bytes
    stage: int
    opening: InputOpening
    result: StageResult


class EvidenceStore:
    """Opened on one file, for one process; safe to call from several threads."""

    def __init__(self, path: Path, byte_budget: int) -> None:
        self._path, self._budget = path, byte_budget
        self._lock = threading.Lock()
        try:
            if not path.exists():
                os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
            self._database = sqlite3.connect(path, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False)
            # Freed pages go back to the file system, so that the budget is one of disk space.
            self._database.execute("PRAGMA auto_vacuum=INCREMENTAL")
            self._database.execute("PRAGMA journal_mode=WAL")
            self._durable = True
            self._database.execute("PRAGMA synchronous=FULL")
            self._database.executescript(_SCHEMA)
            # What was not sealed when the process ended can never be committed: its KV cache is gone.
            with self._transaction():
                for table in _STAGE_TABLES:
                    self._database.execute(
                        f"DELETE FROM {table} WHERE NOT EXISTS (SELECT 1 FROM stage WHERE stage.request = "
                        f"{table}.request"
                        f" AND stage.stage = {table}.stage AND stage.evidence_root IS NOT NULL)"
                    )
                self._database.execute("DELETE FROM stage WHERE evidence_root IS NULL")
            self._used = self._measure()
        except (sqlite3.Error, OSError) as error:
            raise StorageError(
                f"evidence store {path} cannot be opened: {error}; check the disk and its permissions"
            ) from error

    def close(self) -> None:
        # A query of another thread must not find its connection freed beneath it.
        with self._lock:
            self._database.close()

    @property
    def bytes_used(self) -> int:
        """Bytes of evidence kept, as counted against the budget."""
        return self._used

    @property
    def bytes_free(self) -> int:
        return max(0, self._budget - self._used)

    # -- the executor's side

    def open_stage(self, request: bytes, stage: int, opening: InputOpening, now: int) -> None:
        """Begin the record of a stage; what an earlier, unsealed session left is removed."""
        sampling = opening.sampling
        with self._lock, self._transaction():
            self._delete(request, stage)
            self._database.execute(
                "INSERT INTO stage VALUES (?,?,?,?,?,?,?,?,?,?,NULL,NULL,NULL,NULL,?)",
                (
                    request,
                    stage,
                    opening.prompt_digest,
                    opening.prompt_tokens,
                    opening.salt,
                    sampling.temperature,
                    sampling.top_k,
                    sampling.top_p,
                    sampling.seed.to_bytes(8, "big"),
                    sampling.maximum_tokens,
                    now,
                ),
            )
        self._refresh()

    def add_step(
        self, request: bytes, stage: int, step: EvidenceStep, encoding: int, data: bytes, output: bytes
    ) -> None:
        """Keep one step and the exact bytes of its input and of its `output`.
        StorageFullError if disk or budget are used up.
        """
        cost = len(data) + len(output) + _STEP_OVERHEAD_BYTES
        with self._lock:
            if self._used + cost > self._budget:
                raise StorageFullError(
                    f"the evidence budget of {self._budget} bytes is used up; raise evidence_bytes or wait until "
                    "disputes are over"
                )
            # Before it is sealed a crash makes a stage worthless, and sealing waits for the disk for all its steps.
            with self._transaction(durable=False):
                self._database.execute(
                    "INSERT OR REPLACE INTO step VALUES (?,?,?,?,?,?,?,?,?,?,?,?)",
                    (request, stage, *step.as_tuple(), encoding, data),
                )
                self._database.execute(
                    "INSERT OR REPLACE INTO output VALUES (?,?,?,?)", (request, stage, step.step, output)
                )
            self._used += cost

    def save_statement(self, request: bytes, stage: int, statement: Statement) -> None:
        """Keep a neighbour's statement for our `stage`, unless a later one of the same kind is there."""
        with self._lock, self._transaction():
            self._database.execute(
                "INSERT INTO statement VALUES (?,?,?,?,?,?,?) ON CONFLICT DO UPDATE SET step = excluded.step,"
                " chain = excluded.chain, signature = excluded.signature WHERE excluded.step >= statement.step",
                (request, stage, statement.stage, statement.sent, statement.step, statement.chain, statement.signature),
            )

    def save_replacements(self, request: bytes, stage: int, documents: Sequence[bytes]) -> None:
        """Keep what put nodes of the route in the place of others, in order."""
        with self._lock, self._transaction():
            self._database.execute("DELETE FROM replacement WHERE request = ? AND stage = ?", (request, stage))
            self._database.executemany(
                "INSERT INTO replacement VALUES (?,?,?,?)",
                [(request, stage, number, document) for number, document in enumerate(documents)],
            )

    def replacements(self, request: bytes, stage: int) -> tuple[bytes, ...]:
        """What `save_replacements` kept."""
        with self._lock, self._errors():
            rows = self._database.execute(
                "SELECT document FROM replacement WHERE request = ? AND stage = ? ORDER BY number", (request, stage)
            ).fetchall()
        return tuple(bytes(row[0]) for row in rows)

    def drop_statements(self, request: bytes, stage: int, about: int) -> None:
        """Forget what the node of stage `about` signed for our `stage`: another node has taken its place."""
        with self._lock, self._transaction():
            self._database.execute(
                "DELETE FROM statement WHERE request = ? AND stage = ? AND about = ?", (request, stage, about)
            )

    def seal(self, request: bytes, stage: int, result: StageResult) -> None:
        """Fix the result of a stage for ever; a second call with another result is a StorageError."""
        with self._lock, self._transaction():
            row = self._database.execute(
                "SELECT evidence_root, sketch, seal_salt, output_tokens FROM stage WHERE request = ? AND stage = ?",
                (request, stage),
            ).fetchone()
            if row is None:
                raise StorageError("a stage is sealed after it was opened; this one is not on record")
            if row[0] is not None and StageResult(*row) != result:
                raise StorageError("a stage is sealed once; another result is on record")
            self._database.execute(
                "UPDATE stage SET evidence_root = ?, sketch = ?, seal_salt = ?, output_tokens = ? WHERE request "
                "= ? AND stage = ?",
                (result.evidence_root, result.sketch, result.salt, result.output_tokens, request, stage),
            )

    def discard(self, request: bytes, stage: int) -> None:
        """Remove a stage that was not sealed; a sealed one stays."""
        with self._lock, self._transaction():
            if self._database.execute(
                "SELECT 1 FROM stage WHERE request = ? AND stage = ? AND evidence_root IS NOT NULL", (request, stage)
            ).fetchone():
                return
            self._delete(request, stage)
        self._refresh()

    def sealed_stages(self) -> tuple[RecordedStage, ...]:
        """Every stage whose dispute is not over."""
        return self._select_stages("evidence_root IS NOT NULL", ())

    def sealed_stage(self, request: bytes, stage: int) -> RecordedStage | None:
        found = self._select_stages("evidence_root IS NOT NULL AND request = ? AND stage = ?", (request, stage))
        return found[0] if found else None

    def steps(self, request: bytes, stage: int) -> StageEvidence:
        """The evidence of a stage; StorageError if there is none or it is damaged."""
        with self._lock, self._errors():
            rows = self._database.execute(
                "SELECT step, position, rows, input_digest, output_digest, input_chain, output_chain, fingerprint"
                " FROM step WHERE request = ? AND stage = ? ORDER BY step",
                (request, stage),
            ).fetchall()
        try:
            return StageEvidence(tuple(EvidenceStep(*row) for row in rows))
        except ValueError as error:
            raise StorageError(f"the evidence of stage {stage} is incomplete: {error}") from error

    def step_input(self, request: bytes, stage: int, step: int) -> tuple[int, bytes]:
        """Encoding and exact bytes of one step's input."""
        with self._lock, self._errors():
            row = self._database.execute(
                "SELECT encoding, input FROM step WHERE request = ? AND stage = ? AND step = ?", (request, stage, step)
            ).fetchone()
        if row is None:
            raise StorageError(f"the input of step {step} of stage {stage} is not on record")
        return int(row[0]), bytes(row[1])

    def step_output(self, request: bytes, stage: int, step: int) -> bytes:
        """Exact bytes of one step's output."""
        with self._lock, self._errors():
            row = self._database.execute(
                "SELECT payload FROM output WHERE request = ? AND stage = ? AND step = ?", (request, stage, step)
            ).fetchone()
        if row is None:
            raise StorageError(f"the output of step {step} of stage {stage} is not on record")
        return bytes(row[0])

    def statements(self, request: bytes, stage: int) -> tuple[Statement, ...]:
        with self._lock, self._errors():
            rows = self._database.execute(
                "SELECT about, sent, step, chain, signature FROM statement WHERE request = ? AND stage = ? "
                "ORDER BY about, sent",
                (request, stage),
            ).fetchall()
        return tuple(
            Statement(about, bool(sent), step, chain, signature) for about, sent, step, chain, signature in rows
        )

    # -- the committee member's side

    def save_attestation(self, request: bytes, round_: int, stage: int, result: StageResult) -> StageResult:
        """Fix what is attested; returns what is on record, which is an earlier result if there is one."""
        with self._lock, self._transaction():
            self._database.execute(
                "INSERT OR IGNORE INTO attestation VALUES (?,?,?,?,?,?,?)",
                (request, round_, stage, result.evidence_root, result.sketch, result.output_tokens, result.salt),
            )
        found = self.attestation(request, round_, stage)
        assert found is not None, "just inserted"
        return found

    def attestation(self, request: bytes, round_: int, stage: int) -> StageResult | None:
        with self._lock, self._errors():
            row = self._database.execute(
                "SELECT evidence_root, sketch, salt, output_tokens FROM attestation WHERE request = ? AND round "
                "= ? AND stage = ?",
                (request, round_, stage),
            ).fetchone()
        return None if row is None else StageResult(*row)

    def attested_requests(self) -> tuple[bytes, ...]:
        """Requests for which an attestation is on record."""
        with self._lock, self._errors():
            return tuple(
                row[0] for row in self._database.execute("SELECT DISTINCT request FROM attestation ORDER BY request")
            )

    def save_contradiction(self, request: bytes, found: Contradiction) -> None:
        """Keep what is to be reported once its signer has revealed its evidence; one of each stage and direction."""
        statement, leaf = found.statement, found.step
        with self._lock, self._transaction():
            self._database.execute(
                "INSERT OR IGNORE INTO contradiction VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
                (
                    request,
                    statement.stage,
                    statement.sent,
                    statement.step,
                    statement.chain,
                    statement.signature,
                    *leaf.as_tuple()[1:],
                    b"".join(found.proof),
                ),
            )

    def contradictions(self, request: bytes) -> tuple[Contradiction, ...]:
        with self._lock, self._errors():
            rows = self._database.execute(
                "SELECT stage, sent, step, chain, signature, position, rows, input_digest, output_digest, input_chain,"
                " output_chain, fingerprint, proof FROM contradiction WHERE request = ? ORDER BY stage, sent",
                (request,),
            ).fetchall()
        return tuple(
            Contradiction(
                Statement(stage, bool(sent), step, chain, signature),
                EvidenceStep(step, *leaf),
                tuple(proof[first : first + BYTES32] for first in range(0, len(proof), BYTES32)),
            )
            for stage, sent, step, chain, signature, *leaf, proof in rows
        )

    def contradicted_requests(self) -> tuple[bytes, ...]:
        """Requests about which there is something to report."""
        with self._lock, self._errors():
            return tuple(
                row[0] for row in self._database.execute("SELECT DISTINCT request FROM contradiction ORDER BY request")
            )

    def drop_contradiction(self, request: bytes, found: Contradiction) -> None:
        """It was reported, or never can be."""
        with self._lock, self._transaction():
            self._database.execute(
                "DELETE FROM contradiction WHERE request = ? AND stage = ? AND sent = ?",
                (request, found.statement.stage, found.statement.sent),
            )

    # -- requests that are paid out of tabs

    def save_grant(self, request: bytes, document: bytes) -> None:
        """Keep what lets a request be served that is not on the chain."""
        with self._lock, self._transaction():
            self._database.execute("INSERT OR IGNORE INTO ticket VALUES (?,?,0)", (request, document))

    def grants(self) -> tuple[bytes, ...]:
        """What `save_grant` kept of requests that are not forgotten."""
        with self._lock, self._errors():
            return tuple(bytes(row[0]) for row in self._database.execute("SELECT document FROM ticket"))

    def save_batch(self, batch: bytes, document: bytes) -> None:
        """Keep a batch with all that opens its leaves, before it is signed."""
        with self._lock, self._transaction():
            self._database.execute("INSERT OR IGNORE INTO batch VALUES (?,?)", (batch, document))

    def batches(self) -> tuple[bytes, ...]:
        """Ids of the batches that are not over."""
        with self._lock, self._errors():
            return tuple(bytes(row[0]) for row in self._database.execute("SELECT id FROM batch ORDER BY id"))

    def batch(self, batch: bytes) -> bytes:
        """What `save_batch` kept; StorageError if it is over."""
        with self._lock, self._errors():
            row = self._database.execute("SELECT document FROM batch WHERE id = ?", (batch,)).fetchone()
        if row is None:
            raise StorageError(f"batch 0x{batch.hex()} is not on record")
        return bytes(row[0])

    def end_batch(self, batch: bytes, requests: Sequence[bytes]) -> None:
        """The batch is over, and with it what may become of `requests`, its tickets."""
        with self._lock, self._transaction():
            self._database.executemany(
                "UPDATE ticket SET batch_over = 1 WHERE request = ?", [(request,) for request in requests]
            )
            self._database.execute("DELETE FROM batch WHERE id = ?", (batch,))

    def is_batch_over(self, request: bytes) -> bool:
        """Whether the batch that the request's ticket went into is over."""
        with self._lock, self._errors():
            row = self._database.execute("SELECT batch_over FROM ticket WHERE request = ?", (request,)).fetchone()
        return row is not None and bool(row[0])

    # -- retention

    def forget(self, request: bytes) -> None:
        """The dispute is over: remove everything about the request and give the space back. Contradictions stay: the
        stake they concern outlives the request.
        """
        with self._lock, self._transaction():
            for table in ("stage", *_STAGE_TABLES, "attestation", "ticket"):
                self._database.execute(f"DELETE FROM {table} WHERE request = ?", (request,))
        with self._lock, self._errors():
            self._database.execute("PRAGMA incremental_vacuum").fetchall()
        self._refresh()

    def _delete(self, request: bytes, stage: int) -> None:
        for table in ("stage", *_STAGE_TABLES):
            self._database.execute(f"DELETE FROM {table} WHERE request = ? AND stage = ?", (request, stage))

    def _select_stages(self, condition: str, values: Sequence[object]) -> tuple[RecordedStage, ...]:
        with self._lock, self._errors():
            rows = self._database.execute(
                "SELECT request, stage, prompt_digest, prompt_tokens, temperature, top_k, top_p, seed, "
                "maximum_tokens, salt,"
                f" evidence_root, sketch, seal_salt, output_tokens FROM stage WHERE {condition} ORDER BY opened_at",
                values,
            ).fetchall()
        return tuple(
            RecordedStage(
                row[0],
                row[1],
                InputOpening(
                    row[2],
                    row[3],
                    SamplingParameters(row[4], row[5], row[6], int.from_bytes(row[7], "big"), row[8]),
                    row[9],
                ),
                StageResult(*row[10:14]),
            )
            for row in rows
        )

    def _measure(self) -> int:
        row = self._database.execute(
            "SELECT (SELECT COALESCE(SUM(LENGTH(input)), 0) FROM step)"
            " + (SELECT COALESCE(SUM(LENGTH(payload)), 0) FROM output), (SELECT COUNT(*) FROM step)"
        ).fetchone()
        return int(row[0]) + int(row[1]) * _STEP_OVERHEAD_BYTES

    def _refresh(self) -> None:
        with self._lock, self._errors():
            self._used = self._measure()

    @contextmanager
    def _transaction(self, *, durable: bool = True) -> Iterator[None]:
        """One transaction. Only a durable one waits for the disk; it takes what was written before it with it, since
        all is in one log.
        """
        with self._errors():
            if durable is not self._durable:
                self._database.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
                self._durable = durable
            self._database.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._database.execute("COMMIT")
            except BaseException:
                # SQLite rolls back by itself when the disk is full.
                with suppress(sqlite3.OperationalError):
                    self._database.execute("ROLLBACK")
                raise

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_FULL:
                raise StorageFullError(
                    f"no space left for evidence at {self._path}: {error}; free disk space"
                ) from error
            raise StorageError(f"evidence store {self._path} cannot be used: {error}") from error
