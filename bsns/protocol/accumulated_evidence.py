"""Evidence that grows over many requests: an anytime-valid test of one node's sketch distances.

A single verdict punishes only what lies beyond 2τ. A node that stays closer on purpose, or that cheats in few of its
requests, is never slashed; but honest distances are small always, so the sum of its verdicts betrays it. Owns the test
that adds them up and its constants. Promises that an honest node raises an alarm with probability at most
`FALSE_ALARM`, at whatever moment anybody looks and however often (Ville's inequality). Decides nothing: no contract
reads it. Whoever watches the chain can: route past the node, challenge its requests, or ask its operator.

**The null hypothesis**, of a node that is honest: given everything that happened before, for the distance D of its next
judged stage from the medoid that decided it

1. P(D > r) ≤ `EXCEEDANCE` = 10⁻³, and
2. E[min(D, τ)] ≤ `MEAN_SHARE` · τ = r/2,

with r the honest radius and τ = 2r of its execution class (`bsns.protocol.sketch.TOLERANCES`). What makes both safe: r
is meant to bound every honest distance, and the largest that `make bench-verification` and `make bench-sketch` measured
are r/6 (float32, int8) and 3r/8 (bfloat16), in more than 10,000 comparisons of which none exceeded r (95 % upper bound
3 · 10⁻⁴). Distances need not be independent nor alike, only bounded in this way given the past. What would break it: a
kind of honest execution whose distances nobody measured (the alarm then says that the class needs another radius), and
a medoid that a captured committee decided.

**The test** is a bet against the null (Waudby-Smith and Ramdas, "Estimating means of bounded random variables by
betting", 2024; Shafer and Vovk 2019). For X in [0, 1] with E[X | past] ≤ m, a gambler who stakes the share b of its
capital each time has K ← K · (1 + b/m · (X - m)) ≥ 0, which the null keeps from growing on average. A mean of such
capitals over several b, and over both statements, is one more: it starts at 1, and P(it ever reaches 1/α) ≤ α.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from bsns.protocol.sketch import SketchTolerance

FALSE_ALARM: Final = 1e-6
"""Probability that an honest node ever raises the alarm: one in a million nodes over their whole lives."""
EXCEEDANCE: Final = 1e-3
MEAN_SHARE: Final = 0.25
# From careful to bold. The boldest loses nearly all of its capital where X is 0, so it is one of many and never 1.
_STAKES: Final = (0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.85, 0.95, 0.99)


class BettingMartingale:
    """Capital of gamblers who bet that a value in [0, 1] has a conditional mean above `bound`.

    Kept as logarithms, since capitals of thousands of observations leave the range of a float.
    """

    def __init__(self, bound: float, stakes: Sequence[float] = _STAKES) -> None:
        if not 0 < bound < 1:
            raise ValueError(f"the bound of the mean is {bound}, expected more than 0 and less than 1")
        if not stakes or not all(0 <= stake < 1 for stake in stakes):
            raise ValueError(f"stakes are {tuple(stakes)}, expected shares of at least 0 and below 1")
        self._bound, self._stakes = bound, tuple(stakes)
        self._logarithms = [0.0] * len(self._stakes)

    def observe(self, value: float) -> None:
        """One more value in [0, 1]."""
        if not 0 <= value <= 1:
            raise ValueError(f"observed {value}, expected 0 to 1")
        excess = value / self._bound - 1
        self._logarithms = [
            capital + math.log1p(stake * excess) for capital, stake in zip(self._logarithms, self._stakes, strict=True)
        ]

    @property
    def log_capital(self) -> float:
        """Natural logarithm of the mean capital; 0 before anything was observed."""
        return _log_mean(self._logarithms)


@dataclass
class AccumulatedEvidence:
    """All judged stages of one node in one execution class.

    `observe` every distance that a tally published for it (the circular L1 distance of `bsns.protocol.sketch.distance`,
    from the medoid), once each and in any order; leaving some out by their size would break the promise.
    """

    tolerance: SketchTolerance
    false_alarm: float = FALSE_ALARM
    observations: int = field(default=0, init=False)
    _exceeding: BettingMartingale = field(init=False, repr=False)
    _size: BettingMartingale = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 < self.false_alarm < 1:
            raise ValueError(f"the false alarm probability is {self.false_alarm}, expected between 0 and 1")
        self._exceeding, self._size = BettingMartingale(EXCEEDANCE), BettingMartingale(MEAN_SHARE)

    def observe(self, distance: int) -> bool:
        """Adds one distance; whether the alarm is raised now. ValueError if it is negative."""
        if distance < 0:
            raise ValueError(f"a distance is {distance}, expected at least 0")
        self._exceeding.observe(float(distance > self.tolerance.honest_radius))
        self._size.observe(min(distance / self.tolerance.pay_within, 1.0))
        self.observations += 1
        return self.is_alarmed

    @property
    def log_evidence(self) -> float:
        """Natural logarithm of the evidence against the null: 0 at the start, below 0 for a node that looks honest."""
        return _log_mean([self._exceeding.log_capital, self._size.log_capital])

    @property
    def is_alarmed(self) -> bool:
        """Whether the evidence now reaches 1 / `false_alarm`. Whoever acts on the first alarm keeps the promise, also
        if the evidence falls again.
        """
        return self.log_evidence >= -math.log(self.false_alarm)


def _log_mean(logarithms: Sequence[float]) -> float:
    largest = max(logarithms)
    return largest + math.log(math.fsum(math.exp(item - largest) for item in logarithms) / len(logarithms))
