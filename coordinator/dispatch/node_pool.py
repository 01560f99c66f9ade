"""The nodes that are attached right now: their heartbeats, their load, and the queue of what is to be said to them.

Owns liveness, in memory only: after a restart nodes attach again. Promises at most one attachment a node (a new one
replaces the old) and bounded queues. Stakes and jail are on chain, measurements in the database.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from bsns.v1 import coordination_pb2


class PoolFullError(Exception):
    """The limit of attached nodes is reached."""


@dataclass(frozen=True, slots=True)
class PoolLimits:
    """How many nodes, how often they must be heard of, and how much may wait for one of them."""

    attached_nodes: int = 256
    heartbeat_seconds: float = 2.0
    missed_heartbeats: int = 3
    queued_messages: int = 16
    messages_per_minute: int = 600

    @property
    def silence_seconds(self) -> float:
        """After this long without a heartbeat a node counts as gone."""
        return self.heartbeat_seconds * self.missed_heartbeats


@dataclass(eq=False, slots=True)
class AttachedNode:
    """One attachment. `closed` is set when the pool has given it up; its stream must end then."""

    node: str
    attached_at: float
    last_heard: float
    outgoing: asyncio.Queue[coordination_pb2.AttachResponse]
    open_sessions: int = 0
    free_cache_bytes: int = 0
    chain_head: int = 0
    sequence: int = 0
    closed: asyncio.Event = field(default_factory=asyncio.Event)


class NodePool:
    """Attached nodes by address. `clock` counts seconds and never runs backwards."""

    def __init__(
        self, limits: PoolLimits, clock: Callable[[], float], on_change: Callable[[], None] = lambda: None
    ) -> None:
        self.limits = limits
        self._clock = clock
        self._on_change = on_change
        self._nodes: dict[str, AttachedNode] = {}
        self._changed_at = clock()

    @property
    def seconds_unchanged(self) -> float:
        """How long nobody has come, gone or sent new measurements."""
        return self._clock() - self._changed_at

    def attach(self, node: str) -> AttachedNode:
        """A new attachment of `node`; an older one is closed. PoolFullError at the limit."""
        old = self._nodes.pop(node, None)
        if old is not None:
            old.closed.set()
        if len(self._nodes) >= self.limits.attached_nodes:
            raise PoolFullError(f"{self.limits.attached_nodes} nodes are attached already")
        now = self._clock()
        attached = AttachedNode(node, now, now, asyncio.Queue(self.limits.queued_messages))
        self._nodes[node] = attached
        self.changed()
        return attached

    def detach(self, attached: AttachedNode) -> None:
        """End an attachment; nothing happens if it was replaced already."""
        attached.closed.set()
        if self._nodes.get(attached.node) is attached:
            del self._nodes[attached.node]
            self.changed()

    def heartbeat(self, attached: AttachedNode, heartbeat: coordination_pb2.Heartbeat) -> None:
        """Take note of a sign of life."""
        attached.last_heard = self._clock()
        attached.sequence = heartbeat.sequence
        attached.open_sessions = heartbeat.open_sessions
        attached.free_cache_bytes = heartbeat.free_cache_bytes
        attached.chain_head = heartbeat.chain_head

    def changed(self) -> None:
        """Somebody came, went or sent measurements: plans may have to change."""
        self._changed_at = self._clock()
        self._on_change()

    def live(self) -> dict[str, AttachedNode]:
        """Nodes heard of within the limit, by address in ascending order; the silent ones are given up."""
        now = self._clock()
        for attached in [item for item in self._nodes.values() if now - item.last_heard > self.limits.silence_seconds]:
            self.detach(attached)
        return {node: self._nodes[node] for node in sorted(self._nodes)}

    def tell(self, node: str, message: coordination_pb2.AttachResponse) -> bool:
        """Queue `message` for `node`; False if it is not attached or reads too slowly (it is given up then)."""
        attached = self._nodes.get(node)
        if attached is None:
            return False
        try:
            attached.outgoing.put_nowait(message)
        except asyncio.QueueFull:
            self.detach(attached)
            return False
        return True

    def close(self) -> None:
        """End every attachment."""
        for attached in list(self._nodes.values()):
            self.detach(attached)
