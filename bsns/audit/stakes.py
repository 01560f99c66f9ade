"""Stakes folded from the registry's events: what NodeRegistry.sortitionStake answered at some log in the past.

Needs no archive node, which most chains prune away; the events are kept for ever. Promises the numbers of
NodeRegistry.sol at any position between two logs; raises nothing: events of nodes it has not seen are a gap in the
history, which the caller sees by the totals. Does not fetch anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class _Account:
    operator: str
    staked: int
    active_from: int
    thawing: int = 0
    warming: int = 0
    warm_from: int = 0
    jailed_until: int = 0
    exiting: bool = False

    @property
    def bonded(self) -> int:
        return self.staked - self.thawing

    @property
    def counts(self) -> bool:
        return not self.exiting and self.jailed_until == 0


@dataclass(slots=True)
class StakeLedger:
    """State of all accounts after the events applied so far. `activation_delay` and `thaw_period` are the registry's
    terms, in seconds.
    """

    activation_delay: int
    thaw_period: int
    _accounts: dict[str, _Account] = field(default_factory=dict)

    def apply(self, name: str, arguments: Mapping[str, Any], timestamp: int) -> None:
        """Fold the next registry event in. `timestamp` is of its block (only NodeReleased needs it). Others are
        ignored.
        """
        if name == "NodeRegistered":
            self._accounts[arguments["node"]] = _Account(
                str(arguments["operator"]), int(arguments["staked"]), int(arguments["activeFrom"])
            )
            return
        account = self._accounts.get(str(arguments.get("node")))
        if account is None:
            return
        match name:
            case "StakeAdded":
                # What warmed up longer ago than a dispute can last is plain stake; anything younger warms again with
                # it.
                if int(arguments["warmFrom"]) - self.activation_delay >= account.warm_from + self.thaw_period:
                    account.warming = 0
                account.staked = int(arguments["staked"])
                account.warming += int(arguments["amount"])
                account.warm_from = int(arguments["warmFrom"])
            case "ThawStarted":
                account.thawing = int(arguments["thawing"])
                account.warming = min(account.warming, account.bonded)
            case "ExitStarted":
                account.exiting, account.thawing, account.warming = True, account.staked, 0
            case "StakeWithdrawn":
                account.staked, account.thawing = int(arguments["staked"]), 0
            case "NodeRemoved":
                del self._accounts[str(arguments["node"])]
            case "NodeSlashed":
                staked = int(arguments["staked"])
                account.warming = account.warming * staked // (staked + int(arguments["amount"]))
                account.staked, account.thawing = staked, int(arguments["thawing"])
            case "NodeJailed":
                account.jailed_until = int(arguments["jailedUntil"])
            case "NodeReleased":
                account.jailed_until = 0
                account.warming, account.warm_from = account.bonded, timestamp + self.activation_delay
            case _:
                return

    def operator(self, node: str) -> str | None:
        """Operator of a node, None if it has no account."""
        account = self._accounts.get(node)
        return account.operator if account else None

    def staked(self, node: str) -> int:
        """Everything at stake, whatever it counts for; 0 without an account."""
        account = self._accounts.get(node)
        return account.staked if account else 0

    def active_nodes(self, now: int) -> tuple[str, ...]:
        """Nodes that the registry called Active at time `now`, in the order of their registration."""
        return tuple(node for node, item in self._accounts.items() if item.counts and now >= item.active_from)

    def sortition_stake(self, node: str, snapshot_time: int, now: int) -> int:
        """What counts for a draw with that snapshot, asked at time `now`; 0 unless Active then and at the snapshot."""
        account = self._accounts.get(node)
        if account is None or not account.counts or now < account.active_from or account.active_from > snapshot_time:
            return 0
        return account.bonded - account.warming if account.warm_from > snapshot_time else account.bonded

    def total_sortition_stake(self) -> int:
        """Denominator of a draw: staked - thawing over all accounts that are neither jailed nor exiting."""
        return sum(account.bonded for account in self._accounts.values() if account.counts)
