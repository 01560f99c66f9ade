// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

import {IInferenceEscrow} from "../../contracts/interfaces/IInferenceEscrow.sol";
import {HandOver} from "../../contracts/interfaces/IOutputVerification.sol";
import {BatchStatus, IRequestTabs, Opening, Share, TreeStep} from "../../contracts/interfaces/IRequestTabs.sol";
import {Assignment} from "../../contracts/types/Assignment.sol";
import {BatchId, RequestId} from "../../contracts/types/Identifiers.sol";
import {TabTerms} from "../../contracts/types/Terms.sol";
import {RequestTabsScenario} from "./RequestTabs.t.sol";

/// @notice TAB-01: a voucher is collected once, by its collector, on its chain; a ticket is paid once.
contract TabReplayAttackTest is RequestTabsScenario {
    function test_TAB_01_voucherOfAnEarlierBatch_isWorthNothing() public {
        Draft memory first = _draftOf(_plan, 0, 2);
        _fundTab(0, 1 ether);
        _post(first);
        Draft memory second = _draftOf(_plan, 0, 2);
        second.batch.segments[0].cumulative = first.batch.segments[0].cumulative;
        second.batch.segments[0].secretHash = first.batch.segments[0].secretHash;
        _signDraft(second);
        uint256 charge = _potOf(first.batch);
        _expectNotPosted(
            second, abi.encodeWithSelector(IRequestTabs.VoucherTooSmall.selector, _payer(0), 2 * charge, charge)
        );
    }

    /// The second segment of one requester in one batch has to begin where the first ends.
    function test_TAB_01_voucherTwiceInOneBatch_reverts() public {
        uint256[] memory payers = new uint256[](2);
        Draft memory draft = _draft(_plan, payers, 2);
        _fundTab(0, 1 ether);
        _expectNotPosted(draft, abi.encodeWithSelector(IRequestTabs.TicketOutOfOrder.selector, _payer(0), 2, 0));
        draft.batch.segments[1].firstTicket = 2;
        _signDraft(draft);
        uint256 charge = draft.batch.segments[0].cumulative;
        _expectNotPosted(
            draft, abi.encodeWithSelector(IRequestTabs.VoucherTooSmall.selector, _payer(0), 2 * charge, charge)
        );
    }

    function test_TAB_01_voucherOnAnotherChainOrContract_isRefused() public {
        Draft memory draft = _draftOf(_plan, 0, 2);
        _fundTab(0, 1 ether);
        vm.chainId(block.chainid + 1);
        _expectNotPosted(draft, _signatureInvalid(_payer(0)));
        vm.chainId(block.chainid - 1);
        _post(draft);
    }

    /// Void batches are no second try at the draw: their vouchers and tickets are used up.
    function test_TAB_01_voidBatch_cannotBePostedAgain() public {
        Draft memory draft = _draftOf(_plan, 0, 2);
        BatchId id = _postFunded(draft);
        _endOpening(draft);
        tabs.voidBatch(draft.batch);
        draft.batch.deadline = uint64(block.timestamp);
        _signDraft(draft);
        _expectNotPosted(draft, abi.encodeWithSelector(IRequestTabs.TicketOutOfOrder.selector, _payer(0), 2, 0));
        draft.batch.segments[0].firstTicket = 2;
        _signDraft(draft);
        uint256 charge = _potOf(draft.batch);
        _expectNotPosted(
            draft, abi.encodeWithSelector(IRequestTabs.VoucherTooSmall.selector, _payer(0), 2 * charge, charge)
        );
        assertEq(uint8(tabs.batchOf(id).status), uint8(BatchStatus.Void));
    }

    /// One honest leaf in the place of two: the copy stands where the ticket of another number must stand.
    function test_TAB_01_ticketTwiceInOneBatch_cannotBeOpened() public {
        Draft memory draft = _draftOf(_plan, 0, 2);
        draft.leaves[1] = draft.leaves[0];
        _complete(draft, _plan);
        _postFunded(draft);
        _drawBatch(draft);
        _expectNotOpened(draft, 1, _pathOf(draft, 1), abi.encodeWithSelector(IRequestTabs.LeafMisplaced.selector, 0, 1));
    }

    function test_TAB_01_ticketInALaterBatch_cannotBeOpened() public {
        Draft memory first = _draftOf(_plan, 0, 2);
        _postFunded(first);
        Draft memory second = _draftOf(_plan, 0, 2);
        second.leaves[1] = first.leaves[1];
        _complete(second, _plan);
        _postFunded(second);
        _drawBatch(second);
        _expectNotOpened(
            second, 1, _pathOf(second, 1), abi.encodeWithSelector(IRequestTabs.TicketNotInBatch.selector, 1)
        );
        _endFirstHalf(second);
        vm.deal(address(this), BOND);
        vm.expectRevert(abi.encodeWithSelector(IRequestTabs.TicketNotInBatch.selector, 1));
        tabs.challengeLeaf{value: BOND}(second.batch, second.leaves[1], new TreeStep[](0));
    }

    /// The same input asked for in the escrow is another request, with another id.
    function test_TAB_01_requestOpenedAlone_isAnother() public {
        Draft memory draft = _drawn(_two(), 2);
        uint256 index = _drawnLeaf(draft);
        Opening memory leaf = draft.leaves[index];
        vm.deal(leaf.ticket.requester, 1 ether);
        vm.prank(leaf.ticket.requester);
        RequestId alone = escrow.open{value: 1 ether}(
            _plan,
            leaf.ticket.number,
            leaf.ticket.inputCommitment,
            leaf.ticket.secretHash,
            PROMPT_TOKENS,
            MAXIMUM_TOKENS
        );
        assertTrue(RequestId.unwrap(alone) != RequestId.unwrap(_idOf(leaf)));
        _openLeaf(draft, index);
    }
}

/// @notice TAB-02: a leaf stands for what its ticket and its nodes signed, at one place, with one weight.
contract TabTreeAttackTest is RequestTabsScenario {
    function _posted(Draft memory draft) private {
        _signDraft(draft);
        _postFunded(draft);
        _drawBatch(draft);
    }

    /// A leaf that weighs less than its request, to be drawn less often.
    function test_TAB_02_leafOfAnotherWeight_cannotBeOpened() public {
        Draft memory draft = _draftOf(_plan, 0, 4);
        Sum[] memory sums = _sumsOf(draft);
        sums[1].tokens = 1;
        draft.batch.root = _rootOfSums(sums).hash;
        draft.batch.segments[0].tokens -= LEAF_TOKENS - 1;
        draft.batch.shares = _sharesOf(draft.leaves[0].route, _executorsPart(_potOf(draft.batch)));
        _posted(draft);
        TreeStep[] memory path = _pathOfSums(sums, 1);
        bytes32 shown = _parent(_parent(sums[0], _leafSum(draft.leaves[1])), _parent(sums[2], sums[3])).hash;
        vm.expectRevert(abi.encodeWithSelector(IRequestTabs.ProofInvalid.selector, draft.batch.root, shown));
        tabs.openLeaf(draft.batch, draft.leaves[1], path);
    }

    /// More tokens than the nodes signed for.
    function test_TAB_02_leafOfMoreTokens_isNotSigned() public {
        Draft memory draft = _draftOf(_plan, 0, 4);
        draft.leaves[2].outputTokens += 1;
        _complete(draft, _plan);
        _posted(draft);
        _expectNotOpened(draft, 2, _pathOf(draft, 2), _signatureInvalid(_hot(0)));
    }

    /// Inner sums that overlap: the left half is said to be smaller than it is.
    function test_TAB_02_forgedInnerSum_cannotBeOpened() public {
        Draft memory draft = _draftOf(_plan, 0, 4);
        Sum[] memory sums = _sumsOf(draft);
        Sum memory left = _parent(sums[0], sums[1]);
        Sum memory right = _parent(sums[2], sums[3]);
        left.tokens -= LEAF_TOKENS;
        draft.batch.root = _parent(left, right).hash;
        _posted(draft);
        TreeStep[] memory path = _pathOfSums(sums, 0);
        vm.expectPartialRevert(IRequestTabs.ProofInvalid.selector);
        tabs.openLeaf(draft.batch, draft.leaves[0], path);
        // Through the forged sum the right half can be shown, and it does not add up to the tokens that were paid for.
        path = _pathOfSums(sums, 2);
        path[1].tokens -= LEAF_TOKENS;
        vm.expectRevert(
            abi.encodeWithSelector(IRequestTabs.TokensOutOfRange.selector, 4 * LEAF_TOKENS, 3 * LEAF_TOKENS)
        );
        tabs.openLeaf(draft.batch, draft.leaves[2], path);
    }

    /// Fewer or more leaves in the tree than tickets in the batch.
    function test_TAB_02_treeOfMoreLeaves_cannotBeOpened() public {
        Draft memory draft = _draftOf(_plan, 0, 4);
        draft.batch.segments[0].tickets = 5;
        _posted(draft);
        _expectNotOpened(
            draft, 1, _pathOf(draft, 1), abi.encodeWithSelector(IRequestTabs.CountOutOfRange.selector, 5, 4)
        );
    }

    /// The line between two requesters moved, so that one pays for a request of the other.
    function test_TAB_02_movedBoundary_cannotBeOpened() public {
        Draft memory draft = _draft(_plan, _two(), 2);
        draft.batch.segments[0].tokens += 1;
        draft.batch.segments[0].cumulative += uint96(FEE);
        draft.batch.segments[1].tokens -= 1;
        _posted(draft);
        _expectNotOpened(draft, 2, _pathOf(draft, 2), abi.encodeWithSelector(IRequestTabs.LeafMisplaced.selector, 2, 2));
    }

    function test_TAB_02_leavesOutOfOrder_cannotBeOpened() public {
        Draft memory draft = _draftOf(_plan, 0, 4);
        (draft.leaves[1], draft.leaves[2]) = (draft.leaves[2], draft.leaves[1]);
        _complete(draft, _plan);
        _posted(draft);
        _expectNotOpened(draft, 1, _pathOf(draft, 1), abi.encodeWithSelector(IRequestTabs.LeafMisplaced.selector, 2, 1));
    }

    /// An inner node shown as a leaf, or a leaf as an inner node, has another hash: 192 bytes against 32.
    function test_TAB_02_shortenedPath_cannotBeOpened() public {
        Draft memory draft = _drawn(_two(), 2);
        uint256 index = _drawnLeaf(draft);
        TreeStep[] memory path = _pathOf(draft, index);
        assembly ("memory-safe") {
            mstore(path, 1)
        }
        vm.expectPartialRevert(IRequestTabs.ProofInvalid.selector);
        tabs.openLeaf(draft.batch, draft.leaves[index], path);
    }

    function test_TAB_02_signatureForAnotherStageOrRequest_isRefused() public {
        Draft memory draft = _drawn(_two(), 4);
        uint256 index = _drawnLeaf(draft);
        TreeStep[] memory path = _pathOf(draft, index);
        Opening memory leaf = draft.leaves[index];
        bytes memory good = leaf.signatures[1];
        leaf.signatures[1] = draft.leaves[_otherLeaf(draft)].signatures[1];
        _expectNotOpened(draft, index, path, _signatureInvalid(_hot(1)));
        leaf.signatures[1] = _sign(1, _stageResultDigest(_idOf(leaf), 2, leaf.commitments[1], leaf.outputTokens));
        _expectNotOpened(draft, index, path, _signatureInvalid(_hot(1)));
        leaf.signatures[1] = _malleated(good);
        _expectNotOpened(draft, index, path, _signatureInvalid(_hot(1)));
        leaf.signatures[1] = good;
        leaf.commitments[1] = "another";
        _expectNotOpened(draft, index, path, _signatureInvalid(_hot(1)));
    }

    /// A node outside the plan served a stage.
    function test_TAB_02_routeOutsideThePlan_cannotBeOpened() public {
        Draft memory draft = _draftOf(_plan, 0, 1);
        draft.leaves[0].route[1].node = _hot(5);
        _signStages(draft.leaves[0]);
        _complete(draft, _plan);
        _posted(draft);
        _expectNotOpened(
            draft, 0, _pathOf(draft, 0), abi.encodeWithSelector(IInferenceEscrow.NotAssigned.selector, 1, _hot(5))
        );
    }

    /// A collector that keeps a node out of the shares cannot show the node's work.
    function test_TAB_02_nodeWithoutShare_cannotBeOpened() public {
        Draft memory draft = _draftOf(_plan, 0, 1);
        draft.batch.shares[1].node = _hot(6);
        _posted(draft);
        _expectNotOpened(
            draft, 0, _pathOf(draft, 0), abi.encodeWithSelector(IRequestTabs.NodeWithoutShare.selector, _hot(1))
        );
    }
}

/// @notice What requesters and challengers can do to a batch, and what they cannot.
contract TabChallengeAttackTest is RequestTabsScenario {
    /// The collector puts nothing where a served request should stand. Its requester brings it all the same.
    function test_challengeLeaf_ofARequestThatWasLeftOut_opensIt() public {
        Draft memory draft = _draftOf(_plan, 0, 3);
        Opening memory leftOut = draft.leaves[1];
        Sum[] memory sums = _sumsOf(draft);
        sums[1] = Sum(0, 0, 1);
        draft.batch.root = _rootOfSums(sums).hash;
        draft.batch.segments[0].tokens -= LEAF_TOKENS;
        draft.batch.shares = _sharesOf(leftOut.route, _executorsPart(_potOf(draft.batch)));
        _signDraft(draft);
        _postFunded(draft);
        _drawBatch(draft);
        _challengeOwn(draft, leftOut);
        assertEq(escrow.requestOf(_idOf(leftOut)).deposit, uint256(LEAF_TOKENS) * FEE);
    }

    /// Whoever opens more than its segment was charged for takes nobody else's money, and cannot keep a drawn leaf from being opened.
    function test_challengeLeaf_beyondTheSegmentsCharge_takesNoMore() public {
        Draft memory draft = _draft(_plan, _two(), 2);
        uint256 charge = uint256(LEAF_TOKENS) * FEE;
        Sum[] memory sums = _sumsOf(draft);
        sums[0] = Sum(0, 0, 1);
        draft.batch.root = _rootOfSums(sums).hash;
        draft.batch.segments[0].tokens = LEAF_TOKENS;
        draft.batch.shares = _sharesOf(draft.leaves[0].route, _executorsPart(3 * charge));
        _signDraft(draft);
        _fundTab(0, 1 ether);
        _fundTab(1, 1 ether);
        _post(draft);
        _drawBatch(draft);
        _challengeOwn(draft, draft.leaves[0]);
        _challengeOwn(draft, draft.leaves[1]);
        BatchId id = tabs.batchIdOf(draft.batch);
        assertEq(tabs.takenOf(id, 0), charge);
        assertEq(tabs.takenOf(id, 1), 0);
        assertEq(escrow.requestOf(_idOf(draft.leaves[1])).deposit, 0);
        assertTrue(verification.verificationOf(_idOf(draft.leaves[1])).sampled);
        // With a deposit of nothing it is judged, and settled, all the same.
        _verifyOpened(_idOf(draft.leaves[1]), NODES);
        _assertBalanced(2, 2 * charge, 2 * BOND);
        tabs.resolveChallenge(_idOf(draft.leaves[1]));
        _assertBalanced(2, 2 * charge, BOND);
    }

    /// Who cheated in a drawn leaf cannot open the request with commitments made afterwards; not even with the requester's help does
    /// that serve the draw.
    function test_challengeLeaf_withAnotherVersionOfADrawnLeaf_servesNothing() public {
        Draft memory draft = _drawn(_two(), 2);
        uint256 index = _drawnLeaf(draft);
        TreeStep[] memory path = _pathOf(draft, index);
        bytes32 inTree = _leafSum(draft.leaves[index]).hash;
        Opening memory other = draft.leaves[index];
        bytes32 commitment = other.commitments[1];
        other.commitments[1] = "made afterwards";
        _signStages(other);
        bytes32 shown = _leafSum(other).hash;
        _endFirstHalf(draft);
        vm.deal(address(this), BOND);
        vm.expectPartialRevert(IRequestTabs.ProofInvalid.selector);
        tabs.challengeLeaf{value: BOND}(draft.batch, other, path);
        _challengeOwn(draft, other);
        other.commitments[1] = commitment;
        _signStages(other);
        _expectNotOpened(draft, index, path, abi.encodeWithSelector(IRequestTabs.LeafMismatch.selector, shown, inTree));
        _endOpening(draft);
        tabs.voidBatch(draft.batch);
    }

    /// EQUIV-01 holds for requests of tabs from the first hand-over on, opened or not.
    function test_EQUIV_01_onARequestThatIsOnlyATicket_slashes() public {
        Draft memory draft = _draftOf(_plan, 0, 2);
        RequestId id = _idOf(draft.leaves[0]);
        HandOver memory first = HandOver(id, 0, true, 4, "a");
        HandOver memory second = HandOver(id, 0, true, 4, "b");
        verification.reportEquivocation(first, _signHandOver(0, first), second, _signHandOver(0, second), _hot(0));
        assertEq(registry.accountOf(_hot(0)).staked, 0);
        // The batch can be posted and settled: what the others earned does not hang on the buried node.
        _openedBatch(draft);
        tabs.settle(draft.batch);
        _assertBatch(draft, BatchStatus.Settled);
    }

    /// Nobody can be kept from leaving, or paid, twice: a batch ends once.
    function test_settle_andVoid_endABatchOnce() public {
        Draft memory draft = _draftOf(_plan, 0, 2);
        BatchId id = _openedBatch(draft);
        tabs.settle(draft.batch);
        vm.expectRevert(
            abi.encodeWithSelector(IRequestTabs.WrongBatchStatus.selector, id, BatchStatus.Drawn, BatchStatus.Settled)
        );
        tabs.settle(draft.batch);
        // Another batch under another digest does not pass for it.
        draft.batch.shares[0].amount += 1;
        BatchId other = tabs.batchIdOf(draft.batch);
        vm.expectRevert(
            abi.encodeWithSelector(IRequestTabs.WrongBatchStatus.selector, other, BatchStatus.Drawn, BatchStatus.Absent)
        );
        tabs.settle(draft.batch);
    }
}

/// @notice Where a batch has more draws than leaves.
contract TabManyDrawsTest is RequestTabsScenario {
    function _tabTerms() internal view override returns (TabTerms memory terms) {
        terms = super._tabTerms();
        terms.tokensPerDraw = 4;
    }

    function test_openLeaf_servesEveryDrawThatItCovers() public {
        Draft memory draft = _draftOf(_plan, 0, 2);
        _postFunded(draft);
        _drawBatch(draft);
        assertEq(_stateOf(draft).offsets.length, 10, "38 tokens at 4 a draw");
        uint32 inFirst;
        for (uint256 i = 0; i < 10; i++) {
            if (_stateOf(draft).offsets[i] < LEAF_TOKENS) inFirst |= uint32(1 << i);
        }
        assertTrue(inFirst != 0 && inFirst != 1023);
        _openLeaf(draft, 0);
        assertEq(_stateOf(draft).pending, 1023 & ~inFirst);
        _openLeaf(draft, 1);
        assertEq(_stateOf(draft).pending, 0);
        // Everything went into the escrow: there is nothing left to share out.
        _endOpening(draft);
        tabs.settle(draft.batch);
        assertEq(address(tabs).balance, tabs.creditOf(publisher), "the collector's bond");
    }

    /// MONEY-03: the largest batch that can be posted can be drawn, settled and voided in one transaction each.
    function test_MONEY_03_batchOfAsManyDrawsAsThereCanBe_canBeDrawn() public {
        Draft memory draft = _draftOf(_plan, 0, 6);
        draft.leaves[5] = _short(draft.leaves[5]);
        _complete(draft, _plan);
        assertLe(draft.batch.segments[0].tokens, 128);
        _postFunded(draft);
        _drawBatch(draft);
        assertEq(_stateOf(draft).offsets.length, (uint256(draft.batch.segments[0].tokens) + 3) / 4);
    }

    function _short(Opening memory leaf) private view returns (Opening memory) {
        leaf.outputTokens = 1;
        _signStages(leaf);
        return leaf;
    }
}

/// @notice Shares are for nodes, in any number, also twice for one.
contract TabSharesTest is RequestTabsScenario {
    function test_settle_withANodeTwice_paysBoth() public {
        Draft memory draft = _draftOf(_plan, 0, 2);
        Share[] memory shares = new Share[](4);
        for (uint256 i = 0; i < 3; i++) {
            shares[i] = draft.batch.shares[i];
        }
        shares[3] = Share(shares[0].node, shares[2].amount);
        shares[2].amount = 0;
        draft.batch.shares = shares;
        _signDraft(draft);
        _openedBatch(draft);
        assertEq(_duties(0), 3, "twice for the batch, once for the opened request");
        tabs.settle(draft.batch);
        assertEq(_duties(0), 1);
        assertEq(tabs.creditOf(_operator(2)), 0);
        _assertBalanced(1, 0, 0);
    }

    /// A route of replicas that are no first ones, with a plan that has two.
    function test_openLeaf_overTheSecondReplicas_needsTheirSharesOnly() public {
        Assignment[] memory two = new Assignment[](4);
        for (uint16 i = 0; i < 4; i++) {
            two[i] = Assignment(i / 2, i % 2, 2 * (i / 2), 2 * (i / 2) + 2, _hot(i), 100 + i / 2, EXECUTION_CLASS);
        }
        _plan = _publish(_newModel(4), FEE, two);
        vm.warp(block.timestamp + shards.planActivationDelay());
        uint16[] memory replicas = new uint16[](2);
        (replicas[0], replicas[1]) = (1, 1);
        Draft memory draft = _draftOf(_plan, 0, 1);
        draft.leaves[0] = _served(_ticket(_plan, 0, 0), 0, 0, replicas);
        _complete(draft, _plan);
        _openedBatch(draft);
        assertEq(_executorOf(_idOf(draft.leaves[0]), 1), _hot(3));
        tabs.settle(draft.batch);
    }
}
