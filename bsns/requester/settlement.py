"""What a requester does on chain between the last commitment and the money: draw the committee, and finish what
nobody else finishes.

The draw needs the requester's secret; tallies and settlement need nobody's permission, and the coordinator's desk
normally sends them. If it does not within a grace period this module does, so that a requester never depends on the
coordinator. Promises to return only at an end: settled, refunded or expired. Does not wait longer than it is told.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from bsns.chain.client import ChainClient, Receipt
from bsns.chain.errors import ContractError, TransactionFailedError
from bsns.chain.submitter import Submitter
from bsns.protocol.contract_states import Phase, RequestStatus
from bsns.protocol.identifiers import RequestId
from bsns.protocol.sketch import member_distance
from bsns.requester.errors import UnavailableError

POLL_INTERVAL_S: Final = 0.25
# Somebody else was faster, or the chain is not there yet: look again.
_OVERTAKEN: Final = frozenset(
    {
        "AlreadyTallied",
        "DeadlineNotPassed",
        "EntropyNotReady",
        "MedoidWithoutQuorum",
        "QuorumExists",
        "RevealsOutstanding",
        "StageNotDisputed",
        "WrongPhase",
        "WrongRequestStatus",
    }
)


@dataclass(frozen=True, slots=True)
class Standing:
    """Where a request stands. `deadline` is of the status, Unix seconds of the chain's clock `now`."""

    status: RequestStatus
    deadline: int
    deposit: int
    now: int


class Settlement:
    """Follows one request to its end."""

    def __init__(
        self,
        client: ChainClient,
        submitter: Submitter,
        request_id: RequestId,
        report: Callable[[str], None],
        sent: Callable[[str, Receipt], None],
    ) -> None:
        self._client = client
        self._submitter = submitter
        self._request_id = request_id
        self._report = report
        self._sent = sent

    async def standing(self) -> Standing:
        """The request as the chain sees it now."""
        request = await self._client.call("InferenceEscrow", "requestOf", self._request_id)
        head = await self._client.head()
        return Standing(RequestStatus(request.status), int(request.deadline), int(request.deposit), head.timestamp)

    async def wait_until_not(self, status: RequestStatus) -> Standing:
        """Wait while the request is in `status`; the chain's own deadline for that status ends it with EXPIRED."""
        while True:
            found = await self.standing()
            if found.status != status:
                return found
            await asyncio.sleep(POLL_INTERVAL_S)

    async def draw(self, secret: bytes) -> None:
        """Draw the committee with the secret, once the entropy block is there; returns when anybody has drawn it."""
        announced = 0
        while True:
            verification = await self._client.call("OutputVerification", "verificationOf", self._request_id)
            if Phase(verification.phase) != Phase.AWAITING_DRAW or (await self.standing()).status.is_over:
                return
            head = await self._client.head()
            if head.number > verification.entropyBlock:
                await self._attempt("draw", "drawCommittee", self._request_id, secret)
            elif verification.entropyBlock != announced:
                announced = verification.entropyBlock
                self._report(f"waiting for block {announced}, whose hash draws the committee")
            await asyncio.sleep(POLL_INTERVAL_S)

    async def finish(self, secret: bytes, *, grace_s: float, timeout_s: float) -> Standing:
        """Wait until the request is over. What nobody does within `grace_s` of its time is done here.

        UnavailableError after `timeout_s`; the request can then be taken up again.
        """
        limit = time.monotonic() + timeout_s
        overdue_since: float | None = None
        phase: Phase | None = None
        while True:
            found = await self.standing()
            if found.status.is_over:
                return found
            verification = await self._client.call("OutputVerification", "verificationOf", self._request_id)
            if (now := Phase(verification.phase)) != phase:
                phase = now
                self._report(_PHASE_TEXT[phase])
            step = await self._overdue_step(phase, verification, found.now, secret)
            if step is None:
                overdue_since = None
            elif overdue_since is None:
                overdue_since = time.monotonic()
            elif time.monotonic() - overdue_since >= grace_s:
                await step()
                overdue_since = None
            if time.monotonic() > limit:
                raise UnavailableError(
                    f"request 0x{self._request_id.hex()} is not settled after {timeout_s:.0f} s; "
                    f"go on with `bsns requests --resume 0x{self._request_id.hex()}`"
                )
            await asyncio.sleep(POLL_INTERVAL_S)

    async def look(self, secret: bytes) -> None:
        """Do what anybody could do now, once."""
        verification = await self._client.call("OutputVerification", "verificationOf", self._request_id)
        now = (await self.standing()).now
        step = await self._overdue_step(Phase(verification.phase), verification, now, secret)
        if step is not None:
            await step()

    async def _overdue_step(
        self, phase: Phase, verification: Any, now: int, secret: bytes
    ) -> Callable[[], Awaitable[None]] | None:
        """What anybody could do now, or None while it is not time."""
        match phase:
            case Phase.AWAITING_DRAW:
                return lambda: self.draw(secret)
            case Phase.REVEALING if now > verification.revealDeadline:
                return lambda: self._tally_all(verification)
            case Phase.CHALLENGEABLE if now > verification.challengeDeadline:
                return lambda: self._attempt("settle", "settle", self._request_id)
            case _:
                return None

    async def _tally_all(self, verification: Any) -> None:
        for stage in range(verification.stageCount):
            current = await self._client.call("OutputVerification", "verificationOf", self._request_id)
            if current.round != verification.round or Phase(current.phase) != Phase.REVEALING:
                return
            unsampled = verification.round == 1 and not verification.sampled
            record = await self._client.call("OutputVerification", "stageRecordOf", self._request_id, stage)
            if not unsampled and not record.disputed:
                continue
            # Without a committee, or for an executor that revealed nothing, the medoid is ignored.
            medoid = 0 if unsampled or not record.revealed else await self._best_medoid(verification.round, stage)
            if medoid is None:
                await self._attempt("tally", "tallyWithoutQuorum", self._request_id, stage)
            else:
                await self._attempt("tally", "tally", self._request_id, stage, medoid)

    async def _best_medoid(self, round_: int, stage: int) -> int | None:
        """Index of the member whose sketch the most revealed stake supports; None if that is less than two thirds."""
        terms = await self._client.call("OutputVerification", "terms")
        members = await self._client.call("OutputVerification", "membersOf", self._request_id, round_, stage)
        attestations = [
            await self._client.call("OutputVerification", "attestationOf", self._request_id, round_, stage, member)
            for member in members
        ]
        revealed = [(index, item) for index, item in enumerate(attestations) if item.revealed]
        total = sum(item.stake for _, item in revealed)
        if len(revealed) < terms.minimumReveals:
            return None
        best: tuple[int, int] | None = None
        for index, medoid in revealed:
            support = sum(
                item.stake
                for _, item in revealed
                if item.outputTokens == medoid.outputTokens
                and member_distance((item.sketch, item.innerSketch), (medoid.sketch, medoid.innerSketch))
                <= terms.tolerance
            )
            if best is None or support > best[0]:
                best = (support, index)
        return best[1] if best is not None and best[0] * 3 >= total * 2 else None

    async def _attempt(self, name: str, function: str, *arguments: Any) -> None:
        """Submit; that somebody else did it first is fine."""
        try:
            receipt = await self._submitter.submit("OutputVerification", function, *arguments)
        except ContractError as error:
            if error.name not in _OVERTAKEN:
                raise
            return
        except TransactionFailedError:
            # Another transaction of the same block was first; the next look at the chain decides.
            return
        self._sent(name, receipt)


_PHASE_TEXT: Final[Mapping[Phase, str]] = {
    Phase.COMMITTING: "the nodes commit to what they computed",
    Phase.AWAITING_DRAW: "all stages have committed; the committee is drawn",
    Phase.ATTESTING: "the committee computes the stages again",
    Phase.REVEALING: "commitments are opened and compared",
    Phase.CHALLENGEABLE: "a verdict stands; it can be challenged for a while",
    Phase.FINAL: "the verdict is final",
}
