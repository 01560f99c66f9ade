// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

import {IInferenceEscrow, RequestStatus} from "../../contracts/interfaces/IInferenceEscrow.sol";
import {INodeRegistry, NodeStatus} from "../../contracts/interfaces/INodeRegistry.sol";
import {EvidenceStep, HandOver, IOutputVerification, Phase} from "../../contracts/interfaces/IOutputVerification.sol";
import {IShardAssignments} from "../../contracts/interfaces/IShardAssignments.sol";
import {Assignment} from "../../contracts/types/Assignment.sol";
import {ModelId, PlanId, RequestId} from "../../contracts/types/Identifiers.sol";
import {VerificationTerms} from "../../contracts/types/Terms.sol";
import {ForcedMoney, GasBurner, Reenterer, ReturnDataBomb} from "./Recipients.sol";
import {Swarm} from "./Swarm.sol";

/// @dev Two stages on the nodes 0 and 1 of seven.
abstract contract AttackScenario is Swarm {
    uint256 internal constant NODES = 7;
    PlanId internal _plan;

    function setUp() public {
        _deployNetwork();
        _addNodes(0, NODES);
        _plan = _newPlan(2);
    }

    function _attestOne(RequestId id, address node, bytes32 commitment) internal {
        uint16[] memory stages = new uint16[](1);
        bytes32[] memory commitments = new bytes32[](1);
        commitments[0] = commitment;
        vm.prank(node);
        verification.commitAttestations(id, stages, commitments);
    }
}

/// @notice COPY-01: what one account has shown is worth nothing to another.
contract CopyAttackTest is AttackScenario {
    function test_COPY_01_everyObservedCommitAndReveal_isWorthlessToEverybodyElse() public {
        RequestId id = _drawnRequest(_plan);
        _attest(id, 0, _hot(2), _truth(id, 0));
        bytes32 observed = verification.attestationOf(id, 1, 0, _hot(2)).commitment;
        for (uint256 i = 3; i < NODES; i++) {
            _attestOne(id, _hot(i), observed);
        }
        _endAttesting(id);
        Claim memory shown = _claimOf(id, 1, 0, _hot(2));
        for (uint256 i = 3; i < NODES; i++) {
            bytes32 opened = _commitment(id, 1, 0, _hot(i), shown);
            vm.expectRevert(abi.encodeWithSelector(IOutputVerification.CommitmentMismatch.selector, observed, opened));
            vm.prank(_hot(i));
            verification.revealAttestation(id, 0, shown.root, shown.sketch, shown.tokens, shown.salt);
        }
        // Strangers, contracts and the executor have nothing to open at all.
        address[3] memory others = [requester, address(escrow), _hot(1)];
        for (uint256 i = 0; i < others.length; i++) {
            vm.expectRevert(IOutputVerification.CommitmentMissing.selector);
            vm.prank(others[i]);
            verification.revealAttestation(id, 0, shown.root, shown.sketch, shown.tokens, shown.salt);
        }
        _revealAttestation(id, 0, _hot(2));
        _revealStage(id, 0);
        _endRevealing(id);
        verification.tallyWithoutQuorum(id, 0);
        for (uint256 i = 3; i < NODES; i++) {
            assertEq(uint8(registry.statusOf(_hot(i))), uint8(NodeStatus.Jailed), "copiers end in jail");
        }
    }

    function test_COPY_01_executorsOpening_doesNotOpenAnAttestation() public {
        RequestId id = _drawnRequest(_plan);
        bytes32 observed = verification.stageRecordOf(id, 0).commitment;
        _attestOne(id, _hot(2), observed);
        _endAttesting(id);
        _revealStage(id, 0);
        Claim memory shown = _claimOf(id, 0, 0, _hot(0));
        bytes32 opened = _commitment(id, 1, 0, _hot(2), shown);
        vm.expectRevert(abi.encodeWithSelector(IOutputVerification.CommitmentMismatch.selector, observed, opened));
        vm.prank(_hot(2));
        verification.revealAttestation(id, 0, shown.root, shown.sketch, shown.tokens, shown.salt);
    }

    function test_COPY_01_ownCommitmentOfAnEarlierRound_cannotBeReplayed() public {
        RequestId id = _drawnRequest(_plan);
        _attestRound(id, NODES, 4, 0, _moved(_truth(id, 0), 1000));
        _revealAllStages(id);
        _revealMembers(id);
        _tallyAll(id);
        assertEq(verification.verificationOf(id).round, 2);
        bytes32 old = verification.attestationOf(id, 1, 0, _hot(2)).commitment;
        Claim memory shown = _claimOf(id, 1, 0, _hot(2));
        _attestOne(id, _hot(2), old);
        _endAttesting(id);
        bytes32 opened = _commitment(id, 2, 0, _hot(2), shown);
        vm.expectRevert(abi.encodeWithSelector(IOutputVerification.CommitmentMismatch.selector, old, opened));
        vm.prank(_hot(2));
        verification.revealAttestation(id, 0, shown.root, shown.sketch, shown.tokens, shown.salt);
    }
}

/// @notice Signatures are good on one chain, for one contract, for one text.
contract ReplayAttackTest is AttackScenario {
    function test_REPLAY_01_nodeKeyProof_onAnotherChainOrContract_isRefused() public {
        _know(9);
        uint256 deadline = block.timestamp + 1 days;
        bytes memory proof = _nodeKeyProof(9, _operator(9), CERTIFICATE_HASH, HOST, deadline);
        vm.deal(_operator(9), 10 * STAKE);
        uint256 state = vm.snapshotState();
        vm.chainId(block.chainid + 1);
        _expectProofRefused(deadline, proof);
        vm.revertToState(state);
        _deployNetwork();
        _expectProofRefused(deadline, proof);
    }

    function test_REPLAY_01_consent_onAnotherChainOrContract_isRefused() public {
        ModelId model = shards.planOf(_plan).modelId;
        Assignment[] memory plan = _chainOf(2, 0);
        bytes[] memory consents = _consents(
            plan,
            _consentDigest(
                model, publisher, 2, FEE, MEASUREMENTS, _merkleRoot(_leavesOf(plan)), block.timestamp + 1 days
            )
        );
        vm.chainId(block.chainid + 1);
        vm.expectRevert(abi.encodeWithSelector(IShardAssignments.ConsentInvalid.selector, _hot(0)));
        vm.prank(publisher);
        shards.publishPlan(model, 2, FEE, MEASUREMENTS, plan, block.timestamp + 1 days, consents);
        vm.chainId(block.chainid - 1);
        vm.prank(publisher);
        shards.publishPlan(model, 2, FEE, MEASUREMENTS, plan, block.timestamp + 1 days, consents);
        // Once published it cannot be published again: the epoch has moved on.
        vm.expectRevert(abi.encodeWithSelector(IShardAssignments.WrongEpoch.selector, 3, 2));
        vm.prank(publisher);
        shards.publishPlan(model, 2, FEE, MEASUREMENTS, plan, block.timestamp + 1 days, consents);
    }

    function test_REPLAY_01_handOver_onAnotherChainOrContract_isRefused() public {
        RequestId id = _newRequest(_plan);
        HandOver memory first = HandOver(id, 0, true, 1, "a");
        HandOver memory second = HandOver(id, 0, true, 1, "b");
        bytes memory one = _signHandOver(0, first);
        bytes memory two = _signHandOver(0, second);
        vm.chainId(block.chainid + 1);
        vm.expectRevert(abi.encodeWithSelector(IOutputVerification.SignatureInvalid.selector, _hot(0)));
        verification.reportEquivocation(first, one, second, two, _hot(0));
        vm.chainId(block.chainid - 1);
        IOutputVerification before = verification;
        _deployNetwork();
        vm.expectRevert(abi.encodeWithSelector(IOutputVerification.SignatureInvalid.selector, _hot(0)));
        verification.reportEquivocation(first, one, second, two, _hot(0));
        before.reportEquivocation(first, one, second, two, _hot(0));
    }

    function test_REPLAY_01_requestIds_differByChainAndContract() public {
        RequestId here = escrow.requestIdOf(requester, 1);
        vm.chainId(block.chainid + 1);
        assertNotEq(RequestId.unwrap(escrow.requestIdOf(requester, 1)), RequestId.unwrap(here));
        vm.chainId(block.chainid - 1);
        _deployNetwork();
        assertNotEq(RequestId.unwrap(escrow.requestIdOf(requester, 1)), RequestId.unwrap(here));
    }

    function _expectProofRefused(uint256 deadline, bytes memory proof) private {
        vm.expectRevert(abi.encodeWithSelector(INodeRegistry.ProofInvalid.selector, _hot(9)));
        vm.prank(_operator(9));
        registry.register{value: STAKE}(_hot(9), CERTIFICATE_HASH, HOST, deadline, proof);
    }
}

/// @notice EQUIV-01: two words of one key on one step cost it everything, at once and for ever.
contract EquivocationAttackTest is AttackScenario {
    address private _reporter = makeAddr("reporter");

    function _report(HandOver memory first, HandOver memory second, uint256 node) private {
        bytes memory one = _signHandOver(node, first);
        bytes memory two = _signHandOver(node, second);
        vm.prank(_reporter);
        verification.reportEquivocation(first, one, second, two, _hot(node));
    }

    function test_EQUIV_01_equivocation_slashesEverythingTombstonesAndRefunds() public {
        RequestId id = _drawnRequest(_plan);
        _attestHonestly(id, NODES);
        uint256 deposit = escrow.requestOf(id).deposit;
        vm.expectEmit(address(verification));
        emit IOutputVerification.ContradictionProven(id, 0, _hot(0), _reporter);
        _report(HandOver(id, 0, true, 4, "a"), HandOver(id, 0, true, 4, "b"), 0);
        assertEq(registry.accountOf(_hot(0)).staked, 0);
        assertEq(registry.accountOf(_hot(0)).jailedUntil, type(uint64).max);
        assertEq(registry.creditOf(_reporter), STAKE / 10, "the reporter's share");
        // The committee that sits goes on to the end of its round; the refund is certain and comes then.
        _assertRequest(id, RequestStatus.Committed);
        _revealAllStages(id);
        _revealMembers(id);
        _tallyAll(id);
        assertEq(escrow.creditOf(requester), deposit);
        _assertRequest(id, RequestStatus.Refunded);
        _assertPhase(id, Phase.Final);
        for (uint256 i = 0; i < NODES; i++) {
            assertEq(registry.accountOf(_hot(i)).openDuties, 0);
        }
    }

    function test_EQUIV_01_atAnyTimeBeforeTheStakeIsGone() public {
        RequestId id = _challengeableRequest(_plan, NODES);
        _endChallenge(id);
        verification.settle(id);
        vm.prank(_operator(0));
        registry.beginExit(_hot(0));
        vm.warp(uint256(registry.accountOf(_hot(0)).thawEnd) + 10 days);
        _report(HandOver(id, 0, false, 0, "a"), HandOver(id, 0, false, 0, "b"), 0);
        assertEq(registry.accountOf(_hot(0)).staked, 0);
        _assertRequest(id, RequestStatus.Settled);
    }

    /// A request that lapsed before all its stages had committed is no hiding place.
    function test_EQUIV_01_afterTheRequestLapsedInEachStatus() public {
        uint256 state = vm.snapshotState();
        for (uint256 acts = 0; acts < 4; acts++) {
            RequestId id = _newRequest(_plan);
            if (acts > 0) _commitStage(id, 0, _truth(id, 0));
            if (acts > 1) _commitStage(id, 1, _truth(id, 1));
            if (acts > 2) _draw(id);
            vm.warp(uint256(escrow.requestOf(id).deadline) + 1);
            escrow.claimRefund(id);
            _report(HandOver(id, 0, true, 4, "a"), HandOver(id, 0, true, 4, "b"), 0);
            assertEq(registry.accountOf(_hot(0)).staked, 0);
            _assertRequest(id, RequestStatus.Refunded);
            vm.revertToState(state);
        }
    }

    /// Between the lapse of a request and the claim of its refund, the report itself makes the refund, unless a committee sits.
    function test_EQUIV_01_afterTheDeadlineBeforeTheClaim_refunds() public {
        uint256 state = vm.snapshotState();
        for (uint256 acts = 0; acts < 4; acts++) {
            RequestId id = _newRequest(_plan);
            if (acts > 0) _commitStage(id, 0, _truth(id, 0));
            if (acts > 1) _commitStage(id, 1, _truth(id, 1));
            if (acts > 2) _draw(id);
            uint256 deposit = escrow.requestOf(id).deposit;
            vm.warp(uint256(escrow.requestOf(id).deadline) + 1);
            _report(HandOver(id, 0, true, 4, "a"), HandOver(id, 0, true, 4, "b"), 0);
            assertEq(registry.accountOf(_hot(0)).staked, 0);
            if (acts > 2) escrow.claimRefund(id);
            assertEq(escrow.creditOf(requester), deposit);
            vm.revertToState(state);
        }
    }

    function test_EQUIV_01_reportedTwice_reverts() public {
        RequestId id = _newRequest(_plan);
        _report(HandOver(id, 0, true, 4, "a"), HandOver(id, 0, true, 4, "b"), 0);
        bytes memory one = _signHandOver(0, HandOver(id, 0, true, 4, "a"));
        bytes memory two = _signHandOver(0, HandOver(id, 0, true, 4, "c"));
        bytes32 report = keccak256(abi.encode(_hot(0), id, uint16(0), true, uint32(4)));
        vm.expectRevert(abi.encodeWithSelector(IOutputVerification.AlreadyReported.selector, report));
        verification.reportEquivocation(HandOver(id, 0, true, 4, "a"), one, HandOver(id, 0, true, 4, "c"), two, _hot(0));
    }

    function test_EQUIV_01_statementsThatAgreeOrAreOfDifferentDuties_revert() public {
        RequestId id = _newRequest(_plan);
        HandOver memory first = HandOver(id, 0, true, 4, "a");
        _expectAgreement(first, HandOver(id, 0, true, 4, "a"));
        _expectAgreement(first, HandOver(id, 0, true, 5, "b"));
        _expectAgreement(first, HandOver(id, 0, false, 4, "b"));
        _expectAgreement(first, HandOver(id, 1, true, 4, "b"));
        _expectAgreement(first, HandOver(RequestId.wrap("x"), 0, true, 4, "b"));
    }

    function test_EQUIV_01_signaturesOfOthers_revert() public {
        RequestId id = _newRequest(_plan);
        HandOver memory first = HandOver(id, 0, true, 4, "a");
        HandOver memory second = HandOver(id, 0, true, 4, "b");
        bytes memory one = _signHandOver(0, first);
        bytes memory two = _signHandOver(1, second);
        vm.expectRevert(abi.encodeWithSelector(IOutputVerification.SignatureInvalid.selector, _hot(0)));
        verification.reportEquivocation(first, one, second, two, _hot(0));
        vm.expectRevert(abi.encodeWithSelector(IOutputVerification.SignatureInvalid.selector, _hot(1)));
        verification.reportEquivocation(first, one, second, two, _hot(1));
        two = _malleated(_signHandOver(0, second));
        vm.expectRevert(abi.encodeWithSelector(IOutputVerification.SignatureInvalid.selector, _hot(0)));
        verification.reportEquivocation(first, one, second, two, _hot(0));
        vm.expectRevert(abi.encodeWithSelector(IOutputVerification.SignatureInvalid.selector, address(0)));
        verification.reportEquivocation(first, "", second, "", address(0));
    }

    function _expectAgreement(HandOver memory first, HandOver memory second) private {
        bytes memory one = _signHandOver(0, first);
        bytes memory two = _signHandOver(0, second);
        vm.expectRevert(IOutputVerification.StatementsAgree.selector);
        verification.reportEquivocation(first, one, second, two, _hot(0));
    }

    // ---------------------------------------------------------------------------------------------------- contradiction

    /// @dev Stage 0 of the request is revealed with a tree of two steps; the second is the leaf shown.
    function _revealedEvidence() private returns (RequestId id, EvidenceStep memory step, bytes32[] memory proof) {
        id = _newRequest(_plan);
        step = EvidenceStep(1, 7, 1, "in", "out", "inputs", "outputs", "print");
        bytes32[] memory leaves = new bytes32[](2);
        leaves[0] = keccak256("step 0");
        leaves[1] = keccak256(bytes.concat(keccak256(abi.encode(step))));
        Claim memory claim = _truth(id, 0);
        claim.root = _merkleRoot(leaves);
        proof = _merkleProof(leaves, 1);
        _commitStage(id, 0, claim);
        _commitStage(id, 1, _truth(id, 1));
        _draw(id);
        _endAttesting(id);
    }

    function test_EQUIV_01_contradiction_ofItsOwnEvidence_slashesEverything() public {
        (RequestId id, EvidenceStep memory step, bytes32[] memory proof) = _revealedEvidence();
        HandOver memory statement = HandOver(id, 0, true, 1, "other outputs");
        bytes memory signature = _signHandOver(0, statement);
        vm.expectRevert(abi.encodeWithSelector(IOutputVerification.EvidenceNotRevealed.selector, 0));
        verification.reportContradiction(statement, signature, step, proof);
        _revealStage(id, 0);
        vm.expectEmit(address(verification));
        emit IOutputVerification.ContradictionProven(id, 0, _hot(0), _reporter);
        vm.prank(_reporter);
        verification.reportContradiction(statement, signature, step, proof);
        assertEq(registry.accountOf(_hot(0)).staked, 0);
        assertEq(registry.creditOf(_reporter), STAKE / 10);
        vm.warp(uint256(escrow.requestOf(id).deadline) + 1);
        escrow.claimRefund(id);
        _assertRequest(id, RequestStatus.Refunded);
    }

    function test_EQUIV_01_contradiction_refusals() public {
        (RequestId id, EvidenceStep memory step, bytes32[] memory proof) = _revealedEvidence();
        _revealStage(id, 0);
        bytes32 root = verification.stageRecordOf(id, 0).evidenceRoot;
        // What it signed is what it revealed.
        _expectNoContradiction(HandOver(id, 0, true, 1, "outputs"), step, proof);
        _expectNoContradiction(HandOver(id, 0, false, 1, "inputs"), step, proof);
        // About another step.
        _expectNoContradiction(HandOver(id, 0, true, 0, "other outputs"), step, proof);
        // A leaf that is not in its evidence.
        HandOver memory statement = HandOver(id, 0, true, 1, "other outputs");
        bytes memory signature = _signHandOver(0, statement);
        EvidenceStep memory forged = step;
        forged.outputChain = "outputs it never revealed";
        vm.expectRevert(abi.encodeWithSelector(IOutputVerification.ProofInvalid.selector, root));
        verification.reportContradiction(statement, signature, forged, proof);
        // Signed by somebody else.
        step.outputChain = "outputs";
        signature = _signHandOver(1, statement);
        vm.expectRevert(abi.encodeWithSelector(IOutputVerification.SignatureInvalid.selector, _hot(0)));
        verification.reportContradiction(statement, signature, step, proof);
        assertEq(registry.accountOf(_hot(0)).staked, STAKE);
    }

    function _expectNoContradiction(HandOver memory statement, EvidenceStep memory step, bytes32[] memory proof)
        private
    {
        bytes memory signature = _signHandOver(0, statement);
        vm.expectRevert(IOutputVerification.StatementsAgree.selector);
        verification.reportContradiction(statement, signature, step, proof);
    }
}

/// @notice LIVE-01: spite costs the spiteful, and takes nothing from anybody else but time that is bounded.
contract GriefingAttackTest is AttackScenario {
    function test_LIVE_01_challengesOfAnHonestVerdict_costABondEachAndEndInPayment() public {
        RequestId id = _challengeableRequest(_plan, NODES);
        uint256 deadline = escrow.requestOf(id).deadline;
        address griefer = makeAddr("griefer");
        vm.deal(griefer, 10 ether);
        for (uint256 round = 2; round <= 3; round++) {
            vm.warp(verification.verificationOf(id).challengeDeadline);
            vm.prank(griefer);
            verification.challenge{value: 1 ether}(id, 0);
            _attestRound(id, NODES - 1, type(uint256).max, 0, _truth(id, 0));
            vm.warp(verification.verificationOf(id).attestDeadline + 1);
            _revealMembers(id);
            vm.warp(verification.verificationOf(id).revealDeadline + 1);
            _tallyAll(id);
            assertEq(escrow.requestOf(id).deadline, deadline, "the deadline stays");
        }
        _endChallenge(id);
        assertLe(block.timestamp, deadline, "the longest dispute fits");
        verification.settle(id);
        assertEq(griefer.balance, 8 ether);
        assertEq(verification.creditOf(griefer), 0);
        _assertRequest(id, RequestStatus.Settled);
    }

    function test_LIVE_01_requesterThatKeepsItsSecret_delaysOnlyForTheSecretWindow() public {
        RequestId id = _newRequest(_plan);
        _commitAll(id);
        vm.roll(block.number + 2);
        vm.warp(uint256(verification.verificationOf(id).secretDeadline) + 1);
        vm.prank(makeAddr("anybody"));
        verification.drawCommittee(id, 0);
        _assertPhase(id, Phase.Attesting);
    }

    function test_LIVE_01_silentMember_isJailedAndStopsNobody() public {
        RequestId id = _drawnRequest(_plan);
        _attestHonestly(id, NODES);
        _revealAllStages(id);
        for (uint16 stage = 0; stage < 2; stage++) {
            for (uint256 i = 0; i < NODES - 1; i++) {
                if (i != stage) _revealAttestation(id, stage, _hot(i));
            }
        }
        _endRevealing(id);
        _tallyAll(id);
        assertEq(uint8(registry.statusOf(_hot(6))), uint8(NodeStatus.Jailed));
        assertEq(registry.accountOf(_hot(6)).staked, STAKE, "silence is not fraud");
        _endChallenge(id);
        verification.settle(id);
        assertEq(escrow.creditOf(_operator(6)), 0);
        _assertRequest(id, RequestStatus.Settled);
    }

    function test_LIVE_01_executorThatNeverCommits_costsTheRequesterNothing() public {
        RequestId id = _newRequest(_plan);
        _commitStage(id, 0, _truth(id, 0));
        uint256 deposit = escrow.requestOf(id).deposit;
        vm.warp(uint256(escrow.requestOf(id).deadline) + 1);
        escrow.claimRefund(id);
        escrow.withdrawCredit(requester);
        assertEq(requester.balance, deposit);
    }

    /// MONEY-03, LIVE-01: stop after any number of acts; after the deadline everybody leaves with what is his, without anybody's help.
    function test_MONEY_03_fromEveryPhase_everybodyLeavesWithHisMoney() public {
        uint256 state = vm.snapshotState();
        for (uint256 acts = 0; acts <= 9; acts++) {
            RequestId id = _stopAfter(acts);
            vm.warp(uint256(escrow.requestOf(id).deadline) + 1);
            RequestStatus status = escrow.requestOf(id).status;
            if (status == RequestStatus.Expired) {
                vm.prank(requester);
                escrow.claimRefund(id);
            }
            assertTrue(
                escrow.requestOf(id).status == RequestStatus.Refunded
                    || escrow.requestOf(id).status == RequestStatus.Settled
            );
            _leaveAll();
            vm.revertToState(state);
        }
    }

    function _stopAfter(uint256 acts) private returns (RequestId id) {
        address challenger = makeAddr("challenger");
        id = _open(_plan);
        if (acts > 0) _route(id);
        if (acts > 1) _commitStage(id, 1, _truth(id, 1));
        if (acts > 2) _commitStage(id, 0, _truth(id, 0));
        if (acts > 3) _draw(id);
        if (acts > 4) _attestHonestly(id, NODES);
        if (acts > 5) _revealAllStages(id);
        if (acts > 6) _revealMembers(id);
        if (acts > 7) _tallyAll(id);
        if (acts > 8) {
            vm.deal(challenger, 1 ether);
            vm.prank(challenger);
            verification.challenge{value: 1 ether}(id, 1);
        }
    }

    function _leaveAll() private {
        for (uint256 i = 0; i < NODES; i++) {
            vm.prank(_operator(i));
            registry.beginExit(_hot(i));
        }
        vm.warp(block.timestamp + registry.thawPeriod());
        for (uint256 i = 0; i < NODES; i++) {
            vm.prank(_operator(i));
            registry.withdraw(_hot(i));
            if (escrow.creditOf(_operator(i)) > 0) escrow.withdrawCredit(_operator(i));
        }
        if (escrow.creditOf(requester) > 0) escrow.withdrawCredit(requester);
        if (escrow.creditOf(treasury) > 0) escrow.withdrawCredit(treasury);
        address challenger = makeAddr("challenger");
        if (verification.creditOf(challenger) > 0) verification.withdrawCredit(challenger);
        assertEq(address(escrow).balance, 0, "MONEY-03 escrow");
        assertEq(address(registry).balance, 0, "MONEY-03 registry");
        assertEq(address(verification).balance, 0, "MONEY-03 bonds");
    }
}

/// @notice Receivers that fight back, and money that comes uncalled.
contract ReceiverAttackTest is AttackScenario {
    /// @dev Opens a request as `account` and lets it expire: a credit of one ether.
    function _creditOf(address account) private {
        vm.deal(account, account.balance + 1 ether);
        vm.prank(account);
        RequestId id =
            escrow.open{value: 1 ether}(_plan, account.balance, INPUT_COMMITMENT, "s", PROMPT_TOKENS, MAXIMUM_TOKENS);
        vm.warp(uint256(escrow.requestOf(id).deadline) + 1);
        escrow.claimRefund(id);
        assertEq(escrow.creditOf(account), 1 ether);
    }

    function test_reentrancy_withdrawCredit_paysOnce() public {
        Reenterer thief = new Reenterer();
        _creditOf(requester);
        _creditOf(address(thief));
        thief.arm(address(escrow), abi.encodeCall(escrow.withdrawCredit, (address(thief))));
        escrow.withdrawCredit(address(thief));
        assertEq(address(thief).balance, 1 ether);
        assertEq(thief.attempts(), 1);
        assertEq(thief.successes(), 0);
        _creditOf(address(thief));
        thief.arm(address(escrow), abi.encodeCall(escrow.withdrawCredit, (requester)));
        escrow.withdrawCredit(address(thief));
        assertEq(thief.successes(), 0, "nor for others");
        assertEq(address(escrow).balance, escrow.creditOf(requester));
    }

    function test_reentrancy_withdrawStake_paysOnce() public {
        Reenterer thief = new Reenterer();
        _know(9);
        bytes memory proof = _nodeKeyProof(9, address(thief), CERTIFICATE_HASH, HOST, block.timestamp);
        vm.deal(address(thief), STAKE);
        thief.perform(
            address(registry),
            abi.encodeCall(registry.register, (_hot(9), CERTIFICATE_HASH, HOST, block.timestamp, proof)),
            STAKE
        );
        thief.perform(address(registry), abi.encodeCall(registry.thaw, (_hot(9), 1 ether)), 0);
        vm.warp(registry.accountOf(_hot(9)).thawEnd);
        bytes memory again = abi.encodeCall(registry.withdraw, (_hot(9)));
        thief.arm(address(registry), again);
        thief.perform(address(registry), again, 0);
        assertEq(address(thief).balance, 1 ether);
        assertEq(thief.attempts(), 1);
        assertEq(thief.successes(), 0);
        assertEq(registry.accountOf(_hot(9)).staked, STAKE - 1 ether);
    }

    function test_reentrancy_withdrawBond_paysOnce() public {
        Reenterer thief = new Reenterer();
        RequestId id = _challengeableRequest(_plan, NODES);
        vm.deal(address(thief), 1 ether);
        thief.perform(address(verification), abi.encodeCall(verification.challenge, (id, 0)), 1 ether);
        vm.deal(address(verification), 5 ether);
        vm.warp(uint256(escrow.requestOf(id).deadline) + 1);
        escrow.claimRefund(id);
        thief.arm(address(verification), abi.encodeCall(verification.withdrawCredit, (address(thief))));
        verification.withdrawCredit(address(thief));
        assertEq(address(thief).balance, 1 ether);
        assertEq(thief.successes(), 0);
    }

    function test_returnDataBomb_costsThePayerLittle() public {
        for (uint256 i = 0; i < 2; i++) {
            address bomb = address(new ReturnDataBomb(i == 0));
            _creditOf(bomb);
            uint256 gas = gasleft();
            try escrow.withdrawCredit(bomb) {} catch {}
            assertLt(gas - gasleft(), 200_000, "bounded gas");
        }
    }

    function test_gasBurner_costsThePayerLittleAndKeepsItsCredit() public {
        address burner = address(new GasBurner());
        _creditOf(burner);
        uint256 gas = gasleft();
        vm.expectRevert(abi.encodeWithSelector(IInferenceEscrow.TransferFailed.selector, burner, uint256(1 ether)));
        escrow.withdrawCredit(burner);
        assertLt(gas - gasleft(), 200_000, "bounded gas");
        assertEq(escrow.creditOf(burner), 1 ether);
    }

    function test_forcedMoney_changesNoBook() public {
        ForcedMoney force = new ForcedMoney();
        RequestId id = _challengeableRequest(_plan, NODES);
        address[3] memory targets = [address(escrow), address(registry), address(verification)];
        for (uint256 i = 0; i < 3; i++) {
            vm.deal(address(this), 3 ether);
            force.send{value: 3 ether}(targets[i]);
        }
        uint256 deposit = escrow.requestOf(id).deposit;
        _endChallenge(id);
        verification.settle(id);
        uint256 credits = escrow.creditOf(requester) + escrow.creditOf(treasury);
        for (uint256 i = 0; i < NODES; i++) {
            credits += escrow.creditOf(_operator(i));
        }
        assertEq(credits, deposit);
        assertEq(address(escrow).balance, deposit + 3 ether);
        assertEq(registry.totalSortitionStake(), NODES * STAKE);
    }

    function test_plainPayments_areRefused() public {
        address[4] memory targets = [address(escrow), address(registry), address(verification), address(shards)];
        vm.deal(address(this), 1 ether);
        for (uint256 i = 0; i < 4; i++) {
            (bool taken,) = targets[i].call{value: 1}("");
            assertFalse(taken);
        }
    }
}

/// @notice Ways to lie and get away more cheaply than by being found out.
contract CollusionAttackTest is AttackScenario {
    /// @dev Keeping back a reveal costs as much as a wrong one.
    function _verificationTerms() internal view override returns (VerificationTerms memory terms) {
        terms = super._verificationTerms();
        terms.withholdSlashBps = terms.incorrectSlashBps;
    }

    /// A request that fails for one stage must not spare the liar of another: a sacrificed accomplice would be the cheaper way out.
    function test_CDV_04_accompliceThatWithholds_doesNotSpareTheLiar() public {
        RequestId id = _liarOfStageZero();
        _revealStage(id, 0);
        _revealMembers(id);
        _endRevealing(id);
        _tallyAll(id);
        assertEq(registry.accountOf(_hot(1)).staked, STAKE / 2, "the accomplice");
        _attestHonestly(id, NODES);
        _endAttesting(id); // the jailed accomplice cannot commit, so the window runs its time
        _revealMembers(id);
        _tallyAll(id);
        assertEq(registry.accountOf(_hot(0)).staked, STAKE / 2, "the liar");
        _assertRequest(id, RequestStatus.Refunded);
    }

    /// The same by an accomplice with the least stake there can be, who signs two statements on purpose and reports himself.
    function test_CDV_04_accompliceThatEquivocates_doesNotSpareTheLiar() public {
        RequestId id = _liarOfStageZero();
        _revealAllStages(id);
        _revealMembers(id);
        _tallyAll(id);
        HandOver memory first = HandOver(id, 1, true, 1, "a");
        HandOver memory second = HandOver(id, 1, true, 1, "b");
        verification.reportEquivocation(first, _signHandOver(1, first), second, _signHandOver(1, second), _hot(1));
        assertEq(registry.accountOf(_hot(1)).staked, 0, "the accomplice");
        _attestHonestly(id, NODES);
        _endAttesting(id);
        _revealMembers(id);
        _tallyAll(id);
        assertEq(registry.accountOf(_hot(0)).staked, STAKE / 2, "the liar");
        _assertRequest(id, RequestStatus.Refunded);
    }

    /// An executor sees the members' reveals before it makes its own: keeping it back, or the evidence, gains nothing if
    /// withholdSlashBps >= incorrectSlashBps. With less, the difference is what a liar saves once a committee is drawn.
    function test_CDV_05_liarThatWithholdsAfterTheMembersRevealed_gainsNothing() public {
        RequestId id = _liarOfStageZero();
        _revealStage(id, 1);
        _revealMembers(id);
        _endRevealing(id);
        _tallyAll(id);
        assertEq(registry.accountOf(_hot(0)).staked, STAKE / 2, "as if it had shown its lie");
        assertEq(uint8(registry.statusOf(_hot(0))), uint8(NodeStatus.Jailed));
        _assertRequest(id, RequestStatus.Refunded);
    }

    function _liarOfStageZero() private returns (RequestId id) {
        id = _newRequest(_plan);
        _commitStage(id, 0, _moved(_truth(id, 0), 1000));
        _commitStage(id, 1, _truth(id, 1));
        _draw(id);
        _attestHonestly(id, NODES);
    }
}
