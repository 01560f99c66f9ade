"""Nodes near one another that are worth a plan of their own: starts for the search over stages with replicas.

Owns the choice of neighbourhoods: a centre and the nodes that are nearest to it by measured hops. Between stages the
slowest pair of nodes counts, so that a few far nodes can cost more than they compute, and a search that moves one node
at a time never leaves all of them out. Promises the same answer on any machine. Does not place anything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from bsns.planning.chain import NEVER, Chain, Integers

NEIGHBOURHOODS: Final = 4
"""Neighbourhoods that are given back."""
_GROWTH: Final = 1.3
"""Sizes that are looked at grow by this factor."""
_CENTRES: Final = 4
"""Centres that are kept for each size and number of stages."""
_SCALE: Final = 2**50
_SIMILAR: Final = 0.8
"""Neighbourhoods that share this part of the larger one count as one."""


@dataclass(frozen=True, slots=True)
class Neighbourhood:
    """`nodes` ascending, in `stage_count` stages of equal work; `estimate_ns` is what its slowest stage would take if
    work and nodes could be divided at will.
    """

    nodes: tuple[int, ...]
    stage_count: int
    estimate_ns: float


def neighbourhoods(chain: Chain, stage_counts: Sequence[int]) -> list[Neighbourhood]:
    """The most promising ones, the best first."""
    both = np.maximum(chain.usual_hops, chain.usual_hops.T)
    order = np.argsort(both, axis=1, kind="stable")
    away = np.take_along_axis(both, order, axis=1)
    row = chain.prefix[:, -1]
    found: list[tuple[float, int, int, int]] = []
    for size in _sizes(chain):
        radius = away[:, size - 1]
        reached = radius < NEVER
        for count in stage_counts:
            if count * chain.problem.terms.replicas > size:
                continue
            estimate = _estimate(chain, row[order[:, :size]], chain.reach[order[:, :size], 0], count, radius)
            estimate[~reached] = np.inf
            best = np.argsort(estimate, kind="stable")[:_CENTRES]
            found += [(float(estimate[at]), size, count, int(at)) for at in best if np.isfinite(estimate[at])]
    chosen: list[Neighbourhood] = []
    for value, size, count, centre in sorted(found):
        item = Neighbourhood(tuple(sorted(order[centre, :size].tolist())), count, value)
        if not any(_is_similar(item, other) for other in chosen):
            chosen.append(item)
        if len(chosen) == NEIGHBOURHOODS:
            break
    return chosen


def _sizes(chain: Chain) -> list[int]:
    sizes, size = [], float(max(chain.problem.terms.replicas, 2))
    while round(size) < chain.nodes:
        sizes.append(round(size))
        size = max(size + 1, size * _GROWTH)
    return [*sizes, chain.nodes]


def _estimate(chain: Chain, row: Integers, room: Integers, count: int, radius: Integers) -> NDArray[np.float64]:
    """Nanoseconds of a stage by candidate (the first axis): each node has 1/count of a row, and of all nodes with room
    for that a stage has 1/count. A hop counts the way from the centre to the last node: some pairs are further apart,
    most nearer. Rates are integers, so that their sum is the same on any machine.
    """
    hop = radius[:, None] * (2 if count > 1 else 0)
    fits = room * count >= chain.units
    rate = np.where(fits, _SCALE // np.maximum(row // count + hop, 1), 0)
    enough = fits.sum(axis=1) >= count * chain.problem.terms.replicas
    total = np.maximum(rate.sum(axis=1), 1)
    return np.where(enough, count * float(_SCALE) / total, np.inf)


def _is_similar(one: Neighbourhood, other: Neighbourhood) -> bool:
    if one.stage_count != other.stage_count:
        return False
    shared = len(set(one.nodes) & set(other.nodes))
    return shared >= _SIMILAR * max(len(one.nodes), len(other.nodes))
