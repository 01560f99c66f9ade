// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

import {Share} from "../../contracts/interfaces/IRequestTabs.sol";
import {PlanId} from "../../contracts/types/Identifiers.sol";
import {TabSwarm} from "./TabSwarm.sol";

/// @notice What a batch costs with four stages: of 1, 8 and 64 requests, of 1 and 8 requesters, in tests/contracts/snapshots/Tabs.json. Funded
///         once and served before, as every batch but the first is: tabs, credits and accounts have been written to.
/// forge-config: default.isolate = true
contract GasTabsTest is TabSwarm {
    uint256 private constant STAGES = 4;
    uint256 private constant NODES = 7;
    PlanId private _plan;

    function setUp() public {
        _deployNetwork();
        _addNodes(0, NODES);
        _plan = _newPlan(STAGES);
    }

    function test_gas_tab() public {
        _fundTab(0, 1 ether);
        vm.snapshotGasLastCall("Tabs", "fund, first");
        _fundTab(0, 1 ether);
        vm.snapshotGasLastCall("Tabs", "fund");
        vm.prank(_payer(0));
        tabs.beginClose(publisher);
        vm.snapshotGasLastCall("Tabs", "beginClose");
        vm.warp(block.timestamp + tabs.terms().closePeriod);
        vm.prank(_payer(0));
        tabs.withdrawTab(publisher);
        vm.snapshotGasLastCall("Tabs", "withdrawTab");
    }

    function test_gas_batch_of1_by1() public {
        assertLt(_batch("1 request", 1, 1), 600_000);
    }

    function test_gas_batch_of8_by1() public {
        assertLt(_batch("8 requests of 1", 1, 8), 600_000);
    }

    function test_gas_batch_of8_by8() public {
        assertLt(_batch("8 requests of 8", 8, 1), 800_000);
    }

    function test_gas_batch_of64_by1() public {
        assertLt(_batch("64 requests of 1", 1, 64) / 64, 10_000);
    }

    function test_gas_batch_of64_by8() public {
        assertLt(_batch("64 requests of 8", 8, 8) / 64, 10_000);
    }

    /// The very first batch of everybody: every balance is written for the first time.
    function test_gas_firstBatch_of64_by8() public {
        assertLt(_measure("64 requests of 8, first ever", _payers(8), 8) / 64, 12_000);
    }

    function _payers(uint256 count) private pure returns (uint256[] memory payers) {
        payers = new uint256[](count);
        for (uint256 i = 0; i < count; i++) {
            payers[i] = i;
        }
    }

    function _batch(string memory name, uint256 payers, uint256 each) private returns (uint256) {
        Draft memory earlier = _draft(_plan, _payers(payers), 2);
        _openedBatch(earlier);
        tabs.settle(earlier.batch);
        return _measure(name, _payers(payers), each);
    }

    /// @dev Gas of everything but the opened leaves.
    function _measure(string memory name, uint256[] memory payers, uint256 each) private returns (uint256 gas) {
        Draft memory draft = _draft(_plan, payers, each);
        for (uint256 j = 0; j < payers.length; j++) {
            _fundTab(payers[j], 1 ether);
        }
        _post(draft);
        vm.snapshotGasLastCall("Tabs", string.concat("post, ", name));
        gas += vm.lastCallGas().gasTotalUsed;
        _drawBatch(draft);
        vm.snapshotGasLastCall("Tabs", string.concat("draw, ", name));
        gas += vm.lastCallGas().gasTotalUsed;
        uint256 opened = _openDrawn(draft);
        assertTrue(opened < draft.leaves.length);
        _endOpening(draft);
        tabs.settle(draft.batch);
        vm.snapshotGasLastCall("Tabs", string.concat("settle, ", name));
        gas += vm.lastCallGas().gasTotalUsed;
        vm.snapshotValue("Tabs", string.concat("per request, ", name), gas / draft.leaves.length);
    }

    function test_gas_openings() public {
        Draft memory draft = _draft(_plan, _payers(8), 8);
        _postFunded(draft);
        vm.warp(block.timestamp + 1);
        tabs.recordSecret(draft.batch, 0, draft.secrets[0]);
        vm.snapshotGasLastCall("Tabs", "recordSecret");
        _drawBatch(draft);
        uint256 index = _leafAt(draft, _stateOf(draft).offsets[0]);
        tabs.openLeaf(draft.batch, draft.leaves[index], _pathOf(draft, index));
        vm.snapshotGasLastCall("Tabs", "openLeaf, 4 stages, 1 of 64");
        _openDrawn(draft);
        uint256 other = (index + 30) % 64;
        while (escrow.requestOf(_idOf(draft.leaves[other])).deadline != 0) {
            other = (other + 1) % 64;
        }
        vm.deal(address(this), BOND);
        tabs.challengeLeaf{value: BOND}(draft.batch, draft.leaves[other], _pathOf(draft, other));
        vm.snapshotGasLastCall("Tabs", "challengeLeaf, 4 stages");
        _verifyOpened(_idOf(draft.leaves[other]), NODES);
        tabs.resolveChallenge(_idOf(draft.leaves[other]));
        vm.snapshotGasLastCall("Tabs", "resolveChallenge, refuted");
        tabs.withdrawCredit(_operator(0));
        vm.snapshotGasLastCall("Tabs", "withdrawCredit");
    }

    /// MONEY-03: the largest batch there can be, 128 requesters and 64 shares, passes through each call in one transaction (EIP-7825).
    function test_MONEY_03_largestBatch_fitsIntoTransactions() public {
        Draft memory draft = _draft(_plan, _payers(128), 1);
        Share[] memory four = draft.batch.shares;
        draft.batch.shares = new Share[](64);
        for (uint256 i = 0; i < 64; i++) {
            draft.batch.shares[i] = Share(four[i % 4].node, i < 4 ? four[i].amount : 0);
        }
        _signDraft(draft);
        uint256 state = vm.snapshotState();
        _fits(draft, false);
        vm.revertToState(state);
        _fits(draft, true);
    }

    function _fits(Draft memory draft, bool opens) private {
        for (uint256 j = 0; j < draft.payers.length; j++) {
            _fundTab(draft.payers[j], 1 ether);
        }
        _post(draft);
        vm.snapshotGasLastCall("Tabs", "post, 128 requests of 128 with 64 shares");
        _assertFits();
        _drawBatch(draft);
        vm.snapshotGasLastCall("Tabs", "draw, 128 requests of 128 with 64 shares");
        _assertFits();
        if (opens) _openDrawn(draft);
        _endOpening(draft);
        if (opens) tabs.settle(draft.batch);
        else tabs.voidBatch(draft.batch);
        vm.snapshotGasLastCall("Tabs", string.concat(opens ? "settle" : "void", ", 128 requests of 128 with 64 shares"));
        _assertFits();
    }

    function _assertFits() private view {
        assertLt(vm.lastCallGas().gasTotalUsed, 1 << 24);
    }

    function test_gas_void() public {
        Draft memory draft = _draft(_plan, _payers(8), 8);
        _postFunded(draft);
        _endOpening(draft);
        tabs.voidBatch(draft.batch);
        vm.snapshotGasLastCall("Tabs", "voidBatch, 8 requesters");
    }
}
