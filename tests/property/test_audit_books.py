"""Conservation: whatever the contracts do, the auditor's books hold what the contracts hold, at any cut of the history.

And whatever a single log says wrong about money, a check of the books notices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from hypothesis import given, settings
from hypothesis import strategies as st

from bsns.audit.block_report import _range_checks
from bsns.audit.books import Books
from bsns.audit.entries import Entries
from tests.contract_model import BOND, ContractModel, Transaction, account, hash_of

_NODES = [account(number) for number in range(1, 5)]
_OPERATORS = [account(number) for number in range(11, 15)]
_REQUESTERS = [account(number) for number in range(21, 24)]
_MONEY = ("amount", "staked", "thawing", "burned", "credit", "deposit", "refunded", "paidToExecutors", "protocolFee")


@st.composite
def histories(draw: st.DrawFn) -> ContractModel:
    """What a few nodes and requesters may do, in any order that the contracts allow."""
    model, requests = ContractModel(), 0
    for _ in range(draw(st.integers(5, 60))):
        acts = ["open", "register"]
        acts += ["stake", "exit", "thaw", "withdraw", "leave"] * bool(model.nodes)
        acts += ["settle", "expire", "challenge", "challenge", "challenge", "tally", "tally", "reject"] * bool(
            model.requests
        )
        acts += ["credit"] * bool(model.credits)
        act = draw(st.sampled_from(acts))
        if act == "register":
            index = draw(st.integers(0, len(_NODES) - 1))
            if _NODES[index] not in model.nodes:
                model.register(_NODES[index], _OPERATORS[index], draw(st.integers(100, 10**20)))
        elif act == "open":
            requests += 1
            requester = draw(st.sampled_from(_REQUESTERS))
            model.open(hash_of(f"request {requests}"), requester, draw(st.integers(0, 10**18)))
            if draw(st.integers(0, 3)):
                model.route(hash_of(f"request {requests}"), sorted(model.nodes))
        elif act == "credit":
            model.withdraw_credit(*draw(st.sampled_from(sorted(model.credits))))
        elif act in ("stake", "exit", "thaw", "withdraw", "leave"):
            _stake(draw, model, act)
        else:
            _judge(draw, model, act)
    return model


def _stake(draw: st.DrawFn, model: ContractModel, act: str) -> None:
    node = draw(st.sampled_from(sorted(model.nodes)))
    item = model.nodes[node]
    if act == "stake" and not item.exiting:
        model.add_stake(node, draw(st.integers(1, 10**20)))
    elif act == "exit" and not item.exiting:
        model.begin_exit(node)
    elif act == "thaw" and not item.exiting and item.staked > item.thawing:
        model.thaw(node, draw(st.integers(1, item.staked - item.thawing)))
    elif act == "withdraw" and item.thawing:
        model.withdraw(node)
    elif act == "leave" and item.jailed and not item.exiting:
        model.leave_jail(node)


def _judge(draw: st.DrawFn, model: ContractModel, act: str) -> None:
    request_id = draw(st.sampled_from(sorted(model.requests)))
    request = model.requests[request_id]
    if act == "settle" and not request.bonds:
        executors = draw(st.lists(st.sampled_from(_OPERATORS), max_size=3))
        verifiers = draw(st.lists(st.sampled_from(_OPERATORS), max_size=3))
        count = 1 + len(executors) + len(verifiers)
        share = request.deposit // count
        model.settle(request_id, executors, verifiers, [draw(st.integers(0, share)) for _ in range(count)])
    elif act == "expire":
        model.claim_refund(request_id)
    elif act == "challenge" and request.status != "Open":
        stage = draw(st.integers(0, 3))
        if stage not in request.bonds:
            model.challenge(request_id, stage, draw(st.sampled_from(_REQUESTERS)))
    elif act in ("tally", "reject"):
        stages = sorted(request.bonds)
        stage = draw(st.sampled_from(stages)) if stages else 0
        slashed = draw(st.sampled_from([None, *sorted(model.nodes)]))
        staked = 0 if slashed is None else model.nodes[slashed].staked
        amount = draw(st.integers(1, staked)) if staked else 0
        rewards = [(who, amount // 10) for who in draw(st.lists(st.sampled_from(_OPERATORS), max_size=3))]
        members = draw(st.lists(st.sampled_from(_OPERATORS), min_size=1, max_size=3))
        model.tally(
            request_id,
            stage,
            3,
            slashed=slashed if amount else None,
            amount=amount,
            rewards=rewards,
            members=members,
            upheld=draw(st.booleans()) if stages else None,
            rejects=act == "reject",
        )


def kept(transactions: Sequence[Transaction], cut: int) -> tuple[Books, Entries]:
    """The books over all of them, with a range that begins at `cut`."""
    books = Books(1)
    for transaction in transactions[:cut]:
        books.apply(transaction)
    books.open_range()
    for transaction in transactions[cut:]:
        books.apply(transaction)
    return books, books.close_range(now=0)


def complaints(books: Books, entries: Entries) -> list[str]:
    return [text for _, problems, _, _ in books.outcomes() for text in problems] + [
        check.detail for check in _range_checks(entries) if not check.ok
    ]


@settings(deadline=None, max_examples=150)
@given(model=histories(), data=st.data())
def test_books_hold_what_the_contracts_hold_and_every_check_is_ok(model: ContractModel, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(model.transactions)))
    books, entries = kept(model.transactions, cut)
    assert complaints(books, entries) == []
    for contract, ether in model.ether.items():
        assert books.holdings(contract) == ether
    assert {item.node: (item.end, item.end_thawing) for item in entries.nodes if item.end} == {
        node: (item.staked, item.thawing) for node, item in model.nodes.items() if item.staked
    }
    assert {(item.contract, item.account): item.end for item in entries.accounts if item.end} == model.credits
    assert entries.totals.deposits_end == sum(item.deposit for item in model.requests.values())
    assert entries.totals.bonds_end == BOND * sum(len(item.bonds) for item in model.requests.values())


@settings(deadline=None, max_examples=80)
@given(model=histories(), data=st.data())
def test_two_ranges_that_meet_are_one_range(model: ContractModel, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, len(model.transactions)))
    _, whole = kept(model.transactions, 0)
    _, early = kept(model.transactions[:cut], 0)
    _, late = kept(model.transactions, cut)
    for field in dataclasses.fields(whole.totals):
        parts = [getattr(item.totals, field.name) for item in (early, late)]
        expected = getattr(whole.totals, field.name)
        if field.name.endswith("_start"):
            assert parts[0] == expected == 0
        elif field.name.endswith("_end"):
            assert parts[1] == expected
        else:
            assert sum(parts) == expected
    for name in ("stake", "deposits", "bonds", "credits"):
        assert getattr(early.totals, f"{name}_end") == getattr(late.totals, f"{name}_start")
    for name in ("movements", "credits", "withdrawals", "routes", "slashes", "jailings"):
        assert getattr(early, name) + getattr(late, name) == getattr(whole, name)


@settings(deadline=None, max_examples=150)
@given(model=histories(), data=st.data())
def test_one_wrong_amount_in_one_log_is_noticed(model: ContractModel, data: st.DataObject) -> None:
    places = [
        (number, index, name)
        for number, transaction in enumerate(model.transactions)
        for index, event in enumerate(transaction)
        for name in event.arguments
        if name in _MONEY
    ]
    if not places:
        return
    number, index, name = data.draw(st.sampled_from(places))
    transactions = list(model.transactions)
    event = transactions[number][index]
    wrong = event.arguments[name] + data.draw(st.integers(1, 10**6))
    forged = dataclasses.replace(event, arguments={**event.arguments, name: wrong})
    transactions[number] = (*transactions[number][:index], forged, *transactions[number][index + 1 :])
    books, entries = kept(transactions, data.draw(st.integers(0, len(transactions))))
    contradicts = any(books.holdings(contract) != ether for contract, ether in model.ether.items())
    found = f"{event.name}: {name} is {wrong}, and was {event.arguments[name]}"
    assert contradicts or complaints(books, entries), found
