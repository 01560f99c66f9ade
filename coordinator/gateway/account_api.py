"""Accounts over HTTP: open one with a signature, deposit on the chain, see the statement, take money out.

Owns what the holder of a key may do with its account. Promises that an account is opened only by whoever signs for its
address, that one signature makes one key, and that money goes back to that address and nowhere else. The gateway holds
deposits for its users: who trusts nobody pays the network directly (`bsns request`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Annotated, Any, Final

from fastapi import APIRouter, Path, Query
from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from bsns.protocol import typed_data
from bsns.protocol.identifiers import ProtocolError, address
from coordinator.gateway.access import KeyHolder
from coordinator.gateway.errors import ApiError
from coordinator.gateway.settings import GatewaySettings
from coordinator.gateway.treasury import Treasury
from coordinator.storage import (
    Account,
    AccountBook,
    AccountKey,
    Charge,
    KeyLimits,
    Movement,
    UnknownKeyError,
    Withdrawal,
)

PROOF_SECONDS: Final = 600
"""A signed request for a key is good for at most so long."""
LINES_A_PAGE: Final = 100

_Wei = Annotated[str, StringConstraints(pattern=r"^(0|[1-9][0-9]{0,38})$", strict=True)]
_Name = Annotated[str, StringConstraints(min_length=1, max_length=64, strict=True)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Limits(_Body):
    """Wei that a key may spend, as text; null: as much as the account holds. Days are those of UTC."""

    per_request_wei: _Wei | None = None
    per_day_wei: _Wei | None = None

    @property
    def as_limits(self) -> KeyLimits:
        return KeyLimits(_number(self.per_request_wei), _number(self.per_day_wei))


class OpenAccount(Limits):
    """A key for the account of `address`, which is opened if it has none. `signature`: of that address over EIP-712
    AccountKeyRequest(address account,string name,uint256 deadline) under the domain {"bsns Gateway", "1", chain id,
    the gateway's deposit address}.
    """

    address: Annotated[str, StringConstraints(pattern=r"^0x[0-9a-fA-F]{40}$", strict=True)]
    name: _Name
    deadline: Annotated[int, Field(ge=0, le=2**63 - 1, strict=True)]
    signature: Annotated[str, StringConstraints(pattern=r"^0x[0-9a-fA-F]{130}$", strict=True)]


class CreateKey(Limits):
    """Another key of the account whose key asks. It may spend no more than that one."""

    name: _Name


class Deposit(_Body):
    """A transfer to the gateway's deposit address, by its transaction."""

    transaction: Annotated[str, StringConstraints(min_length=1, max_length=80, strict=True)]


class Withdraw(_Body):
    """Wei to send to the account's address."""

    amount_wei: _Wei


class AccountApi:
    """The routes."""

    def __init__(
        self,
        book: AccountBook,
        treasury: Treasury,
        settings: GatewaySettings,
        chain_id: int,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._book, self._treasury, self._settings = book, treasury, settings
        self._chain_id, self._clock = chain_id, clock
        self.router = APIRouter(prefix="/v1", tags=["accounts"])
        add = self.router.add_api_route
        add("/gateway", self.about, methods=["GET"])
        add("/accounts", self.open_account, methods=["POST"], status_code=201)
        add("/account", self.account, methods=["GET"])
        add("/account/movements", self.movements, methods=["GET"])
        add("/account/charges", self.charges, methods=["GET"])
        add("/account/keys", self.keys, methods=["GET"])
        add("/account/keys", self.create_key, methods=["POST"], status_code=201)
        add("/account/keys/{key_id}", self.revoke_key, methods=["DELETE"])
        add("/account/deposits", self.deposit, methods=["POST"], status_code=201)
        add("/account/withdrawals", self.withdraw, methods=["POST"], status_code=202)
        add("/account/withdrawals/{withdrawal_id}", self.withdrawal, methods=["GET"])

    async def about(self) -> dict[str, Any]:
        """Where deposits go, and on what terms."""
        settings = self._settings
        return {
            "object": "bsns.gateway",
            "chain_id": self._chain_id,
            "deposit_address": self._treasury.address,
            "deposit_confirmations": settings.deposit_confirmations,
            "open_accounts": settings.open_accounts,
            "price_basis_points": settings.price_basis_points,
            "proof_seconds": PROOF_SECONDS,
        }

    async def open_account(self, body: OpenAccount) -> dict[str, Any]:
        """An account for whoever signs for an address, and its key. The key is shown once."""
        if not self._settings.open_accounts:
            raise ApiError(403, "this gateway's operator opens accounts by hand: ask for one", code="closed")
        now = int(self._clock())
        if not now <= body.deadline <= now + PROOF_SECONDS:
            raise ApiError(
                400, f"deadline lies outside the next {PROOF_SECONDS} s: check your clock and sign again",
                param="deadline",
            )  # fmt: skip
        try:
            who = address(body.address)
            domain = typed_data.gateway_domain(self._chain_id, address(self._treasury.address))
            values = (who, body.name, body.deadline)
            digest = typed_data.signing_digest(domain, typed_data.ACCOUNT_KEY_REQUEST, values)
        except ProtocolError as error:
            raise ApiError(400, str(error), param="address") from error
        if not typed_data.is_signed_by(digest, bytes.fromhex(body.signature[2:]), who):
            raise ApiError(403, f"the signature is not by {who}", code="wrong_signature", param="signature")
        account = await asyncio.to_thread(self._book.account_of, who)
        if account is None:
            account = await asyncio.to_thread(self._book.open_account, body.name, who, now)
        return await self._new_key(account, body.name, body.as_limits, proof=digest)

    async def account(self, key: KeyHolder) -> dict[str, Any]:
        """The account of the key."""
        account = await self._account(key)
        now = int(self._clock())
        return {**_account(account), "key": _key(key, now), "deposit_address": self._treasury.address}

    async def movements(
        self,
        key: KeyHolder,
        limit: Annotated[int, Query(ge=1, le=LINES_A_PAGE)] = LINES_A_PAGE,
        before: Annotated[int | None, Query(ge=1, le=2**31 - 1)] = None,
    ) -> dict[str, Any]:
        """The statement, the newest first; its amounts add up to the balance."""
        found = await asyncio.to_thread(self._book.movements, key.account_id, limit, before)
        return {"object": "list", "data": [_movement(item) for item in found], "has_more": len(found) == limit}

    async def charges(
        self, key: KeyHolder, limit: Annotated[int, Query(ge=1, le=LINES_A_PAGE)] = LINES_A_PAGE
    ) -> dict[str, Any]:
        """What answers cost, the newest first."""
        found = await asyncio.to_thread(self._book.charges, key.account_id, limit)
        requests = await asyncio.to_thread(self._book.requests_of, found)
        data = [_charge(item) | {"requests": ["0x" + one.hex() for one in requests[item.charge_id]]} for item in found]
        return {"object": "list", "data": data}

    async def keys(self, key: KeyHolder) -> dict[str, Any]:
        """Keys of the account, by id."""
        found, now = await asyncio.to_thread(self._book.keys, key.account_id), int(self._clock())
        return {"object": "list", "data": [_key(item, now) for item in found]}

    async def create_key(self, body: CreateKey, key: KeyHolder) -> dict[str, Any]:
        """Another key. It is shown once."""
        wanted = body.as_limits
        limits = KeyLimits(
            _smaller(wanted.per_request, key.limits.per_request), _smaller(wanted.per_day, key.limits.per_day)
        )
        return await self._new_key(await self._account(key), body.name, limits)

    async def revoke_key(self, key_id: Annotated[str, Path(max_length=40)], key: KeyHolder) -> dict[str, Any]:
        """A key of the account is good for nothing from now on."""
        try:
            await asyncio.to_thread(self._book.revoke_key, key.account_id, key_id, int(self._clock()))
        except UnknownKeyError as error:
            raise ApiError(404, str(error), code="not_found") from error
        return {"object": "bsns.key", "id": key_id, "revoked": True}

    async def deposit(self, body: Deposit, key: KeyHolder) -> dict[str, Any]:
        """Credit a transfer that was sent from the account's address to the deposit address."""
        return _account(await self._treasury.deposit(await self._account(key), body.transaction))

    async def withdraw(self, body: Withdraw, key: KeyHolder) -> dict[str, Any]:
        """Take money out. It goes to the account's address."""
        amount = int(body.amount_wei)
        if amount == 0:
            raise ApiError(400, "nothing is to be taken out: give an amount", param="amount_wei")
        if key.limits != KeyLimits():
            raise ApiError(403, "a key with a spending limit takes nothing out: use one without", code="limited_key")
        return _withdrawal(await asyncio.to_thread(self._book.withdraw, key.account_id, amount, int(self._clock())))

    async def withdrawal(self, withdrawal_id: Annotated[str, Path(max_length=40)], key: KeyHolder) -> dict[str, Any]:
        """How far a withdrawal has come."""
        found = await asyncio.to_thread(self._book.withdrawal, withdrawal_id)
        if found is None or found.account_id != key.account_id:
            raise ApiError(404, f"the account has no withdrawal {withdrawal_id!r:.60}", code="not_found")
        return _withdrawal(found)

    async def _account(self, key: AccountKey) -> Account:
        found = await asyncio.to_thread(self._book.account, key.account_id)
        assert found is not None, "a key is of an account"
        return found

    async def _new_key(
        self, account: Account, name: str, limits: KeyLimits, proof: bytes | None = None
    ) -> dict[str, Any]:
        now = int(self._clock())
        secret, made = await asyncio.to_thread(
            lambda: self._book.create_key(account.account_id, name, limits, now, proof=proof)
        )
        return {**_key(made, now), "secret": secret, "account": _account(account)}


def _number(text: str | None) -> int | None:
    return None if text is None else int(text)


def _smaller(first: int | None, second: int | None) -> int | None:
    given = [item for item in (first, second) if item is not None]
    return min(given) if given else None


def _wei(value: int | None) -> str | None:
    return None if value is None else str(value)


def _account(item: Account) -> dict[str, Any]:
    return {
        "object": "bsns.account",
        "id": item.account_id,
        "name": item.name,
        "address": item.address,
        "balance_wei": str(item.balance),
        "created": item.created_at,
    }


def _key(item: AccountKey, now: int) -> dict[str, Any]:
    return {
        "object": "bsns.key",
        "id": item.key_id,
        "name": item.name,
        "per_request_wei": _wei(item.limits.per_request),
        "per_day_wei": _wei(item.limits.per_day),
        "spent_today_wei": str(item.spent_today(now)),
        "created": item.created_at,
        "revoked": item.revoked_at,
    }


def _movement(item: Movement) -> dict[str, Any]:
    return {
        "object": "bsns.movement",
        "number": item.number,
        "kind": str(item.kind),
        "amount_wei": str(item.amount),
        "reference": item.reference,
        "at": item.at,
    }


def _charge(item: Charge) -> dict[str, Any]:
    return {
        "object": "bsns.charge",
        "id": item.charge_id,
        "key": item.key_id,
        "model": item.model,
        "state": str(item.state),
        "held_wei": str(item.held),
        "charged_wei": str(item.charged),
        "refunded_wei": str(item.refunded),
        "created": item.created_at,
        "finished": item.finished_at,
    }


def _withdrawal(item: Withdrawal) -> dict[str, Any]:
    return {
        "object": "bsns.withdrawal",
        "id": item.withdrawal_id,
        "recipient": item.recipient,
        "amount_wei": str(item.amount),
        "state": str(item.state),
        "transaction": item.transaction_hash,
        "created": item.created_at,
    }
