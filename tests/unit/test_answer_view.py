"""What a requester sees of an answer on a terminal."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass, field

from rich.console import Console

from bsns.answer_view import AnswerView, summary
from bsns.requester.client import Answer, RouteNode


@dataclass
class Screen:
    text: io.StringIO = field(default_factory=io.StringIO)

    def console(self, width: int = 80) -> Console:
        return Console(file=self.text, force_terminal=True, width=width, height=12, _environ={"TERM": "xterm"})


def test_answer_shows_time_and_cost_as_they_accrue_and_stands_whole_in_the_end() -> None:
    screen = Screen()
    with AnswerView(screen.console(), 10**12, 30, 64) as view:
        view.progress("waiting for a route")
        for number in range(40):
            view.token(number, f"word{number} ")
        view.progress("waiting for the commitments")
    shown = screen.text.getvalue()
    assert "waiting for a route" in shown
    assert "30 + 0 of 64 tokens" in shown
    assert "30 + 40 of 64 tokens" in shown
    assert "0.00007 ETH" in shown
    assert "tokens/s" in shown
    last = shown[shown.rindex("word0 ") :]
    assert all(f"word{number}" in last for number in range(40))
    assert view.has_shown_text


def test_answer_longer_than_the_screen_is_printed_once_whole() -> None:
    screen = Screen()
    with AnswerView(screen.console(width=40), 1, 1, 400) as view:
        for number in range(300):
            view.token(number, f"line{number}\n")
    lines = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", screen.text.getvalue()).split("\n")
    assert lines.count("line0") == 1
    start = lines.index("line0")
    assert lines[start : start + 300] == [f"line{number}" for number in range(300)]


def test_what_a_model_writes_neither_styles_nor_controls_the_terminal() -> None:
    screen = Screen()
    with AnswerView(screen.console(), 1, 1, 10) as view:
        view.token(1, "[red]not markup[/red] \x1b[2Jnot a command\x07")
    shown = screen.text.getvalue()
    assert "[red]not markup[/red]" in shown
    assert "\x1b[2J" not in shown
    assert "\x07" not in shown


def test_summary_names_price_route_and_end() -> None:
    answer = Answer(
        "text", (1, 2, 3), b"\1" * 32, "stop", "Settled", 10**15, 4 * 10**14, 0.25, 20.0,
        (RouteNode(0, "0x" + "11" * 20, "host\x1b:1"),), {},
    )  # fmt: skip
    screen = Screen()
    screen.console(width=160).print(summary(answer))
    shown = screen.text.getvalue()
    assert "0.0004 ETH of a deposit of 0.001 ETH" in shown
    assert "3 tokens, the first after 0.25 s, 20.0 tokens/s, ended by stop" in shown
    assert "\x1b:1" not in shown
