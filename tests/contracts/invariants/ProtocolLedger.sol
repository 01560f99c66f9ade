// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

import {IInferenceEscrow, RequestStatus} from "../../../contracts/interfaces/IInferenceEscrow.sol";
import {INodeRegistry, NodeAccount} from "../../../contracts/interfaces/INodeRegistry.sol";
import {Attestation, IOutputVerification, StageRecord} from "../../../contracts/interfaces/IOutputVerification.sol";
import {RequestId} from "../../../contracts/types/Identifiers.sol";
import {Swarm} from "../Swarm.sol";

/// @notice What ProtocolHandler did, and whether the contracts' books agree with it.
contract ProtocolLedger is Swarm {
    uint256 private constant STAGES = 2;
    uint256 private constant R = 32;

    RequestId[] private _ids;
    uint256[] private _nodes;
    /// Everybody who can have a credit: the requester, the treasury, the challenger, the handler as reporter, the operators.
    address[] private _creditors;
    mapping(RequestId id => bytes32) private _finalState;
    mapping(RequestId id => mapping(uint256 stage => bool)) private _withheld;
    mapping(RequestId id => mapping(uint256 stage => uint256)) private _bondedAtRoute;
    mapping(RequestId id => mapping(uint256 stage => uint256)) private _slashedAtRoute;
    mapping(uint256 node => uint256) private _stakedIn;
    mapping(uint256 node => uint256) private _takenOut;
    mapping(address account => uint256) private _forced;

    constructor(
        INodeRegistry registry_,
        IInferenceEscrow escrow_,
        IOutputVerification verification_,
        address requester_,
        address treasury_,
        address challenger_
    ) {
        (registry, escrow, verification) = (registry_, escrow_, verification_);
        _creditors.push(requester_);
        _creditors.push(treasury_);
        _creditors.push(challenger_);
        _creditors.push(msg.sender);
    }

    // ------------------------------------------------------------------------------------------------------------ notes

    function joined(uint256 node, uint256 stake) external {
        _know(node);
        _nodes.push(node);
        _creditors.push(_operator(node));
        _stakedIn[node] += stake;
    }

    function stakeAdded(uint256 node, uint256 amount) external {
        _stakedIn[node] += amount;
    }

    function stakeTaken(uint256 node, uint256 amount) external {
        _takenOut[node] += amount;
    }

    function forcedOn(address target, uint256 amount) external {
        _forced[target] += amount;
    }

    function opened(RequestId id) external {
        _ids.push(id);
    }

    function routed(RequestId id) external {
        for (uint16 stage = 0; stage < STAGES; stage++) {
            serves(id, stage);
        }
    }

    /// A node has the stage from now on.
    function serves(RequestId id, uint16 stage) public {
        address node = _executor(id, stage);
        NodeAccount memory account = registry.accountOf(node);
        _bondedAtRoute[id][stage] = account.staked - account.thawing;
        _slashedAtRoute[id][stage] = _slashedOf(_indexOf(node));
    }

    function withheldBy(RequestId id, uint16 stage) external {
        _withheld[id][stage] = true;
    }

    /// CDV-03: remembers how each request ended.
    function observe() external {
        for (uint256 i = 0; i < _ids.length; i++) {
            if (_finalState[_ids[i]] != 0) continue;
            RequestStatus status = escrow.requestOf(_ids[i]).status;
            if (status == RequestStatus.Settled || status == RequestStatus.Refunded) {
                _finalState[_ids[i]] = _stateOf(_ids[i]);
            }
        }
    }

    // ------------------------------------------------------------------------------------------------------------ views

    function isFinal(RequestId id) external view returns (bool) {
        return _finalState[id] != 0;
    }

    function creditors() external view returns (address[] memory) {
        return _creditors;
    }

    function escrowCredits() external view returns (uint256) {
        return _escrowCredits();
    }

    function stakes() external view returns (uint256[] memory staked) {
        staked = new uint256[](_nodes.length);
        for (uint256 i = 0; i < staked.length; i++) {
            staked[i] = registry.accountOf(_hot(_nodes[i])).staked;
        }
    }

    // -------------------------------------------------------------------------------------------------------- judgement

    /// CDV-02, STAKE-04: `before` are the stakes before the tally of `stage` in `round`.
    function judge(RequestId id, uint16 stage, uint8 round, bool guarded, uint256[] calldata before)
        external
        view
        returns (uint256 slashes)
    {
        for (uint256 i = 0; i < before.length; i++) {
            address node = _hot(_nodes[i]);
            uint256 staked = registry.accountOf(node).staked;
            assertLe(staked, before[i], "a tally gives no stake");
            if (staked == before[i]) continue;
            slashes++;
            assertTrue(_takesPart(id, stage, round, node), "STAKE-04: slashed for a duty it did not have");
            if (guarded) assertTrue(_isAtFault(id, stage, round, node), "CDV-02: an honest node was slashed");
        }
    }

    /// @dev The stake that a member was drawn from.
    function _vote(RequestId id, uint8 round, uint256 stake) private view returns (uint256) {
        uint256 seats = uint256(verification.terms().committeeSeats) << (round - 1);
        uint256 seat = verification.verificationOf(id).snapshotStake / seats;
        return stake > seat ? stake : seat;
    }

    /// @dev More than two thirds of the revealed stake of the round tells the truth.
    function honestMajority(RequestId id, uint16 stage, uint8 round) external view returns (bool) {
        address[] memory members = verification.membersOf(id, round, stage);
        uint256 revealed;
        uint256 honest;
        for (uint256 i = 0; i < members.length; i++) {
            Attestation memory attestation = verification.attestationOf(id, round, stage, members[i]);
            if (!attestation.revealed) continue;
            uint256 vote = _vote(id, round, attestation.stake);
            revealed += vote;
            bool nothing = _withheld[id][stage] && attestation.outputTokens == 0;
            if (nothing || _isTrueMember(id, stage, attestation)) honest += vote;
        }
        return honest * 3 > revealed * 2;
    }

    function _isTrue(RequestId id, uint16 stage, uint32 tokens, bytes32 sketch) private view returns (bool) {
        return tokens == ANSWER_TOKENS && verification.sketchDistance(sketch, _truth(id, stage).sketch) <= R;
    }

    /// @dev Also of the rows inside the stage, which only who executes it has.
    function _isTrueMember(RequestId id, uint16 stage, Attestation memory attestation) private view returns (bool) {
        return _isTrue(id, stage, attestation.outputTokens, attestation.sketch)
            && verification.sketchDistance(attestation.innerSketch, _truth(id, stage).root) <= R;
    }

    function _takesPart(RequestId id, uint16 stage, uint8 rounds, address node) private view returns (bool) {
        if (_executor(id, stage) == node) return true;
        for (uint8 round = 1; round <= rounds; round++) {
            if (verification.attestationOf(id, round, stage, node).commitment != 0) return true;
        }
        return false;
    }

    function _isAtFault(RequestId id, uint16 stage, uint8 rounds, address node) private view returns (bool) {
        if (_executor(id, stage) == node) {
            StageRecord memory record = verification.stageRecordOf(id, stage);
            if (!record.revealed || _withheld[id][stage]) return true;
            if (!_isTrue(id, stage, record.outputTokens, record.sketch)) return true;
        }
        for (uint8 round = 1; round <= rounds; round++) {
            Attestation memory attestation = verification.attestationOf(id, round, stage, node);
            if (!attestation.revealed || attestation.outputTokens == 0) continue;
            if (!_isTrueMember(id, stage, attestation)) return true;
        }
        return false;
    }

    function _stateOf(RequestId id) private view returns (bytes32) {
        StageRecord[] memory records = new StageRecord[](STAGES);
        for (uint16 stage = 0; stage < STAGES; stage++) {
            records[stage] = verification.stageRecordOf(id, stage);
        }
        return keccak256(abi.encode(escrow.requestOf(id), verification.verificationOf(id).round, records));
    }

    // -------------------------------------------------------------------------------------------------------- invariants

    /// MONEY-01, exactly: deposits of live requests, credits, and what was forced on the contract.
    function checkMoney() external view {
        uint256 owed = _escrowCredits();
        uint256 bonds;
        for (uint256 i = 0; i < _ids.length; i++) {
            if (_finalState[_ids[i]] != 0) continue;
            owed += escrow.requestOf(_ids[i]).deposit;
            for (uint16 stage = 0; stage < STAGES; stage++) {
                bonds += verification.stageRecordOf(_ids[i], stage).bond;
            }
        }
        assertEq(address(escrow).balance, owed + _forced[address(escrow)], "MONEY-01 escrow");
        for (uint256 i = 0; i < _creditors.length; i++) {
            bonds += verification.creditOf(_creditors[i]);
        }
        assertEq(address(verification).balance, bonds + _forced[address(verification)], "MONEY-01 bonds");
    }

    /// STAKE-01, STAKE-02, STAKE-03
    function checkStake(uint256 clock) external view {
        uint256 owed;
        uint256 sortition;
        for (uint256 i = 0; i < _nodes.length; i++) {
            NodeAccount memory account = registry.accountOf(_hot(_nodes[i]));
            owed += account.staked;
            assertLe(uint256(account.thawing) + account.warming, account.staked, "STAKE-02");
            sortition += registry.sortitionStake(_hot(_nodes[i]), clock);
        }
        assertGe(registry.totalSortitionStake(), sortition, "the denominator of the draw");
        for (uint256 i = 0; i < _creditors.length; i++) {
            owed += registry.creditOf(_creditors[i]);
        }
        assertEq(address(registry).balance, owed + _forced[address(registry)], "STAKE-01");
        for (uint256 i = 0; i < _ids.length; i++) {
            if (_finalState[_ids[i]] != 0) continue;
            // After the deadline no verdict can be reached: the request only waits for its refund.
            if (clock > escrow.requestOf(_ids[i]).deadline) continue;
            for (uint16 stage = 0; stage < STAGES && _bondedAtRoute[_ids[i]][stage] != 0; stage++) {
                uint256 node = _indexOf(_executor(_ids[i], stage));
                uint256 slashed = _slashedOf(node) - _slashedAtRoute[_ids[i]][stage];
                uint256 staked = registry.accountOf(_hot(node)).staked;
                assertGe(staked + slashed, _bondedAtRoute[_ids[i]][stage], "STAKE-03");
            }
        }
    }

    /// CDV-01, CDV-03
    function checkVerdicts(function(RequestId, uint8, uint16, address) external view returns (Claim memory) claimOf)
        external
        view
    {
        for (uint256 i = 0; i < _ids.length; i++) {
            RequestId id = _ids[i];
            if (_finalState[id] != 0) {
                assertEq(_stateOf(id), _finalState[id], "CDV-03");
                continue;
            }
            uint8 round = verification.verificationOf(id).round;
            for (uint16 stage = 0; stage < STAGES && round > 0; stage++) {
                address[] memory members = verification.membersOf(id, round, stage);
                for (uint256 k = 0; k < members.length; k++) {
                    _checkOpening(id, round, stage, members[k], claimOf(id, round, stage, members[k]));
                }
            }
        }
    }

    function _checkOpening(RequestId id, uint8 round, uint16 stage, address member, Claim memory claim) private view {
        Attestation memory attestation = verification.attestationOf(id, round, stage, member);
        if (!attestation.revealed) return;
        assertEq(attestation.commitment, _commitment(id, round, stage, member, claim), "CDV-01");
        assertEq(attestation.sketch, claim.sketch, "CDV-01");
        assertEq(attestation.innerSketch, claim.root, "CDV-01");
        assertEq(attestation.outputTokens, claim.tokens, "CDV-01");
    }

    /// MONEY-03: a year later everybody takes out what is his, without the help of anybody else, and nothing is left behind.
    function finish() external {
        for (uint256 i = 0; i < _ids.length; i++) {
            if (_finalState[_ids[i]] == 0) escrow.claimRefund(_ids[i]);
        }
        for (uint256 i = 0; i < _nodes.length; i++) {
            vm.startPrank(_operator(_nodes[i]));
            registry.beginExit(_hot(_nodes[i]));
            vm.warp(registry.accountOf(_hot(_nodes[i])).thawEnd);
            registry.withdraw(_hot(_nodes[i]));
            vm.stopPrank();
        }
        for (uint256 i = 0; i < _creditors.length; i++) {
            address account = _creditors[i];
            if (escrow.creditOf(account) > 0) escrow.withdrawCredit(account);
            if (registry.creditOf(account) > 0) registry.withdrawCredit(account);
            if (verification.creditOf(account) > 0) verification.withdrawCredit(account);
        }
        assertEq(address(escrow).balance, _forced[address(escrow)], "MONEY-03 escrow");
        assertEq(address(registry).balance, _forced[address(registry)], "MONEY-03 registry");
        assertEq(address(verification).balance, _forced[address(verification)], "MONEY-03 bonds");
    }

    // -------------------------------------------------------------------------------------------------------- shorthand

    function _slashedOf(uint256 node) private view returns (uint256) {
        return _stakedIn[node] - _takenOut[node] - registry.accountOf(_hot(node)).staked;
    }

    function _escrowCredits() private view returns (uint256 credits) {
        for (uint256 i = 0; i < _creditors.length; i++) {
            credits += escrow.creditOf(_creditors[i]);
        }
    }

    function _executor(RequestId id, uint16 stage) private view returns (address) {
        return escrow.executorOf(id, stage);
    }
}
