// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

import {console} from "forge-std/console.sol";

import {NodeAccount, NodeStatus, SlashReason} from "../../../contracts/interfaces/INodeRegistry.sol";
import {ForcedMoney} from "../Recipients.sol";
import {Swarm} from "../Swarm.sol";

/// @notice The stake account alone, against a ledger of ten lines: operators, verdicts and duties in any order, by six nodes.
/// @dev OutputVerification and InferenceEscrow are played by pranks, so that verdicts come at times at which no request would bring them.
contract RegistryInvariantTest is Swarm {
    enum Action {
        Register,
        ChangeEndpoint,
        AddStake,
        Thaw,
        Withdraw,
        BeginExit,
        Leave,
        LeaveJail,
        Slash,
        Jail,
        OpenDuty,
        CloseDuty,
        WithdrawCredit,
        ForceMoney,
        Wait
    }

    uint256 private constant ACTIONS = 15;
    uint256 private constant NODES = 6;
    /// Steps of a run, as foundry.toml has it; after the free ones, actions never performed yet come first.
    uint256 private constant RUN = 64;
    uint256 private constant FREE_STEPS = 40;
    address private constant BURN = 0x000000000000000000000000000000000000dEaD;

    uint256[ACTIONS] private _counts;
    uint256 private _steps;
    uint256 private _clock;
    uint256 private _height;
    uint256 private _paidIn;
    uint256 private _paidOut;
    uint256 private _burned;
    uint256 private _forced;
    /// The model: stake of each node after every act so far.
    mapping(uint256 node => uint256) private _staked;
    mapping(uint256 node => uint256) private _duties;
    mapping(uint256 node => uint256) private _barredUntil;

    function setUp() public {
        _deployNetwork();
        for (uint256 i = 0; i < NODES; i++) {
            _know(i);
        }
        (_clock, _height) = (block.timestamp, block.number);
        targetContract(address(this));
        bytes4[] memory selectors = new bytes4[](1);
        selectors[0] = this.step.selector;
        targetSelector(FuzzSelector(address(this), selectors));
    }

    /// forge-config: default.invariant.fail-on-revert = true
    /// forge-config: default.invariant.shrink-run-limit = 200
    function invariant_STAKE_registry() public view {
        uint256 owed;
        uint256 sortition;
        uint256 serving;
        for (uint256 i = 0; i < NODES; i++) {
            NodeAccount memory account = registry.accountOf(_hot(i));
            assertEq(account.staked, _staked[i], "STAKE-04: only its own acts and its own slashes move a stake");
            assertLe(uint256(account.thawing) + account.warming, account.staked, "STAKE-02");
            assertEq(account.openDuties, _duties[i], "duties");
            if (_duties[i] > 0) assertEq(account.operator, _operator(i), "STAKE-03: a node with duties cannot vanish");
            owed += account.staked + registry.creditOf(_operator(i));
            sortition += registry.sortitionStake(_hot(i), _clock);
            NodeStatus status = registry.statusOf(_hot(i));
            if (status == NodeStatus.Active || status == NodeStatus.Pending) {
                serving += account.staked - account.thawing;
            }
        }
        assertEq(address(registry).balance, owed + _forced, "STAKE-01");
        assertEq(_paidIn, owed + _paidOut + _burned, "every wei is somewhere");
        assertEq(registry.totalSortitionStake(), serving, "the denominator of the draw");
        assertLe(sortition, serving);
    }

    /// @dev A run in which an action was never performed fails. What is shorter than a run is the replay of a shrunk failure.
    function afterInvariant() public view {
        if (_steps < RUN) return;
        for (uint256 i = 0; i < ACTIONS; i++) {
            assertGt(_counts[i], 0, string.concat("action never performed: ", vm.toString(i)));
            console.log("action", i, _counts[i]);
        }
    }

    function test_handler_performsEveryActionInARun() public {
        for (uint256 i = 0; i < RUN; i++) {
            this.step(uint256(keccak256(abi.encode(i))));
        }
        afterInvariant();
    }

    function step(uint256 seed) external {
        vm.warp(_clock);
        vm.roll(_height);
        Action action = Action(seed % ACTIONS);
        if (++_steps > FREE_STEPS) {
            for (uint256 i = 0; i < ACTIONS; i++) {
                if (_counts[i] == 0) action = Action(i);
            }
        }
        _perform(action, (seed >> 8) % NODES, seed >> 16);
        _counts[uint256(action)]++;
        (_clock, _height) = (block.timestamp, block.number);
    }

    function _perform(Action action, uint256 i, uint256 seed) private {
        if (action == Action.Register) _register(i, seed);
        else if (action == Action.Wait) vm.warp(block.timestamp + seed % 2 days);
        else if (action == Action.ForceMoney) _forceMoney(1 + seed % 1 ether);
        else if (action == Action.WithdrawCredit) _withdrawCredit(seed);
        else if (action == Action.Slash) _slash(_serving(i), seed);
        else if (action == Action.Jail) _jail(_serving(i), seed);
        else if (action == Action.OpenDuty) _duty(_present(i), true);
        else if (action == Action.CloseDuty) _closeDuty(i);
        else if (action == Action.ChangeEndpoint) _changeEndpoint(_present(i));
        else if (action == Action.AddStake) _addStake(_serving(i), 1 + seed % 5 ether);
        else if (action == Action.Thaw) _thaw(_serving(i), 1 + seed % 2 ether);
        else if (action == Action.Withdraw) _withdrawThawed(_serving(i));
        else if (action == Action.BeginExit) _beginExit(_serving(i));
        else if (action == Action.Leave) _leave(_present(i));
        else _leaveJail(_serving(i));
    }

    // ------------------------------------------------------------------------------------------- a node of the right kind

    /// @dev A node that is there: the asked one, or one registered now.
    function _present(uint256 i) private returns (uint256) {
        if (registry.statusOf(_hot(i)) == NodeStatus.Absent) _join(i, 5 ether);
        return i;
    }

    /// @dev A node that is there and not on its way out.
    function _serving(uint256 i) private returns (uint256) {
        if (registry.statusOf(_hot(i)) == NodeStatus.Exiting) _leave(i);
        return _present(i);
    }

    /// @dev A jail term outlives the account: whoever left in jail waits for its end.
    function _join(uint256 i, uint256 stake) private {
        if (block.timestamp < _barredUntil[i]) vm.warp(_barredUntil[i]);
        _addNode(i, stake);
        _paidIn += stake;
        _staked[i] += stake;
    }

    // ------------------------------------------------------------------------------------------------------------- acts

    function _register(uint256 i, uint256 seed) private {
        if (registry.statusOf(_hot(i)) != NodeStatus.Absent) _leave(i);
        _join(i, 1 ether + seed % 10 ether);
    }

    function _changeEndpoint(uint256 i) private {
        vm.prank(_operator(i));
        registry.changeEndpoint(_hot(i), "next", HOST);
    }

    function _addStake(uint256 i, uint256 amount) private {
        vm.deal(_operator(i), _operator(i).balance + amount);
        vm.prank(_operator(i));
        registry.addStake{value: amount}(_hot(i));
        _paidIn += amount;
        _staked[i] += amount;
    }

    function _thaw(uint256 i, uint256 amount) private {
        NodeAccount memory account = registry.accountOf(_hot(i));
        if (account.staked - account.thawing < amount + 1 ether) _addStake(i, amount + 1 ether);
        vm.prank(_operator(i));
        registry.thaw(_hot(i), amount);
    }

    function _withdrawThawed(uint256 i) private {
        if (registry.accountOf(_hot(i)).thawing == 0) _thaw(i, 1 ether);
        NodeAccount memory account = registry.accountOf(_hot(i));
        if (block.timestamp < account.thawEnd) vm.warp(account.thawEnd);
        _takeOut(i, account.thawing);
    }

    function _beginExit(uint256 i) private {
        vm.prank(_operator(i));
        registry.beginExit(_hot(i));
        assertEq(registry.accountOf(_hot(i)).thawing, _staked[i]);
    }

    /// @dev Out of the registry by the regular way, once its duties are closed.
    function _leave(uint256 i) private {
        if (registry.statusOf(_hot(i)) != NodeStatus.Exiting) _beginExit(i);
        uint256 thawEnd = registry.accountOf(_hot(i)).thawEnd;
        if (block.timestamp < thawEnd) vm.warp(thawEnd);
        while (_duties[i] > 0) {
            vm.prank(_operator(i));
            (bool left,) = address(registry).call(abi.encodeCall(registry.withdraw, (_hot(i))));
            assertFalse(left, "STAKE-03: left with a duty open");
            _duty(i, false);
        }
        _barredUntil[i] = registry.accountOf(_hot(i)).jailedUntil;
        _takeOut(i, _staked[i]);
        assertEq(uint8(registry.statusOf(_hot(i))), uint8(NodeStatus.Absent));
    }

    function _takeOut(uint256 i, uint256 amount) private {
        uint256 before = _operator(i).balance;
        vm.prank(_operator(i));
        registry.withdraw(_hot(i));
        assertEq(_operator(i).balance - before, amount, "exactly what thawed");
        _paidOut += amount;
        _staked[i] -= amount;
    }

    function _jail(uint256 i, uint256 seed) private {
        uint256 term = registry.accountOf(_hot(i)).jailedUntil;
        vm.prank(address(verification));
        registry.jail(_hot(i), uint64(block.timestamp + 1 + seed % 2 days));
        assertGe(registry.accountOf(_hot(i)).jailedUntil, term, "a term is never shortened");
    }

    function _leaveJail(uint256 i) private {
        if (registry.statusOf(_hot(i)) != NodeStatus.Jailed) _jail(i, i);
        NodeAccount memory account = registry.accountOf(_hot(i));
        if (account.staked - account.thawing < 1 ether) _addStake(i, 1 ether);
        if (block.timestamp < account.jailedUntil) vm.warp(account.jailedUntil);
        vm.prank(_operator(i));
        registry.leaveJail(_hot(i));
    }

    /// @dev Of an exiting node too, now and then, and of all its stake.
    function _slash(uint256 i, uint256 seed) private {
        if (seed % 4 == 0) _beginExit(i);
        _slashFor(i, seed % 3 == 0 ? type(uint96).max : 1 + seed % 3 ether, seed % NODES);
    }

    function _slashFor(uint256 i, uint256 amount, uint256 rewarded) private {
        address[] memory recipients = new address[](2);
        uint256[] memory shares = new uint256[](2);
        (recipients[0], recipients[1]) = (_operator(rewarded), _operator((rewarded + 1) % NODES));
        (shares[0], shares[1]) = (amount / 3, amount / 7);
        uint256 burned = BURN.balance;
        vm.prank(address(verification));
        uint256 taken = registry.slash(_hot(i), amount, SlashReason.IncorrectOutput, recipients, shares);
        assertLe(taken, _staked[i], "STAKE-04");
        _staked[i] -= taken;
        _burned += BURN.balance - burned;
    }

    function _duty(uint256 i, bool opens) private {
        vm.prank(i % 2 == 0 ? address(escrow) : address(verification));
        if (opens) {
            registry.openDuty(_hot(i));
            _duties[i]++;
        } else {
            registry.closeDuty(_hot(i));
            _duties[i]--;
        }
    }

    function _closeDuty(uint256 i) private {
        if (_duties[i] == 0) _duty(_present(i), true);
        _duty(i, false);
    }

    function _withdrawCredit(uint256 seed) private {
        uint256 i = seed % NODES;
        if (registry.creditOf(_operator(i)) == 0) {
            uint256 other = _serving((i + 1) % NODES);
            if (_staked[other] < 1 ether) _addStake(other, 1 ether);
            _slashFor(other, 1 ether, i);
        }
        uint256 credit = registry.creditOf(_operator(i));
        uint256 before = _operator(i).balance;
        registry.withdrawCredit(_operator(i));
        assertEq(_operator(i).balance - before, credit);
        _paidOut += credit;
    }

    function _forceMoney(uint256 amount) private {
        vm.deal(address(this), amount);
        new ForcedMoney().send{value: amount}(address(registry));
        _forced += amount;
    }
}
