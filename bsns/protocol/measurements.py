"""What a node measured about itself for one model, in the one encoding that is hashed, signed and planned from.

Owns the canonical encoding of `bsns.v1.Measurements` and its two hashes: the content hash a node signs (EIP-712
Measurements under the domain of ShardAssignments) and the hash of a set of measurements that a plan carries on chain,
from which anyone can recompute the plan. Promises that equal measurements have equal bytes whatever order their parts
were given in. Does not measure, and does not judge whether a value is plausible: only that it is well formed and
within the limits below.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from eth_abi.abi import encode
from eth_typing import ChecksumAddress

from bsns.protocol.identifiers import ModelId, ProtocolError, abi_hash, address, keccak256, require_bytes32
from bsns.protocol.typed_data import MEASUREMENTS, Domain, is_signed_by, signing_digest
from bsns.v1 import coordination_pb2

# A stranger sends these, so every part has a bound.
MAXIMUM_UNIT_KINDS: Final = 64
MAXIMUM_UNIT_KIND_LENGTH: Final = 64
MAXIMUM_LINKS: Final = 1024
_MAXIMUM_UINT64: Final = 2**64 - 1
_CONTENT_ABI: Final = ["bytes32", "uint64", "(string,uint64,uint64)[]", "(address,uint64,uint64)[]"]


@dataclass(frozen=True, slots=True, order=True)
class UnitTiming:
    """Nanoseconds a unit of `unit_kind` takes: one decoded token, and one token within a prefill of 64."""

    unit_kind: str
    decode_nanoseconds: int
    prefill_nanoseconds: int


@dataclass(frozen=True, slots=True, order=True)
class LinkTiming:
    """How far another node is: round trip of a small message in nanoseconds, throughput in bytes a second."""

    node: ChecksumAddress
    round_trip_nanoseconds: int
    bytes_per_second: int


@dataclass(frozen=True)
class NodeMeasurements:
    """One node's measurements for one model. Timings are sorted by kind, links by node; both without repetition.

    `memory_bytes` is what the node gives to weights and caches, `measured_at` Unix seconds, `execution_class` 32 bytes
    (bsns.protocol.plan.execution_class_id). Raises ProtocolError for anything malformed, and says which part.
    """

    model: ModelId
    node: ChecksumAddress
    measured_at: int
    execution_class: bytes
    memory_bytes: int
    unit_timings: tuple[UnitTiming, ...]
    links: tuple[LinkTiming, ...] = ()

    def __post_init__(self) -> None:
        require_bytes32(self.model, "model id")
        require_bytes32(self.execution_class, "execution class")
        object.__setattr__(self, "node", address(self.node))
        object.__setattr__(self, "unit_timings", tuple(sorted(self.unit_timings)))
        links = (
            LinkTiming(address(link.node), link.round_trip_nanoseconds, link.bytes_per_second) for link in self.links
        )
        object.__setattr__(self, "links", tuple(sorted(links)))
        _require_uint64(self.measured_at, "measured_at")
        _require_uint64(self.memory_bytes, "memory_bytes", minimum=1)
        if not 1 <= len(self.unit_timings) <= MAXIMUM_UNIT_KINDS:
            raise ProtocolError(
                f"measurements hold {len(self.unit_timings)} unit timings, expected 1 to {MAXIMUM_UNIT_KINDS}"
            )
        if len(self.links) > MAXIMUM_LINKS:
            raise ProtocolError(f"measurements hold {len(self.links)} links, at most {MAXIMUM_LINKS} are taken")
        for timing in self.unit_timings:
            if not 1 <= len(timing.unit_kind) <= MAXIMUM_UNIT_KIND_LENGTH or not timing.unit_kind.isprintable():
                raise ProtocolError(
                    f"unit kind {timing.unit_kind!r:.80} is not 1 to {MAXIMUM_UNIT_KIND_LENGTH} printable characters"
                )
            _require_uint64(timing.decode_nanoseconds, f"decode time of {timing.unit_kind!r}", minimum=1)
            _require_uint64(timing.prefill_nanoseconds, f"prefill time of {timing.unit_kind!r}", minimum=1)
        for link in self.links:
            _require_uint64(link.round_trip_nanoseconds, f"round trip to {link.node}")
            _require_uint64(link.bytes_per_second, f"throughput to {link.node}")
        if len({timing.unit_kind for timing in self.unit_timings}) != len(self.unit_timings):
            raise ProtocolError("measurements time one unit kind twice")
        if len({link.node for link in self.links}) != len(self.links):
            raise ProtocolError("measurements hold one link twice")

    @property
    def content(self) -> bytes:
        """Canonical encoding of what was measured: abi.encode(executionClass, memoryBytes, unitTimings, links)."""
        return encode(
            _CONTENT_ABI,
            [
                self.execution_class,
                self.memory_bytes,
                [(item.unit_kind, item.decode_nanoseconds, item.prefill_nanoseconds) for item in self.unit_timings],
                [(item.node, item.round_trip_nanoseconds, item.bytes_per_second) for item in self.links],
            ],
        )

    @property
    def content_hash(self) -> bytes:
        """keccak256 of `content`, 32 bytes."""
        return keccak256(self.content)

    @property
    def leaf(self) -> bytes:
        """This node's part of a set's hash: keccak256(abi.encode(modelId, node, contentHash, measuredAt))."""
        return abi_hash(
            ["bytes32", "address", "bytes32", "uint64"], [self.model, self.node, self.content_hash, self.measured_at]
        )

    def decode_nanoseconds(self, unit_kind: str) -> int:
        """Time of one decoded token in a unit of `unit_kind`; ProtocolError if the node did not measure that kind."""
        for timing in self.unit_timings:
            if timing.unit_kind == unit_kind:
                return timing.decode_nanoseconds
        raise ProtocolError(f"node {self.node} did not measure units of kind {unit_kind!r}")

    def signing_digest(self, assignments: Domain) -> bytes:
        """The 32 bytes the node signs; `assignments` is `typed_data.assignments_domain`."""
        return signing_digest(assignments, MEASUREMENTS, (self.model, self.node, self.content_hash, self.measured_at))

    def is_signed(self, assignments: Domain, signature: bytes) -> bool:
        """Whether `signature` (65 bytes) is the node's own over these measurements."""
        return is_signed_by(self.signing_digest(assignments), signature, self.node)

    def to_message(self, signature: bytes) -> coordination_pb2.Measurements:
        """The wire message with the node's `signature`."""
        return coordination_pb2.Measurements(
            model_id=self.model,
            node=bytes.fromhex(self.node[2:]),
            measured_at=self.measured_at,
            execution_class=self.execution_class,
            memory_bytes=self.memory_bytes,
            unit_timings=[
                coordination_pb2.UnitTiming(
                    unit_kind=item.unit_kind,
                    decode_nanoseconds=item.decode_nanoseconds,
                    prefill_nanoseconds=item.prefill_nanoseconds,
                )
                for item in self.unit_timings
            ],
            links=[
                coordination_pb2.LinkTiming(
                    node=bytes.fromhex(item.node[2:]),
                    round_trip_nanoseconds=item.round_trip_nanoseconds,
                    bytes_per_second=item.bytes_per_second,
                )
                for item in self.links
            ],
            signature=signature,
        )

    @classmethod
    def from_message(cls, message: coordination_pb2.Measurements) -> NodeMeasurements:
        """Parses the wire message (its signature is not checked here); ProtocolError if it is malformed."""
        return cls(
            model=ModelId(require_bytes32(message.model_id, "model id")),
            node=address(bytes(message.node)),
            measured_at=message.measured_at,
            execution_class=bytes(message.execution_class),
            memory_bytes=message.memory_bytes,
            unit_timings=tuple(
                UnitTiming(item.unit_kind, item.decode_nanoseconds, item.prefill_nanoseconds)
                for item in message.unit_timings
            ),
            links=tuple(
                LinkTiming(address(bytes(item.node)), item.round_trip_nanoseconds, item.bytes_per_second)
                for item in message.links
            ),
        )


def measurements_hash(measurements: Iterable[NodeMeasurements]) -> bytes:
    """Hash of the set a plan was computed from: keccak256(abi.encode(leaves)), leaves in ascending order of the
    node's address.

    ProtocolError if the set is empty or holds a node twice.
    """
    ordered = sorted(measurements, key=lambda item: bytes.fromhex(item.node[2:]))
    if not ordered:
        raise ProtocolError("a plan is computed from the measurements of at least one node")
    if len({item.node for item in ordered}) != len(ordered):
        raise ProtocolError("a set of measurements holds one node twice")
    return abi_hash(["bytes32[]"], [[item.leaf for item in ordered]])


def _require_uint64(value: int, name: str, minimum: int = 0) -> None:
    if not minimum <= value <= _MAXIMUM_UINT64:
        raise ProtocolError(f"{name} is {value!r}, expected an integer from {minimum} to 2**64-1")
