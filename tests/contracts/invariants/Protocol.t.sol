// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

import {console} from "forge-std/console.sol";

import {ProtocolHandler} from "./ProtocolHandler.sol";

/// @notice All four contracts under many requests at once; the ids are those of PROPERTIES.md.
contract ProtocolInvariantTest is ProtocolHandler {
    function setUp() public {
        _begin();
        // The handler is this contract: as a test contract it may be larger than the chain allows.
        targetContract(address(this));
        bytes4[] memory selectors = new bytes4[](1);
        selectors[0] = ProtocolHandler.step.selector;
        targetSelector(FuzzSelector(address(this), selectors));
    }

    /// forge-config: default.invariant.fail-on-revert = true
    /// forge-config: default.invariant.shrink-run-limit = 200
    function invariant_MONEY_STAKE_CDV_ROLE() public view {
        _check();
    }

    function test_handler_performsEveryActionInARun() public {
        for (uint256 i = 0; i < RUN; i++) {
            this.step(uint256(keccak256(abi.encode(i))));
            _check();
        }
        _finish();
    }

    /// MONEY-03, and the honesty of the handler: a run in which an action was never performed fails.
    function afterInvariant() public {
        _finish();
        for (uint256 i = 0; i < ACTIONS; i++) {
            console.log("action", i, counts[i]);
        }
        console.log("guarded tallies, of backup rounds, slashes", guardedTallies, guardedBackupTallies, slashes);
    }
}
