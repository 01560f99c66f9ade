"""The same promises of the database on SQLite and on PostgreSQL, and migrations up and down with data in the tables."""

from __future__ import annotations

import asyncio
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import event as sqlalchemy_event
from sqlalchemy import inspect, text

from bsns.chain.client import Block
from bsns.planning.topology import Snapshot
from bsns.protocol.contract_states import RequestStatus
from bsns.protocol.identifiers import ModelId, PlanId, RequestId, address, keccak256
from bsns.protocol.measurements import NodeMeasurements, UnitTiming
from bsns.protocol.planning_record import SignedMeasurements
from coordinator import storage as storage_module
from coordinator.dispatch import PlanPolicy
from coordinator.dispatch.plan_publication import planning_record
from coordinator.network_state import DocumentState, NetworkState, fold
from coordinator.service import take_writers_place
from coordinator.storage import (
    AnotherWriterError,
    Intent,
    IntentState,
    OutdatedSchemaError,
    SignedTransaction,
    Storage,
    StorageError,
    StorageSettingsError,
    StorageUnavailableError,
    TopologySnapshot,
    migrate,
    uint256_text,
)
from tests.integration.coordinator_fixtures import database_url, empty_database_url, postgresql_server
from tests.property.test_coordinator_follower import deployment_of
from tests.simulated_chain import NewEvent, SimulatedChain, Traffic

__all__ = ["database_url", "empty_database_url", "postgresql_server"]

_SENDER = address((1).to_bytes(20, "big"))
_HUGE = 2**256 - 1


def _filled(database_url: str, chain: SimulatedChain) -> Storage:
    """A storage that has followed `chain`."""
    storage = Storage(database_url)
    storage.bind(deployment_of(chain))
    _append(storage, chain, 1)
    return storage


def _append(storage: Storage, chain: SimulatedChain, first: int) -> None:
    events: dict[int, list[Any]] = {}
    blocks: dict[int, Block] = {}
    for event, block in chain.history():
        events.setdefault(block.number, []).append(event)
    for content in chain._chain:
        blocks[content.block.number] = content.block
    for number in range(first, chain.height + 1):
        storage.append_block(blocks[number], events.get(number, []))


def _busy_chain(seed: int, blocks: int) -> SimulatedChain:
    chain, traffic = SimulatedChain(), Traffic(seed)
    for _ in range(blocks):
        chain.mine(traffic.block(chain))
    return chain


def test_storage_after_blocks_and_a_rollback_holds_the_fold_of_what_is_left(database_url: str) -> None:
    chain, traffic = _busy_chain(11, 30), Traffic(12, first_identity=1_000)
    storage = _filled(database_url, chain)
    try:
        assert storage.network_state() == fold(NetworkState(), chain.history())
        chain.reorganise(12)
        ancestor = chain.height
        rollback = storage.roll_back(ancestor)
        assert rollback.orphaned_blocks == 12
        assert storage.history() == chain.history()
        assert storage.network_state() == fold(NetworkState(), chain.history())
        for _ in range(15):
            chain.mine(traffic.block(chain))
        _append(storage, chain, ancestor + 1)
        assert storage.network_state() == fold(NetworkState(), chain.history())
        cursor = storage.cursor()
        assert cursor is not None
        assert cursor.number == chain.height
    finally:
        storage.close()


def test_storage_keeps_integers_of_256_bits_exactly(database_url: str) -> None:
    chain = SimulatedChain()
    node = address(bytes([3]) * 20)
    registered: NewEvent = (
        "NodeRegistry",
        "NodeRegistered",
        {
            "node": node,
            "operator": node,
            "staked": _HUGE,
            "activeFrom": 1,
            "certificateHash": bytes(32),
            "endpoint": "é:1",
        },
    )
    chain.mine([registered])
    storage = _filled(database_url, chain)
    try:
        found = storage.node(node)
        assert found is not None
        assert (found.staked, found.endpoint) == (_HUGE, "é:1")
        with storage._engine.connect() as connection:
            assert connection.execute(text("select staked from nodes")).scalar_one() == uint256_text(_HUGE)
        storage.want_intent(Intent("k", "C", "f", (_HUGE, bytes([1]), ((-1,),)), _HUGE), _SENDER, 1.0)
        record = storage.intent("k")
        assert record is not None
        assert record.intent == Intent("k", "C", "f", (_HUGE, bytes([1]), ((-1,),)), _HUGE)
    finally:
        storage.close()


def test_block_whose_storing_fails_half_way_leaves_nothing_behind(database_url: str) -> None:
    chain = _busy_chain(21, 8)
    storage = _filled(database_url, chain)
    traffic = Traffic(22, first_identity=1_000)
    chain.mine(traffic.block(chain))
    while len(chain.history()) == len(storage.history()):
        chain.mine(traffic.block(chain))
    before = (storage.cursor(), storage.history(), storage.network_state())
    left: list[int] = []

    def fail(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if left and statement.upper().startswith(("INSERT", "UPDATE")):
            left[0] -= 1
            if left[0] == 0:
                left.clear()
                # The driver's own error, as a full disk or a lost connection raises it.
                raise _driver_error(storage)("no space left on device")

    sqlalchemy_event.listen(storage._engine, "before_cursor_execute", fail)
    try:
        for writes in range(1, 4):
            left[:] = [writes]
            cursor = storage.cursor()
            assert cursor is not None
            with pytest.raises(StorageError):
                _append(storage, chain, cursor.number + 1)
            assert (storage.cursor(), storage.history(), storage.network_state()) == before
        _append(storage, chain, 9)
        assert storage.network_state() == fold(NetworkState(), chain.history())
    finally:
        storage.close()


def _driver_error(storage: Storage) -> type[Exception]:
    if storage._engine.dialect.name == "sqlite":
        import sqlite3

        return sqlite3.OperationalError
    import psycopg

    return psycopg.OperationalError


def test_block_that_does_not_follow_the_cursor_is_refused(database_url: str) -> None:
    chain = _busy_chain(31, 3)
    storage = _filled(database_url, chain)
    try:
        stray = Block(chain.height + 1, bytes([1]) * 32, bytes([2]) * 32, 5)
        with pytest.raises(StorageError, match="does not follow"):
            storage.append_block(stray, [])
        with pytest.raises(StorageError, match="not stored"):
            storage.roll_back(99)
    finally:
        storage.close()


def test_queries_on_requests_and_plans_narrow_as_asked(database_url: str) -> None:
    chain = _busy_chain(41, 40)
    model, publisher = bytes([5]) * 32, address(bytes([6]) * 20)
    for epoch in (1, 0, 2):
        arguments = {
            "planId": bytes([epoch]) * 32,
            "modelId": model,
            "publisher": publisher,
            "epoch": epoch,
            "effectiveAt": 1,
            "feePerToken": 2**128 - 1,
            "root": bytes(32),
            "measurementsHash": bytes(32),
            "assignments": ((0, 0, 0, 3, address(bytes(20)), 1, bytes(32)),),
        }
        chain.mine([("ShardAssignments", "PlanPublished", arguments)])
    storage = _filled(database_url, chain)
    try:
        state = fold(NetworkState(), chain.history())
        unfinished = {item.request_id for item in state.requests.values() if not item.status.is_finished}
        assert {item.request_id for item in storage.unfinished_requests(1_000)} == unfinished
        assert len(storage.unfinished_requests(2)) == 2
        counts = storage.request_counts()
        assert sum(counts.values()) == len(state.requests)
        assert set(counts) <= set(RequestStatus)
        assert [item.epoch for item in storage.plans(ModelId(model), publisher)] == [0, 1, 2]
        assert storage.plans(ModelId(bytes(32))) == []
        plan = storage.plan(PlanId(bytes([2]) * 32))
        assert plan is not None
        assert plan.fee_per_token == 2**128 - 1
        assert plan.shard_plan.stage_count == 1
        assert storage.request(RequestId(bytes([99]) * 32)) is None
        assert storage.nodes() == state.nodes
    finally:
        storage.close()


def test_finished_requests_come_in_the_order_of_the_chain_and_leave_with_their_blocks(database_url: str) -> None:
    chain = _busy_chain(31, 60)
    storage = _filled(database_url, chain)
    try:
        ends = [
            ((block.number, event.log_index), "0x" + bytes(event.arguments["requestId"]).hex())
            for event, block in chain.history()
            if event.name in ("RequestSettled", "RequestRefunded")
        ]
        assert len(ends) > 4
        found = storage.finished_requests((-1, -1), 1_000)
        assert [(place, "0x" + request.request_id.hex()) for place, request in found] == ends
        assert all(request.status.is_finished for _, request in found)
        assert storage.finished_requests((-1, -1), 3) == found[:3]
        assert storage.finished_requests(found[2][0], 2) == found[3:5]
        chain.reorganise(30)
        storage.roll_back(chain.height)
        left = [place for place, _ in storage.finished_requests((-1, -1), 1_000)]
        assert left == [place for place, _ in ends if place[0] <= chain.height]
    finally:
        storage.close()


def test_headers_without_events_are_dropped_beyond_the_kept_depth(database_url: str) -> None:
    chain, traffic = SimulatedChain(), Traffic(51)
    for number in range(1, 1_030):
        chain.mine(traffic.block(chain) if number % 100 == 0 else ())
    storage = Storage(database_url, keep_blocks=64)
    try:
        storage.bind(deployment_of(chain))
        _append(storage, chain, 1)
        assert storage.block_at(500) is not None or not any(b.number == 500 for _, b in chain.history())
        assert storage.block_at(501) is None
        assert storage.block_at(1_020) is not None
        assert storage.network_state() == fold(NetworkState(), chain.history())
    finally:
        storage.close()


def test_intents_from_wanted_to_confirmed_and_back_after_a_rollback(database_url: str) -> None:
    chain = _busy_chain(61, 5)
    storage = _filled(database_url, chain)
    try:
        intent = Intent("a", "C", "f", ())
        assert storage.want_intent(intent, _SENDER, 1.0)
        assert not storage.want_intent(intent, _SENDER, 2.0)
        [record] = storage.intents([IntentState.WANTED], 9)
        transaction = SignedTransaction(bytes([1]) * 32, 7, {"nonce": 7, "data": b"x"}, b"raw", 1.0)
        storage.assign_transaction(record.sequence, transaction)
        assert storage.next_nonce(_SENDER) == 8
        assert storage.next_nonce(address(bytes(20))) == 0
        with pytest.raises(StorageError, match="not wanted"):
            storage.assign_transaction(record.sequence, transaction)
        assert storage.transactions(record.sequence, 7) == [transaction]
        storage.mark_sent(record.sequence, transaction.hash, 2.0)
        storage.mark_mined(record.sequence, transaction.hash, 4, bytes([4]) * 32, True)
        storage.mark_confirmed(record.sequence)
        assert storage.intent_counts() == {IntentState.CONFIRMED: 1}
        assert storage.roll_back(3).reopened_intents == 1
        [reopened] = storage.intents([IntentState.SENT], 9)
        assert (reopened.nonce, reopened.mined_block_number, reopened.succeeded) == (7, None, None)
        storage.mark_refused(record.sequence, "because", 1, 10.0)
        assert not storage.want_intent(intent, _SENDER, 9.0)
        assert storage.want_intent(Intent("a", "C", "f", (1,)), _SENDER, 10.0)
        wanted = storage.intent("a")
        assert wanted is not None
        assert (wanted.state, wanted.nonce, wanted.intent.arguments) == (IntentState.WANTED, None, (1,))
        assert storage.next_nonce(_SENDER) == 8
    finally:
        storage.close()


def test_one_nonce_never_belongs_to_two_intents(database_url: str) -> None:
    storage = Storage(database_url)
    try:
        for key in ("a", "b"):
            storage.want_intent(Intent(key, "C", "f", ()), _SENDER, 1.0)
        first, second = storage.intents([IntentState.WANTED], 9)
        storage.assign_transaction(first.sequence, SignedTransaction(bytes([1]) * 32, 0, {}, b"1", 1.0))
        with pytest.raises(StorageError):
            storage.assign_transaction(second.sequence, SignedTransaction(bytes([2]) * 32, 0, {}, b"2", 1.0))
        record = storage.intent("b")
        assert record is not None
        assert (record.state, record.nonce) == (IntentState.WANTED, None)
        assert storage.transactions(second.sequence, 0) == []
    finally:
        storage.close()


def test_measurements_keep_the_latest_with_its_signature(database_url: str) -> None:
    model = ModelId(bytes([8]) * 32)
    storage = Storage(database_url)
    try:
        for number, at in ((1, 5), (2, 5), (1, 9), (1, 7)):
            item = _signed(model, number, at)
            storage.keep_measurements(item.measurements, item.signature)
        expected = (_signed(model, 1, 9), _signed(model, 2, 5))
        assert storage.measurements(model) == {item.measurements.node: item for item in expected}
        assert storage.measurements(ModelId(bytes(32))) == {}
    finally:
        storage.close()


def test_planning_record_is_kept_by_its_hash_whatever_is_measured_later(database_url: str) -> None:
    model = ModelId(bytes([8]) * 32)
    policy = PlanPolicy(fee_per_token=1, replicas=2)
    record = planning_record(model, [_signed(model, number, 5) for number in (2, 1)], policy)
    storage = Storage(database_url)
    try:
        for _ in range(2):
            storage.keep_planning_record(record)
        later = _signed(model, 1, 6)
        storage.keep_measurements(later.measurements, later.signature)
        assert storage.planning_record(record.hash) == record
        assert storage.planning_record(bytes(32)) is None
    finally:
        storage.close()


def test_topologies_keep_the_newest_and_the_first_of_each_class(database_url: str) -> None:
    model = ModelId(bytes([8]) * 32)
    storage = Storage(database_url)
    try:
        nodes = (address(bytes([1]) * 20), address(bytes([2]) * 20))
        for number, of_class in enumerate((0, 1, 0, 2, 1)):
            bars = (np.array([[0.0, np.inf], [0.001, number + 1.0]]), np.empty((0, 2)))
            snapshot = Snapshot(nodes, 2, bars, (0, 1), ((0, 1),), 0.5, number + 1.0)
            storage.keep_topology(TopologySnapshot(model, number, of_class, snapshot), keep=4)
        kept = storage.topologies(model, 3)
        assert [(item.taken_at, item.class_number) for item in kept] == [(4, 1), (3, 2), (2, 0)]
        assert (kept[0].snapshot.nodes, kept[0].snapshot.bridges) == (nodes, ((0, 1),))
        assert kept[0].snapshot.longest(0, 1) == [(0.001, 5.0)]
        assert len(storage.topologies(model, 100)) == 4
        firsts = [(number, item.tree_length) for number, item in storage.topology_classes(model, 2)]
        assert firsts == [(2, 4.0), (0, 3.0)]
        assert storage.topologies(ModelId(bytes(32)), 100) == []
    finally:
        storage.close()


def test_announced_document_is_known_by_its_hash_until_a_rollback(database_url: str) -> None:
    chain = SimulatedChain()
    chain.mine([])
    document = b"manifest" * 100
    arguments = {"documentHash": keccak256(document), "document": document}
    chain.mine([("ShardAssignments", "DocumentAnnounced", arguments)])
    storage = _filled(database_url, chain)
    try:
        assert storage.document(keccak256(document)) == DocumentState(keccak256(document), len(document))
        assert storage.document(bytes(32)) is None
        storage.roll_back(1)
        assert storage.document(keccak256(document)) is None
    finally:
        storage.close()


def _signed(model: ModelId, number: int, at: int) -> SignedMeasurements:
    node = address(bytes([number]) * 20)
    timings = (UnitTiming("block", at, at, at, at),)
    return SignedMeasurements(NodeMeasurements(model, node, at, bytes(32), 5, timings), bytes([at]) * 65)


def test_second_writer_is_refused_until_the_first_is_gone(database_url: str) -> None:
    first, second = Storage(database_url), Storage(database_url)
    try:
        first.become_writer()
        with pytest.raises(AnotherWriterError):
            second.become_writer()
        first.close()
        second.become_writer()
    finally:
        first.close()
        second.close()


async def test_standby_waits_for_the_writers_place_and_takes_it(database_url: str) -> None:
    first, second = Storage(database_url), Storage(database_url)
    try:
        first.become_writer()
        with pytest.raises(AnotherWriterError):
            await take_writers_place(second, standby=False, poll_seconds=0.01)
        waiting = asyncio.ensure_future(take_writers_place(second, standby=True, poll_seconds=0.01))
        done, _ = await asyncio.wait((waiting,), timeout=0.3)
        assert not done, "the place is taken"
        first.close()
        await asyncio.wait_for(waiting, 20)
        third = Storage(database_url)
        with pytest.raises(AnotherWriterError):
            third.become_writer()
        third.close()
    finally:
        first.close()
        second.close()


def test_writer_that_lost_its_place_with_its_connection_notices(database_url: str) -> None:
    first, second = Storage(database_url), Storage(database_url)
    try:
        first.become_writer()
        first.require_writer()
        if first._writer is None:
            return  # SQLite: a file lock, which no server can take away
        backend = first._writer.scalar(text("select pg_backend_pid()"))
        with second._engine.connect() as connection:
            connection.execute(text("select pg_terminate_backend(:pid)"), {"pid": backend})
        # Nobody was faster: the place is its own again.
        first.require_writer()
        backend = first._writer.scalar(text("select pg_backend_pid()"))
        with second._engine.connect() as connection:
            connection.execute(text("select pg_terminate_backend(:pid)"), {"pid": backend})
        deadline = time.monotonic() + 20
        while True:
            try:
                second.become_writer()
                break
            except AnotherWriterError:
                assert time.monotonic() < deadline, "the server frees the lock of a connection that is gone"
        with pytest.raises(AnotherWriterError):
            first.require_writer()
    finally:
        first.close()
        second.close()


def test_migrations_up_and_down_with_data_give_the_tables_of_the_code(empty_database_url: str) -> None:
    url = empty_database_url
    migrate(url)
    chain = _busy_chain(71, 12)
    for document in (b"one", b"other", b"one"):
        arguments = {"documentHash": keccak256(document), "document": document}
        chain.mine([("ShardAssignments", "DocumentAnnounced", arguments)])
    storage = _filled(url, chain)
    storage.want_intent(Intent("a", "C", "f", ()), _SENDER, 1.0)
    with storage._engine.connect() as connection:
        # What the migrations made is what the queries expect.
        assert compare_metadata(MigrationContext.configure(connection), storage_module.metadata) == []
    storage.require_current_schema()
    storage.close()
    migrate(url, "0001")
    migrate(url)
    storage = Storage(url)
    assert storage.history() == chain.history()
    assert storage.network_state() == fold(NetworkState(), chain.history())
    assert storage.intent("a") is not None
    storage.close()
    migrate(url, "base")
    storage = Storage(url)
    assert set(inspect(storage._engine).get_table_names()) <= {"alembic_version"}
    with pytest.raises(OutdatedSchemaError, match="migrate"):
        storage.require_current_schema()
    storage.close()
    migrate(url)
    storage = _filled(url, chain)
    assert storage.network_state() == fold(NetworkState(), chain.history())
    storage.close()


def test_database_that_cannot_be_reached_is_an_error_that_says_so(tmp_path: Any) -> None:
    with pytest.raises(StorageError, match="not supported"):
        Storage("mysql://somewhere/x")
    with pytest.raises(StorageError):
        Storage("no url at all")
    folder = tmp_path / "database"
    folder.mkdir()
    unreachable = Storage(f"sqlite:///{folder}")
    try:
        with pytest.raises(StorageUnavailableError, match="the database refused"):
            unreachable.cursor()
    finally:
        unreachable.close()


def test_uint256_text_sorts_as_numbers_do() -> None:
    numbers = [random.Random(1).randrange(2**256) for _ in range(50)] + [0, _HUGE]
    assert sorted(numbers) == [int(item) for item in sorted(uint256_text(number) for number in numbers)]
    for wrong in (-1, 2**256):
        with pytest.raises(ValueError, match="uint256"):
            uint256_text(wrong)


def test_reading_creates_no_database(tmp_path: Path) -> None:
    with pytest.raises(StorageSettingsError, match="there is no database"):
        Storage.of_existing(f"sqlite:///{tmp_path / 'nothing' / 'here.sqlite'}")
    assert not list(tmp_path.iterdir())
