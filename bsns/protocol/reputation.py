"""Reputation: how a node's kept and failed duties add up to one number, the same for whoever reads the chain.

Owns the orchestrated rule of paper §1.17, `R' = R · Pen^M · Rew^(1−M)` with M = 1 for a failed duty, its constants and
its bounds. Promises that the number depends on the order and outcome of duties alone. Does not know where duties come
from (`coordinator.dispatch.node_standing`) and moves no money.
"""

from __future__ import annotations

import math
from typing import Final

INITIAL: Final = 1.0
REWARD: Final = 1.01
PENALTY: Final = 0.8
MINIMUM: Final = 0.1
MAXIMUM: Final = 10.0
BREAK_EVEN_FAILURE_SHARE: Final = math.log(REWARD) / (math.log(REWARD) - math.log(PENALTY))
"""A node that fails this share of its duties (4.27 %) keeps its reputation in the long run."""


def after_duty(reputation: float, kept: bool) -> float:
    """Reputation in [MINIMUM, MAXIMUM] after one more duty."""
    return min(MAXIMUM, max(MINIMUM, reputation * (REWARD if kept else PENALTY)))


__all__ = ["BREAK_EVEN_FAILURE_SHARE", "INITIAL", "MAXIMUM", "MINIMUM", "PENALTY", "REWARD", "after_duty"]
