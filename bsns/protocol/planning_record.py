"""The planning record: everything a planner was given, in the one encoding whose hash a plan carries on chain.

Owns the canonical bytes behind `measurementsHash` of ShardAssignments: which planner ran, on which terms, with which
seed, and every considered node's measurements with the signature it gave for them. Promises that equal records have
equal bytes, and that `from_bytes` takes nothing that `to_bytes` would not have written. Does not plan
(bsns.planning.published) and does not judge signatures or ages (bsns.audit.plan).
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Final

from eth_abi.abi import decode, encode
from eth_abi.exceptions import DecodingError

from bsns.protocol.identifiers import ModelId, ProtocolError, keccak256, require_bytes32
from bsns.protocol.measurements import NodeMeasurements
from bsns.protocol.plan import MAXIMUM_STAGES
from bsns.protocol.typed_data import SIGNATURE_LENGTH, Domain

MAXIMUM_ANNOUNCED_BYTES: Final = 96 * 1024
"""Largest document that ShardAssignments.announce takes."""
# A record is fetched from strangers, so every part has a bound.
MAXIMUM_RECORD_BYTES: Final = 32 * 1024 * 1024
MAXIMUM_RECORDED_NODES: Final = 1_024
_MAXIMUM_NAME_LENGTH: Final = 32
_MAXIMUM_UINT16: Final = 2**16 - 1
_MAXIMUM_UINT32: Final = 2**32 - 1
_MAXIMUM_UINT64: Final = 2**64 - 1
# Contents and signatures lie end to end, not as an array of byte strings: in the latter, a few kilobytes whose offsets
# all point at one long string would decode to gigabytes.
_RECORD_ABI: Final = [
    "(string,uint32)",
    "bytes32",
    "string",
    "(uint16,uint16,bool,uint32,uint32,string)",
    "uint32",
    "uint32",
    "(uint64,uint64)",
    "(bytes32,uint32,uint64,uint32,uint32)",
    "(address,uint64,uint32)[]",
    "bytes",
    "bytes",
]


@dataclass(frozen=True, slots=True)
class SignedMeasurements:
    """One node's measurements with its 65-byte signature (EIP-712 Measurements); whether it is the node's own is for
    `is_authentic` to say.
    """

    measurements: NodeMeasurements
    signature: bytes

    def __post_init__(self) -> None:
        if len(self.signature) != SIGNATURE_LENGTH:
            raise ProtocolError(
                f"the signature of {self.measurements.node} has {len(self.signature)} bytes, not {SIGNATURE_LENGTH}"
            )

    def is_authentic(self, assignments: Domain) -> bool:
        """Whether the node signed these very measurements; `assignments` is `typed_data.assignments_domain`."""
        return self.measurements.is_signed(assignments, self.signature)


@dataclass(frozen=True, slots=True)
class RebalancingTerms:
    """What was given besides where a plan replaces another one: `previous_plan`, its 32-byte plan id, and by what a
    change was judged (bsns.planning.rebalancing.MoveTerms): seconds, bytes a second, twice hundredths of a per cent.
    """

    previous_plan: bytes
    horizon_seconds: int
    load_bytes_per_second: int
    minimum_gain_bps: int
    minimum_drift_gain_bps: int

    def __post_init__(self) -> None:
        require_bytes32(self.previous_plan, "previous plan id")
        if not any(self.previous_plan):
            raise ProtocolError("the previous plan's id is zero: a first plan has no rebalancing terms")
        _require(self.horizon_seconds, "horizon_seconds", 1, _MAXIMUM_UINT32)
        _require(self.load_bytes_per_second, "load_bytes_per_second", 1, _MAXIMUM_UINT64)
        _require(self.minimum_gain_bps, "minimum_gain_bps", 0, _MAXIMUM_UINT32)
        _require(self.minimum_drift_gain_bps, "minimum_drift_gain_bps", 0, _MAXIMUM_UINT32)


@dataclass(frozen=True)
class PlanningRecord:
    """What one planning run was given. `measurements` are sorted by node address, each node once.

    `planner` and `planner_version` name the procedure, `objective` and `transfers` are the words of
    bsns.planning.problem. `stage_count` None leaves the number to the planner. `batch` is the number of sessions whose
    measured times were taken. A pair of nodes that measured no link has the prior: nanoseconds until the first byte,
    then bytes a second. `rebalancing` is None where no plan was in force. ProtocolError for anything out of range.
    """

    planner: str
    planner_version: int
    model: ModelId
    objective: str
    stage_count: int | None
    replicas: int
    spread_leftover: bool
    concurrent_sessions: int
    session_tokens: int
    transfers: str
    seed: int
    batch: int
    prior_latency_ns: int
    prior_bytes_per_second: int
    measurements: tuple[SignedMeasurements, ...]
    rebalancing: RebalancingTerms | None = None

    def __post_init__(self) -> None:
        ordered = tuple(sorted(self.measurements, key=lambda item: bytes.fromhex(item.measurements.node[2:])))
        object.__setattr__(self, "measurements", ordered)
        require_bytes32(self.model, "model id")
        for name in ("planner", "objective", "transfers"):
            value = getattr(self, name)
            if not 1 <= len(value) <= _MAXIMUM_NAME_LENGTH or not value.isascii() or not value.isprintable():
                raise ProtocolError(
                    f"{name} of a planning record is {value!r:.80}, expected 1 to {_MAXIMUM_NAME_LENGTH} ASCII letters"
                )
        if self.stage_count is not None:
            _require(self.stage_count, "stage_count", 1, MAXIMUM_STAGES)
        _require(self.replicas, "replicas", 1, _MAXIMUM_UINT16)
        _require(self.planner_version, "planner_version", 0, _MAXIMUM_UINT32)
        _require(self.concurrent_sessions, "concurrent_sessions", 1, _MAXIMUM_UINT32)
        _require(self.session_tokens, "session_tokens", 1, _MAXIMUM_UINT32)
        _require(self.seed, "seed", 0, _MAXIMUM_UINT32)
        _require(self.batch, "batch", 1, _MAXIMUM_UINT32)
        _require(self.prior_latency_ns, "prior_latency_ns", 0, _MAXIMUM_UINT64)
        _require(self.prior_bytes_per_second, "prior_bytes_per_second", 1, _MAXIMUM_UINT64)
        _require(len(ordered), "number of nodes", 1, MAXIMUM_RECORDED_NODES)
        for before, item in pairwise(ordered):
            if before.measurements.node == item.measurements.node:
                raise ProtocolError(f"a planning record holds node {item.measurements.node} twice")
        for item in ordered:
            if item.measurements.model != self.model:
                raise ProtocolError(f"node {item.measurements.node} measured another model than the record's")
        if len(self.to_bytes()) > MAXIMUM_RECORD_BYTES:
            raise ProtocolError(
                f"the planning record has {len(self.to_bytes())} bytes, at most {MAXIMUM_RECORD_BYTES} are taken: "
                "plan over fewer nodes"
            )

    @cached_property
    def _bytes(self) -> bytes:
        nodes = [item.measurements for item in self.measurements]
        contents = [item.content for item in nodes]
        return encode(
            _RECORD_ABI,
            [
                (self.planner, self.planner_version),
                self.model,
                self.objective,
                (
                    self.stage_count or 0,
                    self.replicas,
                    self.spread_leftover,
                    self.concurrent_sessions,
                    self.session_tokens,
                    self.transfers,
                ),
                self.seed,
                self.batch,
                (self.prior_latency_ns, self.prior_bytes_per_second),
                (bytes(32), 0, 0, 0, 0) if self.rebalancing is None else astuple(self.rebalancing),
                [(item.node, item.measured_at, len(content)) for item, content in zip(nodes, contents, strict=True)],
                b"".join(contents),
                b"".join(item.signature for item in self.measurements),
            ],
        )

    def to_bytes(self) -> bytes:
        """Canonical encoding: abi.encode of the fields in docs/protocol.md, "Planning record"."""
        return self._bytes

    @cached_property
    def hash(self) -> bytes:
        """keccak256 of the canonical bytes: the plan's measurementsHash, 32 bytes."""
        return keccak256(self._bytes)

    @classmethod
    def from_bytes(cls, data: bytes) -> PlanningRecord:
        """The inverse of `to_bytes`. ProtocolError for bytes that it would not have written."""
        if len(data) > MAXIMUM_RECORD_BYTES:
            raise ProtocolError(f"a planning record has {len(data)} bytes, at most {MAXIMUM_RECORD_BYTES} are taken")
        try:
            values: tuple[Any, ...] = decode(_RECORD_ABI, data)
        except (DecodingError, UnicodeDecodeError, OverflowError) as error:
            raise ProtocolError(f"not a planning record: {type(error).__name__}: {error}") from error
        (planner, version), model, objective, terms, seed, batch, prior, moves, nodes, contents, signatures = values
        stage_count, replicas, spread_leftover, concurrent_sessions, session_tokens, transfers = terms
        record = cls(
            planner=planner,
            planner_version=version,
            model=ModelId(model),
            objective=objective,
            stage_count=stage_count or None,
            replicas=replicas,
            spread_leftover=spread_leftover,
            concurrent_sessions=concurrent_sessions,
            session_tokens=session_tokens,
            transfers=transfers,
            seed=seed,
            batch=batch,
            prior_latency_ns=prior[0],
            prior_bytes_per_second=prior[1],
            rebalancing=RebalancingTerms(*moves) if any(moves[0]) else None,
            measurements=_signed_measurements(ModelId(model), nodes, contents, signatures),
        )
        if record.to_bytes() != data:
            raise ProtocolError("the bytes of the planning record are not canonical (nodes in order, no gaps)")
        return record


def _signed_measurements(
    model: ModelId, nodes: tuple[tuple[str, int, int], ...], contents: bytes, signatures: bytes
) -> tuple[SignedMeasurements, ...]:
    _require(len(nodes), "number of nodes", 1, MAXIMUM_RECORDED_NODES)
    sizes = [size for _, _, size in nodes]
    if sum(sizes) != len(contents) or len(signatures) != SIGNATURE_LENGTH * len(nodes):
        raise ProtocolError(
            f"a planning record of {len(nodes)} nodes needs {sum(sizes)} bytes of measurements and "
            f"{SIGNATURE_LENGTH * len(nodes)} of signatures, it has {len(contents)} and {len(signatures)}"
        )
    found, offset = [], 0
    for index, (node, measured_at, size) in enumerate(nodes):
        measurements = NodeMeasurements.from_content(model, node, measured_at, contents[offset : offset + size])
        signature = signatures[index * SIGNATURE_LENGTH : (index + 1) * SIGNATURE_LENGTH]
        found.append(SignedMeasurements(measurements, signature))
        offset += size
    return tuple(found)


def _require(value: int, name: str, minimum: int, maximum: int) -> None:
    if not minimum <= value <= maximum:
        raise ProtocolError(f"{name} of a planning record is {value!r}, expected {minimum} to {maximum}")
