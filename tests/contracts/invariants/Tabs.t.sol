// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

import {console} from "forge-std/console.sol";

import {RequestStatus} from "../../../contracts/interfaces/IInferenceEscrow.sol";
import {NodeAccount} from "../../../contracts/interfaces/INodeRegistry.sol";
import {Phase} from "../../../contracts/interfaces/IOutputVerification.sol";
import {BatchState, BatchStatus, IRequestTabs, Opening, TreeStep} from "../../../contracts/interfaces/IRequestTabs.sol";
import {Assignment} from "../../../contracts/types/Assignment.sol";
import {BatchId, PlanId, RequestId} from "../../../contracts/types/Identifiers.sol";
import {ForcedMoney} from "../Recipients.sol";
import {TabSwarm} from "../TabSwarm.sol";
import {TabsLedger} from "./TabsLedger.sol";

/// @notice Many batches at once, of three requesters and one collector that forges some of them, over honest nodes and two that lie: draws
///         with and without secrets, openings, challenges, verdicts, lapses, voids, thaws, forced ether.
/// @dev `step` performs one action a call; one that applies to nothing drives a fresh batch to where it does, so every call is a successful
///      act and `counts` says how many of each were made.
contract TabsInvariantTest is TabSwarm {
    enum Action {
        Fund,
        CloseTab,
        Post,
        PostForged,
        RecordSecret,
        Draw,
        RenewEntropy,
        OpenLeaf,
        ChallengeLeaf,
        Judge,
        Expire,
        Resolve,
        Settle,
        Void,
        WithdrawCredit,
        ForceMoney,
        Intrude,
        Thaw,
        Wait
    }

    uint256 private constant ACTIONS = 19;
    uint256 private constant NODES = 6;
    uint256 private constant PAYERS = 3;
    uint256 private constant RUN = 64;
    uint256 private constant FREE_STEPS = 40;
    uint256 private constant NONE = type(uint256).max;

    uint256[ACTIONS] public counts;
    /// Forged batches that came to nothing, and requests that were judged against a liar.
    uint256 public forgedAndVoid;
    uint256 public refundedByVerdict;

    PlanId private _plan;
    uint256 private _steps;
    uint256 private _clock;
    uint256 private _height;
    bool private _lying;
    TabsLedger private _ledger;

    /// Batches, as encoded drafts; what was posted for how much; those that are over.
    bytes[] private _drafts;
    BatchId[] private _batches;
    mapping(uint256 i => bool) private _isForged;
    mapping(uint256 i => bool) private _isOver;
    /// Requests that were opened.
    RequestId[] private _opened;
    mapping(RequestId id => bool) private _isClosed;
    address private _challenger = makeAddr("challenger");
    address private _intruder = makeAddr("intruder");

    /// Stage 0 on the nodes 0 and 4, stage 1 on 1 and 5; 4 and 5 lie, 2 and 3 only verify.
    function setUp() public {
        _deployNetwork();
        _addNodes(0, NODES);
        Assignment[] memory plan = new Assignment[](4);
        for (uint16 i = 0; i < 4; i++) {
            uint16 stage = i / 2;
            plan[i] = Assignment(
                stage, i % 2, 2 * stage, 2 * stage + 2, _hot(stage + 4 * (i % 2)), 100 + stage, EXECUTION_CLASS
            );
        }
        _ledger = TabsLedger(
            _create("TabsLedger", abi.encode(registry, escrow, tabs, publisher, treasury, _challenger, NODES, PAYERS))
        );
        _plan = _publish(_newModel(4), FEE, plan);
        vm.warp(block.timestamp + shards.planActivationDelay());
        (_clock, _height) = (block.timestamp, block.number);
        targetContract(address(this));
        bytes4[] memory selectors = new bytes4[](1);
        selectors[0] = this.step.selector;
        targetSelector(FuzzSelector(address(this), selectors));
    }

    // ------------------------------------------------------------------------------------------------------------ steps

    function step(uint256 seed) external {
        vm.warp(_clock);
        vm.roll(_height);
        Action action = Action(seed % ACTIONS);
        if (++_steps > FREE_STEPS) {
            for (uint256 i = 0; i < ACTIONS; i++) {
                if (counts[i] == 0) action = Action(i);
            }
        }
        _perform(action, uint256(keccak256(abi.encode(seed, _steps))));
        counts[uint256(action)]++;
        _ledger.observe();
        vm.roll(block.number + 1);
        (_clock, _height) = (block.timestamp, block.number);
    }

    function _perform(Action action, uint256 seed) private {
        if (action == Action.Fund) _fundTab(seed % PAYERS, 1 + seed % 1 ether);
        else if (action == Action.CloseTab) _closeTab(seed % PAYERS);
        else if (action == Action.Post) _postSome(seed, false);
        else if (action == Action.PostForged) _postSome(seed, true);
        else if (action == Action.WithdrawCredit) _withdrawSomeCredit(seed);
        else if (action == Action.ForceMoney) _forceMoney(seed);
        else if (action == Action.Thaw) _thaw(seed);
        else if (action == Action.Wait) vm.warp(block.timestamp + seed % 500);
        else if (action == Action.Judge) _judge(_findOpened(Action.Judge, seed));
        else if (action == Action.Expire) _expire(_findOpened(Action.Expire, seed));
        else if (action == Action.Resolve) _resolve(seed);
        else _performOn(action, _find(action, seed), seed);
    }

    function _performOn(Action action, uint256 i, uint256 seed) private {
        if (action == Action.RecordSecret) _record(i);
        else if (action == Action.Draw) _drawSome(i, seed);
        else if (action == Action.RenewEntropy) _renew(i);
        else if (action == Action.OpenLeaf) _openSome(i);
        else if (action == Action.ChallengeLeaf) _challengeSome(i, seed);
        else if (action == Action.Settle) _settle(i);
        else if (action == Action.Void) _void(i);
        else _intrude(i, seed);
    }

    function _find(Action action, uint256 seed) private returns (uint256 i) {
        uint256 count = _batches.length;
        for (uint256 k = 0; k < count; k++) {
            i = (seed % count + k) % count;
            if (!_isOver[i] && _applies(action, i)) return i;
        }
        i = _postSome(seed, action == Action.Void && seed % 2 == 0);
        if (action == Action.RecordSecret || action == Action.Draw || action == Action.RenewEntropy) return i;
        if (action == Action.Void && seed % 3 == 0) return _passDeadline(i);
        _drawSome(i, seed);
        if (action == Action.Settle) _openAll(i);
        if (action == Action.Settle || action == Action.Void) _passDeadline(i);
    }

    function _applies(Action action, uint256 i) private view returns (bool) {
        BatchState memory state = tabs.batchOf(_batches[i]);
        bool late = block.timestamp > state.deadline;
        bool posted = state.status == BatchStatus.Posted;
        if (action == Action.RecordSecret) return posted && block.timestamp <= state.secretDeadline;
        if (action == Action.Draw || action == Action.RenewEntropy) return posted && !late;
        if (action == Action.OpenLeaf) return !posted && !late && state.pending != 0 && !_isForged[i];
        if (action == Action.ChallengeLeaf) return !posted && !late && !_isForged[i] && _unopened(i, 0) != NONE;
        if (action == Action.Settle) return !posted && late && state.pending == 0;
        if (action == Action.Void) return late && (posted || state.pending != 0);
        return true;
    }

    function _passDeadline(uint256 i) private returns (uint256) {
        uint256 deadline = tabs.batchOf(_batches[i]).deadline;
        if (block.timestamp <= deadline) vm.warp(deadline + 1);
        return i;
    }

    // ---------------------------------------------------------------------------------------------------------- batches

    function _claimFor(RequestId id, uint16 stage, address node) internal view override returns (Claim memory) {
        uint256 i = _indexOf(node);
        return _lying && i >= 4 && uint256(RequestId.unwrap(id)) % 3 != 0
            ? _moved(_truth(id, stage), 1000)
            : _moved(_truth(id, stage), uint256(RequestId.unwrap(id)) % 33);
    }

    /// @dev One to three requesters with one to three requests each, over honest and lying replicas.
    function _postSome(uint256 seed, bool forged) private returns (uint256) {
        return _postOf(1 + seed % PAYERS, forged ? 2 + (seed >> 8) % 2 : 1 + (seed >> 8) % 3, seed, forged);
    }

    function _postOf(uint256 payers, uint256 each, uint256 seed, bool forged) private returns (uint256 i) {
        Draft memory draft;
        draft.payers = new uint256[](payers);
        draft.leaves = new Opening[](payers * each);
        for (uint256 j = 0; j < payers; j++) {
            draft.payers[j] = (seed / 7 + j) % PAYERS;
            for (uint64 k = 0; k < each; k++) {
                draft.leaves[j * each + k] =
                    _servedSomehow(draft.payers[j], j, k, uint256(keccak256(abi.encode(seed, j, k))));
            }
        }
        _complete(draft, _plan);
        if (forged) _forge(draft, seed >> 16);
        _widenShares(draft);
        i = _batches.length;
        _isForged[i] = forged;
        _fundSegments(draft);
        _note(draft, _post(draft));
    }

    function _servedSomehow(uint256 payer, uint256 segment, uint64 k, uint256 seed) private returns (Opening memory) {
        uint16[] memory replicas = new uint16[](2);
        (replicas[0], replicas[1]) = (uint16(seed % 4 == 0 ? 1 : 0), uint16((seed >> 8) % 4 == 0 ? 1 : 0));
        uint64 first = tabs.tabOf(_payer(payer), publisher).tickets;
        _lying = true;
        return _served(_ticket(_plan, payer, first + k), payer, segment, replicas);
    }

    /// @dev A leaf twice, a leaf of another weight, or a request left out.
    function _forge(Draft memory draft, uint256 seed) private view {
        Sum[] memory sums = _sumsOf(draft);
        if (seed % 3 == 0) {
            sums[1] = sums[0];
        } else {
            uint32 tokens = seed % 3 == 1 ? 1 : 0;
            sums[0].tokens = tokens;
            draft.batch.segments[0].tokens -= LEAF_TOKENS - tokens;
        }
        draft.batch.root = _rootOfSums(sums).hash;
    }

    /// @dev All four executors of the plan have a share.
    function _widenShares(Draft memory draft) private view {
        uint256 part = _executorsPart(_potOf(draft.batch));
        Assignment[] memory all = new Assignment[](4);
        for (uint256 k = 0; k < 4; k++) {
            all[k].node = _hot(k % 2 + 4 * (k / 2));
            all[k].workWeight = uint64(1 + k);
        }
        draft.batch.shares = _sharesOf(all, part);
        _signDraft(draft);
    }

    function _fundSegments(Draft memory draft) private {
        for (uint256 j = 0; j < draft.payers.length; j++) {
            uint256 due = uint256(draft.batch.segments[j].tokens) * FEE;
            if (_tabBalance(draft.payers[j]) < due) _fundTab(draft.payers[j], due);
        }
    }

    function _note(Draft memory draft, BatchId id) private {
        _drafts.push(abi.encode(draft));
        _batches.push(id);
        _ledger.posted(id, _potOf(draft.batch));
    }

    function _draftAt(uint256 i) private view returns (Draft memory) {
        return abi.decode(_drafts[i], (Draft));
    }

    function _record(uint256 i) private {
        Draft memory draft = _draftAt(i);
        uint256 segment = draft.batch.segments.length - 1;
        vm.prank(_intruder);
        tabs.recordSecret(draft.batch, segment, draft.secrets[segment]);
    }

    function _drawSome(uint256 i, uint256 seed) private {
        Draft memory draft = _draftAt(i);
        if (block.number > uint256(_stateOf(draft).entropyBlock) + 256) _renew(i);
        BatchState memory state = _stateOf(draft);
        _passEntropy(draft);
        if (seed % 3 == 0 && block.timestamp <= state.secretDeadline) vm.warp(uint256(state.secretDeadline) + 1);
        bool late = block.timestamp > state.secretDeadline;
        vm.prank(_intruder);
        tabs.draw(draft.batch, late ? new bytes32[](draft.secrets.length) : draft.secrets);
        assertEq(uint8(_stateOf(draft).status), uint8(BatchStatus.Drawn));
    }

    function _renew(uint256 i) private {
        Draft memory draft = _draftAt(i);
        uint64 entropyBlock = _stateOf(draft).entropyBlock;
        vm.roll(uint256(entropyBlock) + 257);
        tabs.draw(draft.batch, draft.secrets);
        assertGt(_stateOf(draft).entropyBlock, entropyBlock);
    }

    function _openSome(uint256 i) private {
        Draft memory draft = _draftAt(i);
        BatchState memory state = _stateOf(draft);
        uint256 k;
        while (state.pending >> k & 1 == 0) {
            k++;
        }
        uint256 leaf = _leafAt(draft, state.offsets[k]);
        bool fresh = escrow.requestOf(_idOf(draft.leaves[leaf])).deadline == 0;
        vm.startPrank(_intruder);
        _openLeaf(draft, leaf);
        vm.stopPrank();
        if (fresh) _noteOpened(_idOf(draft.leaves[leaf]));
        assertTrue(_stateOf(draft).pending >> k & 1 == 0);
    }

    function _openAll(uint256 i) private {
        while (tabs.batchOf(_batches[i]).pending != 0) {
            _openSome(i);
        }
    }

    /// @dev A leaf that is not opened yet, or NONE.
    function _unopened(uint256 i, uint256 seed) private view returns (uint256 leaf) {
        Draft memory draft = _draftAt(i);
        uint256 count = draft.leaves.length;
        for (uint256 k = 0; k < count; k++) {
            leaf = (seed % count + k) % count;
            if (escrow.requestOf(_idOf(draft.leaves[leaf])).deadline == 0) return leaf;
        }
        return NONE;
    }

    /// @dev By somebody with the proof, or by the requester without.
    function _challengeSome(uint256 i, uint256 seed) private {
        uint256 leaf = _unopened(i, seed);
        Draft memory draft = _draftAt(i);
        BatchState memory state = _stateOf(draft);
        uint256 half = uint256(state.deadline) - tabs.terms().openingWindow / 2;
        if (state.pending != 0 && block.timestamp <= half) vm.warp(half + 1);
        bool own = seed % 2 == 0;
        address who = own ? draft.leaves[leaf].ticket.requester : _challenger;
        TreeStep[] memory path = own ? new TreeStep[](0) : _pathOf(draft, leaf);
        vm.deal(who, who.balance + BOND);
        vm.prank(who);
        tabs.challengeLeaf{value: BOND}(draft.batch, draft.leaves[leaf], path);
        _noteOpened(_idOf(draft.leaves[leaf]));
    }

    function _noteOpened(RequestId id) private {
        _opened.push(id);
        _ledger.opened(id);
    }

    function _close(RequestId id) private {
        _isClosed[id] = true;
        _ledger.closed(id);
    }

    /// MONEY-04: what is left of the pot is credited, to the wei.
    function _settle(uint256 i) private {
        uint256 credits = _ledger.credits();
        uint256 left = _ledger.leftOf(i);
        Draft memory draft = _draftAt(i);
        vm.prank(_intruder);
        tabs.settle(draft.batch);
        assertEq(_ledger.credits() - credits, left + _ledger.bond(), "MONEY-04: credited");
        _end(i);
    }

    /// MONEY-04: what is left of the pot is on the tabs again, to the wei.
    function _void(uint256 i) private {
        uint256 before = _ledger.onTabs();
        uint256 left = _ledger.leftOf(i);
        Draft memory draft = _draftAt(i);
        vm.prank(_intruder);
        tabs.voidBatch(draft.batch);
        assertEq(_ledger.onTabs() - before, left, "MONEY-04: restored");
        _end(i);
        if (_isForged[i]) forgedAndVoid++;
    }

    function _end(uint256 i) private {
        _isOver[i] = true;
        _ledger.over(i);
    }

    // --------------------------------------------------------------------------------------------------------- requests

    /// @dev A request that was opened and is live with time enough, or that has not been closed, or one out of a fresh batch.
    function _findOpened(Action action, uint256 seed) private returns (RequestId id) {
        uint256 count = _opened.length;
        for (uint256 k = 0; k < count; k++) {
            id = _opened[(seed % count + k) % count];
            if (_isClosed[id]) continue;
            uint256 deadline = escrow.requestOf(id).deadline;
            if (action == Action.Expire || deadline > block.timestamp + 6000) return id;
        }
        do {
            // A drawn leaf may be of a request that a challenge opened, and that is over.
            _openSome(_find(Action.OpenLeaf, seed));
            id = _opened[_opened.length - 1];
        } while (_isClosed[id]);
    }

    /// @dev Fought out to its end by honest members.
    function _judge(RequestId id) private {
        if (escrow.requestOf(id).deadline <= block.timestamp + 6000) return _expire(id);
        while (verification.verificationOf(id).phase == Phase.AwaitingDraw) {
            _draw(id); // or renew what has lapsed
        }
        for (uint256 round = 1; escrow.requestOf(id).status == RequestStatus.Committed; round++) {
            _attestHonestly(id, NODES);
            if (verification.verificationOf(id).phase == Phase.Attesting) _endAttesting(id);
            if (round == 1) _revealAllStages(id);
            _revealMembers(id);
            _tallyAll(id);
        }
        if (verification.verificationOf(id).phase == Phase.Challengeable) {
            _endChallenge(id);
            verification.settle(id);
        } else {
            refundedByVerdict++;
        }
        _close(id);
    }

    function _expire(RequestId id) private {
        uint256 deadline = escrow.requestOf(id).deadline;
        if (block.timestamp <= deadline) vm.warp(deadline + 1);
        escrow.claimRefund(id);
        _close(id);
    }

    function _resolve(uint256 seed) private {
        for (uint256 k = 0; k < _opened.length; k++) {
            if (!_isClosed[_opened[k]] || tabs.challengerOf(_opened[k]) == address(0)) continue;
            _resolveOf(_opened[k]);
            return;
        }
        _challengeSome(_find(Action.ChallengeLeaf, seed), seed);
        RequestId id = _opened[_opened.length - 1];
        if (seed % 2 == 0) _judge(id);
        else _expire(id);
        _resolveOf(id);
    }

    /// MONEY-04: a bond goes back or to the executors, to the wei.
    function _resolveOf(RequestId id) private {
        uint256 credits = _ledger.credits();
        tabs.resolveChallenge(id);
        assertEq(_ledger.credits() - credits, BOND, "MONEY-04: bond");
    }

    // ------------------------------------------------------------------------------------------------------- misbehaviour

    /// TAB-01, ROLE-01: nothing can be posted, paid or given back a second time, early, or by somebody else.
    function _intrude(uint256 i, uint256 seed) private {
        Draft memory draft = _draftAt(i);
        address[3] memory who = [_intruder, _payer(0), publisher];
        address sender = who[seed % 3];
        _shut(sender, abi.encodeCall(IRequestTabs.post, (draft.batch, draft.vouchers, draft.consents)));
        uint256 k = seed % _batches.length;
        Draft memory other = _draftAt(k);
        if (_isOver[k]) {
            _shut(sender, abi.encodeCall(IRequestTabs.settle, (other.batch)));
            _shut(sender, abi.encodeCall(IRequestTabs.voidBatch, (other.batch)));
            _shut(sender, abi.encodeCall(IRequestTabs.draw, (other.batch, other.secrets)));
        }
        BatchState memory state = _stateOf(draft);
        if (block.timestamp <= state.deadline) {
            _shut(sender, abi.encodeCall(IRequestTabs.settle, (draft.batch)));
            _shut(sender, abi.encodeCall(IRequestTabs.voidBatch, (draft.batch)));
        }
        // A leaf in the place of another.
        TreeStep[] memory path = _pathOf(draft, 0);
        uint256 last = draft.leaves.length - 1;
        if (last > 0) _shut(sender, abi.encodeCall(IRequestTabs.openLeaf, (draft.batch, draft.leaves[last], path)));
        // Another split of the pot.
        draft.batch.shares[0].amount += draft.batch.shares[1].amount;
        draft.batch.shares[1].amount = 0;
        _shut(sender, abi.encodeCall(IRequestTabs.settle, (draft.batch)));
        _shut(sender, abi.encodeCall(IRequestTabs.post, (draft.batch, draft.vouchers, draft.consents)));
    }

    function _shut(address who, bytes memory call_) private {
        vm.prank(who);
        (bool open,) = address(tabs).call(call_);
        assertFalse(open, "TAB-01");
    }

    function _forceMoney(uint256 seed) private {
        uint256 amount = 1 + seed % 1 ether;
        vm.deal(address(this), amount);
        new ForcedMoney().send{value: amount}(address(tabs));
        _ledger.forced(amount);
    }

    function _closeTab(uint256 payer) private {
        if (_tabBalance(payer) == 0) _fundTab(payer, 1 ether);
        vm.prank(_payer(payer));
        tabs.beginClose(publisher);
        vm.warp(tabs.tabOf(_payer(payer), publisher).closesAt);
        uint256 balance = _tabBalance(payer);
        uint256 before = _payer(payer).balance;
        vm.prank(_payer(payer));
        tabs.withdrawTab(publisher);
        assertEq(_payer(payer).balance - before, balance);
    }

    function _withdrawSomeCredit(uint256 seed) private {
        for (uint256 k = 0; k <= NODES; k++) {
            address account = k == NODES ? treasury : _operator((seed % NODES + k) % NODES);
            uint256 credit = tabs.creditOf(account);
            if (credit == 0) continue;
            uint256 before = account.balance;
            tabs.withdrawCredit(account);
            assertEq(account.balance - before, credit);
            return;
        }
        _settleFresh(seed);
        _withdrawSomeCredit(seed);
    }

    /// @dev A batch of which something is left, so that somebody has a credit.
    function _settleFresh(uint256 seed) private {
        uint256 i = _postOf(1, 3, seed, false);
        _drawSome(i, seed | 1);
        _openAll(i);
        _settle(_passDeadline(i));
    }

    /// @dev Takes out what has thawed, or thaws a part of what is bonded. STAKE-03 looks at what becomes of it.
    function _thaw(uint256 seed) private {
        uint256 node = seed % NODES;
        NodeAccount memory account = registry.accountOf(_hot(node));
        vm.startPrank(_operator(node));
        if (account.thawing != 0 && block.timestamp >= account.thawEnd) {
            registry.withdraw(_hot(node));
            _ledger.stakeTaken(node, account.thawing);
        } else if (account.staked - account.thawing > 2 ether) {
            registry.thaw(_hot(node), 0.1 ether);
        }
        vm.stopPrank();
    }

    // -------------------------------------------------------------------------------------------------------- invariants

    /// forge-config: default.invariant.fail-on-revert = true
    /// forge-config: default.invariant.shrink-run-limit = 200
    function invariant_MONEY_STAKE_TAB() public view {
        _check();
    }

    function _check() private view {
        _ledger.checkMoney();
        _ledger.checkStake(_clock);
    }

    function test_handler_performsEveryActionInARun() public {
        for (uint256 i = 0; i < RUN; i++) {
            this.step(uint256(keccak256(abi.encode(i))));
            _check();
        }
        _finish();
    }

    function afterInvariant() public {
        _finish();
        for (uint256 i = 0; i < ACTIONS; i++) {
            console.log("action", i, counts[i]);
        }
        console.log("forged and void, refunded by verdict", forgedAndVoid, refundedByVerdict);
    }

    /// MONEY-03: a year later everybody takes out what is his, without the help of anybody else, and nothing is left behind.
    function _finish() private {
        for (uint256 i = 0; i < ACTIONS && _steps >= RUN; i++) {
            assertGt(counts[i], 0, string.concat("action never performed: ", vm.toString(i)));
        }
        vm.warp(_clock + 365 days);
        for (uint256 i = 0; i < _batches.length; i++) {
            if (_isOver[i]) continue;
            if (_applies(Action.Settle, i)) _settle(i);
            else _void(i);
        }
        for (uint256 k = 0; k < _opened.length; k++) {
            if (!_isClosed[_opened[k]]) _expire(_opened[k]);
            if (tabs.challengerOf(_opened[k]) != address(0)) _resolveOf(_opened[k]);
        }
        for (uint256 i = 0; i < PAYERS; i++) {
            if (_tabBalance(i) != 0) _closeTab(i);
        }
        _ledger.finish();
    }

    receive() external payable {}
}
