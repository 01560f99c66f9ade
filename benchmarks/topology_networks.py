"""Emulated networks for `make bench-topology`: five families of 20 to 1,000 nodes, and a model to shard over them.

Seeded. Nodes differ in speed by a factor of eight and in room by a factor of six, links in latency by their family and
in throughput by a factor of ten. A churned network is one of the others in which a third of the nodes were exchanged
for others.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import numpy as np

from benchmarks.routing import latencies
from bsns.planning import Link, Links, Objective, PlanningNode, Problem, Terms
from bsns.protocol.identifiers import address
from bsns.protocol.model_graph import MODEL_INPUT, ModelGraph, Operator, Parameter, Tensor

FAMILIES: Final = ("regions", "star", "ring", "geometric", "churned")
BLOCKS: Final = 48
_BLOCK_BYTES: Final = 200_000_000
_CUT_BYTES: Final = 8_192
_BLOCK_NS: Final = 4_000_000
_SPREAD_OF_SPEED: Final = 8.0
_ROOM: Final = (4, 24)
_BYTES_PER_SECOND: Final = (12_500_000, 125_000_000)
_CHURNED: Final = 1 / 3


def model() -> ModelGraph:
    """48 equal blocks, 9.6 GB of weights."""
    return ModelGraph(
        f"{BLOCKS} blocks",
        tuple(Operator(f"block {number}", "block", 1, (number,)) for number in range(BLOCKS)),
        (
            Tensor("input", MODEL_INPUT, (0,), 8),
            *(
                Tensor(f"cut {at}", at, (at + 1,) if at + 1 < BLOCKS else (), _CUT_BYTES, at + 1 == BLOCKS)
                for at in range(BLOCKS)
            ),
        ),
        tuple(Parameter(f"weights {number}", _BLOCK_BYTES) for number in range(BLOCKS)),
    )


def network(family: str, count: int, seed: int, objective: Objective) -> Problem:
    """The planning problem of `count` nodes, all links measured."""
    draw = np.random.default_rng([FAMILIES.index(family), count, seed])
    base = FAMILIES[int(draw.integers(0, 4))] if family == "churned" else family
    extra = round(_CHURNED * count) if family == "churned" else 0
    table = latencies(base, count + extra, draw)
    table *= np.exp(draw.normal(0, 0.05, table.shape))
    # Of a churned network those stay that were not exchanged, and the newcomers are the last.
    stay = np.sort(draw.permutation(count)[: count - extra])
    members = np.concatenate([stay, np.arange(count, count + extra)]) if extra else np.arange(count)
    table = table[np.ix_(members, members)]
    speeds = _SPREAD_OF_SPEED ** draw.random(count)
    rooms = np.exp(draw.uniform(np.log(_ROOM[0]), np.log(_ROOM[1] + 1), count)).astype(int)
    rates = np.exp(draw.uniform(*np.log(_BYTES_PER_SECOND), count))
    nodes = tuple(
        PlanningNode(
            address((int(seed) * 1_000_000 + int(member) + 1).to_bytes(20, "big")),
            int(room) * _BLOCK_BYTES,
            bytes(32),
            {"block": round(_BLOCK_NS / speed)},
        )
        for member, speed, room in zip(members, speeds, rooms, strict=True)
    )
    measured = {
        (nodes[one].node, nodes[two].node): Link(round(1e6 * table[one, two]), int(min(rates[one], rates[two])))
        for one, two in _pairs(count)
    }
    return Problem(model(), nodes, Links(None, measured), objective, Terms(concurrent_sessions=1, session_tokens=1))


def _pairs(count: int) -> Iterator[tuple[int, int]]:
    return ((one, two) for one in range(count) for two in range(count) if one != two)
