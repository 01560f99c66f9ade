"""Every EIP-712 type of the protocol against eth-account's own encoder."""

from __future__ import annotations

from typing import Any

import pytest
from eth_account import Account
from eth_account.messages import encode_typed_data
from hypothesis import given, settings
from hypothesis import strategies as st

from bsns.chain.signer import KeySigner
from bsns.protocol import typed_data
from bsns.protocol.identifiers import ProtocolError, address, keccak256

CONTRACT = address("0x" + "ab" * 20)
ADDRESS = address("0x" + "cd" * 20)
TYPES: dict[str, tuple[typed_data.Domain, str]] = {
    "NodeKeyProof": (typed_data.registry_domain(31337, CONTRACT), typed_data.NODE_KEY_PROOF),
    "AttachProof": (typed_data.registry_domain(1, CONTRACT), typed_data.ATTACH_PROOF),
    "PeerProof": (typed_data.registry_domain(31337, CONTRACT), typed_data.PEER_PROOF),
    "PlanConsent": (typed_data.assignments_domain(31337, CONTRACT), typed_data.PLAN_CONSENT),
    "Measurements": (typed_data.assignments_domain(10, CONTRACT), typed_data.MEASUREMENTS),
    "SessionToken": (typed_data.escrow_domain(31337, CONTRACT), typed_data.SESSION_TOKEN),
    "StageReplacement": (typed_data.escrow_domain(31337, CONTRACT), typed_data.STAGE_REPLACEMENT),
    "HandOver": (typed_data.verification_domain(31337, CONTRACT), typed_data.HAND_OVER),
    "AccountKeyRequest": (typed_data.gateway_domain(31337, CONTRACT), typed_data.ACCOUNT_KEY_REQUEST),
    "EvidenceQuery": (typed_data.verification_domain(8453, CONTRACT), typed_data.EVIDENCE_QUERY),
}


def members(type_string: str) -> list[tuple[str, str]]:
    pairs = type_string[type_string.index("(") + 1 : -1].split(",")
    return [(kind, name) for kind, name in (pair.split(" ") for pair in pairs)]


def value_of(kind: str, seed: int) -> Any:
    match kind:
        case "address":
            return ADDRESS
        case "bool":
            return bool(seed % 2)
        case "string":
            return f"node-{seed}.example:{seed}"
        case "bytes32":
            return keccak256(seed.to_bytes(32))
        case _:
            return seed % 2 ** int(kind.removeprefix("uint"))


def reference_digest(domain: typed_data.Domain, type_string: str, values: list[Any]) -> bytes:
    fields = members(type_string)
    message = encode_typed_data(
        {
            "name": domain.name,
            "version": "1",
            "chainId": domain.chain_id,
            "verifyingContract": domain.verifying_contract,
        },
        {type_string.split("(", maxsplit=1)[0]: [{"name": name, "type": kind} for kind, name in fields]},
        {name: value for (_, name), value in zip(fields, values)},
    )
    return keccak256(b"\x19" + message.version + message.header + message.body)


def test_typed_data_table_names_every_type_of_the_module() -> None:
    strings = {
        value
        for name, value in vars(typed_data).items()
        if name.isupper() and isinstance(value, str) and "(" in value and not name.startswith("_")
    }
    assert strings == {type_string for _, type_string in TYPES.values()}


@pytest.mark.parametrize("name", TYPES)
@given(seed=st.integers(0, 2**64 - 1))
@settings(max_examples=15, deadline=None)
def test_typed_data_digest_equals_eth_account(name: str, seed: int) -> None:
    domain, type_string = TYPES[name]
    values = [value_of(kind, seed + index) for index, (kind, _) in enumerate(members(type_string))]
    assert typed_data.signing_digest(domain, type_string, tuple(values)) == reference_digest(
        domain, type_string, values
    )


@pytest.mark.parametrize("name", TYPES)
def test_typed_data_digest_depends_on_domain_and_every_member(name: str) -> None:
    domain, type_string = TYPES[name]
    values = [value_of(kind, 7) for kind, _ in members(type_string)]
    digests = {typed_data.signing_digest(domain, type_string, tuple(values))}
    other_chain = typed_data.Domain(domain.name, domain.chain_id + 1, domain.verifying_contract)
    other_contract = typed_data.Domain(domain.name, domain.chain_id, ADDRESS)
    digests.add(typed_data.signing_digest(other_chain, type_string, tuple(values)))
    digests.add(typed_data.signing_digest(other_contract, type_string, tuple(values)))
    for index, (kind, _) in enumerate(members(type_string)):
        changed = list(values)
        changed[index] = CONTRACT if kind == "address" else value_of(kind, 8)
        digests.add(typed_data.signing_digest(domain, type_string, tuple(changed)))
    assert len(digests) == 3 + len(values)


def test_typed_data_wrong_number_of_values_is_refused() -> None:
    with pytest.raises(ProtocolError, match="takes 3 values, got 1"):
        typed_data.struct_hash(typed_data.SESSION_TOKEN, (bytes(32),))


@given(key=st.integers(1, 2**200), digest=st.binary(min_size=32, max_size=32))
@settings(max_examples=20, deadline=None)
def test_recover_signature_of_key_signer_gives_its_address(key: int, digest: bytes) -> None:
    signer = KeySigner(key.to_bytes(32))
    signature = signer.sign_digest(digest)
    assert typed_data.recover(digest, signature) == signer.address == Account.from_key(key.to_bytes(32)).address
    assert typed_data.is_signed_by(digest, signature, signer.address)
    assert not typed_data.is_signed_by(keccak256(digest), signature, signer.address)


def test_recover_malleable_signature_is_refused() -> None:
    order = 0xFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFFEBAAEDCE6AF48A03BBFD25E8CD0364141
    signer = KeySigner(b"\1" * 32)
    signature = signer.sign_digest(b"\2" * 32)
    twin = signature[:32] + (order - int.from_bytes(signature[32:64])).to_bytes(32) + bytes([27 + 28 - signature[64]])
    with pytest.raises(ProtocolError, match="malleable"):
        typed_data.recover(b"\2" * 32, twin)


@pytest.mark.parametrize(
    "signature",
    [b"", b"\1" * 64, b"\1" * 66, bytes(64) + b"\x1b", b"\xff" * 32 + b"\1" * 32 + b"\x1b", b"\1" * 64 + b"\0"],
)
def test_recover_malformed_signature_is_refused(signature: bytes) -> None:
    with pytest.raises(ProtocolError):
        typed_data.recover(b"\2" * 32, signature)
    assert not typed_data.is_signed_by(b"\2" * 32, signature, ADDRESS)
