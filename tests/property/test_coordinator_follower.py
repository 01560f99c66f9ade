"""SYNC-01: after any sequence of blocks, reorganisations and outages the stored state equals a fold over the
canonical events.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bsns.chain.deployment import Deployment
from bsns.chain.errors import ChainUnavailableError, UnknownBlockError, WrongChainError
from bsns.protocol.identifiers import address
from coordinator.chain_follower import ChainFollower, FollowerLimits, ReorganisationTooDeepError
from coordinator.network_state import NetworkState, UnknownEventError, fold
from coordinator.storage import Storage, WrongDeploymentError, migrate
from tests.simulated_chain import SimulatedChain, Traffic

_LIMIT = 6


def deployment_of(chain: SimulatedChain, first_block: int = 1) -> Deployment:
    where = [address(number.to_bytes(20, "big")) for number in range(0xA0, 0xA6)]
    return Deployment(chain.identity, *where, first_block)


async def here(function: Callable[[], Any]) -> Any:
    """A worker thread that is this one: examples stay deterministic."""
    return function()


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated SQLite file to copy."""
    path = tmp_path_factory.mktemp("template") / "empty.sqlite"
    migrate(f"sqlite:///{path}")
    return path


def follower_over(chain: SimulatedChain, storage: Storage, **limits: Any) -> ChainFollower:
    values = {"maximum_reorganisation_depth": _LIMIT, "batch_blocks": 3, **limits}
    return ChainFollower(chain, storage, deployment_of(chain), limits=FollowerLimits(**values), run_blocking=here)


def with_storage(template: Path, body: Callable[[Storage, Path], Awaitable[None]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "c.sqlite"
        shutil.copy(template, path)
        storage = Storage(f"sqlite:///{path}")
        try:
            asyncio.run(body(storage, path))
        finally:
            storage.close()


_ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("mine"), st.integers(1, 4)),
        # Up to the limit below the head; the new branch shorter, as long or longer.
        st.tuples(st.just("reorganise"), st.integers(1, _LIMIT), st.integers(0, _LIMIT + 2)),
        st.tuples(st.just("follow")),
        # The same while the follower is in the middle of its reading.
        st.tuples(st.just("overtaken"), st.integers(1, 12), st.integers(1, 3), st.integers(1, 5)),
        st.tuples(st.just("fail"), st.integers(1, 6)),
        st.tuples(st.just("restart")),
    ),
    max_size=30,
)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(actions=_ACTIONS, seed=st.integers(0, 2**32))
def test_follower_through_any_reorganisations_stores_the_fold_of_canonical_events(
    template: Path, actions: list[tuple[Any, ...]], seed: int
) -> None:
    async def body(storage: Storage, _path: Path) -> None:
        chain, traffic = SimulatedChain(), Traffic(seed)
        chain.mine(traffic.block(chain))
        follower = follower_over(chain, storage)
        storage.bind(deployment_of(chain))
        # What was stored may be orphaned at most to the limit below the highest stored block.
        followed = 0

        async def follow() -> None:
            nonlocal followed
            try:
                await follower.catch_up()
                followed = chain.height
            except (ChainUnavailableError, UnknownBlockError):
                followed = max(followed, 0 if (cursor := storage.cursor()) is None else cursor.number)

        for action in actions:
            match action:
                case ("mine", count):
                    for _ in range(count):
                        chain.mine(traffic.block(chain))
                case ("reorganise", depth, length):
                    # The first stored block stays, and no reorganisation goes deeper than the limit below what was
                    # stored.
                    floor = max(followed - _LIMIT, 1)
                    depth = min(depth, max(0, chain.height - floor))
                    if depth:
                        chain.reorganise(depth)
                        for _ in range(length):
                            chain.mine(traffic.block(chain))
                case ("follow",):
                    await follow()
                case ("overtaken", calls, depth, length):

                    def change(depth: int = depth, length: int = length) -> None:
                        cursor = storage.cursor()
                        stored = 1 if cursor is None else cursor.number
                        floor = max(max(followed, stored) - _LIMIT, 1)
                        depth = min(depth, max(0, chain.height - floor))
                        if depth:
                            chain.reorganise(depth)
                            for _ in range(length):
                                chain.mine(traffic.block(chain))

                    chain.interrupt(calls, change)
                    await follow()
                case ("fail", count):
                    chain.faults = count
                case ("restart",):
                    follower = follower_over(chain, storage)
        chain.faults = 0
        chain.interrupt(1_000_000, lambda: None)
        if chain.height < followed:
            chain.mine(*([()] * (followed - chain.height + 1)))
        await follower.catch_up()
        canonical = chain.history()
        assert storage.history() == canonical
        assert storage.network_state() == fold(NetworkState(), canonical)
        assert follower.lag == 0
        assert follower.not_synced_because is None

    with_storage(template, body)


def test_follower_when_the_chain_is_rewritten_deeper_than_the_limit_halts(template: Path) -> None:
    async def body(storage: Storage, _path: Path) -> None:
        chain, traffic = SimulatedChain(), Traffic(3)
        for _ in range(2 * _LIMIT):
            chain.mine(traffic.block(chain))
        follower = follower_over(chain, storage)
        storage.bind(deployment_of(chain))
        await follower.catch_up()
        before = storage.network_state()
        chain.reorganise(_LIMIT + 2)
        chain.mine(*([()] * (_LIMIT + 3)))
        with pytest.raises(ReorganisationTooDeepError):
            await follower.run()
        assert storage.network_state() == before

    with_storage(template, body)


def test_follower_on_another_chain_refuses_to_start(template: Path) -> None:
    async def body(storage: Storage, _path: Path) -> None:
        chain = SimulatedChain(identity=5)
        follower = ChainFollower(
            chain, storage, deployment_of(SimulatedChain()), limits=FollowerLimits(), run_blocking=here
        )
        with pytest.raises(WrongChainError):
            await follower.run()
        storage.bind(deployment_of(SimulatedChain()))
        with pytest.raises(WrongDeploymentError):
            storage.bind(deployment_of(chain))

    with_storage(template, body)


def test_follower_at_a_configured_depth_leaves_the_newest_blocks_alone(template: Path) -> None:
    async def body(storage: Storage, _path: Path) -> None:
        chain, traffic = SimulatedChain(), Traffic(4)
        for _ in range(9):
            chain.mine(traffic.block(chain))
        follower = follower_over(chain, storage, confirmation_depth=4)
        storage.bind(deployment_of(chain))
        assert await follower.catch_up() == 5
        assert follower.cursor is not None
        assert follower.cursor.number == 5
        assert follower.lag == 0

    with_storage(template, body)


def test_follower_during_an_outage_pauses_ever_longer_and_says_it_is_not_synced(template: Path) -> None:
    class EnoughError(Exception):
        pass

    async def body(storage: Storage, _path: Path) -> None:
        chain = SimulatedChain(faults=100)
        pauses: list[float] = []
        reasons: list[str | None] = []

        async def pause(seconds: float) -> None:
            pauses.append(seconds)
            reasons.append(follower.not_synced_because)
            if len(pauses) == 8:
                chain.faults = 0
            if len(pauses) == 9:
                raise EnoughError

        limits = FollowerLimits(poll_seconds=0.25, backoff_seconds=1, backoff_maximum_seconds=10)
        follower = ChainFollower(chain, storage, deployment_of(chain), limits=limits, run_blocking=here, pause=pause)
        chain.mine()
        with pytest.raises(EnoughError):
            await follower.run()
        assert pauses == [1, 2, 4, 8, 10, 10, 10, 10, 0.25]
        assert all(reason is not None and "simulated outage" in reason for reason in reasons[:8])
        assert reasons[8] is None

    with_storage(template, body)


def test_follower_meeting_an_unknown_event_stops_and_names_it(template: Path) -> None:
    async def body(storage: Storage, _path: Path) -> None:
        chain = SimulatedChain()
        chain.mine([("NodeRegistry", "NodeTeleported", {"node": address(bytes(20))})])
        follower = follower_over(chain, storage)
        storage.bind(deployment_of(chain))
        with pytest.raises(UnknownEventError, match=r"NodeRegistry\.NodeTeleported"):
            await follower.run()
        assert storage.cursor() is None

    with_storage(template, body)


def test_follower_while_the_disk_is_full_keeps_what_it_has_and_goes_on_afterwards(template: Path) -> None:
    class EnoughError(Exception):
        pass

    async def body(storage: Storage, path: Path) -> None:
        from sqlalchemy import event

        chain, traffic = SimulatedChain(), Traffic(6)
        for _ in range(40):
            chain.mine(traffic.block(chain))
        failures: list[str] = []
        engine = storage._engine

        # SQLite's own way to run out of space: the file may not grow beyond the pages it has.
        def limit(connection: Any, _record: Any, *_: Any) -> None:
            pages = connection.execute("pragma page_count").fetchone()[0]
            connection.execute(f"pragma max_page_count = {pages if len(failures) < 3 else 2**30}")

        event.listen(engine, "checkout", limit)

        async def pause(_seconds: float) -> None:
            if follower.not_synced_because is None:
                raise EnoughError
            failures.append(follower.not_synced_because)
            stored = storage.history()
            assert storage.network_state() == fold(NetworkState(), stored)
            assert stored == chain.history()[: len(stored)]

        follower = ChainFollower(
            chain, storage, deployment_of(chain), limits=FollowerLimits(), run_blocking=here, pause=pause
        )
        with pytest.raises(EnoughError):
            await follower.run()
        assert len(failures) >= 3
        assert all("full" in reason for reason in failures)
        assert storage.history() == chain.history()

    with_storage(template, body)


def test_follower_overtaken_by_a_reorganisation_at_any_question_stores_the_new_branch(template: Path) -> None:
    questions = 0
    for depth in range(1, 5):
        for at in range(1, 40):
            done: list[bool] = []

            async def body(storage: Storage, _path: Path) -> None:
                chain, traffic = SimulatedChain(), Traffic(at)  # noqa: B023
                for _ in range(3):
                    chain.mine(traffic.block(chain))
                follower = follower_over(chain, storage, batch_blocks=8)
                storage.bind(deployment_of(chain))
                await follower.catch_up()
                for _ in range(4):
                    chain.mine(traffic.block(chain))

                def change() -> None:
                    done.append(True)  # noqa: B023
                    chain.reorganise(depth)  # noqa: B023
                    for _ in range(depth + 1):  # noqa: B023
                        chain.mine(traffic.block(chain))

                chain.interrupt(at, change)  # noqa: B023
                for _ in range(2):
                    with contextlib.suppress(UnknownBlockError):
                        await follower.catch_up()
                chain.interrupt(1_000_000, lambda: None)
                await follower.catch_up()
                assert storage.history() == chain.history()
                assert storage.network_state() == fold(NetworkState(), chain.history())

            with_storage(template, body)
            questions += len(done)
    print(f"questions overtaken: {questions}, events lost 0, doubled 0")
    assert questions > 40
