// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

import {ECDSA} from "solady/utils/ECDSA.sol";

/// @title Signatures of node keys
/// @notice One accepted form per signature: 65 bytes (r, s, v) with s in the lower half of the curve's order. A node key is a plain
///         key pair; contract accounts cannot be nodes.
library NodeSignature {
    uint256 private constant _HALF_ORDER = 0x7fffffffffffffffffffffffffffffff5d576e7357a4501ddfe92f46681b20a0;

    /// @notice Whether `signature` is `node`'s over `digest`. Never reverts.
    function isSignedBy(bytes32 digest, bytes calldata signature, address node) internal view returns (bool) {
        if (signature.length != 65 || node == address(0)) return false;
        bytes32 s = bytes32(signature[32:64]);
        if (uint256(s) > _HALF_ORDER) return false;
        return ECDSA.tryRecover(digest, uint8(signature[64]), bytes32(signature[0:32]), s) == node;
    }
}
