"""Whether cheating pays: expected gains of executors, committee members and pairs of them under given terms.

Owns the arithmetic that relates sampling rate, stake, slash shares, fees and detection. Pure and in floats: it advises
whoever chooses the terms of a deployment (`make bench-verification` prints it for the shipped ones); nothing on the
chain depends on it. Money is in one unit throughout (ether, say). Does not say how likely a committee convicts: that
follows from who holds the stake (`benchmarks/verification_capture.py`).

**An executor** gains by a cheat what it saves of its cost. It loses the fee and a share of its stake if its request is
drawn for a committee and convicted. Once drawn it may choose: open its commitment and be slashed `incorrect_slash` if
it is convicted, or keep it back and be slashed `withhold_slash` for certain. It takes what costs less. Slashes take a
share of what is left of the stake, so j of them leave (1 - share)^j: a node with many requests in flight when the first
verdict falls loses the whole stake at most, however many it cheated in. Hence a stake protects a bounded number of
requests, and every break-even below is for `in_flight` of them (Becker 1968 in the form of field-notes §2.3: cheating
pays only if gain > probability · slash).

**A committee member** that copies what others say instead of executing saves the cost of a re-execution. It loses where
the stage was false and it is found out; but a member that does not open its own commitment is only jailed and unpaid,
so it loses the smaller of the two.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

_BISECTIONS: Final = 80


@dataclass(frozen=True, slots=True)
class ExecutorCheat:
    """One kind of cheat of one stage's executor.

    `sampling`: probability that a committee sits. `detected`: that a judged cheat lies beyond 2τ of the truth.
    `convicted`: that the committees convict a cheat that lies there; 1 less what captured or undecided committees let
    go. `stake`, `fee` (of the stage, per request) and `saved` (of the honest cost, per cheated request) are money.
    `incorrect_slash`, `withhold_slash`: shares of the stake. `in_flight`: requests cheated in before the first verdict
    can fall. `jail_loss`: what a term in jail costs, taken once. `verification_saved`: what an accomplice on the
    committee saves on average per cheated request.
    """

    sampling: float
    stake: float
    fee: float
    saved: float
    incorrect_slash: float
    withhold_slash: float
    detected: float = 1.0
    convicted: float = 1.0
    in_flight: int = 1
    jail_loss: float = 0.0
    verification_saved: float = 0.0

    def __post_init__(self) -> None:
        for name in ("sampling", "incorrect_slash", "withhold_slash", "detected", "convicted"):
            _require_share(name, getattr(self, name))
        for name in ("stake", "fee", "saved", "jail_loss", "verification_saved"):
            _require_amount(name, getattr(self, name))
        if self.in_flight < 1:
            raise ValueError(f"in_flight is {self.in_flight}, expected at least 1")

    @property
    def withholds(self) -> bool:
        """Whether a drawn liar does better by keeping its commitment shut."""
        opening = self.detected * self.convicted
        return self.withhold_slash * self.stake + self.fee < opening * (self.incorrect_slash * self.stake + self.fee)

    @property
    def expected_slash(self) -> float:
        """Share of the stake that one request costs on average, drawn or not."""
        share = self.withhold_slash if self.withholds else self.detected * self.convicted * self.incorrect_slash
        return self.sampling * share

    @property
    def penalty_probability(self) -> float:
        """That one cheated request ends in a penalty."""
        return self.sampling * (1.0 if self.withholds else self.detected * self.convicted)

    @property
    def expected_loss(self) -> float:
        """Of all requests in flight together: fees, stake and jail."""
        fees = self.in_flight * self.penalty_probability * self.fee
        slashed = self.stake * _ever(self.expected_slash, self.in_flight)
        return fees + slashed + self.jail_loss * _ever(self.penalty_probability, self.in_flight)

    @property
    def expected_gain(self) -> float:
        """Of cheating in one request, on average over those in flight; above 0 it pays."""
        return self.saved + self.verification_saved - self.expected_loss / self.in_flight

    @property
    def is_deterred(self) -> bool:
        return self.expected_gain <= 0

    def smallest_stake(self) -> float:
        """The stake from which on cheating never pays; infinite where no stake does."""
        if replace(self, stake=0.0).is_deterred:
            return 0.0
        return _smallest_unbounded(lambda stake: replace(self, stake=stake).is_deterred)

    def smallest_sampling(self) -> float | None:
        """The sampling rate from which on cheating never pays; None if even 1 is too little."""
        return _smallest_share(lambda rate: replace(self, sampling=rate).is_deterred)

    def smallest_slash(self) -> float | None:
        """The share, of both slashes, from which on cheating never pays; None if even the whole stake is too little."""
        return _smallest_share(lambda share: replace(self, incorrect_slash=share, withhold_slash=share).is_deterred)

    def most_in_flight(self) -> int:
        """The most requests in flight at which cheating does not pay; 0 if it pays with one. The search ends above
        2^62.
        """
        if not replace(self, in_flight=1).is_deterred:
            return 0
        low, high = 1, 2
        while high < 1 << 62 and replace(self, in_flight=high).is_deterred:
            low, high = high, 2 * high
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if replace(self, in_flight=middle).is_deterred else (low, middle)
        return low


@dataclass(frozen=True, slots=True)
class LazyMember:
    """A committee member that attests what it can copy instead of executing.

    `reexecution`: cost of the check that it saves. `reward`: what a seat whose attestation agrees is paid.
    `found_rate`: share of judged stages where a copy does not agree: all whose rows inside are compared, and those that
    are false. `incorrect_slash`: share of the stake.
    `jail_loss`: what a term in jail costs. `keeps_silent`: whether it can still keep its commitment shut when it has
    seen that it would lose, which jails it and does not slash it.
    """

    reexecution: float
    reward: float
    found_rate: float
    stake: float
    incorrect_slash: float
    jail_loss: float = 0.0
    keeps_silent: bool = True

    def __post_init__(self) -> None:
        for name in ("found_rate", "incorrect_slash"):
            _require_share(name, getattr(self, name))
        for name in ("reexecution", "reward", "stake", "jail_loss"):
            _require_amount(name, getattr(self, name))

    @property
    def honest_gain(self) -> float:
        """Of executing as one should; below 0 nobody sits who does not have to."""
        return self.reward - self.reexecution

    @property
    def penalty(self) -> float:
        """What being wrong once costs besides the reward."""
        slashed = self.incorrect_slash * self.stake
        return min(slashed, self.jail_loss) if self.keeps_silent else slashed

    @property
    def expected_gain(self) -> float:
        """Of copying over executing, per seat; above 0 copying pays."""
        return self.reexecution - self.found_rate * (self.reward + self.penalty)

    @property
    def is_deterred(self) -> bool:
        return self.expected_gain <= 0

    def smallest_found_rate(self) -> float | None:
        """The share of copies found from which on copying never pays; None if even all are too few."""
        loss = self.reward + self.penalty
        if self.reexecution == 0:
            return 0.0
        return self.reexecution / loss if loss >= self.reexecution else None


def verifier_share_for(seats: float, check_share: float, cost_share: float) -> float:
    """The share of a sampled request's fee that pays its committee's costs.

    `seats`: members of one stage on average. `check_share`: a re-execution's cost over that of the generation it
    checks. `cost_share`: an executor's cost over its fee.
    """
    return seats * check_share * cost_share


def _ever(probability: float, times: int) -> float:
    """1 - (1 - probability)^times, without loss for small probabilities."""
    return 1.0 if probability >= 1 else -math.expm1(times * math.log1p(-probability))


def _smallest_share(is_enough: Callable[[float], bool]) -> float | None:
    """The smallest share in [0, 1] that is enough, where more is always enough too; None if 1 is not."""
    if not is_enough(1.0):
        return None
    if is_enough(0.0):
        return 0.0
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (low, middle) if is_enough(middle) else (middle, high)
    return high


def _smallest_unbounded(is_enough: Callable[[float], bool]) -> float:
    high = 1.0
    while not is_enough(high):
        high *= 2
        if high > 1e30:
            return math.inf
    share = _smallest_share(lambda part: is_enough(part * high))
    assert share is not None, "the upper end was enough"
    return share * high


def _require_share(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name} is {value}, expected 0 to 1")


def _require_amount(name: str, value: float) -> None:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name} is {value}, expected a finite amount of at least 0")
