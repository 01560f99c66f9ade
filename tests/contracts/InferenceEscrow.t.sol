// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

import {IInferenceEscrow, Request, RequestStatus, Stage} from "../../contracts/interfaces/IInferenceEscrow.sol";
import {IShardAssignments} from "../../contracts/interfaces/IShardAssignments.sol";
import {Assignment} from "../../contracts/types/Assignment.sol";
import {PlanId, RequestId} from "../../contracts/types/Identifiers.sol";
import {EscrowTerms} from "../../contracts/types/Terms.sol";
import {Refuser} from "./Recipients.sol";
import {Swarm} from "./Swarm.sol";

/// @dev Specification: InferenceEscrow.tree. A plan of three stages on the nodes 0, 1, 2 with weights 100, 101, 102; OutputVerification
///      is played by a prank, so that every order of its calls can be tried.
abstract contract InferenceEscrowScenario is Swarm {
    PlanId internal _plan;

    function setUp() public {
        _deployNetwork();
        _addNodes(0, 5);
        _plan = _newPlan(3);
    }

    function _markCommitted(RequestId id) internal {
        vm.prank(address(verification));
        escrow.markCommitted(id);
    }

    function _markVerified(RequestId id) internal {
        vm.prank(address(verification));
        escrow.markVerified(id);
    }

    /// @dev A request in the given live status.
    function _requestIn(RequestStatus status) internal returns (RequestId id) {
        id = _open(_plan);
        if (status >= RequestStatus.Routed) _route(id);
        if (status >= RequestStatus.Committed) _markCommitted(id);
        if (status >= RequestStatus.Verified) _markVerified(id);
        if (status == RequestStatus.Settled) _settle(id, ANSWER_TOKENS, _allPaid(), new address[](0));
        if (status == RequestStatus.Refunded) {
            vm.prank(address(verification));
            escrow.refund(id);
        }
        _assertRequest(id, status);
    }

    function _settle(RequestId id, uint32 tokens, bool[] memory paid, address[] memory verifiers) internal {
        vm.prank(address(verification));
        escrow.settle(id, tokens, paid, verifiers);
    }

    function _allPaid() internal pure returns (bool[] memory paid) {
        paid = new bool[](3);
        (paid[0], paid[1], paid[2]) = (true, true, true);
    }

    function _expectWrongStatus(RequestId id, RequestStatus expected, RequestStatus actual) internal {
        vm.expectRevert(abi.encodeWithSelector(IInferenceEscrow.WrongRequestStatus.selector, id, expected, actual));
    }

    function _duties(uint256 i) internal view returns (uint256) {
        return registry.accountOf(_hot(i)).openDuties;
    }
}

contract InferenceEscrowTest is InferenceEscrowScenario {
    // ------------------------------------------------------------------------------------------------------------- open

    function test_open_withTheQuotedDeposit_isRecordedAndAnnounced() public {
        uint256 deposit = uint256(FEE) * (PROMPT_TOKENS + MAXIMUM_TOKENS);
        assertEq(escrow.quote(_plan, PROMPT_TOKENS, MAXIMUM_TOKENS), deposit);
        RequestId expected =
            RequestId.wrap(keccak256(abi.encode(block.chainid, address(escrow), requester, uint256(42))));
        uint64 deadline = uint64(block.timestamp) + escrow.terms().routeWindow;
        vm.deal(requester, deposit);
        vm.expectEmit(address(escrow));
        emit IInferenceEscrow.RequestOpened(
            expected,
            requester,
            _plan,
            deposit,
            FEE,
            PROMPT_TOKENS,
            MAXIMUM_TOKENS,
            INPUT_COMMITMENT,
            keccak256("secret hash"),
            deadline
        );
        vm.prank(requester);
        RequestId id = escrow.open{value: deposit}(
            _plan, 42, INPUT_COMMITMENT, keccak256("secret hash"), PROMPT_TOKENS, MAXIMUM_TOKENS
        );
        assertEq(RequestId.unwrap(id), RequestId.unwrap(expected));
        assertEq(RequestId.unwrap(escrow.requestIdOf(requester, 42)), RequestId.unwrap(expected));

        Request memory request = escrow.requestOf(id);
        assertEq(request.requester, requester);
        assertEq(uint8(request.status), uint8(RequestStatus.Open));
        assertEq(request.stageCount, 0);
        assertEq(request.openedAt, block.timestamp);
        assertEq(request.deadline, deadline);
        assertEq(request.promptTokens, PROMPT_TOKENS);
        assertEq(request.maximumTokens, MAXIMUM_TOKENS);
        assertEq(request.deposit, deposit);
        assertEq(request.feePerToken, FEE);
        assertEq(PlanId.unwrap(request.planId), PlanId.unwrap(_plan));
        assertEq(request.inputCommitment, INPUT_COMMITMENT);
        assertEq(request.secretHash, keccak256("secret hash"));
        assertEq(address(escrow).balance, deposit);
    }

    function test_open_twiceWithOneNonce_reverts() public {
        vm.deal(requester, 2 ether);
        vm.startPrank(requester);
        RequestId id = escrow.open{value: 1 ether}(_plan, 1, INPUT_COMMITMENT, "s", PROMPT_TOKENS, MAXIMUM_TOKENS);
        vm.expectRevert(abi.encodeWithSelector(IInferenceEscrow.RequestAlreadyOpen.selector, id));
        escrow.open{value: 1 ether}(_plan, 1, INPUT_COMMITMENT, "s", PROMPT_TOKENS, MAXIMUM_TOKENS);
        vm.stopPrank();
    }

    function test_open_belowTheQuote_reverts() public {
        uint256 due = escrow.quote(_plan, PROMPT_TOKENS, MAXIMUM_TOKENS);
        vm.deal(requester, due);
        vm.expectRevert(abi.encodeWithSelector(IInferenceEscrow.FeeBelowQuote.selector, due, due - 1));
        vm.prank(requester);
        escrow.open{value: due - 1}(_plan, 1, INPUT_COMMITMENT, "s", PROMPT_TOKENS, MAXIMUM_TOKENS);
    }

    function test_open_tokensOutOfRange_reverts() public {
        uint32 maximum = escrow.terms().maximumTokens;
        vm.expectRevert(abi.encodeWithSelector(IInferenceEscrow.TokensOutOfRange.selector, maximum, 0));
        escrow.open(_plan, 1, INPUT_COMMITMENT, "s", PROMPT_TOKENS, 0);
        vm.expectRevert(abi.encodeWithSelector(IInferenceEscrow.TokensOutOfRange.selector, maximum, maximum + 1));
        escrow.open(_plan, 1, INPUT_COMMITMENT, "s", PROMPT_TOKENS, maximum + 1);
        vm.expectRevert(abi.encodeWithSelector(IInferenceEscrow.TokensOutOfRange.selector, maximum, maximum + 1));
        escrow.open(_plan, 1, INPUT_COMMITMENT, "s", maximum + 1, MAXIMUM_TOKENS);
    }

    function test_open_withoutCommitments_reverts() public {
        vm.expectRevert(IInferenceEscrow.CommitmentMissing.selector);
        escrow.open(_plan, 1, 0, "s", PROMPT_TOKENS, MAXIMUM_TOKENS);
        vm.expectRevert(IInferenceEscrow.CommitmentMissing.selector);
        escrow.open(_plan, 1, INPUT_COMMITMENT, 0, PROMPT_TOKENS, MAXIMUM_TOKENS);
    }

    function test_open_onAPlanNotInEffect_reverts() public {
        PlanId next = _publish(shards.planOf(_plan).modelId, FEE, _chainOf(3, 0));
        vm.deal(requester, 1 ether);
        vm.expectRevert(abi.encodeWithSelector(IInferenceEscrow.PlanNotActive.selector, next, _plan));
        vm.prank(requester);
        escrow.open{value: 1 ether}(next, 1, INPUT_COMMITMENT, "s", PROMPT_TOKENS, MAXIMUM_TOKENS);
        vm.warp(block.timestamp + shards.planActivationDelay());
        vm.expectRevert(abi.encodeWithSelector(IInferenceEscrow.PlanNotActive.selector, _plan, next));
        vm.prank(requester);
        escrow.open{value: 1 ether}(_plan, 1, INPUT_COMMITMENT, "s", PROMPT_TOKENS, MAXIMUM_TOKENS);
    }

    function test_open_onAnUnknownPlan_reverts() public {
        PlanId unknown = PlanId.wrap("unknown");
        vm.expectRevert(abi.encodeWithSelector(IShardAssignments.PlanUnknown.selector, unknown));
        escrow.open(unknown, 1, INPUT_COMMITMENT, "s", PROMPT_TOKENS, MAXIMUM_TOKENS);
        vm.expectRevert(abi.encodeWithSelector(IShardAssignments.PlanUnknown.selector, unknown));
        escrow.quote(unknown, 1, 1);
    }

    // ------------------------------------------------------------------------------------------------------- openRouted

    function _openRouted(Assignment[] memory route, bytes32[][] memory proofs, uint256 deposit)
        private
        returns (RequestId)
    {
        vm.deal(requester, deposit);
        vm.prank(requester);
        return escrow.openRouted{value: deposit}(
            _plan, 77, INPUT_COMMITMENT, keccak256(abi.encode(SECRET)), PROMPT_TOKENS, MAXIMUM_TOKENS, route, proofs
        );
    }

    function test_openRouted_isOpenAndRouteInOne() public {
        (Assignment[] memory route, bytes32[][] memory proofs) = _routeOver(_plan, new uint16[](3));
        uint256 due = escrow.quote(_plan, PROMPT_TOKENS, MAXIMUM_TOKENS);
        RequestId expected = escrow.requestIdOf(requester, 77);
        address[] memory nodes = new address[](3);
        (nodes[0], nodes[1], nodes[2]) = (_hot(0), _hot(1), _hot(2));
        uint64 deadline = uint64(block.timestamp) + escrow.terms().commitWindow;
        vm.expectEmit(address(escrow));
        emit IInferenceEscrow.RequestRouted(expected, nodes, deadline);
        RequestId id = _openRouted(route, proofs, due + 5);

        assertEq(RequestId.unwrap(id), RequestId.unwrap(expected));
        _assertRequest(id, RequestStatus.Routed);
        Request memory request = escrow.requestOf(id);
        assertEq(request.requester, requester);
        assertEq(request.deposit, due + 5);
        assertEq(request.deadline, deadline);
        for (uint16 i = 0; i < 3; i++) {
            assertEq(escrow.executorOf(id, i), nodes[i]);
            assertEq(_duties(i), 1);
        }
        vm.expectRevert(abi.encodeWithSelector(IInferenceEscrow.RequestAlreadyOpen.selector, id));
        this.openRoutedAgain(route, proofs, due);
    }

    function openRoutedAgain(Assignment[] calldata route, bytes32[][] calldata proofs, uint256 due) external {
        _openRouted(route, proofs, due);
    }

    function test_openRouted_withADepositThatIsShort_reverts() public {
        (Assignment[] memory route, bytes32[][] memory proofs) = _routeOver(_plan, new uint16[](3));
        uint256 due = escrow.quote(_plan, PROMPT_TOKENS, MAXIMUM_TOKENS);
        vm.expectRevert(abi.encodeWithSelector(IInferenceEscrow.FeeBelowQuote.selector, due, due - 1));
        this.openRoutedAgain(route, proofs, due - 1);
        _assertRequest(escrow.requestIdOf(requester, 77), RequestStatus.Absent);
    }

    function test_openRouted_overNodesOutsideThePlan_reverts() public {
        (Assignment[] memory route, bytes32[][] memory proofs) = _routeOver(_plan, new uint16[](3));
        uint256 due = escrow.quote(_plan, PROMPT_TOKENS, MAXIMUM_TOKENS);
        route[1].node = _hot(4);
        vm.expectRevert(abi.encodeWithSelector(IInferenceEscrow.NotAssigned.selector, 1, _hot(4)));
        this.openRoutedAgain(route, proofs, due);
        vm.expectRevert(abi.encodeWithSelector(IInferenceEscrow.RouteIncomplete.selector, 3, 2));
        this.openRoutedAgain(route, new bytes32[][](2), due);
        assertEq(_duties(0), 0);
        assertEq(address(escrow).balance, 0);
    }

    function test_openRouted_overANodeThatLeaves_reverts() public {
        (Assignment[] memory route, bytes32[][] memory proofs) = _routeOver(_plan, new uint16[](3));
        uint256 due = escrow.quote(_plan, PROMPT_TOKENS, MAXIMUM_TOKENS);
        vm.prank(_operator(1));
        registry.beginExit(_hot(1));
        vm.expectRevert(abi.encodeWithSelector(IInferenceEscrow.NodeNotActive.selector, _hot(1)));
        this.openRoutedAgain(route, proofs, due);
    }

    // ------------------------------------------------------------------------------------------------------------ route

    function test_route_byThePublisher_fixesTheStagesAndOpensDuties() public {
        RequestId id = _open(_plan);
        address[] memory nodes = new address[](3);
        (nodes[0], nodes[1], nodes[2]) = (_hot(0), _hot(1), _hot(2));
        uint64 deadline = uint64(block.timestamp) + escrow.terms().commitWindow;
        vm.expectEmit(address(escrow));
        emit IInferenceEscrow.RequestRouted(id, nodes, deadline);
        _route(id);

        _assertRequest(id, RequestStatus.Routed);
        Request memory request = escrow.requestOf(id);
        assertEq(request.stageCount, 3);
        assertEq(request.deadline, deadline);
        Stage[] memory stages = escrow.stagesOf(id);
        Assignment[] memory plan = _chainOf(3, 0);
        for (uint16 i = 0; i < 3; i++) {
            assertEq(stages[i].node, plan[i].node);
            assertEq(stages[i].workWeight, plan[i].workWeight);
            assertEq(stages[i].firstUnit, plan[i].firstUnit);
            assertEq(stages[i].endUnit, plan[i].endUnit);
            assertEq(stages[i].executionClass, plan[i].executionClass);
            assertEq(abi.encode(stages[i]), abi.encode(escrow.stageOf(id, i)));
            assertEq(escrow.executorOf(id, i), plan[i].node);
            assertEq(_duties(i), 1);
        }
        assertEq(escrow.executorOf(id, 3), address(0));
    }

    function test_route_byOthers_reverts() public {
        RequestId id = _open(_plan);
        (Assignment[] memory route, bytes32[][] memory proofs) = _routeOf(id);
        vm.expectRevert(abi.encodeWithSelector(IInferenceEscrow.NotPlanPublisher.selector, publisher, requester));
        vm.prank(requester);
        escrow.route(id, route, proofs);
    }

    function test_route_afterItsDeadline_reverts() public {
        RequestId id = _open(_plan);
        (Assignment[] memory route, bytes32[][] memory proofs) = _routeOf(id);
        uint256 deadline = escrow.requestOf(id).deadline;
        vm.warp(deadline + 1);
        vm.expectRevert(abi.encodeWithSelector(IInferenceEscrow.DeadlinePassed.selector, deadline, deadline + 1));
        vm.prank(publisher);
        escrow.route(id, route, proofs);
    }

    function test_route_atItsDeadline_isAccepted() public {
        RequestId id = _open(_plan);
        vm.warp(escrow.requestOf(id).deadline);
        _route(id);
        _assertRequest(id, RequestStatus.Routed);
    }

    function test_route_incomplete_reverts() public {
        RequestId id = _open(_plan);
        (Assignment[] memory route, bytes32[][] memory proofs) = _routeOf(id);
        vm.expectRevert(abi.encodeWithSelector(IInferenceEscrow.RouteIncomplete.selector, 3, 2));
        vm.prank(publisher);
        escrow.route(id, route, new bytes32[][](2));
        vm.expectRevert(abi.encodeWithSelector(IInferenceEscrow.RouteIncomplete.selector, 3, 0));
        vm.prank(publisher);
        escrow.route(id, new Assignment[](0), proofs);
    }

    function test_route_overNodesOutsideThePlan_reverts() public {
        RequestId id = _open(_plan);
        (Assignment[] memory route, bytes32[][] memory proofs) = _routeOf(id);
        route[1].node = _hot(4);
        _expectNotAssigned(id, route, proofs, 1);
        (route, proofs) = _routeOf(id);
        route[2].workWeight = 1e18;
        _expectNotAssigned(id, route, proofs, 2);
        (route, proofs) = _routeOf(id);
        (route[0], route[1]) = (route[1], route[0]);
        (proofs[0], proofs[1]) = (proofs[1], proofs[0]);
        _expectNotAssigned(id, route, proofs, 0);
        (route, proofs) = _routeOf(id);
        (route[1], proofs[1]) = (route[0], proofs[0]);
        _expectNotAssigned(id, route, proofs, 1);
    }

    function test_route_overANodeThatIsNotActive_reverts() public {
        RequestId id = _open(_plan);
        (Assignment[] memory route, bytes32[][] memory proofs) = _routeOf(id);
        vm.prank(_operator(1));
        registry.beginExit(_hot(1));
        vm.expectRevert(abi.encodeWithSelector(IInferenceEscrow.NodeNotActive.selector, _hot(1)));
        vm.prank(publisher);
        escrow.route(id, route, proofs);
    }

    // ------------------------------------------------------------------------------------------- marks and their order

    function test_marks_inOrder_moveTheRequestAndAnnounceIt() public {
        RequestId id = _newRequest(_plan);
        uint64 deadline = uint64(block.timestamp) + escrow.terms().verificationWindow;
        vm.expectEmit(address(escrow));
        emit IInferenceEscrow.RequestCommitted(id, deadline);
        _markCommitted(id);
        _assertRequest(id, RequestStatus.Committed);

        vm.warp(block.timestamp + 100);
        vm.expectEmit(address(escrow));
        emit IInferenceEscrow.RequestVerified(id);
        _markVerified(id);
        _assertRequest(id, RequestStatus.Verified);

        vm.expectEmit(address(escrow));
        emit IInferenceEscrow.RequestCommitted(id, deadline);
        vm.prank(address(verification));
        escrow.reopen(id);
        _assertRequest(id, RequestStatus.Committed);
        assertEq(escrow.requestOf(id).deadline, deadline, "a challenge does not extend the deadline");
        _markVerified(id);
    }

    /// Every status against every call of OutputVerification: only the arrows of the state machine are open.
    function test_marks_fromEveryOtherStatus_revert() public {
        for (uint8 i = uint8(RequestStatus.Open); i <= uint8(RequestStatus.Refunded); i++) {
            RequestStatus status = RequestStatus(i);
            if (status == RequestStatus.Expired) continue;
            RequestId id = _requestIn(status);
            if (status != RequestStatus.Routed) {
                _expectWrongStatus(id, RequestStatus.Routed, status);
                _markCommitted(id);
            }
            if (status != RequestStatus.Committed) {
                _expectWrongStatus(id, RequestStatus.Committed, status);
                _markVerified(id);
            }
            if (status != RequestStatus.Verified) {
                _expectWrongStatus(id, RequestStatus.Verified, status);
                vm.prank(address(verification));
                escrow.reopen(id);
                _expectWrongStatus(id, RequestStatus.Verified, status);
                _settle(id, ANSWER_TOKENS, _allPaid(), new address[](0));
            }
            if (status == RequestStatus.Open || status > RequestStatus.Verified) {
                _expectWrongStatus(id, RequestStatus.Committed, status);
                vm.prank(address(verification));
                escrow.refund(id);
            }
            if (status != RequestStatus.Open) {
                (Assignment[] memory route, bytes32[][] memory proofs) = _routeOf(id);
                _expectWrongStatus(id, RequestStatus.Open, status);
                vm.prank(publisher);
                escrow.route(id, route, proofs);
            }
            _assertRequest(id, status);
        }
    }

    function test_everyCall_onAnUnknownRequest_reverts() public {
        RequestId unknown = RequestId.wrap("unknown");
        bytes memory reason = abi.encodeWithSelector(IInferenceEscrow.RequestUnknown.selector, unknown);
        vm.expectRevert(reason);
        escrow.claimRefund(unknown);
        vm.expectRevert(reason);
        vm.prank(publisher);
        escrow.route(unknown, new Assignment[](0), new bytes32[][](0));
        vm.expectRevert(reason);
        _markCommitted(unknown);
        vm.expectRevert(reason);
        _markVerified(unknown);
        vm.expectRevert(reason);
        _settle(unknown, 0, new bool[](0), new address[](0));
        assertEq(uint8(escrow.requestOf(unknown).status), uint8(RequestStatus.Absent));
    }

    function test_expired_noMarkIsAccepted() public {
        RequestId id = _requestIn(RequestStatus.Verified);
        vm.warp(uint256(escrow.requestOf(id).deadline) + 1);
        _assertRequest(id, RequestStatus.Expired);
        (RequestStatus status, uint16 stageCount,, uint32 maximumTokens) = escrow.statusOf(id);
        assertEq(uint8(status), uint8(RequestStatus.Expired));
        assertEq(stageCount, 3);
        assertEq(maximumTokens, MAXIMUM_TOKENS);
        _expectWrongStatus(id, RequestStatus.Verified, RequestStatus.Expired);
        _settle(id, ANSWER_TOKENS, _allPaid(), new address[](0));
    }

    function test_verificationOnly_fromOthers_reverts() public {
        RequestId id = _requestIn(RequestStatus.Verified);
        bytes memory reason = abi.encodeWithSelector(IInferenceEscrow.NotVerification.selector, publisher);
        vm.startPrank(publisher);
        vm.expectRevert(reason);
        escrow.markCommitted(id);
        vm.expectRevert(reason);
        escrow.markVerified(id);
        vm.expectRevert(reason);
        escrow.reopen(id);
        vm.expectRevert(reason);
        escrow.refund(id);
        vm.expectRevert(reason);
        escrow.settle(id, 1, _allPaid(), new address[](0));
        vm.stopPrank();
    }

    // ---------------------------------------------------------------------------------------------------------- refunds

    /// MONEY-03: each live status has an exit that needs nobody's permission.
    function test_MONEY_03_claimRefund_fromEveryLiveStatus_byAnyone() public {
        for (uint8 i = uint8(RequestStatus.Open); i <= uint8(RequestStatus.Verified); i++) {
            RequestId id = _requestIn(RequestStatus(i));
            uint256 deadline = escrow.requestOf(id).deadline;
            vm.warp(deadline);
            vm.expectRevert(abi.encodeWithSelector(IInferenceEscrow.DeadlineNotPassed.selector, deadline, deadline));
            escrow.claimRefund(id);
            vm.warp(deadline + 1);
            uint256 credit = escrow.creditOf(requester);
            uint256 deposit = escrow.requestOf(id).deposit;
            vm.expectEmit(address(escrow));
            emit IInferenceEscrow.Credited(id, requester, deposit, credit + deposit);
            vm.expectEmit(address(escrow));
            emit IInferenceEscrow.RequestRefunded(id, requester, deposit);
            vm.prank(makeAddr("stranger"));
            escrow.claimRefund(id);
            _assertRequest(id, RequestStatus.Refunded);
            assertEq(escrow.creditOf(requester), credit + deposit);
            assertEq(_duties(0) + _duties(1) + _duties(2), 0, "duties are closed");
        }
    }

    function test_claimRefund_ofAFinishedRequest_reverts() public {
        RequestId settled = _requestIn(RequestStatus.Settled);
        RequestId refunded = _requestIn(RequestStatus.Refunded);
        vm.warp(block.timestamp + 365 days);
        _expectWrongStatus(settled, RequestStatus.Expired, RequestStatus.Settled);
        escrow.claimRefund(settled);
        _expectWrongStatus(refunded, RequestStatus.Expired, RequestStatus.Refunded);
        escrow.claimRefund(refunded);
    }

    function test_refund_byVerification_givesEverythingBack() public {
        RequestId id = _requestIn(RequestStatus.Committed);
        uint256 deposit = escrow.requestOf(id).deposit;
        vm.prank(address(verification));
        escrow.refund(id);
        assertEq(escrow.creditOf(requester), deposit);
        assertEq(_duties(0) + _duties(1) + _duties(2), 0);
    }

    // ---------------------------------------------------------------------------------------------------------- credits

    function test_withdrawCredit_pushesItToItsAccount() public {
        RequestId id = _requestIn(RequestStatus.Refunded);
        uint256 deposit = escrow.requestOf(id).deposit;
        uint256 before = requester.balance;
        vm.expectEmit(address(escrow));
        emit IInferenceEscrow.CreditWithdrawn(requester, deposit);
        vm.prank(makeAddr("stranger"));
        escrow.withdrawCredit(requester);
        assertEq(requester.balance, before + deposit);
        vm.expectRevert(abi.encodeWithSelector(IInferenceEscrow.NoCredit.selector, requester));
        escrow.withdrawCredit(requester);
    }

    function test_withdrawCredit_toARefuser_keepsTheCredit() public {
        Refuser refuser = new Refuser();
        vm.deal(address(refuser), 1 ether);
        vm.prank(address(refuser));
        RequestId id = escrow.open{value: 1 ether}(_plan, 1, INPUT_COMMITMENT, "s", PROMPT_TOKENS, MAXIMUM_TOKENS);
        vm.warp(uint256(escrow.requestOf(id).deadline) + 1);
        escrow.claimRefund(id);
        vm.expectRevert(
            abi.encodeWithSelector(IInferenceEscrow.TransferFailed.selector, address(refuser), uint256(1 ether))
        );
        escrow.withdrawCredit(address(refuser));
        refuser.open();
        escrow.withdrawCredit(address(refuser));
        assertEq(address(refuser).balance, 1 ether);
    }

    // ------------------------------------------------------------------------------------------------------ deployment

    function test_constructor_outOfRange_reverts() public {
        EscrowTerms memory terms = _escrowTerms();
        terms.protocolFeeBps = 4001;
        _expectRefused(terms, abi.encodeWithSelector(IInferenceEscrow.FeeShareOutOfRange.selector, 5000, 5001));
        terms = _escrowTerms();
        terms.routeWindow = 0;
        _expectRefused(terms, abi.encodeWithSelector(IInferenceEscrow.WindowOutOfRange.selector, 1, 0));
        terms = _escrowTerms();
        terms.commitWindow = 0;
        _expectRefused(terms, abi.encodeWithSelector(IInferenceEscrow.WindowOutOfRange.selector, 1, 0));
        terms = _escrowTerms();
        terms.maximumTokens = 0;
        _expectRefused(terms, abi.encodeWithSelector(IInferenceEscrow.TokensOutOfRange.selector, 0, 0));
        bytes memory arguments = abi.encode(registry, shards, verification, tabs, address(0), _escrowTerms());
        vm.expectRevert(abi.encodeWithSelector(IInferenceEscrow.FeeShareOutOfRange.selector, 0, 250));
        this.create("InferenceEscrow", arguments);
    }

    function test_terms_areThoseOfTheDeployment() public view {
        assertEq(abi.encode(escrow.terms()), abi.encode(_escrowTerms()));
        assertEq(escrow.protocolFeeBps(), 250);
        assertEq(escrow.verifierShareBps(), 1000);
        assertEq(escrow.treasury(), treasury);
        assertEq(escrow.verification(), address(verification));
        assertEq(escrow.tabs(), address(tabs));
        assertEq(address(escrow.registry()), address(registry));
        assertEq(address(escrow.assignments()), address(shards));
    }

    // -------------------------------------------------------------------------------------------------------- shorthand

    function _expectRefused(EscrowTerms memory terms, bytes memory reason) private {
        bytes memory arguments = abi.encode(registry, shards, verification, tabs, treasury, terms);
        vm.expectRevert(reason);
        this.create("InferenceEscrow", arguments);
    }

    function _expectNotAssigned(RequestId id, Assignment[] memory route, bytes32[][] memory proofs, uint256 stage)
        private
    {
        vm.expectRevert(abi.encodeWithSelector(IInferenceEscrow.NotAssigned.selector, stage, route[stage].node));
        vm.prank(publisher);
        escrow.route(id, route, proofs);
    }
}

/// @notice MONEY-02 to the wei.
contract InferenceEscrowSettlementTest is InferenceEscrowScenario {
    function test_settle_splitsByWorkAndSaysSo() public {
        RequestId id = _requestIn(RequestStatus.Verified);
        uint256 charge = uint256(FEE) * (PROMPT_TOKENS + ANSWER_TOKENS);
        uint256 fee = charge * 250 / 10_000;
        uint256 verifierPot = charge * 1000 / 10_000;
        uint256 pot = charge - fee - verifierPot;
        uint256 refunded = uint256(FEE) * (MAXIMUM_TOKENS - ANSWER_TOKENS);
        address[] memory verifiers = new address[](2);
        (verifiers[0], verifiers[1]) = (_hot(3), _hot(4));

        vm.expectEmit(address(escrow));
        emit IInferenceEscrow.RequestSettled(id, pot, verifierPot, fee, refunded);
        _settle(id, ANSWER_TOKENS, _allPaid(), verifiers);

        _assertRequest(id, RequestStatus.Settled);
        assertEq(escrow.creditOf(treasury), fee);
        assertEq(escrow.creditOf(requester), refunded);
        assertEq(escrow.creditOf(_operator(0)), pot * 100 / 303);
        assertEq(escrow.creditOf(_operator(1)), pot * 101 / 303);
        assertEq(escrow.creditOf(_operator(2)), pot - pot * 100 / 303 - pot * 101 / 303);
        assertEq(escrow.creditOf(_operator(3)), verifierPot / 2);
        assertEq(escrow.creditOf(_operator(4)), verifierPot - verifierPot / 2);
        assertEq(_duties(0) + _duties(1) + _duties(2), 0);
    }

    function test_settle_unpaidStage_goesBackToTheRequester() public {
        RequestId id = _requestIn(RequestStatus.Verified);
        bool[] memory paid = _allPaid();
        paid[1] = false;
        uint256 charge = uint256(FEE) * (PROMPT_TOKENS + ANSWER_TOKENS);
        uint256 pot = charge - charge * 250 / 10_000;
        _settle(id, ANSWER_TOKENS, paid, new address[](0));
        assertEq(escrow.creditOf(_operator(1)), 0);
        assertEq(
            escrow.creditOf(requester),
            uint256(FEE) * (MAXIMUM_TOKENS - ANSWER_TOKENS) + pot * 101 / 303,
            "nobody gains by the failure of another"
        );
    }

    function test_settle_nobodyPaid_leavesOnlyTheFee() public {
        RequestId id = _requestIn(RequestStatus.Verified);
        uint256 deposit = escrow.requestOf(id).deposit;
        _settle(id, ANSWER_TOKENS, new bool[](3), new address[](0));
        assertEq(escrow.creditOf(requester) + escrow.creditOf(treasury), deposit);
    }

    function test_settle_overpaidDeposit_comesBack() public {
        RequestId id = _openWith(_plan, PROMPT_TOKENS, MAXIMUM_TOKENS, 1 ether);
        _route(id);
        _markCommitted(id);
        _markVerified(id);
        _settle(id, MAXIMUM_TOKENS, _allPaid(), new address[](0));
        assertEq(escrow.creditOf(requester), 1 ether);
    }

    function test_settle_outOfRange_reverts() public {
        RequestId id = _requestIn(RequestStatus.Verified);
        vm.expectRevert(
            abi.encodeWithSelector(
                IInferenceEscrow.TokensOutOfRange.selector, MAXIMUM_TOKENS, uint256(MAXIMUM_TOKENS) + 1
            )
        );
        _settle(id, MAXIMUM_TOKENS + 1, _allPaid(), new address[](0));
        vm.expectRevert(abi.encodeWithSelector(IInferenceEscrow.RouteIncomplete.selector, 3, 2));
        _settle(id, MAXIMUM_TOKENS, new bool[](2), new address[](0));
    }

    /// MONEY-02: for every split of every charge, what is credited is the deposit, to the wei, and once.
    function testFuzz_MONEY_02_settle_conservesTheDeposit(
        uint128 extra,
        uint32 prompt,
        uint32 maximum,
        uint32 answer,
        uint8 paidSet,
        uint8 verifierCount
    ) public {
        maximum = uint32(bound(maximum, 1, 1000));
        RequestId id = _openWith(_plan, uint32(bound(prompt, 0, 1000)), maximum, bound(extra, 0, 1e30));
        _route(id);
        _markCommitted(id);
        _markVerified(id);
        bool[] memory paid = new bool[](3);
        for (uint256 i = 0; i < 3; i++) {
            paid[i] = paidSet & (1 << i) != 0;
        }
        address[] memory verifiers = new address[](verifierCount % 20);
        for (uint256 i = 0; i < verifiers.length; i++) {
            verifiers[i] = _hot(3 + i % 2);
        }
        uint256 deposit = escrow.requestOf(id).deposit;

        _settle(id, uint32(bound(answer, 0, maximum)), paid, verifiers);

        uint256 credited = escrow.creditOf(treasury) + escrow.creditOf(requester);
        for (uint256 i = 0; i < 5; i++) {
            credited += escrow.creditOf(_operator(i));
        }
        assertEq(credited, deposit, "MONEY-02");
        assertEq(address(escrow).balance, deposit, "MONEY-01");
        for (uint256 i = 0; i < 3; i++) {
            if (!paid[i]) assertEq(escrow.creditOf(_operator(i)), 0, "unpaid");
        }
        vm.expectRevert(
            abi.encodeWithSelector(
                IInferenceEscrow.WrongRequestStatus.selector, id, RequestStatus.Verified, RequestStatus.Settled
            )
        );
        _settle(id, 0, paid, verifiers);
    }

    /// The windows of a request end where its deadline says, to the second.
    function testFuzz_deadline_decidesBetweenRouteAndRefund(uint32 wait) public {
        RequestId id = _open(_plan);
        uint256 deadline = escrow.requestOf(id).deadline;
        vm.warp(block.timestamp + bound(wait, 0, 2 * escrow.terms().routeWindow));
        if (block.timestamp <= deadline) {
            _route(id);
            _assertRequest(id, RequestStatus.Routed);
        } else {
            escrow.claimRefund(id);
            _assertRequest(id, RequestStatus.Refunded);
        }
    }
}
