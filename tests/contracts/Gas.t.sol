// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

import {HandOver} from "../../contracts/interfaces/IOutputVerification.sol";
import {Assignment} from "../../contracts/types/Assignment.sol";
import {PlanId, RequestId} from "../../contracts/types/Identifiers.sol";
import {Swarm} from "./Swarm.sol";

/// @notice What the calls off the main path of a request cost, with four stages and seven nodes, and how large the contracts are: written to
///         tests/contracts/snapshots, so that a change shows in a diff. Lifecycle.json, the main path, comes from Smoke.t.sol.
/// forge-config: default.isolate = true
contract GasTest is Swarm {
    uint256 private constant STAGES = 4;
    uint256 private constant NODES = 7;

    function test_gas_operators() public {
        _deployNetwork();
        _addNode(0, STAKE);
        vm.snapshotGasLastCall("Operators", "register");
        _addNodes(1, NODES - 1);
        vm.deal(_operator(0), 10 ether);
        vm.startPrank(_operator(0));
        registry.addStake{value: 1 ether}(_hot(0));
        vm.snapshotGasLastCall("Operators", "addStake");
        registry.changeEndpoint(_hot(0), CERTIFICATE_HASH, HOST);
        vm.snapshotGasLastCall("Operators", "changeEndpoint");
        registry.thaw(_hot(0), 1 ether);
        vm.snapshotGasLastCall("Operators", "thaw");
        vm.warp(registry.accountOf(_hot(0)).thawEnd);
        registry.withdraw(_hot(0));
        vm.snapshotGasLastCall("Operators", "withdraw");
        registry.beginExit(_hot(0));
        vm.snapshotGasLastCall("Operators", "beginExit");
        vm.warp(registry.accountOf(_hot(0)).thawEnd);
        registry.withdraw(_hot(0));
        vm.snapshotGasLastCall("Operators", "withdraw, exit");
        vm.stopPrank();
        _newModel(8);
        vm.snapshotGasLastCall("Operators", "registerModel");
        shards.announce(_document(10 * 1024));
        vm.snapshotGasLastCall("Operators", "announce, 10 KiB");
        shards.announce(_document(96 * 1024));
        vm.snapshotGasLastCall("Operators", "announce, 96 KiB");
        _publish(_newModel(8), FEE, _chainOf(STAGES, 1));
        vm.snapshotGasLastCall("Operators", "publishPlan, 4 assignments");
    }

    /// @dev No zero bytes: those cost a quarter.
    function _document(uint256 size) private pure returns (bytes memory document) {
        document = new bytes(size);
        for (uint256 i = 0; i < size; i++) {
            document[i] = 0xff;
        }
    }

    /// @dev What a requester pays who chooses the route, beside `open` and `route` by the publisher.
    function test_gas_openRouted() public {
        _deployNetwork();
        _addNodes(0, NODES);
        PlanId plan = _newPlan(STAGES);
        (Assignment[] memory route, bytes32[][] memory proofs) = _routeOver(plan, new uint16[](STAGES));
        uint256 due = escrow.quote(plan, 64, 64);
        vm.deal(requester, due);
        vm.prank(requester);
        escrow.openRouted{value: due}(plan, 1, keccak256("input"), keccak256("secret"), 64, 64, route, proofs);
        vm.snapshotGasLastCall("Operators", "openRouted, 4 stages");
    }

    function test_gas_disputes() public {
        _deployNetwork();
        _addNodes(0, NODES);
        PlanId plan = _newPlan(STAGES);
        RequestId id = _challengeableRequest(plan, NODES);
        vm.deal(address(this), 1 ether);
        verification.challenge{value: 1 ether}(id, 0);
        vm.snapshotGasLastCall("Disputes", "challenge");
        _attestHonestly(id, NODES);
        _revealMembers(id);
        verification.tally(id, 0, 0);
        vm.snapshotGasLastCall("Disputes", "tally of 6 reveals, backup round");

        id = _drawnRequest(plan);
        for (uint256 i = 1; i < NODES; i++) {
            _attest(id, 0, _hot(i), _moved(_truth(id, 0), 500 * i));
        }
        _endAttesting(id);
        _revealAllStages(id);
        _revealMembers(id);
        verification.tallyWithoutQuorum(id, 0);
        vm.snapshotGasLastCall("Disputes", "tallyWithoutQuorum of 6 reveals");

        vm.warp(uint256(escrow.requestOf(id).deadline) + 1);
        escrow.claimRefund(id);
        vm.snapshotGasLastCall("Disputes", "claimRefund");
        escrow.withdrawCredit(requester);
        vm.snapshotGasLastCall("Disputes", "withdrawCredit");

        id = _newRequest(plan);
        HandOver memory first = HandOver(id, 0, true, 4, "a");
        HandOver memory second = HandOver(id, 0, true, 4, "b");
        bytes memory one = _signHandOver(0, first);
        bytes memory two = _signHandOver(0, second);
        verification.reportEquivocation(first, one, second, two, _hot(0));
        vm.snapshotGasLastCall("Disputes", "reportEquivocation");
    }

    /// EIP-170: what is larger cannot be deployed.
    function test_size_everyContract_fitsTheChain() public {
        _deployNetwork();
        _size("NodeRegistry", address(registry));
        _size("ShardAssignments", address(shards));
        _size("InferenceEscrow", address(escrow));
        _size("OutputVerification", address(verification));
        _size("RequestTabs", address(tabs));
    }

    function _size(string memory name, address target) private {
        vm.snapshotValue("Sizes", name, target.code.length);
        assertGt(target.code.length, 0, name);
        assertLt(target.code.length, 24_576, name);
    }
}
