"""144 random swarms under two rules: Petals' choice of blocks, and our plans. Pure simulation, seeded.

A swarm is a model of equal blocks and nodes that come one after another; a node has room for so many blocks, and a
speed in blocks a second. Petals' nodes always hold as many blocks as they have room for, each with the throughput that
they announce; a node of ours holds its stage's blocks. The measure for both: the smallest throughput of a block, which
is what the swarm serves, over the fluid bound (all speeds together over the blocks), which no placement exceeds.

Petals' rule is that of its paper's code as `block_selection.py` states it: a joining server takes the span whose sorted
throughputs are lexicographically smallest; a server moves where a simulation of everybody's moves raises the smallest
throughput by a third.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from bsns.planning import FREE_LINKS, PlanningError, PlanningNode, Problem, Terms, partition
from bsns.planning.rebalancing import Change, MoveTerms, rebalance
from bsns.protocol.identifiers import address
from bsns.protocol.model_graph import MODEL_INPUT, ModelGraph, Operator, Parameter, Tensor
from bsns.protocol.plan import ShardPlan

BLOCKS: Final = (24, 48, 80)
NODES: Final = (8, 16, 32)
ROOMS: Final = (1.5, 2.0, 3.0, 5.0)
"""Room of all nodes together, in models."""
SEEDS: Final = 4
SPREAD_OF_SPEED, SPREAD_OF_ROOM = 8.0, 4.0
CHURN: Final = 0.3
BLOCK_BYTES: Final = 200_000_000
JOINS_BETWEEN_JUDGEMENTS: Final = 4
"""A node every 30 seconds, and the default of two minutes between two judgements."""
_SECOND_NS: Final = 1_000_000_000
# Petals' constants.
_QUALITY, _EPSILON = 0.75, 1e-3
_ROUNDS: Final = 20

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


@dataclass(frozen=True)
class Swarm:
    """`throughput[i]` of each of the `room[i]` blocks that node i has room for. The first `joined` nodes come at first;
    then those of `leaving` go, and the rest come in their place.
    """

    blocks: int
    throughput: Floats
    room: Integers
    joined: int
    leaving: Integers

    def bound(self, nodes: Sequence[int]) -> float:
        return float((self.throughput * self.room)[list(nodes)].sum()) / self.blocks

    @property
    def after_churn(self) -> list[int]:
        stayed = [node for node in range(self.joined) if node not in set(self.leaving.tolist())]
        return stayed + list(range(self.joined, len(self.room)))


@dataclass(frozen=True)
class Outcome:
    """Smallest throughput over the fluid bound at three moments, and models of weights loaded until then."""

    joined: float
    rested: float
    churned: float
    loaded_joined: float
    loaded_churned: float


def swarm(blocks: int, nodes: int, room: float, seed: int) -> Swarm:
    draw = np.random.default_rng([blocks, nodes, round(10 * room), seed])
    gone = round(CHURN * nodes)
    count = nodes + gone
    throughput = np.exp(draw.uniform(0, np.log(SPREAD_OF_SPEED), count))
    share = np.exp(draw.uniform(0, np.log(SPREAD_OF_ROOM), count))
    rooms = np.clip(np.round(share / share[:nodes].sum() * room * blocks), 1, blocks).astype(np.int64)
    return Swarm(blocks, throughput, rooms, nodes, draw.choice(nodes, gone, replace=False))


# ----------------------------------------------------------------------------------------------------------- Petals


class PetalsSwarm:
    """Servers by their rule."""

    def __init__(self, of: Swarm, seed: int) -> None:
        self._of, self._draw = of, np.random.default_rng(seed)
        self._start = np.full(len(of.room), -1)
        self.loaded = 0

    def throughputs(self, without: int = -1) -> Floats:
        total = np.zeros(self._of.blocks)
        for node in np.flatnonzero(self._start >= 0):
            if node != without:
                total[self._span(int(node))] += self._of.throughput[node]
        return total

    def join(self, node: int) -> None:
        self._take(node, self._best(self.throughputs(), node))

    def leave(self, node: int) -> None:
        self._start[node] = -1

    def rest(self) -> None:
        """Every server looks whether it should move, until nobody does."""
        for _ in range(_ROUNDS):
            servers = self._draw.permutation(np.flatnonzero(self._start >= 0))
            moved = [self._look(int(node)) for node in servers]  # each of them looks
            if not any(moved):
                return

    def _span(self, node: int) -> slice:
        return slice(self._start[node], self._start[node] + self._of.room[node])

    def _take(self, node: int, start: int) -> None:
        self._start[node] = start
        self.loaded += int(self._of.room[node])

    def _best(self, throughputs: Floats, node: int) -> int:
        length = int(self._of.room[node])
        windows = np.sort(np.lib.stride_tricks.sliding_window_view(throughputs, length), axis=1)
        return int(np.lexsort(windows.T[::-1])[0])

    def _look(self, node: int) -> bool:
        before = self.throughputs().min()
        left = self.throughputs(node)
        left[self._span(node)] -= self._of.throughput[node] * _EPSILON
        if before > _EPSILON and left.min() <= 0:
            return False  # to leave would disconnect the swarm
        start = self._best(left, node)
        if start == self._start[node]:
            return False
        kept = self._start.copy()
        self._start[node] = start
        moved = True
        for _ in range(_ROUNDS):
            moved = False
            for other in self._draw.permutation(np.flatnonzero(self._start >= 0)):
                found = self._best(self.throughputs(int(other)), int(other))
                moved |= found != self._start[other]
                self._start[other] = found
            if not moved:
                break
        after = self.throughputs().min()
        self._start = kept
        if after < before or after < _EPSILON or before / after >= _QUALITY - _EPSILON:
            return False
        self._take(node, start)
        return True


def petals(of: Swarm, seed: int) -> Outcome:
    servers = PetalsSwarm(of, seed)
    first, later = range(of.joined), of.after_churn
    for node in first:
        servers.join(node)
    joined, loaded = servers.throughputs().min() / of.bound(first), servers.loaded
    servers.rest()
    rested = servers.throughputs().min() / of.bound(first)
    for node in of.leaving:
        servers.leave(int(node))
    for node in later[of.joined - len(of.leaving) :]:
        servers.join(node)
    servers.rest()
    churned = servers.throughputs().min() / of.bound(later)
    return Outcome(joined, rested, churned, loaded / of.blocks, servers.loaded / of.blocks)


# -------------------------------------------------------------------------------------------------------------- ours


def chain(blocks: int) -> ModelGraph:
    return ModelGraph(
        "blocks",
        tuple(Operator(f"block {number}", "block", 1, (number,)) for number in range(blocks)),
        (
            Tensor("input", MODEL_INPUT, (0,), 8),
            *(
                Tensor(f"cut {number}", number, (number + 1,) if number + 1 < blocks else (), 8, number + 1 == blocks)
                for number in range(blocks)
            ),
        ),
        tuple(Parameter(f"weights {number}", BLOCK_BYTES) for number in range(blocks)),
    )


class PlannedSwarm:
    """Nodes by our rule: a plan, judged again when nodes have come or gone."""

    def __init__(self, of: Swarm) -> None:
        self._graph = chain(of.blocks)
        self._nodes = [
            PlanningNode(
                address((number + 1).to_bytes(20, "big")),
                int(of.room[number]) * BLOCK_BYTES,
                bytes(32),
                {"block": max(1, round(_SECOND_NS / (of.throughput[number] * of.room[number])))},
            )
            for number in range(len(of.room))
        ]
        self._plan: ShardPlan | None = None
        self.rate = 0.0
        self.loaded = 0.0

    def judge(self, present: Sequence[int]) -> bool:
        """Whether the plan was changed."""
        nodes = tuple(self._nodes[number] for number in present)
        try:
            problem = Problem(self._graph, nodes, FREE_LINKS, terms=_TERMS)
            if self._plan is None:
                found = partition(self._graph, nodes, FREE_LINKS, terms=_TERMS)
                self._plan, self.rate = found.to_shard_plan(), _SECOND_NS / found.value_ns
                spans = sum(item.end_unit - item.first_unit for item in self._plan.assignments)
                self.loaded += spans / len(self._graph.operators)
                return True
            decision = rebalance(self._plan, problem, _MOVES)
        except PlanningError:
            self.rate = 0.0
            return False
        self._plan, self.rate = decision.partition.to_shard_plan(), _SECOND_NS / decision.partition.value_ns
        self.loaded += decision.moved_bytes / BLOCK_BYTES / len(self._graph.operators)
        return decision.change is not Change.STAY

    def rest(self, present: Sequence[int]) -> None:
        for _ in range(_ROUNDS):
            if not self.judge(present):
                return


_TERMS: Final = Terms(concurrent_sessions=1, session_tokens=1)
_MOVES: Final = MoveTerms()


def ours(of: Swarm) -> Outcome:
    planned = PlannedSwarm(of)
    first, later = range(of.joined), of.after_churn
    for count in range(1, of.joined + 1):
        if count % JOINS_BETWEEN_JUDGEMENTS == 0 or count == of.joined:
            planned.judge(range(count))
    joined, loaded = planned.rate / of.bound(first), planned.loaded
    planned.rest(first)
    rested = planned.rate / of.bound(first)
    planned.rest(later)
    return Outcome(joined, rested, planned.rate / of.bound(later), loaded, planned.loaded)


# --------------------------------------------------------------------------------------------------------------- both


def _both(case: tuple[int, int, float, int]) -> tuple[tuple[int, int, float, int], Outcome, Outcome]:
    made = swarm(*case)
    return case, petals(made, case[3]), ours(made)


def run(progress: Callable[[str], None], *, quick: bool) -> list[tuple[tuple[int, int, float, int], Outcome, Outcome]]:
    """(case, Petals, ours) of every swarm."""
    cases = list(itertools.product(BLOCKS, NODES, ROOMS, range(1 if quick else SEEDS)))
    found = []
    with ProcessPoolExecutor() as pool:
        for number, result in enumerate(pool.map(_both, cases), 1):
            found.append(result)
            (blocks, nodes, room, _), theirs, mine = result
            progress(
                f"{number} of {len(cases)}: {blocks} blocks, {nodes} nodes, room for {room} models: "
                f"Petals {theirs.rested:.2f}, ours {mine.rested:.2f}"
            )
    return found
