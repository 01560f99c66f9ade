// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

import {INodeRegistry, NodeAccount, NodeStatus, SlashReason} from "../../contracts/interfaces/INodeRegistry.sol";
import {RegistryTerms} from "../../contracts/types/Terms.sol";
import {Swarm} from "./Swarm.sol";
import {Refuser} from "./Recipients.sol";

/// @dev Node 0 is the one under test. Specification: NodeRegistry.tree; the ids in the names are those of PROPERTIES.md.
abstract contract NodeRegistryScenario is Swarm {
    bytes32 internal constant CERTIFICATE = keccak256("certificate");
    string internal constant ENDPOINT = "node.example:7400";

    address internal _node;
    address internal _owner;
    uint256 internal _stake;

    function setUp() public {
        _deployNetwork();
        _node = _hot(0);
        _owner = _operator(0);
        _stake = 10 * registry.minimumStake();
        vm.deal(_owner, 1000 * _stake);
    }

    function _register() internal {
        bytes memory proof = _nodeKeyProof(0, _owner, CERTIFICATE, ENDPOINT, block.timestamp);
        vm.prank(_owner);
        registry.register{value: _stake}(_node, CERTIFICATE, ENDPOINT, block.timestamp, proof);
    }

    function _registerActive() internal {
        _register();
        vm.warp(block.timestamp + registry.activationDelay());
        _assertStatus(NodeStatus.Active);
    }

    function _jail(uint64 until) internal {
        vm.prank(address(verification));
        registry.jail(_node, until);
    }

    function _slash(uint256 amount, SlashReason reason) internal {
        vm.prank(address(verification));
        registry.slash(_node, amount, reason, new address[](0), new uint256[](0));
    }

    function _openDuty() internal {
        vm.prank(address(escrow));
        registry.openDuty(_node);
    }

    function _exit() internal {
        uint64 thawEnd = uint64(block.timestamp) + registry.thawPeriod();
        vm.expectEmit(address(registry));
        emit INodeRegistry.ExitStarted(_node, thawEnd);
        vm.prank(_owner);
        registry.beginExit(_node);
        _assertStatus(NodeStatus.Exiting);
        assertEq(registry.accountOf(_node).thawing, _stake);
        assertEq(registry.totalSortitionStake(), 0);
        assertEq(registry.sortitionStake(_node, block.timestamp), 0);
        vm.warp(thawEnd + 1);
        uint256 before = _owner.balance;
        vm.prank(_owner);
        registry.withdraw(_node);
        assertEq(_owner.balance, before + _stake);
        _assertStatus(NodeStatus.Absent);
    }

    function _share(address recipient, uint256 amount)
        internal
        pure
        returns (address[] memory recipients, uint256[] memory shares)
    {
        recipients = new address[](1);
        shares = new uint256[](1);
        recipients[0] = recipient;
        shares[0] = amount;
    }

    function _expectNotOperator() internal {
        vm.expectRevert(abi.encodeWithSelector(INodeRegistry.NotOperator.selector, _node, _owner, _operator(1)));
    }

    function _expectInvalidProof(bytes memory proof, bytes32 certificate, string memory endpoint, uint256 deadline)
        internal
    {
        vm.expectRevert(abi.encodeWithSelector(INodeRegistry.ProofInvalid.selector, _node));
        vm.prank(_owner);
        registry.register{value: _stake}(_node, certificate, endpoint, deadline, proof);
    }

    function _assertStatus(NodeStatus expected) internal view {
        assertEq(uint8(registry.statusOf(_node)), uint8(expected), "status");
    }

    /// STAKE-01 for the accounts of these tests.
    function _assertBacked() internal view {
        uint256 owed = registry.accountOf(_node).staked + registry.accountOf(_hot(1)).staked;
        for (uint256 i = 0; i < 16; i++) {
            owed += registry.creditOf(_operator(i));
        }
        assertGe(address(registry).balance, owed, "STAKE-01");
    }
}

/// @notice What operators do with their nodes.
contract NodeRegistryOperatorsTest is NodeRegistryScenario {
    // ------------------------------------------------------------------------------------------------------ register

    function test_register_withProofOfTheNodeKey_isPendingAndRecordsTheAccount() public {
        uint64 activeFrom = uint64(block.timestamp) + registry.activationDelay();
        bytes memory proof = _nodeKeyProof(0, _owner, CERTIFICATE, ENDPOINT, block.timestamp);
        vm.expectEmit(address(registry));
        emit INodeRegistry.NodeRegistered(_node, _owner, _stake, activeFrom, CERTIFICATE, ENDPOINT);
        vm.prank(_owner);
        registry.register{value: _stake}(_node, CERTIFICATE, ENDPOINT, block.timestamp, proof);

        NodeAccount memory account = registry.accountOf(_node);
        assertEq(account.operator, _owner);
        assertEq(registry.operatorOf(_node), _owner);
        assertEq(account.staked, _stake);
        assertEq(account.thawing, 0);
        assertEq(account.warming, 0);
        assertEq(account.activeFrom, activeFrom);
        assertEq(account.openDuties, 0);
        assertFalse(account.exiting);
        _assertStatus(NodeStatus.Pending);
        assertEq(registry.totalSortitionStake(), _stake);
        assertEq(registry.sortitionStake(_node, block.timestamp), 0, "a pending node draws no seat");
        assertEq(address(registry).balance, _stake);
    }

    function test_register_afterTheActivationDelay_isActive() public {
        _register();
        vm.warp(block.timestamp + registry.activationDelay() - 1);
        _assertStatus(NodeStatus.Pending);
        vm.warp(block.timestamp + 1);
        _assertStatus(NodeStatus.Active);
        assertEq(registry.sortitionStake(_node, block.timestamp), _stake);
        assertEq(registry.sortitionStake(_node, block.timestamp - 1), 0, "not active at that snapshot");
    }

    function test_register_exactlyTheMinimum_isAccepted() public {
        _stake = registry.minimumStake();
        _register();
        assertEq(registry.accountOf(_node).staked, _stake);
    }

    function test_register_belowTheMinimum_reverts() public {
        uint256 minimum = registry.minimumStake();
        bytes memory proof = _nodeKeyProof(0, _owner, CERTIFICATE, ENDPOINT, block.timestamp);
        vm.expectRevert(abi.encodeWithSelector(INodeRegistry.StakeBelowMinimum.selector, minimum, minimum - 1));
        vm.prank(_owner);
        registry.register{value: minimum - 1}(_node, CERTIFICATE, ENDPOINT, block.timestamp, proof);
    }

    function test_register_withExpiredProof_reverts() public {
        uint256 deadline = block.timestamp - 1;
        bytes memory proof = _nodeKeyProof(0, _owner, CERTIFICATE, ENDPOINT, deadline);
        vm.expectRevert(abi.encodeWithSelector(INodeRegistry.ProofExpired.selector, deadline, block.timestamp));
        vm.prank(_owner);
        registry.register{value: _stake}(_node, CERTIFICATE, ENDPOINT, deadline, proof);
    }

    function test_register_withProofOfAnotherKey_reverts() public {
        bytes memory proof = _sign(1, _nodeKeyDigest(_owner, _node, CERTIFICATE, ENDPOINT, block.timestamp));
        _expectInvalidProof(proof, CERTIFICATE, ENDPOINT, block.timestamp);
    }

    function test_register_withProofOverOtherWords_reverts() public {
        uint256 deadline = block.timestamp + 1 days;
        bytes memory proof = _nodeKeyProof(0, _owner, CERTIFICATE, ENDPOINT, deadline);
        _expectInvalidProof(proof, keccak256("another certificate"), ENDPOINT, deadline);
        _expectInvalidProof(proof, CERTIFICATE, "evil.example:7400", deadline);
        _expectInvalidProof(proof, CERTIFICATE, ENDPOINT, deadline + 1);
        // Somebody else cannot register the key for himself with a proof he has seen.
        vm.deal(_operator(1), _stake);
        vm.expectRevert(abi.encodeWithSelector(INodeRegistry.ProofInvalid.selector, _node));
        vm.prank(_operator(1));
        registry.register{value: _stake}(_node, CERTIFICATE, ENDPOINT, deadline, proof);
    }

    function test_register_withMalformedProof_reverts() public {
        _expectInvalidProof("", CERTIFICATE, ENDPOINT, block.timestamp);
        _expectInvalidProof(hex"1234", CERTIFICATE, ENDPOINT, block.timestamp);
        _expectInvalidProof(new bytes(65), CERTIFICATE, ENDPOINT, block.timestamp);
        _expectInvalidProof(new bytes(4096), CERTIFICATE, ENDPOINT, block.timestamp);
    }

    function test_register_twice_reverts() public {
        _register();
        bytes memory proof = _nodeKeyProof(0, _owner, CERTIFICATE, ENDPOINT, block.timestamp);
        vm.expectRevert(abi.encodeWithSelector(INodeRegistry.NodeAlreadyRegistered.selector, _node));
        vm.prank(_owner);
        registry.register{value: _stake}(_node, CERTIFICATE, ENDPOINT, block.timestamp, proof);
    }

    function test_register_withoutCertificate_reverts() public {
        bytes memory proof = _nodeKeyProof(0, _owner, bytes32(0), ENDPOINT, block.timestamp);
        vm.expectRevert(INodeRegistry.CertificateHashMissing.selector);
        vm.prank(_owner);
        registry.register{value: _stake}(_node, bytes32(0), ENDPOINT, block.timestamp, proof);
    }

    function test_register_withEndpointTooLongOrEmpty_reverts() public {
        string memory long = string(new bytes(256));
        bytes memory proof = _nodeKeyProof(0, _owner, CERTIFICATE, long, block.timestamp);
        vm.expectRevert(abi.encodeWithSelector(INodeRegistry.EndpointLengthOutOfRange.selector, 255, 256));
        vm.prank(_owner);
        registry.register{value: _stake}(_node, CERTIFICATE, long, block.timestamp, proof);

        proof = _nodeKeyProof(0, _owner, CERTIFICATE, "", block.timestamp);
        vm.expectRevert(abi.encodeWithSelector(INodeRegistry.EndpointLengthOutOfRange.selector, 255, 0));
        vm.prank(_owner);
        registry.register{value: _stake}(_node, CERTIFICATE, "", block.timestamp, proof);
    }

    function test_register_withTheLongestEndpoint_isAccepted() public {
        string memory longest = string(new bytes(255));
        bytes memory proof = _nodeKeyProof(0, _owner, CERTIFICATE, longest, block.timestamp);
        vm.prank(_owner);
        registry.register{value: _stake}(_node, CERTIFICATE, longest, block.timestamp, proof);
        _assertStatus(NodeStatus.Pending);
    }

    function test_register_nodeKeyThatIsTheOperator_reverts() public {
        vm.deal(_node, _stake);
        bytes memory proof = _nodeKeyProof(0, _node, CERTIFICATE, ENDPOINT, block.timestamp);
        vm.expectRevert(abi.encodeWithSelector(INodeRegistry.NodeKeyIsOperator.selector, _node));
        vm.prank(_node);
        registry.register{value: _stake}(_node, CERTIFICATE, ENDPOINT, block.timestamp, proof);
    }

    // ------------------------------------------------------------------------------------------------ changeEndpoint

    function test_changeEndpoint_byTheOperator_isAnnounced() public {
        _register();
        vm.expectEmit(address(registry));
        emit INodeRegistry.EndpointChanged(_node, keccak256("next"), "next.example:1");
        vm.prank(_owner);
        registry.changeEndpoint(_node, keccak256("next"), "next.example:1");
    }

    function test_changeEndpoint_byOthersOrMalformed_reverts() public {
        _register();
        _expectNotOperator();
        vm.prank(_operator(1));
        registry.changeEndpoint(_node, CERTIFICATE, ENDPOINT);

        vm.expectRevert(INodeRegistry.CertificateHashMissing.selector);
        vm.prank(_owner);
        registry.changeEndpoint(_node, bytes32(0), ENDPOINT);

        vm.expectRevert(abi.encodeWithSelector(INodeRegistry.EndpointLengthOutOfRange.selector, 255, 300));
        vm.prank(_owner);
        registry.changeEndpoint(_node, CERTIFICATE, string(new bytes(300)));
    }

    function test_changeEndpoint_ofAnAbsentNode_reverts() public {
        vm.expectRevert(abi.encodeWithSelector(INodeRegistry.WrongStatus.selector, _node, NodeStatus.Absent));
        vm.prank(_owner);
        registry.changeEndpoint(_node, CERTIFICATE, ENDPOINT);
    }

    // ------------------------------------------------------------------------------------------------------ addStake

    function test_addStake_toAnActiveNode_countsOnlyAfterTheActivationDelay() public {
        _registerActive();
        uint64 warmFrom = uint64(block.timestamp) + registry.activationDelay();
        uint256 snapshot = block.timestamp;
        vm.expectEmit(address(registry));
        emit INodeRegistry.StakeAdded(_node, 5 ether, _stake + 5 ether, warmFrom);
        vm.prank(_owner);
        registry.addStake{value: 5 ether}(_node);

        NodeAccount memory account = registry.accountOf(_node);
        assertEq(account.staked, _stake + 5 ether);
        assertEq(account.warming, 5 ether);
        assertEq(account.warmFrom, warmFrom);
        assertEq(registry.sortitionStake(_node, snapshot), _stake, "added stake is cold");
        assertGe(registry.totalSortitionStake(), registry.sortitionStake(_node, snapshot));

        vm.warp(warmFrom);
        assertEq(registry.sortitionStake(_node, block.timestamp), _stake + 5 ether, "added stake is warm");
    }

    function test_addStake_whileStakeIsWarming_warmsAllOfItTogether() public {
        _registerActive();
        vm.startPrank(_owner);
        registry.addStake{value: 5 ether}(_node);
        vm.warp(block.timestamp + registry.activationDelay() / 2);
        registry.addStake{value: 1 ether}(_node);
        vm.stopPrank();
        NodeAccount memory account = registry.accountOf(_node);
        assertEq(account.warming, 6 ether);
        assertEq(account.warmFrom, block.timestamp + registry.activationDelay());
        assertEq(registry.sortitionStake(_node, block.timestamp), _stake);
    }

    function test_addStake_ofNothing_reverts() public {
        _register();
        vm.expectRevert(INodeRegistry.ZeroAmount.selector);
        vm.prank(_owner);
        registry.addStake{value: 0}(_node);
    }

    function test_addStake_toAnAbsentNode_reverts() public {
        vm.expectRevert(abi.encodeWithSelector(INodeRegistry.WrongStatus.selector, _node, NodeStatus.Absent));
        vm.prank(_owner);
        registry.addStake{value: 1 ether}(_node);
    }

    // ---------------------------------------------------------------------------------------------------------- thaw

    function test_thaw_leavesSortitionAtOnceAndStakeLater() public {
        _registerActive();
        uint64 thawEnd = uint64(block.timestamp) + registry.thawPeriod();
        vm.expectEmit(address(registry));
        emit INodeRegistry.ThawStarted(_node, 4 ether, 4 ether, thawEnd);
        vm.prank(_owner);
        registry.thaw(_node, 4 ether);

        assertEq(registry.accountOf(_node).staked, _stake, "thawing stake is still stake");
        assertEq(registry.accountOf(_node).thawing, 4 ether);
        assertEq(registry.accountOf(_node).thawEnd, thawEnd);
        assertEq(registry.sortitionStake(_node, block.timestamp), _stake - 4 ether);
        assertEq(registry.totalSortitionStake(), _stake - 4 ether);
    }

    function test_thaw_again_restartsTheTimerForAllOfIt() public {
        _registerActive();
        vm.startPrank(_owner);
        registry.thaw(_node, 4 ether);
        vm.warp(block.timestamp + registry.thawPeriod() - 1);
        uint64 thawEnd = uint64(block.timestamp) + registry.thawPeriod();
        vm.expectEmit(address(registry));
        emit INodeRegistry.ThawStarted(_node, 1 ether, 5 ether, thawEnd);
        registry.thaw(_node, 1 ether);
        vm.warp(block.timestamp + 1);
        vm.expectRevert(abi.encodeWithSelector(INodeRegistry.ThawNotOver.selector, thawEnd, block.timestamp));
        registry.withdraw(_node);
        vm.stopPrank();
    }

    function test_thaw_byOthers_reverts() public {
        _registerActive();
        _expectNotOperator();
        vm.prank(_operator(1));
        registry.thaw(_node, 1 ether);
    }

    function test_thaw_ofNothing_reverts() public {
        _registerActive();
        vm.expectRevert(INodeRegistry.ZeroAmount.selector);
        vm.prank(_owner);
        registry.thaw(_node, 0);
    }

    function test_thaw_belowTheMinimumStake_reverts() public {
        _registerActive();
        uint256 minimum = registry.minimumStake();
        vm.expectRevert(abi.encodeWithSelector(INodeRegistry.StakeBelowMinimum.selector, minimum, minimum - 1));
        vm.prank(_owner);
        registry.thaw(_node, _stake - minimum + 1);
        vm.prank(_owner);
        registry.thaw(_node, _stake - minimum);
    }

    function test_thaw_moreThanThereIs_reverts() public {
        _registerActive();
        vm.expectRevert(abi.encodeWithSelector(INodeRegistry.ThawExceedsStake.selector, _stake, _stake + 1));
        vm.prank(_owner);
        registry.thaw(_node, _stake + 1);
    }

    function test_thaw_whileExiting_reverts() public {
        _registerActive();
        vm.startPrank(_owner);
        registry.beginExit(_node);
        vm.expectRevert(abi.encodeWithSelector(INodeRegistry.WrongStatus.selector, _node, NodeStatus.Exiting));
        registry.thaw(_node, 1 ether);
        vm.stopPrank();
    }

    // ------------------------------------------------------------------------------------------------------ withdraw

    function test_withdraw_beforeTheThawIsOver_reverts() public {
        _registerActive();
        vm.startPrank(_owner);
        registry.thaw(_node, 4 ether);
        uint256 thawEnd = registry.accountOf(_node).thawEnd;
        vm.warp(thawEnd - 1);
        vm.expectRevert(abi.encodeWithSelector(INodeRegistry.ThawNotOver.selector, thawEnd, thawEnd - 1));
        registry.withdraw(_node);
        vm.stopPrank();
    }

    function test_withdraw_afterTheThaw_paysTheOperatorExactlyAndSaysSo() public {
        _registerActive();
        vm.prank(_owner);
        registry.thaw(_node, 4 ether);
        vm.warp(registry.accountOf(_node).thawEnd + 1);
        uint256 before = _owner.balance;
        vm.expectEmit(address(registry));
        emit INodeRegistry.StakeWithdrawn(_node, _owner, 4 ether, _stake - 4 ether);
        vm.prank(_owner);
        registry.withdraw(_node);
        assertEq(_owner.balance, before + 4 ether);
        assertEq(registry.accountOf(_node).staked, _stake - 4 ether);
        assertEq(registry.accountOf(_node).thawing, 0);
        _assertStatus(NodeStatus.Active);
        _assertBacked();
    }

    function test_withdraw_partialThawWithOpenDuties_needsNoClosing() public {
        // A partial withdrawal keeps at least the minimum stake; the thaw is longer than any dispute.
        _registerActive();
        _openDuty();
        vm.startPrank(_owner);
        registry.thaw(_node, 4 ether);
        vm.warp(registry.accountOf(_node).thawEnd + 1);
        registry.withdraw(_node);
        assertEq(registry.accountOf(_node).staked, _stake - 4 ether);
        assertEq(registry.accountOf(_node).openDuties, 1);
        vm.stopPrank();
    }

    function test_withdraw_ofNothing_reverts() public {
        _registerActive();
        vm.expectRevert(abi.encodeWithSelector(INodeRegistry.NothingToWithdraw.selector, _node));
        vm.prank(_owner);
        registry.withdraw(_node);
    }

    function test_withdraw_byAnOperatorThatRefusesMoney_revertsAndKeepsTheStake() public {
        Refuser refuser = new Refuser();
        vm.deal(address(refuser), _stake);
        bytes memory proof = _nodeKeyProof(0, address(refuser), CERTIFICATE, ENDPOINT, block.timestamp);
        vm.prank(address(refuser));
        registry.register{value: _stake}(_node, CERTIFICATE, ENDPOINT, block.timestamp, proof);
        vm.prank(address(refuser));
        registry.beginExit(_node);
        vm.warp(registry.accountOf(_node).thawEnd + 1);
        vm.expectRevert(abi.encodeWithSelector(INodeRegistry.TransferFailed.selector, address(refuser), _stake));
        vm.prank(address(refuser));
        registry.withdraw(_node);
        assertEq(registry.accountOf(_node).staked, _stake);
    }

    // ----------------------------------------------------------------------------------------------------- beginExit

    function test_beginExit_fromPending_thawsEverything() public {
        _register();
        _exit();
    }

    function test_beginExit_fromActive_thawsEverything() public {
        _registerActive();
        _exit();
    }

    function test_beginExit_fromJailed_thawsEverything() public {
        _registerActive();
        _jail(uint64(block.timestamp + 1 days));
        _exit();
    }

    function test_beginExit_fromTombstone_thawsEverything() public {
        _registerActive();
        _jail(type(uint64).max);
        _exit();
    }

    function test_beginExit_twice_reverts() public {
        _registerActive();
        vm.startPrank(_owner);
        registry.beginExit(_node);
        vm.expectRevert(abi.encodeWithSelector(INodeRegistry.WrongStatus.selector, _node, NodeStatus.Exiting));
        registry.beginExit(_node);
        vm.stopPrank();
    }

    function test_beginExit_byOthers_reverts() public {
        _registerActive();
        _expectNotOperator();
        vm.prank(_operator(1));
        registry.beginExit(_node);
    }

    function test_beginExit_withOpenDuties_isNotRemovedBeforeTheyAreClosed() public {
        _registerActive();
        _openDuty();
        vm.prank(_owner);
        registry.beginExit(_node);
        vm.warp(registry.accountOf(_node).thawEnd + 1);
        vm.expectRevert(abi.encodeWithSelector(INodeRegistry.DutiesOpen.selector, _node, 1));
        vm.prank(_owner);
        registry.withdraw(_node);

        vm.prank(address(escrow));
        registry.closeDuty(_node);
        uint256 before = _owner.balance;
        vm.expectEmit(address(registry));
        emit INodeRegistry.StakeWithdrawn(_node, _owner, _stake, 0);
        vm.expectEmit(address(registry));
        emit INodeRegistry.NodeRemoved(_node);
        vm.prank(_owner);
        registry.withdraw(_node);
        assertEq(_owner.balance, before + _stake);
        _assertStatus(NodeStatus.Absent);
        assertEq(registry.totalSortitionStake(), 0);
    }

    function test_beginExit_removedNode_canRegisterAgain() public {
        _registerActive();
        vm.prank(_owner);
        registry.beginExit(_node);
        vm.warp(registry.accountOf(_node).thawEnd + 1);
        vm.prank(_owner);
        registry.withdraw(_node);
        _register();
        _assertStatus(NodeStatus.Pending);
    }

    function test_register_tombstonedKeyAfterItLeft_reverts() public {
        _registerActive();
        _jail(type(uint64).max);
        vm.prank(_owner);
        registry.beginExit(_node);
        vm.warp(registry.accountOf(_node).thawEnd + 1);
        vm.prank(_owner);
        registry.withdraw(_node);
        bytes memory proof = _nodeKeyProof(0, _owner, CERTIFICATE, ENDPOINT, block.timestamp);
        vm.expectRevert(
            abi.encodeWithSelector(INodeRegistry.StillJailed.selector, _node, type(uint64).max, block.timestamp)
        );
        vm.prank(_owner);
        registry.register{value: _stake}(_node, CERTIFICATE, ENDPOINT, block.timestamp, proof);
    }
}

/// @notice What verdicts and duties do to nodes, and what they leave behind.
contract NodeRegistryVerdictsTest is NodeRegistryScenario {
    // --------------------------------------------------------------------------------------------------------- jail

    function test_jail_keepsOutOfNewDutiesUntilTheOperatorReleasesTheNode() public {
        _registerActive();
        uint64 until = uint64(block.timestamp + 1 days);
        vm.expectEmit(address(registry));
        emit INodeRegistry.NodeJailed(_node, until);
        _jail(until);
        _assertStatus(NodeStatus.Jailed);
        assertEq(registry.sortitionStake(_node, block.timestamp), 0);
        assertEq(registry.totalSortitionStake(), 0);

        vm.expectRevert(abi.encodeWithSelector(INodeRegistry.StillJailed.selector, _node, until, block.timestamp));
        vm.prank(_owner);
        registry.leaveJail(_node);

        vm.warp(until + 1);
        vm.expectEmit(address(registry));
        emit INodeRegistry.NodeReleased(_node);
        vm.prank(_owner);
        registry.leaveJail(_node);
        _assertStatus(NodeStatus.Active);
        assertEq(registry.totalSortitionStake(), _stake);
    }

    function test_jail_shorterTerm_neverShortensTheLonger() public {
        _registerActive();
        uint64 until = uint64(block.timestamp + 10 days);
        _jail(until);
        _jail(uint64(block.timestamp + 1 days));
        assertEq(registry.accountOf(_node).jailedUntil, until);
    }

    function test_leaveJail_tombstoned_revertsForEver() public {
        _registerActive();
        _jail(type(uint64).max);
        vm.warp(block.timestamp + 36_500 days);
        vm.expectRevert(
            abi.encodeWithSelector(INodeRegistry.StillJailed.selector, _node, type(uint64).max, block.timestamp)
        );
        vm.prank(_owner);
        registry.leaveJail(_node);
    }

    function test_leaveJail_withTooLittleStake_revertsUntilToppedUp() public {
        _registerActive();
        uint256 minimum = registry.minimumStake();
        _slash(_stake - minimum + 1, SlashReason.EvidenceWithheld);
        uint64 until = uint64(block.timestamp + 1 days);
        _jail(until);
        vm.warp(until + 1);
        vm.expectRevert(abi.encodeWithSelector(INodeRegistry.StakeBelowMinimum.selector, minimum, minimum - 1));
        vm.prank(_owner);
        registry.leaveJail(_node);
        vm.startPrank(_owner);
        registry.addStake{value: 1}(_node);
        registry.leaveJail(_node);
        vm.stopPrank();
        _assertStatus(NodeStatus.Active);
    }

    function test_leaveJail_byOthersOrFree_reverts() public {
        _registerActive();
        vm.expectRevert(abi.encodeWithSelector(INodeRegistry.WrongStatus.selector, _node, NodeStatus.Active));
        vm.prank(_owner);
        registry.leaveJail(_node);
        _jail(uint64(block.timestamp + 1 days));
        _expectNotOperator();
        vm.prank(_operator(1));
        registry.leaveJail(_node);
    }

    // -------------------------------------------------------------------------------------------------------- slash

    function test_slash_givesSharesBurnsTheRestAndSaysSo() public {
        _registerActive();
        (address[] memory recipients, uint256[] memory shares) = _share(_operator(1), 1 ether);
        uint256 burnedBefore = address(0xdEaD).balance;
        vm.expectEmit(address(registry));
        emit INodeRegistry.Credited(_operator(1), 1 ether, 1 ether);
        vm.expectEmit(address(registry));
        emit INodeRegistry.NodeSlashed(_node, SlashReason.IncorrectOutput, 3 ether, 2 ether, _stake - 3 ether, 0);
        vm.prank(address(verification));
        uint256 taken = registry.slash(_node, 3 ether, SlashReason.IncorrectOutput, recipients, shares);
        assertEq(taken, 3 ether);
        assertEq(registry.accountOf(_node).staked, _stake - 3 ether);
        assertEq(registry.creditOf(_operator(1)), 1 ether);
        assertEq(address(0xdEaD).balance, burnedBefore + 2 ether, "burned at once");
        assertEq(address(registry).balance, _stake - 2 ether);
        _assertBacked();
    }

    function test_slash_takesFromTheThawingPartInProportion() public {
        _registerActive();
        vm.prank(_owner);
        registry.thaw(_node, _stake / 2);
        _slash(_stake / 2, SlashReason.IncorrectOutput);
        assertEq(registry.accountOf(_node).staked, _stake / 2);
        assertApproxEqAbs(registry.accountOf(_node).thawing, _stake / 4, 1);
    }

    function test_slash_moreThanThereIs_takesWhatThereIsAndShrinksShares() public {
        _registerActive();
        (address[] memory recipients, uint256[] memory shares) = _share(_operator(1), 2 * _stake);
        vm.prank(address(verification));
        uint256 taken = registry.slash(_node, 4 * _stake, SlashReason.Equivocation, recipients, shares);
        assertEq(taken, _stake);
        assertEq(registry.accountOf(_node).staked, 0);
        assertEq(registry.creditOf(_operator(1)), _stake / 2, "half of what was taken, as it was half of what was due");
        _assertBacked();
    }

    function test_slash_anAbsentNode_takesNothing() public {
        (address[] memory recipients, uint256[] memory shares) = _share(_operator(1), 1);
        vm.prank(address(verification));
        assertEq(registry.slash(_node, 1 ether, SlashReason.Equivocation, recipients, shares), 0);
        assertEq(registry.creditOf(_operator(1)), 0);
    }

    function test_slash_sharesThatDoNotFit_reverts() public {
        _registerActive();
        (address[] memory recipients, uint256[] memory shares) = _share(_operator(1), 2 ether);
        vm.expectRevert(abi.encodeWithSelector(INodeRegistry.SlashShareOutOfRange.selector, 1 ether, 2 ether));
        vm.prank(address(verification));
        registry.slash(_node, 1 ether, SlashReason.Equivocation, recipients, shares);

        vm.expectRevert(abi.encodeWithSelector(INodeRegistry.SlashShareOutOfRange.selector, 1, 0));
        vm.prank(address(verification));
        registry.slash(_node, 1 ether, SlashReason.Equivocation, recipients, new uint256[](0));
    }

    function test_slash_ofAnExitingNode_stillReachesAllOfIt() public {
        _registerActive();
        vm.prank(_owner);
        registry.beginExit(_node);
        vm.warp(registry.accountOf(_node).thawEnd + 30 days);
        _slash(_stake, SlashReason.IncorrectOutput);
        assertEq(registry.accountOf(_node).staked, 0);
        assertEq(registry.accountOf(_node).thawing, 0);
    }

    function test_slash_ofJailedNode_leavesTheDenominatorAlone() public {
        _registerActive();
        _addNode(1, _stake);
        _jail(uint64(block.timestamp + 1 days));
        assertEq(registry.totalSortitionStake(), _stake, "node 1 alone");
        _slash(_stake / 2, SlashReason.EvidenceWithheld);
        assertEq(registry.totalSortitionStake(), _stake, "a jailed stake was not in it");
    }

    // ------------------------------------------------------------------------------------------------------- duties

    function test_duties_areCountedUpAndDown() public {
        _registerActive();
        vm.expectEmit(address(registry));
        emit INodeRegistry.DutyOpened(_node, 1);
        _openDuty();
        vm.prank(address(verification));
        registry.openDuty(_node);
        assertEq(registry.accountOf(_node).openDuties, 2);
        vm.expectEmit(address(registry));
        emit INodeRegistry.DutyClosed(_node, 1);
        vm.prank(address(verification));
        registry.closeDuty(_node);
        vm.prank(address(escrow));
        registry.closeDuty(_node);
        vm.expectRevert(abi.encodeWithSelector(INodeRegistry.DutyNotOpen.selector, _node));
        vm.prank(address(escrow));
        registry.closeDuty(_node);
    }

    function test_closeDuties_closesOneForEachEntry() public {
        _registerActive();
        address[] memory nodes = new address[](2);
        (nodes[0], nodes[1]) = (_node, _node);
        _openDuty();
        vm.expectRevert(abi.encodeWithSelector(INodeRegistry.DutyNotOpen.selector, _node));
        vm.prank(address(verification));
        registry.closeDuties(nodes);
        assertEq(registry.accountOf(_node).openDuties, 1, "all or nothing");
        _openDuty();
        vm.prank(address(verification));
        registry.closeDuties(nodes);
        assertEq(registry.accountOf(_node).openDuties, 0);
        vm.expectRevert(abi.encodeWithSelector(INodeRegistry.NotDutyKeeper.selector, _owner));
        vm.prank(_owner);
        registry.closeDuties(nodes);
    }

    function test_openDuty_ofAnAbsentNode_reverts() public {
        vm.expectRevert(abi.encodeWithSelector(INodeRegistry.WrongStatus.selector, _node, NodeStatus.Absent));
        _openDuty();
    }

    function test_jail_ofAnAbsentKey_barsItsRegistration() public {
        uint64 until = uint64(block.timestamp + 1 days);
        vm.expectEmit(address(registry));
        emit INodeRegistry.NodeJailed(_node, until);
        _jail(until);
        bytes memory proof = _nodeKeyProof(0, _owner, CERTIFICATE, ENDPOINT, until);
        vm.expectRevert(abi.encodeWithSelector(INodeRegistry.StillJailed.selector, _node, until, block.timestamp));
        vm.prank(_owner);
        registry.register{value: _stake}(_node, CERTIFICATE, ENDPOINT, until, proof);
        vm.warp(until);
        _register();
    }

    function test_slash_belowTheMinimum_jailsUntilToppedUp() public {
        _registerActive();
        _slash(_stake - registry.minimumStake() + 1, SlashReason.IncorrectOutput);
        _assertStatus(NodeStatus.Jailed);
        assertEq(registry.totalSortitionStake(), 0);
    }

    function test_leaveJail_stakeWarmsUpAgain() public {
        _registerActive();
        uint256 snapshot = block.timestamp;
        _jail(uint64(block.timestamp + 1));
        vm.warp(block.timestamp + 1);
        vm.prank(_owner);
        registry.leaveJail(_node);
        assertEq(registry.sortitionStake(_node, snapshot), 0, "it was in no snapshot");
        vm.warp(block.timestamp + registry.activationDelay());
        assertEq(registry.sortitionStake(_node, block.timestamp), _stake);
    }

    function test_addStakeAndThaw_ofAJailedNode_leaveTheDenominatorAlone() public {
        _registerActive();
        _jail(uint64(block.timestamp + 1 days));
        vm.startPrank(_owner);
        registry.addStake{value: 3 ether}(_node);
        registry.thaw(_node, 2 ether);
        assertEq(registry.totalSortitionStake(), 0);
        registry.beginExit(_node);
        vm.stopPrank();
        assertEq(registry.totalSortitionStake(), 0);
        assertEq(registry.accountOf(_node).staked, _stake + 3 ether);
    }

    function test_addStake_whileExiting_reverts() public {
        _registerActive();
        vm.startPrank(_owner);
        registry.beginExit(_node);
        vm.expectRevert(abi.encodeWithSelector(INodeRegistry.WrongStatus.selector, _node, NodeStatus.Exiting));
        registry.addStake{value: 1 ether}(_node);
        vm.stopPrank();
    }

    // ------------------------------------------------------------------------------------------------- authorisation

    function test_verificationOnly_fromOthers_reverts() public {
        _registerActive();
        address[3] memory strangers = [_owner, address(escrow), address(shards)];
        for (uint256 i = 0; i < strangers.length; i++) {
            vm.expectRevert(abi.encodeWithSelector(INodeRegistry.NotVerification.selector, strangers[i]));
            vm.prank(strangers[i]);
            registry.slash(_node, 1, SlashReason.Equivocation, new address[](0), new uint256[](0));
            vm.expectRevert(abi.encodeWithSelector(INodeRegistry.NotVerification.selector, strangers[i]));
            vm.prank(strangers[i]);
            registry.jail(_node, 1);
        }
    }

    function test_dutyKeepersOnly_fromOthers_reverts() public {
        _registerActive();
        vm.expectRevert(abi.encodeWithSelector(INodeRegistry.NotDutyKeeper.selector, _owner));
        vm.prank(_owner);
        registry.openDuty(_node);
        vm.expectRevert(abi.encodeWithSelector(INodeRegistry.NotDutyKeeper.selector, address(shards)));
        vm.prank(address(shards));
        registry.closeDuty(_node);
    }

    // ------------------------------------------------------------------------------------------------------- credits

    function test_withdrawCredit_isPushedToItsAccountByAnyone() public {
        _registerActive();
        (address[] memory recipients, uint256[] memory shares) = _share(_operator(1), 1 ether);
        vm.prank(address(verification));
        registry.slash(_node, 3 ether, SlashReason.IncorrectOutput, recipients, shares);
        uint256 before = _operator(1).balance;
        vm.expectEmit(address(registry));
        emit INodeRegistry.CreditWithdrawn(_operator(1), 1 ether);
        vm.prank(makeAddr("stranger"));
        registry.withdrawCredit(_operator(1));
        assertEq(_operator(1).balance, before + 1 ether);
        assertEq(registry.creditOf(_operator(1)), 0);
    }

    function test_withdrawCredit_ofNothing_reverts() public {
        vm.expectRevert(abi.encodeWithSelector(INodeRegistry.NothingToWithdraw.selector, _operator(1)));
        registry.withdrawCredit(_operator(1));
    }

    // ---------------------------------------------------------------------------------------------------------- fuzz

    /// STAKE-02, STAKE-04: a slash takes min(amount, staked), from the thawing and the warming part in proportion, and from nobody else.
    function testFuzz_STAKE_04_slash_isProRataAndNeverMoreThanTheStake(
        uint96 staked,
        uint96 thawing,
        uint96 added,
        uint128 amount
    ) public {
        uint256 minimum = registry.minimumStake();
        _stake = bound(staked, minimum, type(uint96).max);
        vm.deal(_owner, type(uint128).max);
        _registerActive();
        _addNode(1, minimum);
        uint256 thawed = bound(thawing, 0, _stake - minimum);
        uint256 warm = bound(added, 0, type(uint96).max);
        vm.startPrank(_owner);
        if (thawed > 0) registry.thaw(_node, thawed);
        if (warm > 0) registry.addStake{value: warm}(_node);
        vm.stopPrank();
        uint256 whole = _stake + warm;

        vm.prank(address(verification));
        uint256 taken = registry.slash(_node, amount, SlashReason.IncorrectOutput, new address[](0), new uint256[](0));

        NodeAccount memory account = registry.accountOf(_node);
        assertEq(taken, amount < whole ? amount : whole, "taken");
        assertEq(account.staked, whole - taken, "staked");
        assertLe(uint256(account.thawing) + account.warming, account.staked, "STAKE-02");
        assertApproxEqAbs(account.thawing, (thawed * (whole - taken)) / whole, 1, "thawing in proportion");
        assertApproxEqAbs(account.warming, (warm * (whole - taken)) / whole, 1, "warming in proportion");
        assertEq(registry.accountOf(_hot(1)).staked, minimum, "others are left alone");
        assertGe(
            registry.totalSortitionStake(),
            registry.sortitionStake(_node, block.timestamp) + registry.sortitionStake(_hot(1), block.timestamp)
        );
        _assertBacked();
    }

    /// STAKE-01: what a slash takes is either credited or burned, to the wei.
    function testFuzz_STAKE_01_slash_conservesMoney(uint96 staked, uint128 amount, uint64[4] memory weights) public {
        _stake = bound(staked, registry.minimumStake(), type(uint96).max);
        vm.deal(_owner, type(uint128).max);
        _registerActive();
        uint256 due = bound(amount, 1, type(uint128).max);
        address[] memory recipients = new address[](4);
        uint256[] memory shares = new uint256[](4);
        uint256 left = due;
        for (uint256 i = 0; i < 4; i++) {
            recipients[i] = _operator(10 + i);
            shares[i] = (left * weights[i]) / type(uint64).max / 2;
            left -= shares[i];
        }
        vm.prank(address(verification));
        uint256 taken = registry.slash(_node, due, SlashReason.IncorrectOutput, recipients, shares);
        uint256 credited;
        for (uint256 i = 0; i < 4; i++) {
            credited += registry.creditOf(recipients[i]);
            assertLe(registry.creditOf(recipients[i]), shares[i]);
        }
        assertEq(address(0xdEaD).balance, taken - credited, "the rest is burned");
        assertEq(address(registry).balance, _stake - taken + credited, "STAKE-01");
        if (taken == due) assertEq(credited, shares[0] + shares[1] + shares[2] + shares[3], "whole shares");
        _assertBacked();
    }

    /// @dev No amount of thawing, adding, jailing in any order loses the backing of the stake.
    function testFuzz_withdraw_afterTheThaw_paysExactlyWhatThawed(uint96 amount, uint96 slashed) public {
        _registerActive();
        uint256 thawed = bound(amount, 1, _stake - registry.minimumStake());
        vm.prank(_owner);
        registry.thaw(_node, thawed);
        _slash(bound(slashed, 0, _stake - 1), SlashReason.IncorrectOutput);
        uint256 thawing = registry.accountOf(_node).thawing;
        uint256 staked = registry.accountOf(_node).staked;
        vm.warp(registry.accountOf(_node).thawEnd + 1);
        uint256 before = _owner.balance;
        if (thawing == 0) return;
        vm.prank(_owner);
        registry.withdraw(_node);
        assertEq(_owner.balance, before + thawing);
        assertEq(registry.accountOf(_node).staked, staked - thawing);
        _assertBacked();
    }

    // ---------------------------------------------------------------------------------------------------- deployment

    function test_constructor_withoutMinimumStake_reverts() public {
        RegistryTerms memory terms = _registryTerms();
        terms.minimumStake = 0;
        vm.expectRevert(INodeRegistry.ZeroAmount.selector);
        this.create("NodeRegistry", abi.encode(address(escrow), address(verification), address(tabs), terms));
    }

    function test_constructor_withoutWindows_reverts() public {
        RegistryTerms memory terms = _registryTerms();
        terms.activationDelay = 0;
        vm.expectRevert(abi.encodeWithSelector(INodeRegistry.WindowOutOfRange.selector, 1, 0));
        this.create("NodeRegistry", abi.encode(address(escrow), address(verification), address(tabs), terms));
        terms = _registryTerms();
        terms.thawPeriod = 0;
        vm.expectRevert(abi.encodeWithSelector(INodeRegistry.WindowOutOfRange.selector, 1, 0));
        this.create("NodeRegistry", abi.encode(address(escrow), address(verification), address(tabs), terms));
    }

    function test_terms_areThoseOfTheDeployment() public view {
        assertEq(abi.encode(registry.terms()), abi.encode(_registryTerms()));
        assertEq(registry.escrow(), address(escrow));
        assertEq(registry.verification(), address(verification));
    }
}
