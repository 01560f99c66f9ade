// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

import {EIP712} from "solady/utils/EIP712.sol";
import {MerkleProofLib} from "solady/utils/MerkleProofLib.sol";

import {INodeRegistry, NodeStatus} from "./interfaces/INodeRegistry.sol";
import {IShardAssignments, Model, Plan} from "./interfaces/IShardAssignments.sol";
import {MerkleTree} from "./libraries/MerkleTree.sol";
import {NodeSignature} from "./libraries/NodeSignature.sol";
import {Assignment} from "./types/Assignment.sol";
import {ModelId, PlanId} from "./types/Identifiers.sol";

/// @title Models and shard plans
/// @notice See IShardAssignments. Holds no money and knows no owner.
contract ShardAssignments is IShardAssignments, EIP712 {
    /// @dev EIP-712 type by which a node consents to a plan. It covers the root, so one signature stands for one exact plan.
    bytes32 private constant _PLAN_CONSENT_TYPEHASH = keccak256(
        "PlanConsent(bytes32 modelId,address publisher,uint64 epoch,uint128 feePerToken,bytes32 measurementsHash,bytes32 planRoot,uint256 deadline)"
    );
    uint64 private constant _MAXIMUM_ACTIVATION_DELAY = 30 days;
    /// @dev Both bound the gas of everything that walks over a plan or a route.
    uint256 private constant _MAXIMUM_STAGES = 32;
    uint256 private constant _MAXIMUM_ASSIGNMENTS = 256;
    /// @dev A transaction with a document of this size still fits the 128 KiB that nodes of the chain pass on, at 4 million gas.
    uint256 private constant _MAXIMUM_DOCUMENT_BYTES = 96 * 1024;

    /// @inheritdoc IShardAssignments
    INodeRegistry public immutable registry;
    /// @inheritdoc IShardAssignments
    uint64 public immutable planActivationDelay;

    mapping(ModelId => Model) private _models;
    mapping(PlanId => Plan) private _plans;
    /// @dev Epoch of the latest plan; epochs count from 1.
    mapping(ModelId => mapping(address publisher => uint64)) private _latestEpoch;

    constructor(address registry_, uint64 planActivationDelay_) {
        if (planActivationDelay_ > _MAXIMUM_ACTIVATION_DELAY) {
            revert ActivationDelayOutOfRange(_MAXIMUM_ACTIVATION_DELAY, planActivationDelay_);
        }
        registry = INodeRegistry(registry_);
        planActivationDelay = planActivationDelay_;
    }

    // ---------------------------------------------------------------------------------------------------------------------
    //  Models
    // ---------------------------------------------------------------------------------------------------------------------

    /// @inheritdoc IShardAssignments
    function registerModel(bytes32 manifestHash, bytes32 weightRoot, uint32 unitCount, string calldata name)
        external
        returns (ModelId modelId)
    {
        if (manifestHash == 0 || weightRoot == 0 || unitCount == 0) revert ModelEmpty();
        modelId = ModelId.wrap(keccak256(abi.encode(manifestHash, weightRoot, unitCount)));
        if (_models[modelId].unitCount != 0) revert ModelAlreadyRegistered(modelId);
        _models[modelId] = Model(manifestHash, weightRoot, unitCount);
        emit ModelRegistered(modelId, msg.sender, manifestHash, weightRoot, unitCount, name);
    }

    // ---------------------------------------------------------------------------------------------------------------------
    //  Documents
    // ---------------------------------------------------------------------------------------------------------------------

    /// @inheritdoc IShardAssignments
    function announce(bytes calldata document) external returns (bytes32 documentHash) {
        if (document.length > _MAXIMUM_DOCUMENT_BYTES) {
            revert DocumentTooLarge(_MAXIMUM_DOCUMENT_BYTES, document.length);
        }
        documentHash = keccak256(document);
        emit DocumentAnnounced(documentHash, document);
    }

    // ---------------------------------------------------------------------------------------------------------------------
    //  Plans
    // ---------------------------------------------------------------------------------------------------------------------

    /// @inheritdoc IShardAssignments
    function publishPlan(
        ModelId modelId,
        uint64 epoch,
        uint128 feePerToken,
        bytes32 measurementsHash,
        Assignment[] calldata assignments,
        uint256 consentDeadline,
        bytes[] calldata consents
    ) external returns (PlanId planId) {
        uint32 unitCount = _models[modelId].unitCount;
        if (unitCount == 0) revert ModelUnknown(modelId);
        uint64 expectedEpoch = _latestEpoch[modelId][msg.sender] + 1;
        if (epoch != expectedEpoch) revert WrongEpoch(expectedEpoch, epoch);
        if (feePerToken == 0) revert FeeOutOfRange(1, 0);
        if (block.timestamp > consentDeadline) revert ConsentExpired(consentDeadline, block.timestamp);

        Plan memory plan = Plan({
            modelId: modelId,
            publisher: msg.sender,
            epoch: epoch,
            // Seconds reach 2^64 in 584 billion years.
            effectiveAt: uint64(block.timestamp) + planActivationDelay,
            stageCount: _requireCoverage(unitCount, assignments),
            feePerToken: feePerToken,
            root: _rootOf(assignments),
            measurementsHash: measurementsHash
        });
        _requireConsents(_consentDigest(plan, consentDeadline), assignments, consents);

        planId = _planIdOf(msg.sender, modelId, epoch);
        _plans[planId] = plan;
        _latestEpoch[modelId][msg.sender] = epoch;
        _emitPlanPublished(planId, plan, assignments);
    }

    // ---------------------------------------------------------------------------------------------------------------------
    //  Views
    // ---------------------------------------------------------------------------------------------------------------------

    /// @inheritdoc IShardAssignments
    function modelOf(ModelId modelId) external view returns (Model memory model) {
        model = _models[modelId];
        if (model.unitCount == 0) revert ModelUnknown(modelId);
    }

    /// @inheritdoc IShardAssignments
    function planOf(PlanId planId) external view returns (Plan memory plan) {
        plan = _plans[planId];
        if (plan.publisher == address(0)) revert PlanUnknown(planId);
    }

    /// @inheritdoc IShardAssignments
    /// @dev Walks back over the plans that are not in effect yet; every plan waits equally long, so the first one in effect is the latest.
    function activePlan(ModelId modelId, address publisher) external view returns (PlanId) {
        for (uint64 epoch = _latestEpoch[modelId][publisher]; epoch != 0; --epoch) {
            PlanId planId = _planIdOf(publisher, modelId, epoch);
            if (_plans[planId].effectiveAt <= block.timestamp) return planId;
        }
        return PlanId.wrap(0);
    }

    /// @inheritdoc IShardAssignments
    function nextEpoch(ModelId modelId, address publisher) external view returns (uint64) {
        return _latestEpoch[modelId][publisher] + 1;
    }

    /// @inheritdoc IShardAssignments
    function isAssigned(PlanId planId, Assignment calldata assignment, bytes32[] calldata proof)
        external
        view
        returns (bool)
    {
        bytes32 root = _plans[planId].root;
        return root != 0 && MerkleProofLib.verifyCalldata(proof, root, _leafOf(assignment));
    }

    // ---------------------------------------------------------------------------------------------------------------------
    //  Inside
    // ---------------------------------------------------------------------------------------------------------------------

    /// @dev PLAN-01: stages and replicas count from 0 without gaps, the replicas of a stage share one unit range, and the ranges join up
    ///      from unit 0 to the last. Returns the number of stages.
    function _requireCoverage(uint32 unitCount, Assignment[] calldata assignments) private view returns (uint16) {
        uint256 count = assignments.length;
        if (count == 0) revert PlanEmpty();
        if (count > _MAXIMUM_ASSIGNMENTS) revert TooManyAssignments(_MAXIMUM_ASSIGNMENTS, count);

        uint256 stages;
        uint256 replicas;
        uint32 firstUnit;
        uint32 endUnit;
        for (uint256 i; i < count; ++i) {
            Assignment calldata assignment = assignments[i];
            if (stages == 0 || assignment.replica == 0) {
                // The first replica of the next stage.
                if (assignment.stage != stages || assignment.replica != 0) revert AssignmentOutOfOrder(i);
                if (assignment.firstUnit != endUnit) revert UnitsNotCovered(endUnit, assignment.firstUnit);
                if (assignment.endUnit <= assignment.firstUnit) revert EmptyStage(i);
                (firstUnit, endUnit) = (assignment.firstUnit, assignment.endUnit);
                ++stages;
                replicas = 1;
            } else {
                if (assignment.stage != stages - 1 || assignment.replica != replicas) revert AssignmentOutOfOrder(i);
                if (assignment.firstUnit != firstUnit || assignment.endUnit != endUnit) revert ReplicaRangeMismatch(i);
                ++replicas;
            }
            if (assignment.workWeight == 0) revert WorkWeightZero(i);
            if (assignment.executionClass == 0) revert ExecutionClassMissing(i);
            _requireServing(assignment.node);
        }
        if (stages > _MAXIMUM_STAGES) revert TooManyStages(_MAXIMUM_STAGES, stages);
        if (endUnit != unitCount) revert UnitsNotCovered(endUnit, unitCount);
        return uint16(stages); // at most 32
    }

    function _requireServing(address node) private view {
        NodeStatus status = registry.statusOf(node);
        if (status != NodeStatus.Active && status != NodeStatus.Pending) revert NodeNotServing(node);
    }

    function _requireConsents(bytes32 digest, Assignment[] calldata assignments, bytes[] calldata consents)
        private
        view
    {
        uint256 count = assignments.length;
        if (consents.length != count) revert ConsentCountMismatch(count, consents.length);
        for (uint256 i; i < count; ++i) {
            address node = assignments[i].node;
            if (!NodeSignature.isSignedBy(digest, consents[i], node)) revert ConsentInvalid(node);
        }
    }

    function _consentDigest(Plan memory plan, uint256 deadline) private view returns (bytes32) {
        return _hashTypedData(
            keccak256(
                abi.encode(
                    _PLAN_CONSENT_TYPEHASH,
                    plan.modelId,
                    plan.publisher,
                    plan.epoch,
                    plan.feePerToken,
                    plan.measurementsHash,
                    plan.root,
                    deadline
                )
            )
        );
    }

    function _emitPlanPublished(PlanId planId, Plan memory plan, Assignment[] calldata assignments) private {
        emit PlanPublished(
            planId,
            plan.modelId,
            plan.publisher,
            plan.epoch,
            plan.effectiveAt,
            plan.feePerToken,
            plan.root,
            plan.measurementsHash,
            assignments
        );
    }

    function _planIdOf(address publisher, ModelId modelId, uint64 epoch) private view returns (PlanId) {
        return PlanId.wrap(keccak256(abi.encode(block.chainid, address(this), publisher, modelId, epoch)));
    }

    function _rootOf(Assignment[] calldata assignments) private pure returns (bytes32) {
        bytes32[] memory leaves = new bytes32[](assignments.length);
        for (uint256 i; i < leaves.length; ++i) {
            leaves[i] = _leafOf(assignments[i]);
        }
        return MerkleTree.rootOf(leaves);
    }

    function _leafOf(Assignment calldata assignment) private pure returns (bytes32) {
        return MerkleTree.leafOf(keccak256(abi.encode(assignment)));
    }

    function _domainNameAndVersion() internal pure override returns (string memory name, string memory version) {
        return ("bsns ShardAssignments", "1");
    }
}
