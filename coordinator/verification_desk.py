"""What every open request needs next so that it comes to its end: a pure function from what the chain shows to wanted
intents.

Owns the permissionless duties that nobody else is bound to do: drawing the committee without the requester's secret
once it is late, tallying each stage by the medoid with the most support, settling after the challenge window,
claiming the refund of an expired request. Promises that equal views want equal intents under equal keys (request,
round, stage), so that repeating it is harmless. Judges nothing: the contract counts again and refuses what is not so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bsns.protocol.commitments import vote_weight
from bsns.protocol.contract_states import Phase, RequestStatus
from bsns.protocol.identifiers import ZERO_HASH, RequestId
from bsns.protocol.sketch import member_distance
from coordinator.network_state import AttestationState, RequestState
from coordinator.storage import Intent


@dataclass(frozen=True, slots=True)
class VerificationRules:
    """The deployment's terms that the tally depends on."""

    tolerance: int
    minimum_reveals: int
    committee_seats: int

    @classmethod
    def from_terms(cls, terms: Any) -> VerificationRules:
        """From OutputVerification.terms()."""
        return cls(int(terms.tolerance), int(terms.minimumReveals), int(terms.committeeSeats))


@dataclass(frozen=True, slots=True)
class VerificationView:
    """What OutputVerification.verificationOf says now, and which stages are before a committee
    (stageRecordOf.disputed).
    """

    phase: Phase
    round: int
    sampled: bool
    entropy_block: int
    secret_deadline: int
    attest_deadline: int
    reveal_deadline: int
    challenge_deadline: int
    disputed: tuple[bool, ...] = ()

    @classmethod
    def from_struct(cls, verification: Any, disputed: tuple[bool, ...] = ()) -> VerificationView:
        """From the decoded struct."""
        return cls(
            phase=Phase(int(verification.phase)),
            round=int(verification.round),
            sampled=bool(verification.sampled),
            entropy_block=int(verification.entropyBlock),
            secret_deadline=int(verification.secretDeadline),
            attest_deadline=int(verification.attestDeadline),
            reveal_deadline=int(verification.revealDeadline),
            challenge_deadline=int(verification.challengeDeadline),
            disputed=disputed,
        )

    @property
    def has_committee(self) -> bool:
        """Whether members judge in this round: always from round 2 on, in round 1 if the request was sampled."""
        return self.sampled or self.round > 1


def wanted_intents(
    request: RequestState, view: VerificationView | None, rules: VerificationRules, *, now: int, head_number: int
) -> tuple[Intent, ...]:
    """What to send for `request` at Unix second `now`, after block `head_number`. `view` is None before all stages
    committed.
    """
    if request.status.is_finished or request.concluded:
        return ()
    if now > request.deadline:
        # Past its deadline the escrow takes no verdict any more: only the refund is left.
        return (
            _intent(request.request_id, "claimRefund", f"claimRefund/{_hex(request.request_id)}", "InferenceEscrow"),
        )
    if view is None or request.status not in (RequestStatus.COMMITTED, RequestStatus.VERIFIED):
        return ()
    match view.phase:
        case Phase.AWAITING_DRAW:
            return _draw(request, view, now, head_number)
        case Phase.REVEALING:
            return _tallies(request, view, rules, now)
        case Phase.CHALLENGEABLE if now > view.challenge_deadline:
            key = f"settle/{_hex(request.request_id)}/{view.round}"
            return (_intent(request.request_id, "settle", key, "OutputVerification"),)
        case _:
            return ()


def best_medoid(members: tuple[AttestationState, ...], rules: VerificationRules, snapshot_stake: int) -> int | None:
    """Index of the revealed member whose sketch the most votes support by weight, if that is a quorum; ties to the
    first.
    """
    revealed = [(index, member) for index, member in enumerate(members) if member.reveal is not None]
    if len(revealed) < rules.minimum_reveals:
        return None
    weights = [vote_weight(member.round, member.stake, snapshot_stake, rules.committee_seats) for _, member in revealed]
    total = sum(weights)
    best: tuple[int, int] | None = None
    for index, member in revealed:
        support = sum(
            weight
            for weight, (_, other) in zip(weights, revealed, strict=True)
            if _agree(member, other, rules.tolerance)
        )
        if best is None or support > best[0]:
            best = support, index
    if best is None or best[0] * 3 < total * 2:
        return None
    return best[1]


def _agree(a: AttestationState, b: AttestationState, tolerance: int) -> bool:
    if a.reveal is None or b.reveal is None:
        return False
    if a.reveal.output_tokens != b.reveal.output_tokens:
        return False
    return member_distance(a.reveal.sketches, b.reveal.sketches) <= tolerance


def _draw(request: RequestState, view: VerificationView, now: int, head_number: int) -> tuple[Intent, ...]:
    if now <= view.secret_deadline or head_number < view.entropy_block:
        return ()
    # A draw that comes too late only renews the entropy block, and is wanted again for the new one.
    key = f"drawCommittee/{_hex(request.request_id)}/{view.entropy_block}"
    return (_intent(request.request_id, "drawCommittee", key, "OutputVerification", ZERO_HASH),)


def _tallies(request: RequestState, view: VerificationView, rules: VerificationRules, now: int) -> tuple[Intent, ...]:
    late = now > view.reveal_deadline
    intents = []
    for stage in request.stages:
        if view.has_committee and not (stage.stage < len(view.disputed) and view.disputed[stage.stage]):
            continue
        if request.tally(view.round, stage.stage) is not None:
            continue
        members = request.members(view.round, stage.stage)
        complete = stage.reveal is not None and all(member.reveal is not None for member in members)
        if not (complete or late):
            continue
        key = f"tally/{_hex(request.request_id)}/{view.round}/{stage.stage}"
        if not view.has_committee or stage.reveal is None:
            # Nothing to choose: accepted, or withheld.
            intents.append(_intent(request.request_id, "tally", key, "OutputVerification", stage.stage, 0))
            continue
        medoid = best_medoid(members, rules, request.snapshot_stake)
        if medoid is None:
            intents.append(_intent(request.request_id, "tallyWithoutQuorum", key, "OutputVerification", stage.stage))
        else:
            intents.append(_intent(request.request_id, "tally", key, "OutputVerification", stage.stage, medoid))
    return tuple(intents)


def _intent(request: RequestId, function: str, key: str, contract: str, *arguments: object) -> Intent:
    return Intent(key, contract, function, (bytes(request), *arguments))


def _hex(request: RequestId) -> str:
    return "0x" + request.hex()
