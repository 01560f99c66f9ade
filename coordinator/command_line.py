"""How the commands of `bsns-coordinator` report: exit codes, one JSON document on standard output, logs.

Promises that every expected error becomes one line on standard error and an exit code, and that whoever waits for a
document gets it at once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Any, Final

import typer

from bsns import service_logs
from bsns.chain.errors import ChainError, ContractError, InsufficientFundsError, TransactionFailedError
from bsns.protocol.identifiers import ProtocolError
from bsns.requester.errors import InvalidRequestError, JournalError, UnavailableError
from coordinator.devnet import DevnetError
from coordinator.network_state import NetworkStateError
from coordinator.settings import SettingsError
from coordinator.storage import StorageError, StorageSettingsError, StorageUnavailableError

EXIT_USAGE: Final = 2
EXIT_REFUSED: Final = 3
EXIT_UNAVAILABLE: Final = 4


class LogFormat(StrEnum):
    """How log lines look."""

    JSON = "json"
    CONSOLE = "console"


@contextmanager
def reported() -> Iterator[None]:
    """Every expected error becomes one line and an exit code."""
    try:
        yield
    except* (SettingsError, StorageSettingsError, ProtocolError, InvalidRequestError, JournalError) as group:
        _fail(group, EXIT_USAGE)
    except* (ContractError, TransactionFailedError, InsufficientFundsError) as group:
        _fail(group, EXIT_REFUSED)
    except* (ChainError, StorageUnavailableError, UnavailableError) as group:
        _fail(group, EXIT_UNAVAILABLE)
    except* (StorageError, NetworkStateError, DevnetError) as group:
        _fail(group, EXIT_REFUSED)


def _fail(group: BaseExceptionGroup[Exception], code: int) -> None:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    typer.echo(f"bsns-coordinator: {error}", err=True)
    sys.exit(code)


def say(content: dict[str, Any]) -> None:
    """One JSON document on standard output, at once: whoever started us waits for it."""
    typer.echo(json.dumps(content))
    sys.stdout.flush()


def configure_logs(log_format: LogFormat | None) -> None:
    """As `log_format` says; None: for people on a terminal, else JSON."""
    service_logs.configure_logs(for_people=None if log_format is None else log_format == LogFormat.CONSOLE)
