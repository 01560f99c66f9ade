// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

/// @dev Accounts that misbehave when they are paid.

/// @notice Takes no money while `closed`.
contract Refuser {
    error Refused();

    bool public closed = true;

    receive() external payable {
        if (closed) revert Refused();
    }

    function open() external {
        closed = false;
    }
}

/// @notice Calls back into the payer with whatever it was told to, as often as it is paid.
contract Reenterer {
    address private _target;
    bytes private _call;
    uint256 public attempts;
    uint256 public successes;

    function arm(address target, bytes calldata call_) external {
        _target = target;
        _call = call_;
    }

    function perform(address target, bytes calldata call_, uint256 value) external {
        (bool ok, bytes memory reason) = target.call{value: value}(call_);
        if (!ok) {
            assembly ("memory-safe") {
                revert(add(reason, 32), mload(reason))
            }
        }
    }

    receive() external payable {
        if (_target == address(0)) return;
        attempts++;
        (bool ok,) = _target.call(_call);
        if (ok) successes++;
    }
}

/// @notice Answers a payment with a megabyte of return data; who copies it pays for it.
contract ReturnDataBomb {
    bool private immutable _REVERTS;

    constructor(bool reverts) {
        _REVERTS = reverts;
    }

    receive() external payable {
        bool reverts = _REVERTS;
        assembly ("memory-safe") {
            switch reverts
            case 0 { return(0, 1000000) }
            default { revert(0, 1000000) }
        }
    }
}

/// @notice Burns all gas it is given.
contract GasBurner {
    uint256 private _counter;

    receive() external payable {
        while (true) _counter++;
    }
}

/// @notice Forces money on an account without calling it.
contract ForcedMoney {
    error CreationFailed();

    /// @dev Creates a contract whose whole code is PUSH20 target, SELFDESTRUCT.
    function send(address target) external payable {
        bytes memory code = abi.encodePacked(hex"73", target, hex"ff");
        address created;
        assembly ("memory-safe") {
            created := create(callvalue(), add(code, 32), mload(code))
        }
        if (created == address(0)) revert CreationFailed();
    }
}
