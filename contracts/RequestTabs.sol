// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

import {EIP712} from "solady/utils/EIP712.sol";
import {ReentrancyGuardTransient} from "solady/utils/ReentrancyGuardTransient.sol";
import {SafeCastLib} from "solady/utils/SafeCastLib.sol";
import {SafeTransferLib} from "solady/utils/SafeTransferLib.sol";

import {IInferenceEscrow, Offer, RequestStatus} from "./interfaces/IInferenceEscrow.sol";
import {INodeRegistry} from "./interfaces/INodeRegistry.sol";
import {
    Batch,
    BatchState,
    BatchStatus,
    IRequestTabs,
    Opening,
    Segment,
    Share,
    Tab,
    Ticket,
    TreeStep
} from "./interfaces/IRequestTabs.sol";
import {IShardAssignments, Plan} from "./interfaces/IShardAssignments.sol";
import {MerkleTree} from "./libraries/MerkleTree.sol";
import {NodeSignature} from "./libraries/NodeSignature.sol";
import {Assignment} from "./types/Assignment.sol";
import {BatchId, PlanId, RequestId} from "./types/Identifiers.sol";
import {TabTerms} from "./types/Terms.sol";

/// @title Tabs, vouchers and batches
/// @notice See IRequestTabs. No owner, no setter, no proxy.
/// @dev MONEY-04: the balance is at least all tabs, what is left of the pots of unfinished batches, bonds of theirs and of open challenges, and credits; forced ether
///      only adds to it, because every payment is made out of a variable and never out of the balance. A batch is kept as its digest:
///      whoever calls brings the batch, and the digest says that it is the one that was posted.
contract RequestTabs is IRequestTabs, EIP712, ReentrancyGuardTransient {
    bytes32 private constant _VOUCHER_TYPEHASH =
        keccak256("Voucher(address requester,address collector,uint96 cumulative,bytes32 secretHash)");
    bytes32 private constant _TICKET_TYPEHASH = keccak256(
        "Ticket(bytes32 planId,address requester,uint64 number,bytes32 inputCommitment,bytes32 secretHash,uint32 promptTokens,uint32 maximumTokens,uint64 deadline)"
    );
    bytes32 private constant _STAGE_RESULT_TYPEHASH =
        keccak256("StageResult(bytes32 requestId,uint16 stage,bytes32 commitment,uint32 outputTokens)");
    bytes32 private constant _BATCH_TYPEHASH = keccak256(
        "Batch(bytes32 planId,address collector,uint128 feePerToken,bytes32 root,uint64 deadline,Segment[] segments,Share[] shares)Segment(address requester,uint64 firstTicket,uint32 tickets,uint32 tokens,uint96 cumulative,bytes32 secretHash)Share(address node,uint96 amount)"
    );
    bytes32 private constant _SEGMENT_TYPEHASH = keccak256(
        "Segment(address requester,uint64 firstTicket,uint32 tickets,uint32 tokens,uint96 cumulative,bytes32 secretHash)"
    );
    bytes32 private constant _SHARE_TYPEHASH = keccak256("Share(address node,uint96 amount)");
    /// @dev A lost bond goes here at once, so that nobody gains by a batch that goes void.
    address private constant _BURN = 0x000000000000000000000000000000000000dEaD;
    uint256 private constant _BASIS_POINTS = 10_000;
    /// @dev All three bound the gas of the calls that walk over a batch.
    uint256 private constant _MAXIMUM_SEGMENTS = 128;
    uint256 private constant _MAXIMUM_SHARES = 64;
    uint256 private constant _MAXIMUM_DRAWS = 32;
    /// @dev Keeps every count of tokens of a batch within 32 bits.
    uint256 private constant _MAXIMUM_TOKENS_PER_DRAW = 1 << 26;
    uint256 private constant _MAXIMUM_WINDOW = 3650 days;
    /// @dev Enough for a contract wallet that logs its receipts, and a bound on what a hostile receiver can burn.
    uint256 private constant _TRANSFER_GAS = 100_000;

    /// @dev Where one batch stands; `taken` counts wei.
    struct Record {
        BatchStatus status;
        /// Whether any secret is in `secrets`, and whether a renewal has ended the wait for them.
        bool secretsRecorded;
        bool waitEnded;
        uint8 draws;
        /// Draws whose leaf is still to be opened.
        uint32 pending;
        uint64 entropyBlock;
        uint64 postedAt;
        uint64 deadline;
        // ---
        uint128 taken;
        uint32[_MAXIMUM_DRAWS] offsets;
        mapping(uint256 segment => uint256) takenOf;
        mapping(uint256 segment => bytes32) secrets;
    }

    /// @inheritdoc IRequestTabs
    INodeRegistry public immutable registry;
    /// @inheritdoc IRequestTabs
    IShardAssignments public immutable assignments;
    /// @inheritdoc IRequestTabs
    IInferenceEscrow public immutable escrow;
    /// @inheritdoc IRequestTabs
    uint256 public immutable longestBatch;
    address private immutable _treasury;
    uint256 private immutable _protocolFeeBps;
    uint64 private immutable _secretWindow;
    uint64 private immutable _drawWindow;
    uint64 private immutable _openingWindow;
    uint64 private immutable _closePeriod;
    uint32 private immutable _tokensPerDraw;
    uint128 private immutable _challengeBond;

    mapping(address requester => mapping(address collector => Tab)) private _tabs;
    mapping(BatchId => Record) private _batches;
    /// @dev Hash of the leaf as which a request was opened; 0 before.
    mapping(RequestId => bytes32) private _leaves;
    mapping(RequestId => address) private _challengers;
    mapping(address account => uint256) private _credits;

    constructor(address registry_, address assignments_, address escrow_, TabTerms memory terms_) {
        registry = INodeRegistry(registry_);
        assignments = IShardAssignments(assignments_);
        escrow = IInferenceEscrow(escrow_);
        _treasury = escrow.treasury();
        _protocolFeeBps = escrow.protocolFeeBps();
        _secretWindow = terms_.secretWindow;
        _drawWindow = terms_.drawWindow;
        _openingWindow = terms_.openingWindow;
        _closePeriod = terms_.closePeriod;
        _tokensPerDraw = terms_.tokensPerDraw;
        _challengeBond = terms_.challengeBond;

        uint256 life = uint256(terms_.drawWindow) + terms_.openingWindow;
        longestBatch = life + escrow.terms().verificationWindow;
        _requireWindow(terms_.secretWindow, 0);
        _requireWindow(terms_.drawWindow, terms_.secretWindow);
        _requireWindow(terms_.openingWindow, 0);
        // Vouchers that were signed before the closing can still be collected, and a void batch is back before the tab is empty.
        _requireWindow(terms_.closePeriod, life);
        if (terms_.tokensPerDraw == 0 || terms_.tokensPerDraw > _MAXIMUM_TOKENS_PER_DRAW) {
            revert TokensOutOfRange(_MAXIMUM_TOKENS_PER_DRAW, terms_.tokensPerDraw);
        }
        // STAKE-03: no stake can leave before the last request of a batch that it is bonded for is final.
        uint256 thawPeriod = registry.thawPeriod();
        if (thawPeriod <= longestBatch) revert WindowOutOfRange(longestBatch + 1, thawPeriod);
        _requireWired(address(this), registry.tabs());
        _requireWired(address(this), escrow.tabs());
        _requireWired(registry_, address(escrow.registry()));
        _requireWired(assignments_, address(escrow.assignments()));
        _requireWired(escrow_, registry.escrow());
    }

    // ---------------------------------------------------------------------------------------------------------------------
    //  Tabs
    // ---------------------------------------------------------------------------------------------------------------------

    /// @inheritdoc IRequestTabs
    function fund(address collector) external payable {
        if (msg.value == 0) revert ZeroAmount();
        Tab storage tab = _tabs[msg.sender][collector];
        uint96 balance = SafeCastLib.toUint96(tab.balance + msg.value);
        tab.balance = balance;
        if (tab.closesAt != 0) tab.closesAt = 0;
        emit TabFunded(msg.sender, collector, msg.value, balance);
    }

    /// @inheritdoc IRequestTabs
    function beginClose(address collector) external {
        uint64 closesAt = uint64(block.timestamp) + _closePeriod;
        _tabs[msg.sender][collector].closesAt = closesAt;
        emit TabClosing(msg.sender, collector, closesAt);
    }

    /// @inheritdoc IRequestTabs
    function withdrawTab(address collector) external nonReentrant {
        Tab storage tab = _tabs[msg.sender][collector];
        uint64 closesAt = tab.closesAt;
        // Zero is not a time but "not closing".
        // slither-disable-next-line incorrect-equality
        if (closesAt == 0) revert TabNotClosing(msg.sender, collector);
        if (block.timestamp < closesAt) revert TabStillOpen(closesAt, block.timestamp);
        uint256 amount = tab.balance;
        if (amount == 0) revert ZeroAmount();
        tab.balance = 0;
        emit TabWithdrawn(msg.sender, collector, amount);
        _push(msg.sender, amount);
    }

    // ---------------------------------------------------------------------------------------------------------------------
    //  Batches
    // ---------------------------------------------------------------------------------------------------------------------

    /// @inheritdoc IRequestTabs
    function post(Batch calldata batch, bytes[] calldata voucherSignatures, bytes[] calldata shareSignatures)
        external
        payable
        returns (BatchId batchId)
    {
        batchId = batchIdOf(batch);
        _requireOffered(batch);
        _requireLength(batch.segments.length, voucherSignatures.length);
        _requireLength(batch.shares.length, shareSignatures.length);
        _begin(batchId, batch);
        uint256 pot = _chargeAll(batchId, batch, voucherSignatures);
        _requireShares(batchId, batch.shares, shareSignatures, _executorsPart(pot));
        registry.openDuties(_nodesOf(batch.shares));
    }

    /// @inheritdoc IRequestTabs
    function recordSecret(Batch calldata batch, uint256 segment, bytes32 secret) external {
        (BatchId batchId, Record storage record) = _batchIn(batch, BatchStatus.Posted);
        _requireBefore(_secretDeadline(record));
        if (segment >= batch.segments.length) revert CountOutOfRange(batch.segments.length, segment);
        _requireSecret(batch.segments[segment].secretHash, secret);
        record.secretsRecorded = true;
        record.secrets[segment] = secret;
        emit SecretRecorded(batchId, segment, secret);
    }

    /// @inheritdoc IRequestTabs
    function draw(Batch calldata batch, bytes32[] calldata secrets) external {
        (BatchId batchId, Record storage record) = _batchIn(batch, BatchStatus.Posted);
        _requireBefore(record.deadline);
        uint64 entropyBlock = record.entropyBlock;
        if (block.number <= entropyBlock) revert EntropyNotReady(entropyBlock, block.number);
        bytes32 entropy = blockhash(entropyBlock);
        if (entropy == 0) {
            entropyBlock = uint64(block.number) + 1;
            record.entropyBlock = entropyBlock;
            record.waitEnded = true;
            emit EntropyRenewed(batchId, entropyBlock);
            return;
        }

        bytes32[] memory counted = _countedSecrets(record, batch.segments, secrets);
        uint32[] memory offsets = _drawOffsets(batchId, batch.segments, entropy, counted);
        uint256 draws = offsets.length;
        uint64 openingDeadline = _after(_openingWindow);
        record.status = BatchStatus.Drawn;
        record.draws = uint8(draws); // at most 32
        record.pending = uint32((uint256(1) << draws) - 1);
        record.deadline = openingDeadline;
        for (uint256 i; i < draws; ++i) {
            record.offsets[i] = offsets[i];
        }
        emit BatchDrawn(batchId, entropy, offsets, openingDeadline);
    }

    /// @inheritdoc IRequestTabs
    function openLeaf(Batch calldata batch, Opening calldata opening, TreeStep[] calldata path) external {
        (BatchId batchId, Record storage record) = _batchIn(batch, BatchStatus.Drawn);
        _requireBefore(record.deadline);
        RequestId requestId = _requireGenuine(batch, record, opening);
        _requireSharesOf(batch.shares, opening.route);
        bytes32 leaf = leafOf(requestId, _executionsHash(opening), opening.outputTokens);
        uint256 first = _requirePlace(batch, opening, leaf, path);

        uint32 pending = _pendingOutside(record, first, first + _tokensOf(opening));
        if (pending == record.pending) revert LeafNotDrawn(first, first + _tokensOf(opening));
        record.pending = pending;
        emit LeafOpened(batchId, requestId, first, pending);
        bytes32 opened = _leaves[requestId];
        if (opened == 0) _take(batchId, record, batch, opening, requestId, leaf);
        else if (opened != leaf) revert LeafMismatch(opened, leaf);
    }

    /// @inheritdoc IRequestTabs
    function challengeLeaf(Batch calldata batch, Opening calldata opening, TreeStep[] calldata path) external payable {
        if (msg.value != _challengeBond) revert BondMismatch(_challengeBond, msg.value);
        (BatchId batchId, Record storage record) = _batchIn(batch, BatchStatus.Drawn);
        _requireBefore(record.deadline);
        // The drawn leaves come first: who opens a request in another version must not be faster than its leaf.
        if (record.pending != 0) _requireAfter(record.deadline - _openingWindow / 2);
        RequestId requestId = _requireGenuine(batch, record, opening);
        if (_leaves[requestId] != 0) revert AlreadyOpened(requestId);
        bytes32 leaf = leafOf(requestId, _executionsHash(opening), opening.outputTokens);
        if (msg.sender != opening.ticket.requester) _requirePlace(batch, opening, leaf, path);

        _challengers[requestId] = msg.sender;
        emit LeafChallenged(batchId, requestId, msg.sender, msg.value);
        _take(batchId, record, batch, opening, requestId, leaf);
    }

    /// @inheritdoc IRequestTabs
    function resolveChallenge(RequestId requestId) external {
        address challenger = _challengers[requestId];
        if (challenger == address(0)) revert NotChallenged(requestId);
        // Its deadline and tokens do not decide whose the bond is.
        // slither-disable-next-line unused-return
        (RequestStatus status, uint16 stageCount,,) = escrow.statusOf(requestId);
        bool upheld = status == RequestStatus.Refunded;
        if (!upheld && status != RequestStatus.Settled) revert ChallengeUndecided(requestId, status);

        _challengers[requestId] = address(0);
        uint256 bond = _challengeBond;
        emit ChallengeResolved(requestId, challenger, upheld, bond);
        if (upheld) {
            _credit(RequestId.unwrap(requestId), challenger, bond);
            return;
        }
        for (uint16 i; i < stageCount; ++i) {
            // Equal shares of what is left: the parts add up to the bond.
            uint256 share = bond / (stageCount - i);
            bond -= share;
            _credit(RequestId.unwrap(requestId), _receiverOf(escrow.executorOf(requestId, i)), share);
        }
    }

    /// @inheritdoc IRequestTabs
    function settle(Batch calldata batch) external {
        (BatchId batchId, Record storage record) = _batchIn(batch, BatchStatus.Drawn);
        _requireAfter(record.deadline);
        if (record.pending != 0) revert DrawsPending(record.pending);
        record.status = BatchStatus.Settled;

        uint256 pot = _potOf(batch);
        uint256 whole = _executorsPart(pot);
        uint256 taken = record.taken;
        pot -= taken;
        uint256 part = _executorsPart(pot);
        _credit(BatchId.unwrap(batchId), _treasury, pot - part);
        _payShares(batchId, batch.shares, part, whole);
        _credit(BatchId.unwrap(batchId), batch.collector, _bondOf(batch));
        emit BatchSettled(batchId, part, pot - part, taken);
        registry.closeDuties(_nodesOf(batch.shares));
    }

    /// @inheritdoc IRequestTabs
    function voidBatch(Batch calldata batch) external {
        BatchId batchId = batchIdOf(batch);
        Record storage record = _batches[batchId];
        BatchStatus status = record.status;
        if (status != BatchStatus.Posted && status != BatchStatus.Drawn) {
            revert WrongBatchStatus(batchId, BatchStatus.Drawn, status);
        }
        _requireAfter(record.deadline);
        if (status == BatchStatus.Drawn && record.pending == 0) revert NoDrawPending(batchId);
        record.status = BatchStatus.Void;

        uint256 restored;
        for (uint256 i; i < batch.segments.length; ++i) {
            uint256 amount = _chargeOf(batch.segments[i], batch.feePerToken) - record.takenOf[i];
            restored += amount;
            _restore(batchId, batch.segments[i].requester, batch.collector, amount);
        }
        uint256 bond = _bondOf(batch);
        emit BatchVoided(batchId, restored, record.taken, bond);
        registry.closeDuties(_nodesOf(batch.shares));
        SafeTransferLib.forceSafeTransferETH(_BURN, bond, _TRANSFER_GAS);
    }

    // ---------------------------------------------------------------------------------------------------------------------
    //  Credits
    // ---------------------------------------------------------------------------------------------------------------------

    /// @inheritdoc IRequestTabs
    function withdrawCredit(address account) external nonReentrant {
        uint256 amount = _credits[account];
        if (amount == 0) revert NoCredit(account);
        _credits[account] = 0;
        emit CreditWithdrawn(account, amount);
        _push(account, amount);
    }

    // ---------------------------------------------------------------------------------------------------------------------
    //  Views
    // ---------------------------------------------------------------------------------------------------------------------

    /// @inheritdoc IRequestTabs
    function tabOf(address requester, address collector) external view returns (Tab memory) {
        return _tabs[requester][collector];
    }

    /// @inheritdoc IRequestTabs
    function batchOf(BatchId batchId) external view returns (BatchState memory state) {
        Record storage record = _batches[batchId];
        state.status = record.status;
        state.entropyBlock = record.entropyBlock;
        state.postedAt = record.postedAt;
        state.secretDeadline = _secretDeadline(record);
        state.deadline = record.deadline;
        state.taken = record.taken;
        state.pending = record.pending;
        state.offsets = new uint32[](record.draws);
        for (uint256 i; i < state.offsets.length; ++i) {
            state.offsets[i] = record.offsets[i];
        }
    }

    /// @inheritdoc IRequestTabs
    function creditOf(address account) external view returns (uint256) {
        return _credits[account];
    }

    /// @inheritdoc IRequestTabs
    function challengerOf(RequestId requestId) external view returns (address) {
        return _challengers[requestId];
    }

    /// @inheritdoc IRequestTabs
    function takenOf(BatchId batchId, uint256 segment) external view returns (uint256) {
        return _batches[batchId].takenOf[segment];
    }

    /// @inheritdoc IRequestTabs
    function terms() external view returns (TabTerms memory) {
        return TabTerms(_secretWindow, _drawWindow, _openingWindow, _closePeriod, _tokensPerDraw, _challengeBond);
    }

    /// @inheritdoc IRequestTabs
    function batchIdOf(Batch calldata batch) public view returns (BatchId) {
        bytes32 structHash = keccak256(
            abi.encode(
                _BATCH_TYPEHASH,
                batch.planId,
                batch.collector,
                batch.feePerToken,
                batch.root,
                batch.deadline,
                _hashOfSegments(batch.segments),
                _hashOfShares(batch.shares)
            )
        );
        return BatchId.wrap(_hashTypedData(structHash));
    }

    /// @inheritdoc IRequestTabs
    function requestIdOf(Ticket calldata ticket) public view returns (RequestId) {
        return RequestId.wrap(_hashTypedData(keccak256(abi.encode(_TICKET_TYPEHASH, ticket))));
    }

    /// @inheritdoc IRequestTabs
    function leafOf(RequestId requestId, bytes32 executionsHash, uint32 outputTokens) public pure returns (bytes32) {
        return MerkleTree.leafOf(keccak256(abi.encode(requestId, executionsHash, outputTokens)));
    }

    // ---------------------------------------------------------------------------------------------------------------------
    //  Inside: posting
    // ---------------------------------------------------------------------------------------------------------------------

    function _requireOffered(Batch calldata batch) private view {
        Plan memory plan = assignments.planOf(batch.planId);
        if (plan.publisher != msg.sender) revert NotCollector(plan.publisher, msg.sender);
        if (batch.collector != msg.sender) revert NotCollector(batch.collector, msg.sender);
        if (batch.feePerToken != plan.feePerToken) revert FeeMismatch(plan.feePerToken, batch.feePerToken);
        uint256 bond = _bondOf(batch);
        if (msg.value != bond) revert BondMismatch(bond, msg.value);
        _requireBefore(batch.deadline);
        _requireCount(_MAXIMUM_SEGMENTS, batch.segments.length);
        _requireCount(_MAXIMUM_SHARES, batch.shares.length);
    }

    function _begin(BatchId batchId, Batch calldata batch) private {
        Record storage record = _batches[batchId];
        if (record.status != BatchStatus.Absent) revert BatchAlreadyPosted(batchId);
        uint64 entropyBlock = uint64(block.number) + 1;
        uint64 drawDeadline = _after(_drawWindow);
        record.status = BatchStatus.Posted;
        record.entropyBlock = entropyBlock;
        record.postedAt = uint64(block.timestamp);
        record.deadline = drawDeadline;
        emit BatchPosted(batchId, msg.sender, batch.planId, batch, entropyBlock, _after(_secretWindow), drawDeadline);
    }

    function _chargeAll(BatchId batchId, Batch calldata batch, bytes[] calldata signatures)
        private
        returns (uint256 pot)
    {
        uint256 tokens;
        for (uint256 i; i < signatures.length; ++i) {
            Segment calldata segment = batch.segments[i];
            _requireVoucher(segment, signatures[i]);
            uint256 amount = _chargeOf(segment, batch.feePerToken);
            _charge(batchId, segment, amount);
            tokens += segment.tokens;
            pot += amount;
        }
        uint256 maximum = _MAXIMUM_DRAWS * _tokensPerDraw;
        if (tokens > maximum) revert TokensOutOfRange(maximum, tokens);
    }

    /// @dev Takes a segment's charge off its tab. The next voucher must add to this one, so no voucher, and no secret with it, is used twice.
    function _charge(BatchId batchId, Segment calldata segment, uint256 amount) private {
        address requester = segment.requester;
        Tab storage tab = _tabs[requester][msg.sender];
        uint256 tickets = tab.tickets;
        if (segment.firstTicket != tickets) revert TicketOutOfOrder(requester, tickets, segment.firstTicket);
        if (segment.tickets == 0) revert CountOutOfRange(type(uint32).max, 0);
        if (segment.tokens == 0) revert TokensOutOfRange(type(uint32).max, 0);
        uint256 due = tab.collected + amount;
        if (segment.cumulative < due) revert VoucherTooSmall(requester, due, segment.cumulative);
        uint256 balance = tab.balance;
        if (balance < amount) revert TabTooSmall(requester, amount, balance);

        balance -= amount;
        tickets += segment.tickets;
        tab.balance = uint96(balance); // less than it was
        tab.collected = segment.cumulative;
        tab.tickets = SafeCastLib.toUint64(tickets);
        emit TabCharged(batchId, requester, msg.sender, amount, balance);
    }

    function _requireVoucher(Segment calldata segment, bytes calldata signature) private view {
        bytes32 structHash = keccak256(
            abi.encode(_VOUCHER_TYPEHASH, segment.requester, msg.sender, segment.cumulative, segment.secretHash)
        );
        _requireSigned(_hashTypedData(structHash), signature, segment.requester);
    }

    function _requireShares(
        BatchId batchId,
        Share[] calldata shares,
        bytes[] calldata signatures,
        uint256 executorsPart
    ) private view {
        uint256 promised;
        for (uint256 i; i < shares.length; ++i) {
            _requireSigned(BatchId.unwrap(batchId), signatures[i], shares[i].node);
            promised += shares[i].amount;
        }
        if (promised != executorsPart) revert SharesMismatch(executorsPart, promised);
    }

    // ---------------------------------------------------------------------------------------------------------------------
    //  Inside: draw
    // ---------------------------------------------------------------------------------------------------------------------

    /// @dev Until the secret deadline every secret must be there, so that nobody can choose which of them count. After it those on record
    ///      count and no others, so that who was given a secret cannot choose either.
    function _countedSecrets(Record storage record, Segment[] calldata segments, bytes32[] calldata secrets)
        private
        view
        returns (bytes32[] memory counted)
    {
        counted = new bytes32[](segments.length);
        _requireLength(counted.length, secrets.length);
        uint256 secretDeadline = _secretDeadline(record);
        bool late = block.timestamp > secretDeadline;
        bool recorded = record.secretsRecorded;
        for (uint256 i; i < counted.length; ++i) {
            if (recorded) counted[i] = record.secrets[i];
            if (late || counted[i] != 0) continue;
            if (secrets[i] == 0) revert DeadlineNotPassed(secretDeadline, block.timestamp);
            _requireSecret(segments[i].secretHash, secrets[i]);
            counted[i] = secrets[i];
        }
    }

    function _drawOffsets(BatchId batchId, Segment[] calldata segments, bytes32 entropy, bytes32[] memory secrets)
        private
        view
        returns (uint32[] memory offsets)
    {
        uint256 tokens;
        for (uint256 i; i < segments.length; ++i) {
            tokens += segments[i].tokens;
        }
        offsets = new uint32[]((tokens + _tokensPerDraw - 1) / _tokensPerDraw);
        for (uint256 i; i < offsets.length; ++i) {
            // The hash of a block after the post, and below a secret that was fixed before it.
            // slither-disable-next-line weak-prng
            uint256 token = uint256(keccak256(abi.encode(entropy, batchId, i))) % tokens;
            uint256 segment;
            uint256 first;
            while (token >= first + segments[segment].tokens) {
                first += segments[segment++].tokens;
            }
            bytes32 seed = keccak256(abi.encode(entropy, batchId, i, secrets[segment]));
            // slither-disable-next-line weak-prng
            offsets[i] = uint32(first + uint256(seed) % segments[segment].tokens); // all tokens of a batch are within 32 bits
        }
    }

    /// @dev 0 once a renewal has ended the wait.
    function _secretDeadline(Record storage record) private view returns (uint64) {
        return record.waitEnded ? 0 : record.postedAt + _secretWindow;
    }

    function _requireSecret(bytes32 expected, bytes32 secret) private pure {
        bytes32 actual = keccak256(abi.encode(secret));
        if (actual != expected) revert SecretMismatch(expected, actual);
    }

    // ---------------------------------------------------------------------------------------------------------------------
    //  Inside: opening
    // ---------------------------------------------------------------------------------------------------------------------

    /// @dev The ticket is the requester's and its number belongs to the batch; every node of the route signed its commitment.
    function _requireGenuine(Batch calldata batch, Record storage record, Opening calldata opening)
        private
        view
        returns (RequestId requestId)
    {
        Ticket calldata ticket = opening.ticket;
        if (opening.segment >= batch.segments.length) revert CountOutOfRange(batch.segments.length, opening.segment);
        Segment calldata segment = batch.segments[opening.segment];
        if (PlanId.unwrap(ticket.planId) != PlanId.unwrap(batch.planId)) {
            revert PlanMismatch(batch.planId, ticket.planId);
        }
        bool numbered = ticket.number >= segment.firstTicket && ticket.number - segment.firstTicket < segment.tickets
            && ticket.requester == segment.requester;
        if (!numbered) revert TicketNotInBatch(ticket.number);
        if (ticket.deadline < record.postedAt) revert TicketExpired(ticket.deadline, record.postedAt);
        if (opening.outputTokens == 0 || opening.outputTokens > ticket.maximumTokens) {
            revert TokensOutOfRange(ticket.maximumTokens, opening.outputTokens);
        }
        requestId = requestIdOf(ticket);
        _requireSigned(RequestId.unwrap(requestId), opening.ticketSignature, ticket.requester);

        _requireLength(opening.route.length, opening.commitments.length);
        _requireLength(opening.route.length, opening.signatures.length);
        for (uint256 i; i < opening.route.length; ++i) {
            bytes32 structHash = keccak256(
                abi.encode(_STAGE_RESULT_TYPEHASH, requestId, i, opening.commitments[i], opening.outputTokens)
            );
            _requireSigned(_hashTypedData(structHash), opening.signatures[i], opening.route[i].node);
        }
    }

    /// @dev Whoever served a drawn leaf has a share, so that a collector cannot keep a node out of what it earned.
    function _requireSharesOf(Share[] calldata shares, Assignment[] calldata route) private pure {
        for (uint256 i; i < route.length; ++i) {
            uint256 k;
            while (k < shares.length && shares[k].node != route[i].node) {
                ++k;
            }
            if (k == shares.length) revert NodeWithoutShare(route[i].node);
        }
    }

    /// @dev The first token of the leaf, whose way to the root it proves: at the place that the number of its ticket says, inside its
    ///      segment. The sums of two siblings are both under their parent's hash, so the tokens of two leaves never overlap.
    function _requirePlace(Batch calldata batch, Opening calldata opening, bytes32 node, TreeStep[] calldata path)
        private
        pure
        returns (uint256 first)
    {
        uint256 tokens = _tokensOf(opening);
        uint256 leaves = 1;
        uint256 index;
        for (uint256 i; i < path.length; ++i) {
            TreeStep calldata step = path[i];
            if (step.isLeft) {
                node = keccak256(abi.encode(step.hash, step.tokens, step.leaves, node, tokens, leaves));
                first += step.tokens;
                index += step.leaves;
            } else {
                node = keccak256(abi.encode(node, tokens, leaves, step.hash, step.tokens, step.leaves));
            }
            tokens += step.tokens;
            leaves += step.leaves;
        }
        if (node != batch.root) revert ProofInvalid(batch.root, node);
        _requireInSegment(batch.segments, opening, first, index, tokens, leaves);
    }

    function _requireInSegment(
        Segment[] calldata segments,
        Opening calldata opening,
        uint256 first,
        uint256 index,
        uint256 tokens,
        uint256 leaves
    ) private pure {
        uint256 allTokens;
        uint256 allLeaves;
        for (uint256 i; i < segments.length; ++i) {
            Segment calldata segment = segments[i];
            if (i == opening.segment) {
                uint256 expected = allLeaves + (opening.ticket.number - segment.firstTicket);
                bool inside = first >= allTokens && first + _tokensOf(opening) <= allTokens + segment.tokens;
                if (index != expected || !inside) revert LeafMisplaced(expected, index);
            }
            allTokens += segment.tokens;
            allLeaves += segment.tickets;
        }
        if (tokens != allTokens) revert TokensOutOfRange(allTokens, tokens);
        if (leaves != allLeaves) revert CountOutOfRange(allLeaves, leaves);
    }

    /// @dev Pending draws without those of a token in [first, end).
    function _pendingOutside(Record storage record, uint256 first, uint256 end) private view returns (uint32 pending) {
        pending = record.pending;
        uint256 draws = record.draws;
        for (uint256 i; i < draws; ++i) {
            uint256 offset = record.offsets[i];
            if (offset >= first && offset < end) pending &= ~uint32(1 << i);
        }
    }

    /// @dev Makes the opened leaf a request of the escrow. No segment pays for the leaves of another, so the deposit can fall short of the
    ///      charge where somebody opens what the segment was not charged for; it never fails for that.
    function _take(
        BatchId batchId,
        Record storage record,
        Batch calldata batch,
        Opening calldata opening,
        RequestId requestId,
        bytes32 leaf
    ) private {
        _leaves[requestId] = leaf;
        uint256 segment = opening.segment;
        uint256 taken = record.takenOf[segment];
        uint256 amount = _tokensOf(opening) * batch.feePerToken;
        uint256 left = _chargeOf(batch.segments[segment], batch.feePerToken) - taken;
        if (amount > left) amount = left;
        record.takenOf[segment] = taken + amount;
        record.taken += uint128(amount); // what was on tabs is within 96 bits
        emit RequestTaken(batchId, requestId, segment, amount, record.taken);
        escrow.openCommitted{value: amount}(
            requestId, _offerOf(opening.ticket, batch.feePerToken), opening.route, opening.proofs, opening.commitments
        );
    }

    function _offerOf(Ticket calldata ticket, uint128 feePerToken) private pure returns (Offer memory) {
        return Offer(
            ticket.requester,
            ticket.planId,
            feePerToken,
            ticket.inputCommitment,
            ticket.secretHash,
            ticket.promptTokens,
            ticket.maximumTokens
        );
    }

    function _executionsHash(Opening calldata opening) private pure returns (bytes32 executionsHash) {
        for (uint256 i; i < opening.route.length; ++i) {
            executionsHash = keccak256(abi.encode(executionsHash, opening.route[i].node, opening.commitments[i]));
        }
    }

    function _tokensOf(Opening calldata opening) private pure returns (uint256) {
        return uint256(opening.ticket.promptTokens) + opening.outputTokens;
    }

    // ---------------------------------------------------------------------------------------------------------------------
    //  Inside: money
    // ---------------------------------------------------------------------------------------------------------------------

    /// @dev `part` in proportion to the shares, which add up to `whole`. Every node still has its duty open, so its account is there.
    function _payShares(BatchId batchId, Share[] calldata shares, uint256 part, uint256 whole) private {
        uint256 left = part;
        for (uint256 i; i < shares.length; ++i) {
            uint256 share = i == shares.length - 1 ? left : part * shares[i].amount / whole;
            left -= share;
            _credit(BatchId.unwrap(batchId), registry.operatorOf(shares[i].node), share);
        }
    }

    function _restore(BatchId batchId, address requester, address collector, uint256 amount) private {
        Tab storage tab = _tabs[requester][collector];
        uint96 balance = SafeCastLib.toUint96(tab.balance + amount);
        tab.balance = balance;
        emit TabRestored(batchId, requester, collector, amount, balance);
    }

    function _credit(bytes32 source, address account, uint256 amount) private {
        if (amount == 0) return;
        uint256 credit = _credits[account] + amount;
        _credits[account] = credit;
        emit Credited(source, account, amount, credit);
    }

    /// @dev A receiver that refuses the money stops nobody but itself.
    function _push(address to, uint256 amount) private {
        if (!SafeTransferLib.trySafeTransferETH(to, amount, _TRANSFER_GAS)) revert TransferFailed(to, amount);
    }

    /// @dev A node that has left is paid on its own key.
    function _receiverOf(address node) private view returns (address) {
        address operator = registry.operatorOf(node);
        return operator == address(0) ? node : operator;
    }

    function _potOf(Batch calldata batch) private pure returns (uint256 pot) {
        for (uint256 i; i < batch.segments.length; ++i) {
            pot += _chargeOf(batch.segments[i], batch.feePerToken);
        }
    }

    /// @dev The fee of the tokens of one draw.
    function _bondOf(Batch calldata batch) private view returns (uint256) {
        return uint256(_tokensPerDraw) * batch.feePerToken;
    }

    function _chargeOf(Segment calldata segment, uint256 feePerToken) private pure returns (uint256) {
        return segment.tokens * feePerToken;
    }

    /// @dev As in the escrow, where nobody verified: all but the protocol fee.
    function _executorsPart(uint256 pot) private view returns (uint256) {
        return pot - pot * _protocolFeeBps / _BASIS_POINTS;
    }

    // ---------------------------------------------------------------------------------------------------------------------
    //  Inside: reading
    // ---------------------------------------------------------------------------------------------------------------------

    function _batchIn(Batch calldata batch, BatchStatus expected)
        private
        view
        returns (BatchId batchId, Record storage record)
    {
        batchId = batchIdOf(batch);
        record = _batches[batchId];
        if (record.status != expected) revert WrongBatchStatus(batchId, expected, record.status);
    }

    function _nodesOf(Share[] calldata shares) private pure returns (address[] memory nodes) {
        nodes = new address[](shares.length);
        for (uint256 i; i < nodes.length; ++i) {
            nodes[i] = shares[i].node;
        }
    }

    function _hashOfSegments(Segment[] calldata segments) private pure returns (bytes32) {
        bytes32[] memory hashes = new bytes32[](segments.length);
        for (uint256 i; i < hashes.length; ++i) {
            hashes[i] = keccak256(abi.encode(_SEGMENT_TYPEHASH, segments[i]));
        }
        return keccak256(abi.encodePacked(hashes));
    }

    function _hashOfShares(Share[] calldata shares) private pure returns (bytes32) {
        bytes32[] memory hashes = new bytes32[](shares.length);
        for (uint256 i; i < hashes.length; ++i) {
            hashes[i] = keccak256(abi.encode(_SHARE_TYPEHASH, shares[i]));
        }
        return keccak256(abi.encodePacked(hashes));
    }

    function _requireSigned(bytes32 digest, bytes calldata signature, address signer) private view {
        if (!NodeSignature.isSignedBy(digest, signature, signer)) revert SignatureInvalid(signer);
    }

    function _requireBefore(uint256 deadline) private view {
        if (block.timestamp > deadline) revert DeadlinePassed(deadline, block.timestamp);
    }

    function _requireAfter(uint256 deadline) private view {
        if (block.timestamp <= deadline) revert DeadlineNotPassed(deadline, block.timestamp);
    }

    function _requireCount(uint256 maximum, uint256 actual) private pure {
        if (actual == 0 || actual > maximum) revert CountOutOfRange(maximum, actual);
    }

    function _requireLength(uint256 expected, uint256 actual) private pure {
        if (actual != expected) revert LengthMismatch(expected, actual);
    }

    /// @dev Seconds reach 2^64 in 584 billion years; a window is at most _MAXIMUM_WINDOW.
    function _after(uint64 window) private view returns (uint64) {
        return uint64(block.timestamp) + window;
    }

    function _requireWindow(uint256 window, uint256 longerThan) private pure {
        if (window <= longerThan || window > _MAXIMUM_WINDOW) revert WindowOutOfRange(longerThan + 1, window);
    }

    function _requireWired(address expected, address actual) private pure {
        if (actual != expected) revert WiringMismatch(expected, actual);
    }

    function _domainNameAndVersion() internal pure override returns (string memory name, string memory version) {
        return ("bsns RequestTabs", "1");
    }
}
