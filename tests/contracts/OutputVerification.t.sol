// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

import {RequestStatus} from "../../contracts/interfaces/IInferenceEscrow.sol";
import {INodeRegistry, NodeStatus, SlashReason} from "../../contracts/interfaces/INodeRegistry.sol";
import {
    Attestation,
    IOutputVerification,
    Phase,
    StageRecord,
    StageVerdict,
    Verification
} from "../../contracts/interfaces/IOutputVerification.sol";
import {PlanId, RequestId} from "../../contracts/types/Identifiers.sol";
import {EscrowTerms, VerificationTerms} from "../../contracts/types/Terms.sol";
import {Refuser} from "./Recipients.sol";
import {Swarm} from "./Swarm.sol";

/// @dev Specification: OutputVerification.tree. Two stages on the nodes 0 and 1; nodes 0 to 6 have equal stake, so each sits on every
///      committee but that of its own stage. Tau is 64.
abstract contract OutputVerificationScenario is Swarm {
    uint256 internal constant NODES = 7;
    uint256 internal constant TAU = 64;
    PlanId internal _plan;

    function setUp() public {
        _deployNetwork();
        _addNodes(0, NODES);
        _plan = _newPlan(2);
    }

    function _committedRequest() internal returns (RequestId id) {
        id = _newRequest(_plan);
        _commitAll(id);
    }

    /// @dev Stage 1 is judged by members who all tell the truth; its executor's claim lies at `distance` from it. Stage 0 is in order.
    ///      Ends before the first tally.
    function _revealedAt(uint256 distance) internal returns (RequestId id) {
        id = _newRequest(_plan);
        _commitStage(id, 0, _truth(id, 0));
        _commitStage(id, 1, _moved(_truth(id, 1), distance));
        _draw(id);
        _attestHonestly(id, NODES);
        _revealAllStages(id);
        _revealMembers(id);
    }

    /// @dev The round that runs, attested by all in truth, revealed and tallied.
    function _honestRound(RequestId id) internal {
        _attestHonestly(id, NODES);
        _endAttesting(id);
        _revealMembers(id);
        _tallyAll(id);
    }

    function _stakeOf(uint256 i) internal view returns (uint256) {
        return registry.accountOf(_hot(i)).staked;
    }

    function _assertNobodySlashed() internal view {
        for (uint256 i = 0; i < NODES; i++) {
            assertEq(_stakeOf(i), STAKE, "stake is whole");
        }
    }

    function _assertNoDuties() internal view {
        for (uint256 i = 0; i < NODES; i++) {
            assertEq(registry.accountOf(_hot(i)).openDuties, 0, "duty left open");
        }
    }

    function _expectPhase(RequestId id, Phase expected, Phase actual) internal {
        vm.expectRevert(abi.encodeWithSelector(IOutputVerification.WrongPhase.selector, id, expected, actual));
    }
}

/// @notice Commitments and the draw.
contract OutputVerificationDrawTest is OutputVerificationScenario {
    function test_commitStage_byTheExecutor_isRecordedAndAnnounced() public {
        RequestId id = _newRequest(_plan);
        bytes32 commitment = _seal(id, 0, 0, _hot(0), _truth(id, 0));
        vm.expectEmit(address(verification));
        emit IOutputVerification.StageCommitted(id, 0, _hot(0), commitment);
        vm.prank(_hot(0));
        verification.commitStage(id, 0, commitment);
        assertEq(verification.stageRecordOf(id, 0).commitment, commitment);
        _assertPhase(id, Phase.Committing);
        _assertRequest(id, RequestStatus.Routed);
    }

    function test_commitStage_theLast_takesTheSnapshotAndWaitsForEntropy() public {
        RequestId id = _newRequest(_plan);
        _commitStage(id, 1, _truth(id, 1));
        bytes32 commitment = _seal(id, 0, 0, _hot(0), _truth(id, 0));
        uint64 time = uint64(block.timestamp);
        vm.expectEmit(address(verification));
        emit IOutputVerification.CommitmentsComplete(
            id, uint64(block.number) + 1, time, NODES * STAKE, time + _verificationTerms().secretWindow
        );
        vm.prank(_hot(0));
        verification.commitStage(id, 0, commitment);
        Verification memory state = verification.verificationOf(id);
        assertEq(uint8(state.phase), uint8(Phase.AwaitingDraw));
        assertEq(state.snapshotTime, block.timestamp);
        assertEq(state.snapshotStake, NODES * STAKE);
        assertEq(state.stageCount, 2);
        _assertRequest(id, RequestStatus.Committed);
    }

    function test_commitStage_refusals() public {
        RequestId id = _open(_plan);
        vm.expectRevert(abi.encodeWithSelector(IOutputVerification.RequestNotRouted.selector, id));
        vm.prank(_hot(0));
        verification.commitStage(id, 0, "c");
        _route(id);
        vm.expectRevert(abi.encodeWithSelector(IOutputVerification.NotExecutor.selector, 0, _hot(0), _hot(1)));
        vm.prank(_hot(1));
        verification.commitStage(id, 0, "c");
        vm.expectRevert(IOutputVerification.CommitmentMissing.selector);
        vm.prank(_hot(0));
        verification.commitStage(id, 0, 0);
        _commitStage(id, 0, _truth(id, 0));
        vm.expectRevert(abi.encodeWithSelector(IOutputVerification.StageAlreadyCommitted.selector, id, 0));
        vm.prank(_hot(0));
        verification.commitStage(id, 0, "c");
        uint256 deadline = escrow.requestOf(id).deadline;
        vm.warp(deadline + 1);
        vm.expectRevert(abi.encodeWithSelector(IOutputVerification.DeadlinePassed.selector, deadline, deadline + 1));
        vm.prank(_hot(1));
        verification.commitStage(id, 1, "c");
    }

    function test_commitmentOf_isThatOfTheProtocolLibrary() public view {
        Claim memory claim = Claim(keccak256("root"), keccak256("sketch"), keccak256("salt"), 5);
        RequestId id = RequestId.wrap(keccak256("id"));
        assertEq(verification.sealOf(claim.sketch, claim.salt), keccak256(abi.encode(claim.sketch, claim.salt)));
        assertEq(_commitment(id, 2, 3, _hot(0), claim), _commitmentByTheLetter(id, 2, 3, _hot(0), claim));
    }

    function testFuzz_COPY_commitmentOf_bindsEveryField(RequestId id, uint8 round, uint16 stage, Claim memory claim)
        public
        view
    {
        address node = _hot(0);
        bytes32 commitment = _commitment(id, round, stage, node, claim);
        RequestId other = RequestId.wrap(~RequestId.unwrap(id));
        assertNotEq(commitment, _commitment(other, round, stage, node, claim));
        assertNotEq(commitment, _commitment(id, round ^ 1, stage, node, claim));
        assertNotEq(commitment, _commitment(id, round, stage ^ 1, node, claim));
        assertNotEq(commitment, _commitment(id, round, stage, _hot(1), claim));
        claim.salt = ~claim.salt;
        assertNotEq(commitment, _commitment(id, round, stage, node, claim));
        claim.salt = ~claim.salt;
        claim.tokens ^= 1;
        assertNotEq(commitment, _commitment(id, round, stage, node, claim));
    }

    function test_drawCommittee_withTheSecret_fixesTheSeed() public {
        RequestId id = _committedRequest();
        uint256 entropyBlock = verification.verificationOf(id).entropyBlock;
        vm.roll(entropyBlock + 1);
        bytes32 digest;
        for (uint16 i = 0; i < 2; i++) {
            digest = keccak256(abi.encode(digest, verification.stageRecordOf(id, i).commitment));
        }
        bytes32 seed = keccak256(abi.encode(SECRET, digest, blockhash(entropyBlock), id));
        uint64 attestDeadline = uint64(block.timestamp) + _verificationTerms().attestWindow;
        vm.expectEmit(address(verification));
        emit IOutputVerification.CommitteeDrawn(id, 1, true, seed, SECRET, attestDeadline);
        verification.drawCommittee(id, SECRET);
        Verification memory state = verification.verificationOf(id);
        assertEq(state.seed, seed);
        assertEq(state.round, 1);
        assertTrue(state.sampled);
        assertEq(state.outstanding, 2);
        assertEq(state.attestDeadline, attestDeadline);
        assertEq(state.revealDeadline, attestDeadline + _verificationTerms().revealWindow);
        _assertPhase(id, Phase.Attesting);
    }

    function test_drawCommittee_refusals() public {
        RequestId id = _newRequest(_plan);
        _expectPhase(id, Phase.AwaitingDraw, Phase.Committing);
        verification.drawCommittee(id, SECRET);
        _commitAll(id);
        uint256 entropyBlock = verification.verificationOf(id).entropyBlock;
        vm.expectRevert(
            abi.encodeWithSelector(IOutputVerification.EntropyNotReady.selector, entropyBlock, block.number)
        );
        verification.drawCommittee(id, SECRET);
        vm.roll(entropyBlock + 1);
        bytes32 expected = keccak256(abi.encode(SECRET));
        bytes32 wrong = "wrong";
        vm.expectRevert(
            abi.encodeWithSelector(IOutputVerification.SecretMismatch.selector, expected, keccak256(abi.encode(wrong)))
        );
        verification.drawCommittee(id, wrong);
        uint256 deadline = verification.verificationOf(id).secretDeadline;
        vm.warp(deadline);
        vm.expectRevert(abi.encodeWithSelector(IOutputVerification.DeadlineNotPassed.selector, deadline, deadline));
        verification.drawCommittee(id, 0);
        vm.warp(deadline + 1);
        verification.drawCommittee(id, 0);
        _assertPhase(id, Phase.Attesting);
        _expectPhase(id, Phase.AwaitingDraw, Phase.Attesting);
        verification.drawCommittee(id, SECRET);
    }

    function test_drawCommittee_afterTheBlockHashIsGone_renewsTheEntropy() public {
        RequestId id = _committedRequest();
        uint256 first = verification.verificationOf(id).entropyBlock;
        vm.roll(first + 257);
        vm.expectEmit(address(verification));
        emit IOutputVerification.EntropyRenewed(id, uint64(block.number) + 1);
        verification.drawCommittee(id, SECRET);
        _assertPhase(id, Phase.AwaitingDraw);
        assertEq(verification.verificationOf(id).entropyBlock, block.number + 1);
        vm.expectRevert(
            abi.encodeWithSelector(IOutputVerification.EntropyNotReady.selector, block.number + 1, block.number)
        );
        verification.drawCommittee(id, SECRET);
        vm.roll(block.number + 2);
        verification.drawCommittee(id, SECRET);
        _assertPhase(id, Phase.Attesting);
    }

    /// Whoever lets the entropy lapse must not be the only one who may draw the next.
    function test_drawCommittee_afterARenewal_anybodyMayDraw() public {
        RequestId id = _committedRequest();
        vm.roll(uint256(verification.verificationOf(id).entropyBlock) + 257);
        verification.drawCommittee(id, SECRET);
        vm.roll(block.number + 2);
        vm.warp(block.timestamp + 1);
        vm.prank(makeAddr("stranger"));
        verification.drawCommittee(id, 0);
        _assertPhase(id, Phase.Attesting);
    }

    function test_drawCommittee_theLastBlockWhoseHashIsThere_draws() public {
        RequestId id = _committedRequest();
        vm.roll(uint256(verification.verificationOf(id).entropyBlock) + 256);
        verification.drawCommittee(id, SECRET);
        _assertPhase(id, Phase.Attesting);
    }

    function test_isSeated_nodesOfTheExecutorsOperator_areNot() public {
        // Node 7 belongs to the operator of node 1, who executes stage 1.
        bytes memory proof = _nodeKeyProof(7, _operator(1), CERTIFICATE_HASH, HOST, block.timestamp);
        vm.deal(_operator(1), STAKE);
        vm.prank(_operator(1));
        registry.register{value: STAKE}(_hot(7), CERTIFICATE_HASH, HOST, block.timestamp, proof);
        vm.warp(block.timestamp + registry.activationDelay());
        RequestId id = _drawnRequest(_plan);
        assertFalse(verification.isSeated(id, 1, _hot(1)), "the executor");
        assertFalse(verification.isSeated(id, 1, _hot(7)), "a sibling of the executor");
        assertTrue(verification.isSeated(id, 0, _hot(7)));
        assertTrue(verification.isSeated(id, 0, _hot(1)), "the executor of another stage");
        assertFalse(verification.isSeated(id, 0, _hot(30)), "not registered");
        assertFalse(verification.isSeated(id, 2, _hot(2)), "no such stage");
    }

    function test_isSeated_stakeAfterTheSnapshot_doesNotCount() public {
        RequestId id = _newRequest(_plan);
        _addNode(7, STAKE);
        _commitAll(id);
        _addNode(8, STAKE);
        vm.warp(block.timestamp + 30);
        _draw(id);
        vm.warp(block.timestamp + 200);
        assertEq(uint8(registry.statusOf(_hot(7))), uint8(NodeStatus.Active));
        assertEq(uint8(registry.statusOf(_hot(8))), uint8(NodeStatus.Active));
        assertFalse(verification.isSeated(id, 0, _hot(7)), "pending at the snapshot");
        assertFalse(verification.isSeated(id, 0, _hot(8)), "registered after the snapshot");
    }
}

/// @notice Attestations and reveals.
contract OutputVerificationRevealTest is OutputVerificationScenario {
    function test_commitAttestations_ofASeatedNode_opensADutyPerStage() public {
        RequestId id = _drawnRequest(_plan);
        uint16[] memory stages = new uint16[](2);
        bytes32[] memory commitments = new bytes32[](2);
        stages[1] = 1;
        (commitments[0], commitments[1]) = ("a", "b");
        vm.expectEmit(address(verification));
        emit IOutputVerification.AttestationCommitted(id, 1, 0, _hot(3), "a", STAKE);
        vm.expectEmit(address(verification));
        emit IOutputVerification.AttestationCommitted(id, 1, 1, _hot(3), "b", STAKE);
        vm.prank(_hot(3));
        verification.commitAttestations(id, stages, commitments);
        assertEq(registry.accountOf(_hot(3)).openDuties, 2);
        assertEq(verification.membersOf(id, 1, 0)[0], _hot(3));
        assertEq(verification.membersOf(id, 1, 1)[0], _hot(3));
        Attestation memory attestation = verification.attestationOf(id, 1, 0, _hot(3));
        assertEq(attestation.commitment, "a");
        assertEq(attestation.stake, STAKE);
        assertFalse(attestation.revealed);
    }

    function test_commitAttestations_refusals() public {
        RequestId id = _committedRequest();
        uint16[] memory stages = new uint16[](1);
        bytes32[] memory commitments = new bytes32[](1);
        commitments[0] = "c";
        _expectPhase(id, Phase.Attesting, Phase.AwaitingDraw);
        verification.commitAttestations(id, stages, commitments);
        _draw(id);
        vm.expectRevert(abi.encodeWithSelector(IOutputVerification.LengthMismatch.selector, 1, 2));
        verification.commitAttestations(id, stages, new bytes32[](2));
        vm.expectRevert(abi.encodeWithSelector(IOutputVerification.NotSeated.selector, _hot(0), 0, 1));
        vm.prank(_hot(0));
        verification.commitAttestations(id, stages, commitments);
        vm.expectRevert(abi.encodeWithSelector(IOutputVerification.NotSeated.selector, requester, 0, 1));
        vm.prank(requester);
        verification.commitAttestations(id, stages, commitments);
        vm.expectRevert(IOutputVerification.CommitmentMissing.selector);
        vm.prank(_hot(2));
        verification.commitAttestations(id, stages, new bytes32[](1));
        vm.prank(_hot(2));
        verification.commitAttestations(id, stages, commitments);
        vm.expectRevert(abi.encodeWithSelector(IOutputVerification.AlreadyCommitted.selector, _hot(2), 0));
        vm.prank(_hot(2));
        verification.commitAttestations(id, stages, commitments);
        stages[0] = 2;
        vm.expectRevert(abi.encodeWithSelector(IOutputVerification.StageNotDisputed.selector, 2));
        vm.prank(_hot(2));
        verification.commitAttestations(id, stages, commitments);
        stages[0] = 1;
        _endAttesting(id);
        _expectPhase(id, Phase.Attesting, Phase.Revealing);
        vm.prank(_hot(2));
        verification.commitAttestations(id, stages, commitments);
    }

    function test_commitAttestations_ofEverybody_beginsTheReveals() public {
        RequestId id = _drawnRequest(_plan);
        _attestHonestly(id, NODES);
        _assertPhase(id, Phase.Revealing);
        assertEq(verification.verificationOf(id).attestDeadline, block.timestamp);
        assertEq(verification.verificationOf(id).revealDeadline, block.timestamp + _verificationTerms().revealWindow);
    }

    function test_revealStage_isRecordedAndAnnounced() public {
        RequestId id = _drawnRequest(_plan);
        _endAttesting(id);
        Claim memory claim = _claimOf(id, 0, 1, _hot(1));
        vm.expectEmit(address(verification));
        emit IOutputVerification.StageRevealed(id, 1, _hot(1), claim.root, claim.sketch, claim.tokens, claim.salt);
        _revealStage(id, 1);
        StageRecord memory record = verification.stageRecordOf(id, 1);
        assertTrue(record.revealed);
        assertEq(record.evidenceRoot, claim.root);
        assertEq(record.sketch, claim.sketch);
        assertEq(record.outputTokens, claim.tokens);
    }

    function test_revealStage_refusals() public {
        RequestId id = _drawnRequest(_plan);
        Claim memory claim = _claimOf(id, 0, 0, _hot(0));
        _expectPhase(id, Phase.Revealing, Phase.Attesting);
        vm.prank(_hot(0));
        verification.revealStage(id, 0, claim.root, claim.sketch, claim.tokens, claim.salt);
        _endAttesting(id);
        vm.expectRevert(abi.encodeWithSelector(IOutputVerification.NotExecutor.selector, 0, _hot(0), _hot(1)));
        vm.prank(_hot(1));
        verification.revealStage(id, 0, claim.root, claim.sketch, claim.tokens, claim.salt);
        vm.startPrank(_hot(0));
        vm.expectRevert(abi.encodeWithSelector(IOutputVerification.TokensOutOfRange.selector, MAXIMUM_TOKENS, 0));
        verification.revealStage(id, 0, claim.root, claim.sketch, 0, claim.salt);
        vm.expectRevert(
            abi.encodeWithSelector(
                IOutputVerification.TokensOutOfRange.selector, MAXIMUM_TOKENS, uint256(MAXIMUM_TOKENS) + 1
            )
        );
        verification.revealStage(id, 0, claim.root, claim.sketch, MAXIMUM_TOKENS + 1, claim.salt);
        bytes32 committed = verification.stageRecordOf(id, 0).commitment;
        bytes32 opened = verification.commitmentOf(
            id, 0, 0, _hot(0), claim.root, verification.sealOf(~claim.sketch, claim.salt), claim.tokens
        );
        vm.expectRevert(abi.encodeWithSelector(IOutputVerification.CommitmentMismatch.selector, committed, opened));
        verification.revealStage(id, 0, claim.root, ~claim.sketch, claim.tokens, claim.salt);
        verification.revealStage(id, 0, claim.root, claim.sketch, claim.tokens, claim.salt);
        vm.expectRevert(abi.encodeWithSelector(IOutputVerification.AlreadyRevealed.selector, _hot(0), 0));
        verification.revealStage(id, 0, claim.root, claim.sketch, claim.tokens, claim.salt);
        vm.stopPrank();
        uint256 deadline = verification.verificationOf(id).revealDeadline;
        vm.warp(deadline + 1);
        claim = _claimOf(id, 0, 1, _hot(1));
        vm.expectRevert(abi.encodeWithSelector(IOutputVerification.DeadlinePassed.selector, deadline, deadline + 1));
        vm.prank(_hot(1));
        verification.revealStage(id, 1, claim.root, claim.sketch, claim.tokens, claim.salt);
    }

    function test_CDV_01_revealAttestation_onlyOfOnesOwnEarlierCommitment() public {
        RequestId id = _drawnRequest(_plan);
        _attest(id, 0, _hot(2), _truth(id, 0));
        _attest(id, 0, _hot(3), _truth(id, 0));
        Claim memory claim = _claimOf(id, 1, 0, _hot(2));
        _expectPhase(id, Phase.Revealing, Phase.Attesting);
        vm.prank(_hot(2));
        verification.revealAttestation(id, 0, claim.root, claim.sketch, claim.tokens, claim.salt);
        _endAttesting(id);
        vm.expectRevert(IOutputVerification.CommitmentMissing.selector);
        vm.prank(_hot(4));
        verification.revealAttestation(id, 0, claim.root, claim.sketch, claim.tokens, claim.salt);
        bytes32 opened = _commitment(id, 1, 0, _hot(3), claim);
        bytes32 committed = verification.attestationOf(id, 1, 0, _hot(3)).commitment;
        vm.expectRevert(abi.encodeWithSelector(IOutputVerification.CommitmentMismatch.selector, committed, opened));
        vm.prank(_hot(3));
        verification.revealAttestation(id, 0, claim.root, claim.sketch, claim.tokens, claim.salt);

        vm.startPrank(_hot(2));
        vm.expectRevert(
            abi.encodeWithSelector(
                IOutputVerification.TokensOutOfRange.selector, MAXIMUM_TOKENS, uint256(MAXIMUM_TOKENS) + 1
            )
        );
        verification.revealAttestation(id, 0, claim.root, claim.sketch, MAXIMUM_TOKENS + 1, claim.salt);
        vm.expectEmit(address(verification));
        emit IOutputVerification.AttestationRevealed(
            id, 1, 0, _hot(2), claim.root, claim.sketch, claim.tokens, claim.salt
        );
        verification.revealAttestation(id, 0, claim.root, claim.sketch, claim.tokens, claim.salt);
        vm.expectRevert(abi.encodeWithSelector(IOutputVerification.AlreadyRevealed.selector, _hot(2), 0));
        verification.revealAttestation(id, 0, claim.root, claim.sketch, claim.tokens, claim.salt);
        vm.stopPrank();
        uint256 deadline = verification.verificationOf(id).revealDeadline;
        vm.warp(deadline + 1);
        claim = _claimOf(id, 1, 0, _hot(3));
        vm.expectRevert(abi.encodeWithSelector(IOutputVerification.DeadlinePassed.selector, deadline, deadline + 1));
        vm.prank(_hot(3));
        verification.revealAttestation(id, 0, claim.root, claim.sketch, claim.tokens, claim.salt);
    }
}

/// @notice What a tally says at every distance, and what follows from it.
contract OutputVerificationTallyTest is OutputVerificationScenario {
    function test_tally_refusals() public {
        RequestId id = _drawnRequest(_plan);
        _expectPhase(id, Phase.Revealing, Phase.Attesting);
        verification.tally(id, 0, 0);
        _attestRound(id, NODES - 1, 2, 0, _moved(_truth(id, 0), 2000));
        _endAttesting(id);
        vm.expectRevert(abi.encodeWithSelector(IOutputVerification.RevealsOutstanding.selector, 0));
        verification.tally(id, 0, 0);
        vm.expectRevert(abi.encodeWithSelector(IOutputVerification.StageNotDisputed.selector, 2));
        verification.tally(id, 2, 0);
        _revealAllStages(id);
        _revealAttestation(id, 0, _hot(2));
        _revealAttestation(id, 0, _hot(3));
        _revealAttestation(id, 0, _hot(4));
        _revealAttestation(id, 0, _hot(5));
        vm.expectRevert(abi.encodeWithSelector(IOutputVerification.RevealsOutstanding.selector, 0));
        verification.tally(id, 0, 0);
        _endRevealing(id);
        // Members of stage 0 in order: 1 (silent), 2 (liar), 3, 4, 5.
        vm.expectRevert(abi.encodeWithSelector(IOutputVerification.MedoidOutOfRange.selector, 5, 5));
        verification.tally(id, 0, 5);
        vm.expectRevert(abi.encodeWithSelector(IOutputVerification.MedoidNotRevealed.selector, _hot(1)));
        verification.tally(id, 0, 0);
        uint256 required = (4 * STAKE * 2 + 2) / 3;
        vm.expectRevert(abi.encodeWithSelector(IOutputVerification.MedoidWithoutQuorum.selector, required, STAKE));
        verification.tally(id, 0, 1);
        vm.expectRevert(abi.encodeWithSelector(IOutputVerification.QuorumExists.selector, 0, 2));
        verification.tallyWithoutQuorum(id, 0);
        verification.tally(id, 0, 2);
        vm.expectRevert(abi.encodeWithSelector(IOutputVerification.AlreadyTallied.selector, 0));
        verification.tally(id, 0, 2);
        assertEq(uint8(registry.statusOf(_hot(1))), uint8(NodeStatus.Jailed), "the silent member");
    }

    function test_tally_withTooFewReveals_hasNoQuorum() public {
        RequestId id = _drawnRequest(_plan);
        _attest(id, 0, _hot(2), _truth(id, 0));
        _endAttesting(id);
        _revealStage(id, 0);
        _revealAttestation(id, 0, _hot(2));
        vm.expectRevert(abi.encodeWithSelector(IOutputVerification.MedoidWithoutQuorum.selector, 2, 1));
        verification.tally(id, 0, 0);
        vm.expectEmit(address(verification));
        emit IOutputVerification.StageTallied(id, 1, 0, StageVerdict.NoQuorum, address(0), 0, STAKE, type(uint256).max);
        verification.tallyWithoutQuorum(id, 0);
        _assertVerdict(id, 0, StageVerdict.NoQuorum);
    }

    /// @dev Members 1 to `members` attest stage 0, the first `liars` of them alike in a lie. Ends before the tally.
    function _split(uint256 members, uint256 liars) private returns (RequestId id) {
        id = _drawnRequest(_plan);
        for (uint256 i = 1; i <= members; i++) {
            _attest(id, 0, _hot(i), i <= liars ? _moved(_truth(id, 0), 1000) : _truth(id, 0));
        }
        _endAttesting(id);
        _revealAllStages(id);
        _revealMembers(id);
    }

    function test_tally_exactlyTwoThirds_areAQuorum() public {
        RequestId id = _split(6, 2);
        vm.expectRevert(abi.encodeWithSelector(IOutputVerification.MedoidWithoutQuorum.selector, 4 * STAKE, 2 * STAKE));
        verification.tally(id, 0, 0);
        vm.expectRevert(abi.encodeWithSelector(IOutputVerification.QuorumExists.selector, 0, 2));
        verification.tallyWithoutQuorum(id, 0);
        verification.tally(id, 0, 5);
        _assertVerdict(id, 0, StageVerdict.Accepted);
    }

    function test_tally_lessThanTwoThirds_areNone() public {
        RequestId id = _split(5, 2);
        uint256 required = (5 * STAKE * 2 + 2) / 3;
        vm.expectRevert(abi.encodeWithSelector(IOutputVerification.MedoidWithoutQuorum.selector, required, 3 * STAKE));
        verification.tally(id, 0, 4);
        verification.tallyWithoutQuorum(id, 0);
        _assertVerdict(id, 0, StageVerdict.NoQuorum);
    }

    /// Silent stake counts neither for nor against.
    function test_tally_unrevealedStake_isNotCounted() public {
        RequestId id = _drawnRequest(_plan);
        for (uint256 i = 1; i <= 6; i++) {
            _attest(id, 0, _hot(i), _truth(id, 0));
        }
        _endAttesting(id);
        _revealAllStages(id);
        _revealAttestation(id, 0, _hot(5));
        _revealAttestation(id, 0, _hot(6));
        _endRevealing(id);
        verification.tally(id, 0, 4);
        _assertVerdict(id, 0, StageVerdict.Accepted);
    }

    function test_tally_unanimousTruth_verifiesTheRequest() public {
        RequestId id = _revealedAt(0);
        vm.expectEmit(address(verification));
        emit IOutputVerification.StageTallied(id, 1, 0, StageVerdict.Accepted, _hot(1), 6 * STAKE, 6 * STAKE, 0);
        verification.tally(id, 0, 0);
        uint64 deadline = uint64(block.timestamp) + _verificationTerms().challengeWindow;
        vm.expectEmit(address(verification));
        emit IOutputVerification.VerdictReached(id, true, deadline);
        verification.tally(id, 1, 0);
        _assertPhase(id, Phase.Challengeable);
        _assertRequest(id, RequestStatus.Verified);
        assertEq(verification.verificationOf(id).challengeDeadline, deadline);
        _assertNobodySlashed();
    }

    function test_tally_executorAtTau_isAccepted() public {
        RequestId id = _revealedAt(TAU);
        _tallyAll(id);
        _assertVerdict(id, 1, StageVerdict.Accepted);
        _assertPhase(id, Phase.Challengeable);
    }

    function test_tally_executorBetweenTauAndTwoTau_isToleratedAndUnpaid() public {
        RequestId id = _revealedAt(TAU + 1);
        _tallyAll(id);
        _assertVerdict(id, 1, StageVerdict.Tolerated);
        _endChallenge(id);
        verification.settle(id);
        assertEq(escrow.creditOf(_operator(1)) == 0, false, "still paid as a verifier of stage 0");
        id = _revealedAt(2 * TAU);
        _tallyAll(id);
        _assertVerdict(id, 1, StageVerdict.Tolerated);
        _assertNobodySlashed();
    }

    function test_tally_executorBeyondTwoTau_callsTheBackupCommitteeAndSlashesNobodyYet() public {
        RequestId id = _revealedAt(2 * TAU + 1);
        verification.tally(id, 0, 0);
        bytes32 seed = keccak256(abi.encode(verification.verificationOf(id).seed, uint8(2)));
        uint64 deadline = uint64(block.timestamp) + _verificationTerms().attestWindow;
        vm.expectEmit(address(verification));
        emit IOutputVerification.RoundEscalated(id, 2, seed, deadline);
        verification.tally(id, 1, 0);
        _assertVerdict(id, 1, StageVerdict.Rejected);
        _assertPhase(id, Phase.Attesting);
        assertEq(verification.verificationOf(id).round, 2);
        assertTrue(verification.stageRecordOf(id, 1).disputed);
        assertFalse(verification.stageRecordOf(id, 0).disputed, "blame is per stage");
        _assertNobodySlashed();
    }

    function test_tally_backupCommitteeConfirms_slashesTheExecutorAndRefunds() public {
        RequestId id = _revealedAt(2 * TAU + 1);
        uint256 deposit = escrow.requestOf(id).deposit;
        _tallyAll(id);
        _attestHonestly(id, NODES);
        _revealMembers(id);
        uint256 slashed = STAKE / 2;
        vm.expectEmit(address(registry));
        emit INodeRegistry.NodeSlashed(
            _hot(1), SlashReason.IncorrectOutput, slashed, slashed - (slashed / 5 / 6) * 6, STAKE - slashed, 0
        );
        vm.expectEmit(address(verification));
        emit IOutputVerification.VerdictReached(id, false, 0);
        vm.expectEmit(address(verification));
        emit IOutputVerification.RequestConcluded(id, false, 1, 0);
        verification.tally(id, 1, 0);
        assertEq(_stakeOf(1), STAKE - slashed);
        assertEq(uint8(registry.statusOf(_hot(1))), uint8(NodeStatus.Jailed));
        assertEq(escrow.creditOf(requester), deposit);
        _assertRequest(id, RequestStatus.Refunded);
        _assertPhase(id, Phase.Final);
        _assertNoDuties();
    }

    function test_tally_lyingMember_callsTheBackupCommitteeWhichSlashesIt() public {
        RequestId id = _drawnRequest(_plan);
        _attestRound(id, NODES, 4, 0, _moved(_truth(id, 0), 2 * TAU + 1));
        _revealAllStages(id);
        _revealMembers(id);
        _tallyAll(id);
        _assertVerdict(id, 0, StageVerdict.Accepted);
        assertEq(verification.verificationOf(id).round, 2, "one voice against another");
        _assertNobodySlashed();
        _honestRound(id);
        assertEq(_stakeOf(4), STAKE - STAKE / 2);
        assertEq(uint8(registry.statusOf(_hot(4))), uint8(NodeStatus.Jailed));
        _assertPhase(id, Phase.Challengeable);
        _endChallenge(id);
        verification.settle(id);
        _assertNoDuties();
    }

    /// @dev `distance` of what the member says of the rows inside the stage; of the output it says the truth.
    function _tallyLazyMember(uint256 distance) private returns (RequestId id) {
        id = _drawnRequest(_plan);
        Claim memory lazy = _truth(id, 0);
        lazy.root = _moveSketch(lazy.root, distance);
        _attestRound(id, NODES, 4, 0, lazy);
        _revealAllStages(id);
        _revealMembers(id);
        _tallyAll(id);
        _assertVerdict(id, 0, StageVerdict.Accepted);
        _assertNobodySlashed();
    }

    function test_CDV_07_memberThatCopiesTheOutput_isSlashedByTheBackupCommittee() public {
        RequestId id = _tallyLazyMember(2 * TAU + 1);
        assertEq(verification.verificationOf(id).round, 2);
        _honestRound(id);
        assertEq(_stakeOf(4), STAKE - STAKE / 2);
        _assertPhase(id, Phase.Challengeable);
        _endChallenge(id);
        verification.settle(id);
        assertLt(escrow.creditOf(_operator(4)), escrow.creditOf(_operator(5)), "paid for its other stages only");
        _assertNoDuties();
    }

    function test_CDV_07_memberAtTwoTauInside_isNotPaidAndNotSlashed() public {
        RequestId id = _tallyLazyMember(2 * TAU);
        assertEq(verification.verificationOf(id).round, 1);
        _endChallenge(id);
        verification.settle(id);
        assertLt(escrow.creditOf(_operator(4)), escrow.creditOf(_operator(5)), "paid for its other stages only");
        _assertNobodySlashed();
    }

    function test_CDV_07_copiedOutput_isNoMedoidForThoseWhoComputed() public {
        RequestId id = _drawnRequest(_plan);
        Claim memory lazy = _truth(id, 0);
        lazy.root = ~lazy.root;
        _attestRound(id, NODES, 4, 0, lazy);
        _revealAllStages(id);
        _revealMembers(id);
        address[] memory members = verification.membersOf(id, 1, 0);
        for (uint256 i = 0; i < members.length; i++) {
            if (members[i] != _hot(4)) continue;
            vm.expectPartialRevert(IOutputVerification.MedoidWithoutQuorum.selector);
            verification.tally(id, 0, i);
            return;
        }
        fail();
    }

    function test_tally_memberBetweenTauAndTwoTau_isNeitherSlashedNorPaid() public {
        RequestId id = _drawnRequest(_plan);
        Claim memory off = _moved(_truth(id, 0), TAU + 1);
        for (uint256 i = 1; i < NODES; i++) {
            _attest(id, 0, _hot(i), i == 4 ? off : _truth(id, 0));
        }
        for (uint256 i = 2; i < NODES; i++) {
            if (i != 4) _attest(id, 1, _hot(i), _truth(id, 1));
        }
        _endAttesting(id);
        _revealAllStages(id);
        _revealMembers(id);
        _tallyAll(id);
        _assertPhase(id, Phase.Challengeable);
        _endChallenge(id);
        verification.settle(id);
        assertEq(escrow.creditOf(_operator(4)), 0);
        assertGt(escrow.creditOf(_operator(5)), 0);
        _assertNobodySlashed();
    }

    function test_tally_executorThatKeepsItsReveal_isBlamedAndSlashed() public {
        RequestId id = _drawnRequest(_plan);
        _attestHonestly(id, NODES);
        _revealStage(id, 0);
        _revealMembers(id);
        verification.tally(id, 0, 0);
        vm.expectRevert(abi.encodeWithSelector(IOutputVerification.RevealsOutstanding.selector, 1));
        verification.tally(id, 1, 0);
        _endRevealing(id);
        vm.expectEmit(address(verification));
        emit IOutputVerification.RequestConcluded(id, false, 1, 0);
        verification.tally(id, 1, 0);
        _assertVerdict(id, 1, StageVerdict.Withheld);
        assertEq(_stakeOf(1), STAKE - STAKE / 10);
        _assertRequest(id, RequestStatus.Refunded);
        _assertNoDuties();
    }

    function test_tally_executorThatWithheldItsEvidence_isSlashedByTheBackupCommittee() public {
        RequestId id = _drawnRequest(_plan);
        Claim memory nothing = Claim(0, 0, 0, 0);
        for (uint8 round = 1; round <= 2; round++) {
            for (uint256 i = 0; i < NODES; i++) {
                if (i != 1) _attest(id, 1, _hot(i), nothing);
                if (i != 0 && round == 1) _attest(id, 0, _hot(i), _truth(id, 0));
            }
            if (round == 1) _revealAllStages(id);
            _revealMembers(id);
            if (round == 2) {
                vm.expectEmit(true, true, false, false, address(registry));
                emit INodeRegistry.NodeSlashed(_hot(1), SlashReason.EvidenceWithheld, 0, 0, 0, 0);
            }
            _tallyAll(id);
        }
        assertEq(_stakeOf(1), STAKE - STAKE / 10);
        _assertRequest(id, RequestStatus.Refunded);
    }

    function test_tally_noQuorumInThreeRounds_refundsAndSlashesNobody() public {
        RequestId id = _drawnRequest(_plan);
        for (uint8 round = 1; round <= 3; round++) {
            assertEq(verification.verificationOf(id).round, round);
            for (uint256 i = 0; i < NODES; i++) {
                if (i != 1) _attest(id, 1, _hot(i), _moved(_truth(id, 1), 500 * i));
                if (i != 0 && round == 1) _attest(id, 0, _hot(i), _truth(id, 0));
            }
            if (round == 1) _revealAllStages(id);
            _revealMembers(id);
            if (round == 1) verification.tally(id, 0, 0);
            verification.tallyWithoutQuorum(id, 1);
        }
        _assertRequest(id, RequestStatus.Refunded);
        _assertVerdict(id, 1, StageVerdict.NoQuorum);
        _assertNobodySlashed();
        _assertNoDuties();
    }

    function test_tally_noMembersAtAll_refundsAfterThreeRounds() public {
        RequestId id = _drawnRequest(_plan);
        for (uint8 round = 1; round <= 3; round++) {
            _endAttesting(id);
            if (round == 1) _revealAllStages(id);
            verification.tallyWithoutQuorum(id, 0);
            verification.tallyWithoutQuorum(id, 1);
        }
        _assertRequest(id, RequestStatus.Refunded);
        _assertNobodySlashed();
    }

    function test_tally_anotherNumberOfTokens_isAnotherOutput() public {
        RequestId id = _newRequest(_plan);
        Claim memory claim = _truth(id, 1);
        claim.tokens = ANSWER_TOKENS - 1;
        _commitStage(id, 0, _truth(id, 0));
        _commitStage(id, 1, claim);
        _draw(id);
        _attestHonestly(id, NODES);
        _revealAllStages(id);
        _revealMembers(id);
        _tallyAll(id);
        _assertVerdict(id, 1, StageVerdict.Rejected);
    }
}

/// @notice Verdicts under challenge, and their end.
contract OutputVerificationChallengeTest is OutputVerificationScenario {
    address private _challenger = makeAddr("challenger");
    uint256 private constant BOND = 1 ether;

    function _challenge(RequestId id, uint16 stage) private {
        vm.deal(_challenger, _challenger.balance + BOND);
        vm.prank(_challenger);
        verification.challenge{value: BOND}(id, stage);
    }

    function test_settle_afterTheChallengeWindow_paysEverybody() public {
        RequestId id = _challengeableRequest(_plan, NODES);
        uint256 deadline = verification.verificationOf(id).challengeDeadline;
        vm.warp(deadline);
        vm.expectRevert(abi.encodeWithSelector(IOutputVerification.DeadlineNotPassed.selector, deadline, deadline));
        verification.settle(id);
        vm.warp(deadline + 1);
        vm.expectEmit(address(verification));
        emit IOutputVerification.RequestConcluded(id, true, type(uint16).max, ANSWER_TOKENS);
        verification.settle(id);
        _assertPhase(id, Phase.Final);
        _assertRequest(id, RequestStatus.Settled);
        _assertNoDuties();
        for (uint256 i = 0; i < NODES; i++) {
            assertGt(escrow.creditOf(_operator(i)), 0, "executors and members alike");
        }
        _expectPhase(id, Phase.Challengeable, Phase.Final);
        verification.settle(id);
    }

    function test_challenge_refusals() public {
        RequestId id = _drawnRequest(_plan);
        vm.deal(_challenger, 10 ether);
        vm.startPrank(_challenger);
        _expectPhase(id, Phase.Challengeable, Phase.Attesting);
        verification.challenge{value: BOND}(id, 0);
        vm.stopPrank();
        id = _challengeableRequest(_plan, NODES);
        vm.startPrank(_challenger);
        vm.expectRevert(abi.encodeWithSelector(IOutputVerification.StageNotDisputed.selector, 2));
        verification.challenge{value: BOND}(id, 2);
        vm.expectRevert(abi.encodeWithSelector(IOutputVerification.BondMismatch.selector, BOND, BOND - 1));
        verification.challenge{value: BOND - 1}(id, 0);
        vm.expectRevert(abi.encodeWithSelector(IOutputVerification.BondMismatch.selector, BOND, BOND + 1));
        verification.challenge{value: BOND + 1}(id, 0);
        uint256 deadline = verification.verificationOf(id).challengeDeadline;
        vm.warp(deadline + 1);
        vm.expectRevert(abi.encodeWithSelector(IOutputVerification.DeadlinePassed.selector, deadline, deadline + 1));
        verification.challenge{value: BOND}(id, 0);
        vm.stopPrank();
    }

    function test_challenge_ofAnHonestStage_losesTheBondToTheMembers() public {
        RequestId id = _challengeableRequest(_plan, NODES);
        vm.expectEmit(address(verification));
        emit IOutputVerification.Challenged(id, 0, _challenger, BOND);
        _challenge(id, 0);
        assertEq(verification.stageRecordOf(id, 0).challenger, _challenger);
        assertEq(verification.stageRecordOf(id, 0).bond, BOND);
        assertEq(verification.verificationOf(id).round, 2);
        _assertRequest(id, RequestStatus.Committed);
        _attestHonestly(id, NODES);
        _revealMembers(id);
        vm.expectEmit(address(verification));
        emit IOutputVerification.ChallengeResolved(id, 0, _challenger, false, BOND);
        verification.tally(id, 0, 0);
        assertEq(verification.stageRecordOf(id, 0).bond, 0);
        assertEq(verification.creditOf(_challenger), 0);
        uint256 credited;
        for (uint256 i = 1; i < NODES; i++) {
            credited += verification.creditOf(_operator(i));
        }
        assertEq(credited, BOND, "to the wei");
        _assertPhase(id, Phase.Challengeable);
        _assertNobodySlashed();
    }

    function test_challenge_ofAWrongStage_isUpheld() public {
        // An unsampled request: nobody looked.
        RequestId id = _unsampledRequest(1, 2 * TAU + 1);
        _challenge(id, 1);
        _attestHonestly(id, NODES);
        _revealMembers(id);
        vm.expectEmit(address(verification));
        emit IOutputVerification.Credited(_challenger, BOND, BOND);
        verification.tally(id, 1, 0);
        assertEq(verification.creditOf(_challenger), BOND);
        assertEq(registry.creditOf(_challenger), STAKE / 2 / 10, "the reporter's share of the slash");
        assertEq(_stakeOf(1), STAKE / 2);
        _assertRequest(id, RequestStatus.Refunded);
    }

    function test_challenge_ofAStageWithoutVerdict_givesTheBondBack() public {
        RequestId id = _challengeableRequest(_plan, NODES);
        _challenge(id, 0);
        for (uint8 round = 2; round <= 3; round++) {
            _endAttesting(id);
            verification.tallyWithoutQuorum(id, 0);
        }
        assertEq(verification.creditOf(_challenger), BOND);
        _assertRequest(id, RequestStatus.Refunded);
        _assertNobodySlashed();
    }

    function test_challenge_afterThreeRounds_reverts() public {
        RequestId id = _challengeableRequest(_plan, NODES);
        for (uint256 i = 0; i < 2; i++) {
            _challenge(id, 0);
            _honestRound(id);
        }
        vm.deal(_challenger, BOND);
        vm.expectRevert(abi.encodeWithSelector(IOutputVerification.NoRoundLeft.selector, 3));
        vm.prank(_challenger);
        verification.challenge{value: BOND}(id, 0);
        _endChallenge(id);
        verification.settle(id);
        _assertNoDuties();
    }

    function test_challenge_twice_slashesALieOfTheFirstRoundOnce() public {
        RequestId id = _drawnRequest(_plan);
        _attestRound(id, NODES, 4, 0, _moved(_truth(id, 0), 1000));
        _revealAllStages(id);
        _revealMembers(id);
        _tallyAll(id);
        _honestRound(id);
        assertEq(_stakeOf(4), STAKE / 2);
        _challenge(id, 0);
        _honestRound(id);
        assertEq(verification.verificationOf(id).round, 3);
        assertEq(_stakeOf(4), STAKE / 2, "nobody is slashed twice for one attestation");
        _endChallenge(id);
        verification.settle(id);
        _assertNoDuties();
    }

    function test_challenge_silentMemberOfTheBackupRound_isJailedNotSlashed() public {
        RequestId id = _challengeableRequest(_plan, NODES);
        _challenge(id, 0);
        _attestHonestly(id, NODES);
        for (uint256 i = 1; i < NODES; i++) {
            if (i != 4) _revealAttestation(id, 0, _hot(i));
        }
        _endRevealing(id);
        verification.tally(id, 0, 0);
        assertEq(uint8(registry.statusOf(_hot(4))), uint8(NodeStatus.Jailed));
        _assertNobodySlashed();
    }

    function test_challenge_joinsARunningBackupRound() public {
        RequestId id = _challengeableRequest(_plan, NODES);
        _challenge(id, 0);
        vm.deal(_challenger, BOND);
        vm.expectRevert(abi.encodeWithSelector(IOutputVerification.StageNotDisputed.selector, 0));
        vm.prank(_challenger);
        verification.challenge{value: BOND}(id, 0);
        _challenge(id, 1);
        assertEq(verification.verificationOf(id).round, 2);
        assertEq(verification.verificationOf(id).outstanding, 2);
        _honestRound(id);
        _assertPhase(id, Phase.Challengeable);
        _assertVerdict(id, 1, StageVerdict.Accepted);
        _endChallenge(id);
        verification.settle(id);
        _assertNoDuties();
    }

    function test_challenge_joiningTooLate_reverts() public {
        RequestId id = _challengeableRequest(_plan, NODES);
        _challenge(id, 0);
        uint256 last = verification.verificationOf(id).attestDeadline - _verificationTerms().attestWindow / 2;
        vm.warp(last + 1);
        vm.deal(_challenger, BOND);
        vm.expectRevert(abi.encodeWithSelector(IOutputVerification.DeadlinePassed.selector, last, last + 1));
        vm.prank(_challenger);
        verification.challenge{value: BOND}(id, 1);
        vm.warp(last);
        _challenge(id, 1);
    }

    function test_unsampled_withoutChallenge_isPaidWithoutACommittee() public {
        RequestId id = _unsampledRequest(0, 0);
        _endChallenge(id);
        verification.settle(id);
        _assertRequest(id, RequestStatus.Settled);
        assertGt(escrow.creditOf(_operator(0)), 0);
        assertEq(escrow.creditOf(_operator(5)), 0);
        _assertNoDuties();
    }

    function test_unsampled_tallyWithoutQuorum_reverts() public {
        _deployUnsampled();
        RequestId id = _drawnRequest(_unsampledPlan);
        _revealAllStages(id);
        vm.expectRevert(abi.encodeWithSelector(IOutputVerification.StageNotDisputed.selector, 0));
        verification.tallyWithoutQuorum(id, 0);
        vm.expectRevert(abi.encodeWithSelector(IOutputVerification.StageNotDisputed.selector, 2));
        verification.tally(id, 2, 0);
    }

    function test_unsampled_executorThatKeepsItsReveal_isSlashed() public {
        _deployUnsampled();
        RequestId id = _drawnRequest(_unsampledPlan);
        _revealStage(id, 0);
        _endRevealing(id);
        verification.tally(id, 0, 0);
        verification.tally(id, 1, 0);
        assertEq(_stakeOf(1), STAKE - STAKE / 10);
        _assertRequest(id, RequestStatus.Refunded);
    }

    function test_abandon_byOthers_reverts() public {
        RequestId id = _challengeableRequest(_plan, NODES);
        vm.expectRevert(abi.encodeWithSelector(IOutputVerification.NotEscrow.selector, _challenger));
        vm.prank(_challenger);
        verification.abandon(id);
    }

    function test_abandon_withAnOpenChallenge_givesTheBondBackAndClosesDuties() public {
        RequestId id = _challengeableRequest(_plan, NODES);
        _challenge(id, 0);
        _attestHonestly(id, NODES);
        vm.warp(uint256(escrow.requestOf(id).deadline) + 1);
        escrow.claimRefund(id);
        assertEq(verification.creditOf(_challenger), BOND);
        _assertPhase(id, Phase.Final);
        _assertNoDuties();
        uint256 before = _challenger.balance;
        vm.expectEmit(address(verification));
        emit IOutputVerification.CreditWithdrawn(_challenger, BOND);
        verification.withdrawCredit(_challenger);
        assertEq(_challenger.balance, before + BOND);
        vm.expectRevert(abi.encodeWithSelector(IOutputVerification.NoCredit.selector, _challenger));
        verification.withdrawCredit(_challenger);
    }

    function test_withdrawCredit_toARefuser_keepsTheCredit() public {
        Refuser refuser = new Refuser();
        RequestId id = _challengeableRequest(_plan, NODES);
        vm.deal(address(refuser), BOND);
        vm.prank(address(refuser));
        verification.challenge{value: BOND}(id, 0);
        vm.warp(uint256(escrow.requestOf(id).deadline) + 1);
        escrow.claimRefund(id);
        vm.expectRevert(abi.encodeWithSelector(IOutputVerification.TransferFailed.selector, address(refuser), BOND));
        verification.withdrawCredit(address(refuser));
        assertEq(verification.creditOf(address(refuser)), BOND);
    }

    // ------------------------------------------------------------------------------------- a network that never samples

    PlanId private _unsampledPlan;
    bool private _never;

    function _verificationTerms() internal view override returns (VerificationTerms memory terms) {
        terms = super._verificationTerms();
        if (_never) terms.samplingRateBps = 0;
    }

    /// @dev Deploys a second network in which nothing is sampled, and makes it the one the tests act on.
    function _deployUnsampled() private {
        _never = true;
        _deployNetwork();
        _addNodes(0, NODES);
        _unsampledPlan = _newPlan(2);
    }

    function _unsampledRequest(uint16 stage, uint256 distance) private returns (RequestId id) {
        _deployUnsampled();
        id = _newRequest(_unsampledPlan);
        for (uint16 i = 0; i < 2; i++) {
            _commitStage(id, i, i == stage ? _moved(_truth(id, i), distance) : _truth(id, i));
        }
        _draw(id);
        assertFalse(verification.verificationOf(id).sampled);
        _assertPhase(id, Phase.Revealing);
        _revealAllStages(id);
        _tallyAll(id);
        _assertPhase(id, Phase.Challengeable);
    }
}

/// @notice A committee is bounded, whatever the stake.
contract OutputVerificationCommitteeTest is Swarm {
    function _verificationTerms() internal view override returns (VerificationTerms memory terms) {
        terms = super._verificationTerms();
        terms.committeeSeats = 1000;
    }

    function test_commitAttestations_theSeventeenthMember_reverts() public {
        _deployNetwork();
        _addNodes(0, 19);
        RequestId id = _drawnRequest(_newPlan(2));
        for (uint256 i = 2; i < 18; i++) {
            _attest(id, 0, _hot(i), _truth(id, 0));
        }
        uint16[] memory stages = new uint16[](1);
        bytes32[] memory commitments = new bytes32[](1);
        commitments[0] = "c";
        vm.expectRevert(abi.encodeWithSelector(IOutputVerification.CommitteeFull.selector, 0, 16));
        vm.prank(_hot(18));
        verification.commitAttestations(id, stages, commitments);
    }
}

/// @notice Numbers under which the protocol would be unsafe are refused at deployment.
contract OutputVerificationDeploymentTest is Swarm {
    function setUp() public {
        _deployNetwork();
    }

    function _expectRefused(VerificationTerms memory terms, bytes memory reason) private {
        bytes memory arguments = abi.encode(registry, escrow, terms);
        vm.expectRevert(reason);
        this.create("OutputVerification", arguments);
    }

    function _window(uint256 minimum, uint256 actual) private pure returns (bytes memory) {
        return abi.encodeWithSelector(IOutputVerification.WindowOutOfRange.selector, minimum, actual);
    }

    function _share(uint256 maximum, uint256 actual) private pure returns (bytes memory) {
        return abi.encodeWithSelector(IOutputVerification.ShareOutOfRange.selector, maximum, actual);
    }

    function test_constructor_zeroWindows_revert() public {
        VerificationTerms memory terms = _verificationTerms();
        terms.secretWindow = 0;
        _expectRefused(terms, _window(1, 0));
        terms = _verificationTerms();
        terms.attestWindow = 0;
        _expectRefused(terms, _window(1, 0));
        terms = _verificationTerms();
        terms.revealWindow = 0;
        _expectRefused(terms, _window(1, 0));
        terms = _verificationTerms();
        terms.challengeWindow = 0;
        _expectRefused(terms, _window(1, 0));
        terms = _verificationTerms();
        terms.jailPeriod = 0;
        _expectRefused(terms, _window(1, 0));
    }

    function test_constructor_sharesOutOfRange_revert() public {
        VerificationTerms memory terms = _verificationTerms();
        terms.samplingRateBps = 10_001;
        _expectRefused(terms, _share(10_000, 10_001));
        terms = _verificationTerms();
        terms.incorrectSlashBps = 10_001;
        _expectRefused(terms, _share(10_000, 10_001));
        terms = _verificationTerms();
        terms.withholdSlashBps = 10_001;
        _expectRefused(terms, _share(10_000, 10_001));
        terms = _verificationTerms();
        terms.memberShareBps = 4001;
        _expectRefused(terms, _share(5000, 5001));
        terms = _verificationTerms();
        terms.tolerance = 1025;
        _expectRefused(terms, _share(1024, 1025));
        terms = _verificationTerms();
        terms.committeeSeats = 0;
        _expectRefused(terms, _share(type(uint16).max, 0));
        terms = _verificationTerms();
        terms.minimumReveals = 0;
        _expectRefused(terms, _share(16, 0));
        terms.minimumReveals = 17;
        _expectRefused(terms, _share(16, 17));
    }

    /// STAKE-03: no stake may be able to leave before the last dispute it is bonded for.
    function test_STAKE_03_constructor_disputeLongerThanTheWindows_reverts() public {
        VerificationTerms memory terms = _verificationTerms();
        terms.challengeWindow += 1;
        _expectRefused(terms, _window(8163, 8160));
    }

    function test_STAKE_03_constructor_thawShorterThanALife_reverts() public {
        uint256 life = 300 + 600 + 8160;
        uint256 nonce = vm.getNonce(address(this));
        address escrowAt = vm.computeCreateAddress(address(this), nonce + 1);
        address verificationAt = vm.computeCreateAddress(address(this), nonce + 2);
        bytes memory arguments = abi.encode(escrowAt, verificationAt, tabs, uint128(1 ether), uint64(100), uint64(life));
        address shortRegistry = _create("NodeRegistry", arguments);
        _create("InferenceEscrow", abi.encode(shortRegistry, shards, verificationAt, tabs, treasury, _escrowTerms()));
        arguments = abi.encode(shortRegistry, escrowAt, _verificationTerms());
        vm.expectRevert(_window(life + 1, life));
        this.create("OutputVerification", arguments);
    }

    function test_constructor_wiredToContractsOfAnotherNetwork_reverts() public {
        bytes memory arguments = abi.encode(registry, escrow, _verificationTerms());
        address next = vm.computeCreateAddress(address(this), vm.getNonce(address(this)));
        vm.expectRevert(
            abi.encodeWithSelector(IOutputVerification.WiringMismatch.selector, next, address(verification))
        );
        this.create("OutputVerification", arguments);
    }

    function test_terms_areThoseOfTheDeployment() public view {
        assertEq(abi.encode(verification.terms()), abi.encode(_verificationTerms()));
        assertEq(address(verification.registry()), address(registry));
        assertEq(address(verification.escrow()), address(escrow));
    }
}

/// @notice The metric of the sketches, against the definition.
contract SketchDistanceTest is Swarm {
    function setUp() public {
        _deployNetwork();
    }

    function _naive(bytes32 a, bytes32 b) private pure returns (uint256 sum) {
        for (uint256 i = 0; i < 32; i++) {
            uint256 x = uint8(a[i]);
            uint256 y = uint8(b[i]);
            uint256 d = x > y ? x - y : y - x;
            sum += d < 256 - d ? d : 256 - d;
        }
    }

    function testFuzz_sketchDistance_equalsTheDefinition(bytes32 a, bytes32 b) public view {
        assertEq(verification.sketchDistance(a, b), _naive(a, b));
    }

    function testFuzz_sketchDistance_isAMetric(bytes32 a, bytes32 b, bytes32 c) public view {
        uint256 ab = verification.sketchDistance(a, b);
        assertEq(verification.sketchDistance(a, a), 0);
        assertEq(ab, verification.sketchDistance(b, a));
        assertEq(ab == 0, a == b);
        assertLe(verification.sketchDistance(a, c), ab + verification.sketchDistance(b, c));
        assertLe(ab, 4096);
    }

    /// Every pair of values of one coordinate, in the first and in the last lane.
    function test_sketchDistance_everyPairOfBytes_equalsTheDefinition() public view {
        for (uint256 x = 0; x < 256; x++) {
            for (uint256 y = x % 5; y < 256; y += 5) {
                bytes32 a = bytes32((x << 248) | x);
                bytes32 b = bytes32((y << 248) | y);
                uint256 d = x > y ? x - y : y - x;
                assertEq(verification.sketchDistance(a, b), 2 * (d < 256 - d ? d : 256 - d));
            }
        }
    }

    function testFuzz_moveSketch_movesExactlyThatFar(bytes32 sketch, uint256 distance) public view {
        distance = bound(distance, 0, 4096);
        assertEq(verification.sketchDistance(sketch, _moveSketch(sketch, distance)), distance);
    }
}
