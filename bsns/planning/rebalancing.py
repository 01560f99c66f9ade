"""What becomes of a plan when nodes come, go or change speed: stay, move a part, or plan afresh (paper §1.6).

Owns which change is worth its cost. Promises integers and fractions throughout, so that who has the plan in force and
the measurements that it was judged by comes to the same decision; that a plan which serves is left only for one that
gives enough more tokens within the horizon, its cost included; and that a stage without a node is always repaired if it
can be. Has no clock: how long to wait before the next decision is the caller's.

The cost. Sessions in flight end on the plan they began on, with their caches, and nodes load what is new to them before
they consent; so a change costs the time until its largest load is there. Until then the old plan serves, at half its
rate if a node that serves must load, because reading and checking weights takes what its steps need. With a horizon H,
a load of L seconds and times v for one row, in tokens:

    stay = H / v_old        change = [1/2] L / v_old + (H - L) / v_new

A change is worth it where change >= stay * (1 + minimum gain).
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Final

from eth_typing import ChecksumAddress

from bsns.planning import partition
from bsns.planning.chain import Chain
from bsns.planning.exact_chain import Stages
from bsns.planning.problem import SECOND_NS, Objective, Partition, PlanningError, Problem, evaluate
from bsns.planning.replica_search import ReplicaSearch, join_idle
from bsns.protocol.measurements import NodeMeasurements
from bsns.protocol.plan import ShardPlan

_BASIS_POINTS: Final = 10_000
_NEARBY_MOVES: Final = 2_000
"""Moves that are tried from the plan in force, none of which may make it worse."""


class Trigger(enum.StrEnum):
    """Why a plan is looked at again."""

    UNCOVERED = "uncovered"  # a stage has no node left
    MEMBERSHIP = "membership"  # a node has come or gone
    DRIFT = "drift"  # a node's times or links are no longer what the plan was made with


class Change(enum.StrEnum):
    """How far a decision goes, the least first."""

    STAY = "stay"
    JOIN = "join"  # idle nodes become replicas; nobody who serves loads anything
    NEARBY = "nearby"  # a few nodes or units change stages
    AFRESH = "afresh"  # a plan as if there were none


@dataclass(frozen=True, slots=True)
class MoveTerms:
    """`horizon_seconds`: how long a change must serve to have been worth it. `load_bytes_per_second`: at which nodes
    load and check weights. `minimum_gain_bps`: tokens that it must give beyond staying, in hundredths of a per cent;
    `minimum_drift_gain_bps` where nothing but measured times has changed, which are noisy.
    """

    horizon_seconds: int = 600
    load_bytes_per_second: int = 50_000_000
    minimum_gain_bps: int = 500
    minimum_drift_gain_bps: int = 1_500


@dataclass(frozen=True, slots=True)
class Decision:
    """What was decided. `partition` is the plan to have: the one in force as far as its nodes are there for STAY.

    `before_ns` is what one row takes on the plan in force, None where a stage of it has no node. `load_bytes` is the
    most that one node must load, `moved_bytes` what all load together.
    """

    trigger: Trigger
    change: Change
    partition: Partition
    before_ns: int | None
    load_bytes: int
    moved_bytes: int

    @property
    def gain(self) -> Fraction:
        """Rate after the change over the rate before, less 1; 0 for a plan that did not serve."""
        return Fraction(0) if self.before_ns is None else Fraction(self.before_ns, self.partition.value_ns) - 1


@dataclass(frozen=True, slots=True)
class _Candidate:
    change: Change
    partition: Partition
    tokens: Fraction
    load_bytes: int
    moved_bytes: int


def rebalance(previous: ShardPlan, problem: Problem, terms: MoveTerms, *, seed: int = 0) -> Decision:
    """The decision about `previous`, the plan in force, for the nodes that are there now with what they measured.

    Nodes of the plan that `problem` does not have are gone. PlanningError if a stage has no node left and no plan at
    all is possible.
    """
    return _Rebalancing(previous, problem, terms, seed).decide()


def drifted(
    planned: Iterable[NodeMeasurements], current: Mapping[ChecksumAddress, NodeMeasurements], drift_bps: int
) -> tuple[ChecksumAddress, ...]:
    """Nodes of `planned` whose times are now off by more than `drift_bps`, either way (paper §1.6: theta)."""
    return tuple(
        then.node
        for then in planned
        if (now := current.get(then.node)) is not None and _differs(row_ns(then), row_ns(now), drift_bps)
    )


def row_ns(measurements: NodeMeasurements) -> int:
    """Nanoseconds of one row in one unit of each kind, together: the speed of a node as one number."""
    return sum(item.decode_nanoseconds for item in measurements.unit_timings)


def _differs(then: int, now: int, drift_bps: int) -> bool:
    low, high = sorted((then, now))
    return high * _BASIS_POINTS > low * (_BASIS_POINTS + drift_bps)


class _Rebalancing:
    def __init__(self, previous: ShardPlan, problem: Problem, terms: MoveTerms, seed: int) -> None:
        if previous.unit_count != len(problem.graph.operators):
            raise PlanningError(
                f"the plan in force has {previous.unit_count} units, the model {len(problem.graph.operators)}"
            )
        self._problem, self._terms, self._seed = problem, terms, seed
        self._chain = Chain(problem)
        self._number = {node.node: index for index, node in enumerate(problem.nodes)}
        self._held = {
            self._number[item.node]: range(item.first_unit, item.end_unit)
            for item in previous.assignments
            if item.node in self._number
        }
        self._stages: Stages = [
            (
                items[0].first_unit,
                items[0].end_unit,
                tuple(self._number[item.node] for item in items if item.node in self._number),
            )
            for items in (previous.replicas(stage) for stage in range(previous.stage_count))
        ]
        self._everybody_is_there = len(self._held) == len(previous.assignments) == len(problem.nodes)

    def decide(self) -> Decision:
        stays = self._evaluated(self._stages) if all(nodes for _, _, nodes in self._stages) else None
        horizon = self._terms.horizon_seconds * SECOND_NS
        before = None if stays is None else stays.value_ns
        candidates = list(self._candidates(before, stays is not None))
        if stays is None:
            if not candidates:
                raise self._problem.infeasible()
            trigger, least = Trigger.UNCOVERED, Fraction(0)
        else:
            trigger = Trigger.DRIFT if self._everybody_is_there else Trigger.MEMBERSHIP
            staying = Fraction(horizon, max(stays.value_ns, 1))
            drift = self._terms.minimum_drift_gain_bps if trigger is Trigger.DRIFT else 0
            least = staying * (_BASIS_POINTS + max(self._terms.minimum_gain_bps, drift)) / _BASIS_POINTS
        # Of equal candidates the first, which changes least.
        best = max(candidates, key=lambda item: item.tokens, default=None)
        if best is not None and (stays is None or best.tokens >= least):
            return Decision(trigger, best.change, best.partition, before, best.load_bytes, best.moved_bytes)
        assert stays is not None
        return Decision(trigger, Change.STAY, stays, before, 0, 0)

    def _candidates(self, before: int | None, serves: bool) -> Iterable[_Candidate]:
        start = self._stages if serves else self._repaired()
        if start is not None:
            grown = join_idle(self._chain, start, _never) if self._problem.terms.spread_leftover else start
            yield from self._candidate(Change.JOIN if serves else Change.NEARBY, grown, before)
            if self._problem.objective is Objective.THROUGHPUT:
                search = ReplicaSearch(self._chain, seed=self._seed, tick=_never)
                nearby = search.improve(grown, proposals=_NEARBY_MOVES, warmth=0.0)
                yield from self._candidate(Change.NEARBY, nearby, before)
        problem = self._problem
        try:
            fresh = partition(
                problem.graph, problem.nodes, problem.links, problem.objective, terms=problem.terms, seed=self._seed
            )
        except PlanningError:
            return
        stages = [
            (stage.first, stage.end, tuple(self._number[node.node] for node in stage.nodes)) for stage in fresh.stages
        ]
        yield self._priced(Change.AFRESH, stages, fresh, before)

    def _repaired(self) -> Stages | None:
        """The stages with a node in each: an idle one, else one of the stage with most replicas. None if none fits."""
        stages = list(self._stages)
        for number, (first, end, nodes) in enumerate(stages):
            if nodes:
                continue
            used = {node for _, _, members in stages for node in members}
            fitting = [node for node in range(self._chain.nodes) if self._chain.reach[node, first] >= end]
            spare = {
                node: len(members)
                for _, _, members in stages
                if len(members) > self._problem.terms.replicas
                for node in members
            }
            able = [node for node in fitting if node not in used or node in spare]
            if not able:
                return None
            time = self._chain.prefix[:, end] - self._chain.prefix[:, first]
            chosen = min(able, key=lambda node: (node in used, -spare.get(node, 0), int(time[node])))
            stages = [(low, high, tuple(node for node in members if node != chosen)) for low, high, members in stages]
            stages[number] = (first, end, (chosen,))
        return stages if self._evaluated(stages) is not None else None

    def _candidate(self, change: Change, stages: Stages, before: int | None) -> Iterable[_Candidate]:
        found = self._evaluated(stages)
        if found is not None:
            yield self._priced(change, stages, found, before)

    def _priced(self, change: Change, stages: Stages, found: Partition, before: int | None) -> _Candidate:
        """A candidate with what it must load and the tokens of the horizon."""
        loads = {
            node: size
            for first, end, nodes in stages
            for node in nodes
            if (size := self._new_bytes(self._held.get(node, range(0)), range(first, end)))
        }
        largest = max(loads.values(), default=0)
        horizon = self._terms.horizon_seconds * SECOND_NS
        loading = min(-(-largest * SECOND_NS // self._terms.load_bytes_per_second), horizon)
        tokens = Fraction(horizon - loading, max(found.value_ns, 1))
        if before is not None:
            meanwhile = Fraction(loading, max(before, 1))
            tokens += meanwhile / 2 if any(node in self._held for node in loads) else meanwhile
        return _Candidate(change, found, tokens, largest, sum(loads.values()))

    def _new_bytes(self, held: range, units: range) -> int:
        graph = self._problem.graph
        has = {item for unit in held for item in graph.operators[unit].parameters}
        needs = {item for unit in units for item in graph.operators[unit].parameters}
        return sum(graph.parameters[item].size_bytes for item in needs - has)

    def _evaluated(self, stages: Stages) -> Partition | None:
        problem = self._problem
        lacking = any(len(nodes) < problem.terms.replicas for _, _, nodes in stages)
        if lacking and problem.terms.replicas > 1:
            # Fewer replicas than a plan should have still serve: they are judged as they are.
            problem = _with_replicas(problem, min(len(nodes) for _, _, nodes in stages))
        try:
            return evaluate(
                problem,
                range(len(problem.graph.operators)),
                [(first, end, tuple(problem.nodes[node] for node in nodes)) for first, end, nodes in stages],
                lower_bound_ns=0,
                bound="none",
                solver="rebalancing",
            )
        except PlanningError:
            return None


def _with_replicas(problem: Problem, replicas: int) -> Problem:
    return replace(problem, terms=replace(problem.terms, replicas=max(replicas, 1)))


def _never() -> bool:
    return False
