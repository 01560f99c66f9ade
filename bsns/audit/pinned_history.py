"""The logs and the state of one fork of the chain, the one that ends with a given block.

Owns how many questions an auditor may ask for a range of blocks without two forks getting mixed: the last blocks are
read by hash, along their parents' hashes from the last one; what is older, in ranges, each of which counts only if the
block that the hashes lead to is still where it was. State is asked for by the last block's hash. Promises events in
the order of the chain, one transaction at a time, never more than one chunk in memory; AuditError, which says what to
do, for a block that is not there or state that the endpoint has thrown away; ChainUnavailableError if the chain was
reorganised meanwhile, which says nothing about what was to be audited. Trusts the RPC endpoint for logs and headers.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any, Final, TypeVar

from bsns.audit.chain_facts import position
from bsns.audit.errors import AuditError
from bsns.chain.errors import ChainUnavailableError, EndpointRefusedError, UnknownBlockError

if TYPE_CHECKING:  # the chain client is slow to import
    from bsns.chain.client import Block, ChainClient, ChainEvent
    from bsns.chain.deployment import Deployment

BLOCKS_A_CHUNK: Final = 2_000
"""Blocks whose logs are asked for at once. Halved while the endpoint refuses, then doubled up to this again."""
UNSETTLED_BLOCKS: Final = 64
"""Blocks before the last one that are read by hash: two epochs of Ethereum, after which it calls a block final."""
READS_AT_ONCE: Final = 8
"""Questions that wait for the endpoint at the same time."""
# All logs that a report needs. Documents announced on ShardAssignments are not among them: anybody may announce any
# number of them, 96 KiB each.
_SOURCES: Final[tuple[tuple[str, str | None], ...]] = (
    ("NodeRegistry", None),
    ("ShardAssignments", "ModelRegistered"),
    ("ShardAssignments", "PlanPublished"),
    ("InferenceEscrow", None),
    ("OutputVerification", None),
    ("RequestTabs", None),
)
_LEFT_OUT: Final = frozenset({"DocumentAnnounced"})
_Result = TypeVar("_Result")
Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""


def silent(_what: str, _done: int, _total: int) -> None:
    """A Progress that shows nothing."""


@dataclass(frozen=True, slots=True)
class PinnedHistory:
    """The chain up to `last`. `unsettled` are the headers from some block to `last`, each the parent of the next;
    `anchor` is the parent of the first of them, None if the deployment begins among them.
    """

    client: ChainClient
    deployment: Deployment
    last: Block
    unsettled: tuple[Block, ...]
    anchor: Block | None
    progress: Progress = silent

    @classmethod
    async def ending_at(
        cls, client: ChainClient, deployment: Deployment, number: int, progress: Progress = silent
    ) -> PinnedHistory:
        """Pin the fork that block `number` is on now. AuditError if there is no such block, none of the deployment, or
        none whose state the endpoint still has.
        """
        head = await client.head()
        if number > head.number:
            raise AuditError(
                f"block {number} is not there yet: the newest block is {head.number}; give --to {head.number} or less, "
                "or leave --to out"
            )
        if number < deployment.first_block:
            raise AuditError(
                f"block {number} is before the contracts, which begin at block {deployment.first_block}: give --to "
                f"{deployment.first_block} or more, or another --deployment"
            )
        start = max(deployment.first_block, number - UNSETTLED_BLOCKS + 1)
        numbers = range(max(0, start - 1), number + 1)
        headers = await at_once(partial(_header, client, n) for n in numbers)
        for parent, child in pairwise(headers):
            if child.parent_hash != parent.hash:
                raise _reorganised(child.number)
        anchored = start > deployment.first_block
        history = cls(
            client,
            deployment,
            headers[-1],
            tuple(item for item in headers if item.number >= start),
            headers[0] if anchored else None,
            progress,
        )
        await history._require_state()
        return history

    async def header(self, number: int) -> Block:
        """Header of a block up to `last`."""
        first = self.unsettled[0].number
        return self.unsettled[number - first] if number >= first else await _header(self.client, number)

    async def first_block_at(self, time: int, low: int, high: int) -> Block:
        """The first of the blocks [low, high] whose time is `time` or later; `high` must be one."""
        while low < high:
            middle = (low + high) // 2
            if (await self.header(middle)).timestamp >= time:
                high = middle
            else:
                low = middle + 1
        return await self.header(high)

    async def transactions(self, what: str, first: int, last: int) -> AsyncIterator[tuple[ChainEvent, ...]]:
        """Events of the blocks [first, last], one transaction after the other, in the order of the chain."""
        before = (first - 1, 0)
        async for until, events in self._chunks(first, last):
            for event in events:
                if not (before < position(event) and event.block_number <= until):
                    raise ChainUnavailableError(
                        f"the RPC endpoint gave log {event.log_index} of block {event.block_number} twice or out of "
                        "order: its index is broken, try another endpoint"
                    )
                before = position(event)
            for _, group in groupby(events, key=lambda item: item.transaction_hash):
                yield tuple(group)
            self.progress(what, until - first + 1, last - first + 1)

    async def call(self, contract: str, function: str, *arguments: Any) -> Any:
        """Result of a view in the state after `last`; ContractError if it reverts."""
        return await self._state(lambda: self.client.call(contract, function, *arguments, block=self.last.hash))

    async def balance(self, account: str) -> int:
        """Wei of an account after `last`."""
        return await self._state(lambda: self.client.balance(account, block=self.last.hash))

    async def require_unchanged(self) -> None:
        """ChainUnavailableError unless `last` is still on the endpoint's chain: nothing read before would count."""
        found = await self.client.block(self.last.number)
        if found is None or found.hash != self.last.hash:
            raise _reorganised(self.last.number)

    async def _chunks(self, first: int, last: int) -> AsyncIterator[tuple[int, Sequence[ChainEvent]]]:
        """Events by chunks of blocks, with the last block of each chunk."""
        size, at, settled = BLOCKS_A_CHUNK, first, self.unsettled[0].number - 1
        while at <= min(last, settled):
            until = min(last, settled, at + size - 1)
            try:
                events = await self._settled(at, until)
            except EndpointRefusedError:
                if until == at:
                    raise
                size = max(1, (until - at + 1) // 2)
                continue
            yield until, events
            at, size = until + 1, min(BLOCKS_A_CHUNK, size * 2)
        headers = [item for item in self.unsettled if at <= item.number <= last]
        for start in range(0, len(headers), READS_AT_ONCE):
            some = headers[start : start + READS_AT_ONCE]
            logs = await at_once(partial(self._of_block, block) for block in some)
            yield some[-1].number, [event for group in logs for event in group]

    async def _settled(self, first: int, last: int) -> Sequence[ChainEvent]:
        found: list[ChainEvent] = []
        for contract, name in _SOURCES:
            found += await self.client.events_between(first, last, contract=contract, name=name)
        assert self.anchor is not None, "blocks before the unsettled ones have an anchor"
        if (await _header(self.client, self.anchor.number)).hash != self.anchor.hash:
            raise _reorganised(self.anchor.number)
        return sorted(found, key=position)

    async def _of_block(self, block: Block) -> Sequence[ChainEvent]:
        try:
            events = await self.client.events(block.hash)
        except UnknownBlockError:
            raise _reorganised(block.number) from None
        return [item for item in events if item.name not in _LEFT_OUT]

    async def _require_state(self) -> None:
        """Before anything long begins."""
        await self.balance(self.deployment.inference_escrow)
        await self.call("NodeRegistry", "totalSortitionStake")

    async def _state(self, read: Callable[[], Awaitable[_Result]]) -> _Result:
        try:
            return await read()
        except (EndpointRefusedError, UnknownBlockError) as error:
            await self.require_unchanged()
            raise AuditError(
                f"the RPC endpoint has logs but no state of block {self.last.number} ({error}): give the endpoint of "
                "an archive node, or a --to among the newest blocks, whose state every node keeps"
            ) from error


async def at_once(
    reads: Iterable[Callable[[], Awaitable[_Result]]], done: Callable[[int], None] = lambda _count: None
) -> list[_Result]:
    """Results of all `reads` in their order, READS_AT_ONCE at a time; the first error once its batch is over. `done`
    is called with how many there are so far.
    """
    found: list[_Result] = []
    for batch in _batches(reads):
        results = await asyncio.gather(*(read() for read in batch), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                raise result
            found.append(result)
        done(len(found))
    return found


def _batches(reads: Iterable[Callable[[], Awaitable[_Result]]]) -> Iterator[list[Callable[[], Awaitable[_Result]]]]:
    batch = []
    for read in reads:
        batch.append(read)
        if len(batch) == READS_AT_ONCE:
            yield batch
            batch = []
    if batch:
        yield batch


async def _header(client: ChainClient, number: int) -> Block:
    found = await client.block(number)
    if found is None:
        raise AuditError(
            f"the RPC endpoint has no block {number}, though it has later ones: it keeps no old headers or is not in "
            "sync, try another endpoint"
        )
    return found


def _reorganised(number: int) -> ChainUnavailableError:
    return ChainUnavailableError(
        f"block {number} was replaced while the report was made: the chain was reorganised or the endpoint is not in "
        "sync; run the report again, or end it at an older block"
    )
