// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

/// @title EIP-712 digests of the calling contract
/// @notice Domain {name, version "1", chainId, verifyingContract}, computed anew for every digest, so that a digest is right on both sides
///         of a fork of the chain. For contracts that cannot spare the code of a cached domain and of EIP-5267.
library TypedData {
    bytes32 private constant _DOMAIN_TYPEHASH =
        keccak256("EIP712Domain(string name,string version,uint256 chainId,address verifyingContract)");

    /// @notice keccak256("\x19\x01" ‖ domainSeparator ‖ structHash).
    /// @param nameHash keccak256 of the domain's name.
    function digestOf(bytes32 nameHash, bytes32 structHash) internal view returns (bytes32) {
        bytes32 domainSeparator =
            keccak256(abi.encode(_DOMAIN_TYPEHASH, nameHash, keccak256("1"), block.chainid, address(this)));
        return keccak256(abi.encodePacked(hex"1901", domainSeparator, structHash));
    }
}
