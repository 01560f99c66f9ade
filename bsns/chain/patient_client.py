"""A chain client that does not give up a paid request because one answer failed to come.

Repeats reads for a limited time; sending is never repeated here, since only the sender knows whether it is safe. Does
not hide an outage: after its patience it raises what the chain raised last.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, TypeVar

from bsns.chain.client import Block, ChainClient, ChainEvent, Receipt, Transfer
from bsns.chain.errors import ChainUnavailableError, InsufficientFundsError

RETRY_INTERVAL_S: Final = 0.2
_Result = TypeVar("_Result")


class PatientChainClient:
    """ChainClient over another one; `patience_s` is how long reads are repeated."""

    def __init__(self, client: ChainClient, patience_s: float) -> None:
        self.client = client
        self._patience_s = patience_s

    async def chain_id(self) -> int:
        return await self._patiently(self.client.chain_id)

    async def head(self) -> Block:
        return await self._patiently(self.client.head)

    async def block(self, number: int) -> Block | None:
        return await self._patiently(lambda: self.client.block(number))

    async def block_by_hash(self, block_hash: bytes) -> Block | None:
        return await self._patiently(lambda: self.client.block_by_hash(block_hash))

    async def events(self, block_hash: bytes) -> tuple[ChainEvent, ...]:
        return await self._patiently(lambda: self.client.events(block_hash))

    async def events_between(
        self,
        first: int,
        last: int,
        *,
        contract: str | None = None,
        name: str | None = None,
        filters: Mapping[str, Any] | None = None,
    ) -> tuple[ChainEvent, ...]:
        return await self._patiently(
            lambda: self.client.events_between(first, last, contract=contract, name=name, filters=filters)
        )

    async def call(self, contract: str, function: str, *arguments: Any, block: int | bytes | None = None) -> Any:
        return await self._patiently(lambda: self.client.call(contract, function, *arguments, block=block))

    async def balance(self, account: str, *, block: bytes | None = None) -> int:
        return await self._patiently(lambda: self.client.balance(account, block=block))

    async def transaction_count(self, account: str, *, pending: bool = True) -> int:
        return await self._patiently(lambda: self.client.transaction_count(account, pending=pending))

    async def prepare(
        self, contract: str, function: str, arguments: tuple[Any, ...], *, sender: str, value: int = 0, nonce: int
    ) -> dict[str, Any]:
        return await self._patiently(
            lambda: self.client.prepare(contract, function, arguments, sender=sender, value=value, nonce=nonce)
        )

    async def prepare_transfer(self, recipient: str, value: int, *, sender: str, nonce: int) -> dict[str, Any]:
        return await self._patiently(lambda: self.client.prepare_transfer(recipient, value, sender=sender, nonce=nonce))

    async def send_raw(self, raw: bytes) -> bytes:
        return await self.client.send_raw(raw)

    async def receipt(self, transaction_hash: bytes) -> Receipt | None:
        return await self._patiently(lambda: self.client.receipt(transaction_hash))

    async def transfer(self, transaction_hash: bytes) -> Transfer | None:
        return await self._patiently(lambda: self.client.transfer(transaction_hash))

    async def _patiently(self, read: Callable[[], Awaitable[_Result]]) -> _Result:
        limit = time.monotonic() + self._patience_s
        while True:
            try:
                return await read()
            except InsufficientFundsError:  # waiting does not fund an account
                raise
            except ChainUnavailableError:
                if time.monotonic() >= limit:
                    raise
            await asyncio.sleep(RETRY_INTERVAL_S)
