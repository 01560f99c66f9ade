"""Local search over stages with replicas: which nodes share a stage, and where the cuts are.

Owns the moves that change one or two stages at a time: a node to another stage, two nodes exchanged, units over a cut
to the neighbour, a stage split in two, two made one. Promises stages no slower than those it was given, the same ones
for the same seed on any machine, and `PROPOSALS` moves tried at most. Does not take nodes that stream weights from host
memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from bsns.planning.chain import Chain
from bsns.planning.exact_chain import Stages
from bsns.planning.problem import Partition, PlanningError, Problem, evaluate

PROPOSALS: Final = 24_000
_PROPOSALS_A_PLACE: Final = 40
"""Moves tried for each pair of a node and a unit, up to `PROPOSALS`."""
WARMTH: Final = 0.3
_DRAWS: Final = 4_096
# Shares of the kinds of moves: a node moves, two are exchanged, a cut shifts; the rest splits and joins stages.
_MOVE, _EXCHANGE, _SHIFT = 0.40, 0.66, 0.94

_OFFERED: Final = 4
"""Stages that an idle node is offered to, the slowest first."""
_REFUSED: Final = 64
"""Nodes in a row that no stage took: the slower ones behind them are not offered any more."""


def value_of(problem: Problem, stages: Stages) -> int:
    """The objective's value of `stages`, in nanoseconds; PlanningError if they are no partition."""
    return _evaluate(problem, stages).value_ns


def join_idle(chain: Chain, stages: Stages, tick: Callable[[], bool]) -> Stages:
    """`stages` with nodes that have none in one of the slowest, the fastest node first, where that makes nothing worse.

    PlanningError if `stages` are no partition.
    """
    problem = chain.problem
    used = {node for _, _, nodes in stages for node in nodes}
    idle = [int(node) for node in np.argsort(chain.prefix[:, -1], kind="stable") if int(node) not in used]
    found = _evaluate(problem, stages)
    refused = 0
    for node in idle:
        if len(used) == problem.terms.maximum_assignments or refused == _REFUSED or tick():
            break
        refused += 1
        effective = [stage.effective_ns for stage in found.stages]
        for number in sorted(range(len(stages)), key=lambda item: -effective[item])[:_OFFERED]:
            first, end, nodes = stages[number]
            joined = [*stages[:number], (first, end, (*nodes, node)), *stages[number + 1 :]]
            try:
                larger = _evaluate(problem, joined)
            except PlanningError:
                continue
            if larger.value_ns <= found.value_ns:
                stages, found = joined, larger
                used.add(node)
                refused = 0
                break
    return stages


def _evaluate(problem: Problem, stages: Stages) -> Partition:
    return evaluate(
        problem,
        range(len(problem.graph.operators)),
        [(first, end, tuple(problem.nodes[node] for node in nodes)) for first, end, nodes in stages],
        lower_bound_ns=0,
        bound="",
        solver="",
    )


class ReplicaSearch:
    """One search over the tables of `chain`; `tick` says whether time is up."""

    def __init__(self, chain: Chain, *, seed: int, tick: Callable[[], bool]) -> None:
        terms = chain.problem.terms
        self._units, self._nodes = chain.units, chain.nodes
        self._replicas, self._stage_count = terms.replicas, terms.stage_count
        self._stages, self._assignments = chain.problem.maximum_stages, terms.maximum_assignments
        self._prefix: list[list[int]] = chain.prefix.tolist()
        self._reach: list[list[int]] = chain.reach.tolist()
        self._hop, self._even_hop = chain.usual_hops, chain.even_hop
        self._random = np.random.RandomState(seed)  # its stream is frozen, so plans stay reproducible
        self._tick = tick
        self._streams = bool(chain.host.any())

    def improve(self, stages: Stages, *, proposals: int = PROPOSALS, warmth: float = WARMTH) -> Stages:
        """Stages whose slowest is no slower than that of `stages`, as far as this search's transfers say: after
        `proposals` moves at the most. A move may worsen the energy by the part `warmth` at first, not at the end.
        """
        if self._streams or self._nodes < 2:
            return stages
        self._cuts = [first for first, _, _ in stages] + [self._units]
        self._members = [list(nodes) for _, _, nodes in stages]
        used = {node for members in self._members for node in members}
        self._idle = [node for node in range(self._nodes) if node not in used]
        self._between = [self._transfer(stage) for stage in range(len(stages) - 1)]
        self._reference = max(self._times())
        self._powers = [self._power(time) for time in self._times()]
        best = self._snapshot()
        energy = sum(self._powers)
        slowest = max(self._powers)
        proposals = min(proposals, _PROPOSALS_A_PLACE * self._nodes * self._units)
        draws = self._random.random_sample((_DRAWS, 5))
        for number in range(proposals):
            place = number % _DRAWS
            if place == 0 and number:
                if self._tick():
                    break
                draws = self._random.random_sample((_DRAWS, 5))
            before = (self._cuts, self._members, self._idle, self._between, self._powers)
            if not self._propose(draws[place].tolist()):
                continue
            changed = sum(self._powers)
            if changed <= energy * (1 + warmth * (1 - number / proposals)):
                energy = changed
                if (peak := max(self._powers)) < slowest:
                    slowest, best = peak, self._snapshot()
            else:
                self._cuts, self._members, self._idle, self._between, self._powers = before
        return best

    # ----------------------------------------------------------------------------------------------------- inside

    def _snapshot(self) -> Stages:
        return [
            (first, end, tuple(members))
            for first, end, members in zip(self._cuts[:-1], self._cuts[1:], self._members, strict=True)
        ]

    def _times(self) -> list[float]:
        return [self._time(stage) for stage in range(len(self._members))]

    def _time(self, stage: int) -> float:
        """What the stage counts: 1 / (sum over its replicas of 1 / (transfers + compute))."""
        first, end = self._cuts[stage], self._cuts[stage + 1]
        transfer = (self._between[stage - 1] if stage else 0) + (
            self._between[stage] if stage < len(self._between) else 0
        )
        rate = 0.0
        for node in self._members[stage]:
            prefix = self._prefix[node]
            rate += 1.0 / max(prefix[end] - prefix[first] + transfer, 1)
        return 1.0 / rate

    def _transfer(self, stage: int) -> int:
        """Between `stage` and the next one, over the slowest pair."""
        if self._even_hop is not None:
            return self._even_hop
        return int(self._hop[self._members[stage]][:, self._members[stage + 1]].max())

    def _power(self, time: float) -> float:
        """The eighth power of a time over the reference: the slowest stages decide a sum of them."""
        share = time / self._reference
        square = share * share
        fourth = square * square
        return fourth * fourth

    def _fits(self, node: int, first: int, end: int) -> bool:
        return self._reach[node][first] >= end

    def _propose(self, draw: list[float]) -> bool:
        """Make one move on copies of what it changes. False, with nothing changed, if it is not possible."""
        kind, where, what, how, other = draw
        count = len(self._members)
        if where < 0.5:  # every other move is about the slowest stage
            target = max(range(count), key=self._powers.__getitem__)
        else:
            target = int((2 * where - 1) * count)
        if kind < _MOVE:
            return self._move(target, what, how)
        if kind < _EXCHANGE:
            return self._exchange(target, what, how)
        if kind < _SHIFT:
            return self._shift(target, what < 0.5, how, other)
        if self._stage_count is not None:
            return False
        return self._split(target, what) if how < 0.5 else self._join(target, what < 0.5)

    def _move(self, target: int, what: float, how: float) -> bool:
        """A node of another stage, or an idle one, joins the target."""
        first, end = self._cuts[target], self._cuts[target + 1]
        members = [list(item) for item in self._members]
        idle = list(self._idle)
        if idle and how < 0.5:
            if sum(map(len, members)) >= self._assignments:
                return False
            place = int(what * len(idle))
            node = idle[place]
            if not self._fits(node, first, end):
                return False
            del idle[place]
            source = target
        else:
            source = int(how * len(members))
            if source == target or len(members[source]) <= self._replicas:
                return False
            place = int(what * len(members[source]))
            node = members[source][place]
            if not self._fits(node, first, end):
                return False
            del members[source][place]
        members[target].append(node)
        self._members, self._idle = members, idle
        return self._settle({source, target})

    def _exchange(self, target: int, what: float, how: float) -> bool:
        """A node of the target and one of another stage change places."""
        other = int(how * len(self._members))
        if other == target:
            return False
        mine = int(what * len(self._members[target]))
        spread = how * len(self._members) - other  # the rest of the draw is another draw
        theirs = int(spread * len(self._members[other]))
        one, two = self._members[target][mine], self._members[other][theirs]
        if not self._fits(one, self._cuts[other], self._cuts[other + 1]):
            return False
        if not self._fits(two, self._cuts[target], self._cuts[target + 1]):
            return False
        members = list(self._members)
        members[target], members[other] = list(members[target]), list(members[other])
        members[target][mine], members[other][theirs] = two, one
        self._members = members
        return self._settle({target, other})

    def _shift(self, target: int, left: bool, how: float, direction: float) -> bool:
        """Units cross one of the target's cuts; nodes that the longer stage is too long for become idle."""
        cut = target if left else target + 1
        if not 0 < cut < len(self._members):
            return False
        # Mostly away from the target, which is often the slowest.
        away = direction < 0.75
        giver = (cut if left else cut - 1) if away else (cut - 1 if left else cut)
        length = self._cuts[giver + 1] - self._cuts[giver]
        amount = 1 + int(how * how * (length // 2))
        if amount >= length:
            return False
        cuts = list(self._cuts)
        cuts[cut] += amount if giver == cut else -amount
        taker = cut - 1 if giver == cut else cut
        kept = [node for node in self._members[taker] if self._fits(node, cuts[taker], cuts[taker + 1])]
        if len(kept) < self._replicas:
            return False
        members = list(self._members)
        gone = [node for node in members[taker] if node not in kept]
        members[taker] = kept
        self._cuts, self._members, self._idle = cuts, members, self._idle + gone
        return self._settle({giver, taker})

    def _split(self, target: int, what: float) -> bool:
        """The target's units and nodes become two stages."""
        first, end = self._cuts[target], self._cuts[target + 1]
        nodes = self._members[target]
        if end - first < 2 or len(nodes) < 2 * self._replicas or len(self._members) >= self._stages:
            return False
        cut = first + 1 + int(what * (end - first - 1))
        share = (cut - first) / (end - first)
        ordered = sorted(nodes, key=lambda node: self._prefix[node][end] - self._prefix[node][first])
        one: list[int] = []
        two: list[int] = []
        for node in ordered:  # the fastest first, to the one that has less of what it should have
            (one if len(one) * (1 - share) <= len(two) * share else two).append(node)
        if min(len(one), len(two)) < self._replicas:
            return False
        members = list(self._members)
        members[target : target + 1] = [one, two]
        self._cuts = [*self._cuts[: target + 1], cut, *self._cuts[target + 1 :]]
        self._members = members
        return self._settle(None)

    def _join(self, target: int, left: bool) -> bool:
        """The target and a neighbour become one stage, of those nodes that hold it all."""
        first = target - 1 if left else target
        if not 0 <= first < len(self._members) - 1:
            return False
        start, end = self._cuts[first], self._cuts[first + 2]
        nodes = self._members[first] + self._members[first + 1]
        kept = [node for node in nodes if self._fits(node, start, end)]
        if len(kept) < self._replicas:
            return False
        members = list(self._members)
        members[first : first + 2] = [kept]
        self._cuts = self._cuts[: first + 1] + self._cuts[first + 2 :]
        self._members, self._idle = members, self._idle + [node for node in nodes if node not in kept]
        return self._settle(None)

    def _settle(self, stages: set[int] | None) -> bool:
        """Recompute what the stages cost whose nodes or cuts changed, and their neighbours where transfers differ."""
        last = len(self._members) - 1
        if stages is None:
            self._between = [self._transfer(stage) for stage in range(last)]
            self._powers = [self._power(time) for time in self._times()]
            return True
        if self._even_hop is None:
            between = list(self._between)
            for place in {at for stage in stages for at in (stage - 1, stage) if 0 <= at < last}:
                found = self._transfer(place)
                if found != between[place]:
                    between[place] = found
                    stages = stages | {place, place + 1}
            self._between = between
        powers = list(self._powers)
        for stage in stages:
            powers[stage] = self._power(self._time(stage))
        self._powers = powers
        return True
