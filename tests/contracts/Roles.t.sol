// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

import {IInferenceEscrow, Offer, Replacement} from "../../contracts/interfaces/IInferenceEscrow.sol";
import {INodeRegistry, SlashReason} from "../../contracts/interfaces/INodeRegistry.sol";
import {EvidenceStep, HandOver, IOutputVerification} from "../../contracts/interfaces/IOutputVerification.sol";
import {Batch, IRequestTabs, Opening, TreeStep} from "../../contracts/interfaces/IRequestTabs.sol";
import {IShardAssignments} from "../../contracts/interfaces/IShardAssignments.sol";
import {Assignment} from "../../contracts/types/Assignment.sol";
import {ModelId, PlanId, RequestId} from "../../contracts/types/Identifiers.sol";
import {Swarm} from "./Swarm.sol";

/// @notice ROLE-01: every function that changes state against every role. A role that is not allowed gets an authorisation error; one
///         that is allowed gets anything but.
/// @dev tests/unit/test_contract_errors.py checks that the table names every such function of the interfaces.
contract RolesTest is Swarm {
    enum Role {
        Stranger,
        Operator,
        Executor,
        Member,
        Requester,
        Publisher,
        Registry,
        Shards,
        Escrow,
        Verification,
        Tabs
    }

    uint256 private constant ROLES = 11;
    uint256 private constant ANYBODY = (1 << ROLES) - 1;

    PlanId private _plan;
    RequestId private _opened;
    RequestId private _routed;
    RequestId private _attesting;
    RequestId private _revealing;
    RequestId private _finished;
    address[ROLES] private _who;
    uint256 private _checked;

    /// Node 1 is the one whose operator and hot key have roles; it executes stage 1. Node 3 is a member.
    function setUp() public {
        _deployNetwork();
        _addNodes(0, 5);
        _know(9);
        _plan = _newPlan(2);
        _finished = _challengeableRequest(_plan, 5);
        _revealing = _drawnRequest(_plan);
        _attest(_revealing, 0, _hot(3), _truth(_revealing, 0));
        _endAttesting(_revealing);
        _attesting = _drawnRequest(_plan);
        _routed = _newRequest(_plan);
        _opened = _open(_plan);
        _who = [
            makeAddr("stranger"),
            _operator(1),
            _hot(1),
            _hot(3),
            requester,
            publisher,
            address(registry),
            address(shards),
            address(escrow),
            address(verification),
            address(tabs)
        ];
        for (uint256 i = 0; i < ROLES; i++) {
            vm.deal(_who[i], _who[i].balance + 100 ether);
        }
    }

    function _only(Role role) private pure returns (uint256) {
        return 1 << uint256(role);
    }

    function _check(string memory name, uint256 allowed, address target, bytes memory call_) private {
        _check(name, allowed, target, call_, 0);
    }

    /// @dev The call from each role in turn, each from the same state.
    function _check(string memory name, uint256 allowed, address target, bytes memory call_, uint256 value) private {
        for (uint256 i = 0; i < ROLES; i++) {
            uint256 state = vm.snapshotState();
            vm.prank(_who[i]);
            (bool done, bytes memory answer) = target.call{value: value}(call_);
            bool refused = !done && _isAuthorisationError(bytes4(answer));
            bool mayCall = allowed & (1 << i) != 0;
            string memory cell = string.concat(name, " by role ", vm.toString(i));
            if (mayCall) assertFalse(refused, string.concat(cell, " must be allowed"));
            else assertTrue(refused, string.concat(cell, " must be refused for who it is"));
            vm.revertToStateAndDelete(state);
        }
        _checked++;
    }

    /// @dev CommitmentMissing is how the reveal of an attestation says that the caller is no member; ConsentInvalid and ProofInvalid how a
    ///      signature says that it was given to somebody else.
    function _isAuthorisationError(bytes4 selector) private pure returns (bool) {
        return selector == INodeRegistry.NotOperator.selector || selector == INodeRegistry.NotVerification.selector
            || selector == INodeRegistry.NotDutyKeeper.selector || selector == INodeRegistry.ProofInvalid.selector
            || selector == IShardAssignments.ConsentInvalid.selector
            || selector == IInferenceEscrow.NotPlanPublisher.selector
            || selector == IInferenceEscrow.NotVerification.selector || selector == IInferenceEscrow.NotTabs.selector
            || selector == IRequestTabs.NotCollector.selector || selector == IOutputVerification.NotExecutor.selector
            || selector == IOutputVerification.NotSeated.selector || selector == IOutputVerification.NotEscrow.selector
            || selector == IOutputVerification.CommitmentMissing.selector;
    }

    function test_ROLE_01_NodeRegistry() public {
        address target = address(registry);
        uint256 operator = _only(Role.Operator);
        uint256 verdicts = _only(Role.Verification);
        uint256 keepers = _only(Role.Verification) | _only(Role.Escrow) | _only(Role.Tabs);
        bytes memory proof = _nodeKeyProof(9, _operator(1), CERTIFICATE_HASH, HOST, block.timestamp);
        _check(
            "register",
            operator,
            target,
            abi.encodeCall(INodeRegistry.register, (_hot(9), CERTIFICATE_HASH, HOST, block.timestamp, proof)),
            STAKE
        );
        _check("changeEndpoint", operator, target, abi.encodeCall(INodeRegistry.changeEndpoint, (_hot(1), "c", HOST)));
        _check("addStake", operator, target, abi.encodeCall(INodeRegistry.addStake, (_hot(1))), 1 ether);
        _check("thaw", operator, target, abi.encodeCall(INodeRegistry.thaw, (_hot(1), 1)));
        _check("beginExit", operator, target, abi.encodeCall(INodeRegistry.beginExit, (_hot(1))));
        _check("withdraw", operator, target, abi.encodeCall(INodeRegistry.withdraw, (_hot(1))));
        _check("leaveJail", operator, target, abi.encodeCall(INodeRegistry.leaveJail, (_hot(1))));
        _check("withdrawCredit", ANYBODY, target, abi.encodeCall(INodeRegistry.withdrawCredit, (requester)));
        _check(
            "slash",
            verdicts,
            target,
            abi.encodeCall(
                INodeRegistry.slash, (_hot(1), 1, SlashReason.IncorrectOutput, new address[](0), new uint256[](0))
            )
        );
        _check("jail", verdicts, target, abi.encodeCall(INodeRegistry.jail, (_hot(1), type(uint64).max)));
        _check("openDuty", keepers, target, abi.encodeCall(INodeRegistry.openDuty, (_hot(1))));
        _check("closeDuty", keepers, target, abi.encodeCall(INodeRegistry.closeDuty, (_hot(1))));
        address[] memory nodes = new address[](1);
        nodes[0] = _hot(1);
        _check("closeDuties", keepers, target, abi.encodeCall(INodeRegistry.closeDuties, (nodes)));
        _check("openDuties", keepers, target, abi.encodeCall(INodeRegistry.openDuties, (nodes)));
        assertEq(_checked, 14);
    }

    function test_ROLE_01_ShardAssignments() public {
        address target = address(shards);
        _check("registerModel", ANYBODY, target, abi.encodeCall(IShardAssignments.registerModel, ("m", "w", 1, "name")));
        _check("announce", ANYBODY, target, abi.encodeCall(IShardAssignments.announce, ("document")));
        ModelId model = shards.planOf(_plan).modelId;
        Assignment[] memory plan = _chainOf(2, 0);
        bytes[] memory consents = _consents(
            plan, _consentDigest(model, publisher, 2, FEE, MEASUREMENTS, _merkleRoot(_leavesOf(plan)), block.timestamp)
        );
        // Under his own address anybody may publish; under the publisher's, whose next epoch this is, only he.
        vm.prank(publisher);
        (bool done,) = target.call(
            abi.encodeCall(
                IShardAssignments.publishPlan, (model, 2, FEE, MEASUREMENTS, plan, block.timestamp, consents)
            )
        );
        assertTrue(done);
        bytes32 root = _merkleRoot(_leavesOf(plan));
        consents = _consents(plan, _consentDigest(model, publisher, 1, FEE, MEASUREMENTS, root, block.timestamp));
        uint256 state = vm.snapshotState();
        for (uint256 i = 0; i < ROLES; i++) {
            if (Role(i) == Role.Publisher) continue;
            vm.expectRevert(abi.encodeWithSelector(IShardAssignments.ConsentInvalid.selector, _hot(0)));
            vm.prank(_who[i]);
            shards.publishPlan(model, 1, FEE, MEASUREMENTS, plan, block.timestamp, consents);
        }
        vm.revertToState(state);
        assertEq(_checked, 2);
    }

    function test_ROLE_01_InferenceEscrow() public {
        address target = address(escrow);
        uint256 verdicts = _only(Role.Verification);
        _check(
            "open",
            ANYBODY,
            target,
            abi.encodeCall(IInferenceEscrow.open, (_plan, 1000, INPUT_COMMITMENT, "s", 1, 1)),
            1 ether
        );
        (Assignment[] memory route, bytes32[][] memory proofs) = _routeOf(_opened);
        _check(
            "openRouted",
            ANYBODY,
            target,
            abi.encodeCall(IInferenceEscrow.openRouted, (_plan, 1001, INPUT_COMMITMENT, "s", 1, 1, route, proofs)),
            1 ether
        );
        _check("route", _only(Role.Publisher), target, abi.encodeCall(IInferenceEscrow.route, (_opened, route, proofs)));
        _check(
            "replaceStages",
            ANYBODY,
            target,
            abi.encodeCall(IInferenceEscrow.replaceStages, (_routed, new Replacement[](0)))
        );
        _check("claimRefund", ANYBODY, target, abi.encodeCall(IInferenceEscrow.claimRefund, (_opened)));
        _check("withdrawCredit", ANYBODY, target, abi.encodeCall(IInferenceEscrow.withdrawCredit, (requester)));
        _check("markCommitted", verdicts, target, abi.encodeCall(IInferenceEscrow.markCommitted, (_routed)));
        _check("markVerified", verdicts, target, abi.encodeCall(IInferenceEscrow.markVerified, (_attesting)));
        _check("reopen", verdicts, target, abi.encodeCall(IInferenceEscrow.reopen, (_finished)));
        _check(
            "settle",
            verdicts,
            target,
            abi.encodeCall(IInferenceEscrow.settle, (_finished, 1, new bool[](2), new address[](0)))
        );
        _check("refund", verdicts, target, abi.encodeCall(IInferenceEscrow.refund, (_attesting)));
        bytes32[] memory commitments = new bytes32[](2);
        (commitments[0], commitments[1]) = ("c", "d");
        Offer memory offer = Offer(requester, _plan, FEE, INPUT_COMMITMENT, "s", 1, 1);
        _check(
            "openCommitted",
            _only(Role.Tabs),
            target,
            abi.encodeCall(IInferenceEscrow.openCommitted, (RequestId.wrap("id"), offer, route, proofs, commitments))
        );
        assertEq(_checked, 12);
    }

    function test_ROLE_01_OutputVerification() public {
        address target = address(verification);
        uint256 executor = _only(Role.Executor);
        _check("commitStage", executor, target, abi.encodeCall(IOutputVerification.commitStage, (_routed, 1, "c")));
        _check(
            "drawCommittee", ANYBODY, target, abi.encodeCall(IOutputVerification.drawCommittee, (_attesting, SECRET))
        );
        uint16[] memory stages = new uint16[](1);
        bytes32[] memory commitments = new bytes32[](1);
        commitments[0] = "c";
        _check(
            "commitAttestations",
            executor | _only(Role.Member),
            target,
            abi.encodeCall(IOutputVerification.commitAttestations, (_attesting, stages, commitments))
        );
        Claim memory claim = _claimOf(_revealing, 0, 1, _hot(1));
        _check(
            "revealStage",
            executor,
            target,
            abi.encodeCall(
                IOutputVerification.revealStage, (_revealing, 1, claim.root, claim.sketch, claim.tokens, claim.salt)
            )
        );
        claim = _claimOf(_revealing, 1, 0, _hot(3));
        _check(
            "revealAttestation",
            _only(Role.Member),
            target,
            abi.encodeCall(
                IOutputVerification.revealAttestation,
                (_revealing, 0, claim.root, claim.sketch, claim.tokens, claim.salt)
            )
        );
        _check("tally", ANYBODY, target, abi.encodeCall(IOutputVerification.tally, (_revealing, 0, 0)));
        _check(
            "tallyWithoutQuorum",
            ANYBODY,
            target,
            abi.encodeCall(IOutputVerification.tallyWithoutQuorum, (_revealing, 0))
        );
        _check("challenge", ANYBODY, target, abi.encodeCall(IOutputVerification.challenge, (_finished, 0)), 1 ether);
        _check("settle", ANYBODY, target, abi.encodeCall(IOutputVerification.settle, (_finished)));
        HandOver memory first = HandOver(_routed, 0, true, 1, "a");
        HandOver memory second = HandOver(_routed, 0, true, 1, "b");
        bytes memory one = _signHandOver(0, first);
        bytes memory two = _signHandOver(0, second);
        _check(
            "reportEquivocation",
            ANYBODY,
            target,
            abi.encodeCall(IOutputVerification.reportEquivocation, (first, one, second, two, _hot(0)))
        );
        EvidenceStep memory step;
        _check(
            "reportContradiction",
            ANYBODY,
            target,
            abi.encodeCall(IOutputVerification.reportContradiction, (first, one, step, new bytes32[](0)))
        );
        _check("abandon", _only(Role.Escrow), target, abi.encodeCall(IOutputVerification.abandon, (_attesting)));
        _check("withdrawCredit", ANYBODY, target, abi.encodeCall(IOutputVerification.withdrawCredit, (requester)));
        _check(
            "commitStages",
            _only(Role.Escrow),
            target,
            abi.encodeCall(IOutputVerification.commitStages, (_routed, commitments, 1))
        );
        assertEq(_checked, 14);
    }

    /// @dev Only the post of a batch asks who calls; everything else asks what was signed, and a tab is its sender's.
    function test_ROLE_01_RequestTabs() public {
        address target = address(tabs);
        Batch memory batch;
        batch.planId = _plan;
        batch.collector = publisher;
        Opening memory opening;
        bytes[] memory none = new bytes[](0);
        _check("fund", ANYBODY, target, abi.encodeCall(IRequestTabs.fund, (publisher)), 1 ether);
        _check("beginClose", ANYBODY, target, abi.encodeCall(IRequestTabs.beginClose, (publisher)));
        _check("withdrawTab", ANYBODY, target, abi.encodeCall(IRequestTabs.withdrawTab, (publisher)));
        _check("post", _only(Role.Publisher), target, abi.encodeCall(IRequestTabs.post, (batch, none, none)));
        _check("recordSecret", ANYBODY, target, abi.encodeCall(IRequestTabs.recordSecret, (batch, 0, "s")));
        _check("draw", ANYBODY, target, abi.encodeCall(IRequestTabs.draw, (batch, new bytes32[](0))));
        _check("openLeaf", ANYBODY, target, abi.encodeCall(IRequestTabs.openLeaf, (batch, opening, new TreeStep[](0))));
        _check(
            "challengeLeaf",
            ANYBODY,
            target,
            abi.encodeCall(IRequestTabs.challengeLeaf, (batch, opening, new TreeStep[](0))),
            1 ether
        );
        _check("resolveChallenge", ANYBODY, target, abi.encodeCall(IRequestTabs.resolveChallenge, (_finished)));
        _check("settle", ANYBODY, target, abi.encodeCall(IRequestTabs.settle, (batch)));
        _check("voidBatch", ANYBODY, target, abi.encodeCall(IRequestTabs.voidBatch, (batch)));
        _check("withdrawCredit", ANYBODY, target, abi.encodeCall(IRequestTabs.withdrawCredit, (requester)));
        assertEq(_checked, 12);
    }
}
