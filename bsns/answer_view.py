"""An answer on a terminal as it comes: the text, and below it what is going on, how long and for how much.

Owns the picture, nothing else. Promises that the whole text stands on the terminal in the end, once, however long it
is, and that nothing a stranger wrote is taken for markup or for control of the terminal.
"""

from __future__ import annotations

import time
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

REFRESH_A_SECOND = 8
ETHER = 10**18


class AnswerView:
    """Use as a context manager around a request. `fee_per_token` in wei; `prompt_tokens` are paid as well."""

    def __init__(self, console: Console, fee_per_token: int, prompt_tokens: int, maximum_tokens: int) -> None:
        self._console = console
        self._fee, self._prompt, self._maximum = fee_per_token, prompt_tokens, maximum_tokens
        self._text, self._phase = "", "asking"
        self._tokens = 0
        self._began = time.monotonic()
        self._first: float | None = None
        self._last: float | None = None
        self._spinner = Spinner("dots")
        self._live = Live(self._picture(), console=console, refresh_per_second=REFRESH_A_SECOND, transient=True)
        self.has_shown_text = False

    def __enter__(self) -> AnswerView:
        self._live.start(refresh=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()
        if self._text:
            self._console.print(Text(printable(self._text)))

    def token(self, _token: int, text: str) -> None:
        """A token has come, and the text that it completes."""
        now = time.monotonic()
        self._tokens += 1
        self._first, self._last = self._first or now, now
        self._text += text
        self.has_shown_text = self.has_shown_text or bool(text)
        self._phase = "answering"
        self._live.update(self._picture())

    def progress(self, text: str) -> None:
        """Something else has happened."""
        self._phase = text
        self._live.update(self._picture(), refresh=True)

    def _picture(self) -> Group:
        # What is above the screen cannot be drawn again: of a long text only the end moves, all of it is printed later.
        width, room = max(20, self._console.width), max(3, self._console.height - 4)
        lines = Text(printable(self._text)).wrap(self._console, width)
        status = Text.assemble(
            (printable(self._phase), "bold"), "  ", f"{self._prompt} + {self._tokens} of {self._maximum} tokens  ",
            f"{shown_ether((self._prompt + self._tokens) * self._fee)}  ", f"{time.monotonic() - self._began:.1f} s",
            self._pace(),
        )  # fmt: skip
        self._spinner.update(text=status)
        return Group(*lines[-room:], self._spinner)

    def _pace(self) -> str:
        if self._first is None or self._last is None or self._last <= self._first:
            return ""
        return f"  {(self._tokens - 1) / (self._last - self._first):.1f} tokens/s"


def summary(answer: Any) -> Table:
    """What became of an answer: of `bsns.requester.client.Answer`."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_row("request", f"0x{answer.request_id.hex()}")
    style = {"Settled": "green", "Delivered": "green", "Refunded": "red"}.get(answer.status, "")
    table.add_row("status", Text(answer.status, style=style))
    paid = "not settled yet" if answer.charged is None else shown_ether(answer.charged)
    table.add_row("price", Text(f"{paid} of a deposit of {shown_ether(answer.fee_wei)}"))
    rate = "" if answer.tokens_per_second is None else f", {answer.tokens_per_second:.1f} tokens/s"
    first = "" if answer.time_to_first_token_s is None else f", the first after {answer.time_to_first_token_s:.2f} s"
    table.add_row("answer", f"{len(answer.token_ids)} tokens{first}{rate}, ended by {answer.finish_reason}")
    for item in answer.route:
        table.add_row(f"stage {item.stage}", Text(f"{item.node} at {printable(item.endpoint)}"))
    return table


def shown_ether(wei: int) -> str:
    """Wei for people, exact to twelve digits."""
    return f"{wei / ETHER:.12f}".rstrip("0").rstrip(".") + " ETH"


def printable(text: str) -> str:
    """`text` without what controls a terminal; line ends and tabs stay."""
    return "".join(item if item.isprintable() or item in "\n\t" else "\ufffd" for item in text)
