"""Follows the chain block by block, by hash, through reorganisations and outages.

Owns the cursor. Reads the next block by number, checks that its parent is the stored one, reads its events by block
hash (logs cannot mix forks) and stores block, events, aggregates and cursor in one transaction. If a parent does not
fit, or the stored head is gone, it walks back to the common ancestor and takes everything above it back first.
Promises SYNC-01 and that no event is lost or counted twice; halts loudly when a reorganisation goes deeper than the
limit. An endpoint or database that fails is tried again with growing pauses, and the follower says that it is not
synced. Does not act on what it reads.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import structlog

from bsns.chain.client import Block, ChainClient, ChainEvent
from bsns.chain.deployment import Deployment
from bsns.chain.errors import ChainError, ChainUnavailableError, UnknownBlockError, WrongChainError
from coordinator.storage import Rollback, Storage, StorageUnavailableError
from coordinator.transaction_outbox import WorkerThread

_log = structlog.get_logger(__name__)


class ReorganisationTooDeepError(ChainError):
    """The chain was rewritten deeper than the limit. Check the endpoint; if it is right, rebuild the database."""


class InconsistentEndpointError(ChainUnavailableError):
    """The endpoint contradicts itself (logs of another block, a gap): it is not to be believed now."""


@dataclass(frozen=True, slots=True)
class FollowerLimits:
    """Blocks and seconds. `confirmation_depth` blocks below the head are left alone (0: follow the head itself).

    A follower at most `synced_within_blocks` behind counts as synced: otherwise every new block would make it unready.
    """

    confirmation_depth: int = 0
    maximum_reorganisation_depth: int = 256
    poll_seconds: float = 0.5
    backoff_seconds: float = 0.5
    backoff_maximum_seconds: float = 30.0
    batch_blocks: int = 256
    synced_within_blocks: int = 3


class ChainFollower:
    """Keeps `storage` at the head of the chain. `run` until cancelled, or `catch_up` once."""

    def __init__(
        self,
        chain: ChainClient,
        storage: Storage,
        deployment: Deployment,
        *,
        limits: FollowerLimits,
        run_blocking: WorkerThread = asyncio.to_thread,
        pause: Callable[[float], Awaitable[None]] = asyncio.sleep,
        on_change: Callable[[], None] = lambda: None,
    ) -> None:
        self._chain = chain
        self._storage = storage
        self._deployment = deployment
        self._limits = limits
        self._blocking = run_blocking
        self._pause = pause
        self._on_change = on_change
        self._cursor: Block | None = None
        self._head: Block | None = None
        self._failure: str | None = "not started"
        # The newest ones, and how many there were in all.
        self.reorganisations: list[Rollback] = []
        self.rollbacks = 0

    @property
    def cursor(self) -> Block | None:
        """Last block whose events are stored."""
        return self._cursor

    @property
    def head(self) -> Block | None:
        """Head of the chain when it was last asked."""
        return self._head

    @property
    def lag(self) -> int | None:
        """Blocks between the head (less the confirmation depth) and the cursor; None before the first answer."""
        if self._head is None or self._cursor is None:
            return None
        return max(0, self._head.number - self._limits.confirmation_depth - self._cursor.number)

    @property
    def not_synced_because(self) -> str | None:
        """Why the state must not be acted on, or None if it is current."""
        if self._failure is not None:
            return self._failure
        lag = self.lag
        if lag is None:
            return "no block is stored yet"
        return None if lag <= self._limits.synced_within_blocks else f"{lag} blocks behind the head"

    async def require_right_chain(self) -> None:
        """WrongChainError unless the endpoint is on the deployment's chain; then bind the database to it."""
        actual = await self._chain.chain_id()
        if actual != self._deployment.chain_id:
            raise WrongChainError(
                f"the endpoint is on chain {actual}, the deployment on {self._deployment.chain_id}: fix the settings"
            )
        await self._blocking(lambda: self._storage.bind(self._deployment))

    async def run(self) -> None:
        """Follow until cancelled. Errors that waiting cannot mend pass through."""
        failures = 0
        while True:
            try:
                if self._cursor is None:
                    await self.require_right_chain()
                await self.catch_up()
            except (ChainUnavailableError, UnknownBlockError, StorageUnavailableError) as error:
                pause = min(self._limits.backoff_seconds * 2 ** min(failures, 16), self._limits.backoff_maximum_seconds)
                failures += 1
                self._failure = f"{type(error).__name__}: {error}"
                _log.warning("follower_waits", error=self._failure, pause_seconds=pause, failures=failures)
                await self._pause(pause)
                continue
            failures = 0
            await self._pause(self._limits.poll_seconds)

    async def catch_up(self) -> int:
        """Store blocks until the head (less the confirmation depth), at most a batch at a time; returns how many."""
        stored = 0
        while True:
            self._head = await self._chain.head()
            step = await self._batch(self._head)
            stored += step
            if step < self._limits.batch_blocks:
                break
        self._failure = None
        return stored

    async def _batch(self, head: Block) -> int:
        cursor = await self._blocking(self._storage.cursor)
        if cursor is not None:
            cursor = await self._canonical(cursor)
        self._cursor = cursor
        target = head.number - self._limits.confirmation_depth
        stored = 0
        while stored < self._limits.batch_blocks:
            number = self._deployment.first_block if cursor is None else cursor.number + 1
            if number > target:
                break
            block = await self._chain.block(number)
            if block is None:
                break  # the chain became shorter meanwhile: the next poll sees why
            if cursor is not None and block.parent_hash != cursor.hash:
                cursor = await self._canonical(cursor)
                self._cursor = cursor
                continue
            events = await self._events(block)
            fresh = block
            await self._blocking(lambda: self._storage.append_block(fresh, events))  # noqa: B023 - awaited at once
            self._cursor = cursor = block
            stored += 1
            self._on_change()
        return stored

    async def _events(self, block: Block) -> tuple[ChainEvent, ...]:
        events = await self._chain.events(block.hash)
        indices = [event.log_index for event in events]
        if any(event.block_hash != block.hash for event in events) or indices != sorted(set(indices)):
            raise InconsistentEndpointError(
                f"the endpoint gave logs of another block for block {block.number}: it is behind a bad load balancer?"
            )
        # Tabs and batches are nobody's aggregates yet; a leaf that is opened is followed as the request it becomes.
        return tuple(event for event in events if event.contract != "RequestTabs")

    async def _canonical(self, cursor: Block) -> Block:
        """`cursor` if it is still canonical; else the common ancestor, after everything above it was taken back."""
        ancestor = cursor
        for depth in range(self._limits.maximum_reorganisation_depth + 1):
            number = cursor.number - depth
            known = cursor if depth == 0 else await self._blocking(lambda: self._storage.block_at(number))  # noqa: B023
            if known is None:
                break
            actual = await self._chain.block(number)
            if actual is not None and actual.hash == known.hash:
                ancestor = known
                if depth:
                    await self._roll_back(cursor, ancestor)
                return ancestor
        raise ReorganisationTooDeepError(
            f"none of the stored blocks {cursor.number - self._limits.maximum_reorganisation_depth} to {cursor.number} "
            "is on the chain any more: check that the endpoint is honest and on the right fork; if it is, start with a "
            "new database"
        )

    async def _roll_back(self, cursor: Block, ancestor: Block) -> None:
        rollback = await self._blocking(lambda: self._storage.roll_back(ancestor.number))
        self.rollbacks += 1
        self.reorganisations.append(rollback)
        del self.reorganisations[: -self._limits.batch_blocks]
        _log.warning(
            "chain_reorganised",
            from_block=cursor.number,
            ancestor=ancestor.number,
            depth=cursor.number - ancestor.number,
            orphaned_events=rollback.orphaned_events,
            rebuilt_aggregates=rollback.rebuilt_aggregates,
            reopened_intents=rollback.reopened_intents,
        )
        self._on_change()
