"""What a node measured about itself for one model, in the one encoding that is hashed, signed and planned from.

Owns the canonical encoding of `bsns.v1.Measurements` and the content hash that a node signs (EIP-712 Measurements
under the domain of ShardAssignments). Promises that equal measurements have equal bytes whatever order their parts were
given in, and that `from_content` takes nothing that `content` would not have given. Does not measure, and does not
judge whether a value is plausible: only that it is well formed and within the limits below.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, fields
from typing import Final

from eth_abi.abi import decode, encode
from eth_abi.exceptions import DecodingError
from eth_typing import ChecksumAddress

from bsns.protocol.identifiers import ModelId, ProtocolError, address, keccak256, require_bytes32
from bsns.protocol.typed_data import MEASUREMENTS, Domain, is_signed_by, signing_digest
from bsns.v1 import coordination_pb2

# What the timings of `UnitTiming` are taken with.
PREFILL_TOKENS: Final = 64
BATCHED_SESSIONS: Final = 8
# A stranger sends these, so every part has a bound. An exported model has one kind for each of its units.
MAXIMUM_UNIT_KINDS: Final = 512
MAXIMUM_UNIT_KIND_LENGTH: Final = 64
MAXIMUM_LINKS: Final = 256
# No content within these limits is larger: 4 bytes a character, four times and three fields, and ten words around them.
MAXIMUM_CONTENT_BYTES: Final = (4 * MAXIMUM_UNIT_KIND_LENGTH + 1 + 128) * MAXIMUM_UNIT_KINDS + 96 * MAXIMUM_LINKS + 320
_MAXIMUM_UINT64: Final = 2**64 - 1
# The kinds are one string, a line each, and not part of the tuples: an array of strings may point at one long string
# many times over, so that a small content would decode to gigabytes.
_CONTENT_ABI: Final = [
    "bytes32",
    "uint64",
    "string",
    "(uint64,uint64,uint64,uint64)[]",
    "(address,uint64,uint64)[]",
]


@dataclass(frozen=True, slots=True, order=True)
class UnitTiming:
    """Nanoseconds that one unit takes; `unit_kind` is the `timing_key` of the manifest's units it stands for.

    `decode`: a step of one session with one new token. `prefill`: a step of one session with `PREFILL_TOKENS` tokens,
    divided by its tokens. `batched_decode`: a step of `BATCHED_SESSIONS` sessions, each with one new token, the whole
    step undivided. `batched_prefill`: a step of as many sessions, each with `PREFILL_TOKENS` tokens, divided by the
    tokens of one of them. A model whose context is shorter is measured with as many tokens as it takes.
    """

    unit_kind: str
    decode_nanoseconds: int
    prefill_nanoseconds: int
    batched_decode_nanoseconds: int
    batched_prefill_nanoseconds: int


@dataclass(frozen=True, slots=True, order=True)
class LinkTiming:
    """The way to another node: round trip of a small message in nanoseconds, and throughput to it in bytes a second."""

    node: ChecksumAddress
    round_trip_nanoseconds: int
    bytes_per_second: int


@dataclass(frozen=True)
class NodeMeasurements:
    """One node's measurements for one model. Timings are sorted by kind, links by node; both without repetition, and
    no link leads to the node itself.

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
            for field in fields(timing)[1:]:
                _require_uint64(getattr(timing, field.name), f"{field.name} of {timing.unit_kind!r}", minimum=1)
        for link in self.links:
            if link.node == self.node:
                raise ProtocolError(f"measurements of {self.node} hold a link to the node itself")
            _require_uint64(link.round_trip_nanoseconds, f"round trip to {link.node}", minimum=1)
            _require_uint64(link.bytes_per_second, f"throughput to {link.node}", minimum=1)
        if len({timing.unit_kind for timing in self.unit_timings}) != len(self.unit_timings):
            raise ProtocolError("measurements time one unit kind twice")
        if len({link.node for link in self.links}) != len(self.links):
            raise ProtocolError("measurements hold one link twice")

    @property
    def content(self) -> bytes:
        """Canonical encoding of what was measured: abi.encode(executionClass, memoryBytes, kinds, times, links), where
        the unit kinds are the lines of one string, with four times each; all in ascending order.
        """
        return encode(
            _CONTENT_ABI,
            [
                self.execution_class,
                self.memory_bytes,
                "\n".join(item.unit_kind for item in self.unit_timings),
                [astuple(item)[1:] for item in self.unit_timings],
                [astuple(item) for item in self.links],
            ],
        )

    @classmethod
    def from_content(cls, model: ModelId, node: str | bytes, measured_at: int, content: bytes) -> NodeMeasurements:
        """The inverse of `content`. ProtocolError for bytes that are malformed, beyond a limit, or not canonical."""
        if len(content) > MAXIMUM_CONTENT_BYTES:
            raise ProtocolError(
                f"the content of measurements has {len(content)} bytes, at most {MAXIMUM_CONTENT_BYTES} are taken"
            )
        try:
            execution_class, memory_bytes, kinds, times, links = decode(_CONTENT_ABI, content)
        except (DecodingError, OverflowError, UnicodeDecodeError) as error:
            raise ProtocolError(f"the content of measurements does not decode: {error}") from error
        unit_kinds = kinds.split("\n")
        if len(unit_kinds) != len(times):
            raise ProtocolError(
                f"the content of measurements names {len(unit_kinds)} unit kinds and times {len(times)}"
            )
        decoded = cls(
            model=model,
            node=address(node),
            measured_at=measured_at,
            execution_class=execution_class,
            memory_bytes=memory_bytes,
            unit_timings=tuple(UnitTiming(kind, *item) for kind, item in zip(unit_kinds, times, strict=True)),
            links=tuple(LinkTiming(address(item[0]), *item[1:]) for item in links),
        )
        if decoded.content != content:
            raise ProtocolError("the content of measurements is not in its canonical encoding")
        return decoded

    @property
    def content_hash(self) -> bytes:
        """keccak256 of `content`, 32 bytes."""
        return keccak256(self.content)

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
                    batched_decode_nanoseconds=item.batched_decode_nanoseconds,
                    batched_prefill_nanoseconds=item.batched_prefill_nanoseconds,
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
                UnitTiming(
                    item.unit_kind,
                    item.decode_nanoseconds,
                    item.prefill_nanoseconds,
                    item.batched_decode_nanoseconds,
                    item.batched_prefill_nanoseconds,
                )
                for item in message.unit_timings
            ),
            links=tuple(
                LinkTiming(address(bytes(item.node)), item.round_trip_nanoseconds, item.bytes_per_second)
                for item in message.links
            ),
        )


def _require_uint64(value: int, name: str, minimum: int = 0) -> None:
    if not minimum <= value <= _MAXIMUM_UINT64:
        raise ProtocolError(f"{name} is {value!r}, expected an integer from {minimum} to 2**64-1")
