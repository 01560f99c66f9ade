"""How often a coalition keeps its liar from being slashed, against its share of the stake.

Exactly, by summing over how many keys of either side are drawn into each round; and by simulation, with the draw that
nodes and contract use (`bsns.protocol.commitments.is_seated`). The rules are those of OutputVerification.sol: a round's
seats double; a vote weighs the stake that it was drawn from (`vote_weight`); a medoid needs two thirds of the revealed
votes and `minimum_reveals` reveals; in round 1 a single voice against it calls round 2; after round 3 without a quorum
the request is refunded and nobody is slashed; at most 16 members commit to a round.

The coalition stands behind an executor that cheats. It sees everything first: its members attest the liar's sketch
where that helps and keep their reveals back where that helps more. Honest nodes always sit, in time.
"""

from __future__ import annotations

import enum
import itertools
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path

import matplotlib
from scipy.stats import binom

from benchmarks.result import Figure
from benchmarks.verification_statistics import clopper_pearson
from bsns.chain.deployment import Terms
from bsns.protocol.commitments import MAXIMUM_ROUNDS, is_seated, next_round_seed, vote_weight
from bsns.protocol.identifiers import address, keccak256

matplotlib.use("Agg")
from matplotlib import pyplot as plt

MAXIMUM_MEMBERS = 16
WORKERS = 2
SHARES = (0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 1 / 3, 0.4, 0.45)
NODES = 100
# The more keys the others have, the fewer of them are drawn beside a large one.
LARGE_NETWORK = 1_000
LARGE_NETWORK_SHARES = (0.05, 0.2)


class Verdict(enum.Enum):
    """How the dispute over one cheated stage ends."""

    CONVICTED = "liar slashed"
    UNDECIDED = "nobody slashed, requester refunded"
    ACCEPTED = "false output paid"


class Coalition(enum.Enum):
    """How the coalition holds its stake, and whether it commits before honest members can."""

    EQUAL_KEYS = "keys as large as everybody's"
    ONE_KEY = "one key"
    FIRST_TO_COMMIT = "keys as large as everybody's, first to commit"


# Being first is decided by no draw.
SIMULATED = (Coalition.EQUAL_KEYS, Coalition.ONE_KEY)


@dataclass(frozen=True)
class Network:
    """`honest` keys of `honest_stake` each, `colluding` keys of `colluding_stake` each (wei)."""

    honest: int
    honest_stake: int
    colluding: int
    colluding_stake: int
    seats: int
    minimum_reveals: int
    first_to_commit: bool = False

    @property
    def total(self) -> int:
        return self.honest * self.honest_stake + self.colluding * self.colluding_stake

    def seated(self, round_: int, stake: int) -> float:
        """Probability that a key of `stake` is drawn in `round_` (see `is_seated`)."""
        return min(1.0, (self.seats << (round_ - 1)) * stake / self.total) if self.total else 0.0

    def vote(self, round_: int, stake: int) -> int:
        """What a seated key's vote weighs."""
        return vote_weight(round_, stake, self.total, self.seats)

    def committed(self, colluding: int, honest: int) -> tuple[int, int]:
        """How many of the drawn keys find room: the coalition all if it is first, else in proportion."""
        if colluding + honest <= MAXIMUM_MEMBERS:
            return colluding, honest
        if self.first_to_commit:
            first = min(colluding, MAXIMUM_MEMBERS)
            return first, MAXIMUM_MEMBERS - first
        kept = round(MAXIMUM_MEMBERS * colluding / (colluding + honest))
        return kept, MAXIMUM_MEMBERS - kept


def network(share: float, coalition: Coalition, seats: int, minimum_reveals: int, nodes: int = NODES) -> Network:
    """A network of `nodes` keys of one size, of which the coalition holds `share`; or, with one key, of as many honest
    keys as fill the rest.
    """
    colluding = round(share * nodes)
    honest, unit = nodes - colluding, 10**18
    if coalition is Coalition.ONE_KEY and colluding:
        return Network(honest, unit, 1, colluding * unit, seats, minimum_reveals)
    first = coalition is Coalition.FIRST_TO_COMMIT
    return Network(honest, unit, colluding, unit, seats, minimum_reveals, first)


def verdict_of_round(net: Network, round_: int, colluding: int, honest: int) -> Verdict | None:
    """What the best play of `colluding` members against `honest` ones leads to; None: another round."""
    colluding, honest = net.committed(colluding, honest)
    theirs, ours = colluding * net.vote(round_, net.colluding_stake), honest * net.vote(round_, net.honest_stake)
    if round_ == 1:
        # Any honest voice calls the backup committee, whose verdict alone slashes.
        return Verdict.ACCEPTED if honest == 0 and colluding >= net.minimum_reveals else None
    if theirs and theirs >= 2 * ours and colluding + honest >= net.minimum_reveals:
        return Verdict.ACCEPTED
    # Members that keep silent leave the honest all of the revealed votes, but not more reveals than they have.
    if honest >= net.minimum_reveals and ours >= 2 * theirs:
        return Verdict.CONVICTED
    return Verdict.UNDECIDED if round_ == MAXIMUM_ROUNDS else None


@cache
def exact(net: Network) -> dict[Verdict, float]:
    """The probability of each end of a dispute, given that a committee sits."""
    found, going = dict.fromkeys(Verdict, 0.0), 1.0
    for round_ in range(1, MAXIMUM_ROUNDS + 1):
        chances = [
            binom.pmf(range(count + 1), count, net.seated(round_, stake))
            for count, stake in ((net.colluding, net.colluding_stake), (net.honest, net.honest_stake))
        ]
        ended = dict.fromkeys(Verdict, 0.0)
        for (colluding, first), (honest, second) in itertools.product(*(enumerate(values) for values in chances)):
            verdict = verdict_of_round(net, round_, colluding, honest)
            if verdict is not None:
                ended[verdict] += float(first * second)
        for verdict, chance in ended.items():
            found[verdict] += going * chance
        going *= 1 - sum(ended.values())
    return found


def simulated(net: Network, disputes: int, seed: int) -> dict[Verdict, int]:
    """Counts of each end over `disputes` draws of the real rule."""
    generator = random.Random(seed)
    keys = [
        address(keccak256(b"node" + number.to_bytes(4, "big"))[12:]) for number in range(net.honest + net.colluding)
    ]
    found = dict.fromkeys(Verdict, 0)
    for _ in range(disputes):
        draw = generator.randbytes(32)
        for round_ in range(1, MAXIMUM_ROUNDS + 1):
            draw = draw if round_ == 1 else next_round_seed(draw, round_)
            drawn = [
                sum(is_seated(draw, round_, 0, key, stake, net.total, net.seats) for key in group)
                for group, stake in (
                    (keys[: net.colluding], net.colluding_stake),
                    (keys[net.colluding :], net.honest_stake),
                )
            ]
            verdict = verdict_of_round(net, round_, *drawn)
            if verdict is not None:
                found[verdict] += 1
                break
    return found


@dataclass(frozen=True)
class Point:
    share: float
    coalition: Coalition
    exact: dict[Verdict, float]
    counted: dict[Verdict, int] | None


def _point(case: tuple[float, Coalition, int, int]) -> Point:
    share, coalition, number, disputes = case
    terms = Terms().verification
    net = network(share, coalition, terms.committee_seats, terms.minimum_reveals)
    counted = simulated(net, disputes, number) if coalition in SIMULATED else None
    return Point(share, coalition, exact(net), counted)


def measure(disputes: int, report: Callable[[str], None]) -> list[Point]:
    """All shares and coalitions at the public terms."""
    cases = [(share, coalition, number, disputes) for coalition in Coalition for number, share in enumerate(SHARES)]
    report(f"capture: {len(cases)} coalitions among {NODES} nodes, {disputes} simulated disputes each")
    with ProcessPoolExecutor(WORKERS, get_context("spawn")) as workers:
        return list(workers.map(_point, cases))


def show(points: list[Point]) -> None:
    terms = Terms().verification
    print(
        f"\na cheated stage that is drawn, {terms.committee_seats} seats, {terms.minimum_reveals} reveals at least, "
        f"{NODES} nodes: probability by exact sum (simulated, with 95 % interval, that the liar is not slashed)"
    )
    print(f"{'coalition':48} {'stake':>6} {'paid':>10} {'undecided':>10} {'slashed':>9}   simulated")
    for point in points:
        chances = point.exact
        simulated_ = ""
        if point.counted is not None:
            total = sum(point.counted.values())
            escaped = total - point.counted[Verdict.CONVICTED]
            low, high = clopper_pearson(escaped, total)
            simulated_ = f"{escaped / total:.4f} ({low:.4f} to {high:.4f})"
        print(
            f"{point.coalition.value:48} {100 * point.share:5.1f}% {chances[Verdict.ACCEPTED]:10.2e} "
            f"{chances[Verdict.UNDECIDED]:10.2e} {chances[Verdict.CONVICTED]:9.4f}   {simulated_}"
        )


def figures(points: list[Point]) -> list[Figure]:
    found = []
    outside = checked = 0
    for point in points:
        escaped = 1 - point.exact[Verdict.CONVICTED]
        if point.counted is not None:
            total = sum(point.counted.values())
            # 20 intervals are looked at: each at a level at which all 20 hold with 95 %.
            low, high = clopper_pearson(total - point.counted[Verdict.CONVICTED], total, 1 - 0.05 / 20)
            checked += 1
            outside += not low - 1e-12 <= escaped <= high + 1e-12
        if round(100 * point.share) in (20, 33, 45):
            name = f"not slashed, coalition with {100 * point.share:.0f} % of the stake in {point.coalition.value}"
            note = f"of it paid {100 * point.exact[Verdict.ACCEPTED]:.3g} %"
            found.append(Figure(name, 100 * escaped, "% of drawn cheats", 100 * escaped, 100 * escaped, 1, None, note))
    for share in LARGE_NETWORK_SHARES:
        terms = Terms().verification
        net = network(share, Coalition.ONE_KEY, terms.committee_seats, terms.minimum_reveals, LARGE_NETWORK)
        chances = exact(net)
        escaped = 100 * (1 - chances[Verdict.CONVICTED])
        name = f"not slashed, coalition with {100 * share:g} % of the stake in one key, {LARGE_NETWORK} nodes"
        note = f"of it paid {100 * chances[Verdict.ACCEPTED]:.3g} %"
        found.append(Figure(name, escaped, "% of drawn cheats", escaped, escaped, 1, None, note))
    better, below = _better_in_one_key(points)
    note = "exact probability outside the simulation's interval (95 % for all together)"
    also = "in keys as large as everybody's the same stake is not slashed less often, and has less paid"
    return [
        Figure("exact sum and simulation disagree", outside, "points", 0, checked, checked, "== 0", note),
        Figure("coalitions below a third of the stake that one key serves better", better, "of the shares", 0, below,
               below, "== 0", also),
        *found,
    ]  # fmt: skip


def _better_in_one_key(points: list[Point]) -> tuple[int, int]:
    """At how many shares below a third the liar escapes or is paid more often behind one key than behind many, and of
    how many.
    """
    chances = {(point.share, point.coalition): point.exact for point in points}
    below = [share for share in SHARES if 0 < share < 1 / 3]
    better = 0
    for share in below:
        one, many = (chances[share, coalition] for coalition in (Coalition.ONE_KEY, Coalition.EQUAL_KEYS))
        paid = one[Verdict.ACCEPTED] > many[Verdict.ACCEPTED]
        better += paid or one[Verdict.CONVICTED] < many[Verdict.CONVICTED] - 1e-6
    return better, len(below)


def draw_picture(points: list[Point], path: Path) -> None:
    picture, axis = plt.subplots(figsize=(7.5, 4.5), layout="constrained")
    for coalition, colour in zip(Coalition, ("#1b6ca8", "#d1622b", "#3a9d5d"), strict=True):
        mine = [point for point in points if point.coalition is coalition]
        shares = [100 * point.share for point in mine]
        escaped = [1 - point.exact[Verdict.CONVICTED] for point in mine]
        axis.plot(shares, escaped, color=colour, label=coalition.value)
        paid = [point.exact[Verdict.ACCEPTED] for point in mine]
        axis.plot(shares, paid, color=colour, linestyle="--", linewidth=1)
        simulated_ = [(100 * point.share, point.counted) for point in mine if point.counted is not None]
        for x, y, low, high in _intervals(simulated_, 0.3 * (coalition is Coalition.ONE_KEY)):
            axis.plot([x, x], [low, high], color=colour, linewidth=1, alpha=0.6)
            axis.plot([x], [y], "o", color=colour, markersize=4)
    axis.set_yscale("log")
    axis.set_ylim(1e-5, 1.3)
    axis.set_xlabel("stake of the coalition, % of all")
    axis.set_ylabel("probability, of cheats that are drawn")
    axis.grid(alpha=0.3)
    axis.set_title("solid: not slashed, dashed: false output paid; points: simulated, with 95 % interval", fontsize=9)
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False)
    picture.savefig(path, dpi=130)
    plt.close(picture)


def _intervals(
    points: list[tuple[float, dict[Verdict, int]]], shift: float
) -> Iterator[tuple[float, float, float, float]]:
    for share, counted in points:
        total = sum(counted.values())
        escaped = total - counted[Verdict.CONVICTED]
        low, high = clopper_pearson(escaped, total)
        # Side by side, not on top of one another.
        yield share + shift, max(escaped / total, 1e-9), max(low, 1e-9), high
