"""What the explorer's pages read: lists a page long, and everything about one thing.

Promises that every list has a limit and a place to go on from, so that no page grows with the network. Reads only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import ColumnElement, Select, Text, cast, func, or_, select

from bsns.chain.client import Block, ChainEvent
from bsns.protocol.contract_states import RequestStatus
from bsns.protocol.identifiers import PlanId
from coordinator.documents import decode_record
from coordinator.network_state import AggregateKind, ModelState, PlanState, RequestState
from coordinator.storage import tables
from coordinator.storage.database import (
    BatchRecord,
    ChainPlace,
    Storage,
    TicketRecord,
    TicketState,
    batch_of_row,
    block_of_row,
    event_of_row,
    ticket_of_row,
)

END: Final[ChainPlace] = (2**62, 2**30)
"""A place behind everything."""
StampedEvent = tuple[ChainEvent, Block]


@dataclass(frozen=True, slots=True)
class BlockSummary:
    """A block, and how many events of our contracts it has."""

    block: Block
    events: int


class ExplorerQueries:
    """Reads of `storage`. Methods block: coroutines call them in a worker thread."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    # -- requests

    def requests(
        self,
        limit: int,
        before: tuple[int, str] | None = None,
        *,
        status: RequestStatus | None = None,
        requester: str | None = None,
        plan: bytes | None = None,
    ) -> list[RequestState]:
        """Requests on the chain, the newest first, beyond `before` (block and id of the last one seen)."""
        table = tables.requests
        query = select(table.c.document).order_by(table.c.opened_block.desc(), table.c.key.desc()).limit(limit)
        if before is not None:
            number, key = before
            query = query.where(
                or_(table.c.opened_block < number, (table.c.opened_block == number) & (table.c.key < key))
            )
        if status is not None:
            query = query.where(table.c.status == int(status))
        if requester is not None:
            query = query.where(table.c.requester == requester)
        if plan is not None:
            query = query.where(table.c.plan_id == _hex(plan))
        with self._storage.reading() as connection:
            return [decode_record(RequestState, row.document) for row in connection.execute(query)]

    def tickets(
        self,
        limit: int,
        before: tuple[int, str] | None = None,
        *,
        requester: str | None = None,
        batch: bytes | None = None,
    ) -> list[TicketRecord]:
        """Requests on tabs, those that changed last first, beyond `before` (time and id of the last one seen)."""
        table = tables.tab_tickets
        query = select(table).order_by(table.c.changed_at.desc(), table.c.request_id.desc()).limit(limit)
        if before is not None:
            at, key = before
            query = query.where(or_(table.c.changed_at < at, (table.c.changed_at == at) & (table.c.request_id < key)))
        if requester is not None:
            query = query.where(table.c.requester == requester)
        if batch is not None:
            query = query.where(table.c.batch_id == _hex(batch))
        with self._storage.reading() as connection:
            return [ticket_of_row(row) for row in connection.execute(query).mappings()]

    def ticket_counts(self) -> dict[TicketState, int]:
        """Number of requests on tabs by state."""
        table = tables.tab_tickets
        query = select(table.c.state, func.count()).group_by(table.c.state)
        with self._storage.reading() as connection:
            return {TicketState(state): count for state, count in connection.execute(query)}

    def batches(self, limit: int, before: tuple[int, str] | None = None) -> list[BatchRecord]:
        """Batches, those that changed last first."""
        table = tables.tab_batches
        query = select(table).order_by(table.c.changed_at.desc(), table.c.batch_id.desc()).limit(limit)
        if before is not None:
            at, key = before
            query = query.where(or_(table.c.changed_at < at, (table.c.changed_at == at) & (table.c.batch_id < key)))
        with self._storage.reading() as connection:
            return [batch_of_row(row) for row in connection.execute(query).mappings()]

    def batch(self, batch_id: bytes) -> BatchRecord | None:
        query = select(tables.tab_batches).where(tables.tab_batches.c.batch_id == _hex(batch_id))
        with self._storage.reading() as connection:
            row = connection.execute(query).mappings().first()
        return None if row is None else batch_of_row(row)

    # -- plans and models

    def models(self, limit: int) -> list[ModelState]:
        """Models by name."""
        query = select(tables.models.c.document).order_by(tables.models.c.name, tables.models.c.key).limit(limit)
        with self._storage.reading() as connection:
            return [decode_record(ModelState, row.document) for row in connection.execute(query)]

    def plans(self, limit: int, *, model: bytes | None = None, node: str | None = None) -> list[PlanState]:
        """Plans, the newest first; those of a model, or with a node."""
        table, events = tables.plans, tables.events
        query = (
            select(table.c.document)
            .join(events, (events.c.aggregate_key == table.c.key) & (events.c.name == "PlanPublished"))
            .order_by(events.c.block_number.desc(), events.c.log_index.desc())
            .limit(limit)
        )
        if model is not None:
            query = query.where(table.c.model_id == _hex(model))
        if node is not None:
            query = query.where(table.c.document.contains(node, autoescape=True))
        with self._storage.reading() as connection:
            return [decode_record(PlanState, row.document) for row in connection.execute(query)]

    # -- events and blocks

    def history_of(self, kind: AggregateKind, key: str, limit: int) -> list[StampedEvent]:
        """Events of one thing, the newest first."""
        mine = (tables.events.c.aggregate_kind == str(kind)) & (tables.events.c.aggregate_key == key)
        return self._events(mine, limit, END)

    def events(
        self, limit: int, before: ChainPlace = END, *, names: Sequence[str] = (), about: str | None = None
    ) -> list[StampedEvent]:
        """Events of certain names, or that mention an address or hash, the newest first."""
        table = tables.events
        wanted: list[ColumnElement[bool]] = [table.c.name.in_(names)] if names else []
        if about is not None:
            wanted.append(cast(table.c.arguments, Text).contains(about, autoescape=True))
        where: ColumnElement[bool] | None = None
        for item in wanted:
            where = item if where is None else where & item
        return self._events(where, limit, before)

    def events_of_block(self, number: int) -> list[StampedEvent]:
        """All events of a block, in order."""
        return self._events(tables.events.c.block_number == number, None, END)[::-1]

    def events_of_transaction(self, transaction: bytes) -> list[StampedEvent]:
        """All events of a transaction, in order."""
        return self._events(tables.events.c.transaction_hash == _hex(transaction), None, END)[::-1]

    def blocks(self, limit: int, before: int | None = None, *, with_events: bool = False) -> list[BlockSummary]:
        """Blocks, the newest first. Old ones without an event are not kept."""
        counted = (
            select(tables.events.c.block_number, func.count().label("events"))
            .group_by(tables.events.c.block_number)
            .subquery()
        )
        query = (
            select(tables.blocks, func.coalesce(counted.c.events, 0).label("events"))
            .join(counted, counted.c.block_number == tables.blocks.c.number, isouter=not with_events)
            .order_by(tables.blocks.c.number.desc())
            .limit(limit)
        )
        if before is not None:
            query = query.where(tables.blocks.c.number < before)
        with self._storage.reading() as connection:
            return [BlockSummary(block_of_row(row), row["events"]) for row in connection.execute(query).mappings()]

    def block_of_hash(self, block_hash: bytes) -> Block | None:
        query = select(tables.blocks).where(tables.blocks.c.hash == _hex(block_hash))
        with self._storage.reading() as connection:
            row = connection.execute(query).mappings().first()
        return None if row is None else block_of_row(row)

    def ticket_times(self, limit: int, states: Sequence[TicketState]) -> list[tuple[int, int, PlanId]]:
        """When requests on tabs in one of `states` changed, what they charge, and their plans; the newest first."""
        table = tables.tab_tickets
        query = (
            select(table.c.changed_at, table.c.charge, table.c.plan_id)
            .where(table.c.state.in_([str(item) for item in states]))
            .order_by(table.c.changed_at.desc())
            .limit(limit)
        )
        with self._storage.reading() as connection:
            return [
                (row.changed_at, int(row.charge), PlanId(bytes.fromhex(row.plan_id[2:])))
                for row in connection.execute(query)
            ]

    def _events(self, where: ColumnElement[bool] | None, limit: int | None, before: ChainPlace) -> list[StampedEvent]:
        table = tables.events
        number, index = before
        query: Select[Any] = (
            select(table, tables.blocks.c.parent_hash, tables.blocks.c.timestamp)
            .join(tables.blocks, tables.blocks.c.hash == table.c.block_hash)
            .where(or_(table.c.block_number < number, (table.c.block_number == number) & (table.c.log_index < index)))
            .order_by(table.c.block_number.desc(), table.c.log_index.desc())
        )
        if where is not None:
            query = query.where(where)
        if limit is not None:
            query = query.limit(limit)
        with self._storage.reading() as connection:
            return [event_of_row(row) for row in connection.execute(query).mappings()]


def _hex(value: bytes) -> str:
    return "0x" + value.hex()
