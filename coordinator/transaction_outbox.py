"""Intents become transactions, each at most once, whatever moment the process dies at.

Owns the coordinator key's nonces. Promises OUTBOX-01: an intent is stored before it is a transaction, and nonce and
signed transaction are stored together before the first broadcast, so that a restart sends the same bytes again and
never a second transaction beside them. A slow transaction is replaced under its own nonce with higher fees, a dropped
one is sent again, one that a reorganisation took back goes back to sent, and one whose nonce another program used
gets a new nonce once that is confirmed. A nonce that another program's transaction had until a reorganisation took it
back, and for which nothing waits, gets an empty transfer: else all behind it would wait forever. A refusal of the
contracts is stored with its decoded reason, and tried again only if somebody still wants the intent. One instance a
key; does not decide what is wanted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

import structlog

from bsns.chain.client import Block, ChainClient, Receipt
from bsns.chain.errors import ChainUnavailableError, ContractError
from bsns.chain.signer import Signer
from bsns.protocol.identifiers import keccak256
from coordinator.storage import Intent, IntentRecord, IntentState, SignedTransaction, Storage

_OPEN_STATES: Final = (IntentState.SIGNED, IntentState.SENT, IntentState.MINED)
# A replacement with less than a tenth more is refused by the transaction pools; an eighth is what clients use.
_BUMP_NUMERATOR: Final = 9
_BUMP_DENOMINATOR: Final = 8

_T = TypeVar("_T")
_log = structlog.get_logger(__name__)


class WorkerThread(Protocol):
    """Runs a blocking call somewhere it does not stop the event loop (asyncio.to_thread), or here, in a test."""

    def __call__(self, function: Callable[[], _T], /) -> Awaitable[_T]: ...


@dataclass(frozen=True, slots=True)
class OutboxLimits:
    """Blocks and seconds. `confirmations` counts the block of the transaction itself."""

    confirmations: int = 2
    in_flight: int = 64
    rebroadcast_seconds: float = 15.0
    replace_seconds: float = 45.0
    replacements: int = 6
    refusal_backoff_seconds: float = 2.0
    refusal_backoff_maximum_seconds: float = 120.0


@dataclass(frozen=True, slots=True)
class OutboxPass:
    """What one pass did."""

    signed: int = 0
    broadcast: int = 0
    mined: int = 0
    confirmed: int = 0
    refused: int = 0


class TransactionOutbox:
    """The intents of one signer. `step` makes one pass; passes exclude one another."""

    def __init__(
        self,
        chain: ChainClient,
        storage: Storage,
        signer: Signer,
        *,
        limits: OutboxLimits,
        clock: Callable[[], float],
        run_blocking: WorkerThread = asyncio.to_thread,
    ) -> None:
        self._chain = chain
        self._storage = storage
        self._signer = signer
        self._limits = limits
        self._clock = clock
        self._blocking = run_blocking
        self._one_pass = asyncio.Lock()
        # The head at which a nonce was seen used by somebody else; forgotten at a restart, which only delays.
        self._lost_since: dict[int, Block] = {}
        self.wake = asyncio.Event()

    @property
    def sender(self) -> str:
        """Address whose nonces these are."""
        return self._signer.address

    async def want(self, intent: Intent) -> bool:
        """Have `intent` happen once; harmless to repeat. Returns whether this was news."""
        now = self._clock()
        news = await self._blocking(lambda: self._storage.want_intent(intent, self.sender, now))
        if news:
            _log.info("intent_wanted", key=intent.key, function=f"{intent.contract}.{intent.function}")
            self.wake.set()
        return news

    async def step(self) -> OutboxPass:
        """Follow up on open transactions, then sign and send what is wanted. ChainUnavailableError passes through."""
        async with self._one_pass:
            head = await self._chain.head()
            counts = dict.fromkeys(("signed", "broadcast", "mined", "confirmed", "refused", "waiting"), 0)
            open_ = await self._blocking(
                lambda: self._storage.intents(_OPEN_STATES, self._limits.in_flight, self.sender)
            )
            next_to_mine = await self._chain.transaction_count(self.sender, pending=False) if open_ else 0
            for record in open_:
                counts[await self._follow_up(record, head, next_to_mine)] += 1
            counts["broadcast"] += await self._fill_gap(open_, next_to_mine)
            room = self._limits.in_flight - len(open_)
            if room > 0:
                wanted = await self._blocking(lambda: self._storage.intents((IntentState.WANTED,), room, self.sender))
                for record in wanted:
                    outcome = await self._sign_and_send(record)
                    counts["signed"] += outcome == "broadcast"
                    counts[outcome] += 1
            counts.pop("waiting", None)
            return OutboxPass(**counts)

    # ------------------------------------------------------------------------------------------------ wanted → sent

    async def _sign_and_send(self, record: IntentRecord) -> str:
        nonce = max(
            await self._blocking(lambda: self._storage.next_nonce(self.sender)),
            await self._chain.transaction_count(self.sender, pending=False),
        )
        intent = record.intent
        try:
            fields = await self._chain.prepare(
                intent.contract, intent.function, intent.arguments, sender=self.sender, value=intent.value, nonce=nonce
            )
        except ContractError as error:
            return await self._refuse(record, str(error))
        transaction = self._sign(nonce, fields)
        # From here on the transaction exists: it is broadcast now or after a restart, these very bytes.
        await self._blocking(lambda: self._storage.assign_transaction(record.sequence, transaction))
        _log.info("transaction_signed", key=intent.key, nonce=nonce, transaction="0x" + transaction.hash.hex())
        await self._broadcast(record.sequence, transaction)
        return "broadcast"

    def _sign(self, nonce: int, fields: dict[str, object]) -> SignedTransaction:
        raw = self._signer.sign_transaction(fields)
        return SignedTransaction(keccak256(raw), nonce, fields, raw, self._clock())

    async def _broadcast(self, sequence: int, transaction: SignedTransaction) -> None:
        try:
            await self._chain.send_raw(transaction.raw)
        except ChainUnavailableError as error:
            # It stays signed and is sent again by the next pass; if the nonce is used already, the receipt tells.
            _log.warning("broadcast_failed", transaction="0x" + transaction.hash.hex(), error=str(error))
            return
        now = self._clock()
        await self._blocking(lambda: self._storage.mark_sent(sequence, transaction.hash, now))

    # ------------------------------------------------------------------------------------------------ sent → confirmed

    async def _follow_up(self, record: IntentRecord, head: Block, next_to_mine: int) -> str:
        nonce = record.nonce
        if nonce is None:
            raise RuntimeError(
                f"intent {record.intent.key} is {record.state} without a nonce: the database was changed by hand"
            )
        transactions = await self._blocking(lambda: self._storage.transactions(record.sequence, nonce))
        # Each replaces the one before at a higher fee. The clock does not tell: it may stand still or be set back.
        transactions.sort(key=lambda item: int(item.fields["maxFeePerGas"]))
        receipt = await self._receipt(transactions)
        if receipt is not None:
            return await self._mined(record, receipt, head)
        if record.state == IntentState.MINED:
            _log.warning("transaction_taken_back", key=record.intent.key, nonce=nonce)
            await self._blocking(lambda: self._storage.mark_unmined(record.sequence))
        if next_to_mine > nonce:
            return await self._nonce_used(record, nonce, head)
        self._lost_since.pop(record.sequence, None)
        return await self._push(record, transactions, nonce == next_to_mine)

    async def _receipt(self, transactions: list[SignedTransaction]) -> Receipt | None:
        for transaction in reversed(transactions):
            receipt = await self._chain.receipt(transaction.hash)
            if receipt is not None:
                return receipt
        return None

    async def _mined(self, record: IntentRecord, receipt: Receipt, head: Block) -> str:
        outcome = "waiting"
        if (record.state, record.mined_block_hash) != (IntentState.MINED, receipt.block_hash):
            await self._blocking(
                lambda: self._storage.mark_mined(
                    record.sequence,
                    receipt.transaction_hash,
                    receipt.block_number,
                    receipt.block_hash,
                    receipt.succeeded,
                )
            )
            _log.info(
                "transaction_mined",
                key=record.intent.key,
                block=receipt.block_number,
                succeeded=receipt.succeeded,
                gas=receipt.gas_used,
            )
            outcome = "mined"
        if head.number - receipt.block_number + 1 < self._limits.confirmations:
            return outcome
        if receipt.succeeded:
            await self._blocking(lambda: self._storage.mark_confirmed(record.sequence))
            return "confirmed"
        return await self._refuse(record, await self._revert_reason(record))

    async def _revert_reason(self, record: IntentRecord) -> str:
        """Ask the contracts again: what passed in simulation was overtaken by another transaction."""
        intent = record.intent
        try:
            await self._chain.prepare(
                intent.contract,
                intent.function,
                intent.arguments,
                sender=self.sender,
                value=intent.value,
                nonce=record.nonce or 0,
            )
        except ContractError as error:
            return f"mined and reverted: {error}"
        return "mined and reverted; the call would succeed now"

    async def _refuse(self, record: IntentRecord, reason: str) -> str:
        limits = self._limits
        attempts = record.attempts + 1
        pause = min(limits.refusal_backoff_seconds * 2 ** min(attempts - 1, 16), limits.refusal_backoff_maximum_seconds)
        retry_at = self._clock() + pause
        await self._blocking(lambda: self._storage.mark_refused(record.sequence, reason, attempts, retry_at))
        _log.warning("intent_refused", key=record.intent.key, reason=reason, attempts=attempts)
        return "refused"

    async def _nonce_used(self, record: IntentRecord, nonce: int, head: Block) -> str:
        """The account is past our nonce and none of our transactions has a receipt: another program used it."""
        since = self._lost_since.get(record.sequence)
        known = None if since is None else await self._chain.block(since.number)
        if since is None or known is None or known.hash != since.hash:
            # In another branch the other transaction may be in a later block: its confirmations are counted anew.
            self._lost_since.pop(record.sequence, None)
            seen = await self._chain.head()
            used = await self._chain.transaction_count(self.sender, pending=False) > nonce
            if used and (await self._chain.head()).hash == seen.hash:
                self._lost_since[record.sequence] = seen
        elif head.number - since.number >= self._limits.confirmations:
            _log.error(
                "nonce_used_by_another_program",
                key=record.intent.key,
                nonce=nonce,
                advice="this key must have one owner: stop the other program",
            )
            await self._blocking(lambda: self._storage.mark_nonce_lost(record.sequence))
            self._lost_since.pop(record.sequence, None)
            self.wake.set()
        return "waiting"

    async def _fill_gap(self, open_: list[IntentRecord], next_to_mine: int) -> bool:
        """Send an empty transfer under the next nonce if open transactions wait behind it and nobody has one for it.

        It is not stored: two of them, before and after a kill, exclude each other and change nothing.
        """
        nonces = {record.nonce for record in open_ if record.nonce is not None}
        if next_to_mine in nonces or max(nonces, default=0) <= next_to_mine:
            return False
        # An intent has it that was confirmed or refused: the follower opens it again, or the endpoint lags behind.
        if await self._blocking(lambda: self._storage.has_nonce(self.sender, next_to_mine)):
            return False
        if await self._chain.transaction_count(self.sender, pending=True) != next_to_mine:
            return False
        fields = await self._chain.prepare_transfer(self.sender, 0, sender=self.sender, nonce=next_to_mine)
        filler = self._sign(next_to_mine, fields)
        _log.warning(
            "free_nonce_filled",
            nonce=next_to_mine,
            transaction="0x" + filler.hash.hex(),
            advice="a reorganisation took back another program's transaction: this key must have one owner",
        )
        try:
            await self._chain.send_raw(filler.raw)
        except ChainUnavailableError as error:
            _log.warning("broadcast_failed", transaction="0x" + filler.hash.hex(), error=str(error))
            return False
        return True

    async def _push(self, record: IntentRecord, transactions: list[SignedTransaction], is_next: bool) -> str:
        """Broadcast what was never or long ago broadcast; replace what waits too long at the front of the queue."""
        now = self._clock()
        latest = transactions[-1]
        waited = now - transactions[0].signed_at
        if (
            is_next
            and len(transactions) <= self._limits.replacements
            and latest.broadcast_at is not None
            and waited >= self._limits.replace_seconds * len(transactions)
        ):
            return await self._replace(record, latest)
        if latest.broadcast_at is None or now - latest.broadcast_at >= self._limits.rebroadcast_seconds:
            await self._broadcast(record.sequence, latest)
            return "broadcast"
        return "waiting"

    async def _replace(self, record: IntentRecord, latest: SignedTransaction) -> str:
        """The same call under the same nonce with higher fees. Not prepared anew: the pending block already has it."""
        fields = dict(latest.fields)
        for name in ("maxFeePerGas", "maxPriorityFeePerGas"):
            fields[name] = int(fields[name]) * _BUMP_NUMERATOR // _BUMP_DENOMINATOR + 1
        replacement = self._sign(latest.nonce, fields)
        await self._blocking(lambda: self._storage.add_replacement(record.sequence, replacement))
        _log.warning(
            "transaction_replaced",
            key=record.intent.key,
            nonce=latest.nonce,
            maximum_fee_per_gas=fields["maxFeePerGas"],
        )
        await self._broadcast(record.sequence, replacement)
        return "broadcast"
