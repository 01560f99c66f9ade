"""EIP-712 messages of the protocol: what is signed, under which domain, and who signed it.

Every signature of bsns is typed data with a domain that names chain and contract, so that none can be replayed on
another chain, contract or message type. Hashing is done here directly (eth-account's generic encoder costs ten times
as much, and hand-over statements are signed while tokens flow); a test compares every type with eth-account's
encoder. Does not hold keys: see bsns.chain.signer.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

from eth_abi.abi import encode
from eth_keys.datatypes import Signature
from eth_keys.exceptions import BadSignature
from eth_typing import ChecksumAddress
from eth_utils.exceptions import ValidationError

from bsns.protocol.identifiers import ProtocolError, address, keccak256

SIGNATURE_LENGTH = 65
_DOMAIN_TYPE = "EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)"
_DYNAMIC = {"string", "bytes"}

NODE_KEY_PROOF = "NodeKeyProof(address operator,address node,bytes32 certificateHash,string endpoint,uint256 deadline)"
PLAN_CONSENT = (
    "PlanConsent(bytes32 modelId,address publisher,uint64 epoch,uint128 feePerToken,"
    "bytes32 measurementsHash,bytes32 planRoot,uint256 deadline)"
)
HAND_OVER = "HandOver(bytes32 requestId,uint16 stage,bool sent,uint32 step,bytes32 chain)"
SESSION_TOKEN = "SessionToken(bytes32 requestId,bytes32 inputCommitment,uint256 deadline)"
STAGE_REPLACEMENT = "StageReplacement(bytes32 requestId,uint16 stage,address replaced,address node)"
EVIDENCE_QUERY = "EvidenceQuery(bytes32 requestId,uint16 stage,uint256 deadline)"
ATTACH_PROOF = "AttachProof(address node,bytes32 challenge)"
# Its own type, so that no challenge of a coordinator can be made to look like a proof to a peer.
PEER_PROOF = "PeerProof(address node,address receiver,uint256 deadline)"
ACCOUNT_KEY_REQUEST = "AccountKeyRequest(address account,string name,uint256 deadline)"
MEASUREMENTS = "Measurements(bytes32 modelId,address node,bytes32 contentHash,uint64 measuredAt)"


@dataclass(frozen=True)
class Domain:
    """EIP-712 domain of one contract on one chain."""

    name: str
    chain_id: int
    verifying_contract: ChecksumAddress

    @cached_property
    def separator(self) -> bytes:
        return struct_hash(_DOMAIN_TYPE, (self.name, "1", self.chain_id, self.verifying_contract))


def registry_domain(chain_id: int, registry: ChecksumAddress) -> Domain:
    """Domain of NodeKeyProof, AttachProof and PeerProof."""
    return Domain("bsns NodeRegistry", chain_id, registry)


def assignments_domain(chain_id: int, assignments: ChecksumAddress) -> Domain:
    """Domain of PlanConsent and Measurements."""
    return Domain("bsns ShardAssignments", chain_id, assignments)


def escrow_domain(chain_id: int, escrow: ChecksumAddress) -> Domain:
    """Domain of SessionToken."""
    return Domain("bsns InferenceEscrow", chain_id, escrow)


def verification_domain(chain_id: int, verification: ChecksumAddress) -> Domain:
    """Domain of HandOver and EvidenceQuery."""
    return Domain("bsns OutputVerification", chain_id, verification)


def tabs_domain(chain_id: int, tabs: ChecksumAddress) -> Domain:
    """Domain of Ticket, StageResult, Voucher, Batch, TicketGrant and TicketAbandonment."""
    return Domain("bsns RequestTabs", chain_id, tabs)


def gateway_domain(chain_id: int, gateway: ChecksumAddress) -> Domain:
    """Domain of AccountKeyRequest; `gateway` is the account that a gateway takes deposits at."""
    return Domain("bsns Gateway", chain_id, gateway)


@lru_cache(maxsize=64)
def _parse(type_string: str) -> tuple[bytes, tuple[str, ...], tuple[str, ...]]:
    """Type hash, ABI types of the encoded members, member types, of a flat EIP-712 type string."""
    members = tuple(member.split(" ")[0] for member in type_string[type_string.index("(") + 1 : -1].split(","))
    encoded = tuple("bytes32" if member in _DYNAMIC else member for member in members)
    return keccak256(type_string.encode()), ("bytes32", *encoded), members


def struct_hash(type_string: str, values: tuple[object, ...]) -> bytes:
    """hashStruct of EIP-712 for a flat struct; `values` in the order of the type string."""
    type_hash, abi_types, members = _parse(type_string)
    if len(values) != len(members):
        raise ProtocolError(f"{type_string} takes {len(members)} values, got {len(values)}")
    encoded: list[object] = [type_hash]
    for member, value in zip(members, values, strict=True):
        if member == "string":
            encoded.append(keccak256(str(value).encode()))
        elif member == "bytes":
            encoded.append(keccak256(bytes(value)))  # type: ignore[call-overload]
        else:
            encoded.append(value)
    return keccak256(encode(abi_types, encoded))


def signing_digest(domain: Domain, type_string: str, values: tuple[object, ...]) -> bytes:
    """The 32 bytes that are signed: keccak256(0x1901 . domainSeparator . hashStruct)."""
    return keccak256(b"\x19\x01" + domain.separator + struct_hash(type_string, values))


def recover(digest: bytes, signature: bytes) -> ChecksumAddress:
    """Address that signed `digest`; ProtocolError if the signature is malformed or malleable (upper half s)."""
    if len(signature) != SIGNATURE_LENGTH:
        raise ProtocolError(f"a signature has {SIGNATURE_LENGTH} bytes, got {len(signature)}")
    recovery = signature[64]
    if recovery not in (27, 28):
        raise ProtocolError(f"signature recovery byte must be 27 or 28, got {recovery}")
    if int.from_bytes(signature[32:64]) > _HALF_ORDER:
        raise ProtocolError("signature is malleable: s lies in the upper half of the curve order")
    try:
        parsed = Signature(signature_bytes=signature[:64] + bytes([recovery - 27]))
        return address(parsed.recover_public_key_from_msg_hash(digest).to_canonical_address())
    except (BadSignature, ValidationError, ValueError) as error:
        raise ProtocolError(f"not a valid signature: {error}") from error


def is_signed_by(digest: bytes, signature: bytes, signer: str) -> bool:
    """Whether `signature` over `digest` is by `signer`; malformed signatures are simply not."""
    try:
        return recover(digest, signature) == address(signer)
    except ProtocolError:
        return False


_HALF_ORDER = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141 // 2
