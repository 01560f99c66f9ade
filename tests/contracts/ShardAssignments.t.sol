// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

import {IShardAssignments, Model, Plan} from "../../contracts/interfaces/IShardAssignments.sol";
import {MerkleTree} from "../../contracts/libraries/MerkleTree.sol";
import {Assignment} from "../../contracts/types/Assignment.sol";
import {ModelId, PlanId} from "../../contracts/types/Identifiers.sol";
import {Swarm} from "./Swarm.sol";

/// @dev Specification: ShardAssignments.tree. Six units, nodes 0 to 3.
abstract contract ShardAssignmentsScenario is Swarm {
    ModelId internal _model;

    function setUp() public {
        _deployNetwork();
        _addNodes(0, 4);
        _model = _newModel(6);
    }

    /// @dev Three stages of two units; stage 1 has two replicas.
    function _threeStages() internal view returns (Assignment[] memory plan) {
        plan = new Assignment[](4);
        plan[0] = Assignment(0, 0, 0, 2, _hot(0), 10, EXECUTION_CLASS);
        plan[1] = Assignment(1, 0, 2, 4, _hot(1), 20, EXECUTION_CLASS);
        plan[2] = Assignment(1, 1, 2, 4, _hot(2), 20, EXECUTION_CLASS);
        plan[3] = Assignment(2, 0, 4, 6, _hot(3), 30, EXECUTION_CLASS);
    }

    function _consentsFor(Assignment[] memory plan, uint256 deadline) internal view returns (bytes[] memory) {
        bytes32 root = plan.length == 0 ? bytes32(0) : _merkleRoot(_leavesOf(plan));
        uint64 epoch = shards.nextEpoch(_model, publisher);
        return _consents(plan, _consentDigest(_model, publisher, epoch, FEE, MEASUREMENTS, root, deadline));
    }

    function _expectRefusal(Assignment[] memory plan, bytes memory reason) internal {
        bytes[] memory consents = _consentsFor(plan, block.timestamp);
        vm.expectRevert(reason);
        vm.prank(publisher);
        shards.publishPlan(_model, 1, FEE, MEASUREMENTS, plan, block.timestamp, consents);
    }
}

contract ShardAssignmentsTest is ShardAssignmentsScenario {
    // ----------------------------------------------------------------------------------------------------------- models

    function test_registerModel_isContentAddressedAndAnnounced() public {
        ModelId expected = ModelId.wrap(keccak256(abi.encode(keccak256("m"), keccak256("w"), uint32(9))));
        vm.expectEmit(address(shards));
        emit IShardAssignments.ModelRegistered(expected, requester, keccak256("m"), keccak256("w"), 9, "name");
        vm.prank(requester);
        ModelId model = shards.registerModel(keccak256("m"), keccak256("w"), 9, "name");
        assertEq(ModelId.unwrap(model), ModelId.unwrap(expected));
        Model memory stored = shards.modelOf(model);
        assertEq(stored.manifestHash, keccak256("m"));
        assertEq(stored.weightRoot, keccak256("w"));
        assertEq(stored.unitCount, 9);
    }

    function test_registerModel_twice_reverts() public {
        ModelId model = shards.registerModel(keccak256("m"), keccak256("w"), 9, "name");
        vm.expectRevert(abi.encodeWithSelector(IShardAssignments.ModelAlreadyRegistered.selector, model));
        shards.registerModel(keccak256("m"), keccak256("w"), 9, "another name");
    }

    function test_registerModel_withoutContent_reverts() public {
        vm.expectRevert(IShardAssignments.ModelEmpty.selector);
        shards.registerModel(0, keccak256("w"), 9, "");
        vm.expectRevert(IShardAssignments.ModelEmpty.selector);
        shards.registerModel(keccak256("m"), 0, 9, "");
        vm.expectRevert(IShardAssignments.ModelEmpty.selector);
        shards.registerModel(keccak256("m"), keccak256("w"), 0, "");
    }

    function test_modelOf_unknown_reverts() public {
        ModelId unknown = ModelId.wrap(keccak256("unknown"));
        vm.expectRevert(abi.encodeWithSelector(IShardAssignments.ModelUnknown.selector, unknown));
        shards.modelOf(unknown);
    }

    // -------------------------------------------------------------------------------------------------------- documents

    function test_announce_byAnybody_emitsTheDocumentUnderItsHash() public {
        bytes memory document = bytes("manifest");
        for (uint256 i = 0; i < 2; i++) {
            vm.expectEmit(address(shards));
            emit IShardAssignments.DocumentAnnounced(keccak256("manifest"), document);
            vm.prank(requester);
            assertEq(shards.announce(document), keccak256("manifest"), "again and again");
        }
    }

    function test_announce_upToTheLimit_isTaken() public {
        shards.announce("");
        bytes memory largest = new bytes(96 * 1024);
        largest[largest.length - 1] = 0x01;
        vm.expectEmit(address(shards));
        emit IShardAssignments.DocumentAnnounced(keccak256(largest), largest);
        assertEq(shards.announce(largest), keccak256(largest));
    }

    function test_announce_aboveTheLimit_reverts() public {
        vm.expectRevert(abi.encodeWithSelector(IShardAssignments.DocumentTooLarge.selector, 98_304, 98_305));
        shards.announce(new bytes(98_305));
    }

    // ---------------------------------------------------------------------------------------------------------- publish

    function test_publishPlan_withConsentOfAll_isStoredAndCarriedByTheEvent() public {
        Assignment[] memory plan = _threeStages();
        bytes[] memory consents = _consentsFor(plan, block.timestamp);
        bytes32 root = _merkleRoot(_leavesOf(plan));
        uint64 effectiveAt = uint64(block.timestamp) + shards.planActivationDelay();
        PlanId expected =
            PlanId.wrap(keccak256(abi.encode(block.chainid, address(shards), publisher, _model, uint64(1))));
        vm.expectEmit(address(shards));
        emit IShardAssignments.PlanPublished(expected, _model, publisher, 1, effectiveAt, FEE, root, MEASUREMENTS, plan);
        vm.prank(publisher);
        PlanId id = shards.publishPlan(_model, 1, FEE, MEASUREMENTS, plan, block.timestamp, consents);

        assertEq(PlanId.unwrap(id), PlanId.unwrap(expected));
        Plan memory stored = shards.planOf(id);
        assertEq(ModelId.unwrap(stored.modelId), ModelId.unwrap(_model));
        assertEq(stored.publisher, publisher);
        assertEq(stored.epoch, 1);
        assertEq(stored.effectiveAt, effectiveAt);
        assertEq(stored.stageCount, 3);
        assertEq(stored.feePerToken, FEE);
        assertEq(stored.root, root);
        assertEq(stored.measurementsHash, MEASUREMENTS);
        assertEq(shards.nextEpoch(_model, publisher), 2);
        assertEq(shards.nextEpoch(_model, requester), 1, "each publisher counts for himself");
    }

    function test_publishPlan_pendingNodes_areAccepted() public {
        _addNode(4, STAKE);
        Assignment[] memory plan = _threeStages();
        plan[0].node = _hot(4);
        _publish(_model, FEE, plan);
    }

    function test_activePlan_changesOnlyAfterTheDelay() public {
        uint64 delay = shards.planActivationDelay();
        PlanId first = _publish(_model, FEE, _threeStages());
        _assertActive(PlanId.wrap(0));
        vm.warp(block.timestamp + delay);
        _assertActive(first);
        PlanId second = _publish(_model, 2 * FEE, _threeStages());
        vm.warp(block.timestamp + 1);
        PlanId third = _publish(_model, 3 * FEE, _threeStages());
        _assertActive(first);
        vm.warp(block.timestamp + delay - 1);
        _assertActive(second);
        vm.warp(block.timestamp + 1);
        _assertActive(third);
        assertEq(PlanId.unwrap(shards.activePlan(_model, requester)), 0);
    }

    function test_isAssigned_everyLeafAndNothingElse() public {
        Assignment[] memory plan = _threeStages();
        PlanId id = _publish(_model, FEE, plan);
        bytes32[] memory leaves = _leavesOf(plan);
        for (uint256 i = 0; i < plan.length; i++) {
            bytes32[] memory proof = _merkleProof(leaves, i);
            assertTrue(shards.isAssigned(id, plan[i], proof));
            assertFalse(shards.isAssigned(PlanId.wrap(0), plan[i], proof), "of no plan");
            assertFalse(shards.isAssigned(id, plan[i], _merkleProof(leaves, (i + 1) % plan.length)), "wrong proof");
            plan[i].workWeight++;
            assertFalse(shards.isAssigned(id, plan[i], proof), "another leaf");
            plan[i].workWeight--;
        }
        assertFalse(shards.isAssigned(id, plan[0], new bytes32[](0)));
    }

    // ------------------------------------------------------------------------------------------------------- refusals

    function test_publishPlan_ofAnUnknownModel_reverts() public {
        ModelId unknown = ModelId.wrap(keccak256("unknown"));
        vm.expectRevert(abi.encodeWithSelector(IShardAssignments.ModelUnknown.selector, unknown));
        shards.publishPlan(unknown, 1, FEE, MEASUREMENTS, _threeStages(), block.timestamp, new bytes[](4));
    }

    function test_publishPlan_withAnotherEpoch_reverts() public {
        uint64[2] memory wrong = [uint64(0), 2];
        for (uint256 i = 0; i < wrong.length; i++) {
            vm.expectRevert(abi.encodeWithSelector(IShardAssignments.WrongEpoch.selector, 1, wrong[i]));
            shards.publishPlan(_model, wrong[i], FEE, MEASUREMENTS, _threeStages(), block.timestamp, new bytes[](4));
        }
    }

    function test_publishPlan_withoutFee_reverts() public {
        vm.expectRevert(abi.encodeWithSelector(IShardAssignments.FeeOutOfRange.selector, 1, 0));
        shards.publishPlan(_model, 1, 0, MEASUREMENTS, _threeStages(), block.timestamp, new bytes[](4));
    }

    function test_publishPlan_withoutAssignments_reverts() public {
        _expectRefusal(new Assignment[](0), abi.encodeWithSelector(IShardAssignments.PlanEmpty.selector));
    }

    function test_publishPlan_withTooManyAssignments_reverts() public {
        vm.expectRevert(abi.encodeWithSelector(IShardAssignments.TooManyAssignments.selector, 256, 257));
        shards.publishPlan(_model, 1, FEE, MEASUREMENTS, new Assignment[](257), block.timestamp, new bytes[](257));
    }

    function test_publishPlan_withTooManyStages_reverts() public {
        ModelId model = _newModel(33);
        Assignment[] memory plan = new Assignment[](33);
        for (uint16 i = 0; i < 33; i++) {
            plan[i] = Assignment(i, 0, i, i + 1, _hot(i % 4), 1, EXECUTION_CLASS);
        }
        vm.expectRevert(abi.encodeWithSelector(IShardAssignments.TooManyStages.selector, 32, 33));
        shards.publishPlan(model, 1, FEE, MEASUREMENTS, plan, block.timestamp, new bytes[](33));
    }

    function test_publishPlan_outOfOrder_reverts() public {
        Assignment[] memory plan = _threeStages();
        plan[0].stage = 1;
        _expectRefusal(plan, abi.encodeWithSelector(IShardAssignments.AssignmentOutOfOrder.selector, 0));
        plan = _threeStages();
        plan[0].replica = 1;
        _expectRefusal(plan, abi.encodeWithSelector(IShardAssignments.AssignmentOutOfOrder.selector, 0));
        plan = _threeStages();
        plan[2].replica = 2;
        _expectRefusal(plan, abi.encodeWithSelector(IShardAssignments.AssignmentOutOfOrder.selector, 2));
        plan = _threeStages();
        plan[2].stage = 2;
        _expectRefusal(plan, abi.encodeWithSelector(IShardAssignments.AssignmentOutOfOrder.selector, 2));
        plan = _threeStages();
        plan[3].stage = 3;
        _expectRefusal(plan, abi.encodeWithSelector(IShardAssignments.AssignmentOutOfOrder.selector, 3));
        plan = _threeStages();
        (plan[0], plan[3]) = (plan[3], plan[0]);
        _expectRefusal(plan, abi.encodeWithSelector(IShardAssignments.AssignmentOutOfOrder.selector, 0));
    }

    function test_publishPlan_withAGapOrAnOverlap_reverts() public {
        Assignment[] memory plan = _threeStages();
        plan[3].firstUnit = 5;
        _expectRefusal(plan, abi.encodeWithSelector(IShardAssignments.UnitsNotCovered.selector, 4, 5));
        plan[3].firstUnit = 3;
        _expectRefusal(plan, abi.encodeWithSelector(IShardAssignments.UnitsNotCovered.selector, 4, 3));
        plan = _threeStages();
        plan[3].endUnit = 5;
        _expectRefusal(plan, abi.encodeWithSelector(IShardAssignments.UnitsNotCovered.selector, 5, 6));
        plan[3].endUnit = 7;
        _expectRefusal(plan, abi.encodeWithSelector(IShardAssignments.UnitsNotCovered.selector, 7, 6));
        plan = _threeStages();
        plan[0].firstUnit = 1;
        _expectRefusal(plan, abi.encodeWithSelector(IShardAssignments.UnitsNotCovered.selector, 0, 1));
    }

    function test_publishPlan_withUnlikeReplicas_reverts() public {
        Assignment[] memory plan = _threeStages();
        plan[2].endUnit = 3;
        _expectRefusal(plan, abi.encodeWithSelector(IShardAssignments.ReplicaRangeMismatch.selector, 2));
        plan = _threeStages();
        plan[2].firstUnit = 3;
        _expectRefusal(plan, abi.encodeWithSelector(IShardAssignments.ReplicaRangeMismatch.selector, 2));
    }

    function test_publishPlan_withAnEmptyOrInvertedStage_reverts() public {
        Assignment[] memory plan = _threeStages();
        plan[0].endUnit = 0;
        _expectRefusal(plan, abi.encodeWithSelector(IShardAssignments.EmptyStage.selector, 0));
        plan = _threeStages();
        plan[3].endUnit = 3;
        _expectRefusal(plan, abi.encodeWithSelector(IShardAssignments.EmptyStage.selector, 3));
    }

    function test_publishPlan_withoutWeightOrClass_reverts() public {
        Assignment[] memory plan = _threeStages();
        plan[1].workWeight = 0;
        _expectRefusal(plan, abi.encodeWithSelector(IShardAssignments.WorkWeightZero.selector, 1));
        plan = _threeStages();
        plan[2].executionClass = 0;
        _expectRefusal(plan, abi.encodeWithSelector(IShardAssignments.ExecutionClassMissing.selector, 2));
    }

    function test_publishPlan_withAbsentJailedOrExitingNode_reverts() public {
        Assignment[] memory plan = _threeStages();
        _know(9);
        plan[0].node = _hot(9);
        _expectRefusal(plan, abi.encodeWithSelector(IShardAssignments.NodeNotServing.selector, _hot(9)));
        plan = _threeStages();
        vm.prank(address(verification));
        registry.jail(_hot(3), uint64(block.timestamp + 1));
        _expectRefusal(plan, abi.encodeWithSelector(IShardAssignments.NodeNotServing.selector, _hot(3)));
        vm.prank(_operator(2));
        registry.beginExit(_hot(2));
        _expectRefusal(plan, abi.encodeWithSelector(IShardAssignments.NodeNotServing.selector, _hot(2)));
    }

    function test_publishPlan_afterTheConsentsExpired_reverts() public {
        Assignment[] memory plan = _threeStages();
        uint256 deadline = block.timestamp;
        bytes[] memory consents = _consentsFor(plan, deadline);
        vm.warp(deadline + 1);
        vm.expectRevert(abi.encodeWithSelector(IShardAssignments.ConsentExpired.selector, deadline, deadline + 1));
        vm.prank(publisher);
        shards.publishPlan(_model, 1, FEE, MEASUREMENTS, plan, deadline, consents);
    }

    function test_publishPlan_withAConsentMissing_reverts() public {
        Assignment[] memory plan = _threeStages();
        vm.expectRevert(abi.encodeWithSelector(IShardAssignments.ConsentCountMismatch.selector, 4, 3));
        vm.prank(publisher);
        shards.publishPlan(_model, 1, FEE, MEASUREMENTS, plan, block.timestamp, new bytes[](3));
    }

    function test_publishPlan_withAConsentToAnythingElse_reverts() public {
        Assignment[] memory plan = _threeStages();
        uint256 deadline = block.timestamp + 1;
        bytes[] memory consents = _consentsFor(plan, deadline);
        // Somebody else's plan, another fee, other measurements, another deadline, another leaf, another node's signature.
        _expectConsentInvalid(requester, FEE, MEASUREMENTS, plan, deadline, consents, 0);
        _expectConsentInvalid(publisher, FEE + 1, MEASUREMENTS, plan, deadline, consents, 0);
        _expectConsentInvalid(publisher, FEE, keccak256("cooked"), plan, deadline, consents, 0);
        _expectConsentInvalid(publisher, FEE, MEASUREMENTS, plan, deadline + 1, consents, 0);
        plan[3].workWeight++;
        _expectConsentInvalid(publisher, FEE, MEASUREMENTS, plan, deadline, consents, 0);
        plan[3].workWeight--;
        consents[2] = consents[1];
        _expectConsentInvalid(publisher, FEE, MEASUREMENTS, plan, deadline, consents, 2);
        consents[2] = "";
        _expectConsentInvalid(publisher, FEE, MEASUREMENTS, plan, deadline, consents, 2);
    }

    function test_publishPlan_withAMalleatedConsent_reverts() public {
        Assignment[] memory plan = _threeStages();
        bytes[] memory consents = _consentsFor(plan, block.timestamp);
        consents[1] = _malleated(consents[1]);
        _expectConsentInvalid(publisher, FEE, MEASUREMENTS, plan, block.timestamp, consents, 1);
    }

    function test_planOf_unknown_reverts() public {
        PlanId unknown = PlanId.wrap(keccak256("unknown"));
        vm.expectRevert(abi.encodeWithSelector(IShardAssignments.PlanUnknown.selector, unknown));
        shards.planOf(unknown);
    }

    function test_constructor_delayOutOfRange_reverts() public {
        uint64 tooLong = 30 days + 1;
        vm.expectRevert(
            abi.encodeWithSelector(IShardAssignments.ActivationDelayOutOfRange.selector, uint256(30 days), tooLong)
        );
        this.create("ShardAssignments", abi.encode(registry, tooLong));
    }

    // -------------------------------------------------------------------------------------------------------- shorthand

    function _assertActive(PlanId expected) private view {
        assertEq(PlanId.unwrap(shards.activePlan(_model, publisher)), PlanId.unwrap(expected));
    }

    function _expectConsentInvalid(
        address by,
        uint128 fee,
        bytes32 measurements,
        Assignment[] memory plan,
        uint256 deadline,
        bytes[] memory consents,
        uint256 index
    ) private {
        vm.expectRevert(abi.encodeWithSelector(IShardAssignments.ConsentInvalid.selector, plan[index].node));
        vm.prank(by);
        shards.publishPlan(_model, 1, fee, measurements, plan, deadline, consents);
    }
}

/// @dev The library's functions as calls.
contract MerkleTreeHarness {
    function rootOf(bytes32[] memory leaves) external pure returns (bytes32) {
        return MerkleTree.rootOf(leaves);
    }
}

contract ShardAssignmentsFuzzTest is ShardAssignmentsScenario {
    /// PLAN-01: a plan is accepted exactly if it covers each unit once per replica chain, by the definition and not by the code.
    function testFuzz_PLAN_01_publishPlan_acceptsExactlyTheCoverings(uint256 seed) public {
        Assignment[] memory plan = _anyPlan(seed);
        bool covers = _covers(plan, 6);
        bytes[] memory consents = _consentsFor(plan, block.timestamp);
        vm.prank(publisher);
        try shards.publishPlan(_model, 1, FEE, MEASUREMENTS, plan, block.timestamp, consents) returns (PlanId id) {
            assertTrue(covers, "accepted a plan that does not cover the model");
            assertEq(shards.planOf(id).root, _merkleRoot(_leavesOf(plan)));
        } catch {
            assertFalse(covers, "refused a plan that covers the model");
        }
    }

    /// @dev Guards the fuzz above against being one-sided: both outcomes occur among the first seeds.
    function test_PLAN_01_anyPlan_isSometimesACoveringAndSometimesNot() public view {
        uint256 coverings;
        for (uint256 seed = 0; seed < 64; seed++) {
            if (_covers(_anyPlan(uint256(keccak256(abi.encode(seed)))), 6)) coverings++;
        }
        assertGt(coverings, 8);
        assertLt(coverings, 56);
    }

    function testFuzz_merkle_equalsTheDefinitionAndEveryLeafProves(uint256 seed, uint8 size) public {
        uint256 count = bound(size, 1, 40);
        bytes32[] memory leaves = new bytes32[](count);
        for (uint256 i = 0; i < count; i++) {
            leaves[i] = keccak256(abi.encode(seed, i));
        }
        bytes32 root = _merkleRoot(leaves);
        assertEq(new MerkleTreeHarness().rootOf(leaves), root);
        uint256 index = seed % count;
        bytes32 node = leaves[index];
        bytes32[] memory proof = _merkleProof(leaves, index);
        for (uint256 i = 0; i < proof.length; i++) {
            node = _pair(node, proof[i]);
        }
        assertEq(node, root);
    }

    function testFuzz_isAssigned_foreignLeaf_isRefused(uint256 seed, Assignment memory foreign) public {
        Assignment[] memory plan = _threeStages();
        PlanId id = _publish(_model, FEE, plan);
        bytes32[] memory leaves = _leavesOf(plan);
        for (uint256 i = 0; i < leaves.length; i++) {
            vm.assume(_leafOf(foreign) != leaves[i]);
        }
        assertFalse(shards.isAssigned(id, foreign, _merkleProof(leaves, seed % leaves.length)));
        assertFalse(shards.isAssigned(id, foreign, new bytes32[](0)));
    }

    /// @dev A covering of 6 units with up to three replicas, in half of the cases with one field changed.
    function _anyPlan(uint256 seed) private view returns (Assignment[] memory plan) {
        plan = new Assignment[](12);
        uint256 count;
        uint32 unit;
        uint16 stage;
        while (unit < 6) {
            uint32 end = unit + 1 + uint32(uint256(keccak256(abi.encode(seed, "end", stage))) % (6 - unit));
            uint256 replicas = 1 + uint256(keccak256(abi.encode(seed, "replicas", stage))) % 2;
            for (uint16 i = 0; i < replicas; i++) {
                plan[count] = Assignment(stage, i, unit, end, _hot(count % 4), 1, EXECUTION_CLASS);
                count++;
            }
            unit = end;
            stage++;
        }
        assembly ("memory-safe") {
            mstore(plan, count)
        }
        if (seed % 2 == 0) return plan;
        uint256 change = uint256(keccak256(abi.encode(seed, "change")));
        Assignment memory target = plan[(change >> 8) % count];
        uint32 value = uint32((change >> 16) % 8);
        if (change % 4 == 0) target.firstUnit = value;
        else if (change % 4 == 1) target.endUnit = value;
        else if (change % 4 == 2) target.stage = uint16(value);
        else target.replica = uint16(value);
    }

    /// @dev By the definition: for each stage a block of replicas 0..k with one range, and every unit in exactly one stage's range.
    function _covers(Assignment[] memory plan, uint32 unitCount) private pure returns (bool) {
        uint256[] memory covered = new uint256[](unitCount);
        for (uint256 i = 0; i < plan.length; i++) {
            Assignment memory item = plan[i];
            bool first = item.replica == 0;
            if (i == 0 && (item.stage != 0 || !first)) return false;
            if (i > 0) {
                Assignment memory before = plan[i - 1];
                bool nextReplica = item.stage == before.stage && item.replica == before.replica + 1;
                bool nextStage = item.stage == before.stage + 1 && first && item.firstUnit == before.endUnit;
                if (!nextReplica && !nextStage) return false;
                if (nextReplica && (item.firstUnit != before.firstUnit || item.endUnit != before.endUnit)) {
                    return false;
                }
            }
            if (item.endUnit > unitCount || item.firstUnit >= item.endUnit) return false;
            if (!first) continue;
            for (uint32 unit = item.firstUnit; unit < item.endUnit; unit++) {
                covered[unit]++;
            }
        }
        for (uint256 unit = 0; unit < unitCount; unit++) {
            if (covered[unit] != 1) return false;
        }
        return true;
    }
}
