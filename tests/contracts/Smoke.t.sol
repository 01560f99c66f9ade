// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

import {IInferenceEscrow, RequestStatus} from "../../contracts/interfaces/IInferenceEscrow.sol";
import {NodeStatus} from "../../contracts/interfaces/INodeRegistry.sol";
import {Phase, StageVerdict} from "../../contracts/interfaces/IOutputVerification.sol";
import {PlanId, RequestId} from "../../contracts/types/Identifiers.sol";
import {VerificationTerms} from "../../contracts/types/Terms.sol";
import {Swarm} from "./Swarm.sol";

/// @dev One pass through each of the ways a request can go, with what each node holds at the end. `sampled` decides whether a first
///      committee sits. The happy path leaves the gas of its calls in tests/contracts/snapshots/Lifecycle.json.
abstract contract Smoke is Swarm {
    uint256 internal constant STAGES = 4;

    PlanId internal plan;

    function setUp() public {
        _deployNetwork();
        _addNodes(0, STAGES);
        plan = _newPlan(STAGES);
    }

    /// @dev Each node attests, in one call, every stage it is seated for; `liar` is ignored beyond the nodes.
    function _attestInOneCall(RequestId id, uint256 node) internal {
        uint8 round = verification.verificationOf(id).round;
        uint16[] memory stages = new uint16[](STAGES);
        bytes32[] memory commitments = new bytes32[](STAGES);
        uint256 seats;
        for (uint16 stage; stage < STAGES; ++stage) {
            if (!verification.isSeated(id, stage, _hot(node))) continue;
            stages[seats] = stage;
            commitments[seats++] = _seal(id, round, stage, _hot(node), _truth(id, stage));
        }
        assembly ("memory-safe") {
            mstore(stages, seats)
            mstore(commitments, seats)
        }
        vm.prank(_hot(node));
        verification.commitAttestations(id, stages, commitments);
    }

    function _assertNobodyBut(uint256 slashed) internal view {
        for (uint256 i; i < STAGES; ++i) {
            if (i == slashed) continue;
            assertEq(registry.accountOf(_hot(i)).staked, STAKE, "an honest node lost stake");
            assertEq(uint8(registry.statusOf(_hot(i))), uint8(NodeStatus.Active), "an honest node was jailed");
        }
    }

    function _assertNoDutyIsOpen() internal view {
        for (uint256 i; i < STAGES; ++i) {
            assertEq(registry.accountOf(_hot(i)).openDuties, 0, "an open duty");
        }
    }

    /// @dev MONEY-01 when nothing is open: the balance is the credits.
    function _assertOnlyCreditsAreHeld() internal view {
        uint256 credits = escrow.creditOf(requester) + escrow.creditOf(treasury);
        for (uint256 i; i < STAGES; ++i) {
            credits += escrow.creditOf(_operator(i));
        }
        assertEq(address(escrow).balance, credits, "escrow");
    }
}

/// forge-config: default.isolate = true
contract SampledSmokeTest is Smoke {
    function test_request_ofHonestNodes_isVerifiedAndPaid() public {
        RequestId id = _open(plan);
        vm.snapshotGasLastCall("Lifecycle", "open");
        _route(id);
        vm.snapshotGasLastCall("Lifecycle", "route 4 stages");
        for (uint16 stage; stage < STAGES; ++stage) {
            _commitStage(id, stage, _truth(id, stage));
            if (stage == 1) vm.snapshotGasLastCall("Lifecycle", "commitStage");
        }
        vm.snapshotGasLastCall("Lifecycle", "commitStage, last");
        _draw(id);
        vm.snapshotGasLastCall("Lifecycle", "drawCommittee");
        _assertPhase(id, Phase.Attesting);

        for (uint256 node; node < STAGES; ++node) {
            _attestInOneCall(id, node);
            if (node == 1) vm.snapshotGasLastCall("Lifecycle", "commitAttestations for 3 stages");
        }
        vm.snapshotGasLastCall("Lifecycle", "commitAttestations for 3 stages, last");
        _assertPhase(id, Phase.Revealing);

        _revealAllStages(id);
        vm.snapshotGasLastCall("Lifecycle", "revealStage");
        _revealMembers(id);
        vm.snapshotGasLastCall("Lifecycle", "revealAttestation");
        for (uint16 stage; stage < STAGES; ++stage) {
            verification.tally(id, stage, 0);
            if (stage == 1) vm.snapshotGasLastCall("Lifecycle", "tally of 3 reveals");
        }
        vm.snapshotGasLastCall("Lifecycle", "tally of 3 reveals, last");
        _assertPhase(id, Phase.Challengeable);

        _endChallenge(id);
        verification.settle(id);
        vm.snapshotGasLastCall("Lifecycle", "settle 4 stages and 12 attestations");
        _assertRequest(id, RequestStatus.Settled);
        assertEq(escrow.creditOf(requester), FEE * (MAXIMUM_TOKENS - ANSWER_TOKENS), "unused tokens are refunded");
        _assertNobodyBut(STAGES);
        _assertNoDutyIsOpen();
        _assertOnlyCreditsAreHeld();
    }

    function test_request_withOneCheat_slashesItAfterTheBackupRoundAndNobodyElse() public {
        RequestId id = _newRequest(plan);
        for (uint16 stage; stage < STAGES; ++stage) {
            _commitStage(id, stage, stage == 2 ? _moved(_truth(id, stage), 1000) : _truth(id, stage));
        }
        _draw(id);
        _attestHonestly(id, STAGES);
        _revealAllStages(id);
        _revealMembers(id);
        _tallyAll(id);
        _assertVerdict(id, 2, StageVerdict.Rejected);
        assertEq(verification.verificationOf(id).round, 2, "the backup committee is called");
        _assertNobodyBut(STAGES);

        _attestHonestly(id, STAGES);
        _revealMembers(id);
        _tallyAll(id);
        _assertPhase(id, Phase.Final);
        _assertRequest(id, RequestStatus.Refunded);
        assertEq(registry.accountOf(_hot(2)).staked, STAKE / 2, "the cheat lost half its stake");
        assertEq(uint8(registry.statusOf(_hot(2))), uint8(NodeStatus.Jailed));
        assertEq(escrow.creditOf(requester), FEE * (PROMPT_TOKENS + MAXIMUM_TOKENS));
        _assertNobodyBut(2);
        _assertNoDutyIsOpen();
        _assertOnlyCreditsAreHeld();
    }

    function test_request_whoseExecutorDoesNotReveal_isRefundedAndThatNodeSlashed() public {
        RequestId id = _drawnRequest(plan);
        _attestHonestly(id, STAGES);
        for (uint16 stage; stage < STAGES; ++stage) {
            if (stage != 1) _revealStage(id, stage);
        }
        _revealMembers(id);
        _endRevealing(id);
        _tallyAll(id);
        _assertVerdict(id, 1, StageVerdict.Withheld);
        _assertRequest(id, RequestStatus.Refunded);
        assertEq(registry.accountOf(_hot(1)).staked, STAKE - STAKE / 10);
        _assertNobodyBut(1);
        _assertNoDutyIsOpen();
        _assertOnlyCreditsAreHeld();
    }
}

/// forge-config: default.isolate = true
contract UnsampledSmokeTest is Smoke {
    function _verificationTerms() internal view override returns (VerificationTerms memory terms) {
        terms = super._verificationTerms();
        terms.samplingRateBps = 0;
    }

    function _verdictOn(uint256 cheat) private returns (RequestId id) {
        id = _newRequest(plan);
        for (uint16 stage; stage < STAGES; ++stage) {
            _commitStage(id, stage, stage == cheat ? _moved(_truth(id, stage), 1000) : _truth(id, stage));
        }
        _draw(id);
        _revealAllStages(id);
        for (uint16 stage; stage < STAGES; ++stage) {
            verification.tally(id, stage, 0);
            if (stage == 1) vm.snapshotGasLastCall("Lifecycle", "tally, unsampled");
        }
        _assertPhase(id, Phase.Challengeable);
    }

    function _challenge(RequestId id, uint16 stage) private returns (address challenger) {
        challenger = makeAddr("challenger");
        uint256 bond = verification.terms().challengeBond;
        vm.deal(challenger, bond);
        vm.prank(challenger);
        verification.challenge{value: bond}(id, stage);
    }

    function test_request_unchallenged_isPaidWithoutACommittee() public {
        RequestId id = _verdictOn(STAGES);
        _endChallenge(id);
        verification.settle(id);
        vm.snapshotGasLastCall("Lifecycle", "settle 4 stages, unsampled");
        _assertRequest(id, RequestStatus.Settled);
        _assertNoDutyIsOpen();
        _assertOnlyCreditsAreHeld();
    }

    function test_challenge_ofACheat_isUpheldByTheFirstCommittee() public {
        RequestId id = _verdictOn(3);
        address challenger = _challenge(id, 3);
        assertEq(verification.verificationOf(id).round, 2);
        _attestHonestly(id, STAGES);
        _revealMembers(id);
        _tallyAll(id);
        _assertRequest(id, RequestStatus.Refunded);
        assertEq(registry.accountOf(_hot(3)).staked, STAKE / 2);
        assertEq(verification.creditOf(challenger), 1 ether, "the bond");
        assertEq(registry.creditOf(challenger), STAKE / 2 / 10, "the reporter's share of the slash");
        _assertNobodyBut(3);
        _assertNoDutyIsOpen();
        _assertOnlyCreditsAreHeld();
    }

    function test_challenge_ofAnHonestStage_paysItsBondToTheMembers() public {
        RequestId id = _verdictOn(STAGES);
        address challenger = _challenge(id, 0);
        _attestHonestly(id, STAGES);
        _revealMembers(id);
        _tallyAll(id);
        _assertPhase(id, Phase.Challengeable);
        assertEq(verification.creditOf(challenger), 0);
        uint256 paid = verification.creditOf(_operator(1)) + verification.creditOf(_operator(2))
            + verification.creditOf(_operator(3));
        assertEq(paid, 1 ether, "to the last wei");
        _endChallenge(id);
        verification.settle(id);
        _assertRequest(id, RequestStatus.Settled);
        _assertNobodyBut(STAGES);
        _assertNoDutyIsOpen();
        _assertOnlyCreditsAreHeld();
    }

    /// @dev A cheat that has another stage challenged, to use up the rounds, does not keep its own from being judged with it.
    function test_challenge_besideADecoy_joinsItsRound() public {
        RequestId id = _verdictOn(3);
        _challenge(id, 0);
        _challenge(id, 3);
        assertEq(verification.verificationOf(id).round, 2);
        _attestHonestly(id, STAGES);
        _revealMembers(id);
        _tallyAll(id);
        _assertRequest(id, RequestStatus.Refunded);
        assertEq(registry.accountOf(_hot(3)).staked, STAKE / 2);
        _assertNobodyBut(3);
        _assertNoDutyIsOpen();
    }
}

/// @dev MONEY-03 has to hold for the largest request there can be: 32 stages, each before a full committee of 16 in all three rounds.
/// forge-config: default.isolate = true
contract LargestRequestTest is Swarm {
    uint256 private constant STAGES = 32;
    uint256 private constant SEATS = 16;
    /// EIP-7825.
    uint256 private constant TRANSACTION_GAS_CAP = 1 << 24;

    RequestId private _id;

    function _verificationTerms() internal view override returns (VerificationTerms memory terms) {
        terms = super._verificationTerms();
        terms.committeeSeats = 1000;
        terms.challengeBond = 1 wei;
    }

    /// @dev Every stage is challenged twice.
    function setUp() public {
        _deployNetwork();
        _addNodes(0, STAGES + SEATS);
        _id = _drawnRequest(_newPlan(STAGES));
        _attestEverywhere();
        _revealAllStages(_id);
        _judge();
        for (uint256 round = 2; round <= 3; ++round) {
            vm.deal(address(this), STAGES);
            for (uint16 stage; stage < STAGES; ++stage) {
                verification.challenge{value: 1 wei}(_id, stage);
            }
            _attestEverywhere();
            _judge();
        }
        _assertPhase(_id, Phase.Challengeable);
        assertEq(verification.verificationOf(_id).round, 3);
    }

    function _attestEverywhere() private {
        for (uint16 stage; stage < STAGES; ++stage) {
            for (uint256 i; i < SEATS; ++i) {
                _attest(_id, stage, _hot(STAGES + i), _truth(_id, stage));
            }
        }
    }

    function _judge() private {
        _revealMembers(_id);
        for (uint16 stage; stage < STAGES; ++stage) {
            verification.tally(_id, stage, 0);
        }
    }

    function test_settle_ofTheLargestRequest_fitsIntoOneTransaction() public {
        _endChallenge(_id);
        verification.settle(_id);
        vm.snapshotGasLastCall("Lifecycle", "settle 32 stages and 1536 attestations");
        assertLt(vm.lastCallGas().gasTotalUsed, TRANSACTION_GAS_CAP);
        _assertRequest(_id, RequestStatus.Settled);
    }

    function test_claimRefund_ofTheLargestRequest_fitsIntoOneTransaction() public {
        vm.warp(escrow.requestOf(_id).deadline + 1);
        escrow.claimRefund(_id);
        vm.snapshotGasLastCall("Lifecycle", "claimRefund of 32 stages and 1536 attestations");
        assertLt(vm.lastCallGas().gasTotalUsed, TRANSACTION_GAS_CAP);
        _assertRequest(_id, RequestStatus.Refunded);
    }
}
