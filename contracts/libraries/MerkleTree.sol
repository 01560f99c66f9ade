// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

/// @title Merkle trees as this protocol builds them
/// @notice Leaves in the given order, pairs sorted before hashing, a lone node of a level promoted unchanged. Proofs against such a
///         root verify with solady's MerkleProofLib and with any verifier that sorts pairs.
/// @dev A leaf is the double hash of its content, so that the 64 bytes under an inner node can never pass for a leaf.
library MerkleTree {
    /// @notice Leaf of a content whose plain hash is `contentHash`.
    function leafOf(bytes32 contentHash) internal pure returns (bytes32) {
        return keccak256(bytes.concat(contentHash));
    }

    /// @notice Root over `nodes`, of which there must be at least one.
    /// @dev Works in place: `nodes` holds rubbish afterwards. A level is written at i while it is read at 2i, so nothing is lost.
    function rootOf(bytes32[] memory nodes) internal pure returns (bytes32) {
        uint256 width = nodes.length;
        while (width > 1) {
            uint256 pairs = width / 2;
            for (uint256 i; i < pairs; ++i) {
                nodes[i] = hashPair(nodes[2 * i], nodes[2 * i + 1]);
            }
            if (width % 2 == 1) {
                nodes[pairs] = nodes[width - 1];
                ++pairs;
            }
            width = pairs;
        }
        return nodes[0];
    }

    /// @notice Parent of two nodes, whatever their order.
    function hashPair(bytes32 a, bytes32 b) internal pure returns (bytes32) {
        return a < b ? keccak256(bytes.concat(a, b)) : keccak256(bytes.concat(b, a));
    }
}
