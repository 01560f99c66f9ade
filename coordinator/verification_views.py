"""What OutputVerification says of each open request, asked again only where it can have changed.

Owns what was answered last. Everything in a view changes with an event of its request, so that an equal request has an
equal view, but for one thing: attesting ends with time. (And the chain may have answered for a block that is orphaned
before the follower sees it, so no view is kept for longer than `VIEW_SECONDS`.) Promises one call in that time at the
most for a request that stands still. Decides nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from bsns.chain.client import ChainClient
from bsns.protocol.contract_states import Phase, RequestStatus
from bsns.protocol.identifiers import RequestId
from coordinator.network_state import RequestState
from coordinator.verification_desk import VerificationView

VIEW_SECONDS: Final = 30
"""Of chain time; a view that is older is asked for again."""


class VerificationViews:
    """Views by request."""

    def __init__(self, chain: ChainClient) -> None:
        self._chain = chain
        # The request, the view, and when it was asked for.
        self._known: dict[RequestId, tuple[RequestState, VerificationView, int]] = {}

    def keep(self, requests: Iterable[RequestState]) -> None:
        """Forget all others."""
        open_now = {item.request_id for item in requests}
        self._known = {key: value for key, value in self._known.items() if key in open_now}

    async def of(self, request: RequestState, now: int) -> VerificationView | None:
        """The view of `request` at Unix second `now`; None while there is none to judge by. ContractError and chain
        errors pass through.
        """
        if request.status not in (RequestStatus.COMMITTED, RequestStatus.VERIFIED) or now > request.deadline:
            return None
        known = self._known.get(request.request_id)
        if known is not None and known[0] == request and not _has_lapsed(known[1], known[2], now):
            return known[1]
        view = await self._ask(request)
        self._known[request.request_id] = request, view, now
        return view

    async def _ask(self, request: RequestState) -> VerificationView:
        verification = await self._chain.call("OutputVerification", "verificationOf", request.request_id)
        view = VerificationView.from_struct(verification)
        if view.phase != Phase.REVEALING or not view.has_committee:
            return view
        disputed = []
        for stage in range(len(request.stages)):
            record = await self._chain.call("OutputVerification", "stageRecordOf", request.request_id, stage)
            disputed.append(bool(record.disputed))
        return VerificationView.from_struct(verification, tuple(disputed))


def _has_lapsed(view: VerificationView, asked_at: int, now: int) -> bool:
    return now >= asked_at + VIEW_SECONDS or (view.phase == Phase.ATTESTING and now > view.attest_deadline)
