"""Errors of bsns.chain.

ChainError
├── ChainUnavailableError     no answer, or not a usable one: retry later
│   ├── EndpointRefusedError    it answered, with an error of its own: too much asked, pruned, overloaded
│   └── InsufficientFundsError  the sending account cannot pay: fund it, then retry
├── WrongChainError           the endpoint is on another chain than the deployment: fix the settings
├── UnknownBlockError         a block that is not canonical any more: walk back
├── ContractError             the contracts refused, with their decoded custom error
├── TransactionFailedError    mined, reverted, and the reason could not be reproduced
└── TransactionTimeoutError   not mined in time; it may still be
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class ChainError(Exception):
    """Root of everything that can go wrong between us and the chain."""


class ChainUnavailableError(ChainError):
    """The RPC endpoint did not answer, answered too late, or with an error of its own."""


class EndpointRefusedError(ChainUnavailableError):
    """The RPC endpoint answered a question with an error of its own, not the contracts' one."""


class InsufficientFundsError(ChainUnavailableError):
    """The sending account cannot pay value and gas of a transaction. Nothing was sent; it may be tried again once the
    account is funded. `account` is None where it is not known.
    """

    def __init__(self, account: str | None, detail: str) -> None:
        self.account = account
        self.detail = detail
        who = "the sending account" if account is None else f"account {account}"
        super().__init__(f"{who} cannot pay for the transaction and its gas ({detail}): fund it and try again")


class WrongChainError(ChainError):
    """The endpoint serves another chain, or the contracts are not there."""


class UnknownBlockError(ChainError):
    """The block asked for is unknown to the endpoint: orphaned by a reorganisation, or not there yet."""


class ContractError(ChainError):
    """The contracts refuse a call. `name` is the Solidity error, `arguments` its values by parameter name."""

    def __init__(self, name: str, arguments: Mapping[str, Any] | None = None) -> None:
        self.name = name
        self.arguments = dict(arguments or {})
        shown = ", ".join(f"{key}={_shown(value)}" for key, value in self.arguments.items())
        super().__init__(f"{name}({shown})")


class TransactionFailedError(ChainError):
    """A transaction was mined and reverted without a reason that a later call reproduces."""


class TransactionTimeoutError(ChainError):
    """A transaction was not mined within its time limit. It was broadcast and may still be mined."""


def _shown(value: object) -> str:
    return "0x" + value.hex() if isinstance(value, bytes) else str(value)
