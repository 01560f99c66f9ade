"""2026-11: after a long pause two replacements were signed at the same time, and the next one failed for ever.

Which of them was the latest was read from the clock. With the older one taken for it, the third replacement was the
second over again, to the byte, and the database refused it in every pass.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from coordinator.storage import Storage
from tests.property.test_coordinator_follower import template, with_storage
from tests.property.test_coordinator_outbox import CrashPlan, World, intent

__all__ = ["template"]


@pytest.mark.parametrize("seconds", [0, -1])
@pytest.mark.parametrize("number", range(8))
def test_replacements_signed_by_a_clock_that_does_not_advance_have_rising_fees(
    template: Path, number: int, seconds: int
) -> None:
    async def body(storage: Storage, _path: Path) -> None:
        world = World(storage, CrashPlan(None))
        await world.outbox.want(intent(number))
        await world.outbox.step()
        world.now += 60
        for _ in range(4):
            await world.outbox.step()
            world.now += seconds
        record = storage.intent(f"test/{number}")
        assert record is not None
        fees = {int(item.fields["maxFeePerGas"]) for item in storage.transactions(record.sequence, 0)}
        assert len(fees) == 4
        (waiting,) = world.chain.pool.values()
        assert waiting.fee == max(fees)
        await world.settle([intent(number)])
        assert world.effects() == {repr((number,)): 1}

    with_storage(template, body)
