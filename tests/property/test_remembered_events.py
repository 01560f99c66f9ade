"""What a remembering client says of a history is what the chain says, whatever happens near its head."""

from __future__ import annotations

import asyncio
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from bsns.chain.remembering_client import RememberingChainClient
from tests.simulated_chain import SimulatedChain, Traffic

MARGIN = 4
QUERIES: tuple[dict[str, Any], ...] = ({}, {"contract": "NodeRegistry"}, {"name": "NodeRegistered"})
_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("mine"), st.integers(1, 6)),
        st.tuples(st.just("reorganise"), st.integers(1, MARGIN), st.integers(0, MARGIN + 2)),
        st.tuples(st.just("ask"), st.integers(0, len(QUERIES) - 1), st.integers(0, 3)),
    ),
    min_size=1,
    max_size=30,
)


@settings(max_examples=60, deadline=None)
@given(steps=_STEPS, queries=st.integers(1, 3))
def test_remembered_events_are_those_of_the_chain(steps: list[tuple[Any, ...]], queries: int) -> None:
    async def run() -> None:
        chain, traffic = SimulatedChain(), Traffic(5)
        client = RememberingChainClient(chain, 1.0, margin=MARGIN, queries=queries)
        chain.mine(traffic.block(chain))
        for step in [*steps, *(("ask", number, 0) for number in range(len(QUERIES)))]:
            match step:
                case ("mine", blocks):
                    for _ in range(blocks):
                        chain.mine(traffic.block(chain))
                case ("reorganise", depth, blocks) if depth < chain.height:
                    chain.reorganise(depth, *(traffic.block(chain) for _ in range(blocks)))
                case ("ask", number, back):
                    last = max(1, chain.height - back)
                    query = QUERIES[number]
                    assert await client.events_between(1, last, **query) == await chain.events_between(1, last, **query)

    asyncio.run(run())


def test_old_blocks_are_not_read_again() -> None:
    async def run() -> None:
        chain, traffic = SimulatedChain(), Traffic(6)
        for _ in range(50):
            chain.mine(traffic.block(chain))
        asked: list[tuple[int, int]] = []
        through = chain.events_between

        async def counted(first: int, last: int, **query: Any) -> Any:
            asked.append((first, last))
            return await through(first, last, **query)

        chain.events_between = counted  # type: ignore[method-assign]
        client = RememberingChainClient(chain, 1.0, margin=MARGIN)
        await client.events_between(1, 50)
        await client.events_between(1, 50)
        assert asked == [(1, 50), (50 - MARGIN + 1, 50)]

    asyncio.run(run())
