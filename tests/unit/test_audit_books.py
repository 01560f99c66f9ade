"""What the auditor's books call each thing, and what they complain about."""

from __future__ import annotations

import dataclasses
import gc
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest

from bsns.audit import AuditError
from bsns.audit.block_report import first_difference
from bsns.audit.books import BONDS, FOR_EVER, JUDGEMENTS, RUNNING, SETTLEMENTS, SLASHES, Books
from bsns.audit.entries import Entries
from tests.contract_model import BOND, TREASURY, ContractModel, Transaction, account, hash_of

NODE, OTHER, OPERATOR, SECOND, REQUESTER, CHALLENGER = (account(number) for number in range(1, 7))
REQUEST = hash_of("request")


def kept(transactions: Sequence[Transaction], cut: int = 0, now: int = 0) -> Entries:
    books = Books(7)
    for number, transaction in enumerate(transactions):
        if number == cut:
            books.open_range()
        books.apply(transaction)
    if cut >= len(transactions):
        books.open_range()
    return books.close_range(now)


def enter(books: Books, transactions: Sequence[Transaction]) -> None:
    for transaction in transactions:
        books.apply(transaction)


def failed(transactions: Sequence[Transaction]) -> dict[str, list[str]]:
    books = Books(7)
    enter(books, transactions)
    return {name: list(problems) for name, problems, count, _ in books.outcomes() if count}


def with_request(deposit: int = 1_000) -> ContractModel:
    model = ContractModel()
    model.register(NODE, OPERATOR, 500)
    model.register(OTHER, SECOND, 700)
    model.open(REQUEST, REQUESTER, deposit)
    model.route(REQUEST, [NODE])
    return model


def changed(
    model: ContractModel, name: str, change: Callable[[dict[str, Any]], None], nth: int = 0
) -> list[Transaction]:
    """The history with the arguments of the nth event of that name changed."""
    found, seen = [], -1
    for transaction in model.transactions:
        events = []
        for event in transaction:
            seen += event.name == name
            if event.name == name and seen == nth:
                arguments = dict(event.arguments)
                change(arguments)
                event = dataclasses.replace(event, arguments=arguments)
            events.append(event)
        found.append(tuple(events))
    return found


def test_settlement_says_who_was_credited_as_what() -> None:
    model = with_request()
    model.settle(REQUEST, [OPERATOR, SECOND], [SECOND], [10, 300, 200, 40])
    entries = kept(model.transactions)
    assert [(item.role, item.account, item.amount) for item in entries.credits] == [
        ("protocol", TREASURY, 10),
        ("executor", OPERATOR, 300),
        ("executor", SECOND, 200),
        ("verifier", SECOND, 40),
        ("requester", REQUESTER, 450),
    ]
    (request,) = entries.requests
    assert request.ending is not None
    assert (request.status, request.ending.because) == ("Settled", "settled")
    assert (request.ending.paid_to_executors, request.ending.paid_to_verifiers) == (500, 40)
    assert [step.status for step in request.steps] == ["Open", "Routed"]


def test_refund_after_the_deadline_and_refund_by_verdict_are_told_apart() -> None:
    expired, judged = with_request(), with_request()
    expired.claim_refund(REQUEST)
    judged.tally(REQUEST, 1, 3, rejects=True)
    endings = [kept(model.transactions).requests[0].ending for model in (expired, judged)]
    assert [item and item.because for item in endings] == ["expired", "verdict"]
    sums = [kept(model.transactions).totals for model in (expired, judged)]
    assert [(item.refunded_after_expiry, item.refunded_by_verdict) for item in sums] == [(1_000, 0), (0, 1_000)]


@pytest.mark.parametrize(("now", "status"), [(200, "Routed"), (201, "Expired")])
def test_request_that_waits_beyond_its_deadline_is_expired(now: int, status: str) -> None:
    assert kept(with_request().transactions, now=now).requests[0].status == status


def test_slash_names_its_judgement_and_where_the_stake_went() -> None:
    model = with_request()
    model.tally(REQUEST, 2, 3, slashed=NODE, amount=250, rewards=[(SECOND, 25), (CHALLENGER, 20)])
    entries = kept(model.transactions)
    (slash,), (jailing,) = entries.slashes, entries.jailings
    assert (slash.node, slash.operator, slash.reason, slash.amount) == (NODE, OPERATOR, "IncorrectOutput", 250)
    assert slash.burned == 250 - 25 - 20
    assert [(item.account, item.amount) for item in slash.rewards] == [(SECOND, 25), (CHALLENGER, 20)]
    assert (slash.request_id, slash.stage) == (REQUEST, 2)
    assert slash.judgement is not None
    assert slash.judgement.transaction == slash.at.transaction == model.transactions[-1][0].transaction_hash
    assert (jailing.node, jailing.reason, jailing.stage) == (NODE, "IncorrectOutput", 2)
    assert [item.role for item in entries.credits] == ["slash reward", "slash reward"]
    assert entries.nodes[0].status == "Jailed"


def test_jailing_without_a_slash_is_for_silence() -> None:
    model = with_request()
    model.tally(REQUEST, 0, 1, silent=[OTHER])
    (jailing,) = kept(model.transactions).jailings
    assert (jailing.node, jailing.reason, jailing.request_id) == (OTHER, "Silence", REQUEST)


@pytest.mark.parametrize("kind", ["upheld", "refuted", "returned", None])
def test_challenge_says_how_it_ended(kind: str | None) -> None:
    model = with_request()
    model.challenge(REQUEST, 1, CHALLENGER)
    if kind == "returned":
        model.claim_refund(REQUEST)
    elif kind is not None:
        model.tally(REQUEST, 1, 1, members=[OPERATOR, SECOND], upheld=kind == "upheld")
    # The bond was put down before the range begins, except where the challenge is still open.
    entries = kept(model.transactions, cut=0 if kind is None else 5)
    entries = dataclasses.replace(
        entries, credits=tuple(item for item in entries.credits if item.contract == "OutputVerification")
    )
    ((challenge,),) = [item.challenges for item in entries.verdicts]
    assert (challenge.outcome, challenge.stage, challenge.bond) == (kind, 1, BOND)
    assert challenge.at.transaction == model.transactions[4][0].transaction_hash
    sums = entries.totals
    expected = (0, BOND, 0, BOND) if kind is None else (BOND, 0, BOND, 0)
    assert (sums.bonds_start, sums.bonds_put_down, sums.bonds_ended, sums.bonds_end) == expected
    bonds = [
        (item.role, item.account, item.amount) for item in entries.credits if item.contract == "OutputVerification"
    ]
    assert (
        bonds
        == {
            None: [],
            "upheld": [("bond returned", CHALLENGER, BOND)],
            "returned": [("bond returned", CHALLENGER, BOND)],
            "refuted": [("bond forfeited", OPERATOR, BOND // 2), ("bond forfeited", SECOND, BOND // 2)],
        }[kind]
    )


def test_range_starts_with_what_the_history_left() -> None:
    model = with_request()
    model.settle(REQUEST, [OPERATOR], [], [10, 300])
    model.add_stake(NODE, 40)
    before = len(model.transactions)
    model.withdraw_credit("InferenceEscrow", OPERATOR)
    model.thaw(OTHER, 100)
    model.withdraw(OTHER)
    entries = kept(model.transactions, cut=before)
    (node, other) = entries.nodes
    assert (node.start, node.added, node.end) == (540, 0, 540)
    assert (other.start, other.thaw_started, other.withdrawn, other.end) == (700, 100, 100, 600)
    accounts = {item.account: item for item in entries.accounts}
    paid = accounts[OPERATOR]
    assert (paid.start, paid.credited, paid.withdrawn, paid.end) == (300, 0, 300, 0)
    assert (accounts[REQUESTER].start, accounts[REQUESTER].end) == (690, 690)
    assert entries.requests == ()
    assert [item.amount for item in entries.withdrawals] == [300]


def test_node_that_left_and_came_back_is_one_line_with_both_operators_money() -> None:
    model = ContractModel()
    model.register(NODE, OPERATOR, 500)
    model.begin_exit(NODE)
    model.withdraw(NODE)
    model.register(NODE, SECOND, 800)
    entries = kept(model.transactions)
    (node,) = entries.nodes
    assert (node.operator, node.added, node.withdrawn, node.end, node.status) == (SECOND, 1_300, 500, 800, "Pending")
    assert [(item.kind, item.operator) for item in entries.movements] == [
        ("registered", OPERATOR),
        ("exit started", OPERATOR),
        ("withdrawn", OPERATOR),
        ("removed", OPERATOR),
        ("registered", SECOND),
    ]


def wrong_histories() -> Iterator[tuple[str, list[Transaction]]]:
    settled = with_request()
    settled.settle(REQUEST, [OPERATOR], [SECOND], [10, 300, 40])
    yield SETTLEMENTS, changed(settled, "RequestSettled", lambda values: values.update(refunded=649))
    yield SETTLEMENTS, changed(settled, "Credited", lambda values: values.update(amount=301, credit=301), 1)
    yield SETTLEMENTS, changed(settled, "Credited", lambda values: values.update(account=OPERATOR, credit=650), 3)
    yield RUNNING, changed(settled, "Credited", lambda values: values.update(credit=11))
    short = with_request(deposit=999)
    short.settle(REQUEST, [OPERATOR], [SECOND], [10, 300, 40])
    yield SETTLEMENTS, changed(short, "RequestOpened", lambda values: values.update(deposit=1_000))
    slashed = with_request()
    slashed.tally(REQUEST, 2, 3, slashed=NODE, amount=250, rewards=[(SECOND, 25)])
    yield SLASHES, changed(slashed, "NodeSlashed", lambda values: values.update(burned=250))
    yield RUNNING, changed(slashed, "NodeSlashed", lambda values: values.update(staked=251))
    alone = [*slashed.transactions[:-1], slashed.transactions[-1][1:]]
    yield JUDGEMENTS, alone
    lost = [*slashed.transactions[:-1], tuple(e for e in slashed.transactions[-1] if e.name != "NodeSlashed")]
    yield SLASHES, lost
    challenged = with_request()
    challenged.challenge(REQUEST, 1, CHALLENGER)
    challenged.tally(REQUEST, 1, 1, members=[OPERATOR], upheld=False)
    yield BONDS, changed(challenged, "Credited", lambda values: values.update(amount=49, credit=49))
    yield BONDS, changed(challenged, "ChallengeResolved", lambda values: values.update(challenger=OPERATOR))
    twice = with_request()
    twice.challenge(REQUEST, 1, CHALLENGER)
    twice.challenge(REQUEST, 2, OPERATOR)
    twice.claim_refund(REQUEST)
    yield BONDS, changed(twice, "Credited", lambda values: values.update(amount=49, credit=49), 1)


@pytest.mark.parametrize(("check", "transactions"), list(wrong_histories()))
def test_history_that_does_not_add_up_fails_the_check_that_names_the_log(
    check: str, transactions: list[Transaction]
) -> None:
    problems = failed(transactions)
    assert check in problems
    assert all("block " in text and "log " in text for text in problems[check])


def test_honest_history_fails_no_check() -> None:
    model = with_request()
    model.tally(REQUEST, 2, 3, slashed=NODE, amount=250, rewards=[(SECOND, 25)])
    model.settle(REQUEST, [OPERATOR], [SECOND], [10, 300, 40])
    assert failed(model.transactions) == {}


@pytest.mark.parametrize("first", [1, 3, 4])
def test_history_whose_begin_is_missing_is_refused_with_advice(first: int) -> None:
    model = with_request()
    model.thaw(OTHER, 10)
    model.add_stake(NODE, 10)
    books = Books(7)
    with pytest.raises(AuditError, match="first_block 7 is too late"):
        enter(books, model.transactions[first:])


def test_history_before_the_range_leaves_nothing_but_accounts_and_what_is_open() -> None:
    model = with_request()
    books = Books(7)
    enter(books, model.transactions)

    def go_through(count: int) -> int:
        """Bytes that `count` whole requests leave behind in the books."""
        gc.collect()
        before = tracemalloc.get_traced_memory()[0]
        for number in range(count):
            model.transactions.clear()
            request_id = hash_of(f"request {number}")
            model.open(request_id, REQUESTER, 1_000)
            model.route(request_id, [NODE])
            model.challenge(request_id, 1, CHALLENGER)
            model.tally(request_id, 1, 1, members=[SECOND], upheld=False)
            model.settle(request_id, [OPERATOR], [], [10, 300])
            enter(books, model.transactions)
        gc.collect()
        return tracemalloc.get_traced_memory()[0] - before

    tracemalloc.start()
    try:
        go_through(50)
        assert go_through(500) < 10_000
    finally:
        tracemalloc.stop()
    books.open_range()
    assert [item.request_id for item in books.close_range(0).requests] == [REQUEST]


def test_jail_term_of_a_key_without_an_account_is_a_jailing_and_no_stake() -> None:
    model = with_request()
    model.nodes[CHALLENGER] = dataclasses.replace(model.nodes[NODE])
    model.tally(REQUEST, 0, 1, silent=[CHALLENGER])
    entries = kept(changed(model, "NodeJailed", lambda values: values.update(jailedUntil=FOR_EVER)))
    assert [(item.node, item.until) for item in entries.jailings] == [(CHALLENGER, FOR_EVER)]
    assert CHALLENGER not in {item.node for item in entries.nodes}


@pytest.mark.parametrize(
    ("given", "derived", "where"),
    [
        ({"a": 1, "b": [1, {"c": "2"}]}, {"a": 1, "b": [1, {"c": "2"}]}, None),
        ({"a": 1, "b": [1, {"c": "2"}]}, {"a": 1, "b": [1, {"c": "3"}]}, 'b[1].c: "2" in the report, "3" on chain'),
        ({"a": 1}, {"a": True}, "a: 1 in the report, true on chain"),
        ({"a": 1}, {"a": "1"}, 'a: 1 in the report, "1" on chain'),
        ({"a": [1]}, {"a": [1, 2]}, "a: 1 entries in the report, 2 on chain"),
        ({"a": [1, 2]}, {"a": [1]}, "a: 2 entries in the report, 1 on chain"),
        ({"a": {}}, {"a": {"b": 1}}, "a.b is missing in the report"),
        ({"a": {"b": 1}}, {"a": {}}, "a.'b' has no place in a report"),
        ({"a": None}, {"a": 1}, "a: nothing in the report, 1 on chain"),
        ({"a": 2, "b": 2}, {"b": 1, "a": 1}, "b: 2 in the report, 1 on chain"),
    ],
)
def test_first_difference_is_named_with_both_values(given: Any, derived: Any, where: str | None) -> None:
    assert first_difference(given, derived, "") == where
