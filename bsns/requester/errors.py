"""Errors of the requester. Each message says what happened and what to do next.

RequesterError
├── InvalidRequestError     the request itself cannot be: too long, fee too low, malformed. Nothing was paid
├── JournalError            the state folder cannot be read or written
├── UnavailableError        no chain, no active plan, or not in time: try again later
├── InsufficientFundsError  the account cannot pay the deposit, or the gas of a transaction
├── ChainRefusedError       the contracts refused a transaction
├── TicketRefusedError      the collector of a tab refused a ticket, or what belongs to one
├── GatewayRefusedError     a gateway refused what was asked of an account
├── RefundNotDueError       the deposit is still in use; `seconds_left` until it can be taken back
└── NotServedError          paid, but not answered: the deposit can be taken back
    └── AnswerInvalidError  what came back is not what the nodes signed
"""

from __future__ import annotations


class RequesterError(Exception):
    """Root of everything the requester's client raises."""


class InvalidRequestError(RequesterError):
    """The request cannot be sent as it is; nothing was paid. The message names the limit."""


class JournalError(RequesterError):
    """The state folder holds something unusable, or cannot be written; nothing is sent without it."""


class UnavailableError(RequesterError):
    """The chain or the network is not ready for this; what was begun can be taken up with `bsns requests --resume`."""


class InsufficientFundsError(RequesterError):
    """The account cannot pay the deposit, or a transaction's gas; the transaction was not sent. The message names the
    account.
    """


class ChainRefusedError(RequesterError):
    """The contracts refused. `error_name` is the Solidity error."""

    def __init__(self, message: str, error_name: str) -> None:
        self.error_name = error_name
        super().__init__(message)


class TicketRefusedError(RequesterError):
    """The collector refused a ticket or what belongs to it. `reason` is the name of an ErrorReason."""

    def __init__(self, message: str, reason: str) -> None:
        self.reason = reason
        super().__init__(message)


class GatewayRefusedError(RequesterError):
    """A gateway refused what was asked of an account. `code` is its error code, None if it gave none."""

    def __init__(self, message: str, code: str | None) -> None:
        self.code = code
        super().__init__(message)


class RefundNotDueError(RequesterError):
    """The deposit cannot be taken back yet, or not at all. `seconds_left` is None if it never will."""

    def __init__(self, message: str, seconds_left: int | None) -> None:
        self.seconds_left = seconds_left
        super().__init__(message)


class NotServedError(RequesterError):
    """The request was paid and not served. `refundable_at` (Unix seconds, None if unknown) is when the deposit can be
    taken back.
    """

    def __init__(self, message: str, request_id: bytes, refundable_at: int | None = None) -> None:
        self.request_id = request_id
        self.refundable_at = refundable_at
        super().__init__(message)


class AnswerInvalidError(NotServedError):
    """Tokens arrived that the last stage did not sign for, or the signature is not its own. Do not use the text."""
