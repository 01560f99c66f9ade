// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

/// @dev Content address of a model: keccak256(abi.encode(manifestHash, weightRoot, unitCount)).
type ModelId is bytes32;

/// @dev keccak256(abi.encode(block.chainid, address(ShardAssignments), publisher, modelId, epoch)).
type PlanId is bytes32;

/// @dev keccak256(abi.encode(block.chainid, address(InferenceEscrow), requester, nonce)).
type RequestId is bytes32;
