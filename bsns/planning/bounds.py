"""Lower bounds: values below which no partition of a problem can be, and why.

Owns the fast bound that every plan carries, and a slower search that raises it and sometimes finds a better plan on the
way. Promises that each bound holds for the integer costs of `evaluate`; each function's docstring is its proof. Bounds
do not count memory: a limit or an overflow only makes partitions worse.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from bsns.planning.ideals import FORBIDDEN, Bits, Floats, GraphArrays, Integers
from bsns.planning.problem import (
    FREE_LINKS,
    SECOND_NS,
    Objective,
    Partition,
    PlanningError,
    Problem,
    ceil_div,
    evaluate,
)

_WEIGHT_SCALE: Final = 2**80
_TOLERANCE_NS: Final = 0.01
"""Sums of rounded-up transfers in floating point may be off by less than this; only in favour of a lower bound."""
_MAXIMUM_IDEALS: Final = 20_000
_FEW_PAIRS: Final = 3_000_000
"""Pairs of ideals of neighbouring windows that are compared at the first try, for the best known value less 1."""
_CHUNK: Final = 4_000_000
"""Entries of a cost matrix held at a time."""
_ROUNDS: Final = ((0.0, 3_000_000), (0.1, 6_000_000), (0.3, 20_000_000))
"""By round over all cuts: seconds for the integer programme of each (0: its linear relaxation), pairs of ideals."""
_RELAXATION_SECONDS: Final = 10.0
_SLACK: Final = 1e-6
"""How far HiGHS may be off in a constraint, as a share of the right-hand side."""


def lower_bound(problem: Problem) -> tuple[int, str]:
    """The larger of two bounds, and which one it is; O(nodes × timing keys).

    *work*, THROUGHPUT. Give each node m any weight a(m) > 0. In a partition of value t node m serves a share x(v, m) of
    the requests of each operator v it holds, with sum over m of x(v, m) = 1, and is busy for no more than t for each
    request that enters the network: sum over v of x(v, m) p(v, m) <= t. (A stage of replicas with costs f that has
    effective time 1 / sum(1/f) <= t can split requests in the ratio of 1/f.) Weighted and summed over the nodes in use,
    t · sum of a(m) >= sum over m and v of a(m) x(v, m) p(v, m) >= sum over v of min over m of a(m) p(v, m). The sum of
    a(m) on the left is at most that of the largest weights of as many nodes as may be used. Here a(m) is the inverse of
    m's time for the whole model: for machines that differ by a factor this is total work over total speed.

    *largest operator*, THROUGHPUT without replicas of a stage: whoever holds v takes at least min over m of p(v, m).

    *fastest nodes*, LATENCY: each operator is computed once and takes at least min over m of p(v, m).
    """
    terms = problem.terms
    counts: dict[str, int] = {}
    for operator in problem.graph.operators:
        counts[operator.timing_key] = counts.get(operator.timing_key, 0) + 1
    fastest = {key: min(node.times_ns[key] for node in problem.nodes) for key in counts}
    if problem.objective is Objective.LATENCY:
        return sum(count * fastest[key] for key, count in counts.items()), "fastest nodes"
    weights = [
        _WEIGHT_SCALE // max(1, sum(count * node.times_ns[key] for key, count in counts.items()))
        for node in problem.nodes
    ]
    usable = terms.maximum_assignments if terms.spread_leftover else problem.maximum_stages * terms.replicas
    weighted = sum(
        count * min(weight * node.times_ns[key] for weight, node in zip(weights, problem.nodes))
        for key, count in counts.items()
    )
    work = ceil_div(weighted, sum(sorted(weights, reverse=True)[:usable]))
    largest = max(fastest.values())
    if terms.replicas == 1 and not terms.spread_leftover and largest > work:
        return largest, "largest operator"
    return work, "work"


def certify(problem: Problem, found: Partition, *, effort_s: float) -> Partition:
    """`found` with a raised bound, or a better partition that turned up; the same one if nothing was proved in time.

    How far it comes depends on the machine's speed, so it has no place in a plan that others recompute. Takes at most
    about twice `effort_s`. For THROUGHPUT with one node a stage; other problems keep the fast bound.
    """
    bound, name = lower_bound(problem)
    if bound > found.lower_bound_ns:
        found = replace(found, lower_bound_ns=bound, bound=name)
    terms = problem.terms
    if problem.objective is not Objective.THROUGHPUT or terms.replicas > 1 or terms.spread_leftover:
        return found
    if not terms.free_order:
        return found
    return _Search(problem, found, time.monotonic() + effort_s).run()


@dataclass(frozen=True)
class _Window:
    """What is known of ideal number j of the chains of value at most T: its work, and who must or cannot be in it.

    work + out(j) is at most `with_out`, work + cut at most `with_cut_before`; work - in(j+1) is at least `with_in`,
    work - cut at least `with_cut_after`.
    """

    least: float
    most: float
    with_out: float
    with_in: float
    with_cut_before: float
    with_cut_after: float
    excluded: Bits
    forced: Bits


class _Search:
    """Refutes values: if no partition has value at most T, then T + 1 is a lower bound; bisection over T.

    Everything is shown for imaginary nodes, each as fast as the fastest for every operator, over links as fast as the
    fastest: the value of a partition on them is at most its real value. A partition of value at most T into at most k
    stages is a chain of ideals I(0) = {} to I(k) = V (empty stages last) with f(I(j) minus I(j-1)) <= T. Let
    out(j) be what stage j sends and in(j) what it receives, and g(j) a lower bound of out(j) + in(j+1). Then

    (1) the first j stages take at most jT: work(I(j)) + g(1) + … + g(j-1) + out(j) <= jT, likewise the last k - j;
    (2) so an operator whose ancestors and itself weigh more than the most work of I(j) is not in I(j), and one without
        which, and without whose descendants, the least work is not reached, is in I(j);
    (3) every ideal in such a window has at least the cut that the integer programme of `_least_cut` gives, which is
        the next g(j); repeated, windows shrink; an empty window refutes T;
    (4) where the ideals of all windows can be listed, D(j)[I], the least largest cost of j stages that end at I, is
        computed by comparing all of them, and T is refuted or the optimum found.
    """

    def __init__(self, problem: Problem, found: Partition, deadline: float) -> None:
        self._problem, self._found, self._deadline = problem, found, deadline
        self._arrays = GraphArrays.of(problem.graph, problem.terms.transfers)
        self._stages = problem.maximum_stages
        self._work: Integers = problem.times.min(axis=0)
        self._total = float(self._work.sum())
        links = [*problem.links.measured.values()]
        links += [problem.links.prior] if problem.links.prior is not None else []
        links = links or [link for link in [FREE_LINKS.prior] if link is not None]
        self._latency = min(link.latency_ns for link in links)
        self._rate = SECOND_NS / max(link.bytes_per_second for link in links)
        ancestors = self._arrays.ancestors.astype(np.float64)
        self._before: Floats = ancestors @ self._work.astype(np.float64)
        self._after: Floats = ancestors.T @ self._work.astype(np.float64)
        self._made: list[list[int]] = [[] for _ in range(self._arrays.count)]
        self._read: list[list[int]] = [[] for _ in range(self._arrays.count)]
        for tensor, (producer, readers) in enumerate(zip(self._arrays.producers, self._arrays.consumers)):
            self._made[producer].append(tensor)
            for reader in readers:
                self._read[reader].append(tensor)

    def run(self) -> Partition:
        """All ideals if they are few; else bisection between what is proved and what could not be decided."""
        proved, name = self._found.lower_bound_ns, self._found.bound
        undecided, target = self._found.value_ns, self._found.value_ns - 1
        # What holds of all partitions of value at most T holds of those of a smaller one.
        gains = np.zeros(self._stages + 1)
        while proved < undecided and time.monotonic() < self._deadline:
            raised = gains.copy()
            if target == self._found.value_ns - 1:
                proof = self._all_ideals(target, raised, _FEW_PAIRS)
            else:
                proof = self._refute(target, raised)
            if proof is None:
                undecided, gains = target, raised
            else:
                proved, name = max((proved, name), proof)
                if proved <= target:
                    break  # the optimum of the imaginary nodes
            undecided = min(undecided, self._found.value_ns)
            if undecided - proved <= self._found.value_ns // 1000:
                break
            target = (proved + undecided) // 2
        return replace(self._found, lower_bound_ns=min(proved, self._found.value_ns), bound=name)

    def _refute(self, target: int, gains: Floats) -> tuple[int, str] | None:
        """A lower bound above `target`, or the optimum of the imaginary nodes if that is not above; None if neither
        could be shown. Raises `gains` in place; a better partition that turns up becomes `_found`.
        """
        for seconds, pairs in _ROUNDS:
            if not self._raise_cuts(target, gains, seconds):
                return target + 1, "cuts"
            proof = self._all_ideals(target, gains, pairs)
            if proof is not None:
                return proof
        return None

    # ------------------------------------------------------------------------------------------------ (1) and (2)

    def _window(self, target: int, gains: Floats, j: int) -> _Window:
        k, total = self._stages, self._total
        first = j * target + _TOLERANCE_NS
        last = total - (k - j) * target - _TOLERANCE_NS
        with_out, with_in = first - float(gains[1:j].sum()), last + float(gains[j + 1 : k].sum())
        if j == 0:
            with_out = with_in = 0.0
        if j == k:
            with_out = with_in = total
        least, most = max(0.0, with_in), min(total, with_out)
        return _Window(
            least,
            most,
            with_out,
            with_in,
            with_cut_before=with_out if self._arrays.relayed else first,
            with_cut_after=with_in if self._arrays.relayed else last,
            excluded=self._before > most,
            forced=total - self._after < least,
        )

    # ----------------------------------------------------------------------------------------------------------- (3)

    def _raise_cuts(self, target: int, gains: Floats, seconds: float) -> bool:
        """One pass over the cuts that raises `gains` in place; False if a window is empty: `target` is refuted."""
        for j in range(1, self._stages):
            windows = [self._window(target, gains, i) for i in (j - 1, j, j + 1)]
            if windows[1].least > windows[1].most or (windows[1].excluded & windows[1].forced).any():
                return False
            if time.monotonic() > self._deadline:
                return True
            found = self._least_cut(windows[0], windows[1], windows[2], seconds)
            if found is None:
                return False
            gains[j] = max(gains[j], found)
        return self._total + float(gains.sum()) <= self._stages * target + _TOLERANCE_NS

    def _least_cut(self, before: _Window, window: _Window, after: _Window, seconds: float) -> float | None:
        """A lower bound of out(j) + in(j+1) over the ideals in a window; None if there is none.

        An integer programme: x(v) = 1 if v is in I(j), x descends along edges, work is in the window, for each tensor
        h >= x(producer) - x(consumer) for every consumer. With RELAYED out(j) = in(j+1) = cut, so h counts twice. With
        DIRECT h counts in out(j) where the producer cannot be in I(j-1), as it then is in stage j, and in in(j+1) for
        the consumers that must be in I(j+1), as they then are in stage j+1. Latency is left out. The answer is HiGHS's
        dual bound, which holds also when it is stopped early.
        """
        arrays, excluded, forced = self._arrays, window.excluded, window.forced
        free = np.flatnonzero(~excluded & ~forced)
        column = np.full(arrays.count, -1)
        column[free] = np.arange(len(free))
        rows: list[int] = []
        columns: list[int] = []
        values: list[float] = []
        least: list[float] = []
        out_cost: list[float] = []
        in_cost: list[float] = []
        out_sure = in_sure = 0.0

        def add(producer: int, readers: list[int], cost_out: float, cost_in: float) -> None:
            nonlocal out_sure, in_sure
            readers = [reader for reader in readers if not forced[reader]]
            if excluded[producer] or not readers:
                return
            outside = any(excluded[reader] for reader in readers)
            if forced[producer] and outside:
                out_sure += cost_out
                in_sure += cost_in
                return
            variable = len(free) + len(out_cost)
            out_cost.append(cost_out)
            in_cost.append(cost_in)
            for reader in [-1] if outside else readers:
                rows.append(len(least))
                columns.append(variable)
                values.append(1.0)
                if not forced[producer]:
                    rows.append(len(least))
                    columns.append(int(column[producer]))
                    values.append(-1.0)
                if reader >= 0:
                    rows.append(len(least))
                    columns.append(int(column[reader]))
                    values.append(1.0)
                least.append(1.0 if forced[producer] else 0.0)

        for producer, readers, size in zip(arrays.producers, arrays.consumers, arrays.sizes):
            cost = float(size) * self._rate
            if arrays.relayed:
                add(int(producer), list(readers), cost, cost)
            else:
                if before.excluded[producer]:
                    add(int(producer), list(readers), cost, 0.0)
                add(int(producer), [reader for reader in readers if after.forced[reader]], 0.0, cost)
        for operator in free:
            for predecessor in arrays.predecessors[operator]:
                if column[predecessor] >= 0:
                    rows += [len(least)] * 2
                    columns += [int(column[predecessor]), int(column[operator])]
                    values += [1.0, -1.0]
                    least.append(0.0)
        base = float(self._work[forced].sum())
        margin = _SLACK * self._total
        if not len(free):
            inside = window.least - margin <= base <= window.most + margin
            return out_sure + in_sure if inside else None
        work = self._work[free].astype(np.float64)
        none = np.zeros(len(out_cost))
        matrix = csr_array((values, (rows, columns)), shape=(len(least), len(free) + len(out_cost)))
        result = milp(
            np.concatenate([np.zeros(len(free)), np.array(out_cost) + np.array(in_cost)]),
            integrality=np.concatenate([np.full(len(free), seconds > 0), none]),
            bounds=Bounds(0, 1),
            constraints=[
                LinearConstraint(matrix, np.array(least), np.inf),
                LinearConstraint(
                    np.stack(
                        [
                            np.concatenate([work, none]),
                            np.concatenate([work, np.array(out_cost)]),
                            np.concatenate([work, -np.array(in_cost)]),
                        ]
                    ),
                    [window.least - base - margin, -np.inf, window.with_in - base + in_sure - margin],
                    [window.most - base + margin, window.with_out - base - out_sure + margin, np.inf],
                ),
            ],
            options={"time_limit": seconds or _RELAXATION_SECONDS, "mip_rel_gap": 0.01},
        )
        if result.status == 2:
            return None
        dual = result.mip_dual_bound if seconds else result.fun
        dual = 0.0 if dual is None else dual
        return out_sure + in_sure + max(0.0, float(dual) * (1 - _SLACK) - _SLACK * self._total)

    # ----------------------------------------------------------------------------------------------------------- (4)

    def _ideals(self, window: _Window) -> tuple[Bits, Floats] | None:
        """All ideals of a window with their work, as rows; None if they are too many.

        Operators are decided in order. A row is dropped as soon as the work it has, can still get, or the tensors that
        are cut whatever follows break (1). With RELAYED out(j) = in(j+1) = cut. With DIRECT a crossing tensor is sent
        by one of the first j stages and received by one of the last k - j: work + cut is at most jT. It may be one that
        the gains count already, so these are left out there.
        """
        arrays = self._arrays
        if (window.excluded & window.forced).any():
            return np.zeros((0, arrays.count), np.bool_), np.zeros(0)
        free = np.flatnonzero(~window.excluded & ~window.forced)
        rows = window.forced[None, :].copy()
        cut = np.zeros(1)
        decided = ~np.isin(np.arange(arrays.count), free)
        outside = np.array([window.excluded[list(readers)].any() for readers in arrays.consumers], np.bool_)
        cost = arrays.sizes * self._rate
        cut += float(cost[outside & window.forced[arrays.producers]].sum())
        work = np.full(1, float(self._work[window.forced].sum()))
        left = float(self._work[free].sum())
        for operator in free:
            may = rows[:, list(arrays.predecessors[operator])].all(1)
            more = rows[may]
            more[:, operator] = True
            cut_more = cut[may] + sum(cost[tensor] for tensor in self._made[operator] if outside[tensor])
            cut = cut.copy()
            for tensor in self._read[operator]:
                if outside[tensor]:
                    continue
                # Counted when the first of its consumers is decided to be outside.
                earlier = [item for item in arrays.consumers[tensor] if item < operator and decided[item]]
                cut += cost[tensor] * (rows[:, arrays.producers[tensor]] & rows[:, earlier].all(1))
            decided[operator] = True
            left -= float(self._work[operator])
            rows = np.concatenate([rows, more])
            work = np.concatenate([work, work[may] + self._work[operator]])
            cut = np.concatenate([cut, cut_more])
            keep = (work <= window.most) & (work + left >= window.least)
            keep &= (work + cut <= window.with_cut_before) & (work + left - cut >= window.with_cut_after)
            rows, work, cut = rows[keep], work[keep], cut[keep]
            if len(rows) > _MAXIMUM_IDEALS:
                return None
        return rows, work

    def _all_ideals(self, target: int, gains: Floats, pairs: int) -> tuple[int, str] | None:
        """As `_refute`, by listing the ideals of all windows; None if they are too many."""
        refuted = target + 1, "all ideals"
        arrays = self._arrays
        reached: Bits = np.zeros((1, arrays.count), np.bool_)
        reached_work = np.zeros(1)
        best = np.zeros(1)
        history: list[tuple[Bits, Integers]] = []
        for j in range(1, self._stages + 1):
            window = self._window(target, gains, j)
            most = min(window.most, float(reached_work.max()) + target)
            window = replace(window, most=most, excluded=window.excluded | (self._before > most))
            listed = self._ideals(window)
            if listed is None:
                return None
            ideals, work = listed
            if len(ideals) * len(reached) > pairs:
                return None
            if not len(ideals):
                return refuted
            choice = np.zeros(len(ideals), np.int64)
            value = np.full(len(ideals), np.inf)
            step = max(1, _CHUNK // len(reached))
            for first in range(0, len(ideals), step):
                if time.monotonic() > self._deadline:
                    return None
                part = slice(first, first + step)
                cost = self._costs(reached, reached_work, ideals[part], work[part])
                joined = np.maximum(best[:, None], cost)
                choice[part] = joined.argmin(axis=0)
                value[part] = joined.min(axis=0)
            whole, before = ideals.all(1), reached.all(1)
            if whole.any() and before.any() and best[before][0] < value[whole][0]:
                value[whole], choice[whole] = best[before][0], int(np.flatnonzero(before)[0])
            keep = value <= target + _TOLERANCE_NS
            if not keep.any():
                return refuted
            reached, reached_work, best = ideals[keep], work[keep], value[keep]
            history.append((reached, choice[keep]))
        chain = []
        at = int(np.flatnonzero(reached.all(1))[0])
        for ideals, choice in reversed(history):
            chain.append(ideals[at])
            at = int(choice[at])
        self._take(np.array(chain[::-1]))
        return math.ceil(float(best[reached.all(1)][0]) - _TOLERANCE_NS), "all ideals"

    def _costs(self, before: Bits, before_work: Floats, after: Bits, after_work: Floats) -> Floats:
        received, sent = self._arrays.transfers(before, after)
        cost = after_work[None, :] - before_work[:, None] + (received + sent) * self._rate
        if self._latency:
            cost = cost + self._latency * ((received > 0).astype(np.float64) + (sent > 0))
        cost[received >= FORBIDDEN] = np.inf
        return cost

    def _take(self, chain: Bits) -> None:
        """Make the partition of the chain `_found` if it is one on the real nodes, and better."""
        sizes = np.unique(np.concatenate([[0], chain.sum(1)])).tolist()
        stages = [(first, end, (node,)) for first, end, node in zip(sizes, sizes[1:], self._problem.nodes)]
        try:
            better = evaluate(
                self._problem, self._arrays.stage_order(chain), stages, lower_bound_ns=0, bound="", solver="ideals"
            )
        except PlanningError:
            return
        if better.value_ns < self._found.value_ns:
            self._found = better
