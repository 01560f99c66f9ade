"""How the log lines of a service look: JSON on standard error, or for people where that is a terminal.

Promises that no local variable is in a trace: among them are prompts, salts and keys.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import structlog


def configure_logs(level: str = "info", *, for_people: bool | None = None) -> None:
    """Log from `level` up. `for_people`: None leaves it to whether standard error is a terminal."""
    people = sys.stderr.isatty() if for_people is None else for_people
    renderer: Any = (
        # The default for terminals shows local variables.
        structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
        if people
        else structlog.processors.JSONRenderer()
    )
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(getattr(logging, level.upper())),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
    )
