// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

import {Assignment} from "../types/Assignment.sol";
import {BatchId, PlanId, RequestId} from "../types/Identifiers.sol";
import {TabTerms} from "../types/Terms.sol";
import {IInferenceEscrow, RequestStatus} from "./IInferenceEscrow.sol";
import {INodeRegistry} from "./INodeRegistry.sol";
import {IShardAssignments} from "./IShardAssignments.sol";

/// @notice Where a batch stands.
enum BatchStatus {
    Absent,
    /// Paid for; its draw is awaited.
    Posted,
    /// The draws are known; drawn leaves must be opened, others can be challenged.
    Drawn,
    Settled,
    /// Not drawn, or a drawn leaf not opened, in time: the money went back to the tabs.
    Void
}

/// @notice Money of one requester for the requests that one collector, the publisher of a plan, has served.
struct Tab {
    /// Wei.
    uint96 balance;
    /// Cumulative wei of the last voucher that was collected.
    uint96 collected;
    /// Number of the next ticket to be collected.
    uint64 tickets;
    /// Time from which the money can be taken out; 0 while the tab is not closing.
    uint64 closesAt;
}

/// @notice What a requester signs before a request is served (EIP-712 struct `Ticket`). Its digest is the id of the request.
/// @dev A requester numbers its tickets of one collector from 0 without gaps. A request that fails keeps its number, and its leaf has no weight.
struct Ticket {
    PlanId planId;
    address requester;
    uint64 number;
    /// As in InferenceEscrow.open.
    bytes32 inputCommitment;
    bytes32 secretHash;
    uint32 promptTokens;
    uint32 maximumTokens;
    /// Time until which a batch with this ticket may be posted.
    uint64 deadline;
}

/// @notice The requests of one requester in a batch: those with the ticket numbers [firstTicket, firstTicket + tickets), in this order,
///         each one leaf.
struct Segment {
    address requester;
    uint64 firstTicket;
    uint32 tickets;
    /// Prompt and answer tokens of all of them.
    uint32 tokens;
    /// Of the voucher that pays for them.
    uint96 cumulative;
    bytes32 secretHash;
}

/// @notice What a node gets of a batch if no leaf is opened. Wei.
struct Share {
    address node;
    uint96 amount;
}

/// @notice Requests that were served under one plan. Every node with a share signs the whole (EIP-712 struct `Batch`).
/// @dev `root` is that of a Merkle tree whose nodes also carry sums: each is (hash, tokens, leaves). A leaf is (leafOf(requestId,
///      executionsHash, outputTokens), prompt + answer tokens, 1); an inner node is (keccak256(abi.encode(left.hash, left.tokens,
///      left.leaves, right.hash, right.tokens, right.leaves)), left.tokens + right.tokens, left.leaves + right.leaves). The leaf of a
///      ticket without a request that is paid has no tokens and any hash. The tree may have any shape; its leaves are in the order of
///      the segments and of the numbers in them.
struct Batch {
    PlanId planId;
    address collector;
    /// Wei per token, the plan's.
    uint128 feePerToken;
    bytes32 root;
    /// Time until which it may be posted.
    uint64 deadline;
    Segment[] segments;
    Share[] shares;
}

/// @notice One request of a batch with everything its parties signed for it.
struct Opening {
    /// Index of its segment in the batch.
    uint256 segment;
    Ticket ticket;
    bytes ticketSignature;
    uint32 outputTokens;
    /// One assignment per stage, with its proof against the plan.
    Assignment[] route;
    bytes32[][] proofs;
    /// OutputVerification.commitmentOf(requestId, 0, stage, node, ...) of each stage, and the node's signature over `StageResult`.
    bytes32[] commitments;
    bytes[] signatures;
}

/// @notice The sibling of a node on the way from a leaf to the root.
struct TreeStep {
    bytes32 hash;
    uint32 tokens;
    uint32 leaves;
    bool isLeft;
}

struct BatchState {
    BatchStatus status;
    /// Block whose hash is the chain's half of the entropy.
    uint64 entropyBlock;
    uint64 postedAt;
    /// Until then all secrets are needed for the draw; afterwards those on record count, and no others.
    uint64 secretDeadline;
    /// Of the status: until when it can be drawn, then until when leaves can be opened.
    uint64 deadline;
    /// Wei that went into requests of InferenceEscrow.
    uint128 taken;
    /// Bit i set: the leaf of draw i must still be opened.
    uint32 pending;
    /// Token offset of each draw.
    uint32[] offsets;
}

/// @title Tabs, vouchers and batches
/// @notice A requester pays many requests out of one deposit. Off the chain it signs a ticket for each request and, when it has the answer,
///         a voucher over everything so far; each node of the route signs what it commits to. The collector posts many such requests as
///         one batch: the increments of the vouchers become its pot. A draw picks tokens; the leaf of each drawn token must be opened,
///         which makes it a request of InferenceEscrow that a committee certainly judges. What is not opened is paid. A batch that does
///         not open a drawn leaf is void: nobody is paid for any of it.
/// @dev The rule of the draw. A batch of T tokens has k = ceil(T / tokensPerDraw) draws of one token each, independent and uniform over the
///      T tokens. A request of w tokens is missed with probability (1 - w/T)^k <= exp(-w / tokensPerDraw), whatever it is next to: to
///      split, merge or pad requests gains nothing.
///      Why void is no way out. A collector puts down the fee of tokensPerDraw tokens and loses it with a void batch. For x = w /
///      tokensPerDraw, who cheats for w tokens and does not open loses with probability of at least 1 - exp(-x) the bond and the fee of
///      those tokens, on average (1 - exp(-x)) (1 + x) times the bond, which is never less than the fee of x times the bond that
///      the cheat is paid at most; whatever else is in the batch, requests of its own included.
///      Why nobody steers it. The segment of a draw follows from the hash of the block after the post, its token inside the segment
///      also from that requester's secret. So a proposer in league with a collector could at most move draws between segments, and
///      a requester in league with it governs nothing but its own segment. A secret that is on record in time counts in any case, one
///      that is not never counts after the secret deadline: who hands its secret to somebody else and sees no draw records it itself.
///      Why a ticket is paid once. A batch takes the ticket numbers of a tab from where the last one ended, and the place of a
///      leaf in the tree follows from its number; the place is checked when the leaf is opened, by sums that cannot overlap.
///      Why another version of a leaf is no way out. Who cheated in a leaf that is drawn cannot open the request with better commitments
///      instead: without a proof only the requester opens it, and a leaf is served only by a request that was opened as it stands.
///      Why the plan is not proven when a batch is posted. The pot is the requesters' payment for what the executors of the plan did:
///      that they did it is proven for every leaf that is opened. How the executors' part is shared out concerns the nodes
///      with shares alone, and each of them has signed the shares of all.
interface IRequestTabs {
    error ZeroAmount();
    error TabNotClosing(address requester, address collector);
    error TabStillOpen(uint256 closesAt, uint256 now_);
    error TabTooSmall(address requester, uint256 expected, uint256 actual);
    error VoucherTooSmall(address requester, uint256 expected, uint256 actual);
    error TicketOutOfOrder(address requester, uint256 expected, uint256 actual);
    error TicketNotInBatch(uint256 number);
    error TicketExpired(uint256 deadline, uint256 postedAt);
    error SignatureInvalid(address expected);
    error LengthMismatch(uint256 expected, uint256 actual);
    error CountOutOfRange(uint256 maximum, uint256 actual);
    error TokensOutOfRange(uint256 maximum, uint256 actual);
    error NotCollector(address expected, address actual);
    error FeeMismatch(uint256 expected, uint256 actual);
    error SharesMismatch(uint256 expected, uint256 actual);
    error BatchAlreadyPosted(BatchId batchId);
    error WrongBatchStatus(BatchId batchId, BatchStatus expected, BatchStatus actual);
    error DeadlinePassed(uint256 deadline, uint256 now_);
    error DeadlineNotPassed(uint256 deadline, uint256 now_);
    error EntropyNotReady(uint256 entropyBlock, uint256 currentBlock);
    error SecretMismatch(bytes32 expected, bytes32 actual);
    error ProofInvalid(bytes32 expected, bytes32 actual);
    error LeafMisplaced(uint256 expectedIndex, uint256 actualIndex);
    error LeafNotDrawn(uint256 firstToken, uint256 endToken);
    error NodeWithoutShare(address node);
    error PlanMismatch(PlanId expected, PlanId actual);
    error AlreadyOpened(RequestId requestId);
    error LeafMismatch(bytes32 opened, bytes32 actual);
    error DrawsPending(uint256 pending);
    error NoDrawPending(BatchId batchId);
    error BondMismatch(uint256 expected, uint256 actual);
    error NotChallenged(RequestId requestId);
    error ChallengeUndecided(RequestId requestId, RequestStatus status);
    error NoCredit(address account);
    error TransferFailed(address to, uint256 amount);
    error WindowOutOfRange(uint256 minimum, uint256 actual);
    error WiringMismatch(address expected, address actual);

    event TabFunded(address indexed requester, address indexed collector, uint256 amount, uint256 balance);
    event TabClosing(address indexed requester, address indexed collector, uint256 closesAt);
    event TabWithdrawn(address indexed requester, address indexed collector, uint256 amount);
    /// @dev The voucher and the tickets are in the batch.
    event TabCharged(
        BatchId indexed batchId, address indexed requester, address indexed collector, uint256 amount, uint256 balance
    );
    /// @dev Money of a void batch is back.
    event TabRestored(
        BatchId indexed batchId, address indexed requester, address indexed collector, uint256 amount, uint256 balance
    );
    /// @dev Carries the whole batch, so that every later call can be made without the collector.
    event BatchPosted(
        BatchId indexed batchId,
        address indexed collector,
        PlanId indexed planId,
        Batch batch,
        uint64 entropyBlock,
        uint64 secretDeadline,
        uint64 drawDeadline
    );
    event SecretRecorded(BatchId indexed batchId, uint256 indexed segment, bytes32 secret);
    event EntropyRenewed(BatchId indexed batchId, uint64 entropyBlock);
    event BatchDrawn(BatchId indexed batchId, bytes32 entropy, uint32[] offsets, uint64 openingDeadline);
    /// @dev `pending` are the draws whose leaves are still to be opened.
    event LeafOpened(BatchId indexed batchId, RequestId indexed requestId, uint256 firstToken, uint32 pending);
    /// @dev The request is in InferenceEscrow now, with `amount` of the pot as its deposit.
    event RequestTaken(
        BatchId indexed batchId, RequestId indexed requestId, uint256 segment, uint256 amount, uint256 taken
    );
    event LeafChallenged(
        BatchId indexed batchId, RequestId indexed requestId, address indexed challenger, uint256 bond
    );
    event ChallengeResolved(RequestId indexed requestId, address indexed challenger, bool upheld, uint256 bond);
    event BatchSettled(BatchId indexed batchId, uint256 paidToExecutors, uint256 protocolFee, uint256 taken);
    event BatchVoided(BatchId indexed batchId, uint256 restored, uint256 taken, uint256 burned);
    /// @dev `source` is the batch, or the request whose challenge is resolved.
    event Credited(bytes32 indexed source, address indexed account, uint256 amount, uint256 credit);
    event CreditWithdrawn(address indexed account, uint256 amount);

    /// @notice Put money on the sender's tab with `collector`. Ends a closing.
    function fund(address collector) external payable;

    /// @notice Close the sender's tab with `collector`: after closePeriod its money can be taken out. Until then vouchers are still collected.
    function beginClose(address collector) external;

    /// @notice Take out what the sender's closed tab holds. What a void batch brings back later can be taken out at once.
    function withdrawTab(address collector) external;

    /// @notice Charge the tabs for a batch. The collector only, which is the publisher of the plan. Opens a duty for each share's node. The
    ///         value is the collector's bond, tokensPerDraw times the fee: credited when the batch is settled, burned when it is void.
    /// @dev Each segment is charged its tokens times the fee, no more than its voucher adds to the last one and than the tab holds.
    /// @param voucherSignatures by the requester of each segment: EIP-712 `Voucher(address requester,address collector,uint96
    ///        cumulative,bytes32 secretHash)` under domain {name "bsns RequestTabs", version "1", chainId, verifyingContract}.
    /// @param shareSignatures by the node of each share over the batch id. The shares add up to the pot less the protocol fee.
    function post(Batch calldata batch, bytes[] calldata voucherSignatures, bytes[] calldata shareSignatures)
        external
        payable
        returns (BatchId batchId);

    /// @notice Put the secret of one segment on record, until the secret deadline. Anyone who knows it; `draw` with all secrets makes it
    ///         needless.
    function recordSecret(Batch calldata batch, uint256 segment, bytes32 secret) external;

    /// @notice Fix the draws, after the entropy block: before the secret deadline with all secrets, those on record may be left out;
    ///         afterwards with those on record. Anyone may call.
    /// @dev With h = blockhash(entropyBlock) and r(x) = uint256(keccak256(x)): t = r(abi.encode(h, batchId, i)) % T names the segment that
    ///      covers token t; the draw is its first token + r(abi.encode(h, batchId, i, secret)) % its tokens, secret = 0 for none. If the
    ///      block hash is out of reach the entropy block is renewed, which ends the wait for secrets, and the call returns without a draw.
    function draw(Batch calldata batch, bytes32[] calldata secrets) external;

    /// @notice Open a drawn leaf, until the deadline: it becomes a committed request of InferenceEscrow with its charge out of the pot.
    ///         Anyone may call. Serves all draws that the leaf covers, also if this very leaf was challenged before.
    function openLeaf(Batch calldata batch, Opening calldata opening, TreeStep[] calldata path) external;

    /// @notice Open any request of the batch, with the bond as value, until the deadline: after half of the opening window, or as soon as no
    ///         draw is pending. Anyone may call with the leaf's way to the root. Its requester needs none: what it and the nodes signed
    ///         and the number of the ticket say that the request belongs to the batch, whatever stands in the tree. The deposit is at
    ///         most what is left of the segment's charge.
    function challengeLeaf(Batch calldata batch, Opening calldata opening, TreeStep[] calldata path) external payable;

    /// @notice Pay a challenger's bond to the executors if the request was settled, else back. Anyone may call, once it is final.
    function resolveChallenge(RequestId requestId) external;

    /// @notice Pay out a batch, after the deadline, if every drawn leaf was opened. Anyone may call.
    /// @dev Each share of what the opened leaves left of the pot; the last takes the dust.
    function settle(Batch calldata batch) external;

    /// @notice Give a batch's money back to its tabs, after the deadline, if it was not drawn or a drawn leaf not opened. Anyone may call. A
    ///         segment gets back what its own opened leaves have not taken. Its vouchers and tickets stay used up.
    function voidBatch(Batch calldata batch) external;

    /// @notice Push an account's credit to that account. Anyone may call.
    function withdrawCredit(address account) external;

    function tabOf(address requester, address collector) external view returns (Tab memory);
    function batchOf(BatchId batchId) external view returns (BatchState memory);
    function creditOf(address account) external view returns (uint256);

    /// @notice Who challenged a request, or the zero address.
    function challengerOf(RequestId requestId) external view returns (address);

    /// @notice Wei of a segment's charge that went into requests of InferenceEscrow.
    function takenOf(BatchId batchId, uint256 segment) external view returns (uint256);

    /// @notice EIP-712 digest of a batch; what the nodes sign.
    function batchIdOf(Batch calldata batch) external view returns (BatchId);

    /// @notice EIP-712 digest of a ticket; what the requester signs, and the id of the request.
    function requestIdOf(Ticket calldata ticket) external view returns (RequestId);

    /// @notice Hash of a leaf: keccak256(bytes.concat(keccak256(abi.encode(requestId, executionsHash, outputTokens)))) with executionsHash
    ///         chained in stage order: e = 0; e = keccak256(abi.encode(e, node, commitment)).
    function leafOf(RequestId requestId, bytes32 executionsHash, uint32 outputTokens) external pure returns (bytes32);

    /// @notice Everything this contract was deployed with.
    function terms() external view returns (TabTerms memory);

    /// @notice Longest time from the post of a batch until the last of its requests is final, which is less than the thaw period of stakes.
    function longestBatch() external view returns (uint256);

    function registry() external view returns (INodeRegistry);
    function assignments() external view returns (IShardAssignments);
    function escrow() external view returns (IInferenceEscrow);
}
