"""The gateway's money on the chain: its tab with the collector, deposits of users, and withdrawals to them.

Owns every transaction that the gateway sends. Promises that a withdrawal's transaction is stored before it is sent and
that another one takes its place only when its nonce can never be used by it any more, so that nobody is paid twice;
that a deposit counts only when it was mined, deep enough, from the account's own address; and that the tab is filled
without touching what users are owed. Transactions go out one at a time: one key has one row of nonces.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Final

import structlog

from bsns.chain.client import ChainClient
from bsns.chain.errors import ChainError, ChainUnavailableError
from bsns.chain.signer import Signer
from bsns.chain.submitter import Submitter
from bsns.protocol.contract_states import RequestStatus
from bsns.protocol.identifiers import ProtocolError, RequestId, address, keccak256
from bsns.requester.errors import RequesterError
from bsns.requester.tab import Tab
from coordinator.gateway.errors import ApiError
from coordinator.gateway.metrics import GatewayMetrics
from coordinator.gateway.settings import GatewaySettings
from coordinator.storage import (
    Account,
    AccountBook,
    Storage,
    Withdrawal,
    WithdrawalState,
)

HASH_BYTES: Final = 32
REFUNDS_A_LOOK: Final = 256
_log = structlog.get_logger(__name__)


class Treasury:
    """`signer` is the account that users deposit to and that pays the network."""

    def __init__(
        self,
        chain: ChainClient,
        signer: Signer,
        tab: Tab,
        book: AccountBook,
        storage: Storage,
        settings: GatewaySettings,
        metrics: GatewayMetrics,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._chain, self._signer, self._tab = chain, signer, tab
        self._book, self._storage, self._settings, self._metrics = book, storage, settings, metrics
        self._clock = clock
        self._submitter = Submitter(chain, signer)
        self._sending = asyncio.Lock()
        # Head at which a withdrawal's nonce was first seen used by another transaction.
        self._passed_over: dict[str, int] = {}
        self._refunds_after: tuple[int, int] = (-1, -1)
        self.not_ready_because: str | None = "the tab was not looked at yet"

    @property
    def address(self) -> str:
        return self._signer.address

    # -- deposits and withdrawals

    async def deposit(self, account: Account, transaction: str) -> Account:
        """Credit the transaction with that hash to `account`; ApiError says what is wrong with it."""
        try:
            digest = bytes.fromhex(transaction.removeprefix("0x"))
        except ValueError:
            digest = b""
        if len(digest) != HASH_BYTES:
            raise ApiError(400, "transaction is not a hash: 0x and 64 hexadecimal digits", param="transaction")
        moved = await self._chain.transfer(digest)
        if moved is None:
            raise ApiError(
                409, "this transaction is not mined: come back when it is", kind="conflict_error",
                code="not_mined", headers={"Retry-After": "5"},
            )  # fmt: skip
        if not moved.succeeded or moved.recipient is None or address(moved.recipient) != self.address:
            raise ApiError(400, f"this transaction did not send anything to {self.address}", param="transaction")
        if account.address is None or address(moved.sender) != account.address:
            raise ApiError(
                403, f"this transaction is of {moved.sender}, deposits of this account come from {account.address}",
                param="transaction",
            )  # fmt: skip
        deep = (await self._chain.head()).number - moved.block_number + 1
        if deep < self._settings.deposit_confirmations:
            missing = self._settings.deposit_confirmations - deep
            raise ApiError(
                409, f"the deposit counts in {missing} blocks: come back then", kind="conflict_error",
                code="not_confirmed", headers={"Retry-After": "5"},
            )  # fmt: skip
        if moved.value == 0:
            raise ApiError(400, "this transaction sent nothing", param="transaction")
        return await asyncio.to_thread(
            self._book.deposit, account.account_id, moved.value, "0x" + digest.hex(), int(self._clock())
        )

    async def step(self) -> None:
        """One look at everything: withdrawals, the tab, secrets of its vouchers, refunds."""
        try:
            await self.pay_out()
            await self._fill_tab()
            await self._tab.show_secrets()
            await self._pass_refunds_on()
            await self._collect_credit()
        except (ChainError, RequesterError, ProtocolError) as error:
            self.not_ready_because = f"the tab cannot be looked after: {error}"
            _log.warning("treasury_waits", error=f"{type(error).__name__}: {error}")

    async def pay_out(self) -> None:
        """Bring withdrawals forward: sign what is wanted, send what is signed, tick off what is mined."""
        for item in await asyncio.to_thread(self._book.open_withdrawals):
            async with self._sending:
                await self._pay(item)
        async with self._sending:
            await self._close_gap()

    async def _pay(self, item: Withdrawal) -> None:
        if item.state is WithdrawalState.SIGNED:
            assert item.raw is not None, "stored with its state"
            receipt = await self._chain.receipt(keccak256(item.raw))
            if receipt is not None:
                deep = (await self._chain.head()).number - receipt.block_number + 1
                if deep < self._settings.deposit_confirmations:
                    return
                if receipt.succeeded:
                    await asyncio.to_thread(self._book.finish_withdrawal, item.withdrawal_id)
                    _log.info("withdrawn", withdrawal=item.withdrawal_id, wei=item.amount)
                    return
                # It was mined and moved nothing: its nonce is gone, and it can be sent anew.
            elif not await self._is_lost(item):
                await self._send(item.raw)
                return
        nonce = await self._chain.transaction_count(self.address)
        unsigned = await self._chain.prepare_transfer(item.recipient, item.amount, sender=self.address, nonce=nonce)
        raw = self._signer.sign_transaction(unsigned)
        await asyncio.to_thread(self._book.sign_withdrawal, item.withdrawal_id, nonce, raw, keccak256(raw))
        await self._send(raw)

    async def _close_gap(self) -> None:
        """Where a transaction of this key was forgotten by the chain, withdrawals behind it wait for its nonce: use it
        up. Signing them anew would pay twice if it came back.
        """
        signed = [item.nonce for item in await asyncio.to_thread(self._book.open_withdrawals) if item.nonce is not None]
        following = await self._chain.transaction_count(self.address)
        if not signed or following >= min(signed):
            return
        nothing = await self._chain.prepare_transfer(self.address, 0, sender=self.address, nonce=following)
        await self._send(self._signer.sign_transaction(nothing))

    async def _is_lost(self, item: Withdrawal) -> bool:
        """Whether another transaction used the nonce, and that for as many blocks as a deposit waits: the receipt of
        one that was mined a moment ago may not be there yet, and a reorganisation may give the nonce back.
        """
        assert item.nonce is not None, "asked of signed ones"
        if await self._chain.transaction_count(self.address, pending=False) <= item.nonce:
            self._passed_over.pop(item.withdrawal_id, None)
            return False
        head = (await self._chain.head()).number
        first = self._passed_over.setdefault(item.withdrawal_id, head)
        return head - first >= self._settings.deposit_confirmations

    async def _send(self, raw: bytes) -> None:
        try:
            await self._chain.send_raw(raw)
        except ChainUnavailableError as error:
            # It is stored, and sent again with the next look.
            _log.info("withdrawal_not_sent", error=str(error))

    # -- the tab

    async def _fill_tab(self) -> None:
        settings = self._settings
        standing = await self._tab.standing()
        free = standing.balance - (standing.outstanding or 0)
        held = await self._chain.balance(self.address)
        owed = await asyncio.to_thread(self._book.owed)
        self._metrics.tab_wei.set(free)
        self._metrics.account_wei.set(held)
        self._metrics.owed_wei.set(owed)
        if standing.closes_at or free < settings.tab_minimum_wei:
            wanted = settings.tab_target_wei - free
            affordable = held - settings.reserve_wei
            amount = min(wanted, affordable)
            if amount > 0:
                async with self._sending:
                    transaction = await self._tab.fund(amount)
                _log.info("tab_funded", wei=amount, transaction=transaction)
                free += amount
        if free <= 0:
            self.not_ready_because = (
                f"the gateway's account {self.address} holds {held} wei, too little to fill its tab: send it more"
            )
        else:
            self.not_ready_because = None

    # -- refunds

    async def _pass_refunds_on(self) -> None:
        """Give users back what the network gave back: requests of ours whose answers were refused by a verdict."""
        cursor = await asyncio.to_thread(self._storage.cursor)
        final = -1 if cursor is None else cursor.number - self._settings.deposit_confirmations + 1
        while True:
            batch = await asyncio.to_thread(self._storage.finished_requests, self._refunds_after, REFUNDS_A_LOOK)
            for place, request in batch:
                if place[0] > final:
                    return
                if request.requester == self.address and request.status is RequestStatus.REFUNDED:
                    await self._refund(RequestId(request.request_id))
                self._refunds_after = place
            if len(batch) < REFUNDS_A_LOOK:
                return

    async def _refund(self, request_id: RequestId) -> None:
        wei = await asyncio.to_thread(self._book.refund, request_id, int(self._clock()))
        if wei:
            self._metrics.refunded_wei.inc(wei)
            _log.info("refunded", request="0x" + request_id.hex(), wei=wei)

    async def _collect_credit(self) -> None:
        """Take what the contracts owe the gateway: fees of answers that were refused, and unused deposits."""
        for contract in ("InferenceEscrow", "RequestTabs"):
            owed = int(await self._chain.call(contract, "creditOf", self.address))
            if owed:
                async with self._sending:
                    await self._submitter.submit(contract, "withdrawCredit", self.address)
                _log.info("credit_withdrawn", contract=contract, wei=owed)
