// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

/// @dev Content address of a model: keccak256(abi.encode(manifestHash, weightRoot, unitCount)).
type ModelId is bytes32;

/// @dev keccak256(abi.encode(block.chainid, address(ShardAssignments), publisher, modelId, epoch)).
type PlanId is bytes32;

/// @dev keccak256(abi.encode(block.chainid, address(InferenceEscrow), requester, nonce)), or the EIP-712 digest of a ticket of RequestTabs:
///      the preimages differ in length (128 and 66 bytes), so no id is both.
type RequestId is bytes32;

/// @dev EIP-712 digest of a Batch of RequestTabs.
type BatchId is bytes32;
