// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

import {console} from "forge-std/console.sol";

import {IShardAssignments, Plan} from "../../../contracts/interfaces/IShardAssignments.sol";
import {Assignment} from "../../../contracts/types/Assignment.sol";
import {ModelId, PlanId} from "../../../contracts/types/Identifiers.sol";
import {Swarm} from "../Swarm.sol";

/// @notice PLAN-01: whatever is published, in whatever order and by whomever, the plan in effect is the latest whose delay is over, and it
///         covers each unit exactly once per replica chain.
contract PlanInvariantTest is Swarm {
    uint256 private constant ACTIONS = 4;
    uint32 private constant UNITS = 6;
    /// Steps of a run, as foundry.toml has it; after the free ones, actions never performed yet come first.
    uint256 private constant RUN = 64;
    uint256 private constant FREE_STEPS = 40;

    uint256[ACTIONS] private _counts;
    uint256 private _steps;
    uint256 private _clock;
    ModelId private _model;
    PlanId[] private _published;
    mapping(PlanId id => Assignment[]) private _content;

    function setUp() public {
        _deployNetwork();
        _addNodes(0, 4);
        _model = _newModel(UNITS);
        _clock = block.timestamp;
        targetContract(address(this));
        bytes4[] memory selectors = new bytes4[](1);
        selectors[0] = this.step.selector;
        targetSelector(FuzzSelector(address(this), selectors));
    }

    /// forge-config: default.invariant.fail-on-revert = true
    /// forge-config: default.invariant.shrink-run-limit = 200
    function invariant_PLAN_01() public {
        vm.warp(_clock);
        PlanId expected;
        for (uint256 i = 0; i < _published.length; i++) {
            Plan memory plan = shards.planOf(_published[i]);
            assertEq(plan.epoch, i + 1);
            if (plan.effectiveAt <= _clock) expected = _published[i];
        }
        PlanId active = shards.activePlan(_model, publisher);
        assertEq(PlanId.unwrap(active), PlanId.unwrap(expected), "the latest whose delay is over");
        assertEq(shards.nextEpoch(_model, publisher), _published.length + 1);
        if (PlanId.unwrap(active) == 0) return;
        Assignment[] memory content = _content[active];
        assertEq(shards.planOf(active).root, _merkleRoot(_leavesOf(content)), "the root is that of what was published");
        uint256[] memory covered = new uint256[](UNITS);
        uint16[] memory replicas = new uint16[](UNITS);
        for (uint256 i = 0; i < content.length; i++) {
            for (uint32 unit = content[i].firstUnit; unit < content[i].endUnit; unit++) {
                covered[unit]++;
                if (content[i].replica >= replicas[unit]) replicas[unit] = content[i].replica + 1;
            }
        }
        for (uint256 unit = 0; unit < UNITS; unit++) {
            assertGt(covered[unit], 0, "PLAN-01: a unit without a node");
            assertEq(covered[unit], replicas[unit], "PLAN-01: once per replica chain");
        }
    }

    /// @dev A run in which an action was never performed fails. What is shorter than a run is the replay of a shrunk failure.
    function afterInvariant() public view {
        if (_steps < RUN) return;
        for (uint256 i = 0; i < ACTIONS; i++) {
            assertGt(_counts[i], 0, string.concat("action never performed: ", vm.toString(i)));
            console.log("action", i, _counts[i]);
        }
    }

    function test_handler_performsEveryActionInARun() public {
        for (uint256 i = 0; i < RUN; i++) {
            this.step(uint256(keccak256(abi.encode(i))));
        }
        afterInvariant();
    }

    function step(uint256 seed) external {
        vm.warp(_clock);
        uint256 action = seed % ACTIONS;
        if (++_steps > FREE_STEPS) {
            for (uint256 i = 0; i < ACTIONS; i++) {
                if (_counts[i] == 0) action = i;
            }
        }
        uint256 noise = uint256(keccak256(abi.encode(seed, _steps)));
        if (action == 0) _publishCovering(noise);
        else if (action == 1) _publishBroken(noise);
        else if (action == 2) _publishWithoutConsent(noise);
        else vm.warp(block.timestamp + noise % 60);
        _counts[action]++;
        _clock = block.timestamp;
    }

    function _publishCovering(uint256 noise) private {
        Assignment[] memory plan = _covering(noise);
        PlanId id = _publish(_model, FEE, plan);
        _published.push(id);
        for (uint256 i = 0; i < plan.length; i++) {
            _content[id].push(plan[i]);
        }
    }

    /// @dev Any one unit boundary moved breaks the cover.
    function _publishBroken(uint256 noise) private {
        Assignment[] memory plan = _covering(noise);
        Assignment memory broken = plan[noise % plan.length];
        if (noise % 2 == 0) broken.endUnit++;
        else broken.firstUnit++;
        _expectRefused(plan, _sign(0, "not asked"));
    }

    function _publishWithoutConsent(uint256 noise) private {
        Assignment[] memory plan = _covering(noise);
        _expectRefused(plan, _sign(noise % 4, keccak256("something else")));
    }

    function _expectRefused(Assignment[] memory plan, bytes memory signature) private {
        bytes[] memory consents = new bytes[](plan.length);
        for (uint256 i = 0; i < consents.length; i++) {
            consents[i] = signature;
        }
        uint64 epoch = shards.nextEpoch(_model, publisher);
        vm.prank(publisher);
        (bool done,) = address(shards)
            .call(
                abi.encodeCall(
                    IShardAssignments.publishPlan, (_model, epoch, FEE, MEASUREMENTS, plan, block.timestamp, consents)
                )
            );
        assertFalse(done, "PLAN-01");
    }

    function _covering(uint256 noise) private view returns (Assignment[] memory plan) {
        plan = new Assignment[](12);
        uint256 count;
        uint32 unit;
        for (uint16 stage = 0; unit < UNITS; stage++) {
            uint32 end = unit + 1 + uint32((noise >> (8 * stage)) % (UNITS - unit));
            uint16 replicas = 1 + uint16((noise >> (8 * stage + 128)) % 2);
            for (uint16 i = 0; i < replicas; i++) {
                plan[count++] = Assignment(stage, i, unit, end, _hot((count + noise) % 4), 1, EXECUTION_CLASS);
            }
            unit = end;
        }
        assembly ("memory-safe") {
            mstore(plan, count)
        }
    }
}
