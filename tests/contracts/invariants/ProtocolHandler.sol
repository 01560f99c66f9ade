// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

import {IInferenceEscrow, Replacement, RequestStatus} from "../../../contracts/interfaces/IInferenceEscrow.sol";
import {NodeAccount, NodeStatus, SlashReason} from "../../../contracts/interfaces/INodeRegistry.sol";
import {
    Attestation,
    EvidenceStep,
    HandOver,
    IOutputVerification,
    Phase,
    StageRecord,
    Verification
} from "../../../contracts/interfaces/IOutputVerification.sol";
import {Assignment} from "../../../contracts/types/Assignment.sol";
import {ModelId, PlanId, RequestId} from "../../../contracts/types/Identifiers.sol";
import {ForcedMoney} from "../Recipients.sol";
import {Swarm} from "../Swarm.sol";
import {ProtocolLedger} from "./ProtocolLedger.sol";

/// @notice Lives of many requests at once: six honest nodes, two that lie in every way they can, challengers, reporters, intruders, thaws,
///         lapses of time and of entropy, forced ether.
/// @dev `step` performs one action a call. Each action looks for a request it applies to and, if there is none, drives a fresh one to
///      that point, so every call is a successful act; `counts` says how many of each were made.
abstract contract ProtocolHandler is Swarm {
    enum Action {
        Open,
        Route,
        Commit,
        Draw,
        RenewEntropy,
        Attest,
        Reveal,
        Tally,
        Challenge,
        Settle,
        ClaimRefund,
        WithdrawCredit,
        ReportEquivocation,
        ReportContradiction,
        CopyReveal,
        Intrude,
        ForceMoney,
        Thaw,
        WithdrawStake,
        Repair,
        Wait,
        Dispute,
        Replace
    }

    uint256 public constant ACTIONS = 23;
    uint256 private constant HONEST = 6;
    uint256 private constant STAGES = 2;
    uint256 private constant R = 32;
    uint256 private constant TAU = 64;
    /// Steps of a run, as foundry.toml has it; after the free ones, actions never performed yet come first.
    uint256 internal constant RUN = 64;
    uint256 private constant FREE_STEPS = 36;

    uint256[ACTIONS] public counts;
    /// Tallies in which more than two thirds of the revealed stake was honest, and slashes seen.
    uint256 public guardedTallies;
    uint256 public guardedBackupTallies;
    uint256 public slashes;

    ProtocolLedger private _ledger;
    RequestId[] private _ids;
    uint256[] private _nodes;
    /// The two liars that serve now.
    uint256[2] private _liars;
    uint256 private _nextNode = HONEST;
    ModelId private _model;
    PlanId private _plan;
    uint256 private _steps;
    uint256 private _clock;
    uint256 private _height;
    /// Set while a fresh request is driven: nobody lies, so that it arrives.
    bool private _calm;
    /// Whether the executor of a stage keeps its evidence from the members.
    mapping(RequestId id => mapping(uint256 stage => bool)) private _withheld;

    address private _challenger = makeAddr("challenger");
    address private _intruder = makeAddr("intruder");

    function _begin() internal {
        _deployNetwork();
        _ledger = ProtocolLedger(
            _create("ProtocolLedger", abi.encode(registry, escrow, verification, requester, treasury, _challenger))
        );
        for (uint256 i = 0; i < HONEST; i++) {
            _join(i);
        }
        for (uint256 i = 0; i < 2; i++) {
            _liars[i] = _nextNode++;
            _join(_liars[i]);
        }
        vm.warp(block.timestamp + registry.activationDelay());
        _model = _newModel(4);
        _publishNext();
        (_clock, _height) = (block.timestamp, block.number);
    }

    // ------------------------------------------------------------------------------------------------------------ steps

    function step(uint256 seed) external {
        vm.warp(_clock);
        vm.roll(_height);
        Action action = Action(seed % ACTIONS);
        if (++_steps > FREE_STEPS) {
            for (uint256 i = 0; i < ACTIONS; i++) {
                if (counts[i] == 0) action = Action(i);
            }
            if (_steps > RUN - 12 && guardedBackupTallies == 0) action = Action.Dispute;
        }
        _perform(action, uint256(keccak256(abi.encode(seed, _steps))));
        _ledger.observe();
        (_clock, _height) = (block.timestamp, block.number);
    }

    function _perform(Action action, uint256 seed) private {
        if (action == Action.Open) _openNext();
        else if (action == Action.WithdrawCredit) _withdrawSomeCredit(seed);
        else if (action == Action.Intrude) _intrude(_find(Action.Tally, seed), seed);
        else if (action == Action.ForceMoney) _forceMoney(seed);
        else if (action == Action.Thaw) _thaw(seed);
        else if (action == Action.WithdrawStake) _withdrawStake(seed);
        else if (action == Action.Repair) _repair();
        else if (action == Action.Wait) _wait(seed % 200);
        else if (action == Action.Dispute) _dispute(seed);
        else _performOn(action, _find(action, seed), seed);
        counts[uint256(action)]++;
    }

    function _performOn(Action action, RequestId id, uint256 seed) private {
        if (action == Action.Route) _routeSomehow(id, seed);
        else if (action == Action.Replace) _replaceSome(id, seed);
        else if (action == Action.Commit) _commitSome(id, seed);
        else if (action == Action.Draw) _drawSomehow(id, seed);
        else if (action == Action.RenewEntropy) _renew(id);
        else if (action == Action.Attest) _attestSome(id, seed);
        else if (action == Action.Reveal) _revealSome(id, seed);
        else if (action == Action.Tally) _tallySome(id, seed);
        else if (action == Action.Challenge) _challengeSome(id, seed);
        else if (action == Action.Settle) _settle(id);
        else if (action == Action.ClaimRefund) _claimRefund(id);
        else if (action == Action.ReportEquivocation) _reportEquivocation(id);
        else if (action == Action.ReportContradiction) _reportContradiction(id);
        else _copyReveal(id, seed);
    }

    /// @dev A live request the action applies to; a fresh one is driven there if there is none.
    function _find(Action action, uint256 seed) private returns (RequestId id) {
        uint256 count = _ids.length;
        for (uint256 i = 0; i < count; i++) {
            id = _ids[(seed % count + i) % count];
            if (_applies(action, id)) return id;
        }
        _repair();
        _calm = true;
        id = _openNext();
        for (uint256 i = 0; i < 12 && !_applies(action, id); i++) {
            _advance(id, action, uint256(keccak256(abi.encode(seed, i))));
        }
        _calm = false;
        assertTrue(_applies(action, id), "the handler lost its way");
    }

    function _applies(Action action, RequestId id) private view returns (bool) {
        if (_ledger.isFinal(id)) return false;
        RequestStatus status = escrow.requestOf(id).status;
        if (action == Action.ClaimRefund) return true;
        if (status == RequestStatus.Expired) return false;
        Verification memory state = verification.verificationOf(id);
        Phase phase = state.phase;
        if (action == Action.Route) return status == RequestStatus.Open;
        if (action == Action.Commit) return status == RequestStatus.Routed;
        if (action == Action.Replace) {
            (uint16 stage,) = _replaceable(id, 0);
            return status == RequestStatus.Routed && stage < STAGES;
        }
        if (action == Action.Draw || action == Action.RenewEntropy) return phase == Phase.AwaitingDraw;
        if (action == Action.Attest) return phase == Phase.Attesting;
        if (action == Action.Reveal) return phase == Phase.Revealing && block.timestamp <= state.revealDeadline;
        if (action == Action.CopyReveal) return phase == Phase.Revealing && _someMember(id) != address(0);
        if (action == Action.Tally) return phase == Phase.Revealing;
        if (action == Action.Challenge) {
            return phase == Phase.Challengeable && block.timestamp <= state.challengeDeadline && state.round < 3;
        }
        if (action == Action.Settle) {
            return phase == Phase.Challengeable && escrow.requestOf(id).deadline > state.challengeDeadline;
        }
        if (action == Action.ReportEquivocation) return status == RequestStatus.Routed && _routedLiar(id) < STAGES;
        return _contradictable(id) < STAGES;
    }

    /// @dev The act that moves a request on from where it is.
    function _advance(RequestId id, Action goal, uint256 seed) private {
        RequestStatus status = escrow.requestOf(id).status;
        Phase phase = verification.verificationOf(id).phase;
        if (status == RequestStatus.Open) {
            bool overLiars = goal == Action.ReportEquivocation || goal == Action.ReportContradiction;
            _routeOverReplica(id, overLiars ? 2 : 0);
        } else if (status == RequestStatus.Routed) {
            _commitSome(id, seed);
        } else if (phase == Phase.AwaitingDraw) {
            _drawSomehow(id, seed);
        } else if (phase == Phase.Attesting) {
            _attestSome(id, seed);
            if (verification.verificationOf(id).phase == Phase.Attesting) _endAttesting(id);
        } else if (phase == Phase.Revealing) {
            _revealSome(id, seed);
            if (goal != Action.ReportContradiction && goal != Action.CopyReveal) _tallySome(id, seed);
        }
    }

    // -------------------------------------------------------------------------------------------------- life of a request

    function _openNext() private returns (RequestId id) {
        _wait(0);
        id = _openWith(_plan, PROMPT_TOKENS, MAXIMUM_TOKENS, _steps % 3);
        _ids.push(id);
        _ledger.opened(id);
    }

    function _routeSomehow(RequestId id, uint256 seed) private {
        uint16[] memory replicas = new uint16[](STAGES);
        PlanId plan = escrow.requestOf(id).planId;
        (Assignment[] memory route,) = _routeOver(plan, replicas);
        for (uint256 stage = 0; stage < STAGES; stage++) {
            for (uint16 i = 0; i < 3; i++) {
                replicas[stage] = uint16((seed + i) % 3);
                (route,) = _routeOver(plan, replicas);
                if (registry.statusOf(route[stage].node) == NodeStatus.Active) break;
            }
            if (registry.statusOf(route[stage].node) != NodeStatus.Active) {
                // Nobody serves this stage: repair takes time, in which the request may lapse. It is refunded like any other.
                _claimRefund(id);
                return;
            }
        }
        _routeWith(id, plan, replicas);
    }

    function _routeOverReplica(RequestId id, uint16 replica) private {
        uint16[] memory replicas = new uint16[](STAGES);
        for (uint256 stage = 0; stage < STAGES; stage++) {
            replicas[stage] = replica;
        }
        _routeWith(id, escrow.requestOf(id).planId, replicas);
    }

    function _routeWith(RequestId id, PlanId plan, uint16[] memory replicas) private {
        (Assignment[] memory route, bytes32[][] memory proofs) = _routeOver(plan, replicas);
        vm.prank(publisher);
        escrow.route(id, route, proofs);
        _ledger.routed(id);
    }

    /// @dev A stage that has not committed, and another replica that could take it: `STAGES` if there is none.
    function _replaceable(RequestId id, uint256 seed) private view returns (uint16 stage, uint16 replica) {
        PlanId plan = escrow.requestOf(id).planId;
        for (uint16 i = 0; i < STAGES; i++) {
            stage = uint16((seed + i) % STAGES);
            if (_executorOf(id, stage) == address(0) || verification.stageRecordOf(id, stage).commitment != 0) {
                continue;
            }
            for (uint16 j = 0; j < 3; j++) {
                replica = uint16(((seed >> 8) + j) % 3);
                address node = _assignmentOf(plan, stage, replica).node;
                if (node != _executorOf(id, stage) && registry.statusOf(node) == NodeStatus.Active) {
                    return (stage, replica);
                }
            }
        }
        return (uint16(STAGES), 0);
    }

    function _assignmentOf(PlanId plan, uint16 stage, uint16 replica) private view returns (Assignment memory) {
        uint16[] memory replicas = new uint16[](STAGES);
        replicas[stage] = replica;
        (Assignment[] memory route,) = _routeOver(plan, replicas);
        return route[stage];
    }

    /// @dev Its requester and the node of the other stage, the one before it on a ring of two, agree that it stopped.
    function _replaceSome(RequestId id, uint256 seed) private {
        (uint16 stage, uint16 replica) = _replaceable(id, seed);
        uint16[] memory replicas = new uint16[](STAGES);
        replicas[stage] = replica;
        (Assignment[] memory route, bytes32[][] memory proofs) = _routeOver(escrow.requestOf(id).planId, replicas);
        address old = _executorOf(id, stage);
        bytes32 digest = _replacementDigest(id, stage, old, route[stage].node);
        uint256 witness = _indexOf(_executorOf(id, 1 - stage));
        Replacement[] memory list = new Replacement[](1);
        list[0] = Replacement(route[stage], proofs[stage], old, _requesterSigns(digest), _sign(witness, digest));
        escrow.replaceStages(id, list);
        assertEq(_executorOf(id, stage), route[stage].node, "the new node serves");
        _ledger.serves(id, stage);
    }

    function _commitSome(RequestId id, uint256 seed) private {
        for (uint16 stage = 0; stage < STAGES; stage++) {
            if (verification.stageRecordOf(id, stage).commitment != 0) continue;
            if (!_calm && (seed >> stage) % 8 == 0 && stage == 0) continue; // this one is late
            Claim memory claim = _honestClaim(id, stage, seed);
            if (_lies(_indexOf(_executorOf(id, stage)), seed >> 8)) {
                claim = _lie(id, stage, seed);
                _withheld[id][stage] = seed % 5 == 0;
                if (_withheld[id][stage]) _ledger.withheldBy(id, stage);
            }
            if (escrow.requestOf(id).status != RequestStatus.Routed) return;
            _commitWithEvidence(id, stage, claim);
        }
    }

    /// @dev The evidence root is that of a tree with one step, so that it can be contradicted.
    function _commitWithEvidence(RequestId id, uint16 stage, Claim memory claim) private {
        claim.root = keccak256(bytes.concat(keccak256(abi.encode(_evidence(id, stage)))));
        _commitStage(id, stage, claim);
    }

    function _drawSomehow(RequestId id, uint256 seed) private {
        Verification memory state = verification.verificationOf(id);
        if (block.number > uint256(state.entropyBlock) + 256) _renew(id);
        state = verification.verificationOf(id);
        if (block.number <= state.entropyBlock) vm.roll(uint256(state.entropyBlock) + 1);
        bool late = block.timestamp > state.secretDeadline;
        verification.drawCommittee(id, late && seed % 2 == 0 ? bytes32(0) : SECRET);
    }

    function _renew(RequestId id) private {
        vm.roll(uint256(verification.verificationOf(id).entropyBlock) + 257 + _steps);
        verification.drawCommittee(id, SECRET);
        assertGt(verification.verificationOf(id).entropyBlock, block.number, "renewed");
    }

    function _attestSome(RequestId id, uint256 seed) private {
        for (uint16 stage = 0; stage < STAGES; stage++) {
            for (uint256 i = 0; i < _nodes.length; i++) {
                address node = _hot(_nodes[i]);
                Verification memory state = verification.verificationOf(id);
                if (state.phase != Phase.Attesting) return;
                if (!verification.isSeated(id, stage, node)) continue;
                if (verification.attestationOf(id, state.round, stage, node).commitment != 0) continue;
                uint256 mood = uint256(keccak256(abi.encode(seed, stage, i)));
                if (!_calm && mood % 16 == 0) continue;
                Claim memory claim = _honestClaim(id, stage, mood);
                claim.root = _moveSketch(claim.root, (mood >> 16) % (R + 1));
                if (_withheld[id][stage] && mood % 3 != 0) claim = Claim(0, 0, 0, 0);
                // Liars of one request tell one lie: that is the strongest they can do.
                if (_lies(_nodes[i], mood)) claim = _lie(id, stage, mood % 2 == 0 ? 0 : mood);
                _attest(id, stage, node, claim);
            }
        }
    }

    function _revealSome(RequestId id, uint256 seed) private {
        Verification memory state = verification.verificationOf(id);
        if (block.timestamp > state.revealDeadline) return;
        for (uint16 stage = 0; stage < STAGES; stage++) {
            if (state.round == 1 && !verification.stageRecordOf(id, stage).revealed) {
                bool silent = !_calm && (seed >> (16 + stage)) % 16 == 0;
                if (!silent) _revealStage(id, stage);
            }
            address[] memory members = verification.membersOf(id, state.round, stage);
            for (uint256 i = 0; i < members.length; i++) {
                if (verification.attestationOf(id, state.round, stage, members[i]).revealed) continue;
                if (!_calm && uint256(keccak256(abi.encode(seed, stage, i))) % 24 == 0) continue;
                _revealAttestation(id, stage, members[i]);
            }
        }
    }

    function _tallySome(RequestId id, uint256 seed) private {
        for (uint16 stage = 0; stage < STAGES; stage++) {
            Verification memory state = verification.verificationOf(id);
            if (state.phase != Phase.Revealing || escrow.requestOf(id).status == RequestStatus.Expired) return;
            if (!verification.stageRecordOf(id, stage).disputed || _isTallied(id, stage, state.round)) continue;
            if (!_calm && seed % 5 == 0) _endRevealingOf(state);
            if (!_allRevealed(id, stage, state.round)) _endRevealingOf(state);
            _tallyWatched(id, stage, state.round);
        }
    }

    /// @dev A request fought out from its first act to its last, liars and all, with a challenge if the first verdict accepts it.
    function _dispute(uint256 seed) private {
        _repair();
        RequestId id = _openNext();
        uint16[] memory replicas = new uint16[](STAGES);
        uint256 lyingStage = seed % (STAGES + 2);
        if (lyingStage < STAGES) replicas[lyingStage] = 2;
        _routeWith(id, _plan, replicas);
        for (uint256 i = 0; escrow.requestOf(id).status == RequestStatus.Routed; i++) {
            _commitSome(id, seed >> i);
        }
        _drawSomehow(id, seed);
        for (uint256 i = 0; i < 4 && escrow.requestOf(id).status == RequestStatus.Committed; i++) {
            uint256 mood = uint256(keccak256(abi.encode(seed, "round", i)));
            _attestSome(id, mood);
            if (verification.verificationOf(id).phase == Phase.Attesting) _endAttesting(id);
            _revealSome(id, mood);
            _tallySome(id, mood);
            if (_applies(Action.Challenge, id)) _challengeSome(id, seed >> i);
        }
    }

    function _challengeSome(RequestId id, uint256 seed) private {
        vm.deal(_challenger, _challenger.balance + 1 ether);
        vm.prank(_challenger);
        verification.challenge{value: 1 ether}(id, uint16(seed % STAGES));
    }

    /// MONEY-02
    function _settle(RequestId id) private {
        uint256 deadline = verification.verificationOf(id).challengeDeadline;
        if (block.timestamp <= deadline) vm.warp(deadline + 1);
        uint256 credits = _ledger.escrowCredits();
        vm.prank(_intruder);
        verification.settle(id);
        assertEq(_ledger.escrowCredits() - credits, escrow.requestOf(id).deposit, "MONEY-02");
        _assertStatusIs(id, RequestStatus.Settled);
    }

    /// MONEY-02, MONEY-03
    function _claimRefund(RequestId id) private {
        uint256 deadline = escrow.requestOf(id).deadline;
        if (block.timestamp <= deadline) vm.warp(deadline + 1);
        uint256 credits = _ledger.escrowCredits();
        vm.prank(_intruder);
        escrow.claimRefund(id);
        assertEq(_ledger.escrowCredits() - credits, escrow.requestOf(id).deposit, "MONEY-02");
        _assertStatusIs(id, RequestStatus.Refunded);
    }

    // ------------------------------------------------------------------------------------------------------- misbehaviour

    function _reportEquivocation(RequestId id) private {
        uint16 stage = uint16(_routedLiar(id));
        uint256 liar = _indexOf(_executorOf(id, stage));
        HandOver memory first = HandOver(id, stage, true, 3, "one");
        HandOver memory second = HandOver(id, stage, true, 3, "another");
        uint256 credits = _ledger.escrowCredits();
        verification.reportEquivocation(
            first, _signHandOver(liar, first), second, _signHandOver(liar, second), _hot(liar)
        );
        assertEq(registry.accountOf(_hot(liar)).staked, 0, "EQUIV-01");
        assertEq(_ledger.escrowCredits() - credits, escrow.requestOf(id).deposit, "MONEY-02");
    }

    function _reportContradiction(RequestId id) private {
        uint16 stage = uint16(_contradictable(id));
        uint256 liar = _indexOf(_executorOf(id, stage));
        HandOver memory statement = HandOver(id, stage, false, 0, "what it never received");
        verification.reportContradiction(
            statement, _signHandOver(liar, statement), _evidence(id, stage), new bytes32[](0)
        );
        assertEq(registry.accountOf(_hot(liar)).staked, 0);
    }

    /// COPY-01: what a member opened opens nobody else's commitment, and makes none.
    function _copyReveal(RequestId id, uint256 seed) private {
        uint8 round = verification.verificationOf(id).round;
        address member = _someMember(id);
        uint16 stage = verification.attestationOf(id, round, 0, member).commitment != 0 ? 0 : 1;
        Claim memory claim = _claimOf(id, round, stage, member);
        address copier = _hot(_nodes[seed % _nodes.length]);
        if (copier == member) copier = _intruder;
        vm.prank(copier);
        (bool copied,) = address(verification)
            .call(
                abi.encodeCall(
                    IOutputVerification.revealAttestation,
                    (id, stage, claim.root, claim.sketch, claim.tokens, claim.salt)
                )
            );
        assertFalse(copied, "COPY-01");
    }

    /// ROLE-01: nothing that belongs to another contract or role can be done by a stranger, a node, an operator or the publisher.
    function _intrude(RequestId id, uint256 seed) private {
        address[4] memory who = [_intruder, _hot(seed % HONEST), _operator(seed % HONEST), publisher];
        address node = _hot(1);
        _expectShut(who[seed % 4], address(registry), abi.encodeCall(registry.jail, (node, type(uint64).max)));
        _expectShut(who[seed % 4], address(registry), abi.encodeCall(registry.openDuty, (node)));
        _expectShut(who[seed % 4], address(registry), abi.encodeCall(registry.closeDuty, (node)));
        _expectShut(
            who[seed % 4],
            address(registry),
            abi.encodeCall(registry.slash, (node, 1, SlashReason.Equivocation, new address[](0), new uint256[](0)))
        );
        _expectShut(who[seed % 4], address(escrow), abi.encodeCall(escrow.markVerified, (id)));
        _expectShut(who[seed % 4], address(escrow), abi.encodeCall(escrow.refund, (id)));
        _expectShut(
            who[seed % 4], address(escrow), abi.encodeCall(escrow.settle, (id, 1, new bool[](STAGES), new address[](0)))
        );
        _expectShut(who[seed % 4], address(verification), abi.encodeCall(verification.abandon, (id)));
    }

    function _expectShut(address who, address target, bytes memory call_) private {
        vm.prank(who);
        (bool open,) = target.call(call_);
        assertFalse(open, "ROLE-01");
    }

    function _forceMoney(uint256 seed) private {
        address[3] memory targets = [address(registry), address(escrow), address(verification)];
        address target = targets[seed % 3];
        uint256 amount = 1 + seed % 1 ether;
        vm.deal(address(this), amount);
        new ForcedMoney().send{value: amount}(target);
        _ledger.forcedOn(target, amount);
    }

    // ---------------------------------------------------------------------------------------------------- operators' acts

    function _thaw(uint256 seed) private {
        uint256 i = seed % HONEST;
        NodeAccount memory account = registry.accountOf(_hot(i));
        uint256 bonded = account.staked - account.thawing;
        uint256 amount = 1 + seed % 1 ether;
        if (bonded < amount + 1 ether) _topUp(i, amount + 1 ether - bonded);
        vm.prank(_operator(i));
        registry.thaw(_hot(i), amount);
    }

    function _withdrawStake(uint256 seed) private {
        uint256 i = seed % HONEST;
        for (uint256 k = 0; k < HONEST && registry.accountOf(_hot(i)).thawing == 0; k++) {
            i = (i + 1) % HONEST;
        }
        NodeAccount memory account = registry.accountOf(_hot(i));
        if (account.thawing == 0) {
            _thaw(i);
            account = registry.accountOf(_hot(i));
        }
        if (block.timestamp < account.thawEnd) vm.warp(account.thawEnd);
        uint256 before = _operator(i).balance;
        vm.prank(_operator(i));
        registry.withdraw(_hot(i));
        assertEq(_operator(i).balance - before, account.thawing);
        _ledger.stakeTaken(i, account.thawing);
    }

    /// @dev Free the jailed, top up the slashed, replace the buried.
    function _repair() private {
        for (uint256 i = 0; i < _nodes.length; i++) {
            uint256 node = _nodes[i];
            NodeAccount memory account = registry.accountOf(_hot(node));
            if (account.jailedUntil == type(uint64).max) continue;
            uint256 bonded = account.staked - account.thawing;
            if (bonded < STAKE / 2) _topUp(node, STAKE - bonded);
            if (registry.statusOf(_hot(node)) != NodeStatus.Jailed) continue;
            if (block.timestamp < account.jailedUntil) vm.warp(account.jailedUntil);
            vm.prank(_operator(node));
            registry.leaveJail(_hot(node));
        }
        bool replaced;
        for (uint256 i = 0; i < 2; i++) {
            if (registry.accountOf(_hot(_liars[i])).jailedUntil != type(uint64).max) continue;
            _liars[i] = _nextNode++;
            _join(_liars[i]);
            replaced = true;
        }
        vm.warp(block.timestamp + registry.activationDelay());
        if (replaced) _publishNext();
    }

    function _wait(uint256 time) private {
        vm.warp(block.timestamp + time);
        vm.roll(block.number + 1);
    }

    function _withdrawSomeCredit(uint256 seed) private {
        address[] memory accounts = _ledger.creditors();
        for (uint256 i = 0; i < accounts.length; i++) {
            address account = accounts[(seed % accounts.length + i) % accounts.length];
            if (escrow.creditOf(account) == 0) continue;
            uint256 before = account.balance;
            uint256 credit = escrow.creditOf(account);
            escrow.withdrawCredit(account);
            assertEq(account.balance - before, credit);
            return;
        }
        _claimRefund(_openNext());
        escrow.withdrawCredit(requester);
    }

    /// CDV-02, STAKE-04: tallies by any medoid that passes, and lets the ledger see who loses what.
    function _tallyWatched(RequestId id, uint16 stage, uint8 round) private {
        bool guarded = _ledger.honestMajority(id, stage, round);
        uint256[] memory before = _ledger.stakes();
        _tallyStage(id, stage, verification.membersOf(id, round, stage).length);
        slashes += _ledger.judge(id, stage, round, guarded, before);
        if (guarded) guardedTallies++;
        if (guarded && round > 1) guardedBackupTallies++;
    }

    function _check() internal view {
        _ledger.checkMoney();
        _ledger.checkStake(_clock);
        _ledger.checkVerdicts(this.claimOf);
    }

    /// @dev A run in which an action was never performed fails. What is shorter than a run is the replay of a shrunk failure.
    function _finish() internal {
        for (uint256 i = 0; i < ACTIONS && _steps >= RUN; i++) {
            assertGt(counts[i], 0, string.concat("action never performed: ", vm.toString(i)));
        }
        if (_steps >= RUN) {
            assertGt(guardedTallies, 0, "no tally with an honest majority");
            assertGt(guardedBackupTallies, 0, "none that could slash");
        }
        vm.warp(_clock + 365 days);
        _ledger.finish();
    }

    // --------------------------------------------------------------------------------------------------------- shorthand

    function claimOf(RequestId id, uint8 round, uint16 stage, address node) external view returns (Claim memory) {
        return _claimOf(id, round, stage, node);
    }

    function _join(uint256 node) private {
        _addNode(node, STAKE);
        _nodes.push(node);
        _ledger.joined(node, STAKE);
    }

    function _topUp(uint256 node, uint256 amount) private {
        vm.deal(_operator(node), _operator(node).balance + amount);
        vm.prank(_operator(node));
        registry.addStake{value: amount}(_hot(node));
        _ledger.stakeAdded(node, amount);
    }

    /// @dev Stage 0 on the nodes 0, 1 and the first liar, stage 1 on 2, 3 and the second; 4 and 5 only verify.
    function _publishNext() private {
        Assignment[] memory plan = new Assignment[](6);
        for (uint16 i = 0; i < 6; i++) {
            uint16 stage = i / 3;
            uint256 node = i % 3 == 2 ? _liars[stage] : 2 * uint256(stage) + i % 3;
            plan[i] = Assignment(stage, i % 3, 2 * stage, 2 * stage + 2, _hot(node), 100 + stage, EXECUTION_CLASS);
        }
        // A node in jail cannot be planned for; the old plan then stays.
        for (uint256 i = 0; i < 6; i++) {
            NodeStatus status = registry.statusOf(plan[i].node);
            if (status != NodeStatus.Active && status != NodeStatus.Pending) return;
        }
        _plan = _publish(_model, FEE, plan);
        vm.warp(block.timestamp + 100);
    }

    function _lies(uint256 node, uint256 seed) private view returns (bool) {
        return !_calm && node >= HONEST && seed % 4 != 0;
    }

    function _honestClaim(RequestId id, uint16 stage, uint256 seed) private pure returns (Claim memory) {
        return _moved(_truth(id, stage), seed % (R + 1));
    }

    /// @dev Another model's output, something near the edge of what passes, another length, or of a member the true output without
    ///      what is inside the stage.
    function _lie(RequestId id, uint16 stage, uint256 seed) private pure returns (Claim memory claim) {
        claim = _truth(id, stage);
        uint256 kind = (seed >> 32) % 4;
        if (kind == 0) return _moved(claim, 3 * TAU);
        if (kind == 1) return _moved(claim, R + 1 + (seed >> 40) % (4 * TAU));
        if (kind == 2) claim.tokens = 1;
        if (kind == 3) claim.root = _moveSketch(claim.root, R + 1 + (seed >> 40) % (4 * TAU));
        return claim;
    }

    function _evidence(RequestId id, uint16 stage) private pure returns (EvidenceStep memory) {
        bytes32 output = keccak256(abi.encode(id, stage));
        return EvidenceStep({
            step: 0,
            position: 0,
            rows: PROMPT_TOKENS,
            inputDigest: "in",
            outputDigest: output,
            inputChain: keccak256(abi.encode(bytes32(0), bytes32("in"))),
            outputChain: keccak256(abi.encode(bytes32(0), output)),
            fingerprint: "print"
        });
    }

    /// @dev First stage that a liar not yet buried executes, or STAGES.
    function _routedLiar(RequestId id) private view returns (uint256) {
        for (uint16 stage = 0; stage < STAGES; stage++) {
            address node = _executorOf(id, stage);
            for (uint256 i = 0; i < 2; i++) {
                if (node == _hot(_liars[i]) && registry.accountOf(node).jailedUntil != type(uint64).max) return stage;
            }
        }
        return STAGES;
    }

    function _contradictable(RequestId id) private view returns (uint256 stage) {
        stage = _routedLiar(id);
        if (stage < STAGES && !verification.stageRecordOf(id, uint16(stage)).revealed) stage = STAGES;
    }

    function _someMember(RequestId id) private view returns (address) {
        uint8 round = verification.verificationOf(id).round;
        for (uint16 stage = 0; stage < STAGES; stage++) {
            address[] memory members = verification.membersOf(id, round, stage);
            if (members.length > 0) return members[0];
        }
        return address(0);
    }

    function _isTallied(RequestId id, uint16 stage, uint8 round) private view returns (bool) {
        return verification.stageRecordOf(id, stage).round == round;
    }

    function _allRevealed(RequestId id, uint16 stage, uint8 round) private view returns (bool) {
        if (!verification.stageRecordOf(id, stage).revealed) return false;
        address[] memory members = verification.membersOf(id, round, stage);
        for (uint256 i = 0; i < members.length; i++) {
            if (!verification.attestationOf(id, round, stage, members[i]).revealed) return false;
        }
        return true;
    }

    function _endRevealingOf(Verification memory state) private {
        if (block.timestamp <= state.revealDeadline) vm.warp(uint256(state.revealDeadline) + 1);
    }

    function _assertStatusIs(RequestId id, RequestStatus expected) private view {
        assertEq(uint8(escrow.requestOf(id).status), uint8(expected));
    }

    receive() external payable {}
}
