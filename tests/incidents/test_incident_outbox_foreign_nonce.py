"""2026-11: another program's transaction under the coordinator's key, and a reorganisation that moves it.

Taken back for good, it left its nonce free below ours, and nothing of ours was ever mined. Mined again in a later block
between two passes, it counted as confirmed since the orphaned one; the next reorganisation took it back, and the intent
took effect twice.
"""

from __future__ import annotations

from pathlib import Path

from coordinator.storage import IntentState, Storage
from tests.property.test_coordinator_follower import template, with_storage
from tests.property.test_coordinator_outbox import CrashPlan, World, intent
from tests.simulated_chain import SimulatedSigner

__all__ = ["template"]


def test_intents_above_a_nonce_that_a_reorganisation_freed_are_mined(template: Path) -> None:
    async def body(storage: Storage, _path: Path) -> None:
        world = World(storage, CrashPlan(None))
        world.chain.mine()
        for _ in range(2):
            world.chain.spend_nonce(SimulatedSigner().address)
            world.chain.mine()
        await world.outbox.want(intent(1))
        await world.outbox.step()
        record = storage.intent("test/1")
        assert record is not None
        assert record.nonce == 2
        world.chain.reorganise(2, keep_transactions=False)
        await world.settle([intent(1)])
        assert [(call.contract, call.nonce) for call in world.chain.executed()] == [
            ("Transfer", 0),
            ("Transfer", 1),
            ("Test", 2),
        ]

    with_storage(template, body)


def test_free_nonce_filled_with_a_kill_at_every_point_is_used_once_and_the_intent_takes_effect_once(
    template: Path,
) -> None:
    for at in range(1, 200):
        plan = CrashPlan(None)

        async def body(storage: Storage, _path: Path) -> None:
            world = World(storage, plan)  # noqa: B023
            world.chain.spend_nonce(SimulatedSigner().address)
            world.chain.mine()
            await world.outbox.want(intent(1))
            await world.outbox.step()
            world.chain.reorganise(1, (), keep_transactions=False)
            plan.at, plan.passed = at, 0  # noqa: B023
            await world.settle([intent(1)])
            assert [call.contract for call in world.chain.executed()] == ["Transfer", "Test"]

        with_storage(template, body)
        if plan.at is not None:
            assert at > 20
            return
    raise AssertionError("the scenario never ended before the kill")


def test_nonce_of_another_program_mined_again_in_a_later_block_counts_its_confirmations_anew(template: Path) -> None:
    async def body(storage: Storage, _path: Path) -> None:
        world = World(storage, CrashPlan(None))
        await world.outbox.want(intent(1))
        await world.outbox.step()
        world.chain.spend_nonce(SimulatedSigner().address)
        world.chain.mine()
        await world.outbox.step()
        # The other branch is three blocks longer, and has the other program's transaction in the last one.
        world.chain.reorganise(1, (), (), ())
        world.chain.spend_nonce(SimulatedSigner().address)
        world.chain.mine()
        await world.outbox.step()
        world.chain.reorganise(1, ())
        await world.settle([intent(1)])
        for _ in range(5):
            world.chain.mine()
        assert [(call.contract, call.nonce) for call in world.chain.executed()] == [("Test", 0)]
        record = storage.intent("test/1")
        assert record is not None
        assert record.state == IntentState.CONFIRMED

    with_storage(template, body)
