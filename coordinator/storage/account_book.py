"""The accounts of the gateway's users: keys, deposits, and every wei that moves.

Owns who may spend how much. Promises that the balance of an account is the sum of its movements and never negative;
that the money for an answer is set aside before it is asked for, and that what the answer did not cost comes back in
the same transaction that charges it; that a deposit counts once; that one idempotency key stands for one charge; and
that no key is stored, only its hash. Wei throughout; Unix seconds are given, not read. Does not talk to the chain.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final

from sqlalchemy import (
    BigInteger,
    Column,
    Connection,
    Index,
    Integer,
    LargeBinary,
    RowMapping,
    String,
    Table,
    Text,
    UniqueConstraint,
    func,
    insert,
    select,
    update,
)

from bsns.protocol.identifiers import RequestId
from coordinator.storage.database import Storage, StorageError, uint256_text
from coordinator.storage.tables import UINT256_DIGITS, metadata

KEY_PREFIX: Final = "bsns-"
KEY_BYTES: Final = 32
MAXIMUM_NAME_LENGTH: Final = 64
MAXIMUM_KEYS: Final = 64
"""Keys of one account that are not revoked."""
MAXIMUM_WEI: Final = 2**128 - 1
DAY_SECONDS: Final = 86_400
_SIGNED_DIGITS: Final = 79

_accounts = Table(
    "gateway_accounts",
    metadata,
    Column("account_id", String(40), primary_key=True),
    Column("name", String(MAXIMUM_NAME_LENGTH), nullable=False),
    Column("address", String(42), unique=True),
    Column("balance", String(UINT256_DIGITS), nullable=False),
    Column("created_at", BigInteger, nullable=False),
)
_keys = Table(
    "gateway_keys",
    metadata,
    Column("key_hash", String(64), primary_key=True),
    Column("key_id", String(40), nullable=False, unique=True),
    Column("account_id", String(40), nullable=False, index=True),
    Column("name", String(MAXIMUM_NAME_LENGTH), nullable=False),
    Column("request_limit", String(UINT256_DIGITS)),
    Column("day_limit", String(UINT256_DIGITS)),
    Column("day", BigInteger, nullable=False),
    Column("day_spent", String(UINT256_DIGITS), nullable=False),
    # Of the signed request that the key was made for: it makes one key.
    Column("proof", String(66), unique=True),
    Column("created_at", BigInteger, nullable=False),
    Column("revoked_at", BigInteger),
)
_charges = Table(
    "gateway_charges",
    metadata,
    Column("charge_id", String(40), primary_key=True),
    Column("account_id", String(40), nullable=False),
    Column("key_id", String(40), nullable=False),
    Column("idempotency_key", String(255)),
    Column("body_hash", String(64), nullable=False),
    Column("model", String(255), nullable=False),
    Column("state", String(16), nullable=False, index=True),
    Column("held", String(UINT256_DIGITS), nullable=False),
    Column("charged", String(UINT256_DIGITS), nullable=False, server_default="0"),
    Column("refunded", String(UINT256_DIGITS), nullable=False, server_default="0"),
    Column("created_at", BigInteger, nullable=False),
    Column("finished_at", BigInteger),
    Column("response", Text),
    UniqueConstraint("account_id", "idempotency_key"),
    Index("ix_gateway_charges_account", "account_id", "created_at"),
)
# The requests on the network that a charge paid for.
_charged_requests = Table(
    "gateway_requests",
    metadata,
    Column("request_id", String(66), primary_key=True),
    Column("charge_id", String(40), nullable=False, index=True),
    Column("price", String(UINT256_DIGITS), nullable=False),
    Column("refunded", Integer, nullable=False),
)
_movements = Table(
    "gateway_movements",
    metadata,
    Column("number", Integer, primary_key=True, autoincrement=True),
    Column("account_id", String(40), nullable=False),
    Column("kind", String(16), nullable=False),
    Column("amount", String(_SIGNED_DIGITS), nullable=False),
    Column("reference", String(80), nullable=False),
    Column("at", BigInteger, nullable=False),
    Index("ix_gateway_movements_account", "account_id", "number"),
)
_deposits = Table(
    "gateway_deposits",
    metadata,
    Column("transaction_hash", String(66), primary_key=True),
    Column("account_id", String(40), nullable=False),
    Column("amount", String(UINT256_DIGITS), nullable=False),
    Column("at", BigInteger, nullable=False),
)
_withdrawals = Table(
    "gateway_withdrawals",
    metadata,
    Column("withdrawal_id", String(40), primary_key=True),
    Column("account_id", String(40), nullable=False, index=True),
    Column("recipient", String(42), nullable=False),
    Column("amount", String(UINT256_DIGITS), nullable=False),
    Column("state", String(16), nullable=False, index=True),
    Column("nonce", BigInteger),
    Column("raw", LargeBinary),
    Column("transaction_hash", String(66)),
    Column("created_at", BigInteger, nullable=False),
)


class AccountError(StorageError):
    """An account cannot do what was asked; the message says why and what to do."""


class UnknownKeyError(AccountError):
    """There is no such key, or it was revoked."""


class DuplicateError(AccountError):
    """What was given counts once, and has counted."""


class InsufficientBalanceError(AccountError):
    """The account holds less than what is to be set aside or taken out."""


class SpendingLimitError(AccountError):
    """The key may not spend that much, in one request or today."""


class IdempotencyError(AccountError):
    """The idempotency key stands for another request, or for one that is not done. `is_busy` says which."""

    def __init__(self, message: str, *, is_busy: bool) -> None:
        self.is_busy = is_busy
        super().__init__(message)


class ChargeState(StrEnum):
    """held: an answer is being made; charged: it was given, and paid for; released: it was not, and cost nothing."""

    HELD = "held"
    CHARGED = "charged"
    RELEASED = "released"


class MovementKind(StrEnum):
    """Why a balance changed. Holds and charges count against it, the others for it; a withdrawal is against it."""

    DEPOSIT = "deposit"
    HOLD = "hold"
    RELEASE = "release"
    REFUND = "refund"
    WITHDRAWAL = "withdrawal"


class WithdrawalState(StrEnum):
    """wanted: taken from the balance; signed: its transaction is stored, and may have been sent; done: mined."""

    WANTED = "wanted"
    SIGNED = "signed"
    DONE = "done"


@dataclass(frozen=True, slots=True)
class Account:
    """`address` is where deposits come from and withdrawals go to; None if the operator keeps the account by hand."""

    account_id: str
    name: str
    address: str | None
    balance: int
    created_at: int


@dataclass(frozen=True, slots=True)
class KeyLimits:
    """Wei that a key may spend; None: as much as the account holds. Days are those of UTC."""

    per_request: int | None = None
    per_day: int | None = None


@dataclass(frozen=True, slots=True)
class AccountKey:
    """A key as it is known here: by an id, never by itself."""

    key_id: str
    account_id: str
    name: str
    limits: KeyLimits
    day: int
    day_spent: int
    created_at: int
    revoked_at: int | None

    def spent_today(self, now: int) -> int:
        """Wei spent or set aside since midnight, UTC."""
        return self.day_spent if self.day == now // DAY_SECONDS else 0


@dataclass(frozen=True, slots=True)
class Charge:
    """Money set aside for one HTTP request, and what became of it. `response` is kept for its idempotency key."""

    charge_id: str
    account_id: str
    key_id: str
    idempotency_key: str | None
    body_hash: str
    model: str
    state: ChargeState
    held: int
    charged: int
    refunded: int
    created_at: int
    finished_at: int | None
    response: str | None


@dataclass(frozen=True, slots=True)
class Movement:
    """One line of an account's statement. `amount` is signed; `reference` a charge, transaction or withdrawal."""

    number: int
    account_id: str
    kind: MovementKind
    amount: int
    reference: str
    at: int


@dataclass(frozen=True, slots=True)
class Withdrawal:
    """Money on its way to an account's address."""

    withdrawal_id: str
    account_id: str
    recipient: str
    amount: int
    state: WithdrawalState
    nonce: int | None
    raw: bytes | None
    transaction_hash: str | None
    created_at: int


class AccountBook:
    """The accounts in `storage`. Methods block: coroutines call them in a worker thread."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    # ------------------------------------------------------------------------------------------------ accounts and keys

    def open_account(self, name: str, address: str | None, now: int) -> Account:
        """A new account without money. DuplicateError if the address has one."""
        account = Account(f"acct_{secrets.token_hex(12)}", _name(name), address, 0, now)
        with self._storage.writing() as connection:
            if address is not None and _account_of_address(connection, address) is not None:
                raise DuplicateError(f"{address} has an account: ask for another key of it instead")
            connection.execute(
                insert(_accounts).values(
                    account_id=account.account_id, name=account.name, address=address,
                    balance=uint256_text(0), created_at=now,
                )
            )  # fmt: skip
        return account

    def account(self, account_id: str) -> Account | None:
        with self._storage.reading() as connection:
            row = connection.execute(select(_accounts).where(_accounts.c.account_id == account_id)).mappings().first()
        return None if row is None else _account(row)

    def account_of(self, address: str) -> Account | None:
        """The account whose deposits come from `address`."""
        with self._storage.reading() as connection:
            return _account_of_address(connection, address)

    def accounts(self, limit: int) -> list[Account]:
        """The oldest first."""
        query = select(_accounts).order_by(_accounts.c.created_at, _accounts.c.account_id).limit(limit)
        with self._storage.reading() as connection:
            return [_account(row) for row in connection.execute(query).mappings()]

    def create_key(
        self, account_id: str, name: str, limits: KeyLimits, now: int, *, proof: bytes | None = None
    ) -> tuple[str, AccountKey]:
        """A new key of an account, and how it is known from now on. The key itself is not kept: show it once.
        `proof` is the digest of the signed request for it; DuplicateError if it made a key before.
        """
        secret = KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)
        key = AccountKey(f"key_{secrets.token_hex(8)}", account_id, _name(name), limits, 0, 0, now, None)
        with self._storage.writing() as connection:
            mine = (_keys.c.account_id == account_id) & _keys.c.revoked_at.is_(None)
            if int(connection.scalar(select(func.count()).select_from(_keys).where(mine)) or 0) >= MAXIMUM_KEYS:
                raise AccountError(f"the account has {MAXIMUM_KEYS} keys: revoke one first")
            shown = None if proof is None else "0x" + proof.hex()
            if shown is not None and connection.scalar(select(_keys.c.key_id).where(_keys.c.proof == shown)):
                raise DuplicateError("a key was made for this signature already: sign another request")
            connection.execute(
                insert(_keys).values(
                    key_hash=key_hash(secret), key_id=key.key_id, account_id=account_id, name=key.name,
                    request_limit=_optional_text(limits.per_request), day_limit=_optional_text(limits.per_day),
                    day=0, day_spent=uint256_text(0), proof=shown, created_at=now,
                )
            )  # fmt: skip
        return secret, key

    def key(self, secret: str) -> AccountKey:
        """The key that somebody shows; UnknownKeyError if it is none, or was revoked."""
        query = select(_keys).where(_keys.c.key_hash == key_hash(secret))
        with self._storage.reading() as connection:
            row = connection.execute(query).mappings().first()
        if row is None or row["revoked_at"] is not None:
            raise UnknownKeyError("this API key is not known here, or was revoked: check it, or ask for another one")
        return _key(row)

    def keys(self, account_id: str) -> list[AccountKey]:
        """Keys of an account, also revoked ones, the oldest first."""
        query = select(_keys).where(_keys.c.account_id == account_id).order_by(_keys.c.created_at, _keys.c.key_id)
        with self._storage.reading() as connection:
            return [_key(row) for row in connection.execute(query).mappings()]

    def revoke_key(self, account_id: str, key_id: str, now: int) -> None:
        """No request is taken with it from now on; UnknownKeyError if the account has no such key in use."""
        mine = (_keys.c.account_id == account_id) & (_keys.c.key_id == key_id) & _keys.c.revoked_at.is_(None)
        with self._storage.writing() as connection:
            if connection.execute(update(_keys).where(mine).values(revoked_at=now)).rowcount == 0:
                raise UnknownKeyError(f"the account has no key {key_id!r:.60} in use")

    # ---------------------------------------------------------------------------------------------------------- money

    def deposit(self, account_id: str, amount: int, transaction: str, now: int) -> Account:
        """Credit a deposit. `transaction`: its hash, or the operator's own reference; DuplicateError if it counted."""
        _positive(amount)
        with self._storage.writing() as connection:
            known = _deposits.c.transaction_hash == transaction
            if connection.scalar(select(_deposits.c.account_id).where(known)) is not None:
                raise DuplicateError(f"deposit {transaction} was credited already")
            connection.execute(
                insert(_deposits).values(
                    transaction_hash=transaction, account_id=account_id, amount=uint256_text(amount), at=now
                )
            )
            _move(connection, account_id, MovementKind.DEPOSIT, amount, transaction, now)
            return _locked(connection, account_id)

    def hold(
        self,
        key: AccountKey,
        amount: int,
        *,
        model: str,
        body_hash: str,
        idempotency_key: str | None,
        now: int,
    ) -> Charge:
        """Set `amount` aside for a request. With an idempotency key that was used, the charge that it stands for, if
        that is done and was of the same body.

        InsufficientBalanceError, SpendingLimitError, IdempotencyError.
        """
        if not 0 <= amount <= MAXIMUM_WEI:
            raise AccountError(f"{amount} wei cannot be set aside")
        charge = Charge(
            f"chg_{secrets.token_hex(16)}", key.account_id, key.key_id, idempotency_key, body_hash, model,
            ChargeState.HELD, amount, 0, 0, now, None, None,
        )  # fmt: skip
        with self._storage.writing() as connection:
            # The lock on the account is what puts two requests with one idempotency key in order.
            account = _locked(connection, key.account_id)
            if idempotency_key is not None:
                before = _charge_with(connection, key.account_id, idempotency_key)
                if before is not None:
                    return _same_request(before, body_hash)
            if account.balance < amount:
                raise InsufficientBalanceError(
                    f"this request may cost {amount} wei, the account holds {account.balance}: deposit more, or ask "
                    "for fewer tokens"
                )
            _spend(connection, key.key_id, amount, now)
            connection.execute(insert(_charges).values(**_charge_row(charge)))
            if amount:
                _move(connection, key.account_id, MovementKind.HOLD, -amount, charge.charge_id, now)
        return charge

    def settle(self, charge_id: str, prices: dict[RequestId, int], response: str | None, now: int) -> Charge:
        """Charge what the requests of a charge cost, and give the rest of what was set aside back. Without prices it
        is released. Again: no effect.
        """
        total = sum(prices.values())
        with self._storage.writing() as connection:
            charge = _locked_charge(connection, charge_id)
            if charge.state is not ChargeState.HELD:
                return charge
            if total > charge.held:
                raise AccountError(f"charge {charge_id} costs {total} wei, {charge.held} were set aside")
            for request_id, price in prices.items():
                connection.execute(
                    insert(_charged_requests).values(
                        request_id="0x" + request_id.hex(), charge_id=charge_id, price=uint256_text(price), refunded=0
                    )
                )
            state = ChargeState.CHARGED if prices else ChargeState.RELEASED
            connection.execute(
                update(_charges)
                .where(_charges.c.charge_id == charge_id)
                .values(
                    state=str(state),
                    charged=uint256_text(total),
                    finished_at=now,
                    response=response,
                    # An answer that was not given is no answer: the key may be used for another attempt.
                    **({} if prices else {"idempotency_key": None}),
                )
            )
            rest = charge.held - total
            if rest:
                _move(connection, charge.account_id, MovementKind.RELEASE, rest, charge_id, now)
                _unspend(connection, charge, rest)
            return _locked_charge(connection, charge_id)

    def refund(self, request_id: RequestId, now: int) -> int:
        """Give back what a charged request cost, because the network took its answer back; wei, 0 if it was done."""
        mine = _charged_requests.c.request_id == "0x" + request_id.hex()
        with self._storage.writing() as connection:
            row = connection.execute(select(_charged_requests).where(mine)).mappings().first()
            if row is None or row["refunded"]:
                return 0
            price = int(row["price"])
            charge = _locked_charge(connection, row["charge_id"])
            connection.execute(update(_charged_requests).where(mine).values(refunded=1))
            connection.execute(
                update(_charges)
                .where(_charges.c.charge_id == charge.charge_id)
                .values(refunded=uint256_text(charge.refunded + price))
            )
            if price:
                _move(connection, charge.account_id, MovementKind.REFUND, price, "0x" + request_id.hex(), now)
            return price

    def charge(self, charge_id: str) -> Charge | None:
        with self._storage.reading() as connection:
            row = connection.execute(select(_charges).where(_charges.c.charge_id == charge_id)).mappings().first()
        return None if row is None else _charge(row)

    def requests_of(self, charges: Sequence[Charge]) -> dict[str, list[RequestId]]:
        """By the id of each charge the requests on the network that it paid for."""
        found: dict[str, list[RequestId]] = {item.charge_id: [] for item in charges}
        table = _charged_requests
        query = select(table.c.charge_id, table.c.request_id).where(table.c.charge_id.in_(list(found)))
        with self._storage.reading() as connection:
            for row in connection.execute(query):
                found[row.charge_id].append(RequestId(bytes.fromhex(row.request_id[2:])))
        return found

    def unsettled(self) -> list[Charge]:
        """Charges whose money is set aside: of requests that are answered now, or that a crash interrupted."""
        query = select(_charges).where(_charges.c.state == str(ChargeState.HELD)).order_by(_charges.c.created_at)
        with self._storage.reading() as connection:
            return [_charge(row) for row in connection.execute(query).mappings()]

    def charges(self, account_id: str, limit: int) -> list[Charge]:
        """Charges of an account, the newest first."""
        query = (
            select(_charges)
            .where(_charges.c.account_id == account_id)
            .order_by(_charges.c.created_at.desc(), _charges.c.charge_id)
            .limit(limit)
        )
        with self._storage.reading() as connection:
            return [_charge(row) for row in connection.execute(query).mappings()]

    def movements(self, account_id: str, limit: int, before: int | None = None) -> list[Movement]:
        """The statement of an account, the newest first; `before` is the number of the last line seen."""
        query = select(_movements).where(_movements.c.account_id == account_id)
        if before is not None:
            query = query.where(_movements.c.number < before)
        with self._storage.reading() as connection:
            rows = connection.execute(query.order_by(_movements.c.number.desc()).limit(limit)).mappings()
            return [
                Movement(
                    row["number"], row["account_id"], MovementKind(row["kind"]), int(row["amount"]), row["reference"],
                    row["at"],
                )
                for row in rows
            ]  # fmt: skip

    def forget_responses(self, finished_before: int) -> int:
        """Drop kept answers and the idempotency keys that stand for them; how many."""
        old = (_charges.c.finished_at < finished_before) & (
            _charges.c.response.is_not(None) | _charges.c.idempotency_key.is_not(None)
        )
        with self._storage.writing() as connection:
            return connection.execute(update(_charges).where(old).values(response=None, idempotency_key=None)).rowcount

    def owed(self) -> int:
        """What all accounts hold, are having answered, and are being sent, in wei: what the gateway must be able to
        pay.
        """
        held, waiting = str(ChargeState.HELD), (str(WithdrawalState.WANTED), str(WithdrawalState.SIGNED))
        with self._storage.reading() as connection:
            amounts = [
                *connection.scalars(select(_accounts.c.balance)),
                *connection.scalars(select(_charges.c.held).where(_charges.c.state == held)),
                *connection.scalars(select(_withdrawals.c.amount).where(_withdrawals.c.state.in_(waiting))),
            ]
        return sum(map(int, amounts))

    # ---------------------------------------------------------------------------------------------------- withdrawals

    def withdraw(self, account_id: str, amount: int, now: int) -> Withdrawal:
        """Take `amount` from the balance, to be sent to the account's address. InsufficientBalanceError, or
        AccountError if the account has no address.
        """
        _positive(amount)
        with self._storage.writing() as connection:
            account = _locked(connection, account_id)
            if account.address is None:
                raise AccountError("the account has no address to send money to: ask the operator who made it")
            if account.balance < amount:
                raise InsufficientBalanceError(f"the account holds {account.balance} wei, {amount} cannot be taken out")
            found = Withdrawal(
                f"wd_{secrets.token_hex(16)}", account_id, account.address, amount, WithdrawalState.WANTED, None, None,
                None, now,
            )  # fmt: skip
            connection.execute(
                insert(_withdrawals).values(
                    withdrawal_id=found.withdrawal_id, account_id=account_id, recipient=found.recipient,
                    amount=uint256_text(amount), state=str(found.state), created_at=now,
                )
            )  # fmt: skip
            _move(connection, account_id, MovementKind.WITHDRAWAL, -amount, found.withdrawal_id, now)
        return found

    def withdrawal(self, withdrawal_id: str) -> Withdrawal | None:
        query = select(_withdrawals).where(_withdrawals.c.withdrawal_id == withdrawal_id)
        with self._storage.reading() as connection:
            row = connection.execute(query).mappings().first()
        return None if row is None else _withdrawal(row)

    def open_withdrawals(self) -> list[Withdrawal]:
        """Those that are not done, the oldest first."""
        query = select(_withdrawals).where(_withdrawals.c.state != str(WithdrawalState.DONE))
        with self._storage.reading() as connection:
            rows = connection.execute(query.order_by(_withdrawals.c.created_at, _withdrawals.c.withdrawal_id))
            return [_withdrawal(row) for row in rows.mappings()]

    def sign_withdrawal(self, withdrawal_id: str, nonce: int, raw: bytes, transaction_hash: bytes) -> None:
        """Store the transaction of a withdrawal before it is sent; it takes the place of one whose nonce was lost."""
        with self._storage.writing() as connection:
            connection.execute(
                update(_withdrawals)
                .where(_withdrawals.c.withdrawal_id == withdrawal_id)
                .values(
                    state=str(WithdrawalState.SIGNED), nonce=nonce, raw=raw,
                    transaction_hash="0x" + transaction_hash.hex(),
                )
            )  # fmt: skip

    def finish_withdrawal(self, withdrawal_id: str) -> None:
        """Its transaction is mined, deep enough."""
        with self._storage.writing() as connection:
            connection.execute(
                update(_withdrawals)
                .where(_withdrawals.c.withdrawal_id == withdrawal_id)
                .values(state=str(WithdrawalState.DONE))
            )


def key_hash(secret: str) -> str:
    """What is stored of a key: SHA-256. A key has 256 random bits, so there is nothing to guess."""
    return hashlib.sha256(secret.encode()).hexdigest()


# --------------------------------------------------------------------------------------------------------------- rows


def _locked(connection: Connection, account_id: str) -> Account:
    query = select(_accounts).where(_accounts.c.account_id == account_id).with_for_update()
    row = connection.execute(query).mappings().first()
    if row is None:
        raise AccountError(f"there is no account {account_id:.40}")
    return _account(row)


def _move(connection: Connection, account_id: str, kind: MovementKind, amount: int, reference: str, now: int) -> None:
    """Change a balance and write the line that says why, in the caller's transaction."""
    account = _locked(connection, account_id)
    after = account.balance + amount
    if not 0 <= after <= MAXIMUM_WEI:
        raise InsufficientBalanceError(f"account {account_id} holds {account.balance} wei, {amount} would move")
    connection.execute(
        update(_accounts).where(_accounts.c.account_id == account_id).values(balance=uint256_text(after))
    )
    connection.execute(
        insert(_movements).values(
            account_id=account_id, kind=str(kind), amount=str(amount), reference=reference, at=now
        )
    )


def _spend(connection: Connection, key_id: str, amount: int, now: int) -> None:
    row = connection.execute(select(_keys).where(_keys.c.key_id == key_id).with_for_update()).mappings().first()
    if row is None or row["revoked_at"] is not None:
        raise UnknownKeyError("this API key was revoked")
    key = _key(row)
    if key.limits.per_request is not None and amount > key.limits.per_request:
        raise SpendingLimitError(
            f"this request may cost {amount} wei, the key may spend {key.limits.per_request} on one: ask for fewer "
            "tokens, or use another key"
        )
    spent = key.spent_today(now)
    if key.limits.per_day is not None and spent + amount > key.limits.per_day:
        raise SpendingLimitError(
            f"this request may cost {amount} wei; the key may spend {key.limits.per_day} a day and has spent {spent} "
            "today: wait until midnight UTC, or use another key"
        )
    connection.execute(
        update(_keys)
        .where(_keys.c.key_id == key_id)
        .values(day=now // DAY_SECONDS, day_spent=uint256_text(spent + amount))
    )


def _unspend(connection: Connection, charge: Charge, amount: int) -> None:
    """What was not charged does not count on its day."""
    row = connection.execute(select(_keys).where(_keys.c.key_id == charge.key_id).with_for_update()).mappings().first()
    if row is None or row["day"] != charge.created_at // DAY_SECONDS:
        return
    left = max(0, int(row["day_spent"]) - amount)
    connection.execute(update(_keys).where(_keys.c.key_id == charge.key_id).values(day_spent=uint256_text(left)))


def _same_request(before: Charge, body_hash: str) -> Charge:
    if before.body_hash != body_hash:
        raise IdempotencyError(
            "this idempotency key was used for another request: give each request a key of its own", is_busy=False
        )
    if before.state is ChargeState.HELD:
        raise IdempotencyError(
            "the request with this idempotency key is still being answered: ask again in a moment", is_busy=True
        )
    return before


def _account_of_address(connection: Connection, address: str) -> Account | None:
    row = connection.execute(select(_accounts).where(_accounts.c.address == address)).mappings().first()
    return None if row is None else _account(row)


def _charge_with(connection: Connection, account_id: str, idempotency_key: str) -> Charge | None:
    same = (_charges.c.account_id == account_id) & (_charges.c.idempotency_key == idempotency_key)
    row = connection.execute(select(_charges).where(same)).mappings().first()
    return None if row is None else _charge(row)


def _locked_charge(connection: Connection, charge_id: str) -> Charge:
    query = select(_charges).where(_charges.c.charge_id == charge_id).with_for_update()
    row = connection.execute(query).mappings().first()
    if row is None:
        raise AccountError(f"there is no charge {charge_id:.40}")
    return _charge(row)


def _account(row: RowMapping) -> Account:
    return Account(row["account_id"], row["name"], row["address"], int(row["balance"]), row["created_at"])


def _key(row: RowMapping) -> AccountKey:
    limits = KeyLimits(_optional_number(row["request_limit"]), _optional_number(row["day_limit"]))
    return AccountKey(
        row["key_id"], row["account_id"], row["name"], limits, row["day"], int(row["day_spent"]), row["created_at"],
        row["revoked_at"],
    )  # fmt: skip


def _charge(row: RowMapping) -> Charge:
    return Charge(
        row["charge_id"], row["account_id"], row["key_id"], row["idempotency_key"], row["body_hash"], row["model"],
        ChargeState(row["state"]), int(row["held"]), int(row["charged"]), int(row["refunded"]), row["created_at"],
        row["finished_at"], row["response"],
    )  # fmt: skip


def _charge_row(charge: Charge) -> dict[str, object]:
    return {
        "charge_id": charge.charge_id,
        "account_id": charge.account_id,
        "key_id": charge.key_id,
        "idempotency_key": charge.idempotency_key,
        "body_hash": charge.body_hash,
        "model": charge.model,
        "state": str(charge.state),
        "held": uint256_text(charge.held),
        "charged": uint256_text(charge.charged),
        "refunded": uint256_text(charge.refunded),
        "created_at": charge.created_at,
    }


def _withdrawal(row: RowMapping) -> Withdrawal:
    return Withdrawal(
        row["withdrawal_id"], row["account_id"], row["recipient"], int(row["amount"]), WithdrawalState(row["state"]),
        row["nonce"], None if row["raw"] is None else bytes(row["raw"]), row["transaction_hash"], row["created_at"],
    )  # fmt: skip


def _optional_text(value: int | None) -> str | None:
    if value is not None and not 0 <= value <= MAXIMUM_WEI:
        raise AccountError(f"a limit is a number of wei from 0 to {MAXIMUM_WEI}, not {value}")
    return None if value is None else uint256_text(value)


def _optional_number(text: str | None) -> int | None:
    return None if text is None else int(text)


def _positive(amount: int) -> None:
    if not 1 <= amount <= MAXIMUM_WEI:
        raise AccountError(f"an amount is a number of wei from 1 to {MAXIMUM_WEI}, not {amount}")


def _name(text: str) -> str:
    shown = text.strip()
    if not 1 <= len(shown) <= MAXIMUM_NAME_LENGTH or not shown.isprintable():
        raise AccountError(f"a name has 1 to {MAXIMUM_NAME_LENGTH} printable characters")
    return shown
