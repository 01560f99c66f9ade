"""From counts to shares with intervals. Pure functions."""

from __future__ import annotations

from scipy.stats import beta

from benchmarks.result import Figure

CONFIDENCE = 0.95


def clopper_pearson(hits: int, trials: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """The exact two-sided interval of a binomial share (Clopper and Pearson 1934): it holds whatever the true share."""
    if not 0 <= hits <= trials or trials < 1:
        raise ValueError(f"{hits} hits in {trials} trials")
    tail = (1 - confidence) / 2
    low = 0.0 if hits == 0 else float(beta.ppf(tail, hits, trials - hits + 1))
    high = 1.0 if hits == trials else float(beta.ppf(1 - tail, hits + 1, trials - hits))
    return low, high


def shown_share(name: str, hits: int, trials: int, goal: str | None = None, note: str = "") -> Figure:
    """What a share is at least, in %: the lower end of its interval is the value, so that a goal is met only where so
    many samples show it.
    """
    low, high = clopper_pearson(hits, trials)
    seen = f"{hits} of {trials}"
    return Figure(
        name, 100 * low, "% at least (95 %)", 100 * low, 100 * high, trials, goal, f"{seen}; {note}" if note else seen
    )
