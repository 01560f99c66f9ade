"""Views of open requests: which of them the chain is asked for again."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

from bsns.protocol.contract_states import Phase, RequestStatus
from coordinator.verification_views import VIEW_SECONDS, VerificationViews
from tests.property.test_coordinator_verification_desk import _request

_NOW = 50


class _Chain:
    """Answers what a test sets, and counts."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.phase = Phase.ATTESTING
        self.disputed = [True, False]

    async def call(self, contract: str, function: str, *arguments: Any) -> Any:
        assert contract == "OutputVerification"
        self.calls.append(function)
        if function == "stageRecordOf":
            return SimpleNamespace(disputed=self.disputed[arguments[1]])
        return SimpleNamespace(
            phase=self.phase.value, round=1, sampled=True, entropyBlock=3, secretDeadline=10, attestDeadline=60,
            revealDeadline=70, challengeDeadline=0,
        )  # fmt: skip


async def test_request_that_stands_still_is_asked_for_once_until_its_view_is_old() -> None:
    chain = _Chain()
    views, request = VerificationViews(chain), _request()  # type: ignore[arg-type]
    for now in (_NOW, _NOW, _NOW + 5):
        view = await views.of(request, now)
        assert view is not None
        assert view.phase == Phase.ATTESTING
    assert chain.calls == ["verificationOf"]
    chain.calls.clear()
    await views.of(request, _NOW + VIEW_SECONDS)
    assert "verificationOf" in chain.calls


async def test_request_with_another_event_is_asked_for_again() -> None:
    chain = _Chain()
    views, request = VerificationViews(chain), _request()  # type: ignore[arg-type]
    await views.of(request, _NOW)
    chain.phase = Phase.REVEALING
    view = await views.of(dataclasses.replace(request, output_tokens=7), _NOW)
    assert view is not None
    assert (view.phase, view.disputed) == (Phase.REVEALING, (True, False))
    assert chain.calls == ["verificationOf", "verificationOf", "stageRecordOf", "stageRecordOf"]


async def test_attesting_that_is_over_is_asked_for_until_the_chain_says_so() -> None:
    chain = _Chain()
    views, request = VerificationViews(chain), _request()  # type: ignore[arg-type]
    await views.of(request, 55)
    for now in (61, 62):  # no block since the deadline
        await views.of(request, now)
    chain.phase = Phase.REVEALING
    for now in (63, 64):
        view = await views.of(request, now)
        assert view is not None
        assert view.phase == Phase.REVEALING
    assert chain.calls.count("verificationOf") == 4


async def test_requests_without_a_verdict_to_come_are_not_asked_for() -> None:
    chain = _Chain()
    views = VerificationViews(chain)  # type: ignore[arg-type]
    assert await views.of(dataclasses.replace(_request(), status=RequestStatus.ROUTED), _NOW) is None
    assert await views.of(_request(), _request().deadline + 1) is None
    assert chain.calls == []


async def test_views_of_requests_that_are_over_are_forgotten() -> None:
    chain = _Chain()
    views, request = VerificationViews(chain), _request()  # type: ignore[arg-type]
    await views.of(request, _NOW)
    views.keep([request])
    await views.of(request, _NOW)
    assert len(chain.calls) == 1
    views.keep([])
    await views.of(request, _NOW)
    assert len(chain.calls) == 2
