// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

import {Offer} from "../../contracts/interfaces/IInferenceEscrow.sol";
import {
    Batch,
    BatchState,
    BatchStatus,
    Opening,
    Segment,
    Share,
    Tab,
    Ticket,
    TreeStep
} from "../../contracts/interfaces/IRequestTabs.sol";
import {Assignment} from "../../contracts/types/Assignment.sol";
import {BatchId, PlanId, RequestId} from "../../contracts/types/Identifiers.sol";
import {Swarm} from "./Swarm.sol";

/// @notice Batches built off the chain, as a collector, its requesters and its nodes build them, by the letter of IRequestTabs.
/// @dev Payer i is a requester with the key `_payerKey(i)`. The collector is the plan publisher of the swarm.
abstract contract TabSwarm is Swarm {
    /// A batch with everything that its calls need. The leaves are in the order of the tree.
    struct Draft {
        Batch batch;
        Opening[] leaves;
        uint256[] payers;
        bytes32[] secrets;
        bytes[] vouchers;
        bytes[] consents;
    }

    /// A node of the sum tree.
    struct Sum {
        bytes32 hash;
        uint32 tokens;
        uint32 leaves;
    }

    uint32 internal constant LEAF_TOKENS = PROMPT_TOKENS + ANSWER_TOKENS;
    uint256 internal constant BOND = 1 ether;
    uint16 internal constant PROTOCOL_FEE_BPS = 250;

    // ----------------------------------------------------------------------------------------------------------- payers

    function _payerKey(uint256 i) internal pure returns (uint256) {
        return uint256(keccak256(abi.encode("payer key", i)));
    }

    function _payer(uint256 i) internal pure returns (address) {
        return vm.addr(_payerKey(i));
    }

    function _signAs(uint256 payer, bytes32 digest) internal pure returns (bytes memory) {
        (uint8 v, bytes32 r, bytes32 s) = vm.sign(_payerKey(payer), digest);
        return abi.encodePacked(r, s, v);
    }

    function _fundTab(uint256 payer, uint256 amount) internal {
        vm.deal(_payer(payer), _payer(payer).balance + amount);
        vm.prank(_payer(payer));
        tabs.fund{value: amount}(publisher);
    }

    function _tabBalance(uint256 payer) internal view returns (uint256) {
        return tabs.tabOf(_payer(payer), publisher).balance;
    }

    // ---------------------------------------------------------------------------------------------------------- digests

    function _tabsDigest(bytes32 structHash) internal view returns (bytes32) {
        return _typedDigest("bsns RequestTabs", address(tabs), structHash);
    }

    function _voucherDigest(address payer, address collector, uint96 cumulative, bytes32 secretHash)
        internal
        view
        returns (bytes32)
    {
        return _tabsDigest(
            keccak256(
                abi.encode(
                    keccak256("Voucher(address requester,address collector,uint96 cumulative,bytes32 secretHash)"),
                    payer,
                    collector,
                    cumulative,
                    secretHash
                )
            )
        );
    }

    function _stageResultDigest(RequestId id, uint16 stage, bytes32 commitment, uint32 outputTokens)
        internal
        view
        returns (bytes32)
    {
        return _tabsDigest(
            keccak256(
                abi.encode(
                    keccak256("StageResult(bytes32 requestId,uint16 stage,bytes32 commitment,uint32 outputTokens)"),
                    id,
                    stage,
                    commitment,
                    outputTokens
                )
            )
        );
    }

    // --------------------------------------------------------------------------------------------------------- requests

    function _ticket(PlanId plan, uint256 payer, uint64 number) internal view returns (Ticket memory) {
        return Ticket({
            planId: plan,
            requester: _payer(payer),
            number: number,
            inputCommitment: INPUT_COMMITMENT,
            secretHash: keccak256(abi.encode(SECRET)),
            promptTokens: PROMPT_TOKENS,
            maximumTokens: MAXIMUM_TOKENS,
            deadline: uint64(block.timestamp) + 1 days
        });
    }

    /// @dev What the executor of a stage commits to.
    function _claimFor(RequestId id, uint16 stage, address) internal view virtual returns (Claim memory) {
        return _truth(id, stage);
    }

    /// @dev A request served over the chosen replicas: every party has signed.
    function _served(Ticket memory ticket, uint256 payer, uint256 segment, uint16[] memory replicas)
        internal
        returns (Opening memory leaf)
    {
        RequestId id = tabs.requestIdOf(ticket);
        leaf.segment = segment;
        leaf.ticket = ticket;
        leaf.ticketSignature = _signAs(payer, RequestId.unwrap(id));
        (leaf.route, leaf.proofs) = _routeOver(ticket.planId, replicas);
        leaf.commitments = new bytes32[](leaf.route.length);
        leaf.signatures = new bytes[](leaf.route.length);
        leaf.outputTokens = ANSWER_TOKENS;
        for (uint16 i = 0; i < leaf.route.length; i++) {
            address node = leaf.route[i].node;
            leaf.commitments[i] = _seal(id, 0, i, node, _claimFor(id, i, node));
        }
        _signStages(leaf);
    }

    /// @dev The nodes sign the leaf's commitments and tokens as they stand.
    function _signStages(Opening memory leaf) internal view {
        RequestId id = tabs.requestIdOf(leaf.ticket);
        for (uint16 i = 0; i < leaf.route.length; i++) {
            leaf.signatures[i] =
                _sign(_indexOf(leaf.route[i].node), _stageResultDigest(id, i, leaf.commitments[i], leaf.outputTokens));
        }
    }

    // ----------------------------------------------------------------------------------------------------------- drafts

    /// @dev `each` requests of each payer, served over the first replicas, ready to be posted.
    function _draft(PlanId plan, uint256[] memory payers, uint256 each) internal returns (Draft memory draft) {
        draft.payers = payers;
        draft.leaves = new Opening[](payers.length * each);
        uint16[] memory replicas = new uint16[](shards.planOf(plan).stageCount);
        for (uint256 j = 0; j < payers.length; j++) {
            uint64 first = tabs.tabOf(_payer(payers[j]), publisher).tickets;
            for (uint64 i = 0; i < each; i++) {
                draft.leaves[j * each + i] = _served(_ticket(plan, payers[j], first + i), payers[j], j, replicas);
            }
        }
        _complete(draft, plan);
    }

    function _draftOf(PlanId plan, uint256 payer, uint256 count) internal returns (Draft memory) {
        uint256[] memory payers = new uint256[](1);
        payers[0] = payer;
        return _draft(plan, payers, count);
    }

    /// @dev Everything of the batch that follows from its leaves and payers.
    function _complete(Draft memory draft, PlanId plan) internal view {
        Batch memory batch = draft.batch;
        batch.planId = plan;
        batch.collector = publisher;
        batch.feePerToken = FEE;
        batch.deadline = uint64(block.timestamp) + 1 hours;
        batch.segments = new Segment[](draft.payers.length);
        draft.secrets = new bytes32[](draft.payers.length);
        for (uint256 j = 0; j < draft.payers.length; j++) {
            Tab memory tab = tabs.tabOf(_payer(draft.payers[j]), publisher);
            Segment memory segment = batch.segments[j];
            segment.requester = _payer(draft.payers[j]);
            segment.firstTicket = tab.tickets;
            for (uint256 i = 0; i < draft.leaves.length; i++) {
                if (draft.leaves[i].segment != j) continue;
                segment.tickets++;
                segment.tokens += _tokensOf(draft.leaves[i]);
            }
            segment.cumulative = tab.collected + uint96(segment.tokens * FEE);
            draft.secrets[j] = keccak256(abi.encode("tab secret", segment.requester, segment.cumulative));
            segment.secretHash = keccak256(abi.encode(draft.secrets[j]));
        }
        batch.root = _rootOf(draft);
        batch.shares = _sharesOf(draft.leaves[0].route, _executorsPart(_potOf(batch)));
        _signDraft(draft);
    }

    /// @dev The requesters sign the vouchers and the nodes the batch as they stand.
    function _signDraft(Draft memory draft) internal view {
        Batch memory batch = draft.batch;
        draft.vouchers = new bytes[](batch.segments.length);
        for (uint256 j = 0; j < batch.segments.length; j++) {
            Segment memory segment = batch.segments[j];
            draft.vouchers[j] = _signAs(
                draft.payers[j],
                _voucherDigest(segment.requester, batch.collector, segment.cumulative, segment.secretHash)
            );
        }
        draft.consents = new bytes[](batch.shares.length);
        bytes32 id = BatchId.unwrap(tabs.batchIdOf(batch));
        for (uint256 i = 0; i < batch.shares.length; i++) {
            draft.consents[i] = _sign(_indexOf(batch.shares[i].node), id);
        }
    }

    /// @dev In proportion to the work; the last takes the dust.
    function _sharesOf(Assignment[] memory route, uint256 part) internal pure returns (Share[] memory shares) {
        uint256 weights;
        for (uint256 i = 0; i < route.length; i++) {
            weights += route[i].workWeight;
        }
        shares = new Share[](route.length);
        uint256 left = part;
        for (uint256 i = 0; i < route.length; i++) {
            uint256 amount = i + 1 == route.length ? left : part * route[i].workWeight / weights;
            left -= amount;
            shares[i] = Share(route[i].node, uint96(amount));
        }
    }

    function _tokensOf(Opening memory leaf) internal pure returns (uint32) {
        return leaf.ticket.promptTokens + leaf.outputTokens;
    }

    /// @dev What the collector puts down.
    function _bondOf(Batch memory batch) internal view returns (uint256) {
        return uint256(_tabTerms().tokensPerDraw) * batch.feePerToken;
    }

    function _potOf(Batch memory batch) internal pure returns (uint256 pot) {
        for (uint256 i = 0; i < batch.segments.length; i++) {
            pot += uint256(batch.segments[i].tokens) * batch.feePerToken;
        }
    }

    function _executorsPart(uint256 pot) internal pure returns (uint256) {
        return pot - pot * PROTOCOL_FEE_BPS / 10_000;
    }

    // --------------------------------------------------------------------------------------------------------- sum tree

    function _leafSum(Opening memory leaf) internal view returns (Sum memory) {
        bytes32 executions;
        for (uint256 i = 0; i < leaf.route.length; i++) {
            executions = keccak256(abi.encode(executions, leaf.route[i].node, leaf.commitments[i]));
        }
        bytes32 content = keccak256(abi.encode(tabs.requestIdOf(leaf.ticket), executions, leaf.outputTokens));
        return Sum(keccak256(bytes.concat(content)), _tokensOf(leaf), 1);
    }

    function _parent(Sum memory a, Sum memory b) internal pure returns (Sum memory) {
        return Sum(
            keccak256(abi.encode(a.hash, a.tokens, a.leaves, b.hash, b.tokens, b.leaves)),
            a.tokens + b.tokens,
            a.leaves + b.leaves
        );
    }

    function _sumsOf(Draft memory draft) internal view returns (Sum[] memory sums) {
        sums = new Sum[](draft.leaves.length);
        for (uint256 i = 0; i < sums.length; i++) {
            sums[i] = _leafSum(draft.leaves[i]);
        }
    }

    function _rootOf(Draft memory draft) internal view returns (bytes32) {
        return _rootOfSums(_sumsOf(draft)).hash;
    }

    function _rootOfSums(Sum[] memory level) internal pure returns (Sum memory) {
        while (level.length > 1) {
            level = _sumParents(level);
        }
        return level[0];
    }

    function _pathOf(Draft memory draft, uint256 index) internal view returns (TreeStep[] memory) {
        return _pathOfSums(_sumsOf(draft), index);
    }

    function _pathOfSums(Sum[] memory level, uint256 index) internal pure returns (TreeStep[] memory path) {
        path = new TreeStep[](16);
        uint256 steps;
        while (level.length > 1) {
            uint256 sibling = index % 2 == 0 ? index + 1 : index - 1;
            if (sibling < level.length) {
                Sum memory sum = level[sibling];
                path[steps++] = TreeStep(sum.hash, sum.tokens, sum.leaves, index % 2 == 1);
            }
            level = _sumParents(level);
            index /= 2;
        }
        assembly ("memory-safe") {
            mstore(path, steps)
        }
    }

    function _sumParents(Sum[] memory level) private pure returns (Sum[] memory parents) {
        parents = new Sum[]((level.length + 1) / 2);
        for (uint256 i = 0; i < parents.length; i++) {
            parents[i] = 2 * i + 1 < level.length ? _parent(level[2 * i], level[2 * i + 1]) : level[2 * i];
        }
    }

    // ------------------------------------------------------------------------------------------------------------- acts

    function _post(Draft memory draft) internal returns (BatchId id) {
        uint256 bond = _bondOf(draft.batch);
        vm.deal(publisher, publisher.balance + bond);
        vm.prank(publisher);
        id = tabs.post{value: bond}(draft.batch, draft.vouchers, draft.consents);
    }

    /// @dev Funded to the wei, posted.
    function _postFunded(Draft memory draft) internal returns (BatchId id) {
        for (uint256 j = 0; j < draft.payers.length; j++) {
            _fundTab(draft.payers[j], uint256(draft.batch.segments[j].tokens) * FEE);
        }
        return _post(draft);
    }

    function _drawBatch(Draft memory draft) internal {
        _passEntropy(draft);
        tabs.draw(draft.batch, draft.secrets);
    }

    function _passEntropy(Draft memory draft) internal {
        uint256 entropyBlock = _stateOf(draft).entropyBlock;
        if (block.number <= entropyBlock) vm.roll(entropyBlock + 1);
    }

    function _stateOf(Draft memory draft) internal view returns (BatchState memory) {
        return tabs.batchOf(tabs.batchIdOf(draft.batch));
    }

    function _firstToken(Draft memory draft, uint256 index) internal pure returns (uint256 first) {
        for (uint256 i = 0; i < index; i++) {
            first += _tokensOf(draft.leaves[i]);
        }
    }

    /// @dev Index of the leaf that covers the token.
    function _leafAt(Draft memory draft, uint256 token) internal pure returns (uint256 index) {
        while (token >= _firstToken(draft, index + 1)) {
            index++;
        }
    }

    function _openLeaf(Draft memory draft, uint256 index) internal {
        tabs.openLeaf(draft.batch, draft.leaves[index], _pathOf(draft, index));
    }

    /// @dev Opens every drawn leaf; gives the index of the first.
    function _openDrawn(Draft memory draft) internal returns (uint256 index) {
        BatchState memory state = _stateOf(draft);
        for (uint256 i = state.offsets.length; i > 0; i--) {
            index = _leafAt(draft, state.offsets[i - 1]);
            if (_stateOf(draft).pending >> (i - 1) & 1 != 0) _openLeaf(draft, index);
        }
    }

    function _endOpening(Draft memory draft) internal {
        vm.warp(uint256(_stateOf(draft).deadline) + 1);
    }

    /// @dev Posted, drawn, its drawn leaves opened, its windows over.
    function _openedBatch(Draft memory draft) internal returns (BatchId id) {
        id = _postFunded(draft);
        _drawBatch(draft);
        _openDrawn(draft);
        _endOpening(draft);
    }

    /// @dev What the escrow is told of an opened leaf.
    function _offer(Opening memory leaf) internal pure returns (Offer memory) {
        return Offer(
            leaf.ticket.requester,
            leaf.ticket.planId,
            FEE,
            leaf.ticket.inputCommitment,
            leaf.ticket.secretHash,
            leaf.ticket.promptTokens,
            leaf.ticket.maximumTokens
        );
    }

    function _idOf(Opening memory leaf) internal view returns (RequestId) {
        return tabs.requestIdOf(leaf.ticket);
    }

    /// @dev An opened leaf on its way through the committee of the nodes [0, count): settled.
    function _verifyOpened(RequestId id, uint256 count) internal {
        _draw(id);
        _attestHonestly(id, count);
        _endAttesting(id);
        _revealAllStages(id);
        _revealMembers(id);
        _tallyAll(id);
        _endChallenge(id);
        verification.settle(id);
    }

    function _assertBatch(Draft memory draft, BatchStatus expected) internal view {
        assertEq(uint8(_stateOf(draft).status), uint8(expected), "status of the batch");
    }
}
