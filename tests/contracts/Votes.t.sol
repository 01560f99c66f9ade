// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

import {Phase} from "../../contracts/interfaces/IOutputVerification.sol";
import {PlanId, RequestId} from "../../contracts/types/Identifiers.sol";
import {VerificationTerms} from "../../contracts/types/Terms.sol";
import {Swarm} from "./Swarm.sol";

/// @notice CDV-06: a vote weighs what it was drawn from. One key with a fifth of all stake sits in every committee beside the few of 80
///         small keys that are drawn; counted by their stake alone they would lose to it nearly every time.
contract VotesTest is Swarm {
    uint256 internal constant SMALL = 80;
    uint256 internal constant LARGE = 80;
    uint256 internal constant TRIES = 12;

    function _verificationTerms() internal view override returns (VerificationTerms memory terms) {
        terms = super._verificationTerms();
        terms.committeeSeats = 5;
        terms.minimumReveals = 3;
        terms.tolerance = 128;
    }

    function setUp() public {
        _deployNetwork();
        for (uint256 i = 0; i < SMALL; i++) {
            _addNode(i, 1 ether);
        }
        _addNode(LARGE, 20 ether);
        vm.warp(block.timestamp + registry.activationDelay());
    }

    function test_CDV_06_largeKeyOfAFifth_cannotSpareALiarNorHurtTheHonest() public {
        PlanId plan = _newPlan(1);
        uint256 convicted;
        for (uint256 n = 0; n < TRIES; n++) {
            uint256 state = vm.snapshotState();
            vm.roll(block.number + 7 * n);
            RequestId id = _newRequest(plan);
            _commitStage(id, 0, _moved(_truth(id, 0), 2000)); // the executor, node 0, lies
            vm.roll(block.number + 2);
            vm.setBlockhash(verification.verificationOf(id).entropyBlock, keccak256(abi.encode("entropy", n)));
            verification.drawCommittee(id, SECRET);
            for (uint8 round = 1; round <= 3; round++) {
                if (_fightRound(id, round)) break;
            }
            assertNotEq(uint8(verification.verificationOf(id).phase), uint8(Phase.Challengeable), "a lie was accepted");
            for (uint256 i = 1; i < SMALL; i++) {
                assertEq(registry.accountOf(_hot(i)).staked, 1 ether, "CDV-02");
            }
            if (registry.accountOf(_hot(0)).staked < 1 ether) ++convicted;
            vm.revertToState(state);
        }
        assertGe(convicted, TRIES - 1); // a committee without a quorum three times over is possible and not a defeat
    }

    /// One round: the large key and whoever else is drawn attest and reveal. Returns whether it was the last.
    function _fightRound(RequestId id, uint8 round) private returns (bool) {
        if (verification.isSeated(id, 0, _hot(LARGE))) _attest(id, 0, _hot(LARGE), _moved(_truth(id, 0), 2000));
        uint256 honest;
        for (uint256 i = 1; i < SMALL && honest < 15; i++) {
            if (!verification.isSeated(id, 0, _hot(i))) continue;
            _attest(id, 0, _hot(i), _truth(id, 0));
            ++honest;
        }
        _endAttesting(id);
        if (round == 1) _revealStage(id, 0);
        address[] memory members = verification.membersOf(id, round, 0);
        for (uint256 i = 0; i < members.length; i++) {
            _revealAttestation(id, 0, members[i]);
        }
        _endRevealing(id);
        if (!_tallied(id, members.length)) verification.tallyWithoutQuorum(id, 0);
        return verification.verificationOf(id).round == round;
    }

    function _tallied(RequestId id, uint256 members) private returns (bool) {
        for (uint256 i = 0; i < members; i++) {
            try verification.tally(id, 0, i) {
                return true;
            } catch {}
        }
        return false;
    }
}
