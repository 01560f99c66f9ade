// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

import {RequestId} from "../types/Identifiers.sol";
import {VerificationTerms} from "../types/Terms.sol";
import {IInferenceEscrow} from "./IInferenceEscrow.sol";
import {INodeRegistry} from "./INodeRegistry.sol";

/// @notice Where the verification of one request stands.
enum Phase {
    /// Stages may commit (the request is Routed), or the request is unknown.
    Committing,
    /// All stages have committed; the entropy block is not yet used.
    AwaitingDraw,
    /// Committee members commit their salted attestations.
    Attesting,
    /// Executors (first round) and members open their commitments; then anyone tallies.
    Revealing,
    /// A verdict stands; anyone may challenge it with a bond until the challenge deadline.
    Challengeable,
    /// Nothing can change any more.
    Final
}

/// @notice What the tally said about one stage.
enum StageVerdict {
    None,
    /// Within tau of the medoid: paid.
    Accepted,
    /// Between tau and 2 tau: neither paid nor slashed.
    Tolerated,
    /// Further than 2 tau. In round 1 it only calls the backup committee; from round 2 on it slashes.
    Rejected,
    /// Less than two thirds of the revealed stake near any declared medoid, or too few reveals.
    NoQuorum,
    /// The executor did not open its own commitment.
    Withheld
}

struct Verification {
    Phase phase;
    uint8 round;
    uint16 stageCount;
    /// Stages that have committed (Committing) or still lack a tally (Revealing).
    uint16 outstanding;
    /// Whether a first committee sits: from the start for a request out of a batch, else known with the draw.
    bool sampled;
    /// Block whose hash is the chain's half of the entropy.
    uint64 entropyBlock;
    /// Time of the stake snapshot: nodes that became active or added stake later do not count.
    uint64 snapshotTime;
    /// Until then only the requester's secret can draw; afterwards anyone can draw without it.
    uint64 secretDeadline;
    uint64 attestDeadline;
    uint64 revealDeadline;
    uint64 challengeDeadline;
    uint128 snapshotStake;
    bytes32 seed;
}

struct StageRecord {
    /// Salted commitment of the executor.
    bytes32 commitment;
    bytes32 evidenceRoot;
    bytes32 sketch;
    uint32 outputTokens;
    bool revealed;
    StageVerdict verdict;
    /// Round whose tally gave `verdict`.
    uint8 round;
    /// Bit set while the stage is before a committee in the current round.
    bool disputed;
    address challenger;
    uint128 bond;
}

struct Attestation {
    bytes32 commitment;
    /// Of rows inside the stage that nobody shows.
    bytes32 innerSketch;
    bytes32 sketch;
    uint32 outputTokens;
    bool revealed;
    uint128 stake;
}

/// @notice A node's signed statement about the bytes it received or sent for one step of one stage.
/// @dev EIP-712 `HandOver(bytes32 requestId,uint16 stage,bool sent,uint32 step,bytes32 chain)` under domain {name
///      "bsns OutputVerification", version "1", chainId, verifyingContract}. `chain` is cumulative:
///      chain(-1) = 0, chain(t) = keccak256(abi.encode(chain(t-1), digest(t))), so the statement for step t covers all steps before.
struct HandOver {
    RequestId requestId;
    uint16 stage;
    bool sent;
    uint32 step;
    bytes32 chain;
}

/// @notice One leaf of a stage's evidence tree. Leaf hash: keccak256(bytes.concat(keccak256(abi.encode(step)))).
struct EvidenceStep {
    uint32 step;
    /// First position of the step's rows in the sequence.
    uint32 position;
    uint32 rows;
    /// SHA-256 of the exact bytes received and sent.
    bytes32 inputDigest;
    bytes32 outputDigest;
    bytes32 inputChain;
    bytes32 outputChain;
    bytes8 fingerprint;
}

/// @title Consensus-based distribution verification (CDV)
/// @notice Each stage commits to its evidence and to a sketch of its output distribution, salted and bound to sender, request, stage and
///         round. Then entropy that neither executors nor requester control alone decides whether a committee sits and who sits in it,
///         by stake. Members re-execute the stage from the exact bytes of its input, commit, then reveal. Anyone tallies: within tau of
///         the medoid that two thirds of the revealed stake support is paid, beyond 2 tau is slashed, nothing happens in between.
///         Any disagreement in the first round calls a larger backup committee; only its verdict slashes. Blame is per stage.
///         A vote weighs the stake that its member was drawn from, max(stake, snapshotStake / seats of the round): "revealed stake" is the
///         sum of these. Seats follow stake already; counted by stake alone one large key would outvote the many of which few are drawn.
/// @dev Safety (CDV-02): let honest sketches lie within r of the true one, tau = 2r, honest stake > 2/3 of the revealed stake. An
///      accepted medoid has an honest supporter, so it lies within tau + r = 3r of the truth and every honest node within 4r = 2 tau of it.
///      Of two members the distance is the larger one of their two sketches', which is a metric too.
interface IOutputVerification {
    error NotExecutor(uint16 stage, address expected, address actual);
    error StageAlreadyCommitted(RequestId requestId, uint16 stage);
    error WrongPhase(RequestId requestId, Phase expected, Phase actual);
    error RequestNotRouted(RequestId requestId);
    error DeadlinePassed(uint256 deadline, uint256 now_);
    error DeadlineNotPassed(uint256 deadline, uint256 now_);
    error CommitmentMissing();
    error CommitmentMismatch(bytes32 expected, bytes32 actual);
    error AlreadyCommitted(address node, uint16 stage);
    error AlreadyRevealed(address node, uint16 stage);
    error SecretMismatch(bytes32 expected, bytes32 actual);
    error EntropyNotReady(uint256 entropyBlock, uint256 currentBlock);
    error NotSeated(address node, uint16 stage, uint8 round);
    error StageNotDisputed(uint16 stage);
    error CommitteeFull(uint16 stage, uint256 maximum);
    error LengthMismatch(uint256 expected, uint256 actual);
    error TokensOutOfRange(uint256 maximum, uint256 actual);
    error AlreadyTallied(uint16 stage);
    error MedoidOutOfRange(uint256 members, uint256 actual);
    error MedoidNotRevealed(address member);
    error RevealsOutstanding(uint16 stage);
    error MedoidWithoutQuorum(uint256 required, uint256 actual);
    error QuorumExists(uint16 stage, uint256 medoid);
    error BondMismatch(uint256 expected, uint256 actual);
    error NoRoundLeft(uint8 maximum);
    error NotEscrow(address actual);
    error StatementsAgree();
    error SignatureInvalid(address expected);
    error EvidenceNotRevealed(uint16 stage);
    error ProofInvalid(bytes32 root);
    error AlreadyReported(bytes32 report);
    error WindowOutOfRange(uint256 minimum, uint256 actual);
    error ShareOutOfRange(uint256 maximum, uint256 actual);
    error WiringMismatch(address expected, address actual);
    error NoCredit(address account);
    error TransferFailed(address to, uint256 amount);

    event StageCommitted(RequestId indexed requestId, uint16 indexed stage, address indexed node, bytes32 commitment);
    event CommitmentsComplete(
        RequestId indexed requestId,
        uint64 entropyBlock,
        uint64 snapshotTime,
        uint256 snapshotStake,
        uint64 secretDeadline
    );
    /// @dev A draw that missed the 256 blocks in which a block hash can be read takes a new entropy block.
    event EntropyRenewed(RequestId indexed requestId, uint64 entropyBlock);
    event CommitteeDrawn(
        RequestId indexed requestId,
        uint8 indexed round,
        bool sampled,
        bytes32 seed,
        bytes32 secret,
        uint64 attestDeadline
    );
    event AttestationCommitted(
        RequestId indexed requestId,
        uint8 indexed round,
        uint16 indexed stage,
        address node,
        bytes32 commitment,
        uint256 stake
    );
    event StageRevealed(
        RequestId indexed requestId,
        uint16 indexed stage,
        address indexed node,
        bytes32 evidenceRoot,
        bytes32 sketch,
        uint32 outputTokens,
        bytes32 salt
    );
    event AttestationRevealed(
        RequestId indexed requestId,
        uint8 indexed round,
        uint16 indexed stage,
        address node,
        bytes32 innerSketch,
        bytes32 sketch,
        uint32 outputTokens,
        bytes32 salt
    );
    event StageTallied(
        RequestId indexed requestId,
        uint8 indexed round,
        uint16 indexed stage,
        StageVerdict verdict,
        address medoid,
        uint256 support,
        uint256 revealedStake,
        uint256 distance
    );
    event RoundEscalated(RequestId indexed requestId, uint8 indexed round, bytes32 seed, uint64 attestDeadline);
    event VerdictReached(RequestId indexed requestId, bool accepted, uint64 challengeDeadline);
    event Challenged(RequestId indexed requestId, uint16 indexed stage, address indexed challenger, uint256 bond);
    event ChallengeResolved(
        RequestId indexed requestId, uint16 indexed stage, address indexed challenger, bool upheld, uint256 bond
    );
    /// @dev `accepted` false: the requester was refunded. `blamedStage` is the first rejected or withheld stage, or type(uint16).max.
    event RequestConcluded(RequestId indexed requestId, bool accepted, uint16 blamedStage, uint32 outputTokens);
    event ContradictionProven(
        RequestId indexed requestId, uint16 indexed stage, address indexed node, address reporter
    );
    event Credited(address indexed account, uint256 amount, uint256 credit);
    event CreditWithdrawn(address indexed account, uint256 amount);

    /// @notice The executor of `stage` commits. `commitment` = commitmentOf(requestId, 0, stage, node, evidenceRoot, sealOf(sketch, salt), outputTokens).
    function commitStage(RequestId requestId, uint16 stage, bytes32 commitment) external;

    /// @notice All executors' commitments of a request at once, in stage order, as they signed them for a leaf of a batch. A committee
    ///         certainly sits on such a request. InferenceEscrow only, which has just routed it.
    function commitStages(RequestId requestId, bytes32[] calldata commitments, uint32 maximumTokens) external;

    /// @notice Fix the seed of the draw, after the entropy block: keccak256(abi.encode(secret, commitmentsDigest, blockhash(entropyBlock),
    ///         requestId)). `secret` must match the request's secretHash; after the secret deadline anyone may pass zero instead.
    /// @dev If the block hash is out of reach, the entropy block is renewed and the call returns without a draw; that also ends the wait for
    ///      the secret. `commitmentsDigest` chains the stage commitments in stage order: d = 0; d = keccak256(abi.encode(d, commitment)). Sampled iff
    ///      it came by `commitStages` or uint256(keccak256(abi.encode(seed, "sample"))) % 10_000 < samplingRateBps. Not sampled: Revealing without a committee.
    function drawCommittee(RequestId requestId, bytes32 secret) external;

    /// @notice Members commit for the stages they sit on, in one call. Opens a duty per stage.
    function commitAttestations(RequestId requestId, uint16[] calldata stages, bytes32[] calldata commitments) external;

    /// @notice The executor opens its commitment (round 1 or unsampled, phase Revealing).
    function revealStage(
        RequestId requestId,
        uint16 stage,
        bytes32 evidenceRoot,
        bytes32 sketch,
        uint32 outputTokens,
        bytes32 salt
    ) external;

    /// @notice A member opens its commitment of the current round. `outputTokens` 0 says that the executor kept its evidence back: such an
    ///         attestation agrees only with its like; it is unpaid beside others, slashes no other member and is not slashed by them.
    /// @dev `innerSketch` takes the place of the evidence root in commitmentOf. It is of the rows inside the stage, before its last unit, under a seed
    ///      that follows from the entropy block: nobody shows those rows, so they must be computed. Members are compared by both
    ///      sketches, the executor by its output alone.
    function revealAttestation(
        RequestId requestId,
        uint16 stage,
        bytes32 innerSketch,
        bytes32 sketch,
        uint32 outputTokens,
        bytes32 salt
    ) external;

    /// @notice Judge one stage by the declared medoid (index into membersOf). Once all reveals are in, or the reveal deadline passed.
    /// @dev Without quorum for that medoid the call reverts, unless no medoid has a quorum: use `tallyWithoutQuorum`. The last tally of a
    ///      round concludes it: verdict, escalation or refund. In an unsampled request `medoid` is ignored. An executor that did not reveal
    ///      in round 1 is Withheld whatever the members say. Members that committed and did not reveal are jailed for jailPeriod.
    function tally(RequestId requestId, uint16 stage, uint256 medoid) external;

    /// @notice Record NoQuorum for a stage: no revealed member is supported by two thirds of the revealed stake, or fewer than the minimum
    ///         of members revealed. Checks every member as medoid. Only after all reveals or the reveal deadline.
    function tallyWithoutQuorum(RequestId requestId, uint16 stage) external;

    /// @notice Call a backup committee on `stage` of a verdict, with the bond as value. Anyone, until the challenge deadline, while a
    ///         round is left. Also in the first half of the attest window of a round >= 2, for a stage that is not disputed in it yet:
    ///         otherwise the accused could use up the rounds with challenges of somebody else's stage. A refuted challenge's bond goes
    ///         to the members who agreed; without a quorum it goes back.
    function challenge(RequestId requestId, uint16 stage) external payable;

    /// @notice Pay out a verdict whose challenge window is over.
    function settle(RequestId requestId) external;

    /// @notice Two statements by one node key on the same (request, stage, direction, step) with different chains: full slash and tombstone,
    ///         without a committee. Possible at any time while the node has stake.
    function reportEquivocation(
        HandOver calldata first,
        bytes calldata firstSignature,
        HandOver calldata second,
        bytes calldata secondSignature,
        address node
    ) external;

    /// @notice A signed statement that contradicts the node's own revealed evidence for that step: same penalty.
    function reportContradiction(
        HandOver calldata statement,
        bytes calldata signature,
        EvidenceStep calldata evidence,
        bytes32[] calldata proof
    ) external;

    /// @notice Close a request whose escrow deadline passed after it was routed: bonds go back, duties end. InferenceEscrow only.
    function abandon(RequestId requestId) external;

    /// @notice Push an account's credit (returned or forfeited bonds) to that account. Anyone may call.
    function withdrawCredit(address account) external;

    function verificationOf(RequestId requestId) external view returns (Verification memory);
    function stageRecordOf(RequestId requestId, uint16 stage) external view returns (StageRecord memory);
    function membersOf(RequestId requestId, uint8 round, uint16 stage) external view returns (address[] memory);
    function attestationOf(RequestId requestId, uint8 round, uint16 stage, address node)
        external
        view
        returns (Attestation memory);
    function creditOf(address account) external view returns (uint256);

    /// @notice Whether `node` sits on the committee of `stage` in the current round: it does not execute that stage, shares no operator with
    ///         its executor, and uint256(keccak256(abi.encode(seed, round, stage, node))) <= type(uint256).max / total * min(total, seats * stake)
    ///         with seats = committeeSeats * 2^(round-1), total = snapshotStake and stake = the node's sortition stake at the snapshot.
    function isSeated(RequestId requestId, uint16 stage, address node) external view returns (bool);

    /// @notice Circular L1 distance of two sketches of 32 one-byte coordinates: sum of min(|a-b|, 256-|a-b|); at most 4096.
    function sketchDistance(bytes32 a, bytes32 b) external pure returns (uint256);

    /// @notice What an executor (round 0) or a member (rounds 1 to 3) commits to: keccak256(abi.encode(TYPEHASH, requestId, round, stage,
    ///         node, evidenceRoot, sealedSketch, outputTokens)) with TYPEHASH = keccak256("StageCommitment(bytes32 requestId,uint8 round,
    ///         uint16 stage,address node,bytes32 evidenceRoot,bytes32 sealedSketch,uint32 outputTokens)"), without the line break.
    function commitmentOf(
        RequestId requestId,
        uint8 round,
        uint16 stage,
        address node,
        bytes32 evidenceRoot,
        bytes32 sealedSketch,
        uint32 outputTokens
    ) external pure returns (bytes32);

    /// @notice keccak256(abi.encode(sketch, salt)).
    function sealOf(bytes32 sketch, bytes32 salt) external pure returns (bytes32);

    /// @notice Seconds from the last commitment to the end of the last challenge window of the last round, with a margin for the calls
    ///         between the windows. No verification window of the escrow is shorter.
    function longestDispute() external view returns (uint256);

    /// @notice Everything this contract was deployed with.
    function terms() external view returns (VerificationTerms memory);

    function registry() external view returns (INodeRegistry);
    function escrow() external view returns (IInferenceEscrow);
}
