// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

import {Assignment} from "../types/Assignment.sol";
import {PlanId, RequestId} from "../types/Identifiers.sol";
import {EscrowTerms} from "../types/Terms.sol";
import {INodeRegistry} from "./INodeRegistry.sol";
import {IShardAssignments} from "./IShardAssignments.sol";

/// @notice `Expired` is derived from time: a request whose deadline passed and that only waits for its refund to be claimed.
enum RequestStatus {
    Absent,
    Open,
    Routed,
    Committed,
    Verified,
    Settled,
    Expired,
    Refunded
}

struct Request {
    address requester;
    RequestStatus status;
    uint16 stageCount;
    uint64 openedAt;
    /// Deadline of the current status, Unix seconds; after it anyone may claim the refund for the requester.
    uint64 deadline;
    uint32 promptTokens;
    uint32 maximumTokens;
    /// Wei.
    uint128 deposit;
    /// Wei per token, copied from the plan when the request was opened.
    uint128 feePerToken;
    PlanId planId;
    /// keccak256(abi.encode(INPUT_TYPEHASH, promptDigest, promptTokens, samplingDigest, salt)); opened only to the nodes of the route.
    bytes32 inputCommitment;
    /// keccak256(abi.encode(secret)); the secret is half of the entropy of the committee draw.
    bytes32 secretHash;
}

/// @notice The node that executes one stage of a routed request.
struct Stage {
    address node;
    uint64 workWeight;
    uint32 firstUnit;
    uint32 endUnit;
    bytes32 executionClass;
}

/// @notice What a requester asks for and on which terms, as `openCommitted` takes it.
struct Offer {
    address requester;
    PlanId planId;
    /// Wei per token.
    uint128 feePerToken;
    bytes32 inputCommitment;
    bytes32 secretHash;
    uint32 promptTokens;
    uint32 maximumTokens;
}

/// @notice Another replica of the plan in the place of a stage's node that stopped in mid-answer.
struct Replacement {
    /// Leaf of the request's plan: the node that takes the stage over.
    Assignment assignment;
    bytes32[] proof;
    /// The node that stopped.
    address replaced;
    /// Signature of the requester over StageReplacement(bytes32 requestId,uint16 stage,address replaced,address node).
    bytes consent;
    /// The same by the witness: the node of the stage before it on the ring, or the next one further back that is another. Empty where the
    /// whole route is one node's.
    bytes witness;
}

/// @title Deposits, fees, refunds
/// @notice Open -> Routed -> Committed -> Verified -> Settled, or Expired -> Refunded. For each request paid + refunded + protocol fee =
///         deposited, exactly once (MONEY-02). Every status has an exit after its deadline that needs nobody's permission (MONEY-03).
/// @dev Pull payments only. Credits go to operators' cold keys.
interface IInferenceEscrow {
    error RequestAlreadyOpen(RequestId requestId);
    error RequestUnknown(RequestId requestId);
    error WrongRequestStatus(RequestId requestId, RequestStatus expected, RequestStatus actual);
    error PlanNotActive(PlanId planId, PlanId active);
    error FeeBelowQuote(uint256 expected, uint256 actual);
    error TokensOutOfRange(uint256 maximum, uint256 actual);
    error CommitmentMissing();
    error NotPlanPublisher(address expected, address actual);
    error RouteIncomplete(uint256 expectedStages, uint256 actualStages);
    error NotAssigned(uint256 stage, address node);
    error NodeNotActive(address node);
    error DeadlinePassed(uint256 deadline, uint256 now_);
    error DeadlineNotPassed(uint256 deadline, uint256 now_);
    error NotVerification(address actual);
    error NotTabs(address actual);
    error NoCredit(address account);
    error TransferFailed(address to, uint256 amount);
    error TooManyReplacements(uint256 maximum, uint256 actual);
    error StageUnknown(uint256 stages, uint256 actual);
    error StageCommitted(RequestId requestId, uint16 stage);
    error ConsentInvalid(uint16 stage, address requester);
    error WitnessInvalid(uint16 stage, address witness);
    error FeeShareOutOfRange(uint256 maximum, uint256 actual);
    error WindowOutOfRange(uint256 minimum, uint256 actual);

    event RequestOpened(
        RequestId indexed requestId,
        address indexed requester,
        PlanId indexed planId,
        uint256 deposit,
        uint256 feePerToken,
        uint32 promptTokens,
        uint32 maximumTokens,
        bytes32 inputCommitment,
        bytes32 secretHash,
        uint64 deadline
    );
    event RequestRouted(RequestId indexed requestId, address[] nodes, uint64 deadline);
    event StageReplaced(RequestId indexed requestId, uint16 indexed stage, address indexed replaced, address node);
    event RequestCommitted(RequestId indexed requestId, uint64 deadline);
    event RequestVerified(RequestId indexed requestId);
    event RequestSettled(
        RequestId indexed requestId,
        uint256 paidToExecutors,
        uint256 paidToVerifiers,
        uint256 protocolFee,
        uint256 refunded
    );
    event RequestRefunded(RequestId indexed requestId, address indexed requester, uint256 refunded);
    /// @dev `requestId` is the request the credit comes from.
    event Credited(RequestId indexed requestId, address indexed account, uint256 amount, uint256 credit);
    event CreditWithdrawn(address indexed account, uint256 amount);

    /// @notice Open a request and deposit its fee. The deposit must be at least `quote(planId, promptTokens, maximumTokens)`.
    /// @param nonce chosen by the requester; opening twice with one nonce reverts, so a client can retry safely.
    function open(
        PlanId planId,
        uint256 nonce,
        bytes32 inputCommitment,
        bytes32 secretHash,
        uint32 promptTokens,
        uint32 maximumTokens
    ) external payable returns (RequestId requestId);

    /// @notice `open` and `route` in one, by the requester, who chooses the replicas: for who wants to avoid some, or to have its route in the
    ///         block of its payment.
    function openRouted(
        PlanId planId,
        uint256 nonce,
        bytes32 inputCommitment,
        bytes32 secretHash,
        uint32 promptTokens,
        uint32 maximumTokens,
        Assignment[] calldata assignments,
        bytes32[][] calldata proofs
    ) external payable returns (RequestId requestId);

    /// @notice Open, route and commit a request that was served out of a tab and that a batch has to show: RequestTabs only, which has checked
    ///         the requester's ticket and the nodes' signatures. The deposit is what the batch paid for it, which may be less than its
    ///         quote; a committee certainly sits. From here on it is a request like every other.
    /// @param requestId RequestTabs' ticket digest, which no `requestIdOf` can equal.
    function openCommitted(
        RequestId requestId,
        Offer calldata offer,
        Assignment[] calldata assignments,
        bytes32[][] calldata proofs,
        bytes32[] calldata commitments
    ) external payable;

    /// @notice Fix one replica per stage. Only the publisher of the request's plan, before the deadline. Opens a duty for each node.
    function route(RequestId requestId, Assignment[] calldata assignments, bytes32[][] calldata proofs) external;

    /// @notice Put other nodes in the place of those that stopped while the request is Routed, in the order given. Anyone may call; the new nodes
    ///         do, before they commit. The requester chooses, and the node before agrees: so no requester can take the pay of a node that did
    ///         its work. A replacement of a node that no longer serves its stage is passed over: somebody was faster.
    function replaceStages(RequestId requestId, Replacement[] calldata replacements) external;

    /// @notice After the deadline of Open, Routed, Committed or Verified: give the deposit back to the requester as credit. Anyone may call.
    function claimRefund(RequestId requestId) external;

    /// @notice Push an account's credit to that account. Anyone may call.
    function withdrawCredit(address account) external;

    /// @notice All stages have committed. OutputVerification only.
    function markCommitted(RequestId requestId) external;

    /// @notice A verdict was reached; the challenge window runs. OutputVerification only.
    function markVerified(RequestId requestId) external;

    /// @notice From Verified back to Committed: a challenge calls another committee. OutputVerification only. The deadline stays.
    function reopen(RequestId requestId) external;

    /// @notice Pay executors and verifiers. OutputVerification only, from Verified and until its deadline.
    /// @param outputTokens charged answer tokens, at most maximumTokens.
    /// @param stagePaid per stage; the share of an unpaid stage goes back to the requester.
    /// @param verifiers operators' share receivers, one entry per paid attestation (node keys).
    function settle(RequestId requestId, uint32 outputTokens, bool[] calldata stagePaid, address[] calldata verifiers)
        external;

    /// @notice The verdict is against the pipeline, or there is none: give everything back. OutputVerification only.
    function refund(RequestId requestId) external;

    /// @notice Wei a request must deposit.
    function quote(PlanId planId, uint32 promptTokens, uint32 maximumTokens) external view returns (uint256);

    function requestIdOf(address requester, uint256 nonce) external view returns (RequestId);
    function requestOf(RequestId requestId) external view returns (Request memory);
    function stageOf(RequestId requestId, uint16 stage) external view returns (Stage memory);
    function stagesOf(RequestId requestId) external view returns (Stage[] memory);
    function creditOf(address account) external view returns (uint256);

    /// @notice The part of a request that decides what may happen next, in one cheap read.
    function statusOf(RequestId requestId)
        external
        view
        returns (RequestStatus status, uint16 stageCount, uint64 deadline, uint32 maximumTokens);

    /// @notice Node that executes `stage`, or the zero address.
    function executorOf(RequestId requestId, uint16 stage) external view returns (address);

    /// @notice keccak256(abi.encode(secret)) of the requester's secret.
    function secretHashOf(RequestId requestId) external view returns (bytes32);

    function protocolFeeBps() external view returns (uint256);
    function verifierShareBps() external view returns (uint256);
    function treasury() external view returns (address);

    /// @notice Everything this contract was deployed with.
    function terms() external view returns (EscrowTerms memory);

    function registry() external view returns (INodeRegistry);
    function assignments() external view returns (IShardAssignments);
    function verification() external view returns (address);

    /// @notice RequestTabs: may open requests that are committed already.
    function tabs() external view returns (address);
}
