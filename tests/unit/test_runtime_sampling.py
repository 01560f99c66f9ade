"""Sampling: reproducible, distributed as asked, and checkable under float noise."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from bsns.protocol.sampling import SamplingError, SamplingParameters, draw, is_consistent_draw, uniform

LOGITS = np.random.default_rng(11).normal(size=50).astype(np.float32) * 2


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    logits = np.array([0, 3, 1, 3], dtype=np.float32)
    assert draw(logits, SamplingParameters(), 0) == 1


def test_draw_is_reproducible_and_depends_on_seed_and_step() -> None:
    parameters = SamplingParameters(temperature=1.0, seed=7)
    first = [draw(LOGITS, parameters, step) for step in range(50)]
    assert first == [draw(LOGITS, parameters, step) for step in range(50)]
    assert first != [draw(LOGITS, dataclasses.replace(parameters, seed=8), step) for step in range(50)]
    assert len(set(first)) > 5


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 0, 1.0), (0.7, 8, 1.0), (1.3, 0, 0.8), (0.9, 12, 0.9)]
)
def test_draw_follows_the_distribution(temperature: float, top_k: int, top_p: float) -> None:
    parameters = SamplingParameters(temperature=temperature, top_k=top_k, top_p=top_p, seed=123)
    mass = np.exp(LOGITS.astype(np.float64) / temperature)
    order = np.argsort(-mass, kind="stable")[: top_k or None]
    kept = mass[order] / mass[order].sum()
    order = order[: int(np.searchsorted(np.cumsum(kept), top_p)) + 1] if top_p < 1 else order
    expected = np.zeros(LOGITS.size)
    expected[order] = mass[order] / mass[order].sum()
    count = 20_000
    drawn = np.bincount([draw(LOGITS, parameters, step) for step in range(count)], minlength=LOGITS.size)
    assert set(np.flatnonzero(drawn)) <= set(order.tolist())
    often = expected * count >= 5
    assert (
        chisquare(
            np.append(drawn[often], drawn[~often].sum() + 1),
            np.append(expected[often], expected[~often].sum() + 1 / count) * count,
        ).pvalue
        > 0.001
    )


@settings(max_examples=200, deadline=None)
@given(
    number=st.integers(0, 2**32),
    temperature=st.sampled_from([0.0, 0.2, 0.7, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 5, 20]),
    top_p=st.sampled_from([0.1, 0.5, 0.95, 1.0]),
    step=st.integers(0, 1000),
)
def test_honest_draw_under_noise_is_always_consistent(
    number: int, temperature: float, top_k: int, top_p: float, step: int
) -> None:
    generator = np.random.default_rng(number)
    # Coarse logits have many near ties, the hard case.
    logits = np.round(generator.normal(size=40) * 4).astype(np.float32) / 2
    noisy = (logits + generator.uniform(-1e-3, 1e-3, size=40)).astype(np.float32)
    parameters = SamplingParameters(temperature=temperature, top_k=top_k, top_p=top_p, seed=number)
    assert is_consistent_draw(logits, parameters, step, draw(logits, parameters, step), 0.0)
    assert is_consistent_draw(logits, parameters, step, draw(noisy, parameters, step), 1.1e-3)


def test_invented_token_is_seldom_consistent() -> None:
    parameters = SamplingParameters(temperature=1.0, top_p=0.95, seed=5)
    accepted = 0
    for step in range(200):
        honest = draw(LOGITS, parameters, step)
        accepted += sum(
            is_consistent_draw(LOGITS, parameters, step, token, 1e-4) for token in range(50) if token != honest
        )
    # 200 x 49 invented tokens; only those at a boundary of the cumulative mass may pass.
    assert accepted <= 5
    assert not is_consistent_draw(LOGITS, parameters, 0, 50, 1.0)
    assert not is_consistent_draw(LOGITS, SamplingParameters(), 0, int(LOGITS.argmin()), 1e-3)


def test_digest_separates_parameters_and_ignores_rounding_below_a_millionth() -> None:
    base = SamplingParameters(temperature=0.7, top_k=40, top_p=0.9, seed=1, maximum_tokens=10)
    changed = [{"temperature": 0.8}, {"top_k": 41}, {"top_p": 0.91}, {"seed": 2}, {"maximum_tokens": 11}]
    digests = {dataclasses.replace(base, **change).digest() for change in changed} | {base.digest()}  # type: ignore[arg-type]
    assert len(digests) == 6
    assert dataclasses.replace(base, temperature=0.7 + 1e-9).digest() == base.digest()


@pytest.mark.parametrize(
    "fields",
    [{"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0.0}, {"top_p": 1.1}, {"top_k": -1}, {"seed": 2**64},
     {"maximum_tokens": 0}, {"top_k": 1.5}],
)  # fmt: skip
def test_parameters_out_of_range_are_refused(fields: dict[str, float]) -> None:
    with pytest.raises(SamplingError):
        SamplingParameters(**fields)  # type: ignore[arg-type]


def test_logits_not_finite_are_refused() -> None:
    with pytest.raises(SamplingError, match="NaN"):
        draw(np.array([1, np.nan], dtype=np.float32), SamplingParameters(), 0)


def test_uniform_lies_in_the_unit_interval() -> None:
    values = np.array([uniform(9, step) for step in range(10_000)])
    assert values.min() >= 0
    assert values.max() < 1
    assert abs(values.mean() - 0.5) < 0.01
