"""Who else could take over a stage of a request, and who has failed too often lately.

Owns the choice among the replicas of the plan that was paid for, and the back-off of nodes that did not answer.
Promises that only nodes of the same stage and execution class are proposed, those that have not failed lately first,
the fastest (by the plan) first among them. Talks to nobody.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Final

from bsns.protocol.plan import Assignment, ShardPlan
from bsns.requester.node_connection import NodeEndpoint

FIRST_PAUSE_S: Final = 5.0
MAXIMUM_PAUSE_S: Final = 300.0
# Nodes that are remembered; the one that failed the longest ago is forgotten first.
_REMEMBERED: Final = 1_024


class NodeBackoff:
    """How long nodes that failed are avoided: twice as long each time in a row."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        # Until when, and for how long that was.
        self._pauses: dict[str, tuple[float, float]] = {}

    def failed(self, node: str) -> None:
        """The node did not answer, or broke off."""
        _, before = self._pauses.pop(node, (0.0, FIRST_PAUSE_S / 2))
        pause = min(MAXIMUM_PAUSE_S, 2 * before)
        if len(self._pauses) >= _REMEMBERED:
            del self._pauses[next(iter(self._pauses))]
        self._pauses[node] = self._clock() + pause, pause

    def served(self, node: str) -> None:
        """The node did its part of an answer to its end."""
        self._pauses.pop(node, None)

    def is_avoided(self, node: str) -> bool:
        return self._clock() < self._pauses.get(node, (0.0, 0.0))[0]


@dataclass(frozen=True)
class Standby:
    """The plan of a request, and where its nodes are."""

    plan: ShardPlan
    endpoints: Mapping[str, NodeEndpoint]

    def candidates(
        self, stage: int, node: str, failed: Container[str], backoff: NodeBackoff, *, any_class: bool
    ) -> tuple[Assignment, ...]:
        """Replicas of `stage` beside `node` that are not among the `failed`, the best first. Whoever takes outputs over
        has to compute the same: of the class of `node`, unless `any_class` will do.
        """
        replicas = self.plan.replicas(stage)
        classes = {item.execution_class for item in replicas if any_class or item.node == node}
        found = [
            item
            for item in replicas
            if item.node != node
            and item.node not in failed
            and item.node in self.endpoints
            and item.execution_class in classes
        ]
        return tuple(sorted(found, key=lambda item: (backoff.is_avoided(item.node), item.replica)))


__all__ = ["NodeBackoff", "Standby"]
