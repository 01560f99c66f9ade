"""Accounts and the explorer's queries on SQLite and on PostgreSQL: many at once, and lists that end and go on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest

from bsns.protocol.contract_states import RequestStatus
from bsns.protocol.identifiers import RequestId, address, keccak256
from coordinator.network_state import AggregateKind, RequestState
from coordinator.storage import (
    AccountBook,
    AccountKey,
    Charge,
    ChargeState,
    DuplicateError,
    ExplorerQueries,
    IdempotencyError,
    InsufficientBalanceError,
    KeyLimits,
    SpendingLimitError,
    Storage,
)
from tests.integration.coordinator_fixtures import database_url, empty_database_url, postgresql_server
from tests.integration.test_coordinator_storage import _busy_chain, _filled

__all__ = ["database_url", "empty_database_url", "postgresql_server"]

NOW = 1_800_000_000
THREADS = 8
NO_LIMITS = KeyLimits()
CUSTOMER = address((77).to_bytes(20, "big"))


def at_once(work: Callable[[int], Any], threads: int = THREADS) -> list[Any]:
    """What `work` gave or raised in each thread, all begun together."""
    barrier, results = threading.Barrier(threads), [None] * threads

    def run(number: int) -> None:
        barrier.wait()
        try:
            results[number] = work(number)
        except Exception as error:
            results[number] = error

    workers = [threading.Thread(target=run, args=(number,)) for number in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return results


def funded(book: AccountBook, wei: int, limits: KeyLimits = NO_LIMITS) -> AccountKey:
    account = book.open_account("somebody", None, NOW)
    if wei:
        book.deposit(account.account_id, wei, f"t-{account.account_id}", NOW)
    return book.create_key(account.account_id, "key", limits, NOW)[1]


def hold(book: AccountBook, key: AccountKey, wei: int, idempotency: str | None = None) -> Charge:
    return book.hold(key, wei, model="m", body_hash="b", idempotency_key=idempotency, now=NOW)


def test_no_more_is_spent_than_there_is_however_many_ask_at_once(database_url: str) -> None:
    storage = Storage(database_url)
    try:
        book = AccountBook(storage)
        key = funded(book, 50)
        found = at_once(lambda _number: hold(book, key, 10))
        assert [type(item) for item in found].count(Charge) == 5
        assert [type(item) for item in found].count(InsufficientBalanceError) == 3
        account = book.account(key.account_id)
        assert account is not None
        assert account.balance == 0
        assert book.owed() == 50
    finally:
        storage.close()


def test_limit_of_a_key_holds_however_many_ask_at_once(database_url: str) -> None:
    storage = Storage(database_url)
    try:
        book = AccountBook(storage)
        key = funded(book, 1_000, KeyLimits(per_day=30))
        found = at_once(lambda _number: hold(book, key, 10))
        assert [type(item) for item in found].count(Charge) == 3
        assert [type(item) for item in found].count(SpendingLimitError) == 5
    finally:
        storage.close()


def test_one_idempotency_key_is_one_charge_however_many_ask_at_once(database_url: str) -> None:
    storage = Storage(database_url)
    try:
        book = AccountBook(storage)
        key = funded(book, 1_000)
        found = at_once(lambda _number: hold(book, key, 10, "same"))
        (charge,) = [item for item in found if isinstance(item, Charge)]
        assert [type(item) for item in found].count(IdempotencyError) == THREADS - 1
        price = {RequestId(keccak256(b"r")): 7}
        settled = at_once(lambda _number: book.settle(charge.charge_id, price, "kept", NOW))
        assert {(item.state, item.charged) for item in settled} == {(ChargeState.CHARGED, 7)}
        account = book.account(key.account_id)
        assert account is not None
        assert account.balance == 993
        assert sum(at_once(lambda _number: book.refund(RequestId(keccak256(b"r")), NOW))) == 7
        assert hold(book, key, 10, "same").response == "kept"
        assert book.forget_responses(NOW + 1) == 1
        assert hold(book, key, 10, "same").state is ChargeState.HELD
    finally:
        storage.close()


def test_deposit_address_and_signature_count_once_however_many_claim_them(database_url: str) -> None:
    storage = Storage(database_url)
    try:
        book = AccountBook(storage)
        opened = at_once(lambda _number: book.open_account("somebody", CUSTOMER, NOW))
        (account,) = [item for item in opened if not isinstance(item, Exception)]
        assert all(isinstance(item, DuplicateError) for item in opened if isinstance(item, Exception))
        credited = at_once(lambda _number: book.deposit(account.account_id, 5, "0x" + "ab" * 32, NOW))
        assert [type(item) for item in credited].count(DuplicateError) == THREADS - 1
        proof = keccak256(b"signed")
        made = at_once(lambda _number: book.create_key(account.account_id, "k", NO_LIMITS, NOW, proof=proof))
        assert [type(item) for item in made].count(DuplicateError) == THREADS - 1
        after = book.account_of(CUSTOMER)
        assert after is not None
        assert after.balance == 5
        taken = at_once(lambda _number: book.withdraw(account.account_id, 5, NOW))
        assert [type(item) for item in taken].count(InsufficientBalanceError) == THREADS - 1
        assert len(book.open_withdrawals()) == 1
        assert book.owed() == 5
    finally:
        storage.close()


@pytest.mark.parametrize("limit", [1, 3, 7])
def test_lists_of_the_explorer_go_on_where_they_stopped(database_url: str, limit: int) -> None:
    chain = _busy_chain(21, 60)
    storage = _filled(database_url, chain)
    try:
        queries = ExplorerQueries(storage)
        state = storage.network_state()
        seen: list[RequestState] = []
        before: tuple[int, str] | None = None
        while page := queries.requests(limit, before):
            assert len(page) <= limit
            seen += page
            before = page[-1].opened_block, "0x" + page[-1].request_id.hex()
        assert {item.request_id for item in seen} == {item.request_id for item in state.requests.values()}
        assert len(seen) == len(state.requests) > 3
        assert [item.opened_block for item in seen] == sorted((item.opened_block for item in seen), reverse=True)
        events, place = [], (2**62, 2**30)
        while found := queries.events(limit, place):
            events += found
            place = found[-1][0].block_number, found[-1][0].log_index
        assert events == chain.history()[::-1]
        blocks, last = [], None
        while summaries := queries.blocks(limit, last, with_events=True):
            blocks += summaries
            last = summaries[-1].block.number
        assert sum(item.events for item in blocks) == len(events)
    finally:
        storage.close()


def test_explorer_finds_what_belongs_to_one_thing(database_url: str) -> None:
    chain = _busy_chain(22, 60)
    storage = _filled(database_url, chain)
    try:
        queries, state = ExplorerQueries(storage), storage.network_state()
        history = chain.history()
        for node in state.nodes:
            mine = queries.history_of(AggregateKind.NODE, node, 1_000)
            assert mine == [item for item in history if item[0].arguments.get("node") == node
                            and item[0].contract == "NodeRegistry"][::-1]  # fmt: skip
        for status in {item.status for item in state.requests.values()}:
            found = queries.requests(1_000, status=RequestStatus(status))
            assert len(found) == sum(item.status == status for item in state.requests.values())
        event, block = history[-1]
        assert (event, block) in queries.events_of_block(block.number)
        assert (event, block) in queries.events_of_transaction(event.transaction_hash)
        assert queries.block_of_hash(block.hash) == block
        assert queries.block_of_hash(bytes(32)) is None
        names = queries.events(1_000, names=("NodeRegistered",))
        assert {item[0].name for item in names} == {"NodeRegistered"}
        one = next(iter(state.nodes))
        assert all(one in str(item[0].arguments) for item in queries.events(1_000, about=one))
        # Wildcards of LIKE are characters like others.
        assert queries.events(10, about="%") == []
    finally:
        storage.close()
