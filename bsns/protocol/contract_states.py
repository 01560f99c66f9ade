"""The states that the contracts name by number, in the order of the Solidity enums (a test compares them)."""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from typing import Final


class NodeStatus(IntEnum):
    """INodeRegistry.NodeStatus."""

    ABSENT = 0
    PENDING = 1
    ACTIVE = 2
    JAILED = 3
    EXITING = 4


class RequestStatus(IntEnum):
    """IInferenceEscrow.RequestStatus; `EXPIRED` follows from time and is never stored."""

    ABSENT = 0
    OPEN = 1
    ROUTED = 2
    COMMITTED = 3
    VERIFIED = 4
    SETTLED = 5
    EXPIRED = 6
    REFUNDED = 7

    @property
    def is_finished(self) -> bool:
        """Whether nothing can change any more."""
        return self in (RequestStatus.SETTLED, RequestStatus.REFUNDED)

    @property
    def is_over(self) -> bool:
        """Whether nobody works on the request any more: finished, or only its refund is left to be claimed."""
        return self.is_finished or self is RequestStatus.EXPIRED


STATUS_AFTER: Final[Mapping[str, RequestStatus]] = {
    "RequestOpened": RequestStatus.OPEN,
    "RequestRouted": RequestStatus.ROUTED,
    "RequestCommitted": RequestStatus.COMMITTED,
    "RequestVerified": RequestStatus.VERIFIED,
    "RequestSettled": RequestStatus.SETTLED,
    "RequestRefunded": RequestStatus.REFUNDED,
}
"""The status that a request has after an event of the escrow."""


class Phase(IntEnum):
    """IOutputVerification.Phase."""

    COMMITTING = 0
    AWAITING_DRAW = 1
    ATTESTING = 2
    REVEALING = 3
    CHALLENGEABLE = 4
    FINAL = 5


class StageVerdict(IntEnum):
    """IOutputVerification.StageVerdict."""

    NONE = 0
    ACCEPTED = 1
    TOLERATED = 2
    REJECTED = 3
    NO_QUORUM = 4
    WITHHELD = 5


SLASH_REASONS: Final = ("IncorrectOutput", "IncorrectAttestation", "EvidenceWithheld", "RevealWithheld", "Equivocation")
"""INodeRegistry.SlashReason, by number."""
