"""Deterrence: break-evens are where the gain changes its sign, and the gain is what a simulation of the rules pays."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bsns.protocol.deterrence import ExecutorCheat, LazyMember, verifier_share_for

CHEAT = ExecutorCheat(
    sampling=0.1, stake=1.0, fee=0.002, saved=0.001, incorrect_slash=0.5, withhold_slash=0.05, in_flight=20
)
LAZY = LazyMember(
    reexecution=0.001, reward=0.002, found_rate=0.0, stake=1.0, incorrect_slash=0.5, jail_loss=0.01, keeps_silent=True
)
shares = st.floats(0.01, 1.0)
cheats = st.builds(
    ExecutorCheat,
    sampling=shares,
    stake=st.floats(0.0, 100.0),
    fee=st.floats(0.0, 1.0),
    saved=st.floats(0.001, 1.0),
    incorrect_slash=shares,
    withhold_slash=shares,
    detected=shares,
    convicted=shares,
    in_flight=st.integers(1, 1_000),
    jail_loss=st.floats(0.0, 1.0),
)


def test_expected_gain_of_one_request_is_the_textbook_formula() -> None:
    one = replace(CHEAT, in_flight=1)
    assert one.withholds
    assert one.expected_gain == pytest.approx(0.001 - 0.1 * (0.002 + 0.05))
    opens = replace(one, withhold_slash=0.9)
    assert not opens.withholds
    assert opens.expected_gain == pytest.approx(0.001 - 0.1 * (0.002 + 0.5))


def simulated_gain(cheat: ExecutorCheat, runs: int) -> float:
    """Mean gain per request of playing the rules out: each request drawn or not, penalties shares of what is left."""
    generator, total = random.Random(0), 0.0
    for _ in range(runs):
        stake, jailed = cheat.stake, False
        for _ in range(cheat.in_flight):
            total += cheat.saved
            if generator.random() >= cheat.sampling:
                continue
            if cheat.withholds:
                share = cheat.withhold_slash
            elif generator.random() < cheat.detected * cheat.convicted:
                share = cheat.incorrect_slash
            else:
                continue
            total -= cheat.fee + share * stake + (0.0 if jailed else cheat.jail_loss)
            stake, jailed = stake * (1 - share), True
    return total / runs / cheat.in_flight


@pytest.mark.parametrize("withhold_slash", [0.05, 0.9])
def test_expected_gain_is_the_mean_of_simulated_histories(withhold_slash: float) -> None:
    cheat = replace(CHEAT, withhold_slash=withhold_slash, detected=0.9, convicted=0.8, jail_loss=0.01)
    # The standard error of a history of 20 requests is below 0.02, of the mean of all below 0.0003.
    assert simulated_gain(cheat, 6_000) == pytest.approx(cheat.expected_gain, abs=1.5e-3)


@given(cheats)
def test_break_evens_separate_what_pays_from_what_does_not(cheat: ExecutorCheat) -> None:
    stake, rate, slash = cheat.smallest_stake(), cheat.smallest_sampling(), cheat.smallest_slash()
    if math.isfinite(stake):
        assert replace(cheat, stake=stake * (1 + 1e-9)).is_deterred
        assert stake < 1e-9 or not replace(cheat, stake=stake * 0.99).is_deterred
    for name, smallest in (("sampling", rate), ("slash", slash)):
        changed = [
            replace(cheat, sampling=value) if name == "sampling"
            else replace(cheat, incorrect_slash=value, withhold_slash=value)
            for value in ([1.0] if smallest is None else [min(1.0, smallest * (1 + 1e-9)), 0.99 * smallest])
        ]  # fmt: skip
        if smallest is None:
            assert not changed[0].is_deterred
        else:
            assert changed[0].is_deterred
            assert smallest < 1e-9 or not changed[1].is_deterred
    most = cheat.most_in_flight()
    assert most == 0 or replace(cheat, in_flight=most).is_deterred
    assert most >= 1 << 61 or not replace(cheat, in_flight=most + 1).is_deterred


@given(cheats, st.integers(2, 10))
def test_more_requests_in_flight_never_deter_more(cheat: ExecutorCheat, factor: int) -> None:
    more = replace(cheat, in_flight=cheat.in_flight * factor)
    assert more.expected_gain >= cheat.expected_gain - 1e-9


def test_what_is_never_detected_always_pays() -> None:
    unseen = replace(CHEAT, detected=0.0)
    assert unseen.expected_gain == CHEAT.saved
    assert unseen.smallest_stake() == math.inf
    assert unseen.smallest_sampling() is None
    assert unseen.smallest_slash() is None
    assert unseen.most_in_flight() == 0


def test_lazy_member_gains_the_reexecution_unless_copies_are_found() -> None:
    assert LAZY.expected_gain == 0.001
    rate = LAZY.smallest_found_rate()
    assert rate == pytest.approx(0.001 / (0.002 + 0.01))
    assert replace(LAZY, found_rate=rate * 1.001).is_deterred
    assert not replace(LAZY, found_rate=rate * 0.999).is_deterred


def test_lazy_member_that_cannot_keep_silent_loses_its_slash() -> None:
    assert LAZY.penalty == 0.01
    assert replace(LAZY, keeps_silent=False).penalty == 0.5
    assert replace(LAZY, jail_loss=2.0).penalty == 0.5


def test_lazy_member_for_whom_nothing_is_at_stake_is_never_deterred() -> None:
    assert replace(LAZY, reward=0.0, jail_loss=0.0).smallest_found_rate() is None
    assert replace(LAZY, reexecution=0.0).smallest_found_rate() == 0


def test_verifier_share_pays_every_seat_its_check() -> None:
    share = verifier_share_for(seats=5, check_share=0.08, cost_share=0.8)
    fee, cost = 1.0, 0.8
    assert share * fee / 5 == pytest.approx(0.08 * cost)


@pytest.mark.parametrize(
    ("field", "value"),
    [("sampling", 1.1), ("detected", -0.1), ("stake", -1.0), ("fee", math.nan), ("saved", math.inf), ("in_flight", 0)],
)
def test_executor_out_of_range_is_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        replace(CHEAT, **{field: value})


@pytest.mark.parametrize(("field", "value"), [("found_rate", 2.0), ("reward", -1.0), ("jail_loss", math.inf)])
def test_member_out_of_range_is_refused(field: str, value: float) -> None:
    with pytest.raises(ValueError, match=field):
        replace(LAZY, **{field: value})
