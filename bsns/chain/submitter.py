"""Sends a transaction and waits for it: for nodes and requesters, who have one key, few transactions and a person or
a loop behind them.

One nonce at a time per key. Promises the receipt of a transaction that succeeded, or the contracts' own error. Does
not survive a crash; the coordinator, which must not send anything twice, has an outbox instead.
"""

from __future__ import annotations

import asyncio
from typing import Any

from bsns.chain.client import ChainClient, Receipt
from bsns.chain.errors import (
    ChainUnavailableError,
    TransactionFailedError,
    TransactionTimeoutError,
)
from bsns.chain.signer import Signer

DEFAULT_TIMEOUT_S = 60.0
POLL_INTERVAL_S = 0.15
NONCE_ATTEMPTS = 4


class Submitter:
    """Transactions of one key, one after the other."""

    def __init__(self, client: ChainClient, signer: Signer) -> None:
        self._client = client
        self._signer = signer
        self._nonce_lock = asyncio.Lock()

    @property
    def address(self) -> str:
        return self._signer.address

    async def submit(
        self, contract: str, function: str, *arguments: Any, value: int = 0, timeout_s: float = DEFAULT_TIMEOUT_S
    ) -> Receipt:
        """Call `contract.function(*arguments)` with `value` wei and wait until it is mined.

        Raises ContractError with the decoded reason, TransactionTimeoutError, or ChainUnavailableError.
        """

        async def prepare(nonce: int) -> dict[str, Any]:
            return await self._client.prepare(
                contract, function, arguments, sender=self._signer.address, value=value, nonce=nonce
            )

        transaction_hash = await self._broadcast(prepare)
        receipt = await self._await_receipt(transaction_hash, timeout_s)
        if not receipt.succeeded:
            # What went through in simulation was overtaken by another transaction; ask the contract again for its
            # reason.
            await self._client.prepare(
                contract,
                function,
                arguments,
                sender=self._signer.address,
                value=value,
                nonce=await self._client.transaction_count(self._signer.address),
            )
            raise TransactionFailedError(f"{contract}.{function} was mined and reverted: 0x{transaction_hash.hex()}")
        return receipt

    async def transfer(self, recipient: str, value: int, timeout_s: float = DEFAULT_TIMEOUT_S) -> Receipt:
        """Send `value` wei to `recipient` and wait until it is mined."""

        async def prepare(nonce: int) -> dict[str, Any]:
            return await self._client.prepare_transfer(recipient, value, sender=self._signer.address, nonce=nonce)

        transaction_hash = await self._broadcast(prepare)
        receipt = await self._await_receipt(transaction_hash, timeout_s)
        if not receipt.succeeded:
            raise TransactionFailedError(f"the transfer to {recipient} reverted: 0x{transaction_hash.hex()}")
        return receipt

    async def _broadcast(self, prepare: Any) -> bytes:
        """Choose a nonce, sign, send. A nonce taken by another program of the same key is tried again with the next."""
        async with self._nonce_lock:
            for attempt in range(NONCE_ATTEMPTS):
                nonce = await self._client.transaction_count(self._signer.address)
                raw = self._signer.sign_transaction(await prepare(nonce))
                try:
                    return await self._client.send_raw(raw)
                except ChainUnavailableError as error:
                    if "nonce" not in str(error).lower() or attempt == NONCE_ATTEMPTS - 1:
                        raise
        raise AssertionError("unreachable")

    async def _await_receipt(self, transaction_hash: bytes, timeout_s: float) -> Receipt:
        try:
            async with asyncio.timeout(timeout_s):
                while True:
                    receipt = await self._client.receipt(transaction_hash)
                    if receipt is not None:
                        return receipt
                    await asyncio.sleep(POLL_INTERVAL_S)
        except TimeoutError:
            raise TransactionTimeoutError(
                f"transaction 0x{transaction_hash.hex()} was not mined within {timeout_s:.0f} s; it may still be"
            ) from None
