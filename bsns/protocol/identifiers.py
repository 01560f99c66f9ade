"""Identifiers and the one hash of the protocol.

Owns the id types and how ids are derived; every derivation equals the one in the Solidity sources (contracts/types,
contracts/interfaces). Ids are distinct types so that a type checker catches a plan id passed as a request id. Does
not encode structs; see the modules that own them.
"""

from __future__ import annotations

from typing import NewType

from eth_abi.abi import encode
from eth_hash.auto import keccak as _keccak
from eth_typing import ChecksumAddress
from eth_utils.address import to_checksum_address

ModelId = NewType("ModelId", bytes)
PlanId = NewType("PlanId", bytes)
RequestId = NewType("RequestId", bytes)
Wei = NewType("Wei", int)

ZERO_HASH = bytes(32)
BYTES32 = 32


class ProtocolError(ValueError):
    """A value that no honest party would have produced: wrong length, wrong range, wrong order. The message says
    which.
    """


def keccak256(data: bytes) -> bytes:
    """Keccak-256 of `data` (32 bytes), the EVM's hash."""
    return _keccak(data)


def abi_hash(types: list[str], values: list[object]) -> bytes:
    """keccak256(abi.encode(values)) as in Solidity."""
    return keccak256(encode(types, values))


def require_bytes32(value: bytes, name: str) -> bytes:
    """Return `value`, or raise ProtocolError if it is not 32 bytes."""
    if len(value) != BYTES32:
        raise ProtocolError(f"{name} must be 32 bytes, got {len(value)}")
    return bytes(value)


def address(value: str | bytes) -> ChecksumAddress:
    """An address in checksum form from 20 bytes or any hex spelling; ProtocolError if it is neither."""
    try:
        return to_checksum_address(value)
    except (ValueError, TypeError) as error:
        raise ProtocolError(f"not an address: {value!r}") from error


def model_id(manifest_hash: bytes, weight_root: bytes, unit_count: int) -> ModelId:
    """Content address of a model: keccak256(abi.encode(manifestHash, weightRoot, unitCount))."""
    return ModelId(abi_hash(["bytes32", "bytes32", "uint32"], [manifest_hash, weight_root, unit_count]))


def plan_id(chain_id: int, assignments_contract: str, publisher: str, model: ModelId, epoch: int) -> PlanId:
    """keccak256(abi.encode(chainid, address(ShardAssignments), publisher, modelId, epoch))."""
    return PlanId(
        abi_hash(
            ["uint256", "address", "address", "bytes32", "uint64"],
            [chain_id, assignments_contract, publisher, model, epoch],
        )
    )


def request_id(chain_id: int, escrow_contract: str, requester: str, nonce: int) -> RequestId:
    """keccak256(abi.encode(chainid, address(InferenceEscrow), requester, nonce))."""
    return RequestId(
        abi_hash(["uint256", "address", "address", "uint256"], [chain_id, escrow_contract, requester, nonce])
    )
