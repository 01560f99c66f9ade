"""What planners plan from: shard units with costs, nodes with measured speeds and memory.

Owns the two frozen input types and how they come out of a manifest and of a node's signed measurements. Promises
integers throughout, so that a plan can be recomputed bit for bit on any machine. Does not decide anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from eth_typing import ChecksumAddress

from bsns.protocol.identifiers import ProtocolError
from bsns.protocol.manifest import ModelManifest
from bsns.protocol.measurements import NodeMeasurements

# Sessions a node must be able to hold at once; the cache of each is counted at the length below.
DEFAULT_CONCURRENT_SESSIONS: Final = 4
DEFAULT_SESSION_TOKENS: Final = 2_048


class PlanningError(ProtocolError):
    """No plan exists for these units and nodes; the message names the unit or the node that stands in the way."""


@dataclass(frozen=True, slots=True)
class UnitCost:
    """One shard unit of a topological order.

    `work` is the declared cost of one token (two operations a weight), by which fees are split; `parameter_bytes` and
    `cache_bytes` fill a node's memory; `output_bytes` cross a cut after this unit, for each token.
    """

    index: int
    name: str
    kind: str
    work: int
    parameter_bytes: int
    cache_bytes: int
    output_bytes: int


@dataclass(frozen=True, slots=True)
class NodeCapability:
    """What one node can do: nanoseconds a decoded token takes in a unit of each kind, and bytes for weights and
    caches.
    """

    node: ChecksumAddress
    memory_bytes: int
    execution_class: bytes
    decode_nanoseconds: Mapping[str, int]

    def time_of(self, unit: UnitCost) -> int:
        """Nanoseconds of one decoded token in `unit`; PlanningError if the node did not measure its kind."""
        try:
            return self.decode_nanoseconds[unit.kind]
        except KeyError:
            raise PlanningError(
                f"node {self.node} did not measure units of kind {unit.kind!r} (unit {unit.index}, {unit.name}): "
                "it must send measurements for the whole model"
            ) from None


def unit_costs(
    manifest: ModelManifest,
    *,
    concurrent_sessions: int = DEFAULT_CONCURRENT_SESSIONS,
    session_tokens: int = DEFAULT_SESSION_TOKENS,
) -> tuple[UnitCost, ...]:
    """The units of `manifest` with their costs; blocks carry the cache of `concurrent_sessions` of `session_tokens`
    tokens each.
    """
    cache = concurrent_sessions * min(session_tokens, manifest.context_limit) * manifest.kv_bytes_per_token_per_block
    return tuple(
        UnitCost(
            index=unit.index,
            name=unit.name,
            kind=unit.kind,
            work=unit.flops_per_token,
            parameter_bytes=unit.size_bytes,
            cache_bytes=cache if unit.kind == "block" else 0,
            output_bytes=unit.output_bytes_per_token,
        )
        for unit in manifest.units
    )


def capability_of(measurements: NodeMeasurements) -> NodeCapability:
    """A node's capability as it measured and signed it."""
    return NodeCapability(
        node=measurements.node,
        memory_bytes=measurements.memory_bytes,
        execution_class=measurements.execution_class,
        decode_nanoseconds={item.unit_kind: item.decode_nanoseconds for item in measurements.unit_timings},
    )
