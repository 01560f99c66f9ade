"""The coordinator's tables and the only queries on them.

Owns what survives a restart: canonical blocks and events with the aggregates folded from them, intents with the
transactions signed for them, nodes' measurements and the records that plans were computed from. Promises that a block,
its events, the aggregates they touch and the cursor change in one transaction; that after a rollback the aggregates
equal a fold over the remaining events (SYNC-01); and that a signed transaction is stored together with its nonce before
anybody can broadcast it (OUTBOX-01). SQLite (WAL, BEGIN IMMEDIATE) or PostgreSQL by URL; integers of 256 bits are
zero-padded text. Methods block: coroutines call them in a worker thread. Does not talk to the chain and decides
nothing.
"""

from __future__ import annotations

import fcntl
import json
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, Final, TypeVar

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import (
    Connection,
    Engine,
    RowMapping,
    Table,
    create_engine,
    delete,
    event,
    func,
    insert,
    make_url,
    select,
    text,
    tuple_,
    update,
)
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError

from bsns.chain.client import Block, ChainEvent
from bsns.chain.deployment import Deployment
from bsns.planning.topology import Snapshot
from bsns.protocol.contract_states import RequestStatus
from bsns.protocol.identifiers import ModelId, PlanId, RequestId
from bsns.protocol.measurements import NodeMeasurements
from bsns.protocol.planning_record import PlanningRecord, SignedMeasurements
from bsns.v1 import coordination_pb2
from coordinator.documents import decode_record, decode_values, encode_record, encode_values
from coordinator.network_state import (
    AGGREGATE_TYPES,
    Aggregate,
    AggregateKey,
    AggregateKind,
    DocumentState,
    ModelState,
    NetworkState,
    NodeState,
    PlanState,
    RequestState,
    aggregate_of,
    apply,
)
from coordinator.storage import tables

_PARSED_MEASUREMENTS: Final = 4_096
_SQLITE_BUSY_TIMEOUT_S: Final = 10.0
_POSTGRESQL_WRITER_LOCK: Final = 0x6273_6E73  # "bsns"
_MIGRATIONS: Final = Path(__file__).resolve().parents[2] / "migrations"
# Blocks without events are only needed to find a common ancestor; older ones are dropped this many at a time.
_PRUNE_EVERY_BLOCKS: Final = 512

_AGGREGATE_TABLES: Final[Mapping[AggregateKind, Table]] = {
    AggregateKind.NODE: tables.nodes,
    AggregateKind.MODEL: tables.models,
    AggregateKind.DOCUMENT: tables.documents,
    AggregateKind.PLAN: tables.plans,
    AggregateKind.REQUEST: tables.requests,
    AggregateKind.ACCOUNT: tables.accounts,
}


class StorageError(Exception):
    """The database refused. Nothing of the transaction was kept; the message says why and what to do."""


class StorageSettingsError(StorageError):
    """The URL or the revision given cannot be used, whatever the database does."""


class StorageUnavailableError(StorageError):
    """The database cannot be used right now (full disk, lost connection, locked). Trying again later is right."""


class WrongDeploymentError(StorageError):
    """The database belongs to another deployment or chain."""


class AnotherWriterError(StorageError):
    """Another coordinator writes to this database. One must stop: a key has one nonce owner."""


class OutdatedSchemaError(StorageError):
    """The tables are of another release. Run `bsns-coordinator migrate`."""


ChainPlace = tuple[int, int]
"""Block number and log index of an event."""


class IntentState(StrEnum):
    """Life of an intent: wanted → signed → sent → mined → confirmed, or refused. A reorganisation leads back."""

    WANTED = "wanted"
    SIGNED = "signed"
    SENT = "sent"
    MINED = "mined"
    CONFIRMED = "confirmed"
    REFUSED = "refused"


@dataclass(frozen=True, slots=True)
class Intent:
    """A call of a contract that somebody wants to happen once. `key` is what makes it the same intent again."""

    key: str
    contract: str
    function: str
    arguments: tuple[Any, ...]
    value: int = 0


@dataclass(frozen=True, slots=True)
class IntentRecord:
    """An intent and how far it came. Times are Unix seconds."""

    sequence: int
    intent: Intent
    sender: str
    state: IntentState
    reason: str | None
    attempts: int
    next_attempt_at: float
    nonce: int | None
    transaction_hash: bytes | None
    mined_block_number: int | None
    mined_block_hash: bytes | None
    succeeded: bool | None
    created_at: float


@dataclass(frozen=True, slots=True)
class SignedTransaction:
    """A signed transaction of an intent; `fields` is what was signed."""

    hash: bytes
    nonce: int
    fields: Mapping[str, Any]
    raw: bytes
    signed_at: float
    broadcast_at: float | None = None


class TicketState(StrEnum):
    """Life of a ticket: taken → delivered or abandoned → in a batch → over."""

    TAKEN = "taken"
    DELIVERED = "delivered"
    ABANDONED = "abandoned"
    BATCHED = "batched"
    OVER = "over"


@dataclass(frozen=True, slots=True)
class TicketRecord:
    """A ticket that was taken. `charge`: wei, at most until it is delivered. `collected`: with its results."""

    request_id: RequestId
    requester: str
    number: int
    plan_id: bytes
    state: TicketState
    changed_at: int
    charge: int
    batch_id: bytes | None
    grant: bytes
    collected: bytes | None


@dataclass(frozen=True, slots=True)
class VoucherRecord:
    """A voucher, with its secret once that was shown and the batch that uses it."""

    secret_hash: bytes
    requester: str
    cumulative: int
    message: bytes
    secret: bytes | None
    batch_id: bytes | None


class BatchProgress(StrEnum):
    """Life of a batch here: offered to its nodes → wanted on the chain → over."""

    OFFERED = "offered"
    WANTED = "wanted"
    OVER = "over"


@dataclass(frozen=True, slots=True)
class BatchRecord:
    """A batch, and the nodes' signatures so far."""

    batch_id: bytes
    state: BatchProgress
    changed_at: int
    message: bytes
    consents: Mapping[str, bytes]


@dataclass(frozen=True, slots=True)
class TopologySnapshot:
    """A model's network at Unix second `taken_at`, and the number of its class."""

    model: ModelId
    taken_at: int
    class_number: int
    snapshot: Snapshot


@dataclass(frozen=True, slots=True)
class Rollback:
    """What a reorganisation took back."""

    ancestor: int
    orphaned_blocks: int
    orphaned_events: int
    rebuilt_aggregates: int
    reopened_intents: int


def migrate(url: str, revision: str = "head") -> None:
    """Bring the tables of the database at `url` to `revision` (up, or down to an older one or "base")."""
    with _translated():
        config = _alembic_config(url)
        engine = _engine(url)
        try:
            with engine.connect() as connection:
                current = MigrationContext.configure(connection).get_current_revision()
            known = [item.revision for item in ScriptDirectory.from_config(config).walk_revisions()]
            older = revision == "base" or (
                revision in known and current in known and known.index(revision) > known.index(current)
            )
            (command.downgrade if older else command.upgrade)(config, revision)
        finally:
            engine.dispose()


class Storage:
    """The database at `url`. `keep_blocks` is how far back headers without events are kept: at least the deepest
    reorganisation that is followed.
    """

    def __init__(self, url: str, *, keep_blocks: int = 1_024) -> None:
        self._url = url
        self._keep_blocks = keep_blocks
        with _translated():
            self._engine = _engine(url)
        self._write_lock = threading.RLock()
        self._writer: Connection | None = None
        self._lock_file: IO[bytes] | None = None

    @classmethod
    def of_existing(cls, url: str) -> Storage:
        """For whoever only reads: StorageSettingsError where there is no SQLite file, which is not created."""
        with _translated():
            parsed = make_url(url)
        is_file = parsed.get_backend_name() == "sqlite" and parsed.database not in (None, "", ":memory:")
        if is_file and not Path(str(parsed.database)).is_file():
            raise StorageSettingsError(
                f"there is no database at {parsed.database}: give the --database-url that the coordinator serves with"
            )
        return cls(url)

    def close(self) -> None:
        """Give connections and the writer lock back."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._lock_file is not None:
            self._lock_file.close()
            self._lock_file = None
        self._engine.dispose()

    def require_current_schema(self) -> None:
        """Raise OutdatedSchemaError unless the tables are those of this release."""
        head = ScriptDirectory.from_config(_alembic_config(self._url)).get_current_head()
        with self.reading() as connection:
            current = MigrationContext.configure(connection).get_current_revision()
        if current != head:
            raise OutdatedSchemaError(
                f"the database is at revision {current}, this release needs {head}: run `bsns-coordinator migrate`"
            )

    def become_writer(self) -> None:
        """Take the one writer's place until `close` or the end of the process; AnotherWriterError if it is taken."""
        message = "another coordinator writes to this database: stop it first (one key has one nonce owner)"
        with _translated():
            if self._engine.dialect.name == "postgresql":
                connection = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
                if not connection.scalar(text("select pg_try_advisory_lock(:key)"), {"key": _POSTGRESQL_WRITER_LOCK}):
                    connection.close()
                    raise AnotherWriterError(message)
                self._writer = connection
                return
        path = self._engine.url.database
        if path and path != ":memory:":
            lock = Path(f"{path}.writer").open("ab")  # noqa: SIM115 - held until close
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                lock.close()
                raise AnotherWriterError(message) from error
            self._lock_file = lock

    def require_writer(self) -> None:
        """AnotherWriterError if the writer's place was lost with the connection that held it, and is taken."""
        if self._writer is None:
            return  # a file lock is held as long as the process lives
        try:
            with _translated():
                self._writer.scalar(text("select 1"))
        except StorageUnavailableError:
            self._writer.close()
            self._writer = None
            self.become_writer()

    def bind(self, deployment: Deployment) -> None:
        """Tie the database to `deployment`, or check that it is tied to it; WrongDeploymentError otherwise."""
        document = encode_values(
            {"chain_id": deployment.chain_id, "first_block": deployment.first_block, **deployment.contracts}
        )
        with self.writing() as connection:
            row = connection.execute(select(tables.deployment)).mappings().first()
            if row is None:
                connection.execute(
                    insert(tables.deployment).values(id=1, chain_id=deployment.chain_id, document=document)
                )
            elif row["document"] != document:
                raise WrongDeploymentError(
                    f"the database belongs to the deployment {row['document']}, not to {document}: "
                    "give each deployment a database of its own"
                )

    # -------------------------------------------------------------------------------------------- blocks and events

    def cursor(self) -> Block | None:
        """The last block that was stored, or None before the first."""
        with self.reading() as connection:
            row = (
                connection.execute(
                    select(tables.blocks).join(
                        tables.deployment, tables.deployment.c.cursor_hash == tables.blocks.c.hash
                    )
                )
                .mappings()
                .first()
            )
        return None if row is None else block_of_row(row)

    def block_at(self, number: int) -> Block | None:
        """The stored block of that number, if it was kept."""
        with self.reading() as connection:
            row = connection.execute(select(tables.blocks).where(tables.blocks.c.number == number)).mappings().first()
        return None if row is None else block_of_row(row)

    def append_block(self, block: Block, events: Sequence[ChainEvent]) -> None:
        """Store `block`, its events, the aggregates they touch and the cursor, in one transaction.

        StorageError if the block does not follow the cursor; errors of network_state pass through and leave nothing.
        """
        touched: dict[AggregateKey, None] = {aggregate_of(item): None for item in events}
        with self.writing() as connection:
            last = connection.execute(
                select(tables.deployment.c.cursor_number, tables.deployment.c.cursor_hash)
            ).first()
            if last is None:
                raise StorageError("the database is not bound to a deployment")
            if last.cursor_hash is not None and (last.cursor_number + 1, last.cursor_hash) != (
                block.number,
                _hex(block.parent_hash),
            ):
                raise StorageError(f"block {block.number} does not follow the stored block {last.cursor_number}")
            connection.execute(
                insert(tables.blocks).values(
                    number=block.number,
                    hash=_hex(block.hash),
                    parent_hash=_hex(block.parent_hash),
                    timestamp=block.timestamp,
                )
            )
            if events:
                connection.execute(insert(tables.events), [_event_row(item) for item in events])
            state = NetworkState(_load_aggregates(connection, touched))
            for item in events:
                state = apply(state, item, block)
            _store_aggregates(connection, state.aggregates)
            connection.execute(
                update(tables.deployment).values(cursor_number=block.number, cursor_hash=_hex(block.hash))
            )
            if block.number % _PRUNE_EVERY_BLOCKS == 0:
                _prune(connection, block.number - self._keep_blocks)

    def roll_back(self, ancestor: int) -> Rollback:
        """Take back every block above `ancestor`, which must be stored, in one transaction.

        Aggregates touched by orphaned events are folded again from their remaining events; intents whose transaction
        was mined above the ancestor are open again.
        """
        with self.writing() as connection:
            kept = connection.execute(select(tables.blocks.c.hash).where(tables.blocks.c.number == ancestor)).first()
            if kept is None:
                raise StorageError(f"block {ancestor} is not stored: it cannot be rolled back to")
            orphaned = connection.execute(delete(tables.blocks).where(tables.blocks.c.number > ancestor)).rowcount
            touched = [
                (AggregateKind(row.aggregate_kind), row.aggregate_key)
                for row in connection.execute(
                    select(tables.events.c.aggregate_kind, tables.events.c.aggregate_key)
                    .where(tables.events.c.block_number > ancestor)
                    .distinct()
                )
            ]
            events = connection.execute(delete(tables.events).where(tables.events.c.block_number > ancestor)).rowcount
            for kind, key in touched:
                history = _history(connection, kind, key)
                table = _AGGREGATE_TABLES[kind]
                connection.execute(delete(table).where(table.c.key == key))
                state = NetworkState()
                for item, block in history:
                    state = apply(state, item, block)
                _store_aggregates(connection, state.aggregates)
            connection.execute(update(tables.deployment).values(cursor_number=ancestor, cursor_hash=kept.hash))
            reopened = connection.execute(
                update(tables.intents)
                .where(tables.intents.c.mined_block_number > ancestor)
                .values(
                    state=IntentState.SENT,
                    reason=None,
                    mined_block_number=None,
                    mined_block_hash=None,
                    succeeded=None,
                )
            ).rowcount
        return Rollback(ancestor, orphaned, events, len(touched), reopened)

    def history(self) -> list[tuple[ChainEvent, Block]]:
        """All canonical events in chain order with their blocks."""
        with self.reading() as connection:
            return _history(connection)

    def network_state(self) -> NetworkState:
        """All stored aggregates."""
        found: dict[AggregateKey, Aggregate] = {}
        with self.reading() as connection:
            for kind, table in _AGGREGATE_TABLES.items():
                for row in connection.execute(select(table.c.key, table.c.document)):
                    found[kind, row.key] = decode_record(AGGREGATE_TYPES[kind], row.document)
        return NetworkState(found)

    # ---------------------------------------------------------------------------------------------------- aggregates

    def nodes(self) -> dict[str, NodeState]:
        """All node accounts by hot key."""
        return {item.node: item for item in self._all(tables.nodes, NodeState)}

    def node(self, address: str) -> NodeState | None:
        return self._one(tables.nodes, NodeState, address)

    def model(self, model: ModelId) -> ModelState | None:
        return self._one(tables.models, ModelState, _hex(model))

    def document(self, document_hash: bytes) -> DocumentState | None:
        """What is known of an announced document; not its bytes."""
        return self._one(tables.documents, DocumentState, _hex(document_hash))

    def plan(self, plan: PlanId) -> PlanState | None:
        return self._one(tables.plans, PlanState, _hex(plan))

    def plans(self, model: ModelId | None = None, publisher: str | None = None) -> list[PlanState]:
        """Plans by epoch, narrowed to a model and a publisher."""
        query = select(tables.plans.c.document).order_by(tables.plans.c.model_id, tables.plans.c.epoch)
        if model is not None:
            query = query.where(tables.plans.c.model_id == _hex(model))
        if publisher is not None:
            query = query.where(tables.plans.c.publisher == publisher)
        with self.reading() as connection:
            return [decode_record(PlanState, row.document) for row in connection.execute(query)]

    def request(self, request: RequestId) -> RequestState | None:
        return self._one(tables.requests, RequestState, _hex(request))

    def unfinished_requests(self, limit: int) -> list[RequestState]:
        """Requests that are neither settled nor refunded, oldest first, at most `limit`."""
        finished = [int(item) for item in RequestStatus if item.is_finished]
        query = (
            select(tables.requests.c.document)
            .where(tables.requests.c.status.not_in(finished))
            .order_by(tables.requests.c.opened_block, tables.requests.c.key)
            .limit(limit)
        )
        with self.reading() as connection:
            return [decode_record(RequestState, row.document) for row in connection.execute(query)]

    def finished_requests(self, after: ChainPlace, limit: int) -> list[tuple[ChainPlace, RequestState]]:
        """Requests by where their settlement or refund lies on the chain, at most `limit` beyond `after`."""
        place = tuple_(tables.events.c.block_number, tables.events.c.log_index)
        query = (
            select(tables.events.c.block_number, tables.events.c.log_index, tables.requests.c.document)
            .join(tables.requests, tables.requests.c.key == tables.events.c.aggregate_key)
            .where(tables.events.c.name.in_(("RequestSettled", "RequestRefunded")), place > tuple_(*after))
            .order_by(tables.events.c.block_number, tables.events.c.log_index)
            .limit(limit)
        )
        with self.reading() as connection:
            return [
                ((row.block_number, row.log_index), decode_record(RequestState, row.document))
                for row in connection.execute(query)
            ]

    def request_counts(self) -> dict[RequestStatus, int]:
        """Number of requests by status."""
        query = select(tables.requests.c.status, func.count()).group_by(tables.requests.c.status)
        with self.reading() as connection:
            return {RequestStatus(status): count for status, count in connection.execute(query)}

    # -------------------------------------------------------------------------------------------------- measurements

    def keep_measurements(self, measurements: NodeMeasurements, signature: bytes) -> NodeMeasurements | None:
        """Store a node's latest measurements for a model; older ones than the stored are left out. Returns what was
        stored before.
        """
        values = {
            "model_id": _hex(measurements.model),
            "node": measurements.node,
            "measured_at": measurements.measured_at,
            "message": measurements.to_message(signature).SerializeToString(deterministic=True).hex(),
        }
        same = (tables.measurements.c.model_id == values["model_id"]) & (tables.measurements.c.node == values["node"])
        with self.writing() as connection:
            message = connection.scalar(select(tables.measurements.c.message).where(same))
            if message is None:
                connection.execute(insert(tables.measurements).values(**values))
                return None
            known = _parse_measurements(message).measurements
            if measurements.measured_at >= known.measured_at:
                connection.execute(update(tables.measurements).where(same).values(**values))
            return known

    def measurements(self, model: ModelId) -> dict[str, SignedMeasurements]:
        """The latest measurements for `model` by node, as the nodes signed them."""
        query = select(tables.measurements.c.message).where(tables.measurements.c.model_id == _hex(model))
        with self.reading() as connection:
            found = [_parse_measurements(row.message) for row in connection.execute(query)]
        return {item.measurements.node: item for item in found}

    def keep_planning_record(self, record: PlanningRecord) -> None:
        """Store what a plan is computed from; harmless to repeat."""
        values = {"hash": _hex(record.hash), "content": record.to_bytes()}
        same = select(tables.planning_records.c.hash).where(tables.planning_records.c.hash == values["hash"])
        with self.writing() as connection:
            if connection.scalar(same) is None:
                connection.execute(insert(tables.planning_records).values(**values))

    def planning_record(self, record_hash: bytes) -> PlanningRecord | None:
        """What a plan was computed from, by the plan's measurementsHash."""
        query = select(tables.planning_records.c.content).where(tables.planning_records.c.hash == _hex(record_hash))
        with self.reading() as connection:
            content = connection.scalar(query)
        return None if content is None else PlanningRecord.from_bytes(bytes(content))

    def keep_topology(self, taken: TopologySnapshot, *, keep: int) -> None:
        """Store a snapshot; of its model the newest `keep` stay."""
        model = _hex(taken.model)
        mine = tables.topologies.c.model_id == model
        with self.writing() as connection:
            connection.execute(
                insert(tables.topologies).values(
                    model_id=model,
                    taken_at=taken.taken_at,
                    class_number=taken.class_number,
                    snapshot=taken.snapshot.to_json(),
                )
            )
            oldest = connection.scalar(
                select(tables.topologies.c.sequence)
                .where(mine)
                .order_by(tables.topologies.c.sequence.desc())
                .offset(keep - 1)
                .limit(1)
            )
            if oldest is not None:
                connection.execute(delete(tables.topologies).where(mine & (tables.topologies.c.sequence < oldest)))

    def topologies(self, model: ModelId, limit: int) -> list[TopologySnapshot]:
        """The newest snapshots of `model`'s network, the newest first."""
        query = (
            select(tables.topologies)
            .where(tables.topologies.c.model_id == _hex(model))
            .order_by(tables.topologies.c.sequence.desc())
            .limit(limit)
        )
        with self.reading() as connection:
            return [
                TopologySnapshot(model, row.taken_at, row.class_number, Snapshot.from_json(row.snapshot))
                for row in connection.execute(query)
            ]

    def topology_classes(self, model: ModelId, limit: int) -> list[tuple[int, Snapshot]]:
        """The newest `limit` classes of `model`'s network, each with the oldest of its snapshots that is kept."""
        first = (
            select(func.min(tables.topologies.c.sequence))
            .where(tables.topologies.c.model_id == _hex(model))
            .group_by(tables.topologies.c.class_number)
        )
        query = (
            select(tables.topologies.c.class_number, tables.topologies.c.snapshot)
            .where(tables.topologies.c.sequence.in_(first))
            .order_by(tables.topologies.c.sequence.desc())
            .limit(limit)
        )
        with self.reading() as connection:
            return [(row.class_number, Snapshot.from_json(row.snapshot)) for row in connection.execute(query)]

    # ---------------------------------------------------------------------------------------------------------- tabs

    def keep_ticket(self, record: TicketRecord) -> bool:
        """Store a ticket that was taken; False if its request or its number is there."""
        same = (tables.tab_tickets.c.requester == record.requester) & (tables.tab_tickets.c.number == record.number)
        with self.writing() as connection:
            if connection.scalar(select(tables.tab_tickets.c.request_id).where(same)) is not None:
                return False
            connection.execute(insert(tables.tab_tickets).values(**_ticket_row(record)))
            return True

    def change_ticket(self, record: TicketRecord) -> None:
        """Store what has become of a ticket."""
        row = _ticket_row(record)
        with self.writing() as connection:
            same = tables.tab_tickets.c.request_id == row.pop("request_id")
            connection.execute(update(tables.tab_tickets).where(same).values(**row))

    def ticket(self, request: RequestId) -> TicketRecord | None:
        query = select(tables.tab_tickets).where(tables.tab_tickets.c.request_id == _hex(request))
        with self.reading() as connection:
            row = connection.execute(query).mappings().first()
        return None if row is None else ticket_of_row(row)

    def tickets(
        self, states: Iterable[TicketState], *, requester: str | None = None, batch: bytes | None = None
    ) -> list[TicketRecord]:
        """Tickets in one of `states`, by requester and number."""
        query = select(tables.tab_tickets).where(tables.tab_tickets.c.state.in_([str(state) for state in states]))
        if requester is not None:
            query = query.where(tables.tab_tickets.c.requester == requester)
        if batch is not None:
            query = query.where(tables.tab_tickets.c.batch_id == _hex(batch))
        with self.reading() as connection:
            rows = (
                connection.execute(query.order_by(tables.tab_tickets.c.requester, tables.tab_tickets.c.number))
                .mappings()
                .all()
            )
        return [ticket_of_row(row) for row in rows]

    def last_ticket_number(self, requester: str) -> int | None:
        """The highest number taken of a requester."""
        query = select(func.max(tables.tab_tickets.c.number)).where(tables.tab_tickets.c.requester == requester)
        with self.reading() as connection:
            found = connection.scalar(query)
        return None if found is None else int(found)

    def deliver(self, ticket: TicketRecord, voucher: VoucherRecord) -> None:
        """Store a ticket's results with the voucher that pays for them, both or neither."""
        row = _ticket_row(ticket)
        with self.writing() as connection:
            same = tables.tab_tickets.c.request_id == row.pop("request_id")
            connection.execute(update(tables.tab_tickets).where(same).values(**row))
            connection.execute(
                insert(tables.tab_vouchers).values(
                    secret_hash=_hex(voucher.secret_hash),
                    requester=voucher.requester,
                    cumulative=uint256_text(voucher.cumulative),
                    message=voucher.message,
                )
            )

    def vouchers(self, requester: str) -> list[VoucherRecord]:
        """A requester's vouchers, the smallest first."""
        query = select(tables.tab_vouchers).where(tables.tab_vouchers.c.requester == requester)
        with self.reading() as connection:
            rows = connection.execute(query.order_by(tables.tab_vouchers.c.cumulative)).mappings().all()
        return [_voucher_record(row) for row in rows]

    def keep_secret(self, secret_hash: bytes, secret: bytes) -> bool:
        """Store a voucher's secret; False if there is no such voucher."""
        with self.writing() as connection:
            same = tables.tab_vouchers.c.secret_hash == _hex(secret_hash)
            return connection.execute(update(tables.tab_vouchers).where(same).values(secret=_hex(secret))).rowcount > 0

    def secrets_of(self, batch: bytes) -> dict[bytes, bytes | None]:
        """Secrets of a batch's vouchers by their hashes; None of those that were not shown."""
        query = select(tables.tab_vouchers).where(tables.tab_vouchers.c.batch_id == _hex(batch))
        with self.reading() as connection:
            found = [_voucher_record(row) for row in connection.execute(query).mappings()]
        return {item.secret_hash: item.secret for item in found}

    def keep_batch(self, record: BatchRecord, requests: Iterable[RequestId], vouchers: Iterable[bytes]) -> None:
        """Store a batch with the tickets and the vouchers (by the hashes of their secrets) that go into it."""
        batch = _hex(record.batch_id)
        with self.writing() as connection:
            connection.execute(insert(tables.tab_batches).values(**_batch_row(record)))
            for request in requests:
                connection.execute(
                    update(tables.tab_tickets)
                    .where(tables.tab_tickets.c.request_id == _hex(request))
                    .values(state=str(TicketState.BATCHED), changed_at=record.changed_at, batch_id=batch)
                )
            for secret_hash in vouchers:
                connection.execute(
                    update(tables.tab_vouchers)
                    .where(tables.tab_vouchers.c.secret_hash == _hex(secret_hash))
                    .values(batch_id=batch)
                )

    def end_tickets(self, batch: bytes, now: int) -> None:
        """What a batch is charged for is charged: its tickets are over."""
        mine = (tables.tab_tickets.c.batch_id == _hex(batch)) & (tables.tab_tickets.c.state == str(TicketState.BATCHED))
        with self.writing() as connection:
            connection.execute(
                update(tables.tab_tickets).where(mine).values(state=str(TicketState.OVER), changed_at=now)
            )

    def change_batch(self, record: BatchRecord) -> None:
        """Store how far a batch has come."""
        row = _batch_row(record)
        with self.writing() as connection:
            same = tables.tab_batches.c.batch_id == row.pop("batch_id")
            connection.execute(update(tables.tab_batches).where(same).values(**row))

    def dissolve_batch(self, batch: bytes, tickets: Iterable[TicketRecord]) -> None:
        """Forget a batch that was not posted; `tickets` are its tickets as they are to be now."""
        with self.writing() as connection:
            connection.execute(delete(tables.tab_batches).where(tables.tab_batches.c.batch_id == _hex(batch)))
            connection.execute(
                update(tables.tab_vouchers).where(tables.tab_vouchers.c.batch_id == _hex(batch)).values(batch_id=None)
            )
            for ticket in tickets:
                row = _ticket_row(ticket)
                same = tables.tab_tickets.c.request_id == row.pop("request_id")
                connection.execute(update(tables.tab_tickets).where(same).values(**row))

    def batches(self, *states: BatchProgress) -> list[BatchRecord]:
        """Batches in one of `states`, the oldest first."""
        query = select(tables.tab_batches).where(tables.tab_batches.c.state.in_([str(state) for state in states]))
        with self.reading() as connection:
            rows = connection.execute(
                query.order_by(tables.tab_batches.c.changed_at, tables.tab_batches.c.batch_id)
            ).mappings()
            return [batch_of_row(row) for row in rows.all()]

    # ------------------------------------------------------------------------------------------ intents, transactions

    def want_intent(self, intent: Intent, sender: str, now: float) -> bool:
        """Store `intent` unless its key is known; a refused one whose time has come is wanted again, with the new
        arguments. Returns whether there is something new to do.
        """
        content = {
            "contract": intent.contract,
            "function": intent.function,
            "arguments": encode_values(intent.arguments),
            "value": uint256_text(intent.value),
        }
        with self.writing() as connection:
            known = (
                connection.execute(select(tables.intents).where(tables.intents.c.key == intent.key)).mappings().first()
            )
            if known is None:
                connection.execute(
                    insert(tables.intents).values(
                        key=intent.key,
                        sender=sender,
                        state=IntentState.WANTED,
                        attempts=0,
                        next_attempt_at=now,
                        created_at=now,
                        **content,
                    )
                )
                return True
            if known["state"] == IntentState.REFUSED and now >= known["next_attempt_at"]:
                # The nonce of the refused attempt is spent; its transactions keep it for the record.
                connection.execute(
                    update(tables.intents)
                    .where(tables.intents.c.key == intent.key)
                    .values(
                        state=IntentState.WANTED,
                        nonce=None,
                        transaction_hash=None,
                        mined_block_number=None,
                        mined_block_hash=None,
                        succeeded=None,
                        **content,
                    )
                )
                return True
        return False

    def intent(self, key: str) -> IntentRecord | None:
        with self.reading() as connection:
            row = connection.execute(select(tables.intents).where(tables.intents.c.key == key)).mappings().first()
        return None if row is None else _intent_record(row)

    def intents(self, states: Iterable[IntentState], limit: int, sender: str | None = None) -> list[IntentRecord]:
        """Intents in any of `states`, those with a nonce first and by nonce, then in the order they were wanted."""
        query = (
            select(tables.intents)
            .where(tables.intents.c.state.in_([str(item) for item in states]))
            .order_by(tables.intents.c.nonce.is_(None), tables.intents.c.nonce, tables.intents.c.sequence)
            .limit(limit)
        )
        if sender is not None:
            query = query.where(tables.intents.c.sender == sender)
        with self.reading() as connection:
            return [_intent_record(row) for row in connection.execute(query).mappings()]

    def intent_counts(self) -> dict[IntentState, int]:
        query = select(tables.intents.c.state, func.count()).group_by(tables.intents.c.state)
        with self.reading() as connection:
            return {IntentState(state): count for state, count in connection.execute(query)}

    def next_nonce(self, sender: str) -> int:
        """One more than the largest nonce ever signed for `sender`; 0 if there is none."""
        with self.reading() as connection:
            largest = connection.scalar(
                select(func.max(tables.transactions.c.nonce)).where(tables.transactions.c.sender == sender)
            )
        return 0 if largest is None else int(largest) + 1

    def has_nonce(self, sender: str, nonce: int) -> bool:
        """Whether an intent of `sender`, in any state, has this nonce."""
        query = select(tables.intents.c.sequence).where(
            tables.intents.c.sender == sender, tables.intents.c.nonce == nonce
        )
        with self.reading() as connection:
            return connection.scalar(query) is not None

    def assign_transaction(self, sequence: int, transaction: SignedTransaction) -> None:
        """Give a wanted intent its nonce and its signed transaction, in one transaction, before any broadcast."""
        with self.writing() as connection:
            row = (
                connection.execute(select(tables.intents).where(tables.intents.c.sequence == sequence)).mappings().one()
            )
            if row["state"] != IntentState.WANTED:
                raise StorageError(f"intent {row['key']} is {row['state']}, not wanted: it has its transaction already")
            connection.execute(
                update(tables.intents)
                .where(tables.intents.c.sequence == sequence)
                .values(
                    state=IntentState.SIGNED,
                    nonce=transaction.nonce,
                    transaction_hash=_hex(transaction.hash),
                    reason=None,
                )
            )
            connection.execute(
                insert(tables.transactions).values(**_transaction_row(sequence, row["sender"], transaction))
            )

    def add_replacement(self, sequence: int, transaction: SignedTransaction) -> None:
        """Another transaction for the same nonce, with higher fees, before its broadcast."""
        with self.writing() as connection:
            row = (
                connection.execute(select(tables.intents).where(tables.intents.c.sequence == sequence)).mappings().one()
            )
            if row["nonce"] != transaction.nonce:
                raise StorageError(f"intent {row['key']} has nonce {row['nonce']}, not {transaction.nonce}")
            connection.execute(
                insert(tables.transactions).values(**_transaction_row(sequence, row["sender"], transaction))
            )
            connection.execute(
                update(tables.intents)
                .where(tables.intents.c.sequence == sequence)
                .values(state=IntentState.SIGNED, transaction_hash=_hex(transaction.hash))
            )

    def transactions(self, sequence: int, nonce: int) -> list[SignedTransaction]:
        """The transactions signed for an intent under `nonce`, oldest first."""
        query = (
            select(tables.transactions)
            .where(tables.transactions.c.intent_sequence == sequence, tables.transactions.c.nonce == nonce)
            .order_by(tables.transactions.c.signed_at, tables.transactions.c.hash)
        )
        with self.reading() as connection:
            return [_transaction(row) for row in connection.execute(query).mappings()]

    def mark_sent(self, sequence: int, transaction_hash: bytes, now: float) -> None:
        with self.writing() as connection:
            connection.execute(
                update(tables.transactions)
                .where(tables.transactions.c.hash == _hex(transaction_hash))
                .values(broadcast_at=now)
            )
            connection.execute(
                update(tables.intents)
                .where(tables.intents.c.sequence == sequence, tables.intents.c.state == IntentState.SIGNED)
                .values(state=IntentState.SENT)
            )

    def mark_mined(
        self, sequence: int, transaction_hash: bytes, block_number: int, block_hash: bytes, succeeded: bool
    ) -> None:
        self._update_intent(
            sequence,
            state=IntentState.MINED,
            transaction_hash=_hex(transaction_hash),
            mined_block_number=block_number,
            mined_block_hash=_hex(block_hash),
            succeeded=int(succeeded),
        )

    def mark_unmined(self, sequence: int) -> None:
        """The receipt is gone (a reorganisation): the transaction must be mined again."""
        self._update_intent(
            sequence, state=IntentState.SENT, mined_block_number=None, mined_block_hash=None, succeeded=None
        )

    def mark_confirmed(self, sequence: int) -> None:
        self._update_intent(sequence, state=IntentState.CONFIRMED)

    def mark_refused(self, sequence: int, reason: str, attempts: int, next_attempt_at: float) -> None:
        """The contracts said no. It is tried again only when somebody still wants it after `next_attempt_at`."""
        self._update_intent(
            sequence, state=IntentState.REFUSED, reason=reason, attempts=attempts, next_attempt_at=next_attempt_at
        )

    def mark_nonce_lost(self, sequence: int) -> None:
        """Another program used the nonce: the intent needs a new one."""
        self._update_intent(sequence, state=IntentState.WANTED, nonce=None, transaction_hash=None)

    # -------------------------------------------------------------------------------------------------------- inside

    def _update_intent(self, sequence: int, **values: Any) -> None:
        with self.writing() as connection:
            connection.execute(update(tables.intents).where(tables.intents.c.sequence == sequence).values(**values))

    def _all(self, table: Table, kind: type[_A]) -> list[_A]:
        with self.reading() as connection:
            rows = connection.execute(select(table.c.document).order_by(table.c.key))
            return [decode_record(kind, row.document) for row in rows]

    def _one(self, table: Table, kind: type[_A], key: str) -> _A | None:
        with self.reading() as connection:
            document = connection.scalar(select(table.c.document).where(table.c.key == key))
        return None if document is None else decode_record(kind, document)

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection for one look, whose errors are those of this package."""
        with _translated(), self._engine.connect() as connection:
            yield connection.execution_options(bsns_read_only=True)

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """One transaction: all of it, or nothing."""
        with _translated(), self._write_lock, self._engine.begin() as connection:
            yield connection


_A = TypeVar("_A", NodeState, ModelState, DocumentState, PlanState, RequestState)


def uint256_text(value: int) -> str:
    """A uint256 as text that sorts like the number. No numeric column: SQLite would round it."""
    if not 0 <= value < 2**256:
        raise ValueError(f"{value} is not a uint256")
    return str(value).zfill(tables.UINT256_DIGITS)


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except DBAPIError as error:
        raise StorageUnavailableError(
            f"the database refused ({error.orig}): check its disk, its server and the URL; nothing was stored"
        ) from error
    except ArgumentError as error:
        raise StorageSettingsError(
            f"the database URL cannot be used ({error}): give a sqlite:/// or postgresql:// URL"
        ) from error
    except SQLAlchemyError as error:
        raise StorageError(f"the database cannot be used: {error}") from error
    except CommandError as error:
        raise StorageSettingsError(f"the database cannot be migrated: {error}") from error


def migration_engine(url: str) -> Engine:
    """An engine for `url`, for the plain `alembic` command."""
    with _translated():
        return _engine(url)


def _engine(url: str) -> Engine:
    """An engine for `url`; PostgreSQL by psycopg 3, SQLite with WAL and explicit transactions."""
    parsed = make_url(url)
    if parsed.drivername in ("postgresql", "postgres"):
        parsed = parsed.set(drivername="postgresql+psycopg")
    if parsed.get_backend_name() == "postgresql":
        return create_engine(parsed, pool_pre_ping=True)
    if parsed.get_backend_name() != "sqlite":
        raise StorageSettingsError(
            f"{parsed.get_backend_name()} is not supported: give a sqlite:/// or postgresql:// URL"
        )
    if parsed.database and parsed.database != ":memory:":
        Path(parsed.database).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(parsed, connect_args={"timeout": _SQLITE_BUSY_TIMEOUT_S, "check_same_thread": False})

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _record: Any) -> None:
        connection.isolation_level = None  # transactions begin below, not where the driver thinks
        for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def _begin(connection: Connection) -> None:
        # A deferred transaction that later writes can fail with "database is locked" whatever the timeout.
        read_only = connection.get_execution_options().get("bsns_read_only", False)
        connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")

    return engine


def _alembic_config(url: str) -> Config:
    config = Config()
    config.set_main_option("script_location", str(_MIGRATIONS))
    config.attributes["engine"] = lambda: _engine(url)
    config.attributes["metadata"] = tables.metadata
    return config


def _prune(connection: Connection, before: int) -> None:
    with_events = select(tables.events.c.block_hash)
    connection.execute(
        delete(tables.blocks).where(tables.blocks.c.number < before, tables.blocks.c.hash.not_in(with_events))
    )


def _load_aggregates(connection: Connection, keys: Iterable[AggregateKey]) -> dict[AggregateKey, Aggregate]:
    found: dict[AggregateKey, Aggregate] = {}
    for kind, key in keys:
        table = _AGGREGATE_TABLES[kind]
        document = connection.scalar(select(table.c.document).where(table.c.key == key))
        if document is not None:
            found[kind, key] = decode_record(AGGREGATE_TYPES[kind], document)
    return found


def _store_aggregates(connection: Connection, aggregates: Mapping[AggregateKey, Aggregate]) -> None:
    for (kind, key), item in aggregates.items():
        table = _AGGREGATE_TABLES[kind]
        values = {**_key_columns(item), "document": encode_record(item)}
        if not connection.execute(update(table).where(table.c.key == key).values(**values)).rowcount:
            connection.execute(insert(table).values(key=key, **values))


def _key_columns(item: Aggregate) -> dict[str, Any]:
    """The columns of an aggregate that queries use."""
    match item:
        case NodeState():
            return {"operator": item.operator, "staked": uint256_text(item.staked)}
        case ModelState():
            return {"name": item.name}
        case PlanState():
            return {"model_id": _hex(item.model_id), "publisher": item.publisher, "epoch": item.epoch}
        case RequestState():
            return {
                "requester": item.requester,
                "plan_id": _hex(item.plan_id),
                "status": int(item.status),
                "opened_block": item.opened_block,
                "deposit": uint256_text(item.deposit),
            }
        case _:
            return {}


def _history(
    connection: Connection, kind: AggregateKind | None = None, key: str | None = None
) -> list[tuple[ChainEvent, Block]]:
    query = (
        select(tables.events, tables.blocks.c.parent_hash, tables.blocks.c.timestamp)
        .join(tables.blocks, tables.blocks.c.hash == tables.events.c.block_hash)
        .order_by(tables.events.c.block_number, tables.events.c.log_index)
    )
    if kind is not None:
        query = query.where(tables.events.c.aggregate_kind == str(kind), tables.events.c.aggregate_key == key)
    return [event_of_row(row) for row in connection.execute(query).mappings()]


def event_of_row(row: RowMapping) -> tuple[ChainEvent, Block]:
    """An event with its block, of a row of `events` joined with parent_hash and timestamp of its block."""
    item = ChainEvent(
        contract=row["contract"],
        name=row["name"],
        arguments=decode_values(row["arguments"]),
        block_number=row["block_number"],
        block_hash=_bytes(row["block_hash"]),
        transaction_hash=_bytes(row["transaction_hash"]),
        log_index=row["log_index"],
    )
    return item, Block(item.block_number, item.block_hash, _bytes(row["parent_hash"]), row["timestamp"])


def _event_row(item: ChainEvent) -> dict[str, Any]:
    kind, key = aggregate_of(item)
    return {
        "block_hash": _hex(item.block_hash),
        "log_index": item.log_index,
        "block_number": item.block_number,
        "transaction_hash": _hex(item.transaction_hash),
        "contract": item.contract,
        "name": item.name,
        "aggregate_kind": str(kind),
        "aggregate_key": key,
        "arguments": encode_values(item.arguments),
    }


def block_of_row(row: RowMapping) -> Block:
    return Block(row["number"], _bytes(row["hash"]), _bytes(row["parent_hash"]), row["timestamp"])


def _intent_record(row: RowMapping) -> IntentRecord:
    return IntentRecord(
        sequence=row["sequence"],
        intent=Intent(row["key"], row["contract"], row["function"], decode_values(row["arguments"]), int(row["value"])),
        sender=row["sender"],
        state=IntentState(row["state"]),
        reason=row["reason"],
        attempts=row["attempts"],
        next_attempt_at=row["next_attempt_at"],
        nonce=row["nonce"],
        transaction_hash=None if row["transaction_hash"] is None else _bytes(row["transaction_hash"]),
        mined_block_number=row["mined_block_number"],
        mined_block_hash=None if row["mined_block_hash"] is None else _bytes(row["mined_block_hash"]),
        succeeded=None if row["succeeded"] is None else bool(row["succeeded"]),
        created_at=row["created_at"],
    )


def _transaction_row(sequence: int, sender: str, transaction: SignedTransaction) -> dict[str, Any]:
    return {
        "hash": _hex(transaction.hash),
        "intent_sequence": sequence,
        "sender": sender,
        "nonce": transaction.nonce,
        "fields": encode_values(transaction.fields),
        "raw": transaction.raw.hex(),
        "signed_at": transaction.signed_at,
        "broadcast_at": transaction.broadcast_at,
    }


def _transaction(row: RowMapping) -> SignedTransaction:
    return SignedTransaction(
        hash=_bytes(row["hash"]),
        nonce=row["nonce"],
        fields=decode_values(row["fields"]),
        raw=bytes.fromhex(row["raw"]),
        signed_at=row["signed_at"],
        broadcast_at=row["broadcast_at"],
    )


def _ticket_row(record: TicketRecord) -> dict[str, Any]:
    return {
        "request_id": _hex(record.request_id),
        "requester": record.requester,
        "number": record.number,
        "plan_id": _hex(record.plan_id),
        "state": str(record.state),
        "changed_at": record.changed_at,
        "charge": uint256_text(record.charge),
        "batch_id": None if record.batch_id is None else _hex(record.batch_id),
        "grant": record.grant,
        "collected": record.collected,
    }


def ticket_of_row(row: RowMapping) -> TicketRecord:
    return TicketRecord(
        RequestId(_bytes(row["request_id"])),
        row["requester"],
        row["number"],
        _bytes(row["plan_id"]),
        TicketState(row["state"]),
        row["changed_at"],
        int(row["charge"]),
        None if row["batch_id"] is None else _bytes(row["batch_id"]),
        bytes(row["grant"]),
        None if row["collected"] is None else bytes(row["collected"]),
    )


def _voucher_record(row: RowMapping) -> VoucherRecord:
    return VoucherRecord(
        _bytes(row["secret_hash"]),
        row["requester"],
        int(row["cumulative"]),
        bytes(row["message"]),
        None if row["secret"] is None else _bytes(row["secret"]),
        None if row["batch_id"] is None else _bytes(row["batch_id"]),
    )


def _batch_row(record: BatchRecord) -> dict[str, Any]:
    return {
        "batch_id": _hex(record.batch_id),
        "state": str(record.state),
        "changed_at": record.changed_at,
        "message": record.message,
        "consents": json.dumps({node: signature.hex() for node, signature in record.consents.items()}),
    }


def batch_of_row(row: RowMapping) -> BatchRecord:
    consents = {node: bytes.fromhex(signature) for node, signature in json.loads(row["consents"]).items()}
    return BatchRecord(
        _bytes(row["batch_id"]), BatchProgress(row["state"]), row["changed_at"], bytes(row["message"]), consents
    )


@lru_cache(maxsize=_PARSED_MEASUREMENTS)
def _parse_measurements(message: str) -> SignedMeasurements:
    """Of a stored message. Kept: all of a model's are asked for every few seconds, and few of them are new."""
    parsed = coordination_pb2.Measurements.FromString(bytes.fromhex(message))
    return SignedMeasurements(NodeMeasurements.from_message(parsed), bytes(parsed.signature))


def _hex(value: bytes) -> str:
    return "0x" + value.hex()


def _bytes(value: str) -> bytes:
    return bytes.fromhex(value[2:])
