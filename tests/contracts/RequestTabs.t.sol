// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

import {IInferenceEscrow, Request, RequestStatus} from "../../contracts/interfaces/IInferenceEscrow.sol";
import {INodeRegistry, NodeStatus} from "../../contracts/interfaces/INodeRegistry.sol";
import {IOutputVerification, Phase, Verification} from "../../contracts/interfaces/IOutputVerification.sol";
import {
    BatchState,
    BatchStatus,
    IRequestTabs,
    Opening,
    Segment,
    Share,
    Tab,
    TreeStep
} from "../../contracts/interfaces/IRequestTabs.sol";
import {Assignment} from "../../contracts/types/Assignment.sol";
import {BatchId, PlanId, RequestId} from "../../contracts/types/Identifiers.sol";
import {TabTerms} from "../../contracts/types/Terms.sol";
import {ForcedMoney, Reenterer, Refuser} from "./Recipients.sol";
import {TabSwarm} from "./TabSwarm.sol";

/// @dev Specification: RequestTabs.tree. A plan of three stages on the nodes 0, 1, 2; seven nodes.
abstract contract RequestTabsScenario is TabSwarm {
    uint256 internal constant NODES = 7;
    uint256 internal constant STAGES = 3;
    PlanId internal _plan;
    address internal _challenger = makeAddr("challenger");

    function setUp() public virtual {
        _deployNetwork();
        _addNodes(0, NODES);
        _plan = _newPlan(STAGES);
    }

    function _two() internal pure returns (uint256[] memory payers) {
        payers = new uint256[](2);
        payers[1] = 1;
    }

    function _three() internal pure returns (uint256[] memory payers) {
        payers = new uint256[](3);
        (payers[1], payers[2]) = (1, 2);
    }

    function _expectNotPosted(Draft memory draft, bytes memory reason) internal {
        vm.expectRevert(reason);
        _post(draft);
    }

    function _signatureInvalid(address signer) internal pure returns (bytes memory) {
        return abi.encodeWithSelector(IRequestTabs.SignatureInvalid.selector, signer);
    }

    /// @dev A batch of `each` requests of every payer, drawn.
    function _drawn(uint256[] memory payers, uint256 each) internal returns (Draft memory draft) {
        draft = _draft(_plan, payers, each);
        _postFunded(draft);
        _drawBatch(draft);
    }

    function _drawnLeaf(Draft memory draft) internal view returns (uint256) {
        return _leafAt(draft, _stateOf(draft).offsets[0]);
    }

    function _otherLeaf(Draft memory draft) internal view returns (uint256) {
        return (_drawnLeaf(draft) + 1) % draft.leaves.length;
    }

    function _expectNotOpened(Draft memory draft, uint256 index, TreeStep[] memory path, bytes memory reason) internal {
        vm.expectRevert(reason);
        tabs.openLeaf(draft.batch, draft.leaves[index], path);
    }

    /// @dev In time for a challenge: the drawn leaves had theirs.
    function _endFirstHalf(Draft memory draft) internal {
        uint256 half = uint256(_stateOf(draft).deadline) - tabs.terms().openingWindow / 2;
        if (block.timestamp <= half) vm.warp(half + 1);
    }

    function _challengeLeaf(Draft memory draft, uint256 index) internal returns (address challenger) {
        challenger = _challenger;
        TreeStep[] memory path = _pathOf(draft, index);
        _endFirstHalf(draft);
        vm.deal(challenger, challenger.balance + BOND);
        vm.prank(challenger);
        tabs.challengeLeaf{value: BOND}(draft.batch, draft.leaves[index], path);
    }

    /// @dev By its requester, who has no proof.
    function _challengeOwn(Draft memory draft, Opening memory leaf) internal {
        _endFirstHalf(draft);
        vm.deal(leaf.ticket.requester, BOND);
        vm.prank(leaf.ticket.requester);
        tabs.challengeLeaf{value: BOND}(draft.batch, leaf, new TreeStep[](0));
    }

    function _duties(uint256 i) internal view returns (uint256) {
        return registry.accountOf(_hot(i)).openDuties;
    }

    /// MONEY-04 with the given payers and one unfinished batch at most.
    function _assertBalanced(uint256 payers, uint256 pot, uint256 bonds) internal view {
        uint256 owed = pot + bonds + tabs.creditOf(publisher) + tabs.creditOf(treasury) + tabs.creditOf(_challenger);
        if (pot != 0) owed += uint256(_tabTerms().tokensPerDraw) * FEE; // the collector's
        for (uint256 i = 0; i < payers; i++) {
            owed += _tabBalance(i);
        }
        for (uint256 i = 0; i < NODES; i++) {
            owed += tabs.creditOf(_operator(i));
        }
        assertEq(address(tabs).balance, owed, "MONEY-04");
    }
}

contract RequestTabsAccountTest is RequestTabsScenario {
    function test_fund_addsToTheTab() public {
        vm.deal(requester, 3 ether);
        vm.expectEmit(address(tabs));
        emit IRequestTabs.TabFunded(requester, publisher, 1 ether, 1 ether);
        vm.startPrank(requester);
        tabs.fund{value: 1 ether}(publisher);
        vm.expectEmit(address(tabs));
        emit IRequestTabs.TabFunded(requester, publisher, 2 ether, 3 ether);
        tabs.fund{value: 2 ether}(publisher);
        vm.expectRevert(IRequestTabs.ZeroAmount.selector);
        tabs.fund(publisher);
        vm.stopPrank();
        assertEq(tabs.tabOf(requester, publisher).balance, 3 ether);
        assertEq(tabs.tabOf(requester, treasury).balance, 0, "a tab is with one collector");
    }

    function test_withdrawTab_afterTheClosing_paysTheRequester() public {
        _fundTab(0, 1 ether);
        uint256 closesAt = block.timestamp + tabs.terms().closePeriod;
        vm.startPrank(_payer(0));
        vm.expectRevert(abi.encodeWithSelector(IRequestTabs.TabNotClosing.selector, _payer(0), publisher));
        tabs.withdrawTab(publisher);
        vm.expectEmit(address(tabs));
        emit IRequestTabs.TabClosing(_payer(0), publisher, closesAt);
        tabs.beginClose(publisher);
        vm.warp(closesAt - 1);
        vm.expectRevert(abi.encodeWithSelector(IRequestTabs.TabStillOpen.selector, closesAt, closesAt - 1));
        tabs.withdrawTab(publisher);
        vm.warp(closesAt);
        vm.expectEmit(address(tabs));
        emit IRequestTabs.TabWithdrawn(_payer(0), publisher, 1 ether);
        tabs.withdrawTab(publisher);
        assertEq(_payer(0).balance, 1 ether);
        vm.expectRevert(IRequestTabs.ZeroAmount.selector);
        tabs.withdrawTab(publisher);
        vm.stopPrank();
    }

    function test_fund_endsAClosing() public {
        _fundTab(0, 1 ether);
        vm.prank(_payer(0));
        tabs.beginClose(publisher);
        _fundTab(0, 1 ether);
        assertEq(tabs.tabOf(_payer(0), publisher).closesAt, 0);
        vm.warp(block.timestamp + 365 days);
        vm.expectRevert(abi.encodeWithSelector(IRequestTabs.TabNotClosing.selector, _payer(0), publisher));
        vm.prank(_payer(0));
        tabs.withdrawTab(publisher);
    }

    function test_post_onAClosingTab_stillCollects() public {
        Draft memory draft = _draftOf(_plan, 0, 2);
        _fundTab(0, 1 ether);
        vm.prank(_payer(0));
        tabs.beginClose(publisher);
        vm.warp(block.timestamp + tabs.terms().closePeriod - 1);
        _post(draft);
        assertEq(_tabBalance(0), 1 ether - _potOf(draft.batch));
    }

    /// What comes back from a void batch is not stuck behind a tab that was emptied meanwhile.
    function test_withdrawTab_afterAVoidBatch_givesTheRest() public {
        Draft memory draft = _draftOf(_plan, 0, 2);
        _fundTab(0, 1 ether);
        vm.prank(_payer(0));
        tabs.beginClose(publisher);
        vm.warp(block.timestamp + tabs.terms().closePeriod - 1);
        _post(draft);
        vm.warp(block.timestamp + 1);
        vm.prank(_payer(0));
        tabs.withdrawTab(publisher);
        vm.warp(block.timestamp + tabs.terms().drawWindow);
        tabs.voidBatch(draft.batch);
        vm.prank(_payer(0));
        tabs.withdrawTab(publisher);
        assertEq(_payer(0).balance, 1 ether);
        assertEq(address(tabs).balance, 0);
    }

    function test_withdrawTab_toARefuser_keepsTheTab() public {
        address refuser = address(new Refuser());
        vm.deal(refuser, 1 ether);
        vm.startPrank(refuser);
        tabs.fund{value: 1 ether}(publisher);
        tabs.beginClose(publisher);
        vm.warp(block.timestamp + tabs.terms().closePeriod);
        vm.expectRevert(abi.encodeWithSelector(IRequestTabs.TransferFailed.selector, refuser, 1 ether));
        tabs.withdrawTab(publisher);
        vm.stopPrank();
        assertEq(tabs.tabOf(refuser, publisher).balance, 1 ether);
    }

    function test_withdrawTab_reentered_paysOnce() public {
        Reenterer reenterer = new Reenterer();
        _fundTab(0, 5 ether);
        vm.deal(address(reenterer), 1 ether);
        reenterer.perform(address(tabs), abi.encodeCall(IRequestTabs.fund, (publisher)), 1 ether);
        reenterer.perform(address(tabs), abi.encodeCall(IRequestTabs.beginClose, (publisher)), 0);
        vm.warp(block.timestamp + tabs.terms().closePeriod);
        bytes memory withdraw = abi.encodeCall(IRequestTabs.withdrawTab, (publisher));
        reenterer.arm(address(tabs), withdraw);
        reenterer.perform(address(tabs), withdraw, 0);
        assertEq(reenterer.attempts(), 1);
        assertEq(reenterer.successes(), 0);
        assertEq(address(reenterer).balance, 1 ether);
        assertEq(address(tabs).balance, 5 ether);
    }
}

contract RequestTabsPostTest is RequestTabsScenario {
    function test_post_ofTwoRequesters_chargesEachAndOpensDuties() public {
        Draft memory draft = _draft(_plan, _two(), 3);
        _fundTab(0, 1 ether);
        _fundTab(1, 2 ether);
        uint256 charge = 3 * uint256(LEAF_TOKENS) * FEE;
        BatchId id = tabs.batchIdOf(draft.batch);
        TabTerms memory terms = tabs.terms();
        vm.expectEmit(address(tabs));
        emit IRequestTabs.BatchPosted(
            id,
            publisher,
            _plan,
            draft.batch,
            uint64(block.number) + 1,
            uint64(block.timestamp) + terms.secretWindow,
            uint64(block.timestamp) + terms.drawWindow
        );
        vm.expectEmit(address(tabs));
        emit IRequestTabs.TabCharged(id, _payer(0), publisher, charge, 1 ether - charge);
        vm.expectEmit(address(tabs));
        emit IRequestTabs.TabCharged(id, _payer(1), publisher, charge, 2 ether - charge);
        assertEq(BatchId.unwrap(_post(draft)), BatchId.unwrap(id));

        BatchState memory state = tabs.batchOf(id);
        assertEq(uint8(state.status), uint8(BatchStatus.Posted));
        assertEq(state.entropyBlock, block.number + 1);
        assertEq(state.postedAt, block.timestamp);
        assertEq(state.secretDeadline, block.timestamp + terms.secretWindow);
        assertEq(state.deadline, block.timestamp + terms.drawWindow);
        assertEq(state.offsets.length, 0);
        Tab memory tab = tabs.tabOf(_payer(1), publisher);
        assertEq(tab.collected, charge);
        assertEq(tab.tickets, 3);
        for (uint256 i = 0; i < STAGES; i++) {
            assertEq(_duties(i), 1);
        }
        _assertBalanced(2, 2 * charge, 0);
    }

    /// The digests by the letter of EIP-712.
    function test_batchIdOf_requestIdOf_leafOf_areThoseOfTheSpecification() public {
        Draft memory draft = _draft(_plan, _two(), 2);
        bytes32[] memory segments = new bytes32[](2);
        bytes32 segmentType = keccak256(
            "Segment(address requester,uint64 firstTicket,uint32 tickets,uint32 tokens,uint96 cumulative,bytes32 secretHash)"
        );
        for (uint256 i = 0; i < 2; i++) {
            Segment memory s = draft.batch.segments[i];
            segments[i] = keccak256(
                abi.encode(segmentType, s.requester, s.firstTicket, s.tickets, s.tokens, s.cumulative, s.secretHash)
            );
        }
        bytes32[] memory shares = new bytes32[](STAGES);
        for (uint256 i = 0; i < STAGES; i++) {
            Share memory s = draft.batch.shares[i];
            shares[i] = keccak256(abi.encode(keccak256("Share(address node,uint96 amount)"), s.node, s.amount));
        }
        bytes32 structHash = keccak256(
            abi.encode(
                keccak256(
                    "Batch(bytes32 planId,address collector,uint128 feePerToken,bytes32 root,uint64 deadline,Segment[] segments,Share[] shares)Segment(address requester,uint64 firstTicket,uint32 tickets,uint32 tokens,uint96 cumulative,bytes32 secretHash)Share(address node,uint96 amount)"
                ),
                draft.batch.planId,
                draft.batch.collector,
                draft.batch.feePerToken,
                draft.batch.root,
                draft.batch.deadline,
                keccak256(abi.encodePacked(segments)),
                keccak256(abi.encodePacked(shares))
            )
        );
        assertEq(BatchId.unwrap(tabs.batchIdOf(draft.batch)), _tabsDigest(structHash));
        _assertTicketDigest(draft.leaves[1]);
        assertEq(
            tabs.leafOf(RequestId.wrap("id"), "e", 7),
            keccak256(bytes.concat(keccak256(abi.encode(bytes32("id"), bytes32("e"), uint32(7)))))
        );
    }

    function _assertTicketDigest(Opening memory leaf) private view {
        bytes32 structHash = keccak256(
            abi.encode(
                keccak256(
                    "Ticket(bytes32 planId,address requester,uint64 number,bytes32 inputCommitment,bytes32 secretHash,uint32 promptTokens,uint32 maximumTokens,uint64 deadline)"
                ),
                leaf.ticket.planId,
                leaf.ticket.requester,
                leaf.ticket.number,
                leaf.ticket.inputCommitment,
                leaf.ticket.secretHash,
                leaf.ticket.promptTokens,
                leaf.ticket.maximumTokens,
                leaf.ticket.deadline
            )
        );
        assertEq(RequestId.unwrap(_idOf(leaf)), _tabsDigest(structHash));
    }

    /// A voucher may say more than the batch needs: the rest is given up, and the next voucher must add to it.
    function test_post_withAVoucherOverMore_takesTheChargeOnly() public {
        Draft memory draft = _draftOf(_plan, 0, 2);
        draft.batch.segments[0].cumulative += 7 gwei;
        _signDraft(draft);
        _fundTab(0, 1 ether);
        _post(draft);
        assertEq(_tabBalance(0), 1 ether - _potOf(draft.batch));
        assertEq(tabs.tabOf(_payer(0), publisher).collected, _potOf(draft.batch) + 7 gwei);
    }

    function test_post_byAnother_reverts() public {
        Draft memory draft = _draftOf(_plan, 0, 1);
        _fundTab(0, 1 ether);
        vm.expectRevert(abi.encodeWithSelector(IRequestTabs.NotCollector.selector, publisher, address(this)));
        tabs.post(draft.batch, draft.vouchers, draft.consents);
        draft.batch.collector = address(this);
        _signDraft(draft);
        _expectNotPosted(draft, abi.encodeWithSelector(IRequestTabs.NotCollector.selector, address(this), publisher));
    }

    function test_post_atAnotherFee_reverts() public {
        Draft memory draft = _draftOf(_plan, 0, 1);
        draft.batch.feePerToken = FEE + 1;
        _signDraft(draft);
        _expectNotPosted(draft, abi.encodeWithSelector(IRequestTabs.FeeMismatch.selector, FEE, FEE + 1));
    }

    function test_post_withAnotherBond_reverts() public {
        Draft memory draft = _draftOf(_plan, 0, 1);
        uint256 bond = _bondOf(draft.batch);
        assertEq(bond, uint256(tabs.terms().tokensPerDraw) * FEE);
        vm.deal(publisher, bond);
        vm.expectRevert(abi.encodeWithSelector(IRequestTabs.BondMismatch.selector, bond, bond - 1));
        vm.prank(publisher);
        tabs.post{value: bond - 1}(draft.batch, draft.vouchers, draft.consents);
    }

    function test_post_late_reverts() public {
        Draft memory draft = _draftOf(_plan, 0, 1);
        _fundTab(0, 1 ether);
        vm.warp(uint256(draft.batch.deadline) + 1);
        _expectNotPosted(
            draft, abi.encodeWithSelector(IRequestTabs.DeadlinePassed.selector, draft.batch.deadline, block.timestamp)
        );
        vm.warp(draft.batch.deadline);
        _post(draft);
    }

    function test_post_twice_reverts() public {
        Draft memory draft = _draftOf(_plan, 0, 1);
        _fundTab(0, 1 ether);
        BatchId id = _post(draft);
        _expectNotPosted(draft, abi.encodeWithSelector(IRequestTabs.BatchAlreadyPosted.selector, id));
    }

    function test_post_withoutSegmentsOrShares_reverts() public {
        Draft memory draft = _draftOf(_plan, 0, 1);
        Segment[] memory segments = draft.batch.segments;
        draft.batch.segments = new Segment[](0);
        _expectNotPosted(draft, abi.encodeWithSelector(IRequestTabs.CountOutOfRange.selector, 128, 0));
        draft.batch.segments = new Segment[](129);
        _expectNotPosted(draft, abi.encodeWithSelector(IRequestTabs.CountOutOfRange.selector, 128, 129));
        draft.batch.segments = segments;
        draft.batch.shares = new Share[](0);
        _expectNotPosted(draft, abi.encodeWithSelector(IRequestTabs.CountOutOfRange.selector, 64, 0));
        draft.batch.shares = new Share[](65);
        _expectNotPosted(draft, abi.encodeWithSelector(IRequestTabs.CountOutOfRange.selector, 64, 65));
    }

    function test_post_withoutAllSignatures_reverts() public {
        Draft memory draft = _draftOf(_plan, 0, 1);
        bytes[] memory vouchers = draft.vouchers;
        draft.vouchers = new bytes[](2);
        _expectNotPosted(draft, abi.encodeWithSelector(IRequestTabs.LengthMismatch.selector, 1, 2));
        draft.vouchers = vouchers;
        draft.consents = new bytes[](2);
        _expectNotPosted(draft, abi.encodeWithSelector(IRequestTabs.LengthMismatch.selector, 3, 2));
    }

    function test_post_segmentWithoutTicketsOrTokens_reverts() public {
        Draft memory draft = _draftOf(_plan, 0, 1);
        draft.batch.segments[0].tickets = 0;
        _signDraft(draft);
        _expectNotPosted(draft, abi.encodeWithSelector(IRequestTabs.CountOutOfRange.selector, type(uint32).max, 0));
        draft.batch.segments[0].tickets = 1;
        draft.batch.segments[0].tokens = 0;
        _signDraft(draft);
        _expectNotPosted(draft, abi.encodeWithSelector(IRequestTabs.TokensOutOfRange.selector, type(uint32).max, 0));
    }

    function test_post_overMoreTokensThanDraws_reverts() public {
        Draft memory draft = _draftOf(_plan, 0, 1);
        uint32 tokens = 32 * tabs.terms().tokensPerDraw + 1;
        draft.batch.segments[0].tokens = tokens;
        draft.batch.segments[0].cumulative = uint96(uint256(tokens) * FEE);
        _signDraft(draft);
        _fundTab(0, 1 ether);
        _expectNotPosted(draft, abi.encodeWithSelector(IRequestTabs.TokensOutOfRange.selector, tokens - 1, tokens));
    }

    function test_post_beyondTheTab_reverts() public {
        Draft memory draft = _draftOf(_plan, 0, 1);
        uint256 charge = uint256(LEAF_TOKENS) * FEE;
        _fundTab(0, charge - 1);
        _expectNotPosted(
            draft, abi.encodeWithSelector(IRequestTabs.TabTooSmall.selector, _payer(0), charge, charge - 1)
        );
        _fundTab(0, 1);
        _post(draft);
    }

    function test_post_beyondTheVoucher_reverts() public {
        Draft memory draft = _draftOf(_plan, 0, 1);
        uint256 charge = uint256(LEAF_TOKENS) * FEE;
        draft.batch.segments[0].cumulative -= 1;
        _signDraft(draft);
        _fundTab(0, 1 ether);
        _expectNotPosted(
            draft, abi.encodeWithSelector(IRequestTabs.VoucherTooSmall.selector, _payer(0), charge, charge - 1)
        );
    }

    function test_post_ticketsOutOfOrder_reverts() public {
        Draft memory draft = _draftOf(_plan, 0, 1);
        draft.batch.segments[0].firstTicket = 1;
        _signDraft(draft);
        _fundTab(0, 1 ether);
        _expectNotPosted(draft, abi.encodeWithSelector(IRequestTabs.TicketOutOfOrder.selector, _payer(0), 0, 1));
    }

    function test_post_withAVoucherThatSaysAnythingElse_reverts() public {
        Draft memory draft = _draftOf(_plan, 0, 1);
        _fundTab(0, 1 ether);
        Segment memory segment = draft.batch.segments[0];
        bytes memory good = draft.vouchers[0];
        // Another collector, another sum, another secret, another signer, another form.
        draft.vouchers[0] = _signAs(0, _voucherDigest(_payer(0), treasury, segment.cumulative, segment.secretHash));
        _expectNotPosted(draft, _signatureInvalid(_payer(0)));
        draft.vouchers[0] = _signAs(0, _voucherDigest(_payer(0), publisher, segment.cumulative - 1, segment.secretHash));
        _expectNotPosted(draft, _signatureInvalid(_payer(0)));
        draft.vouchers[0] = _signAs(0, _voucherDigest(_payer(0), publisher, segment.cumulative, "another"));
        _expectNotPosted(draft, _signatureInvalid(_payer(0)));
        draft.vouchers[0] = _signAs(1, _voucherDigest(_payer(0), publisher, segment.cumulative, segment.secretHash));
        _expectNotPosted(draft, _signatureInvalid(_payer(0)));
        draft.vouchers[0] = _malleated(good);
        _expectNotPosted(draft, _signatureInvalid(_payer(0)));
        draft.vouchers[0] = good;
        _post(draft);
    }

    function test_post_withoutANodesSignature_reverts() public {
        Draft memory draft = _draftOf(_plan, 0, 1);
        _fundTab(0, 1 ether);
        bytes memory good = draft.consents[1];
        draft.consents[1] = draft.consents[0];
        _expectNotPosted(draft, _signatureInvalid(_hot(1)));
        draft.consents[1] = new bytes(65);
        _expectNotPosted(draft, _signatureInvalid(_hot(1)));
        // A share that its node did not sign.
        draft.consents[1] = good;
        draft.batch.shares[0].amount += 1;
        draft.batch.shares[1].amount -= 1;
        _expectNotPosted(draft, _signatureInvalid(_hot(0)));
    }

    function test_post_sharesThatDoNotAddUp_revert() public {
        Draft memory draft = _draftOf(_plan, 0, 1);
        _fundTab(0, 1 ether);
        uint256 part = _executorsPart(_potOf(draft.batch));
        draft.batch.shares[2].amount += 1;
        _signDraft(draft);
        _expectNotPosted(draft, abi.encodeWithSelector(IRequestTabs.SharesMismatch.selector, part, part + 1));
    }

    /// Signed for its work, a node that has begun to leave is still paid for it, and stays until it is final.
    function test_STAKE_03_post_withAnExitingNode_holdsItsStake() public {
        Draft memory draft = _draftOf(_plan, 0, 2);
        vm.prank(_operator(0));
        registry.beginExit(_hot(0));
        vm.warp(block.timestamp + 1);
        _postFunded(draft);
        uint256 thawEnd = registry.accountOf(_hot(0)).thawEnd;
        vm.warp(thawEnd);
        vm.expectRevert(abi.encodeWithSelector(INodeRegistry.DutiesOpen.selector, _hot(0), 1));
        vm.prank(_operator(0));
        registry.withdraw(_hot(0));
        tabs.voidBatch(draft.batch);
        vm.prank(_operator(0));
        registry.withdraw(_hot(0));
    }

    function test_post_withANodeThatIsGone_reverts() public {
        Draft memory draft = _draftOf(_plan, 0, 2);
        _fundTab(0, 1 ether);
        vm.prank(_operator(0));
        registry.beginExit(_hot(0));
        vm.warp(registry.accountOf(_hot(0)).thawEnd);
        vm.prank(_operator(0));
        registry.withdraw(_hot(0));
        draft.batch.deadline = uint64(block.timestamp);
        _signDraft(draft);
        _expectNotPosted(draft, abi.encodeWithSelector(INodeRegistry.WrongStatus.selector, _hot(0), NodeStatus.Absent));
    }
}

contract RequestTabsDrawTest is RequestTabsScenario {
    function test_draw_withAllSecrets_isTheRuleOfTheSpecification() public {
        Draft memory draft = _draft(_plan, _three(), 30);
        BatchId id = _postFunded(draft);
        _passEntropy(draft);
        bytes32 entropy = blockhash(_stateOf(draft).entropyBlock);
        uint32[] memory expected = _offsets(draft, entropy, draft.secrets);
        assertEq(expected.length, 2, "1710 tokens at 1024 a draw");
        vm.expectEmit(address(tabs));
        emit IRequestTabs.BatchDrawn(id, entropy, expected, uint64(block.timestamp) + tabs.terms().openingWindow);
        tabs.draw(draft.batch, draft.secrets);
        BatchState memory state = tabs.batchOf(id);
        assertEq(uint8(state.status), uint8(BatchStatus.Drawn));
        assertEq(state.pending, 3);
        assertEq(state.deadline, block.timestamp + tabs.terms().openingWindow);
        assertEq(abi.encode(state.offsets), abi.encode(expected));
    }

    /// @dev By the letter of the NatSpec.
    function _offsets(Draft memory draft, bytes32 entropy, bytes32[] memory secrets)
        private
        view
        returns (uint32[] memory offsets)
    {
        uint256 perSegment = draft.batch.segments[0].tokens;
        uint256 tokens = perSegment * draft.batch.segments.length;
        uint256 tokensPerDraw = tabs.terms().tokensPerDraw;
        BatchId id = tabs.batchIdOf(draft.batch);
        offsets = new uint32[]((tokens + tokensPerDraw - 1) / tokensPerDraw);
        for (uint256 i = 0; i < offsets.length; i++) {
            uint256 segment = uint256(keccak256(abi.encode(entropy, id, i))) % tokens / perSegment;
            uint256 inside = uint256(keccak256(abi.encode(entropy, id, i, secrets[segment]))) % perSegment;
            offsets[i] = uint32(segment * perSegment + inside);
        }
    }

    function test_draw_beforeTheEntropy_reverts() public {
        Draft memory draft = _draftOf(_plan, 0, 2);
        _postFunded(draft);
        uint256 entropyBlock = block.number + 1;
        vm.expectRevert(abi.encodeWithSelector(IRequestTabs.EntropyNotReady.selector, entropyBlock, entropyBlock - 1));
        tabs.draw(draft.batch, draft.secrets);
        vm.roll(entropyBlock);
        vm.expectRevert(abi.encodeWithSelector(IRequestTabs.EntropyNotReady.selector, entropyBlock, entropyBlock));
        tabs.draw(draft.batch, draft.secrets);
    }

    function test_draw_withoutASecret_waitsForTheDeadline() public {
        Draft memory draft = _draft(_plan, _three(), 30);
        _postFunded(draft);
        _passEntropy(draft);
        uint256 secretDeadline = _stateOf(draft).secretDeadline;
        bytes32[] memory given = new bytes32[](3);
        given[0] = draft.secrets[0];
        vm.warp(secretDeadline);
        vm.expectRevert(abi.encodeWithSelector(IRequestTabs.DeadlineNotPassed.selector, secretDeadline, secretDeadline));
        tabs.draw(draft.batch, given);
        given[1] = "wrong";
        vm.expectRevert(
            abi.encodeWithSelector(
                IRequestTabs.SecretMismatch.selector,
                draft.batch.segments[1].secretHash,
                keccak256(abi.encode(bytes32("wrong")))
            )
        );
        tabs.draw(draft.batch, given);
        vm.expectRevert(abi.encodeWithSelector(IRequestTabs.LengthMismatch.selector, 3, 2));
        tabs.draw(draft.batch, new bytes32[](2));
        vm.warp(secretDeadline + 1);
        bytes32 entropy = blockhash(_stateOf(draft).entropyBlock);
        tabs.draw(draft.batch, new bytes32[](3));
        assertEq(abi.encode(_stateOf(draft).offsets), abi.encode(_offsets(draft, entropy, new bytes32[](3))));
    }

    /// Whoever was given the secrets cannot choose which of them count: those on record do, the others do not.
    function test_draw_late_countsTheSecretsOnRecordAndNoOthers() public {
        Draft memory draft = _draft(_plan, _three(), 30);
        BatchId id = _postFunded(draft);
        vm.expectEmit(address(tabs));
        emit IRequestTabs.SecretRecorded(id, 1, draft.secrets[1]);
        tabs.recordSecret(draft.batch, 1, draft.secrets[1]);
        _passEntropy(draft);
        vm.warp(uint256(_stateOf(draft).secretDeadline) + 1);
        bytes32 entropy = blockhash(_stateOf(draft).entropyBlock);
        tabs.draw(draft.batch, draft.secrets);
        bytes32[] memory counted = new bytes32[](3);
        counted[1] = draft.secrets[1];
        assertEq(abi.encode(_stateOf(draft).offsets), abi.encode(_offsets(draft, entropy, counted)));
    }

    /// A requester that shows its secret or not chooses among two draws of its own segment, and of no other.
    function test_TAB_03_draw_withoutASecret_movesNothingOutsideItsSegment() public {
        Draft memory draft = _draft(_plan, _three(), 100);
        _postFunded(draft);
        tabs.recordSecret(draft.batch, 0, draft.secrets[0]);
        tabs.recordSecret(draft.batch, 2, draft.secrets[2]);
        uint256 state = vm.snapshotState();
        _drawBatch(draft);
        uint32[] memory shown = _stateOf(draft).offsets;
        vm.revertToState(state);
        vm.warp(uint256(_stateOf(draft).secretDeadline) + 1);
        _drawBatch(draft);
        uint32[] memory withheld = _stateOf(draft).offsets;
        uint32 tokens = draft.batch.segments[0].tokens;
        assertEq(shown.length, 6, "5700 tokens at 1024 a draw");
        for (uint256 i = 0; i < shown.length; i++) {
            assertEq(shown[i] / tokens, withheld[i] / tokens, "the segment of a draw");
            if (shown[i] / tokens != 1) assertEq(shown[i], withheld[i], "the token of a draw");
        }
    }

    function test_draw_withARecordedSecret_needsItNoMore() public {
        Draft memory draft = _draft(_plan, _three(), 30);
        _postFunded(draft);
        tabs.recordSecret(draft.batch, 1, draft.secrets[1]);
        _passEntropy(draft);
        bytes32 entropy = blockhash(_stateOf(draft).entropyBlock);
        bytes32[] memory given = new bytes32[](3);
        (given[0], given[2]) = (draft.secrets[0], draft.secrets[2]);
        tabs.draw(draft.batch, given);
        assertEq(abi.encode(_stateOf(draft).offsets), abi.encode(_offsets(draft, entropy, draft.secrets)));
    }

    function test_recordSecret_wrongOrLateOrUnknown_reverts() public {
        Draft memory draft = _draftOf(_plan, 0, 2);
        _postFunded(draft);
        vm.expectRevert(
            abi.encodeWithSelector(
                IRequestTabs.SecretMismatch.selector,
                draft.batch.segments[0].secretHash,
                keccak256(abi.encode(bytes32("wrong")))
            )
        );
        tabs.recordSecret(draft.batch, 0, "wrong");
        vm.expectRevert(abi.encodeWithSelector(IRequestTabs.CountOutOfRange.selector, 1, 1));
        tabs.recordSecret(draft.batch, 1, draft.secrets[0]);
        uint256 secretDeadline = _stateOf(draft).secretDeadline;
        vm.warp(secretDeadline + 1);
        vm.expectRevert(
            abi.encodeWithSelector(IRequestTabs.DeadlinePassed.selector, secretDeadline, secretDeadline + 1)
        );
        tabs.recordSecret(draft.batch, 0, draft.secrets[0]);
    }

    /// The hash of a block can be read for 256 blocks.
    function test_draw_afterTheHashLapsed_renewsTheEntropyAndEndsTheWait() public {
        Draft memory draft = _draftOf(_plan, 0, 2);
        BatchId id = _postFunded(draft);
        vm.roll(uint256(_stateOf(draft).entropyBlock) + 257);
        uint64 renewed = uint64(block.number) + 1;
        vm.expectEmit(address(tabs));
        emit IRequestTabs.EntropyRenewed(id, renewed);
        tabs.draw(draft.batch, new bytes32[](1));
        assertEq(_stateOf(draft).entropyBlock, renewed);
        assertEq(_stateOf(draft).secretDeadline, 0);
        _assertBatch(draft, BatchStatus.Posted);
        vm.roll(renewed + 1);
        tabs.draw(draft.batch, new bytes32[](1));
        _assertBatch(draft, BatchStatus.Drawn);
    }

    function test_draw_late_reverts_andTheBatchIsVoid() public {
        Draft memory draft = _draftOf(_plan, 0, 2);
        BatchId id = _postFunded(draft);
        _passEntropy(draft);
        uint256 deadline = _stateOf(draft).deadline;
        vm.warp(deadline);
        vm.expectRevert(abi.encodeWithSelector(IRequestTabs.DeadlineNotPassed.selector, deadline, deadline));
        tabs.voidBatch(draft.batch);
        vm.warp(deadline + 1);
        vm.expectRevert(abi.encodeWithSelector(IRequestTabs.DeadlinePassed.selector, deadline, deadline + 1));
        tabs.draw(draft.batch, draft.secrets);
        uint256 pot = _potOf(draft.batch);
        vm.expectEmit(address(tabs));
        emit IRequestTabs.TabRestored(id, _payer(0), publisher, pot, pot);
        vm.expectEmit(address(tabs));
        emit IRequestTabs.BatchVoided(id, pot, 0, _bondOf(draft.batch));
        tabs.voidBatch(draft.batch);
        assertEq(address(0xdEaD).balance, _bondOf(draft.batch), "the collector's bond is burned");
        _assertBatch(draft, BatchStatus.Void);
        assertEq(_duties(0), 0);
        _assertBalanced(1, 0, 0);
    }

    function test_calls_inTheWrongStatus_revert() public {
        Draft memory draft = _draftOf(_plan, 0, 2);
        BatchId id = tabs.batchIdOf(draft.batch);
        TreeStep[] memory path = _pathOf(draft, 0);
        _expectWrongStatuses(draft, path, id, BatchStatus.Absent);
        _openedBatch(draft);
        vm.expectRevert(
            abi.encodeWithSelector(IRequestTabs.WrongBatchStatus.selector, id, BatchStatus.Posted, BatchStatus.Drawn)
        );
        tabs.draw(draft.batch, draft.secrets);
        tabs.settle(draft.batch);
        _expectWrongStatuses(draft, path, id, BatchStatus.Settled);
    }

    function _expectWrongStatuses(Draft memory draft, TreeStep[] memory path, BatchId id, BatchStatus actual) private {
        bytes memory notPosted =
            abi.encodeWithSelector(IRequestTabs.WrongBatchStatus.selector, id, BatchStatus.Posted, actual);
        bytes memory notDrawn =
            abi.encodeWithSelector(IRequestTabs.WrongBatchStatus.selector, id, BatchStatus.Drawn, actual);
        vm.expectRevert(notPosted);
        tabs.draw(draft.batch, draft.secrets);
        vm.expectRevert(notPosted);
        tabs.recordSecret(draft.batch, 0, draft.secrets[0]);
        vm.expectRevert(notDrawn);
        tabs.openLeaf(draft.batch, draft.leaves[0], path);
        vm.deal(address(this), BOND);
        vm.expectRevert(notDrawn);
        tabs.challengeLeaf{value: BOND}(draft.batch, draft.leaves[0], path);
        vm.expectRevert(notDrawn);
        tabs.settle(draft.batch);
        vm.expectRevert(notDrawn);
        tabs.voidBatch(draft.batch);
    }
}

contract RequestTabsOpeningTest is RequestTabsScenario {
    function test_openLeaf_makesACommittedRequestThatACommitteeJudges() public {
        Draft memory draft = _drawn(_two(), 4);
        uint256 index = _drawnLeaf(draft);
        Opening memory leaf = draft.leaves[index];
        RequestId id = _idOf(leaf);
        uint256 charge = uint256(LEAF_TOKENS) * FEE;
        TreeStep[] memory path = _pathOf(draft, index);
        BatchId batchId = tabs.batchIdOf(draft.batch);
        vm.expectEmit(address(tabs));
        emit IRequestTabs.LeafOpened(batchId, id, index * LEAF_TOKENS, 0);
        vm.expectEmit(address(tabs));
        emit IRequestTabs.RequestTaken(batchId, id, leaf.segment, charge, charge);
        _expectRequestOpened(leaf, id, charge);
        tabs.openLeaf(draft.batch, leaf, path);

        Request memory request = escrow.requestOf(id);
        assertEq(uint8(request.status), uint8(RequestStatus.Committed));
        assertEq(request.requester, leaf.ticket.requester);
        assertEq(request.deposit, charge);
        assertEq(request.stageCount, STAGES);
        assertEq(request.maximumTokens, MAXIMUM_TOKENS);
        assertEq(request.deadline, block.timestamp + escrow.terms().verificationWindow);
        Verification memory state = verification.verificationOf(id);
        assertTrue(state.sampled);
        assertEq(uint8(state.phase), uint8(Phase.AwaitingDraw));
        for (uint16 i = 0; i < STAGES; i++) {
            assertEq(verification.stageRecordOf(id, i).commitment, leaf.commitments[i]);
            assertEq(_duties(i), 2, "for the batch and for the request");
        }
        assertEq(_stateOf(draft).taken, charge);
        assertEq(tabs.takenOf(batchId, leaf.segment), charge);
        _assertBalanced(2, 7 * charge, 0);

        _verifyOpened(id, NODES);
        _assertRequest(id, RequestStatus.Settled);
        assertEq(escrow.creditOf(leaf.ticket.requester), 0, "all tokens were charged");
    }

    function _expectRequestOpened(Opening memory leaf, RequestId id, uint256 charge) private {
        vm.expectEmit(address(escrow));
        emit IInferenceEscrow.RequestOpened(
            id,
            leaf.ticket.requester,
            _plan,
            charge,
            FEE,
            PROMPT_TOKENS,
            MAXIMUM_TOKENS,
            INPUT_COMMITMENT,
            leaf.ticket.secretHash,
            uint64(block.timestamp) + escrow.terms().routeWindow
        );
        vm.expectEmit(address(verification));
        emit IOutputVerification.StageCommitted(id, 0, leaf.route[0].node, leaf.commitments[0]);
    }

    /// A committee sits on an opened leaf whatever the sampling rate is.
    function test_openLeaf_ofACheat_slashesItAndRefunds() public {
        Draft memory draft = _draftOf(_plan, 0, 2);
        // The node of stage 1 commits to something far from the truth, in both.
        for (uint256 i = 0; i < 2; i++) {
            RequestId cheated = _idOf(draft.leaves[i]);
            draft.leaves[i].commitments[1] = _seal(cheated, 0, 1, _hot(1), _moved(_truth(cheated, 1), 1000));
            _signStages(draft.leaves[i]);
        }
        _complete(draft, _plan);
        _postFunded(draft);
        _drawBatch(draft);
        RequestId id = _idOf(draft.leaves[_openDrawn(draft)]);
        _draw(id);
        for (uint256 round = 1; round <= 2; round++) {
            _attestHonestly(id, NODES);
            if (round == 1) _endAttesting(id);
            if (round == 1) _revealAllStages(id);
            _revealMembers(id);
            _tallyAll(id);
        }
        _assertRequest(id, RequestStatus.Refunded);
        assertEq(registry.accountOf(_hot(1)).staked, STAKE / 2);
        assertEq(escrow.creditOf(_payer(0)), uint256(LEAF_TOKENS) * FEE);
    }

    function test_openLeaf_twice_isNotDrawnAnyMore() public {
        Draft memory draft = _drawn(_two(), 4);
        uint256 index = _drawnLeaf(draft);
        _openLeaf(draft, index);
        uint256 first = index * LEAF_TOKENS;
        _expectNotOpened(
            draft,
            index,
            _pathOf(draft, index),
            abi.encodeWithSelector(IRequestTabs.LeafNotDrawn.selector, first, first + LEAF_TOKENS)
        );
    }

    function test_openLeaf_notDrawn_reverts() public {
        Draft memory draft = _drawn(_two(), 4);
        uint256 index = _otherLeaf(draft);
        uint256 first = index * LEAF_TOKENS;
        _expectNotOpened(
            draft,
            index,
            _pathOf(draft, index),
            abi.encodeWithSelector(IRequestTabs.LeafNotDrawn.selector, first, first + LEAF_TOKENS)
        );
    }

    function test_openLeaf_late_reverts() public {
        Draft memory draft = _drawn(_two(), 4);
        uint256 index = _drawnLeaf(draft);
        uint256 deadline = _stateOf(draft).deadline;
        TreeStep[] memory path = _pathOf(draft, index);
        vm.warp(deadline + 1);
        _expectNotOpened(
            draft, index, path, abi.encodeWithSelector(IRequestTabs.DeadlinePassed.selector, deadline, deadline + 1)
        );
        vm.deal(address(this), BOND);
        vm.expectRevert(abi.encodeWithSelector(IRequestTabs.DeadlinePassed.selector, deadline, deadline + 1));
        tabs.challengeLeaf{value: BOND}(draft.batch, draft.leaves[index], path);
        vm.warp(deadline);
        tabs.openLeaf(draft.batch, draft.leaves[index], path);
    }

    function test_openLeaf_whichWasChallenged_onlyServesTheDraw() public {
        Draft memory draft = _drawn(_two(), 4);
        uint256 index = _drawnLeaf(draft);
        _challengeLeaf(draft, index);
        uint256 taken = _stateOf(draft).taken;
        _openLeaf(draft, index);
        assertEq(_stateOf(draft).taken, taken);
        assertEq(_stateOf(draft).pending, 0);
    }

    function test_openLeaf_withAChangedTicket_reverts() public {
        Draft memory draft = _drawn(_two(), 4);
        uint256 index = _drawnLeaf(draft);
        Opening memory leaf = draft.leaves[index];
        TreeStep[] memory path = _pathOf(draft, index);
        leaf.ticket.planId = PlanId.wrap("another");
        _expectNotOpened(
            draft,
            index,
            path,
            abi.encodeWithSelector(IRequestTabs.PlanMismatch.selector, _plan, PlanId.wrap("another"))
        );
        leaf.ticket.planId = _plan;
        leaf.ticket.number += 4;
        _expectNotOpened(
            draft, index, path, abi.encodeWithSelector(IRequestTabs.TicketNotInBatch.selector, leaf.ticket.number)
        );
        leaf.ticket.number -= 4;
        leaf.segment = 1 - leaf.segment;
        _expectNotOpened(
            draft, index, path, abi.encodeWithSelector(IRequestTabs.TicketNotInBatch.selector, leaf.ticket.number)
        );
        leaf.segment = 2;
        _expectNotOpened(draft, index, path, abi.encodeWithSelector(IRequestTabs.CountOutOfRange.selector, 2, 2));
        leaf.segment = index / 4;
        leaf.ticket.inputCommitment = "another";
        _expectNotOpened(draft, index, path, _signatureInvalid(leaf.ticket.requester));
    }

    function test_openLeaf_withTokensOutOfRange_reverts() public {
        Draft memory draft = _drawn(_two(), 4);
        uint256 index = _drawnLeaf(draft);
        TreeStep[] memory path = _pathOf(draft, index);
        draft.leaves[index].outputTokens = 0;
        _expectNotOpened(
            draft, index, path, abi.encodeWithSelector(IRequestTabs.TokensOutOfRange.selector, MAXIMUM_TOKENS, 0)
        );
        draft.leaves[index].outputTokens = MAXIMUM_TOKENS + 1;
        _expectNotOpened(
            draft,
            index,
            path,
            abi.encodeWithSelector(IRequestTabs.TokensOutOfRange.selector, MAXIMUM_TOKENS, MAXIMUM_TOKENS + 1)
        );
    }

    function test_openLeaf_ofATicketPostedTooLate_reverts() public {
        Draft memory draft = _draftOf(_plan, 0, 1);
        uint64 deadline = uint64(block.timestamp) + 9;
        draft.leaves[0].ticket.deadline = deadline;
        draft.leaves[0] = _served(draft.leaves[0].ticket, 0, 0, new uint16[](STAGES));
        _complete(draft, _plan);
        vm.warp(deadline + 1);
        _postFunded(draft);
        _drawBatch(draft);
        _expectNotOpened(
            draft,
            0,
            _pathOf(draft, 0),
            abi.encodeWithSelector(IRequestTabs.TicketExpired.selector, deadline, deadline + 1)
        );
    }

    function test_openLeaf_withoutAllStages_reverts() public {
        Draft memory draft = _drawn(_two(), 4);
        uint256 index = _drawnLeaf(draft);
        TreeStep[] memory path = _pathOf(draft, index);
        Opening memory leaf = draft.leaves[index];
        bytes32[] memory commitments = leaf.commitments;
        leaf.commitments = new bytes32[](2);
        _expectNotOpened(draft, index, path, abi.encodeWithSelector(IRequestTabs.LengthMismatch.selector, 3, 2));
        leaf.commitments = commitments;
        leaf.signatures = new bytes[](4);
        _expectNotOpened(draft, index, path, abi.encodeWithSelector(IRequestTabs.LengthMismatch.selector, 3, 4));
    }

    /// A leaf that leaves a stage out of its route can be in the tree, but it cannot be opened.
    function test_openLeaf_ofAShortRoute_reverts() public {
        Draft memory draft = _draftOf(_plan, 0, 1);
        Opening memory leaf = draft.leaves[0];
        Assignment[] memory route = new Assignment[](2);
        bytes32[] memory commitments = new bytes32[](2);
        bytes[] memory signatures = new bytes[](2);
        for (uint256 i = 0; i < 2; i++) {
            (route[i], commitments[i], signatures[i]) = (leaf.route[i], leaf.commitments[i], leaf.signatures[i]);
        }
        (leaf.route, leaf.commitments, leaf.signatures) = (route, commitments, signatures);
        _complete(draft, _plan);
        _postFunded(draft);
        _drawBatch(draft);
        _expectNotOpened(
            draft, 0, _pathOf(draft, 0), abi.encodeWithSelector(IInferenceEscrow.RouteIncomplete.selector, STAGES, 2)
        );
    }
}

contract RequestTabsChallengeTest is RequestTabsScenario {
    function test_challengeLeaf_withItsProof_opensIt() public {
        Draft memory draft = _drawn(_two(), 4);
        uint256 index = _otherLeaf(draft);
        RequestId id = _idOf(draft.leaves[index]);
        TreeStep[] memory path = _pathOf(draft, index);
        _endFirstHalf(draft);
        vm.deal(_challenger, 2 * BOND);
        vm.startPrank(_challenger);
        vm.expectRevert(abi.encodeWithSelector(IRequestTabs.BondMismatch.selector, BOND, BOND - 1));
        tabs.challengeLeaf{value: BOND - 1}(draft.batch, draft.leaves[index], path);
        BatchId batchId = tabs.batchIdOf(draft.batch);
        vm.expectEmit(address(tabs));
        emit IRequestTabs.LeafChallenged(batchId, id, _challenger, BOND);
        tabs.challengeLeaf{value: BOND}(draft.batch, draft.leaves[index], path);
        vm.expectRevert(abi.encodeWithSelector(IRequestTabs.AlreadyOpened.selector, id));
        tabs.challengeLeaf{value: BOND}(draft.batch, draft.leaves[index], path);
        vm.stopPrank();
        assertEq(tabs.challengerOf(id), _challenger);
        assertTrue(verification.verificationOf(id).sampled);
        _assertBalanced(2, 7 * uint256(LEAF_TOKENS) * FEE, BOND);
        // The draw is served all the same, and the batch is paid.
        _openDrawn(draft);
        _endOpening(draft);
        tabs.settle(draft.batch);
        _assertBalanced(2, 0, BOND);
    }

    /// Drawn leaves first: until they are open, or half of the window is over, nothing else is.
    function test_challengeLeaf_beforeTheDrawnLeaves_waits() public {
        Draft memory draft = _drawn(_two(), 4);
        uint256 index = _otherLeaf(draft);
        TreeStep[] memory path = _pathOf(draft, index);
        uint256 half = uint256(_stateOf(draft).deadline) - tabs.terms().openingWindow / 2;
        vm.deal(address(this), BOND);
        vm.warp(half);
        vm.expectRevert(abi.encodeWithSelector(IRequestTabs.DeadlineNotPassed.selector, half, half));
        tabs.challengeLeaf{value: BOND}(draft.batch, draft.leaves[index], path);
        _openDrawn(draft);
        tabs.challengeLeaf{value: BOND}(draft.batch, draft.leaves[index], path);
    }

    function test_challengeLeaf_withoutAProof_isForItsRequesterAlone() public {
        Draft memory draft = _drawn(_two(), 4);
        uint256 index = _otherLeaf(draft);
        Opening memory leaf = draft.leaves[index];
        bytes32 shown = _leafSum(leaf).hash;
        _endFirstHalf(draft);
        vm.deal(address(this), BOND);
        vm.expectRevert(abi.encodeWithSelector(IRequestTabs.ProofInvalid.selector, draft.batch.root, shown));
        tabs.challengeLeaf{value: BOND}(draft.batch, leaf, new TreeStep[](0));
        _challengeOwn(draft, leaf);
        assertEq(tabs.challengerOf(_idOf(leaf)), leaf.ticket.requester);
    }

    function test_resolveChallenge_ofAnHonestRequest_paysTheBondToTheExecutors() public {
        Draft memory draft = _drawn(_two(), 4);
        uint256 index = _otherLeaf(draft);
        RequestId id = _idOf(draft.leaves[index]);
        vm.expectRevert(abi.encodeWithSelector(IRequestTabs.NotChallenged.selector, id));
        tabs.resolveChallenge(id);
        address challenger = _challengeLeaf(draft, index);
        vm.expectRevert(abi.encodeWithSelector(IRequestTabs.ChallengeUndecided.selector, id, RequestStatus.Committed));
        tabs.resolveChallenge(id);
        _verifyOpened(id, NODES);
        vm.expectEmit(address(tabs));
        emit IRequestTabs.ChallengeResolved(id, challenger, false, BOND);
        vm.expectEmit(address(tabs));
        emit IRequestTabs.Credited(RequestId.unwrap(id), _operator(0), BOND / 3, BOND / 3);
        tabs.resolveChallenge(id);
        assertEq(tabs.creditOf(_operator(0)) + tabs.creditOf(_operator(1)) + tabs.creditOf(_operator(2)), BOND);
        assertEq(tabs.challengerOf(id), address(0));
        vm.expectRevert(abi.encodeWithSelector(IRequestTabs.NotChallenged.selector, id));
        tabs.resolveChallenge(id);
    }

    /// The executor has left the network meanwhile: its key is paid.
    function test_resolveChallenge_afterAnExecutorLeft_paysItsKey() public {
        Draft memory draft = _drawn(_two(), 4);
        uint256 index = _otherLeaf(draft);
        RequestId id = _idOf(draft.leaves[index]);
        _challengeLeaf(draft, index);
        _openDrawn(draft);
        RequestId drawn = _idOf(draft.leaves[_drawnLeaf(draft)]);
        _verifyOpened(id, NODES);
        vm.warp(uint256(escrow.requestOf(drawn).deadline) + 1);
        escrow.claimRefund(drawn);
        tabs.settle(draft.batch);
        vm.prank(_operator(0));
        registry.beginExit(_hot(0));
        vm.warp(registry.accountOf(_hot(0)).thawEnd);
        vm.prank(_operator(0));
        registry.withdraw(_hot(0));
        tabs.resolveChallenge(id);
        assertEq(tabs.creditOf(_hot(0)), BOND / 3);
    }

    function test_resolveChallenge_ofARefundedRequest_givesTheBondBack() public {
        Draft memory draft = _drawn(_two(), 4);
        uint256 index = _otherLeaf(draft);
        RequestId id = _idOf(draft.leaves[index]);
        address challenger = _challengeLeaf(draft, index);
        vm.warp(uint256(escrow.requestOf(id).deadline) + 1);
        vm.expectRevert(abi.encodeWithSelector(IRequestTabs.ChallengeUndecided.selector, id, RequestStatus.Expired));
        tabs.resolveChallenge(id);
        escrow.claimRefund(id);
        vm.expectEmit(address(tabs));
        emit IRequestTabs.ChallengeResolved(id, challenger, true, BOND);
        tabs.resolveChallenge(id);
        assertEq(tabs.creditOf(challenger), BOND);
    }

    function test_openCommitted_byAnother_reverts() public {
        Draft memory draft = _draftOf(_plan, 0, 1);
        RequestId id = _idOf(draft.leaves[0]);
        Opening memory leaf = draft.leaves[0];
        vm.expectRevert(abi.encodeWithSelector(IInferenceEscrow.NotTabs.selector, publisher));
        vm.prank(publisher);
        escrow.openCommitted(id, _offer(leaf), leaf.route, leaf.proofs, leaf.commitments);
        vm.expectRevert(abi.encodeWithSelector(IOutputVerification.NotEscrow.selector, publisher));
        vm.prank(publisher);
        verification.commitStages(id, leaf.commitments, MAXIMUM_TOKENS);
    }

    /// What the escrow refuses of RequestTabs it refuses as it does of everybody.
    function test_openCommitted_ofWhatCannotBeARequest_reverts() public {
        Draft memory draft = _draftOf(_plan, 0, 1);
        Opening memory leaf = draft.leaves[0];
        RequestId id = _idOf(leaf);
        bytes32[] memory commitments = new bytes32[](STAGES);
        vm.startPrank(address(tabs));
        vm.expectRevert(IOutputVerification.CommitmentMissing.selector);
        escrow.openCommitted(id, _offer(leaf), leaf.route, leaf.proofs, commitments);
        vm.expectRevert(abi.encodeWithSelector(IInferenceEscrow.RouteIncomplete.selector, STAGES, 2));
        escrow.openCommitted(id, _offer(leaf), leaf.route, leaf.proofs, new bytes32[](2));
        escrow.openCommitted(id, _offer(leaf), leaf.route, leaf.proofs, leaf.commitments);
        vm.expectRevert(abi.encodeWithSelector(IInferenceEscrow.RequestAlreadyOpen.selector, id));
        escrow.openCommitted(id, _offer(leaf), leaf.route, leaf.proofs, leaf.commitments);
        vm.stopPrank();
    }
}

contract RequestTabsMoneyTest is RequestTabsScenario {
    /// The pot less the opened leaves, in proportion to the shares, the dust to the last.
    function test_settle_paysSharesAndTheFee() public {
        Draft memory draft = _draft(_plan, _two(), 4);
        BatchId id = _openedBatch(draft);
        uint256 pot = 7 * uint256(LEAF_TOKENS) * FEE;
        uint256 part = _executorsPart(pot);
        uint256 first = part * draft.batch.shares[0].amount / _executorsPart(_potOf(draft.batch));
        vm.expectEmit(address(tabs));
        emit IRequestTabs.Credited(BatchId.unwrap(id), treasury, pot - part, pot - part);
        vm.expectEmit(address(tabs));
        emit IRequestTabs.Credited(BatchId.unwrap(id), _operator(0), first, first);
        vm.expectEmit(address(tabs));
        emit IRequestTabs.BatchSettled(id, part, pot - part, uint256(LEAF_TOKENS) * FEE);
        tabs.settle(draft.batch);
        _assertBatch(draft, BatchStatus.Settled);
        assertEq(tabs.creditOf(_operator(0)) + tabs.creditOf(_operator(1)) + tabs.creditOf(_operator(2)), part);
        for (uint256 i = 0; i < STAGES; i++) {
            assertEq(_duties(i), i < STAGES ? 1 : 0, "only that of the opened request");
        }
        _assertBalanced(2, 0, 0);
    }

    /// forge-config: default.fuzz.runs = 64
    function testFuzz_MONEY_04_settle_conservesThePot(uint256 requests, uint256 split) public {
        requests = bound(requests, 1, 6);
        Draft memory draft = _draftOf(_plan, 0, requests);
        // Any split the nodes agree on, down to nothing for one of them.
        uint256 part = _executorsPart(_potOf(draft.batch));
        uint256 cut = split % (part + 1);
        draft.batch.shares[0].amount = uint96(cut);
        draft.batch.shares[1].amount = uint96((part - cut) * (split % 3) / 3);
        draft.batch.shares[2].amount = uint96(part - draft.batch.shares[0].amount - draft.batch.shares[1].amount);
        _signDraft(draft);
        _openedBatch(draft);
        tabs.settle(draft.batch);
        _assertBalanced(1, 0, 0);
        uint256 charge = uint256(LEAF_TOKENS) * FEE;
        assertEq(tabs.creditOf(publisher), _bondOf(draft.batch));
        assertEq(address(tabs).balance, (requests - 1) * charge + _bondOf(draft.batch));
        assertEq(address(escrow).balance, charge);
    }

    function test_settle_beforeTheTimeOrWithDrawsPending_reverts() public {
        Draft memory draft = _drawn(_two(), 4);
        uint256 deadline = _stateOf(draft).deadline;
        vm.warp(deadline);
        vm.expectRevert(abi.encodeWithSelector(IRequestTabs.DeadlineNotPassed.selector, deadline, deadline));
        tabs.settle(draft.batch);
        vm.warp(deadline + 1);
        vm.expectRevert(abi.encodeWithSelector(IRequestTabs.DrawsPending.selector, 1));
        tabs.settle(draft.batch);
        tabs.voidBatch(draft.batch);
        _assertBatch(draft, BatchStatus.Void);
    }

    function test_voidBatch_ofABatchInOrder_reverts() public {
        Draft memory draft = _draft(_plan, _two(), 4);
        BatchId id = _openedBatch(draft);
        vm.expectRevert(abi.encodeWithSelector(IRequestTabs.NoDrawPending.selector, id));
        tabs.voidBatch(draft.batch);
    }

    /// Each gets back what it paid less what went into its own opened requests, whose money is in the escrow.
    function test_voidBatch_afterAnOpening_restoresTheRest() public {
        Draft memory draft = _drawn(_two(), 4);
        uint256 index = _otherLeaf(draft);
        _challengeLeaf(draft, index);
        _endOpening(draft);
        tabs.voidBatch(draft.batch);
        uint256 charge = uint256(LEAF_TOKENS) * FEE;
        uint256 segment = draft.leaves[index].segment;
        assertEq(_tabBalance(segment), 3 * charge);
        assertEq(_tabBalance(1 - segment), 4 * charge);
        assertEq(escrow.requestOf(_idOf(draft.leaves[index])).deposit, charge);
        assertEq(_duties(0), 1, "that of the opened request");
        // The vouchers and tickets are used up all the same.
        assertEq(tabs.tabOf(_payer(0), publisher).tickets, 4);
        assertEq(tabs.tabOf(_payer(0), publisher).collected, 4 * charge);
        _assertBalanced(2, 0, BOND);
    }

    function test_withdrawCredit_paysOnceAndKeepsWhatIsRefused() public {
        Draft memory draft = _draft(_plan, _two(), 4);
        _openedBatch(draft);
        tabs.settle(draft.batch);
        uint256 credit = tabs.creditOf(_operator(1));
        vm.expectEmit(address(tabs));
        emit IRequestTabs.CreditWithdrawn(_operator(1), credit);
        tabs.withdrawCredit(_operator(1));
        assertEq(_operator(1).balance, credit);
        vm.expectRevert(abi.encodeWithSelector(IRequestTabs.NoCredit.selector, _operator(1)));
        tabs.withdrawCredit(_operator(1));
        vm.etch(treasury, address(new Refuser()).code);
        vm.store(treasury, 0, bytes32(uint256(1)));
        uint256 fee = tabs.creditOf(treasury);
        vm.expectRevert(abi.encodeWithSelector(IRequestTabs.TransferFailed.selector, treasury, fee));
        tabs.withdrawCredit(treasury);
        assertEq(tabs.creditOf(treasury), fee);
    }

    function test_forcedMoney_changesNoBook() public {
        vm.deal(address(this), 5 ether);
        new ForcedMoney().send{value: 5 ether}(address(tabs));
        Draft memory draft = _draft(_plan, _two(), 4);
        _openedBatch(draft);
        tabs.settle(draft.batch);
        uint256 owed = tabs.creditOf(treasury) + tabs.creditOf(publisher);
        for (uint256 i = 0; i < STAGES; i++) {
            owed += tabs.creditOf(_operator(i));
        }
        assertEq(address(tabs).balance, owed + 5 ether);
    }
}

/// @notice Numbers under which a batch would be unsafe are refused at deployment.
contract RequestTabsDeploymentTest is RequestTabsScenario {
    function _expectRefused(TabTerms memory terms, bytes memory reason) private {
        bytes memory arguments = abi.encode(registry, shards, escrow, terms);
        vm.expectRevert(reason);
        this.create("RequestTabs", arguments);
    }

    function _window(uint256 minimum, uint256 actual) private pure returns (bytes memory) {
        return abi.encodeWithSelector(IRequestTabs.WindowOutOfRange.selector, minimum, actual);
    }

    function test_constructor_windowsOutOfRange_revert() public {
        TabTerms memory terms = _tabTerms();
        terms.secretWindow = 0;
        _expectRefused(terms, _window(1, 0));
        terms = _tabTerms();
        terms.drawWindow = terms.secretWindow;
        _expectRefused(terms, _window(61, 60));
        terms = _tabTerms();
        terms.openingWindow = 0;
        _expectRefused(terms, _window(1, 0));
        terms = _tabTerms();
        terms.closePeriod = 1800;
        _expectRefused(terms, _window(1801, 1800));
        terms = _tabTerms();
        terms.closePeriod = 3651 days;
        _expectRefused(terms, _window(1801, 3651 days));
    }

    function test_constructor_tokensPerDrawOutOfRange_revert() public {
        TabTerms memory terms = _tabTerms();
        terms.tokensPerDraw = 0;
        _expectRefused(terms, abi.encodeWithSelector(IRequestTabs.TokensOutOfRange.selector, 1 << 26, 0));
        terms.tokensPerDraw = (1 << 26) + 1;
        _expectRefused(terms, abi.encodeWithSelector(IRequestTabs.TokensOutOfRange.selector, 1 << 26, (1 << 26) + 1));
    }

    /// STAKE-03: no stake may be able to leave before the last request of a batch is final.
    function test_STAKE_03_constructor_batchLongerThanTheThaw_reverts() public {
        TabTerms memory terms = _tabTerms();
        uint64 thaw = registry.thawPeriod();
        terms.openingWindow = thaw - terms.drawWindow - escrow.terms().verificationWindow;
        terms.closePeriod = 30 days;
        _expectRefused(terms, _window(uint256(thaw) + 1, thaw));
    }

    function test_constructor_wiredToContractsOfAnotherNetwork_reverts() public {
        bytes memory arguments = abi.encode(registry, shards, escrow, _tabTerms());
        address next = vm.computeCreateAddress(address(this), vm.getNonce(address(this)));
        vm.expectRevert(abi.encodeWithSelector(IRequestTabs.WiringMismatch.selector, next, address(tabs)));
        this.create("RequestTabs", arguments);
    }

    function test_terms_areThoseOfTheDeployment() public view {
        assertEq(abi.encode(tabs.terms()), abi.encode(_tabTerms()));
        assertEq(tabs.longestBatch(), 600 + 1200 + 8160);
        assertEq(address(tabs.registry()), address(registry));
        assertEq(address(tabs.assignments()), address(shards));
        assertEq(address(tabs.escrow()), address(escrow));
        assertEq(registry.tabs(), address(tabs));
        assertEq(escrow.tabs(), address(tabs));
    }
}
