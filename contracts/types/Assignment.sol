// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

/// @notice One leaf of a shard plan: a node serves one replica of one stage.
/// @dev A stage is the half-open run of shard units [firstUnit, endUnit) in the topological order that the manifest fixes.
///      Leaf hash: keccak256(bytes.concat(keccak256(abi.encode(assignment)))), the double hash of OpenZeppelin's standard
///      tree, so that no inner node can be passed off as a leaf.
struct Assignment {
    uint16 stage;
    uint16 replica;
    uint32 firstUnit;
    uint32 endUnit;
    address node;
    /// Declared cost of the stage; the fee of the executors is split in proportion to it.
    uint64 workWeight;
    /// keccak256 of the execution class, for example "torch-cpu/float32/sdpa": dtype, quantisation and kernels are part of the promise.
    bytes32 executionClass;
}
