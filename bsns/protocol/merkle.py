"""Merkle trees whose roots and proofs the contracts check (contracts/libraries/MerkleTree.sol, solady
MerkleProofLib).

Pairs are hashed in sorted order, so a proof needs no left/right flags; a node without a partner is promoted
unchanged; leaves are hashed twice, so that no inner node can be passed off as a leaf (OpenZeppelin's standard leaf).
Leaves keep the order they are given in.
"""

from __future__ import annotations

from collections.abc import Sequence

from bsns.protocol.identifiers import ProtocolError, keccak256, require_bytes32


def leaf_hash(encoded: bytes) -> bytes:
    """Leaf of an ABI-encoded value: keccak256(keccak256(encoded))."""
    return keccak256(keccak256(encoded))


def _pair(left: bytes, right: bytes) -> bytes:
    return keccak256(left + right if left < right else right + left)


class MerkleTree:
    """All levels over `leaves` (each 32 bytes, at least one)."""

    def __init__(self, leaves: Sequence[bytes]) -> None:
        if not leaves:
            raise ProtocolError("a Merkle tree needs at least one leaf")
        level = [require_bytes32(leaf, "leaf") for leaf in leaves]
        self._levels = [level]
        while len(level) > 1:
            parents = [_pair(level[i], level[i + 1]) for i in range(0, len(level) - 1, 2)]
            if len(level) % 2:
                parents.append(level[-1])
            level = parents
            self._levels.append(level)

    @property
    def root(self) -> bytes:
        return self._levels[-1][0]

    def __len__(self) -> int:
        return len(self._levels[0])

    def proof(self, index: int) -> tuple[bytes, ...]:
        """Sibling hashes from leaf `index` up to the root."""
        if not 0 <= index < len(self):
            raise ProtocolError(f"leaf {index} is not in a tree of {len(self)}")
        path = []
        for level in self._levels[:-1]:
            sibling = index ^ 1
            if sibling < len(level):
                path.append(level[sibling])
            index //= 2
        return tuple(path)


def verify(root: bytes, leaf: bytes, proof: Sequence[bytes]) -> bool:
    """Whether `leaf` is under `root` by `proof`."""
    node = leaf
    for sibling in proof:
        node = _pair(node, sibling)
    return node == root
