// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

import {EIP712} from "solady/utils/EIP712.sol";
import {ReentrancyGuardTransient} from "solady/utils/ReentrancyGuardTransient.sol";
import {SafeCastLib} from "solady/utils/SafeCastLib.sol";
import {SafeTransferLib} from "solady/utils/SafeTransferLib.sol";

import {INodeRegistry, NodeAccount, NodeStatus, SlashReason} from "./interfaces/INodeRegistry.sol";
import {NodeSignature} from "./libraries/NodeSignature.sol";
import {RegistryTerms} from "./types/Terms.sol";

/// @title Stakes and identities of nodes
/// @notice See INodeRegistry. No owner, no setter, no proxy: who may slash and who may count duties is fixed at deployment.
/// @dev STAKE-01: the balance is at least the sum of all `staked` plus all credits; forced ether only adds to it, because every
///      payment is made out of a variable and never out of the balance.
contract NodeRegistry is INodeRegistry, EIP712, ReentrancyGuardTransient {
    /// @dev EIP-712 type of the proof that a node key agrees to serve for an operator.
    bytes32 private constant _NODE_KEY_PROOF_TYPEHASH = keccak256(
        "NodeKeyProof(address operator,address node,bytes32 certificateHash,string endpoint,uint256 deadline)"
    );
    /// @dev The burned part of a slash goes here at once, so that nobody gains by holding it back.
    address private constant _BURN = 0x000000000000000000000000000000000000dEaD;
    uint64 private constant _TOMBSTONE = type(uint64).max;
    uint256 private constant _MAXIMUM_ENDPOINT_LENGTH = 255;
    /// @dev Enough for a contract wallet that logs its receipts, and a bound on what a hostile receiver can burn.
    uint256 private constant _TRANSFER_GAS = 100_000;

    /// @inheritdoc INodeRegistry
    address public immutable escrow;
    /// @inheritdoc INodeRegistry
    address public immutable verification;
    /// @inheritdoc INodeRegistry
    address public immutable tabs;
    uint128 private immutable _minimumStake;
    /// @inheritdoc INodeRegistry
    uint64 public immutable activationDelay;
    /// @inheritdoc INodeRegistry
    uint64 public immutable thawPeriod;

    mapping(address node => NodeAccount) private _accounts;
    /// @dev Jail terms that outlive their account: leaving and coming back with the same key does not shorten them.
    mapping(address node => uint64) private _barredUntil;
    mapping(address account => uint256) private _credits;
    /// @dev Sum of staked - thawing over the accounts that are neither jailed nor exiting.
    uint256 private _totalSortitionStake;

    constructor(address escrow_, address verification_, address tabs_, RegistryTerms memory terms_) {
        if (terms_.minimumStake == 0) revert ZeroAmount();
        // Without a delay, stake could be added in the very block of a snapshot that does not count it.
        if (terms_.activationDelay == 0) revert WindowOutOfRange(1, 0);
        if (terms_.thawPeriod == 0) revert WindowOutOfRange(1, 0);
        escrow = escrow_;
        verification = verification_;
        tabs = tabs_;
        _minimumStake = terms_.minimumStake;
        activationDelay = terms_.activationDelay;
        thawPeriod = terms_.thawPeriod;
    }

    modifier onlyVerification() {
        if (msg.sender != verification) revert NotVerification(msg.sender);
        _;
    }

    modifier onlyDutyKeeper() {
        if (msg.sender != escrow && msg.sender != verification && msg.sender != tabs) revert NotDutyKeeper(msg.sender);
        _;
    }

    // ---------------------------------------------------------------------------------------------------------------------
    //  Operators
    // ---------------------------------------------------------------------------------------------------------------------

    /// @inheritdoc INodeRegistry
    function register(
        address node,
        bytes32 certificateHash,
        string calldata endpoint,
        uint256 deadline,
        bytes calldata proof
    ) external payable {
        NodeAccount storage account = _accounts[node];
        if (account.operator != address(0)) revert NodeAlreadyRegistered(node);
        if (node == msg.sender) revert NodeKeyIsOperator(node);
        uint64 barredUntil = _barredUntil[node];
        if (block.timestamp < barredUntil || barredUntil == _TOMBSTONE) {
            revert StillJailed(node, barredUntil, block.timestamp);
        }
        if (msg.value < _minimumStake) revert StakeBelowMinimum(_minimumStake, msg.value);
        _requireReachable(certificateHash, endpoint);
        _requireProof(node, certificateHash, endpoint, deadline, proof);

        uint64 activeFrom = _now() + activationDelay;
        account.operator = msg.sender;
        account.staked = SafeCastLib.toUint128(msg.value);
        account.activeFrom = activeFrom;
        _totalSortitionStake += msg.value;
        emit NodeRegistered(node, msg.sender, msg.value, activeFrom, certificateHash, endpoint);
    }

    /// @inheritdoc INodeRegistry
    function changeEndpoint(address node, bytes32 certificateHash, string calldata endpoint) external {
        _operated(node);
        _requireReachable(certificateHash, endpoint);
        emit EndpointChanged(node, certificateHash, endpoint);
    }

    /// @inheritdoc INodeRegistry
    function addStake(address node) external payable {
        NodeAccount storage account = _operated(node);
        if (account.exiting) revert WrongStatus(node, NodeStatus.Exiting);
        if (msg.value == 0) revert ZeroAmount();

        // What warmed up longer ago than any open draw can reach back to is plain stake. Anything younger warms again together with
        // the addition: there is one timer, and no draw may ever see stake that was added after its snapshot.
        uint128 warming = block.timestamp >= uint256(account.warmFrom) + thawPeriod ? 0 : account.warming;
        uint128 amount = SafeCastLib.toUint128(msg.value);
        uint64 warmFrom = _now() + activationDelay;
        account.staked += amount;
        account.warming = warming + amount;
        account.warmFrom = warmFrom;
        // Zero is not a time but "not jailed".
        // slither-disable-next-line incorrect-equality
        if (account.jailedUntil == 0) _totalSortitionStake += amount;
        emit StakeAdded(node, amount, account.staked, warmFrom);
    }

    /// @inheritdoc INodeRegistry
    function thaw(address node, uint256 amount) external {
        NodeAccount storage account = _operated(node);
        if (account.exiting) revert WrongStatus(node, NodeStatus.Exiting);
        if (amount == 0) revert ZeroAmount();
        uint256 bonded = account.staked - account.thawing;
        if (amount > bonded) revert ThawExceedsStake(bonded, amount);
        uint256 remaining = bonded - amount;
        if (remaining < _minimumStake) revert StakeBelowMinimum(_minimumStake, remaining);

        // The casts are safe: `amount` and `remaining` are at most `staked`, which is a uint128.
        account.thawing += uint128(amount);
        if (account.warming > remaining) account.warming = uint128(remaining); // STAKE-02
        uint64 thawEnd = _now() + thawPeriod;
        account.thawEnd = thawEnd;
        // slither-disable-next-line incorrect-equality
        if (account.jailedUntil == 0) _totalSortitionStake -= amount;
        emit ThawStarted(node, amount, account.thawing, thawEnd);
    }

    /// @inheritdoc INodeRegistry
    function beginExit(address node) external {
        NodeAccount storage account = _operated(node);
        if (account.exiting) revert WrongStatus(node, NodeStatus.Exiting);

        if (account.jailedUntil == 0) _totalSortitionStake -= account.staked - account.thawing;
        uint64 thawEnd = _now() + thawPeriod;
        account.exiting = true;
        account.thawing = account.staked; // STAKE-03: all of it stays slashable until it is withdrawn
        account.warming = 0;
        account.thawEnd = thawEnd;
        emit ExitStarted(node, thawEnd);
    }

    /// @inheritdoc INodeRegistry
    function withdraw(address node) external nonReentrant {
        NodeAccount storage account = _operated(node);
        bool exiting = account.exiting;
        uint128 amount = account.thawing;
        if (amount == 0 && !exiting) revert NothingToWithdraw(node);
        if (block.timestamp < account.thawEnd) revert ThawNotOver(account.thawEnd, block.timestamp);

        if (exiting) {
            // STAKE-03. It also keeps the account there for as long as anybody has a duty of it to close.
            if (account.openDuties != 0) revert DutiesOpen(node, account.openDuties);
            if (account.jailedUntil > block.timestamp) _barredUntil[node] = account.jailedUntil;
            delete _accounts[node];
            emit StakeWithdrawn(node, msg.sender, amount, 0);
            emit NodeRemoved(node);
        } else {
            account.staked -= amount;
            account.thawing = 0;
            emit StakeWithdrawn(node, msg.sender, amount, account.staked);
        }
        _push(msg.sender, amount);
    }

    /// @inheritdoc INodeRegistry
    function leaveJail(address node) external {
        NodeAccount storage account = _operated(node);
        NodeStatus status = _statusOf(account);
        if (status != NodeStatus.Jailed) revert WrongStatus(node, status);
        uint64 jailedUntil = account.jailedUntil;
        if (block.timestamp < jailedUntil || jailedUntil == _TOMBSTONE) {
            revert StillJailed(node, jailedUntil, block.timestamp);
        }
        uint128 bonded = account.staked - account.thawing;
        if (bonded < _minimumStake) revert StakeBelowMinimum(_minimumStake, bonded);

        account.jailedUntil = 0;
        // A jailed node is in no snapshot, so its whole stake has to warm up again before it counts for a draw.
        account.warming = bonded;
        account.warmFrom = _now() + activationDelay;
        _totalSortitionStake += bonded;
        emit NodeReleased(node);
    }

    /// @inheritdoc INodeRegistry
    function withdrawCredit(address account) external nonReentrant {
        uint256 amount = _credits[account];
        if (amount == 0) revert NothingToWithdraw(account);
        _credits[account] = 0;
        emit CreditWithdrawn(account, amount);
        _push(account, amount);
    }

    // ---------------------------------------------------------------------------------------------------------------------
    //  Verdicts
    // ---------------------------------------------------------------------------------------------------------------------

    /// @inheritdoc INodeRegistry
    function slash(
        address node,
        uint256 amount,
        SlashReason reason,
        address[] calldata recipients,
        uint256[] calldata shares
    ) external onlyVerification returns (uint256 taken) {
        if (recipients.length != shares.length) {
            revert SlashShareOutOfRange(recipients.length, shares.length);
        }
        NodeAccount storage account = _accounts[node];
        taken = amount < account.staked ? amount : account.staked; // STAKE-04
        if (taken == 0) return 0;

        _take(node, account, taken);

        uint256 promised;
        uint256 burned = taken;
        for (uint256 i; i < recipients.length; ++i) {
            promised += shares[i];
            if (promised > amount) revert SlashShareOutOfRange(amount, promised);
            uint256 share = _portion(shares[i], taken, amount);
            burned -= share;
            _credit(recipients[i], share);
        }
        emit NodeSlashed(node, reason, taken, burned, account.staked, account.thawing);
        if (burned != 0) SafeTransferLib.forceSafeTransferETH(_BURN, burned, _TRANSFER_GAS);
    }

    /// @inheritdoc INodeRegistry
    function jail(address node, uint64 until) external onlyVerification {
        NodeAccount storage account = _accounts[node];
        if (account.operator != address(0)) {
            _jail(node, account, until);
        } else if (until > _barredUntil[node]) {
            _barredUntil[node] = until;
            emit NodeJailed(node, until);
        }
    }

    // ---------------------------------------------------------------------------------------------------------------------
    //  Duties
    // ---------------------------------------------------------------------------------------------------------------------

    /// @inheritdoc INodeRegistry
    function openDuty(address node) external onlyDutyKeeper {
        _openDuty(node);
    }

    /// @inheritdoc INodeRegistry
    function openDuties(address[] calldata nodes) external onlyDutyKeeper {
        for (uint256 i; i < nodes.length; ++i) {
            _openDuty(nodes[i]);
        }
    }

    /// @inheritdoc INodeRegistry
    function closeDuty(address node) external onlyDutyKeeper {
        _closeDuty(node);
    }

    /// @inheritdoc INodeRegistry
    function closeDuties(address[] calldata nodes) external onlyDutyKeeper {
        for (uint256 i; i < nodes.length; ++i) {
            _closeDuty(nodes[i]);
        }
    }

    // ---------------------------------------------------------------------------------------------------------------------
    //  Views
    // ---------------------------------------------------------------------------------------------------------------------

    /// @inheritdoc INodeRegistry
    function accountOf(address node) external view returns (NodeAccount memory) {
        return _accounts[node];
    }

    /// @inheritdoc INodeRegistry
    function statusOf(address node) external view returns (NodeStatus) {
        return _statusOf(_accounts[node]);
    }

    /// @inheritdoc INodeRegistry
    function operatorOf(address node) external view returns (address) {
        return _accounts[node].operator;
    }

    /// @inheritdoc INodeRegistry
    function stakeOf(address node) external view returns (uint256) {
        return _accounts[node].staked;
    }

    /// @inheritdoc INodeRegistry
    function creditOf(address account) external view returns (uint256) {
        return _credits[account];
    }

    /// @inheritdoc INodeRegistry
    function sortitionStake(address node, uint256 snapshotTime) external view returns (uint256) {
        NodeAccount storage account = _accounts[node];
        if (_statusOf(account) != NodeStatus.Active || account.activeFrom > snapshotTime) return 0;
        uint256 bonded = account.staked - account.thawing;
        return account.warmFrom > snapshotTime ? bonded - account.warming : bonded;
    }

    /// @inheritdoc INodeRegistry
    function totalSortitionStake() external view returns (uint256) {
        return _totalSortitionStake;
    }

    /// @inheritdoc INodeRegistry
    function minimumStake() external view returns (uint256) {
        return _minimumStake;
    }

    /// @inheritdoc INodeRegistry
    function terms() external view returns (RegistryTerms memory) {
        return RegistryTerms(_minimumStake, activationDelay, thawPeriod);
    }

    // ---------------------------------------------------------------------------------------------------------------------
    //  Inside
    // ---------------------------------------------------------------------------------------------------------------------

    /// @dev Takes `taken` <= staked out of all parts of the account in proportion. Both parts round down, so that
    ///      thawing + warming <= staked holds afterwards too (STAKE-02), and staked - thawing never grows.
    function _take(address node, NodeAccount storage account, uint256 taken) private {
        uint256 staked = account.staked;
        uint256 thawing = account.thawing;
        uint256 left = staked - taken;
        uint256 thawingLeft = _portion(thawing, left, staked);
        // The casts are safe: every part is at most `staked`, which is a uint128.
        account.staked = uint128(left);
        account.thawing = uint128(thawingLeft);
        account.warming = uint128(_portion(account.warming, left, staked));

        if (account.exiting || account.jailedUntil != 0) return;
        _totalSortitionStake -= (staked - thawing) - (left - thawingLeft);
        // Below the minimum nobody serves: the account is out until its operator tops it up and takes it out of jail.
        if (left - thawingLeft < _minimumStake) _jail(node, account, _now());
    }

    function _jail(address node, NodeAccount storage account, uint64 until) private {
        uint64 jailedUntil = account.jailedUntil;
        if (until <= jailedUntil) return;
        if (jailedUntil == 0 && !account.exiting) _totalSortitionStake -= account.staked - account.thawing;
        account.jailedUntil = until;
        emit NodeJailed(node, until);
    }

    function _openDuty(address node) private {
        NodeAccount storage account = _accounts[node];
        if (account.operator == address(0)) revert WrongStatus(node, NodeStatus.Absent);
        uint32 count = account.openDuties + 1;
        account.openDuties = count;
        emit DutyOpened(node, count);
    }

    /// @dev Cannot fail for a duty that was opened: `withdraw` removes no account with open duties. So no node can block a settlement
    ///      by leaving.
    function _closeDuty(address node) private {
        NodeAccount storage account = _accounts[node];
        uint32 left = account.openDuties;
        if (left == 0) revert DutyNotOpen(node);
        --left;
        account.openDuties = left;
        emit DutyClosed(node, left);
    }

    function _credit(address account, uint256 amount) private {
        if (amount == 0) return;
        uint256 credit = _credits[account] + amount;
        _credits[account] = credit;
        emit Credited(account, amount, credit);
    }

    /// @dev A receiver that refuses the money stops nobody but itself.
    function _push(address to, uint256 amount) private {
        if (!SafeTransferLib.trySafeTransferETH(to, amount, _TRANSFER_GAS)) revert TransferFailed(to, amount);
    }

    /// @dev The account of `node` if the caller is its operator.
    function _operated(address node) private view returns (NodeAccount storage account) {
        account = _accounts[node];
        address operator = account.operator;
        if (operator == address(0)) revert WrongStatus(node, NodeStatus.Absent);
        if (operator != msg.sender) revert NotOperator(node, operator, msg.sender);
    }

    function _statusOf(NodeAccount storage account) private view returns (NodeStatus) {
        if (account.operator == address(0)) return NodeStatus.Absent;
        if (account.exiting) return NodeStatus.Exiting;
        if (account.jailedUntil != 0) return NodeStatus.Jailed;
        return block.timestamp < account.activeFrom ? NodeStatus.Pending : NodeStatus.Active;
    }

    function _requireProof(
        address node,
        bytes32 certificateHash,
        string calldata endpoint,
        uint256 deadline,
        bytes calldata proof
    ) private view {
        if (block.timestamp > deadline) revert ProofExpired(deadline, block.timestamp);
        bytes32 digest = _hashTypedData(
            keccak256(
                abi.encode(
                    _NODE_KEY_PROOF_TYPEHASH, msg.sender, node, certificateHash, keccak256(bytes(endpoint)), deadline
                )
            )
        );
        if (!NodeSignature.isSignedBy(digest, proof, node)) revert ProofInvalid(node);
    }

    function _requireReachable(bytes32 certificateHash, string calldata endpoint) private pure {
        if (certificateHash == 0) revert CertificateHashMissing();
        uint256 length = bytes(endpoint).length;
        if (length == 0 || length > _MAXIMUM_ENDPOINT_LENGTH) {
            revert EndpointLengthOutOfRange(_MAXIMUM_ENDPOINT_LENGTH, length);
        }
    }

    function _now() private view returns (uint64) {
        return uint64(block.timestamp); // seconds reach 2^64 in 584 billion years
    }

    /// @dev part * numerator / denominator rounded down; every caller passes values of at most 128 bits.
    function _portion(uint256 part, uint256 numerator, uint256 denominator) private pure returns (uint256) {
        return part * numerator / denominator;
    }

    function _domainNameAndVersion() internal pure override returns (string memory name, string memory version) {
        return ("bsns NodeRegistry", "1");
    }
}
