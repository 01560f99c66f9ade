"""The requester's side: quote, pay on chain, stream the answer, take a refund; and the chat tokenizer.

The public surface is what `__all__` names, loaded on first use: the tokenizer alone must not cost the import of a
chain client. Private sessions load `bsns.runtime` on demand; nothing else here does.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from bsns.requester.client import Answer, Client, Quote, RequestLimits, RequestSummary
    from bsns.requester.errors import (
        AnswerInvalidError,
        ChainRefusedError,
        InsufficientFundsError,
        InvalidRequestError,
        JournalError,
        NotServedError,
        RefundNotDueError,
        RequesterError,
        UnavailableError,
    )

_HOME = {
    "Answer": "client",
    "AnswerInvalidError": "errors",
    "ChainRefusedError": "errors",
    "Client": "client",
    "InsufficientFundsError": "errors",
    "InvalidRequestError": "errors",
    "JournalError": "errors",
    "NotServedError": "errors",
    "Quote": "client",
    "RefundNotDueError": "errors",
    "RequestLimits": "client",
    "RequestSummary": "client",
    "RequesterError": "errors",
    "UnavailableError": "errors",
}

__all__ = [
    "Answer",
    "AnswerInvalidError",
    "ChainRefusedError",
    "Client",
    "InsufficientFundsError",
    "InvalidRequestError",
    "JournalError",
    "NotServedError",
    "Quote",
    "RefundNotDueError",
    "RequestLimits",
    "RequestSummary",
    "RequesterError",
    "UnavailableError",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
