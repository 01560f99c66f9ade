"""OUTBOX-01: each intent takes effect exactly once, whatever the chain does and whenever the process dies."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bsns.chain.errors import ChainUnavailableError
from coordinator.storage import Intent, IntentState, Storage
from coordinator.transaction_outbox import OutboxLimits, TransactionOutbox
from tests.property.test_coordinator_follower import here, template, with_storage
from tests.simulated_chain import PooledTransaction, SimulatedChain, SimulatedSigner

__all__ = ["template"]

_LIMITS = OutboxLimits(
    confirmations=2, rebroadcast_seconds=5, replace_seconds=12, replacements=3, refusal_backoff_seconds=1
)


class Crash(BaseException):
    """kill -9."""


class Mortal:
    """Counts the calls into `target`, dies before or after the one the plan names."""

    def __init__(self, target: Any, plan: CrashPlan) -> None:
        self._target, self._plan = target, plan

    def __getattr__(self, name: str) -> Any:
        member = getattr(self._target, name)
        if not callable(member):
            return member
        plan = self._plan
        if asyncio.iscoroutinefunction(member):

            async def call(*arguments: Any, **options: Any) -> Any:
                plan.pass_point(before=True)
                result = await member(*arguments, **options)
                plan.pass_point(before=False)
                return result

            return call

        def call_here(*arguments: Any, **options: Any) -> Any:
            plan.pass_point(before=True)
            result = member(*arguments, **options)
            plan.pass_point(before=False)
            return result

        return call_here


class CrashPlan:
    """Dies at point `at` (two points a call), once."""

    def __init__(self, at: int | None) -> None:
        self.at, self.passed = at, 0

    def pass_point(self, *, before: bool) -> None:
        del before
        self.passed += 1
        if self.at is not None and self.passed == self.at:
            self.at = None
            raise Crash


class World:
    """A chain, a database, a clock and an outbox that can be restarted."""

    def __init__(self, storage: Storage, plan: CrashPlan, *, execute: Callable[..., bool] | None = None) -> None:
        self.chain = SimulatedChain(execute or (lambda _call, _before: True))
        self.storage, self.plan, self.now = storage, plan, 0.0
        self.outbox = self.started()

    def started(self) -> TransactionOutbox:
        return TransactionOutbox(
            Mortal(self.chain, self.plan),
            Mortal(self.storage, self.plan),
            SimulatedSigner(),
            limits=_LIMITS,
            clock=lambda: self.now,
            run_blocking=here,
        )

    async def attempt(self, action: Callable[[], Any]) -> None:
        """Do something; a crash restarts the outbox, an outage is waited out."""
        try:
            await action()
        except Crash:
            self.outbox = self.started()
        except ChainUnavailableError:
            return

    async def settle(self, intents: Sequence[Intent]) -> None:
        """Everybody goes on wanting, time passes, blocks come, until nothing is open."""
        for _ in range(60):
            for intent in intents:
                await self.attempt(lambda: self.outbox.want(intent))  # noqa: B023
            await self.attempt(self.outbox.step)
            self.now += 3
            self.chain.mine()
            states = [record.state for record in self.storage.intents(list(IntentState), 1_000)]
            if len(states) == len(intents) and all(state == IntentState.CONFIRMED for state in states):
                return
        pytest.fail(f"still open: {self.storage.intents(list(IntentState), 1_000)}")

    def effects(self) -> Counter[str]:
        return Counter(call.arguments for call in self.chain.executed() if call.contract == "Test")


def intent(number: int) -> Intent:
    return Intent(f"test/{number}", "Test", "act", (number,))


def _once_each(world: World, intents: Sequence[Intent]) -> None:
    assert world.effects() == Counter(repr(item.arguments) for item in intents)


def test_intents_with_a_kill_at_every_point_take_effect_exactly_once(template: Path) -> None:
    intents = [intent(number) for number in range(3)]

    async def scenario(world: World) -> None:
        await world.attempt(lambda: world.outbox.want(intents[0]))
        await world.attempt(world.outbox.step)
        # Lost by the pool, replaced for its price, taken back by a reorganisation: the kill may fall on any of it.
        world.chain.drop_pool()
        world.now += 6
        await world.attempt(lambda: world.outbox.want(intents[1]))
        await world.attempt(world.outbox.step)
        world.now += 20
        await world.attempt(world.outbox.step)
        world.chain.mine()
        await world.attempt(world.outbox.step)
        world.chain.reorganise(1, ())
        await world.attempt(world.outbox.step)
        await world.settle(intents)
        _once_each(world, intents)

    tried = 0
    for at in itertools.count(1):
        plan = CrashPlan(at)

        async def body(storage: Storage, _path: Path) -> None:
            await scenario(World(storage, plan))  # noqa: B023

        with_storage(template, body)
        if plan.at is not None:
            break  # the scenario ended before that point
        tried += 1
    print(f"crash points tried: {tried}, intents lost 0, doubled 0")
    assert tried > 100


_ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("want"), st.integers(0, 4)),
        st.just(("step",)),
        st.just(("mine",)),
        st.tuples(st.just("reorganise"), st.booleans(), st.integers(0, 3)),
        st.just(("drop",)),
        st.tuples(st.just("wait"), st.integers(1, 30)),
        st.tuples(st.just("fail"), st.integers(1, 5)),
        st.tuples(st.just("crash"), st.integers(1, 12)),
        st.just(("foreign",)),
    ),
    max_size=40,
)


@settings(deadline=None, max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=_ACTIONS)
def test_intents_through_any_weather_take_effect_exactly_once(template: Path, actions: list[tuple[Any, ...]]) -> None:
    async def body(storage: Storage, _path: Path) -> None:
        world = World(storage, CrashPlan(None))
        wanted: dict[str, Intent] = {}
        highest = world.chain.height
        for action in actions:
            match action:
                case ("want", number):
                    wanted[intent(number).key] = intent(number)
                    await world.attempt(lambda: world.outbox.want(intent(number)))
                case ("step",):
                    await world.attempt(world.outbox.step)
                case ("mine",):
                    world.chain.mine()
                case ("reorganise", keep, length):
                    # Less deep below the highest head than the confirmations, also several in a row: deeper ones are
                    # the follower's to report (roll_back reopens).
                    highest = max(highest, world.chain.height)
                    depth = world.chain.height - (highest - _LIMITS.confirmations + 1)
                    if depth > 0:
                        world.chain.reorganise(depth, *([()] * length), keep_transactions=keep)
                    if world.chain.height < 1:
                        world.chain.mine()
                case ("drop",):
                    world.chain.drop_pool()
                case ("wait", seconds):
                    world.now += seconds
                case ("fail", count):
                    world.chain.faults = count
                case ("crash", at):
                    world.plan.at, world.plan.passed = at, 0
                case ("foreign",):
                    world.chain.spend_nonce(SimulatedSigner().address)
        world.chain.faults, world.plan.at = 0, None
        await world.settle(list(wanted.values()))
        _once_each(world, list(wanted.values()))

    with_storage(template, body)


def test_intent_refused_by_the_contracts_keeps_the_reason_and_is_tried_again_only_if_still_wanted(
    template: Path,
) -> None:
    async def body(storage: Storage, _path: Path) -> None:
        allowed = False
        world = World(storage, CrashPlan(None), execute=lambda _call, _before: allowed)
        await world.outbox.want(intent(1))
        await world.outbox.step()
        record = storage.intent("test/1")
        assert record is not None
        assert (record.state, record.reason, record.nonce) == (IntentState.REFUSED, "Refused(function=act)", None)
        world.now += 100
        allowed = True
        await world.outbox.step()
        assert world.effects() == Counter()
        await world.outbox.want(intent(1))
        await world.settle([intent(1)])
        _once_each(world, [intent(1)])

    with_storage(template, body)


def test_intent_overtaken_in_the_block_is_refused_with_the_reason_after_its_confirmations(template: Path) -> None:
    async def body(storage: Storage, _path: Path) -> None:
        mined = False

        def execute(call: PooledTransaction, _before: Sequence[PooledTransaction]) -> bool:
            return not (mined and call.contract == "Test")

        world = World(storage, CrashPlan(None), execute=execute)
        await world.outbox.want(intent(1))
        await world.outbox.step()
        mined = True
        world.chain.mine()
        await world.outbox.step()
        record = storage.intent("test/1")
        assert record is not None
        assert (record.state, record.succeeded) == (IntentState.MINED, False)
        world.chain.mine()
        await world.outbox.step()
        record = storage.intent("test/1")
        assert record is not None
        assert (record.state, record.reason) == (IntentState.REFUSED, "mined and reverted: Refused(function=act)")

    with_storage(template, body)


def test_transaction_waiting_too_long_is_replaced_under_its_nonce_with_a_higher_fee(template: Path) -> None:
    async def body(storage: Storage, _path: Path) -> None:
        world = World(storage, CrashPlan(None))
        await world.outbox.want(intent(1))
        await world.outbox.step()
        for _ in range(20):
            world.now += _LIMITS.replace_seconds
            await world.outbox.step()
        record = storage.intent("test/1")
        assert record is not None
        assert record.nonce == 0
        transactions = storage.transactions(record.sequence, 0)
        assert len(transactions) == 1 + _LIMITS.replacements
        fees = [int(item.fields["maxFeePerGas"]) for item in transactions]
        assert all(later * 10 >= earlier * 11 for earlier, later in itertools.pairwise(fees))
        assert len(world.chain.pool) == 1
        await world.settle([intent(1)])
        _once_each(world, [intent(1)])

    with_storage(template, body)


def test_mined_transaction_after_a_rollback_of_its_block_is_followed_up_again(template: Path) -> None:
    async def body(storage: Storage, _path: Path) -> None:
        world = World(storage, CrashPlan(None))
        await world.settle([intent(1)])
        # Deeper than the confirmations: the follower's rollback opens the intent again.
        depth = world.chain.height
        world.chain.reorganise(depth, *([()] * depth))
        record = storage.intent("test/1")
        assert record is not None
        assert record.mined_block_number is not None
        storage.mark_unmined(record.sequence)
        await world.settle([intent(1)])
        _once_each(world, [intent(1)])

    with_storage(template, body)


def test_nonce_used_by_another_program_is_given_up_only_when_that_is_confirmed(template: Path) -> None:
    async def body(storage: Storage, _path: Path) -> None:
        world = World(storage, CrashPlan(None))
        await world.outbox.want(intent(1))
        await world.outbox.step()
        # The other program's transaction takes the nonce, for one block only.
        world.chain.spend_nonce(SimulatedSigner().address)
        world.chain.mine()
        for _ in range(3):
            await world.outbox.step()
        record = storage.intent("test/1")
        assert record is not None
        assert record.nonce == 0
        world.chain.reorganise(1, ())
        await world.settle([intent(1)])
        _once_each(world, [intent(1)])
        # This time it stays.
        await world.outbox.want(intent(2))
        await world.outbox.step()
        world.chain.spend_nonce(SimulatedSigner().address)
        world.chain.mine()
        await world.settle([intent(1), intent(2)])
        _once_each(world, [intent(1), intent(2)])

    with_storage(template, body)
