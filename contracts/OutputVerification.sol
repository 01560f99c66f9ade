// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

import {MerkleProofLib} from "solady/utils/MerkleProofLib.sol";
import {FixedPointMathLib} from "solady/utils/FixedPointMathLib.sol";
import {ReentrancyGuardTransient} from "solady/utils/ReentrancyGuardTransient.sol";
import {SafeTransferLib} from "solady/utils/SafeTransferLib.sol";

import {IInferenceEscrow, RequestStatus} from "./interfaces/IInferenceEscrow.sol";
import {INodeRegistry, SlashReason} from "./interfaces/INodeRegistry.sol";
import {
    Attestation,
    EvidenceStep,
    HandOver,
    IOutputVerification,
    Phase,
    StageRecord,
    StageVerdict,
    Verification
} from "./interfaces/IOutputVerification.sol";
import {DistributionSketch} from "./libraries/DistributionSketch.sol";
import {MerkleTree} from "./libraries/MerkleTree.sol";
import {NodeSignature} from "./libraries/NodeSignature.sol";
import {TypedData} from "./libraries/TypedData.sol";
import {RequestId} from "./types/Identifiers.sol";
import {EscrowTerms, VerificationTerms} from "./types/Terms.sol";

/// @title Consensus-based distribution verification (CDV)
/// @notice See IOutputVerification. No owner, no setter, no proxy.
/// @dev Every window ends by itself: a phase that follows from time is derived when it is read and stored by the next call. Each duty
///      that a member takes on is closed exactly once, when its request is final. Bonds are the only money held here, and they are
///      paid out of a variable, never out of the balance.
contract OutputVerification is IOutputVerification, ReentrancyGuardTransient {
    /// @dev EIP-712 type and domain of a hand-over statement.
    bytes32 private constant _HAND_OVER_TYPEHASH =
        keccak256("HandOver(bytes32 requestId,uint16 stage,bool sent,uint32 step,bytes32 chain)");
    /// @dev Sets a commitment apart from every other hash of the protocol. No domain is needed: the request id names chain and contract.
    bytes32 private constant _STAGE_COMMITMENT_TYPEHASH = keccak256(
        "StageCommitment(bytes32 requestId,uint8 round,uint16 stage,address node,bytes32 evidenceRoot,bytes32 sealedSketch,uint32 outputTokens)"
    );
    bytes32 private constant _DOMAIN_NAME_HASH = keccak256("bsns OutputVerification");
    uint8 private constant _MAXIMUM_ROUNDS = 3;
    uint256 private constant _MAXIMUM_MEMBERS = 16;
    uint256 private constant _BASIS_POINTS = 10_000;
    uint256 private constant _MAXIMUM_REWARD_BPS = 5000;
    /// @dev 2 tau may reach at most half of the largest distance, or nothing could ever be rejected.
    uint256 private constant _MAXIMUM_TOLERANCE = 1024;
    /// @dev Seconds for the transactions between the windows of a dispute.
    uint256 private constant _MARGIN = 1 hours;
    uint256 private constant _MAXIMUM_WINDOW = 3650 days;
    /// @dev Enough for a contract wallet that logs its receipts, and a bound on what a hostile receiver can burn.
    uint256 private constant _TRANSFER_GAS = 100_000;
    uint64 private constant _FOR_EVER = type(uint64).max;
    uint16 private constant _NOBODY_BLAMED = type(uint16).max;
    /// @dev Failure of a request in which no stage is proven wrong.
    uint8 private constant _UNDECIDED = type(uint8).max;

    /// @dev Where one request stands. Sets of stages are bit maps; a request has at most 32 stages.
    struct Docket {
        Phase phase;
        uint8 round;
        uint16 stageCount;
        bool sampled;
        uint64 entropyBlock;
        uint64 snapshotTime;
        uint64 secretDeadline;
        // ---
        uint64 attestDeadline;
        uint64 challengeDeadline;
        /// Stages that have committed, until all have; then those that lack a tally in this round.
        uint32 pending;
        /// Stages before a committee in this round.
        uint32 disputed;
        /// Stages whose committee of this round can still grow.
        uint32 growing;
        /// Stages that need another round.
        uint32 escalating;
        // ---
        uint128 snapshotStake;
        /// Stages whose challenger's bond is still held.
        uint32 challenged;
        uint32 maximumTokens;
        /// 0 while the request can still be accepted; else the first stage proven wrong or withheld, plus one, or _UNDECIDED.
        uint8 failure;
        // ---
        bytes32 seed;
        mapping(uint256 stage => StageFile) files;
        mapping(uint256 roundAndStage => Committee) committees;
    }

    /// @dev What the executor of one stage committed to and revealed, and what became of it.
    struct StageFile {
        bytes32 commitment;
        bytes32 evidenceRoot;
        bytes32 sketch;
        uint32 outputTokens;
        bool revealed;
        StageVerdict verdict;
        uint8 round;
        address challenger;
    }

    /// @dev The members of one stage in one round. Sets of members are bit maps over their indices.
    struct Committee {
        uint128 stake;
        uint8 size;
        uint8 reveals;
        /// Members within tau of the last accepted medoid.
        uint16 agreeing;
        /// Members that were slashed for this stage; nobody is slashed twice for one attestation.
        uint16 slashed;
        address[_MAXIMUM_MEMBERS] members;
        mapping(address node => Attestation) attestations;
    }

    /// @dev One attestation as the tally reads it.
    struct Ballot {
        address node;
        uint256 stake;
        bool revealed;
        uint256 outputTokens;
        bytes32 sketch;
        bytes32 innerSketch;
    }

    /// @dev All ballots of one stage in one round.
    struct Bench {
        Ballot[] ballots;
        uint256 reveals;
        uint256 revealedStake;
    }

    /// @dev One judgement: whose, and the medoid it is measured against.
    struct Judgement {
        RequestId requestId;
        uint16 stage;
        uint256 round;
        Ballot medoid;
        /// Cold keys of the members within tau in the round that decides, and the challenger of the stage at the end.
        address[] recipients;
    }

    /// @inheritdoc IOutputVerification
    INodeRegistry public immutable registry;
    /// @inheritdoc IOutputVerification
    IInferenceEscrow public immutable escrow;
    /// @inheritdoc IOutputVerification
    uint256 public immutable longestDispute;
    uint16 private immutable _committeeSeats;
    uint16 private immutable _minimumReveals;
    uint16 private immutable _tolerance;
    uint64 private immutable _attestWindow;
    uint64 private immutable _revealWindow;

    /// @dev Written once, by the constructor. What every request needs is an immutable besides.
    VerificationTerms private _terms;
    mapping(RequestId => Docket) private _dockets;
    mapping(bytes32 report => bool) private _reported;
    mapping(address account => uint256) private _credits;

    constructor(address registry_, address escrow_, VerificationTerms memory terms_) {
        registry = INodeRegistry(registry_);
        escrow = IInferenceEscrow(escrow_);
        _terms = terms_;
        _committeeSeats = terms_.committeeSeats;
        _minimumReveals = terms_.minimumReveals;
        _tolerance = terms_.tolerance;
        _attestWindow = terms_.attestWindow;
        _revealWindow = terms_.revealWindow;

        longestDispute = uint256(terms_.secretWindow) + _MARGIN + _MAXIMUM_ROUNDS
            * (uint256(terms_.attestWindow) + terms_.revealWindow + terms_.challengeWindow);

        _requireSafe(terms_);
        _requireFinalBeforeExit();
        _requireWired(address(this), registry.verification());
        _requireWired(address(this), escrow.verification());
        _requireWired(registry_, address(escrow.registry()));
        _requireWired(escrow_, registry.escrow());
    }

    modifier onlyEscrow() {
        if (msg.sender != address(escrow)) revert NotEscrow(msg.sender);
        _;
    }

    // ---------------------------------------------------------------------------------------------------------------------
    //  Commitments of the executors
    // ---------------------------------------------------------------------------------------------------------------------

    /// @inheritdoc IOutputVerification
    function commitStage(RequestId requestId, uint16 stage, bytes32 commitment) external {
        (RequestStatus status, uint16 stageCount, uint64 deadline, uint32 maximumTokens) = escrow.statusOf(requestId);
        if (status == RequestStatus.Expired) _requireBefore(deadline);
        if (status != RequestStatus.Routed) revert RequestNotRouted(requestId);
        _requireExecutor(requestId, stage);
        Docket storage docket = _dockets[requestId];
        uint32 committed = docket.pending;
        if (_has(committed, stage)) revert StageAlreadyCommitted(requestId, stage);

        committed |= _bit(stage);
        docket.pending = committed;
        _recordCommitment(requestId, docket, stage, msg.sender, commitment);
        if (committed == _allOf(stageCount)) _awaitDraw(requestId, docket, stageCount, maximumTokens);
    }

    /// @inheritdoc IOutputVerification
    function commitStages(RequestId requestId, bytes32[] calldata commitments, uint32 maximumTokens)
        external
        onlyEscrow
    {
        Docket storage docket = _dockets[requestId];
        uint16 stageCount = uint16(commitments.length); // the escrow has routed it: at most 32
        docket.pending = _allOf(stageCount);
        docket.sampled = true;
        for (uint16 i; i < stageCount; ++i) {
            _recordCommitment(requestId, docket, i, _executorOf(requestId, i), commitments[i]);
        }
        _awaitDraw(requestId, docket, stageCount, maximumTokens);
    }

    // ---------------------------------------------------------------------------------------------------------------------
    //  Draw
    // ---------------------------------------------------------------------------------------------------------------------

    /// @inheritdoc IOutputVerification
    function drawCommittee(RequestId requestId, bytes32 secret) external {
        Docket storage docket = _docketIn(requestId, Phase.AwaitingDraw);
        uint64 entropyBlock = docket.entropyBlock;
        if (block.number <= entropyBlock) revert EntropyNotReady(entropyBlock, block.number);
        _requireSecret(requestId, docket.secretDeadline, secret);

        bytes32 entropy = blockhash(entropyBlock);
        if (entropy == 0) {
            _renewEntropy(requestId, docket);
            return;
        }

        uint16 stageCount = docket.stageCount;
        bytes32 seed = keccak256(abi.encode(secret, _commitmentsDigest(docket, stageCount), entropy, requestId));
        // The seed mixes a secret fixed at the opening with the hash of a block after all commitments.
        // slither-disable-next-line weak-prng
        bool sampled =
            docket.sampled || uint256(keccak256(abi.encode(seed, "sample"))) % _BASIS_POINTS < _terms.samplingRateBps;
        docket.seed = seed;
        docket.round = 1;
        uint64 attestDeadline;
        if (sampled) {
            docket.sampled = true;
            attestDeadline = _openCommittees(docket, docket.pending);
        } else {
            _openReveals(docket);
        }
        emit CommitteeDrawn(requestId, 1, sampled, seed, secret, attestDeadline);
    }

    // ---------------------------------------------------------------------------------------------------------------------
    //  Attestations
    // ---------------------------------------------------------------------------------------------------------------------

    /// @inheritdoc IOutputVerification
    /// @dev CDV-01: commitments close before the first reveal of the round can be made, so there is nothing to copy.
    function commitAttestations(RequestId requestId, uint16[] calldata stages, bytes32[] calldata commitments)
        external
    {
        if (stages.length != commitments.length) revert LengthMismatch(stages.length, commitments.length);
        Docket storage docket = _docketIn(requestId, Phase.Attesting);
        uint128 stake = _stakeIn(docket, msg.sender);
        address operator = _operatorOf(msg.sender);
        for (uint256 i; i < stages.length; ++i) {
            _commitAttestation(requestId, docket, stages[i], commitments[i], stake, operator);
        }
        if (docket.growing == 0) _openReveals(docket);
    }

    /// @inheritdoc IOutputVerification
    function revealStage(
        RequestId requestId,
        uint16 stage,
        bytes32 evidenceRoot,
        bytes32 sketch,
        uint32 outputTokens,
        bytes32 salt
    ) external {
        Docket storage docket = _docketIn(requestId, Phase.Revealing);
        _requireExecutor(requestId, stage);
        StageFile storage file = docket.files[stage];
        if (outputTokens == 0) revert TokensOutOfRange(docket.maximumTokens, 0);
        bytes32 opened = commitmentOf(requestId, 0, stage, msg.sender, evidenceRoot, sealOf(sketch, salt), outputTokens);
        _requireOpening(docket, stage, file.revealed, outputTokens, file.commitment, opened);

        file.evidenceRoot = evidenceRoot;
        file.sketch = sketch;
        file.outputTokens = outputTokens;
        file.revealed = true;
        emit StageRevealed(requestId, stage, msg.sender, evidenceRoot, sketch, outputTokens, salt);
    }

    /// @inheritdoc IOutputVerification
    function revealAttestation(
        RequestId requestId,
        uint16 stage,
        bytes32 innerSketch,
        bytes32 sketch,
        uint32 outputTokens,
        bytes32 salt
    ) external {
        Docket storage docket = _docketIn(requestId, Phase.Revealing);
        uint8 round = docket.round;
        Committee storage committee = _committee(docket, round, stage);
        Attestation storage attestation = committee.attestations[msg.sender];
        bytes32 opened =
            commitmentOf(requestId, round, stage, msg.sender, innerSketch, sealOf(sketch, salt), outputTokens);
        _requireOpening(docket, stage, attestation.revealed, outputTokens, attestation.commitment, opened);

        attestation.innerSketch = innerSketch;
        attestation.sketch = sketch;
        attestation.outputTokens = outputTokens;
        attestation.revealed = true;
        unchecked {
            ++committee.reveals; // each of at most 16 members once
        }
        emit AttestationRevealed(requestId, round, stage, msg.sender, innerSketch, sketch, outputTokens, salt);
    }

    // ---------------------------------------------------------------------------------------------------------------------
    //  Tally
    // ---------------------------------------------------------------------------------------------------------------------

    /// @inheritdoc IOutputVerification
    /// @dev Registry and escrow are immutable contracts of this project; neither runs foreign code in what is called here.
    // slither-disable-next-line reentrancy-no-eth
    function tally(RequestId requestId, uint16 stage, uint256 medoid) external {
        Docket storage docket = _docketIn(requestId, Phase.Revealing);
        _requireJudgeable(docket, stage);
        if (!_judgedWithoutCommittee(requestId, docket, stage)) _judge(requestId, docket, stage, medoid);
        _endRound(requestId, docket);
    }

    /// @inheritdoc IOutputVerification
    /// @dev As for `tally`, no foreign code runs in between.
    // slither-disable-next-line reentrancy-no-eth
    function tallyWithoutQuorum(RequestId requestId, uint16 stage) external {
        Docket storage docket = _docketIn(requestId, Phase.Revealing);
        if (_isUnsampled(docket)) revert StageNotDisputed(stage);
        _requireJudgeable(docket, stage);
        if (!_judgedWithoutCommittee(requestId, docket, stage)) _recordNoQuorum(requestId, docket, stage);
        _endRound(requestId, docket);
    }

    // ---------------------------------------------------------------------------------------------------------------------
    //  Challenge and settlement
    // ---------------------------------------------------------------------------------------------------------------------

    /// @inheritdoc IOutputVerification
    function challenge(RequestId requestId, uint16 stage) external payable {
        Docket storage docket = _dockets[requestId];
        Phase phase = _phaseOf(docket);
        bool joins = phase == Phase.Attesting && docket.round > 1;
        if (phase != Phase.Challengeable && !joins) revert WrongPhase(requestId, Phase.Challengeable, phase);
        if (stage >= docket.stageCount || (joins && _has(docket.disputed, stage))) revert StageNotDisputed(stage);
        if (msg.value != _terms.challengeBond) revert BondMismatch(_terms.challengeBond, msg.value);

        docket.files[stage].challenger = msg.sender;
        docket.challenged |= _bit(stage);
        emit Challenged(requestId, stage, msg.sender, msg.value);
        if (joins) {
            // Without this, the accused could use up the rounds with challenges of somebody else's stage. The first half of the window
            // only, so that members have time to re-execute.
            _requireBefore(docket.attestDeadline - _attestWindow / 2);
            docket.disputed |= _bit(stage);
            docket.pending |= _bit(stage);
            docket.growing |= _bit(stage);
        } else {
            _requireBefore(docket.challengeDeadline);
            if (docket.round == _MAXIMUM_ROUNDS) revert NoRoundLeft(_MAXIMUM_ROUNDS);
            _beginRound(requestId, docket, _bit(stage));
            escrow.reopen(requestId);
        }
    }

    /// @inheritdoc IOutputVerification
    function settle(RequestId requestId) external {
        Docket storage docket = _docketIn(requestId, Phase.Challengeable);
        _requireAfter(docket.challengeDeadline);
        docket.phase = Phase.Final; // CDV-03

        uint256 stageCount = docket.stageCount;
        uint32 outputTokens = docket.maximumTokens;
        bool[] memory stagePaid = new bool[](stageCount);
        for (uint256 i; i < stageCount; ++i) {
            StageFile storage file = docket.files[i];
            stagePaid[i] = file.verdict == StageVerdict.Accepted;
            if (file.outputTokens < outputTokens) outputTokens = file.outputTokens;
        }
        emit RequestConcluded(requestId, true, _NOBODY_BLAMED, outputTokens);
        escrow.settle(requestId, outputTokens, stagePaid, _closeDuties(docket));
    }

    /// @inheritdoc IOutputVerification
    function abandon(RequestId requestId) external onlyEscrow {
        _close(requestId, _dockets[requestId]);
    }

    // ---------------------------------------------------------------------------------------------------------------------
    //  Proofs that need no committee
    // ---------------------------------------------------------------------------------------------------------------------

    /// @inheritdoc IOutputVerification
    function reportEquivocation(
        HandOver memory first,
        bytes calldata firstSignature,
        HandOver memory second,
        bytes calldata secondSignature,
        address node
    ) external {
        bool sameDuty = RequestId.unwrap(first.requestId) == RequestId.unwrap(second.requestId)
            && first.stage == second.stage && first.sent == second.sent && first.step == second.step;
        if (!sameDuty || first.chain == second.chain) revert StatementsAgree();
        _requireSigned(first, firstSignature, node);
        _requireSigned(second, secondSignature, node);
        _punishContradiction(first, node);
    }

    /// @inheritdoc IOutputVerification
    function reportContradiction(
        HandOver memory statement,
        bytes calldata signature,
        EvidenceStep calldata evidence,
        bytes32[] calldata proof
    ) external {
        StageFile storage file = _dockets[statement.requestId].files[statement.stage];
        if (!file.revealed) revert EvidenceNotRevealed(statement.stage);
        bytes32 leaf = MerkleTree.leafOf(keccak256(abi.encode(evidence)));
        if (!MerkleProofLib.verifyCalldata(proof, file.evidenceRoot, leaf)) revert ProofInvalid(file.evidenceRoot);
        bytes32 chain = statement.sent ? evidence.outputChain : evidence.inputChain;
        if (statement.step != evidence.step || statement.chain == chain) revert StatementsAgree();
        address executor = _executorOf(statement.requestId, statement.stage);
        _requireSigned(statement, signature, executor);
        _punishContradiction(statement, executor);
    }

    // ---------------------------------------------------------------------------------------------------------------------
    //  Credits
    // ---------------------------------------------------------------------------------------------------------------------

    /// @inheritdoc IOutputVerification
    function withdrawCredit(address account) external nonReentrant {
        uint256 amount = _credits[account];
        if (amount == 0) revert NoCredit(account);
        _credits[account] = 0;
        emit CreditWithdrawn(account, amount);
        // A receiver that refuses the money stops nobody but itself.
        if (!SafeTransferLib.trySafeTransferETH(account, amount, _TRANSFER_GAS)) {
            revert TransferFailed(account, amount);
        }
    }

    // ---------------------------------------------------------------------------------------------------------------------
    //  Views
    // ---------------------------------------------------------------------------------------------------------------------

    /// @inheritdoc IOutputVerification
    function verificationOf(RequestId requestId) external view returns (Verification memory) {
        Docket storage docket = _dockets[requestId];
        Phase phase = _phaseOf(docket);
        return Verification({
            phase: phase,
            round: docket.round,
            stageCount: docket.stageCount,
            outstanding: uint16(_count(docket.pending)),
            sampled: docket.sampled,
            entropyBlock: docket.entropyBlock,
            snapshotTime: docket.snapshotTime,
            secretDeadline: docket.secretDeadline,
            attestDeadline: docket.attestDeadline,
            revealDeadline: uint64(_revealDeadline(docket)),
            challengeDeadline: docket.challengeDeadline,
            snapshotStake: docket.snapshotStake,
            seed: docket.seed
        });
    }

    /// @inheritdoc IOutputVerification
    function stageRecordOf(RequestId requestId, uint16 stage) external view returns (StageRecord memory) {
        Docket storage docket = _dockets[requestId];
        StageFile storage file = docket.files[stage];
        return StageRecord({
            commitment: file.commitment,
            evidenceRoot: file.evidenceRoot,
            sketch: file.sketch,
            outputTokens: file.outputTokens,
            revealed: file.revealed,
            verdict: file.verdict,
            round: file.round,
            disputed: _has(docket.disputed, stage),
            challenger: file.challenger,
            bond: _has(docket.challenged, stage) ? _terms.challengeBond : 0
        });
    }

    /// @inheritdoc IOutputVerification
    function membersOf(RequestId requestId, uint8 round, uint16 stage)
        external
        view
        returns (address[] memory members)
    {
        Committee storage committee = _committee(_dockets[requestId], round, stage);
        members = new address[](committee.size);
        for (uint256 i; i < members.length; ++i) {
            members[i] = committee.members[i];
        }
    }

    /// @inheritdoc IOutputVerification
    function attestationOf(RequestId requestId, uint8 round, uint16 stage, address node)
        external
        view
        returns (Attestation memory)
    {
        return _committee(_dockets[requestId], round, stage).attestations[node];
    }

    /// @inheritdoc IOutputVerification
    function creditOf(address account) external view returns (uint256) {
        return _credits[account];
    }

    /// @inheritdoc IOutputVerification
    function isSeated(RequestId requestId, uint16 stage, address node) external view returns (bool) {
        Docket storage docket = _dockets[requestId];
        if (!_has(docket.disputed, stage)) return false;
        return _isSeated(docket, stage, node, _operatorOf(node), _stakeIn(docket, node), _executorOf(requestId, stage));
    }

    /// @inheritdoc IOutputVerification
    function terms() external view returns (VerificationTerms memory) {
        return _terms;
    }

    /// @inheritdoc IOutputVerification
    function sketchDistance(bytes32 a, bytes32 b) external pure returns (uint256) {
        return DistributionSketch.distance(a, b);
    }

    /// @inheritdoc IOutputVerification
    function commitmentOf(
        RequestId requestId,
        uint8 round,
        uint16 stage,
        address node,
        bytes32 evidenceRoot,
        bytes32 sealedSketch,
        uint32 outputTokens
    ) public pure returns (bytes32) {
        return keccak256(
            abi.encode(
                _STAGE_COMMITMENT_TYPEHASH, requestId, round, stage, node, evidenceRoot, sealedSketch, outputTokens
            )
        );
    }

    /// @inheritdoc IOutputVerification
    function sealOf(bytes32 sketch, bytes32 salt) public pure returns (bytes32) {
        return keccak256(abi.encode(sketch, salt));
    }

    // ---------------------------------------------------------------------------------------------------------------------
    //  Inside: draw and committees
    // ---------------------------------------------------------------------------------------------------------------------

    function _recordCommitment(
        RequestId requestId,
        Docket storage docket,
        uint16 stage,
        address node,
        bytes32 commitment
    ) private {
        if (commitment == 0) revert CommitmentMissing();
        docket.files[stage].commitment = commitment;
        emit StageCommitted(requestId, stage, node, commitment);
    }

    /// @dev All stages have committed. The snapshot is taken before anybody can know the entropy: the hash of a block after this one.
    ///      All stake together is within 128 bits.
    function _awaitDraw(RequestId requestId, Docket storage docket, uint16 stageCount, uint32 maximumTokens) private {
        uint64 entropyBlock = uint64(block.number) + 1;
        uint64 secretDeadline = _after(_terms.secretWindow);
        uint128 snapshotStake = uint128(registry.totalSortitionStake());
        docket.phase = Phase.AwaitingDraw;
        docket.stageCount = stageCount;
        docket.entropyBlock = entropyBlock;
        docket.snapshotTime = uint64(block.timestamp);
        docket.secretDeadline = secretDeadline;
        docket.snapshotStake = snapshotStake;
        docket.maximumTokens = maximumTokens;
        emit CommitmentsComplete(requestId, entropyBlock, uint64(block.timestamp), snapshotStake, secretDeadline);
        escrow.markCommitted(requestId);
    }

    /// @dev Before the secret deadline nobody but the requester can draw; after it nobody has to wait for the requester.
    function _requireSecret(RequestId requestId, uint64 secretDeadline, bytes32 secret) private view {
        if (secret == 0 && block.timestamp > secretDeadline) return;
        bytes32 expected = escrow.secretHashOf(requestId);
        bytes32 actual = keccak256(abi.encode(secret));
        if (actual == expected) return;
        if (secret == 0) _requireAfter(secretDeadline);
        revert SecretMismatch(expected, actual);
    }

    /// @dev A renewal also ends the wait for the secret: whoever lets a block hash lapse must not get to choose among several.
    function _renewEntropy(RequestId requestId, Docket storage docket) private {
        uint64 entropyBlock = uint64(block.number) + 1;
        docket.entropyBlock = entropyBlock;
        if (docket.secretDeadline > _after(0)) docket.secretDeadline = _after(0);
        emit EntropyRenewed(requestId, entropyBlock);
    }

    /// @dev Opens an attest window for `stages`; the reveal window follows it by time alone.
    function _openCommittees(Docket storage docket, uint32 stages) private returns (uint64 attestDeadline) {
        attestDeadline = _after(_attestWindow);
        docket.phase = Phase.Attesting;
        docket.attestDeadline = attestDeadline;
        docket.pending = stages;
        docket.disputed = stages;
        docket.growing = stages;
        docket.escalating = 0;
    }

    /// @dev Nobody is left who could commit: the reveals may begin before the time.
    function _openReveals(Docket storage docket) private {
        docket.phase = Phase.Revealing;
        docket.attestDeadline = _after(0);
    }

    function _beginRound(RequestId requestId, Docket storage docket, uint32 stages) private {
        uint8 round = docket.round + 1;
        bytes32 seed = keccak256(abi.encode(docket.seed, round));
        docket.round = round;
        docket.seed = seed;
        emit RoundEscalated(requestId, round, seed, _openCommittees(docket, stages));
    }

    function _commitAttestation(
        RequestId requestId,
        Docket storage docket,
        uint16 stage,
        bytes32 commitment,
        uint128 stake,
        address operator
    ) private {
        if (!_has(docket.disputed, stage)) revert StageNotDisputed(stage);
        if (commitment == 0) revert CommitmentMissing();
        uint8 round = docket.round;
        address executor = _executorOf(requestId, stage);
        if (!_isSeated(docket, stage, msg.sender, operator, stake, executor)) {
            revert NotSeated(msg.sender, stage, round);
        }
        Committee storage committee = _committee(docket, round, stage);
        Attestation storage attestation = committee.attestations[msg.sender];
        if (attestation.commitment != 0) revert AlreadyCommitted(msg.sender, stage);
        uint8 size = committee.size;
        if (size == _MAXIMUM_MEMBERS) revert CommitteeFull(stage, _MAXIMUM_MEMBERS);

        uint128 seatedStake = committee.stake + stake;
        attestation.commitment = commitment;
        attestation.stake = stake;
        committee.members[size] = msg.sender;
        committee.size = size + 1;
        committee.stake = seatedStake;
        emit AttestationCommitted(requestId, round, stage, msg.sender, commitment, stake);
        registry.openDuty(msg.sender);

        // Either it is full, or all stake but the executor's has committed: nobody is left who could.
        if (size + 1 == _MAXIMUM_MEMBERS || seatedStake + _stakeIn(docket, executor) >= docket.snapshotStake) {
            docket.growing &= ~_bit(stage);
        }
    }

    /// @dev Self-sortition by stake: a node that splits its stake over several keys gains no seats on average.
    function _isSeated(
        Docket storage docket,
        uint16 stage,
        address node,
        address operator,
        uint256 stake,
        address executor
    ) private view returns (bool) {
        uint256 total = docket.snapshotStake;
        if (stake == 0 || total == 0 || node == executor || operator == _operatorOf(executor)) return false;
        uint8 round = docket.round;
        // At most 16 + 2 + 128 bits.
        uint256 share = _seatsIn(round) * stake;
        // Dividing first is the definition of the draw: it cannot overflow and costs at most 2^-128 of a seat.
        // slither-disable-next-line divide-before-multiply
        uint256 threshold = type(uint256).max / total * (share < total ? share : total);
        return uint256(keccak256(abi.encode(docket.seed, round, stage, node))) <= threshold;
    }

    /// @dev CDV-01: a reveal must open the sender's own commitment of this round, once and in time.
    function _requireOpening(
        Docket storage docket,
        uint16 stage,
        bool revealed,
        uint256 outputTokens,
        bytes32 commitment,
        bytes32 opened
    ) private view {
        if (commitment == 0) revert CommitmentMissing();
        if (revealed) revert AlreadyRevealed(msg.sender, stage);
        _requireBefore(_revealDeadline(docket));
        if (outputTokens > docket.maximumTokens) revert TokensOutOfRange(docket.maximumTokens, outputTokens);
        if (opened != commitment) revert CommitmentMismatch(commitment, opened);
    }

    // ---------------------------------------------------------------------------------------------------------------------
    //  Inside: tally
    // ---------------------------------------------------------------------------------------------------------------------

    /// @dev A stage of this round that is not judged yet and whose reveals are all in, or late.
    function _requireJudgeable(Docket storage docket, uint16 stage) private view {
        bool present = _isUnsampled(docket) ? stage < docket.stageCount : _has(docket.disputed, stage);
        if (!present) revert StageNotDisputed(stage);
        if (!_has(docket.pending, stage)) revert AlreadyTallied(stage);
        if (block.timestamp > _revealDeadline(docket)) return;
        Committee storage committee = _committee(docket, docket.round, stage);
        if (!docket.files[stage].revealed || committee.reveals != committee.size) revert RevealsOutstanding(stage);
    }

    /// @dev What the first round can say without members: an executor that did not open its commitment, or a request without a committee.
    function _judgedWithoutCommittee(RequestId requestId, Docket storage docket, uint16 stage) private returns (bool) {
        StageVerdict verdict;
        if (!docket.files[stage].revealed) verdict = StageVerdict.Withheld;
        else if (_isUnsampled(docket)) verdict = StageVerdict.Accepted;
        else return false;

        _record(requestId, docket, stage, verdict, address(0), 0, 0, 0);
        if (verdict == StageVerdict.Withheld) {
            _fail(docket, uint256(stage) + 1);
            _slash(_executorOf(requestId, stage), _terms.withholdSlashBps, SlashReason.RevealWithheld, new address[](1));
        }
        _jailSilent(_committee(docket, docket.round, stage));
        return true;
    }

    function _judge(RequestId requestId, Docket storage docket, uint16 stage, uint256 medoid) private {
        Committee storage committee = _committee(docket, docket.round, stage);
        Bench memory bench = _benchOf(docket, committee, docket.round);
        if (medoid >= bench.ballots.length) revert MedoidOutOfRange(bench.ballots.length, medoid);
        Ballot memory chosen = bench.ballots[medoid];
        if (!chosen.revealed) revert MedoidNotRevealed(chosen.node);
        uint256 support = _supportOf(bench, chosen);
        _requireQuorum(bench, support);

        Judgement memory judgement;
        judgement.requestId = requestId;
        judgement.stage = stage;
        judgement.round = docket.round;
        judgement.medoid = chosen;

        StageFile storage file = docket.files[stage];
        uint256 distance = _distance(chosen, file.outputTokens, file.sketch);
        StageVerdict verdict = _verdictAt(distance);
        _record(requestId, docket, stage, verdict, chosen.node, support, bench.revealedStake, distance);

        bool unanimous = _markAgreeing(committee, bench, chosen);
        if (judgement.round == 1) {
            // One voice against another calls the backup committee; nothing is proven yet.
            if (!unanimous || verdict == StageVerdict.Rejected) docket.escalating |= _bit(stage);
        } else {
            _enforce(docket, committee, bench, judgement, verdict);
        }
        _jailSilent(committee);
    }

    function _recordNoQuorum(RequestId requestId, Docket storage docket, uint16 stage) private {
        uint8 round = docket.round;
        Committee storage committee = _committee(docket, round, stage);
        Bench memory bench = _benchOf(docket, committee, round);
        for (uint256 i; i < bench.ballots.length; ++i) {
            if (bench.ballots[i].revealed && _hasQuorum(bench, _supportOf(bench, bench.ballots[i]))) {
                revert QuorumExists(stage, i);
            }
        }

        uint256 none = type(uint256).max;
        _record(requestId, docket, stage, StageVerdict.NoQuorum, address(0), 0, bench.revealedStake, none);
        if (round < _MAXIMUM_ROUNDS) docket.escalating |= _bit(stage);
        else _fail(docket, _UNDECIDED); // nobody is proven wrong: the requester is refunded and nobody is slashed
        _jailSilent(committee);
    }

    function _record(
        RequestId requestId,
        Docket storage docket,
        uint16 stage,
        StageVerdict verdict,
        address medoid,
        uint256 support,
        uint256 revealedStake,
        uint256 distance
    ) private {
        StageFile storage file = docket.files[stage];
        file.verdict = verdict;
        file.round = docket.round;
        docket.pending &= ~_bit(stage);
        emit StageTallied(requestId, docket.round, stage, verdict, medoid, support, revealedStake, distance);
    }

    /// @dev The verdict of a backup committee takes effect: CDV-02. The executor and the members of every round of this stage that lie
    ///      beyond 2 tau are slashed, and so is nobody else.
    function _enforce(
        Docket storage docket,
        Committee storage committee,
        Bench memory bench,
        Judgement memory judgement,
        StageVerdict verdict
    ) private {
        address[] memory recipients = _agreeingOperators(committee);
        judgement.recipients = recipients;
        uint256 last = recipients.length - 1;
        bool rejected = verdict == StageVerdict.Rejected;
        if (_has(docket.challenged, judgement.stage)) {
            recipients[last] = docket.files[judgement.stage].challenger;
            _resolveChallenge(docket, judgement, rejected);
        }

        if (rejected) {
            _fail(docket, judgement.stage + 1);
            // Two thirds of the members say that they were not given the evidence.
            bool withheld = judgement.medoid.outputTokens == 0;
            _slash(
                _executorOf(judgement.requestId, judgement.stage),
                withheld ? _terms.withholdSlashBps : _terms.incorrectSlashBps,
                withheld ? SlashReason.EvidenceWithheld : SlashReason.IncorrectOutput,
                judgement.recipients
            );
        }
        recipients[last] = address(0);
        for (uint256 round = 1; round < judgement.round; ++round) {
            Committee storage earlier = _committee(docket, round, judgement.stage);
            Bench memory earlierBench = _benchOf(docket, earlier, round);
            _markAgreeing(earlier, earlierBench, judgement.medoid);
            _slashMembers(earlier, earlierBench, judgement);
        }
        _slashMembers(committee, bench, judgement);
    }

    /// @dev Notes who is within tau of the medoid. Returns whether no member contradicts it.
    function _markAgreeing(Committee storage committee, Bench memory bench, Ballot memory medoid)
        private
        returns (bool unanimous)
    {
        uint256 tolerance = _tolerance;
        uint256 agreeing;
        unanimous = true;
        for (uint256 i; i < bench.ballots.length; ++i) {
            Ballot memory ballot = bench.ballots[i];
            if (!ballot.revealed) continue;
            if (_memberDistance(medoid, ballot) <= tolerance) agreeing |= uint256(1) << i;
            else if (_contradicts(medoid, ballot)) unanimous = false;
        }
        committee.agreeing = uint16(agreeing); // one bit for each of 16 members
    }

    /// @dev Whether the ballot lies beyond 2 tau. Not so if either side says that it was not given the evidence: an executor chooses
    ///      whom it serves, so both can be honest.
    function _contradicts(Ballot memory medoid, Ballot memory ballot) private view returns (bool) {
        if (medoid.outputTokens == 0 || ballot.outputTokens == 0) return false;
        return _memberDistance(medoid, ballot) > 2 * uint256(_tolerance);
    }

    function _slashMembers(Committee storage committee, Bench memory bench, Judgement memory judgement) private {
        for (uint256 i; i < bench.ballots.length; ++i) {
            Ballot memory ballot = bench.ballots[i];
            if (!ballot.revealed || !_contradicts(judgement.medoid, ballot)) continue;
            uint16 bit = uint16(1 << i);
            if (committee.slashed & bit != 0) continue;
            committee.slashed |= bit;
            _slash(ballot.node, _terms.incorrectSlashBps, SlashReason.IncorrectAttestation, judgement.recipients);
        }
    }

    /// @dev A member that committed and then kept silent stalled the others: kept out for a term, not slashed.
    function _jailSilent(Committee storage committee) private {
        uint256 size = committee.size;
        if (committee.reveals == size) return;
        for (uint256 i; i < size; ++i) {
            address member = committee.members[i];
            if (!committee.attestations[member].revealed) _jail(member, _after(_terms.jailPeriod));
        }
    }

    /// @dev After the last tally of a round: refund, another round, or a verdict that can be challenged.
    function _endRound(RequestId requestId, Docket storage docket) private {
        if (docket.pending != 0) return;
        if (docket.escalating != 0) {
            // Also of a request that has failed: an accomplice who sacrifices himself must not spare the liar of another stage.
            _beginRound(requestId, docket, docket.escalating);
        } else if (docket.failure != 0) {
            emit VerdictReached(requestId, false, 0);
            _reject(requestId, docket);
        } else {
            uint64 challengeDeadline = _after(_terms.challengeWindow);
            docket.phase = Phase.Challengeable;
            docket.disputed = 0;
            docket.challengeDeadline = challengeDeadline;
            emit VerdictReached(requestId, true, challengeDeadline);
            escrow.markVerified(requestId);
        }
    }

    /// @dev The request cannot be accepted any more, because of the stage `failure` - 1 or because nothing can be decided.
    function _fail(Docket storage docket, uint256 failure) private {
        uint256 earlier = docket.failure;
        if (earlier == 0 || failure < earlier) docket.failure = uint8(failure); // at most _UNDECIDED
    }

    /// @dev A ballot stands for the stake it was drawn from: what its key has, or one seat's part of all stake if that is more. Who is
    ///      drawn with probability seats * stake / total and then counted with its stake would be weighed twice, and one large key would
    ///      outvote the many small ones of which few are drawn.
    function _benchOf(Docket storage docket, Committee storage committee, uint256 round)
        private
        view
        returns (Bench memory bench)
    {
        uint256 seat = docket.snapshotStake / _seatsIn(round);
        bench.ballots = new Ballot[](committee.size);
        for (uint256 i; i < bench.ballots.length; ++i) {
            Ballot memory ballot = bench.ballots[i];
            ballot.node = committee.members[i];
            Attestation storage attestation = committee.attestations[ballot.node];
            ballot.stake = FixedPointMathLib.max(attestation.stake, seat);
            ballot.revealed = attestation.revealed;
            if (!ballot.revealed) continue;
            ballot.outputTokens = attestation.outputTokens;
            ballot.sketch = attestation.sketch;
            ballot.innerSketch = attestation.innerSketch;
            ++bench.reveals;
            bench.revealedStake += ballot.stake;
        }
    }

    function _supportOf(Bench memory bench, Ballot memory medoid) private view returns (uint256 support) {
        uint256 tolerance = _tolerance;
        for (uint256 i; i < bench.ballots.length; ++i) {
            Ballot memory ballot = bench.ballots[i];
            if (!ballot.revealed) continue;
            if (_memberDistance(medoid, ballot) <= tolerance) support += ballot.stake;
        }
    }

    function _hasQuorum(Bench memory bench, uint256 support) private view returns (bool) {
        return bench.reveals >= _minimumReveals && support * 3 >= bench.revealedStake * 2;
    }

    function _requireQuorum(Bench memory bench, uint256 support) private view {
        if (_hasQuorum(bench, support)) return;
        (uint256 required, uint256 actual) = bench.reveals < _minimumReveals
            ? (_minimumReveals, bench.reveals)
            : ((bench.revealedStake * 2 + 2) / 3, support);
        revert MedoidWithoutQuorum(required, actual);
    }

    function _verdictAt(uint256 distance) private view returns (StageVerdict) {
        if (distance <= _tolerance) return StageVerdict.Accepted;
        return distance <= 2 * uint256(_tolerance) ? StageVerdict.Tolerated : StageVerdict.Rejected;
    }

    // ---------------------------------------------------------------------------------------------------------------------
    //  Inside: money and conclusion
    // ---------------------------------------------------------------------------------------------------------------------

    /// @dev Slash and jail. The last of `recipients` is the reporter, or zero for none; the others are members who share memberShareBps
    ///      of the amount equally. The rest burns. Nothing here can fail for what a node does.
    function _slash(address node, uint256 slashBps, SlashReason reason, address[] memory recipients) private {
        uint256 amount = registry.stakeOf(node) * slashBps / _BASIS_POINTS;
        uint256 members = recipients.length - 1;
        uint256[] memory shares = new uint256[](members + 1);
        for (uint256 i; i < members; ++i) {
            // Shares are shares of whole wei taken: what both divisions leave over burns.
            // slither-disable-next-line divide-before-multiply
            shares[i] = amount * _terms.memberShareBps / _BASIS_POINTS / members;
        }
        // slither-disable-next-line divide-before-multiply
        if (recipients[members] != address(0)) shares[members] = amount * _terms.reporterShareBps / _BASIS_POINTS;
        // What was really taken is in the registry's event; the judgement does not depend on it.
        // slither-disable-next-line unused-return
        registry.slash(node, amount, reason, recipients, shares);
        _jail(node, reason == SlashReason.Equivocation ? _FOR_EVER : _after(_terms.jailPeriod));
    }

    /// @dev An upheld challenge gets its bond back; a refuted one pays the members who had to work for it. The medoid is within tau of
    ///      itself, so there is always at least one.
    function _resolveChallenge(Docket storage docket, Judgement memory judgement, bool upheld) private {
        docket.challenged &= ~_bit(judgement.stage);
        uint256 bond = _terms.challengeBond;
        uint256 members = judgement.recipients.length - 1;
        address challenger = judgement.recipients[members];
        emit ChallengeResolved(judgement.requestId, judgement.stage, challenger, upheld, bond);
        if (upheld) {
            _credit(challenger, bond);
            return;
        }
        for (uint256 i; i < members; ++i) {
            // Equal shares of what is left: the dust is spread over the last ones, and the parts add up to the bond.
            uint256 share = bond / (members - i);
            bond -= share;
            _credit(judgement.recipients[i], share);
        }
    }

    /// @dev Conclude against the pipeline, or without a verdict.
    function _reject(RequestId requestId, Docket storage docket) private {
        _close(requestId, docket);
        escrow.refund(requestId);
    }

    /// @dev Final without a settlement: bonds nobody has lost go back, all members' duties end.
    function _close(RequestId requestId, Docket storage docket) private {
        docket.phase = Phase.Final; // CDV-03
        uint256 challenged = docket.challenged;
        docket.challenged = 0;
        for (uint16 stage; challenged != 0; ++stage) {
            if (challenged & 1 != 0) {
                address challenger = docket.files[stage].challenger;
                emit ChallengeResolved(requestId, stage, challenger, false, _terms.challengeBond);
                _credit(challenger, _terms.challengeBond);
            }
            challenged >>= 1;
        }
        uint256 failure = docket.failure;
        bool blames = failure != 0 && failure != _UNDECIDED;
        emit RequestConcluded(requestId, false, blames ? uint16(failure - 1) : _NOBODY_BLAMED, 0);
        _closeDuties(docket);
    }

    /// @dev Ends the duty of every member, each exactly once. Returns one entry per attestation within tau of the medoid that decided its
    ///      stage. No foreign code runs before the end of the call, so nobody can leave before being credited.
    function _closeDuties(Docket storage docket) private returns (address[] memory agreeing) {
        uint256 stageCount = docket.stageCount;
        uint256 rounds = docket.round;
        agreeing = new address[](_MAXIMUM_MEMBERS * stageCount * rounds);
        address[] memory members = new address[](agreeing.length);
        uint256 count;
        uint256 total;
        for (uint256 round = docket.sampled ? 1 : 2; round <= rounds; ++round) {
            for (uint256 stage; stage < stageCount; ++stage) {
                Committee storage committee = _committee(docket, round, stage);
                uint256 size = committee.size;
                uint256 agreed = committee.agreeing;
                for (uint256 i; i < size; ++i) {
                    address member = committee.members[i];
                    members[total++] = member;
                    if (_has(agreed, i)) agreeing[count++] = member;
                }
            }
        }
        // Both are at most the length; the rest of the memory is given up.
        assembly ("memory-safe") {
            mstore(agreeing, count)
            mstore(members, total)
        }
        if (total != 0) registry.closeDuties(members);
    }

    function _agreeingOperators(Committee storage committee) private view returns (address[] memory operators) {
        uint256 members = committee.agreeing;
        operators = new address[](_count(members) + 1);
        uint256 count;
        for (uint256 i; members != 0; ++i) {
            if (members & 1 != 0) operators[count++] = _operatorOf(committee.members[i]);
            members >>= 1;
        }
    }

    function _punishContradiction(HandOver memory statement, address node) private {
        RequestId requestId = statement.requestId;
        bytes32 report = keccak256(abi.encode(node, requestId, statement.stage, statement.sent, statement.step));
        if (_reported[report]) revert AlreadyReported(report);
        _reported[report] = true;
        emit ContradictionProven(requestId, statement.stage, node, msg.sender);
        address[] memory reporter = new address[](1);
        reporter[0] = msg.sender;
        _slash(node, _BASIS_POINTS, SlashReason.Equivocation, reporter);

        // Nobody should wait for the verdict on a request whose executor is proven to lie about it; but a committee that
        // sits goes on to the end of its round, or the proof would spare a liar of another stage.
        Docket storage docket = _dockets[requestId];
        if (docket.phase == Phase.Final || _executorOf(requestId, statement.stage) != node) return;
        _fail(docket, uint256(statement.stage) + 1);
        bool sits = docket.phase == Phase.Attesting || docket.phase == Phase.Revealing;
        if (!sits || _isUnsampled(docket)) _reject(requestId, docket);
    }

    function _jail(address node, uint64 until) private {
        registry.jail(node, until);
    }

    function _credit(address account, uint256 amount) private {
        if (amount == 0) return;
        uint256 credit = _credits[account] + amount;
        _credits[account] = credit;
        emit Credited(account, amount, credit);
    }

    // ---------------------------------------------------------------------------------------------------------------------
    //  Inside: reading
    // ---------------------------------------------------------------------------------------------------------------------

    /// @dev The docket if it is in phase `expected`; a phase that time has brought is stored.
    function _docketIn(RequestId requestId, Phase expected) private returns (Docket storage docket) {
        docket = _dockets[requestId];
        Phase actual = _phaseOf(docket);
        if (actual != expected) revert WrongPhase(requestId, expected, actual);
        if (docket.phase != actual) docket.phase = actual;
    }

    function _phaseOf(Docket storage docket) private view returns (Phase phase) {
        phase = docket.phase;
        if (phase == Phase.Attesting && block.timestamp > docket.attestDeadline) return Phase.Revealing;
    }

    function _executorOf(RequestId requestId, uint16 stage) private view returns (address) {
        return escrow.executorOf(requestId, stage);
    }

    function _operatorOf(address node) private view returns (address) {
        return registry.operatorOf(node);
    }

    /// @dev Stake that counts for the draws of this request; all stake together is within 128 bits.
    function _stakeIn(Docket storage docket, address node) private view returns (uint128) {
        return uint128(registry.sortitionStake(node, docket.snapshotTime));
    }

    /// @dev The reveal window follows the attest window; 0 before the draw.
    function _revealDeadline(Docket storage docket) private view returns (uint256) {
        uint256 attestDeadline = docket.attestDeadline;
        return attestDeadline == 0 ? 0 : attestDeadline + _revealWindow;
    }

    /// @dev Round 1 without a committee.
    function _isUnsampled(Docket storage docket) private view returns (bool) {
        return !docket.sampled && docket.round == 1;
    }

    function _committee(Docket storage docket, uint256 round, uint256 stage) private view returns (Committee storage) {
        return docket.committees[(round << 16) | stage];
    }

    /// @dev d = 0; d = keccak256(abi.encode(d, commitment)) in stage order.
    function _commitmentsDigest(Docket storage docket, uint256 stageCount) private view returns (bytes32 digest) {
        for (uint256 i; i < stageCount; ++i) {
            digest = keccak256(abi.encode(digest, docket.files[i].commitment));
        }
    }

    function _requireSigned(HandOver memory statement, bytes calldata signature, address node) private view {
        bytes32 digest = TypedData.digestOf(_DOMAIN_NAME_HASH, keccak256(abi.encode(_HAND_OVER_TYPEHASH, statement)));
        if (!NodeSignature.isSignedBy(digest, signature, node)) revert SignatureInvalid(node);
    }

    function _requireExecutor(RequestId requestId, uint16 stage) private view {
        address executor = _executorOf(requestId, stage);
        if (msg.sender != executor) revert NotExecutor(stage, executor, msg.sender);
    }

    function _requireBefore(uint256 deadline) private view {
        if (block.timestamp > deadline) revert DeadlinePassed(deadline, block.timestamp);
    }

    function _requireAfter(uint256 deadline) private view {
        if (block.timestamp <= deadline) revert DeadlineNotPassed(deadline, block.timestamp);
    }

    /// @dev The time `window` <= _MAXIMUM_WINDOW seconds from now; seconds reach 2^64 in 584 billion years.
    function _after(uint256 window) private view returns (uint64) {
        unchecked {
            return uint64(block.timestamp + window);
        }
    }

    /// @dev A different number of tokens is a different output, however close the sketches are.
    function _distance(Ballot memory medoid, uint256 outputTokens, bytes32 sketch) private pure returns (uint256) {
        if (outputTokens != medoid.outputTokens) return type(uint256).max;
        return DistributionSketch.distance(sketch, medoid.sketch);
    }

    /// @dev CDV-07: of both sketches the larger distance. Nobody shows the rows of the inner one to a member, so who has not executed the
    ///      stage is far from those who have, however near its output.
    function _memberDistance(Ballot memory medoid, Ballot memory ballot) private pure returns (uint256) {
        return FixedPointMathLib.max(
            _distance(medoid, ballot.outputTokens, ballot.sketch),
            DistributionSketch.distance(ballot.innerSketch, medoid.innerSketch)
        );
    }

    function _bit(uint256 stage) private pure returns (uint32) {
        return uint32(1 << stage);
    }

    function _allOf(uint256 stageCount) private pure returns (uint32) {
        return uint32((1 << stageCount) - 1);
    }

    /// @dev Expected seats of a stage: twice as many in each further round. Rounds count from 1.
    function _seatsIn(uint256 round) private view returns (uint256) {
        return uint256(_committeeSeats) << (round - 1);
    }

    /// @dev Size of a set.
    function _count(uint256 set) private pure returns (uint256 count) {
        for (; set != 0; set &= set - 1) {
            ++count;
        }
    }

    function _has(uint256 stages, uint256 stage) private pure returns (bool) {
        return (stages >> stage) & 1 != 0;
    }

    // ---------------------------------------------------------------------------------------------------------------------
    //  Inside: deployment
    // ---------------------------------------------------------------------------------------------------------------------

    function _requireSafe(VerificationTerms memory terms_) private pure {
        _requireWindow(terms_.secretWindow);
        _requireWindow(terms_.attestWindow);
        _requireWindow(terms_.revealWindow);
        _requireWindow(terms_.challengeWindow);
        _requireWindow(terms_.jailPeriod);
        _requireShare(terms_.samplingRateBps, _BASIS_POINTS);
        _requireShare(terms_.incorrectSlashBps, _BASIS_POINTS);
        _requireShare(terms_.withholdSlashBps, _BASIS_POINTS);
        _requireShare(uint256(terms_.memberShareBps) + terms_.reporterShareBps, _MAXIMUM_REWARD_BPS);
        _requireShare(terms_.tolerance, _MAXIMUM_TOLERANCE);
        if (terms_.committeeSeats == 0) revert ShareOutOfRange(type(uint16).max, 0);
        // A committee that nobody could ever fill would never decide.
        if (terms_.minimumReveals == 0) revert ShareOutOfRange(_MAXIMUM_MEMBERS, 0);
        _requireShare(terms_.minimumReveals, _MAXIMUM_MEMBERS);
    }

    /// @dev STAKE-03: no stake can leave before the last request it is bonded for is final, even if every round is fought out.
    function _requireFinalBeforeExit() private view {
        EscrowTerms memory windows = escrow.terms();
        if (windows.verificationWindow < longestDispute) {
            revert WindowOutOfRange(longestDispute, windows.verificationWindow);
        }
        uint256 life = uint256(windows.routeWindow) + windows.commitWindow + windows.verificationWindow;
        uint256 thawPeriod = registry.thawPeriod();
        if (thawPeriod <= life) revert WindowOutOfRange(life + 1, thawPeriod);
    }

    /// @dev The upper bound keeps every sum of a time and a window far within 64 bits.
    function _requireWindow(uint256 window) private pure {
        if (window == 0 || window > _MAXIMUM_WINDOW) revert WindowOutOfRange(1, window);
    }

    function _requireWired(address expected, address actual) private pure {
        if (actual != expected) revert WiringMismatch(expected, actual);
    }

    function _requireShare(uint256 share, uint256 maximum) private pure {
        if (share > maximum) revert ShareOutOfRange(maximum, share);
    }
}
