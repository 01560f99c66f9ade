// SPDX-License-Identifier: Apache-2.0
pragma solidity 0.8.30;

/// @title Distance of two distribution sketches
/// @notice A sketch is 32 coordinates of one byte on a circle of 256. The distance is the circular L1 norm, at most 32 * 128 = 4096.
/// @dev Sixteen coordinates at a time in lanes of 16 bits: a few hundred gas instead of thousands for a loop over bytes.
library DistributionSketch {
    /// @dev One in each lane.
    uint256 private constant _ONES = 0x0001000100010001000100010001000100010001000100010001000100010001;

    /// @notice Sum over the coordinates of min(|a - b|, 256 - |a - b|).
    function distance(bytes32 a, bytes32 b) internal pure returns (uint256 sum) {
        uint256 ones = _ONES;
        // No lane ever borrows from or carries into its neighbour: each value below stays within 0..511. The product wraps on purpose:
        // its top lane is the sum of all sixteen lanes, at most 16 * 128.
        unchecked {
            uint256 low = ones * 0xff;
            // The bytes in the low halves of the lanes, then those in the high halves.
            for (uint256 shift; shift <= 8; shift += 8) {
                uint256 forward = (((uint256(a) >> shift) & low) + (ones << 8) - ((uint256(b) >> shift) & low)) & low;
                uint256 backward = (ones << 8) - forward;
                // All nine bits set in the lanes where the way forward is longer than 128.
                uint256 longer = (((forward + ones * 127) >> 8) & ones) * 0x1ff;
                sum += (((forward & ~longer) | (backward & longer)) * ones) >> 240;
            }
        }
    }
}
