// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

import {RegistryTerms} from "../types/Terms.sol";

/// @notice Life of a node account. `Pending` and `Active` follow from time; no keeper is needed. `Jailed` ends when the operator calls
///         `leaveJail` after the term.
enum NodeStatus {
    Absent,
    Pending,
    Active,
    Jailed,
    Exiting
}

/// @notice Why stake was taken.
enum SlashReason {
    IncorrectOutput,
    IncorrectAttestation,
    EvidenceWithheld,
    RevealWithheld,
    Equivocation
}

/// @notice Everything the registry keeps about one node.
/// @dev `staked` includes `thawing` and `warming`. A node is identified by its hot key; a new hot key is a new account.
struct NodeAccount {
    /// Cold key that staked. Receives fees, credits and the stake.
    address operator;
    /// Wei. Always >= thawing + warming after every call.
    uint128 staked;
    /// Wei on its way out; slashed in proportion like the rest until it is withdrawn.
    uint128 thawing;
    /// Wei added to an active account that does not count for committee draws before `warmFrom`.
    uint128 warming;
    uint64 warmFrom;
    uint64 thawEnd;
    /// Time from which the node may serve and attest.
    uint64 activeFrom;
    /// 0 while not jailed; type(uint64).max is a tombstone.
    uint64 jailedUntil;
    /// Requests, batches and attestations this node can still be blamed for.
    uint32 openDuties;
    bool exiting;
}

/// @title Stakes and identities of nodes
/// @notice The operator's cold key stakes; a hot node key signs receipts and commitments and is bound by an EIP-712 proof of
///         possession. Stake stays slashable until every duty the node could be blamed for is final.
/// @dev Invariants: STAKE-01..04 of tests/contracts/PROPERTIES.md. Nobody but OutputVerification can slash or jail; nobody at
///      all can stop a withdrawal whose time has come.
interface INodeRegistry {
    error NotOperator(address node, address expected, address actual);
    error NotVerification(address actual);
    error NotDutyKeeper(address actual);
    error NodeAlreadyRegistered(address node);
    error WrongStatus(address node, NodeStatus actual);
    error StakeBelowMinimum(uint256 expected, uint256 actual);
    error ProofExpired(uint256 deadline, uint256 now_);
    error ProofInvalid(address expected);
    error EndpointLengthOutOfRange(uint256 maximum, uint256 actual);
    error CertificateHashMissing();
    error NodeKeyIsOperator(address node);
    error ThawExceedsStake(uint256 available, uint256 requested);
    error NothingToWithdraw(address node);
    error ThawNotOver(uint256 thawEnd, uint256 now_);
    error DutiesOpen(address node, uint256 openDuties);
    error StillJailed(address node, uint256 jailedUntil, uint256 now_);
    error DutyNotOpen(address node);
    error SlashShareOutOfRange(uint256 expected, uint256 actual);
    error ZeroAmount();
    error TransferFailed(address to, uint256 amount);
    error WindowOutOfRange(uint256 minimum, uint256 actual);

    event NodeRegistered(
        address indexed node,
        address indexed operator,
        uint256 staked,
        uint256 activeFrom,
        bytes32 certificateHash,
        string endpoint
    );
    event EndpointChanged(address indexed node, bytes32 certificateHash, string endpoint);
    event StakeAdded(address indexed node, uint256 amount, uint256 staked, uint256 warmFrom);
    event ThawStarted(address indexed node, uint256 amount, uint256 thawing, uint256 thawEnd);
    event ExitStarted(address indexed node, uint256 thawEnd);
    event StakeWithdrawn(address indexed node, address indexed operator, uint256 amount, uint256 staked);
    event NodeRemoved(address indexed node);
    event NodeJailed(address indexed node, uint256 jailedUntil);
    event NodeReleased(address indexed node);
    event NodeSlashed(
        address indexed node,
        SlashReason indexed reason,
        uint256 amount,
        uint256 burned,
        uint256 staked,
        uint256 thawing
    );
    event DutyOpened(address indexed node, uint256 openDuties);
    event DutyClosed(address indexed node, uint256 openDuties);
    event Credited(address indexed account, uint256 amount, uint256 credit);
    event CreditWithdrawn(address indexed account, uint256 amount);

    /// @notice Stake for a node key and make it known.
    /// @dev EIP-712 `NodeKeyProof(address operator,address node,bytes32 certificateHash,string endpoint,uint256 deadline)` signed
    ///      by the node key under domain {name "bsns NodeRegistry", version "1", chainId, verifyingContract}. A tombstoned key
    ///      cannot come back.
    /// @param certificateHash SHA-256 of the node's TLS certificate (DER), pinned by everyone who dials it.
    /// @param endpoint "host:port", at most 255 bytes; only emitted, never stored.
    function register(
        address node,
        bytes32 certificateHash,
        string calldata endpoint,
        uint256 deadline,
        bytes calldata proof
    ) external payable;

    /// @notice Announce a new endpoint or certificate. Operator only.
    function changeEndpoint(address node, bytes32 certificateHash, string calldata endpoint) external;

    /// @notice Add stake. Operator only. It counts for committee draws only after the activation delay, so that nobody can add stake once
    ///         a draw is known. An earlier addition that warmed up less than a thaw period ago warms up again together with this one.
    function addStake(address node) external payable;

    /// @notice Start to take `amount` out. Operator only; what remains must be at least the minimum. A second thaw restarts the timer for all of it.
    function thaw(address node, uint256 amount) external;

    /// @notice Stop serving and take everything out after the thaw. Operator only. Possible from Pending, Active and Jailed.
    function beginExit(address node) external;

    /// @notice Take out what has thawed. Operator only. An exiting account is removed, which needs all its duties to be closed; what is
    ///         left of its jail term stays with the key.
    function withdraw(address node) external;

    /// @notice Leave jail after the time is served, with at least the minimum stake. Operator only; never after a tombstone. The stake
    ///         warms up again before it counts for draws: it was in no snapshot while the node was in jail.
    function leaveJail(address node) external;

    /// @notice Push an account's credit (rewards out of slashes) to that account. Anyone may call.
    function withdrawCredit(address account) external;

    /// @notice Take up to `amount` wei, thawing part in proportion, give `shares` to `recipients` as credits, burn the rest.
    /// @dev OutputVerification only. An account left with less than the minimum is jailed until it is topped up. If less than `amount` is there, the shares shrink in proportion. Never reverts for lack of
    ///      stake: a settlement must not be blockable. An Absent node is a no-op that returns 0.
    /// @return taken wei actually taken.
    function slash(
        address node,
        uint256 amount,
        SlashReason reason,
        address[] calldata recipients,
        uint256[] calldata shares
    ) external returns (uint256 taken);

    /// @notice Keep a node out of new duties until `until` (type(uint64).max: for ever). OutputVerification only. Never shortens a term.
    ///         The term of a key without an account bars its registration.
    function jail(address node, uint64 until) external;

    /// @notice Count a duty the node can be blamed for. InferenceEscrow, OutputVerification and RequestTabs only.
    function openDuty(address node) external;

    /// @notice Count one duty for each entry of `nodes`; a node may be named several times.
    function openDuties(address[] calldata nodes) external;

    /// @notice Close one such duty.
    function closeDuty(address node) external;

    /// @notice Close one duty for each entry of `nodes`; a node may be named several times.
    function closeDuties(address[] calldata nodes) external;

    function accountOf(address node) external view returns (NodeAccount memory);
    function statusOf(address node) external view returns (NodeStatus);
    function operatorOf(address node) external view returns (address);

    /// @notice Wei that a slash could take: all of `staked`, thawing and warming parts included.
    function stakeOf(address node) external view returns (uint256);

    function creditOf(address account) external view returns (uint256);

    /// @notice Wei of stake that count for a draw whose snapshot was taken at `snapshotTime`: staked - thawing - warming, 0 unless the
    ///         node is Active now and was active at the snapshot.
    function sortitionStake(address node, uint256 snapshotTime) external view returns (uint256);

    /// @notice Sum over all Pending and Active nodes of staked - thawing. The denominator of the draw; never smaller than the sum of
    ///         all sortition stakes.
    function totalSortitionStake() external view returns (uint256);

    /// @notice Wei an account must keep to serve.
    function minimumStake() external view returns (uint256);

    /// @notice Seconds from registration until a node may serve, and from a top-up until it counts for draws.
    function activationDelay() external view returns (uint64);

    /// @notice Seconds from a thaw or an exit until the stake can be taken out.
    function thawPeriod() external view returns (uint64);

    /// @notice Everything this contract was deployed with.
    function terms() external view returns (RegistryTerms memory);

    /// @notice InferenceEscrow: may count duties.
    function escrow() external view returns (address);

    /// @notice OutputVerification: may slash, jail and count duties.
    function verification() external view returns (address);

    /// @notice RequestTabs: may count duties.
    function tabs() external view returns (address);
}
