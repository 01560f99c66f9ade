"""Merkle trees against a brute-force definition, and what a proof must not prove."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bsns.protocol.identifiers import ProtocolError, keccak256
from bsns.protocol.merkle import MerkleTree, leaf_hash, verify

leaves_of = st.lists(st.binary(min_size=32, max_size=32), min_size=1, max_size=40)


def brute_force_root(nodes: list[bytes]) -> bytes:
    """The definition, recursively: the left part is the largest even-aligned run that pairs up on each level."""
    if len(nodes) == 1:
        return nodes[0]
    parents = []
    for index in range(0, len(nodes), 2):
        pair = nodes[index : index + 2]
        parents.append(keccak256(b"".join(sorted(pair))) if len(pair) == 2 else pair[0])
    return brute_force_root(parents)


@given(leaves_of)
@settings(max_examples=80, deadline=None)
def test_merkle_root_equals_brute_force_and_every_proof_verifies(leaves: list[bytes]) -> None:
    tree = MerkleTree(leaves)
    assert tree.root == brute_force_root(leaves)
    for index, leaf in enumerate(leaves):
        assert verify(tree.root, leaf, tree.proof(index))


@given(leaves_of, st.data())
@settings(max_examples=60, deadline=None)
def test_merkle_proof_of_a_changed_leaf_or_sibling_fails(leaves: list[bytes], data: st.DataObject) -> None:
    tree = MerkleTree(leaves)
    index = data.draw(st.integers(0, len(leaves) - 1))
    bit = data.draw(st.integers(0, 255))
    proof = tree.proof(index)
    flipped = (int.from_bytes(leaves[index]) ^ (1 << bit)).to_bytes(32)
    assert not verify(tree.root, flipped, proof)
    if proof:
        position = data.draw(st.integers(0, len(proof) - 1))
        broken = list(proof)
        broken[position] = (int.from_bytes(broken[position]) ^ (1 << bit)).to_bytes(32)
        assert not verify(tree.root, leaves[index], broken)


def test_merkle_leaf_is_hashed_twice() -> None:
    assert leaf_hash(b"content") == keccak256(keccak256(b"content"))


def test_merkle_lone_node_is_promoted_unchanged() -> None:
    a, b, c = (bytes([n]) * 32 for n in (1, 2, 3))
    assert MerkleTree([a, b, c]).root == keccak256(b"".join(sorted([keccak256(a + b), c])))
    assert MerkleTree([a, b, c]).proof(2) == (keccak256(a + b),)


def test_merkle_without_leaves_or_with_short_leaf_is_refused() -> None:
    with pytest.raises(ProtocolError):
        MerkleTree([])
    with pytest.raises(ProtocolError):
        MerkleTree([b"short"])
    with pytest.raises(ProtocolError):
        MerkleTree([bytes(32)]).proof(1)
