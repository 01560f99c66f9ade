"""Evidence over many requests: honest nodes seldom raise the alarm whenever one looks, careful cheats soon do."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.verification_statistics import clopper_pearson
from bsns.protocol.accumulated_evidence import (
    EXCEEDANCE,
    FALSE_ALARM,
    MEAN_SHARE,
    AccumulatedEvidence,
    BettingMartingale,
)
from bsns.protocol.sketch import TOLERANCES

TOLERANCE = TOLERANCES["torch-cpu/float32/sdpa"]
RADIUS, TAU = TOLERANCE.honest_radius, TOLERANCE.pay_within


def requests_until_alarm(distances: Callable[[], int], limit: int = 10_000) -> int | None:
    evidence = AccumulatedEvidence(TOLERANCE)
    for number in range(1, limit + 1):
        if evidence.observe(distances()):
            return number
    return None


@given(st.floats(0.0005, 0.9), st.lists(st.floats(0, 1), max_size=6))
def test_capital_at_the_bound_is_a_fair_game(bound: float, past: list[float]) -> None:
    """The mean of the next capital, over the two-point value whose mean is the bound, is the capital now."""
    capital = 0.0
    for value, chance in ((1.0, bound), (0.0, 1 - bound)):
        game = BettingMartingale(bound)
        for earlier in past:
            game.observe(earlier)
        now = game.log_capital
        game.observe(value)
        capital += chance * math.exp(game.log_capital - now)
    assert capital == pytest.approx(1.0, rel=1e-9)


@given(st.floats(0.01, 0.9), st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_capital_never_vanishes_and_grows_with_every_value(bound: float, values: list[float]) -> None:
    less, more = BettingMartingale(bound), BettingMartingale(bound)
    for value in values:
        less.observe(value / 2)
        more.observe(value)
    assert math.isfinite(less.log_capital)
    assert more.log_capital >= less.log_capital - 1e-12


def worst_null(kind: str, generator: random.Random) -> int:
    """A distance of a node at the edge of the null: of both statements, or of one."""
    match kind:
        case "both":
            # Beyond r with the largest probability allowed; the rest as large as the mean allows within r.
            return TAU if generator.random() < EXCEEDANCE else RADIUS // 2
        case "rarely":
            return TAU if generator.random() < EXCEEDANCE else 0
        case _:
            # All or nothing within r: the mean is at its bound, 0.25 τ = r/2.
            return RADIUS if generator.random() < 0.5 else 0


@pytest.mark.parametrize("kind", ["both", "rarely", "within"])
def test_honest_node_at_the_edge_of_the_null_is_alarmed_no_more_often_than_promised(kind: str) -> None:
    level, nodes, alarms = 0.05, 300, 0
    for node in range(nodes):
        generator = random.Random(node)
        evidence = AccumulatedEvidence(TOLERANCE, level)
        # Whoever stops at the first alarm is the worst there is.
        alarms += any(evidence.observe(worst_null(kind, generator)) for _ in range(500))
    assert clopper_pearson(alarms, nodes, 0.999)[0] <= level, f"{alarms} of {nodes} alarmed"


def test_honest_nodes_as_measured_are_never_alarmed() -> None:
    generator = random.Random(0)
    assert requests_until_alarm(lambda: generator.randint(0, RADIUS // 6), 5_000) is None


def test_evidence_against_an_honest_node_falls() -> None:
    evidence = AccumulatedEvidence(TOLERANCE)
    assert evidence.log_evidence == 0
    for _ in range(100):
        evidence.observe(5)
    assert evidence.log_evidence < 0
    assert not evidence.is_alarmed
    assert evidence.observations == 100


@pytest.mark.parametrize("share_of_tau", [0.6, 0.9, 1.2, 1.9])
def test_node_always_near_the_threshold_is_exposed_within_five_requests(share_of_tau: float) -> None:
    found = requests_until_alarm(lambda: round(share_of_tau * TAU))
    assert found is not None
    assert found <= 5


@pytest.mark.parametrize("share_of_tau", [0.6, 0.9, 1.2])
def test_node_that_cheats_in_a_tenth_of_its_requests_is_exposed(share_of_tau: float) -> None:
    for run in range(20):
        generator = random.Random(run)
        found = requests_until_alarm(
            lambda generator=generator: round(share_of_tau * TAU) if generator.random() < 0.1 else 5
        )
        assert found is not None
        assert found <= 200, run


def test_node_within_r_but_far_from_honest_is_exposed_by_its_mean() -> None:
    """What a single verdict can never see: distances below r, on average above r/2."""
    found = requests_until_alarm(lambda: round(0.9 * RADIUS))
    assert found is not None
    assert found < 100


def test_alarm_is_at_the_inverse_of_the_false_alarm_probability() -> None:
    evidence = AccumulatedEvidence(TOLERANCE)
    while not evidence.observe(TAU):
        assert evidence.log_evidence < -math.log(FALSE_ALARM)
    assert evidence.log_evidence >= -math.log(FALSE_ALARM)


@settings(max_examples=30)
@given(st.lists(st.integers(0, 4096), min_size=1, max_size=40), st.randoms(use_true_random=False))
def test_evidence_does_not_depend_on_the_order(distances: list[int], generator: random.Random) -> None:
    first, second = AccumulatedEvidence(TOLERANCE), AccumulatedEvidence(TOLERANCE)
    shuffled = list(distances)
    generator.shuffle(shuffled)
    for a, b in zip(distances, shuffled, strict=True):
        first.observe(a)
        second.observe(b)
    assert first.log_evidence == pytest.approx(second.log_evidence, abs=1e-9)


def test_null_is_between_what_was_measured_and_what_is_paid() -> None:
    assert RADIUS / 6 / TAU < MEAN_SHARE < RADIUS / TAU


def test_values_out_of_range_are_refused() -> None:
    with pytest.raises(ValueError, match="distance"):
        AccumulatedEvidence(TOLERANCE).observe(-1)
    with pytest.raises(ValueError, match="probability"):
        AccumulatedEvidence(TOLERANCE, 0.0)
    with pytest.raises(ValueError, match="bound"):
        BettingMartingale(1.0)
    with pytest.raises(ValueError, match="stakes"):
        BettingMartingale(0.5, [1.0])
    with pytest.raises(ValueError, match="observed"):
        BettingMartingale(0.5).observe(1.5)
