// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

import {IInferenceEscrow, Replacement, RequestStatus} from "../../contracts/interfaces/IInferenceEscrow.sol";
import {Assignment} from "../../contracts/types/Assignment.sol";
import {PlanId, RequestId} from "../../contracts/types/Identifiers.sol";
import {Swarm} from "./Swarm.sol";

/// @dev Specification: InferenceEscrow.tree, replaceStages. Three stages with the replicas (0, 3), (1, 4), (2, 5); routed over 0, 1, 2.
contract ReplaceStagesTest is Swarm {
    uint256 private constant STAGES = 3;

    PlanId private _plan;
    RequestId private _id;
    Assignment[] private _all;

    function setUp() public {
        _deployNetwork();
        _addNodes(0, 8);
        for (uint16 stage = 0; stage < STAGES; stage++) {
            for (uint16 replica = 0; replica < 2; replica++) {
                _all.push(
                    Assignment(
                        stage,
                        replica,
                        2 * stage,
                        2 * stage + 2,
                        _hot(stage + 3 * replica),
                        100 + stage,
                        EXECUTION_CLASS
                    )
                );
            }
        }
        _plan = _publish(_newModel(6), FEE, _all);
        vm.warp(block.timestamp + shards.planActivationDelay());
        _id = _open(_plan);
        _route(_id);
    }

    // --------------------------------------------------------------------------------------------------------- signing

    /// @dev Replica `replica` of `stage` in the place of node `old`, with the signatures of the requester and of node `witness`.
    function _replacement(uint16 stage, uint16 replica, uint256 old, uint256 witness)
        private
        view
        returns (Replacement memory replacement)
    {
        uint256 leaf = 2 * stage + replica;
        bytes32 digest = _replacementDigest(_id, stage, _hot(old), _all[leaf].node);
        replacement = Replacement({
            assignment: _all[leaf],
            proof: _merkleProof(_leavesOf(_all), leaf),
            replaced: _hot(old),
            consent: _requesterSigns(digest),
            witness: _sign(witness, digest)
        });
    }

    function _only(Replacement memory replacement) private pure returns (Replacement[] memory list) {
        list = new Replacement[](1);
        list[0] = replacement;
    }

    function _replace(Replacement memory replacement) private {
        escrow.replaceStages(_id, _only(replacement));
    }

    function _duties(uint256 i) private view returns (uint256) {
        return registry.accountOf(_hot(i)).openDuties;
    }

    // ----------------------------------------------------------------------------------------------------------- tests

    function test_replaceStages_agreedByRequesterAndWitness_putsTheNodeInPlace() public {
        vm.expectEmit(address(escrow));
        emit IInferenceEscrow.StageReplaced(_id, 1, _hot(1), _hot(4));
        vm.prank(makeAddr("anybody"));
        _replace(_replacement(1, 1, 1, 0));
        assertEq(escrow.executorOf(_id, 1), _hot(4));
        assertEq(escrow.stageOf(_id, 1).firstUnit, 2);
        assertEq(escrow.stageOf(_id, 1).endUnit, 4);
        assertEq(_duties(1), 0, "the one that stopped has none");
        assertEq(_duties(4), 1);
        assertEq(_duties(0), 1);
    }

    function test_replaceStages_theNewNodeCommitsAndIsPaid() public {
        _replace(_replacement(1, 1, 1, 0));
        _commitAll(_id);
        _assertRequest(_id, RequestStatus.Committed);
        vm.prank(address(verification));
        escrow.markVerified(_id);
        bool[] memory paid = new bool[](STAGES);
        (paid[0], paid[1], paid[2]) = (true, true, true);
        uint256 deposit = escrow.requestOf(_id).deposit;
        vm.prank(address(verification));
        escrow.settle(_id, ANSWER_TOKENS, paid, new address[](0));
        assertGt(escrow.creditOf(_operator(4)), 0);
        assertEq(escrow.creditOf(_operator(1)), 0, "who stopped is not paid");
        uint256 sum = escrow.creditOf(_operator(0)) + escrow.creditOf(_operator(4)) + escrow.creditOf(_operator(2))
            + escrow.creditOf(treasury) + escrow.creditOf(requester);
        assertEq(sum, deposit, "MONEY-02");
        for (uint256 i = 0; i < 6; i++) {
            assertEq(_duties(i), 0);
        }
    }

    function test_replaceStages_ofStageZero_isWitnessedByTheLastStage() public {
        vm.expectRevert(abi.encodeWithSelector(IInferenceEscrow.WitnessInvalid.selector, 0, _hot(2)));
        _replace(_replacement(0, 1, 0, 1));
        _replace(_replacement(0, 1, 0, 2));
        assertEq(escrow.executorOf(_id, 0), _hot(3));
    }

    function test_replaceStages_inOrder_takesTheWitnessThatServedThen() public {
        // Stage 1 was replaced while node 0 was there to see it; then node 0 went too.
        Replacement[] memory list = new Replacement[](2);
        list[0] = _replacement(1, 1, 1, 0);
        list[1] = _replacement(0, 1, 0, 2);
        escrow.replaceStages(_id, list);
        assertEq(escrow.executorOf(_id, 0), _hot(3));
        assertEq(escrow.executorOf(_id, 1), _hot(4));
        // Whoever comes with the same list finds nothing to do, whoever comes with less neither.
        escrow.replaceStages(_id, list);
        escrow.replaceStages(_id, _only(list[0]));
        assertEq(_duties(0) + _duties(1), 0);
        assertEq(_duties(3) + _duties(4), 2);
    }

    function test_replaceStages_ofANodeThatIsNotThere_isPassedOver() public {
        _replace(_replacement(1, 1, 2, 0));
        assertEq(escrow.executorOf(_id, 1), _hot(1));
    }

    function test_replaceStages_withoutTheRequester_reverts() public {
        Replacement memory replacement = _replacement(1, 1, 1, 0);
        replacement.consent = replacement.witness;
        vm.expectRevert(abi.encodeWithSelector(IInferenceEscrow.ConsentInvalid.selector, 1, requester));
        _replace(replacement);
        replacement = _replacement(1, 1, 1, 0);
        replacement.consent = _malleated(replacement.consent);
        vm.expectRevert(abi.encodeWithSelector(IInferenceEscrow.ConsentInvalid.selector, 1, requester));
        _replace(replacement);
    }

    /// @dev The requester cannot give the pay of a node that did its work to its own node.
    function test_replaceStages_withoutTheWitness_reverts() public {
        for (uint256 other = 1; other < 8; other++) {
            vm.expectRevert(abi.encodeWithSelector(IInferenceEscrow.WitnessInvalid.selector, 1, _hot(0)));
            _replace(_replacement(1, 1, 1, other));
        }
    }

    function test_REPLAY_01_replaceStages_ofAnotherRequest_reverts() public {
        Replacement memory replacement = _replacement(1, 1, 1, 0);
        RequestId other = _open(_plan);
        _route(other);
        vm.expectRevert(abi.encodeWithSelector(IInferenceEscrow.ConsentInvalid.selector, 1, requester));
        escrow.replaceStages(other, _only(replacement));
    }

    function test_replaceStages_byANodeThatThePlanDoesNotAssign_reverts() public {
        Replacement memory replacement = _replacement(1, 1, 1, 0);
        replacement.assignment.node = _hot(6);
        bytes32 digest = _replacementDigest(_id, 1, _hot(1), _hot(6));
        replacement.consent = _requesterSigns(digest);
        replacement.witness = _sign(0, digest);
        vm.expectRevert(abi.encodeWithSelector(IInferenceEscrow.NotAssigned.selector, 1, _hot(6)));
        _replace(replacement);
        // A replica of another stage under this stage's number is no leaf either.
        replacement = _replacement(1, 1, 1, 0);
        replacement.assignment.workWeight += 1;
        vm.expectRevert(abi.encodeWithSelector(IInferenceEscrow.NotAssigned.selector, 1, _hot(4)));
        _replace(replacement);
    }

    function test_replaceStages_byANodeThatIsNotActive_reverts() public {
        vm.prank(address(verification));
        registry.jail(_hot(4), type(uint64).max);
        vm.expectRevert(abi.encodeWithSelector(IInferenceEscrow.NodeNotActive.selector, _hot(4)));
        _replace(_replacement(1, 1, 1, 0));
    }

    function test_replaceStages_ofAStageThatHasCommitted_reverts() public {
        _commitStage(_id, 1, _truth(_id, 1));
        vm.expectRevert(abi.encodeWithSelector(IInferenceEscrow.StageCommitted.selector, _id, 1));
        _replace(_replacement(1, 1, 1, 0));
    }

    function test_replaceStages_inAnotherStatus_reverts() public {
        Replacement[] memory list = _only(_replacement(1, 1, 1, 0));
        RequestId open = _open(_plan);
        vm.expectRevert(
            abi.encodeWithSelector(
                IInferenceEscrow.WrongRequestStatus.selector, open, RequestStatus.Routed, RequestStatus.Open
            )
        );
        escrow.replaceStages(open, list);
        vm.warp(escrow.requestOf(_id).deadline + 1);
        vm.expectRevert(
            abi.encodeWithSelector(
                IInferenceEscrow.WrongRequestStatus.selector, _id, RequestStatus.Routed, RequestStatus.Expired
            )
        );
        escrow.replaceStages(_id, list);
    }

    function test_replaceStages_ofAStageThatDoesNotExist_reverts() public {
        Replacement memory replacement = _replacement(1, 1, 1, 0);
        replacement.assignment.stage = 3;
        vm.expectRevert(abi.encodeWithSelector(IInferenceEscrow.StageUnknown.selector, STAGES, 3));
        _replace(replacement);
    }

    function test_replaceStages_ofMoreThanTheMost_reverts() public {
        vm.expectRevert(abi.encodeWithSelector(IInferenceEscrow.TooManyReplacements.selector, 64, 65));
        escrow.replaceStages(_id, new Replacement[](65));
    }

    /// @dev A route that is one node's has nobody else who could see it stop.
    function test_replaceStages_whereOneNodeServesAll_needsTheRequesterAlone() public {
        Assignment[] memory two = new Assignment[](2);
        two[0] = Assignment(0, 0, 0, 2, _hot(0), 1, EXECUTION_CLASS);
        two[1] = Assignment(0, 1, 0, 2, _hot(1), 1, EXECUTION_CLASS);
        PlanId plan = _publish(_newModel(2), FEE, two);
        vm.warp(block.timestamp + shards.planActivationDelay());
        RequestId id = _open(plan);
        _route(id);
        bytes32 digest = _replacementDigest(id, 0, _hot(0), _hot(1));
        Replacement memory replacement =
            Replacement(two[1], _merkleProof(_leavesOf(two), 1), _hot(0), _requesterSigns(digest), "");
        escrow.replaceStages(id, _only(replacement));
        assertEq(escrow.executorOf(id, 0), _hot(1));
    }

    /// @dev Whatever is signed by whom, a stage never has a node without all three: consent, witness, leaf.
    function testFuzz_replaceStages_changesNothingWithoutBothSignatures(uint256 seed) public {
        uint16 stage = uint16(seed % STAGES);
        Replacement memory replacement = _replacement(stage, 1, stage, (stage + 2) % 3);
        uint256 at = (seed >> 16) % 65;
        bool consent = (seed >> 32) % 2 == 0;
        bytes memory changed = consent ? replacement.consent : replacement.witness;
        changed[at] = bytes1(uint8(changed[at]) ^ uint8(1 + (seed >> 48) % 255));
        address before = escrow.executorOf(_id, stage);
        try escrow.replaceStages(_id, _only(replacement)) {
            assertTrue(false, "a changed signature was taken");
        } catch {}
        assertEq(escrow.executorOf(_id, stage), before);
    }
}
