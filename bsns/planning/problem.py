"""What every solver takes and gives: nodes, links, an objective; a partition, with the bound it was measured against.

Owns the cost model (paper §1.4 with heterogeneous nodes and links) in one place, `evaluate`, so that solvers, bounds
and checks cannot disagree about it. Promises integer nanoseconds throughout: who has the same inputs computes the same
plan on any machine. Does not search.

A stage S of operators on node m costs, for one row,

    f_m(S) = receive + compute + overflow + send
    receive  = latency + in(S) / bandwidth        send = latency + out(S) / bandwidth        (0 for 0 bytes)
    compute  = sum of the measured times of its operators on m
    overflow = bytes beyond m's memory / m's host bandwidth       (infeasible where m has none)

Its memory is what its distinct parameters, the caches of all sessions, and the operator with the largest activation
peak need. What in(S), out(S) and their links are depends on `Transfers`:

    RELAYED  in(S) is the cut before S: every tensor made before and read at or after it; out(S) the cut after S. Links
             are those from the stage before and to the stage after.
    DIRECT   in(S) is every tensor made before S and read in it, out(S) every tensor made in S and read after it, each
             once (MTPP's io). Links are those to the stages that make or read them; the slowest of them counts.

The model's input and output cross no link between nodes and cost nothing. Between stages with several replicas the
slowest pair of nodes counts. Each replica serves some of the requests: for THROUGHPUT a stage's effective time is
1 / (sum over its replicas m of 1 / f_m), rounded up, for LATENCY it is its slowest replica's. Objectives:

    THROUGHPUT  the largest effective time. A transfer keeps its sender and its receiver busy, so both count it.
    LATENCY     the sum of the stages' receive + compute + overflow: one row meets each transfer once.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from itertools import accumulate, pairwise
from math import ceil
from typing import Final

import numpy as np
from eth_typing import ChecksumAddress
from numpy.typing import NDArray

from bsns.protocol.identifiers import ProtocolError
from bsns.protocol.model_graph import MODEL_INPUT, ModelGraph, Operator
from bsns.protocol.plan import MAXIMUM_ASSIGNMENTS, MAXIMUM_STAGES, Assignment, ShardPlan

SECOND_NS: Final = 1_000_000_000
MAXIMUM_TOTAL: Final = 2**52
"""Nanoseconds (52 days) or bytes that all operators together may have: floats are exact up to there, and the sum over
1,024 stages fits a signed integer of 64 bits."""
_MAXIMUM_INPUT: Final = 2**62
_MAXIMUM_WORK_WEIGHT: Final = 2**64 - 1

Times = NDArray[np.int64]


class PlanningError(ProtocolError):
    """No plan exists for these inputs; the message names the unit or the node that stands in the way."""


class Objective(enum.StrEnum):
    """THROUGHPUT: the slowest stage is as fast as can be. LATENCY: the sum over the stages is as small as can be."""

    THROUGHPUT = "throughput"
    LATENCY = "latency"


class Transfers(enum.StrEnum):
    """How a tensor reaches a stage that is not the next one.

    RELAYED: handed down the chain, so it is in every cut between its producer and its last consumer; what our nodes do,
    because each hop is evidence. DIRECT: sent once to each stage that reads it (paper §1.4, MTPP's io).
    """

    RELAYED = "relayed"
    DIRECT = "direct"


@dataclass(frozen=True, slots=True)
class PlanningNode:
    """One node's capability. `times_ns[key]`: nanoseconds one row takes in an operator with that timing key.

    `host_bytes_per_second` 0: memory is a hard limit; else what exceeds it is streamed at that rate for every row.
    """

    node: ChecksumAddress
    memory_bytes: int
    execution_class: bytes
    times_ns: Mapping[str, int]
    host_bytes_per_second: int = 0

    def time_of(self, operator: Operator) -> int:
        """Nanoseconds of one row in `operator`; PlanningError if the node did not measure it."""
        try:
            return self.times_ns[operator.timing_key]
        except KeyError:
            raise PlanningError(
                f"node {self.node} did not measure {operator.timing_key!r} ({operator.name}): "
                "it must send measurements for the whole model"
            ) from None


@dataclass(frozen=True, slots=True)
class Link:
    """One direction between two nodes: nanoseconds until the first byte arrives, then bytes a second."""

    latency_ns: int
    bytes_per_second: int

    def transfer_ns(self, size_bytes: int) -> int:
        """Time of `size_bytes`, rounded up; nothing is sent for 0 bytes."""
        if size_bytes == 0:
            return 0
        return self.latency_ns + -(-size_bytes * SECOND_NS // self.bytes_per_second)


@dataclass(frozen=True)
class Links:
    """Links by (from, to). A pair that is not `measured` has the `prior`; without a prior it is not connected."""

    prior: Link | None
    measured: Mapping[tuple[ChecksumAddress, ChecksumAddress], Link] = field(default_factory=dict)

    def between(self, sender: ChecksumAddress, receiver: ChecksumAddress) -> Link | None:
        """The link, or None where there is none."""
        return self.measured.get((sender, receiver), self.prior)


FREE_LINKS: Final = Links(Link(0, 2**62))
"""Links that cost next to nothing: a transfer takes one nanosecond, as it is rounded up."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What a plan may look like.

    Every stage gets at least `replicas` nodes; `stage_count` None leaves the number of stages to the solver (at most
    `maximum_stages`). `spread_leftover`: nodes that no stage needs become further replicas of the slowest stage.
    `concurrent_sessions` times `session_tokens` is the KV cache each stage must hold. `free_order`: the solver may take
    any topological order; published plans keep the manifest's.
    """

    replicas: int = 1
    stage_count: int | None = None
    maximum_stages: int = MAXIMUM_STAGES
    maximum_assignments: int = MAXIMUM_ASSIGNMENTS
    spread_leftover: bool = True
    concurrent_sessions: int = 4
    session_tokens: int = 2_048
    transfers: Transfers = Transfers.RELAYED
    free_order: bool = False


@dataclass(frozen=True, slots=True)
class PlannedStage:
    """One stage: positions [first, end) of the partition's order on every one of `nodes`, the fastest first.

    The four parts are those of its slowest replica, in nanoseconds for one row. `effective_ns` is what the stage counts
    in the objective (module docstring).
    """

    first: int
    end: int
    nodes: tuple[PlanningNode, ...]
    receive_ns: int
    compute_ns: int
    overflow_ns: int
    send_ns: int
    effective_ns: int
    work: int

    @property
    def cost_ns(self) -> int:
        """f_m of the slowest replica m."""
        return self.receive_ns + self.compute_ns + self.overflow_ns + self.send_ns


@dataclass(frozen=True, slots=True)
class Partition:
    """What a solver found. `order[i]` is the operator at position i; `solver` names the one whose answer this is.

    `value_ns` is the objective's value, `lower_bound_ns` no partition can be below, `bound` says by which argument.
    """

    stages: tuple[PlannedStage, ...]
    order: tuple[int, ...]
    unused: tuple[PlanningNode, ...]
    objective: Objective
    value_ns: int
    lower_bound_ns: int
    bound: str
    solver: str

    @property
    def ratio(self) -> float:
        """lower bound / value, in (0, 1]; 1 is a proven optimum."""
        return self.lower_bound_ns / self.value_ns if self.value_ns else 1.0

    def to_shard_plan(self) -> ShardPlan:
        """The plan as it goes on chain. Work weights are the declared costs; a stage without any counts as 1.

        PlanningError if the order is not the graph's: on chain a stage is a range of units. ProtocolError if the plan
        is larger than the contracts take.
        """
        if self.order != tuple(range(len(self.order))):
            raise PlanningError("the plan reorders the units: plan without `free_order` to publish it")
        return ShardPlan(
            len(self.order),
            tuple(
                Assignment(
                    stage=number,
                    replica=replica,
                    first_unit=stage.first,
                    end_unit=stage.end,
                    node=node.node,
                    work_weight=min(max(stage.work, 1), _MAXIMUM_WORK_WEIGHT),
                    execution_class=node.execution_class,
                )
                for number, stage in enumerate(self.stages)
                for replica, node in enumerate(stage.nodes)
            ),
        )


@dataclass(frozen=True)
class Problem:
    """The inputs of one planning run, checked. Raises PlanningError for what cannot be planned; it names the culprit.

    A problem that constructs may still have no solution (which nodes hold which units together, and are linked, is the
    search itself); what a solver raises then is `infeasible()`.
    """

    graph: ModelGraph
    nodes: tuple[PlanningNode, ...]
    links: Links
    objective: Objective = Objective.THROUGHPUT
    terms: Terms = Terms()

    def __post_init__(self) -> None:
        self._check_terms()
        self._check_nodes()
        self._check_links()
        self._check_memory()

    # --------------------------------------------------------------------------------------- what solvers look up

    @cached_property
    def times(self) -> Times:
        """Nanoseconds of one row by node and operator; shape (nodes, operators)."""
        keys = {key: number for number, key in enumerate({item.timing_key: None for item in self.graph.operators})}
        by_key = np.array([[node.times_ns[key] for key in keys] for node in self.nodes], dtype=np.int64)
        return by_key[:, [keys[item.timing_key] for item in self.graph.operators]]

    @cached_property
    def cache_bytes(self) -> tuple[int, ...]:
        """What each operator keeps for all sessions."""
        tokens = self.terms.concurrent_sessions * self.terms.session_tokens
        return tuple(item.cache_bytes * tokens for item in self.graph.operators)

    @property
    def maximum_stages(self) -> int:
        """Stages a partition may have: as many as the terms allow, and there are operators and groups of nodes for."""
        terms = self.terms
        allowed = terms.maximum_stages if terms.stage_count is None else terms.stage_count
        groups = min(len(self.nodes), terms.maximum_assignments) // terms.replicas
        return min(allowed, groups, len(self.graph.operators))

    @property
    def minimum_stages(self) -> int:
        return self.terms.stage_count or 1

    def stage_memory(self, operators: Iterable[int]) -> int:
        """Bytes that a stage of these operators needs."""
        parameters: set[int] = set()
        cache = peak = 0
        for number in operators:
            operator = self.graph.operators[number]
            parameters.update(operator.parameters)
            cache += self.cache_bytes[number]
            peak = max(peak, operator.peak_bytes)
        return sum(self.graph.parameters[item].size_bytes for item in parameters) + cache + peak

    def overflow_ns(self, node: PlanningNode, memory: int) -> int | None:
        """Nanoseconds of streaming what exceeds the node's memory, for one row; None where it must not."""
        beyond = memory - node.memory_bytes
        if beyond <= 0:
            return 0
        return None if not node.host_bytes_per_second else ceil_div(beyond * SECOND_NS, node.host_bytes_per_second)

    def cut_bytes(self, order: Sequence[int]) -> tuple[int, ...]:
        """RELAYED: bytes of one row that cross the cut before each position of `order`, and after the last (0)."""
        position = {operator: place for place, operator in enumerate(order)}
        change = [0] * (len(order) + 1)
        for tensor in self.graph.tensors:
            if tensor.producer != MODEL_INPUT and tensor.consumers:
                change[position[tensor.producer] + 1] += tensor.size_bytes
                change[max(position[item] for item in tensor.consumers) + 1] -= tensor.size_bytes
        return tuple(accumulate(change))

    def transfer_ns(
        self, senders: Collection[PlanningNode], receivers: Collection[PlanningNode], size: int
    ) -> int | None:
        """Nanoseconds of `size` bytes over the slowest pair; None if a pair is not connected."""
        if size == 0:
            return 0
        slowest = 0
        for sender in senders:
            for receiver in receivers:
                link = self.links.between(sender.node, receiver.node)
                if link is None:
                    return None
                slowest = max(slowest, link.transfer_ns(size))
        return slowest

    def effective_ns(self, replica_costs: Sequence[int]) -> int:
        """What a stage counts whose replicas cost this much each (module docstring)."""
        if self.objective is Objective.LATENCY or len(replica_costs) == 1:
            return max(replica_costs)
        if 0 in replica_costs:
            return 0
        return ceil(1 / sum(Fraction(1, cost) for cost in replica_costs))

    def infeasible(self) -> PlanningError:
        """Why no partition exists, as far as it can be said without repeating the search."""
        terms = self.terms
        needed = self.stage_memory(range(len(self.graph.operators)))
        stages = f"in {terms.stage_count} stages" if terms.stage_count else f"in up to {self.maximum_stages} stages"
        unlinked = self._unlinked() if len(self.nodes) > 1 else ()
        hint = f"; node {unlinked[0].node} is linked to no other" if unlinked else ""
        return PlanningError(
            f"{needed} bytes of {self.graph.name!r} do not fit {stages} with {terms.replicas} replicas on these "
            f"{len(self.nodes)} nodes ({sum(node.memory_bytes for node in self.nodes)} bytes together) over links that "
            f"are there{hint}: attach more or larger nodes"
        )

    # ------------------------------------------------------------------------------------------------------ checks

    def _check_terms(self) -> None:
        terms, units = self.terms, len(self.graph.operators)
        choices: tuple[tuple[object, type[enum.StrEnum]], ...] = (
            (self.objective, Objective),
            (terms.transfers, Transfers),
        )
        for value, kind in choices:
            if not isinstance(value, kind):
                raise PlanningError(f"{value!r} is no {kind.__name__}: {', '.join(kind)}")
        for name in ("replicas", "maximum_stages", "maximum_assignments"):
            _require_integer(getattr(terms, name), 1, f"terms: {name}")
        for name in ("concurrent_sessions", "session_tokens"):
            _require_integer(getattr(terms, name), 0, f"terms: {name}")
        if terms.stage_count is not None:
            _require_integer(terms.stage_count, 1, "terms: stage_count")
            if terms.stage_count > min(units, terms.maximum_stages):
                raise PlanningError(
                    f"{terms.stage_count} stages are not possible: the model has {units} units, a plan at most "
                    f"{terms.maximum_stages} stages"
                )
        stages = self.minimum_stages
        if not self.nodes:
            raise PlanningError("there are no nodes to plan for")
        if len(self.nodes) < stages * terms.replicas:
            raise PlanningError(
                f"{stages} stages with {terms.replicas} replicas need {stages * terms.replicas} nodes, "
                f"{len(self.nodes)} are there"
            )
        if stages * terms.replicas > terms.maximum_assignments:
            raise PlanningError(
                f"{stages} stages with {terms.replicas} replicas exceed {terms.maximum_assignments} assignments"
            )

    def _check_nodes(self) -> None:
        seen: set[str] = set()
        for node in self.nodes:
            if node.node in seen:
                raise PlanningError(f"node {node.node} is given twice")
            seen.add(node.node)
            check_node(self.graph, node)

    def _check_links(self) -> None:
        known = {node.node for node in self.nodes}
        named = [("the prior link", self.links.prior)] if self.links.prior is not None else []
        named += [
            (f"the link from {sender} to {receiver}", link)
            for (sender, receiver), link in self.links.measured.items()
            if sender in known and receiver in known
        ]
        size = sum(tensor.size_bytes for tensor in self.graph.tensors)
        for where, link in named:
            check_link(link, size, where)

    def _check_memory(self) -> None:
        graph, terms = self.graph, self.terms
        total = sum(item.size_bytes for item in graph.parameters) + sum(self.cache_bytes)
        if total + sum(item.peak_bytes for item in graph.operators) >= MAXIMUM_TOTAL:
            raise PlanningError(f"{graph.name!r} needs more than 2**52 bytes with its caches")
        for node in self.nodes:
            overflow = self.overflow_ns(node, total)
            if overflow is not None and overflow >= MAXIMUM_TOTAL:
                raise PlanningError(f"node {node.node}: streaming the model takes more than 2**52 ns a row")
        if any(node.host_bytes_per_second for node in self.nodes):
            return
        largest = max(node.memory_bytes for node in self.nodes)
        for number, operator in enumerate(graph.operators):
            need = self.stage_memory([number])
            if need > largest:
                raise PlanningError(
                    f"unit {number} ({operator.name}) needs {need} bytes, the largest node has {largest}: "
                    "attach a larger node"
                )
        used = {item for operator in graph.operators for item in operator.parameters}
        need = sum(graph.parameters[item].size_bytes for item in used) + sum(self.cache_bytes)
        # Stages times replicas nodes at most, and every replica chain holds the whole model.
        room = (
            sum(sorted((node.memory_bytes for node in self.nodes), reverse=True))
            if terms.spread_leftover
            else sum(
                sorted((node.memory_bytes for node in self.nodes), reverse=True)[: self.maximum_stages * terms.replicas]
            )
        )
        if need * terms.replicas > room:
            raise PlanningError(
                f"{terms.replicas} times {need} bytes of {graph.name!r} exceed the {room} bytes of the "
                f"{len(self.nodes)} nodes: attach more or larger nodes"
            )
        several = self.minimum_stages > 1 or need > largest
        if several and self.links.prior is None and self._every_cut_is_crossed() and self._unlinked() == self.nodes:
            raise PlanningError(
                f"node {self.nodes[0].node} is linked to no other, and neither is any of the {len(self.nodes) - 1} "
                "others: a plan of several stages needs links; measure them"
            )

    def _every_cut_is_crossed(self) -> bool:
        return not self.terms.free_order and all(self.cut_bytes(range(len(self.graph.operators)))[1:-1])

    def _unlinked(self) -> tuple[PlanningNode, ...]:
        return tuple(
            node
            for node in self.nodes
            if not any(
                self.links.between(node.node, other.node) or self.links.between(other.node, node.node)
                for other in self.nodes
                if other is not node
            )
        )


def check_node(graph: ModelGraph, node: PlanningNode) -> None:
    """PlanningError if nothing can be planned for `graph` with `node` in it, whatever the other nodes are."""
    _require_integer(node.memory_bytes, 0, f"node {node.node}: memory_bytes")
    _require_integer(node.host_bytes_per_second, 0, f"node {node.node}: host_bytes_per_second")
    total = 0
    for operator in graph.operators:
        time = node.time_of(operator)
        least = 1 if operator.work else 0  # only operators that do nothing take no time
        _require_integer(time, least, f"node {node.node}: time of {operator.timing_key!r} ({operator.name})")
        total += time
    if total >= MAXIMUM_TOTAL:
        raise PlanningError(f"node {node.node}: the whole model takes {total} ns, at most 2**52 can be planned")


def check_link(link: Link, size_bytes: int, where: str) -> None:
    """PlanningError if `link` cannot be planned with for a graph whose tensors have `size_bytes` together."""
    _require_integer(link.latency_ns, 0, f"{where}: latency_ns")
    _require_integer(link.bytes_per_second, 1, f"{where}: bytes_per_second")
    if link.transfer_ns(size_bytes) >= MAXIMUM_TOTAL:
        raise PlanningError(f"{where} takes more than 2**52 ns for all tensors: it is too slow to plan with")


def evaluate(
    problem: Problem,
    order: Sequence[int],
    stages: Sequence[tuple[int, int, tuple[PlanningNode, ...]]],
    *,
    lower_bound_ns: int,
    bound: str,
    solver: str,
) -> Partition:
    """The partition that `stages` (first position, end, nodes) of `order` make, with its costs: the one place where
    cost is computed.

    PlanningError if it is none: `order` is not a topological order (or not the graph's own without `free_order`), the
    stages do not cover every position once, a node serves twice or too few do, a stage exceeds a node's memory, or a
    link is missing.
    """
    graph, terms = problem.graph, problem.terms
    order = tuple(order)
    _check_order(problem, order)
    _check_stages(problem, stages)
    transfers = (
        _relayed(problem, order, stages) if terms.transfers is Transfers.RELAYED else _direct(problem, order, stages)
    )
    planned: list[PlannedStage] = []
    for number, (first, end, nodes) in enumerate(stages):
        operators = order[first:end]
        memory = problem.stage_memory(operators)
        receive, send = transfers[number]
        replicas: list[tuple[int, int, int]] = []
        for node in nodes:
            overflow = problem.overflow_ns(node, memory)
            if overflow is None:
                raise PlanningError(
                    f"node {node.node} has {node.memory_bytes} bytes, its stage [{first}, {end}) needs {memory}"
                )
            compute = sum(node.time_of(graph.operators[item]) for item in operators)
            counted = receive + compute + overflow + (send if problem.objective is Objective.THROUGHPUT else 0)
            replicas.append((counted, compute, overflow))
        _, compute, overflow = max(replicas)
        # Fastest first: whoever must choose between idle replicas takes the first.
        ranked = sorted(zip(replicas, nodes, strict=True), key=lambda item: (item[0], item[1].node))
        planned.append(
            PlannedStage(
                first=first,
                end=end,
                nodes=tuple(node for _, node in ranked),
                receive_ns=receive,
                compute_ns=compute,
                overflow_ns=overflow,
                send_ns=send,
                effective_ns=problem.effective_ns([item[0] for item in replicas]),
                work=sum(graph.operators[item].work for item in operators),
            )
        )
    costs = [stage.effective_ns for stage in planned]
    used = {node.node for stage in planned for node in stage.nodes}
    return Partition(
        stages=tuple(planned),
        order=order,
        unused=tuple(node for node in problem.nodes if node.node not in used),
        objective=problem.objective,
        value_ns=max(costs) if problem.objective is Objective.THROUGHPUT else sum(costs),
        lower_bound_ns=lower_bound_ns,
        bound=bound,
        solver=solver,
    )


def ceil_div(a: int, b: int) -> int:
    """a / b rounded up, for integers of any size."""
    return -(-a // b)


_Stages = Sequence[tuple[int, int, tuple[PlanningNode, ...]]]
_Transfers = list[tuple[int, int]]


def _check_order(problem: Problem, order: tuple[int, ...]) -> None:
    graph = problem.graph
    count = len(graph.operators)
    if order == tuple(range(count)):
        return
    if sorted(order) != list(range(count)):
        raise PlanningError(f"the order does not hold each of {count} operators once")
    if not problem.terms.free_order:
        raise PlanningError("the order is not the graph's, and the terms do not set `free_order`")
    position = {operator: place for place, operator in enumerate(order)}
    for tensor in graph.tensors:
        for consumer in tensor.consumers:
            if tensor.producer != MODEL_INPUT and position[consumer] < position[tensor.producer]:
                raise PlanningError(
                    f"the order is not topological: operator {consumer} ({graph.operators[consumer].name}) comes "
                    f"before {tensor.producer} ({graph.operators[tensor.producer].name}), whose output it reads"
                )


def _check_stages(problem: Problem, stages: _Stages) -> None:
    terms = problem.terms
    known = {node.node for node in problem.nodes}
    covered, seen = 0, set[str]()
    for number, (first, end, nodes) in enumerate(stages):
        if first != covered or end <= first:
            raise PlanningError(
                f"stage {number} is [{first}, {end}), expected it to begin at {covered} and to hold a unit"
            )
        covered = end
        if len(nodes) < terms.replicas or (len(nodes) > terms.replicas and not terms.spread_leftover):
            raise PlanningError(f"stage {number} has {len(nodes)} nodes, the terms ask for {terms.replicas}")
        for node in nodes:
            if node.node not in known:
                raise PlanningError(f"stage {number}: node {node.node} is not one of the problem's")
            if node.node in seen:
                raise PlanningError(f"stage {number}: node {node.node} serves twice")
            seen.add(node.node)
    if covered != len(problem.graph.operators):
        raise PlanningError(f"the stages end at {covered}, the model has {len(problem.graph.operators)} units")
    if len(stages) > terms.maximum_stages or (terms.stage_count is not None and len(stages) != terms.stage_count):
        raise PlanningError(f"{len(stages)} stages are not what the terms allow")
    if len(seen) > terms.maximum_assignments:
        raise PlanningError(f"{len(seen)} assignments, the terms allow {terms.maximum_assignments}")


def _relayed(problem: Problem, order: tuple[int, ...], stages: _Stages) -> _Transfers:
    """By stage: nanoseconds to receive and to send."""
    cuts = problem.cut_bytes(order)
    hops = [0]
    for (_, end, senders), (_, _, receivers) in pairwise(stages):
        hops.append(_transfer(problem, senders, receivers, cuts[end]))
    hops.append(0)
    return list(pairwise(hops))


def _direct(problem: Problem, order: tuple[int, ...], stages: _Stages) -> _Transfers:
    """By stage: nanoseconds to receive and to send."""
    stage_of = {order[place]: number for number, (first, end, _) in enumerate(stages) for place in range(first, end)}
    received, sent = [0] * len(stages), [0] * len(stages)
    pairs: set[tuple[int, int]] = set()
    for tensor in problem.graph.tensors:
        if tensor.producer == MODEL_INPUT or not tensor.size_bytes:
            continue
        source = stage_of[tensor.producer]
        targets = {stage_of[item] for item in tensor.consumers} - {source}
        for target in targets:
            received[target] += tensor.size_bytes
            pairs.add((source, target))
        sent[source] += tensor.size_bytes if targets else 0
    receive, send = [0] * len(stages), [0] * len(stages)
    for source, target in sorted(pairs):
        senders, receivers = stages[source][2], stages[target][2]
        receive[target] = max(receive[target], _transfer(problem, senders, receivers, received[target]))
        send[source] = max(send[source], _transfer(problem, senders, receivers, sent[source]))
    return list(zip(receive, send, strict=True))


def _transfer(
    problem: Problem, senders: tuple[PlanningNode, ...], receivers: tuple[PlanningNode, ...], size: int
) -> int:
    time = problem.transfer_ns(senders, receivers, size)
    if time is None:
        raise PlanningError(
            f"no link from {', '.join(node.node for node in senders)} to {', '.join(node.node for node in receivers)}"
        )
    return time


def _require_integer(value: object, least: int, where: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= _MAXIMUM_INPUT:
        raise PlanningError(f"{where} is {value!r}, expected an integer from {least} to 2**62")
