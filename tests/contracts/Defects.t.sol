// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

import {RequestStatus} from "../../contracts/interfaces/IInferenceEscrow.sol";
import {INodeRegistry, NodeAccount, SlashReason} from "../../contracts/interfaces/INodeRegistry.sol";
import {HandOver, IOutputVerification, Phase} from "../../contracts/interfaces/IOutputVerification.sol";
import {IShardAssignments} from "../../contracts/interfaces/IShardAssignments.sol";
import {Assignment} from "../../contracts/types/Assignment.sol";
import {ModelId, PlanId, RequestId} from "../../contracts/types/Identifiers.sol";
import {Refuser} from "./Recipients.sol";
import {Swarm} from "./Swarm.sol";

/// @notice Defects found in published contracts of this field, one test each: these contracts must not have them. DEFECT-01 to DEFECT-10
///         of PROPERTIES.md say where each was found.
contract DefectsTest is Swarm {
    PlanId private _plan;

    function setUp() public {
        _deployNetwork();
        _addNodes(0, 7);
        _plan = _newPlan(2);
    }

    function _slashAll(uint256 i) private returns (uint256) {
        vm.prank(address(verification));
        return registry.slash(_hot(i), STAKE, SlashReason.IncorrectOutput, new address[](0), new uint256[](0));
    }

    /// A slash that walks only thaws still running lets stake escape that has matured but is not withdrawn yet.
    function test_defect_01_slashSkipsMaturedThaws() public {
        vm.prank(_operator(0));
        registry.thaw(_hot(0), STAKE / 2);
        vm.warp(uint256(registry.accountOf(_hot(0)).thawEnd) + 100 days);
        assertEq(_slashAll(0), STAKE);
        vm.prank(_operator(0));
        vm.expectRevert(abi.encodeWithSelector(INodeRegistry.NothingToWithdraw.selector, _hot(0)));
        registry.withdraw(_hot(0));
    }

    /// `delete pending[i]; emit Removed(pending[i].amount)` always says 0.
    function test_defect_02_withdrawEventSaysZero() public {
        vm.prank(_operator(0));
        registry.thaw(_hot(0), 3 ether);
        vm.warp(registry.accountOf(_hot(0)).thawEnd);
        vm.expectEmit(address(registry));
        emit INodeRegistry.StakeWithdrawn(_hot(0), _operator(0), 3 ether, STAKE - 3 ether);
        vm.prank(_operator(0));
        registry.withdraw(_hot(0));
        vm.prank(_operator(1));
        registry.beginExit(_hot(1));
        vm.warp(registry.accountOf(_hot(1)).thawEnd);
        vm.expectEmit(address(registry));
        emit INodeRegistry.StakeWithdrawn(_hot(1), _operator(1), STAKE, 0);
        vm.prank(_operator(1));
        registry.withdraw(_hot(1));
    }

    /// Results of transfers that are ignored lose money in silence; a period that its owner can change moves the goalposts.
    function test_defect_03_transferResultsIgnoredAndPeriodsMoved() public {
        Refuser refuser = new Refuser();
        _know(9);
        vm.deal(address(refuser), STAKE);
        bytes memory proof = _nodeKeyProof(9, address(refuser), CERTIFICATE_HASH, HOST, block.timestamp);
        vm.startPrank(address(refuser));
        registry.register{value: STAKE}(_hot(9), CERTIFICATE_HASH, HOST, block.timestamp, proof);
        registry.thaw(_hot(9), 1 ether);
        vm.warp(registry.accountOf(_hot(9)).thawEnd);
        vm.expectRevert(
            abi.encodeWithSelector(INodeRegistry.TransferFailed.selector, address(refuser), uint256(1 ether))
        );
        registry.withdraw(_hot(9));
        refuser.open();
        registry.withdraw(_hot(9));
        vm.stopPrank();
        assertEq(address(refuser).balance, 1 ether);

        bytes memory terms = abi.encode(registry.terms(), escrow.terms(), verification.terms());
        string[6] memory setters = [
            "setThawPeriod(uint64)",
            "setUnbondingPeriod(uint256)",
            "setMinimumStake(uint256)",
            "setActivationDelay(uint64)",
            "setTreasury(address)",
            "setTerms(bytes)"
        ];
        for (uint256 i = 0; i < setters.length; i++) {
            _assertNoSuchFunction(setters[i]);
        }
        assertEq(abi.encode(registry.terms(), escrow.terms(), verification.terms()), terms);
    }

    /// `keccak(provider, nodekey)`: a proof without chain, contract and deadline is good everywhere, for ever, for everybody.
    function test_defect_04_nodeKeyProofIsReplayable() public {
        _know(9);
        uint256 deadline = block.timestamp + 1 hours;
        bytes memory proof = _nodeKeyProof(9, _operator(9), CERTIFICATE_HASH, HOST, deadline);
        vm.deal(_operator(9), STAKE);
        vm.deal(_operator(8), STAKE);
        bytes memory refused = abi.encodeWithSelector(INodeRegistry.ProofInvalid.selector, _hot(9));
        vm.expectRevert(refused);
        vm.prank(_operator(8));
        registry.register{value: STAKE}(_hot(9), CERTIFICATE_HASH, HOST, deadline, proof);
        vm.chainId(block.chainid + 1);
        vm.expectRevert(refused);
        vm.prank(_operator(9));
        registry.register{value: STAKE}(_hot(9), CERTIFICATE_HASH, HOST, deadline, proof);
        vm.chainId(block.chainid - 1);
        vm.warp(deadline + 1);
        vm.expectRevert(abi.encodeWithSelector(INodeRegistry.ProofExpired.selector, deadline, deadline + 1));
        vm.prank(_operator(9));
        registry.register{value: STAKE}(_hot(9), CERTIFICATE_HASH, HOST, deadline, proof);
        vm.warp(deadline);
        vm.prank(_operator(9));
        registry.register{value: STAKE}(_hot(9), CERTIFICATE_HASH, HOST, deadline, proof);
    }

    /// An invitation to a pool without chain and contract is an invitation to every pool.
    function test_defect_05_planConsentIsReplayable() public {
        ModelId model = shards.planOf(_plan).modelId;
        Assignment[] memory plan = _chainOf(2, 0);
        bytes32 root = _merkleRoot(_leavesOf(plan));
        bytes[] memory consents =
            _consents(plan, _consentDigest(model, publisher, 2, FEE, MEASUREMENTS, root, block.timestamp));
        bytes memory refused = abi.encodeWithSelector(IShardAssignments.ConsentInvalid.selector, _hot(0));
        vm.chainId(block.chainid + 1);
        vm.expectRevert(refused);
        vm.prank(publisher);
        shards.publishPlan(model, 2, FEE, MEASUREMENTS, plan, block.timestamp, consents);
        vm.chainId(block.chainid - 1);
        // A second contract over the same registry.
        IShardAssignments first = shards;
        shards = IShardAssignments(_create("ShardAssignments", abi.encode(registry, uint64(50))));
        model = shards.registerModel(
            first.modelOf(model).manifestHash, first.modelOf(model).weightRoot, first.modelOf(model).unitCount, ""
        );
        vm.startPrank(publisher);
        bytes[] memory ownConsents =
            _consents(plan, _consentDigest(model, publisher, 1, FEE, MEASUREMENTS, root, block.timestamp));
        shards.publishPlan(model, 1, FEE, MEASUREMENTS, plan, block.timestamp, ownConsents);
        vm.expectRevert(refused);
        shards.publishPlan(model, 2, FEE, MEASUREMENTS, plan, block.timestamp, consents);
        vm.stopPrank();
    }

    /// An owner that can swap the module with the stakes owns the stakes.
    function test_defect_06_modulesCanBeSwapped() public {
        string[7] memory setters = [
            "setModuleAddresses(address,address,address)",
            "setVerification(address)",
            "setEscrow(address)",
            "setRegistry(address)",
            "transferOwnership(address)",
            "upgradeTo(address)",
            "upgradeToAndCall(address,bytes)"
        ];
        for (uint256 i = 0; i < setters.length; i++) {
            _assertNoSuchFunction(setters[i]);
        }
        assertEq(registry.verification(), address(verification));
        assertEq(registry.escrow(), address(escrow));
        assertEq(escrow.verification(), address(verification));
        assertEq(address(escrow.registry()), address(registry));
        assertEq(address(verification.registry()), address(registry));
        assertEq(address(verification.escrow()), address(escrow));
        assertEq(address(shards.registry()), address(registry));
    }

    /// A slash that takes from the bonded part only is dodged by unbonding first.
    function test_defect_07_unbondingBeforeTheSlashEscapesIt() public {
        RequestId id = _newRequest(_plan);
        _commitStage(id, 0, _truth(id, 0));
        _commitStage(id, 1, _moved(_truth(id, 1), 1000));
        vm.prank(_operator(1));
        registry.beginExit(_hot(1));
        _draw(id);
        for (uint256 round = 0; round < 2; round++) {
            _attestHonestly(id, 7);
            _endAttesting(id);
            if (round == 0) _revealAllStages(id);
            _revealMembers(id);
            _tallyAll(id);
        }
        NodeAccount memory account = registry.accountOf(_hot(1));
        assertEq(account.staked, STAKE / 2);
        assertEq(account.thawing, STAKE / 2);
        vm.warp(account.thawEnd);
        uint256 before = _operator(1).balance;
        vm.prank(_operator(1));
        registry.withdraw(_hot(1));
        assertEq(_operator(1).balance - before, STAKE / 2, "half of it is gone");
    }

    /// A packed hash without chain and contract lets a signed receipt count on every fork.
    function test_defect_08_receiptHashLacksTheDomain() public {
        RequestId id = _newRequest(_plan);
        HandOver memory first = HandOver(id, 0, true, 1, "a");
        HandOver memory second = HandOver(id, 0, true, 1, "b");
        bytes memory one = _signHandOver(0, first);
        bytes memory two = _signHandOver(0, second);
        vm.chainId(block.chainid + 1);
        vm.expectRevert(abi.encodeWithSelector(IOutputVerification.SignatureInvalid.selector, _hot(0)));
        verification.reportEquivocation(first, one, second, two, _hot(0));
        vm.chainId(block.chainid - 1);
        // A bare hash of the fields, as a wallet might be tricked into signing it, is no statement either.
        bytes memory bare = _sign(0, keccak256(abi.encode(first)));
        vm.expectRevert(abi.encodeWithSelector(IOutputVerification.SignatureInvalid.selector, _hot(0)));
        verification.reportEquivocation(first, bare, second, two, _hot(0));
    }

    /// A result hash that is public while others still vote lets later voters herd to the leading group.
    function test_defect_09_agreementShowsWhileOthersStillVote() public {
        RequestId id = _drawnRequest(_plan);
        _attest(id, 0, _hot(2), _truth(id, 0));
        _attest(id, 0, _hot(3), _truth(id, 0));
        bytes32 one = verification.attestationOf(id, 1, 0, _hot(2)).commitment;
        bytes32 two = verification.attestationOf(id, 1, 0, _hot(3)).commitment;
        assertNotEq(one, two, "the same result looks different");
        assertEq(verification.attestationOf(id, 1, 0, _hot(2)).sketch, 0);
        assertEq(verification.stageRecordOf(id, 0).sketch, 0, "nor is the executor's result known");
        Claim memory claim = _claimOf(id, 1, 0, _hot(2));
        bytes memory early =
            abi.encodeWithSelector(IOutputVerification.WrongPhase.selector, id, Phase.Revealing, Phase.Attesting);
        vm.expectRevert(early);
        vm.prank(_hot(2));
        verification.revealAttestation(id, 0, claim.root, claim.sketch, claim.tokens, claim.salt);
        _endAttesting(id);
        _revealAttestation(id, 0, _hot(2));
        vm.expectRevert(
            abi.encodeWithSelector(IOutputVerification.WrongPhase.selector, id, Phase.Attesting, Phase.Revealing)
        );
        vm.prank(_hot(4));
        verification.commitAttestations(id, new uint16[](1), new bytes32[](1));
    }

    /// Fees pushed inside a settlement let one receiver that refuses block everybody.
    function test_defect_10_receiverThatRefusesBlocksTheSettlement() public {
        Refuser refuser = new Refuser();
        _know(9);
        vm.deal(address(refuser), STAKE);
        bytes memory proof = _nodeKeyProof(9, address(refuser), CERTIFICATE_HASH, HOST, block.timestamp);
        vm.prank(address(refuser));
        registry.register{value: STAKE}(_hot(9), CERTIFICATE_HASH, HOST, block.timestamp, proof);
        vm.warp(block.timestamp + registry.activationDelay());
        Assignment[] memory plan = _chainOf(2, 0);
        plan[1].node = _hot(9);
        PlanId id = _publish(_newModel(4), FEE, plan);
        vm.warp(block.timestamp + shards.planActivationDelay());
        RequestId request = _challengeableRequest(id, 7);
        _endChallenge(request);
        verification.settle(request);
        _assertRequest(request, RequestStatus.Settled);
        uint256 credit = escrow.creditOf(address(refuser));
        assertGt(credit, 0);
        escrow.withdrawCredit(_operator(0));
        vm.expectRevert();
        escrow.withdrawCredit(address(refuser));
        assertEq(escrow.creditOf(address(refuser)), credit, "it waits for its owner");
    }

    /// @dev Neither to the deployer nor to anybody else.
    function _assertNoSuchFunction(string memory signature) private {
        address[4] memory targets = [address(registry), address(shards), address(escrow), address(verification)];
        address[3] memory callers = [address(this), publisher, treasury];
        bytes memory call_ = abi.encodeWithSignature(signature, address(1), address(1), address(1));
        for (uint256 i = 0; i < targets.length; i++) {
            for (uint256 k = 0; k < callers.length; k++) {
                vm.prank(callers[k]);
                (bool done, bytes memory answer) = targets[i].call(call_);
                assertFalse(done, signature);
                assertEq(answer.length, 0, "not even a reason: there is no such function");
            }
        }
    }
}
