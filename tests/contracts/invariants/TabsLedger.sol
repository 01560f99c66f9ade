// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

import {IInferenceEscrow} from "../../../contracts/interfaces/IInferenceEscrow.sol";
import {INodeRegistry, NodeAccount} from "../../../contracts/interfaces/INodeRegistry.sol";
import {IRequestTabs, Tab} from "../../../contracts/interfaces/IRequestTabs.sol";
import {BatchId, RequestId} from "../../../contracts/types/Identifiers.sol";
import {TabSwarm} from "../TabSwarm.sol";

/// @notice What TabsInvariantTest did, and whether the contracts' books agree with it.
contract TabsLedger is TabSwarm {
    uint256 private immutable _NODES;
    uint256 private immutable _PAYERS;
    address private immutable _CHALLENGER;

    BatchId[] private _batches;
    uint256[] private _pots;
    mapping(uint256 i => bool) private _isOver;
    mapping(uint256 i => mapping(uint256 node => uint256)) private _bondedAtPost;
    mapping(uint256 i => mapping(uint256 node => uint256)) private _slashedAtPost;
    RequestId[] private _opened;
    mapping(RequestId id => bool) private _isClosed;
    mapping(uint256 node => uint256) private _takenOut;
    mapping(uint256 payer => Tab) private _seen;
    uint256 private _forced;

    constructor(
        INodeRegistry registry_,
        IInferenceEscrow escrow_,
        IRequestTabs tabs_,
        address publisher_,
        address treasury_,
        address challenger_,
        uint256 nodes,
        uint256 payers
    ) {
        (registry, escrow, tabs) = (registry_, escrow_, tabs_);
        (publisher, treasury, _CHALLENGER) = (publisher_, treasury_, challenger_);
        (_NODES, _PAYERS) = (nodes, payers);
        for (uint256 k = 0; k < nodes; k++) {
            _know(k);
        }
    }

    // ------------------------------------------------------------------------------------------------------------ notes

    function posted(BatchId id, uint256 pot) external {
        uint256 i = _batches.length;
        _batches.push(id);
        _pots.push(pot);
        for (uint256 k = 0; k < _NODES; k++) {
            NodeAccount memory account = registry.accountOf(_hot(k));
            if (account.openDuties == 0) continue;
            _bondedAtPost[i][k] = account.staked - account.thawing;
            _slashedAtPost[i][k] = _slashedOf(k);
        }
    }

    function over(uint256 i) external {
        _isOver[i] = true;
    }

    function opened(RequestId id) external {
        _opened.push(id);
    }

    function closed(RequestId id) external {
        _isClosed[id] = true;
    }

    function forced(uint256 amount) external {
        _forced += amount;
    }

    function stakeTaken(uint256 node, uint256 amount) external {
        _takenOut[node] += amount;
    }

    /// TAB-01: what was collected, and which tickets, only grows.
    function observe() external {
        for (uint256 i = 0; i < _PAYERS; i++) {
            Tab memory tab = tabs.tabOf(_payer(i), publisher);
            assertGe(tab.collected, _seen[i].collected, "TAB-01");
            assertGe(tab.tickets, _seen[i].tickets, "TAB-01");
            _seen[i] = tab;
        }
    }

    // -------------------------------------------------------------------------------------------------------- invariants

    /// MONEY-04, exactly: tabs, pots and bonds of unfinished batches, bonds of challenges, credits, and what was forced on the contract; MONEY-01 of the escrow.
    function checkMoney() external view {
        uint256 owed = onTabs() + credits() + _forced;
        for (uint256 i = 0; i < _batches.length; i++) {
            if (!_isOver[i]) owed += leftOf(i) + bond();
        }
        uint256 deposits = escrow.creditOf(treasury);
        for (uint256 k = 0; k < _opened.length; k++) {
            if (tabs.challengerOf(_opened[k]) != address(0)) owed += BOND;
            if (!_isClosed[_opened[k]]) deposits += escrow.requestOf(_opened[k]).deposit;
        }
        assertEq(address(tabs).balance, owed, "MONEY-04");
        for (uint256 k = 0; k < _NODES; k++) {
            deposits += escrow.creditOf(_operator(k));
        }
        for (uint256 k = 0; k < _PAYERS; k++) {
            deposits += escrow.creditOf(_payer(k));
        }
        assertEq(address(escrow).balance, deposits, "MONEY-01 of the escrow");
    }

    /// STAKE-03: what a node had bonded when a batch was posted stays slashable until the batch, or its deadline, is over.
    function checkStake(uint256 clock) external view {
        for (uint256 i = 0; i < _batches.length; i++) {
            if (_isOver[i]) continue;
            bool late = clock > tabs.batchOf(_batches[i]).deadline;
            for (uint256 k = 0; k < _NODES; k++) {
                if (_bondedAtPost[i][k] == 0) continue;
                assertGt(registry.accountOf(_hot(k)).openDuties, 0, "STAKE-03: a batch is a duty");
                if (late) continue;
                uint256 slashed = _slashedOf(k) - _slashedAtPost[i][k];
                assertGe(registry.accountOf(_hot(k)).staked + slashed, _bondedAtPost[i][k], "STAKE-03");
            }
        }
    }

    /// MONEY-03: with every batch, request and tab at its end, nothing is left behind.
    function finish() external {
        for (uint256 k = 0; k < _NODES; k++) {
            assertEq(registry.accountOf(_hot(k)).openDuties, 0, "a duty that nobody closes");
            _withdraw(_operator(k));
        }
        for (uint256 i = 0; i < _PAYERS; i++) {
            _withdraw(_payer(i));
        }
        _withdraw(treasury);
        _withdraw(publisher);
        _withdraw(_CHALLENGER);
        assertEq(address(tabs).balance, _forced, "MONEY-03");
    }

    function _withdraw(address account) private {
        if (tabs.creditOf(account) != 0) tabs.withdrawCredit(account);
    }

    // ------------------------------------------------------------------------------------------------------------ views

    /// @dev The collector's, for each batch.
    function bond() public view returns (uint256) {
        return uint256(_tabTerms().tokensPerDraw) * FEE;
    }

    function leftOf(uint256 i) public view returns (uint256) {
        return _pots[i] - tabs.batchOf(_batches[i]).taken;
    }

    function onTabs() public view returns (uint256 sum) {
        for (uint256 i = 0; i < _PAYERS; i++) {
            sum += _tabBalance(i);
        }
    }

    function credits() public view returns (uint256 sum) {
        sum = tabs.creditOf(treasury) + tabs.creditOf(publisher) + tabs.creditOf(_CHALLENGER);
        for (uint256 k = 0; k < _NODES; k++) {
            sum += tabs.creditOf(_operator(k));
        }
        for (uint256 i = 0; i < _PAYERS; i++) {
            sum += tabs.creditOf(_payer(i));
        }
    }

    function _slashedOf(uint256 node) private view returns (uint256) {
        return STAKE - _takenOut[node] - registry.accountOf(_hot(node)).staked;
    }
}
