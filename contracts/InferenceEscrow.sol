// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

import {ReentrancyGuardTransient} from "solady/utils/ReentrancyGuardTransient.sol";
import {SafeCastLib} from "solady/utils/SafeCastLib.sol";
import {SafeTransferLib} from "solady/utils/SafeTransferLib.sol";

import {IInferenceEscrow, Offer, Replacement, Request, RequestStatus, Stage} from "./interfaces/IInferenceEscrow.sol";
import {INodeRegistry, NodeStatus} from "./interfaces/INodeRegistry.sol";
import {IOutputVerification} from "./interfaces/IOutputVerification.sol";
import {IShardAssignments, Plan} from "./interfaces/IShardAssignments.sol";
import {NodeSignature} from "./libraries/NodeSignature.sol";
import {TypedData} from "./libraries/TypedData.sol";
import {Assignment} from "./types/Assignment.sol";
import {PlanId, RequestId} from "./types/Identifiers.sol";
import {EscrowTerms} from "./types/Terms.sol";

/// @title Deposits, fees, refunds
/// @notice See IInferenceEscrow. No owner, no setter, no proxy.
/// @dev MONEY-01: the balance is at least the deposits of all unfinished requests plus all credits; forced ether only adds to it,
///      because every payment is made out of a variable and never out of the balance.
contract InferenceEscrow is IInferenceEscrow, ReentrancyGuardTransient {
    /// @dev A stage without its end, which is where the next stage or the model ends: two words instead of three.
    struct RoutedStage {
        address node;
        uint64 workWeight;
        uint32 firstUnit;
        bytes32 executionClass;
    }

    /// @dev How a charge is divided. Wei.
    struct Division {
        uint256 protocolFee;
        uint256 executorPot;
        uint256 verifierPot;
    }

    uint256 private constant _BASIS_POINTS = 10_000;
    uint256 private constant _MAXIMUM_SHARES_BPS = 5000;
    /// @dev Enough for a contract wallet that logs its receipts, and a bound on what a hostile receiver can burn.
    uint256 private constant _TRANSFER_GAS = 100_000;
    uint256 private constant _MAXIMUM_REPLACEMENTS = 64;
    bytes32 private constant _NAME_HASH = keccak256("bsns InferenceEscrow");
    bytes32 private constant _REPLACEMENT_TYPEHASH =
        keccak256("StageReplacement(bytes32 requestId,uint16 stage,address replaced,address node)");

    /// @inheritdoc IInferenceEscrow
    INodeRegistry public immutable registry;
    /// @inheritdoc IInferenceEscrow
    IShardAssignments public immutable assignments;
    /// @inheritdoc IInferenceEscrow
    address public immutable verification;
    /// @inheritdoc IInferenceEscrow
    address public immutable tabs;
    /// @inheritdoc IInferenceEscrow
    address public immutable treasury;
    uint16 private immutable _protocolFeeBps;
    uint16 private immutable _verifierShareBps;
    uint64 private immutable _routeWindow;
    uint64 private immutable _commitWindow;
    uint64 private immutable _verificationWindow;
    uint32 private immutable _maximumTokens;

    /// @dev `status` is never Expired in storage: that follows from the deadline.
    mapping(RequestId => Request) private _requests;
    mapping(RequestId => mapping(uint256 stage => RoutedStage)) private _stages;
    mapping(address account => uint256) private _credits;

    constructor(
        address registry_,
        address assignments_,
        address verification_,
        address tabs_,
        address treasury_,
        EscrowTerms memory terms_
    ) {
        uint256 shares = uint256(terms_.protocolFeeBps) + terms_.verifierShareBps;
        if (shares > _MAXIMUM_SHARES_BPS) revert FeeShareOutOfRange(_MAXIMUM_SHARES_BPS, shares);
        // A fee for nobody would be locked up for ever.
        if (treasury_ == address(0) && terms_.protocolFeeBps != 0) revert FeeShareOutOfRange(0, terms_.protocolFeeBps);
        if (terms_.routeWindow == 0 || terms_.commitWindow == 0 || terms_.verificationWindow == 0) {
            revert WindowOutOfRange(1, 0);
        }
        if (terms_.maximumTokens == 0) revert TokensOutOfRange(0, 0);
        registry = INodeRegistry(registry_);
        assignments = IShardAssignments(assignments_);
        verification = verification_;
        tabs = tabs_;
        treasury = treasury_;
        _protocolFeeBps = terms_.protocolFeeBps;
        _verifierShareBps = terms_.verifierShareBps;
        _routeWindow = terms_.routeWindow;
        _commitWindow = terms_.commitWindow;
        _verificationWindow = terms_.verificationWindow;
        _maximumTokens = terms_.maximumTokens;
    }

    modifier onlyVerification() {
        if (msg.sender != verification) revert NotVerification(msg.sender);
        _;
    }

    modifier onlyTabs() {
        if (msg.sender != tabs) revert NotTabs(msg.sender);
        _;
    }

    // ---------------------------------------------------------------------------------------------------------------------
    //  Requests
    // ---------------------------------------------------------------------------------------------------------------------

    /// @inheritdoc IInferenceEscrow
    function open(
        PlanId planId,
        uint256 nonce,
        bytes32 inputCommitment,
        bytes32 secretHash,
        uint32 promptTokens,
        uint32 maximumTokens
    ) external payable returns (RequestId requestId) {
        requestId = _openOwn(nonce, planId, inputCommitment, secretHash, promptTokens, maximumTokens);
    }

    /// @inheritdoc IInferenceEscrow
    function openRouted(
        PlanId planId,
        uint256 nonce,
        bytes32 inputCommitment,
        bytes32 secretHash,
        uint32 promptTokens,
        uint32 maximumTokens,
        Assignment[] calldata assignments_,
        bytes32[][] calldata proofs
    ) external payable returns (RequestId requestId) {
        requestId = _openOwn(nonce, planId, inputCommitment, secretHash, promptTokens, maximumTokens);
        _routeAsPaid(requestId, assignments_, proofs);
    }

    /// @inheritdoc IInferenceEscrow
    /// @dev All statuses up to Committed in one call, with the events of each. The nodes need not be Active: they were on duty for the batch.
    function openCommitted(
        RequestId requestId,
        Offer calldata offer,
        Assignment[] calldata assignments_,
        bytes32[][] calldata proofs,
        bytes32[] calldata commitments
    ) external payable onlyTabs {
        _requireAcceptable(requestId, offer);
        _open(requestId, offer);
        uint256 stageCount = _fixRoute(requestId, assignments.planOf(offer.planId), assignments_, proofs, false);
        if (commitments.length != stageCount) revert RouteIncomplete(stageCount, commitments.length);
        IOutputVerification(verification).commitStages(requestId, commitments, offer.maximumTokens);
    }

    /// @inheritdoc IInferenceEscrow
    function route(RequestId requestId, Assignment[] calldata assignments_, bytes32[][] calldata proofs) external {
        Request storage request = _requests[requestId];
        _requireStatus(requestId, request, RequestStatus.Open);
        if (block.timestamp > request.deadline) revert DeadlinePassed(request.deadline, block.timestamp);
        Plan memory plan = assignments.planOf(request.planId);
        if (msg.sender != plan.publisher) revert NotPlanPublisher(plan.publisher, msg.sender);
        _fixRoute(requestId, plan, assignments_, proofs, true);
    }

    /// @inheritdoc IInferenceEscrow
    function replaceStages(RequestId requestId, Replacement[] calldata replacements) external {
        Request storage request = _requests[requestId];
        _requireLive(requestId, request, RequestStatus.Routed);
        if (replacements.length > _MAXIMUM_REPLACEMENTS) {
            revert TooManyReplacements(_MAXIMUM_REPLACEMENTS, replacements.length);
        }
        for (uint256 i; i < replacements.length; ++i) {
            _replace(requestId, request, replacements[i]);
        }
    }

    /// @inheritdoc IInferenceEscrow
    /// @dev MONEY-03. Nobody is jailed here: the chain cannot tell which stage was silent.
    function claimRefund(RequestId requestId) external {
        Request storage request = _requests[requestId];
        RequestStatus status = request.status;
        if (status == RequestStatus.Absent) revert RequestUnknown(requestId);
        if (status == RequestStatus.Settled || status == RequestStatus.Refunded) {
            revert WrongRequestStatus(requestId, RequestStatus.Expired, status);
        }
        if (block.timestamp <= request.deadline) revert DeadlineNotPassed(request.deadline, block.timestamp);

        _refund(requestId, request);
        if (status != RequestStatus.Open) IOutputVerification(verification).abandon(requestId);
    }

    // ---------------------------------------------------------------------------------------------------------------------
    //  Verdicts
    // ---------------------------------------------------------------------------------------------------------------------

    /// @inheritdoc IInferenceEscrow
    function markCommitted(RequestId requestId) external onlyVerification {
        Request storage request = _requests[requestId];
        _requireLive(requestId, request, RequestStatus.Routed);
        uint64 deadline = _now() + _verificationWindow;
        request.status = RequestStatus.Committed;
        request.deadline = deadline;
        emit RequestCommitted(requestId, deadline);
    }

    /// @inheritdoc IInferenceEscrow
    function markVerified(RequestId requestId) external onlyVerification {
        Request storage request = _requests[requestId];
        _requireLive(requestId, request, RequestStatus.Committed);
        request.status = RequestStatus.Verified;
        emit RequestVerified(requestId);
    }

    /// @inheritdoc IInferenceEscrow
    /// @dev The deadline stays: challenges cannot keep a deposit away from its owners for longer than one verification window.
    function reopen(RequestId requestId) external onlyVerification {
        Request storage request = _requests[requestId];
        _requireLive(requestId, request, RequestStatus.Verified);
        request.status = RequestStatus.Committed;
        emit RequestCommitted(requestId, request.deadline);
    }

    /// @inheritdoc IInferenceEscrow
    /// @dev MONEY-02: whatever is not credited to somebody else is refunded, so the parts add up to the deposit.
    function settle(RequestId requestId, uint32 outputTokens, bool[] calldata stagePaid, address[] calldata verifiers)
        external
        onlyVerification
    {
        Request storage request = _requests[requestId];
        _requireLive(requestId, request, RequestStatus.Verified);
        uint256 stageCount = request.stageCount;
        if (outputTokens > request.maximumTokens) revert TokensOutOfRange(request.maximumTokens, outputTokens);
        if (stagePaid.length != stageCount) revert RouteIncomplete(stageCount, stagePaid.length);
        request.status = RequestStatus.Settled;

        Division memory division = _divide(request, outputTokens, verifiers.length);
        _credit(requestId, treasury, division.protocolFee);
        uint256 paidToExecutors = _payExecutors(requestId, division.executorPot, stagePaid);
        _payVerifiers(requestId, division.verifierPot, verifiers);
        uint256 refunded = request.deposit - division.protocolFee - paidToExecutors - division.verifierPot;
        _credit(requestId, request.requester, refunded);
        emit RequestSettled(requestId, paidToExecutors, division.verifierPot, division.protocolFee, refunded);
        _closeDuties(requestId, stageCount);
    }

    /// @inheritdoc IInferenceEscrow
    /// @dev Allowed after the deadline too: a verdict against the pipeline gives the requester what an expiry would.
    function refund(RequestId requestId) external onlyVerification {
        Request storage request = _requests[requestId];
        RequestStatus status = request.status;
        if (status != RequestStatus.Routed && status != RequestStatus.Committed && status != RequestStatus.Verified) {
            revert WrongRequestStatus(requestId, RequestStatus.Committed, status);
        }
        _refund(requestId, request);
    }

    // ---------------------------------------------------------------------------------------------------------------------
    //  Credits
    // ---------------------------------------------------------------------------------------------------------------------

    /// @inheritdoc IInferenceEscrow
    function withdrawCredit(address account) external nonReentrant {
        uint256 amount = _credits[account];
        if (amount == 0) revert NoCredit(account);
        _credits[account] = 0;
        emit CreditWithdrawn(account, amount);
        // A receiver that refuses the money stops nobody but itself.
        if (!SafeTransferLib.trySafeTransferETH(account, amount, _TRANSFER_GAS)) {
            revert TransferFailed(account, amount);
        }
    }

    // ---------------------------------------------------------------------------------------------------------------------
    //  Views
    // ---------------------------------------------------------------------------------------------------------------------

    /// @inheritdoc IInferenceEscrow
    function quote(PlanId planId, uint32 promptTokens, uint32 maximumTokens) external view returns (uint256) {
        return _charge(assignments.planOf(planId).feePerToken, promptTokens, maximumTokens);
    }

    /// @inheritdoc IInferenceEscrow
    function requestOf(RequestId requestId) external view returns (Request memory request) {
        request = _requests[requestId];
        request.status = _statusOf(_requests[requestId]);
    }

    /// @inheritdoc IInferenceEscrow
    function statusOf(RequestId requestId)
        external
        view
        returns (RequestStatus status, uint16 stageCount, uint64 deadline, uint32 maximumTokens)
    {
        Request storage request = _requests[requestId];
        return (_statusOf(request), request.stageCount, request.deadline, request.maximumTokens);
    }

    /// @inheritdoc IInferenceEscrow
    function executorOf(RequestId requestId, uint16 stage) external view returns (address) {
        return _stages[requestId][stage].node;
    }

    /// @inheritdoc IInferenceEscrow
    function secretHashOf(RequestId requestId) external view returns (bytes32) {
        return _requests[requestId].secretHash;
    }

    /// @inheritdoc IInferenceEscrow
    function stageOf(RequestId requestId, uint16 stage) external view returns (Stage memory) {
        return _stageOf(requestId, stage, _requests[requestId].stageCount);
    }

    /// @inheritdoc IInferenceEscrow
    function stagesOf(RequestId requestId) external view returns (Stage[] memory stages) {
        uint256 stageCount = _requests[requestId].stageCount;
        stages = new Stage[](stageCount);
        for (uint256 i; i < stageCount; ++i) {
            stages[i] = _stageOf(requestId, i, stageCount);
        }
    }

    /// @inheritdoc IInferenceEscrow
    function creditOf(address account) external view returns (uint256) {
        return _credits[account];
    }

    /// @inheritdoc IInferenceEscrow
    function protocolFeeBps() external view returns (uint256) {
        return _protocolFeeBps;
    }

    /// @inheritdoc IInferenceEscrow
    function verifierShareBps() external view returns (uint256) {
        return _verifierShareBps;
    }

    /// @inheritdoc IInferenceEscrow
    function terms() external view returns (EscrowTerms memory) {
        return EscrowTerms(
            _protocolFeeBps, _verifierShareBps, _routeWindow, _commitWindow, _verificationWindow, _maximumTokens
        );
    }

    /// @inheritdoc IInferenceEscrow
    function requestIdOf(address requester, uint256 nonce) public view returns (RequestId) {
        return RequestId.wrap(keccak256(abi.encode(block.chainid, address(this), requester, nonce)));
    }

    // ---------------------------------------------------------------------------------------------------------------------
    //  Inside
    // ---------------------------------------------------------------------------------------------------------------------

    function _requireAcceptable(RequestId requestId, Offer memory offer) private view {
        if (_requests[requestId].status != RequestStatus.Absent) revert RequestAlreadyOpen(requestId);
        if (offer.inputCommitment == 0 || offer.secretHash == 0) revert CommitmentMissing();
        if (offer.maximumTokens == 0 || offer.maximumTokens > _maximumTokens) {
            revert TokensOutOfRange(_maximumTokens, offer.maximumTokens);
        }
        if (offer.promptTokens > _maximumTokens) revert TokensOutOfRange(_maximumTokens, offer.promptTokens);
    }

    function _openOwn(
        uint256 nonce,
        PlanId planId,
        bytes32 inputCommitment,
        bytes32 secretHash,
        uint32 promptTokens,
        uint32 maximumTokens
    ) private returns (RequestId requestId) {
        requestId = requestIdOf(msg.sender, nonce);
        Offer memory offer = Offer(msg.sender, planId, 0, inputCommitment, secretHash, promptTokens, maximumTokens);
        _requireAcceptable(requestId, offer);
        offer.feePerToken = _requireOffer(planId, promptTokens, maximumTokens);
        _open(requestId, offer);
    }

    function _routeAsPaid(RequestId requestId, Assignment[] calldata assignments_, bytes32[][] calldata proofs)
        private
    {
        Plan memory plan = assignments.planOf(_requests[requestId].planId);
        _fixRoute(requestId, plan, assignments_, proofs, true);
    }

    /// @dev Deposits what came with the call.
    function _open(RequestId requestId, Offer memory offer) private {
        Request storage request = _requests[requestId];
        uint64 openedAt = _now();
        request.requester = offer.requester;
        request.status = RequestStatus.Open;
        request.openedAt = openedAt;
        request.deadline = openedAt + _routeWindow;
        request.promptTokens = offer.promptTokens;
        request.maximumTokens = offer.maximumTokens;
        request.deposit = SafeCastLib.toUint128(msg.value);
        request.feePerToken = offer.feePerToken;
        request.planId = offer.planId;
        request.inputCommitment = offer.inputCommitment;
        request.secretHash = offer.secretHash;
        emit RequestOpened(
            requestId,
            offer.requester,
            offer.planId,
            msg.value,
            offer.feePerToken,
            offer.promptTokens,
            offer.maximumTokens,
            offer.inputCommitment,
            offer.secretHash,
            openedAt + _routeWindow
        );
    }

    /// @dev One node per stage, each with its proof against the plan, and Active if it still has to `serve`. From Open to Routed.
    function _fixRoute(
        RequestId requestId,
        Plan memory plan,
        Assignment[] calldata assignments_,
        bytes32[][] calldata proofs,
        bool serve
    ) private returns (uint256 stageCount) {
        stageCount = plan.stageCount;
        if (assignments_.length != stageCount) revert RouteIncomplete(stageCount, assignments_.length);
        if (proofs.length != stageCount) revert RouteIncomplete(stageCount, proofs.length);

        Request storage request = _requests[requestId];
        uint64 deadline = _now() + _commitWindow;
        request.status = RequestStatus.Routed;
        request.stageCount = plan.stageCount;
        request.deadline = deadline;

        PlanId planId = request.planId;
        address[] memory nodes = new address[](stageCount);
        for (uint256 i; i < nodes.length; ++i) {
            nodes[i] = assignments_[i].node;
            _assign(requestId, planId, i, assignments_[i], proofs[i]);
            if (serve && registry.statusOf(nodes[i]) != NodeStatus.Active) revert NodeNotActive(nodes[i]);
        }
        emit RequestRouted(requestId, nodes, deadline);
        registry.openDuties(nodes);
    }

    /// @dev The stage keeps its units and changes its node. The duty of the one that stopped ends with it: it is not paid, and no more.
    function _replace(RequestId requestId, Request storage request, Replacement calldata replacement) private {
        uint256 stageCount = request.stageCount;
        uint16 stage = replacement.assignment.stage;
        address replaced = replacement.replaced;
        address node = replacement.assignment.node;
        if (stage >= stageCount) revert StageUnknown(stageCount, stage);
        if (_stages[requestId][stage].node != replaced) return;
        if (IOutputVerification(verification).stageRecordOf(requestId, stage).commitment != 0) {
            revert StageCommitted(requestId, stage);
        }

        bytes32 digest = TypedData.digestOf(
            _NAME_HASH, keccak256(abi.encode(_REPLACEMENT_TYPEHASH, requestId, stage, replaced, node))
        );
        if (!NodeSignature.isSignedBy(digest, replacement.consent, request.requester)) {
            revert ConsentInvalid(stage, request.requester);
        }
        address witness = _witnessOf(requestId, stageCount, stage, replaced);
        if (witness != address(0) && !NodeSignature.isSignedBy(digest, replacement.witness, witness)) {
            revert WitnessInvalid(stage, witness);
        }
        _assign(requestId, request.planId, stage, replacement.assignment, replacement.proof);
        if (registry.statusOf(node) != NodeStatus.Active) revert NodeNotActive(node);
        emit StageReplaced(requestId, stage, replaced, node);
        registry.openDuties(_only(node));
        registry.closeDuties(_only(replaced));
    }

    /// @dev The zero address where all stages are those of `replaced`.
    function _witnessOf(RequestId requestId, uint256 stageCount, uint256 stage, address replaced)
        private
        view
        returns (address)
    {
        for (uint256 back = 1; back < stageCount; ++back) {
            address node = _stages[requestId][(stage + stageCount - back) % stageCount].node;
            if (node != replaced) return node;
        }
        return address(0);
    }

    function _only(address node) private pure returns (address[] memory nodes) {
        nodes = new address[](1);
        nodes[0] = node;
    }

    function _assign(
        RequestId requestId,
        PlanId planId,
        uint256 stage,
        Assignment calldata assignment,
        bytes32[] calldata proof
    ) private {
        if (assignment.stage != stage || !assignments.isAssigned(planId, assignment, proof)) {
            revert NotAssigned(stage, assignment.node);
        }
        _stages[requestId][stage] =
            RoutedStage(assignment.node, assignment.workWeight, assignment.firstUnit, assignment.executionClass);
    }

    /// @dev The plan must be in effect and the value must cover its quote. Returns its fee per token.
    function _requireOffer(PlanId planId, uint32 promptTokens, uint32 maximumTokens) private view returns (uint128) {
        Plan memory plan = assignments.planOf(planId);
        PlanId active = assignments.activePlan(plan.modelId, plan.publisher);
        if (PlanId.unwrap(active) != PlanId.unwrap(planId)) revert PlanNotActive(planId, active);
        uint256 due = _charge(plan.feePerToken, promptTokens, maximumTokens);
        if (msg.value < due) revert FeeBelowQuote(due, msg.value);
        return plan.feePerToken;
    }

    function _divide(Request storage request, uint32 outputTokens, uint256 verifiers)
        private
        view
        returns (Division memory division)
    {
        uint256 charge = _charge(request.feePerToken, request.promptTokens, outputTokens);
        if (charge > request.deposit) charge = request.deposit;
        division.protocolFee = charge * _protocolFeeBps / _BASIS_POINTS;
        if (verifiers != 0) division.verifierPot = charge * _verifierShareBps / _BASIS_POINTS;
        division.executorPot = charge - division.protocolFee - division.verifierPot;
    }

    /// @dev Shares by declared work, rounded down; the last paid stage takes the dust. The share of an unpaid stage stays out, so that
    ///      nobody gains by the failure of another.
    function _payExecutors(RequestId requestId, uint256 pot, bool[] calldata stagePaid) private returns (uint256 paid) {
        uint256 totalWeight;
        uint256 lastPaid = type(uint256).max;
        for (uint256 i; i < stagePaid.length; ++i) {
            totalWeight += _stages[requestId][i].workWeight;
            if (stagePaid[i]) lastPaid = i;
        }
        if (lastPaid == type(uint256).max) return 0;

        uint256 unassigned = pot;
        for (uint256 i; i < stagePaid.length; ++i) {
            if (i != lastPaid) unassigned -= pot * _stages[requestId][i].workWeight / totalWeight;
        }
        for (uint256 i; i < stagePaid.length; ++i) {
            if (!stagePaid[i]) continue;
            RoutedStage storage stage = _stages[requestId][i];
            uint256 share = i == lastPaid ? unassigned : pot * stage.workWeight / totalWeight;
            paid += share;
            _credit(requestId, registry.operatorOf(stage.node), share);
        }
    }

    /// @dev Equal shares; the last takes the dust. Every verifier still has its duty open, so its account is there.
    function _payVerifiers(RequestId requestId, uint256 pot, address[] calldata verifiers) private {
        uint256 count = verifiers.length;
        if (count == 0) return;
        uint256 share = pot / count;
        for (uint256 i; i < count; ++i) {
            // The last takes what the division left over.
            // slither-disable-next-line divide-before-multiply
            if (i == count - 1) share = pot - share * i;
            _credit(requestId, registry.operatorOf(verifiers[i]), share);
        }
    }

    /// @dev MONEY-02: the status leaves the live ones for ever in the same call.
    function _refund(RequestId requestId, Request storage request) private {
        request.status = RequestStatus.Refunded;
        uint256 deposit = request.deposit;
        _credit(requestId, request.requester, deposit);
        emit RequestRefunded(requestId, request.requester, deposit);
        _closeDuties(requestId, request.stageCount); // none before the route: stageCount is 0
    }

    function _closeDuties(RequestId requestId, uint256 stageCount) private {
        if (stageCount == 0) return;
        address[] memory nodes = new address[](stageCount);
        for (uint256 i; i < stageCount; ++i) {
            nodes[i] = _stages[requestId][i].node;
        }
        registry.closeDuties(nodes);
    }

    function _credit(RequestId requestId, address account, uint256 amount) private {
        if (amount == 0) return;
        uint256 credit = _credits[account] + amount;
        _credits[account] = credit;
        emit Credited(requestId, account, amount, credit);
    }

    function _requireStatus(RequestId requestId, Request storage request, RequestStatus expected) private view {
        RequestStatus actual = request.status;
        if (actual == RequestStatus.Absent) revert RequestUnknown(requestId);
        if (actual != expected) revert WrongRequestStatus(requestId, expected, actual);
    }

    /// @dev The expected status, and its deadline not passed.
    function _requireLive(RequestId requestId, Request storage request, RequestStatus expected) private view {
        RequestStatus actual = _statusOf(request);
        if (actual == RequestStatus.Absent) revert RequestUnknown(requestId);
        if (actual != expected) revert WrongRequestStatus(requestId, expected, actual);
    }

    function _statusOf(Request storage request) private view returns (RequestStatus status) {
        status = request.status;
        bool live = status != RequestStatus.Absent && status < RequestStatus.Settled;
        if (live && block.timestamp > request.deadline) return RequestStatus.Expired;
    }

    function _stageOf(RequestId requestId, uint256 index, uint256 stageCount)
        private
        view
        returns (Stage memory stage)
    {
        if (index >= stageCount) return stage;
        RoutedStage storage routed = _stages[requestId][index];
        stage.node = routed.node;
        stage.workWeight = routed.workWeight;
        stage.firstUnit = routed.firstUnit;
        stage.executionClass = routed.executionClass;
        stage.endUnit = index + 1 < stageCount
            ? _stages[requestId][index + 1].firstUnit
            : assignments.modelOf(assignments.planOf(_requests[requestId].planId).modelId).unitCount;
    }

    function _now() private view returns (uint64) {
        return uint64(block.timestamp); // seconds reach 2^64 in 584 billion years
    }

    function _charge(uint128 feePerToken, uint32 promptTokens, uint32 answerTokens) private pure returns (uint256) {
        return uint256(feePerToken) * (uint256(promptTokens) + answerTokens);
    }
}
