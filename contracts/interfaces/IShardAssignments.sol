// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

import {Assignment} from "../types/Assignment.sol";
import {ModelId, PlanId} from "../types/Identifiers.sol";
import {INodeRegistry} from "./INodeRegistry.sol";

struct Model {
    bytes32 manifestHash;
    /// Merkle root over the hashes of the shard units.
    bytes32 weightRoot;
    uint32 unitCount;
}

struct Plan {
    ModelId modelId;
    address publisher;
    uint64 epoch;
    uint64 effectiveAt;
    uint16 stageCount;
    /// Wei per token of prompt or answer.
    uint128 feePerToken;
    /// Merkle root over the assignments.
    bytes32 root;
    /// keccak256 of the planning record: all that the planner was given, so that anyone can recompute the plan.
    bytes32 measurementsHash;
}

/// @title Models and shard plans
/// @notice A model is content-addressed. A plan is a set of assignments that covers every shard unit exactly once per replica chain
///         (PLAN-01), to which every assigned node has consented by signature. Anyone may register a model and publish plans under
///         his own address; requesters choose whose plan they pay for. Plans take effect after a delay.
interface IShardAssignments {
    error ModelAlreadyRegistered(ModelId modelId);
    error ModelUnknown(ModelId modelId);
    error ModelEmpty();
    error PlanUnknown(PlanId planId);
    error WrongEpoch(uint64 expected, uint64 actual);
    error PlanEmpty();
    error TooManyAssignments(uint256 maximum, uint256 actual);
    error TooManyStages(uint256 maximum, uint256 actual);
    error ConsentCountMismatch(uint256 expected, uint256 actual);
    error ConsentExpired(uint256 deadline, uint256 now_);
    error ConsentInvalid(address node);
    error NodeNotServing(address node);
    error AssignmentOutOfOrder(uint256 index);
    error UnitsNotCovered(uint32 expectedFirstUnit, uint32 actualFirstUnit);
    error ReplicaRangeMismatch(uint256 index);
    error EmptyStage(uint256 index);
    error WorkWeightZero(uint256 index);
    error ExecutionClassMissing(uint256 index);
    error FeeOutOfRange(uint256 minimum, uint256 actual);
    error ActivationDelayOutOfRange(uint256 maximum, uint256 actual);
    error DocumentTooLarge(uint256 maximum, uint256 actual);

    event ModelRegistered(
        ModelId indexed modelId,
        address indexed registrant,
        bytes32 manifestHash,
        bytes32 weightRoot,
        uint32 unitCount,
        string name
    );
    /// @dev Carries the whole plan: an indexer needs nothing else.
    event PlanPublished(
        PlanId indexed planId,
        ModelId indexed modelId,
        address indexed publisher,
        uint64 epoch,
        uint64 effectiveAt,
        uint128 feePerToken,
        bytes32 root,
        bytes32 measurementsHash,
        Assignment[] assignments
    );
    /// @dev The document itself lies in the log: who finds the hash elsewhere on chain needs nobody to read what it stands for.
    event DocumentAnnounced(bytes32 indexed documentHash, bytes document);

    /// @param name for people, at most 64 bytes are meaningful; only emitted.
    function registerModel(bytes32 manifestHash, bytes32 weightRoot, uint32 unitCount, string calldata name)
        external
        returns (ModelId modelId);

    /// @notice Put a document where everybody finds it by its hash: the manifest of a model (`manifestHash`) or the planning record of a
    ///         plan (`measurementsHash`). Anyone may announce anything, again and again: only the hash says what a document is.
    /// @param document at most 96 KiB; what is larger must be fetched elsewhere and compared with its hash.
    /// @return documentHash keccak256 of `document`.
    function announce(bytes calldata document) external returns (bytes32 documentHash);

    /// @notice Publish a plan for `modelId` under the sender's address.
    /// @dev `assignments` sorted by (stage, replica), both counted from 0 without gaps; all replicas of a stage have the same unit
    ///      range; stages are contiguous from unit 0 to unitCount. `consents[i]` is the signature of `assignments[i].node` over EIP-712
    ///      `PlanConsent(bytes32 modelId,address publisher,uint64 epoch,uint128 feePerToken,bytes32 measurementsHash,bytes32 planRoot,uint256 deadline)`
    ///      under domain {name "bsns ShardAssignments", version "1", chainId, verifyingContract}. Nodes must be Pending or Active.
    ///      `measurementsHash` is keccak256 of the planning record (docs/protocol.md): every node's signed measurements and the terms of
    ///      the planner. Nothing here can check a plan against it; whoever has the record can.
    ///      The root is the OpenZeppelin-style Merkle tree with sorted pairs over the leaves in the given order; a lone node is
    ///      promoted unchanged (see MerkleTree library).
    function publishPlan(
        ModelId modelId,
        uint64 epoch,
        uint128 feePerToken,
        bytes32 measurementsHash,
        Assignment[] calldata assignments,
        uint256 consentDeadline,
        bytes[] calldata consents
    ) external returns (PlanId planId);

    /// @notice A registered model; reverts with ModelUnknown otherwise.
    function modelOf(ModelId modelId) external view returns (Model memory);
    /// @notice A published plan; reverts with PlanUnknown otherwise.
    function planOf(PlanId planId) external view returns (Plan memory);

    /// @notice The plan of `publisher` for `modelId` in effect now, or PlanId zero.
    function activePlan(ModelId modelId, address publisher) external view returns (PlanId);

    /// @notice Epoch that the next plan of `publisher` for `modelId` must carry.
    function nextEpoch(ModelId modelId, address publisher) external view returns (uint64);

    /// @notice Whether `assignment` is a leaf of the plan.
    function isAssigned(PlanId planId, Assignment calldata assignment, bytes32[] calldata proof)
        external
        view
        returns (bool);

    /// @notice Seconds from the publication of a plan until it is in effect.
    function planActivationDelay() external view returns (uint64);

    /// @notice Where the status of nodes is looked up.
    function registry() external view returns (INodeRegistry);
}
