"""Money of the users of a gateway: it adds up, and a withdrawal is sent once, whatever happens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bsns.chain.errors import ChainUnavailableError
from bsns.protocol.identifiers import RequestId, address, keccak256
from coordinator.gateway.access import RateLimiter
from coordinator.gateway.metrics import GatewayMetrics
from coordinator.gateway.treasury import Treasury
from coordinator.storage import (
    AccountBook,
    AccountError,
    Charge,
    ChargeState,
    IdempotencyError,
    InsufficientBalanceError,
    KeyLimits,
    SpendingLimitError,
    Storage,
    UnknownKeyError,
    WithdrawalState,
)
from tests.property.test_coordinator_follower import template, with_storage
from tests.property.test_coordinator_outbox import Crash, CrashPlan, Mortal
from tests.simulated_chain import SimulatedChain, SimulatedSigner

__all__ = ["template"]

CONFIRMATIONS = 3
NOW = 1_800_000_000
DAY = 86_400
CUSTOMER = address((77).to_bytes(20, "big"))

_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("deposit"), st.integers(1, 1_000)),
        st.tuples(st.just("hold"), st.integers(0, 400), st.sampled_from([None, "a", "b"]), st.integers(0, 1)),
        st.tuples(st.just("settle"), st.integers(0, 20), st.integers(0, 400)),
        st.tuples(st.just("release"), st.integers(0, 20)),
        st.tuples(st.just("refund"), st.integers(0, 20)),
        st.tuples(st.just("withdraw"), st.integers(1, 600)),
        st.tuples(st.just("wait"), st.integers(1, DAY)),
    ),
    max_size=40,
)


@dataclass
class Expected:
    """The same account, kept in the simplest way."""

    balance: int = 0
    spent_on: Counter[int] = field(default_factory=Counter)


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(steps=_STEPS, per_request=st.none() | st.integers(0, 300), per_day=st.none() | st.integers(0, 900))
def test_money_of_an_account_adds_up_whatever_is_done(
    template: Path, steps: list[tuple[Any, ...]], per_request: int | None, per_day: int | None
) -> None:
    async def body(storage: Storage, _path: Path) -> None:
        book, now, expected = AccountBook(storage), NOW, Expected()
        account = book.open_account("somebody", CUSTOMER, now)
        secret, _ = book.create_key(account.account_id, "key", KeyLimits(per_request, per_day), now)
        charges: list[Charge] = []
        paid: list[tuple[RequestId, int]] = []
        for number, step in enumerate(steps):
            key = book.key(secret)
            match step:
                case ("deposit", amount):
                    book.deposit(account.account_id, amount, f"t{number}", now)
                    expected.balance += amount
                case ("hold", amount, idempotency, content):
                    today = expected.spent_on[now // DAY]
                    allowed = (per_request is None or amount <= per_request) and (
                        per_day is None or today + amount <= per_day
                    )
                    try:
                        found = book.hold(
                            key, amount, model="m", body_hash=str(content), idempotency_key=idempotency, now=now
                        )
                    except InsufficientBalanceError:
                        assert amount > expected.balance
                    except SpendingLimitError:
                        assert not allowed
                    except IdempotencyError as error:
                        before = next(item for item in charges if item.idempotency_key == idempotency)
                        is_same = before.body_hash == str(content)
                        assert error.is_busy == is_same  # noqa: PT017 - one of several that may be raised
                    else:
                        if any(item.charge_id == found.charge_id for item in charges):
                            assert found.state is not ChargeState.HELD
                        else:
                            assert allowed
                            charges.append(found)
                            expected.balance -= amount
                            expected.spent_on[now // DAY] += amount
                case ("settle", index, price) if index < len(charges):
                    charge = book.charge(charges[index].charge_id)
                    assert charge is not None
                    request = RequestId(keccak256(f"{number}".encode()))
                    if charge.state is ChargeState.HELD and price > charge.held:
                        with pytest.raises(AccountError):
                            book.settle(charge.charge_id, {request: price}, None, now)
                        continue
                    after = book.settle(charge.charge_id, {request: price}, None, now)
                    if charge.state is ChargeState.HELD:
                        assert (after.state, after.charged) == (ChargeState.CHARGED, price)
                        paid.append((request, price))
                        expected.balance += charge.held - price
                        _give_back(expected, charge, charge.held - price)
                    else:
                        assert after == charge
                    charges[index] = after
                case ("release", index) if index < len(charges):
                    charge = book.charge(charges[index].charge_id)
                    assert charge is not None
                    after = book.settle(charge.charge_id, {}, None, now)
                    if charge.state is ChargeState.HELD:
                        assert after.state is ChargeState.RELEASED
                        assert after.idempotency_key is None
                        expected.balance += charge.held
                        _give_back(expected, charge, charge.held)
                    charges[index] = after
                case ("refund", index) if index < len(paid):
                    first = book.refund(paid[index][0], now)
                    assert first in (0, paid[index][1])
                    assert book.refund(paid[index][0], now) == 0
                    expected.balance += first
                case ("withdraw", amount):
                    try:
                        book.withdraw(account.account_id, amount, now)
                        expected.balance -= amount
                    except InsufficientBalanceError:
                        assert amount > expected.balance
                case ("wait", seconds):
                    now += seconds
            found_account = book.account(account.account_id)
            assert found_account is not None
            assert found_account.balance == expected.balance >= 0
            movements = book.movements(account.account_id, 1_000)
            assert sum(item.amount for item in movements) == expected.balance
            assert book.key(secret).spent_today(now) == expected.spent_on[now // DAY]
            held = sum(item.held for item in book.unsettled())
            waiting = sum(item.amount for item in book.open_withdrawals())
            assert book.owed() == expected.balance + held + waiting

    with_storage(template, body)


def _give_back(expected: Expected, charge: Charge, amount: int) -> None:
    """What was not charged counts as not spent on the day it was set aside."""
    expected.spent_on[charge.created_at // DAY] -= amount


def test_key_is_not_stored_and_ends_when_it_is_revoked(template: Path) -> None:
    async def body(storage: Storage, path: Path) -> None:
        book = AccountBook(storage)
        account = book.open_account("somebody", None, NOW)
        secret, key = book.create_key(account.account_id, "key", KeyLimits(), NOW)
        assert book.key(secret).key_id == key.key_id
        for file in path.parent.iterdir():
            assert secret.encode() not in file.read_bytes()
        book.deposit(account.account_id, 10, "t", NOW)
        book.revoke_key(account.account_id, key.key_id, NOW)
        with pytest.raises(UnknownKeyError):
            book.key(secret)
        # Also for a request that had shown it just before.
        with pytest.raises(UnknownKeyError):
            book.hold(key, 1, model="m", body_hash="", idempotency_key=None, now=NOW)
        assert book.account(account.account_id) is not None
        assert sum(item.amount for item in book.movements(account.account_id, 10)) == 10

    with_storage(template, body)


class Payouts:
    """A chain, accounts that want their money, and a treasury that can be restarted."""

    def __init__(self, storage: Storage, plan: CrashPlan) -> None:
        self.chain, self.signer, self.storage, self.plan = SimulatedChain(), SimulatedSigner(), storage, plan
        self.chain.mine([])
        self.book = AccountBook(storage)
        account = self.book.open_account("customer", CUSTOMER, NOW)
        self.book.deposit(account.account_id, 100, "t", NOW)
        for amount in (5, 7):
            self.book.withdraw(account.account_id, amount, NOW)
        self.treasury = self.started()

    def started(self) -> Treasury:
        settings_: Any = SimpleNamespace(deposit_confirmations=CONFIRMATIONS)
        no_tab: Any = None
        return Treasury(
            Mortal(self.chain, self.plan), self.signer, no_tab, Mortal(self.book, self.plan), self.storage, settings_,
            GatewayMetrics(), clock=lambda: NOW,
        )  # fmt: skip

    async def look(self) -> None:
        try:
            await self.treasury.pay_out()
        except Crash:
            self.treasury = self.started()
        except ChainUnavailableError:
            pass

    def paid(self) -> list[int]:
        return sorted(item.value for item in self.chain.executed() if item.function == CUSTOMER)


async def _until_paid(world: Payouts) -> None:
    for _ in range(60):
        await world.look()
        world.chain.mine([])
        if not world.book.open_withdrawals():
            break
    for _ in range(CONFIRMATIONS + 1):
        await world.look()
        world.chain.mine([])
    assert world.paid() == [5, 7]
    assert all(item.state is WithdrawalState.DONE for item in map(_known(world), _identities(world)))


def _identities(world: Payouts) -> list[str]:
    account = world.book.account_of(CUSTOMER)
    assert account is not None
    lines = world.book.movements(account.account_id, 10)
    return [item.reference for item in lines if item.amount < 0]


def _known(world: Payouts) -> Callable[[str], Any]:
    return world.book.withdrawal


def test_withdrawals_are_sent_once_wherever_the_process_dies(template: Path) -> None:
    points = []

    async def count(storage: Storage, _path: Path) -> None:
        plan = CrashPlan(None)
        await _until_paid(Payouts(storage, plan))
        points.append(plan.passed)

    with_storage(template, count)
    assert points[0] > 30
    for at in range(1, points[0] + 1):

        async def body(storage: Storage, _path: Path, at: int = at) -> None:
            await _until_paid(Payouts(storage, CrashPlan(at)))

        with_storage(template, body)


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("look")),
            st.tuples(st.just("mine"), st.integers(1, 3)),
            # Shallower than what is waited for.
            st.tuples(st.just("reorganise"), st.integers(1, CONFIRMATIONS - 1)),
            st.tuples(st.just("foreign")),
            st.tuples(st.just("drop")),
            st.tuples(st.just("fail"), st.integers(1, 4)),
            st.tuples(st.just("restart")),
        ),
        max_size=30,
    )
)
def test_withdrawals_are_sent_once_whatever_the_chain_does(template: Path, steps: list[tuple[Any, ...]]) -> None:
    async def body(storage: Storage, _path: Path) -> None:
        world = Payouts(storage, CrashPlan(None))
        chain = world.chain
        for step in steps:
            match step:
                case ("look",):
                    await world.look()
                case ("mine", blocks):
                    for _ in range(blocks):
                        chain.mine([])
                case ("reorganise", depth) if depth < chain.height:
                    chain.reorganise(depth, *[[] for _ in range(depth)])
                case ("foreign",):
                    chain.spend_nonce(world.signer.address)
                case ("drop",):
                    chain.drop_pool()
                case ("fail", calls):
                    chain.faults = calls
                case ("restart",):
                    world.treasury = world.started()
            assert Counter(world.paid()) <= Counter([5, 7])
        chain.faults = 0
        await _until_paid(world)

    with_storage(template, body)


def test_rates_of_callers_are_bounded_and_recover() -> None:
    now = 0.0
    limiter = RateLimiter(3, tracked=4, clock=lambda: now)
    assert [limiter.wait_s("a") == 0 for _ in range(4)] == [True, True, True, False]
    assert limiter.wait_s("b") == 0
    now += 20
    assert [limiter.wait_s("a") == 0 for _ in range(2)] == [True, False]
    now += 1_000
    assert [limiter.wait_s("a") == 0 for _ in range(4)] == [True, True, True, False]
    for caller in range(100):
        limiter.wait_s(f"c{caller}")
    assert len(limiter._buckets) == 4
