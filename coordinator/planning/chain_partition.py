"""Cuts a chain of shard units into stages over nodes in a given order, exactly.

Owns the dynamic programme for the sequential case (paper §1.4, one chain): among all ways to give contiguous runs of
units to the nodes in their order, the one whose slowest stage is fastest, then the one with the least total time,
then the one whose earlier stages end first. Memory is a hard limit. Promises the optimum for that order, and equal
plans for equal inputs. Does not choose the order of nodes, does not count links, does not cut graphs: those are other
planners over the same inputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Final

from bsns.protocol.plan import MAXIMUM_ASSIGNMENTS, MAXIMUM_STAGES, Assignment, ShardPlan
from coordinator.planning.costs import NodeCapability, PlanningError, UnitCost

_MAXIMUM_WORK_WEIGHT: Final = 2**64 - 1


@dataclass(frozen=True, slots=True)
class PlannedStage:
    """One stage: the units [first_unit, end_unit) on every one of `nodes`; nanoseconds of its slowest replica."""

    first_unit: int
    end_unit: int
    nodes: tuple[NodeCapability, ...]
    nanoseconds: int
    work: int


@dataclass(frozen=True, slots=True)
class ChainPartition:
    """The stages in order. `unused` nodes serve nothing in this plan."""

    stages: tuple[PlannedStage, ...]
    unused: tuple[NodeCapability, ...]

    @property
    def bottleneck_nanoseconds(self) -> int:
        """Time of the slowest stage: what bounds the pipeline's throughput."""
        return max(stage.nanoseconds for stage in self.stages)

    @property
    def total_nanoseconds(self) -> int:
        """Sum over stages: what bounds one token's latency, without links."""
        return sum(stage.nanoseconds for stage in self.stages)


@dataclass(frozen=True, slots=True)
class _Position:
    """A place in the order: replicas that serve the same units. Prefix sums over the units; memory of the smallest."""

    nodes: tuple[NodeCapability, ...]
    times: tuple[tuple[int, ...], ...]
    memory_bytes: int

    def nanoseconds(self, first: int, end: int) -> int:
        return max(prefix[end] - prefix[first] for prefix in self.times)


def plan_chain(
    units: Sequence[UnitCost], nodes: Sequence[NodeCapability], *, stage_count: int | None = None, replicas: int = 1
) -> ChainPartition:
    """Cut `units` over `nodes` in the order given; O(positions · stages · units²).

    Consecutive nodes form positions of `replicas`; a remainder stays unused. Without `stage_count` every position
    serves a stage (as far as there are units, and MAXIMUM_STAGES); with fewer stages than positions the best ones are
    kept and the others stay unused. Raises PlanningError, which names the unit or node in the way.
    """
    _require_inputs(units, nodes, replicas)
    usable = len(nodes) // replicas
    stages = min(usable, len(units), MAXIMUM_STAGES) if stage_count is None else stage_count
    if not 1 <= stages <= min(len(units), MAXIMUM_STAGES):
        raise PlanningError(
            f"{stages} stages are not possible: the model has {len(units)} units, "
            f"a plan at most {MAXIMUM_STAGES} stages"
        )
    if stages > usable:
        raise PlanningError(
            f"{stages} stages with {replicas} replicas need {stages * replicas} nodes, {len(nodes)} are there"
        )
    if stages * replicas > MAXIMUM_ASSIGNMENTS:
        raise PlanningError(f"{stages} stages with {replicas} replicas exceed {MAXIMUM_ASSIGNMENTS} assignments")
    positions = [_position(units, nodes[i * replicas : (i + 1) * replicas]) for i in range(usable)]
    memory = list(accumulate((unit.parameter_bytes + unit.cache_bytes for unit in units), initial=0))
    # Two passes: lexicographic (max, sum) has no optimal substructure, but the least sum under a fixed maximum has.
    bottleneck, _ = _search(positions, memory, len(units), stages, limit=None)
    _, cuts = _search(positions, memory, len(units), stages, limit=bottleneck)
    if cuts is None:
        raise _infeasible(units, positions, memory, stages)
    used = {index for index, _, _ in cuts}
    return ChainPartition(
        stages=tuple(
            PlannedStage(
                first_unit=first,
                end_unit=end,
                nodes=positions[index].nodes,
                nanoseconds=positions[index].nanoseconds(first, end),
                work=sum(unit.work for unit in units[first:end]),
            )
            for index, first, end in cuts
        ),
        unused=tuple(node for i, position in enumerate(positions) if i not in used for node in position.nodes)
        + tuple(nodes[usable * replicas :]),
    )


def to_shard_plan(partition: ChainPartition) -> ShardPlan:
    """The plan as it goes on chain. Work weights are the declared costs; a stage without declared work counts as 1."""
    assignments = tuple(
        Assignment(
            stage=number,
            replica=replica,
            first_unit=stage.first_unit,
            end_unit=stage.end_unit,
            node=node.node,
            work_weight=min(max(stage.work, 1), _MAXIMUM_WORK_WEIGHT),
            execution_class=node.execution_class,
        )
        for number, stage in enumerate(partition.stages)
        for replica, node in enumerate(stage.nodes)
    )
    return ShardPlan(partition.stages[-1].end_unit, assignments)


_Cuts = list[tuple[int, int, int]]


def _search(
    positions: Sequence[_Position], memory: Sequence[int], unit_count: int, stage_count: int, *, limit: int | None
) -> tuple[int | None, _Cuts | None]:
    """Best cost and cuts (position, first, end) of exactly `stage_count` stages; None where there is no way.

    Without `limit` the cost is the slowest stage, with it the sum of stages none of which is slower than `limit`.
    """
    # best[s][u]: least cost of the first u units in s stages over the positions seen so far; chosen holds how.
    best: list[list[int | None]] = [[None] * (unit_count + 1) for _ in range(stage_count + 1)]
    best[0][0] = 0
    chosen: list[list[tuple[int, int] | None]] = [[None] * (unit_count + 1) for _ in range(stage_count + 1)]
    history: list[list[list[tuple[int, int] | None]]] = []
    for index, position in enumerate(positions):
        # From many stages to few, so that best[s - 1] is still without this position: it serves one stage at most.
        for stages in range(min(stage_count, index + 1), 0, -1):
            # Exactly stage_count are wanted: states that the remaining positions cannot complete are skipped.
            if stage_count - stages > len(positions) - index - 1:
                continue
            for end in range(stages, unit_count - (stage_count - stages) + 1):
                for first in range(end - 1, stages - 2, -1):
                    if memory[end] - memory[first] > position.memory_bytes:
                        break
                    before = best[stages - 1][first]
                    time = position.nanoseconds(first, end)
                    if limit is not None and time > limit:
                        break
                    if before is None:
                        continue
                    cost = max(before, time) if limit is None else before + time
                    known = best[stages][end]
                    # `<=` while `first` falls prefers the earlier cut among equals of this position.
                    if (
                        known is None
                        or cost < known
                        or (cost == known and (chosen[stages][end] or (-1, 0))[0] == index)
                    ):
                        best[stages][end] = cost
                        chosen[stages][end] = (index, first)
        history.append([list(row) for row in chosen])
    least = best[stage_count][unit_count]
    if least is None:
        return None, None
    cuts: _Cuts = []
    end, last = unit_count, len(positions) - 1
    for stages in range(stage_count, 0, -1):
        step = history[last][stages][end]
        if step is None:
            raise PlanningError("the plan's own table is inconsistent: please report the inputs")
        index, first = step
        cuts.append((index, first, end))
        end, last = first, index - 1
    return least, cuts[::-1]


def _position(units: Sequence[UnitCost], nodes: Sequence[NodeCapability]) -> _Position:
    times = tuple(tuple(accumulate((node.time_of(unit) for unit in units), initial=0)) for node in nodes)
    return _Position(tuple(nodes), times, min(node.memory_bytes for node in nodes))


def _require_inputs(units: Sequence[UnitCost], nodes: Sequence[NodeCapability], replicas: int) -> None:
    if not units:
        raise PlanningError("the model has no units")
    if replicas < 1:
        raise PlanningError(f"replicas must be at least 1, got {replicas}")
    if len(nodes) < replicas:
        raise PlanningError(f"{replicas} replicas need at least as many nodes, {len(nodes)} are there")
    for expected, unit in enumerate(units):
        if unit.index != expected:
            raise PlanningError(f"unit {expected} has index {unit.index}: units come in order from 0")
        if min(unit.work, unit.parameter_bytes, unit.cache_bytes, unit.output_bytes) < 0:
            raise PlanningError(f"unit {unit.index} ({unit.name}) has a negative cost")
    seen: set[str] = set()
    for node in nodes:
        if node.node in seen:
            raise PlanningError(f"node {node.node} is given twice")
        seen.add(node.node)
        for kind, time in node.decode_nanoseconds.items():
            if time < 0:
                raise PlanningError(f"node {node.node} measured {time} ns for units of kind {kind!r}")


def _infeasible(
    units: Sequence[UnitCost], positions: Sequence[_Position], memory: Sequence[int], stages: int
) -> PlanningError:
    largest = max(position.memory_bytes for position in positions)
    for unit in units:
        need = unit.parameter_bytes + unit.cache_bytes
        if need > largest:
            return PlanningError(
                f"unit {unit.index} ({unit.name}) needs {need} bytes, the largest node has {largest}: "
                "attach a larger node"
            )
    if stages == len(positions):
        smallest = min(unit.parameter_bytes + unit.cache_bytes for unit in units)
        for position in positions:
            if position.memory_bytes < smallest:
                return PlanningError(
                    f"node {position.nodes[0].node} has {position.memory_bytes} bytes, "
                    "too few for any unit: leave it out"
                )
    return PlanningError(
        f"{memory[-1]} bytes of units do not fit in {stages} of these nodes in this order "
        f"({sum(position.memory_bytes for position in positions)} bytes together): attach more or larger nodes"
    )
