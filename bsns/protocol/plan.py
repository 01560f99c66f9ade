"""Shard plans: which node serves which run of shard units, as leaves of one root (contracts/types/Assignment.sol).

Promises PLAN-01: a ShardPlan that constructs covers every unit exactly once per replica chain, in half-open ranges
without gaps, exactly as ShardAssignments.publishPlan checks it. Does not decide who gets what; that is
bsns.planning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from eth_abi.abi import encode
from eth_typing import ChecksumAddress

from bsns.protocol.identifiers import ProtocolError, address, keccak256, require_bytes32
from bsns.protocol.merkle import MerkleTree, leaf_hash
from bsns.v1 import common_pb2

MAXIMUM_STAGES = 32
MAXIMUM_ASSIGNMENTS = 256
ASSIGNMENT_ABI = "(uint16,uint16,uint32,uint32,address,uint64,bytes32)"


def execution_class_id(execution_class: str) -> bytes:
    """Identity of an execution class such as "torch-cpu/float32/sdpa" (dtype, quantisation, kernels): keccak256 of
    its name.
    """
    return keccak256(execution_class.encode())


@dataclass(frozen=True, slots=True)
class Assignment:
    """One node serves one replica of one stage: the units [first_unit, end_unit)."""

    stage: int
    replica: int
    first_unit: int
    end_unit: int
    node: ChecksumAddress
    work_weight: int
    execution_class: bytes

    def as_tuple(self) -> tuple[int, int, int, int, ChecksumAddress, int, bytes]:
        """Field values in the order of the Solidity struct."""
        return (
            self.stage,
            self.replica,
            self.first_unit,
            self.end_unit,
            self.node,
            self.work_weight,
            self.execution_class,
        )

    @classmethod
    def from_tuple(cls, values: Sequence[object]) -> Assignment:
        """The inverse of `as_tuple`; also takes what web3 decodes. ProtocolError if it does not fit."""
        try:
            stage, replica, first_unit, end_unit, node, work_weight, execution_class = values
            return cls(
                int(stage),  # type: ignore[call-overload]
                int(replica),  # type: ignore[call-overload]
                int(first_unit),  # type: ignore[call-overload]
                int(end_unit),  # type: ignore[call-overload]
                address(node),  # type: ignore[arg-type]
                int(work_weight),  # type: ignore[call-overload]
                require_bytes32(bytes(execution_class), "execution class"),  # type: ignore[call-overload]
            )
        except (TypeError, ValueError) as error:
            raise ProtocolError(f"not an assignment: {values!r}") from error

    def to_message(self) -> common_pb2.Assignment:
        """As it travels."""
        return common_pb2.Assignment(
            stage=self.stage,
            replica=self.replica,
            first_unit=self.first_unit,
            end_unit=self.end_unit,
            node=bytes.fromhex(self.node[2:]),
            work_weight=self.work_weight,
            execution_class=self.execution_class,
        )

    @classmethod
    def from_message(cls, message: common_pb2.Assignment) -> Assignment:
        """ProtocolError for an address or class of the wrong length."""
        return cls(
            message.stage,
            message.replica,
            message.first_unit,
            message.end_unit,
            address(bytes(message.node)),
            message.work_weight,
            require_bytes32(message.execution_class, "execution class"),
        )

    @property
    def leaf(self) -> bytes:
        return leaf_hash(encode([ASSIGNMENT_ABI], [self.as_tuple()]))


@dataclass(frozen=True)
class ShardPlan:
    """A complete plan for a model of `unit_count` units; assignments sorted by (stage, replica)."""

    unit_count: int
    assignments: tuple[Assignment, ...]

    def __post_init__(self) -> None:
        if not self.assignments:
            raise ProtocolError("a plan needs at least one assignment")
        if len(self.assignments) > MAXIMUM_ASSIGNMENTS:
            raise ProtocolError(f"a plan has at most {MAXIMUM_ASSIGNMENTS} assignments, got {len(self.assignments)}")
        expected_first, previous = 0, None
        for index, item in enumerate(self.assignments):
            if item.work_weight <= 0:
                raise ProtocolError(f"assignment {index} has no work weight")
            if item.first_unit >= item.end_unit:
                raise ProtocolError(f"assignment {index} serves no unit: [{item.first_unit}, {item.end_unit})")
            if previous is not None and (item.stage, item.replica) == (previous.stage, previous.replica + 1):
                if (item.first_unit, item.end_unit) != (previous.first_unit, previous.end_unit):
                    raise ProtocolError(f"assignment {index}: replicas of stage {item.stage} serve different units")
            elif (item.stage, item.replica) == (0 if previous is None else previous.stage + 1, 0):
                if item.first_unit != expected_first:
                    raise ProtocolError(
                        f"stage {item.stage} begins at unit {item.first_unit}, unit {expected_first} is not covered"
                    )
                expected_first = item.end_unit
            else:
                raise ProtocolError(f"assignment {index} is out of order: stage {item.stage} replica {item.replica}")
            previous = item
        if expected_first != self.unit_count:
            raise ProtocolError(f"the plan covers units up to {expected_first}, the model has {self.unit_count}")
        if self.stage_count > MAXIMUM_STAGES:
            raise ProtocolError(f"a plan has at most {MAXIMUM_STAGES} stages, got {self.stage_count}")

    @property
    def stage_count(self) -> int:
        return self.assignments[-1].stage + 1

    @cached_property
    def tree(self) -> MerkleTree:
        return MerkleTree([item.leaf for item in self.assignments])

    @property
    def root(self) -> bytes:
        return self.tree.root

    def proof(self, assignment: Assignment) -> tuple[bytes, ...]:
        """Merkle proof of one of this plan's assignments."""
        return self.tree.proof(self.assignments.index(assignment))

    def replicas(self, stage: int) -> tuple[Assignment, ...]:
        """All assignments of `stage`, by replica number."""
        return tuple(item for item in self.assignments if item.stage == stage)
